//! RFC 6902 patches, with bounds on how much one patch may do.

use json_patch::{Patch, PatchOperation};
use serde_json::Value;

use crate::resource::error::ApiError;

/// Most operations that one patch may hold.
pub const JSON_PATCH_OPERATIONS_MAX: usize = 10_000;
/// Most bytes that all `copy` operations of a patch may multiply, counted as JSON text.
const COPIED_BYTES_MAX: usize = 3 << 20;

/// Carries out a patch on `target`; on error `target` is left half-way and must be thrown away.
pub(super) fn run(target: &mut Value, body: &[u8]) -> Result<(), ApiError> {
    let patch: Patch = serde_json::from_slice(body)
        .map_err(|e| ApiError::bad_request(format!("the body is not a JSON patch: {e}")))?;
    if patch.0.len() > JSON_PATCH_OPERATIONS_MAX {
        return Err(ApiError::too_many_operations(patch.0.len(), JSON_PATCH_OPERATIONS_MAX));
    }
    let mut copied = 0_usize;
    for (i, operation) in patch.0.iter().enumerate() {
        if let PatchOperation::Copy(copy) = operation {
            copied = copied.saturating_add(target.pointer(copy.from.as_str()).map_or(0, text_size));
            if copied > COPIED_BYTES_MAX {
                return Err(ApiError::bad_request(format!(
                    "operation {i}: the copies of this patch are over {COPIED_BYTES_MAX} bytes"
                )));
            }
        }
        json_patch::patch_unsafe(target, std::slice::from_ref(operation)).map_err(|e| {
            ApiError::unprocessable(format!("JSON patch operation {i} ({}): {}", operation.path(), e.kind))
        })?;
    }
    Ok(())
}

/// Roughly the length of the value as JSON text.
fn text_size(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(s) => s.len() + 2,
        Value::Array(items) => items.iter().map(|v| text_size(v) + 1).sum::<usize>() + 2,
        Value::Object(map) => map.iter().map(|(k, v)| k.len() + 4 + text_size(v)).sum::<usize>() + 2,
    }
}
