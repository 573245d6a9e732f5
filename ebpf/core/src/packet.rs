//! From bytes to a tuple, and changed addresses back into bytes. Invariant: nothing is read past what a bounds check
//! has covered, and a rewrite keeps every checksum right.

use crate::checksum;
use crate::env::Packet;
use sheave_ebpf_abi::{Address, PROTO_TCP, PROTO_UDP};

/// EtherType of IPv4 (IEEE 802 numbers).
pub const ETHER_IPV4: u16 = 0x0800;
/// EtherType of IPv6 (IEEE 802 numbers).
pub const ETHER_IPV6: u16 = 0x86dd;
/// Bytes of an Ethernet header without VLAN tag (the kernel strips tags before these hooks).
pub const ETHER_LEN: u32 = 14;

/// Extension headers that are skipped before a packet counts as malformed.
const EXTENSIONS_MAX: u32 = 4;
const IPV6_LEN: u32 = 40;
/// Where the checksum lies in a TCP header.
const TCP_CHECK: u32 = 16;
/// Where the checksum lies in a UDP header.
const UDP_CHECK: u32 = 6;
/// Where the checksum lies in an IPv4 header.
const IPV4_CHECK: u32 = 10;
/// Where the flags lie in a TCP header.
const TCP_FLAGS: u32 = 13;

const TCP_FIN: u8 = 0x01;
const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;

/// A TCP or UDP packet's tuple and where its headers lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Source port, network order.
    pub sport: u16,
    /// Destination port, network order.
    pub dport: u16,
    /// [`PROTO_TCP`] or [`PROTO_UDP`].
    pub proto: u8,
    /// TCP flags; 0 for UDP.
    pub tcp_flags: u8,
    /// Whether the packet is IPv6.
    pub v6: bool,
    /// Offset of the TCP or UDP header.
    pub l4: u32,
}

impl Headers {
    /// Whether the packet opens a TCP connection.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// Whether the packet ends a TCP connection, or one direction of it.
    #[inline(always)]
    pub const fn closes(&self) -> bool {
        self.tcp_flags & (TCP_FIN | TCP_RST) != 0
    }
}

/// What a packet is to the balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A whole TCP or UDP packet.
    Transport(Headers),
    /// Another protocol: none of our business.
    Other,
    /// A fragment of a TCP or UDP packet.
    Fragment,
    /// Headers that end early or contradict themselves.
    Bad,
}

#[inline(always)]
fn word(bytes: &[u8; 4]) -> u32 {
    u32::from_ne_bytes(*bytes)
}

/// Parses an Ethernet frame.
#[inline(always)]
pub fn parse<P: Packet>(packet: &P) -> Parsed {
    match packet.ether_type() {
        ETHER_IPV4 => parse_v4(packet),
        ETHER_IPV6 => parse_v6(packet),
        _ => Parsed::Other,
    }
}

#[inline(always)]
fn parse_v4<P: Packet>(packet: &P) -> Parsed {
    let Some([b0, _, _, _]) = packet.load::<4>(ETHER_LEN) else { return Parsed::Bad };
    let len = u32::from(b0 & 0x0f) * 4;
    if b0 >> 4 != 4 || len < 20 {
        return Parsed::Bad;
    }
    let Some([_, _, f0, f1, _, proto, _, _]) = packet.load::<8>(ETHER_LEN + 4) else { return Parsed::Bad };
    if proto != PROTO_TCP && proto != PROTO_UDP {
        return Parsed::Other;
    }
    // More-fragments bit or a fragment offset.
    if f0 & 0x3f != 0 || f1 != 0 {
        return Parsed::Fragment;
    }
    let Some(src) = packet.load::<4>(ETHER_LEN + 12) else { return Parsed::Bad };
    let Some(dst) = packet.load::<4>(ETHER_LEN + 16) else { return Parsed::Bad };
    transport(packet, Address::v4(word(&src)), Address::v4(word(&dst)), proto, false, ETHER_LEN + len)
}

#[inline(always)]
fn load_v6<P: Packet>(packet: &P, offset: u32) -> Option<Address> {
    let a = packet.load::<4>(offset)?;
    let b = packet.load::<4>(offset + 4)?;
    let c = packet.load::<4>(offset + 8)?;
    let d = packet.load::<4>(offset + 12)?;
    Some(Address::v6([word(&a), word(&b), word(&c), word(&d)]))
}

