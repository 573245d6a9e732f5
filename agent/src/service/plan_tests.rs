//! Frontends, backends and their order. Invariant under test: [`desired`] depends on contents, not on their order.

use super::*;
use std::net::IpAddr;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn service() -> Service {
    Service {
        key: "default/web".into(),
        cluster_ips: [ip("10.96.0.5"), ip("fd00:96::5")].into(),
        ports: [
            ServicePort { name: "http".into(), port: 80, node_port: 30080, proto: Proto::Tcp },
            ServicePort { name: "dns".into(), port: 53, node_port: 0, proto: Proto::Udp },
        ]
        .into(),
        internal_local: true,
        ..Service::default()
    }
}

fn slice(key: &str, endpoints: &[(&str, bool, Readiness)]) -> Slice {
    Slice {
        key: key.into(),
        service: "default/web".into(),
        ports: [SlicePort { name: "http".into(), port: 8080, proto: Proto::Tcp }].into(),
        endpoints: endpoints
            .iter()
            .map(|(addr, on_this_node, readiness)| Endpoint {
                addr: ip(addr),
                on_this_node: *on_this_node,
                readiness: *readiness,
                hint: Hint::None,
            })
            .collect(),
        weight: 1,
        problems: Box::default(),
    }
}

fn addresses(port: &DesiredPort) -> Vec<String> {
    port.backends.iter().map(|b| b.addr.to_string()).collect()
}

#[test]
fn backends_are_ordered_by_readiness_then_place_and_come_once() {
    use Readiness::{Ready, Terminating};
    let slices = [
        slice(
            "a",
            &[("10.244.1.1", false, Ready), ("10.244.0.9", true, Terminating), ("10.244.0.3", true, Ready)],
        ),
        slice(
            "b",
            &[("10.244.1.1", false, Terminating), ("192.0.2.1", false, Ready), ("fd00:244::1", true, Ready)],
        ),
    ];
    let node = NodeFacts { addresses: vec![ip("192.0.2.1")] };
    let ports = desired(&service(), slices.iter(), &node);
    assert_eq!(ports.len(), 4);
    assert_eq!(addresses(&ports[0]), ["10.244.0.3", "192.0.2.1", "10.244.1.1", "10.244.0.9"]);
    let counts = Counts {
        local_ready: 2,
        remote_ready: 1,
        local_terminating: 1,
        remote_terminating: 0,
        local_only: 0,
    };
    assert_eq!(ports[0].counts, counts);
    assert!(ports[1].backends.is_empty(), "the slice has no port named dns");
    assert_eq!(addresses(&ports[2]), ["fd00:244::1"]);
    let reversed = desired(&service(), slices.iter().rev(), &node);
    assert_eq!(ports, reversed);
}

#[test]
fn frontends_share_one_run_and_differ_in_policy() {
    let ports = desired(&service(), [].iter(), &NodeFacts::default());
    let keys: Vec<_> = ports[0].frontends.iter().map(|(k, _)| (k.addr.to_string(), k.port)).collect();
    assert_eq!(keys, [("10.96.0.5".to_owned(), 80), ("0.0.0.0".to_owned(), 30080)]);
    assert!(
        ports[0].frontends[0].1.internal_local && ports[0].frontends[0].1.kind == FrontendKind::ClusterIp
    );
    assert!(
        !ports[0].frontends[1].1.internal_local && ports[0].frontends[1].1.kind == FrontendKind::NodePort
    );
    assert_eq!(ports[2].frontends[1].0.addr, ip("::"));
    assert_eq!(ports[1].frontends.len(), 1);
}

fn endpoint(last: u8, on_this_node: bool, readiness: Readiness, hint: Hint) -> Endpoint {
    Endpoint { addr: [10, 244, 0, last].into(), on_this_node, readiness, hint }
}

fn of(endpoints: &[Endpoint], weight: u8) -> Slice {
    Slice { endpoints: endpoints.into(), weight, ..slice("a", &[]) }
}

/// The last octets of the run, of the dormant ones, and the counts.
fn run(slices: &[Slice]) -> (Vec<u8>, Vec<u8>, Counts) {
    let port = desired(&service(), slices.iter(), &NodeFacts::default()).swap_remove(0);
    let last = |all: &[BackendAddr]| -> Vec<u8> {
        all.iter().map(|b| if let IpAddr::V4(addr) = b.addr { addr.octets()[3] } else { 0 }).collect()
    };
    (last(&port.backends), last(&port.dormant), port.counts)
}

