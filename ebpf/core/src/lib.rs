//! Packet and balancing logic. Invariant: nothing here touches the kernel; it sees maps, sockets and packets only
//! through the traits of [`env`], so that the very code that runs in a hook is tested on the host.
//!
//! Everything is `#[inline(always)]`: the kernel's verifier wants one flat program a hook.
#![no_std]

pub mod affinity;
pub mod answer;
pub mod balance;
pub mod checksum;
mod door;
pub mod env;
pub mod flow;
pub mod guard;
pub mod icmp;
pub mod open;
pub mod packet;
pub mod quick;
pub mod resolve;
pub mod reverse;
pub mod select;
pub mod tunnel;

#[cfg(test)]
extern crate std;
// The golden frames belong to another crate as well.
#[cfg(test)]
extern crate self as sheave_ebpf_core;

#[cfg(test)]
pub mod golden;
#[cfg(test)]
mod host;
#[cfg(test)]
mod socket_tests;
