//! Events in, tables out. Invariant: a number never gets another meaning; what is the same keeps its number from plan to
//! plan, so that a change writes what changed and no more.

use super::model::{Device, Event, Key, Labels, NamedPort, Peer, Pod, Policy, Rule, Which};
use super::ports::Ports;
use super::ranges::Ranges;
use super::tables::{Endpoint, Ids, Tables};
use sheave_ebpf_abi::ports;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;

/// A peer, and the namespace that it is about when it names none.
type PeerKey = (Option<Box<str>>, Peer);

/// What policies see in an address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Signature {
    peers: Vec<u32>,
    names: Vec<NamedPort>,
}

/// What makes a set: the direction, the policies, and the named ports of the pod where a rule asks for some.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct SetKey {
    ingress: bool,
    policies: Vec<u32>,
    names: Vec<NamedPort>,
}

/// A set's rows as they were last made.
#[derive(Debug, Default)]
struct Rows {
    rows: Vec<(u32, u32)>,
    peers: HashSet<u32>,
    /// A rule of egress asks for named ports: rows depend on who has some.
    named: bool,
}

/// Gives numbers to what is new and keeps those of what is used.
#[derive(Debug)]
struct Numbers<K> {
    ids: HashMap<K, u32>,
    last: u32,
}

impl<K: Eq + Hash + Clone> Numbers<K> {
    fn new(last: u32) -> Self {
        Self { ids: HashMap::new(), last }
    }

    fn of(&mut self, key: &K) -> u32 {
        if let Some(id) = self.ids.get(key) {
            return *id;
        }
        // The greatest number means something else.
        self.last = if self.last >= u32::MAX - 1 { 1 } else { self.last + 1 };
        self.ids.insert(key.clone(), self.last);
        self.last
    }

    fn retain(&mut self, used: &HashSet<u32>) {
        self.ids.retain(|_, id| used.contains(id));
    }
}

/// A pod and what is known of it.
#[derive(Debug)]
struct Held {
    pod: Pod,
    /// Counts up with every pod that is seen for the first time: of two with one address the later has it.
    seen: u64,
    /// Policies that select it, where it is this node's.
    policies: Vec<u32>,
    /// Peers by selectors that it matches.
    peers: Vec<u32>,
}

/// The model.
#[derive(Debug)]
pub struct Planner {
    namespaces: HashMap<Key, Labels>,
    pods: HashMap<Key, Held>,
    pods_seen: u64,
    policy_ids: HashMap<Key, u32>,
    policies: BTreeMap<u32, Policy>,
    by_namespace: HashMap<Box<str>, BTreeSet<u32>>,
    policies_seen: u32,
    devices: BTreeMap<IpAddr, Device>,
    host: BTreeSet<IpAddr>,
    peers: Numbers<PeerKey>,
    /// Peers in use, by number.
    known: BTreeMap<u32, PeerKey>,
    ranges: Ranges,
    sets: Numbers<SetKey>,
    identities: Numbers<Signature>,
    lists: Numbers<Ports>,
    rows: HashMap<u32, Rows>,
    identities_of: HashMap<u32, Vec<u32>>,
    synced: [bool; 3],
    changed: bool,
}

impl Planner {
    /// A model that knows nothing yet, and gives numbers above those that the kernel holds.
    pub fn new(ids: Ids) -> Self {
        Self {
            namespaces: HashMap::new(),
            pods: HashMap::new(),
            pods_seen: 0,
            policy_ids: HashMap::new(),
            policies: BTreeMap::new(),
            by_namespace: HashMap::new(),
            policies_seen: 0,
            devices: BTreeMap::new(),
            host: BTreeSet::new(),
            peers: Numbers::new(0),
            known: BTreeMap::new(),
            ranges: Ranges::default(),
            sets: Numbers::new(ids.set),
            identities: Numbers::new(ids.identity),
            lists: Numbers::new(ids.ports),
            rows: HashMap::new(),
            identities_of: HashMap::new(),
            synced: [false; 3],
            changed: true,
        }
    }

    /// Whether everything was told that a plan needs: the policies and, where there are some, pods and namespaces.
    pub fn synced(&self) -> bool {
        let [policies, pods, namespaces] = self.synced;
        policies && (self.policies.is_empty() || pods && namespaces)
    }

    /// Whether something was told since the last plan.
    pub fn changed(&self) -> bool {
        self.changed
    }

