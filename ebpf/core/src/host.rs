//! A pretended kernel for the tests. Invariant: it behaves as the maps and helpers do, including the recycled
//! elements that a reader may meet.

use crate::env::{Affinities, Peers, Socket, Table};
use crate::golden;
use crate::resolve::{Caller, Destination, Resolution, resolve};
use crate::reverse::{self, Remembered};
use crate::select;
use sheave_ebpf_abi::*;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::IpAddr;
use std::vec::Vec;

mod direct;
mod packets;

#[derive(Default)]
struct Kernel {
    frontends4: HashMap<Frontend4Key, Frontend>,
    frontends6: HashMap<Frontend6Key, Frontend>,
    slots: Vec<Slot>,
    backends: HashMap<u32, Backend>,
    maglevs: Vec<Vec<u16>>,
    node: Vec<Address>,
    counters: RefCell<HashMap<Counter, u64>>,
    flows: RefCell<HashMap<FlowKey, Flow>>,
    marks: RefCell<HashMap<u32, u32>>,
    answered: RefCell<HashMap<(u32, u32), u32>>,
    fragments: RefCell<HashMap<FragmentKey, Fragment>>,
    sockets: Vec<FlowKey>,
    config_flags: Cell<u32>,
    bindings: RefCell<HashMap<AffinityKey, Affinity>>,
    members: HashMap<MemberKey, u32>,
    told: RefCell<Vec<(Counter, Address)>>,
    ranges: Vec<(u32, Address, u32)>,
    doors: RefCell<HashMap<u16, Door>>,
    peers: RefCell<HashMap<u32, ReverseEntry>>,
    owners: RefCell<HashMap<u32, u64>>,
    stored: RefCell<Option<ReverseEntry>>,
    lru: RefCell<HashMap<ReverseKey, ReverseValue>>,
    now_s: Cell<u32>,
    host_socket: bool,
    no_storage: bool,
    snat_ports: (u16, u16),
    flips: RefCell<Vec<(Frontend4Key, Frontend)>>,
}

fn address(ip: &str) -> Address {
    match ip.parse::<IpAddr>().unwrap() {
        IpAddr::V4(a) => Address::v4(u32::from_ne_bytes(a.octets())),
        IpAddr::V6(a) => {
            let o = a.octets();
            let w = |i: usize| u32::from_ne_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]);
            Address::v6([w(0), w(4), w(8), w(12)])
        }
    }
}

fn to(ip: &str, port: u16, proto: u8) -> Destination {
    Destination { addr: address(ip), port: port.to_be(), proto }
}

impl Kernel {
    /// Adds a service port with endpoints `(address, local)`, all ready, local ones first.
    fn add(&mut self, service: u32, at: &[(&str, u16)], proto: u8, flags: u32, endpoints: &[(&str, bool)]) {
        let base = self.slots.len() as u32;
        for (ip, _) in endpoints {
            let id = self.backends.len() as u32 + 1;
            let port = golden::PORT_POD.to_be();
            self.backends.insert(id, Backend { addr: address(ip), id, port, proto, flags: 0 });
            self.slots.push(Slot { backend: id, service });
        }
        let local = endpoints.iter().filter(|e| e.1).count() as u16;
        let value = Frontend {
            service,
            base,
            local_ready: local,
            remote_ready: endpoints.len() as u16 - local,
            flags,
            ..Frontend::zeroed()
        };
        for (ip, port) in at {
            let port = port.to_be();
            match address(ip).as_v4() {
                Some(addr) => self.frontends4.insert(Frontend4Key { addr, port, proto, pad: 0 }, value),
                None => self
                    .frontends6
                    .insert(Frontend6Key { addr: address(ip).words, port, proto, pad: 0 }, value),
            };
        }
    }

    fn counted(&self, counter: Counter) -> u64 {
        self.counters.borrow().get(&counter).copied().unwrap_or(0)
    }

    fn resolve(&self, d: &Destination, entropy: u32) -> Resolution {
        resolve(self, d, &Asking { host_socket: self.host_socket, entropy })
    }
}

struct Asking {
    host_socket: bool,
    entropy: u32,
}

impl Caller for Asking {
    fn on_node(&self, _: &Config) -> bool {
        self.host_socket
    }
    fn entropy(&self, _: u8) -> u32 {
        self.entropy
    }
    fn netns_cookie(&self) -> u64 {
        77
    }
    fn now_s(&self) -> u32 {
        0
    }
}

impl Affinities for Kernel {
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.bindings.borrow().get(key).copied()
    }
    fn bind(&self, key: &AffinityKey, value: &Affinity, fresh: bool) -> bool {
        if fresh && self.bindings.borrow().contains_key(key) {
            return false;
        }
        self.bindings.borrow_mut().insert(*key, *value);
        true
    }
    fn member(&self, key: &MemberKey) -> Option<u32> {
        self.members.get(key).copied()
    }
}

