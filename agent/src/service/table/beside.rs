//! What services have beside slots: members, source ranges, Maglev tables, and what UDP clients lose. Invariant: what
//! a frontend refers to is put before it and deleted after it, and never rewritten while a reader may follow it.

use super::super::changes::{BackendId, Changes, MaglevId, MaglevWrite, Member, Refusal, ServiceId};
use super::super::maglev;
use super::super::model::{Proto, Scheduler};
use super::{Claimed, Entry, Table, cluster_part};
use ipnetwork::IpNetwork;

/// Of so many Maglev tables one is kept for services whose backends change: their new table is written while the old
/// one is in use.
const MAGLEVS_A_SPARE: u32 = 16;

/// What the cluster's nodes must agree on for equal tables.
const MAGLEV_SEED: u32 = 0;

impl Table {
    /// Members that the port would add to the kernel's map, at most.
    pub(super) fn new_members(&self, port: &Claimed<'_>) -> usize {
        if !port.affinity() {
            return 0;
        }
        let held = self.members.get(&port.id).map_or(&[][..], |held| held);
        let is_new = |addr| match self.backends.id(addr) {
            Some(id) => held.binary_search_by_key(&id, |(id, _)| *id).is_err(),
            None => true,
        };
        // A backend that weighs more stands beside itself.
        let mut last = None;
        port.port.backends.iter().filter(|addr| last.replace(**addr) != Some(**addr) && is_new(*addr)).count()
    }

    /// Source ranges that the port would add to the kernel's map, at most.
    pub(super) fn new_ranges(&self, port: &Claimed<'_>) -> usize {
        if !port.has_ranges() {
            return 0;
        }
        let held = self.ranges.get(&port.id).map_or(&[][..], |held| held);
        port.port.source_ranges.iter().filter(|range| !held.contains(range)).count()
    }

    pub(super) fn put_members(&mut self, port: &Claimed<'_>, backends: &[BackendId], changes: &mut Changes) {
        let wanted = if port.affinity() {
            members(backends, &port.counts, port.local_only)
        } else if self.members.is_empty() {
            return;
        } else {
            Box::default()
        };
        self.set_members(port.id, wanted, changes);
    }

    /// Makes the members of a service exactly these, which are ordered by id.
    pub(super) fn set_members(
        &mut self,
        service: ServiceId,
        wanted: Box<[(BackendId, Member)]>,
        changes: &mut Changes,
    ) {
        let old = self.members.remove(&service).unwrap_or_default();
        let find = |all: &[(BackendId, Member)], id: BackendId| {
            all.binary_search_by_key(&id, |(id, _)| *id).ok().map(|at| all[at].1)
        };
        for (backend, member) in &wanted {
            let key = (service, *backend);
            if find(&old, *backend) != Some(*member) || changes.delete_members.remove(&key) {
                changes.put_members.insert(key, *member);
            }
        }
        for (backend, _) in old.iter().filter(|(id, _)| find(&wanted, *id).is_none()) {
            changes.put_members.remove(&(service, *backend));
            changes.delete_members.insert((service, *backend));
            self.released.members += 1;
        }
        self.member_count = self.member_count + wanted.len() - old.len();
        if !wanted.is_empty() {
            self.members.insert(service, wanted);
        }
    }

    pub(super) fn put_ranges(&mut self, port: &Claimed<'_>, changes: &mut Changes) {
        let wanted = if port.has_ranges() {
            let mut ranges = port.port.source_ranges.clone();
            ranges.sort_unstable();
            ranges.dedup();
            ranges.into()
        } else if self.ranges.is_empty() {
            return;
        } else {
            Box::default()
        };
        self.set_ranges(port.id, wanted, changes);
    }

    /// Makes the source ranges of a service exactly these.
    pub(super) fn set_ranges(&mut self, service: ServiceId, wanted: Box<[IpNetwork]>, changes: &mut Changes) {
        let old = self.ranges.remove(&service).unwrap_or_default();
        for range in &wanted {
            let key = (service, *range);
            if !old.contains(range) || changes.delete_ranges.remove(&key) {
                changes.put_ranges.insert(key);
            }
        }
        for range in old.iter().filter(|range| !wanted.contains(range)) {
            changes.put_ranges.remove(&(service, *range));
            changes.delete_ranges.insert((service, *range));
            self.released.ranges += 1;
        }
        self.range_count = self.range_count + wanted.len() - old.len();
        if !wanted.is_empty() {
            self.ranges.insert(service, wanted);
        }
    }

