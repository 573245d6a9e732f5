//! One run of one container, as its shim sees it. The order of its life is fixed: created, started
//! (the program was executed), ended (status collected), drained (output read to its end or for a bounded
//! time), written down, told.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::unistd::pipe2;

use super::super::cgroup::Limits;
use super::super::protocol::{Boot, Fault, Stage, names};
use super::super::record::{ContainerRecord, Exit};
use super::super::seccomp::Programs;
use super::super::spec::ContainerSpec;
use super::super::sys::{self, Clone};
use super::super::{container_id, plan};
use super::enter::{self, Program};
use super::log::{Lines, LogFile};
use super::rootfs::Rootfs;
use super::sandbox::{Holder, pod_group};
use crate::limits::{CONTAINER_START_TIMEOUT_MS, OUTPUT_DRAIN_TIMEOUT_MS, TERMINATION_MESSAGE_BYTES_MAX};

type Result<T> = std::result::Result<T, Fault>;

/// Who waits for the outcome of a request: connection and number of the call.
pub(super) type Waiter = (u64, u64);

/// One output stream of a container.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) pipe: Option<OwnedFd>,
    lines: Lines,
}

#[derive(Debug)]
pub(super) enum Phase {
    /// Cloned; the program was not executed yet. `report` carries the error, or closes upon exec.
    Starting {
        waiter: Waiter,
        report: OwnedFd,
        text: Vec<u8>,
        deadline: Instant,
    },
    /// The program could not be executed; the process that tried is about to end.
    Failed {
        waiter: Waiter,
        fault: Fault,
    },
    Running,
    /// Its status is known; its output may still come.
    Draining {
        status: Status,
        deadline: Instant,
    },
    Ended,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) code: i32,
    pub(super) signal: Option<i32>,
}

/// What a report that was read to its end says.
pub(super) enum Started {
    /// Not at its end.
    NotYet,
    Yes,
    No(Fault),
}

#[derive(Debug)]
pub(super) struct Container {
    pub(super) spec: ContainerSpec,
    pub(super) record: ContainerRecord,
    pub(super) phase: Phase,
    /// Its group, below the attach point.
    pub(super) group: PathBuf,
    /// Its first process; kept so that commands can join its namespaces.
    pub(super) process: OwnedFd,
    pub(super) capabilities: u64,
    dir: PathBuf,
    log: LogFile,
    streams: [Stream; 2],
}

fn new_record(
    boot: &Boot,
    spec: &ContainerSpec,
    pid: i32,
    created: Timestamp,
    log: &LogFile,
) -> ContainerRecord {
    ContainerRecord {
        name: spec.name.clone(),
        attempt: spec.attempt,
        id: container_id(&boot.spec.uid, &spec.name, spec.attempt),
        image: spec.image.reference.clone(),
        image_id: spec.image.id.clone(),
        pid,
        created,
        started: None,
        exit: None,
        log: log.path().to_owned(),
        layers: spec.image.layers.clone(),
    }
}

/// Read and write end, the read end not blocking.
pub(super) fn output_pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).stage("pipe")?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).stage("pipe")?;
    Ok((reader, writer))
}

/// Below the pod's run directory.
pub(super) fn run_dir(name: &str, attempt: u32) -> PathBuf {
    Path::new(names::CONTAINERS).join(name).join(attempt.to_string())
}

/// Everything that the new process needs, made before it is.
struct Launch<'a> {
    boot: &'a Boot,
    holder: &'a Holder,
    program: Program<'a>,
    rootfs: Rootfs<'a>,
    joins: Vec<PathBuf>,
}

