//! Traffic control on an uplink: NodePort traffic in and its answers out. Invariant: packet bytes are read and
//! written through helpers only, which works for non-linear buffers and keeps the device's checksum offload right.

use crate::maps::{self, FLOWS, Maps};
use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::{
        bpf_ktime_get_ns, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
    macros::classifier,
    programs::TcContext,
};
use core::mem::MaybeUninit;
use core::ptr::{addr_of, read_volatile};
use sheave_ebpf_abi::{
    Address, Backend, Config, Counter, FLOW_CLOSING, Flow, FlowKey, Frontend, Frontend4Key, Frontend6Key,
    Slot,
};
use sheave_ebpf_core::env::{Flows, Packet, Table};
use sheave_ebpf_core::nodeport::{self, Verdict};

#[classifier]
pub fn shv_tc_ingress(ctx: TcContext) -> i32 {
    code(nodeport::ingress(&mut Skb { ctx: &ctx }, &Env))
}

#[classifier]
pub fn shv_tc_egress(ctx: TcContext) -> i32 {
    code(nodeport::egress(&mut Skb { ctx: &ctx }, &Env))
}

/// `TC_ACT_UNSPEC` hands the packet to the next program on a clsact qdisc and, as TCX_NEXT, on a tcx hook.
#[inline(always)]
fn code(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::Drop => TC_ACT_SHOT as i32,
    }
}

struct Env;

impl Table for Env {
    #[inline(always)]
    fn frontend4(&self, key: &Frontend4Key) -> Option<Frontend> {
        Maps.frontend4(key)
    }
    #[inline(always)]
    fn frontend6(&self, key: &Frontend6Key) -> Option<Frontend> {
        Maps.frontend6(key)
    }
    #[inline(always)]
    fn slot(&self, index: u32) -> Option<Slot> {
        Maps.slot(index)
    }
    #[inline(always)]
    fn backend(&self, id: u32) -> Option<Backend> {
        Maps.backend(id)
    }
    #[inline(always)]
    fn maglev(&self, table: u32, slot: u32) -> Option<u16> {
        Maps.maglev(table, slot)
    }
    #[inline(always)]
    fn node_flags(&self, address: &Address) -> u32 {
        Maps.node_flags(address)
    }
    #[inline(always)]
    fn config(&self) -> Option<Config> {
        Maps.config()
    }
    #[inline(always)]
    fn count(&self, counter: Counter) {
        Maps.count(counter);
    }
}

impl Flows for Env {
    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        FLOWS.get_ptr(key).map(maps::copy)
    }

    #[inline(always)]
    fn seen(&self, key: &FlowKey, now_s: u32, closing: bool) -> Option<Flow> {
        let held = FLOWS.get_ptr_mut(key)?;
        let flow = maps::copy(held.cast_const());
        // SAFETY: the element stays readable and writable until the program ends; a write that races with its
        // eviction touches only the time and the flags of a flow entry.
        unsafe {
            if flow.seen_s != now_s {
                (*held).seen_s = now_s;
            }
            if closing {
                (*held).flags = flow.flags | FLOW_CLOSING;
            }
        }
        Some(flow)
    }

    #[inline(always)]
    fn put(&self, key: &FlowKey, flow: &Flow) -> bool {
        FLOWS.insert(key, flow, 0).is_ok()
    }

    #[inline(always)]
    fn now_s(&self) -> u32 {
        // SAFETY: the helper takes nothing and cannot fail.
        (unsafe { bpf_ktime_get_ns() } / 1_000_000_000) as u32
    }
}

struct Skb<'a> {
    ctx: &'a TcContext,
}

impl Packet for Skb<'_> {
    #[inline(always)]
    fn ether_type(&self) -> u16 {
        // SAFETY: the context is valid for the whole program and the field may be read as 32 bits.
        let protocol = unsafe { read_volatile(addr_of!((*self.ctx.skb.skb).protocol)) };
        u16::from_be(protocol as u16)
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: `bytes` has room for N bytes, and the helper writes all of them (zeroes where it fails).
        unsafe {
            match bpf_skb_load_bytes(self.ctx.as_ptr(), offset, bytes.as_mut_ptr().cast(), N as u32) {
                0 => Some(bytes.assume_init()),
                _ => None,
            }
        }
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: u32, bytes: [u8; N], sums: bool) -> bool {
        let flags = if sums { u64::from(BPF_F_RECOMPUTE_CSUM) } else { 0 };
        // SAFETY: `bytes` holds N bytes for the duration of the call.
        unsafe { bpf_skb_store_bytes(self.ctx.skb.skb, offset, bytes.as_ptr().cast(), N as u32, flags) == 0 }
    }

    #[inline(always)]
    fn fix_l3(&mut self, offset: u32, diff: u32) -> bool {
        // SAFETY: the helper checks the offset; a size of 0 means that the last argument is a difference.
        unsafe { bpf_l3_csum_replace(self.ctx.skb.skb, offset, 0, u64::from(diff), 0) == 0 }
    }

    #[inline(always)]
    fn fix_l4(&mut self, offset: u32, diff: u32, pseudo: bool, zero_is_none: bool) -> bool {
        let mut flags = 0;
        if pseudo {
            flags |= u64::from(BPF_F_PSEUDO_HDR);
        }
        if zero_is_none {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        // SAFETY: as in `fix_l3`.
        unsafe { bpf_l4_csum_replace(self.ctx.skb.skb, offset, 0, u64::from(diff), flags) == 0 }
    }
}
