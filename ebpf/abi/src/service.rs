//! Frontends, slots and backends. Invariant: a slot names the service that its run belongs to and a backend its own
//! id, so a reader that met a recycled map element notices it instead of balancing to a stranger.

use crate::Address;
use crate::layout::plain;

/// Bits of [`Frontend::flags`].
pub mod frontend_flag {
    /// The frontend is a NodePort: its key has the wildcard address and it matches every address of the node.
    pub const NODE_PORT: u32 = 1 << 0;
    /// `internalTrafficPolicy: Local`: what starts on this node may only go to endpoints of this node.
    pub const INTERNAL_LOCAL: u32 = 1 << 1;
    /// `externalTrafficPolicy: Local`: what arrives from outside may only go to endpoints of this node.
    pub const EXTERNAL_LOCAL: u32 = 1 << 2;
}

plain! {
    /// Key of the IPv4 frontend map.
    pub struct Frontend4Key = 8 {
        /// Destination address; 0 for a NodePort.
        pub addr: u32,
        /// Destination port, network order.
        pub port: u16,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub pad: u8,
    }
}

plain! {
    /// Key of the IPv6 frontend map.
    pub struct Frontend6Key = 20 {
        /// Destination address; all zero for a NodePort.
        pub addr: [u32; 4],
        /// Destination port, network order.
        pub port: u16,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub pad: u8,
    }
}

plain! {
    /// What a frontend balances over: a contiguous run of slots ordered local-ready, remote-ready, local-terminating,
    /// remote-terminating. Replaced in one map update, which is the flip from one set of backends to the next.
    pub struct Frontend = 32 {
        /// Id of the service port (and family); never 0 in a live entry. Every slot of the run carries it.
        pub service: u32,
        /// First slot of the run.
        pub base: u32,
        /// Ready endpoints of this node.
        pub local_ready: u16,
        /// Ready endpoints of other nodes.
        pub remote_ready: u16,
        /// Serving but terminating endpoints of this node (KEP-1669: used when nothing is ready).
        pub local_terminating: u16,
        /// Serving but terminating endpoints of other nodes.
        pub remote_terminating: u16,
        /// Bits of [`frontend_flag`].
        pub flags: u32,
        /// Session affinity timeout in seconds; 0 means none. Not yet read by the programs.
        pub affinity_timeout_s: u32,
        /// Maglev table of this service; 0 means none. Not yet read by the programs.
        pub maglev: u32,
        /// Zero.
        pub pad: u32,
    }
}

impl Frontend {
    /// Slots in the run, terminating endpoints included.
    #[inline(always)]
    pub const fn slot_count(&self) -> u32 {
        self.local_ready as u32
            + self.remote_ready as u32
            + self.local_terminating as u32
            + self.remote_terminating as u32
    }
}

plain! {
    /// One element of the flat slots array.
    pub struct Slot = 8 {
        /// Backend id; 0 when the slot is free.
        pub backend: u32,
        /// Service id of the run's owner.
        pub service: u32,
    }
}

plain! {
    /// Where a connection goes.
    pub struct Backend = 24 {
        /// Address of the endpoint.
        pub addr: Address,
        /// The backend's own id: equals the map key in an element that was not recycled while it was read.
        pub id: u32,
        /// Port of the endpoint, network order.
        pub port: u16,
        /// IP protocol number.
        pub proto: u8,
        /// Zero; room for state bits.
        pub flags: u8,
    }
}
