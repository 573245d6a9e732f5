//! Events in, kernel changed. Invariant: nothing is written before both watches have told everything, and whatever
//! goes wrong with a write, the next round starts from what the kernel really holds.

use super::ebpf::EbpfDataplane;
use super::{Attached, Dataplane, DataplaneConfig, DataplaneError, Mode, StatsHandle, ipvs, nftables};
use crate::cluster::services;
use crate::limits;
use crate::service::{Changes, Event, NodeFacts, ObjectKey, Observed, Planner, Refusal, Table};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// What the data plane's thread is told.
#[derive(Debug)]
pub enum Feed {
    /// Something of the API.
    Event(Event),
    /// Look after links and node addresses.
    Tick,
}

/// A service that newly is not, or not wholly, in the table.
#[derive(Debug)]
pub(crate) struct Notice {
    pub(crate) service: ObjectKey,
    pub(crate) reasons: Vec<Refusal>,
}

/// Planner and data plane together, without an API: the way in for tests and benches too.
pub struct Driver {
    plane: Box<dyn Dataplane>,
    planner: Planner,
    stats: StatsHandle,
    extra_addresses: Vec<IpAddr>,
    /// Refusals that were told already.
    told: BTreeMap<ObjectKey, Vec<Refusal>>,
    /// The kernel may hold a part of a failed round.
    unsure: bool,
    applied_once: bool,
}

impl Driver {
    /// Opens the data plane and adopts what it holds.
    pub fn open(config: &DataplaneConfig) -> Result<Self, DataplaneError> {
        let plane: Box<dyn Dataplane> = match config.mode.unwrap_or(Mode::Ebpf) {
            Mode::Ebpf => {
                let plane = EbpfDataplane::open(config)?;
                config.stats.set_counters(plane.counters()?);
                Box::new(plane)
            }
            Mode::Nftables => nftables::open(config)?,
            Mode::Ipvs => ipvs::open(config)?,
        };
        let mut driver = Self::over(plane, config.stats.clone())?;
        driver.extra_addresses.clone_from(&config.node_ips);
        driver.refresh_node()?;
        Ok(driver)
    }

    /// Over any data plane.
    pub fn over(mut plane: Box<dyn Dataplane>, stats: StatsHandle) -> Result<Self, DataplaneError> {
        let table = Table::adopt(plane.capacity(), &plane.observe()?);
        Ok(Self {
            plane,
            planner: Planner::new(table),
            stats,
            extra_addresses: Vec::new(),
            told: BTreeMap::new(),
            unsure: false,
            applied_once: false,
        })
    }

    /// Takes in events without acting on them.
    pub fn handle(&mut self, events: impl IntoIterator<Item = Event>) {
        events.into_iter().for_each(|event| self.planner.handle(event));
    }

