//! The kernel's table: which ids and slots carry which service, and the changes that lead from what the kernel holds
//! to what is desired. Invariant: [`Changes`], applied in the order of its fields, never lets a frontend show
//! anything but a whole old or a whole new set of backends, because slots, service ids and backend ids that a reader
//! may still hold are reused only after [`Table::settle`].

use super::model::{Family, ObjectKey};
use super::plan::{BackendAddr, Counts, DesiredPort, FrontendKey, FrontendPolicy};
use super::runs::{Run, Runs};
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// Id of a service port in one family; 0 is nobody's.
pub type ServiceId = u32;
/// Id of a backend; 0 is nobody's.
pub type BackendId = u32;

/// Element of the Maglev array; 0 is nobody's.
pub type MaglevId = u32;

/// What the kernel holds for one frontend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendEntry {
    /// Whose run it is.
    pub service: ServiceId,
    /// First slot.
    pub base: u32,
    /// Slots of each kind, in the order of [`Counts`].
    pub counts: [u16; 4],
    /// Of the local ready slots, those at the start that policy Cluster must not pick.
    pub local_only: u16,
    /// Maglev table for policy Cluster; 0 means none.
    pub maglev: MaglevId,
    /// How it may choose.
    pub policy: FrontendPolicy,
}

impl FrontendEntry {
    /// The slots that the entry refers to.
    pub fn run(&self) -> Run {
        Run { base: self.base, len: self.counts.iter().map(|n| u32::from(*n)).sum() }
    }
}

/// A run of slots to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunWrite {
    /// First slot.
    pub base: u32,
    /// Owner, written into every slot.
    pub service: ServiceId,
    /// Backends, one a slot.
    pub backends: Vec<BackendId>,
}

/// What the members map says of one usable backend of a service with session affinity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Member {
    /// It is on this node.
    pub local: bool,
    /// It is ready; otherwise it serves while it terminates.
    pub ready: bool,
    /// Policy Cluster may pick it.
    pub cluster: bool,
}

/// A Maglev table to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaglevWrite {
    /// Which element.
    pub id: MaglevId,
    /// Picks, counted from the first slot that policy Cluster may use; `sheave_ebpf_abi::MAGLEV_SLOTS` of them.
    pub picks: std::sync::Arc<[u16]>,
}

/// Entries that the kernel's maps have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// IPv4 frontends.
    pub frontends4: u32,
    /// IPv6 frontends.
    pub frontends6: u32,
    /// Slots.
    pub slots: u32,
    /// Backends.
    pub backends: u32,
    /// Members of services with session affinity.
    pub members: u32,
    /// Source ranges.
    pub ranges: u32,
    /// Maglev tables.
    pub maglevs: u32,
}

/// All that the kernel holds.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Frontends.
    pub frontends: Vec<(FrontendKey, FrontendEntry)>,
    /// Slots from 0 on, as far as frontends refer to them: owner and backend.
    pub slots: Vec<(ServiceId, BackendId)>,
    /// Backends.
    pub backends: Vec<(BackendId, BackendAddr)>,
    /// Members of services with session affinity.
    pub members: Vec<((ServiceId, BackendId), Member)>,
    /// Source ranges.
    pub ranges: Vec<(ServiceId, IpNetwork)>,
}

/// What is to be done to the kernel, in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// 1. Backends that are new.
    pub put_backends: BTreeMap<BackendId, BackendAddr>,
    /// 2. Runs that nobody refers to yet.
    pub put_runs: Vec<RunWrite>,
    /// 3. Maglev tables that nobody refers to yet.
    pub put_maglevs: Vec<MaglevWrite>,
    /// 4. Members of services with session affinity, new and changed.
    pub put_members: BTreeMap<(ServiceId, BackendId), Member>,
    /// 5. Source ranges that are new.
    pub put_ranges: BTreeSet<(ServiceId, IpNetwork)>,
    /// 6. Frontends: each write flips one to its new run.
    pub put_frontends: BTreeMap<FrontendKey, FrontendEntry>,
    /// 7. Frontends that are gone.
    pub delete_frontends: BTreeSet<FrontendKey>,
    /// 8. Source ranges that are gone.
    pub delete_ranges: BTreeSet<(ServiceId, IpNetwork)>,
    /// 9. Members that are gone.
    pub delete_members: BTreeSet<(ServiceId, BackendId)>,
    /// 10. Backends that nothing refers to any more.
    pub delete_backends: BTreeSet<BackendId>,
    /// What the other fields take from UDP and SCTP clients: service ports that have lost a backend wholly (it neither
    /// is ready nor serves), so that flows and sockets which still point there can be ended. TCP is left to resets.
    pub lost: BTreeSet<(ServiceId, BackendAddr)>,
}

