//! Packets through a pretended kernel. Invariant: its connection table, routes and buffers behave as the kernel's do.

use super::{Kernel, address};
use crate::balance::{self, Link, Side, Verdict, Work};
use crate::checksum;
use crate::env::{Claim, Flows, Journey, Node, Packet, Route, Way};
use crate::golden::doors::Doors;
use crate::golden::{self, Frame, Hook, L4, Out, PLACES, Place};
use crate::quick;
use sheave_ebpf_abi::*;
use std::vec::Vec;

impl Flows for Kernel {
    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        self.flows.borrow().get(key).copied()
    }
    fn touch(&self, key: &FlowKey, now_s: u32, state: u16) -> Option<Flow> {
        let mut flows = self.flows.borrow_mut();
        let flow = flows.get_mut(key)?;
        let before = *flow;
        flow.seen_s = now_s;
        flow.flags |= state;
        Some(before)
    }
    fn claim(&self, key: &FlowKey, flow: &Flow) -> Claim {
        if self.flows.borrow().contains_key(key) {
            return Claim::Taken;
        }
        self.flows.borrow_mut().insert(*key, *flow);
        Claim::Stored
    }
    fn replace(&self, key: &FlowKey, flow: &Flow) -> bool {
        self.flows.borrow_mut().insert(*key, *flow);
        true
    }
    fn remove(&self, key: &FlowKey) {
        self.flows.borrow_mut().remove(key);
    }
    fn mark(&self, place: u32) -> u32 {
        self.marks.borrow().get(&place).copied().unwrap_or(0)
    }
    fn set_mark(&self, place: u32, now_s: u32) {
        self.marks.borrow_mut().insert(place, now_s);
    }
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        self.fragments.borrow().get(key).copied()
    }
    fn set_fragment(&self, key: &FragmentKey, fragment: &Fragment) {
        self.fragments.borrow_mut().insert(*key, *fragment);
    }
    fn now_s(&self) -> u32 {
        self.now_s.get()
    }
}

impl Node for Kernel {
    fn in_source_range(&self, service: u32, client: &Address) -> bool {
        let bits = |address: &Address| {
            let [a, b, c, d] = address.words.map(u32::from_be);
            u128::from(a) << 96 | u128::from(b) << 64 | u128::from(c) << 32 | u128::from(d)
        };
        let covers =
            |first: &Address, len: u32| (bits(first) ^ bits(client)).checked_shr(128 - len).unwrap_or(0) == 0;
        self.ranges.iter().any(|(of, first, len)| *of == service && covers(first, *len))
    }
    fn has_socket(&self, key: &FlowKey) -> bool {
        self.sockets.contains(key)
    }
    fn route(&self, journey: &Journey) -> Way {
        let far = PLACES.iter().any(|place| address(place.remote) == journey.dst);
        if far && journey.len > golden::REMOTE_MTU {
            return Way::TooBig(golden::REMOTE_MTU);
        }
        Way::To(Route { device: ROUTED.into(), next_hop: journey.dst, link: [0; 12], has_link: false })
    }
    fn door(&self, place: u16) -> Option<Door> {
        Some(self.doors.borrow().get(&place).copied().unwrap_or(Door::zeroed()))
    }
    fn answered(&self, kind: u32) -> u32 {
        let mut answered = self.answered.borrow_mut();
        let held = answered.entry((kind, self.now_s.get())).or_default();
        *held += 1;
        *held
    }
    fn tell(&self, work: &Work, reason: Counter) {
        self.told.borrow_mut().push((reason, work.flow.dst));
    }
}

/// The device that every route leads to.
const ROUTED: u16 = 7;

pub(super) struct Bytes(pub(super) Vec<u8>);

impl Bytes {
    fn check(&mut self, offset: u32, f: impl FnOnce(u16) -> u16) -> bool {
        let Some([a, b]) = self.load::<2>(offset) else { return false };
        self.store::<2>(offset, f(u16::from_ne_bytes([a, b])).to_ne_bytes(), false)
    }
}

