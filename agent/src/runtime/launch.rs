//! The agent's side of a pod's beginning and end: making its run directory, starting its shim, finding out
//! whether that lives, clearing everything away. All of it blocks; the handle runs it on its own threads.
//! Invariant: a pod's run directory is made first and removed last, so whatever a killed agent leaves
//! behind is found by listing run directories.

use std::fs;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::cgroup::{self, CgroupError};
use super::error::{Result, RuntimeError};
use super::layout::Layout;
use super::protocol::{Boot, Fault, FaultKind, Ready, VERSION, names};
use super::record::{ContainerRecord, Exit};
use super::spec::{Qos, Resources, SandboxSpec};
use super::sys;
use crate::limits::{POD_KILL_TIMEOUT_MS, SANDBOX_START_TIMEOUT_MS};

/// Context for a failed file operation.
pub(super) fn io_error(op: &'static str, path: &Path, source: io::Error) -> RuntimeError {
    RuntimeError::Io { op, path: path.to_owned(), source }
}

/// What a shim's refusal means to the caller.
pub(super) fn fault_error(uid: &str, fault: Fault) -> RuntimeError {
    let uid = uid.to_owned();
    let Fault { kind, stage, message, errno } = fault;
    match kind {
        FaultKind::NotRunning => RuntimeError::NotRunning { uid, container: message },
        FaultKind::Exists => RuntimeError::Exists { uid, what: message },
        FaultKind::Invalid => RuntimeError::Invalid { uid, what: format!("{stage}: {message}") },
        FaultKind::Failed => RuntimeError::Start { uid, stage, message, errno },
    }
}

fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file =
            fs::OpenOptions::new().create(true).truncate(true).write(true).mode(mode).open(path)?;
        file.write_all(bytes)
    };
    write().map_err(|e| io_error("write", path, e))
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(|e| io_error("make", path, e))
}

/// Makes a sandbox; the pid of the process that holds its namespaces. What a failure leaves is cleared.
pub(super) fn start_sandbox(layout: &Layout, spec: &SandboxSpec) -> Result<i32> {
    let dir = layout.pod(&spec.uid);
    make_dir(&layout.pods(), 0o700)?;
    match fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            return Err(RuntimeError::Exists { uid: spec.uid.clone(), what: "the sandbox".to_owned() });
        }
        other => other.map_err(|e| io_error("make", &dir, e))?,
    }
    let started = prepare(layout, spec, &dir).and_then(|()| spawn(layout, &spec.uid, &dir));
    if started.is_err()
        && let Err(error) = clear(layout, &spec.uid)
    {
        tracing::warn!(pod = spec.uid, %error, "clearing a sandbox that did not start");
    }
    started
}

fn prepare(layout: &Layout, spec: &SandboxSpec, dir: &Path) -> Result<()> {
    for name in [names::ETC, names::SHM, names::ROOTFS, names::CONTAINERS] {
        make_dir(&dir.join(name), 0o755)?;
    }
    let etc = dir.join(names::ETC);
    write_new(&etc.join("hostname"), 0o644, hostname_file(spec).as_bytes())?;
    write_new(&etc.join("resolv.conf"), 0o644, &resolv_conf(spec)?)?;
    write_new(&etc.join("hosts"), 0o644, &hosts_file(spec, &[])?)?;
    let boot = Boot {
        version: VERSION,
        spec: spec.clone(),
        hierarchies: layout.hierarchies.clone(),
        rootfs_dir: layout.pod_layers(&spec.uid),
        log_dir: layout.pod_logs(&spec.namespace, &spec.name, &spec.uid),
    };
    let path = dir.join(names::BOOT);
    let bytes = serde_json::to_vec(&boot).map_err(|e| io_error("write", &path, e.into()))?;
    write_new(&path, 0o600, &bytes)
}

fn hostname_file(spec: &SandboxSpec) -> String {
    if spec.host_network {
        nix::unistd::gethostname().map_or_else(|_| "\n".to_owned(), |n| format!("{}\n", n.to_string_lossy()))
    } else {
        format!("{}\n", spec.hostname)
    }
}

