//! Server-side printing: the columns and rows that `kubectl get` shows. A row has one cell a column, whatever the
//! object looks like.

mod age;
mod core;
mod event;
mod pod;
mod workload;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::kinds::Kind;
use super::object;

pub use age::short_duration;

/// What a row carries beside its cells (`?includeObject=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IncludeObject {
    /// Nothing.
    None,
    /// The object's metadata.
    #[default]
    Metadata,
    /// The whole object.
    Object,
}

impl IncludeObject {
    /// Reads the query parameter; absent or unknown is [`IncludeObject::Metadata`].
    pub fn parse(text: &str) -> Self {
        match text {
            "None" => Self::None,
            "Object" => Self::Object,
            _ => Self::Metadata,
        }
    }
}

/// One column: name, type, whether only `-o wide` shows it, and what it holds.
struct Column {
    name: &'static str,
    kind: &'static str,
    wide: bool,
    description: &'static str,
}

const fn text(name: &'static str, description: &'static str) -> Column {
    Column { name, kind: "string", wide: false, description }
}

const fn number(name: &'static str, description: &'static str) -> Column {
    Column { name, kind: "integer", wide: false, description }
}

const fn wide(name: &'static str, description: &'static str) -> Column {
    Column { name, kind: "string", wide: true, description }
}

const NAME: Column = text("Name", "Name of the object, unique among its kind in the namespace.");
const AGE: Column = text("Age", "Time since the object was created.");

/// Columns and the function that fills them.
struct Printer {
    columns: &'static [Column],
    cells: fn(&Value, Timestamp) -> Vec<Value>,
}

static PLAIN: Printer = Printer { columns: &[NAME, AGE], cells: |o, now| vec![name(o), age::age(o, now)] };

fn printer(kind: &Kind) -> &'static Printer {
    match (kind.group, kind.plural) {
        ("", "pods") => &pod::POD,
        ("", "nodes") => &core::NODE,
        ("", "namespaces") => &core::NAMESPACE,
        ("", "services") => &core::SERVICE,
        ("", "configmaps") => &core::CONFIG_MAP,
        ("", "secrets") => &core::SECRET,
        ("", "serviceaccounts") => &core::SERVICE_ACCOUNT,
        ("", "events") => &event::EVENT,
        ("apps", "deployments") => &workload::DEPLOYMENT,
        ("apps", "replicasets") => &workload::REPLICA_SET,
        ("discovery.k8s.io", "endpointslices") => &core::ENDPOINT_SLICE,
        ("coordination.k8s.io", "leases") => &core::LEASE,
        ("networking.k8s.io", "networkpolicies") => &core::NETWORK_POLICY,
        _ => &PLAIN,
    }
}

fn name(object: &Value) -> Value {
    Value::String(object::name(object).to_owned())
}

fn string_or(text: &str, absent: &str) -> Value {
    Value::String(if text.is_empty() { absent } else { text }.to_owned())
}

/// The value of `columnDefinitions`.
pub fn columns(kind: &Kind) -> Value {
    let definitions = printer(kind).columns.iter().enumerate().map(|(i, c)| {
        json!({
            "name": c.name,
            "type": c.kind,
            "format": if i == 0 && c.name == "Name" { "name" } else { "" },
            "description": c.description,
            "priority": i32::from(c.wide),
        })
    });
    definitions.collect()
}

/// One row: `{"cells": …, "object": …}`.
pub fn row(kind: &Kind, object: &Value, now: Timestamp, include: IncludeObject) -> Value {
    let cells = (printer(kind).cells)(object, now);
    match include {
        IncludeObject::None => json!({"cells": cells}),
        IncludeObject::Metadata => json!({"cells": cells, "object": partial_metadata(object)}),
        IncludeObject::Object => {
            let mut row = json!({"cells": cells});
            row["object"] = object.clone();
            row
        }
    }
}

/// A Table around rows; `with_columns` is false for all but the first event of a watch.
pub fn table(kind: &Kind, rows: Vec<Value>, with_columns: bool, resource_version: &str) -> Value {
    let definitions = if with_columns { columns(kind) } else { Value::Null };
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": resource_version},
        "columnDefinitions": definitions,
        "rows": rows,
    })
}

/// The object's metadata as `meta.k8s.io/v1` PartialObjectMetadata.
pub fn partial_metadata(object: &Value) -> Value {
    let metadata = object.get("metadata").cloned().unwrap_or_else(|| json!({}));
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
}

#[cfg(test)]
mod tests;
