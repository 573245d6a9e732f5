//! Reads from the registry what each controller decides on. Invariant: everything is read at the moment of the look
//! and parsed for it alone; the registry's cache, which has every acknowledged write, is the only copy.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;

use super::index::Index;
use super::{Controller, Key};
use crate::controller::endpoint_slice::{SERVICE_NAME, Slice};
use crate::controller::garbage::{Dependent, OwnerState};
use crate::controller::model::{
    Deployment, Headed, Meta, Node, OwnerReference, Pod, ReplicaSet, Service, View,
};
use crate::controller::namespace::{Content, Namespace};
use crate::controller::{
    Config, action::Action, action::Target, deployment, endpoint_slice, garbage, namespace, node,
    node_ranges, pod_gc, replica_set,
};
use crate::registry::Registry;
use crate::resource::lifecycle::FOREGROUND_FINALIZER;
use crate::resource::{Kind, LabelSelector, ObjectIndex, Selectors, find_by_gvk, kinds};
use crate::store::Object;

const ZONE: &str = "topology.kubernetes.io/zone";

/// An object that does not read as its kind should.
#[derive(Debug, thiserror::Error)]
#[error("reading {object}")]
pub(crate) struct ReadError {
    object: String,
    source: serde_json::Error,
}

/// One look: what is there, and what should be done.
pub(crate) struct Look<'a> {
    pub(crate) registry: &'a Registry,
    pub(crate) config: &'a Config,
    pub(crate) index: &'a mut Index,
    /// Why the last look at the key went wrong.
    pub(crate) failure: Option<String>,
    pub(crate) now: Timestamp,
}

/// Parses a view out of a cached object.
pub(crate) fn view<T: View>(object: &Object) -> Result<T, ReadError> {
    let mut view: T = serde_json::from_slice(&object.bytes)
        .map_err(|source| ReadError { object: object.key.as_str().to_owned(), source })?;
    view.meta_mut().rev = object.rev;
    Ok(view)
}

fn views<'o, T: View>(objects: impl IntoIterator<Item = &'o Arc<Object>>) -> Result<Vec<T>, ReadError> {
    objects.into_iter().map(|object| view(object)).collect()
}

