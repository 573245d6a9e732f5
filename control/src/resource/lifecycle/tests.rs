//! The life of objects, write by write.

use super::*;
use crate::resource::default_object;
use crate::resource::kinds::{
    CONFIG_MAPS, DEPLOYMENTS, ENDPOINT_SLICES, NAMESPACES, NODES, PODS, REPLICA_SETS, SERVICES, kinds,
};

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn stamp() -> Stamp {
    Stamp { now: now(), uid: "u-1".to_owned(), suffix: "abcde".to_owned() }
}

fn created(kind: &Kind, mut object: Value) -> Value {
    prepare_create(kind, "ns", &mut object, &stamp()).unwrap_or_else(|e| panic!("{e}"));
    default_object(kind, &mut object);
    object["metadata"]["resourceVersion"] = json!("7");
    object
}

fn updated(
    kind: &Kind,
    old: &Value,
    mut new: Value,
    sub: Subresource,
) -> Result<(Value, UpdateOutcome), ApiError> {
    prepare_update(kind, &mut new, old, sub, now())?;
    default_object(kind, &mut new);
    let outcome = finish_update(kind, &mut new, old);
    Ok((new, outcome))
}

fn pod() -> Value {
    created(
        &PODS,
        json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a", "image": "i:1"}]}}),
    )
}

fn running_pod() -> Value {
    let mut pod = pod();
    pod["spec"]["nodeName"] = json!("n1");
    pod["status"]["phase"] = json!("Running");
    pod
}

#[test]
fn suffixes_use_the_alphabet() {
    let mut seen = std::collections::BTreeSet::new();
    for b in 0..=255 {
        let suffix = name_suffix([b; 5]);
        assert_eq!(suffix.len(), 5);
        assert!(suffix.bytes().all(|c| b"bcdfghjklmnpqrstvwxz2456789".contains(&c)));
        seen.insert(suffix);
    }
    assert_eq!(seen.len(), 27);
}

#[test]
fn create_sets_what_the_server_owns() {
    let mut object = json!({
        "metadata": {"name": "d", "uid": "mine", "creationTimestamp": null, "generation": 9, "selfLink": "x",
            "managedFields": [{"manager": "m"}], "deletionTimestamp": "2020-01-01T00:00:00Z"},
        "spec": {"replicas": 3}, "status": {"replicas": 3},
    });
    prepare_create(&DEPLOYMENTS, "ns", &mut object, &stamp()).unwrap();
    assert_eq!(
        object,
        json!({"apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "d", "namespace": "ns", "uid": "u-1", "creationTimestamp": "2026-01-01T00:00:00Z", "generation": 1},
            "spec": {"replicas": 3}, "status": {}})
    );
}

#[test]
fn first_states() {
    for (kind, status) in [
        (&PODS, json!({"phase": "Pending"})),
        (&NAMESPACES, json!({"phase": "Active"})),
        (&SERVICES, json!({"loadBalancer": {}})),
        (&REPLICA_SETS, json!({"replicas": 0})),
    ] {
        let mut object = json!({"metadata": {"name": "x"}, "status": {"conditions": []}});
        prepare_create(kind, if kind.namespaced { "ns" } else { "" }, &mut object, &stamp()).unwrap();
        assert_eq!(object["status"], status, "{}", kind.plural);
    }
    let namespace =
        created(&NAMESPACES, json!({"metadata": {"name": "x"}, "spec": {"finalizers": ["a.b/c"]}}));
    assert_eq!(namespace["spec"]["finalizers"], json!(["a.b/c", "kubernetes"]));
    let node = created(&NODES, json!({"metadata": {"name": "x"}, "status": {"capacity": {"cpu": "1"}}}));
    assert_eq!(node["status"]["capacity"]["cpu"], "1", "a node brings its status");
    let config = created(&CONFIG_MAPS, json!({"metadata": {"name": "x"}}));
    assert_eq!(config.get("status"), None);
    assert_eq!(config["metadata"].get("generation"), None);
}

