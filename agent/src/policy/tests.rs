//! The model against policies evaluated one by one.

use super::ports::{Counted, Ports};
use super::*;
use ipnetwork::IpNetwork;
use proptest::prelude::*;
use sheave_ebpf_abi::ports;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

fn labels(pairs: &[(u8, u8)]) -> Labels {
    pairs.iter().map(|(key, value)| (format!("k{key}"), format!("v{value}"))).collect()
}

fn pod_ip(n: usize) -> IpAddr {
    format!("10.0.0.{n}").parse().unwrap()
}

/// What the kernel's programs make of the tables.
fn judged(tables: &Tables, src: IpAddr, dst: IpAddr, proto: u8, port: u16) -> bool {
    let end = |ip: IpAddr| tables.endpoints.get(&ip).copied();
    let range = |ip: IpAddr| {
        let within = tables.ranges.iter().filter(|(range, _)| range.contains(ip));
        within.max_by_key(|(range, _)| range.prefix()).map_or(0, |(_, id)| *id)
    };
    let allows = |set: u32, other: IpAddr| {
        let identity = end(other).map_or_else(|| range(other), |end| end.identity);
        let row = tables.verdicts.get(&(set, identity)).or_else(|| tables.verdicts.get(&(set, 0)));
        match row.copied() {
            None | Some(ports::NONE) => false,
            Some(ports::ALL) => true,
            Some(list) => tables.ports.keys().any(|(held, prefix)| {
                let shift = 16 - u32::from(prefix.bits);
                *held == list
                    && prefix.proto == proto
                    && u32::from(prefix.port) >> shift == u32::from(port) >> shift
            }),
        }
    };
    let (from, to) = (end(src).unwrap_or_default(), end(dst).unwrap_or_default());
    if from.host || to.host {
        return true;
    }
    (from.egress == 0 || allows(from.egress, dst)) && (to.ingress == 0 || allows(to.ingress, src))
}

/// What the policies say, one after the other.
fn naive(world: &World, src: IpAddr, dst: IpAddr, proto: u8, port: u16) -> bool {
    let find = |ip: IpAddr| world.pods.iter().find(|pod| pod.ips.contains(&ip));
    let one_way = |ingress: bool, own: IpAddr, other: IpAddr| {
        let Some(own) = find(own).filter(|pod| pod.local) else { return true };
        let mut isolated = false;
        for policy in world.policies.iter().filter(|p| p.namespace == own.namespace) {
            let rules = if ingress { &policy.ingress } else { &policy.egress };
            let Some(rules) = rules.as_ref().filter(|_| policy.selector.matches(&own.labels)) else {
                continue;
            };
            isolated = true;
            for rule in rules {
                let is_peer = rule.peers.is_empty()
                    || rule.peers.iter().any(|peer| match peer {
                        Peer::Block { cidr, except } => {
                            cidr.contains(other) && !except.iter().any(|range| range.contains(other))
                        }
                        Peer::Pods { pods, namespaces } => find(other).is_some_and(|pod| {
                            let there = &world.namespaces[&pod.namespace];
                            let here = match namespaces {
                                None => pod.namespace == policy.namespace,
                                Some(selector) => selector.matches(there),
                            };
                            here && pods.as_ref().is_none_or(|selector| selector.matches(&pod.labels))
                        }),
                    });
                let named = find(dst).map(|pod| pod.ports.to_vec()).unwrap_or_default();
                let is_port = rule.ports.is_empty()
                    || rule.ports.iter().any(|wanted| {
                        wanted.proto == proto
                            && match &wanted.which {
                                Which::Any => true,
                                Which::Range(first, last) => (*first..=*last).contains(&port),
                                Which::Named(name) => named
                                    .iter()
                                    .any(|p| p.name == *name && p.proto == proto && p.port == port),
                            }
                    });
                if is_peer && is_port {
                    return true;
                }
            }
        }
        !isolated
    };
    one_way(false, src, dst) && one_way(true, dst, src)
}

#[derive(Clone, Debug)]
struct World {
    namespaces: BTreeMap<Key, Labels>,
    pods: Vec<Pod>,
    policies: Vec<Policy>,
}

