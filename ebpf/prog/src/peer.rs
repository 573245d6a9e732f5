//! recvmsg(2) and getpeername(2). Invariant: they only ever change what the program is shown, never what it may do.

use crate::maps::Maps;
use crate::sock::{ALLOW, Call};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use sheave_ebpf_abi::{Address, Counter};
use sheave_ebpf_core::env::Table as _;
use sheave_ebpf_core::resolve::{Destination, is_current};
use sheave_ebpf_core::reverse;

#[cgroup_sock_addr(recvmsg4)]
pub fn shv_recvmsg4(ctx: SockAddrContext) -> i32 {
    let call = Call::new(&ctx);
    show(&call, call.address4(), Counter::Recvmsg, |addr, port| call.set4(addr, port))
}

#[cgroup_sock_addr(recvmsg6)]
pub fn shv_recvmsg6(ctx: SockAddrContext) -> i32 {
    let call = Call::new(&ctx);
    show(&call, call.address6(), Counter::Recvmsg, |addr, port| call.set6(addr, port))
}

#[cgroup_sock_addr(getpeername4)]
pub fn shv_getpeername4(ctx: SockAddrContext) -> i32 {
    let call = Call::new(&ctx);
    show(&call, call.address4(), Counter::Getpeername, |addr, port| call.set4(addr, port))
}

#[cgroup_sock_addr(getpeername6)]
pub fn shv_getpeername6(ctx: SockAddrContext) -> i32 {
    let call = Call::new(&ctx);
    show(&call, call.address6(), Counter::Getpeername, |addr, port| call.set6(addr, port))
}

#[inline(always)]
fn show(
    call: &Call<'_>,
    peer: Option<Destination>,
    counter: Counter,
    set: impl Fn(&Address, u16) -> bool,
) -> i32 {
    let Some(peer) = peer else { return ALLOW };
    let Some((asked, service)) = reverse::recall(call, &Maps, &peer) else { return ALLOW };
    // A connection was made through the service for good; a datagram may come long after the service has gone.
    if counter == Counter::Recvmsg && !is_current(&Maps, &asked, service) {
        Maps.count(Counter::RecvmsgStale);
    } else if set(&asked.addr, asked.port) {
        Maps.count(counter);
    }
    ALLOW
}
