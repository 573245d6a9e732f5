//! What must hold of a frame before and after, read by a parser that shares nothing with the one under test.
//! Invariant: a property is asserted only where the frame that went in allows to tell.

use super::frames::{checksum, pseudo};
use std::ops::Range;

/// Where things lie in a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) v6: bool,
    /// Offset of the IP header.
    pub(crate) ip: usize,
    pub(crate) proto: u8,
    /// Offset of what follows the IP headers.
    pub(crate) l4: usize,
    /// End of the packet by its own length field; may lie beyond the frame.
    pub(crate) end: usize,
    /// Any fragment.
    pub(crate) fragment: bool,
    /// A fragment without the header that follows IP's.
    pub(crate) later: bool,
}

fn be16(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?])))
}

/// The IP packet at `ip`.
pub(crate) fn view(bytes: &[u8], ip: usize, v6: bool) -> Option<View> {
    let first = *bytes.get(ip)?;
    if !v6 {
        let head = usize::from(first & 15) * 4;
        if first >> 4 != 4 || head < 20 || bytes.len() < ip + head {
            return None;
        }
        let piece = be16(bytes, ip + 6)?;
        return Some(View {
            v6,
            ip,
            proto: bytes[ip + 9],
            l4: ip + head,
            end: ip + be16(bytes, ip + 2)?,
            fragment: piece & 0x3fff != 0,
            later: piece & 0x1fff != 0,
        });
    }
    if first >> 4 != 6 || bytes.len() < ip + 40 {
        return None;
    }
    let end = ip + 40 + be16(bytes, ip + 4)?;
    let (mut proto, mut at) = (bytes[ip + 6], ip + 40);
    let (mut fragment, mut later) = (false, false);
    while !later && matches!(proto, 0 | 43 | 44 | 60) {
        let len = if proto == 44 { 8 } else { (usize::from(*bytes.get(at + 1)?) + 1) * 8 };
        if proto == 44 {
            let piece = be16(bytes, at + 2)?;
            fragment |= piece & 0xfff9 != 0;
            later = piece & 0xfff8 != 0;
        }
        proto = *bytes.get(at)?;
        at += len;
    }
    Some(View { v6, ip, proto, l4: at, end, fragment, later })
}

/// The frame's packet, by its EtherType.
pub(crate) fn frame(bytes: &[u8]) -> Option<View> {
    match be16(bytes, 12)? {
        0x0800 => view(bytes, 14, false),
        0x86dd => view(bytes, 14, true),
        _ => None,
    }
}

impl View {
    fn addresses(&self) -> (Range<usize>, Range<usize>) {
        if self.v6 {
            (self.ip + 8..self.ip + 24, self.ip + 24..self.ip + 40)
        } else {
            (self.ip + 12..self.ip + 16, self.ip + 16..self.ip + 20)
        }
    }

    pub(crate) fn src<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.addresses().0]
    }

    pub(crate) fn dst<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.addresses().1]
    }

    /// Both ports as they lie in the packet.
    pub(crate) fn ports<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        bytes.get(self.l4..self.l4 + 4)
    }

    fn is_transport(&self) -> bool {
        matches!(self.proto, 6 | 17)
    }

    pub(crate) fn is_error(&self, bytes: &[u8]) -> bool {
        let kind = bytes.get(self.l4).copied().unwrap_or(255);
        !self.fragment
            && ((self.proto == 1 && !self.v6 && matches!(kind, 3 | 11 | 12))
                || (self.proto == 58 && self.v6 && matches!(kind, 1..=4)))
    }

    /// The packet that an ICMP error quotes.
    pub(crate) fn quoted(&self, bytes: &[u8]) -> Option<View> {
        if self.is_error(bytes) { view(bytes, self.l4 + 8, self.v6) } else { None }
    }

    fn check_at(&self) -> Option<usize> {
        match self.proto {
            6 => Some(self.l4 + 16),
            17 => Some(self.l4 + 6),
            1 | 58 => Some(self.l4 + 2),
            _ => None,
        }
    }

    /// Whether the IPv4 header's checksum is right; always so for IPv6.
    pub(crate) fn header_right(&self, bytes: &[u8]) -> bool {
        self.v6
            || bytes
                .get(self.ip..self.ip + usize::from(bytes[self.ip] & 15) * 4)
                .is_some_and(|ip| checksum(&[ip]) == 0)
    }

    /// Whether UDP says that there is no checksum.
    pub(crate) fn no_sum(&self, bytes: &[u8]) -> bool {
        self.proto == 17 && be16(bytes, self.l4 + 6) == Some(0)
    }

    /// Whether the TCP, UDP, ICMP or ICMPv6 checksum is right; `None` where nobody can tell.
    pub(crate) fn body_right(&self, bytes: &[u8]) -> Option<bool> {
        let body = bytes.get(self.l4..self.end)?;
        self.check_at().filter(|at| *at + 2 <= self.end && !self.fragment && !self.no_sum(bytes))?;
        let pseudo = match self.proto {
            1 => Vec::new(),
            proto => pseudo(self.src(bytes), self.dst(bytes), proto, body.len()),
        };
        Some(checksum(&[&pseudo, body]) == 0)
    }

    /// Bytes that a translation of this packet may change.
    fn changeable(&self, bytes: &[u8], quoted: bool) -> Vec<Range<usize>> {
        let (src, dst) = self.addresses();
        let mut may = vec![src, dst];
        if !self.v6 {
            may.push(self.ip + 10..self.ip + 12);
        }
        if !quoted {
            may.push(if self.v6 { self.ip + 7..self.ip + 8 } else { self.ip + 8..self.ip + 9 });
        }
        if self.later {
            return may;
        }
        if self.is_transport() {
            may.push(self.l4..self.l4 + 4);
        }
        may.extend(self.check_at().map(|at| at..at + 2));
        if !quoted && let Some(inner) = self.quoted(bytes) {
            may.extend(inner.changeable(bytes, true));
        }
        may
    }
}

