//! The table's backends by id and by address. Invariant: an id is given out again only after [`Backends::give_back`] and
//! after many others, so who still holds one that was let go finds nothing there, or what is not what it looks for.

use super::super::changes::BackendId;
use super::super::plan::BackendAddr;
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use std::collections::VecDeque;
use std::hash::BuildHasher as _;
use std::net::IpAddr;

/// Ids that wait to be given out again while there are fresh ones.
const RESTING: usize = 4_096;

/// A backend, and how many runs and dormant lists have it.
#[derive(Clone, Copy, Debug)]
struct Held {
    addr: BackendAddr,
    references: u32,
}

/// All backends that have an id.
#[derive(Debug)]
pub(super) struct Backends {
    /// By id, of which the first is nobody's.
    held: Vec<Option<Held>>,
    count: usize,
    /// By the address that `held` has for it: four bytes a backend, where a map with the address for its key has 28, are more
    /// often in the processor's cache.
    ids: HashTable<BackendId>,
    hasher: RandomState,
    /// Ids that nobody has, longest first.
    resting: VecDeque<BackendId>,
    /// The largest id.
    last: BackendId,
}

impl Backends {
    /// What the kernel holds, with nobody who refers to it. Ids are 1 to `last`; what has another is let alone.
    pub(super) fn adopt(last: BackendId, observed: &[(BackendId, BackendAddr)]) -> Self {
        let mut held = vec![None];
        let mut count = 0;
        for (id, addr) in observed.iter().filter(|(id, _)| (1..=last).contains(id)) {
            let at = *id as usize;
            if at >= held.len() {
                held.resize(at + 1, None);
            }
            count += usize::from(held[at].is_none());
            held[at] = Some(Held { addr: *addr, references: 0 });
        }
        let free = |(id, held): (BackendId, &Option<Held>)| held.is_none().then_some(id);
        let resting = (0..).zip(&held).skip(1).filter_map(free).collect();
        let (ids, hasher) = (HashTable::with_capacity(count), RandomState::default());
        let mut adopted = Self { held, count, ids, hasher, resting, last };
        for id in 1..adopted.held.len() as BackendId {
            // Of two with one address the first is found.
            if let Some(addr) = adopted.addr(id)
                && adopted.id(&addr).is_none()
            {
                adopted.index(id, &addr);
            }
        }
        adopted
    }

