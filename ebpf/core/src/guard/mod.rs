//! Policies at pods' links. Invariant: a packet passes only where its flow was judged in the present epoch, in the
//! direction in which it was opened, by the rules of both of its ends; an answer passes because of its flow, never by
//! itself.
//!
//! One entry a flow, found from both directions because its ends are in order. A flow is judged when its first packet
//! is seen, and again with its next packet after the epoch was raised. One that is no longer allowed stays, marked as
//! cut: forgotten, its answers would be taken for the beginning of a flow the other way. A packet that opens a TCP
//! connection is always judged for itself.
//!
//! A flow goes past the stack once packets of both directions were seen, with the very same tuple, where they come
//! from and where they go to: nothing on the way translates it. It has to be a second old, too, so that short
//! connections leave the stack's own tracking as they found it. Both directions stay in the stack where one of them
//! has to: to a pod whose device has a queue, which limits what the pod receives, and which a packet that is handed to
//! the peer would never see. What leaves the node is sent by its device, whose queue it waits in.

pub mod parse;
#[cfg(test)]
mod tests;

use crate::env::Packet;
use crate::packet::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};
use parse::{Kind, NOTHING, Seen};
use sheave_ebpf_abi::{
    Address, Endpoint, FlowKey, NetConfig, NetCounter, NetFlow, PROTO_TCP, VerdictKey, endpoint_flag,
    flow_timeout_s, net_config_flag, net_flow_flag as bit, ports,
};

/// Seconds that a flow goes through the stack before it goes past it.
pub const FAST_AFTER_S: u32 = 1;

/// What the guard knows and remembers.
pub trait World {
    /// What every packet asks first.
    fn config(&self) -> Option<NetConfig>;
    /// Who has the address.
    fn endpoint(&self, address: &Address) -> Option<Endpoint>;
    /// The identity of an address that is no endpoint's.
    fn range(&self, address: &Address) -> u32;
    /// The list of ports that a set allows an identity.
    fn verdict(&self, key: &VerdictKey) -> Option<u32>;
    /// Whether the list has the port (network order) of the protocol.
    fn has_port(&self, ports: u32, proto: u8, port: u16) -> bool;
    /// The flow with this key.
    fn flow(&self, key: &FlowKey) -> Option<NetFlow>;
    /// Remembers a flow; false when there is no room.
    fn keep(&self, key: &FlowKey, flow: &NetFlow) -> bool;
    /// Seconds of the kernel's monotonic clock.
    fn now_s(&self) -> u32;
    /// Counts a reason.
    fn count(&self, counter: NetCounter);
}

/// Where a packet is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Coming from the pod behind the device.
    FromPod,
    /// Going to the pod behind the device.
    ToPod,
    /// Arriving at a device that leads out of the node.
    Arriving,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The stack has it.
    Pass,
    /// Nobody has it.
    Drop,
    /// The pod behind this device has it, past the stack.
    Peer(u32),
    /// It leaves the node, past the stack, where a route leads it; the stack has it where none does.
    Out,
}

/// A packet's flow as it is looked up and judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// The packet.
    pub seen: Seen,
    /// Key of its flow.
    pub key: FlowKey,
    /// Its flow.
    pub flow: NetFlow,
}

impl Work {
    /// Of no packet.
    pub const NOTHING: Self = Self {
        seen: NOTHING,
        key: FlowKey {
            src: Address { words: [0; 4] },
            dst: Address { words: [0; 4] },
            sport: 0,
            dport: 0,
            proto: 0,
            pad: [0; 3],
        },
        flow: NetFlow { epoch: 0, seen_s: 0, opened_s: 0, low_device: 0, high_device: 0, flags: 0 },
    };
}

