//! The book, over frontends as the planner makes them.

use super::*;
use crate::service::{Changes, Counts, DesiredPort, Observed, Table};
use std::net::Ipv4Addr;

const NODE: [u8; 4] = [192, 0, 2, 1];

fn ip(addr: [u8; 4]) -> IpAddr {
    addr.into()
}

fn backend(last: u8) -> BackendAddr {
    BackendAddr { addr: ip([10, 244, 0, last]), port: 8080, proto: Proto::Tcp }
}

fn frontend(addr: [u8; 4], port: u16) -> FrontendKey {
    FrontendKey { addr: ip(addr), port, proto: Proto::Tcp }
}

fn at(addr: [u8; 4], port: u16) -> ServiceKey {
    ServiceKey::Addr { addr: ip(addr), port, proto: Proto::Tcp }
}

/// Two ready here, one ready elsewhere, one leaving here, one leaving elsewhere.
const ALL: Counts =
    Counts { local_ready: 2, remote_ready: 1, local_terminating: 1, remote_terminating: 1, local_only: 0 };

struct World {
    table: Table,
    mirror: Mirror,
    book: Book,
}

impl World {
    fn new() -> Self {
        let table = Table::adopt(super::super::ROOM, &Observed::default());
        let mut book = Book::new(IpvsScheduler::Rr);
        let own: BTreeSet<IpAddr> = [ip(NODE)].into();
        book.set_node(own.clone(), own);
        Self { table, mirror: Mirror::default(), book }
    }

    fn set(
        &mut self,
        frontends: &[(FrontendKey, FrontendPolicy)],
        backends: &[u8],
        counts: Counts,
        ranges: &[&str],
    ) -> BTreeSet<ServiceKey> {
        let port = DesiredPort {
            frontends: frontends.to_vec(),
            backends: backends.iter().map(|n| backend(*n)).collect(),
            counts,
            source_ranges: ranges.iter().map(|range| range.parse().expect("a range")).collect(),
            dormant: Vec::new(),
        };
        let mut changes = Changes::default();
        let ports: &[DesiredPort] = if frontends.is_empty() { &[] } else { &[port] };
        self.table.set(&"a/b".into(), ports, &mut changes).expect("there is room");
        let touched = self.mirror.apply(&changes);
        self.table.settle();
        let keys: BTreeSet<_> = touched.put.into_keys().chain(touched.deleted.into_keys()).collect();
        self.book.refresh(&self.mirror, keys)
    }

    fn weights(&self, key: ServiceKey) -> Vec<(u8, u32)> {
        let service = self.book.service(&key).unwrap_or_else(|| panic!("{key} is wanted"));
        let last = |addr: &IpAddr| match addr {
            IpAddr::V4(addr) => addr.octets()[3],
            IpAddr::V6(_) => 0,
        };
        service.destinations.iter().map(|((addr, _), weight)| (last(addr), *weight)).collect()
    }

    fn class(&self, key: FrontendKey) -> Value {
        let found = self.book.elements().find(|(element, _)| *element == Element::Frontend(key));
        found.expect("it has a class").1
    }
}

fn policy(kind: FrontendKind) -> FrontendPolicy {
    FrontendPolicy { kind, ..FrontendPolicy::default() }
}

#[test]
fn ready_ones_have_weight_and_leaving_ones_none() {
    let mut world = World::new();
    let key = frontend([10, 96, 0, 1], 80);
    world.set(&[(key, policy(FrontendKind::ClusterIp))], &[1, 2, 3, 4, 5], ALL, &[]);
    assert_eq!(world.weights(at([10, 96, 0, 1], 80)), [(1, 1), (2, 1), (3, 1), (4, 0), (5, 0)]);
    assert_eq!(world.book.given(), [ip([10, 96, 0, 1])].into());
    assert_eq!(world.class(key), Value::Class(Class::Open, false));
    // With nothing ready, those that leave have to do.
    let leaving = Counts { local_terminating: 1, remote_terminating: 1, ..Counts::default() };
    world.set(&[(key, policy(FrontendKind::ClusterIp))], &[4, 5], leaving, &[]);
    assert_eq!(world.weights(at([10, 96, 0, 1], 80)), [(4, 1), (5, 1)]);
    world.set(&[(key, policy(FrontendKind::ClusterIp))], &[], Counts::default(), &[]);
    assert_eq!(world.class(key), Value::Class(Class::Refuse, false));
    let touched = world.set(&[], &[], Counts::default(), &[]);
    assert_eq!(touched, [at([10, 96, 0, 1], 80)].into());
    assert!(world.book.service(&at([10, 96, 0, 1], 80)).is_none());
    assert!(world.book.given().is_empty());
    let left: Vec<_> = world.book.elements().collect();
    assert_eq!(left, [(Element::Node(ip(NODE)), Value::Member)]);
}

