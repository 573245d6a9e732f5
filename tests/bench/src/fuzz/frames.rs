//! Frames to begin with, and what is done to them. Invariant: a frame that was built and not mutated has right lengths
//! and checksums, computed in full.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A small generator (splitmix64); equal seeds give equal runs.
#[derive(Debug)]
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// A number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// True once in `times`.
    pub(crate) fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// One end of a conversation.
pub(crate) type End = (IpAddr, u16);

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// A frame before it is bytes.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) src: End,
    pub(crate) dst: End,
    pub(crate) proto: u8,
    /// TCP flags.
    pub(crate) flags: u8,
    /// UDP without a checksum.
    pub(crate) no_sum: bool,
    /// TTL or hop limit.
    pub(crate) hops: u8,
    /// Words of IPv4 options; eight-byte units of each IPv6 extension header.
    pub(crate) options: Vec<u8>,
    /// Fragment offset in bytes, and whether more follow; a packet that is none has `None`.
    pub(crate) fragment: Option<(u16, bool)>,
    /// Bytes of payload.
    pub(crate) payload: usize,
}

pub(crate) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
    }
    !(sum as u16)
}

pub(crate) fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The pseudo header that a transport checksum covers. Every part but the last has an even length.
pub(crate) fn pseudo(src: &[u8], dst: &[u8], proto: u8, len: usize) -> Vec<u8> {
    [src, dst, &(len as u32).to_be_bytes(), &[0, 0, 0, proto]].concat()
}

fn transport(spec: &Spec) -> Vec<u8> {
    let mut l4 = [spec.src.1.to_be_bytes(), spec.dst.1.to_be_bytes()].concat();
    let check_at = if spec.proto == TCP {
        l4.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, spec.flags, 0x20, 0, 0, 0, 0, 0]);
        16
    } else {
        l4.extend((8 + spec.payload as u16).to_be_bytes());
        l4.extend([0, 0]);
        6
    };
    l4.extend((0..spec.payload).map(|n| n as u8));
    if !(spec.proto == UDP && spec.no_sum) {
        let pseudo = pseudo(&octets(spec.src.0), &octets(spec.dst.0), spec.proto, l4.len());
        let sum = match checksum(&[&pseudo, &l4]) {
            0 if spec.proto == UDP => 0xffff,
            sum => sum,
        };
        l4[check_at..check_at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    l4
}

/// An IP packet around `body`.
fn ip(spec: &Spec, proto: u8, body: &[u8]) -> Vec<u8> {
    let (offset, more) = spec.fragment.unwrap_or((0, false));
    match (spec.src.0, spec.dst.0) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let words = spec.options.first().copied().unwrap_or(0).min(10);
            let mut ip = vec![0x45 + words, 0];
            ip.extend((20 + 4 * u16::from(words) + body.len() as u16).to_be_bytes());
            ip.extend([0x12, 0x34]);
            ip.extend(((offset / 8) | (u16::from(more) << 13)).to_be_bytes());
            ip.extend([spec.hops, proto, 0, 0]);
            ip.extend(src.octets());
            ip.extend(dst.octets());
            ip.extend(vec![1; 4 * usize::from(words)]);
            let sum = checksum(&[&ip]);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            ip.extend(body);
            ip
        }
        (src, dst) => {
            let mut chain = Vec::new();
            let mut kinds: Vec<u8> = spec.options.iter().zip([0, 60, 43]).map(|(_, kind)| kind).collect();
            if spec.fragment.is_some() {
                kinds.push(44);
            }
            for (n, kind) in kinds.iter().enumerate() {
                let next = kinds.get(n + 1).copied().unwrap_or(proto);
                if *kind == 44 {
                    chain.extend([next, 0]);
                    chain.extend(((offset & !7) | u16::from(more)).to_be_bytes());
                    chain.extend([0, 0, 0x12, 0x34]);
                } else {
                    let extra = spec.options[n].min(3);
                    chain.extend([next, extra, 1, 4, 0, 0, 0, 0]);
                    chain.extend(vec![0; 8 * usize::from(extra)]);
                }
            }
            let mut ip = vec![0x60, 0, 0, 0];
            ip.extend(((chain.len() + body.len()) as u16).to_be_bytes());
            ip.extend([kinds.first().copied().unwrap_or(proto), spec.hops]);
            ip.extend(octets(src));
            ip.extend(octets(dst));
            ip.extend(chain);
            ip.extend(body);
            ip
        }
    }
}

fn ether(v6: bool, ip: &[u8]) -> Vec<u8> {
    let mut out = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    out.extend(if v6 { [0x86, 0xdd] } else { [0x08, 0x00] });
    out.extend(ip);
    out
}

/// The frame's bytes.
pub(crate) fn frame(spec: &Spec) -> Vec<u8> {
    let mut body = transport(spec);
    if let Some((offset, _)) = spec.fragment
        && offset != 0
    {
        // What is not the first fragment begins in the middle of the payload.
        body.drain(..8.min(body.len()));
    }
    ether(spec.dst.0.is_ipv6(), &ip(spec, spec.proto, &body))
}

/// An ICMP error from `from` to the sender of `about`, which it quotes up to `keep` bytes of.
pub(crate) fn error(from: IpAddr, about: &Spec, keep: usize, kind: (u8, u8)) -> Vec<u8> {
    let v6 = about.src.0.is_ipv6();
    let quoted = frame(about)[14..].to_vec();
    let quoted = &quoted[..keep.min(quoted.len())];
    let mut icmp = vec![kind.0, kind.1, 0, 0, 0, 0, 5, 0];
    icmp.extend(quoted);
    let to = about.src;
    let outer = Spec {
        src: (from, 0),
        dst: to,
        proto: if v6 { 58 } else { 1 },
        options: Vec::new(),
        fragment: None,
        hops: 60,
        ..about.clone()
    };
    let sum = if v6 {
        checksum(&[&pseudo(&octets(from), &octets(to.0), 58, icmp.len()), &icmp])
    } else {
        checksum(&[&icmp])
    };
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    ether(v6, &ip(&outer, outer.proto, &icmp))
}

/// An address that conversations take place between.
pub(crate) fn v4(last: u8, net: u8) -> IpAddr {
    Ipv4Addr::new(10, net, 0, last).into()
}

/// The same of IPv6.
pub(crate) fn v6(last: u8, net: u8) -> IpAddr {
    Ipv6Addr::new(0xfd00, u16::from(net), 0, 0, 0, 0, 0, u16::from(last)).into()
}

/// Spoils the bytes in one to four ways.
pub(crate) fn mutate(bytes: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..=dice.below(4) {
        if bytes.is_empty() {
            return;
        }
        // Headers are where a change matters most.
        let reach = if dice.one_in(4) { bytes.len() } else { bytes.len().min(14 + 60 + 20) };
        let at = dice.below(reach);
        match dice.below(8) {
            0 => bytes[at] ^= 1 << dice.below(8),
            1 => bytes[at] = dice.next() as u8,
            2 => bytes[at] = dice.pick(&[0, 1, 0x7f, 0x80, 0xff, 4, 0x45, 0x4f, 0x60, 6, 17, 44, 58]),
            3 => bytes.truncate(at),
            4 => drop(bytes.splice(at..at, (0..dice.below(24)).map(|n| n as u8).collect::<Vec<_>>())),
            5 => drop(bytes.drain(at..(at + dice.below(16)).min(bytes.len()))),
            6 => bytes[at] = bytes[at].wrapping_add(1),
            _ => {
                let from = dice.below(reach);
                bytes.swap(at, from);
            }
        }
    }
}
