//! Golden frames: what goes into a program and, byte for byte, what must come out. Invariant: the expected frames are
//! built with checksums computed in full, never by the code under test. Used by this crate's tests on the host and by
//! the prog suite for the loaded programs.

use sheave_ebpf_abi::{Address, Config, PROTO_TCP, PROTO_UDP, Plain as _};
use sheave_ebpf_core::open::first_other_port;
use sheave_ebpf_core::packet::{self, Headers};
use std::net::IpAddr;
use std::vec::Vec;

#[path = "golden_direct.rs"]
pub mod direct;
#[path = "golden_doors.rs"]
pub mod doors;

/// TCP flags of a connection's first packet.
pub const SYN: u8 = 0x02;
/// TCP flags of a packet within a connection.
pub const ACK: u8 = 0x10;
/// TCP flags of the last packet of a direction.
pub const FIN_ACK: u8 = 0x11;
/// TCP flags of a refusal.
pub const RST: u8 = 0x04;
/// The bit of [`Frame::fragment`] that more fragments follow.
pub const MORE: u16 = 0x2000;
/// Payload of frames that say nothing else.
pub const PAYLOAD: &[u8] = b"sheave golden payload!!";

/// What a frame carries over IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4 {
    /// TCP with these flags.
    Tcp(u8),
    /// UDP with a checksum.
    Udp,
    /// UDP over IPv4 without one.
    UdpNoSum,
    /// The payload of a fragment of this protocol, without header.
    Rest(u8),
}

/// A frame before it is bytes.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Source address and port.
    pub src: (IpAddr, u16),
    /// Destination address and port, of the same family.
    pub dst: (IpAddr, u16),
    /// Transport.
    pub l4: L4,
    /// Words of IPv4 options, or eight-byte units of one IPv6 destination options header.
    pub options: u8,
    /// IPv4 flags and fragment offset; with IPv6 the same in a fragment header when it is not 0.
    pub fragment: u16,
    /// TTL or hop limit.
    pub hops: u8,
    /// TCP sequence and acknowledgement numbers.
    pub numbers: [u32; 2],
    /// Bytes of payload more than [`PAYLOAD`]; `None` for none at all.
    pub more: Option<usize>,
    /// Whether the transport checksum is wrong.
    pub wrong: bool,
    /// Whether the Ethernet addresses are those of an answer.
    pub turned: bool,
}

impl Frame {
    /// A plain frame.
    pub fn new(src: (&str, u16), dst: (&str, u16), l4: L4) -> Self {
        let parse = |s: &str| s.parse::<IpAddr>().expect("an address in a test");
        Self {
            src: (parse(src.0), src.1),
            dst: (parse(dst.0), dst.1),
            l4,
            options: 0,
            fragment: 0,
            hops: 64,
            numbers: [1, 2],
            more: Some(0),
            wrong: false,
            turned: false,
        }
    }

    /// The frame after a router.
    pub fn passed(self) -> Self {
        Self { hops: self.hops - 1, ..self }
    }

