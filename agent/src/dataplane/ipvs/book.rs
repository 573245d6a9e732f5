//! From frontends to virtual services and rules. Invariant: pure; what is wanted is the sum of what each frontend
//! contributes, so a round costs what it touches.

use super::super::NodePortAddresses;
use super::super::mirror::{Mirror, Mirrored};
use super::model::{DATAGRAM_MARKS, Destination, MARK_BITS, MARKS, Service, ServiceKey, Settings, flag};
use crate::service::{
    BackendAddr, Family, FrontendKey, FrontendKind, FrontendPolicy, IpvsScheduler, Proto, Scheduler,
};
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

/// What becomes of a packet to a frontend before IPVS sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// Any endpoint will do.
    Open,
    /// From outside only endpoints of this node: those of the service with the frontend's mark.
    Local,
    /// From outside there is none on this node: dropped.
    Inside,
    /// There is none: refused.
    Refuse,
}

/// One element of a set or map of the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Element {
    /// A frontend; an unspecified address stands for the node's.
    Frontend(FrontendKey),
    /// A frontend's mark.
    Mark(FrontendKey),
    /// An address that the node has only for services.
    Given(IpAddr),
    /// An address of the node that NodePorts are reached on.
    Node(IpAddr),
    /// An address of an endpoint on this node.
    Endpoint(IpAddr),
    /// Where clients of a frontend must come from.
    Range(FrontendKey, IpNetwork),
}

/// What an element says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Value {
    /// It is in the set.
    Member,
    /// What happens to the frontend's packets, and whether clients outside must come from its ranges.
    Class(Class, bool),
    /// A mark.
    Mark(u32),
}

/// What one frontend adds.
#[derive(Clone, Debug, Default)]
struct Contribution {
    services: Vec<ServiceKey>,
    elements: Vec<(Element, Value)>,
}

/// What the frontends want, all together.
#[derive(Debug)]
pub(super) struct Book {
    scheduler: IpvsScheduler,
    /// Schedulers that this kernel turned out not to have.
    missing: BTreeSet<Box<str>>,
    /// Addresses of the node.
    own: BTreeSet<IpAddr>,
    /// Those that NodePorts are reached on.
    reached: BTreeSet<IpAddr>,
    contributions: HashMap<FrontendKey, Contribution>,
    services: BTreeMap<ServiceKey, Service>,
    elements: BTreeMap<Element, (Value, u32)>,
    /// Elements that changed since they were last taken, with what they were.
    changed: BTreeMap<Element, Option<Value>>,
    marks: HashMap<FrontendKey, u32>,
    used_marks: HashSet<u32>,
    /// Services that are not wanted but still have connections.
    lingering: BTreeMap<ServiceKey, IpAddr>,
}

impl Book {
    pub(super) fn new(scheduler: IpvsScheduler) -> Self {
        Self {
            scheduler,
            missing: BTreeSet::new(),
            own: BTreeSet::new(),
            reached: BTreeSet::new(),
            contributions: HashMap::new(),
            services: BTreeMap::new(),
            elements: BTreeMap::new(),
            changed: BTreeMap::new(),
            marks: HashMap::new(),
            used_marks: HashSet::new(),
            lingering: BTreeMap::new(),
        }
    }

    /// Forgets all frontends; what is known of the node and of the kernel stays.
    pub(super) fn clear(&mut self) {
        let reached = std::mem::take(&mut self.reached);
        let (own, missing) = (std::mem::take(&mut self.own), std::mem::take(&mut self.missing));
        *self = Self { own, missing, ..Self::new(self.scheduler) };
        self.set_reached(reached);
    }

