//! The network object: policies and the fast path at pods' links and at devices that lead out of the node. Invariant:
//! as in the service object a program fetches bytes, calls the core and returns its verdict.
//!
//! An object of its own, since a node may run either without the other.
#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "map references, context accesses and helpers are unsafe in a BPF program")]

mod maps;

use aya_ebpf::{
    EbpfContext,
    bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh},
    helpers::generated::{bpf_redirect_neigh, bpf_redirect_peer},
    macros::classifier,
    programs::TcContext,
};
use core::mem::MaybeUninit;
use core::ptr::addr_of_mut;
use maps::Maps;
use sheave_ebpf_abi::NetCounter;
use sheave_ebpf_core::guard::parse::Seen;
use sheave_ebpf_core::guard::{self, Place, Verdict, Work, World as _};
use sheave_ebpf_core::packet::pass_hop;
use sheave_ebpf_kernel::fib::{AF_INET, AF_INET6, FIB_NO_NEIGH, FIB_SUCCESS, FibLookup};
use sheave_ebpf_kernel::frame::{Skb, device};

/// At the node's end of a pod's pair, for what the pod sends.
#[classifier]
pub fn shv_net_from_pod(ctx: TcContext) -> i32 {
    run(&ctx, Place::FromPod)
}

/// At the node's end of a pod's pair, for what the pod receives.
#[classifier]
pub fn shv_net_to_pod(ctx: TcContext) -> i32 {
    run(&ctx, Place::ToPod)
}

/// At a device that leads out of the node, for what arrives there.
#[classifier]
pub fn shv_net_arrive(ctx: TcContext) -> i32 {
    run(&ctx, Place::Arriving)
}

#[inline(always)]
fn run(ctx: &TcContext, place: Place) -> i32 {
    let mut work = Work::NOTHING;
    let mut packet = Skb { ctx };
    // `TC_ACT_UNSPEC` hands the packet to the next program at the hook.
    match guard::pass(&Maps, &packet, &mut work, place, device(ctx)) {
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::Drop => TC_ACT_SHOT as i32,
        Verdict::Peer(to) => {
            if place == Place::ToPod || !hop(&mut packet, &work.seen) {
                return TC_ACT_SHOT as i32;
            }
            Maps.count(if place == Place::FromPod { NetCounter::FastPod } else { NetCounter::FastIn });
            // SAFETY: the helper takes numbers only.
            (unsafe { bpf_redirect_peer(to, 0) }) as i32
        }
        Verdict::Out => out(ctx, &mut packet, &work.seen),
    }
}

/// As the stack would have done.
#[inline(always)]
fn hop(packet: &mut Skb<'_>, seen: &Seen) -> bool {
    pass_hop(packet, seen.v6, seen.proto, seen.hops)
}

/// Sends the packet where the routing table says, or leaves it to the stack.
#[inline(never)]
fn out(ctx: &TcContext, packet: &mut Skb<'_>, seen: &Seen) -> i32 {
    let words = |address: &sheave_ebpf_abi::Address| {
        if seen.v6 { address.words } else { [address.words[3], 0, 0, 0] }
    };
    let mut fib = FibLookup {
        family: if seen.v6 { AF_INET6 } else { AF_INET },
        proto: seen.proto,
        sport: seen.sport,
        dport: seen.dport,
        // The kernel holds the packet itself against the MTU.
        len: 0,
        device: device(ctx),
        flow_info: 0,
        src: words(&seen.src),
        dst: words(&seen.dst),
        vlan: 0,
        smac: [0; 6],
        dmac: [0; 6],
    };
    // SAFETY: it is the program's own context.
    let answer = unsafe { fib.ask(ctx.as_ptr(), false) };
    if answer != FIB_SUCCESS && answer != FIB_NO_NEIGH {
        Maps.count(NetCounter::FastFailed);
        return TC_ACT_UNSPEC;
    }
    if !hop(packet, seen) {
        return TC_ACT_SHOT as i32;
    }
    let mut to = MaybeUninit::<bpf_redir_neigh>::zeroed();
    let place = to.as_mut_ptr();
    // SAFETY: all fields of the zeroed struct are integers; each is written where it lies.
    unsafe {
        addr_of_mut!((*place).nh_family).write(u32::from(fib.family));
        if fib.family == AF_INET {
            addr_of_mut!((*place).__bindgen_anon_1.ipv4_nh).write(fib.dst[0]);
        } else {
            addr_of_mut!((*place).__bindgen_anon_1.ipv6_nh).write(fib.dst);
        }
        let sent = bpf_redirect_neigh(fib.device, place, size_of::<bpf_redir_neigh>() as i32, 0);
        if sent < 0 {
            return TC_ACT_SHOT as i32;
        }
    }
    Maps.count(NetCounter::FastOut);
    TC_ACT_REDIRECT as i32
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Lets the helpers that the kernel reserves for GPL-compatible programs be called.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
