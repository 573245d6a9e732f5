//! The IPVS data plane with real connections: from outside, from pods and from the node itself.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};

use sheave_agent::service::{Event, Proto, Service};
use sheave_harness::{isolated, wait_for};

use crate::ipvs_bed::{
    BETWEEN, Bed, CLIENT, ECHO, NAMES, NODE, POD1, POD2, REMOTE, SILENCE, Talk, endpoints, plain, table, tell,
};
use crate::service_world::{ask, ask_udp, at, udp_client};

/// Asks often enough to have had every endpoint: who answered, and as whom each saw the client.
fn all_answers(to: SocketAddr) -> BTreeSet<(String, String)> {
    (0..6).map(|_| ask(to).unwrap_or_else(|e| panic!("{to}: {e}"))).collect()
}

fn servers(answers: &BTreeSet<(String, String)>) -> BTreeSet<&str> {
    answers.iter().map(|(server, _)| server.as_str()).collect()
}

fn seen_as<'a>(answers: &'a BTreeSet<(String, String)>, server: &str) -> BTreeSet<&'a str> {
    answers.iter().filter(|(at, _)| at == server).map(|(_, peer)| peer.as_str()).collect()
}

fn silent(to: SocketAddr) {
    let error = TcpStream::connect_timeout(&to, SILENCE).expect_err("nobody may answer");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{to}");
}

fn refused(to: SocketAddr) {
    let error = ask(to).expect_err("nobody may answer");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
}

const VIP: [&str; 2] = ["10.96.0.1", "fd00:96::1"];

/// A service in both families with a pod here and one elsewhere.
fn web(proto: Proto) -> Vec<Event> {
    let name = if proto == Proto::Tcp { "web" } else { "dns" };
    let slice = |family: usize| {
        endpoints(name, proto, NAMES, &[(POD1[family], true, true), (REMOTE[family], false, true)])
    };
    vec![Event::Service(plain(name, &VIP, proto, 30_080)), slice(0), slice(1)]
}

#[test]
fn ipvs_services_are_reached_from_everywhere() {
    isolated(module_path!(), "ipvs_services_are_reached_from_everywhere", |_| {
        let bed = Bed::new();
        let driver = bed.driver([web(Proto::Tcp), web(Proto::Udp)].concat());
        for family in 0..2 {
            let (pod, remote) = (POD1[family], REMOTE[family]);
            for to in [at(VIP[family], 80), at(NODE[family], 30_080), at(BETWEEN[family], 30_080)] {
                // From outside: a pod of this node sees who asks; what leaves for another node comes back by here.
                let answers = bed.client.run(|| all_answers(to));
                assert_eq!(servers(&answers), [pod, remote].into(), "client to {to}");
                assert_eq!(seen_as(&answers, pod), [CLIENT[family]].into(), "client to {to}");
                assert_eq!(seen_as(&answers, remote), [BETWEEN[family]].into(), "client to {to}");
                // Pods are seen as they are, but for one that asks for itself.
                let answers = bed.pod1.run(|| all_answers(to));
                assert_eq!(servers(&answers), [pod, remote].into(), "pod to {to}");
                assert_eq!(seen_as(&answers, remote), [pod].into(), "pod to {to}");
                assert!(!seen_as(&answers, pod).contains(pod), "pod to {to}");
                // The node's own programs.
                let answers = all_answers(to);
                assert_eq!(servers(&answers), [pod, remote].into(), "node to {to}");
                assert!(seen_as(&answers, remote).iter().all(|peer| !VIP.contains(peer)), "node to {to}");
                for netns in [Some(&bed.client), Some(&bed.pod1), None] {
                    let talk = || (0..4).map(|_| ask_udp(&udp_client(to), to)).collect::<BTreeSet<_>>();
                    let found = netns.map_or_else(talk, |netns| netns.run(talk));
                    assert_eq!(found, [pod.to_owned(), remote.to_owned()].into(), "datagrams to {to}");
                }
            }
        }
        drop(driver);
        bed.uninstall();
        assert!(table().is_empty(), "{:?}", table());
    });
}

#[test]
fn ipvs_refuses_what_nobody_serves() {
    isolated(module_path!(), "ipvs_refuses_what_nobody_serves", |_| {
        let bed = Bed::new();
        let empty = plain("empty", &["10.96.0.3", "fd00:96::3"], Proto::Tcp, 30_083);
        let mut driver = bed.driver([web(Proto::Tcp), vec![Event::Service(empty)]].concat());
        // A program of the node that listens everywhere is not to be had on the addresses of services.
        let listener = TcpListener::bind("[::]:2222").expect("listen");
        for family in 0..2 {
            let empty = ["10.96.0.3", "fd00:96::3"][family];
            let to = [at(empty, 80), at(NODE[family], 30_083), at(VIP[family], 2222), at(VIP[family], 81)];
            for to in to {
                bed.client.run(|| refused(to));
                bed.pod1.run(|| refused(to));
                refused(to);
            }
            let own = at(NODE[family], 2222);
            bed.client.run(|| TcpStream::connect_timeout(&own, SILENCE)).expect("the node's own address");
        }
        // Somebody comes, and goes.
        let slice = |all: &[(&str, bool, bool)]| endpoints("empty", Proto::Tcp, NAMES, all);
        tell(&mut driver, vec![slice(&[(POD1[0], true, true)])]);
        assert_eq!(bed.client.run(|| ask(at("10.96.0.3", 80))).expect("an endpoint").0, POD1[0]);
        tell(&mut driver, vec![slice(&[])]);
        bed.client.run(|| refused(at("10.96.0.3", 80)));
        drop(listener);
        bed.uninstall();
    });
}