    fn transport(&self) -> (u8, Vec<u8>) {
        let mut payload = Vec::new();
        if let Some(more) = self.more {
            payload.extend(PAYLOAD);
            payload.extend(std::vec![0x5e; more]);
        }
        let mut l4 = Vec::new();
        l4.extend(self.src.1.to_be_bytes());
        l4.extend(self.dst.1.to_be_bytes());
        let (proto, check_at) = match self.l4 {
            L4::Tcp(flags) => {
                self.numbers.iter().for_each(|number| l4.extend(number.to_be_bytes()));
                let window = if self.turned { 0 } else { 0x20 };
                l4.extend([0x50, flags, window, 0, 0, 0, 0, 0]);
                (6_u8, 16)
            }
            L4::Udp | L4::UdpNoSum => {
                l4.extend((8 + payload.len() as u16).to_be_bytes());
                l4.extend([0, 0]);
                (17, 6)
            }
            L4::Rest(proto) => return (proto, payload),
        };
        l4.extend(payload);
        if self.l4 != L4::UdpNoSum {
            let mut sum =
                !internet_checksum(&[pseudo(self.src.0, self.dst.0, proto, l4.len()), l4.clone()].concat());
            if self.wrong {
                let wrong = u32::from(sum) + 0x0123;
                sum = (wrong & 0xffff) as u16 + (wrong >> 16) as u16;
            }
            sum = if self.l4 == L4::Udp && !sum == 0 { 0xffff } else { !sum };
            l4[check_at..check_at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        (proto, l4)
    }

    /// The frame's bytes, Ethernet header first, all checksums filled in.
    pub fn bytes(&self) -> Vec<u8> {
        let (proto, l4) = self.transport();
        let mut out = ethernet(self.turned);
        match (self.src.0, self.dst.0) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                out.extend([0x08, 0x00]);
                let mut ip = std::vec![0x45 + self.options, 0];
                ip.extend((20 + 4 * u16::from(self.options) + l4.len() as u16).to_be_bytes());
                ip.extend(if self.turned { [0, 0] } else { [0x12, 0x34] });
                ip.extend(if self.turned { 0x4000 } else { self.fragment }.to_be_bytes());
                ip.extend([self.hops, proto, 0, 0]);
                ip.extend(src.octets());
                ip.extend(dst.octets());
                ip.extend(std::vec![1_u8; 4 * usize::from(self.options)]);
                let sum = internet_checksum(&ip);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                out.extend(ip);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let (first, extensions) = self.extensions(proto);
                out.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                out.extend(((l4.len() + extensions.len()) as u16).to_be_bytes());
                out.extend([first, self.hops]);
                out.extend(src.octets());
                out.extend(dst.octets());
                out.extend(extensions);
            }
            _ => panic!("a frame has one family"),
        }
        out.extend(l4);
        out
    }

    /// The IPv6 extension headers, and what the first one of them is.
    fn extensions(&self, proto: u8) -> (u8, Vec<u8>) {
        let mut next = proto;
        let mut all = Vec::new();
        if self.fragment != 0 {
            let [o0, o1] = (self.fragment << 3 | self.fragment >> 13 & 1).to_be_bytes();
            all = std::vec![next, 0, o0, o1, 0xca, 0xfe, 0x12, 0x34];
            next = 44;
        }
        if self.options != 0 {
            // One PadN option that fills the header.
            let len = 8 * usize::from(self.options);
            let mut options = std::vec![next, self.options - 1, 1, (len - 4) as u8];
            options.extend(std::vec![0_u8; len - 4]);
            options.extend(all);
            all = options;
            next = 60;
        }
        (next, all)
    }
}

fn ethernet(turned: bool) -> Vec<u8> {
    let (a, b) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    if turned { [b, a].concat() } else { [a, b].concat() }
}

fn pseudo(src: IpAddr, dst: IpAddr, proto: u8, len: usize) -> Vec<u8> {
    let mut pseudo = Vec::new();
    for addr in [src, dst] {
        match addr {
            IpAddr::V4(a) => pseudo.extend(a.octets()),
            IpAddr::V6(a) => pseudo.extend(a.octets()),
        }
    }
    pseudo.extend([0, proto]);
    pseudo.extend((len as u16).to_be_bytes());
    pseudo
}

/// An ICMP or ICMPv6 error.
#[derive(Clone, Debug)]
pub struct Icmp {
    /// Who says it.
    pub src: IpAddr,
    /// To whom.
    pub dst: IpAddr,
    /// Type and code.
    pub what: [u8; 2],
    /// The word after the checksum.
    pub word: u32,
    /// The IP packet that it quotes, as much as is quoted.
    pub quoted: Vec<u8>,
    /// TTL or hop limit.
    pub hops: u8,
    /// Whether it is an answer that a program made.
    pub turned: bool,
}

impl Icmp {
    /// The frame's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut icmp = self.what.to_vec();
        icmp.extend([0, 0]);
        icmp.extend(self.word.to_be_bytes());
        icmp.extend(&self.quoted);
        let mut out = ethernet(self.turned);
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let sum = internet_checksum(&icmp);
                icmp[2..4].copy_from_slice(&sum.to_be_bytes());
                let mut ip = std::vec![0x45, 0];
                ip.extend((20 + icmp.len() as u16).to_be_bytes());
                ip.extend([0, 0, 0x40, 0, self.hops, 1, 0, 0]);
                ip.extend(src.octets());
                ip.extend(dst.octets());
                let sum = internet_checksum(&ip);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                out.extend([0x08, 0x00]);
                out.extend(ip);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let sum =
                    internet_checksum(&[pseudo(self.src, self.dst, 58, icmp.len()), icmp.clone()].concat());
                icmp[2..4].copy_from_slice(&sum.to_be_bytes());
                out.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                out.extend((icmp.len() as u16).to_be_bytes());
                out.extend([58, self.hops]);
                out.extend(src.octets());
                out.extend(dst.octets());
            }
            _ => panic!("a frame has one family"),
        }
        out.extend(icmp);
        out
    }
}

