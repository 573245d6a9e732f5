//! Frames within another IP header. Invariant: as the oracle's, nothing here is shared with the code that is judged.

use super::frames::{checksum, pseudo};
use super::oracle;
use std::net::IpAddr;

/// Bytes of the header.
fn room(v6: bool) -> usize {
    if v6 { 40 } else { 20 }
}

/// The frame within a header from `src` to `dst`, which are of its family.
pub(crate) fn within(inner: &[u8], src: IpAddr, dst: IpAddr) -> Vec<u8> {
    let len = inner.len().saturating_sub(14) as u16;
    let mut head = Vec::new();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            head.extend([0x45, 0]);
            head.extend((20 + len).to_be_bytes());
            head.extend([0, 0, 0x40, 0, 64, 4, 0, 0]);
            head.extend(src.octets());
            head.extend(dst.octets());
            let sum = checksum(&[&head]);
            head[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            head.extend([0x60, 0, 0, 0]);
            head.extend(len.to_be_bytes());
            head.extend([41, 64]);
            head.extend(src.octets());
            head.extend(dst.octets());
        }
        _ => return inner.to_vec(),
    }
    let mut out = inner.to_vec();
    out.splice(14..14, head);
    out
}

/// An ICMP error that quotes these bytes of an IP packet.
pub(crate) fn error(src: IpAddr, dst: IpAddr, quoted: &[u8], kind: (u8, u8)) -> Vec<u8> {
    let mut icmp = vec![kind.0, kind.1, 0, 0, 0, 0, 4, 210];
    icmp.extend(quoted);
    let (v6, proto) = if src.is_ipv6() { (true, 58) } else { (false, 1) };
    let ends: Vec<Vec<u8>> = [src, dst]
        .iter()
        .map(|end| match end {
            IpAddr::V4(end) => end.octets().to_vec(),
            IpAddr::V6(end) => end.octets().to_vec(),
        })
        .collect();
    let pseudo = if v6 { pseudo(&ends[0], &ends[1], proto, icmp.len()) } else { Vec::new() };
    let sum = checksum(&[&pseudo, &icmp]);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut plain = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    plain.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
    plain.extend(icmp);
    let mut frame = within(&plain, src, dst);
    // The header says that something else is in it.
    if v6 {
        frame[14 + 6] = proto;
    } else {
        frame[14 + 9] = proto;
        frame[14 + 10..14 + 12].fill(0);
        let sum = checksum(&[&frame[14..34]]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

/// The frame without the header around it.
pub(crate) fn without(frame: &[u8]) -> Vec<u8> {
    let v6 = frame.get(12..14) == Some(&[0x86, 0xdd]);
    let mut out = frame.to_vec();
    out.drain(14..(14 + room(v6)).min(frame.len()));
    out
}

/// Judges an error about a packet that was sent on whole: from what a router says to what the client hears.
pub(crate) fn told(before: &[u8], after: &[u8]) -> Result<(), String> {
    let (old, new) = (oracle::frame(before), oracle::frame(after));
    let (Some(old), Some(new)) = (old, new) else { return Err("an error about a packet is none".to_owned()) };
    if before.len() != after.len() + room(old.v6) || !new.is_error(after) || !new.header_right(after) {
        return Err("an error about a packet that was sent on is spoilt".to_owned());
    }
    if old.body_right(before) == Some(true) && new.body_right(after) != Some(true) {
        return Err("an error's right checksum became wrong".to_owned());
    }
    let outer = oracle::view(before, old.l4 + 8, old.v6).ok_or("an error quotes nothing")?;
    let inner = new.quoted(after).ok_or("an error's quote got lost")?;
    if before.get(outer.l4..) != after.get(inner.ip..) {
        return Err("an error quotes something else to the client".to_owned());
    }
    if inner.src(after) != new.dst(after) || inner.dst(after) != new.src(after) {
        return Err("somebody else hears of a packet".to_owned());
    }
    Ok(())
}

/// Judges a packet that goes on whole: from `before` to `after`.
pub(crate) fn sent(before: &[u8], after: &[u8]) -> Result<(), String> {
    let outer = oracle::frame(after).ok_or("the header around a packet is none")?;
    let wanted = if outer.v6 { 41 } else { 4 };
    if outer.proto != wanted || outer.fragment || outer.l4 != 14 + room(outer.v6) {
        return Err(format!("a strange header around a packet: {outer:?}"));
    }
    if !outer.header_right(after) {
        return Err("the header around a packet has a wrong checksum".to_owned());
    }
    let inner = without(after);
    let old = oracle::frame(before).ok_or("a packet was sent on that is no IP packet")?;
    // By its own length, whatever the link has put behind it; or the most that the field can say, which of IPv6 leaves
    // its own header out.
    let most = 14 + 0xffff + if outer.v6 { room(true) } else { 0 };
    if outer.end - room(outer.v6) != old.end && outer.end != most {
        return Err(format!("the header says {}, the packet {}", outer.end, old.end));
    }
    oracle::translated(before, &inner)?;
    if old.src(before) != old.src(&inner) || old.dst(before) != old.dst(&inner) {
        return Err("a packet that is sent on whole was translated".to_owned());
    }
    let hops = 14 + if old.v6 { 7 } else { 8 };
    if inner[hops].checked_add(1) != Some(before[hops]) {
        return Err("a packet that was sent on has not lost a hop".to_owned());
    }
    Ok(())
}
