//! Errors as the Kubernetes API tells them: each one is a `metav1.Status` with a stable reason and code.

use std::fmt;

use serde_json::{Value, json};

use super::kinds::Kind;

/// Why one field was refused; the values are Kubernetes' cause types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CauseReason {
    /// The field must be set.
    Required,
    /// The value has the wrong form.
    Invalid,
    /// The value is not one of a closed set.
    NotSupported,
    /// The value may not be used here.
    Forbidden,
    /// The value appears twice.
    Duplicate,
    /// The value names something that does not exist.
    NotFound,
    /// The value is too long.
    TooLong,
    /// The list has too many items.
    TooMany,
    /// The JSON type is wrong.
    TypeInvalid,
    /// A resource version from the future.
    ResourceVersionTooLarge,
}

impl CauseReason {
    /// The value of `details.causes[].reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Required => "FieldValueRequired",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::Duplicate => "FieldValueDuplicate",
            Self::NotFound => "FieldValueNotFound",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::TypeInvalid => "FieldValueTypeInvalid",
            Self::ResourceVersionTooLarge => "ResourceVersionTooLarge",
        }
    }
}

/// One reason among those that made a request fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// The kind of fault.
    pub reason: CauseReason,
    /// What is wrong and how to put it right.
    pub message: String,
    /// JSON path such as `spec.containers[0].name`; empty when no field is to blame.
    pub field: String,
}

/// The `details` of a Status.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Details {
    /// Object name.
    pub name: String,
    /// API group.
    pub group: String,
    /// Plural resource, or the kind where the error is about the object's content.
    pub kind: String,
    /// Object uid, where it matters.
    pub uid: String,
    /// Single faults.
    pub causes: Vec<Cause>,
    /// Seconds after which a retry makes sense.
    pub retry_after_seconds: Option<u32>,
}

