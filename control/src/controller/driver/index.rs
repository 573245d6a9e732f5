//! Which keys an event concerns. Invariant: what is kept here is only what the registry cannot answer quickly (whose
//! selector picks a pod, who owns anything, when a node was last heard of); it follows the events and is rebuilt from
//! a listing whenever they were missed.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::observe::{ReadError, dependents_of, view};
use super::{Controller, Key};
use crate::controller::endpoint_slice::{MANAGED_BY, MANAGER, SERVICE_NAME};
use crate::controller::model::{Headed, Meta, Node, ReplicaSet, Service, StringMap, condition};
use crate::controller::{namespace, node};
use crate::registry::Registry;
use crate::resource::{Kind, ObjectIndex, Selectors, find_by_gvk, kinds};
use crate::store::{Change, Event, Object};

/// Where nodes' agents keep their Leases.
const NODE_LEASES: &str = "kube-node-lease";

/// Last signs of life of a node.
#[derive(Debug)]
struct Heartbeat {
    at: Instant,
    /// The time that the agent put into the Ready condition.
    reported: Option<Timestamp>,
}

/// See the module's invariant.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// ReplicaSets and Deployments by uid: pods and sets name their controller by it.
    controllers: HashMap<Box<str>, Key>,
    /// Services by namespace and one pair of their selector.
    by_pair: HashMap<(String, String, String), BTreeSet<String>>,
    /// Selectors of Services by namespace and name.
    selectors: HashMap<(String, String), StringMap>,
    /// How many objects name a uid as their owner.
    owners: HashMap<Box<str>, usize>,
    heartbeats: HashMap<String, Heartbeat>,
    /// Nodes on whose pods an eye must be kept.
    watched_nodes: HashSet<String>,
    /// Since when the Nodes are missing to which pods are bound.
    missing: HashMap<String, Instant>,
}

/// One event and the keys that it concerns.
pub(crate) struct Note<'a> {
    pub(crate) registry: &'a Registry,
    pub(crate) kind: &'static Kind,
    pub(crate) event: &'a Event,
    pub(crate) keys: Vec<Key>,
}

impl Note<'_> {
    fn object(&self) -> &Object {
        &self.event.object
    }

    fn is_deleted(&self) -> bool {
        self.event.change == Change::Deleted
    }

    /// The states of the object on both sides of the event.
    fn sides(&self) -> impl Iterator<Item = &Object> {
        std::iter::once(&*self.event.object).chain(self.event.prev.as_deref())
    }

    /// Whether something other than the content has changed: who owns the object or how it is labelled.
    fn is_moved(&self) -> bool {
        let now = &self.object().index;
        self.event.prev.as_ref().is_none_or(|p| p.index.owners != now.owners || p.index.labels != now.labels)
    }

    fn add(&mut self, controller: Controller, namespace: &str, name: &str) {
        self.keys.push(Key::new(controller, namespace, name));
    }

    fn add_garbage(&mut self, kind: &'static Kind, namespace: &str, name: &str) {
        self.keys.push(Key { kind: Some(kind), ..Key::new(Controller::Garbage, namespace, name) });
    }
}

