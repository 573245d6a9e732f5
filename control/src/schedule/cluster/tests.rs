//! Tables and properties of the placement.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::model::{node, pod};
use super::*;

fn facts(extra: Value) -> NodeFacts {
    let mut object = json!({
        "metadata": {"name": "n", "labels": {"zone": "a"}},
        "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "10"}},
    });
    json_patch::merge(&mut object, &extra);
    node(object.to_string().as_bytes()).expect("a node")
}

fn ask(spec: Value) -> Ask {
    let mut object = json!({"metadata": {"name": "p", "uid": "p"}, "spec": {"containers": [{"name": "c"}]}});
    json_patch::merge(&mut object, &json!({ "spec": spec }));
    pod(object.to_string().as_bytes()).expect("a pod").ask
}

fn requests(cpu: &str, memory: &str) -> Value {
    json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu, "memory": memory}}}]})
}

fn cluster(nodes: &[(&str, Value)]) -> Cluster {
    let mut cluster = Cluster::default();
    for (name, extra) in nodes {
        assert!(cluster.set_node(name, facts(extra.clone())));
    }
    cluster
}

fn told(cluster: &Cluster, spec: Value) -> String {
    match cluster.place(&ask(spec)) {
        Ok(name) => name.to_owned(),
        Err(why) => why.to_string(),
    }
}

#[test]
fn filters_say_why() {
    let taint =
        |key: &str, effect: &str| json!({"spec": {"taints": [{"key": key, "value": "v", "effect": effect}]}});
    let port = json!({"containers": [{"name": "c", "ports": [{"containerPort": 80, "hostPort": 80, "protocol": "TCP"}]}]});
    let affinity = |operator: &str, values: Value| {
        json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": operator, "values": values}]}]}}}})
    };
    let cases: Vec<(Value, Value, &str)> = vec![
        (json!({}), json!({}), "n"),
        (json!({"spec": {"unschedulable": true}}), json!({}), "1 node(s) were unschedulable"),
        (
            json!({"spec": {"unschedulable": true}}),
            json!({"tolerations": [{"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}]}),
            "n",
        ),
        (taint("k", "NoSchedule"), json!({}), "1 node(s) had untolerated taint {k: v}"),
        (taint("k", "NoExecute"), json!({}), "1 node(s) had untolerated taint {k: v}"),
        (taint("k", "PreferNoSchedule"), json!({}), "n"),
        (
            taint("k", "NoSchedule"),
            json!({"tolerations": [{"key": "k", "operator": "Equal", "value": "v"}]}),
            "n",
        ),
        (
            taint("k", "NoSchedule"),
            json!({"tolerations": [{"key": "k", "value": "other"}]}),
            "1 node(s) had untolerated taint {k: v}",
        ),
        (json!({}), json!({"nodeSelector": {"zone": "a"}}), "n"),
        (
            json!({}),
            json!({"nodeSelector": {"zone": "b"}}),
            "1 node(s) didn't match Pod's node affinity/selector",
        ),
        (json!({}), affinity("In", json!(["a", "b"])), "n"),
        (json!({}), affinity("Exists", json!([])), "n"),
        (json!({}), affinity("NotIn", json!(["a"])), "1 node(s) didn't match Pod's node affinity/selector"),
        (json!({}), requests("4", "8Gi"), "n"),
        (json!({}), requests("4001m", "1"), "1 Insufficient cpu"),
        (json!({}), requests("5", "9Gi"), "1 Insufficient cpu, 1 Insufficient memory"),
        (
            json!({}),
            json!({"containers": [{"name": "c", "resources": {"requests": {"example.com/gpu": "1"}}}]}),
            "1 Insufficient example.com/gpu",
        ),
        (json!({"status": {"allocatable": {"pods": "0"}}}), json!({}), "1 Too many pods"),
        (json!({}), port, "n"),
    ];
    for (node, spec, expected) in cases {
        let expected =
            if expected == "n" { "n".to_owned() } else { format!("0/1 nodes are available: {expected}.") };
        assert_eq!(told(&cluster(&[("n", node.clone())]), spec.clone()), expected, "{node} {spec}");
    }
    assert_eq!(told(&Cluster::default(), json!({})), "no nodes available to schedule pods");
}

#[test]
fn reasons_are_counted() {
    let tainted = json!({"spec": {"taints": [{"key": "k", "effect": "NoSchedule"}]}});
    let cluster = cluster(&[("a", tainted.clone()), ("b", tainted), ("c", json!({}))]);
    assert_eq!(
        told(&cluster, requests("5", "1")),
        "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) had untolerated taint {k: }."
    );
}

#[test]
fn host_ports_collide() {
    let with = |ip: &str, protocol: &str| {
        json!({"containers": [{"name": "c", "ports": [
            {"containerPort": 80, "hostPort": 80, "hostIP": ip, "protocol": protocol}]}]})
    };
    for (first, second, fits) in [
        (("", "TCP"), ("", "TCP"), false),
        (("", "TCP"), ("", "UDP"), true),
        (("", "TCP"), ("10.0.0.1", "TCP"), false),
        (("10.0.0.1", "TCP"), ("0.0.0.0", "TCP"), false),
        (("10.0.0.1", "TCP"), ("10.0.0.2", "TCP"), true),
    ] {
        let mut cluster = cluster(&[("n", json!({}))]);
        cluster.add_pod("first", "n", ask(with(first.0, first.1)).load);
        assert_eq!(cluster.place(&ask(with(second.0, second.1))).is_ok(), fits, "{first:?} {second:?}");
        cluster.remove_pod("first");
        assert!(cluster.place(&ask(with(second.0, second.1))).is_ok(), "a pod that goes frees its ports");
    }
}

#[test]
fn requests_are_the_neediest_moment() {
    type Containers = Vec<(&'static str, Option<&'static str>)>;
    let container = |cpu: &str, policy: Option<&str>| json!({"name": "c", "restartPolicy": policy, "resources": {"requests": {"cpu": cpu}}});
    let cases: [(Containers, Containers, i64); 6] = [
        // init containers, containers, millicores
        (vec![], vec![("1", None), ("500m", None)], 1500),
        (vec![("2", None)], vec![("1", None)], 2000),
        (vec![("500m", None), ("700m", None)], vec![("1", None)], 1000),
        (vec![("500m", Some("Always"))], vec![("1", None)], 1500),
        (vec![("500m", Some("Always")), ("2", None)], vec![("1", None)], 2500),
        (vec![("2", None), ("500m", Some("Always"))], vec![("1", None)], 2000),
    ];
    for (init, main, expected) in cases {
        let list = |of: &Containers| of.iter().map(|(c, p)| container(c, *p)).collect::<Vec<_>>();
        let load = ask(json!({"initContainers": list(&init), "containers": list(&main)})).load;
        assert_eq!(load.amounts.cpu_millis, expected, "{init:?} {main:?}");
    }
    let overhead = ask(json!({"overhead": {"cpu": "50m"}, "containers": [container("1", None)]})).load;
    assert_eq!((overhead.amounts.cpu_millis, overhead.weight.0), (1050, 1050));
    assert_eq!(
        ask(json!({})).load.weight,
        (100, 200 << 20),
        "no request still counts when nodes are compared"
    );
}

#[test]
fn the_emptier_node_wins_and_ties_are_settled() {
    let mut cluster = cluster(&[("a", json!({})), ("b", json!({})), ("c", json!({}))]);
    assert_eq!(told(&cluster, json!({})), "a", "the first by name");
    cluster.add_pod("1", "a", ask(requests("1", "1Gi")).load);
    assert_eq!(told(&cluster, json!({})), "b");
    cluster.add_pod("2", "b", Load::default());
    assert_eq!(told(&cluster, json!({})), "c", "fewer pods");
    let shun = json!({"spec": {"taints": [{"key": "k", "effect": "PreferNoSchedule"}]}});
    cluster.set_node("c", facts(shun));
    assert_eq!(told(&cluster, json!({})), "b", "not the one that prefers to be left alone");
    let likes = json!({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 10, "preference": {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["a"]}]}}]}}});
    assert_eq!(told(&cluster, likes), "a");
}

