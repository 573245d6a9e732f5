//! ICMP and ICMPv6 errors about translated packets. Invariant: who gets the error finds in it the packet that it sent,
//! with every checksum as right as it was.

use crate::balance::{self, Link, PASS, Side, Stage, Verdict, Work};
use crate::env::{Flows, Journey, Node, Packet, Table, Way};
use crate::packet::{
    ETHER_LEN, Headers, ICMP_LEN, IPV4_ADDRESSES, IPV4_CHECK, IPV4_LEN, IPV6_ADDRESSES, IPV6_LEN, Kind,
    TCP_CHECK, Tuple, UDP_CHECK, address6, bytes_of, bytes_of_ports, chain, pair4, pair6, parse_apart, word,
};
use crate::{answer, checksum, door, packet, tunnel};
use sheave_ebpf_abi::{Address, Counter, FlowKey, PROTO_TCP, PROTO_UDP, flow_flag};

/// Where the checksum lies in an ICMP header.
const ICMP_CHECK: u32 = 2;

/// The packet that an error quotes, and what becomes of both.
#[derive(Clone, Copy, Debug)]
pub struct Quote {
    /// The quoted packet's tuple.
    pub tuple: Tuple,
    /// Its protocol.
    pub proto: u8,
    /// Offset of its IP header.
    pub ip: u32,
    /// Offset of its TCP or UDP header.
    pub l4: u32,
    /// End of the error, by its own length: a frame may go on behind it, with nothing that is quoted.
    pub end: u32,
    /// What its tuple becomes.
    pub inner: Tuple,
    /// What the error's own addresses become; without ports.
    pub outer: Tuple,
}

