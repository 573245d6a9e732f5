//! Services: what the data planes rely on.

use super::*;

fn service(kind: &str) -> Value {
    json!({
        "metadata": {"name": "s", "namespace": "n"},
        "spec": {"type": kind, "ports": [{"name": "a", "port": 80}]},
    })
}

#[test]
fn policies_and_the_world_outside() {
    let affinity = |seconds: i64| json!({"clientIP": {"timeoutSeconds": seconds}});
    let mut sticky = service("NodePort");
    put(&mut sticky, "/spec/sessionAffinity", json!("ClientIP"));
    let (config, timeout) =
        ("/spec/sessionAffinityConfig", "spec.sessionAffinityConfig.clientIP.timeoutSeconds");
    creates(
        &SERVICES,
        &sticky,
        &[
            (config, affinity(0), timeout, "between 1 and 86400"),
            (config, affinity(86_401), timeout, "between 1 and 86400"),
        ],
    );
    accepted(&SERVICES, &sticky, &[(config, affinity(1)), (config, affinity(86_400))]);
    let (ips, ranges) = ("spec.externalIPs[0]", "spec.loadBalancerSourceRanges");
    creates(
        &SERVICES,
        &service("ClusterIP"),
        &[
            ("/spec/trafficDistribution", json!("PreferFar"), "spec.trafficDistribution", "PreferSameNode"),
            ("/spec/internalTrafficPolicy", json!("Near"), "spec.internalTrafficPolicy", "Local"),
            (
                "/spec/externalTrafficPolicy",
                json!("Local"),
                "spec.externalTrafficPolicy",
                "externally-accessible",
            ),
            ("/spec/sessionAffinity", json!("Cookie"), "spec.sessionAffinity", "ClientIP"),
            (config, affinity(5), "spec.sessionAffinityConfig", "must not be set"),
            ("/spec/externalIPs", json!(["127.0.0.1"]), ips, "loopback"),
            ("/spec/externalIPs", json!(["0.0.0.0"]), ips, "unspecified"),
            ("/spec/externalIPs", json!(["fe80::1"]), ips, "link-local"),
            ("/spec/externalIPs", json!(["junk"]), ips, "valid IP address"),
            ("/spec/loadBalancerSourceRanges", json!(["10.0.0.0/8"]), ranges, "'LoadBalancer'"),
            ("/spec/loadBalancerClass", json!("a.b/c"), "spec.loadBalancerClass", "'LoadBalancer'"),
            ("/spec/healthCheckNodePort", json!(31000), "spec.healthCheckNodePort", "'LoadBalancer'"),
            (
                "/spec/allocateLoadBalancerNodePorts",
                json!(false),
                "spec.allocateLoadBalancerNodePorts",
                "'LoadBalancer'",
            ),
            ("/spec/ports/0/protocol", json!("ICMP"), "spec.ports[0].protocol", "SCTP"),
        ],
    );
    accepted(
        &SERVICES,
        &service("ClusterIP"),
        &[
            ("/spec/trafficDistribution", json!("PreferSameNode")),
            ("/spec/externalIPs", json!(["203.0.113.1", "2001:db8::1"])),
            ("/spec/ports/0/protocol", json!("SCTP")),
        ],
    );
    creates(
        &SERVICES,
        &service("LoadBalancer"),
        &[(
            "/spec/loadBalancerSourceRanges",
            json!(["10.0.0.0/8", "10.0.0.1"]),
            "spec.loadBalancerSourceRanges[1]",
            "CIDR",
        )],
    );
    accepted(
        &SERVICES,
        &service("LoadBalancer"),
        &[
            ("/spec/loadBalancerSourceRanges", json!(["10.0.0.0/8", " fd00::/8 "])),
            ("/spec/loadBalancerClass", json!("example.com/inside")),
            ("/spec/allocateLoadBalancerNodePorts", json!(false)),
        ],
    );
}

#[test]
fn what_a_balancer_was_told_stays() {
    let mut old = service("LoadBalancer");
    put(&mut old, "/spec/externalTrafficPolicy", json!("Local"));
    put(&mut old, "/spec/healthCheckNodePort", json!(31000));
    put(&mut old, "/spec/loadBalancerClass", json!("a.b/c"));
    updates(
        &SERVICES,
        &old,
        &[
            ("/spec/loadBalancerClass", json!("a.b/d"), "spec.loadBalancerClass", "may not change"),
            ("/spec/healthCheckNodePort", json!(31001), "spec.healthCheckNodePort", "may not change"),
            ("/spec/sessionAffinity", json!("ClientIP"), "", ""),
            ("/spec/internalTrafficPolicy", json!("Local"), "", ""),
        ],
    );
}

#[test]
fn ingress_points_are_addresses_with_a_mode() {
    let path = "/status/loadBalancer";
    let point = |point: Value| json!({"ingress": [point]});
    let good = service("LoadBalancer");
    updates(
        &SERVICES,
        &good,
        &[
            (path, point(json!({"ip": "198.51.100.1"})), "", ""),
            (path, point(json!({"ip": "198.51.100.1", "ipMode": "Proxy"})), "", ""),
            (path, point(json!({"hostname": "lb.example"})), "", ""),
            (path, point(json!({"ip": "junk"})), "status.loadBalancer.ingress[0].ip", "valid IP address"),
            (
                path,
                point(json!({"ip": "198.51.100.1", "ipMode": "DSR"})),
                "status.loadBalancer.ingress[0].ipMode",
                "VIP",
            ),
            (path, point(json!({"ipMode": "VIP"})), "status.loadBalancer.ingress[0].ipMode", "without `ip`"),
            (
                path,
                point(json!({"hostname": "10.0.0.1"})),
                "status.loadBalancer.ingress[0].hostname",
                "not an IP",
            ),
        ],
    );
    let point = point(json!({"ip": "198.51.100.1"}));
    updates(
        &SERVICES,
        &service("NodePort"),
        &[(path, point, "status.loadBalancer.ingress", "'LoadBalancer'")],
    );
}
