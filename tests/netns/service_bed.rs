//! A small cluster of network namespaces for the scenarios: the node under test (the test's own namespace), a client
//! outside, two pods on the node and a second node with two pods. Whoever is served at the socket is a process of its
//! own in the served cgroup; whoever is not (the outside client, the servers) is a thread of the test.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use sheave_agent::dataplane::{DataplaneConfig, Mode, remove};
use sheave_agent::service::Proto;
use sheave_harness::NetNs;

use crate::service_world::{address, at};

/// Set in an actor's process.
const ACTOR: &str = "SHEAVE_ACTOR";
/// The test that an actor's process runs.
const ACTOR_TEST: &str = "service_bed::service_actor";
/// How long an answer may take before silence is silence. Only a failing check waits longer than an answer takes.
const SILENCE: Duration = Duration::from_millis(700);
/// How long an answer may take where one is expected.
const PATIENCE: Duration = Duration::from_secs(4);

/// Port of every server.
pub(crate) const SERVER_PORT: u16 = 8080;

/// Addresses by family: IPv4 first.
pub(crate) type Pair = [&'static str; 2];
pub(crate) const CLIENT: Pair = ["198.51.100.2", "2001:db8:ffff::2"];
/// The node towards the client; its primary addresses.
pub(crate) const NODE: Pair = ["198.51.100.1", "2001:db8:ffff::1"];
/// The node towards the second node.
pub(crate) const NODE_LAN: Pair = ["192.0.2.1", "2001:db8:2::1"];
const NODE2: Pair = ["192.0.2.2", "2001:db8:2::2"];
const LINK: Pair = ["10.244.0.1", "fd00:244::1"];

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Pod {
    /// On the node.
    L1,
    /// On the node.
    L2,
    /// On the second node.
    R1,
    /// On the second node.
    R2,
}

impl Pod {
    pub(crate) const ALL: [Pod; 4] = [Pod::L1, Pod::L2, Pod::R1, Pod::R2];

    pub(crate) fn addresses(self) -> Pair {
        match self {
            Pod::L1 => ["10.244.0.5", "fd00:244::5"],
            Pod::L2 => ["10.244.0.6", "fd00:244::6"],
            Pod::R1 => ["10.244.1.5", "fd00:244:1::5"],
            Pod::R2 => ["10.244.1.6", "fd00:244:1::6"],
        }
    }

    pub(crate) fn is_local(self) -> bool {
        matches!(self, Pod::L1 | Pod::L2)
    }

    /// The pod with this address.
    pub(crate) fn at(addr: &str) -> Option<Pod> {
        Self::ALL.into_iter().find(|pod| pod.addresses().contains(&addr))
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// The client outside.
    Outside,
    /// A program of the node itself.
    Node,
    /// A program in pod L1.
    PodL1,
}

impl Who {
    /// The addresses by which servers know it when nothing is masqueraded.
    pub(crate) fn addresses(self) -> Vec<&'static str> {
        match self {
            Who::Outside => CLIENT.to_vec(),
            Who::Node => [NODE, NODE_LAN, LINK].concat(),
            Who::PodL1 => Pod::L1.addresses().to_vec(),
        }
    }
}

/// What became of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Who answered, and whom it saw.
    From { server: String, peer: String },
    /// ECONNREFUSED, at once.
    Refused,
    /// Nothing came.
    Silent,
    /// Another error.
    Failed(String),
}

/// Asks once. `patient`: an answer is expected.
fn ask(to: SocketAddr, proto: Proto, patient: bool) -> Answer {
    let limit = if patient { PATIENCE } else { SILENCE };
    let asked = match proto {
        Proto::Udp => ask_udp(to, limit),
        _ => ask_tcp(to, limit),
    };
    match asked {
        Ok(text) => match text.split_once(' ') {
            Some((server, peer)) => Answer::From { server: server.to_owned(), peer: peer.to_owned() },
            None => Answer::Failed(format!("an answer without a peer: {text:?}")),
        },
        Err(e) => match e.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::HostUnreachable | ErrorKind::PermissionDenied => {
                Answer::Refused
            }
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Answer::Silent,
            _ => Answer::Failed(e.to_string()),
        },
    }
}

