//! Golden frames of direct return: what is sent on whole, and what comes so. Invariant: as its parent's.

use super::{
    ACK, Frame, Hook, Icmp, L4, MORE, Out, PORT_DIRECT, PORT_DIRECT_LOCAL, PORT_LOCAL, PORT_POD,
    PORT_SERVICE, Place, REMOTE_MTU, RST, SYN, Step, answered, error, ethernet, internet_checksum,
    other_port, pass, redirect, reversed,
};
use std::net::IpAddr;
use std::vec::Vec;

/// A frame within an IP header of its family from `src` to `dst`, as one node sends it to another.
pub fn wrapped(frame: &[u8], src: &str, dst: &str) -> Vec<u8> {
    let inner = &frame[14..];
    let mut out = ethernet(false);
    out.extend(&frame[12..14]);
    match (src.parse().expect("an address"), dst.parse().expect("an address")) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut ip = std::vec![0x45, inner[1] & 0xfc];
            ip.extend((20 + inner.len() as u16).to_be_bytes());
            ip.extend([0, 0, 0x40, 0, 64, 4, 0, 0]);
            ip.extend(src.octets());
            ip.extend(dst.octets());
            let sum = internet_checksum(&ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            out.extend(ip);
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            out.extend([inner[0], inner[1] & 0xcf, inner[2], inner[3]]);
            out.extend((inner.len() as u16).to_be_bytes());
            out.extend([41, 64]);
            out.extend(src.octets());
            out.extend(dst.octets());
        }
        _ => panic!("a header has one family"),
    }
    out.extend(inner);
    out
}

/// What becomes of `input` on its way to the endpoint of another node.
fn sent_on(p: &Place, name: &'static str, input: Frame) -> Step {
    let output = Out::Redirect(wrapped(&input.passed().bytes(), p.node, p.remote));
    Step { name, hook: Hook::Ingress, input: input.bytes(), output }
}

/// To the endpoint of another node.
pub(super) fn sent(p: &Place) -> Vec<Step> {
    let mut steps = Vec::new();
    let extra = if p.v4() { 20 } else { 40 };
    for (l4, port) in [(L4::Tcp(SYN), 21_010), (L4::Udp, 21_011), (L4::UdpNoSum, 21_012)] {
        if l4 == L4::UdpNoSum && !p.v4() {
            continue;
        }
        let there = Frame::new((p.client, port), (p.node, PORT_DIRECT), l4);
        steps.push(sent_on(p, "direct", there));
        steps.push(sent_on(p, "direct, options", Frame { options: 2, ..there }));
        steps.push(sent_on(p, "direct, wrong checksum", Frame { wrong: true, ..there }));
        let what = if p.v4() { [11, 0] } else { [3, 0] };
        steps.push(answered("direct, last hop", Frame { hops: 1, ..there }, what, 0));
        let room = REMOTE_MTU as usize - extra - (there.bytes().len() - 14);
        steps.push(sent_on(p, "direct, just fits", Frame { more: Some(room), ..there }));
        let what = if p.v4() { [3, 4] } else { [2, 0] };
        let large = Frame { more: Some(room + 1), ..there };
        steps.push(answered("direct, too big", large, what, REMOTE_MTU - extra as u32));
        // Somebody between the backend and the client has no way for an answer.
        let about = error(p.router, there.dst.0, what, reversed(there), None);
        let passed = Icmp { hops: 63, ..about.clone() };
        let output = Out::Redirect(wrapped(&passed.bytes(), p.node, p.remote));
        let input = about.bytes();
        steps.push(Step { name: "direct, an error about an answer", hook: Hook::Ingress, input, output });
        let input = Icmp { hops: 1, ..about }.bytes();
        steps.push(Step {
            name: "direct, an error's last hop",
            hook: Hook::Ingress,
            input,
            output: Out::Drop,
        });
    }
    let there = Frame::new((p.client, 21_010), (p.node, PORT_DIRECT), L4::Tcp(ACK));
    steps.push(sent_on(p, "direct, under way", there));
    let there = Frame::new((p.client, 21_011), (p.node, PORT_DIRECT), L4::Udp);
    steps.push(sent_on(p, "direct, first fragment", Frame { fragment: MORE, ..there }));
    let later = Frame { fragment: 4, l4: L4::Rest(17), ..there };
    steps.push(sent_on(p, "direct, later fragment", later));
    steps.push(sent_on(p, "direct, later fragment, options", Frame { options: 1, ..later }));
    steps.extend(told(p));
    // The endpoint itself asks: its answers would be its own, so it is masqueraded.
    let there = Frame::new((p.remote, 21_013), (p.node, PORT_DIRECT), L4::Udp);
    let nat = Frame::new((p.node, 21_013), (p.remote, PORT_POD), L4::Udp);
    steps.push(redirect("direct, to itself", Hook::Ingress, there, nat));
    // Pods are not outside: their answers come by this node anyhow.
    let there = Frame::new((p.other_pod, 21_014), (p.node, PORT_DIRECT), L4::Udp);
    let nat = Frame::new((p.other_pod, 21_014), (p.remote, PORT_POD), L4::Udp);
    steps.push(pass("direct, from a pod", Hook::PodIngress, there, nat));
    steps
}

