//! The network object's maps and how the core reads them. Invariant: a value is copied out of its map word by word,
//! each word once, so that the core judges the bytes that it uses.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, lpm_trie::Key},
    helpers::generated::bpf_ktime_get_coarse_ns,
    macros::btf_map,
};
use core::mem::MaybeUninit;
use core::ptr::read_volatile;
use sheave_ebpf_abi::{
    Address, Endpoint, FlowKey, NetConfig, NetCounter, NetFlow, Plain, VerdictKey, net_map as map,
};
use sheave_ebpf_core::guard::World;

const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map(name = "shv_net_config")]
static CONFIG: Array<NetConfig, 1> = Array::new();
#[btf_map(name = "shv_net_endpts")]
static ENDPOINTS: HashMap<Address, Endpoint, { map::ENDPOINTS_MAX }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "shv_net_ranges")]
static RANGES: LpmTrie<[u32; 5], u32, { map::RANGES_MAX }> = LpmTrie::new();
#[btf_map(name = "shv_net_verdict")]
static VERDICTS: HashMap<VerdictKey, u32, { map::VERDICTS_MAX }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "shv_net_ports")]
static PORTS: LpmTrie<[u32; 2], u32, { map::PORTS_MAX }> = LpmTrie::new();
#[btf_map(name = "shv_net_flows")]
static FLOWS: LruHashMap<FlowKey, NetFlow, { map::FLOWS_MAX }> = LruHashMap::new();
#[btf_map(name = "shv_net_counts")]
static COUNTERS: PerCpuArray<u64, { map::COUNTERS_MAX }> = PerCpuArray::new();

/// Copies a map value, reading every word of it exactly once.
#[inline(always)]
fn copy<T: Plain>(value: *const T) -> T {
    const { assert!(size_of::<T>() % 4 == 0 && align_of::<T>() >= 4) };
    let mut out = MaybeUninit::<T>::uninit();
    let from = value.cast::<u32>();
    let into = out.as_mut_ptr().cast::<u32>();
    let mut word = 0;
    while word < size_of::<T>() / 4 {
        // SAFETY: `value` came from a map lookup of this program run: the kernel keeps the element's memory readable
        // until the program ends. Both places hold size_of::<T>() bytes aligned to 4.
        unsafe { into.add(word).write(read_volatile(from.add(word))) };
        word += 1;
    }
    // SAFETY: all bytes were written, and every bit pattern of a plain type is valid.
    unsafe { out.assume_init() }
}

/// The pinned maps.
#[derive(Clone, Copy)]
pub struct Maps;

impl World for Maps {
    #[inline(always)]
    fn config(&self) -> Option<NetConfig> {
        CONFIG.get_ptr(0).map(copy)
    }

    #[inline(always)]
    fn endpoint(&self, address: &Address) -> Option<Endpoint> {
        ENDPOINTS.get_ptr(address).map(copy)
    }

    #[inline(always)]
    fn range(&self, address: &Address) -> u32 {
        let family = if address.as_v4().is_some() { 4 } else { 6 };
        let [a, b, c, d] = address.words;
        RANGES.get(&Key::new(32 + 128, [family, a, b, c, d])).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn verdict(&self, key: &VerdictKey) -> Option<u32> {
        VERDICTS.get_ptr(key).map(copy)
    }

    #[inline(always)]
    fn has_port(&self, ports: u32, proto: u8, port: u16) -> bool {
        // The protocol, a gap and the port as they lie in memory.
        let word = u32::from(proto) | u32::from(port) << 16;
        PORTS.get(&Key::new(64, [ports, word])).is_some()
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<NetFlow> {
        FLOWS.get_ptr(key).map(copy)
    }

    #[inline(always)]
    fn keep(&self, key: &FlowKey, flow: &NetFlow) -> bool {
        FLOWS.insert(key, flow, 0).is_ok()
    }

    #[inline(always)]
    fn now_s(&self) -> u32 {
        // SAFETY: the helper takes nothing and cannot fail.
        (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
    }

    #[inline(always)]
    fn count(&self, counter: NetCounter) {
        if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
            // SAFETY: the element belongs to this CPU; where programs interrupt each other a count may be lost and
            // nothing else.
            unsafe { *value = (*value).wrapping_add(1) };
        }
    }
}
