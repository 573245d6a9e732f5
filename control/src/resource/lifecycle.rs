//! The rules of an object's life: what the server sets, carries over, ignores or refuses when objects are created,
//! updated and deleted. Time, uid and randomness are arguments, so every decision can be repeated.
//!
//! A write runs these steps, in this order:
//! - both first turn the body into JSON of the API's types ([`conform`](super::conform), done by the `prepare` functions);
//!   who wants to refuse or tell unknown members asks [`FieldValidation::check`](super::FieldValidation::check) before.
//! - create: [`prepare_create`], [`default_object`](super::default_object), service addresses
//!   ([`alloc`](super::alloc)), [`validate_create`](super::validate_create).
//! - update (also after a patch): [`prepare_update`], `default_object`, service addresses,
//!   [`validate_update`](super::validate_update), [`finish_update`].
//! - delete: [`plan_delete`].

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};

use super::error::{ApiError, Cause, CauseReason};
use super::kinds::{self, Generation, Kind, Subresource};
use super::object::{self, at, format_time, int_at, str_at};
use super::types::conform;

/// Finalizer that keeps an owner until its blocking dependents are gone.
pub const FOREGROUND_FINALIZER: &str = "foregroundDeletion";
/// Finalizer that keeps an owner until its dependents have let go of it.
pub const ORPHAN_FINALIZER: &str = "orphan";
/// Longest `generateName` prefix that is kept, in bytes.
pub const GENERATE_NAME_BASE_MAX: usize = 58;
/// How long a pod may take to stop when nothing else is said, in seconds.
pub const POD_GRACE_DEFAULT_SECONDS: i64 = 30;

/// What the outside world contributes to a create.
#[derive(Debug, Clone)]
pub struct Stamp {
    /// Creation time.
    pub now: Timestamp,
    /// Random (version 4) uuid.
    pub uid: String,
    /// Five characters from [`name_suffix`], used with `generateName`.
    pub suffix: String,
}

/// Turns random bytes into the five characters that follow a `generateName` prefix: letters and digits that are not
/// mistaken for each other and do not form words.
pub fn name_suffix(random: [u8; 5]) -> String {
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    random.iter().map(|b| char::from(ALPHABET[usize::from(*b) % ALPHABET.len()])).collect()
}

fn as_object<'a>(kind: &Kind, value: &'a mut Value) -> Result<&'a mut Map<String, Value>, ApiError> {
    value
        .as_object_mut()
        .ok_or_else(|| ApiError::bad_request(format!("the body must be a JSON object of kind {}", kind.kind)))
}

/// Checks `apiVersion` and `kind` against what the path serves; absent ones are filled in.
fn settle_type(kind: &Kind, object: &mut Map<String, Value>) -> Result<(), ApiError> {
    for (key, expected, what) in
        [("apiVersion", kind.api_version(), "API version"), ("kind", kind.kind.to_owned(), "kind")]
    {
        match object.get(key) {
            Some(Value::String(got)) if *got == expected => {}
            Some(Value::String(got)) if !got.is_empty() => {
                return Err(ApiError::bad_request(format!(
                    "the {what} in the data ({got}) does not match the expected {what} ({expected})"
                )));
            }
            None | Some(Value::Null | Value::String(_)) => {
                object.insert(key.to_owned(), Value::String(expected));
            }
            Some(_) => return Err(ApiError::bad_request(format!("{key} must be a string"))),
        }
    }
    Ok(())
}

fn metadata_mut(object: &mut Map<String, Value>) -> Result<&mut Map<String, Value>, ApiError> {
    object
        .entry("metadata")
        .or_insert_with(|| Value::Object(Map::new()))
        .as_object_mut()
        .ok_or_else(|| ApiError::bad_request("metadata must be an object"))
}

