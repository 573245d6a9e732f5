//! Which slots of a run may be used, and which one is. Invariant: traffic policies and termination are index ranges
//! of one run, so a pick costs one lookup.

use crate::env::Table;
use sheave_ebpf_abi::{Address, Frontend, MAGLEV_SLOTS};

/// Which endpoints a policy admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All endpoints.
    Cluster,
    /// Endpoints of this node only.
    Local,
}

/// A contiguous part of the slots array; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First slot.
    pub base: u32,
    /// How many, at least 1.
    pub len: u32,
}

/// The slots that `scope` may use: the ready ones or, when there are none, the serving ones that terminate
/// (KEP-1669). `None` when nothing serves.
#[inline(always)]
pub fn range(frontend: &Frontend, scope: Scope) -> Option<Range> {
    let ready = u32::from(frontend.local_ready) + u32::from(frontend.remote_ready);
    let (skipped, first) = ready_in(frontend, scope);
    if first != 0 {
        return Some(Range { base: frontend.base + skipped, len: first });
    }
    let local_terminating = u32::from(frontend.local_terminating);
    let fallback = match scope {
        Scope::Cluster => local_terminating + u32::from(frontend.remote_terminating),
        Scope::Local => local_terminating,
    };
    if fallback != 0 {
        return Some(Range { base: frontend.base + ready, len: fallback });
    }
    None
}

/// The ready endpoints that `scope` may use: how many slots of the run come before them, and how many they are.
#[inline(always)]
pub fn ready_in(frontend: &Frontend, scope: Scope) -> (u32, u32) {
    let local_ready = u32::from(frontend.local_ready);
    match scope {
        Scope::Local => (0, local_ready),
        Scope::Cluster => {
            let skipped = u32::from(frontend.local_only).min(local_ready);
            (skipped, local_ready - skipped + u32::from(frontend.remote_ready))
        }
    }
}

/// The slot that `entropy` (32 evenly distributed bits) picks from `range`.
#[inline(always)]
pub fn pick(range: Range, entropy: u32) -> u32 {
    range.base + ((u64::from(entropy) * u64::from(range.len)) >> 32) as u32
}

/// The slot that the frontend's Maglev table picks for `hash` (see [`client_hash`]) under policy Cluster; `None` when it
/// has none, or one that does not fit its run (another node's idea of weights cannot make it leave the run): the caller
/// then picks at random.
#[inline(always)]
pub fn maglev_pick<T: Table>(table: &T, frontend: &Frontend, hash: u32) -> Option<u32> {
    if frontend.maglev == 0 {
        return None;
    }
    let range = range(frontend, Scope::Cluster)?;
    let slot = ((u64::from(hash) * MAGLEV_SLOTS as u64) >> 32) as u32;
    let pick = u32::from(table.maglev(frontend.maglev, slot)?);
    if pick < range.len { Some(range.base + pick) } else { None }
}

/// A client's connection as every other node hashes it too. Ports in network order; with `affinity` only the client's
/// address counts, so that it has one backend whatever it connects from, and through whichever address.
#[inline(always)]
pub fn client_hash(
    client: &Address,
    client_port: u16,
    asked: &Address,
    asked_port: u16,
    proto: u8,
    seed: u32,
    affinity: bool,
) -> u32 {
    let c = &client.words;
    let mut held = mix2(u64::from(c[0]) << 32 | u64::from(c[1]), u64::from(seed));
    held = mix2(u64::from(c[2]) << 32 | u64::from(c[3]), held);
    if !affinity {
        let d = &asked.words;
        held = mix2(u64::from(d[0]) << 32 | u64::from(d[1]), held);
        held = mix2(u64::from(d[2]) << 32 | u64::from(d[3]), held);
        let ports = u64::from(client_port) << 32 | u64::from(asked_port) << 16 | u64::from(proto);
        held = mix2(ports, held);
    }
    (held >> 32) as u32
}

/// Takes `part` into a running hash.
#[inline(always)]
fn mix2(part: u64, held: u64) -> u64 {
    let x = (part ^ held ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ x >> 32
}

/// Whether the slot `index` of the frontend's run holds an endpoint of this node.
#[inline(always)]
pub fn is_local(frontend: &Frontend, index: u32) -> bool {
    let at = index.wrapping_sub(frontend.base);
    let local_ready = u32::from(frontend.local_ready);
    let ready = local_ready + u32::from(frontend.remote_ready);
    at < local_ready || (at >= ready && at < ready + u32::from(frontend.local_terminating))
}

/// Spreads `x` over 32 bits such that every input bit reaches every output bit.
#[inline(always)]
pub fn mix(x: u64) -> u32 {
    let mut h = x;
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^= h >> 33;
    (h >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sheave_ebpf_abi::Plain as _;

    fn frontend(counts: [u16; 4]) -> Frontend {
        Frontend {
            service: 1,
            base: 100,
            local_ready: counts[0],
            remote_ready: counts[1],
            local_terminating: counts[2],
            remote_terminating: counts[3],
            ..Frontend::zeroed()
        }
    }

    #[test]
    fn ready_before_terminating() {
        let f = frontend([2, 3, 4, 5]);
        assert_eq!(range(&f, Scope::Cluster), Some(Range { base: 100, len: 5 }));
        assert_eq!(range(&f, Scope::Local), Some(Range { base: 100, len: 2 }));
    }

    #[test]
    fn terminating_when_nothing_is_ready_in_the_scope() {
        let f = frontend([0, 3, 4, 5]);
        assert_eq!(range(&f, Scope::Cluster), Some(Range { base: 100, len: 3 }));
        assert_eq!(range(&f, Scope::Local), Some(Range { base: 103, len: 4 }));
        assert_eq!(range(&frontend([0, 0, 4, 5]), Scope::Cluster), Some(Range { base: 100, len: 9 }));
    }

    #[test]
    fn what_hints_keep_for_others_is_for_policy_local_alone() {
        let f = Frontend { local_only: 2, ..frontend([3, 4, 5, 6]) };
        assert_eq!(range(&f, Scope::Cluster), Some(Range { base: 102, len: 5 }));
        assert_eq!(range(&f, Scope::Local), Some(Range { base: 100, len: 3 }));
        let all = Frontend { local_only: 3, ..frontend([3, 0, 5, 6]) };
        assert_eq!(range(&all, Scope::Cluster), Some(Range { base: 103, len: 11 }));
    }

    #[test]
    fn nothing_serves() {
        assert_eq!(range(&frontend([0, 0, 0, 0]), Scope::Cluster), None);
        assert_eq!(range(&frontend([0, 7, 0, 3]), Scope::Local), None);
    }

    #[test]
    fn picks_are_even() {
        let mut hits = [0_u32; 7];
        for cookie in 0..70_000_u64 {
            hits[pick(Range { base: 0, len: 7 }, mix(cookie)) as usize] += 1;
        }
        assert!(hits.iter().all(|&n| (9_500..10_500).contains(&n)), "{hits:?}");
    }

    proptest! {
        #[test]
        fn ranges_stay_inside_the_run(
            counts in any::<[u16; 4]>(),
            local_only in any::<u16>(),
            entropy in any::<u32>(),
        ) {
            let f = Frontend { local_only, ..frontend(counts) };
            for scope in [Scope::Cluster, Scope::Local] {
                if let Some(r) = range(&f, scope) {
                    let slot = pick(r, entropy);
                    prop_assert!(r.len > 0 && slot >= r.base && slot < r.base + r.len);
                    prop_assert!(r.base >= f.base && r.base + r.len <= f.base + f.slot_count());
                }
            }
        }
    }
}
