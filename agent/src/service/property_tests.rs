//! The planner against a pretended kernel. Invariant under test: whatever the kernel held and whenever the agent died, the
//! changes lead to what is desired, and every single step in between shows whole sets of backends.

use super::pretend::{CAPACITY, Kernel, Shown, steps};
use super::*;
use ipnetwork::IpNetwork;
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

fn key(n: u8) -> ObjectKey {
    format!("default/s{n}").into()
}

fn backend(n: u8) -> BackendAddr {
    BackendAddr { addr: Ipv4Addr::new(10, 244, 0, n).into(), port: 8080, proto: Proto::Tcp }
}

fn frontend(n: u8) -> FrontendKey {
    FrontendKey { addr: Ipv4Addr::new(10, 96, 0, n).into(), port: 80, proto: Proto::Tcp }
}

/// Odd ports are UDP.
fn proto(port: u8) -> Proto {
    if port % 2 == 1 { Proto::Udp } else { Proto::Tcp }
}

/// Bits of `traits`: what the service has beside cluster IPs.
mod has {
    pub(super) const AFFINITY: u8 = 1;
    pub(super) const INGRESS: u8 = 2;
    pub(super) const RANGES: u8 = 4;
    pub(super) const MAGLEV: u8 = 8;
    pub(super) const LOCAL: u8 = 16;
    pub(super) const OTHER_RANGES: u8 = 32;
}

fn service(n: u8, frontends: &[u8], traits: u8) -> Service {
    let ports = frontends.iter().map(|n| ServicePort {
        name: format!("p{n}").into(),
        port: u16::from(*n),
        node_port: if n % 2 == 0 { 30_000 + u16::from(*n) } else { 0 },
        proto: proto(*n),
    });
    let mut ips: Vec<IpAddr> = vec![Ipv4Addr::new(10, 96, 0, n).into()];
    if n == 3 {
        ips.push("fd00:96::3".parse().unwrap());
    }
    let is = |bit| traits & bit != 0;
    let mut ranges: Vec<IpNetwork> = Vec::new();
    for (bit, texts) in
        [(has::RANGES, ["10.0.0.0/8", "fd00::/8"]), (has::OTHER_RANGES, ["192.0.2.0/24", "10.0.0.0/16"])]
    {
        ranges.extend(texts.iter().filter(|_| is(bit)).map(|text| text.parse::<IpNetwork>().unwrap()));
    }
    // Two services may want the same address of a load balancer.
    let ingress: &[IpAddr] = &[Ipv4Addr::new(198, 51, 100, n % 3).into()];
    let extras = ServiceExtras {
        ingress_ips: if is(has::INGRESS) { ingress.into() } else { Box::default() },
        external_ips: if n == 5 { ingress.into() } else { Box::default() },
        source_ranges: ranges.into(),
        scheduler: if is(has::MAGLEV) { Scheduler::Maglev } else { Scheduler::Default },
        ..ServiceExtras::default()
    };
    Service {
        key: key(n),
        cluster_ips: ips.into(),
        ports: ports.collect(),
        internal_local: n == 4,
        external_local: is(has::LOCAL),
        affinity_timeout_s: if is(has::AFFINITY) { 60 } else { 0 },
        extras: (extras != ServiceExtras::default()).then(|| Box::new(extras)),
    }
}

type WantedEndpoint = (u8, bool, bool, Hint);

fn slice(n: u8, of: u8, ports: &[u8], endpoints: &[WantedEndpoint], weight: u8) -> Slice {
    let port =
        |n: &u8| SlicePort { name: format!("p{n}").into(), port: 8000 + u16::from(*n), proto: proto(*n) };
    let endpoint = |(n, local, ready, hint): &WantedEndpoint| Endpoint {
        addr: Ipv4Addr::new(10, 244, 0, *n).into(),
        on_this_node: *local,
        readiness: if *ready { Readiness::Ready } else { Readiness::Terminating },
        hint: *hint,
    };
    Slice {
        key: format!("default/s{n}-slice").into(),
        service: key(of),
        ports: ports.iter().map(port).collect(),
        endpoints: endpoints.iter().map(endpoint).collect(),
        weight,
        problems: Box::default(),
    }
}

