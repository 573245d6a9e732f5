//! Layouts of the network object: who is at the pods' links, what policies say of them, and the flows between them.
//! Invariant: a number that stands for a set, an identity or a list of ports means the same as long as any entry names
//! it; it is never given to something else meanwhile.

use crate::Address;
use crate::layout::plain;

/// Names of the network object's maps; each is the name in the object, in the pin directory and in `bpftool map`.
pub mod net_map {
    /// Array of one [`super::NetConfig`].
    pub const CONFIG: &str = "shv_net_config";
    /// [`crate::Address`] → [`super::Endpoint`].
    pub const ENDPOINTS: &str = "shv_net_endpts";
    /// Longest-prefix trie [`super::NetKey`] → identity (u32).
    pub const RANGES: &str = "shv_net_ranges";
    /// [`super::VerdictKey`] → list of ports (u32).
    pub const VERDICTS: &str = "shv_net_verdict";
    /// Longest-prefix trie [`super::PortKey`] → 1 (u32).
    pub const PORTS: &str = "shv_net_ports";
    /// LRU [`crate::FlowKey`] → [`super::NetFlow`].
    pub const FLOWS: &str = "shv_net_flows";
    /// Per-CPU array of u64, indexed by [`super::NetCounter`].
    pub const COUNTERS: &str = "shv_net_counts";

    /// Every pinned map.
    pub const ALL: &[&str] = &[CONFIG, ENDPOINTS, RANGES, VERDICTS, PORTS, FLOWS, COUNTERS];

    /// Addresses of pods of the whole cluster and of this node (entries, allocated as they come).
    pub const ENDPOINTS_MAX: usize = 262_144;
    /// Ranges that policies name (entries, allocated as they come).
    pub const RANGES_MAX: usize = 131_072;
    /// Rows of verdicts (entries, allocated as they come).
    pub const VERDICTS_MAX: usize = 1_048_576;
    /// Prefixes of ports (entries, allocated as they come).
    pub const PORTS_MAX: usize = 262_144;
    /// Flows of this node's pods.
    pub const FLOWS_MAX: usize = 131_072;
    /// Room for reasons; more than there are.
    pub const COUNTERS_MAX: usize = 32;
}

plain! {
    /// What every packet asks first.
    pub struct NetConfig = 16 {
        /// Raised with every change of what is allowed: a flow that was judged in another epoch is judged again.
        pub epoch: u32,
        /// Bits of [`net_config_flag`].
        pub flags: u32,
        /// Digest of the object whose programs are attached, low and high half; 0 before they are.
        pub object_digest: [u32; 2],
    }
}

/// Bits of [`NetConfig::flags`].
pub mod net_config_flag {
    /// Packets of direct flows go past the stack.
    pub const FAST: u32 = 1 << 0;
}

plain! {
    /// Who has an address.
    pub struct Endpoint = 20 {
        /// Index of the device that leads to the pod; 0 for pods of other nodes and for the node itself.
        pub device: u32,
        /// What policies see in it; 0 when none names it.
        pub identity: u32,
        /// The set of rules that what it receives is judged by; 0 when it is not isolated.
        pub ingress: u32,
        /// The set of rules that what it sends is judged by; 0 when it is not isolated.
        pub egress: u32,
        /// Bits of [`endpoint_flag`].
        pub flags: u32,
    }
}

/// Bits of [`Endpoint::flags`].
pub mod endpoint_flag {
    /// The address is this node's own: its traffic with its pods is always allowed.
    pub const HOST: u32 = 1 << 0;
    /// The device has a peer that packets can be handed to.
    pub const PEER: u32 = 1 << 1;
    /// What the device sends waits in a queue of its own, which the peer must not be handed packets past.
    pub const QUEUED: u32 = 1 << 2;
}

plain! {
    /// Key of the ranges: a family word (4 or 6) and the address, of which `bits` count (32 for the family word, 96 more
    /// for an IPv4 address, which is mapped).
    pub struct NetKey = 24 {
        /// Length of the prefix in bits, the family word included.
        pub bits: u32,
        /// 4 or 6.
        pub family: u32,
        /// Address.
        pub address: Address,
    }
}

plain! {
    /// Key of the verdicts: what a set says of an identity. Identity 0 stands for all that have no row of their own.
    pub struct VerdictKey = 8 {
        /// Set of rules.
        pub set: u32,
        /// Identity of the other end.
        pub identity: u32,
    }
}

/// Values of the verdicts that are no list of ports.
pub mod ports {
    /// Nothing.
    pub const NONE: u32 = 0;
    /// Every protocol and port.
    pub const ALL: u32 = u32::MAX;
}

