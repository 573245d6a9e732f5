//! Ranges of addresses as sets of the kernel want them. Invariant: pure; what comes out is sorted, and no two ranges
//! touch or overlap, which the kernel would refuse.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

/// First address of a range, and the first one after it; `None` where the range ends with the last address there is.
pub(super) type Span = (IpAddr, Option<IpAddr>);

/// The ranges of one family, joined, without some addresses.
pub(super) fn spans(ranges: &[IpNetwork], without: &BTreeSet<IpAddr>, v4: bool) -> Vec<Span> {
    let mut bounds: Vec<(u128, u128)> =
        ranges.iter().filter(|range| range.is_ipv4() == v4).map(|range| bounds(*range)).collect();
    bounds.sort_unstable();
    let mut joined: Vec<(u128, u128)> = Vec::new();
    for (first, last) in bounds {
        match joined.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => joined.push((first, last)),
        }
    }
    for ip in without.iter().filter(|ip| ip.is_ipv4() == v4) {
        take_out(&mut joined, number(*ip));
    }
    let highest = if v4 { u128::from(u32::MAX) } else { u128::MAX };
    let span = |(first, last)| (address(first, v4), (last < highest).then(|| address(last + 1, v4)));
    joined.into_iter().map(span).collect()
}

/// Splits the range that has the address around it.
fn take_out(ranges: &mut Vec<(u128, u128)>, ip: u128) {
    let at = ranges.partition_point(|(_, last)| *last < ip);
    match ranges.get(at).copied() {
        Some((first, last)) if first <= ip => {
            let before = (first < ip).then(|| (first, ip - 1));
            let after = (ip < last).then(|| (ip + 1, last));
            ranges.splice(at..=at, before.into_iter().chain(after));
        }
        _ => {}
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

fn bounds(range: IpNetwork) -> (u128, u128) {
    match range {
        IpNetwork::V4(range) => {
            (u128::from(u32::from(range.network())), u128::from(u32::from(range.broadcast())))
        }
        IpNetwork::V6(range) => (u128::from(range.network()), u128::from(range.broadcast())),
    }
}

fn address(number: u128, v4: bool) -> IpAddr {
    // Numbers of IPv4 come out of `bounds`, and fit.
    if v4 { IpAddr::V4((number as u32).into()) } else { IpAddr::V6(number.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(ranges: &[&str], v4: bool) -> Vec<String> {
        without(ranges, &[], v4)
    }

    fn without(ranges: &[&str], ips: &[&str], v4: bool) -> Vec<String> {
        let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        let ranges: Vec<IpNetwork> = ranges.iter().map(|range| range.parse().unwrap()).collect();
        let text = |(first, after): Span| {
            format!("{first}-{}", after.map_or_else(|| "end".to_owned(), |after| after.to_string()))
        };
        spans(&ranges, &ips, v4).into_iter().map(text).collect()
    }

    #[test]
    fn ranges_that_touch_or_overlap_become_one() {
        let ranges = ["10.1.0.0/24", "10.0.0.0/16", "10.0.3.0/24", "192.0.2.7/32", "fd00::/64"];
        assert_eq!(joined(&ranges, true), ["10.0.0.0-10.1.1.0", "192.0.2.7-192.0.2.8"]);
        assert_eq!(joined(&ranges, false), ["fd00::-fd00:0:0:1::"]);
    }

    #[test]
    fn addresses_are_taken_out() {
        let ips = ["10.0.0.0", "10.0.0.5", "10.0.0.7", "10.0.0.6", "10.0.0.255", "10.0.1.9", "fd00::5"];
        let left = without(&["10.0.0.0/24", "192.0.2.7/32"], &ips, true);
        assert_eq!(left, ["10.0.0.1-10.0.0.5", "10.0.0.8-10.0.0.255", "192.0.2.7-192.0.2.8"]);
        assert_eq!(without(&["192.0.2.7/32"], &["192.0.2.7"], true), [""; 0]);
        assert_eq!(without(&["fd00::/125"], &ips, false), ["fd00::-fd00::5", "fd00::6-fd00::8"]);
    }

    #[test]
    fn the_last_address_ends_no_range() {
        assert_eq!(
            joined(&["255.255.255.0/24", "0.0.0.0/8"], true),
            ["0.0.0.0-1.0.0.0", "255.255.255.0-end"]
        );
        assert_eq!(joined(&["::/0", "ff00::/8"], false), ["::-end"]);
        assert_eq!(joined(&[], true), [""; 0]);
    }
}
