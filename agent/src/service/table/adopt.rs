//! From what the kernel holds to a table, and what nobody claims out of it. Invariant: whatever contradicts itself is kept
//! until a service claims it, which rewrites it, or until it is swept.

use super::super::changes::{
    Abilities, BackendId, Capacity, Changes, FrontendEntry, MaglevId, Observed, ServiceId,
};
use super::super::model::Family;
use super::super::plan::FrontendKey;
use super::super::runs::{Run, Runs};
use super::backends::Backends;
use super::{Entry, Released, Table};
use foldhash::{HashMap, HashMapExt as _};

impl Table {
    /// The table that the kernel holds, with every entry waiting for a service to claim it.
    pub fn adopt(capacity: Capacity, observed: &Observed) -> Self {
        let mut table = Self {
            capacity,
            abilities: Abilities::ALL,
            entries: HashMap::new(),
            frontends: HashMap::with_capacity(observed.frontends.len()),
            frontends_v6: 0,
            services: HashMap::new(),
            backends: Backends::adopt(capacity.backends, &observed.backends),
            members: by_service(&observed.members, |(key, member)| (key.0, (key.1, *member))),
            member_count: 0,
            ranges: by_service(&observed.ranges, |(service, range)| (*service, *range)),
            range_count: 0,
            runs: Runs::new(capacity.slots),
            free_maglevs: (1..=capacity.maglevs).collect(),
            found_maglevs: observed.maglevs.iter().copied().collect(),
            contested_maglevs: Vec::new(),
            last_service: 0,
            released: Released::default(),
        };
        table.member_count = table.members.values().map(|held| held.len()).sum();
        table.range_count = table.ranges.values().map(|held| held.len()).sum();
        let mut frontends: Vec<_> = observed.frontends.iter().collect();
        frontends.sort_unstable_by_key(|(key, entry)| (entry.service, *key));
        table.set_contested_aside(&frontends);
        for group in frontends.chunk_by(|(_, a), (_, b)| a.service == b.service) {
            table.adopt_service(group, &observed.slots);
        }
        table
    }

    /// Maglev tables that several services follow are nobody's, and not free before all followers were claimed or swept.
    fn set_contested_aside(&mut self, frontends: &[&(FrontendKey, FrontendEntry)]) {
        let mut follower: HashMap<MaglevId, ServiceId> = HashMap::new();
        for (_, entry) in frontends {
            if *follower.entry(entry.maglev).or_insert(entry.service) != entry.service
                && self.free_maglevs.remove(&entry.maglev)
            {
                self.contested_maglevs.push(entry.maglev);
            }
        }
    }

    /// Takes in the frontends of one service id.
    fn adopt_service(
        &mut self,
        frontends: &[&(FrontendKey, FrontendEntry)],
        slots: &[(ServiceId, BackendId)],
    ) {
        let Some((_, first)) = frontends.first() else { return };
        let mut entry = self.adopt_run(first, slots);
        for (_, found) in &frontends[1..] {
            if found.run() == first.run()
                && (found.counts, found.local_only, found.maglev)
                    == (first.counts, first.local_only, first.maglev)
            {
                continue;
            }
            // An agent died between two flips.
            entry.tainted = true;
            let rare = entry.rare.get_or_insert_default();
            if found.run() != first.run() && self.runs.take_exactly(found.run()) {
                rare.runs.push(found.run());
            }
            if self.free_maglevs.remove(&found.maglev) {
                rare.maglevs.push(found.maglev);
            }
        }
        for (key, found) in frontends {
            self.frontends.insert(*key, *found);
            self.frontends_v6 += u32::from(Family::of(key.addr) == Family::V6);
        }
        entry.frontends = frontends.iter().map(|(key, _)| *key).collect();
        self.last_service = self.last_service.max(first.service);
        self.entries.insert(first.service, entry);
    }

    fn adopt_run(&mut self, found: &FrontendEntry, slots: &[(ServiceId, BackendId)]) -> Entry {
        let run = found.run();
        let reserved = self.runs.take_exactly(run);
        let held = slots.get(run.base as usize..(run.base as usize).saturating_add(run.len as usize));
        let whole = reserved
            && found.service != 0
            && u32::from(found.local_only) <= u32::from(found.counts[0])
            && held.is_some_and(|part| {
                part.iter().all(|(owner, id)| *owner == found.service && self.backends.addr(*id).is_some())
            });
        let backends: Box<[BackendId]> =
            held.filter(|_| whole).into_iter().flatten().map(|(_, backend)| *backend).collect();
        for id in &backends {
            self.backends.refer_to(*id);
        }
        let maglev: MaglevId = if self.free_maglevs.remove(&found.maglev) { found.maglev } else { 0 };
        Entry {
            owner: None,
            run: if reserved { run } else { Run::default() },
            counts: found.counts,
            local_only: found.local_only,
            tainted: !whole || maglev != found.maglev,
            maglev,
            backends,
            frontends: Box::default(),
            rare: None,
        }
    }

    /// Removes what no service claimed. Only to be called when all services are known.
    pub fn sweep(&mut self, changes: &mut Changes) {
        let mut unclaimed: Vec<ServiceId> =
            self.entries.iter().filter(|(_, entry)| entry.owner.is_none()).map(|(id, _)| *id).collect();
        unclaimed.sort_unstable();
        for id in unclaimed {
            self.drop_entry(id, changes);
        }
        let mut strays: Vec<ServiceId> = self
            .members
            .keys()
            .chain(self.ranges.keys())
            .filter(|id| !self.entries.contains_key(id))
            .copied()
            .collect();
        strays.sort_unstable();
        for id in strays {
            self.set_members(id, Box::default(), changes);
            self.set_ranges(id, Box::default(), changes);
        }
        for id in self.backends.orphans() {
            self.backends.forget(id);
            self.note_forgotten(id, changes);
        }
        self.found_maglevs = HashMap::new();
        self.released.maglevs.append(&mut self.contested_maglevs);
    }
}

/// Values by service id, ordered.
fn by_service<T, V: Copy + Ord>(
    found: &[T],
    split: impl Fn(&T) -> (ServiceId, V),
) -> HashMap<ServiceId, Box<[V]>> {
    let mut all: Vec<_> = found.iter().map(split).collect();
    all.sort_unstable();
    all.chunk_by(|(a, _), (b, _)| a == b)
        .filter_map(|group| Some((group.first()?.0, group.iter().map(|(_, value)| *value).collect())))
        .collect()
}
