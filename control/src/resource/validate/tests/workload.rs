//! Workloads and services.

use super::*;

fn deployment() -> Value {
    json!({
        "metadata": {"name": "d", "namespace": "n"},
        "spec": {"selector": {"matchLabels": {"app": "w"}},
            "template": {"metadata": {"labels": {"app": "w"}}, "spec": {"containers": [{"name": "a", "image": "i:1"}]}}},
    })
}

#[test]
fn workloads() {
    let shared: Cases<'_> = &[
        ("/spec", Value::Null, "spec", "Required"),
        ("/spec/replicas", json!(-1), "spec.replicas", "greater than or equal to 0"),
        ("/spec/minReadySeconds", json!(-1), "spec.minReadySeconds", "greater"),
        ("/spec/selector", Value::Null, "spec.selector", "Required"),
        ("/spec/selector", json!({}), "spec.selector", "empty selector"),
        (
            "/spec/selector",
            json!({"matchExpressions": [{"key": "a", "operator": "X"}]}),
            "spec.selector",
            "operator",
        ),
        (
            "/spec/selector",
            json!({"matchLabels": {"app": "x"}}),
            "spec.template.metadata.labels",
            "does not match template",
        ),
        ("/spec/template", Value::Null, "spec.template", "Required"),
        (
            "/spec/template/metadata/labels",
            json!({"app": "w", "b": "-"}),
            "spec.template.metadata.labels.b",
            "label value",
        ),
        (
            "/spec/template/spec/containers/0/image",
            Value::Null,
            "spec.template.spec.containers[0].image",
            "Required",
        ),
        (
            "/spec/template/spec/restartPolicy",
            json!("Never"),
            "spec.template.spec.restartPolicy",
            "\"Always\"",
        ),
        (
            "/spec/template/spec/activeDeadlineSeconds",
            json!(5),
            "spec.template.spec.activeDeadlineSeconds",
            "must not be specified",
        ),
    ];
    for kind in [&DEPLOYMENTS, &REPLICA_SETS] {
        creates(kind, &deployment(), shared);
        updates(
            kind,
            &deployment(),
            &[
                ("/spec/replicas", json!(5), "", ""),
                ("/spec/template/spec/containers/0/args", json!(["x"]), "", ""),
                (
                    "/spec/selector",
                    json!({"matchLabels": {"app": "w"}, "matchExpressions": [{"key": "app", "operator": "Exists"}]}),
                    "spec.selector",
                    "immutable",
                ),
            ],
        );
    }
}