impl Quote {
    /// The quote of no packet.
    pub const NOTHING: Self = Self {
        tuple: Tuple::NOTHING,
        proto: 0,
        ip: 0,
        l4: 0,
        end: 0,
        inner: Tuple::NOTHING,
        outer: Tuple::NOTHING,
    };
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn quoted<P: Packet>(packet: &P, work: &mut Work) -> Option<()> {
    let (headers, quote) = (&work.headers, &mut work.quote);
    let ip = headers.l4 + ICMP_LEN;
    quote.end = ETHER_LEN + answer::ip_len(packet, headers.v6)?;
    quote.ip = ip;
    if headers.v6 {
        quoted6(packet, quote)?;
    } else {
        quoted4(packet, quote)?;
    }
    if quote.proto != PROTO_TCP && quote.proto != PROTO_UDP {
        return None;
    }
    if quote.l4 + 4 > quote.end {
        return None;
    }
    let [s0, s1, d0, d1] = packet.load::<4>(quote.l4)?;
    quote.tuple.sport = u16::from_ne_bytes([s0, s1]);
    quote.tuple.dport = u16::from_ne_bytes([d0, d1]);
    Some(())
}

#[inline(always)]
fn quoted4<P: Packet>(packet: &P, quote: &mut Quote) -> Option<()> {
    let mut head = [0; 20];
    if !packet.read(quote.ip, &mut head) {
        return None;
    }
    let len = u32::from(head[0] & 0x0f) * 4;
    if head[0] >> 4 != 4 || len < IPV4_LEN || head[6] & 0x1f != 0 || head[7] != 0 {
        return None;
    }
    quote.tuple.src = Address::v4(word(&head, 12));
    quote.tuple.dst = Address::v4(word(&head, 16));
    quote.proto = head[9];
    quote.l4 = quote.ip + len;
    Some(())
}

#[cfg_attr(target_arch = "bpf", inline(never))]
fn quoted6<P: Packet>(packet: &P, quote: &mut Quote) -> Option<()> {
    let mut head = [0; 40];
    if !packet.read(quote.ip, &mut head) {
        return None;
    }
    let chain = chain(packet, head[6], quote.ip + IPV6_LEN)?;
    if head[0] >> 4 != 6 || chain.later {
        return None;
    }
    quote.tuple.src = address6(&head, 8);
    quote.tuple.dst = address6(&head, 24);
    quote.proto = chain.next;
    quote.l4 = chain.at;
    Some(())
}

/// Finds the flow that an ICMP error is about, by the packet that it quotes: `work` holds it then.
#[inline(always)]
pub(crate) fn find<P: Packet, E: Flows>(packet: &P, env: &E, work: &mut Work) -> bool {
    if parse_apart(packet, &mut work.headers) != Kind::IcmpError || quoted(packet, work).is_none() {
        return false;
    }
    let tuple = &work.quote.tuple;
    work.key = FlowKey {
        src: tuple.dst,
        dst: tuple.src,
        sport: tuple.dport,
        dport: tuple.sport,
        proto: work.quote.proto,
        pad: [0; 3],
    };
    // Who did not send the quoted packet is told nothing of it.
    work.headers.dst == work.key.dst && env.flow_into(&work.key, &mut work.flow)
}

/// An ICMP error at a device. It goes the way that answers to the packet that it quotes go, and is translated where
/// they are. At [`Link::Tunnel`] it was taken out of a header, so nobody but its flow may have it.
#[inline(always)]
pub fn error<P: Packet, E: Table + Flows + Node>(
    packet: &mut P,
    env: &E,
    work: &mut Work,
    side: Side,
    link: Link,
) -> Stage {
    let wrapped = matches!(link, Link::Tunnel);
    if !wrapped && matches!(side, Side::Ingress) && tunnel::is_about_one(packet, env, work) {
        return tunnel::tell_client(packet, env, work);
    }
    let found = find(packet, env, work);
    if wrapped && (!found || work.flow.flags & flow_flag::TUNNEL != 0) {
        return balance::drop(env, work, Counter::TunnelRefused);
    }
    if !found {
        return PASS;
    }
    let (headers, flow) = (&work.headers, &work.flow);
    let ingress = matches!(side, Side::Ingress);
    let past = ingress && door::is_open(env, flow.door);
    let at_egress = flow.flags & (flow_flag::REPLY | flow_flag::SNAT) == flow_flag::REPLY;
    if at_egress == ingress && !(past && matches!(link, Link::Pod)) {
        return PASS;
    }
    if flow.flags & flow_flag::TUNNEL != 0 {
        return tunnel::wrap(packet, env, work);
    }
    let snat = flow.flags & flow_flag::SNAT != 0;
    // The other end's own word comes from where it is known to be; a router's comes from the router, unless only an
    // address of this node is answered.
    let forward_snat = snat && flow.flags & flow_flag::REPLY == 0;
    let src = if headers.src == work.key.src || forward_snat { flow.src } else { headers.src };
    work.quote.outer = Tuple { src, dst: flow.dst, sport: 0, dport: 0 };
    work.quote.inner = Tuple { src: flow.dst, dst: flow.src, sport: flow.dport, dport: flow.sport };
    if (snat || past) && !find_way(packet, env, work) {
        env.count(Counter::NoRoute);
        return balance::DROP;
    }
    let (headers, way) = (&work.headers, if snat || past { Verdict::Redirect } else { Verdict::Pass });
    let hop = |packet: &mut P| packet::pass_hop(packet, headers.v6, headers.proto, headers.hops);
    let done = restore(packet, work)
        && readdress(packet, headers, &work.quote.outer)
        && (way == Verdict::Pass || hop(packet));
    if !done {
        env.count(Counter::RewriteFailed);
        return balance::DROP;
    }
    env.count(Counter::IcmpTranslated);
    Stage::Done(way)
}

/// Finds where the error goes on when it must not meet the stack.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(crate) fn find_way<P: Packet, E: Node>(packet: &P, env: &E, work: &mut Work) -> bool {
    let outer = &work.quote.outer;
    let journey = Journey {
        src: outer.src,
        dst: outer.dst,
        sport: 0,
        dport: 0,
        proto: work.headers.proto,
        v6: work.headers.v6,
        len: packet.size().saturating_sub(ETHER_LEN),
    };
    match env.route(&journey) {
        Way::To(route) => {
            work.route = route;
            true
        }
        _ => false,
    }
}

