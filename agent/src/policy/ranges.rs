//! Which ranges an address is in. Invariant: the ranges that the longest prefix of an address says are those that the
//! address is in, whatever prefixes nest.

use super::model::Peer;
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

/// The ranges that policies name, and the peers that they belong to.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// Peers whose range this is, and peers that it is an exception of.
    prefixes: HashMap<IpNetwork, (Vec<u32>, Vec<u32>)>,
    /// Lengths of the prefixes of a family, and how many have each.
    lengths: [BTreeMap<u8, u32>; 2],
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

/// A peer's range, and its exceptions.
fn ranges_of(peer: &Peer) -> impl Iterator<Item = (IpNetwork, bool)> {
    let (cidr, except) = match peer {
        Peer::Block { cidr, except } => (Some(cidr), &**except),
        Peer::Pods { .. } => (None, &[][..]),
    };
    let all = cidr.into_iter().map(|range| (range, true)).chain(except.iter().map(|range| (range, false)));
    all.filter_map(|(range, is_in)| Some((normal(*range)?, is_in)))
}

impl Ranges {
    /// Takes the ranges of a peer in.
    pub(super) fn add(&mut self, id: u32, peer: &Peer) {
        for (range, is_in) in ranges_of(peer) {
            let lengths = &mut self.lengths[usize::from(range.is_ipv6())];
            let held = self.prefixes.entry(range).or_insert_with(|| {
                *lengths.entry(range.prefix()).or_default() += 1;
                Default::default()
            });
            if is_in { &mut held.0 } else { &mut held.1 }.push(id);
        }
    }

    /// Takes them out again.
    pub(super) fn remove(&mut self, id: u32, peer: &Peer) {
        for (range, is_in) in ranges_of(peer) {
            let Some(held) = self.prefixes.get_mut(&range) else { continue };
            let ids = if is_in { &mut held.0 } else { &mut held.1 };
            if let Some(at) = ids.iter().position(|held| *held == id) {
                ids.swap_remove(at);
            }
            if !held.0.is_empty() || !held.1.is_empty() {
                continue;
            }
            self.prefixes.remove(&range);
            let lengths = &mut self.lengths[usize::from(range.is_ipv6())];
            if let Some(n) = lengths.get_mut(&range.prefix()) {
                *n -= 1;
                if *n == 0 {
                    lengths.remove(&range.prefix());
                }
            }
        }
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
        for bits in self.lengths[usize::from(ip.is_ipv6())].range(..=bits_max).rev().map(|(bits, _)| bits) {
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
