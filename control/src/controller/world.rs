//! A make-believe API server for the tests of the controllers: objects are JSON, actions are applied as the real
//! driver would have them applied. Invariant: an edit of an object that has changed since it was seen is refused.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::action::{Action, Part, Target};
use super::model::{Deployment, Meta, Pod, ReplicaSet, selects};
use super::{deployment, replica_set};
use crate::resource::Kind;
use crate::resource::kinds::{DEPLOYMENTS, PODS, REPLICA_SETS};

/// Parses a view, as the driver does from cached bytes.
pub(crate) fn view<T: DeserializeOwned>(object: &Value) -> T {
    serde_json::from_value(object.clone()).expect("a test object parses")
}

/// All objects of one namespace, by plural and name.
pub(crate) struct World {
    pub(crate) objects: BTreeMap<(&'static str, String), Value>,
    pub(crate) now: Timestamp,
    pub(crate) events: Vec<String>,
    /// Counts the writes.
    pub(crate) rev: u64,
}

impl World {
    pub(crate) fn new() -> World {
        World {
            objects: BTreeMap::new(),
            now: "2026-01-01T00:00:00Z".parse().expect("a time"),
            events: Vec::new(),
            rev: 0,
        }
    }

    pub(crate) fn pass(&mut self, seconds: i64) {
        self.now = self.now.checked_add(SignedDuration::from_secs(seconds)).expect("a time");
    }

    pub(crate) fn put(&mut self, kind: &'static Kind, mut object: Value) {
        self.rev += 1;
        let name = match object["metadata"]["name"].as_str() {
            Some(name) => name.to_owned(),
            None => format!("{}{}", object["metadata"]["generateName"].as_str().expect("a name"), self.rev),
        };
        let metadata = &mut object["metadata"];
        metadata["name"] = json!(name);
        metadata["namespace"] = json!("default");
        metadata["uid"] = json!(format!("uid-{}", self.rev));
        metadata["generation"] = json!(1);
        metadata["creationTimestamp"] = json!(self.now);
        metadata["testRev"] = json!(self.rev);
        let old = self.objects.insert((kind.plural, name.clone()), object);
        assert!(old.is_none(), "{name} exists already");
    }

    pub(crate) fn change(&mut self, kind: &'static Kind, name: &str, part: Part, merge: &Value) {
        self.rev += 1;
        let key = (kind.plural, name.to_owned());
        let object = self.objects.get_mut(&key).unwrap_or_else(|| panic!("{key:?} is not there"));
        let old = object.clone();
        json_patch::merge(object, merge);
        assert_ne!(*object, old, "an edit of {key:?} that changes nothing: {merge}");
        if part == Part::Status {
            assert_eq!(object["spec"], old["spec"], "a status edit changes the spec");
        } else {
            assert_eq!(object["status"], old["status"], "an edit changes the status");
        }
        if object["spec"] != old["spec"] {
            object["metadata"]["generation"] = json!(old["metadata"]["generation"].as_i64().unwrap_or(0) + 1);
        }
        object["metadata"]["testRev"] = json!(self.rev);
    }

    /// Carries out actions; `false` if one was refused because its object has changed.
    pub(crate) fn apply(&mut self, actions: &[Action]) -> bool {
        actions.iter().all(|action| self.apply_one(action))
    }

    fn apply_one(&mut self, action: &Action) -> bool {
        match action {
            Action::Create { kind, body, .. } => self.put(kind, body.clone()),
            Action::Edit { target, part, merge } => {
                let fresh = self.is_fresh(target);
                if fresh {
                    self.change(target.kind, &target.name, *part, merge);
                }
                return fresh;
            }
            Action::Delete { target, .. } => {
                let fresh = self.is_fresh(target);
                if fresh {
                    self.rev += 1;
                    self.objects.remove(&(target.kind.plural, target.name.clone()));
                }
                return fresh;
            }
            Action::Event { reason, message, .. } => self.events.push(format!("{reason}: {message}")),
            Action::Together(actions) => return self.apply(actions),
            Action::Again(_) => {}
        }
        true
    }

