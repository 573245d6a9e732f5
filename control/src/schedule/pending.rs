//! Pods that wait for a node, as plain data. Invariant: a pod is in at most one of three places: in line, set aside
//! until something changes, or on its way to a node.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::model::Pod;
use crate::limits;

/// Higher priority first, then the older pod, then the one that came first.
type Turn = (Reverse<i64>, Option<Timestamp>, u64, String);

#[derive(Debug, Clone, PartialEq)]
enum Place {
    InLine(Turn),
    /// No node fits.
    Aside,
    /// Being bound.
    OnItsWay,
    /// Binding failed; again at this time.
    Later(Instant),
}

#[derive(Debug)]
struct Entry {
    pod: Pod,
    place: Place,
    /// Failures to bind in a row.
    tries: u32,
}

/// See the module's invariant.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    entries: HashMap<String, Entry>,
    line: BTreeSet<Turn>,
    later: BTreeSet<(Instant, String)>,
    turns: u64,
}

impl Pending {
    /// Takes in an unbound pod, new or changed. A change of what it asks for puts it in line again.
    pub(crate) fn put(&mut self, pod: Pod) {
        let uid = pod.meta.uid.clone();
        if let Some(entry) = self.entries.get_mut(&uid) {
            let same = entry.pod.ask == pod.ask && entry.pod.priority == pod.priority;
            entry.pod = pod;
            if same || entry.place == Place::OnItsWay {
                return;
            }
        } else {
            self.entries.insert(uid.clone(), Entry { pod, place: Place::Aside, tries: 0 });
        }
        self.line_up(&uid);
    }

    /// Forgets a pod that is bound, over or gone.
    pub(crate) fn remove(&mut self, uid: &str) {
        if let Some(entry) = self.entries.remove(uid) {
            self.leave(uid, &entry.place);
        }
    }

    /// The next pod in line, which is on its way from now on: the caller says what becomes of it.
    pub(crate) fn next(&mut self, now: Instant) -> Option<Pod> {
        while let Some((at, uid)) = self.later.first().cloned()
            && at <= now
        {
            self.line_up(&uid);
        }
        let turn = self.line.pop_first()?;
        let entry = self.entries.get_mut(&turn.3)?;
        entry.place = Place::OnItsWay;
        Some(entry.pod.clone())
    }

    /// No node fits: the pod waits for a change.
    pub(crate) fn set_aside(&mut self, uid: &str) {
        self.move_to(uid, Place::Aside);
    }

    /// Binding failed: the pod waits a while, longer each time.
    pub(crate) fn retry_later(&mut self, uid: &str, now: Instant) {
        let Some(entry) = self.entries.get_mut(uid) else { return };
        entry.tries = entry.tries.saturating_add(1);
        let factor = 1_u64.checked_shl(entry.tries - 1).unwrap_or(u64::MAX);
        let wait = limits::RETRY_MIN_MS.saturating_mul(factor).min(limits::RETRY_MAX_MS);
        let at = now.checked_add(Duration::from_millis(wait)).unwrap_or(now);
        self.move_to(uid, Place::Later(at));
        self.later.insert((at, uid.to_owned()));
    }

    /// Something has changed: all that were set aside stand in line again.
    pub(crate) fn wake(&mut self) {
        let aside: Vec<String> = self
            .entries
            .iter()
            .filter(|(_, e)| e.place == Place::Aside)
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in aside {
            self.line_up(&uid);
        }
    }

    pub(crate) fn contains(&self, uid: &str) -> bool {
        self.entries.contains_key(uid)
    }

    pub(crate) fn has_next(&self) -> bool {
        !self.line.is_empty()
    }

    /// When the next pod comes back that could not be bound.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.later.first().map(|(at, _)| *at)
    }

    fn line_up(&mut self, uid: &str) {
        let Some(entry) = self.entries.get(uid) else {
            self.later.retain(|(_, u)| u != uid);
            return;
        };
        self.turns += 1;
        let turn =
            (Reverse(entry.pod.priority), entry.pod.meta.creation_timestamp, self.turns, uid.to_owned());
        self.move_to(uid, Place::InLine(turn.clone()));
        self.line.insert(turn);
    }

    fn move_to(&mut self, uid: &str, place: Place) {
        let Some(entry) = self.entries.get_mut(uid) else { return };
        let old = std::mem::replace(&mut entry.place, place);
        self.leave(uid, &old);
    }

    fn leave(&mut self, uid: &str, place: &Place) {
        match place {
            Place::InLine(turn) => {
                self.line.remove(turn);
            }
            Place::Later(at) => {
                self.later.remove(&(*at, uid.to_owned()));
            }
            Place::Aside | Place::OnItsWay => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, priority: i64, created: i64) -> Pod {
        let mut pod = Pod { priority, ..Pod::default() };
        pod.meta.uid = uid.to_owned();
        pod.meta.creation_timestamp = Timestamp::from_second(created).ok();
        pod
    }

    fn drain(pending: &mut Pending, now: Instant) -> Vec<String> {
        std::iter::from_fn(|| pending.next(now)).map(|p| p.meta.uid).collect()
    }

    #[test]
    fn the_line_is_by_priority_then_age_then_arrival() {
        let now = Instant::now();
        let mut pending = Pending::default();
        for (uid, priority, created) in [("c", 0, 5), ("b", 0, 3), ("a", 9, 7), ("d", 0, 5)] {
            pending.put(pod(uid, priority, created));
        }
        assert_eq!(drain(&mut pending, now), ["a", "b", "c", "d"]);
        assert!(!pending.has_next());
    }

    #[test]
    fn set_aside_until_something_changes() {
        let now = Instant::now();
        let mut pending = Pending::default();
        pending.put(pod("a", 0, 1));
        pending.next(now);
        pending.set_aside("a");
        pending.put(pod("a", 0, 1));
        assert_eq!(drain(&mut pending, now), [""; 0], "the same pod again is no change");
        pending.wake();
        assert_eq!(drain(&mut pending, now), ["a"]);
        pending.wake();
        assert_eq!(drain(&mut pending, now), [""; 0], "one on its way is not placed twice");
        pending.set_aside("a");
        pending.put(pod("a", 5, 1));
        assert_eq!(drain(&mut pending, now), ["a"], "another priority is a change");
        pending.remove("a");
        pending.wake();
        assert_eq!(drain(&mut pending, now), [""; 0]);
    }

    #[test]
    fn a_failed_binding_waits_longer_each_time() {
        let mut now = Instant::now();
        let mut pending = Pending::default();
        pending.put(pod("a", 0, 1));
        let mut waits = Vec::new();
        for _ in 0..4 {
            assert_eq!(drain(&mut pending, now), ["a"]);
            pending.retry_later("a", now);
            let due = pending.next_due().expect("a time");
            waits.push((due - now).as_millis());
            assert_eq!(drain(&mut pending, now), [""; 0]);
            now = due;
        }
        assert_eq!(waits, [10, 20, 40, 80]);
        pending.remove("a");
        assert_eq!(pending.next_due(), None);
    }
}
