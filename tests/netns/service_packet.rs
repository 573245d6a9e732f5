//! Packets that arrive for services: a client, this node and another node, each in a namespace of its own. What the
//! socket hooks would do is left out: client, pods and nodes are outside of the cgroup that is served.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};
use sheave_agent::dataplane::Driver;
use sheave_agent::service::{Event, Proto, ServiceExtras};
use sheave_harness::{NetNs, isolated};

use crate::service_world::{
    World, address, ask, ask_udp, at, ip, on_loopback, service, slice, tcp_server, udp_client, udp_server,
};

pub(crate) const CLIENT: [&str; 2] = ["198.51.100.2", "2001:db8:ffff::2"];
pub(crate) const NODE: [&str; 2] = ["198.51.100.1", "2001:db8:ffff::1"];
pub(crate) const POD: [&str; 2] = ["10.244.0.5", "fd00:244::5"];
const OTHER_POD: [&str; 2] = ["10.244.0.6", "fd00:244::6"];
const GATE: [&str; 2] = ["169.254.77.1", "fd00:77::1"];
const NEAR: [&str; 2] = ["10.0.9.1", "fd00:9::1"];
const FAR: [&str; 2] = ["10.0.9.2", "fd00:9::2"];
const REMOTE: [&str; 2] = ["10.244.9.5", "fd00:244:9::5"];
pub(crate) const BALANCER: [&str; 2] = ["203.0.113.10", "2001:db8:77::10"];
const EXTERNAL: [&str; 2] = ["203.0.113.20", "2001:db8:77::20"];
const CLUSTER: [&str; 2] = ["10.96.0.1", "fd00:96::1"];
/// NodePorts: endpoints on both nodes, on the other only, nowhere, on the other only with policy Local.
const REMOTE_PORT: u16 = 30_081;
pub(crate) const LOCAL_PORT: u16 = 30_080;
const EMPTY_PORT: u16 = 30_082;
const ELSEWHERE_PORT: u16 = 30_083;
/// A NodePort whose endpoints have nobody listening.
pub(crate) const DEAF_PORT: u16 = 30_084;
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

fn add(netns: &NetNs, device: &str, addresses: [&str; 2]) {
    netns.ip(&["addr", "add", &format!("{}/24", addresses[0]), "dev", device]);
    netns.ip(&["addr", "add", &format!("{}/64", addresses[1]), "dev", device, "nodad"]);
}

/// A routed pod: its addresses alone, a gateway on the link, a route on the node.
fn pod(node: &NetNs, device: &str, addresses: [&str; 2]) -> NetNs {
    let pod = NetNs::new();
    node.veth(device, &pod, "eth0");
    for (n, family) in ["-4", "-6"].into_iter().enumerate() {
        let (host, len) = (addresses[n], if n == 0 { "32" } else { "128" });
        let gate = format!("{}/{len}", GATE[n]);
        let mut args = vec!["addr", "add", gate.as_str(), "dev", device];
        let own = format!("{host}/{len}");
        let mut of_pod = vec!["addr", "add", own.as_str(), "dev", "eth0"];
        if n == 1 {
            args.push("nodad");
            of_pod.push("nodad");
        }
        node.ip(&args);
        pod.ip(&of_pod);
        node.ip(&[family, "route", "add", host, "dev", device]);
        pod.ip(&[family, "route", "add", GATE[n], "dev", "eth0"]);
        pod.ip(&[family, "route", "add", "default", "via", GATE[n]]);
    }
    pod
}

/// Echoes whatever it hears, over TCP and UDP.
pub(crate) fn echo(listen: SocketAddr) {
    let listener = TcpListener::bind(listen).unwrap_or_else(|e| panic!("listen on {listen}: {e}"));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut buffer = [0; 16_384];
                while let Ok(len @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..len]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    let socket = UdpSocket::bind(listen).unwrap_or_else(|e| panic!("bind {listen}: {e}"));
    std::thread::spawn(move || {
        let mut buffer = [0; 65_536];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            drop(socket.send_to(&buffer[..len], from));
        }
    });
}

/// This node is the test's own namespace, with the client behind `up0`, the other node behind `up1`, two pods.
pub(crate) struct Net {
    pub(crate) client: NetNs,
    other: NetNs,
    pub(crate) pod: NetNs,
    other_pod: NetNs,
    pub(crate) world: World,
    cgroup: std::path::PathBuf,
}

