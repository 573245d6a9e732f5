//! What remembers a translation: per socket, and per connection through a device. Invariant: the two entries of a
//! connection carry each other's full tuple, so either can be rebuilt or judged from the other.

use crate::layout::plain;
use crate::{Address, PROTO_TCP};

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

/// The places that a socket with this cookie may have in the table of connected sockets. The kernel counts cookies up, so
/// the first places of sockets that live at the same time lie side by side.
#[inline(always)]
pub const fn peer_places(cookie: u64) -> [u32; 2] {
    const MASK: u64 = crate::map::PEERS_MAX as u64 - 1;
    const { assert!(crate::map::PEERS_MAX.is_power_of_two()) };
    let mixed = cookie.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    [(cookie & MASK) as u32, (mixed & MASK) as u32]
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

plain! {
    /// Key of the connection table: a packet's tuple as it is seen before it is rewritten, whichever way it goes. Both
    /// directions of a connection share one key space, so that no tuple can ever mean two things.
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
        /// Zero.
        pub pad: [u8; 3],
    }
}

impl FlowKey {
    /// Where the mark of the tuple's hosts is in [`crate::map::MARKS`]; the same for both directions.
    #[inline(always)]
    pub const fn mark(&self) -> u32 {
        mark_of([fold(&self.src), fold(&self.dst)])
    }
}

/// The word of an address that marks are made of: an IPv4 address is itself.
#[inline(always)]
pub const fn fold(address: &Address) -> u32 {
    match address.as_v4() {
        Some(word) => word,
        None => {
            let w = &address.words;
            w[3] ^ w[2].rotate_left(9) ^ w[1].rotate_left(17) ^ w[0].rotate_left(25)
        }
    }
}

/// [`FlowKey::mark`] of a tuple with these folded addresses. Ports don't count: a mark that was looked at for one connection
/// of two hosts is near at hand for the next one.
#[inline(always)]
pub const fn mark_of(hosts: [u32; 2]) -> u32 {
    let [a, b] = hosts;
    // Nothing here tells which of two ends is which.
    let hosts = ((a ^ b) as u64) << 32 | a.wrapping_add(b) as u64;
    let mixed = hosts.wrapping_mul(0xff51_afd7_ed55_8ccd);
    let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    (mixed >> 40) as u32 & (crate::map::MARKS_MAX as u32 - 1)
}

/// Bits of [`Flow::flags`].
pub mod flow_flag {
    /// The entry is for packets of the backend; without the bit for those of the client.
    pub const REPLY: u16 = 1 << 0;
    /// The client is masqueraded: the backend answers this node. Without it the backend answers the client.
    pub const SNAT: u16 = 1 << 1;
    /// The backend has answered.
    pub const REPLIED: u16 = 1 << 2;
    /// The client sent FIN.
    pub const FIN_CLIENT: u16 = 1 << 3;
    /// The backend sent FIN.
    pub const FIN_BACKEND: u16 = 1 << 4;
    /// One of both sent RST.
    pub const RESET: u16 = 1 << 5;
    /// The client's packets go to the backend's node whole, in a header of their own, and nobody answers by this node: the
    /// entry is the only one of its connection here.
    pub const TUNNEL: u16 = 1 << 6;
    /// The bits that say how far the connection is, which both of its entries carry.
    pub const STATE: u16 = REPLIED | FIN_CLIENT | FIN_BACKEND | RESET;
}

plain! {
    /// Value of the connection table: what the packet's tuple becomes. The other direction's key is this tuple turned
    /// around, and its value is this key turned around.
    pub struct Flow = 52 {
        /// New source address.
        pub src: Address,
        /// New destination address.
        pub dst: Address,
        /// New source port, network order.
        pub sport: u16,
        /// New destination port, network order.
        pub dport: u16,
        /// Backend id of the connection.
        pub backend: u32,
        /// Service id of the connection.
        pub service: u32,
        /// When a packet was last seen, in seconds of the kernel's monotonic clock.
        pub seen_s: u32,
        /// Bits of [`flow_flag`].
        pub flags: u16,
        /// Where in [`crate::map::DOORS`] the pod's device is that packets go to past the stack; 0 for those that go through it.
        pub door: u16,
    }
}

/// Entries of one set of the connection table.
pub const FLOW_WAYS: usize = 14;
/// Entries for which a set is made: it needs room for those that others have fewer of. In a table that is half full more
/// than fit lead to one set of 4,400.
pub const FLOWS_PER_SET: u32 = 10;
/// Words of the secret that a tuple's place follows from.
pub const FLOW_SECRETS: usize = 10;
/// Seconds after which the lock of a set belongs to nobody any more. It is held for less than a microsecond.
pub const FLOW_LOCK_STALE_S: u64 = 5;

/// Elements of a connection table for so many entries.
pub const fn flow_elements(entries: u32) -> u32 {
    1 + if entries == 0 { 1 } else { entries.div_ceil(FLOWS_PER_SET) }
}

plain! {
    /// An entry of the connection table.
    pub struct FlowEntry = 96 {
        /// Whose it is.
        pub key: FlowKey,
        /// What its packets become.
        pub flow: Flow,
        /// Its tag in [`FlowSet::tags`]; another one while it is being written.
        pub tag: u32,
    }
}

