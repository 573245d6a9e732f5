//! The table against a pretended kernel. Invariant under test: whatever the kernel held and whenever the agent died,
//! the changes lead to what is desired, and every single step in between shows whole sets of backends.

use super::*;
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr};

const CAPACITY: Capacity =
    Capacity { frontends4: 24, frontends6: 8, slots: 40, backends: 40, members: 40, ranges: 20, maglevs: 4 };

#[derive(Clone, Default)]
struct Kernel {
    frontends: BTreeMap<FrontendKey, FrontendEntry>,
    slots: Vec<(ServiceId, BackendId)>,
    backends: BTreeMap<BackendId, BackendAddr>,
}

/// One map operation.
enum Step {
    PutBackend(BackendId, BackendAddr),
    PutSlot(u32, ServiceId, BackendId),
    PutFrontend(FrontendKey, FrontendEntry),
    DeleteFrontend(FrontendKey),
    DeleteBackend(BackendId),
}

fn steps(changes: &Changes) -> Vec<Step> {
    let mut steps = Vec::new();
    steps.extend(changes.put_backends.iter().map(|(id, addr)| Step::PutBackend(*id, *addr)));
    for run in &changes.put_runs {
        let slots = run.backends.iter().zip(run.base..);
        steps.extend(slots.map(|(backend, index)| Step::PutSlot(index, run.service, *backend)));
    }
    steps.extend(changes.put_frontends.iter().map(|(key, entry)| Step::PutFrontend(*key, *entry)));
    steps.extend(changes.delete_frontends.iter().map(|key| Step::DeleteFrontend(*key)));
    steps.extend(changes.delete_backends.iter().map(|id| Step::DeleteBackend(*id)));
    steps
}

impl Kernel {
    fn apply(&mut self, step: Step) {
        match step {
            Step::PutBackend(id, addr) => {
                self.backends.insert(id, addr);
                assert!(self.backends.len() <= CAPACITY.backends as usize, "backends full");
            }
            Step::PutSlot(index, service, backend) => {
                assert!(index < CAPACITY.slots);
                self.slots.resize(self.slots.len().max(index as usize + 1), (0, 0));
                self.slots[index as usize] = (service, backend);
            }
            Step::PutFrontend(key, entry) => {
                self.frontends.insert(key, entry);
                let v6 = self.frontends.keys().filter(|k| k.addr.is_ipv6()).count();
                assert!(v6 <= CAPACITY.frontends6 as usize);
                assert!(self.frontends.len() - v6 <= CAPACITY.frontends4 as usize, "frontends full");
            }
            Step::DeleteFrontend(key) => assert!(self.frontends.remove(&key).is_some(), "deleted twice"),
            Step::DeleteBackend(id) => assert!(self.backends.remove(&id).is_some(), "deleted twice"),
        }
    }

    /// What a program sees at a frontend: the backends and their kinds, or nothing when anything does not fit.
    fn shown(&self, key: &FrontendKey) -> Option<(Vec<BackendAddr>, [u16; 4], FrontendPolicy)> {
        let entry = self.frontends.get(key)?;
        let run = entry.run();
        let slots = self.slots.get(run.base as usize..(run.base + run.len) as usize)?;
        let backends: Option<Vec<_>> = slots
            .iter()
            .map(|(owner, id)| if *owner == entry.service { self.backends.get(id).copied() } else { None })
            .collect();
        Some((backends?, entry.counts, entry.policy))
    }

    fn observe(&self) -> Observed {
        Observed {
            frontends: self.frontends.iter().map(|(k, v)| (*k, *v)).collect(),
            slots: self.slots.clone(),
            backends: self.backends.iter().map(|(k, v)| (*k, *v)).collect(),
            ..Observed::default()
        }
    }
}

fn backend(n: u8) -> BackendAddr {
    BackendAddr { addr: Ipv4Addr::new(10, 244, 0, n).into(), port: 8080, proto: Proto::Tcp }
}

