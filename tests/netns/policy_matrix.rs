//! The connectivity matrix: every pod to every pod on every port and protocol, under policies that use every field,
//! held against what the objects say. An attempt that should succeed is waited for; one that should not is given the
//! moment in which the others did.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sheave_harness::{NetNs, require_root};

use crate::policy_bed::Bed;
use crate::policy_net::{Attempt, Proto, Servers, has_sctp, try_all};
use crate::policy_truth::{End, Policy, allows};

const PATIENCE: Duration = Duration::from_secs(30);
const PORTS: [u16; 2] = [80, 81];

fn pod_labels(name: &str) -> Value {
    let mut labels = json!({"pod": name});
    if name == "c" {
        labels["tier"] = json!("back");
    }
    labels
}

fn namespace_labels(name: &str) -> Value {
    json!({"ns": name, "kubernetes.io/metadata.name": name})
}

fn container_ports(name: &str) -> Value {
    // The same name is another port on another pod.
    let alt = if name == "a" { 81 } else { 80 };
    json!([
        {"name": "web", "containerPort": 80},
        {"name": "alt", "containerPort": alt},
        {"name": "dgram", "containerPort": 81, "protocol": "UDP"},
    ])
}

/// Peers of every form. The pods of `x` have the addresses `.2` to `.4`, those of `y` `.5` to `.7`, of `z` `.8` to `.10`.
fn peers() -> Vec<Value> {
    let pod = |key: &str, op: &str, values: Value| json!({"matchExpressions": [{"key": key, "operator": op, "values": values}]});
    let exists = |key: &str, op: &str| json!({"matchExpressions": [{"key": key, "operator": op}]});
    vec![
        json!([{"podSelector": {"matchLabels": {"pod": "b"}}}]),
        json!([{"podSelector": {}}]),
        json!([{"podSelector": pod("pod", "In", json!(["b", "c"]))}]),
        json!([{"podSelector": pod("pod", "NotIn", json!(["b"]))}]),
        json!([{"podSelector": exists("tier", "Exists")}]),
        json!([{"podSelector": exists("tier", "DoesNotExist")}]),
        json!([{"namespaceSelector": {"matchLabels": {"ns": "y"}}}]),
        json!([{"namespaceSelector": {}}]),
        json!([{"namespaceSelector": pod("ns", "NotIn", json!(["y"]))}]),
        json!([{"namespaceSelector": pod("ns", "In", json!(["x", "z"]))}]),
        json!([{"namespaceSelector": {"matchLabels": {"ns": "y"}}, "podSelector": {"matchLabels": {"pod": "a"}}}]),
        json!([{"namespaceSelector": {"matchLabels": {"ns": "y"}}}, {"podSelector": {"matchLabels": {"pod": "a"}}}]),
        json!([{"namespaceSelector": exists("ns", "Exists"), "podSelector": exists("tier", "Exists")}]),
        json!([{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "z"}}}]),
        json!([{"ipBlock": {"cidr": "10.7.0.5/32"}}]),
        json!([{"ipBlock": {"cidr": "10.7.0.0/24", "except": ["10.7.0.4/30", "10.7.0.9/32"]}}]),
        json!([{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.7.0.8/29"]}}, {"ipBlock": {"cidr": "10.7.0.10/32"}}]),
        json!([{"ipBlock": {"cidr": "::/0"}}]),
        json!([{"ipBlock": {"cidr": "fd07::/64", "except": ["fd07::4/126"]}}, {"ipBlock": {"cidr": "10.7.0.2/31"}}]),
        json!([{"ipBlock": {"cidr": "10.7.0.0/28"}}, {"podSelector": {"matchLabels": {"pod": "none"}}}]),
    ]
}

/// Ports of every form.
fn ports() -> Vec<Value> {
    vec![
        json!([{"port": 80}]),
        json!([{"protocol": "UDP", "port": 81}]),
        json!([{"protocol": "SCTP", "port": 80}]),
        json!([{"protocol": "TCP"}]),
        json!([{"port": 79, "endPort": 80}, {"protocol": "UDP", "port": 1, "endPort": 65535}]),
        json!([{"port": 81, "endPort": 4000}]),
        json!([{"port": "alt"}]),
        json!([{"port": "dgram", "protocol": "UDP"}, {"port": "dgram"}]),
        json!([{"port": "nothing"}]),
    ]
}

/// Each scenario: policies with their namespace.
fn scenarios() -> Vec<Vec<Policy>> {
    let in_x = |spec: Value| ("x".to_owned(), spec);
    let mut all = vec![Vec::new()];
    let (peers, ports) = (peers(), ports());
    for (rules, list, kind) in [("ingress", "from", "Ingress"), ("egress", "to", "Egress")] {
        // Nothing, everything, and everything in two rules.
        all.push(vec![in_x(json!({"podSelector": {}, "policyTypes": [kind]}))]);
        all.push(vec![in_x(json!({"podSelector": {}, "policyTypes": [kind], rules: [{}]}))]);
        for (n, from) in peers.iter().enumerate() {
            let mut rule = json!({list: from});
            if n % 3 == 1 {
                rule["ports"] = ports[n % ports.len()].clone();
            }
            let selector = if n % 2 == 0 { json!({"matchLabels": {"pod": "a"}}) } else { json!({}) };
            all.push(vec![in_x(json!({"podSelector": selector, "policyTypes": [kind], rules: [rule]}))]);
        }
        for (n, port) in ports.iter().enumerate() {
            let mut rule = json!({"ports": port});
            if n % 2 == 0 {
                rule[list] = json!([{"namespaceSelector": {}}]);
            }
            all.push(vec![in_x(json!({"podSelector": {}, "policyTypes": [kind], rules: [rule]}))]);
        }
    }
    let both = ["Ingress", "Egress"];
    let a = json!({"matchLabels": {"pod": "a"}});
    all.extend([
        vec![in_x(json!({"podSelector": {}, "policyTypes": both}))],
        // Directions that are not spelled out.
        vec![in_x(json!({"podSelector": a, "egress": [{"to": [{"podSelector": {}}]}]}))],
        vec![in_x(json!({"podSelector": a, "ingress": [{}], "egress": []}))],
        // Rules of a direction that is not among the types say nothing.
        vec![in_x(json!({"podSelector": {}, "policyTypes": ["Egress"], "ingress": [{}]}))],
        // Several policies are a union, and several rules too.
        vec![
            in_x(json!({"podSelector": {}})),
            in_x(json!({"podSelector": a, "ingress": [{"from": [{"podSelector": {"matchLabels": {"pod": "b"}}}]}]})),
            in_x(json!({"podSelector": {"matchExpressions": [{"key": "pod", "operator": "In", "values": ["a", "b"]}]},
                "ingress": [{"ports": [{"port": "web"}], "from": [{"namespaceSelector": {"matchLabels": {"ns": "z"}}}]},
                    {"ports": [{"protocol": "UDP", "port": 80}]}]})),
        ],
        // Both ends have a say.
        vec![
            ("y".to_owned(), json!({"podSelector": {}, "policyTypes": ["Egress"],
                "egress": [{"to": [{"namespaceSelector": {"matchLabels": {"ns": "x"}}}], "ports": [{"port": 80}]}]})),
            in_x(json!({"podSelector": {}, "ingress": [{"ports": [{"port": 80}, {"port": 81}],
                "from": [{"namespaceSelector": {"matchLabels": {"ns": "y"}},
                    "podSelector": {"matchLabels": {"pod": "a"}}}]}]})),
        ],
        vec![in_x(json!({"podSelector": {"matchLabels": {"pod": "nobody"}}, "policyTypes": both}))],
        ["x", "y", "z"]
            .map(|ns| (ns.to_owned(), json!({"podSelector": {"matchLabels": {"pod": "b"}}, "policyTypes": both,
                "ingress": [{"from": [{"podSelector": {}}]}], "egress": [{"to": [{"podSelector": {}}]}]})))
            .to_vec(),
    ]);
    all
}

/// The bed with its nine pods, and every attempt.
struct Matrix {
    bed: Bed,
    attempts: Vec<(usize, usize, Attempt)>,
}

impl Matrix {
    fn new(protos: &[Proto]) -> Self {
        let mut bed = Bed::new(&[]);
        for ns in ["x", "y", "z"] {
            bed.add_namespace(ns, namespace_labels(ns));
        }
        for ns in ["x", "y", "z"] {
            for name in ["a", "b", "c"] {
                bed.add_pod(ns, name, pod_labels(name), container_ports(name));
            }
        }
        bed.wait_attached();
        let mut attempts = Vec::new();
        for from in 0..bed.pods.len() {
            for to in (0..bed.pods.len()).filter(|to| *to != from) {
                let [ip4, ip6] = bed.pods[to].ips;
                for proto in protos {
                    let all = PORTS.iter().map(|port| SocketAddr::new(ip4, *port));
                    let v6 = (*proto == Proto::Tcp).then(|| SocketAddr::new(ip6, 80));
                    attempts
                        .extend(all.chain(v6).map(|at| (from, to, Attempt { from, to: at, proto: *proto })));
                }
            }
        }
        Matrix { bed, attempts }
    }

    fn truth(&self, policies: &[Policy]) -> Vec<bool> {
        let of = |pod: usize| {
            let pod = &self.bed.pods[pod];
            (pod, namespace_labels(&pod.namespace), pod_labels(&pod.name), container_ports(&pod.name))
        };
        let pods: Vec<_> = (0..self.bed.pods.len()).map(of).collect();
        let end = |at: usize, v4: bool| {
            let (pod, namespace_labels, labels, ports) = &pods[at];
            let ip = pod.ips[usize::from(!v4)];
            End { namespace: &pod.namespace, namespace_labels, labels, ports, ip }
        };
        let allowed = |(from, to, attempt): &(usize, usize, Attempt)| {
            let v4 = attempt.to.is_ipv4();
            allows(policies, &end(*from, v4), &end(*to, v4), attempt.proto.name(), attempt.to.port())
        };
        self.attempts.iter().map(allowed).collect()
    }

    /// Attempts until what is observed is the truth.
    fn hold(&self, number: usize, policies: &[Policy]) {
        let truth = self.truth(policies);
        let namespaces: Vec<&NetNs> = self.bed.pods.iter().map(|pod| &pod.ns).collect();
        let attempts: Vec<Attempt> = self.attempts.iter().map(|(.., attempt)| *attempt).collect();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let moment = Duration::from_millis(15);
            let seen = try_all(&namespaces, &attempts, &truth, Duration::from_millis(400), moment);
            if seen == truth {
                return;
            }
            if Instant::now() < deadline {
                continue;
            }
            let name = |at: usize| format!("{}/{}", self.bed.pods[at].namespace, self.bed.pods[at].name);
            let wrong: Vec<String> = (0..seen.len())
                .filter(|at| seen[*at] != truth[*at])
                .map(|at| {
                    let (from, to, attempt) = &self.attempts[at];
                    let what = format!("{} {}", attempt.proto.name(), attempt.to);
                    format!(
                        "{} to {} by {what}: {} and should be {}",
                        name(*from),
                        name(*to),
                        seen[at],
                        truth[at]
                    )
                })
                .collect();
            let shown = wrong.iter().take(20).cloned().collect::<Vec<_>>().join("\n");
            panic!("scenario {number}, {policies:?}: {} of {} differ:\n{shown}", wrong.len(), seen.len());
        }
    }
}

#[test]
fn every_pair_connects_as_the_policies_say() {
    if !require_root() {
        return;
    }
    let mut protos = vec![Proto::Tcp, Proto::Udp];
    if has_sctp() {
        protos.push(Proto::Sctp);
    }
    let matrix = Matrix::new(&protos);
    let _servers = Servers::start(matrix.bed.pods.iter().map(|pod| &pod.ns), &PORTS, &protos);
    let scenarios = scenarios();
    let count: usize = scenarios.iter().map(Vec::len).sum();
    assert!(count >= 60, "{count} policies");
    for (number, policies) in scenarios.iter().enumerate() {
        for (n, (namespace, spec)) in policies.iter().enumerate() {
            matrix.bed.put_policy(namespace, &format!("p{n}"), spec);
        }
        matrix.hold(number, policies);
        for (n, (namespace, _)) in policies.iter().enumerate() {
            matrix.bed.delete_policy(namespace, &format!("p{n}"));
        }
    }
}
