//! sendmsg(2) with an address on an unconnected socket. Invariant: the address is replaced only after the
//! translation is remembered.

use crate::maps::Maps;
use crate::sock::{ALLOW, Call, refuse_unremembered, tell_connection};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use sheave_ebpf_abi::{Address, Counter, event_hook};
use sheave_ebpf_core::env::Table as _;
use sheave_ebpf_core::resolve::Destination;
use sheave_ebpf_core::reverse::{self, Remembered};

#[cgroup_sock_addr(sendmsg4)]
pub fn shv_sendmsg4(ctx: SockAddrContext) -> i32 {
    let call = Call::new(&ctx);
    send(&call, call.address4(), |addr, port| call.set4(addr, port))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn shv_sendmsg6(ctx: SockAddrContext) -> i32 {
    let call = Call::new(&ctx);
    send(&call, call.address6(), |addr, port| call.set6(addr, port))
}

#[inline(always)]
fn send(call: &Call<'_>, asked: Option<Destination>, set: impl Fn(&Address, u16) -> bool) -> i32 {
    let Some(asked) = asked else { return ALLOW };
    let (backend, service) = match call.resolve(&asked, Counter::SendmsgNoEndpoints, event_hook::SENDMSG) {
        Ok(found) => found,
        Err(verdict) => return verdict,
    };
    let remembered = reverse::remember_datagram(call, &asked, &backend, service);
    if remembered == Remembered::No {
        return refuse_unremembered(&asked, event_hook::SENDMSG);
    }
    if set(&backend.addr, backend.port) {
        Maps.count(Counter::Sendmsg);
        if remembered == Remembered::Newly {
            tell_connection(&asked, &backend, service, event_hook::SENDMSG, Counter::Sendmsg);
        }
    }
    ALLOW
}