impl Table for Kernel {
    fn serves_net(&self, net: u32) -> bool {
        self.frontends4.keys().any(|key| Address::v4(key.addr).net() == net)
            || self.frontends6.keys().any(|key| Address::v6(key.addr).net() == net)
    }
    fn frontend4(&self, key: &Frontend4Key) -> Option<Frontend> {
        let mut flips = self.flips.borrow_mut();
        if let Some(at) = flips.iter().position(|(k, _)| k == key) {
            return Some(flips.remove(at).1);
        }
        self.frontends4.get(key).copied()
    }
    fn frontend6(&self, key: &Frontend6Key) -> Option<Frontend> {
        self.frontends6.get(key).copied()
    }
    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(index as usize).copied()
    }
    fn backend(&self, id: u32) -> Option<Backend> {
        self.backends.get(&id).copied()
    }
    fn maglev(&self, table: u32, slot: u32) -> Option<u16> {
        self.maglevs.get(table as usize)?.get(slot as usize).copied()
    }
    fn node_flags(&self, address: &Address) -> u32 {
        let ours = node_addr_flag::OURS | node_addr_flag::NODE_PORTS;
        if self.node.contains(address) { ours } else { 0 }
    }
    fn config(&self) -> Option<Config> {
        Some(Config {
            node_netns_cookie: 1,
            node_port_min: 30_000,
            node_port_max: 32_767,
            flags: config_flag::LOOPBACK_NODE_PORTS | self.config_flags.get(),
            node4: address(golden::PLACES[0].node),
            node6: address(golden::PLACES[1].node),
            local_port_min: 32_768,
            local_port_max: 60_999,
            snat_port_min: self.snat_ports.0,
            snat_port_max: self.snat_ports.1,
            snat_more_min: 10_000,
            snat_more_max: 10_001,
            ..Config::zeroed()
        })
    }
    fn count(&self, counter: Counter) {
        *self.counters.borrow_mut().entry(counter).or_default() += 1;
    }
}

impl Peers for Kernel {
    fn owner(&self, place: u32) -> u64 {
        self.owners.borrow().get(&place).copied().unwrap_or(0)
    }
    fn take(&self, place: u32, cookie: u64) -> bool {
        let free = self.owner(place) == 0;
        if free {
            self.owners.borrow_mut().insert(place, cookie);
        }
        free
    }
    fn leave(&self, place: u32) {
        self.owners.borrow_mut().remove(&place);
    }
    fn entry(&self, place: u32) -> Option<ReverseEntry> {
        self.peers.borrow().get(&place).copied()
    }
    fn set_entry(&self, place: u32, entry: &ReverseEntry) {
        self.peers.borrow_mut().insert(place, *entry);
    }
}

impl Socket for Kernel {
    fn cookie(&self) -> u64 {
        0x1_0000_0002
    }
    fn stored(&self) -> Option<ReverseEntry> {
        *self.stored.borrow()
    }
    fn store(&self, entry: &ReverseEntry) -> bool {
        if !self.no_storage {
            *self.stored.borrow_mut() = Some(*entry);
        }
        !self.no_storage
    }
    fn reverse(&self, key: &ReverseKey) -> Option<ReverseValue> {
        self.lru.borrow().get(key).copied()
    }
    fn set_reverse(&self, key: &ReverseKey, value: &ReverseValue) -> bool {
        self.lru.borrow_mut().insert(*key, *value);
        true
    }
}

fn balanced() -> Kernel {
    let mut kernel = Kernel::default();
    kernel.node.push(address("192.0.2.1"));
    kernel.add(1, &[("10.96.0.1", 80)], PROTO_TCP, 0, &[("10.244.0.1", true), ("10.244.0.2", false)]);
    kernel.add(2, &[("0.0.0.0", 30080)], PROTO_TCP, frontend_flag::NODE_PORT, &[("10.244.0.3", true)]);
    kernel.add(3, &[("10.96.0.3", 80)], PROTO_TCP, 0, &[]);
    kernel.add(4, &[("fd00:96::1", 80)], PROTO_UDP, 0, &[("fd00:244::1", true)]);
    let local = frontend_flag::INTERNAL_LOCAL;
    kernel.add(5, &[("10.96.0.5", 80)], PROTO_TCP, local, &[("10.244.0.5", true), ("10.244.0.6", false)]);
    kernel
}

fn backend(resolution: Resolution) -> Address {
    match resolution {
        Resolution::To(backend, _) => backend.addr,
        other => panic!("{other:?}"),
    }
}

