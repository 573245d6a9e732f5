//! Deployment: moves pods from one template to the next through ReplicaSets. Invariant: one reconcile makes at most
//! one kind of move (grow the new set, shrink old ones, or respread a scale), and the next is worked out from what
//! the ReplicaSets then report.

mod revision;
mod rolling;
mod status;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use self::rolling::{Bounds, Share, Size};
use self::status::Facts;
use super::action::{Action, Part, Target, edit_status};
use super::claim::{Owner, claim};
use super::model::{Condition, Deployment, ReplicaSet, StringMap};
use crate::resource::Propagation;
use crate::resource::kinds::{DEPLOYMENTS, REPLICA_SETS};

pub(crate) use self::revision::new_set_name;

/// What one decision about a Deployment rests on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Observed {
    pub(crate) deployment: Deployment,
    /// ReplicaSets of the namespace that match the selector or name this Deployment as their controller.
    pub(crate) sets: Vec<ReplicaSet>,
    /// Whether a ReplicaSet of the name that [`new_set_name`] gives exists, whoever owns it.
    pub(crate) name_taken: bool,
    /// Uids of the ReplicaSets that still have pods that run or are stopping. Only `Recreate` looks at it.
    pub(crate) busy: BTreeSet<String>,
    /// Why the last attempt to act failed, until one succeeds.
    pub(crate) failure: Option<String>,
    pub(crate) now: Timestamp,
}

/// A ReplicaSet and what this reconcile wants of it.
struct Work<'a> {
    set: &'a ReplicaSet,
    replicas: i64,
    annotations: StringMap,
}

/// One reconcile in the making.
struct Rollout<'a> {
    seen: &'a Observed,
    bounds: Bounds,
    /// Oldest first.
    old: Vec<Work<'a>>,
    new: Option<Work<'a>>,
    conditions: Vec<Condition>,
    actions: Vec<Action>,
    collided: bool,
}

/// What to do about a Deployment.
pub(crate) fn reconcile(seen: &Observed) -> Vec<Action> {
    let deployment = &seen.deployment;
    let meta = &deployment.metadata;
    let mut actions = Vec::new();
    let owner = Owner { kind: &DEPLOYMENTS, meta, selector: &deployment.spec.selector.parsed };
    let adoptable = |set: &ReplicaSet| !set.metadata.is_deleting();
    let mut sets = claim(&owner, &REPLICA_SETS, &seen.sets, |s| &s.metadata, adoptable, &mut actions);
    sets.sort_by(|a, b| age(a).cmp(&age(b)));

    let mut rollout = Rollout::new(seen, &sets, actions);
    if !meta.is_deleting() {
        rollout.advance();
    }
    rollout.finish(&sets)
}

fn age(set: &ReplicaSet) -> (Option<Timestamp>, &str) {
    (set.metadata.creation_timestamp, &set.metadata.name)
}

