//! Services for packets that arrive at a device: to a backend and back. Invariant: a packet is rewritten only by a flow
//! both of whose entries stand, so an answer is never sent from an address that the client did not ask.
//!
//! Where what is translated: the client's packets at ingress of the device they arrive on. Answers of backends that
//! know the client's own address at egress of the device towards the client, after routing, since nothing before it
//! may take a service's address for a source. Answers to this node, of masqueraded connections, at ingress; they are
//! redirected, as are masqueraded packets on their way, past a stack that would drop packets from its own address.
//! Packets of services with direct return are not translated here but at their backend's node ([`tunnel`]).

use crate::answer::{self, Answer};
use crate::door::{self, Passage};
use crate::env::{Affinities, Flows, Journey, Node, Packet, Route, Table, Way};
use crate::flow;
use crate::icmp::{self, Quote};
use crate::open;
use crate::packet::{self, ETHER_LEN, Headers, Kind};
use crate::quick;
use crate::resolve::{self, Destination};
use crate::tunnel;
use sheave_ebpf_abi::{
    Address, Counter, Flow, FlowKey, Fragment, FragmentKey, Frontend, PROTO_TCP, Plain as _, flow_flag,
    frontend_flag, node_addr_flag,
};

/// What is to become of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On to the next program and the stack, changed or not.
    Pass,
    /// Gone; a counter says why.
    Drop,
    /// Out of another device, by [`Work::route`].
    Redirect,
    /// Into the namespace behind the device of [`Work::route`].
    Enter,
    /// Back out of the device that it came by: it is the answer now.
    Reply,
}

/// The kind of device a program is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Outside is behind it.
    Uplink,
    /// A pod is behind it.
    Pod,
    /// Outside, and another node has sent the packet on whole: it is within a header that names its backend.
    Tunnel,
}

/// The direction that a program sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Into the node.
    Ingress,
    /// Out of the node.
    Egress,
}

/// How a packet goes on: some of the way is long and seldom, and may be a program of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It is done.
    Done(Verdict),
    /// It is for a service and belongs to no flow: [`open::open`] comes next.
    Open,
    /// It belongs to a flow now: [`ingress`] comes next.
    Again,
    /// It is an ICMP error: [`icmp::error`] comes next.
    Icmp,
    /// It is answered: [`crate::answer::make`] comes next.
    Answer(Answer),
    /// It carries another one, perhaps of a service: [`tunnel::unwrap`] comes next.
    Unwrap,
}

/// What the stages know of a packet. It is much for a stack, and lives where the caller has room.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// The packet's headers as they came.
    pub headers: Headers,
    /// Source and destination of the header that it came in, at [`Link::Tunnel`].
    pub outer: [Address; 2],
    /// The slot whose backend that header names.
    pub slot: u32,
    /// Key of its flow.
    pub key: FlowKey,
    /// Its flow.
    pub flow: Flow,
    /// Whether there was one when the packet came.
    pub known: bool,
    /// Key of the other direction's entry.
    pub other_key: FlowKey,
    /// The other direction's entry.
    pub other: Flow,
    /// The frontend that it is for.
    pub frontend: Frontend,
    /// Where it goes on when the verdict is to redirect it.
    pub route: Route,
    /// The packet that an ICMP error quotes.
    pub quote: Quote,
    /// Seconds of the kernel's monotonic clock.
    pub now_s: u32,
    /// The packet that this is about, where stages are programs of their own; 0 for none. It is their business alone.
    pub ticket: u64,
}

impl Work {
    /// A work area that holds nothing.
    pub fn new() -> Self {
        Self {
            headers: packet::NOTHING,
            outer: [Address::zeroed(); 2],
            slot: 0,
            key: FlowKey::zeroed(),
            flow: Flow::zeroed(),
            known: false,
            other_key: FlowKey::zeroed(),
            other: Flow::zeroed(),
            frontend: Frontend::zeroed(),
            route: Route { device: 0, next_hop: Address::zeroed(), link: [0; 12], has_link: false },
            quote: Quote::NOTHING,
            now_s: 0,
            ticket: 0,
        }
    }
}

impl Default for Work {
    fn default() -> Self {
        Self::new()
    }
}

