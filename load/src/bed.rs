//! A bed: what traffic runs through. Invariant: it is all in namespaces without a name, a private mount namespace and one
//! cgroup, which a later run removes should this one be killed.
//!
//! ```text
//!   client ── up0 node pod0 ── pod (connects, as a pod of the node would)
//!                      pod1 ── backends (every address of 10.128.0.0/10 and 10.192.0.0/11 answers)
//! ```

use crate::LoadError;
use crate::error::Doing as _;
use crate::spawn::{NetNs, Worker};
use crate::wire::Job;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, sched_getaffinity, unshare};
use nix::unistd::Pid;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The node's address on its uplink.
pub(crate) const NODE: [u8; 4] = [198, 51, 100, 1];
/// The node's device towards the client outside.
pub(crate) const UPLINK: &str = "up0";
/// Beginning of the names of the node's devices towards pods.
pub(crate) const POD_LINKS: &str = "pod";
/// Addresses of pods and endpoints.
pub(crate) const PODS: &str = "10.128.0.0/9";
/// The part of them that the backends' namespace answers for.
const ENDPOINTS: [&str; 2] = ["10.128.0.0/10", "10.192.0.0/11"];
/// Beginning of the names of cgroups.
const CGROUP: &str = "sheave-load-";
/// Where a BPF file system of the run's own is mounted, for its processes only.
const BPFFS: &str = "/sys/fs/bpf";
/// Where files of the run's own are, for its processes only.
const FILES: &str = "/mnt";

/// Where a connection starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum From {
    /// A pod of the node.
    Pod,
    /// The node itself.
    Node,
    /// Another machine.
    Outside,
}

impl From {
    pub(crate) const ALL: [Self; 3] = [Self::Pod, Self::Node, Self::Outside];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Node => "node",
            Self::Outside => "outside",
        }
    }
}

/// The CPUs to use: one for clients, another for servers where there is one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpus {
    pub(crate) client: usize,
    pub(crate) server: usize,
}

impl Cpus {
    pub(crate) fn find() -> Self {
        let allowed = sched_getaffinity(Pid::from_raw(0));
        let is_set = |cpu: &usize| allowed.as_ref().is_ok_and(|set| set.is_set(*cpu).unwrap_or(false));
        let mut cpus = (0..nix::sched::CpuSet::count()).filter(is_set);
        let client = cpus.next().unwrap_or(0);
        Self { client, server: cpus.next().unwrap_or(client) }
    }
}

/// What all beds of a run share: the mount namespace with its BPF file system, and a cgroup.
#[derive(Debug)]
pub(crate) struct Ground {
    cgroup: PathBuf,
}

impl Ground {
    /// Moves the calling thread into a mount namespace of its own and makes the cgroup. What earlier runs that were
    /// killed left is removed.
    ///
    /// # Errors
    /// Without root, or when the host refuses.
    pub(crate) fn new() -> Result<Self, LoadError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(LoadError::NeedsRoot);
        }
        let root = v2_root()?;
        sweep(&root);
        unshare(CloneFlags::CLONE_NEWNS).doing("make a mount namespace")?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .doing("make the mount namespace private")?;
        mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=700"))
            .doing(format!("mount a BPF file system at {BPFFS}"))?;
        let cgroup = root.join(format!("{CGROUP}{}", std::process::id()));
        fs::create_dir(&cgroup).doing(format!("make cgroup {}", cgroup.display()))?;
        Ok(Self { cgroup })
    }
}

impl Ground {
    /// Where processes of the run keep files that nobody else sees, and that go with the run.
    ///
    /// # Errors
    /// When it can't be mounted.
    pub(crate) fn mount_dir(&self) -> Result<(), LoadError> {
        mount(Some("tmpfs"), FILES, Some("tmpfs"), MsFlags::empty(), Some("mode=700"))
            .doing(format!("mount a file system for the run at {FILES}"))
    }