fn event() -> impl Strategy<Value = Event> {
    let ports =
        || proptest::collection::btree_set(1_u8..5, 0..4).prop_map(|p| p.into_iter().collect::<Vec<_>>());
    let hint = prop_oneof![
        4 => Just(Hint::None), 2 => Just(Hint::Elsewhere), 2 => Just(Hint::Zone), 1 => Just(Hint::Node),
    ];
    // All with hints, or all without, more often than chance has it.
    let endpoints =
        (any::<bool>(), proptest::collection::vec((0_u8..8, any::<bool>(), any::<bool>(), hint), 0..6))
            .prop_map(|(plain, all)| -> Vec<WantedEndpoint> {
                let hint = |hint| match hint {
                    _ if plain => Hint::None,
                    Hint::None => Hint::Elsewhere,
                    hint => hint,
                };
                all.into_iter().map(|(n, local, ready, found)| (n, local, ready, hint(found))).collect()
            });
    let weight = prop_oneof![5 => Just(1_u8), 1 => Just(2_u8), 1 => Just(3_u8)];
    prop_oneof![
        3 => (1_u8..6, ports(), any::<u8>()).prop_map(|(n, p, traits)| Event::Service(service(n, &p, traits))),
        1 => (1_u8..6).prop_map(|n| Event::ServiceGone(key(n))),
        5 => (1_u8..8, 1_u8..6, ports(), endpoints, weight)
            .prop_map(|(n, of, p, e, w)| Event::Slice(slice(n, of, &p, &e, w))),
        1 => (1_u8..8).prop_map(|n| Event::SliceGone(format!("default/s{n}-slice").into())),
        1 => (0_u8..8).prop_map(|n| Event::Node(NodeFacts {
            addresses: vec![Ipv4Addr::new(10, 244, 0, n).into(), Ipv4Addr::new(10, 96, 0, n).into()],
        })),
    ]
}

#[derive(Clone, Debug)]
enum Move {
    Events(Vec<Event>),
    /// Apply only this share (of 256) of the next changes, then start anew from what the kernel holds.
    Crash(Vec<Event>, u8),
    /// Somebody wrote into the maps.
    Junk(u8, u8),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let events = || proptest::collection::vec(event(), 1..6);
    let one = prop_oneof![
        6 => events().prop_map(Move::Events),
        2 => (events(), any::<u8>()).prop_map(|(e, share)| Move::Crash(e, share)),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(a, b)| Move::Junk(a, b)),
    ];
    proptest::collection::vec(one, 1..25)
}

thread_local! {
    /// Tables that were computed already: they take their time.
    static PICKS: RefCell<HashMap<Vec<BackendAddr>, Arc<[u16]>>> = RefCell::default();
}

/// The table of a frontend, if its service wants one and policy Cluster has something to pick from.
fn picks(port: &DesiredPort, policy: &FrontendPolicy) -> Option<Arc<[u16]>> {
    let counts = &port.counts;
    let ready = counts.local_ready + counts.remote_ready;
    let cluster = if ready > counts.local_only {
        &port.backends[counts.local_only..ready]
    } else {
        &port.backends[ready..]
    };
    if policy.scheduler != Scheduler::Maglev || cluster.is_empty() {
        return None;
    }
    let fresh = || maglev::picks(cluster, 0);
    Some(PICKS.with_borrow_mut(|held| held.entry(cluster.to_vec()).or_insert_with(fresh).clone()))
}

/// All that the services want, whether there is room or not.
fn wanted(planner: &Planner) -> Vec<DesiredPort> {
    let (services, slices, node) = planner.parts();
    let of =
        |service: &Service| slices.iter().filter(|s| s.service == service.key).copied().collect::<Vec<_>>();
    services.iter().flat_map(|service| desired(service, of(service).into_iter(), node)).collect()
}

