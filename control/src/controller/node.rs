//! Node life cycle: a node that falls silent is marked, tainted and at last emptied. Invariant: pods are evicted only
//! by NoExecute taints, and those are put on a node only while some other node is well: if all fall silent at once,
//! it is this control plane that is cut off.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::action::{Action, Part, Target};
use super::model::{Condition, Node, Pod, Taint, condition};
use crate::limits;
use crate::resource::Propagation;
use crate::resource::kinds::{NODES, PODS};

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Conditions of a node that keep new pods away, with their taints.
const PRESSURES: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];
/// Conditions that only the node's agent can know.
const AGENT_CONDITIONS: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// What one decision about a node rests on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Observed {
    pub(crate) node: Node,
    /// For how long this process has seen no sign of life: a renewed Lease, a heartbeat, or the node for the first
    /// time. By a clock that nobody sets: a jump of the time of day must not make all nodes silent.
    pub(crate) silent_for: Duration,
    /// Whether some other node is ready.
    pub(crate) others_ready: bool,
    /// The pods bound to the node; only needed if [`wants_pods`] says so.
    pub(crate) pods: Vec<Pod>,
    pub(crate) now: Timestamp,
}

/// Whether the pods of a node matter: it is not ready, or something on it is to be evicted.
pub(crate) fn wants_pods(node: &Node) -> bool {
    !node.is_ready() || node.spec.taints.iter().any(|t| t.effect == "NoExecute")
}

/// What to do about a node.
pub(crate) fn reconcile(seen: &Observed) -> Vec<Action> {
    let node = &seen.node;
    if node.metadata.is_deleting() {
        return Vec::new();
    }
    let grace = Duration::from_secs(limits::NODE_GRACE_SECS);
    let mut actions = Vec::new();
    if seen.silent_for < grace {
        actions.push(Action::Again(grace - seen.silent_for));
    } else if let Some(conditions) = unknown(seen) {
        // The taints follow with the event of this edit.
        actions.push(Action::Edit {
            target: Target::unchanged(&NODES, &node.metadata),
            part: Part::Status,
            merge: json!({"status": {"conditions": conditions}}),
        });
        actions.push(Action::Event {
            about: Target::of(&NODES, &node.metadata),
            warning: false,
            reason: "NodeNotReady",
            message: format!(
                "Node {} has not been heard of for {} s",
                node.metadata.name,
                limits::NODE_GRACE_SECS
            ),
        });
        return actions;
    }
    let taints = taints(seen);
    if taints != node.spec.taints {
        actions.push(Action::Edit {
            target: Target::unchanged(&NODES, &node.metadata),
            part: Part::Main,
            merge: json!({"spec": {"taints": if taints.is_empty() { Value::Null } else { json!(taints) }}}),
        });
    }
    if condition(&node.status.conditions, "Ready").is_some_and(|c| c.status == "Unknown") {
        // The agent of a node that is merely not ready still speaks for its pods.
        actions.extend(seen.pods.iter().filter_map(|pod| mark_not_ready(pod, seen.now)));
    }
    evict(seen, &taints, &mut actions);
    actions
}

/// The conditions of a node that is not heard of, if they do not say so yet.
fn unknown(seen: &Observed) -> Option<Vec<Condition>> {
    let mut conditions = seen.node.status.conditions.clone();
    let mut changed = false;
    for kind in AGENT_CONDITIONS {
        if condition(&conditions, kind).is_some_and(|c| c.status == "Unknown") {
            continue;
        }
        changed = true;
        let heard = condition(&conditions, kind).and_then(|c| c.last_heartbeat_time);
        let new = Condition {
            kind: kind.to_owned(),
            status: "Unknown".to_owned(),
            reason: "NodeStatusUnknown".to_owned(),
            message: "the node's agent has stopped renewing its Lease".to_owned(),
            last_transition_time: Some(seen.now),
            last_heartbeat_time: heard,
            ..Condition::default()
        };
        match conditions.iter_mut().find(|c| c.kind == kind) {
            Some(old) => *old = new,
            None => conditions.push(new),
        }
    }
    changed.then_some(conditions)
}

