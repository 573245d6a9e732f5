//! Events in, kernel changed. Invariant: nothing is written before both watches have told everything, and whatever
//! goes wrong with a write, the next round starts from what the kernel really holds.

use super::choice::{self, Active};
use super::foreign;
use super::{Attached, Dataplane, DataplaneConfig, DataplaneError, Mode, ServiceCheck, StatsHandle};
use crate::limits;
use crate::service::{Changes, Event, HealthCheck, NodeFacts, ObjectKey, Observed, Planner, Refusal, Table};
use nix::net::if_::InterfaceFlags;
use sample::Sampler;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

#[cfg(test)]
mod rounds_tests;
mod run;
mod sample;

pub use run::{Feed, run};

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
    /// Settings, and which mode they led to; `None` over a data plane that was handed in.
    chosen: Option<(DataplaneConfig, Active)>,
    /// Refusals that were told already.
    told: BTreeMap<ObjectKey, Vec<Refusal>>,
    /// [`Planner::refused_changes`] then: they are not compared while it stays.
    told_changes: u64,
    /// The kernel may hold a part of a failed round.
    unsure: bool,
    applied_once: bool,
    sampler: Sampler,
    /// When the changes of this round were made in the cluster, in seconds since 1970.
    triggers: Vec<f64>,
}

impl Driver {
    /// Opens the data plane and adopts what it holds.
    pub fn open(config: &DataplaneConfig) -> Result<Self, DataplaneError> {
        foreign::meet(config)?;
        let choice::Chosen { plane, active } = choice::open(config)?;
        config.stats.update(|figures| figures.mode = Some((active.mode, active.why.clone())));
        let mut driver = Self::over(plane, config.stats.clone())?;
        driver.plane.set_draining(!active.leaving.is_empty())?;
        driver.chosen = Some((config.clone(), active));
        driver.refresh_node()?;
        Ok(driver)
    }

    /// Which mode is at work.
    pub fn mode(&self) -> Mode {
        self.plane.mode()
    }

    /// Over any data plane.
    pub fn over(mut plane: Box<dyn Dataplane>, stats: StatsHandle) -> Result<Self, DataplaneError> {
        let table = adopt(plane.as_mut())?;
        Ok(Self {
            plane,
            planner: Planner::new(table),
            stats,
            chosen: None,
            told: BTreeMap::new(),
            told_changes: 0,
            unsure: false,
            applied_once: false,
            sampler: Sampler::default(),
            triggers: Vec::new(),
        })
    }

    /// Takes in events without acting on them.
    pub fn handle(&mut self, events: impl IntoIterator<Item = Event>) {
        events.into_iter().for_each(|event| self.planner.handle(event));
    }

    /// Takes in one event without acting on it.
    fn handle_one(&mut self, event: Event) {
        match event {
            Event::Service(_) | Event::ServiceGone(_) => self.stats.proxy.queued(false),
            Event::Slice(_) | Event::SliceGone(_) => self.stats.proxy.queued(true),
            Event::ServicesSynced(_) | Event::SlicesSynced(_) | Event::Node(_) => {}
        }
        self.planner.handle(event);
    }

    /// What comes next was made in the cluster at this time, in seconds since 1970.
    fn triggered(&mut self, at_s: f64) {
        if self.applied_once && self.triggers.len() < limits::TRIGGERS_A_ROUND_MAX {
            self.triggers.push(at_s);
        }
    }

    /// Brings the kernel to what the events so far want. Before both watches told everything it does nothing.
    pub fn step(&mut self) -> Result<(), DataplaneError> {
        if !self.planner.synced() {
            return Ok(());
        }
        self.stats.health.begins();
        let full = self.unsure || !self.applied_once;
        let started = Instant::now();
        let result = self.write();
        let took = started.elapsed();
        let wrote = *result.as_ref().unwrap_or(&false);
        self.stats.update(|figures| {
            figures.services = self.planner.service_count();
            figures.services_refused = self.planner.refused().len();
            figures.usage = Some(self.planner.usage());
            figures.synced |= result.is_ok();
            figures.last_apply = took;
            if self.applied_once {
                figures.longest_apply = figures.longest_apply.max(figures.last_apply);
            }
            figures.apply_errors_total += u64::from(result.is_err());
        });
        self.unsure |= result.is_err();
        result?;
        let lacking = self.planner.no_local_endpoints();
        self.stats.proxy.set_no_local_endpoints(lacking.internal, lacking.external);
        let check = |at: &HealthCheck| {
            (at.service.clone(), ServiceCheck { port: at.port, local_ready: at.local_ready })
        };
        self.stats.set_checks(self.planner.health_checks().map(check).collect());
        if wrote || full {
            self.stats.proxy.synced(took, full, &std::mem::take(&mut self.triggers));
        } else {
            self.stats.proxy.nothing_pending();
            self.triggers.clear();
        }
        if !self.applied_once {
            self.attach()?;
            self.applied_once = true;
        }
        self.stats.health.updated();
        Ok(())
    }

    /// Whether there was anything to write.
    fn write(&mut self) -> Result<bool, DataplaneError> {
        if self.unsure {
            self.planner.restart(adopt(self.plane.as_mut())?);
            self.unsure = false;
        }
        let changes = self.planner.flush();
        if self.planner.passed_on() {
            return self.write_rounds(changes);
        }
        put(self.plane.as_mut(), &self.stats, &changes)?;
        Ok(!changes.is_empty())
    }

