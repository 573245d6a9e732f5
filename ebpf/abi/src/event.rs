//! What the programs tell a listener. Invariant: an event is written whole or not at all, and only while somebody
//! listens ([`crate::map::LISTEN`]).

use crate::Address;
use crate::layout::plain;

/// Values of [`Event::kind`].
pub mod event_kind {
    /// A new connection, or the first datagram of a flow, was given a backend.
    pub const CONNECTION: u8 = 1;
    /// A packet or a call was refused; [`super::Event::reason`] says why.
    pub const DROP: u8 = 2;
}

/// Values of [`Event::hook`].
pub mod event_hook {
    /// connect(2).
    pub const CONNECT: u8 = 1;
    /// sendmsg(2).
    pub const SENDMSG: u8 = 2;
    /// bind(2).
    pub const BIND: u8 = 3;
    /// Traffic control, ingress.
    pub const TC_INGRESS: u8 = 4;
    /// Traffic control, egress.
    pub const TC_EGRESS: u8 = 5;
    /// XDP.
    pub const XDP: u8 = 6;
}

plain! {
    /// One record of the ring buffer.
    pub struct Event = 80 {
        /// Nanoseconds of the kernel's monotonic clock.
        pub time_ns: u64,
        /// Who asked; zero where a socket hook does not know it.
        pub client: Address,
        /// What was asked for: the frontend, or the packet's destination.
        pub asked: Address,
        /// Where it went; zero for a drop.
        pub backend: Address,
        /// Service id; 0 when there is none.
        pub service: u32,
        /// Network device of a packet hook; 0 otherwise.
        pub device: u32,
        /// Client port, network order.
        pub client_port: u16,
        /// Port asked for, network order.
        pub asked_port: u16,
        /// Backend port, network order.
        pub backend_port: u16,
        /// A [`crate::Counter`]: the reason of a drop, or what was counted for a connection.
        pub reason: u16,
        /// IP protocol number.
        pub proto: u8,
        /// One of [`event_kind`].
        pub kind: u8,
        /// One of [`event_hook`].
        pub hook: u8,
        /// Zero.
        pub pad: [u8; 5],
    }
}