#[test]
fn hints_choose_among_ready_endpoints_and_local_ones_stay_for_policy_local() {
    use Hint::{Elsewhere, Node, Zone};
    use Readiness::{Ready, Terminating};
    let hinted = |hints: [Hint; 4]| {
        let [a, b, c, d] = hints;
        [of(
            &[
                endpoint(1, true, Ready, a),
                endpoint(2, true, Ready, b),
                endpoint(3, false, Ready, c),
                endpoint(4, false, Ready, d),
                endpoint(5, false, Terminating, Elsewhere),
            ],
            1,
        )]
    };
    let counts = |local_ready, remote_ready, local_only| Counts {
        local_ready,
        remote_ready,
        local_only,
        remote_terminating: 1,
        ..Counts::default()
    };
    let all = (vec![1, 2, 3, 4, 5], vec![], counts(2, 2, 0));
    assert_eq!(
        run(&hinted([Zone, Elsewhere, Zone, Elsewhere])),
        (vec![2, 1, 3, 5], vec![4], counts(2, 1, 1))
    );
    assert_eq!(
        run(&hinted([Elsewhere, Elsewhere, Zone, Zone])),
        (vec![1, 2, 3, 4, 5], vec![], counts(2, 2, 2))
    );
    assert_eq!(run(&hinted([Node, Zone, Zone, Zone])), (vec![2, 1, 5], vec![3, 4], counts(2, 0, 1)));
    assert_eq!(run(&hinted([Zone, Hint::None, Zone, Zone])), all, "one without hints voids them all");
    assert_eq!(run(&hinted([Elsewhere; 4])), all, "hints that leave nothing are void");
    let mut with_unhinted = hinted([Zone, Zone, Zone, Elsewhere]).to_vec();
    with_unhinted.push(Slice { key: "b".into(), ..of(&[endpoint(6, false, Terminating, Hint::None)], 1) });
    assert_eq!(run(&with_unhinted).1, [4], "hints of what terminates don't count");
}

#[test]
fn weights_are_slots_in_their_lowest_terms() {
    use Readiness::Ready;
    let weighted = |pairs: &[(u8, u8)]| -> Vec<Slice> {
        let one = |(last, weight): &(u8, u8)| of(&[endpoint(*last, true, Ready, Hint::None)], *weight);
        pairs.iter().map(one).collect()
    };
    assert_eq!(run(&weighted(&[(1, 1), (2, 3)])).0, [1, 2, 2, 2]);
    assert_eq!(run(&weighted(&[(1, 50), (2, 100)])).0, [1, 2, 2]);
    assert_eq!(run(&weighted(&[(1, 7), (2, 7)])).0, [1, 2]);
    assert_eq!(run(&weighted(&[(1, 1), (1, 2)])).0, [1], "the better claim, once");
    assert_eq!(run(&weighted(&[(1, 1), (2, 3)])).2.local_ready, 4);
}

#[test]
fn ten_thousand_endpoints_fit_whatever_they_weigh() {
    let part = |at: u32, weight| {
        let endpoints = (0..1000).map(|n| Endpoint {
            addr: std::net::Ipv4Addr::from(0x0af4_0000 + at * 1000 + n).into(),
            on_this_node: false,
            readiness: Readiness::Ready,
            hint: Hint::None,
        });
        Slice { endpoints: endpoints.collect(), weight, ..slice("a", &[]) }
    };
    let even: Vec<_> = (0..10).map(|at| part(at, 100)).collect();
    assert_eq!(run(&even).2.remote_ready, 10_000);
    let odd: Vec<_> = (0..10).map(|at| part(at, 91 + at as u8)).collect();
    let counted = run(&odd).2.remote_ready;
    assert!((10_000..=65_535).contains(&counted), "{counted}");
    assert_eq!(run(&odd).0.len(), counted);
}

#[test]
fn every_kind_of_frontend_has_its_policy() {
    let extras = ServiceExtras {
        external_ips: [ip("203.0.113.1"), ip("198.51.100.1"), ip("2001:db8::9")].into(),
        ingress_ips: [ip("198.51.100.1")].into(),
        source_ranges: ["192.0.2.0/24", "2001:db8::/32", "10.0.0.0/8"].map(|r| r.parse().unwrap()).into(),
        dsr: true,
        ..ServiceExtras::default()
    };
    let wanted =
        Service { external_local: true, affinity_timeout_s: 60, extras: Some(Box::new(extras)), ..service() };
    let ports = desired(&wanted, [].iter(), &NodeFacts::default());
    let kinds = |port: &DesiredPort| -> Vec<_> {
        port.frontends.iter().map(|(key, policy)| (key.addr.to_string(), key.port, policy.kind)).collect()
    };
    use FrontendKind::{ClusterIp, ExternalIp, LoadBalancer, NodePort};
    let wanted = [
        ("10.96.0.5".to_owned(), 80, ClusterIp),
        ("0.0.0.0".to_owned(), 30080, NodePort),
        ("198.51.100.1".to_owned(), 80, LoadBalancer),
        ("203.0.113.1".to_owned(), 80, ExternalIp),
    ];
    assert_eq!(kinds(&ports[0]), wanted, "an address is what it is first");
    let six: Vec<_> = kinds(&ports[2]).into_iter().map(|(addr, ..)| addr).collect();
    assert_eq!(six, ["fd00:96::5", "::", "2001:db8::9"]);
    for (key, policy) in &ports[0].frontends {
        let inside = policy.kind == ClusterIp;
        assert_eq!((policy.internal_local, policy.external_local), (inside, !inside), "{key:?}");
        assert_eq!((policy.source_ranges, policy.dsr), (policy.kind == LoadBalancer, !inside), "{key:?}");
        assert_eq!(policy.affinity_timeout_s, 60, "{key:?}");
    }
    assert_eq!(ports[0].source_ranges.len(), 2);
    assert_eq!(ports[2].source_ranges, ["2001:db8::/32".parse().unwrap()]);
}