plain! {
    /// Key of the ports: a list's prefix of ports of a protocol. `bits` counts the list (32), the protocol with its gap
    /// (16) and as many of the port's.
    pub struct PortKey = 12 {
        /// Length of the prefix in bits: 48 to 64.
        pub bits: u32,
        /// List of ports.
        pub ports: u32,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub pad: u8,
        /// Port, network order.
        pub port: u16,
    }
}

plain! {
    /// Value of the flows. The key is the packets' tuple with its ends in order (see `sheave-ebpf-core`), so that both
    /// directions find it.
    pub struct NetFlow = 24 {
        /// Epoch of the judgement.
        pub epoch: u32,
        /// When a packet was last seen, in seconds of the kernel's monotonic clock.
        pub seen_s: u32,
        /// When the flow was opened.
        pub opened_s: u32,
        /// Device of the pod at the low end; 0 when it is none of this node's.
        pub low_device: u32,
        /// Device of the pod at the high end.
        pub high_device: u32,
        /// Bits of [`net_flow_flag`].
        pub flags: u32,
    }
}

/// Bits of [`NetFlow::flags`].
pub mod net_flow_flag {
    /// The high end opened the flow; without the bit the low end did.
    pub const BY_HIGH: u32 = 1 << 0;
    /// The other end has answered.
    pub const REPLIED: u32 = 1 << 1;
    /// The low end sent FIN.
    pub const FIN_LOW: u32 = 1 << 2;
    /// The high end sent FIN.
    pub const FIN_HIGH: u32 = 1 << 3;
    /// One of both sent RST.
    pub const RESET: u32 = 1 << 4;
    /// It is no longer allowed: nothing of it passes until it is opened anew or allowed again.
    pub const CUT: u32 = 1 << 5;
    /// A packet of the low end was seen where it came from: at its pod's link, or as it arrived from outside.
    pub const LOW_FROM: u32 = 1 << 6;
    /// A packet of the low end was seen, with the same tuple, on its way into the high end's pod.
    pub const LOW_TO: u32 = 1 << 7;
    /// As `LOW_FROM` for the high end.
    pub const HIGH_FROM: u32 = 1 << 8;
    /// As `LOW_TO` for the high end.
    pub const HIGH_TO: u32 = 1 << 9;
    /// One end is the node itself, or a device without a peer: never past the stack.
    pub const SLOW: u32 = 1 << 10;
    /// A packet went past the stack.
    pub const FAST: u32 = 1 << 11;
}

macro_rules! net_counters {
    ($($(#[$meta:meta])* $name:ident = $number:literal, $text:literal, $drop:literal;)+) => {
        /// Why a program of the network object did what it did; index into its counters map.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum NetCounter { $($(#[$meta])* $name = $number,)+ }

        /// Every counter in the order of its number.
        pub const NET_COUNTERS: &[NetCounter] = &[$(NetCounter::$name,)+];

        impl NetCounter {
            /// The name that metrics and logs use.
            pub const fn name(self) -> &'static str {
                match self { $(NetCounter::$name => $text,)+ }
            }
            /// Whether the reason means that a packet was refused.
            pub const fn is_drop(self) -> bool {
                match self { $(NetCounter::$name => $drop,)+ }
            }
        }
    };
}

impl NetCounter {
    /// Whether it counts packets that went past the stack.
    pub const fn is_fast(self) -> bool {
        matches!(self, Self::FastPod | Self::FastOut | Self::FastIn)
    }
}

net_counters! {
    /// A flow was opened.
    Opened = 0, "policy_flow_opened", false;
    /// A flow was judged again, since what is allowed changed, and goes on.
    Rejudged = 1, "policy_flow_rejudged", false;
    /// A packet was refused by the policies of the pod that sent it.
    DeniedEgress = 2, "policy_denied_egress", true;
    /// A packet was refused by the policies of the pod that it went to.
    DeniedIngress = 3, "policy_denied_ingress", true;
    /// A packet of a flow that is no longer allowed was refused.
    Cut = 4, "policy_flow_cut", true;
    /// A pod sent from an address that is another's.
    Spoofed = 5, "policy_spoofed_source", true;
    /// A packet's headers were cut short or malformed.
    BadHeader = 6, "policy_bad_header", true;
    /// A flow could not be remembered; its answers are judged by themselves.
    FlowFull = 7, "policy_flow_full", false;
    /// A packet went from pod to pod past the stack.
    FastPod = 8, "fast_pod_to_pod", false;
    /// A packet left the node past the stack.
    FastOut = 9, "fast_pod_to_outside", false;
    /// A packet from outside went into its pod past the stack.
    FastIn = 10, "fast_outside_to_pod", false;
    /// A flow went past the stack for the first time.
    FastFlow = 11, "fast_flows", false;
    /// A packet that could have gone past the stack was left to it, since the kernel knew no way.
    FastFailed = 12, "fast_no_way", false;
}