#[test]
fn a_local_policy_has_a_service_of_its_own_for_outside() {
    let mut world = World::new();
    let any = FrontendKey { addr: Ipv4Addr::UNSPECIFIED.into(), port: 30_080, proto: Proto::Tcp };
    let local = FrontendPolicy { external_local: true, ..policy(FrontendKind::NodePort) };
    let touched = world.set(&[(any, local)], &[1, 2, 3, 4, 5], ALL, &[]);
    assert_eq!(touched.len(), 2, "{touched:?}");
    assert_eq!(world.weights(at(NODE, 30_080)), [(1, 1), (2, 1), (3, 1), (4, 0), (5, 0)]);
    let mark = *touched.iter().find(|key| key.is_mark()).expect("one by mark");
    assert_eq!(world.weights(mark), [(1, 1), (2, 1), (4, 0)]);
    assert_eq!(world.class(any), Value::Class(Class::Local, false));
    let remote = Counts { remote_ready: 1, ..Counts::default() };
    world.set(&[(any, local)], &[3], remote, &[]);
    assert!(world.book.service(&mark).is_none());
    assert_eq!(world.class(any), Value::Class(Class::Inside, false));
    // The policy for inside concerns everybody who asks there.
    let key = frontend([10, 96, 0, 1], 80);
    let inside = FrontendPolicy { internal_local: true, ..policy(FrontendKind::ClusterIp) };
    world.set(&[(key, inside)], &[3], remote, &[]);
    assert_eq!(world.class(key), Value::Class(Class::Refuse, false));
}

#[test]
fn node_ports_follow_the_nodes_addresses_and_its_own_are_never_given() {
    let mut world = World::new();
    let any = FrontendKey { addr: Ipv4Addr::UNSPECIFIED.into(), port: 30_080, proto: Proto::Tcp };
    let own = frontend(NODE, 443);
    let frontends = [(any, policy(FrontendKind::NodePort)), (own, policy(FrontendKind::ExternalIp))];
    let one = Counts { remote_ready: 1, ..Counts::default() };
    world.set(&frontends, &[3], one, &[]);
    assert!(world.book.given().is_empty(), "it is the node's anyway");
    let second = [192, 0, 2, 2];
    let both: BTreeSet<IpAddr> = [ip(second)].into();
    assert!(world.book.set_node(both.clone(), both.clone()));
    world.book.refresh(&world.mirror, Book::of_the_node(&world.mirror));
    assert!(world.book.service(&at(NODE, 30_080)).is_none());
    assert!(world.book.service(&at(second, 30_080)).is_some());
    assert_eq!(world.book.given(), [ip(NODE)].into(), "now it has to be given");
    assert!(!world.book.set_node(both.clone(), both));
}