impl Net {
    pub(crate) fn new(cgroup: &Path) -> Self {
        let node = NetNs::open("/proc/self/ns/net").expect("our own namespace");
        let (client, other) = (NetNs::new(), NetNs::new());
        node.veth("up0", &client, "eth0");
        node.veth("up1", &other, "eth0");
        add(&node, "up0", NODE);
        add(&client, "eth0", CLIENT);
        add(&node, "up1", NEAR);
        add(&other, "eth0", FAR);
        for knob in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{knob}"), "1").unwrap_or_else(|e| panic!("{knob}: {e}"));
        }
        for n in 0..2 {
            let family = ["-4", "-6"][n];
            client.ip(&[family, "route", "add", "default", "via", NODE[n]]);
            other.ip(&[family, "route", "add", "default", "via", NEAR[n]]);
            node.ip(&[family, "route", "add", REMOTE[n], "via", FAR[n]]);
        }
        let (near, other_pod) = (pod(&node, "pod0", POD), pod(&node, "pod1", OTHER_POD));
        for n in 0..2 {
            near.run(|| {
                tcp_server(at(POD[n], 8080));
                udp_server(at(POD[n], 8080));
                echo(at(POD[n], 9090));
            });
            other.run(|| {
                on_loopback(&[REMOTE[n]]);
                tcp_server(at(REMOTE[n], 8080));
                udp_server(at(REMOTE[n], 8080));
                echo(at(REMOTE[n], 9090));
            });
        }
        let served = cgroup.join("served");
        fs::create_dir(&served).expect("a cgroup that nobody is in");
        let mut world = World::new(&served, &["up0", "up1"]);
        world.config.pod_links = vec!["pod".to_owned()];
        world.config.node_ips = NODE.iter().map(|ip| address(ip)).collect();
        Self { client, other, pod: near, other_pod, world, cgroup: served }
    }

    /// Services of every kind over `port` of the endpoints.
    pub(crate) fn driver(&self, port: u16) -> Driver {
        let mut events = Vec::new();
        for (proto, n) in [(Proto::Tcp, 1), (Proto::Udp, 2)] {
            for (name, node_port, endpoints, local_only) in [
                ("local", LOCAL_PORT, Some(true), true),
                ("remote", REMOTE_PORT, Some(false), false),
                ("empty", EMPTY_PORT, None, false),
                ("elsewhere", ELSEWHERE_PORT, Some(false), true),
            ] {
                let name = format!("{name}{n}");
                let ips = if node_port == REMOTE_PORT {
                    ["10.96.0.2".to_owned(), "fd00:96::2".to_owned()]
                } else if node_port == LOCAL_PORT {
                    CLUSTER.map(str::to_owned)
                } else {
                    [format!("10.96.{n}.{}", node_port % 100), format!("fd00:96:{n}::{}", node_port % 100)]
                };
                let mut event = service(&name, &[&ips[0], &ips[1]], proto, node_port);
                if let Event::Service(service) = &mut event {
                    service.external_local = local_only;
                    let (ingress, external) = match node_port {
                        LOCAL_PORT => (Some(BALANCER), None),
                        REMOTE_PORT => (None, Some(EXTERNAL)),
                        _ => (None, None),
                    };
                    let addresses =
                        |ips: Option<[&str; 2]>| ips.iter().flatten().map(|ip| address(ip)).collect();
                    service.extras = Some(Box::new(ServiceExtras {
                        ingress_ips: addresses(ingress),
                        external_ips: addresses(external),
                        ..ServiceExtras::default()
                    }));
                }
                events.push(event);
                if let Some(here) = endpoints {
                    let ips = if here { POD } else { REMOTE };
                    events.extend(ips.map(|ip| endpoint(&name, proto, at(ip, port), here)));
                }
            }
        }
        self.world.driver(events)
    }

    pub(crate) fn no_trouble(&self) {
        for reason in ["rewrite_failed", "answer_failed", "program_missing", "flow_full", "no_route"] {
            assert_eq!(self.world.counted(reason), 0, "{reason}");
        }
        assert_eq!(self.world.counted("connect_translated"), 0, "nothing of this goes by the socket hooks");
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.cgroup) {
            eprintln!("{}: {error}", self.cgroup.display());
        }
    }
}

