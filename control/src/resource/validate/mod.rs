//! Validation: what is let in can be run; what is refused is told by field and fix. Objects have the API's types
//! ([`conform`](super::conform)) and their defaults before they come here.

mod container;
mod faults;
mod meta;
mod network_policy;
mod pod;
mod probe;
mod scheduling;
mod service;
mod small;
mod volume;
mod workload;

use serde_json::Value;

use super::error::ApiError;
use super::kinds::Kind;
use super::object;
use super::path::Path;
use faults::Faults;

/// Checks a defaulted object before its creation. The error is a 422 that names every faulty field.
pub fn validate_create(kind: &Kind, object: &Value) -> Result<(), ApiError> {
    let mut faults = Faults::default();
    meta::object(kind, object, &mut faults);
    content(kind, object, None, &mut faults);
    faults.into_result(kind, object::name(object))
}

/// Checks a defaulted object that is to replace `old`. Parts that stay as they are stay accepted, so that a rule that
/// came later does not lock an object.
pub fn validate_update(kind: &Kind, new: &Value, old: &Value) -> Result<(), ApiError> {
    let mut faults = Faults::default();
    if new.get("metadata") != old.get("metadata") {
        meta::object(kind, new, &mut faults);
        meta::change(new, old, &mut faults);
    }
    content(kind, new, Some(old), &mut faults);
    faults.into_result(kind, object::name(new))
}

fn content(kind: &Kind, new: &Value, old: Option<&Value>, faults: &mut Faults) {
    let check: fn(&Value, Option<&Value>, &mut Faults) = match (kind.group, kind.plural) {
        ("", "pods") => pod::pod,
        ("", "services") => service::service,
        ("", "configmaps") => small::config_map,
        ("", "secrets") => small::secret,
        ("", "namespaces") => small::namespace,
        ("", "nodes") => small::node,
        ("", "events") => small::event,
        ("apps", "deployments") => workload::deployment,
        ("apps", "replicasets") => workload::replica_set,
        ("discovery.k8s.io", "endpointslices") => small::endpoint_slice,
        ("coordination.k8s.io", "leases") => small::lease,
        ("networking.k8s.io", "networkpolicies") => network_policy::network_policy,
        _ => return,
    };
    check(new, old, faults);
}

/// Whether a top-level part is new or changed, and so to be checked.
fn changed(part: &str, new: &Value, old: Option<&Value>) -> bool {
    old.is_none_or(|old| old.get(part) != new.get(part))
}

/// Members and their paths of a list member.
fn each<'v>(
    value: &'v Value,
    key: &'static str,
    path: &Path<'_>,
    faults: &mut Faults,
    mut check: impl FnMut(&'v Value, &Path<'_>, &mut Faults),
) {
    let list = path.key(key);
    for (i, item) in object::items_at(value, &[key]).iter().enumerate() {
        check(item, &list.at(i), faults);
    }
}

#[cfg(test)]
mod tests;
