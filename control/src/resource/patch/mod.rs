//! The four patch types. A patch is computed against one stored object and leaves no trace of its directives.

mod apply;
mod operations;
mod schema;
mod strategic;

use serde_json::Value;

use super::error::ApiError;
use super::kinds::Kind;
use super::object;

pub use operations::JSON_PATCH_OPERATIONS_MAX;

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

/// Computes the patched object. `current` is the stored object, the Scale of it for `/scale`, or null for an apply
/// that is to create. The result still has to pass [`prepare_update`](super::prepare_update) or
/// [`prepare_create`](super::prepare_create), which refuse a changed name, kind or uid and a stale resourceVersion.
///
/// Errors: 400 for a body that is no such patch, 422 for a JSON patch whose operation does not fit the object.
pub fn apply_patch(kind: &Kind, patch: PatchType, current: &Value, body: &[u8]) -> Result<Value, ApiError> {
    let mut out = current.clone();
    let schema =
        if object::str_at(current, &["kind"]) == "Scale" { &schema::PLAIN } else { schema::of(kind) };
    match patch {
        PatchType::Json => operations::run(&mut out, body)?,
        PatchType::Merge => {
            let parsed = parse(body)?;
            if !parsed.is_object() {
                return Err(ApiError::bad_request("a merge patch must be a JSON object"));
            }
            json_patch::merge(&mut out, &parsed);
        }
        PatchType::Strategic => strategic::merge(&mut out, parse(body)?, schema)?,
        PatchType::Apply => {
            let parsed = parse(body).map_err(|e| {
                ApiError::bad_request(format!(
                    "server-side apply takes a JSON body here (a subset of YAML): {e}"
                ))
            })?;
            for key in ["apiVersion", "kind"] {
                if object::str_at(&parsed, &[key]).is_empty() {
                    return Err(ApiError::bad_request(format!("an applied configuration must set {key}")));
                }
            }
            apply::merge(&mut out, parsed, schema)?;
        }
    }
    if !out.is_object() {
        return Err(ApiError::bad_request("the patch does not leave an object"));
    }
    Ok(out)
}

fn parse(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body)
        .map_err(|e| ApiError::bad_request(format!("the patch is not valid JSON: {e}")))
}

#[cfg(test)]
mod tests;
