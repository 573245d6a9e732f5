//! Events, as users read them with `kubectl describe`. Invariant: the same message about the same object is one
//! Event with a count, because its name is made from what it says.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::controller::action::Target;
use crate::registry::{Registry, WriteOpts};
use crate::resource::kinds::EVENTS;
use crate::resource::object::format_time;
use crate::resource::{ApiError, Subresource};

/// Longest part of the object's name that goes into the name of its Event, in bytes.
const NAME_PART_MAX: usize = 200;

/// What is to be told.
pub(crate) struct Notice<'a> {
    /// Who tells it.
    pub(crate) component: &'static str,
    pub(crate) about: &'a Target,
    pub(crate) warning: bool,
    pub(crate) reason: &'static str,
    pub(crate) message: &'a str,
}

/// Writes the Event, or counts it up if it was told before.
pub(crate) async fn record(registry: &Registry, notice: &Notice<'_>, now: Timestamp) -> Result<(), ApiError> {
    let namespace = namespace(notice.about);
    let name = name(notice);
    let body = body(notice, namespace, &name, now);
    match registry.create(&EVENTS, namespace, body, WriteOpts::default()).await {
        Err(error) if error.is_already_exists() => {
            let count_up = |event: &mut Value| {
                event["count"] = json!(event["count"].as_i64().unwrap_or(1).saturating_add(1));
                event["lastTimestamp"] = json!(format_time(now));
                Ok(())
            };
            registry.mutate(&EVENTS, namespace, &name, Subresource::Main, count_up).await.map(drop)
        }
        // A namespace that is going takes its news with it.
        Err(error) if error.is_not_found() || error.code == 403 => Ok(()),
        other => other.map(drop),
    }
}

/// Events about objects without a namespace are kept in `default`.
fn namespace(about: &Target) -> &str {
    if about.namespace.is_empty() { "default" } else { &about.namespace }
}

fn name(notice: &Notice<'_>) -> String {
    let text = [&notice.about.uid, notice.component, notice.reason, notice.message].join("\n");
    // FNV-1a, 64 bits.
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut part = notice.about.name.as_str();
    if part.len() > NAME_PART_MAX {
        // Object names are ASCII; a name that is not has no boundary to respect here.
        part = part.get(..NAME_PART_MAX).unwrap_or("object").trim_end_matches(['.', '-']);
    }
    format!("{part}.{hash:016x}")
}

fn body(notice: &Notice<'_>, namespace: &str, name: &str, now: Timestamp) -> Value {
    let about = notice.about;
    let time = format_time(now);
    let mut involved = json!({
        "apiVersion": about.kind.api_version(),
        "kind": about.kind.kind,
        "name": about.name,
        "uid": about.uid,
    });
    if !about.namespace.is_empty() {
        involved["namespace"] = json!(about.namespace);
    }
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": involved,
        "type": if notice.warning { "Warning" } else { "Normal" },
        "reason": notice.reason,
        "message": notice.message,
        "source": {"component": notice.component},
        "reportingComponent": notice.component,
        "reportingInstance": "",
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    })
}
