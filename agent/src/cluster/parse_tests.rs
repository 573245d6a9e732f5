//! What objects become. Invariant under test: every field of the model comes from the object, and what is bad is named.

use super::*;
use serde_json::{Value, json};

const HERE: Place<'_> = Place { node: "node-1", zone: Some("a") };

fn parse_service(value: Value) -> Option<Service> {
    service(&serde_json::from_value(value).unwrap())
}

/// A Service with these fields of spec and annotations over the least that is balanced.
fn with(spec: Value, annotations: Value) -> Service {
    let mut whole = json!({"clusterIPs": ["10.96.0.5"], "ports": [{"port": 80}]});
    for (field, value) in spec.as_object().unwrap() {
        whole[field] = value.clone();
    }
    let meta = json!({"namespace": "default", "name": "web", "annotations": annotations});
    parse_service(json!({"metadata": meta, "spec": whole})).unwrap()
}

fn problems(service: &Service) -> Vec<&str> {
    service.extras.iter().flat_map(|extras| &extras.problems).map(|text| &**text).collect()
}

#[test]
fn a_service_keeps_what_balancing_needs() {
    let found = parse_service(json!({
        "metadata": {"namespace": "default", "name": "web", "managedFields": [{"manager": "kubectl"}]},
        "spec": {
            "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "fd00:96::5"],
            "type": "NodePort", "externalTrafficPolicy": "Local",
            "ports": [
                {"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP", "targetPort": "web"},
                {"name": "sctp", "port": 99, "protocol": "SCTP"},
                {"name": "dns", "port": 53, "protocol": "UDP"},
            ],
        },
    }))
    .unwrap();
    assert_eq!(&*found.key, "default/web");
    assert_eq!(found.cluster_ips.len(), 2);
    let ports: Vec<_> = found.ports.iter().map(|p| (&*p.name, p.port, p.node_port, p.proto)).collect();
    let wanted = [("http", 80, 30080, Proto::Tcp), ("sctp", 99, 0, Proto::Sctp), ("dns", 53, 0, Proto::Udp)];
    assert_eq!(ports, wanted);
    assert!(found.external_local && !found.internal_local);
    assert_eq!((found.affinity_timeout_s, found.extras), (0, None));
}

#[test]
fn some_services_are_not_balanced() {
    for (labels, spec) in [
        (json!({}), json!({"clusterIP": "None", "ports": [{"port": 80}]})),
        (json!({}), json!({"clusterIPs": ["None"], "ports": []})),
        (json!({}), json!({"type": "ExternalName", "externalName": "a.b", "clusterIP": "10.96.0.1"})),
        (json!({PROXY_NAME: "other"}), json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]})),
        (json!({PROXY_NAME: ""}), json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]})),
        (json!({}), json!({"ports": [{"port": 80}]})),
        (json!({}), json!({"clusterIP": "", "ports": [{"port": 80}]})),
    ] {
        let object = json!({"metadata": {"namespace": "a", "name": "b", "labels": labels}, "spec": spec});
        assert_eq!(parse_service(object.clone()), None, "{object}");
    }
}

#[test]
fn a_load_balancer_has_addresses_ranges_and_a_health_port() {
    let found = parse_service(json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {
            "clusterIPs": ["10.96.0.5"], "type": "LoadBalancer", "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 31000, "externalIPs": ["203.0.113.1", "2001:db8::1"],
            "loadBalancerSourceRanges": [" 192.0.2.7/24", "2001:db8::/32", "192.0.2.0/24"],
            "allocateLoadBalancerNodePorts": false, "trafficDistribution": "PreferClose",
            "ports": [{"port": 80}],
        },
        "status": {"loadBalancer": {"ingress": [
            {"ip": "198.51.100.1"}, {"ip": "198.51.100.2", "ipMode": "VIP"},
            {"ip": "198.51.100.3", "ipMode": "Proxy"}, {"hostname": "lb.example"},
        ]}},
    }))
    .unwrap();
    let extras = found.extras.unwrap();
    let texts = |addrs: &[IpAddr]| addrs.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&extras.ingress_ips), ["198.51.100.1", "198.51.100.2"]);
    assert_eq!(texts(&extras.external_ips), ["203.0.113.1", "2001:db8::1"]);
    let ranges: Vec<String> = extras.source_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["192.0.2.0/24", "2001:db8::/32"]);
    assert_eq!((extras.health_check_node_port, extras.distribution), (31000, Distribution::SameZone));
    assert!(extras.problems.is_empty() && found.ports[0].node_port == 0);
    let cluster = json!({"type": "LoadBalancer", "healthCheckNodePort": 31000});
    assert_eq!(with(cluster, json!({})).extras, None, "only policy Local has a health port");
}

