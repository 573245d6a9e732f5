//! What the cache keeps beside an object's bytes: enough for selectors, garbage collection and scheduling, and
//! small enough to be kept for every object.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::kinds::{self, Kind};
use super::object;

/// An entry of `metadata.ownerReferences`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnerRef {
    /// The owner's uid.
    pub uid: Box<str>,
    /// Whether this owner is the managing controller.
    pub controller: bool,
    /// Whether foreground deletion of the owner waits for this object.
    pub block_owner_deletion: bool,
}

/// The extract of one object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObjectIndex {
    /// `metadata.name`.
    pub name: Box<str>,
    /// `metadata.namespace`; empty for cluster scope.
    pub namespace: Box<str>,
    /// `metadata.uid`.
    pub uid: Box<str>,
    /// `metadata.labels`, sorted by key.
    pub labels: Box<[(Box<str>, Box<str>)]>,
    /// `metadata.ownerReferences`.
    pub owners: Box<[OwnerRef]>,
    /// `metadata.generation`; 0 when the kind has none.
    pub generation: i64,
    /// `metadata.creationTimestamp`, seconds since 1970.
    pub created: i64,
    /// `metadata.deletionTimestamp`, seconds since 1970 (a pod's includes the grace period).
    pub deletion: Option<i64>,
    /// Whether any finalizer is set.
    pub has_finalizers: bool,
    /// Pods and nodes: whether the condition `Ready` is `True`.
    pub ready: bool,
    /// Values for field selectors: position in [`fields_of`] and the value; empty values are left out.
    fields: Box<[(u8, Cow<'static, str>)]>,
}

/// Where the value of a selectable field comes from.
pub(super) struct FieldSource {
    /// The name in a field selector.
    pub name: &'static str,
    path: &'static [&'static str],
    /// The value when the field is absent.
    absent: &'static str,
}

const fn field(name: &'static str, path: &'static [&'static str]) -> FieldSource {
    FieldSource { name, path, absent: "" }
}

static POD_FIELDS: [FieldSource; 8] = [
    field("spec.nodeName", &["spec", "nodeName"]),
    field("status.phase", &["status", "phase"]),
    field("status.podIP", &["status", "podIP"]),
    field("spec.restartPolicy", &["spec", "restartPolicy"]),
    field("spec.schedulerName", &["spec", "schedulerName"]),
    field("spec.serviceAccountName", &["spec", "serviceAccountName"]),
    FieldSource { name: "spec.hostNetwork", path: &["spec", "hostNetwork"], absent: "false" },
    field("status.nominatedNodeName", &["status", "nominatedNodeName"]),
];
static EVENT_FIELDS: [FieldSource; 11] = [
    field("involvedObject.kind", &["involvedObject", "kind"]),
    field("involvedObject.namespace", &["involvedObject", "namespace"]),
    field("involvedObject.name", &["involvedObject", "name"]),
    field("involvedObject.uid", &["involvedObject", "uid"]),
    field("involvedObject.apiVersion", &["involvedObject", "apiVersion"]),
    field("involvedObject.resourceVersion", &["involvedObject", "resourceVersion"]),
    field("involvedObject.fieldPath", &["involvedObject", "fieldPath"]),
    field("reason", &["reason"]),
    field("reportingComponent", &["reportingComponent"]),
    field("source", &["source", "component"]),
    field("type", &["type"]),
];
static NODE_FIELDS: [FieldSource; 1] =
    [FieldSource { name: "spec.unschedulable", path: &["spec", "unschedulable"], absent: "false" }];
static SECRET_FIELDS: [FieldSource; 1] = [field("type", &["type"])];
static NAMESPACE_FIELDS: [FieldSource; 1] = [field("status.phase", &["status", "phase"])];
static SERVICE_FIELDS: [FieldSource; 2] =
    [field("spec.clusterIP", &["spec", "clusterIP"]), field("spec.type", &["spec", "type"])];
static REPLICA_SET_FIELDS: [FieldSource; 1] =
    [FieldSource { name: "status.replicas", path: &["status", "replicas"], absent: "0" }];

/// The selectable fields of a kind besides `metadata.name` and `metadata.namespace`.
pub(super) fn fields_of(kind: &Kind) -> &'static [FieldSource] {
    match (kind.group, kind.plural) {
        ("", "pods") => &POD_FIELDS,
        ("", "events") => &EVENT_FIELDS,
        ("", "nodes") => &NODE_FIELDS,
        ("", "secrets") => &SECRET_FIELDS,
        ("", "namespaces") => &NAMESPACE_FIELDS,
        ("", "services") => &SERVICE_FIELDS,
        ("apps", "replicasets") => &REPLICA_SET_FIELDS,
        _ => &[],
    }
}

/// Values so frequent that they are shared instead of kept once an object.
static COMMON_VALUES: [&str; 17] = [
    "0",
    "Active",
    "Always",
    "ClusterIP",
    "Failed",
    "Never",
    "Normal",
    "Opaque",
    "Pending",
    "Pod",
    "Running",
    "Succeeded",
    "Warning",
    "default",
    "default-scheduler",
    "false",
    "v1",
];

fn shared(value: &str) -> Cow<'static, str> {
    match COMMON_VALUES.binary_search(&value) {
        Ok(i) => Cow::Borrowed(COMMON_VALUES[i]),
        Err(_) => Cow::Owned(value.to_owned()),
    }
}

fn field_value(source: &FieldSource, object: &Value) -> Option<Cow<'static, str>> {
    let text = match object::at(object, source.path) {
        Some(Value::String(s)) => shared(s),
        Some(Value::Bool(b)) => shared(if *b { "true" } else { "false" }),
        Some(Value::Number(n)) => shared(&n.to_string()),
        _ => Cow::Borrowed(source.absent),
    };
    (!text.is_empty()).then_some(text)
}

