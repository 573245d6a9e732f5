//! Runs all controllers over the registry. Invariant: a key is looked at by one task at a time, and only after every
//! write of its last look was acknowledged. The registry's cache has a write before it is acknowledged, so a look
//! always sees what the looks before it did: no expectations are kept, and no pod is made twice.

pub(crate) mod event;
mod index;
mod observe;

use std::cmp::Ordering;
use std::hash::{Hash, Hasher};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::future::{BoxFuture, FutureExt as _, join_all};
use futures::stream::FuturesUnordered;
use jiff::Timestamp;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::event::{Notice, record};
use self::index::{Index, Note};
use self::observe::Look;
use super::Config;
use super::action::{Action, Part, Target};
use super::queue::{Outcome, Queue};
use crate::limits;
use crate::registry::{Registry, Start, WriteOpts};
use crate::resource::{ApiError, DeleteOptions, Kind, Selectors, Subresource, kinds, object};
use crate::store::{Change, Event, Expired, Watch};

/// The controllers, by what a key of theirs names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Controller {
    ReplicaSet,
    Deployment,
    /// A Service.
    EndpointSlice,
    /// Any object, of the key's kind.
    Garbage,
    Namespace,
    Node,
    /// Nothing: all Nodes together, so that two never get the same range.
    NodeRanges,
    /// The name of a node, whether or not there is a Node; empty for pods that are bound to none.
    PodGc,
}

impl Controller {
    /// How Events name it.
    fn component(self) -> &'static str {
        match self {
            Controller::ReplicaSet => "replicaset-controller",
            Controller::Deployment => "deployment-controller",
            Controller::EndpointSlice => "endpoint-slice-controller",
            Controller::Garbage => "garbage-collector",
            Controller::Namespace => "namespace-controller",
            Controller::Node => "node-controller",
            Controller::NodeRanges => "cidrAllocator",
            Controller::PodGc => "pod-garbage-collector",
        }
    }
}

