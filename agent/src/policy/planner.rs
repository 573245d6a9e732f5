//! Events in, tables out. Invariant: what is the same keeps its number from plan to plan, so that a change writes what
//! changed and no more; and a number gets another meaning only where all whom it concerns want that.

use super::model::{Device, Event, Key, Labels, NamedPort, Peer, Pod, Policy, Rule, Which};
use super::ports::Ports;
use super::ranges::Ranges;
use super::rows::{Compiled, Rows};
use super::tables::{Endpoint, Ids, Tables};
use sheave_ebpf_abi::ports;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

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

/// What a policy asks of its peers in one direction.
#[derive(Debug, Default)]
struct Asked {
    /// Each as often as it is named.
    peers: Vec<u32>,
    /// Names of ports that receivers are asked for, with their protocol.
    names: Vec<(Box<str>, u8)>,
}

/// A direction, and the named ports of the pod where a rule asks for some.
type Sight = (bool, Vec<NamedPort>);

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

    /// Gives `key`, which has no number, that of another.
    fn take_over(&mut self, id: u32, key: &K) {
        self.ids.retain(|_, held| *held != id);
        self.ids.insert(key.clone(), id);
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
    /// How often each is asked for.
    uses: HashMap<u32, u32>,
    /// By whom: the directions of policies that are in a set.
    asked: HashMap<(bool, u32), Asked>,
    /// The same in order.
    directions: Vec<(bool, u32)>,
    ranges: Ranges,
    sets: Numbers<SetKey>,
    identities: Numbers<Signature>,
    lists: Numbers<Ports>,
    /// The sets of pods in the last plan.
    sets_of: HashMap<Key, [Option<u32>; 2]>,
    /// Policies in order.
    compiled: HashMap<Sight, Vec<(u32, Arc<Compiled>)>>,
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
            uses: HashMap::new(),
            asked: HashMap::new(),
            directions: Vec::new(),
            ranges: Ranges::default(),
            sets: Numbers::new(ids.set),
            identities: Numbers::new(ids.identity),
            lists: Numbers::new(ids.ports),
            sets_of: HashMap::new(),
            compiled: HashMap::new(),
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
        let used: HashSet<u32> = sets.values().flatten().flatten().copied().collect();
        self.sets.retain(&used);
        let names = self.number_peers();
        let identities = self.number_identities(&names, &sets, &mut tables);
        let moved = self.moved_peers(&identities);
        let stale = self.compile(&identities, &moved);
        self.make_rows(sets, &stale);
        self.write_rows(&mut tables);
        tables
    }

    /// Numbers the sets of every pod of this node, ingress and egress; `None` where it is not isolated.
    fn number_sets(&mut self) -> HashMap<Key, [Option<u32>; 2]> {
        let wanted = self.wanted_sets();
        self.keep_numbers(&wanted);
        let sets = &mut self.sets;
        let mut number = |set: SetKey| sets.of(&set);
        wanted.into_iter().map(|(pod, sets)| (pod, sets.map(|set| set.map(&mut number)))).collect()
    }

    /// A set whose pods all want one that is new, as when a policy was changed, becomes that one.
    fn keep_numbers(&mut self, wanted: &HashMap<Key, [Option<SetKey>; 2]>) {
        let mut next: BTreeMap<u32, Option<&SetKey>> = BTreeMap::new();
        for (pod, had) in &self.sets_of {
            let wants = wanted.get(pod).map_or([None, None], |sets| sets.each_ref().map(Option::as_ref));
            for (had, wants) in had.iter().zip(wants) {
                let Some(had) = had else { continue };
                let all = next.entry(*had).or_insert(wants);
                if *all != wants {
                    *all = None;
                }
            }
        }
        for (id, key) in next {
            let Some(key) = key.filter(|key| !self.sets.ids.contains_key(*key)) else { continue };
            self.sets.take_over(id, key);
        }
    }

    fn wanted_sets(&self) -> HashMap<Key, [Option<SetKey>; 2]> {
        let mut found = HashMap::new();
        for (key, held) in self.pods.iter().filter(|(_, held)| !held.policies.is_empty()) {
            let mut of = [Vec::new(), Vec::new()];
            let mut named = false;
            for id in &held.policies {
                let Some(policy) = self.policies.get(id) else { continue };
                if let Some(rules) = &policy.ingress {
                    of[0].push(*id);
                    named |= rules.iter().any(is_named);
                }
                if policy.egress.is_some() {
                    of[1].push(*id);
                }
            }
            let [ingress, egress] = of;
            let names = if named { held.pod.ports.to_vec() } else { Vec::new() };
            let set = |ingress, policies: Vec<u32>, names| {
                (!policies.is_empty()).then_some(SetKey { ingress, policies, names })
            };
            let sets = [set(true, ingress, names), set(false, egress, Vec::new())];
            found.insert(key.clone(), sets);
        }
        found
    }

    /// Numbers the peers of the sets and finds who matches those that are new. Gives the named ports that rules of
    /// egress ask for.
    fn number_peers(&mut self) -> HashSet<(Box<str>, u8)> {
        let all = self.sets.ids.keys();
        let mut directions: Vec<(bool, u32)> =
            all.flat_map(|key| key.policies.iter().map(|policy| (key.ingress, *policy))).collect();
        directions.sort();
        directions.dedup();
        let mut new = Vec::new();
        let before = std::mem::take(&mut self.directions);
        for (ingress, id) in missing(&directions, &before) {
            let asked = self.ask(ingress, id, &mut new);
            self.asked.insert((ingress, id), asked);
        }
        self.match_pods(&new);
        let mut gone = HashSet::new();
        for one in missing(&before, &directions) {
            for peer in self.asked.remove(&one).unwrap_or_default().peers {
                let left = self.uses.get(&peer).map_or(0, |n| n - 1);
                if left == 0 {
                    self.uses.remove(&peer);
                    gone.insert(peer);
                } else {
                    self.uses.insert(peer, left);
                }
            }
        }
        self.directions = directions;
        self.forget_peers(&gone);
        self.asked.values().flat_map(|asked| asked.names.iter().cloned()).collect()
    }

    /// What a policy asks in a direction; peers that are new to selectors are added to `new`.
    fn ask(&mut self, ingress: bool, id: u32, new: &mut Vec<u32>) -> Asked {
        let mut asked = Asked::default();
        let Some(policy) = self.policies.get(&id) else { return asked };
        for rule in rules(policy, ingress).into_iter().flatten() {
            for peer in &rule.peers {
                let key = peer_key(policy, peer);
                let peer = self.peers.of(&key);
                asked.peers.push(peer);
                let uses = self.uses.entry(peer).or_default();
                *uses += 1;
                if *uses > 1 {
                    continue;
                }
                match key.1 {
                    Peer::Block { .. } => self.ranges.add(peer, &key.1),
                    Peer::Pods { .. } => new.push(peer),
                }
                self.known.insert(peer, key);
            }
            for port in rule.ports.iter().filter(|_| !ingress) {
                if let Which::Named(name) = &port.which {
                    asked.names.push((name.clone(), port.proto));
                }
            }
        }
        asked
    }

    /// Finds the pods that new peers match.
    fn match_pods(&mut self, new: &[u32]) {
        let mut found: Vec<(Key, u32)> = Vec::new();
        for id in new {
            let Some(peer) = self.known.get(id) else { continue };
            let matching = self.pods.iter().filter(|(_, held)| self.matches(peer, &held.pod));
            found.extend(matching.map(|(key, _)| (key.clone(), *id)));
        }
        for (key, id) in found {
            if let Some(held) = self.pods.get_mut(&key) {
                held.peers.push(id);
            }
        }
    }

    /// Forgets peers that nobody asks for any more.
    fn forget_peers(&mut self, gone: &HashSet<u32>) {
        if gone.is_empty() {
            return;
        }
        for id in gone {
            let Some(key) = self.known.remove(id) else { continue };
            self.ranges.remove(*id, &key.1);
            self.peers.ids.remove(&key);
        }
        self.pods.values_mut().for_each(|held| held.peers.retain(|id| !gone.contains(id)));
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

    /// Compiles what is new, and again what is not as it was. Gives the directions of policies that this concerns.
    fn compile(&mut self, identities: &[(u32, Signature)], moved: &HashSet<u32>) -> HashMap<bool, Vec<u32>> {
        let mut stale: HashMap<bool, Vec<u32>> = HashMap::new();
        let mut wanted: HashMap<Sight, Vec<u32>> = HashMap::new();
        for key in self.sets.ids.keys() {
            wanted.entry((key.ingress, key.names.clone())).or_default().extend(&key.policies);
        }
        let mut before = std::mem::take(&mut self.compiled);
        for (sight, mut policies) in wanted {
            policies.sort();
            policies.dedup();
            let mut held = before.remove(&sight).unwrap_or_default().into_iter().peekable();
            let mut now = Vec::with_capacity(policies.len());
            for policy in policies {
                while held.next_if(|(id, _)| *id < policy).is_some() {}
                let kept = held.next_if(|(id, _)| *id == policy).filter(|(_, held)| {
                    !held.named && (moved.is_empty() || !held.peers.iter().any(|peer| moved.contains(peer)))
                });
                now.push(kept.unwrap_or_else(|| {
                    stale.entry(sight.0).or_default().push(policy);
                    (policy, Arc::new(self.compile_one(policy, &sight, identities)))
                }));
            }
            self.compiled.insert(sight, now);
        }
        stale
    }

    fn compile_one(&self, id: u32, (ingress, names): &Sight, identities: &[(u32, Signature)]) -> Compiled {
        let mut made = Compiled::default();
        let Some(policy) = self.policies.get(&id) else { return made };
        for rule in rules(policy, *ingress).into_iter().flatten() {
            let asks = !ingress && is_named(rule);
            made.named |= asks;
            let allowed = Arc::new(rule_ports(rule, names));
            // Only these depend on all identities.
            let asking = if asks { identities } else { &[] };
            let seen_by = |signature: &Signature| Arc::new(rule_ports(rule, &signature.names));
            if rule.peers.is_empty() {
                made.rest.push(allowed.clone());
                made.own.extend(asking.iter().map(|(id, s)| (*id, seen_by(s))));
            }
            for peer in &rule.peers {
                let Some(peer) = self.peers.ids.get(&peer_key(policy, peer)) else { continue };
                made.peers.push(*peer);
                let matching = self.identities_of.get(peer).into_iter().flatten();
                made.own.extend(matching.map(|id| (*id, allowed.clone())));
                let matching = asking.iter().filter(|(_, s)| s.peers.contains(peer));
                made.own.extend(matching.map(|(id, s)| (*id, seen_by(s))));
            }
        }
        made
    }

    /// Brings the rows of the sets up to date. A set that is new begins as the one that a pod of its had before.
    fn make_rows(&mut self, sets: HashMap<Key, [Option<u32>; 2]>, stale: &HashMap<bool, Vec<u32>>) {
        let before = std::mem::replace(&mut self.sets_of, sets);
        let mut origins = HashMap::new();
        for (pod, sets) in &self.sets_of {
            let had = before.get(pod).copied().unwrap_or_default();
            origins.extend(sets.iter().zip(had).filter_map(|(is, was)| Some(((*is)?, was?))));
        }
        let is_used: HashSet<u32> = self.sets.ids.values().copied().collect();
        for (key, set) in &self.sets.ids {
            let is_stale = || {
                let policies = stale.get(&key.ingress);
                policies.into_iter().flatten().any(|policy| key.policies.binary_search(policy).is_ok())
            };
            let mut rows = match self.rows.remove(set) {
                Some(rows) if rows.are_of(&key.policies) && !is_stale() => {
                    self.rows.insert(*set, rows);
                    continue;
                }
                Some(rows) => rows,
                None => match origins.get(set) {
                    Some(origin) if is_used.contains(origin) => {
                        self.rows.get(origin).cloned().unwrap_or_default()
                    }
                    Some(origin) => self.rows.remove(origin).unwrap_or_default(),
                    None => Rows::default(),
                },
            };
            let sight = (key.ingress, key.names.clone());
            let all = self.compiled.get(&sight).map(Vec::as_slice).unwrap_or_default();
            let compiled = |policy: &u32| {
                let at = all.binary_search_by_key(policy, |(id, _)| *id).ok()?;
                Some(all[at].clone())
            };
            let lists = &mut self.lists;
            rows.update(key.policies.iter().filter_map(compiled).collect(), |list| number_list(lists, list));
            self.rows.insert(*set, rows);
        }
        self.rows.retain(|set, _| is_used.contains(set));
    }

    /// Fills in rows and the lists that they name.
    fn write_rows(&mut self, tables: &mut Tables) {
        let mut used = HashSet::new();
        for (set, rows) in &self.rows {
            for (identity, list) in rows.rows() {
                tables.verdicts.insert((*set, identity), list);
                used.insert(list);
            }
        }
        self.lists.retain(&used);
        for (list, id) in &self.lists.ids {
            tables.ports.extend(list.prefixes().into_iter().map(|prefix| ((*id, prefix), ())));
        }
    }
}

/// What of `all` is not in `other`; both are in order.
fn missing<T: Ord + Copy>(all: &[T], other: &[T]) -> Vec<T> {
    let mut other = other.iter().peekable();
    let is_missing = |one: &&T| {
        while other.next_if(|held| held < one).is_some() {}
        other.peek() != Some(one)
    };
    all.iter().filter(is_missing).copied().collect()
}

fn number_list(lists: &mut Numbers<Ports>, list: &Ports) -> u32 {
    if list.is_all() {
        ports::ALL
    } else if list.is_empty() {
        ports::NONE
    } else {
        lists.of(list)
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
