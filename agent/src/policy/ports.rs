//! Lists of ports. Invariant: normal lists that allow the same are equal, and the prefixes of a list cover just its
//! ports.

use std::collections::{BTreeMap, BTreeSet};

/// Ports that something is allowed on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ports {
    all: bool,
    /// Protocol, first and last port.
    ranges: BTreeSet<(u8, u16, u16)>,
}

/// A power of two of ports of a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortPrefix {
    /// IP protocol number.
    pub proto: u8,
    /// First port.
    pub port: u16,
    /// Leading bits of the port that count, 0 to 16.
    pub bits: u8,
}

impl Ports {
    pub(super) fn allow_all(&mut self) {
        self.all = true;
    }

    pub(super) fn add(&mut self, proto: u8, first: u16, last: u16) {
        if first <= last {
            self.ranges.insert((proto, first, last));
        }
    }

    pub(super) fn is_all(&self) -> bool {
        self.all
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.all && self.ranges.is_empty()
    }

    /// The fewest prefixes that cover a normal list.
    pub(super) fn prefixes(&self) -> Vec<PortPrefix> {
        let mut found = Vec::new();
        for (proto, first, last) in &self.ranges {
            let (mut at, end) = (u32::from(*first), u32::from(*last) + 1);
            while at < end {
                // The largest aligned power of two that begins here and does not go too far.
                let aligned = if at == 0 { 16 } else { at.trailing_zeros().min(16) };
                let fits = (end - at).ilog2();
                let size = aligned.min(fits);
                found.push(PortPrefix { proto: *proto, port: at as u16, bits: 16 - size as u8 });
                at += 1 << size;
            }
        }
        found
    }
}

/// Ranges of a protocol that touch become one; they come in order.
fn merged(ranges: impl Iterator<Item = (u8, u16, u16)>) -> Ports {
    let mut merged: Vec<(u8, u16, u16)> = Vec::new();
    for (proto, first, last) in ranges {
        match merged.last_mut() {
            Some((held, _, end)) if *held == proto && u32::from(first) <= u32::from(*end) + 1 => {
                *end = (*end).max(last);
            }
            _ => merged.push((proto, first, last)),
        }
    }
    Ports { all: false, ranges: merged.into_iter().collect() }
}

/// The sum of lists, each of which can be taken out again.
#[derive(Clone, Debug, Default)]
pub(super) struct Counted {
    all: u32,
    ranges: BTreeMap<(u8, u16, u16), u32>,
}

impl Counted {
    /// Adds a list, or takes out one that was added or will be.
    pub(super) fn count(&mut self, ports: &Ports, is_new: bool) {
        let by = |n: &mut u32| *n = if is_new { n.wrapping_add(1) } else { n.wrapping_sub(1) };
        if ports.all {
            by(&mut self.all);
        }
        for range in &ports.ranges {
            let n = self.ranges.entry(*range).or_default();
            by(n);
            if *n == 0 {
                self.ranges.remove(range);
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all == 0 && self.ranges.is_empty()
    }

    /// What is allowed, as a normal list.
    pub(super) fn normal(&self) -> Ports {
        self.normal_with(&Self::default())
    }

    /// What is allowed here or there, as a normal list.
    pub(super) fn normal_with(&self, other: &Self) -> Ports {
        if self.all > 0 || other.all > 0 {
            return Ports { all: true, ranges: BTreeSet::new() };
        }
        if other.ranges.is_empty() {
            return merged(self.ranges.keys().copied());
        }
        let both: BTreeSet<_> = self.ranges.keys().chain(other.ranges.keys()).copied().collect();
        merged(both.into_iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn normal(ports: &Ports) -> Ports {
        let mut sum = Counted::default();
        sum.count(ports, true);
        sum.normal()
    }

    proptest! {
        #[test]
        fn prefixes_cover_just_the_ranges(
            ranges in proptest::collection::vec((0_u8..2, any::<u16>(), 0_u16..2000), 0..5),
            asked in any::<u16>(),
        ) {
            let mut ports = Ports::default();
            for (proto, first, len) in &ranges {
                ports.add(*proto, *first, first.saturating_add(*len));
            }
            let prefixes = normal(&ports).prefixes();
            let near = ranges.iter().flat_map(|(_, first, len)| {
                let last = first.saturating_add(*len);
                [first.wrapping_sub(1), *first, last, last.wrapping_add(1)]
            });
            for port in near.chain([asked, 0, u16::MAX]) {
                for proto in 0..2 {
                    let wanted = ranges.iter().any(|(p, first, len)| {
                        *p == proto && (*first..=first.saturating_add(*len)).contains(&port)
                    });
                    let hits = prefixes.iter().filter(|prefix| {
                        let shift = 16 - u32::from(prefix.bits);
                        prefix.proto == proto && u32::from(prefix.port) >> shift == u32::from(port) >> shift
                    });
                    prop_assert_eq!(hits.count(), usize::from(wanted));
                }
            }
        }
    }

    #[test]
    fn a_whole_protocol_is_one_prefix() {
        let mut ports = Ports::default();
        ports.add(6, 0, u16::MAX);
        assert_eq!(normal(&ports).prefixes(), [PortPrefix { proto: 6, port: 0, bits: 0 }]);
    }
}
