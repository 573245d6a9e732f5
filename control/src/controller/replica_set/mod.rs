//! ReplicaSet: as many pods of one template as asked for. Invariant: a pod counts for exactly one ReplicaSet, the one
//! that its controller reference names by uid; pods that end or are being deleted count as gone, so that their
//! replacements start at once.

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::action::{Action, Target, edit_status};
use super::claim::{Owner, claim, controller_reference};
use super::model::{Condition, Pod, ReplicaSet, contains_all};
use crate::limits;
use crate::resource::Propagation;
use crate::resource::kinds::{PODS, REPLICA_SETS};

/// Pods with a lower value go first when a ReplicaSet shrinks.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
const REPLICA_FAILURE: &str = "ReplicaFailure";

/// What one decision about a ReplicaSet rests on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Observed {
    pub(crate) set: ReplicaSet,
    /// Pods of the namespace that match the selector or name this set as their controller.
    pub(crate) pods: Vec<Pod>,
    /// Active pods per node, of this set and of the sets with the same controller.
    pub(crate) co_located: BTreeMap<String, usize>,
    /// Why the last attempt to create or delete pods failed, until one succeeds.
    pub(crate) failure: Option<String>,
    pub(crate) now: Timestamp,
}

/// What to do about a ReplicaSet.
pub(crate) fn reconcile(seen: &Observed) -> Vec<Action> {
    let set = &seen.set;
    let mut actions = Vec::new();
    let owner = Owner { kind: &REPLICA_SETS, meta: &set.metadata, selector: &set.spec.selector };
    let claimed = claim(&owner, &PODS, &seen.pods, |p| &p.metadata, Pod::is_active, &mut actions);
    if !set.metadata.is_deleting() {
        let active: Vec<&Pod> = claimed.iter().copied().filter(|p| p.is_active()).collect();
        let wanted = usize::try_from(set.spec.replicas).unwrap_or(0);
        if active.len() < wanted {
            let missing = (wanted - active.len()).min(limits::REPLICA_BURST_MAX);
            actions.extend(create(set, missing));
        } else if active.len() > wanted {
            let surplus = (active.len() - wanted).min(limits::REPLICA_BURST_MAX);
            actions.push(delete(rank(active, seen).into_iter().take(surplus)));
        }
    }
    report(seen, &claimed, actions)
}

/// Creates in growing batches: if the first pod is refused (a quota, a bad template), the others are not tried.
fn create(set: &ReplicaSet, count: usize) -> Vec<Action> {
    let body = pod_from_template(set);
    let one =
        || Action::Create { kind: &PODS, namespace: set.metadata.namespace.clone(), body: body.clone() };
    let mut batches = Vec::new();
    let (mut left, mut size) = (count, 1);
    while left > 0 {
        let batch = size.min(left);
        batches.push(Action::Together(std::iter::repeat_with(one).take(batch).collect()));
        left -= batch;
        size *= 2;
    }
    batches
}

fn pod_from_template(set: &ReplicaSet) -> Value {
    let template = &set.spec.template;
    let part = |name: &str| template.pointer(&format!("/metadata/{name}")).cloned().unwrap_or(Value::Null);
    let mut metadata = json!({
        "generateName": format!("{}-", set.metadata.name),
        "namespace": set.metadata.namespace,
        "ownerReferences": [controller_reference(&REPLICA_SETS, &set.metadata)],
    });
    for name in ["labels", "annotations", "finalizers"] {
        let value = part(name);
        if !value.is_null() {
            metadata[name] = value;
        }
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
}

fn delete<'a>(pods: impl Iterator<Item = &'a Pod>) -> Action {
    Action::Together(
        pods.map(|pod| Action::Delete {
            target: Target::of(&PODS, &pod.metadata),
            grace_seconds: None,
            propagation: Propagation::Background,
        })
        .collect(),
    )
}

/// Orders pods so that those whose loss costs least come first.
fn rank<'a>(mut active: Vec<&'a Pod>, seen: &Observed) -> Vec<&'a Pod> {
    active.sort_by_cached_key(|pod| loss(pod, &seen.co_located));
    active
}

