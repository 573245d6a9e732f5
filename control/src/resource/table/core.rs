//! The columns of nodes, namespaces, services and of the small kinds.

use serde_json::{Map, Value, json};

use super::{AGE, NAME, Printer, age, name, number, string_or, text, wide};
use crate::resource::lifecycle::selector_text;
use crate::resource::object::{self, bool_at, int_at, items_at, map_at, str_at};

pub(super) static NODE: Printer = Printer {
    columns: &[
        NAME,
        text("Status", "Whether the node takes pods."),
        text("Roles", "Roles from the node's labels."),
        AGE,
        text("Version", "Version of the node's agent."),
        wide("Internal-IP", "Address inside the cluster."),
        wide("External-IP", "Address from outside."),
        wide("OS-Image", "Operating system."),
        wide("Kernel-Version", "Kernel."),
        wide("Container-Runtime", "Container runtime and version."),
    ],
    cells: |n, now| {
        let info = |key: &str| string_or(str_at(n, &["status", "nodeInfo", key]), "<unknown>");
        vec![
            name(n),
            json!(node_status(n)),
            json!(node_roles(n)),
            age::age(n, now),
            json!(str_at(n, &["status", "nodeInfo", "kubeletVersion"])),
            node_address(n, "InternalIP"),
            node_address(n, "ExternalIP"),
            info("osImage"),
            info("kernelVersion"),
            info("containerRuntimeVersion"),
        ]
    },
};

fn node_status(node: &Value) -> String {
    let ready = items_at(node, &["status", "conditions"]).iter().find(|c| str_at(c, &["type"]) == "Ready");
    let mut status = match ready.map(|c| str_at(c, &["status"])) {
        None => "Unknown",
        Some("True") => "Ready",
        Some(_) => "NotReady",
    }
    .to_owned();
    if bool_at(node, &["spec", "unschedulable"]) {
        status.push_str(",SchedulingDisabled");
    }
    status
}

fn node_roles(node: &Value) -> String {
    let mut roles: Vec<&str> = object::labels(node)
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| match key.as_str() {
            "kubernetes.io/role" => value.as_str(),
            _ => key.strip_prefix("node-role.kubernetes.io/"),
        })
        .filter(|role| !role.is_empty())
        .collect();
    roles.sort_unstable();
    roles.dedup();
    if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") }
}

fn node_address(node: &Value, kind: &str) -> Value {
    let found = items_at(node, &["status", "addresses"]).iter().find(|a| str_at(a, &["type"]) == kind);
    string_or(found.map_or("", |a| str_at(a, &["address"])), "<none>")
}

pub(super) static NAMESPACE: Printer = Printer {
    columns: &[NAME, text("Status", "Active or Terminating."), AGE],
    cells: |n, now| vec![name(n), json!(str_at(n, &["status", "phase"])), age::age(n, now)],
};

pub(super) static SERVICE: Printer = Printer {
    columns: &[
        NAME,
        text("Type", "How the service is exposed."),
        text("Cluster-IP", "Address inside the cluster."),
        text("External-IP", "Addresses from outside."),
        text("Port(s)", "Port, node port and protocol."),
        AGE,
        wide("Selector", "Labels of the pods behind it."),
    ],
    cells: |s, now| {
        let kind = str_at(s, &["spec", "type"]);
        vec![
            name(s),
            json!(kind),
            string_or(str_at(s, &["spec", "clusterIP"]), "<none>"),
            string_or(&external_addresses(s, kind), "<none>"),
            string_or(&service_ports(s), "<none>"),
            age::age(s, now),
            string_or(&label_text(map_at(s, &["spec", "selector"])), "<none>"),
        ]
    },
};

fn external_addresses(service: &Value, kind: &str) -> String {
    let mut list: Vec<&str> =
        items_at(service, &["spec", "externalIPs"]).iter().filter_map(Value::as_str).collect();
    match kind {
        "ExternalName" => str_at(service, &["spec", "externalName"]).to_owned(),
        "LoadBalancer" => {
            let ingress = items_at(service, &["status", "loadBalancer", "ingress"]);
            let given: Vec<&str> = ingress
                .iter()
                .map(|i| {
                    if str_at(i, &["ip"]).is_empty() { str_at(i, &["hostname"]) } else { str_at(i, &["ip"]) }
                })
                .filter(|a| !a.is_empty())
                .collect();
            list.splice(0..0, given);
            if list.is_empty() { "<pending>".to_owned() } else { list.join(",") }
        }
        _ => list.join(","),
    }
}

