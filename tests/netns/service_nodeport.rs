//! NodePort traffic from outside the node: a client and a pod in namespaces of their own, the node between them.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use sheave_agent::dataplane::Driver;
use sheave_agent::service::{Endpoint, Event, Hint, Proto, Readiness, Slice, SlicePort};
use sheave_harness::{NetNs, isolated};

use crate::service_world::{
    World, address, ask, ask_udp, at, ip, service, slice, tcp_server, udp_client, udp_server,
};

const CLIENT: [&str; 2] = ["198.51.100.2", "2001:db8:ffff::2"];
const NODE: [&str; 2] = ["198.51.100.1", "2001:db8:ffff::1"];
const POD: [&str; 2] = ["10.244.0.5", "fd00:244::5"];
const ROUTER: [&str; 2] = ["10.244.0.1", "fd00:244::1"];

fn add(netns: &NetNs, device: &str, addresses: [&str; 2]) {
    netns.ip(&["addr", "add", &format!("{}/24", addresses[0]), "dev", device]);
    netns.ip(&["addr", "add", &format!("{}/64", addresses[1]), "dev", device, "nodad"]);
}

/// The node (the test's own namespace), a client behind its uplink `up0`, and a pod behind `pod0` that serves TCP and
/// UDP on port 8080 of both its addresses. Pods and client are outside of the cgroup that is served.
struct Lan {
    client: NetNs,
    pod: NetNs,
    world: World,
    cgroup: std::path::PathBuf,
}

impl Lan {
    fn new(cgroup: &Path) -> Self {
        let node = NetNs::open("/proc/self/ns/net").expect("our own namespace");
        let (client, pod) = (NetNs::new(), NetNs::new());
        node.veth("up0", &client, "eth0");
        node.veth("pod0", &pod, "eth0");
        add(&node, "up0", NODE);
        add(&node, "pod0", ROUTER);
        add(&client, "eth0", CLIENT);
        add(&pod, "eth0", POD);
        pod.ip(&["route", "add", "default", "via", ROUTER[0]]);
        pod.ip(&["-6", "route", "add", "default", "via", ROUTER[1]]);
        for knob in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{knob}"), "1").unwrap_or_else(|e| panic!("{knob}: {e}"));
        }
        for addr in POD {
            pod.run(|| {
                tcp_server(at(addr, 8080));
                udp_server(at(addr, 8080));
            });
        }
        let served = cgroup.join("served");
        fs::create_dir(&served).expect("a cgroup that nobody is in");
        let world = World::new(&served, &["up0"]);
        Self { client, pod, world, cgroup: served }
    }

    fn driver(&self) -> Driver {
        let pods = POD.map(|addr| at(addr, 8080));
        let mut events = Vec::new();
        for (name, proto, ips) in [
            ("web", Proto::Tcp, ["10.96.0.1", "fd00:96::1"]),
            ("dns", Proto::Udp, ["10.96.0.2", "fd00:96::2"]),
        ] {
            events.push(service(name, &ips, proto, 30_080));
            events.extend(pods.iter().map(|pod| slice(name, proto, &[*pod])));
        }
        events.push(service("empty", &["10.96.0.3", "fd00:96::3"], Proto::Tcp, 30_081));
        events.push(service("remote", &["10.96.0.4", "fd00:96::4"], Proto::Tcp, 30_082));
        let elsewhere = Endpoint {
            addr: address("10.244.9.9"),
            on_this_node: false,
            readiness: Readiness::Ready,
            hint: Hint::None,
        };
        events.push(Event::Slice(Slice {
            key: "default/remote-v4".into(),
            service: "default/remote".into(),
            ports: [SlicePort { name: "".into(), port: 8080, proto: Proto::Tcp }].into(),
            endpoints: [elsewhere].into(),
            weight: 1,
            problems: Box::default(),
        }));
        self.world.driver(events)
    }

    fn talk(&self, rounds: usize) {
        for (node, (pod, client)) in NODE.into_iter().zip(POD.into_iter().zip(CLIENT)) {
            let to = at(node, 30_080);
            for _ in 0..rounds {
                let (server, peer) = self.client.run(|| ask(to)).unwrap_or_else(|e| panic!("{to}: {e}"));
                assert_eq!(server, pod);
                assert_eq!(peer, client, "the pod sees the client's own address");
                assert_eq!(self.client.run(|| ask_udp(&udp_client(to), to)), pod);
            }
        }
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.cgroup) {
            eprintln!("{}: {error}", self.cgroup.display());
        }
    }
}

