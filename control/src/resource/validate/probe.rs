//! Probes and life-cycle handlers of a container.

use serde_json::Value;

use super::faults::Faults;
use crate::resource::names;
use crate::resource::object::{int_at, items_at, str_at};
use crate::resource::path::Path;

/// Highest port.
pub(super) const PORT_MAX: i64 = 65_535;

/// A port number, or the name of a container port.
pub(super) fn int_or_name(value: Option<&Value>, path: &Path<'_>, faults: &mut Faults) {
    match value {
        None => faults.required(path, ""),
        Some(Value::String(name)) => faults.check(path, name, names::port_name(name)),
        Some(number) => faults.range(path, number.as_i64(), 1, PORT_MAX),
    }
}

fn handler(value: &Value, kinds: &[&str], path: &Path<'_>, faults: &mut Faults) {
    let given: Vec<&str> = kinds.iter().copied().filter(|k| value.get(k).is_some()).collect();
    match given.as_slice() {
        [] => faults.required(path, "must specify a handler type"),
        [kind] => one_handler(kind, &value[*kind], &path.key(kind), faults),
        [_, second, ..] => faults.forbidden(&path.key(second), "may not specify more than 1 handler type"),
    }
}

fn one_handler(kind: &str, value: &Value, path: &Path<'_>, faults: &mut Faults) {
    match kind {
        "exec" if items_at(value, &["command"]).is_empty() => faults.required(&path.key("command"), ""),
        "httpGet" => {
            int_or_name(value.get("port"), &path.key("port"), faults);
            if str_at(value, &["path"]).is_empty() {
                faults.required(&path.key("path"), "");
            }
            faults.one_of(&path.key("scheme"), str_at(value, &["scheme"]), &["HTTP", "HTTPS"]);
            super::each(value, "httpHeaders", path, faults, |header, path, faults| {
                let name = str_at(header, &["name"]);
                let token = |c: u8| c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c);
                if name.is_empty() || !name.bytes().all(token) {
                    faults.invalid_text(&path.key("name"), name, "must be the name of an HTTP header");
                }
            });
        }
        "tcpSocket" => int_or_name(value.get("port"), &path.key("port"), faults),
        "grpc" => match int_at(value, &["port"]) {
            None => faults.required(&path.key("port"), ""),
            port => faults.range(&path.key("port"), port, 1, PORT_MAX),
        },
        "sleep" => faults.range(&path.key("seconds"), int_at(value, &["seconds"]), 0, i64::MAX),
        _ => {}
    }
}

/// Checks the three probes and the life-cycle hooks of a main or sidecar container.
pub(super) fn all(container: &Value, path: &Path<'_>, faults: &mut Faults) {
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get(name) {
            one_probe(name, probe, &path.key(name), faults);
        }
    }
    let lifecycle = path.key("lifecycle");
    for hook in ["postStart", "preStop"] {
        if let Some(value) = container.get("lifecycle").and_then(|l| l.get(hook)) {
            handler(value, &["exec", "httpGet", "tcpSocket", "sleep"], &lifecycle.key(hook), faults);
        }
    }
}

fn one_probe(name: &str, probe: &Value, path: &Path<'_>, faults: &mut Faults) {
    handler(probe, &["exec", "httpGet", "tcpSocket", "grpc"], path, faults);
    faults.range(&path.key("initialDelaySeconds"), int_at(probe, &["initialDelaySeconds"]), 0, i64::MAX);
    for key in ["timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        faults.range(&path.key(key), int_at(probe, &[key]), 1, i64::MAX);
    }
    if name != "readinessProbe" && int_at(probe, &["successThreshold"]).is_some_and(|n| n > 1) {
        faults.invalid(&path.key("successThreshold"), &probe["successThreshold"], "must be 1");
    }
    if let Some(grace) = int_at(probe, &["terminationGracePeriodSeconds"]) {
        let path = path.key("terminationGracePeriodSeconds");
        if name == "readinessProbe" {
            faults.invalid(&path, grace, "must not be set for readiness probes");
        } else {
            faults.range(&path, Some(grace), 1, i64::MAX);
        }
    }
}
