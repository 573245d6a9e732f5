//! Host ports: who comes by a port of the node reaches the pod, wherever he comes from, and only while the pod has it.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use sheave_agent::network::{Attachment, Bandwidth, Network, NetworkError, PortMapping, Protocol};
use sheave_harness::netns::checked;
use sheave_harness::{NetNs, http, node, require_root, wait_for};

use crate::network_pods::{Node, pod};
use crate::pod_bed;

/// Far more than a connect takes here; of a port that leads nowhere a refusal comes at once.
const PATIENCE: Duration = Duration::from_secs(5);
const BOTH: [&str; 2] = ["10.244.7.0/24", "fd00:244:7::/64"];

/// A node with an outside that has a route back to nothing but the node: what reaches it comes from the node.
struct Bed {
    node: Node,
    network: Network,
}

struct Pod {
    uid: &'static str,
    netns: NetNs,
    attachment: Attachment,
}

impl Bed {
    fn new() -> Self {
        let node = Node::new();
        node.outside.ip(&["addr", "add", "192.0.2.2/24", "dev", "peer0"]);
        node.outside.ip(&["addr", "add", "2001:db8::2/64", "dev", "peer0", "nodad"]);
        let network = node.open(&BOTH);
        Bed { node, network }
    }

    fn pod(&self, uid: &'static str) -> Pod {
        let (netns, path) = pod();
        let attachment = self.node.block_on(self.network.attach(uid, &path)).expect("attach");
        Pod { uid, netns, attachment }
    }

    fn set(&self, pod: &Pod, mappings: &[PortMapping]) -> Result<(), NetworkError> {
        self.node.block_on(self.network.set_ports(pod.uid, mappings))
    }

    fn tables(&self) -> String {
        checked(self.node.netns.command("nft").args(["list", "tables"]))
    }

    fn table(&self) -> String {
        checked(self.node.netns.command("nft").args(["list", "table", "inet", "sheave-net"]))
    }
}

fn mapping(host_port: u16, container_port: u16, protocol: Protocol, host_ip: Option<&str>) -> PortMapping {
    let host_ip = host_ip.map(|ip| ip.parse().expect("an address"));
    PortMapping { host_port, container_port, protocol, host_ip }
}

/// A server of a pod: says its name to whoever connects, and tells whom it saw.
struct Server {
    tcp: TcpListener,
    udp: UdpSocket,
}

impl Server {
    fn new(netns: &NetNs, ip: IpAddr, port: u16) -> Self {
        let (tcp, udp) = netns.run(|| (TcpListener::bind((ip, port)), UdpSocket::bind((ip, port))));
        let (tcp, udp) = (tcp.expect("listen"), udp.expect("bind"));
        udp.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        Server { tcp, udp }
    }

    /// Who the server sees when somebody in `from` comes to `at` over TCP.
    #[track_caller]
    fn tcp_from(&self, from: &NetNs, at: SocketAddr) -> IpAddr {
        let mut out = from
            .run(|| TcpStream::connect_timeout(&at, PATIENCE))
            .unwrap_or_else(|e| panic!("connect to {at}: {e}"));
        let (mut back, peer) = self.tcp.accept().expect("accept");
        back.write_all(b"hello").expect("send");
        out.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        let mut said = [0; 5];
        out.read_exact(&mut said).expect("receive");
        assert_eq!(&said, b"hello");
        assert_eq!(out.peer_addr().expect("a peer"), at);
        peer.ip()
    }

    /// The same over UDP; the answer must come from where the question went.
    #[track_caller]
    fn udp_from(&self, from: &NetNs, at: SocketAddr) -> IpAddr {
        let client = client(from, at);
        let seen = self.hears(&client).unwrap_or_else(|| panic!("nothing came by {at}"));
        let mut said = [0; 5];
        client.recv(&mut said).unwrap_or_else(|e| panic!("an answer from {at}: {e}"));
        assert_eq!(&said, b"reply");
        seen.ip()
    }

    /// Sends one datagram by `client`, and answers where it arrives here.
    fn hears(&self, client: &UdpSocket) -> Option<SocketAddr> {
        client.send(b"ask").expect("send");
        let mut said = [0; 3];
        let (_, peer) = self.udp.recv_from(&mut said).ok()?;
        self.udp.send_to(b"reply", peer).expect("answer");
        Some(peer)
    }
}

fn client(from: &NetNs, at: SocketAddr) -> UdpSocket {
    let any: SocketAddr = if at.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
    let client = from.run(|| UdpSocket::bind(any)).expect("bind");
    client.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    from.run(|| client.connect(at)).expect("connect");
    client
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address with a port")
}