    /// Services as they should be.
    pub(super) fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.get(key)
    }

    /// Keys of all services that should be.
    pub(super) fn service_keys(&self) -> impl Iterator<Item = ServiceKey> {
        self.services.keys().copied()
    }

    /// All elements of the rules.
    pub(super) fn elements(&self) -> impl Iterator<Item = (Element, Value)> {
        self.elements.iter().map(|(element, (value, _))| (*element, *value))
    }

    /// Addresses that the node must have for services.
    pub(super) fn given(&self) -> BTreeSet<IpAddr> {
        let given = |element: &Element| match element {
            Element::Given(addr) => Some(*addr),
            _ => None,
        };
        self.elements.keys().filter_map(given).collect()
    }

    /// Elements that changed since the last call: what they were and what they are.
    pub(super) fn take_changes(&mut self) -> Vec<(Element, Option<Value>, Option<Value>)> {
        let changed = std::mem::take(&mut self.changed);
        let all = changed.into_iter().map(|(element, old)| {
            let new = self.elements.get(&element).map(|(value, _)| *value);
            (element, old, new)
        });
        all.filter(|(_, old, new)| old != new).collect()
    }

    /// Notes that the kernel has no such scheduler; whether that is news.
    pub(super) fn without_scheduler(&mut self, name: &str) -> bool {
        self.missing.insert(name.into())
    }

    /// The addresses of the node, and those that NodePorts are reached on. Whether anything changed; if so, frontends
    /// in [`Book::of_the_node`] are to be refreshed.
    pub(super) fn set_node(&mut self, own: BTreeSet<IpAddr>, reached: BTreeSet<IpAddr>) -> bool {
        let changed = (&self.own, &self.reached) != (&own, &reached);
        self.own = own;
        self.set_reached(reached);
        changed
    }

    fn set_reached(&mut self, reached: BTreeSet<IpAddr>) {
        for addr in self.reached.difference(&reached).copied().collect::<Vec<_>>() {
            self.drop_element(Element::Node(addr));
        }
        for addr in reached.difference(&self.reached).copied().collect::<Vec<_>>() {
            self.add_element(Element::Node(addr), Value::Member);
        }
        self.reached = reached;
    }

    /// Frontends that depend on the node's addresses: all that are reached on them, and all others too, since the
    /// address of any may become or cease to be the node's own.
    pub(super) fn of_the_node(mirror: &Mirror) -> BTreeSet<FrontendKey> {
        mirror.frontends().map(|(key, _)| *key).collect()
    }

    /// Takes in what became of these frontends; the services that this may have changed.
    pub(super) fn refresh(
        &mut self,
        mirror: &Mirror,
        keys: impl IntoIterator<Item = FrontendKey>,
    ) -> BTreeSet<ServiceKey> {
        let mut touched = BTreeSet::new();
        for key in keys {
            let old = self.contributions.remove(&key).unwrap_or_default();
            for service in &old.services {
                self.services.remove(service);
            }
            touched.extend(old.services);
            match mirror.get(&key) {
                Some(frontend) => {
                    let new = self.contribute(key, frontend, mirror);
                    touched.extend(&new.services);
                    for (element, value) in &new.elements {
                        self.add_element(*element, *value);
                    }
                    self.contributions.insert(key, new);
                }
                None => {
                    if let Some(mark) = self.marks.remove(&key) {
                        self.used_marks.remove(&mark);
                    }
                }
            }
            for (element, _) in old.elements {
                self.drop_element(element);
            }
        }
        touched
    }

    /// Says whether a service that is not wanted still has connections: as long, the node keeps its address.
    pub(super) fn set_lingering(&mut self, key: ServiceKey, settings: &Settings, lingers: bool) {
        let ServiceKey::Addr { addr, .. } = key else { return };
        if lingers && settings.is_on_given_address() {
            if self.lingering.insert(key, addr).is_none() {
                self.add_element(Element::Given(addr), Value::Member);
            }
        } else if self.lingering.remove(&key).is_some() {
            self.drop_element(Element::Given(addr));
        }
    }

    fn add_element(&mut self, element: Element, value: Value) {
        let held = self.elements.get(&element).map(|(value, _)| *value);
        self.changed.entry(element).or_insert(held);
        let entry = self.elements.entry(element).or_insert((value, 0));
        *entry = (value, entry.1 + 1);
    }

    fn drop_element(&mut self, element: Element) {
        let Some((value, count)) = self.elements.get_mut(&element) else { return };
        self.changed.entry(element).or_insert(Some(*value));
        *count -= 1;
        if *count == 0 {
            self.elements.remove(&element);
        }
    }

    fn contribute(&mut self, key: FrontendKey, frontend: &Mirrored, mirror: &Mirror) -> Contribution {
        let policy = &frontend.entry.policy;
        let mut out = Contribution::default();
        let chosen = if policy.internal_local { frontend.local() } else { frontend.cluster() };
        let class = class(policy, chosen, frontend);
        let on_node = key.addr.is_unspecified() || policy.kind == FrontendKind::HostPort;
        let given = !on_node && !self.own.contains(&key.addr);
        let service =
            |settings, chosen, leaving| Service { settings, destinations: weighted(chosen, leaving) };
        let main = service(self.settings(policy, chosen, given), chosen, frontend.terminating());
        let addresses: Vec<IpAddr> = match key.addr.is_unspecified() {
            true => {
                self.reached.iter().filter(|at| Family::of(**at) == Family::of(key.addr)).copied().collect()
            }
            false => vec![key.addr],
        };
        for addr in addresses {
            let at = ServiceKey::Addr { addr, port: key.port, proto: key.proto };
            // A HostPort on one address and a NodePort on all cannot have the same port: the planner sees to that.
            self.services.insert(at, main.clone());
            out.services.push(at);
        }
        out.elements.push((Element::Frontend(key), Value::Class(class, policy.source_ranges)));
        if class == Class::Local {
            let leaving: Vec<BackendAddr> = frontend.on_this_node().copied().collect();
            let local = service(self.settings(policy, frontend.local(), false), frontend.local(), &leaving);
            let mark = self.mark(&key);
            let at = ServiceKey::Mark { family: Family::of(key.addr), mark };
            self.services.insert(at, local);
            out.services.push(at);
            out.elements.push((Element::Mark(key), Value::Mark(mark)));
        }
        if given {
            out.elements.push((Element::Given(key.addr), Value::Member));
        }
        let here: BTreeSet<IpAddr> = frontend.on_this_node().map(|backend| backend.addr).collect();
        out.elements.extend(here.into_iter().map(|addr| (Element::Endpoint(addr), Value::Member)));
        if policy.source_ranges {
            let ranges = outermost(mirror.ranges(frontend.entry.service), Family::of(key.addr));
            out.elements.extend(ranges.into_iter().map(|range| (Element::Range(key, range), Value::Member)));
        }
        out
    }

    fn settings(&self, policy: &FrontendPolicy, chosen: &[BackendAddr], given: bool) -> Settings {
        let wanted = match policy.scheduler {
            Scheduler::Default if self.scheduler == IpvsScheduler::Rr && !is_even(chosen) => {
                IpvsScheduler::Wrr
            }
            Scheduler::Default => self.scheduler,
            Scheduler::Maglev => IpvsScheduler::Mh,
            Scheduler::Ipvs(scheduler) => scheduler,
        };
        let name =
            if self.missing.contains(wanted.name()) { IpvsScheduler::Rr.name() } else { wanted.name() };
        let mut flags = Settings::owner(given);
        if policy.affinity_timeout_s != 0 {
            flags |= flag::PERSISTENT;
        }
        if name == IpvsScheduler::Mh.name() {
            flags |= flag::HASH_PORT;
        }
        Settings { scheduler: name.into(), flags, timeout_s: policy.affinity_timeout_s }
    }

    /// The frontend's mark: the same after a restart, unless frontends get in each other's way.
    fn mark(&mut self, key: &FrontendKey) -> u32 {
        if let Some(mark) = self.marks.get(key) {
            return *mark;
        }
        let mut bytes = match key.addr {
            IpAddr::V4(addr) => addr.octets().to_vec(),
            IpAddr::V6(addr) => addr.octets().to_vec(),
        };
        bytes.extend(key.port.to_be_bytes());
        bytes.push(key.proto as u8);
        // FNV-1a.
        let hash = bytes
            .iter()
            .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
        let mut low = (hash ^ (hash >> 24)) & MARK_BITS;
        let high = if key.proto == Proto::Udp { DATAGRAM_MARKS } else { MARKS };
        while self.used_marks.contains(&(high | low)) {
            low = (low + 1) & MARK_BITS;
        }
        let mark = high | low;
        self.used_marks.insert(mark);
        self.marks.insert(*key, mark);
        mark
    }
}

