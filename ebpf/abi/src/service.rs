//! Frontends, slots and backends. Invariant: a slot names the service that its run belongs to and a backend its own
//! id, so a reader that met a recycled map element notices it instead of balancing to a stranger.

use crate::Address;
use crate::layout::plain;

/// Bits of [`Frontend::flags`]. A frontend with none of the kinds is a ClusterIP.
pub mod frontend_flag {
    /// The frontend is a NodePort: its key has the wildcard address and it matches every address of the node.
    pub const NODE_PORT: u32 = 1 << 0;
    /// `internalTrafficPolicy: Local`: what starts on this node may only go to endpoints of this node.
    pub const INTERNAL_LOCAL: u32 = 1 << 1;
    /// `externalTrafficPolicy: Local`: what arrives from outside may only go to endpoints of this node.
    pub const EXTERNAL_LOCAL: u32 = 1 << 2;
    /// The frontend is a load balancer's ingress address.
    pub const LOAD_BALANCER: u32 = 1 << 3;
    /// The frontend is one of `spec.externalIPs`: what starts on this node is translated only when the address is
    /// this node's (CVE-2020-8554).
    pub const EXTERNAL_IP: u32 = 1 << 4;
    /// What arrives from outside must come from a range of this service in the ranges map.
    pub const SOURCE_RANGES: u32 = 1 << 5;
    /// The frontend is a container's hostPort; its key has the wildcard address, as a NodePort's, or one of this node.
    pub const HOST_PORT: u32 = 1 << 6;
    /// Backends on other nodes answer the client themselves: they get the packet whole in an IP-in-IP header.
    pub const DSR: u32 = 1 << 7;
    /// Traffic that arrives through this frontend is always masqueraded where its backend is remote (the default), or
    /// keeps its source where the backend is local; with this bit it is masqueraded everywhere.
    pub const MASQUERADE_ALL: u32 = 1 << 8;
}

/// Bits of the members map's values.
pub mod member_flag {
    /// The backend is on this node.
    pub const LOCAL: u32 = 1 << 0;
    /// The backend is ready; without the bit it serves while it terminates.
    pub const READY: u32 = 1 << 1;
    /// Policy Cluster may pick it (topology hints did not exclude it).
    pub const CLUSTER: u32 = 1 << 2;
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
    /// remote-terminating; the first `local_only` of the local-ready ones are for policy Local alone. Replaced in one
    /// map update, which is the flip from one set of backends to the next.
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
        /// Session affinity timeout in seconds; 0 means none.
        pub affinity_timeout_s: u32,
        /// Element of the Maglev array that picks for policy Cluster; 0 means none.
        pub maglev: u32,
        /// Local ready endpoints at the start of the run that policy Cluster must not pick, since topology hints gave
        /// them to others.
        pub local_only: u16,
        /// Zero.
        pub pad: u16,
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
        /// The backend's own id: equals its place in an element that was not given to another while it was read.
        pub id: u32,
        /// Port of the endpoint, network order.
        pub port: u16,
        /// IP protocol number.
        pub proto: u8,
        /// Zero; room for state bits.
        pub flags: u8,
    }
}

plain! {
    /// Key of the affinity map: who is bound to a backend of which service.
    pub struct AffinityKey = 24 {
        /// The client's address or, for sockets of this node, the cookie of their network namespace in the last two
        /// words (low, high) and zeroes before them.
        pub client: Address,
        /// Service id.
        pub service: u32,
        /// One of [`affinity_scope`].
        pub scope: u32,
    }
}

/// Values of [`AffinityKey::scope`]: clients that may use different endpoints are bound apart.
pub mod affinity_scope {
    /// A client by its address, policy Cluster.
    pub const ADDRESS: u32 = 0;
    /// A client by its address, policy Local.
    pub const ADDRESS_LOCAL: u32 = 1;
    /// A network namespace of this node, policy Cluster.
    pub const NETNS: u32 = 2;
    /// A network namespace of this node, policy Local.
    pub const NETNS_LOCAL: u32 = 3;
}

plain! {
    /// Value of the affinity map.
    pub struct Affinity = 8 {
        /// Backend id; good while the members map has (service, backend).
        pub backend: u32,
        /// When the client last opened a connection, in seconds of the kernel's monotonic clock.
        pub used_s: u32,
    }
}

plain! {
    /// Key of the members map, which has the usable backends of every service with session affinity; the value is bits
    /// of [`member_flag`] (u32).
    pub struct MemberKey = 8 {
        /// Service id.
        pub service: u32,
        /// Backend id.
        pub backend: u32,
    }
}

plain! {
    /// Key of the source ranges map (a longest-prefix trie): service id and address, IPv4 as IPv4-mapped.
    pub struct RangeKey = 24 {
        /// Significant bits after this word: 32 for the service and those of the address (96 more for IPv4).
        pub prefix_len: u32,
        /// Service id.
        pub service: u32,
        /// First address of the range.
        pub addr: Address,
    }
}

/// Slots of a Maglev table; a prime (Eisenbud et al., "Maglev", NSDI 2016, section 3.4).
pub const MAGLEV_SLOTS: usize = 16_381;

/// A Maglev table: for each slot the pick, counted from the first slot that policy Cluster may use.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MaglevTable {
    /// The picks.
    pub picks: [u16; MAGLEV_SLOTS],
}
impl crate::layout::Sealed for MaglevTable {}
impl crate::Plain for MaglevTable {}
