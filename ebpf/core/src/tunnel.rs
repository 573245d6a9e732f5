//! Direct return: a packet for a backend of another node goes there whole, within an IP header of its own, and the backend
//! answers the client past this node. Invariant: what was taken out of a header goes to the backend that the header named,
//! translated, or nowhere; it is never sent on in another header, and a header that is none of ours stays on its packet.
//!
//! The header is that of RFC 2003 or RFC 2473: from the node that was asked to the pod, so that it needs no more than the
//! ways between pods. It takes 20 or 40 bytes of what the way allows; who sends more is told so, which over IPv6 helps
//! only where the way allows 1320.
//!
//! Who can send a packet to a pod's address can forge one. Taking it out asks for nothing less than the frontend, with
//! direct return and this client in its source ranges, and the pod as one of its endpoints on this node: a forger
//! reaches through it who could be reached without it. A NodePort's address must be the header's source, so that
//! answers come from an address which the sender had, or forged on the way here too.
//!
//! Not everything can be direct: what pods of the asked node send and an endpoint's own questions are translated as ever.
//! A program of the node that the backend is on, which asks another node in its own name, gets no answer from it: the
//! stack takes no packet of its own address from outside ([`Counter::TunnelRefused`]).

use crate::answer::{Answer, TTL, ip_len, ipv4_header};
use crate::balance::{self, DROP, Link, PASS, Stage, Verdict, Work};
use crate::env::{Flows, Journey, Node, Packet, Table, Way};
use crate::packet::{
    self, ETHER_LEN, Headers, ICMP_LEN, IPV4_LEN, IPV6_LEN, Kind, PROTO_IPIP, PROTO_IPV6, Tuple, address6,
    bytes_of, pair6, parse_apart, word,
};
use crate::{checksum, flow, icmp, open, resolve};
use sheave_ebpf_abi::{Address, Counter, Flow, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP, flow_flag};

/// Endpoints of one node that are looked through for the one that a header names; a node has fewer pods.
const LOCALS_MAX: u32 = 256;
/// How many of them are looked at in one step ([`Node::is_near`]).
const LOCALS_AT_ONCE: u32 = 16;

/// Bytes of the header around a packet.
#[inline(always)]
const fn room(v6: bool) -> u32 {
    if v6 { IPV6_LEN } else { IPV4_LEN }
}

/// The packet that another one carries, as if its Ethernet header were the other's.
#[derive(Debug)]
pub struct Within<'a, P> {
    packet: &'a P,
    skip: u32,
}

impl<'a, P: Packet> Within<'a, P> {
    /// The packet within `packet`, or that one itself where it is not `wrapped`.
    #[inline(always)]
    pub fn new(packet: &'a P, wrapped: bool) -> Self {
        let v6 = packet.ether_type() == packet::ETHER_IPV6;
        Self { packet, skip: if wrapped { room(v6) } else { 0 } }
    }
}

impl<P: Packet> Packet for Within<'_, P> {
    #[inline(always)]
    fn ether_type(&self) -> u16 {
        self.packet.ether_type()
    }
    #[inline(always)]
    fn is_tagged(&self) -> bool {
        self.packet.is_tagged()
    }
    #[inline(always)]
    fn size(&self) -> u32 {
        self.packet.size().saturating_sub(self.skip)
    }
    #[inline(always)]
    fn segment_len(&self) -> u32 {
        self.packet.segment_len()
    }
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.packet.load(offset + self.skip)
    }
    #[inline(always)]
    fn read<const N: usize>(&self, offset: u32, into: &mut [u8; N]) -> bool {
        self.packet.read(offset + self.skip, into)
    }
    /// It is looked at, never changed, before it is on its own.
    #[inline(always)]
    fn store<const N: usize>(&mut self, _: u32, _: [u8; N], _: bool) -> bool {
        false
    }
    #[inline(always)]
    fn fix_l3(&mut self, _: u32, _: u32) -> bool {
        false
    }
    #[inline(always)]
    fn fix_l4(&mut self, _: u32, _: u32, _: bool, _: bool) -> bool {
        false
    }
    #[inline(always)]
    fn cut(&mut self, _: u32) {}
    #[inline(always)]
    fn insert(&mut self, _: u32) -> bool {
        false
    }
}