fn refused(from: &NetNs, at: SocketAddr) -> bool {
    let tried = from.run(|| TcpStream::connect_timeout(&at, PATIENCE));
    tried.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

#[test]
fn a_host_port_is_reached_from_everywhere() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let both = |protocol| mapping(8080, 80, protocol, None);
    bed.set(
        &a,
        &[
            both(Protocol::Tcp),
            both(Protocol::Udp),
            both(Protocol::Sctp),
            mapping(0, 81, Protocol::Tcp, None),
        ],
    )
    .expect("set the host ports");
    let (node, outside) = (&bed.node.netns, &bed.node.outside);
    for (family, node_ip, outside_ip) in [(0, "192.0.2.1", "192.0.2.2"), (1, "2001:db8::1", "2001:db8::2")] {
        let server = Server::new(&a.netns, a.attachment.ips[family], 80);
        let node_ip: IpAddr = node_ip.parse().expect("an address");
        let at = SocketAddr::new(node_ip, 8080);
        let outside_ip: IpAddr = outside_ip.parse().expect("an address");
        let from_pod = b.attachment.ips[family];
        for (who, from, seen) in [
            ("outside", outside, Some(outside_ip)),
            ("node", node, Some(node_ip)),
            ("pod", &b.netns, Some(from_pod)),
            ("hairpin", &a.netns, None),
        ] {
            let (tcp, udp) = (server.tcp_from(from, at), server.udp_from(from, at));
            assert_eq!(tcp, udp, "{who}");
            assert!(seen.is_none_or(|seen| seen == tcp), "{who}: seen as {tcp}");
            assert_ne!(
                (who, tcp),
                ("hairpin", a.attachment.ips[family]),
                "its own address is answered past the node"
            );
        }
        if family == 0 {
            let seen = server.tcp_from(node, address("127.0.0.1:8080"));
            assert_eq!(seen, node_ip, "127.0.0.1 is nobody to a pod");
            assert_eq!(server.udp_from(node, address("127.0.0.1:8080")), node_ip);
        }
        assert!(refused(node, SocketAddr::new(node_ip, 81)), "hostPort 0 is none");
        assert!(refused(node, address("[::1]:8080")), "::1 leads nowhere, and says so");
    }
    let table = bed.table();
    assert!(table.contains("comment \"a\"") && table.contains("sctp"), "{table}");
    bed.node.block_on(bed.network.detach("a")).expect("detach");
    assert!(!bed.tables().contains("sheave-net"), "where nothing is wanted there is no table");
    assert!(refused(outside, address("192.0.2.1:8080")));
}

#[test]
fn a_pod_does_not_reach_the_nodes_loopback() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let a = bed.pod("a");
    bed.set(&a, &[mapping(8080, 80, Protocol::Tcp, None)]).expect("set the host ports");
    let knob = format!("cat /proc/sys/net/ipv4/conf/{}/route_localnet", a.attachment.host_link);
    assert_eq!(checked(bed.node.netns.command("sh").args(["-c", &knob])).trim(), "1");
    // Such a packet takes a pod that may change its routes, and a link that lets loopback addresses through.
    let server = bed.node.netns.run(|| UdpSocket::bind("127.0.0.1:7777")).expect("bind");
    let direct = bed.node.netns.run(|| UdpSocket::bind("192.0.2.1:7777")).expect("bind");
    let shell = |line: &str| checked(a.netns.command("sh").args(["-c", line]));
    shell("echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet");
    a.netns.ip(&["addr", "del", "127.0.0.1/8", "dev", "lo"]);
    a.netns.ip(&["route", "replace", "127.0.0.1/32", "via", "169.254.1.1", "dev", "eth0", "onlink"]);
    let forged = a.netns.run(|| UdpSocket::bind((a.attachment.ips[0], 0))).expect("bind");
    direct.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    server.set_nonblocking(true).expect("set non-blocking");
    let mut said = [0; 1];
    let mut reaches = || {
        forged.send_to(b"x", "127.0.0.1:7777").expect("send");
        forged.send_to(b"y", "192.0.2.1:7777").expect("send");
        // Both took the same way, in order.
        direct.recv_from(&mut said).expect("what is sent to the node's address arrives");
        server.recv_from(&mut said).is_ok()
    };
    assert!(!reaches(), "a pod reached the node's loopback address");
    checked(bed.node.netns.command("nft").args(["flush", "chain", "inet", "sheave-net", "guard"]));
    assert!(reaches(), "without the guard it would");
}

