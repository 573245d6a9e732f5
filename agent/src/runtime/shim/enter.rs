//! The last steps of a new process of a container: from the shim's rights to the container's, then the
//! program. Runs in a process of its own. Invariant: after `exec` nothing of the shim is left in it: no
//! descriptor beyond the three standard ones, no signal mask, no capability outside the container's set;
//! and a step that fails ends the process with a report, never with fewer restrictions.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::signal::SigSet;
use nix::unistd::{Gid, Uid};

use super::super::plan::{self, Identity};
use super::super::protocol::{Fault, Stage};
use super::super::seccomp::Programs;
use super::super::spec::ContainerSpec;
use super::super::sys;

type Result<T> = std::result::Result<T, Fault>;

/// Accounts files of an image are read up to this size.
const ACCOUNTS_BYTES_MAX: u64 = 1024 * 1024;

/// Everything that makes a process one of its container.
pub(super) struct Program<'a> {
    pub(super) spec: &'a ContainerSpec,
    /// Program and arguments.
    pub(super) argv: &'a [String],
    pub(super) hostname: &'a str,
    /// Capabilities, as a bit set.
    pub(super) capabilities: u64,
    /// `None` leaves the process unfiltered.
    pub(super) filter: Option<&'a Programs>,
    /// Make the working directory if it is missing.
    pub(super) make_working_dir: bool,
}

/// Joins the v1 hierarchies.
pub(super) fn join_groups(files: &[PathBuf]) -> Result<()> {
    files
        .iter()
        .try_for_each(|file| std::fs::write(file, "0").stage_with(|| format!("join {}", file.display())))
}

/// Undoes what a process inherits from the shim: session, signal mask, ignored signals, umask, standard
/// streams.
pub(super) fn leave_shim(output: BorrowedFd<'_>, errors: BorrowedFd<'_>) -> Result<()> {
    nix::unistd::setsid().stage("setsid")?;
    let null = File::open("/dev/null").stage("open /dev/null")?;
    nix::unistd::dup2_stdin(&null).stage("standard input")?;
    nix::unistd::dup2_stdout(output).stage("standard output")?;
    nix::unistd::dup2_stderr(errors).stage("standard error")?;
    sys::reset_signals().stage("reset signals")?;
    SigSet::empty().thread_set_mask().stage("reset the signal mask")?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    Ok(())
}

/// Writes `oom_score_adj`. Lowering it takes CAP_SYS_RESOURCE, which a nested node lacks: then the
/// inherited value stays and the caller is told.
pub(super) fn adjust_oom_score(value: i32) -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", value.clamp(-1000, 1000).to_string())
}

