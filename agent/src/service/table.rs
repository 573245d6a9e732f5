//! The kernel's table: which ids and slots carry which service, and the changes that lead from what the kernel holds
//! to what is desired. Invariant: [`Changes`], applied in the order of its fields, never lets a frontend show
//! anything but a whole old or a whole new set of backends, because slots, Maglev tables, service ids and backend ids
//! that a reader may still hold are reused only after [`Table::settle`].

mod adopt;
mod backends;
mod beside;

use super::changes::{
    Abilities, BackendId, Capacity, Changes, FrontendEntry, MaglevId, Member, Refusal, ServiceId, SlotWrite,
    Usage,
};
use super::model::{Family, ObjectKey, Proto, Scheduler};
use super::plan::{BackendAddr, Counts, DesiredPort, FrontendKey, FrontendPolicy};
use super::runs::{Run, Runs};
use backends::Backends;
use foldhash::{HashMap, HashSet};
use ipnetwork::IpNetwork;
use std::collections::BTreeSet;

/// One service port in one family.
#[derive(Clone, Debug, Default)]
struct Entry {
    /// `None`: adopted and not yet claimed by a service.
    owner: Option<ObjectKey>,
    run: Run,
    counts: [u16; 4],
    local_only: u16,
    /// The kernel's slots are not what the frontends say: the next `set` writes a new run whatever it wants.
    tainted: bool,
    maglev: MaglevId,
    /// One a slot.
    backends: Box<[BackendId]>,
    frontends: Box<[FrontendKey]>,
    /// What few entries have.
    rare: Option<Box<Rare>>,
}

#[derive(Clone, Debug, Default)]
struct Rare {
    /// Backends in no slot that keep their ids, since clients may be connected to them.
    dormant: Box<[BackendId]>,
    /// Further runs that frontends of a tainted entry refer to.
    runs: Vec<Run>,
    /// Further Maglev tables that frontends of a tainted entry refer to.
    maglevs: Vec<MaglevId>,
}

impl Entry {
    fn dormant(&self) -> &[BackendId] {
        self.rare.as_ref().map_or(&[], |rare| &rare.dormant)
    }

    fn all_backends(&self) -> impl Iterator<Item = BackendId> + '_ {
        self.backends.iter().chain(self.dormant()).copied()
    }
}

/// What was freed but may still be in use by a reader, or in its place in a map.
#[derive(Debug, Default)]
struct Released {
    runs: Vec<Run>,
    maglevs: Vec<MaglevId>,
    backends: Vec<BackendId>,
    services: HashSet<ServiceId>,
    /// IPv4 and IPv6.
    frontends: [usize; 2],
    members: usize,
    ranges: usize,
}

/// A mirror of the kernel's table with the bookkeeping that the kernel does not need.
#[derive(Debug)]
pub struct Table {
    capacity: Capacity,
    abilities: Abilities,
    entries: HashMap<ServiceId, Entry>,
    frontends: HashMap<FrontendKey, FrontendEntry>,
    frontends_v6: u32,
    services: HashMap<ObjectKey, Box<[ServiceId]>>,
    backends: Backends,
    /// Of services with session affinity, ordered by id.
    members: HashMap<ServiceId, Box<[(BackendId, Member)]>>,
    member_count: usize,
    /// Of services with source ranges, ordered.
    ranges: HashMap<ServiceId, Box<[IpNetwork]>>,
    range_count: usize,
    runs: Runs,
    free_maglevs: BTreeSet<MaglevId>,
    /// What adopted Maglev tables held.
    found_maglevs: HashMap<MaglevId, u64>,
    /// Adopted Maglev tables that several services follow.
    contested_maglevs: Vec<MaglevId>,
    last_service: ServiceId,
    released: Released,
}

impl Table {
    /// The same table for a data plane that can do less than everything.
    #[must_use]
    pub fn with_abilities(self, abilities: Abilities) -> Self {
        Self { abilities, ..self }
    }

    /// What the data plane can do.
    pub fn abilities(&self) -> Abilities {
        self.abilities
    }

    /// Makes room for so many more services, at once instead of by and by.
    pub fn expect(&mut self, services: usize) {
        self.services.reserve(services);
        self.entries.reserve(services);
        self.frontends.reserve(services);
    }

