//! Everything known, and the table made of it: events go in, changes come out. Invariant: what one event costs depends on
//! the services that it concerns, not on how many there are.

use super::Event;
use super::changes::{Changes, Refusal, Usage};
use super::model::{ObjectKey, Service, Slice};
use super::plan::{DesiredPort, NodeFacts, desired, local_ready};
use super::table::Table;
use foldhash::{HashMap, HashMapExt as _};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;

/// Refused services that are tried again in one round.
const RETRIES_A_ROUND: usize = 128;

/// A Service and its EndpointSlices; either may be told first.
#[derive(Debug, Default)]
struct Known {
    service: Option<Service>,
    slices: Vec<Slice>,
    /// In one of the queues.
    queued: bool,
}

/// Services that are gone, and then those that may want something else.
type Queues = [VecDeque<ObjectKey>; 2];

impl Known {
    fn queue(&mut self, key: &ObjectKey, queues: &mut Queues) {
        if !std::mem::replace(&mut self.queued, true) {
            queues[usize::from(self.service.is_some())].push_back(key.clone());
        }
    }
}

/// The entry for a service, and its key as it is held: one copy of each name is enough.
fn entry<'a>(known: &'a mut HashMap<ObjectKey, Known>, key: &ObjectKey) -> (ObjectKey, &'a mut Known) {
    match known.entry(key.clone()) {
        Entry::Occupied(held) => (held.key().clone(), held.into_mut()),
        Entry::Vacant(place) => (key.clone(), place.insert(Known::default())),
    }
}

/// What a service's `healthCheckNodePort` answers with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The Service.
    pub service: ObjectKey,
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Ready endpoints on this node.
    pub local_ready: usize,
}

/// Services that have endpoints but none on this node, by the policy that wants one here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocalEndpoints {
    /// `internalTrafficPolicy: Local`.
    pub internal: usize,
    /// `externalTrafficPolicy: Local`.
    pub external: usize,
}

/// Everything known, and the table made of it.
#[derive(Debug)]
pub struct Planner {
    known: HashMap<ObjectKey, Known>,
    /// Service of each EndpointSlice.
    owners: HashMap<ObjectKey, ObjectKey>,
    service_count: usize,
    node: NodeFacts,
    table: Table,
    queues: Queues,
    refused: BTreeMap<ObjectKey, Vec<Refusal>>,
    /// How often `refused` has changed.
    refused_changes: u64,
    /// Those of `refused` that may fit when something else goes.
    blocked: BTreeSet<ObjectKey>,
    /// The last one of `blocked` that was tried again.
    retried: Option<ObjectKey>,
    /// Something was freed, or a blocked service got in, since `blocked` was last tried.
    retry: bool,
    health: BTreeMap<ObjectKey, HealthCheck>,
    /// Whether policy internal and external lack local endpoints.
    no_local: HashMap<ObjectKey, [bool; 2]>,
    services_synced: bool,
    slices_synced: bool,
    swept: bool,
}

impl Planner {
    /// A planner that knows nothing of the API yet, over the table that the kernel holds.
    pub fn new(table: Table) -> Self {
        Self {
            known: HashMap::new(),
            owners: HashMap::new(),
            service_count: 0,
            node: NodeFacts::default(),
            table,
            queues: Default::default(),
            refused: BTreeMap::new(),
            refused_changes: 0,
            blocked: BTreeSet::new(),
            retried: None,
            retry: false,
            health: BTreeMap::new(),
            no_local: HashMap::new(),
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
            Event::Service(service) => self.put_service(service),
            Event::ServiceGone(key) => self.remove_service(&key),
            Event::Slice(slice) => self.put_slice(slice),
            Event::SliceGone(key) => self.remove_slice(&key),
            // Each of them was told, so where there are as many nothing is gone, and none of them has to be looked up.
            Event::ServicesSynced(all) => {
                let is_held = |key| self.known.get(key).is_some_and(|known| known.service.is_some());
                debug_assert!(all.iter().all(is_held), "Services in a list that were not told");
                if all.len() != self.service_count {
                    let held = self.known.iter().filter(|(_, known)| known.service.is_some());
                    let gone: Vec<_> =
                        held.map(|(key, _)| key).filter(|key| !all.contains(*key)).cloned().collect();
                    gone.iter().for_each(|key| self.remove_service(key));
                }
                self.services_synced = true;
            }
            Event::SlicesSynced(all) => {
                debug_assert!(
                    all.iter().all(|key| self.owners.contains_key(key)),
                    "EndpointSlices in a list that were not told"
                );
                if all.len() != self.owners.len() {
                    let gone: Vec<_> =
                        self.owners.keys().filter(|key| !all.contains(*key)).cloned().collect();
                    gone.iter().for_each(|key| self.remove_slice(key));
                }
                self.slices_synced = true;
            }
            Event::Node(facts) => {
                if self.node != facts {
                    self.node = facts;
                    self.queue_all();
                }
            }
        }
    }

