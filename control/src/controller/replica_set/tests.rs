//! Tables for the ReplicaSet controller.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::controller::action::Part;
use crate::controller::model::ReplicaSet;
use crate::controller::world::view;

const NOW: &str = "2026-01-01T01:00:00Z";

fn set(extra: Value) -> ReplicaSet {
    let mut set = json!({
        "metadata": {"name": "web", "namespace": "default", "uid": "rs-1", "generation": 3},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web", "tier": "front"}, "annotations": {"a": "b"}},
                "spec": {"containers": [{"name": "c"}]},
            },
        },
    });
    json_patch::merge(&mut set, &extra);
    view(&set)
}

/// A running, ready pod of the set.
fn pod(name: &str, extra: Value) -> Pod {
    let mut pod = json!({
        "metadata": {
            "name": name, "namespace": "default", "uid": format!("uid-{name}"),
            "labels": {"app": "web", "tier": "front"},
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs-1", "controller": true}],
        },
        "spec": {"nodeName": "n1"},
        "status": {"phase": "Running", "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:05Z"}]},
    });
    json_patch::merge(&mut pod, &extra);
    view(&pod)
}

fn look(set: ReplicaSet, pods: Vec<Pod>) -> Vec<Action> {
    reconcile(&seen(set, pods))
}

fn seen(set: ReplicaSet, pods: Vec<Pod>) -> Observed {
    Observed { set, pods, co_located: BTreeMap::new(), failure: None, now: NOW.parse().expect("a time") }
}

fn deleted(actions: &[Action]) -> Vec<String> {
    let mut names = Vec::new();
    for action in actions {
        match action {
            Action::Together(inner) => names.extend(deleted(inner)),
            Action::Delete { target, .. } => names.push(target.name.clone()),
            _ => {}
        }
    }
    names
}

fn batches(actions: &[Action]) -> Vec<usize> {
    let creates = |inner: &[Action]| inner.iter().filter(|a| matches!(a, Action::Create { .. })).count();
    actions
        .iter()
        .filter_map(|a| match a {
            Action::Together(inner) => Some(creates(inner)).filter(|n| *n > 0),
            _ => None,
        })
        .collect()
}

fn status_of(actions: &[Action]) -> Option<&Value> {
    actions.iter().find_map(|a| match a {
        Action::Edit { part: Part::Status, merge, .. } => Some(&merge["status"]),
        _ => None,
    })
}

#[test]
fn missing_pods_are_made_in_growing_batches() {
    for (replicas, expected) in [
        (0, vec![]),
        (1, vec![1]),
        (2, vec![1, 1]),
        (10, vec![1, 2, 4, 3]),
        (700, vec![1, 2, 4, 8, 16, 32, 64, 128, 245]),
    ] {
        let actions = look(set(json!({"spec": {"replicas": replicas}})), vec![]);
        assert_eq!(batches(&actions), expected, "{replicas} replicas");
    }
}

#[test]
fn a_pod_is_made_from_the_template() {
    let actions = look(set(json!({"spec": {"replicas": 1}})), vec![]);
    let [Action::Together(batch)] = actions.as_slice() else { panic!("{actions:?}") };
    let [Action::Create { kind, namespace, body }] = batch.as_slice() else { panic!("{batch:?}") };
    assert_eq!((*kind, namespace.as_str()), (&PODS, "default"));
    assert_eq!(
        *body,
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "generateName": "web-",
                "namespace": "default",
                "labels": {"app": "web", "tier": "front"},
                "annotations": {"a": "b"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs-1",
                    "controller": true, "blockOwnerDeletion": true}],
            },
            "spec": {"containers": [{"name": "c"}]},
        })
    );
}

#[test]
fn pods_that_end_or_go_are_replaced() {
    for gone in [
        json!({"status": {"phase": "Failed"}}),
        json!({"status": {"phase": "Succeeded"}}),
        json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:09Z"}}),
    ] {
        let actions = look(set(json!({})), vec![pod("a", json!({})), pod("b", gone.clone())]);
        assert_eq!(batches(&actions), [1], "{gone}");
    }
    let actions =
        look(set(json!({})), vec![pod("a", json!({})), pod("b", json!({"status": {"phase": "Pending"}}))]);
    assert_eq!(batches(&actions), Vec::<usize>::new());
}

