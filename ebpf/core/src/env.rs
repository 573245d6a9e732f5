//! The borders of the logic. Invariant: every method is one map operation, one helper or one packet access, and
//! decides nothing.

use crate::balance::Work;
use sheave_ebpf_abi::{
    Address, Affinity, AffinityKey, Backend, Config, Counter, Door, Flow, FlowKey, Fragment, FragmentKey,
    Frontend, Frontend4Key, Frontend6Key, MemberKey, ReverseEntry, ReverseKey, ReverseValue, Slot,
    node_addr_flag,
};

/// The service table as a program reads it. Every getter returns a copy that was read once.
pub trait Table {
    /// Whether a frontend may have an address of this network ([`Address::net`]).
    fn serves_net(&self, net: u32) -> bool;
    /// The frontend of an IPv4 destination.
    fn frontend4(&self, key: &Frontend4Key) -> Option<Frontend>;
    /// The frontend of an IPv6 destination.
    fn frontend6(&self, key: &Frontend6Key) -> Option<Frontend>;
    /// One slot of the flat array.
    fn slot(&self, index: u32) -> Option<Slot>;
    /// A backend by id.
    fn backend(&self, id: u32) -> Option<Backend>;
    /// The pick in `slot` (below [`sheave_ebpf_abi::MAGLEV_SLOTS`]) of a Maglev table.
    fn maglev(&self, table: u32, slot: u32) -> Option<u16>;
    /// Bits of [`node_addr_flag`] of an address; none when it is not this node's (loopback does not count).
    fn node_flags(&self, address: &Address) -> u32;
    /// Whether the address belongs to this node (loopback does not count).
    #[inline(always)]
    fn is_node_address(&self, address: &Address) -> bool {
        self.node_flags(address) & node_addr_flag::OURS != 0
    }
    /// The node's settings.
    fn config(&self) -> Option<Config>;
    /// Adds one to a reason.
    fn count(&self, counter: Counter);
}

/// Which client is bound to which backend, of services with session affinity.
pub trait Affinities {
    /// The client's binding.
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    /// Writes a binding. `fresh`: only where there is none. False when nothing was written.
    fn bind(&self, key: &AffinityKey, value: &Affinity, fresh: bool) -> bool;
    /// Bits of [`sheave_ebpf_abi::member_flag`] of a service's backend; `None` when it is none of its.
    fn member(&self, key: &MemberKey) -> Option<u32>;
}

/// Facts about the calling socket, and its memory of translations.
pub trait Socket {
    /// The socket's cookie, unique while the kernel runs.
    fn cookie(&self) -> u64;
    /// The entry in the socket's own storage.
    fn stored(&self) -> Option<ReverseEntry>;
    /// Writes the socket's own storage; false when the kernel has no memory for it.
    fn store(&self, entry: &ReverseEntry) -> bool;
    /// An entry of the shared LRU.
    fn reverse(&self, key: &ReverseKey) -> Option<ReverseValue>;
    /// Writes an entry of the shared LRU; false when the kernel refused.
    fn set_reverse(&self, key: &ReverseKey, value: &ReverseValue) -> bool;
}

/// The table of connected sockets.
pub trait Peers {
    /// The cookie of the socket that has the place; 0 for nobody's.
    fn owner(&self, place: u32) -> u64;
    /// Gives the socket the place if it is nobody's.
    fn take(&self, place: u32, cookie: u64) -> bool;
    /// Makes the place nobody's.
    fn leave(&self, place: u32);
    /// What is at the place.
    fn entry(&self, place: u32) -> Option<ReverseEntry>;
    /// Writes it there.
    fn set_entry(&self, place: u32, entry: &ReverseEntry);
}

/// What became of an insertion that must not replace anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The entry is in the table now.
    Stored,
    /// There is an entry with this key already.
    Taken,
    /// It could not be stored.
    Refused,
}

/// The connection table.
pub trait Flows {
    /// Looks an entry up and leaves it as it is.
    fn flow(&self, key: &FlowKey) -> Option<Flow>;
    /// The same into a place that the caller has, which saves a short stack from copies; false where there is none, when the
    /// place may have been overwritten.
    #[inline(always)]
    fn flow_into(&self, key: &FlowKey, into: &mut Flow) -> bool {
        match self.flow(key) {
            Some(flow) => {
                *into = flow;
                true
            }
            None => false,
        }
    }
    /// Notes in an entry that it was seen `now_s` and that `state` (bits of [`sheave_ebpf_abi::flow_flag::STATE`]) holds
    /// too; gives it as it was before, `None` when there is none.
    fn touch(&self, key: &FlowKey, now_s: u32, state: u16) -> Option<Flow>;
    /// Stores an entry unless there is one with its key: of two that try at once, one is told so.
    fn claim(&self, key: &FlowKey, flow: &Flow) -> Claim;
    /// Stores an entry in the place of the one that is there; false when the kernel refused.
    fn replace(&self, key: &FlowKey, flow: &Flow) -> bool;
    /// Removes an entry, if there is one.
    fn remove(&self, key: &FlowKey);
    /// The last second that a flow was seen in whose tuple has its mark at `place`; 0 for never.
    fn mark(&self, place: u32) -> u32;
    /// Writes it.
    fn set_mark(&self, place: u32, now_s: u32);
    /// Ports of a fragmented packet.
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment>;
    /// Remembers the ports of a fragmented packet.
    fn set_fragment(&self, key: &FragmentKey, fragment: &Fragment);
    /// Seconds of the kernel's monotonic clock.
    fn now_s(&self) -> u32;
}