/// What routers between the nodes say of what was sent on.
fn told(p: &Place) -> Vec<Step> {
    let mut steps = Vec::new();
    let (header, extra) = if p.v4() { (20, 20) } else { (40, 40) };
    let (big, gone) = if p.v4() { ([3, 4], [3, 1]) } else { ([2, 0], [1, 0]) };
    for (l4, port) in [(L4::Tcp(ACK), 21_010), (L4::Udp, 21_011)] {
        let there = Frame::new((p.client, port), (p.node, PORT_DIRECT), l4).passed();
        let on_way = wrapped(&there.bytes(), p.node, p.remote);
        let about = |what, word, quoted: &[u8]| Icmp {
            src: p.router.parse().expect("an address"),
            dst: there.dst.0,
            what,
            word,
            quoted: quoted.to_vec(),
            hops: 60,
            turned: false,
        };
        for (what, word, wanted) in [(big, 1400, 1400 - extra as u32), (gone, 0, 0)] {
            for cut in [None, Some(header + 14)] {
                let end = cut.unwrap_or(there.bytes().len() - 14);
                let input = about(what, word, &on_way[14..14 + extra + end]).bytes();
                let quoted = there.bytes()[14..14 + end].to_vec();
                let told = about(what, wanted, &quoted);
                let output = Icmp { src: there.dst.0, dst: there.src.0, hops: 64, ..told };
                let output = Out::Redirect(output.bytes());
                steps.push(Step { name: "direct, an error on the way", hook: Hook::Ingress, input, output });
            }
        }
        let mut alone = |input: Vec<u8>| {
            let output = Out::Pass(input.clone());
            steps.push(Step { name: "direct, no error of ours", hook: Hook::Ingress, input, output });
        };
        alone(about(big, 1400, &on_way[14..14 + extra + header + 2]).bytes());
        let elsewhere = wrapped(&there.bytes(), p.node, p.other_pod);
        alone(about(big, 1400, &elsewhere[14..]).bytes());
        let of_another = wrapped(&there.bytes(), p.other_node, p.remote);
        alone(about(big, 1400, &of_another[14..]).bytes());
    }
    steps
}

/// A step with a frame that another node has sent on to the endpoint of this one.
fn came(p: &Place, name: &'static str, inner: &[u8], output: Out) -> Step {
    Step { name, hook: Hook::Ingress, input: wrapped(inner, p.other_node, p.pod), output }
}

