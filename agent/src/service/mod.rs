//! PURE: services, endpoint slices and facts about this node become the desired load-balancing table, and its diff
//! against the kernel's. Invariant: nothing here does I/O or reads a clock; the same events in the same order give
//! the same changes.

pub mod maglev;
mod model;
mod plan;
mod runs;
mod table;
#[cfg(test)]
mod table_tests;

pub use model::{
    Distribution, Endpoint, Family, Hint, IpvsScheduler, ObjectKey, Proto, Readiness, Scheduler, Service,
    ServiceExtras, ServicePort, Slice, SlicePort,
};
pub use plan::{
    BackendAddr, Counts, DesiredPort, FrontendKey, FrontendKind, FrontendPolicy, NodeFacts, desired,
};
pub use runs::Run;
pub use table::{
    BackendId, Capacity, Changes, FrontendEntry, MaglevId, MaglevWrite, Member, Observed, Refusal, RunWrite,
    ServiceId, Table, Usage,
};

use std::collections::{BTreeMap, BTreeSet, HashMap};

/// One thing that the API said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A Service exists with this content.
    Service(Service),
    /// A Service is gone, or is none that is balanced.
    ServiceGone(ObjectKey),
    /// An EndpointSlice exists with this content.
    Slice(Slice),
    /// An EndpointSlice is gone, or belongs to no Service.
    SliceGone(ObjectKey),
    /// All Services that exist were told; those in the model that are not among `0` are gone.
    ServicesSynced(BTreeSet<ObjectKey>),
    /// All EndpointSlices that exist were told; those in the model that are not among `0` are gone.
    SlicesSynced(BTreeSet<ObjectKey>),
    /// The node's facts changed.
    Node(NodeFacts),
}

/// Everything known, and the table made of it. Events go in, changes come out.
#[derive(Debug)]
pub struct Planner {
    services: HashMap<ObjectKey, Service>,
    slices: HashMap<ObjectKey, Slice>,
    slices_of: HashMap<ObjectKey, BTreeSet<ObjectKey>>,
    node: NodeFacts,
    table: Table,
    dirty: BTreeSet<ObjectKey>,
    refused: BTreeMap<ObjectKey, Vec<Refusal>>,
    services_synced: bool,
    slices_synced: bool,
    swept: bool,
}

impl Planner {
    /// A planner that knows nothing of the API yet, over the table that the kernel holds.
    pub fn new(table: Table) -> Self {
        Self {
            services: HashMap::new(),
            slices: HashMap::new(),
            slices_of: HashMap::new(),
            node: NodeFacts::default(),
            table,
            dirty: BTreeSet::new(),
            refused: BTreeMap::new(),
            services_synced: false,
            slices_synced: false,
            swept: false,
        }
    }

    /// Whether both watches have told everything; before that no change is made.
    pub fn synced(&self) -> bool {
        self.services_synced && self.slices_synced
    }

    /// Takes in one event.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Service(service) => {
                if self.services.get(&service.key) != Some(&service) {
                    self.dirty.insert(service.key.clone());
                    self.services.insert(service.key.clone(), service);
                }
            }
            Event::ServiceGone(key) => {
                if self.services.remove(&key).is_some() {
                    self.dirty.insert(key);
                }
            }
            Event::Slice(slice) => self.put_slice(slice),
            Event::SliceGone(key) => self.remove_slice(&key),
            Event::ServicesSynced(all) => {
                let gone: Vec<_> = self.services.keys().filter(|key| !all.contains(*key)).cloned().collect();
                for key in gone {
                    self.handle(Event::ServiceGone(key));
                }
                self.services_synced = true;
            }
            Event::SlicesSynced(all) => {
                let gone: Vec<_> = self.slices.keys().filter(|key| !all.contains(*key)).cloned().collect();
                for key in gone {
                    self.remove_slice(&key);
                }
                self.slices_synced = true;
            }
            Event::Node(facts) => {
                if self.node != facts {
                    self.node = facts;
                    self.dirty.extend(self.services.keys().cloned());
                }
            }
        }
    }

    fn put_slice(&mut self, slice: Slice) {
        let old = self.slices.get(&slice.key);
        if old == Some(&slice) {
            return;
        }
        if old.is_some_and(|old| old.service != slice.service) {
            self.remove_slice(&slice.key.clone());
        }
        self.slices_of.entry(slice.service.clone()).or_default().insert(slice.key.clone());
        self.dirty.insert(slice.service.clone());
        self.slices.insert(slice.key.clone(), slice);
    }

    fn remove_slice(&mut self, key: &ObjectKey) {
        let Some(old) = self.slices.remove(key) else { return };
        if let Some(keys) = self.slices_of.get_mut(&old.service) {
            keys.remove(key);
            if keys.is_empty() {
                self.slices_of.remove(&old.service);
            }
        }
        self.dirty.insert(old.service);
    }

    /// The changes that make the kernel's table what the events so far want; empty before [`Planner::synced`].
    /// The caller applies them and then says [`Planner::applied`], or [`Planner::restart`] when that failed.
    pub fn flush(&mut self) -> Changes {
        let mut changes = Changes::default();
        if !self.synced() {
            return changes;
        }
        // Removals first: what they free is there for the others after this round.
        let dirty = std::mem::take(&mut self.dirty);
        let (present, gone): (Vec<_>, Vec<_>) =
            dirty.into_iter().partition(|key| self.services.contains_key(key));
        for key in gone.into_iter().chain(present) {
            self.set(&key, &mut changes);
        }
        if !self.swept {
            self.table.sweep(&mut changes);
            self.swept = true;
        }
        changes
    }

    fn set(&mut self, key: &ObjectKey, changes: &mut Changes) {
        let wanted = match self.services.get(key) {
            Some(service) => {
                let slices =
                    self.slices_of.get(key).into_iter().flatten().filter_map(|key| self.slices.get(key));
                desired(service, slices, &self.node)
            }
            None => Vec::new(),
        };
        let refusals = match self.table.set(key, &wanted, changes) {
            Ok(refusals) => refusals,
            Err(refusal) => vec![refusal],
        };
        if refusals.is_empty() {
            self.refused.remove(key);
        } else {
            self.refused.insert(key.clone(), refusals);
        }
    }

    /// The changes of the last [`Planner::flush`] are in the kernel. True when another flush may have more to do,
    /// because what these changes freed may let a refused service in.
    pub fn applied(&mut self) -> bool {
        let freed = self.table.has_released();
        self.table.settle();
        if freed && !self.refused.is_empty() {
            self.dirty.extend(self.refused.keys().cloned());
            return true;
        }
        false
    }

    /// Starts over from what the kernel holds now; what is known of the API stays.
    pub fn restart(&mut self, table: Table) {
        self.table = table;
        self.dirty.extend(self.services.keys().cloned());
        self.refused.clear();
        self.swept = false;
    }

    /// Services that are not, or not wholly, in the table, and why.
    pub fn refused(&self) -> &BTreeMap<ObjectKey, Vec<Refusal>> {
        &self.refused
    }

    /// How full the table is.
    pub fn usage(&self) -> Usage {
        self.table.usage()
    }

    /// Services known from the API.
    pub fn service_count(&self) -> usize {
        self.services.len()
    }
}