    /// The directory of [`Ground::mount_dir`].
    pub(crate) fn dir(&self) -> &'static Path {
        Path::new(FILES)
    }

    /// Where pins go.
    pub(crate) fn pins(&self) -> &'static Path {
        Path::new(BPFFS)
    }

    /// A cgroup inside the run's.
    ///
    /// # Errors
    /// When it can't be made.
    pub(crate) fn cgroup(&self, name: &str) -> Result<PathBuf, LoadError> {
        let path = self.cgroup.join(name);
        fs::create_dir(&path).doing(format!("make cgroup {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Err(error) = remove_cgroup(&self.cgroup) {
            eprintln!("sheave: cannot remove cgroup {}: {error}", self.cgroup.display());
        }
    }
}

/// The root of the v2 hierarchy.
fn v2_root() -> Result<PathBuf, LoadError> {
    let info = fs::read_to_string("/proc/self/mountinfo").doing("read /proc/self/mountinfo")?;
    let found = info.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut fields = left.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (right.starts_with("cgroup2 ") && root == "/").then(|| PathBuf::from(point))
    });
    let missing = || std::io::Error::other("no cgroup2 file system is mounted, or only a part of it");
    found.ok_or_else(missing).doing("find the root of the cgroup v2 hierarchy")
}

/// Removes what runs that were killed left: their cgroups are named by processes that are no more.
fn sweep(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(CGROUP).filter(|pid| pid.parse::<u32>().is_ok()) else { continue };
        if Path::new("/proc").join(pid).exists() {
            continue;
        }
        match remove_cgroup(&entry.path()) {
            Ok(()) => eprintln!("sheave: removed {name}, which a killed run left"),
            Err(error) => eprintln!("sheave: cannot remove {name}, which a killed run left: {error}"),
        }
    }
}

/// Removes a cgroup of ours with its children. Processes that were killed may take a moment to leave it.
fn remove_cgroup(top: &Path) -> std::io::Result<()> {
    const TRIES: u32 = 1000;
    // Kernels before 5.14 have no such file; our processes are dead or dying anyway.
    drop(fs::write(top.join("cgroup.kill"), "1"));
    for entry in fs::read_dir(top)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path())?;
        }
    }
    for _ in 0..TRIES {
        match fs::remove_dir(top) {
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EBUSY as i32) => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            result => return result,
        }
    }
    fs::remove_dir(top)
}

/// Namespaces, links and servers for one way to balance.
#[derive(Debug)]
pub(crate) struct Bed {
    name: &'static str,
    client: NetNs,
    pod: NetNs,
    /// Where services are put.
    pub(crate) node: NetNs,
    /// Whose processes the socket hooks serve.
    pub(crate) cgroup: PathBuf,
    /// Where pins go.
    pub(crate) pin_dir: PathBuf,
    cpus: Cpus,
    _server: Worker,
}