/// RFC 1071, the slow way.
pub fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Which program sees the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// From outside.
    Ingress,
    /// From a pod.
    PodIngress,
    /// From a pod whose sockets need no help.
    PodAnswer,
    /// Towards outside, or towards a pod.
    Egress,
}

/// What must become of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Out {
    /// On to the stack, like this.
    Pass(Vec<u8>),
    /// Out of another device, like this.
    Redirect(Vec<u8>),
    /// Into a pod's namespace, like this.
    Enter(Vec<u8>),
    /// Back, like this.
    Reply(Vec<u8>),
    /// Gone.
    Drop,
}

/// One step of a golden conversation.
#[derive(Clone, Debug)]
pub struct Step {
    /// What it shows.
    pub name: &'static str,
    /// The program.
    pub hook: Hook,
    /// The frame that goes in.
    pub input: Vec<u8>,
    /// What comes out.
    pub output: Out,
}

/// The node that the conversation happens on. Every service has a single endpoint a family, so that no choice is left.
pub struct Place {
    /// The node's address.
    pub node: &'static str,
    /// The endpoint of this node.
    pub pod: &'static str,
    /// Another pod of this node.
    pub other_pod: &'static str,
    /// The endpoint of another node; the way there takes packets of [`REMOTE_MTU`] bytes.
    pub remote: &'static str,
    /// A client outside.
    pub client: &'static str,
    /// Another one, which is in no source range.
    pub stranger: &'static str,
    /// A router somewhere between.
    pub router: &'static str,
    /// Cluster IP of the service that [`PORT_LOCAL`] belongs to.
    pub cluster_ip: &'static str,
    /// Its load balancer's address, for clients in [`Self::range`] only.
    pub balancer: &'static str,
    /// The source range.
    pub range: &'static str,
    /// Another node.
    pub other_node: &'static str,
    /// Load balancer's address of the service that [`PORT_DIRECT_LOCAL`] belongs to, for clients in [`Self::range`] only.
    pub direct: &'static str,
}

/// The IPv4 and the IPv6 place.
pub const PLACES: [Place; 2] = [
    Place {
        node: "192.0.2.1",
        pod: "10.244.0.5",
        other_pod: "10.244.0.6",
        remote: "10.244.9.5",
        client: "198.51.100.7",
        stranger: "203.0.113.9",
        router: "100.64.0.1",
        cluster_ip: "10.96.0.1",
        balancer: "192.0.2.77",
        range: "198.51.100.0/24",
        other_node: "192.0.2.2",
        direct: "192.0.2.78",
    },
    Place {
        node: "2001:db8::1",
        pod: "fd00:244::5",
        other_pod: "fd00:244::6",
        remote: "fd00:244:9::5",
        client: "2001:db8:ffff::7",
        stranger: "2001:db8:eeee::9",
        router: "fd00:64::1",
        cluster_ip: "fd00:96::1",
        balancer: "2001:db8::77",
        range: "2001:db8:ffff::/48",
        other_node: "2001:db8::2",
        direct: "2001:db8::78",
    },
];

/// NodePort with an endpoint of this node.
pub const PORT_LOCAL: u16 = 30080;
/// NodePort whose only endpoint is on another node.
pub const PORT_REMOTE: u16 = 30081;
/// Another NodePort of the endpoint of this node.
pub const PORT_SAME_POD: u16 = 30082;
/// NodePort of a service without endpoints.
pub const PORT_EMPTY: u16 = 30083;
/// NodePort of a service whose only endpoint is on another node, and which serves outside by local ones only.
pub const PORT_LOCAL_ONLY: u16 = 30084;
/// NodePort with direct return whose only endpoint is on another node.
pub const PORT_DIRECT: u16 = 30085;
/// NodePort with direct return and an endpoint of this node.
pub const PORT_DIRECT_LOCAL: u16 = 30086;
/// Port of the endpoints.
pub const PORT_POD: u16 = 8080;
/// Port of cluster IPs and load balancers.
pub const PORT_SERVICE: u16 = 80;
/// Largest IP packet that gets to the endpoint of another node.
pub const REMOTE_MTU: u32 = 1280;