#[test]
fn surplus_pods_go_cheapest_first() {
    let cheap_to_dear = [
        ("unassigned", json!({"spec": {"nodeName": null}, "status": null})),
        ("pending", json!({"status": {"phase": "Pending", "conditions": null}})),
        ("unknown", json!({"status": {"phase": "Unknown", "conditions": null}})),
        ("not-ready", json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}})),
        ("cost", json!({"metadata": {"annotations": {"controller.kubernetes.io/pod-deletion-cost": "-5"}}})),
        ("crowded", json!({"spec": {"nodeName": "n2"}})),
        (
            "ready-later",
            json!({"status": {"conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:10:00Z"}]}}),
        ),
        ("restarted", json!({"status": {"containerStatuses": [{"restartCount": 4}]}})),
        ("younger", json!({"metadata": {"creationTimestamp": "2026-01-01T00:00:04Z"}})),
        ("older", json!({})),
    ];
    let pods: Vec<Pod> = cheap_to_dear.iter().rev().map(|(name, extra)| pod(name, extra.clone())).collect();
    let expected: Vec<&str> = cheap_to_dear.iter().map(|(name, _)| *name).collect();
    for replicas in 0..=pods.len() {
        let mut seen = seen(set(json!({"spec": {"replicas": replicas}})), pods.clone());
        seen.co_located = BTreeMap::from([("n1".to_owned(), 2), ("n2".to_owned(), 3)]);
        assert_eq!(deleted(&reconcile(&seen)), expected[..pods.len() - replicas], "down to {replicas}");
    }
}

#[test]
fn orphans_are_adopted_and_strangers_let_go() {
    let orphan = pod("orphan", json!({"metadata": {"ownerReferences": null}}));
    let stranger = pod("stranger", json!({"metadata": {"labels": {"app": "other"}}}));
    let foreign = pod(
        "foreign",
        json!({"metadata": {"ownerReferences": [
        {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "x", "uid": "rs-2", "controller": true}]}}),
    );
    let actions = look(set(json!({"spec": {"replicas": 1}})), vec![orphan, stranger, foreign]);
    let edits: Vec<(&str, &Value)> = actions
        .iter()
        .filter_map(|a| match a {
            Action::Edit { target, part: Part::Main, merge } => {
                Some((target.name.as_str(), &merge["metadata"]["ownerReferences"]))
            }
            _ => None,
        })
        .collect();
    let own = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs-1",
        "controller": true, "blockOwnerDeletion": true}]);
    assert_eq!(edits, [("orphan", &own), ("stranger", &Value::Null)]);
    assert_eq!(batches(&actions), Vec::<usize>::new(), "the adopted pod counts");
}

#[test]
fn a_set_that_is_being_deleted_leaves_pods_alone() {
    let dying = set(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:09Z"}}));
    let orphan = pod("orphan", json!({"metadata": {"ownerReferences": null}}));
    let actions = look(dying, vec![orphan]);
    assert!(actions.iter().all(|a| matches!(a, Action::Edit { part: Part::Status, .. })), "{actions:?}");
}

#[test]
fn the_status_counts_and_settles() {
    let pods = vec![
        pod("a", json!({})),
        pod("b", json!({"metadata": {"labels": {"tier": null}}, "status": {"conditions": null}})),
    ];
    let actions = look(set(json!({})), pods.clone());
    let status = status_of(&actions).expect("a status");
    assert_eq!(
        *status,
        json!({"replicas": 2, "fullyLabeledReplicas": 1, "readyReplicas": 1, "availableReplicas": 1,
            "observedGeneration": 3, "conditions": null})
    );
    assert_eq!(
        look(set(json!({ "status": status })), pods),
        [],
        "a status that is right is not written again"
    );
}

#[test]
fn a_ready_pod_becomes_available_after_its_time() {
    let set = set(json!({"spec": {"replicas": 1, "minReadySeconds": 3600}}));
    let actions = look(set, vec![pod("a", json!({}))]);
    assert_eq!(status_of(&actions).expect("a status")["availableReplicas"], Value::Null);
    assert_eq!(actions.last(), Some(&Action::Again(Duration::from_secs(5))), "ready since 00:00:05");
}

#[test]
fn a_failure_is_told_until_it_is_over() {
    let mut seen = seen(set(json!({"spec": {"replicas": 1}})), vec![]);
    seen.failure = Some("quota".to_owned());
    let actions = reconcile(&seen);
    let status = status_of(&actions).expect("a status").clone();
    assert_eq!(status["conditions"][0]["type"], "ReplicaFailure");
    assert_eq!(status["conditions"][0]["message"], "quota");
    assert_eq!(batches(&actions), [1], "and it goes on trying");
    seen.set = set(json!({"spec": {"replicas": 1}, "status": status}));
    seen.failure = None;
    seen.pods = vec![pod("a", json!({}))];
    assert_eq!(status_of(&reconcile(&seen)).expect("a status")["conditions"], Value::Null);
}