impl Bed {
    /// Builds it, with backends that answer.
    ///
    /// # Errors
    /// When the host refuses, or lacks `ip`.
    pub(crate) fn new(ground: &Ground, name: &'static str, cpus: Cpus) -> Result<Self, LoadError> {
        let cgroup = ground.cgroup.join(name);
        fs::create_dir(&cgroup).doing(format!("make cgroup {}", cgroup.display()))?;
        let (client, pod, node, backends) = (NetNs::new()?, NetNs::new()?, NetNs::new()?, NetNs::new()?);
        ip(
            &node,
            &format!(
                "link set lo up\n\
                 link add up0 type veth peer name eth0 netns {}\n\
                 link add pod0 type veth peer name eth0 netns {}\n\
                 link add pod1 type veth peer name eth0 netns {}\n\
                 addr add 198.51.100.1/24 dev up0\n\
                 addr add 10.255.255.1/30 dev pod0\n\
                 addr add 10.255.255.5/30 dev pod1\n\
                 link set up0 up\nlink set pod0 up\nlink set pod1 up\n\
                 route add {PODS} via 10.255.255.6 dev pod1\n\
                 route add default via 198.51.100.2 dev up0",
                client.path(),
                pod.path(),
                backends.path(),
            ),
        )?;
        let end = |address: &str, routes: &str| {
            format!("link set lo up\naddr add {address} dev eth0\nlink set eth0 up\n{routes}")
        };
        ip(&client, &end("198.51.100.2/24", &format!("route add {PODS} via 198.51.100.1")))?;
        ip(&pod, &end("10.255.255.2/30", "route add default via 10.255.255.1"))?;
        let routes = format!(
            "route add default via 10.255.255.5\n{}",
            ENDPOINTS.map(|range| format!("route add local {range} dev lo")).join("\n")
        );
        ip(&backends, &end("10.255.255.6/30", &routes))?;
        set(&node, "ipv4/ip_forward", "1")?;
        // Connections that wait to be accepted must never be what is measured.
        set(&backends, "core/somaxconn", "65535")?;
        for netns in [&client, &pod, &node] {
            set(netns, "ipv4/ip_local_port_range", "10240 29999")?;
        }
        let mut server = Worker::start(
            "backends",
            &backends,
            None,
            &Job::Serve { cpu: cpus.server, awake: cpus.server != cpus.client },
        )?;
        let () = server.listen()?;
        let pin_dir = Path::new(BPFFS).join(name);
        Ok(Self { name, client, pod, node, cgroup, pin_dir, cpus, _server: server })
    }

    /// A process that connects from there.
    ///
    /// # Errors
    /// When it can't be started.
    pub(crate) fn connector(&self, from: From) -> Result<Worker, LoadError> {
        let (netns, cgroup) = match from {
            From::Pod => (&self.pod, Some(self.cgroup.as_path())),
            From::Node => (&self.node, Some(self.cgroup.as_path())),
            From::Outside => (&self.client, None),
        };
        let who = format!("client ({}, {})", self.name, from.name());
        Worker::start(who, netns, cgroup, &Job::Connect { cpu: self.cpus.client })
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // The pins hold programs and maps; the rest is in namespaces that end with their processes.
        let removed = match fs::remove_dir_all(&self.pin_dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            result => result,
        };
        if let Err(error) = removed.and_then(|()| remove_cgroup(&self.cgroup)) {
            eprintln!("sheave: cannot take down {}: {error}", self.name);
        }
    }
}

/// Runs lines of `ip` inside a namespace.
///
/// # Errors
/// When it can't be started, or fails.
pub(crate) fn ip(netns: &NetNs, lines: &str) -> Result<(), LoadError> {
    batch("ip", netns, lines)
}

/// Runs lines of a program of iproute2 inside a namespace.
///
/// # Errors
/// When it can't be started, or fails.
pub(crate) fn batch(program: &str, netns: &NetNs, lines: &str) -> Result<(), LoadError> {
    let mut command = Command::new(program);
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    netns.apply(&mut command)?;
    feed(command, lines.as_bytes(), &format!("{program} (of iproute2)"))
}

/// Runs a program with `input` as its standard input.
///
/// # Errors
/// When it can't be started, or fails: with what it said.
pub(crate) fn feed(mut command: Command, input: &[u8], program: &str) -> Result<(), LoadError> {
    let mut child = command.spawn().doing(format!("start {program}"))?;
    if let Some(mut pipe) = child.stdin.take() {
        // A program that ended early tells why itself.
        drop(pipe.write_all(input));
    }
    let output = child.wait_with_output().doing(format!("wait for {program}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().lines().next().map_or_else(|| output.status.to_string(), str::to_owned);
    Err(LoadError::Tool { program: program.to_owned(), said })
}

/// Sets a knob of `/proc/sys/net` inside a namespace.
///
/// # Errors
/// When the kernel has no such knob.
pub(crate) fn set(netns: &NetNs, knob: &str, value: &str) -> Result<(), LoadError> {
    let path = format!("/proc/sys/net/{knob}");
    netns.run(|| fs::write(&path, value)).doing(format!("set {path} in a namespace"))
}
