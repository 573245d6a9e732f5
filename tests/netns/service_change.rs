//! What changes under live traffic: maps that grow, data planes that are swapped, tables that are full.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData, MapType};
use sheave_agent::dataplane::ebpf::{Origin, Outcome, Question, list, trace, versioned};
use sheave_agent::dataplane::{Driver, MapSizes, Mode, choice};
use sheave_agent::service::{Event, Proto, Service, ServiceExtras};
use sheave_ebpf_abi::{FlowSet, Plain as _, flow_elements};
use sheave_harness::{NetNs, isolated};

use crate::service_world::{World, address, at, chain, service, slice, synced};

const CLIENT: &str = "198.51.100.2";
const NODE: &str = "198.51.100.1";
const ROUTER: &str = "10.244.0.1";
const PODS: [&str; 2] = ["10.244.0.5", "10.244.0.6"];
const PATIENCE: Duration = Duration::from_secs(20);

/// The node (the test's own namespace), a client behind its uplink, and two pods' addresses behind one device that echo
/// lines for as long as a connection lives. Only processes in `served` are translated at the socket.
struct Place {
    client: NetNs,
    _pod: NetNs,
    served: PathBuf,
    world: World,
}

impl Place {
    fn new(cgroup: &Path) -> Self {
        let node = NetNs::open("/proc/self/ns/net").expect("our own namespace");
        let (client, pod) = (NetNs::new(), NetNs::new());
        node.veth("up0", &client, "eth0");
        node.veth("pod0", &pod, "eth0");
        for (ns, device, addr) in [
            (&node, "up0", NODE),
            (&node, "pod0", ROUTER),
            (&client, "eth0", CLIENT),
            (&pod, "eth0", PODS[0]),
        ] {
            ns.ip(&["addr", "add", &format!("{addr}/24"), "dev", device]);
        }
        pod.ip(&["addr", "add", &format!("{}/24", PODS[1]), "dev", "eth0"]);
        pod.ip(&["route", "add", "default", "via", ROUTER]);
        // What the node sends to a service needs a way before nftables translates it.
        node.ip(&["route", "add", "default", "via", CLIENT]);
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("forward");
        for addr in PODS {
            pod.run(|| echo_server(at(addr, 8080)));
        }
        let served = cgroup.join("served");
        fs::create_dir(&served).expect("a cgroup that nobody is in");
        let mut world = World::new(&served, &["up0"]);
        world.config.node_ips = vec![address(NODE)];
        Self { client, _pod: pod, served, world }
    }

    fn open(&self, events: Vec<Event>) -> Driver {
        let mut driver = Driver::open(&self.world.config).unwrap_or_else(|e| panic!("open: {}", chain(&e)));
        driver.handle(synced(events));
        driver.step().unwrap_or_else(|e| panic!("step: {}", chain(&e)));
        driver
    }

