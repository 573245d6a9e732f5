//! Validation: what is let in can be run; what is refused is told by field and fix.

use serde_json::Value;

use super::error::ApiError;
use super::kinds::Kind;

/// Checks a defaulted object before its creation.
pub fn validate_create(_kind: &Kind, _object: &Value) -> Result<(), ApiError> {
    Ok(())
}

/// Checks a defaulted object that is to replace `_old`.
pub fn validate_update(_kind: &Kind, _new: &Value, _old: &Value) -> Result<(), ApiError> {
    Ok(())
}