fn settle_namespace(kind: &Kind, meta: &mut Map<String, Value>, namespace: &str) -> Result<(), ApiError> {
    let got = meta.get("namespace").and_then(Value::as_str).unwrap_or("");
    if !kind.namespaced {
        if !got.is_empty() {
            return Err(ApiError::bad_request(format!(
                "namespace must not be set on objects of kind {}: they are not namespaced",
                kind.kind
            )));
        }
        meta.remove("namespace");
        return Ok(());
    }
    if got.is_empty() {
        meta.insert("namespace".to_owned(), Value::String(namespace.to_owned()));
    } else if got != namespace {
        return Err(ApiError::bad_request(format!(
            "the namespace of the provided object ({got}) does not match the namespace sent on the request ({namespace})"
        )));
    }
    Ok(())
}

/// Makes a received object one that this server created: identity, generation and first status.
pub fn prepare_create(
    kind: &Kind,
    namespace: &str,
    object: &mut Value,
    stamp: &Stamp,
) -> Result<(), ApiError> {
    conform(kind, Subresource::Main, object)?;
    let root = as_object(kind, object)?;
    settle_type(kind, root)?;
    let meta = metadata_mut(root)?;
    settle_namespace(kind, meta, namespace)?;
    if meta.get("resourceVersion").and_then(Value::as_str).is_some_and(|rv| !rv.is_empty()) {
        return Err(ApiError::bad_request("resourceVersion must not be set on objects to be created"));
    }
    let named = meta.get("name").and_then(Value::as_str).is_some_and(|n| !n.is_empty());
    if !named {
        let base = meta.get("generateName").and_then(Value::as_str).unwrap_or("");
        if base.is_empty() {
            let cause = Cause {
                reason: CauseReason::Required,
                message: "Required value: name or generateName is required".to_owned(),
                field: "metadata.name".to_owned(),
            };
            return Err(ApiError::invalid(kind, "", vec![cause]));
        }
        let mut cut = base.len().min(GENERATE_NAME_BASE_MAX);
        while !base.is_char_boundary(cut) {
            cut -= 1;
        }
        let name = format!("{}{}", &base[..cut], stamp.suffix);
        meta.insert("name".to_owned(), Value::String(name));
    }
    for key in [
        "resourceVersion",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "selfLink",
        "managedFields",
        "generation",
    ] {
        meta.remove(key);
    }
    meta.insert("uid".to_owned(), Value::String(stamp.uid.clone()));
    meta.insert("creationTimestamp".to_owned(), Value::String(format_time(stamp.now)));
    if kind.generation != Generation::None {
        meta.insert("generation".to_owned(), 1.into());
    }
    first_status(kind, root);
    Ok(())
}

fn first_status(kind: &Kind, root: &mut Map<String, Value>) {
    // A node arrives with the status that its agent found; for all others the server starts it.
    if !kind.status || kind == &kinds::NODES {
        return;
    }
    let status = match (kind.group, kind.plural) {
        ("", "pods") => json!({"phase": "Pending"}),
        ("", "namespaces") => json!({"phase": "Active"}),
        ("", "services") => json!({"loadBalancer": {}}),
        ("apps", "replicasets") => json!({"replicas": 0}),
        _ => json!({}),
    };
    root.insert("status".to_owned(), status);
    if kind == &kinds::NAMESPACES {
        let spec = root.entry("spec").or_insert_with(|| json!({}));
        if let Some(spec) = spec.as_object_mut() {
            let list = spec.entry("finalizers").or_insert_with(|| json!([]));
            if let Some(list) = list.as_array_mut()
                && !list.iter().any(|f| f == "kubernetes")
            {
                list.push(json!("kubernetes"));
            }
        }
    }
}

/// Metadata that only the server writes: an update keeps the stored values whatever the client sent.
const SERVER_METADATA: [&str; 9] = [
    "uid",
    "creationTimestamp",
    "generation",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "resourceVersion",
    "generateName",
    "selfLink",
    "managedFields",
];

fn carry(new: &mut Map<String, Value>, old: Option<&Map<String, Value>>, key: &str) {
    match old.and_then(|m| m.get(key)) {
        Some(value) => {
            new.insert(key.to_owned(), value.clone());
        }
        None => {
            new.remove(key);
        }
    }
}

