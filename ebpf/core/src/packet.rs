//! From bytes to a tuple, and changed addresses back into bytes. Invariant: nothing is read past what a bounds check
//! has covered, and a rewrite corrects checksums by the difference: right ones stay right, wrong ones wrong.

use crate::checksum;
use crate::env::Packet;
use sheave_ebpf_abi::{Address, FlowKey, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP};

/// EtherType of IPv4 (IEEE 802 numbers).
pub const ETHER_IPV4: u16 = 0x0800;
/// EtherType of IPv6 (IEEE 802 numbers).
pub const ETHER_IPV6: u16 = 0x86dd;
/// Bytes of an Ethernet header without VLAN tag (the kernel strips tags before these hooks).
pub const ETHER_LEN: u32 = 14;

/// Extension headers that are skipped before a packet counts as malformed.
const EXTENSIONS_MAX: u32 = 4;
/// Bytes of an IPv4 header without options.
pub const IPV4_LEN: u32 = 20;
/// Bytes of an IPv6 header without extension headers.
pub const IPV6_LEN: u32 = 40;
/// Where the checksum lies in a TCP header.
pub const TCP_CHECK: u32 = 16;
/// Where the checksum lies in a UDP header.
pub const UDP_CHECK: u32 = 6;
/// Where the checksum lies in an IPv4 header.
pub const IPV4_CHECK: u32 = 10;
/// Where the flags lie in a TCP header.
const TCP_FLAGS: u32 = 13;
/// Where the addresses lie in an IPv4 header, source first.
pub const IPV4_ADDRESSES: u32 = 12;
/// Where the addresses lie in an IPv6 header, source first.
pub const IPV6_ADDRESSES: u32 = 8;
/// IPv4 within IP (IANA protocol numbers).
pub const PROTO_IPIP: u8 = 4;
/// IPv6 within IP (IANA protocol numbers).
pub const PROTO_IPV6: u8 = 41;
/// Bytes of an ICMP or ICMPv6 header, before what an error quotes (RFC 792, RFC 4443).
pub(crate) const ICMP_LEN: u32 = 8;
/// Where the TTL lies in an IPv4 header.
const IPV4_TTL: u32 = 8;
/// Where the hop limit lies in an IPv6 header.
const IPV6_HOP_LIMIT: u32 = 7;

pub(crate) const TCP_FIN: u8 = 0x01;
pub(crate) const TCP_SYN: u8 = 0x02;
pub(crate) const TCP_RST: u8 = 0x04;
pub(crate) const TCP_ACK: u8 = 0x10;

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
    /// IP protocol number of what comes after the IP headers.
    pub proto: u8,
    /// TCP flags; 0 for others and for later fragments.
    pub tcp_flags: u8,
    /// TTL or hop limit.
    pub hops: u8,
    /// Whether the packet is IPv6.
    pub v6: bool,
    /// Whether the header behind the IP headers is in this packet, as it is not in later fragments.
    pub whole: bool,
    /// Offset of the TCP, UDP or ICMP header.
    pub l4: u32,
    /// Identification of a fragment, as it lies in the packet.
    pub id: u32,
    /// Checksum of the IPv4 header, as it lies in the packet.
    pub check: u16,
}

impl Headers {
    /// Whether the packet opens a TCP connection.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// Whether the packet is the first one of its direction.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        self.tcp_flags & TCP_SYN != 0
    }

    /// Whether the packet is the last one of its direction.
    #[inline(always)]
    pub const fn is_fin(&self) -> bool {
        self.tcp_flags & TCP_FIN != 0
    }

    /// Whether the packet ends the connection at once.
    #[inline(always)]
    pub const fn is_reset(&self) -> bool {
        self.tcp_flags & TCP_RST != 0
    }

    /// The packet's key in the connection table.
    #[inline(always)]
    pub const fn key(&self) -> FlowKey {
        FlowKey {
            src: self.src,
            dst: self.dst,
            sport: self.sport,
            dport: self.dport,
            proto: self.proto,
            pad: [0; 3],
        }
    }
}