#[test]
fn generated_names() {
    let mut object = json!({"metadata": {"generateName": "web-"}});
    prepare_create(&PODS, "ns", &mut object, &stamp()).unwrap();
    assert_eq!(object["metadata"]["name"], "web-abcde");
    let mut long = json!({"metadata": {"generateName": "a".repeat(70)}});
    prepare_create(&PODS, "ns", &mut long, &stamp()).unwrap();
    assert_eq!(object::name(&long), format!("{}abcde", "a".repeat(58)));
    let mut wide = json!({"metadata": {"generateName": format!("{}ü", "a".repeat(57))}});
    prepare_create(&PODS, "ns", &mut wide, &stamp()).unwrap();
    assert_eq!(object::name(&wide), format!("{}abcde", "a".repeat(57)), "cut at a character");
}

#[test]
fn creates_that_are_refused() {
    for (kind, object, code, says) in [
        (&PODS, json!([]), 400, "JSON object"),
        (&PODS, json!({"metadata": {}}), 422, "name or generateName"),
        (&PODS, json!({"kind": "Node", "metadata": {"name": "x"}}), 400, "kind"),
        (&PODS, json!({"apiVersion": "v2", "metadata": {"name": "x"}}), 400, "API version"),
        (&PODS, json!({"metadata": {"name": "x", "namespace": "other"}}), 400, "namespace"),
        (&NODES, json!({"metadata": {"name": "x", "namespace": "ns"}}), 400, "not namespaced"),
        (&PODS, json!({"metadata": {"name": "x", "resourceVersion": "1"}}), 400, "resourceVersion"),
        (&PODS, json!({"metadata": []}), 400, "metadata must be an object"),
        (&PODS, json!({"metadata": {"name": 1}}), 400, "metadata.name must be a string"),
    ] {
        let error = prepare_create(kind, "ns", &mut object.clone(), &stamp()).expect_err(says);
        assert_eq!(error.code, code, "{object}");
        assert!(error.message.contains(says), "{object}: {error}");
    }
}

#[test]
fn main_updates_keep_status_and_identity() {
    let mut old = created(&DEPLOYMENTS, json!({"metadata": {"name": "d"}, "spec": {"replicas": 1}}));
    old["status"] = json!({"replicas": 1});
    let new = json!({"metadata": {"labels": {"a": "b"}, "creationTimestamp": null}, "spec": {"replicas": 2}, "status": {"replicas": 9}});
    let (new, outcome) = updated(&DEPLOYMENTS, &old, new, Subresource::Main).unwrap();
    assert_eq!(outcome, UpdateOutcome::Changed);
    assert_eq!(new["status"], json!({"replicas": 1}));
    let meta = json!({"name": "d", "namespace": "ns", "uid": "u-1", "creationTimestamp": "2026-01-01T00:00:00Z",
        "generation": 2, "resourceVersion": "7", "labels": {"a": "b"}});
    assert_eq!(new["metadata"], meta);
}

#[test]
fn generation_follows_the_spec_only() {
    let old = created(&DEPLOYMENTS, json!({"metadata": {"name": "d"}, "spec": {"replicas": 1}}));
    let generation = |mut new: Value, sub| {
        new["metadata"].as_object_mut().unwrap().remove("generation");
        updated(&DEPLOYMENTS, &old, new, sub).unwrap().0["metadata"]["generation"].clone()
    };
    let mut labelled = old.clone();
    labelled["metadata"]["labels"] = json!({"a": "b"});
    assert_eq!(generation(labelled, Subresource::Main), 1);
    let mut status = old.clone();
    status["status"] = json!({"observedGeneration": 1});
    status["spec"]["replicas"] = json!(9);
    assert_eq!(generation(status, Subresource::Status), 1);
    let mut spec = old.clone();
    spec["spec"]["replicas"] = json!(9);
    assert_eq!(generation(spec, Subresource::Main), 2);
    let slice =
        created(&ENDPOINT_SLICES, json!({"metadata": {"name": "s"}, "addressType": "IPv4", "endpoints": []}));
    let mut more = slice.clone();
    more["endpoints"] = json!([{"addresses": ["10.0.0.1"]}]);
    let (more, _) = updated(&ENDPOINT_SLICES, &slice, more, Subresource::Main).unwrap();
    assert_eq!(more["metadata"]["generation"], 2);
    let mut labelled = slice.clone();
    labelled["metadata"]["labels"] = json!({"a": "b"});
    assert_eq!(
        updated(&ENDPOINT_SLICES, &slice, labelled, Subresource::Main).unwrap().0["metadata"]["generation"],
        1
    );
}