/// A question to the node's routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Journey {
    /// Source address as it will be on the way.
    pub src: Address,
    /// Destination address as it will be.
    pub dst: Address,
    /// Source port, network order, for multipath.
    pub sport: u16,
    /// Destination port, network order.
    pub dport: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Whether the packet is IPv6.
    pub v6: bool,
    /// Bytes of the largest IP packet that it will be on the wire.
    pub len: u32,
}

/// Where a packet goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Index of the device.
    pub device: u32,
    /// The neighbour to hand it to: a router or the destination itself; of either family.
    pub next_hop: Address,
    /// The neighbour's and the device's link-layer addresses, as they lie in a frame.
    pub link: [u8; 12],
    /// Whether the kernel knew them.
    pub has_link: bool,
}

/// The answer of the routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// There.
    To(Route),
    /// Nowhere in one piece: this is the largest IP packet in bytes.
    TooBig(u32),
    /// Nowhere.
    None,
    /// This hook can't send it there, but a later one perhaps can: the packet is left to it unchanged.
    Later,
}

/// The node that a packet came to.
pub trait Node {
    /// Whether `client` is in one of the service's source ranges.
    fn in_source_range(&self, service: u32, client: &Address) -> bool;
    /// Whether a socket of this node would take packets with this tuple.
    fn has_socket(&self, key: &FlowKey) -> bool;
    /// One attempt to find a port: [`crate::open::try_port`]. A program has it as a function of its own, which a verifier looks
    /// at once and not for each attempt.
    #[inline(always)]
    fn try_port(&self, work: &mut Work, attempt: u32) -> Claim
    where
        Self: Table + Flows + Sized,
    {
        crate::open::try_port(self, work, attempt)
    }
    /// A few steps of the search for an endpoint of this node: [`crate::tunnel::is_near`], in a program a function of its own
    /// likewise.
    #[inline(always)]
    fn is_near(&self, work: &mut Work, len: u32) -> bool
    where
        Self: Table + Sized,
    {
        crate::tunnel::is_near(self, work, len)
    }
    /// Asks the routing table.
    fn route(&self, journey: &Journey) -> Way;
    /// The door at a place ([`Flow::door`]), which need not be one; `None` when a later hook is to see to it.
    fn door(&self, place: u16) -> Option<Door>;
    /// Counts an answer of a kind (of [`sheave_ebpf_abi::answer_kind`]); gives how many this processor has made this second.
    fn answered(&self, kind: u32) -> u32;
    /// Tells a listener what became of the packet in `work`: a refusal, or a connection ([`Counter::Opened`]) with what
    /// its flow says of the backend.
    fn tell(&self, work: &Work, reason: Counter);
}

/// A packet whose bytes are read and written at offsets from its first byte.
pub trait Packet {
    /// EtherType in host order, as the device reported it (without VLAN tags).
    fn ether_type(&self) -> u16;
    /// Whether the device took a VLAN tag off it: such a packet is its VLAN device's.
    fn is_tagged(&self) -> bool;
    /// Bytes in all.
    fn size(&self) -> u32;
    /// Bytes of payload in each packet that this buffer will be on the wire; 0 when it will be one packet.
    fn segment_len(&self) -> u32;
    /// `N` bytes at `offset`; `None` past the end.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
    /// The same into a place that the caller has, which saves a short stack from copies; false past the end, where the
    /// place may have been overwritten.
    #[inline(always)]
    fn read<const N: usize>(&self, offset: u32, into: &mut [u8; N]) -> bool {
        match self.load::<N>(offset) {
            Some(bytes) => {
                *into = bytes;
                true
            }
            None => false,
        }
    }
    /// The first `W` words behind the Ethernet header, as they lie. `None` past the end, or where it would be no quick
    /// read.
    #[inline(always)]
    fn words<const W: usize>(&self) -> Option<[u32; W]> {
        let mut words = [0; W];
        let mut at = 0;
        while at < W {
            words[at] = u32::from_ne_bytes(self.load::<4>(crate::packet::ETHER_LEN + 4 * at as u32)?);
            at += 1;
        }
        Some(words)
    }
    /// Writes bytes. `sums` tells that no other write of this rewrite makes up for the change in the packet's sum.
    fn store<const N: usize>(&mut self, offset: u32, bytes: [u8; N], sums: bool) -> bool;
    /// Corrects the IPv4 header checksum at `offset` by `diff` (see [`crate::checksum`]).
    fn fix_l3(&mut self, offset: u32, diff: u32) -> bool;
    /// Corrects the TCP, UDP or ICMP checksum at `offset` by `diff`. `pseudo`: the change is in the pseudo header.
    /// `zero_is_none`: a checksum of zero means that there is none (UDP), and must not come out of a correction.
    fn fix_l4(&mut self, offset: u32, diff: u32, pseudo: bool, zero_is_none: bool) -> bool;
    /// Cuts the packet to `len` bytes; no answer depends on it where the kernel can't.
    fn cut(&mut self, len: u32);
    /// Makes room for `len` bytes of unknown content between the Ethernet and the IP header.
    fn insert(&mut self, len: u32) -> bool;
    /// The same for the IP header (without options) of a packet of the same family that carries this one. False where the
    /// hook can't, which leaves the packet as it is.
    #[inline(always)]
    fn wrap(&mut self, _v6: bool) -> bool {
        false
    }
    /// Takes such a header off again.
    #[inline(always)]
    fn unwrap(&mut self, _v6: bool) -> bool {
        false
    }
}
