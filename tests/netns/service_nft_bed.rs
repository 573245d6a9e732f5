//! A node (the test's own namespace) between a client behind its uplink `up0` and pods behind `pod0`, `pod1`, …, for the
//! nftables data plane. Everything is gone with its guards: namespaces, and with the test's own one the table.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use sheave_agent::dataplane::{DataplaneConfig, Driver, Mode};
use sheave_agent::service::{
    Endpoint, Event, Hint, Proto, Readiness, Service, ServicePort, Slice, SlicePort,
};
use sheave_harness::NetNs;

use crate::service_world::{address, at, chain, synced, tcp_server, udp_server};

pub(crate) const CLIENT: [&str; 2] = ["198.51.100.2", "2001:db8:ffff::2"];
pub(crate) const NODE: [&str; 2] = ["198.51.100.1", "2001:db8:ffff::1"];

/// Address of pod `n` in a family (0 is IPv4).
pub(crate) fn pod(n: usize, family: usize) -> String {
    let n = n + 1;
    [format!("10.244.{n}.5"), format!("fd00:244:{n}::5")][family].clone()
}

/// The node's address on the link to pod `n`.
pub(crate) fn router(n: usize, family: usize) -> String {
    let n = n + 1;
    [format!("10.244.{n}.1"), format!("fd00:244:{n}::1")][family].clone()
}

fn add(netns: &NetNs, device: &str, v4: &str, v6: &str) {
    netns.ip(&["addr", "add", &format!("{v4}/24"), "dev", device]);
    netns.ip(&["addr", "add", &format!("{v6}/64"), "dev", device, "nodad"]);
}

/// The namespaces.
pub(crate) struct Bed {
    pub(crate) client: NetNs,
    pub(crate) pods: Vec<NetNs>,
    pub(crate) config: DataplaneConfig,
}

impl Bed {
    /// With so many pods, each serving TCP and UDP on port 8080 of both its addresses.
    pub(crate) fn new(pods: usize) -> Self {
        let node = NetNs::open("/proc/self/ns/net").expect("our own namespace");
        let client = NetNs::new();
        node.veth("up0", &client, "eth0");
        add(&node, "up0", NODE[0], NODE[1]);
        add(&client, "eth0", CLIENT[0], CLIENT[1]);
        client.ip(&["route", "add", "default", "via", NODE[0]]);
        client.ip(&["-6", "route", "add", "default", "via", NODE[1]]);
        // Programs of the node need a route to a service's address; real nodes have a default route.
        node.ip(&["route", "add", "default", "via", CLIENT[0]]);
        node.ip(&["-6", "route", "add", "default", "via", CLIENT[1]]);
        for knob in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{knob}"), "1").unwrap_or_else(|e| panic!("{knob}: {e}"));
        }
        let pods = (0..pods)
            .map(|n| {
                let netns = NetNs::new();
                let link = format!("pod{n}");
                node.veth(&link, &netns, "eth0");
                add(&node, &link, &router(n, 0), &router(n, 1));
                add(&netns, "eth0", &pod(n, 0), &pod(n, 1));
                netns.ip(&["route", "add", "default", "via", &router(n, 0)]);
                netns.ip(&["-6", "route", "add", "default", "via", &router(n, 1)]);
                for family in 0..2 {
                    netns.run(|| {
                        tcp_server(at(&pod(n, family), 8080));
                        udp_server(at(&pod(n, family), 8080));
                    });
                }
                netns
            })
            .collect();
        let config = DataplaneConfig {
            mode: Some(Mode::Nftables),
            uplinks: vec!["up0".to_owned()],
            pod_links: vec!["pod".to_owned()],
            node_name: "node-1".to_owned(),
            pod_cidrs: ["10.244.0.0/16", "fd00:244::/32"].map(|range| range.parse().expect("a range")).into(),
            ..DataplaneConfig::default()
        };
        Self { client, pods, config }
    }

    /// A data plane with everything in `events` applied.
    pub(crate) fn driver(&self, events: Vec<Event>) -> Driver {
        let mut driver = Driver::open(&self.config).unwrap_or_else(|e| panic!("open: {}", chain(&e)));
        driver.handle(synced(events));
        driver.step().unwrap_or_else(|e| panic!("step: {}", chain(&e)));
        driver
    }
}

/// Where a service's endpoints are, and how they are.
#[derive(Clone, Copy)]
pub(crate) struct At {
    pub(crate) pod: usize,
    pub(crate) here: bool,
    pub(crate) readiness: Readiness,
}

/// A ready endpoint on this node.
pub(crate) fn here(pod: usize) -> At {
    At { pod, here: true, readiness: Readiness::Ready }
}

/// A ready endpoint that is said to be on another node.
pub(crate) fn elsewhere(pod: usize) -> At {
    At { here: false, ..here(pod) }
}

/// A service `name` on port 80, cluster IPs 10.96.0.`n` and fd00:96::`n`, NodePort 30,000 + `n`, changed by `change`.
pub(crate) fn service(name: &str, n: u16, proto: Proto, change: impl FnOnce(&mut Service)) -> Event {
    let mut service = Service {
        key: format!("default/{name}").into(),
        cluster_ips: [address(&format!("10.96.0.{n}")), address(&format!("fd00:96::{n}"))].into(),
        ports: [ServicePort { name: "".into(), port: 80, node_port: 30_000 + n, proto }].into(),
        ..Service::default()
    };
    change(&mut service);
    Event::Service(service)
}

/// Its slices, one a family.
pub(crate) fn slices(name: &str, proto: Proto, endpoints: &[At]) -> Vec<Event> {
    let slice = |family: usize| {
        Event::Slice(Slice {
            key: format!("default/{name}-{family}").into(),
            service: format!("default/{name}").into(),
            ports: [SlicePort { name: "".into(), port: 8080, proto }].into(),
            endpoints: endpoints
                .iter()
                .map(|at| Endpoint {
                    addr: address(&pod(at.pod, family)),
                    on_this_node: at.here,
                    readiness: at.readiness,
                    hint: Hint::None,
                })
                .collect(),
            weight: 1,
            problems: Box::default(),
        })
    };
    vec![slice(0), slice(1)]
}

/// Cluster IP `n` of a family, port 80.
pub(crate) fn cluster_ip(n: u16, family: usize) -> SocketAddr {
    at(&[format!("10.96.0.{n}"), format!("fd00:96::{n}")][family], 80)
}

/// NodePort 30,000 + `n` on the node's address of a family.
pub(crate) fn node_port(n: u16, family: usize) -> SocketAddr {
    SocketAddr::new(NODE[family].parse::<IpAddr>().expect("an address"), 30_000 + n)
}
