//! Golden frames of connections that go past the node's stack to a pod of this node and back.

use super::direct::wrapped;
use super::{
    ACK, Frame, Hook, Icmp, L4, Out, PAYLOAD, PORT_LOCAL, PORT_POD, PORT_SERVICE, Place, SYN, Step, answered,
    error, pass, redirect, reversed,
};
use std::vec::Vec;

/// Bytes of the largest IP packet that a door takes. What is larger is a matter for the routing table.
pub const DOOR_MTU: u16 = 1200;

/// How the node is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doors {
    /// Packets enter the pod's namespace at once.
    Entered,
    /// They go out of the pod's device, where others see them.
    Watched,
    /// There was a door when the connections began; now there is none.
    Shut,
}

/// A conversation; what goes through [`Doors::Shut`] was begun through another kind.
pub fn conversation(p: &Place, doors: Doors) -> Vec<Step> {
    let mut steps = Vec::new();
    for (l4, port) in [(L4::Tcp(SYN), 20_100), (L4::Tcp(ACK), 20_100), (L4::Udp, 20_101)] {
        let there = Frame::new((p.client, port), (p.node, PORT_LOCAL), l4);
        let dnat = Frame::new((p.client, port), (p.pod, PORT_POD), l4);
        steps.extend(translated(doors, there, dnat));
        let large = |frame| Frame { more: Some(usize::from(DOOR_MTU) - PAYLOAD.len()), ..frame };
        steps.push(way(doors, false, "larger than the door", large(there), large(dnat)));
        if l4 != L4::Tcp(SYN) {
            let straight = way(doors, true, "later, sent on by another node", there, dnat);
            steps.push(Step { input: wrapped(&there.bytes(), p.other_node, p.pod), ..straight });
        }
        if doors != Doors::Shut {
            let what = if p.v4() { [11, 0] } else { [3, 0] };
            steps.push(answered("last hop", Frame { hops: 1, ..there }, what, 0));
        }
        if l4 != L4::Tcp(SYN) {
            steps.extend(errors(p, doors, there, dnat));
        }
    }
    // What else a pod sends is nobody's business, services among it: its sockets know them.
    for l4 in [L4::Tcp(SYN), L4::Udp] {
        for to in [(p.client, 9), (p.cluster_ip, PORT_SERVICE)] {
            let other = Frame::new((p.pod, 7), to, l4);
            steps.push(pass("of a pod's own", Hook::PodAnswer, other, other));
        }
    }
    steps
}

/// A client's packet, and one whose door it may enter.
fn way(doors: Doors, enters: bool, name: &'static str, input: Frame, output: Frame) -> Step {
    match doors {
        Doors::Shut => pass(name, Hook::Ingress, input, output),
        Doors::Entered if enters => {
            let output = Out::Enter(output.passed().bytes());
            Step { name, hook: Hook::Ingress, input: input.bytes(), output }
        }
        _ => redirect(name, Hook::Ingress, input, output),
    }
}

fn translated(doors: Doors, there: Frame, dnat: Frame) -> Vec<Step> {
    let mut steps = Vec::new();
    for options in [0, 2] {
        let with = |frame| Frame { options, ..frame };
        let (there, dnat) = (with(there), with(dnat));
        steps.push(way(doors, true, "first", there, dnat));
        steps.push(way(doors, true, "later", there, dnat));
        let wrong = |frame| Frame { wrong: true, ..frame };
        steps.push(way(doors, true, "wrong checksum stays wrong", wrong(there), wrong(dnat)));
        let (answer, seen) = (reversed(dnat), reversed(there));
        for hook in [Hook::PodAnswer, Hook::PodIngress] {
            steps.push(match doors {
                Doors::Shut => pass("answer, by the stack", hook, answer, answer),
                _ => redirect("answer", hook, answer, seen),
            });
        }
        steps.push(pass("answer that came by the stack", Hook::Egress, answer, seen));
    }
    steps
}

/// Errors go the same ways: a router's and the client's about an answer, and the endpoint's about what it got.
fn errors(p: &Place, doors: Doors, there: Frame, dnat: Frame) -> Vec<Step> {
    let what = if p.v4() { [3, 3] } else { [1, 4] };
    let (client, node, pod) = (there.src.0, there.dst.0, dnat.dst.0);
    let mut steps = Vec::new();
    let mut push = |name, hook, input: Icmp, output: Icmp| {
        let output = match doors {
            Doors::Shut if hook == Hook::Ingress => Out::Pass(output.bytes()),
            Doors::Shut => Out::Pass(input.bytes()),
            _ => Out::Redirect(Icmp { hops: 63, ..output }.bytes()),
        };
        steps.push(Step { name, hook, input: input.bytes(), output });
    };
    for cut in [Some(8), None] {
        for from in [p.router, p.client] {
            push(
                "an error about an answer",
                Hook::Ingress,
                error(from, node, what, reversed(there), cut),
                error(from, pod, what, reversed(dnat), cut),
            );
        }
        for hook in [Hook::PodAnswer, Hook::PodIngress] {
            push(
                "the endpoint's error",
                hook,
                error(p.pod, client, what, dnat, cut),
                error(p.node, client, what, there, cut),
            );
        }
    }
    steps
}
