//! The maps and how the core reads them. Invariant: a value is copied out of its map by one volatile read, so the
//! core judges the same bytes that it uses even when the element is recycled meanwhile.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, RingBuf, SkStorage},
    macros::btf_map,
};
use core::ptr::{read_volatile, write_volatile};
use sheave_ebpf_abi::{
    Address, Affinity, AffinityKey, Backend, Config, Counter, Door, Event, FlowSet, Fragment, FragmentKey,
    Frontend, Frontend4Key, Frontend6Key, MAGLEV_SLOTS, MaglevTable, MemberKey, ReverseEntry, ReverseKey,
    ReverseValue, Slot, answer_kind, call, map,
};
use sheave_ebpf_core::balance::Work;
use sheave_ebpf_core::env::{Affinities, Peers, Table};
use sheave_ebpf_kernel::value::{claim, copy, replace};

const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;
const MAPPED: usize = BPF_F_MMAPABLE as usize;

#[btf_map(name = "shv_frontends4")]
static FRONTENDS4: HashMap<Frontend4Key, Frontend, { map::FRONTENDS_MAX }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "shv_frontends6")]
static FRONTENDS6: HashMap<Frontend6Key, Frontend, { map::FRONTENDS_MAX }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "shv_slots")]
static SLOTS: Array<Slot, { map::SLOTS_MAX }, MAPPED> = Array::new();
#[btf_map(name = "shv_backends")]
static BACKENDS: Array<Backend, { map::BACKENDS_MAX }, MAPPED> = Array::new();
#[btf_map(name = "shv_reverse_sk")]
pub static REVERSE_SK: SkStorage<ReverseEntry> = SkStorage::new();
#[btf_map(name = "shv_peers")]
static PEERS: Array<ReverseEntry, { map::PEERS_MAX }> = Array::new();
#[btf_map(name = "shv_peer_owners")]
static PEER_OWNERS: Array<u64, { map::PEERS_MAX }> = Array::new();
#[btf_map(name = "shv_reverse")]
pub static REVERSE_LRU: LruHashMap<ReverseKey, ReverseValue, { map::REVERSE_MAX }> = LruHashMap::new();
#[btf_map(name = "shv_flows")]
pub static FLOWS: Array<FlowSet, { map::FLOW_ELEMENTS_MAX }, MAPPED> = Array::new();
#[btf_map(name = "shv_fragments")]
pub static FRAGMENTS: LruHashMap<FragmentKey, Fragment, { map::FRAGMENTS_MAX }> = LruHashMap::new();
#[btf_map(name = "shv_calls")]
pub static CALLS: ProgramArray<{ call::COUNT }> = ProgramArray::new();
#[btf_map(name = "shv_node_addrs")]
static NODE_ADDRS: HashMap<Address, u32, { map::NODE_ADDRS_MAX }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "shv_config")]
static CONFIG: Array<Config, 1> = Array::new();
#[btf_map(name = "shv_counters")]
static COUNTERS: PerCpuArray<u64, { map::COUNTERS_MAX }> = PerCpuArray::new();
#[btf_map(name = "shv_affinity")]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, { map::AFFINITY_MAX }> = LruHashMap::new();
#[btf_map(name = "shv_members")]
pub static MEMBERS: HashMap<MemberKey, u32, { map::MEMBERS_MAX }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "shv_ranges")]
pub static RANGES: LpmTrie<[u32; 5], u32, { map::RANGES_MAX }> = LpmTrie::new();
#[btf_map(name = "shv_maglev")]
pub static MAGLEV: Array<MaglevTable, { map::MAGLEV_MAX }> = Array::new();
#[btf_map(name = "shv_events")]
pub static EVENTS: RingBuf<Event, { map::EVENTS_BYTES }> = RingBuf::new();
#[btf_map(name = "shv_nets")]
static NETS: Array<u64, { map::NETS_WORDS }> = Array::new();
#[btf_map(name = "shv_marks")]
pub static MARKS: Array<u32, { map::MARKS_MAX }> = Array::new();
#[btf_map(name = "shv_listen")]
pub static LISTEN: Array<u32, 1> = Array::new();
#[btf_map(name = "shv_answers")]
pub static ANSWERS: PerCpuArray<u64, { answer_kind::COUNT }> = PerCpuArray::new();
#[btf_map(name = "shv_doors")]
pub static DOORS: Array<Door, { map::DOORS_MAX }> = Array::new();

#[btf_map(name = "shv_work")]
static WORK: PerCpuArray<[u64; WORK_WORDS], 1> = PerCpuArray::new();

/// Words of a [`Work`].
const WORK_WORDS: usize = size_of::<Work>().div_ceil(8);

