//! Services for packets that arrive at a device: to a backend and back. Invariant: a packet is rewritten only by a flow
//! both of whose entries stand, so an answer is never sent from an address that the client did not ask.
//!
//! Where what is translated: the client's packets at ingress of the device they arrive on. Answers of backends that
//! know the client's own address at egress of the device towards the client, after routing, since nothing before it
//! may take a service's address for a source. Answers to this node, of masqueraded connections, at ingress; they are
//! redirected, as are masqueraded packets on their way, past a stack that would drop packets from its own address.
//! Packets of services with direct return are not translated here but at their backend's node ([`tunnel`]).

use crate::affinity;
use crate::answer::{self, Answer};
use crate::env::{Affinities, Claim, Flows, Journey, Node, Packet, Route, Table, Way};
use crate::flow;
use crate::icmp::{self, Quote};
use crate::packet::{self, ETHER_LEN, Headers, Kind};
use crate::quick;
use crate::resolve::{self, Destination};
use crate::select::{self, Scope};
use crate::tunnel::{self, Within};
use sheave_ebpf_abi::{
    Address, Backend, Config, Counter, Flow, FlowKey, Fragment, FragmentKey, Frontend, MemberKey, PROTO_TCP,
    Plain as _, config_flag, flow_flag, frontend_flag, member_flag, node_addr_flag,
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
    /// It is for a service and belongs to no flow: [`open`] comes next.
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
            other_key: FlowKey::zeroed(),
            other: Flow::zeroed(),
            frontend: Frontend::zeroed(),
            route: Route { device: 0, next_hop: Address::zeroed(), link: [0; 12], has_link: false },
            quote: Quote::NOTHING,
            now_s: 0,
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

/// Backends tried while the table changes.
const PICKS: u32 = 3;
/// Ports tried for a masqueraded connection, the client's own among them.
const PORTS: u32 = 24;
/// How many of them before the second range is tried.
const PORTS_FIRST: u32 = 14;

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
    let mut reply = false;
    if let Some(flow) = env.flow(&work.key) {
        work.flow = flow;
        work.now_s = env.now_s();
        if flow::is_left(work) {
            flow::end(env, work);
            return if frontend(env, work, link) { Stage::Open } else { PASS };
        }
        reply = flow.flags & flow_flag::REPLY != 0;
        let snat = flow.flags & flow_flag::SNAT != 0;
        if reply && !snat {
            return PASS;
        }
        let stands = if reply {
            !flow::is_expired(&flow, work.headers.proto, work.now_s)
        } else {
            flow::keeps(env, work) && (flow.flags & flow_flag::TUNNEL == 0 || is_direct(env, work, link))
        };
        if stands && flow::note(env, work) {
            if flow.flags & flow_flag::TUNNEL != 0 {
                return tunnel::wrap(packet, env, work);
            }
            return if snat { travel(packet, env, work) } else { finish(packet, env, work) };
        }
    }
    if reply {
        return PASS;
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
    match env.flow(&work.key) {
        Some(flow) => work.flow = flow,
        None => return PASS,
    }
    work.now_s = env.now_s();
    if flow::is_left(work) {
        flow::end(env, work);
        return PASS;
    }
    if work.flow.flags & (flow_flag::REPLY | flow_flag::SNAT) != flow_flag::REPLY
        || flow::is_expired(&work.flow, work.headers.proto, work.now_s)
        || !flow::note(env, work)
    {
        return PASS;
    }
    finish(packet, env, work)
}

/// Translates a packet that the stack takes on.
#[inline(always)]
pub(crate) fn finish<P: Packet, E: Table>(packet: &mut P, env: &E, work: &Work) -> Stage {
    if !packet::rewrite(packet, &work.headers, &flow::translated(&work.flow)) {
        env.count(Counter::RewriteFailed);
        return DROP;
    }
    let reply = work.flow.flags & flow_flag::REPLY != 0;
    env.count(if reply { Counter::Replied } else { Counter::Forwarded });
    PASS
}

/// Translates a packet that goes on past the stack.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(crate) fn travel<P: Packet, E: Table + Node>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    let (headers, flow) = (&work.headers, &work.flow);
    if headers.hops <= 1 {
        env.count(Counter::Expired);
        return Stage::Answer(Answer::HopLimit);
    }
    let journey = Journey {
        src: flow.src,
        dst: flow.dst,
        sport: flow.sport,
        dport: flow.dport,
        proto: headers.proto,
        v6: headers.v6,
        len: wire_len(packet, headers),
    };
    match env.route(&journey) {
        Way::To(route) => work.route = route,
        Way::TooBig(mtu) => {
            env.count(Counter::TooBig);
            env.tell(work, Counter::TooBig);
            return Stage::Answer(Answer::TooBig(mtu));
        }
        Way::None => return drop(env, work, Counter::NoRoute),
        Way::Later => return PASS,
    }
    match finish(packet, env, work) {
        PASS => Stage::Done(redirect(packet, env, &work.headers)),
        stage => stage,
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

/// Lets a translated packet out of another device.
#[inline(always)]
pub fn redirect<P: Packet, E: Table>(packet: &mut P, env: &E, headers: &Headers) -> Verdict {
    if packet::pass_hop(packet, headers.v6, headers.proto, headers.hops) {
        Verdict::Redirect
    } else {
        env.count(Counter::RewriteFailed);
        Verdict::Drop
    }
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

/// Whether a flow of direct return may go on so: a connection under way does, anything else only while its service is
/// direct, since the backend's node may forget it as soon as it is not.
#[inline(always)]
fn is_direct<E: Table>(env: &E, work: &mut Work, link: Link) -> bool {
    let under_way = work.headers.proto == PROTO_TCP && !work.headers.opens();
    under_way || frontend(env, work, link) && work.frontend.flags & frontend_flag::DSR != 0
}

/// Kinds of frontends that are reached from outside: all but ClusterIP.
const OUTSIDE: u32 = frontend_flag::NODE_PORT
    | frontend_flag::LOAD_BALANCER
    | frontend_flag::EXTERNAL_IP
    | frontend_flag::HOST_PORT;

/// The endpoints that a packet may go to. What comes from a pod is internal: the traffic policy for what comes from
/// outside does not concern it, and the internal one concerns cluster IPs only.
#[inline(always)]
fn scope(frontend: &Frontend, link: Link) -> Scope {
    let flag = match link {
        Link::Uplink | Link::Tunnel => frontend_flag::EXTERNAL_LOCAL,
        Link::Pod if frontend.flags & OUTSIDE == 0 => frontend_flag::INTERNAL_LOCAL,
        Link::Pod => 0,
    };
    if frontend.flags & flag != 0 { Scope::Local } else { Scope::Cluster }
}

/// Whether a data plane that was replaced still has connections.
#[inline(always)]
fn leaves_strays<E: Table>(env: &E) -> bool {
    env.config().is_some_and(|config| config.flags & config_flag::LEAVE_STRAYS != 0)
}

/// A packet for a service that belongs to no flow: finds a backend, writes the flow's entries, and translates what needs no
/// other way than the stack's. What `work` tells of the packet is not asked for: while the programs are replaced it may be
/// another one's.
#[inline(always)]
pub fn open<P: Packet, E: Table + Affinities + Flows + Node>(
    packet: &mut P,
    env: &E,
    work: &mut Work,
    link: Link,
) -> Stage {
    let wrapped = matches!(link, Link::Tunnel);
    if wrapped && !tunnel::is_one(packet, work) {
        return PASS;
    }
    // A reset opens nothing.
    if classify(&Within::new(packet, wrapped), env, work) != Kind::Transport
        || work.headers.is_reset()
        || !frontend(env, work, link)
    {
        return PASS;
    }
    if work.frontend.flags & frontend_flag::SOURCE_RANGES != 0
        && !matches!(link, Link::Pod)
        && !env.in_source_range(work.frontend.service, &work.headers.src)
    {
        return drop(env, work, Counter::SourceRefused);
    }
    if work.headers.proto == PROTO_TCP && !work.headers.opens() && leaves_strays(env) {
        return PASS;
    }
    let scope = scope(&work.frontend, link);
    if wrapped {
        if !tunnel::name(env, work) {
            return PASS;
        }
        // The stack would not deliver it.
        if env.is_node_address(&work.headers.src) {
            return drop(env, work, Counter::TunnelRefused);
        }
    } else if select::range(&work.frontend, scope).is_none() {
        if work.frontend.slot_count() != 0 {
            return drop(env, work, Counter::NoLocalEndpoints);
        }
        env.count(Counter::Rejected);
        env.tell(work, Counter::Rejected);
        return Stage::Answer(Answer::Refused);
    }
    work.now_s = env.now_s();
    if let Some(old) = env.flow(&work.key) {
        work.flow = old;
        // Should there be no room for the new one, nothing may be left of it that has no other half.
        flow::end(env, work);
    }
    let placed = match find(env, work, scope, link) {
        Ok(Source::Client) => Ok(()),
        Ok(other) => disguise(env, work, other),
        Err(counter) => Err(counter),
    };
    if let Err(counter) = placed {
        return drop(env, work, counter);
    }
    flow::mark(env, &work.key, work.now_s);
    if !env.replace(&work.key, &work.flow) {
        return drop(env, work, Counter::FlowFull);
    }
    env.count(Counter::Opened);
    env.tell(work, Counter::Opened);
    if wrapped || work.flow.flags & (flow_flag::SNAT | flow_flag::TUNNEL) != 0 || work.headers.is_fin() {
        return Stage::Again;
    }
    begin(packet, env, work)
}

/// Translates the first packet of a flow, of which [`flow::note`] would note nothing.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn begin<P: Packet, E: Table>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    finish(packet, env, work)
}

/// The slot for a packet: by the service's Maglev table at the first attempt, if it has one, else by chance, which is
/// the same for every packet of a connection.
#[inline(always)]
fn pick<E: Table>(env: &E, work: &Work, scope: Scope, attempt: u32, entropy: u32) -> Option<u32> {
    let (headers, frontend) = (&work.headers, &work.frontend);
    if frontend.maglev != 0 && attempt == 0 && matches!(scope, Scope::Cluster) {
        let seed = env.config().map_or(0, |config| config.maglev_seed);
        let hash = select::client_hash(
            &headers.src,
            headers.sport,
            &headers.dst,
            headers.dport,
            headers.proto,
            seed,
            frontend.affinity_timeout_s != 0,
        );
        if let Some(index) = select::maglev_pick(env, frontend, hash) {
            return Some(index);
        }
    }
    Some(select::pick(select::range(frontend, scope)?, entropy))
}

/// The backend for a packet, and whether it is on this node: the one that its client is bound to, at the first attempt,
/// where the service has session affinity. `None` when what was read does not fit together.
#[inline(always)]
fn choose<E: Table + Affinities>(
    env: &E,
    work: &Work,
    scope: Scope,
    attempt: u32,
    entropy: u32,
) -> Option<(Backend, bool)> {
    let frontend = &work.frontend;
    let mut local = None;
    let mut by_chance = || {
        let index = pick(env, work, scope, attempt, entropy)?;
        local = Some(select::is_local(frontend, index));
        resolve::backend_at(env, frontend.service, index)
    };
    if frontend.affinity_timeout_s == 0 || attempt != 0 {
        let backend = by_chance()?;
        return Some((backend, local?));
    }
    let key = affinity::address_key(work.headers.src, frontend.service, scope);
    let backend = affinity::choose(env, &key, frontend, scope, work.now_s, by_chance)?;
    // Two connections of a client at once may have picked apart, and the first one is what holds.
    let member = MemberKey { service: frontend.service, backend: backend.id };
    Some((backend, env.member(&member).is_some_and(|flags| flags & member_flag::LOCAL != 0)))
}

/// What a backend sees as its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// The client.
    Client,
    /// The client's address and a port of our choice.
    ClientAddress,
    /// An address of this node and a port of our choice.
    Node,
}

/// Sees to the client's entry: one with a backend that was picked already, or with one that is picked now. Tells what its
/// source is to be, which it has already only where that is the client.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn find<E: Table + Affinities + Flows + Node>(
    env: &E,
    work: &mut Work,
    scope: Scope,
    link: Link,
) -> Result<Source, Counter> {
    if matches!(link, Link::Tunnel) {
        return match resolve::backend_at(env, work.frontend.service, work.slot) {
            Some(backend) if backend.addr == work.outer[1] => {
                assign(work, &backend);
                place(env, work, true, link)
            }
            _ => Err(Counter::StaleSlot),
        };
    }
    let mut entropy = tuple_hash(&work.headers);
    let mut attempt = 0;
    while attempt < PICKS {
        let chosen = choose(env, work, scope, attempt, entropy);
        attempt += 1;
        entropy = select::mix(u64::from(entropy) + 1);
        let Some((backend, local)) = chosen else { continue };
        assign(work, &backend);
        return place(env, work, local, link);
    }
    Err(Counter::StaleSlot)
}

