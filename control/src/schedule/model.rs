//! What the scheduler reads of pods and nodes. Invariant: amounts are whole numbers, rounded so that a request is
//! never taken for less than it is.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::controller::model::{Condition, Meta, StringMap, Taint, Toleration, or_default};
use crate::resource::quantity::Quantity;

/// The scheduler that this is, as pods name it.
pub(crate) const SCHEDULER: &str = "default-scheduler";
/// What a container without a request counts for when nodes are compared: upstream's figures.
const CPU_UNSTATED_MILLIS: i64 = 100;
const MEMORY_UNSTATED_BYTES: i64 = 200 << 20;

/// Amounts of resources.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Amounts {
    pub(crate) cpu_millis: i64,
    pub(crate) memory_bytes: i64,
    /// All others, by name.
    pub(crate) other: BTreeMap<String, i64>,
}

impl Amounts {
    fn parse(list: &BTreeMap<String, Value>) -> Amounts {
        let mut amounts = Amounts::default();
        for (name, value) in list {
            // Validation has refused what is no quantity; nothing is what is left of it here.
            let quantity = Quantity::from_json(value).unwrap_or(Quantity::ZERO);
            match name.as_str() {
                "cpu" => amounts.cpu_millis = quantity.millis(),
                "memory" => amounts.memory_bytes = quantity.units(),
                _ => {
                    amounts.other.insert(name.clone(), quantity.units());
                }
            }
        }
        amounts
    }

    pub(crate) fn add(&mut self, more: &Amounts) {
        self.combine(more, i64::saturating_add);
    }

    pub(crate) fn subtract(&mut self, less: &Amounts) {
        self.combine(less, i64::saturating_sub);
    }

    fn raise_to(&mut self, least: &Amounts) {
        self.combine(least, i64::max);
    }

    fn combine(&mut self, with: &Amounts, how: fn(i64, i64) -> i64) {
        self.cpu_millis = how(self.cpu_millis, with.cpu_millis);
        self.memory_bytes = how(self.memory_bytes, with.memory_bytes);
        for (name, amount) in &with.other {
            let mine = self.other.entry(name.clone()).or_insert(0);
            *mine = how(*mine, *amount);
        }
    }
}

/// A port of the node that a pod takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostPort {
    /// Empty for all addresses.
    pub(crate) ip: String,
    pub(crate) protocol: String,
    pub(crate) port: u16,
}

impl HostPort {
    pub(crate) fn collides(&self, other: &HostPort) -> bool {
        let everywhere = |ip: &str| ip.is_empty() || ip == "0.0.0.0" || ip == "::";
        self.port == other.port
            && self.protocol == other.protocol
            && (self.ip == other.ip || everywhere(&self.ip) || everywhere(&other.ip))
    }
}

/// What a pod takes of its node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) amounts: Amounts,
    /// CPU millicores and memory bytes for comparing nodes: containers without a request count for something.
    pub(crate) weight: (i64, i64),
    pub(crate) ports: Vec<HostPort>,
}

/// A pod that wants a node.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Ask {
    pub(crate) load: Load,
    pub(crate) node_selector: StringMap,
    /// If given, one of the terms must hold.
    pub(crate) required: Option<Vec<Term>>,
    pub(crate) preferred: Vec<(i64, Term)>,
    pub(crate) tolerations: Vec<Toleration>,
}

/// A node selector term: all of its requirements must hold.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Term {
    #[serde(deserialize_with = "or_default")]
    match_expressions: Vec<Requirement>,
    #[serde(deserialize_with = "or_default")]
    match_fields: Vec<Requirement>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Requirement {
    key: String,
    operator: String,
    #[serde(deserialize_with = "or_default")]
    values: Vec<String>,
}

impl Term {
    /// A term without requirements matches no node.
    pub(crate) fn matches(&self, name: &str, labels: &StringMap) -> bool {
        if self.match_expressions.is_empty() && self.match_fields.is_empty() {
            return false;
        }
        self.match_expressions.iter().all(|r| r.matches(labels.get(&r.key).map(String::as_str)))
            && self.match_fields.iter().all(|r| r.matches((r.key == "metadata.name").then_some(name)))
    }
}