fn wanted_frontends(planner: &Planner) -> BTreeMap<FrontendKey, Vec<(Shown, DesiredPort)>> {
    let mut all: BTreeMap<FrontendKey, Vec<_>> = BTreeMap::new();
    for port in wanted(planner) {
        let c = port.counts;
        let kinds = [c.local_ready, c.remote_ready, c.local_terminating, c.remote_terminating];
        for (key, policy) in &port.frontends {
            let shown = Shown {
                backends: port.backends.clone(),
                counts: kinds.map(|n| n as u16),
                local_only: c.local_only as u16,
                policy: *policy,
                picks: picks(&port, policy),
            };
            all.entry(*key).or_default().push((shown, port.clone()));
        }
    }
    all
}

/// Applies changes one map operation at a time; every frontend that is there before and after must show one of the two.
fn apply_watched(kernel: &mut Kernel, changes: &Changes, until: usize) {
    let before: BTreeMap<_, _> = kernel
        .frontends
        .keys()
        .map(|k| (*k, (kernel.shown(k), kernel.ranges(k), kernel.has_members(k))))
        .collect();
    let mut after = kernel.clone();
    after.apply_all(changes);
    for step in steps(changes).into_iter().take(until) {
        kernel.apply(step);
        for (key, (old, old_ranges, had_members)) in &before {
            // Junk shows nothing to begin with.
            if old.is_none() || !after.frontends.contains_key(key) {
                continue;
            }
            let now = kernel.shown(key);
            assert!(now == *old || now == after.shown(key), "{key:?}: {now:?}");
            assert!(kernel.has_members(key) || !had_members, "{key:?} has backends that are no members");
            if let Some(now) = kernel.ranges(key) {
                let new = after.ranges(key);
                let whole =
                    |wanted: &Option<BTreeSet<_>>| wanted.as_ref().is_some_and(|w| now.is_superset(w));
                assert!(whole(old_ranges) || whole(&new), "{key:?} shuts out whom it lets in: {now:?}");
            }
        }
    }
}

/// UDP backends by service id, of frontends that show anything.
fn udp(kernel: &Kernel) -> BTreeSet<(ServiceId, BackendAddr)> {
    let udp = kernel.frontends.iter().filter(|(key, _)| key.proto == Proto::Udp);
    udp.filter_map(|(key, entry)| Some((entry.service, kernel.shown(key)?.backends)))
        .flat_map(|(id, backends)| backends.into_iter().map(move |backend| (id, backend)))
        .collect()
}

/// What UDP clients lost from `before` to `kernel` is told, and nothing else is.
fn check_lost(
    planner: &Planner,
    kernel: &Kernel,
    before: &BTreeSet<(ServiceId, BackendAddr)>,
    changes: &Changes,
) {
    let after = udp(kernel);
    assert!(changes.lost.is_disjoint(&after), "{:?} is still there", changes.lost);
    assert!(changes.lost.iter().all(|(_, backend)| backend.proto == Proto::Udp));
    let frontends = wanted_frontends(planner);
    let dormant = |id: ServiceId, backend: &BackendAddr| {
        let held = kernel.frontends.iter().filter(|(_, entry)| entry.service == id);
        held.filter_map(|(key, _)| frontends.get(key))
            .flatten()
            .any(|(_, port)| port.dormant.contains(backend))
    };
    for (id, backend) in before.difference(&after) {
        let told = changes.lost.contains(&(*id, *backend));
        assert!(
            told || dormant(*id, backend) || !planner.refused().is_empty(),
            "{id} lost {backend:?} in silence"
        );
    }
}

/// What a run of rounds is held to, beside its end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Watch {
    /// Whole sets in every step, and lost backends told.
    All,
    /// Whole sets in every step.
    Steps,
    /// Nothing: what somebody wrote into the maps may overlap with what was there.
    Nothing,
}

