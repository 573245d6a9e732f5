//! Services and EndpointSlices become compact models. Invariant: whatever an object says, what of it can be used is used,
//! and what can't is named with its field in the model's `problems`.

use super::wire::{ServiceSpec, WireEndpoint, WireService, WireSlice};
use crate::service::{
    Distribution, Endpoint, Hint, IpvsScheduler, ObjectKey, Proto, Readiness, Scheduler, Service,
    ServiceExtras, ServicePort, Slice, SlicePort,
};
use ipnetwork::IpNetwork;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Label that gives a Service to another proxy.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label of an EndpointSlice: the Service that it belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Annotation of a Service: how endpoints are picked.
const SCHEDULER: &str = "sheave.io/scheduler";
/// Annotation of a Service: how backends on other nodes answer.
const FORWARDING: &str = "sheave.io/forwarding";
/// Annotation of an EndpointSlice: weight of its endpoints.
const WEIGHT: &str = "sheave.io/weight";

/// Seconds of session affinity when the object says none (core/v1).
const AFFINITY_TIMEOUT_S: u32 = 10_800;
/// The longest affinity (core/v1).
const AFFINITY_TIMEOUT_MAX_S: u32 = 86_400;
/// The greatest weight.
const WEIGHT_MAX: u8 = 100;
/// Problems that are told of one object.
const PROBLEMS_MAX: usize = 8;

/// What of an object can't be used.
#[derive(Default)]
struct Problems {
    told: Vec<Box<str>>,
    more: usize,
}

impl Problems {
    fn add(&mut self, field: impl Display, what: impl Display) {
        if self.told.len() < PROBLEMS_MAX {
            self.told.push(format!("{field}: {what}").into());
        } else {
            self.more += 1;
        }
    }

    fn into_boxed(mut self) -> Box<[Box<str>]> {
        if self.more != 0 {
            self.told.push(format!("and {} more problems", self.more).into());
        }
        self.told.into()
    }
}

pub(super) fn key(meta: &ObjectMeta) -> ObjectKey {
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    let name = meta.name.as_deref().unwrap_or_default();
    format!("{namespace}/{name}").into()
}

fn annotation<'a>(meta: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(name).map(String::as_str)
}

fn proto(name: Option<&str>, field: impl Display, problems: &mut Problems) -> Option<Proto> {
    let name = name.filter(|name| !name.is_empty()).unwrap_or("TCP");
    let found = Proto::from_name(name);
    if found.is_none() {
        problems.add(field, format_args!("{name:?} is no protocol; use TCP, UDP or SCTP"));
    }
    found
}

fn port(number: i64, field: impl Display, problems: &mut Problems) -> Option<u16> {
    let found = u16::try_from(number).ok().filter(|port| *port != 0);
    if found.is_none() {
        problems.add(field, format_args!("{number} is no port; use 1 to 65535"));
    }
    found
}

fn address(text: &str, field: impl Display, problems: &mut Problems) -> Option<IpAddr> {
    let Ok(addr) = text.parse::<IpAddr>() else {
        problems.add(field, format_args!("{text:?} is no IP address"));
        return None;
    };
    let link_local = match addr {
        IpAddr::V4(addr) => addr.is_link_local() || addr.is_broadcast(),
        IpAddr::V6(addr) => addr.is_unicast_link_local() || addr.to_ipv4_mapped().is_some(),
    };
    if addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() || link_local {
        problems.add(
            field,
            format_args!("{addr} can't be balanced to or from; use an address that other nodes reach"),
        );
        return None;
    }
    Some(addr)
}