pub(crate) fn endpoint(name: &str, proto: Proto, at: SocketAddr, here: bool) -> Event {
    let mut event = slice(name, proto, &[at]);
    if let Event::Slice(slice) = &mut event {
        slice.endpoints.iter_mut().for_each(|endpoint| endpoint.on_this_node = here);
    }
    event
}

/// A UDP socket of `to`'s family that talks to `to` alone.
pub(crate) fn connected(to: SocketAddr) -> UdpSocket {
    let socket = connected_from(0, to);
    socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    socket
}

/// The same from a port, that does not wait long.
fn connected_from(port: u16, to: SocketAddr) -> UdpSocket {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, port)).expect("bind a client");
    socket.set_read_timeout(Some(Duration::from_millis(500))).expect("set a timeout");
    socket.connect(to).expect("connect a client");
    socket
}

#[test]
fn service_packet_remote_and_local_endpoints_by_every_kind_of_address() {
    isolated(
        module_path!(),
        "service_packet_remote_and_local_endpoints_by_every_kind_of_address",
        |cgroup| {
            let net = Net::new(cgroup);
            let driver = net.driver(8080);
            for n in 0..2 {
                for (to, server, peer) in [
                    (at(NODE[n], REMOTE_PORT), REMOTE[n], NODE[n]),
                    (at(EXTERNAL[n], 80), REMOTE[n], NODE[n]),
                    (at(NODE[n], LOCAL_PORT), POD[n], CLIENT[n]),
                    (at(BALANCER[n], 80), POD[n], CLIENT[n]),
                ] {
                    for _ in 0..3 {
                        let heard = net.client.run(|| ask(to)).unwrap_or_else(|e| panic!("{to}: {e}"));
                        assert_eq!(heard, (server.to_owned(), peer.to_owned()), "{to}");
                        assert_eq!(net.client.run(|| ask_udp(&udp_client(to), to)), server);
                    }
                }
                // A thousand connections, more than the client's port is free for towards the endpoint.
                let to = at(NODE[n], REMOTE_PORT);
                net.client.run(|| {
                    for round in 0..500 {
                        ask(to).unwrap_or_else(|e| panic!("{to}, connection {round}: {e}"));
                    }
                });
            }
            net.no_trouble();
            assert_eq!(net.world.counted("snat_ports_exhausted"), 0);
            drop(driver);
        },
    );
}

/// Names of the pins of programs at pods' devices.
fn at_pods(net: &Net) -> Vec<String> {
    let index = |name: &str| nix::net::if_::if_nametoindex(name).expect("a device").to_string();
    let pods = [index("pod0"), index("pod1")];
    let dir = sheave_agent::dataplane::ebpf::versioned(&net.world.config.pin_dir).join("links");
    let pins = fs::read_dir(dir).expect("the links").map(|entry| entry.expect("an entry").file_name());
    let pins = pins.map(|name| name.to_string_lossy().into_owned());
    pins.filter(|name| name.split('_').nth(1).is_some_and(|index| pods.iter().any(|pod| pod == index)))
        .collect()
}

/// The sockets of these pods are not served: what they send is balanced at their devices, or not at all.
#[test]
fn service_packet_of_pods_is_balanced_where_that_is_wanted() {
    isolated(module_path!(), "service_packet_of_pods_is_balanced_where_that_is_wanted", |cgroup| {
        let mut net = Net::new(cgroup);
        for (wanted, masquerade_all) in
            [(true, false), (false, false), (false, true), (false, false), (true, false)]
        {
            (net.world.config.pod_packets, net.world.config.masquerade_all) = (wanted, masquerade_all);
            let driver = net.driver(8080);
            let there = wanted || masquerade_all;
            let limit = if there { PATIENCE } else { Duration::from_millis(300) };
            assert_eq!(at_pods(&net).len(), if there { 4 } else { 0 }, "{wanted} {masquerade_all}");
            for n in 0..2 {
                let cluster = at(CLUSTER[n], 80);
                let heard = net.other_pod.run(|| TcpStream::connect_timeout(&cluster, limit));
                assert_eq!(heard.is_ok(), there, "{cluster}: {heard:?}");
                // From outside all is as ever, by two addresses from one port too.
                let [node, balancer] = [at(NODE[n], LOCAL_PORT), at(BALANCER[n], 80)];
                let client = if masquerade_all { NODE[n] } else { CLIENT[n] };
                net.client.run(|| {
                    for to in [node, balancer] {
                        assert_eq!(
                            ask(to).expect("an answer"),
                            (POD[n].to_owned(), client.to_owned()),
                            "{to}"
                        );
                    }
                    let socket = udp_client(node);
                    for to in [node, balancer, node, balancer] {
                        assert_eq!(ask_udp(&socket, to), POD[n], "{to}");
                    }
                });
            }
            drop(driver);
        }
        for reason in ["rewrite_failed", "answer_failed", "program_missing", "flow_full", "no_route"] {
            assert_eq!(net.world.counted(reason), 0, "{reason}");
        }
    });
}

