//! Tables for the EndpointSlice controller.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::controller::world::view;
use crate::limits::ENDPOINTS_PER_SLICE_MAX;

fn service(extra: Value) -> Service {
    let mut service = json!({
        "metadata": {"name": "web", "namespace": "default", "uid": "svc-1", "labels": {"team": "a"},
            "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"type": "ClusterIP", "clusterIP": "10.96.0.7", "ipFamilies": ["IPv4"],
            "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}]},
    });
    json_patch::merge(&mut service, &extra);
    view(&service)
}

fn pod(n: usize, extra: Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": format!("p{n:03}"), "namespace": "default", "uid": format!("uid-{n}")},
        "spec": {"nodeName": "n1", "containers": [
            {"name": "c", "ports": [{"name": "web", "containerPort": 9090, "protocol": "TCP"}]}]},
        "status": {"phase": "Running", "podIP": format!("10.244.{}.{}", n / 200, n % 200),
            "podIPs": [{"ip": format!("10.244.{}.{}", n / 200, n % 200)}, {"ip": format!("fd00::{n:x}")}],
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:05Z"}]},
    });
    json_patch::merge(&mut pod, &extra);
    view(&pod)
}

fn seen(service: Service, pods: Vec<Pod>, slices: Vec<Slice>) -> Observed {
    let zones = BTreeMap::from([("n1".to_owned(), "z1".to_owned())]);
    Observed { service, pods, zones, slices }
}

/// Carries the actions out on the slices.
fn apply(seen: &mut Observed, actions: &[Action], names: &mut usize) -> usize {
    let mut writes = 0;
    for action in actions {
        match action {
            Action::Together(inner) => writes += apply(seen, inner, names),
            Action::Create { body, .. } => {
                *names += 1;
                let mut body = body.clone();
                body["metadata"]["name"] = json!(format!("web-{names}"));
                seen.slices.push(view(&body));
                writes += 1;
            }
            Action::Edit { target, merge, .. } => {
                let slice =
                    seen.slices.iter_mut().find(|s| s.metadata.name == target.name).expect("the slice");
                if let Some(endpoints) = merge.get("endpoints") {
                    slice.endpoints = view(endpoints);
                }
                if let Some(ports) = merge.get("ports") {
                    slice.ports = view(ports);
                }
                if let Some(labels) = merge["metadata"]["labels"].as_object() {
                    for (key, value) in labels {
                        slice.metadata.labels.remove(key);
                        if let Some(value) = value.as_str() {
                            slice.metadata.labels.insert(key.clone(), value.to_owned());
                        }
                    }
                }
                writes += 1;
            }
            Action::Delete { target, .. } => {
                seen.slices.retain(|s| s.metadata.name != target.name);
                writes += 1;
            }
            Action::Event { .. } | Action::Again(_) => panic!("not asked for: {action:?}"),
        }
    }
    writes
}

/// Reconciles once, applies, and checks that a second look finds nothing to do. Returns the number of writes.
fn settle(seen: &mut Observed, names: &mut usize) -> usize {
    let writes = apply(seen, &reconcile(seen), names);
    assert_eq!(reconcile(seen), [], "a second look has nothing to do");
    writes
}

fn layout(seen: &Observed) -> Vec<(String, usize)> {
    seen.slices.iter().map(|s| (s.address_type.clone(), s.endpoints.len())).collect()
}

#[test]
fn a_slice_says_all_about_its_pods() {
    let actions = reconcile(&seen(service(json!({})), vec![pod(1, json!({}))], vec![]));
    let [Action::Together(writes)] = actions.as_slice() else { panic!("{actions:?}") };
    let [Action::Create { body, .. }] = writes.as_slice() else { panic!("{writes:?}") };
    assert_eq!(
        *body,
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "generateName": "web-",
                "namespace": "default",
                "labels": {"team": "a", "kubernetes.io/service-name": "web",
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
                "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:05Z"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": "web", "uid": "svc-1",
                    "controller": true, "blockOwnerDeletion": true}],
            },
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.244.0.1"],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": "n1", "zone": "z1",
                "targetRef": {"kind": "Pod", "namespace": "default", "name": "p001", "uid": "uid-1"}}],
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        })
    );
}

