//! Network policies. What passes can be enforced as it is written: selectors that parse, ranges whose exceptions lie
//! inside, ports that exist.

use ipnetwork::IpNetwork;
use serde_json::Value;

use super::faults::Faults;
use super::probe::PORT_MAX;
use super::{changed, each};
use crate::resource::names;
use crate::resource::object::{items_at, str_at};
use crate::resource::path::Path;
use crate::resource::selector::LabelSelector;

pub(super) fn network_policy(new: &Value, old: Option<&Value>, faults: &mut Faults) {
    if !changed("spec", new, old) {
        return;
    }
    let path = Path::Root.key("spec");
    let Some(spec) = new.get("spec") else { return faults.required(&path, "") };
    selector(spec, "podSelector", &path, faults);
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        each(spec, direction, &path, faults, |rule, path, faults| {
            each(rule, "ports", path, faults, port);
            each(rule, peers, path, faults, peer);
        });
    }
    types(spec, &path, faults);
}

fn types(spec: &Value, path: &Path<'_>, faults: &mut Faults) {
    let list = path.key("policyTypes");
    let given = items_at(spec, &["policyTypes"]);
    if given.len() > 2 {
        return faults.too_many(&list, given.len(), 2);
    }
    for (i, kind) in given.iter().enumerate() {
        faults.one_of(&list.at(i), kind.as_str().unwrap_or(""), &["Egress", "Ingress"]);
    }
}

fn selector(holder: &Value, key: &'static str, path: &Path<'_>, faults: &mut Faults) {
    if let Some(selector) = holder.get(key)
        && let Err(why) = LabelSelector::from_json(selector)
    {
        faults.invalid(&path.key(key), selector, why);
    }
}

fn peer(peer: &Value, path: &Path<'_>, faults: &mut Faults) {
    let selects = ["podSelector", "namespaceSelector"].iter().any(|key| peer.get(key).is_some());
    match peer.get("ipBlock") {
        None if !selects => {
            faults.required(path, "must specify a peer: podSelector, namespaceSelector or ipBlock");
        }
        Some(_) if selects => {
            faults.forbidden(path, "may not specify both ipBlock and another peer");
        }
        Some(block) => ip_block(block, &path.key("ipBlock"), faults),
        None => {
            selector(peer, "podSelector", path, faults);
            selector(peer, "namespaceSelector", path, faults);
        }
    }
}

/// A range in CIDR notation, with its prefix.
fn range(text: &str) -> Option<IpNetwork> {
    text.contains('/').then(|| text.parse().ok()).flatten()
}

fn ip_block(block: &Value, path: &Path<'_>, faults: &mut Faults) {
    let (text, field) = (str_at(block, &["cidr"]), path.key("cidr"));
    if text.is_empty() {
        return faults.required(&field, "");
    }
    let Some(outer) = range(text) else {
        return faults.invalid_text(&field, text, "must be a CIDR (such as 10.0.0.0/8 or fd00::/8)");
    };
    let list = path.key("except");
    for (i, except) in items_at(block, &["except"]).iter().enumerate() {
        let (text, field) = (except.as_str().unwrap_or(""), list.at(i));
        match range(text) {
            None => faults.invalid_text(&field, text, "must be a CIDR (such as 10.1.0.0/16)"),
            Some(inner) if !lies_in(inner, outer) => {
                faults.invalid_text(&field, text, "must be a strict subset of `cidr`");
            }
            Some(_) => {}
        }
    }
}

fn lies_in(inner: IpNetwork, outer: IpNetwork) -> bool {
    inner.is_ipv4() == outer.is_ipv4() && inner.prefix() > outer.prefix() && outer.contains(inner.network())
}

fn port(port: &Value, path: &Path<'_>, faults: &mut Faults) {
    faults.one_of(&path.key("protocol"), str_at(port, &["protocol"]), &["SCTP", "TCP", "UDP"]);
    let field = path.key("port");
    let first = match port.get("port") {
        Some(Value::String(name)) => {
            faults.check(&field, name, names::port_name(name));
            None
        }
        Some(number) => {
            faults.range(&field, number.as_i64(), 1, PORT_MAX);
            number.as_i64()
        }
        None => None,
    };
    let Some(last) = port.get("endPort").and_then(Value::as_i64) else { return };
    let field = path.key("endPort");
    match first {
        None => faults.required(&path.key("port"), "must be a number when `endPort` is specified"),
        Some(first) if last < first => {
            faults.invalid(&field, last, "must be greater than or equal to `port`");
        }
        Some(_) => faults.range(&field, Some(last), 1, PORT_MAX),
    }
}
