//! Defaulting: after it, controllers and agents find every field that they rely on. It never changes a value that
//! is set, but for writing quantities in canonical form, and running it twice is running it once.

mod pod;
mod service;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::kinds::Kind;
use super::object::{self, map_mut};
use super::quantity::Quantity;

pub use pod::qos_class;

/// Fills in the defaults of an object of `kind`. Wrong types are left for validation.
pub fn default_object(kind: &Kind, object: &mut Value) {
    match (kind.group, kind.plural) {
        ("", "pods") => pod::pod(object),
        ("", "services") => service::service(object),
        ("", "secrets") => secret(object),
        ("", "namespaces") => namespace(object),
        ("", "nodes") => node(object),
        ("apps", "deployments") => deployment(object),
        ("apps", "replicasets") => replica_set(object),
        ("discovery.k8s.io", "endpointslices") => endpoint_slice(object),
        ("networking.k8s.io", "networkpolicies") => network_policy(object),
        _ => {}
    }
}

fn set(map: &mut Map<String, Value>, key: &str, value: impl Into<Value>) {
    if !map.contains_key(key) {
        map.insert(key.to_owned(), value.into());
    }
}

fn child<'a>(map: &'a mut Map<String, Value>, key: &str) -> Option<&'a mut Map<String, Value>> {
    map.get_mut(key).and_then(Value::as_object_mut)
}

fn items<'a>(map: &'a mut Map<String, Value>, key: &str) -> impl Iterator<Item = &'a mut Map<String, Value>> {
    map.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten().filter_map(Value::as_object_mut)
}

/// Rewrites every quantity of a resource list in canonical form; what is no quantity stays for validation.
fn canonical_quantities(list: Option<&mut Map<String, Value>>) {
    for value in list.into_iter().flat_map(Map::values_mut) {
        canonical_quantity(value);
    }
}

fn canonical_quantity(value: &mut Value) {
    if let Ok(quantity) = Quantity::from_json(value) {
        let text = quantity.to_string();
        if value.as_str() != Some(&text) {
            *value = Value::String(text);
        }
    }
}

fn secret(object: &mut Value) {
    let Some(root) = object.as_object_mut() else { return };
    set(root, "type", "Opaque");
    // `stringData` is a way to write, it is never stored.
    if let Some(Value::Object(plain)) = root.get("stringData")
        && plain.values().all(Value::is_string)
        && let Some(Value::Object(plain)) = root.remove("stringData")
    {
        let data = map_mut(object, "data");
        for (key, value) in plain {
            let encoded = STANDARD.encode(value.as_str().unwrap_or(""));
            data.insert(key, Value::String(encoded));
        }
    }
}

fn namespace(object: &mut Value) {
    let name = object::name(object).to_owned();
    let Some(meta) = object.get_mut("metadata") else { return };
    map_mut(meta, "labels").insert("kubernetes.io/metadata.name".to_owned(), Value::String(name));
}

fn node(object: &mut Value) {
    let Some(status) = object.get_mut("status").and_then(Value::as_object_mut) else { return };
    canonical_quantities(child(status, "capacity"));
    canonical_quantities(child(status, "allocatable"));
    if let Some(capacity) = status.get("capacity").cloned() {
        set(status, "allocatable", capacity);
    }
}

fn deployment(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
    set(spec, "replicas", 1);
    set(spec, "revisionHistoryLimit", 10);
    set(spec, "progressDeadlineSeconds", 600);
    set(spec, "strategy", json!({}));
    if let Some(strategy) = child(spec, "strategy") {
        set(strategy, "type", "RollingUpdate");
        if strategy.get("type").is_some_and(|t| t == "RollingUpdate") {
            set(strategy, "rollingUpdate", json!({}));
            if let Some(rolling) = child(strategy, "rollingUpdate") {
                set(rolling, "maxUnavailable", "25%");
                set(rolling, "maxSurge", "25%");
            }
        }
    }
    pod::template(spec);
}

fn replica_set(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
    set(spec, "replicas", 1);
    pod::template(spec);
}

fn endpoint_slice(object: &mut Value) {
    let Some(root) = object.as_object_mut() else { return };
    for port in items(root, "ports") {
        set(port, "name", "");
        set(port, "protocol", "TCP");
    }
}

/// A policy isolates what it selects in each direction that it has rules for, and always in the direction of ingress.
fn network_policy(object: &mut Value) {
    let Some(root) = object.as_object_mut() else { return };
    set(root, "spec", json!({}));
    let Some(spec) = child(root, "spec") else { return };
    set(spec, "podSelector", json!({}));
    let egress = spec.get("egress").and_then(Value::as_array).is_some_and(|rules| !rules.is_empty());
    if spec.get("policyTypes").and_then(Value::as_array).is_none_or(Vec::is_empty) {
        let types = if egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
        spec.insert("policyTypes".to_owned(), types);
    }
    for direction in ["ingress", "egress"] {
        for rule in items(spec, direction) {
            for port in items(rule, "ports") {
                set(port, "protocol", "TCP");
            }
        }
    }
}

#[cfg(test)]
mod tests;
