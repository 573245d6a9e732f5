//! What the IPVS tests share: a node with a client outside, two pods on it and one on another node, which has no way
//! back to the client. Only ring vm runs these tests: their names start with `ipvs_`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use sheave_agent::dataplane::{DataplaneConfig, Driver, Mode, remove};
use sheave_agent::service::{
    Endpoint, Event, Hint, Proto, Readiness, Service, ServiceExtras, ServicePort, Slice, SlicePort,
};
use sheave_harness::NetNs;

use crate::service_world::{address, at, chain, synced, tcp_server, udp_server};

/// Addresses of each party, IPv4 and IPv6.
pub(crate) const CLIENT: [&str; 2] = ["198.51.100.2", "2001:db8:ffff::2"];
pub(crate) const NODE: [&str; 2] = ["198.51.100.1", "2001:db8:ffff::1"];
pub(crate) const POD1: [&str; 2] = ["10.244.1.5", "fd00:244:1::5"];
pub(crate) const POD2: [&str; 2] = ["10.244.2.5", "fd00:244:2::5"];
pub(crate) const REMOTE: [&str; 2] = ["10.244.9.9", "fd00:244:9::9"];
/// The node's addresses on the devices to its pods and to the other node.
const GATEWAY1: [&str; 2] = ["10.244.1.1", "fd00:244:1::1"];
const GATEWAY2: [&str; 2] = ["10.244.2.1", "fd00:244:2::1"];
pub(crate) const BETWEEN: [&str; 2] = ["192.0.2.1", "2001:db8:2::1"];
const OTHER: [&str; 2] = ["192.0.2.2", "2001:db8:2::2"];

/// Where pods tell who they are, and where they repeat what they hear.
pub(crate) const NAMES: u16 = 8080;
pub(crate) const ECHO: u16 = 8081;

/// How long nothing must come before it counts as dropped.
pub(crate) const SILENCE: Duration = Duration::from_millis(1500);

/// The node is the test's own namespace.
pub(crate) struct Bed {
    pub(crate) client: NetNs,
    pub(crate) pod1: NetNs,
    /// Kept for its servers' sake.
    _others: [NetNs; 2],
    pub(crate) config: DataplaneConfig,
}

fn add(netns: &NetNs, device: &str, addresses: [&str; 2]) {
    netns.ip(&["addr", "add", &format!("{}/24", addresses[0]), "dev", device]);
    netns.ip(&["addr", "add", &format!("{}/64", addresses[1]), "dev", device, "nodad"]);
}

fn default_route(netns: &NetNs, via: [&str; 2]) {
    netns.ip(&["route", "add", "default", "via", via[0]]);
    netns.ip(&["-6", "route", "add", "default", "via", via[1]]);
}

