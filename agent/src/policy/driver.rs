//! Policies beside the agent: watches and the kernel's own changes feed it, a thread of its own drives it. Invariant:
//! whatever waits becomes one round; before the watches told everything, what an agent before this one wrote stays.

use super::attach::{self, Moment};
use super::{Event, Planner};
use crate::cluster::policies;
use crate::dataplane::DataplaneError;
use crate::dataplane::driver::interface_addresses;
use crate::dataplane::ebpf::{Guard, GuardConfig, devices_of};
use crate::limits;
use crate::network::{KernelEvent, KernelEvents, end_tracking, has_link, routed_links};
use sheave_ebpf_abi::NetCounter;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Settings of policies and the fast path.
#[derive(Clone, Debug, Default)]
pub struct PolicyConfig {
    /// The kernel's side.
    pub guard: GuardConfig,
    /// Name of this node, whose pods are enforced for.
    pub node_name: String,
    /// Beginnings of the names of pods' devices.
    pub pod_links: Vec<String>,
    /// Devices that lead out of the node.
    pub uplinks: Vec<String>,
    /// Devices that lead to other nodes' pods, where there are such.
    pub tunnels: Vec<String>,
}

/// What is known of policies on this node, shared by clones.
#[derive(Clone, Debug, Default)]
pub struct PolicyStats(Arc<Mutex<PolicyFigures>>);

/// See [`PolicyStats`].
#[derive(Clone, Debug, Default)]
pub struct PolicyFigures {
    /// Policies of the cluster.
    pub policies: usize,
    /// Devices that have the programs.
    pub devices: usize,
    /// Why policies are not enforced or not as they are now; empty when they are.
    pub problem: String,
    /// Reasons and how often they occurred.
    pub counters: Vec<(NetCounter, u64)>,
    /// Rounds that changed the kernel.
    pub changes: u64,
}