    /// Makes the id the one that is found by its address.
    fn index(&mut self, id: BackendId, addr: &BackendAddr) {
        let (held, hasher) = (&self.held, &self.hasher);
        let again = |id: &BackendId| held[*id as usize].as_ref().map_or(0, |held| hash(hasher, &held.addr));
        self.ids.insert_unique(hash(hasher, addr), id, again);
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// The id of an address.
    pub(super) fn id(&self, addr: &BackendAddr) -> Option<BackendId> {
        let is_it = |id: &BackendId| self.held[*id as usize].as_ref().is_some_and(|held| held.addr == *addr);
        self.ids.find(hash(&self.hasher, addr), is_it).copied()
    }

    /// The address of an id.
    pub(super) fn addr(&self, id: BackendId) -> Option<BackendAddr> {
        Some(self.held.get(id as usize)?.as_ref()?.addr)
    }

    /// One more refers to the address: its id, and whether that is new. The caller has seen to it that there is one, else
    /// it is 0, which is nobody's.
    pub(super) fn refer(&mut self, addr: BackendAddr) -> (BackendId, bool) {
        if let Some(id) = self.id(&addr) {
            self.refer_to(id);
            return (id, false);
        }
        let Some(id) = fresh(&mut self.held, &mut self.resting, self.last) else { return (0, false) };
        self.held[id as usize] = Some(Held { addr, references: 1 });
        self.count += 1;
        self.index(id, &addr);
        (id, true)
    }

    /// One more refers to the id.
    pub(super) fn refer_to(&mut self, id: BackendId) {
        if let Some(Some(held)) = self.held.get_mut(id as usize) {
            held.references += 1;
        }
    }

    /// One less refers to the id; true when that was the last one and the backend is gone.
    pub(super) fn drop_reference(&mut self, id: BackendId) -> bool {
        let Some(Some(held)) = self.held.get_mut(id as usize) else { return false };
        held.references = held.references.saturating_sub(1);
        held.references == 0 && self.forget(id)
    }

    /// Removes a backend; false when there is none of this id.
    pub(super) fn forget(&mut self, id: BackendId) -> bool {
        let Some(gone) = self.addr(id) else { return false };
        if let Ok(found) = self.ids.find_entry(hash(&self.hasher, &gone), |held| *held == id) {
            found.remove();
        }
        self.held[id as usize] = None;
        self.count -= 1;
        true
    }

    /// Ids that nobody refers to, ordered.
    pub(super) fn orphans(&self) -> Vec<BackendId> {
        let is_orphan = |held: &Option<Held>| held.is_some_and(|held| held.references == 0);
        (0..).zip(&self.held).filter(|(_, held)| is_orphan(held)).map(|(id, _)| id).collect()
    }

    /// Nobody holds these forgotten ids any more.
    pub(super) fn give_back(&mut self, ids: impl IntoIterator<Item = BackendId>) {
        self.resting.extend(ids);
    }
}

/// One word for nearly all of them, which a derived implementation hashes byte by byte.
fn hash(hasher: &RandomState, backend: &BackendAddr) -> u64 {
    let rest = u64::from(backend.port) << 8 | backend.proto as u64;
    match backend.addr {
        IpAddr::V4(addr) => hasher.hash_one(u64::from(addr.to_bits()) << 32 | rest),
        IpAddr::V6(addr) => hasher.hash_one((addr.to_bits(), rest)),
    }
}

/// An id for a new backend. Those never used come first while few wait, so that none comes back soon; then those that waited
/// longest, so that ids don't grow with every backend that ever was.
fn fresh(
    held: &mut Vec<Option<Held>>,
    resting: &mut VecDeque<BackendId>,
    last: BackendId,
) -> Option<BackendId> {
    let next = held.len();
    if resting.len() < RESTING && next <= last as usize {
        held.push(None);
        return BackendId::try_from(next).ok();
    }
    resting.pop_front()
}

#[cfg(test)]
mod tests {
    use super::super::super::model::Proto;
    use super::*;
    use std::net::Ipv4Addr;

    fn addr(n: u32) -> BackendAddr {
        BackendAddr { addr: Ipv4Addr::from(n).into(), port: 1, proto: Proto::Tcp }
    }

    #[test]
    fn ids_that_were_let_go_rest_and_come_back() {
        let mut backends = Backends::adopt(3, &[]);
        assert_eq!([1, 2, 3].map(|n| backends.refer(addr(n))), [(1, true), (2, true), (3, true)]);
        assert_eq!(backends.refer(addr(2)), (2, false));
        assert_eq!(backends.refer(addr(4)), (0, false), "there is no room");
        assert!(!backends.drop_reference(2), "another refers to it");
        assert!(backends.drop_reference(2) && !backends.drop_reference(2));
        assert_eq!((backends.len(), backends.addr(2), backends.id(&addr(2))), (2, None, None));
        assert_eq!(backends.refer(addr(4)), (0, false), "a reader may still hold it");
        backends.give_back([2]);
        assert_eq!(backends.refer(addr(4)), (2, true));
        assert_eq!((backends.addr(2), backends.len()), (Some(addr(4)), 3));
    }

    #[test]
    fn what_was_never_used_comes_first_while_few_rest() {
        let mut backends = Backends::adopt(1 << 20, &[]);
        for n in 1..=RESTING as u32 {
            assert_eq!(backends.refer(addr(n)), (n, true), "none comes back soon");
            assert!(backends.drop_reference(n));
            backends.give_back([n]);
        }
        assert_eq!(backends.refer(addr(0)), (1, true), "ids do not grow for ever");
    }

    #[test]
    fn what_the_kernel_holds_waits_for_somebody_who_refers_to_it() {
        let mut backends =
            Backends::adopt(9, &[(4, addr(1)), (2, addr(1)), (7, addr(2)), (0, addr(3)), (10, addr(4))]);
        assert_eq!(backends.len(), 3);
        assert_eq!(backends.id(&addr(1)), Some(2), "the lesser id of two");
        assert_eq!(backends.refer(addr(2)), (7, false));
        assert_eq!(backends.orphans(), [2, 4]);
        assert!(backends.forget(4));
        assert_eq!(backends.id(&addr(1)), Some(2));
        assert_eq!(backends.refer(addr(9)), (8, true));
    }
}
