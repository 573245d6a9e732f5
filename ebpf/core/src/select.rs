//! Which slots of a run may be used, and which one is. Invariant: traffic policies and termination are index ranges
//! of one run, so a pick costs one lookup.

use sheave_ebpf_abi::Frontend;

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
    let local_ready = u32::from(frontend.local_ready);
    let ready = local_ready + u32::from(frontend.remote_ready);
    let local_terminating = u32::from(frontend.local_terminating);
    let terminating = local_terminating + u32::from(frontend.remote_terminating);
    let (first, fallback) = match scope {
        Scope::Cluster => (ready, terminating),
        Scope::Local => (local_ready, local_terminating),
    };
    if first != 0 {
        return Some(Range { base: frontend.base, len: first });
    }
    if fallback != 0 {
        return Some(Range { base: frontend.base + ready, len: fallback });
    }
    None
}

/// The slot that `entropy` (32 evenly distributed bits) picks from `range`.
#[inline(always)]
pub fn pick(range: Range, entropy: u32) -> u32 {
    range.base + ((u64::from(entropy) * u64::from(range.len)) >> 32) as u32
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
        fn ranges_stay_inside_the_run(counts in any::<[u16; 4]>(), entropy in any::<u32>()) {
            let f = frontend(counts);
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
