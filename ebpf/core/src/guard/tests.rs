//! The guard over pretended maps and real bytes.

use super::*;
use crate::checksum;
use crate::packet::{TCP_ACK as ACK, TCP_FIN as FIN, TCP_SYN as SYN, bytes_of, pass_hop};
use sheave_ebpf_abi::{PROTO_ICMP, PROTO_ICMPV6, PROTO_SCTP, PROTO_UDP};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::IpAddr;
use std::vec;
use std::vec::Vec;

#[derive(Default)]
struct Kernel {
    config: Cell<(u32, u32)>,
    endpoints: RefCell<HashMap<Address, Endpoint>>,
    ranges: HashMap<Address, u32>,
    verdicts: RefCell<HashMap<VerdictKey, u32>>,
    ports: Vec<(u32, u8, u16)>,
    flows: RefCell<HashMap<FlowKey, NetFlow>>,
    now_s: Cell<u32>,
    counted: RefCell<HashMap<NetCounter, u32>>,
    full: Cell<bool>,
}

impl World for Kernel {
    fn config(&self) -> Option<NetConfig> {
        let (epoch, flags) = self.config.get();
        Some(NetConfig { epoch, flags, object_digest: [0; 2] })
    }
    fn endpoint(&self, address: &Address) -> Option<Endpoint> {
        self.endpoints.borrow().get(address).copied()
    }
    fn range(&self, address: &Address) -> u32 {
        self.ranges.get(address).copied().unwrap_or(0)
    }
    fn verdict(&self, key: &VerdictKey) -> Option<u32> {
        self.verdicts.borrow().get(key).copied()
    }
    fn has_port(&self, ports: u32, proto: u8, port: u16) -> bool {
        self.ports.contains(&(ports, proto, u16::from_be(port)))
    }
    fn flow(&self, key: &FlowKey) -> Option<NetFlow> {
        self.flows.borrow().get(key).copied()
    }
    fn keep(&self, key: &FlowKey, flow: &NetFlow) -> bool {
        if self.full.get() {
            return false;
        }
        self.flows.borrow_mut().insert(*key, *flow);
        true
    }
    fn now_s(&self) -> u32 {
        self.now_s.get()
    }
    fn count(&self, counter: NetCounter) {
        *self.counted.borrow_mut().entry(counter).or_default() += 1;
    }
}

struct Bytes(Vec<u8>);

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
        self.0.get(offset as usize..)?.get(..N)?.try_into().ok()
    }
    fn store<const N: usize>(&mut self, offset: u32, bytes: [u8; N], _: bool) -> bool {
        self.0[offset as usize..offset as usize + N].copy_from_slice(&bytes);
        true
    }
    fn fix_l3(&mut self, offset: u32, diff: u32) -> bool {
        let at = offset as usize;
        let check = u16::from_ne_bytes([self.0[at], self.0[at + 1]]);
        self.0[at..at + 2].copy_from_slice(&checksum::apply(check, diff).to_ne_bytes());
        true
    }
    fn fix_l4(&mut self, _: u32, _: u32, _: bool, _: bool) -> bool {
        false
    }
    fn cut(&mut self, _: u32) {}
    fn insert(&mut self, _: u32) -> bool {
        false
    }
}

fn address(ip: &str) -> Address {
    match ip.parse::<IpAddr>().unwrap() {
        IpAddr::V4(a) => Address::v4(u32::from_ne_bytes(a.octets())),
        IpAddr::V6(a) => Address::v6(core::array::from_fn(|i| {
            let o = a.octets();
            u32::from_ne_bytes([o[i * 4], o[i * 4 + 1], o[i * 4 + 2], o[i * 4 + 3]])
        })),
    }
}

/// IP header and what follows it.
fn ip(src: &str, dst: &str, proto: u8, l4: &[u8]) -> Vec<u8> {
    let (s, d) = (address(src), address(dst));
    let mut out = Vec::new();
    match (s.as_v4(), d.as_v4()) {
        (Some(s), Some(d)) => {
            out.extend([0x45, 0, 0, 0, 0, 0, 0, 0, 64, proto, 0, 0]);
            out.extend(bytes_of::<2, 8>(&[s, d]));
        }
        _ => {
            out.extend([0x60, 0, 0, 0, 0, 0, proto, 64]);
            out.extend(bytes_of::<4, 16>(&s.words));
            out.extend(bytes_of::<4, 16>(&d.words));
        }
    }
    out.extend(l4);
    out
}