#[test]
fn deployment_strategies() {
    creates(
        &DEPLOYMENTS,
        &deployment(),
        &[
            (
                "/spec/strategy",
                json!({"type": "Slow"}),
                "spec.strategy.type",
                "\"Recreate\", \"RollingUpdate\"",
            ),
            (
                "/spec/strategy",
                json!({"type": "Recreate", "rollingUpdate": {"maxSurge": 1}}),
                "spec.strategy.rollingUpdate",
                "Recreate",
            ),
            (
                "/spec/strategy",
                json!({"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}),
                "spec.strategy.rollingUpdate.maxUnavailable",
                "may not be 0",
            ),
            (
                "/spec/strategy",
                json!({"rollingUpdate": {"maxSurge": "0%", "maxUnavailable": "0%"}}),
                "spec.strategy.rollingUpdate.maxUnavailable",
                "may not be 0",
            ),
            (
                "/spec/strategy",
                json!({"rollingUpdate": {"maxSurge": "x%"}}),
                "spec.strategy.rollingUpdate.maxSurge",
                "percentage",
            ),
            (
                "/spec/strategy",
                json!({"rollingUpdate": {"maxUnavailable": "150%"}}),
                "spec.strategy.rollingUpdate.maxUnavailable",
                "100%",
            ),
            (
                "/spec/strategy",
                json!({"rollingUpdate": {"maxSurge": -1}}),
                "spec.strategy.rollingUpdate.maxSurge",
                "greater",
            ),
            ("/spec/progressDeadlineSeconds", json!(0), "spec.progressDeadlineSeconds", "minReadySeconds"),
            ("/spec/revisionHistoryLimit", json!(-1), "spec.revisionHistoryLimit", "greater"),
        ],
    );
    accepted(
        &DEPLOYMENTS,
        &deployment(),
        &[
            ("/spec/replicas", json!(0)),
            ("/spec/strategy", json!({"type": "Recreate"})),
            ("/spec/strategy", json!({"rollingUpdate": {"maxSurge": "200%", "maxUnavailable": 0}})),
        ],
    );
}

fn service() -> Value {
    json!({"metadata": {"name": "s", "namespace": "n"},
        "spec": {"selector": {"a": "b"}, "clusterIP": "10.96.0.9", "ports": [{"port": 80}]}})
}

#[test]
fn services() {
    creates(
        &SERVICES,
        &service(),
        &[
            ("/spec", Value::Null, "spec", "Required"),
            ("/spec/type", json!("Magic"), "spec.type", "\"ClusterIP\""),
            ("/spec/ports", json!([]), "spec.ports", "Required"),
            ("/spec/ports/0/port", json!(0), "spec.ports[0].port", "between 1"),
            ("/spec/ports/0/port", Value::Null, "spec.ports[0].port", "Required"),
            ("/spec/ports/0/protocol", json!("ICMP"), "spec.ports[0].protocol", "supported"),
            ("/spec/ports/0/targetPort", json!(70000), "spec.ports[0].targetPort", "between"),
            ("/spec/ports/0/targetPort", json!("a_b"), "spec.ports[0].targetPort", "port name"),
            ("/spec/ports/0/nodePort", json!(30000), "spec.ports[0].nodePort", "'ClusterIP'"),
            ("/spec/ports/1", json!({"port": 81}), "spec.ports[1].name", "Required"),
            (
                "/spec/ports",
                json!([{"name": "a", "port": 80}, {"name": "a", "port": 81}]),
                "spec.ports[1].name",
                "Duplicate",
            ),
            (
                "/spec/ports",
                json!([{"name": "a", "port": 80}, {"name": "b", "port": 80}]),
                "spec.ports[1]",
                "Duplicate",
            ),
            ("/spec/selector", json!({"a": "b c"}), "spec.selector.a", "label value"),
            ("/spec/sessionAffinity", json!("Cookie"), "spec.sessionAffinity", "supported"),
            (
                "/spec/sessionAffinityConfig",
                json!({"clientIP": {"timeoutSeconds": 1}}),
                "spec.sessionAffinityConfig",
                "None",
            ),
            (
                "/spec/externalTrafficPolicy",
                json!("Local"),
                "spec.externalTrafficPolicy",
                "externally-accessible",
            ),
            ("/spec/internalTrafficPolicy", json!("Near"), "spec.internalTrafficPolicy", "supported"),
            ("/spec/externalIPs", json!(["x"]), "spec.externalIPs[0]", "IP address"),
            (
                "/spec/loadBalancerSourceRanges",
                json!(["10.0.0.0"]),
                "spec.loadBalancerSourceRanges[0]",
                "CIDR",
            ),
            ("/spec/healthCheckNodePort", json!(30000), "spec.healthCheckNodePort", "Local"),
            (
                "/spec/allocateLoadBalancerNodePorts",
                json!(true),
                "spec.allocateLoadBalancerNodePorts",
                "LoadBalancer",
            ),
        ],
    );
    let external = json!({"metadata": {"name": "s", "namespace": "n"}, "spec": {"type": "ExternalName", "externalName": "e.com"}});
    creates(
        &SERVICES,
        &external,
        &[
            ("/spec/externalName", Value::Null, "spec.externalName", "Required"),
            ("/spec/externalName", json!("E_"), "spec.externalName", "subdomain"),
            ("/spec/clusterIP", json!("10.96.0.1"), "spec.clusterIP", "ExternalName"),
        ],
    );
    accepted(
        &SERVICES,
        &service(),
        &[
            ("/spec/clusterIP", json!("None")),
            ("/spec/sessionAffinity", json!("ClientIP")),
            ("/spec/ports", json!([{"name": "t", "port": 53}, {"name": "u", "port": 53, "protocol": "UDP"}])),
        ],
    );
    let headless = json!({"metadata": {"name": "s", "namespace": "n"}, "spec": {"clusterIP": "None", "selector": {"a": "b"}}});
    creates(&SERVICES, &headless, &[("/spec/type", json!("NodePort"), "spec.clusterIPs[0]", "'None'")]);
    let mut node_port = service();
    put(&mut node_port, "/spec/type", json!("NodePort"));
    put(
        &mut node_port,
        "/spec/ports",
        json!([{"name": "a", "port": 80, "nodePort": 30000}, {"name": "b", "port": 81, "nodePort": 30001}]),
    );
    creates(
        &SERVICES,
        &node_port,
        &[("/spec/ports/1/nodePort", json!(30000), "spec.ports[1].nodePort", "Duplicate")],
    );
}

#[test]
fn service_updates() {
    updates(
        &SERVICES,
        &service(),
        &[
            ("/spec/ports/0/port", json!(81), "", ""),
            ("/spec/clusterIP", json!("10.96.0.10"), "spec.clusterIPs[0]", "may not change"),
            ("/spec/clusterIP", json!("None"), "spec.clusterIPs[0]", "10.96.0.9"),
        ],
    );
    let old = ready(&SERVICES, service());
    let external = json!({"metadata": {"name": "s", "namespace": "n"}, "spec": {"type": "ExternalName", "externalName": "e.com"}});
    assert_eq!(causes(validate_update(&SERVICES, &ready(&SERVICES, external), &old)), []);
}
