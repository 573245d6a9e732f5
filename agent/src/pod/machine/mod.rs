//! The life of one pod on this node, as a state machine over plain data. Inputs are what happened
//! (`desired`, `vanished`, `outcome`, `exited`, `sandbox_died`, `probed`), and `step` answers with what
//! to do now and when to ask again.
//!
//! Invariants, held by `tests.rs` under random schedules: at most one start of a container is under way;
//! no main container starts before every init container is done; nothing starts once the pod is being
//! deleted or has ended; a phase that is final is never left; the sandbox of a pod that ended goes only
//! after its last status was accepted by the API.

mod adopt;
#[cfg(test)]
mod random_tests;
mod step;
mod stop;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::Arc;

use super::backoff::Backoff;
use super::model::{Container, Millis, Pod, RestartPolicy};
use super::probe::{ProbeKind, ProbeResult, Tally, Verdict};
use super::{refuse, resources};

pub use adopt::{Adopted, AdoptedRun, Memory, UnitMemory};
pub use stop::Stop;

/// How a run of a container ended.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Exit {
    /// Exit status, or 128 + signal.
    pub code: i32,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// `Completed`, `Error`, `OOMKilled`, `StartError` or `ContainerStatusUnknown`.
    pub reason: String,
    /// What it left as termination message, or why it did not start.
    pub message: String,
    /// When.
    pub finished_at: Millis,
}

/// A run of a container that was started.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Started {
    /// Counts the runs, from 0.
    pub attempt: u32,
    /// The runtime's id; empty if it was never executed.
    pub id: String,
    /// As the pod named it then.
    pub image: String,
    /// Digest of the image's configuration.
    pub image_id: String,
    /// When its program was executed.
    pub started_at: Millis,
}

/// A run of a container that ended.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Ended {
    /// The run.
    pub run: Started,
    /// Its end.
    pub exit: Exit,
}

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Run {
    /// Not started, or not again.
    None,
    /// A start is under way; an exit that was reported before the start was is kept here.
    Starting {
        /// The run being started.
        attempt: u32,
        /// It ended already.
        early_exit: Option<Exit>,
    },
    /// It runs.
    Running(Started),
    /// It ran.
    Ended(Ended),
}

/// What part a container has in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs to its end before the next one starts.
    Init,
    /// An init container that keeps running.
    Sidecar,
    /// One of `spec.containers`.
    Main,
}

/// Why a container does not run yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// As in `state.waiting.reason`.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// Progress of a container's postStart hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PostStart {
    Due,
    Running,
    Done,
}

/// One container and everything remembered of it.
#[derive(Debug, Clone)]
pub struct Unit {
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) run: Run,
    pub(super) last: Option<Ended>,
    pub(super) next_attempt: u32,
    pub(super) backoff: Backoff,
    pub(super) prepare: Backoff,
    pub(super) not_before: Millis,
    pub(super) waiting: Option<Waiting>,
    pub(super) stop: Option<Stop>,
    pub(super) post_start: PostStart,
    pub(super) startup: Tally,
    pub(super) liveness: Tally,
    pub(super) readiness: Tally,
}

/// The pod's namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sandbox {
    None,
    Starting,
    Up { attached: bool },
    Dead,
    Removing,
}

/// A step that is done once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Once {
    Todo,
    UnderWay,
    Done,
}

/// How a pod ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// True for `Succeeded`.
    pub succeeded: bool,
    /// `status.reason`; empty where the containers tell enough.
    pub reason: String,
    /// `status.message`.
    pub message: String,
}

/// An event to be shown to people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// `Warning` or `Normal`.
    pub warning: bool,
    /// As in `reason` of an Event.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// Which container it is about.
    pub container: Option<String>,
}

/// Which hook of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Right after its start.
    PostStart,
    /// Before TERM.
    PreStop,
}