impl Place {
    /// Whether it is the IPv4 place.
    pub fn v4(&self) -> bool {
        self.node.contains('.')
    }
}

/// The conversation, in order: later steps rely on the flows of earlier ones.
pub fn conversation(p: &Place) -> Vec<Step> {
    let mut steps = Vec::new();
    steps.extend(local(p));
    steps.extend(remote(p));
    steps.extend(pods(p));
    steps.extend(refusals(p));
    steps.extend(strangers(p));
    steps.extend(fragments(p));
    steps.extend(errors_kept(p));
    steps.extend(errors_masqueraded(p));
    steps.extend(endings(p));
    steps.extend(direct::sent(p));
    steps.extend(direct::received(p));
    steps.extend(direct::left_alone(p));
    steps
}

fn pass(name: &'static str, hook: Hook, input: Frame, output: Frame) -> Step {
    Step { name, hook, input: input.bytes(), output: Out::Pass(output.bytes()) }
}

fn redirect(name: &'static str, hook: Hook, input: Frame, output: Frame) -> Step {
    Step { name, hook, input: input.bytes(), output: Out::Redirect(output.passed().bytes()) }
}

fn reversed(frame: Frame) -> Frame {
    let l4 = if let L4::Tcp(_) = frame.l4 { L4::Tcp(SYN | ACK) } else { frame.l4 };
    Frame { src: frame.dst, dst: frame.src, l4, ..frame }
}

/// Ports for flows whose source changes.
pub const SNAT_PORTS: (u16, u16) = (61_000, 65_535);

/// The port that a flow gets which begins with this frame, and whose own one is in use.
fn other_port(frame: &Frame) -> u16 {
    let at = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => Address::v4(u32::from_ne_bytes(ip.octets())),
        IpAddr::V6(ip) => {
            let word = |n: usize| u32::from_ne_bytes(core::array::from_fn(|i| ip.octets()[4 * n + i]));
            Address::v6([word(0), word(1), word(2), word(3)])
        }
    };
    let proto = if let L4::Tcp(_) = frame.l4 { PROTO_TCP } else { PROTO_UDP };
    let headers = Headers {
        src: at(frame.src.0),
        dst: at(frame.dst.0),
        sport: frame.src.1.to_be(),
        dport: frame.dst.1.to_be(),
        proto,
        ..packet::NOTHING
    };
    let (snat_port_min, snat_port_max) = SNAT_PORTS;
    first_other_port(&Config { snat_port_min, snat_port_max, ..Config::zeroed() }, &headers)
}

/// To the endpoint of this node and back, the client's address kept.
fn local(p: &Place) -> Vec<Step> {
    use Hook::{Egress, Ingress};
    let mut steps = Vec::new();
    let mut kinds = std::vec![("tcp", L4::Tcp(SYN), 20_000), ("udp", L4::Udp, 20_001)];
    if p.v4() {
        kinds.push(("udp without checksum", L4::UdpNoSum, 20_002));
    }
    for (name, l4, port) in kinds {
        let there = Frame::new((p.client, port), (p.node, PORT_LOCAL), l4);
        let dnat = Frame::new((p.client, port), (p.pod, PORT_POD), l4);
        steps.push(pass(name, Ingress, there, dnat));
        steps.push(pass(name, Egress, reversed(dnat), reversed(there)));
        for options in [1, 3] {
            let with = |frame| Frame { options, ..frame };
            steps.push(pass("options", Ingress, with(there), with(dnat)));
            steps.push(pass("options", Egress, with(reversed(dnat)), with(reversed(there))));
        }
        if l4 != L4::UdpNoSum {
            let wrong = |frame| Frame { wrong: true, ..frame };
            steps.push(pass("wrong checksum stays wrong", Ingress, wrong(there), wrong(dnat)));
        }
    }
    steps
}