fn frontend(n: u8) -> FrontendKey {
    FrontendKey { addr: Ipv4Addr::new(10, 96, 0, n).into(), port: 80, proto: Proto::Tcp }
}

fn port(frontends: &[u8], ready: &[u8], terminating: &[u8]) -> DesiredPort {
    DesiredPort {
        frontends: frontends.iter().map(|n| (frontend(*n), FrontendPolicy::default())).collect(),
        backends: ready.iter().chain(terminating).map(|n| backend(*n)).collect(),
        counts: Counts {
            local_ready: ready.len(),
            local_terminating: terminating.len(),
            ..Counts::default()
        },
        source_ranges: Vec::new(),
    }
}

fn key(n: u8) -> ObjectKey {
    format!("default/s{n}").into()
}

/// Sets one service and runs the changes against the kernel.
fn set(
    table: &mut Table,
    kernel: &mut Kernel,
    n: u8,
    ports: &[DesiredPort],
) -> Result<Vec<Refusal>, Refusal> {
    let mut changes = Changes::default();
    let result = table.set(&key(n), ports, &mut changes);
    steps(&changes).into_iter().for_each(|step| kernel.apply(step));
    table.settle();
    result
}

fn empty() -> (Table, Kernel) {
    (Table::adopt(CAPACITY, &Observed::default()), Kernel::default())
}

#[test]
fn an_unchanged_service_costs_nothing_also_after_a_restart() {
    let (mut table, mut kernel) = empty();
    let wanted = [port(&[1, 2], &[1, 2], &[3])];
    set(&mut table, &mut kernel, 1, &wanted).unwrap();
    let before = kernel.frontends.clone();
    for mut table in [table, Table::adopt(CAPACITY, &kernel.observe())] {
        let mut changes = Changes::default();
        table.set(&key(1), &wanted, &mut changes).unwrap();
        table.sweep(&mut changes);
        assert!(changes.is_empty(), "{changes:?}");
    }
    assert_eq!(before, kernel.frontends);
}

#[test]
fn one_endpoint_more_is_one_backend_one_run_and_a_flip_a_frontend() {
    let (mut table, mut kernel) = empty();
    set(&mut table, &mut kernel, 1, &[port(&[1, 2], &[1, 2], &[])]).unwrap();
    let id = kernel.frontends[&frontend(1)].service;
    let mut changes = Changes::default();
    table.set(&key(1), &[port(&[1, 2], &[1, 2, 3], &[])], &mut changes).unwrap();
    assert_eq!(changes.put_backends.len(), 1);
    assert_eq!(changes.put_runs.len(), 1);
    assert_eq!(changes.put_frontends.len(), 2);
    assert!(changes.delete_frontends.is_empty() && changes.delete_backends.is_empty());
    assert_eq!(changes.put_frontends[&frontend(1)].service, id, "ids stay");
}

#[test]
fn a_backend_shared_by_two_services_lives_until_the_last_one_goes() {
    let (mut table, mut kernel) = empty();
    set(&mut table, &mut kernel, 1, &[port(&[1], &[7], &[])]).unwrap();
    set(&mut table, &mut kernel, 2, &[port(&[2], &[7], &[])]).unwrap();
    assert_eq!(kernel.backends.len(), 1);
    set(&mut table, &mut kernel, 1, &[]).unwrap();
    assert_eq!(kernel.shown(&frontend(2)).unwrap().0, [backend(7)]);
    set(&mut table, &mut kernel, 2, &[]).unwrap();
    assert!(kernel.backends.is_empty() && kernel.frontends.is_empty());
    assert_eq!(table.usage().slots, 0);
}