impl ObjectIndex {
    /// Extracts the index of an object of `kind`. Never fails: what is missing or malformed is left empty.
    pub fn extract(kind: &Kind, object: &Value) -> Self {
        let seconds = |path: &[&str]| object::time_at(object, path).map(|t| t.as_second());
        let fields = fields_of(kind)
            .iter()
            .enumerate()
            .filter_map(|(i, source)| Some((u8::try_from(i).ok()?, field_value(source, object)?)))
            .collect();
        Self {
            name: object::name(object).into(),
            namespace: object::namespace(object).into(),
            uid: object::uid(object).into(),
            labels: object::labels(object).map(sorted_pairs).unwrap_or_default(),
            owners: object::items_at(object, &["metadata", "ownerReferences"])
                .iter()
                .map(|owner| OwnerRef {
                    uid: object::str_at(owner, &["uid"]).into(),
                    controller: object::bool_at(owner, &["controller"]),
                    block_owner_deletion: object::bool_at(owner, &["blockOwnerDeletion"]),
                })
                .collect(),
            generation: object::int_at(object, &["metadata", "generation"]).unwrap_or(0),
            created: seconds(&["metadata", "creationTimestamp"]).unwrap_or(0),
            deletion: seconds(&["metadata", "deletionTimestamp"]),
            has_finalizers: !object::items_at(object, &["metadata", "finalizers"]).is_empty(),
            ready: (kind == &kinds::PODS || kind == &kinds::NODES) && is_ready(object),
            fields,
        }
    }

    /// The value of a label.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.binary_search_by(|(k, _)| (**k).cmp(key)).ok().map(|i| &*self.labels[i].1)
    }

    /// The uid of the managing controller.
    pub fn controller_uid(&self) -> Option<&str> {
        self.owners.iter().find(|o| o.controller).map(|o| &*o.uid)
    }

    /// The value of a selectable field of `kind`; empty when unset or unknown.
    pub fn field(&self, kind: &Kind, name: &str) -> &str {
        match name {
            "metadata.name" => &self.name,
            "metadata.namespace" => &self.namespace,
            _ => fields_of(kind).iter().position(|f| f.name == name).map_or("", |i| self.field_at(i)),
        }
    }

    pub(super) fn field_at(&self, position: usize) -> &str {
        self.fields.iter().find(|(i, _)| usize::from(*i) == position).map_or("", |(_, v)| v)
    }

    /// Pods: the node the pod is bound to; empty when unbound or not a pod.
    pub fn node_name(&self, kind: &Kind) -> &str {
        if kind == &kinds::PODS { self.field_at(0) } else { "" }
    }

    /// Pods and namespaces: `status.phase`.
    pub fn phase(&self, kind: &Kind) -> &str {
        self.field(kind, "status.phase")
    }
}

fn sorted_pairs(map: &Map<String, Value>) -> Box<[(Box<str>, Box<str>)]> {
    let mut pairs: Box<[(Box<str>, Box<str>)]> =
        map.iter().filter_map(|(k, v)| Some((k.as_str().into(), v.as_str()?.into()))).collect();
    pairs.sort_unstable();
    pairs
}

fn is_ready(object: &Value) -> bool {
    object::items_at(object, &["status", "conditions"])
        .iter()
        .any(|c| object::str_at(c, &["type"]) == "Ready" && object::str_at(c, &["status"]) == "True")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn common_values_are_sorted() {
        assert!(COMMON_VALUES.is_sorted());
    }

    #[test]
    fn extracts_a_pod() {
        let pod = json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "generation": 3,
                "creationTimestamp": "1970-01-01T00:00:09Z", "deletionTimestamp": "1970-01-01T00:01:00Z",
                "labels": {"z": "1", "a": "2"}, "finalizers": ["x/y"],
                "ownerReferences": [{"uid": "o1"}, {"uid": "o2", "controller": true, "blockOwnerDeletion": true}]},
            "spec": {"nodeName": "node-1", "restartPolicy": "Always"},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
        });
        let index = ObjectIndex::extract(&kinds::PODS, &pod);
        assert_eq!((&*index.name, &*index.namespace, &*index.uid), ("p", "n", "u"));
        assert_eq!(index.label("a"), Some("2"));
        assert_eq!(index.label("b"), None);
        assert_eq!(index.controller_uid(), Some("o2"));
        assert_eq!((index.generation, index.created, index.deletion), (3, 9, Some(60)));
        assert!(index.has_finalizers && index.ready);
        assert_eq!(index.node_name(&kinds::PODS), "node-1");
        assert_eq!(index.phase(&kinds::PODS), "Running");
        assert_eq!(index.field(&kinds::PODS, "spec.hostNetwork"), "false");
        assert_eq!(index.field(&kinds::PODS, "metadata.name"), "p");
        assert_eq!(index.field(&kinds::PODS, "status.podIP"), "");
    }

    #[test]
    fn junk_is_left_empty() {
        let index = ObjectIndex::extract(&kinds::NODES, &json!([1, 2]));
        assert_eq!(index.field(&kinds::NODES, "spec.unschedulable"), "false");
        assert_eq!(&*index.name, "");
        let odd = json!({"metadata": {"labels": {"a": 1}, "creationTimestamp": "yesterday"}});
        let index = ObjectIndex::extract(&kinds::CONFIG_MAPS, &odd);
        assert!(index.labels.is_empty());
        assert_eq!(index.created, 0);
    }
}
