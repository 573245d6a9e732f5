//! Owner garbage collection. Invariant: an object goes when none of the owners that it names by uid is left, never
//! while one of them is, and never because an owner is of a kind that is not served here.

use serde_json::{Value, json};

use super::action::{Action, Part, Target};
use super::claim::release;
use super::model::{Meta, OwnerReference};
use crate::resource::lifecycle::{FOREGROUND_FINALIZER, ORPHAN_FINALIZER};
use crate::resource::{Kind, Propagation};

/// What became of an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OwnerState {
    /// It is there (or of a kind that nobody here can know about).
    Solid,
    /// There is no object of that name and uid.
    Gone,
    /// It is being deleted and waits for its dependents to go first.
    Waiting,
}

/// An object that names the item as its owner.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Dependent {
    pub(crate) kind: &'static Kind,
    pub(crate) meta: Meta,
}

/// What one decision about an object rests on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Observed {
    pub(crate) kind: &'static Kind,
    pub(crate) meta: Meta,
    /// One for each of the object's owner references, in their order.
    pub(crate) owners: Vec<OwnerState>,
    /// Objects that it owns; only needed if it is being deleted with a finalizer, or if an owner waits for it.
    pub(crate) dependents: Vec<Dependent>,
}

/// What to do about an object's owners and dependents.
pub(crate) fn reconcile(seen: &Observed) -> Vec<Action> {
    let has = |finalizer: &str| seen.meta.finalizers.iter().any(|f| f == finalizer);
    if seen.meta.is_deleting() {
        if has(ORPHAN_FINALIZER) {
            return orphan(seen);
        }
        if has(FOREGROUND_FINALIZER) && !seen.dependents.iter().any(|d| d.blocks(&seen.meta.uid)) {
            return vec![finish(seen, FOREGROUND_FINALIZER)];
        }
        return Vec::new();
    }
    collect(seen)
}

impl Dependent {
    fn blocks(&self, uid: &str) -> bool {
        self.meta.owner_references.iter().any(|r| r.uid == uid && r.block_owner_deletion == Some(true))
    }

    fn waits(&self) -> bool {
        self.meta.is_deleting() && self.meta.finalizers.iter().any(|f| f == FOREGROUND_FINALIZER)
    }
}

/// Lets go of all dependents, then of the object itself.
fn orphan(seen: &Observed) -> Vec<Action> {
    let mut actions = Vec::new();
    if !seen.dependents.is_empty() {
        let releases = seen.dependents.iter().map(|d| release(d.kind, &d.meta, &seen.meta.uid));
        actions.push(Action::Together(releases.collect()));
    }
    actions.push(finish(seen, ORPHAN_FINALIZER));
    actions
}

fn finish(seen: &Observed, finalizer: &str) -> Action {
    let left: Vec<&String> = seen.meta.finalizers.iter().filter(|f| *f != finalizer).collect();
    Action::Edit {
        target: Target::unchanged(seen.kind, &seen.meta),
        part: Part::Main,
        merge: json!({"metadata": {"finalizers": if left.is_empty() { Value::Null } else { json!(left) }}}),
    }
}

/// Deletes an object whose owners are gone or wait for it to go.
fn collect(seen: &Observed) -> Vec<Action> {
    let references = &seen.meta.owner_references;
    let all = |state: OwnerState| seen.owners.iter().filter(move |o| **o == state).count();
    let (solid, waiting) = (all(OwnerState::Solid), all(OwnerState::Waiting));
    if references.is_empty() || solid == references.len() {
        return Vec::new();
    }
    if solid > 0 {
        let kept: Vec<&OwnerReference> = references
            .iter()
            .zip(&seen.owners)
            .filter(|(_, state)| **state == OwnerState::Solid)
            .map(|(reference, _)| reference)
            .collect();
        return vec![rewrite(seen, json!(kept))];
    }
    let mut actions = Vec::new();
    let propagation = if waiting > 0 && !seen.dependents.is_empty() {
        // In a ring of owners each would wait for the next: one that is waited for must not block.
        if seen.dependents.iter().any(Dependent::waits) && blocks_any(references) {
            let unblocked: Vec<OwnerReference> = references
                .iter()
                .map(|r| OwnerReference { block_owner_deletion: Some(false), ..r.clone() })
                .collect();
            actions.push(rewrite(seen, json!(unblocked)));
        }
        Propagation::Foreground
    } else if seen.meta.finalizers.iter().any(|f| f == ORPHAN_FINALIZER) {
        Propagation::Orphan
    } else if seen.meta.finalizers.iter().any(|f| f == FOREGROUND_FINALIZER) {
        Propagation::Foreground
    } else {
        Propagation::Background
    };
    actions.push(Action::Delete {
        target: Target::of(seen.kind, &seen.meta),
        grace_seconds: None,
        propagation,
    });
    actions
}

fn blocks_any(references: &[OwnerReference]) -> bool {
    references.iter().any(|r| r.block_owner_deletion == Some(true))
}

