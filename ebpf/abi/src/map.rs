//! The maps. Invariant: the name here is the name in the object, in the pin directory and in `bpftool map`; the
//! kernel keeps 15 characters of it.

/// IPv4 frontends: [`crate::Frontend4Key`] → [`crate::Frontend`].
pub const FRONTENDS4: &str = "shv_frontends4";
/// IPv6 frontends: [`crate::Frontend6Key`] → [`crate::Frontend`].
pub const FRONTENDS6: &str = "shv_frontends6";
/// Flat array of [`crate::Slot`], which user space may map.
pub const SLOTS: &str = "shv_slots";
/// Array of [`crate::Backend`] by id, which user space may map; element 0 is nobody's, as is one whose own id is 0.
pub const BACKENDS: &str = "shv_backends";
/// Socket storage of [`crate::ReverseEntry`].
pub const REVERSE_SK: &str = "shv_reverse_sk";
/// Array of [`crate::ReverseEntry`]: what TCP sockets were connected through, at one of the two places that a socket's cookie
/// has ([`crate::peer_places`]).
pub const PEERS: &str = "shv_peers";
/// Array of the cookies (u64) of the sockets that have these places; 0 for nobody's. It is a map of its own so that the
/// cookies of sockets that live at the same time lie side by side. A place is given back when its socket is closed.
pub const PEER_OWNERS: &str = "shv_peer_owners";
/// LRU [`crate::ReverseKey`] → [`crate::ReverseValue`].
pub const REVERSE_LRU: &str = "shv_reverse";
/// Array of [`crate::FlowSet`], which user space may map: the connection table. Element 0 is a [`crate::FlowHead`].
pub const FLOWS: &str = "shv_flows";
/// LRU [`crate::FragmentKey`] → [`crate::Fragment`].
pub const FRAGMENTS: &str = "shv_fragments";
/// Programs that the traffic control programs continue in, by [`crate::call`].
pub const CALLS: &str = "shv_calls";
/// Addresses of this node: [`crate::Address`] → bits of [`crate::node_addr_flag`] (u32).
pub const NODE_ADDRS: &str = "shv_node_addrs";
/// Array of one [`crate::Config`].
pub const CONFIG: &str = "shv_config";
/// Per-CPU array of u64, indexed by [`crate::Counter`].
pub const COUNTERS: &str = "shv_counters";
/// LRU [`crate::AffinityKey`] → [`crate::Affinity`].
pub const AFFINITY: &str = "shv_affinity";
/// [`crate::MemberKey`] → bits of [`crate::member_flag`] (u32).
pub const MEMBERS: &str = "shv_members";
/// Longest-prefix trie [`crate::RangeKey`] → 1 (u32).
pub const RANGES: &str = "shv_ranges";
/// Array of [`crate::MaglevTable`]; element 0 is nobody's.
pub const MAGLEV: &str = "shv_maglev";
/// Ring buffer of [`crate::Event`].
pub const EVENTS: &str = "shv_events";
/// Array of u64: a bit ([`crate::Address::net`]) for each network that may have an address of a frontend. One bit stands for
/// many networks, and may stay when the last frontend is gone.
pub const NETS: &str = "shv_nets";
/// Marks of flows: at the place that [`crate::FlowKey::mark`] gives for a tuple, the last second (u32) that a flow between
/// such hosts was seen in; 0 for never.
pub const MARKS: &str = "shv_marks";
/// Array of one u32: until this second of the monotonic clock events are written to the ring buffer. Who listens moves it
/// on, so that events cost nothing when nobody does. Nobody else writes it.
pub const LISTEN: &str = "shv_listen";
/// Per-CPU array of u64: refusals that were answered, by [`crate::answer_kind`]; the second in the upper half, how many in
/// it in the lower.
pub const ANSWERS: &str = "shv_answers";
/// Array of [`crate::Door`], by the low half of the device's index.
pub const DOORS: &str = "shv_doors";

/// Every pinned map.
pub const ALL: &[&str] = &[
    FRONTENDS4,
    FRONTENDS6,
    SLOTS,
    BACKENDS,
    REVERSE_SK,
    PEERS,
    PEER_OWNERS,
    REVERSE_LRU,
    FLOWS,
    FRAGMENTS,
    CALLS,
    NODE_ADDRS,
    CONFIG,
    COUNTERS,
    AFFINITY,
    MEMBERS,
    RANGES,
    MAGLEV,
    EVENTS,
    NETS,
    MARKS,
    LISTEN,
    ANSWERS,
    DOORS,
];

/// Frontends a family (entries, allocated as they come: a NodePort service takes two).
pub const FRONTENDS_MAX: usize = 262_144;
/// Slots in all runs together (8 bytes each, allocated at once).
pub const SLOTS_MAX: usize = 524_288;
/// Backends (24 bytes each, allocated at once).
pub const BACKENDS_MAX: usize = 262_144;
/// Places for what connected TCP sockets remember, a power of two (48 bytes each, allocated at once). A socket whose places
/// are taken remembers in its storage.
pub const PEERS_MAX: usize = 65_536;
/// Reverse entries outside socket storage.
pub const REVERSE_MAX: usize = 32_768;
/// Fragmented packets whose ports are known.
pub const FRAGMENTS_MAX: usize = 8_192;
/// Connections through devices, two entries each.
pub const FLOWS_MAX: usize = 65_536;
/// Elements of the table of so many (1,472 bytes each, allocated at once).
pub const FLOW_ELEMENTS_MAX: usize = crate::flow_elements(FLOWS_MAX as u32) as usize;
/// Addresses of one node.
pub const NODE_ADDRS_MAX: usize = 1_024;
/// Room for reasons; more than there are, so that a new one needs no new map.
pub const COUNTERS_MAX: usize = 128;
/// Clients with session affinity.
pub const AFFINITY_MAX: usize = 65_536;
/// Backends of services with session affinity (entries, allocated as they come).
pub const MEMBERS_MAX: usize = 262_144;
/// Source ranges of all services (entries, allocated as they come).
pub const RANGES_MAX: usize = 65_536;
/// Maglev tables (32 KiB each, allocated at once).
pub const MAGLEV_MAX: usize = 256;
/// Bits of IPv4 networks.
pub const NETS_V4: u32 = 1 << 16;
/// Words of bits of networks of both families.
pub const NETS_WORDS: usize = 2 * (NETS_V4 as usize) / 64;
/// Marks of flows, a power of two (8 bytes each, allocated at once). Several flows may share one.
pub const MARKS_MAX: usize = 65_536;
/// Places of doors: one for each low half of a device's index (8 bytes each, allocated at once).
pub const DOORS_MAX: usize = 1 << 16;
/// Bytes of the ring buffer.
pub const EVENTS_BYTES: usize = 262_144;