/// Refuses an update whose name, uid or resourceVersion is not the stored object's.
fn check_identity(kind: &Kind, new: &mut Map<String, Value>, old: &Value) -> Result<(), ApiError> {
    let name = object::name(old);
    let meta = metadata_mut(new)?;
    let sent = |key: &str| meta.get(key).and_then(Value::as_str).unwrap_or("");
    let got = sent("name");
    if !got.is_empty() && got != name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({got}) does not match the name on the URL ({name})"
        )));
    }
    let (uid, stored) = (sent("uid"), object::uid(old));
    if !uid.is_empty() && uid != stored {
        return Err(precondition(kind, name, "UID", uid, stored));
    }
    let version = sent("resourceVersion");
    if !version.is_empty() && version != object::resource_version(old) {
        return Err(ApiError::modified(kind, name));
    }
    meta.insert("name".to_owned(), Value::String(name.to_owned()));
    settle_namespace(kind, meta, object::namespace(old))
}

fn precondition(kind: &Kind, name: &str, what: &str, wanted: &str, stored: &str) -> ApiError {
    ApiError::conflict(
        kind,
        name,
        &format!("Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {stored}"),
    )
}

/// Turns the body of an update into the whole object it stands for.
///
/// `old` is the stored object with its resourceVersion. `new` is the body that the subresource takes: the object
/// itself, or a Scale or Binding. After success `new` is the whole object with server-owned metadata carried over,
/// and the parts the endpoint does not write (status on main, all but status on `/status`) as stored.
///
/// Errors: 400 for a body that does not fit the path, 409 for a stale resourceVersion, wrong uid or a pod that is
/// bound already, 405 for subresources that are not written.
pub fn prepare_update(
    kind: &Kind,
    new: &mut Value,
    old: &Value,
    sub: Subresource,
    now: Timestamp,
) -> Result<(), ApiError> {
    conform(kind, sub, new)?;
    match sub {
        Subresource::Main => prepare_main(kind, new, old),
        Subresource::Status => {
            let root = as_object(kind, new)?;
            settle_type(kind, root)?;
            check_identity(kind, root, old)?;
            let status = root.remove("status");
            *new = old.clone();
            set_or_remove(new, "status", status);
            Ok(())
        }
        Subresource::Finalize => {
            let root = as_object(kind, new)?;
            settle_type(kind, root)?;
            check_identity(kind, root, old)?;
            let finalizers = root.get_mut("spec").and_then(|s| s.get_mut("finalizers")).map(Value::take);
            *new = old.clone();
            let spec = object::map_mut(new, "spec");
            match finalizers {
                Some(list) => spec.insert("finalizers".to_owned(), list),
                None => spec.remove("finalizers"),
            };
            Ok(())
        }
        Subresource::Scale => apply_scale(kind, new, old),
        Subresource::Binding => bind_pod(new, old, now),
        Subresource::Log => Err(ApiError::method_not_allowed()),
    }
}

fn set_or_remove(object: &mut Value, key: &str, value: Option<Value>) {
    if let Some(map) = object.as_object_mut() {
        match value {
            Some(value) => map.insert(key.to_owned(), value),
            None => map.remove(key),
        };
    }
}

fn prepare_main(kind: &Kind, new: &mut Value, old: &Value) -> Result<(), ApiError> {
    let root = as_object(kind, new)?;
    settle_type(kind, root)?;
    check_identity(kind, root, old)?;
    let old_meta = object::map_at(old, &["metadata"]);
    let meta = metadata_mut(root)?;
    for key in SERVER_METADATA {
        carry(meta, old_meta, key);
    }
    if kind.status {
        carry(root, old.as_object(), "status");
    }
    if kind == &kinds::PODS && at(new, &["spec", "nodeName"]) != at(old, &["spec", "nodeName"]) {
        let cause = Cause {
            reason: CauseReason::Forbidden,
            message: "Forbidden: may not be changed; a pod is bound through its binding".to_owned(),
            field: "spec.nodeName".to_owned(),
        };
        return Err(ApiError::invalid(kind, object::name(old), vec![cause]));
    }
    if kind == &kinds::NAMESPACES {
        let finalizers = at(old, &["spec", "finalizers"]).cloned();
        let spec = object::map_mut(new, "spec");
        match finalizers {
            Some(list) => spec.insert("finalizers".to_owned(), list),
            None => spec.remove("finalizers"),
        };
    }
    Ok(())
}

