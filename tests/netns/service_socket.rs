//! Services for what starts on the node: real sockets in a private cgroup and network namespace.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use sheave_agent::dataplane::{Driver, list};
use sheave_agent::service::{Event, Proto};
use sheave_harness::{NetNs, isolated};

use crate::service_world::{
    World, ask, ask_udp, at, on_loopback, service, slice, synced, tcp_server, udp_client, udp_server,
};

const PODS: [&str; 4] = ["10.244.0.1", "10.244.0.2", "fd00:244::1", "fd00:244::2"];
const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

fn pods_v4() -> [SocketAddr; 2] {
    [at(PODS[0], 8080), at(PODS[1], 8080)]
}

fn pods_v6() -> [SocketAddr; 2] {
    [at(PODS[2], 8080), at(PODS[3], 8080)]
}

/// Two servers a family and protocol, a dual-stack TCP service and a dual-stack UDP service with NodePorts.
fn servers() -> Vec<Event> {
    on_loopback(&PODS);
    on_loopback(&NODE);
    for pod in pods_v4().into_iter().chain(pods_v6()) {
        tcp_server(pod);
        udp_server(pod);
    }
    let mut events = Vec::new();
    for (name, proto, ips) in [
        ("web", Proto::Tcp, ["10.96.0.10", "fd00:96::10"]),
        ("dns", Proto::Udp, ["10.96.0.11", "fd00:96::11"]),
    ] {
        events.push(service(name, &ips, proto, 30_080));
        events.push(slice(name, proto, &pods_v4()));
        events.push(slice(name, proto, &pods_v6()));
    }
    events
}

fn answers(to: SocketAddr) -> BTreeSet<String> {
    (0..60).map(|_| ask(to).unwrap_or_else(|e| panic!("connect to {to}: {e}")).0).collect()
}

fn both(pods: [SocketAddr; 2]) -> BTreeSet<String> {
    pods.iter().map(|pod| pod.ip().to_string()).collect()
}

#[test]
fn service_tcp_connections_reach_every_endpoint_and_show_the_service() {
    isolated(module_path!(), "service_tcp_connections_reach_every_endpoint_and_show_the_service", |cgroup| {
        let world = World::new(cgroup, &[]);
        let _driver = world.driver(servers());
        assert_eq!(answers(at("10.96.0.10", 80)), both(pods_v4()));
        assert_eq!(answers(at("fd00:96::10", 80)), both(pods_v6()));
        let mapped = ask(at("::ffff:10.96.0.10", 80)).expect("an IPv6 socket with an IPv4-mapped address");
        assert!(both(pods_v4()).contains(&mapped.0));
        assert_eq!(world.counted("connect_translated"), 121);
        assert_eq!(world.counted("getpeername_restored"), 121);
        // What is no service stays as it is.
        assert_eq!(ask(pods_v4()[0]).expect("straight to a pod").0, PODS[0]);
        assert_eq!(world.counted("connect_translated"), 121);
    });
}

/// The cookies of the sockets in the table of connected ones.
fn owner_map(world: &World) -> Array<MapData, u64> {
    let path = sheave_agent::dataplane::ebpf::versioned(&world.config.pin_dir).join("shv_peer_owners");
    let map = Map::from_map_data(MapData::from_pin(path).expect("pinned")).expect("an array");
    map.try_into().expect("of numbers")
}

fn owners(map: &Array<MapData, u64>) -> Vec<u64> {
    map.iter().map(|owner| owner.expect("an element")).filter(|cookie| *cookie != 0).collect()
}

/// Gives every place to the socket with this cookie.
fn give_all(map: &mut Array<MapData, u64>, cookie: u64) {
    (0..map.len()).for_each(|place| map.set(place, cookie, 0).expect("write an element"));
}