fn a_selector() -> impl Strategy<Value = Selector> {
    let one = (0_u8..2, 0_u8..4, proptest::collection::vec(0_u8..3, 0..3)).prop_map(|(key, op, values)| {
        Requirement {
            key: format!("k{key}").into(),
            op: [Op::In, Op::NotIn, Op::Exists, Op::NotExists][usize::from(op)],
            values: values.iter().map(|v| format!("v{v}").into()).collect(),
        }
    });
    proptest::collection::vec(one, 0..2).prop_map(|all| Selector(all.into()))
}

fn a_peer() -> impl Strategy<Value = Peer> {
    let block = (28_u8..=32, 0_u8..16, proptest::collection::vec((0_u8..16, 0_u8..3), 0..3)).prop_map(
        |(bits, at, except)| {
            let range = |at: u8, bits: u8| IpNetwork::new(pod_ip(at.into()), bits.min(32)).unwrap();
            let cidr = range(at, bits);
            let except = except.iter().map(|(at, more)| range(*at, bits + more + 1));
            let except = except.filter(|inner| cidr.contains(inner.ip()) && inner.prefix() > bits).collect();
            Peer::Block { cidr, except }
        },
    );
    let pods = (proptest::option::of(a_selector()), proptest::option::of(a_selector()))
        .prop_map(|(pods, namespaces)| Peer::Pods { pods, namespaces });
    prop_oneof![1 => block, 2 => pods]
}

fn a_rule() -> impl Strategy<Value = Rule> {
    let port = (prop_oneof![Just(6_u8), Just(17)], 0_u8..4, 1_u16..6, 0_u16..4).prop_map(
        |(proto, kind, first, more)| Port {
            proto,
            which: match kind {
                0 => Which::Any,
                1 => Which::Named(if first < 3 { "n0" } else { "n1" }.into()),
                _ => Which::Range(first, first + more),
            },
        },
    );
    (proptest::collection::vec(a_peer(), 0..3), proptest::collection::vec(port, 0..3))
        .prop_map(|(peers, ports)| Rule { peers: peers.into(), ports: ports.into() })
}

fn a_policy(n: usize) -> impl Strategy<Value = Policy> {
    let rules = || proptest::option::of(proptest::collection::vec(a_rule(), 0..3));
    (0_u8..2, a_selector(), rules(), rules()).prop_map(move |(ns, selector, ingress, egress)| Policy {
        namespace: format!("ns{ns}").into(),
        name: format!("p{n}").into(),
        selector,
        ingress: ingress.map(Into::into),
        egress: egress.map(Into::into),
    })
}

fn a_pod(n: usize) -> impl Strategy<Value = Pod> {
    let named = proptest::collection::vec((0_u8..2, 1_u16..6), 0..2);
    (0_u8..2, proptest::collection::vec((0_u8..2, 0_u8..3), 0..3), any::<bool>(), named).prop_map(
        move |(ns, pairs, local, named)| Pod {
            namespace: format!("ns{ns}").into(),
            name: format!("pod{n}").into(),
            uid: format!("uid{n}").into(),
            labels: labels(&pairs),
            ips: [pod_ip(n + 1)].into(),
            ports: named
                .iter()
                .map(|(name, port)| NamedPort { name: format!("n{name}").into(), proto: 6, port: *port })
                .collect(),
            local,
        },
    )
}

fn a_world() -> impl Strategy<Value = World> {
    let pods: Vec<_> = (0..5).map(a_pod).collect();
    let policies = (0..4).map(a_policy).collect::<Vec<_>>();
    (pods, policies, proptest::collection::vec((0_u8..2, 0_u8..3), 0..2)).prop_map(
        |(pods, policies, pairs)| World {
            namespaces: [("ns0".into(), labels(&pairs)), ("ns1".into(), labels(&[(0, 1)]))].into(),
            pods,
            policies,
        },
    )
}