/// Sends the packet of the flow in `work` on whole to its backend's node.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn wrap<P: Packet, E: Table + Node>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    let headers = &work.headers;
    let transport = headers.proto == PROTO_TCP || headers.proto == PROTO_UDP;
    if headers.hops <= 1 {
        env.count(Counter::Expired);
        return if transport { Stage::Answer(Answer::HopLimit) } else { DROP };
    }
    let Some(src) = open::source(env, headers) else {
        return balance::drop(env, work, Counter::NoNodeAddress);
    };
    let extra = room(headers.v6);
    let journey = Journey {
        src,
        dst: work.flow.dst,
        sport: 0,
        dport: 0,
        proto: if headers.v6 { PROTO_IPV6 } else { PROTO_IPIP },
        v6: headers.v6,
        len: balance::wire_len(packet, headers) + extra,
    };
    match env.route(&journey) {
        Way::To(route) => work.route = route,
        Way::TooBig(mtu) => {
            env.count(Counter::TooBig);
            env.tell(work, Counter::TooBig);
            let answer = Answer::TooBig(mtu.saturating_sub(extra));
            return if transport { Stage::Answer(answer) } else { DROP };
        }
        Way::None => return balance::drop(env, work, Counter::NoRoute),
        Way::Later => return PASS,
    }
    if put(packet, &work.headers, &src, &work.flow.dst) {
        env.count(Counter::TunnelSent);
        return Stage::Done(Verdict::Redirect);
    }
    env.count(Counter::RewriteFailed);
    DROP
}

/// Counts the hop and writes the header around the packet.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn put<P: Packet>(packet: &mut P, headers: &Headers, src: &Address, dst: &Address) -> bool {
    let Some([first, class, label0, label1]) = packet.load::<4>(ETHER_LEN) else { return false };
    let Some(inner) = ip_len(packet, headers.v6) else { return false };
    let at = ETHER_LEN + room(headers.v6);
    if !packet.wrap(headers.v6) || !packet::pass_hop_at(packet, at, headers.v6, headers.proto, headers.hops) {
        return false;
    }
    let len = |bytes: u32| if bytes > 0xffff { 0xffff } else { bytes as u16 };
    // The packet's class goes with it; congestion on the way is not marked (RFC 6040, compatibility mode).
    if headers.v6 {
        let [l0, l1] = len(inner).to_be_bytes();
        let head = [first, class & 0xcf, label0, label1, l0, l1, PROTO_IPV6, TTL];
        return packet.store::<8>(ETHER_LEN, head, true)
            && packet.store::<32>(ETHER_LEN + 8, bytes_of(&pair6(src, dst)), true);
    }
    let head = ipv4_header(src, dst, class & 0xfc, PROTO_IPIP, len(inner + IPV4_LEN));
    packet.store::<20>(ETHER_LEN, head, true)
}

/// Whether an ICMP error is about a packet that this node sent on, whose headers and flow `work` knows then. It must quote
/// the carried packet as far as its ports, as all do but the oldest routers.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(crate) fn is_about_one<P: Packet, E: Flows>(packet: &P, env: &E, work: &mut Work) -> bool {
    if parse_apart(packet, &mut work.headers) != Kind::IcmpError {
        return false;
    }
    let room = room(work.headers.v6);
    let quoted = ETHER_LEN + room + ICMP_LEN;
    // With options before it, it is left alone.
    if work.headers.l4 + ICMP_LEN != quoted {
        return false;
    }
    let mut head = [0; 40];
    if work.headers.v6 {
        if !packet.read(quoted, &mut head) || head[0] >> 4 != 6 || head[6] != PROTO_IPV6 {
            return false;
        }
        work.outer = [address6(&head, 8), address6(&head, 24)];
    } else {
        let mut ip = [0; 20];
        if !packet.read(quoted, &mut ip)
            || ip[0] != 0x45
            || ip[9] != PROTO_IPIP
            || ip[6] & 0x3f != 0
            || ip[7] != 0
        {
            return false;
        }
        work.outer = [Address::v4(word(&ip, 12)), Address::v4(word(&ip, 16))];
    }
    if work.outer[0] != work.headers.dst {
        return false;
    }
    let carried = Within { packet, skip: quoted + room - ETHER_LEN };
    if !matches!(parse_apart(&carried, &mut work.headers), Kind::Transport | Kind::FirstFragment) {
        return false;
    }
    work.key = work.headers.key();
    env.flow_into(&work.key, &mut work.flow)
        && work.flow.flags & flow_flag::TUNNEL != 0
        && work.flow.dst == work.outer[1]
}