#[test]
fn no_ops_are_seen() {
    for kind in kinds() {
        let ns = if kind.namespaced { "ns" } else { "" };
        let mut old = json!({"metadata": {"name": "x"}, "spec": {}});
        prepare_create(kind, ns, &mut old, &stamp()).unwrap();
        default_object(kind, &mut old);
        old["metadata"]["resourceVersion"] = json!("7");
        let mut sent = old.clone();
        sent["metadata"]["creationTimestamp"] = Value::Null;
        sent["metadata"]["annotations"] = Value::Null;
        let (_, outcome) = updated(kind, &old, sent, Subresource::Main).unwrap();
        assert_eq!(outcome, UpdateOutcome::Unchanged, "{}", kind.plural);
        if kind.status {
            let (_, outcome) = updated(kind, &old, old.clone(), Subresource::Status).unwrap();
            assert_eq!(outcome, UpdateOutcome::Unchanged, "{}", kind.plural);
        }
    }
}

#[test]
fn status_updates_change_nothing_else() {
    let old = running_pod();
    let mut new = old.clone();
    new["status"]["podIP"] = json!("10.0.0.1");
    new["spec"]["nodeName"] = json!("n2");
    new["metadata"]["labels"] = json!({"a": "b"});
    let (new, outcome) = updated(&PODS, &old, new, Subresource::Status).unwrap();
    let mut expected = old.clone();
    expected["status"]["podIP"] = json!("10.0.0.1");
    assert_eq!((new, outcome), (expected, UpdateOutcome::Changed));
    let (new, _) = updated(&PODS, &old, json!({"metadata": {"name": "p"}}), Subresource::Status).unwrap();
    assert_eq!(new["spec"], old["spec"]);
}

#[test]
fn identity_is_checked() {
    let old = pod();
    for (meta, code, says) in [
        (json!({"name": "q"}), 400, "does not match the name"),
        (json!({"name": "p", "namespace": "other"}), 400, "namespace"),
        (json!({"name": "p", "uid": "other"}), 409, "UID"),
        (json!({"name": "p", "resourceVersion": "6"}), 409, "modified"),
    ] {
        for sub in [Subresource::Main, Subresource::Status] {
            let mut new = old.clone();
            new["metadata"] = meta.clone();
            let error = updated(&PODS, &old, new, sub).expect_err(says);
            assert_eq!(error.code, code, "{meta}");
            assert!(error.message.contains(says), "{error}");
        }
    }
    let mut wrong = old.clone();
    wrong["kind"] = json!("Node");
    assert_eq!(updated(&PODS, &old, wrong, Subresource::Main).unwrap_err().code, 400);
    assert_eq!(updated(&PODS, &old, old.clone(), Subresource::Log).unwrap_err().code, 405);
}