#[test]
fn service_packet_refusals() {
    isolated(module_path!(), "service_packet_refusals", |cgroup| {
        let net = Net::new(cgroup);
        let mut driver = net.driver(8080);
        for proto in [Proto::Tcp, Proto::Udp] {
            let name = format!("deaf{}", proto.name().to_lowercase());
            let mut events = vec![service(
                &name,
                &["10.96.0.9", "fd00:96::9"],
                proto,
                DEAF_PORT + u16::from(proto == Proto::Tcp),
            )];
            events.extend(REMOTE.map(|ip| endpoint(&name, proto, at(ip, 7), false)));
            driver.handle(events);
        }
        driver.step().expect("apply");
        for node in NODE {
            // No endpoints, and an endpoint that has nobody listening: told either way.
            for port in [EMPTY_PORT, DEAF_PORT + 1] {
                let refused = net.client.run(|| ask(at(node, port))).expect_err("nobody there");
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{port}");
            }
            for port in [EMPTY_PORT, DEAF_PORT] {
                let told = net.client.run(|| {
                    let socket = connected(at(node, port));
                    socket.send(b"who").expect("send");
                    socket.recv(&mut [0; 8]).expect_err("nobody there")
                });
                assert_eq!(told.kind(), ErrorKind::ConnectionRefused, "{port}");
            }
            // Endpoints elsewhere only, and they must not be used: silence.
            let short = Duration::from_millis(300);
            let silent = net.client.run(|| TcpStream::connect_timeout(&at(node, ELSEWHERE_PORT), short));
            assert_eq!(silent.expect_err("dropped").kind(), ErrorKind::TimedOut);
        }
        assert_eq!(net.world.counted("rejected_no_endpoints"), 4);
        assert!(net.world.counted("no_local_endpoints") >= 2);
        assert!(net.world.counted("icmp_error_translated") >= 2);
        net.no_trouble();
    });
}

#[test]
fn service_packet_pods_are_balanced_at_their_devices() {
    isolated(module_path!(), "service_packet_pods_are_balanced_at_their_devices", |cgroup| {
        let net = Net::new(cgroup);
        let driver = net.driver(8080);
        for n in 0..2 {
            let remote = at(["10.96.0.2", "fd00:96::2"][n], 80);
            for (from, own, to, server, peer) in [
                (&net.other_pod, OTHER_POD[n], at(CLUSTER[n], 80), POD[n], OTHER_POD[n]),
                // The other node can't answer pods of this one but by the default route, as it does here.
                (&net.other_pod, OTHER_POD[n], remote, REMOTE[n], OTHER_POD[n]),
                // Itself through the service.
                (&net.pod, POD[n], at(CLUSTER[n], 80), POD[n], NODE[n]),
                // By addresses from outside: as from inside.
                (&net.other_pod, OTHER_POD[n], at(BALANCER[n], 80), POD[n], OTHER_POD[n]),
                (&net.other_pod, OTHER_POD[n], at(NODE[n], ELSEWHERE_PORT), REMOTE[n], OTHER_POD[n]),
            ] {
                let heard = from.run(|| ask(to)).unwrap_or_else(|e| panic!("{own} to {to}: {e}"));
                assert_eq!(heard, (server.to_owned(), peer.to_owned()), "{own} to {to}");
                assert_eq!(from.run(|| ask_udp(&udp_client(to), to)), server, "{own} to {to}");
            }
        }
        // What comes from outside to a cluster IP is not balanced.
        let silent = net
            .client
            .run(|| TcpStream::connect_timeout(&at(CLUSTER[0], 80), Duration::from_millis(300)).map(drop));
        assert!(silent.is_err());
        net.no_trouble();
        drop(driver);
    });
}

