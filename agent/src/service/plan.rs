//! What one service wants of the data plane. Invariant: the answer depends on the contents only, not on the order of
//! slices or endpoints, so equal states give equal tables.

use super::model::{Family, Hint, Proto, Readiness, Scheduler, Service, ServicePort, Slice};
use ipnetwork::IpNetwork;
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Facts about this node that the table depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The addresses by which the node itself is reached: an endpoint on one of them is local even where the slice names
    /// no node, and no cluster IP may be one of them.
    pub addresses: Vec<IpAddr>,
}

/// Where a client connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey {
    /// Address; unspecified (`0.0.0.0`, `::`) for a NodePort, which is reached on every address of the node.
    pub addr: IpAddr,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub proto: Proto,
}

/// What a frontend is to Kubernetes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendKind {
    /// One of `spec.clusterIPs`.
    #[default]
    ClusterIp,
    /// A NodePort, on every address of the node that NodePorts are reached on.
    NodePort,
    /// An ingress address of a load balancer.
    LoadBalancer,
    /// One of `spec.externalIPs`.
    ExternalIp,
    /// A container's hostPort, on every address of the node or on one of them.
    HostPort,
}

impl FrontendKind {
    /// Kubernetes' word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalIp => "ExternalIP",
            Self::HostPort => "HostPort",
        }
    }
}

/// How a frontend may choose among the endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FrontendPolicy {
    /// What it is.
    pub kind: FrontendKind,
    /// Clients on this node get endpoints of this node only.
    pub internal_local: bool,
    /// Clients outside get endpoints of this node only.
    pub external_local: bool,
    /// A client stays with its endpoint for so many seconds after its last connection; 0 means no affinity.
    pub affinity_timeout_s: u32,
    /// What arrives from outside must come from one of the port's source ranges.
    pub source_ranges: bool,
    /// Endpoints on other nodes answer the client themselves.
    pub dsr: bool,
    /// How endpoints are picked.
    pub scheduler: Scheduler,
}

/// Where a connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendAddr {
    /// Address.
    pub addr: IpAddr,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub proto: Proto,
}

/// Endpoints in each part of a run, in the order of the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counts {
    /// Ready, on this node. The first `local_only` of them are not for policy Cluster.
    pub local_ready: usize,
    /// Ready, elsewhere.
    pub remote_ready: usize,
    /// Serving while terminating, on this node.
    pub local_terminating: usize,
    /// Serving while terminating, elsewhere.
    pub remote_terminating: usize,
    /// Of `local_ready`, those at the start that topology hints keep for others: policy Local alone may pick them.
    pub local_only: usize,
}

/// One service port in one family: some frontends that share one ordered set of backends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredPort {
    /// Frontends, never empty.
    pub frontends: Vec<(FrontendKey, FrontendPolicy)>,
    /// Backends in the order of [`Counts`].
    pub backends: Vec<BackendAddr>,
    /// How many of each kind.
    pub counts: Counts,
    /// Ready endpoints of other nodes that topology hints keep for others: in no run, but what is connected to them stays.
    pub dormant: Vec<BackendAddr>,
    /// Where clients of frontends with [`FrontendPolicy::source_ranges`] must come from.
    pub source_ranges: Vec<IpNetwork>,
}

/// The ports that `service` wants, given its slices: one for each of its ports in each family that it has a cluster IP of.
pub fn desired<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    node: &NodeFacts,
) -> Vec<DesiredPort> {
    let mut ports = Vec::with_capacity(service.ports.len() * service.cluster_ips.len());
    let mut taken = Vec::new();
    for cluster_ip in &service.cluster_ips {
        let family = Family::of(*cluster_ip);
        for port in &service.ports {
            let frontends = frontends(service, *cluster_ip, port, node, &mut taken);
            if frontends.is_empty() {
                continue;
            }
            let picked = backends(port, family, slices.clone(), node);
            let source_ranges = match &service.extras {
                Some(extras) => extras
                    .source_ranges
                    .iter()
                    .filter(|r| Family::of(r.network()) == family)
                    .copied()
                    .collect(),
                None => Vec::new(),
            };
            ports.push(DesiredPort {
                frontends,
                backends: picked.run,
                counts: picked.counts,
                dormant: picked.dormant,
                source_ranges,
            });
        }
    }
    ports
}

/// Endpoint addresses of this node that are ready, each once: what `healthCheckNodePort` answers with.
pub fn local_ready<'a>(slices: impl Iterator<Item = &'a Slice>, node: &NodeFacts) -> usize {
    let here = slices.flat_map(|slice| slice.endpoints.iter()).filter(|endpoint| {
        endpoint.readiness == Readiness::Ready
            && (endpoint.on_this_node || node.addresses.contains(&endpoint.addr))
    });
    here.map(|endpoint| endpoint.addr).collect::<BTreeSet<_>>().len()
}

