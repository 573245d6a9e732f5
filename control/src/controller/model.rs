//! What the controllers read of API objects. Invariant: these are views, parsed from the admitted bytes for one
//! reconcile and dropped after it; nothing is ever written back through them, so a field that a view does not know
//! cannot be lost.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::resource::LabelSelector;

/// Labels or annotations of an object.
pub(crate) type StringMap = BTreeMap<String, String>;

/// `null` reads as the type's default: clients send `"labels": null`.
pub(crate) fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// `metadata` of any object.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Meta {
    pub(crate) name: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) namespace: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) uid: String,
    /// The revision that the view was parsed from. It is filled from the cached object, not from the JSON.
    #[serde(skip)]
    pub(crate) rev: u64,
    #[serde(deserialize_with = "or_default")]
    pub(crate) generation: i64,
    pub(crate) creation_timestamp: Option<Timestamp>,
    pub(crate) deletion_timestamp: Option<Timestamp>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) labels: StringMap,
    #[serde(deserialize_with = "or_default")]
    pub(crate) annotations: StringMap,
    #[serde(deserialize_with = "or_default")]
    pub(crate) owner_references: Vec<OwnerReference>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) finalizers: Vec<String>,
}

impl Meta {
    /// The reference with `controller: true`, of which there is at most one.
    pub(crate) fn controller(&self) -> Option<&OwnerReference> {
        self.owner_references.iter().find(|r| r.controller == Some(true))
    }

    pub(crate) fn is_deleting(&self) -> bool {
        self.deletion_timestamp.is_some()
    }

    pub(crate) fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str)
    }
}

/// One entry of `metadata.ownerReferences`; all of its fields, so that a list of them can be written back.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct OwnerReference {
    pub(crate) api_version: String,
    pub(crate) kind: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) controller: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) block_owner_deletion: Option<bool>,
}

/// Any object, when only its metadata matters.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Headed {
    pub(crate) metadata: Meta,
}

/// A view that knows which revision it is of.
pub(crate) trait View: DeserializeOwned {
    fn meta_mut(&mut self) -> &mut Meta;
}

macro_rules! view {
    ($($view:ty),*) => {
        $(impl View for $view {
            fn meta_mut(&mut self) -> &mut Meta {
                &mut self.metadata
            }
        })*
    };
}

view!(
    Headed,
    Pod,
    ReplicaSet,
    Deployment,
    Service,
    Node,
    super::namespace::Namespace,
    super::endpoint_slice::Slice
);

/// A `metav1.Condition`-like entry of a status; absent fields stay absent when it is written back.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Condition {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) status: String,
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub(crate) reason: String,
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub(crate) message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_transition_time: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_update_time: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_heartbeat_time: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_probe_time: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) observed_generation: Option<i64>,
}

/// The condition of a type, if the object has it.
pub(crate) fn condition<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.kind == kind)
}

/// A pod, as the controllers see it (the scheduler has a view of its own).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Pod {
    pub(crate) metadata: Meta,
    pub(crate) spec: PodSpec,
    #[serde(deserialize_with = "or_default")]
    pub(crate) status: PodStatus,
}

/// `spec` of a [`Pod`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct PodSpec {
    #[serde(deserialize_with = "or_default")]
    pub(crate) node_name: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) hostname: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) subdomain: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) containers: Vec<Container>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) tolerations: Vec<Toleration>,
}

/// A container of a [`PodSpec`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Container {
    pub(crate) name: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) ports: Vec<ContainerPort>,
}

/// A port that a container names.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ContainerPort {
    #[serde(deserialize_with = "or_default")]
    pub(crate) name: String,
    pub(crate) container_port: u16,
    #[serde(deserialize_with = "or_default")]
    pub(crate) protocol: String,
}

/// A toleration of a pod.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Toleration {
    #[serde(deserialize_with = "or_default")]
    pub(crate) key: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) operator: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) value: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) effect: String,
    pub(crate) toleration_seconds: Option<i64>,
}

impl Toleration {
    /// Whether the toleration covers the taint: an empty key with `Exists` covers all keys, an empty effect all effects.
    pub(crate) fn tolerates(&self, taint: &Taint) -> bool {
        if !self.effect.is_empty() && self.effect != taint.effect {
            return false;
        }
        if self.key.is_empty() {
            return self.operator == "Exists";
        }
        self.key == taint.key && (self.operator == "Exists" || self.value == taint.value)
    }
}

