//! Byte layouts shared by the eBPF programs and their loader. Invariant: every type here is `repr(C)`, has no
//! implicit padding and a size that is asserted at compile time, so that the kernel, the programs and the agent
//! (of this or of an older build) read the same bytes.
//!
//! Addresses are kept as 32-bit words exactly as they lie in a packet (network byte order in memory); IPv4
//! addresses in 16-byte fields are IPv4-mapped (`::ffff:a.b.c.d`). Ports named `port` in map types are in network
//! byte order too, so that a hook compares them with what the kernel hands it without swapping.
#![no_std]

#[cfg(test)]
extern crate std;

mod address;
mod config;
mod counter;
mod event;
mod flow;
mod layout;
pub mod map;
mod net;
pub mod place;
mod service;

pub use address::{Address, MAPPED_WORD};
pub use config::{Config, config_flag, node_addr_flag};
pub use counter::{COUNTERS, Counter};
pub use event::{Event, event_hook, event_kind};
pub use flow::{
    Door, FLOW_LOCK_STALE_S, FLOW_SECRETS, FLOW_WAYS, FLOWS_PER_SET, Flow, FlowEntry, FlowHead, FlowKey,
    FlowSet, Fragment, FragmentKey, ReverseEntry, ReverseKey, ReverseValue, answer_kind, call, door_flag,
    flow_elements, flow_flag, flow_timeout_s, fold, is_closing, lifetime_s, mark_of, peer_places, until_s,
};
pub use layout::Plain;
pub use net::{
    Endpoint, NET_COUNTERS, NetConfig, NetCounter, NetFlow, NetKey, PortKey, VerdictKey, endpoint_flag,
    net_config_flag, net_flow_flag, net_map, ports,
};
pub use service::{
    Affinity, AffinityKey, Backend, Frontend, Frontend4Key, Frontend6Key, MAGLEV_SLOTS, MaglevTable,
    MemberKey, RangeKey, Slot, affinity_scope, frontend_flag, member_flag,
};

/// Version of every layout in this crate. It is part of the pin path, so a change of any layout, map type or map
/// flag means a new number and never a misread pinned map, unless the agent knows the shape before and copies from it.
pub const ABI_VERSION: u32 = 3;

/// IPPROTO_TCP (IANA protocol numbers).
pub const PROTO_TCP: u8 = 6;
/// IPPROTO_UDP (IANA protocol numbers).
pub const PROTO_UDP: u8 = 17;
/// IPPROTO_ICMP (IANA protocol numbers).
pub const PROTO_ICMP: u8 = 1;
/// IPPROTO_ICMPV6 (IANA protocol numbers).
pub const PROTO_ICMPV6: u8 = 58;
/// IPPROTO_SCTP (IANA protocol numbers).
pub const PROTO_SCTP: u8 = 132;
