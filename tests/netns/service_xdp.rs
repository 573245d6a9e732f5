//! XDP on an uplink: known flows to a backend on another node and to a pod of this one, beside traffic control.

use std::fs;
use std::path::Path;

use sheave_agent::dataplane::Driver;
use sheave_agent::service::{Event, Proto};
use sheave_harness::{NetNs, checksum_in_stack, isolated};

use crate::service_world::{World, ask, ask_udp, at, service, slice, tcp_server, udp_client, udp_server};

const NODE: [&str; 2] = ["198.51.100.1", "2001:db8:ffff::1"];
const CLIENT: [&str; 2] = ["198.51.100.2", "2001:db8:ffff::2"];
/// A backend on another node, behind the same uplink as the client.
const REMOTE: [&str; 2] = ["198.51.100.3", "2001:db8:ffff::3"];
const POD: [&str; 2] = ["10.244.0.5", "fd00:244::5"];
const ROUTER: [&str; 2] = ["10.244.0.1", "fd00:244::1"];
const TO_REMOTE: u16 = 30_080;
const TO_POD: u16 = 30_081;

/// The node (the test's own namespace); behind its uplink `up0` a client and a backend, and a pod behind `pod0`.
struct Lan {
    outside: NetNs,
    _pod: NetNs,
    world: World,
    cgroup: std::path::PathBuf,
}

impl Lan {
    fn new(cgroup: &Path) -> Self {
        let node = NetNs::open("/proc/self/ns/net").expect("our own namespace");
        let (outside, pod) = (NetNs::new(), NetNs::new());
        node.veth("up0", &outside, "eth0");
        node.veth("pod0", &pod, "eth0");
        for (netns, device, addresses) in [
            (&node, "up0", NODE),
            (&node, "pod0", ROUTER),
            (&outside, "eth0", CLIENT),
            (&outside, "eth0", REMOTE),
            (&pod, "eth0", POD),
        ] {
            netns.ip(&["addr", "add", &format!("{}/24", addresses[0]), "dev", device]);
            let mut add = vec!["addr", "add", "", "dev", device, "nodad"];
            let v6 = format!("{}/64", addresses[1]);
            add[2] = &v6;
            if addresses == REMOTE {
                // The client speaks from its other address.
                add.extend(["preferred_lft", "0"]);
            }
            netns.ip(&add);
        }
        pod.ip(&["route", "add", "default", "via", ROUTER[0]]);
        pod.ip(&["-6", "route", "add", "default", "via", ROUTER[1]]);
        for knob in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{knob}"), "1").unwrap_or_else(|e| panic!("{knob}: {e}"));
        }
        for (netns, addresses) in [(&outside, REMOTE), (&pod, POD)] {
            netns.run(|| {
                for addr in addresses {
                    tcp_server(at(addr, 8080));
                    udp_server(at(addr, 8080));
                }
            });
        }
        let served = cgroup.join("served");
        fs::create_dir(&served).expect("a cgroup that nobody is in");
        let world = World::new(&served, &["up0"]);
        Self { outside, _pod: pod, world, cgroup: served }
    }

    fn driver(&self) -> Driver {
        let mut events = Vec::new();
        for (proto, kind, net) in [(Proto::Tcp, "tcp", 1), (Proto::Udp, "udp", 2)] {
            for (name, port, backends, local) in
                [("remote", TO_REMOTE, REMOTE, false), ("pod", TO_POD, POD, true)]
            {
                let name = format!("{name}-{kind}");
                let last = port - 30_000;
                events.push(service(
                    &name,
                    &[&format!("10.96.{net}.{last}"), &format!("fd00:96:{net}::{last}")],
                    proto,
                    port,
                ));
                for backend in backends {
                    let mut event = slice(&name, proto, &[at(backend, 8080)]);
                    if let Event::Slice(slice) = &mut event {
                        slice.endpoints.iter_mut().for_each(|endpoint| endpoint.on_this_node = local);
                    }
                    events.push(event);
                }
            }
        }
        self.world.driver(events)
    }

    /// Connections and datagrams from outside to both services, in both families.
    fn talk(&self, rounds: usize) {
        for (family, node) in NODE.into_iter().enumerate() {
            for (port, backend) in [(TO_REMOTE, REMOTE[family]), (TO_POD, POD[family])] {
                let to = at(node, port);
                for _ in 0..rounds {
                    let (server, peer) = self.outside.run(|| ask(to)).unwrap_or_else(|e| panic!("{to}: {e}"));
                    let known = if port == TO_POD { CLIENT[family] } else { node };
                    assert_eq!((server.as_str(), peer.as_str()), (backend, known), "{to}");
                    assert_eq!(self.outside.run(|| ask_udp(&udp_client(to), to)), backend, "{to}");
                }
            }
        }
    }

    fn device(&self) -> String {
        let shown = std::process::Command::new("ip").args(["-d", "link", "show", "up0"]).output();
        String::from_utf8_lossy(&shown.expect("run ip").stdout).into_owned()
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
fn service_xdp_forwards_known_flows() {
    isolated(module_path!(), "service_xdp_forwards_known_flows", |cgroup| {
        let mut lan = Lan::new(cgroup);
        lan.world.config.xdp = true;
        let driver = lan.driver();
        assert!(lan.device().contains("xdp"), "{}", lan.device());

        // What leaves its checksums to the device goes by traffic control.
        lan.talk(2);
        assert_eq!(lan.world.counted("xdp_sent"), 0);
        assert_eq!(lan.world.counted("rewrite_failed"), 0);

        lan.outside.run(|| checksum_in_stack("eth0")).expect("turn checksum offload off");
        lan.talk(5);
        // A TCP connection has at least three more packets a side than the one that opens its flow.
        let sent = lan.world.counted("xdp_sent");
        assert!(sent >= 60, "{sent} packets were sent by XDP");
        let before = sent;

        // The agent goes; what it attached stays, and is replaced in place by the next one.
        drop(driver);
        lan.talk(2);
        let next = lan.driver();
        lan.talk(2);
        assert!(lan.world.counted("xdp_sent") > before);
        drop(next);

        // Turned off it leaves the device, and nothing but it.
        lan.world.config.xdp = false;
        let plain = lan.driver();
        assert!(!lan.device().contains("xdp"), "{}", lan.device());
        let before = lan.world.counted("xdp_sent");
        lan.talk(2);
        assert_eq!(lan.world.counted("xdp_sent"), before);
        drop(plain);
    });
}
