//! Which address a pod gets, PURE. Invariant: never one that is taken, and never the network, broadcast or gateway
//! address of its range.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

/// A part of a network that addresses are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pool {
    /// The network.
    pub(super) net: IpNetwork,
    /// The first and the last address that may be given.
    pub(super) bounds: (IpAddr, IpAddr),
}

impl Pool {
    /// The whole network but for its special addresses.
    pub(super) fn whole(net: IpNetwork) -> Self {
        Pool { net, bounds: bounds(&net) }
    }

    /// From `start` to `end`, where given, of what [`Pool::whole`] has. The other way round is nothing to choose from.
    pub(super) fn part(net: IpNetwork, start: Option<IpAddr>, end: Option<IpAddr>) -> Self {
        let (low, high) = bounds(&net);
        let own = |ip: &IpAddr| ip.is_ipv4() == net.is_ipv4();
        let first = start.filter(own).map_or(low, |start| start.max(low));
        let last = end.filter(own).map_or(high, |end| end.min(high));
        Pool { net, bounds: (first, last) }
    }

    /// True where it may give `ip`.
    pub(super) fn has(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.net.is_ipv4() && (self.bounds.0..=self.bounds.1).contains(&ip)
    }

    /// How many addresses it may give.
    pub(super) fn capacity(&self) -> u128 {
        let (first, last) = (number(self.bounds.0), number(self.bounds.1));
        if first > last { 0 } else { (last - first).saturating_add(1) }
    }
}

/// The addresses of `range` that pods may get, as first and last. Ranges of one or two addresses are used whole;
/// others keep the first (the network, or IPv6's subnet-router anycast), the second (for a gateway) and, in IPv4,
/// the last (broadcast).
pub(super) fn bounds(range: &IpNetwork) -> (IpAddr, IpAddr) {
    let (first, last) = (number(range.network()), number(range.broadcast()));
    let v4 = range.is_ipv4();
    let (first, last) = match last - first {
        0 | 1 => (first, last),
        _ if v4 => (first + 2, last - 1),
        _ => (first + 2, last),
    };
    (address(first, v4), address(last, v4))
}

