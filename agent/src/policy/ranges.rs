//! Which ranges an address is in. Invariant: the ranges that the longest prefix of an address says are those that the
//! address is in, whatever prefixes nest.

use super::model::Peer;
use ipnetwork::IpNetwork;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

/// The ranges that policies name, and the peers that they belong to.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// Peers whose range this is, and peers that it is an exception of.
    prefixes: HashMap<IpNetwork, (Vec<u32>, Vec<u32>)>,
    /// Lengths of the prefixes of a family, the longest first.
    lengths: [Vec<u8>; 2],
}

/// The network of `ip` with this length.
pub(super) fn network(ip: IpAddr, bits: u8) -> Option<IpNetwork> {
    let wide = IpNetwork::new(ip, bits).ok()?;
    IpNetwork::new(wide.network(), bits).ok()
}

/// A range without the bits behind its prefix.
fn normal(range: IpNetwork) -> Option<IpNetwork> {
    network(range.ip(), range.prefix())
}

impl Ranges {
    pub(super) fn new<'a>(peers: impl Iterator<Item = (u32, &'a Peer)>) -> Self {
        let mut ranges = Self::default();
        let mut lengths = [BTreeSet::new(), BTreeSet::new()];
        for (id, peer) in peers {
            let Peer::Block { cidr, except } = peer else { continue };
            let inside = std::iter::once((cidr, true)).chain(except.iter().map(|range| (range, false)));
            for (range, is_in) in inside {
                let Some(range) = normal(*range) else { continue };
                lengths[usize::from(range.is_ipv6())].insert(range.prefix());
                let held = ranges.prefixes.entry(range).or_default();
                if is_in { &mut held.0 } else { &mut held.1 }.push(id);
            }
        }
        ranges.lengths = lengths.map(|family| family.into_iter().rev().collect());
        ranges
    }

    /// Every prefix that an address may have for its longest.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = IpNetwork> {
        self.prefixes.keys().copied()
    }

    /// The peers that have an address in their range and not in an exception, in order.
    pub(super) fn peers_of(&self, ip: IpAddr) -> Vec<u32> {
        self.peers_within(ip, 128)
    }

    /// The peers that have the whole prefix.
    pub(super) fn peers_of_prefix(&self, prefix: IpNetwork) -> Vec<u32> {
        self.peers_within(prefix.ip(), prefix.prefix())
    }

    fn peers_within(&self, ip: IpAddr, bits_max: u8) -> Vec<u32> {
        let mut found = Vec::new();
        let mut excepted = Vec::new();
        for bits in self.lengths[usize::from(ip.is_ipv6())].iter().filter(|bits| **bits <= bits_max) {
            let held = network(ip, *bits).and_then(|prefix| self.prefixes.get(&prefix));
            if let Some((inside, outside)) = held {
                excepted.extend_from_slice(outside);
                found.extend_from_slice(inside);
            }
        }
        found.retain(|id| !excepted.contains(id));
        found.sort_unstable();
        found.dedup();
        found
    }
}
