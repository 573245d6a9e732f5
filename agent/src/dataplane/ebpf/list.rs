//! What `sheave service list` and `get` show. Invariant: every row is read from the live maps, nothing from the API.

use super::{Maps, encode, versioned};
use crate::dataplane::DataplaneError;
use crate::service::{BackendAddr, BackendId, FrontendEntry, FrontendKey, Observed, Proto, ServiceId};
use ipnetwork::IpNetwork;
use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;

/// One endpoint of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowBackend {
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// It is on this node.
    pub local: bool,
    /// It is ready; otherwise it serves while it terminates.
    pub ready: bool,
    /// Topology hints give it to clients elsewhere: policy Cluster does not pick it from this node.
    pub local_only: bool,
    /// How often it is in the run, which is its weight.
    pub weight: usize,
}

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
    /// What starts on this node may only use endpoints of this node.
    pub internal_local: bool,
    /// What arrives from outside may only use endpoints of this node.
    pub external_local: bool,
    /// Session affinity in seconds; 0 means none.
    pub affinity_timeout_s: u32,
    /// Whether clients outside must come from one of `source_ranges`.
    pub has_source_ranges: bool,
    /// The service port's source ranges.
    pub source_ranges: Vec<IpNetwork>,
    /// Maglev table; 0 means none.
    pub maglev: u32,
    /// Endpoints on other nodes answer the client themselves.
    pub dsr: bool,
    /// All endpoints, in the order of the run.
    pub backends: Vec<RowBackend>,
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
    let mut ranges: HashMap<ServiceId, Vec<IpNetwork>> = HashMap::new();
    for (service, range) in &observed.ranges {
        ranges.entry(*service).or_default().push(*range);
    }
    let mut frontends: Vec<_> = observed.frontends.iter().collect();
    frontends.sort_by_key(|(key, _)| *key);
    let rows = frontends.into_iter().map(|(key, entry)| {
        let ranges = ranges.get(&entry.service).cloned().unwrap_or_default();
        row(key, entry, slots(entry, &observed), ranges, |id| backends.get(&id).copied())
    });
    Ok(rows.collect())
}

/// The slots of a frontend's run, `None` where the array ends before it.
fn slots(entry: &FrontendEntry, observed: &Observed) -> Option<Vec<(ServiceId, BackendId)>> {
    let run = entry.run();
    let end = (run.base as usize).saturating_add(run.len as usize);
    observed.slots.get(run.base as usize..end).map(<[_]>::to_vec)
}

/// Makes a row of a frontend and its run.
pub(super) fn row(
    key: &FrontendKey,
    entry: &FrontendEntry,
    slots: Option<Vec<(ServiceId, BackendId)>>,
    source_ranges: Vec<IpNetwork>,
    backend: impl Fn(BackendId) -> Option<BackendAddr>,
) -> ServiceRow {
    let missing = slots.is_none();
    let slots = slots.unwrap_or_default();
    let mut backends: Vec<RowBackend> = Vec::new();
    let mut known = HashMap::new();
    let mut strange = 0;
    for (at, (owner, id)) in slots.iter().enumerate() {
        let Some(found) = backend(*id).filter(|_| *owner == entry.service) else {
            strange += 1;
            continue;
        };
        let (local, ready, local_only) = place(entry, at);
        // A backend's weight is how often its part of the run has it.
        let seen = known.entry((*id, local, ready, local_only)).or_insert(backends.len());
        match backends.get_mut(*seen) {
            Some(held) => held.weight += 1,
            None => backends.push(RowBackend {
                address: found.addr,
                port: found.port,
                local,
                ready,
                local_only,
                weight: 1,
            }),
        }
    }
    let some = |wanted: bool| {
        let chosen = backends.iter().filter(move |at| at.ready == wanted);
        chosen.map(|at| (at.address, at.port)).collect::<Vec<_>>()
    };
    let local = entry.policy.internal_local || entry.policy.external_local;
    ServiceRow {
        kind: entry.policy.kind.name(),
        address: key.addr,
        port: key.port,
        proto: key.proto,
        service_id: entry.service,
        traffic_policy: if local { "Local" } else { "Cluster" },
        internal_local: entry.policy.internal_local,
        external_local: entry.policy.external_local,
        affinity_timeout_s: entry.policy.affinity_timeout_s,
        has_source_ranges: entry.policy.source_ranges,
        source_ranges,
        maglev: entry.maglev,
        dsr: entry.policy.dsr,
        ready: some(true),
        ready_local: backends.iter().filter(|at| at.ready && at.local).count(),
        terminating: some(false),
        inconsistent: missing || strange != 0,
        backends,
    }
}