fn frame(ip: &[u8]) -> Bytes {
    let mut out = vec![0; 12];
    out.extend(if ip[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xdd] });
    out.extend(ip);
    Bytes(out)
}

fn transport(sport: u16, dport: u16, flags: u8) -> Vec<u8> {
    let mut l4 = sport.to_be_bytes().to_vec();
    l4.extend(dport.to_be_bytes());
    l4.extend([0; 9]);
    l4.push(flags);
    l4.extend([0; 6]);
    l4
}

fn tcp(src: (&str, u16), dst: (&str, u16), flags: u8) -> Bytes {
    frame(&ip(src.0, dst.0, PROTO_TCP, &transport(src.1, dst.1, flags)))
}

fn udp(src: (&str, u16), dst: (&str, u16)) -> Bytes {
    frame(&ip(src.0, dst.0, PROTO_UDP, &transport(src.1, dst.1, 0)))
}

const A: &str = "10.0.0.1";
const B: &str = "10.0.0.2";
const R: &str = "10.1.0.9";
const NODE: &str = "192.0.2.1";
/// Devices of A and B.
const DA: u32 = 11;
const DB: u32 = 12;
const LIST: u32 = 5;

impl Kernel {
    /// Two pods of this node, one of another; B's set 1 allows A (identity 7) TCP and UDP port 80.
    fn new() -> Self {
        let kernel = Self { ports: vec![(LIST, PROTO_TCP, 80), (LIST, PROTO_UDP, 80)], ..Self::default() };
        kernel.config.set((1, net_config_flag::FAST));
        kernel.now_s.set(1000);
        let end = |device, identity, ingress| Endpoint {
            device,
            identity,
            ingress,
            egress: 0,
            flags: endpoint_flag::PEER,
        };
        let host = Endpoint { flags: endpoint_flag::HOST, ..NOBODY };
        let ends = [(A, end(DA, 7, 0)), (B, end(DB, 8, 1)), (R, end(0, 9, 0)), (NODE, host)];
        kernel.endpoints.borrow_mut().extend(ends.map(|(ip, end)| (address(ip), end)));
        kernel.verdicts.borrow_mut().insert(VerdictKey { set: 1, identity: 7 }, LIST);
        kernel
    }

    fn see(&self, packet: &Bytes, place: Place, device: u32) -> Verdict {
        pass(self, packet, &mut Work::NOTHING.clone(), place, device)
    }

    /// A packet between A and B through the stack.
    fn through(&self, packet: &Bytes, from: u32, to: u32) -> bool {
        match self.see(packet, Place::FromPod, from) {
            Verdict::Pass => self.see(packet, Place::ToPod, to) == Verdict::Pass,
            Verdict::Peer(device) => device == to,
            _ => false,
        }
    }

    fn counted(&self, counter: NetCounter) -> u32 {
        self.counted.borrow().get(&counter).copied().unwrap_or(0)
    }

    /// What is allowed changes.
    fn change(&self, identity: u32, list: Option<u32>) {
        let key = VerdictKey { set: 1, identity };
        match list {
            Some(list) => self.verdicts.borrow_mut().insert(key, list),
            None => self.verdicts.borrow_mut().remove(&key),
        };
        let (epoch, flags) = self.config.get();
        self.config.set((epoch + 1, flags));
    }
}