/// The model of a Service; `None` when it is none to balance (headless, ExternalName, another proxy's).
pub(super) fn service(object: &WireService) -> Option<Service> {
    let (meta, spec) = (&object.metadata, &object.spec);
    let foreign = meta.labels.as_ref().is_some_and(|labels| labels.contains_key(PROXY_NAME));
    if foreign || spec.kind.as_deref() == Some("ExternalName") {
        return None;
    }
    let mut problems = Problems::default();
    let mut texts: Vec<&String> = spec.cluster_ips.iter().flatten().collect();
    if texts.is_empty() {
        texts.extend(&spec.cluster_ip);
    }
    if texts.iter().all(|text| text.is_empty()) || texts.iter().any(|text| *text == "None") {
        return None;
    }
    let mut cluster_ips: Vec<IpAddr> = Vec::with_capacity(texts.len());
    for (at, text) in texts.into_iter().enumerate() {
        let field = format_args!("spec.clusterIPs[{at}]");
        let Some(addr) = address(text, field, &mut problems) else { continue };
        if cluster_ips.iter().any(|held| held.is_ipv4() == addr.is_ipv4()) {
            problems.add(field, format_args!("{addr} is the second of its family; one is possible"));
            continue;
        }
        cluster_ips.push(addr);
    }
    let ports = service_ports(spec, &mut problems);
    let external_local = spec.external_traffic_policy.as_deref() == Some("Local");
    let affinity_timeout_s = affinity(spec, &mut problems);
    let extras = extras(object, external_local, problems);
    Some(Service {
        key: key(meta),
        cluster_ips: cluster_ips.into(),
        ports,
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_local,
        affinity_timeout_s,
        extras: (extras != ServiceExtras::default()).then(|| Box::new(extras)),
    })
}

fn service_ports(spec: &ServiceSpec, problems: &mut Problems) -> Box<[ServicePort]> {
    let mut ports: Vec<ServicePort> = Vec::with_capacity(spec.ports.as_ref().map_or(0, Vec::len));
    for (at, wire) in spec.ports.iter().flatten().enumerate() {
        let found = port(wire.port, format_args!("spec.ports[{at}].port"), problems);
        let proto = proto(wire.protocol.as_deref(), format_args!("spec.ports[{at}].protocol"), problems);
        let (Some(number), Some(proto)) = (found, proto) else { continue };
        if ports.iter().any(|held| held.port == number && held.proto == proto) {
            let text = format_args!("{number} {} is there already", proto.name());
            problems.add(format_args!("spec.ports[{at}].port"), text);
            continue;
        }
        let field = format_args!("spec.ports[{at}].nodePort");
        let mut node_port = match wire.node_port {
            None | Some(0) => 0,
            Some(number) => port(number, field, problems).unwrap_or(0),
        };
        if node_port != 0 && ports.iter().any(|held| held.node_port == node_port && held.proto == proto) {
            problems.add(field, format_args!("{node_port} {} is there already", proto.name()));
            node_port = 0;
        }
        let name = wire.name.as_deref().unwrap_or_default().into();
        ports.push(ServicePort { name, port: number, node_port, proto });
    }
    ports.into()
}

fn affinity(spec: &ServiceSpec, problems: &mut Problems) -> u32 {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return 0;
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(wanted) = config.and_then(|config| config.timeout_seconds) else { return AFFINITY_TIMEOUT_S };
    let found = u32::try_from(wanted).ok().filter(|s| (1..=AFFINITY_TIMEOUT_MAX_S).contains(s));
    found.unwrap_or_else(|| {
        problems.add(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format_args!("{wanted} is not 1 to {AFFINITY_TIMEOUT_MAX_S}; {AFFINITY_TIMEOUT_S} is used"),
        );
        AFFINITY_TIMEOUT_S
    })
}

fn extras(object: &WireService, external_local: bool, mut problems: Problems) -> ServiceExtras {
    let (meta, spec) = (&object.metadata, &object.spec);
    let mut external_ips = Vec::new();
    for (at, text) in spec.external_ips.iter().flatten().enumerate() {
        external_ips.extend(address(text, format_args!("spec.externalIPs[{at}]"), &mut problems));
    }
    let mut ingress_ips = Vec::new();
    let ingress = object.status.load_balancer.iter().flat_map(|status| status.ingress.iter().flatten());
    for (at, point) in ingress.enumerate() {
        // A proxying load balancer sends to NodePorts itself (KEP-1860).
        if point.ip_mode.as_deref().is_none_or(|mode| mode == "VIP")
            && let Some(text) = point.ip.as_deref().filter(|text| !text.is_empty())
        {
            let field = format_args!("status.loadBalancer.ingress[{at}].ip");
            ingress_ips.extend(address(text, field, &mut problems));
        }
    }
    let balanced = spec.kind.as_deref() == Some("LoadBalancer");
    let health = spec.health_check_node_port.filter(|number| *number != 0 && balanced && external_local);
    let health = health.and_then(|number| port(number, "spec.healthCheckNodePort", &mut problems));
    ServiceExtras {
        external_ips: external_ips.into(),
        ingress_ips: ingress_ips.into(),
        source_ranges: source_ranges(spec, &mut problems),
        health_check_node_port: health.unwrap_or(0),
        distribution: match spec.traffic_distribution.as_deref() {
            Some("PreferClose" | "PreferSameZone") => Distribution::SameZone,
            Some("PreferSameNode") => Distribution::SameNode,
            _ => Distribution::Even,
        },
        scheduler: scheduler(meta, &mut problems),
        dsr: dsr(meta, &mut problems),
        problems: problems.into_boxed(),
    }
}