/// Changes the quoted packet's tuple, its checksums as far as they are quoted, and the error's own checksum.
#[inline(always)]
fn restore<P: Packet>(packet: &mut P, work: &Work) -> bool {
    let (headers, quote) = (&work.headers, &work.quote);
    let Some(diff) = (if headers.v6 { addresses6(packet, quote) } else { addresses4(packet, quote) }) else {
        return false;
    };
    // A quoted IPv4 header's own checksum makes up for its addresses.
    let for_error = if headers.v6 { diff } else { 0 };
    let ports = |tuple: &Tuple| u32::from_ne_bytes(bytes_of_ports(tuple.sport, tuple.dport));
    let ports_diff = checksum::diff(&[ports(&quote.tuple)], &[ports(&quote.inner)]);
    let udp = quote.proto == PROTO_UDP;
    let check_at = quote.l4 + if udp { UDP_CHECK } else { TCP_CHECK };
    let quoted = if check_at + 2 <= quote.end { packet.load::<2>(check_at) } else { None };
    let check_diff = match quoted.map(u16::from_ne_bytes) {
        // Not quoted, or none.
        None => 0,
        Some(0) if udp => 0,
        Some(check) => {
            let mut fixed = checksum::apply(checksum::apply(check, diff), ports_diff);
            if udp && fixed == 0 {
                fixed = 0xffff;
            }
            if !packet.store::<2>(check_at, fixed.to_ne_bytes(), false) {
                return false;
            }
            checksum::diff16(check, fixed)
        }
    };
    let total = checksum::add(checksum::add(for_error, ports_diff), check_diff);
    packet.store::<4>(quote.l4, bytes_of_ports(quote.inner.sport, quote.inner.dport), false)
        && packet.fix_l4(headers.l4 + ICMP_CHECK, total, false, false)
}

/// Changes the quoted IPv6 addresses; gives what that adds to a sum over them.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn addresses6<P: Packet>(packet: &mut P, quote: &Quote) -> Option<u32> {
    let was = pair6(&quote.tuple.src, &quote.tuple.dst);
    let is = pair6(&quote.inner.src, &quote.inner.dst);
    packet.store::<32>(quote.ip + IPV6_ADDRESSES, bytes_of(&is), false).then(|| checksum::diff(&was, &is))
}

/// The same for IPv4, with the quoted header's checksum.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn addresses4<P: Packet>(packet: &mut P, quote: &Quote) -> Option<u32> {
    let was = pair4(&quote.tuple.src, &quote.tuple.dst)?;
    let is = pair4(&quote.inner.src, &quote.inner.dst)?;
    let diff = checksum::diff(&was, &is);
    let check_at = quote.ip + IPV4_CHECK;
    let check = checksum::apply(u16::from_ne_bytes(packet.load::<2>(check_at)?), diff);
    let stored = packet.store::<2>(check_at, check.to_ne_bytes(), false)
        && packet.store::<8>(quote.ip + IPV4_ADDRESSES, bytes_of(&is), false);
    stored.then_some(diff)
}

/// Gives the error itself another source and destination.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn readdress<P: Packet>(packet: &mut P, headers: &Headers, new: &Tuple) -> bool {
    if headers.v6 {
        let (was, is) = (pair6(&headers.src, &headers.dst), pair6(&new.src, &new.dst));
        return packet.fix_l4(headers.l4 + ICMP_CHECK, checksum::diff(&was, &is), true, false)
            && packet.store::<32>(ETHER_LEN + IPV6_ADDRESSES, bytes_of(&is), true);
    }
    let (Some(was), Some(is)) = (pair4(&headers.src, &headers.dst), pair4(&new.src, &new.dst)) else {
        return false;
    };
    packet.fix_l3(ETHER_LEN + IPV4_CHECK, checksum::diff(&was, &is))
        && packet.store::<8>(ETHER_LEN + IPV4_ADDRESSES, bytes_of(&is), false)
}
