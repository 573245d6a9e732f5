//! The four patch types. A patch is computed against one stored object and leaves no trace of its directives.

use serde_json::Value;

use super::error::ApiError;
use super::kinds::Kind;

/// Most operations that one JSON patch may hold.
pub const JSON_PATCH_OPERATIONS_MAX: usize = 10_000;

/// How a PATCH body is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchType {
    /// RFC 6902, `application/json-patch+json`.
    Json,
    /// RFC 7396, `application/merge-patch+json`.
    Merge,
    /// `application/strategic-merge-patch+json`.
    Strategic,
    /// Server-side apply, `application/apply-patch+yaml` with a JSON body.
    Apply,
}

/// Media types that PATCH takes, for errors and OpenAPI.
pub const PATCH_MEDIA_TYPES: [&str; 4] = [
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

impl PatchType {
    /// Reads a Content-Type; parameters are ignored. 415 for others.
    pub fn from_content_type(content_type: &str) -> Result<Self, ApiError> {
        let media = content_type.split(';').next().unwrap_or("").trim();
        match media.to_ascii_lowercase().as_str() {
            "application/json-patch+json" => Ok(Self::Json),
            "application/merge-patch+json" => Ok(Self::Merge),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic),
            "application/apply-patch+yaml" => Ok(Self::Apply),
            _ => Err(ApiError::unsupported_media_type(media, &PATCH_MEDIA_TYPES)),
        }
    }
}

/// Computes the patched object. `current` is the stored object (or the Scale of it, for `/scale`).
pub fn apply_patch(_kind: &Kind, patch: PatchType, current: &Value, body: &[u8]) -> Result<Value, ApiError> {
    let parsed: Value = serde_json::from_slice(body)
        .map_err(|e| ApiError::bad_request(format!("the patch is not valid JSON: {e}")))?;
    match patch {
        PatchType::Merge => {
            let mut out = current.clone();
            json_patch::merge(&mut out, &parsed);
            Ok(out)
        }
        PatchType::Json | PatchType::Strategic | PatchType::Apply => {
            Err(ApiError::unsupported_media_type("this patch type", &["application/merge-patch+json"]))
        }
    }
}
