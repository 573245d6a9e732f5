//! One pod's worker: feeds the machine what happens, carries out what it asks for, keeps its probes
//! running and its status told. It decides nothing; it sleeps until something happens.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::act::{Made, Means};
use super::machine::{Action, Machine, Memory, Outcome, ProbeTarget};
use super::model::{Millis, Pod, Probe};
use super::probe::{ProbeKind, ProbeResult};
use super::prober::Place;
use super::registry::{Entry, Registry};
use super::{machine, resources, status};
use crate::cluster::events::{Recorder, Subject};
use crate::cluster::{ApiError, chain};
use crate::limits;
use crate::runtime;
use crate::server::metrics::Metrics;

/// Wall clock that does not jump while the agent runs.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    wall: Millis,
    since: Instant,
}

impl Clock {
    /// A clock set by the wall clock now.
    pub fn start() -> Self {
        Clock { wall: jiff::Timestamp::now().as_millisecond(), since: Instant::now() }
    }

    /// Milliseconds since the epoch.
    pub fn now(&self) -> Millis {
        self.wall.saturating_add(Millis::try_from(self.since.elapsed().as_millis()).unwrap_or(Millis::MAX))
    }

    fn instant(&self, at: Millis) -> Instant {
        let ahead = u64::try_from(at - self.wall).unwrap_or(0);
        // A minute too early is harmless: the machine is asked again.
        self.since + Duration::from_millis(ahead.min(u64::from(u32::MAX)))
    }
}

/// What a worker is told.
#[derive(Debug)]
pub enum Input {
    /// The API shows this.
    Desired(Arc<Pod>),
    /// The API does not have the pod any more; the grace it was deleted with.
    Vanished(Option<i64>),
    /// A container ended.
    Exited {
        /// Which.
        name: String,
        /// Its run.
        attempt: u32,
        /// How.
        exit: runtime::Exit,
    },
    /// The namespaces are lost.
    SandboxDied,
    /// A probe was answered.
    Probed(ProbeTarget, ProbeResult),
    /// Compare with what the runtime has.
    Resync,
}

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    /// For acting.
    pub means: Arc<Means>,
    /// For events.
    pub recorder: Recorder,
    /// For counting.
    pub metrics: Metrics,
    /// For readers.
    pub registry: Registry,
    /// For successors: a file a pod.
    pub memory_dir: PathBuf,
    /// For all.
    pub clock: Clock,
}

enum Done {
    Acted { outcome: Option<Outcome>, quick: bool },
    Published { result: Result<(), ApiError>, status: Value, is_final: bool },
    Looked(Option<runtime::PodRecord>),
}

/// See the module.
pub struct Worker {
    shared: Arc<Shared>,
    machine: Machine,
    inbox: mpsc::UnboundedReceiver<Input>,
    /// Probes answer here.
    own: mpsc::UnboundedSender<Input>,
    acting: FuturesUnordered<BoxFuture<'static, Done>>,
    made: Arc<Made>,
    /// Starts under way, and since when: a status in between is worth telling only if they take long.
    quick: usize,
    quick_since: Instant,
    probes: HashMap<ProbeTarget, AbortOnDrop>,
    spread_probes: bool,
    accepted: Option<Arc<str>>,
    publishing: bool,
    publish_at: Instant,
    publish_pause: Duration,
    memory: Memory,
    first_seen: Option<Instant>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("pod", &self.machine.pod().key()).finish_non_exhaustive()
    }
}

const QUICK: Duration = Duration::from_millis(limits::STATUS_HOLD_MS);

impl Worker {
    /// A worker for a machine. `adopted` says that the pod ran before this agent did.
    pub fn new(
        shared: Arc<Shared>,
        machine: Machine,
        inbox: mpsc::UnboundedReceiver<Input>,
        own: mpsc::UnboundedSender<Input>,
        adopted: bool,
    ) -> Self {
        let now = Instant::now();
        Worker {
            memory: Memory::default(),
            shared,
            machine,
            inbox,
            own,
            acting: FuturesUnordered::new(),
            made: Arc::default(),
            quick: 0,
            quick_since: now,
            probes: HashMap::new(),
            spread_probes: adopted,
            accepted: None,
            publishing: false,
            publish_at: now,
            publish_pause: Duration::from_millis(limits::API_RETRY_FIRST_MS),
            first_seen: (!adopted).then_some(now),
        }
    }