    fn queue_all(&mut self) {
        let held = self.known.iter_mut().filter(|(_, known)| known.service.is_some() && !known.queued);
        let mut all: Vec<_> = held.collect();
        all.sort_unstable_by_key(|(key, _)| *key);
        for (key, known) in all {
            known.queue(key, &mut self.queues);
        }
    }

    fn put_service(&mut self, mut service: Service) {
        let (key, known) = entry(&mut self.known, &service.key);
        service.key = key.clone();
        if known.service.as_ref() == Some(&service) {
            return;
        }
        let new = known.service.replace(service).is_none();
        self.service_count += usize::from(new);
        known.queue(&key, &mut self.queues);
    }

    fn remove_service(&mut self, key: &ObjectKey) {
        let Some(known) = self.known.get_mut(key) else { return };
        if known.service.take().is_some() {
            self.service_count -= 1;
            known.queue(key, &mut self.queues);
        }
    }

    fn put_slice(&mut self, mut slice: Slice) {
        if let Some((key, owner)) = self.owners.get_key_value(&slice.key) {
            slice.key = key.clone();
            if *owner != slice.service {
                self.remove_slice(&slice.key.clone());
            }
        }
        let (service, known) = entry(&mut self.known, &slice.service);
        let key = slice.key.clone();
        slice.service = service.clone();
        match known.slices.iter_mut().find(|held| held.key == slice.key) {
            Some(held) if *held == slice => return,
            Some(held) => *held = slice,
            None => {
                known.slices.reserve_exact(1);
                known.slices.push(slice);
            }
        }
        if known.service.is_some() {
            known.queue(&service, &mut self.queues);
        }
        self.owners.insert(key, service);
    }

    fn remove_slice(&mut self, key: &ObjectKey) {
        let Some(service) = self.owners.remove(key) else { return };
        let Some(known) = self.known.get_mut(&service) else { return };
        known.slices.retain(|held| held.key != *key);
        if known.service.is_some() {
            known.queue(&service, &mut self.queues);
        } else if known.slices.is_empty() && !known.queued {
            self.known.remove(&service);
        }
    }

    /// The next changes towards what the events so far want; empty before [`Planner::synced`]. The caller applies them in
    /// this order, says [`Planner::passed_on`], which tells whether there is more, and [`Planner::restart`] when one failed.
    pub fn flush(&mut self) -> Changes {
        let mut changes = Changes::default();
        if !self.synced() {
            return changes;
        }
        self.table.expect(self.service_count.saturating_sub(self.table.usage().services));
        let mut left = self.table.abilities().services_per_round.max(1);
        // Removals first: what they free is there for the others after this round.
        for queue in 0..self.queues.len() {
            while left != 0
                && let Some(key) = self.queues[queue].pop_front()
            {
                left -= 1;
                self.set(&key, &mut changes);
            }
        }
        if !self.backlog() {
            self.queues = Default::default();
            if !self.swept {
                self.table.sweep(&mut changes);
                self.swept = true;
            } else if std::mem::take(&mut self.retry) {
                for key in self.next_blocked() {
                    self.set(&key, &mut changes);
                    self.retry |= !self.blocked.contains(&key);
                }
            }
        }
        changes
    }

    fn backlog(&self) -> bool {
        self.queues.iter().any(|queue| !queue.is_empty())
    }

    /// The next of the refused services, in turns.
    fn next_blocked(&mut self) -> Vec<ObjectKey> {
        let from = match &self.retried {
            Some(last) => Bound::Excluded(last.clone()),
            None => Bound::Unbounded,
        };
        let behind = self.blocked.range((from, Bound::Unbounded));
        let next: Vec<_> =
            behind.chain(&self.blocked).take(RETRIES_A_ROUND.min(self.blocked.len())).cloned().collect();
        self.retried = next.last().cloned();
        next
    }

    fn set(&mut self, key: &ObjectKey, changes: &mut Changes) {
        let Some(known) = self.known.get_mut(key) else { return };
        known.queued = false;
        let (wanted, mut refusals) = match &known.service {
            Some(service) => {
                let wanted = desired(service, known.slices.iter(), &self.node);
                let health = service.extras.as_ref().map_or(0, |extras| extras.health_check_node_port);
                if health != 0 {
                    let local_ready = local_ready(known.slices.iter(), &self.node);
                    let check = HealthCheck { service: key.clone(), port: health, local_ready };
                    self.health.insert(key.clone(), check);
                } else if !self.health.is_empty() {
                    self.health.remove(key);
                }
                (wanted, problems(service, &known.slices, &self.node))
            }
            None => {
                self.health.remove(key);
                if known.slices.is_empty() {
                    self.known.remove(key);
                }
                (Vec::new(), Vec::new())
            }
        };
        self.note_no_local(key, &wanted);
        let blocked = match self.table.set(key, &wanted, changes) {
            Ok(partly) => {
                let blocked = partly.iter().any(Refusal::may_pass);
                refusals.extend(partly);
                blocked
            }
            Err(refusal) => {
                let blocked = refusal.may_pass();
                refusals.push(refusal);
                blocked
            }
        };
        if blocked {
            self.blocked.insert(key.clone());
        } else if !self.blocked.is_empty() {
            self.blocked.remove(key);
        }
        self.note_refused(key, refusals);
    }

