//! Pods and the spec that they share with templates.

use std::net::IpAddr;

use serde_json::{Map, Value};

use super::container::{self, Surroundings};
use super::faults::Faults;
use super::{changed, meta, scheduling, volume};
use crate::resource::default::default_object;
use crate::resource::kinds;
use crate::resource::names;
use crate::resource::object::{self, bool_at, int_at, items_at, str_at};
use crate::resource::path::Path;

const PHASES: [&str; 5] = ["Pending", "Running", "Succeeded", "Failed", "Unknown"];

pub(super) fn pod(new: &Value, old: Option<&Value>, faults: &mut Faults) {
    let path = Path::Root.key("spec");
    match old {
        None => spec(new.get("spec"), &path, faults),
        Some(old) => {
            if changed("spec", new, Some(old)) {
                spec(new.get("spec"), &path, faults);
                spec_change(new, old, &path, faults);
            }
        }
    }
    let status = Path::Root.key("status");
    faults.one_of(&status.key("phase"), str_at(new, &["status", "phase"]), &PHASES);
}

/// The pod spec of a pod or a template.
pub(super) fn spec(spec: Option<&Value>, path: &Path<'_>, faults: &mut Faults) {
    let Some(spec) = spec else { return faults.required(path, "") };
    faults.one_of(
        &path.key("restartPolicy"),
        str_at(spec, &["restartPolicy"]),
        &["Always", "OnFailure", "Never"],
    );
    let grace = int_at(spec, &["terminationGracePeriodSeconds"]);
    faults.range(&path.key("terminationGracePeriodSeconds"), grace, 0, i64::MAX);
    let deadline = int_at(spec, &["activeDeadlineSeconds"]);
    faults.range(&path.key("activeDeadlineSeconds"), deadline, 1, i64::from(i32::MAX));
    faults.one_of(
        &path.key("preemptionPolicy"),
        str_at(spec, &["preemptionPolicy"]),
        &["PreemptLowerPriority", "Never"],
    );
    containers(spec, path, faults);
    identity(spec, path, faults);
    dns(spec, path, faults);
    scheduling::scheduling(spec, path, faults);
    refused(spec, path, faults);
    super::each(spec, "readinessGates", path, faults, |gate, path, faults| {
        let kind = str_at(gate, &["conditionType"]);
        faults.check(&path.key("conditionType"), kind, names::qualified_name(kind));
    });
    if let Some(context) = spec.get("securityContext") {
        container::identity(context, &path.key("securityContext"), faults);
    }
}

fn containers(spec: &Value, path: &Path<'_>, faults: &mut Faults) {
    let mut around = Surroundings {
        volumes: volume::volumes(spec, path, faults),
        host_network: bool_at(spec, &["hostNetwork"]),
        names: Vec::new(),
        host_ports: Vec::new(),
    };
    if items_at(spec, &["containers"]).is_empty() {
        faults.required(&path.key("containers"), "");
    }
    for (list, init) in [("initContainers", true), ("containers", false)] {
        let path = path.key(list);
        for (i, c) in items_at(spec, &[list]).iter().enumerate() {
            container::container(c, init, &mut around, &path.at(i), faults);
        }
    }
}

fn identity(spec: &Value, path: &Path<'_>, faults: &mut Faults) {
    type Rule = fn(&str) -> Result<(), String>;
    let rules: [(&str, Rule); 4] = [
        ("hostname", names::dns1123_label),
        ("subdomain", names::dns1123_label),
        ("serviceAccountName", names::dns1123_subdomain),
        ("schedulerName", names::dns1123_subdomain),
    ];
    for (key, rule) in rules {
        let value = str_at(spec, &[key]);
        if !value.is_empty() {
            faults.check(&path.key(key), value, rule(value));
        }
    }
    if bool_at(spec, &["hostPID"]) && bool_at(spec, &["shareProcessNamespace"]) {
        faults.invalid(&path.key("shareProcessNamespace"), true, "cannot be true when hostPID is true");
    }
    super::each(spec, "imagePullSecrets", path, faults, |secret, path, faults| {
        if str_at(secret, &["name"]).is_empty() {
            faults.required(&path.key("name"), "");
        }
    });
}

/// Most name servers that a resolver uses.
const NAME_SERVERS_MAX: usize = 3;

fn dns(spec: &Value, path: &Path<'_>, faults: &mut Faults) {
    let policy = str_at(spec, &["dnsPolicy"]);
    faults.one_of(
        &path.key("dnsPolicy"),
        policy,
        &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
    );
    let config = path.key("dnsConfig");
    let list = config.key("nameservers");
    let servers = items_at(spec, &["dnsConfig", "nameservers"]);
    if policy == "None" && servers.is_empty() {
        faults.required(&list, "must provide at least one DNS nameserver when `dnsPolicy` is None");
    }
    if servers.len() > NAME_SERVERS_MAX {
        faults.too_many(&list, servers.len(), NAME_SERVERS_MAX);
    }
    for (i, server) in servers.iter().enumerate() {
        ip(server.as_str().unwrap_or(""), &list.at(i), faults);
    }
    let searches = config.key("searches");
    for (i, domain) in items_at(spec, &["dnsConfig", "searches"]).iter().enumerate() {
        let domain = domain.as_str().unwrap_or("");
        let plain = domain.strip_suffix('.').unwrap_or(domain);
        if !plain.is_empty() {
            faults.check(&searches.at(i), domain, names::dns1123_subdomain(&plain.replace('_', "-")));
        }
    }
    super::each(spec, "hostAliases", path, faults, |alias, path, faults| {
        ip(str_at(alias, &["ip"]), &path.key("ip"), faults);
        let list = path.key("hostnames");
        for (i, name) in items_at(alias, &["hostnames"]).iter().enumerate() {
            let name = name.as_str().unwrap_or("");
            faults.check(&list.at(i), name, names::dns1123_subdomain(name));
        }
    });
}