#[test]
fn service_packet_fragments_and_large_packets() {
    isolated(module_path!(), "service_packet_fragments_and_large_packets", |cgroup| {
        let net = Net::new(cgroup);
        let driver = net.driver(9090);
        let sent: Vec<u8> = (0..5000_u32).map(|n| (n % 251) as u8).collect();
        let exchange = |to: SocketAddr| {
            net.client.run(|| {
                let socket = connected(to);
                socket.send(&sent).expect("send");
                let mut heard = vec![0; 65_536];
                let len = socket.recv(&mut heard).unwrap_or_else(|e| panic!("{to}: {e}"));
                assert!(heard[..len] == sent, "{to}");
            });
        };
        for node in NODE {
            exchange(at(node, LOCAL_PORT));
            exchange(at(node, REMOTE_PORT));
        }
        // A narrow way to the other node: who sends too much is told.
        ip(&["link", "set", "up1", "mtu", "1400"]);
        net.other.ip(&["link", "set", "eth0", "mtu", "1400"]);
        for node in NODE {
            let to = at(node, REMOTE_PORT);
            net.client.run(|| {
                let socket = connected(to);
                socket.set_read_timeout(Some(Duration::from_millis(200))).expect("set a timeout");
                // The first one is lost, and tells the client's kernel to send smaller ones from then on.
                let heard = (0..50).find_map(|_| {
                    socket.send(&sent[..1440]).expect("send");
                    socket.recv(&mut [0; 2048]).ok()
                });
                assert_eq!(heard, Some(1440), "{to}");
            });
        }
        assert!(net.world.counted("packet_too_big") >= 2);
        net.no_trouble();
        drop(driver);
    });
}

#[test]
fn service_packet_connections_outlive_changes_of_their_service() {
    isolated(module_path!(), "service_packet_connections_outlive_changes_of_their_service", |cgroup| {
        let net = Net::new(cgroup);
        let mut driver = net.driver(9090);
        let mut held: Vec<TcpStream> = Vec::new();
        for node in NODE {
            for port in [LOCAL_PORT, REMOTE_PORT] {
                let open = || TcpStream::connect_timeout(&at(node, port), PATIENCE).expect("connect");
                held.push(net.client.run(open));
            }
        }
        let all_talk = |held: &mut [TcpStream]| {
            for stream in held {
                stream.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
                stream.write_all(b"still there?").expect("send");
                let mut heard = [0; 12];
                stream.read_exact(&mut heard).expect("hear");
                assert_eq!(&heard, b"still there?");
            }
        };
        all_talk(&mut held);
        // Another endpoint comes and the first one goes; then the services go.
        let names = ["local1", "remote1"];
        let moved = |name: &&str| OTHER_POD.map(|ip| endpoint(name, Proto::Tcp, at(ip, 9090), true));
        driver.handle(names.iter().flat_map(moved));
        driver.step().expect("apply");
        all_talk(&mut held);
        driver.handle(names.map(|name| Event::ServiceGone(format!("default/{name}").into())));
        driver.step().expect("apply");
        all_talk(&mut held);
        drop(driver);
        all_talk(&mut held);
        net.no_trouble();
    });
}

