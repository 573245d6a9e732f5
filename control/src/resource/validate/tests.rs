//! Objects that pass, and each way to fail: what is changed in a good object, and which field is blamed with what.

mod network_policy;
mod pod;
mod service;
mod workload;

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