/// Judges the packet in `packet` that is seen at `place` of `device`.
#[inline(always)]
pub fn pass<W: World, P: Packet>(
    world: &W,
    packet: &P,
    work: &mut Work,
    place: Place,
    device: u32,
) -> Verdict {
    let Some(config) = world.config() else { return Verdict::Pass };
    match parse::parse(packet, &mut work.seen) {
        Kind::Flow => {}
        Kind::Link | Kind::Later => return Verdict::Pass,
        Kind::Error => return error(world, work, place),
        Kind::Bad => {
            if place == Place::Arriving {
                return Verdict::Pass;
            }
            world.count(NetCounter::BadHeader);
            return Verdict::Drop;
        }
    }
    let low = key_of(&work.seen, &mut work.key);
    let now_s = world.now_s();
    let known = match world.flow(&work.key) {
        Some(flow) if !is_over(&flow, work.key.proto, now_s) => {
            work.flow = flow;
            true
        }
        _ => false,
    };
    if place == Place::Arriving {
        return if known { arriving(world, work, &config, low, now_s) } else { Verdict::Pass };
    }
    let opens = work.seen.proto == PROTO_TCP && work.seen.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
    if !known || opens {
        return open(world, work, &config, place, device, low, now_s);
    }
    if work.flow.epoch != config.epoch && !judge_again(world, work, &config) {
        return Verdict::Drop;
    }
    if work.flow.flags & bit::CUT != 0 {
        world.count(NetCounter::Cut);
        return Verdict::Drop;
    }
    if place == Place::FromPod && is_spoofed(&work.flow, low, device) {
        world.count(NetCounter::Spoofed);
        return Verdict::Drop;
    }
    note(world, work, place, device, low, now_s);
    if place == Place::FromPod { fast(world, work, &config, low, now_s, false) } else { Verdict::Pass }
}

/// An ICMP error about a packet of a flow that goes on may pass, whoever on the way sent it.
#[inline(always)]
fn error<W: World>(world: &W, work: &mut Work, place: Place) -> Verdict {
    if place == Place::Arriving {
        return Verdict::Pass;
    }
    key_of(&work.seen, &mut work.key);
    let known = world
        .flow(&work.key)
        .is_some_and(|flow| flow.flags & bit::CUT == 0 && !is_over(&flow, work.key.proto, world.now_s()));
    // Ends that nothing isolates are judged like any other packet between them; the quoted packet went the other way.
    let (src, dst) = (work.seen.dst, work.seen.src);
    if known || judge(world, &src, &dst, 0, 0).answer == Answer::Allowed {
        return Verdict::Pass;
    }
    world.count(NetCounter::DeniedIngress);
    Verdict::Drop
}

/// A packet of a known flow from outside the node: noted, and handed to its pod where the flow is direct.
#[inline(always)]
fn arriving<W: World>(world: &W, work: &mut Work, config: &NetConfig, low: bool, now_s: u32) -> Verdict {
    let (src, dst) = devices(&work.flow, low);
    // Whoever says outside that it is a pod of this node is not.
    if src != 0 || dst == 0 || work.flow.flags & bit::CUT != 0 || work.flow.epoch != config.epoch {
        return Verdict::Pass;
    }
    remember(world, work, if low { bit::LOW_FROM } else { bit::HIGH_FROM }, low, now_s);
    fast(world, work, config, low, now_s, true)
}

/// A flow begins, or a packet is seen whose flow nobody remembers.
#[inline(always)]
fn open<W: World>(
    world: &W,
    work: &mut Work,
    config: &NetConfig,
    place: Place,
    device: u32,
    low: bool,
    now_s: u32,
) -> Verdict {
    let seen = &work.seen;
    let judged = judge(world, &seen.src, &seen.dst, seen.proto, seen.dport);
    let refusal = match judged.answer {
        Answer::Allowed => None,
        Answer::DeniedEgress => Some(NetCounter::DeniedEgress),
        Answer::DeniedIngress => Some(NetCounter::DeniedIngress),
    };
    if let Some(refusal) = refusal {
        world.count(refusal);
        return Verdict::Drop;
    }
    let (low_device, high_device) =
        if low { (judged.src_device, judged.dst_device) } else { (judged.dst_device, judged.src_device) };
    let mut flags = if low { 0 } else { bit::BY_HIGH };
    if judged.slow {
        flags |= bit::SLOW;
    }
    work.flow =
        NetFlow { epoch: config.epoch, seen_s: now_s, opened_s: now_s, low_device, high_device, flags };
    if place == Place::FromPod && is_spoofed(&work.flow, low, device) {
        world.count(NetCounter::Spoofed);
        return Verdict::Drop;
    }
    work.flow.flags |= place_bit(&work.flow, place, device, low) | closing(seen.tcp_flags, low);
    if world.keep(&work.key, &work.flow) {
        world.count(NetCounter::Opened);
    } else {
        world.count(NetCounter::FlowFull);
    }
    Verdict::Pass
}

