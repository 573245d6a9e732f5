//! Network policies: every field wrong in turn.

use super::*;
use crate::resource::kinds::NETWORK_POLICIES;

#[test]
fn network_policies() {
    let good = json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {
        "podSelector": {"matchLabels": {"app": "a"}, "matchExpressions": [{"key": "k", "operator": "Exists"}]},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{
            "from": [
                {"podSelector": {}, "namespaceSelector": {"matchLabels": {"team": "x"}}},
                {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
            ],
            "ports": [{"port": 80, "endPort": 90}, {"protocol": "SCTP", "port": "named"}, {}],
        }],
        "egress": [{"to": [{"ipBlock": {"cidr": "fd00::/8"}}]}, {}],
    }});
    let (from, ports) = ("/spec/ingress/0/from", "/spec/ingress/0/ports");
    let at = |base: &str, rest: &str| format!("{base}{rest}");
    let block = "spec.ingress[0].from[1].ipBlock";
    let cases = [
        ("/spec".to_owned() + "/policyTypes/0", json!("Both"), "spec.policyTypes[0]", "supported"),
        ("/spec/policyTypes/2".to_owned(), json!("Egress"), "spec.policyTypes", "at most 2"),
        (
            "/spec/podSelector/matchExpressions/0/operator".to_owned(),
            json!("Like"),
            "spec.podSelector",
            "Like",
        ),
        (at(from, "/0"), json!({}), "spec.ingress[0].from[0]", "must specify a peer"),
        (
            at(from, "/1/podSelector"),
            json!({}),
            "spec.ingress[0].from[1]",
            "may not specify both ipBlock and another peer",
        ),
        (
            at(from, "/0/namespaceSelector/matchLabels"),
            json!({"-": "x"}),
            "spec.ingress[0].from[0].namespaceSelector",
            "label key",
        ),
        (at(from, "/1/ipBlock/cidr"), json!("10.0.0.1"), &format!("{block}.cidr"), "must be a CIDR"),
        (at(from, "/1/ipBlock/cidr"), json!(""), &format!("{block}.cidr"), "Required"),
        (at(from, "/1/ipBlock/except/0"), json!("11.0.0.0/16"), &format!("{block}.except[0]"), "subset"),
        (
            at(from, "/1/ipBlock/except/0"),
            json!("10.0.0.0/8"),
            &format!("{block}.except[0]"),
            "strict subset",
        ),
        (at(from, "/1/ipBlock/except/0"), json!("x"), &format!("{block}.except[0]"), "CIDR"),
        (at(ports, "/0/port"), json!(0), "spec.ingress[0].ports[0].port", "between 1"),
        (at(ports, "/0/endPort"), json!(79), "spec.ingress[0].ports[0].endPort", "greater than or equal"),
        (at(ports, "/0/endPort"), json!(70000), "spec.ingress[0].ports[0].endPort", "between 1"),
        (at(ports, "/0/port"), json!("web"), "spec.ingress[0].ports[0].port", "must be a number"),
        (at(ports, "/0/port"), Value::Null, "spec.ingress[0].ports[0].port", "must be a number"),
        (at(ports, "/1/port"), json!("no_name_"), "spec.ingress[0].ports[1].port", ""),
        (at(ports, "/1/protocol"), json!("ICMP"), "spec.ingress[0].ports[1].protocol", "supported"),
        (
            "/spec/egress/0/to/0/ipBlock/cidr".to_owned(),
            json!("rubbish"),
            "spec.egress[0].to[0].ipBlock.cidr",
            "CIDR",
        ),
    ];
    let cases: Vec<(&str, Value, &str, &str)> = cases
        .iter()
        .map(|(pointer, value, field, says)| (&**pointer, value.clone(), *field, *says))
        .collect();
    creates(&NETWORK_POLICIES, &good, &cases);
}

#[test]
fn network_policies_get_their_types_and_protocols() {
    let of = |spec: Value| {
        ready(&NETWORK_POLICIES, json!({"metadata": {"name": "p"}, "spec": spec}))["spec"].clone()
    };
    assert_eq!(of(json!({}))["policyTypes"], json!(["Ingress"]));
    assert_eq!(of(json!({"egress": [{}]}))["policyTypes"], json!(["Ingress", "Egress"]));
    assert_eq!(of(json!({"policyTypes": ["Egress"]}))["policyTypes"], json!(["Egress"]));
    let spec = of(json!({"egress": [{"ports": [{"port": 53}, {"protocol": "UDP"}]}]}));
    let protocols: Vec<&Value> = (0..2).map(|n| &spec["egress"][0]["ports"][n]["protocol"]).collect();
    assert_eq!(protocols, ["TCP", "UDP"]);
}
