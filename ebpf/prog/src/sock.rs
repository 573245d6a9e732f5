//! The socket address hooks' context. Invariant: every access is 32 bits wide and volatile, the only form that the
//! verifier takes for these fields on all kernels.

use crate::event::tell;
use crate::maps::{self, REVERSE_LRU, REVERSE_SK};
use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock_addr,
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_set_retval,
    },
    programs::SockAddrContext,
};
use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};
use sheave_ebpf_abi::{
    Address, Backend, Config, Counter, Event, PROTO_TCP, PROTO_UDP, Plain as _, ReverseEntry, ReverseKey,
    ReverseValue, event_kind,
};
use sheave_ebpf_core::env::{Socket, Table as _};
use sheave_ebpf_core::resolve::{Caller, Destination, Resolution, resolve};
use sheave_ebpf_core::select;
use sheave_ebpf_kernel::value::{copy, replace};

/// IPPROTO_MPTCP (uapi/linux/in.h): behaves as TCP here.
pub const PROTO_MPTCP: u32 = 262;
/// ECONNREFUSED (asm-generic/errno.h), what a refused port answers.
const ECONNREFUSED: i32 = 111;
/// ENOBUFS (asm-generic/errno.h).
const ENOBUFS: i32 = 105;
/// EAGAIN (asm-generic/errno-base.h).
const EAGAIN: i32 = 11;

/// The call goes on.
pub const ALLOW: i32 = 1;
/// The call fails with the value given to `bpf_set_retval`, else with EPERM.
pub const DENY: i32 = 0;

/// A hook's context as a socket and its address.
pub struct Call<'a> {
    ctx: &'a SockAddrContext,
}

impl<'a> Call<'a> {
    #[inline(always)]
    pub fn new(ctx: &'a SockAddrContext) -> Self {
        Self { ctx }
    }

    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_addr {
        self.ctx.sock_addr
    }

    /// TCP or UDP; `None` for every other protocol.
    #[inline(always)]
    fn proto(&self) -> Option<u8> {
        // SAFETY: the context is valid for the whole program and the field may be read as 32 bits.
        let proto = unsafe { read_volatile(addr_of!((*self.raw()).protocol)) };
        if proto == u32::from(PROTO_TCP) || proto == PROTO_MPTCP {
            Some(PROTO_TCP)
        } else if proto == u32::from(PROTO_UDP) {
            Some(PROTO_UDP)
        } else {
            None
        }
    }

    #[inline(always)]
    fn port(&self) -> u16 {
        // SAFETY: as in `proto`. The port is in network order in the low 16 bits.
        (unsafe { read_volatile(addr_of!((*self.raw()).user_port)) }) as u16
    }

    #[inline(always)]
    fn set_port(&self, port: u16) {
        // SAFETY: as in `proto`, and the field may be written as 32 bits.
        unsafe { write_volatile(addr_of_mut!((*self.raw()).user_port), u32::from(port)) };
    }

    /// The address that an IPv4 hook was called with.
    #[inline(always)]
    pub fn address4(&self) -> Option<Destination> {
        let proto = self.proto()?;
        // SAFETY: as in `proto`; only IPv4 programs call this.
        let word = unsafe { read_volatile(addr_of!((*self.raw()).user_ip4)) };
        Some(Destination { addr: Address::v4(word), port: self.port(), proto })
    }

    /// The address that an IPv6 hook was called with, which may be an IPv4-mapped one.
    #[inline(always)]
    pub fn address6(&self) -> Option<Destination> {
        let proto = self.proto()?;
        // SAFETY: as in `proto`; only IPv6 programs call this.
        let words = unsafe {
            let at = addr_of!((*self.raw()).user_ip6).cast::<u32>();
            [read_volatile(at), read_volatile(at.add(1)), read_volatile(at.add(2)), read_volatile(at.add(3))]
        };
        Some(Destination { addr: Address::v6(words), port: self.port(), proto })
    }

    /// Replaces the address of an IPv4 hook; false when `addr` is not IPv4.
    #[inline(always)]
    pub fn set4(&self, addr: &Address, port: u16) -> bool {
        let Some(word) = addr.as_v4() else { return false };
        // SAFETY: as in `address4`, and the field may be written as 32 bits.
        unsafe { write_volatile(addr_of_mut!((*self.raw()).user_ip4), word) };
        self.set_port(port);
        true
    }