#[test]
fn service_peers_are_remembered_as_long_as_their_sockets() {
    isolated(module_path!(), "service_peers_are_remembered_as_long_as_their_sockets", |cgroup| {
        let world = World::new(cgroup, &[]);
        let _driver = world.driver(servers());
        let mut peers = owner_map(&world);
        let connect = |to| std::net::TcpStream::connect(to).expect("connect");
        let services = [at("10.96.0.10", 80), at("fd00:96::10", 80), at("::ffff:10.96.0.10", 80)];
        let held: Vec<_> = services.into_iter().map(|to| (to, connect(to))).collect();
        let straight = connect(pods_v4()[0]);
        assert_eq!(owners(&peers).len(), 3);
        for (to, stream) in &held {
            assert_eq!(stream.peer_addr().expect("its peer"), *to);
        }
        assert_eq!(straight.peer_addr().expect("its peer"), pods_v4()[0]);
        let twin = held[0].1.try_clone().expect("another descriptor");
        drop(held);
        assert_eq!(owners(&peers).len(), 1, "a socket is open until its last descriptor is closed");
        assert_eq!(twin.peer_addr().expect("its peer"), services[0]);
        drop(twin);
        assert_eq!(owners(&peers).len(), 0);
        // What finds no room there is remembered all the same, and the next one finds room again.
        give_all(&mut peers, u64::MAX);
        let others = owners(&peers);
        let late = services.map(|to| (to, connect(to)));
        for (to, stream) in &late {
            assert_eq!(stream.peer_addr().expect("its peer"), *to);
        }
        assert_eq!(owners(&peers), others);
        drop(late);
        give_all(&mut peers, 0);
        let stream = connect(services[0]);
        assert_eq!((owners(&peers).len(), stream.peer_addr().expect("its peer")), (1, services[0]));
    });
}

#[test]
fn service_udp_sockets_stay_with_one_endpoint_and_hear_the_service() {
    isolated(module_path!(), "service_udp_sockets_stay_with_one_endpoint_and_hear_the_service", |cgroup| {
        let world = World::new(cgroup, &[]);
        let _driver = world.driver(servers());
        for (to, pods) in [(at("10.96.0.11", 80), pods_v4()), (at("fd00:96::11", 80), pods_v6())] {
            let mut seen = BTreeSet::new();
            for _ in 0..40 {
                let socket = udp_client(to);
                let first = ask_udp(&socket, to);
                assert_eq!(ask_udp(&socket, to), first, "datagrams of one socket go to one endpoint");
                seen.insert(first);
            }
            assert_eq!(seen, both(pods));
            let connected = udp_client(to);
            connected.connect(to).expect("connect a UDP socket");
            assert_eq!(connected.peer_addr().expect("its peer"), to);
            connected.send(b"who").expect("send");
            let mut buffer = [0; 64];
            let (len, from) = connected.recv_from(&mut buffer).expect("an answer");
            assert_eq!(from, to);
            assert!(both(pods).contains(&String::from_utf8_lossy(&buffer[..len]).into_owned()));
        }
        assert_eq!(world.counted("sendmsg_translated"), 160);
    });
}

#[test]
fn service_one_udp_socket_hears_each_of_many_services_by_its_own_name() {
    isolated(
        module_path!(),
        "service_one_udp_socket_hears_each_of_many_services_by_its_own_name",
        |cgroup| {
            on_loopback(&PODS[..2]);
            let mut events = Vec::new();
            let targets: Vec<SocketAddr> = (0..6).map(|n| at(&format!("10.96.1.{n}"), 80)).collect();
            for (n, to) in targets.iter().enumerate() {
                let pod = at(PODS[n % 2], 9000 + n as u16);
                udp_server(pod);
                let name = format!("s{n}");
                events.push(service(&name, &[&to.ip().to_string()], Proto::Udp, 0));
                events.push(slice(&name, Proto::Udp, &[pod]));
            }
            let world = World::new(cgroup, &[]);
            let _driver = world.driver(events);
            let socket = udp_client(targets[0]);
            for _ in 0..3 {
                targets.iter().for_each(|to| drop(ask_udp(&socket, *to)));
            }
            // All sent before any is heard: answers are told apart by who sends them.
            for to in &targets {
                socket.send_to(b"who", to).expect("send");
            }
            let mut buffer = [0; 64];
            let heard: BTreeSet<SocketAddr> =
                targets.iter().map(|_| socket.recv_from(&mut buffer).expect("an answer").1).collect();
            assert_eq!(heard, targets.iter().copied().collect());
        },
    );
}

