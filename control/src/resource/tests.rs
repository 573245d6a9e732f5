//! All steps of a write together, on objects with damage anywhere: there is always an answer, and what was admitted
//! can be sent back unchanged without a write.

use jiff::Timestamp;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::alloc::ServiceAllocator;
use super::table::IncludeObject;
use super::*;

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn allocator() -> ServiceAllocator {
    ServiceAllocator::new(
        &["10.96.0.0/24".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        (30000, 30010),
    )
    .unwrap()
}

fn good_objects() -> Vec<(&'static Kind, Value)> {
    let pod_spec = json!({
        "containers": [{"name": "a", "image": "i:1", "ports": [{"name": "http", "containerPort": 80, "hostPort": 8080}],
            "env": [{"name": "A", "value": "1"}, {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
            "envFrom": [{"configMapRef": {"name": "c"}}], "volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "x"}],
            "livenessProbe": {"httpGet": {"port": "http", "httpHeaders": [{"name": "X", "value": "y"}]}},
            "lifecycle": {"preStop": {"exec": {"command": ["x"]}}}, "securityContext": {"runAsUser": 1},
            "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": 0.5}}}],
        "initContainers": [{"name": "i", "image": "i"}],
        "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "w", "configMap": {"name": "c", "items": [{"key": "k", "path": "p"}]}}],
        "tolerations": [{"key": "a", "operator": "Exists"}], "nodeSelector": {"a": "b"},
        "dnsConfig": {"nameservers": ["1.1.1.1"]}, "hostAliases": [{"ip": "1.1.1.1", "hostnames": ["h"]}],
    });
    let workload = json!({"metadata": {"name": "w"}, "spec": {"replicas": 2, "selector": {"matchLabels": {"a": "b"}},
        "strategy": {"rollingUpdate": {"maxSurge": 1}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": pod_spec}}});
    vec![
        (
            &kinds::PODS,
            json!({"metadata": {"name": "p", "labels": {"a": "b"}, "finalizers": ["a.b/c"],
            "ownerReferences": [{"apiVersion": "v1", "kind": "K", "name": "o", "uid": "1"}]}, "spec": pod_spec}),
        ),
        (&kinds::DEPLOYMENTS, workload.clone()),
        (&kinds::REPLICA_SETS, workload),
        (
            &kinds::SERVICES,
            json!({"metadata": {"name": "s"}, "spec": {"type": "NodePort", "selector": {"a": "b"},
            "ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4", "IPv6"], "sessionAffinity": "ClientIP",
            "clusterIPs": ["10.96.0.9"], "clusterIP": "10.96.0.9", "externalIPs": ["1.1.1.1"],
            "ports": [{"name": "a", "port": 80, "nodePort": 30001}, {"name": "b", "port": 81, "targetPort": "http", "protocol": "UDP"}]}}),
        ),
        (
            &kinds::NODES,
            json!({"metadata": {"name": "n"}, "spec": {"taints": [{"key": "a", "effect": "NoSchedule"}], "podCIDRs": ["10.0.0.0/24"]},
            "status": {"capacity": {"cpu": 2}, "conditions": [{"type": "Ready", "status": "True"}], "addresses": [{"type": "InternalIP", "address": "1.1.1.1"}]}}),
        ),
        (&kinds::NAMESPACES, json!({"metadata": {"name": "n"}, "spec": {"finalizers": ["kubernetes"]}})),
        (
            &kinds::CONFIG_MAPS,
            json!({"metadata": {"generateName": "c-"}, "data": {"a": "b"}, "binaryData": {"c": "eA=="}}),
        ),
        (
            &kinds::SECRETS,
            json!({"metadata": {"name": "s"}, "data": {"a": "eA=="}, "stringData": {"b": "c"}}),
        ),
        (
            &kinds::EVENTS,
            json!({"metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "p", "namespace": "ns"},
            "count": 2, "firstTimestamp": "2026-01-01T00:00:00Z", "series": {"count": 1, "lastObservedTime": "2026-01-01T00:00:00.000001Z"}}),
        ),
        (
            &kinds::ENDPOINT_SLICES,
            json!({"metadata": {"name": "s"}, "addressType": "IPv4", "ports": [{"name": "a", "port": 80}],
            "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": true}, "targetRef": {"kind": "Pod", "name": "p"}}]}),
        ),
        (
            &kinds::LEASES,
            json!({"metadata": {"name": "l"}, "spec": {"holderIdentity": "h", "leaseDurationSeconds": 40, "renewTime": "2026-01-01T00:00:00.000001Z"}}),
        ),
        (
            &kinds::NETWORK_POLICIES,
            json!({"metadata": {"name": "p"}, "spec": {"podSelector": {"matchLabels": {"a": "b"}},
            "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}], "ports": [{"port": 80, "endPort": 90}]}],
            "egress": [{"to": [{"podSelector": {}, "namespaceSelector": {}}], "ports": [{"port": "web"}]}]}}),
        ),
        (&kinds::SERVICE_ACCOUNTS, json!({"metadata": {"name": "a"}, "secrets": [{"name": "s"}]})),
    ]
}

/// The steps of a create; the object as it would be stored.
fn admit(kind: &Kind, object: Value, allocator: &mut ServiceAllocator) -> Result<Value, ApiError> {
    let stamp = Stamp { now: now(), uid: "u".to_owned(), suffix: "abcde".to_owned() };
    let mut object = object;
    prepare_create(kind, if kind.namespaced { "ns" } else { "" }, &mut object, &stamp)?;
    default_object(kind, &mut object);
    if kind == &kinds::SERVICES {
        let grant = allocator.allocate(&mut object, None)?;
        allocator.commit(grant);
    }
    validate_create(kind, &object)?;
    object["metadata"]["resourceVersion"] = json!("1");
    Ok(object)
}

/// The steps of an update on the main endpoint.
fn amend(
    kind: &Kind,
    new: Value,
    old: &Value,
    allocator: &mut ServiceAllocator,
) -> Result<UpdateOutcome, ApiError> {
    let mut new = new;
    prepare_update(kind, &mut new, old, Subresource::Main, now())?;
    default_object(kind, &mut new);
    if kind == &kinds::SERVICES {
        let grant = allocator.allocate(&mut new, Some(old))?;
        allocator.rollback(grant);
    }
    validate_update(kind, &new, old)?;
    Ok(finish_update(kind, &mut new, old))
}

/// Everything that reads an admitted object.
fn read(kind: &Kind, object: &Value) {
    let index = ObjectIndex::extract(kind, object);
    assert_eq!(&*index.name, object::name(object));
    let row = table::row(kind, object, now(), IncludeObject::Metadata);
    assert_eq!(row["cells"].as_array().unwrap().len(), table::columns(kind).as_array().unwrap().len());
    let planned = plan_delete(kind, object, &DeleteOptions::default(), now()).unwrap();
    assert_ne!(planned, DeleteOutcome::Unchanged, "nothing deletes it yet");
}

#[test]
fn good_objects_are_admitted() {
    for (kind, object) in good_objects() {
        let mut allocator = allocator();
        let stored = admit(kind, object.clone(), &mut allocator).unwrap_or_else(|e| panic!("{e}"));
        read(kind, &stored);
        for sent in [stored.clone(), serde_json::from_str(&stored.to_string()).unwrap()] {
            let outcome = amend(kind, sent, &stored, &mut allocator).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(outcome, UpdateOutcome::Unchanged, "{}", kind.plural);
        }
    }
}

fn junk() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!({})),
        Just(json!([])),
        Just(json!([null])),
        Just(json!([{}])),
        Just(json!({"": ""})),
        Just(json!("")),
        Just(json!("None")),
        Just(json!("10.96.0.300")),
        Just(json!("fd00:96::7")),
        Just(json!("1e18")),
        Just(json!("-1")),
        Just(json!("%")),
        Just(json!("\u{0}é\n")),
        Just(json!(-1)),
        Just(json!(i64::MAX)),
        Just(json!(1e300)),
        Just(json!(u64::MAX)),
        Just(json!(true)),
        "[a-zA-Z0-9:/._-]{0,12}".prop_map(Value::from),
    ]
}