    /// Replaces the address of an IPv6 hook.
    #[inline(always)]
    pub fn set6(&self, addr: &Address, port: u16) -> bool {
        // SAFETY: as in `address6`, and the words may be written as 32 bits each.
        unsafe {
            let at = addr_of_mut!((*self.raw()).user_ip6).cast::<u32>();
            write_volatile(at, addr.words[0]);
            write_volatile(at.add(1), addr.words[1]);
            write_volatile(at.add(2), addr.words[2]);
            write_volatile(at.add(3), addr.words[3]);
        }
        self.set_port(port);
        true
    }

    /// The backend for `asked`, or the verdict that ends the call.
    #[inline(always)]
    pub fn resolve(
        &self,
        asked: &Destination,
        no_endpoints: Counter,
        hook: u8,
    ) -> Result<(Backend, u32), i32> {
        match resolve(&maps::Maps, asked, self) {
            Resolution::NotService => Err(ALLOW),
            Resolution::NoEndpoints => Err(refuse(asked, hook, no_endpoints, ECONNREFUSED)),
            Resolution::Stale => Err(refuse(asked, hook, Counter::StaleSlot, EAGAIN)),
            Resolution::To(backend, service) => Ok((backend, service)),
        }
    }
}

/// Fails the call because its translation cannot be remembered.
#[inline(always)]
pub fn refuse_unremembered(asked: &Destination, hook: u8) -> i32 {
    refuse(asked, hook, Counter::ReverseFull, ENOBUFS)
}

/// Tells a listener where a call's traffic goes.
#[inline(always)]
pub fn tell_connection(asked: &Destination, to: &Backend, service: u32, hook: u8, counter: Counter) {
    tell(|| Event {
        backend: to.addr,
        backend_port: to.port,
        service,
        ..of_call(asked, hook, event_kind::CONNECTION, counter)
    });
}

#[inline(always)]
fn of_call(asked: &Destination, hook: u8, kind: u8, counter: Counter) -> Event {
    Event {
        asked: asked.addr,
        asked_port: asked.port,
        proto: asked.proto,
        reason: counter as u16,
        kind,
        hook,
        ..Event::zeroed()
    }
}

#[inline(always)]
pub fn refuse(asked: &Destination, hook: u8, counter: Counter, errno: i32) -> i32 {
    maps::Maps.count(counter);
    tell(|| of_call(asked, hook, event_kind::DROP, counter));
    // SAFETY: the helper takes an errno; where it fails the call ends with EPERM instead.
    unsafe { bpf_set_retval(-errno) };
    DENY
}

impl Caller for Call<'_> {
    #[inline(always)]
    fn on_node(&self, config: &Config) -> bool {
        self.netns_cookie() == config.node_netns_cookie
    }

    /// TCP picks at random; UDP by socket, so that the datagrams of one socket stay with one backend.
    #[inline(always)]
    fn entropy(&self, proto: u8) -> u32 {
        if proto == PROTO_UDP {
            select::mix(self.cookie())
        } else {
            // SAFETY: the helper takes nothing and cannot fail.
            unsafe { bpf_get_prandom_u32() }
        }
    }

    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        // SAFETY: the context is valid for the whole program.
        unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) }
    }

    #[inline(always)]
    fn now_s(&self) -> u32 {
        // SAFETY: the helper takes nothing and cannot fail.
        (unsafe { bpf_ktime_get_ns() } / 1_000_000_000) as u32
    }
}

impl Socket for Call<'_> {
    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the context is valid for the whole program.
        unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) }
    }

    #[inline(always)]
    fn stored(&self) -> Option<ReverseEntry> {
        // SAFETY: the context's socket is valid for the whole program.
        let entry = unsafe { REVERSE_SK.get_ptr_mut(self.ctx) };
        if entry.is_null() { None } else { Some(copy(entry.cast_const())) }
    }

    #[inline(always)]
    fn store(&self, entry: &ReverseEntry) -> bool {
        let mut first = *entry;
        // SAFETY: as in `stored`; `first` lives until the call returns.
        let held = unsafe { REVERSE_SK.get_or_insert_ptr_mut(self.ctx, Some(&mut first)) };
        if held.is_null() {
            return false;
        }
        replace(held, entry);
        true
    }

    #[inline(always)]
    fn reverse(&self, key: &ReverseKey) -> Option<ReverseValue> {
        REVERSE_LRU.get_ptr(key).map(copy)
    }

    #[inline(always)]
    fn set_reverse(&self, key: &ReverseKey, value: &ReverseValue) -> bool {
        REVERSE_LRU.insert(key, value, 0).is_ok()
    }
}