#[test]
fn a_taken_frontend_is_refused_and_the_rest_goes_in() {
    let (mut table, mut kernel) = empty();
    set(&mut table, &mut kernel, 1, &[port(&[1], &[1], &[])]).unwrap();
    let refusals = set(&mut table, &mut kernel, 2, &[port(&[1, 2], &[2], &[])]).unwrap();
    assert_eq!(refusals, [Refusal::Taken { frontend: frontend(1), owner: key(1) }]);
    assert_eq!(kernel.shown(&frontend(1)).unwrap().0, [backend(1)]);
    assert_eq!(kernel.shown(&frontend(2)).unwrap().0, [backend(2)]);
}

#[test]
fn full_tables_refuse_and_leave_what_was_there() {
    let (mut table, mut kernel) = empty();
    let many: Vec<u8> = (1..=30).collect();
    set(&mut table, &mut kernel, 1, &[port(&[1], &many, &[])]).unwrap();
    let slots = set(&mut table, &mut kernel, 2, &[port(&[2], &many[..11], &[])]).unwrap_err();
    assert_eq!(slots, Refusal::Full { what: "slots", capacity: 40 });
    let more: Vec<u8> = (101..=111).collect();
    let backends = set(&mut table, &mut kernel, 2, &[port(&[2], &more, &[])]).unwrap_err();
    assert_eq!(backends, Refusal::Full { what: "backends", capacity: 40 });
    let frontends: Vec<u8> = (2..=25).collect();
    let full = set(&mut table, &mut kernel, 2, &[port(&frontends, &[1], &[])]).unwrap_err();
    assert_eq!(full, Refusal::Full { what: "frontends", capacity: 24 });
    assert_eq!(kernel.frontends.len(), 1);
    set(&mut table, &mut kernel, 2, &[port(&[2], &many[..10], &[])]).unwrap();
}

#[test]
fn a_run_is_not_written_over_before_the_flip_is_in_the_kernel() {
    let (mut table, mut kernel) = empty();
    let many: Vec<u8> = (1..=20).collect();
    set(&mut table, &mut kernel, 1, &[port(&[1], &many, &[])]).unwrap();
    let mut changes = Changes::default();
    table.set(&key(1), &[port(&[1], &many[1..], &[])], &mut changes).unwrap();
    let refused = table.set(&key(2), &[port(&[2], &many[..3], &[])], &mut changes);
    assert_eq!(refused, Err(Refusal::Full { what: "slots", capacity: 40 }));
    steps(&changes).into_iter().for_each(|step| kernel.apply(step));
    table.settle();
    set(&mut table, &mut kernel, 2, &[port(&[2], &many[..3], &[])]).unwrap();
}

fn service(n: u8, frontends: &[u8]) -> Service {
    let ports = frontends.iter().map(|n| ServicePort {
        name: format!("p{n}").into(),
        port: u16::from(*n),
        node_port: if n % 2 == 0 { 30_000 + u16::from(*n) } else { 0 },
        proto: Proto::Tcp,
    });
    let ips: Vec<IpAddr> = if n == 3 {
        vec![Ipv4Addr::new(10, 96, 0, n).into(), "fd00:96::3".parse().unwrap()]
    } else {
        vec![Ipv4Addr::new(10, 96, 0, n).into()]
    };
    Service {
        key: key(n),
        cluster_ips: ips.into(),
        ports: ports.collect(),
        internal_local: n == 4,
        ..Service::default()
    }
}

fn slice(n: u8, of: u8, ports: &[u8], endpoints: &[(u8, bool, bool)]) -> Slice {
    let port =
        |n: &u8| SlicePort { name: format!("p{n}").into(), port: 8000 + u16::from(*n), proto: Proto::Tcp };
    Slice {
        key: format!("default/s{n}-slice").into(),
        service: key(of),
        ports: ports.iter().map(port).collect(),
        endpoints: endpoints
            .iter()
            .map(|(n, local, ready)| Endpoint {
                addr: Ipv4Addr::new(10, 244, 0, *n).into(),
                on_this_node: *local,
                readiness: if *ready { Readiness::Ready } else { Readiness::Terminating },
                hint: Hint::None,
            })
            .collect(),
        weight: 1,
        problems: Box::default(),
    }
}

