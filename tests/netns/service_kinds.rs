//! Kinds of frontends, session affinity and the bind guard, at the socket: tables written by hand, real sockets in a
//! private cgroup and network namespace.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};

use sheave_agent::dataplane::ebpf::{EbpfDataplane, Listener};
use sheave_agent::dataplane::{Attached, Dataplane as _};
use sheave_agent::service::{
    BackendAddr, Changes, FrontendEntry, FrontendKey, FrontendKind, FrontendPolicy, Member, Proto, SlotWrite,
};
use sheave_harness::{NetNs, isolated};

use crate::service_world::{
    World, address, ask, ask_udp, at, on_loopback, tcp_server, udp_client, udp_server,
};

const PODS: [&str; 2] = ["10.244.0.1", "10.244.0.2"];
const NODE: &str = "192.0.2.1";

/// A data plane whose changes are made by hand.
pub(crate) struct Hand {
    pub(crate) plane: EbpfDataplane,
    next_slot: u32,
}

impl Hand {
    pub(crate) fn new(world: &World) -> Self {
        let mut plane = EbpfDataplane::open(&world.config).expect("open");
        plane.observe().expect("observe");
        let node = BTreeSet::from([address(NODE)]);
        plane.set_node_addresses(&node).expect("say the node's addresses");
        assert_eq!(plane.attach().expect("attach"), Attached::Yes);
        Self { plane, next_slot: 0 }
    }

    /// Writes one service port: every backend is ready and on this node.
    pub(crate) fn put(
        &mut self,
        service: u32,
        proto: Proto,
        frontends: &[(SocketAddr, FrontendPolicy)],
        pods: &[SocketAddr],
    ) {
        let mut changes = Changes::default();
        let ids: Vec<u32> = pods.iter().map(|pod| id_of(*pod)).collect();
        for (pod, id) in pods.iter().zip(&ids) {
            changes.put_backends.push((*id, BackendAddr { addr: pod.ip(), port: pod.port(), proto }));
            let member = Member { local: true, ready: true, cluster: true };
            changes.put_members.insert((service, *id), member);
        }
        let base = self.next_slot;
        self.next_slot += pods.len() as u32;
        let slots = (base..).zip(ids);
        changes.put_slots.extend(slots.map(|(index, backend)| SlotWrite { index, service, backend }));
        for (to, policy) in frontends {
            let key = FrontendKey { addr: to.ip(), port: to.port(), proto };
            let counts = [pods.len() as u16, 0, 0, 0];
            let entry = FrontendEntry { service, base, counts, policy: *policy, ..FrontendEntry::default() };
            changes.put_frontends.insert(key, entry);
        }
        self.plane.apply(&changes).expect("apply");
    }

    pub(crate) fn counted(&self, reason: &str) -> u64 {
        let reasons = self.plane.counters().and_then(|counters| counters.read()).expect("read the counters");
        reasons.iter().find(|(counter, _)| counter.name() == reason).expect("a known reason").1
    }
}

/// The same number for the same backend.
pub(crate) fn id_of(pod: SocketAddr) -> u32 {
    let IpAddr::V4(ip) = pod.ip() else { panic!("IPv4 pods only") };
    u32::from(ip) & 0xffff
}

pub(crate) fn kind(kind: FrontendKind) -> FrontendPolicy {
    FrontendPolicy { kind, ..FrontendPolicy::default() }
}

fn sticky() -> FrontendPolicy {
    FrontendPolicy { affinity_timeout_s: 10_800, ..FrontendPolicy::default() }
}

fn pods() -> [SocketAddr; 2] {
    PODS.map(|pod| at(pod, 8080))
}

fn serve() {
    on_loopback(&PODS);
    pods().into_iter().for_each(tcp_server);
    pods().into_iter().for_each(udp_server);
}

