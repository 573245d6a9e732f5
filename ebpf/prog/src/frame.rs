//! A packet at a traffic control hook. Invariant: bytes are read and written through helpers only, which works for
//! non-linear buffers and keeps the device's checksum offload right; what is read directly lies in one piece.

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM},
    helpers::generated::{
        bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_tail,
        bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use core::mem::MaybeUninit;
use core::ptr::{addr_of, read_volatile};
use sheave_ebpf_core::env::Packet;
use sheave_ebpf_core::packet::{ETHER_LEN, IPV4_LEN, IPV6_LEN};

/// BPF_ADJ_ROOM_MAC and BPF_F_ADJ_ROOM_* (uapi/linux/bpf.h).
const ADJ_ROOM_MAC: u32 = 1;
const FIXED_GSO: u64 = 1 << 0;
const ENCAP_IPV4: u64 = 1 << 1;
const ENCAP_IPV6: u64 = 1 << 2;

/// Index of the device that the packet is at.
#[inline(always)]
pub fn device(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid for the whole program and the field may be read as 32 bits.
    unsafe { read_volatile(addr_of!((*ctx.skb.skb).ifindex)) }
}

/// The first words behind the Ethernet header of what lies in one piece from `data` to `end`.
#[inline(always)]
pub fn words<const W: usize>(data: usize, end: usize) -> Option<[u32; W]> {
    const { assert!(W <= 16) };
    if data + (ETHER_LEN as usize) + W * 4 > end {
        return None;
    }
    let mut words = [0; W];
    let mut at = 0;
    while at < W {
        // SAFETY: the words lie before `end`. They need no alignment on this machine: its verifier has checked the access
        // for the processor that the program becomes code of.
        words[at] = unsafe { read_volatile((data as *const u32).byte_add(ETHER_LEN as usize + at * 4)) };
        at += 1;
    }
    Some(words)
}

/// Bytes that can be copied by the word.
#[repr(C, align(8))]
struct Aligned<const N: usize>([u8; N]);

/// A packet at a traffic control hook.
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
        // SAFETY: as in `ether_type`.
        unsafe { read_volatile(addr_of!((*self.ctx.skb.skb).gso_size)) }
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<Aligned<N>>::uninit();
        // SAFETY: `bytes` has room for N bytes, and the helper writes all of them (zeroes where it fails).
        unsafe {
            match bpf_skb_load_bytes(self.ctx.as_ptr(), offset, bytes.as_mut_ptr().cast(), N as u32) {
                0 => Some(bytes.assume_init().0),
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
    fn words<const W: usize>(&self) -> Option<[u32; W]> {
        words(self.ctx.data(), self.ctx.data_end())
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

    #[inline(always)]
    fn cut(&mut self, len: u32) {
        // SAFETY: the helper checks the length. Where it refuses, what is left over is not counted by the IP header.
        unsafe { bpf_skb_change_tail(self.ctx.skb.skb, len, 0) };
    }

    #[inline(always)]
    fn insert(&mut self, len: u32) -> bool {
        // SAFETY: the helper checks the length.
        unsafe { bpf_skb_adjust_room(self.ctx.skb.skb, len as i32, ADJ_ROOM_MAC, 0) == 0 }
    }

    /// The sizes of what will be several packets stay: whether they fit was asked with the header counted.
    #[inline(always)]
    fn wrap(&mut self, v6: bool) -> bool {
        let (len, family) = if v6 { (IPV6_LEN, ENCAP_IPV6) } else { (IPV4_LEN, ENCAP_IPV4) };
        let flags = family | FIXED_GSO;
        // SAFETY: as in `insert`.
        unsafe { bpf_skb_adjust_room(self.ctx.skb.skb, len as i32, ADJ_ROOM_MAC, flags) == 0 }
    }

    #[inline(always)]
    fn unwrap(&mut self, v6: bool) -> bool {
        let len = if v6 { IPV6_LEN } else { IPV4_LEN };
        // SAFETY: as in `insert`.
        unsafe { bpf_skb_adjust_room(self.ctx.skb.skb, -(len as i32), ADJ_ROOM_MAC, FIXED_GSO) == 0 }
    }
}