/// What a packet is to the balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole TCP or UDP packet.
    Transport,
    /// The first fragment of a TCP or UDP packet.
    FirstFragment,
    /// Another fragment, which has no ports.
    LaterFragment,
    /// An ICMP or ICMPv6 error, which quotes a packet.
    IcmpError,
    /// A whole packet of the same family right behind a plain IP header.
    Tunnel,
    /// Another protocol: none of our business.
    Other,
    /// Headers that end early or contradict themselves.
    Bad,
}

/// The headers of no packet.
pub const NOTHING: Headers = Headers {
    src: Address { words: [0; 4] },
    dst: Address { words: [0; 4] },
    sport: 0,
    dport: 0,
    proto: 0,
    tcp_flags: 0,
    hops: 0,
    v6: false,
    whole: true,
    l4: 0,
    id: 0,
    check: 0,
};

/// The four bytes at `at` as a word of an address. `at` is a constant at every caller.
#[inline(always)]
pub fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The address of four words at `at`.
#[inline(always)]
pub fn address6<const N: usize>(bytes: &[u8; N], at: usize) -> Address {
    Address::v6([word(bytes, at), word(bytes, at + 4), word(bytes, at + 8), word(bytes, at + 12)])
}

/// Parses an Ethernet frame. What it is comes back; `headers` have a meaning for the kinds that have some.
#[inline(always)]
pub fn parse<P: Packet>(packet: &P, headers: &mut Headers) -> Kind {
    if packet.is_tagged() {
        return Kind::Other;
    }
    match packet.ether_type() {
        ETHER_IPV4 => parse_v4(packet, headers),
        ETHER_IPV6 => parse_v6(packet, headers),
        _ => Kind::Other,
    }
}

/// [`parse`] in a frame of its own, for where the stack is short.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn parse_apart<P: Packet>(packet: &P, headers: &mut Headers) -> Kind {
    parse(packet, headers)
}

#[inline(always)]
const fn is_transport(proto: u8) -> bool {
    proto == PROTO_TCP || proto == PROTO_UDP
}

/// A whole TCP or UDP packet behind a plain IPv4 header, which nearly all are, read at once. False for all others, whose
/// `headers` have no meaning then.
#[inline(always)]
fn parse_plain_v4<P: Packet>(packet: &P, headers: &mut Headers) -> bool {
    let Some([w0, w1, w2, src, dst, ports, _, _, w8]) = packet.words::<9>() else { return false };
    let ([first, ..], [i0, i1, f0, f1]) = (w0.to_ne_bytes(), w1.to_ne_bytes());
    let ([hops, proto, c0, c1], [s0, s1, d0, d1]) = (w2.to_ne_bytes(), ports.to_ne_bytes());
    // The bit that more fragments follow, and the fragment's offset.
    if first != 0x45 || f0 & 0x3f != 0 || f1 != 0 || !is_transport(proto) {
        return false;
    }
    *headers = Headers {
        src: Address::v4(src),
        dst: Address::v4(dst),
        sport: u16::from_ne_bytes([s0, s1]),
        dport: u16::from_ne_bytes([d0, d1]),
        proto,
        tcp_flags: if proto == PROTO_TCP { w8.to_ne_bytes()[1] } else { 0 },
        hops,
        v6: false,
        whole: true,
        l4: ETHER_LEN + IPV4_LEN,
        id: u32::from(u16::from_ne_bytes([i0, i1])),
        check: u16::from_ne_bytes([c0, c1]),
    };
    true
}