/// Replaces, adds or removes one member or item, found by following `steps`.
fn damage(value: &mut Value, steps: &[u16], junk: &Value) {
    let Some((step, rest)) = steps.split_first() else {
        *value = junk.clone();
        return;
    };
    match value {
        Value::Object(map) if !map.is_empty() => {
            let at = usize::from(*step) % map.len();
            if let Some(inner) = map.values_mut().nth(at) {
                damage(inner, rest, junk);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            let at = usize::from(*step) % (items.len() + 1);
            match items.get_mut(at) {
                Some(item) => damage(item, rest, junk),
                None => items.push(items[0].clone()),
            }
        }
        other => *other = junk.clone(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn damaged_objects_get_an_answer(
        which in 0usize..12, steps in prop::collection::vec(any::<u16>(), 1..7), junk in junk(),
        more in prop::collection::vec(any::<u16>(), 1..7),
    ) {
        let (kind, mut object) = good_objects().swap_remove(which);
        damage(&mut object, &steps, &junk);
        let mut allocator = allocator();
        let stored = match admit(kind, object, &mut allocator) {
            Ok(stored) => stored,
            Err(error) => {
                prop_assert!((400..500).contains(&error.code), "{}", error);
                return Ok(());
            }
        };
        read(kind, &stored);
        let outcome = amend(kind, stored.clone(), &stored, &mut allocator);
        prop_assert_eq!(outcome.map_err(|e| e.message), Ok(UpdateOutcome::Unchanged), "{}", &stored);
        let mut next = stored.clone();
        damage(&mut next, &more, &junk);
        if let Err(error) = amend(kind, next, &stored, &mut allocator) {
            prop_assert!((400..500).contains(&error.code), "{}", error);
        }
    }
}