impl Packet for Bytes {
    fn ether_type(&self) -> u16 {
        u16::from_be_bytes([self.0[12], self.0[13]])
    }
    fn is_tagged(&self) -> bool {
        false
    }
    fn size(&self) -> u32 {
        self.0.len() as u32
    }
    fn segment_len(&self) -> u32 {
        0
    }
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.get(offset as usize..offset as usize + N)?.try_into().ok()
    }
    fn store<const N: usize>(&mut self, offset: u32, bytes: [u8; N], _: bool) -> bool {
        match self.0.get_mut(offset as usize..offset as usize + N) {
            Some(place) => {
                place.copy_from_slice(&bytes);
                true
            }
            None => false,
        }
    }
    fn fix_l3(&mut self, offset: u32, diff: u32) -> bool {
        self.check(offset, |old| checksum::apply(old, diff))
    }
    fn fix_l4(&mut self, offset: u32, diff: u32, _: bool, zero_is_none: bool) -> bool {
        self.check(offset, |old| match (old, zero_is_none) {
            (0, true) => 0,
            (old, zero_is_none) => match checksum::apply(old, diff) {
                0 if zero_is_none => 0xffff,
                new => new,
            },
        })
    }
    fn cut(&mut self, len: u32) {
        self.0.truncate(len as usize);
    }
    fn insert(&mut self, len: u32) -> bool {
        self.0.splice(14..14, std::vec![0xaa; len as usize]);
        true
    }
    fn wrap(&mut self, v6: bool) -> bool {
        self.insert(if v6 { 40 } else { 20 })
    }
    fn unwrap(&mut self, v6: bool) -> bool {
        self.0.drain(14..if v6 { 54 } else { 34 });
        true
    }
}

pub(super) fn golden_kernel() -> Kernel {
    let mut kernel = Kernel { snat_ports: golden::SNAT_PORTS, ..Kernel::default() };
    for (n, place) in PLACES.iter().enumerate() {
        kernel.node.push(address(place.node));
        let any = if n == 0 { "0.0.0.0" } else { "::" };
        for (offset, proto) in [(0, PROTO_TCP), (10, PROTO_UDP)] {
            let id = 100 * (n as u32 + 1) + offset;
            let flags = frontend_flag::NODE_PORT;
            let local = [(place.pod, true)];
            kernel.add(id, &[(any, golden::PORT_LOCAL)], proto, flags, &local);
            kernel.add(id, &[(place.cluster_ip, golden::PORT_SERVICE)], proto, 0, &local);
            let flags_lb = frontend_flag::LOAD_BALANCER | frontend_flag::SOURCE_RANGES;
            kernel.add(id, &[(place.balancer, golden::PORT_SERVICE)], proto, flags_lb, &local);
            let (first, len) = place.range.split_once('/').unwrap();
            let len: u32 = len.parse().unwrap();
            kernel.ranges.push((id, address(first), if place.v4() { 96 + len } else { len }));
            kernel.add(id + 1, &[(any, golden::PORT_SAME_POD)], proto, flags, &local);
            let remote = [(place.remote, false)];
            kernel.add(id + 2, &[(any, golden::PORT_REMOTE)], proto, flags, &remote);
            kernel.add(id + 3, &[(any, golden::PORT_EMPTY)], proto, flags, &[]);
            let flags = flags | frontend_flag::EXTERNAL_LOCAL;
            kernel.add(id + 4, &[(any, golden::PORT_LOCAL_ONLY)], proto, flags, &remote);
            let flags = frontend_flag::NODE_PORT | frontend_flag::DSR;
            kernel.add(id + 5, &[(any, golden::PORT_DIRECT)], proto, flags, &remote);
            kernel.add(id + 6, &[(any, golden::PORT_DIRECT_LOCAL)], proto, flags, &local);
            let flags_lb = flags_lb | frontend_flag::DSR;
            kernel.add(id + 6, &[(place.direct, golden::PORT_SERVICE)], proto, flags_lb, &local);
            kernel.ranges.push((id + 6, address(first), if place.v4() { 96 + len } else { len }));
        }
    }
    kernel
}