/// A failed API request: the whole answer but for the HTTP framing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub code: u16,
    /// `metav1.StatusReason`, such as `NotFound`.
    pub reason: &'static str,
    /// Text for people; kubectl prints it.
    pub message: String,
    /// Machine-readable part.
    pub details: Option<Box<Details>>,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: None }
    }

    fn about(mut self, kind: &Kind, name: &str) -> Self {
        self.details = Some(Box::new(Details {
            name: name.to_owned(),
            group: kind.group.to_owned(),
            kind: kind.plural.to_owned(),
            ..Details::default()
        }));
        self
    }

    /// 404: the object does not exist.
    pub fn not_found(kind: &Kind, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} \"{name}\" not found", kind.resource_key())).about(kind, name)
    }

    /// 404 for a path that names no resource.
    pub fn no_such_path() -> Self {
        let mut error = Self::new(404, "NotFound", "the server could not find the requested resource");
        error.details = Some(Box::default());
        error
    }

    /// 409: an object of this name exists.
    pub fn already_exists(kind: &Kind, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{} \"{name}\" already exists", kind.resource_key()))
            .about(kind, name)
    }

    /// 409: a precondition (resourceVersion, uid) does not hold, or a rule forbids the change now.
    pub fn conflict(kind: &Kind, name: &str, why: &str) -> Self {
        Self::new(
            409,
            "Conflict",
            format!("Operation cannot be fulfilled on {} \"{name}\": {why}", kind.resource_key()),
        )
        .about(kind, name)
    }

    /// 409 for a stale resourceVersion. Clients look for the reason, people for "has been modified".
    pub fn modified(kind: &Kind, name: &str) -> Self {
        Self::conflict(
            kind,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 422: the object's content is refused; `causes` name field and fix and must not be empty.
    pub fn invalid(kind: &Kind, name: &str, causes: Vec<Cause>) -> Self {
        Self::invalid_as(kind.group, kind.kind, name, causes)
    }

    /// Like [`ApiError::invalid`] for a body whose kind is not a stored one (Scale, Binding, DeleteOptions).
    pub fn invalid_as(group: &str, kind: &str, name: &str, causes: Vec<Cause>) -> Self {
        let text = |c: &Cause| {
            if c.field.is_empty() { c.message.clone() } else { format!("{}: {}", c.field, c.message) }
        };
        let list = match causes.as_slice() {
            [one] => text(one),
            many => format!("[{}]", many.iter().map(text).collect::<Vec<_>>().join(", ")),
        };
        let qualified = if group.is_empty() { kind.to_owned() } else { format!("{kind}.{group}") };
        let mut error = Self::new(422, "Invalid", format!("{qualified} \"{name}\" is invalid: {list}"));
        error.details = Some(Box::new(Details {
            name: name.to_owned(),
            group: group.to_owned(),
            kind: kind.to_owned(),
            causes,
            ..Details::default()
        }));
        error
    }

    /// 400: the request itself cannot be understood.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 401: no usable client identity.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(401, "Unauthorized", message)
    }

    /// 403: understood, and refused. `name` may be empty.
    pub fn forbidden(kind: &Kind, name: &str, why: &str) -> Self {
        let message = if name.is_empty() {
            format!("{} is forbidden: {why}", kind.resource_key())
        } else {
            format!("{} \"{name}\" is forbidden: {why}", kind.resource_key())
        };
        Self::new(403, "Forbidden", message).about(kind, name)
    }

    /// 403 for a write into a namespace that is going away; clients look for the cause `NamespaceTerminating`.
    pub fn namespace_terminating(kind: &Kind, name: &str, namespace: &str) -> Self {
        Self::forbidden(
            kind,
            name,
            &format!("unable to create new content in namespace {namespace} because it is being terminated"),
        )
    }

    /// 405: the path exists, the verb does not.
    pub fn method_not_allowed() -> Self {
        let mut error = Self::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        );
        error.details = Some(Box::default());
        error
    }

    /// 406: none of the accepted media types can be produced.
    pub fn not_acceptable(offered: &[&str]) -> Self {
        Self::new(
            406,
            "NotAcceptable",
            format!("only these media types can be served: {}", offered.join(", ")),
        )
    }

    /// 410 for a watch or list that starts before the kept history.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 410: the resource is gone for good.
    pub fn gone(message: impl Into<String>) -> Self {
        Self::new(410, "Gone", message)
    }

    /// 413: the body is over `limit_bytes`.
    pub fn too_large(limit_bytes: usize) -> Self {
        Self::new(
            413,
            "RequestEntityTooLarge",
            format!("Request entity too large: limit is {limit_bytes} bytes"),
        )
    }

    /// 413: a JSON patch of too many operations.
    pub fn too_many_operations(got: usize, max: usize) -> Self {
        Self::new(
            413,
            "RequestEntityTooLarge",
            format!("a JSON patch may hold at most {max} operations, got {got}"),
        )
    }

    /// 422 without an object to blame: the request is well formed and does not fit what is stored.
    pub fn unprocessable(message: impl Into<String>) -> Self {
        let mut error = Self::new(422, "Invalid", message);
        error.details = Some(Box::default());
        error
    }

    /// 415: the body's media type is not understood.
    pub fn unsupported_media_type(got: &str, accepted: &[&str]) -> Self {
        Self::new(
            415,
            "UnsupportedMediaType",
            format!(
                "the body of the request is of media type {got:?}; accepted media types include: {}",
                accepted.join(", ")
            ),
        )
    }

    /// 429: come back later.
    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        let mut error = Self::new(429, "TooManyRequests", message);
        error.details =
            Some(Box::new(Details { retry_after_seconds: Some(retry_after_seconds), ..Details::default() }));
        error
    }

    /// 500: our fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {}", message.into()))
    }

    /// 503: not able to serve now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "ServiceUnavailable", message)
    }

    /// 504: the time for the request ran out.
    pub fn timeout(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        let mut error = Self::new(504, "Timeout", message);
        error.details =
            Some(Box::new(Details { retry_after_seconds: Some(retry_after_seconds), ..Details::default() }));
        error
    }

    /// 504 for a resource version that the store has not reached yet.
    pub fn too_large_resource_version(wanted: u64, current: u64) -> Self {
        let mut error = Self::timeout(format!("Too large resource version: {wanted}, current: {current}"), 1);
        if let Some(details) = error.details.as_mut() {
            details.causes.push(Cause {
                reason: CauseReason::ResourceVersionTooLarge,
                message: "Too large resource version".to_owned(),
                field: String::new(),
            });
        }
        error
    }

    /// Whether a read-modify-write loop may try again from the newest object.
    pub fn is_conflict(&self) -> bool {
        self.reason == "Conflict"
    }

    /// Whether the object was not there.
    pub fn is_not_found(&self) -> bool {
        self.reason == "NotFound"
    }

    /// Whether an object of the name was there already.
    pub fn is_already_exists(&self) -> bool {
        self.reason == "AlreadyExists"
    }

    /// The `metav1.Status` body.
    pub fn to_status(&self) -> Value {
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        });
        if let Some(details) = &self.details {
            status["details"] = details_json(details);
        }
        status
    }
}

