//! A pretended kernel: maps, a routing table and packets. Invariant: it answers as the helpers do, including refusals,
//! full maps and elements that were recycled, and it never panics on what the code under test asks.

use super::frames::Dice;
use sheave_ebpf_abi::{
    Address, Affinity, AffinityKey, Backend, Config, Counter, Door, Flow, FlowKey, Fragment, FragmentKey,
    Frontend, Frontend4Key, Frontend6Key, MAGLEV_SLOTS, MemberKey, Plain as _, Slot, flow_flag,
    node_addr_flag,
};
use sheave_ebpf_core::balance::Work;
use sheave_ebpf_core::env::{Affinities, Claim, Flows, Journey, Node, Packet, Route, Table, Way};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::net::IpAddr;

pub(crate) fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(v4) => Address::v4(u32::from_ne_bytes(v4.octets())),
        IpAddr::V6(v6) => {
            let o = v6.octets();
            let word = |at: usize| u32::from_ne_bytes([o[at], o[at + 1], o[at + 2], o[at + 3]]);
            Address::v6([word(0), word(4), word(8), word(12)])
        }
    }
}

/// A map that every run walks in the same order.
type HashMap<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<DefaultHasher>>;

/// The device that every route leads to.
pub(crate) const POD_DEVICE: u32 = 2;

/// The node.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) frontends4: HashMap<Frontend4Key, Frontend>,
    pub(crate) frontends6: HashMap<Frontend6Key, Frontend>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) backends: HashMap<u32, Backend>,
    pub(crate) members: HashMap<(u32, u32), u32>,
    pub(crate) node: Vec<Address>,
    pub(crate) flags: u32,
    /// Of the device that every route leads to.
    pub(crate) door: Door,
    pub(crate) flows: RefCell<HashMap<FlowKey, Flow>>,
    pub(crate) marks: RefCell<HashMap<u32, u32>>,
    pub(crate) answered: RefCell<HashMap<(u32, u32), u32>>,
    pub(crate) fragments: RefCell<HashMap<FragmentKey, Fragment>>,
    pub(crate) affinities: RefCell<HashMap<AffinityKey, Affinity>>,
    pub(crate) counters: RefCell<BTreeMap<Counter, u64>>,
    pub(crate) now_s: u32,
    /// Once in so many times a map has no room; 0 means never.
    pub(crate) refuses: usize,
    pub(crate) dice: RefCell<Option<Dice>>,
    /// Elements that a reader met recycled.
    pub(crate) stale: Cell<usize>,
}

impl Default for Kernel {
    fn default() -> Self {
        Self {
            frontends4: HashMap::default(),
            frontends6: HashMap::default(),
            slots: Vec::new(),
            backends: HashMap::default(),
            members: HashMap::default(),
            node: Vec::new(),
            flags: 0,
            door: Door::zeroed(),
            flows: RefCell::default(),
            marks: RefCell::default(),
            answered: RefCell::default(),
            fragments: RefCell::default(),
            affinities: RefCell::default(),
            counters: RefCell::default(),
            now_s: 0,
            refuses: 0,
            dice: RefCell::default(),
            stale: Cell::default(),
        }
    }
}

impl Kernel {
    fn roll(&self, times: usize) -> bool {
        times != 0 && self.dice.borrow_mut().as_mut().is_some_and(|dice| dice.one_in(times))
    }

    /// Forgets a flow, as the table does that is full.
    pub(crate) fn evict(&self, dice: &mut Dice) {
        let mut flows = self.flows.borrow_mut();
        let at = dice.below(flows.len().max(1));
        let key = flows.keys().nth(at).copied();
        key.and_then(|key| flows.remove(&key));
    }
}