/// The frontends of one port in one family. `taken` has those of the service so far: an address that is in two of its
/// fields is what it was in the first.
fn frontends(
    service: &Service,
    cluster_ip: IpAddr,
    port: &ServicePort,
    node: &NodeFacts,
    taken: &mut Vec<FrontendKey>,
) -> Vec<(FrontendKey, FrontendPolicy)> {
    let family = Family::of(cluster_ip);
    let extras = service.extras.as_deref();
    let policy = |kind| {
        let internal = kind == FrontendKind::ClusterIp;
        FrontendPolicy {
            kind,
            internal_local: internal && service.internal_local,
            external_local: !internal && service.external_local,
            affinity_timeout_s: service.affinity_timeout_s,
            source_ranges: kind == FrontendKind::LoadBalancer
                && extras.is_some_and(|e| e.source_ranges.iter().any(|r| Family::of(r.network()) == family)),
            dsr: !internal && extras.is_some_and(|e| e.dsr),
            scheduler: extras.map_or(Scheduler::Default, |e| e.scheduler),
        }
    };
    let mut frontends = Vec::with_capacity(if port.node_port == 0 { 1 } else { 2 });
    let mut add = |addr: IpAddr, number, kind| {
        let key = FrontendKey { addr, port: number, proto: port.proto };
        // Looked up only where there may be two: services with one port and one address are most of them.
        let many = extras.is_some() || service.ports.len() > 1;
        if many && taken.contains(&key) {
            return;
        }
        if many {
            taken.push(key);
        }
        frontends.push((key, policy(kind)));
    };
    // A cluster IP that is this node's would take the node's own ports away.
    if !node.addresses.contains(&cluster_ip) {
        add(cluster_ip, port.port, FrontendKind::ClusterIp);
    }
    if port.node_port != 0 {
        let any: IpAddr = match family {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        add(any, port.node_port, FrontendKind::NodePort);
    }
    for (addrs, kind) in extras.into_iter().flat_map(|e| {
        [(&e.ingress_ips, FrontendKind::LoadBalancer), (&e.external_ips, FrontendKind::ExternalIp)]
    }) {
        for addr in addrs.iter().filter(|addr| Family::of(**addr) == family) {
            add(*addr, port.port, kind);
        }
    }
    frontends
}

/// The endpoints behind one port.
#[derive(Default)]
struct Picked {
    /// In the order of [`Counts`], each as often as it weighs.
    run: Vec<BackendAddr>,
    counts: Counts,
    dormant: Vec<BackendAddr>,
}

/// What is said of one endpoint; the lesser of two claims is the better.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    readiness: Readiness,
    remote: bool,
    hint: Reverse<Hint>,
    weight: Reverse<u8>,
}

fn backends<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a Slice>,
    node: &NodeFacts,
) -> Picked {
    let mut found: Vec<(BackendAddr, Claim)> = Vec::new();
    for slice in slices {
        for at in slice.ports.iter().filter(|p| p.name == port.name && p.proto == port.proto) {
            for endpoint in slice.endpoints.iter().filter(|e| Family::of(e.addr) == family) {
                let claim = Claim {
                    readiness: endpoint.readiness,
                    remote: !endpoint.on_this_node && !node.addresses.contains(&endpoint.addr),
                    hint: Reverse(endpoint.hint),
                    weight: Reverse(slice.weight.max(1)),
                };
                found.push((BackendAddr { addr: endpoint.addr, port: at.port, proto: at.proto }, claim));
            }
        }
    }
    // An endpoint may be in two slices for a moment; the better claim wins.
    found.sort_unstable();
    found.dedup_by_key(|(backend, _)| *backend);
    let wanted = wanted_hints(&found);
    let excluded = |claim: &Claim| claim.readiness == Readiness::Ready && claim.hint.0 < wanted;
    let mut picked = Picked::default();
    found.retain(|(backend, claim)| {
        let dormant = claim.remote && excluded(claim);
        if dormant {
            picked.dormant.push(*backend);
        }
        !dormant
    });
    found.sort_by_key(|(_, claim)| (claim.readiness, claim.remote, !excluded(claim)));
    let share = weight_divisor(&found);
    picked.run.reserve_exact(found.len());
    for (backend, claim) in &found {
        let times = (usize::from(claim.weight.0) / share).max(1);
        picked.run.extend(std::iter::repeat_n(*backend, times));
        let counts = &mut picked.counts;
        *match (claim.readiness, claim.remote) {
            (Readiness::Ready, false) => &mut counts.local_ready,
            (Readiness::Ready, true) => &mut counts.remote_ready,
            (Readiness::Terminating, false) => &mut counts.local_terminating,
            (Readiness::Terminating, true) => &mut counts.remote_terminating,
        } += times;
        if !claim.remote && excluded(claim) {
            counts.local_only += times;
        }
    }
    picked
}

/// The least hint that policy Cluster wants of ready endpoints. Hints count only when every ready endpoint has some and
/// at least one of them names this node, or else its zone (KEP-2433, KEP-3015).
fn wanted_hints(found: &[(BackendAddr, Claim)]) -> Hint {
    let ready = || found.iter().filter(|(_, c)| c.readiness == Readiness::Ready).map(|(_, c)| c.hint.0);
    let best = ready().max().unwrap_or_default();
    if best <= Hint::Elsewhere || ready().any(|hint| hint == Hint::None) { Hint::None } else { best }
}

/// By what all weights are divided: what they have in common or, where the run would still be too long to be counted,
/// as much as that takes.
fn weight_divisor(found: &[(BackendAddr, Claim)]) -> usize {
    let weights = || found.iter().map(|(_, claim)| usize::from(claim.weight.0));
    let common = weights().fold(0, gcd).max(1);
    let sum = |by: usize| weights().map(|weight| (weight / by).max(1)).sum::<usize>();
    // More than 100 leaves every endpoint with one slot.
    (common..=common.max(101)).step_by(common).find(|by| sum(*by) <= usize::from(u16::MAX)).unwrap_or(common)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