/// Whether the slot at `at` of a run is local, ready, and not for policy Cluster.
pub(super) fn place(entry: &FrontendEntry, at: usize) -> (bool, bool, bool) {
    let [local, remote, local_terminating, _] = entry.counts.map(usize::from);
    let ready = at < local + remote;
    let is_local = at < local || (!ready && at < local + remote + local_terminating);
    (is_local, ready, at < usize::from(entry.local_only))
}

/// Single frontends of the live maps, without reading the whole table.
#[derive(Debug)]
pub struct Lookup(Maps);

impl Lookup {
    /// Opens the maps pinned under `pin_dir`.
    pub fn open(pin_dir: &Path) -> Result<Self, DataplaneError> {
        Maps::open(&versioned(pin_dir)).map(Self)
    }

    /// What the kernel holds for a frontend, if anything.
    pub fn frontend(&self, key: &FrontendKey) -> Result<Option<ServiceRow>, DataplaneError> {
        let Some(entry) = self.0.frontend(key)? else { return Ok(None) };
        self.0.row(key, &entry).map(Some)
    }

    /// The ready endpoints behind a frontend, those of this node first; empty also where there is no such frontend.
    pub fn ready(&self, addr: IpAddr, port: u16, proto: Proto) -> Result<Vec<(IpAddr, u16)>, DataplaneError> {
        let found = self.frontend(&FrontendKey { addr, port, proto })?;
        Ok(found.map(|row| row.ready).unwrap_or_default())
    }
}

impl Maps {
    /// One frontend.
    pub(super) fn frontend(&self, key: &FrontendKey) -> Result<Option<FrontendEntry>, DataplaneError> {
        let found = match encode::key(key) {
            encode::Key::V4(key) => self.frontends4.get(&key)?,
            encode::Key::V6(key) => self.frontends6.get(&key)?,
        };
        Ok(found.as_ref().map(encode::from_frontend))
    }

    /// A frontend with its run, and with its source ranges where it has some.
    pub(super) fn row(&self, key: &FrontendKey, entry: &FrontendEntry) -> Result<ServiceRow, DataplaneError> {
        let run = entry.run();
        let (mut slots, mut backends) = (Vec::new(), HashMap::new());
        for index in run.base..run.base.saturating_add(run.len) {
            let Some(slot) = self.slots.get(&index)? else { continue };
            slots.push((slot.service, slot.backend));
            if !backends.contains_key(&slot.backend)
                && let Some(found) = self.backends.get(&slot.backend)?.as_ref().and_then(encode::from_backend)
            {
                backends.insert(slot.backend, found);
            }
        }
        let whole = slots.len() == run.len as usize;
        let mut ranges = Vec::new();
        if entry.policy.source_ranges {
            let all = self.ranges.entries(usize::MAX)?;
            let all = all.iter().filter_map(|(key, _)| encode::from_range_key(key));
            ranges.extend(all.filter(|(service, _)| *service == entry.service).map(|(_, range)| range));
        }
        Ok(row(key, entry, whole.then_some(slots), ranges, |id| backends.get(&id).copied()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::FrontendPolicy;

    #[test]
    fn a_row_tells_places_weights_and_strangers() {
        let key = FrontendKey { addr: [10, 0, 0, 1].into(), port: 80, proto: Proto::Tcp };
        let entry = FrontendEntry {
            service: 7,
            counts: [2, 2, 1, 1],
            local_only: 1,
            policy: FrontendPolicy::default(),
            ..FrontendEntry::default()
        };
        let at =
            |n: u32| Some(BackendAddr { addr: [10, 1, 0, n as u8].into(), port: 8080, proto: Proto::Tcp });
        let slots = [1, 2, 3, 3, 4, 5].map(|id| (7, id)).to_vec();
        let found = row(&key, &entry, Some(slots.clone()), Vec::new(), at);
        let told: Vec<_> =
            found.backends.iter().map(|b| (b.local, b.ready, b.local_only, b.weight)).collect();
        let wanted = [
            (true, true, true, 1),
            (true, true, false, 1),
            (false, true, false, 2),
            (true, false, false, 1),
            (false, false, false, 1),
        ];
        assert_eq!(told, wanted);
        assert_eq!((found.ready.len(), found.ready_local, found.terminating.len()), (3, 2, 2));
        assert!(!found.inconsistent);
        let mut strange = slots;
        strange[0].0 = 8;
        assert!(row(&key, &entry, Some(strange), Vec::new(), at).inconsistent);
        assert!(row(&key, &entry, None, Vec::new(), at).inconsistent);
    }
}