fn settle_all(planner: &mut Planner, kernel: &mut Kernel, watch: Watch) {
    for _ in 0..200 {
        let before = udp(kernel);
        let changes = planner.flush();
        if watch == Watch::Nothing {
            kernel.apply_all(&changes);
        } else {
            apply_watched(kernel, &changes, usize::MAX);
        }
        if watch == Watch::All {
            check_lost(planner, kernel, &before, &changes);
        }
        if !planner.passed_on() {
            return;
        }
    }
    // Refused services are tried again whenever something is freed; what tries without end would be a defect.
    panic!("does not come to rest");
}

fn check(planner: &Planner, kernel: &Kernel) {
    let wanted = wanted_frontends(planner);
    let whole = planner.refused().is_empty();
    for (key, choices) in &wanted {
        match kernel.shown(key) {
            Some(shown) => {
                let fits = choices.iter().any(|(wanted, _)| *wanted == shown);
                assert!(fits || !whole, "{key:?}: {shown:?} is none of {choices:?}");
            }
            None => assert!(!whole, "{key:?} is missing"),
        }
        assert!(kernel.has_members(key), "{key:?} has backends that are no members");
        if let Some(found) = kernel.ranges(key).filter(|_| whole) {
            let family = |range: &IpNetwork| range.is_ipv4() == key.addr.is_ipv4();
            assert!(found.iter().all(family), "{found:?} are of another family");
            let wanted = |port: &DesiredPort| port.source_ranges.iter().copied().collect::<BTreeSet<_>>();
            assert!(choices.iter().any(|(_, port)| wanted(port) == found), "{key:?}: {found:?}");
        }
    }
    for key in kernel.frontends.keys() {
        assert!(wanted.contains_key(key) || !whole, "{key:?} is left over");
    }
    if whole {
        nothing_is_left_over(planner, kernel);
    }
}

fn nothing_is_left_over(planner: &Planner, kernel: &Kernel) {
    let run = |entry: &FrontendEntry| {
        let run = entry.run();
        kernel.slots[run.base as usize..][..run.len as usize].iter().map(|(_, id)| *id)
    };
    let dormant: BTreeSet<BackendAddr> = wanted(planner).into_iter().flat_map(|port| port.dormant).collect();
    let used: BTreeSet<BackendId> = kernel.frontends.values().flat_map(run).collect();
    for (id, addr) in &kernel.backends {
        assert!(used.contains(id) || dormant.contains(addr), "nothing refers to backend {addr:?}");
    }
    let members: BTreeSet<_> = kernel
        .frontends
        .values()
        .filter(|entry| entry.policy.affinity_timeout_s != 0)
        .flat_map(|entry| run(entry).map(|id| (entry.service, id)))
        .collect();
    assert_eq!(members, kernel.members.keys().copied().collect(), "members of nobody");
    for ((service, backend), member) in &kernel.members {
        let entry = kernel.frontends.values().find(|entry| entry.service == *service).unwrap();
        let at = run(entry).position(|id| id == *backend).unwrap();
        let [local, remote, local_terminating, _] = entry.counts.map(usize::from);
        let ready = local + remote;
        assert_eq!(member.local, at < local || (at >= ready && at < ready + local_terminating));
        assert_eq!(member.ready, at < ready);
        let first = usize::from(entry.local_only);
        assert_eq!(member.cluster, if ready > first { (first..ready).contains(&at) } else { at >= ready });
    }
    let with_ranges: BTreeSet<ServiceId> = kernel
        .frontends
        .values()
        .filter(|entry| entry.policy.source_ranges)
        .map(|entry| entry.service)
        .collect();
    assert!(kernel.ranges.iter().all(|(id, _)| with_ranges.contains(id)), "ranges of nobody");
    let slots: BTreeMap<_, u32> = kernel.frontends.values().map(|e| (e.service, e.run().len)).collect();
    let maglevs: BTreeSet<MaglevId> =
        kernel.frontends.values().map(|e| e.maglev).filter(|id| *id != 0).collect();
    let usage = planner.usage();
    assert_eq!(usage.slots, slots.values().sum::<u32>() as usize);
    assert_eq!((usage.members, usage.ranges), (kernel.members.len(), kernel.ranges.len()));
    assert_eq!(usage.maglevs, maglevs.len());
}