#[test]
fn hints_follow_the_traffic_distribution() {
    let (zone, node) = (json!([{"name": "z1"}]), json!([{"name": "n1"}]));
    for (distribution, node_name, wanted) in [
        ("", "n1", json!(null)),
        ("PreferClose", "n1", json!({"forZones": zone})),
        ("PreferSameZone", "n1", json!({"forZones": zone})),
        ("PreferSameNode", "n1", json!({"forZones": zone, "forNodes": node})),
        ("PreferSameNode", "n2", json!({"forNodes": [{"name": "n2"}]})),
        ("PreferSameZone", "n2", json!(null)),
    ] {
        let service = service(json!({"spec": {"trafficDistribution": distribution}}));
        let unready = json!({"spec": {"nodeName": node_name}, "status": {"conditions": [{"type": "Ready", "status": "False"}]}});
        let pods = vec![pod(1, json!({"spec": {"nodeName": node_name}})), pod(2, unready)];
        let mut seen = seen(service, pods, Vec::new());
        let actions = reconcile(&seen);
        apply(&mut seen, &actions, &mut 0);
        let hints: Vec<Value> = seen.slices[0]
            .endpoints
            .iter()
            .map(|endpoint| serde_json::to_value(&endpoint.hints).unwrap())
            .collect();
        assert_eq!(hints, [wanted, json!(null)], "{distribution} on {node_name}");
        assert_eq!(reconcile(&seen), [], "hints that were read are those that were written");
    }
}

#[test]
fn conditions_follow_readiness_and_deletion() {
    let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    let deleting = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:09Z"}});
    let mut both = unready.clone();
    json_patch::merge(&mut both, &deleting);
    for (extra, publish, ready, serving, terminating) in [
        (json!({}), false, true, true, false),
        (unready.clone(), false, false, false, false),
        (unready, true, true, false, false),
        (deleting.clone(), false, false, true, true),
        (deleting, true, true, true, true),
        (both, false, false, false, true),
    ] {
        let service = service(json!({"spec": {"publishNotReadyAddresses": publish}}));
        let mut seen = seen(service, vec![pod(1, extra.clone())], vec![]);
        settle(&mut seen, &mut 0);
        let expected =
            Conditions { ready: Some(ready), serving: Some(serving), terminating: Some(terminating) };
        assert_eq!(seen.slices[0].endpoints[0].conditions, expected, "{extra} {publish}");
    }
}

#[test]
fn pods_without_address_or_over_are_left_out() {
    for extra in [
        json!({"status": {"podIP": null, "podIPs": null}}),
        json!({"status": {"phase": "Succeeded"}}),
        json!({"status": {"phase": "Failed"}}),
    ] {
        let mut seen = seen(service(json!({})), vec![pod(1, extra.clone())], vec![]);
        settle(&mut seen, &mut 0);
        assert_eq!(layout(&seen), [("IPv4".to_owned(), 0)], "{extra}");
    }
}

#[test]
fn each_family_has_slices_of_its_own() {
    let v6_only = pod(2, json!({"status": {"podIP": "fd00::99", "podIPs": [{"ip": "fd00::99"}]}}));
    let dual = service(json!({"spec": {"ipFamilies": ["IPv4", "IPv6"]}}));
    let mut seen = seen(dual, vec![pod(1, json!({})), v6_only], vec![]);
    let mut names = 0;
    settle(&mut seen, &mut names);
    assert_eq!(layout(&seen), [("IPv4".to_owned(), 1), ("IPv6".to_owned(), 2)]);
    seen.service = service(json!({"spec": {"ipFamilies": ["IPv6"]}}));
    settle(&mut seen, &mut names);
    assert_eq!(layout(&seen), [("IPv6".to_owned(), 2)]);
}