/// The next address of `pool` after `after` that is not `taken`, going round once.
pub(super) fn choose(pool: &Pool, after: Option<IpAddr>, taken: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let (first, last, v4) = (number(pool.bounds.0), number(pool.bounds.1), pool.net.is_ipv4());
    if first > last {
        return None;
    }
    let start = match after {
        Some(after) if after.is_ipv4() == v4 && (first..last).contains(&number(after)) => number(after) + 1,
        _ => first,
    };
    (start..=last).chain(first..start).map(|n| address(n, v4)).find(|ip| !taken(*ip))
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

fn address(n: u128, v4: bool) -> IpAddr {
    match u32::try_from(n) {
        Ok(n) if v4 => IpAddr::V4(Ipv4Addr::from(n)),
        _ => IpAddr::V6(Ipv6Addr::from(n)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn range(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    fn capacity(range: &IpNetwork) -> u128 {
        Pool::whole(*range).capacity()
    }

    fn choose(range: &IpNetwork, after: Option<IpAddr>, taken: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        super::choose(&Pool::whole(*range), after, taken)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn special_addresses_are_never_given() {
        assert_eq!(bounds(&range("10.1.2.0/24")), (ip("10.1.2.2"), ip("10.1.2.254")));
        assert_eq!(bounds(&range("10.1.2.77/24")), (ip("10.1.2.2"), ip("10.1.2.254")));
        assert_eq!(bounds(&range("fd00:1::/64")), (ip("fd00:1::2"), ip("fd00:1::ffff:ffff:ffff:ffff")));
        assert_eq!(bounds(&range("10.0.0.0/30")), (ip("10.0.0.2"), ip("10.0.0.2")));
        assert_eq!(bounds(&range("10.0.0.0/31")), (ip("10.0.0.0"), ip("10.0.0.1")));
        assert_eq!(bounds(&range("10.0.0.9/32")), (ip("10.0.0.9"), ip("10.0.0.9")));
        assert_eq!(bounds(&range("0.0.0.0/0")).1, ip("255.255.255.254"));
        assert_eq!(capacity(&range("10.1.2.0/24")), 253);
        assert_eq!(capacity(&range("10.0.0.0/30")), 1);
        assert_eq!(capacity(&range("::/0")), u128::MAX - 1);
    }

    #[test]
    fn addresses_go_round() {
        let net = range("10.0.0.0/29");
        let free = |_| false;
        assert_eq!(choose(&net, None, free), Some(ip("10.0.0.2")));
        assert_eq!(choose(&net, Some(ip("10.0.0.2")), free), Some(ip("10.0.0.3")));
        assert_eq!(choose(&net, Some(ip("10.0.0.6")), free), Some(ip("10.0.0.2")));
        assert_eq!(choose(&net, Some(ip("10.9.9.9")), free), Some(ip("10.0.0.2")));
        assert_eq!(choose(&net, Some(ip("fd00::1")), free), Some(ip("10.0.0.2")));
        assert_eq!(choose(&net, None, |_| true), None);
    }

    #[test]
    fn parts_of_networks_have_bounds() {
        let part = |start, end| Pool::part(range("10.0.0.0/24"), start, end);
        let pool = part(Some(ip("10.0.0.10")), Some(ip("10.0.0.12")));
        assert_eq!(pool.capacity(), 3);
        assert!(pool.has(ip("10.0.0.12")) && !pool.has(ip("10.0.0.13")) && !pool.has(ip("fd00::1")));
        assert_eq!(super::choose(&pool, Some(ip("10.0.0.12")), |_| false), Some(ip("10.0.0.10")));
        assert_eq!(part(Some(ip("10.0.0.0")), Some(ip("10.0.0.255"))), Pool::whole(range("10.0.0.0/24")));
        let none = part(Some(ip("10.0.0.9")), Some(ip("10.0.0.8")));
        assert_eq!((none.capacity(), super::choose(&none, None, |_| false)), (0, None));
    }

    fn any_range() -> impl Strategy<Value = IpNetwork> {
        prop_oneof![
            (any::<u32>(), 20_u8..=32)
                .prop_map(|(ip, len)| IpNetwork::new(Ipv4Addr::from(ip).into(), len).unwrap()),
            (any::<u128>(), 64_u8..=128)
                .prop_map(|(ip, len)| IpNetwork::new(Ipv6Addr::from(ip).into(), len).unwrap()),
        ]
    }

    proptest! {
        /// Pods come and go: whatever the order, no address is given twice, and none is special.
        #[test]
        fn never_a_duplicate(net in any_range(), steps in proptest::collection::vec(any::<u8>(), 1..200)) {
            let mut held: Vec<IpAddr> = Vec::new();
            let mut last = None;
            for step in steps {
                if step % 3 == 0 && !held.is_empty() {
                    held.remove(usize::from(step) % held.len());
                    continue;
                }
                match choose(&net, last, |ip| held.contains(&ip)) {
                    Some(ip) => {
                        prop_assert!(!held.contains(&ip));
                        prop_assert!(net.contains(ip));
                        if capacity(&net) > 2 {
                            prop_assert_ne!(ip, net.network());
                            prop_assert!(!net.is_ipv4() || ip != net.broadcast());
                        }
                        held.push(ip);
                        last = Some(ip);
                    }
                    None => prop_assert_eq!(held.len() as u128, capacity(&net)),
                }
            }
        }

        /// Every address that may be given is given before the range is used up.
        #[test]
        fn the_whole_range_is_used(ip in any::<u32>(), len in 24_u8..=32) {
            let net = IpNetwork::new(Ipv4Addr::from(ip).into(), len).unwrap();
            let mut held = BTreeSet::new();
            let mut last = None;
            while let Some(next) = choose(&net, last, |ip| held.contains(&ip)) {
                held.insert(next);
                last = Some(next);
            }
            prop_assert_eq!(held.len() as u128, capacity(&net));
        }
    }
}
