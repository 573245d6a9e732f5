//! bind(2), after the kernel has given the socket its port. Invariant: only sockets of the node's own network namespace
//! are refused, and only what a service would keep from ever being heard there.

use crate::maps::Maps;
use crate::sock::{ALLOW, PROTO_MPTCP, refuse};
use aya_ebpf::{
    EbpfContext as _, bindings::bpf_sock, helpers::generated::bpf_get_netns_cookie, macros::cgroup_sock,
    programs::SockContext,
};
use core::ptr::{addr_of, read_volatile};
use sheave_ebpf_abi::{Address, Counter, PROTO_TCP, PROTO_UDP, event_hook};
use sheave_ebpf_core::env::Table as _;
use sheave_ebpf_core::resolve::{Destination, is_taken};

/// EADDRINUSE (asm-generic/errno.h), what bind says of a port that somebody has.
const EADDRINUSE: i32 = 98;

#[cgroup_sock(post_bind4)]
pub fn shv_post_bind4(ctx: SockContext) -> i32 {
    // SAFETY: the context is valid for the whole program and the field may be read as 32 bits.
    let word = unsafe { read_volatile(addr_of!((*ctx.sock).src_ip4)) };
    bind(&ctx, Address::v4(word))
}

#[cgroup_sock(post_bind6)]
pub fn shv_post_bind6(ctx: SockContext) -> i32 {
    // SAFETY: as in `shv_post_bind4`, word by word.
    let words = unsafe {
        let at = addr_of!((*ctx.sock).src_ip6).cast::<u32>();
        [read_volatile(at), read_volatile(at.add(1)), read_volatile(at.add(2)), read_volatile(at.add(3))]
    };
    bind(&ctx, Address::v6(words))
}

#[inline(always)]
fn bind(ctx: &SockContext, addr: Address) -> i32 {
    let sock: *const bpf_sock = ctx.sock;
    // SAFETY: as in `shv_post_bind4`. The port is in host order here.
    let (proto, port) =
        unsafe { (read_volatile(addr_of!((*sock).protocol)), read_volatile(addr_of!((*sock).src_port))) };
    let proto = match proto {
        PROTO_MPTCP => PROTO_TCP,
        proto if proto == u32::from(PROTO_TCP) => PROTO_TCP,
        proto if proto == u32::from(PROTO_UDP) => PROTO_UDP,
        _ => return ALLOW,
    };
    // SAFETY: the context is valid for the whole program.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let at = Destination { addr, port: (port as u16).to_be(), proto };
    if !Maps.config().is_some_and(|config| config.node_netns_cookie == netns) || !is_taken(&Maps, &at) {
        return ALLOW;
    }
    refuse(&at, event_hook::BIND, Counter::BindRefused, EADDRINUSE)
}