#[test]
fn service_node_ports_answer_on_the_nodes_addresses() {
    isolated(module_path!(), "service_node_ports_answer_on_the_nodes_addresses", |cgroup| {
        let world = World::new(cgroup, &[]);
        let events = servers();
        let _driver = world.driver(events);
        assert_eq!(answers(at(NODE[0], 30_080)), both(pods_v4()));
        assert_eq!(answers(at(NODE[1], 30_080)), both(pods_v6()));
        assert_eq!(answers(at("127.0.0.1", 30_080)), both(pods_v4()));
        assert_eq!(answers(at("::1", 30_080)), both(pods_v6()));
        for to in [at(NODE[0], 30_080), at(NODE[1], 30_080), at("127.0.0.1", 30_080)] {
            ask_udp(&udp_client(to), to);
        }
        // Another namespace's loopback is not the node's.
        let elsewhere = NetNs::new();
        let refused = elsewhere.run(|| ask(at("127.0.0.1", 30_080)));
        assert_eq!(
            refused.expect_err("no NodePort on a pod's loopback").kind(),
            ErrorKind::ConnectionRefused
        );
    });
}

#[test]
fn service_without_endpoints_refuses_at_once_and_says_so() {
    isolated(module_path!(), "service_without_endpoints_refuses_at_once_and_says_so", |cgroup| {
        let world = World::new(cgroup, &[]);
        let mut driver = world.driver(vec![
            service("tcp", &["10.96.0.20", "fd00:96::20"], Proto::Tcp, 30_090),
            service("udp", &["10.96.0.21", "fd00:96::21"], Proto::Udp, 30_091),
        ]);
        for to in [at("10.96.0.20", 80), at("fd00:96::20", 80), at("127.0.0.1", 30_090)] {
            let error = ask(to).expect_err("nobody serves");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
        }
        for to in [at("10.96.0.21", 80), at("fd00:96::21", 80)] {
            let error = udp_client(to).send_to(b"who", to).expect_err("nobody serves");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
            let error = udp_client(to).connect(to).expect_err("nobody serves");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
        }
        assert_eq!(world.counted("connect_no_endpoints"), 5);
        assert_eq!(world.counted("sendmsg_no_endpoints"), 2);
        // An endpoint comes, and it is served.
        on_loopback(&PODS[..1]);
        tcp_server(pods_v4()[0]);
        driver.handle([slice("tcp", Proto::Tcp, &pods_v4()[..1])]);
        driver.step().expect("apply");
        assert_eq!(ask(at("10.96.0.20", 80)).expect("served").0, PODS[0]);
    });
}

#[test]
fn service_changes_under_load_lose_no_connection() {
    isolated(module_path!(), "service_changes_under_load_lose_no_connection", |cgroup| {
        let world = World::new(cgroup, &[]);
        let mut driver = world.driver(servers());
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let mut count = 0_u32;
                        while !done.load(Ordering::Relaxed) {
                            ask(at("10.96.0.10", 80)).unwrap_or_else(|e| panic!("connection {count}: {e}"));
                            count += 1;
                        }
                        count
                    })
                })
                .collect();
            let [one, two] = pods_v4();
            for round in 0..600 {
                let endpoints: &[SocketAddr] = match round % 3 {
                    0 => &[one],
                    1 => &[two],
                    _ => &[one, two],
                };
                driver.handle([slice("web", Proto::Tcp, endpoints)]);
                driver.step().expect("apply");
            }
            done.store(true, Ordering::Relaxed);
            for client in clients {
                assert!(client.join().expect("no connection was lost") > 0);
            }
        });
        assert_eq!(world.counted("stale_slot"), 0);
        assert_eq!(world.counted("connect_no_endpoints"), 0);
    });
}

/// Names the directory of the pins to the process that plays the agent.
const AGENT: &str = "SHEAVE_TEST_AGENT_PINS";

/// The agent as a process of its own: fills the table, says so and waits to be killed.
fn play_agent(dir: &Path, cgroup: &Path) -> ! {
    let world = World::at(dir, cgroup, &[]);
    let _driver = world.driver(events_without_servers());
    println!("table is filled");
    loop {
        std::thread::park();
    }
}

fn events_without_servers() -> Vec<Event> {
    vec![
        service("web", &["10.96.0.10"], Proto::Tcp, 30_080),
        slice("web", Proto::Tcp, &pods_v4()),
        service("other", &["10.96.0.12"], Proto::Tcp, 0),
        slice("other", Proto::Tcp, &pods_v4()[..1]),
    ]
}

