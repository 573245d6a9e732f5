//! Packets of services to pods of this node past its stack, and their answers (eBPF host routing). Invariant: what goes one
//! way past the stack goes past it on the other way too, so that no connection tracking of the host sees half a connection.
//!
//! A door is a pod's device at which answers are translated as they come from the pod. Whether a connection goes by a door is
//! decided with its first packet; where the door is shut later it goes through the stack on both ways.

use crate::balance::{self, PASS, Stage, Work};
use crate::env::{Node, Packet, Table, Way};
use sheave_ebpf_abi::{config_flag, door_flag};

/// The place of the door that leads to the backend of the flow in `work`; 0 where none does.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(crate) fn find<P: Packet, E: Table + Node>(packet: &P, env: &E, work: &Work) -> u16 {
    if env.config().is_none_or(|config| config.flags & config_flag::HOST_ROUTING == 0) {
        return 0;
    }
    let Way::To(route) = env.route(&balance::journey(packet, &work.headers, &work.flow)) else { return 0 };
    let place = route.device as u16;
    match env.door(place) {
        Some(door) if door.device == route.device => place,
        _ => 0,
    }
}

/// How a client's packet gets to the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passage {
    /// By the stack: there is no door, or it was shut.
    Stack,
    /// Straight through the door, which `work` has for its route then.
    Enter,
    /// Past the stack, where the routing table says; who sent it may have to be told something.
    Around,
    /// Here nobody knows of doors.
    Unknown,
}

/// How the client's packet in `work` gets to the pod.
#[inline(always)]
pub(crate) fn passage<P: Packet, E: Node>(packet: &P, env: &E, work: &mut Work) -> Passage {
    if work.flow.door == 0 {
        return Passage::Stack;
    }
    let Some(door) = env.door(work.flow.door) else { return Passage::Unknown };
    if door.device == 0 {
        return Passage::Stack;
    }
    work.route.device = door.device;
    let enters = door.flags & door_flag::ENTER != 0
        && work.headers.hops > 1
        && balance::wire_len(packet, &work.headers) <= u32::from(door.mtu);
    if enters { Passage::Enter } else { Passage::Around }
}

/// Takes an answer that comes from a pod to its client, if that came by the pod's door.
#[inline(always)]
pub(crate) fn leave<P: Packet, E: Table + Node>(packet: &mut P, env: &E, work: &mut Work) -> Stage {
    if is_open(env, work.flow.door) { balance::travel(packet, env, work) } else { PASS }
}

/// Whether there is a door at a place.
#[inline(always)]
pub(crate) fn is_open<E: Node>(env: &E, place: u16) -> bool {
    place != 0 && env.door(place).is_some_and(|door| door.device != 0)
}
