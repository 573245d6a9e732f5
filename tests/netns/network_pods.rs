//! Pods of one node reach each other and the node, over both families and at once; what can't be connected says why.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sheave_agent::network::{Attachment, Network, NetworkConfig, NetworkError, node_addresses};
use sheave_harness::{NetNs, require_root};

/// Patience of one read or connect: far more than any of them takes, far less than a DAD wait would hide in.
const PATIENCE: Duration = Duration::from_millis(900);

/// A node: a namespace with an uplink to nowhere, and a directory for its leases.
pub(crate) struct Node {
    pub(crate) netns: NetNs,
    pub(crate) outside: NetNs,
    pub(crate) dir: tempfile::TempDir,
}

impl Node {
    pub(crate) fn new() -> Self {
        let (netns, outside) = (NetNs::new(), NetNs::new());
        netns.veth("up0", &outside, "peer0");
        netns.ip(&["addr", "add", "192.0.2.1/24", "dev", "up0"]);
        netns.ip(&["addr", "add", "2001:db8::1/64", "dev", "up0", "nodad"]);
        netns.ip(&["route", "add", "default", "via", "192.0.2.2", "dev", "up0"]);
        netns.ip(&["link", "set", "up0", "mtu", "1400"]);
        Node { netns, outside, dir: tempfile::tempdir().expect("a directory for leases") }
    }

    pub(crate) fn config(&self, cidrs: &[&str]) -> NetworkConfig {
        config(self.dir.path(), cidrs)
    }

    /// Runs `work` inside the node, on a runtime of its own.
    pub(crate) fn block_on<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        self.netns.run(|| runtime().block_on(work))
    }

    pub(crate) fn open(&self, cidrs: &[&str]) -> Network {
        self.block_on(Network::open(self.config(cidrs))).expect("open the pod network")
    }

    /// Names of our links in the node's namespace.
    pub(crate) fn links(&self) -> Vec<String> {
        let text = self.netns.ip(&["-o", "link", "show"]);
        let names = text.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next());
        names.filter(|name| name.starts_with("shv")).map(str::to_owned).collect()
    }
}

pub(crate) fn config(dir: &Path, cidrs: &[&str]) -> NetworkConfig {
    NetworkConfig {
        state_dir: dir.to_owned(),
        node_ips: Vec::new(),
        pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().expect("a range")).collect(),
        ..NetworkConfig::default()
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// A pod's namespace as a shim would make it: fresh, with everything down.
pub(crate) fn pod() -> (NetNs, PathBuf) {
    let netns = NetNs::new();
    netns.ip(&["link", "set", "lo", "down"]);
    let path = netns.path();
    (netns, path)
}

/// Connects over TCP and says something over UDP from `from` to an address of `to`, at once; returns the address
/// that `to` saw.
#[track_caller]
pub(crate) fn talk(from: &NetNs, to: &NetNs, ip: IpAddr) -> IpAddr {
    let listener = to.run(|| TcpListener::bind((ip, 0))).unwrap_or_else(|e| panic!("listen on {ip}: {e}"));
    let address = listener.local_addr().expect("the listener's address");
    let mut out = from
        .run(|| TcpStream::connect_timeout(&address, PATIENCE))
        .unwrap_or_else(|e| panic!("connect to {address}: {e}"));
    let (mut back, peer) = listener.accept().expect("accept");
    back.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    out.write_all(b"hello").expect("send");
    let mut said = [0; 5];
    back.read_exact(&mut said).expect("receive");
    assert_eq!(&said, b"hello");
    assert_eq!(datagram(from, to, ip), peer.ip(), "TCP and UDP come from one address");
    peer.ip()
}

#[track_caller]
fn datagram(from: &NetNs, to: &NetNs, ip: IpAddr) -> IpAddr {
    let there = to.run(|| UdpSocket::bind((ip, 0))).expect("bind");
    let any: SocketAddr = if ip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
    let here = from.run(|| UdpSocket::bind(any)).expect("bind");
    there.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    here.send_to(b"hi", there.local_addr().expect("an address")).expect("send");
    let mut said = [0; 2];
    there.recv_from(&mut said).unwrap_or_else(|e| panic!("receive on {ip}: {e}")).1.ip()
}

/// IPv6's gateway is good on the pod's link only.
#[track_caller]
fn ask_link_local_gateway(pod: &NetNs, node: &NetNs) {
    let listener = node.run(|| TcpListener::bind("[::]:0")).expect("listen");
    let port = listener.local_addr().expect("the listener's address").port();
    let line = pod.ip(&["-o", "link", "show", "eth0"]);
    let index = line.split(':').next().and_then(|index| index.parse().ok()).expect("an index");
    let gateway = SocketAddrV6::new("fe80::1".parse().expect("an address"), port, 0, index);
    pod.run(|| TcpStream::connect_timeout(&gateway.into(), PATIENCE)).expect("the gateway answers");
}

const BOTH: [&str; 2] = ["10.244.7.0/24", "fd00:244:7::/64"];

#[test]
fn pods_reach_each_other_and_the_node_at_once() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let network = node.open(&BOTH);
    let ((a, a_path), (b, b_path)) = (pod(), pod());
    let first = node.block_on(network.attach("a", &a_path)).expect("attach a");
    let second = node.block_on(network.attach("b", &b_path)).expect("attach b");
    assert_eq!((first.ips.len(), second.ips.len()), (2, 2));
    assert!(first.ips[0].is_ipv4() && first.ips[1].is_ipv6());
    // Straight after the attachment: an address that is still checked for duplicates could not be bound.
    for (mine, yours) in first.ips.iter().zip(&second.ips) {
        assert_eq!(talk(&a, &b, *yours), *mine);
        assert_eq!(talk(&b, &a, *mine), *yours);
        assert_eq!(talk(&a, &a, *mine), *mine, "a pod reaches itself");
    }
    for (node_ip, ips) in [("192.0.2.1", 0), ("2001:db8::1", 1)] {
        let node_ip: IpAddr = node_ip.parse().expect("an address");
        assert_eq!(talk(&a, &node.netns, node_ip), first.ips[ips]);
        assert_eq!(talk(&node.netns, &a, first.ips[ips]), node_ip, "the node speaks from its own address");
    }
    let lo: IpAddr = "127.0.0.1".parse().expect("an address");
    assert_eq!(talk(&a, &a, lo), lo);
    let gateway: IpAddr = "169.254.1.1".parse().expect("an address");
    assert_eq!(talk(&a, &node.netns, gateway), first.ips[0], "the gateway answers");
    ask_link_local_gateway(&a, &node.netns);
    let mtu = a.ip(&["-o", "link", "show", "eth0"]);
    assert!(mtu.contains("mtu 1400 "), "the uplink's MTU: {mtu}");
}