impl Index {
    /// Takes note of an event and adds the keys that it concerns.
    pub(crate) fn note(&mut self, note: &mut Note<'_>) -> Result<(), ReadError> {
        let index = &note.event.object.index;
        let (namespace, name) = (index.namespace.to_string(), index.name.to_string());
        self.note_ownership(note)?;
        if !namespace.is_empty() && note.is_deleted() {
            self.note_namespace(note, &namespace);
        }
        match (note.kind.group, note.kind.plural) {
            ("", "pods") => self.note_pod(note)?,
            ("", "services") => {
                self.note_service(note)?;
                note.add(Controller::EndpointSlice, &namespace, &name);
            }
            ("", "nodes") => self.note_node(note)?,
            ("", "namespaces") if !note.is_deleted() => note.add(Controller::Namespace, "", &name),
            ("", "configmaps") if name == namespace::ROOT_CA => {
                note.add(Controller::Namespace, "", &namespace)
            }
            ("", "serviceaccounts") if note.is_deleted() => note.add(Controller::Namespace, "", &namespace),
            ("apps", "deployments") => self.note_controller(note, Controller::Deployment),
            ("apps", "replicasets") => {
                self.note_controller(note, Controller::ReplicaSet);
                self.note_owned(note, &kinds::DEPLOYMENTS)?;
            }
            ("discovery.k8s.io", "endpointslices") => note_slice(note),
            ("coordination.k8s.io", "leases") if namespace == NODE_LEASES && !note.is_deleted() => {
                self.note_lease(&name);
            }
            _ => {}
        }
        Ok(())
    }

    fn note_namespace(&self, note: &mut Note<'_>, namespace: &str) {
        let found = note.registry.get(&kinds::NAMESPACES, "", namespace);
        if found.is_ok_and(|n| n.index.deletion.is_some()) {
            note.add(Controller::Namespace, "", namespace);
        }
    }

    fn note_controller(&mut self, note: &mut Note<'_>, controller: Controller) {
        let index = &note.event.object.index;
        let key = Key::new(controller, &index.namespace, &index.name);
        if note.is_deleted() {
            self.controllers.remove(&index.uid);
        } else {
            self.controllers.insert(index.uid.clone(), key.clone());
        }
        note.keys.push(key);
    }

    /// An object that controllers of `owner` control or might take over.
    fn note_owned(&self, note: &mut Note<'_>, owner: &'static Kind) -> Result<(), ReadError> {
        let owners: Vec<Key> = note
            .sides()
            .filter_map(|o| o.index.controller_uid())
            .filter_map(|uid| self.controllers.get(uid))
            .cloned()
            .collect();
        note.keys.extend(owners);
        let index = &note.event.object.index;
        if index.controller_uid().is_none() && !note.is_deleted() && note.is_moved() {
            // An orphan: rare, so the selectors of the namespace are read for it.
            let (all, _) = note.registry.list(owner, Some(&index.namespace), &Selectors::everything());
            for candidate in all {
                if selects(owner, &candidate, index)? {
                    let controller = if owner == &kinds::DEPLOYMENTS {
                        Controller::Deployment
                    } else {
                        Controller::ReplicaSet
                    };
                    note.add(controller, &candidate.index.namespace, &candidate.index.name);
                }
            }
        }
        Ok(())
    }

    fn note_pod(&mut self, note: &mut Note<'_>) -> Result<(), ReadError> {
        self.note_owned(note, &kinds::REPLICA_SETS)?;
        self.note_ended(note);
        let mut services = BTreeSet::new();
        for side in note.sides() {
            self.services_of(&side.index, &mut services);
        }
        let index = &note.event.object.index;
        let (namespace, node) = (index.namespace.to_string(), index.node_name(&kinds::PODS).to_owned());
        for service in services {
            note.add(Controller::EndpointSlice, &namespace, &service);
        }
        if note.is_deleted() {
            return Ok(());
        }
        if node.is_empty() {
            if index.deletion.is_some() {
                note.add(Controller::PodGc, "", "");
            }
        } else if note.registry.get(&kinds::NODES, "", &node).is_err() {
            note.add(Controller::PodGc, "", &node);
        } else if self.watched_nodes.contains(&node) {
            note.add(Controller::Node, "", &node);
        }
        Ok(())
    }