/// An IP address.
pub(super) fn ip(text: &str, path: &Path<'_>, faults: &mut Faults) {
    if text.parse::<IpAddr>().is_err() {
        faults.invalid_text(path, text, "must be a valid IP address (such as 10.9.8.7 or 2001:db8::ffff)");
    }
}

/// Features whose silent absence would make the pod less safe or different from what it says.
fn refused(spec: &Value, path: &Path<'_>, faults: &mut Faults) {
    if !items_at(spec, &["ephemeralContainers"]).is_empty() {
        faults.forbidden(&path.key("ephemeralContainers"), "ephemeral containers are not supported");
    }
    for (key, what) in [
        ("runtimeClassName", "runtime classes are not supported; leave it out"),
        ("priorityClassName", "priority classes are not supported; leave it out"),
    ] {
        if !str_at(spec, &[key]).is_empty() {
            faults.forbidden(&path.key(key), what);
        }
    }
    if spec.get("hostUsers").is_some_and(|v| v == false) {
        faults.forbidden(&path.key("hostUsers"), "user namespaces are not supported; leave it out");
    }
    let os = str_at(spec, &["os", "name"]);
    faults.one_of(&path.key("os").key("name"), os, &["linux"]);
}

const WHAT_MAY_CHANGE: &str = "pod updates may not change fields other than `spec.containers[*].image`, `spec.initContainers[*].image`, `spec.activeDeadlineSeconds`, `spec.tolerations` (only additions to existing tolerations)";

/// Refuses changes of what a running pod cannot take up.
fn spec_change(new: &Value, old: &Value, path: &Path<'_>, faults: &mut Faults) {
    let Some(new_spec) = new.get("spec").and_then(Value::as_object) else { return };
    let mut found = first_difference(new_spec, old.get("spec"));
    if found.is_some() {
        // A stored pod may lack a default that came later.
        let mut full = old.clone();
        default_object(&kinds::PODS, &mut full);
        found = first_difference(new_spec, full.get("spec"));
    }
    if let Some(field) = found {
        faults.forbidden(path, format_args!("{WHAT_MAY_CHANGE}; `{field}` differs"));
    }
    let deadline = |pod: &Value| int_at(pod, &["spec", "activeDeadlineSeconds"]);
    if let Some(before) = deadline(old)
        && deadline(new).is_none_or(|now| now > before)
    {
        let path = path.key("activeDeadlineSeconds");
        faults.forbidden(&path, format_args!("may only be lowered, from {before}"));
    }
    let tolerations = items_at(new, &["spec", "tolerations"]);
    if let Some(lost) =
        items_at(old, &["spec", "tolerations"]).iter().find(|t| !has_toleration(tolerations, t))
    {
        let path = path.key("tolerations");
        faults.forbidden(
            &path,
            format_args!("existing tolerations can not be modified except their tolerationSeconds: {lost}"),
        );
    }
}

fn has_toleration(list: &[Value], wanted: &Value) -> bool {
    list.iter().any(|t| ["key", "operator", "value", "effect"].iter().all(|k| t.get(k) == wanted.get(k)))
}

fn first_difference(new: &Map<String, Value>, old: Option<&Value>) -> Option<String> {
    let empty = Map::new();
    let old = old.and_then(Value::as_object).unwrap_or(&empty);
    let keys = new.keys().chain(old.keys().filter(|k| !new.contains_key(*k)));
    for key in keys {
        match key.as_str() {
            // The binding sets the node, and only it can: the main endpoint keeps the stored one.
            "activeDeadlineSeconds" | "tolerations" | "nodeName" => {}
            "containers" | "initContainers" => {
                if let Some(field) = container_difference(key, new.get(key), old.get(key)) {
                    return Some(field);
                }
            }
            _ if new.get(key) != old.get(key) => return Some(format!("spec.{key}")),
            _ => {}
        }
    }
    None
}

fn container_difference(list: &str, new: Option<&Value>, old: Option<&Value>) -> Option<String> {
    let items = |v: Option<&Value>| v.and_then(Value::as_array).cloned().unwrap_or_default();
    if new == old {
        return None;
    }
    let (new, old) = (items(new), items(old));
    if new.len() != old.len() {
        return Some(format!("spec.{list}"));
    }
    for (i, (mut new, mut old)) in new.into_iter().zip(old).enumerate() {
        for c in [&mut new, &mut old] {
            if let Some(map) = c.as_object_mut() {
                map.remove("image");
            }
        }
        if new != old {
            return Some(format!("spec.{list}[{i}]"));
        }
    }
    None
}

/// A pod template: labels, annotations and spec. Its pods are replaced, so they must restart for ever.
pub(super) fn template(template: Option<&Value>, path: &Path<'_>, faults: &mut Faults) {
    let Some(template) = template else { return faults.required(path, "") };
    if let Some(metadata) = template.get("metadata") {
        meta::labels_and_annotations(metadata, &path.key("metadata"), faults);
    }
    let inner = path.key("spec");
    spec(template.get("spec"), &inner, faults);
    let policy = str_at(template, &["spec", "restartPolicy"]);
    if !matches!(policy, "" | "Always") {
        faults.unsupported(&inner.key("restartPolicy"), policy, &["Always"]);
    }
    if object::at(template, &["spec", "activeDeadlineSeconds"]).is_some() {
        faults
            .forbidden(&inner.key("activeDeadlineSeconds"), "must not be specified in a workload's template");
    }
}