fn class(policy: &FrontendPolicy, chosen: &[BackendAddr], frontend: &Mirrored) -> Class {
    let local_outside = policy.external_local && policy.kind != FrontendKind::ClusterIp;
    match (local_outside, frontend.local().is_empty(), chosen.is_empty()) {
        (true, false, _) => Class::Local,
        (_, _, true) => Class::Refuse,
        (true, true, false) => Class::Inside,
        (false, _, false) => Class::Open,
    }
}

/// How often each is in the run, in the smallest numbers that say it; those that only leave have weight 0.
fn weighted(chosen: &[BackendAddr], leaving: &[BackendAddr]) -> BTreeMap<Destination, u32> {
    let mut all: BTreeMap<Destination, u32> = BTreeMap::new();
    for backend in chosen {
        *all.entry((backend.addr, backend.port)).or_default() += 1;
    }
    let common = all.values().copied().fold(0, gcd).max(1);
    all.values_mut().for_each(|weight| *weight /= common);
    for backend in leaving {
        all.entry((backend.addr, backend.port)).or_insert(0);
    }
    all
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Whether all are equally often in the run.
fn is_even(chosen: &[BackendAddr]) -> bool {
    weighted(chosen, &[]).values().all(|weight| *weight == 1)
}

/// The ranges of a family that lie in no other: the kernel takes no ranges within ranges.
fn outermost<'a>(ranges: impl Iterator<Item = &'a IpNetwork>, family: Family) -> Vec<IpNetwork> {
    let mut all: Vec<IpNetwork> = ranges
        .filter(|range| Family::of(range.ip()) == family)
        .filter_map(|range| IpNetwork::new(range.network(), range.prefix()).ok())
        .collect();
    all.sort_by_key(|range| (range.prefix(), range.ip()));
    let mut out: Vec<IpNetwork> = Vec::with_capacity(all.len());
    for range in all {
        if !out.iter().any(|held| held.contains(range.ip())) {
            out.push(range);
        }
    }
    out
}

/// Of the node's addresses those that NodePorts are reached on. `first` are the node's primary addresses, one a family.
pub(super) fn reached(
    which: &NodePortAddresses,
    own: &BTreeSet<IpAddr>,
    first: &[IpAddr],
) -> BTreeSet<IpAddr> {
    let chosen = |addr: &&IpAddr| match which {
        NodePortAddresses::All => true,
        NodePortAddresses::Primary => {
            let primary = first.iter().find(|at| Family::of(**at) == Family::of(**addr));
            // Without a word on it, the lowest of the family.
            let lowest = || own.iter().find(|at| Family::of(**at) == Family::of(**addr));
            primary.or_else(lowest) == Some(*addr)
        }
        NodePortAddresses::In(ranges) => ranges.iter().any(|range| range.contains(**addr)),
    };
    own.iter().filter(chosen).copied().collect()
}

/// The protocol's name in rules.
pub(super) fn protocol_name(proto: Proto) -> &'static str {
    match proto {
        Proto::Tcp => "tcp",
        Proto::Udp => "udp",
        Proto::Sctp => "sctp",
    }
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