fn ask_tcp(to: SocketAddr, limit: Duration) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// A socket whose port this process has not asked from before: a flow of datagrams stays with its endpoint for as long as
/// it is in use, whatever its service's policies become.
fn fresh_udp(to: SocketAddr) -> std::io::Result<UdpSocket> {
    static NEXT: AtomicU16 = AtomicU16::new(10_000);
    let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
    loop {
        // Below the NodePorts and the ports that the kernel gives.
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(port < 30_000, "this process has asked too often");
        match UdpSocket::bind(at(any, port)) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => {}
            done => return done,
        }
    }
}

fn ask_udp(to: SocketAddr, limit: Duration) -> std::io::Result<String> {
    let socket = fresh_udp(to)?;
    socket.set_read_timeout(Some(limit))?;
    // Connected, so that an ICMP error is told.
    socket.connect(to)?;
    let mut buffer = [0; 128];
    for _ in 0..2 {
        socket.send(b"who")?;
        match socket.recv(&mut buffer) {
            // One datagram may be lost while neighbours are looked up.
            Err(e) if e.kind() == ErrorKind::WouldBlock && limit == PATIENCE => {}
            other => return other.map(|len| String::from_utf8_lossy(&buffer[..len]).into_owned()),
        }
    }
    Err(ErrorKind::TimedOut.into())
}

/// A process that asks on behalf of the node or of a pod, in the served cgroup.
struct Actor {
    child: Child,
    pipes: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Actor {
    fn start(served: &Path, netns: Option<&NetNs>) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("the test program's own path"));
        command.args([ACTOR_TEST, "--exact", "--nocapture", "--test-threads=1", "--quiet"]).env(ACTOR, "1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let procs =
            std::fs::File::options().write(true).open(served.join("cgroup.procs")).expect("cgroup.procs");
        if let Some(netns) = netns {
            netns.apply(&mut command);
        }
        join(&mut command, procs);
        let mut child = command.spawn().expect("start an actor");
        let input = child.stdin.take().expect("its input");
        let output = BufReader::new(child.stdout.take().expect("its output"));
        Self { child, pipes: Mutex::new((input, output)) }
    }

    fn ask(&self, to: SocketAddr, proto: Proto, patient: bool) -> Answer {
        let mut pipes = self.pipes.lock().expect("no question panicked");
        writeln!(pipes.0, "{to} {} {patient}", proto.name()).expect("tell the actor");
        loop {
            let mut line = String::new();
            assert!(pipes.1.read_line(&mut line).expect("hear the actor") > 0, "the actor is gone");
            // The test program says things of its own, on the same line if it likes.
            let Some((_, answer)) = line.split_once("ANSWER\t") else { continue };
            let mut parts = answer.trim_end().split('\t');
            return match (parts.next(), parts.next(), parts.next()) {
                (Some("from"), Some(server), Some(peer)) => {
                    Answer::From { server: server.to_owned(), peer: peer.to_owned() }
                }
                (Some("refused"), ..) => Answer::Refused,
                (Some("silent"), ..) => Answer::Silent,
                (_, text, _) => Answer::Failed(text.unwrap_or_default().to_owned()),
            };
        }
    }
}