/// To the endpoint of this node, and its answers.
pub(super) fn received(p: &Place) -> Vec<Step> {
    use Hook::Egress;
    let mut steps = Vec::new();
    let what = if p.v4() { [3, 4] } else { [2, 0] };
    let taken = |name, there: Frame, dnat: Frame| came(p, name, &there.bytes(), Out::Pass(dnat.bytes()));
    for (l4, port) in [(L4::Tcp(SYN), 22_000), (L4::Udp, 22_001), (L4::UdpNoSum, 22_002)] {
        if l4 == L4::UdpNoSum && !p.v4() {
            continue;
        }
        for (asked, at) in [(p.other_node, PORT_DIRECT_LOCAL), (p.direct, PORT_SERVICE)] {
            let port = if at == PORT_SERVICE { port + 10 } else { port };
            let there = Frame::new((p.client, port), (asked, at), l4);
            let dnat = Frame::new((p.client, port), (p.pod, PORT_POD), l4);
            steps.push(taken("sent on to us", there, dnat));
            steps.push(pass("direct answer", Egress, reversed(dnat), reversed(there)));
            let with = |frame| Frame { options: 2, ..frame };
            steps.push(taken("sent on to us, options", with(there), with(dnat)));
            if l4 != L4::UdpNoSum {
                let wrong = |frame| Frame { wrong: true, ..frame };
                steps.push(taken("sent on to us, wrong checksum", wrong(there), wrong(dnat)));
            }
            let about = error(p.router, there.dst.0, what, reversed(there), Some(8));
            let ours = error(p.router, dnat.dst.0, what, reversed(dnat), Some(8));
            steps.push(came(p, "an error sent on to us", &about.bytes(), Out::Pass(ours.bytes())));
        }
    }
    let first = |frame| Frame { fragment: MORE, ..frame };
    let later = |frame| Frame { fragment: 4, l4: L4::Rest(17), ..frame };
    let there = Frame::new((p.client, 22_001), (p.other_node, PORT_DIRECT_LOCAL), L4::Udp);
    let dnat = Frame::new((p.client, 22_001), (p.pod, PORT_POD), L4::Udp);
    let alone = wrapped(&later(there).bytes(), p.other_node, p.pod);
    steps.push(came(p, "later fragment first", &later(there).bytes(), Out::Pass(alone)));
    steps.push(taken("first fragment sent on to us", first(there), first(dnat)));
    steps.push(taken("later fragment sent on to us", later(there), later(dnat)));
    // The same client port through the other address of the service: a port of ours tells them apart.
    let again = Frame::new((p.client, 22_001), (p.direct, PORT_SERVICE), L4::Udp);
    let other = Frame::new((p.client, other_port(&again)), (p.pod, PORT_POD), L4::Udp);
    steps.push(taken("tuple in use", again, other));
    steps.push(pass("tuple in use", Egress, reversed(other), reversed(again)));
    let stranger = Frame::new((p.stranger, 22_003), (p.direct, PORT_SERVICE), L4::Udp);
    steps.push(came(p, "sent on, outside of the source ranges", &stranger.bytes(), Out::Drop));
    let own = Frame::new((p.node, 22_003), (p.other_node, PORT_DIRECT_LOCAL), L4::Udp);
    steps.push(came(p, "sent on, this node's own", &own.bytes(), Out::Drop));
    steps
}

/// Headers around packets that are none of our business.
pub(super) fn left_alone(p: &Place) -> Vec<Step> {
    use Hook::{Egress, Ingress, PodIngress};
    let mut steps = Vec::new();
    let mut alone = |name, hook, input: Vec<u8>| {
        steps.push(Step { name, hook, input: input.clone(), output: Out::Pass(input) });
    };
    let ours = Frame::new((p.client, 23_000), (p.other_node, PORT_DIRECT_LOCAL), L4::Tcp(SYN));
    let inner = ours.bytes();
    alone("another endpoint", Ingress, wrapped(&inner, p.other_node, p.other_pod));
    alone("on its way to another node", Ingress, wrapped(&inner, p.other_node, p.remote));
    alone("of another node than was asked", Ingress, wrapped(&inner, p.router, p.pod));
    alone("from a pod", PodIngress, wrapped(&inner, p.other_node, p.pod));
    alone("leaves", Egress, wrapped(&inner, p.other_node, p.pod));
    let twice = wrapped(&inner, p.other_node, p.pod);
    alone("twice", Ingress, wrapped(&twice, p.other_node, p.pod));
    let reset = Frame { l4: L4::Tcp(RST), ..ours }.bytes();
    alone("a reset of nothing", Ingress, wrapped(&reset, p.other_node, p.pod));
    for at in [PORT_LOCAL, PORT_DIRECT, 30_099] {
        let inner = Frame::new((p.client, 23_000), (p.other_node, at), L4::Tcp(SYN)).bytes();
        alone("another service, or none", Ingress, wrapped(&inner, p.other_node, p.pod));
    }
    let about = error(p.router, ours.dst.0, [3, 1], reversed(ours), None).bytes();
    alone("an error about something else", Ingress, wrapped(&about, p.other_node, p.pod));
    let mut other = inner.clone();
    other[if p.v4() { 14 + 9 } else { 14 + 6 }] = 47;
    alone("another protocol", Ingress, wrapped(&other, p.other_node, p.pod));
    let whole = wrapped(&inner, p.other_node, p.pod);
    if p.v4() {
        let mut piece = whole.clone();
        piece[14 + 6] |= 0x20;
        alone("a fragment", Ingress, piece);
    }
    let header = if p.v4() { 20 } else { 40 };
    for cut in (14 + header..14 + 2 * header + 12).step_by(5) {
        alone("cut short", Ingress, whole[..cut].to_vec());
    }
    steps
}
