//! One range of cluster IPs as a bitmap. Address 0 is the network's, address 1 is kept for the `kubernetes` service
//! and address 10 for DNS; those two are given only to who asks for them by value. In a v4 range the last address
//! (broadcast) is never given.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use thiserror::Error;

/// Largest number of addresses that one range hands out; larger networks use their first ones.
const ADDRESSES_MAX: u128 = 1 << 16;
/// Offset of the address that cluster DNS asks for by value.
const DNS_OFFSET: u32 = 10;
/// Offset of the API server's own service.
const API_SERVER_OFFSET: u32 = 1;

/// A network that cannot be a service range.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("service range {network} is too small: it must hold at least 8 addresses")]
pub struct IpRangeError {
    /// The refused network.
    pub network: IpNetwork,
}

/// A service range and what is taken of it.
#[derive(Debug, Clone)]
pub struct IpRange {
    network: IpNetwork,
    /// Number of addresses that can be handed out, counted from offset 0.
    size: u32,
    taken: Vec<u64>,
    free: u32,
    /// Where the next search starts, so that a released address is not given again at once.
    cursor: u32,
}

impl IpRange {
    /// An empty range over `network`.
    pub fn new(network: IpNetwork) -> Result<Self, IpRangeError> {
        let total: u128 = match network {
            IpNetwork::V4(net) => u128::from(net.size()),
            IpNetwork::V6(net) => {
                if net.prefix() == 0 {
                    u128::MAX
                } else {
                    1 << (128 - u32::from(net.prefix()))
                }
            }
        };
        if total < 8 {
            return Err(IpRangeError { network });
        }
        let limit = total.min(ADDRESSES_MAX);
        let broadcast = network.is_ipv4() && limit == total;
        let size = u32::try_from(limit).map_err(|_| IpRangeError { network })? - u32::from(broadcast);
        let words = size.div_ceil(64) as usize;
        let mut range = Self { network, size, taken: vec![0; words], free: size, cursor: 0 };
        range.set(0);
        Ok(range)
    }

    /// The network.
    pub fn network(&self) -> IpNetwork {
        self.network
    }

    /// Whether the range is IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.network.is_ipv4()
    }

    /// Addresses that are still free, the two kept ones included.
    pub fn free(&self) -> u32 {
        self.free
    }

    /// The address of the API server's own service.
    pub fn api_server(&self) -> IpAddr {
        self.address(API_SERVER_OFFSET)
    }

    /// The address that is kept for cluster DNS.
    pub fn dns(&self) -> Option<IpAddr> {
        (DNS_OFFSET < self.size).then(|| self.address(DNS_OFFSET))
    }

    fn address(&self, offset: u32) -> IpAddr {
        match self.network.network() {
            IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from(u32::from(base).wrapping_add(offset))),
            IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from(u128::from(base).wrapping_add(u128::from(offset)))),
        }
    }

    fn offset(&self, address: IpAddr) -> Option<u32> {
        let offset = match (self.network.network(), address) {
            (IpAddr::V4(base), IpAddr::V4(ip)) => u128::from(u32::from(ip).checked_sub(u32::from(base))?),
            (IpAddr::V6(base), IpAddr::V6(ip)) => u128::from(ip).checked_sub(u128::from(base))?,
            _ => return None,
        };
        u32::try_from(offset).ok().filter(|o| *o < self.size)
    }

    fn is_set(&self, offset: u32) -> bool {
        self.taken[(offset / 64) as usize] & (1 << (offset % 64)) != 0
    }

    fn set(&mut self, offset: u32) -> bool {
        if self.is_set(offset) {
            return false;
        }
        self.taken[(offset / 64) as usize] |= 1 << (offset % 64);
        self.free -= 1;
        true
    }

    /// Whether the address is one that this range can hand out.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.offset(address).is_some_and(|o| o != 0)
    }

    /// Takes this very address; false when it is taken or outside the range.
    pub fn take(&mut self, address: IpAddr) -> bool {
        self.offset(address).is_some_and(|o| self.set(o))
    }

    /// Takes any free address; `None` when all are taken.
    pub fn take_next(&mut self) -> Option<IpAddr> {
        for step in 0..self.size {
            let offset = (self.cursor + step) % self.size;
            if offset != API_SERVER_OFFSET && offset != DNS_OFFSET && self.set(offset) {
                self.cursor = (offset + 1) % self.size;
                return Some(self.address(offset));
            }
        }
        None
    }

    /// Gives an address back; false when it was not taken.
    pub fn release(&mut self, address: IpAddr) -> bool {
        match self.offset(address) {
            Some(offset) if offset != 0 && self.is_set(offset) => {
                self.taken[(offset / 64) as usize] &= !(1 << (offset % 64));
                self.free += 1;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn range(text: &str) -> IpRange {
        IpRange::new(text.parse().unwrap()).unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn keeps_the_special_addresses() {
        let mut r = range("10.96.0.0/28");
        assert_eq!(r.api_server(), ip("10.96.0.1"));
        assert_eq!(r.dns(), Some(ip("10.96.0.10")));
        let mut got = HashSet::new();
        while let Some(address) = r.take_next() {
            assert!(got.insert(address));
        }
        let expected: HashSet<IpAddr> =
            (2..15).filter(|n| *n != 10).map(|n| ip(&format!("10.96.0.{n}"))).collect();
        assert_eq!(got, expected);
        assert!(r.take(ip("10.96.0.10")));
        assert!(r.take(ip("10.96.0.1")));
        for refused in ["10.96.0.0", "10.96.0.15", "10.96.0.16", "10.95.255.255", "fd00::1"] {
            assert!(!r.take(ip(refused)), "{refused}");
        }
        assert_eq!(r.free(), 0);
    }

    #[test]
    fn large_v6_networks_are_capped() {
        let mut r = range("fd00:96::/64");
        assert_eq!(r.free(), 65_535);
        assert_eq!(r.take_next(), Some(ip("fd00:96::2")));
        assert!(r.contains(ip("fd00:96::ffff")));
        assert!(!r.contains(ip("fd00:96::1:0")));
        assert_eq!(range("fd00:96::/112").free(), 65_535);
        assert_eq!(range("::/0").free(), 65_535);
        assert_eq!(range("10.0.0.0/8").free(), 65_535);
    }

    #[test]
    fn tiny_networks_are_refused() {
        for text in ["10.0.0.0/30", "fd00::/126"] {
            assert!(IpRange::new(text.parse().unwrap()).is_err(), "{text}");
        }
        assert!(IpRange::new("10.0.0.0/29".parse().unwrap()).is_ok());
    }

    #[test]
    fn released_addresses_come_back_last() {
        let mut r = range("10.0.0.0/24");
        let first = r.take_next().unwrap();
        assert!(r.release(first));
        assert!(!r.release(first));
        assert_ne!(r.take_next(), Some(first));
    }

    proptest! {
        #[test]
        fn free_counts_what_is_not_taken(ops in proptest::collection::vec((any::<bool>(), 0u8..20), 0..200)) {
            let mut r = range("10.0.0.0/28");
            let start = r.free();
            let mut held = HashSet::new();
            for (take, n) in ops {
                let address = ip(&format!("10.0.0.{n}"));
                if take {
                    if r.take(address) { prop_assert!(held.insert(address)); }
                } else {
                    prop_assert_eq!(r.release(address), held.remove(&address));
                }
                prop_assert_eq!(r.free() as usize, start as usize - held.len());
            }
        }
    }
}