/// `status` of a [`Pod`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct PodStatus {
    #[serde(deserialize_with = "or_default")]
    pub(crate) phase: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) conditions: Vec<Condition>,
    #[serde(rename = "podIP", deserialize_with = "or_default")]
    pub(crate) pod_ip: String,
    #[serde(rename = "podIPs", deserialize_with = "or_default")]
    pub(crate) pod_ips: Vec<PodIp>,
    #[serde(rename = "containerStatuses", deserialize_with = "or_default")]
    pub(crate) container_statuses: Vec<ContainerStatus>,
}

/// One of a pod's addresses.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct PodIp {
    pub(crate) ip: String,
}

/// What the deletion order wants to know of a container.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ContainerStatus {
    #[serde(deserialize_with = "or_default")]
    pub(crate) restart_count: i64,
}

impl Pod {
    /// The pod is over: it neither counts as a replica nor serves.
    pub(crate) fn is_terminal(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    /// The pod counts as a replica: neither over nor being deleted.
    pub(crate) fn is_active(&self) -> bool {
        !self.is_terminal() && !self.metadata.is_deleting()
    }

    /// Since when the pod is ready, if it is. A Ready condition without a time counts from the epoch.
    pub(crate) fn ready_since(&self) -> Option<Timestamp> {
        let ready = condition(&self.status.conditions, "Ready")?;
        (ready.status == "True").then(|| ready.last_transition_time.unwrap_or(Timestamp::UNIX_EPOCH))
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.ready_since().is_some()
    }
}

/// A ReplicaSet.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct ReplicaSet {
    pub(crate) metadata: Meta,
    pub(crate) spec: ReplicaSetSpec,
    #[serde(deserialize_with = "or_default")]
    pub(crate) status: ReplicaSetStatus,
}

/// `spec` of a [`ReplicaSet`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ReplicaSetSpec {
    pub(crate) replicas: i64,
    #[serde(deserialize_with = "or_default")]
    pub(crate) min_ready_seconds: i64,
    #[serde(deserialize_with = "selector")]
    pub(crate) selector: LabelSelector,
    pub(crate) template: Value,
}

impl Default for ReplicaSetSpec {
    fn default() -> Self {
        ReplicaSetSpec { replicas: 1, min_ready_seconds: 0, selector: nothing(), template: Value::Null }
    }
}

/// `status` of a [`ReplicaSet`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ReplicaSetStatus {
    pub(crate) replicas: i64,
    pub(crate) fully_labeled_replicas: i64,
    pub(crate) ready_replicas: i64,
    pub(crate) available_replicas: i64,
    pub(crate) observed_generation: i64,
    #[serde(deserialize_with = "or_default")]
    pub(crate) conditions: Vec<Condition>,
}

/// A Deployment.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Deployment {
    pub(crate) metadata: Meta,
    pub(crate) spec: DeploymentSpec,
    #[serde(deserialize_with = "or_default")]
    pub(crate) status: DeploymentStatus,
}

/// `spec` of a [`Deployment`]; the defaults are those of the API.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct DeploymentSpec {
    pub(crate) replicas: i64,
    #[serde(deserialize_with = "or_default")]
    pub(crate) min_ready_seconds: i64,
    #[serde(deserialize_with = "or_default")]
    pub(crate) paused: bool,
    pub(crate) progress_deadline_seconds: Option<i64>,
    pub(crate) revision_history_limit: Option<i64>,
    pub(crate) selector: SelectorSource,
    #[serde(deserialize_with = "or_default")]
    pub(crate) strategy: Strategy,
    pub(crate) template: Value,
}

impl Default for DeploymentSpec {
    fn default() -> Self {
        DeploymentSpec {
            replicas: 1,
            min_ready_seconds: 0,
            paused: false,
            progress_deadline_seconds: None,
            revision_history_limit: None,
            selector: SelectorSource::default(),
            strategy: Strategy::default(),
            template: Value::Null,
        }
    }
}

/// `spec.strategy` of a Deployment.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Strategy {
    #[serde(rename = "type", deserialize_with = "or_default")]
    pub(crate) kind: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) rolling_update: RollingUpdate,
}

