//! The allocator's promises, on dual-stack and single-stack clusters.

use super::*;
use proptest::prelude::*;

fn dual() -> ServiceAllocator {
    ServiceAllocator::new(
        &["10.96.0.0/24".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        (30000, 30010),
    )
    .unwrap()
}

fn single() -> ServiceAllocator {
    ServiceAllocator::new(&["10.96.0.0/24".parse().unwrap()], (30000, 30010)).unwrap()
}

fn service(spec: Value) -> Value {
    json!({"metadata": {"name": "s", "namespace": "n"}, "spec": spec})
}

fn create(allocator: &mut ServiceAllocator, spec: Value) -> Result<Value, ApiError> {
    let mut s = service(spec);
    let grant = allocator.allocate(&mut s, None)?;
    allocator.commit(grant);
    Ok(s["spec"].clone())
}

fn update(allocator: &mut ServiceAllocator, old: &Value, spec: Value) -> Result<Value, ApiError> {
    let mut s = service(spec);
    let grant = allocator.allocate(&mut s, Some(&service(old.clone())))?;
    allocator.commit(grant);
    Ok(s["spec"].clone())
}

#[test]
fn families_follow_the_policy() {
    let cases = [
        (json!({"type": "ClusterIP"}), json!(["10.96.0.2"]), json!(["IPv4"]), "SingleStack"),
        (
            json!({"ipFamilyPolicy": "PreferDualStack"}),
            json!(["10.96.0.2", "fd00:96::2"]),
            json!(["IPv4", "IPv6"]),
            "PreferDualStack",
        ),
        (json!({"ipFamilies": ["IPv6"]}), json!(["fd00:96::2"]), json!(["IPv6"]), "SingleStack"),
        (
            json!({"ipFamilies": ["IPv6", "IPv4"]}),
            json!(["fd00:96::2", "10.96.0.2"]),
            json!(["IPv6", "IPv4"]),
            "RequireDualStack",
        ),
        (
            json!({"clusterIP": "None", "selector": {"a": "b"}}),
            json!(["None"]),
            json!(["IPv4"]),
            "SingleStack",
        ),
        (json!({"clusterIP": "None"}), json!(["None"]), json!(["IPv4", "IPv6"]), "RequireDualStack"),
        (json!({"clusterIP": "fd00:96::a"}), json!(["fd00:96::a"]), json!(["IPv6"]), "SingleStack"),
        (
            json!({"clusterIP": "10.96.0.10", "ipFamilyPolicy": "RequireDualStack"}),
            json!(["10.96.0.10", "fd00:96::2"]),
            json!(["IPv4", "IPv6"]),
            "RequireDualStack",
        ),
    ];
    for (spec, ips, families, policy) in cases {
        let got = create(&mut dual(), spec.clone()).unwrap_or_else(|e| panic!("{spec}: {e}"));
        assert_eq!(got["clusterIPs"], ips, "{spec}");
        assert_eq!(got["clusterIP"], ips[0], "{spec}");
        assert_eq!(got["ipFamilies"], families, "{spec}");
        assert_eq!(got["ipFamilyPolicy"], policy, "{spec}");
    }
}

#[test]
fn single_stack_clusters_say_what_they_lack() {
    let got = create(&mut single(), json!({"ipFamilyPolicy": "PreferDualStack"})).unwrap();
    assert_eq!(got["clusterIPs"], json!(["10.96.0.2"]));
    for spec in [json!({"ipFamilyPolicy": "RequireDualStack"}), json!({"ipFamilies": ["IPv6"]})] {
        let error = create(&mut single(), spec.clone()).expect_err("refused");
        assert_eq!(error.code, 422, "{spec}");
        assert!(error.message.contains("not configured"), "{}", error.message);
    }
}

#[test]
fn refusals_take_nothing() {
    let mut allocator = dual();
    let held =
        create(&mut allocator, json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30005}]}))
            .unwrap();
    let free = allocator.ranges[0].free();
    let cases = [
        (json!({"clusterIP": held["clusterIP"]}), "spec.clusterIPs[0]", "already allocated"),
        (json!({"clusterIP": "192.168.0.1"}), "spec.clusterIPs[0]", "service range"),
        (json!({"clusterIP": "10.96.0.0"}), "spec.clusterIPs[0]", "service range"),
        (json!({"clusterIP": "junk"}), "spec.clusterIPs[0]", "IP address"),
        (
            json!({"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.8"]}),
            "spec.clusterIPs[0]",
            "same as clusterIP",
        ),
        (json!({"clusterIPs": ["10.96.0.8"]}), "spec.clusterIPs", "clusterIP is not specified"),
        (json!({"clusterIP": "10.96.0.8", "ipFamilies": ["IPv6"]}), "spec.clusterIPs[0]", "match ipFamilies"),
        (json!({"ipFamilies": ["IPv4", "IPv4"]}), "spec.ipFamilies[1]", "twice"),
        (json!({"ipFamilies": ["IPv5"]}), "spec.ipFamilies[0]", "IPv4 or IPv6"),
        (json!({"ipFamilyPolicy": "Both"}), "spec.ipFamilyPolicy", "supported values"),
        (
            json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": 30005}]}),
            "spec.ports[0].nodePort",
            "already",
        ),
        (
            json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": 99}]}),
            "spec.ports[0].nodePort",
            "30000-30010",
        ),
        (
            json!({"type": "NodePort", "ports": [{"port": 1}, {"port": 2, "nodePort": 30005}]}),
            "spec.ports[1].nodePort",
            "already",
        ),
    ];
    for (spec, field, why) in cases {
        let error = create(&mut allocator, spec.clone()).expect_err(&spec.to_string());
        let cause = &error.details.unwrap().causes[0];
        assert_eq!(cause.field, field, "{spec}");
        assert!(cause.message.contains(why), "{spec}: {}", cause.message);
        assert_eq!(allocator.ranges[0].free(), free, "{spec} leaked");
    }
}