#[test]
fn service_outlives_a_killed_agent_and_the_next_one_adopts_it() {
    const NAME: &str = "service_outlives_a_killed_agent_and_the_next_one_adopts_it";
    isolated(module_path!(), NAME, |cgroup| {
        if let Some(dir) = std::env::var_os(AGENT) {
            play_agent(Path::new(&dir), cgroup);
        }
        on_loopback(&PODS[..2]);
        on_loopback(&NODE[..1]);
        pods_v4().into_iter().for_each(tcp_server);
        let world = World::new(cgroup, &[]);
        let dir = world.config.pin_dir.parent().expect("a parent").to_owned();
        let mut agent = Command::new(std::env::current_exe().expect("this program"))
            .args(std::env::args().skip(1))
            .env(AGENT, &dir)
            .stdout(Stdio::null())
            .spawn()
            .expect("start the agent");
        let wanted = both(pods_v4());
        sheave_harness::wait_for("the agent's table", || {
            ask(at("10.96.0.10", 80)).map_err(|e| format!("{e} ({:?})", agent.try_wait()))
        });
        agent.kill().expect("kill -9 the agent");
        agent.wait().expect("the agent's end");
        assert_eq!(answers(at("10.96.0.10", 80)), wanted, "balanced without an agent");
        let before = list(&world.config.pin_dir).expect("list the live maps");
        assert_eq!(before.len(), 3);

        // The next agent deletes nothing before it knows everything.
        let mut driver = Driver::open(&world.config).expect("adopt");
        driver.handle([Event::ServicesSynced(BTreeSet::new())]);
        driver.step().expect("nothing to do yet");
        assert_eq!(list(&world.config.pin_dir).expect("list"), before);
        drop(driver);

        let mut driver = Driver::open(&world.config).expect("adopt");
        let applied = || world.config.stats.snapshot().applies_total;
        let rounds = applied();
        driver.handle(synced(events_without_servers()));
        driver.step().expect("adopt what is there");
        assert_eq!(applied(), rounds, "an unchanged table is not written again");
        assert_eq!(list(&world.config.pin_dir).expect("list"), before, "ids are stable");

        driver.handle([Event::ServiceGone("default/other".into())]);
        driver.step().expect("remove one");
        let after = list(&world.config.pin_dir).expect("list");
        assert_eq!(after.iter().map(|row| row.service_id).collect::<BTreeSet<_>>().len(), 1);
        assert_eq!(answers(at("10.96.0.10", 80)), wanted);
    });
}

#[test]
fn service_links_that_were_severed_are_attached_again() {
    isolated(module_path!(), "service_links_that_were_severed_are_attached_again", |cgroup| {
        let inner = cgroup.join("inner");
        std::fs::create_dir(&inner).expect("a cgroup below ours");
        let world = World::new(&inner, &[]);
        let mut driver = world.driver(events_without_servers());
        on_loopback(&PODS[..2]);
        pods_v4().into_iter().for_each(tcp_server);
        // The cgroup goes and comes back, as when a node's slice is made anew.
        std::fs::remove_dir(&inner).expect("remove it");
        std::fs::create_dir(&inner).expect("make it again");
        driver.tick().expect("repair");
        std::fs::write(inner.join("cgroup.procs"), "0").expect("move in");
        let answer = ask(at("10.96.0.10", 80));
        std::fs::write(cgroup.join("cgroup.procs"), "0").expect("move out");
        assert!(both(pods_v4()).contains(&answer.expect("balanced again").0));
        drop(driver);
        drop(world);
        std::fs::remove_dir(&inner).expect("remove it");
    });
}

#[test]
fn service_pins_that_somebody_removed_are_made_again() {
    isolated(module_path!(), "service_pins_that_somebody_removed_are_made_again", |cgroup| {
        let world = World::new(cgroup, &[]);
        let mut driver = world.driver(events_without_servers());
        on_loopback(&PODS[..2]);
        on_loopback(&NODE[..1]);
        pods_v4().into_iter().for_each(tcp_server);
        sheave_agent::dataplane::uninstall(&world.config.pin_dir).expect("remove everything");
        assert!(
            std::net::TcpStream::connect_timeout(&at("10.96.0.10", 80), Duration::from_millis(200)).is_err()
        );
        driver.tick().expect("repair");
        assert_eq!(answers(at("10.96.0.10", 80)), both(pods_v4()));
        assert_eq!(answers(at(NODE[0], 30_080)), both(pods_v4()));
        assert!(world.counted("connect_translated") >= 120, "the new counters are read");
        driver.handle([slice("web", Proto::Tcp, &pods_v4()[..1])]);
        driver.step().expect("changes go into the new maps");
        assert_eq!(answers(at("10.96.0.10", 80)), BTreeSet::from([PODS[0].to_owned()]));
    });
}

