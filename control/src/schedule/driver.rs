//! Runs the scheduler over the registry. Invariant: what was decided counts at once, before the binding is
//! acknowledged, so that no two decisions give away the same room.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::cluster::Cluster;
use super::model::{self, Pod, SCHEDULER};
use super::pending::Pending;
use crate::controller::{Notice, Target, now, record};
use crate::limits;
use crate::registry::{Registry, Start, WriteOpts};
use crate::resource::kinds::{NODES, PODS};
use crate::resource::object::format_time;
use crate::resource::{ApiError, Kind, Selectors, Subresource};
use crate::store::{Change, Event, Object, Watch};

/// See [`super::run`].
pub(super) async fn run(registry: Registry, shutdown: CancellationToken) {
    while !shutdown.is_cancelled() {
        let mut scheduler = Scheduler {
            registry: registry.clone(),
            cluster: Cluster::default(),
            pending: Pending::default(),
            work: JoinSet::new(),
        };
        if let Err(error) = scheduler.serve(&shutdown).await {
            tracing::warn!(error, "the scheduler starts over");
            // Nothing is placed again before the bindings that are under way have come to an end.
            while scheduler.work.join_next().await.is_some() {}
            tokio::time::sleep(Duration::from_millis(limits::DRIVER_RESTART_MS)).await;
        }
    }
}

/// What became of a write.
enum Done {
    Bound {
        uid: String,
        result: Result<(), ApiError>,
    },
    /// The pod was told that it cannot be placed.
    Told,
}

struct Scheduler {
    registry: Registry,
    cluster: Cluster,
    pending: Pending,
    work: JoinSet<Done>,
}

impl Scheduler {
    async fn serve(&mut self, shutdown: &CancellationToken) -> Result<(), String> {
        let mut nodes = self.subscribe(&NODES)?;
        let mut pods = self.subscribe(&PODS)?;
        loop {
            self.place_some();
            let is_free = self.work.len() < limits::BINDINGS_MAX;
            let due = self.pending.next_due().filter(|_| is_free);
            tokio::select! {
                // Events first: what has been freed or taken matters to the next placement.
                biased;
                () = shutdown.cancelled() => return Ok(()),
                events = nodes.next() => self.note_all(&NODES, &events.map_err(|e| e.to_string())?),
                events = pods.next() => self.note_all(&PODS, &events.map_err(|e| e.to_string())?),
                Some(done) = self.work.join_next() => self.finish(done.map_err(|e| e.to_string())?),
                () = tokio::task::yield_now(), if is_free && self.pending.has_next() => {}
                () = sleep_until(due), if due.is_some() => {}
            }
        }
    }

    /// Takes in all objects of a kind and watches them from there on.
    fn subscribe(&mut self, kind: &'static Kind) -> Result<Watch, String> {
        let (objects, rev) = self.registry.list(kind, None, &Selectors::everything());
        for object in objects {
            self.note(kind, &object, Change::Added);
        }
        self.registry.watch(kind, None, Start::Rev(rev)).map_err(|e| e.message)
    }

    fn note_all(&mut self, kind: &'static Kind, events: &[Arc<Event>]) {
        for event in events {
            self.note(kind, &event.object, event.change);
        }
    }

    fn note(&mut self, kind: &'static Kind, object: &Object, change: Change) {
        let noted =
            if kind == &NODES { self.note_node(object, change) } else { self.note_pod(object, change) };
        if let Err(error) = noted {
            tracing::error!(key = object.key.as_str(), %error, "an object is not understood");
        }
    }

    fn note_node(&mut self, object: &Object, change: Change) -> Result<(), serde_json::Error> {
        if change == Change::Deleted {
            self.cluster.remove_node(&object.index.name);
            return Ok(());
        }
        if self.cluster.set_node(&object.index.name, model::node(&object.bytes)?) {
            self.pending.wake();
        }
        Ok(())
    }

    fn note_pod(&mut self, object: &Object, change: Change) -> Result<(), serde_json::Error> {
        let uid = &object.index.uid;
        let phase = object.index.phase(&PODS);
        if change == Change::Deleted || matches!(phase, "Succeeded" | "Failed") {
            self.pending.remove(uid);
            if self.cluster.remove_pod(uid) {
                self.pending.wake();
            }
            return Ok(());
        }
        let pod = model::pod(&object.bytes)?;
        if !pod.node_name.is_empty() {
            self.pending.remove(uid);
            self.cluster.add_pod(uid, &pod.node_name, pod.ask.load);
        } else if pod.meta.is_deleting() || pod.is_gated || !matches!(pod.scheduler.as_str(), "" | SCHEDULER)
        {
            self.pending.remove(uid);
        } else {
            self.pending.put(pod);
        }
        Ok(())
    }