impl Table for Kernel {
    fn serves_net(&self, net: u32) -> bool {
        self.frontends4.keys().any(|key| Address::v4(key.addr).net() == net)
            || self.frontends6.keys().any(|key| Address::v6(key.addr).net() == net)
    }
    fn frontend4(&self, key: &Frontend4Key) -> Option<Frontend> {
        self.frontends4.get(key).copied()
    }
    fn frontend6(&self, key: &Frontend6Key) -> Option<Frontend> {
        self.frontends6.get(key).copied()
    }
    fn slot(&self, index: u32) -> Option<Slot> {
        if self.roll(50 * self.refuses) {
            self.stale.set(self.stale.get() + 1);
            return Some(Slot { backend: 1, service: 99 });
        }
        self.slots.get(index as usize).copied()
    }
    fn backend(&self, id: u32) -> Option<Backend> {
        self.backends.get(&id).copied()
    }
    fn maglev(&self, table: u32, slot: u32) -> Option<u16> {
        (table == 1 && slot < MAGLEV_SLOTS as u32).then_some((slot % 7) as u16)
    }
    fn node_flags(&self, address: &Address) -> u32 {
        let ours = node_addr_flag::OURS | node_addr_flag::NODE_PORTS;
        if self.node.contains(address) { ours } else { 0 }
    }
    fn config(&self) -> Option<Config> {
        let of = |v6: bool| self.node.iter().find(|a| a.as_v4().is_none() == v6).copied();
        Some(Config {
            node_port_min: 30_000,
            node_port_max: 32_767,
            local_port_min: 40_000,
            local_port_max: 50_000,
            snat_port_min: 61_000,
            snat_port_max: 61_063,
            flags: self.flags,
            maglev_seed: 7,
            node4: of(false).unwrap_or(Address::zeroed()),
            node6: of(true).unwrap_or(Address::zeroed()),
            ..Config::zeroed()
        })
    }
    fn count(&self, counter: Counter) {
        *self.counters.borrow_mut().entry(counter).or_default() += 1;
    }
}

impl Affinities for Kernel {
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.affinities.borrow().get(key).copied()
    }
    fn bind(&self, key: &AffinityKey, value: &Affinity, fresh: bool) -> bool {
        let mut held = self.affinities.borrow_mut();
        if fresh && held.contains_key(key) {
            return false;
        }
        held.insert(*key, *value);
        true
    }
    fn member(&self, key: &MemberKey) -> Option<u32> {
        self.members.get(&(key.service, key.backend)).copied()
    }
}

impl Flows for Kernel {
    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        self.flows.borrow().get(key).copied()
    }
    fn touch(&self, key: &FlowKey, now_s: u32, state: u16) -> Option<Flow> {
        let mut flows = self.flows.borrow_mut();
        let held = flows.get_mut(key)?;
        let before = *held;
        held.seen_s = now_s;
        held.flags |= state & flow_flag::STATE;
        Some(before)
    }
    fn claim(&self, key: &FlowKey, flow: &Flow) -> Claim {
        if self.roll(self.refuses) {
            return Claim::Refused;
        }
        let mut flows = self.flows.borrow_mut();
        if flows.contains_key(key) {
            return Claim::Taken;
        }
        flows.insert(*key, *flow);
        Claim::Stored
    }
    fn replace(&self, key: &FlowKey, flow: &Flow) -> bool {
        if self.roll(self.refuses) {
            return false;
        }
        self.flows.borrow_mut().insert(*key, *flow);
        true
    }
    fn remove(&self, key: &FlowKey) {
        self.flows.borrow_mut().remove(key);
    }
    fn mark(&self, place: u32) -> u32 {
        self.marks.borrow().get(&place).copied().unwrap_or(0)
    }
    fn set_mark(&self, place: u32, now_s: u32) {
        self.marks.borrow_mut().insert(place, now_s);
    }
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        self.fragments.borrow().get(key).copied()
    }
    fn set_fragment(&self, key: &FragmentKey, fragment: &Fragment) {
        self.fragments.borrow_mut().insert(*key, *fragment);
    }
    fn now_s(&self) -> u32 {
        self.now_s
    }
}