#[inline(always)]
fn parse_v4<P: Packet>(packet: &P, headers: &mut Headers) -> Kind {
    if parse_plain_v4(packet, headers) {
        return Kind::Transport;
    }
    let mut ip = [0; 20];
    if !packet.read(ETHER_LEN, &mut ip) {
        return Kind::Bad;
    }
    let len = u32::from(ip[0] & 0x0f) * 4;
    if ip[0] >> 4 != 4 || len < IPV4_LEN {
        return Kind::Bad;
    }
    let proto = ip[9];
    let tunnel = proto == PROTO_IPIP && len == IPV4_LEN;
    if !tunnel && !is_transport(proto) && proto != PROTO_ICMP {
        return Kind::Other;
    }
    headers.src = Address::v4(word(&ip, 12));
    headers.dst = Address::v4(word(&ip, 16));
    headers.proto = proto;
    headers.hops = ip[8];
    headers.v6 = false;
    headers.l4 = ETHER_LEN + len;
    headers.id = u32::from(u16::from_ne_bytes([ip[4], ip[5]]));
    headers.check = u16::from_ne_bytes([ip[10], ip[11]]);
    // A fragment offset, or the bit that more fragments follow.
    let (later, more) = (ip[6] & 0x1f != 0 || ip[7] != 0, ip[6] & 0x20 != 0);
    if tunnel {
        return if later || more { Kind::Other } else { Kind::Tunnel };
    }
    behind(packet, headers, later, more)
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

#[inline(always)]
const fn is_extension(next: u8) -> bool {
    next == HOP_BY_HOP || next == ROUTING || next == DESTINATION || next == FRAGMENT
}

/// What a chain of IPv6 extension headers leads to.
#[derive(Clone, Copy)]
pub struct Chain {
    /// The header that follows them.
    pub next: u8,
    /// Its offset.
    pub at: u32,
    /// Identification of a fragment, as it lies in the packet.
    pub id: u32,
    /// Whether this is a fragment other than the first: what follows is no header then.
    pub later: bool,
    /// Whether more fragments follow.
    pub more: bool,
}

/// Follows the extension headers from `next` at `at`, up to four of them; `None` when they end early.
#[inline(always)]
pub fn chain<P: Packet>(packet: &P, next: u8, at: u32) -> Option<Chain> {
    let mut chain = Chain { next, at, id: 0, later: false, more: false };
    let mut head = [0; 8];
    let mut seen = 0;
    while seen < EXTENSIONS_MAX && !chain.later && is_extension(chain.next) {
        if !packet.read(chain.at, &mut head) {
            return None;
        }
        if chain.next == FRAGMENT {
            chain.at += 8;
            chain.later = head[2] != 0 || head[3] & 0xf8 != 0;
            chain.more = head[3] & 1 != 0;
            chain.id = word(&head, 4);
        } else {
            chain.at += (u32::from(head[1]) + 1) * 8;
        }
        chain.next = head[0];
        seen += 1;
    }
    Some(chain)
}

#[inline(always)]
fn parse_v6<P: Packet>(packet: &P, headers: &mut Headers) -> Kind {
    let mut ip = [0; 40];
    if !packet.read(ETHER_LEN, &mut ip) {
        return Kind::Bad;
    }
    if ip[0] >> 4 != 6 {
        return Kind::Bad;
    }
    let Some(Chain { next, at, id, later, more }) = chain(packet, ip[6], ETHER_LEN + IPV6_LEN) else {
        return Kind::Bad;
    };
    headers.src = address6(&ip, 8);
    headers.dst = address6(&ip, 24);
    headers.proto = if later { 0 } else { next };
    headers.hops = ip[7];
    headers.v6 = true;
    headers.l4 = at;
    headers.id = id;
    if ip[6] == PROTO_IPV6 {
        return Kind::Tunnel;
    }
    if !later && !is_transport(next) && next != PROTO_ICMPV6 {
        return if is_extension(next) { Kind::Bad } else { Kind::Other };
    }
    behind(packet, headers, later, more)
}

/// Reads what is behind the IP headers.
#[inline(always)]
fn behind<P: Packet>(packet: &P, headers: &mut Headers, later: bool, more: bool) -> Kind {
    if packet.size() < headers.l4 {
        return Kind::Bad;
    }
    headers.sport = 0;
    headers.dport = 0;
    headers.tcp_flags = 0;
    headers.whole = true;
    if later {
        headers.whole = false;
        return if headers.proto == PROTO_ICMP { Kind::Other } else { Kind::LaterFragment };
    }
    let Some([b0, b1, b2, b3]) = packet.load::<4>(headers.l4) else { return Kind::Bad };
    if !is_transport(headers.proto) {
        // Unreachable, time exceeded, parameter problem; for IPv6 too big also, and no other below 128 is defined.
        let error = if headers.v6 { (1..=4).contains(&b0) } else { b0 == 3 || b0 == 11 || b0 == 12 };
        return if error && !more { Kind::IcmpError } else { Kind::Other };
    }
    if headers.proto == PROTO_TCP {
        let Some([flags]) = packet.load::<1>(headers.l4 + TCP_FLAGS) else { return Kind::Bad };
        headers.tcp_flags = flags;
    }
    headers.sport = u16::from_ne_bytes([b0, b1]);
    headers.dport = u16::from_ne_bytes([b2, b3]);
    if more { Kind::FirstFragment } else { Kind::Transport }
}

/// A packet's source and destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Source port, network order.
    pub sport: u16,
    /// Destination port, network order.
    pub dport: u16,
}