fn tell(planner: &mut Planner, world: &World) {
    for (name, labels) in &world.namespaces {
        planner.handle(Event::Namespace(Namespace { name: name.clone(), labels: labels.clone() }));
    }
    planner.handle(Event::NamespacesSynced(world.namespaces.keys().cloned().collect()));
    world.pods.iter().for_each(|pod| planner.handle(Event::Pod(pod.clone())));
    planner.handle(Event::PodsSynced(world.pods.iter().map(Pod::key).collect()));
    world.policies.iter().for_each(|policy| planner.handle(Event::Policy(policy.clone())));
    planner.handle(Event::PoliciesSynced(world.policies.iter().map(Policy::key).collect()));
}

fn compare(tables: &Tables, world: &World) -> Result<(), TestCaseError> {
    let others = [14, 200].map(pod_ip);
    let all: Vec<IpAddr> = world.pods.iter().flat_map(|pod| pod.ips.to_vec()).chain(others).collect();
    for src in &all {
        for dst in all.iter().filter(|dst| *dst != src) {
            for proto in [6, 17] {
                for port in 1..8 {
                    let (found, wanted) =
                        (judged(tables, *src, *dst, proto, port), naive(world, *src, *dst, proto, port));
                    prop_assert_eq!(found, wanted, "{} to {} {} {}", src, dst, proto, port);
                }
            }
        }
    }
    Ok(())
}

/// A step of a sequence: which policy or pod is replaced or goes, or a namespace's labels.
#[derive(Clone, Debug)]
enum Step {
    Policy(usize, Policy),
    PolicyGone(usize),
    Pod(usize, Pod),
    PodGone(usize),
    Namespace(Vec<(u8, u8)>),
}

fn a_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_usize..4).prop_flat_map(|n| a_policy(n).prop_map(move |policy| Step::Policy(n, policy))),
        2 => (0_usize..4).prop_map(Step::PolicyGone),
        2 => (0_usize..5).prop_flat_map(|n| a_pod(n).prop_map(move |pod| Step::Pod(n, pod))),
        1 => (0_usize..5).prop_map(Step::PodGone),
        1 => proptest::collection::vec((0_u8..2, 0_u8..3), 0..2).prop_map(Step::Namespace),
    ]
}