/// Runs a hook's programs on a frame.
pub(super) fn run(kernel: &Kernel, hook: Hook, input: &[u8]) -> Out {
    let mut packet = Bytes(input.to_vec());
    let (side, link) = match hook {
        Hook::Ingress => (Side::Ingress, Link::Uplink),
        Hook::PodIngress | Hook::PodAnswer => (Side::Ingress, Link::Pod),
        Hook::Egress => (Side::Egress, Link::Uplink),
    };
    let answers = hook == Hook::PodAnswer;
    let short = quick::passes(&packet, kernel, if answers { Side::Egress } else { side });
    let traces = || (kernel.flows.borrow().clone(), kernel.counters.borrow().clone());
    let before = short.then(traces);
    let mut work = Work::new();
    let verdict = if answers {
        balance::run_answer(&mut packet, kernel, &mut work)
    } else {
        balance::run_long(&mut packet, kernel, &mut work, side, link)
    };
    let out = match verdict {
        Verdict::Pass => Out::Pass(packet.0),
        Verdict::Drop => Out::Drop,
        Verdict::Redirect => Out::Redirect(packet.0),
        Verdict::Enter => Out::Enter(packet.0),
        Verdict::Reply => Out::Reply(packet.0),
    };
    if let Some(before) = before {
        assert_eq!(out, Out::Pass(input.to_vec()), "what passes at a glance");
        assert!(traces() == before, "what passes at a glance leaves no trace");
    }
    out
}

#[test]
fn what_concerns_no_service_is_seen_at_a_glance() {
    let kernel = golden_kernel();
    for place in &PLACES {
        for l4 in [L4::Tcp(golden::SYN), L4::Tcp(golden::ACK), L4::Udp] {
            let passes = |kernel: &Kernel, from: (&str, u16), to: (&str, u16), side| {
                quick::passes(&Bytes(Frame::new(from, to, l4).bytes()), kernel, side)
            };
            let (client, pod) = ((place.client, 7), (place.pod, golden::PORT_POD));
            for side in [Side::Ingress, Side::Egress] {
                assert!(passes(&kernel, client, pod, side));
                assert!(passes(&kernel, client, (place.node, 22), side));
            }
            assert!(!passes(&kernel, client, (place.node, golden::PORT_LOCAL), Side::Ingress));
            assert!(!passes(&kernel, client, (place.cluster_ip, golden::PORT_SERVICE), Side::Ingress));
            assert!(!passes(&kernel, client, (place.balancer, golden::PORT_SERVICE), Side::Ingress));
        }
        // A flow is seen from all of its tuples, and for as long as it may live.
        let l4 = L4::Tcp(golden::SYN);
        send(&kernel, (place.client, 9), (place.node, golden::PORT_LOCAL), l4);
        let answer = Bytes(Frame::new((place.pod, golden::PORT_POD), (place.client, 9), l4).bytes());
        assert!(!quick::passes(&answer, &kernel, Side::Egress));
        kernel.now_s.set(kernel.now_s.get() + flow_timeout_s::TCP_ESTABLISHED);
        assert!(!quick::passes(&answer, &kernel, Side::Egress));
        kernel.now_s.set(kernel.now_s.get() + 2);
        assert!(quick::passes(&answer, &kernel, Side::Egress));
    }
}

#[test]
fn marks_of_both_directions_are_one_and_spread() {
    let mut places = std::collections::HashSet::new();
    for n in 0..1000_u32 {
        let key = FlowKey {
            src: address("10.244.0.5"),
            dst: address(&std::format!("198.51.{}.{}", 100 + n / 250, n % 250)),
            sport: 8080_u16.to_be(),
            dport: 40_000_u16.to_be(),
            proto: PROTO_TCP,
            pad: [0; 3],
        };
        let back = FlowKey { src: key.dst, dst: key.src, sport: key.dport, dport: key.sport, ..key };
        assert_eq!(key.mark(), back.mark());
        assert!((key.mark() as usize) < map::MARKS_MAX);
        places.insert(key.mark());
    }
    assert!(places.len() > 980, "{}", places.len());
}

#[test]
fn refusals_are_limited_and_sizes_are_always_told() {
    let kernel = golden_kernel();
    let there = |l4| send(&kernel, (V4.client, 7), (V4.node, golden::PORT_EMPTY), l4);
    for _ in 0..crate::answer::ICMP_PER_S {
        assert!(matches!(there(L4::Udp), Out::Reply(_)));
    }
    assert_eq!(there(L4::Udp), Out::Drop);
    assert_eq!(kernel.counted(Counter::AnswerLimited), 1);
    assert!(matches!(there(L4::Tcp(golden::SYN)), Out::Reply(_)), "a budget of their own");
    let large =
        Frame { more: Some(1300), ..Frame::new((V4.client, 8), (V4.node, golden::PORT_REMOTE), L4::Udp) };
    assert!(matches!(run(&kernel, Hook::Ingress, &large.bytes()), Out::Reply(_)));
    kernel.now_s.set(1);
    assert!(matches!(there(L4::Udp), Out::Reply(_)));
}

