//! The nftables data plane with real connections: from outside, from pods and from the node itself.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use sheave_agent::dataplane::NodePortAddresses;
use sheave_agent::service::{Event, Proto, Readiness, Service, ServiceExtras};
use sheave_harness::netns::checked;
use sheave_harness::{NetNs, isolated, require_program, wait_until};

use crate::service_nft_bed::{
    At, Bed, CLIENT, cluster_ip, elsewhere, here, node_port, pod, router, service, slices,
};
use crate::service_world::{address, ask, ask_udp, at, chain, ip, udp_client};

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
        drop(driver);
    });
}

/// A stream of one service's events in short.
fn one(n: u16, change: impl FnOnce(&mut Service), endpoints: &[At]) -> Vec<Event> {
    let name = format!("s{n}");
    let mut events = vec![service(&name, n, Proto::Tcp, change)];
    events.extend(slices(&name, Proto::Tcp, endpoints));
    events
}

#[test]
fn service_nft_keeps_traffic_on_the_node_where_policy_says_so() {
    isolated(module_path!(), "service_nft_keeps_traffic_on_the_node_where_policy_says_so", |_| {
        let bed = Bed::new(3);
        let mut events = one(1, |s| s.external_local = true, &[here(0), elsewhere(1)]);
        events.extend(one(2, |s| s.external_local = true, &[elsewhere(1)]));
        events.extend(one(3, |s| s.internal_local = true, &[here(0), elsewhere(1)]));
        events.extend(one(4, |s| s.internal_local = true, &[elsewhere(1)]));
        events.extend(one(5, |s| (s.external_local, s.internal_local) = (true, true), &[]));
        let driver = bed.driver(events);
        for (family, client) in CLIENT.into_iter().enumerate() {
            let both: BTreeSet<_> = [pod(0, family), pod(1, family)].into();
            let local = set([&pod(0, family)]);
            // Outside: local endpoints, which see the client itself.
            assert_eq!(heard(&bed.client, node_port(1, family), 20), (local.clone(), set([client])));
            assert_eq!(refused(&bed.client, node_port(2, family)), ErrorKind::TimedOut);
            // Inside: like policy Cluster.
            assert_eq!(heard(&bed.pods[2], node_port(1, family), 40), (both.clone(), set([&pod(2, family)])));
            assert_eq!(heard(&own(), node_port(2, family), 5).0, set([&pod(1, family)]));
            assert_eq!(heard(&bed.client, cluster_ip(1, family), 40).0, both);
            // internalTrafficPolicy is about the ClusterIP alone.
            assert_eq!(
                heard(&bed.pods[2], cluster_ip(3, family), 20),
                (local.clone(), set([&pod(2, family)]))
            );
            assert_eq!(heard(&own(), cluster_ip(3, family), 20).0, local);
            assert_eq!(heard(&bed.client, node_port(3, family), 40).0, both);
            for from in [&bed.pods[2], &own()] {
                assert_eq!(refused(from, cluster_ip(4, family)), ErrorKind::TimedOut);
            }
            // Nobody anywhere: said at once, whatever the policy.
            for (from, to) in [
                (&bed.client, node_port(5, family)),
                (&bed.client, cluster_ip(5, family)),
                (&bed.pods[2], cluster_ip(5, family)),
                (&own(), cluster_ip(5, family)),
                (&own(), node_port(5, family)),
            ] {
                assert_eq!(refused(from, to), ErrorKind::ConnectionRefused, "{to}");
            }
        }
        drop(driver);
    });
}

#[test]
fn service_nft_udp_without_endpoints_is_refused() {
    isolated(module_path!(), "service_nft_udp_without_endpoints_is_refused", |_| {
        let bed = Bed::new(1);
        let driver = bed.driver(vec![service("dns", 1, Proto::Udp, |_| {})]);
        for family in 0..2 {
            for (from, to) in [
                (&bed.client, node_port(1, family)),
                (&bed.pods[0], cluster_ip(1, family)),
                (&own(), cluster_ip(1, family)),
            ] {
                let error = from.run(|| {
                    let socket = udp_client(to);
                    socket.connect(to).expect("connect");
                    // What a rule drops on its way out is told to the sender; for the node itself that comes first.
                    let sent = socket.send(b"who");
                    sent.and_then(|_| socket.recv(&mut [0; 8])).expect_err("nobody is there").kind()
                });
                let told = [ErrorKind::ConnectionRefused, ErrorKind::PermissionDenied];
                assert!(told.contains(&error), "{to}: {error:?}");
            }
        }
        drop(driver);
    });
}

