//! What sockets of this node are told, by kind of frontend, and which client stays with which backend.

use crate::affinity::{address_key, choose, netns_key};
use crate::env::{Affinities, Table};
use crate::resolve::{Caller, Destination, Resolution, is_current, is_taken, resolve};
use crate::select::{self, Scope};
use sheave_ebpf_abi::*;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::vec::Vec;

const NODE: u32 = 0xc000_0201;
const OTHER_NODE: u32 = 0xc000_0202;
const CLOSED: u32 = 0xc000_0203;
const LOOPBACK: u32 = 0x7f00_0001;
const ANY: u32 = 0;
const VIP: u32 = 0x0a60_0001;

fn v4(addr: u32) -> Address {
    Address::v4(addr.to_be())
}

fn at(addr: u32, port: u16) -> Destination {
    Destination { addr: v4(addr), port: port.to_be(), proto: PROTO_TCP }
}

#[derive(Default)]
struct World {
    frontends: HashMap<(u32, u16), Frontend>,
    slots: Vec<Slot>,
    config_flags: u32,
    members: HashMap<MemberKey, u32>,
    bound: RefCell<HashMap<AffinityKey, Affinity>>,
    /// Somebody else binds the same client just before this write.
    rival: Cell<Option<u32>>,
    full: bool,
}

impl World {
    /// Backends have the ids `first..first + n` and that number as their address.
    fn add(&mut self, service: u32, addr: u32, port: u16, flags: u32, counts: [u16; 4], first: u32) {
        let base = self.slots.len() as u32;
        let n: u32 = counts.iter().map(|n| u32::from(*n)).sum();
        self.slots.extend((first..first + n).map(|backend| Slot { backend, service }));
        let [local_ready, remote_ready, local_terminating, remote_terminating] = counts;
        let value = Frontend {
            service,
            base,
            local_ready,
            remote_ready,
            local_terminating,
            remote_terminating,
            flags,
            ..Frontend::zeroed()
        };
        self.frontends.insert((addr, port), value);
    }
}

impl Table for World {
    fn serves_net(&self, _: u32) -> bool {
        true
    }
    fn frontend4(&self, key: &Frontend4Key) -> Option<Frontend> {
        self.frontends.get(&(u32::from_be(key.addr), u16::from_be(key.port))).copied()
    }
    fn frontend6(&self, _: &Frontend6Key) -> Option<Frontend> {
        None
    }
    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(index as usize).copied()
    }
    fn backend(&self, id: u32) -> Option<Backend> {
        let known = self.slots.iter().any(|slot| slot.backend == id);
        known.then(|| Backend { addr: v4(id), id, port: 1, proto: PROTO_TCP, flags: 0 })
    }
    fn node_flags(&self, address: &Address) -> u32 {
        match *address {
            a if a == v4(NODE) => node_addr_flag::OURS | node_addr_flag::NODE_PORTS,
            a if a == v4(CLOSED) => node_addr_flag::OURS,
            _ => 0,
        }
    }
    fn maglev(&self, _: u32, _: u32) -> Option<u16> {
        None
    }
    fn config(&self) -> Option<Config> {
        let (node_port_min, node_port_max) = (30_000, 32_767);
        Some(Config { node_port_min, node_port_max, flags: self.config_flags, ..Config::zeroed() })
    }
    fn count(&self, _: Counter) {}
}

impl Affinities for World {
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.bound.borrow().get(key).copied()
    }
    fn bind(&self, key: &AffinityKey, value: &Affinity, fresh: bool) -> bool {
        if let Some(backend) = self.rival.take() {
            self.bound.borrow_mut().insert(*key, Affinity { backend, ..*value });
        }
        if self.full || fresh && self.bound.borrow().contains_key(key) {
            return false;
        }
        self.bound.borrow_mut().insert(*key, *value);
        true
    }
    fn member(&self, key: &MemberKey) -> Option<u32> {
        self.members.get(key).copied()
    }
}

#[derive(Clone, Copy)]
struct Client {
    on_node: bool,
    entropy: u32,
    cookie: u64,
    now_s: u32,
}

const POD: Client = Client { on_node: false, entropy: 0, cookie: 9, now_s: 100 };
const HOST: Client = Client { on_node: true, ..POD };