/// Whoever answers all of twenty connections and ten sockets' datagrams.
fn only_answer(to: SocketAddr) -> String {
    let mut seen: BTreeSet<String> =
        (0..20).map(|_| ask(to).unwrap_or_else(|e| panic!("connect to {to}: {e}")).0).collect();
    assert_eq!(seen.len(), 1, "one endpoint answers all: {seen:?}");
    seen.pop_first().unwrap_or_default()
}

#[test]
fn service_affinity_keeps_a_namespace_with_one_endpoint() {
    isolated(module_path!(), "service_affinity_keeps_a_namespace_with_one_endpoint", |cgroup| {
        let world = World::new(cgroup, &[]);
        let mut hand = Hand::new(&world);
        let (tcp, udp) = (at("10.96.0.10", 80), at("10.96.0.11", 80));
        hand.put(1, Proto::Tcp, &[(tcp, sticky())], &pods());
        hand.put(2, Proto::Udp, &[(udp, sticky())], &pods());
        // Each namespace has the pods of its own, so that nothing needs a route.
        let namespaces: Vec<NetNs> = (0..24).map(|_| NetNs::new()).collect();
        let answers: Vec<(String, BTreeSet<String>)> = namespaces
            .iter()
            .map(|ns| {
                ns.run(|| {
                    serve();
                    (only_answer(tcp), (0..10).map(|_| ask_udp(&udp_client(udp), udp)).collect())
                })
            })
            .collect();
        let seen: BTreeSet<&String> = answers.iter().map(|(tcp, _)| tcp).collect();
        assert_eq!(seen.len(), 2, "clients are spread");
        assert!(answers.iter().all(|(_, udp)| udp.len() == 1), "sockets of a client share one: {answers:?}");
        // The endpoint of the first client leaves, and comes back.
        let (stays, gone) = if answers[0].0 == PODS[0] { (1, 0) } else { (0, 1) };
        let mut changes = Changes::default();
        changes.delete_members.insert((1, id_of(pods()[gone])));
        hand.plane.apply(&changes).expect("apply");
        hand.put(1, Proto::Tcp, &[(tcp, sticky())], &pods()[stays..=stays]);
        assert_eq!(namespaces[0].run(|| only_answer(tcp)), PODS[stays]);
        hand.put(1, Proto::Tcp, &[(tcp, sticky())], &pods());
        assert_eq!(namespaces[0].run(|| only_answer(tcp)), PODS[stays], "bound to the other one now");
        assert_eq!(hand.counted("affinity_full"), 0);
    });
}

#[test]
fn service_kinds_are_translated_where_they_belong() {
    isolated(module_path!(), "service_kinds_are_translated_where_they_belong", |cgroup| {
        serve();
        on_loopback(&[NODE]);
        let world = World::new(cgroup, &[]);
        let mut hand = Hand::new(&world);
        let pod = &pods()[..1];
        let (theirs, ours, balancer) = (at("198.51.100.7", 80), at(NODE, 80), at("203.0.113.5", 80));
        hand.put(
            1,
            Proto::Tcp,
            &[(theirs, kind(FrontendKind::ExternalIp)), (ours, kind(FrontendKind::ExternalIp))],
            pod,
        );
        let local =
            FrontendPolicy { external_local: true, source_ranges: true, ..kind(FrontendKind::LoadBalancer) };
        hand.put(2, Proto::Tcp, &[(balancer, local)], pod);
        assert_eq!(ask(ours).expect("an external IP of this node").0, PODS[0]);
        assert_eq!(ask(balancer).expect("a load balancer's address").0, PODS[0]);
        let error = ask(theirs).expect_err("somebody else's address goes to the network, which has no route");
        assert_eq!(error.kind(), ErrorKind::NetworkUnreachable, "{error}");

        let any = at("0.0.0.0", 8443);
        let closed = || ask(at(NODE, 8443)).expect_err("nobody has it").kind();
        assert_eq!(closed(), ErrorKind::ConnectionRefused);
        hand.put(3, Proto::Tcp, &[(any, kind(FrontendKind::HostPort))], pod);
        assert_eq!(ask(at(NODE, 8443)).expect("a hostPort").0, PODS[0]);
        assert_eq!(ask(at("127.0.0.1", 8443)).expect("a hostPort on loopback").0, PODS[0]);
        let mut changes = Changes::default();
        changes.delete_frontends.insert(FrontendKey { addr: any.ip(), port: any.port(), proto: Proto::Tcp });
        hand.plane.apply(&changes).expect("apply");
        assert_eq!(closed(), ErrorKind::ConnectionRefused);
    });
}