/// To the endpoint of another node and back, masqueraded.
fn remote(p: &Place) -> Vec<Step> {
    use Hook::Ingress;
    let mut steps = Vec::new();
    for (l4, port) in [(L4::Tcp(SYN), 20_010), (L4::Udp, 20_011)] {
        let there = Frame::new((p.client, port), (p.node, PORT_REMOTE), l4);
        let nat = Frame::new((p.node, port), (p.remote, PORT_POD), l4);
        steps.push(redirect("remote", Ingress, there, nat));
        steps.push(redirect("remote", Ingress, reversed(nat), reversed(there)));
        let with = |frame| Frame { options: 2, ..frame };
        steps.push(redirect("remote, options", Ingress, with(there), with(nat)));
        let last = Frame { hops: 1, ..there };
        let what = if p.v4() { [11, 0] } else { [3, 0] };
        steps.push(answered("last hop", last, what, 0));
        let large = Frame { more: Some(1300), ..there };
        let (what, word) = if p.v4() { ([3, 4], REMOTE_MTU) } else { ([2, 0], REMOTE_MTU) };
        steps.push(answered("too big", large, what, word));
    }
    steps
}

/// An ICMP error as an answer to `frame`.
pub(crate) fn answered(name: &'static str, frame: Frame, what: [u8; 2], word: u32) -> Step {
    let input = frame.bytes();
    let max = if frame.src.0.is_ipv4() { 576 - 28 } else { 1280 - 48 };
    let quoted = &input[14..];
    let quoted = quoted[..quoted.len().min(max) & !3].to_vec();
    let icmp = Icmp { src: frame.dst.0, dst: frame.src.0, what, word, quoted, hops: 64, turned: true };
    Step { name, hook: Hook::Ingress, input, output: Out::Reply(icmp.bytes()) }
}

/// What pods send that was not translated at their sockets.
fn pods(p: &Place) -> Vec<Step> {
    use Hook::{Egress, PodIngress};
    let mut steps = Vec::new();
    for (l4, port) in [(L4::Tcp(SYN), 20_020), (L4::Udp, 20_021)] {
        let there = Frame::new((p.other_pod, port), (p.cluster_ip, PORT_SERVICE), l4);
        let dnat = Frame::new((p.other_pod, port), (p.pod, PORT_POD), l4);
        steps.push(pass("pod to pod", PodIngress, there, dnat));
        steps.push(pass("pod to pod, before the stack", PodIngress, reversed(dnat), reversed(dnat)));
        steps.push(pass("pod to pod", Egress, reversed(dnat), reversed(there)));
        let there = Frame::new((p.other_pod, port), (p.node, PORT_REMOTE), l4);
        let dnat = Frame::new((p.other_pod, port), (p.remote, PORT_POD), l4);
        steps.push(pass("pod to another node's", PodIngress, there, dnat));
        steps.push(pass("pod to another node's", Egress, reversed(dnat), reversed(there)));
        let there = Frame::new((p.pod, port), (p.cluster_ip, PORT_SERVICE), l4);
        let nat = Frame::new((p.node, port), (p.pod, PORT_POD), l4);
        steps.push(redirect("hairpin", PodIngress, there, nat));
        steps.push(redirect("hairpin", PodIngress, reversed(nat), reversed(there)));
    }
    steps
}

fn refusals(p: &Place) -> Vec<Step> {
    use Hook::{Ingress, PodIngress};
    let to = |port, l4| Frame::new((p.client, 41_000), (p.node, port), l4);
    let mut steps = Vec::new();
    let reset = |flags, numbers| Frame { turned: true, more: None, numbers, ..reversed_as(p, flags) };
    let empty = |flags, numbers| Frame { numbers, ..to(PORT_EMPTY, L4::Tcp(flags)) };
    let data = PAYLOAD.len() as u32;
    for (name, input, output) in [
        ("no endpoints", empty(SYN, [7, 0]), reset(RST | ACK, [0, 8 + data])),
        (
            "no endpoints, options",
            Frame { options: 2, ..empty(SYN, [7, 0]) },
            reset(RST | ACK, [0, 8 + data]),
        ),
        ("no endpoints, under way", empty(ACK, [7, 99]), reset(RST, [99, 0])),
    ] {
        steps.push(Step { name, hook: Ingress, input: input.bytes(), output: Out::Reply(output.bytes()) });
    }
    let what = if p.v4() { [3, 3] } else { [1, 4] };
    steps.push(answered("no endpoints", to(PORT_EMPTY, L4::Udp), what, 0));
    let with = Frame { options: 1, more: Some(900), ..to(PORT_EMPTY, L4::Udp) };
    steps.push(answered("no endpoints, options", with, what, 0));
    for l4 in [L4::Tcp(SYN), L4::Udp] {
        let dropped =
            |name, frame: Frame| Step { name, hook: Ingress, input: frame.bytes(), output: Out::Drop };
        steps.push(dropped("endpoints elsewhere only", to(PORT_LOCAL_ONLY, l4)));
        let balancer = |client, port| Frame::new((client, port), (p.balancer, PORT_SERVICE), l4);
        let pod = |client, port| Frame::new((client, port), (p.pod, PORT_POD), l4);
        steps.push(dropped("outside of the source ranges", balancer(p.stranger, 41_001)));
        steps.push(pass("in a source range", Ingress, balancer(p.client, 41_001), pod(p.client, 41_001)));
        let inside = pass(
            "source ranges are for outside",
            PodIngress,
            balancer(p.other_pod, 41_001),
            pod(p.other_pod, 41_001),
        );
        steps.push(inside);
    }
    steps
}

