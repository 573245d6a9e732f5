//! XDP on uplinks: the packets of known flows, before the stack makes anything of them. Invariant: whatever is out of the
//! ordinary is left unchanged to traffic control at the same device, which shares the flows: a packet without a flow, with
//! options, of a fragment, with a checksum that is left to the device, an ICMP error, one without a neighbour, one that leaves
//! by another device.

use crate::maps;
use crate::skb::{Env, Hook};
use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    helpers::generated::{bpf_xdp_adjust_head, bpf_xdp_load_bytes, bpf_xdp_store_bytes},
    macros::xdp,
    programs::XdpContext,
};
use core::mem::MaybeUninit;
use core::ptr::{addr_of, read_volatile};
use sheave_ebpf_abi::{Counter, PROTO_TCP, PROTO_UDP};
use sheave_ebpf_core::balance::{self, Link, Side, Stage, Verdict};
use sheave_ebpf_core::env::{Packet, Table as _};
use sheave_ebpf_core::packet::{
    ETHER_IPV4, ETHER_IPV6, ETHER_LEN, IPV4_LEN, IPV6_LEN, TCP_CHECK, UDP_CHECK, address6, pair6, word,
};
use sheave_ebpf_core::{checksum, quick};
use sheave_ebpf_kernel::frame::words;

#[xdp]
pub fn shv_xdp(ctx: XdpContext) -> u32 {
    let mut frame = Frame { ctx: &ctx };
    let env = Env { ctx: &ctx };
    if quick::passes(&frame, &env, Side::Ingress) || !is_plain(&frame) {
        return XDP_PASS;
    }
    let Some(work) = maps::work() else { return XDP_PASS };
    match balance::ingress(&mut frame, &env, work, Link::Uplink) {
        Stage::Done(Verdict::Redirect) => {
            if !frame.store::<12>(0, work.route.link, false) {
                env.count(Counter::RewriteFailed);
                return XDP_DROP;
            }
            env.count(Counter::XdpSent);
            XDP_TX
        }
        Stage::Done(Verdict::Drop) => XDP_DROP,
        _ => XDP_PASS,
    }
}

/// Whether it is a whole TCP or UDP packet right behind a plain IP header, with a checksum of its own.
#[inline(always)]
fn is_plain(frame: &Frame<'_>) -> bool {
    let (proto, l4, pseudo) = match frame.ether_type() {
        ETHER_IPV4 => match frame.load::<20>(ETHER_LEN) {
            // The bit that more fragments follow, and the fragment's offset.
            Some(ip) if ip[0] == 0x45 && ip[6] & 0x3f == 0 && ip[7] == 0 => {
                let len = u16::from_be_bytes([ip[2], ip[3]]).wrapping_sub(IPV4_LEN as u16);
                let addresses = checksum::diff(&[0, 0], &[word(&ip, 12), word(&ip, 16)]);
                (ip[9], ETHER_LEN + IPV4_LEN, checksum::add(addresses, u32::from(len.to_be())))
            }
            _ => return false,
        },
        ETHER_IPV6 => match frame.load::<40>(ETHER_LEN) {
            Some(ip) => {
                let (src, dst) = (address6(&ip, 8), address6(&ip, 24));
                let addresses = checksum::diff(&[0; 8], &pair6(&src, &dst));
                let len = u16::from_ne_bytes([ip[4], ip[5]]);
                (ip[6], ETHER_LEN + IPV6_LEN, checksum::add(addresses, u32::from(len)))
            }
            None => return false,
        },
        _ => return false,
    };
    let check = match proto {
        PROTO_TCP => TCP_CHECK,
        PROTO_UDP => UDP_CHECK,
        _ => return false,
    };
    // A sender of this host may have left the checksum to the device: there is the sum of the pseudo header then, which
    // must be corrected otherwise. One in 65,536 packets with a whole checksum looks the same, which does no harm.
    let sum = checksum::fold(checksum::add(pseudo, u32::from(u16::from(proto).to_be())));
    frame.load::<2>(l4 + check).is_some_and(|held| u16::from_ne_bytes(held) != sum)
}

impl Hook for XdpContext {
    const EARLY: bool = true;
    #[inline(always)]
    fn device(&self) -> u32 {
        // SAFETY: the context is valid for the whole program and the field may be read as 32 bits.
        unsafe { read_volatile(addr_of!((*self.ctx).ingress_ifindex)) }
    }
}

/// A packet as the driver received it, with its checksums complete.
struct Frame<'a> {
    ctx: &'a XdpContext,
}

impl Frame<'_> {
    #[inline(always)]
    fn fix(&mut self, offset: u32, diff: u32, zero_is_none: bool) -> bool {
        let Some(held) = self.load::<2>(offset) else { return false };
        let held = u16::from_ne_bytes(held);
        if zero_is_none && held == 0 {
            return true;
        }
        let fixed = checksum::apply(held, diff);
        let fixed = if zero_is_none && fixed == 0 { 0xffff } else { fixed };
        self.store::<2>(offset, fixed.to_ne_bytes(), false)
    }
}

impl Packet for Frame<'_> {
    #[inline(always)]
    fn ether_type(&self) -> u16 {
        self.load::<2>(12).map_or(0, u16::from_be_bytes)
    }

    /// A tag is part of the frame here, and makes it none of IP.
    #[inline(always)]
    fn is_tagged(&self) -> bool {
        false
    }

    #[inline(always)]
    fn size(&self) -> u32 {
        (self.ctx.data_end() - self.ctx.data()) as u32
    }

    /// Nothing is merged yet when this hook sees it.
    #[inline(always)]
    fn segment_len(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: `bytes` has room for N bytes, and is taken for initialised only when the helper wrote all of them.
        unsafe {
            match bpf_xdp_load_bytes(self.ctx.ctx, offset, bytes.as_mut_ptr().cast(), N as u32) {
                0 => Some(bytes.assume_init()),
                _ => None,
            }
        }
    }

    #[inline(always)]
    fn words<const W: usize>(&self) -> Option<[u32; W]> {
        words(self.ctx.data(), self.ctx.data_end())
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: u32, mut bytes: [u8; N], _: bool) -> bool {
        // SAFETY: `bytes` holds N bytes for the duration of the call.
        unsafe { bpf_xdp_store_bytes(self.ctx.ctx, offset, bytes.as_mut_ptr().cast(), N as u32) == 0 }
    }

    #[inline(always)]
    fn fix_l3(&mut self, offset: u32, diff: u32) -> bool {
        self.fix(offset, diff, false)
    }

    #[inline(always)]
    fn fix_l4(&mut self, offset: u32, diff: u32, _: bool, zero_is_none: bool) -> bool {
        self.fix(offset, diff, zero_is_none)
    }

    /// Nothing is answered here.
    #[inline(always)]
    fn cut(&mut self, _: u32) {}

    /// Nothing is answered here.
    #[inline(always)]
    fn insert(&mut self, _: u32) -> bool {
        false
    }

    #[inline(always)]
    fn wrap(&mut self, v6: bool) -> bool {
        let room = if v6 { IPV6_LEN } else { IPV4_LEN };
        // SAFETY: the helper checks the length.
        if unsafe { bpf_xdp_adjust_head(self.ctx.ctx, -(room as i32)) } != 0 {
            return false;
        }
        // The link's header comes along.
        self.load::<14>(room).is_some_and(|ether| self.store::<14>(0, ether, false))
    }
}