#[expect(unsafe_code, reason = "pre_exec, to start a program inside a cgroup")]
fn join(command: &mut Command, procs: std::fs::File) {
    // SAFETY: between fork and exec only write(2) runs; "0" names the writing process.
    unsafe {
        command.pre_exec(move || (&procs).write_all(b"0"));
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The body of an actor's process; nothing where it is run as an ordinary test.
#[test]
fn service_actor() {
    if std::env::var_os(ACTOR).is_none() {
        return;
    }
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("a question");
        let mut parts = line.split(' ');
        let to: SocketAddr = parts.next().and_then(|text| text.parse().ok()).expect("an address");
        let proto = parts.next().and_then(Proto::from_name).expect("a protocol");
        let patient = parts.next() == Some("true");
        match ask(to, proto, patient) {
            Answer::From { server, peer } => println!("ANSWER\tfrom\t{server}\t{peer}"),
            Answer::Refused => println!("ANSWER\trefused"),
            Answer::Silent => println!("ANSWER\tsilent"),
            Answer::Failed(text) => println!("ANSWER\tfailed\t{text}"),
        }
    }
}

/// The whole of it. Fields are dropped in order: actors before the cgroup that they are in.
pub(crate) struct Bed {
    node: Actor,
    pod: Actor,
    client: NetNs,
    _others: Vec<NetNs>,
    /// Settings for the data plane.
    pub(crate) config: DataplaneConfig,
    dir: PathBuf,
    served: PathBuf,
}

impl Bed {
    pub(crate) fn new(cgroup: &Path, mode: Mode) -> Self {
        let here = NetNs::open("/proc/self/ns/net").expect("our own namespace");
        let (client, node2, l1, l2) = (NetNs::new(), NetNs::new(), NetNs::new(), NetNs::new());
        wire(&here, &client, &node2, &[(&l1, Pod::L1), (&l2, Pod::L2)]);
        for (netns, pod) in [(&l1, Pod::L1), (&l2, Pod::L2), (&node2, Pod::R1), (&node2, Pod::R2)] {
            pod.addresses().iter().for_each(|addr| netns.run(|| serve(at(addr, SERVER_PORT))));
        }
        let served = cgroup.join("served");
        std::fs::create_dir(&served).expect("a cgroup for those who are served");
        let dir = std::env::temp_dir().join(sheave_harness::unique("sheave-scenarios"));
        let config = DataplaneConfig {
            mode: Some(mode),
            pin_dir: dir.join("bpf"),
            cgroup_path: Some(served.clone()),
            uplinks: vec!["up0".to_owned(), "lan0".to_owned()],
            pod_links: vec!["pod".to_owned()],
            node_name: "node-1".to_owned(),
            node_ips: NODE.iter().map(|ip| address(ip)).collect(),
            pod_cidrs: ["10.244.0.0/16", "fd00:244::/32"]
                .iter()
                .map(|c| c.parse().expect("a range"))
                .collect(),
            ..DataplaneConfig::default()
        };
        let node = Actor::start(&served, None);
        let pod = Actor::start(&served, Some(&l1));
        Self { node, pod, client, _others: vec![node2, l1, l2], config, dir, served }
    }

    /// Asks once on somebody's behalf.
    pub(crate) fn ask(&self, who: Who, to: SocketAddr, proto: Proto, patient: bool) -> Answer {
        match who {
            Who::Outside => self.client.run(|| ask(to, proto, patient)),
            Who::Node => self.node.ask(to, proto, patient),
            Who::PodL1 => self.pod.ask(to, proto, patient),
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let mut errors: Vec<String> = Vec::new();
        if let Some(mode) = self.config.mode {
            errors.extend(remove(mode, &self.config).iter().map(|e| crate::service_world::chain(e)));
        }
        if self.dir.exists() {
            errors.extend(std::fs::remove_dir_all(&self.dir).err().map(|e| e.to_string()));
        }
        for actor in [&mut self.node, &mut self.pod] {
            drop(actor.child.kill());
            drop(actor.child.wait());
        }
        // A cgroup is empty a moment after its last process has been waited for.
        sheave_harness::wait_for("the served cgroup to be empty", || std::fs::remove_dir(&self.served));
        if !std::thread::panicking() {
            assert!(errors.is_empty(), "taking the data plane off: {errors:?}");
        }
    }
}

fn add(netns: &NetNs, device: &str, addresses: Pair) {
    netns.ip(&["addr", "add", &format!("{}/24", addresses[0]), "dev", device]);
    netns.ip(&["addr", "add", &format!("{}/64", addresses[1]), "dev", device, "nodad"]);
}

fn route(netns: &NetNs, to: Pair, via: Pair) {
    netns.ip(&["route", "add", to[0], "via", via[0]]);
    netns.ip(&["-6", "route", "add", to[1], "via", via[1]]);
}

/// Links, addresses and routes. Pods are routed: an address each, the node behind a link-wide one.
fn wire(here: &NetNs, client: &NetNs, node2: &NetNs, pods: &[(&NetNs, Pod)]) {
    here.veth("up0", client, "eth0");
    here.veth("lan0", node2, "eth0");
    add(here, "up0", NODE);
    add(client, "eth0", CLIENT);
    add(here, "lan0", NODE_LAN);
    add(node2, "eth0", NODE2);
    here.ip(&["addr", "add", &format!("{}/32", LINK[0]), "dev", "lo"]);
    here.ip(&["addr", "add", &format!("{}/128", LINK[1]), "dev", "lo"]);
    for (number, (netns, pod)) in pods.iter().enumerate() {
        let name = format!("pod{number}");
        here.veth(&name, netns, "eth0");
        let [v4, v6] = pod.addresses();
        netns.ip(&["addr", "add", &format!("{v4}/32"), "dev", "eth0"]);
        netns.ip(&["addr", "add", &format!("{v6}/128"), "dev", "eth0", "nodad"]);
        here.ip(&["addr", "add", &format!("fe80::{}/64", number + 1), "dev", &name, "nodad"]);
        netns.ip(&["route", "add", LINK[0], "dev", "eth0"]);
        netns.ip(&["route", "add", "default", "via", LINK[0]]);
        netns.ip(&["-6", "route", "add", "default", "via", &format!("fe80::{}", number + 1), "dev", "eth0"]);
        here.ip(&["route", "add", v4, "dev", &name]);
        here.ip(&["-6", "route", "add", v6, "dev", &name]);
    }
    for pod in [Pod::R1, Pod::R2] {
        let [v4, v6] = pod.addresses();
        node2.ip(&["addr", "add", &format!("{v4}/32"), "dev", "lo"]);
        node2.ip(&["addr", "add", &format!("{v6}/128"), "dev", "lo", "nodad"]);
    }
    route(here, ["10.244.1.0/24", "fd00:244:1::/64"], NODE2);
    // A node has a way to addresses that it does not know; modes that translate packets need one for the first.
    route(here, ["default", "default"], CLIENT);
    route(node2, ["default", "default"], NODE_LAN);
    route(client, ["203.0.113.0/24", "2001:db8:113::/64"], NODE);
    route(client, ["10.0.0.0/8", "fd00::/16"], NODE);
    // Modes that refuse by the kernel's own ICMP errors are asked faster than the kernel's limit a destination allows.
    for (knob, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/icmp_ratelimit", "0"),
        ("ipv6/icmp/ratelimit", "0"),
    ] {
        std::fs::write(format!("/proc/sys/net/{knob}"), value).unwrap_or_else(|e| panic!("{knob}: {e}"));
    }
}

/// Serves TCP and UDP; both say who answers and whom they see.
fn serve(listen: SocketAddr) {
    let text = move |peer: IpAddr| format!("{} {}", listen.ip(), peer.to_canonical());
    let listener = TcpListener::bind(listen).unwrap_or_else(|e| panic!("listen on {listen}: {e}"));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let Ok(peer) = stream.peer_addr() else { continue };
            // A client that has gone already is the test's affair.
            drop(stream.write_all(text(peer.ip()).as_bytes()));
        }
    });
    let socket = UdpSocket::bind(listen).unwrap_or_else(|e| panic!("bind {listen}: {e}"));
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        loop {
            // An error here is an ICMP answer to something sent earlier.
            if let Ok((_, from)) = socket.recv_from(&mut buffer) {
                drop(socket.send_to(text(from.ip()).as_bytes(), from));
            }
        }
    });
}