fn junk(kernel: &mut Kernel, a: u8, b: u8) {
    match a % 7 {
        0 => {
            let base = u32::from(b) % (CAPACITY.slots + 20);
            let entry = FrontendEntry {
                service: u32::from(b % 5),
                base,
                counts: [u16::from(b % 7), 0, 1, 0],
                local_only: u16::from(b % 9),
                ..FrontendEntry::default()
            };
            if kernel.frontends.len() < 20 {
                kernel.frontends.insert(frontend(b), entry);
            }
        }
        1 => {
            if let Some(slot) = kernel.slots.get_mut(b as usize % CAPACITY.slots as usize) {
                *slot = (u32::from(a), u32::from(b));
            }
        }
        2 => {
            if let Some(id) = kernel.backends.keys().nth(b as usize % 8).copied() {
                kernel.backends.remove(&id);
            }
        }
        3 => {
            if kernel.members.len() < 20 {
                kernel.members.insert((u32::from(a % 9), u32::from(b % 9)), Member::default());
            }
        }
        4 => {
            let range = IpNetwork::new(Ipv4Addr::new(b, 0, 0, 0).into(), 8).unwrap();
            if kernel.ranges.len() < 10 {
                kernel.ranges.insert((u32::from(a % 9), range));
            }
        }
        5 => {
            // Any of the frontends may follow any table.
            if let Some(entry) = kernel.frontends.values_mut().nth(b as usize % 8) {
                entry.maglev = u32::from(b % 7);
            }
        }
        _ => {
            if kernel.backends.len() < 30 {
                kernel.backends.insert(u32::from(b) % CAPACITY.backends + 1, backend(b));
            }
        }
    }
}

fn synced(planner: &mut Planner, services: &BTreeSet<ObjectKey>, slices: &BTreeSet<ObjectKey>) {
    planner.handle(Event::ServicesSynced(services.clone()));
    assert_eq!(planner.flush(), Changes::default(), "nothing may change before both watches told everything");
    planner.handle(Event::SlicesSynced(slices.clone()));
}

fn adopt(kernel: &Kernel, services_per_round: usize) -> Planner {
    let abilities = Abilities { services_per_round, ..Abilities::ALL };
    Planner::new(Table::adopt(CAPACITY, &kernel.observe()).with_abilities(abilities))
}

/// A new process: the model comes back by the watches.
fn restarted(planner: &Planner, kernel: &Kernel, services_per_round: usize) -> Planner {
    let mut next = adopt(kernel, services_per_round);
    let (services, slices, node) = planner.parts();
    next.handle(Event::Node(node.clone()));
    services.iter().for_each(|s| next.handle(Event::Service((*s).clone())));
    slices.iter().for_each(|s| next.handle(Event::Slice((*s).clone())));
    let services = services.iter().map(|s| s.key.clone()).collect();
    synced(&mut next, &services, &slices.iter().map(|s| s.key.clone()).collect());
    next
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_reachable_state_becomes_the_desired_one(moves in moves(), services_per_round in 1_usize..8) {
        let mut kernel = Kernel::default();
        let mut planner = adopt(&kernel, services_per_round);
        synced(&mut planner, &BTreeSet::new(), &BTreeSet::new());
        for step in moves {
            let (events, share, watch) = match step {
                Move::Events(events) => (events, None, Watch::All),
                Move::Crash(events, share) => (events, Some(share), Watch::Steps),
                Move::Junk(a, b) => {
                    junk(&mut kernel, a, b);
                    (Vec::new(), Some(0), Watch::Nothing)
                }
            };
            for event in events {
                planner.handle(event);
            }
            if let Some(share) = share {
                let changes = planner.flush();
                let until = steps(&changes).len() * usize::from(share) / 256;
                apply_watched(&mut kernel, &changes, until);
                planner = restarted(&planner, &kernel, services_per_round);
            }
            settle_all(&mut planner, &mut kernel, watch);
            check(&planner, &kernel);
        }
    }
}