#[test]
fn protocols_of_one_port_share_the_node_port() {
    let ports = json!([{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}, {"port": 80}]);
    let got = create(&mut dual(), json!({"type": "NodePort", "ports": ports})).unwrap();
    let numbers: Vec<u64> =
        got["ports"].as_array().unwrap().iter().map(|p| p["nodePort"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [30000, 30000, 30001]);
}

#[test]
fn load_balancers_get_a_health_port() {
    let mut allocator = dual();
    let spec = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": [{"port": 80}]});
    let got = create(&mut allocator, spec).unwrap();
    assert_eq!((&got["ports"][0]["nodePort"], &got["healthCheckNodePort"]), (&json!(30000), &json!(30001)));
    let mut cluster = got.clone();
    cluster["externalTrafficPolicy"] = json!("Cluster");
    let changed = update(&mut allocator, &got, cluster).unwrap();
    assert_eq!(changed.get("healthCheckNodePort"), None);
    assert!(allocator.ports.take(30001, Protocol::Tcp), "the health port came back");
    let without =
        json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]});
    assert_eq!(create(&mut allocator, without).unwrap()["ports"][0].get("nodePort"), None);
}

#[test]
fn updates_keep_what_they_leave_out() {
    let mut allocator = dual();
    let old = create(&mut allocator, json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP"}]}))
        .unwrap();
    let ports = json!([{"port": 80, "protocol": "TCP"}, {"port": 81, "protocol": "TCP"}]);
    let new = update(&mut allocator, &old, json!({"type": "NodePort", "ports": ports})).unwrap();
    assert_eq!(new["clusterIP"], old["clusterIP"]);
    assert_eq!(new["ports"][0]["nodePort"], old["ports"][0]["nodePort"]);
    assert_eq!(new["ports"][1]["nodePort"], json!(30001));
}

#[test]
fn changing_the_type_moves_what_is_held() {
    let mut allocator = dual();
    let node_port = create(&mut allocator, json!({"type": "NodePort", "ports": [{"port": 80}]})).unwrap();
    let mut spec = node_port.clone();
    spec["type"] = json!("ClusterIP");
    let cluster = update(&mut allocator, &node_port, spec).unwrap();
    assert_eq!(cluster["ports"][0].get("nodePort"), None);
    assert!(allocator.ports.take(30000, Protocol::Tcp), "the node port came back");
    let mut spec = cluster.clone();
    spec["type"] = json!("ExternalName");
    let external = update(&mut allocator, &cluster, spec).unwrap();
    assert_eq!(external.get("clusterIP"), None);
    let ip: IpAddr = cluster["clusterIP"].as_str().unwrap().parse().unwrap();
    assert!(allocator.take_ip(ip), "the cluster IP came back");
}

#[test]
fn one_changed_address_field_speaks_for_both() {
    let mut allocator = dual();
    let old = create(&mut allocator, json!({"type": "ClusterIP"})).unwrap();
    let mut spec = old.clone();
    spec["clusterIP"] = json!("10.96.0.77");
    assert_eq!(update(&mut allocator, &old, spec).unwrap()["clusterIPs"], json!(["10.96.0.77"]));
    let mut spec = old.clone();
    spec["clusterIP"] = json!("");
    assert_eq!(update(&mut allocator, &old, spec).unwrap()["clusterIP"], old["clusterIP"]);
}

#[test]
fn settings_of_the_old_type_go() {
    let mut allocator = dual();
    let spec = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster", "internalTrafficPolicy": "Cluster",
        "allocateLoadBalancerNodePorts": true, "sessionAffinity": "ClientIP", "sessionAffinityConfig": {}, "ports": [{"port": 80}]});
    let old = create(&mut allocator, spec).unwrap();
    let mut spec = old.clone();
    spec["type"] = json!("ClusterIP");
    spec["sessionAffinity"] = json!("None");
    let new = update(&mut allocator, &old, spec.clone()).unwrap();
    let mut keys: Vec<&String> = new.as_object().unwrap().keys().collect();
    keys.sort();
    let expected = [
        "clusterIP",
        "clusterIPs",
        "internalTrafficPolicy",
        "ipFamilies",
        "ipFamilyPolicy",
        "ports",
        "sessionAffinity",
        "type",
    ];
    assert_eq!(keys, expected);
    spec["externalTrafficPolicy"] = json!("Local");
    let asked = update(&mut allocator, &old, spec).unwrap();
    assert_eq!(asked["externalTrafficPolicy"], "Local", "what was asked for is left for validation");
}

