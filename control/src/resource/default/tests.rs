//! Defaults kind by kind, and that they are applied once for all.

use serde_json::json;

use super::*;
use crate::resource::kinds::{
    self, DEPLOYMENTS, ENDPOINT_SLICES, NAMESPACES, NODES, PODS, REPLICA_SETS, SECRETS, SERVICES,
};

fn defaulted(kind: &Kind, mut object: Value) -> Value {
    default_object(kind, &mut object);
    let once = object.clone();
    default_object(kind, &mut object);
    assert_eq!(object, once, "defaulting twice");
    object
}

#[test]
fn a_bare_pod() {
    let got = defaulted(
        &PODS,
        json!({"spec": {"containers": [{"name": "a", "image": "web"}]}, "status": {"phase": "Pending"}}),
    );
    let toleration = |key: &str| {
        json!({"key": format!("node.kubernetes.io/{key}"), "operator": "Exists",
        "effect": "NoExecute", "tolerationSeconds": 300})
    };
    assert_eq!(
        got,
        json!({
            "spec": {
                "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "terminationGracePeriodSeconds": 30,
                "schedulerName": "default-scheduler", "securityContext": {}, "enableServiceLinks": true,
                "serviceAccountName": "default", "serviceAccount": "default", "priority": 0,
                "preemptionPolicy": "PreemptLowerPriority",
                "tolerations": [toleration("not-ready"), toleration("unreachable")],
                "containers": [{"name": "a", "image": "web", "imagePullPolicy": "Always", "resources": {},
                    "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"}],
            },
            "status": {"phase": "Pending", "qosClass": "BestEffort"},
        })
    );
}

#[test]
fn pull_policies() {
    for (image, policy) in [
        ("web", "Always"),
        ("web:latest", "Always"),
        ("web:1", "IfNotPresent"),
        ("host:5000/web", "Always"),
        ("host:5000/web:2", "IfNotPresent"),
        ("web@sha256:abc", "IfNotPresent"),
    ] {
        let got = defaulted(&PODS, json!({"spec": {"containers": [{"image": image}]}}));
        assert_eq!(got["spec"]["containers"][0]["imagePullPolicy"], policy, "{image}");
    }
}

#[test]
fn container_parts() {
    let got = defaulted(
        &PODS,
        json!({"spec": {"hostNetwork": true, "initContainers": [{"image": "i:1"}], "containers": [{
            "image": "w:1",
            "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": 1, "memory": "1024Mi"}, "requests": {"cpu": "0.5"}},
            "readinessProbe": {"httpGet": {"port": 80}, "periodSeconds": 1},
            "lifecycle": {"preStop": {"httpGet": {"port": 80}}},
            "env": [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        }]}}),
    );
    let c = &got["spec"]["containers"][0];
    assert_eq!(c["ports"][0], json!({"containerPort": 80, "hostPort": 80, "protocol": "TCP"}));
    assert_eq!(
        c["resources"],
        json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m", "memory": "1Gi"}})
    );
    assert_eq!(
        c["readinessProbe"],
        json!({"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "periodSeconds": 1, "timeoutSeconds": 1,
            "successThreshold": 1, "failureThreshold": 3})
    );
    assert_eq!(c["lifecycle"]["preStop"]["httpGet"]["scheme"], "HTTP");
    assert_eq!(c["env"][0]["valueFrom"]["fieldRef"]["apiVersion"], "v1");
    assert_eq!(got["spec"]["initContainers"][0]["terminationMessagePolicy"], "File");
}

#[test]
fn volumes() {
    let got = defaulted(
        &PODS,
        json!({"spec": {"volumes": [
            {"name": "none"},
            {"name": "cm", "configMap": {"name": "x"}},
            {"name": "sec", "secret": {"secretName": "x", "defaultMode": 256}},
            {"name": "host", "hostPath": {"path": "/x"}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1024Ki"}},
            {"name": "proj", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}},
                {"downwardAPI": {"items": [{"path": "p", "fieldRef": {"fieldPath": "f"}}]}}]}},
        ]}}),
    );
    assert_eq!(
        got["spec"]["volumes"],
        json!([
            {"name": "none", "emptyDir": {}},
            {"name": "cm", "configMap": {"name": "x", "defaultMode": 420}},
            {"name": "sec", "secret": {"secretName": "x", "defaultMode": 256}},
            {"name": "host", "hostPath": {"path": "/x", "type": ""}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Mi"}},
            {"name": "proj", "projected": {"defaultMode": 420, "sources": [
                {"serviceAccountToken": {"path": "t", "expirationSeconds": 3600}},
                {"downwardAPI": {"items": [{"path": "p", "fieldRef": {"fieldPath": "f", "apiVersion": "v1"}}]}}]}},
        ])
    );
}