fn rewrite(seen: &Observed, references: Value) -> Action {
    Action::Edit {
        target: Target::unchanged(seen.kind, &seen.meta),
        part: Part::Main,
        merge: json!({"metadata": {"ownerReferences": references}}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::world::view;
    use crate::resource::kinds::{PODS, REPLICA_SETS};

    const DELETED: &str = "2026-01-01T00:00:00Z";

    fn meta(extra: Value) -> Meta {
        let mut meta = json!({"name": "x", "namespace": "default", "uid": "uid-x"});
        json_patch::merge(&mut meta, &extra);
        view(&meta)
    }

    fn owner(uid: &str) -> Value {
        json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": uid, "uid": uid, "blockOwnerDeletion": true})
    }

    fn seen(extra: Value, owners: Vec<OwnerState>, dependents: Vec<Value>) -> Observed {
        let dependents = dependents.into_iter().map(|d| Dependent { kind: &PODS, meta: meta(d) }).collect();
        Observed { kind: &REPLICA_SETS, meta: meta(extra), owners, dependents }
    }

    /// `delete Background`, `edit {...}`, … of each action.
    fn told(actions: &[Action]) -> Vec<String> {
        actions
            .iter()
            .map(|action| match action {
                Action::Delete { propagation, .. } => format!("delete {propagation:?}"),
                Action::Edit { target, merge, .. } => format!("edit {} {}", target.name, merge["metadata"]),
                Action::Together(inner) => told(inner).join(" + "),
                other => format!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn what_becomes_of_an_owned_object() {
        use OwnerState::{Gone, Solid, Waiting};
        let child =
            |owners: &[&str]| json!({"ownerReferences": owners.iter().map(|o| owner(o)).collect::<Vec<_>>()});
        let grandchild = json!({"ownerReferences": [owner("uid-x")]});
        let mut ring = grandchild.clone();
        json_patch::merge(
            &mut ring,
            &json!({"deletionTimestamp": DELETED, "finalizers": ["foregroundDeletion"]}),
        );
        let mut with_orphan = child(&["a"]);
        with_orphan["finalizers"] = json!(["orphan"]);
        let kept = json!({"ownerReferences": [owner("b")]});
        let unblocked = json!({"ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "a", "uid": "a", "blockOwnerDeletion": false}]});
        let cases: Vec<(Observed, Vec<String>)> = vec![
            (seen(json!({}), vec![], vec![]), vec![]),
            (seen(child(&["a"]), vec![Solid], vec![]), vec![]),
            (seen(child(&["a"]), vec![Gone], vec![]), vec!["delete Background".to_owned()]),
            (seen(child(&["a", "b"]), vec![Gone, Gone], vec![]), vec!["delete Background".to_owned()]),
            (seen(child(&["a", "b"]), vec![Gone, Solid], vec![]), vec![format!("edit x {kept}")]),
            (seen(child(&["a", "b"]), vec![Waiting, Solid], vec![]), vec![format!("edit x {kept}")]),
            (seen(child(&["a"]), vec![Waiting], vec![]), vec!["delete Background".to_owned()]),
            (seen(child(&["a"]), vec![Waiting], vec![grandchild]), vec!["delete Foreground".to_owned()]),
            (
                seen(child(&["a"]), vec![Waiting], vec![ring]),
                vec![format!("edit x {unblocked}"), "delete Foreground".to_owned()],
            ),
            (seen(with_orphan, vec![Gone], vec![]), vec!["delete Orphan".to_owned()]),
        ];
        for (seen, expected) in cases {
            assert_eq!(told(&reconcile(&seen)), expected, "{seen:?}");
        }
    }

    #[test]
    fn what_becomes_of_an_owner_that_is_deleted() {
        let deleted = |finalizers: &[&str]| json!({"deletionTimestamp": DELETED, "finalizers": finalizers});
        let blocking = json!({"ownerReferences": [owner("uid-x")]});
        let mut idle = blocking.clone();
        idle["ownerReferences"][0]["blockOwnerDeletion"] = json!(false);
        let both = json!({"name": "y", "ownerReferences": [owner("uid-x"), owner("b")]});
        let kept = json!({"ownerReferences": [owner("b")]});
        let cases: Vec<(Observed, Vec<String>)> = vec![
            (seen(deleted(&["other"]), vec![], vec![blocking.clone()]), vec![]),
            (seen(deleted(&["foregroundDeletion"]), vec![], vec![blocking]), vec![]),
            (
                seen(deleted(&["foregroundDeletion"]), vec![], vec![idle]),
                vec![r#"edit x {"finalizers":null}"#.to_owned()],
            ),
            (
                seen(deleted(&["other", "foregroundDeletion"]), vec![], vec![]),
                vec![r#"edit x {"finalizers":["other"]}"#.to_owned()],
            ),
            (
                seen(deleted(&["orphan"]), vec![], vec![both]),
                vec![format!("edit y {kept}"), r#"edit x {"finalizers":null}"#.to_owned()],
            ),
        ];
        for (seen, expected) in cases {
            assert_eq!(told(&reconcile(&seen)), expected, "{seen:?}");
        }
    }
}