impl Caller for Client {
    fn on_node(&self, _: &Config) -> bool {
        self.on_node
    }
    fn entropy(&self, _: u8) -> u32 {
        self.entropy
    }
    fn netns_cookie(&self) -> u64 {
        self.cookie
    }
    fn now_s(&self) -> u32 {
        self.now_s
    }
}

/// The id of the backend, `None` where the call is left as it is.
fn got(world: &World, to: Destination, client: &Client) -> Option<u32> {
    match resolve(world, &to, client) {
        Resolution::NotService => None,
        Resolution::To(backend, _) => Some(backend.id),
        other => panic!("{other:?}"),
    }
}

#[test]
fn node_ports_are_reached_where_the_node_says() {
    let mut world = World::default();
    world.add(1, ANY, 30_080, frontend_flag::NODE_PORT | frontend_flag::EXTERNAL_LOCAL, [0, 1, 0, 0], 1);
    for client in [POD, HOST] {
        assert_eq!(got(&world, at(NODE, 30_080), &client), Some(1), "Local concerns what arrives");
        assert_eq!(got(&world, at(CLOSED, 30_080), &client), None);
        assert_eq!(got(&world, at(OTHER_NODE, 30_080), &client), None);
        assert_eq!(got(&world, at(LOOPBACK, 30_080), &client), None);
        assert_eq!(got(&world, at(ANY, 30_080), &client), None, "a wildcard key is nobody's address");
    }
    world.config_flags = config_flag::LOOPBACK_NODE_PORTS;
    for addr in [LOOPBACK, 0x7f01_0203, ANY] {
        assert_eq!(got(&world, at(addr, 30_080), &HOST), Some(1));
        assert_eq!(got(&world, at(addr, 30_080), &POD), None);
    }
}

#[test]
fn external_ips_are_translated_where_they_are_the_nodes() {
    let mut world = World::default();
    for addr in [NODE, OTHER_NODE, LOOPBACK] {
        world.add(1, addr, 53, frontend_flag::EXTERNAL_IP, [0, 1, 0, 0], 1);
    }
    assert_eq!(got(&world, at(NODE, 53), &POD), Some(1));
    assert_eq!(got(&world, at(OTHER_NODE, 53), &HOST), None);
    assert_eq!(got(&world, at(LOOPBACK, 53), &HOST), None);
}

#[test]
fn load_balancers_are_policy_cluster_from_inside() {
    let mut world = World::default();
    let local = frontend_flag::EXTERNAL_LOCAL | frontend_flag::INTERNAL_LOCAL | frontend_flag::SOURCE_RANGES;
    world.add(1, OTHER_NODE, 80, frontend_flag::LOAD_BALANCER | local, [0, 1, 0, 0], 1);
    world.add(2, VIP, 80, frontend_flag::INTERNAL_LOCAL, [0, 1, 0, 0], 2);
    assert_eq!(got(&world, at(OTHER_NODE, 80), &POD), Some(1));
    assert_eq!(resolve(&world, &at(VIP, 80), &POD), Resolution::NoEndpoints, "a ClusterIP is not");
}

#[test]
fn host_ports_are_looked_up_only_when_there_are_any() {
    let mut world = World::default();
    world.add(1, ANY, 443, frontend_flag::HOST_PORT, [1, 0, 0, 0], 1);
    world.add(2, LOOPBACK, 5000, frontend_flag::HOST_PORT, [1, 0, 0, 0], 2);
    assert_eq!(got(&world, at(NODE, 443), &POD), None);
    world.config_flags = config_flag::HOST_PORTS;
    assert_eq!(got(&world, at(NODE, 443), &POD), Some(1));
    assert_eq!(got(&world, at(CLOSED, 443), &POD), Some(1), "whatever NodePorts are kept to");
    assert_eq!(got(&world, at(LOOPBACK, 443), &HOST), Some(1));
    assert_eq!(got(&world, at(LOOPBACK, 443), &POD), None);
    assert_eq!(got(&world, at(OTHER_NODE, 443), &POD), None);
    assert_eq!(got(&world, at(LOOPBACK, 5000), &HOST), Some(2));
    assert_eq!(got(&world, at(LOOPBACK, 5000), &POD), None);
    assert_eq!(got(&world, at(NODE, 5000), &HOST), None);
}