#[test]
fn a_host_port_of_one_address_leaves_the_others_alone() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    bed.node.netns.ip(&["addr", "add", "192.0.2.9/24", "dev", "up0"]);
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    bed.set(&a, &[mapping(8080, 80, Protocol::Tcp, Some("192.0.2.1"))]).expect("set a's");
    bed.set(&b, &[mapping(8080, 80, Protocol::Tcp, Some("192.0.2.9"))]).expect("set b's");
    let (first, second) =
        (Server::new(&a.netns, a.attachment.ips[0], 80), Server::new(&b.netns, b.attachment.ips[0], 80));
    first.tcp_from(&bed.node.outside, address("192.0.2.1:8080"));
    second.tcp_from(&bed.node.outside, address("192.0.2.9:8080"));
    first.tcp_from(&b.netns, address("192.0.2.1:8080"));
    assert!(refused(&bed.node.netns, address("127.0.0.1:8080")));
    let c = bed.pod("c");
    let error = bed.set(&c, &[mapping(8080, 80, Protocol::Tcp, None)]).expect_err("taken").to_string();
    assert!(error.contains("8080/tcp") && error.contains("192.0.2.1") && error.contains("by a"), "{error}");
    // One that goes takes only what is its own, whatever it asked for.
    bed.node.block_on(bed.network.detach("c")).expect("detach");
    bed.node.block_on(bed.network.detach("a")).expect("detach");
    second.tcp_from(&bed.node.outside, address("192.0.2.9:8080"));
    assert!(refused(&bed.node.outside, address("192.0.2.1:8080")));
}

#[test]
fn a_client_that_goes_on_over_udp_follows_the_port() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let at = address("192.0.2.1:5353");
    let ports = [mapping(5353, 53, Protocol::Udp, None)];
    let client = client(&bed.node.outside, at);
    // A flow that began before the port led anywhere, so that only its end lets the next datagram through.
    client.send(b"ask").expect("send");
    let mut said = [0; 8];
    let _refused = client.recv(&mut said);
    bed.set(&a, &ports).expect("set a's");
    let first = Server::new(&a.netns, a.attachment.ips[0], 53);
    assert!(first.hears(&client).is_some(), "a flow that began before");
    bed.node.block_on(bed.network.detach("a")).expect("detach a");
    bed.set(&b, &ports).expect("set b's");
    let second = Server::new(&b.netns, b.attachment.ips[0], 53);
    assert!(second.hears(&client).is_some(), "the same flow goes to the next pod");
    drop(first);
}

#[test]
fn what_somebody_flushed_is_put_back() {
    if !require_root() {
        return;
    }
    let bed = Bed::new();
    let a = bed.pod("a");
    bed.set(&a, &[mapping(8080, 80, Protocol::Tcp, None)]).expect("set the host ports");
    let server = Server::new(&a.netns, a.attachment.ips[0], 80);
    let at = address("192.0.2.1:8080");
    let whole = bed.table();
    let live = ["a".to_owned()];
    let damage = [
        "flush ruleset",
        "delete element inet sheave-net anyports4 { tcp . 8080 }",
        "flush chain inet sheave-net translate4",
        "add element inet sheave-net anyports4 { tcp . 9090 : 192.0.2.77 . 1 }",
    ];
    for command in damage {
        checked(bed.node.netns.command("nft").arg(command));
        let report = bed.node.block_on(bed.network.reconcile(&live)).expect("reconcile");
        assert_eq!(report.repaired.len(), 1, "{command}: {report:?}");
        assert_eq!(bed.table(), whole, "{command}");
        server.tcp_from(&bed.node.outside, at);
        let report = bed.node.block_on(bed.network.reconcile(&live)).expect("reconcile");
        assert!(report.is_clean(), "{command}: {report:?}");
    }
    // A change that meets a damaged table is no failure.
    checked(bed.node.netns.command("nft").args(["flush", "ruleset"]));
    bed.set(&a, &[mapping(8081, 80, Protocol::Tcp, None)]).expect("set other host ports");
    wait_for("the other port", || if bed.table().contains("8081") { Ok(()) } else { Err(bed.table()) });
    server.tcp_from(&bed.node.outside, address("192.0.2.1:8081"));
    assert!(refused(&bed.node.outside, at));
}

/// How long it takes to send so many bytes from one namespace to the other.
fn transfer(from: &NetNs, to: &NetNs, ip: IpAddr, bytes: usize) -> Duration {
    let listener = to.run(|| TcpListener::bind((ip, 0))).expect("listen");
    let at = listener.local_addr().expect("an address");
    let mut out = from.run(|| TcpStream::connect_timeout(&at, PATIENCE)).expect("connect");
    let (mut back, _) = listener.accept().expect("accept");
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || out.write_all(&vec![7; bytes]).expect("send"));
        let mut all = Vec::with_capacity(bytes);
        back.read_to_end(&mut all).expect("receive");
        assert_eq!(all.len(), bytes);
    });
    start.elapsed()
}