impl<'a> Rollout<'a> {
    fn new(seen: &'a Observed, sets: &[&'a ReplicaSet], actions: Vec<Action>) -> Rollout<'a> {
        let spec = &seen.deployment.spec;
        let bounds = if spec.strategy.kind == "Recreate" {
            Bounds::recreate(spec.replicas)
        } else {
            Bounds::new(spec.replicas, &spec.strategy.rolling_update)
        };
        let work =
            |set: &'a ReplicaSet| Work { set, replicas: set.spec.replicas, annotations: StringMap::new() };
        let current = sets.iter().position(|s| revision::same_template(s, &seen.deployment));
        let old =
            sets.iter().enumerate().filter(|(i, _)| Some(*i) != current).map(|(_, s)| work(s)).collect();
        let mut conditions = seen.deployment.status.conditions.clone();
        status::note_pause(&seen.deployment, &mut conditions, seen.now);
        Rollout {
            seen,
            bounds,
            old,
            new: current.map(|i| work(sets[i])),
            conditions,
            actions,
            collided: false,
        }
    }

    fn advance(&mut self) {
        self.number_revision();
        let spec = &self.seen.deployment.spec;
        if spec.paused {
            self.rescale();
            self.trim_history();
        } else if spec.strategy.kind == "Recreate" {
            self.recreate();
        } else if self.is_rescale() {
            self.rescale();
        } else {
            self.roll();
        }
    }

    fn all(&self) -> impl Iterator<Item = &Work<'a>> {
        self.old.iter().chain(&self.new)
    }

    fn total(&self) -> i64 {
        self.all().map(|w| w.replicas).sum()
    }

    fn next_revision(&self) -> i64 {
        self.old.iter().map(|w| revision::revision(&w.set.metadata)).max().unwrap_or(0) + 1
    }

    /// Gives the current set, if it exists, the highest revision, and the Deployment the same.
    fn number_revision(&mut self) {
        let next = self.next_revision();
        let deployment = &self.seen.deployment;
        let Some(new) = &mut self.new else { return };
        new.annotations = revision::new_set_annotations(deployment, &new.set.metadata, next);
        let number = revision::revision(&new.set.metadata).max(next);
        self.set_revision(number);
        if status::deadline_seconds(deployment).is_some()
            && self.conditions.iter().all(|c| c.kind != status::PROGRESSING)
        {
            self.note_progress("FoundNewReplicaSet", "a ReplicaSet of this template exists");
        }
    }

    fn set_revision(&mut self, number: i64) {
        let meta = &self.seen.deployment.metadata;
        if revision::revision(meta) != number {
            self.actions.push(Action::Edit {
                target: Target::of(&DEPLOYMENTS, meta),
                part: Part::Main,
                merge: json!({"metadata": {"annotations": {revision::REVISION: number.to_string()}}}),
            });
        }
    }

    fn note_progress(&mut self, reason: &str, message: &str) {
        let condition = status::new(status::PROGRESSING, "True", reason, message.to_owned(), self.seen.now);
        status::set(&mut self.conditions, condition);
    }

    /// Whether `spec.replicas` has changed since the sets were sized: then the sets are respread first, and the
    /// rollout goes on from there.
    fn is_rescale(&self) -> bool {
        let wanted = self.seen.deployment.spec.replicas;
        let sized_for = |w: &Work<'_>| w.set.metadata.annotation(revision::DESIRED)?.parse::<i64>().ok();
        self.all().filter(|w| w.replicas > 0).filter_map(sized_for).any(|n| n != wanted)
    }

    fn rescale(&mut self) {
        let bounds = self.bounds;
        let active = self.all().filter(|w| w.replicas > 0).count();
        if active <= 1 {
            let only = match &mut self.new {
                Some(new) if active == 0 || new.replicas > 0 => Some(new),
                _ if active == 0 => self.old.last_mut(),
                _ => self.old.iter_mut().find(|w| w.replicas > 0),
            };
            if let Some(only) = only {
                only.resize(bounds.replicas, &bounds);
            }
        } else if self.is_saturated() {
            for work in self.old.iter_mut().filter(|w| w.replicas > 0) {
                work.resize(0, &bounds);
            }
        } else if self.seen.deployment.spec.strategy.kind != "Recreate" {
            let mut shared: Vec<&mut Work<'_>> =
                self.old.iter_mut().chain(&mut self.new).filter(|w| w.replicas > 0).collect();
            let shares: Vec<Share> = shared.iter().enumerate().map(|(age, w)| w.share(age)).collect();
            for (work, size) in shared.iter_mut().zip(rolling::proportional(&bounds, &shares)) {
                work.resize(size, &bounds);
            }
        }
    }

    /// Whether the new set does the whole work already.
    fn is_saturated(&self) -> bool {
        let wanted = self.bounds.replicas;
        self.new.as_ref().is_some_and(|new| {
            let sized_for = new.set.metadata.annotation(revision::DESIRED).and_then(|d| d.parse().ok());
            new.replicas == wanted && sized_for == Some(wanted) && new.set.status.available_replicas == wanted
        })
    }

    fn recreate(&mut self) {
        let bounds = self.bounds;
        if self.old.iter().any(|w| w.replicas > 0) {
            for work in self.old.iter_mut().filter(|w| w.replicas > 0) {
                work.resize(0, &bounds);
            }
            return;
        }
        let stopping =
            |w: &Work<'_>| w.set.status.replicas > 0 || self.seen.busy.contains(&w.set.metadata.uid);
        if self.old.iter().any(stopping) {
            return;
        }
        self.grow_new(bounds.replicas);
        self.trim_history();
    }

    /// The next move of a rolling update. While a set has not reported what became of the last one, nobody knows
    /// how many pods there are and how many of them serve, so nothing moves.
    fn roll(&mut self) {
        if self.all().any(|w| w.set.status.observed_generation < w.set.metadata.generation) {
            return;
        }
        let wanted = self.new.as_ref().map_or(0, |w| w.replicas);
        let size = rolling::new_size(&self.bounds, wanted, self.total());
        if self.grow_new(size) {
            return;
        }
        let Some(new) = &self.new else { return };
        let mut sizes: Vec<Size> = self.old.iter().map(Work::size).collect();
        rolling::shrink_old(&self.bounds, new.size(), &mut sizes);
        let bounds = self.bounds;
        let mut shrunk = false;
        for (work, size) in self.old.iter_mut().zip(sizes) {
            if work.replicas != size.wanted {
                work.resize(size.wanted, &bounds);
                shrunk = true;
            }
        }
        if !shrunk {
            self.trim_history();
        }
    }

    /// Makes the new set, or gives it this size. Tells whether that changes anything.
    fn grow_new(&mut self, replicas: i64) -> bool {
        let bounds = self.bounds;
        if let Some(new) = &mut self.new {
            let changes = new.replicas != replicas;
            if changes {
                new.resize(replicas, &bounds);
            }
            return changes;
        }
        if self.seen.name_taken {
            // Some other template has the same hash: the next reconcile tries another name.
            self.collided = true;
            return true;
        }
        let deployment = &self.seen.deployment;
        let number = self.next_revision();
        let name = new_set_name(deployment);
        self.actions.push(Action::Create {
            kind: &REPLICA_SETS,
            namespace: deployment.metadata.namespace.clone(),
            body: revision::new_set(deployment, &bounds, number, replicas),
        });
        if replicas > 0 {
            self.actions.push(scaled_event(self.seen, &name, 0, replicas));
        }
        self.set_revision(number);
        if status::deadline_seconds(deployment).is_some() {
            self.note_progress("NewReplicaSetCreated", &format!("created the ReplicaSet {name}"));
        }
        true
    }

    /// Old sets beyond the history limit go, once the rollout is complete or while it is paused.
    fn trim_history(&mut self) {
        let deployment = &self.seen.deployment;
        if !deployment.spec.paused && !status::is_complete(deployment, &deployment.status) {
            return;
        }
        let old: Vec<&ReplicaSet> = self.old.iter().map(|w| w.set).collect();
        for set in revision::beyond_history(deployment, &old) {
            self.actions.push(Action::Delete {
                target: Target::unchanged(&REPLICA_SETS, &set.metadata),
                grace_seconds: None,
                propagation: Propagation::Background,
            });
        }
    }

    /// Turns the wanted sizes into actions and adds the status.
    fn finish(mut self, sets: &[&'a ReplicaSet]) -> Vec<Action> {
        let seen = self.seen;
        let deployment = &seen.deployment;
        let mut actions = std::mem::take(&mut self.actions);
        let min_ready = deployment.spec.min_ready_seconds;
        for work in self.old.iter().chain(&self.new) {
            let is_new = self.new.as_ref().is_some_and(|n| std::ptr::eq(n.set, work.set));
            let min_ready = (is_new && work.set.spec.min_ready_seconds != min_ready).then_some(min_ready);
            actions.extend(work.edit(min_ready));
            if work.replicas != work.set.spec.replicas {
                let name = &work.set.metadata.name;
                actions.push(scaled_event(seen, name, work.set.spec.replicas, work.replicas));
            }
        }
        let (mut status, again) = status::work_out(Facts {
            deployment,
            bounds: self.bounds,
            new: self.new.as_ref().map(|w| w.set),
            all: sets,
            conditions: self.conditions,
            failure: seen.failure.as_deref().filter(|_| self.new.is_none()),
            now: seen.now,
        });
        if self.collided {
            status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
        }
        if status != deployment.status {
            actions.push(edit_status(&DEPLOYMENTS, &deployment.metadata, status::to_json(&status)));
        }
        actions.extend(again.map(Action::Again));
        actions
    }
}