#[test]
fn a_bind_is_taken_by_node_ports_and_owned_addresses() {
    let mut world = World { config_flags: config_flag::LOOPBACK_NODE_PORTS, ..World::default() };
    world.add(1, ANY, 30_080, frontend_flag::NODE_PORT, [1, 0, 0, 0], 1);
    world.add(2, NODE, 80, frontend_flag::EXTERNAL_IP, [1, 0, 0, 0], 2);
    world.add(3, VIP, 80, 0, [1, 0, 0, 0], 3);
    world.add(4, ANY, 30_443, frontend_flag::HOST_PORT, [1, 0, 0, 0], 4);
    for (to, taken) in [
        (at(ANY, 30_080), true),
        (at(NODE, 30_080), true),
        (at(LOOPBACK, 30_080), true),
        (at(CLOSED, 30_080), false),
        (at(ANY, 30_081), false),
        (at(NODE, 80), true),
        (at(ANY, 80), false),
        (at(VIP, 80), false),
        (at(ANY, 30_443), false),
        (Destination { addr: Address::v6([0; 4]), ..at(ANY, 30_080) }, true),
        (Destination { addr: Address::v6([0; 4]), ..at(ANY, 30_081) }, false),
    ] {
        assert_eq!(is_taken(&world, &to), taken, "{to:?}");
    }
    world.config_flags = 0;
    assert!(!is_taken(&world, &at(LOOPBACK, 30_080)));
}

#[test]
fn what_a_socket_asked_is_current_while_the_same_service_has_it() {
    let mut world = World::default();
    world.add(1, VIP, 80, 0, [1, 0, 0, 0], 1);
    world.add(2, ANY, 30_080, frontend_flag::NODE_PORT, [1, 0, 0, 0], 2);
    assert!(is_current(&world, &at(VIP, 80), 1));
    assert!(!is_current(&world, &at(VIP, 80), 7), "another service took the address over");
    assert!(is_current(&world, &at(NODE, 30_080), 2));
    assert!(!is_current(&world, &at(VIP, 81), 1));
}

const R: u32 = member_flag::READY;
const L: u32 = member_flag::LOCAL;
const C: u32 = member_flag::CLUSTER;

/// One service with affinity of 60 s: backends 1, 2 local ready, 3 remote ready, 4 local terminating, 5 remote
/// terminating.
fn sticky(counts: [u16; 4]) -> World {
    let mut world = World::default();
    let first = [1, 3, 4, 5];
    world.add(1, VIP, 80, 0, counts, 1);
    world.slots.clear();
    for (n, first) in counts.into_iter().zip(first) {
        world.slots.extend((first..first + u32::from(n)).map(|backend| Slot { backend, service: 1 }));
    }
    for (backend, flags) in [(1, L | R | C), (2, L | R | C), (3, R | C), (4, L | C), (5, C)] {
        if world.slots.iter().any(|slot| slot.backend == backend) {
            world.members.insert(MemberKey { service: 1, backend }, flags);
        }
    }
    frontend(&mut world).affinity_timeout_s = 60;
    world
}

fn frontend(world: &mut World) -> &mut Frontend {
    world.frontends.get_mut(&(VIP, 80)).unwrap()
}

#[test]
fn a_namespace_stays_with_its_backend_until_it_was_idle() {
    let world = sticky([2, 1, 0, 0]);
    let ask = |entropy, cookie, now_s| got(&world, at(VIP, 80), &Client { entropy, cookie, now_s, ..POD });
    assert_eq!(ask(0, 9, 100), Some(1));
    assert_eq!(ask(u32::MAX, 9, 160), Some(1));
    assert_eq!(ask(u32::MAX, 9, 220), Some(1), "each connection counts anew");
    assert_eq!(ask(u32::MAX, 10, 220), Some(3), "another namespace is another client");
    assert_eq!(ask(u32::MAX, 9, 281), Some(3), "idle for longer than the timeout");
    assert_eq!(ask(0, 9, 281), Some(3));
    assert_eq!(ask(0, 9, 280), Some(3), "a clock that another CPU read earlier");
}