#[test]
fn packets_of_every_length_are_quoted_with_a_right_checksum() {
    let kernel = golden_kernel();
    for place in &PLACES {
        let what = if place.v4() { [11, 0] } else { [3, 0] };
        let there = Frame::new((place.client, 8), (place.node, golden::PORT_REMOTE), L4::Udp);
        for more in 0..1300 {
            // So many are answered a second.
            kernel.now_s.set(kernel.now_s.get() + 1);
            let last = Frame { hops: 1, more: Some(more), ..there };
            let step = golden::answered("last hop", last, what, 0);
            assert_eq!(run(&kernel, step.hook, &step.input), step.output, "{more} at {}", place.node);
        }
    }
}

#[test]
fn golden_doors() {
    let kernel = golden_kernel();
    let every = |doors: Doors| {
        for place in &PLACES {
            for step in golden::doors::conversation(place, doors) {
                let at = std::format!("{} at {}, {doors:?}", step.name, place.node);
                assert_eq!(run(&kernel, step.hook, &step.input), step.output, "{at}");
            }
        }
    };
    kernel.config_flags.set(config_flag::HOST_ROUTING);
    for (doors, flags) in [(Doors::Entered, door_flag::ENTER), (Doors::Watched, 0)] {
        let device = ROUTED.into();
        kernel.doors.borrow_mut().insert(ROUTED, Door { device, mtu: golden::doors::DOOR_MTU, flags });
        every(doors);
        // What was begun goes through the stack on both ways when its door is shut.
        kernel.doors.borrow_mut().clear();
        every(Doors::Shut);
        kernel.flows.borrow_mut().clear();
    }
    assert_eq!(kernel.counted(Counter::RewriteFailed), 0);
    // Another device has the place, or nobody wants it: as ever.
    let out = || send(&kernel, (V4.client, 9), (V4.node, golden::PORT_LOCAL), L4::Tcp(golden::SYN));
    let other = Door { device: 0x1_0000 | u32::from(ROUTED), mtu: 1500, flags: door_flag::ENTER };
    kernel.doors.borrow_mut().insert(ROUTED, other);
    assert!(matches!(out(), Out::Pass(_)));
    kernel.flows.borrow_mut().clear();
    kernel.doors.borrow_mut().insert(ROUTED, Door { device: ROUTED.into(), ..other });
    assert!(matches!(out(), Out::Enter(_)));
    kernel.flows.borrow_mut().clear();
    kernel.config_flags.set(0);
    assert!(matches!(out(), Out::Pass(_)));
}

#[test]
fn golden_conversations() {
    let kernel = golden_kernel();
    for place in &PLACES {
        for step in golden::conversation(place) {
            assert_eq!(run(&kernel, step.hook, &step.input), step.output, "{} at {}", step.name, place.node);
        }
    }
    for (counter, times) in [
        (Counter::NoLocalEndpoints, 4),
        (Counter::Rejected, 10),
        (Counter::SourceRefused, 6),
        (Counter::Fragment, 4),
        (Counter::TooBig, 9),
        (Counter::Expired, 14),
        (Counter::IcmpTranslated, 84),
        (Counter::TunnelRefused, 2),
        (Counter::RewriteFailed, 0),
        (Counter::AnswerFailed, 0),
    ] {
        assert_eq!(kernel.counted(counter), times, "{counter:?}");
    }
    // Who listens is told of each refusal and of each connection, with its backend.
    let told = kernel.told.borrow();
    for counter in [Counter::NoLocalEndpoints, Counter::Rejected, Counter::SourceRefused, Counter::Opened] {
        let times = told.iter().filter(|(reason, _)| *reason == counter).count() as u64;
        assert_eq!(times, kernel.counted(counter), "{counter:?}");
    }
    let ends: Vec<Address> = PLACES.iter().flat_map(|p| [address(p.pod), address(p.remote)]).collect();
    assert!(told.iter().filter(|(reason, _)| *reason == Counter::Opened).all(|(_, to)| ends.contains(to)));
}