fn service_ports(service: &Value) -> String {
    let ports = items_at(service, &["spec", "ports"]).iter().map(|p| {
        let (port, protocol) = (int_at(p, &["port"]).unwrap_or(0), str_at(p, &["protocol"]));
        match int_at(p, &["nodePort"]) {
            Some(node_port) if node_port > 0 => format!("{port}:{node_port}/{protocol}"),
            _ => format!("{port}/{protocol}"),
        }
    });
    ports.collect::<Vec<_>>().join(",")
}

/// Labels as `a=b,c=d`.
fn label_text(labels: Option<&Map<String, Value>>) -> String {
    let pairs = labels.into_iter().flatten().map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or("")));
    pairs.collect::<Vec<_>>().join(",")
}

fn entries(object: &Value, keys: &[&str]) -> usize {
    keys.iter().filter_map(|k| map_at(object, &[k])).map(Map::len).sum()
}

pub(super) static CONFIG_MAP: Printer = Printer {
    columns: &[NAME, number("Data", "Number of entries."), AGE],
    cells: |c, now| vec![name(c), json!(entries(c, &["data", "binaryData"])), age::age(c, now)],
};

pub(super) static SECRET: Printer = Printer {
    columns: &[NAME, text("Type", "What the secret is for."), number("Data", "Number of entries."), AGE],
    cells: |s, now| {
        vec![name(s), json!(str_at(s, &["type"])), json!(entries(s, &["data"])), age::age(s, now)]
    },
};

pub(super) static SERVICE_ACCOUNT: Printer = Printer {
    columns: &[NAME, number("Secrets", "Number of secrets that it may use."), AGE],
    cells: |s, now| vec![name(s), json!(items_at(s, &["secrets"]).len()), age::age(s, now)],
};

/// How many items of a list are shown before it is cut.
const SHOWN_MAX: usize = 3;

fn shortened(items: &[String], absent: &str) -> String {
    if items.is_empty() {
        return absent.to_owned();
    }
    let shown = items[..items.len().min(SHOWN_MAX)].join(",");
    match items.len().saturating_sub(SHOWN_MAX) {
        0 => shown,
        more => format!("{shown} + {more} more..."),
    }
}

pub(super) static ENDPOINT_SLICE: Printer = Printer {
    columns: &[
        NAME,
        text("AddressType", "IPv4, IPv6 or FQDN."),
        text("Ports", "Ports of every endpoint."),
        text("Endpoints", "Addresses of the endpoints."),
        AGE,
    ],
    cells: |s, now| {
        let ports: Vec<String> = items_at(s, &["ports"])
            .iter()
            .map(|p| int_at(p, &["port"]).map_or_else(|| "*".to_owned(), |n| n.to_string()))
            .collect();
        let addresses: Vec<String> = items_at(s, &["endpoints"])
            .iter()
            .flat_map(|e| items_at(e, &["addresses"]))
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect();
        vec![
            name(s),
            json!(str_at(s, &["addressType"])),
            json!(shortened(&ports, "<unset>")),
            json!(shortened(&addresses, "<unset>")),
            age::age(s, now),
        ]
    },
};

pub(super) static LEASE: Printer = Printer {
    columns: &[NAME, text("Holder", "Who holds the lease."), AGE],
    cells: |l, now| vec![name(l), json!(str_at(l, &["spec", "holderIdentity"])), age::age(l, now)],
};

pub(super) static NETWORK_POLICY: Printer = Printer {
    columns: &[NAME, text("Pod-Selector", "Labels of the pods that it isolates."), AGE],
    cells: |p, now| {
        let selector = object::at(p, &["spec", "podSelector"]).map(selector_text).unwrap_or_default();
        vec![name(p), string_or(&selector, "<none>"), age::age(p, now)]
    },
};