impl Container {
    /// Prepares and clones; the outcome arrives through [`Container::poll_report`]. What a failure leaves
    /// behind is removed again.
    pub(super) fn start(
        boot: &Boot,
        holder: &Holder,
        spec: ContainerSpec,
        (capabilities, filter): (u64, Option<&Programs>),
        waiter: Waiter,
    ) -> Result<Container> {
        let group = pod_group(&boot.spec).join(&container_id(&boot.spec.uid, &spec.name, spec.attempt)[..32]);
        let limits = Limits {
            resources: spec.resources,
            restrict_devices: !spec.privileged,
            oom_group: boot.hierarchies.is_unified(),
        };
        let started = boot
            .hierarchies
            .create(&group, &limits)
            .map_err(|e| Fault { errno: 0, ..Fault::failed(format!("cgroup: {e}"), e.source.to_string()) })
            .and_then(|()| Self::start_in(boot, holder, spec, (capabilities, filter), waiter, &group));
        if started.is_err() {
            super::report(boot.hierarchies.remove(&group), "remove the group of a failed start");
        }
        started
    }

    fn start_in(
        boot: &Boot,
        holder: &Holder,
        spec: ContainerSpec,
        (capabilities, filter): (u64, Option<&Programs>),
        waiter: Waiter,
        group: &Path,
    ) -> Result<Container> {
        let created = Timestamp::now();
        let dir = run_dir(&spec.name, spec.attempt);
        fs::create_dir_all(&dir).stage("make the run directory")?;
        let termination_log = dir.join("termination-log");
        world_writable(&termination_log).stage("make the termination message")?;
        let layer = boot.rootfs_dir.join(format!("{}-{}", spec.name, spec.attempt));
        let (upper, work) = (layer.join("upper"), layer.join("work"));
        make_writable_layer(&layer, &upper, &work, spec.image.layers.last())?;
        let log = boot.log_dir.join(&spec.name).join(format!("{}.log", spec.attempt));
        let log = LogFile::open(log).stage("open the log")?;
        let argv = plan::arguments(&spec);

        let (out_r, out_w) = output_pipe()?;
        let (err_r, err_w) = output_pipe()?;
        let (report_r, report_w) = output_pipe()?;
        let hostname = boot.spec.hostname.as_str();
        let launch = Launch {
            boot,
            holder,
            program: Program {
                spec: &spec,
                argv: &argv,
                hostname,
                capabilities,
                filter,
                make_working_dir: true,
            },
            rootfs: Rootfs {
                spec: &spec,
                upper: &upper,
                work: &work,
                hierarchies: &boot.hierarchies,
                group,
                termination_log: &termination_log,
            },
            joins: boot.hierarchies.legacy_joins(group),
        };
        let pid = launch.clone_process(group, &out_w, &err_w, report_w)?;
        drop((out_w, err_w));
        let process = sys::pidfd_open(pid).stage("open the new process")?;
        let record = new_record(boot, &spec, pid, created, &log);
        let deadline = Instant::now() + Duration::from_millis(CONTAINER_START_TIMEOUT_MS);
        let stream = |pipe, name| Stream { pipe: Some(pipe), lines: Lines::new(name) };
        Ok(Container {
            spec,
            record,
            phase: Phase::Starting { waiter, report: report_r, text: Vec::new(), deadline },
            group: group.to_owned(),
            process,
            capabilities,
            dir,
            log,
            streams: [stream(out_r, "stdout"), stream(err_r, "stderr")],
        })
    }

    /// Reads what the starting process says.
    pub(super) fn poll_report(&mut self) -> Started {
        let Phase::Starting { report, text, .. } = &mut self.phase else { return Started::NotYet };
        match drain(report, |bytes| text.extend_from_slice(bytes)) {
            Drained::Open => Started::NotYet,
            Drained::Ended if text.is_empty() => Started::Yes,
            Drained::Ended => Started::No(
                serde_json::from_slice(text)
                    .unwrap_or_else(|_| Fault::failed("start", String::from_utf8_lossy(text).into_owned())),
            ),
        }
    }