/// Ranges that nobody can come from: they keep the door shut in place of one that can't be read.
const NOBODY: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::BROADCAST), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];

fn source_ranges(spec: &ServiceSpec, problems: &mut Problems) -> Box<[IpNetwork]> {
    let mut ranges: Vec<IpNetwork> = Vec::new();
    for (at, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        let found = text.trim().parse::<IpNetwork>().ok();
        // Bits behind the prefix say nothing.
        let found = found.and_then(|range| IpNetwork::new(range.network(), range.prefix()).ok());
        match found {
            Some(range) => ranges.push(range),
            None => {
                let what = format_args!("{text:?} is no range such as 192.0.2.0/24; it lets nobody in");
                problems.add(format_args!("spec.loadBalancerSourceRanges[{at}]"), what);
                ranges.extend(NOBODY.map(IpNetwork::from));
            }
        }
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges.into()
}

fn scheduler(meta: &ObjectMeta, problems: &mut Problems) -> Scheduler {
    match annotation(meta, SCHEDULER) {
        None => Scheduler::Default,
        Some("maglev") => Scheduler::Maglev,
        Some(name) => IpvsScheduler::from_name(name).map_or_else(
            || {
                let names = IpvsScheduler::ALL.map(|(_, name)| name).join(", ");
                problems.add(
                    format_args!("metadata.annotations[{SCHEDULER}]"),
                    format_args!("{name:?} is no scheduler; use maglev or, for IPVS, one of {names}"),
                );
                Scheduler::Default
            },
            Scheduler::Ipvs,
        ),
    }
}

fn dsr(meta: &ObjectMeta, problems: &mut Problems) -> bool {
    match annotation(meta, FORWARDING) {
        None => false,
        Some("dsr") => true,
        Some(other) => {
            problems.add(
                format_args!("metadata.annotations[{FORWARDING}]"),
                format_args!("{other:?} is no way to forward; use dsr, or leave it away"),
            );
            false
        }
    }
}

/// Where this node is, as far as endpoints' hints go.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place<'a> {
    /// Its name.
    pub(super) node: &'a str,
    /// Its zone (label `topology.kubernetes.io/zone` of the Node).
    pub(super) zone: Option<&'a str>,
}

/// The model of an EndpointSlice; `None` when it belongs to no Service or holds no addresses of a family we balance.
pub(super) fn slice(object: &WireSlice, place: Place<'_>) -> Option<Slice> {
    let meta = &object.metadata;
    let owner = meta.labels.as_ref()?.get(SERVICE_NAME).filter(|owner| !owner.is_empty())?;
    if object.address_type == "FQDN" {
        return None;
    }
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    let mut problems = Problems::default();
    let mut ports: Vec<SlicePort> = Vec::with_capacity(object.ports.as_ref().map_or(0, Vec::len));
    for (at, wire) in object.ports.iter().flatten().enumerate() {
        let proto = proto(wire.protocol.as_deref(), format_args!("ports[{at}].protocol"), &mut problems);
        let field = format_args!("ports[{at}].port");
        let Some(number) = wire.port else {
            problems
                .add(field, "missing, so that nothing is balanced to it; say which port endpoints serve on");
            continue;
        };
        let (Some(number), Some(proto)) = (port(number, field, &mut problems), proto) else { continue };
        let name = wire.name.as_deref().unwrap_or_default();
        if ports.iter().any(|held| *held.name == *name && held.proto == proto) {
            let what = format_args!("{name:?} {} is there already; the first one is used", proto.name());
            problems.add(format_args!("ports[{at}].name"), what);
            continue;
        }
        ports.push(SlicePort { name: name.into(), port: number, proto });
    }
    let endpoints = endpoints(object, place, &mut problems);
    Some(Slice {
        key: key(meta),
        service: format!("{namespace}/{owner}").into(),
        ports: ports.into(),
        endpoints,
        weight: weight(meta, &mut problems),
        problems: problems.into_boxed(),
    })
}

