//! A person with an unmodified kubectl against `sheave up`: every verb that the README promises, on real containers.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use sheave_harness::{Node, image, require_root};

const IMAGE: &str = image::ECHO;

/// Two names of the same image, so that `set image` has something to roll out.
const IMAGE_2: &str = "localhost/echo:2";

fn node() -> Node {
    let mut node = Node::start(env!("CARGO_BIN_EXE_sheave"), &[]);
    node.wait_ready();
    for name in [IMAGE, IMAGE_2] {
        node.sheave(&["image", "import", &image::echo().display().to_string(), "--name", name]);
    }
    node
}

/// Applies a manifest given as text.
fn apply(node: &Node, manifest: &str) -> String {
    let path = node.dir().join("manifest.yaml");
    std::fs::write(&path, manifest).expect("write the manifest");
    node.kubectl(&["apply", "-f", &path.display().to_string()])
}

fn web(replicas: u32, message: &str) -> String {
    format!(
        "apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, labels: {{app: web}}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - name: echo
        image: {IMAGE}
        imagePullPolicy: IfNotPresent
        env: [{{name: MESSAGE, value: {message}}}]
        ports: [{{containerPort: 8080, name: http}}]
        readinessProbe: {{httpGet: {{path: /healthz, port: http}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {{name: web}}
spec:
  type: NodePort
  selector: {{app: web}}
  ports: [{{port: 80, targetPort: http}}]
"
    )
}

fn rollout(node: &Node) -> String {
    node.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])
}

#[test]
fn kubectl_apply_get_describe_scale_roll_out_and_delete() {
    if !require_root() {
        return;
    }
    let node = node();
    let said = apply(&node, &web(2, "one"));
    assert!(said.contains("deployment.apps/web created") && said.contains("service/web created"), "{said}");
    assert!(rollout(&node).contains("successfully rolled out"));
    let said = apply(&node, &web(2, "one"));
    assert!(said.contains("deployment.apps/web unchanged"), "{said}");
    let said = apply(&node, &web(2, "two"));
    assert!(said.contains("deployment.apps/web configured"), "{said}");
    assert!(rollout(&node).contains("successfully rolled out"));

    gets(&node);
    describes(&node);

    let said = node.kubectl(&["scale", "deployment/web", "--replicas=3"]);
    assert!(said.contains("deployment.apps/web scaled"), "{said}");
    let condition = "jsonpath={.status.readyReplicas}=3";
    node.kubectl(&["wait", "deployment/web", "--for", condition, "--timeout=60s"]);

    node.kubectl(&["set", "image", "deployment/web", &format!("echo={IMAGE_2}")]);
    assert!(rollout(&node).contains("successfully rolled out"));
    let images =
        node.kubectl(&["get", "pods", "-l", "app=web", "-o", "jsonpath={..spec.containers[*].image}"]);
    assert!(images.contains(IMAGE_2), "{images}");

    let said = node.kubectl(&["label", "deployment/web", "tier=front"]);
    assert!(said.contains("labeled"), "{said}");
    let found = node.kubectl(&["get", "deployments", "-l", "tier=front", "-o", "name"]);
    assert_eq!(found.trim(), "deployment.apps/web");

    diff_changes_nothing(&node);

    let said = node.kubectl(&["delete", "deployment/web", "service/web"]);
    assert!(said.contains("deleted"), "{said}");
    node.kubectl(&["wait", "pods", "-l", "app=web", "--for=delete", "--timeout=60s"]);
    let left = node.kubectl(&["get", "pods,replicasets,endpointslices", "-l", "app=web", "-o", "name"]);
    assert_eq!(left.trim(), "", "deleting a Deployment deletes what it owns");
}

fn gets(node: &Node) {
    let plain = node.kubectl(&["get", "pods"]);
    let header: Vec<&str> = plain.lines().next().unwrap_or_default().split_whitespace().collect();
    assert_eq!(header, ["NAME", "READY", "STATUS", "RESTARTS", "AGE"], "{plain}");
    assert_eq!(
        plain.lines().filter(|line| line.contains("1/1") && line.contains("Running")).count(),
        2,
        "{plain}"
    );
    let wide = node.kubectl(&["get", "pods", "-o", "wide"]);
    assert!(wide.contains("10.244.0.") && wide.contains("node-1"), "{wide}");
    let yaml = node.kubectl(&["get", "deployment", "web", "-o", "yaml"]);
    assert!(yaml.contains("kind: Deployment") && yaml.contains("value: two"), "{yaml}");
    let service = node.kubectl(&["get", "svc", "web"]);
    assert!(
        service.contains("NodePort") && service.contains("10.96.") && service.contains("80:3"),
        "{service}"
    );
    let nodes = node.kubectl(&["get", "nodes", "-o", "wide"]);
    assert!(nodes.contains("Ready") && nodes.contains("192.0.2.10"), "{nodes}");
}

fn describes(node: &Node) {
    let pod = node.kubectl(&["describe", "pods", "-l", "app=web"]);
    for part in ["Node:", "IP:", "Container ID:", "Readiness:", "Scheduled", "Started"] {
        assert!(pod.contains(part), "no {part:?} in {pod}");
    }
    let described = node.kubectl(&["describe", "node", "node-1"]);
    for part in
        ["Conditions:", "Capacity:", "Allocatable:", "Container Runtime Version:", "Non-terminated Pods:"]
    {
        assert!(described.contains(part), "no {part:?} in {described}");
    }
    let service = node.kubectl(&["describe", "svc", "web"]);
    for part in ["Type:", "NodePort:", "Endpoints:", "10.244.0."] {
        assert!(service.contains(part), "no {part:?} in {service}");
    }
    let deployment = node.kubectl(&["describe", "deployment", "web"]);
    for part in ["Replicas:", "StrategyType:", "NewReplicaSet:", "ScalingReplicaSet"] {
        assert!(deployment.contains(part), "no {part:?} in {deployment}");
    }
}

fn diff_changes_nothing(node: &Node) {
    let version =
        || node.kubectl(&["get", "deployment", "web", "-o", "jsonpath={.metadata.resourceVersion}"]);
    let before = version();
    let path = node.dir().join("changed.yaml");
    std::fs::write(&path, web(5, "three")).expect("write the manifest");
    let output =
        node.kubectl_command(&["diff", "-f", &path.display().to_string()]).output().expect("start kubectl");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        output.status.code(),
        Some(1),
        "a difference is exit 1: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("replicas: 5") && text.contains("value: three"), "{text}");
    assert_eq!(version(), before, "diff must change nothing");
}

/// A kubectl that goes on, with its output line by line.
struct Following {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Following {
    fn start(node: &Node, args: &[&str]) -> Self {
        let mut child = node.kubectl_command(args).stdout(Stdio::piped()).spawn().expect("start kubectl");
        let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        Following { child, lines }
    }

    /// Reads until a line has `part`.
    fn until(&mut self, part: &str) -> String {
        for line in self.lines.by_ref() {
            let line = line.expect("read kubectl's output");
            if line.contains(part) {
                return line;
            }
        }
        panic!("kubectl ended before it said {part:?}");
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn kubectl_follows_logs_and_watches() {
    if !require_root() {
        return;
    }
    let node = node();
    node.sheave(&["image", "import", &image::busybox().display().to_string()]);
    let mut watch = Following::start(&node, &["get", "pods", "-w"]);
    let script = "i=0; while true; do echo line-$i; i=$((i+1)); sleep 0.1; done";
    apply(
        &node,
        &format!(
            "apiVersion: v1
kind: Pod
metadata: {{name: talker}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {{name: talk, image: {:?}, imagePullPolicy: Never, command: [/bin/sh, -c, {script:?}]}}
",
            image::BUSYBOX
        ),
    );
    watch.until("Running");
    let mut logs = Following::start(&node, &["logs", "-f", "talker"]);
    logs.until("line-3");
    let now = node.kubectl(&["logs", "talker"]).lines().count();
    logs.until(&format!("line-{}", now + 5));
    assert_eq!(node.kubectl(&["logs", "talker", "--tail=2"]).lines().count(), 2);
    node.kubectl(&["delete", "pod", "talker"]);
    watch.until("Terminating");
}