impl Requirement {
    /// An operator that validation should have refused matches nothing.
    fn matches(&self, value: Option<&str>) -> bool {
        let is_listed = |v: &str| self.values.iter().any(|listed| listed == v);
        match self.operator.as_str() {
            "In" => value.is_some_and(is_listed),
            "NotIn" => !value.is_some_and(is_listed),
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            "Gt" => self.compares(value, |have, bound| have > bound),
            "Lt" => self.compares(value, |have, bound| have < bound),
            _ => false,
        }
    }

    fn compares(&self, value: Option<&str>, holds: fn(i64, i64) -> bool) -> bool {
        let have = value.and_then(|v| v.parse().ok());
        let bound = self.values.first().and_then(|v| v.parse().ok());
        have.zip(bound).is_some_and(|(have, bound)| holds(have, bound))
    }
}

/// What the scheduler has to know of a node.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct NodeFacts {
    pub(crate) labels: StringMap,
    pub(crate) taints: Vec<Taint>,
    pub(crate) is_unschedulable: bool,
    pub(crate) allocatable: Amounts,
    pub(crate) pods_max: i64,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawNode {
    metadata: Meta,
    #[serde(deserialize_with = "or_default")]
    spec: RawNodeSpec,
    #[serde(deserialize_with = "or_default")]
    status: RawNodeStatus,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawNodeSpec {
    #[serde(deserialize_with = "or_default")]
    unschedulable: bool,
    #[serde(deserialize_with = "or_default")]
    taints: Vec<Taint>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawNodeStatus {
    #[serde(deserialize_with = "or_default")]
    allocatable: BTreeMap<String, Value>,
}

/// Reads a Node.
pub(crate) fn node(bytes: &[u8]) -> Result<NodeFacts, serde_json::Error> {
    let raw: RawNode = serde_json::from_slice(bytes)?;
    let mut allocatable = Amounts::parse(&raw.status.allocatable);
    let pods_max = allocatable.other.remove("pods").unwrap_or(0);
    let mut taints = raw.spec.taints;
    for taint in &mut taints {
        // When a taint was added makes no difference to what may be placed.
        taint.time_added = None;
    }
    Ok(NodeFacts {
        labels: raw.metadata.labels,
        taints,
        is_unschedulable: raw.spec.unschedulable,
        allocatable,
        pods_max,
    })
}

/// A pod as read.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Pod {
    pub(crate) meta: Meta,
    /// Empty while it is unbound.
    pub(crate) node_name: String,
    pub(crate) scheduler: String,
    pub(crate) is_gated: bool,
    pub(crate) is_terminal: bool,
    pub(crate) priority: i64,
    /// The message of a condition that says that the pod cannot be placed.
    pub(crate) unschedulable: Option<String>,
    pub(crate) ask: Ask,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawPod {
    metadata: Meta,
    spec: RawPodSpec,
    #[serde(deserialize_with = "or_default")]
    status: RawPodStatus,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawPodSpec {
    #[serde(deserialize_with = "or_default")]
    node_name: String,
    #[serde(deserialize_with = "or_default")]
    scheduler_name: String,
    #[serde(deserialize_with = "or_default")]
    scheduling_gates: Vec<Value>,
    #[serde(deserialize_with = "or_default")]
    priority: i64,
    #[serde(deserialize_with = "or_default")]
    node_selector: StringMap,
    #[serde(deserialize_with = "or_default")]
    affinity: RawAffinity,
    #[serde(deserialize_with = "or_default")]
    tolerations: Vec<Toleration>,
    #[serde(deserialize_with = "or_default")]
    containers: Vec<RawContainer>,
    #[serde(deserialize_with = "or_default")]
    init_containers: Vec<RawContainer>,
    #[serde(deserialize_with = "or_default")]
    overhead: BTreeMap<String, Value>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawAffinity {
    #[serde(deserialize_with = "or_default")]
    node_affinity: RawNodeAffinity,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawNodeAffinity {
    #[serde(rename = "requiredDuringSchedulingIgnoredDuringExecution")]
    required: Option<RawTerms>,
    #[serde(rename = "preferredDuringSchedulingIgnoredDuringExecution", deserialize_with = "or_default")]
    preferred: Vec<RawPreferred>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawTerms {
    #[serde(deserialize_with = "or_default")]
    node_selector_terms: Vec<Term>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawPreferred {
    weight: i64,
    preference: Term,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawContainer {
    #[serde(deserialize_with = "or_default")]
    resources: RawResources,
    #[serde(deserialize_with = "or_default")]
    ports: Vec<RawPort>,
    /// `Always` makes an init container one that keeps running beside the others.
    #[serde(deserialize_with = "or_default")]
    restart_policy: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawResources {
    #[serde(deserialize_with = "or_default")]
    requests: BTreeMap<String, Value>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawPort {
    #[serde(deserialize_with = "or_default")]
    host_port: u16,
    #[serde(rename = "hostIP", deserialize_with = "or_default")]
    host_ip: String,
    #[serde(deserialize_with = "or_default")]
    protocol: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawPodStatus {
    #[serde(deserialize_with = "or_default")]
    phase: String,
    #[serde(deserialize_with = "or_default")]
    conditions: Vec<Condition>,
}

/// Reads a Pod.
pub(crate) fn pod(bytes: &[u8]) -> Result<Pod, serde_json::Error> {
    let raw: RawPod = serde_json::from_slice(bytes)?;
    let load = load(&raw.spec);
    let affinity = raw.spec.affinity.node_affinity;
    let scheduled = raw.status.conditions.into_iter().find(|c| c.kind == "PodScheduled");
    Ok(Pod {
        meta: raw.metadata,
        node_name: raw.spec.node_name,
        scheduler: raw.spec.scheduler_name,
        is_gated: !raw.spec.scheduling_gates.is_empty(),
        is_terminal: matches!(raw.status.phase.as_str(), "Succeeded" | "Failed"),
        priority: raw.spec.priority,
        unschedulable: scheduled.filter(|c| c.reason == "Unschedulable").map(|c| c.message),
        ask: Ask {
            load,
            node_selector: raw.spec.node_selector,
            required: affinity.required.map(|r| r.node_selector_terms),
            preferred: affinity.preferred.into_iter().map(|p| (p.weight, p.preference)).collect(),
            tolerations: raw.spec.tolerations,
        },
    })
}

/// What a pod takes: its containers at once, or its neediest moment of start-up if that is more. Init containers run
/// one after the other, those that keep running beside all that come after them.
fn load(spec: &RawPodSpec) -> Load {
    let mut running = Amounts::default();
    let mut start_up = Amounts::default();
    let mut weight = (0, 0);
    let mut start_up_weight = (0, 0);
    for container in &spec.init_containers {
        let amounts = Amounts::parse(&container.resources.requests);
        let its = weight_of(container, &amounts);
        let mut moment = running.clone();
        moment.add(&amounts);
        start_up.raise_to(&moment);
        let moment_weight = plus(weight, its);
        start_up_weight = (start_up_weight.0.max(moment_weight.0), start_up_weight.1.max(moment_weight.1));
        if container.restart_policy == "Always" {
            running = moment;
            weight = moment_weight;
        }
    }
    for container in &spec.containers {
        let amounts = Amounts::parse(&container.resources.requests);
        weight = plus(weight, weight_of(container, &amounts));
        running.add(&amounts);
    }
    running.raise_to(&start_up);
    let overhead = Amounts::parse(&spec.overhead);
    running.add(&overhead);
    let weight = (weight.0.max(start_up_weight.0), weight.1.max(start_up_weight.1));
    Load {
        ports: host_ports(spec),
        amounts: running,
        weight: plus(weight, (overhead.cpu_millis, overhead.memory_bytes)),
    }
}

fn plus(a: (i64, i64), b: (i64, i64)) -> (i64, i64) {
    (a.0.saturating_add(b.0), a.1.saturating_add(b.1))
}

fn weight_of(container: &RawContainer, amounts: &Amounts) -> (i64, i64) {
    let has = |name: &str| container.resources.requests.contains_key(name);
    let cpu = if has("cpu") { amounts.cpu_millis } else { CPU_UNSTATED_MILLIS };
    let memory = if has("memory") { amounts.memory_bytes } else { MEMORY_UNSTATED_BYTES };
    (cpu, memory)
}

fn host_ports(spec: &RawPodSpec) -> Vec<HostPort> {
    let keeps_running = spec.init_containers.iter().filter(|c| c.restart_policy == "Always");
    let ports = spec.containers.iter().chain(keeps_running).flat_map(|c| &c.ports);
    ports
        .filter(|p| p.host_port > 0)
        .map(|p| HostPort {
            ip: p.host_ip.clone(),
            protocol: if p.protocol.is_empty() { "TCP".to_owned() } else { p.protocol.clone() },
            port: p.host_port,
        })
        .collect()
}