#[test]
fn service_node_ports_are_reached_from_outside() {
    isolated(module_path!(), "service_node_ports_are_reached_from_outside", |cgroup| {
        let lan = Lan::new(cgroup);
        let driver = lan.driver();
        lan.talk(10);
        assert!(lan.world.counted("forwarded") >= 40);
        assert!(lan.world.counted("replied") >= 40);
        assert_eq!(lan.world.counted("connect_translated"), 0, "nothing of this goes by the socket hooks");
        assert_eq!(lan.world.counted("rewrite_failed"), 0);

        // Nobody there: the node itself refuses. Endpoints elsewhere only: counted and dropped.
        for node in NODE {
            let refused = lan.client.run(|| ask(at(node, 30_081))).expect_err("no endpoints");
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        }
        assert_eq!(lan.world.counted("rejected_no_endpoints"), 2);
        // Nobody routes to the endpoint that is elsewhere: counted and dropped.
        let to = at(NODE[0], 30_082);
        let short = std::time::Duration::from_millis(300);
        let silent = lan.client.run(|| std::net::TcpStream::connect_timeout(&to, short));
        assert_eq!(silent.expect_err("dropped").kind(), ErrorKind::TimedOut);
        assert!(lan.world.counted("no_route") >= 1);

        // The agent goes; what it attached stays, and is replaced in place by the next one.
        drop(driver);
        lan.talk(2);
        let next = lan.driver();
        lan.talk(2);
        drop(next);
    });
}

#[test]
fn service_node_ports_carry_bulk_data_both_ways() {
    use std::io::{Read as _, Write as _};
    isolated(module_path!(), "service_node_ports_carry_bulk_data_both_ways", |cgroup| {
        let lan = Lan::new(cgroup);
        let mut driver = lan.driver();
        for (node, pod) in NODE.into_iter().zip(POD) {
            // Checksum offload and segmentation at work: a megabyte there and back, byte for byte.
            let listener = lan.pod.run(|| std::net::TcpListener::bind(at(pod, 9090))).expect("listen");
            let echo = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().expect("a client");
                let mut all = Vec::new();
                stream.read_to_end(&mut all).expect("read");
                stream.write_all(&all).expect("write back");
            });
            let bulk = service("bulk", &["10.96.0.9", "fd00:96::9"], Proto::Tcp, 30_099);
            driver.handle([bulk, slice("bulk", Proto::Tcp, &[at(pod, 9090)])]);
            driver.step().expect("apply");
            let sent: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
            let heard = lan.client.run(|| {
                let mut stream = std::net::TcpStream::connect(at(node, 30_099)).expect("connect");
                stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).expect("set a timeout");
                stream.write_all(&sent).expect("send");
                stream.shutdown(std::net::Shutdown::Write).expect("say that this is all");
                let mut heard = Vec::new();
                stream.read_to_end(&mut heard).expect("hear");
                heard
            });
            echo.join().expect("the pod's side");
            assert_eq!(heard.len(), sent.len());
            assert!(heard == sent);
        }
    });
}

#[test]
fn service_node_ports_survive_an_uplink_that_is_made_anew() {
    isolated(module_path!(), "service_node_ports_survive_an_uplink_that_is_made_anew", |cgroup| {
        let lan = Lan::new(cgroup);
        let mut driver = lan.driver();
        lan.talk(1);
        ip(&["link", "del", "up0"]);
        let node = NetNs::open("/proc/self/ns/net").expect("our own namespace");
        node.veth("up0", &lan.client, "eth0");
        add(&node, "up0", NODE);
        add(&lan.client, "eth0", CLIENT);
        driver.tick().expect("repair");
        lan.talk(1);
    });
}