impl PolicyStats {
    /// A copy of what is known.
    pub fn snapshot(&self) -> PolicyFigures {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn update(&self, change: impl FnOnce(&mut PolicyFigures)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// What the thread is told.
enum Feed {
    /// Something of the API.
    Event(Event),
    /// Links, addresses or routes changed.
    Kernel,
    /// They have not, for a while.
    Quiet,
    /// Look after everything.
    Tick,
}

/// Enforces policies until `shutdown`; what is in the kernel stays when this returns. Without a client there are no
/// policies, only the fast path. A node that can't enforce policies says so and tries again.
pub async fn run(
    client: Option<kube::Client>,
    config: PolicyConfig,
    stats: PolicyStats,
    shutdown: CancellationToken,
) {
    let (feed, inbox) = mpsc::channel(limits::DATAPLANE_EVENTS_QUEUED_MAX);
    let mut tasks = tokio::task::JoinSet::new();
    let (events, mut told) = mpsc::channel(limits::DATAPLANE_EVENTS_QUEUED_MAX);
    match client {
        Some(client) => {
            let (seen, has_seen) = watch::channel(false);
            let name = config.node_name.clone();
            tasks.spawn(policies::watch_policies(client.clone(), seen, events.clone()));
            tasks.spawn(policies::watch_pods(client.clone(), name, has_seen.clone(), events.clone()));
            tasks.spawn(policies::watch_namespaces(client, has_seen, events.clone()));
        }
        None => drop(events.send(Event::PoliciesSynced(BTreeSet::new())).await),
    }
    let out = feed.clone();
    tasks.spawn(async move {
        while let Some(event) = told.recv().await {
            if out.send(Feed::Event(event)).await.is_err() {
                return;
            }
        }
    });
    let out = feed.clone();
    tasks.spawn(async move {
        let mut ticks = tokio::time::interval(limits::secs(limits::DATAPLANE_REPAIR_PERIOD_S));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if out.send(Feed::Tick).await.is_err() {
                return;
            }
        }
    });
    let stop = shutdown.clone();
    let rest = Rest::default();
    let until = rest.clone();
    let listener = std::thread::Builder::new().name("policy-links".to_owned());
    let listening = listener.spawn(move || listen(&feed, &until, &stop));
    let (done, mut ended) = mpsc::channel::<()>(1);
    let worker = std::thread::Builder::new().name("policy".to_owned());
    let working = worker.spawn(move || {
        drive(&config, &stats, &rest, inbox);
        drop(done);
    });
    if let Err(error) = listening.and(working) {
        tracing::error!(%error, "network policies have no threads to run on");
    }
    tokio::select! {
        () = shutdown.cancelled() => {}
        _ = ended.recv() => {}
    }
    drop(events);
    tasks.shutdown().await;
}

/// How long changes of the kernel are gathered before they are told. A look at all links costs more the more pods the
/// node has, and each new pod changes the kernel several times: without rest the looks of one pod after another would
/// take a processor and the kernel's lock from those who connect pods.
#[derive(Clone, Debug, Default)]
struct Rest(Arc<AtomicU64>);

impl Rest {
    /// After a look that took so long.
    fn after(&self, took: Duration) {
        self.last(took.saturating_mul(limits::POLICY_REST_FACTOR));
    }

    /// From now on so long.
    fn last(&self, rest: Duration) {
        self.0.store(u64::try_from(rest.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn take(&self) {
        let longest = limits::millis(limits::POLICY_REST_MS_MAX);
        std::thread::sleep(Duration::from_micros(self.0.load(Ordering::Relaxed)).min(longest));
    }
}

/// Tells of changes in the kernel until nobody listens.
fn listen(feed: &mpsc::Sender<Feed>, rest: &Rest, stop: &CancellationToken) {
    let (mut events, mut changed) = (None, None::<Instant>);
    let quiet = limits::millis(limits::POLICY_QUIET_MS);
    while !stop.is_cancelled() && !feed.is_closed() {
        let heard = match &mut events {
            None => KernelEvents::open().map(|opened| events = Some(opened)).map(|()| true),
            // The hosts' own neighbours change all the time.
            Some(events) => events
                .take()
                .map(|all| all.iter().any(|event| !matches!(event, KernelEvent::Neighbour { .. }))),
        };
        match heard {
            // One that waits already says the same.
            Ok(true) => {
                changed = Some(Instant::now());
                drop(feed.try_send(Feed::Kernel));
                // What happens meanwhile waits in the socket.
                rest.take();
            }
            Ok(false) if changed.is_some_and(|at| at.elapsed() >= quiet) => {
                if feed.try_send(Feed::Quiet).is_ok() {
                    changed = None;
                }
            }
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%error, "listening to the kernel's links; trying again");
                events = None;
                std::thread::sleep(std::time::Duration::from_millis(limits::API_RETRY_FIRST_MS));
            }
        }
    }
}

/// The thread's loop.
fn drive(config: &PolicyConfig, stats: &PolicyStats, rest: &Rest, mut inbox: mpsc::Receiver<Feed>) {
    let mut worker: Option<Worker> = None;
    let mut waiting = Vec::new();
    while let Some(first) = inbox.blocking_recv() {
        let (mut kernel, mut tick, mut quiet) = (false, false, false);
        let mut take = |feed| match feed {
            Feed::Event(event) => waiting.push(event),
            Feed::Kernel => kernel = true,
            Feed::Quiet => quiet = true,
            Feed::Tick => tick = true,
        };
        take(first);
        while let Ok(feed) = inbox.try_recv() {
            take(feed);
        }
        if worker.is_none() && (tick || kernel) {
            worker = match Worker::open(config) {
                Ok(worker) => Some(worker),
                Err(error) => {
                    trouble(stats, &error, "network policies can't be enforced; trying again");
                    None
                }
            };
            (kernel, tick, quiet) = (true, true, true);
        }
        let Some(worker) = &mut worker else { continue };
        waiting.drain(..).for_each(|event| worker.planner.handle(event));
        let begun = Instant::now();
        kernel |= worker.is_due(quiet);
        let round = worker.round(config, Cause { kernel, tick, quiet });
        if worker.put_off {
            rest.last(limits::millis(limits::POLICY_PUT_OFF_MS));
        } else if kernel {
            rest.after(begun.elapsed());
        }
        match round {
            Ok(changed) => worker.tell(stats, changed, tick),
            Err(error) => trouble(stats, &error, "network policies are not as they should be; trying again"),
        }
    }
}

fn trouble(stats: &PolicyStats, error: &DataplaneError, what: &str) {
    let problem = crate::cluster::chain(error);
    tracing::error!(error = problem, "{what}");
    stats.update(|figures| figures.problem = problem);
}

/// Why there is a round.
#[derive(Clone, Copy, Debug)]
struct Cause {
    /// Links, addresses or routes changed, or are to be looked at for another reason.
    kernel: bool,
    /// It is time to look after everything.
    tick: bool,
    /// No pod comes or goes at the moment.
    quiet: bool,
}

struct Worker {
    guard: Guard,
    /// Something changed that was not looked at, or pods' devices wait for their programs.
    put_off: bool,
    planner: Planner,
    /// Flows that had gone past the stack when its tracking was last told.
    fast_flows: u64,
    /// Whether it was said that some pods' flows can't go past the stack.
    said: bool,
}

impl Worker {
    fn open(config: &PolicyConfig) -> Result<Self, DataplaneError> {
        let guard = Guard::open(&config.guard)?;
        let planner = Planner::new(guard.ids());
        Ok(Self { guard, put_off: false, planner, fast_flows: 0, said: false })
    }

    /// Whether what was put off can wait no longer.
    fn is_due(&self, quiet: bool) -> bool {
        self.put_off && (quiet || self.planner.policies() > 0)
    }

    /// One round; true when the kernel was changed.
    fn round(&mut self, config: &PolicyConfig, cause: Cause) -> Result<bool, DataplaneError> {
        let Cause { kernel, tick, quiet } = cause;
        let judged = self.planner.policies() > 0 || !self.planner.synced();
        let moment = Moment { quiet, judged };
        let looks = tick || kernel && !attach::can_wait(moment);
        self.put_off |= kernel && !looks;
        if looks {
            let routes = routed_links(&config.pod_links)
                .map_err(|source| DataplaneError::Host { op: "list routes to pods", source })?;
            let [host, _] = interface_addresses()?;
            let names: BTreeSet<String> = routes.iter().map(|route| route.name.clone()).collect();
            let pods: Vec<String> = names.into_iter().filter(|name| !config.uplinks.contains(name)).collect();
            let tunnels = config.tunnels.iter().filter(|name| has_link(name).unwrap_or(false));
            let outs: Vec<String> = config.uplinks.iter().chain(tunnels).cloned().collect();
            let (pods, waiting) = attach::now(pods, |name| self.guard.is_attached(name), moment);
            self.put_off = waiting > 0;
            // Programs before tables: a pod that is told of is one that is judged.
            self.guard.attach(&pods, &outs, tick)?;
            if !judged {
                // The next devices get theirs in a quiet moment too, and nobody waits for that.
                self.guard.unload();
            }
            let devices: BTreeMap<_, _> = devices_of(&routes);
            let without = routes.iter().find(|at| devices.get(&at.ip).is_some_and(|device| !device.peer));
            self.say(config, without.map(|route| route.name.as_str()));
            self.planner.handle(Event::Devices(devices));
            self.planner.handle(Event::Host(host));
        }
        if !self.planner.synced() || !self.planner.changed() && !tick {
            return Ok(false);
        }
        let tables = self.planner.plan();
        self.guard.apply(&tables)
    }

    /// Says when the first pod comes whose device packets can't be handed past.
    fn say(&mut self, config: &PolicyConfig, without_peer: Option<&str>) {
        let Some(device) = without_peer else {
            self.said = false;
            return;
        };
        if config.guard.fast && !std::mem::replace(&mut self.said, true) {
            tracing::warn!(
                device,
                "the fast path is not for pods whose device is neither veth nor netkit: their packets stay in the stack"
            );
        }
    }

    /// Ends what the kernel's connection tracking keeps of flows that it sees no more: they would stay for days.
    fn untrack(&mut self, fast_flows: u64) {
        if fast_flows == std::mem::replace(&mut self.fast_flows, fast_flows) {
            return;
        }
        let ended = self
            .guard
            .fast_flows()
            .map_err(|error| crate::cluster::chain(&error))
            .and_then(|flows| end_tracking(&flows).map_err(|error| error.to_string()));
        match ended {
            Ok(ended) => tracing::debug!(ended, "entries of connection tracking for flows past the stack"),
            // Kernels without it have nothing to end.
            Err(error) => tracing::debug!(error, "connection tracking"),
        }
    }

    fn tell(&mut self, stats: &PolicyStats, changed: bool, tick: bool) {
        let counters = if tick { self.guard.counters().ok() } else { None };
        let fast = counters.iter().flatten().find(|(counter, _)| *counter == NetCounter::FastFlow);
        if let Some((_, fast_flows)) = fast {
            self.untrack(*fast_flows);
        }
        stats.update(|figures| {
            figures.policies = self.planner.policies();
            figures.devices = self.guard.devices();
            figures.problem.clear();
            figures.changes += u64::from(changed);
            if let Some(counters) = counters {
                figures.counters = counters;
            }
        });
    }
}