fn weight(meta: &ObjectMeta, problems: &mut Problems) -> u8 {
    let Some(text) = annotation(meta, WEIGHT) else { return 1 };
    text.parse().ok().filter(|weight| (1..=WEIGHT_MAX).contains(weight)).unwrap_or_else(|| {
        let what = format_args!("{text:?} is no weight; use 1 to {WEIGHT_MAX}");
        problems.add(format_args!("metadata.annotations[{WEIGHT}]"), what);
        1
    })
}

fn endpoints(object: &WireSlice, place: Place<'_>, problems: &mut Problems) -> Box<[Endpoint]> {
    let wire = object.endpoints.as_deref().unwrap_or_default();
    let mut found: Vec<(Endpoint, usize)> = Vec::with_capacity(wire.len());
    for (at, wire) in wire.iter().enumerate() {
        let Some(readiness) = readiness(wire) else { continue };
        let field = format_args!("endpoints[{at}].addresses[0]");
        // Consumers use the first address only (discovery/v1).
        let Some(text) = wire.addresses.first() else {
            problems.add(field, "missing");
            continue;
        };
        let Some(addr) = address(text, field, problems) else { continue };
        let family = if addr.is_ipv4() { "IPv4" } else { "IPv6" };
        if object.address_type != family {
            let what = format_args!("{addr} is {family}, but addressType is {}", object.address_type);
            problems.add(field, what);
            continue;
        }
        let on_this_node = wire.node_name.as_deref() == Some(place.node);
        found.push((Endpoint { addr, on_this_node, readiness, hint: hint(wire, place) }, at));
    }
    // A pod with the node's address may take over from one that terminates; two that are ready can't be told apart.
    let mut ready: Vec<(IpAddr, usize)> =
        found.iter().filter(|(e, _)| e.readiness == Readiness::Ready).map(|(e, at)| (e.addr, *at)).collect();
    ready.sort_unstable();
    for pair in ready.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
        let what =
            format_args!("{} is there already, at endpoints[{}]; it counts once", pair[1].0, pair[0].1);
        problems.add(format_args!("endpoints[{}].addresses[0]", pair[1].1), what);
    }
    found.into_iter().map(|(endpoint, _)| endpoint).collect()
}

fn readiness(object: &WireEndpoint) -> Option<Readiness> {
    let conditions = object.conditions.unwrap_or_default();
    // Absent conditions: ready counts as true, serving as what ready is, terminating as false (discovery/v1).
    let ready = conditions.ready.unwrap_or(true);
    let serving = conditions.serving.unwrap_or(ready);
    let terminating = conditions.terminating.unwrap_or(false);
    if ready {
        Some(Readiness::Ready)
    } else if serving && terminating {
        Some(Readiness::Terminating)
    } else {
        None
    }
}

fn hint(object: &WireEndpoint, place: Place<'_>) -> Hint {
    let Some(hints) = &object.hints else { return Hint::None };
    let (nodes, zones) =
        (hints.for_nodes.as_deref().unwrap_or_default(), hints.for_zones.as_deref().unwrap_or_default());
    if nodes.iter().any(|node| node.name == place.node) {
        Hint::Node
    } else if zones.iter().any(|zone| Some(zone.name.as_str()) == place.zone) {
        Hint::Zone
    } else if nodes.is_empty() && zones.is_empty() {
        Hint::None
    } else {
        Hint::Elsewhere
    }
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