#[test]
fn ipvs_keeps_to_the_node_where_policies_say_so() {
    isolated(module_path!(), "ipvs_keeps_to_the_node_where_policies_say_so", |_| {
        let bed = Bed::new();
        let outside =
            |name: &str, ip, port| Service { external_local: true, ..plain(name, &[ip], Proto::Tcp, port) };
        let inside = |name: &str, ip| Service { internal_local: true, ..plain(name, &[ip], Proto::Tcp, 0) };
        let (pod, remote) = ((POD1[0], true, true), (REMOTE[0], false, true));
        let driver = bed.driver(vec![
            Event::Service(outside("out", "10.96.1.1", 30_001)),
            endpoints("out", Proto::Tcp, NAMES, &[pod, remote]),
            Event::Service(outside("away", "10.96.1.2", 30_002)),
            endpoints("away", Proto::Tcp, NAMES, &[remote]),
            Event::Service(inside("in", "10.96.1.3")),
            endpoints("in", Proto::Tcp, NAMES, &[pod, remote]),
            Event::Service(inside("gone", "10.96.1.4")),
            endpoints("gone", Proto::Tcp, NAMES, &[remote]),
        ]);
        let to = at(NODE[0], 30_001);
        let expected: BTreeSet<_> = [(POD1[0].to_owned(), CLIENT[0].to_owned())].into();
        assert_eq!(bed.client.run(|| all_answers(to)), expected, "only here, and seen as it is");
        assert_eq!(servers(&bed.pod1.run(|| all_answers(to))), [POD1[0], REMOTE[0]].into(), "from inside");
        assert_eq!(servers(&all_answers(to)), [POD1[0], REMOTE[0]].into(), "from the node");
        let to = at(NODE[0], 30_002);
        bed.client.run(|| silent(to));
        assert_eq!(servers(&bed.pod1.run(|| all_answers(to))), [REMOTE[0]].into());
        assert_eq!(servers(&all_answers(to)), [REMOTE[0]].into());
        let to = at("10.96.1.3", 80);
        assert_eq!(servers(&bed.pod1.run(|| all_answers(to))), [POD1[0]].into());
        assert_eq!(servers(&all_answers(to)), [POD1[0]].into());
        bed.pod1.run(|| refused(at("10.96.1.4", 80)));
        refused(at("10.96.1.4", 80));
        drop(driver);
        bed.uninstall();
        assert!(table().is_empty(), "{:?}", table());
    });
}

#[test]
fn ipvs_connections_outlive_the_agent_and_drain() {
    isolated(module_path!(), "ipvs_connections_outlive_the_agent_and_drain", |_| {
        let bed = Bed::new();
        let events = |all: &[(&str, bool, bool)]| {
            let service = Service { external_local: true, ..plain("web", &[VIP[0]], Proto::Tcp, 30_080) };
            vec![Event::Service(service), endpoints("web", Proto::Tcp, ECHO, all)]
        };
        let (first, second) = ((POD1[0], true, true), (POD2[0], true, true));
        let driver = bed.driver(events(&[first]));
        let places = [at(VIP[0], 80), at(NODE[0], 30_080)];
        let mut talks: Vec<Talk> = Vec::new();
        for to in places {
            talks.push(bed.client.run(|| Talk::begin(to)));
            talks.push(bed.pod1.run(|| Talk::begin(to)));
            talks.push(Talk::begin(to));
        }
        let mut go_on = |why: &str| {
            for talk in &mut talks {
                assert_eq!(talk.with().to_string(), POD1[0], "{why}");
            }
        };
        go_on("at the beginning");
        // As killed: nothing is taken down.
        drop(driver);
        go_on("without an agent");
        // Meanwhile the first pod is about to go, and there is another one.
        let mut driver = bed.driver(events(&[(POD1[0], true, false), second]));
        go_on("with the next agent");
        for to in places {
            assert_eq!(bed.client.run(|| Talk::once(to)).to_string(), POD2[0], "new ones go elsewhere");
            assert_eq!(bed.pod1.run(|| Talk::once(to)).to_string(), POD2[0]);
        }
        // Gone from the slices, and then the service too: what is established still goes on.
        tell(&mut driver, events(&[second]));
        go_on("without an endpoint");
        driver.tick().expect("repair");
        go_on("after a repair");
        tell(&mut driver, vec![Event::ServiceGone("default/web".into())]);
        go_on("without a service");
        for to in places {
            bed.client.run(|| refused(to));
        }
        assert!(table().values().flatten().all(|(_, weight)| *weight == 0), "{:?}", table());
        talks.into_iter().for_each(Talk::reset);
        wait_for("what drained to go", || {
            driver.tick().expect("repair");
            if table().is_empty() { Ok(()) } else { Err(format!("{:?}", table())) }
        });
        drop(driver);
        bed.uninstall();
    });
}