/// Makes the client's entry one that leads to the backend, its source kept.
#[inline(always)]
fn assign(work: &mut Work, backend: &Backend) {
    let headers = &work.headers;
    work.flow = Flow {
        src: headers.src,
        dst: backend.addr,
        sport: headers.sport,
        dport: backend.port,
        backend: backend.id,
        service: work.frontend.service,
        seen_s: work.now_s,
        flags: 0,
        pad: 0,
    };
}

/// Takes the tuple of the answers of the flow in `work` when its source is the client and they come by this node. Tells
/// what the source is to be.
#[inline(always)]
fn place<E: Table + Flows>(env: &E, work: &mut Work, local: bool, link: Link) -> Result<Source, Counter> {
    if !local
        && work.frontend.flags & frontend_flag::DSR != 0
        && matches!(link, Link::Uplink)
        && !must_masquerade(env, work, true, link)
    {
        work.flow.flags = flow_flag::TUNNEL;
        return Ok(Source::Client);
    }
    // The stack would not deliver a packet from this node's address to this node.
    let here = env.is_node_address(&work.flow.dst);
    if !here && must_masquerade(env, work, local, link) {
        return Ok(Source::Node);
    }
    match flow::take(env, work, true) {
        Claim::Stored => Ok(Source::Client),
        // The same client port through another address of a service: a port of ours tells them apart.
        Claim::Taken => Ok(Source::ClientAddress),
        Claim::Refused => Err(Counter::FlowFull),
    }
}

