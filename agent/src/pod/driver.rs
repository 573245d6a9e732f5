//! Every pod of this node and its worker. Nothing is removed before the API's first full list: a pod
//! that runs is adopted when the list shows it and ended gracefully when it does not.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::machine::{Machine, Memory};
use super::model::Pod;
use super::registry::Entry;
use super::resources::{self, Allocatable};
use super::spec::POD_ANNOTATION;
use super::worker::{AbortOnDrop, Input, Shared, Worker};
use crate::cluster::chain;
use crate::cluster::pods::PodEvent;
use crate::limits;
use crate::runtime::{PodRecord, RuntimeEvent};

#[derive(Debug)]
struct Handle {
    inbox: mpsc::UnboundedSender<Input>,
    pod: Arc<Pod>,
    present: bool,
    /// Ends with the driver, wherever it is: as if the agent had been killed.
    _task: AbortOnDrop,
}

/// See the module.
#[derive(Debug)]
pub struct Driver {
    shared: Arc<Shared>,
    allocatable: Allocatable,
    workers: HashMap<String, Handle>,
    /// Uids of a list under way.
    listing: Option<HashSet<String>>,
    synced: bool,
    ended: mpsc::UnboundedSender<String>,
}

impl Driver {
    /// Runs the pods that `watch` shows until `shutdown`; containers keep running after that.
    pub async fn run(
        shared: Arc<Shared>,
        watch: impl Stream<Item = PodEvent> + Send,
        mut events: mpsc::UnboundedReceiver<RuntimeEvent>,
        shutdown: CancellationToken,
    ) {
        let (ended, mut endings) = mpsc::unbounded_channel();
        let allocatable = shared.means.node.allocatable;
        let mut driver =
            Driver { shared, allocatable, workers: HashMap::new(), listing: None, synced: false, ended };
        let mut watch = std::pin::pin!(watch);
        let mut resync = tokio::time::interval(limits::secs(limits::POD_RESYNC_PERIOD_S));
        resync.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        resync.reset();
        loop {
            tokio::select! {
                event = watch.next() => match event {
                    Some(event) => driver.pod_event(event).await,
                    None => return,
                },
                event = events.recv() => match event {
                    Some(event) => driver.runtime_event(event),
                    None => return,
                },
                Some(uid) = endings.recv() => {
                    driver.workers.remove(&uid);
                    driver.count();
                }
                _ = resync.tick() => {
                    for handle in driver.workers.values() {
                        tell(handle, Input::Resync);
                    }
                }
                () = shutdown.cancelled() => return,
            }
        }
    }

    async fn pod_event(&mut self, event: PodEvent) {
        match event {
            PodEvent::ListBegins => self.listing = Some(HashSet::new()),
            PodEvent::Seen(pod) => {
                if let Some(listing) = &mut self.listing {
                    listing.insert(pod.uid.clone());
                }
                self.seen(*pod).await;
            }
            PodEvent::Gone(pod) => self.gone(&pod.uid, pod.deletion.map(|d| d.grace_s)),
            PodEvent::ListEnds => {
                let listed = self.listing.take().unwrap_or_default();
                let missing: Vec<String> =
                    self.workers.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
                for uid in missing {
                    self.gone(&uid, None);
                }
                if !self.synced {
                    self.synced = true;
                    self.first_list_is_complete().await;
                }
            }
        }
    }

    async fn seen(&mut self, pod: Pod) {
        let pod = Arc::new(pod);
        let namesakes: Vec<String> = self
            .workers
            .iter()
            .filter(|(uid, handle)| {
                **uid != pod.uid
                    && handle.present
                    && handle.pod.name == pod.name
                    && handle.pod.namespace == pod.namespace
            })
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in namesakes {
            self.gone(&uid, None);
        }
        if let Some(handle) = self.workers.get_mut(&pod.uid) {
            handle.pod = pod.clone();
            tell(handle, Input::Desired(pod));
            return;
        }
        let record = self.shared.means.runtime.pod(&pod.uid).await;
        self.take_on(pod, record, true);
    }

    fn take_on(&mut self, pod: Arc<Pod>, record: Option<PodRecord>, present: bool) {
        let now = self.shared.clock.now();
        let memory = read_memory(&self.shared.memory_dir, &pod.uid);
        let adopted = record.as_ref().map(|record| self.shared.means.adopted(&pod, record));
        let known = adopted.is_some() || memory.is_some() || pod.status.start_time.is_some();
        let mut machine = if known {
            Machine::adopt(pod.clone(), adopted.as_ref(), memory.as_ref(), now)
        } else {
            Machine::new(pod.clone(), now)
        };
        if !known && pod.deletion.is_none() {
            let held = self.shared.registry.held();
            if let Err(rejection) = resources::admit(&pod, &held, &self.allocatable) {
                tracing::warn!(
                    pod = pod.key(),
                    reason = rejection.reason,
                    "pod rejected: {}",
                    rejection.message
                );
                machine.reject(&rejection);
            }
        }
        if !present {
            machine.vanished(None, now);
        }
        let holds = machine.holds_resources().then(|| resources::of_pod(&pod.spec));
        let status = "null".into();
        self.shared.registry.set(&pod.uid, Entry { pod: pod.clone(), status, holds, running: 0 });
        tracing::info!(pod = pod.key(), uid = pod.uid, adopted = record.is_some(), "pod");
        let (inbox, inputs) = mpsc::unbounded_channel();
        let worker = Worker::new(self.shared.clone(), machine, inputs, inbox.clone(), record.is_some());
        let (ended, uid) = (self.ended.clone(), pod.uid.clone());
        let task = tokio::spawn(async move {
            worker.run().await;
            // Nobody listens any more only when the agent is stopping.
            drop(ended.send(uid));
        });
        self.workers.insert(pod.uid.clone(), Handle { inbox, pod, present, _task: AbortOnDrop(task) });
        self.count();
    }