    fn outside(&self) -> Echo {
        self.client.run(|| Echo::connect(at(NODE, 30_080)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let gone = (0..200).any(|_| {
            let gone = fs::remove_dir(&self.served).is_ok();
            if !gone {
                std::thread::sleep(Duration::from_millis(10));
            }
            gone
        });
        if !gone {
            eprintln!("{} stays", self.served.display());
        }
    }
}

/// Echoes lines, with its own address before each.
fn echo_server(listen: SocketAddr) {
    let listener = TcpListener::bind(listen).unwrap_or_else(|e| panic!("bind {listen}: {e}"));
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let Ok(mut writer) = stream.try_clone() else { return };
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    if writer.write_all(format!("{} {line}\n", listen.ip()).as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// A connection that is kept.
struct Echo {
    stream: BufReader<TcpStream>,
    said: u32,
}

impl Echo {
    fn connect(to: SocketAddr) -> Self {
        let stream =
            TcpStream::connect_timeout(&to, PATIENCE).unwrap_or_else(|e| panic!("connect {to}: {e}"));
        stream.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        Self { stream: BufReader::new(stream), said: 0 }
    }

    /// Says something and returns which server echoed it.
    #[track_caller]
    fn talk(&mut self) -> String {
        self.said += 1;
        let text = format!("line {}\n", self.said);
        self.stream.get_mut().write_all(text.as_bytes()).expect("the connection lives");
        let mut answer = String::new();
        self.stream.read_line(&mut answer).expect("the connection lives");
        let (server, echoed) = answer.split_once(' ').expect("an echo");
        assert_eq!(echoed, text);
        server.to_owned()
    }
}

/// A process of the node in the served cgroup, with a connection that is kept.
struct Local {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Local {
    fn connect(place: &Place, ip: &str, port: u16) -> Self {
        let procs = place.served.join("cgroup.procs");
        let script = format!(
            "echo $$ > {} && exec 3<>/dev/tcp/{ip}/{port} && while read -r l; do echo \"$l\" >&3; read -r a <&3 || exit 1; \
             echo \"$a\"; done",
            procs.display()
        );
        let mut command = Command::new("bash");
        command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("start bash");
        let input = child.stdin.take().expect("its input");
        let output = BufReader::new(child.stdout.take().expect("its output"));
        Self { child, input, output }
    }

    #[track_caller]
    fn talk(&mut self) -> String {
        self.input.write_all(b"hello\n").expect("the process lives");
        let mut answer = String::new();
        self.output.read_line(&mut answer).expect("the process lives");
        let (server, echoed) = answer.split_once(' ').expect("an echo");
        assert_eq!(echoed, "hello\n");
        server.to_owned()
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // It has ended already when its connection broke.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn events() -> Vec<Event> {
    let mut events = vec![service("web", &["10.96.0.1"], Proto::Tcp, 30_080)];
    events.push(slice("web", Proto::Tcp, &PODS.map(|pod| at(pod, 8080))));
    events.push(sticky("sticky", "10.96.0.2"));
    events.push(slice("sticky", Proto::Tcp, &PODS.map(|pod| at(pod, 8080))));
    events
}

/// A service with session affinity.
fn sticky(name: &str, ip: &str) -> Event {
    let Event::Service(plain) = service(name, &[ip], Proto::Tcp, 0) else { panic!("a service") };
    Event::Service(Service { affinity_timeout_s: 600, ..plain })
}

/// Whom the trace says that a connect of the node to a service would get.
fn bound(place: &Place, to: &str) -> Vec<String> {
    let question = Question {
        from: None,
        origin: Some(Origin::Node),
        to: at(to, 80),
        proto: Proto::Tcp,
        pod_cidrs: Vec::new(),
    };
    let found = trace(&place.world.config.pin_dir, &question).unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(found.outcome, Outcome::Balanced, "{:?}", found.steps);
    found.candidates.iter().map(|at| at.address.ip().to_string()).collect()
}

fn entries(place: &Place, map: &str) -> u32 {
    let path = versioned(&place.world.config.pin_dir).join(map);
    let data = MapData::from_pin(path).unwrap_or_else(|e| panic!("{map}: {e}"));
    data.info().expect("what the kernel says").max_entries()
}

fn link_ids(place: &Place) -> Vec<(String, u32)> {
    use aya::programs::links::{FdLink, PinnedLink};
    let dir = versioned(&place.world.config.pin_dir).join("links");
    let pins = fs::read_dir(dir).expect("the links").map(|entry| entry.expect("an entry"));
    let links = pins.filter(|entry| !entry.file_name().to_string_lossy().starts_with("clsact"));
    let mut ids: Vec<_> = links
        .map(|entry| {
            let link = FdLink::from(PinnedLink::from_pin(entry.path()).expect("a pinned link"));
            (entry.file_name().to_string_lossy().into_owned(), link.info().expect("its info").id())
        })
        .collect();
    ids.sort();
    ids
}

const SMALL: MapSizes = MapSizes {
    frontends: 16,
    slots: 64,
    backends: 16,
    flows: 4096,
    affinity: 4096,
    members: 16,
    ranges: 16,
    maglevs: 4,
};

#[test]
fn service_maps_grow_under_live_connections() {
    isolated(module_path!(), "service_maps_grow_under_live_connections", |cgroup| {
        let mut place = Place::new(cgroup);
        place.world.config.sizes = SMALL;
        drop(place.open(events()));
        assert_eq!(entries(&place, "shv_frontends4"), 16);
        let links = link_ids(&place);
        let mut outside = place.outside();
        let mut inside = Local::connect(&place, "10.96.0.1", 80);
        let mut sticking = Local::connect(&place, "10.96.0.2", 80);
        let servers = [outside.talk(), inside.talk(), sticking.talk()];
        assert_eq!(bound(&place, "10.96.0.2"), [servers[2].as_str()]);

        let done = AtomicBool::new(false);
        let larger =
            MapSizes { frontends: 1024, slots: 4096, backends: 1024, flows: 16_384, affinity: 8192, ..SMALL };
        place.world.config.sizes = larger;
        std::thread::scope(|scope| {
            // Talks all the time while the maps change.
            let talker = scope.spawn(|| {
                let mut rounds = 0;
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(outside.talk(), servers[0]);
                    rounds += 1;
                }
                rounds
            });
            drop(place.open(events()));
            done.store(true, Ordering::Relaxed);
            assert!(talker.join().expect("the connection lives") > 0);
        });
        for (map, wanted) in [
            ("shv_frontends4", 1024),
            ("shv_frontends6", 1024),
            ("shv_slots", 4096),
            ("shv_backends", 1024),
            ("shv_flows", flow_elements(16_384)),
            ("shv_affinity", 8192),
            ("shv_members", 16),
        ] {
            assert_eq!(entries(&place, map), wanted, "{map}");
        }
        assert!(!versioned(&place.world.config.pin_dir).join("grow").exists());
        assert_eq!(link_ids(&place), links, "links are updated in place");
        assert_eq!([outside.talk(), inside.talk(), sticking.talk()], servers, "every connection lives");
        assert_eq!(bound(&place, "10.96.0.2"), [servers[2].as_str()], "the client is still bound");
        // The programs at work are those over the new maps: what is new is seen by them.
        let mut more = events();
        more.push(service("late", &["10.96.0.9"], Proto::Tcp, 0));
        more.push(slice("late", Proto::Tcp, &[at(PODS[1], 8080)]));
        drop(place.open(more));
        assert_eq!(Local::connect(&place, "10.96.0.9", 80).talk(), PODS[1]);
        assert!(PODS.contains(&place.outside().talk().as_str()));

        // A smaller size is not followed: it would lose what the map holds.
        place.world.config.sizes = SMALL;
        drop(place.open(events()));
        assert_eq!(entries(&place, "shv_flows"), flow_elements(16_384));
        assert_eq!([outside.talk(), inside.talk(), sticking.talk()], servers);
    });
}

/// What the connection table holds, as bytes of keys and values.
fn flows(place: &Place) -> Vec<([u8; 40], [u8; 52])> {
    let data = MapData::from_pin(versioned(&place.world.config.pin_dir).join("shv_flows")).expect("flows");
    let sets: Array<_, [u8; FlowSet::SIZE]> =
        Map::from_map_data(data).expect("an array").try_into().expect("sets");
    let mut found = Vec::new();
    for index in 1..sets.len() {
        let set = FlowSet::from_bytes(&sets.get(&index, 0).expect("a set")).expect("a whole set");
        assert_eq!(set.lock, 0, "nobody is at it");
        for (entry, tag) in set.entries.iter().zip(set.tags).filter(|(_, tag)| *tag != 0) {
            assert_eq!(entry.tag, tag, "an entry is whole");
            let bytes = entry.as_bytes();
            let pair = (bytes.first_chunk(), bytes.get(40..).and_then(<[u8]>::first_chunk));
            found.push((*pair.0.expect("a key"), *pair.1.expect("a value")));
        }
    }
    found
}

/// A hash that evicts, with bytes of a key, bytes of a value and entries; aya makes none of this kind.
#[expect(unsafe_code, reason = "bpf(2)")]
fn lru_hash([key, value, entries]: [u32; 3]) -> MapData {
    /// BPF_MAP_CREATE and BPF_MAP_TYPE_LRU_HASH (uapi/linux/bpf.h).
    const CREATE: libc::c_int = 0;
    const LRU_HASH: u32 = 9;
    let attr = [LRU_HASH, key, value, entries, 0];
    // SAFETY: the call reads as many bytes as it is told, and the descriptor that it gives is nobody else's.
    let fd = unsafe {
        let fd = libc::syscall(libc::SYS_bpf, CREATE, attr.as_ptr(), size_of_val(&attr));
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    };
    MapData::from_fd(fd).expect("a map")
}

/// Puts maps in the places of the pinned ones as earlier builds made them: backends in a hash, whose ids only ever grew, and
/// flows in one that evicts.
fn lay_out_as_before(place: &Place, stray: u32) {
    /// BPF_F_NO_PREALLOC (uapi/linux/bpf.h).
    const NO_PREALLOC: u32 = 1;
    let dir = versioned(&place.world.config.pin_dir);
    let pinned = |name: &str| {
        let data = MapData::from_pin(dir.join(name)).expect("a pinned map");
        Map::from_map_data(data).expect("an array")
    };
    let rows: Array<_, [u8; 24]> = pinned("shv_backends").try_into().expect("rows of backends");
    let mut hash: HashMap<MapData, u32, [u8; 24]> = HashMap::create(1024, NO_PREALLOC).expect("a hash");
    let held = (0..rows.len()).map(|id| (id, rows.get(&id, 0).expect("a row")));
    for (id, row) in held.filter(|(_, row)| *row != [0; 24]) {
        hash.insert(id, row, 0).expect("insert");
        let mut row = row;
        row[16..20].copy_from_slice(&stray.to_ne_bytes());
        hash.insert(stray, row, 0).expect("insert");
    }
    let rows: Array<_, [u8; 8]> = pinned("shv_slots").try_into().expect("slots");
    let mut slots: Array<MapData, [u8; 8]> = Array::create(rows.len(), 0).expect("an array");
    for index in 0..rows.len() {
        slots.set(index, rows.get(&index, 0).expect("a slot"), 0).expect("set");
    }
    let mut hash_of_flows: HashMap<MapData, [u8; 40], [u8; 52]> =
        Map::from_map_data(lru_hash([40, 52, 4096])).expect("a map").try_into().expect("a hash");
    for (key, flow) in flows(place) {
        hash_of_flows.insert(key, flow, 0).expect("insert");
    }
    for name in ["shv_backends", "shv_slots", "shv_flows"] {
        fs::remove_file(dir.join(name)).expect("unpin");
    }
    hash.pin(dir.join("shv_backends")).expect("pin");
    slots.pin(dir.join("shv_slots")).expect("pin");
    hash_of_flows.pin(dir.join("shv_flows")).expect("pin");
}

#[test]
fn service_maps_of_an_earlier_build_are_laid_out_anew() {
    const STRAY: u32 = 300_000;
    isolated(module_path!(), "service_maps_of_an_earlier_build_are_laid_out_anew", |cgroup| {
        let mut place = Place::new(cgroup);
        place.world.config.sizes = MapSizes { slots: 4096, backends: 1024, ..SMALL };
        drop(place.open(events()));
        let (links, rows) = (link_ids(&place), list(&place.world.config.pin_dir).expect("list"));
        assert!(rows.iter().all(|row| !row.inconsistent && row.ready.len() == 2), "{rows:?}");
        let (mut outside, mut inside) = (place.outside(), Local::connect(&place, "10.96.0.1", 80));
        let mut sticking = Local::connect(&place, "10.96.0.2", 80);
        let servers = [outside.talk(), inside.talk(), sticking.talk()];

        let held: BTreeSet<_> = flows(&place).into_iter().collect();
        assert_eq!(held.len(), 2, "both entries of the one from outside");
        lay_out_as_before(&place, STRAY);
        assert_eq!(
            list(&place.world.config.pin_dir).expect("list"),
            rows,
            "an earlier build's maps are read too"
        );
        place.world.config.sizes = SMALL;
        let driver = place.open(events());
        for (map, most) in
            [("shv_backends", STRAY), ("shv_slots", 4095), ("shv_flows", flow_elements(4096) - 1)]
        {
            let data = MapData::from_pin(versioned(&place.world.config.pin_dir).join(map)).expect("pinned");
            let info = data.info().expect("what the kernel says");
            assert_eq!(info.map_type().expect("a type"), MapType::Array, "{map}");
            assert_eq!(info.max_entries(), most + 1, "{map}: nothing that was there has no place");
        }
        assert_eq!(list(&place.world.config.pin_dir).expect("list"), rows, "ids stay");
        assert_eq!(link_ids(&place), links, "links are updated in place");
        assert_eq!(flows(&place).into_iter().collect::<BTreeSet<_>>(), held, "flows are the same");
        assert_eq!([outside.talk(), inside.talk(), sticking.talk()], servers, "every connection lives");
        assert_eq!(bound(&place, "10.96.0.2"), [servers[2].as_str()], "the client is still bound");
        assert!(PODS.contains(&place.outside().talk().as_str()));
        drop(driver);
        // What nobody refers to is gone; its id may be given out again, not that of one at work.
        let mut more = events();
        more.push(service("late", &["10.96.0.9"], Proto::Tcp, 0));
        more.push(slice("late", Proto::Tcp, &[at("10.244.0.7", 8080)]));
        drop(place.open(more));
        let now = list(&place.world.config.pin_dir).expect("list");
        assert_eq!(now.iter().filter(|row| !rows.contains(row)).count(), 1, "{now:?}");
        assert_eq!([outside.talk(), inside.talk(), sticking.talk()], servers);
    });
}

/// Tables of ours that nftables has in this namespace, once their maps are gone: old `nft` programs can't read those.
fn nft_tables() -> Vec<String> {
    checked_nft(&["list", "tables"])
        .lines()
        .filter(|line| line.contains("sheave"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn service_data_planes_are_swapped_under_live_connections() {
    if !sheave_harness::require_program("nft") {
        return;
    }
    isolated(module_path!(), "service_data_planes_are_swapped_under_live_connections", |cgroup| {
        let mut place = Place::new(cgroup);
        let run_dir = tempfile::tempdir().expect("a run directory");
        place.world.config.run_dir = Some(run_dir.path().to_owned());
        place.world.config.mode = Some(Mode::Ebpf);
        drop(place.open(events()));
        let mut first = Local::connect(&place, "10.96.0.1", 80);
        let server = first.talk();

        place.world.config.mode = Some(Mode::Nftables);
        let driver = place.open(events());
        assert_eq!(driver.mode(), Mode::Nftables);
        drop(driver);
        assert!(!versioned(&place.world.config.pin_dir).exists(), "nothing of eBPF stays");
        let active = choice::active(run_dir.path()).expect("the record").expect("a record");
        assert!(active.mode == Mode::Nftables && active.leaving.is_empty(), "{active:?}");
        assert_eq!(first.talk(), server, "what a socket hook translated goes on without it");
        let mut second = Local::connect(&place, "10.96.0.1", 80);
        let mut outside = place.outside();
        let servers = [second.talk(), outside.talk()];

        place.world.config.mode = Some(Mode::Ebpf);
        let mut driver = place.open(events());
        assert_eq!(first.talk(), server);
        assert_eq!([second.talk(), outside.talk()], servers, "what conntrack translated goes on");
        assert!(PODS.contains(&place.outside().talk().as_str()), "a new one is balanced");
        let rules = checked_nft(&["list", "table", "inet", "sheave"]);
        assert!(
            !rules.contains("dnat") && rules.contains("drain-prerouting"),
            "nothing decides there: {rules}"
        );
        // Before they end, as a connection takes over the time that holds when its state changes.
        for state in ["time_wait", "close", "close_wait", "last_ack", "fin_wait"] {
            let knob = format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{state}");
            fs::write(&knob, "1").unwrap_or_else(|e| panic!("{knob}: {e}"));
        }
        drop((second, outside));
        sheave_harness::wait_until("nothing of nftables to stay", PATIENCE, || {
            driver.tick().map_err(|e| chain(&e))?;
            let tables = nft_tables();
            if tables.is_empty() { Ok(()) } else { Err(format!("{tables:?}")) }
        });
        let active = choice::active(run_dir.path()).expect("the record").expect("a record");
        assert!(active.mode == Mode::Ebpf && active.leaving.is_empty(), "{active:?}");
        assert_eq!(first.talk(), server);
    });
}

fn checked_nft(args: &[&str]) -> String {
    let output = Command::new("nft").args(args).output().expect("start nft");
    assert!(output.status.success(), "nft {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn service_full_tables_refuse_the_newcomer_alone() {
    isolated(module_path!(), "service_full_tables_refuse_the_newcomer_alone", |cgroup| {
        let mut place = Place::new(cgroup);
        place.world.config.sizes = MapSizes { members: 2, ranges: 1, maglevs: 2, ..SMALL };
        let mut driver = place.open(events());
        let mut inside = Local::connect(&place, "10.96.0.2", 80);
        inside.talk();
        assert!(driver.refused().is_empty(), "{:?}", driver.refused());

        driver.handle([sticky("second", "10.96.0.3"), slice("second", Proto::Tcp, &[at(PODS[0], 8080)])]);
        let Event::Service(plain) = service("ranged", &["10.96.0.4"], Proto::Tcp, 0) else {
            panic!("a service")
        };
        let ranges = ["192.0.2.0/24", "203.0.113.0/24"].map(|range| range.parse().expect("a range"));
        let extras = ServiceExtras {
            ingress_ips: [address("198.51.100.77")].into(),
            source_ranges: ranges.into(),
            ..ServiceExtras::default()
        };
        driver.handle([Event::Service(Service { extras: Some(Box::new(extras)), ..plain })]);
        driver.step().unwrap_or_else(|e| panic!("step: {}", chain(&e)));
        let said = |driver: &Driver, name: &str| {
            let reasons = driver.refused().get(name).cloned().unwrap_or_default();
            reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        };
        let text = said(&driver, "default/second");
        assert!(text.contains("members") && text.contains("full"), "{:?}", driver.refused());
        let text = said(&driver, "default/ranged");
        assert!(text.contains("ranges") && text.contains("full"), "{:?}", driver.refused());
        driver.tick().unwrap_or_else(|e| panic!("tick: {}", chain(&e)));
        let figures = place.world.config.stats.snapshot();
        assert_eq!(figures.services_refused, 2);
        let full = figures.pressure.iter().find(|at| at.map == "members").expect("members are looked at");
        assert_eq!((full.entries, full.capacity), (2, 2));
        assert!(figures.pressure.iter().any(|at| at.map == "shv_flows" && at.capacity >= 4096));

        inside.talk();
        Local::connect(&place, "10.96.0.2", 80).talk();
        assert!(PODS.contains(&place.outside().talk().as_str()));

        // What goes makes room.
        driver.handle([
            Event::ServiceGone("default/sticky".into()),
            Event::ServiceGone("default/ranged".into()),
        ]);
        driver.step().unwrap_or_else(|e| panic!("step: {}", chain(&e)));
        assert!(driver.refused().is_empty(), "{:?}", driver.refused());
        assert_eq!(Local::connect(&place, "10.96.0.3", 80).talk(), PODS[0]);
    });
}

#[test]
fn service_connections_fill_the_tables_that_are_sampled() {
    isolated(module_path!(), "service_connections_fill_the_tables_that_are_sampled", |cgroup| {
        let mut place = Place::new(cgroup);
        place.world.config.sizes = SMALL;
        let mut driver = place.open(events());
        let held: Vec<Echo> = (0..50).map(|_| place.outside()).collect();
        driver.tick().unwrap_or_else(|e| panic!("tick: {}", chain(&e)));
        let figures = place.world.config.stats.snapshot();
        let flows = figures.pressure.iter().find(|at| at.map == "shv_flows").expect("flows are looked at");
        assert!((100..=200).contains(&flows.entries), "two entries a connection: {flows:?}");
        let mut first = held.into_iter().next().expect("a connection");
        first.talk();
        // Dropped connections are read to their end, so that the servers' threads end.
        first.stream.get_ref().shutdown(std::net::Shutdown::Write).expect("say the end");
        let mut rest = Vec::new();
        first.stream.read_to_end(&mut rest).expect("hear the end");
    });
}
