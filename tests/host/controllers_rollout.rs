//! The controllers and the scheduler over a real registry and store: a Deployment's whole life, with a make-believe
//! agent that makes every pod ready as soon as it is bound.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sheave_control::registry::{AddressRanges, Registry, Start, WriteOpts, index_stored};
use sheave_control::resource::kinds::{
    DEPLOYMENTS, ENDPOINT_SLICES, EVENTS, NAMESPACES, NODES, PODS, REPLICA_SETS, SERVICE_ACCOUNTS, SERVICES,
};
use sheave_control::resource::{ApiError, DeleteOptions, Kind, Propagation, Selectors, Subresource, object};
use sheave_control::store::log::LogStore;
use sheave_control::store::redb::RedbEngine;
use sheave_control::{controller, schedule};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(30);

/// A control plane without HTTP, and one node.
struct Cluster {
    registry: Registry,
    shutdown: CancellationToken,
    _dir: tempfile::TempDir,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Cluster {
    async fn start() -> Cluster {
        let dir = tempfile::tempdir().expect("a directory");
        let engine = RedbEngine::open(&dir.path().join("store.redb")).expect("an engine");
        let store = LogStore::open(engine, index_stored).expect("a store");
        let ranges = AddressRanges {
            service_cidrs: vec!["10.96.0.0/24".parse().expect("a range")],
            node_ports: (30_000, 30_100),
        };
        let registry = Registry::new(Arc::new(store), &ranges).expect("a registry");
        registry.bootstrap(None).await.expect("the first objects");
        let shutdown = CancellationToken::new();
        let config = controller::Config { root_ca: Some("PEM".to_owned()) };
        tokio::spawn(controller::run(registry.clone(), config, shutdown.clone()));
        tokio::spawn(schedule::run(registry.clone(), shutdown.clone()));
        let cluster = Cluster { registry, shutdown, _dir: dir };
        cluster.add_node("n1", 1000).await;
        tokio::spawn(agent(cluster.registry.clone()));
        cluster
    }

    async fn add_node(&self, name: &str, pods_max: u32) {
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

    async fn create(&self, kind: &'static Kind, namespace: &str, object: Value) {
        let done = self.registry.create(kind, namespace, object, WriteOpts::default()).await;
        done.unwrap_or_else(|e| panic!("creating a {}: {e}", kind.singular));
    }

    async fn patch(&self, kind: &'static Kind, name: &str, merge: Value) {
        let change = |stored: &mut Value| {
            json_merge(stored, &merge);
            Ok(())
        };
        self.registry.mutate(kind, "default", name, Subresource::Main, change).await.expect("a patch");
    }

    async fn delete(&self, kind: &'static Kind, namespace: &str, name: &str, propagation: Propagation) {
        let options = DeleteOptions { propagation: Some(propagation), ..DeleteOptions::default() };
        self.registry.delete(kind, namespace, name, options).await.expect("a deletion");
    }

    fn list(&self, kind: &'static Kind, namespace: &str) -> Vec<Value> {
        let (objects, _) = self.registry.list(kind, Some(namespace), &Selectors::everything());
        objects.iter().map(|o| o.value()).collect()
    }

    fn deployment(&self) -> Value {
        self.registry.get(&DEPLOYMENTS, "default", "web").map(|d| d.value()).unwrap_or(Value::Null)
    }

    /// Waits until it holds; looks again at every change of the store.
    async fn until(&self, what: &str, holds: impl Fn(&Cluster) -> bool) {
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

    fn dump(&self) -> String {
        let mut text = String::new();
        for kind in [&DEPLOYMENTS, &REPLICA_SETS, &PODS, &ENDPOINT_SLICES] {
            for object in self.list(kind, "default") {
                text.push_str(&format!("{} {object}\n", kind.singular));
            }
        }
        text
    }

    /// The Deployment is rolled out, as `kubectl rollout status` sees it.
    fn is_rolled_out(&self, replicas: i64) -> bool {
        let web = self.deployment();
        let status = |field: &str| web["status"][field].as_i64().unwrap_or(0);
        status("observedGeneration") >= web["metadata"]["generation"].as_i64().unwrap_or(i64::MAX)
            && ["replicas", "updatedReplicas", "readyReplicas", "availableReplicas"]
                .iter()
                .all(|field| status(field) == replicas)
    }

    fn images(&self) -> Vec<String> {
        let image = |p: &Value| p["spec"]["containers"][0]["image"].as_str().unwrap_or("").to_owned();
        self.list(&PODS, "default").iter().map(image).collect()
    }

    fn ready_endpoints(&self) -> usize {
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
    let mut watch = registry.watch(&PODS, None, Start::Now).expect("a watch");
    let mut address = 0;
    while let Ok(events) = watch.next().await {
        for event in events {
            let pod = event.object.value();
            address += 1;
            match serve(&registry, &pod, address).await {
                Err(error) if !error.is_not_found() && !error.is_conflict() => panic!("{error}"),
                _ => {}
            }
        }
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

fn deployment(replicas: u32) -> Value {
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

fn service() -> Value {
    json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_life_of_a_deployment() {
    let cluster = Cluster::start().await;
    cluster.create(&SERVICES, "default", service()).await;
    cluster.create(&DEPLOYMENTS, "default", deployment(3)).await;
    cluster.until("3 replicas", |c| c.is_rolled_out(3) && c.ready_endpoints() == 3).await;
    let first = object::uid(&cluster.list(&REPLICA_SETS, "default")[0]).to_owned();

    cluster.patch(&DEPLOYMENTS, "web", json!({"spec": {"replicas": 5}})).await;
    cluster.until("5 replicas", |c| c.is_rolled_out(5) && c.ready_endpoints() == 5).await;
    assert_eq!(cluster.list(&PODS, "default").len(), 5, "no pod too many");

    let image =
        json!({"spec": {"template": {"spec": {"containers": [{"name": "echo", "image": "echo:2"}]}}}});
    let watched = tokio::spawn(watch_rollout(cluster.registry.clone(), 5));
    cluster.patch(&DEPLOYMENTS, "web", image).await;
    cluster.until("the new image", |c| c.is_rolled_out(5) && c.images() == vec!["echo:2"; 5]).await;
    cluster.until("endpoints of the new pods", |c| c.ready_endpoints() == 5).await;
    let (pods_max, ready_min) = watched.await.expect("the watch of the rollout");
    // 25 %/25 % of 5: 2 more, 1 less.
    assert!(pods_max <= 7 && ready_min >= 4, "at most {pods_max} pods, at least {ready_min} ready");
    let sets = cluster.list(&REPLICA_SETS, "default");
    let old = sets.iter().find(|s| object::uid(s) == first).expect("the old set stays for a roll back");
    assert_eq!((&old["spec"]["replicas"], sets.len()), (&json!(0), 2));
    let revision = &cluster.deployment()["metadata"]["annotations"]["deployment.kubernetes.io/revision"];
    assert_eq!(revision, "2");

    cluster.delete(&DEPLOYMENTS, "default", "web", Propagation::Background).await;
    cluster
        .until("everything is gone", |c| {
            c.list(&REPLICA_SETS, "default").is_empty() && c.list(&PODS, "default").is_empty()
        })
        .await;
    cluster.until("no endpoints", |c| c.ready_endpoints() == 0).await;
}

/// The most active pods and the fewest ready ones while the image changes.
async fn watch_rollout(registry: Registry, replicas: usize) -> (usize, usize) {
    let mut watch = registry.watch(&PODS, Some("default"), Start::Now).expect("a watch");
    let (mut pods_max, mut ready_min) = (0, usize::MAX);
    let mut pods: std::collections::BTreeMap<String, Value> = registry
        .list(&PODS, Some("default"), &Selectors::everything())
        .0
        .iter()
        .map(|o| (o.index.name.to_string(), o.value()))
        .collect();
    loop {
        for event in watch.next().await.expect("events") {
            let pod = event.object.value();
            if event.change == sheave_control::store::Change::Deleted || object::is_deleting(&pod) {
                pods.remove(object::name(&pod));
            } else {
                pods.insert(object::name(&pod).to_owned(), pod);
            }
            let ready = pods.values().filter(|p| p["status"]["conditions"][1]["status"] == "True").count();
            pods_max = pods_max.max(pods.len());
            ready_min = ready_min.min(ready);
            let new = pods.values().filter(|p| p["spec"]["containers"][0]["image"] == "echo:2").count();
            if new == replicas && pods.len() == replicas && ready == replicas {
                return (pods_max, ready_min);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreground_and_orphan_deletion() {
    let cluster = Cluster::start().await;
    cluster.create(&DEPLOYMENTS, "default", deployment(2)).await;
    cluster.until("2 replicas", |c| c.is_rolled_out(2)).await;
    cluster.delete(&DEPLOYMENTS, "default", "web", Propagation::Orphan).await;
    cluster.until("the Deployment goes", |c| c.deployment().is_null()).await;
    let sets = cluster.list(&REPLICA_SETS, "default");
    assert_eq!(sets.len(), 1, "its set stays");
    assert_eq!(sets[0]["metadata"]["ownerReferences"], Value::Null);
    assert_eq!(cluster.list(&PODS, "default").len(), 2);

    cluster.create(&DEPLOYMENTS, "default", deployment(2)).await;
    cluster.until("it takes the set over again", |c| c.is_rolled_out(2)).await;
    assert_eq!(cluster.list(&REPLICA_SETS, "default").len(), 1);

    cluster.delete(&DEPLOYMENTS, "default", "web", Propagation::Foreground).await;
    let mut gone_early = false;
    cluster
        .until("the Deployment goes last", |c| {
            let left = c.list(&PODS, "default").len() + c.list(&REPLICA_SETS, "default").len();
            c.deployment().is_null() && left == 0
        })
        .await;
    gone_early |= !cluster.list(&PODS, "default").is_empty();
    assert!(!gone_early);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_has_its_account_and_ends_with_all_in_it() {
    let cluster = Cluster::start().await;
    cluster.create(&NAMESPACES, "", json!({"metadata": {"name": "team"}})).await;
    cluster
        .until("a service account", |c| c.registry.get(&SERVICE_ACCOUNTS, "team", "default").is_ok())
        .await;
    cluster
        .until("the root certificate", |c| {
            let kind = &sheave_control::resource::kinds::CONFIG_MAPS;
            c.registry
                .get(kind, "team", "kube-root-ca.crt")
                .is_ok_and(|m| m.value()["data"]["ca.crt"] == "PEM")
        })
        .await;
    cluster.create(&DEPLOYMENTS, "team", deployment(3)).await;
    cluster.create(&SERVICES, "team", service()).await;
    cluster.until("pods", |c| c.list(&PODS, "team").len() == 3).await;
    cluster.delete(&NAMESPACES, "", "team", Propagation::Background).await;
    cluster.until("the namespace ends", |c| c.registry.get(&NAMESPACES, "", "team").is_err()).await;
    for kind in sheave_control::resource::kinds().iter().filter(|k| k.namespaced) {
        assert_eq!(cluster.list(kind, "team"), Vec::<Value>::new(), "{} are left", kind.plural);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_fits_nowhere_waits_for_room() {
    let cluster = Cluster::start().await;
    let pod = |name: &str, cpu: &str| {
        json!({"metadata": {"name": name}, "spec": {"containers": [
            {"name": "c", "image": "i", "resources": {"requests": {"cpu": cpu}}}]}})
    };
    cluster.create(&PODS, "default", pod("first", "5")).await;
    cluster.create(&PODS, "default", pod("second", "5")).await;
    let scheduled = |c: &Cluster, name: &str| {
        let pod = c.registry.get(&PODS, "default", name).expect("the pod").value();
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.into_iter().find(|x| x["type"] == "PodScheduled").unwrap_or(Value::Null)
    };
    cluster.until("the second does not fit", |c| scheduled(c, "second")["reason"] == "Unschedulable").await;
    assert_eq!(scheduled(&cluster, "second")["message"], "0/1 nodes are available: 1 Insufficient cpu.");
    let told = |c: &Cluster, reason: &str| {
        c.list(&EVENTS, "default")
            .iter()
            .any(|e| e["reason"] == reason && e["involvedObject"]["name"] == "second")
    };
    cluster.until("an event", |c| told(c, "FailedScheduling")).await;
    cluster.delete(&PODS, "default", "first", Propagation::Background).await;
    cluster.until("it gets the room", |c| scheduled(c, "second")["status"] == "True").await;
    cluster.until("another event", |c| told(c, "Scheduled")).await;

    cluster.create(&PODS, "default", pod("third", "5")).await;
    cluster.until("the third does not fit", |c| scheduled(c, "third")["reason"] == "Unschedulable").await;
    cluster.add_node("n2", 10).await;
    cluster.until("a new node is used", |c| scheduled(c, "third")["status"] == "True").await;
    let third = cluster.registry.get(&PODS, "default", "third").expect("the pod").value();
    assert_eq!(third["spec"]["nodeName"], "n2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_pods_and_no_pod_twice() {
    let cluster = Cluster::start().await;
    let started = Instant::now();
    cluster.create(&DEPLOYMENTS, "default", deployment(200)).await;
    cluster.until("200 replicas", |c| c.is_rolled_out(200)).await;
    println!("200 replicas after {:?}", started.elapsed());
    assert_eq!(cluster.list(&PODS, "default").len(), 200);
    // A controller that answers its own writes would never come to rest.
    let end = Instant::now() + DEADLINE;
    loop {
        let before = cluster.registry.revision();
        tokio::time::sleep(Duration::from_millis(200)).await;
        if cluster.registry.revision() == before {
            return;
        }
        assert!(Instant::now() < end, "writes go on and on");
    }
}