#[test]
fn policy_changes_add_and_drop_the_second_family() {
    let mut allocator = dual();
    let one = create(&mut allocator, json!({"type": "ClusterIP"})).unwrap();
    let mut spec = one.clone();
    spec["ipFamilyPolicy"] = json!("RequireDualStack");
    let two = update(&mut allocator, &one, spec).unwrap();
    assert_eq!(two["clusterIPs"], json!([one["clusterIP"], "fd00:96::2"]));
    let mut spec = two.clone();
    spec["ipFamilyPolicy"] = json!("SingleStack");
    let back = update(&mut allocator, &two, spec).unwrap();
    assert_eq!(back["clusterIPs"], json!([one["clusterIP"]]));
    assert_eq!(back["ipFamilies"], json!(["IPv4"]));
    assert!(allocator.take_ip("fd00:96::2".parse().unwrap()));
}

#[test]
fn rollback_gives_back_and_keeps_the_old() {
    let mut allocator = dual();
    let old = create(&mut allocator, json!({"type": "NodePort", "ports": [{"port": 80}]})).unwrap();
    let (ips, ports) = (allocator.ranges[0].free(), allocator.ports.clone());
    let mut new = service(json!({"type": "ExternalName", "externalName": "x"}));
    let grant = allocator.allocate(&mut new, Some(&service(old.clone()))).unwrap();
    allocator.rollback(grant);
    assert_eq!(allocator.ranges[0].free(), ips);
    let mut more = service(json!({"type": "NodePort", "ports": [{"port": 80}, {"port": 81}]}));
    let grant = allocator.allocate(&mut more, Some(&service(old))).unwrap();
    allocator.rollback(grant);
    assert!(!allocator.ports.take(30000, Protocol::Tcp));
    assert!(ports.clone().take(30001, Protocol::Tcp) && allocator.ports.take(30001, Protocol::Tcp));
}

