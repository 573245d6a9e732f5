//! Bad input where a user meets it: each gets a message that names the object and the way out, and nothing else on the
//! node is harmed by it.

use std::net::{SocketAddr, TcpListener};

use sheave_harness::{Node, image, require_root, wait_for};

const SHEAVE: &str = env!("CARGO_BIN_EXE_sheave");

fn pod(name: &str, image: &str, command: &str) -> String {
    let command = if command.is_empty() { String::new() } else { format!(", command: [{command}]") };
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {{name: main, image: {image:?}, imagePullPolicy: Never{command}}}
---
"
    )
}

fn apply(node: &Node, manifest: &str) {
    let path = node.dir().join("manifest.yaml");
    std::fs::write(&path, manifest).expect("write the manifest");
    node.kubectl(&["apply", "-f", &path.display().to_string()]);
}

/// Waits until a pod's container waits for a reason whose message has `part`.
fn waits_with(node: &Node, pod: &str, part: &str) -> String {
    let path = "jsonpath={.status.containerStatuses[0].state.waiting.reason}: {.status.containerStatuses[0].state.waiting.message}";
    wait_for(&format!("pod {pod} to say {part:?}"), || {
        let said = node.kubectl(&["get", "pod", pod, "-o", path]);
        if said.contains(part) { Ok(said) } else { Err(said) }
    })
}

#[test]
fn a_missing_image_and_a_missing_command_are_named_and_others_run() {
    if !require_root() {
        return;
    }
    let mut node = Node::start(SHEAVE, &[]);
    node.wait_ready();
    node.sheave(&["image", "import", &image::busybox().display().to_string()]);
    let manifest = [
        pod("no-image", "localhost/absent:1", ""),
        pod("no-command", image::BUSYBOX, "/bin/absent"),
        pod("good", image::BUSYBOX, "/bin/sleep, '1000'"),
    ]
    .concat();
    apply(&node, &manifest);
    node.kubectl(&["wait", "pod/good", "--for=condition=Ready", "--timeout=60s"]);
    let said = waits_with(&node, "no-image", "localhost/absent:1");
    assert!(said.contains("sheave image import"), "{said}");
    waits_with(&node, "no-command", "/bin/absent");
    let events = node.kubectl(&["get", "events"]);
    assert!(events.contains("localhost/absent:1") && events.contains("/bin/absent"), "{events}");
    // The image arrives: the pod starts without being touched.
    node.sheave(&["image", "import", &image::busybox().display().to_string(), "--name", "localhost/late:1"]);
    apply(&node, &pod("late", "localhost/late:1", "/bin/sleep, '1000'"));
    node.kubectl(&["wait", "pod/late", "--for=condition=Ready", "--timeout=60s"]);
}

#[test]
fn a_used_up_pod_range_is_named_and_freed_addresses_are_given_again() {
    if !require_root() {
        return;
    }
    let mut node = Node::start(SHEAVE, &["--pod-cidr", "10.244.9.0/29"]);
    node.wait_ready();
    node.sheave(&["image", "import", &image::busybox().display().to_string()]);
    let names: Vec<String> = (0..8).map(|number| format!("many-{number}")).collect();
    let manifest: String = names.iter().map(|name| pod(name, image::BUSYBOX, "/bin/sleep, '1000'")).collect();
    apply(&node, &manifest);
    let events = wait_for("an event that names the range", || {
        let events = node.kubectl(&["get", "events", "-o", "wide"]);
        if events.contains("10.244.9.0/29") { Ok(events) } else { Err(events) }
    });
    assert!(events.contains("FailedCreatePodSandBox"), "{events}");
    let running = || {
        let list = node.kubectl(&["get", "pods", "--field-selector=status.phase=Running", "-o", "name"]);
        list.lines().map(|line| line.trim_start_matches("pod/").to_owned()).collect::<Vec<_>>()
    };
    let first = wait_for("some pods to run", || Some(running()).filter(|r| !r.is_empty()).ok_or("none"));
    node.kubectl(&["delete", "pod", "--wait=true", first.first().expect("a running pod")]);
    wait_for("a pod that waited to get the address", || {
        let now = running();
        if now.iter().any(|name| !first.contains(name)) { Ok(()) } else { Err(format!("{now:?}")) }
    });
}

#[test]
fn a_taken_port_is_named_with_the_flag() {
    if !require_root() {
        return;
    }
    let node = Node::prepare(&std::env::temp_dir(), SHEAVE, &[]);
    let address: SocketAddr = "0.0.0.0:6443".parse().expect("an address");
    let _taken = node.netns.run(|| TcpListener::bind(address).expect("bind"));
    let output = node.command(SHEAVE).arg("up").args(node.path_flags()).output().expect("start sheave up");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("6443") && said.contains("--listen"), "{said}");
}

#[test]
fn without_root_it_says_so_and_leaves_nothing() {
    if !require_root() {
        return;
    }
    let node = Node::prepare(&std::env::temp_dir(), SHEAVE, &[]);
    let dir = node.dir().join("nobody");
    std::fs::create_dir(&dir).expect("make a directory");
    std::os::unix::fs::chown(&dir, Some(65534), Some(65534)).expect("give it away");
    let parent: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(node.dir(), parent).expect("open the way");
    // A copy: nobody may not be allowed to reach the build directory.
    let program = node.dir().join("sheave");
    std::fs::copy(SHEAVE, &program).expect("copy the program");
    let state = dir.join("state").display().to_string();
    let run = dir.join("run").display().to_string();
    let output = node
        .netns
        .command("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .args(["up", "--state-dir", &state, "--run-dir", &run])
        .output()
        .expect("start setpriv");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("root"), "{said}");
}

#[test]
fn a_settings_file_with_a_typing_error_is_refused_before_anything_starts() {
    if !require_root() {
        return;
    }
    let node = Node::prepare(&std::env::temp_dir(), SHEAVE, &[]);
    let path = node.dir().join("config.toml");
    std::fs::write(&path, "[agent]\nmax-podz = 3\n").expect("write the settings");
    let output = node
        .command(SHEAVE)
        .args(["up", "--config", &path.display().to_string()])
        .args(node.path_flags())
        .output()
        .expect("start sheave up");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("max-podz") && said.contains("[agent]"), "{said}");
    assert!(!node.dir().join("state").exists(), "nothing may be made before the settings are read");
}