    fn note_refused(&mut self, key: &ObjectKey, refusals: Vec<Refusal>) {
        let changed = if refusals.is_empty() {
            !self.refused.is_empty() && self.refused.remove(key).is_some()
        } else if self.refused.get(key) == Some(&refusals) {
            false
        } else {
            self.refused.insert(key.clone(), refusals);
            true
        };
        self.refused_changes += u64::from(changed);
    }

    fn note_no_local(&mut self, key: &ObjectKey, ports: &[DesiredPort]) {
        let mut lacks = [false; 2];
        for port in ports.iter().filter(|port| !port.backends.is_empty()) {
            if port.counts.local_ready + port.counts.local_terminating == 0 {
                lacks[0] |= port.frontends.iter().any(|(_, policy)| policy.internal_local);
                lacks[1] |= port.frontends.iter().any(|(_, policy)| policy.external_local);
            }
        }
        if lacks != [false; 2] {
            self.no_local.insert(key.clone(), lacks);
        } else if !self.no_local.is_empty() {
            self.no_local.remove(key);
        }
    }

    /// The changes of the last [`Planner::flush`] are in the kernel, or will be before anything of a later one is. True when
    /// another flush may have more to do: events that were too many for one round, or a refused service that may fit into
    /// what these changes freed.
    pub fn passed_on(&mut self) -> bool {
        self.retry |= self.table.has_released();
        self.table.settle();
        self.retry &= !self.blocked.is_empty();
        self.synced() && (self.retry || self.backlog() || !self.swept)
    }

    /// Starts over from what the kernel holds now; what is known of the API stays.
    pub fn restart(&mut self, table: Table) {
        self.table = table;
        self.refused.clear();
        self.refused_changes += 1;
        self.blocked.clear();
        self.swept = false;
        self.queue_all();
    }

    /// Services that are not, or not wholly, in the table, and why.
    pub fn refused(&self) -> &BTreeMap<ObjectKey, Vec<Refusal>> {
        &self.refused
    }

    /// How often [`Planner::refused`] has changed: while this number stays, so does that.
    pub fn refused_changes(&self) -> u64 {
        self.refused_changes
    }

    /// What the services' `healthCheckNodePort`s answer with, as of the last [`Planner::flush`].
    pub fn health_checks(&self) -> impl Iterator<Item = &HealthCheck> {
        self.health.values()
    }

    /// How many services want local endpoints that they lack, as of the last [`Planner::flush`].
    pub fn no_local_endpoints(&self) -> NoLocalEndpoints {
        let count = |policy: usize| self.no_local.values().filter(|lacks| lacks[policy]).count();
        NoLocalEndpoints { internal: count(0), external: count(1) }
    }

    /// How full the table is.
    pub fn usage(&self) -> Usage {
        self.table.usage()
    }

    /// Services known from the API.
    pub fn service_count(&self) -> usize {
        self.service_count
    }

    #[cfg(test)]
    pub(super) fn parts(&self) -> (Vec<&Service>, Vec<&Slice>, &NodeFacts) {
        let services = self.known.values().filter_map(|known| known.service.as_ref()).collect();
        (services, self.known.values().flat_map(|known| &known.slices).collect(), &self.node)
    }
}

/// What of the objects can't be used.
fn problems(service: &Service, slices: &[Slice], node: &NodeFacts) -> Vec<Refusal> {
    let unusable =
        |slice: Option<&ObjectKey>, text: Box<str>| Refusal::Unusable { slice: slice.cloned(), text };
    let mut found = Vec::new();
    for text in service.extras.iter().flat_map(|extras| &extras.problems) {
        found.push(unusable(None, text.clone()));
    }
    for addr in service.cluster_ips.iter().filter(|addr| node.addresses.contains(addr)) {
        let text = format!("spec.clusterIPs: {addr} is an address of this node; give the Service another");
        found.push(unusable(None, text.into()));
    }
    for slice in slices {
        found.extend(slice.problems.iter().map(|text| unusable(Some(&slice.key), text.clone())));
    }
    found
}