#[test]
fn resolution_by_address_port_and_protocol() {
    let kernel = balanced();
    let vip = to("10.96.0.1", 80, PROTO_TCP);
    assert_eq!(backend(kernel.resolve(&vip, 0)), address("10.244.0.1"));
    assert_eq!(backend(kernel.resolve(&vip, u32::MAX)), address("10.244.0.2"));
    assert_eq!(backend(kernel.resolve(&to("fd00:96::1", 80, PROTO_UDP), 5)), address("fd00:244::1"));
    for miss in
        [to("10.96.0.1", 81, PROTO_TCP), to("10.96.0.1", 80, PROTO_UDP), to("10.96.0.9", 80, PROTO_TCP)]
    {
        assert_eq!(kernel.resolve(&miss, 0), Resolution::NotService);
    }
    assert_eq!(kernel.resolve(&to("10.96.0.3", 80, PROTO_TCP), 0), Resolution::NoEndpoints);
    let local_only = to("10.96.0.5", 80, PROTO_TCP);
    assert_eq!(backend(kernel.resolve(&local_only, u32::MAX)), address("10.244.0.5"));
}

#[test]
fn node_ports_match_node_addresses_only_and_loopback_only_on_the_node() {
    let mut kernel = balanced();
    let at = |kernel: &Kernel, ip| kernel.resolve(&to(ip, 30080, PROTO_TCP), 0);
    assert_eq!(backend(at(&kernel, "192.0.2.1")), address("10.244.0.3"));
    assert_eq!(at(&kernel, "192.0.2.2"), Resolution::NotService);
    assert_eq!(at(&kernel, "127.0.0.1"), Resolution::NotService);
    kernel.host_socket = true;
    assert_eq!(backend(at(&kernel, "127.0.0.1")), address("10.244.0.3"));
    assert_eq!(backend(at(&kernel, "127.8.9.1")), address("10.244.0.3"));
}

#[test]
fn a_flip_under_the_reader_is_retried() {
    let kernel = balanced();
    let key =
        Frontend4Key { addr: address("10.96.0.1").words[3], port: 80_u16.to_be(), proto: PROTO_TCP, pad: 0 };
    // The reader holds a value whose run was given to another service meanwhile.
    let stale = Frontend { base: 2, local_ready: 1, remote_ready: 0, ..kernel.frontends4[&key] };
    kernel.flips.borrow_mut().push((key, stale));
    assert_eq!(backend(kernel.resolve(&to("10.96.0.1", 80, PROTO_TCP), 0)), address("10.244.0.1"));
    assert_eq!(kernel.counted(Counter::SlotRetry), 1);
    kernel.flips.borrow_mut().extend([(key, stale), (key, stale)]);
    assert_eq!(kernel.resolve(&to("10.96.0.1", 80, PROTO_TCP), 0), Resolution::Stale);
}

#[test]
fn sockets_remember_whom_they_asked() {
    let mut kernel = balanced();
    for no_storage in [false, true] {
        kernel.no_storage = no_storage;
        *kernel.stored.borrow_mut() = None;
        kernel.lru.borrow_mut().clear();
        let one = to("10.96.0.1", 80, PROTO_UDP);
        let two = to("10.96.0.2", 53, PROTO_UDP);
        let b = |ip, id| Backend { addr: address(ip), id, port: 9_u16.to_be(), proto: PROTO_UDP, flags: 0 };
        let send = |to: &Destination, b: &Backend, id| reverse::remember_datagram(&kernel, to, b, id);
        assert_eq!(send(&one, &b("10.244.0.1", 1), 1), Remembered::Newly);
        assert_eq!(send(&one, &b("10.244.0.1", 1), 1), Remembered::Before);
        assert_eq!(send(&two, &b("10.244.0.2", 2), 2), Remembered::Newly);
        assert_eq!(send(&two, &b("10.244.0.2", 2), 2), Remembered::Before);
        assert_eq!(reverse::recall(&kernel, &kernel, &to("10.244.0.1", 9, PROTO_UDP)), Some((one, 1)));
        assert_eq!(reverse::recall(&kernel, &kernel, &to("10.244.0.2", 9, PROTO_UDP)), Some((two, 2)));
        assert_eq!(reverse::recall(&kernel, &kernel, &to("10.244.0.1", 10, PROTO_UDP)), None);
        assert_eq!(reverse::recall(&kernel, &kernel, &to("10.244.0.2", 10, PROTO_UDP)), None);
        assert_eq!(reverse::recall(&kernel, &kernel, &to("10.244.0.3", 9, PROTO_UDP)), None);
        // The same backend through another service: the last one that was asked.
        assert_eq!(send(&two, &b("10.244.0.1", 1), 2), Remembered::Newly);
        assert_eq!(reverse::recall(&kernel, &kernel, &to("10.244.0.1", 9, PROTO_UDP)), Some((two, 2)));
        assert!(reverse::remember_peer(&kernel, &kernel, &one, &b("10.244.0.9", 9), 1));
        assert_eq!(reverse::recall(&kernel, &kernel, &to("10.244.0.9", 9, PROTO_UDP)), Some((one, 1)));
    }
}