    /// Takes note of a program that runs.
    pub(super) fn set_running(&mut self) {
        self.record.started = Some(Timestamp::now());
        self.phase = Phase::Running;
        let path = self.dir.join(names::RECORD);
        super::report(write_json(&path, &self.record, false), "write the record of a container");
    }

    /// Takes note of the end of the first process.
    pub(super) fn set_ended(&mut self, status: Status) {
        let deadline = Instant::now() + Duration::from_millis(OUTPUT_DRAIN_TIMEOUT_MS);
        self.phase = Phase::Draining { status, deadline };
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Starting { deadline, .. } | Phase::Draining { deadline, .. } => Some(deadline),
            Phase::Failed { .. } | Phase::Running | Phase::Ended => None,
        }
    }

    /// Open output pipes, by number of the stream.
    pub(super) fn pipes(&self) -> impl Iterator<Item = (usize, &OwnedFd)> {
        self.streams.iter().enumerate().filter_map(|(i, s)| s.pipe.as_ref().map(|p| (i, p)))
    }

    /// Moves what a stream holds to the log.
    pub(super) fn read_stream(&mut self, index: usize) {
        let stream = &mut self.streams[index];
        let Some(pipe) = &stream.pipe else { return };
        let log = &mut self.log;
        let mut records = Vec::new();
        let drained = drain(pipe, |bytes| {
            records.clear();
            stream.lines.feed(bytes, log.now(), &mut records);
            log.write(&records);
        });
        if matches!(drained, Drained::Ended) {
            stream.pipe = None;
            records.clear();
            stream.lines.finish(log.now(), &mut records);
            log.write(&records);
        }
    }

    /// True once nothing more of the output is waited for.
    pub(super) fn is_drained(&self) -> bool {
        let Phase::Draining { deadline, .. } = self.phase else { return false };
        self.streams.iter().all(|s| s.pipe.is_none()) || Instant::now() >= deadline
    }

    /// True once the process that could not execute the program is gone.
    pub(super) fn is_failed(&self) -> bool {
        matches!(self.phase, Phase::Failed { .. }) && self.record.pid == 0
    }

    /// Writes the exit down, durably, and returns it.
    pub(super) fn finish(&mut self, status: Status, oom_kills: u64) -> Exit {
        for stream in &mut self.streams {
            if stream.pipe.take().is_some() {
                let mut records = Vec::new();
                stream.lines.finish(self.log.now(), &mut records);
                self.log.write(&records);
            }
        }
        if self.log.lost_bytes > 0 {
            eprintln!("{}: {} bytes of log lost", self.record.name, self.log.lost_bytes);
        }
        let message = termination_message(&self.dir.join("termination-log"));
        let exit = Exit {
            code: status.code,
            signal: status.signal,
            oom_killed: oom_kills > 0 && status.code != 0,
            lost: false,
            finished_at: Timestamp::now(),
            message,
        };
        super::report(write_json(&self.dir.join(names::EXIT), &exit, true), "write an exit status");
        self.record.exit = Some(exit.clone());
        self.phase = Phase::Ended;
        exit
    }
}

impl Launch<'_> {
    fn clone_process(
        &self,
        group: &Path,
        output: &OwnedFd,
        errors: &OwnedFd,
        report: OwnedFd,
    ) -> Result<i32> {
        let dir = fs::File::open(self.boot.hierarchies.unified_dir(group)).stage("cgroup")?;
        let shared = self.boot.spec.share_process_namespace;
        let flags = if shared { libc::CLONE_NEWNS } else { libc::CLONE_NEWNS | libc::CLONE_NEWPID };
        let clone = || sys::clone_process(flags, dir.as_fd());
        let cloned = if shared { super::in_process_namespace(&self.holder.process, clone) } else { clone() };
        match cloned.stage("new process")? {
            Clone::Parent(pid) => Ok(pid),
            Clone::Child => {
                let fault = self.set_up(output, errors).err().unwrap_or_else(|| self.program.run());
                report_and_exit(report, &fault)
            }
        }
    }

    fn set_up(&self, output: &OwnedFd, errors: &OwnedFd) -> Result<()> {
        enter::join_groups(&self.joins)?;
        enter::leave_shim(output.as_fd(), errors.as_fd())?;
        if let Err(error) = enter::adjust_oom_score(self.rootfs.spec.oom_score_adj) {
            // Kept as inherited; the shim says so once.
            drop(error);
        }
        let mut flags = CloneFlags::CLONE_NEWIPC;
        if !self.boot.spec.host_network {
            flags |= CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS;
        }
        setns(&self.holder.process, flags).stage("join the sandbox")?;
        if self.boot.hierarchies.is_unified() {
            nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP).stage("new cgroup namespace")?;
        }
        self.rootfs.enter()
    }
}

