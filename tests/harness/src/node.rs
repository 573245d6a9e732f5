//! A whole node for a test: the real `sheave` program in a network namespace and a cgroup of its own, with an uplink to
//! a second namespace that stands for the outside. Nothing of the host is touched, and dropping it takes all of it away.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::netns::checked;
use crate::{Cgroup, NetNs, unique, wait_until};

/// The node's addresses, on its uplink `eth0`, and the outside's.
pub const NODE_IP4: &str = "192.0.2.10";
/// See [`NODE_IP4`].
pub const NODE_IP6: &str = "2001:db8::10";
/// The address of the outside, the node's default gateway.
pub const OUTSIDE_IP4: &str = "192.0.2.1";
/// See [`OUTSIDE_IP4`].
pub const OUTSIDE_IP6: &str = "2001:db8::1";

/// How long a node may take to come up, and to go away.
const NODE_PATIENCE: Duration = Duration::from_secs(60);

/// A running node. The API answers on port 6443 inside [`Node::netns`] only.
#[derive(Debug)]
pub struct Node {
    /// Where the node lives.
    pub netns: NetNs,
    /// Beyond its uplink.
    pub outside: NetNs,
    /// Where its pods live and balancing attaches. Processes of a test that use services must be inside.
    pub cgroup: Cgroup,
    dir: tempfile::TempDir,
    pin_dir: PathBuf,
    bin: PathBuf,
    args: Vec<String>,
    child: Option<Child>,
}

impl Node {
    /// Makes namespaces, cgroup and directories, and starts `bin up`; does not wait. `args` are more flags.
    pub fn start(bin: impl AsRef<Path>, args: &[&str]) -> Self {
        Self::start_in(&std::env::temp_dir(), bin, args)
    }

    /// [`Node::start`] with its directories below `parent`: what measures a disk must not be on a memory file system.
    pub fn start_in(parent: &Path, bin: impl AsRef<Path>, args: &[&str]) -> Self {
        let mut node = Self::prepare(parent, bin, args);
        node.restart();
        node
    }

    /// Everything but the start of the program.
    pub fn prepare(parent: &Path, bin: impl AsRef<Path>, args: &[&str]) -> Self {
        let (netns, outside) = (NetNs::new(), NetNs::new());
        netns.veth("eth0", &outside, "eth0");
        for (ns, ip4, ip6) in [(&netns, NODE_IP4, NODE_IP6), (&outside, OUTSIDE_IP4, OUTSIDE_IP6)] {
            ns.ip(&["address", "add", &format!("{ip4}/24"), "dev", "eth0"]);
            ns.ip(&["address", "add", &format!("{ip6}/64"), "dev", "eth0", "nodad"]);
        }
        netns.ip(&["route", "add", "default", "via", OUTSIDE_IP4]);
        netns.ip(&["-6", "route", "add", "default", "via", OUTSIDE_IP6]);
        let dir =
            tempfile::Builder::new().prefix("shv-").tempdir_in(parent).expect("make the node's directory");
        Node {
            netns,
            outside,
            cgroup: Cgroup::new("node"),
            pin_dir: Path::new("/sys/fs/bpf").join(unique("sheave-node")),
            dir,
            bin: bin.as_ref().to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            child: None,
        }
    }

    /// The flags that say where this node keeps its things.
    pub fn path_flags(&self) -> Vec<String> {
        let dir = |name: &str| self.dir.path().join(name).display().to_string();
        [
            ("--state-dir", dir("state")),
            ("--run-dir", dir("run")),
            ("--log-dir", dir("log")),
            ("--pin-dir", self.pin_dir.display().to_string()),
            ("--cgroup-path", self.cgroup.path().display().to_string()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect()
    }

    /// Starts the program again; it must not be running.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "the node is running");
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("open the node's log");
        let mut command = self.command(&self.bin);
        command.arg("up").args(self.path_flags()).args(["--node-name", "node-1"]).args(&self.args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().expect("start sheave up"));
    }

    /// SIGKILL for the program; its pods go on.
    pub fn kill9(&mut self) {
        let mut child = self.child.take().expect("the node is running");
        child.kill().expect("kill sheave up");
        child.wait().expect("wait for sheave up");
    }

    /// SIGTERM, and the wait for an orderly end; its pods go on.
    pub fn terminate(&mut self) {
        let mut child = self.child.take().expect("the node is running");
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signal sheave up");
        let status = wait_until("the end of sheave up", NODE_PATIENCE, || {
            child.try_wait().expect("wait for sheave up").ok_or("still running")
        });
        assert!(status.success(), "sheave up ended with {status}:\n{}", self.log_tail());
    }

    /// The pid of `sheave up`.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the node is running").id()
    }

    /// A command inside the node's network namespace and cgroup.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        self.netns.apply(&mut command);
        self.cgroup.apply(&mut command);
        command
    }

    /// `sheave ARGS` with this node's directories, run to its end; panics with its message if it fails.
    #[track_caller]
    pub fn sheave(&self, args: &[&str]) -> String {
        checked(self.command(&self.bin).args(args).args(self.path_flags()))
    }

    /// `kubectl` as the admin, not yet started.
    pub fn kubectl_command(&self, args: &[&str]) -> Command {
        let mut command = self.command("kubectl");
        command.arg("--kubeconfig").arg(self.kubeconfig()).args(args);
        // Its discovery cache must not be another node's.
        command.env("KUBECACHEDIR", self.dir.path().join("kube-cache"));
        command
    }

    /// `kubectl ARGS` run to its end; panics with its message if it fails.
    #[track_caller]
    pub fn kubectl(&self, args: &[&str]) -> String {
        checked(&mut self.kubectl_command(args))
    }

    /// The admin's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("state/admin.kubeconfig")
    }

    /// Where `--state-dir` and the others are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where maps and links are pinned.
    pub fn pin_dir(&self) -> &Path {
        &self.pin_dir
    }

    /// Waits until the Node object says Ready.
    #[track_caller]
    pub fn wait_ready(&mut self) {
        wait_until("the node to be Ready", NODE_PATIENCE, || self.ready());
    }

    fn ready(&mut self) -> Result<(), String> {
        if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten()) {
            panic!("sheave up ended with {status}:\n{}", self.log_tail());
        }
        if !self.kubeconfig().exists() {
            return Err(format!("no kubeconfig yet:\n{}", self.log_tail()));
        }
        // Not by kubectl: hosts that test need not have it.
        let output = self
            .command(&self.bin)
            .args(["raw", "GET", "/api/v1/nodes/node-1", "--kubeconfig"])
            .arg(self.kubeconfig())
            .output()
            .map_err(|error| format!("start sheave raw: {error}"))?;
        let node: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let conditions = node["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
        if conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True") {
            return Ok(());
        }
        Err(format!("{conditions:?} {}{}", String::from_utf8_lossy(&output.stderr), self.log_tail()))
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("sheave.log")
    }

    /// The last lines of the program's log, for messages.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the node's log ends with:\n{}", self.log_tail());
        }
        if let Some(mut child) = self.child.take() {
            // Both fail only when it has ended already.
            child.kill().ok();
            child.wait().ok();
        }
        let output = self.command(&self.bin).args(["down", "--purge"]).args(self.path_flags()).output();
        match output {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                // A second panic would abort the whole suite and hide the first.
                assert!(std::thread::panicking(), "sheave down: {text}");
                eprintln!("sheave down: {text}");
            }
            Err(error) => eprintln!("start sheave down: {error}"),
        }
    }
}