impl FrontendEntry {
    fn is_of(&self, id: ServiceId) -> bool {
        self.service == id
    }
}

impl Changes {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.put_backends.is_empty()
            && self.put_runs.is_empty()
            && self.put_maglevs.is_empty()
            && self.put_members.is_empty()
            && self.put_ranges.is_empty()
            && self.put_frontends.is_empty()
            && self.delete_frontends.is_empty()
            && self.delete_ranges.is_empty()
            && self.delete_members.is_empty()
            && self.lost.is_empty()
            && self.delete_backends.is_empty()
    }
}

/// Why (a part of) a service is not in the table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A map is full. The service keeps what it had before.
    #[error("the table of {what} is full ({capacity})")]
    Full {
        /// Which: `frontends`, `slots`, `backends`, `members`, `source ranges` or `Maglev tables`.
        what: &'static str,
        /// Its size.
        capacity: u32,
    },
    /// More endpoints than a run can count. The service keeps what it had before.
    #[error("{count} endpoints on one port, at most 65535 are possible")]
    TooManyEndpoints {
        /// How many.
        count: usize,
    },
    /// Another service has the frontend; the rest of the service is programmed.
    #[error("{} {} port {} belongs to {owner}", .frontend.proto.name(), .frontend.addr, .frontend.port)]
    Taken {
        /// The frontend.
        frontend: FrontendKey,
        /// Who has it.
        owner: ObjectKey,
    },
}

#[derive(Clone, Debug)]
struct Entry {
    /// `None`: adopted and not yet claimed by a service.
    owner: Option<ObjectKey>,
    run: Run,
    counts: [u16; 4],
    backends: Box<[BackendId]>,
    frontends: Vec<FrontendKey>,
    /// The kernel's slots are not what the frontends say: the next `set` writes a new run whatever it wants.
    tainted: bool,
    /// Further runs that frontends of a tainted entry refer to.
    stray_runs: Vec<Run>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    addr: BackendAddr,
    references: u32,
}

/// A mirror of the kernel's table with the bookkeeping that the kernel does not need.
#[derive(Debug)]
pub struct Table {
    capacity: Capacity,
    entries: HashMap<ServiceId, Entry>,
    frontends: HashMap<FrontendKey, FrontendEntry>,
    frontends_v6: u32,
    services: HashMap<ObjectKey, Box<[ServiceId]>>,
    backends: HashMap<BackendId, Held>,
    backend_ids: HashMap<BackendAddr, BackendId>,
    runs: Runs,
    last_service: ServiceId,
    last_backend: BackendId,
    released_runs: Vec<Run>,
    released_backends: HashSet<BackendId>,
    released_services: HashSet<ServiceId>,
    /// Frontends on their way out of the kernel's maps, IPv4 and IPv6.
    released_frontends: [usize; 2],
}

impl Table {
    /// The table that the kernel holds, with every entry waiting for a service to claim it. Whatever contradicts
    /// itself in `observed` is kept until claimed or swept, and is rewritten then.
    pub fn adopt(capacity: Capacity, observed: &Observed) -> Self {
        let mut table = Self {
            capacity,
            entries: HashMap::new(),
            frontends: HashMap::with_capacity(observed.frontends.len()),
            frontends_v6: 0,
            services: HashMap::new(),
            backends: HashMap::with_capacity(observed.backends.len()),
            backend_ids: HashMap::with_capacity(observed.backends.len()),
            runs: Runs::new(capacity.slots),
            last_service: 0,
            last_backend: 0,
            released_runs: Vec::new(),
            released_backends: HashSet::new(),
            released_services: HashSet::new(),
            released_frontends: [0; 2],
        };
        for (id, addr) in &observed.backends {
            table.backends.insert(*id, Held { addr: *addr, references: 0 });
            table.backend_ids.entry(*addr).and_modify(|held| *held = (*held).min(*id)).or_insert(*id);
            table.last_backend = table.last_backend.max(*id);
        }
        let mut frontends: Vec<_> = observed.frontends.iter().collect();
        frontends.sort_by_key(|(key, _)| *key);
        for (key, entry) in frontends {
            table.adopt_frontend(*key, *entry, &observed.slots);
        }
        table
    }