impl Tuple {
    /// The tuple of no packet.
    pub const NOTHING: Self =
        Self { src: Address { words: [0; 4] }, dst: Address { words: [0; 4] }, sport: 0, dport: 0 };
}

/// Source and destination addresses as they lie in an IPv4 header; `None` when one is no IPv4 address.
#[inline(always)]
pub fn pair4(src: &Address, dst: &Address) -> Option<[u32; 2]> {
    Some([src.as_v4()?, dst.as_v4()?])
}

/// The same for an IPv6 header.
#[inline(always)]
pub fn pair6(src: &Address, dst: &Address) -> [u32; 8] {
    let (s, d) = (&src.words, &dst.words);
    [s[0], s[1], s[2], s[3], d[0], d[1], d[2], d[3]]
}

/// The bytes of `N` / 4 words.
#[inline(always)]
pub fn bytes_of<const W: usize, const N: usize>(words: &[u32; W]) -> [u8; N] {
    const { assert!(W * 4 == N) };
    let mut out = [0; N];
    let mut i = 0;
    while i < W {
        let [a, b, c, d] = words[i].to_ne_bytes();
        out[i * 4] = a;
        out[i * 4 + 1] = b;
        out[i * 4 + 2] = c;
        out[i * 4 + 3] = d;
        i += 1;
    }
    out
}

/// Gives the packet another source and destination, and takes one off its TTL or hop limit where it is forwarded past the
/// stack (`passes`). False when it could not be changed wholly, or when the families differ: it must not go on then.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn rewrite<P: Packet>(packet: &mut P, headers: &Headers, new: &Tuple, passes: bool) -> bool {
    let udp = headers.proto == PROTO_UDP;
    let check = headers.l4 + if udp { UDP_CHECK } else { TCP_CHECK };
    let moves = headers.whole && (headers.sport != new.sport || headers.dport != new.dport);
    if moves {
        let ports = |sport: u16, dport: u16| u32::from_ne_bytes(bytes_of_ports(sport, dport));
        let diff = checksum::diff(&[ports(headers.sport, headers.dport)], &[ports(new.sport, new.dport)]);
        if !packet.fix_l4(check, diff, false, udp) {
            return false;
        }
    }
    if !headers.v6 {
        return header4(packet, headers, new, (check, udp), (moves, passes));
    }
    addresses6(packet, headers, new, check, udp)
        && (!passes || pass_hop(packet, true, headers.proto, headers.hops))
        && (!moves || packet.store::<4>(headers.l4, bytes_of_ports(new.sport, new.dport), false))
}