    /// Finds a Maglev table for every port that wants one. On `Err` none was taken.
    pub(super) fn take_maglevs(
        &mut self,
        ports: &mut [Claimed<'_>],
        refusals: &mut Vec<Refusal>,
    ) -> Result<(), Refusal> {
        if self.capacity.maglevs == 0 {
            return Ok(());
        }
        let full = Refusal::Full { what: "Maglev tables", capacity: self.capacity.maglevs };
        let spare = (self.capacity.maglevs / MAGLEVS_A_SPARE).max(1) as usize;
        let mut taken: Vec<MaglevId> = Vec::new();
        for port in ports.iter_mut() {
            let maglev = port.frontends.iter().any(|(_, policy)| policy.scheduler == Scheduler::Maglev);
            if !maglev || port.cluster().is_empty() {
                continue;
            }
            let old = self.entries.get(&port.id).filter(|entry| entry.maglev != 0);
            if let Some(old) = old
                && self.picks_stay(old, port)
            {
                port.maglev = old.maglev;
                continue;
            }
            // Who has none goes without rather than take what others need for a change.
            let room = old.is_some() || self.free_maglevs.len() > spare;
            match room.then(|| self.free_maglevs.pop_first()).flatten() {
                Some(id) => {
                    taken.push(id);
                    port.maglev = id;
                }
                None if old.is_some() => {
                    self.free_maglevs.extend(taken);
                    return Err(full);
                }
                None => {
                    if !refusals.contains(&full) {
                        refusals.push(full.clone());
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether the entry's Maglev table is right for the port too.
    fn picks_stay(&self, old: &Entry, port: &Claimed<'_>) -> bool {
        let (from, to) = cluster_part(&old.counts, old.local_only);
        !old.tainted
            && self.are(old.backends.get(from..to).unwrap_or_default(), port.cluster())
            && (old.owner.is_some() || self.found(old.maglev, port))
    }

    /// Whether an adopted table holds what the port would have written: nobody else vouches for it.
    fn found(&self, id: MaglevId, port: &Claimed<'_>) -> bool {
        let picks = || maglev::picks(port.cluster(), MAGLEV_SEED);
        self.found_maglevs.get(&id).is_some_and(|found| *found == maglev::fingerprint(&picks()))
    }

    /// Writes the port's Maglev table if it is new; a table that stays is no longer `old`'s.
    pub(super) fn put_maglev(&mut self, port: &Claimed<'_>, old: &mut Entry, changes: &mut Changes) {
        if port.maglev == 0 {
            return;
        }
        if port.maglev == old.maglev {
            old.maglev = 0;
            return;
        }
        let picks = maglev::picks(port.cluster(), MAGLEV_SEED);
        changes.put_maglevs.push(MaglevWrite { id: port.maglev, picks });
    }

    /// Notes which UDP and SCTP backends `old` has that `new` lacks.
    pub(super) fn note_lost(&self, service: ServiceId, old: &Entry, new: &Entry, changes: &mut Changes) {
        let first = old.all_backends().next().and_then(|id| self.backends.addr(id));
        if first.is_none_or(|addr| addr.proto == Proto::Tcp) {
            return;
        }
        let mut kept: Vec<BackendId> = new.all_backends().collect();
        kept.sort_unstable();
        let gone = old.all_backends().filter(|id| kept.binary_search(id).is_err());
        changes.lost.extend(gone.filter_map(|id| Some((service, self.backends.addr(id)?))));
    }
}

/// The members of a service with this run, ordered by id.
fn members(backends: &[BackendId], counts: &[u16; 4], local_only: u16) -> Box<[(BackendId, Member)]> {
    let [local, remote, local_terminating, _] = counts.map(usize::from);
    let ready = local + remote;
    let (from, to) = cluster_part(counts, local_only);
    let member = |at: usize| Member {
        local: at < local || (ready..ready + local_terminating).contains(&at),
        ready: at < ready,
        cluster: (from..to).contains(&at),
    };
    let mut members: Vec<_> = backends.iter().enumerate().map(|(at, id)| (*id, member(at))).collect();
    members.sort_unstable_by_key(|(id, _)| *id);
    members.dedup_by_key(|(id, _)| *id);
    members.into()
}
