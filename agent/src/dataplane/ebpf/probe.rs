//! What the host must have. Invariant: a host that lacks something is told which thing, before anything is changed.

use super::sys;
use crate::dataplane::DataplaneError;
use aya::maps::MapType;
use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Checks what the network object needs: neither cgroups nor what their programs call.
pub(super) fn for_network(pin_dir: &Path) -> Result<(), DataplaneError> {
    check_build()?;
    check_program(ProgramType::SchedClassifier, TRAFFIC_CONTROL)?;
    ensure_bpffs(pin_dir)
}

fn check_build() -> Result<(), DataplaneError> {
    if !sheave_ebpf_object::AVAILABLE {
        return Err(DataplaneError::Missing {
            what: "the eBPF programs in this build",
            hint: sheave_ebpf_object::WHY_NOT.to_owned(),
        });
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(DataplaneError::Missing {
            what: "root",
            hint: "loading eBPF programs needs it".to_owned(),
        });
    }
    Ok(())
}

const TRAFFIC_CONTROL: &str = "eBPF for traffic control in the kernel (CONFIG_NET_CLS_BPF)";

fn check_program(kind: ProgramType, what: &'static str) -> Result<(), DataplaneError> {
    match is_program_supported(kind) {
        Ok(true) => Ok(()),
        Ok(false) => Err(DataplaneError::Missing { what, hint: format!("{kind:?} is refused") }),
        Err(e) => Err(DataplaneError::Missing { what, hint: in_full(&e) }),
    }
}

/// Checks everything that can be checked without loading a program.
pub(super) fn check(pin_dir: &Path, cgroup: &Path) -> Result<(), DataplaneError> {
    check_build()?;
    match statfs(cgroup) {
        Ok(found) if found.filesystem_type() == CGROUP2_SUPER_MAGIC => {}
        Ok(_) => {
            return Err(DataplaneError::Missing {
                what: "a cgroup of the v2 hierarchy to attach to",
                hint: format!("{} is not on a cgroup2 mount", cgroup.display()),
            });
        }
        Err(e) => {
            return Err(DataplaneError::Missing {
                what: "the cgroup to attach to",
                hint: format!("{}: {e}", cgroup.display()),
            });
        }
    }
    sys::netns_cookie().map_err(|e| DataplaneError::Missing {
        what: "network namespace cookies (Linux 5.14)",
        hint: e.to_string(),
    })?;
    check_features()?;
    ensure_bpffs(pin_dir)
}

/// Asks the kernel for each kind of program, map and helper that the object needs and older or smaller kernels lack.
fn check_features() -> Result<(), DataplaneError> {
    check_program(ProgramType::CgroupSockAddr, "eBPF on cgroups in the kernel (CONFIG_CGROUP_BPF)")?;
    check_program(ProgramType::SchedClassifier, TRAFFIC_CONTROL)?;
    let sk_storage = "socket storage maps in the kernel (Linux 5.2)";
    match is_map_supported(MapType::SkStorage) {
        Ok(true) => {}
        Ok(false) => {
            return Err(DataplaneError::Missing {
                what: sk_storage,
                hint: "the map type is refused".to_owned(),
            });
        }
        Err(e) => return Err(DataplaneError::Missing { what: sk_storage, hint: in_full(&e) }),
    }
    // Without it a refused call fails with EPERM instead of ECONNREFUSED, and the verifier refuses the programs.
    let set_retval = "the helper bpf_set_retval for cgroup programs (Linux 5.18)";
    match is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval) {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err(DataplaneError::Missing { what: set_retval, hint: "the helper is unknown".to_owned() })
        }
        Err(e) => Err(DataplaneError::Missing { what: set_retval, hint: in_full(&e) }),
    }
}

/// An error with its causes.
fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(at) = cause {
        text = format!("{text}: {at}");
        cause = at.source();
    }
    text
}

/// Where the v2 hierarchy is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside v1 controllers.
pub fn cgroup2_root() -> Result<PathBuf, DataplaneError> {
    let text = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|source| DataplaneError::Host { op: "read /proc/self/mountinfo", source })?;
    let found = text.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut fields = left.split(' ');
        let (root, point) = (fields.nth(3)?, fields.next()?);
        (right.starts_with("cgroup2 ") && root == "/").then(|| PathBuf::from(point))
    });
    found.ok_or_else(|| DataplaneError::Missing {
        what: "a mounted cgroup2 hierarchy",
        hint: "mount -t cgroup2 none /sys/fs/cgroup/unified".to_owned(),
    })
}

fn on_bpffs(path: &Path) -> bool {
    // The nearest part of the path that exists says where the rest would be made.
    let there = path.ancestors().find(|part| part.exists());
    there.and_then(|part| statfs(part).ok()).is_some_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// Makes sure that `pin_dir` is on a bpffs, mounting one where the system did not: at `/sys/fs/bpf` for paths below
/// it, else at `pin_dir` itself. The mount outlives the agent, as pins must.
fn ensure_bpffs(pin_dir: &Path) -> Result<(), DataplaneError> {
    const SYSTEM: &str = "/sys/fs/bpf";
    if !on_bpffs(pin_dir) {
        let point = if pin_dir.starts_with(SYSTEM) { Path::new(SYSTEM) } else { pin_dir };
        if point == pin_dir {
            fs::create_dir_all(point).map_err(|source| DataplaneError::Pin {
                op: "make",
                path: point.to_owned(),
                source,
            })?;
        }
        mount(Some("bpf"), point, Some("bpf"), MsFlags::empty(), Some("mode=0700")).map_err(|e| {
            DataplaneError::Missing {
                what: "a bpffs for the pins",
                hint: format!(
                    "{} is on none, and mounting one at {} failed: {e}",
                    pin_dir.display(),
                    point.display()
                ),
            }
        })?;
        tracing::info!(at = %point.display(), "mounted a bpffs");
    }
    fs::create_dir_all(pin_dir).map_err(|source| DataplaneError::Pin {
        op: "make",
        path: pin_dir.to_owned(),
        source,
    })
}

/// Turns the errors by which a kernel says "not built in" into the name of what is missing.
pub(super) fn explain(what: &'static str, error: io::Error) -> DataplaneError {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => DataplaneError::Missing {
            what: "bpf(2) in the kernel (CONFIG_BPF_SYSCALL)",
            hint: error.to_string(),
        },
        Some(libc::EINVAL) => DataplaneError::Missing {
            what: "eBPF on cgroups in the kernel (CONFIG_CGROUP_BPF, links since 5.7)",
            hint: format!("{what}: {error}"),
        },
        Some(libc::EPERM) => DataplaneError::Missing {
            what: "the right to use bpf(2) (CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN)",
            hint: format!("{what}: {error}"),
        },
        _ => DataplaneError::Attach { hook: what.to_owned(), source: error },
    }
}
