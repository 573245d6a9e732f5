//! What `sheave service list` shows. Invariant: every row is read from the live maps, nothing from the API.

use super::{Maps, versioned};
use crate::dataplane::DataplaneError;
use crate::service::{BackendAddr, BackendId, FrontendEntry, Observed, Proto};
use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;

/// One frontend as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRow {
    /// `ClusterIP` or `NodePort`.
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
        let key: &crate::service::FrontendKey = key;
        let (endpoints, inconsistent) = endpoints(entry, &observed, &backends);
        let ready = usize::from(entry.counts[0]) + usize::from(entry.counts[1]);
        let (ready, terminating) = endpoints.split_at(ready.min(endpoints.len()));
        let local = entry.policy.internal_local || entry.policy.external_local;
        ServiceRow {
            kind: if entry.policy.node_port { "NodePort" } else { "ClusterIP" },
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
