//! A command run in a container. Invariant: it has the container's restrictions, all of them, and its whole
//! tree ends with it: every process it starts is in a group of its own below the container's, which is
//! killed when the command ends or its time is up.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};

use super::super::protocol::{Boot, Fault, Stage};
use super::super::record::ExecOutput;
use super::super::seccomp::Programs;
use super::super::spec::ExecSpec;
use super::super::sys::{self, Clone};
use super::container::{Container, Drained, Status, Waiter, drain, output_pipe, report_and_exit};
use super::enter::{self, Program};
use crate::limits::{EXEC_OUTPUT_BYTES_MAX, OUTPUT_DRAIN_TIMEOUT_MS};

type Result<T> = std::result::Result<T, Fault>;

#[derive(Debug)]
pub(super) struct Exec {
    pub(super) pid: i32,
    pub(super) waiter: Waiter,
    /// Its group, below the attach point.
    pub(super) group: PathBuf,
    pub(super) pipe: Option<OwnedFd>,
    report: OwnedFd,
    output: Vec<u8>,
    truncated: bool,
    timed_out: bool,
    status: Option<Status>,
    pub(super) deadline: Instant,
}

impl Exec {
    pub(super) fn start(
        boot: &Boot,
        container: &Container,
        filter: Option<&Programs>,
        spec: &ExecSpec,
        number: u64,
        waiter: Waiter,
    ) -> Result<Exec> {
        let group = container.group.join(format!("exec-{number}"));
        boot.hierarchies
            .create_bare(&group)
            .map_err(|e| Fault::failed(format!("cgroup: {e}"), e.source.to_string()))?;
        let started = Self::start_in(boot, container, filter, spec, &group, waiter);
        if started.is_err() {
            super::report(boot.hierarchies.remove(&group), "remove the group of a failed exec");
        }
        started
    }

    fn start_in(
        boot: &Boot,
        container: &Container,
        filter: Option<&Programs>,
        spec: &ExecSpec,
        group: &Path,
        waiter: Waiter,
    ) -> Result<Exec> {
        let dir = fs::File::open(boot.hierarchies.unified_dir(group)).stage("cgroup")?;
        let joins = boot.hierarchies.legacy_joins(&container.group);
        let program = Program {
            spec: &container.spec,
            argv: &spec.command,
            hostname: &boot.spec.hostname,
            capabilities: container.capabilities,
            filter,
            make_working_dir: false,
        };
        let (out_r, out_w) = output_pipe()?;
        let (report_r, report_w) = output_pipe()?;
        let clone = || sys::clone_process(0, dir.as_fd());
        match super::in_process_namespace(&container.process, clone).stage("new process")? {
            Clone::Child => {
                let fault = join(container, boot, &joins, &out_w).err().unwrap_or_else(|| program.run());
                report_and_exit(report_w, &fault)
            }
            Clone::Parent(pid) => Ok(Exec {
                pid,
                waiter,
                group: group.to_owned(),
                pipe: Some(out_r),
                report: report_r,
                output: Vec::new(),
                truncated: false,
                timed_out: false,
                status: None,
                deadline: Instant::now() + Duration::from_millis(spec.timeout_ms),
            }),
        }
    }

    pub(super) fn read(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        let (output, truncated) = (&mut self.output, &mut self.truncated);
        let drained = drain(pipe, |bytes| {
            let room = EXEC_OUTPUT_BYTES_MAX - output.len();
            output.extend_from_slice(&bytes[..bytes.len().min(room)]);
            *truncated |= bytes.len() > room;
        });
        if matches!(drained, Drained::Ended) {
            self.pipe = None;
        }
    }

    /// Takes note of the end of the command itself.
    pub(super) fn set_ended(&mut self, status: Status) {
        self.status = Some(status);
        self.deadline = Instant::now() + Duration::from_millis(OUTPUT_DRAIN_TIMEOUT_MS);
    }

    /// Takes note that its time is up; true if the tree has to be killed now.
    pub(super) fn expire(&mut self) -> bool {
        let first = self.status.is_none() && !self.timed_out;
        self.timed_out |= first;
        self.deadline = Instant::now() + Duration::from_millis(OUTPUT_DRAIN_TIMEOUT_MS);
        first
    }

    /// The outcome, once nothing more is waited for.
    pub(super) fn outcome(&mut self) -> Option<Result<ExecOutput>> {
        let status = self.status?;
        if self.pipe.is_some() && Instant::now() < self.deadline {
            return None;
        }
        let mut report = Vec::new();
        drain(&self.report, |bytes| report.extend_from_slice(bytes));
        if !report.is_empty() {
            let fault = serde_json::from_slice(&report);
            return Some(Err(fault.unwrap_or_else(|_| Fault::failed("exec", "unreadable report"))));
        }
        Some(Ok(ExecOutput {
            code: status.code,
            timed_out: self.timed_out,
            output: String::from_utf8_lossy(&self.output).into_owned(),
            truncated: self.truncated,
        }))
    }
}

/// Moves a new process, which is already in the container's process namespace, into the rest of it.
fn join(container: &Container, boot: &Boot, joins: &[PathBuf], output: &OwnedFd) -> Result<()> {
    enter::join_groups(joins)?;
    enter::leave_shim(output.as_fd(), output.as_fd())?;
    if let Err(error) = enter::adjust_oom_score(container.spec.oom_score_adj) {
        // As for the container itself.
        drop(error);
    }
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS;
    if boot.hierarchies.is_unified() {
        flags |= CloneFlags::CLONE_NEWCGROUP;
    }
    setns(&container.process, flags).stage("join the container")
}
