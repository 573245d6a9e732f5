//! Objects that pass, and each way to fail: what is changed in a good object, and which field is blamed with what.

use serde_json::{Map, json};

use super::*;
use crate::resource::default::default_object;
use crate::resource::error::Cause;
use crate::resource::kinds::{
    CONFIG_MAPS, DEPLOYMENTS, ENDPOINT_SLICES, EVENTS, LEASES, NAMESPACES, NODES, PODS, REPLICA_SETS,
    SECRETS, SERVICES,
};
use crate::resource::{Subresource, conform};

/// Sets the value at a JSON pointer, making maps on the way; null removes.
fn put(object: &mut Value, pointer: &str, value: Value) {
    let (parent, last) = pointer.rsplit_once('/').unwrap();
    let mut at = object;
    for part in parent.split('/').skip(1) {
        at = match part.parse::<usize>() {
            Ok(i) if at.is_array() => &mut at[i],
            _ => at.as_object_mut().unwrap().entry(part).or_insert_with(|| Value::Object(Map::new())),
        };
    }
    let last = last.replace("~1", "/");
    match (at, last.parse::<usize>()) {
        (Value::Array(list), Ok(i)) if i == list.len() => list.push(value),
        (Value::Array(list), Ok(i)) => list[i] = value,
        (Value::Object(map), _) if value.is_null() => drop(map.remove(&last)),
        (Value::Object(map), _) => drop(map.insert(last, value)),
        (other, _) => panic!("{pointer} leads into {other}"),
    }
}

fn ready(kind: &Kind, mut object: Value) -> Value {
    conform(kind, Subresource::Main, &mut object).unwrap_or_else(|e| panic!("{e}"));
    default_object(kind, &mut object);
    object
}

fn causes(result: Result<(), ApiError>) -> Vec<Cause> {
    result.map_or_else(|e| e.details.map(|d| d.causes).unwrap_or_default(), |()| Vec::new())
}

fn expect(found: &[Cause], field: &str, says: &str, what: &str) {
    let hit = found.iter().any(|c| c.field == field && c.message.contains(says));
    assert!(hit, "{what}: no cause for {field} with {says:?} in {found:#?}");
}