fn resolv_conf(spec: &SandboxSpec) -> Result<Vec<u8>> {
    let dns = &spec.dns;
    if dns.nameservers.is_empty() && dns.searches.is_empty() && dns.options.is_empty() {
        return read_or_empty(Path::new("/etc/resolv.conf"));
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.nameservers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    Ok(text.into_bytes())
}

fn hosts_file(spec: &SandboxSpec, ips: &[IpAddr]) -> Result<Vec<u8>> {
    let mut text = if spec.host_network {
        String::from_utf8_lossy(&read_or_empty(Path::new("/etc/hosts"))?).into_owned()
    } else {
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n"
            .to_owned()
    };
    for ip in ips.iter().filter(|_| !spec.host_network) {
        text += &format!("{ip}\t{}\n", spec.hostname);
    }
    for (ip, names) in &spec.host_aliases {
        text += &format!("{ip}\t{}\n", names.join("\t"));
    }
    Ok(text.into_bytes())
}

fn read_or_empty(path: &Path) -> Result<Vec<u8>> {
    match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|e| io_error("read", path, e)),
    }
}

/// Rewrites a pod's `/etc/hosts` in place: containers have the file itself mounted.
pub(super) fn write_hosts(layout: &Layout, spec: &SandboxSpec, ips: &[IpAddr]) -> Result<()> {
    write_new(&layout.pod(&spec.uid).join(names::ETC).join("hosts"), 0o644, &hosts_file(spec, ips)?)
}

/// Starts the shim and waits for its one line. The started program becomes an orphan at once, so there is
/// nothing of it to wait for later.
fn spawn(layout: &Layout, uid: &str, dir: &Path) -> Result<i32> {
    let log = dir.join(names::LOG);
    let errors = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log)
        .map_err(|e| io_error("open", &log, e))?;
    let exe = &layout.shim.path;
    let mut child = Command::new(exe)
        .arg0("sheave")
        .arg("shim")
        .arg(dir)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .map_err(|e| io_error("run", exe, e))?;
    let line = child.stdout.take().map_or(Ok(None), read_line);
    child.wait().map_err(|e| io_error("wait for", exe, e))?;
    let start = |message: String| RuntimeError::Start {
        uid: uid.to_owned(),
        stage: "shim".to_owned(),
        message,
        errno: 0,
    };
    match line.map_err(|e| io_error("read from", exe, e))? {
        None => Err(RuntimeError::Timeout {
            uid: uid.to_owned(),
            op: "starting the shim",
            timeout_ms: SANDBOX_START_TIMEOUT_MS,
        }),
        Some(line) => match serde_json::from_str(&line) {
            Ok(Ready::Up { init_pid }) => Ok(init_pid),
            Ok(Ready::Failed(fault)) => Err(fault_error(uid, fault)),
            Err(_) => Err(start(format!("died while starting: {}", tail(&log)))),
        },
    }
}

/// Reads to the end; `None` if that did not come in time.
fn read_line(mut pipe: std::process::ChildStdout) -> io::Result<Option<String>> {
    let deadline = Instant::now() + Duration::from_millis(SANDBOX_START_TIMEOUT_MS);
    let mut text = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        }
        let mut buffer = [0u8; 4096];
        match pipe.read(&mut buffer)? {
            0 => return Ok(Some(String::from_utf8_lossy(&text).into_owned())),
            n => text.extend_from_slice(&buffer[..n]),
        }
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let last = text.lines().rev().take(3).collect::<Vec<_>>();
    last.into_iter().rev().collect::<Vec<_>>().join("; ")
}

/// The living shim of a pod, if it has one.
pub(super) fn shim_pid(layout: &Layout, uid: &str) -> Result<Option<i32>> {
    let path = layout.pod(uid).join(names::LOCK);
    let file = match fs::OpenOptions::new().write(true).open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| io_error("open", &path, e))?,
    };
    let mut lock = whole_file_lock();
    fcntl(&file, FcntlArg::F_GETLK(&mut lock))
        .map_err(|e| io_error("ask for the lock of", &path, e.into()))?;
    Ok((i32::from(lock.l_type) != libc::F_UNLCK).then_some(lock.l_pid))
}

