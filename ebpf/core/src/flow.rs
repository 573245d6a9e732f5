//! Connection tracking. Invariant: a connection has two entries that name each other; one that lost its other half
//! gets it back with its next packet or counts as gone, and no tuple ever belongs to two connections.

use crate::balance::Work;
use crate::env::{Claim, Flows, Table};
use crate::packet::Tuple;
use sheave_ebpf_abi::{Flow, FlowKey, PROTO_TCP, flow_flag, flow_timeout_s, is_closing, lifetime_s};

/// What a packet of the flow becomes.
#[inline(always)]
pub const fn translated(flow: &Flow) -> Tuple {
    Tuple { src: flow.src, dst: flow.dst, sport: flow.sport, dport: flow.dport }
}

/// Key of the other direction's entry.
#[inline(always)]
pub const fn other_key(key: &FlowKey, flow: &Flow) -> FlowKey {
    FlowKey {
        src: flow.dst,
        dst: flow.src,
        sport: flow.dport,
        dport: flow.sport,
        proto: key.proto,
        pad: [0; 3],
    }
}

/// The other direction's entry.
#[inline(always)]
pub const fn other(key: &FlowKey, flow: &Flow) -> Flow {
    Flow {
        src: key.dst,
        dst: key.src,
        sport: key.dport,
        dport: key.sport,
        flags: flow.flags ^ flow_flag::REPLY,
        ..*flow
    }
}

/// Whether both entries make the same of a packet.
#[inline(always)]
pub fn same(a: &Flow, b: &Flow) -> bool {
    a.src == b.src && a.dst == b.dst && a.sport == b.sport && a.dport == b.dport
}

/// Leaves the mark of the hosts of a tuple that has a flow, or is to have one.
#[inline(always)]
pub fn mark<E: Flows>(env: &E, key: &FlowKey, now_s: u32) {
    env.set_mark(key.mark(), if now_s == 0 { 1 } else { now_s });
}

/// Whether there may be a flow between hosts that have their mark at `place`.
#[inline(always)]
pub fn may_be<E: Flows>(env: &E, place: u32) -> bool {
    match env.mark(place) {
        0 => false,
        // No flow lives longer than one of TCP that nothing is seen of.
        seen_s => env.now_s().saturating_sub(seen_s) <= flow_timeout_s::TCP_ESTABLISHED,
    }
}

/// Whether nothing was seen of the connection for so long that it counts as gone.
#[inline(always)]
pub const fn is_expired(flow: &Flow, proto: u8, now_s: u32) -> bool {
    // Another CPU's clock may be a moment ahead.
    now_s.saturating_sub(flow.seen_s) > lifetime_s(flow.flags, proto)
}

/// Whether a client that begins a connection with the tuple of `flow` begins another one. Of a flow that is answered past
/// this node only the client's end is seen.
#[inline(always)]
const fn is_over(flow: &Flow) -> bool {
    is_closing(flow.flags) || flow.flags & flow_flag::TUNNEL != 0 && flow.flags & flow_flag::FIN_CLIENT != 0
}

/// Whether the backend of the client's entry in `work` may go on serving it: a connection under way stays where it is,
/// while a new one on an old tuple, and every datagram, wants a backend that still exists.
#[inline(always)]
pub fn keeps<E: Table>(env: &E, work: &Work) -> bool {
    let (headers, flow) = (&work.headers, &work.flow);
    if is_expired(flow, headers.proto, work.now_s) || (headers.opens() && is_over(flow)) {
        return false;
    }
    if headers.proto == PROTO_TCP && !headers.opens() {
        return true;
    }
    match env.backend(flow.backend) {
        Some(backend) => backend.id == flow.backend && backend.addr == flow.dst && backend.port == flow.dport,
        None => false,
    }
}

/// Whether the packet begins a connection on the tuple of answers of one that has ended: a connection past every service,
/// whose client uses the port again. A new connection through the service began with a packet of the client, which
/// opened the flow anew.
#[inline(always)]
pub const fn is_left(work: &Work) -> bool {
    work.flow.flags & flow_flag::REPLY != 0 && work.headers.is_syn() && is_closing(work.flow.flags)
}

