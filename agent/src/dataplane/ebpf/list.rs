//! What `sheave service list` shows. Invariant: every row is read from the live maps, nothing from the API.

use super::{Maps, encode, versioned};
use crate::dataplane::DataplaneError;
use crate::service::{BackendAddr, BackendId, FrontendEntry, FrontendKey, Observed, Proto};
use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;

/// One frontend as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRow {
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalIP` or `HostPort`.
    pub kind: &'static str,
    /// Address; unspecified for a NodePort.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub proto: Proto,
    /// Id that the frontend's slots carry.
    pub service_id: u32,
    /// `Local` when only endpoints of this node may be used (by whom the kind says), else `Cluster`.
    pub traffic_policy: &'static str,
    /// Ready endpoints, those of this node first.
    pub ready: Vec<(IpAddr, u16)>,
    /// How many of `ready` are on this node.
    pub ready_local: usize,
    /// Endpoints that still serve while they terminate.
    pub terminating: Vec<(IpAddr, u16)>,
    /// Whether the slots don't say what the frontend does: a change was under way, or something wrote into the maps.
    pub inconsistent: bool,
}

/// The table that is pinned under `pin_dir`, ordered by address and port.
pub fn list(pin_dir: &Path) -> Result<Vec<ServiceRow>, DataplaneError> {
    let observed = Maps::open(&versioned(pin_dir))?.observe()?;
    let backends: HashMap<BackendId, BackendAddr> = observed.backends.iter().copied().collect();
    let mut frontends: Vec<_> = observed.frontends.iter().collect();
    frontends.sort_by_key(|(key, _)| *key);
    let row = |(key, entry): &(_, FrontendEntry)| {
        let key: &FrontendKey = key;
        let (endpoints, inconsistent) = endpoints(entry, &observed, &backends);
        let ready = usize::from(entry.counts[0]) + usize::from(entry.counts[1]);
        let (ready, terminating) = endpoints.split_at(ready.min(endpoints.len()));
        let local = entry.policy.internal_local || entry.policy.external_local;
        ServiceRow {
            kind: entry.policy.kind.name(),
            address: key.addr,
            port: key.port,
            proto: key.proto,
            service_id: entry.service,
            traffic_policy: if local { "Local" } else { "Cluster" },
            ready_local: usize::from(entry.counts[0]).min(ready.len()),
            ready: ready.to_vec(),
            terminating: terminating.to_vec(),
            inconsistent,
        }
    };
    Ok(frontends.into_iter().map(row).collect())
}

fn endpoints(
    entry: &FrontendEntry,
    observed: &Observed,
    backends: &HashMap<BackendId, BackendAddr>,
) -> (Vec<(IpAddr, u16)>, bool) {
    let run = entry.run();
    let slots = observed.slots.get(run.base as usize..(run.base as usize).saturating_add(run.len as usize));
    let Some(slots) = slots else { return (Vec::new(), true) };
    let found: Vec<_> = slots
        .iter()
        .filter(|(service, _)| *service == entry.service)
        .filter_map(|(_, id)| backends.get(id))
        .map(|at| (at.addr, at.port))
        .collect();
    let inconsistent = found.len() != slots.len();
    (found, inconsistent)
}

/// Single frontends of the live maps, without reading the whole table.
#[derive(Debug)]
pub struct Lookup(Maps);

impl Lookup {
    /// Opens the maps pinned under `pin_dir`.
    pub fn open(pin_dir: &Path) -> Result<Self, DataplaneError> {
        Maps::open(&versioned(pin_dir)).map(Self)
    }

    /// The ready endpoints behind a frontend, those of this node first; empty also where there is no such frontend.
    pub fn ready(&self, addr: IpAddr, port: u16, proto: Proto) -> Result<Vec<(IpAddr, u16)>, DataplaneError> {
        let found = match encode::key(&FrontendKey { addr, port, proto }) {
            encode::Key::V4(key) => self.0.frontends4.get(&key)?,
            encode::Key::V6(key) => self.0.frontends6.get(&key)?,
        };
        let Some(entry) = found.as_ref().map(encode::from_frontend) else { return Ok(Vec::new()) };
        let (base, len) = (entry.run().base, u32::from(entry.counts[0]) + u32::from(entry.counts[1]));
        let mut ready = Vec::new();
        for index in base..base.saturating_add(len) {
            let slot = self.0.slots.get(&index)?.filter(|slot| slot.service == entry.service);
            let Some(slot) = slot else { continue };
            let backend = self.0.backends.get(&slot.backend)?;
            ready.extend(backend.as_ref().and_then(encode::from_backend).map(|at| (at.addr, at.port)));
        }
        Ok(ready)
    }
}