#[test]
fn truncated_frames_never_panic_and_pass_unchanged() {
    let kernel = golden_kernel();
    for place in &PLACES {
        for options in 0..4 {
            let frame =
                Frame { options, ..Frame::new((place.client, 5), (place.node, 30080), L4::Tcp(golden::SYN)) };
            let bytes = frame.bytes();
            let l4_len = bytes.len() - golden::PAYLOAD.len();
            // Up to the TCP flags; what follows is payload and checksum to be fixed or a failed rewrite.
            for cut in 14..l4_len - 6 {
                assert_eq!(
                    run(&kernel, Hook::Ingress, &bytes[..cut]),
                    Out::Pass(bytes[..cut].to_vec()),
                    "{cut}"
                );
            }
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    #[test]
    fn junk_never_panics(mut junk in proptest::collection::vec(proptest::prelude::any::<u8>(), 14..120), v6: bool) {
        let kernel = golden_kernel();
        junk[12..14].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[0x08, 0x00] });
        for hook in [Hook::Ingress, Hook::PodIngress, Hook::Egress] {
            run(&kernel, hook, &junk);
        }
    }

    /// Every byte of a conversation may be another one.
    #[test]
    fn spoilt_conversations_never_panic(at in 0_usize..200, to: u8) {
        let kernel = golden_kernel();
        for step in PLACES.iter().flat_map(golden::conversation) {
            let mut input = step.input;
            if let Some(byte) = input.get_mut(at) {
                *byte = to;
            }
            run(&kernel, step.hook, &input);
        }
    }
}

/// Where a frame goes: the addresses and ports of a plain TCP or UDP frame without options.
fn tuple(out: &Out) -> ((Address, u16), (Address, u16)) {
    let (Out::Pass(bytes) | Out::Redirect(bytes)) = out else { panic!("{out:?}") };
    let packet = Bytes(bytes.clone());
    let mut headers = crate::packet::NOTHING;
    crate::packet::parse(&packet, &mut headers);
    ((headers.src, u16::from_be(headers.sport)), (headers.dst, u16::from_be(headers.dport)))
}

pub(super) fn send(kernel: &Kernel, from: (&str, u16), to: (&str, u16), l4: L4) -> Out {
    run(kernel, Hook::Ingress, &Frame::new(from, to, l4).bytes())
}

const V4: &Place = &PLACES[0];

#[test]
fn a_flow_outlives_its_backend_until_it_is_opened_anew() {
    let mut kernel = golden_kernel();
    let go = |kernel: &Kernel, l4| tuple(&send(kernel, (V4.client, 7), (V4.node, 30080), l4)).1.0;
    for (l4, later) in [(L4::Tcp(golden::SYN), L4::Tcp(golden::ACK)), (L4::Udp, L4::Udp)] {
        assert_eq!(go(&kernel, l4), address(V4.pod));
        let old: Vec<u32> =
            kernel.backends.values().filter(|b| b.addr == address(V4.pod)).map(|b| b.id).collect();
        for id in old {
            let held = kernel.backends.remove(&id).unwrap();
            kernel.backends.insert(1000 + id, Backend { addr: address("10.244.0.9"), id: 1000 + id, ..held });
            kernel.slots.iter_mut().filter(|s| s.backend == id).for_each(|s| s.backend = 1000 + id);
        }
        // A connection stays; a datagram finds the new one.
        let expected = if l4 == later { "10.244.0.9" } else { V4.pod };
        assert_eq!(go(&kernel, later), address(expected));
        assert_eq!(go(&kernel, l4), address("10.244.0.9"));
        kernel = golden_kernel();
    }
}

#[test]
fn an_evicted_entry_comes_back_with_the_next_packet() {
    for port in [golden::PORT_LOCAL, golden::PORT_REMOTE] {
        let kernel = golden_kernel();
        let there = |flags| send(&kernel, (V4.client, 7), (V4.node, port), L4::Tcp(flags));
        let nat = tuple(&there(golden::SYN));
        kernel.flows.borrow_mut().retain(|_, flow| flow.flags & flow_flag::REPLY == 0);
        kernel.now_s.set(1);
        assert_eq!(tuple(&there(golden::ACK)), nat);
        assert_eq!(kernel.flows.borrow().len(), 2);
        // The client's own entry is gone: the same backend and port are found again.
        kernel.flows.borrow_mut().retain(|_, flow| flow.flags & flow_flag::REPLY != 0);
        assert_eq!(tuple(&there(golden::ACK)), nat);
        assert_eq!(kernel.flows.borrow().len(), 2);
    }
}

