//! Maglev tables: which backend serves a hash. Invariant: the backend behind a slot depends on the set of backends, their
//! weights and the seed only, never on the order in which a node lists them, so that all nodes send a client to the same
//! one. The hash functions are part of that contract: nodes of two versions must agree too, so they never change.
//!
//! The method is that of Eisenbud et al., "Maglev" (NSDI 2016), section 3.4: every backend has a permutation of the slots
//! of its own, and in turns each takes the first slot of its permutation that is still free.

use super::model::Proto;
use super::plan::BackendAddr;
use sheave_ebpf_abi::{MAGLEV_SLOTS, PROTO_SCTP, PROTO_TCP, PROTO_UDP};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

/// Slots as a number that indexes are computed with; it is prime, so every skip visits every slot.
const SLOTS: u32 = MAGLEV_SLOTS as u32;
/// A slot that nobody has taken.
const FREE: u16 = u16::MAX;

/// One backend while the table is filled.
struct Taker {
    /// Tie-breaking place among the backends, the same on all nodes.
    rank: (u64, BackendAddr),
    /// Its first index in the caller's list.
    pick: u16,
    /// Turns in each round: how often it is listed.
    turns: u32,
    /// Next slot of its permutation.
    next: u32,
    /// Step of its permutation, 1 to `SLOTS - 1`.
    skip: u32,
}

/// The table for `backends`: for each of the [`MAGLEV_SLOTS`] slots an index into `backends`. One that is listed
/// several times gets that many turns, as a weight, and is named by its first index. All zero for an empty list, which
/// has nobody to pick. A list longer than 65,535 is cut there, as a run of slots cannot be longer.
pub fn picks(backends: &[BackendAddr], seed: u32) -> Arc<[u16]> {
    let mut takers = takers(backends, seed);
    let mut picks = vec![FREE; MAGLEV_SLOTS];
    if takers.is_empty() {
        picks.fill(0);
    }
    let mut left = if takers.is_empty() { 0 } else { MAGLEV_SLOTS };
    'filling: while left > 0 {
        for taker in &mut takers {
            for _ in 0..taker.turns {
                take(&mut picks, taker);
                left -= 1;
                if left == 0 {
                    break 'filling;
                }
            }
        }
    }
    picks.into()
}

/// What tells tables apart: equal for equal picks, within one process.
pub fn fingerprint(picks: &[u16]) -> u64 {
    let mut hasher = DefaultHasher::new();
    picks.hash(&mut hasher);
    hasher.finish()
}

/// The backends, each once, in the order of their turns.
fn takers(backends: &[BackendAddr], seed: u32) -> Vec<Taker> {
    let mut listed: Vec<(BackendAddr, u16)> = backends.iter().copied().zip(0..FREE).collect();
    listed.sort_unstable();
    let mut takers: Vec<Taker> = Vec::with_capacity(listed.len());
    for (backend, pick) in listed {
        match takers.last_mut() {
            Some(last) if last.rank.1 == backend => last.turns += 1,
            _ => {
                let hash = |salt: u64| hash(&backend, u64::from(seed) | salt << 32);
                takers.push(Taker {
                    rank: (hash(1), backend),
                    pick,
                    turns: 1,
                    next: (hash(2) % u64::from(SLOTS)) as u32,
                    skip: (hash(3) % u64::from(SLOTS - 1)) as u32 + 1,
                });
            }
        }
    }
    takers.sort_unstable_by_key(|taker| taker.rank);
    takers
}

/// Gives `taker` the first free slot of its permutation. There must be a free one.
fn take(picks: &mut [u16], taker: &mut Taker) {
    loop {
        let slot = taker.next as usize;
        taker.next += taker.skip;
        if taker.next >= SLOTS {
            taker.next -= SLOTS;
        }
        if picks[slot] == FREE {
            picks[slot] = taker.pick;
            return;
        }
    }
}