impl Program<'_> {
    /// Becomes the program; returns only why it could not. The process is already inside the container's
    /// namespaces and root.
    pub(super) fn run(&self) -> Fault {
        match self.try_run() {
            Err(fault) => fault,
            Ok(never) => match never {},
        }
    }

    fn try_run(&self) -> Result<std::convert::Infallible> {
        let who = self.identity()?;
        self.enter_working_dir()?;
        let (argv, env) = self.strings(&who.home)?;
        give_streams(&who)?;
        let no_new_privs = !self.spec.allow_privilege_escalation && !self.spec.privileged;
        if !no_new_privs {
            // Without no_new_privs a filter takes CAP_SYS_ADMIN, which is about to go.
            self.install_filter()?;
        }
        self.drop_rights(&who)?;
        if no_new_privs {
            sys::set_no_new_privs().stage("no_new_privs")?;
            self.install_filter()?;
        }
        sys::close_on_exec_from(3).stage("close_range")?;
        let path = env.iter().find_map(|v| v.as_bytes().strip_prefix(b"PATH="));
        let path = String::from_utf8_lossy(path.unwrap_or_default()).into_owned();
        Err(execute(&argv, &env, &path))
    }

    fn identity(&self) -> Result<Identity> {
        let read = |path| read_inside(path).stage_with(|| format!("read {path} of the image"));
        plan::identity(self.spec, &read("/etc/passwd")?, &read("/etc/group")?)
            .map_err(|what| Fault::failed("user", what))
    }

    fn enter_working_dir(&self) -> Result<()> {
        let dir = plan::working_dir(self.spec);
        if self.make_working_dir {
            match super::rootfs::make_working_dir(dir) {
                // What exists on a read-only root is as good; chdir tells.
                Ok(_) | Err(Errno::EROFS) => {}
                Err(e) => return Err(e).stage_with(|| format!("working directory {dir}")),
            }
        }
        nix::unistd::chdir(dir).stage_with(|| format!("working directory {dir}"))?;
        let here = nix::unistd::getcwd().stage_with(|| format!("working directory {dir}"))?;
        if here.is_absolute() {
            Ok(())
        } else {
            Err(Fault::failed(format!("working directory {dir}"), "is outside of the container"))
        }
    }

    fn strings(&self, home: &str) -> Result<(Vec<CString>, Vec<CString>)> {
        let c = |s: String| {
            CString::new(s).map_err(|_| Fault::failed("command", "an argument or variable contains NUL"))
        };
        let argv = self.argv.iter().cloned().map(c).collect::<Result<Vec<_>>>()?;
        if argv.is_empty() {
            return Err(Fault::failed("command", "neither the pod nor the image names a command"));
        }
        let env = plan::environment(self.spec, self.hostname, home);
        let env = env.into_iter().map(|(n, v)| c(format!("{n}={v}"))).collect::<Result<_>>()?;
        Ok((argv, env))
    }

    fn install_filter(&self) -> Result<()> {
        let Some(filter) = self.filter else { return Ok(()) };
        sys::add_seccomp_filter(&filter.allow).stage("seccomp")?;
        sys::add_seccomp_filter(&filter.guard).stage("seccomp")
    }

    fn drop_rights(&self, who: &Identity) -> Result<()> {
        let last: u32 = 63;
        for capability in (0..=last).filter(|c| self.capabilities & (1 << c) == 0) {
            match sys::drop_bounding(capability) {
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break, // beyond the kernel's last
                other => other.stage("bounding capabilities")?,
            }
        }
        sys::keep_capabilities().stage("keep capabilities")?;
        let groups: Vec<Gid> = who.groups.iter().copied().map(Gid::from_raw).collect();
        let (uid, gid) = (Uid::from_raw(who.uid), Gid::from_raw(who.gid));
        nix::unistd::setgroups(&groups).stage("setgroups")?;
        nix::unistd::setresgid(gid, gid, gid).stage("setgid")?;
        nix::unistd::setresuid(uid, uid, uid).stage("setuid")?;
        sys::clear_ambient().stage("ambient capabilities")?;
        // A node inside a container lacks some itself; what it lacks nobody below can have.
        let possible = sys::permitted_capabilities().stage("capabilities")?;
        sys::set_capabilities(self.capabilities & possible).stage("capabilities")
    }
}

/// A program that is not root may reopen `/dev/stdout`.
fn give_streams(who: &Identity) -> Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(who.uid)), Some(Gid::from_raw(who.gid)));
    nix::unistd::fchown(io::stdout(), uid, gid).stage("owner of standard output")?;
    nix::unistd::fchown(io::stderr(), uid, gid).stage("owner of standard error")?;
    Ok(())
}

/// A small regular file below the root of this process; empty if it is missing.
fn read_inside(path: &str) -> io::Result<String> {
    let root = File::open("/")?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file: OwnedFd = match openat2(&root, path, how) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(String::new()),
        other => other?,
    };
    let file = File::from(file);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(ACCOUNTS_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Looks the program up as a shell does and executes it.
fn execute(argv: &[CString], env: &[CString], path: &str) -> Fault {
    let name = argv[0].to_string_lossy().into_owned();
    if name.contains('/') {
        return refused(&name, &argv[0], sys::execve(&argv[0], argv, env));
    }
    let mut worst = Errno::ENOENT;
    for dir in path.split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        let Ok(candidate) = CString::new(format!("{dir}/{name}")) else { continue };
        match Errno::from_raw(sys::execve(&candidate, argv, env).raw_os_error().unwrap_or(0)) {
            Errno::ENOENT if Path::new(&*candidate.to_string_lossy()).exists() => {
                return refused(&name, &candidate, Errno::ENOENT.into());
            }
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => worst = Errno::EACCES,
            other => return refused(&name, &candidate, other.into()),
        }
    }
    refused(&name, &argv[0], worst.into())
}

fn refused(name: &str, tried: &CString, error: io::Error) -> Fault {
    let errno = error.raw_os_error().unwrap_or(0);
    let there = Path::new(&*tried.to_string_lossy()).exists();
    let message = match Errno::from_raw(errno) {
        Errno::ENOENT if there => format!("{name}: its interpreter was not found"),
        Errno::ENOENT | Errno::ENOTDIR => format!("{name}: command not found"),
        Errno::EACCES => format!("{name}: permission denied"),
        Errno::ENOEXEC => format!("{name}: not a program of this machine"),
        _ => format!("{name}: {error}"),
    };
    Fault { errno, ..Fault::failed("exec", message) }
}
