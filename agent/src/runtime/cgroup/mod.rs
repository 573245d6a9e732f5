//! Control groups of pods. Invariant: a group exists in every hierarchy in use at the same relative path,
//! and every process of a pod is from its birth in a group of the v2 hierarchy, so that `cgroup.kill`
//! reaches all of them and the service hooks see all of them, whichever hierarchy limits them.
//!
//! Written here and not taken from libcgroups, which can neither make groups without tasks (pods, QoS
//! classes) nor join the v1 controllers and the v2 hierarchy of a hybrid host.

mod device;
mod discover;
mod settings;

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::spec::{Qos, Resources};
pub(super) use discover::discover;

/// A file operation on a control group that failed.
#[derive(Debug, thiserror::Error)]
#[error("{op} {path}")]
pub(super) struct CgroupError {
    op: &'static str,
    path: PathBuf,
    #[source]
    pub(super) source: io::Error,
}

impl CgroupError {
    fn new(op: &'static str, path: &Path, source: io::Error) -> Self {
        CgroupError { op, path: path.to_owned(), source }
    }
}

impl From<CgroupError> for super::RuntimeError {
    fn from(CgroupError { op, path, source }: CgroupError) -> Self {
        Self::Io { op, path, source }
    }
}

type Result<T> = std::result::Result<T, CgroupError>;

/// One v1 hierarchy in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LegacyHierarchy {
    /// Where it is mounted.
    pub(super) root: PathBuf,
    /// Its controllers; `name=systemd` for the one without any.
    pub(super) controllers: Vec<String>,
}

/// The hierarchies of this host and where in them pods live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hierarchies {
    /// Where the v2 hierarchy is mounted.
    pub(super) unified: PathBuf,
    /// The v1 hierarchies in use; empty on a pure v2 host.
    pub(super) legacy: Vec<LegacyHierarchy>,
    /// Path of the attach point below every root; empty for the roots themselves.
    pub(super) base: PathBuf,
}

/// The limits that a group can be given, and whether devices are restricted.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limits {
    pub(super) resources: Resources,
    /// Only the devices of the default list may be used.
    pub(super) restrict_devices: bool,
    /// Out of memory ends the whole group, not one process (v2 only).
    pub(super) oom_group: bool,
}

/// A value to write into a control file of a group. `optional` files may be missing.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    controller: &'static str,
    file: &'static str,
    value: String,
    optional: bool,
}

/// Relative path of a pod's group below the attach point.
pub(super) fn pod_path(qos: Qos, uid: &str) -> PathBuf {
    qos_path(qos).join(format!("pod{uid}"))
}

/// Relative path of a QoS class's group below the attach point.
pub(super) fn qos_path(qos: Qos) -> PathBuf {
    match qos {
        Qos::Guaranteed => PathBuf::from("kubepods"),
        Qos::Burstable => PathBuf::from("kubepods/burstable"),
        Qos::BestEffort => PathBuf::from("kubepods/besteffort"),
    }
}

/// Relative path of a shim's group below the attach point: outside the pod's, so that neither its limits
/// nor its end touch the shim.
pub(super) fn shim_path(uid: &str) -> PathBuf {
    PathBuf::from("shims").join(format!("pod{uid}"))
}

impl Hierarchies {
    /// True if all controllers are on the v2 hierarchy.
    pub(super) fn is_unified(&self) -> bool {
        self.legacy.iter().all(|h| h.controllers.iter().all(|c| c.starts_with("name=")))
    }

    /// A group's directory in the v2 hierarchy.
    pub(super) fn unified_dir(&self, group: &Path) -> PathBuf {
        self.unified.join(&self.base).join(group)
    }

    fn legacy_dirs<'a>(&'a self, group: &'a Path) -> impl Iterator<Item = PathBuf> + 'a {
        self.legacy.iter().map(move |h| h.root.join(&self.base).join(group))
    }

    /// Makes a group and its missing parents in every hierarchy and limits it.
    pub(super) fn create(&self, group: &Path, limits: &Limits) -> Result<()> {
        self.create_unified(group)?;
        for dir in self.legacy_dirs(group) {
            fs::create_dir_all(&dir).map_err(|e| CgroupError::new("make", &dir, e))?;
        }
        self.apply(group, limits)
    }