#[test]
fn named_ports_are_looked_up_in_each_pod() {
    let named = service(json!({"spec": {"ports": [{"name": "http", "port": 80, "targetPort": "web"}]}}));
    let other = pod(
        2,
        json!({"spec": {"containers": [
        {"name": "c", "ports": [{"name": "web", "containerPort": 7070, "protocol": "TCP"}]}]}}),
    );
    let udp = pod(
        3,
        json!({"spec": {"containers": [
        {"name": "c", "ports": [{"name": "web", "containerPort": 1, "protocol": "UDP"}]}]}}),
    );
    let mut seen = seen(named, vec![pod(1, json!({})), other, udp], vec![]);
    settle(&mut seen, &mut 0);
    let mut ports: Vec<Vec<u16>> =
        seen.slices.iter().map(|s| s.ports.iter().map(|p| p.port).collect()).collect();
    ports.sort();
    assert_eq!(ports, [vec![], vec![7070], vec![9090]]);
}

#[test]
fn services_that_are_not_ours_are_left_alone() {
    let user_slice: Slice =
        view(&json!({"metadata": {"name": "by-hand", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "endpoints": [{"addresses": ["192.0.2.1"], "conditions": {}}], "ports": []}));
    let without = service(json!({"spec": {"selector": null}}));
    assert_eq!(reconcile(&seen(without, vec![], vec![user_slice.clone()])), []);
    let dying = service(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:09Z"}}));
    assert_eq!(reconcile(&seen(dying, vec![pod(1, json!({}))], vec![])), []);
    let mut ours = seen(service(json!({})), vec![pod(1, json!({}))], vec![user_slice.clone()]);
    settle(&mut ours, &mut 0);
    assert_eq!(ours.slices[0], user_slice, "a slice with another manager is not touched");
}

#[test]
fn an_empty_slice_stays_and_is_used_again() {
    let mut seen = seen(service(json!({})), vec![], vec![]);
    let mut names = 0;
    assert_eq!(settle(&mut seen, &mut names), 1);
    for pods in [vec![pod(1, json!({}))], vec![], vec![pod(2, json!({}))]] {
        seen.pods = pods;
        assert_eq!(settle(&mut seen, &mut names), 1, "one write a change");
    }
    assert_eq!(names, 1, "and never another slice");
}

#[test]
fn slices_are_filled_and_stay_stable() {
    let mut seen = seen(service(json!({})), (0..250).map(|n| pod(n, json!({}))).collect(), vec![]);
    let mut names = 0;
    assert_eq!(settle(&mut seen, &mut names), 3);
    assert_eq!(layout(&seen).iter().map(|(_, n)| *n).collect::<Vec<_>>(), [100, 100, 50]);
    seen.pods.push(pod(250, json!({})));
    assert_eq!(settle(&mut seen, &mut names), 1, "a new pod goes where there is room");
    seen.pods.remove(5);
    seen.pods.push(pod(251, json!({})));
    assert_eq!(settle(&mut seen, &mut names), 1, "or into the slice that changes anyway");
    seen.service.metadata.labels.insert("team".to_owned(), "b".to_owned());
    assert_eq!(settle(&mut seen, &mut names), 3, "labels follow the Service's");
    assert_eq!(names, 3);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes and goes, the slices hold each wanted endpoint once, none is too full, and no more slices
    /// are written than endpoints have changed.
    #[test]
    fn slices_follow_the_pods(rounds in prop::collection::vec(prop::collection::btree_set(0..260usize, 0..260), 1..5)) {
        let mut seen = seen(service(json!({})), vec![], vec![]);
        let mut names = 0;
        settle(&mut seen, &mut names);
        let mut before: BTreeSet<usize> = BTreeSet::new();
        for round in rounds {
            seen.pods = round.iter().map(|n| pod(*n, json!({}))).collect();
            let writes = settle(&mut seen, &mut names);
            let changes = before.symmetric_difference(&round).count();
            prop_assert!(writes <= changes, "{writes} writes for {changes} changes");
            prop_assert!(seen.slices.iter().all(|s| s.endpoints.len() <= ENDPOINTS_PER_SLICE_MAX));
            let mut have: Vec<String> =
                seen.slices.iter().flat_map(|s| &s.endpoints).map(|e| e.addresses[0].clone()).collect();
            have.sort();
            let mut want: Vec<String> = seen.pods.iter().map(|p| p.status.pod_ip.clone()).collect();
            want.sort();
            prop_assert_eq!(have, want);
            before = round;
        }
    }
}