impl Look<'_> {
    /// What the key's controller wants done now.
    pub(crate) fn decide(&mut self, key: &Key) -> Result<Vec<Action>, ReadError> {
        match key.controller {
            Controller::ReplicaSet => self.replica_set(key),
            Controller::Deployment => self.deployment(key),
            Controller::EndpointSlice => self.endpoint_slice(key),
            Controller::Garbage => self.garbage(key),
            Controller::Namespace => self.namespace(key),
            Controller::Node => self.node(key),
            Controller::NodeRanges => self.node_ranges(),
            Controller::PodGc => self.pod_gc(key),
        }
    }

    fn get<T: View>(&self, kind: &'static Kind, key: &Key) -> Result<Option<T>, ReadError> {
        match self.registry.get(kind, &key.namespace, &key.name) {
            Ok(object) => view(&object).map(Some),
            // The only error of a read: there is no such object.
            Err(_) => Ok(None),
        }
    }

    fn list(
        &self,
        kind: &'static Kind,
        namespace: Option<&str>,
        keep: impl Fn(&ObjectIndex) -> bool,
    ) -> Vec<Arc<Object>> {
        let (mut objects, _) = self.registry.list(kind, namespace, &Selectors::everything());
        objects.retain(|object| keep(&object.index));
        objects
    }

    fn replica_set(&mut self, key: &Key) -> Result<Vec<Action>, ReadError> {
        let Some(set) = self.get::<ReplicaSet>(&kinds::REPLICA_SETS, key)? else { return Ok(Vec::new()) };
        let pods = self.list(&kinds::PODS, Some(&key.namespace), |pod| {
            is_candidate(pod, &set.metadata.uid, &set.spec.selector)
        });
        let pods: Vec<Pod> = views(&pods)?;
        let wanted = usize::try_from(set.spec.replicas).unwrap_or(0);
        let shrinks = pods.iter().filter(|p| p.is_active()).count() > wanted;
        let co_located = if shrinks { self.co_located(&set) } else { BTreeMap::new() };
        Ok(replica_set::reconcile(&replica_set::Observed {
            set,
            pods,
            co_located,
            failure: self.failure.take(),
            now: self.now,
        }))
    }

    /// Active pods per node of the set and of its siblings under the same controller.
    fn co_located(&self, set: &ReplicaSet) -> BTreeMap<String, usize> {
        let namespace = Some(set.metadata.namespace.as_str());
        let parent = set.metadata.controller().map(|c| c.uid.as_str());
        let siblings = self.list(&kinds::REPLICA_SETS, namespace, |its| {
            *its.uid == *set.metadata.uid || (parent.is_some() && its.controller_uid() == parent)
        });
        let uids: BTreeSet<&str> = siblings.iter().map(|s| &*s.index.uid).collect();
        let pods = self.list(&kinds::PODS, namespace, |pod| {
            pod.deletion.is_none()
                && !matches!(pod.phase(&kinds::PODS), "Succeeded" | "Failed")
                && pod.controller_uid().is_some_and(|uid| uids.contains(uid))
        });
        let mut counts = BTreeMap::new();
        for pod in pods {
            *counts.entry(pod.index.node_name(&kinds::PODS).to_owned()).or_default() += 1;
        }
        counts
    }

    fn deployment(&mut self, key: &Key) -> Result<Vec<Action>, ReadError> {
        let Some(deployment) = self.get::<Deployment>(&kinds::DEPLOYMENTS, key)? else {
            return Ok(Vec::new());
        };
        let selector = &deployment.spec.selector.parsed;
        let sets = self.list(&kinds::REPLICA_SETS, Some(&key.namespace), |set| {
            is_candidate(set, &deployment.metadata.uid, selector)
        });
        let sets: Vec<ReplicaSet> = views(&sets)?;
        let new_name = deployment::new_set_name(&deployment);
        let busy = if deployment.spec.strategy.kind == "Recreate" {
            self.busy_sets(&key.namespace)
        } else {
            BTreeSet::new()
        };
        Ok(deployment::reconcile(&deployment::Observed {
            name_taken: self.registry.get(&kinds::REPLICA_SETS, &key.namespace, &new_name).is_ok(),
            deployment,
            sets,
            busy,
            failure: self.failure.take(),
            now: self.now,
        }))
    }

    /// Uids of the controllers whose pods run or are stopping.
    fn busy_sets(&self, namespace: &str) -> BTreeSet<String> {
        let alive = |pod: &ObjectIndex| !matches!(pod.phase(&kinds::PODS), "Succeeded" | "Failed");
        let pods = self.list(&kinds::PODS, Some(namespace), alive);
        pods.iter().filter_map(|p| p.index.controller_uid()).map(str::to_owned).collect()
    }

    fn endpoint_slice(&mut self, key: &Key) -> Result<Vec<Action>, ReadError> {
        let Some(service) = self.get::<Service>(&kinds::SERVICES, key)? else { return Ok(Vec::new()) };
        if service.spec.selector.is_empty() {
            return Ok(Vec::new());
        }
        let namespace = Some(key.namespace.as_str());
        let picks = |pod: &ObjectIndex| {
            service.spec.selector.iter().all(|(label, value)| pod.label(label) == Some(value.as_str()))
        };
        let pods: Vec<Pod> = views(&self.list(&kinds::PODS, namespace, picks))?;
        let slices = self
            .list(&kinds::ENDPOINT_SLICES, namespace, |s| s.label(SERVICE_NAME) == Some(key.name.as_str()));
        let slices: Vec<Slice> = views(&slices)?;
        let zones = self.list(&kinds::NODES, None, |node| node.label(ZONE).is_some());
        let zones = zones
            .iter()
            .filter_map(|node| Some((node.index.name.to_string(), node.index.label(ZONE)?.to_owned())))
            .collect();
        Ok(endpoint_slice::reconcile(&endpoint_slice::Observed { service, pods, zones, slices }))
    }

    fn garbage(&mut self, key: &Key) -> Result<Vec<Action>, ReadError> {
        let Some(kind) = key.kind else { return Ok(Vec::new()) };
        let Some(item) = self.get::<Headed>(kind, key)? else { return Ok(Vec::new()) };
        let meta = item.metadata;
        let mut owners = Vec::with_capacity(meta.owner_references.len());
        for reference in &meta.owner_references {
            owners.push(self.owner_state(&meta, reference)?);
        }
        let is_asked =
            owners.contains(&OwnerState::Waiting) || (meta.is_deleting() && !meta.finalizers.is_empty());
        let dependents = if is_asked { self.dependents(kind, &meta)? } else { Vec::new() };
        Ok(garbage::reconcile(&garbage::Observed { kind, meta, owners, dependents }))
    }

    fn owner_state(&self, meta: &Meta, reference: &OwnerReference) -> Result<OwnerState, ReadError> {
        let Some(kind) = find_by_gvk(&reference.api_version, &reference.kind) else {
            return Ok(OwnerState::Solid);
        };
        if kind.namespaced && meta.namespace.is_empty() {
            // An owner in a namespace can't own what is in none; whatever was meant, it is no reason to delete.
            return Ok(OwnerState::Solid);
        }
        let namespace = if kind.namespaced { meta.namespace.as_str() } else { "" };
        match self.registry.get(kind, namespace, &reference.name) {
            Ok(owner) if *owner.index.uid == *reference.uid => {
                if owner.index.deletion.is_none() || !owner.index.has_finalizers {
                    return Ok(OwnerState::Solid);
                }
                let owner: Headed = view(&owner)?;
                let waits = owner.metadata.finalizers.iter().any(|f| f == FOREGROUND_FINALIZER);
                Ok(if waits { OwnerState::Waiting } else { OwnerState::Solid })
            }
            _ => Ok(OwnerState::Gone),
        }
    }

    fn dependents(&self, kind: &'static Kind, meta: &Meta) -> Result<Vec<Dependent>, ReadError> {
        let mut dependents = Vec::new();
        for (kind, object) in dependents_of(self.registry, kind, &meta.namespace, &meta.uid) {
            let headed: Headed = view(&object)?;
            dependents.push(Dependent { kind, meta: headed.metadata });
        }
        Ok(dependents)
    }

    fn namespace(&mut self, key: &Key) -> Result<Vec<Action>, ReadError> {
        let Some(namespace) = self.get::<Namespace>(&kinds::NAMESPACES, key)? else { return Ok(Vec::new()) };
        let name = key.name.as_str();
        let mut contents = Vec::new();
        if namespace.metadata.is_deleting() {
            for kind in kinds::kinds().iter().filter(|k| k.namespaced) {
                for object in self.list(kind, Some(name), |_| true) {
                    contents.push(content(kind, &object));
                }
            }
        }
        let root_ca = match self.registry.get(&kinds::CONFIG_MAPS, name, namespace::ROOT_CA) {
            Ok(map) => Some(map.value()["data"]["ca.crt"].as_str().unwrap_or_default().to_owned()),
            Err(_) => None,
        };
        let account = self.registry.get(&kinds::SERVICE_ACCOUNTS, name, namespace::SERVICE_ACCOUNT);
        Ok(namespace::reconcile(&namespace::Observed {
            namespace,
            contents,
            has_service_account: account.is_ok(),
            root_ca,
            root_ca_wanted: self.config.root_ca.clone(),
        }))
    }

    fn node(&mut self, key: &Key) -> Result<Vec<Action>, ReadError> {
        let Some(node) = self.get::<Node>(&kinds::NODES, key)? else { return Ok(Vec::new()) };
        let others = self.list(&kinds::NODES, None, |other| other.ready && *other.name != *key.name);
        let pods = if node::wants_pods(&node) { self.pods_of_node(&key.name)? } else { Vec::new() };
        Ok(node::reconcile(&node::Observed {
            silent_for: self.index.silent_for(&key.name),
            node,
            others_ready: !others.is_empty(),
            pods,
            now: self.now,
        }))
    }

    fn node_ranges(&self) -> Result<Vec<Action>, ReadError> {
        let nodes: Vec<Node> = views(&self.list(&kinds::NODES, None, |_| true))?;
        let config = self.config.node_ranges.clone();
        Ok(node_ranges::reconcile(&node_ranges::Observed { nodes, config }))
    }

    fn pods_of_node(&self, name: &str) -> Result<Vec<Pod>, ReadError> {
        views(&self.list(&kinds::PODS, None, |pod| pod.node_name(&kinds::PODS) == name))
    }

    fn pod_gc(&mut self, key: &Key) -> Result<Vec<Action>, ReadError> {
        let exists = !key.name.is_empty() && self.registry.get(&kinds::NODES, "", &key.name).is_ok();
        let missing = self.index.missing_for(&key.name, exists);
        let pods = match missing {
            Some(_) => self.pods_of_node(&key.name)?,
            None => Vec::new(),
        };
        if pods.is_empty() {
            self.index.forget_missing(&key.name);
        }
        Ok(pod_gc::reconcile(&pod_gc::Observed { missing, pods }))
    }
}