    /// The end of a pod concerns the Deployment of its set: `Recreate` waits for it.
    fn note_ended(&self, note: &mut Note<'_>) {
        let index = &note.event.object.index;
        let ended = note.is_deleted() || matches!(index.phase(&kinds::PODS), "Succeeded" | "Failed");
        let set = index.controller_uid().and_then(|uid| self.controllers.get(uid));
        let Some(set) = set.filter(|_| ended) else { return };
        let found = note.registry.get(&kinds::REPLICA_SETS, &set.namespace, &set.name);
        let parent = found.ok().and_then(|s| self.controllers.get(s.index.controller_uid()?)).cloned();
        note.keys.extend(parent);
    }

    fn services_of(&self, pod: &ObjectIndex, found: &mut BTreeSet<String>) {
        for (label, value) in &pod.labels {
            let pair = (pod.namespace.to_string(), label.to_string(), value.to_string());
            for service in self.by_pair.get(&pair).into_iter().flatten() {
                let selector = self.selectors.get(&(pod.namespace.to_string(), service.clone()));
                let picks = |s: &StringMap| s.iter().all(|(k, v)| pod.label(k) == Some(v.as_str()));
                if selector.is_some_and(picks) {
                    found.insert(service.clone());
                }
            }
        }
    }

    fn note_service(&mut self, note: &Note<'_>) -> Result<(), ReadError> {
        let index = &note.event.object.index;
        let id = (index.namespace.to_string(), index.name.to_string());
        if let Some(old) = self.selectors.remove(&id)
            && let Some(pair) = pair(&id.0, &old)
            && let Some(services) = self.by_pair.get_mut(&pair)
        {
            services.remove(&id.1);
            if services.is_empty() {
                self.by_pair.remove(&pair);
            }
        }
        if note.is_deleted() {
            return Ok(());
        }
        let service: Service = view(note.object())?;
        if let Some(pair) = pair(&id.0, &service.spec.selector) {
            self.by_pair.entry(pair).or_default().insert(id.1.clone());
            self.selectors.insert(id, service.spec.selector);
        }
        Ok(())
    }

    fn note_node(&mut self, note: &mut Note<'_>) -> Result<(), ReadError> {
        let index = &note.event.object.index;
        let name = index.name.to_string();
        note.add(Controller::PodGc, "", &name);
        // One key for all: two looks at once could give two nodes one range.
        note.add(Controller::NodeRanges, "", "");
        let was_ready = note.event.prev.as_ref().is_some_and(|p| p.index.ready);
        let is_ready = index.ready && !note.is_deleted();
        if was_ready != is_ready || note.is_deleted() {
            // Whether anything is evicted from the others depends on whether there is a node that is well.
            for other in &self.watched_nodes {
                note.keys.push(Key::new(Controller::Node, "", other));
            }
        }
        if note.is_deleted() {
            self.heartbeats.remove(&name);
            self.watched_nodes.remove(&name);
            return Ok(());
        }
        let parsed: Node = view(note.object())?;
        let reported = condition(&parsed.status.conditions, "Ready").and_then(|c| c.last_heartbeat_time);
        let heartbeat =
            self.heartbeats.entry(name.clone()).or_insert(Heartbeat { at: Instant::now(), reported });
        if heartbeat.reported != reported {
            *heartbeat = Heartbeat { at: Instant::now(), reported };
        }
        if node::wants_pods(&parsed) {
            self.watched_nodes.insert(name.clone());
        } else {
            self.watched_nodes.remove(&name);
        }
        note.add(Controller::Node, "", &name);
        Ok(())
    }

    /// A renewed Lease only moves the time; the node is looked at when that has run out.
    fn note_lease(&mut self, node: &str) {
        let reported = self.heartbeats.get(node).and_then(|h| h.reported);
        self.heartbeats.insert(node.to_owned(), Heartbeat { at: Instant::now(), reported });
    }

    /// For how long nothing was heard of a node; the first time that it is asked for counts as a sign of life.
    pub(crate) fn silent_for(&mut self, node: &str) -> Duration {
        let first = || Heartbeat { at: Instant::now(), reported: None };
        self.heartbeats.entry(node.to_owned()).or_insert_with(first).at.elapsed()
    }