/// Each case is a pointer, a value, the field that is blamed and what the message says.
type Cases<'a> = &'a [(&'a str, Value, &'a str, &'a str)];

fn creates(kind: &Kind, good: &Value, cases: Cases<'_>) {
    assert_eq!(causes(validate_create(kind, &ready(kind, good.clone()))), [], "the good object");
    for (pointer, value, field, says) in cases {
        let mut bad = good.clone();
        put(&mut bad, pointer, value.clone());
        let found = causes(validate_create(kind, &ready(kind, bad)));
        expect(&found, field, says, &format!("{pointer}={value}"));
    }
}

fn accepted(kind: &Kind, good: &Value, cases: &[(&str, Value)]) {
    for (pointer, value) in cases {
        let mut other = good.clone();
        put(&mut other, pointer, value.clone());
        assert_eq!(causes(validate_create(kind, &ready(kind, other))), [], "{pointer}={value}");
    }
}

/// Updates of a good object: the same cases, with an empty field where the change must be let in.
fn updates(kind: &Kind, good: &Value, cases: Cases<'_>) {
    let old = ready(kind, good.clone());
    for (pointer, value, field, says) in cases {
        let mut new = good.clone();
        put(&mut new, pointer, value.clone());
        let found = causes(validate_update(kind, &ready(kind, new), &old));
        if field.is_empty() {
            assert_eq!(found, [], "{pointer}={value}");
        } else {
            expect(&found, field, says, &format!("{pointer}={value}"));
        }
    }
}

fn config_map() -> Value {
    json!({"metadata": {"name": "c", "namespace": "n"}, "data": {"a": "b"}})
}

fn pod() -> Value {
    json!({
        "metadata": {"name": "p", "namespace": "n"},
        "spec": {
            "containers": [{"name": "a", "image": "i:1", "ports": [{"name": "http", "containerPort": 80}],
                "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                "env": [{"name": "A", "value": "1"}],
                "livenessProbe": {"httpGet": {"port": "http"}},
                "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}}],
            "volumes": [{"name": "v", "emptyDir": {}}],
        },
    })
}

#[test]
fn metadata() {
    creates(
        &CONFIG_MAPS,
        &config_map(),
        &[
            ("/metadata/name", json!("Big"), "metadata.name", "RFC 1123 subdomain"),
            ("/metadata/namespace", json!("a.b"), "metadata.namespace", "RFC 1123 label"),
            ("/metadata/labels", json!({"-a": "b"}), "metadata.labels", "name part"),
            ("/metadata/labels", json!({"x.y/a": "b c"}), "metadata.labels[x.y/a]", "label value"),
            ("/metadata/annotations", json!({"a b": "c"}), "metadata.annotations", "name part"),
            (
                "/metadata/annotations",
                json!({"a": "x".repeat(300 << 10)}),
                "metadata.annotations",
                "Too long",
            ),
            ("/metadata/finalizers", json!(["cleanup"]), "metadata.finalizers[0]", "domain prefix"),
            ("/metadata/finalizers", json!(["a b/c"]), "metadata.finalizers[0]", "prefix"),
            (
                "/metadata/ownerReferences",
                json!([{"kind": "K"}]),
                "metadata.ownerReferences[0].uid",
                "Required",
            ),
            (
                "/metadata/ownerReferences",
                json!([{"apiVersion": "v1", "kind": "K", "name": "a", "uid": "1", "controller": true},
                    {"apiVersion": "v1", "kind": "K", "name": "b", "uid": "2", "controller": true}]),
                "metadata.ownerReferences[1].controller",
                "only one",
            ),
        ],
    );
    accepted(
        &CONFIG_MAPS,
        &config_map(),
        &[
            ("/metadata/name", json!("kube-root-ca.crt")),
            ("/metadata/annotations", json!({"Example.COM/Key": "any\nthing"})),
            ("/metadata/finalizers", json!(["orphan", "foregroundDeletion", "example.com/x"])),
        ],
    );
    let services = json!({"metadata": {"name": "1a", "namespace": "n"}, "spec": {"ports": [{"port": 80}]}});
    let found = causes(validate_create(&SERVICES, &ready(&SERVICES, services)));
    expect(&found, "metadata.name", "start with a letter", "service names");
}

#[test]
fn deleting_objects_take_no_new_finalizers() {
    let mut old = config_map();
    put(&mut old, "/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z"));
    put(&mut old, "/metadata/finalizers", json!(["a.b/c"]));
    updates(
        &CONFIG_MAPS,
        &old,
        &[
            ("/metadata/finalizers", json!(["a.b/c", "a.b/d"]), "metadata.finalizers", "being deleted"),
            ("/metadata/finalizers", json!([]), "", ""),
        ],
    );
}

#[test]
fn pods() {
    creates(
        &PODS,
        &pod(),
        &[
            ("/spec", Value::Null, "spec", "Required"),
            ("/spec/containers", json!([]), "spec.containers", "Required"),
            (
                "/spec/restartPolicy",
                json!("Sometimes"),
                "spec.restartPolicy",
                "\"Always\", \"OnFailure\", \"Never\"",
            ),
            ("/spec/dnsPolicy", json!("X"), "spec.dnsPolicy", "supported values"),
            ("/spec/dnsPolicy", json!("None"), "spec.dnsConfig.nameservers", "at least one"),
            ("/spec/dnsConfig", json!({"nameservers": ["x"]}), "spec.dnsConfig.nameservers[0]", "IP address"),
            (
                "/spec/dnsConfig",
                json!({"nameservers": ["1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"]}),
                "spec.dnsConfig.nameservers",
                "at most 3",
            ),
            ("/spec/dnsConfig", json!({"searches": ["-x"]}), "spec.dnsConfig.searches[0]", "subdomain"),
            (
                "/spec/terminationGracePeriodSeconds",
                json!(-1),
                "spec.terminationGracePeriodSeconds",
                "greater than or equal to 0",
            ),
            ("/spec/activeDeadlineSeconds", json!(0), "spec.activeDeadlineSeconds", "between 1"),
            ("/spec/hostname", json!("a.b"), "spec.hostname", "label"),
            ("/spec/serviceAccountName", json!("A"), "spec.serviceAccountName", "subdomain"),
            ("/spec/nodeName", json!("A"), "spec.nodeName", "subdomain"),
            ("/spec/nodeSelector", json!({"a": "b c"}), "spec.nodeSelector.a", "label value"),
            (
                "/spec/hostAliases",
                json!([{"ip": "x", "hostnames": ["A"]}]),
                "spec.hostAliases[0].hostnames[0]",
                "subdomain",
            ),
            (
                "/spec/tolerations",
                json!([{"operator": "Equal"}]),
                "spec.tolerations[0].operator",
                "must be Exists",
            ),
            (
                "/spec/tolerations",
                json!([{"key": "a", "operator": "Exists", "value": "b"}]),
                "spec.tolerations[0].value",
                "must be empty",
            ),
            (
                "/spec/tolerations",
                json!([{"key": "a", "operator": "In"}]),
                "spec.tolerations[0].operator",
                "supported values",
            ),
            (
                "/spec/tolerations",
                json!([{"key": "a", "effect": "NoSchedule", "tolerationSeconds": 1}]),
                "spec.tolerations[0].effect",
                "NoExecute",
            ),
            (
                "/spec/securityContext",
                json!({"runAsUser": -1}),
                "spec.securityContext.runAsUser",
                "between 0",
            ),
            (
                "/spec/securityContext",
                json!({"supplementalGroups": [-1]}),
                "spec.securityContext.supplementalGroups[0]",
                "between 0",
            ),
            (
                "/spec/securityContext",
                json!({"seccompProfile": {"type": "Localhost"}}),
                "spec.securityContext.seccompProfile.localhostProfile",
                "Required",
            ),
            (
                "/spec/securityContext",
                json!({"seccompProfile": {"type": "Nope"}}),
                "spec.securityContext.seccompProfile.type",
                "supported",
            ),
            (
                "/spec/readinessGates",
                json!([{"conditionType": "a b"}]),
                "spec.readinessGates[0].conditionType",
                "name part",
            ),
            ("/status/phase", json!("Dancing"), "status.phase", "supported values"),
        ],
    );
}

#[test]
fn features_that_would_be_missed_are_refused() {
    let required = json!({"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "a"}]});
    creates(
        &PODS,
        &pod(),
        &[
            (
                "/spec/ephemeralContainers",
                json!([{"name": "d"}]),
                "spec.ephemeralContainers",
                "not supported",
            ),
            ("/spec/runtimeClassName", json!("kata"), "spec.runtimeClassName", "not supported"),
            ("/spec/priorityClassName", json!("high"), "spec.priorityClassName", "not supported"),
            ("/spec/hostUsers", json!(false), "spec.hostUsers", "user namespaces"),
            ("/spec/os", json!({"name": "windows"}), "spec.os.name", "\"linux\""),
            ("/spec/schedulingGates", json!([{"name": "g"}]), "spec.schedulingGates", "not supported"),
            (
                "/spec/affinity/podAntiAffinity",
                required.clone(),
                "spec.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution",
                "nodeSelector",
            ),
            (
                "/spec/topologySpreadConstraints",
                json!([{"maxSkew": 1, "topologyKey": "a", "whenUnsatisfiable": "DoNotSchedule"}]),
                "spec.topologySpreadConstraints[0].whenUnsatisfiable",
                "ScheduleAnyway",
            ),
            (
                "/spec/volumes/0",
                json!({"name": "v", "persistentVolumeClaim": {"claimName": "x"}}),
                "spec.volumes[0].persistentVolumeClaim",
                "not supported",
            ),
            (
                "/spec/volumes/0",
                json!({"name": "v", "nfs": {"server": "x", "path": "/"}}),
                "spec.volumes[0].nfs",
                "use one of",
            ),
            (
                "/spec/containers/0/volumeDevices",
                json!([{"name": "v", "devicePath": "/dev/x"}]),
                "spec.containers[0].volumeDevices",
                "not supported",
            ),
            (
                "/spec/containers/0/resources/claims",
                json!([{"name": "x"}]),
                "spec.containers[0].resources.claims",
                "not supported",
            ),
        ],
    );
    accepted(
        &PODS,
        &pod(),
        &[
            (
                "/spec/affinity/podAntiAffinity",
                json!({"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1}]}),
            ),
            ("/spec/topologySpreadConstraints", json!([{"whenUnsatisfiable": "ScheduleAnyway"}])),
            ("/spec/hostUsers", json!(true)),
        ],
    );
}

#[test]
fn containers() {
    let field = |name: &str| format!("spec.containers[0].{name}");
    let fields: Vec<(String, String, Value, &str)> = [
        ("name", "name", Value::Null, "Required"),
        ("name", "name", json!("A"), "label"),
        ("image", "image", Value::Null, "Required"),
        ("image", "image", json!(" i"), "whitespace"),
        ("imagePullPolicy", "imagePullPolicy", json!("X"), "supported"),
        ("terminationMessagePolicy", "terminationMessagePolicy", json!("X"), "supported"),
        ("restartPolicy", "restartPolicy", json!("Always"), "init containers"),
        ("ports/0/containerPort", "ports[0].containerPort", Value::Null, "Required"),
        ("ports/0/containerPort", "ports[0].containerPort", json!(70000), "between 1 and 65535"),
        ("ports/0/protocol", "ports[0].protocol", json!("ICMP"), "supported"),
        ("ports/0/name", "ports[0].name", json!("toolongforaportname"), "15"),
        ("ports/1", "ports[1].name", json!({"name": "http", "containerPort": 81}), "Duplicate"),
        ("ports/0/hostPort", "ports[0].hostPort", json!(-1), "between 1"),
        ("env/0/name", "env[0].name", json!("A=B"), "environment variable"),
        (
            "env/0/valueFrom",
            "env[0].valueFrom",
            json!({"fieldRef": {"fieldPath": "metadata.name"}}),
            "`value` is not empty",
        ),
        ("env/0", "env[0].valueFrom", json!({"name": "A", "valueFrom": {}}), "exactly one"),
        (
            "env/0",
            "env[0].valueFrom.fieldRef.fieldPath",
            json!({"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}),
            "supported",
        ),
        (
            "env/0",
            "env[0].valueFrom.fieldRef.fieldPath",
            json!({"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a"}}}),
            "must end",
        ),
        (
            "env/0",
            "env[0].valueFrom.configMapKeyRef.key",
            json!({"name": "A", "valueFrom": {"configMapKeyRef": {"name": "c"}}}),
            "Required",
        ),
        (
            "env/0",
            "env[0].valueFrom.secretKeyRef.name",
            json!({"name": "A", "valueFrom": {"secretKeyRef": {"key": "c"}}}),
            "Required",
        ),
        (
            "env/0",
            "env[0].valueFrom.resourceFieldRef.resource",
            json!({"name": "A", "valueFrom": {"resourceFieldRef": {"resource": "x"}}}),
            "supported",
        ),
        ("envFrom", "envFrom[0]", json!([{}]), "one of configMapRef"),
        ("envFrom", "envFrom[0].configMapRef.name", json!([{"configMapRef": {}}]), "Required"),
        (
            "envFrom",
            "envFrom[0]",
            json!([{"configMapRef": {"name": "a"}, "secretRef": {"name": "b"}}]),
            "both",
        ),
        ("volumeMounts/0/name", "volumeMounts[0].name", json!("w"), "Not found: \"w\""),
        ("volumeMounts/0/mountPath", "volumeMounts[0].mountPath", Value::Null, "Required"),
        ("volumeMounts/0/mountPath", "volumeMounts[0].mountPath", json!("a:b"), "':'"),
        ("volumeMounts/0/subPath", "volumeMounts[0].subPath", json!("../x"), "'..'"),
        ("volumeMounts/0/subPath", "volumeMounts[0].subPath", json!("/x"), "relative"),
        (
            "volumeMounts/0/mountPropagation",
            "volumeMounts[0].mountPropagation",
            json!("Bidirectional"),
            "privileged",
        ),
        ("volumeMounts/1", "volumeMounts[1].mountPath", json!({"name": "v", "mountPath": "/v"}), "unique"),
        ("resources/requests/cpu", "resources.requests.cpu", json!("2"), "cpu limit of 1"),
        ("resources/limits/memory", "resources.limits.memory", json!("-1"), "greater than or equal to 0"),
        ("resources/limits/disk", "resources.limits.disk", json!("1"), "domain"),
        ("resources/requests/a.b~1gpu", "resources.requests[a.b/gpu]", json!("1"), "limit must be set"),
        ("resources/limits/a.b~1gpu", "resources.limits[a.b/gpu]", json!("500m"), "integer"),
        ("livenessProbe/httpGet/port", "livenessProbe.httpGet.port", json!(0), "between 1"),
        ("livenessProbe/httpGet/port", "livenessProbe.httpGet.port", json!("a_b"), "port name"),
        ("livenessProbe/httpGet/scheme", "livenessProbe.httpGet.scheme", json!("FTP"), "supported"),
        ("livenessProbe/exec", "livenessProbe.httpGet", json!({"command": ["x"]}), "more than 1 handler"),
        (
            "livenessProbe/periodSeconds",
            "livenessProbe.periodSeconds",
            json!(0),
            "greater than or equal to 1",
        ),
        ("livenessProbe/successThreshold", "livenessProbe.successThreshold", json!(2), "must be 1"),
        ("readinessProbe", "readinessProbe", json!({}), "handler type"),
        ("readinessProbe", "readinessProbe.exec.command", json!({"exec": {}}), "Required"),
        (
            "readinessProbe",
            "readinessProbe.terminationGracePeriodSeconds",
            json!({"tcpSocket": {"port": 1}, "terminationGracePeriodSeconds": 1}),
            "readiness",
        ),
        ("lifecycle", "lifecycle.preStop", json!({"preStop": {}}), "handler type"),
        (
            "securityContext",
            "securityContext.allowPrivilegeEscalation",
            json!({"privileged": true, "allowPrivilegeEscalation": false}),
            "privileged",
        ),
        (
            "securityContext",
            "securityContext.allowPrivilegeEscalation",
            json!({"capabilities": {"add": ["SYS_ADMIN"]}, "allowPrivilegeEscalation": false}),
            "SYS_ADMIN",
        ),
    ]
    .into_iter()
    .map(|(pointer, blamed, value, says)| {
        (format!("/spec/containers/0/{pointer}"), field(blamed), value, says)
    })
    .collect();
    let cases: Vec<(&str, Value, &str, &str)> =
        fields.iter().map(|(p, f, v, s)| (p.as_str(), v.clone(), f.as_str(), *s)).collect();
    creates(&PODS, &pod(), &cases);
    creates(
        &PODS,
        &pod(),
        &[
            (
                "/spec/containers/1",
                json!({"name": "a", "image": "i"}),
                "spec.containers[1].name",
                "Duplicate",
            ),
            (
                "/spec/initContainers",
                json!([{"name": "a", "image": "i"}]),
                "spec.containers[0].name",
                "Duplicate",
            ),
            (
                "/spec/initContainers",
                json!([{"name": "i", "image": "i", "readinessProbe": {"exec": {"command": ["x"]}}}]),
                "spec.initContainers[0].readinessProbe",
                "restartPolicy=Always",
            ),
            (
                "/spec/initContainers",
                json!([{"name": "i", "image": "i", "restartPolicy": "Never"}]),
                "spec.initContainers[0].restartPolicy",
                "supported",
            ),
        ],
    );
    let mut two = pod();
    put(&mut two, "/spec/containers/0/ports/0/hostPort", json!(80));
    put(
        &mut two,
        "/spec/containers/1",
        json!({"name": "b", "image": "i", "ports": [{"containerPort": 81, "hostPort": 80}]}),
    );
    expect(
        &causes(validate_create(&PODS, &ready(&PODS, two.clone()))),
        "spec.containers[1].ports[0].hostPort",
        "80/TCP",
        "host ports",
    );
    put(&mut two, "/spec/containers/1/ports/0/protocol", json!("UDP"));
    assert_eq!(causes(validate_create(&PODS, &ready(&PODS, two))), [], "protocols have ports of their own");
    let mut host = pod();
    put(&mut host, "/spec/hostNetwork", json!(true));
    put(&mut host, "/spec/containers/0/ports/0/hostPort", json!(81));
    expect(
        &causes(validate_create(&PODS, &ready(&PODS, host))),
        "spec.containers[0].ports[0].hostPort",
        "must match",
        "host network",
    );
}

#[test]
fn good_containers() {
    accepted(
        &PODS,
        &pod(),
        &[
            (
                "/spec/initContainers",
                json!([{"name": "i", "image": "i"}, {"name": "s", "image": "s", "restartPolicy": "Always",
                "startupProbe": {"exec": {"command": ["true"]}}}]),
            ),
            (
                "/spec/containers/0/env/1",
                json!({"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a.b/c']"}}}),
            ),
            (
                "/spec/containers/0/env/1",
                json!({"name": "B", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}),
            ),
            (
                "/spec/containers/0/env/1",
                json!({"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": true}}}),
            ),
            ("/spec/containers/0/resources", json!({"limits": {"a.b/gpu": "1"}})),
            ("/spec/containers/0/resources", json!({"limits": {"cpu": "0.1"}, "requests": {"cpu": "100m"}})),
            ("/spec/containers/0/lifecycle", json!({"preStop": {"sleep": {"seconds": 5}}})),
            ("/spec/containers/0/readinessProbe", json!({"tcpSocket": {"port": 80}, "successThreshold": 3})),
            ("/spec/containers/0/readinessProbe", json!({"grpc": {"port": 80}})),
        ],
    );
}

#[test]
fn volumes() {
    let v = |source: Value| {
        let mut volume = json!({"name": "v"});
        volume.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
        volume
    };
    creates(
        &PODS,
        &pod(),
        &[
            ("/spec/volumes/0/name", json!("A"), "spec.volumes[0].name", "label"),
            ("/spec/volumes/1", json!({"name": "v"}), "spec.volumes[1].name", "Duplicate"),
            (
                "/spec/volumes/0/hostPath",
                json!({"path": "/x"}),
                "spec.volumes[0].hostPath",
                "more than 1 volume type",
            ),
            ("/spec/volumes/0", v(json!({"hostPath": {}})), "spec.volumes[0].hostPath.path", "Required"),
            (
                "/spec/volumes/0",
                v(json!({"hostPath": {"path": "/a/../b"}})),
                "spec.volumes[0].hostPath.path",
                "'..'",
            ),
            (
                "/spec/volumes/0",
                v(json!({"hostPath": {"path": "a"}})),
                "spec.volumes[0].hostPath.path",
                "absolute",
            ),
            (
                "/spec/volumes/0",
                v(json!({"hostPath": {"path": "/a", "type": "Dir"}})),
                "spec.volumes[0].hostPath.type",
                "supported",
            ),
            (
                "/spec/volumes/0",
                v(json!({"emptyDir": {"medium": "Gold"}})),
                "spec.volumes[0].emptyDir.medium",
                "Memory",
            ),
            (
                "/spec/volumes/0",
                v(json!({"emptyDir": {"sizeLimit": "-1"}})),
                "spec.volumes[0].emptyDir.sizeLimit",
                "greater",
            ),
            ("/spec/volumes/0", v(json!({"configMap": {}})), "spec.volumes[0].configMap.name", "Required"),
            (
                "/spec/volumes/0",
                v(json!({"secret": {"secretName": "s", "defaultMode": 1000}})),
                "spec.volumes[0].secret.defaultMode",
                "511",
            ),
            (
                "/spec/volumes/0",
                v(json!({"secret": {"secretName": "s", "items": [{"key": "k", "path": "../p"}]}})),
                "spec.volumes[0].secret.items[0].path",
                "'..'",
            ),
            (
                "/spec/volumes/0",
                v(json!({"downwardAPI": {"items": [{"path": "p"}]}})),
                "spec.volumes[0].downwardAPI.items[0]",
                "one of fieldRef",
            ),
            (
                "/spec/volumes/0",
                v(json!({"projected": {"sources": []}})),
                "spec.volumes[0].projected.sources",
                "Required",
            ),
            (
                "/spec/volumes/0",
                v(json!({"projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}})),
                "spec.volumes[0].projected.sources[0].serviceAccountToken",
                "not supported",
            ),
        ],
    );
    accepted(
        &PODS,
        &pod(),
        &[
            ("/spec/volumes/0", v(json!({}))),
            ("/spec/volumes/0", v(json!({"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}))),
            ("/spec/volumes/0", v(json!({"hostPath": {"path": "/a", "type": "DirectoryOrCreate"}}))),
            (
                "/spec/volumes/0",
                v(
                    json!({"projected": {"sources": [{"configMap": {"name": "c"}}, {"secret": {"name": "s"}}]}}),
                ),
            ),
        ],
    );
}

#[test]
fn pod_updates() {
    let mut good = pod();
    put(&mut good, "/spec/activeDeadlineSeconds", json!(100));
    put(
        &mut good,
        "/spec/tolerations",
        json!([{"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1}]),
    );
    updates(
        &PODS,
        &good,
        &[
            ("/metadata/labels", json!({"a": "b"}), "", ""),
            ("/spec/containers/0/image", json!("i:2"), "", ""),
            ("/spec/activeDeadlineSeconds", json!(50), "", ""),
            ("/spec/activeDeadlineSeconds", json!(500), "spec.activeDeadlineSeconds", "lowered"),
            ("/spec/activeDeadlineSeconds", Value::Null, "spec.activeDeadlineSeconds", "lowered"),
            ("/spec/tolerations/1", json!({"key": "b", "operator": "Exists"}), "", ""),
            ("/spec/tolerations/0/tolerationSeconds", json!(9), "", ""),
            ("/spec/tolerations/0/key", json!("c"), "spec.tolerations", "existing tolerations"),
            ("/spec/containers/0/args", json!(["x"]), "spec", "`spec.containers[0]` differs"),
            ("/spec/containers/1", json!({"name": "b", "image": "i"}), "spec", "`spec.containers` differs"),
            ("/spec/restartPolicy", json!("Never"), "spec", "`spec.restartPolicy` differs"),
            ("/spec/containers/0/image", json!(""), "spec.containers[0].image", "Required"),
        ],
    );
    let mut bare = pod();
    put(&mut bare, "/spec/containers/0/image", json!("i:3"));
    assert_eq!(
        causes(validate_update(&PODS, &ready(&PODS, bare), &pod())),
        [],
        "stored without the defaults of today"
    );
}

#[test]
fn what_stays_is_not_checked_again() {
    let mut old = ready(&PODS, pod());
    put(&mut old, "/spec/runtimeClassName", json!("kata"));
    let mut new = old.clone();
    put(&mut new, "/status/phase", json!("Running"));
    assert_eq!(causes(validate_update(&PODS, &new, &old)), []);
}

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

#[test]
fn config_maps_and_secrets() {
    creates(
        &CONFIG_MAPS,
        &config_map(),
        &[
            ("/data/a~1b", json!("x"), "data", "a key must consist"),
            ("/binaryData/a", json!("eA=="), "data.a", "binaryData"),
            ("/data/big", json!("x".repeat(1 << 20)), "", "Too long"),
        ],
    );
    let mut fixed = config_map();
    put(&mut fixed, "/immutable", json!(true));
    updates(
        &CONFIG_MAPS,
        &fixed,
        &[
            ("/data/a", json!("c"), "data", "immutable"),
            ("/immutable", json!(false), "immutable", "immutable"),
            ("/metadata/labels", json!({"a": "b"}), "", ""),
        ],
    );
    let secret = json!({"metadata": {"name": "s", "namespace": "n"}, "data": {"a": "eA=="}});
    creates(
        &SECRETS,
        &secret,
        &[
            ("/data/..x", json!("eA=="), "data", "'..'"),
            ("/type", json!("kubernetes.io/tls"), "data[tls.key]", "Required"),
            ("/type", json!("kubernetes.io/basic-auth"), "data.username", "one of"),
        ],
    );
    let docker = json!({"metadata": {"name": "s", "namespace": "n"}, "type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": "e30="}});
    creates(
        &SECRETS,
        &docker,
        &[("/data/.dockerconfigjson", json!("eA=="), "data[.dockerconfigjson]", "JSON object")],
    );
    updates(
        &SECRETS,
        &secret,
        &[("/type", json!("a/b"), "type", "immutable"), ("/data/a", json!("eQ=="), "", "")],
    );
}

#[test]
fn cluster_kinds() {
    let node = json!({"metadata": {"name": "n1"}, "spec": {"providerID": "x", "taints": [{"key": "a", "effect": "NoSchedule"}]}});
    creates(
        &NODES,
        &node,
        &[
            ("/spec/taints/0/effect", Value::Null, "spec.taints[0].effect", "Required"),
            ("/spec/taints/0/effect", json!("Never"), "spec.taints[0].effect", "supported"),
            ("/spec/taints/0/key", json!("a b"), "spec.taints[0].key", "name part"),
            (
                "/spec/taints/1",
                json!({"key": "a", "effect": "NoSchedule", "value": "b"}),
                "spec.taints[1]",
                "a:NoSchedule",
            ),
            ("/spec/podCIDRs", json!(["x"]), "spec.podCIDRs[0]", "CIDR"),
            ("/status/capacity", json!({"cpu": "-1"}), "status.capacity.cpu", "greater"),
        ],
    );
    updates(
        &NODES,
        &node,
        &[
            ("/spec/providerID", json!("y"), "spec.providerID", "once set"),
            ("/spec/unschedulable", json!(true), "", ""),
        ],
    );
    let namespace = json!({"metadata": {"name": "ns"}, "spec": {"finalizers": ["kubernetes"]}});
    creates(
        &NAMESPACES,
        &namespace,
        &[
            ("/metadata/name", json!("a.b"), "metadata.name", "label"),
            ("/spec/finalizers", json!(["x"]), "spec.finalizers[0]", "domain"),
        ],
    );
}

#[test]
fn events_slices_and_leases() {
    let event = json!({"metadata": {"name": "e", "namespace": "n"}, "involvedObject": {"kind": "Pod", "namespace": "n"}});
    creates(
        &EVENTS,
        &event,
        &[
            ("/involvedObject/namespace", json!("m"), "involvedObject.namespace", "does not match"),
            ("/involvedObject/namespace", Value::Null, "involvedObject.namespace", "default"),
        ],
    );
    let of_node = json!({"metadata": {"name": "e", "namespace": "default"}, "involvedObject": {"kind": "Node", "name": "n1"}});
    assert_eq!(causes(validate_create(&EVENTS, &ready(&EVENTS, of_node))), []);
    let slice = json!({"metadata": {"name": "s", "namespace": "n"}, "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.0.0.1"], "nodeName": "n1"}], "ports": [{"name": "a", "port": 80}]});
    let many: Vec<Value> = (0..1001).map(|_| json!({"addresses": ["10.0.0.1"]})).collect();
    creates(
        &ENDPOINT_SLICES,
        &slice,
        &[
            ("/addressType", Value::Null, "addressType", "Required"),
            ("/addressType", json!("IPX"), "addressType", "supported"),
            ("/addressType", json!("IPv6"), "endpoints[0].addresses[0]", "IPv6"),
            ("/endpoints/0/addresses", json!([]), "endpoints[0].addresses", "at least 1"),
            ("/endpoints/0/addresses", json!(["169.254.1.1"]), "endpoints[0].addresses[0]", "link-local"),
            ("/endpoints/0/addresses", json!(["x"]), "endpoints[0].addresses[0]", "IPv4"),
            ("/endpoints/0/hostname", json!("A"), "endpoints[0].hostname", "label"),
            ("/endpoints", Value::Array(many), "endpoints", "at most 1000"),
            ("/ports/0/port", json!(0), "ports[0].port", "between"),
            ("/ports/1", json!({"name": "a", "port": 81}), "ports[1].name", "Duplicate"),
        ],
    );
    updates(
        &ENDPOINT_SLICES,
        &slice,
        &[("/addressType", json!("FQDN"), "addressType", "immutable"), ("/endpoints", json!([]), "", "")],
    );
    let lease = json!({"metadata": {"name": "l", "namespace": "n"}, "spec": {"holderIdentity": "h", "leaseDurationSeconds": 40}});
    creates(
        &LEASES,
        &lease,
        &[
            ("/spec/leaseDurationSeconds", json!(0), "spec.leaseDurationSeconds", "1"),
            ("/spec/leaseTransitions", json!(-1), "spec.leaseTransitions", "0"),
            ("/spec/holderIdentity", json!(""), "spec.holderIdentity", "empty"),
        ],
    );
}

#[test]
fn causes_are_bounded() {
    let containers: Vec<Value> = (0..200).map(|_| json!({})).collect();
    let mut bad = pod();
    put(&mut bad, "/spec/containers", Value::Array(containers));
    assert_eq!(causes(validate_create(&PODS, &ready(&PODS, bad))).len(), 50);
}