/// Whether an object is the controller's, or could become its own.
fn is_candidate(object: &ObjectIndex, uid: &str, selector: &LabelSelector) -> bool {
    match object.controller_uid() {
        Some(controller) => controller == uid,
        None => selector.matches(object),
    }
}

fn content(kind: &'static Kind, object: &Object) -> Content {
    Content {
        target: Target {
            kind,
            namespace: object.index.namespace.to_string(),
            name: object.index.name.to_string(),
            uid: object.index.uid.to_string(),
            rev: None,
        },
        is_deleting: object.index.deletion.is_some(),
    }
}

/// The objects that name `uid` as an owner. Owners in a namespace have their dependents there.
pub(crate) fn dependents_of(
    registry: &Registry,
    owner: &Kind,
    namespace: &str,
    uid: &str,
) -> Vec<(&'static Kind, Arc<Object>)> {
    let within = owner.namespaced.then_some(namespace);
    let mut found = Vec::new();
    for kind in kinds::kinds().iter().filter(|k| k.namespaced || within.is_none()) {
        let (objects, _) = registry.list(kind, within.filter(|_| kind.namespaced), &Selectors::everything());
        let owned = |o: &Arc<Object>| o.index.owners.iter().any(|owner| *owner.uid == *uid);
        found.extend(objects.into_iter().filter(owned).map(|o| (*kind, o)));
    }
    found
}
