//! Answers that are made of the packet they refuse: TCP resets and ICMP errors. Invariant: nothing is answered with
//! more bytes than came in but for the headers, and never a reset with a reset.

use crate::balance::{Verdict, Work};
use crate::checksum;
use crate::env::{Node, Packet, Table};
use crate::packet::{
    ETHER_IPV4, ETHER_IPV6, ETHER_LEN, Headers, ICMP_LEN, IPV4_LEN, IPV6_LEN, Kind, bytes_of_ports, pair6,
    parse_apart, word,
};
use sheave_ebpf_abi::{Address, Counter, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, answer_kind};

/// What the sender of a packet is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nobody serves this port: TCP reset, or ICMP port unreachable.
    Refused,
    /// The packet is larger than these bytes, which its way allows.
    TooBig(u32),
    /// The packet's hops are used up.
    HopLimit,
}

impl Answer {
    /// As a word, to be carried from program to program.
    #[inline(always)]
    pub const fn to_word(self) -> u32 {
        match self {
            Self::Refused => 0,
            Self::HopLimit => 1,
            Self::TooBig(mtu) => mtu | 1 << 31,
        }
    }

    /// The answer that [`Self::to_word`] made the word of.
    #[inline(always)]
    pub const fn from_word(word: u32) -> Self {
        match word {
            0 => Self::Refused,
            1 => Self::HopLimit,
            mtu => Self::TooBig(mtu & !(1 << 31)),
        }
    }
}

/// ICMP errors a second on one processor. What tells a sender the size of packets is always told.
pub const ICMP_PER_S: u32 = 1_000;
/// TCP resets a second on one processor.
pub const RESETS_PER_S: u32 = 10_000;

/// Whether the answer to a packet of `proto` may be made yet in this second; counts it.
#[inline(always)]
fn may<E: Node>(env: &E, answer: Answer, proto: u8) -> bool {
    match answer {
        Answer::TooBig(_) => true,
        Answer::Refused if proto == PROTO_TCP => env.answered(answer_kind::RESET) <= RESETS_PER_S,
        Answer::Refused | Answer::HopLimit => env.answered(answer_kind::ICMP) <= ICMP_PER_S,
    }
}

/// Hops of packets that begin here.
pub(crate) const TTL: u8 = 64;
const TCP_LEN: u32 = 20;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
/// Bytes of the refused packet that an ICMP error quotes: as many as fit into 576 bytes (RFC 1812, section 4.3.2.3).
const QUOTE4_MAX: u32 = 576 - IPV4_LEN - ICMP_LEN;
/// The same for ICMPv6, into 1280 bytes (RFC 4443, section 2.4 c).
const QUOTE6_MAX: u32 = 1280 - IPV6_LEN - ICMP_LEN;
/// Bytes that are summed up at once: a verifier follows each turn of a loop.
const STRIDE: u32 = 32;

/// Answers the packet as `told` says, unless too many were answered this second. It is asked anew at each step: a verifier that
/// knows the answer goes the rest of the way once for every one.
#[inline(always)]
pub fn give<P: Packet, E: Table + Node>(
    packet: &mut P,
    env: &E,
    work: &mut Work,
    told: impl Fn() -> Answer,
) -> Verdict {
    if !may(env, told(), work.headers.proto) {
        env.count(Counter::AnswerLimited);
        return Verdict::Drop;
    }
    if make(packet, &mut work.headers, &told) {
        return Verdict::Reply;
    }
    env.count(Counter::AnswerFailed);
    Verdict::Drop
}

/// Turns the packet into the answer to itself, to be sent back where it came from. False when it can't be: the packet
/// is spoilt then.
#[inline(always)]
fn make<P: Packet>(packet: &mut P, headers: &mut Headers, told: &impl Fn() -> Answer) -> bool {
    if !matches!(parse_apart(packet, headers), Kind::Transport | Kind::FirstFragment) {
        return false;
    }
    if headers.proto == PROTO_TCP && matches!(told(), Answer::Refused) {
        return reset(packet, headers);
    }
    if headers.v6 { icmp6(packet, headers, told) } else { icmp4(packet, headers, told) }
}

/// Writes the Ethernet header of an answer; `from` is the first twelve bytes of what is answered.
#[inline(always)]
fn ether<P: Packet>(packet: &mut P, from: &[u8; 12], v6: bool) -> bool {
    let f = from;
    let [t0, t1] = if v6 { ETHER_IPV6 } else { ETHER_IPV4 }.to_be_bytes();
    let bytes = [f[6], f[7], f[8], f[9], f[10], f[11], f[0], f[1], f[2], f[3], f[4], f[5], t0, t1];
    packet.store::<14>(0, bytes, true)
}