#[test]
fn ports_are_the_clients_own_else_of_the_ranges_and_never_taken_twice() {
    let mut kernel = golden_kernel();
    kernel.snat_ports = (61_000, 61_003);
    // A socket of this node has the port towards the backend already.
    let held = |port: u16| FlowKey {
        src: address(V4.remote),
        dst: address(V4.node),
        sport: golden::PORT_POD.to_be(),
        dport: port.to_be(),
        proto: PROTO_UDP,
        pad: [0; 3],
    };
    kernel.sockets.push(held(61_001));
    let go = |n: u32| {
        let client = std::format!("198.51.100.{n}");
        match send(&kernel, (&client, 7), (V4.node, golden::PORT_REMOTE), L4::Udp) {
            Out::Drop => None,
            out => Some(tuple(&out).0.1),
        }
    };
    let mut ports: Vec<u16> = (1..40).filter_map(go).collect();
    assert_eq!(ports[0], 7);
    ports.sort_unstable();
    assert_eq!(ports, [7, 10_000, 10_001, 61_000, 61_002, 61_003]);
    assert!(kernel.counted(Counter::PortsExhausted) > 0);
    // What the kernel may give to a socket of this node is never one of them.
    let mut kernel_of_its_own = golden_kernel();
    kernel_of_its_own.snat_ports = (61_000, 61_003);
    let to = (V4.node, golden::PORT_REMOTE);
    let port = tuple(&send(&kernel_of_its_own, (V4.client, 40_000), to, L4::Udp)).0.1;
    assert!((61_000..=61_003).contains(&port), "{port}");
    // Time frees them.
    kernel.now_s.set(flow_timeout_s::DATAGRAM + 1);
    assert_eq!(go(100), Some(7));
}

#[test]
fn timeouts_follow_the_state_of_the_connection() {
    let kernel = golden_kernel();
    let entries = |kernel: &Kernel| {
        let flows = kernel.flows.borrow();
        let flags: Vec<u16> = flows.values().map(|flow| flow.flags & flow_flag::STATE).collect();
        assert!(flags.iter().all(|f| *f == flags[0]), "both entries have one state: {flags:?}");
        let flow = *flows.values().next().unwrap();
        let lives = |s| !crate::flow::is_expired(&flow, PROTO_TCP, kernel.now_s.get() + s);
        [10, 60, 8000].into_iter().filter(|s| lives(*s) && !lives(s + 1)).collect::<Vec<u32>>()
    };
    let there = |flags| drop(send(&kernel, (V4.client, 7), (V4.node, 30080), L4::Tcp(flags)));
    let back = |flags| {
        let answer = Frame::new((V4.pod, golden::PORT_POD), (V4.client, 7), L4::Tcp(flags));
        drop(run(&kernel, Hook::Egress, &answer.bytes()));
    };
    there(golden::SYN);
    assert_eq!(entries(&kernel), [60]);
    back(golden::SYN | golden::ACK);
    assert_eq!(entries(&kernel), [8000]);
    there(golden::FIN_ACK);
    assert_eq!(entries(&kernel), [8000], "half closed is not closing");
    back(golden::FIN_ACK);
    assert_eq!(entries(&kernel), [10]);
    there(golden::SYN);
    assert_eq!(entries(&kernel), [60], "opened anew");
    back(golden::RST);
    assert_eq!(entries(&kernel), [10]);
}

#[test]
fn datagrams_past_the_service_end_a_flow_that_rests() {
    let kernel = golden_kernel();
    let (client, node, pod) = ((V4.client, 7), (V4.node, golden::PORT_LOCAL), (V4.pod, golden::PORT_POD));
    let answer =
        |kernel: &Kernel| tuple(&run(kernel, Hook::Egress, &Frame::new(pod, client, L4::Udp).bytes())).0;
    let (of_node, of_pod) = ((address(V4.node), node.1), (address(V4.pod), pod.1));
    send(&kernel, client, node, L4::Udp);
    // Translated at a device below, or meant so.
    send(&kernel, client, pod, L4::Udp);
    assert_eq!(answer(&kernel), of_node);
    kernel.now_s.set(2);
    send(&kernel, client, pod, L4::Udp);
    assert_eq!(answer(&kernel), of_pod);
    assert!(kernel.flows.borrow().is_empty());
    send(&kernel, client, node, L4::Udp);
    assert_eq!(answer(&kernel), of_node);
}