#[inline(always)]
fn parse_v6<P: Packet>(packet: &P) -> Parsed {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;

    let Some([b0, _, _, _, _, _, first, _]) = packet.load::<8>(ETHER_LEN) else { return Parsed::Bad };
    if b0 >> 4 != 6 {
        return Parsed::Bad;
    }
    let mut next = first;
    let mut at = ETHER_LEN + IPV6_LEN;
    let mut seen = 0;
    while seen < EXTENSIONS_MAX && next != PROTO_TCP && next != PROTO_UDP {
        if next == FRAGMENT {
            return Parsed::Fragment;
        }
        if next != HOP_BY_HOP && next != ROUTING && next != DESTINATION {
            return Parsed::Other;
        }
        let Some([following, units]) = packet.load::<2>(at) else { return Parsed::Bad };
        at += (u32::from(units) + 1) * 8;
        next = following;
        seen += 1;
    }
    if next != PROTO_TCP && next != PROTO_UDP {
        return Parsed::Bad;
    }
    let Some(src) = load_v6(packet, ETHER_LEN + 8) else { return Parsed::Bad };
    let Some(dst) = load_v6(packet, ETHER_LEN + 24) else { return Parsed::Bad };
    transport(packet, src, dst, next, true, at)
}

#[inline(always)]
fn transport<P: Packet>(packet: &P, src: Address, dst: Address, proto: u8, v6: bool, l4: u32) -> Parsed {
    let Some([s0, s1, d0, d1]) = packet.load::<4>(l4) else { return Parsed::Bad };
    let tcp_flags = if proto == PROTO_TCP {
        let Some([flags]) = packet.load::<1>(l4 + TCP_FLAGS) else { return Parsed::Bad };
        flags
    } else {
        0
    };
    Parsed::Transport(Headers {
        src,
        dst,
        sport: u16::from_ne_bytes([s0, s1]),
        dport: u16::from_ne_bytes([d0, d1]),
        proto,
        tcp_flags,
        v6,
        l4,
    })
}

/// Which side of a packet is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Source address and port.
    Source,
    /// Destination address and port.
    Destination,
}

/// Puts `addr` and `port` (network order) in the place of one side's. False when the packet could not be changed
/// wholly, or when the families differ: it must not go on then.
#[inline(always)]
pub fn rewrite<P: Packet>(packet: &mut P, headers: &Headers, side: Side, addr: &Address, port: u16) -> bool {
    let udp = headers.proto == PROTO_UDP;
    let check = headers.l4 + if udp { UDP_CHECK } else { TCP_CHECK };
    let (old_addr, old_port, port_at) = match side {
        Side::Source => (headers.src, headers.sport, headers.l4),
        Side::Destination => (headers.dst, headers.dport, headers.l4 + 2),
    };
    // An offset that differs by side only; both families compute it before anything is written.
    let source = matches!(side, Side::Source);
    let done = if headers.v6 {
        let at = ETHER_LEN + if source { 8 } else { 24 };
        rewrite_v6(packet, at, check, &old_addr, addr, udp)
    } else {
        let at = ETHER_LEN + if source { 12 } else { 16 };
        rewrite_v4(packet, at, check, &old_addr, addr, udp)
    };
    if !done {
        return false;
    }
    if old_port == port {
        return true;
    }
    packet.fix_l4(check, checksum::diff16(old_port, port), false, udp)
        && packet.store::<2>(port_at, port.to_ne_bytes(), false)
}

#[inline(always)]
fn rewrite_v4<P: Packet>(
    packet: &mut P,
    at: u32,
    check: u32,
    old: &Address,
    new: &Address,
    udp: bool,
) -> bool {
    let (Some(old), Some(new)) = (old.as_v4(), new.as_v4()) else { return false };
    let diff = checksum::diff(&[old], &[new]);
    packet.fix_l4(check, diff, true, udp)
        && packet.fix_l3(ETHER_LEN + IPV4_CHECK, diff)
        && packet.store::<4>(at, new.to_ne_bytes(), false)
}

/// IPv6 has no header checksum that makes up for the new address, so these stores change the packet's sum.
#[inline(always)]
fn rewrite_v6<P: Packet>(
    packet: &mut P,
    at: u32,
    check: u32,
    old: &Address,
    new: &Address,
    udp: bool,
) -> bool {
    if new.as_v4().is_some() {
        return false;
    }
    packet.fix_l4(check, checksum::diff(&old.words, &new.words), true, udp)
        && packet.store::<4>(at, new.words[0].to_ne_bytes(), true)
        && packet.store::<4>(at + 4, new.words[1].to_ne_bytes(), true)
        && packet.store::<4>(at + 8, new.words[2].to_ne_bytes(), true)
        && packet.store::<4>(at + 12, new.words[3].to_ne_bytes(), true)
}