    /// Places pods until none is in line, or events should be looked at again.
    fn place_some(&mut self) {
        for _ in 0..limits::PLACEMENTS_AT_ONCE_MAX {
            if self.work.len() >= limits::BINDINGS_MAX {
                return;
            }
            let Some(pod) = self.pending.next(Instant::now()) else { return };
            match self.cluster.place(&pod.ask) {
                Ok(node) => {
                    let node = node.to_owned();
                    self.cluster.add_pod(&pod.meta.uid, &node, pod.ask.load.clone());
                    self.work.spawn(bind(self.registry.clone(), pod, node));
                }
                Err(why) => {
                    self.pending.set_aside(&pod.meta.uid);
                    let why = why.to_string();
                    if pod.unschedulable.as_deref() != Some(why.as_str()) {
                        self.work.spawn(tell(self.registry.clone(), pod, why));
                    }
                }
            }
        }
    }

    fn finish(&mut self, done: Done) {
        let Done::Bound { uid, result: Err(error) } = done else { return };
        if !self.pending.contains(&uid) {
            // The events told first: somebody else has bound the pod, or it is gone.
            return;
        }
        if self.cluster.remove_pod(&uid) {
            self.pending.wake();
        }
        if error.is_not_found() {
            self.pending.remove(&uid);
        } else {
            if !error.is_conflict() {
                tracing::error!(uid, error = error.message, "binding a pod failed; it is tried again");
            }
            self.pending.retry_later(&uid, Instant::now());
        }
    }
}

async fn sleep_until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due.into()).await;
    }
}

async fn bind(registry: Registry, pod: Pod, node: String) -> Done {
    let meta = &pod.meta;
    let binding = json!({
        "metadata": {"name": meta.name, "namespace": meta.namespace, "uid": meta.uid},
        "target": {"kind": "Node", "name": node},
    });
    let opts = WriteOpts::default();
    let result =
        registry.update(&PODS, &meta.namespace, &meta.name, Subresource::Binding, binding, opts).await;
    let result = result.map(drop);
    if result.is_ok() {
        let message = format!("Successfully assigned {}/{} to {node}", meta.namespace, meta.name);
        notify(&registry, &pod, false, "Scheduled", &message).await;
    }
    Done::Bound { uid: pod.meta.uid, result }
}

/// Says on the pod why it cannot be placed.
async fn tell(registry: Registry, pod: Pod, why: String) -> Done {
    let condition = json!({
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": why,
        "lastTransitionTime": format_time(now()),
    });
    let change = |stored: &mut Value| {
        if !stored["spec"]["nodeName"].is_string() && stored["metadata"]["uid"] == pod.meta.uid.as_str() {
            set_condition(stored, &condition);
        }
        Ok(())
    };
    let meta = &pod.meta;
    let done = registry.mutate(&PODS, &meta.namespace, &meta.name, Subresource::Status, change).await;
    match done {
        Ok(_) => notify(&registry, &pod, true, "FailedScheduling", &why).await,
        Err(error) if error.is_not_found() => {}
        Err(error) => {
            tracing::error!(
                pod = meta.name,
                error = error.message,
                "a pod could not be told that it is unschedulable"
            );
        }
    }
    Done::Told
}

/// Replaces the condition of that type; its transition time stays if its status does.
fn set_condition(pod: &mut Value, condition: &Value) {
    let list = &mut pod["status"]["conditions"];
    if !list.is_array() {
        *list = json!([]);
    }
    let Some(list) = list.as_array_mut() else { return };
    let mut condition = condition.clone();
    match list.iter_mut().find(|c| c["type"] == condition["type"]) {
        Some(old) => {
            if old["status"] == condition["status"] {
                condition["lastTransitionTime"] = old["lastTransitionTime"].clone();
            }
            *old = condition;
        }
        None => list.push(condition),
    }
}

async fn notify(registry: &Registry, pod: &Pod, warning: bool, reason: &'static str, message: &str) {
    let about = Target::of(&PODS, &pod.meta);
    let notice = Notice { component: SCHEDULER, about: &about, warning, reason, message };
    if let Err(error) = record(registry, &notice, now()).await {
        // What was done is done whether or not it can be told.
        tracing::warn!(reason, pod = pod.meta.name, error = error.message, "an Event could not be written");
    }
}
