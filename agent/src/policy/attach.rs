//! Which pods' devices get their programs now, PURE. Invariant: where a policy is, or may be, no device waits.
//!
//! Attaching a program by tcx keeps the kernel's lock of links for an RCU grace period: while pods come one after the
//! other, each addition would wait for those before it. Without policies the programs only make packets faster, and can
//! wait for a moment in which no pod comes or goes.

use crate::limits;

/// What is known when devices are looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moment {
    /// No pod comes or goes.
    pub(super) quiet: bool,
    /// There is a policy, or nobody knows yet.
    pub(super) judged: bool,
}

/// Whether the node is busy with pods that come or go, and nobody needs to know each at once: what they change can wait.
pub(super) fn can_wait(moment: Moment) -> bool {
    !moment.quiet && !moment.judged
}

/// Parts the devices of pods into those that have the programs or get them now, and the number of those that wait.
pub(super) fn now(
    pods: Vec<String>,
    has_programs: impl Fn(&str) -> bool,
    moment: Moment,
) -> (Vec<String>, usize) {
    let mut room = if can_wait(moment) { limits::POLICY_ATTACHED_WHILE_BUSY_MAX } else { usize::MAX };
    let all = pods.len();
    let mut now = pods;
    now.retain(|name| {
        let has = has_programs(name);
        let goes = has || room > 0;
        room -= usize::from(goes && !has);
        goes
    });
    let waiting = all - now.len();
    (now, waiting)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("shv{n:03}")).collect()
    }

    #[test]
    fn none_waits_where_it_may_be_judged_or_in_a_quiet_moment() {
        for moment in
            [Moment { judged: true, ..Moment::default() }, Moment { quiet: true, ..Moment::default() }]
        {
            assert!(!can_wait(moment), "{moment:?}");
            assert_eq!(now(names(200), |_| false, moment), (names(200), 0), "{moment:?}");
        }
    }

    #[test]
    fn while_pods_come_the_others_keep_theirs_and_few_get_them() {
        let busy = Moment::default();
        let most = limits::POLICY_ATTACHED_WHILE_BUSY_MAX;
        let old = |name: &str| name < "shv150";
        assert_eq!(now(names(200), old, busy), (names(150 + most), 50 - most));
        assert!(can_wait(busy));
    }

    #[test]
    fn a_node_that_never_rests_gets_there_too() {
        let (most, busy) = (limits::POLICY_ATTACHED_WHILE_BUSY_MAX, Moment::default());
        let mut have = 0;
        let mut looks = 0;
        while have < 100 {
            let (now, waiting) = now(names(100), |name| names(have).iter().any(|n| n == name), busy);
            assert!(now.len() <= have + most && now.len() + waiting == 100, "{have}: {}", now.len());
            assert!(now.len() > have, "nothing moves at {have}");
            have = now.len();
            looks += 1;
        }
        assert_eq!(looks, 100_usize.div_ceil(most));
    }
}
