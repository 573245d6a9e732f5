//! The first packet of a flow: its backend, its source and both entries. Invariant: a client's entry is written after that of
//! the answers, so that what goes out can come back.

use crate::affinity;
use crate::answer::Answer;
use crate::balance::{Link, OUTSIDE, PASS, Stage, Verdict, Work, drop, translate};
use crate::door::{self, Passage};
use crate::env::{Affinities, Claim, Flows, Node, Packet, Table};
use crate::flow;
use crate::packet::Headers;
use crate::resolve;
use crate::select::{self, Scope};
use crate::tunnel;
use sheave_ebpf_abi::{
    Address, Backend, Config, Counter, Flow, Frontend, MemberKey, PROTO_TCP, config_flag, flow_flag,
    frontend_flag, member_flag,
};

/// Ports tried for a masqueraded connection, the client's own among them.
const PORTS: u32 = 24;
/// How many of them before the second range is tried.
const PORTS_FIRST: u32 = 14;
/// Backends tried while the table changes.
const PICKS: u32 = 3;

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

/// A packet for a service that belongs to no flow, as `work` tells of it: finds a backend, writes the flow's entries, and
/// translates what the routing table need not see to. The caller has put the time there.
#[inline(always)]
pub fn open<P: Packet, E: Table + Affinities + Flows + Node>(
    packet: &mut P,
    env: &E,
    work: &mut Work,
    link: Link,
) -> Stage {
    let wrapped = matches!(link, Link::Tunnel);
    // A reset opens nothing.
    if work.headers.is_reset() {
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
    if work.known {
        // Should there be no room for the new one, nothing may be left of it that has no other half.
        flow::end(env, work);
    }
    let placed = match find(env, work, scope, link) {
        Ok(local) => {
            if local && matches!(link, Link::Uplink) {
                work.flow.door = door::find(packet, env, work);
            }
            match place(env, work, local, link) {
                Ok(Source::Client) => Ok(()),
                Ok(other) => disguise(env, work, other),
                Err(counter) => Err(counter),
            }
        }
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

/// Translates the first packet of a flow, of which [`flow::note`] would note nothing. One that the routing table must see to
/// goes the way of the later ones, which is not in this program too.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn begin<P: Packet, E: Table + Node>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    let way = match door::passage(packet, env, work) {
        Passage::Stack => Verdict::Pass,
        Passage::Enter => Verdict::Enter,
        Passage::Around | Passage::Unknown => return Stage::Again,
    };
    translate(packet, env, work, way)
}

/// A try to find a backend.
#[derive(Clone, Copy)]
struct Attempt {
    scope: Scope,
    /// Of several, the table changing meanwhile; what is bound or hashed is only asked for at the first.
    first: bool,
    /// Chance, the same for every packet of a connection.
    entropy: u32,
}

/// The slot for a packet: by the service's Maglev table if it has one, else by chance.
#[inline(always)]
fn pick<E: Table>(env: &E, work: &Work, attempt: Attempt) -> Option<u32> {
    let (headers, frontend) = (&work.headers, &work.frontend);
    if frontend.maglev != 0 && attempt.first && matches!(attempt.scope, Scope::Cluster) {
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
    Some(select::pick(select::range(frontend, attempt.scope)?, attempt.entropy))
}

/// The backend in a slot that is picked, and whether it is on this node.
#[inline(always)]
fn by_chance<E: Table>(env: &E, work: &Work, attempt: Attempt) -> Option<(Backend, bool)> {
    let index = pick(env, work, attempt)?;
    let backend = resolve::backend_at(env, work.frontend.service, index)?;
    Some((backend, select::is_local(&work.frontend, index)))
}

/// The backend for a packet, and whether it is on this node: the one that its client is bound to, at the first attempt,
/// where the service has session affinity. `None` when what was read does not fit together.
#[inline(always)]
fn choose<E: Table + Affinities>(env: &E, work: &Work, attempt: Attempt) -> Option<(Backend, bool)> {
    let frontend = &work.frontend;
    if frontend.affinity_timeout_s == 0 || !attempt.first {
        return by_chance(env, work, attempt);
    }
    let key = affinity::address_key(work.headers.src, frontend.service, attempt.scope);
    let anyone = || by_chance(env, work, attempt).map(|(backend, _)| backend);
    let backend = affinity::choose(env, &key, frontend, attempt.scope, work.now_s, anyone)?;
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

/// Makes the client's entry one that leads to a backend: one that was picked already, or one that is picked now. Tells
/// whether that is on this node.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn find<E: Table + Affinities>(env: &E, work: &mut Work, scope: Scope, link: Link) -> Result<bool, Counter> {
    if matches!(link, Link::Tunnel) {
        return match resolve::backend_at(env, work.frontend.service, work.slot) {
            Some(backend) if backend.addr == work.outer[1] => {
                assign(work, &backend);
                Ok(true)
            }
            _ => Err(Counter::StaleSlot),
        };
    }
    let mut entropy = tuple_hash(&work.headers);
    let mut tries = 0;
    while tries < PICKS {
        let chosen = choose(env, work, Attempt { scope, first: tries == 0, entropy });
        tries += 1;
        entropy = select::mix(u64::from(entropy) + 1);
        let Some((backend, local)) = chosen else { continue };
        assign(work, &backend);
        return Ok(local);
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
        door: 0,
    };
}

/// Takes the tuple of the answers of the flow in `work` when its source is the client and they come by this node. Tells
/// what the source is to be, which it is already only where that is the client.
#[cfg_attr(target_arch = "bpf", inline(never))]
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
    let here = work.flow.door == 0 && env.is_node_address(&work.flow.dst);
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
    let as_node = as_whom == Source::Node;
    if as_node {
        match source(env, &work.headers) {
            Some(src) => work.flow.src = src,
            None => return Err(Counter::NoNodeAddress),
        }
        work.flow.flags |= flow_flag::SNAT;
        work.flow.door = 0;
    }
    // The client's own port comes first, unless that is what is taken.
    let mut attempt = u32::from(!as_node);
    while attempt < PORTS {
        match env.try_port(work, attempt) {
            Claim::Stored => return Ok(()),
            Claim::Taken => attempt += 1,
            Claim::Refused => return Err(Counter::FlowFull),
        }
    }
    Err(Counter::PortsExhausted)
}

/// Takes the tuple of the answers of the flow in `work` with its source's port of this attempt, if nobody has that.
#[inline(always)]
pub fn try_port<E: Table + Flows + Node>(env: &E, work: &mut Work, attempt: u32) -> Claim {
    let Some(config) = env.config() else { return Claim::Refused };
    if attempt != 0 {
        let seed = select::mix(u64::from(tuple_hash(&work.headers)) << 8 | u64::from(attempt));
        work.flow.sport = port(&config, attempt, seed);
    } else if is_local(&config, work.flow.sport) {
        // The kernel may give it to a socket at any time.
        work.flow.sport = 0;
    }
    flow::turn(work);
    let as_node = work.flow.flags & flow_flag::SNAT != 0;
    if work.flow.sport == 0 || as_node && env.has_socket(&work.other_key) {
        return Claim::Taken;
    }
    flow::take(env, work, false)
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