    /// Makes a group in the v2 hierarchy only and enables no controllers for it: for commands run in a
    /// container, which are limited together with it.
    pub(super) fn create_bare(&self, group: &Path) -> Result<()> {
        let dir = self.unified_dir(group);
        fs::create_dir(&dir).map_err(|e| CgroupError::new("make", &dir, e))
    }

    fn create_unified(&self, group: &Path) -> Result<()> {
        let mut dir = self.unified.clone();
        for part in self.base.join(group).components() {
            self.enable_controllers(&dir)?;
            dir.push(part);
            match fs::create_dir(&dir) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::new("make", &dir, e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Hands the controllers that limits need down to the children of `dir`, where the v2 hierarchy has
    /// them.
    fn enable_controllers(&self, dir: &Path) -> Result<()> {
        if !self.is_unified() {
            return Ok(());
        }
        let read = |file: &str| {
            let path = dir.join(file);
            fs::read_to_string(&path).map_err(|e| CgroupError::new("read", &path, e))
        };
        let available = read("cgroup.controllers")?;
        let enabled = read("cgroup.subtree_control")?;
        let missing: Vec<String> = ["cpu", "memory", "pids"]
            .into_iter()
            .filter(|c| available.split_whitespace().any(|a| a == *c))
            .filter(|c| !enabled.split_whitespace().any(|e| e == *c))
            .map(|c| format!("+{c}"))
            .collect();
        if missing.is_empty() {
            Ok(())
        } else {
            write(&dir.join("cgroup.subtree_control"), &missing.join(" "))
        }
    }

    /// Writes a group's limits.
    pub(super) fn apply(&self, group: &Path, limits: &Limits) -> Result<()> {
        if self.is_unified() {
            let dir = self.unified_dir(group);
            for setting in settings::unified(limits) {
                write_setting(&dir, &setting)?;
            }
            if limits.restrict_devices {
                device::attach(&dir).map_err(|e| CgroupError::new("restrict devices of", &dir, e))?;
            }
            return Ok(());
        }
        let settings = settings::legacy(limits);
        for (hierarchy, dir) in self.legacy.iter().zip(self.legacy_dirs(group)) {
            for setting in settings.iter().filter(|s| hierarchy.controllers.iter().any(|c| c == s.controller))
            {
                write_setting(&dir, setting)?;
            }
        }
        Ok(())
    }

    /// Files that a new process writes `0` to in order to join a group in the v1 hierarchies. They are
    /// the `tasks` files: a single thread that moves itself is spared the lock that `cgroup.procs` waits
    /// milliseconds for.
    pub(super) fn legacy_joins(&self, group: &Path) -> Vec<PathBuf> {
        self.legacy_dirs(group).map(|d| d.join("tasks")).collect()
    }

    /// A group's directory in each hierarchy and the name that it goes by below `/sys/fs/cgroup`.
    pub(super) fn views(&self, group: &Path) -> Vec<(String, PathBuf)> {
        let name =
            |root: &Path| root.file_name().map_or("cgroup".into(), |n| n.to_string_lossy().into_owned());
        let legacy = self.legacy.iter().zip(self.legacy_dirs(group)).map(|(h, dir)| (name(&h.root), dir));
        legacy.chain([("unified".to_owned(), self.unified_dir(group))]).collect()
    }

    /// Moves the calling process, which has one thread, into a group of every hierarchy.
    pub(super) fn join(&self, group: &Path) -> Result<()> {
        write(&self.unified_dir(group).join("cgroup.procs"), "0")?;
        self.legacy_joins(group).iter().try_for_each(|file| write(file, "0"))
    }

    /// Kills every process of a group and of those below it. A missing group has none.
    pub(super) fn kill(&self, group: &Path) -> Result<()> {
        let file = self.unified_dir(group).join("cgroup.kill");
        match write(&file, "1") {
            Err(e) if is_gone(&e.source) => Ok(()),
            other => other,
        }
    }

    /// True if a group or one below it has a living process.
    pub(super) fn is_populated(&self, group: &Path) -> Result<bool> {
        let path = self.unified_dir(group).join("cgroup.events");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.lines().any(|l| l == "populated 1")),
            Err(e) if is_gone(&e) => Ok(false),
            Err(e) => Err(CgroupError::new("read", &path, e)),
        }
    }

    /// Waits until a group has no living process; false if `timeout` passed before.
    pub(super) fn wait_empty(&self, group: &Path, timeout: Duration) -> Result<bool> {
        let path = self.unified_dir(group).join("cgroup.events");
        let deadline = Instant::now() + timeout;
        loop {
            let file = match fs::File::open(&path) {
                Err(e) if is_gone(&e) => return Ok(true),
                other => other.map_err(|e| CgroupError::new("open", &path, e))?,
            };
            match io::read_to_string(&file) {
                Ok(text) if text.lines().any(|l| l == "populated 0") => return Ok(true),
                Err(e) if is_gone(&e) => return Ok(true),
                Err(e) => return Err(CgroupError::new("read", &path, e)),
                Ok(_) => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(CgroupError::new("poll", &path, e.into())),
            }
        }
    }

    /// Removes a group and those below it from every hierarchy; goes on past errors and returns the
    /// first. They must have no living processes.
    pub(super) fn remove(&self, group: &Path) -> Result<()> {
        let mut result = Ok(());
        for dir in self.legacy_dirs(group).chain([self.unified_dir(group)]) {
            result = result.and(remove_tree(&dir));
        }
        result
    }

    /// Removes every group that this module makes below the attach point, and in v1 hierarchies the attach point
    /// itself where nothing else is in it. There must be no pods left.
    pub(super) fn remove_all(&self) -> Result<()> {
        let result = self.remove(Path::new("kubepods")).and(self.remove(Path::new("shims")));
        if self.base != Path::new("") {
            for hierarchy in &self.legacy {
                // Not ours to remove when something else is in it.
                drop(fs::remove_dir(hierarchy.root.join(&self.base)));
            }
        }
        result
    }

    /// Number of processes of a group that were killed for want of memory.
    pub(super) fn oom_kills(&self, group: &Path) -> u64 {
        let file = if self.is_unified() {
            self.unified_dir(group).join("memory.events")
        } else {
            let Some(memory) = self.legacy.iter().find(|h| h.controllers.iter().any(|c| c == "memory"))
            else {
                return 0;
            };
            memory.root.join(&self.base).join(group).join("memory.oom_control")
        };
        fs::read_to_string(file).map_or(0, |text| settings::oom_kills(&text))
    }

    /// Uids of the pods that have a group, with its relative path.
    pub(super) fn pods(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut pods = Vec::new();
        for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
            let group = qos_path(qos);
            let mut uids = Vec::new();
            for dir in self.legacy_dirs(&group).chain([self.unified_dir(&group)]) {
                uids.extend(list_pods(&dir)?);
            }
            uids.sort();
            uids.dedup();
            pods.extend(uids.into_iter().map(|uid| {
                let path = pod_path(qos, &uid);
                (uid, path)
            }));
        }
        Ok(pods)
    }
}