/// The `autoscaling/v1` Scale of a Deployment or ReplicaSet.
pub fn scale_of(object: &Value) -> Value {
    let meta = |key: &str| at(object, &["metadata", key]).cloned().unwrap_or(Value::Null);
    let mut scale = json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": meta("name"),
            "namespace": meta("namespace"),
            "uid": meta("uid"),
            "resourceVersion": meta("resourceVersion"),
            "creationTimestamp": meta("creationTimestamp"),
        },
        "spec": {"replicas": int_at(object, &["spec", "replicas"]).unwrap_or(0)},
        "status": {"replicas": int_at(object, &["status", "replicas"]).unwrap_or(0)},
    });
    if let Some(selector) = at(object, &["spec", "selector"]) {
        scale["status"]["selector"] = Value::String(selector_text(selector));
    }
    if let Some(meta) = scale["metadata"].as_object_mut() {
        meta.retain(|_, v| !v.is_null());
    }
    scale
}

/// A `metav1.LabelSelector` as the string form that list requests take.
pub fn selector_text(selector: &Value) -> String {
    let mut parts: Vec<String> = object::map_at(selector, &["matchLabels"])
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or("")))
        .collect();
    for item in object::items_at(selector, &["matchExpressions"]) {
        let key = str_at(item, &["key"]);
        let values = || {
            let list: Vec<&str> =
                object::items_at(item, &["values"]).iter().filter_map(Value::as_str).collect();
            list.join(",")
        };
        parts.push(match str_at(item, &["operator"]) {
            "In" => format!("{key} in ({})", values()),
            "NotIn" => format!("{key} notin ({})", values()),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    parts.join(",")
}

fn apply_scale(kind: &Kind, body: &mut Value, old: &Value) -> Result<(), ApiError> {
    if !kind.scale {
        return Err(ApiError::method_not_allowed());
    }
    let root = as_object(kind, body)?;
    let given = |key: &str| root.get(key).and_then(Value::as_str).unwrap_or("").to_owned();
    let (version, name) = (given("apiVersion"), given("kind"));
    if !matches!(version.as_str(), "" | "autoscaling/v1") || !matches!(name.as_str(), "" | "Scale") {
        return Err(ApiError::bad_request(format!("expected autoscaling/v1 Scale, got {version} {name}")));
    }
    check_identity(kind, root, old)?;
    let replicas = match root.get("spec").and_then(|s| s.get("replicas")) {
        None => 0,
        Some(value) => match value.as_i64() {
            Some(n) if (0..=i64::from(i32::MAX)).contains(&n) => n,
            _ => {
                let cause = Cause {
                    reason: CauseReason::Invalid,
                    message: format!("Invalid value: {value}: must be an integer from 0 to {}", i32::MAX),
                    field: "spec.replicas".to_owned(),
                };
                return Err(ApiError::invalid_as("autoscaling", "Scale", object::name(old), vec![cause]));
            }
        },
    };
    *body = old.clone();
    object::map_mut(body, "spec").insert("replicas".to_owned(), replicas.into());
    Ok(())
}

fn bind_pod(body: &mut Value, old: &Value, now: Timestamp) -> Result<(), ApiError> {
    let kind = &kinds::PODS;
    let name = object::name(old);
    let refuse = |field: &str, reason: CauseReason, message: &str| {
        let cause = Cause { reason, message: message.to_owned(), field: field.to_owned() };
        ApiError::invalid_as("", "Binding", name, vec![cause])
    };
    let root = as_object(kind, body)?;
    check_identity(kind, root, old)?;
    let target = str_at(body, &["target", "name"]).to_owned();
    if target.is_empty() {
        return Err(refuse("target.name", CauseReason::Required, "Required value: name the node"));
    }
    if !matches!(str_at(body, &["target", "kind"]), "" | "Node") {
        return Err(refuse("target.kind", CauseReason::NotSupported, "Unsupported value: must be Node"));
    }
    if object::is_deleting(old) {
        return Err(ApiError::conflict(
            kind,
            name,
            &format!("pod {name} is being deleted, cannot be assigned to a host"),
        ));
    }
    let bound = str_at(old, &["spec", "nodeName"]);
    if !bound.is_empty() {
        return Err(ApiError::conflict(
            kind,
            name,
            &format!("pod {name} is already assigned to node {bound:?}"),
        ));
    }
    let annotations = body.get_mut("metadata").and_then(|m| m.get_mut("annotations")).map(Value::take);
    *body = old.clone();
    object::map_mut(body, "spec").insert("nodeName".to_owned(), Value::String(target));
    if let (Some(Value::Object(extra)), Some(meta)) = (annotations, body.get_mut("metadata")) {
        object::map_mut(meta, "annotations").extend(extra);
    }
    set_condition(body, "PodScheduled", "True", now);
    Ok(())
}

/// Sets a status condition; `lastTransitionTime` moves only when the status does.
fn set_condition(object: &mut Value, condition: &str, status: &str, now: Timestamp) {
    let list = object::map_mut(object, "status").entry("conditions").or_insert_with(|| json!([]));
    let Some(list) = list.as_array_mut() else { return };
    let fresh = json!({"type": condition, "status": status, "lastTransitionTime": format_time(now)});
    match list.iter_mut().find(|c| str_at(c, &["type"]) == condition) {
        Some(found) if str_at(found, &["status"]) == status => {}
        Some(found) => *found = fresh,
        None => list.push(fresh),
    }
}

/// What an admitted update does to the stored object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdateOutcome {
    /// Nothing changes: answer with the stored object, write nothing.
    Unchanged,
    /// Store the new object.
    Changed,
    /// The object was deleting and the last finalizer is gone: remove it.
    Remove,
}

/// Ends an update: finds no-ops, counts the generation, and sees a deletion that can now be carried out.
pub fn finish_update(kind: &Kind, new: &mut Value, old: &Value) -> UpdateOutcome {
    if new == old {
        return UpdateOutcome::Unchanged;
    }
    let moved = match kind.generation {
        Generation::None => false,
        Generation::Spec => new.get("spec") != old.get("spec"),
        Generation::Content => content_differs(new, old),
    };
    if moved {
        bump_generation(new, old);
    }
    if object::is_deleting(new) && is_removable(kind, new) {
        UpdateOutcome::Remove
    } else {
        UpdateOutcome::Changed
    }
}

fn content_differs(new: &Value, old: &Value) -> bool {
    let (Some(new), Some(old)) = (new.as_object(), old.as_object()) else { return true };
    let content = |key: &String| key != "metadata" && key != "status";
    new.iter().filter(|(k, _)| content(k)).any(|(k, v)| old.get(k) != Some(v))
        || old.keys().filter(|k| content(k)).any(|k| !new.contains_key(k))
}

fn bump_generation(new: &mut Value, old: &Value) {
    let next = int_at(old, &["metadata", "generation"]).unwrap_or(0).saturating_add(1);
    object::map_mut(new, "metadata").insert("generation".to_owned(), next.into());
}

fn is_removable(kind: &Kind, object: &Value) -> bool {
    object::items_at(object, &["metadata", "finalizers"]).is_empty()
        && int_at(object, &["metadata", "deletionGracePeriodSeconds"]).unwrap_or(0) == 0
        && (kind != &kinds::NAMESPACES || object::items_at(object, &["spec", "finalizers"]).is_empty())
}

/// What happens to the objects that an object owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// They are deleted after their owner.
    Background,
    /// The owner stays until those that block it are gone.
    Foreground,
    /// They stay, without the owner reference.
    Orphan,
}

