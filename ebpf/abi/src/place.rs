//! Where the connection table has a tuple's entry, and which entry makes room for another. Invariant: a set never has two
//! entries with the same tag, so a tag names at most one of them; and who makes room is one that has the very tag by chance
//! (once in a hundred million times), else a free one, else the one whose time is up first: an attempt that nobody answered goes
//! before a connection that is quiet.
//!
//! The table is an array of sets. A hash map of the kernel costs a packet a call and three places in memory a look, and what it
//! evicts is what was used longest ago: many short connections drive out one that is merely idle.

use crate::{FLOW_WAYS, FlowKey};

/// Where a tuple's entry is, if it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Element of the table, not its first one.
    pub set: u32,
    /// What the set calls it; never 0.
    pub tag: u32,
}

/// The place of a tuple in a table of so many sets, mixed with the words of a secret
/// ([`crate::FlowHead::secret`]).
///
/// The sum of products is NH (RFC 4418, section 5.2.2): who does not know the secret can't find tuples that meet in a set.
#[inline(always)]
pub fn place(key: &FlowKey, secret: impl Fn(usize) -> u32, sets: u32) -> Place {
    let (s, d) = (&key.src.words, &key.dst.words);
    let ports = u32::from(key.sport) << 16 | u32::from(key.dport);
    let product = |pair: usize, a: u32, b: u32| {
        u64::from(a.wrapping_add(secret(2 * pair))) * u64::from(b.wrapping_add(secret(2 * pair + 1)))
    };
    let sum = product(0, s[0], s[1])
        .wrapping_add(product(1, s[2], s[3]))
        .wrapping_add(product(2, d[0], d[1]))
        .wrapping_add(product(3, d[2], d[3]))
        .wrapping_add(product(4, ports, u32::from(key.proto)));
    // The sum is good as a whole; set and tag are each a part of it.
    let mixed = (sum ^ sum >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = mixed ^ mixed >> 29;
    Place { set: 1 + ((mixed >> 32).wrapping_mul(u64::from(sets)) >> 32) as u32, tag: mixed as u32 | 1 }
}

/// Which of a set's entries has the tag; [`FLOW_WAYS`] where none has.
///
/// Counted and not searched: of a search the verifier goes every way. `hide` is to give its argument in a manner that keeps the
/// compiler from making a search of it, or masks of signs, both values of which a newer verifier goes after.
#[inline(always)]
pub fn find(tags: impl Fn(usize) -> u32, tag: u32, hide: impl Fn(u64) -> u64) -> u32 {
    let mut found = 0;
    let mut way = 0;
    while way < FLOW_WAYS {
        let is_it = hide(u64::from(tags(way) ^ tag)).wrapping_sub(1) >> 63;
        found += hide(is_it) * (FLOW_WAYS - way) as u64;
        way += 1;
    }
    FLOW_WAYS as u32 - found as u32
}

/// Which of a set's entries makes room for another one: a free one, else the one that counts the shortest time. `hide` is as for
/// [`find`].
#[inline(always)]
pub fn victim(tags: impl Fn(usize) -> u32, until_s: impl Fn(usize) -> u32, hide: impl Fn(u64) -> u64) -> u32 {
    let mut least = u64::MAX >> 1;
    let mut way = 0;
    while way < FLOW_WAYS {
        let is_free = hide(u64::from(tags(way))).wrapping_sub(1) >> 63;
        let rank = (u64::from(until_s(way)) & is_free.wrapping_sub(1)) << 4 | way as u64;
        // The lesser of two, neither of which has the uppermost bit.
        let above = rank.wrapping_sub(least);
        least = least.wrapping_add(above & hide(above >> 63).wrapping_neg());
        way += 1;
    }
    least as u32 & 15
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Address, Plain as _};
    use core::convert::identity;
    use std::collections::{BTreeMap, BTreeSet};
    use std::vec::Vec;

    const SECRET: [u32; 10] =
        [0x6c1b_36a5, 2_891_336_453, 77, 0xffff_ffff, 5, 0x8000_0001, 11, 13, 0x1234_5678, 99];

    fn at(key: &FlowKey, sets: u32) -> Place {
        place(key, |word| SECRET[word], sets)
    }

    fn tuples() -> impl Iterator<Item = FlowKey> {
        (0..20_000_u32).map(|n| FlowKey {
            src: Address::v4((0x0a00_0000 + n / 100).to_be()),
            dst: Address::v4(0x0101_a8c0),
            sport: (1_024 + n as u16 % 100).to_be(),
            dport: 80_u16.to_be(),
            proto: 6,
            ..FlowKey::zeroed()
        })
    }

    #[test]
    fn tuples_that_are_alike_spread_evenly_over_sets_and_tags() {
        const SETS: u32 = 2_000;
        let mut held = BTreeMap::<u32, u32>::new();
        let mut tags = BTreeSet::new();
        for key in tuples() {
            let place = at(&key, SETS);
            assert!((1..=SETS).contains(&place.set) && place.tag != 0, "{place:?}");
            *held.entry(place.set).or_default() += 1;
            tags.insert((place.set, place.tag));
        }
        assert_eq!(tags.len(), 20_000, "no two in a set with one tag");
        // Ten a set on the average; by chance 8.3 % have more than fourteen, 0.5 % less than four, and one in a million 30.
        let count = |wanted: &dyn Fn(u32) -> bool| held.values().filter(|count| wanted(**count)).count();
        assert!((110..230).contains(&count(&|count| count > 14)), "{} crowded", count(&|count| count > 14));
        assert!(count(&|count| count < 4) < 60 && held.len() > 1_990, "few that hardly anything is in");
        assert_eq!(count(&|count| count > 30), 0);
    }

    #[test]
    fn each_part_of_a_tuple_counts_and_so_does_the_secret() {
        let key = tuples().next().expect("a tuple");
        let bytes = key.as_bytes();
        // All but the padding.
        for byte in 0..37 {
            for bit in 0..8 {
                let mut other = bytes.to_vec();
                other[byte] ^= 1 << bit;
                let other = FlowKey::from_bytes(&other).expect("a tuple");
                assert_ne!(at(&key, 1 << 20), at(&other, 1 << 20), "bit {bit} of byte {byte}");
            }
        }
        let elsewhere = place(&key, |word| SECRET[word] ^ 1, 1 << 20);
        assert_ne!(at(&key, 1 << 20), elsewhere);
    }

    #[test]
    fn a_tag_is_found_where_it_is() {
        let tags = [7, 0, 9, u32::MAX, 11, 13, 1, 21, 22, 23, 24, 25, 26, 27];
        for (way, tag) in tags.iter().enumerate() {
            assert_eq!(find(|way| tags[way], *tag, identity), way as u32);
        }
        assert_eq!(find(|way| tags[way], 8, identity), FLOW_WAYS as u32);
    }

    #[test]
    fn a_free_entry_makes_room_and_then_the_one_that_counts_the_shortest_time() {
        let mut until_s = [500, 30, u32::MAX, 31, 8_000, 600, 29, 1, 2, 3, 4, 5, 6, 7];
        let mut tags = [1, 2, 3, 4, 5, 0, 7, 8, 0, 10, 11, 12, 13, 14];
        let mut order = Vec::new();
        for _ in 0..FLOW_WAYS {
            let way = victim(|way| tags[way], |way| until_s[way], identity) as usize;
            order.push(way);
            (tags[way], until_s[way]) = (99, u32::MAX);
        }
        // Of those that count for ever, which all do in the end, the first.
        assert_eq!(order, [5, 8, 7, 9, 10, 11, 12, 13, 6, 1, 3, 0, 4, 0]);
    }
}