#[test]
fn affinity_has_a_timeout_within_bounds() {
    let config = |s: i64| json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": s}}});
    for (spec, wanted, bad) in [
        (json!({}), 0, false),
        (json!({"sessionAffinity": "None"}), 0, false),
        (json!({"sessionAffinity": "ClientIP"}), 10_800, false),
        (config(1), 1, false),
        (config(86_400), 86_400, false),
        (config(86_401), 10_800, true),
        (config(0), 10_800, true),
        (config(-1), 10_800, true),
    ] {
        let found = with(spec.clone(), json!({}));
        assert_eq!(found.affinity_timeout_s, wanted, "{spec}");
        assert_eq!(!problems(&found).is_empty(), bad, "{spec}");
    }
}

#[test]
fn annotations_choose_scheduler_and_forwarding() {
    for (annotations, scheduler, dsr, bad) in [
        (json!({}), Scheduler::Default, false, false),
        (json!({SCHEDULER: "maglev"}), Scheduler::Maglev, false, false),
        (json!({SCHEDULER: "wlc", FORWARDING: "dsr"}), Scheduler::Ipvs(IpvsScheduler::Wlc), true, false),
        (json!({SCHEDULER: "best"}), Scheduler::Default, false, true),
        (json!({FORWARDING: "geneve"}), Scheduler::Default, false, true),
    ] {
        let found = with(json!({}), annotations.clone());
        let extras = found.extras.clone().unwrap_or_default();
        assert_eq!((extras.scheduler, extras.dsr), (scheduler, dsr), "{annotations}");
        assert_eq!(!problems(&found).is_empty(), bad, "{annotations}");
    }
}

#[test]
fn what_cannot_be_used_of_a_service_is_named_and_the_rest_is_used() {
    let found = with(
        json!({
            "clusterIPs": ["10.96.0.5", "10.96.0.6", "junk"],
            "externalIPs": ["127.0.0.1", "203.0.113.1"],
            "loadBalancerSourceRanges": ["10.0.0.0/8", "everybody"],
            "ports": [
                {"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 80}, {"name": "c", "port": 70000},
                {"name": "d", "port": 81, "protocol": "ICMP"}, {"name": "e", "port": 82, "nodePort": 30080},
            ],
        }),
        json!({}),
    );
    let told = problems(&found);
    for field in [
        "spec.clusterIPs[1]",
        "spec.clusterIPs[2]",
        "spec.ports[1].port",
        "spec.ports[2].port",
        "spec.ports[3].protocol",
        "spec.ports[4].nodePort",
        "spec.externalIPs[0]",
        "spec.loadBalancerSourceRanges[1]",
    ] {
        assert!(told.iter().any(|text| text.starts_with(&format!("{field}: "))), "{field}: {told:?}");
    }
    let ports: Vec<_> = found.ports.iter().map(|p| (p.port, p.node_port)).collect();
    assert_eq!((found.cluster_ips.len(), ports), (1, vec![(80, 30080), (82, 0)]));
    let extras = found.extras.unwrap();
    assert_eq!(&*extras.external_ips, ["203.0.113.1".parse::<IpAddr>().unwrap()]);
    let ranges: Vec<String> = extras.source_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["10.0.0.0/8", "255.255.255.255/32", "::/128"], "nobody is let in by mistake");
}

#[test]
fn many_problems_are_counted_not_listed() {
    let ports: Vec<Value> = (0..20).map(|n| json!({"name": format!("p{n}"), "port": -1})).collect();
    let found = with(json!({"ports": ports}), json!({}));
    assert_eq!(problems(&found).len(), PROBLEMS_MAX + 1);
    assert_eq!(problems(&found).last().copied(), Some("and 12 more problems"));
}