/// Judges a known flow by what is allowed now, as it was opened. False when the packet must go.
#[inline(always)]
fn judge_again<W: World>(world: &W, work: &mut Work, config: &NetConfig) -> bool {
    let by_high = work.flow.flags & bit::BY_HIGH != 0;
    let key = &work.key;
    let (src, dst, dport) =
        if by_high { (&key.dst, &key.src, key.sport) } else { (&key.src, &key.dst, key.dport) };
    let judged = judge(world, src, dst, key.proto, dport);
    work.flow.epoch = config.epoch;
    let allowed = judged.answer == Answer::Allowed;
    if allowed {
        let flags = work.flow.flags & !(bit::CUT | bit::SLOW);
        // Back in the stack, its tracking has to see the flow from now on.
        work.flow.flags = if judged.slow { (flags & !bit::FAST) | bit::SLOW } else { flags };
        let (low, high) = if by_high {
            (judged.dst_device, judged.src_device)
        } else {
            (judged.src_device, judged.dst_device)
        };
        work.flow.low_device = low;
        work.flow.high_device = high;
        world.count(NetCounter::Rejudged);
    } else {
        work.flow.flags |= bit::CUT;
        world.count(NetCounter::Cut);
    }
    // What could not be kept is judged with the next packet again.
    world.keep(&work.key, &work.flow);
    allowed
}

/// What policies say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Answer {
    /// It may pass.
    Allowed,
    /// Its sender may not send it.
    DeniedEgress,
    /// Its receiver may not receive it.
    DeniedIngress,
}

/// A judgement. Plain fields: the kernel's type information knows no enums with values in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judged {
    /// What policies say.
    pub answer: Answer,
    /// Device of the pod that sends; 0 when it is none of this node's.
    pub src_device: u32,
    /// Device of the pod that receives.
    pub dst_device: u32,
    /// The flow must stay in the stack.
    pub slow: bool,
}

const NOBODY: Endpoint = Endpoint { device: 0, identity: 0, ingress: 0, egress: 0, flags: 0 };

/// Judges what opens a flow: by what its sender may send and its receiver may receive. In a frame of its own, since it
/// is needed in many places.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn judge<W: World>(world: &W, src: &Address, dst: &Address, proto: u8, dport: u16) -> Judged {
    let from = world.endpoint(src);
    let to = world.endpoint(dst);
    let (src_end, dst_end) = (from.unwrap_or(NOBODY), to.unwrap_or(NOBODY));
    let flags = src_end.flags | dst_end.flags;
    let has_no_peer = |end: &Endpoint| end.device != 0 && end.flags & endpoint_flag::PEER == 0;
    let mut judged = Judged {
        answer: Answer::Allowed,
        src_device: src_end.device,
        dst_device: dst_end.device,
        slow: flags & (endpoint_flag::HOST | endpoint_flag::QUEUED) != 0
            || has_no_peer(&src_end)
            || has_no_peer(&dst_end),
    };
    if flags & endpoint_flag::HOST != 0 {
        return judged;
    }
    if src_end.egress != 0 {
        let identity = if to.is_some() { dst_end.identity } else { world.range(dst) };
        if !allows(world, src_end.egress, identity, proto, dport) {
            judged.answer = Answer::DeniedEgress;
            return judged;
        }
    }
    if dst_end.ingress != 0 {
        let identity = if from.is_some() { src_end.identity } else { world.range(src) };
        if !allows(world, dst_end.ingress, identity, proto, dport) {
            judged.answer = Answer::DeniedIngress;
        }
    }
    judged
}

/// Whether a set of rules allows an identity the port: one or two lookups of it, and one of the port.
#[inline(always)]
fn allows<W: World>(world: &W, set: u32, identity: u32, proto: u8, port: u16) -> bool {
    let found = match world.verdict(&VerdictKey { set, identity }) {
        None if identity != 0 => world.verdict(&VerdictKey { set, identity: 0 }),
        found => found,
    };
    match found {
        None | Some(ports::NONE) => false,
        Some(ports::ALL) => true,
        Some(list) => world.has_port(list, proto, port),
    }
}

/// Puts the ends in order into `key`; whether the packet's source is the low one.
#[inline(always)]
fn key_of(seen: &Seen, key: &mut FlowKey) -> bool {
    let low = is_low(seen);
    if low {
        key.src = seen.src;
        key.dst = seen.dst;
        key.sport = seen.sport;
        key.dport = seen.dport;
    } else {
        key.src = seen.dst;
        key.dst = seen.src;
        key.sport = seen.dport;
        key.dport = seen.sport;
    }
    key.proto = seen.proto;
    key.pad = [0; 3];
    low
}

#[inline(always)]
fn is_low(seen: &Seen) -> bool {
    let (s, d) = (&seen.src.words, &seen.dst.words);
    let mut at = 4;
    // From the last word, in which addresses of one network differ.
    while at > 0 {
        at -= 1;
        if s[at] != d[at] {
            return s[at] < d[at];
        }
    }
    seen.sport <= seen.dport
}