impl Propagation {
    /// Reads `propagationPolicy`; unknown values are 422s.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        match text {
            "Background" => Ok(Self::Background),
            "Foreground" => Ok(Self::Foreground),
            "Orphan" => Ok(Self::Orphan),
            other => Err(delete_options_invalid(
                "propagationPolicy",
                format!(
                    "Unsupported value: {other:?}: supported values: \"Background\", \"Foreground\", \"Orphan\""
                ),
            )),
        }
    }
}

fn delete_options_invalid(field: &str, message: String) -> ApiError {
    let cause = Cause { reason: CauseReason::NotSupported, message, field: field.to_owned() };
    ApiError::invalid_as("", "DeleteOptions", "", vec![cause])
}

/// `metav1.DeleteOptions`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeleteOptions {
    /// Seconds a pod may take to stop; `None` leaves it to the pod.
    pub grace_period_seconds: Option<i64>,
    /// Only delete the object with this uid.
    pub uid: Option<String>,
    /// Only delete the object at this resourceVersion.
    pub resource_version: Option<String>,
    /// What happens to dependents; `None` is background, unless a finalizer says otherwise.
    pub propagation: Option<Propagation>,
    /// Decide and answer, but change nothing.
    pub dry_run: bool,
}

impl DeleteOptions {
    /// Reads the body of a DELETE; `Value::Null` stands for an empty body.
    pub fn from_json(body: &Value) -> Result<Self, ApiError> {
        match body {
            Value::Null => return Ok(Self::default()),
            Value::Object(_) => {}
            _ => return Err(ApiError::bad_request("the body of a delete must be a DeleteOptions object")),
        }
        let kind = str_at(body, &["kind"]);
        if !matches!(kind, "" | "DeleteOptions") {
            return Err(ApiError::bad_request(format!(
                "the body of a delete must be DeleteOptions, got {kind}"
            )));
        }
        let grace_period_seconds = match body.get("gracePeriodSeconds") {
            None | Some(Value::Null) => None,
            Some(value) => Some(
                value
                    .as_i64()
                    .ok_or_else(|| ApiError::bad_request("gracePeriodSeconds must be an integer"))?,
            ),
        };
        let propagation = match (str_at(body, &["propagationPolicy"]), body.get("orphanDependents")) {
            ("", Some(Value::Bool(orphan))) => {
                Some(if *orphan { Propagation::Orphan } else { Propagation::Background })
            }
            ("", _) => None,
            (text, _) => Some(Propagation::parse(text)?),
        };
        let dry_run = object::items_at(body, &["dryRun"]);
        if dry_run.iter().any(|v| v != "All") {
            return Err(delete_options_invalid(
                "dryRun",
                "Unsupported value: supported values: \"All\"".to_owned(),
            ));
        }
        let text = |key: &str| {
            let value = str_at(body, &["preconditions", key]);
            (!value.is_empty()).then(|| value.to_owned())
        };
        Ok(Self {
            grace_period_seconds,
            uid: text("uid"),
            resource_version: text("resourceVersion"),
            propagation,
            dry_run: !dry_run.is_empty(),
        })
    }
}

