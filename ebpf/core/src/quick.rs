//! The short way for packets that concern no service, which are most of a node's. Invariant: what passes here passes
//! unchanged, uncounted and without any trace on the long way too; what can't be told at a glance takes the long way.

use crate::balance::Side;
use crate::env::{Flows, Packet, Table};
use crate::flow;
use crate::packet::{ETHER_IPV4, ETHER_IPV6};
use crate::resolve::{self, Destination};
use sheave_ebpf_abi::{Address, PROTO_TCP, PROTO_UDP, fold, mark_of, node_addr_flag};

/// Whether the packet surely passes: it is a plain TCP or UDP packet between hosts that have no flow, either way, and where
/// it arrives no frontend has its destination.
#[inline(always)]
pub fn passes<P: Packet, E: Table + Flows>(packet: &P, env: &E, side: Side) -> bool {
    if packet.is_tagged() {
        return false;
    }
    match packet.ether_type() {
        ETHER_IPV4 => passes4(packet, env, side),
        ETHER_IPV6 => passes6(packet, env, side),
        _ => false,
    }
}

#[inline(always)]
const fn port_of(word: u32) -> u16 {
    let [_, _, c, d] = word.to_ne_bytes();
    u16::from_ne_bytes([c, d])
}

#[inline(always)]
const fn is_transport(proto: u8) -> bool {
    proto == PROTO_TCP || proto == PROTO_UDP
}

#[inline(always)]
fn passes4<P: Packet, E: Table + Flows>(packet: &P, env: &E, side: Side) -> bool {
    let Some([w0, w1, w2, src, dst, w5]) = packet.words::<6>() else { return false };
    let ([first, ..], [_, _, f0, f1], [_, proto, ..]) =
        (w0.to_ne_bytes(), w1.to_ne_bytes(), w2.to_ne_bytes());
    // Options, the bit that more fragments follow, a fragment's offset.
    if first != 0x45 || f0 & 0x3f != 0 || f1 != 0 || !is_transport(proto) {
        return false;
    }
    if flow::may_be(env, mark_of([src, dst])) {
        return false;
    }
    matches!(side, Side::Egress) || asks_nobody(env, Address::v4(dst), port_of(w5), proto)
}

#[inline(always)]
fn passes6<P: Packet, E: Table + Flows>(packet: &P, env: &E, side: Side) -> bool {
    let Some([w0, w1, s0, s1, s2, s3, d0, d1, d2, d3, w10]) = packet.words::<11>() else { return false };
    let ([first, ..], [_, _, proto, _]) = (w0.to_ne_bytes(), w1.to_ne_bytes());
    if first >> 4 != 6 || !is_transport(proto) {
        return false;
    }
    let (src, dst) = (Address::v6([s0, s1, s2, s3]), Address::v6([d0, d1, d2, d3]));
    if flow::may_be(env, mark_of([fold(&src), fold(&dst)])) {
        return false;
    }
    matches!(side, Side::Egress) || asks_nobody(env, dst, port_of(w10), proto)
}

/// Whether no frontend has the destination, and it can be no NodePort or hostPort.
#[inline(always)]
fn asks_nobody<E: Table>(env: &E, addr: Address, port: u16, proto: u8) -> bool {
    resolve::frontend(env, &Destination { addr, port, proto }).is_none()
        && !(resolve::may_be_wildcard(env, port) && env.node_flags(&addr) & node_addr_flag::NODE_PORTS != 0)
}