/// Judges a packet that goes on, translated: from `before` to `after`.
pub(crate) fn translated(before: &[u8], after: &[u8]) -> Result<(), String> {
    if before == after {
        return Ok(());
    }
    if before.len() != after.len() {
        return Err("a translated packet has another length".to_owned());
    }
    let old = frame(before).ok_or("a packet changed that is no IP packet")?;
    let new = frame(after).ok_or("a translation left no IP packet")?;
    if old != new {
        return Err(format!("a translation moved headers: {old:?} became {new:?}"));
    }
    let may = old.changeable(before, false);
    for (at, (was, is)) in before.iter().zip(after).enumerate() {
        if was != is && !may.iter().any(|range| range.contains(&at)) {
            return Err(format!(
                "byte {at} is no part of the translation and changed from {was:#x} to {is:#x}"
            ));
        }
    }
    if old.header_right(before) && !new.header_right(after) {
        return Err("a right IPv4 header checksum became wrong".to_owned());
    }
    if old.no_sum(before) != new.no_sum(after) && old.is_transport() && !old.later {
        return Err("a UDP checksum came or went".to_owned());
    }
    if old.body_right(before) == Some(true) && new.body_right(after) != Some(true) {
        return Err("a right transport checksum became wrong".to_owned());
    }
    // What lies behind the error's end is not quoted, though it is in the frame.
    let within = |bytes: &'_ [u8]| bytes[..old.end.min(bytes.len())].to_vec();
    let (before, after) = (&within(before)[..], &within(after)[..]);
    if let (Some(old), Some(new)) = (old.quoted(before), new.quoted(after)) {
        if old.header_right(before) && !new.header_right(after) {
            return Err("the quoted packet's right header checksum became wrong".to_owned());
        }
        if old.body_right(before) == Some(true) && new.body_right(after) != Some(true) {
            return Err("the quoted packet's right transport checksum became wrong".to_owned());
        }
    }
    Ok(())
}

/// Judges the answer that was made of `before`.
pub(crate) fn answered(before: &[u8], after: &[u8]) -> Result<(), String> {
    let old = frame(before).ok_or("a packet was answered that is no IP packet")?;
    let new = frame(after).ok_or("the answer is no IP packet")?;
    if old.is_error(before) || !old.is_transport() {
        return Err("something else than TCP and UDP was answered".to_owned());
    }
    if old.src(before) != new.dst(after) || old.dst(before) != new.src(after) || old.v6 != new.v6 {
        return Err("the answer does not go back".to_owned());
    }
    if before.get(0..6) != after.get(6..12) || before.get(6..12) != after.get(0..6) {
        return Err("the answer's link-layer addresses do not go back".to_owned());
    }
    if new.end > after.len() || after.len() > before.len().max(60) + 48 {
        return Err(format!("the answer has {} bytes, says {}, to {}", after.len(), new.end, before.len()));
    }
    if !new.header_right(after) || new.body_right(after) != Some(true) {
        return Err("the answer's checksums are wrong".to_owned());
    }
    let reset =
        |bytes: &[u8], view: &View| view.proto == 6 && bytes.get(view.l4 + 13).is_some_and(|f| f & 4 != 0);
    if reset(before, &old) && reset(after, &new) {
        return Err("a reset was answered with a reset".to_owned());
    }
    if new.proto == 6 {
        let (was, is) = (old.ports(before), new.ports(after));
        if let (Some(&[a, b, c, d]), Some(is)) = (was, is)
            && is != [c, d, a, b]
        {
            return Err("the reset's ports do not go back".to_owned());
        }
    }
    Ok(())
}