#[test]
fn a_named_target_port_may_be_another_one_in_each_slice() {
    let with_port = |key: &str, port, last| Slice {
        key: key.into(),
        ports: [SlicePort { name: "http".into(), port, proto: Proto::Tcp }].into(),
        ..of(&[endpoint(last, true, Readiness::Ready, Hint::None)], 1)
    };
    let slices = [with_port("a", 8080, 1), with_port("b", 9090, 2), with_port("c", 9090, 1)];
    let port = desired(&service(), slices.iter(), &NodeFacts::default()).swap_remove(0);
    let found: Vec<_> = port.backends.iter().map(|b| (b.addr.to_string(), b.port)).collect();
    let wanted = [("10.244.0.1", 8080), ("10.244.0.1", 9090), ("10.244.0.2", 9090)];
    assert_eq!(found, wanted.map(|(addr, port)| (addr.to_owned(), port)));
    assert_eq!(local_ready(slices.iter(), &NodeFacts::default()), 2, "endpoints, not ports");
}

fn planner(service: Service, slices: &[Slice], node: NodeFacts) -> Planner {
    let capacity = Capacity {
        frontends4: 100,
        frontends6: 100,
        slots: 20_000,
        backends: 20_000,
        members: 20_000,
        ranges: 100,
        maglevs: 0,
    };
    let mut planner = Planner::new(Table::adopt(capacity, &Observed::default()));
    planner.handle(Event::Node(node));
    let keys = [service.key.clone()].into();
    planner.handle(Event::Service(service));
    slices.iter().for_each(|slice| planner.handle(Event::Slice(slice.clone())));
    planner.handle(Event::ServicesSynced(keys));
    planner.handle(Event::SlicesSynced(slices.iter().map(|slice| slice.key.clone()).collect()));
    planner
}

#[test]
fn a_cluster_ip_of_the_node_itself_is_refused_and_the_rest_is_programmed() {
    let mut planner = planner(service(), &[], NodeFacts { addresses: vec![ip("10.96.0.5")] });
    let changes = planner.flush();
    let keys: Vec<_> = changes.put_frontends.keys().map(|key| (key.addr.to_string(), key.port)).collect();
    let wanted = [("0.0.0.0", 30080), ("::", 30080), ("fd00:96::5", 53), ("fd00:96::5", 80)];
    assert_eq!(keys, wanted.map(|(addr, port)| (addr.to_owned(), port)));
    let told = planner.refused()["default/web"][0].to_string();
    assert!(told.contains("spec.clusterIPs: 10.96.0.5 is an address of this node"), "{told}");
    planner.passed_on();
    planner.handle(Event::Node(NodeFacts::default()));
    assert_eq!(planner.flush().put_frontends.len(), 2);
    assert!(planner.refused().is_empty(), "what passes is not told for ever");
}

#[test]
fn problems_of_slices_are_told_with_the_slice() {
    let bad = Slice { problems: ["ports[0].port: 0 is no port".into()].into(), ..slice("default/bad", &[]) };
    let mut planner = planner(service(), &[bad], NodeFacts::default());
    assert_eq!(planner.flush().put_frontends.len(), 6);
    let wanted =
        Refusal::Unusable { slice: Some("default/bad".into()), text: "ports[0].port: 0 is no port".into() };
    assert_eq!(planner.refused()["default/web"], [wanted]);
    planner.handle(Event::SliceGone("default/bad".into()));
    planner.flush();
    assert!(planner.refused().is_empty());
}

#[test]
fn health_checks_and_missing_local_endpoints_follow_the_service() {
    use Readiness::{Ready, Terminating};
    let extras = Some(Box::new(ServiceExtras { health_check_node_port: 31_000, ..ServiceExtras::default() }));
    let wanted = Service { external_local: true, extras, ..service() };
    let with = |here: bool, readiness| of(&[endpoint(1, here, readiness, Hint::None)], 1);
    let mut planner = planner(wanted.clone(), &[with(true, Ready)], NodeFacts::default());
    let check =
        |planner: &Planner| planner.health_checks().map(|c| (c.port, c.local_ready)).collect::<Vec<_>>();
    let lacks = |planner: &Planner| {
        let found = planner.no_local_endpoints();
        (found.internal, found.external)
    };
    planner.flush();
    assert_eq!((check(&planner), lacks(&planner)), (vec![(31_000, 1)], (0, 0)));
    for (slice, ready, missing) in [
        (with(true, Terminating), 0, (0, 0)),
        (with(false, Ready), 0, (1, 1)),
        (with(true, Ready), 1, (0, 0)),
    ] {
        planner.handle(Event::Slice(slice));
        planner.flush();
        assert_eq!((check(&planner), lacks(&planner)), (vec![(31_000, ready)], missing));
    }
    planner.handle(Event::ServiceGone(wanted.key));
    planner.flush();
    assert_eq!((check(&planner), lacks(&planner)), (vec![], (0, 0)));
}
