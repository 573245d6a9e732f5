//! What one service wants of the data plane. Invariant: the answer depends on the contents only, not on the order of
//! slices or endpoints, so equal states give equal tables.

use super::model::{Family, Proto, Readiness, Scheduler, Service, ServicePort, Slice};
use ipnetwork::IpNetwork;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Facts about this node that the table depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node's own addresses: an endpoint on one of them is local even where the slice names no node.
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredPort {
    /// Frontends, never empty.
    pub frontends: Vec<(FrontendKey, FrontendPolicy)>,
    /// Backends in the order of [`Counts`].
    pub backends: Vec<BackendAddr>,
    /// How many of each kind.
    pub counts: Counts,
    /// Where clients of frontends with [`FrontendPolicy::source_ranges`] must come from.
    pub source_ranges: Vec<IpNetwork>,
}

/// The ports that `service` wants, given its slices.
pub fn desired<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    node: &NodeFacts,
) -> Vec<DesiredPort> {
    let mut ports = Vec::with_capacity(service.ports.len() * service.cluster_ips.len());
    for cluster_ip in &service.cluster_ips {
        for port in &service.ports {
            let (backends, counts) = backends(port, Family::of(*cluster_ip), slices.clone(), node);
            let frontends = frontends(service, *cluster_ip, port);
            ports.push(DesiredPort { frontends, backends, counts, source_ranges: Vec::new() });
        }
    }
    ports
}

fn frontends(
    service: &Service,
    cluster_ip: IpAddr,
    port: &ServicePort,
) -> Vec<(FrontendKey, FrontendPolicy)> {
    let internal = FrontendPolicy { internal_local: service.internal_local, ..FrontendPolicy::default() };
    let mut frontends = Vec::with_capacity(2);
    frontends.push((FrontendKey { addr: cluster_ip, port: port.port, proto: port.proto }, internal));
    if port.node_port != 0 {
        let any: IpAddr = match Family::of(cluster_ip) {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        let external = FrontendPolicy {
            kind: FrontendKind::NodePort,
            external_local: service.external_local,
            ..FrontendPolicy::default()
        };
        frontends.push((FrontendKey { addr: any, port: port.node_port, proto: port.proto }, external));
    }
    frontends
}

fn backends<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a Slice>,
    node: &NodeFacts,
) -> (Vec<BackendAddr>, Counts) {
    // An endpoint may be in two slices for a moment; the better claim wins.
    let mut found: BTreeMap<BackendAddr, (Readiness, bool)> = BTreeMap::new();
    for slice in slices {
        for at in slice.ports.iter().filter(|p| p.name == port.name && p.proto == port.proto) {
            for endpoint in slice.endpoints.iter().filter(|e| Family::of(e.addr) == family) {
                let remote = !endpoint.on_this_node && !node.addresses.contains(&endpoint.addr);
                let claim = (endpoint.readiness, remote);
                let backend = BackendAddr { addr: endpoint.addr, port: at.port, proto: at.proto };
                found.entry(backend).and_modify(|held| *held = claim.min(*held)).or_insert(claim);
            }
        }
    }
    let mut ordered: Vec<_> = found.into_iter().collect();
    ordered.sort_by_key(|(_, claim)| *claim);
    let count = |wanted| ordered.iter().filter(|(_, claim)| *claim == wanted).count();
    let counts = Counts {
        local_ready: count((Readiness::Ready, false)),
        remote_ready: count((Readiness::Ready, true)),
        local_terminating: count((Readiness::Terminating, false)),
        remote_terminating: count((Readiness::Terminating, true)),
        local_only: 0,
    };
    (ordered.into_iter().map(|(backend, _)| backend).collect(), counts)
}

#[cfg(test)]
mod tests {
    use super::super::model::{Endpoint, Hint, SlicePort};
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn service() -> Service {
        Service {
            key: "default/web".into(),
            cluster_ips: [ip("10.96.0.5"), ip("fd00:96::5")].into(),
            ports: [
                ServicePort { name: "http".into(), port: 80, node_port: 30080, proto: Proto::Tcp },
                ServicePort { name: "dns".into(), port: 53, node_port: 0, proto: Proto::Udp },
            ]
            .into(),
            internal_local: true,
            ..Service::default()
        }
    }

    fn slice(key: &str, endpoints: &[(&str, bool, Readiness)]) -> Slice {
        Slice {
            key: key.into(),
            service: "default/web".into(),
            ports: [SlicePort { name: "http".into(), port: 8080, proto: Proto::Tcp }].into(),
            endpoints: endpoints
                .iter()
                .map(|(addr, on_this_node, readiness)| Endpoint {
                    addr: ip(addr),
                    on_this_node: *on_this_node,
                    readiness: *readiness,
                    hint: Hint::None,
                })
                .collect(),
            weight: 1,
            problems: Box::default(),
        }
    }

    fn addresses(port: &DesiredPort) -> Vec<String> {
        port.backends.iter().map(|b| b.addr.to_string()).collect()
    }

    #[test]
    fn backends_are_ordered_by_readiness_then_place_and_come_once() {
        use Readiness::{Ready, Terminating};
        let slices = [
            slice(
                "a",
                &[
                    ("10.244.1.1", false, Ready),
                    ("10.244.0.9", true, Terminating),
                    ("10.244.0.3", true, Ready),
                ],
            ),
            slice(
                "b",
                &[
                    ("10.244.1.1", false, Terminating),
                    ("192.0.2.1", false, Ready),
                    ("fd00:244::1", true, Ready),
                ],
            ),
        ];
        let node = NodeFacts { addresses: vec![ip("192.0.2.1")] };
        let ports = desired(&service(), slices.iter(), &node);
        assert_eq!(ports.len(), 4);
        assert_eq!(addresses(&ports[0]), ["10.244.0.3", "192.0.2.1", "10.244.1.1", "10.244.0.9"]);
        let counts = Counts {
            local_ready: 2,
            remote_ready: 1,
            local_terminating: 1,
            remote_terminating: 0,
            local_only: 0,
        };
        assert_eq!(ports[0].counts, counts);
        assert!(ports[1].backends.is_empty(), "the slice has no port named dns");
        assert_eq!(addresses(&ports[2]), ["fd00:244::1"]);
        let reversed = desired(&service(), slices.iter().rev(), &node);
        assert_eq!(ports, reversed);
    }

    #[test]
    fn frontends_share_one_run_and_differ_in_policy() {
        let ports = desired(&service(), [].iter(), &NodeFacts::default());
        let keys: Vec<_> = ports[0].frontends.iter().map(|(k, _)| (k.addr.to_string(), k.port)).collect();
        assert_eq!(keys, [("10.96.0.5".to_owned(), 80), ("0.0.0.0".to_owned(), 30080)]);
        assert!(
            ports[0].frontends[0].1.internal_local && ports[0].frontends[0].1.kind == FrontendKind::ClusterIp
        );
        assert!(
            !ports[0].frontends[1].1.internal_local && ports[0].frontends[1].1.kind == FrontendKind::NodePort
        );
        assert_eq!(ports[2].frontends[1].0.addr, ip("::"));
        assert_eq!(ports[1].frontends.len(), 1);
    }
}