/// Takes a step in the world, and tells of it.
fn take(planner: &mut Planner, world: &mut World, step: &Step) {
    let drop_policy = |planner: &mut Planner, world: &mut World, n: usize| {
        let gone: Vec<Key> =
            world.policies.iter().filter(|p| *p.name == format!("p{n}")).map(Policy::key).collect();
        world.policies.retain(|p| !gone.contains(&p.key()));
        gone.into_iter().for_each(|key| planner.handle(Event::PolicyGone(key)));
    };
    let drop_pod = |planner: &mut Planner, world: &mut World, n: usize| {
        let gone: Vec<Key> =
            world.pods.iter().filter(|p| *p.name == format!("pod{n}")).map(Pod::key).collect();
        world.pods.retain(|p| !gone.contains(&p.key()));
        gone.into_iter().for_each(|key| planner.handle(Event::PodGone(key)));
    };
    match step {
        Step::PolicyGone(n) => drop_policy(planner, world, *n),
        Step::PodGone(n) => drop_pod(planner, world, *n),
        Step::Policy(n, policy) => {
            // In place where it keeps its namespace.
            if world.policies.iter().any(|p| p.key() == policy.key()) {
                world.policies.retain(|p| p.key() != policy.key());
            } else {
                drop_policy(planner, world, *n);
            }
            planner.handle(Event::Policy(policy.clone()));
            world.policies.push(policy.clone());
        }
        Step::Pod(n, pod) => {
            if world.pods.iter().any(|p| p.key() == pod.key()) {
                world.pods.retain(|p| p.key() != pod.key());
            } else {
                drop_pod(planner, world, *n);
            }
            planner.handle(Event::Pod(pod.clone()));
            world.pods.push(pod.clone());
        }
        Step::Namespace(pairs) => {
            planner.handle(Event::Namespace(Namespace { name: "ns0".into(), labels: labels(pairs) }));
            world.namespaces.insert("ns0".into(), labels(pairs));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn one_change_after_the_other_leads_to_what_the_policies_say(
        world in a_world(),
        steps in proptest::collection::vec((a_step(), any::<bool>()), 1..12),
    ) {
        let mut world = world;
        let mut planner = Planner::new(Ids::default());
        tell(&mut planner, &world);
        planner.plan();
        // Some plans take in more than one step.
        for (step, and_plan) in &steps {
            take(&mut planner, &mut world, step);
            if *and_plan {
                compare(&planner.plan(), &world)?;
            }
        }
        let tables = planner.plan();
        compare(&tables, &world)?;
        let mut fresh = Planner::new(Ids::default());
        tell(&mut fresh, &world);
        let fresh = fresh.plan();
        prop_assert_eq!(tables.verdicts.len(), fresh.verdicts.len(), "nothing is left behind");
        prop_assert_eq!(tables.ranges.len(), fresh.ranges.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn tables_say_what_the_policies_say(worlds in proptest::collection::vec(a_world(), 1..4)) {
        let mut planner = Planner::new(Ids { set: 5, identity: 5, ports: 5 });
        let mut held = Tables::default();
        for world in &worlds {
            tell(&mut planner, world);
            prop_assert!(planner.synced());
            let tables = planner.plan();
            compare(&tables, world)?;
            // The same from nothing: what is kept from plan to plan makes no difference to what is said.
            let mut fresh = Planner::new(Ids::default());
            tell(&mut fresh, world);
            compare(&fresh.plan(), world)?;
            // The change leads from one to the other.
            let change = Change::between(&held, &tables);
            held.verdicts.retain(|key, _| !change.delete_verdicts.contains(key));
            held.verdicts.extend(change.put_verdicts.iter().copied());
            prop_assert_eq!(&held.verdicts, &tables.verdicts);
            held = tables.clone();
            prop_assert!(Change::between(&held, &planner.plan()).is_empty(), "a second plan changes nothing");
        }
    }
}

fn policy(name: &str, ingress: Vec<Rule>) -> Policy {
    Policy {
        namespace: "ns0".into(),
        name: name.into(),
        selector: Selector::default(),
        ingress: Some(ingress.into()),
        egress: None,
    }
}

fn pod(n: usize, pairs: &[(u8, u8)], local: bool) -> Pod {
    Pod {
        namespace: "ns0".into(),
        name: format!("pod{n}").into(),
        uid: format!("uid{n}").into(),
        labels: labels(pairs),
        ips: [pod_ip(n)].into(),
        ports: Box::default(),
        local,
    }
}

fn world(pods: Vec<Pod>, policies: Vec<Policy>) -> Planner {
    let mut planner = Planner::new(Ids::default());
    let namespaces = [("ns0".into(), Labels::default())].into();
    tell(&mut planner, &World { namespaces, pods, policies });
    planner
}

#[test]
fn pods_that_nothing_tells_apart_share_rows() {
    let from = |value| Peer::Pods {
        pods: Some(Selector(
            [Requirement { key: "k0".into(), op: Op::In, values: [format!("v{value}").into()].into() }]
                .into(),
        )),
        namespaces: None,
    };
    let rule = |value| Rule { peers: [from(value)].into(), ports: Box::default() };
    let pods = (1..=100).map(|n| pod(n, &[(0, (n % 2) as u8)], n <= 10)).collect();
    let tables = world(pods, vec![policy("p", vec![rule(1)])]).plan();
    let identities: BTreeSet<u32> = tables.endpoints.values().map(|end| end.identity).collect();
    assert_eq!(identities.len(), 2, "those that match, and the others");
    let sets: BTreeSet<u32> = tables.endpoints.values().map(|end| end.ingress).collect();
    assert_eq!(sets.len(), 2, "one set for all pods of this node, none for the others'");
    assert_eq!(tables.verdicts.len(), 2);
}

#[test]
fn a_changed_policy_keeps_its_set_where_all_its_pods_go_with_it() {
    let mut planner = world(vec![pod(1, &[], true), pod(2, &[(0, 1)], true)], vec![policy("p", vec![])]);
    let before = planner.plan();
    let mut change = |policy| {
        let changed = planner_after(&mut planner, policy);
        let [first, second] = [1, 2].map(|n| changed.endpoints[&pod_ip(n)].ingress);
        (first, second, changed)
    };
    let open = Rule { peers: Box::default(), ports: Box::default() };
    let (first, second, after) = change(policy("p", vec![open]));
    assert_eq!((first, second), (before.endpoints[&pod_ip(1)].ingress, first));
    assert_eq!(after.verdicts, [((first, 0), ports::ALL)].into());

    // A pod that does not go along must not meet, as its own, what others want now.
    let selector =
        Selector([Requirement { key: "k0".into(), op: Op::Exists, values: Box::default() }].into());
    let (none, other, after) = change(Policy { selector, ..policy("p", vec![]) });
    assert!(none == 0 && other != 0 && other != second, "{none} {other}, before {second}");
    assert_eq!(after.verdicts, [((other, 0), ports::NONE)].into());
    planner.handle(Event::PolicyGone("ns0/p".into()));
    assert_eq!(planner.plan().verdicts.len(), 0);
}

fn planner_after(planner: &mut Planner, policy: Policy) -> Tables {
    planner.handle(Event::Policy(policy));
    planner.plan()
}

#[test]
fn the_row_for_all_others_is_written_after_those_of_their_own() {
    let from = Tables::default();
    let verdicts: std::collections::HashMap<_, _> =
        (0..8).flat_map(|set| (0..8).map(move |identity| ((set, identity), ports::ALL))).collect();
    let put = Change::between(&from, &Tables { verdicts, ..Tables::default() }).put_verdicts;
    assert!(put.is_sorted_by_key(|((_, identity), _)| *identity == 0) && put.len() == 64);
}

#[test]
fn nothing_is_planned_before_everything_is_told() {
    let mut planner = Planner::new(Ids::default());
    assert!(!planner.synced());
    planner.handle(Event::PoliciesSynced(BTreeSet::new()));
    assert!(planner.synced(), "without policies pods need not be known");
    planner.handle(Event::Policy(policy("p", vec![])));
    assert!(!planner.synced());
    planner.handle(Event::PodsSynced(BTreeSet::new()));
    planner.handle(Event::NamespacesSynced(BTreeSet::new()));
    assert!(planner.synced());
}

fn device(pod: Option<&str>) -> Device {
    Device { index: 7, peer: true, queued: true, pod: pod.map(Into::into) }
}

#[test]
fn a_pod_is_isolated_before_the_api_knows_its_address() {
    let mut new = pod(1, &[], true);
    new.ips = Box::default();
    let mut planner = world(vec![new], vec![policy("p", vec![])]);
    planner.handle(Event::Devices(
        [(pod_ip(9), device(Some("uid1"))), (pod_ip(8), device(Some("else")))].into(),
    ));
    let tables = planner.plan();
    assert_ne!(tables.endpoints[&pod_ip(9)].ingress, 0);
    assert_eq!(tables.endpoints[&pod_ip(8)].ingress, 0);
}

#[test]
fn devices_and_the_node_are_endpoints_without_any_policy() {
    let mut planner = Planner::new(Ids::default());
    planner.handle(Event::Devices([(pod_ip(1), device(None))].into()));
    planner.handle(Event::Host([pod_ip(254)].into()));
    let tables = planner.plan();
    let end = tables.endpoints[&pod_ip(1)];
    assert!(end.device == 7 && end.peer && end.queued, "{end:?}");
    assert!(tables.endpoints[&pod_ip(254)].host);
}

#[test]
fn lists_of_ports_that_allow_the_same_are_one() {
    let mut one = Ports::default();
    one.add(6, 1, 5);
    one.add(6, 6, 9);
    let mut other = Ports::default();
    other.add(6, 3, 9);
    other.add(6, 1, 4);
    let (mut first, mut second) = (Counted::default(), Counted::default());
    first.count(&one, true);
    second.count(&other, true);
    assert_eq!(first.normal(), second.normal());
    second.count(&one, true);
    second.count(&other, false);
    assert_eq!(first.normal_with(&second), first.normal());
    second.count(&one, false);
    assert!(second.is_empty());
}