#[test]
fn service_packet_affinity_moved_datagrams_and_pods_that_come_later() {
    isolated(module_path!(), "service_packet_affinity_moved_datagrams_and_pods_that_come_later", |cgroup| {
        let net = Net::new(cgroup);
        let mut driver = net.driver(8080);
        // A client is bound to one of two endpoints, whatever it connects from.
        let mut bound = service("bound", &["10.96.3.1", "fd00:96:3::1"], Proto::Tcp, 30_090);
        if let Event::Service(service) = &mut bound {
            service.affinity_timeout_s = 100;
        }
        let mut both = endpoint("bound", Proto::Tcp, at(POD[0], 8080), true);
        if let (Event::Slice(slice), Event::Slice(other)) =
            (&mut both, endpoint("bound", Proto::Tcp, at(REMOTE[0], 8080), false))
        {
            slice.endpoints = slice.endpoints.iter().chain(&other.endpoints).cloned().collect();
        }
        // Two services have one endpoint; one of them loses it.
        let mut events = vec![bound, both];
        for (name, ip, port) in [("left", "10.96.3.2", 30_091), ("kept", "10.96.3.3", 30_092)] {
            events.push(service(name, &[ip], Proto::Udp, port));
            events.push(endpoint(name, Proto::Udp, at(REMOTE[0], 8080), false));
        }
        driver.handle(events);
        driver.step().expect("apply");
        let ask_bound = || net.client.run(|| ask(at(NODE[0], 30_090))).expect("an answer").0;
        let first = ask_bound();
        assert!((0..20).all(|_| ask_bound() == first));

        let (left, kept) = (at(NODE[0], 30_091), at(NODE[0], 30_092));
        let sockets = net.client.run(|| [left, kept].map(udp_client));
        assert_eq!(ask_udp(&sockets[0], left), REMOTE[0]);
        assert_eq!(ask_udp(&sockets[1], kept), REMOTE[0]);
        driver.handle([endpoint("left", Proto::Udp, at(POD[0], 8080), true)]);
        driver.step().expect("apply");
        assert_eq!(ask_udp(&sockets[0], left), POD[0], "the socket's next datagram moves on");
        assert_eq!(ask_udp(&sockets[1], kept), REMOTE[0]);

        let node = NetNs::open("/proc/self/ns/net").expect("our own namespace");
        let late = ["10.244.0.7", "fd00:244::7"];
        let newcomer = pod(&node, "pod7", late);
        driver.tick().expect("repair");
        let heard = newcomer.run(|| ask(at(CLUSTER[0], 80))).expect("an answer");
        assert_eq!(heard, (POD[0].to_owned(), late[0].to_owned()));
        net.no_trouble();
    });
}

/// A TCP connection from port `from`, that was used for an answer and is reset when it is closed.
fn talk_from(from: u16, to: SocketAddr) -> std::io::Result<()> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    socket::setsockopt(&socket, sockopt::Linger, &linger)?;
    socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any, from)))?;
    // A connect is given up after this time, too.
    let patience = TimeVal::seconds(PATIENCE.as_secs() as i64);
    socket::setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"well?")?;
    stream.read_exact(&mut [0; 5])
}

#[test]
fn service_packet_a_client_port_is_used_again_past_the_service() {
    isolated(module_path!(), "service_packet_a_client_port_is_used_again_past_the_service", |cgroup| {
        let net = Net::new(cgroup);
        let driver = net.driver(9090);
        for n in 0..2 {
            // Through a service whose endpoint is here, and past it to the same endpoint, by turns and from one port.
            let (through, past) = (at(NODE[n], LOCAL_PORT), at(POD[n], 9090));
            for to in [through, past, through, through, past, past, through] {
                net.client
                    .run(|| talk_from(20_000, to))
                    .unwrap_or_else(|e| panic!("{to} from the same port again: {e}"));
            }
            // A masqueraded connection has its client's port on this node; this node's own come after it.
            let (through, past) = (at(NODE[n], REMOTE_PORT), at(REMOTE[n], 9090));
            for round in 0..3 {
                net.client.run(|| talk_from(20_001, through)).unwrap_or_else(|e| panic!("{through}: {e}"));
                talk_from(20_001, past).unwrap_or_else(|e| panic!("{past} in round {round}: {e}"));
            }
            // Datagrams: an answer that comes as another's is not heard by a connected socket.
            let (through, past) = (at(NODE[n], LOCAL_PORT), at(POD[n], 9090));
            let mut from = None;
            for to in [through, past, through] {
                net.client.run(|| {
                    let socket = connected_from(from.unwrap_or(0), to);
                    from = Some(socket.local_addr().expect("an address").port());
                    let end = Instant::now() + PATIENCE;
                    while socket.send(b"well?").is_err() || socket.recv(&mut [0; 8]).is_err() {
                        assert!(Instant::now() < end, "{to} from the same port again");
                        // Until the flow of the last socket counts as at rest.
                        std::thread::sleep(Duration::from_secs(2));
                    }
                });
            }
        }
        net.no_trouble();
        drop(driver);
    });
}
