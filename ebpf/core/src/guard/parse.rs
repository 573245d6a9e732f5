//! From bytes to the ends of a flow. Invariant: as everywhere nothing is read past what a bounds check has covered, and
//! what has no ports has zeroes for them.

use crate::env::Packet;
use crate::packet::{
    Chain, ETHER_IPV4, ETHER_IPV6, ETHER_LEN, ICMP_LEN, IPV4_LEN, IPV6_LEN, address6, chain, word,
};
use sheave_ebpf_abi::{Address, PROTO_ICMP, PROTO_ICMPV6, PROTO_SCTP, PROTO_TCP, PROTO_UDP};

/// Where the flags lie in a TCP header.
const TCP_FLAGS: u32 = 13;
/// Extension headers of IPv6 that end a chain without ports behind them (RFC 8200, RFC 4302).
const AUTHENTICATION: u8 = 51;

/// What a packet is to the guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Not IP, or between a pod and its link only: neighbour discovery, link-local addresses.
    Link,
    /// Belongs to a flow.
    Flow,
    /// A fragment without ports: it is nothing without its first one, which is judged.
    Later,
    /// An ICMP error: the ends are those of the packet that it quotes.
    Error,
    /// Headers that end early or contradict themselves.
    Bad,
}

/// A packet's ends and what else decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Source port, network order; 0 where there are none.
    pub sport: u16,
    /// Destination port, network order.
    pub dport: u16,
    /// IP protocol number.
    pub proto: u8,
    /// TCP flags; 0 for others.
    pub tcp_flags: u8,
    /// TTL or hop limit.
    pub hops: u8,
    /// Whether the packet is IPv6.
    pub v6: bool,
    /// Whether it is a first fragment.
    pub fragment: bool,
    /// Offset of what follows the IP headers.
    pub l4: u32,
}

/// A packet without ends.
pub const NOTHING: Seen = Seen {
    src: Address { words: [0; 4] },
    dst: Address { words: [0; 4] },
    sport: 0,
    dport: 0,
    proto: 0,
    tcp_flags: 0,
    hops: 0,
    v6: false,
    fragment: false,
    l4: 0,
};

/// Parses an Ethernet frame into `seen`.
#[inline(always)]
pub fn parse<P: Packet>(packet: &P, seen: &mut Seen) -> Kind {
    let v6 = match packet.ether_type() {
        ETHER_IPV4 => false,
        ETHER_IPV6 => true,
        _ => return Kind::Link,
    };
    let kind = headers(packet, ETHER_LEN, v6, seen);
    if kind != Kind::Flow || (seen.proto != PROTO_ICMP && seen.proto != PROTO_ICMPV6) {
        return kind;
    }
    match icmp(packet, seen) {
        Kind::Error => match headers(packet, seen.l4 + ICMP_LEN, seen.v6, seen) {
            // A quoted fragment has no ports, so nothing tells whose it was.
            Kind::Flow => Kind::Error,
            Kind::Link => Kind::Link,
            _ => Kind::Bad,
        },
        other => other,
    }
}

/// What kind of ICMP message it is. Others than errors are flows without ports.
#[inline(always)]
fn icmp<P: Packet>(packet: &P, seen: &Seen) -> Kind {
    let Some([kind]) = packet.load::<1>(seen.l4) else { return Kind::Bad };
    match (seen.v6, kind) {
        // Unreachable, time exceeded, parameter problem; too big.
        (false, 3 | 11 | 12) | (true, 1..=4) => Kind::Error,
        // Routers, neighbours and redirects (RFC 4861), listeners (RFC 2710, RFC 3810): never forwarded.
        (true, 130..=137 | 143) => Kind::Link,
        _ => Kind::Flow,
    }
}

/// Reads the headers at `at`. In a frame of its own: it is called for what is quoted too.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn headers<P: Packet>(packet: &P, at: u32, v6: bool, seen: &mut Seen) -> Kind {
    if v6 { headers6(packet, at, seen) } else { headers4(packet, at, seen) }
}

#[inline(always)]
fn headers4<P: Packet>(packet: &P, at: u32, seen: &mut Seen) -> Kind {
    let mut ip = [0; 20];
    if !packet.read(at, &mut ip) {
        return Kind::Bad;
    }
    let len = u32::from(ip[0] & 0x0f) * 4;
    if ip[0] >> 4 != 4 || len < IPV4_LEN {
        return Kind::Bad;
    }
    seen.src = Address::v4(word(&ip, 12));
    seen.dst = Address::v4(word(&ip, 16));
    seen.proto = ip[9];
    seen.hops = ip[8];
    seen.v6 = false;
    seen.l4 = at + len;
    let later = ip[6] & 0x1f != 0 || ip[7] != 0;
    seen.fragment = ip[6] & 0x20 != 0;
    if later { Kind::Later } else { ends(packet, seen) }
}

#[inline(always)]
fn headers6<P: Packet>(packet: &P, at: u32, seen: &mut Seen) -> Kind {
    let mut ip = [0; 40];
    if !packet.read(at, &mut ip) {
        return Kind::Bad;
    }
    if ip[0] >> 4 != 6 {
        return Kind::Bad;
    }
    let Some(Chain { next, at: l4, later, more, .. }) = chain(packet, ip[6], at + IPV6_LEN) else {
        return Kind::Bad;
    };
    seen.src = address6(&ip, 8);
    seen.dst = address6(&ip, 24);
    seen.proto = next;
    seen.hops = ip[7];
    seen.v6 = true;
    seen.l4 = l4;
    seen.fragment = more;
    if is_link_local(&seen.src) || is_link_local(&seen.dst) {
        return Kind::Link;
    }
    if later {
        return Kind::Later;
    }
    // More headers than are followed, or one that hides the ports.
    if matches!(next, 0 | 43 | 44 | 60 | AUTHENTICATION) {
        return Kind::Bad;
    }
    ends(packet, seen)
}

/// `fe80::/10` and `ff02::/16`.
#[inline(always)]
fn is_link_local(address: &Address) -> bool {
    let first = u32::from_be(address.words[0]);
    first >> 22 == 0x3fa || first >> 16 == 0xff02
}

/// Reads the ports and what is beside them.
#[inline(always)]
fn ends<P: Packet>(packet: &P, seen: &mut Seen) -> Kind {
    seen.sport = 0;
    seen.dport = 0;
    seen.tcp_flags = 0;
    if !has_ports(seen.proto) {
        return Kind::Flow;
    }
    let Some([a, b, c, d]) = packet.load::<4>(seen.l4) else { return Kind::Bad };
    seen.sport = u16::from_ne_bytes([a, b]);
    seen.dport = u16::from_ne_bytes([c, d]);
    if seen.proto == PROTO_TCP {
        // A quoted header may end before its flags.
        seen.tcp_flags = packet.load::<1>(seen.l4 + TCP_FLAGS).map_or(0, |[flags]| flags);
    }
    Kind::Flow
}

/// Whether the protocol's header begins with two ports.
#[inline(always)]
const fn has_ports(proto: u8) -> bool {
    proto == PROTO_TCP || proto == PROTO_UDP || proto == PROTO_SCTP
}