/// `spec.strategy.rollingUpdate` of a Deployment.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct RollingUpdate {
    pub(crate) max_surge: Option<IntOrString>,
    pub(crate) max_unavailable: Option<IntOrString>,
}

/// A number or a text such as `25%` or a port's name.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub(crate) enum IntOrString {
    Int(i64),
    Text(String),
}

/// `status` of a [`Deployment`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct DeploymentStatus {
    pub(crate) replicas: i64,
    pub(crate) updated_replicas: i64,
    pub(crate) ready_replicas: i64,
    pub(crate) available_replicas: i64,
    pub(crate) unavailable_replicas: i64,
    pub(crate) observed_generation: i64,
    pub(crate) collision_count: Option<i64>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) conditions: Vec<Condition>,
}

/// Whether a selector picks an object with these labels.
pub(crate) fn selects(selector: &LabelSelector, labels: &StringMap) -> bool {
    selector.matches_with(|key| labels.get(key).map(String::as_str))
}

/// An absent selector selects nothing, as the API has it for workloads.
fn nothing() -> LabelSelector {
    LabelSelector::nothing()
}

fn selector<'de, D: Deserializer<'de>>(deserializer: D) -> Result<LabelSelector, D::Error> {
    LabelSelector::from_json(&Value::deserialize(deserializer)?).map_err(D::Error::custom)
}

/// A selector together with the JSON that it was read from: ReplicaSets get their Deployment's with one more label.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SelectorSource {
    pub(crate) json: Value,
    pub(crate) parsed: LabelSelector,
}

impl Default for SelectorSource {
    fn default() -> Self {
        SelectorSource { json: Value::Null, parsed: nothing() }
    }
}

impl<'de> Deserialize<'de> for SelectorSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = Value::deserialize(deserializer)?;
        let parsed = LabelSelector::from_json(&json).map_err(D::Error::custom)?;
        Ok(SelectorSource { json, parsed })
    }
}

/// Whether `labels` has every pair of `wanted`.
pub(crate) fn contains_all(labels: &StringMap, wanted: &StringMap) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// A Service.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Service {
    pub(crate) metadata: Meta,
    pub(crate) spec: ServiceSpec,
}

/// `spec` of a [`Service`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ServiceSpec {
    #[serde(rename = "type", deserialize_with = "or_default")]
    pub(crate) kind: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) selector: StringMap,
    #[serde(deserialize_with = "or_default")]
    pub(crate) ports: Vec<ServicePort>,
    #[serde(rename = "clusterIP", deserialize_with = "or_default")]
    pub(crate) cluster_ip: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) ip_families: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) publish_not_ready_addresses: bool,
    #[serde(deserialize_with = "or_default")]
    pub(crate) traffic_distribution: String,
}

/// One of a Service's ports.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ServicePort {
    #[serde(deserialize_with = "or_default")]
    pub(crate) name: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) protocol: String,
    pub(crate) port: u16,
    pub(crate) target_port: Option<IntOrString>,
    pub(crate) app_protocol: Option<String>,
}

/// A Node, as its lifecycle sees it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Node {
    pub(crate) metadata: Meta,
    #[serde(deserialize_with = "or_default")]
    pub(crate) spec: NodeSpec,
    #[serde(deserialize_with = "or_default")]
    pub(crate) status: NodeStatus,
}

/// `spec` of a [`Node`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct NodeSpec {
    #[serde(deserialize_with = "or_default")]
    pub(crate) unschedulable: bool,
    #[serde(deserialize_with = "or_default")]
    pub(crate) taints: Vec<Taint>,
    #[serde(rename = "podCIDR")]
    pub(crate) pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs", deserialize_with = "or_default")]
    pub(crate) pod_cidrs: Vec<String>,
}

/// A taint of a node; all of its fields, so that a list of them can be written back.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Taint {
    pub(crate) key: String,
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub(crate) value: String,
    pub(crate) effect: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) time_added: Option<Timestamp>,
}

/// `status` of a [`Node`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct NodeStatus {
    #[serde(deserialize_with = "or_default")]
    pub(crate) conditions: Vec<Condition>,
}

impl Node {
    /// The node's agent says that the node is well, and nobody has overruled it.
    pub(crate) fn is_ready(&self) -> bool {
        condition(&self.status.conditions, "Ready").is_some_and(|c| c.status == "True")
    }
}