/// What is to be done. Each is answered by one [`Outcome`], except `Note`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Make the namespaces.
    StartSandbox,
    /// Connect them to the network.
    Attach,
    /// Make what the volumes need.
    SetUpVolumes,
    /// Start a run of a container.
    Start {
        /// Which.
        container: String,
        /// Its run.
        attempt: u32,
    },
    /// Run a hook, at most this long.
    RunHook {
        /// Of which container.
        container: String,
        /// Its run.
        attempt: u32,
        /// Which hook.
        hook: Hook,
        /// Milliseconds.
        timeout_ms: Millis,
    },
    /// Ask a container to end (the image's stop signal). Not answered.
    Terminate {
        /// Which.
        container: String,
    },
    /// Kill every process of a container. Not answered.
    Kill {
        /// Which.
        container: String,
    },
    /// Remove dead namespaces and their network, so that new ones can be made.
    RemoveSandbox,
    /// Remove everything of the pod from the node but its logs.
    TearDown,
    /// Remove the object from the API.
    DeleteObject,
    /// Show an event. Not answered.
    Note(Note),
}

/// Why a container did not start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartFailure {
    /// The image is not on this node.
    NoImage {
        /// The pod says `imagePullPolicy: Never`.
        never_pull: bool,
        /// Names the image and what to do.
        message: String,
    },
    /// Something that the container refers to is missing.
    Config(String),
    /// Its root filesystem, mounts or cgroup could not be made.
    Create(String),
    /// Its program could not be executed.
    Exec(String),
}

/// What became of an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Of `StartSandbox`.
    SandboxStarted(Result<(), String>),
    /// Of `Attach`.
    Attached(Result<Vec<IpAddr>, String>),
    /// Of `SetUpVolumes`.
    VolumesReady(Result<(), String>),
    /// Of `Start`.
    Started {
        /// Which.
        container: String,
        /// The run, and its end if it ended already.
        result: Result<(Started, Option<Exit>), StartFailure>,
        /// What people may want to know of a start that worked.
        notes: Vec<Note>,
    },
    /// Of `RunHook`.
    HookDone {
        /// Of which container.
        container: String,
        /// Its run.
        attempt: u32,
        /// Which hook.
        hook: Hook,
        /// What it said if it failed.
        result: Result<(), String>,
    },
    /// Of `RemoveSandbox`.
    SandboxRemoved(Result<(), String>),
    /// Of `TearDown`.
    TornDown(Result<(), String>),
    /// Of `DeleteObject`.
    ObjectDeleted(Result<(), String>),
}

/// A probe that should be running now.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProbeTarget {
    /// Of which container.
    pub container: String,
    /// Which run of it.
    pub attempt: u32,
    /// Which question.
    pub kind: ProbeKind,
    /// Nothing depends on the pace of failures yet: ask as soon as an answer can have changed.
    pub eager: bool,
}

