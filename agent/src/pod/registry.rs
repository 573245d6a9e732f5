//! What is known of the pods of this node right now, for whoever only reads: admission, the https
//! listener, metrics. Each worker writes its own entry and takes it away at its end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use super::model::Pod;
use super::resources::Amounts;

/// One pod.
#[derive(Debug, Clone)]
pub struct Entry {
    /// As last seen.
    pub pod: Arc<Pod>,
    /// As last computed; null before that.
    pub status: Arc<str>,
    /// What it holds of the node; `None` once it ended.
    pub holds: Option<Amounts>,
    /// Containers that run.
    pub running: usize,
}

/// Every pod, by uid; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    entries: Arc<Mutex<BTreeMap<String, Entry>>>,
}

impl Registry {
    fn with<T>(&self, work: impl FnOnce(&mut BTreeMap<String, Entry>) -> T) -> T {
        // An entry is replaced whole, so a panic elsewhere leaves none half-written.
        work(&mut self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sets a pod's entry.
    pub fn set(&self, uid: &str, entry: Entry) {
        self.with(|entries| entries.insert(uid.to_owned(), entry));
    }

    /// Takes a pod's entry away.
    pub fn remove(&self, uid: &str) {
        self.with(|entries| entries.remove(uid));
    }

    /// What is held of the node, a pod each.
    pub fn held(&self) -> Vec<Amounts> {
        self.with(|entries| entries.values().filter_map(|entry| entry.holds).collect())
    }

    /// Number of pods, and of containers that run.
    pub fn counts(&self) -> (usize, usize) {
        self.with(|entries| (entries.len(), entries.values().map(|entry| entry.running).sum()))
    }

    /// The pod of this name; the one that was seen last where an older one is still being stopped.
    pub fn by_name(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        self.with(|entries| {
            let same = |entry: &&Entry| entry.pod.namespace == namespace && entry.pod.name == name;
            let mut all: Vec<&Entry> = entries.values().filter(same).collect();
            all.sort_by_key(|entry| entry.pod.deletion.is_none());
            all.last().map(|entry| entry.pod.clone())
        })
    }

    /// Every pod as a PodList.
    pub fn list(&self) -> Value {
        let items = self.with(|entries| {
            let item = |entry: &Entry| {
                let status: Value = serde_json::from_str(&entry.status).unwrap_or(Value::Null);
                let containers: Vec<Value> = entry
                    .pod
                    .spec
                    .containers
                    .iter()
                    .map(|c| serde_json::json!({"name": c.name, "image": c.image}))
                    .collect();
                serde_json::json!({
                    "metadata": {"namespace": entry.pod.namespace, "name": entry.pod.name, "uid": entry.pod.uid,
                        "labels": entry.pod.labels},
                    "spec": {"nodeName": entry.pod.spec.node_name, "containers": containers},
                    "status": status,
                })
            };
            entries.values().map(item).collect::<Vec<_>>()
        });
        serde_json::json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(uid: &str, deleted: bool) -> Entry {
        let deletion = deleted.then_some(super::super::model::Deletion { grace_s: 1 });
        let pod =
            Pod { namespace: "n".into(), name: "p".into(), uid: uid.into(), deletion, ..Pod::default() };
        Entry { pod: Arc::new(pod), status: "{\"phase\":\"Running\"}".into(), holds: None, running: 2 }
    }

    #[test]
    fn a_name_means_the_pod_that_stays() {
        let registry = Registry::default();
        registry.set("z", entry("z", true));
        registry.set("a", entry("a", false));
        assert_eq!(registry.by_name("n", "p").map(|pod| pod.uid.clone()), Some("a".to_owned()));
        assert_eq!(registry.counts(), (2, 4));
        assert_eq!(registry.list()["items"][0]["status"]["phase"], "Running");
        registry.remove("a");
        assert_eq!(registry.by_name("n", "p").map(|pod| pod.uid.clone()), Some("z".to_owned()));
        assert!(registry.by_name("n", "other").is_none());
        assert!(registry.held().is_empty());
    }
}