/// What a delete does to the stored object.
#[derive(Debug, Clone, PartialEq)]
pub enum DeleteOutcome {
    /// Remove it now.
    Remove,
    /// Store this object: it is marked as deleting and somebody else ends it.
    Mark(Box<Value>),
    /// It is deleting already and the request changes nothing: answer with the stored object.
    Unchanged,
}

/// Decides a delete. Errors: 409 when a precondition does not hold.
pub fn plan_delete(
    kind: &Kind,
    stored: &Value,
    options: &DeleteOptions,
    now: Timestamp,
) -> Result<DeleteOutcome, ApiError> {
    let name = object::name(stored);
    if let Some(uid) = &options.uid
        && uid != object::uid(stored)
    {
        return Err(precondition(kind, name, "UID", uid, object::uid(stored)));
    }
    if let Some(version) = &options.resource_version
        && version != object::resource_version(stored)
    {
        return Err(precondition(kind, name, "ResourceVersion", version, object::resource_version(stored)));
    }
    let finalizers = wanted_finalizers(stored, options.propagation);
    let kept = finalizers.as_deref().unwrap_or(object::items_at(stored, &["metadata", "finalizers"]));
    let pending = !kept.is_empty()
        || (kind == &kinds::NAMESPACES && !object::items_at(stored, &["spec", "finalizers"]).is_empty());
    let grace = grace_seconds(kind, stored, options);
    if grace == 0 && !pending {
        return Ok(DeleteOutcome::Remove);
    }
    let deleting = object::is_deleting(stored);
    let current = int_at(stored, &["metadata", "deletionGracePeriodSeconds"]).unwrap_or(0);
    if deleting && finalizers.is_none() && grace >= current {
        return Ok(DeleteOutcome::Unchanged);
    }
    let mut marked = stored.clone();
    let meta = object::map_mut(&mut marked, "metadata");
    if let Some(list) = finalizers {
        if list.is_empty() {
            meta.remove("finalizers");
        } else {
            meta.insert("finalizers".to_owned(), Value::Array(list));
        }
    }
    if !deleting || grace < current {
        let start = if deleting {
            let end = object::time_at(stored, &["metadata", "deletionTimestamp"]).unwrap_or(now);
            end.saturating_sub(SignedDuration::from_secs(current)).unwrap_or(now)
        } else {
            now
        };
        let end = start.saturating_add(SignedDuration::from_secs(grace)).unwrap_or(start);
        meta.insert("deletionTimestamp".to_owned(), Value::String(format_time(end)));
        meta.insert("deletionGracePeriodSeconds".to_owned(), grace.into());
        if kind.generation != Generation::None {
            bump_generation(&mut marked, stored);
        }
        if kind == &kinds::NAMESPACES {
            object::map_mut(&mut marked, "status").insert("phase".to_owned(), json!("Terminating"));
        }
    }
    Ok(DeleteOutcome::Mark(Box::new(marked)))
}