fn parse(fields: Value) -> Slice {
    let mut whole = json!({
        "metadata": {"namespace": "default", "name": "web-abc", "labels": {SERVICE_NAME: "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
    });
    for (field, value) in fields.as_object().unwrap() {
        whole[field] = value.clone();
    }
    slice(&serde_json::from_value(whole).unwrap(), HERE).unwrap()
}

#[test]
fn conditions_decide_whether_an_endpoint_counts() {
    use Readiness::{Ready, Terminating};
    for (conditions, wanted) in [
        (json!({}), Some(Ready)),
        (json!({"ready": true}), Some(Ready)),
        // publishNotReadyAddresses: the controller says ready whatever the pod says.
        (json!({"ready": true, "serving": false, "terminating": false}), Some(Ready)),
        (json!({"ready": true, "serving": true, "terminating": true}), Some(Ready)),
        (json!({"ready": false}), None),
        (json!({"ready": null, "serving": null}), Some(Ready)),
        (json!({"ready": false, "serving": true, "terminating": true}), Some(Terminating)),
        (json!({"ready": false, "serving": true, "terminating": false}), None),
        (json!({"ready": false, "serving": false, "terminating": true}), None),
    ] {
        let found = parse(json!({"endpoints": [{"addresses": ["10.244.0.1"], "conditions": conditions}]}));
        assert_eq!(found.endpoints.first().map(|e| e.readiness), wanted, "{conditions}");
    }
}

#[test]
fn a_slice_knows_its_service_and_which_endpoints_are_here() {
    let found = parse(json!({"endpoints": [
        {"addresses": ["10.244.0.1", "10.244.0.9"], "nodeName": "node-1"},
        {"addresses": ["10.244.1.1"], "nodeName": "node-2"},
    ]}));
    assert_eq!((&*found.key, &*found.service), ("default/web-abc", "default/web"));
    let here: Vec<_> = found.endpoints.iter().map(|e| (e.addr.to_string(), e.on_this_node)).collect();
    assert_eq!(here, [("10.244.0.1".to_owned(), true), ("10.244.1.1".to_owned(), false)]);
    assert_eq!((found.ports.len(), found.weight, found.problems.len()), (1, 1, 0));
    assert_eq!(parse(json!({"endpoints": null, "ports": null})).endpoints.len(), 0);
}

#[test]
fn hints_are_seen_from_this_node_and_its_zone() {
    for (hints, wanted) in [
        (json!(null), Hint::None),
        (json!({}), Hint::None),
        (json!({"forZones": []}), Hint::None),
        (json!({"forZones": [{"name": "b"}, {"name": "a"}]}), Hint::Zone),
        (json!({"forZones": [{"name": "b"}]}), Hint::Elsewhere),
        (json!({"forZones": [{"name": "a"}], "forNodes": [{"name": "node-1"}]}), Hint::Node),
        (json!({"forZones": [{"name": "a"}], "forNodes": [{"name": "node-2"}]}), Hint::Zone),
        (json!({"forNodes": [{"name": "node-2"}]}), Hint::Elsewhere),
    ] {
        let found = parse(json!({"endpoints": [{"addresses": ["10.244.0.1"], "hints": hints}]}));
        assert_eq!(found.endpoints[0].hint, wanted, "{hints}");
    }
}

#[test]
fn what_cannot_be_used_of_a_slice_is_named_and_the_rest_is_used() {
    let found = parse(json!({
        "ports": [
            {"name": "http", "port": 8080}, {"name": "http", "port": 8081}, {"name": "all", "port": null},
            {"name": "big", "port": 65536}, {"name": "odd", "port": 1, "protocol": "IGMP"},
        ],
        "endpoints": [
            {"addresses": ["10.244.0.1"]}, {"addresses": ["10.244.0.1"]}, {"addresses": ["fd00::1"]},
            {"addresses": ["web.example"]}, {"addresses": []}, {"addresses": ["169.254.1.1"]},
            {"addresses": ["10.244.0.1"], "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["bad, but not ready"], "conditions": {"ready": false}},
        ],
    }));
    let told: Vec<&str> = found.problems.iter().map(|text| &**text).collect();
    let fields = ["ports[1].name", "ports[2].port", "ports[3].port", "ports[4].protocol"];
    let addresses = [2, 3, 4, 5].map(|n| format!("endpoints[{n}].addresses[0]"));
    for field in fields.iter().map(|f| (*f).to_owned()).chain(addresses) {
        assert!(told.iter().any(|text| text.starts_with(&format!("{field}: "))), "{field}: {told:?}");
    }
    assert_eq!(told.last().copied(), Some("and 1 more problems"), "the second of the same address");
    assert_eq!((found.ports.len(), found.endpoints.len()), (1, 3));
}

#[test]
fn a_weight_is_1_to_100() {
    for (text, wanted, bad) in
        [("7", 7, false), ("100", 100, false), ("0", 1, true), ("101", 1, true), ("x", 1, true)]
    {
        let meta = json!({"namespace": "default", "name": "web-abc", "labels": {SERVICE_NAME: "web"}, "annotations": {WEIGHT: text}});
        let found = parse(json!({"metadata": meta}));
        assert_eq!((found.weight, !found.problems.is_empty()), (wanted, bad), "{text}");
    }
}
