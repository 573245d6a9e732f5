//! The process that a pod belongs to. Single-threaded, one poll loop, no runtime: it is there once per pod
//! and must stay small. Invariant: it alone collects the statuses of the pod's processes; it ends only when
//! told to by `Stop` (or killed), never because an agent went away; and it decides nothing about the pod.
//!
//! It is the `sheave` program itself, started as `sheave shim <run directory of the pod>`.

mod connection;
mod container;
mod enter;
mod exec;
mod log;
mod rootfs;
mod sandbox;
mod serve;

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::cgroup;
use super::protocol::{Boot, Fault, Ready, Stage, VERSION, names};
use super::sys::{self, Clone};

/// Entry of `sheave shim`. Must be called before any thread exists. Starts the shim as an orphan and ends;
/// the shim itself writes one [`Ready`] to the standard output that it inherits, and closes it.
pub fn main(mut args: impl Iterator<Item = OsString>) -> ! {
    let Some(dir) = args.next() else {
        eprintln!("sheave shim is started by the agent; it takes a pod's run directory");
        sys::exit_now(2)
    };
    // Whatever the agent failed to mark is not the pod's.
    report(sys::close_from(3), "close inherited descriptors");
    match sys::fork() {
        Ok(Clone::Parent(_)) => sys::exit_now(0),
        Ok(Clone::Child) => {}
        Err(error) => {
            eprintln!("fork: {error}");
            sys::exit_now(1)
        }
    }
    let outcome = start(Path::new(&dir));
    let ready = match &outcome {
        Ok(shim) => Ready::Up { init_pid: shim.init_pid() },
        Err(fault) => Ready::Failed(fault.clone()),
    };
    report(announce(&ready), "tell the agent");
    match outcome {
        Ok(mut shim) => {
            let code = shim.run();
            sys::exit_now(code)
        }
        Err(fault) => {
            eprintln!("{}: {}", fault.stage, fault.message);
            sys::exit_now(1)
        }
    }
}

/// A failure that changes nothing about what is done next; it goes to the shim's log.
fn report<E: std::fmt::Display>(result: Result<(), E>, what: &str) {
    if let Err(error) = result {
        eprintln!("{what}: {error}");
    }
}

/// Writes one line and gives the standard output up, which ends the agent's wait.
fn announce(ready: &Ready) -> io::Result<()> {
    let mut line = serde_json::to_vec(ready)?;
    line.push(b'\n');
    io::stdout().write_all(&line)?;
    io::stdout().flush()?;
    let null = fs::File::open("/dev/null")?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}

fn start(dir: &Path) -> Result<serve::Shim, Fault> {
    std::env::set_current_dir(dir).stage("enter the run directory")?;
    nix::unistd::setsid().stage("setsid")?;
    sys::set_name(c"sheave-shim").stage("name")?;
    let lock = lock().stage("lock the run directory")?;
    let boot: Boot = fs::read(names::BOOT)
        .and_then(|bytes| Ok(serde_json::from_slice(&bytes)?))
        .stage("read what to start")?;
    if boot.version != VERSION {
        return Err(Fault::failed("shim", "the agent and its shim program differ in version"));
    }
    sys::become_subreaper().stage("subreaper")?;
    sys::set_undumpable().stage("dumpable")?;
    let signals = signals().stage("signals")?;
    let group = cgroup::shim_path(&boot.spec.uid);
    let unlimited = cgroup::Limits::default();
    let in_group = |e: cgroup::CgroupError| Fault::failed(format!("cgroup: {e}"), e.source.to_string());
    boot.hierarchies.create(&group, &unlimited).map_err(in_group)?;
    boot.hierarchies.join(&group).map_err(in_group)?;
    sandbox::private_mounts()?;
    sandbox::make_groups(&boot)?;
    let holder = sandbox::Holder::start(&boot)?;
    let listener = listen().stage("listen")?;
    Ok(serve::Shim::new(boot, holder, listener, signals, lock))
}

/// Takes the lock that says that this pod has a living shim. An agent that clears the pod away holds it
/// meanwhile and unlinks it, so a shim that comes too late sees a file without a name and gives up.
fn lock() -> io::Result<fs::File> {
    let file =
        fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(names::LOCK)?;
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_SETLK(&whole))?;
    if file.metadata()?.nlink() == 0 {
        return Err(io::Error::from_raw_os_error(libc::ENOENT));
    }
    Ok(file)
}

/// SIGCHLD comes through a descriptor; what would end the shim by accident is ignored.
fn signals() -> nix::Result<SignalFd> {
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGPIPE] {
        set_signal(signal, &ignore)?;
    }
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

#[expect(unsafe_code, reason = "sigaction is unsafe because of handlers; there are none here")]
fn set_signal(signal: Signal, action: &SigAction) -> nix::Result<()> {
    // SAFETY: SIG_IGN installs no handler.
    unsafe { nix::sys::signal::sigaction(signal, action) }.map(drop)
}

fn listen() -> io::Result<UnixListener> {
    let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(names::SOCKET);
    nix::sys::stat::umask(old);
    let listener = listener?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Lets `clone` make a child in another process's process namespace. Only children are affected by that
/// membership, so it is undone without a trace.
fn in_process_namespace(of: &OwnedFd, clone: impl FnOnce() -> io::Result<Clone>) -> io::Result<Clone> {
    let own = fs::File::open("/proc/self/ns/pid")?;
    setns(of, CloneFlags::CLONE_NEWPID)?;
    let cloned = clone();
    if matches!(cloned, Ok(Clone::Child)) {
        return cloned;
    }
    setns(&own, CloneFlags::CLONE_NEWPID)?;
    cloned
}