fn list_pods(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if is_gone(&e) => return Ok(Vec::new()),
        other => other.map_err(|e| CgroupError::new("list", dir, e))?,
    };
    let mut uids = Vec::new();
    for entry in entries {
        let name = entry.map_err(|e| CgroupError::new("list", dir, e))?.file_name();
        uids.extend(name.to_str().and_then(|n| n.strip_prefix("pod")).map(str::to_owned));
    }
    Ok(uids)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut f| f.write_all(value.as_bytes()))
        .map_err(|e| CgroupError::new("write", path, e))
}

fn write_setting(dir: &Path, setting: &Setting) -> Result<()> {
    match write(&dir.join(setting.file), &setting.value) {
        Err(e) if setting.optional && is_gone(&e.source) => Ok(()),
        other => other,
    }
}

/// Children first: the kernel refuses to remove a group that has any.
fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir(dir) {
        Ok(()) => return Ok(()),
        Err(e) if is_gone(&e) => return Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
        Err(e) => return Err(CgroupError::new("remove", dir, e)),
    }
    let mut result = Ok(());
    for entry in fs::read_dir(dir).map_err(|e| CgroupError::new("list", dir, e))? {
        let entry = entry.map_err(|e| CgroupError::new("list", dir, e))?;
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            result = result.and(remove_tree(&entry.path()));
        }
    }
    result?;
    match fs::remove_dir(dir) {
        Err(e) if !is_gone(&e) => Err(CgroupError::new("remove", dir, e)),
        _ => Ok(()),
    }
}
