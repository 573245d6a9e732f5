//! A packet at a traffic control hook, as far as the guard needs one. Invariant: bytes are read and written through
//! helpers only, which works for non-linear buffers.

use aya_ebpf::{
    EbpfContext,
    helpers::generated::{bpf_l3_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes},
    programs::TcContext,
};
use core::mem::MaybeUninit;
use core::ptr::{addr_of, read_volatile};
use sheave_ebpf_core::env::Packet;

pub struct Skb<'a> {
    pub ctx: &'a TcContext,
}

impl Packet for Skb<'_> {
    #[inline(always)]
    fn ether_type(&self) -> u16 {
        // SAFETY: the context is valid for the whole program and the field may be read as 32 bits.
        let protocol = unsafe { read_volatile(addr_of!((*self.ctx.skb.skb).protocol)) };
        u16::from_be(protocol as u16)
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: as in `ether_type`.
        unsafe { read_volatile(addr_of!((*self.ctx.skb.skb).vlan_present)) != 0 }
    }

    #[inline(always)]
    fn size(&self) -> u32 {
        self.ctx.len()
    }

    #[inline(always)]
    fn segment_len(&self) -> u32 {
        0
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
    fn read<const N: usize>(&self, offset: u32, into: &mut [u8; N]) -> bool {
        // SAFETY: `into` has room for N bytes.
        unsafe { bpf_skb_load_bytes(self.ctx.as_ptr(), offset, into.as_mut_ptr().cast(), N as u32) == 0 }
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: u32, bytes: [u8; N], sums: bool) -> bool {
        const RECOMPUTE: u64 = 1;
        let flags = if sums { RECOMPUTE } else { 0 };
        // SAFETY: `bytes` holds N bytes for the duration of the call.
        unsafe { bpf_skb_store_bytes(self.ctx.skb.skb, offset, bytes.as_ptr().cast(), N as u32, flags) == 0 }
    }

    #[inline(always)]
    fn fix_l3(&mut self, offset: u32, diff: u32) -> bool {
        // SAFETY: the helper checks the offset; a size of 0 means that the last argument is a difference.
        unsafe { bpf_l3_csum_replace(self.ctx.skb.skb, offset, 0, u64::from(diff), 0) == 0 }
    }

    #[inline(always)]
    fn fix_l4(&mut self, _: u32, _: u32, _: bool, _: bool) -> bool {
        false
    }

    #[inline(always)]
    fn cut(&mut self, _: u32) {}

    #[inline(always)]
    fn insert(&mut self, _: u32) -> bool {
        false
    }
}