#[test]
fn schedulers_weights_and_affinity_become_settings() {
    let mut world = World::new();
    let key = frontend([10, 96, 0, 1], 80);
    let three = Counts { remote_ready: 3, ..Counts::default() };
    let mut settings = |policy: FrontendPolicy, backends: &[u8]| {
        world.set(&[(key, policy)], backends, three, &[]);
        let service = world.book.service(&at([10, 96, 0, 1], 80)).expect("wanted");
        (service.settings.scheduler.to_string(), service.settings.flags & 0xffff, service.settings.timeout_s)
    };
    let base = policy(FrontendKind::ClusterIp);
    assert_eq!(settings(base, &[1, 2, 3]), ("rr".to_owned(), 0, 0));
    assert_eq!(settings(base, &[1, 1, 2]).0, "wrr", "rr would not look at weights");
    let maglev = FrontendPolicy { scheduler: Scheduler::Maglev, ..base };
    assert_eq!(settings(maglev, &[1, 2, 3]), ("mh".to_owned(), flag::HASH_PORT, 0));
    let told = Scheduler::Ipvs(IpvsScheduler::Lc);
    let told = FrontendPolicy { scheduler: told, affinity_timeout_s: 300, ..base };
    assert_eq!(settings(told, &[1, 2, 3]), ("lc".to_owned(), flag::PERSISTENT, 300));
    assert!(world.book.without_scheduler("lc"));
    assert!(!world.book.without_scheduler("lc"), "no news");
    world.set(&[(key, told)], &[1, 1, 3], three, &[]);
    let service = world.book.service(&at([10, 96, 0, 1], 80)).expect("wanted");
    assert_eq!(&*service.settings.scheduler, "rr");
    assert_eq!(world.weights(at([10, 96, 0, 1], 80)), [(1, 2), (3, 1)]);
}

#[test]
fn ranges_lie_in_no_other_and_changes_are_what_changed() {
    let mut world = World::new();
    let key = frontend([203, 0, 113, 1], 80);
    let ranged = FrontendPolicy { source_ranges: true, ..policy(FrontendKind::LoadBalancer) };
    let one = Counts { local_ready: 1, ..Counts::default() };
    let ranges = ["10.0.0.0/8", "10.1.2.3/16", "192.0.2.7/32", "2001:db8::/32"];
    world.set(&[(key, ranged)], &[1], one, &ranges);
    let in_range = |element: &(Element, Value)| match element.0 {
        Element::Range(_, range) => Some(range.to_string()),
        _ => None,
    };
    let held: Vec<_> = world.book.elements().filter_map(|element| in_range(&element)).collect();
    assert_eq!(held, ["10.0.0.0/8", "192.0.2.7/32"]);
    assert_eq!(world.book.take_changes().len(), 6, "node, class, given, endpoint, two ranges");
    world.set(&[(key, ranged)], &[1, 2], Counts { local_ready: 2, ..one }, &ranges);
    let endpoint = (Element::Endpoint(ip([10, 244, 0, 2])), None, Some(Value::Member));
    assert_eq!(world.book.take_changes(), [endpoint]);
}

#[test]
fn an_address_stays_while_connections_linger() {
    let mut world = World::new();
    let key = frontend([10, 96, 0, 1], 80);
    let one = Counts { remote_ready: 1, ..Counts::default() };
    world.set(&[(key, policy(FrontendKind::ClusterIp))], &[1], one, &[]);
    let service = at([10, 96, 0, 1], 80);
    let settings = world.book.service(&service).expect("wanted").settings.clone();
    world.set(&[], &[], Counts::default(), &[]);
    world.book.set_lingering(service, &settings, true);
    world.book.set_lingering(service, &settings, true);
    assert_eq!(world.book.given(), [ip([10, 96, 0, 1])].into());
    world.book.set_lingering(service, &settings, false);
    assert!(world.book.given().is_empty());
}

#[test]
fn node_ports_are_reached_where_the_configuration_says() {
    let own: BTreeSet<IpAddr> = ["192.0.2.1", "192.0.2.9", "2001:db8::1", "2001:db8::2"]
        .map(|addr| addr.parse().expect("an address"))
        .into();
    let text = |which: &NodePortAddresses, first: &[&str]| {
        let first: Vec<IpAddr> = first.iter().map(|addr| addr.parse().expect("an address")).collect();
        reached(which, &own, &first).iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(text(&NodePortAddresses::All, &[]).len(), 4);
    assert_eq!(text(&NodePortAddresses::Primary, &["192.0.2.9"]), ["192.0.2.9", "2001:db8::1"]);
    let range = NodePortAddresses::In(vec!["192.0.2.8/29".parse().expect("a range")]);
    assert_eq!(text(&range, &[]), ["192.0.2.9"]);
}