fn whole_file_lock() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Ends a pod's shim for good: kills a living one, and takes the lock so that a starting one gives up.
/// The lock is held until the returned file is dropped.
fn end_shim(layout: &Layout, uid: &str, dir: &Path) -> Result<Option<fs::File>> {
    let path = dir.join(names::LOCK);
    let open = fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = match open {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| io_error("open", &path, e))?,
    };
    let deadline = Instant::now() + Duration::from_millis(POD_KILL_TIMEOUT_MS);
    loop {
        match fcntl(&file, FcntlArg::F_SETLK(&whole_file_lock())) {
            Ok(_) => return Ok(Some(file)),
            Err(Errno::EACCES | Errno::EAGAIN) => {}
            Err(e) => return Err(io_error("lock", &path, e.into())),
        }
        let mut lock = whole_file_lock();
        fcntl(&file, FcntlArg::F_GETLK(&mut lock)).map_err(|e| io_error("lock", &path, e.into()))?;
        if i32::from(lock.l_type) == libc::F_UNLCK {
            continue;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(RuntimeError::Timeout {
                uid: uid.to_owned(),
                op: "killing the shim",
                timeout_ms: POD_KILL_TIMEOUT_MS,
            });
        }
        kill_and_wait(layout, uid, lock.l_pid, left)?;
    }
}

/// The pid is that of the lock's owner while the descriptor is opened only if it still owns it afterwards.
fn kill_and_wait(layout: &Layout, uid: &str, pid: i32, timeout: Duration) -> Result<()> {
    let gone = |e: &io::Error| e.raw_os_error() == Some(libc::ESRCH);
    let process = match sys::pidfd_open(pid) {
        Err(e) if gone(&e) => return Ok(()),
        other => other.map_err(|e| io_error("open the shim of", &layout.pod(uid), e))?,
    };
    if shim_pid(layout, uid)? != Some(pid) {
        return Ok(());
    }
    match sys::pidfd_signal(&process, libc::SIGKILL) {
        Err(e) if !gone(&e) => return Err(io_error("kill the shim of", &layout.pod(uid), e)),
        _ => {}
    }
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(e) => Err(io_error("wait for the shim of", &layout.pod(uid), e.into())),
    }
}

fn group_error(uid: &str, error: CgroupError) -> RuntimeError {
    let errno = error.source.raw_os_error().unwrap_or(0);
    let message = error.source.to_string();
    RuntimeError::Start { uid: uid.to_owned(), stage: format!("cgroup: {error}"), message, errno }
}

/// Kills every process of a pod and waits for their end.
pub(super) fn kill_processes(layout: &Layout, uid: &str) -> Result<()> {
    let hierarchies = &layout.hierarchies;
    let mut result = Ok(());
    for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
        let group = cgroup::pod_path(qos, uid);
        let timeout = Duration::from_millis(POD_KILL_TIMEOUT_MS);
        let ended = hierarchies.kill(&group).and_then(|()| hierarchies.wait_empty(&group, timeout));
        result = result.and(match ended {
            Ok(true) => Ok(()),
            Ok(false) => Err(RuntimeError::Timeout {
                uid: uid.to_owned(),
                op: "killing the pod",
                timeout_ms: POD_KILL_TIMEOUT_MS,
            }),
            Err(error) => Err(group_error(uid, error)),
        });
    }
    result
}

/// Weighs the class of burstable pods by what they request together.
pub(super) fn weigh_burstable(layout: &Layout, request_milli: u64) -> Result<()> {
    let group = cgroup::qos_path(Qos::Burstable);
    let resources = Resources { cpu_request_milli: Some(request_milli), ..Resources::default() };
    let limits = cgroup::Limits { resources, ..cgroup::Limits::default() };
    match layout.hierarchies.apply(&group, &limits) {
        // There was no such pod yet.
        Err(e) if e.source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|e| RuntimeError::Node { what: format!("{e}: {}", e.source) }),
    }
}

/// Removes everything of a pod but its logs: processes, groups, writable layers, run directory. Needs
/// nothing of it to be intact, goes on past errors and returns the first.
pub(super) fn clear(layout: &Layout, uid: &str) -> Result<()> {
    let dir = layout.pod(uid);
    let lock = end_shim(layout, uid, &dir);
    let (lock, mut result) = match lock {
        Ok(lock) => (lock, Ok(())),
        Err(error) => (None, Err(error)),
    };
    result = result.and(kill_processes(layout, uid));
    let hierarchies = &layout.hierarchies;
    for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
        let removed = hierarchies.remove(&cgroup::pod_path(qos, uid));
        result = result.and(removed.map_err(|e| group_error(uid, e)));
    }
    // A process gives its locks up some time before it leaves its group.
    let shim = cgroup::shim_path(uid);
    let timeout = Duration::from_millis(POD_KILL_TIMEOUT_MS);
    let removed = hierarchies.wait_empty(&shim, timeout).and_then(|_| hierarchies.remove(&shim));
    result = result.and(removed.map_err(|e| group_error(uid, e)));
    result = result.and(remove_all(&layout.pod_layers(uid)));
    if result.is_ok() {
        result = remove_all(&dir);
    }
    drop(lock);
    result
}

