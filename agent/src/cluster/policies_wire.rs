//! Network policies, and pods and namespaces as policies see them, on the wire and as models. Invariant: a policy that
//! says something that is not understood never allows more than it says.

use super::wire::{meta, resource};
use crate::policy::{
    Key, Labels, NamedPort, Namespace, Op, Peer, Pod, Policy, Port, Requirement, Rule, Selector, Which,
};
use ipnetwork::IpNetwork;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope, Resource as _};
use serde::Deserialize;
use sheave_ebpf_abi::{PROTO_SCTP, PROTO_TCP, PROTO_UDP};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// A NetworkPolicy.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct WirePolicy {
    #[serde(deserialize_with = "meta")]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    spec: PolicySpec,
}
resource!(
    WirePolicy,
    k8s_openapi::api::networking::v1::NetworkPolicy,
    NamespaceResourceScope,
    "networkpolicies"
);

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PolicySpec {
    pod_selector: Option<WireSelector>,
    policy_types: Option<Vec<String>>,
    ingress: Option<Vec<WireRule>>,
    egress: Option<Vec<WireRule>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireRule {
    ports: Option<Vec<WirePort>>,
    from: Option<Vec<WirePeer>>,
    to: Option<Vec<WirePeer>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum NumberOrName {
    Number(i64),
    Name(String),
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WirePort {
    protocol: Option<String>,
    port: Option<NumberOrName>,
    end_port: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WirePeer {
    pod_selector: Option<WireSelector>,
    namespace_selector: Option<WireSelector>,
    ip_block: Option<WireBlock>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct WireBlock {
    cidr: String,
    except: Option<Vec<String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireSelector {
    match_labels: Option<BTreeMap<String, String>>,
    match_expressions: Option<Vec<WireRequirement>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct WireRequirement {
    key: String,
    operator: String,
    values: Option<Vec<String>>,
}

/// A Pod as policies see it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct WirePeerPod {
    #[serde(deserialize_with = "meta")]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    spec: PeerPodSpec,
    #[serde(default)]
    status: PeerPodStatus,
}
resource!(WirePeerPod, k8s_openapi::api::core::v1::Pod, NamespaceResourceScope, "pods");

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PeerPodSpec {
    node_name: Option<String>,
    host_network: Option<bool>,
    containers: Vec<PeerContainer>,
    init_containers: Option<Vec<PeerContainer>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct PeerContainer {
    ports: Option<Vec<PeerPort>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PeerPort {
    name: Option<String>,
    container_port: i64,
    protocol: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PeerPodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PeerPodIp>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct PeerPodIp {
    ip: String,
}

/// A Namespace.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct WireNamespace {
    #[serde(deserialize_with = "meta")]
    pub(super) metadata: ObjectMeta,
}
resource!(WireNamespace, k8s_openapi::api::core::v1::Namespace, ClusterResourceScope, "namespaces");

fn text(text: Option<&String>) -> Box<str> {
    text.map(String::as_str).unwrap_or_default().into()
}

fn labels(meta: &ObjectMeta) -> Labels {
    meta.labels.iter().flatten().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

/// The key of an object: `namespace/name`, or the name of what has no namespace.
pub(super) fn key(meta: &ObjectMeta) -> Key {
    let name = meta.name.as_deref().unwrap_or_default();
    match meta.namespace.as_deref() {
        Some(namespace) => format!("{namespace}/{name}").into(),
        None => name.into(),
    }
}

fn proto(name: Option<&String>) -> Option<u8> {
    match name.map_or("TCP", String::as_str) {
        "" | "TCP" => Some(PROTO_TCP),
        "UDP" => Some(PROTO_UDP),
        "SCTP" => Some(PROTO_SCTP),
        _ => None,
    }
}

pub(super) fn namespace(wire: &WireNamespace) -> Namespace {
    Namespace { name: text(wire.metadata.name.as_ref()), labels: labels(&wire.metadata) }
}

/// The pod, unless it has no address of its own: it ended, or it has the host's.
pub(super) fn pod(wire: &WirePeerPod, node_name: &str) -> Option<Pod> {
    let ended = matches!(wire.status.phase.as_deref(), Some("Succeeded" | "Failed"));
    if ended || wire.spec.host_network == Some(true) {
        return None;
    }
    let all = wire.status.pod_ips.iter().flatten().map(|at| &at.ip).chain(&wire.status.pod_ip);
    let mut ips: Vec<IpAddr> = all.filter_map(|ip| ip.parse().ok()).collect();
    ips.sort();
    ips.dedup();
    let containers = wire.spec.containers.iter().chain(wire.spec.init_containers.iter().flatten());
    let named = containers.flat_map(|container| container.ports.iter().flatten()).filter_map(|port| {
        let name = port.name.as_deref().filter(|name| !name.is_empty())?;
        let number = u16::try_from(port.container_port).ok()?;
        Some(NamedPort { name: name.into(), proto: proto(port.protocol.as_ref())?, port: number })
    });
    Some(Pod {
        namespace: text(wire.metadata.namespace.as_ref()),
        name: text(wire.metadata.name.as_ref()),
        uid: text(wire.metadata.uid.as_ref()),
        labels: labels(&wire.metadata),
        ips: ips.into(),
        ports: named.collect(),
        local: wire.spec.node_name.as_deref() == Some(node_name),
    })
}

/// The policy, and what of it is not understood.
pub(super) fn policy(wire: &WirePolicy) -> (Policy, Vec<String>) {
    let mut problems = Vec::new();
    let spec = &wire.spec;
    let given = spec.policy_types.as_deref().unwrap_or_default();
    let is = |direction: &str| given.iter().any(|kind| kind == direction);
    let has_egress = spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
    let ingress = given.is_empty() || is("Ingress");
    let egress = is("Egress") || given.is_empty() && has_egress;
    let mut rules = |wire: &Option<Vec<WireRule>>, direction: &str| -> Box<[Rule]> {
        let all = wire.iter().flatten().enumerate();
        all.filter_map(|(i, wire)| rule(wire, &format!("spec.{direction}[{i}]"), &mut problems)).collect()
    };
    let ingress = ingress.then(|| rules(&spec.ingress, "ingress"));
    let egress = egress.then(|| rules(&spec.egress, "egress"));
    let policy = Policy {
        namespace: text(wire.metadata.namespace.as_ref()),
        name: text(wire.metadata.name.as_ref()),
        selector: spec.pod_selector.as_ref().map(selector).unwrap_or_default(),
        ingress,
        egress,
    };
    (policy, problems)
}

/// A rule of which some peers or ports are not understood is about the others; one without any is none, for a rule that
/// names nobody is about everybody.
fn rule(wire: &WireRule, path: &str, problems: &mut Vec<String>) -> Option<Rule> {
    let peers: Vec<&WirePeer> = wire.from.iter().flatten().chain(wire.to.iter().flatten()).collect();
    let ports: Vec<&WirePort> = wire.ports.iter().flatten().collect();
    let mut told = |what: &str, i: usize, why: String| problems.push(format!("{path}.{what}[{i}]: {why}"));
    let mut read = Rule { peers: Box::default(), ports: Box::default() };
    let (mut some_peers, mut some_ports) = (Vec::new(), Vec::new());
    for (i, wire) in peers.iter().enumerate() {
        match peer(wire) {
            Ok(peer) => some_peers.push(peer),
            Err(why) => told("peers", i, why),
        }
    }
    for (i, wire) in ports.iter().enumerate() {
        match port(wire) {
            Ok(port) => some_ports.push(port),
            Err(why) => told("ports", i, why),
        }
    }
    let lost = some_peers.is_empty() != peers.is_empty() || some_ports.is_empty() != ports.is_empty();
    read.peers = some_peers.into();
    read.ports = some_ports.into();
    (!lost).then_some(read)
}

fn peer(wire: &WirePeer) -> Result<Peer, String> {
    let Some(block) = &wire.ip_block else {
        if wire.pod_selector.is_none() && wire.namespace_selector.is_none() {
            return Err("names nobody; use podSelector, namespaceSelector or ipBlock".to_owned());
        }
        let pods = wire.pod_selector.as_ref().map(selector);
        return Ok(Peer::Pods { pods, namespaces: wire.namespace_selector.as_ref().map(selector) });
    };
    let range = |text: &str| text.parse::<IpNetwork>().map_err(|_| format!("{text:?} is no CIDR"));
    let except: Result<Box<[IpNetwork]>, String> =
        block.except.iter().flatten().map(|text| range(text)).collect();
    Ok(Peer::Block { cidr: range(&block.cidr)?, except: except? })
}

fn port(wire: &WirePort) -> Result<Port, String> {
    let unknown = || format!("{:?} is no protocol; use TCP, UDP or SCTP", wire.protocol);
    let proto = proto(wire.protocol.as_ref()).ok_or_else(unknown)?;
    let number =
        |number: i64| u16::try_from(number).map_err(|_| format!("{number} is no port; use 1 to 65535"));
    let which = match &wire.port {
        None => Which::Any,
        Some(NumberOrName::Name(name)) => Which::Named(name.as_str().into()),
        Some(NumberOrName::Number(first)) => {
            let last = wire.end_port.unwrap_or(*first);
            Which::Range(number(*first)?, number(last)?)
        }
    };
    Ok(Port { proto, which })
}

fn selector(wire: &WireSelector) -> Selector {
    let labels = wire.match_labels.iter().flatten().map(|(key, value)| Requirement {
        key: key.as_str().into(),
        op: Op::In,
        values: [value.as_str().into()].into(),
    });
    let expressions = wire.match_expressions.iter().flatten().map(|wanted| Requirement {
        key: wanted.key.as_str().into(),
        op: match wanted.operator.as_str() {
            "In" => Op::In,
            "NotIn" => Op::NotIn,
            "Exists" => Op::Exists,
            "DoesNotExist" => Op::NotExists,
            _ => Op::Never,
        },
        values: wanted.values.iter().flatten().map(|value| value.as_str().into()).collect(),
    });
    Selector(labels.chain(expressions).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(spec: serde_json::Value) -> (Policy, Vec<String>) {
        let object = json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec});
        policy(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn directions_are_those_that_upstream_means() {
        let isolates = |spec| {
            let (policy, _) = read(spec);
            (policy.ingress.is_some(), policy.egress.is_some())
        };
        assert_eq!(isolates(json!({})), (true, false));
        assert_eq!(isolates(json!({"egress": []})), (true, false));
        assert_eq!(isolates(json!({"egress": [{}]})), (true, true));
        assert_eq!(isolates(json!({"policyTypes": ["Egress"], "ingress": [{}]})), (false, true));
    }

    #[test]
    fn what_is_not_understood_allows_nothing() {
        let (policy, problems) = read(json!({"ingress": [
            {"from": [{"ipBlock": {"cidr": "rubbish"}}]},
            {"ports": [{"port": 99999}, {"port": 80}]},
            {"from": [{}]},
        ]}));
        let rules = policy.ingress.unwrap();
        assert_eq!(rules.len(), 1);
        assert_eq!(*rules[0].ports, [Port { proto: 6, which: Which::Range(80, 80) }]);
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[0].contains("spec.ingress[0].peers[0]") && problems[0].contains("rubbish"));
    }

    #[test]
    fn pods_of_the_host_are_none() {
        let read = |spec: serde_json::Value, status: serde_json::Value| {
            let object = json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec, "status": status});
            pod(&serde_json::from_value(object).unwrap(), "here")
        };
        let ports = json!([{"name": "web", "containerPort": 80}, {"containerPort": 81}]);
        let spec = json!({"nodeName": "here", "containers": [{"ports": ports}]});
        let found =
            read(spec, json!({"podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}], "podIP": "10.0.0.1"}));
        let found = found.unwrap();
        assert!(found.local && found.ips.len() == 2 && found.ports.len() == 1);
        assert_eq!(read(json!({"hostNetwork": true}), json!({})), None);
        assert_eq!(read(json!({}), json!({"phase": "Failed"})), None);
    }
}
