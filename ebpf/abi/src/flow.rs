//! What remembers a translation: per socket, and per NodePort flow. Invariant: a forward flow and its reply flow
//! carry each other's full tuple, so either can be rebuilt or judged from the other.

use crate::Address;
use crate::layout::plain;

plain! {
    /// Value of the socket storage: the last service that the socket was sent to a backend of.
    pub struct ReverseEntry = 40 {
        /// Where the socket really talks to.
        pub backend: Address,
        /// What the program asked for and must see.
        pub service: Address,
        /// Backend port, network order.
        pub backend_port: u16,
        /// Service port, network order.
        pub service_port: u16,
        /// Service id, to tell entries of a deleted service.
        pub service_id: u32,
    }
}

plain! {
    /// Key of the reverse LRU: for sockets that talk to more backends than their storage remembers.
    pub struct ReverseKey = 28 {
        /// Socket cookie, low and high half (two words keep the key free of padding).
        pub cookie: [u32; 2],
        /// Backend address.
        pub backend: Address,
        /// Backend port, network order.
        pub port: u16,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub pad: u8,
    }
}

plain! {
    /// Value of the reverse LRU.
    pub struct ReverseValue = 24 {
        /// Service address.
        pub service: Address,
        /// Service id.
        pub service_id: u32,
        /// Service port, network order.
        pub port: u16,
        /// Zero.
        pub pad: u16,
    }
}

/// Values of [`FlowKey::direction`].
pub mod flow_direction {
    /// Client to node: the key is the packet as it arrived.
    pub const FORWARD: u8 = 0;
    /// Pod to client: the key is the packet as the pod sent it.
    pub const REPLY: u8 = 1;
}

plain! {
    /// Key of the NodePort flow map: a packet's tuple as seen before it is rewritten.
    pub struct FlowKey = 40 {
        /// Source address.
        pub src: Address,
        /// Destination address.
        pub dst: Address,
        /// Source port, network order.
        pub sport: u16,
        /// Destination port, network order.
        pub dport: u16,
        /// IP protocol number.
        pub proto: u8,
        /// One of [`flow_direction`].
        pub direction: u8,
        /// Zero.
        pub pad: u16,
    }
}

/// Bit of [`Flow::flags`]: a FIN or RST was seen, so the tuple may be taken over.
pub const FLOW_CLOSING: u16 = 1;

plain! {
    /// Value of the NodePort flow map: what the packet's destination (forward) or source (reply) is rewritten to.
    pub struct Flow = 32 {
        /// New address.
        pub addr: Address,
        /// New port, network order.
        pub port: u16,
        /// Bits: [`FLOW_CLOSING`].
        pub flags: u16,
        /// Backend id of the flow.
        pub backend: u32,
        /// Service id of the flow.
        pub service: u32,
        /// When a packet was last seen, in seconds of the kernel's monotonic clock.
        pub seen_s: u32,
    }
}