    fn adopt_frontend(&mut self, key: FrontendKey, found: FrontendEntry, slots: &[(ServiceId, BackendId)]) {
        self.frontends.insert(key, found);
        self.frontends_v6 += u32::from(Family::of(key.addr) == Family::V6);
        self.last_service = self.last_service.max(found.service);
        if let Some(entry) = self.entries.get_mut(&found.service) {
            entry.frontends.push(key);
            if entry.run != found.run() || entry.counts != found.counts {
                // An agent died between two flips.
                entry.tainted = true;
                if self.runs.take_exactly(found.run()) {
                    entry.stray_runs.push(found.run());
                }
            }
            return;
        }
        let run = found.run();
        let reserved = self.runs.take_exactly(run);
        let held = slots.get(run.base as usize..(run.base as usize).saturating_add(run.len as usize));
        let backends: Box<[BackendId]> = match held {
            Some(part) if reserved => part.iter().map(|(_, backend)| *backend).collect(),
            _ => Box::default(),
        };
        let whole = reserved
            && found.service != 0
            && held.is_some_and(|part| part.iter().all(|(owner, _)| *owner == found.service))
            && backends.iter().all(|id| self.backends.contains_key(id));
        let backends = if whole { backends } else { Box::default() };
        for id in &backends {
            if let Some(held) = self.backends.get_mut(id) {
                held.references += 1;
            }
        }
        let entry = Entry {
            owner: None,
            run: if reserved { run } else { Run::default() },
            counts: found.counts,
            backends,
            frontends: vec![key],
            tainted: !whole,
            stray_runs: Vec::new(),
        };
        self.entries.insert(found.service, entry);
    }

    /// Makes the table hold exactly `desired` for `service`; an empty slice removes the service. Adds what that takes
    /// to `changes`. On `Err` nothing was changed; the refusals returned otherwise concern single frontends.
    pub fn set(
        &mut self,
        service: &ObjectKey,
        desired: &[DesiredPort],
        changes: &mut Changes,
    ) -> Result<Vec<Refusal>, Refusal> {
        let mut refusals = Vec::new();
        let mut ports = Vec::with_capacity(desired.len());
        let mut ids = HashSet::with_capacity(desired.len());
        for port in desired {
            if let Some(port) = self.claim(service, port, &mut ids, &mut refusals)? {
                ports.push(port);
            }
        }
        self.check_capacity(&ports)?;
        self.take_runs(&mut ports)?;
        let old = self.services.remove(service).unwrap_or_default();
        let kept: Box<[ServiceId]> = ports.iter().map(|p| p.id).collect();
        for port in ports {
            self.put(service, port, changes);
        }
        for id in old.iter().filter(|id| !ids.contains(id)) {
            self.drop_entry(*id, changes);
        }
        if !kept.is_empty() {
            self.services.insert(service.clone(), kept);
        }
        Ok(refusals)
    }

