//! EndpointSlice: the addresses behind each Service that has a selector. Invariant: slices are stable: an endpoint
//! stays in the slice that it is in, only slices whose content changes are written, and none holds more than
//! `ENDPOINTS_PER_SLICE_MAX` endpoints.

mod layout;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use self::layout::Wanted;
use super::action::Action;
use super::model::{Container, IntOrString, Meta, Pod, Service, ServicePort, StringMap, condition};

pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub(crate) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// The value of the managed-by label of the slices that this controller writes; others are not touched.
pub(crate) const MANAGER: &str = "endpointslice-controller.k8s.io";
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// What one decision about a Service's slices rests on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Observed {
    pub(crate) service: Service,
    /// The pods of the namespace that the Service's selector picks.
    pub(crate) pods: Vec<Pod>,
    /// The zone of each node that has one.
    pub(crate) zones: BTreeMap<String, String>,
    /// The slices labelled with the Service's name, whoever manages them.
    pub(crate) slices: Vec<Slice>,
}

/// An EndpointSlice, with all fields that this controller writes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Slice {
    pub(crate) metadata: Meta,
    pub(crate) address_type: String,
    #[serde(deserialize_with = "super::model::or_default")]
    pub(crate) endpoints: Vec<Endpoint>,
    #[serde(deserialize_with = "super::model::or_default")]
    pub(crate) ports: Vec<Port>,
}

/// One endpoint of a slice.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Endpoint {
    pub(crate) addresses: Vec<String>,
    pub(crate) conditions: Conditions,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hostname: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target_ref: Option<TargetRef>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) zone: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hints: Option<Hints>,
}

/// For whom an endpoint is meant.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Hints {
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "super::model::or_default")]
    pub(crate) for_zones: Vec<Named>,
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "super::model::or_default")]
    pub(crate) for_nodes: Vec<Named>,
}

/// A zone or a node.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct Named {
    pub(crate) name: String,
}

/// Whether an endpoint may get traffic.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct Conditions {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ready: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) serving: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) terminating: Option<bool>,
}

/// The pod behind an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct TargetRef {
    pub(crate) kind: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

/// One port of a slice.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) protocol: String,
    pub(crate) port: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) app_protocol: Option<String>,
}

/// What to do about a Service's slices.
pub(crate) fn reconcile(seen: &Observed) -> Vec<Action> {
    let service = &seen.service;
    if service.metadata.is_deleting() || service.spec.selector.is_empty() {
        // Without a selector the slices are the user's; those of a deleted Service go with it, by their owner.
        return Vec::new();
    }
    let families = families(service);
    let mut wanted: Wanted = families.iter().map(|family| (*family, BTreeMap::new())).collect();
    for pod in seen.pods.iter().filter(|p| !p.is_terminal()) {
        let ports = ports(service, pod);
        for (family, groups) in &mut wanted {
            if let Some(endpoint) = endpoint(seen, pod, *family) {
                groups.entry(ports.clone()).or_default().push(endpoint);
            }
        }
    }
    layout::plan(seen, wanted, &labels(service), trigger_time(seen))
}

/// An address family, as `addressType` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }

    fn holds(self, address: &str) -> bool {
        match address.parse() {
            Ok(IpAddr::V4(_)) => self == Family::V4,
            Ok(IpAddr::V6(_)) => self == Family::V6,
            Err(_) => false,
        }
    }
}

fn families(service: &Service) -> Vec<Family> {
    let spec = &service.spec;
    if spec.kind == "ExternalName" {
        return Vec::new();
    }
    let named: Vec<Family> = [Family::V4, Family::V6]
        .into_iter()
        .filter(|f| spec.ip_families.iter().any(|n| n == f.as_str()))
        .collect();
    if !named.is_empty() {
        return named;
    }
    vec![if Family::V6.holds(&spec.cluster_ip) { Family::V6 } else { Family::V4 }]
}

fn labels(service: &Service) -> StringMap {
    let mut labels = service.metadata.labels.clone();
    labels.remove(HEADLESS);
    if service.spec.cluster_ip == "None" {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    labels.insert(SERVICE_NAME.to_owned(), service.metadata.name.clone());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    labels
}

/// The Service's ports as this pod has them. A port that is named after none of the pod's is left out for it.
fn ports(service: &Service, pod: &Pod) -> Vec<Port> {
    let mut ports: Vec<Port> = service
        .spec
        .ports
        .iter()
        .filter_map(|port| {
            Some(Port {
                name: port.name.clone(),
                protocol: protocol(&port.protocol).to_owned(),
                port: target_port(port, &pod.spec.containers)?,
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect();
    ports.sort();
    ports
}

fn protocol(name: &str) -> &str {
    if name.is_empty() { "TCP" } else { name }
}

fn target_port(port: &ServicePort, containers: &[Container]) -> Option<u16> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
        Some(IntOrString::Text(name)) => containers
            .iter()
            .flat_map(|c| &c.ports)
            .find(|p| p.name == *name && protocol(&p.protocol) == protocol(&port.protocol))
            .map(|p| p.container_port),
    }
}

fn endpoint(seen: &Observed, pod: &Pod, family: Family) -> Option<Endpoint> {
    let addresses = pod.status.pod_ips.iter().map(|i| &i.ip).chain([&pod.status.pod_ip]);
    let address = addresses.into_iter().find(|a| family.holds(a))?;
    let meta = &pod.metadata;
    let service = &seen.service;
    let serving = pod.is_ready();
    let terminating = meta.is_deleting();
    let ready = service.spec.publish_not_ready_addresses || (serving && !terminating);
    let hostname = &pod.spec.hostname;
    let zone = seen.zones.get(&pod.spec.node_name);
    let hints =
        if ready { hints(&service.spec.traffic_distribution, &pod.spec.node_name, zone) } else { None };
    let is_host = !hostname.is_empty() && pod.spec.subdomain == service.metadata.name;
    Some(Endpoint {
        addresses: vec![address.clone()],
        conditions: Conditions { ready: Some(ready), serving: Some(serving), terminating: Some(terminating) },
        hostname: is_host.then(|| hostname.clone()),
        node_name: Some(pod.spec.node_name.clone()).filter(|n| !n.is_empty()),
        target_ref: Some(TargetRef {
            kind: "Pod".to_owned(),
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
            uid: meta.uid.clone(),
        }),
        zone: zone.cloned(),
        hints,
    })
}

/// What the Service's `trafficDistribution` says to a ready endpoint of this node and zone (KEP-4444, KEP-3015).
fn hints(distribution: &str, node: &str, zone: Option<&String>) -> Option<Hints> {
    let named = |name: &str| Named { name: name.to_owned() };
    let for_zones: Vec<Named> = zone.into_iter().map(|zone| named(zone)).collect();
    let hints = match distribution {
        "PreferClose" | "PreferSameZone" => Hints { for_zones, for_nodes: Vec::new() },
        "PreferSameNode" if !node.is_empty() => Hints { for_zones, for_nodes: vec![named(node)] },
        _ => return None,
    };
    (hints != Hints::default()).then_some(hints)
}

/// When the last change happened that the slices have to follow, as far as the objects tell.
fn trigger_time(seen: &Observed) -> Option<Timestamp> {
    let readiness = |p: &Pod| condition(&p.status.conditions, "Ready").and_then(|c| c.last_transition_time);
    seen.pods.iter().filter_map(readiness).chain(seen.service.metadata.creation_timestamp).max()
}