#[test]
fn service_nft_terminating_endpoints_serve_when_none_is_ready() {
    isolated(module_path!(), "service_nft_terminating_endpoints_serve_when_none_is_ready", |_| {
        let bed = Bed::new(2);
        let leaving = |pod, here| At { pod, here, readiness: Readiness::Terminating };
        let mut events = one(1, |_| {}, &[here(0), leaving(1, true)]);
        events.extend(one(2, |_| {}, &[leaving(0, true), leaving(1, false)]));
        events.extend(one(3, |s| s.external_local = true, &[leaving(0, true), elsewhere(1)]));
        let driver = bed.driver(events);
        assert_eq!(heard(&bed.client, node_port(1, 0), 20).0, set([&pod(0, 0)]));
        assert_eq!(heard(&bed.client, node_port(2, 0), 40).0, set([&pod(0, 0), &pod(1, 0)]));
        assert_eq!(heard(&bed.client, node_port(3, 0), 20).0, set([&pod(0, 0)]));
        assert_eq!(heard(&own(), node_port(3, 0), 20).0, set([&pod(1, 0)]));
        drop(driver);
    });
}

#[test]
fn service_nft_pods_reach_themselves() {
    isolated(module_path!(), "service_nft_pods_reach_themselves", |_| {
        let bed = Bed::new(2);
        let driver = bed.driver(one(1, |_| {}, &[here(0)]));
        for family in 0..2 {
            // Answers would never leave the pod if it saw itself.
            for to in [cluster_ip(1, family), node_port(1, family)] {
                let (servers, peers) = heard(&bed.pods[0], to, 5);
                assert_eq!((servers, peers), (set([&pod(0, family)]), set([&router(0, family)])));
            }
            assert_eq!(heard(&bed.pods[1], cluster_ip(1, family), 5).1, set([&pod(1, family)]));
        }
        drop(driver);
    });
}

#[test]
fn service_nft_masquerades_everything_on_request() {
    isolated(module_path!(), "service_nft_masquerades_everything_on_request", |_| {
        let mut bed = Bed::new(2);
        bed.config.masquerade_all = true;
        let driver = bed.driver(one(1, |s| s.external_local = true, &[here(0)]));
        for family in 0..2 {
            for (from, to) in [(&bed.pods[1], cluster_ip(1, family)), (&bed.client, node_port(1, family))] {
                assert_eq!(heard(from, to, 5).1, set([&router(0, family)]));
            }
        }
        drop(driver);
    });
}

#[test]
fn service_nft_clients_stay_with_their_endpoint() {
    isolated(module_path!(), "service_nft_clients_stay_with_their_endpoint", |_| {
        let bed = Bed::new(3);
        let all = [here(0), here(1), elsewhere(2)];
        let sticky = |timeout_s| move |s: &mut Service| s.affinity_timeout_s = timeout_s;
        let mut driver = bed.driver(one(1, sticky(600), &all));
        for family in 0..2 {
            for to in [node_port(1, family), cluster_ip(1, family)] {
                let (first, _) = heard(&bed.client, to, 20);
                assert_eq!(first.len(), 1, "{to}: {first:?}");
                // The others change: it stays. Its own one leaves: another one, for good.
                let held = (0..3).find(|n| first.contains(&pod(*n, family))).expect("one of them");
                let others: Vec<At> = all.iter().copied().filter(|at| at.pod != held).collect();
                driver.handle(slices("s1", Proto::Tcp, &[all[held], others[0]]));
                driver.step().expect("apply");
                assert_eq!(heard(&bed.client, to, 20).0, first);
                driver.handle(slices("s1", Proto::Tcp, &others));
                driver.step().expect("apply");
                let (second, _) = heard(&bed.client, to, 20);
                assert!(second.len() == 1 && second != first, "{to}: {second:?}");
                driver.handle(slices("s1", Proto::Tcp, &all));
                driver.step().expect("apply");
                assert_eq!(heard(&bed.client, to, 20).0, second);
            }
        }
        // Another timeout is another way of choosing; with a short one the client is forgotten.
        driver.handle(one(1, sticky(1), &all));
        driver.step().expect("apply");
        let first = heard(&bed.client, node_port(1, 0), 5).0;
        wait_until("the client is forgotten", Duration::from_secs(60), || {
            // Every answer starts the second anew.
            std::thread::sleep(Duration::from_millis(1200));
            if heard(&bed.client, node_port(1, 0), 1).0 == first {
                Err("the same one answered")
            } else {
                Ok(())
            }
        });
        driver.handle(one(1, sticky(0), &all));
        driver.step().expect("apply");
        assert_eq!(heard(&bed.client, node_port(1, 0), 60).0.len(), 3);
    });
}

