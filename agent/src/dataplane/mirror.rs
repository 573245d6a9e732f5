//! Changes, put back together: for data planes whose kernel side has no slots and ids. Invariant: after the same changes
//! the mirror shows for every frontend exactly the backends that the eBPF maps would show.

use crate::service::{BackendAddr, BackendId, Changes, FrontendEntry, FrontendKey, ServiceId};
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A frontend with all that it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirrored {
    /// Id, counts and policy.
    pub entry: FrontendEntry,
    /// Backends in the order of the run (see [`crate::service::Counts`]).
    pub backends: Vec<BackendAddr>,
}

impl Mirrored {
    /// What policy Cluster may pick: ready endpoints but those that hints keep for others or, when nothing is ready,
    /// those that serve while they terminate.
    pub fn cluster(&self) -> &[BackendAddr] {
        let [local, remote, ..] = self.entry.counts.map(usize::from);
        let ready = local + remote;
        let first = usize::from(self.entry.local_only);
        if ready > first { self.part(first, ready) } else { self.part(ready, self.backends.len()) }
    }

    /// What policy Local may pick: the same among the endpoints of this node.
    pub fn local(&self) -> &[BackendAddr] {
        let [local, remote, local_terminating, _] = self.entry.counts.map(usize::from);
        if local != 0 {
            self.part(0, local)
        } else {
            self.part(local + remote, local + remote + local_terminating)
        }
    }

    /// All that are on this node, whatever they do.
    pub fn on_this_node(&self) -> impl Iterator<Item = &BackendAddr> {
        let [local, remote, local_terminating, _] = self.entry.counts.map(usize::from);
        self.part(0, local).iter().chain(self.part(local + remote, local + remote + local_terminating))
    }

    /// Those that serve while they terminate.
    pub fn terminating(&self) -> &[BackendAddr] {
        let [local, remote, ..] = self.entry.counts.map(usize::from);
        self.part(local + remote, self.backends.len())
    }

    fn part(&self, from: usize, to: usize) -> &[BackendAddr] {
        self.backends.get(from..to).unwrap_or_default()
    }
}

/// What the changes so far have made.
#[derive(Clone, Debug, Default)]
pub struct Mirror {
    slots: Vec<BackendId>,
    backends: HashMap<BackendId, BackendAddr>,
    frontends: BTreeMap<FrontendKey, Mirrored>,
    ranges: BTreeSet<(ServiceId, IpNetwork)>,
}

/// Which frontends a round has touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// New or changed ones, with what they were before.
    pub put: BTreeMap<FrontendKey, Option<Mirrored>>,
    /// Gone ones, with what they were.
    pub deleted: BTreeMap<FrontendKey, Mirrored>,
    /// Services whose source ranges changed.
    pub ranges: BTreeSet<ServiceId>,
}

impl Mirror {
    /// Takes one round in and says what it touched.
    pub fn apply(&mut self, changes: &Changes) -> Touched {
        let mut touched = Touched::default();
        self.backends.extend(changes.put_backends.iter().map(|(id, addr)| (*id, *addr)));
        for slot in &changes.put_slots {
            let at = slot.index as usize;
            if at >= self.slots.len() {
                self.slots.resize(at + 1, 0);
            }
            self.slots[at] = slot.backend;
        }
        for (service, range) in &changes.put_ranges {
            self.ranges.insert((*service, *range));
            touched.ranges.insert(*service);
        }
        for (service, range) in &changes.delete_ranges {
            self.ranges.remove(&(*service, *range));
            touched.ranges.insert(*service);
        }
        for (key, entry) in &changes.put_frontends {
            let run = entry.run();
            let slots = self.slots.get(run.base as usize..(run.base + run.len) as usize).unwrap_or_default();
            let backends = slots.iter().filter_map(|id| self.backends.get(id).copied()).collect();
            let old = self.frontends.insert(*key, Mirrored { entry: *entry, backends });
            touched.put.insert(*key, old);
        }
        for key in &changes.delete_frontends {
            if let Some(old) = self.frontends.remove(key) {
                touched.deleted.insert(*key, old);
            }
        }
        for id in &changes.delete_backends {
            self.backends.remove(id);
        }
        touched
    }

