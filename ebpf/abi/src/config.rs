//! What the agent tells the programs about this node. Invariant: one element, written whole.

use crate::Address;
use crate::layout::plain;

/// Bits of [`Config::flags`].
pub mod config_flag {
    /// Masquerade everything that arrives for a service, wherever its backend is (`--masquerade-all`).
    pub const MASQUERADE_ALL: u32 = 1 << 0;
    /// There are hostPorts on every address of the node, or NodePorts beyond the range of NodePorts, so that ports outside
    /// of the range are looked up with the wildcard address too.
    pub const HOST_PORTS: u32 = 1 << 1;
    /// NodePorts are reached on loopback, by programs in the node's own network namespace.
    pub const LOOPBACK_NODE_PORTS: u32 = 1 << 2;
    /// Another data plane was replaced and still translates its connections: TCP packets that open none and belong to
    /// none of ours are left to it.
    pub const LEAVE_STRAYS: u32 = 1 << 3;
    /// Connections from outside to pods of this node go past its stack, where the pod's device is a [`crate::Door`].
    pub const HOST_ROUTING: u32 = 1 << 4;
}

plain! {
    /// The single element of the config map.
    pub struct Config = 80 {
        /// Cookie of the node's network namespace (SO_NETNS_COOKIE); NodePort on loopback works only there.
        pub node_netns_cookie: u64,
        /// Digest of the object whose programs are attached; lets a restarted agent adopt without loading.
        pub object_digest: u64,
        /// Lowest NodePort, host order.
        pub node_port_min: u16,
        /// Highest NodePort, host order.
        pub node_port_max: u16,
        /// Bits of [`config_flag`].
        pub flags: u32,
        /// Lowest port that the kernel gives to sockets which ask for none, host order.
        pub local_port_min: u16,
        /// Highest one; 0 when it is not known.
        pub local_port_max: u16,
        /// Lowest port for masquerading, host order.
        pub snat_port_min: u16,
        /// Highest port for masquerading, host order.
        pub snat_port_max: u16,
        /// The node's primary IPv4 address, for masquerading; zero when it has none.
        pub node4: Address,
        /// The node's primary IPv6 address, for masquerading; zero when it has none.
        pub node6: Address,
        /// Random number of this cluster for Maglev hashes; the same on every node.
        pub maglev_seed: u32,
        /// Lowest port of a second range for masquerading, host order; 0 when there is none.
        pub snat_more_min: u16,
        /// Highest port of that range, host order.
        pub snat_more_max: u16,
        /// Zero.
        pub pad: u64,
    }
}

/// Bits of the node addresses map's values.
pub mod node_addr_flag {
    /// The address is this node's.
    pub const OURS: u32 = 1 << 0;
    /// NodePorts are reached on it.
    pub const NODE_PORTS: u32 = 1 << 1;
}
