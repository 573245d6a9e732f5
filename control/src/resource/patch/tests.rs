//! Patches against expected results, and the promises that hold for any patch.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::resource::kinds::{CONFIG_MAPS, DEPLOYMENTS, NODES, PODS, SERVICES};

fn patched(kind: &Kind, t: PatchType, current: &Value, patch: &Value) -> Value {
    apply_patch(kind, t, current, patch.to_string().as_bytes()).unwrap_or_else(|e| panic!("{patch}: {e}"))
}

fn strategic(kind: &Kind, current: Value, patch: Value) -> Value {
    patched(kind, PatchType::Strategic, &current, &patch)
}

fn refused(kind: &Kind, t: PatchType, current: &Value, patch: &str) -> ApiError {
    apply_patch(kind, t, current, patch.as_bytes()).expect_err(patch)
}

fn pod(containers: Value) -> Value {
    json!({"spec": {"containers": containers}})
}

#[test]
fn media_types() {
    for (text, expected) in [
        ("application/json-patch+json", PatchType::Json),
        ("application/merge-patch+json; charset=utf-8", PatchType::Merge),
        ("application/strategic-merge-patch+json", PatchType::Strategic),
        ("Application/Apply-Patch+YAML", PatchType::Apply),
    ] {
        assert_eq!(PatchType::from_content_type(text).unwrap(), expected);
    }
    assert_eq!(PatchType::from_content_type("application/json").unwrap_err().code, 415);
    assert_eq!(PatchType::from_content_type("").unwrap_err().code, 415);
}