    fn gone(&mut self, uid: &str, grace_s: Option<i64>) {
        if let Some(handle) = self.workers.get_mut(uid)
            && handle.present
        {
            handle.present = false;
            tell(handle, Input::Vanished(grace_s));
        }
    }

    fn runtime_event(&mut self, event: RuntimeEvent) {
        let (uid, input) = match event {
            RuntimeEvent::ContainerExited { uid, name, attempt, exit } => {
                (uid, Input::Exited { name, attempt, exit })
            }
            RuntimeEvent::SandboxDied { uid } => (uid, Input::SandboxDied),
        };
        // A pod without a worker is adopted later, from records that this event is in already.
        if let Some(handle) = self.workers.get(&uid) {
            tell(handle, input);
        }
    }

    /// Everything on the node that no pod of the API accounts for is ended or cleared away.
    async fn first_list_is_complete(&mut self) {
        let records = self.shared.means.runtime.pods().await;
        let mut live: Vec<String> = Vec::new();
        for record in records {
            let uid = record.spec.uid.clone();
            if !record.spec.host_network {
                live.push(uid.clone());
            }
            if self.workers.contains_key(&uid) {
                continue;
            }
            tracing::info!(uid, name = record.spec.name, "a pod that the API does not have is ended");
            let stored = record.spec.annotations.get(POD_ANNOTATION);
            match stored.map(|json| serde_json::from_str::<Pod>(json)) {
                Some(Ok(pod)) => self.take_on(Arc::new(pod), Some(record), false),
                _ => self.stop_unknown(&uid).await,
            }
        }
        self.sweep();
        match self.shared.means.network.reconcile(&live).await {
            Ok(report) => {
                for removed in report.removed {
                    tracing::info!(removed, "left over in the pod network");
                }
                for repaired in report.repaired {
                    tracing::warn!(repaired, "missing from the pod network");
                }
                for (uid, why) in report.broken {
                    tracing::error!(uid, why, "a running pod has no network");
                }
                for failed in report.failed {
                    tracing::error!(failed, "reconciling the pod network");
                }
            }
            Err(error) => tracing::error!(error = chain(&error), "reconciling the pod network"),
        }
    }

    async fn stop_unknown(&self, uid: &str) {
        let means = &self.shared.means;
        if let Err(error) = means.network.detach(uid).await {
            tracing::warn!(uid, error = chain(&error), "detaching an unknown pod");
        }
        if let Err(error) = means.runtime.stop_sandbox(uid).await {
            tracing::warn!(uid, error = chain(&error), "stopping an unknown pod");
        }
    }

    /// Removes directories of pods that are neither in the API nor on the node any more.
    fn sweep(&self) {
        let dirs = [self.shared.means.state_dir.join("pods"), self.shared.memory_dir.clone()];
        for (dir, is_state) in dirs.into_iter().zip([true, false]) {
            let Ok(entries) = std::fs::read_dir(&dir) else { continue };
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let uid = name.split('.').next().unwrap_or(&name);
                if self.workers.contains_key(uid) {
                    continue;
                }
                let removed = if is_state {
                    super::volumes::tear_down(&entry.path())
                } else {
                    std::fs::remove_file(entry.path()).map_err(|e| e.to_string())
                };
                match removed {
                    Ok(()) => {
                        tracing::info!(path = %entry.path().display(), "left over of a pod that is gone")
                    }
                    Err(error) => tracing::warn!(path = %entry.path().display(), error, "clearing up"),
                }
            }
        }
    }

    fn count(&self) {
        self.shared.metrics.pods.set(i64::try_from(self.workers.len()).unwrap_or(i64::MAX));
    }
}

fn tell(handle: &Handle, input: Input) {
    // A worker that ended has nothing left to be told.
    drop(handle.inbox.send(input));
}

fn read_memory(dir: &std::path::Path, uid: &str) -> Option<Memory> {
    let file: PathBuf = dir.join(format!("{uid}.json"));
    let bytes = std::fs::read(&file).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(memory) => Some(memory),
        Err(error) => {
            tracing::warn!(file = %file.display(), %error, "what was remembered of a pod can't be read");
            None
        }
    }
}
