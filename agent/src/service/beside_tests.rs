//! What services have beside slots, and what is refused. Invariant under test: it is there before the frontend that needs
//! it and gone after it, and what does not fit takes nothing else along.

use super::pretend::{CAPACITY, Kernel};
use super::*;
use std::net::Ipv4Addr;

fn backend(n: u8, proto: Proto) -> BackendAddr {
    BackendAddr { addr: Ipv4Addr::new(10, 244, 0, n).into(), port: 8080, proto }
}

fn frontend(n: u8, proto: Proto) -> FrontendKey {
    FrontendKey { addr: Ipv4Addr::new(10, 96, 0, n).into(), port: 80, proto }
}

/// A port with one frontend; `local` and `terminating` are of this node, `dormant` is elsewhere.
struct Port {
    frontend: u8,
    proto: Proto,
    policy: FrontendPolicy,
    local: Vec<u8>,
    terminating: Vec<u8>,
    dormant: Vec<u8>,
    ranges: Vec<&'static str>,
}

impl Port {
    fn new(frontend: u8, proto: Proto, local: &[u8]) -> Self {
        let policy = FrontendPolicy::default();
        let (terminating, dormant, ranges) = (vec![], vec![], vec![]);
        Self { frontend, proto, policy, local: local.to_vec(), terminating, dormant, ranges }
    }

    fn desired(&self) -> DesiredPort {
        let at = |n: &u8| backend(*n, self.proto);
        DesiredPort {
            frontends: vec![(frontend(self.frontend, self.proto), self.policy)],
            backends: self.local.iter().chain(&self.terminating).map(at).collect(),
            counts: Counts {
                local_ready: self.local.len(),
                local_terminating: self.terminating.len(),
                ..Counts::default()
            },
            dormant: self.dormant.iter().map(at).collect(),
            source_ranges: self.ranges.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }
}

struct World {
    table: Table,
    kernel: Kernel,
}

impl World {
    fn new(abilities: Abilities) -> Self {
        let table = Table::adopt(CAPACITY, &Observed::default()).with_abilities(abilities);
        Self { table, kernel: Kernel::default() }
    }

    /// Sets one service, applies that, and says what it was.
    fn set(&mut self, service: &str, ports: &[&Port]) -> (Changes, Result<Vec<Refusal>, Refusal>) {
        let ports: Vec<_> = ports.iter().map(|port| port.desired()).collect();
        let mut changes = Changes::default();
        let result = self.table.set(&service.into(), &ports, &mut changes);
        self.kernel.apply_all(&changes);
        self.table.settle();
        (changes, result)
    }

    /// Sets one service that is let in whole.
    fn put(&mut self, service: &str, ports: &[&Port]) {
        assert_eq!(self.set(service, ports).1, Ok(vec![]));
    }

