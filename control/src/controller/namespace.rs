//! Namespaces: how one ends, and what each has from the start. Invariant: a Namespace is finalized only when nothing
//! is left in it, so that a later one of the same name starts empty.

use serde::Deserialize;
use serde_json::{Value, json};

use super::action::{Action, Part, Target};
use super::model::Meta;
use crate::limits;
use crate::resource::Propagation;
use crate::resource::kinds::{CONFIG_MAPS, NAMESPACES, SERVICE_ACCOUNTS};

/// The finalizer in a Namespace's spec that this controller answers for.
const FINALIZER: &str = "kubernetes";
/// The ServiceAccount that every Namespace has.
pub(crate) const SERVICE_ACCOUNT: &str = "default";
/// The ConfigMap by which pods get to know the cluster's certificate authority.
pub(crate) const ROOT_CA: &str = "kube-root-ca.crt";

/// A Namespace.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Namespace {
    pub(crate) metadata: Meta,
    #[serde(deserialize_with = "super::model::or_default")]
    pub(crate) spec: NamespaceSpec,
}

/// `spec` of a [`Namespace`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct NamespaceSpec {
    #[serde(deserialize_with = "super::model::or_default")]
    pub(crate) finalizers: Vec<String>,
}

/// What one decision about a Namespace rests on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Observed {
    pub(crate) namespace: Namespace,
    /// All objects in it; only needed while it is being deleted.
    pub(crate) contents: Vec<Content>,
    /// Whether it has its default ServiceAccount.
    pub(crate) has_service_account: bool,
    /// The certificate in its root CA ConfigMap, if there is one.
    pub(crate) root_ca: Option<String>,
    /// The certificate that should be there, if the cluster's authority is known.
    pub(crate) root_ca_wanted: Option<String>,
}

/// An object in a Namespace that is being deleted.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Content {
    pub(crate) target: Target,
    pub(crate) is_deleting: bool,
}

/// What to do about a Namespace.
pub(crate) fn reconcile(seen: &Observed) -> Vec<Action> {
    let meta = &seen.namespace.metadata;
    if meta.is_deleting() {
        return empty(seen);
    }
    let mut actions = Vec::new();
    if !seen.has_service_account {
        actions.push(Action::Create {
            kind: &SERVICE_ACCOUNTS,
            namespace: meta.name.clone(),
            body: json!({
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": {"name": SERVICE_ACCOUNT, "namespace": meta.name},
            }),
        });
    }
    actions.extend(publish_root_ca(seen));
    actions
}

fn publish_root_ca(seen: &Observed) -> Option<Action> {
    let wanted = seen.root_ca_wanted.as_ref()?;
    let namespace = seen.namespace.metadata.name.clone();
    let data = json!({ "ca.crt": wanted });
    match &seen.root_ca {
        Some(have) if have == wanted => None,
        Some(_) => Some(Action::Edit {
            target: Target {
                kind: &CONFIG_MAPS,
                namespace,
                name: ROOT_CA.to_owned(),
                uid: String::new(),
                rev: None,
            },
            part: Part::Main,
            merge: json!({ "data": data }),
        }),
        None => Some(Action::Create {
            kind: &CONFIG_MAPS,
            body: json!({
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": ROOT_CA, "namespace": namespace},
                "data": data,
            }),
            namespace,
        }),
    }
}

/// Deletes what is in the Namespace; once nothing is, lets the Namespace go.
fn empty(seen: &Observed) -> Vec<Action> {
    if !seen.contents.is_empty() {
        let left: Vec<Action> =
            seen.contents.iter().filter(|c| !c.is_deleting).map(|c| delete(&c.target)).collect();
        return left
            .chunks(limits::NAMESPACE_DELETE_BURST_MAX)
            .map(|c| Action::Together(c.to_vec()))
            .collect();
    }
    let finalizers = &seen.namespace.spec.finalizers;
    if !finalizers.iter().any(|f| f == FINALIZER) {
        return Vec::new();
    }
    let left: Vec<&String> = finalizers.iter().filter(|f| *f != FINALIZER).collect();
    vec![Action::Edit {
        target: Target::unchanged(&NAMESPACES, &seen.namespace.metadata),
        part: Part::Finalize,
        merge: json!({"spec": {"finalizers": if left.is_empty() { Value::Null } else { json!(left) }}}),
    }]
}

fn delete(target: &Target) -> Action {
    Action::Delete { target: target.clone(), grace_seconds: None, propagation: Propagation::Background }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::world::view;
    use crate::resource::kinds::PODS;

    fn seen(namespace: Value) -> Observed {
        Observed {
            namespace: view(&namespace),
            contents: vec![],
            has_service_account: true,
            root_ca: Some("cert".to_owned()),
            root_ca_wanted: Some("cert".to_owned()),
        }
    }

    fn content(name: &str, is_deleting: bool) -> Content {
        let target = Target {
            kind: &PODS,
            namespace: "team".to_owned(),
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            rev: None,
        };
        Content { target, is_deleting }
    }

    fn dying() -> Observed {
        seen(json!({"metadata": {"name": "team", "deletionTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"finalizers": ["kubernetes"]}}))
    }

    #[test]
    fn every_namespace_gets_its_standard_objects() {
        let live = seen(json!({"metadata": {"name": "team"}, "spec": {"finalizers": ["kubernetes"]}}));
        assert_eq!(reconcile(&live), []);
        let bare = Observed { has_service_account: false, root_ca: None, ..live.clone() };
        let kinds: Vec<&str> = reconcile(&bare)
            .iter()
            .map(|a| match a {
                Action::Create { kind, namespace, .. } if namespace == "team" => kind.kind,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(kinds, ["ServiceAccount", "ConfigMap"]);
        let unknown = Observed { root_ca: None, root_ca_wanted: None, ..live.clone() };
        assert_eq!(reconcile(&unknown), [], "without a known authority nothing is published");
        let renewed = Observed { root_ca_wanted: Some("new".to_owned()), ..live };
        let [Action::Edit { merge, .. }] = &reconcile(&renewed)[..] else { panic!("no edit") };
        assert_eq!(merge["data"]["ca.crt"], "new");
    }

    #[test]
    fn a_dying_namespace_is_emptied_first() {
        let full = Observed { contents: vec![content("a", false), content("b", true)], ..dying() };
        let [Action::Together(deletes)] = &reconcile(&full)[..] else { panic!("no deletes") };
        let [Action::Delete { target, .. }] = deletes.as_slice() else { panic!("{deletes:?}") };
        assert_eq!(target.name, "a", "what is on its way is left alone");
        let going = Observed { contents: vec![content("b", true)], ..dying() };
        assert_eq!(reconcile(&going), []);
    }

    #[test]
    fn an_empty_dying_namespace_is_finalized() {
        let [Action::Edit { part, merge, .. }] = &reconcile(&dying())[..] else { panic!("no edit") };
        assert_eq!((*part, &merge["spec"]["finalizers"]), (Part::Finalize, &Value::Null));
        let done = Observed {
            namespace: Namespace { spec: NamespaceSpec::default(), ..dying().namespace },
            ..dying()
        };
        assert_eq!(reconcile(&done), []);
    }

    #[test]
    fn an_empty_dying_namespace_gets_nothing_new() {
        let bare = Observed { has_service_account: false, root_ca: None, ..dying() };
        assert!(!reconcile(&bare).iter().any(|a| matches!(a, Action::Create { .. })));
    }
}