pub(crate) const PASS: Stage = Stage::Done(Verdict::Pass);
pub(crate) const DROP: Stage = Stage::Done(Verdict::Drop);

#[inline(always)]
pub(crate) fn drop<E: Table + Node>(env: &E, work: &Work, counter: Counter) -> Stage {
    env.count(counter);
    env.tell(work, counter);
    DROP
}

/// Parses the packet, and gives a fragment the ports of its first one.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(crate) fn classify<P: Packet, E: Table + Flows>(packet: &P, env: &E, work: &mut Work) -> Kind {
    let headers = &mut work.headers;
    let mut kind = packet::parse(packet, headers);
    if kind == Kind::FirstFragment || kind == Kind::LaterFragment {
        let key = FragmentKey {
            src: headers.src,
            dst: headers.dst,
            id: headers.id,
            proto: if headers.v6 { 0 } else { headers.proto },
            pad: [0; 3],
        };
        if kind == Kind::FirstFragment {
            let (sport, dport, proto) = (headers.sport, headers.dport, u32::from(headers.proto));
            env.set_fragment(&key, &Fragment { sport, dport, proto });
            kind = Kind::Transport;
        } else if let Some(known) = env.fragment(&key) {
            headers.sport = known.sport;
            headers.dport = known.dport;
            headers.proto = known.proto as u8;
            kind = Kind::Transport;
        } else {
            env.count(Counter::Fragment);
        }
    }
    if kind == Kind::Bad {
        env.count(Counter::BadHeader);
    }
    work.key = work.headers.key();
    kind
}

/// A packet that arrives.
#[inline(always)]
pub fn ingress<P: Packet, E: Table + Flows + Node>(
    packet: &mut P,
    env: &E,
    work: &mut Work,
    link: Link,
) -> Stage {
    match classify(packet, env, work) {
        Kind::Transport => {}
        Kind::IcmpError => return Stage::Icmp,
        Kind::Tunnel if matches!(link, Link::Uplink) => return Stage::Unwrap,
        _ => return PASS,
    }
    work.known = false;
    if env.flow_into(&work.key, &mut work.flow) {
        work.known = true;
        work.now_s = env.now_s();
        if flow::is_left(work) {
            flow::end(env, work);
            work.known = false;
            return if frontend(env, work, link) { Stage::Open } else { PASS };
        }
        if work.flow.flags & (flow_flag::REPLY | flow_flag::SNAT) == flow_flag::REPLY {
            return if matches!(link, Link::Pod) { door::leave(packet, env, work) } else { PASS };
        }
        // The flags are read again behind each call: with what it knew of them before, a verifier would follow the call once
        // for every case.
        if stands(env, work, link) && flow::note(env, work) {
            if work.flow.flags & flow_flag::TUNNEL != 0 {
                return tunnel::wrap(packet, env, work);
            }
            let snat = work.flow.flags & flow_flag::SNAT != 0;
            return if snat { travel(packet, env, work) } else { deliver(packet, env, work) };
        }
        if work.flow.flags & flow_flag::REPLY != 0 {
            return PASS;
        }
    }
    if frontend(env, work, link) {
        return Stage::Open;
    }
    if work.headers.proto != PROTO_TCP || work.headers.opens() {
        flow::make_way(env, work);
    }
    PASS
}

/// A packet that leaves. Gives a backend's answer the address and port that the client asked.
#[inline(always)]
pub fn egress<P: Packet, E: Table + Flows>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    match classify(packet, env, work) {
        Kind::Transport => {}
        Kind::IcmpError => return Stage::Icmp,
        _ => return PASS,
    }
    if answered(env, work) { finish(packet, env, work) } else { PASS }
}

/// A packet that a pod sends, whose sockets need no help: an answer that goes past the stack, or it is nobody's business.
#[inline(always)]
pub fn from_pod<P: Packet, E: Table + Flows + Node>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    match classify(packet, env, work) {
        Kind::Transport => {}
        Kind::IcmpError => return Stage::Icmp,
        _ => return PASS,
    }
    if answered(env, work) { door::leave(packet, env, work) } else { PASS }
}