/// Ends a process that could not become a container's program.
pub(super) fn report_and_exit(report: OwnedFd, fault: &Fault) -> ! {
    let text = serde_json::to_vec(fault).unwrap_or_else(|_| fault.message.clone().into_bytes());
    let written = fs::File::from(report).write_all(&text);
    sys::exit_now(if written.is_ok() { 127 } else { 126 })
}

pub(super) enum Drained {
    /// More may come.
    Open,
    /// The last writer is gone.
    Ended,
}

/// Reads what is there, in bounded pieces and a bounded number of them, so that one chatty container does
/// not keep the shim from the others.
pub(super) fn drain(pipe: &OwnedFd, mut take: impl FnMut(&[u8])) -> Drained {
    const PIECES_MAX: usize = 16;
    let mut buffer = [0u8; 16 * 1024];
    for _ in 0..PIECES_MAX {
        match nix::unistd::read(pipe, &mut buffer) {
            Ok(0) => return Drained::Ended,
            Ok(n) => take(&buffer[..n]),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Drained::Open,
            Err(_) => return Drained::Ended,
        }
    }
    Drained::Open
}

fn world_writable(path: &Path) -> io::Result<()> {
    let file = fs::OpenOptions::new().create(true).append(true).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o666))
}

/// Its root directory has the mode and owner that the image gives its own.
fn make_writable_layer(layer: &Path, upper: &Path, work: &Path, image: Option<&PathBuf>) -> Result<()> {
    const STAGE: &str = "make the writable layer";
    // That of an earlier try; overlayfs refuses a used one.
    match fs::remove_dir_all(layer) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(e).stage("remove an earlier writable layer");
        }
        _ => {}
    }
    let make = |path: &Path| fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    make(layer).and_then(|()| make(work)).and_then(|()| make(upper)).stage(STAGE)?;
    let top = image.ok_or_else(|| Fault::failed(STAGE, "the image has no layers"))?;
    let root = fs::metadata(top).stage_with(|| format!("layer {}", top.display()))?;
    std::os::unix::fs::chown(upper, Some(root.uid()), Some(root.gid())).stage(STAGE)?;
    fs::set_permissions(upper, fs::Permissions::from_mode(root.mode() & 0o7777)).stage(STAGE)
}

/// The end of the message file, where a message that is too long has its point.
fn termination_message(path: &Path) -> String {
    use std::io::{Seek, SeekFrom};
    let read = || {
        let mut file = fs::File::open(path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(TERMINATION_MESSAGE_BYTES_MAX as u64)))?;
        let mut bytes = Vec::new();
        file.take(TERMINATION_MESSAGE_BYTES_MAX as u64).read_to_end(&mut bytes)?;
        io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_else(|error| {
        eprintln!("read {}: {error}", path.display());
        String::new()
    })
}

/// Replaces a file at once; with `durable` it survives a crash of the node.
pub(super) fn write_json<T: serde::Serialize>(path: &Path, value: &T, durable: bool) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file =
        fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    if durable {
        file.sync_data()?;
    }
    fs::rename(&temporary, path)
}
