//! Where programs are attached. Invariant: a hook that has a program keeps having one: a link is updated in place, or
//! its successor is attached before its pin is replaced; nothing is detached first.

use super::{probe, sys, xdp};
use crate::dataplane::DataplaneError;
use sheave_ebpf_abi::call;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Directory of the links below the versioned pin directory.
pub(super) const LINKS: &str = "links";

/// The programs that attach to the cgroup, with their attach type (uapi/linux/bpf.h, `enum bpf_attach_type`).
pub(super) const CGROUP_HOOKS: &[(&str, u32)] = &[
    // Answers before questions: a socket that is translated is always shown the service.
    ("shv_recvmsg4", 19),
    ("shv_recvmsg6", 20),
    ("shv_getpeername4", 29),
    ("shv_getpeername6", 30),
    // Forgetting before remembering: no entry outlives its socket.
    ("shv_release", 34),
    ("shv_sendmsg4", 14),
    ("shv_sendmsg6", 15),
    ("shv_connect4", 10),
    ("shv_connect6", 11),
    ("shv_post_bind4", 12),
    ("shv_post_bind6", 13),
];

/// A program at a network device, with the direction's name in pins and its attach type.
pub(super) type DeviceHook = (&'static str, &'static str, u32);

/// The programs that attach to an uplink.
pub(super) const UPLINK_HOOKS: &[DeviceHook] =
    &[("shv_tc_egress", "egress", 47), ("shv_tc_ingress", "ingress", 46)];

/// The programs that attach to a pod's device.
pub(super) const POD_HOOKS: &[DeviceHook] =
    &[("shv_tc_egress", "egress", 47), ("shv_pod_ingress", "ingress", 46)];

/// The program that attaches to a pod's device where only its answers matter.
pub(super) const ANSWER_HOOKS: &[DeviceHook] = &[("shv_pod_answer", "ingress", 46)];

/// The programs that the device programs continue in, by their place in the map of calls. They are put there in this order:
/// one that finds another's work area in its packet's place calls those that begin, which must be of its own kind then.
pub(super) const CALLS: &[(u32, &str)] = &[
    (call::INGRESS, "shv_tc_ingress"),
    (call::POD_INGRESS, "shv_pod_ingress"),
    (call::ICMP, "shv_tc_icmp"),
    (call::ANSWER, "shv_tc_answer"),
    (call::UNWRAP, "shv_tc_unwrap"),
    (call::OPEN, "shv_tc_open"),
];

/// Whose programs are at a device: policies judge what a pod sends before services translate it, and what it receives
/// after that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Those of the service data plane.
    Services,
    /// Those of the network object.
    Policies,
}

impl Order {
    /// Whether these are the first programs at the hook.
    pub(super) fn is_first(self, direction: &str) -> bool {
        (self == Self::Policies) == (direction == "ingress")
    }
}

/// What a link is attached to.
#[derive(Debug)]
pub(super) enum Target {
    /// A cgroup directory.
    Cgroup(File),
    /// A network device, behind the programs that are there.
    Device(u32),
    /// A network device, before the programs that are there.
    DeviceFirst(u32),
    /// A network device, in XDP of this mode.
    Xdp(u32, xdp::Mode),
}

impl Target {
    pub(super) fn cgroup(path: &Path) -> Result<Self, DataplaneError> {
        File::open(path)
            .map(Self::Cgroup)
            .map_err(|source| DataplaneError::Attach { hook: format!("cgroup {}", path.display()), source })
    }

    /// The number that the kernel gives as a link's target.
    fn id(&self) -> io::Result<u64> {
        match self {
            Self::Cgroup(dir) => dir.metadata().map(|meta| meta.ino()),
            Self::Device(index) | Self::DeviceFirst(index) | Self::Xdp(index, _) => Ok(u64::from(*index)),
        }
    }

    fn create(&self, program: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
        let (number, flags) = match self {
            Self::Cgroup(dir) => (dir.as_raw_fd() as u32, 0),
            Self::Device(index) => (*index, 0),
            Self::DeviceFirst(index) => (*index, FIRST),
            Self::Xdp(index, mode) => (*index, mode.flags()),
        };
        sys::link_create(program, number, attach_type, flags)
    }
}

/// BPF_F_BEFORE (uapi/linux/bpf.h), which without a program to be before of means before all.
const FIRST: u32 = 1 << 3;

/// How a pinned link stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Attached where it should be.
    Attached,
    /// Not pinned.
    Absent,
    /// Severed (its cgroup or device is gone) or attached elsewhere.
    Elsewhere,
}

