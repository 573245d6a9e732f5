//! What operators touch, on a whole node: the real program in a namespace of its own, asked by its own commands.

use std::io::BufRead as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use sheave_harness::http::get_in;
use sheave_harness::node::{NODE_IP4, OUTSIDE_IP4};
use sheave_harness::{Node, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);

/// A service with endpoints that need not exist, and one that has none.
const SERVICES: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIP: 10.96.7.7
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}
  ports: [{name: http, port: 80, nodePort: 30707}]
---
apiVersion: v1
kind: Service
metadata: {name: void}
spec:
  clusterIP: 10.96.7.8
  ports: [{name: http, port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: direct, annotations: {sheave.io/forwarding: dsr}}
spec:
  type: NodePort
  clusterIP: 10.96.7.10
  ports: [{name: http, port: 80, nodePort: 30709}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: direct-1, labels: {kubernetes.io/service-name: direct}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
- {addresses: [10.244.9.1], nodeName: node-1, conditions: {ready: true}}
- {addresses: [10.244.9.2], nodeName: node-2, conditions: {ready: true}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
- {addresses: [10.244.9.1], nodeName: node-1, conditions: {ready: true}}
- {addresses: [10.244.9.2], nodeName: node-2, conditions: {ready: true}}
- {addresses: [10.244.9.3], nodeName: node-2, conditions: {ready: false, serving: true, terminating: true}}
"#;

fn node() -> Node {
    let mut node = Node::start(env!("CARGO_BIN_EXE_sheave"), &[]);
    node.wait_ready();
    let path = node.dir().join("services.yaml");
    std::fs::write(&path, SERVICES).expect("write the manifest");
    node.sheave(&["apply", "-f", &path.display().to_string()]);
    wait_until("the services in the kernel", PATIENCE, || {
        // Before the maps are made there is nothing to read.
        let mut list = node.command(env!("CARGO_BIN_EXE_sheave"));
        let output = list.args(["service", "list", "-o", "json"]).args(node.path_flags()).output();
        let output = output.map_err(|e| e.to_string())?;
        let rows: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let has_two = |row: &Value| row["ready"].as_array().map(Vec::len) == Some(2);
        let ready = |row: &Value| row["address"] == "10.96.7.7" && has_two(row);
        let direct = |row: &Value| row["port"] == 30709 && has_two(row);
        let void = |row: &Value| row["address"] == "10.96.7.8";
        let rows = rows.as_array().cloned().unwrap_or_default();
        if rows.iter().any(ready) && rows.iter().any(void) && rows.iter().any(direct) {
            Ok(())
        } else {
            Err(format!("{rows:?}"))
        }
    });
    // The table is whole before it is put to work; health tells the latter.
    let at = SocketAddr::new(NODE_IP4.parse().expect("an address"), 10256);
    wait_until("the table to be at work", PATIENCE, || match get_in(&node.outside, at, "/healthz") {
        Ok((200, _)) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    node
}

#[track_caller]
fn json(node: &Node, args: &[&str]) -> Value {
    let text = node.sheave(args);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Connects inside the node's namespace and cgroup; what becomes of it does not matter.
fn connect(node: &Node, to: &str) {
    let (ip, port) = to.split_once(':').expect("an address with a port");
    let script = format!("exec 3<>/dev/tcp/{ip}/{port}");
    node.command("bash").args(["-c", &script]).stderr(Stdio::null()).status().expect("start bash");
}

fn trace(node: &Node, args: &[&str]) -> Value {
    json(node, &[&["service", "trace", "-o", "json", "--to"], args].concat())
}

fn shares(found: &Value) -> Vec<(String, u64)> {
    let candidates = found["candidates"].as_array().cloned().unwrap_or_default();
    let share = |at: &Value| (at["share"].as_f64().unwrap_or(0.0) * 100.0).round() as u64;
    candidates.iter().map(|at| (at["address"].as_str().unwrap_or_default().to_owned(), share(at))).collect()
}

fn says(found: &Value, of: &str, part: &str) -> bool {
    let steps = found["steps"].as_array().cloned().unwrap_or_default();
    steps.iter().any(|step| step["of"] == of && step["said"].as_str().is_some_and(|said| said.contains(part)))
}

#[test]
fn services_are_shown_and_packets_traced() {
    if !sheave_harness::require_root() {
        return;
    }
    let node = node();
    let status = node.sheave(&["status"]);
    assert!(status.contains("data plane: ebpf (auto: "), "{status}");

    let shown = node.sheave(&["service", "get", "default/web"]);
    for part in [
        "10.96.7.7:80 TCP   ClusterIP",
        "0.0.0.0:30707 TCP   NodePort",
        "ClientIP, 600 s",
        "10.244.9.2:8080",
        "terminating, not used while others are ready, on another node",
    ] {
        assert!(shown.contains(part), "{part:?} in {shown}");
    }
    let one = json(&node, &["service", "get", "10.96.7.7:80", "-o", "json"]);
    assert_eq!(one["frontends"][0]["affinitySeconds"], 600, "{one}");

    let inside = trace(&node, &["10.96.7.7:80"]);
    assert_eq!(inside["outcome"], "balanced", "{inside}");
    assert_eq!(shares(&inside), [("10.244.9.1:8080".into(), 50), ("10.244.9.2:8080".into(), 50)]);
    assert!(says(&inside, "hook", "shv_connect4") && says(&inside, "frontend", "ClusterIP"), "{inside}");
    let outside = trace(&node, &["192.0.2.10:30707", "--from", OUTSIDE_IP4]);
    assert_eq!(outside["outcome"], "balanced", "{outside}");
    let remote = &outside["candidates"][1];
    assert_eq!((&remote["local"], &remote["masqueraded"]), (&false.into(), &true.into()), "{outside}");
    assert_eq!(outside["candidates"][0]["masqueraded"], false, "{outside}");
    let direct = trace(&node, &["192.0.2.10:30709", "--from", OUTSIDE_IP4]);
    assert!(says(&direct, "source", "answer the sender themselves"), "{direct}");
    for (at, is_direct) in [(0, false), (1, true)] {
        let candidate = &direct["candidates"][at];
        let found = (&candidate["direct"], &candidate["masqueraded"]);
        assert_eq!(found, (&is_direct.into(), &false.into()), "{direct}");
    }
    assert!(node.sheave(&["service", "get", "default/direct"]).contains("(DSR)"));
    assert_eq!(trace(&node, &["10.96.7.7:80", "--from-outside"])["outcome"], "not balanced");
    assert_eq!(trace(&node, &["10.96.7.8:80"])["outcome"], "refused");
    assert_eq!(trace(&node, &["10.96.7.9:80"])["outcome"], "not balanced");
    assert_eq!(trace(&node, &["198.51.100.9:30707"])["outcome"], "not balanced");

    // Whom the socket hook has bound, the trace knows; and no other backend is possible then.
    connect_shortly(&node, "10.96.7.7", 80);
    let bound = trace(&node, &["10.96.7.7:80"]);
    assert!(says(&bound, "affinity", "was bound to"), "{bound}");
    assert_eq!(shares(&bound).iter().map(|(_, share)| *share).collect::<Vec<_>>(), [100], "{bound}");
}

/// Begins a connection to where nobody may answer.
fn connect_shortly(node: &Node, ip: &str, port: u16) {
    let script = format!("timeout 1 bash -c 'exec 3<>/dev/tcp/{ip}/{port}'");
    node.command("bash").args(["-c", &script]).stderr(Stdio::null()).status().expect("start bash");
}

#[test]
fn service_drops_are_seen_as_they_happen() {
    if !sheave_harness::require_root() {
        return;
    }
    let node = node();
    let mut monitor = node.command(env!("CARGO_BIN_EXE_sheave"));
    monitor.args(["monitor", "--drops", "--count", "1", "-o", "json"]).args(node.path_flags());
    let mut monitor = monitor.stdout(Stdio::piped()).spawn().expect("start sheave monitor");
    let (tell, told) = std::sync::mpsc::channel();
    let output = monitor.stdout.take().expect("its output");
    std::thread::spawn(move || {
        for line in std::io::BufReader::new(output).lines().map_while(Result::ok) {
            drop(tell.send(line));
        }
    });
    // It listens from some moment on; a refused connection after that is an event.
    let line = wait_until("an event", PATIENCE, || {
        connect(&node, "10.96.7.8:80");
        told.recv_timeout(Duration::from_millis(200)).map_err(|_| "nothing yet".to_owned())
    });
    assert!(monitor.wait().expect("its end").success());
    let event: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(event["event"], "drop", "{event}");
    assert_eq!(event["asked"], "10.96.7.8:80", "{event}");
    assert_eq!(event["service"], "default/void", "{event}");
    assert_eq!(event["reason"], "connect_no_endpoints", "{event}");
}

#[test]
fn service_health_is_told_to_load_balancers() {
    if !sheave_harness::require_root() {
        return;
    }
    let node = node();
    let address: IpAddr = NODE_IP4.parse().expect("an address");
    let at = SocketAddr::new(address, 10256);
    let ask = |path: &str| get_in(&node.outside, at, path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let (code, body) = ask("/healthz");
    let body: Value = serde_json::from_str(&body).unwrap_or_else(|e| panic!("{e}: {body}"));
    assert_eq!((code, &body["nodeEligible"]), (200, &true.into()), "{body}");
    assert_eq!(ask("/livez").0, 200);
    let taint = r#"{"spec":{"taints":[{"key":"ToBeDeletedByClusterAutoscaler","effect":"NoSchedule"}]}}"#;
    let kubeconfig = node.kubeconfig().display().to_string();
    let patch = ["raw", "PATCH", "/api/v1/nodes/node-1", "--data", taint, "--kubeconfig", &kubeconfig];
    node.sheave(&patch);
    wait_until("the node to be on its way out", PATIENCE, || match ask("/healthz") {
        (503, body) if body.contains(r#""nodeEligible":false"#) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    assert_eq!(ask("/livez").0, 200, "the proxy itself is well");

    let metrics = SocketAddr::from((Ipv4Addr::LOCALHOST, 10248));
    let (_, text) = get_in(&node.netns, metrics, "/metrics").expect("metrics");
    for name in [
        "kubeproxy_sync_proxy_rules_duration_seconds_count",
        "kubeproxy_proxy_healthz_total{code=\"503\"}",
        "sheave_map_capacity{map=\"shv_flows\"}",
        "sheave_dataplane_mode{mode=\"ebpf\"} 1",
    ] {
        assert!(text.contains(name), "{name} in {text}");
    }
}
