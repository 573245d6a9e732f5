//! Golden NodePort frames: what goes in and, byte for byte, what must come out. Invariant: the expected frames are
//! built with checksums computed in full, never by the code under test. Used by this crate's tests on the host and
//! by the prog suite for the loaded programs.

use std::net::IpAddr;
use std::vec::Vec;

/// TCP flags of a connection's first packet.
pub const SYN: u8 = 0x02;
/// TCP flags of a packet within a connection.
pub const ACK: u8 = 0x10;
/// TCP flags of the last packet of a direction.
pub const FIN_ACK: u8 = 0x11;

/// What a frame carries over IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4 {
    /// TCP with these flags.
    Tcp(u8),
    /// UDP with a checksum.
    Udp,
    /// UDP over IPv4 without one.
    UdpNoSum,
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
    /// IPv4 flags and fragment offset.
    pub fragment: u16,
}

impl Frame {
    /// A plain frame.
    pub fn new(src: (&str, u16), dst: (&str, u16), l4: L4) -> Self {
        let parse = |s: &str| s.parse::<IpAddr>().expect("an address in a test");
        Self { src: (parse(src.0), src.1), dst: (parse(dst.0), dst.1), l4, options: 0, fragment: 0 }
    }

    /// The frame's bytes, Ethernet header first, all checksums filled in.
    pub fn bytes(&self) -> Vec<u8> {
        let payload = b"sheave golden payload!!";
        let mut l4 = Vec::new();
        l4.extend(self.src.1.to_be_bytes());
        l4.extend(self.dst.1.to_be_bytes());
        let (proto, check_at) = match self.l4 {
            L4::Tcp(flags) => {
                l4.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
                (6_u8, 16)
            }
            L4::Udp | L4::UdpNoSum => {
                l4.extend((8 + payload.len() as u16).to_be_bytes());
                l4.extend([0, 0]);
                (17, 6)
            }
        };
        l4.extend(payload);
        let mut pseudo = Vec::new();
        for addr in [self.src.0, self.dst.0] {
            match addr {
                IpAddr::V4(a) => pseudo.extend(a.octets()),
                IpAddr::V6(a) => pseudo.extend(a.octets()),
            }
        }
        pseudo.extend([0, proto]);
        pseudo.extend((l4.len() as u16).to_be_bytes());
        if self.l4 != L4::UdpNoSum {
            let mut sum = internet_checksum(&[pseudo.as_slice(), l4.as_slice()].concat());
            if self.l4 == L4::Udp && sum == 0 {
                sum = 0xffff;
            }
            l4[check_at..check_at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        let mut out = std::vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        match (self.src.0, self.dst.0) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                out.extend([0x08, 0x00]);
                let mut ip = std::vec![0x45 + self.options, 0];
                ip.extend((20 + 4 * u16::from(self.options) + l4.len() as u16).to_be_bytes());
                ip.extend([0x12, 0x34]);
                ip.extend(self.fragment.to_be_bytes());
                ip.extend([64, proto, 0, 0]);
                ip.extend(src.octets());
                ip.extend(dst.octets());
                ip.extend(std::vec![1_u8; 4 * usize::from(self.options)]);
                let sum = internet_checksum(&ip);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                out.extend(ip);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                out.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                let extension = 8 * usize::from(self.options);
                out.extend(((l4.len() + extension) as u16).to_be_bytes());
                out.extend([if extension == 0 { proto } else { 60 }, 64]);
                out.extend(src.octets());
                out.extend(dst.octets());
                if extension != 0 {
                    // One PadN option that fills the header.
                    out.extend([proto, self.options - 1, 1, (extension - 4) as u8]);
                    out.extend(std::vec![0_u8; extension - 4]);
                }
            }
            _ => panic!("a frame has one family"),
        }
        out.extend(l4);
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
    /// Towards outside.
    Egress,
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
    /// The frame that comes out; `None`: dropped.
    pub output: Option<Vec<u8>>,
}

/// The node that the conversation happens on; its service has a single ready local endpoint a family, so that no
/// choice is left: `pod:8080` for the TCP and UDP NodePorts 30080 (and 30082 for the same pod), none local for 30081.
pub struct Place {
    /// The node's address.
    pub node: &'static str,
    /// The endpoint.
    pub pod: &'static str,
    /// A client outside.
    pub client: &'static str,
}

/// The IPv4 and the IPv6 place.
pub const PLACES: [Place; 2] = [
    Place { node: "192.0.2.1", pod: "10.244.0.5", client: "198.51.100.7" },
    Place { node: "2001:db8::1", pod: "fd00:244::5", client: "2001:db8:ffff::7" },
];

/// NodePort with a local endpoint.
pub const PORT_LOCAL: u16 = 30080;
/// NodePort whose only endpoint is on another node.
pub const PORT_REMOTE: u16 = 30081;
/// Another NodePort of the same local endpoint.
pub const PORT_SAME_POD: u16 = 30082;
/// NodePort of a service without endpoints.
pub const PORT_EMPTY: u16 = 30083;
/// Port of the endpoint.
pub const PORT_POD: u16 = 8080;

fn step(name: &'static str, hook: Hook, input: Frame, output: Option<Frame>) -> Step {
    Step { name, hook, input: input.bytes(), output: output.map(|f| f.bytes()) }
}

/// The conversation, in order: later steps rely on the flows of earlier ones.
pub fn conversation(p: &Place) -> Vec<Step> {
    let mut steps = conversations_with_a_local_endpoint(p);
    steps.extend(refusals_and_strangers(p));
    steps
}

fn conversations_with_a_local_endpoint(p: &Place) -> Vec<Step> {
    use Hook::{Egress, Ingress};
    let mut steps = Vec::new();
    let v4 = p.node.contains('.');
    let mut kinds = std::vec![("tcp", L4::Tcp(SYN), 40_000), ("udp", L4::Udp, 40_001)];
    if v4 {
        kinds.push(("udp without checksum", L4::UdpNoSum, 40_002));
    }
    for (name, l4, client_port) in kinds {
        let there = Frame::new((p.client, client_port), (p.node, PORT_LOCAL), l4);
        let dnat = Frame::new((p.client, client_port), (p.pod, PORT_POD), l4);
        let answer_l4 = if let L4::Tcp(_) = l4 { L4::Tcp(SYN | ACK) } else { l4 };
        let answer = Frame::new((p.pod, PORT_POD), (p.client, client_port), answer_l4);
        let back = Frame::new((p.node, PORT_LOCAL), (p.client, client_port), answer_l4);
        steps.push(step(name, Ingress, there, Some(dnat)));
        steps.push(step(name, Egress, answer, Some(back)));
        steps.push(step(name, Ingress, Frame { options: 3, ..there }, Some(Frame { options: 3, ..dnat })));
    }
    let last = |from, to| Frame::new(from, to, L4::Tcp(FIN_ACK));
    steps.push(step(
        "fin",
        Ingress,
        last((p.client, 40_000), (p.node, PORT_LOCAL)),
        Some(last((p.client, 40_000), (p.pod, PORT_POD))),
    ));
    steps
}

fn refusals_and_strangers(p: &Place) -> Vec<Step> {
    use Hook::{Egress, Ingress};
    let syn = |from, to| Frame::new(from, to, L4::Tcp(SYN));
    let mut steps = Vec::new();
    let mut unchanged = |name, hook, frame: Frame| steps.push(step(name, hook, frame, Some(frame)));
    unchanged("no service", Ingress, syn((p.client, 41_000), (p.node, 30_099)));
    unchanged("not a NodePort", Ingress, syn((p.client, 41_000), (p.node, 22)));
    unchanged("not for this node", Ingress, syn((p.client, 41_000), (p.pod, PORT_LOCAL)));
    unchanged("no endpoints at all", Ingress, syn((p.client, 41_000), (p.node, PORT_EMPTY)));
    unchanged("answer of a connection that is not ours", Egress, syn((p.pod, PORT_POD), (p.client, 41_999)));
    if p.node.contains('.') {
        let first = Frame { fragment: 0x2000, ..syn((p.client, 41_000), (p.node, PORT_LOCAL)) };
        unchanged("fragment", Ingress, first);
    }
    steps.push(step(
        "endpoints elsewhere only",
        Ingress,
        syn((p.client, 41_000), (p.node, PORT_REMOTE)),
        None,
    ));
    steps.push(step(
        "client tuple in use",
        Ingress,
        Frame::new((p.client, 40_001), (p.node, PORT_SAME_POD), L4::Udp),
        None,
    ));
    steps.push(step(
        "client tuple free after fin",
        Ingress,
        syn((p.client, 40_000), (p.node, PORT_SAME_POD)),
        Some(syn((p.client, 40_000), (p.pod, PORT_POD))),
    ));
    steps
}
