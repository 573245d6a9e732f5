//! What the table holds, and the elements that change it. Invariant: pure; after the transactions so far the kernel's
//! maps are what is kept here, and a change costs elements in proportion to itself, not to the service.

use super::plan::{Plan, Plans};
use super::schema::{DROP, Names, REJECT, frontend_key, octets, port};
use crate::dataplane::mirror::{Mirror, Mirrored, Touched};
use crate::network::netlink::nft::{Element, Transaction, Value};
use crate::service::{BackendAddr, Family, FrontendKey, ServiceId};
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

/// Pool and plan inside, pool and plan outside.
type Ways = [u32; 4];

/// The two pools of a service port: all that policy Cluster may pick, and what policy Local may.
const SCOPES: [Scope; 2] = [Scope::Cluster, Scope::Local];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Cluster,
    Local,
}

impl Scope {
    /// Number of the pool; masquerading goes by its lowest bit.
    fn pool(self, service: ServiceId) -> u32 {
        service << 1 | u32::from(self == Self::Local)
    }

    fn of(self, mirrored: &Mirrored) -> &[BackendAddr] {
        match self {
            Self::Cluster => mirrored.cluster(),
            Self::Local => mirrored.local(),
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Pool {
    /// In the order of the kernel's, which is not the run's: who leaves is replaced by the last one.
    backends: Vec<BackendAddr>,
    /// They are members, too.
    members: bool,
    ranges: Vec<IpNetwork>,
}

#[derive(Debug, Default)]
struct Held {
    /// `None` where the kernel does not have it yet.
    frontends: Vec<(FrontendKey, Option<Ways>)>,
    pools: [Pool; 2],
    /// Addresses of endpoints on this node.
    here: Vec<IpAddr>,
}

/// Everything that the table holds beside its fixed part.
#[derive(Debug, Default)]
pub(super) struct State {
    services: HashMap<ServiceId, Held>,
    plans: Plans,
    hairpins: HashMap<IpAddr, u32>,
}

impl State {
    /// Rules beside the fixed ones.
    pub(super) fn rule_count(&self) -> usize {
        self.plans.rule_count()
    }

    /// Adds to `tx` what a round has changed.
    pub(super) fn update(&mut self, touched: &Touched, mirror: &Mirror, tx: &mut Transaction<'_>) {
        let mut services: BTreeSet<ServiceId> = touched.ranges.clone();
        for (key, old) in &touched.deleted {
            services.insert(old.entry.service);
            self.drop_frontend(old.entry.service, key, tx);
        }
        for (key, old) in &touched.put {
            let Some(now) = mirror.get(key) else { continue };
            let id = now.entry.service;
            if let Some(old) = old.as_ref().filter(|old| old.entry.service != id) {
                services.insert(old.entry.service);
                self.drop_frontend(old.entry.service, key, tx);
            }
            services.insert(id);
            let held = self.services.entry(id).or_default();
            if !held.frontends.iter().any(|(held, _)| held == key) {
                held.frontends.reserve_exact(1);
                held.frontends.push((*key, None));
            }
        }
        for service in services {
            self.update_service(service, mirror, tx);
        }
        self.plans.sweep(tx);
    }

    fn drop_frontend(&mut self, service: ServiceId, key: &FrontendKey, tx: &mut Transaction<'_>) {
        let Some(held) = self.services.get_mut(&service) else { return };
        let Some(at) = held.frontends.iter().position(|(held, _)| held == key) else { return };
        if let (_, Some(ways)) = held.frontends.swap_remove(at) {
            delete(tx, Names::of(key.addr).services, &frontend_key(key));
            self.plans.give_back(ways[1]);
            self.plans.give_back(ways[3]);
        }
    }

    fn update_service(&mut self, id: ServiceId, mirror: &Mirror, tx: &mut Transaction<'_>) {
        let Some(mut held) = self.services.remove(&id) else { return };
        let frontends: Vec<(FrontendKey, &Mirrored)> =
            held.frontends.iter().filter_map(|(key, _)| Some((*key, mirror.get(key)?))).collect();
        let any = frontends.first().map(|(_, mirrored)| *mirrored);
        let affine = frontends.iter().any(|(_, mirrored)| mirrored.entry.policy.affinity_timeout_s != 0);
        let ranged = frontends.iter().any(|(_, mirrored)| mirrored.entry.policy.source_ranges);
        let ranges = if ranged { outermost(mirror.ranges(id)) } else { Vec::new() };
        for (scope, pool) in SCOPES.into_iter().zip(&mut held.pools) {
            let used = frontends.iter().any(|(_, m)| scopes(m).contains(&scope));
            let backends = any.filter(|_| used).map_or(&[][..], |mirrored| scope.of(mirrored));
            pool.update(scope.pool(id), backends, affine, if used { &ranges } else { &[] }, tx);
        }
        self.update_hairpins(&mut held.here, any, tx);
        for (key, ways) in &mut held.frontends {
            let Some(mirrored) = mirror.get(key) else { continue };
            self.update_frontend(key, ways, id, mirrored, tx);
        }
        if !held.frontends.is_empty() {
            self.services.insert(id, held);
        }
    }

    fn update_frontend(
        &mut self,
        key: &FrontendKey,
        held: &mut Option<Ways>,
        service: ServiceId,
        mirrored: &Mirrored,
        tx: &mut Transaction<'_>,
    ) {
        let [inside, outside] = scopes(mirrored);
        let wanted = [
            inside.pool(service),
            self.plan(key, mirrored, inside, false, tx),
            outside.pool(service),
            self.plan(key, mirrored, outside, true, tx),
        ];
        if let Some(old) = *held {
            self.plans.give_back(old[1]);
            self.plans.give_back(old[3]);
        }
        if *held == Some(wanted) {
            return;
        }
        let (set, bytes) = (Names::of(key.addr).services, frontend_key(key));
        if held.is_some() {
            delete(tx, set, &bytes);
        }
        let mut value = [0; 16];
        for (to, way) in value.chunks_exact_mut(4).zip(wanted) {
            to.copy_from_slice(&way.to_ne_bytes());
        }
        tx.add_element(set, Element { key: &bytes, end: None, value: Value::Bytes(&value) });
        *held = Some(wanted);
    }

    fn plan(
        &mut self,
        key: &FrontendKey,
        mirrored: &Mirrored,
        scope: Scope,
        outside: bool,
        tx: &mut Transaction<'_>,
    ) -> u32 {
        let choices = scope.of(mirrored).len() as u32;
        if choices == 0 {
            let elsewhere = scope == Scope::Local && !mirrored.backends.is_empty();
            return if elsewhere { DROP } else { REJECT };
        }
        let policy = &mirrored.entry.policy;
        let plan = Plan {
            family: Family::of(key.addr),
            node: key.addr.is_unspecified(),
            outside,
            choices,
            affinity_s: policy.affinity_timeout_s,
            ranges: outside && policy.source_ranges,
        };
        self.plans.take(plan, tx)
    }

    fn update_hairpins(&mut self, held: &mut Vec<IpAddr>, now: Option<&Mirrored>, tx: &mut Transaction<'_>) {
        let mut here: Vec<IpAddr> =
            now.into_iter().flat_map(Mirrored::on_this_node).map(|backend| backend.addr).collect();
        here.sort_unstable();
        here.dedup();
        if here == *held {
            return;
        }
        for addr in here.iter().filter(|addr| held.binary_search(addr).is_err()) {
            let users = self.hairpins.entry(*addr).or_default();
            *users += 1;
            if *users == 1 {
                let key = [octets(*addr), octets(*addr)].concat();
                add(tx, Names::of(*addr).hairpins, &key);
            }
        }
        for addr in held.iter().filter(|addr| here.binary_search(addr).is_err()) {
            let Some(users) = self.hairpins.get_mut(addr) else { continue };
            *users -= 1;
            if *users == 0 {
                self.hairpins.remove(addr);
                delete(tx, Names::of(*addr).hairpins, &[octets(*addr), octets(*addr)].concat());
            }
        }
        *held = here;
    }
}

/// Whose endpoints clients inside and outside get.
fn scopes(mirrored: &Mirrored) -> [Scope; 2] {
    let policy = &mirrored.entry.policy;
    let scope = |local| if local { Scope::Local } else { Scope::Cluster };
    [scope(policy.internal_local), scope(policy.internal_local || policy.external_local)]
}

impl Pool {
    fn update(
        &mut self,
        id: u32,
        wanted: &[BackendAddr],
        members: bool,
        ranges: &[IpNetwork],
        tx: &mut Transaction<'_>,
    ) {
        let now = rearranged(&self.backends, wanted);
        if let Some(some) = now.first().or(self.backends.first()) {
            let names = Names::of(some.addr);
            let changed = |at: &usize| self.backends.get(*at) != now.get(*at);
            for at in (0..self.backends.len().max(now.len())).filter(changed) {
                let mut key = [0; 8];
                key[..4].copy_from_slice(&id.to_ne_bytes());
                key[4..].copy_from_slice(&(at as u32).to_ne_bytes());
                if at < self.backends.len() {
                    delete(tx, names.endpoints, &key);
                }
                if let Some(backend) = now.get(at) {
                    let value = [&octets(backend.addr)[..], &port(backend.port)].concat();
                    tx.add_element(
                        names.endpoints,
                        Element { key: &key, end: None, value: Value::Bytes(&value) },
                    );
                }
            }
            if members || self.members {
                let unique = |of: &[BackendAddr], yes: bool| -> BTreeSet<BackendAddr> {
                    if yes { of.iter().copied().collect() } else { BTreeSet::new() }
                };
                let (before, after) = (unique(&self.backends, self.members), unique(&now, members));
                for gone in before.difference(&after) {
                    delete(tx, names.members, &member(id, gone));
                }
                for new in after.difference(&before) {
                    add(tx, names.members, &member(id, new));
                }
            }
        }
        self.members = members && !now.is_empty();
        self.backends = now;
        self.update_ranges(id, ranges, tx);
    }

    fn update_ranges(&mut self, id: u32, wanted: &[IpNetwork], tx: &mut Transaction<'_>) {
        let write = |range: &IpNetwork| {
            let of = |addr| [&id.to_ne_bytes()[..], &octets(addr)].concat();
            (Names::of(range.ip()).ranges, of(range.network()), of(range.broadcast()))
        };
        for gone in self.ranges.iter().filter(|range| !wanted.contains(range)) {
            let (set, key, end) = write(gone);
            tx.delete_element(set, Element { key: &key, end: Some(&end), value: Value::None });
        }
        for new in wanted.iter().filter(|range| !self.ranges.contains(range)) {
            let (set, key, end) = write(new);
            tx.add_element(set, Element { key: &key, end: Some(&end), value: Value::None });
        }
        if self.ranges != wanted {
            self.ranges = wanted.to_vec();
        }
    }
}

fn member(pool: u32, backend: &BackendAddr) -> Vec<u8> {
    [&pool.to_ne_bytes()[..], &octets(backend.addr), &port(backend.port)].concat()
}

fn add(tx: &mut Transaction<'_>, set: &'static str, key: &[u8]) {
    tx.add_element(set, Element { key, end: None, value: Value::None });
}

fn delete(tx: &mut Transaction<'_>, set: &'static str, key: &[u8]) {
    tx.delete_element(set, Element { key, end: None, value: Value::None });
}

/// `wanted`, in an order in which as few places as possible differ from `held`.
fn rearranged(held: &[BackendAddr], wanted: &[BackendAddr]) -> Vec<BackendAddr> {
    if held.is_empty() || held == wanted {
        return wanted.to_vec();
    }
    // Weights: an endpoint may be wanted several times.
    let mut missing: BTreeMap<BackendAddr, usize> = BTreeMap::new();
    for backend in wanted {
        *missing.entry(*backend).or_default() += 1;
    }
    let mut places: Vec<Option<BackendAddr>> = held
        .iter()
        .map(|backend| {
            let left = missing.get_mut(backend).filter(|left| **left > 0)?;
            *left -= 1;
            Some(*backend)
        })
        .collect();
    let mut new = missing.into_iter().flat_map(|(backend, times)| std::iter::repeat_n(backend, times));
    for place in places.iter_mut().filter(|place| place.is_none()) {
        *place = new.next();
    }
    places.extend(new.map(Some));
    let mut at = 0;
    while at < places.len() {
        if places[at].is_some() {
            at += 1;
        } else {
            places.swap_remove(at);
        }
    }
    places.into_iter().flatten().collect()
}

/// The ranges without those that lie in others: the kernel's set takes no overlaps.
fn outermost<'a>(ranges: impl Iterator<Item = &'a IpNetwork>) -> Vec<IpNetwork> {
    let mut sorted: Vec<IpNetwork> = ranges.copied().collect();
    sorted.sort_by_key(IpNetwork::prefix);
    let mut kept: Vec<IpNetwork> = Vec::with_capacity(sorted.len());
    for range in sorted {
        let inside =
            |outer: &IpNetwork| outer.is_ipv4() == range.is_ipv4() && outer.contains(range.network());
        if !kept.iter().any(inside) {
            kept.push(range);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::super::schema::{TABLE, TABLE_FAMILY};
    use super::*;
    use crate::service::{Capacity, Changes, Counts, DesiredPort, FrontendPolicy, Observed, Proto, Table};

    const ROOM: Capacity = Capacity {
        frontends4: 100,
        frontends6: 100,
        slots: 10_000,
        backends: 10_000,
        members: 10_000,
        ranges: 100,
        maglevs: 10,
    };

    /// Planner's table, mirror and state, fed with one service.
    struct Bench {
        table: Table,
        mirror: Mirror,
        state: State,
    }

    impl Bench {
        fn new() -> Self {
            Self {
                table: Table::adopt(ROOM, &Observed::default()),
                mirror: Mirror::default(),
                state: State::default(),
            }
        }

        /// Makes these the service's endpoints, all on this node, and says how many elements and rules that took.
        fn set(&mut self, backends: &[BackendAddr], policy: FrontendPolicy) -> (usize, usize) {
            let key = |addr: [u8; 4]| FrontendKey { addr: addr.into(), port: 80, proto: Proto::Tcp };
            let wanted = DesiredPort {
                frontends: vec![
                    (key([10, 96, 0, 1]), policy),
                    (key([0; 4]), FrontendPolicy { external_local: true, ..policy }),
                ],
                backends: backends.to_vec(),
                counts: Counts { local_ready: backends.len(), ..Counts::default() },
                source_ranges: Vec::new(),
                dormant: Vec::new(),
            };
            let mut changes = Changes::default();
            self.table.set(&"a/b".into(), &[wanted], &mut changes).expect("there is room");
            let touched = self.mirror.apply(&changes);
            let mut tx = Transaction::new(TABLE_FAMILY, TABLE);
            self.state.update(&touched, &self.mirror, &mut tx);
            self.table.settle();
            (tx.elements(), tx.rules())
        }
    }

    fn at(n: u16) -> BackendAddr {
        let [high, low] = n.to_be_bytes();
        BackendAddr { addr: [10, 244, high, low].into(), port: 80, proto: Proto::Tcp }
    }

    #[test]
    fn one_endpoint_of_many_costs_few_elements() {
        let mut bench = Bench::new();
        let all: Vec<_> = (1..=5000).map(at).collect();
        let (elements, _) = bench.set(&all, FrontendPolicy::default());
        assert!(elements > 5000);
        // The first one leaves: the last takes its place in two pools, two frontends get another plan, each of which is
        // a deletion and an addition or two; chains of the old number go, chains of the new one come.
        let (elements, _) = bench.set(&all[1..], FrontendPolicy::default());
        assert!(elements <= 20, "{elements}");
        // It is replaced by another: no plan changes.
        let mut replaced = all[1..].to_vec();
        replaced[7] = at(6000);
        let (elements, rules) = bench.set(&replaced, FrontendPolicy::default());
        assert!(elements <= 6, "{elements}");
        assert_eq!(rules, 0);
        assert_eq!(bench.set(&replaced, FrontendPolicy::default()), (0, 0));
    }

    #[test]
    fn nothing_is_left_of_a_service_that_goes() {
        let mut bench = Bench::new();
        let policy = FrontendPolicy { affinity_timeout_s: 10, ..FrontendPolicy::default() };
        bench.set(&[at(1), at(2)], policy);
        assert!(bench.state.rule_count() > 0);
        let mut changes = Changes::default();
        bench.table.set(&"a/b".into(), &[], &mut changes).expect("removed");
        let touched = bench.mirror.apply(&changes);
        let mut tx = Transaction::new(TABLE_FAMILY, TABLE);
        bench.state.update(&touched, &bench.mirror, &mut tx);
        assert!(bench.state.services.is_empty() && bench.state.hairpins.is_empty());
        assert_eq!(bench.state.rule_count(), 0);
        assert!(tx.elements() > 0);
    }

    #[test]
    fn places_are_kept_as_far_as_possible() {
        let of = |ns: &[u16]| ns.iter().map(|n| at(*n)).collect::<Vec<_>>();
        assert_eq!(rearranged(&of(&[1, 2, 3, 4]), &of(&[2, 3, 4])), of(&[4, 2, 3]));
        assert_eq!(rearranged(&of(&[4, 2, 3]), &of(&[2, 3, 4, 5])), of(&[4, 2, 3, 5]));
        assert_eq!(rearranged(&of(&[1, 2]), &of(&[3])), of(&[3]));
        assert_eq!(rearranged(&of(&[1, 1, 2]), &of(&[1, 2, 2])), of(&[1, 2, 2]));
        assert_eq!(rearranged(&of(&[1]), &of(&[])), of(&[]));
    }

    #[test]
    fn ranges_inside_of_others_are_left_out() {
        let of = |all: &[&str]| all.iter().map(|r| r.parse().unwrap()).collect::<Vec<IpNetwork>>();
        let ranges = of(&["10.1.0.0/16", "10.0.0.0/8", "192.0.2.0/24", "10.0.0.0/8", "2001:db8::/32"]);
        assert_eq!(outermost(ranges.iter()), of(&["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32"]));
    }
}