/// Whether the packet is a backend's answer that is translated for a client who is known to it; `work` has its flow then.
#[inline(always)]
fn answered<E: Flows>(env: &E, work: &mut Work) -> bool {
    if !env.flow_into(&work.key, &mut work.flow) {
        return false;
    }
    work.now_s = env.now_s();
    if flow::is_left(work) {
        flow::end(env, work);
        return false;
    }
    work.flow.flags & (flow_flag::REPLY | flow_flag::SNAT) == flow_flag::REPLY
        && !flow::is_expired(&work.flow, work.headers.proto, work.now_s)
        && flow::note(env, work)
}

/// Translates a packet for a backend that knows its client.
#[inline(always)]
pub(crate) fn deliver<P: Packet, E: Table + Node>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    let way = match door::passage(packet, env, work) {
        Passage::Stack => Verdict::Pass,
        Passage::Enter => Verdict::Enter,
        Passage::Around => return travel(packet, env, work),
        Passage::Unknown => return PASS,
    };
    translate(packet, env, work, way)
}

/// Translates a packet that the stack takes on.
#[inline(always)]
pub(crate) fn finish<P: Packet, E: Table>(packet: &mut P, env: &E, work: &Work) -> Stage {
    translate(packet, env, work, Verdict::Pass)
}

/// Translates a packet for the way that the verdict says: past the stack it loses a hop.
#[inline(always)]
pub(crate) fn translate<P: Packet, E: Table>(packet: &mut P, env: &E, work: &Work, way: Verdict) -> Stage {
    let passes = !matches!(way, Verdict::Pass);
    if !packet::rewrite(packet, &work.headers, &flow::translated(&work.flow), passes) {
        env.count(Counter::RewriteFailed);
        return DROP;
    }
    let reply = work.flow.flags & flow_flag::REPLY != 0;
    env.count(if reply { Counter::Replied } else { Counter::Forwarded });
    Stage::Done(way)
}

/// Translates a packet that goes on past the stack.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(crate) fn travel<P: Packet, E: Table + Node>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    let (headers, flow) = (&work.headers, &work.flow);
    if headers.hops <= 1 {
        env.count(Counter::Expired);
        return Stage::Answer(Answer::HopLimit);
    }
    match env.route(&journey(packet, headers, flow)) {
        Way::To(route) => work.route = route,
        Way::TooBig(mtu) => {
            env.count(Counter::TooBig);
            env.tell(work, Counter::TooBig);
            return Stage::Answer(Answer::TooBig(mtu));
        }
        Way::None => return drop(env, work, Counter::NoRoute),
        Way::Later => return PASS,
    }
    translate(packet, env, work, Verdict::Redirect)
}

/// The way of a packet as its flow translates it.
#[inline(always)]
pub(crate) fn journey<P: Packet>(packet: &P, headers: &Headers, flow: &Flow) -> Journey {
    Journey {
        src: flow.src,
        dst: flow.dst,
        sport: flow.sport,
        dport: flow.dport,
        proto: headers.proto,
        v6: headers.v6,
        len: wire_len(packet, headers),
    }
}

/// Bytes of the largest IP packet that the buffer will be.
#[inline(always)]
pub(crate) fn wire_len<P: Packet>(packet: &P, headers: &Headers) -> u32 {
    let segment = packet.segment_len();
    if segment == 0 {
        return packet.size().saturating_sub(ETHER_LEN);
    }
    let header = if headers.proto == PROTO_TCP {
        packet.load::<1>(headers.l4 + 12).map_or(20, |[offset]| u32::from(offset >> 4) * 4)
    } else {
        8
    };
    headers.l4 - ETHER_LEN + header + segment
}