/// What the empty service's port says to the client.
fn reversed_as(p: &Place, flags: u8) -> Frame {
    Frame::new((p.node, PORT_EMPTY), (p.client, 41_000), L4::Tcp(flags))
}

/// What is none of the programs' business.
fn strangers(p: &Place) -> Vec<Step> {
    use Hook::{Egress, Ingress, PodIngress};
    let syn = |from, to| Frame::new(from, to, L4::Tcp(SYN));
    let mut steps = Vec::new();
    for (name, hook, frame) in [
        ("no service", Ingress, syn((p.client, 42_000), (p.node, 30_099))),
        ("not a NodePort", Ingress, syn((p.client, 42_000), (p.node, 22))),
        ("not for this node", Ingress, syn((p.client, 42_000), (p.pod, PORT_LOCAL))),
        ("cluster IP from outside", Ingress, syn((p.client, 42_000), (p.cluster_ip, PORT_SERVICE))),
        ("pod without service", PodIngress, syn((p.pod, 42_000), (p.client, 80))),
        ("answer of a connection that is not ours", Egress, syn((p.pod, PORT_POD), (p.client, 42_999))),
        ("reset of nothing", Ingress, Frame::new((p.client, 42_001), (p.node, PORT_LOCAL), L4::Tcp(RST))),
    ] {
        steps.push(pass(name, hook, frame, frame));
    }
    // The tag is in the frame where the device does not take it off.
    let mut tagged = syn((p.client, 42_000), (p.node, PORT_LOCAL)).bytes();
    tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
    steps.push(Step { name: "VLAN", hook: Ingress, input: tagged.clone(), output: Out::Pass(tagged) });
    steps
}

fn fragments(p: &Place) -> Vec<Step> {
    use Hook::{Egress, Ingress};
    let mut steps = Vec::new();
    let first = |frame| Frame { fragment: MORE, ..frame };
    let later = |frame| Frame { fragment: 4, l4: L4::Rest(17), ..frame };
    let there = Frame::new((p.client, 20_001), (p.node, PORT_LOCAL), L4::Udp);
    let dnat = Frame::new((p.client, 20_001), (p.pod, PORT_POD), L4::Udp);
    steps.push(pass("later fragment first", Ingress, later(there), later(there)));
    steps.push(pass("first fragment", Ingress, first(there), first(dnat)));
    steps.push(pass("later fragment", Ingress, later(there), later(dnat)));
    steps.push(pass("first fragment", Egress, first(reversed(dnat)), first(reversed(there))));
    steps.push(pass("later fragment", Egress, later(reversed(dnat)), later(reversed(there))));
    let there = Frame::new((p.client, 20_011), (p.node, PORT_REMOTE), L4::Udp);
    let nat = Frame::new((p.node, 20_011), (p.remote, PORT_POD), L4::Udp);
    steps.push(redirect("first fragment", Ingress, first(there), first(nat)));
    steps.push(redirect("later fragment", Ingress, later(there), later(nat)));
    let with = |frame| Frame { options: 1, ..frame };
    steps.push(redirect("later fragment, options", Ingress, with(later(there)), with(later(nat))));
    steps
}

/// An error from `src` to `dst` about `frame`, of which `cut` bytes of the transport header are quoted.
fn error(src: &str, dst: IpAddr, what: [u8; 2], frame: Frame, cut: Option<usize>) -> Icmp {
    let bytes = frame.bytes();
    let ip = if dst.is_ipv4() { 20 } else { 40 };
    let len = cut.map_or(bytes.len() - 14, |cut| ip + cut);
    let src = src.parse().expect("an address in a test");
    Icmp { src, dst, what, word: 1400, quoted: bytes[14..14 + len].to_vec(), hops: 64, turned: false }
}