    fn is_fresh(&self, target: &Target) -> bool {
        let object = self.objects.get(&(target.kind.plural, target.name.clone()));
        object.is_some_and(|o| {
            o["metadata"]["uid"] == target.uid.as_str()
                && target.rev.is_none_or(|rev| o["metadata"]["testRev"] == rev)
        })
    }

    pub(crate) fn all<T: DeserializeOwned>(
        &self,
        kind: &'static Kind,
        meta: fn(&mut T) -> &mut Meta,
    ) -> Vec<T> {
        let of_kind = self.objects.iter().filter(|((plural, _), _)| *plural == kind.plural);
        of_kind
            .map(|(_, object)| {
                let mut parsed: T = view(object);
                meta(&mut parsed).rev = object["metadata"]["testRev"].as_u64().unwrap_or(0);
                parsed
            })
            .collect()
    }

    pub(crate) fn pods(&self) -> Vec<Pod> {
        self.all(&PODS, |p: &mut Pod| &mut p.metadata)
    }

    pub(crate) fn sets(&self) -> Vec<ReplicaSet> {
        self.all(&REPLICA_SETS, |s: &mut ReplicaSet| &mut s.metadata)
    }

    pub(crate) fn deployment(&self) -> Deployment {
        let mut all = self.all(&DEPLOYMENTS, |d: &mut Deployment| &mut d.metadata);
        all.pop().expect("the deployment")
    }

    pub(crate) fn observe_set(&self, set: &ReplicaSet) -> replica_set::Observed {
        let mine = |p: &Pod| {
            selects(&set.spec.selector, &p.metadata.labels)
                || p.metadata.controller().is_some_and(|c| c.uid == set.metadata.uid)
        };
        replica_set::Observed {
            set: set.clone(),
            pods: self.pods().into_iter().filter(mine).collect(),
            co_located: BTreeMap::new(),
            failure: None,
            now: self.now,
        }
    }

    pub(crate) fn observe_deployment(&self) -> deployment::Observed {
        let deployment = self.deployment();
        let name = deployment::new_set_name(&deployment);
        let pods = self.pods();
        let busy: BTreeSet<String> =
            pods.iter().filter_map(|p| p.metadata.controller()).map(|c| c.uid.clone()).collect();
        deployment::Observed {
            name_taken: self.objects.contains_key(&(REPLICA_SETS.plural, name)),
            deployment,
            sets: self.sets(),
            busy,
            failure: None,
            now: self.now,
        }
    }

    /// Lets the named ReplicaSet's controller have one look.
    pub(crate) fn step_set(&mut self, index: usize) {
        let sets = self.sets();
        if let Some(set) = sets.get(index) {
            let actions = replica_set::reconcile(&self.observe_set(set));
            self.apply(&actions);
        }
    }

    /// Lets the Deployment's controller have one look; tells whether it wrote anything.
    pub(crate) fn step_deployment(&mut self) -> bool {
        let actions = deployment::reconcile(&self.observe_deployment());
        let writes = actions.iter().any(|a| !matches!(a, Action::Again(_)));
        self.apply(&actions);
        writes
    }

    /// Lets all ReplicaSets' controllers run until they have nothing more to do.
    pub(crate) fn settle_sets(&mut self) {
        for _ in 0..100 {
            let before = self.rev;
            for index in 0..self.sets().len() {
                self.step_set(index);
            }
            if self.rev == before {
                return;
            }
        }
        panic!("the ReplicaSets do not come to rest");
    }

    pub(crate) fn set_ready(&mut self, pod: &str, ready: bool) {
        let status = if ready { "True" } else { "False" };
        let merge = json!({"status": {"phase": "Running", "conditions": [
            {"type": "Ready", "status": status, "lastTransitionTime": self.now}]}});
        self.change(&PODS, pod, Part::Status, &merge);
    }
}