/// This processor's work area.
///
/// Where it is used nothing else of its kind runs on the processor before the program ends: traffic control runs with
/// soft interrupts off, and never within itself.
#[inline(always)]
pub fn work<'a>() -> Option<&'a mut Work> {
    const { assert!(align_of::<Work>() <= 8) };
    // SAFETY: the element is large and aligned enough, it is this processor's own, and whatever is in it was zeroes or
    // written as a `Work`, of which zeroes are a valid value.
    WORK.get_ptr_mut(0).map(|place| unsafe { &mut *place.cast::<Work>() })
}

/// The pinned maps.
#[derive(Clone, Copy)]
pub struct Maps;

impl Table for Maps {
    #[inline(always)]
    fn serves_net(&self, net: u32) -> bool {
        // SAFETY: the element of an array stays, and a word is read at once.
        let word = NETS.get_ptr(net >> 6).map_or(0, |word| unsafe { read_volatile(word) });
        word >> (net & 63) & 1 != 0
    }

    #[inline(always)]
    fn frontend4(&self, key: &Frontend4Key) -> Option<Frontend> {
        FRONTENDS4.get_ptr(key).map(copy)
    }

    #[inline(always)]
    fn frontend6(&self, key: &Frontend6Key) -> Option<Frontend> {
        FRONTENDS6.get_ptr(key).map(copy)
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<Slot> {
        SLOTS.get_ptr(index).map(copy)
    }

    #[inline(always)]
    fn backend(&self, id: u32) -> Option<Backend> {
        if id == 0 {
            return None;
        }
        BACKENDS.get_ptr(id).map(copy)
    }

    #[inline(always)]
    fn maglev(&self, table: u32, slot: u32) -> Option<u16> {
        let picks = MAGLEV.get_ptr(table)?.cast::<u16>();
        // Behind this the verifier has to see the very register that was compared.
        let slot = core::hint::black_box(slot);
        if slot >= MAGLEV_SLOTS as u32 {
            return None;
        }
        // SAFETY: the element has MAGLEV_SLOTS picks, `slot` is one of them, and an element of an array stays.
        Some(unsafe { read_volatile(picks.add(slot as usize)) })
    }

    #[inline(always)]
    fn node_flags(&self, address: &Address) -> u32 {
        NODE_ADDRS.get_ptr(address).map_or(0, copy)
    }

    /// Only the fields that the caller looks at are read: each stands for itself, and the element is never another's.
    #[inline(always)]
    fn config(&self) -> Option<Config> {
        // SAFETY: the kernel keeps the element readable until the program ends, and every bit pattern is valid.
        CONFIG.get_ptr(0).map(|config| unsafe { *config })
    }

    #[inline(always)]
    fn count(&self, counter: Counter) {
        if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
            // SAFETY: the element belongs to this CPU and a program is not preempted by another on it that counts
            // the same reason but in rare cases, where a count may be lost and nothing else.
            unsafe { *value = (*value).wrapping_add(1) };
        }
    }
}

/// BPF_NOEXIST (uapi/linux/bpf.h): write only where there is no entry.
const ONLY_NEW: u64 = 1;

impl Affinities for Maps {
    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        AFFINITY.get_ptr(key).map(copy)
    }

    #[inline(always)]
    fn bind(&self, key: &AffinityKey, value: &Affinity, fresh: bool) -> bool {
        AFFINITY.insert(key, value, if fresh { ONLY_NEW } else { 0 }).is_ok()
    }

    #[inline(always)]
    fn member(&self, key: &MemberKey) -> Option<u32> {
        MEMBERS.get_ptr(key).map(copy)
    }
}

impl Peers for Maps {
    #[inline(always)]
    fn owner(&self, place: u32) -> u64 {
        // SAFETY: the element of an array stays, and a word is read at once.
        PEER_OWNERS.get_ptr(place).map_or(0, |owner| unsafe { read_volatile(owner) })
    }

    #[inline(always)]
    fn take(&self, place: u32, cookie: u64) -> bool {
        // SAFETY: the element of an array stays, and is aligned to 8.
        PEER_OWNERS.get_ptr_mut(place).is_some_and(|owner| unsafe { claim(owner, cookie) })
    }

    #[inline(always)]
    fn leave(&self, place: u32) {
        if let Some(owner) = PEER_OWNERS.get_ptr_mut(place) {
            // SAFETY: the element of an array stays, and a word is written at once.
            unsafe { write_volatile(owner, 0) };
        }
    }

    #[inline(always)]
    fn entry(&self, place: u32) -> Option<ReverseEntry> {
        PEERS.get_ptr(place).map(copy)
    }

    #[inline(always)]
    fn set_entry(&self, place: u32, entry: &ReverseEntry) {
        if let Some(held) = PEERS.get_ptr_mut(place) {
            replace(held, entry);
        }
    }
}