    fn maglev(&self, n: u8) -> MaglevId {
        self.kernel.frontends[&frontend(n, Proto::Tcp)].maglev
    }
}

#[test]
fn members_follow_affinity_and_readiness() {
    let mut world = World::new(Abilities::ALL);
    let mut port = Port::new(1, Proto::Tcp, &[1, 2]);
    world.put("a", &[&port]);
    assert!(world.kernel.members.is_empty());
    port.policy.affinity_timeout_s = 60;
    let (changes, _) = world.set("a", &[&port]);
    assert_eq!((changes.put_members.len(), changes.put_slots.len()), (2, 0), "the run stays as it is");
    (port.local, port.terminating) = (vec![1], vec![2]);
    let (changes, _) = world.set("a", &[&port]);
    let member = Member { local: true, ready: false, cluster: false };
    assert_eq!(changes.put_members.values().collect::<Vec<_>>(), [&member], "only what changed is written");
    port.terminating.clear();
    assert_eq!(world.set("a", &[&port]).0.delete_members.len(), 1);
    port.policy.affinity_timeout_s = 0;
    world.put("a", &[&port]);
    assert!(world.kernel.members.is_empty());
    assert_eq!(world.table.usage().members, 0);
}

#[test]
fn ranges_are_those_of_the_service_while_its_frontend_asks_for_them() {
    let mut world = World::new(Abilities::ALL);
    let mut port = Port::new(1, Proto::Tcp, &[1]);
    port.policy.source_ranges = true;
    port.ranges = vec!["10.0.0.0/8", "10.0.0.0/8", "192.0.2.0/24"];
    assert_eq!(world.set("a", &[&port]).0.put_ranges.len(), 2);
    port.ranges = vec!["192.0.2.0/24", "198.51.100.0/24"];
    let (changes, _) = world.set("a", &[&port]);
    assert_eq!((changes.put_ranges.len(), changes.delete_ranges.len()), (1, 1));
    port.policy.source_ranges = false;
    world.put("a", &[&port]);
    assert!(world.kernel.ranges.is_empty());
    port.policy.source_ranges = true;
    world.put("a", &[&port]);
    world.put("a", &[]);
    assert!(world.kernel.ranges.is_empty() && world.table.usage().ranges == 0);
}

#[test]
fn udp_clients_lose_what_neither_is_ready_nor_serves() {
    let lost = |changes: &Changes| -> Vec<BackendAddr> { changes.lost.iter().map(|(_, at)| *at).collect() };
    for proto in [Proto::Udp, Proto::Sctp] {
        let mut world = World::new(Abilities::ALL);
        let mut port = Port::new(1, proto, &[1, 2, 3]);
        assert_eq!(lost(&world.set("a", &[&port]).0), []);
        (port.local, port.terminating) = (vec![1], vec![2]);
        assert_eq!(lost(&world.set("a", &[&port]).0), [backend(3, proto)]);
        port.terminating.clear();
        port.dormant = vec![2];
        assert_eq!(lost(&world.set("a", &[&port]).0), [], "it is kept for others, and what it has stays");
        assert!(world.kernel.backends.values().any(|at| *at == backend(2, proto)), "its id stays");
        port.dormant.clear();
        let (changes, _) = world.set("a", &[&port]);
        assert_eq!((lost(&changes), changes.put_slots.len()), (vec![backend(2, proto)], 0));
        assert_eq!(lost(&world.set("a", &[]).0), [backend(1, proto)], "the service went");
    }
    let mut world = World::new(Abilities::ALL);
    world.put("a", &[&Port::new(1, Proto::Tcp, &[1])]);
    assert_eq!(lost(&world.set("a", &[]).0), [], "TCP is left to resets");
    // One who was not there to see it learns it from what the kernel still holds.
    world.put("a", &[&Port::new(1, Proto::Udp, &[1, 2])]);
    world.table = Table::adopt(CAPACITY, &world.kernel.observe());
    assert_eq!(lost(&world.set("a", &[&Port::new(1, Proto::Udp, &[2])]).0), [backend(1, Proto::Udp)]);
}

#[test]
fn a_maglev_table_is_written_anew_and_then_flipped_to() {
    let mut world = World::new(Abilities::ALL);
    let mut port = Port::new(1, Proto::Tcp, &[1, 2]);
    port.policy.scheduler = Scheduler::Maglev;
    let (changes, _) = world.set("a", &[&port]);
    assert_eq!(*changes.put_maglevs[0].picks, *maglev::picks(&port.desired().backends, 0));
    let first = world.maglev(1);
    port.terminating = vec![3];
    let (changes, _) = world.set("a", &[&port]);
    assert!(changes.put_maglevs.is_empty() && world.maglev(1) == first, "it picks among the same ones");
    let mut again =
        World { table: Table::adopt(CAPACITY, &world.kernel.observe()), kernel: world.kernel.clone() };
    assert!(again.set("a", &[&port]).0.is_empty(), "also for one who did not write it");
    port.local = vec![1, 2, 4];
    world.put("a", &[&port]);
    assert_ne!(world.maglev(1), first);
    (port.local, port.terminating) = (vec![], vec![]);
    world.put("a", &[&port]);
    assert_eq!((world.maglev(1), world.table.usage().maglevs), (0, 0), "nothing to pick from");
}

#[test]
fn an_adopted_maglev_table_must_hold_what_is_wanted_and_have_one_follower() {
    let mut world = World::new(Abilities::ALL);
    let port = |n: u8| {
        let mut port = Port::new(n, Proto::Tcp, &[n]);
        port.policy.scheduler = Scheduler::Maglev;
        port
    };
    let wanted = |n: u8| maglev::picks(&port(n).desired().backends, 0);
    world.put("a", &[&port(1)]);
    let unwritten = CAPACITY.maglevs;
    world.kernel.frontends.get_mut(&frontend(1, Proto::Tcp)).unwrap().maglev = unwritten;
    let adopted =
        |kernel: &Kernel| World { table: Table::adopt(CAPACITY, &kernel.observe()), kernel: kernel.clone() };
    let mut again = adopted(&world.kernel);
    again.put("a", &[&port(1)]);
    assert_eq!(again.kernel.maglevs[&again.maglev(1)], wanted(1));

    again.put("b", &[&port(2)]);
    let shared = again.maglev(2);
    again.kernel.frontends.get_mut(&frontend(1, Proto::Tcp)).unwrap().maglev = shared;
    let mut again = adopted(&again.kernel);
    // Neither may give away what the other still follows: the pretended kernel would refuse to write it.
    again.put("a", &[&Port::new(1, Proto::Tcp, &[1])]);
    again.put("c", &[&port(3)]);
    assert_eq!(again.kernel.maglevs[&again.maglev(3)], wanted(3));
    again.put("b", &[&port(2)]);
    assert_eq!(again.kernel.maglevs[&again.maglev(2)], wanted(2));
    let mut changes = Changes::default();
    again.table.sweep(&mut changes);
    again.table.settle();
    assert_eq!((changes.is_empty(), again.table.usage().maglevs), (true, 2));
}

#[test]
fn without_a_maglev_table_a_service_picks_at_random_until_one_is_free() {
    let mut world = World::new(Abilities::ALL);
    let full = Refusal::Full { what: "Maglev tables", capacity: CAPACITY.maglevs };
    let port = |n: u8, endpoints: &[u8]| {
        let mut port = Port::new(n, Proto::Tcp, endpoints);
        port.policy.scheduler = Scheduler::Maglev;
        port
    };
    for n in 1..=3 {
        assert_eq!(world.set(&format!("s{n}"), &[&port(n, &[n])]).1, Ok(vec![]));
    }
    assert_eq!(world.set("s4", &[&port(4, &[4])]).1, Ok(vec![full.clone()]), "one is spared for changes");
    assert_eq!((world.maglev(4), world.kernel.frontends.len()), (0, 4));
    let changed = port(1, &[1, 5]);
    assert_eq!(world.set("s1", &[&changed]).1, Ok(vec![]), "which is what it is there for");
    // Two changes before the first one is in the kernel: the second waits and keeps what it has.
    let mut changes = Changes::default();
    let set = |table: &mut Table, n: u8, changes: &mut Changes| {
        table.set(&format!("s{n}").as_str().into(), &[port(n, &[n, 6]).desired()], changes)
    };
    assert_eq!(set(&mut world.table, 1, &mut changes), Ok(vec![]));
    let before = changes.clone();
    assert_eq!(set(&mut world.table, 2, &mut changes), Err(full));
    assert_eq!(changes, before);
    world.kernel.apply_all(&changes);
    world.table.settle();
    assert_eq!(world.set("s2", &[&port(2, &[2, 6])]).1, Ok(vec![]));
    world.put("s3", &[]);
    assert_eq!(world.set("s4", &[&port(4, &[4])]).1, Ok(vec![]));
    assert_ne!(world.maglev(4), 0);
}

#[test]
fn full_members_and_ranges_refuse_the_service_and_nothing_else() {
    let mut world = World::new(Abilities::ALL);
    let mut sticky = Port::new(1, Proto::Tcp, &(1..=20).collect::<Vec<_>>());
    sticky.policy.affinity_timeout_s = 60;
    assert_eq!(world.set("a", &[&sticky]).1, Ok(vec![]));
    let mut other = Port::new(2, Proto::Tcp, &[1, 2, 3, 4, 5]);
    other.policy.affinity_timeout_s = 60;
    let full = Refusal::Full { what: "members", capacity: CAPACITY.members };
    assert_eq!(world.set("b", &[&other]).1, Err(full));
    other.policy.affinity_timeout_s = 0;
    other.policy.source_ranges = true;
    other.ranges = (0..13)
        .map(|n| {
            [
                "10.0.0.0/8",
                "11.0.0.0/8",
                "12.0.0.0/8",
                "13.0.0.0/8",
                "14.0.0.0/8",
                "15.0.0.0/8",
                "16.0.0.0/8",
                "17.0.0.0/8",
                "18.0.0.0/8",
                "19.0.0.0/8",
                "20.0.0.0/8",
                "21.0.0.0/8",
                "22.0.0.0/8",
            ][n]
        })
        .collect();
    let full = Refusal::Full { what: "source ranges", capacity: CAPACITY.ranges };
    assert_eq!(world.set("b", &[&other]).1, Err(full));
    other.ranges.truncate(12);
    assert_eq!(world.set("b", &[&other]).1, Ok(vec![]));
}

#[test]
fn what_the_data_plane_cannot_do_is_left_out_and_told() {
    let abilities = Abilities { sctp: false, dsr: false, ipvs_schedulers: false, ..Abilities::ALL };
    let mut world = World::new(abilities);
    let mut tcp = Port::new(1, Proto::Tcp, &[1]);
    tcp.policy.scheduler = Scheduler::Ipvs(IpvsScheduler::Lc);
    tcp.policy.dsr = true;
    let (_, told) = world.set("a", &[&tcp, &Port::new(1, Proto::Sctp, &[1])]);
    let refusal = Refusal::Protocol { port: 80, proto: Proto::Sctp };
    assert!(refusal.to_string().contains("does not balance SCTP: port 80"), "{refusal}");
    assert!(Refusal::Forwarding.to_string().contains("sheave.io/forwarding"));
    assert_eq!(told, Ok(vec![Refusal::Forwarding, refusal]));
    let keys: Vec<_> = world.kernel.frontends.keys().copied().collect();
    assert_eq!(keys, [frontend(1, Proto::Tcp)]);
    let policy = world.kernel.frontends[&keys[0]].policy;
    assert_eq!((policy.scheduler, policy.dsr), (Scheduler::Default, false));
    world.put("a", &[]);
    assert!(world.kernel.frontends.is_empty());
}

fn planner(services: &[Service], abilities: Abilities) -> (Planner, Kernel) {
    let mut planner = Planner::new(Table::adopt(CAPACITY, &Observed::default()).with_abilities(abilities));
    services.iter().for_each(|service| planner.handle(Event::Service(service.clone())));
    planner.handle(Event::ServicesSynced(services.iter().map(|service| service.key.clone()).collect()));
    planner.handle(Event::SlicesSynced(BTreeSet::new()));
    (planner, Kernel::default())
}

/// A service with a NodePort.
fn service(n: u8, node_port: u16) -> Service {
    Service {
        key: format!("default/s{n}").as_str().into(),
        cluster_ips: [Ipv4Addr::new(10, 96, 0, n).into()].into(),
        ports: [ServicePort { name: "".into(), port: 80, node_port, proto: Proto::Tcp }].into(),
        ..Service::default()
    }
}

/// Rounds until there is nothing more to do, and how many services each had.
fn rounds(planner: &mut Planner, kernel: &mut Kernel) -> Vec<usize> {
    let mut rounds = Vec::new();
    loop {
        let changes = planner.flush();
        rounds.push(changes.put_frontends.values().map(|e| e.service).collect::<BTreeSet<_>>().len());
        kernel.apply_all(&changes);
        if !planner.passed_on() {
            return rounds;
        }
    }
}

#[test]
fn overlapping_node_ports_cost_the_later_service_its_node_port_only() {
    let (mut planner, mut kernel) = planner(&[service(1, 30_080), service(2, 30_080)], Abilities::ALL);
    rounds(&mut planner, &mut kernel);
    assert_eq!(kernel.frontends.len(), 3);
    let told = planner.refused()["default/s2"][0].to_string();
    assert_eq!(told, "TCP 0.0.0.0 port 30080 belongs to default/s1");
    let changes = planner.refused_changes();
    planner.handle(Event::Service(Service { affinity_timeout_s: 9, ..service(2, 30_080) }));
    rounds(&mut planner, &mut kernel);
    assert_eq!(planner.refused_changes(), changes, "it is refused as before");
    planner.handle(Event::ServiceGone("default/s1".into()));
    rounds(&mut planner, &mut kernel);
    assert!(planner.refused().is_empty() && kernel.frontends.len() == 2);
    assert_ne!(planner.refused_changes(), changes);
}

#[test]
fn many_services_come_in_rounds_and_what_goes_comes_first() {
    let abilities = Abilities { services_per_round: 4, ..Abilities::ALL };
    let all: Vec<_> = (1..=10).map(|n| service(n, 0)).collect();
    let (mut planner, mut kernel) = planner(&all, abilities);
    assert_eq!(rounds(&mut planner, &mut kernel), [4, 4, 2]);
    for n in 1..=10 {
        planner.handle(Event::Service(service(n, 30_000 + u16::from(n))));
    }
    planner.handle(Event::ServiceGone("default/s10".into()));
    planner.handle(Event::ServiceGone("default/s9".into()));
    assert_eq!(planner.flush().delete_frontends.len(), 0, "these are queued as changes already");
    planner.passed_on();
    rounds(&mut planner, &mut kernel);
    let mut fresh = (1..=10).map(|n| service(n, 0));
    planner.handle(Event::Service(fresh.next().unwrap()));
    planner.handle(Event::ServiceGone("default/s8".into()));
    assert_eq!(planner.flush().delete_frontends.len(), 3, "the NodePort, and both of what is gone");
}
