//! The event columns.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Column, Printer, age, name, text, wide};
use crate::resource::object::{self, int_at, str_at};

pub(super) static EVENT: Printer = Printer {
    columns: &[
        text("Last Seen", "When the event happened last."),
        text("Type", "Normal or Warning."),
        text("Reason", "Short machine-readable reason."),
        text("Object", "Object that the event is about."),
        wide("Subobject", "Part of the object."),
        wide("Source", "Component that reported it."),
        text("Message", "What happened."),
        wide("First Seen", "When it happened first."),
        Column { name: "Count", kind: "integer", wide: true, description: "How often it happened." },
        wide("Name", "Name of the event."),
    ],
    cells,
};

fn cells(event: &Value, now: Timestamp) -> Vec<Value> {
    let set = |path: &[&'static str]| object::time_at(event, path).is_some();
    let ago = |path: &[&'static str]| age::since(event, path, now);
    let first = if set(&["firstTimestamp"]) { ago(&["firstTimestamp"]) } else { ago(&["eventTime"]) };
    let series = int_at(event, &["series", "count"]);
    let count = series.or(int_at(event, &["count"])).unwrap_or(1).max(1);
    let last = if set(&["series", "lastObservedTime"]) {
        ago(&["series", "lastObservedTime"])
    } else if set(&["lastTimestamp"]) {
        ago(&["lastTimestamp"])
    } else {
        first.clone()
    };
    let seen = if count > 1 { format!("{last} (x{count} over {first})") } else { last };
    let object = ["involvedObject", "kind"];
    let target = match (str_at(event, &object), str_at(event, &["involvedObject", "name"])) {
        (kind, "") => kind.to_lowercase(),
        (kind, name) => format!("{}/{name}", kind.to_lowercase()),
    };
    let reporter = match str_at(event, &["source", "component"]) {
        "" => str_at(event, &["reportingComponent"]),
        component => component,
    };
    let source = match (reporter, str_at(event, &["source", "host"])) {
        (component, "") => component.to_owned(),
        (component, host) => format!("{component}, {host}"),
    };
    vec![
        json!(seen),
        json!(str_at(event, &["type"])),
        json!(str_at(event, &["reason"])),
        json!(target),
        json!(str_at(event, &["involvedObject", "fieldPath"])),
        json!(source),
        json!(str_at(event, &["message"]).trim()),
        json!(first),
        json!(count),
        name(event),
    ]
}