#[test]
fn ports_and_identities_decide_and_answers_follow() {
    let k = Kernel::new();
    assert!(k.through(&tcp((A, 4000), (B, 80), SYN), DA, DB));
    assert!(k.through(&tcp((B, 80), (A, 4000), SYN | ACK), DB, DA));
    assert!(!k.through(&tcp((A, 4000), (B, 81), SYN), DA, DB));
    assert_eq!(k.counted(NetCounter::DeniedIngress), 1);
    let from_r = tcp((R, 4000), (B, 80), SYN);
    assert_eq!(k.see(&from_r, Place::ToPod, DB), Verdict::Drop);
    assert_eq!(k.see(&tcp((NODE, 4000), (B, 22), SYN), Place::ToPod, DB), Verdict::Pass);
    assert!(k.through(&udp((A, 53), (B, 80)), DA, DB) && k.through(&udp((B, 80), (A, 53)), DB, DA));
    assert!(!k.through(&frame(&ip(A, B, PROTO_SCTP, &transport(1, 80, 0))), DA, DB));
    assert!(!k.through(&frame(&ip(A, B, PROTO_ICMP, &[8, 0, 0, 0, 0, 0, 0, 0])), DA, DB));
    k.change(7, Some(ports::ALL));
    assert!(k.through(&frame(&ip(A, B, PROTO_ICMP, &[8, 0, 0, 0, 0, 0, 0, 0])), DA, DB));
}

#[test]
fn row_zero_is_for_all_others() {
    let k = Kernel::new();
    k.change(0, Some(LIST));
    k.change(7, Some(ports::NONE));
    assert!(!k.through(&tcp((A, 1), (B, 80), SYN), DA, DB));
    assert_eq!(k.see(&tcp((R, 1), (B, 80), SYN), Place::ToPod, DB), Verdict::Pass);
    assert_eq!(k.see(&tcp(("8.8.8.8", 1), (B, 80), SYN), Place::ToPod, DB), Verdict::Pass);
}

#[test]
fn a_change_cuts_flows_and_another_frees_them() {
    for (open, answer) in [
        (tcp((A, 4000), (B, 80), SYN), tcp((B, 80), (A, 4000), ACK)),
        (udp((A, 4000), (B, 80)), udp((B, 80), (A, 4000))),
    ] {
        let k = Kernel::new();
        assert!(k.through(&open, DA, DB) && k.through(&answer, DB, DA));
        k.change(7, None);
        let more =
            if open.0[23] == PROTO_TCP { tcp((A, 4000), (B, 80), ACK) } else { udp((A, 4000), (B, 80)) };
        // The answer is not taken for the beginning of a flow the other way, which nothing forbids.
        assert!(!k.through(&answer, DB, DA));
        assert!(!k.through(&more, DA, DB));
        assert!(!k.through(&answer, DB, DA));
        assert!(k.counted(NetCounter::Cut) >= 3);
        k.change(7, Some(LIST));
        assert!(k.through(&answer, DB, DA) && k.through(&more, DA, DB));
        // What changes nothing for it leaves it.
        k.change(99, Some(LIST));
        assert!(k.through(&more, DA, DB));
        assert!(k.counted(NetCounter::Rejudged) >= 1);
    }
}

#[test]
fn a_connection_the_other_way_is_judged_for_itself() {
    let k = Kernel::new();
    // B opens from the very port that A's flow had.
    k.endpoints.borrow_mut().get_mut(&address(A)).unwrap().ingress = 2;
    assert!(k.through(&tcp((A, 4000), (B, 80), SYN), DA, DB));
    assert!(k.through(&tcp((B, 80), (A, 4000), ACK), DB, DA));
    assert!(!k.through(&tcp((B, 80), (A, 4000), SYN), DB, DA));
}

#[test]
fn old_flows_are_forgotten() {
    let k = Kernel::new();
    k.endpoints.borrow_mut().get_mut(&address(A)).unwrap().ingress = 2;
    assert!(k.through(&udp((A, 4000), (B, 80)), DA, DB));
    k.now_s.set(1000 + flow_timeout_s::DATAGRAM + 1);
    assert!(!k.through(&udp((B, 80), (A, 4000)), DB, DA));
}

#[test]
fn nobody_sends_as_another() {
    let k = Kernel::new();
    assert_eq!(k.see(&tcp((A, 1), (B, 80), SYN), Place::FromPod, DB), Verdict::Drop);
    assert!(k.through(&tcp((A, 1), (B, 80), SYN), DA, DB));
    assert_eq!(k.see(&tcp((A, 1), (B, 80), ACK), Place::FromPod, 99), Verdict::Drop);
    assert_eq!(k.counted(NetCounter::Spoofed), 2);
}