/// The node's taints as they should be: ours follow its conditions, all others stay.
fn taints(seen: &Observed) -> Vec<Taint> {
    let node = &seen.node;
    let status = |kind: &str| condition(&node.status.conditions, kind).map_or("", |c| c.status.as_str());
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    let ready = match status("Ready") {
        "True" => None,
        "Unknown" => Some(UNREACHABLE),
        _ => Some(NOT_READY),
    };
    if let Some(key) = ready {
        wanted.push((key, "NoSchedule"));
        if seen.others_ready {
            wanted.push((key, "NoExecute"));
        }
    }
    wanted.extend(
        PRESSURES.iter().filter(|(kind, _)| status(kind) == "True").map(|(_, key)| (*key, "NoSchedule")),
    );
    if node.spec.unschedulable {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    let is_ours = |t: &Taint| {
        [NOT_READY, UNREACHABLE, UNSCHEDULABLE].contains(&t.key.as_str())
            || PRESSURES.iter().any(|(_, key)| t.key == *key)
    };
    let is_wanted = |t: &Taint| wanted.iter().any(|(key, effect)| t.key == *key && t.effect == *effect);
    let mut taints: Vec<Taint> =
        node.spec.taints.iter().filter(|t| !is_ours(t) || is_wanted(t)).cloned().collect();
    for taint in taints.iter_mut().filter(|t| t.effect == "NoExecute" && t.time_added.is_none()) {
        // The clock of `tolerationSeconds` needs a start that outlives this process.
        taint.time_added = Some(seen.now);
    }
    for (key, effect) in wanted {
        if !taints.iter().any(|t| t.key == key && t.effect == effect) {
            taints.push(Taint {
                key: key.to_owned(),
                value: String::new(),
                effect: effect.to_owned(),
                time_added: Some(seen.now),
            });
        }
    }
    taints
}

/// Nobody knows whether a pod on a silent node still serves.
fn mark_not_ready(pod: &Pod, now: Timestamp) -> Option<Action> {
    if pod.is_terminal() || !pod.is_ready() {
        return None;
    }
    let mut conditions = pod.status.conditions.clone();
    for ready in conditions.iter_mut().filter(|c| c.kind == "Ready") {
        ready.status = "False".to_owned();
        ready.reason = "NodeNotReady".to_owned();
        ready.message = "the pod's node is not heard of".to_owned();
        ready.last_transition_time = Some(now);
    }
    Some(Action::Edit {
        target: Target::unchanged(&PODS, &pod.metadata),
        part: Part::Status,
        merge: json!({"status": {"conditions": conditions}}),
    })
}

/// Deletes the pods that no longer tolerate a NoExecute taint, and looks again when the next one is due.
fn evict(seen: &Observed, taints: &[Taint], actions: &mut Vec<Action>) {
    let mut next: Option<Duration> = None;
    for pod in seen.pods.iter().filter(|p| p.is_active()) {
        let due = taints.iter().filter_map(|t| eviction_time(pod, t, seen.now)).min();
        let Some(due) = due else { continue };
        match Duration::try_from(due.duration_since(seen.now)) {
            Ok(left) if !left.is_zero() => next = Some(next.map_or(left, |n| n.min(left))),
            // Negative: the time has passed.
            _ => {
                actions.push(Action::Event {
                    about: Target::of(&PODS, &pod.metadata),
                    warning: false,
                    reason: "TaintManagerEviction",
                    message: format!(
                        "evicted from {}, which has a taint it does not tolerate",
                        pod.spec.node_name
                    ),
                });
                actions.push(Action::Delete {
                    target: Target::of(&PODS, &pod.metadata),
                    grace_seconds: None,
                    propagation: Propagation::Background,
                });
            }
        }
    }
    actions.extend(next.map(Action::Again));
}

/// When a pod has to leave because of a taint; `None` is never.
fn eviction_time(pod: &Pod, taint: &Taint, now: Timestamp) -> Option<Timestamp> {
    if taint.effect != "NoExecute" {
        return None;
    }
    let mut matching = pod.spec.tolerations.iter().filter(|t| t.tolerates(taint)).peekable();
    let seconds = if matching.peek().is_some() {
        matching.filter_map(|t| t.toleration_seconds).min()?
    } else if taint.key == NOT_READY || taint.key == UNREACHABLE {
        // Upstream's admission gives every pod this toleration; here it is what a pod without one gets.
        limits::POD_EVICTION_DEFAULT_SECS
    } else {
        0
    };
    let start = taint.time_added.unwrap_or(now);
    Some(start.checked_add(SignedDuration::from_secs(seconds.max(0))).unwrap_or(Timestamp::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::world::view;

    const T0: &str = "2026-01-01T00:00:00Z";

    fn at(seconds: i64) -> Timestamp {
        let start: Timestamp = T0.parse().expect("a time");
        start.checked_add(SignedDuration::from_secs(seconds)).expect("a time")
    }

    fn node(ready: &str, taints: Value, unschedulable: bool) -> Node {
        view(&json!({
            "metadata": {"name": "n1", "uid": "uid-n1"},
            "spec": {"taints": taints, "unschedulable": unschedulable},
            "status": {"conditions": [
                {"type": "Ready", "status": ready, "lastHeartbeatTime": T0},
                {"type": "DiskPressure", "status": if ready == "Unknown" { "Unknown" } else { "False" }},
                {"type": "MemoryPressure", "status": if ready == "Unknown" { "Unknown" } else { "False" }},
                {"type": "PIDPressure", "status": if ready == "Unknown" { "Unknown" } else { "False" }},
            ]},
        }))
    }

    fn pod(name: &str, tolerations: Value) -> Pod {
        view(&json!({
            "metadata": {"name": name, "namespace": "default", "uid": name},
            "spec": {"nodeName": "n1", "tolerations": tolerations},
            "status": {"phase": "Running", "conditions": [
                {"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True", "lastTransitionTime": T0}]},
        }))
    }

    fn seen(node: Node, silent_seconds: u64) -> Observed {
        Observed {
            node,
            silent_for: Duration::from_secs(silent_seconds),
            others_ready: true,
            pods: vec![],
            now: at(0),
        }
    }

    fn taint(key: &str, effect: &str, added: Option<&str>) -> Value {
        json!({"key": format!("node.kubernetes.io/{key}"), "effect": effect, "timeAdded": added})
    }

    /// The taints that the actions put on the node, `key:effect`.
    fn taints_of(actions: &[Action]) -> Option<Vec<String>> {
        actions.iter().find_map(|a| match a {
            Action::Edit { target, part: Part::Main, merge } if target.kind == &NODES => {
                let list = merge["spec"]["taints"].as_array().cloned().unwrap_or_default();
                let name = |t: &Value| {
                    let key = t["key"].as_str().unwrap_or("").trim_start_matches("node.kubernetes.io/");
                    format!("{key}:{}", t["effect"].as_str().unwrap_or(""))
                };
                Some(list.iter().map(name).collect())
            }
            _ => None,
        })
    }

    #[test]
    fn a_silent_node_becomes_unknown_after_its_grace() {
        let early = reconcile(&seen(node("True", json!([]), false), 39));
        assert_eq!(early, [Action::Again(Duration::from_secs(1))]);
        let late = reconcile(&seen(node("True", json!([]), false), 40));
        let Action::Edit { merge, part: Part::Status, .. } = &late[0] else { panic!("{late:?}") };
        let conditions = merge["status"]["conditions"].as_array().expect("a list");
        assert_eq!(conditions.len(), 4);
        assert!(conditions.iter().all(|c| c["status"] == "Unknown" && c["reason"] == "NodeStatusUnknown"));
        assert_eq!(conditions[0]["lastHeartbeatTime"], T0, "what the agent said last is kept");
        assert!(matches!(late[1], Action::Event { reason: "NodeNotReady", .. }));
    }

    #[test]
    fn taints_follow_the_conditions() {
        let none = json!([]);
        let gone = json!([
            taint("unreachable", "NoSchedule", Some(T0)),
            taint("unreachable", "NoExecute", Some(T0))
        ]);
        let own = json!([{"key": "team", "value": "a", "effect": "NoSchedule"}]);
        let cases: Vec<(Node, bool, Option<Vec<&str>>)> = vec![
            (node("True", none.clone(), false), true, None),
            (
                node("False", none.clone(), false),
                true,
                Some(vec!["not-ready:NoSchedule", "not-ready:NoExecute"]),
            ),
            (
                node("Unknown", none.clone(), false),
                true,
                Some(vec!["unreachable:NoSchedule", "unreachable:NoExecute"]),
            ),
            (node("Unknown", none.clone(), false), false, Some(vec!["unreachable:NoSchedule"])),
            (node("Unknown", gone.clone(), false), true, None),
            (node("Unknown", gone.clone(), false), false, Some(vec!["unreachable:NoSchedule"])),
            (
                node("False", gone.clone(), false),
                true,
                Some(vec!["not-ready:NoSchedule", "not-ready:NoExecute"]),
            ),
            (node("True", gone, false), true, Some(vec![])),
            (node("True", none, true), true, Some(vec!["unschedulable:NoSchedule"])),
            (node("True", json!([taint("unschedulable", "NoSchedule", None)]), false), true, Some(vec![])),
            (node("True", own.clone(), false), true, None),
            (node("True", own, true), true, Some(vec!["team:NoSchedule", "unschedulable:NoSchedule"])),
        ];
        for (node, others_ready, expected) in cases {
            let label = format!("{node:?} {others_ready}");
            let actions = reconcile(&Observed { others_ready, ..seen(node, 1) });
            let expected = expected.map(|e| e.into_iter().map(str::to_owned).collect::<Vec<_>>());
            assert_eq!(taints_of(&actions), expected, "{label}");
        }
    }

    #[test]
    fn pods_of_a_silent_node_are_marked_once() {
        let mut seen = seen(node("Unknown", json!([taint("unreachable", "NoSchedule", None)]), false), 1);
        seen.others_ready = false;
        let mut ended = pod("ended", json!([]));
        ended.status.phase = "Succeeded".to_owned();
        seen.pods = vec![pod("a", json!([])), ended];
        let actions = reconcile(&seen);
        let [Action::Again(_), Action::Edit { target, part: Part::Status, merge }] = &actions[..] else {
            panic!("{actions:?}")
        };
        assert_eq!(target.name, "a");
        let conditions = merge["status"]["conditions"].as_array().expect("a list");
        assert_eq!((&conditions[0]["status"], &conditions[1]["status"]), (&json!("True"), &json!("False")));
        seen.pods[0].status.conditions[1].status = "False".to_owned();
        assert!(matches!(&reconcile(&seen)[..], [Action::Again(_)]));
        seen.node = node("False", json!([taint("not-ready", "NoSchedule", None)]), false);
        seen.pods = vec![pod("a", json!([]))];
        assert!(
            matches!(&reconcile(&seen)[..], [Action::Again(_)]),
            "an agent that talks speaks for its pods"
        );
    }

    #[test]
    fn pods_leave_when_their_tolerance_ends() {
        let tolerates = |seconds: Option<i64>| {
            json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
                "tolerationSeconds": seconds}])
        };
        let unreachable = json!([
            taint("unreachable", "NoSchedule", Some(T0)),
            taint("unreachable", "NoExecute", Some(T0))
        ]);
        let dedicated = json!([{"key": "dedicated", "value": "x", "effect": "NoExecute", "timeAdded": T0}]);
        let cases = [
            // tolerations, taints, ready, seconds since the taint -> evicted
            (json!([]), &unreachable, "Unknown", 299, false),
            (json!([]), &unreachable, "Unknown", 300, true),
            (tolerates(Some(10)), &unreachable, "Unknown", 9, false),
            (tolerates(Some(10)), &unreachable, "Unknown", 10, true),
            (tolerates(Some(0)), &unreachable, "Unknown", 0, true),
            (tolerates(None), &unreachable, "Unknown", 100_000, false),
            (json!([{"operator": "Exists"}]), &unreachable, "Unknown", 100_000, false),
            (json!([]), &dedicated, "True", 0, true),
            (json!([{"key": "dedicated", "value": "x"}]), &dedicated, "True", 100_000, false),
            (json!([{"key": "dedicated", "value": "y"}]), &dedicated, "True", 0, true),
        ];
        for (tolerations, taints, ready, seconds, evicted) in cases {
            let mut seen = seen(node(ready, taints.clone(), false), 0);
            seen.now = at(seconds);
            seen.pods = vec![pod("a", tolerations.clone())];
            let actions = reconcile(&seen);
            let deletes = actions.iter().any(|a| matches!(a, Action::Delete { .. }));
            assert_eq!(deletes, evicted, "{tolerations} after {seconds}: {actions:?}");
            let waits = actions.iter().filter(|a| matches!(a, Action::Again(_))).count();
            let finite = !evicted && seconds < 1000;
            assert_eq!(waits, 1 + usize::from(finite), "{tolerations}: it looks again when it has to");
        }
    }
}
