//! What a Deployment's status says. Invariant: it is worked out from the ReplicaSets' statuses alone, so that it is
//! never ahead of them; a condition's times move only when it does.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::rolling::Bounds;
use crate::controller::model::{Condition, Deployment, DeploymentStatus, ReplicaSet, condition};

pub(super) const AVAILABLE: &str = "Available";
pub(super) const PROGRESSING: &str = "Progressing";
const REPLICA_FAILURE: &str = "ReplicaFailure";
const NEW_SET_AVAILABLE: &str = "NewReplicaSetAvailable";
const DEADLINE_EXCEEDED: &str = "ProgressDeadlineExceeded";
const PAUSED: &str = "DeploymentPaused";
/// `progressDeadlineSeconds` of this value means that there is none.
const NO_DEADLINE: i64 = i32::MAX as i64;

/// The time within which a rollout has to move, if it has to.
pub(super) fn deadline_seconds(deployment: &Deployment) -> Option<i64> {
    deployment.spec.progress_deadline_seconds.filter(|s| *s != NO_DEADLINE)
}

/// Sets a condition. One that says the same already is left as it is; the transition time moves with the status.
pub(super) fn set(conditions: &mut Vec<Condition>, mut new: Condition) {
    if let Some(old) = condition(conditions, &new.kind) {
        if old.status == new.status && old.reason == new.reason {
            return;
        }
        if old.status == new.status {
            new.last_transition_time = old.last_transition_time;
        }
    }
    replace(conditions, new);
}

fn replace(conditions: &mut Vec<Condition>, new: Condition) {
    match conditions.iter_mut().find(|c| c.kind == new.kind) {
        Some(old) => *old = new,
        None => conditions.push(new),
    }
}

pub(super) fn new(kind: &str, status: &str, reason: &str, message: String, now: Timestamp) -> Condition {
    Condition {
        kind: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: Some(now),
        last_update_time: Some(now),
        ..Condition::default()
    }
}

/// Notes that a Deployment was paused or resumed, so that a pause does not count against the deadline.
pub(super) fn note_pause(deployment: &Deployment, conditions: &mut Vec<Condition>, now: Timestamp) {
    if deadline_seconds(deployment).is_none() {
        return;
    }
    let reason = condition(conditions, PROGRESSING).map(|c| c.reason.clone());
    let was_paused = reason.as_deref() == Some(PAUSED);
    if reason.as_deref() == Some(DEADLINE_EXCEEDED) || was_paused == deployment.spec.paused {
        return;
    }
    let (reason, message) = if deployment.spec.paused {
        (PAUSED, "the Deployment is paused")
    } else {
        ("DeploymentResumed", "the Deployment goes on")
    };
    set(conditions, new(PROGRESSING, "Unknown", reason, message.to_owned(), now));
}

/// All that the status is worked out from.
pub(super) struct Facts<'a> {
    pub(super) deployment: &'a Deployment,
    pub(super) bounds: Bounds,
    pub(super) new: Option<&'a ReplicaSet>,
    pub(super) all: &'a [&'a ReplicaSet],
    /// Conditions so far: the old ones and what this reconcile has already changed.
    pub(super) conditions: Vec<Condition>,
    /// Why the new set could not be created.
    pub(super) failure: Option<&'a str>,
    pub(super) now: Timestamp,
}

/// The status as it should be now, and when to look again at a rollout that may get stuck.
pub(super) fn work_out(facts: Facts<'_>) -> (DeploymentStatus, Option<Duration>) {
    let sum = |count: fn(&ReplicaSet) -> i64| facts.all.iter().map(|s| count(s)).sum::<i64>();
    let available = sum(|s| s.status.available_replicas);
    let mut status = DeploymentStatus {
        replicas: sum(|s| s.status.replicas),
        updated_replicas: facts.new.map_or(0, |s| s.status.replicas),
        ready_replicas: sum(|s| s.status.ready_replicas),
        available_replicas: available,
        unavailable_replicas: (sum(|s| s.spec.replicas) - available).max(0),
        observed_generation: facts.deployment.metadata.generation,
        collision_count: facts.deployment.status.collision_count,
        conditions: facts.conditions.clone(),
    };
    set(&mut status.conditions, availability(available, &facts));
    let again = progress(&mut status, &facts);
    let failed = facts.all.iter().find_map(|s| condition(&s.status.conditions, REPLICA_FAILURE));
    match failed {
        Some(failed) => {
            let copied =
                new(REPLICA_FAILURE, &failed.status, &failed.reason, failed.message.clone(), facts.now);
            set(&mut status.conditions, copied);
        }
        None => status.conditions.retain(|c| c.kind != REPLICA_FAILURE),
    }
    (status, again)
}