#[test]
fn scale_reads_and_writes_replicas() {
    let old = created(
        &DEPLOYMENTS,
        json!({"metadata": {"name": "d"}, "spec": {"replicas": 2,
        "selector": {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "c", "operator": "NotIn", "values": ["d"]}]}}}),
    );
    let scale = scale_of(&old);
    assert_eq!((&scale["kind"], &scale["apiVersion"]), (&json!("Scale"), &json!("autoscaling/v1")));
    assert_eq!(scale["spec"], json!({"replicas": 2}));
    assert_eq!(scale["status"], json!({"replicas": 0, "selector": "a=b,c notin (d)"}));
    let mut body = scale.clone();
    body["spec"]["replicas"] = json!(5);
    let (new, outcome) = updated(&DEPLOYMENTS, &old, body, Subresource::Scale).unwrap();
    assert_eq!(
        (outcome, &new["spec"]["replicas"], &new["metadata"]["generation"]),
        (UpdateOutcome::Changed, &json!(5), &json!(2))
    );
    assert_eq!(new["kind"], "Deployment");
    for (body, code) in [
        (json!({"spec": {"replicas": -1}}), 422),
        (json!({"spec": {"replicas": "many"}}), 400),
        (json!({"kind": "Deployment", "apiVersion": "apps/v1"}), 400),
        (json!({"metadata": {"resourceVersion": "1"}}), 409),
    ] {
        assert_eq!(
            updated(&DEPLOYMENTS, &old, body.clone(), Subresource::Scale).unwrap_err().code,
            code,
            "{body}"
        );
    }
    assert_eq!(updated(&PODS, &pod(), json!({}), Subresource::Scale).unwrap_err().code, 405);
}