#[test]
fn everything_is_masqueraded_when_told() {
    let kernel = golden_kernel();
    kernel.config_flags.set(config_flag::MASQUERADE_ALL);
    let out = send(&kernel, (V4.client, 7), (V4.balancer, 80), L4::Udp);
    assert!(matches!(out, Out::Redirect(_)));
    assert_eq!(tuple(&out), ((address(V4.node), 7), (address(V4.pod), golden::PORT_POD)));
}

#[test]
fn a_pod_of_the_node_itself_is_never_masqueraded() {
    let mut kernel = golden_kernel();
    kernel.config_flags.set(config_flag::MASQUERADE_ALL);
    kernel.add(
        7,
        &[("0.0.0.0", 30_500), ("0.0.0.0", 30_501)],
        PROTO_UDP,
        frontend_flag::NODE_PORT,
        &[(V4.node, true)],
    );
    let go = |port| send(&kernel, (V4.client, 7), (V4.node, port), L4::Udp);
    assert_eq!(tuple(&go(30_500)).0, (address(V4.client), 7));
    // Another port tells its answers apart.
    let (addr, port) = tuple(&go(30_501)).0;
    assert_eq!(addr, address(V4.client));
    assert!((61_000..=65_535).contains(&port), "{port}");
}

/// A service of two endpoints of this node and two of another, as NodePort of UDP.
fn four(kernel: &mut Kernel, port: u16, change: impl Fn(&mut Frontend)) -> [&'static str; 4] {
    let ends = ["10.244.0.11", "10.244.0.12", "10.244.9.11", "10.244.9.12"];
    let all = ends.map(|ip| (ip, ip.starts_with("10.244.0.")));
    kernel.add(900, &[("0.0.0.0", port)], PROTO_UDP, frontend_flag::NODE_PORT, &all);
    let key = Frontend4Key { addr: 0, port: port.to_be(), proto: PROTO_UDP, pad: 0 };
    change(kernel.frontends4.get_mut(&key).unwrap());
    for backend in kernel.backends.values() {
        let Some(at) = ends.iter().position(|ip| address(ip) == backend.addr) else { continue };
        let flags = member_flag::READY | member_flag::CLUSTER | if at < 2 { member_flag::LOCAL } else { 0 };
        kernel.members.insert(MemberKey { service: 900, backend: backend.id }, flags);
    }
    ends
}

#[test]
fn a_client_is_bound_to_its_backend_while_it_comes_back() {
    let mut kernel = golden_kernel();
    four(&mut kernel, 30_600, |frontend| frontend.affinity_timeout_s = 100);
    let go = |kernel: &Kernel, client: &str, port| {
        let out = send(kernel, (client, port), (V4.node, 30_600), L4::Udp);
        let remote = matches!(out, Out::Redirect(_));
        let to = tuple(&out).1.0;
        assert_eq!(remote, [address("10.244.9.11"), address("10.244.9.12")].contains(&to), "{to:?}");
        to
    };
    let mut seen: Vec<Address> = Vec::new();
    for n in 1..30 {
        let client = std::format!("198.51.100.{n}");
        // Ports of no other client: there are few to masquerade with.
        let first = go(&kernel, &client, n * 100);
        assert!((1..20).all(|port| go(&kernel, &client, n * 100 + port) == first), "{client}");
        if !seen.contains(&first) {
            seen.push(first);
        }
    }
    assert_eq!(seen.len(), 4, "clients are spread");
    // A backend that is none of the service's any more is left.
    let client = "198.51.100.1";
    let first = go(&kernel, client, 30);
    let id = kernel.backends.values().find(|b| b.addr == first).unwrap().id;
    kernel.members.remove(&MemberKey { service: 900, backend: id });
    let bound = |kernel: &Kernel| {
        let key = crate::affinity::address_key(address(client), 900, crate::select::Scope::Cluster);
        kernel.bindings.borrow()[&key]
    };
    kernel.now_s.set(50);
    go(&kernel, client, 31);
    assert_eq!(bound(&kernel).used_s, 50);
}

#[test]
fn maglev_picks_for_all_nodes_alike() {
    let mut kernel = golden_kernel();
    let ends = four(&mut kernel, 30_600, |frontend| frontend.maglev = 1);
    // A table that knows one answer: the third endpoint.
    kernel.maglevs = std::vec![Vec::new(), std::vec![2; MAGLEV_SLOTS]];
    for port in 1..20 {
        let out = send(&kernel, (V4.client, port), (V4.node, 30_600), L4::Udp);
        assert_eq!(tuple(&out).1.0, address(ends[2]));
    }
}
