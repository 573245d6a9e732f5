//! The kinds with few rules: config maps, secrets, namespaces, nodes, events, endpoint slices and leases.

use std::net::{Ipv4Addr, Ipv6Addr};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

use super::faults::Faults;
use super::probe::PORT_MAX;
use super::{changed, meta};
use crate::resource::names;
use crate::resource::object::{bool_at, int_at, items_at, map_at, str_at};
use crate::resource::path::Path;
use crate::resource::quantity::Quantity;

/// Bytes that the entries of a config map or secret may take together: 1 MiB.
const DATA_BYTES_MAX: usize = 1 << 20;
/// Most endpoints of a slice.
const ENDPOINTS_MAX: usize = 1000;
/// Most addresses of an endpoint.
const ADDRESSES_MAX: usize = 100;
/// Most ports of a slice.
const PORTS_MAX: usize = 100;

fn base64_len(text: &str) -> usize {
    let padding = text.bytes().rev().take_while(|c| *c == b'=').count();
    (text.len() / 4 * 3).saturating_sub(padding)
}

fn entries(object: &Value, key: &'static str, length: fn(&str) -> usize, faults: &mut Faults) -> usize {
    let path = Path::Root.key(key);
    let mut size = 0;
    for (name, value) in map_at(object, &[key]).into_iter().flatten() {
        faults.check(&path, name, names::data_key(name));
        size += length(value.as_str().unwrap_or(""));
    }
    size
}