#[test]
fn a_binding_names_the_node_once() {
    let old = pod();
    let binding = json!({"metadata": {"name": "p", "annotations": {"x": "y"}}, "target": {"kind": "Node", "name": "n1"}});
    let (bound, outcome) = updated(&PODS, &old, binding.clone(), Subresource::Binding).unwrap();
    assert_eq!(outcome, UpdateOutcome::Changed);
    assert_eq!(bound["spec"]["nodeName"], "n1");
    assert_eq!(bound["metadata"]["annotations"], json!({"x": "y"}));
    assert_eq!(
        bound["status"]["conditions"],
        json!([{"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}])
    );
    assert_eq!(updated(&PODS, &bound, binding.clone(), Subresource::Binding).unwrap_err().code, 409);
    let mut deleting = pod();
    deleting["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    assert_eq!(updated(&PODS, &deleting, binding, Subresource::Binding).unwrap_err().code, 409);
    for body in [json!({}), json!({"target": {"kind": "Pod", "name": "x"}})] {
        assert_eq!(updated(&PODS, &old, body, Subresource::Binding).unwrap_err().code, 422);
    }
    let mut moved = old.clone();
    moved["spec"]["nodeName"] = json!("n9");
    let error = updated(&PODS, &old, moved, Subresource::Main).unwrap_err();
    assert!(error.message.contains("spec.nodeName"), "{error}");
}

fn options(value: Value) -> DeleteOptions {
    DeleteOptions::from_json(&value).unwrap()
}

fn marked(outcome: DeleteOutcome) -> Value {
    match outcome {
        DeleteOutcome::Mark(object) => *object,
        other => panic!("not marked: {other:?}"),
    }
}

#[test]
fn pods_are_given_time() {
    let plan = |pod: &Value, opts: Value| plan_delete(&PODS, pod, &options(opts), now()).unwrap();
    assert_eq!(plan(&pod(), json!({})), DeleteOutcome::Remove, "not on a node yet");
    assert_eq!(plan(&running_pod(), json!({"gracePeriodSeconds": 0})), DeleteOutcome::Remove);
    let mut ended = running_pod();
    ended["status"]["phase"] = json!("Succeeded");
    assert_eq!(plan(&ended, json!({})), DeleteOutcome::Remove);
    let first = marked(plan(&running_pod(), json!({})));
    let meta = &first["metadata"];
    assert_eq!(
        (&meta["deletionTimestamp"], &meta["deletionGracePeriodSeconds"], &meta["generation"]),
        (&json!("2026-01-01T00:00:30Z"), &json!(30), &json!(2))
    );
    assert_eq!(plan(&first, json!({})), DeleteOutcome::Unchanged);
    assert_eq!(plan(&first, json!({"gracePeriodSeconds": 60})), DeleteOutcome::Unchanged, "never longer");
    let second = marked(plan(&first, json!({"gracePeriodSeconds": 5})));
    assert_eq!(second["metadata"]["deletionTimestamp"], "2026-01-01T00:00:05Z");
    assert_eq!(plan(&second, json!({"gracePeriodSeconds": 0})), DeleteOutcome::Remove);
    let mut slow = running_pod();
    slow["spec"]["terminationGracePeriodSeconds"] = json!(90);
    assert_eq!(marked(plan(&slow, json!({})))["metadata"]["deletionTimestamp"], "2026-01-01T00:01:30Z");
    assert_eq!(
        marked(plan(&slow, json!({"gracePeriodSeconds": -5})))["metadata"]["deletionGracePeriodSeconds"],
        1
    );
}

#[test]
fn a_deleting_pod_can_still_report() {
    let deleting = marked(plan_delete(&PODS, &running_pod(), &DeleteOptions::default(), now()).unwrap());
    let mut status = deleting.clone();
    status["status"]["phase"] = json!("Succeeded");
    let (_, outcome) = updated(&PODS, &deleting, status, Subresource::Status).unwrap();
    assert_eq!(outcome, UpdateOutcome::Changed, "only the agent's delete with grace 0 removes it");
}

#[test]
fn finalizers_hold_and_release() {
    let config = |finalizers: Value| {
        created(&CONFIG_MAPS, json!({"metadata": {"name": "c", "finalizers": finalizers}}))
    };
    let plan = |o: &Value| plan_delete(&CONFIG_MAPS, o, &DeleteOptions::default(), now()).unwrap();
    assert_eq!(plan(&config(json!([]))), DeleteOutcome::Remove);
    let held = marked(plan(&config(json!(["a.b/c", "a.b/d"]))));
    assert_eq!(held["metadata"]["deletionTimestamp"], "2026-01-01T00:00:00Z");
    assert_eq!(held["metadata"]["deletionGracePeriodSeconds"], 0);
    assert_eq!(plan(&held), DeleteOutcome::Unchanged);
    let mut one = held.clone();
    one["metadata"]["finalizers"] = json!(["a.b/d"]);
    let (one, outcome) = updated(&CONFIG_MAPS, &held, one, Subresource::Main).unwrap();
    assert_eq!(outcome, UpdateOutcome::Changed);
    let mut none = one.clone();
    none["metadata"].as_object_mut().unwrap().remove("finalizers");
    let (_, outcome) = updated(&CONFIG_MAPS, &one, none, Subresource::Main).unwrap();
    assert_eq!(outcome, UpdateOutcome::Remove);
}

#[test]
fn finalizers_hold_a_pod_after_its_grace() {
    let mut pod = running_pod();
    pod["metadata"]["finalizers"] = json!(["a.b/c"]);
    let held = marked(plan_delete(&PODS, &pod, &options(json!({"gracePeriodSeconds": 0})), now()).unwrap());
    assert_eq!(held["metadata"]["deletionGracePeriodSeconds"], 0);
    let mut free = held.clone();
    free["metadata"]["finalizers"] = json!([]);
    assert_eq!(updated(&PODS, &held, free, Subresource::Main).unwrap().1, UpdateOutcome::Remove);
    let graceful = marked(plan_delete(&PODS, &pod, &DeleteOptions::default(), now()).unwrap());
    let mut free = graceful.clone();
    free["metadata"]["finalizers"] = json!([]);
    assert_eq!(
        updated(&PODS, &graceful, free, Subresource::Main).unwrap().1,
        UpdateOutcome::Changed,
        "still running"
    );
    let hurried =
        marked(plan_delete(&PODS, &graceful, &options(json!({"gracePeriodSeconds": 0})), now()).unwrap());
    assert_eq!(hurried["metadata"]["deletionGracePeriodSeconds"], 0);
}

#[test]
fn propagation_sets_finalizers() {
    let object = created(&DEPLOYMENTS, json!({"metadata": {"name": "d", "finalizers": ["a.b/c"]}}));
    let after = |object: &Value, policy: &str| {
        let outcome =
            plan_delete(&DEPLOYMENTS, object, &options(json!({"propagationPolicy": policy})), now()).unwrap();
        marked(outcome)["metadata"]["finalizers"].clone()
    };
    assert_eq!(after(&object, "Foreground"), json!(["a.b/c", "foregroundDeletion"]));
    assert_eq!(after(&object, "Orphan"), json!(["a.b/c", "orphan"]));
    assert_eq!(after(&object, "Background"), json!(["a.b/c"]));
    let foreground =
        created(&DEPLOYMENTS, json!({"metadata": {"name": "d", "finalizers": ["foregroundDeletion"]}}));
    assert_eq!(after(&foreground, "Orphan"), json!(["orphan"]));
    let background =
        plan_delete(&DEPLOYMENTS, &foreground, &options(json!({"propagationPolicy": "Background"})), now());
    assert_eq!(background.unwrap(), DeleteOutcome::Remove);
    let kept = plan_delete(&DEPLOYMENTS, &foreground, &DeleteOptions::default(), now()).unwrap();
    assert_eq!(marked(kept)["metadata"]["finalizers"], json!(["foregroundDeletion"]));
}

#[test]
fn namespaces_terminate_before_they_go() {
    let namespace = created(&NAMESPACES, json!({"metadata": {"name": "x"}}));
    let ending = marked(plan_delete(&NAMESPACES, &namespace, &DeleteOptions::default(), now()).unwrap());
    assert_eq!(ending["status"]["phase"], "Terminating");
    assert_eq!(
        plan_delete(&NAMESPACES, &ending, &DeleteOptions::default(), now()).unwrap(),
        DeleteOutcome::Unchanged
    );
    let mut cheat = ending.clone();
    cheat["spec"] = json!({});
    let (kept, outcome) = updated(&NAMESPACES, &ending, cheat, Subresource::Main).unwrap();
    assert_eq!(
        (outcome, &kept["spec"]),
        (UpdateOutcome::Unchanged, &ending["spec"]),
        "only /finalize empties it"
    );
    let body = json!({"metadata": {"name": "x"}, "spec": {"finalizers": []}});
    let (_, outcome) = updated(&NAMESPACES, &ending, body, Subresource::Finalize).unwrap();
    assert_eq!(outcome, UpdateOutcome::Remove);
    let body = json!({"metadata": {"name": "x"}});
    let (_, outcome) = updated(&NAMESPACES, &namespace, body, Subresource::Finalize).unwrap();
    assert_eq!(outcome, UpdateOutcome::Changed, "not deleting: it stays");
}

#[test]
fn preconditions_guard_deletes() {
    let object = created(&CONFIG_MAPS, json!({"metadata": {"name": "c"}}));
    for (preconditions, code) in [
        (json!({"uid": "u-1", "resourceVersion": "7"}), 0),
        (json!({"uid": "u-2"}), 409),
        (json!({"resourceVersion": "8"}), 409),
    ] {
        let opts = options(json!({"preconditions": preconditions}));
        let got = plan_delete(&CONFIG_MAPS, &object, &opts, now()).map_or_else(|e| e.code, |_| 0);
        assert_eq!(got, code, "{preconditions}");
    }
}

#[test]
fn delete_bodies() {
    assert_eq!(options(Value::Null), DeleteOptions::default());
    let full =
        options(json!({"kind": "DeleteOptions", "gracePeriodSeconds": 3, "propagationPolicy": "Orphan",
        "dryRun": ["All"], "preconditions": {"uid": "u"}}));
    assert_eq!(
        full,
        DeleteOptions {
            grace_period_seconds: Some(3),
            uid: Some("u".to_owned()),
            resource_version: None,
            propagation: Some(Propagation::Orphan),
            dry_run: true
        }
    );
    assert_eq!(options(json!({"orphanDependents": true})).propagation, Some(Propagation::Orphan));
    for (body, code) in [
        (json!([]), 400),
        (json!({"kind": "Pod"}), 400),
        (json!({"gracePeriodSeconds": "now"}), 400),
        (json!({"propagationPolicy": "Maybe"}), 422),
        (json!({"dryRun": ["Some"]}), 422),
    ] {
        assert_eq!(DeleteOptions::from_json(&body).unwrap_err().code, code, "{body}");
    }
}
