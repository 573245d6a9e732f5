//! Direct return over two nodes: a client asks the one, a pod of the other answers it past the first. The client has a
//! link to each node, so that what comes back by which way can be counted.
//!
//! ```text
//!   client eth0 ── up0 node1 lan0 ── lan0 node2 pod0 ── eth0 pod
//!          eth1 ──────────────────── up0 node2
//! ```

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn};
use sheave_agent::dataplane::Driver;
use sheave_agent::service::{Event, Proto, ServiceExtras};
use sheave_harness::{NetNs, isolated};

use crate::service_packet::echo;
use crate::service_world::{
    World, address, ask, ask_udp, at, service, slice, tcp_server, udp_client, udp_server,
};

/// Addresses by family: IPv4 first.
type Pair = [&'static str; 2];
const CLIENT: Pair = ["198.51.100.2", "2001:db8:ffff::2"];
const NODE1: Pair = ["198.51.100.1", "2001:db8:ffff::1"];
const CLIENT_BEHIND: Pair = ["192.0.2.2", "2001:db8:eeee::2"];
const NODE2: Pair = ["192.0.2.1", "2001:db8:eeee::1"];
const LAN1: Pair = ["10.0.9.1", "fd00:9::1"];
const LAN2: Pair = ["10.0.9.2", "fd00:9::2"];
/// The nodes on an overlay.
const OVER1: Pair = ["10.0.99.1", "fd00:99::1"];
const OVER2: Pair = ["10.0.99.2", "fd00:99::2"];
const GATE: Pair = ["169.254.77.1", "fd00:77::1"];
const POD: Pair = ["10.244.2.5", "fd00:244:2::5"];
const BALANCER: Pair = ["203.0.113.10", "2001:db8:77::10"];
const PORT: u16 = 30_080;
const ECHO_PORT: u16 = 30_090;
const PATIENCE: Duration = Duration::from_secs(20);

struct Nodes {
    client: NetNs,
    pod: NetNs,
    node1: Node,
    node2: Node,
}

struct Node {
    netns: NetNs,
    world: World,
    served: PathBuf,
    driver: Option<Driver>,
}

impl Node {
    fn new(cgroup: &Path, name: &str, addresses: [Pair; 2], uplinks: &[&str]) -> Self {
        let served = cgroup.join(name);
        fs::create_dir(&served).expect("a cgroup that nobody is in");
        let mut world = World::new(&served, uplinks);
        world.config.node_name = name.to_owned();
        world.config.node_ips = addresses.iter().flatten().map(|ip| address(ip)).collect();
        world.config.pod_links = vec!["pod".to_owned()];
        Self { netns: NetNs::new(), world, served, driver: None }
    }

    /// An agent starts, with the same services or others.
    fn start(&mut self, here: bool, dsr: bool) {
        let _inside = self.netns.enter();
        self.driver = None;
        self.driver = Some(self.world.driver(services(here, dsr)));
    }

    /// The services change under the agent.
    fn change(&mut self, here: bool, dsr: bool) {
        let _inside = self.netns.enter();
        let driver = self.driver.as_mut().expect("an agent that runs");
        driver.handle(services(here, dsr));
        driver.step().expect("apply");
    }

    /// Bytes that left by a device.
    fn sent(&self, device: &str) -> u64 {
        let text = self.netns.run(|| fs::read_to_string("/proc/thread-self/net/dev")).expect("its devices");
        let line = text.lines().find_map(|line| line.trim().strip_prefix(&format!("{device}:")));
        let field = line.and_then(|line| line.split_whitespace().nth(8)).expect("a number of bytes");
        field.parse().expect("a number")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.driver.take());
        if let Err(error) = fs::remove_dir(&self.served) {
            eprintln!("{}: {error}", self.served.display());
        }
    }
}

