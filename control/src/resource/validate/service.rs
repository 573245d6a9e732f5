//! Services. That addresses are free and in range is the allocator's to say.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::Value;

use super::faults::Faults;
use super::probe::{PORT_MAX, int_or_name};
use super::{changed, meta, pod, small};
use crate::resource::names;
use crate::resource::object::{int_at, items_at, map_at, str_at};
use crate::resource::path::Path;

/// Longest stickiness of a client to its backend: one day, in seconds.
const AFFINITY_MAX_SECONDS: i64 = 86_400;

pub(super) fn service(new: &Value, old: Option<&Value>, faults: &mut Faults) {
    if changed("status", new, old) {
        status(new, faults);
    }
    if !changed("spec", new, old) {
        return;
    }
    let path = Path::Root.key("spec");
    let Some(spec) = new.get("spec") else { return faults.required(&path, "") };
    let kind = str_at(spec, &["type"]);
    faults.one_of(&path.key("type"), kind, &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    if let Some(map) = map_at(spec, &["selector"]) {
        meta::labels(map, &path.key("selector"), faults);
    }
    let headless = str_at(spec, &["clusterIP"]) == "None";
    match kind {
        "ExternalName" => external_name(spec, &path, faults),
        "NodePort" | "LoadBalancer" if headless => {
            faults.invalid_text(
                &path.key("clusterIPs").at(0),
                "None",
                "may not be set to 'None' for LoadBalancer and NodePort services",
            );
        }
        _ => {}
    }
    if items_at(spec, &["ports"]).is_empty() && !headless && kind != "ExternalName" {
        faults.required(&path.key("ports"), "");
    }
    ports(spec, kind, &path, faults);
    policies(spec, kind, &path, faults);
    outside(spec, kind, &path, faults);
    if let Some(old) = old.and_then(|o| o.get("spec")) {
        addresses_stay(spec, old, kind, &path, faults);
        balancer_stays(spec, old, kind, &path, faults);
    }
}

/// How the world outside reaches the service.
fn outside(spec: &Value, kind: &str, path: &Path<'_>, faults: &mut Faults) {
    for (i, address) in items_at(spec, &["externalIPs"]).iter().enumerate() {
        let (text, list) = (address.as_str().unwrap_or(""), path.key("externalIPs"));
        let field = list.at(i);
        let unusable = match text.parse() {
            Ok(IpAddr::V4(ip)) => small::unusable_v4(ip),
            Ok(IpAddr::V6(ip)) => small::unusable_v6(ip),
            Err(_) => false,
        };
        if unusable {
            let why =
                "may not be unspecified, loopback, link-local or multicast; use an address that is routed";
            faults.invalid_text(&field, text, why);
        } else {
            pod::ip(text, &field, faults);
        }
    }
    let ranges = path.key("loadBalancerSourceRanges");
    for (i, range) in items_at(spec, &["loadBalancerSourceRanges"]).iter().enumerate() {
        let text = range.as_str().unwrap_or("").trim();
        if !text.contains('/') || text.parse::<IpNetwork>().is_err() {
            faults.invalid_text(&ranges.at(i), text, "must be a CIDR (such as 10.0.0.0/24)");
        }
    }
    let balanced = kind == "LoadBalancer";
    if !balanced && !items_at(spec, &["loadBalancerSourceRanges"]).is_empty() {
        faults.forbidden(&ranges, "may only be used when `type` is 'LoadBalancer'");
    }
    if spec.get("allocateLoadBalancerNodePorts").is_some() && !balanced {
        faults.forbidden(
            &path.key("allocateLoadBalancerNodePorts"),
            "may only be used when `type` is 'LoadBalancer'",
        );
    }
    let class = str_at(spec, &["loadBalancerClass"]);
    if !class.is_empty() {
        let field = path.key("loadBalancerClass");
        if !balanced {
            faults.forbidden(&field, "may only be used when `type` is 'LoadBalancer'");
        }
        faults.check(&field, class, names::qualified_name(class));
    }
}

/// What a load balancer has reported.
fn status(service: &Value, faults: &mut Faults) {
    let status = Path::Root.key("status");
    let path = status.key("loadBalancer");
    let Some(status) = service.get("status").and_then(|status| status.get("loadBalancer")) else { return };
    let balanced = str_at(service, &["spec", "type"]) == "LoadBalancer";
    let points = items_at(status, &["ingress"]);
    if !balanced && !points.is_empty() {
        faults.forbidden(&path.key("ingress"), "may only be used when `spec.type` is 'LoadBalancer'");
    }
    super::each(status, "ingress", &path, faults, |point, path, faults| {
        let (ip, mode) = (str_at(point, &["ip"]), str_at(point, &["ipMode"]));
        if !ip.is_empty() {
            pod::ip(ip, &path.key("ip"), faults);
        } else if !mode.is_empty() {
            faults.forbidden(&path.key("ipMode"), "may not be set without `ip`");
        }
        faults.one_of(&path.key("ipMode"), mode, &["Proxy", "VIP"]);
        let hostname = str_at(point, &["hostname"]);
        if !hostname.is_empty() {
            let field = path.key("hostname");
            faults.check(&field, hostname, names::dns1123_subdomain(hostname));
            if hostname.parse::<IpAddr>().is_ok() {
                faults.invalid_text(
                    &field,
                    hostname,
                    "must be a DNS name, not an IP address; set `ip` instead",
                );
            }
        }
    });
}

fn external_name(spec: &Value, path: &Path<'_>, faults: &mut Faults) {
    if !str_at(spec, &["clusterIP"]).is_empty() {
        faults.forbidden(&path.key("clusterIP"), "may not be set for ExternalName services");
    }
    let field = path.key("externalName");
    let name = str_at(spec, &["externalName"]);
    if name.is_empty() {
        faults.required(&field, "");
    } else {
        let plain = name.strip_suffix('.').unwrap_or(name);
        faults.check(&field, name, names::dns1123_subdomain(plain));
    }
}

fn ports(spec: &Value, kind: &str, path: &Path<'_>, faults: &mut Faults) {
    let many = items_at(spec, &["ports"]).len() > 1;
    let exposed = matches!(kind, "NodePort" | "LoadBalancer");
    let (mut seen_names, mut seen_ports, mut seen_node) = (Vec::new(), Vec::new(), Vec::new());
    super::each(spec, "ports", path, faults, |port, path, faults| {
        let name = str_at(port, &["name"]);
        let field = path.key("name");
        if name.is_empty() {
            if many {
                faults.required(&field, "ports of a service with several must have names");
            }
        } else {
            faults.check(&field, name, names::dns1123_label(name));
            if seen_names.contains(&name) {
                faults.duplicate(&field, format_args!("{name:?}"));
            }
            seen_names.push(name);
        }
        let number = int_at(port, &["port"]);
        match number {
            None => faults.required(&path.key("port"), ""),
            number => faults.range(&path.key("port"), number, 1, PORT_MAX),
        }
        let protocol = str_at(port, &["protocol"]);
        faults.one_of(&path.key("protocol"), protocol, &["SCTP", "TCP", "UDP"]);
        if number.is_some() {
            int_or_name(port.get("targetPort"), &path.key("targetPort"), faults);
            if seen_ports.contains(&(number, protocol)) {
                faults.duplicate(path, port);
            }
            seen_ports.push((number, protocol));
        }
        let Some(node) = int_at(port, &["nodePort"]).filter(|n| *n != 0) else { return };
        let field = path.key("nodePort");
        if !exposed {
            faults.forbidden(&field, format_args!("may not be used when `type` is '{kind}'"));
        }
        faults.range(&field, Some(node), 1, PORT_MAX);
        if seen_node.contains(&(node, protocol)) {
            faults.duplicate(&field, node);
        }
        seen_node.push((node, protocol));
    });
}

fn policies(spec: &Value, kind: &str, path: &Path<'_>, faults: &mut Faults) {
    let affinity = str_at(spec, &["sessionAffinity"]);
    faults.one_of(&path.key("sessionAffinity"), affinity, &["ClientIP", "None"]);
    let config = path.key("sessionAffinityConfig");
    if affinity == "ClientIP" {
        let timeout = int_at(spec, &["sessionAffinityConfig", "clientIP", "timeoutSeconds"]);
        faults.range(&config.key("clientIP").key("timeoutSeconds"), timeout, 1, AFFINITY_MAX_SECONDS);
    } else if spec.get("sessionAffinityConfig").is_some() {
        faults.forbidden(&config, "must not be set when session affinity is None");
    }
    faults.one_of(
        &path.key("internalTrafficPolicy"),
        str_at(spec, &["internalTrafficPolicy"]),
        &["Cluster", "Local"],
    );
    let external = str_at(spec, &["externalTrafficPolicy"]);
    let field = path.key("externalTrafficPolicy");
    faults.one_of(&field, external, &["Cluster", "Local"]);
    let exposed = matches!(kind, "NodePort" | "LoadBalancer") || !items_at(spec, &["externalIPs"]).is_empty();
    if !external.is_empty() && !exposed {
        faults.invalid_text(&field, external, "may only be set for externally-accessible services");
    }
    if int_at(spec, &["healthCheckNodePort"]).is_some_and(|n| n != 0)
        && !(kind == "LoadBalancer" && external == "Local")
    {
        faults.invalid(
            &path.key("healthCheckNodePort"),
            &spec["healthCheckNodePort"],
            "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'",
        );
    }
    let distribution = str_at(spec, &["trafficDistribution"]);
    faults.one_of(
        &path.key("trafficDistribution"),
        distribution,
        &["PreferClose", "PreferSameNode", "PreferSameZone"],
    );
}

fn addresses_stay(new: &Value, old: &Value, kind: &str, path: &Path<'_>, faults: &mut Faults) {
    if kind == "ExternalName" || str_at(old, &["type"]) == "ExternalName" {
        return;
    }
    let (before, now) = (str_at(old, &["clusterIP"]), str_at(new, &["clusterIP"]));
    if !before.is_empty() && before != now {
        faults.invalid_text(
            &path.key("clusterIPs").at(0),
            now,
            format_args!("may not change once set (it is {before}); delete the service and create it anew"),
        );
    }
}

/// What the balancer outside was told stays while it balances.
fn balancer_stays(new: &Value, old: &Value, kind: &str, path: &Path<'_>, faults: &mut Faults) {
    if kind != "LoadBalancer" || str_at(old, &["type"]) != "LoadBalancer" {
        return;
    }
    if new.get("loadBalancerClass") != old.get("loadBalancerClass") {
        faults.invalid_text(
            &path.key("loadBalancerClass"),
            str_at(new, &["loadBalancerClass"]),
            "may not change once set; delete the service and create it anew",
        );
    }
    let health = |spec| int_at(spec, &["healthCheckNodePort"]).unwrap_or(0);
    let local = |spec| str_at(spec, &["externalTrafficPolicy"]) == "Local";
    if local(new) && local(old) && health(old) != 0 && health(new) != health(old) {
        faults.invalid(
            &path.key("healthCheckNodePort"),
            health(new),
            "may not change once set; delete the service and create it anew",
        );
    }
}