#[test]
fn icmp_errors_need_a_flow() {
    let k = Kernel::new();
    let about = |sport| {
        let quoted = ip(B, R, PROTO_UDP, &transport(sport, 9, 0)[..8]);
        let mut l4 = vec![3, 1, 0, 0, 0, 0, 0, 0];
        l4.extend(quoted);
        frame(&ip("203.0.113.1", B, PROTO_ICMP, &l4))
    };
    assert_eq!(k.see(&about(5), Place::ToPod, DB), Verdict::Drop);
    assert_eq!(k.see(&udp((B, 5), (R, 9)), Place::FromPod, DB), Verdict::Pass);
    assert_eq!(k.see(&about(5), Place::ToPod, DB), Verdict::Pass);
    assert_eq!(k.see(&about(6), Place::ToPod, DB), Verdict::Drop);
}

#[test]
fn neighbours_are_no_matter_of_policies() {
    let k = Kernel::new();
    for (src, dst) in [("fe80::2", "fe80::1"), ("::", "ff02::1:ff00:1"), ("fd00::1", "fd00::2")] {
        let frame = frame(&ip(src, dst, PROTO_ICMPV6, &[135, 0, 0, 0, 0, 0, 0, 0]));
        assert_eq!(k.see(&frame, Place::ToPod, DB), Verdict::Pass);
    }
    let mut arp = vec![0; 12];
    arp.extend([0x08, 0x06]);
    assert_eq!(k.see(&Bytes(arp), Place::FromPod, DB), Verdict::Pass);
}

#[test]
fn flows_that_are_direct_go_past_the_stack() {
    let k = Kernel::new();
    let (there, back) = (tcp((A, 4000), (B, 80), ACK), tcp((B, 80), (A, 4000), ACK));
    assert!(k.through(&tcp((A, 4000), (B, 80), SYN), DA, DB));
    assert!(k.through(&back, DB, DA));
    assert_eq!(k.see(&there, Place::FromPod, DA), Verdict::Pass, "not a second old");
    k.now_s.set(1001);
    assert_eq!(k.see(&there, Place::FromPod, DA), Verdict::Peer(DB));
    assert_eq!(k.see(&back, Place::FromPod, DB), Verdict::Peer(DA));
    assert_eq!(k.see(&tcp((A, 4000), (B, 80), ACK | FIN), Place::FromPod, DA), Verdict::Peer(DB));
    k.change(7, None);
    assert_eq!(k.see(&there, Place::FromPod, DA), Verdict::Drop);
    k.config.set((9, 0));
    k.change(7, Some(LIST));
    assert_eq!(k.see(&there, Place::FromPod, DA), Verdict::Pass, "where it is switched off");
}

#[test]
fn a_queue_before_a_pod_keeps_its_flows_in_the_stack() {
    let k = Kernel::new();
    let queue = |on: bool| {
        let flags = if on { endpoint_flag::PEER | endpoint_flag::QUEUED } else { endpoint_flag::PEER };
        k.endpoints.borrow_mut().get_mut(&address(A)).unwrap().flags = flags;
        k.change(99, Some(LIST));
    };
    let (there, back) = (tcp((A, 4000), (B, 80), ACK), tcp((B, 80), (A, 4000), ACK));
    let (out, home) = (tcp((A, 4000), (R, 80), ACK), tcp((R, 80), (A, 4000), ACK));
    queue(true);
    assert!(k.through(&tcp((A, 4000), (B, 80), SYN), DA, DB) && k.through(&back, DB, DA));
    assert_eq!(k.see(&out, Place::FromPod, DA), Verdict::Pass);
    for s in 2..4 {
        k.now_s.set(1000 + s);
        for (packet, place, device) in [
            (&there, Place::FromPod, DA),
            (&there, Place::ToPod, DB),
            (&back, Place::FromPod, DB),
            (&back, Place::ToPod, DA),
            (&out, Place::FromPod, DA),
            (&home, Place::Arriving, 3),
            (&home, Place::ToPod, DA),
        ] {
            assert_eq!(k.see(packet, place, device), Verdict::Pass, "{place:?} {device}");
        }
    }
    queue(false);
    // What arrives is judged by the stack's way in after a change.
    assert_eq!(k.see(&home, Place::ToPod, DA), Verdict::Pass);
    assert_eq!(k.see(&home, Place::Arriving, 3), Verdict::Peer(DA));
    assert_eq!(k.see(&back, Place::FromPod, DB), Verdict::Peer(DA));
    assert_eq!(k.see(&there, Place::FromPod, DA), Verdict::Peer(DB));
    queue(true);
    assert_eq!(k.see(&home, Place::Arriving, 3), Verdict::Pass);
    assert_eq!(k.see(&back, Place::FromPod, DB), Verdict::Pass, "a limit that comes later holds at once");
}