    /// Makes the table hold exactly `desired` for `service`; an empty slice removes the service. Adds what that takes
    /// to `changes`. On `Err` nothing was changed; the refusals returned otherwise concern parts of the service.
    pub fn set(
        &mut self,
        service: &ObjectKey,
        desired: &[DesiredPort],
        changes: &mut Changes,
    ) -> Result<Vec<Refusal>, Refusal> {
        let mut refusals = Vec::new();
        let mut ports = Vec::with_capacity(desired.len());
        let mut ids = Vec::with_capacity(desired.len());
        for port in desired {
            if let Some(port) = self.claim(service, port, &mut ids, &mut refusals)? {
                ports.push(port);
            }
        }
        self.check_capacity(&ports)?;
        self.take_runs(&mut ports)?;
        if let Err(refusal) = self.take_maglevs(&mut ports, &mut refusals) {
            self.give_back(&ports);
            return Err(refusal);
        }
        let old = self.services.remove(service).unwrap_or_default();
        for port in ports {
            self.put(service, port, changes);
        }
        for id in old.iter().filter(|id| !ids.contains(id)) {
            self.drop_entry(*id, changes);
        }
        if !ids.is_empty() {
            self.services.insert(service.clone(), ids.into());
        }
        Ok(refusals)
    }

    /// Finds the id of one port and leaves out the frontends that are somebody else's.
    fn claim<'a>(
        &mut self,
        service: &ObjectKey,
        port: &'a DesiredPort,
        ids: &mut Vec<ServiceId>,
        refusals: &mut Vec<Refusal>,
    ) -> Result<Option<Claimed<'a>>, Refusal> {
        if let Some((key, _)) = port.frontends.first()
            && key.proto == Proto::Sctp
            && !self.abilities.sctp
        {
            let refusal = Refusal::Protocol { port: key.port, proto: key.proto };
            if !refusals.contains(&refusal) {
                refusals.push(refusal);
            }
            return Ok(None);
        }
        if !self.abilities.dsr
            && port.frontends.iter().any(|(_, policy)| policy.dsr)
            && !refusals.contains(&Refusal::Forwarding)
        {
            refusals.push(Refusal::Forwarding);
        }
        let (counts, local_only) = counts(&port.counts)?;
        let mut frontends = Vec::with_capacity(port.frontends.len());
        let mut id = None;
        for (key, policy) in &port.frontends {
            let holder = self.frontends.get(key).map(|held| held.service);
            let owner = holder.and_then(|id| self.entries.get(&id)).and_then(|entry| entry.owner.as_ref());
            match owner {
                Some(owner) if owner != service => {
                    refusals.push(Refusal::Taken { frontend: *key, owner: owner.clone() });
                }
                _ => {
                    let free = holder.filter(|id| *id != 0 && !ids.contains(id));
                    id = id.or(free);
                    frontends.push((*key, self.policy(policy)));
                }
            }
        }
        if frontends.is_empty() {
            return Ok(None);
        }
        let id = match id {
            Some(id) => id,
            None => self.fresh_service(ids),
        };
        ids.push(id);
        Ok(Some(Claimed { id, frontends, counts, local_only, port, run: None, maglev: 0 }))
    }

    /// The policy as far as the data plane can have it, so that what comes back from the kernel is equal to it.
    fn policy(&self, wanted: &FrontendPolicy) -> FrontendPolicy {
        let scheduler = match wanted.scheduler {
            Scheduler::Ipvs(_) if !self.abilities.ipvs_schedulers => Scheduler::Default,
            scheduler => scheduler,
        };
        FrontendPolicy { scheduler, dsr: wanted.dsr && self.abilities.dsr, ..*wanted }
    }

    fn fresh_service(&mut self, ids: &[ServiceId]) -> ServiceId {
        loop {
            self.last_service = self.last_service.wrapping_add(1);
            let id = self.last_service;
            if id != 0
                && !self.entries.contains_key(&id)
                && !self.released.services.contains(&id)
                && !ids.contains(&id)
            {
                return id;
            }
        }
    }

    fn check_capacity(&self, ports: &[Claimed<'_>]) -> Result<(), Refusal> {
        let new = |family| {
            let keys = ports.iter().flat_map(|p| &p.frontends).map(|(key, _)| key);
            keys.filter(|k| Family::of(k.addr) == family && !self.frontends.contains_key(k)).count()
        };
        // What is released but not yet deleted still has its place in the kernel's maps.
        let held6 = self.frontends_v6 as usize + self.released.frontends[1];
        let held4 = self.frontends.len() - self.frontends_v6 as usize + self.released.frontends[0];
        let full = |what, held: usize, new: usize, capacity: u32| {
            if new != 0 && held + new > capacity as usize {
                return Err(Refusal::Full { what, capacity });
            }
            Ok(())
        };
        full("frontends", held4, new(Family::V4), self.capacity.frontends4)?;
        full("frontends", held6, new(Family::V6), self.capacity.frontends6)?;
        let held = self.backends.len() + self.released.backends.len();
        full("backends", held, self.new_backends(ports, held), self.capacity.backends)?;
        let new = ports.iter().map(|port| self.new_members(port)).sum();
        full("members", self.member_count + self.released.members, new, self.capacity.members)?;
        let new = ports.iter().map(|port| self.new_ranges(port)).sum();
        full("source ranges", self.range_count + self.released.ranges, new, self.capacity.ranges)
    }

    /// Backends that the ports would add, at most, to the `held` ones. They are told apart only where that matters.
    fn new_backends(&self, ports: &[Claimed<'_>], held: usize) -> usize {
        let count = |port: &Claimed<'_>| port.port.backends.len() + port.port.dormant.len();
        let most = ports.iter().map(count).sum();
        if held + most <= self.capacity.backends as usize {
            return most;
        }
        let wanted = ports.iter().flat_map(|p| p.port.backends.iter().chain(&p.port.dormant));
        wanted.filter(|b| self.backends.id(b).is_none()).collect::<BTreeSet<_>>().len()
    }

    /// Takes a run for every port whose backends change; gives them all back when one cannot be had.
    fn take_runs(&mut self, ports: &mut [Claimed<'_>]) -> Result<(), Refusal> {
        for at in 0..ports.len() {
            if self.is_current(&ports[at]) {
                continue;
            }
            let Some(run) = self.runs.take(ports[at].port.backends.len() as u32) else {
                self.give_back(ports);
                return Err(Refusal::Full { what: "slots", capacity: self.capacity.slots });
            };
            ports[at].run = Some(run);
        }
        Ok(())
    }

    fn give_back(&mut self, ports: &[Claimed<'_>]) {
        for taken in ports.iter().filter_map(|p| p.run) {
            self.runs.give_back(taken);
        }
    }

    /// Whether the kernel's run already is what the port wants.
    fn is_current(&self, port: &Claimed<'_>) -> bool {
        self.entries.get(&port.id).is_some_and(|entry| {
            !entry.tainted
                && entry.counts == port.counts
                && entry.local_only == port.local_only
                && self.are(&entry.backends, &port.port.backends)
        })
    }

    /// Whether these ids are those of these backends.
    fn are(&self, ids: &[BackendId], backends: &[BackendAddr]) -> bool {
        ids.len() == backends.len()
            && ids.iter().zip(backends).all(|(id, addr)| self.backends.id(addr) == Some(*id))
    }

    fn put(&mut self, service: &ObjectKey, port: Claimed<'_>, changes: &mut Changes) {
        let id = port.id;
        let mut old = self.entries.remove(&id).unwrap_or_default();
        let dormant: Box<[BackendId]> =
            port.port.dormant.iter().map(|addr| self.reference(*addr, changes)).collect();
        let (run, backends) = match port.run {
            // The old run stays.
            None => (std::mem::take(&mut old.run), std::mem::take(&mut old.backends)),
            Some(run) => {
                let backends: Box<[BackendId]> =
                    port.port.backends.iter().map(|addr| self.reference(*addr, changes)).collect();
                let slots = (run.base..).zip(&backends);
                changes.put_slots.extend(slots.map(|(index, backend)| SlotWrite {
                    index,
                    service: id,
                    backend: *backend,
                }));
                (run, backends)
            }
        };
        self.put_maglev(&port, &mut old, changes);
        self.put_members(&port, &backends, changes);
        self.put_ranges(&port, changes);
        for (key, policy) in &port.frontends {
            let wanted = FrontendEntry {
                service: id,
                base: run.base,
                counts: port.counts,
                local_only: port.local_only,
                maglev: port.maglev,
                policy: *policy,
            };
            self.put_frontend(*key, wanted, changes);
        }
        let entry = Entry {
            owner: Some(service.clone()),
            run,
            counts: port.counts,
            local_only: port.local_only,
            tainted: false,
            maglev: port.maglev,
            backends,
            frontends: port.frontends.iter().map(|(key, _)| *key).collect(),
            rare: (!dormant.is_empty()).then(|| Box::new(Rare { dormant, ..Rare::default() })),
        };
        for key in old.frontends.iter().filter(|key| !entry.frontends.contains(key)) {
            self.delete_frontend(*key, id, changes);
        }
        self.note_lost(id, &old, &entry, changes);
        self.entries.insert(id, entry);
        self.release(&old, changes);
    }

    fn put_frontend(&mut self, key: FrontendKey, wanted: FrontendEntry, changes: &mut Changes) {
        let held = self.frontends.insert(key, wanted);
        if held == Some(wanted) && !changes.delete_frontends.contains(&key) {
            return;
        }
        if held.is_none() {
            self.frontends_v6 += u32::from(Family::of(key.addr) == Family::V6);
        }
        changes.delete_frontends.remove(&key);
        changes.put_frontends.insert(key, wanted);
    }

    fn delete_frontend(&mut self, key: FrontendKey, id: ServiceId, changes: &mut Changes) {
        if self.frontends.get(&key).is_none_or(|held| held.service != id) {
            return;
        }
        self.frontends.remove(&key);
        let v6 = Family::of(key.addr) == Family::V6;
        self.frontends_v6 -= u32::from(v6);
        self.released.frontends[usize::from(v6)] += 1;
        changes.put_frontends.remove(&key);
        changes.delete_frontends.insert(key);
    }

    fn drop_entry(&mut self, id: ServiceId, changes: &mut Changes) {
        let Some(old) = self.entries.remove(&id) else { return };
        for key in &old.frontends {
            self.delete_frontend(*key, id, changes);
        }
        self.note_lost(id, &old, &Entry::default(), changes);
        self.set_members(id, Box::default(), changes);
        self.set_ranges(id, Box::default(), changes);
        self.release(&old, changes);
        self.released.services.insert(id);
    }

    /// Lets go of the run, the Maglev table and the backends of an entry that was replaced or dropped.
    fn release(&mut self, old: &Entry, changes: &mut Changes) {
        let mut let_go = |run: Run| {
            if run.len != 0 {
                self.released.runs.push(run);
            }
        };
        let_go(old.run);
        if let Some(rare) = &old.rare {
            rare.runs.iter().copied().for_each(let_go);
            self.released.maglevs.extend(&rare.maglevs);
        }
        if old.maglev != 0 {
            self.released.maglevs.push(old.maglev);
        }
        for id in old.all_backends() {
            if self.backends.drop_reference(id) {
                self.note_forgotten(id, changes);
            }
        }
    }

    fn note_forgotten(&mut self, id: BackendId, changes: &mut Changes) {
        self.released.backends.push(id);
        changes.delete_backends.insert(id);
    }

    fn reference(&mut self, addr: BackendAddr, changes: &mut Changes) -> BackendId {
        let (id, new) = self.backends.refer(addr);
        if new {
            changes.put_backends.push((id, addr));
        }
        id
    }

    /// To be called when all changes so far are in the kernel, or will be before any later one: what they freed may be used
    /// again.
    pub fn settle(&mut self) {
        let released = std::mem::take(&mut self.released);
        for run in released.runs {
            self.runs.give_back(run);
        }
        self.free_maglevs.extend(released.maglevs);
        self.backends.give_back(released.backends);
    }

    /// Whether something was freed since the last [`Table::settle`].
    pub fn has_released(&self) -> bool {
        let released = &self.released;
        !released.runs.is_empty()
            || !released.maglevs.is_empty()
            || !released.backends.is_empty()
            || released.frontends != [0; 2]
            || released.members != 0
            || released.ranges != 0
    }

    /// How full the table is.
    pub fn usage(&self) -> Usage {
        Usage {
            services: self.services.len(),
            frontends: self.frontends.len(),
            slots: (self.capacity.slots - self.runs.free()) as usize,
            backends: self.backends.len(),
            members: self.member_count,
            ranges: self.range_count,
            maglevs: (self.capacity.maglevs as usize).saturating_sub(self.free_maglevs.len()),
            capacity: self.capacity,
        }
    }
}

/// A desired port that has found its id.
struct Claimed<'a> {
    id: ServiceId,
    frontends: Vec<(FrontendKey, FrontendPolicy)>,
    counts: [u16; 4],
    local_only: u16,
    port: &'a DesiredPort,
    /// The new run; `None` keeps the old one.
    run: Option<Run>,
    /// The Maglev table, old or new; 0 for none.
    maglev: MaglevId,
}

impl Claimed<'_> {
    fn affinity(&self) -> bool {
        self.frontends.iter().any(|(_, policy)| policy.affinity_timeout_s != 0)
    }

    fn has_ranges(&self) -> bool {
        self.frontends.iter().any(|(_, policy)| policy.source_ranges)
    }

    /// The backends that policy Cluster may pick.
    fn cluster(&self) -> &[BackendAddr] {
        let (from, to) = cluster_part(&self.counts, self.local_only);
        self.port.backends.get(from..to).unwrap_or_default()
    }
}

/// From where to where in a run policy Cluster may pick.
fn cluster_part(counts: &[u16; 4], local_only: u16) -> (usize, usize) {
    let [local, remote, local_terminating, remote_terminating] = counts.map(usize::from);
    let (first, ready) = (usize::from(local_only), local + remote);
    if ready > first { (first, ready) } else { (ready, ready + local_terminating + remote_terminating) }
}

fn counts(wanted: &Counts) -> Result<([u16; 4], u16), Refusal> {
    let small = |count| u16::try_from(count).map_err(|_| Refusal::TooManyEndpoints { count });
    let counts = [
        small(wanted.local_ready)?,
        small(wanted.remote_ready)?,
        small(wanted.local_terminating)?,
        small(wanted.remote_terminating)?,
    ];
    Ok((counts, small(wanted.local_only)?))
}