impl Bed {
    pub(crate) fn new() -> Self {
        let node = NetNs::open("/proc/self/ns/net").expect("our own namespace");
        let [client, pod1, pod2, other] = [NetNs::new(), NetNs::new(), NetNs::new(), NetNs::new()];
        for (device, at, peer, theirs, ours) in [
            ("up0", &client, "eth0", CLIENT, NODE),
            ("pod1", &pod1, "eth0", POD1, GATEWAY1),
            ("pod2", &pod2, "eth0", POD2, GATEWAY2),
            ("net0", &other, "eth0", OTHER, BETWEEN),
        ] {
            node.veth(device, at, peer);
            add(&node, device, ours);
            add(at, peer, theirs);
        }
        default_route(&client, NODE);
        default_route(&pod1, GATEWAY1);
        default_route(&pod2, GATEWAY2);
        for (family, pods, pod, between, back) in [
            ("-4", "10.244.0.0/16", REMOTE[0], BETWEEN[0], OTHER[0]),
            ("-6", "fd00:244::/32", REMOTE[1], BETWEEN[1], OTHER[1]),
        ] {
            other.ip(&[family, "route", "add", pods, "via", between]);
            other.ip(&[family, "addr", "add", pod, "dev", "lo"]);
            node.ip(&[family, "route", "add", pod, "via", back]);
        }
        for knob in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{knob}"), "1").unwrap_or_else(|e| panic!("{knob}: {e}"));
        }
        for (netns, addresses) in [(&pod1, POD1), (&pod2, POD2), (&other, REMOTE)] {
            netns.run(|| {
                for addr in addresses {
                    tcp_server(at(addr, NAMES));
                    udp_server(at(addr, NAMES));
                    echo_server(at(addr, ECHO));
                }
            });
        }
        let ranges = ["10.244.0.0/16", "fd00:244::/32"].map(|range| range.parse().expect("a range"));
        let config = DataplaneConfig {
            mode: Some(Mode::Ipvs),
            node_name: "node-1".to_owned(),
            pod_cidrs: ranges.to_vec(),
            pin_dir: std::env::temp_dir().join(sheave_harness::unique("sheave-ipvs")),
            ..DataplaneConfig::default()
        };
        Self { client, pod1, _others: [pod2, other], config }
    }

    /// A data plane with everything in `events` applied.
    pub(crate) fn driver(&self, events: Vec<Event>) -> Driver {
        let mut driver = Driver::open(&self.config).unwrap_or_else(|e| panic!("open: {}", chain(&e)));
        driver.handle(synced(events));
        driver.step().unwrap_or_else(|e| panic!("step: {}", chain(&e)));
        driver
    }

    /// Takes the data plane off and proves that nothing of it is left.
    pub(crate) fn uninstall(&self) {
        let errors = remove(Mode::Ipvs, &self.config);
        assert!(errors.is_empty(), "{errors:?}");
        let netns = NetNs::open("/proc/self/ns/net").expect("our own namespace");
        assert!(!netns.ip(&["link"]).contains("sheave"), "the device is gone");
        let rules = netns.command("nft").args(["list", "tables"]).output().expect("run nft");
        let rules = String::from_utf8_lossy(&rules.stdout).into_owned();
        assert!(!rules.contains("sheave"), "the rules are gone: {rules}");
        let again = remove(Mode::Ipvs, &self.config);
        assert!(again.is_empty(), "what is not there is fine: {again:?}");
    }
}

/// More events for a driver that runs.
pub(crate) fn tell(driver: &mut Driver, events: Vec<Event>) {
    driver.handle(events);
    driver.step().unwrap_or_else(|e| panic!("step: {}", chain(&e)));
}

/// A service with port 80 on these cluster IPs; `node_port` 0 for none.
pub(crate) fn plain(name: &str, ips: &[&str], proto: Proto, node_port: u16) -> Service {
    Service {
        key: format!("default/{name}").into(),
        cluster_ips: ips.iter().map(|ip| address(ip)).collect(),
        ports: [ServicePort { name: "".into(), port: 80, node_port, proto }].into(),
        ..Service::default()
    }
}

/// A service with `extras`.
pub(crate) fn with(mut service: Service, extras: ServiceExtras) -> Service {
    service.extras = Some(Box::new(extras));
    service
}

/// Its endpoints in one family: address, whether on this node, whether ready.
pub(crate) fn endpoints(name: &str, proto: Proto, port: u16, all: &[(&str, bool, bool)]) -> Event {
    let v6 = all.iter().any(|(addr, ..)| addr.contains(':'));
    weighted(name, if v6 { "v6" } else { "v4" }, proto, port, 1, all)
}

/// A slice with a weight.
pub(crate) fn weighted(
    name: &str,
    slice: &str,
    proto: Proto,
    port: u16,
    weight: u8,
    all: &[(&str, bool, bool)],
) -> Event {
    let endpoint = |(addr, on_this_node, ready): &(&str, bool, bool)| Endpoint {
        addr: address(addr),
        on_this_node: *on_this_node,
        readiness: if *ready { Readiness::Ready } else { Readiness::Terminating },
        hint: Hint::None,
    };
    Event::Slice(Slice {
        key: format!("default/{name}-{slice}").into(),
        service: format!("default/{name}").into(),
        ports: [SlicePort { name: "".into(), port, proto }].into(),
        endpoints: all.iter().map(endpoint).collect(),
        weight,
        problems: Box::default(),
    })
}

