//! The nftables data plane with real connections: from outside, from pods and from the node itself.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use sheave_agent::service::Proto;
use sheave_harness::{NetNs, isolated};

use crate::service_nft_bed::{
    Bed, CLIENT, NODE, cluster_ip, elsewhere, here, node_port, pod, router, service, slices,
};
use crate::service_world::{ask, ask_udp, udp_client};

/// Who answers in `rounds` connections, and which peers they saw.
fn heard(from: &NetNs, to: SocketAddr, rounds: usize) -> (BTreeSet<String>, BTreeSet<String>) {
    (0..rounds).map(|_| from.run(|| ask(to)).unwrap_or_else(|e| panic!("{to}: {e}"))).unzip()
}

fn set<const N: usize>(of: [&str; N]) -> BTreeSet<String> {
    of.map(str::to_owned).into()
}

/// The error of a connection that must fail.
fn refused(from: &NetNs, to: SocketAddr) -> ErrorKind {
    let short = Duration::from_millis(300);
    from.run(|| TcpStream::connect_timeout(&to, short)).expect_err("nobody is to answer").kind()
}

fn own() -> NetNs {
    NetNs::open("/proc/self/ns/net").expect("our own namespace")
}

#[test]
fn service_nft_reaches_all_endpoints_of_both_families() {
    isolated(module_path!(), "service_nft_reaches_all_endpoints_of_both_families", |_| {
        let bed = Bed::new(3);
        let mut events = vec![service("web", 1, Proto::Tcp, |_| {}), service("dns", 2, Proto::Udp, |_| {})];
        events.extend(slices("web", Proto::Tcp, &[here(0), elsewhere(1)]));
        events.extend(slices("dns", Proto::Udp, &[here(1)]));
        let driver = bed.driver(events);
        for family in 0..2 {
            let both: BTreeSet<_> = [pod(0, family), pod(1, family)].into();
            // From a pod: its own address is seen.
            let (servers, peers) = heard(&bed.pods[2], cluster_ip(1, family), 40);
            assert_eq!((servers, peers), (both.clone(), set([&pod(2, family)])));
            // From outside: answers must come back by here, so that pods see the node.
            let routers = set([&router(0, family), &router(1, family)]);
            let (servers, peers) = heard(&bed.client, node_port(1, family), 40);
            assert_eq!((servers, peers), (both.clone(), routers.clone()));
            let (servers, peers) = heard(&bed.client, cluster_ip(1, family), 40);
            assert_eq!((servers, peers), (both.clone(), routers.clone()));
            // From the node itself.
            for to in [cluster_ip(1, family), node_port(1, family)] {
                let (servers, peers) = heard(&own(), to, 40);
                assert_eq!((servers, peers), (both.clone(), routers.clone()));
            }
            for (from, to) in [
                (&bed.client, node_port(2, family)),
                (&bed.pods[0], cluster_ip(2, family)),
                (&own(), cluster_ip(2, family)),
            ] {
                assert_eq!(from.run(|| ask_udp(&udp_client(to), to)), pod(1, family));
            }
            // Only the ports that are services'.
            assert_eq!(
                refused(&bed.client, SocketAddr::new(node_port(1, family).ip(), 30_009)),
                ErrorKind::ConnectionRefused
            );
        }
        assert_eq!((CLIENT.len(), NODE.len()), (2, 2));
        drop(driver);
    });
}
