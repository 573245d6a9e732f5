//! Whose an object is. Invariant: an object has at most one controller, found by uid: a controller takes over only
//! objects that have none and match its selector, and lets go only of objects that name it.

use serde_json::{Value, json};

use super::action::{Action, Part, Target};
use super::model::{Meta, OwnerReference, selects};
use crate::resource::{Kind, LabelSelector};

/// The controller that sorts out what is its own.
pub(crate) struct Owner<'a> {
    pub(crate) kind: &'static Kind,
    pub(crate) meta: &'a Meta,
    pub(crate) selector: &'a LabelSelector,
}

/// The objects that the owner controls now, with the edits that make it so. An owner that is being deleted keeps
/// what it has and takes or releases nothing: what becomes of its dependents is the garbage collector's business.
pub(crate) fn claim<'a, T>(
    owner: &Owner<'_>,
    kind: &'static Kind,
    objects: &'a [T],
    meta: impl Fn(&T) -> &Meta,
    adoptable: impl Fn(&T) -> bool,
    actions: &mut Vec<Action>,
) -> Vec<&'a T> {
    let mut claimed = Vec::new();
    for object in objects {
        let its = meta(object);
        let matches = selects(owner.selector, &its.labels);
        match its.controller() {
            Some(reference) if reference.uid != owner.meta.uid => {}
            Some(_) if matches => claimed.push(object),
            Some(_) if owner.meta.is_deleting() => {}
            Some(_) => actions.push(release(kind, its, &owner.meta.uid)),
            None if matches && adoptable(object) && !owner.meta.is_deleting() => {
                actions.push(adopt(kind, its, owner));
                claimed.push(object);
            }
            None => {}
        }
    }
    claimed
}

fn adopt(kind: &'static Kind, its: &Meta, owner: &Owner<'_>) -> Action {
    let mut references: Vec<Value> = its.owner_references.iter().map(|r| json!(r)).collect();
    references.push(controller_reference(owner.kind, owner.meta));
    rewrite(kind, its, json!(references))
}

/// Takes the references to `uid` off an object.
pub(crate) fn release(kind: &'static Kind, its: &Meta, uid: &str) -> Action {
    let kept: Vec<&OwnerReference> = its.owner_references.iter().filter(|r| r.uid != uid).collect();
    rewrite(kind, its, if kept.is_empty() { Value::Null } else { json!(kept) })
}

fn rewrite(kind: &'static Kind, its: &Meta, references: Value) -> Action {
    Action::Edit {
        target: Target::unchanged(kind, its),
        part: Part::Main,
        merge: json!({"metadata": {"ownerReferences": references}}),
    }
}

/// The owner reference that a controller puts on what it makes.
pub(crate) fn controller_reference(kind: &Kind, owner: &Meta) -> Value {
    json!({
        "apiVersion": kind.api_version(),
        "kind": kind.kind,
        "name": owner.name,
        "uid": owner.uid,
        "controller": true,
        "blockOwnerDeletion": true,
    })
}