pub(super) fn remove_all(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path, e)),
        _ => Ok(()),
    }
}

/// Removes the writable layers of a container's runs other than `attempt`.
pub(super) fn remove_earlier_layers(layout: &Layout, uid: &str, name: &str, attempt: u32) -> Result<()> {
    let dir = layout.pod_layers(uid);
    for entry in fs::read_dir(&dir).map_err(|e| io_error("list", &dir, e))? {
        let entry = entry.map_err(|e| io_error("list", &dir, e))?;
        let file = entry.file_name();
        let run = file.to_str().and_then(|f| f.strip_prefix(name)).and_then(|f| f.strip_prefix('-'));
        if run.and_then(|n| n.parse::<u32>().ok()).is_some_and(|n| n < attempt) {
            remove_all(&entry.path())?;
        }
    }
    Ok(())
}

/// What a pod without shim left: its specification and its containers. Runs that had not ended when it
/// died get an exit that says so. `None` if it had never been up.
pub(super) fn autopsy(layout: &Layout, uid: &str) -> Result<Option<(SandboxSpec, Vec<ContainerRecord>)>> {
    let dir = layout.pod(uid);
    if !dir.join(names::SOCKET).exists() {
        return Ok(None);
    }
    let Some(boot) = read_json::<Boot>(&dir.join(names::BOOT)) else { return Ok(None) };
    let mut latest: Vec<ContainerRecord> = Vec::new();
    for run in
        list(&dir.join(names::CONTAINERS))?.iter().map(|d| list(d)).collect::<Result<Vec<_>>>()?.concat()
    {
        let Some(mut record) = read_json::<ContainerRecord>(&run.join(names::RECORD)) else { continue };
        let path = run.join(names::EXIT);
        record.exit = Some(read_json(&path).unwrap_or_else(lost));
        record.pid = 0;
        match latest.iter_mut().find(|r| r.name == record.name) {
            Some(other) if other.attempt < record.attempt => *other = record,
            Some(_) => {}
            None => latest.push(record),
        }
    }
    latest.sort_by_key(|r| r.created);
    Ok(Some((boot.spec, latest)))
}

/// The end of a container whose status nobody could collect.
pub(super) fn lost() -> Exit {
    Exit {
        code: 137,
        signal: Some(libc::SIGKILL),
        oom_killed: false,
        lost: true,
        finished_at: jiff::Timestamp::now(),
        message: String::new(),
    }
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| io_error("list", dir, e))?,
    };
    entries.map(|e| e.map(|e| e.path()).map_err(|e| io_error("list", dir, e))).collect()
}

/// Names of the entries of a directory; none if it is missing.
pub(super) fn list_names(dir: &Path) -> Result<Vec<String>> {
    let name = |path: &PathBuf| path.file_name().and_then(|n| n.to_str()).map(str::to_owned);
    Ok(list(dir)?.iter().filter_map(name).collect())
}

/// A file that is missing or half-written (by a killed process) counts as not there.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::spec::Dns;

    #[test]
    fn resolver_settings_become_a_file() {
        let dns = Dns {
            nameservers: vec!["10.96.0.10".parse().unwrap()],
            searches: vec!["default.svc.cluster.local".into(), "svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        };
        let text = resolv_conf(&SandboxSpec { dns, ..SandboxSpec::default() }).unwrap();
        let expected =
            "search default.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n";
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }

    #[test]
    fn hosts_name_the_pod_and_its_aliases() {
        let spec = SandboxSpec {
            hostname: "web-0".into(),
            host_aliases: vec![("10.1.2.3".parse().unwrap(), vec!["db".into(), "db.local".into()])],
            ..SandboxSpec::default()
        };
        let ips = ["10.244.0.9".parse().unwrap(), "fd00:244::9".parse().unwrap()];
        let text = String::from_utf8(hosts_file(&spec, &ips).unwrap()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "127.0.0.1\tlocalhost");
        assert_eq!(
            lines[lines.len() - 3..],
            ["10.244.0.9\tweb-0", "fd00:244::9\tweb-0", "10.1.2.3\tdb\tdb.local"]
        );
    }
}