/// Finds the frontend that a packet is for, if it is balanced when it arrives at such a device.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(crate) fn frontend<E: Table>(env: &E, work: &mut Work, link: Link) -> bool {
    let headers = &work.headers;
    let asked = Destination { addr: headers.dst, port: headers.dport, proto: headers.proto };
    let wanted = match link {
        Link::Uplink => OUTSIDE,
        Link::Pod => 0,
        Link::Tunnel => frontend_flag::DSR,
    };
    let fits = |found: &Frontend| wanted == 0 || found.flags & wanted != 0;
    if let Some(found) = resolve::frontend(env, &asked) {
        work.frontend = found;
        return fits(&found);
    }
    if !resolve::may_be_wildcard(env, headers.dport) {
        return false;
    }
    // A NodePort is reached by an address of the node that was asked, which is the one that sends the packet on.
    let of_node = match link {
        Link::Tunnel => work.outer[0] == headers.dst,
        _ => env.node_flags(&headers.dst) & node_addr_flag::NODE_PORTS != 0,
    };
    if !of_node {
        return false;
    }
    match resolve::node_port_frontend(env, &asked) {
        Some(found) => {
            work.frontend = found;
            fits(&found)
        }
        None => false,
    }
}

/// Whether the flow in `work` may go on.
#[inline(always)]
fn stands<E: Table>(env: &E, work: &mut Work, link: Link) -> bool {
    if work.flow.flags & flow_flag::REPLY != 0 {
        return !flow::is_expired(&work.flow, work.headers.proto, work.now_s);
    }
    flow::keeps(env, work) && (work.flow.flags & flow_flag::TUNNEL == 0 || is_direct(env, work, link))
}

/// Whether a flow of direct return may go on so: a connection under way does, anything else only while its service is
/// direct, since the backend's node may forget it as soon as it is not.
#[inline(always)]
fn is_direct<E: Table>(env: &E, work: &mut Work, link: Link) -> bool {
    let under_way = work.headers.proto == PROTO_TCP && !work.headers.opens();
    under_way || frontend(env, work, link) && work.frontend.flags & frontend_flag::DSR != 0
}

/// Kinds of frontends that are reached from outside: all but ClusterIP.
pub(crate) const OUTSIDE: u32 = frontend_flag::NODE_PORT
    | frontend_flag::LOAD_BALANCER
    | frontend_flag::EXTERNAL_IP
    | frontend_flag::HOST_PORT;

/// Takes a packet the whole way, where one program may be long.
#[inline(always)]
pub fn run<P: Packet, E: Table + Affinities + Flows + Node>(
    packet: &mut P,
    env: &E,
    work: &mut Work,
    side: Side,
    link: Link,
) -> Verdict {
    if quick::passes(packet, env, side) { Verdict::Pass } else { run_long(packet, env, work, side, link) }
}

/// The same for [`from_pod`].
#[inline(always)]
pub fn run_answer<P: Packet, E: Table + Affinities + Flows + Node>(
    packet: &mut P,
    env: &E,
    work: &mut Work,
) -> Verdict {
    let stage = from_pod(packet, env, work);
    go_on(packet, env, work, (Side::Ingress, Link::Pod), stage)
}

/// [`run`] without the short way.
#[inline(always)]
pub fn run_long<P: Packet, E: Table + Affinities + Flows + Node>(
    packet: &mut P,
    env: &E,
    work: &mut Work,
    side: Side,
    link: Link,
) -> Verdict {
    let stage = match side {
        Side::Ingress => ingress(packet, env, work, link),
        Side::Egress => egress(packet, env, work),
    };
    go_on(packet, env, work, (side, link), stage)
}

#[inline(always)]
fn go_on<P: Packet, E: Table + Affinities + Flows + Node>(
    packet: &mut P,
    env: &E,
    work: &mut Work,
    (side, mut link): (Side, Link),
    mut stage: Stage,
) -> Verdict {
    let mut opened = false;
    loop {
        let wrapped = matches!(link, Link::Tunnel);
        stage = match stage {
            Stage::Done(verdict) => return verdict,
            Stage::Open if opened => {
                // The flow that was written is gone again.
                env.count(Counter::FlowFull);
                return Verdict::Drop;
            }
            Stage::Open => {
                opened = true;
                work.now_s = env.now_s();
                open::open(packet, env, work, link)
            }
            Stage::Unwrap => {
                link = Link::Tunnel;
                tunnel::unwrap(packet, env, work)
            }
            Stage::Again if wrapped => tunnel::unwrap(packet, env, work),
            Stage::Again => ingress(packet, env, work, link),
            Stage::Icmp => icmp::error(packet, env, work, side, link),
            Stage::Answer(answer) => Stage::Done(answer::give(packet, env, work, || answer)),
        }
    }
}
