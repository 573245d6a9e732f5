//! A pod's namespaces and the process that holds them. Invariant: the holder is a fork of the shim that
//! has given up every capability and descriptor; it only reaps, which matters where the pod shares a
//! process namespace and it is process 1.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::pipe2;

use super::super::cgroup::{self, Limits};
use super::super::protocol::{Boot, Fault, Stage, names};
use super::super::spec::{Qos, Resources, SandboxSpec};
use super::super::sys::{self, Clone};
use crate::limits::POD_SHM_BYTES;

type Result<T> = std::result::Result<T, Fault>;

/// The process that holds a pod's namespaces.
#[derive(Debug)]
pub(super) struct Holder {
    pub(super) pid: i32,
    pub(super) process: OwnedFd,
}

/// Where a pod's own processes are counted.
pub(super) fn pod_group(spec: &SandboxSpec) -> PathBuf {
    cgroup::pod_path(spec.qos, &spec.uid)
}

/// Gives the shim a mount namespace in which the pod's `/dev/shm` is mounted and that follows the node's,
/// but never leads back.
pub(super) fn private_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).stage("new mount namespace")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
        .stage("detach from the node's mounts")?;
    let options = format!("mode=1777,size={POD_SHM_BYTES}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("shm"), names::SHM, Some("tmpfs"), flags, Some(options.as_str())).stage("mount /dev/shm")
}

/// Makes the pod's groups, those of its QoS class first.
pub(super) fn make_groups(boot: &Boot) -> Result<()> {
    let spec = &boot.spec;
    let mut class = Limits::default();
    if spec.qos == Qos::BestEffort {
        class.resources.cpu_request_milli = Some(0);
    }
    let group = |path: &Path, limits: &Limits| {
        boot.hierarchies.create(path, limits).map_err(|e| {
            let fault = Fault::io(format!("cgroup: {e}"), &e.source);
            Fault { message: e.source.to_string(), ..fault }
        })
    };
    if spec.qos != Qos::Guaranteed {
        group(&cgroup::qos_path(spec.qos), &class)?;
    }
    let pod = Limits { resources: spec.resources, ..Limits::default() };
    group(&pod_group(spec), &pod)?;
    let own = Limits { resources: Resources::default(), ..Limits::default() };
    group(&pod_group(spec).join("sandbox"), &own)
}

impl Holder {
    /// Starts the holder in new namespaces and waits until they are set up.
    pub(super) fn start(boot: &Boot) -> Result<Holder> {
        let spec = &boot.spec;
        let mut flags = libc::CLONE_NEWIPC;
        if !spec.host_network {
            flags |= libc::CLONE_NEWNET | libc::CLONE_NEWUTS;
        }
        if spec.share_process_namespace {
            flags |= libc::CLONE_NEWPID;
        }
        let group = pod_group(spec).join("sandbox");
        let dir = fs::File::open(boot.hierarchies.unified_dir(&group)).stage("cgroup")?;
        let joins = boot.hierarchies.legacy_joins(&group);
        let (mut reader, writer) = {
            let (r, w) = pipe2(OFlag::O_CLOEXEC).stage("pipe")?;
            (fs::File::from(r), fs::File::from(w))
        };
        match sys::clone_process(flags, dir.as_fd()).stage("new namespaces")? {
            Clone::Child => hold(spec, &joins, writer),
            Clone::Parent(pid) => {
                drop(writer);
                let process = sys::pidfd_open(pid).stage("open the holder")?;
                let mut report = String::new();
                reader.read_to_string(&mut report).stage("read from the holder")?;
                match report.as_str() {
                    "ok" => Ok(Holder { pid, process }),
                    "" => Err(Fault::failed("sandbox", "the process that holds the namespaces died")),
                    other => Err(serde_json::from_str(other)
                        .unwrap_or_else(|_| Fault::failed("sandbox", other.to_owned()))),
                }
            }
        }
    }
}

/// The life of the holder.
fn hold(spec: &SandboxSpec, joins: &[PathBuf], mut report: fs::File) -> ! {
    let set_up = || -> Result<()> {
        sys::set_name(c"sheave-pause").stage("name")?;
        super::enter::join_groups(joins)?;
        if !spec.host_network {
            sys::loopback_up().stage("lo")?;
            nix::unistd::sethostname(&spec.hostname).stage("host name")?;
        }
        sysctls(spec)?;
        nix::unistd::chdir("/").stage("chdir")?;
        for capability in 0..64 {
            if sys::drop_bounding(capability).is_err() {
                break;
            }
        }
        sys::set_capabilities(0).stage("capabilities")
    };
    let outcome = match set_up() {
        Ok(()) => report.write_all(b"ok"),
        Err(fault) => report.write_all(serde_json::to_string(&fault).unwrap_or_default().as_bytes()),
    };
    if outcome.is_err() {
        sys::exit_now(1);
    }
    drop(report);
    // Everything inherited goes, the shim's lock file and the agent's pipe among it.
    if sys::close_from(0).is_err() {
        sys::exit_now(1);
    }
    let all = SigSet::all();
    if all.thread_set_mask().is_err() {
        sys::exit_now(1);
    }
    loop {
        match all.wait() {
            Ok(Signal::SIGCHLD) => reap(),
            Ok(Signal::SIGTERM) => sys::exit_now(0),
            Ok(_) | Err(_) => {}
        }
    }
}

fn reap() {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
            Ok(_) | Err(_) => {}
        }
    }
}

/// Ports below 1024 are open to all of the pod, as containers without capabilities expect; then what the
/// pod asks for.
fn sysctls(spec: &SandboxSpec) -> Result<()> {
    let mut all: BTreeMap<&str, &str> = BTreeMap::new();
    if !spec.host_network {
        all.insert("net.ipv4.ip_unprivileged_port_start", "0");
    }
    all.extend(spec.sysctls.iter().map(|(k, v)| (k.as_str(), v.as_str())));
    for (name, value) in all {
        let file = Path::new("/proc/sys").join(name.replace('.', "/"));
        fs::write(&file, value).stage_with(|| format!("sysctl {name}"))?;
    }
    Ok(())
}