    /// Finds the id of one port and leaves out the frontends that are somebody else's.
    fn claim<'a>(
        &mut self,
        service: &ObjectKey,
        port: &'a DesiredPort,
        ids: &mut HashSet<ServiceId>,
        refusals: &mut Vec<Refusal>,
    ) -> Result<Option<Claimed<'a>>, Refusal> {
        let counts = counts(&port.counts)?;
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
                    frontends.push((*key, *policy));
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
        ids.insert(id);
        Ok(Some(Claimed { id, frontends, counts, backends: &port.backends, run: None }))
    }

    fn fresh_service(&mut self, ids: &HashSet<ServiceId>) -> ServiceId {
        loop {
            self.last_service = self.last_service.wrapping_add(1);
            let id = self.last_service;
            if id != 0
                && !self.entries.contains_key(&id)
                && !self.released_services.contains(&id)
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
        let held6 = self.frontends_v6 as usize + self.released_frontends[1];
        let held4 = self.frontends.len() - self.frontends_v6 as usize + self.released_frontends[0];
        for (family, held, capacity) in
            [(Family::V4, held4, self.capacity.frontends4), (Family::V6, held6, self.capacity.frontends6)]
        {
            let new = new(family);
            if new != 0 && held + new > capacity as usize {
                return Err(Refusal::Full { what: "frontends", capacity });
            }
        }
        let unknown: HashSet<_> =
            ports.iter().flat_map(|p| p.backends).filter(|b| !self.backend_ids.contains_key(b)).collect();
        let held = self.backends.len() + self.released_backends.len();
        if !unknown.is_empty() && held + unknown.len() > self.capacity.backends as usize {
            return Err(Refusal::Full { what: "backends", capacity: self.capacity.backends });
        }
        Ok(())
    }

    /// Takes a run for every port whose backends change; gives them all back when one cannot be had.
    fn take_runs(&mut self, ports: &mut [Claimed<'_>]) -> Result<(), Refusal> {
        for at in 0..ports.len() {
            if self.is_current(&ports[at]) {
                continue;
            }
            let Some(run) = self.runs.take(ports[at].backends.len() as u32) else {
                for taken in ports.iter().filter_map(|p| p.run) {
                    self.runs.give_back(taken);
                }
                return Err(Refusal::Full { what: "slots", capacity: self.capacity.slots });
            };
            ports[at].run = Some(run);
        }
        Ok(())
    }

    /// Whether the kernel's run already is what the port wants.
    fn is_current(&self, port: &Claimed<'_>) -> bool {
        self.entries.get(&port.id).is_some_and(|entry| {
            !entry.tainted
                && entry.counts == port.counts
                && entry.backends.len() == port.backends.len()
                && entry
                    .backends
                    .iter()
                    .zip(port.backends)
                    .all(|(id, addr)| self.backend_ids.get(addr) == Some(id))
        })
    }

    fn put(&mut self, service: &ObjectKey, port: Claimed<'_>, changes: &mut Changes) {
        let id = port.id;
        let old = self.entries.remove(&id);
        let (run, backends) = match (port.run, &old) {
            (None, Some(current)) => (current.run, current.backends.clone()),
            (taken, _) => {
                let backends: Box<[BackendId]> =
                    port.backends.iter().map(|addr| self.reference(*addr, changes)).collect();
                let run = taken.unwrap_or_default();
                if run.len != 0 {
                    changes.put_runs.push(RunWrite {
                        base: run.base,
                        service: id,
                        backends: backends.to_vec(),
                    });
                }
                (run, backends)
            }
        };
        for (key, policy) in &port.frontends {
            let wanted = FrontendEntry {
                service: id,
                base: run.base,
                counts: port.counts,
                policy: *policy,
                ..FrontendEntry::default()
            };
            self.put_frontend(*key, wanted, changes);
        }
        let keys: Vec<FrontendKey> = port.frontends.iter().map(|(key, _)| *key).collect();
        if let Some(old) = old {
            for key in old.frontends.iter().filter(|key| !keys.contains(key)) {
                self.delete_frontend(*key, id, changes);
            }
            if port.run.is_some() {
                self.release(&old, changes);
            }
        }
        let owner = Some(service.clone());
        let entry = Entry {
            owner,
            run,
            counts: port.counts,
            backends,
            frontends: keys,
            tainted: false,
            stray_runs: Vec::new(),
        };
        self.entries.insert(id, entry);
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
        if !self.frontends.get(&key).is_some_and(|held| held.is_of(id)) {
            return;
        }
        self.frontends.remove(&key);
        let v6 = Family::of(key.addr) == Family::V6;
        self.frontends_v6 -= u32::from(v6);
        self.released_frontends[usize::from(v6)] += 1;
        changes.put_frontends.remove(&key);
        changes.delete_frontends.insert(key);
    }

    fn drop_entry(&mut self, id: ServiceId, changes: &mut Changes) {
        let Some(old) = self.entries.remove(&id) else { return };
        for key in &old.frontends {
            self.delete_frontend(*key, id, changes);
        }
        self.release(&old, changes);
        self.released_services.insert(id);
    }

    /// Lets go of the run and the backends of an entry that was replaced or dropped.
    fn release(&mut self, old: &Entry, changes: &mut Changes) {
        self.released_runs.push(old.run);
        self.released_runs.extend(&old.stray_runs);
        for id in &old.backends {
            let Some(held) = self.backends.get_mut(id) else { continue };
            held.references -= 1;
            if held.references == 0 {
                let addr = held.addr;
                self.forget_backend(*id, addr, changes);
            }
        }
    }

    fn forget_backend(&mut self, id: BackendId, addr: BackendAddr, changes: &mut Changes) {
        self.backends.remove(&id);
        if self.backend_ids.get(&addr) == Some(&id) {
            self.backend_ids.remove(&addr);
        }
        self.released_backends.insert(id);
        changes.delete_backends.insert(id);
    }

    fn reference(&mut self, addr: BackendAddr, changes: &mut Changes) -> BackendId {
        if let Some(id) = self.backend_ids.get(&addr) {
            let id = *id;
            if let Some(held) = self.backends.get_mut(&id) {
                held.references += 1;
            }
            return id;
        }
        let id = loop {
            self.last_backend = self.last_backend.wrapping_add(1);
            let id = self.last_backend;
            if id != 0 && !self.backends.contains_key(&id) && !self.released_backends.contains(&id) {
                break id;
            }
        };
        self.backends.insert(id, Held { addr, references: 1 });
        self.backend_ids.insert(addr, id);
        changes.put_backends.insert(id, addr);
        id
    }

    /// Removes what no service claimed. Only to be called when all services are known.
    pub fn sweep(&mut self, changes: &mut Changes) {
        let mut unclaimed: Vec<ServiceId> =
            self.entries.iter().filter(|(_, entry)| entry.owner.is_none()).map(|(id, _)| *id).collect();
        unclaimed.sort_unstable();
        for id in unclaimed {
            self.drop_entry(id, changes);
        }
        let mut orphans: Vec<(BackendId, BackendAddr)> = self
            .backends
            .iter()
            .filter(|(_, held)| held.references == 0)
            .map(|(id, held)| (*id, held.addr))
            .collect();
        orphans.sort_unstable();
        for (id, addr) in orphans {
            self.forget_backend(id, addr, changes);
        }
    }

    /// To be called when all changes so far are in the kernel: what they freed may be used again.
    pub fn settle(&mut self) {
        for run in self.released_runs.drain(..) {
            self.runs.give_back(run);
        }
        self.released_backends.clear();
        self.released_services.clear();
        self.released_frontends = [0; 2];
    }

    /// Whether something was freed since the last [`Table::settle`].
    pub fn has_released(&self) -> bool {
        self.released_runs.iter().any(|run| run.len != 0)
            || !self.released_backends.is_empty()
            || self.released_frontends != [0; 2]
    }

    /// How full the table is.
    pub fn usage(&self) -> Usage {
        Usage {
            services: self.services.len(),
            frontends: self.frontends.len(),
            slots: (self.capacity.slots - self.runs.free()) as usize,
            backends: self.backends.len(),
            capacity: self.capacity,
        }
    }
}

/// How full the table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Services that have at least one frontend.
    pub services: usize,
    /// Frontends of both families.
    pub frontends: usize,
    /// Slots in use or about to be free.
    pub slots: usize,
    /// Backends.
    pub backends: usize,
    /// What there is room for.
    pub capacity: Capacity,
}

/// A desired port that has found its id.
struct Claimed<'a> {
    id: ServiceId,
    frontends: Vec<(FrontendKey, FrontendPolicy)>,
    counts: [u16; 4],
    backends: &'a [BackendAddr],
    /// The new run; `None` keeps the old one.
    run: Option<Run>,
}

fn counts(wanted: &Counts) -> Result<[u16; 4], Refusal> {
    let kinds =
        [wanted.local_ready, wanted.remote_ready, wanted.local_terminating, wanted.remote_terminating];
    let mut counts = [0; 4];
    for (count, kind) in counts.iter_mut().zip(kinds) {
        *count = u16::try_from(kind).map_err(|_| Refusal::TooManyEndpoints { count: kind })?;
    }
    Ok(counts)
}