#[test]
fn translated_flows_stay_in_the_stack() {
    let k = Kernel::new();
    k.endpoints.borrow_mut().get_mut(&address(B)).unwrap().ingress = 0;
    // A asks a service address; the stack sends it to B, and B's answer comes back as the service's.
    let service = "10.96.0.1";
    for s in 0..3 {
        k.now_s.set(1000 + s);
        assert_eq!(k.see(&tcp((A, 4000), (service, 80), ACK), Place::FromPod, DA), Verdict::Pass);
        assert_eq!(k.see(&tcp((A, 4000), (B, 8080), ACK), Place::ToPod, DB), Verdict::Pass);
        assert_eq!(k.see(&tcp((B, 8080), (A, 4000), ACK), Place::FromPod, DB), Verdict::Pass);
        assert_eq!(k.see(&tcp((service, 80), (A, 4000), ACK), Place::ToPod, DA), Verdict::Pass);
    }
}

#[test]
fn flows_with_other_nodes_are_direct_once_they_arrive_as_they_left() {
    let k = Kernel::new();
    let (there, back) = (tcp((A, 4000), (R, 80), ACK), tcp((R, 80), (A, 4000), ACK));
    for s in 0..3 {
        k.now_s.set(1000 + s);
        // Masqueraded: the answer arrives for the node and is only seen on its way into the pod.
        assert_eq!(k.see(&there, Place::FromPod, DA), Verdict::Pass);
        assert_eq!(k.see(&back, Place::ToPod, DA), Verdict::Pass);
    }
    assert_eq!(k.see(&back, Place::Arriving, 3), Verdict::Peer(DA));
    assert_eq!(k.see(&there, Place::FromPod, DA), Verdict::Out);
    // Somebody outside claims to be A.
    assert_eq!(k.see(&there, Place::Arriving, 3), Verdict::Pass);
}

#[test]
fn without_room_everything_is_judged_for_itself() {
    let k = Kernel::new();
    k.full.set(true);
    assert!(k.through(&tcp((A, 1), (B, 80), SYN), DA, DB));
    assert!(!k.through(&tcp((A, 1), (B, 81), SYN), DA, DB));
    assert!(k.counted(NetCounter::FlowFull) >= 1);
}

#[test]
fn a_hop_is_taken_off_with_its_checksum() {
    let mut packet = tcp((A, 1), (B, 80), ACK);
    let sum = crate::golden::internet_checksum(&packet.0[14..34]);
    packet.0[24..26].copy_from_slice(&sum.to_be_bytes());
    let mut seen = NOTHING;
    assert_eq!(parse::parse(&packet, &mut seen), Kind::Flow);
    assert!(pass_hop(&mut packet, seen.v6, seen.proto, seen.hops));
    assert_eq!(packet.0[22], 63);
    assert_eq!(crate::golden::internet_checksum(&packet.0[14..34]), 0, "the header's sum is right");
}

#[test]
fn short_frames_are_refused_at_pods_and_never_read_past() {
    let k = Kernel::new();
    for whole in
        [tcp((A, 1), (B, 80), SYN), frame(&ip("fd00::1", "fd00::2", PROTO_TCP, &transport(1, 2, SYN)))]
    {
        for len in 14..whole.0.len() {
            let cut = Bytes(whole.0[..len].to_vec());
            k.see(&cut, Place::ToPod, DB);
            assert_eq!(k.see(&cut, Place::Arriving, 3), Verdict::Pass);
        }
    }
}
