//! What the agent tells the programs about this node. Invariant: one element, written whole.

use crate::layout::plain;

plain! {
    /// The single element of the config map.
    pub struct Config = 24 {
        /// Cookie of the node's network namespace (SO_NETNS_COOKIE); NodePort on loopback works only there.
        pub node_netns_cookie: u64,
        /// Digest of the object whose programs are attached; lets a restarted agent adopt without loading.
        pub object_digest: u64,
        /// Lowest NodePort, host order.
        pub node_port_min: u16,
        /// Highest NodePort, host order.
        pub node_port_max: u16,
        /// Zero.
        pub pad: u32,
    }
}
