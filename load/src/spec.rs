//! PURE: which services there are and what is behind them. Invariant: the same number always gives the same service;
//! every address of an endpoint, also of one that comes by a change, is served by the backends' namespace.

use crate::options::Backends;
use serde::{Deserialize, Serialize};
use sheave_agent::service::{
    Endpoint, Event, Hint, Proto, Readiness, Service, ServicePort, Slice, SlicePort,
};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

/// Port of every service.
pub(crate) const PORT: u16 = 80;
/// Port of every endpoint.
pub(crate) const TARGET_PORT: u16 = 8080;
/// First NodePort of the services that are measured, one each.
pub(crate) const NODE_PORT: u16 = 30_080;
/// Addresses of services: 10.96.0.0/12, from here on.
const SERVICES_FROM: u32 = u32::from_be_bytes([10, 96, 1, 0]);
/// Addresses of endpoints: 10.128.0.0/10 and 10.192.0.0/11, from here on.
const ENDPOINTS_FROM: u32 = u32::from_be_bytes([10, 128, 1, 0]);
/// Endpoints that come by changes are taken from a range of this size, after all others.
const CHANGED: u32 = 1 << 20;

/// What is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    pub(crate) backends: Backends,
}

impl Spec {
    /// The services that traffic goes through: first, random, last. With few services they may be the same.
    pub(crate) fn measured(self) -> [u32; 3] {
        // Far from both ends, equal in every run.
        let random = (u64::from(self.services) * 618 / 1000) as u32;
        [0, random.min(self.services - 1), self.services - 1]
    }

    /// NodePort of a service; 0 for those that have none.
    pub(crate) fn node_port(self, service: u32) -> u16 {
        let found = self.measured().into_iter().position(|measured| measured == service);
        found.map_or(0, |place| NODE_PORT + place as u16)
    }

    /// ClusterIP of a service.
    pub(crate) fn vip(self, service: u32) -> Ipv4Addr {
        Ipv4Addr::from(SERVICES_FROM + service)
    }

    /// Where the service is reached.
    pub(crate) fn frontend(self, service: u32) -> SocketAddr {
        SocketAddrV4::new(self.vip(service), PORT).into()
    }

    fn endpoint_number(self, service: u32, index: u32) -> u32 {
        match self.backends {
            Backends::Unique => service * self.endpoints + index,
            Backends::Shared => index,
        }
    }

    /// Addresses of the service's endpoints at first.
    pub(crate) fn endpoints(self, service: u32) -> Vec<Ipv4Addr> {
        let address = |index| Ipv4Addr::from(ENDPOINTS_FROM + self.endpoint_number(service, index));
        (0..self.endpoints).map(address).collect()
    }

    /// The endpoints after change number `change` of a run: one of them is another.
    pub(crate) fn changed_endpoints(self, service: u32, change: u32) -> Vec<Ipv4Addr> {
        let mut endpoints = self.endpoints(service);
        let first_free = match self.backends {
            Backends::Unique => self.services * self.endpoints,
            Backends::Shared => self.endpoints,
        };
        if let Some(last) = endpoints.last_mut() {
            *last = Ipv4Addr::from(ENDPOINTS_FROM + first_free + change % CHANGED);
        }
        endpoints
    }

    /// The service that change number `change` concerns: all of them are, far from the one before.
    pub(crate) fn service_of_change(self, change: u32) -> u32 {
        const STEP: u64 = 7_919;
        (u64::from(change) * STEP % u64::from(self.services)) as u32
    }

    /// Endpoints in the table at once, with room for one change.
    pub(crate) fn backends_total(self) -> u32 {
        match self.backends {
            Backends::Unique => self.services * self.endpoints,
            // In the end each service may have one that is its own.
            Backends::Shared => self.endpoints + self.services,
        }
    }

    /// The Service. Those that are measured have a NodePort, and UDP on the same port.
    pub(crate) fn service(self, service: u32) -> Event {
        let node_port = self.node_port(service);
        let port = |name: &str, proto| ServicePort { name: name.into(), port: PORT, node_port, proto };
        let mut ports = vec![port("tcp", Proto::Tcp)];
        if node_port != 0 {
            ports.push(port("udp", Proto::Udp));
        }
        Event::Service(Service {
            key: name(service).into(),
            cluster_ips: [IpAddr::from(self.vip(service))].into(),
            ports: ports.into(),
            ..Service::default()
        })
    }

    /// Its EndpointSlice.
    pub(crate) fn slice(self, service: u32, endpoints: &[Ipv4Addr]) -> Event {
        let endpoint = |at: &Ipv4Addr| Endpoint {
            addr: (*at).into(),
            on_this_node: true,
            readiness: Readiness::Ready,
            hint: Hint::None,
        };
        let port = |name: &str, proto| SlicePort { name: name.into(), port: TARGET_PORT, proto };
        let mut ports = vec![port("tcp", Proto::Tcp)];
        if self.node_port(service) != 0 {
            ports.push(port("udp", Proto::Udp));
        }
        Event::Slice(Slice {
            key: format!("{}-x", name(service)).into(),
            service: name(service).into(),
            ports: ports.into(),
            endpoints: endpoints.iter().map(endpoint).collect(),
            weight: 1,
            problems: Box::default(),
        })
    }
}

/// `namespace/name` of a service.
pub(crate) fn name(service: u32) -> String {
    format!("load/svc-{service:06}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const SPEC: Spec = Spec { services: 100, endpoints: 4, backends: Backends::Unique };

    #[test]
    fn unique_endpoints_belong_to_one_service() {
        let all: Vec<_> = (0..100).flat_map(|service| SPEC.endpoints(service)).collect();
        assert_eq!(all.len(), 400);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 400);
        let changed = SPEC.changed_endpoints(3, 7);
        assert_eq!(changed[..3], SPEC.endpoints(3)[..3]);
        assert!(!all.contains(&changed[3]));
    }

    #[test]
    fn shared_endpoints_belong_to_all() {
        let spec = Spec { backends: Backends::Shared, ..SPEC };
        assert_eq!(spec.endpoints(0), spec.endpoints(99));
        assert!(!spec.endpoints(0).contains(&spec.changed_endpoints(0, 0)[3]));
    }

    #[test]
    fn addresses_stay_in_their_ranges() {
        let spec = Spec { services: 500_000, endpoints: 8, backends: Backends::Unique };
        assert!(u32::from(spec.vip(499_999)) < u32::from_be_bytes([10, 112, 0, 0]));
        let last = spec.changed_endpoints(499_999, CHANGED - 1)[7];
        assert!(u32::from(last) < u32::from_be_bytes([10, 224, 0, 0]), "{last}");
    }

    #[test]
    fn what_is_measured_has_a_node_port_of_its_own() {
        let ports: BTreeSet<_> = SPEC.measured().map(|service| SPEC.node_port(service)).into();
        assert_eq!(ports.len(), 3);
        assert_eq!(SPEC.node_port(1), 0);
        let one = Spec { services: 1, ..SPEC };
        assert_eq!(one.measured(), [0; 3]);
        assert_eq!(one.node_port(0), NODE_PORT);
    }

    #[test]
    fn changes_reach_every_service() {
        let reached: BTreeSet<_> = (0..100).map(|change| SPEC.service_of_change(change)).collect();
        assert_eq!(reached.len(), 100);
    }
}