#[test]
fn the_outside_reaches_pods_through_the_node() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let network = node.open(&BOTH);
    let (a, path) = pod();
    let attachment = node.block_on(network.attach("a", &path)).expect("attach");
    node.outside.ip(&["addr", "add", "192.0.2.2/24", "dev", "peer0"]);
    node.outside.ip(&["addr", "add", "2001:db8::2/64", "dev", "peer0", "nodad"]);
    node.netns.ip(&["-6", "route", "add", "default", "via", "2001:db8::2", "dev", "up0"]);
    node.outside.ip(&["route", "add", "10.244.7.0/24", "via", "192.0.2.1"]);
    node.outside.ip(&["-6", "route", "add", "fd00:244:7::/64", "via", "2001:db8::1"]);
    for (ip, theirs) in attachment.ips.iter().zip(["192.0.2.2", "2001:db8::2"]) {
        let theirs: IpAddr = theirs.parse().expect("an address");
        assert_eq!(talk(&node.outside, &a, *ip), theirs);
        assert_eq!(talk(&a, &node.outside, theirs), *ip);
    }
}

#[test]
fn one_family_is_enough() {
    if !require_root() {
        return;
    }
    for cidr in BOTH {
        let node = Node::new();
        let network = node.open(&[cidr]);
        let ((a, a_path), (b, b_path)) = (pod(), pod());
        let one = node.block_on(network.attach("a", &a_path)).expect("attach a");
        let other = node.block_on(network.attach("b", &b_path)).expect("attach b");
        assert_eq!(one.ips.len(), 1, "{cidr}");
        assert_eq!(talk(&a, &b, other.ips[0]), one.ips[0]);
    }
}

#[test]
fn a_pod_sends_from_its_own_address_only() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let network = node.open(&["10.244.7.0/24"]);
    let (a, path) = pod();
    node.block_on(network.attach("a", &path)).expect("attach");
    a.ip(&["addr", "add", "10.244.7.99/32", "dev", "eth0"]);
    let there = node.netns.run(|| UdpSocket::bind("192.0.2.1:0")).expect("bind");
    let to = there.local_addr().expect("an address");
    let forged = a.run(|| UdpSocket::bind("10.244.7.99:0")).expect("bind the forged address");
    let honest = a.run(|| UdpSocket::bind("0.0.0.0:0")).expect("bind");
    forged.send_to(b"forged", to).expect("send");
    honest.send_to(b"honest", to).expect("send");
    there.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    let mut said = [0; 6];
    // Both took the same way, in order: had the first passed, it would be here first.
    there.recv_from(&mut said).expect("receive");
    assert_eq!(&said, b"honest");
}