/// Serves TCP: repeats what it hears, with its own address before it.
fn echo_server(listen: SocketAddr) {
    let listener = TcpListener::bind(listen).unwrap_or_else(|e| panic!("listen on {listen}: {e}"));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut byte = [0];
                while stream.read(&mut byte).is_ok_and(|read| read == 1) {
                    // A client that has gone already is the test's affair.
                    drop(stream.write_all(format!("{}\n", listen.ip()).as_bytes()));
                }
            });
        }
    });
}

/// A connection to an echo server.
pub(crate) struct Talk(TcpStream);

impl Talk {
    pub(crate) fn begin(to: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(10));
        let stream = stream.unwrap_or_else(|e| panic!("connect to {to}: {e}"));
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("set a timeout");
        Self(stream)
    }

    /// Ends it at once, without waiting for the other side: the kernel forgets such a connection in seconds.
    pub(crate) fn reset(self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        nix::sys::socket::setsockopt(&self.0, nix::sys::socket::sockopt::Linger, &linger)
            .expect("set linger");
    }

    /// Says something on a connection of its own, which the kernel soon forgets, and returns who answered.
    pub(crate) fn once(to: SocketAddr) -> IpAddr {
        let mut talk = Self::begin(to);
        let server = talk.with();
        talk.reset();
        server
    }

    /// Says something and returns who answers.
    pub(crate) fn with(&mut self) -> IpAddr {
        self.0.write_all(b"?").expect("say something");
        let (mut text, mut byte) = (String::new(), [0]);
        while byte != *b"\n" {
            self.0.read_exact(&mut byte).expect("hear an answer");
            text.push(byte[0].into());
        }
        address(text.trim())
    }
}

/// The kernel's table as `/proc/net/ip_vs` shows it: services, and their destinations' weights. Marks are not named.
pub(crate) fn table() -> BTreeMap<String, Vec<(String, u32)>> {
    let text = fs::read_to_string("/proc/net/ip_vs").expect("read the table");
    let mut table: BTreeMap<String, Vec<(String, u32)>> = BTreeMap::new();
    let mut last = None;
    for line in text.lines().skip(3) {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("->") => {
                let (at, weight) = (words.next().expect("an address"), words.nth(1).expect("a weight"));
                let held: &String = last.as_ref().expect("a service comes first");
                let weight = weight.parse().expect("a number");
                table.get_mut(held).expect("it is there").push((destination(at), weight));
            }
            Some(proto) => {
                let key = if proto == "FWM" {
                    format!("FWM {}", words.skip(1).collect::<Vec<_>>().join(" "))
                } else {
                    let at = destination(words.next().expect("an address"));
                    format!("{proto} {at} {}", words.collect::<Vec<_>>().join(" "))
                };
                table.insert(key.clone(), Vec::new());
                last = Some(key);
            }
            None => {}
        }
    }
    table.values_mut().for_each(|all| all.sort());
    table
}

/// Addresses and ports are in hexadecimal for IPv4, in brackets for IPv6.
fn destination(text: &str) -> String {
    let Some((addr, port)) = text.rsplit_once(':') else { return text.to_owned() };
    let port = u16::from_str_radix(port, 16).expect("a port");
    match u32::from_str_radix(addr, 16) {
        Ok(bits) => format!("{}:{port}", IpAddr::from(bits.to_be_bytes())),
        Err(_) => {
            let addr: std::net::Ipv6Addr = addr.trim_matches(['[', ']']).parse().expect("an address");
            format!("[{addr}]:{port}")
        }
    }
}