fn details_json(details: &Details) -> Value {
    let mut out = serde_json::Map::new();
    for (key, value) in
        [("name", &details.name), ("group", &details.group), ("kind", &details.kind), ("uid", &details.uid)]
    {
        if !value.is_empty() {
            out.insert(key.to_owned(), Value::String(value.clone()));
        }
    }
    if !details.causes.is_empty() {
        let causes = details.causes.iter().map(|c| {
            let mut cause = json!({"reason": c.reason.as_str(), "message": c.message});
            if !c.field.is_empty() {
                cause["field"] = Value::String(c.field.clone());
            }
            cause
        });
        out.insert("causes".to_owned(), causes.collect());
    }
    if let Some(seconds) = details.retry_after_seconds {
        out.insert("retryAfterSeconds".to_owned(), seconds.into());
    }
    Value::Object(out)
}

/// The `metav1.Status` of a success without an object to return, as DELETE answers once the object is removed.
pub fn success_status(kind: &Kind, name: &str, uid: &str) -> Value {
    let details = Details {
        name: name.to_owned(),
        group: kind.group.to_owned(),
        kind: kind.plural.to_owned(),
        uid: uid.to_owned(),
        ..Details::default()
    };
    json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": details_json(&details),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::kinds::{DEPLOYMENTS, PODS};

    #[test]
    fn not_found_is_what_kubectl_prints() {
        let error = ApiError::not_found(&PODS, "x");
        assert_eq!(error.message, "pods \"x\" not found");
        assert_eq!(
            error.to_status(),
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "pods \"x\" not found", "reason": "NotFound", "code": 404,
                "details": {"name": "x", "kind": "pods"}})
        );
        assert_eq!(ApiError::not_found(&DEPLOYMENTS, "d").message, "deployments.apps \"d\" not found");
    }

    #[test]
    fn invalid_names_every_cause() {
        let cause = |field: &str, message: &str| Cause {
            reason: CauseReason::Required,
            message: message.to_owned(),
            field: field.to_owned(),
        };
        let one = ApiError::invalid(&PODS, "p", vec![cause("spec.containers", "Required value")]);
        assert_eq!(one.message, "Pod \"p\" is invalid: spec.containers: Required value");
        let two = ApiError::invalid(&DEPLOYMENTS, "d", vec![cause("a", "x"), cause("b", "y")]);
        assert_eq!(two.message, "Deployment.apps \"d\" is invalid: [a: x, b: y]");
        let status = two.to_status();
        assert_eq!(status["code"], 422);
        assert_eq!(status["details"]["kind"], "Deployment");
        assert_eq!(status["details"]["group"], "apps");
        assert_eq!(
            status["details"]["causes"][1],
            json!({"reason": "FieldValueRequired", "message": "y", "field": "b"})
        );
    }

    #[test]
    fn future_version_says_when_to_retry() {
        let status = ApiError::too_large_resource_version(9, 4).to_status();
        assert_eq!(status["reason"], "Timeout");
        assert_eq!(status["details"]["retryAfterSeconds"], 1);
        assert_eq!(status["details"]["causes"][0]["reason"], "ResourceVersionTooLarge");
    }
}