#[test]
fn attach_and_detach_may_be_repeated() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let network = node.open(&BOTH);
    let (a, path) = pod();
    let first = node.block_on(network.attach("a", &path)).expect("attach");
    let links = node.netns.ip(&["-o", "link", "show", &first.host_link]);
    let again = node.block_on(network.attach("a", &path)).expect("attach again");
    assert_eq!(first, again);
    assert_eq!(links, node.netns.ip(&["-o", "link", "show", &first.host_link]), "nothing was made anew");
    assert_eq!(talk(&node.netns, &a, first.ips[0]).to_string(), "192.0.2.1");
    node.block_on(network.detach("a")).expect("detach");
    node.block_on(network.detach("a")).expect("detach again");
    node.block_on(network.detach("never-there")).expect("detach what never was");
    assert!(node.links().is_empty(), "{:?}", node.links());
    assert!(!a.ip(&["-o", "link", "show"]).contains("eth0"));
    let other = node.block_on(network.attach("a", &path)).expect("attach after detach");
    assert!(other.ips.iter().all(|ip| !first.ips.contains(ip)), "freed addresses wait");
}

#[test]
fn a_new_namespace_keeps_the_pods_addresses() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let network = node.open(&BOTH);
    let (old, old_path) = pod();
    let first = node.block_on(network.attach("a", &old_path)).expect("attach");
    let (new, new_path) = pod();
    let second = node.block_on(network.attach("a", &new_path)).expect("attach in a new namespace");
    assert_eq!(first, second);
    assert!(!old.ip(&["-o", "link", "show"]).contains("eth0"));
    assert_eq!(talk(&new, &node.netns, "192.0.2.1".parse().expect("an address")), first.ips[0]);
    drop((new, old));
    node.block_on(network.detach("a")).expect("detach with the namespace gone");
    assert!(node.links().is_empty());
}

#[test]
fn what_cannot_be_connected_says_why() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let network = node.open(&["10.244.7.0/30"]);
    let error = |result: Result<Attachment, NetworkError>| result.expect_err("must fail").to_string();
    let gone = error(node.block_on(network.attach("a", Path::new("/proc/self/ns/none"))));
    assert!(gone.contains("pod a") && gone.contains("/proc/self/ns/none"), "{gone}");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let not_one = error(node.block_on(network.attach("a", file.path())));
    assert!(not_one.contains("pod a"), "{not_one}");
    node.block_on(network.detach("a")).expect("detach");
    let bad = error(node.block_on(network.attach("../a", &node.netns.path())));
    assert!(bad.contains("../a"), "{bad}");

    let network = node.open(&["10.244.8.0/30"]);
    let ((a, a_path), (_b, b_path)) = (pod(), pod());
    let attached = node.block_on(network.attach("a", &a_path)).expect("the only address");
    let full = error(node.block_on(network.attach("b", &b_path)));
    assert!(full.contains("10.244.8.0/30 is used up: 1 of its 1 addresses"), "{full}");
    assert!(full.contains("--pod-cidr"), "{full}");
    talk(&node.netns, &a, attached.ips[0]);

    let network = node.open(&["10.244.9.0/24"]);
    let (c, c_path) = pod();
    c.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "other"]);
    let taken = error(node.block_on(network.attach("c", &c_path)));
    assert!(taken.contains("pod c") && taken.contains("eth0"), "{taken}");
    assert!(c.ip(&["-o", "link", "show", "eth0"]).contains("eth0"), "it is still there");
}

#[test]
fn the_node_finds_its_own_addresses() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let found = node.netns.run(|| node_addresses(&[])).expect("addresses");
    assert_eq!(found.uplinks, ["up0"]);
    assert_eq!(found.ips.iter().map(IpAddr::to_string).collect::<Vec<_>>(), ["192.0.2.1", "2001:db8::1"]);
    assert_eq!(found.mtu, 1400);
    // No default route: the only other link has to do.
    node.netns.ip(&["route", "del", "default"]);
    assert_eq!(node.netns.run(|| node_addresses(&[])).expect("addresses"), found);
    // The links of pods are nobody's uplink.
    let network = node.open(&BOTH);
    let (_a, path) = pod();
    node.block_on(network.attach("a", &path)).expect("attach");
    assert_eq!(node.netns.run(|| node_addresses(&[])).expect("addresses"), found);
    let bare = NetNs::new();
    let error = bare.run(|| node_addresses(&[])).expect_err("nothing but lo").to_string();
    assert!(error.contains("--node-ip"), "{error}");
    let error = bare.run(|| node_addresses(&["up7".to_owned()])).expect_err("no such link").to_string();
    assert!(error.contains("up7"), "{error}");
}

#[test]
fn a_node_inside_the_pod_range_is_refused() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let error = node.block_on(Network::open(node.config(&["192.0.2.0/24"]))).expect_err("must fail");
    assert!(error.to_string().contains("192.0.2.1"), "{error}");
    let error = node.block_on(Network::open(node.config(&[]))).expect_err("must fail");
    assert!(error.to_string().contains("--pod-cidr"), "{error}");
}
