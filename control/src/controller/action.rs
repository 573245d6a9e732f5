//! What a controller may ask for. Invariant: an action is plain data and complete: the driver that carries it out
//! adds nothing to it and decides nothing about it.

use std::time::Duration;

use serde_json::{Value, json};

use super::model::Meta;
use crate::resource::{Kind, Propagation};

/// An object that an action is about. With a uid it is that very object and not a later one of the same name;
/// with a revision the action is refused if the object has changed since.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Target {
    pub(crate) kind: &'static Kind,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) rev: Option<u64>,
}

impl Target {
    /// The object as it was seen, whatever has happened to it since.
    pub(crate) fn of(kind: &'static Kind, meta: &Meta) -> Target {
        Target {
            kind,
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
            uid: meta.uid.clone(),
            rev: None,
        }
    }

    /// The object only if it is still as it was seen: for edits that were worked out from its old content.
    pub(crate) fn unchanged(kind: &'static Kind, meta: &Meta) -> Target {
        Target { rev: Some(meta.rev), ..Target::of(kind, meta) }
    }
}

/// Which part of an object an edit writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Everything but the status.
    Main,
    /// The `/status` subresource.
    Status,
    /// The `/finalize` subresource of a Namespace.
    Finalize,
}

/// One step of what a controller wants done.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// Creates an object. `metadata.generateName` is honoured.
    Create { kind: &'static Kind, namespace: String, body: Value },
    /// Applies a JSON merge patch (RFC 7396).
    Edit { target: Target, part: Part, merge: Value },
    /// Deletes an object; `grace_seconds` is left to the object when absent.
    Delete { target: Target, grace_seconds: Option<u32>, propagation: Propagation },
    /// Tells the user, by an Event on the object, once everything else is done.
    Event { about: Target, warning: bool, reason: &'static str, message: String },
    /// Does all of these at once; the steps after it happen only if each succeeded.
    Together(Vec<Action>),
    /// Looks at the key again after this time, even if nothing changes.
    Again(Duration),
}

/// Writes fields of an object's status; `null` removes a field.
pub(crate) fn edit_status(kind: &'static Kind, meta: &Meta, status: Value) -> Action {
    Action::Edit { target: Target::of(kind, meta), part: Part::Status, merge: json!({ "status": status }) }
}
