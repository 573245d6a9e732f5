//! Defaults of services. Addresses are not defaults: the allocator gives them.

use serde_json::{Value, json};

use super::{child, items, set};

/// How long a client sticks to its backend when a service asks for affinity without saying how long, in seconds.
const AFFINITY_DEFAULT_SECONDS: i64 = 10_800;

pub(super) fn service(object: &mut Value) {
    let balancer = object.get_mut("status").and_then(|status| status.get_mut("loadBalancer"));
    for point in
        balancer.and_then(Value::as_object_mut).into_iter().flat_map(|status| items(status, "ingress"))
    {
        if point.get("ip").is_some_and(|ip| ip != "") {
            // Without word the balancer hands packets over as they are (KEP-1860).
            set(point, "ipMode", "VIP");
        }
    }
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
    set(spec, "type", "ClusterIP");
    set(spec, "sessionAffinity", "None");
    if spec["sessionAffinity"] == "ClientIP" {
        set(spec, "sessionAffinityConfig", json!({}));
        if let Some(config) = child(spec, "sessionAffinityConfig") {
            set(config, "clientIP", json!({}));
            if let Some(client) = child(config, "clientIP") {
                set(client, "timeoutSeconds", AFFINITY_DEFAULT_SECONDS);
            }
        }
    }
    for port in items(spec, "ports") {
        set(port, "protocol", "TCP");
        if let Some(number) = port.get("port").cloned() {
            set(port, "targetPort", number);
        }
    }
    match spec["type"].as_str() {
        Some("ClusterIP") => set(spec, "internalTrafficPolicy", "Cluster"),
        Some(kind @ ("NodePort" | "LoadBalancer")) => {
            let balanced = kind == "LoadBalancer";
            set(spec, "internalTrafficPolicy", "Cluster");
            set(spec, "externalTrafficPolicy", "Cluster");
            if balanced {
                set(spec, "allocateLoadBalancerNodePorts", true);
            }
        }
        _ => {}
    }
}