plain! {
    /// Element of the connection table: entries of which one may have to make room for another.
    pub struct FlowSet = 1472 {
        /// One more than the second of the kernel's monotonic clock in which someone began to store an entry; 0 when nobody does.
        pub lock: u64,
        /// By what the entries are told apart at a glance; 0 for a free one.
        pub tags: [u32; FLOW_WAYS],
        /// The last seconds in which the entries count.
        pub until_s: [u32; FLOW_WAYS],
        /// Zero: the entries begin where a line of the processor's cache does, as do lock and tags of each set.
        pub spare: [u32; 2],
        /// The entries.
        pub entries: [FlowEntry; FLOW_WAYS],
    }
}

plain! {
    /// First element of the connection table, which is no set.
    pub struct FlowHead = 1472 {
        /// How many sets follow.
        pub sets: u32,
        /// What the places of tuples are mixed with, as long as the table lives.
        pub secret: [u32; FLOW_SECRETS],
        /// Zero.
        pub spare: [u32; 357],
    }
}

/// Bits of [`Door::flags`].
pub mod door_flag {
    /// Packets may enter the pod's namespace at once: nobody else wants to see them at the device.
    pub const ENTER: u16 = 1 << 0;
}

plain! {
    /// Element of the doors map, at the low half of the device's index: a pod's device where answers are translated as they
    /// come from the pod, so that a connection need not meet the node's stack on either way. Zeroes for none.
    pub struct Door = 8 {
        /// Index of the device.
        pub device: u32,
        /// Bytes of the largest IP packet that it takes.
        pub mtu: u16,
        /// Bits of [`door_flag`].
        pub flags: u16,
    }
}

/// Seconds without a packet after which an entry counts as gone. Nobody has to take it out: its place is used again.
pub mod flow_timeout_s {
    /// TCP until the backend has answered.
    pub const TCP_OPENING: u32 = 60;
    /// TCP afterwards.
    pub const TCP_ESTABLISHED: u32 = 8_000;
    /// TCP after both FINs, or a RST.
    pub const TCP_CLOSING: u32 = 10;
    /// Everything else until the backend has answered.
    pub const DATAGRAM: u32 = 60;
    /// Everything else afterwards.
    pub const DATAGRAM_REPLIED: u32 = 180;
}

/// Whether the connection has ended by what was seen of it.
#[inline(always)]
pub const fn is_closing(flags: u16) -> bool {
    const BOTH: u16 = flow_flag::FIN_CLIENT | flow_flag::FIN_BACKEND;
    flags & flow_flag::RESET != 0 || flags & BOTH == BOTH
}

/// Seconds without a packet after which an entry with these flags counts as gone.
#[inline(always)]
pub const fn lifetime_s(flags: u16, proto: u8) -> u32 {
    let replied = flags & flow_flag::REPLIED != 0;
    if proto == PROTO_TCP {
        if is_closing(flags) {
            flow_timeout_s::TCP_CLOSING
        } else if replied {
            flow_timeout_s::TCP_ESTABLISHED
        } else {
            flow_timeout_s::TCP_OPENING
        }
    } else if replied {
        flow_timeout_s::DATAGRAM_REPLIED
    } else {
        flow_timeout_s::DATAGRAM
    }
}

/// The last second in which an entry with these flags counts, if nothing is seen of it after `seen_s`.
#[inline(always)]
pub const fn until_s(seen_s: u32, flags: u16, proto: u8) -> u32 {
    seen_s.saturating_add(lifetime_s(flags, proto))
}

plain! {
    /// Key of the fragments map: what the fragments of one packet have in common (RFC 791, RFC 8200 section 4.5).
    pub struct FragmentKey = 40 {
        /// Source address.
        pub src: Address,
        /// Destination address.
        pub dst: Address,
        /// Identification as it lies in the packet; IPv4's in the low half.
        pub id: u32,
        /// IP protocol number; 0 for IPv6, whose later fragments may not tell.
        pub proto: u8,
        /// Zero.
        pub pad: [u8; 3],
    }
}

plain! {
    /// Value of the fragments map: what only the first fragment tells.
    pub struct Fragment = 8 {
        /// Source port, network order.
        pub sport: u16,
        /// Destination port, network order.
        pub dport: u16,
        /// IP protocol number.
        pub proto: u32,
    }
}

/// Elements of the answers map.
pub mod answer_kind {
    /// ICMP and ICMPv6 errors, but for those that tell the size of packets.
    pub const ICMP: u32 = 0;
    /// TCP resets.
    pub const RESET: u32 = 1;
    /// How many there are.
    pub const COUNT: usize = 2;
}

/// Places in the map of programs that the traffic control programs continue in.
pub mod call {
    /// Finds a backend for a packet that belongs to no known flow.
    pub const OPEN: u32 = 0;
    /// Begins anew with a packet from outside.
    pub const INGRESS: u32 = 1;
    /// Begins anew with a packet from a pod.
    pub const POD_INGRESS: u32 = 2;
    /// Translates an ICMP error.
    pub const ICMP: u32 = 3;
    /// Turns a packet into the answer that refuses it.
    pub const ANSWER: u32 = 4;
    /// Takes a packet out of the header in which another node sent it on.
    pub const UNWRAP: u32 = 5;
    /// How many there are, and room for more.
    pub const COUNT: usize = 8;
}