/// What the agent of the pod's node (`here`) or of the other one hears.
fn services(here: bool, dsr: bool) -> Vec<Event> {
    let mut events = Vec::new();
    for (name, proto, n, port, pod_port) in [
        ("web", Proto::Tcp, 1, PORT, 8080),
        ("dns", Proto::Udp, 2, PORT, 8080),
        ("echo", Proto::Tcp, 3, ECHO_PORT, 9090),
    ] {
        let ips = [format!("10.96.0.{n}"), format!("fd00:96::{n}")];
        let mut event = service(name, &[&ips[0], &ips[1]], proto, port);
        if let Event::Service(service) = &mut event {
            let ingress_ips = if name == "echo" { Box::default() } else { BALANCER.map(address).into() };
            service.extras = Some(Box::new(ServiceExtras { ingress_ips, dsr, ..ServiceExtras::default() }));
        }
        events.push(event);
        for ip in POD {
            let mut event = slice(name, proto, &[at(ip, pod_port)]);
            if let Event::Slice(slice) = &mut event {
                slice.endpoints.iter_mut().for_each(|endpoint| endpoint.on_this_node = here);
            }
            events.push(event);
        }
    }
    events
}

fn add(netns: &NetNs, device: &str, addresses: Pair) {
    netns.ip(&["addr", "add", &format!("{}/24", addresses[0]), "dev", device]);
    netns.ip(&["addr", "add", &format!("{}/64", addresses[1]), "dev", device, "nodad"]);
}

fn set(netns: &NetNs, knobs: &[(&str, &str)]) {
    netns.run(|| {
        for (knob, value) in knobs {
            fs::write(format!("/proc/sys/net/{knob}"), value).unwrap_or_else(|e| panic!("{knob}: {e}"));
        }
    });
}

impl Nodes {
    fn new(cgroup: &Path) -> Self {
        Self::over(cgroup, LAN1, LAN2)
    }

