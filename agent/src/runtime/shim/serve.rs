//! The shim's loop: one thread, one `poll`, every descriptor not blocking. Invariant: what is told to the
//! agent happened before: an answer to a start follows the execution, an exit event follows the written
//! exit status.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use super::super::protocol::{
    Answer, Boot, Call, Event, Fault, FaultKind, Message, Request, Snapshot, VERSION,
};
use super::super::seccomp::{self, Programs};
use super::super::spec::{ContainerSpec, ExecSpec, Seccomp};
use super::super::{capability, sys};
use super::connection::Connection;
use super::container::{Container, Phase, Started, Status, Waiter};
use super::exec::Exec;
use super::report;
use super::sandbox::{Holder, pod_group};
use crate::limits::{EXECS_PER_POD_MAX, POD_KILL_TIMEOUT_MS, SHIM_CONNECTIONS_MAX, SHIM_EVENTS_KEPT_MAX};

/// What a descriptor in the poll set stands for.
enum Source {
    Signals,
    Listener,
    Connection(u64),
    Report(usize),
    Output(usize, usize),
    Exec(usize),
}

/// A pod's shim.
pub(super) struct Shim {
    boot: Boot,
    holder: Holder,
    holder_died: bool,
    listener: UnixListener,
    signals: SignalFd,
    /// Held as long as the shim lives.
    _lock: fs::File,
    connections: BTreeMap<u64, Connection>,
    containers: Vec<Container>,
    execs: Vec<Exec>,
    /// Compiled filters, by the capabilities that they are for.
    filters: BTreeMap<u64, Programs>,
    events: VecDeque<(u64, Event)>,
    seq: u64,
    next_number: u64,
    oom_score_refused: bool,
    stopping: Option<(Waiter, Instant)>,
}

impl Shim {
    pub(super) fn new(
        boot: Boot,
        holder: Holder,
        listener: UnixListener,
        signals: SignalFd,
        lock: fs::File,
    ) -> Shim {
        Shim {
            boot,
            holder,
            holder_died: false,
            listener,
            signals,
            _lock: lock,
            connections: BTreeMap::new(),
            containers: Vec::new(),
            execs: Vec::new(),
            filters: BTreeMap::new(),
            events: VecDeque::new(),
            seq: 0,
            next_number: 0,
            oom_score_refused: false,
            stopping: None,
        }
    }

    pub(super) fn init_pid(&self) -> i32 {
        self.holder.pid
    }

    /// Serves until `Stop` has been answered; the exit code.
    pub(super) fn run(&mut self) -> i32 {
        loop {
            match self.wait() {
                Ok(ready) => ready.into_iter().for_each(|source| self.handle(source)),
                Err(Errno::EINTR) => {}
                Err(error) => {
                    // Without poll nothing can be served; the agent notices the end of this process.
                    eprintln!("poll: {error}");
                    return 1;
                }
            }
            self.settle();
            if self.is_stopped() {
                return 0;
            }
        }
    }