#[inline(always)]
fn must_masquerade<E: Table>(env: &E, work: &Work, local: bool, link: Link) -> bool {
    let everything = || env.config().is_some_and(|config| config.flags & config_flag::MASQUERADE_ALL != 0);
    (!local && matches!(link, Link::Uplink))
        || work.flow.dst == work.headers.src
        || work.frontend.flags & frontend_flag::MASQUERADE_ALL != 0
        || everything()
}

/// The address that this node sends a packet on with: the one that the client asked when it is this node's, else the
/// node's first.
#[inline(always)]
pub(crate) fn source<E: Table>(env: &E, headers: &Headers) -> Option<Address> {
    if env.is_node_address(&headers.dst) {
        return Some(headers.dst);
    }
    let config = env.config()?;
    let first = if headers.v6 { config.node6 } else { config.node4 };
    if first.words[3] == 0 && first.words[0] == 0 { None } else { Some(first) }
}

/// Gives the client's entry another source: an address of this node, or only another port, that nobody has towards the
/// backend. Ports are tried in an order that the tuple gives, so that two processors with the same packet take the same one.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn disguise<E: Table + Flows + Node>(env: &E, work: &mut Work, as_whom: Source) -> Result<(), Counter> {
    let Some(config) = env.config() else { return Err(Counter::NoNodeAddress) };
    let as_node = as_whom == Source::Node;
    if as_node {
        match source(env, &work.headers) {
            Some(src) => work.flow.src = src,
            None => return Err(Counter::NoNodeAddress),
        }
        work.flow.flags |= flow_flag::SNAT;
    }
    let mut seed = tuple_hash(&work.headers);
    // The client's own port comes first, unless that is what is taken.
    let mut attempt = u32::from(!as_node);
    while attempt < PORTS {
        if attempt != 0 {
            seed = select::mix(u64::from(seed) << 8 | u64::from(attempt));
            work.flow.sport = port(&config, attempt, seed);
        } else if is_local(&config, work.flow.sport) {
            // The kernel may give it to a socket at any time.
            work.flow.sport = 0;
        }
        attempt += 1;
        flow::turn(work);
        if work.flow.sport == 0 || as_node && env.has_socket(&work.other_key) {
            continue;
        }
        match flow::take(env, work, false) {
            Claim::Stored => return Ok(()),
            Claim::Taken => {}
            Claim::Refused => return Err(Counter::FlowFull),
        }
    }
    Err(Counter::PortsExhausted)
}

