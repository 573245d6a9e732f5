//! What agents ask of an API server, nothing that only Sheave's has, so that anybody's serves them; and what they tell it.

use std::collections::BTreeMap;

use serde_json::json;
use sheave_harness::overlay::{Bed, Host, Ips, Pod, all_pairs};
use sheave_harness::{Cgroup, NetNs, http, require_root, unique, wait_for};

/// What was asked and answered, by verb and resource.
fn requests(bed: &Bed) -> BTreeMap<(String, String), u64> {
    let text = bed.text("GET", "/metrics", None).expect("the API's counters");
    let mut found = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("apiserver_request_total{")) {
        let label = |name: &str| {
            let rest = line.split_once(&format!("{name}=\"")).expect("a label").1;
            rest.split('"').next().expect("its value").to_owned()
        };
        let count: u64 = line.rsplit(' ').next().and_then(|n| n.parse().ok()).expect("a count");
        *found.entry((label("verb"), label("resource"))).or_default() += count;
    }
    found
}

#[test]
fn network_and_services_need_lists_and_watches_of_kubernetes_own_kinds_only() {
    if !require_root() {
        return;
    }
    let cgroup = Cgroup::new("foreign");
    let mut bed = Bed::new(env!("CARGO_BIN_EXE_sheave"));
    bed.control();
    // What a cluster has before we come: Nodes, a Service and its endpoints.
    let mut hosts: Vec<Host> = (0..2).map(|_| bed.join(Ips::Both, &[])).collect();
    hosts.iter_mut().for_each(Host::kill9);
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"ports": [{"port": 80}]}});
    bed.raw("POST", "/api/v1/namespaces/default/services", Some(&service)).expect("make a Service");
    let before = requests(&bed);

    let group = cgroup.path().display().to_string();
    let more = ["--data-plane", "nftables", "--cgroup-path", &group];
    for host in &mut hosts {
        host.set_components("network,services", &more);
        host.start();
        host.wait_serving();
    }
    let pods: Vec<Pod> = hosts.iter().map(Host::pod).collect();
    hosts.iter().for_each(|host| host.wait_ways(2));
    all_pairs(&pods.iter().collect::<Vec<_>>());
    for host in &hosts {
        // What kube-proxy tells load balancers once it has done its work.
        let healthz = ([127, 0, 0, 1], 10256).into();
        wait_for("services in the kernel", || match http::get_in(&host.netns, healthz, "/healthz") {
            Ok((200, _)) => Ok(()),
            other => Err(format!("{other:?}\n{}", host.log())),
        });
    }
    // Watches are counted when they end.
    hosts.iter_mut().for_each(Host::kill9);
    let watched = wait_for("the watches to be counted", || {
        let after = requests(&bed);
        let count = |all: &BTreeMap<(String, String), u64>| {
            all.iter().filter(|((verb, _), _)| verb == "watch").map(|(_, count)| *count).sum::<u64>()
        };
        if count(&after) >= count(&before) + 4 { Ok(after) } else { Err(format!("{after:?}")) }
    });
    let kinds = ["nodes", "pods", "services", "endpointslices", "networkpolicies", "namespaces"];
    for ((verb, resource), count) in &watched {
        let new = count - before.get(&(verb.clone(), resource.clone())).copied().unwrap_or(0);
        // Ours: the counters.
        if new == 0 || verb == "other" {
            continue;
        }
        let kind = resource.split('.').next().unwrap_or_default();
        let allowed = ["list", "watch", "patch"].contains(&verb.as_str()) && kinds.contains(&kind);
        assert!(allowed, "{new} times {verb} of {resource}: {watched:?}");
    }
}

#[test]
fn a_range_without_addresses_left_is_an_event_of_the_node() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(env!("CARGO_BIN_EXE_sheave"));
    bed.control();
    let mut host = bed.join(Ips::Both, &["--pod-cidr", "10.244.200.0/30"]);
    host.wait_serving();
    let mut pods = Vec::new();
    let why = loop {
        match host.try_pod(NetNs::new(), unique("pod")) {
            Ok(pod) => pods.push(pod),
            Err((_, _, why)) => break why,
        }
        assert!(pods.len() < 4, "a /30 has no more addresses");
    };
    assert!(!pods.is_empty() && why.contains("10.244.200.0/30"), "{why}");
    wait_for("the event", || {
        let all = bed.raw("GET", "/api/v1/namespaces/default/events", None)?;
        let told = |event: &&serde_json::Value| {
            let object = &event["involvedObject"];
            event["reason"] == "PodAddressesExhausted"
                && (&object["kind"], &object["name"]) == (&json!("Node"), &json!(host.name))
        };
        let event = all["items"].as_array().into_iter().flatten().find(told).cloned();
        let event = event.ok_or_else(|| format!("{all}\n{}", host.log()))?;
        let message = event["message"].as_str().unwrap_or_default();
        assert!(message.contains("10.244.200.0/30"), "{event}");
        Ok::<(), String>(())
    });
}
