//! The arithmetic of a rolling update. Invariant: no step asks for more than `replicas + surge` pods in all, and no
//! step takes away a pod that is needed to keep `replicas - unavailable` available.

use std::cmp::Reverse;

use crate::controller::model::{IntOrString, RollingUpdate};

/// What a rolling update must stay within, in pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) replicas: i64,
    pub(super) surge: i64,
    pub(super) unavailable: i64,
}

/// The size of one ReplicaSet: how many pods it is told to have, and how many of them serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) wanted: i64,
    available: i64,
}

impl Size {
    /// Of a set that was just told to shrink, the status may still count pods that are going: they serve no more.
    pub(super) fn new(wanted: i64, available: i64) -> Size {
        Size { wanted, available: available.min(wanted) }
    }
}

impl Bounds {
    /// Resolves percentages of `replicas`: surge rounds up, unavailable down; if both come to 0, one pod may be
    /// unavailable, or the update could not move. Neither given means 25 %, the API's default.
    pub(super) fn new(replicas: i64, rolling: &RollingUpdate) -> Bounds {
        let quarter = || IntOrString::Text("25%".to_owned());
        let surge = resolve(&rolling.max_surge.clone().unwrap_or_else(quarter), replicas, true);
        let unavailable = resolve(&rolling.max_unavailable.clone().unwrap_or_else(quarter), replicas, false);
        let unavailable = if surge == 0 && unavailable == 0 { 1 } else { unavailable };
        Bounds { replicas, surge, unavailable: unavailable.min(replicas) }
    }

    /// Bounds for `Recreate`, which never has two generations of pods.
    pub(super) fn recreate(replicas: i64) -> Bounds {
        Bounds { replicas, surge: 0, unavailable: 0 }
    }

    pub(super) fn total_max(&self) -> i64 {
        self.replicas + self.surge
    }

    pub(super) fn available_min(&self) -> i64 {
        self.replicas - self.unavailable
    }
}

/// A number of pods, or a percentage of `replicas`. What is neither counts as 0: validation has refused it.
fn resolve(value: &IntOrString, replicas: i64, up: bool) -> i64 {
    match value {
        IntOrString::Int(pods) => (*pods).max(0),
        IntOrString::Text(text) => {
            let percent: i64 = text.strip_suffix('%').and_then(|p| p.parse().ok()).unwrap_or(0);
            let scaled = percent.max(0).saturating_mul(replicas.max(0));
            if up { scaled.saturating_add(99) / 100 } else { scaled / 100 }
        }
    }
}

/// The size that the new ReplicaSet may have now, given the pods wanted in all sets, itself included.
pub(super) fn new_size(bounds: &Bounds, new_wanted: i64, total_wanted: i64) -> i64 {
    if new_wanted >= bounds.replicas {
        return bounds.replicas;
    }
    let room = (bounds.total_max() - total_wanted).max(0);
    new_wanted + room.min(bounds.replicas - new_wanted)
}

/// Shrinks the old ReplicaSets (oldest first) as far as is safe now: first pods that do not serve anyway, then as
/// many of the others as the available ones in all sets can spare.
pub(super) fn shrink_old(bounds: &Bounds, new: Size, old: &mut [Size]) {
    let total: i64 = new.wanted + old.iter().map(|s| s.wanted).sum::<i64>();
    let new_unavailable = new.wanted - new.available;
    let mut spare = total - bounds.available_min() - new_unavailable;
    for set in old.iter_mut() {
        let idle = (set.wanted - set.available).min(spare).max(0);
        set.wanted -= idle;
        spare -= idle;
    }
    let available: i64 = new.available + old.iter().map(|s| s.available).sum::<i64>();
    let mut spare = spare.min(available - bounds.available_min());
    for set in old.iter_mut() {
        let goes = set.wanted.min(spare).max(0);
        set.wanted -= goes;
        spare -= goes;
    }
}

/// A set that takes part in a proportional scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) wanted: i64,
    /// `replicas + surge` when the set was last sized; 0 if that is not known.
    pub(super) total_max_then: i64,
    /// Position by age, oldest first.
    pub(super) age: usize,
}

/// Spreads a change of `replicas` in the middle of a rollout over the active sets in proportion to their sizes, so
/// that a bad new generation does not get all the new pods. Returns the sizes in the order of `shares`.
pub(super) fn proportional(bounds: &Bounds, shares: &[Share]) -> Vec<i64> {
    let total: i64 = shares.iter().map(|s| s.wanted).sum();
    let allowed = if bounds.replicas > 0 { bounds.total_max() } else { 0 };
    let change = allowed - total;
    let mut sizes: Vec<i64> = shares.iter().map(|s| s.wanted).collect();
    let mut order: Vec<usize> = (0..shares.len()).collect();
    if change > 0 {
        order.sort_by_key(|i| (Reverse(shares[*i].wanted), Reverse(shares[*i].age)));
    } else {
        order.sort_by_key(|i| (Reverse(shares[*i].wanted), shares[*i].age));
    }
    let mut left = change;
    for i in &order {
        let part = fraction(bounds, shares[*i]);
        let part = if change > 0 { part.clamp(0, left.max(0)) } else { part.clamp(left.min(0), 0) };
        sizes[*i] += part;
        left -= part;
    }
    if let Some(first) = order.first() {
        sizes[*first] = (sizes[*first] + left).max(0);
    }
    sizes
}

/// How much a set would grow or shrink to keep its share.
fn fraction(bounds: &Bounds, share: Share) -> i64 {
    if bounds.replicas == 0 {
        return -share.wanted;
    }
    let then = if share.total_max_then > 0 { share.total_max_then } else { bounds.total_max() };
    let scaled = share.wanted.saturating_mul(bounds.total_max());
    // Rounds half up; all values are non-negative.
    (scaled.saturating_mul(2) + then) / (then * 2) - share.wanted
}
