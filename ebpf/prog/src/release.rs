//! close(2) of the last descriptor of a socket. Invariant: what is remembered of a TCP connection lives as long as its socket.

use crate::maps::Maps;
use crate::sock::ALLOW;
use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock, programs::SockContext,
};
use core::ptr::{addr_of, read_volatile};
use sheave_ebpf_abi::PROTO_UDP;
use sheave_ebpf_core::reverse;

#[cgroup_sock(sock_release)]
pub fn shv_release(ctx: SockContext) -> i32 {
    // All but UDP, since MPTCP is TCP here.
    // SAFETY: the context is valid for the whole program and the field may be read as 32 bits.
    if unsafe { read_volatile(addr_of!((*ctx.sock).protocol)) } == u32::from(PROTO_UDP) {
        return ALLOW;
    }
    // SAFETY: the context is valid for the whole program.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    reverse::forget(&Maps, cookie);
    ALLOW
}
