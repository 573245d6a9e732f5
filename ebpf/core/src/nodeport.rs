//! NodePort traffic from outside: to a pod of this node and back. Invariant: a packet is rewritten only when both of
//! its flow's entries stand, so an answer is never sent from an address that the client did not ask.

use crate::env::{Flows, Packet, Table};
use crate::packet::{self, Headers, Parsed, Side};
use crate::resolve::{self, Destination};
use crate::select::{self, Range, Scope};
use sheave_ebpf_abi::{
    Address, Backend, Counter, FLOW_CLOSING, Flow, FlowKey, Frontend, flow_direction, frontend_flag,
};

/// What is to become of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On to the next program and the stack, changed or not.
    Pass,
    /// Gone; a counter says why.
    Drop,
}

/// Seconds without a packet after which a client tuple may be taken over by another NodePort's flow.
pub const TAKE_OVER_IDLE_S: u32 = 300;
/// Backends tried for a client tuple that another NodePort's flow occupies.
const PLACES: u32 = 3;

#[inline(always)]
fn headers_of<P: Packet, T: Table>(packet: &P, table: &T) -> Option<Headers> {
    match packet::parse(packet) {
        Parsed::Transport(headers) => Some(headers),
        Parsed::Other => None,
        Parsed::Fragment => {
            table.count(Counter::Fragment);
            None
        }
        Parsed::Bad => {
            table.count(Counter::BadHeader);
            None
        }
    }
}

#[inline(always)]
fn forward_key(headers: &Headers) -> FlowKey {
    FlowKey {
        src: headers.src,
        dst: headers.dst,
        sport: headers.sport,
        dport: headers.dport,
        proto: headers.proto,
        direction: flow_direction::FORWARD,
        pad: 0,
    }
}

/// Key of the answer that `backend` will send to the client of `headers`.
#[inline(always)]
fn reply_key(headers: &Headers, addr: &Address, port: u16) -> FlowKey {
    FlowKey {
        src: *addr,
        dst: headers.src,
        sport: port,
        dport: headers.sport,
        proto: headers.proto,
        direction: flow_direction::REPLY,
        pad: 0,
    }
}

/// A packet that arrives from outside. Sends it to a pod of this node when it is for a NodePort.
#[inline(always)]
pub fn ingress<P: Packet, E: Table + Flows>(packet: &mut P, env: &E) -> Verdict {
    let Some(headers) = headers_of(packet, env) else { return Verdict::Pass };
    if !resolve::in_node_port_range(env, headers.dport) || !env.is_node_address(&headers.dst) {
        return Verdict::Pass;
    }
    let now_s = env.now_s();
    let key = forward_key(&headers);
    if let Some(flow) = env.seen(&key, now_s, headers.closes())
        && still_good(env, &headers, &flow)
        && reply_stands(env, &headers, &flow, now_s)
    {
        return forward(packet, env, &headers, &flow.addr, flow.port);
    }
    let asked = Destination { addr: headers.dst, port: headers.dport, proto: headers.proto };
    let Some(frontend) = resolve::node_port_frontend(env, &asked) else { return Verdict::Pass };
    let Some(range) = select::range(&frontend, Scope::Local) else {
        return without_local_endpoint(env, &frontend);
    };
    let Some(backend) = place(env, &headers, &frontend, range, now_s) else { return Verdict::Drop };
    forward(packet, env, &headers, &backend.addr, backend.port)
}

/// Only endpoints of this node are served from outside; a service that has none anywhere is refused by the node.
#[inline(always)]
fn without_local_endpoint<E: Table>(env: &E, frontend: &Frontend) -> Verdict {
    if frontend.slot_count() == 0 && frontend.flags & frontend_flag::EXTERNAL_LOCAL == 0 {
        env.count(Counter::NodePortNoEndpoints);
        return Verdict::Pass;
    }
    env.count(Counter::NodePortNoLocalEndpoints);
    Verdict::Drop
}

/// Whether a known flow's backend may go on serving it: a connection under way stays where it is, while a new one on
/// an old tuple, and every datagram, wants a backend that still exists.
#[inline(always)]
fn still_good<E: Table>(env: &E, headers: &Headers, flow: &Flow) -> bool {
    if headers.proto == sheave_ebpf_abi::PROTO_TCP && !headers.opens() {
        return true;
    }
    if headers.opens() && flow.flags & FLOW_CLOSING != 0 {
        return false;
    }
    match env.backend(flow.backend) {
        Some(backend) => backend.id == flow.backend && backend.addr == flow.addr && backend.port == flow.port,
        None => false,
    }
}