/// Ones' complement sum of bytes as 16-bit words as they lie.
#[inline(always)]
fn sum<const N: usize>(bytes: &[u8; N]) -> u32 {
    let mut sum = 0;
    let mut i = 0;
    while i + 1 < N {
        sum += u32::from(u16::from_ne_bytes([bytes[i], bytes[i + 1]]));
        i += 2;
    }
    sum
}

#[inline(always)]
fn sum_words<const N: usize>(words: &[u32; N]) -> u32 {
    let mut sum = 0;
    let mut i = 0;
    while i < N {
        sum += (words[i] & 0xffff) + (words[i] >> 16);
        i += 1;
    }
    sum
}

/// Sum of the pseudo header between the packet's two ends; `len` counts what follows the IP header.
#[inline(always)]
fn pseudo(headers: &Headers, proto: u8, len: u32) -> u32 {
    let addresses = if headers.v6 {
        sum_words(&pair6(&headers.src, &headers.dst))
    } else {
        sum_words(&[headers.src.words[3], headers.dst.words[3]])
    };
    addresses + u32::from(u16::from(proto).to_be()) + u32::from((len as u16).to_be())
}

/// Bytes of the IP packet by its own header.
#[inline(always)]
pub fn ip_len<P: Packet>(packet: &P, v6: bool) -> Option<u32> {
    let at = ETHER_LEN + if v6 { 4 } else { 2 };
    let len = u32::from(u16::from_be_bytes(packet.load::<2>(at)?));
    Some(if v6 { len + IPV6_LEN } else { len })
}

/// An IPv4 header towards the sender.
#[inline(always)]
fn ipv4(headers: &Headers, proto: u8, len: u32) -> [u8; 20] {
    ipv4_header(&headers.dst, &headers.src, 0, proto, len as u16)
}

/// An IPv4 header without options of a packet that may not be fragmented.
#[inline(always)]
pub(crate) fn ipv4_header(src: &Address, dst: &Address, tos: u8, proto: u8, len: u16) -> [u8; 20] {
    let [l0, l1] = len.to_be_bytes();
    let s = src.words[3].to_ne_bytes();
    let d = dst.words[3].to_ne_bytes();
    let mut ip =
        [0x45, tos, l0, l1, 0, 0, 0x40, 0, TTL, proto, 0, 0, s[0], s[1], s[2], s[3], d[0], d[1], d[2], d[3]];
    let [c0, c1] = (!checksum::fold(sum(&ip))).to_ne_bytes();
    ip[10] = c0;
    ip[11] = c1;
    ip
}

