//! A control plane without HTTP for the tests of the controllers and the scheduler: a real registry and store, and a
//! make-believe agent that makes every pod ready as soon as it is bound.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sheave_control::registry::{AddressRanges, Registry, Start, WriteOpts, index_stored};
use sheave_control::resource::kinds::{DEPLOYMENTS, ENDPOINT_SLICES, NODES, PODS, REPLICA_SETS};
use sheave_control::resource::{ApiError, DeleteOptions, Kind, Propagation, Selectors, Subresource, object};
use sheave_control::store::log::LogStore;
use sheave_control::store::redb::RedbEngine;
use sheave_control::store::{Change, Store};
use sheave_control::{controller, schedule};
use tokio_util::sync::CancellationToken;

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// A control plane without HTTP, and one node.
pub(crate) struct Cluster {
    pub(crate) registry: Registry,
    store: Arc<LogStore>,
    shutdown: CancellationToken,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
        // Writes that were accepted get to the disk, whether or not anybody learns of it, as in a crash.
        self.store.close();
    }
}

impl Cluster {
    /// Starts on the state in `dir`, which may be empty.
    pub(crate) async fn start(dir: &Path) -> Cluster {
        let engine = RedbEngine::open(&dir.join("store.redb")).expect("an engine");
        let store = Arc::new(LogStore::open(engine, index_stored).expect("a store"));
        let ranges = AddressRanges {
            service_cidrs: vec!["10.96.0.0/24".parse().expect("a range")],
            node_ports: (30_000, 30_100),
        };
        let shared: Arc<dyn Store> = Arc::clone(&store) as _;
        let registry = Registry::new(shared, &ranges).expect("a registry");
        registry.bootstrap(None).await.expect("the first objects");
        let shutdown = CancellationToken::new();
        let config = controller::Config { root_ca: Some("PEM".to_owned()), ..controller::Config::default() };
        let cluster = Cluster { registry, store, shutdown };
        if cluster.registry.get(&NODES, "", "n1").is_err() {
            cluster.add_node("n1", 1000).await;
        }
        let registry = || cluster.registry.clone();
        tokio::spawn(controller::run(registry(), config, cluster.shutdown.clone()));
        tokio::spawn(schedule::run(registry(), cluster.shutdown.clone()));
        tokio::spawn(agent(registry()));
        cluster
    }