    /// The same where one round is not all: the next one is planned while one is being written.
    fn write_rounds(&mut self, first: Changes) -> Result<bool, DataplaneError> {
        let (plane, stats, planner) = (self.plane.as_mut(), &self.stats, &mut self.planner);
        std::thread::scope(|scope| {
            let (pass, passed) = sync_channel::<Changes>(1);
            let writer = std::thread::Builder::new()
                .name("write".to_owned())
                .spawn_scoped(scope, move || {
                    passed.iter().try_for_each(|changes| put(plane, stats, &changes))
                })
                .map_err(|source| DataplaneError::Host { op: "start a thread that writes", source })?;
            let (mut wrote, mut more) = (!first.is_empty(), true);
            // The writer ends before this side does with an error only.
            let mut goes_on = pass.send(first).is_ok();
            // A round is so large at most, and the room that it frees may let a refused service in.
            for _ in 1..limits::DATAPLANE_ROUNDS_MAX {
                if !(goes_on && more) {
                    break;
                }
                let changes = planner.flush();
                more = planner.passed_on();
                wrote |= !changes.is_empty();
                goes_on = pass.send(changes).is_ok();
            }
            drop(pass);
            writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(|()| wrote)
        })
    }

    fn attach(&mut self) -> Result<(), DataplaneError> {
        let result = match self.plane.attach() {
            Ok(Attached::TableIsNew) => self.fill_anew(),
            Ok(Attached::Yes) => Ok(()),
            Err(error) => Err(error),
        };
        self.stats.update(|figures| figures.attach_errors_total += u64::from(result.is_err()));
        if result.is_ok()
            && let Some((config, active)) = &mut self.chosen
            && !active.leaving.is_empty()
        {
            // Only now that this mode balances everything does the one before it go.
            choice::leave(active, config);
            self.plane.set_draining(!active.leaving.is_empty())?;
        }
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
        let usage = self.planner.usage();
        self.sampler.sample(self.plane.as_mut(), &usage, &self.stats);
        Ok(())
    }

    fn refresh_node(&mut self) -> Result<(), DataplaneError> {
        let [mut addresses, mut own] = interface_addresses()?;
        for ip in self.chosen.iter().flat_map(|(config, _)| &config.node_ips) {
            addresses.insert(*ip);
            own.insert(*ip);
        }
        self.plane.set_node_addresses(&addresses)?;
        self.planner.handle(Event::Node(NodeFacts { addresses: own.into_iter().collect() }));
        Ok(())
    }

    /// Services whose refusal is new since the last call.
    pub(crate) fn notices(&mut self) -> Vec<Notice> {
        let changes = self.planner.refused_changes();
        if changes == self.told_changes {
            return Vec::new();
        }
        self.told_changes = changes;
        let now = self.planner.refused();
        let new = now.iter().filter(|(key, reasons)| self.told.get(*key) != Some(reasons));
        let notices =
            new.map(|(key, reasons)| Notice { service: key.clone(), reasons: reasons.clone() }).collect();
        self.told = now.clone();
        let refused = Arc::new(self.told.clone());
        self.stats.update(|figures| figures.refused = refused);
        notices
    }

    /// Why services are not, or not wholly, in the table.
    pub fn refused(&self) -> &BTreeMap<ObjectKey, Vec<Refusal>> {
        self.planner.refused()
    }
}

/// Writes one round.
fn put(plane: &mut dyn Dataplane, stats: &StatsHandle, changes: &Changes) -> Result<(), DataplaneError> {
    if changes.is_empty() {
        return Ok(());
    }
    plane.apply(changes)?;
    stats.update(|figures| {
        figures.applies_total += 1;
        figures.entries_written_total += entries(changes);
    });
    Ok(())
}

fn adopt(plane: &mut dyn Dataplane) -> Result<Table, DataplaneError> {
    let observed: Observed = plane.observe()?;
    Ok(Table::adopt(plane.capacity(), &observed).with_abilities(plane.abilities()))
}

fn entries(changes: &Changes) -> u64 {
    (changes.put_backends.len()
        + changes.put_slots.len()
        + changes.put_frontends.len()
        + changes.delete_frontends.len()
        + changes.delete_backends.len()) as u64
}

/// Addresses of this network namespace that others can reach: neither loopback nor link-local. All of them, and those on
/// devices by which the node itself is reached: dummies and the loopback device may hold addresses of services, put there
/// by an IPVS proxy or a DNS cache.
pub(crate) fn interface_addresses() -> Result<[BTreeSet<IpAddr>; 2], DataplaneError> {
    let found = nix::ifaddrs::getifaddrs()
        .map_err(|e| DataplaneError::Host { op: "list the interfaces' addresses", source: e.into() })?;
    let (mut all, mut own) = (BTreeSet::new(), BTreeSet::new());
    // What the node has for services only is not the node's.
    for at in found.filter(|at| at.interface_name != super::ipvs::DEVICE) {
        let Some(address) = at.address else { continue };
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        let addr = v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())));
        let Some(addr) = addr.filter(is_reachable) else { continue };
        all.insert(addr);
        if !at.flags.intersects(InterfaceFlags::IFF_LOOPBACK | InterfaceFlags::IFF_NOARP) {
            own.insert(addr);
        }
    }
    Ok([all, own])
}

fn is_reachable(addr: &IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => !addr.is_loopback() && !addr.is_link_local(),
        IpAddr::V6(addr) => !addr.is_loopback() && !addr.is_unicast_link_local(),
    }
}