#[test]
fn a_connection_is_remembered_where_there_is_room() {
    let mut kernel = balanced();
    let (one, two) = (to("10.96.0.1", 80, PROTO_TCP), to("10.96.0.2", 80, PROTO_TCP));
    let b = Backend { addr: address("10.244.0.1"), id: 1, port: 9_u16.to_be(), proto: PROTO_TCP, flags: 0 };
    let peer = to("10.244.0.1", 9, PROTO_TCP);
    let cookie = kernel.cookie();
    let places = peer_places(cookie);
    for (taken, no_storage) in [(0, false), (1, false), (2, false), (2, true)] {
        kernel.no_storage = no_storage;
        *kernel.stored.borrow_mut() = None;
        kernel.lru.borrow_mut().clear();
        *kernel.owners.borrow_mut() = places[..taken].iter().map(|place| (*place, 7)).collect();
        assert_eq!(reverse::recall(&kernel, &kernel, &peer), None);
        for (asked, service) in [(one, 1), (two, 2)] {
            assert!(reverse::remember_peer(&kernel, &kernel, &asked, &b, service));
            assert_eq!(reverse::recall(&kernel, &kernel, &peer), Some((asked, service)));
        }
        assert_eq!(reverse::recall(&kernel, &kernel, &to("10.244.0.1", 10, PROTO_TCP)), None);
        assert_eq!(kernel.stored.borrow().is_some(), taken == 2 && !no_storage);
        let owners = || places.map(|place| kernel.owner(place));
        assert_eq!(owners(), [[cookie, 0], [7, cookie], [7, 7], [7, 7]][taken]);
        if taken == 1 {
            // The first place is free by now, when it is connected again.
            kernel.leave(places[0]);
            assert!(reverse::remember_peer(&kernel, &kernel, &one, &b, 1));
            assert_eq!(reverse::recall(&kernel, &kernel, &peer), Some((one, 1)));
            assert_eq!(owners(), [cookie, cookie]);
        }
        reverse::forget(&kernel, cookie);
        assert_eq!(owners(), [[0, 0], [0, 0], [7, 7], [7, 7]][taken]);
    }
}

#[test]
fn maglev_picks_stay_in_the_run() {
    let mut k = Kernel::default();
    let table = (0..MAGLEV_SLOTS as u32).map(|slot| (slot % 4) as u16).collect();
    k.maglevs = std::vec![Vec::new(), table];
    let frontend =
        |maglev, ready| Frontend { service: 1, base: 100, remote_ready: ready, maglev, ..Frontend::zeroed() };
    assert_eq!(select::maglev_pick(&k, &frontend(0, 4), 5), None, "no table");
    assert_eq!(select::maglev_pick(&k, &frontend(2, 4), 5), None, "no such table");
    assert_eq!(select::maglev_pick(&k, &frontend(1, 0), 5), None, "nobody to pick");
    let hashes = (0..=u32::MAX).step_by(100_003);
    let picks: Vec<_> = hashes.clone().map(|h| select::maglev_pick(&k, &frontend(1, 4), h)).collect();
    assert!(picks.iter().all(|p| matches!(p, Some(100..104))), "inside the run");
    assert!((100..104).all(|slot| picks.contains(&Some(slot))), "all of it");
    assert_eq!(select::maglev_pick(&k, &frontend(1, 4), u32::MAX), Some(100 + (MAGLEV_SLOTS as u32 - 1) % 4));
    assert!(
        hashes.map(|h| select::maglev_pick(&k, &frontend(1, 2), h)).any(|p| p.is_none()),
        "a table too wide"
    );
}

#[test]
fn clients_hash_alike_on_all_nodes() {
    let (client, vip) = (address("198.51.100.7"), address("192.0.2.80"));
    let hash = |port, seed, affinity| {
        select::client_hash(&client, u16::to_be(port), &vip, u16::to_be(80), PROTO_TCP, seed, affinity)
    };
    // What other nodes compute, perhaps with an older version.
    assert_eq!((hash(40_000, 1, false), hash(40_000, 1, true)), (1_217_876_237, 2_769_919_394));
    assert_ne!(hash(40_000, 1, false), hash(40_001, 1, false));
    assert_ne!(hash(40_000, 1, false), hash(40_000, 2, false));
    assert_eq!(hash(40_000, 1, true), hash(40_001, 1, true));
    let mut hits = [0_u32; 8];
    for port in 0..40_000 {
        hits[(hash(port, 7, false) >> 29) as usize] += 1;
    }
    assert!(hits.iter().all(|n| (4_500..5_500).contains(n)), "{hits:?}");
}