/// Looks at the link pinned at `path`.
pub(super) fn state(path: &Path, target: &Target) -> Result<State, DataplaneError> {
    Ok(match open(path)? {
        None => State::Absent,
        Some(link) if is_at(&link, target) => State::Attached,
        Some(_) => State::Elsewhere,
    })
}

fn open(path: &Path) -> Result<Option<OwnedFd>, DataplaneError> {
    match sys::obj_get(path) {
        Ok(fd) => Ok(Some(fd)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(DataplaneError::Pin { op: "open", path: path.to_owned(), source }),
    }
}

fn is_at(link: &OwnedFd, target: &Target) -> bool {
    match (sys::link_info(link.as_fd()), target.id()) {
        (Ok(info), Ok(id)) => info.target() == Some(id),
        _ => false,
    }
}

/// Puts `program` at the hook: into the link pinned at `path` or, where that is severed or elsewhere, into a new one.
/// `inherited`: pins of other ABI versions whose link at the same place is taken over.
pub(super) fn attach(
    path: &Path,
    target: &Target,
    attach_type: u32,
    program: BorrowedFd<'_>,
    inherited: &[PathBuf],
) -> Result<(), DataplaneError> {
    let hook = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if let Some(link) = open(path)? {
        if is_at(&link, target) && sys::link_update(link.as_fd(), program).is_ok() {
            return Ok(());
        }
        tracing::warn!(hook, "link is severed or elsewhere, attaching anew");
        let fresh = target.create(program, attach_type).map_err(|e| explain(&hook, e))?;
        return replace_pin(fresh.as_fd(), path);
    }
    for old in inherited {
        let Some(link) = open(old)? else { continue };
        if is_at(&link, target) && sys::link_update(link.as_fd(), program).is_ok() {
            replace_pin(link.as_fd(), path)?;
            return unlink(old);
        }
    }
    let fresh = target.create(program, attach_type).map_err(|e| explain(&hook, e))?;
    replace_pin(fresh.as_fd(), path)
}

fn explain(hook: &str, error: io::Error) -> DataplaneError {
    match CGROUP_HOOKS.iter().find(|(name, _)| *name == hook) {
        Some((name, _)) => probe::explain(name, error),
        None => DataplaneError::Attach { hook: hook.to_owned(), source: error },
    }
}

/// Pins beside the place and moves the pin there: at no moment is the hook held by nothing.
fn replace_pin(link: BorrowedFd<'_>, path: &Path) -> Result<(), DataplaneError> {
    let pin = |op, path: &Path| {
        let path = path.to_owned();
        move |source| DataplaneError::Pin { op, path, source }
    };
    let fresh =
        path.with_file_name(format!("{}_new", path.file_name().unwrap_or_default().to_string_lossy()));
    unlink(&fresh)?;
    sys::obj_pin(link, &fresh).map_err(pin("make", &fresh))?;
    fs::rename(&fresh, path).map_err(pin("replace", path))
}

/// Removes a pin; one that is gone already is fine.
pub(super) fn unlink(path: &Path) -> Result<(), DataplaneError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(DataplaneError::Pin { op: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Severs and removes every link pinned in `dir`, going on past errors, which are returned.
pub(super) fn detach_all(dir: &Path) -> Vec<DataplaneError> {
    let mut errors = Vec::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return errors,
        Err(source) => return vec![DataplaneError::Pin { op: "list", path: dir.to_owned(), source }],
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if let Ok(link) = sys::obj_get(&path)
            && let Err(e) = sys::link_detach(link.as_fd())
            && e.raw_os_error() != Some(libc::ENOLINK)
        {
            // A pin that is no link (the mark of a clsact filter) has nothing to sever, and a link that can't be is
            // gone with its last pin.
            tracing::debug!(path = %path.display(), error = %e, "not severed");
        }
        errors.extend(unlink(&path).err());
    }
    errors
}

/// The pins of `hook` in other versions' directories beside `dir`.
pub(super) fn inherited(dir: &Path, hook: &str) -> Vec<PathBuf> {
    other_versions(dir)
        .into_iter()
        .map(|other| other.join(LINKS).join(hook))
        .filter(|path| path.exists())
        .collect()
}

/// Directories of other ABI versions beside `dir`.
pub(super) fn other_versions(dir: &Path) -> Vec<PathBuf> {
    let Some(parent) = dir.parent() else { return Vec::new() };
    let entries = fs::read_dir(parent).into_iter().flatten().flatten().map(|entry| entry.path());
    entries
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            path != dir && name.strip_prefix('v').is_some_and(|n| n.parse::<u32>().is_ok())
        })
        .collect()
}
