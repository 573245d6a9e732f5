//! What the runtime's tests stand on: a node's directories and cgroup, an image made of a static busybox, and
//! shorthands. Everything is gone when a bed is dropped, and the drop fails the test if a pod left something.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use sheave_agent::runtime::{
    ContainerRecord, ContainerSpec, ExecOutput, ExecSpec, Exit, ImageRef, Qos, Result, Runtime,
    RuntimeConfig, RuntimeEvent, SandboxInfo, SandboxSpec,
};
use sheave_harness::{Cgroup, wait};
use tempfile::TempDir;
use tokio::sync::mpsc::UnboundedReceiver;

/// Directories and cgroup of one node.
pub(crate) struct Bed {
    pub(crate) dir: TempDir,
    pub(crate) cgroup: Cgroup,
    tokio: tokio::runtime::Runtime,
}

/// An agent's runtime on a bed.
pub(crate) struct Node<'a> {
    pub(crate) bed: &'a Bed,
    pub(crate) runtime: Runtime,
    pub(crate) events: UnboundedReceiver<RuntimeEvent>,
}

const APPLETS: [&str; 30] = [
    "sh", "cat", "chroot", "dd", "df", "dmesg", "echo", "false", "grep", "hostname", "id", "ip", "kill",
    "ln", "ls", "mkdir", "mknod", "mount", "nc", "ps", "readlink", "rm", "sleep", "stat", "tail", "touch",
    "true", "unshare", "wc", "yes",
];

/// Fills a directory with a root filesystem.
fn make_image(root: &Path) {
    for dir in ["bin", "etc", "proc", "tmp", "var"] {
        fs::create_dir_all(root.join(dir)).expect("make the image");
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("copy busybox (package busybox-static)");
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).expect("link an applet");
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/var:/bin/sh\n")
        .expect("passwd");
    fs::write(root.join("etc/group"), "root:x:0:\nweb:x:1001:\nlogs:x:50:web\n").expect("group");
    let script = root.join("bin/lost");
    fs::write(&script, "#!/no/such/interpreter\n").expect("script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("mode");
}

/// A specification of a container of the bed's image that runs a shell script.
pub(crate) fn shell(bed: &Bed, name: &str, script: &str) -> ContainerSpec {
    shell_in(bed.dir.path(), name, script)
}

/// [`shell`] for the bed below a directory.
pub(crate) fn shell_in(bed: &Path, name: &str, script: &str) -> ContainerSpec {
    ContainerSpec {
        name: name.to_owned(),
        image: ImageRef {
            reference: "busybox".into(),
            id: "sha256:0".into(),
            layers: vec![bed.join("image")],
            ..ImageRef::default()
        },
        command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        ..ContainerSpec::default()
    }
}

/// A command without a time limit that matters.
pub(crate) fn command(words: &[&str]) -> ExecSpec {
    ExecSpec { command: words.iter().map(|w| (*w).to_owned()).collect(), timeout_ms: 30_000 }
}

/// A pod with nothing special.
pub(crate) fn sandbox(uid: &str) -> SandboxSpec {
    SandboxSpec {
        uid: uid.to_owned(),
        namespace: "default".into(),
        name: uid.to_owned(),
        hostname: uid.to_owned(),
        qos: Qos::BestEffort,
        ..SandboxSpec::default()
    }
}

impl Bed {
    pub(crate) fn new() -> Bed {
        let dir = tempfile::Builder::new().prefix("sheave-runtime-").tempdir().expect("a directory");
        make_image(&dir.path().join("image"));
        let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        Bed { dir, cgroup: Cgroup::new("runtime"), tokio: tokio.expect("tokio") }
    }

    pub(crate) fn config(&self) -> RuntimeConfig {
        config(self.dir.path(), self.cgroup.path())
    }

    /// Starts an agent's runtime.
    pub(crate) fn open(&self) -> Node<'_> {
        let (runtime, events) = self.wait(Runtime::open(self.config())).expect("open the runtime");
        Node { bed: self, runtime, events }
    }

    pub(crate) fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.tokio.block_on(future)
    }

    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.tokio.spawn(future)
    }

    /// A pod's log file.
    pub(crate) fn log(&self, uid: &str, container: &str, attempt: u32) -> PathBuf {
        self.dir.path().join(format!("log/default_{uid}_{uid}/{container}/{attempt}.log"))
    }

    /// What is left of pods: run directories, writable layers, groups, processes, mounts.
    pub(crate) fn residue(&self) -> Vec<String> {
        let mut found = Vec::new();
        let list = |dir: &Path| -> Vec<PathBuf> {
            fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect()
        };
        for dir in ["run/pods", "state/rootfs"] {
            found.extend(list(&self.dir.path().join(dir)).iter().map(|p| p.display().to_string()));
        }
        found.extend(self.cgroup.pids().iter().map(|pid| format!("process {pid}")));
        for root in list(Path::new("/sys/fs/cgroup")).into_iter().chain(["/sys/fs/cgroup".into()]) {
            for class in ["kubepods", "kubepods/burstable", "kubepods/besteffort", "shims"] {
                let pods = list(&root.join(self.cgroup.name()).join(class)).into_iter();
                found.extend(
                    pods.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("pod")))
                        .map(|p| p.display().to_string()),
                );
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        let here = self.dir.path().display().to_string();
        found.extend(mounts.lines().filter(|l| l.contains(&here)).map(|l| format!("mount {l}")));
        found
    }
}