/// What one look is about.
#[derive(Debug, Clone)]
pub(crate) struct Key {
    pub(crate) controller: Controller,
    /// Only of [`Controller::Garbage`].
    pub(crate) kind: Option<&'static Kind>,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn new(controller: Controller, namespace: &str, name: &str) -> Key {
        Key { controller, kind: None, namespace: namespace.to_owned(), name: name.to_owned() }
    }

    fn parts(&self) -> (Controller, &str, &str, Option<(&str, &str)>) {
        (self.controller, &self.namespace, &self.name, self.kind.map(|k| (k.group, k.plural)))
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for Key {}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(kind) = self.kind {
            write!(f, "{} ", kind.singular)?;
        }
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

type Batch = (&'static Kind, Watch, Result<Vec<std::sync::Arc<Event>>, Expired>);

struct Driver {
    registry: Registry,
    config: Config,
    index: Index,
    queue: Queue<Key>,
    feeds: FuturesUnordered<BoxFuture<'static, Batch>>,
    work: JoinSet<(Key, Outcome)>,
}

/// Runs until the shutdown. When events were missed it starts over from a listing.
pub(crate) async fn run(registry: Registry, config: Config, shutdown: CancellationToken) {
    while !shutdown.is_cancelled() {
        let mut driver = Driver {
            registry: registry.clone(),
            config: config.clone(),
            index: Index::default(),
            queue: Queue::new(),
            feeds: FuturesUnordered::new(),
            work: JoinSet::new(),
        };
        if let Err(missed) = driver.serve(&shutdown).await {
            tracing::warn!(error = %missed, "the controllers start over");
            // Nothing is looked at again before the writes that are under way have come to an end.
            while driver.work.join_next().await.is_some() {}
            tokio::time::sleep(Duration::from_millis(limits::DRIVER_RESTART_MS)).await;
        }
    }
}

/// The time that goes into objects: whole seconds.
pub(crate) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

impl Driver {
    async fn serve(&mut self, shutdown: &CancellationToken) -> Result<(), Missed> {
        self.subscribe()?;
        loop {
            self.start_work();
            let due = self.queue.next_due().filter(|_| self.work.len() < limits::CONTROLLER_WORK_MAX);
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                Some((kind, watch, batch)) = self.feeds.next() => {
                    let batch = batch.map_err(Missed::Expired)?;
                    for event in &batch {
                        self.note(kind, event);
                    }
                    self.feeds.push(feed(kind, watch));
                }
                Some(done) = self.work.join_next() => {
                    let (key, outcome) = done.map_err(Missed::Broken)?;
                    self.end(key, outcome);
                }
                () = sleep_until(due), if due.is_some() => {}
            }
        }
    }

    /// Lists every kind and watches it from there on. Owners come before what they own, so that they are known.
    fn subscribe(&mut self) -> Result<(), Missed> {
        let mut all: Vec<&'static Kind> = kinds::kinds().to_vec();
        let first =
            [&kinds::NODES, &kinds::LEASES, &kinds::SERVICES, &kinds::DEPLOYMENTS, &kinds::REPLICA_SETS];
        all.sort_by_key(|kind| first.iter().position(|f| f == kind).unwrap_or(first.len()));
        for kind in all {
            let (objects, rev) = self.registry.list(kind, None, &Selectors::everything());
            for object in objects {
                self.note(kind, &Event { change: Change::Added, object, prev: None });
            }
            let watch = self.registry.watch(kind, None, Start::Rev(rev)).map_err(Missed::Refused)?;
            self.feeds.push(feed(kind, watch));
        }
        Ok(())
    }

    fn note(&mut self, kind: &'static Kind, event: &Event) {
        let mut note = Note { registry: &self.registry, kind, event, keys: Vec::new() };
        if let Err(error) = self.index.note(&mut note) {
            tracing::error!(error = chain(&error), "an object is not understood");
        }
        for key in note.keys {
            self.queue.add(key);
        }
    }

    fn start_work(&mut self) {
        while self.work.len() < limits::CONTROLLER_WORK_MAX {
            let Some(key) = self.queue.pop(Instant::now()) else { return };
            let now = now();
            let mut look = Look {
                registry: &self.registry,
                config: &self.config,
                index: &mut self.index,
                failure: self.queue.failure(&key).map(str::to_owned),
                now,
            };
            match look.decide(&key) {
                Ok(actions) => self.act(key, actions, now),
                Err(error) => self.end(key, Outcome::Failed(chain(&error))),
            }
        }
    }

    /// Looks that ask for nothing but another look end at once; all others become a task.
    fn act(&mut self, key: Key, actions: Vec<Action>, now: Timestamp) {
        let again = actions
            .iter()
            .filter_map(|a| if let Action::Again(after) = a { Some(*after) } else { None })
            .min();
        if actions.iter().all(|a| matches!(a, Action::Again(_))) {
            self.end(key, Outcome::Done(again));
            return;
        }
        let registry = self.registry.clone();
        self.work.spawn(async move {
            let actor = Actor { registry, component: key.controller.component(), now };
            let outcome = match actor.run(actions).await {
                Ok(()) => Outcome::Done(again),
                Err(Refusal::Stale) => Outcome::Stale,
                Err(Refusal::Ending) => Outcome::Done(None),
                Err(Refusal::Error(error)) => Outcome::Failed(error),
            };
            (key, outcome)
        });
    }

    fn end(&mut self, key: Key, outcome: Outcome) {
        let failure = match &outcome {
            Outcome::Failed(why) => Some(why.clone()),
            Outcome::Done(_) | Outcome::Stale => None,
        };
        let text = key.to_string();
        let component = key.controller.component();
        let is_news = self.queue.done(key, outcome, Instant::now());
        if let Some(error) = failure.filter(|_| is_news) {
            tracing::error!(component, key = text, error, "reconciling failed; it is tried again");
        }
    }
}

/// Why the driver has to start over.
#[derive(Debug, thiserror::Error)]
enum Missed {
    #[error("a watch fell behind: {0}")]
    Expired(Expired),
    #[error("a watch was refused: {0}")]
    Refused(ApiError),
    #[error("a task broke off: {0}")]
    Broken(tokio::task::JoinError),
}

fn feed(kind: &'static Kind, mut watch: Watch) -> BoxFuture<'static, Batch> {
    async move {
        let batch = watch.next().await;
        (kind, watch, batch)
    }
    .boxed()
}

async fn sleep_until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due.into()).await;
    }
}

/// An error and its sources in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Why an action was not done.
enum Refusal {
    /// Its object has changed since the look.
    Stale,
    /// Its namespace is being deleted: nothing more is to be done in it.
    Ending,
    Error(String),
}

