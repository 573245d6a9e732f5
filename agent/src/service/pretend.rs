//! A pretended kernel for tests. Invariant: it applies one map operation at a time, in the order that [`Changes`] promises,
//! and refuses what a real map would.

use super::*;
use ipnetwork::IpNetwork;
use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) const CAPACITY: Capacity =
    Capacity { frontends4: 24, frontends6: 8, slots: 40, backends: 40, members: 24, ranges: 12, maglevs: 4 };

#[derive(Clone, Default)]
pub(crate) struct Kernel {
    pub(crate) frontends: BTreeMap<FrontendKey, FrontendEntry>,
    pub(crate) slots: Vec<(ServiceId, BackendId)>,
    pub(crate) backends: BTreeMap<BackendId, BackendAddr>,
    pub(crate) maglevs: BTreeMap<MaglevId, Arc<[u16]>>,
    pub(crate) members: BTreeMap<(ServiceId, BackendId), Member>,
    pub(crate) ranges: BTreeSet<(ServiceId, IpNetwork)>,
}

/// One map operation.
pub(crate) enum Step {
    PutBackend(BackendId, BackendAddr),
    PutSlot(u32, ServiceId, BackendId),
    PutMaglev(MaglevId, Arc<[u16]>),
    PutMember((ServiceId, BackendId), Member),
    PutRange((ServiceId, IpNetwork)),
    PutFrontend(FrontendKey, FrontendEntry),
    DeleteFrontend(FrontendKey),
    DeleteRange((ServiceId, IpNetwork)),
    DeleteMember((ServiceId, BackendId)),
    DeleteBackend(BackendId),
}

pub(crate) fn steps(changes: &Changes) -> Vec<Step> {
    let mut steps = Vec::new();
    steps.extend(changes.put_backends.iter().map(|(id, addr)| Step::PutBackend(*id, *addr)));
    steps.extend(changes.put_slots.iter().map(|slot| Step::PutSlot(slot.index, slot.service, slot.backend)));
    steps.extend(changes.put_maglevs.iter().map(|write| Step::PutMaglev(write.id, write.picks.clone())));
    steps.extend(changes.put_members.iter().map(|(key, member)| Step::PutMember(*key, *member)));
    steps.extend(changes.put_ranges.iter().map(|key| Step::PutRange(*key)));
    steps.extend(changes.put_frontends.iter().map(|(key, entry)| Step::PutFrontend(*key, *entry)));
    steps.extend(changes.delete_frontends.iter().map(|key| Step::DeleteFrontend(*key)));
    steps.extend(changes.delete_ranges.iter().map(|key| Step::DeleteRange(*key)));
    steps.extend(changes.delete_members.iter().map(|key| Step::DeleteMember(*key)));
    steps.extend(changes.delete_backends.iter().map(|id| Step::DeleteBackend(*id)));
    steps
}

/// What a program sees at a frontend.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Shown {
    pub(crate) backends: Vec<BackendAddr>,
    pub(crate) counts: [u16; 4],
    pub(crate) local_only: u16,
    pub(crate) policy: FrontendPolicy,
    pub(crate) picks: Option<Arc<[u16]>>,
}

impl Kernel {
    pub(crate) fn apply(&mut self, step: Step) {
        match step {
            Step::PutBackend(id, addr) => {
                assert!((1..=CAPACITY.backends).contains(&id), "no such place");
                assert!(self.backends.insert(id, addr).is_none(), "an id that is in use is not given out");
            }
            Step::PutSlot(index, service, backend) => {
                assert!(index < CAPACITY.slots);
                self.slots.resize(self.slots.len().max(index as usize + 1), (0, 0));
                self.slots[index as usize] = (service, backend);
            }
            Step::PutMaglev(id, picks) => {
                assert!((1..=CAPACITY.maglevs).contains(&id));
                let used = self.frontends.values().any(|entry| entry.maglev == id);
                assert!(!used, "a table that is followed is not written");
                self.maglevs.insert(id, picks);
            }
            Step::PutMember(key, member) => {
                self.members.insert(key, member);
                assert!(self.members.len() <= CAPACITY.members as usize, "members full");
            }
            Step::PutRange(key) => {
                assert!(self.ranges.insert(key), "put twice");
                assert!(self.ranges.len() <= CAPACITY.ranges as usize, "ranges full");
            }
            Step::PutFrontend(key, entry) => {
                self.frontends.insert(key, entry);
                let v6 = self.frontends.keys().filter(|k| k.addr.is_ipv6()).count();
                assert!(v6 <= CAPACITY.frontends6 as usize);
                assert!(self.frontends.len() - v6 <= CAPACITY.frontends4 as usize, "frontends full");
            }
            Step::DeleteFrontend(key) => assert!(self.frontends.remove(&key).is_some(), "deleted twice"),
            Step::DeleteRange(key) => assert!(self.ranges.remove(&key), "deleted twice"),
            Step::DeleteMember(key) => assert!(self.members.remove(&key).is_some(), "deleted twice"),
            Step::DeleteBackend(id) => assert!(self.backends.remove(&id).is_some(), "deleted twice"),
        }
    }

    pub(crate) fn apply_all(&mut self, changes: &Changes) {
        steps(changes).into_iter().for_each(|step| self.apply(step));
    }

    /// What a program sees at a frontend, or nothing when anything does not fit.
    pub(crate) fn shown(&self, key: &FrontendKey) -> Option<Shown> {
        let entry = self.frontends.get(key)?;
        let run = entry.run();
        let slots = self.slots.get(run.base as usize..(run.base + run.len) as usize)?;
        let backends: Option<Vec<_>> = slots
            .iter()
            .map(|(owner, id)| if *owner == entry.service { self.backends.get(id).copied() } else { None })
            .collect();
        let picks = if entry.maglev == 0 { None } else { Some(self.maglevs.get(&entry.maglev)?.clone()) };
        let (counts, local_only) = (entry.counts, entry.local_only);
        Some(Shown { backends: backends?, counts, local_only, policy: entry.policy, picks })
    }

    /// The source ranges that a program finds for a frontend.
    pub(crate) fn ranges(&self, key: &FrontendKey) -> Option<BTreeSet<IpNetwork>> {
        let entry = self.frontends.get(key).filter(|entry| entry.policy.source_ranges)?;
        Some(self.ranges.iter().filter(|(id, _)| *id == entry.service).map(|(_, range)| *range).collect())
    }

    /// Whether every backend of a frontend with session affinity is a member.
    pub(crate) fn has_members(&self, key: &FrontendKey) -> bool {
        let Some(entry) = self.frontends.get(key).filter(|e| e.policy.affinity_timeout_s != 0) else {
            return true;
        };
        let slots = &self.slots[entry.base as usize..][..entry.run().len as usize];
        slots.iter().all(|(_, id)| self.members.contains_key(&(entry.service, *id)))
    }

    pub(crate) fn observe(&self) -> Observed {
        Observed {
            frontends: self.frontends.iter().map(|(k, v)| (*k, *v)).collect(),
            slots: self.slots.clone(),
            backends: self.backends.iter().map(|(k, v)| (*k, *v)).collect(),
            members: self.members.iter().map(|(k, v)| (*k, *v)).collect(),
            ranges: self.ranges.iter().copied().collect(),
            maglevs: self.maglevs.iter().map(|(id, picks)| (*id, maglev::fingerprint(picks))).collect(),
        }
    }
}