/// The first port of those in `config` that a flow is given whose client keeps its address, in host order.
#[cfg(not(target_arch = "bpf"))]
pub fn first_other_port(config: &Config, headers: &Headers) -> u16 {
    u16::from_be(port(config, 1, select::mix(u64::from(tuple_hash(headers)) << 8 | 1)))
}

/// Whether the port, in network order, is one that the kernel gives to this node's sockets.
#[inline(always)]
fn is_local(config: &Config, port: u16) -> bool {
    let port = u16::from_be(port);
    config.local_port_min <= port && port <= config.local_port_max
}

/// A port for masquerading in network order; 0 when the range is empty.
#[inline(always)]
fn port(config: &Config, attempt: u32, seed: u32) -> u16 {
    let (min, max) = if attempt < PORTS_FIRST || config.snat_more_min == 0 {
        (config.snat_port_min, config.snat_port_max)
    } else {
        (config.snat_more_min, config.snat_more_max)
    };
    if min == 0 || max < min {
        return 0;
    }
    let count = u32::from(max) - u32::from(min) + 1;
    (min + ((u64::from(seed) * u64::from(count)) >> 32) as u16).to_be()
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

/// [`run`] without the short way.
#[inline(always)]
pub fn run_long<P: Packet, E: Table + Affinities + Flows + Node>(
    packet: &mut P,
    env: &E,
    work: &mut Work,
    side: Side,
    link: Link,
) -> Verdict {
    let mut link = link;
    let mut opened = false;
    let mut stage = match side {
        Side::Ingress => ingress(packet, env, work, link),
        Side::Egress => egress(packet, env, work),
    };
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
                open(packet, env, work, link)
            }
            Stage::Unwrap => {
                link = Link::Tunnel;
                tunnel::unwrap(packet, env, work)
            }
            Stage::Again if wrapped => tunnel::unwrap(packet, env, work),
            Stage::Again => ingress(packet, env, work, link),
            Stage::Icmp => icmp::error(packet, env, work, side, wrapped),
            Stage::Answer(answer) => Stage::Done(answer::give(packet, env, work, answer)),
        }
    }
}