/// Errors about connections whose client's address is kept: of the endpoint or a router, and of the client's side.
fn errors_kept(p: &Place) -> Vec<Step> {
    use Hook::{Egress, Ingress};
    let mut steps = Vec::new();
    let what = if p.v4() { [3, 3] } else { [1, 4] };
    let big = if p.v4() { [3, 4] } else { [2, 0] };
    let mut push = |name, hook, input: Icmp, output: Icmp| {
        steps.push(Step { name, hook, input: input.bytes(), output: Out::Pass(output.bytes()) });
    };
    for (l4, port) in [(L4::Tcp(ACK), 20_000), (L4::Udp, 20_001)] {
        let there = Frame::new((p.client, port), (p.node, PORT_LOCAL), l4);
        let dnat = Frame::new((p.client, port), (p.pod, PORT_POD), l4);
        let (client, node, pod) = (there.src.0, there.dst.0, dnat.dst.0);
        for cut in [Some(8), None] {
            push(
                "the endpoint's error",
                Egress,
                error(p.pod, client, what, dnat, cut),
                error(p.node, client, what, there, cut),
            );
            push(
                "a router's error",
                Egress,
                error(p.router, client, big, dnat, cut),
                error(p.router, client, big, there, cut),
            );
            push(
                "an error about an answer",
                Ingress,
                error(p.router, node, big, reversed(there), cut),
                error(p.router, pod, big, reversed(dnat), cut),
            );
            push(
                "the client's error about an answer",
                Ingress,
                error(p.client, node, what, reversed(there), cut),
                error(p.client, pod, what, reversed(dnat), cut),
            );
        }
        let strange = Frame::new((p.client, 9), (p.node, 9), l4);
        let unchanged = error(p.router, client, what, strange, None);
        push("an error about something else", Ingress, unchanged.clone(), unchanged.clone());
        push("an error about something else", Egress, unchanged.clone(), unchanged);
        let short = error(p.router, client, what, dnat, Some(2));
        push("an error that quotes too little", Egress, short.clone(), short);
    }
    steps
}

/// Errors about masqueraded connections.
fn errors_masqueraded(p: &Place) -> Vec<Step> {
    let mut steps = Vec::new();
    let what = if p.v4() { [3, 3] } else { [1, 4] };
    let big = if p.v4() { [3, 4] } else { [2, 0] };
    for (l4, port) in [(L4::Tcp(ACK), 20_010), (L4::Udp, 20_011)] {
        let there = Frame::new((p.client, port), (p.node, PORT_REMOTE), l4);
        let nat = Frame::new((p.node, port), (p.remote, PORT_POD), l4);
        let (client, node, remote) = (there.src.0, there.dst.0, nat.dst.0);
        for cut in [Some(8), None] {
            for (name, input, output) in [
                (
                    "the endpoint's error",
                    error(p.remote, node, what, nat, cut),
                    error(p.node, client, what, there, cut),
                ),
                (
                    "a router's error",
                    error(p.router, node, big, nat, cut),
                    error(p.router, client, big, there, cut),
                ),
                (
                    "an error about an answer",
                    error(p.router, node, big, reversed(there), cut),
                    error(p.node, remote, big, reversed(nat), cut),
                ),
            ] {
                let output = Out::Redirect(Icmp { hops: 63, ..output }.bytes());
                steps.push(Step { name, hook: Hook::Ingress, input: input.bytes(), output });
            }
        }
    }
    steps
}