/// Two ports in network order as they lie in a TCP or UDP header.
#[inline(always)]
pub fn bytes_of_ports(sport: u16, dport: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (sport.to_ne_bytes(), dport.to_ne_bytes());
    [a, b, c, d]
}

/// From the TTL to the addresses in one piece, and the ports where they follow. The header's checksum makes up for all of it,
/// and the transport's for the ports.
#[inline(always)]
fn header4<P: Packet>(
    packet: &mut P,
    headers: &Headers,
    new: &Tuple,
    (check, udp): (u32, bool),
    (moves, passes): (bool, bool),
) -> bool {
    let ports = bytes_of_ports(new.sport, new.dport);
    let Some(old) = pair4(&headers.src, &headers.dst) else { return false };
    let Some(new) = pair4(&new.src, &new.dst) else { return false };
    let diff = checksum::diff(&old, &new);
    if headers.whole && !packet.fix_l4(check, diff, true, udp) {
        return false;
    }
    let (hops, proto) = (headers.hops, headers.proto);
    let left = if passes { hops.wrapping_sub(1) } else { hops };
    let word = |hops: u8| u16::from_ne_bytes([hops, proto]);
    let sum = checksum::apply(headers.check, checksum::add(diff, checksum::diff16(word(hops), word(left))));
    let ([c0, c1], [s, d]) = (sum.to_ne_bytes(), new.map(u32::to_ne_bytes));
    if moves && headers.l4 == ETHER_LEN + IPV4_LEN {
        let [p0, p1, p2, p3] = ports;
        let bytes = [left, proto, c0, c1, s[0], s[1], s[2], s[3], d[0], d[1], d[2], d[3], p0, p1, p2, p3];
        return packet.store::<16>(ETHER_LEN + IPV4_TTL, bytes, false);
    }
    let bytes = [left, proto, c0, c1, s[0], s[1], s[2], s[3], d[0], d[1], d[2], d[3]];
    packet.store::<12>(ETHER_LEN + IPV4_TTL, bytes, false)
        && (!moves || packet.store::<4>(headers.l4, ports, false))
}

/// IPv6 has no header checksum that makes up for the new addresses, so this store changes the packet's sum.
#[inline(always)]
fn addresses6<P: Packet>(packet: &mut P, headers: &Headers, new: &Tuple, check: u32, udp: bool) -> bool {
    if new.src.as_v4().is_some() || new.dst.as_v4().is_some() {
        return false;
    }
    let old = pair6(&headers.src, &headers.dst);
    let new = pair6(&new.src, &new.dst);
    (!headers.whole || packet.fix_l4(check, checksum::diff(&old, &new), true, udp))
        && packet.store::<32>(ETHER_LEN + IPV6_ADDRESSES, bytes_of(&new), true)
}

/// Takes one off the TTL or hop limit `hops`, as who forwards a packet must. `proto` is what the IP header says comes
/// after it.
#[inline(always)]
pub fn pass_hop<P: Packet>(packet: &mut P, v6: bool, proto: u8, hops: u8) -> bool {
    pass_hop_at(packet, ETHER_LEN, v6, proto, hops)
}

/// [`pass_hop`] of the IP header at `at`.
#[inline(always)]
pub fn pass_hop_at<P: Packet>(packet: &mut P, at: u32, v6: bool, proto: u8, hops: u8) -> bool {
    let left = hops.wrapping_sub(1);
    if v6 {
        return packet.store::<1>(at + IPV6_HOP_LIMIT, [left], true);
    }
    let word = |hops: u8| u16::from_ne_bytes([hops, proto]);
    packet.fix_l3(at + IPV4_CHECK, checksum::diff16(word(hops), word(left)))
        && packet.store::<1>(at + IPV4_TTL, [left], false)
}