/// 64 well spread bits of a backend; `salt` gives independent ones.
fn hash(backend: &BackendAddr, salt: u64) -> u64 {
    let address = match backend.addr {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    let rest = u64::from(backend.port) << 8 | u64::from(number(backend.proto));
    [address as u64, (address >> 64) as u64, rest]
        .into_iter()
        .fold(spread(salt), |held, part| spread(held ^ part))
}

fn number(proto: Proto) -> u8 {
    match proto {
        Proto::Tcp => PROTO_TCP,
        Proto::Udp => PROTO_UDP,
        Proto::Sctp => PROTO_SCTP,
    }
}

/// A bijection of 64 bits in which every input bit reaches every output bit (two rounds of multiply and shift).
fn spread(x: u64) -> u64 {
    let x = (x ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ x >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn backend(n: u32) -> BackendAddr {
        BackendAddr { addr: IpAddr::from((0x0af4_0000 + n).to_be_bytes()), port: 8080, proto: Proto::Tcp }
    }

    fn backends(count: u32) -> Vec<BackendAddr> {
        (0..count).map(backend).collect()
    }

    fn served(list: &[BackendAddr], seed: u32) -> Vec<BackendAddr> {
        picks(list, seed).iter().map(|pick| list[usize::from(*pick)]).collect()
    }

    fn shares(served: &[BackendAddr]) -> BTreeMap<BackendAddr, u32> {
        let mut shares = BTreeMap::new();
        for backend in served {
            *shares.entry(*backend).or_default() += 1;
        }
        shares
    }

    #[test]
    fn nobody_and_one() {
        assert!(picks(&[], 7).iter().all(|pick| *pick == 0));
        assert_eq!(picks(&[], 7).len(), MAGLEV_SLOTS);
        assert!(picks(&backends(1), 7).iter().all(|pick| *pick == 0));
    }

    /// What other nodes compute, perhaps with an older version: a change here breaks their agreement.
    #[test]
    fn tables_stay_what_they_are() {
        let mut list = backends(5);
        list.push(BackendAddr {
            addr: IpAddr::from([0xfd00, 0x244, 0, 0, 0, 0, 0, 5]),
            port: 53,
            proto: Proto::Udp,
        });
        let table = picks(&list, 0x5eed);
        let digest = table.iter().fold(0_u64, |held, pick| spread(held ^ u64::from(*pick)));
        assert_eq!(digest, 2_557_664_620_832_461_868, "{:?}", &table[..12]);
    }

    #[test]
    fn a_backend_that_leaves_takes_few_others_along() {
        let all = backends(100);
        let mut worst = 0;
        for seed in 0..4 {
            let before = served(&all, seed);
            for gone in (0..100).step_by(7) {
                let mut rest = all.clone();
                let gone = rest.remove(gone);
                let after = served(&rest, seed);
                let moved =
                    before.iter().zip(&after).filter(|(old, new)| **old != gone && old != new).count();
                worst = worst.max(moved);
            }
        }
        assert!(worst * 100 <= 2 * MAGLEV_SLOTS, "{worst} of {MAGLEV_SLOTS} slots moved between survivors");
    }

    #[test]
    fn more_backends_than_slots() {
        let shares = shares(&served(&backends(20_000), 1));
        assert_eq!(shares.len(), MAGLEV_SLOTS, "every slot has another backend");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Up to 780 backends no share can be more than 5 % over the mean, since shares differ by one slot at most.
        #[test]
        fn shares_are_even(count in 1_u32..780, seed: u32) {
            let shares = shares(&served(&backends(count), seed));
            let mean = MAGLEV_SLOTS as f64 / f64::from(count);
            let (least, most) = (shares.values().min(), shares.values().max());
            let (least, most) = (*least.unwrap_or(&0), *most.unwrap_or(&0));
            prop_assert_eq!(shares.len(), count as usize);
            prop_assert!(f64::from(most) <= 1.05 * mean && most - least <= 1, "{least}..{most}, mean {mean}");
        }

        #[test]
        fn weights_count(weights in prop::collection::vec(1_u32..6, 1..60), seed: u32) {
            let mut list = Vec::new();
            for (n, weight) in (0..).zip(&weights) {
                list.extend(std::iter::repeat_n(backend(n), *weight as usize));
            }
            let shares = shares(&served(&list, seed));
            let turn = MAGLEV_SLOTS as f64 / list.len() as f64;
            for (n, weight) in (0..).zip(weights) {
                let share = f64::from(shares[&backend(n)]);
                let fair = turn * f64::from(weight);
                prop_assert!(share <= 1.05 * fair + 1.0 && share >= 0.95 * fair - 5.0, "{share} for {fair}");
            }
        }

        #[test]
        fn order_does_not_matter(
            list in prop::collection::vec(0_u32..200, 1..60).prop_map(|n| n.into_iter().map(backend).collect::<Vec<_>>()),
            seed: u32,
            shuffled in any::<prop::sample::Index>(),
        ) {
            let mut other = list.clone();
            other.rotate_left(shuffled.index(list.len()));
            let half = other.len() / 2;
            other[..half].reverse();
            prop_assert_eq!(served(&list, seed), served(&other, seed));
        }

        #[test]
        fn seeds_differ(seed in 0..u32::MAX) {
            let list = backends(10);
            let (one, other) = (picks(&list, seed), picks(&list, seed + 1));
            let same = one.iter().zip(other.iter()).filter(|(a, b)| a == b).count();
            prop_assert!(same < MAGLEV_SLOTS / 5, "{same} slots agree by chance");
        }
    }
}
