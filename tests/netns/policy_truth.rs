//! What the objects of the API say, evaluated one by one and without any of the agent's code: the truth that the matrix
//! is held against.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

/// A pod as objects show it.
pub(crate) struct End<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) namespace_labels: &'a Value,
    pub(crate) labels: &'a Value,
    pub(crate) ports: &'a Value,
    pub(crate) ip: IpAddr,
}

/// A policy: its namespace and its spec.
pub(crate) type Policy = (String, Value);

/// Whether a connection is allowed.
pub(crate) fn allows(policies: &[Policy], from: &End<'_>, to: &End<'_>, protocol: &str, port: u16) -> bool {
    one_way(policies, "Egress", from, to, to, protocol, port)
        && one_way(policies, "Ingress", to, from, to, protocol, port)
}

/// `own` is the end that policies of this direction isolate, `other` its peer; `receiver` has the named ports.
fn one_way(
    policies: &[Policy],
    direction: &str,
    own: &End<'_>,
    other: &End<'_>,
    receiver: &End<'_>,
    protocol: &str,
    port: u16,
) -> bool {
    let (rules, peers) = if direction == "Ingress" { ("ingress", "from") } else { ("egress", "to") };
    let mut isolated = false;
    for (namespace, spec) in policies {
        if namespace != own.namespace || !selects(&spec["podSelector"], own.labels) || !has(spec, direction) {
            continue;
        }
        isolated = true;
        for rule in spec[rules].as_array().into_iter().flatten() {
            let list = |key: &str| rule[key].as_array().cloned().unwrap_or_default();
            let (peers, ports) = (list(peers), list("ports"));
            let is_peer = peers.is_empty() || peers.iter().any(|p| matches_peer(p, namespace, other));
            let is_port = ports.is_empty() || ports.iter().any(|p| matches_port(p, receiver, protocol, port));
            if is_peer && is_port {
                return true;
            }
        }
    }
    !isolated
}

fn has(spec: &Value, direction: &str) -> bool {
    match spec["policyTypes"].as_array() {
        Some(types) => types.iter().any(|kind| kind == direction),
        None => direction == "Ingress" || spec["egress"].as_array().is_some_and(|rules| !rules.is_empty()),
    }
}

fn matches_peer(peer: &Value, namespace: &str, end: &End<'_>) -> bool {
    if let Some(block) = peer.get("ipBlock") {
        let within = |text: &Value| {
            let range: IpNetwork = text.as_str().expect("a range").parse().expect("a range");
            range.contains(end.ip)
        };
        return within(&block["cidr"]) && !block["except"].as_array().into_iter().flatten().any(within);
    }
    let in_namespace = match peer.get("namespaceSelector") {
        Some(selector) => selects(selector, end.namespace_labels),
        None => end.namespace == namespace,
    };
    in_namespace && peer.get("podSelector").is_none_or(|selector| selects(selector, end.labels))
}

fn matches_port(wanted: &Value, receiver: &End<'_>, protocol: &str, port: u16) -> bool {
    if wanted["protocol"].as_str().unwrap_or("TCP") != protocol {
        return false;
    }
    match &wanted["port"] {
        Value::Null => true,
        Value::String(name) => receiver.ports.as_array().into_iter().flatten().any(|held| {
            held["name"] == *name
                && held["protocol"].as_str().unwrap_or("TCP") == protocol
                && held["containerPort"] == port
        }),
        first => {
            let first = first.as_u64().expect("a port");
            (first..=wanted["endPort"].as_u64().unwrap_or(first)).contains(&u64::from(port))
        }
    }
}

fn selects(selector: &Value, labels: &Value) -> bool {
    let none = Map::new();
    let wanted = selector["matchLabels"].as_object().unwrap_or(&none);
    let expressions = selector["matchExpressions"].as_array().cloned().unwrap_or_default();
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
        && expressions.iter().all(|wanted| {
            let value = labels.get(wanted["key"].as_str().expect("a key"));
            let listed = value.is_some_and(|v| wanted["values"].as_array().is_some_and(|l| l.contains(v)));
            match wanted["operator"].as_str().expect("an operator") {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                other => panic!("operator {other}"),
            }
        })
}