#[test]
fn service_full_tables_are_said_and_everything_else_goes_on() {
    isolated(module_path!(), "service_full_tables_are_said_and_everything_else_goes_on", |cgroup| {
        on_loopback(&PODS[..1]);
        tcp_server(pods_v4()[0]);
        let world = World::new(cgroup, &[]);
        let mut events = events_without_servers();
        // One service with more endpoints than a run can count.
        let endpoints: Vec<SocketAddr> = (0..70_000_u32)
            .map(|n| at(&format!("10.{}.{}.{}", 128 + (n >> 16), n >> 8 & 255, n & 255), 1))
            .collect();
        events.push(service("huge", &["10.96.0.99"], Proto::Tcp, 0));
        events.push(slice("huge", Proto::Tcp, &endpoints));
        let driver = world.driver(events);
        let refused: Vec<_> = driver.refused().keys().map(ToString::to_string).collect();
        assert_eq!(refused, ["default/huge"]);
        assert_eq!(world.config.stats.snapshot().services_refused, 1);
        assert_eq!(ask(at("10.96.0.12", 80)).expect("the others are balanced").0, PODS[0]);
    });
}

/// What is outside of the cgroup is never touched: a process in the parent cgroup talks to no service.
#[test]
fn service_reaches_only_processes_of_its_cgroup() {
    isolated(module_path!(), "service_reaches_only_processes_of_its_cgroup", |cgroup| {
        let inner = cgroup.join("inner");
        std::fs::create_dir(&inner).expect("a cgroup below ours");
        let world = World::new(&inner, &[]);
        let driver = world.driver(events_without_servers());
        on_loopback(&["10.96.0.10"]);
        let own = TcpListener::bind("10.96.0.10:80").expect("listen on the service's address ourselves");
        let begun = Instant::now();
        std::net::TcpStream::connect("10.96.0.10:80").expect("connect, untranslated");
        own.accept().expect("it came to us");
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert_eq!(world.counted("connect_translated"), 0);
        drop(driver);
        drop(world);
        std::fs::remove_dir(&inner).expect("remove it");
    });
}

#[test]
fn service_pins_of_another_layout_are_refused() {
    isolated(module_path!(), "service_pins_of_another_layout_are_refused", |cgroup| {
        let world = World::new(cgroup, &[]);
        drop(world.driver(Vec::new()));
        let dir = sheave_agent::dataplane::ebpf::versioned(&world.config.pin_dir);
        std::fs::remove_file(dir.join("shv_slots")).expect("unpin a map");
        std::fs::rename(dir.join("shv_backends"), dir.join("shv_slots")).expect("put another in its place");
        let error = Driver::open(&world.config).err().expect("refused");
        let text = error.to_string();
        assert!(text.contains("shv_slots") && text.contains("another layout"), "{text}");
    });
}

#[test]
fn service_says_what_the_host_lacks() {
    isolated(module_path!(), "service_says_what_the_host_lacks", |cgroup| {
        let mut world = World::new(cgroup, &[]);
        let good = world.config.cgroup_path.replace("/proc".into());
        let error = Driver::open(&world.config).err().expect("no cgroup there").to_string();
        assert!(error.contains("cgroup2"), "{error}");
        world.config.cgroup_path = good;
        let pins = std::mem::replace(&mut world.config.pin_dir, "/proc/nowhere".into());
        let error = Driver::open(&world.config).err().expect("no bpffs there").to_string();
        world.config.pin_dir = pins;
        assert!(error.contains("/proc/nowhere"), "{error}");
        // The guard removes pins that were made; here none were.
        drop(world.driver(Vec::new()));
        drop(UdpSocket::bind("127.0.0.1:0").expect("sockets work as ever"));
    });
}