fn availability(available: i64, facts: &Facts<'_>) -> Condition {
    let least = facts.bounds.available_min();
    if available >= least {
        let message = format!("at least {least} pods are available");
        new(AVAILABLE, "True", "MinimumReplicasAvailable", message, facts.now)
    } else {
        let message = format!("fewer than {least} pods are available");
        new(AVAILABLE, "False", "MinimumReplicasUnavailable", message, facts.now)
    }
}

/// Whether every pod is of the current template and serves.
pub(super) fn is_complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = deployment.spec.replicas;
    status.updated_replicas == wanted
        && status.replicas == wanted
        && status.available_replicas == wanted
        && status.observed_generation >= deployment.metadata.generation
}

fn progress(status: &mut DeploymentStatus, facts: &Facts<'_>) -> Option<Duration> {
    let deployment = facts.deployment;
    let Some(deadline) = deadline_seconds(deployment) else {
        status.conditions.retain(|c| c.kind != PROGRESSING);
        return None;
    };
    let name = facts.new.map_or(&deployment.metadata.name, |s| &s.metadata.name);
    if let Some(failure) = facts.failure {
        let message = format!("creating the ReplicaSet failed: {failure}");
        set(&mut status.conditions, new(PROGRESSING, "False", "ReplicaSetCreateError", message, facts.now));
        return None;
    }
    let current = condition(&status.conditions, PROGRESSING).cloned();
    let reason = current.as_ref().map_or("", |c| c.reason.as_str());
    if deployment.spec.paused || (status.replicas == status.updated_replicas && reason == NEW_SET_AVAILABLE) {
        return None;
    }
    if is_complete(deployment, status) {
        let message = format!("all pods of {name} are up to date and available");
        set(&mut status.conditions, new(PROGRESSING, "True", NEW_SET_AVAILABLE, message, facts.now));
        return None;
    }
    if moved(&deployment.status, status) {
        let message = format!("{name} is being rolled out");
        let mut moving = new(PROGRESSING, "True", "ReplicaSetUpdated", message, facts.now);
        if let Some(current) = current.filter(|c| c.status == "True") {
            moving.last_transition_time = current.last_transition_time;
        }
        replace(&mut status.conditions, moving);
        return again(facts.now, deadline, Some(facts.now));
    }
    let waits = again(facts.now, deadline, current.as_ref().and_then(|c| c.last_update_time));
    let judged = matches!(reason, "" | NEW_SET_AVAILABLE | DEADLINE_EXCEEDED);
    if !judged && waits.is_none() {
        let message = format!("{name} has not moved for {deadline} seconds");
        set(&mut status.conditions, new(PROGRESSING, "False", DEADLINE_EXCEEDED, message, facts.now));
    }
    waits.filter(|_| !judged)
}

/// Whether the rollout is further than the status said before.
fn moved(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    new.updated_replicas > old.updated_replicas
        || new.replicas - new.updated_replicas < old.replicas - old.updated_replicas
        || new.ready_replicas > old.ready_replicas
        || new.available_replicas > old.available_replicas
}

/// The time left until the deadline; none when it has passed.
fn again(now: Timestamp, deadline: i64, since: Option<Timestamp>) -> Option<Duration> {
    let since = since.unwrap_or(now);
    let left = since.as_second().saturating_add(deadline).saturating_sub(now.as_second());
    // One second more, because times in the API are whole seconds.
    u64::try_from(left).ok().map(|s| Duration::from_secs(s + 1))
}

/// The status as a merge patch: counts of 0 are left out, as upstream does.
pub(super) fn to_json(status: &DeploymentStatus) -> Value {
    let count = |n: i64| if n == 0 { Value::Null } else { json!(n) };
    json!({
        "replicas": count(status.replicas),
        "updatedReplicas": count(status.updated_replicas),
        "readyReplicas": count(status.ready_replicas),
        "availableReplicas": count(status.available_replicas),
        "unavailableReplicas": count(status.unavailable_replicas),
        "observedGeneration": status.observed_generation,
        "collisionCount": status.collision_count,
        "conditions": status.conditions,
    })
}