/// Writes an IPv6 header towards the sender; `len` counts what follows it.
#[inline(always)]
fn store_ipv6<P: Packet>(packet: &mut P, headers: &Headers, proto: u8, len: u32) -> bool {
    let [l0, l1] = (len as u16).to_be_bytes();
    let addresses = crate::packet::bytes_of::<8, 32>(&pair6(&headers.dst, &headers.src));
    packet.store::<8>(ETHER_LEN, [0x60, 0, 0, 0, l0, l1, proto, TTL], true)
        && packet.store::<32>(ETHER_LEN + 8, addresses, true)
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn reset<P: Packet>(packet: &mut P, headers: &Headers) -> bool {
    let Some(tcp) = packet.load::<16>(headers.l4) else { return false };
    let (Some(from), Some(ip_len)) = (packet.load::<12>(0), ip_len(packet, headers.v6)) else { return false };
    let before = headers.l4 - ETHER_LEN + u32::from(tcp[12] >> 4) * 4;
    let data = ip_len.saturating_sub(before);
    let flags = tcp[13];
    if flags & RST != 0 {
        return false;
    }
    // RFC 9293, section 3.5.2, group 1.
    let (seq, ack, answer) = if flags & ACK != 0 {
        (word(&tcp, 8), 0, RST)
    } else {
        let counted = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        let next = u32::from_be(word(&tcp, 4)).wrapping_add(data).wrapping_add(counted);
        (0, next.to_be(), RST | ACK)
    };
    let (s, a) = (seq.to_ne_bytes(), ack.to_ne_bytes());
    let p = bytes_of_ports(headers.dport, headers.sport);
    let mut out = [
        p[0], p[1], p[2], p[3], s[0], s[1], s[2], s[3], a[0], a[1], a[2], a[3], 0x50, answer, 0, 0, 0, 0, 0,
        0,
    ];
    let check = !checksum::fold(sum(&out) + pseudo(headers, PROTO_TCP, TCP_LEN));
    let [c0, c1] = check.to_ne_bytes();
    out[16] = c0;
    out[17] = c1;
    let ip_header = if headers.v6 { IPV6_LEN } else { IPV4_LEN };
    packet.cut(ETHER_LEN + ip_header + TCP_LEN);
    let addressed = if headers.v6 {
        store_ipv6(packet, headers, PROTO_TCP, TCP_LEN)
    } else {
        packet.store::<20>(ETHER_LEN, ipv4(headers, PROTO_TCP, IPV4_LEN + TCP_LEN), true)
    };
    addressed && packet.store::<20>(ETHER_LEN + ip_header, out, true) && ether(packet, &from, headers.v6)
}

/// Type, code and the second word of an ICMP header (RFC 792, RFC 1191).
#[inline(always)]
fn message4(answer: Answer) -> [u8; 8] {
    match answer {
        Answer::Refused => [3, 3, 0, 0, 0, 0, 0, 0],
        Answer::TooBig(mtu) => {
            let [m0, m1] = (mtu as u16).to_be_bytes();
            [3, 4, 0, 0, 0, 0, m0, m1]
        }
        Answer::HopLimit => [11, 0, 0, 0, 0, 0, 0, 0],
    }
}

/// The same of ICMPv6 (RFC 4443).
#[inline(always)]
fn message6(answer: Answer) -> [u8; 8] {
    match answer {
        Answer::Refused => [1, 4, 0, 0, 0, 0, 0, 0],
        Answer::TooBig(mtu) => {
            let [m0, m1, m2, m3] = mtu.to_be_bytes();
            [2, 0, 0, 0, m0, m1, m2, m3]
        }
        Answer::HopLimit => [3, 0, 0, 0, 0, 0, 0, 0],
    }
}

/// Cuts the packet to what is quoted of it, at most `max` bytes and a multiple of four, and makes room before it. Gives
/// the length of the quote and its sum.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn quote<P: Packet>(packet: &mut P, v6: bool, max: u32, room: u32) -> Option<(u32, u32)> {
    let ip_len = ip_len(packet, v6)?.min(packet.size().saturating_sub(ETHER_LEN));
    let len = ip_len.min(max) & !3;
    packet.cut(ETHER_LEN + len);
    if !packet.insert(room) {
        return None;
    }
    // What is left over comes first: its end says nothing to a verifier of where the rest begins.
    let (odd, start) = (len & (STRIDE - 1), ETHER_LEN + room);
    let mut total = 0;
    let mut at = 0;
    while at < STRIDE && at < odd {
        total += sum(&packet.load::<4>(start + at)?);
        at += 4;
    }
    let mut turn = 0;
    while turn < max / STRIDE && turn < len / STRIDE {
        total += sum(&packet.load::<{ STRIDE as usize }>(start + odd + turn * STRIDE)?);
        turn += 1;
    }
    Some((len, total))
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn icmp4<P: Packet>(packet: &mut P, headers: &Headers, told: &impl Fn() -> Answer) -> bool {
    let Some(from) = packet.load::<12>(0) else { return false };
    let Some((len, quoted)) = quote(packet, false, QUOTE4_MAX, IPV4_LEN + ICMP_LEN) else { return false };
    let mut icmp = message4(told());
    let [c0, c1] = (!checksum::fold(sum(&icmp) + quoted)).to_ne_bytes();
    icmp[2] = c0;
    icmp[3] = c1;
    packet.store::<20>(ETHER_LEN, ipv4(headers, PROTO_ICMP, IPV4_LEN + ICMP_LEN + len), true)
        && packet.store::<8>(ETHER_LEN + IPV4_LEN, icmp, true)
        && ether(packet, &from, false)
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn icmp6<P: Packet>(packet: &mut P, headers: &Headers, told: &impl Fn() -> Answer) -> bool {
    let Some(from) = packet.load::<12>(0) else { return false };
    let Some((len, quoted)) = quote(packet, true, QUOTE6_MAX, IPV6_LEN + ICMP_LEN) else { return false };
    let mut icmp = message6(told());
    let sums = sum(&icmp) + quoted + pseudo(headers, PROTO_ICMPV6, ICMP_LEN + len);
    let [c0, c1] = (!checksum::fold(sums)).to_ne_bytes();
    icmp[2] = c0;
    icmp[3] = c1;
    store_ipv6(packet, headers, PROTO_ICMPV6, ICMP_LEN + len)
        && packet.store::<8>(ETHER_LEN + IPV6_LEN, icmp, true)
        && ether(packet, &from, true)
}
