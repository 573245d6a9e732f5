//! PURE: Ethernet frames with IPv4 and TCP or UDP, checksums right, as a client outside sends them.

use std::net::Ipv4Addr;

/// A machine outside.
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// The node.
pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

const TCP: u8 = 6;
const UDP: u8 = 17;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// A frame without options or payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    /// Destination and source of the Ethernet header.
    macs: [[u8; 6]; 2],
    from: (Ipv4Addr, u16),
    to: (Ipv4Addr, u16),
    /// TCP flags; `None` is a UDP datagram.
    flags: Option<u8>,
}

impl Frame {
    pub(crate) fn tcp_syn(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Self {
        Self { macs: [[2; 6], [4; 6]], from, to, flags: Some(SYN) }
    }

    pub(crate) fn tcp_ack(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Self {
        Self { flags: Some(ACK), ..Self::tcp_syn(from, to) }
    }

    pub(crate) fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Self {
        Self { flags: None, ..Self::tcp_syn(from, to) }
    }

    /// The frame on the wire to `to` from `from`.
    pub(crate) fn between(self, to: [u8; 6], from: [u8; 6]) -> Self {
        Self { macs: [to, from], ..self }
    }

    /// The frame, at least 60 bytes long.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let proto = if self.flags.is_some() { TCP } else { UDP };
        let mut l4 = [self.from.1.to_be_bytes(), self.to.1.to_be_bytes()].concat();
        let checksum_at = match self.flags {
            Some(flags) => {
                l4.extend([
                    0,
                    0,
                    0,
                    1,
                    0,
                    0,
                    0,
                    u8::from(flags == ACK),
                    5 << 4,
                    flags,
                    0xff,
                    0xff,
                    0,
                    0,
                    0,
                    0,
                ]);
                16
            }
            None => {
                // Payload up to the shortest frame.
                l4.extend(26u16.to_be_bytes());
                l4.extend([0; 2 + 18]);
                6
            }
        };
        let mut pseudo = [self.from.0.octets(), self.to.0.octets()].concat();
        pseudo.extend([0, proto]);
        pseudo.extend((l4.len() as u16).to_be_bytes());
        let sum = checksum(&[&pseudo, &l4]);
        l4[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
        let mut ip = vec![0x45, 0];
        ip.extend((20 + l4.len() as u16).to_be_bytes());
        ip.extend([0, 1, 0x40, 0, 64, proto, 0, 0]);
        ip.extend([self.from.0.octets(), self.to.0.octets()].concat());
        let sum = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let mut frame = self.macs.concat();
        frame.extend([0x08, 0x00]);
        frame.extend(ip);
        frame.extend(l4);
        frame.resize(frame.len().max(60), 0);
        frame
    }
}

/// The Internet checksum over parts of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words =
        parts.iter().flat_map(|part| part.chunks(2)).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_right() {
        for frame in
            [Frame::tcp_syn((CLIENT, 1025), (NODE, 30_000)), Frame::udp((CLIENT, 1025), (NODE, 30_000))]
        {
            let bytes = frame.bytes();
            let length = usize::from(u16::from_be_bytes([bytes[16], bytes[17]]));
            let (ip, l4) = (&bytes[14..34], &bytes[34..14 + length]);
            // What includes its own checksum sums to zero.
            assert_eq!(checksum(&[ip]), 0);
            let pseudo = [&ip[12..20], &[0, ip[9]], &(l4.len() as u16).to_be_bytes()].concat();
            assert_eq!(checksum(&[&pseudo, l4]), 0);
            assert!(bytes.len() >= 60);
        }
    }
}
