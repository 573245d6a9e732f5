//! What the tests of pods stand on: a whole node with its images, manifests from strings, and looks at what the API
//! says. Everything goes with the node.

use std::io::Write;
use std::process::Stdio;

use sheave_harness::{Node, image, wait_for};

/// A node with both images on it.
pub(crate) struct Bed {
    pub(crate) node: Node,
}

impl Bed {
    pub(crate) fn new(args: &[&str]) -> Self {
        let mut node = Node::start(env!("CARGO_BIN_EXE_sheave"), args);
        node.wait_ready();
        for archive in [image::busybox(), image::echo()] {
            node.sheave(&["image", "import", archive.to_str().expect("a path")]);
        }
        Bed { node }
    }

    /// Applies a manifest.
    #[track_caller]
    pub(crate) fn apply(&self, manifest: &str) {
        let mut command = self.node.kubectl_command(&["apply", "-f", "-"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start kubectl");
        child.stdin.take().expect("stdin").write_all(manifest.as_bytes()).expect("write the manifest");
        let output = child.wait_with_output().expect("wait for kubectl");
        assert!(output.status.success(), "apply: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// One value of a pod.
    pub(crate) fn pod(&self, name: &str, path: &str) -> String {
        let path = format!("jsonpath={{{path}}}");
        let output = self.node.kubectl_command(&["get", "pod", name, "-o", &path]).output().expect("kubectl");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Waits until a value of a pod is `wanted`.
    #[track_caller]
    pub(crate) fn wait_pod(&self, name: &str, path: &str, wanted: &str) {
        wait_for(&format!("{name}{path} to be {wanted:?}"), || match self.pod(name, path) {
            value if value == wanted => Ok(()),
            value => Err(format!("it is {value:?}; {}", self.node.log_tail())),
        });
    }

    #[track_caller]
    pub(crate) fn wait_ready(&self, name: &str) {
        self.wait_pod(name, r#".status.conditions[?(@.type=="Ready")].status"#, "True");
    }

    /// Waits until a pod is gone from the API.
    #[track_caller]
    pub(crate) fn wait_gone(&self, name: &str) {
        wait_for(&format!("{name} to be gone"), || match self.pod(name, ".metadata.name") {
            gone if gone.is_empty() => Ok(()),
            _ => Err(self.pod(name, ".status")),
        });
    }

    /// Reasons of the events about a pod.
    pub(crate) fn reasons(&self, name: &str) -> String {
        let selector = format!("involvedObject.name={name}");
        self.node.kubectl(&[
            "get",
            "events",
            "--field-selector",
            &selector,
            "-o",
            "jsonpath={.items[*].reason}",
        ])
    }

    #[track_caller]
    pub(crate) fn wait_event(&self, name: &str, reason: &str) {
        wait_for(&format!("an event {reason} about {name}"), || {
            let reasons = self.reasons(name);
            if reasons.split(' ').any(|known| known == reason) { Ok(()) } else { Err(reasons) }
        });
    }

    /// Processes in the cgroups of pods: what runs, whoever watches it.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let files = walk(&self.node.cgroup.path().join("kubepods"));
        let mut pids: Vec<u32> = files
            .iter()
            .filter(|file| file.ends_with("/cgroup.procs"))
            .flat_map(|file| {
                std::fs::read_to_string(file)
                    .unwrap_or_default()
                    .lines()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .filter_map(|line| line.parse().ok())
            .collect();
        pids.sort_unstable();
        pids
    }

    /// Nothing of a pod's is left in the node's directories, except that its addresses are kept back for a while.
    #[track_caller]
    pub(crate) fn assert_no_trace(&self, uid: &str) {
        wait_for(&format!("no trace of {uid}"), || {
            let found: Vec<String> = walk(self.node.dir())
                .into_iter()
                .filter(|path| path.contains(uid) && !path.contains("/network/freed/"))
                .collect();
            if found.is_empty() { Ok(()) } else { Err(found.join("\n")) }
        });
    }
}

fn walk(dir: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        // What vanishes while it is looked at leaves no trace.
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            found.push(entry.path().display().to_string());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(entry.path());
            }
        }
    }
    found
}