    /// Brings the kernel to what the events so far want. Before both watches told everything it does nothing.
    pub fn step(&mut self) -> Result<(), DataplaneError> {
        if !self.planner.synced() {
            return Ok(());
        }
        let started = Instant::now();
        let result = self.write();
        self.stats.update(|figures| {
            figures.services = self.planner.service_count();
            figures.services_refused = self.planner.refused().len();
            figures.usage = Some(self.planner.usage());
            figures.synced |= result.is_ok();
            figures.last_apply = started.elapsed();
            if self.applied_once {
                figures.longest_apply = figures.longest_apply.max(figures.last_apply);
            }
            figures.apply_errors_total += u64::from(result.is_err());
        });
        self.unsure |= result.is_err();
        result?;
        if !self.applied_once {
            self.attach()?;
            self.applied_once = true;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<(), DataplaneError> {
        if self.unsure {
            let observed: Observed = self.plane.observe()?;
            self.planner.restart(Table::adopt(self.plane.capacity(), &observed));
            self.unsure = false;
        }
        // Room that one round frees may let a refused service in; each round only tries once.
        for _ in 0..limits::DATAPLANE_ROUNDS_MAX {
            let changes = self.planner.flush();
            if !changes.is_empty() {
                self.plane.apply(&changes)?;
                self.stats.update(|figures| {
                    figures.applies_total += 1;
                    figures.entries_written_total += entries(&changes);
                });
            }
            if !self.planner.applied() {
                break;
            }
        }
        Ok(())
    }

    fn attach(&mut self) -> Result<(), DataplaneError> {
        let result = match self.plane.attach() {
            Ok(Attached::TableIsNew) => self.fill_anew(),
            Ok(Attached::Yes) => Ok(()),
            Err(error) => Err(error),
        };
        self.stats.update(|figures| figures.attach_errors_total += u64::from(result.is_err()));
        result
    }

    fn fill_anew(&mut self) -> Result<(), DataplaneError> {
        self.unsure = true;
        self.refresh_node()?;
        self.write()?;
        self.plane.attach().map(drop)
    }

    /// Looks after what no event tells of: the node's addresses, severed links, a failed round.
    pub fn tick(&mut self) -> Result<(), DataplaneError> {
        self.refresh_node()?;
        self.step()?;
        if self.applied_once {
            self.attach()?;
        }
        Ok(())
    }

    fn refresh_node(&mut self) -> Result<(), DataplaneError> {
        let mut addresses = interface_addresses()?;
        addresses.extend(&self.extra_addresses);
        self.plane.set_node_addresses(&addresses)?;
        self.planner.handle(Event::Node(NodeFacts { addresses: addresses.into_iter().collect() }));
        Ok(())
    }

    /// Services whose refusal is new since the last call.
    pub(crate) fn notices(&mut self) -> Vec<Notice> {
        let now = self.planner.refused();
        if *now == self.told {
            return Vec::new();
        }
        let new = now.iter().filter(|(key, reasons)| self.told.get(*key) != Some(reasons));
        let notices =
            new.map(|(key, reasons)| Notice { service: key.clone(), reasons: reasons.clone() }).collect();
        self.told = now.clone();
        notices
    }

    /// Why services are not, or not wholly, in the table.
    pub fn refused(&self) -> &BTreeMap<ObjectKey, Vec<Refusal>> {
        self.planner.refused()
    }
}

fn entries(changes: &Changes) -> u64 {
    let slots: usize = changes.put_runs.iter().map(|run| run.backends.len()).sum();
    (changes.put_backends.len()
        + slots
        + changes.put_frontends.len()
        + changes.delete_frontends.len()
        + changes.delete_backends.len()) as u64
}

/// Addresses of this network namespace that others can reach: neither loopback nor link-local.
fn interface_addresses() -> Result<BTreeSet<IpAddr>, DataplaneError> {
    let found = nix::ifaddrs::getifaddrs()
        .map_err(|e| DataplaneError::Host { op: "list the interfaces' addresses", source: e.into() })?;
    let addresses = found.filter_map(|at| {
        let address = at.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    });
    Ok(addresses.filter(is_reachable).collect())
}

fn is_reachable(addr: &IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => !addr.is_loopback() && !addr.is_link_local(),
        IpAddr::V6(addr) => !addr.is_loopback() && !addr.is_unicast_link_local(),
    }
}

/// Runs the data plane until `shutdown`: watches Services and EndpointSlices and keeps the kernel's table as they
/// want it. What is in the kernel stays when this returns.
///
/// # Errors
/// Only what keeps it from starting; later errors are logged, counted and tried again.
pub async fn run(
    client: kube::Client,
    config: DataplaneConfig,
    shutdown: CancellationToken,
) -> Result<(), DataplaneError> {
    let (feed, inbox) = mpsc::channel(limits::DATAPLANE_EVENTS_QUEUED_MAX);
    let (tell, notices) = mpsc::channel(limits::DATAPLANE_NOTICES_QUEUED_MAX);
    let watches = [
        tokio::spawn(services::watch_services(client.clone(), feed.clone())),
        tokio::spawn(services::watch_slices(client.clone(), config.node_name.clone(), feed.clone())),
        tokio::spawn(services::publish_refusals(client, config.node_name.clone(), notices)),
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(limits::secs(limits::DATAPLANE_REPAIR_PERIOD_S));
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            ticks.tick().await;
            while feed.send(Feed::Tick).await.is_ok() {
                ticks.tick().await;
            }
        }),
    ];
    // Opening adopts and may load programs, applying writes maps: all of it blocks, so it has a thread of its own.
    let worker = std::thread::Builder::new().name("dataplane".to_owned());
    let (done, mut ended) = mpsc::channel(1);
    let spawned = worker.spawn(move || {
        let result = Driver::open(&config).map(|driver| drive(driver, inbox, &tell));
        // Nobody listens any more when the agent is on its way out.
        drop(done.blocking_send(result));
    });
    let result = match spawned {
        Err(source) => Err(DataplaneError::Host { op: "start the data plane's thread", source }),
        Ok(_) => tokio::select! {
            result = ended.recv() => result.unwrap_or_else(|| Err(DataplaneError::Host {
                op: "keep the data plane's thread",
                source: std::io::Error::other("it panicked"),
            })),
            () = shutdown.cancelled() => Ok(()),
        },
    };
    for watch in &watches {
        watch.abort();
    }
    result
}

/// The thread's loop: everything that is waiting becomes one round. Ends when all senders are gone.
fn drive(mut driver: Driver, mut inbox: mpsc::Receiver<Feed>, tell: &mpsc::Sender<Notice>) {
    while let Some(first) = inbox.blocking_recv() {
        let mut tick = false;
        let mut take = |feed| match feed {
            Feed::Event(event) => driver.planner.handle(event),
            Feed::Tick => tick = true,
        };
        take(first);
        for _ in 1..limits::DATAPLANE_EVENTS_QUEUED_MAX {
            match inbox.try_recv() {
                Ok(feed) => take(feed),
                Err(_) => break,
            }
        }
        let result = if tick { driver.tick() } else { driver.step() };
        if let Err(error) = result {
            tracing::error!(error = &error as &dyn std::error::Error, "service table; trying again");
        }
        for notice in driver.notices() {
            let reasons: Vec<String> = notice.reasons.iter().map(ToString::to_string).collect();
            tracing::warn!(service = %notice.service, reasons = ?reasons, "service is not wholly balanced");
            if tell.try_send(notice).is_err() {
                tracing::warn!("too many refused services to tell the API of each");
            }
        }
    }
}