/// Carries out the actions of one look.
struct Actor {
    registry: Registry,
    component: &'static str,
    now: Timestamp,
}

impl Actor {
    /// In order, and up to the first that fails; what is to be told is told last, so that nothing waits for it.
    async fn run(&self, actions: Vec<Action>) -> Result<(), Refusal> {
        let (events, steps): (Vec<Action>, Vec<Action>) =
            actions.into_iter().partition(|action| matches!(action, Action::Event { .. }));
        for step in steps {
            self.one(step).await?;
        }
        self.one(Action::Together(events)).await
    }

    fn one(&self, action: Action) -> BoxFuture<'_, Result<(), Refusal>> {
        async move {
            match action {
                Action::Create { kind, namespace, body } => {
                    let name =
                        body["metadata"]["name"].as_str().or(body["metadata"]["generateName"].as_str());
                    let what = format!("creating {} {namespace}/{}", kind.singular, name.unwrap_or_default());
                    let done = self.registry.create(kind, &namespace, body, WriteOpts::default()).await;
                    done.map(drop).map_err(|error| refused_create(&what, &error))
                }
                Action::Edit { target, part, merge } => self.edit(&target, part, &merge).await,
                Action::Delete { target, grace_seconds, propagation } => {
                    let options = DeleteOptions {
                        grace_period_seconds: grace_seconds.map(i64::from),
                        uid: Some(target.uid.clone()).filter(|uid| !uid.is_empty()),
                        resource_version: target.rev.map(|rev| rev.to_string()),
                        propagation: Some(propagation),
                        dry_run: false,
                    };
                    let done =
                        self.registry.delete(target.kind, &target.namespace, &target.name, options).await;
                    done.map(drop).or_else(|error| refused("deleting", &target, &error))
                }
                Action::Event { about, warning, reason, message } => {
                    let notice = Notice {
                        component: self.component,
                        about: &about,
                        warning,
                        reason,
                        message: &message,
                    };
                    if let Err(error) = record(&self.registry, &notice, self.now).await {
                        // What was done is done whether or not it can be told.
                        tracing::warn!(
                            reason,
                            message,
                            error = error.message,
                            "an Event could not be written"
                        );
                    }
                    Ok(())
                }
                Action::Together(actions) => {
                    let results = join_all(actions.into_iter().map(|action| self.one(action))).await;
                    // An error says more than a conflict, which only asks for another look.
                    let mut first = Ok(());
                    for result in results {
                        match (&first, &result) {
                            (_, Err(Refusal::Error(_))) => return result,
                            (Ok(()), Err(_)) => first = result,
                            _ => {}
                        }
                    }
                    first
                }
                Action::Again(_) => Ok(()),
            }
        }
        .boxed()
    }

    async fn edit(&self, target: &Target, part: Part, merge: &Value) -> Result<(), Refusal> {
        let sub = match part {
            Part::Main => Subresource::Main,
            Part::Status => Subresource::Status,
            Part::Finalize => Subresource::Finalize,
        };
        let change = |stored: &mut Value| {
            let is_other = !target.uid.is_empty() && object::uid(stored) != target.uid;
            let version = object::resource_version(stored);
            if is_other || target.rev.is_some_and(|rev| version != rev.to_string()) {
                return Err(ApiError::modified(target.kind, &target.name));
            }
            json_patch::merge(stored, merge);
            Ok(())
        };
        let done = self.registry.mutate(target.kind, &target.namespace, &target.name, sub, change).await;
        done.map(drop).or_else(|error| refused("writing", target, &error))
    }
}

fn refused_create(what: &str, error: &ApiError) -> Refusal {
    if error.is_already_exists() || error.is_conflict() {
        Refusal::Stale
    } else if error.code == 403 || error.is_not_found() {
        // Only a namespace that is going, or gone, forbids a create.
        Refusal::Ending
    } else {
        Refusal::Error(format!("{what}: {}", error.message))
    }
}

/// An object that is gone needs no edit and no deletion any more.
fn refused(what: &str, target: &Target, error: &ApiError) -> Result<(), Refusal> {
    if error.is_not_found() {
        Ok(())
    } else if error.is_conflict() {
        Err(Refusal::Stale)
    } else {
        let kind = target.kind.singular;
        Err(Refusal::Error(format!("{what} {kind} {}/{}: {}", target.namespace, target.name, error.message)))
    }
}