    pub(crate) async fn add_node(&self, name: &str, pods_max: u32) {
        let amounts = json!({"cpu": "8", "memory": "16Gi", "pods": pods_max.to_string()});
        let node = json!({
            "metadata": {"name": name},
            "status": {
                "capacity": amounts,
                "allocatable": amounts,
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        self.create(&NODES, "", node).await;
    }

    pub(crate) async fn create(&self, kind: &'static Kind, namespace: &str, object: Value) {
        let done = self.registry.create(kind, namespace, object, WriteOpts::default()).await;
        done.unwrap_or_else(|e| panic!("creating a {}: {e}", kind.singular));
    }

    pub(crate) async fn patch(&self, kind: &'static Kind, name: &str, merge: Value) {
        let change = |stored: &mut Value| {
            json_merge(stored, &merge);
            Ok(())
        };
        self.registry.mutate(kind, "default", name, Subresource::Main, change).await.expect("a patch");
    }

    pub(crate) async fn delete(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        propagation: Propagation,
    ) {
        let options = DeleteOptions { propagation: Some(propagation), ..DeleteOptions::default() };
        self.registry.delete(kind, namespace, name, options).await.expect("a deletion");
    }

    pub(crate) fn list(&self, kind: &'static Kind, namespace: &str) -> Vec<Value> {
        let (objects, _) = self.registry.list(kind, Some(namespace), &Selectors::everything());
        objects.iter().map(|o| o.value()).collect()
    }

    pub(crate) fn deployment(&self) -> Value {
        self.registry.get(&DEPLOYMENTS, "default", "web").map(|d| d.value()).unwrap_or(Value::Null)
    }

    /// Waits until it holds; looks again at every change of the store.
    pub(crate) async fn until(&self, what: &str, holds: impl Fn(&Cluster) -> bool) {
        let end = Instant::now() + DEADLINE;
        let mut seen = None;
        loop {
            let rev = self.registry.revision();
            if seen != Some(rev) {
                if holds(self) {
                    return;
                }
                seen = Some(rev);
            }
            assert!(Instant::now() < end, "{what}: not within {DEADLINE:?}\n{}", self.dump());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub(crate) fn dump(&self) -> String {
        let mut text = String::new();
        for kind in [&DEPLOYMENTS, &REPLICA_SETS, &PODS, &ENDPOINT_SLICES] {
            for object in self.list(kind, "default") {
                text.push_str(&format!("{} {object}\n", kind.singular));
            }
        }
        text
    }

    /// The Deployment is rolled out, as `kubectl rollout status` sees it.
    pub(crate) fn is_rolled_out(&self, replicas: i64) -> bool {
        let web = self.deployment();
        let status = |field: &str| web["status"][field].as_i64().unwrap_or(0);
        status("observedGeneration") >= web["metadata"]["generation"].as_i64().unwrap_or(i64::MAX)
            && ["replicas", "updatedReplicas", "readyReplicas", "availableReplicas"]
                .iter()
                .all(|field| status(field) == replicas)
    }

    /// Pods that are neither over nor going, and those of them that are ready.
    pub(crate) fn pod_counts(&self) -> (usize, usize) {
        let pods = self.list(&PODS, "default");
        let active = || pods.iter().filter(|p| !object::is_deleting(p));
        let ready = active().filter(|p| p["status"]["conditions"][1]["status"] == "True");
        (active().count(), ready.count())
    }

    pub(crate) fn images(&self) -> Vec<String> {
        let image = |p: &Value| p["spec"]["containers"][0]["image"].as_str().unwrap_or("").to_owned();
        self.list(&PODS, "default").iter().map(image).collect()
    }

    pub(crate) fn ready_endpoints(&self) -> usize {
        let slices = self.list(&ENDPOINT_SLICES, "default");
        let of_web = slices.iter().filter(|s| s["metadata"]["labels"]["kubernetes.io/service-name"] == "web");
        of_web
            .flat_map(|s| s["endpoints"].as_array().cloned().unwrap_or_default())
            .filter(|e| e["conditions"]["ready"] == true)
            .count()
    }
}

/// RFC 7396, so that the test needs no crate for it.
fn json_merge(target: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            if let Some(map) = target.as_object_mut() {
                map.remove(key);
            }
        } else {
            json_merge(&mut target[key], value);
        }
    }
}

/// Makes bound pods ready and lets deleted ones go.
async fn agent(registry: Registry) {
    let (pods, rev) = registry.list(&PODS, None, &Selectors::everything());
    let mut watch = registry.watch(&PODS, None, Start::Rev(rev)).expect("a watch");
    let mut seen: Vec<Value> = pods.iter().map(|p| p.value()).collect();
    let mut address = 0;
    loop {
        for pod in seen {
            address += 1;
            match serve(&registry, &pod, address).await {
                Ok(()) => {}
                Err(error) if error.is_not_found() || error.is_conflict() => {}
                // The store is closed: this control plane is over.
                Err(error) if error.code == 503 => return,
                Err(error) => panic!("{error}"),
            }
        }
        let Ok(events) = watch.next().await else { return };
        seen = events.iter().filter(|e| e.change != Change::Deleted).map(|e| e.object.value()).collect();
    }
}

async fn serve(registry: &Registry, pod: &Value, address: u32) -> Result<(), ApiError> {
    let (namespace, name) = (object::namespace(pod), object::name(pod));
    if object::is_deleting(pod) {
        let options = DeleteOptions {
            grace_period_seconds: Some(0),
            uid: Some(object::uid(pod).to_owned()),
            ..DeleteOptions::default()
        };
        return registry.delete(&PODS, namespace, name, options).await.map(drop);
    }
    if !pod["spec"]["nodeName"].is_string() || pod["status"]["phase"] != "Pending" {
        return Ok(());
    }
    let ip = format!("10.244.{}.{}", address / 200, address % 200 + 1);
    let run = |stored: &mut Value| {
        stored["status"]["phase"] = json!("Running");
        stored["status"]["podIP"] = json!(ip);
        stored["status"]["podIPs"] = json!([{ "ip": ip }]);
        stored["status"]["conditions"] = json!([
            {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
        Ok(())
    };
    registry.mutate(&PODS, namespace, name, Subresource::Status, run).await.map(drop)
}

pub(crate) fn deployment(replicas: u32) -> Value {
    json!({
        "metadata": {"name": "web"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "echo", "image": "echo:1"}]},
            },
        },
    })
}

pub(crate) fn service() -> Value {
    json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}})
}
