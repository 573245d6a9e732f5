//! Processes of a run: inside a namespace and a cgroup from their first instruction on, and never longer there than the
//! run itself, however that ends: the kernel kills them with their parent, and their namespaces go with them.

#![expect(unsafe_code, reason = "pre_exec, to start a program inside a namespace and a cgroup")]

use crate::LoadError;
use crate::error::Doing as _;
use crate::wire;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by SIGINT or SIGTERM.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Processes that run now.
static RUNNING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

fn running<T>(work: impl FnOnce(&mut Vec<u32>) -> T) -> T {
    work(&mut RUNNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// From now on SIGINT and SIGTERM end the processes of the run, which ends the run itself.
///
/// # Errors
/// When the signals can't be caught.
pub(crate) fn catch_signals() -> Result<(), LoadError> {
    ctrlc::set_handler(|| {
        INTERRUPTED.store(true, Ordering::SeqCst);
        running(|pids| {
            for pid in pids {
                // One that ended a moment ago is what is wanted.
                kill(Pid::from_raw(*pid as i32), Signal::SIGKILL).unwrap_or_default();
            }
        });
    })
    .map_err(std::io::Error::other)
    .doing("catch SIGINT and SIGTERM")
}

/// # Errors
/// [`LoadError::Interrupted`] when a signal asked for the end.
pub(crate) fn check_interrupted() -> Result<(), LoadError> {
    if INTERRUPTED.load(Ordering::SeqCst) { Err(LoadError::Interrupted) } else { Ok(()) }
}

/// A network namespace without a name: it exists as long as this or a process inside does.
#[derive(Debug)]
pub(crate) struct NetNs(File);

impl NetNs {
    /// Makes one; the calling thread stays where it is.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn new() -> Result<Self, LoadError> {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        };
        std::thread::scope(|scope| scope.spawn(make).join())
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread panicked")))
            .map(Self)
            .doing("make a network namespace")
    }

    /// A path by which programs that this process starts find it.
    pub(crate) fn path(&self) -> String {
        use std::os::fd::AsRawFd as _;
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Its descriptor.
    pub(crate) fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        use std::os::fd::AsFd as _;
        self.0.as_fd()
    }

    /// Runs `work` on a thread inside.
    ///
    /// # Errors
    /// When the namespace can't be entered, and those of `work`.
    pub(crate) fn run<T: Send>(
        &self,
        work: impl FnOnce() -> std::io::Result<T> + Send,
    ) -> std::io::Result<T> {
        let inside = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET)?;
            work()
        };
        std::thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread panicked")))
    }

    /// Makes `command` start inside; it dies with this process.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn apply(&self, command: &mut Command) -> Result<(), LoadError> {
        let file = self.0.try_clone().doing("duplicate a namespace's descriptor")?;
        // SAFETY: between fork and exec only setns(2) runs; the descriptor is owned by the closure.
        unsafe {
            command.pre_exec(move || Ok(setns(&file, CloneFlags::CLONE_NEWNET)?));
        }
        dies_with_parent(command);
        Ok(())
    }
}

/// Makes `command` end when the thread that starts it does.
pub(crate) fn dies_with_parent(command: &mut Command) {
    // SAFETY: between fork and exec only prctl(2) runs.
    unsafe {
        command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
    }
}

/// Makes `command` start inside a cgroup.
fn inside_cgroup(command: &mut Command, cgroup: &Path) -> Result<(), LoadError> {
    let procs = File::options()
        .write(true)
        .open(cgroup.join("cgroup.procs"))
        .doing(format!("open {}", cgroup.join("cgroup.procs").display()))?;
    // SAFETY: between fork and exec only write(2) runs; "0" names the writing process.
    unsafe {
        command.pre_exec(move || (&procs).write_all(b"0"));
    }
    Ok(())
}

/// A program that is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Guarded(Child);

impl Guarded {
    /// Starts it; a namespace and the like are set on `command` before.
    ///
    /// # Errors
    /// When it can't be started, or the run was interrupted.
    pub(crate) fn start(mut command: Command, who: String) -> Result<Self, LoadError> {
        // A signal from the terminal is for the run, which ends its processes in order.
        command.process_group(0);
        let child = command.spawn().doing(format!("start the {who}"))?;
        running(|pids| pids.push(child.id()));
        let guarded = Self(child);
        check_interrupted()?;
        Ok(guarded)
    }

    /// Whether it has ended by itself.
    pub(crate) fn ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // One that ended already can't be killed; it is waited for all the same.
        drop(self.0.kill());
        drop(self.0.wait());
        let id = self.0.id();
        running(|pids| pids.retain(|pid| *pid != id));
    }
}

/// One of our own processes. It is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    who: String,
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts this program again as a worker with `job`, inside a namespace and perhaps a cgroup.
    ///
    /// # Errors
    /// When it can't be started, or the run was interrupted.
    pub(crate) fn start(
        who: impl Into<String>,
        netns: &NetNs,
        cgroup: Option<&Path>,
        job: &wire::Job,
    ) -> Result<Self, LoadError> {
        let who = who.into();
        let mut command = Command::new("/proc/self/exe");
        command.args(["load", "worker"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        // A signal from the terminal is for the run, which ends its processes in order.
        command.process_group(0);
        netns.apply(&mut command)?;
        if let Some(cgroup) = cgroup {
            inside_cgroup(&mut command, cgroup)?;
        }
        let mut child = command.spawn().doing(format!("start the {who} process"))?;
        running(|pids| pids.push(child.id()));
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(LoadError::Worker { who, said: "has no pipes".to_owned() });
        };
        let mut worker = Self { who, child, input: Some(input), output: BufReader::new(output) };
        check_interrupted()?;
        worker.tell(job)?;
        Ok(worker)
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn tell(&mut self, value: &impl Serialize) -> Result<(), LoadError> {
        let told = self.input.as_mut().is_some_and(|input| wire::write(input, value).is_ok());
        if told { Ok(()) } else { Err(self.ended()) }
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// When the process is gone, or the run was interrupted.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, request: &impl Serialize) -> Result<T, LoadError> {
        check_interrupted()?;
        self.tell(request)?;
        self.listen()
    }

    /// Waits for something that the process says.
    ///
    /// # Errors
    /// When the process is gone, or the run was interrupted.
    pub(crate) fn listen<T: DeserializeOwned>(&mut self) -> Result<T, LoadError> {
        wire::read(&mut self.output, &self.who)?.map_or_else(|| Err(self.ended()), Ok)
    }

    fn ended(&mut self) -> LoadError {
        if let Err(interrupted) = check_interrupted() {
            return interrupted;
        }
        self.input = None;
        let said = match self.child.wait() {
            Ok(status) => format!("ended before its work was done ({status})"),
            Err(error) => format!("is gone: {error}"),
        };
        // The signal handler says so before it ends processes, but perhaps after we looked.
        check_interrupted().err().unwrap_or(LoadError::Worker { who: self.who.clone(), said })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.input = None;
        // One that ended already can't be killed; it is waited for all the same.
        drop(self.child.kill());
        drop(self.child.wait());
        let id = self.child.id();
        running(|pids| pids.retain(|pid| *pid != id));
    }
}