/// Removes both entries of a connection, but for the other one where that is another connection's by now.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn end<E: Flows>(env: &E, work: &mut Work) {
    turn(work);
    if let Some(held) = env.flow(&work.other_key)
        && same(&held, &work.other)
    {
        env.remove(&work.other_key);
    }
    env.remove(&work.key);
}

/// Sees to it that nobody translates the answers to a packet that goes past every service: its client may have used the
/// port through one before. A flow of datagrams that was just in use is left alone: the packet may be one of its own that
/// was translated at a device below this one.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn make_way<E: Flows>(env: &E, work: &mut Work) {
    let key = &work.key;
    work.key = FlowKey { src: key.dst, dst: key.src, sport: key.dport, dport: key.sport, ..*key };
    let Some(flow) = env.flow(&work.key) else { return };
    if flow.flags & (flow_flag::REPLY | flow_flag::SNAT) != flow_flag::REPLY {
        return;
    }
    let over = if work.key.proto == PROTO_TCP {
        is_closing(flow.flags)
    } else {
        env.now_s().saturating_sub(flow.seen_s) > 1
    };
    if over {
        work.flow = flow;
        end(env, work);
    }
}

/// Notes a packet of the flow, at most once a second unless the connection's state changes, and then in both entries.
/// False when the other entry's place belongs to another connection. A flow that is answered past this node has no other
/// entry; its client goes on only when it was answered.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn note<E: Flows>(env: &E, work: &mut Work) -> bool {
    let reply = work.flow.flags & flow_flag::REPLY != 0;
    let tunnel = work.flow.flags & flow_flag::TUNNEL != 0;
    let replied = reply || (tunnel && !work.headers.opens());
    let mut seen = if replied { flow_flag::REPLIED } else { 0 };
    if work.headers.is_fin() {
        seen |= if reply { flow_flag::FIN_BACKEND } else { flow_flag::FIN_CLIENT };
    }
    if work.headers.is_reset() {
        seen |= flow_flag::RESET;
    }
    if work.flow.seen_s == work.now_s && work.flow.flags & seen == seen {
        return true;
    }
    work.flow.seen_s = work.now_s;
    work.flow.flags |= seen;
    env.touch(&work.key, work.now_s, seen);
    mark(env, &work.key, work.now_s);
    if tunnel {
        return true;
    }
    turn(work);
    mark(env, &work.other_key, work.now_s);
    match env.touch(&work.other_key, work.now_s, work.flow.flags & flow_flag::STATE) {
        Some(held) => same(&held, &work.other),
        // It may have made room for another one.
        None => env.claim(&work.other_key, &work.other) == Claim::Stored,
    }
}

/// Puts the other direction's entry of `flow` in its place in `work`.
#[inline(always)]
pub fn turn(work: &mut Work) {
    work.other_key = other_key(&work.key, &work.flow);
    work.other = other(&work.key, &work.flow);
}

/// Takes the tuple of the answers of `flow` in `work`. It is ours then: it was free, ours already, or nothing was seen
/// of its owner for too long. With `early` also when its owner has ended and the packet begins a connection: the port is
/// the client's own, who would not use it again for one that lives, or that the backend still remembers.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn take<E: Flows>(env: &E, work: &mut Work, early: bool) -> Claim {
    turn(work);
    mark(env, &work.other_key, work.now_s);
    match env.claim(&work.other_key, &work.other) {
        Claim::Taken => {}
        done => return done,
    }
    if let Some(held) = env.flow(&work.other_key)
        && !same(&held, &work.other)
        && !is_expired(&held, work.key.proto, work.now_s)
    {
        if !(early && work.headers.opens() && is_closing(held.flags)) {
            return Claim::Taken;
        }
        env.remove(&other_key(&work.other_key, &held));
    }
    if env.replace(&work.other_key, &work.other) { Claim::Stored } else { Claim::Refused }
}