#[test]
fn own_tolerations_win() {
    let wild = json!([{"operator": "Exists"}]);
    let got = defaulted(&PODS, json!({"spec": {"tolerations": wild}}));
    assert_eq!(got["spec"]["tolerations"], wild);
    let one = json!({"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5});
    let got = defaulted(&PODS, json!({"spec": {"tolerations": [one]}}));
    assert_eq!(got["spec"]["tolerations"].as_array().unwrap().len(), 2);
    assert_eq!(got["spec"]["tolerations"][0], one);
}

#[test]
fn qos_classes() {
    let spec = |resources: Value| json!({"containers": [{"resources": resources}]});
    for (resources, class) in [
        (json!({}), "BestEffort"),
        (json!({"requests": {"cpu": "0"}}), "BestEffort"),
        (json!({"limits": {"ephemeral-storage": "1Gi"}}), "BestEffort"),
        (json!({"requests": {"cpu": "1"}}), "Burstable"),
        (json!({"limits": {"cpu": "1"}}), "Burstable"),
        (json!({"limits": {"cpu": "1", "memory": "1Gi"}}), "Guaranteed"),
        (
            json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m", "memory": "1Gi"}}),
            "Guaranteed",
        ),
        (
            json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m", "memory": "1Gi"}}),
            "Burstable",
        ),
    ] {
        assert_eq!(qos_class(&spec(resources.clone())), class, "{resources}");
    }
    let two = json!({"containers": [{"resources": {"limits": {"cpu": "1", "memory": "1"}}}, {}]});
    assert_eq!(qos_class(&two), "Burstable");
}

#[test]
fn services() {
    let got = defaulted(
        &SERVICES,
        json!({"spec": {"ports": [{"port": 80}, {"port": 81, "targetPort": "http", "protocol": "UDP"}]}}),
    );
    assert_eq!(
        got["spec"],
        json!({"type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            "ports": [{"port": 80, "targetPort": 80, "protocol": "TCP"}, {"port": 81, "targetPort": "http", "protocol": "UDP"}]})
    );
    let got = defaulted(&SERVICES, json!({"spec": {"type": "NodePort", "sessionAffinity": "ClientIP"}}));
    assert_eq!(got["spec"]["externalTrafficPolicy"], "Cluster");
    assert_eq!(got["spec"]["sessionAffinityConfig"], json!({"clientIP": {"timeoutSeconds": 10800}}));
    let got = defaulted(&SERVICES, json!({"spec": {"type": "LoadBalancer"}}));
    assert_eq!(got["spec"]["allocateLoadBalancerNodePorts"], true);
    let got = defaulted(&SERVICES, json!({"spec": {"type": "ExternalName", "externalName": "x"}}));
    assert_eq!(got["spec"].get("internalTrafficPolicy"), None);
    let points =
        json!([{"ip": "198.51.100.1"}, {"ip": "198.51.100.2", "ipMode": "Proxy"}, {"hostname": "a.b"}]);
    let got = defaulted(&SERVICES, json!({"spec": {}, "status": {"loadBalancer": {"ingress": points}}}));
    let modes: Vec<_> = got["status"]["loadBalancer"]["ingress"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p.get("ipMode"))
        .collect();
    assert_eq!(modes, [Some(&json!("VIP")), Some(&json!("Proxy")), None]);
}

#[test]
fn workloads() {
    let got =
        defaulted(&DEPLOYMENTS, json!({"spec": {"template": {"spec": {"containers": [{"image": "a:1"}]}}}}));
    let spec = &got["spec"];
    assert_eq!(
        (&spec["replicas"], &spec["revisionHistoryLimit"], &spec["progressDeadlineSeconds"]),
        (&json!(1), &json!(10), &json!(600))
    );
    assert_eq!(
        spec["strategy"],
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}})
    );
    assert_eq!(spec["template"]["spec"]["restartPolicy"], "Always");
    assert_eq!(spec["template"]["spec"].get("tolerations"), None, "admission does not touch templates");
    let got = defaulted(&DEPLOYMENTS, json!({"spec": {"replicas": 0, "strategy": {"type": "Recreate"}}}));
    assert_eq!(
        (&got["spec"]["replicas"], &got["spec"]["strategy"]),
        (&json!(0), &json!({"type": "Recreate"}))
    );
    assert_eq!(defaulted(&REPLICA_SETS, json!({"spec": {}}))["spec"]["replicas"], 1);
}

#[test]
fn the_rest() {
    let got = defaulted(&SECRETS, json!({"data": {"a": "eA=="}, "stringData": {"b": "secret", "a": "y"}}));
    assert_eq!(got, json!({"type": "Opaque", "data": {"a": "eQ==", "b": "c2VjcmV0"}}));
    let odd = json!({"type": "x", "stringData": {"b": 1}});
    assert_eq!(defaulted(&SECRETS, odd.clone()), odd, "left for validation");
    let got = defaulted(
        &NAMESPACES,
        json!({"metadata": {"name": "n", "labels": {"kubernetes.io/metadata.name": "other"}}}),
    );
    assert_eq!(got["metadata"]["labels"], json!({"kubernetes.io/metadata.name": "n"}));
    let got = defaulted(&NODES, json!({"status": {"capacity": {"cpu": "2000m", "pods": 110}}}));
    assert_eq!(got["status"]["allocatable"], json!({"cpu": "2", "pods": "110"}));
    let got = defaulted(&ENDPOINT_SLICES, json!({"ports": [{"port": 1}]}));
    assert_eq!(got["ports"][0], json!({"port": 1, "name": "", "protocol": "TCP"}));
}

#[test]
fn junk_does_not_panic() {
    for kind in kinds::kinds() {
        for junk in [
            json!(null),
            json!([]),
            json!({"spec": 1, "status": [], "metadata": "x", "data": 3, "stringData": []}),
            json!({"spec": {"containers": 1, "ports": {}, "template": {"spec": []}, "volumes": [1], "tolerations": "x", "strategy": 1}}),
            json!({"spec": {"containers": [1, {"ports": 1, "resources": 1, "image": 2, "env": [3], "lifecycle": 1}]}, "metadata": {}}),
        ] {
            default_object(kind, &mut junk.clone());
        }
    }
}