/// Seconds that the object may still take; only pods take any.
fn grace_seconds(kind: &Kind, stored: &Value, options: &DeleteOptions) -> i64 {
    if kind != &kinds::PODS {
        return 0;
    }
    let ended = matches!(str_at(stored, &["status", "phase"]), "Succeeded" | "Failed");
    if ended || str_at(stored, &["spec", "nodeName"]).is_empty() {
        return 0;
    }
    let positive = |seconds: i64| if seconds < 0 { 1 } else { seconds };
    let asked = options.grace_period_seconds.map(positive);
    if object::is_deleting(stored) {
        let current = int_at(stored, &["metadata", "deletionGracePeriodSeconds"]).unwrap_or(0);
        return asked.map_or(current, |a| a.min(current));
    }
    asked.unwrap_or_else(|| {
        positive(
            int_at(stored, &["spec", "terminationGracePeriodSeconds"]).unwrap_or(POD_GRACE_DEFAULT_SECONDS),
        )
    })
}

/// The finalizers after the propagation policy was applied; `None` when they stay as they are.
fn wanted_finalizers(stored: &Value, propagation: Option<Propagation>) -> Option<Vec<Value>> {
    let wanted = match propagation? {
        Propagation::Background => None,
        Propagation::Foreground => Some(FOREGROUND_FINALIZER),
        Propagation::Orphan => Some(ORPHAN_FINALIZER),
    };
    let current = object::items_at(stored, &["metadata", "finalizers"]);
    let ours = |f: &Value| f == FOREGROUND_FINALIZER || f == ORPHAN_FINALIZER;
    let mut list: Vec<Value> =
        current.iter().filter(|f| !ours(f) || wanted.is_some_and(|w| *f == w)).cloned().collect();
    if let Some(wanted) = wanted
        && !list.iter().any(|f| f == wanted)
    {
        list.push(json!(wanted));
    }
    (list != current).then_some(list)
}

#[cfg(test)]
mod tests;