#[test]
fn service_ports_cannot_be_bound_by_others_on_the_node() {
    isolated(module_path!(), "service_ports_cannot_be_bound_by_others_on_the_node", |cgroup| {
        on_loopback(&[NODE, "203.0.113.5"]);
        let world = World::new(cgroup, &[]);
        let mut hand = Hand::new(&world);
        let before = TcpListener::bind("0.0.0.0:30080").expect("nobody's port");
        drop(before);
        let node_port = (at("0.0.0.0", 30_080), kind(FrontendKind::NodePort));
        hand.put(1, Proto::Tcp, &[node_port], &pods());
        hand.put(2, Proto::Tcp, &[(at("203.0.113.5", 80), kind(FrontendKind::LoadBalancer))], &pods());
        for taken in ["0.0.0.0:30080", "[::]:30080", "127.0.0.1:30080", "192.0.2.1:30080", "203.0.113.5:80"] {
            let error = TcpListener::bind(taken).expect_err(taken);
            assert_eq!(error.kind(), ErrorKind::AddrInUse, "{taken}: {error}");
        }
        assert_eq!(hand.counted("bind_refused"), 5);
        UdpSocket::bind("0.0.0.0:30080").expect("another protocol");
        for free in ["0.0.0.0:30081", "0.0.0.0:80", "192.0.2.1:80", "203.0.113.5:81", "[::1]:30080"] {
            TcpListener::bind(free).unwrap_or_else(|e| panic!("{free}: {e}"));
        }
        NetNs::new().run(|| TcpListener::bind("0.0.0.0:30080").expect("a pod's own port"));
        assert_eq!(hand.counted("bind_refused"), 5);
    });
}

#[test]
fn service_node_ports_are_kept_from_sockets_that_ask_for_no_port() {
    isolated(module_path!(), "service_node_ports_are_kept_from_sockets_that_ask_for_no_port", |cgroup| {
        let reserved = "/proc/sys/net/ipv4/ip_local_reserved_ports";
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "29999 32768").expect("set the range");
        std::fs::write(reserved, "8080").expect("reserve a port of ours");
        let world = World::new(cgroup, &[]);
        let _hand = Hand::new(&world);
        let held = std::fs::read_to_string(reserved).expect("read it back");
        assert_eq!(held.trim(), "8080,30000-32767");
        let ports: BTreeSet<u16> = (0..20)
            .map(|_| TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("some port").port())
            .collect();
        assert!(ports.iter().all(|port| [29_999, 32_768].contains(port)), "{ports:?}");
    });
}

/// A UDP socket that is connected to `to`; its first answer names the endpoint.
fn connected(to: SocketAddr) -> (UdpSocket, String) {
    let socket = udp_client(to);
    socket.connect(to).unwrap_or_else(|e| panic!("connect to {to}: {e}"));
    let answer = answer(&socket).expect("an answer");
    (socket, answer)
}