    /// How many policies there are.
    pub fn policies(&self) -> usize {
        self.policies.len()
    }

    /// Takes in what changed.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Policy(policy) => self.put_policy(policy),
            Event::PolicyGone(key) => self.drop_policy(&key),
            Event::PoliciesSynced(all) => {
                let gone: Vec<Key> =
                    self.policy_ids.keys().filter(|key| !all.contains(*key)).cloned().collect();
                gone.iter().for_each(|key| self.drop_policy(key));
                self.mark(0);
            }
            Event::Pod(pod) => self.put_pod(pod),
            Event::PodGone(key) => self.changed |= self.pods.remove(&key).is_some(),
            Event::PodsSynced(all) => {
                self.pods.retain(|key, _| all.contains(key));
                self.mark(1);
            }
            Event::Namespace(namespace) => {
                if self.namespaces.get(&namespace.name) != Some(&namespace.labels) {
                    self.namespaces.insert(namespace.name.clone(), namespace.labels);
                    self.namespace_changed(&namespace.name);
                }
            }
            Event::NamespaceGone(name) => {
                if self.namespaces.remove(&name).is_some() {
                    self.namespace_changed(&name);
                }
            }
            Event::NamespacesSynced(all) => {
                self.namespaces.retain(|name, _| all.contains(name));
                self.mark(2);
            }
            Event::Devices(devices) => {
                self.changed |= self.devices != devices;
                self.devices = devices;
            }
            Event::Host(host) => {
                self.changed |= self.host != host;
                self.host = host;
            }
        }
    }

    fn mark(&mut self, which: usize) {
        self.synced[which] = true;
        self.changed = true;
    }

    fn put_policy(&mut self, policy: Policy) {
        let key = policy.key();
        let held = self.policy_ids.get(&key).and_then(|id| self.policies.get(id));
        if held == Some(&policy) {
            return;
        }
        self.drop_policy(&key);
        self.policies_seen += 1;
        let id = self.policies_seen;
        for held in self.pods.values_mut() {
            if held.pod.local
                && held.pod.namespace == policy.namespace
                && policy.selector.matches(&held.pod.labels)
            {
                // The newest number is the greatest.
                held.policies.push(id);
            }
        }
        self.by_namespace.entry(policy.namespace.clone()).or_default().insert(id);
        self.policies.insert(id, policy);
        self.policy_ids.insert(key, id);
        self.changed = true;
    }

    fn drop_policy(&mut self, key: &str) {
        let Some(id) = self.policy_ids.remove(key) else { return };
        let Some(policy) = self.policies.remove(&id) else { return };
        if let Some(ids) = self.by_namespace.get_mut(&policy.namespace) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_namespace.remove(&policy.namespace);
            }
        }
        self.pods.values_mut().for_each(|held| held.policies.retain(|held| *held != id));
        self.changed = true;
    }

    fn put_pod(&mut self, pod: Pod) {
        let key = pod.key();
        let seen = match self.pods.get(&key) {
            Some(held) if held.pod == pod => return,
            Some(held) => held.seen,
            None => {
                self.pods_seen += 1;
                self.pods_seen
            }
        };
        let policies = if pod.local { self.policies_of(&pod) } else { Vec::new() };
        let peers =
            self.known.iter().filter(|(_, peer)| self.matches(peer, &pod)).map(|(id, _)| *id).collect();
        self.pods.insert(key, Held { pod, seen, policies, peers });
        self.changed = true;
    }

    fn policies_of(&self, pod: &Pod) -> Vec<u32> {
        let there = self.by_namespace.get(&pod.namespace).into_iter().flatten();
        there
            .filter(|id| self.policies.get(id).is_some_and(|p| p.selector.matches(&pod.labels)))
            .copied()
            .collect()
    }

    fn matches(&self, (own, peer): &PeerKey, pod: &Pod) -> bool {
        let Peer::Pods { pods, namespaces } = peer else { return false };
        if own.as_ref().is_some_and(|own| *own != pod.namespace) {
            return false;
        }
        let here = namespaces.as_ref().is_none_or(|selector| {
            self.namespaces.get(&pod.namespace).is_some_and(|labels| selector.matches(labels))
        });
        here && pods.as_ref().is_none_or(|selector| selector.matches(&pod.labels))
    }

    fn namespace_changed(&mut self, name: &str) {
        self.changed = true;
        let keys: Vec<Key> = self
            .pods
            .iter()
            .filter(|(_, held)| *held.pod.namespace == *name)
            .map(|(key, _)| key.clone())
            .collect();
        for key in keys {
            let Some(held) = self.pods.get(&key) else { continue };
            let peers = self
                .known
                .iter()
                .filter(|(_, peer)| self.matches(peer, &held.pod))
                .map(|(id, _)| *id)
                .collect();
            if let Some(held) = self.pods.get_mut(&key) {
                held.peers = peers;
            }
        }
    }

    /// The tables that everything so far wants.
    pub fn plan(&mut self) -> Tables {
        self.changed = false;
        let mut tables = Tables::default();
        let sets = self.number_sets();
        let names = self.number_peers(sets.values().flatten().flatten());
        let identities = self.number_identities(&names, &sets, &mut tables);
        let moved = self.moved_peers(&identities);
        let used: HashSet<u32> = sets.values().flatten().flatten().copied().collect();
        self.rows.retain(|set, _| used.contains(set));
        let keys: HashMap<u32, SetKey> = self
            .sets
            .ids
            .iter()
            .filter(|(_, id)| used.contains(id))
            .map(|(key, id)| (*id, key.clone()))
            .collect();
        for (set, key) in &keys {
            let stale = self.rows.get(set).is_none_or(|rows| rows.named || !rows.peers.is_disjoint(&moved));
            if stale {
                let rows = self.make_rows(key, &identities);
                self.rows.insert(*set, rows);
            }
        }
        self.sets.retain(&used);
        self.write_rows(&mut tables);
        tables
    }

    /// The sets of every pod of this node, ingress and egress; `None` where it is not isolated.
    fn number_sets(&mut self) -> HashMap<Key, [Option<u32>; 2]> {
        let mut found = HashMap::new();
        for (key, held) in self.pods.iter().filter(|(_, held)| !held.policies.is_empty()) {
            let sets = [true, false].map(|ingress| {
                let rules = |id: &u32| self.policies.get(id).and_then(|p| rules(p, ingress));
                let policies: Vec<u32> =
                    held.policies.iter().filter(|id| rules(id).is_some()).copied().collect();
                if policies.is_empty() {
                    return None;
                }
                let named =
                    ingress && policies.iter().any(|id| rules(id).is_some_and(|r| r.iter().any(is_named)));
                let names = if named { held.pod.ports.to_vec() } else { Vec::new() };
                Some(self.sets.of(&SetKey { ingress, policies, names }))
            });
            found.insert(key.clone(), sets);
        }
        found
    }

    /// Numbers the peers of these sets and finds who matches those that are new. Gives the named ports that rules of
    /// egress ask for.
    fn number_peers<'a>(&mut self, sets: impl Iterator<Item = &'a u32>) -> HashSet<(Box<str>, u8)> {
        let used: HashSet<u32> = sets.copied().collect();
        let mut names = HashSet::new();
        let mut wanted: HashMap<PeerKey, ()> = HashMap::new();
        let directions: HashSet<(bool, u32)> = self
            .sets
            .ids
            .iter()
            .filter(|(_, id)| used.contains(id))
            .flat_map(|(key, _)| key.policies.iter().map(|policy| (key.ingress, *policy)))
            .collect();
        for (ingress, id) in directions {
            let Some(policy) = self.policies.get(&id) else { continue };
            for rule in rules(policy, ingress).into_iter().flatten() {
                for peer in &rule.peers {
                    wanted.insert(peer_key(policy, peer), ());
                }
                for port in rule.ports.iter().filter(|_| !ingress) {
                    if let Which::Named(name) = &port.which {
                        names.insert((name.clone(), port.proto));
                    }
                }
            }
        }
        self.know(&wanted);
        names
    }

    /// Makes the known peers those that are wanted.
    fn know(&mut self, wanted: &HashMap<PeerKey, ()>) {
        let before = self.known.len();
        let mut blocks_changed = false;
        self.known.retain(|_, key| {
            let stays = wanted.contains_key(key);
            blocks_changed |= !stays && matches!(key.1, Peer::Block { .. });
            stays
        });
        if self.known.len() != before {
            let known = &self.known;
            self.pods.values_mut().for_each(|held| held.peers.retain(|id| known.contains_key(id)));
            self.peers.ids.retain(|_, id| known.contains_key(id));
        }
        let mut new = Vec::new();
        for key in wanted.keys().filter(|key| !self.peers.ids.contains_key(*key)).cloned().collect::<Vec<_>>()
        {
            let id = self.peers.of(&key);
            blocks_changed |= matches!(key.1, Peer::Block { .. });
            if matches!(key.1, Peer::Pods { .. }) {
                new.push(id);
            }
            self.known.insert(id, key);
        }
        if blocks_changed {
            self.ranges = Ranges::new(self.known.iter().map(|(id, (_, peer))| (*id, peer)));
        }
        new.sort_unstable();
        let mut found: Vec<(Key, u32)> = Vec::new();
        for id in new {
            let Some(peer) = self.known.get(&id) else { continue };
            found.extend(
                self.pods
                    .iter()
                    .filter(|(_, held)| self.matches(peer, &held.pod))
                    .map(|(key, _)| (key.clone(), id)),
            );
        }
        for (key, id) in found {
            if let Some(held) = self.pods.get_mut(&key) {
                held.peers.push(id);
            }
        }
    }

    /// Fills in endpoints and ranges. Gives the identities in use.
    fn number_identities(
        &mut self,
        names: &HashSet<(Box<str>, u8)>,
        sets: &HashMap<Key, [Option<u32>; 2]>,
        tables: &mut Tables,
    ) -> Vec<(u32, Signature)> {
        let mut found: HashMap<u32, Signature> = HashMap::new();
        let identities = &mut self.identities;
        let mut number = |signature: Signature| {
            if signature == Signature::default() {
                return 0;
            }
            let id = identities.of(&signature);
            found.insert(id, signature);
            id
        };
        let mut owners: HashMap<IpAddr, (bool, u64, &Key, &Held)> = HashMap::new();
        for (key, held) in &self.pods {
            for ip in &held.pod.ips {
                let rank = (held.pod.local && self.devices.contains_key(ip), held.seen, key, held);
                let best = owners.entry(*ip).or_insert(rank);
                if (best.0, best.1) < (rank.0, rank.1) {
                    *best = rank;
                }
            }
        }
        let named = self.devices.iter().filter_map(|(ip, device)| Some((ip, device.pod.as_ref()?)));
        let mut named = named.filter(|(ip, _)| !owners.contains_key(*ip)).peekable();
        if named.peek().is_some() {
            let local = self.pods.iter().filter(|(_, held)| held.pod.local);
            let by_uid: HashMap<&str, (&Key, &Held)> =
                local.map(|(key, held)| (&*held.pod.uid, (key, held))).collect();
            let found = named.filter_map(|(ip, uid)| Some((*ip, by_uid.get(&**uid)?)));
            let found: Vec<_> = found.map(|(ip, (key, held))| (ip, (true, held.seen, *key, *held))).collect();
            owners.extend(found);
        }
        for (ip, (_, _, key, held)) in owners {
            let mut peers = held.peers.clone();
            peers.extend(self.ranges.peers_of(ip));
            peers.sort_unstable();
            let asked = |port: &&NamedPort| names.contains(&(port.name.clone(), port.proto));
            let names = if names.is_empty() {
                Vec::new()
            } else {
                held.pod.ports.iter().filter(asked).cloned().collect()
            };
            let identity = number(Signature { peers, names });
            let [ingress, egress] = sets.get(key).map_or([0; 2], |sets| sets.map(Option::unwrap_or_default));
            tables.endpoints.insert(ip, Endpoint { identity, ingress, egress, ..Endpoint::default() });
        }
        for (ip, device) in &self.devices {
            let endpoint = tables.endpoints.entry(*ip).or_insert_with(|| Endpoint {
                identity: number(Signature { peers: self.ranges.peers_of(*ip), names: Vec::new() }),
                ..Endpoint::default()
            });
            endpoint.device = device.index;
            endpoint.peer = device.peer;
            endpoint.queued = device.queued;
        }
        for ip in &self.host {
            tables.endpoints.insert(*ip, Endpoint { host: true, ..Endpoint::default() });
        }
        for prefix in self.ranges.prefixes() {
            let peers = self.ranges.peers_of_prefix(prefix);
            tables.ranges.insert(prefix, number(Signature { peers, names: Vec::new() }));
        }
        let used: HashSet<u32> = found.keys().copied().collect();
        self.identities.retain(&used);
        found.into_iter().collect()
    }

    /// Peers that other identities match than in the last plan.
    fn moved_peers(&mut self, identities: &[(u32, Signature)]) -> HashSet<u32> {
        let mut now: HashMap<u32, Vec<u32>> = HashMap::new();
        for (id, signature) in identities {
            for peer in &signature.peers {
                now.entry(*peer).or_default().push(*id);
            }
        }
        now.values_mut().for_each(|ids| ids.sort_unstable());
        let before = std::mem::replace(&mut self.identities_of, now);
        let now = &self.identities_of;
        before.keys().chain(now.keys()).filter(|peer| before.get(*peer) != now.get(*peer)).copied().collect()
    }

    /// The rows of a set.
    fn make_rows(&mut self, key: &SetKey, identities: &[(u32, Signature)]) -> Rows {
        let mut rest = Ports::default();
        let mut own: HashMap<u32, Ports> = HashMap::new();
        let mut made = Rows::default();
        let all = key.policies.iter().filter_map(|id| self.policies.get(id));
        for (policy, rule) in
            all.flat_map(|p| rules(p, key.ingress).into_iter().flatten().map(move |r| (p, r)))
        {
            let asks = !key.ingress && is_named(rule);
            made.named |= asks;
            let allowed = rule_ports(rule, &key.names);
            if rule.peers.is_empty() {
                rest.extend(&allowed);
                for (id, signature) in identities.iter().filter(|_| asks) {
                    own.entry(*id).or_default().extend(&rule_ports(rule, &signature.names));
                }
            }
            for peer in &rule.peers {
                let Some(peer) = self.peers.ids.get(&peer_key(policy, peer)) else { continue };
                made.peers.insert(*peer);
                for id in self.identities_of.get(peer).into_iter().flatten() {
                    own.entry(*id).or_default().extend(&allowed);
                }
                for (id, signature) in identities.iter().filter(|(_, s)| asks && s.peers.contains(peer)) {
                    own.entry(*id).or_default().extend(&rule_ports(rule, &signature.names));
                }
            }
        }
        let rest = rest.normal();
        made.rows.push((0, self.number_list(&rest)));
        for (identity, mut allowed) in own {
            allowed.extend(&rest);
            let allowed = allowed.normal();
            if allowed != rest {
                made.rows.push((identity, self.number_list(&allowed)));
            }
        }
        made
    }

    fn number_list(&mut self, list: &Ports) -> u32 {
        if list.is_all() {
            ports::ALL
        } else if list.is_empty() {
            ports::NONE
        } else {
            self.lists.of(list)
        }
    }

    /// Fills in rows and the lists that they name.
    fn write_rows(&mut self, tables: &mut Tables) {
        let mut used = HashSet::new();
        for (set, rows) in &self.rows {
            for (identity, list) in &rows.rows {
                tables.verdicts.insert((*set, *identity), *list);
                used.insert(*list);
            }
        }
        self.lists.retain(&used);
        for (list, id) in &self.lists.ids {
            tables.ports.extend(list.prefixes().into_iter().map(|prefix| ((*id, prefix), ())));
        }
    }
}

fn rules(policy: &Policy, ingress: bool) -> Option<&[Rule]> {
    if ingress { policy.ingress.as_deref() } else { policy.egress.as_deref() }
}

fn is_named(rule: &Rule) -> bool {
    rule.ports.iter().any(|port| matches!(port.which, Which::Named(_)))
}

fn peer_key(policy: &Policy, peer: &Peer) -> PeerKey {
    let own = matches!(peer, Peer::Pods { namespaces: None, .. }).then(|| policy.namespace.clone());
    (own, peer.clone())
}

/// The ports of a rule, seen by a receiver with these named ports.
fn rule_ports(rule: &Rule, names: &[NamedPort]) -> Ports {
    let mut ports = Ports::default();
    if rule.ports.is_empty() {
        ports.allow_all();
    }
    for port in &rule.ports {
        match &port.which {
            Which::Any => ports.add(port.proto, 0, u16::MAX),
            Which::Range(first, last) => ports.add(port.proto, *first, *last),
            Which::Named(name) => {
                for named in names.iter().filter(|named| named.name == *name && named.proto == port.proto) {
                    ports.add(port.proto, named.port, named.port);
                }
            }
        }
    }
    ports
}
