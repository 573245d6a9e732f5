//! The kernel programs. Invariant: a program fetches bytes, calls the core and returns its verdict; whatever decides
//! is in `sheave-ebpf-core`, where it is tested on the host.
#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "map references, context accesses and helpers are unsafe in a BPF program")]

mod bind;
mod connect;
mod event;
mod flows;
mod maps;
mod peer;
mod release;
mod sendmsg;
mod skb;
mod sock;
mod tc;
mod xdp;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Lets the helpers that the kernel reserves for GPL-compatible programs be called.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