#[test]
fn a_binding_follows_readiness() {
    let ask = |world: &World, entropy| got(world, at(VIP, 80), &Client { entropy, ..POD });
    let mut world = sticky([2, 1, 1, 1]);
    assert_eq!(ask(&world, 0), Some(1));
    // It begins to terminate while others are ready.
    world.members.insert(MemberKey { service: 1, backend: 1 }, L | C);
    *frontend(&mut world) = Frontend { base: 1, local_ready: 1, ..*frontend(&mut world) };
    assert_eq!(ask(&world, 0), Some(2));
    // Only terminating ones are left: a bound one of them is kept.
    let world = sticky([0, 0, 1, 1]);
    assert_eq!(ask(&world, u32::MAX), Some(5));
    assert_eq!(ask(&world, 0), Some(5));
    // It is gone from the service.
    let mut world = sticky([2, 0, 0, 0]);
    assert_eq!(ask(&world, 0), Some(1));
    world.members.remove(&MemberKey { service: 1, backend: 1 });
    assert_eq!(ask(&world, u32::MAX), Some(2));
}

#[test]
fn policies_are_bound_apart_and_judged_by_their_own_endpoints() {
    let mut world = sticky([1, 1, 0, 0]);
    world.slots[1].backend = 3;
    let f = *frontend(&mut world);
    let pick = |world: &World, key: &AffinityKey, scope, id: u32| {
        choose(world, key, &f, scope, 5, || world.backend(id)).map(|backend| backend.id)
    };
    let client = v4(0x0a00_0001);
    let (cluster, local) = (address_key(client, 1, Scope::Cluster), address_key(client, 1, Scope::Local));
    assert_eq!(pick(&world, &cluster, Scope::Cluster, 3), Some(3));
    assert_eq!(pick(&world, &local, Scope::Local, 1), Some(1));
    assert_eq!(pick(&world, &cluster, Scope::Cluster, 1), Some(3));
    // Bound to a remote one by hand: policy Local does not take it.
    world.bound.borrow_mut().insert(local, Affinity { backend: 3, used_s: 5 });
    assert_eq!(pick(&world, &local, Scope::Local, 1), Some(1));
    // Hints gave it to other zones.
    world.members.insert(MemberKey { service: 1, backend: 3 }, R);
    assert_eq!(pick(&world, &cluster, Scope::Cluster, 1), Some(1));
    assert_ne!(
        netns_key(5, 1, Scope::Cluster),
        address_key(netns_key(5, 1, Scope::Cluster).client, 1, Scope::Cluster)
    );
}

#[test]
fn first_connections_at_once_end_at_one_backend() {
    let world = sticky([2, 1, 0, 0]);
    world.rival.set(Some(3));
    assert_eq!(got(&world, at(VIP, 80), &POD), Some(3));
    assert_eq!(got(&world, at(VIP, 80), &POD), Some(3));
}

#[test]
fn without_memory_for_bindings_connections_go_on() {
    let world = World { full: true, ..sticky([2, 1, 0, 0]) };
    assert_eq!(got(&world, at(VIP, 80), &POD), Some(1));
    assert_eq!(got(&world, at(VIP, 80), &Client { entropy: u32::MAX, ..POD }), Some(3));
}

proptest::proptest! {
    /// Whatever is bound, the client gets a slot that the frontend's own range has, or none.
    #[test]
    fn a_bound_client_gets_what_the_range_might_give(
        counts in proptest::array::uniform4(0_u16..2),
        bound in 0_u32..7,
        local: bool,
    ) {
        let mut world = sticky(counts);
        let scope = if local { Scope::Local } else { Scope::Cluster };
        frontend(&mut world).flags = if local { frontend_flag::INTERNAL_LOCAL } else { 0 };
        world.bound.borrow_mut().insert(netns_key(9, 1, scope), Affinity { backend: bound, used_s: 90 });
        let f = *frontend(&mut world);
        let allowed: Vec<u32> = select::range(&f, scope)
            .map(|r| (r.base..r.base + r.len).map(|i| world.slots[i as usize].backend).collect())
            .unwrap_or_default();
        match resolve(&world, &at(VIP, 80), &POD) {
            Resolution::To(backend, _) => {
                proptest::prop_assert!(allowed.contains(&backend.id));
                proptest::prop_assert!(!allowed.contains(&bound) || backend.id == bound);
            }
            Resolution::NoEndpoints => proptest::prop_assert!(allowed.is_empty()),
            other => proptest::prop_assert!(false, "{other:?}"),
        }
    }
}
