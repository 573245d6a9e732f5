//! Server-side printing: the columns and rows that `kubectl get` shows.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::kinds::Kind;
use super::object;

/// What a row carries beside its cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IncludeObject {
    /// Nothing.
    None,
    /// The object's metadata (the default).
    Metadata,
    /// The whole object.
    Object,
}

/// `columnDefinitions` of a kind.
pub fn columns(_kind: &Kind) -> Value {
    json!([{"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0}])
}

/// One row of the table.
pub fn row(_kind: &Kind, object: &Value, _now: Timestamp, _include: IncludeObject) -> Value {
    json!({"cells": [object::name(object)], "object": object})
}