/// Refuses changes of data that was declared immutable.
fn immutable(new: &Value, old: Option<&Value>, keys: &[&'static str], faults: &mut Faults) {
    let Some(old) = old.filter(|o| bool_at(o, &["immutable"])) else { return };
    if !bool_at(new, &["immutable"]) {
        faults.forbidden(&Path::Root.key("immutable"), "field is immutable when `immutable` is set");
    }
    for key in keys {
        if old.get(key) != new.get(key) {
            faults.forbidden(&Path::Root.key(key), "field is immutable when `immutable` is set");
        }
    }
}

pub(super) fn config_map(new: &Value, old: Option<&Value>, faults: &mut Faults) {
    let mut size = entries(new, "data", str::len, faults);
    size += entries(new, "binaryData", base64_len, faults);
    let binary = map_at(new, &["binaryData"]);
    for name in map_at(new, &["data"]).into_iter().flat_map(Map::keys) {
        if binary.is_some_and(|b| b.contains_key(name)) {
            faults.invalid_text(
                &Path::Root.key("data").key(name),
                name,
                "duplicate of key present in binaryData",
            );
        }
    }
    if size > DATA_BYTES_MAX {
        faults.too_long(&Path::Root, DATA_BYTES_MAX);
    }
    immutable(new, old, &["data", "binaryData"], faults);
}

pub(super) fn secret(new: &Value, old: Option<&Value>, faults: &mut Faults) {
    let data = Path::Root.key("data");
    if entries(new, "data", base64_len, faults) > DATA_BYTES_MAX {
        faults.too_long(&data, DATA_BYTES_MAX);
    }
    let has = |key: &str| map_at(new, &["data"]).is_some_and(|d| d.contains_key(key));
    let kind = str_at(new, &["type"]);
    let wanted: &[&str] = match kind {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        _ => &[],
    };
    for key in wanted.iter().filter(|k| !has(k)) {
        faults.required(&data.key(key), "");
    }
    if kind == "kubernetes.io/basic-auth" && !has("username") && !has("password") {
        faults.required(&data.key("username"), "one of username and password must be set");
    }
    for key in wanted.iter().filter(|k| k.starts_with(".docker") && has(k)) {
        let bytes = STANDARD.decode(str_at(new, &["data", key])).unwrap_or_default();
        if serde_json::from_slice::<Map<String, Value>>(&bytes).is_err() {
            faults.invalid_text(&data.key(key), "<secret contents redacted>", "must be a JSON object");
        }
    }
    if let Some(old) = old
        && str_at(old, &["type"]) != kind
    {
        faults.invalid_text(&Path::Root.key("type"), kind, "field is immutable");
    }
    immutable(new, old, &["data"], faults);
}

pub(super) fn namespace(new: &Value, _old: Option<&Value>, faults: &mut Faults) {
    let spec = Path::Root.key("spec");
    meta::finalizers(items_at(new, &["spec", "finalizers"]), &spec.key("finalizers"), faults);
}

pub(super) fn node(new: &Value, old: Option<&Value>, faults: &mut Faults) {
    let path = Path::Root.key("spec");
    let mut seen = Vec::new();
    if let Some(spec) = new.get("spec") {
        super::each(spec, "taints", &path, faults, |taint, path, faults| {
            let text = |key: &str| str_at(taint, &[key]);
            faults.check(&path.key("key"), text("key"), names::qualified_name(text("key")));
            faults.check(&path.key("value"), text("value"), names::label_value(text("value")));
            let effect = text("effect");
            if effect.is_empty() {
                faults.required(&path.key("effect"), "");
            }
            faults.one_of(&path.key("effect"), effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
            let id = (str_at(taint, &["key"]), str_at(taint, &["effect"]));
            if seen.contains(&id) {
                faults.duplicate(path, format_args!("taint {}:{}", id.0, id.1));
            }
            seen.push(id);
        });
    }
    let ranges = path.key("podCIDRs");
    for (i, range) in items_at(new, &["spec", "podCIDRs"]).iter().enumerate() {
        let text = range.as_str().unwrap_or("");
        if text.parse::<IpNetwork>().is_err() {
            faults.invalid_text(&ranges.at(i), text, "must be a CIDR (such as 10.244.0.0/24)");
        }
    }
    for key in ["podCIDR", "providerID"] {
        let before = old.map_or("", |o| str_at(o, &["spec", key]));
        if !before.is_empty() && before != str_at(new, &["spec", key]) {
            faults.forbidden(&path.key(key), "may not be changed once set");
        }
    }
    let status = Path::Root.key("status");
    for list in ["capacity", "allocatable"] {
        let path = status.key(list);
        for (name, value) in map_at(new, &["status", list]).into_iter().flatten() {
            if Quantity::from_json(value).is_ok_and(Quantity::is_negative) {
                faults.invalid(&path.key(name), value, "must be greater than or equal to 0");
            }
        }
    }
}

pub(super) fn event(new: &Value, _old: Option<&Value>, faults: &mut Faults) {
    let namespace = str_at(new, &["metadata", "namespace"]);
    let about = str_at(new, &["involvedObject", "namespace"]);
    let fits =
        if about.is_empty() { matches!(namespace, "default" | "kube-system") } else { about == namespace };
    if !fits {
        faults.invalid_text(
            &Path::Root.key("involvedObject").key("namespace"),
            about,
            "does not match event.namespace; events of cluster-scoped objects belong in the namespace default",
        );
    }
}

pub(super) fn endpoint_slice(new: &Value, old: Option<&Value>, faults: &mut Faults) {
    let field = Path::Root.key("addressType");
    let family = str_at(new, &["addressType"]);
    if family.is_empty() {
        faults.required(&field, "");
    }
    faults.one_of(&field, family, &["FQDN", "IPv4", "IPv6"]);
    if let Some(old) = old
        && str_at(old, &["addressType"]) != family
    {
        faults.invalid_text(&field, family, "field is immutable");
    }
    let endpoints = items_at(new, &["endpoints"]);
    if endpoints.len() > ENDPOINTS_MAX {
        return faults.too_many(&Path::Root.key("endpoints"), endpoints.len(), ENDPOINTS_MAX);
    }
    if changed("endpoints", new, old) {
        super::each(new, "endpoints", &Path::Root, faults, |e, path, faults| {
            endpoint(e, family, path, faults)
        });
    }
    slice_ports(new, faults);
}

fn endpoint(endpoint: &Value, family: &str, path: &Path<'_>, faults: &mut Faults) {
    let list = path.key("addresses");
    let addresses = items_at(endpoint, &["addresses"]);
    if addresses.is_empty() {
        faults.required(&list, "must contain at least 1 address");
    } else if addresses.len() > ADDRESSES_MAX {
        faults.too_many(&list, addresses.len(), ADDRESSES_MAX);
    }
    for (i, address) in addresses.iter().enumerate() {
        let text = address.as_str().unwrap_or("");
        let path = list.at(i);
        match family {
            "IPv4" if text.parse::<Ipv4Addr>().map_or(true, unusable_v4) => {
                faults.invalid_text(
                    &path,
                    text,
                    "must be an IPv4 address that is not unspecified, loopback, link-local or multicast",
                );
            }
            "IPv6" if text.parse::<Ipv6Addr>().map_or(true, unusable_v6) => {
                faults.invalid_text(
                    &path,
                    text,
                    "must be an IPv6 address that is not unspecified, loopback, link-local or multicast",
                );
            }
            "FQDN" => faults.check(&path, text, names::dns1123_subdomain(text)),
            _ => {}
        }
    }
    let hostname = str_at(endpoint, &["hostname"]);
    if !hostname.is_empty() {
        faults.check(&path.key("hostname"), hostname, names::dns1123_label(hostname));
    }
    let node = str_at(endpoint, &["nodeName"]);
    if !node.is_empty() {
        faults.check(&path.key("nodeName"), node, names::dns1123_subdomain(node));
    }
}

pub(super) fn unusable_v4(ip: Ipv4Addr) -> bool {
    ip.is_unspecified() || ip.is_loopback() || ip.is_link_local() || ip.is_multicast()
}

pub(super) fn unusable_v6(ip: Ipv6Addr) -> bool {
    ip.is_unspecified() || ip.is_loopback() || ip.is_unicast_link_local() || ip.is_multicast()
}

fn slice_ports(slice: &Value, faults: &mut Faults) {
    let ports = items_at(slice, &["ports"]);
    if ports.len() > PORTS_MAX {
        return faults.too_many(&Path::Root.key("ports"), ports.len(), PORTS_MAX);
    }
    let mut seen = Vec::new();
    super::each(slice, "ports", &Path::Root, faults, |port, path, faults| {
        let name = str_at(port, &["name"]);
        if seen.contains(&name) {
            faults.duplicate(&path.key("name"), format_args!("{name:?}"));
        }
        seen.push(name);
        if !name.is_empty() {
            faults.check(&path.key("name"), name, names::dns1123_label(name));
        }
        faults.range(&path.key("port"), int_at(port, &["port"]), 1, PORT_MAX);
        faults.one_of(&path.key("protocol"), str_at(port, &["protocol"]), &["SCTP", "TCP", "UDP"]);
    });
}

pub(super) fn lease(new: &Value, _old: Option<&Value>, faults: &mut Faults) {
    let path = Path::Root.key("spec");
    let duration = int_at(new, &["spec", "leaseDurationSeconds"]);
    faults.range(&path.key("leaseDurationSeconds"), duration, 1, i64::MAX);
    faults.range(&path.key("leaseTransitions"), int_at(new, &["spec", "leaseTransitions"]), 0, i64::MAX);
    if new.get("spec").and_then(|s| s.get("holderIdentity")).is_some_and(|h| h == "") {
        faults.required(&path.key("holderIdentity"), "must not be empty when set");
    }
}