impl Work<'_> {
    fn size(&self) -> Size {
        Size::new(self.replicas, self.set.status.available_replicas)
    }

    fn share(&self, age: usize) -> Share {
        let then = self.set.metadata.annotation(revision::MAX).and_then(|m| m.parse().ok());
        Share { wanted: self.replicas, total_max_then: then.unwrap_or(0), age }
    }

    /// Sets the size and, with it, the annotations that say for which size of the Deployment it was chosen.
    fn resize(&mut self, replicas: i64, bounds: &Bounds) {
        self.replicas = replicas;
        let annotations = revision::size_annotations(bounds).into_iter();
        self.annotations.extend(annotations.filter(|(k, v)| self.set.metadata.annotations.get(k) != Some(v)));
    }

    fn edit(&self, min_ready_seconds: Option<i64>) -> Option<Action> {
        let mut merge = Map::new();
        if !self.annotations.is_empty() {
            merge.insert("metadata".to_owned(), json!({"annotations": self.annotations}));
        }
        let mut spec = Map::new();
        if self.replicas != self.set.spec.replicas {
            spec.insert("replicas".to_owned(), json!(self.replicas));
        }
        if let Some(seconds) = min_ready_seconds {
            spec.insert("minReadySeconds".to_owned(), json!(seconds));
        }
        if !spec.is_empty() {
            merge.insert("spec".to_owned(), Value::Object(spec));
        }
        (!merge.is_empty()).then(|| Action::Edit {
            target: Target::unchanged(&REPLICA_SETS, &self.set.metadata),
            part: Part::Main,
            merge: Value::Object(merge),
        })
    }
}

fn scaled_event(seen: &Observed, set: &str, from: i64, to: i64) -> Action {
    let direction = if to > from { "up" } else { "down" };
    Action::Event {
        about: Target::of(&DEPLOYMENTS, &seen.deployment.metadata),
        warning: false,
        reason: "ScalingReplicaSet",
        message: format!("Scaled {direction} replica set {set} from {from} to {to}"),
    }
}