/// The devices of a packet's source and destination.
#[inline(always)]
fn devices(flow: &NetFlow, low: bool) -> (u32, u32) {
    if low { (flow.low_device, flow.high_device) } else { (flow.high_device, flow.low_device) }
}

/// Whether the source is known to be another device's.
#[inline(always)]
fn is_spoofed(flow: &NetFlow, low: bool, device: u32) -> bool {
    let (src, _) = devices(flow, low);
    src != 0 && src != device
}

/// Which of the four observations this one is.
#[inline(always)]
fn place_bit(flow: &NetFlow, place: Place, device: u32, low: bool) -> u32 {
    let (src, dst) = devices(flow, low);
    match place {
        Place::FromPod if src == device => {
            if low {
                bit::LOW_FROM
            } else {
                bit::HIGH_FROM
            }
        }
        Place::ToPod if dst == device => {
            if low {
                bit::LOW_TO
            } else {
                bit::HIGH_TO
            }
        }
        _ => 0,
    }
}

/// What the TCP flags say of a flow's end.
#[inline(always)]
fn closing(tcp_flags: u8, low: bool) -> u32 {
    let fin = if tcp_flags & TCP_FIN == 0 {
        0
    } else if low {
        bit::FIN_LOW
    } else {
        bit::FIN_HIGH
    };
    if tcp_flags & TCP_RST == 0 { fin } else { fin | bit::RESET }
}

#[inline(always)]
fn note<W: World>(world: &W, work: &mut Work, place: Place, device: u32, low: bool, now_s: u32) {
    let seen = place_bit(&work.flow, place, device, low);
    remember(world, work, seen, low, now_s);
}

/// Writes what a packet adds to its flow, when it adds something.
#[inline(always)]
fn remember<W: World>(world: &W, work: &mut Work, seen: u32, low: bool, now_s: u32) {
    let opener = (work.flow.flags & bit::BY_HIGH == 0) == low;
    let replied = if opener { 0 } else { bit::REPLIED };
    let flags = work.flow.flags | seen | replied | closing(work.seen.tcp_flags, low);
    if flags != work.flow.flags || work.flow.seen_s != now_s {
        work.flow.flags = flags;
        work.flow.seen_s = now_s;
        world.keep(&work.key, &work.flow);
    }
}

/// Whether an entry says nothing any more.
#[inline(always)]
fn is_over(flow: &NetFlow, proto: u8, now_s: u32) -> bool {
    let replied = flow.flags & bit::REPLIED != 0;
    let closed = flow.flags & bit::RESET != 0
        || flow.flags & (bit::FIN_LOW | bit::FIN_HIGH) == bit::FIN_LOW | bit::FIN_HIGH;
    let limit_s = if proto != PROTO_TCP {
        if replied { flow_timeout_s::DATAGRAM_REPLIED } else { flow_timeout_s::DATAGRAM }
    } else if closed {
        flow_timeout_s::TCP_CLOSING
    } else if replied {
        flow_timeout_s::TCP_ESTABLISHED
    } else {
        flow_timeout_s::TCP_OPENING
    };
    now_s.wrapping_sub(flow.seen_s) > limit_s
}

/// Whether the packet can go past the stack, and where to.
#[inline(always)]
fn fast<W: World>(
    world: &W,
    work: &mut Work,
    config: &NetConfig,
    low: bool,
    now_s: u32,
    arriving: bool,
) -> Verdict {
    let flow = &work.flow;
    let (_, dst) = devices(flow, low);
    let both = bit::LOW_FROM | bit::HIGH_FROM;
    let within = both | bit::LOW_TO | bit::HIGH_TO;
    let wanted = if arriving || dst == 0 { both } else { within };
    let ready = config.flags & net_config_flag::FAST != 0
        && flow.flags & bit::SLOW == 0
        && flow.flags & wanted == wanted
        && now_s.wrapping_sub(flow.opened_s) >= FAST_AFTER_S;
    // What ends a flow goes the way that the flow went: the stack's own tracking would take it for a stranger's.
    let unwanted = if flow.flags & bit::FAST == 0 { TCP_FIN | TCP_SYN | TCP_RST } else { TCP_SYN };
    let plain = work.seen.tcp_flags & unwanted == 0 && !work.seen.fragment && work.seen.hops > 1;
    if !ready || !plain {
        return Verdict::Pass;
    }
    if flow.flags & bit::FAST == 0 {
        work.flow.flags |= bit::FAST;
        world.keep(&work.key, &work.flow);
        world.count(NetCounter::FastFlow);
    }
    if dst == 0 { Verdict::Out } else { Verdict::Peer(dst) }
}