impl Node for Kernel {
    fn in_source_range(&self, _: u32, client: &Address) -> bool {
        client.words[3].to_ne_bytes()[3].is_multiple_of(2)
    }
    fn has_socket(&self, key: &FlowKey) -> bool {
        u16::from_be(key.dport).is_multiple_of(5)
    }
    fn route(&self, journey: &Journey) -> Way {
        match journey.dst.words[3].to_ne_bytes()[3] % 8 {
            0 => Way::None,
            _ if journey.len > 1400 => Way::TooBig(1400),
            n => Way::To(Route {
                device: POD_DEVICE,
                next_hop: journey.dst,
                link: [2; 12],
                has_link: n.is_multiple_of(2),
            }),
        }
    }
    fn door(&self, place: u16) -> Option<Door> {
        Some(if u32::from(place) == POD_DEVICE { self.door } else { Door::zeroed() })
    }
    fn answered(&self, kind: u32) -> u32 {
        let mut answered = self.answered.borrow_mut();
        let held = answered.entry((kind, self.now_s)).or_default();
        *held += 1;
        *held
    }
    fn tell(&self, _: &Work, _: Counter) {}
}

/// A frame in a buffer.
#[derive(Clone, Debug)]
pub(crate) struct Buffer {
    pub(crate) bytes: Vec<u8>,
    pub(crate) segment_len: u32,
    /// A header was put around it.
    pub(crate) wrapped: bool,
    /// A header was taken off it.
    pub(crate) unwrapped: bool,
    /// Accesses that a program may not make, where a helper would not even refuse.
    pub(crate) wrong: Vec<String>,
}

impl Packet for Buffer {
    fn ether_type(&self) -> u16 {
        self.load::<2>(12).map_or(0, u16::from_be_bytes)
    }
    fn is_tagged(&self) -> bool {
        false
    }
    fn size(&self) -> u32 {
        self.bytes.len() as u32
    }
    fn segment_len(&self) -> u32 {
        self.segment_len
    }
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let from = offset as usize;
        self.bytes.get(from..from.checked_add(N)?)?.try_into().ok()
    }
    fn store<const N: usize>(&mut self, offset: u32, bytes: [u8; N], _: bool) -> bool {
        let from = offset as usize;
        match self.bytes.get_mut(from..from + N) {
            Some(place) => {
                place.copy_from_slice(&bytes);
                true
            }
            None => false,
        }
    }
    fn fix_l3(&mut self, offset: u32, diff: u32) -> bool {
        self.fix(offset, diff, false)
    }
    fn fix_l4(&mut self, offset: u32, diff: u32, _: bool, zero_is_none: bool) -> bool {
        self.fix(offset, diff, zero_is_none)
    }
    fn cut(&mut self, len: u32) {
        // As the kernel's helper: it grows as well as it cuts.
        self.bytes.resize(len as usize, 0);
    }
    fn insert(&mut self, len: u32) -> bool {
        if self.bytes.len() < 14 || len > 256 {
            return false;
        }
        drop(self.bytes.splice(14..14, vec![0xee; len as usize]));
        true
    }
    fn wrap(&mut self, v6: bool) -> bool {
        if self.wrapped || self.unwrapped {
            self.wrong.push("a header around a packet that has or had one".to_owned());
        }
        self.wrapped = true;
        self.insert(if v6 { 40 } else { 20 })
    }
    fn unwrap(&mut self, v6: bool) -> bool {
        let len = if v6 { 40 } else { 20 };
        // As the kernel's helper: what is left must have room for an IP header.
        if self.unwrapped || self.bytes.len() < 14 + 2 * len {
            return false;
        }
        self.unwrapped = true;
        drop(self.bytes.drain(14..14 + len));
        true
    }
}

impl Buffer {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, segment_len: 0, wrapped: false, unwrapped: false, wrong: Vec::new() }
    }

    /// A sum in plain arithmetic, not by the code under test.
    fn fix(&mut self, offset: u32, diff: u32, zero_is_none: bool) -> bool {
        let Some(held) = self.load::<2>(offset).map(u16::from_ne_bytes) else { return false };
        if zero_is_none && held == 0 {
            return true;
        }
        if !offset.is_multiple_of(2) {
            self.wrong.push(format!("a checksum is corrected at the odd offset {offset}"));
        }
        let mut sum = u64::from(!held) + u64::from(diff);
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        let mut fixed = !(sum as u16);
        if zero_is_none && fixed == 0 {
            fixed = 0xffff;
        }
        self.store(offset, fixed.to_ne_bytes(), false)
    }
}