    /// A frontend as it is now.
    pub fn get(&self, key: &FrontendKey) -> Option<&Mirrored> {
        self.frontends.get(key)
    }

    /// All frontends, in the order of their keys.
    pub fn frontends(&self) -> impl Iterator<Item = (&FrontendKey, &Mirrored)> {
        self.frontends.iter()
    }

    /// All backends, also those that are in no run because hints keep them for others.
    pub fn backends(&self) -> impl Iterator<Item = &BackendAddr> {
        self.backends.values()
    }

    /// The source ranges of a service port.
    pub fn ranges(&self, service: ServiceId) -> impl Iterator<Item = &IpNetwork> {
        let lowest = IpNetwork::V4(ipnetwork::Ipv4Network::from(std::net::Ipv4Addr::UNSPECIFIED));
        let from = self.ranges.range((service, lowest)..);
        // IPv4 sorts before IPv6, and 0.0.0.0/32 is not the lowest of its address: prefixes sort after addresses.
        let before =
            self.ranges.range(..(service, lowest)).rev().take_while(move |(held, _)| *held == service);
        from.take_while(move |(held, _)| *held == service).chain(before).map(|(_, range)| range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{Capacity, Counts, DesiredPort, FrontendPolicy, Observed, Proto, Table};

    const ROOM: Capacity = Capacity {
        frontends4: 10,
        frontends6: 10,
        slots: 100,
        backends: 100,
        members: 100,
        ranges: 100,
        maglevs: 10,
    };

    fn at(last: u8) -> BackendAddr {
        BackendAddr { addr: [10, 0, 0, last].into(), port: 80, proto: Proto::Tcp }
    }

    fn key() -> FrontendKey {
        FrontendKey { addr: [10, 96, 0, 1].into(), port: 80, proto: Proto::Tcp }
    }

    fn shown(counts: Counts, backends: &[u8]) -> Mirror {
        let mut table = Table::adopt(ROOM, &Observed::default());
        let mut mirror = Mirror::default();
        for backends in [&[77_u8][..], backends] {
            let counts =
                if backends == [77] { Counts { local_ready: 1, ..Counts::default() } } else { counts };
            let wanted = DesiredPort {
                frontends: vec![(key(), FrontendPolicy::default())],
                backends: backends.iter().map(|n| at(*n)).collect(),
                counts,
                ..DesiredPort::default()
            };
            let mut changes = Changes::default();
            table.set(&"a/b".into(), &[wanted], &mut changes).expect("there is room");
            let touched = mirror.apply(&changes);
            assert_eq!(touched.put.len(), 1);
            table.settle();
        }
        mirror
    }

    #[test]
    fn policies_see_their_parts_of_the_run() {
        let counts = Counts {
            local_ready: 1,
            remote_ready: 2,
            local_terminating: 1,
            remote_terminating: 1,
            ..Counts::default()
        };
        let mirror = shown(counts, &[1, 2, 3, 4, 5]);
        let found = mirror.get(&key()).expect("it was put");
        assert_eq!(found.cluster(), [at(1), at(2), at(3)]);
        assert_eq!(found.local(), [at(1)]);
        assert_eq!(found.terminating(), [at(4), at(5)]);
        assert_eq!(found.on_this_node().copied().collect::<Vec<_>>(), [at(1), at(4)]);
    }

    #[test]
    fn terminating_endpoints_serve_when_nothing_is_ready() {
        let counts = Counts { local_terminating: 1, remote_terminating: 1, ..Counts::default() };
        let mirror = shown(counts, &[4, 5]);
        let found = mirror.get(&key()).expect("it was put");
        assert_eq!(found.cluster(), [at(4), at(5)]);
        assert_eq!(found.local(), [at(4)]);
    }
}