/// Tells the client what an error says of its packet on the way to the backend, as if from the address that it asked.
#[inline(always)]
pub(crate) fn tell_client<P: Packet, E: Table + Node>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    let headers = &work.headers;
    work.quote.outer = Tuple { src: headers.dst, dst: headers.src, sport: 0, dport: 0 };
    if !icmp::find_way(packet, env, work) {
        env.count(Counter::NoRoute);
        return DROP;
    }
    let headers = &work.headers;
    let told = if headers.v6 { unquote6(packet, headers) } else { unquote4(packet, headers) };
    if told {
        env.count(Counter::IcmpTranslated);
        return Stage::Done(Verdict::Redirect);
    }
    env.count(Counter::RewriteFailed);
    DROP
}

/// Takes the header that this node added out of what an error quotes, and its bytes from the size that the error allows.
/// What goes is as long as the error's own headers are in front of it, which are written anew in its place.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn unquote4<P: Packet>(packet: &mut P, headers: &Headers) -> bool {
    let (mut icmp, mut outer) = ([0; 8], [0; 20]);
    if !packet.read(ETHER_LEN + IPV4_LEN, &mut icmp)
        || !packet.read(ETHER_LEN + IPV4_LEN + ICMP_LEN, &mut outer)
    {
        return false;
    }
    let Some(len) = ip_len(packet, false) else { return false };
    let words = [word(&outer, 0), word(&outer, 4), word(&outer, 8), word(&outer, 12), word(&outer, 16)];
    let mut diff = checksum::diff(&words, &[0; 5]);
    if icmp[0] == 3 && icmp[1] == 4 {
        let was = u16::from_be_bytes([icmp[6], icmp[7]]);
        let is = was.saturating_sub(IPV4_LEN as u16);
        diff = checksum::add(diff, checksum::diff16(was.to_be(), is.to_be()));
        let [m0, m1] = is.to_be_bytes();
        icmp[6] = m0;
        icmp[7] = m1;
    }
    let [c0, c1] = checksum::apply(u16::from_ne_bytes([icmp[2], icmp[3]]), diff).to_ne_bytes();
    icmp[2] = c0;
    icmp[3] = c1;
    let len = len.saturating_sub(IPV4_LEN) as u16;
    packet.unwrap(false)
        && packet.store::<20>(ETHER_LEN, ipv4_header(&headers.dst, &headers.src, 0, PROTO_ICMP, len), true)
        && packet.store::<8>(ETHER_LEN + IPV4_LEN, icmp, true)
}

/// The same for IPv6, whose pseudo header counts in the error's checksum.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn unquote6<P: Packet>(packet: &mut P, headers: &Headers) -> bool {
    let at = ETHER_LEN + IPV6_LEN;
    let (mut icmp, mut bytes) = ([0; 8], [0; 32]);
    if !packet.read(at, &mut icmp) {
        return false;
    }
    let Some(len) = ip_len(packet, true) else { return false };
    let (was, is) = (len.saturating_sub(IPV6_LEN) as u16, len.saturating_sub(2 * IPV6_LEN) as u16);
    let mut diff = checksum::diff16(was.to_be(), is.to_be());
    // The addresses of the error and the header, by halves.
    if !packet.read(ETHER_LEN + 8, &mut bytes) {
        return false;
    }
    let new = pair6(&headers.dst, &headers.src);
    diff = checksum::add(diff, checksum::diff(&words8(&bytes), &new));
    let mut first = [0; 8];
    if !packet.read(at + ICMP_LEN, &mut first) || !packet.read(at + ICMP_LEN + 8, &mut bytes) {
        return false;
    }
    diff = checksum::add(diff, checksum::diff(&[word(&first, 0), word(&first, 4)], &[0; 2]));
    diff = checksum::add(diff, checksum::diff(&words8(&bytes), &[0; 8]));
    if icmp[0] == 2 {
        let was = u32::from_be(word(&icmp, 4));
        let mtu = was.saturating_sub(IPV6_LEN);
        diff = checksum::add(diff, checksum::diff(&[was.to_be()], &[mtu.to_be()]));
        let [m0, m1, m2, m3] = mtu.to_be_bytes();
        icmp[4] = m0;
        icmp[5] = m1;
        icmp[6] = m2;
        icmp[7] = m3;
    }
    let [c0, c1] = checksum::apply(u16::from_ne_bytes([icmp[2], icmp[3]]), diff).to_ne_bytes();
    icmp[2] = c0;
    icmp[3] = c1;
    let [l0, l1] = is.to_be_bytes();
    packet.unwrap(true)
        && packet.store::<8>(ETHER_LEN, [0x60, 0, 0, 0, l0, l1, PROTO_ICMPV6, TTL], true)
        && packet.store::<32>(ETHER_LEN + 8, bytes_of(&new), true)
        && packet.store::<8>(at, icmp, true)
}