/// Smaller means: delete earlier.
fn loss(pod: &Pod, co_located: &BTreeMap<String, usize>) -> impl Ord + use<> {
    let phase = match pod.status.phase.as_str() {
        "Pending" | "" => 0,
        "Unknown" => 1,
        _ => 2,
    };
    let cost: i32 = pod.metadata.annotation(DELETION_COST).and_then(|c| c.parse().ok()).unwrap_or(0);
    let neighbours = co_located.get(&pod.spec.node_name).copied().unwrap_or(0);
    let restarts = pod.status.container_statuses.iter().map(|c| c.restart_count).max().unwrap_or(0);
    (
        !pod.spec.node_name.is_empty(),
        phase,
        pod.is_ready(),
        cost,
        Reverse(neighbours),
        Reverse(pod.ready_since()),
        Reverse(restarts),
        Reverse(pod.metadata.creation_timestamp),
        pod.metadata.name.clone(),
    )
}

/// Adds the status, if it changes, and the time of the next look when a ready pod is waiting to become available.
/// While pods come or go the status waits: their events bring the next reconcile, which sees the outcome.
fn report(seen: &Observed, claimed: &[&Pod], mut actions: Vec<Action>) -> Vec<Action> {
    let set = &seen.set;
    let active: Vec<&Pod> = claimed.iter().copied().filter(|p| p.is_active()).collect();
    let template_labels = template_labels(&set.spec.template);
    let labeled = active.iter().filter(|p| contains_all(&p.metadata.labels, &template_labels)).count();
    let ready = active.iter().filter(|p| p.is_ready()).count();
    let waits: Vec<Option<Duration>> =
        active.iter().filter_map(|p| p.ready_since()).map(|since| remaining(set, since, seen.now)).collect();
    let available = waits.iter().filter(|w| w.is_none()).count();

    let conditions = conditions(seen);
    let same = set.status.replicas == count(active.len())
        && set.status.fully_labeled_replicas == count(labeled)
        && set.status.ready_replicas == count(ready)
        && set.status.available_replicas == count(available)
        && set.status.observed_generation == set.metadata.generation
        && set.status.conditions == conditions;
    let moving = !actions.is_empty() && seen.failure.is_none();
    if !same && !moving {
        let status = json!({
            "replicas": active.len(),
            "fullyLabeledReplicas": or_null(labeled),
            "readyReplicas": or_null(ready),
            "availableReplicas": or_null(available),
            "observedGeneration": set.metadata.generation,
            "conditions": if conditions.is_empty() { Value::Null } else { json!(conditions) },
        });
        actions.insert(0, edit_status(&REPLICA_SETS, &set.metadata, status));
    }
    if let Some(wait) = waits.into_iter().flatten().min() {
        actions.push(Action::Again(wait));
    }
    actions
}

/// How long a pod that is ready since `since` must stay so until it is available.
fn remaining(set: &ReplicaSet, since: Timestamp, now: Timestamp) -> Option<Duration> {
    let held = now.as_second().saturating_sub(since.as_second());
    let left = set.spec.min_ready_seconds.saturating_sub(held);
    u64::try_from(left).ok().filter(|s| *s > 0 && set.spec.min_ready_seconds > 0).map(Duration::from_secs)
}

fn conditions(seen: &Observed) -> Vec<Condition> {
    let old = &seen.set.status.conditions;
    let mut conditions: Vec<Condition> = old.iter().filter(|c| c.kind != REPLICA_FAILURE).cloned().collect();
    if let Some(message) = &seen.failure {
        let known = old.iter().find(|c| c.kind == REPLICA_FAILURE);
        conditions.push(known.cloned().unwrap_or_else(|| Condition {
            kind: REPLICA_FAILURE.to_owned(),
            status: "True".to_owned(),
            reason: "FailedCreate".to_owned(),
            message: message.clone(),
            last_transition_time: Some(seen.now),
            ..Condition::default()
        }));
    }
    conditions
}

fn template_labels(template: &Value) -> BTreeMap<String, String> {
    let labels = template.pointer("/metadata/labels").and_then(Value::as_object);
    labels
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect()
}

fn count(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Zero is left out of a status, as upstream does.
fn or_null(n: usize) -> Value {
    if n == 0 { Value::Null } else { json!(n) }
}