    /// Works until nothing is left of the pod.
    pub async fn run(mut self) {
        loop {
            let wake_at = self.turn();
            if self.machine.finished() && self.acting.is_empty() {
                break;
            }
            let publish_at = self.publish();
            let wake =
                [wake_at.map(|at| self.shared.clock.instant(at)), publish_at].into_iter().flatten().min();
            let sleep = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(done) = self.acting.next(), if !self.acting.is_empty() => self.done(done),
                input = self.inbox.recv() => match input {
                    Some(input) => self.input(input),
                    None => return,
                },
                () = sleep => {}
            }
            while let Ok(input) = self.inbox.try_recv() {
                self.input(input);
            }
        }
        self.leave().await;
    }

    async fn leave(&mut self) {
        let pod = self.machine.pod().clone();
        self.probes.clear();
        self.shared.registry.remove(&pod.uid);
        let file = self.memory_file();
        if let Err(error) = std::fs::remove_file(&file)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(file = %file.display(), %error, "removing what was remembered of a pod");
        }
        if let Err(error) = self.shared.means.runtime.remove_logs(&pod.namespace, &pod.name, &pod.uid).await {
            tracing::warn!(pod = pod.key(), error = chain(&error), "removing the pod's logs");
        }
        tracing::info!(pod = pod.key(), uid = pod.uid, "pod gone");
    }

    fn memory_file(&self) -> PathBuf {
        self.shared.memory_dir.join(format!("{}.json", self.machine.pod().uid))
    }

    /// Asks the machine and sets everything going that it asks for.
    fn turn(&mut self) -> Option<Millis> {
        let now = self.shared.clock.now();
        let step = self.machine.step(now);
        for action in step.actions {
            match action {
                Action::Note(note) => {
                    let pod = self.machine.pod();
                    let is_init = note.container.as_ref().is_some_and(|name| {
                        pod.spec.init_containers.iter().any(|container| &container.name == name)
                    });
                    tracing::debug!(pod = pod.key(), reason = note.reason, message = note.message, "event");
                    self.shared.recorder.record(subject(pod), note, is_init);
                }
                action => self.begin(action),
            }
        }
        self.sync_probes();
        self.save_memory();
        self.observe_ready();
        step.wake_at
    }

    fn begin(&mut self, action: Action) {
        let quick = matches!(
            action,
            Action::StartSandbox | Action::Attach | Action::SetUpVolumes | Action::Start { .. }
        );
        if quick {
            if self.quick == 0 {
                self.quick_since = Instant::now();
            }
            self.quick += 1;
        }
        let restart = matches!(&action, Action::Start { attempt, .. } if *attempt > 0);
        if restart {
            self.shared.metrics.restarts.inc();
        }
        let is_start = matches!(action, Action::Start { .. });
        let (means, metrics) = (self.shared.means.clone(), self.shared.metrics.clone());
        let (pod, ips) = (self.machine.pod().clone(), self.machine.ips().to_vec());
        let made = self.made.clone();
        self.acting.push(Box::pin(async move {
            let begun = Instant::now();
            let outcome = means.act(pod, ips, made, action).await;
            if is_start {
                metrics.container_start.observe(begun.elapsed().as_secs_f64());
            }
            Done::Acted { outcome, quick }
        }));
    }

    fn done(&mut self, done: Done) {
        let now = self.shared.clock.now();
        match done {
            Done::Acted { outcome, quick } => {
                self.quick -= usize::from(quick);
                if let Some(outcome) = outcome {
                    self.machine.outcome(outcome, now);
                }
            }
            Done::Published { result, status, is_final } => self.published(result, &status, is_final, now),
            Done::Looked(record) => self.compare(record, now),
        }
    }

    fn input(&mut self, input: Input) {
        let now = self.shared.clock.now();
        match input {
            Input::Desired(pod) => self.machine.desired(pod, now),
            Input::Vanished(grace_s) => self.machine.vanished(grace_s, now),
            Input::Exited { name, attempt, exit } => {
                let exit = self.shared.means.exit(self.machine.pod(), &name, attempt, &exit);
                self.machine.exited(&name, attempt, exit, now);
            }
            Input::SandboxDied => self.machine.sandbox_died(now),
            Input::Probed(target, result) => {
                self.shared.metrics.probed(target.kind, &result);
                self.machine.probed(&target, &result, now);
            }
            Input::Resync => {
                let (means, pod, made) =
                    (self.shared.means.clone(), self.machine.pod().clone(), self.made.clone());
                if !self.machine.occupied() {
                    return;
                }
                self.acting.push(Box::pin(async move {
                    if let Err(error) = means.set_up_volumes(&pod, &made).await {
                        tracing::warn!(pod = pod.key(), error, "bringing volumes up to date");
                    }
                    Done::Looked(means.runtime.pod(&pod.uid).await)
                }));
            }
        }
    }

    /// Repairs what an event was lost for.
    fn compare(&mut self, record: Option<runtime::PodRecord>, now: Millis) {
        let pod = self.machine.pod().clone();
        match record {
            Some(record) if record.state == runtime::PodState::Ready => {
                for container in record.containers {
                    if let Some(exit) = &container.exit {
                        let exit = self.shared.means.exit(&pod, &container.name, container.attempt, exit);
                        self.machine.exited(&container.name, container.attempt, exit, now);
                    }
                }
            }
            _ if self.machine.sandbox_up() => {
                tracing::warn!(pod = pod.key(), "the runtime lost the pod's sandbox without saying so");
                self.machine.sandbox_died(now);
            }
            _ => {}
        }
    }

    /// Tells the status if it changed and nothing more is about to change at once. Returns when to try
    /// again if it was not told.
    fn publish(&mut self) -> Option<Instant> {
        let now = self.shared.clock.now();
        let status = self.machine.status(&self.shared.means.node.ips, now);
        self.show(&status);
        if self.publishing || !self.machine.is_present() {
            return None;
        }
        let is_final = self.machine.status_is_final();
        let accepted: Option<Value> =
            self.accepted.as_ref().and_then(|accepted| serde_json::from_str(accepted).ok());
        let unreported_end = is_final && !self.machine.is_final_status_accepted();
        let patch = status::difference(accepted.as_ref(), &status);
        if patch.is_none() && !unreported_end {
            return None;
        }
        let hold = if self.quick > 0 { self.quick_since + QUICK } else { Instant::now() };
        let due = hold.max(self.publish_at);
        if due > Instant::now() {
            return Some(due);
        }
        self.publishing = true;
        let (means, pod) = (self.shared.means.clone(), self.machine.pod().clone());
        let patch = patch.unwrap_or_else(|| status.clone());
        self.acting.push(Box::pin(async move {
            let result = means.api.patch_pod_status(&pod.namespace, &pod.name, &pod.uid, &patch).await;
            Done::Published { result, status, is_final }
        }));
        None
    }

    fn published(&mut self, result: Result<(), ApiError>, status: &Value, is_final: bool, now: Millis) {
        self.publishing = false;
        match result {
            Ok(()) => {
                self.shared.metrics.status_reports.inc();
                self.accepted = Some(status.to_string().into());
                self.publish_pause = Duration::from_millis(limits::API_RETRY_FIRST_MS);
                if is_final && self.machine.status_is_final() {
                    self.machine.final_status_accepted();
                }
            }
            Err(error) if error.is_gone() => {
                tracing::debug!(pod = self.machine.pod().key(), error = chain(&error), "the pod is gone");
                self.machine.vanished(None, now);
            }
            Err(error) => {
                if self.publish_pause == Duration::from_millis(limits::API_RETRY_FIRST_MS) {
                    let pod = self.machine.pod().key();
                    tracing::warn!(pod, error = chain(&error), "telling the pod's status; will try again");
                }
                self.publish_at = Instant::now() + self.publish_pause;
                self.publish_pause = (self.publish_pause * 2).min(limits::secs(limits::API_RETRY_MAX_S));
            }
        }
    }

    fn show(&self, status: &Value) {
        let pod = self.machine.pod();
        let entry = Entry {
            pod: pod.clone(),
            status: status.to_string().into(),
            holds: self.machine.holds_resources().then(|| resources::of_pod(&pod.spec)),
            running: self.machine.running_count(),
        };
        self.shared.registry.set(&pod.uid, entry);
    }

    fn observe_ready(&mut self) {
        if self.machine.is_ready()
            && let Some(seen) = self.first_seen.take()
        {
            self.shared.metrics.pod_start.observe(seen.elapsed().as_secs_f64());
        }
    }

    fn save_memory(&mut self) {
        let memory = self.machine.memory();
        if memory == self.memory {
            return;
        }
        let file = self.memory_file();
        let fresh = file.with_extension("json.tmp");
        let write = || -> std::io::Result<()> {
            std::fs::write(&fresh, serde_json::to_vec(&memory)?)?;
            std::fs::rename(&fresh, &file)
        };
        if let Err(error) = write() {
            tracing::warn!(file = %file.display(), %error, "writing down what a successor needs");
        }
        self.memory = memory;
    }

    fn sync_probes(&mut self) {
        let wanted = self.machine.probes();
        let same_question = |a: &ProbeTarget, b: &ProbeTarget| {
            a.container == b.container && a.attempt == b.attempt && a.kind == b.kind
        };
        let mut goes_on = Vec::new();
        self.probes.retain(|target, _| {
            let keep = wanted.contains(target);
            if !keep {
                goes_on.extend(wanted.iter().find(|next| same_question(next, target)).cloned());
            }
            keep
        });
        for target in wanted {
            if self.probes.contains_key(&target) {
                continue;
            }
            let pod = self.machine.pod();
            let Some(container) = machine::find(pod, &target.container).cloned() else { continue };
            let probe = match target.kind {
                ProbeKind::Startup => container.startup_probe.clone(),
                ProbeKind::Liveness => container.liveness_probe.clone(),
                ProbeKind::Readiness => container.readiness_probe.clone(),
            };
            let Some(probe) = probe else { continue };
            let period = seconds(probe.period_seconds).max(Duration::from_secs(1));
            let ran_ms = self.shared.clock.now() - self.machine.started_at(&target.container).unwrap_or(0);
            let ran = Duration::from_millis(u64::try_from(ran_ms).unwrap_or(0));
            let delay = if goes_on.contains(&target) {
                period
            } else if self.spread_probes && !target.eager {
                spread(&pod.uid, &target, period)
            } else {
                seconds(probe.initial_delay_seconds).saturating_sub(ran)
            };
            let place = self.shared.means.place(pod, self.machine.ips());
            let asking = Asking {
                means: self.shared.means.clone(),
                target: target.clone(),
                probe,
                container: Arc::new(container),
                place,
                answers: self.own.clone(),
            };
            let task = tokio::spawn(asking.run(delay, period));
            self.probes.insert(target, AbortOnDrop(task));
        }
        self.spread_probes = false;
    }
}