#[test]
fn a_node_that_comes_back_still_has_its_pods() {
    let mut cluster = cluster(&[("n", json!({}))]);
    cluster.add_pod("1", "n", ask(requests("3", "1")).load);
    cluster.remove_node("n");
    assert_eq!(told(&cluster, json!({})), "no nodes available to schedule pods");
    cluster.set_node("n", facts(json!({})));
    assert_eq!(told(&cluster, requests("2", "1")), "0/1 nodes are available: 1 Insufficient cpu.");
    assert!(!cluster.set_node("n", facts(json!({}))), "the same facts are no news");
    assert!(cluster.remove_pod("1") && !cluster.remove_pod("1"));
    assert_eq!(told(&cluster, requests("2", "1")), "n");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// However pods come and go: no node is overcommitted, and a refusal is true.
    #[test]
    fn nothing_is_overcommitted(
        nodes in prop::collection::vec((1..8i64, 1..6i64), 1..5),
        steps in prop::collection::vec((any::<bool>(), 0..4000i64, 0..20usize), 1..60),
    ) {
        let mut cluster = Cluster::default();
        for (i, (cpu, pods)) in nodes.iter().enumerate() {
            let status = json!({"status": {"allocatable": {"cpu": cpu.to_string(), "pods": pods.to_string()}}});
            cluster.set_node(&format!("n{i}"), facts(status));
        }
        let mut on: BTreeMap<String, (usize, i64)> = BTreeMap::new();
        for (n, (comes, millis, which)) in steps.into_iter().enumerate() {
            if !comes {
                if let Some(uid) = on.keys().nth(which).cloned() {
                    on.remove(&uid);
                    cluster.remove_pod(&uid);
                }
                continue;
            }
            let ask = ask(requests(&format!("{millis}m"), "0"));
            let free = |i: usize| {
                let mine = on.values().filter(|(at, _)| *at == i);
                let used: i64 = mine.clone().map(|(_, m)| m).sum();
                (nodes[i].0 * 1000 - used, nodes[i].1 - i64::try_from(mine.count()).unwrap_or(0))
            };
            let possible = (0..nodes.len()).any(|i| free(i).0 >= millis && free(i).1 > 0);
            match cluster.place(&ask) {
                Ok(name) => {
                    let name = name.to_owned();
                    let i: usize = name[1..].parse().unwrap();
                    prop_assert!(free(i).0 >= millis && free(i).1 > 0, "{} has no room", name);
                    let uid = format!("pod-{n}");
                    cluster.add_pod(&uid, &name, ask.load);
                    on.insert(uid, (i, millis));
                }
                Err(why) => prop_assert!(!possible, "{}, but it fits", why),
            }
        }
    }
}
