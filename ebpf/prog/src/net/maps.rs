//! The network object's maps and how the core reads them. Invariant: a value is copied out of its map word by word,
//! each word once, so that the core judges the bytes that it uses.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, lpm_trie::Key},
    helpers::generated::bpf_ktime_get_coarse_ns,
    macros::btf_map,
};
use sheave_ebpf_abi::{
    Address, Endpoint, FlowKey, NetConfig, NetCounter, NetFlow, VerdictKey, net_map as map,
};
use sheave_ebpf_core::guard::World;
use sheave_ebpf_kernel::value::copy;

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