    /// For how long a Node has been missing.
    pub(crate) fn missing_for(&mut self, node: &str, exists: bool) -> Option<Duration> {
        if exists {
            self.missing.remove(node);
            return None;
        }
        Some(self.missing.entry(node.to_owned()).or_insert_with(Instant::now).elapsed())
    }

    /// Nothing is bound to a missing Node any more.
    pub(crate) fn forget_missing(&mut self, node: &str) {
        self.missing.remove(node);
    }

    fn note_ownership(&mut self, note: &mut Note<'_>) -> Result<(), ReadError> {
        let kind = note.kind;
        let index = &note.event.object.index;
        let before: &[_] = match (&note.event.prev, note.event.change) {
            (_, Change::Deleted) => &index.owners,
            (Some(prev), _) => &prev.index.owners,
            (None, _) => &[],
        };
        let after: &[_] = if note.is_deleted() { &[] } else { &index.owners };
        for owner in after {
            *self.owners.entry(owner.uid.clone()).or_default() += 1;
        }
        for owner in before {
            if let Some(count) = self.owners.get_mut(&owner.uid) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.owners.remove(&owner.uid);
                }
            }
        }
        let changed = before != after;
        let (namespace, name) = (index.namespace.to_string(), index.name.to_string());
        let is_ending = index.deletion.is_some() && index.has_finalizers && !note.is_deleted();
        if (changed && !after.is_empty()) || is_ending {
            note.add_garbage(kind, &namespace, &name);
        }
        if (note.is_deleted() || is_ending) && self.owners.contains_key(&index.uid) {
            for (kind, dependent) in dependents_of(note.registry, kind, &namespace, &index.uid) {
                note.add_garbage(kind, &dependent.index.namespace, &dependent.index.name);
            }
        }
        if changed && !before.is_empty() {
            let old = if note.is_deleted() { Some(note.object()) } else { note.event.prev.as_deref() };
            if let Some(old) = old {
                let old: Headed = view(old)?;
                note_waiting_owners(note, &old.metadata);
            }
        }
        Ok(())
    }
}

/// Owners that are being deleted may have waited for this object to go or to let go of them.
fn note_waiting_owners(note: &mut Note<'_>, old: &Meta) {
    for reference in &old.owner_references {
        let Some(kind) = find_by_gvk(&reference.api_version, &reference.kind) else { continue };
        let namespace = if kind.namespaced { old.namespace.as_str() } else { "" };
        let owner = note.registry.get(kind, namespace, &reference.name);
        if owner.is_ok_and(|o| o.index.deletion.is_some() && o.index.has_finalizers) {
            note.add_garbage(kind, namespace, &reference.name);
        }
    }
}

/// Slices that others change or delete are put right again.
fn note_slice(note: &mut Note<'_>) {
    let services: BTreeSet<(String, String)> = note
        .sides()
        .filter(|s| s.index.label(MANAGED_BY) == Some(MANAGER))
        .filter_map(|s| Some((s.index.namespace.to_string(), s.index.label(SERVICE_NAME)?.to_owned())))
        .collect();
    for (namespace, service) in services {
        note.add(Controller::EndpointSlice, &namespace, &service);
    }
}

/// The pair of a selector by which its Service is found.
fn pair(namespace: &str, selector: &StringMap) -> Option<(String, String, String)> {
    let (key, value) = selector.first_key_value()?;
    Some((namespace.to_owned(), key.clone(), value.clone()))
}

fn selects(kind: &'static Kind, owner: &Object, object: &ObjectIndex) -> Result<bool, ReadError> {
    if kind == &kinds::DEPLOYMENTS {
        let deployment: crate::controller::model::Deployment = view(owner)?;
        return Ok(deployment.spec.selector.parsed.matches(object));
    }
    let set: ReplicaSet = view(owner)?;
    Ok(set.spec.selector.matches(object))
}
