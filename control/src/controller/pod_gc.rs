//! Pods that nobody will end. Invariant: a pod is removed without its agent's word only if there is no agent: its
//! Node has been missing for a while, or it was never bound.

use std::time::Duration;

use super::action::{Action, Target};
use super::model::Pod;
use crate::limits;
use crate::resource::Propagation;
use crate::resource::kinds::PODS;

/// What one decision about the pods of one node name rests on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Observed {
    /// For how long there has been no Node of that name; `None` if there is one. Pods that are bound to no node
    /// have an empty node name, which is always missing.
    pub(crate) missing: Option<Duration>,
    /// Pods with that node name; only needed if the node is missing.
    pub(crate) pods: Vec<Pod>,
}

/// What to do about the pods of one node name.
pub(crate) fn reconcile(seen: &Observed) -> Vec<Action> {
    let Some(missing) = seen.missing else { return Vec::new() };
    let (unbound, bound): (Vec<&Pod>, Vec<&Pod>) =
        seen.pods.iter().partition(|p| p.spec.node_name.is_empty());
    let mut actions: Vec<Action> =
        unbound.into_iter().filter(|p| p.metadata.is_deleting()).map(remove).collect();
    let grace = Duration::from_secs(limits::NODE_MISSING_SECS);
    if missing >= grace {
        actions.extend(bound.into_iter().map(remove));
    } else if !bound.is_empty() {
        actions.push(Action::Again(grace - missing));
    }
    actions
}

fn remove(pod: &Pod) -> Action {
    Action::Delete {
        target: Target::of(&PODS, &pod.metadata),
        grace_seconds: Some(0),
        propagation: Propagation::Background,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::controller::world::view;

    fn pod(name: &str, node: &str, deleting: bool) -> Pod {
        let deleted = deleting.then_some("2026-01-01T00:00:00Z");
        view(
            &json!({"metadata": {"name": name, "uid": name, "deletionTimestamp": deleted}, "spec": {"nodeName": node}}),
        )
    }

    fn removed(missing: Option<u64>, pods: Vec<Pod>) -> (Vec<String>, bool) {
        let actions = reconcile(&Observed { missing: missing.map(Duration::from_secs), pods });
        let names = actions.iter().filter_map(|a| match a {
            Action::Delete { target, grace_seconds: Some(0), .. } => Some(target.name.clone()),
            _ => None,
        });
        (names.collect(), actions.iter().any(|a| matches!(a, Action::Again(_))))
    }

    #[test]
    fn pods_of_a_missing_node_go_after_a_while() {
        let pods = || vec![pod("a", "n1", false), pod("b", "n1", true)];
        assert_eq!(removed(None, pods()), (vec![], false));
        assert_eq!(removed(Some(39), pods()), (vec![], true));
        assert_eq!(removed(Some(40), pods()), (vec!["a".to_owned(), "b".to_owned()], false));
        assert_eq!(removed(Some(0), vec![]), (vec![], false));
    }

    #[test]
    fn unbound_pods_go_when_they_are_deleted() {
        let pods = vec![pod("waits", "", false), pod("goes", "", true)];
        assert_eq!(removed(Some(0), pods), (vec!["goes".to_owned()], false));
    }
}