/// A task that ends with whoever wanted it.
#[derive(Debug)]
pub(super) struct AbortOnDrop(pub(super) tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Asks one question again and again.
struct Asking {
    means: Arc<Means>,
    target: ProbeTarget,
    probe: Probe,
    container: Arc<super::model::Container>,
    place: Place,
    answers: mpsc::UnboundedSender<Input>,
}

impl Asking {
    async fn run(self, delay: Duration, period: Duration) {
        tokio::time::sleep(delay).await;
        let timeout = seconds(self.probe.timeout_seconds).max(Duration::from_secs(1));
        let eager = Duration::from_millis(limits::PROBE_EAGER_FIRST_MS);
        let mut pause = if self.target.eager { eager.min(period) } else { period };
        loop {
            let asked = Instant::now();
            let result =
                self.means.prober.probe(&self.place, &self.container, &self.probe.handler, timeout).await;
            if self.answers.send(Input::Probed(self.target.clone(), result)).is_err() {
                return;
            }
            tokio::time::sleep_until(asked + pause).await;
            pause = pause.saturating_mul(2).min(period);
        }
    }
}

/// A pause that differs from probe to probe, so that after a restart of the agent not all of them come
/// at once.
fn spread(uid: &str, target: &ProbeTarget, period: Duration) -> Duration {
    let mut hasher = DefaultHasher::new();
    (uid, target).hash(&mut hasher);
    let period_ms = u64::try_from(period.as_millis()).unwrap_or(u64::MAX).max(1);
    Duration::from_millis(hasher.finish() % period_ms)
}

fn seconds(s: i64) -> Duration {
    Duration::from_secs(u64::try_from(s).unwrap_or(0))
}

/// A pod as the subject of events.
pub fn subject(pod: &Pod) -> Subject {
    Subject { kind: "Pod", namespace: pod.namespace.clone(), name: pod.name.clone(), uid: pod.uid.clone() }
}

impl Machine {
    fn sandbox_up(&self) -> bool {
        matches!(self.sandbox, machine::Sandbox::Up { .. })
    }

    fn is_present(&self) -> bool {
        self.present
    }

    fn is_final_status_accepted(&self) -> bool {
        self.final_status_accepted
    }

    fn running_count(&self) -> usize {
        self.units.iter().filter(|unit| unit.running().is_some()).count()
    }

    fn started_at(&self, container: &str) -> Option<Millis> {
        let i = self.index(container)?;
        self.units[i].running().map(|run| run.started_at)
    }
}
