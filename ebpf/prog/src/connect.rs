//! connect(2). Invariant: the address is replaced only after the translation is remembered.

use crate::maps::Maps;
use crate::sock::{ALLOW, Call, refuse_unremembered, tell_connection};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use sheave_ebpf_abi::{Address, Counter, event_hook};
use sheave_ebpf_core::env::Table as _;
use sheave_ebpf_core::resolve::Destination;
use sheave_ebpf_core::reverse;

#[cgroup_sock_addr(connect4)]
pub fn shv_connect4(ctx: SockAddrContext) -> i32 {
    let call = Call::new(&ctx);
    connect(&call, call.address4(), |addr, port| call.set4(addr, port))
}

#[cgroup_sock_addr(connect6)]
pub fn shv_connect6(ctx: SockAddrContext) -> i32 {
    let call = Call::new(&ctx);
    connect(&call, call.address6(), |addr, port| call.set6(addr, port))
}

#[inline(always)]
fn connect(call: &Call<'_>, asked: Option<Destination>, set: impl Fn(&Address, u16) -> bool) -> i32 {
    let Some(asked) = asked else { return ALLOW };
    let (backend, service) = match call.resolve(&asked, Counter::ConnectNoEndpoints, event_hook::CONNECT) {
        Ok(found) => found,
        Err(verdict) => return verdict,
    };
    if !reverse::remember_peer(call, &Maps, &asked, &backend, service) {
        return refuse_unremembered(&asked, event_hook::CONNECT);
    }
    if set(&backend.addr, backend.port) {
        Maps.count(Counter::Connect);
        tell_connection(&asked, &backend, service, event_hook::CONNECT, Counter::Connect);
    }
    ALLOW
}