/// Whoever answers a datagram now.
fn answer(socket: &UdpSocket) -> std::io::Result<String> {
    socket.send(b"who")?;
    let mut buffer = [0; 64];
    let len = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

/// Until the kernel has ended the socket.
fn wait_for_end(socket: &UdpSocket) {
    let error = sheave_harness::wait_for("the socket's end", || match socket.take_error() {
        Ok(Some(error)) => Ok(error),
        other => Err(format!("its error is {other:?}")),
    });
    assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{error}");
}

fn put_udp(hand: &mut Hand, service: u32, at: &[SocketAddr], pods: &[SocketAddr]) {
    let frontends: Vec<_> = at.iter().map(|to| (*to, FrontendPolicy::default())).collect();
    hand.put(service, Proto::Udp, &frontends, pods);
}

#[test]
fn service_udp_sockets_of_a_lost_backend_are_ended_and_no_others() {
    isolated(module_path!(), "service_udp_sockets_of_a_lost_backend_are_ended_and_no_others", |cgroup| {
        serve();
        let world = World::new(cgroup, &[]);
        let mut hand = Hand::new(&world);
        let (one, two) = (at("10.96.0.11", 80), at("10.96.0.12", 80));
        put_udp(&mut hand, 1, &[one], &pods()[..1]);
        put_udp(&mut hand, 2, &[two], &pods()[..1]);
        let (stale, _) = connected(one);
        // From an IPv6 socket, as programs with one socket for both families do.
        let mapped = UdpSocket::bind("[::]:0").expect("bind");
        mapped.set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("set a timeout");
        mapped.connect("[::ffff:10.96.0.11]:80").expect("connect");
        assert_eq!(answer(&mapped).expect("an answer"), PODS[0]);
        let (other_service, _) = connected(two);
        let (direct, _) = connected(pods()[0]);

        put_udp(&mut hand, 1, &[one], &pods()[1..]);
        let gone = BackendAddr { addr: address(PODS[0]), port: 8080, proto: Proto::Udp };
        let lost = Changes { lost: [(1, gone)].into(), ..Changes::default() };
        hand.plane.apply(&lost).expect("apply");
        for socket in [&stale, &mapped] {
            wait_for_end(socket);
        }
        stale.connect(one).expect("connect again");
        assert_eq!(answer(&stale).expect("an answer"), PODS[1], "a live endpoint");
        // After the second look, too.
        sheave_harness::wait_for("both looks", || {
            let ended = world.config.stats.snapshot().sockets_ended_total;
            if ended == 2 { Ok(()) } else { Err(format!("{ended} ended")) }
        });
        assert_eq!(answer(&other_service).expect("another service's socket goes on"), PODS[0]);
        assert_eq!(answer(&direct).expect("the endpoint's own client goes on"), PODS[0]);
    });
}

/// Set in the process that plays a client elsewhere.
const CLIENT: &str = "SHEAVE_TEST_UDP_CLIENT";

/// A client in a namespace of its own: says when it is connected, and how its socket ended.
fn play_client() {
    let to = at("10.96.0.11", 80);
    on_loopback(&PODS[..1]);
    udp_server(pods()[0]);
    let (socket, _) = connected(to);
    println!("connected");
    wait_for_end(&socket);
    let error = socket.connect(to).expect_err("no endpoint is left");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
}

#[test]
fn service_udp_sockets_of_other_namespaces_are_ended_too() {
    const NAME: &str = "service_udp_sockets_of_other_namespaces_are_ended_too";
    isolated(module_path!(), NAME, |cgroup| {
        if std::env::var_os(CLIENT).is_some() {
            return play_client();
        }
        let world = World::new(cgroup, &[]);
        let mut hand = Hand::new(&world);
        let to = at("10.96.0.11", 80);
        put_udp(&mut hand, 1, &[to], &pods()[..1]);
        let elsewhere = NetNs::new();
        let mut command = elsewhere.command(std::env::current_exe().expect("this program"));
        command.args(std::env::args().skip(1)).env(CLIENT, "1").stdout(std::process::Stdio::piped());
        let mut client = command.spawn().expect("start the client");
        let mut lines =
            BufReader::new(client.stdout.take().expect("its output")).lines().map_while(Result::ok);
        let connected = lines.any(|line| line.contains("connected"));
        assert!(connected, "{:?}", client.wait());
        put_udp(&mut hand, 1, &[to], &[]);
        let gone = BackendAddr { addr: address(PODS[0]), port: 8080, proto: Proto::Udp };
        let lost = Changes { lost: [(1, gone)].into(), ..Changes::default() };
        hand.plane.apply(&lost).expect("apply");
        lines.for_each(drop);
        assert!(client.wait().expect("the client's end").success());
    });
}

#[test]
fn service_udp_sockets_that_a_killed_agent_left_are_ended_by_the_next() {
    isolated(
        module_path!(),
        "service_udp_sockets_that_a_killed_agent_left_are_ended_by_the_next",
        |cgroup| {
            serve();
            let world = World::new(cgroup, &[]);
            let mut hand = Hand::new(&world);
            let (one, two) = (at("10.96.0.11", 80), at("10.96.0.12", 80));
            put_udp(&mut hand, 1, &[one], &pods()[..1]);
            put_udp(&mut hand, 2, &[two], &pods()[..1]);
            let ((stale, _), (good, _)) = (connected(one), connected(two));
            // The agent dies between writing the table and ending the sockets.
            put_udp(&mut hand, 1, &[one], &pods()[1..]);
            drop(hand);
            let _next = Hand::new(&world);
            wait_for_end(&stale);
            assert_eq!(answer(&good).expect("a socket whose endpoint is in the table goes on"), PODS[0]);
        },
    );
}

#[test]
fn service_udp_answers_show_their_sender_when_the_service_is_gone() {
    isolated(module_path!(), "service_udp_answers_show_their_sender_when_the_service_is_gone", |cgroup| {
        serve();
        let world = World::new(cgroup, &[]);
        let mut hand = Hand::new(&world);
        let to = at("10.96.0.11", 80);
        put_udp(&mut hand, 1, &[to], &pods()[..1]);
        let socket = udp_client(to);
        assert_eq!(ask_udp(&socket, to), PODS[0]);
        let mut changes = Changes::default();
        changes.delete_frontends.insert(FrontendKey { addr: to.ip(), port: to.port(), proto: Proto::Udp });
        hand.plane.apply(&changes).expect("apply");
        assert_eq!(ask_udp(&socket, pods()[0]), PODS[0], "the endpoint is itself now");
        assert_eq!(hand.counted("recvmsg_stale"), 1);
    });
}

#[test]
fn service_events_tell_of_sockets_while_somebody_listens() {
    isolated(module_path!(), "service_events_tell_of_sockets_while_somebody_listens", |cgroup| {
        serve();
        let world = World::new(cgroup, &[]);
        let mut hand = Hand::new(&world);
        let (web, dns, empty, port) =
            (at("10.96.0.10", 80), at("10.96.0.11", 80), at("10.96.0.12", 80), at("0.0.0.0", 30_080));
        hand.put(1, Proto::Tcp, &[(web, FrontendPolicy::default())], &pods()[..1]);
        hand.put(2, Proto::Udp, &[(dns, FrontendPolicy::default())], &pods()[..1]);
        hand.put(3, Proto::Tcp, &[(empty, FrontendPolicy::default())], &[]);
        hand.put(4, Proto::Tcp, &[(port, kind(FrontendKind::NodePort))], &[]);
        ask(web).expect("before anybody listens");
        let mut listener = Listener::open(&world.config.pin_dir).expect("listen");
        ask(web).expect("connect");
        let socket = udp_client(dns);
        (0..3).for_each(|_| drop(ask_udp(&socket, dns)));
        ask(empty).expect_err("nobody serves");
        TcpListener::bind(port).expect_err("a NodePort");
        let mut seen = Vec::new();
        while let Some(event) = listener.take() {
            seen.push((event.hook, event.reason, event.drop, event.asked, event.backend, event.service));
        }
        let pod = Some(pods()[0]);
        assert_eq!(
            seen,
            [
                ("connect", "connect_translated", false, web, pod, 1),
                ("sendmsg", "sendmsg_translated", false, dns, pod, 2),
                ("connect", "connect_no_endpoints", true, empty, None, 0),
                ("bind", "bind_refused", true, port, None, 0),
            ]
        );
        listener.stop().expect("stop");
        ask(web).expect("connect");
        assert!(listener.take().is_none(), "nobody listens any more");
    });
}