#[test]
fn a_list_given_as_a_whole_may_hold_a_key_twice() {
    let addresses = json!([{"type": "InternalIP", "address": "192.0.2.1"}, {"type": "InternalIP", "address": "2001:db8::1"}]);
    let patch = json!({"status": {"addresses": [
        {"$patch": "replace"}, {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "InternalIP", "address": "2001:db8::1"}
    ]}});
    for current in
        [json!({}), json!({"status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]}})]
    {
        assert_eq!(strategic(&NODES, current, patch.clone())["status"]["addresses"], addresses);
    }
}

#[test]
fn strategic_merges_lists_by_key() {
    let cases = [
        (
            "image of one container",
            json!([{"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"}]),
            json!([{"name": "b", "image": "2"}]),
            json!([{"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "2"}]),
        ),
        ("added", json!([{"name": "a"}]), json!([{"name": "b"}]), json!([{"name": "a"}, {"name": "b"}])),
        (
            "deleted",
            json!([{"name": "a"}, {"name": "b"}]),
            json!([{"name": "a", "$patch": "delete"}]),
            json!([{"name": "b"}]),
        ),
        (
            "list replaced",
            json!([{"name": "a"}, {"name": "b"}]),
            json!([{"$patch": "replace"}, {"name": "c"}]),
            json!([{"name": "c"}]),
        ),
        (
            "item replaced",
            json!([{"name": "a", "image": "1", "args": ["x"]}]),
            json!([{"name": "a", "image": "2", "$patch": "replace"}]),
            json!([{"name": "a", "image": "2"}]),
        ),
        (
            "env and mounts",
            json!([{"name": "a", "env": [{"name": "X", "value": "1"}], "volumeMounts": [{"mountPath": "/d", "name": "v"}]}]),
            json!([{"name": "a", "env": [{"name": "Y", "value": "2"}, {"name": "X", "value": null, "valueFrom": {"fieldRef": {"fieldPath": "f"}}}],
                "volumeMounts": [{"mountPath": "/d", "readOnly": true}]}]),
            json!([{"name": "a", "env": [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "f"}}}, {"name": "Y", "value": "2"}],
                "volumeMounts": [{"mountPath": "/d", "name": "v", "readOnly": true}]}]),
        ),
        (
            "atomic args",
            json!([{"name": "a", "args": ["x", "y"]}]),
            json!([{"name": "a", "args": ["z"]}]),
            json!([{"name": "a", "args": ["z"]}]),
        ),
        (
            "ports by containerPort",
            json!([{"name": "a", "ports": [{"containerPort": 80, "protocol": "TCP"}]}]),
            json!([{"name": "a", "ports": [{"containerPort": 80, "name": "http"}, {"containerPort": 81}]}]),
            json!([{"name": "a", "ports": [{"containerPort": 80, "protocol": "TCP", "name": "http"}, {"containerPort": 81}]}]),
        ),
    ];
    for (what, before, patch, after) in cases {
        assert_eq!(strategic(&PODS, pod(before), pod(patch)), pod(after), "{what}");
    }
}

#[test]
fn strategic_handles_directives() {
    let cases = [
        (
            "delete a map",
            json!({"spec": {"a": {"x": 1}, "b": 1}}),
            json!({"spec": {"a": {"$patch": "delete"}}}),
            json!({"spec": {"a": {}, "b": 1}}),
        ),
        (
            "replace a map",
            json!({"spec": {"securityContext": {"runAsUser": 1, "fsGroup": 2}}}),
            json!({"spec": {"securityContext": {"$patch": "replace", "fsGroup": 3}}}),
            json!({"spec": {"securityContext": {"fsGroup": 3}}}),
        ),
        (
            "retain keys",
            json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}}),
            json!({"spec": {"volumes": [{"$retainKeys": ["name", "configMap"], "name": "v", "configMap": {"name": "c"}}]}}),
            json!({"spec": {"volumes": [{"name": "v", "configMap": {"name": "c"}}]}}),
        ),
        (
            "finalizers",
            json!({"metadata": {"finalizers": ["a/a", "b/b"]}}),
            json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a/a"], "finalizers": ["c/c", "b/b"],
                "$setElementOrder/finalizers": ["c/c", "b/b"]}}),
            json!({"metadata": {"finalizers": ["c/c", "b/b"]}}),
        ),
        (
            "null deletes",
            json!({"metadata": {"labels": {"a": "1", "b": "2"}}}),
            json!({"metadata": {"labels": {"a": null, "c": "3", "d": null}}}),
            json!({"metadata": {"labels": {"b": "2", "c": "3"}}}),
        ),
        (
            "atomic tolerations, directives dropped",
            json!({"spec": {"tolerations": [{"key": "a"}]}}),
            json!({"spec": {"tolerations": [{"$patch": "replace"}, {"key": "b", "x": null}, {"key": "c", "$patch": "delete"}]}}),
            json!({"spec": {"tolerations": [{"key": "b"}]}}),
        ),
        (
            "directives in new parts",
            json!({}),
            json!({"spec": {"$setElementOrder/containers": [{"name": "a"}], "containers": [{"name": "a",
                "$setElementOrder/env": [{"name": "X"}], "env": [{"name": "X", "value": "1"}, {"name": "Y", "$patch": "delete"}],
                "resources": {"$patch": "merge", "limits": {"cpu": "1", "memory": null}}}]}}),
            json!({"spec": {"containers": [{"name": "a", "env": [{"name": "X", "value": "1"}],
                "resources": {"limits": {"cpu": "1"}}}]}}),
        ),
        (
            "conditions",
            json!({"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "x"}]}}),
            json!({"status": {"conditions": [{"type": "Ready", "status": "True", "reason": null}, {"type": "Init", "status": "True"}]}}),
            json!({"status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "Init", "status": "True"}]}}),
        ),
    ];
    for (what, before, patch, after) in cases {
        assert_eq!(strategic(&PODS, before, patch), after, "{what}");
    }
}

#[test]
fn element_order_keeps_the_others_in_place() {
    let names = |v: &Value| -> Vec<String> {
        v["spec"]["containers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let list = |names: &[&str]| Value::Array(names.iter().map(|n| json!({"name": n})).collect());
    for (before, patch, order, after) in [
        (&["a", "b"][..], &["c"][..], &["c", "a", "b"][..], &["c", "a", "b"][..]),
        (&["a", "b"], &[], &["b", "a"], &["b", "a"]),
        (&["a", "side", "b"], &[], &["a", "b"], &["a", "side", "b"]),
        (&["side", "a", "b"], &["c"], &["a", "c", "b"], &["side", "a", "c", "b"]),
        (&["a"], &["x"], &[], &["a", "x"]),
        (&["a", "b"], &[], &["gone", "b"], &["a", "b"]),
    ] {
        let mut patch = pod(list(patch));
        patch["spec"]["$setElementOrder/containers"] = list(order);
        let got = strategic(&PODS, pod(list(before)), patch);
        assert_eq!(names(&got), after, "{before:?} {order:?}");
    }
}

#[test]
fn other_kinds_have_their_keys() {
    let service = json!({"spec": {"ports": [{"port": 80, "nodePort": 30000}], "selector": {"a": "1"}}});
    assert_eq!(
        strategic(
            &SERVICES,
            service,
            json!({"spec": {"ports": [{"port": 80, "name": "http"}], "selector": {"b": "2"}}})
        ),
        json!({"spec": {"ports": [{"port": 80, "nodePort": 30000, "name": "http"}], "selector": {"a": "1", "b": "2"}}})
    );
    let node = json!({"spec": {"taints": [{"key": "a"}]}, "status": {"addresses": [{"type": "InternalIP", "address": "1"}]}});
    assert_eq!(
        strategic(
            &NODES,
            node,
            json!({"spec": {"taints": null}, "status": {"addresses": [{"type": "Hostname", "address": "h"}]}})
        ),
        json!({"spec": {}, "status": {"addresses": [{"type": "InternalIP", "address": "1"}, {"type": "Hostname", "address": "h"}]}})
    );
    let deployment = json!({"spec": {"template": {"spec": {"containers": [{"name": "a", "image": "1"}]}}}});
    assert_eq!(
        strategic(
            &DEPLOYMENTS,
            deployment,
            json!({"spec": {"template": {"spec": {"$setElementOrder/containers": [{"name": "a"}],
            "containers": [{"name": "a", "image": "2"}]}}}})
        ),
        json!({"spec": {"template": {"spec": {"containers": [{"name": "a", "image": "2"}]}}}})
    );
}

#[test]
fn bad_strategic_patches_are_400() {
    let current = pod(json!([{"name": "a"}]));
    for patch in [
        r#"[]"#,
        r#"{"spec":{"$patch":"explode"}}"#,
        r#"{"spec":{"containers":[{"image":"x"}]}}"#,
        r#"{"spec":{"containers":["x"]}}"#,
        r#"{"spec":{"$setElementOrder/containers":"x"}}"#,
        r#"{"spec":{"volumes":[{"name":"v","$retainKeys":["name"],"emptyDir":{}}]}}"#,
        r#"{"spec":{"$retainKeys":"x"}}"#,
        r#"{"spec":"#,
    ] {
        assert_eq!(refused(&PODS, PatchType::Strategic, &current, patch).code, 400, "{patch}");
    }
}

#[test]
fn json_patches() {
    let current = json!({"spec": {"replicas": 1, "list": ["a", "b"]}});
    let patch = json!([
        {"op": "test", "path": "/spec/replicas", "value": 1},
        {"op": "replace", "path": "/spec/replicas", "value": 2},
        {"op": "add", "path": "/spec/list/-", "value": "c"},
        {"op": "remove", "path": "/spec/list/0"},
        {"op": "copy", "from": "/spec/list", "path": "/spec/more"},
    ]);
    assert_eq!(
        patched(&DEPLOYMENTS, PatchType::Json, &current, &patch),
        json!({"spec": {"replicas": 2, "list": ["b", "c"], "more": ["b", "c"]}})
    );
    for (patch, code, says) in [
        (json!([{"op": "test", "path": "/spec/replicas", "value": 9}]), 422, "operation 0"),
        (json!([{"op": "remove", "path": "/spec/nope"}]), 422, "/spec/nope"),
        (json!([{"op": "replace", "path": "", "value": 1}]), 400, "leave an object"),
        (json!({"op": "remove"}), 400, "JSON patch"),
        (json!([{"op": "explode", "path": "/a"}]), 400, "JSON patch"),
    ] {
        let error = refused(&DEPLOYMENTS, PatchType::Json, &current, &patch.to_string());
        assert_eq!(error.code, code, "{patch}: {error}");
        assert!(error.message.contains(says), "{patch}: {error}");
    }
    let many: Vec<Value> =
        (0..=JSON_PATCH_OPERATIONS_MAX).map(|_| json!({"op": "remove", "path": "/x"})).collect();
    assert_eq!(refused(&DEPLOYMENTS, PatchType::Json, &current, &Value::Array(many).to_string()).code, 413);
}

#[test]
fn copies_cannot_explode() {
    let current = json!({"data": {"a": "x".repeat(1000)}});
    let ops: Vec<Value> =
        (0..60).map(|i| json!({"op": "copy", "from": "/data", "path": format!("/data/{i}")})).collect();
    let error = refused(&CONFIG_MAPS, PatchType::Json, &current, &Value::Array(ops).to_string());
    assert!(error.message.contains("copies"), "{error}");
}

#[test]
fn merge_patches() {
    let current = json!({"a": {"b": 1, "c": 2}, "l": [1]});
    assert_eq!(
        patched(&CONFIG_MAPS, PatchType::Merge, &current, &json!({"a": {"b": null}, "l": [2]})),
        json!({"a": {"c": 2}, "l": [2]})
    );
    assert_eq!(refused(&CONFIG_MAPS, PatchType::Merge, &current, "[]").code, 400);
    assert_eq!(refused(&CONFIG_MAPS, PatchType::Merge, &current, "").code, 400);
}

fn apply(kind: &Kind, current: Value, mut config: Value) -> Value {
    config["apiVersion"] = json!(kind.api_version());
    config["kind"] = json!(kind.kind);
    let mut out = patched(kind, PatchType::Apply, &current, &config);
    let map = out.as_object_mut().unwrap();
    map.remove("apiVersion");
    map.remove("kind");
    out
}

#[test]
fn apply_merges_by_map_keys() {
    let container = |c: Value| json!({"spec": {"template": {"spec": {"containers": [c]}}}});
    let current = container(json!({"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}],
        "ports": [{"containerPort": 53, "protocol": "TCP"}]}));
    let config =
        container(json!({"name": "a", "image": "2", "env": [{"name": "X", "valueFrom": {"fieldRef": {}}}],
        "ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "name": "t"}]}));
    let expected = container(
        json!({"name": "a", "image": "2", "env": [{"name": "X", "valueFrom": {"fieldRef": {}}}],
        "ports": [{"containerPort": 53, "protocol": "TCP", "name": "t"}, {"containerPort": 53, "protocol": "UDP"}]}),
    );
    assert_eq!(apply(&DEPLOYMENTS, current, config), expected);
    let current =
        json!({"spec": {"selector": {"a": "1"}, "strategy": 1}, "metadata": {"labels": {"x": "1"}}});
    let config = json!({"spec": {"selector": {"b": "2"}}, "metadata": {"labels": {"y": "2"}}});
    assert_eq!(
        apply(&SERVICES, current, config),
        json!({"spec": {"selector": {"b": "2"}, "strategy": 1}, "metadata": {"labels": {"x": "1", "y": "2"}}})
    );
    assert_eq!(apply(&CONFIG_MAPS, Value::Null, json!({"data": {"a": "b"}})), json!({"data": {"a": "b"}}));
}

#[test]
fn bad_applies_are_400() {
    let head = r#""apiVersion":"v1","kind":"Pod""#;
    for patch in [
        "[]".to_owned(),
        "a: b".to_owned(),
        r#"{"kind":"Pod"}"#.to_owned(),
        format!(r#"{{{head},"spec":{{"containers":[{{"image":"x"}}]}}}}"#),
        format!(r#"{{{head},"spec":{{"containers":[{{"name":"x"}},{{"name":"x"}}]}}}}"#),
    ] {
        assert_eq!(refused(&PODS, PatchType::Apply, &json!({}), &patch).code, 400, "{patch}");
    }
}

fn has_directive(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.iter().any(|(k, v)| k.starts_with('$') || v.is_null() || has_directive(v)),
        Value::Array(items) => items.iter().any(has_directive),
        _ => false,
    }
}

fn container_list(directives: bool) -> impl Strategy<Value = Value> {
    let item = (
        "[a-e]",
        proptest::option::of("[xyz]"),
        proptest::option::of(0u8..3),
        0u8..if directives { 8 } else { 1 },
    );
    proptest::collection::vec(item, 0..5).prop_map(|items| {
        let mut seen = Vec::new();
        let list = items.into_iter().filter_map(|(name, image, args, mark)| {
            if seen.contains(&name) {
                return None;
            }
            seen.push(name.clone());
            let mut c = json!({"name": name});
            if let Some(image) = image {
                c["image"] = json!(image);
            }
            if let Some(n) = args {
                c["env"] = (0..n).map(|i| json!({"name": format!("E{i}"), "value": "v"})).collect();
            }
            match mark {
                1 => c["$patch"] = json!("delete"),
                2 => c["$patch"] = json!("replace"),
                3 => c["image"] = Value::Null,
                4 => c["$setElementOrder/env"] = json!([{"name": "E1"}, {"name": "E0"}]),
                _ => {}
            }
            Some(c)
        });
        list.collect()
    })
}

proptest! {
    #[test]
    fn strategic_is_idempotent_and_leaves_no_directive(
        before in container_list(false), patch in container_list(true), order in container_list(false),
    ) {
        let mut patch = pod(patch);
        patch["spec"]["$setElementOrder/containers"] = order;
        let once = strategic(&PODS, pod(before), patch.clone());
        prop_assert!(!has_directive(&once), "{}", once);
        prop_assert_eq!(&strategic(&PODS, once.clone(), patch), &once);
    }

    #[test]
    fn an_object_patched_with_itself_stays(containers in container_list(false)) {
        let object = pod(containers);
        for t in [PatchType::Strategic, PatchType::Merge] {
            prop_assert_eq!(&patched(&PODS, t, &object, &object), &object);
        }
        let mut config = object.clone();
        config["apiVersion"] = json!("v1");
        config["kind"] = json!("Pod");
        prop_assert_eq!(&patched(&PODS, PatchType::Apply, &config, &config), &config);
    }

    #[test]
    fn names_stay_unique(before in container_list(false), patch in container_list(true)) {
        let after = strategic(&PODS, pod(before), pod(patch));
        let names: Vec<&Value> = after["spec"]["containers"].as_array().unwrap().iter().map(|c| &c["name"]).collect();
        for (i, name) in names.iter().enumerate() {
            prop_assert!(!names[..i].contains(name));
        }
    }

    #[test]
    fn any_body_is_an_answer(body in ".{0,60}") {
        for t in [PatchType::Strategic, PatchType::Merge, PatchType::Json, PatchType::Apply] {
            let result = apply_patch(&PODS, t, &json!({"spec": {}}), body.as_bytes());
            prop_assert!(result.map_or_else(|e| (400..500).contains(&e.code), |v| v.is_object()));
        }
    }
}