#[inline(always)]
fn words8(bytes: &[u8; 32]) -> [u32; 8] {
    [
        word(bytes, 0),
        word(bytes, 4),
        word(bytes, 8),
        word(bytes, 12),
        word(bytes, 16),
        word(bytes, 20),
        word(bytes, 24),
        word(bytes, 28),
    ]
}

/// Whether the packet carries another one; `work` knows from where to where then.
#[inline(always)]
pub(crate) fn is_one<P: Packet>(packet: &P, work: &mut Work) -> bool {
    let found = parse_apart(packet, &mut work.headers) == Kind::Tunnel;
    work.outer = [work.headers.src, work.headers.dst];
    found
}

/// A packet that carries another one, at an uplink.
#[inline(always)]
pub fn unwrap<P: Packet, E: Table + Flows + Node>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    if !is_one(packet, work) {
        return PASS;
    }
    let v6 = work.headers.v6;
    match balance::classify(&Within::new(packet, true), env, work) {
        Kind::Transport => {}
        Kind::IcmpError => return unwrap_error(packet, env, work),
        _ => return PASS,
    }
    work.known = env.flow_into(&work.key, &mut work.flow);
    if work.known && leads_to(&work.flow, &work.outer[1]) {
        work.now_s = env.now_s();
        if flow::keeps(env, work) && flow::note(env, work) {
            if !take_off(packet, env, v6) {
                return DROP;
            }
            let snat = work.flow.flags & flow_flag::SNAT != 0;
            return if snat {
                balance::travel(packet, env, work)
            } else {
                balance::deliver(packet, env, work)
            };
        }
    }
    if balance::frontend(env, work, Link::Tunnel) { Stage::Open } else { PASS }
}

/// An error about an answer of a backend of this node: only who answered can do anything about it.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn unwrap_error<P: Packet, E: Table + Flows>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    if !icmp::find(&Within::new(packet, true), env, work) || !leads_to(&work.flow, &work.outer[1]) {
        return PASS;
    }
    if take_off(packet, env, work.headers.v6) { Stage::Icmp } else { DROP }
}

/// Whether the client's entry of a flow leads to a backend of this node that has this address.
#[inline(always)]
fn leads_to(flow: &Flow, addr: &Address) -> bool {
    flow.flags & (flow_flag::REPLY | flow_flag::TUNNEL) == 0 && flow.dst == *addr
}

#[inline(always)]
fn take_off<P: Packet, E: Table>(packet: &mut P, env: &E, v6: bool) -> bool {
    let done = packet.unwrap(v6);
    env.count(if done { Counter::TunnelReceived } else { Counter::RewriteFailed });
    done
}

/// Finds the endpoint of this node that the header in `work` names among those of the frontend in `work`, and leaves its
/// slot there. A packet for nobody here is left to the stack as it is, and to the other node's next pick.
#[inline(always)]
pub(crate) fn name<E: Table + Node>(env: &E, work: &mut Work) -> bool {
    work.slot = work.frontend.base;
    if is_among(env, work, u32::from(work.frontend.local_ready)) {
        return true;
    }
    // Those that terminate come behind the ready ones of both kinds.
    let ready = u32::from(work.frontend.local_ready) + u32::from(work.frontend.remote_ready);
    work.slot = work.frontend.base.wrapping_add(ready);
    is_among(env, work, u32::from(work.frontend.local_terminating))
}

/// Whether it is one of `len` slots from that in `work` on, which is its own then.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn is_among<E: Table + Node>(env: &E, work: &mut Work, len: u32) -> bool {
    let mut at = 0;
    while at < LOCALS_MAX && at < len {
        if env.is_near(work, len - at) {
            return true;
        }
        at += LOCALS_AT_ONCE;
    }
    false
}

/// The same of the first few of them; past those otherwise.
#[inline(always)]
pub fn is_near<E: Table>(env: &E, work: &mut Work, len: u32) -> bool {
    let mut at = 0;
    while at < LOCALS_AT_ONCE && at < len {
        if let Some(backend) = resolve::backend_at(env, work.frontend.service, work.slot)
            && backend.addr == work.outer[1]
        {
            return true;
        }
        work.slot = work.slot.wrapping_add(1);
        at += 1;
    }
    false
}