#[test]
fn a_restart_finds_what_is_held() {
    let mut before = dual();
    let spec = create(
        &mut before,
        json!({"type": "NodePort", "ipFamilyPolicy": "PreferDualStack", "ports": [{"port": 80}]}),
    )
    .unwrap();
    let mut after = dual();
    assert_eq!(after.adopt(&service(spec.clone())), Vec::<String>::new());
    let problems = after.adopt(&service(spec.clone()));
    assert_eq!(problems.len(), 3, "{problems:?}");
    assert!(create(&mut after, json!({"clusterIP": spec["clusterIP"]})).is_err());
    after.release(&service(spec.clone()));
    assert!(create(&mut after, spec).is_ok());
}

#[test]
fn full_ranges_are_named() {
    let mut allocator = ServiceAllocator::new(&["10.96.0.0/29".parse().unwrap()], (30000, 30000)).unwrap();
    for _ in 0..5 {
        create(&mut allocator, json!({})).unwrap();
    }
    let error = create(&mut allocator, json!({})).expect_err("full");
    assert!(error.message.contains("10.96.0.0/29 is full"), "{}", error.message);
    let mut allocator = ServiceAllocator::new(&["10.96.0.0/24".parse().unwrap()], (30000, 30000)).unwrap();
    let error = create(&mut allocator, json!({"type": "NodePort", "ports": [{"port": 1}, {"port": 2}]}))
        .expect_err("full");
    assert!(error.message.contains("30000-30000 is full"), "{}", error.message);
    assert!(
        create(&mut allocator, json!({"type": "NodePort", "ports": [{"port": 1}]})).is_ok(),
        "nothing leaked"
    );
}

#[test]
fn ranges_must_fit_together() {
    let net = |s: &str| s.parse().unwrap();
    assert_eq!(ServiceAllocator::new(&[], (1, 2)).unwrap_err(), AllocatorError::Families { count: 0 });
    assert!(ServiceAllocator::new(&[net("10.0.0.0/24"), net("10.1.0.0/24")], (1, 2)).is_err());
    assert!(matches!(ServiceAllocator::new(&[net("10.0.0.0/31")], (1, 2)), Err(AllocatorError::Ip(_))));
    assert!(matches!(ServiceAllocator::new(&[net("10.0.0.0/24")], (2, 1)), Err(AllocatorError::Port(_))));
}

proptest! {
    #[test]
    fn two_services_never_share_an_address(kinds in proptest::collection::vec(0u8..4, 1..40)) {
        let mut allocator = dual();
        let mut live: Vec<Value> = Vec::new();
        for k in kinds {
            match k {
                0 => { if let Ok(s) = create(&mut allocator, json!({"type": "ClusterIP"})) { live.push(s); } }
                1 => { if let Ok(s) = create(&mut allocator, json!({"type": "NodePort", "ports": [{"port": 80}]})) { live.push(s); } }
                2 => if let Some(s) = live.pop() { allocator.release(&service(s)); },
                _ => if let Some(s) = live.first().cloned() {
                    let mut spec = s.clone();
                    spec["ipFamilyPolicy"] = json!("PreferDualStack");
                    if let Ok(n) = update(&mut allocator, &s, spec) { live[0] = n; }
                },
            }
            let mut ips: Vec<&str> = live.iter().flat_map(|s| s["clusterIPs"].as_array().unwrap()).filter_map(Value::as_str).collect();
            let count = ips.len();
            ips.sort_unstable();
            ips.dedup();
            prop_assert_eq!(ips.len(), count);
            let mut ports: Vec<u64> = live.iter().filter_map(|s| s["ports"][0]["nodePort"].as_u64()).collect();
            let count = ports.len();
            ports.sort_unstable();
            ports.dedup();
            prop_assert_eq!(ports.len(), count);
        }
        let v4: usize = live.iter().flat_map(|s| s["clusterIPs"].as_array().unwrap()).filter(|ip| ip.as_str().unwrap().contains('.')).count();
        prop_assert_eq!(allocator.ranges[0].free() as usize, 254 - v4);
    }
}