/// What to do now, and when to ask again at the latest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// In this order; none waits for another.
    pub actions: Vec<Action>,
    /// When time alone changes the answer.
    pub wake_at: Option<Millis>,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Machine {
    pub(super) pod: Arc<Pod>,
    /// The API still has it.
    pub(super) present: bool,
    /// The API wants it gone; seconds of grace.
    pub(super) deleting: Option<i64>,
    pub(super) ending: Option<Ending>,
    pub(super) refusal: Option<refuse::Refusal>,
    pub(super) sandbox: Sandbox,
    /// An answer to `Attach` is awaited, whatever became of the sandbox.
    pub(super) attaching: bool,
    pub(super) volumes: Once,
    pub(super) ips: Vec<IpAddr>,
    pub(super) units: Vec<Unit>,
    pub(super) initialized: bool,
    pub(super) start_time: Millis,
    pub(super) prepare: Backoff,
    pub(super) prepare_at: Millis,
    pub(super) prepare_error: Option<String>,
    pub(super) final_status_accepted: bool,
    pub(super) tear_down: Once,
    pub(super) delete: Once,
    pub(super) finished: bool,
    pub(super) notes: Vec<Note>,
    /// Status and last change of each condition of ours.
    pub(super) conditions: Vec<(&'static str, bool, Millis)>,
}

impl Unit {
    fn new(container: &Container, role: Role) -> Self {
        Unit {
            name: container.name.clone(),
            role,
            run: Run::None,
            last: None,
            next_attempt: 0,
            backoff: Backoff::default(),
            prepare: Backoff::default(),
            not_before: 0,
            waiting: None,
            stop: None,
            post_start: PostStart::Done,
            startup: Tally::starting_at(Verdict::Undecided),
            liveness: Tally::starting_at(Verdict::Passing),
            readiness: Tally::starting_at(Verdict::Undecided),
        }
    }

    pub(super) fn running(&self) -> Option<&Started> {
        match &self.run {
            Run::Running(started) => Some(started),
            _ => None,
        }
    }

    pub(super) fn ended(&self) -> Option<&Ended> {
        match &self.run {
            Run::Ended(ended) => Some(ended),
            _ => None,
        }
    }

    /// It runs or is about to: its sandbox must stay.
    fn busy(&self) -> bool {
        matches!(self.run, Run::Running(_) | Run::Starting { .. })
    }

    /// Restarts as `status` counts them.
    pub(super) fn restart_count(&self) -> u32 {
        self.next_attempt.saturating_sub(1)
    }

    /// Started in the API's sense: past its postStart hook and its startup probe.
    pub(super) fn is_started(&self, spec: &Container) -> bool {
        self.running().is_some()
            && self.post_start == PostStart::Done
            && (spec.startup_probe.is_none() || self.startup.verdict() == Verdict::Passing)
    }

    /// May get traffic, as far as its own probes say.
    pub(super) fn is_ready(&self, spec: &Container) -> bool {
        self.is_started(spec)
            && (spec.readiness_probe.is_none() || self.readiness.verdict() == Verdict::Passing)
    }

    fn reset_probes(&mut self) {
        self.startup = Tally::starting_at(Verdict::Undecided);
        self.liveness = Tally::starting_at(Verdict::Passing);
        self.readiness = Tally::starting_at(Verdict::Undecided);
    }
}

impl Machine {
    /// A pod that this node has not seen yet.
    pub fn new(pod: Arc<Pod>, now: Millis) -> Self {
        let role = |c: &Container| if c.is_sidecar() { Role::Sidecar } else { Role::Init };
        let inits = pod.spec.init_containers.iter().map(|c| Unit::new(c, role(c)));
        let mains = pod.spec.containers.iter().map(|c| Unit::new(c, Role::Main));
        let units = inits.chain(mains).collect();
        let refusal = refuse::check(&pod.spec);
        let mut notes = Vec::new();
        if let Some(refusal) = &refusal {
            notes.push(Note {
                warning: true,
                reason: refusal.reason,
                message: refusal.message.clone(),
                container: None,
            });
        }
        Machine {
            deleting: pod.deletion.map(|deletion| deletion.grace_s),
            pod,
            present: true,
            ending: None,
            refusal,
            sandbox: Sandbox::None,
            attaching: false,
            volumes: Once::Todo,
            ips: Vec::new(),
            units,
            initialized: false,
            start_time: now,
            prepare: Backoff::default(),
            prepare_at: 0,
            prepare_error: None,
            final_status_accepted: false,
            tear_down: Once::Todo,
            delete: Once::Todo,
            finished: false,
            notes,
            conditions: Vec::new(),
        }
    }

    /// A pod that the node has no room for: it fails without having run.
    pub fn reject(&mut self, rejection: &resources::Rejection) {
        self.note(true, rejection.reason, rejection.message.clone(), None);
        self.ending.get_or_insert(Ending {
            succeeded: false,
            reason: rejection.reason.to_owned(),
            message: format!("the node did not take the pod: {}", rejection.message),
        });
    }

    /// The pod, as last seen.
    pub fn pod(&self) -> &Arc<Pod> {
        &self.pod
    }

    /// The pod's addresses, as far as they are known.
    pub fn ips(&self) -> &[IpAddr] {
        &self.ips
    }

    /// Nothing of the pod is left on the node and nothing is left to be said about it.
    pub fn finished(&self) -> bool {
        self.finished
    }

    /// Whether the pod still holds the resources that it asked for.
    pub fn holds_resources(&self) -> bool {
        !(self.finished || self.ending.is_some() && self.tear_down == Once::Done)
    }

    /// Whether something still runs or is being started or removed on the node.
    pub fn occupied(&self) -> bool {
        self.sandbox != Sandbox::None || self.units.iter().any(Unit::busy)
    }

    /// The API shows a new version of the pod.
    pub fn desired(&mut self, pod: Arc<Pod>, now: Millis) {
        if let Some(deletion) = pod.deletion {
            self.wind_down(deletion.grace_s, now);
        }
        if !self.winding_down() {
            let changed: Vec<(usize, String)> = (0..self.units.len())
                .filter(|i| self.units[*i].running().is_some())
                .filter_map(|i| {
                    let (old, new) = (self.spec_of(i)?, find(&pod, &self.units[i].name)?);
                    (old.image != new.image).then(|| (i, new.image.clone()))
                })
                .collect();
            for (i, image) in changed {
                let why = format!("the image is now {image}; the container will be restarted");
                self.kill(i, self.pod.spec.termination_grace_period_seconds, why, now);
            }
        }
        self.pod = pod;
    }

    /// The API does not have the pod any more. `grace_s` is what it was deleted with, if that is known.
    pub fn vanished(&mut self, grace_s: Option<i64>, now: Millis) {
        self.present = false;
        let spec = self.pod.spec.termination_grace_period_seconds;
        let grace_s = grace_s.or(self.deleting).unwrap_or(spec);
        self.wind_down(grace_s, now);
    }

    fn wind_down(&mut self, grace_s: i64, now: Millis) {
        let shorter = self.deleting.is_none_or(|known| grace_s < known);
        if shorter {
            if self.deleting.is_none() {
                self.prepare_at = now;
                self.prepare.reset();
            }
            self.deleting = Some(grace_s);
            for i in 0..self.units.len() {
                if self.units[i].stop.is_some() {
                    self.shorten(i, grace_s, now);
                }
            }
        }
    }

    /// Nothing is to be started any more.
    pub(super) fn winding_down(&self) -> bool {
        self.deleting.is_some() || self.ending.is_some()
    }

    /// A status that says how everything ended was accepted by the API.
    pub fn final_status_accepted(&mut self) {
        self.final_status_accepted = true;
    }

    /// Whether the status would now say how everything ended.
    pub fn status_is_final(&self) -> bool {
        self.winding_down() && !self.units.iter().any(Unit::busy) && self.sandbox != Sandbox::Starting
    }

    /// A container ended.
    pub fn exited(&mut self, container: &str, attempt: u32, exit: Exit, now: Millis) {
        let Some(i) = self.index(container) else { return };
        match &mut self.units[i].run {
            Run::Starting { attempt: starting, early_exit } if *starting == attempt => {
                *early_exit = Some(exit);
            }
            Run::Running(started) if started.attempt == attempt => {
                let run = started.clone();
                self.end(i, Ended { run, exit }, now);
            }
            _ => {}
        }
    }

    fn end(&mut self, i: usize, ended: Ended, now: Millis) {
        let unit = &mut self.units[i];
        let ran = ended.exit.finished_at - ended.run.started_at;
        unit.not_before = now + unit.backoff.after_exit(ran);
        unit.run = Run::Ended(ended);
        unit.stop = None;
        unit.post_start = PostStart::Done;
        unit.reset_probes();
    }

    /// The namespaces are lost, and with them every container.
    pub fn sandbox_died(&mut self, now: Millis) {
        if matches!(self.sandbox, Sandbox::None | Sandbox::Removing) {
            return;
        }
        self.sandbox = Sandbox::Dead;
        for i in 0..self.units.len() {
            if let Run::Running(started) = &self.units[i].run {
                let run = started.clone();
                let exit = lost_exit(now, "the pod's namespaces were lost");
                self.end(i, Ended { run, exit }, now);
            }
        }
        if !self.winding_down() {
            let message = "the pod's namespaces were lost; they are made anew and its containers restarted";
            self.note(false, "SandboxChanged", message.to_owned(), None);
        }
    }

    /// A probe was answered.
    pub fn probed(&mut self, target: &ProbeTarget, result: &ProbeResult, now: Millis) {
        let Some(i) = self.index(&target.container) else { return };
        let Some(spec) = self.spec_of(i) else { return };
        let (probe, grace) = match target.kind {
            ProbeKind::Startup => (spec.startup_probe.clone(), true),
            ProbeKind::Liveness => (spec.liveness_probe.clone(), true),
            ProbeKind::Readiness => (spec.readiness_probe.clone(), false),
        };
        let Some(probe) = probe else { return };
        let unit = &mut self.units[i];
        let Some(started_at) = unit.running().filter(|r| r.attempt == target.attempt).map(|r| r.started_at)
        else {
            return;
        };
        let tally = match target.kind {
            ProbeKind::Startup => &mut unit.startup,
            ProbeKind::Liveness => &mut unit.liveness,
            ProbeKind::Readiness => &mut unit.readiness,
        };
        let change = tally.count(result, &probe);
        let settled = started_at + resources::seconds(probe.initial_delay_seconds + probe.period_seconds);
        if let ProbeResult::Failure(output) | ProbeResult::Unknown(output) = result
            && (!target.eager || now >= settled)
        {
            let verb = if matches!(result, ProbeResult::Failure(_)) { "failed" } else { "errored" };
            let message = format!("{} probe {verb}: {output}", target.kind.as_str());
            self.note(true, "Unhealthy", message, Some(i));
        }
        if grace && change == Some(Verdict::Failing) && !self.winding_down() {
            let pod_grace = self.pod.spec.termination_grace_period_seconds;
            let grace_s = probe.termination_grace_period_seconds.unwrap_or(pod_grace);
            let name = target.kind.as_str().to_lowercase();
            self.kill(i, grace_s, format!("the {name} probe failed; the container will be restarted"), now);
        }
    }

    /// The probes that should be running.
    pub fn probes(&self) -> Vec<ProbeTarget> {
        let mut targets = Vec::new();
        for (i, unit) in self.units.iter().enumerate() {
            let (Some(spec), Some(run)) = (self.spec_of(i), unit.running()) else { continue };
            let mut add = |kind, eager| {
                targets.push(ProbeTarget { container: unit.name.clone(), attempt: run.attempt, kind, eager });
            };
            let being_stopped = unit.stop.is_some() || self.winding_down();
            if unit.is_started(spec) {
                if spec.liveness_probe.is_some() && !being_stopped {
                    add(ProbeKind::Liveness, false);
                }
                if spec.readiness_probe.is_some() {
                    add(ProbeKind::Readiness, unit.readiness.verdict() == Verdict::Undecided);
                }
            } else if spec.startup_probe.is_some()
                && unit.post_start == PostStart::Done
                && !being_stopped
                && unit.startup.verdict() == Verdict::Undecided
            {
                add(ProbeKind::Startup, false);
            }
        }
        targets
    }

    pub(super) fn note(&mut self, warning: bool, reason: &'static str, message: String, unit: Option<usize>) {
        let container = unit.and_then(|i| self.units.get(i)).map(|unit| unit.name.clone());
        self.notes.push(Note { warning, reason, message, container });
    }

    pub(super) fn index(&self, container: &str) -> Option<usize> {
        self.units.iter().position(|unit| unit.name == container)
    }

    pub(super) fn spec_of(&self, i: usize) -> Option<&Container> {
        find(&self.pod, &self.units.get(i)?.name)
    }

    /// Whether a run of this container that ended so is followed by another.
    pub(super) fn restarts(&self, i: usize, exit_code: i32) -> bool {
        match (self.units[i].role, self.pod.spec.restart_policy) {
            (Role::Sidecar, _) => true,
            (Role::Init, RestartPolicy::Never) => false,
            (Role::Init, _) => exit_code != 0,
            (Role::Main, RestartPolicy::Always | RestartPolicy::Unknown) => true,
            (Role::Main, RestartPolicy::OnFailure) => exit_code != 0,
            (Role::Main, RestartPolicy::Never) => false,
        }
    }
}

/// The end of a run whose status nobody could collect.
pub(super) fn lost_exit(now: Millis, message: &str) -> Exit {
    Exit {
        code: 137,
        signal: None,
        reason: "ContainerStatusUnknown".to_owned(),
        message: message.to_owned(),
        finished_at: now,
    }
}

pub(crate) fn find<'a>(pod: &'a Pod, container: &str) -> Option<&'a Container> {
    let mut all = pod.spec.init_containers.iter().chain(&pod.spec.containers);
    all.find(|spec| spec.name == container)
}