/// The configuration of a runtime below a directory.
pub(crate) fn config(dir: &Path, cgroup: &Path) -> RuntimeConfig {
    RuntimeConfig {
        state_dir: dir.join("state"),
        run_dir: dir.join("run"),
        log_dir: dir.join("log"),
        cgroup_path: Some(cgroup.to_owned()),
        shim_exe: Some(PathBuf::from(env!("CARGO_BIN_EXE_sheave"))),
    }
}

impl Node<'_> {
    pub(crate) fn start_pod(&self, spec: SandboxSpec) -> SandboxInfo {
        self.bed.wait(self.runtime.start_sandbox(spec)).expect("start the sandbox")
    }

    pub(crate) fn try_start(&self, uid: &str, spec: ContainerSpec) -> Result<ContainerRecord> {
        self.bed.wait(self.runtime.start_container(uid, spec))
    }

    pub(crate) fn start(&self, uid: &str, spec: ContainerSpec) -> ContainerRecord {
        self.try_start(uid, spec).expect("start the container")
    }

    pub(crate) fn exec(&self, uid: &str, container: &str, words: &[&str]) -> ExecOutput {
        self.bed.wait(self.runtime.exec(uid, container, command(words))).expect("exec")
    }

    pub(crate) fn stop(&self, uid: &str) {
        self.bed.wait(self.runtime.stop_sandbox(uid)).expect("stop the sandbox");
    }

    pub(crate) fn next_event(&mut self) -> RuntimeEvent {
        let patience = wait::PATIENCE;
        let next = async { tokio::time::timeout(patience, self.events.recv()).await };
        self.bed.wait(next).expect("an event in time").expect("an open channel")
    }

    /// The exit of the next container that ends.
    pub(crate) fn next_exit(&mut self, container: &str) -> Exit {
        match self.next_event() {
            RuntimeEvent::ContainerExited { name, exit, .. } if name == container => exit,
            other => panic!("expected the end of {container}, got {other:?}"),
        }
    }

    /// Runs a script in a new pod to its end: exit and log text.
    pub(crate) fn run(&mut self, uid: &str, spec: ContainerSpec) -> (Exit, String) {
        self.start_pod(sandbox(uid));
        let name = spec.name.clone();
        self.start(uid, spec);
        let exit = self.next_exit(&name);
        let text = log_text(&self.bed.log(uid, &name, 0));
        self.stop(uid);
        (exit, text)
    }
}

/// The text of a log's records.
pub(crate) fn log_text(path: &Path) -> String {
    let records = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    records.lines().map(|l| l.splitn(4, ' ').nth(3).unwrap_or("?").to_owned() + "\n").collect()
}