fn event() -> impl Strategy<Value = Event> {
    let ports = || proptest::collection::btree_set(1_u8..5, 0..4);
    let endpoints = || proptest::collection::vec((0_u8..8, any::<bool>(), any::<bool>()), 0..6);
    prop_oneof![
        3 => (1_u8..6, ports()).prop_map(|(n, p)| Event::Service(service(n, &p.into_iter().collect::<Vec<_>>()))),
        1 => (1_u8..6).prop_map(|n| Event::ServiceGone(key(n))),
        5 => (1_u8..8, 1_u8..6, ports(), endpoints())
            .prop_map(|(n, of, p, e)| Event::Slice(slice(n, of, &p.into_iter().collect::<Vec<_>>(), &e))),
        1 => (1_u8..8).prop_map(|n| Event::SliceGone(format!("default/s{n}-slice").into())),
        1 => (0_u8..8).prop_map(|n| Event::Node(NodeFacts { addresses: vec![Ipv4Addr::new(10, 244, 0, n).into()] })),
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

type Shown = (Vec<BackendAddr>, [u16; 4], FrontendPolicy);

fn wanted(planner: &Planner) -> BTreeMap<FrontendKey, Vec<Shown>> {
    let mut all: BTreeMap<FrontendKey, Vec<Shown>> = BTreeMap::new();
    for service in planner.services.values() {
        let slices: Vec<_> = planner.slices.values().filter(|s| s.service == service.key).collect();
        for port in desired(service, slices.into_iter(), &planner.node) {
            let c = port.counts;
            let kinds = [c.local_ready, c.remote_ready, c.local_terminating, c.remote_terminating];
            let counts = kinds.map(|n| n as u16);
            for (key, policy) in port.frontends {
                all.entry(key).or_default().push((port.backends.clone(), counts, policy));
            }
        }
    }
    all
}

/// Applies changes one map operation at a time; every frontend that is there before and after must show one of the two.
fn apply_watched(kernel: &mut Kernel, changes: &Changes, until: usize) {
    let before: BTreeMap<_, _> = kernel.frontends.keys().map(|k| (*k, kernel.shown(k))).collect();
    let mut after = kernel.clone();
    steps(changes).into_iter().for_each(|step| after.apply(step));
    for step in steps(changes).into_iter().take(until) {
        kernel.apply(step);
        for (key, old) in &before {
            // Junk shows nothing to begin with.
            if old.is_none() || !after.frontends.contains_key(key) {
                continue;
            }
            let now = kernel.shown(key);
            assert!(now == *old || now == after.shown(key), "{key:?}: {now:?}");
        }
    }
}

fn settle_all(planner: &mut Planner, kernel: &mut Kernel) {
    for _ in 0..50 {
        let changes = planner.flush();
        apply_watched(kernel, &changes, usize::MAX);
        if !planner.applied() {
            return;
        }
    }
    // Refused services are tried again whenever something is freed; what tries without end would be a defect.
    panic!("does not come to rest");
}

fn check(planner: &Planner, kernel: &Kernel) {
    let wanted = wanted(planner);
    for (key, choices) in &wanted {
        match kernel.shown(key) {
            Some(shown) => {
                let fits = choices.contains(&shown);
                assert!(fits || !planner.refused.is_empty(), "{key:?}: {shown:?} is none of {choices:?}");
            }
            None => assert!(!planner.refused.is_empty(), "{key:?} is missing"),
        }
    }
    for key in kernel.frontends.keys() {
        assert!(wanted.contains_key(key) || !planner.refused.is_empty(), "{key:?} is left over");
    }
    if planner.refused.is_empty() {
        let used: BTreeSet<BackendId> = kernel
            .frontends
            .values()
            .flat_map(|e| kernel.slots[e.base as usize..][..e.run().len as usize].iter().map(|(_, id)| *id))
            .collect();
        assert_eq!(used, kernel.backends.keys().copied().collect(), "backends that nothing refers to");
        let slots: u32 = kernel
            .frontends
            .values()
            .map(|e| (e.service, e.run().len))
            .collect::<BTreeMap<_, _>>()
            .values()
            .sum();
        assert_eq!(planner.usage().slots, slots as usize);
    }
}

fn junk(kernel: &mut Kernel, a: u8, b: u8) {
    match a % 4 {
        0 => {
            let base = u32::from(b) % (CAPACITY.slots + 20);
            let entry = FrontendEntry {
                service: u32::from(b % 5),
                base,
                counts: [u16::from(b % 7), 0, 1, 0],
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
        _ => {
            if kernel.backends.len() < 30 {
                kernel.backends.insert(u32::from(b) + 1, backend(b));
            }
        }
    }
}

fn synced(planner: &mut Planner, services: &BTreeSet<ObjectKey>, slices: &BTreeSet<ObjectKey>) {
    planner.handle(Event::ServicesSynced(services.clone()));
    assert_eq!(planner.flush(), Changes::default(), "nothing may change before both watches told everything");
    planner.handle(Event::SlicesSynced(slices.clone()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_reachable_state_becomes_the_desired_one(moves in moves()) {
        let (table, mut kernel) = empty();
        let mut planner = Planner::new(table);
        synced(&mut planner, &BTreeSet::new(), &BTreeSet::new());
        for step in moves {
            let (events, share) = match step {
                Move::Events(events) => (events, None),
                Move::Crash(events, share) => (events, Some(share)),
                Move::Junk(a, b) => {
                    junk(&mut kernel, a, b);
                    (Vec::new(), Some(0))
                }
            };
            for event in events {
                planner.handle(event);
            }
            if let Some(share) = share {
                let changes = planner.flush();
                let until = steps(&changes).len() * usize::from(share) / 256;
                apply_watched(&mut kernel, &changes, until);
                // A new process: the model comes back by the watches.
                let mut next = Planner::new(Table::adopt(CAPACITY, &kernel.observe()));
                next.handle(Event::Node(planner.node.clone()));
                planner.services.values().for_each(|s| next.handle(Event::Service(s.clone())));
                planner.slices.values().for_each(|s| next.handle(Event::Slice(s.clone())));
                let services = planner.services.keys().cloned().collect();
                synced(&mut next, &services, &planner.slices.keys().cloned().collect());
                planner = next;
            }
            settle_all(&mut planner, &mut kernel);
            check(&planner, &kernel);
        }
    }
}

#[test]
fn ids_survive_a_restart_also_when_the_agent_died_between_two_flips() {
    let (mut table, mut kernel) = empty();
    let old = [port(&[1, 2], &[1, 2], &[])];
    let new = [port(&[1, 2], &[1, 3], &[])];
    set(&mut table, &mut kernel, 1, &old).unwrap();
    let id = kernel.frontends[&frontend(1)].service;
    let mut changes = Changes::default();
    table.set(&key(1), &new, &mut changes).unwrap();
    for step in steps(&changes) {
        let second = matches!(&step, Step::PutFrontend(key, _) if *key == frontend(2));
        if second {
            break;
        }
        kernel.apply(step);
    }
    let mut table = Table::adopt(CAPACITY, &kernel.observe());
    set(&mut table, &mut kernel, 1, &new).unwrap();
    for n in [1, 2] {
        assert_eq!(kernel.shown(&frontend(n)).unwrap().0, [backend(1), backend(3)]);
        assert_eq!(kernel.frontends[&frontend(n)].service, id);
    }
    let mut changes = Changes::default();
    table.sweep(&mut changes);
    steps(&changes).into_iter().for_each(|step| kernel.apply(step));
    table.settle();
    assert_eq!(table.usage().slots, 2);
    assert_eq!(kernel.backends.len(), 2);
}