/// Tuples that are used again.
fn endings(p: &Place) -> Vec<Step> {
    use Hook::{Egress, Ingress};
    let mut steps = Vec::new();
    // The client's port towards the endpoint is taken by another address of a service: a port of ours instead.
    let again = Frame::new((p.client, 20_001), (p.node, PORT_SAME_POD), L4::Udp);
    let other = Frame::new((p.client, other_port(&again)), (p.pod, PORT_POD), L4::Udp);
    steps.push(pass("tuple in use", Ingress, again, other));
    steps.push(pass("tuple in use", Egress, reversed(other), reversed(again)));
    let what = if p.v4() { [3, 3] } else { [1, 4] };
    let about = error(p.pod, other.src.0, what, other, None);
    let ours = error(p.node, again.src.0, what, again, None);
    let output = Out::Pass(ours.bytes());
    steps.push(Step { name: "an error about it", hook: Egress, input: about.bytes(), output });
    let there = |flags| Frame::new((p.client, 20_000), (p.node, PORT_LOCAL), L4::Tcp(flags));
    let dnat = |flags| Frame::new((p.client, 20_000), (p.pod, PORT_POD), L4::Tcp(flags));
    let turn = |frame: Frame| Frame { l4: frame.l4, ..reversed(frame) };
    steps.push(pass("fin", Ingress, there(FIN_ACK), dnat(FIN_ACK)));
    let fin = |frame| Frame { l4: L4::Tcp(FIN_ACK), ..turn(frame) };
    steps.push(pass("fin", Egress, fin(dnat(ACK)), fin(there(ACK))));
    let ended = |steps: &mut Vec<Step>| {
        steps.push(pass("fin", Ingress, there(FIN_ACK), dnat(FIN_ACK)));
        steps.push(pass("fin", Egress, fin(dnat(ACK)), fin(there(ACK))));
    };
    steps.push(pass("anew after the end", Ingress, there(SYN), dnat(SYN)));
    steps.push(pass("anew after the end", Egress, turn(dnat(SYN)), turn(there(SYN))));
    // The client's port again, past the service: the way there may be another one, or seen.
    ended(&mut steps);
    steps.push(pass("past the service after the end", Egress, turn(dnat(SYN)), turn(dnat(SYN))));
    steps.push(pass("the flow has ended", Egress, turn(dnat(ACK)), turn(dnat(ACK))));
    steps.push(pass("and anew", Ingress, there(SYN), dnat(SYN)));
    steps.push(pass("and anew", Egress, turn(dnat(SYN)), turn(there(SYN))));
    ended(&mut steps);
    steps.push(pass("past the service after the end", Ingress, dnat(SYN), dnat(SYN)));
    let refused = |frame| Frame { l4: L4::Tcp(RST | ACK), ..frame };
    steps.push(pass("refused past the service", Egress, refused(turn(dnat(SYN))), refused(turn(dnat(SYN)))));
    steps.push(pass("and anew", Ingress, there(SYN), dnat(SYN)));
    steps.push(pass("past the service meanwhile", Ingress, dnat(SYN), dnat(SYN)));
    steps.push(pass("a connection that has not ended", Egress, turn(dnat(SYN)), turn(there(SYN))));
    // The client's port through another address of a service, when the first connection has ended: nothing is to be told
    // apart. What still comes by the first one is no part of the new one.
    ended(&mut steps);
    let by_other = |flags| Frame::new((p.client, 20_000), (p.node, PORT_SAME_POD), L4::Tcp(flags));
    steps.push(pass("tuple of one that ended", Ingress, by_other(SYN), dnat(SYN)));
    steps.push(pass("tuple of one that ended", Egress, turn(dnat(SYN)), turn(by_other(SYN))));
    let late = Frame::new((p.client, other_port(&there(ACK))), (p.pod, PORT_POD), L4::Tcp(ACK));
    steps.push(pass("late, of one that ended", Ingress, there(ACK), late));
    steps.push(pass("and the new one goes on", Egress, turn(dnat(ACK)), turn(by_other(ACK))));
    // This node itself uses the port that a masqueraded connection had.
    let there = |flags| Frame::new((p.client, 20_010), (p.node, PORT_REMOTE), L4::Tcp(flags));
    let nat = |flags| Frame::new((p.node, 20_010), (p.remote, PORT_POD), L4::Tcp(flags));
    steps.push(redirect("fin", Ingress, there(FIN_ACK), nat(FIN_ACK)));
    steps.push(redirect("fin", Ingress, fin(nat(ACK)), fin(there(ACK))));
    steps.push(pass("this node's own after the end", Ingress, turn(nat(SYN)), turn(nat(SYN))));
    steps.push(pass("the flow has ended", Ingress, turn(nat(ACK)), turn(nat(ACK))));
    steps.push(redirect("and anew", Ingress, there(SYN), nat(SYN)));
    steps.push(redirect("and anew", Ingress, turn(nat(SYN)), turn(there(SYN))));
    steps
}