    fn wait(&self) -> nix::Result<Vec<Source>> {
        let mut sources = vec![(Source::Signals, self.signals.as_fd(), PollFlags::POLLIN)];
        let input = PollFlags::POLLIN;
        sources.push((Source::Listener, self.listener.as_fd(), input));
        for (id, connection) in &self.connections {
            let flags = if connection.has_unsent() { input | PollFlags::POLLOUT } else { input };
            sources.push((Source::Connection(*id), connection.stream.as_fd(), flags));
        }
        for (i, container) in self.containers.iter().enumerate() {
            if let Phase::Starting { report, .. } = &container.phase {
                sources.push((Source::Report(i), report.as_fd(), input));
            }
            sources.extend(container.pipes().map(|(s, pipe)| (Source::Output(i, s), pipe.as_fd(), input)));
        }
        for (i, exec) in self.execs.iter().enumerate() {
            sources.extend(exec.pipe.iter().map(|pipe| (Source::Exec(i), pipe.as_fd(), input)));
        }
        let mut fds: Vec<PollFd<'_>> =
            sources.iter().map(|(_, fd, flags)| PollFd::new(*fd as BorrowedFd<'_>, *flags)).collect();
        poll(&mut fds, self.timeout())?;
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        Ok(sources
            .into_iter()
            .zip(ready)
            .filter_map(|((source, _, _), ready)| ready.then_some(source))
            .collect())
    }

    fn timeout(&self) -> PollTimeout {
        let containers = self.containers.iter().filter_map(Container::deadline);
        let all = containers.chain(self.execs.iter().map(|e| e.deadline));
        let Some(first) = all.chain(self.stopping.iter().map(|(_, d)| *d)).min() else {
            return PollTimeout::NONE;
        };
        // Rounded up, so that the deadline has passed when poll returns.
        let left = first.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Signals => {
                while matches!(self.signals.read_signal(), Ok(Some(_))) {}
                self.reap();
            }
            Source::Listener => self.accept(),
            Source::Connection(id) => self.serve(id),
            Source::Report(i) => self.check_start(i),
            Source::Output(i, stream) => self.containers[i].read_stream(stream),
            Source::Exec(i) => self.execs[i].read(),
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.connections.len() >= SHIM_CONNECTIONS_MAX {
                eprintln!("too many connections");
                continue;
            }
            self.next_number += 1;
            match Connection::new(stream) {
                Ok(connection) => drop(self.connections.insert(self.next_number, connection)),
                Err(error) => eprintln!("accept: {error}"),
            }
        }
    }

    fn serve(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match connection.flush().and_then(|()| connection.receive()) {
            Ok(calls) => calls.into_iter().for_each(|call| self.call(id, call)),
            Err(error) => {
                if error.kind() != std::io::ErrorKind::UnexpectedEof {
                    eprintln!("connection: {error}");
                }
                self.connections.remove(&id);
            }
        }
    }

    fn call(&mut self, connection: u64, Call { id, request }: Call) {
        let waiter = (connection, id);
        let answer = match request {
            Request::Hello { after } => return self.hello(waiter, after),
            Request::StartContainer(spec) => match self.start(*spec, waiter) {
                Ok(()) => return,
                Err(fault) => Err(fault),
            },
            Request::Signal { container, signal } => self.signal(&container, signal).map(|()| Answer::Done),
            Request::Kill { container } => self.kill(&container).map(|()| Answer::Done),
            Request::Exec { container, spec } => match self.exec(&container, &spec, waiter) {
                Ok(()) => return,
                Err(fault) => Err(fault),
            },
            Request::Stop => return self.stop(waiter),
        };
        self.answer(waiter, answer);
    }

    fn answer(&mut self, (connection, id): Waiter, result: Result<Answer, Fault>) {
        let message = Message::Answer { id, result: result.map(Box::new) };
        if let Some(peer) = self.connections.get_mut(&connection)
            && let Err(error) = peer.send(&message)
        {
            eprintln!("answer: {error}");
            self.connections.remove(&connection);
        }
    }

    fn publish(&mut self, event: Event) {
        self.seq += 1;
        self.events.push_back((self.seq, event.clone()));
        if self.events.len() > SHIM_EVENTS_KEPT_MAX {
            self.events.pop_front();
        }
        let message = Message::Event { seq: self.seq, event };
        self.connections.retain(|_, peer| !peer.listening || peer.send(&message).is_ok());
    }

    fn hello(&mut self, waiter: Waiter, after: Option<u64>) {
        let containers = self.containers.iter().filter(|c| c.record.started.is_some());
        let snapshot = Snapshot {
            version: VERSION,
            seq: self.seq,
            init_pid: if self.holder_died { 0 } else { self.holder.pid },
            spec: self.boot.spec.clone(),
            containers: containers.map(|c| c.record.clone()).collect(),
        };
        self.answer(waiter, Ok(Answer::Hello(snapshot)));
        let Some(peer) = self.connections.get_mut(&waiter.0) else { return };
        peer.listening = true;
        let after = after.unwrap_or(u64::MAX);
        let missed = self.events.iter().filter(|(seq, _)| *seq > after);
        let sent = missed
            .into_iter()
            .try_for_each(|(seq, event)| peer.send(&Message::Event { seq: *seq, event: event.clone() }));
        if sent.is_err() {
            self.connections.remove(&waiter.0);
        }
    }

    /// The latest run of a container.
    fn find(&self, name: &str) -> Option<&Container> {
        self.containers.iter().rfind(|c| c.record.name == name)
    }

    fn running(&self, name: &str) -> Result<&Container, Fault> {
        self.find(name)
            .filter(|c| matches!(c.phase, Phase::Running))
            .ok_or_else(|| Fault::new(FaultKind::NotRunning, "container", name))
    }

    fn start(&mut self, spec: ContainerSpec, waiter: Waiter) -> Result<(), Fault> {
        if self.holder_died || self.stopping.is_some() {
            return Err(Fault::failed("sandbox", "the sandbox is ending"));
        }
        if let Some(old) = self.find(&spec.name)
            && (!matches!(old.phase, Phase::Ended) || spec.attempt <= old.record.attempt)
        {
            let what = format!("container {} (attempt {})", spec.name, old.record.attempt);
            return Err(Fault::new(FaultKind::Exists, "container", what));
        }
        let capabilities = capability::container_set(&spec.cap_add, &spec.cap_drop, spec.privileged)
            .map_err(|name| Fault::new(FaultKind::Invalid, "capabilities", format!("{name}: unknown")))?;
        let filtered = !spec.privileged && spec.seccomp == Seccomp::Default;
        self.compile(filtered, capabilities)?;
        let filter = if filtered { self.filters.get(&capabilities) } else { None };
        let container = Container::start(&self.boot, &self.holder, spec, (capabilities, filter), waiter)?;
        self.containers.push(container);
        Ok(())
    }

    fn compile(&mut self, wanted: bool, capabilities: u64) -> Result<(), Fault> {
        if wanted && !self.filters.contains_key(&capabilities) {
            let filter =
                seccomp::compile(capabilities).map_err(|e| Fault::failed("seccomp", e.to_string()))?;
            self.filters.insert(capabilities, filter);
        }
        Ok(())
    }

    fn signal(&self, name: &str, signal: i32) -> Result<(), Fault> {
        let container = self.running(name)?;
        sys::pidfd_signal(&container.process, signal).map_err(|e| Fault::io("signal", &e))
    }

    fn kill(&self, name: &str) -> Result<(), Fault> {
        let container = self.running(name)?;
        let killed = self.boot.hierarchies.kill(&container.group);
        killed.map_err(|e| Fault::failed(format!("kill: {e}"), e.source.to_string()))
    }

    fn exec(&mut self, name: &str, spec: &ExecSpec, waiter: Waiter) -> Result<(), Fault> {
        if self.execs.len() >= EXECS_PER_POD_MAX {
            return Err(Fault::failed("exec", "too many commands run in this pod"));
        }
        self.next_number += 1;
        let container = self.running(name)?;
        let filtered = !container.spec.privileged && container.spec.seccomp == Seccomp::Default;
        let filter = if filtered { self.filters.get(&container.capabilities) } else { None };
        let exec = Exec::start(&self.boot, container, filter, spec, self.next_number, waiter)?;
        self.execs.push(exec);
        Ok(())
    }

    fn stop(&mut self, waiter: Waiter) {
        let deadline = Instant::now() + Duration::from_millis(POD_KILL_TIMEOUT_MS);
        self.stopping = Some((waiter, deadline));
        report(self.boot.hierarchies.kill(&pod_group(&self.boot.spec)), "kill the pod");
    }

    /// Everything that a starting container's report says. A process that is killed before it executes
    /// the program says nothing, and counts as started and ended.
    fn check_start(&mut self, i: usize) {
        let container = &mut self.containers[i];
        let Phase::Starting { waiter, .. } = container.phase else { return };
        match container.poll_report() {
            Started::NotYet => {}
            Started::No(fault) => container.phase = Phase::Failed { waiter, fault },
            Started::Yes => {
                container.set_running();
                let answer = Answer::Container(container.record.clone());
                self.check_oom_score(i);
                self.answer(waiter, Ok(answer));
            }
        }
    }

    fn check_oom_score(&mut self, i: usize) {
        let container = &self.containers[i];
        let (wanted, pid) = (container.spec.oom_score_adj, container.record.pid);
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")) else { return };
        if !self.oom_score_refused && text.trim().parse() != Ok(wanted.clamp(-1000, 1000)) {
            self.oom_score_refused = true;
            eprintln!("oom_score_adj {wanted} refused (needs CAP_SYS_RESOURCE), {} stays", text.trim());
        }
    }

    /// Collects every child that ended.
    fn reap(&mut self) {
        loop {
            let (pid, status) = match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
                Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), Status { code, signal: None }),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    let signal = signal as i32;
                    (pid.as_raw(), Status { code: 128 + signal, signal: Some(signal) })
                }
                Ok(_) | Err(Errno::ECHILD) => return,
                Err(Errno::EINTR) => continue,
                Err(error) => return eprintln!("waitid: {error}"),
            };
            if let Some(i) = self.containers.iter().position(|c| c.record.pid == pid) {
                // The report may have come in the same moment.
                self.check_start(i);
                let container = &mut self.containers[i];
                container.record.pid = 0;
                if !matches!(container.phase, Phase::Failed { .. }) {
                    container.set_ended(status);
                }
                report(self.boot.hierarchies.kill(&self.containers[i].group), "kill what a container left");
            } else if let Some(exec) = self.execs.iter_mut().find(|e| e.pid == pid) {
                exec.set_ended(status);
                report(self.boot.hierarchies.kill(&exec.group), "kill what a command left");
            } else if pid == self.holder.pid {
                self.holder_ended();
            }
        }
    }

    fn holder_ended(&mut self) {
        self.holder_died = true;
        if self.stopping.is_none() {
            eprintln!("the process that holds the namespaces died");
            report(self.boot.hierarchies.kill(&pod_group(&self.boot.spec)), "kill the pod");
            self.publish(Event::HolderDied);
        }
    }

    /// Everything that is due: deadlines, ends, answers.
    fn settle(&mut self) {
        let now = Instant::now();
        for container in &mut self.containers {
            if matches!(container.phase, Phase::Starting { deadline, .. } if deadline <= now) {
                eprintln!("{}: did not start in time", container.record.name);
                report(self.boot.hierarchies.kill(&container.group), "kill a container that does not start");
                let later = now + Duration::from_millis(POD_KILL_TIMEOUT_MS);
                if let Phase::Starting { deadline, .. } = &mut container.phase {
                    *deadline = later;
                }
            }
        }
        while let Some(i) = self.containers.iter().position(Container::is_drained) {
            self.container_ended(i);
        }
        while let Some(i) = self.containers.iter().position(Container::is_failed) {
            self.start_failed(i);
        }
        self.forget_earlier_runs();
        self.settle_execs(now);
    }

    fn container_ended(&mut self, i: usize) {
        let container = &mut self.containers[i];
        let Phase::Draining { status, .. } = container.phase else { return };
        let oom_kills = self.boot.hierarchies.oom_kills(&container.group);
        let group = container.group.clone();
        let exit = container.finish(status, oom_kills);
        let (name, attempt) = (container.record.name.clone(), container.record.attempt);
        self.publish(Event::Exited { name, attempt, exit });
        self.remove_group(&group);
    }

    fn start_failed(&mut self, i: usize) {
        let container = self.containers.remove(i);
        self.remove_group(&container.group);
        if let Phase::Failed { waiter, fault } = container.phase {
            self.answer(waiter, Err(fault));
        }
    }

    /// A container's earlier run is kept until the next one has been started.
    fn forget_earlier_runs(&mut self) {
        let started = |c: &Container| c.record.started.map(|_| (c.record.name.clone(), c.record.attempt));
        let runs: Vec<(String, u32)> = self.containers.iter().filter_map(started).collect();
        self.containers.retain(|c| {
            let later = runs.iter().any(|(name, n)| *name == c.record.name && *n > c.record.attempt);
            !(later && matches!(c.phase, Phase::Ended))
        });
    }

    /// Processes that were just killed may take a moment to go.
    fn remove_group(&self, group: &std::path::Path) {
        let short = Duration::from_millis(100);
        let hierarchies = &self.boot.hierarchies;
        match hierarchies.wait_empty(group, short) {
            Ok(true) => report(hierarchies.remove(group), "remove a group"),
            Ok(false) => eprintln!("{}: processes do not end", group.display()),
            Err(error) => eprintln!("{error}"),
        }
    }

    fn settle_execs(&mut self, now: Instant) {
        let mut i = 0;
        while i < self.execs.len() {
            let exec = &mut self.execs[i];
            if exec.deadline <= now && exec.expire() {
                report(self.boot.hierarchies.kill(&exec.group), "kill a command");
            }
            match exec.outcome() {
                None => i += 1,
                Some(outcome) => {
                    let exec = self.execs.remove(i);
                    self.remove_group(&exec.group);
                    self.answer(exec.waiter, outcome.map(Answer::Exec));
                }
            }
        }
    }

    /// True once `Stop` is answered: everything ended, or the time for it passed.
    fn is_stopped(&mut self) -> bool {
        let Some((waiter, deadline)) = self.stopping else { return false };
        let ended = self.holder_died && self.containers.iter().all(|c| matches!(c.phase, Phase::Ended));
        if !ended && Instant::now() < deadline {
            return false;
        }
        let answer = if ended {
            Ok(Answer::Done)
        } else {
            Err(Fault::failed("stop", "some processes of the pod do not end"))
        };
        self.answer(waiter, answer);
        true
    }
}