#[test]
fn service_nft_load_balancers_let_in_whom_they_may() {
    isolated(module_path!(), "service_nft_load_balancers_let_in_whom_they_may", |_| {
        let bed = Bed::new(2);
        let extras = |ranges: &'static [&'static str]| {
            move |s: &mut Service| {
                s.extras = Some(Box::new(ServiceExtras {
                    ingress_ips: ["203.0.113.7", "2001:db8:113::7"].map(address).into(),
                    external_ips: ["203.0.113.8", "2001:db8:113::8"].map(address).into(),
                    source_ranges: ranges.iter().map(|r| r.parse().expect("a range")).collect(),
                    ..ServiceExtras::default()
                }));
            }
        };
        let ingress = [at("203.0.113.7", 80), at("2001:db8:113::7", 80)];
        let external = [at("203.0.113.8", 80), at("2001:db8:113::8", 80)];
        let mut driver = bed.driver(one(1, extras(&[]), &[here(0)]));
        for family in 0..2 {
            for to in [ingress[family], external[family]] {
                assert_eq!(heard(&bed.client, to, 3), (set([&pod(0, family)]), set([&router(0, family)])));
                assert_eq!(heard(&bed.pods[1], to, 3), (set([&pod(0, family)]), set([&pod(1, family)])));
            }
        }
        // Ranges that lie in each other are no trouble.
        let others: &[&str] = &["192.0.2.0/24", "192.0.0.0/8", "2001:db8:1::/48"];
        let ours: &[&str] = &["192.0.2.0/24", "198.51.100.0/30", "2001:db8:ffff::/64", "2001:db8::/32"];
        for (ranges, allowed) in [(others, false), (ours, true), (others, false), (&[], true)] {
            driver.handle(one(1, extras(ranges), &[here(0)]));
            driver.step().unwrap_or_else(|e| panic!("step: {}", chain(&e)));
            for family in 0..2 {
                if allowed {
                    assert_eq!(heard(&bed.client, ingress[family], 3).0, set([&pod(0, family)]));
                } else {
                    assert_eq!(refused(&bed.client, ingress[family]), ErrorKind::TimedOut);
                }
                // They are about ingress addresses, and about the outside.
                assert_eq!(heard(&bed.client, external[family], 3).0, set([&pod(0, family)]));
                assert_eq!(heard(&bed.client, node_port(1, family), 3).0, set([&pod(0, family)]));
                assert_eq!(heard(&bed.pods[1], ingress[family], 3).0, set([&pod(0, family)]));
            }
        }
    });
}

#[test]
fn service_nft_node_ports_are_where_they_are_wanted() {
    isolated(module_path!(), "service_nft_node_ports_are_where_they_are_wanted", |_| {
        let mut bed = Bed::new(1);
        ip(&["addr", "add", "198.51.100.9/24", "dev", "up0"]);
        let second = SocketAddr::new(address("198.51.100.9"), node_port(1, 0).port());
        let loopback = SocketAddr::new(address("127.0.0.1"), node_port(1, 0).port());
        let mut ask_both = |wanted: NodePortAddresses, first_serves: bool, second_serves: bool| {
            bed.config.node_port_addresses = wanted;
            let driver = bed.driver(one(1, |_| {}, &[here(0)]));
            for (to, serves) in [(node_port(1, 0), first_serves), (second, second_serves)] {
                if serves {
                    assert_eq!(heard(&bed.client, to, 3).0, set([&pod(0, 0)]));
                } else {
                    assert_eq!(refused(&bed.client, to), ErrorKind::ConnectionRefused);
                }
            }
            assert_eq!(refused(&own(), loopback), ErrorKind::ConnectionRefused, "not on loopback");
            drop(driver);
        };
        ask_both(NodePortAddresses::All, true, true);
        ask_both(NodePortAddresses::In(vec!["198.51.100.9/32".parse().expect("a range")]), false, true);
        // An address that comes later is one, too.
        let mut driver = {
            bed.config.node_port_addresses = NodePortAddresses::All;
            bed.driver(one(1, |_| {}, &[here(0)]))
        };
        ip(&["addr", "add", "198.51.100.11/24", "dev", "up0"]);
        let third = SocketAddr::new(address("198.51.100.11"), node_port(1, 0).port());
        assert_eq!(refused(&bed.client, third), ErrorKind::ConnectionRefused);
        driver.tick().expect("tick");
        assert_eq!(heard(&bed.client, third, 3).0, set([&pod(0, 0)]));
        ip(&["addr", "del", "198.51.100.9/24", "dev", "up0"]);
        driver.tick().expect("tick");
        assert_eq!(heard(&bed.client, third, 3).0, set([&pod(0, 0)]));
        // Its ports are free again.
        drop(driver);
    });
}

#[test]
fn service_nft_carries_sctp_as_far_as_the_kernel_does() {
    isolated(module_path!(), "service_nft_carries_sctp_as_far_as_the_kernel_does", |_| {
        if !require_program("nft") {
            return;
        }
        let bed = Bed::new(1);
        let mut events = vec![service("sig", 1, Proto::Sctp, |_| {})];
        events.extend(slices("sig", Proto::Sctp, &[here(0)]));
        let driver = bed.driver(events);
        // Many kernels have no SCTP sockets to ask with; the translation is the same as for the others.
        let listed = checked(Command::new("nft").args(["list", "map", "inet", "sheave", "services4"]));
        for frontend in ["10.96.0.1 . sctp . 80", "0.0.0.0 . sctp . 30001"] {
            assert!(listed.contains(frontend), "{listed}");
        }
        drop(driver);
    });
}