    /// The way to the pod leads over these addresses of the nodes.
    fn over(cgroup: &Path, near: Pair, far: Pair) -> Self {
        let (client, pod) = (NetNs::new(), NetNs::new());
        let uplinks: &[&str] = if near == LAN1 { &["up0", "lan0"] } else { &["up0", "lan0", "vx0"] };
        let mut node1 = Node::new(cgroup, "node-1", [NODE1, LAN1], uplinks);
        let mut node2 = Node::new(cgroup, "node-2", [NODE2, LAN2], uplinks);
        let (first, second) = (&node1.netns, &node2.netns);
        first.veth("up0", &client, "eth0");
        second.veth("up0", &client, "eth1");
        first.veth("lan0", second, "lan0");
        second.veth("pod0", &pod, "eth0");
        for (netns, device, addresses) in [
            (first, "up0", NODE1),
            (&client, "eth0", CLIENT),
            (second, "up0", NODE2),
            (&client, "eth1", CLIENT_BEHIND),
            (first, "lan0", LAN1),
            (second, "lan0", LAN2),
        ] {
            add(netns, device, addresses);
        }
        // What came one way is answered another way here, as between real nodes of one network.
        let loose = [("ipv4/conf/all/rp_filter", "0"), ("ipv4/conf/default/rp_filter", "0")];
        for netns in [first, second, &client, &pod] {
            set(netns, &loose);
        }
        for (netns, devices) in [(second, &["lan0", "up0", "pod0"][..]), (&client, &["eth0", "eth1"])] {
            for device in devices {
                set(netns, &[(&format!("ipv4/conf/{device}/rp_filter"), "0")]);
            }
        }
        if near != LAN1 {
            for (netns, from, to, own) in [(first, LAN1, LAN2, near), (second, LAN2, LAN1, far)] {
                let ends = ["local", from[0], "remote", to[0], "dstport", "4789", "dev", "lan0"];
                netns.ip(&[&["link", "add", "vx0", "type", "vxlan", "id", "7"][..], &ends].concat());
                netns.ip(&["link", "set", "vx0", "up"]);
                add(netns, "vx0", own);
            }
        }
        for netns in [first, second] {
            set(netns, &[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")]);
        }
        for n in 0..2 {
            let (family, len) = if n == 0 { ("-4", 32) } else { ("-6", 128) };
            let nodad: &[&str] = if n == 0 { &[] } else { &["nodad"] };
            let own = |ip: &str, device| [format!("{ip}/{len}"), "dev".to_owned(), device];
            for (netns, ip, device) in [(second, GATE[n], "pod0"), (&pod, POD[n], "eth0")] {
                let own = own(ip, device.to_owned());
                let args: Vec<&str> =
                    ["addr", "add"].into_iter().chain(own.iter().map(String::as_str)).collect();
                netns.ip(&[&args[..], nodad].concat());
            }
            second.ip(&[family, "route", "add", POD[n], "dev", "pod0"]);
            pod.ip(&[family, "route", "add", GATE[n], "dev", "eth0"]);
            pod.ip(&[family, "route", "add", "default", "via", GATE[n]]);
            first.ip(&[family, "route", "add", POD[n], "via", far[n]]);
            second.ip(&[family, "route", "add", CLIENT[n], "via", CLIENT_BEHIND[n]]);
            second.ip(&[family, "route", "add", NODE1[n], "via", near[n]]);
            client.ip(&[family, "route", "add", BALANCER[n], "via", NODE1[n]]);
        }
        pod.run(|| {
            for ip in POD {
                tcp_server(at(ip, 8080));
                udp_server(at(ip, 8080));
                echo(at(ip, 9090));
            }
        });
        node1.start(false, true);
        node2.start(true, true);
        Self { client, pod, node1, node2 }
    }

    fn connect(&self, to: SocketAddr) -> TcpStream {
        let stream = self.client.run(|| TcpStream::connect_timeout(&to, PATIENCE)).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        stream
    }

    /// Every kind of question; gives whom the pod saw.
    fn ask(&self, n: usize, to: SocketAddr) -> String {
        let (server, peer) = self.client.run(|| ask(to)).unwrap_or_else(|e| panic!("{to}: {e}"));
        assert_eq!(server, POD[n]);
        assert_eq!(self.client.run(|| ask_udp(&udp_client(to), to)), POD[n]);
        peer
    }

    fn no_trouble(&self) {
        for (name, world) in [("node-1", &self.node1.world), ("node-2", &self.node2.world)] {
            for reason in [
                "rewrite_failed",
                "answer_failed",
                "program_missing",
                "flow_full",
                "no_route",
                "tunnel_refused",
                "stale_slot",
            ] {
                assert_eq!(world.counted(reason), 0, "{reason} at {name}");
            }
        }
    }
}

/// Says something on a connection and hears it back.
fn speak(stream: &mut TcpStream, text: &[u8]) {
    stream.write_all(text).expect("speak");
    let mut heard = vec![0; text.len()];
    stream.read_exact(&mut heard).expect("hear");
    assert!(heard == text);
}

/// Sends a lot and hears it back, byte for byte.
fn bulk(mut stream: TcpStream) {
    let sent: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    let mut back = stream.try_clone().expect("the same connection");
    let wanted = sent.clone();
    let reader = std::thread::spawn(move || {
        let mut heard = Vec::new();
        back.read_to_end(&mut heard).expect("hear");
        assert!(heard == wanted, "{} bytes of {} came back right", heard.len(), wanted.len());
    });
    stream.write_all(&sent).expect("send");
    stream.shutdown(Shutdown::Write).expect("say that this is all");
    reader.join().expect("what came back");
}

#[test]
fn service_direct_answers_go_past_the_node_that_was_asked() {
    isolated(module_path!(), "service_direct_answers_go_past_the_node_that_was_asked", |cgroup| {
        let nodes = Nodes::new(cgroup);
        for n in 0..2 {
            for to in [at(NODE1[n], PORT), at(BALANCER[n], 80)] {
                for _ in 0..5 {
                    assert_eq!(nodes.ask(n, to), CLIENT[n], "the pod sees the client's own address");
                }
            }
            // More than fits with the header around it: the client is told, and sends less at a time.
            let (asked, behind) = (nodes.node1.sent("up0"), nodes.node2.sent("up0"));
            bulk(nodes.connect(at(NODE1[n], ECHO_PORT)));
            let (asked, behind) = (nodes.node1.sent("up0") - asked, nodes.node2.sent("up0") - behind);
            assert!(asked < 100_000 && behind > 1_000_000, "{asked} bytes by the one, {behind} by the other");
        }
        let (first, second) = (&nodes.node1.world, &nodes.node2.world);
        assert!(first.counted("tunnel_sent") >= 80 && second.counted("tunnel_received") >= 80);
        assert_eq!((first.counted("replied"), first.counted("forwarded")), (0, 0));
        assert!(second.counted("replied") >= 80);
        assert!(first.counted("packet_too_big") > 0, "nobody was told that a packet is too big");
        nodes.no_trouble();
    });
}

#[test]
fn service_direct_goes_over_an_overlay() {
    isolated(module_path!(), "service_direct_goes_over_an_overlay", |cgroup| {
        let nodes = Nodes::over(cgroup, OVER1, OVER2);
        for n in 0..2 {
            assert_eq!(nodes.ask(n, at(NODE1[n], PORT)), CLIENT[n]);
            bulk(nodes.connect(at(NODE1[n], ECHO_PORT)));
        }
        assert!(nodes.node2.world.counted("tunnel_received") > 0);
        assert_eq!(nodes.node1.world.counted("replied"), 0);
        nodes.no_trouble();
    });
}

#[test]
fn service_direct_connections_outlive_agents_and_the_annotation() {
    isolated(module_path!(), "service_direct_connections_outlive_agents_and_the_annotation", |cgroup| {
        let mut nodes = Nodes::new(cgroup);
        let mut held: Vec<TcpStream> = NODE1.iter().map(|ip| nodes.connect(at(ip, ECHO_PORT))).collect();
        let all = |held: &mut Vec<TcpStream>| held.iter_mut().for_each(|held| speak(held, b"still there"));
        all(&mut held);
        nodes.node1.start(false, true);
        nodes.node2.start(true, true);
        all(&mut held);
        // Masqueraded from now on, but for what goes on.
        nodes.node1.change(false, false);
        nodes.node2.change(true, false);
        for n in 0..2 {
            assert_eq!(nodes.ask(n, at(NODE1[n], PORT)), NODE1[n]);
            assert_eq!(nodes.ask(n, at(BALANCER[n], 80)), NODE1[n]);
        }
        let sent = nodes.node1.world.counted("tunnel_sent");
        all(&mut held);
        assert!(nodes.node1.world.counted("tunnel_sent") > sent);
        assert!(nodes.node1.world.counted("replied") > 0);
        // And direct again.
        nodes.node2.change(true, true);
        nodes.node1.change(false, true);
        for n in 0..2 {
            assert_eq!(nodes.ask(n, at(NODE1[n], PORT)), CLIENT[n]);
        }
        nodes.no_trouble();
    });
}

/// An IPv4 packet of another protocol within IPv4, which says something.
fn foreign(text: &[u8]) -> Vec<u8> {
    let header = |proto: u8, len: usize, src: &str, dst: &str| {
        let mut ip = vec![0x45, 0];
        ip.extend((20 + len as u16).to_be_bytes());
        ip.extend([0, 9, 0, 0, 64, proto, 0, 0]);
        for end in [src, dst] {
            let IpAddr::V4(end) = address(end) else { panic!("an IPv4 address") };
            ip.extend(end.octets());
        }
        ip
    };
    // A UDP header to the very NodePort, but from a node that was not asked.
    let mut udp = [1234, PORT, 8 + text.len() as u16, 0].map(u16::to_be_bytes).concat();
    udp.extend(text);
    let inner = [header(17, udp.len(), CLIENT[0], NODE2[0]), udp].concat();
    [header(4, inner.len(), LAN1[0], POD[0]), inner].concat()
}

#[test]
fn service_direct_leaves_tunnels_of_others_alone() {
    isolated(module_path!(), "service_direct_leaves_tunnels_of_others_alone", |cgroup| {
        let nodes = Nodes::new(cgroup);
        let ear = nodes.pod.run(|| {
            let all = SockProtocol::EthAll;
            socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), all).expect("an ear")
        });
        let limit = nix::sys::time::TimeVal::new(PATIENCE.as_secs() as i64, 0);
        socket::setsockopt(&ear, socket::sockopt::ReceiveTimeout, &limit).expect("set a timeout");
        let packet = foreign(b"none of your business");
        nodes.node1.netns.run(|| {
            let raw = SockProtocol::Raw;
            let mouth = socket::socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), raw)
                .expect("a raw socket");
            let to: SockaddrIn = format!("{}:0", POD[0]).parse().expect("an address");
            socket::sendto(mouth.as_raw_fd(), &packet, &to, MsgFlags::empty()).expect("send");
        });
        let mut buffer = [0; 2048];
        loop {
            let len = socket::recv(ear.as_raw_fd(), &mut buffer, MsgFlags::empty()).expect("the packet");
            // One hop of the outer header is all that is missing.
            if len >= 14 + packet.len() && buffer[14 + 20..14 + packet.len()] == packet[20..] {
                assert_eq!(buffer[14 + 8..14 + 10], [63, 4]);
                break;
            }
        }
        assert_eq!(nodes.node2.world.counted("tunnel_received"), 0);
        nodes.no_trouble();
    });
}
