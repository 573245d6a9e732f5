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
    /// It is time to look after everything.
    pub(super) tick: bool,
    /// There is a policy, or nobody knows yet.
    pub(super) judged: bool,
}

/// Whether devices are looked at: each pod that comes changes several things, and where no policy is they can wait.
pub(super) fn is_time(moment: Moment) -> bool {
    moment.quiet || moment.tick || moment.judged
}

/// Parts the devices of pods into those that have the programs or get them now, and the number of those that wait.
pub(super) fn now(
    pods: Vec<String>,
    has_programs: impl Fn(&str) -> bool,
    moment: Moment,
) -> (Vec<String>, usize) {
    let busy = !moment.quiet && !moment.judged;
    let mut room = if busy { limits::POLICY_ATTACHED_WHILE_BUSY_MAX } else { usize::MAX };
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
        for moment in [
            Moment { judged: true, ..Moment::default() },
            Moment { quiet: true, ..Moment::default() },
            Moment { judged: true, tick: true, ..Moment::default() },
        ] {
            assert_eq!(now(names(200), |_| false, moment), (names(200), 0), "{moment:?}");
        }
    }

    #[test]
    fn while_pods_come_the_others_keep_theirs_and_nothing_is_looked_at() {
        let tick = Moment { tick: true, ..Moment::default() };
        let most = limits::POLICY_ATTACHED_WHILE_BUSY_MAX;
        let old = |name: &str| name < "shv150";
        assert_eq!(now(names(200), old, tick), (names(150 + most), 50 - most));
        assert!(is_time(tick) && !is_time(Moment::default()));
    }

    #[test]
    fn a_node_that_never_rests_gets_there_too() {
        let (most, tick) =
            (limits::POLICY_ATTACHED_WHILE_BUSY_MAX, Moment { tick: true, ..Moment::default() });
        let mut have = 0;
        let mut looks = 0;
        while have < 100 {
            let (now, waiting) = now(names(100), |name| names(have).iter().any(|n| n == name), tick);
            assert!(now.len() <= have + most && now.len() + waiting == 100, "{have}: {}", now.len());
            assert!(now.len() > have, "nothing moves at {have}");
            have = now.len();
            looks += 1;
        }
        assert_eq!(looks, 100_usize.div_ceil(most));
    }
}