#[test]
fn a_limited_pod_is_as_slow_as_its_bucket() {
    if !require_root() {
        return;
    }
    const BYTES: usize = 1_500_000;
    let bed = Bed::new();
    let (a, b) = (bed.pod("a"), bed.pod("b"));
    let (a_ip, b_ip) = (a.attachment.ips[0], b.attachment.ips[0]);
    let limit = |limits: Bandwidth| bed.node.block_on(bed.network.set_bandwidth("a", &limits));
    let (into, out) = (20_000_000, 24_000_000);
    let limits = Bandwidth {
        ingress_bps: into,
        ingress_burst_bits: 800_000,
        egress_bps: out,
        egress_burst_bits: 800_000,
    };
    let ways = [(&b.netns, &a.netns, a_ip, into), (&a.netns, &b.netns, b_ip, out)];
    let free = ways.map(|(from, to, ip, _)| transfer(from, to, ip, BYTES));
    limit(limits).expect("limit");
    for ((from, to, ip, bps), free) in ways.into_iter().zip(free) {
        // All but a burst has to wait for its turn, however fast or slow the machine is.
        let least = Duration::from_secs_f64((BYTES * 8 - 800_000) as f64 / bps as f64);
        let took = transfer(from, to, ip, BYTES);
        assert!(took >= least, "{took:?} for what takes {least:?} at {bps} bit/s");
        eprintln!("{bps} bit/s: at least {least:?}, took {took:?}, without a limit {free:?}");
    }
    let shown = bed.node.netns.command("tc").args(["qdisc", "show", "dev", &a.attachment.host_link]).output();
    let shown = String::from_utf8_lossy(&shown.expect("tc").stdout).into_owned();
    assert!(shown.contains("tbf") && shown.contains("rate 20Mbit"), "{shown}");
    // As much as runtimes ask for where only a rate is given.
    let most = Bandwidth { ingress_burst_bits: u64::from(u32::MAX), ..limits };
    limit(most).expect("a large burst");
    let error = limit(Bandwidth { ingress_burst_bits: 0, ..limits }).expect_err("no burst").to_string();
    assert!(error.contains("a: bandwidth: ingress rate 20000000"), "{error}");
    limit(Bandwidth::default()).expect("lift the limits");
    let shown = bed.node.netns.command("tc").args(["qdisc", "show", "dev", &a.attachment.host_link]).output();
    assert!(!String::from_utf8_lossy(&shown.expect("tc").stdout).contains("tbf"));
}

const WEB: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: localhost/echo:1
    ports: [{containerPort: 8080, hostPort: 8888}]
"#;

/// The whole agent, whose own balancing is attached to the same uplink.
#[test]
fn a_pods_host_ports_come_and_go_with_it() {
    if !require_root() {
        return;
    }
    // Without host ports the table is to be gone, and masquerading would keep it.
    let mut bed = pod_bed::Bed::new(&["--masquerade", "false"]);
    bed.apply(WEB);
    bed.wait_ready("web");
    let at =
        [node::NODE_IP4, node::NODE_IP6].map(|ip| SocketAddr::new(ip.parse().expect("an address"), 8888));
    let all = |bed: &pod_bed::Bed| {
        for at in at {
            for from in [&bed.node.outside, &bed.node.netns] {
                let (status, body) = http::get_in(from, at, "/").unwrap_or_else(|e| panic!("{at}: {e}"));
                assert_eq!((status, body.contains("web")), (200, true), "{at}: {body}");
            }
        }
    };
    all(&bed);
    // Past the scheduler, which would not choose a node whose port is taken.
    bed.apply(&WEB.replace("name: web", "name: second").replace("spec:", "spec:\n  nodeName: node-1"));
    let second = |bed: &pod_bed::Bed| bed.node.kubectl(&["describe", "pod", "second"]);
    wait_for("the second pod to be told", || {
        let told = second(&bed);
        if told.contains("8888/tcp is taken") { Ok(()) } else { Err(told) }
    });
    bed.node.kill9();
    all(&bed);
    bed.node.restart();
    bed.node.wait_ready();
    all(&bed);
    // Whoever waits for the port gets it.
    bed.node.kubectl(&["delete", "pod", "web"]);
    bed.wait_ready("second");
    bed.node.kubectl(&["delete", "pod", "second"]);
    let tables = checked(bed.node.netns.command("nft").args(["list", "tables"]));
    assert!(!tables.contains("sheave-net"), "{tables}");
}