/// Keeps the two entries of a flow together: the LRU may have evicted the reply's.
#[inline(always)]
fn reply_stands<E: Table + Flows>(env: &E, headers: &Headers, flow: &Flow, now_s: u32) -> bool {
    let key = reply_key(headers, &flow.addr, flow.port);
    match env.seen(&key, now_s, headers.closes()) {
        Some(reply) => reply.addr == headers.dst && reply.port == headers.dport,
        None => {
            let reply = Flow { addr: headers.dst, port: headers.dport, seen_s: now_s, ..*flow };
            env.put(&key, &reply)
        }
    }
}

/// Finds a backend and writes the flow's entries, the reply's first.
#[inline(always)]
fn place<E: Table + Flows>(
    env: &E,
    headers: &Headers,
    frontend: &Frontend,
    range: Range,
    now_s: u32,
) -> Option<Backend> {
    let mut entropy = tuple_hash(headers);
    let mut attempt = 0;
    let mut stale = 0;
    while attempt < PLACES {
        attempt += 1;
        let Some(backend) = resolve::backend_of(env, frontend.service, range, entropy) else {
            stale += 1;
            continue;
        };
        let key = reply_key(headers, &backend.addr, backend.port);
        if !occupied(env, &key, headers, now_s) {
            return write_flow(env, headers, frontend, &key, backend, now_s);
        }
        entropy = select::mix(u64::from(entropy) + 1);
    }
    env.count(if stale == PLACES { Counter::StaleSlot } else { Counter::FlowCollision });
    None
}

#[inline(always)]
fn write_flow<E: Table + Flows>(
    env: &E,
    headers: &Headers,
    frontend: &Frontend,
    reply_key: &FlowKey,
    backend: Backend,
    now_s: u32,
) -> Option<Backend> {
    let mut flow = Flow {
        addr: headers.dst,
        port: headers.dport,
        flags: 0,
        backend: backend.id,
        service: frontend.service,
        seen_s: now_s,
    };
    let mut stored = env.put(reply_key, &flow);
    flow.addr = backend.addr;
    flow.port = backend.port;
    stored &= env.put(&forward_key(headers), &flow);
    if !stored {
        env.count(Counter::FlowFull);
        return None;
    }
    Some(backend)
}

/// Whether the client's tuple towards this backend belongs to a live flow through another address or NodePort.
#[inline(always)]
fn occupied<E: Table + Flows>(env: &E, key: &FlowKey, headers: &Headers, now_s: u32) -> bool {
    match env.flow(key) {
        Some(held) => {
            !(held.addr == headers.dst && held.port == headers.dport)
                && held.flags & FLOW_CLOSING == 0
                && now_s.wrapping_sub(held.seen_s) < TAKE_OVER_IDLE_S
        }
        None => false,
    }
}

/// The same for every packet of a flow, so that a flow whose entry was evicted finds its backend again while the
/// service does not change.
#[inline(always)]
fn tuple_hash(headers: &Headers) -> u32 {
    let s = &headers.src.words;
    let d = &headers.dst.words;
    let ports = u64::from(headers.sport) << 16 | u64::from(headers.dport);
    let a = u64::from(s[3] ^ s[1].rotate_left(7)) << 32 | u64::from(s[2] ^ s[0].rotate_left(13));
    let b = u64::from(d[3] ^ d[1].rotate_left(7)) << 32 | u64::from(d[2] ^ d[0].rotate_left(13));
    select::mix(u64::from(select::mix(a ^ ports.rotate_left(24))) << 32 ^ b ^ u64::from(headers.proto))
}

#[inline(always)]
fn forward<P: Packet, E: Table>(
    packet: &mut P,
    env: &E,
    headers: &Headers,
    addr: &Address,
    port: u16,
) -> Verdict {
    finish(packet::rewrite(packet, headers, Side::Destination, addr, port), env, Counter::NodePortForward)
}

#[inline(always)]
fn finish<E: Table>(rewritten: bool, env: &E, counter: Counter) -> Verdict {
    env.count(if rewritten { counter } else { Counter::RewriteFailed });
    if rewritten { Verdict::Pass } else { Verdict::Drop }
}

/// A packet that leaves towards outside. Gives a pod's answer the address and port that the client asked.
#[inline(always)]
pub fn egress<P: Packet, E: Table + Flows>(packet: &mut P, env: &E) -> Verdict {
    let Some(headers) = headers_of(packet, env) else { return Verdict::Pass };
    let key = FlowKey { direction: flow_direction::REPLY, ..forward_key(&headers) };
    let Some(flow) = env.seen(&key, env.now_s(), headers.closes()) else { return Verdict::Pass };
    finish(
        packet::rewrite(packet, &headers, Side::Source, &flow.addr, flow.port),
        env,
        Counter::NodePortReply,
    )
}
