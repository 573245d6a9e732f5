//! The controllers and the scheduler over a real registry and store: a Deployment's whole life.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sheave_control::registry::{Registry, Start};
use sheave_control::resource::kinds::{
    CONFIG_MAPS, DEPLOYMENTS, EVENTS, NAMESPACES, PODS, REPLICA_SETS, SERVICE_ACCOUNTS, SERVICES,
};
use sheave_control::resource::{Propagation, Selectors, object};
use sheave_control::store::Change;

use crate::controllers::{Cluster, DEADLINE, deployment, service};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_life_of_a_deployment() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start(dir.path()).await;
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
            if event.change == Change::Deleted || object::is_deleting(&pod) {
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
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start(dir.path()).await;
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
    cluster
        .until("the Deployment goes last", |c| {
            let is_gone = c.deployment().is_null();
            let left = c.list(&PODS, "default").len() + c.list(&REPLICA_SETS, "default").len();
            assert!(!is_gone || left == 0, "it is gone before {left} that it owns");
            is_gone
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_has_its_account_and_ends_with_all_in_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start(dir.path()).await;
    cluster.create(&NAMESPACES, "", json!({"metadata": {"name": "team"}})).await;
    cluster
        .until("a service account", |c| c.registry.get(&SERVICE_ACCOUNTS, "team", "default").is_ok())
        .await;
    cluster
        .until("the root certificate", |c| {
            c.registry
                .get(&CONFIG_MAPS, "team", "kube-root-ca.crt")
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
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start(dir.path()).await;
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

/// The control plane stops at any moment, with writes under way of which nobody learns, and starts again.
#[test]
fn a_rollout_survives_restarts() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = |n: u64| json!({"spec": {"template": {"spec": {"containers": [{"name": "echo", "image": format!("echo:{n}")}]}}}});
    for round in 0..20_u64 {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let cluster = runtime.block_on(async {
            let cluster = Cluster::start(dir.path()).await;
            if round == 0 {
                cluster.create(&DEPLOYMENTS, "default", deployment(8)).await;
                cluster.until("8 replicas", |c| c.is_rolled_out(8)).await;
            }
            // 25 %/25 % of 8: 2 more, 2 less.
            let (active, ready) = cluster.pod_counts();
            assert!(active <= 10 && ready >= 6, "round {round}: {active} pods, {ready} ready");
            cluster.patch(&DEPLOYMENTS, "web", image(round / 2)).await;
            // A different number of writes later each time.
            let end = cluster.registry.revision() + round * 7 % 31;
            cluster.until("some writes", |c| c.registry.revision() >= end || c.is_rolled_out(8)).await;
            cluster
        });
        // First the tasks, wherever they are, then the store.
        runtime.shutdown_background();
        drop(cluster);
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let cluster = Cluster::start(dir.path()).await;
        cluster.until("the last image", |c| c.is_rolled_out(8) && c.images() == vec!["echo:9"; 8]).await;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_pods_and_no_pod_twice() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start(dir.path()).await;
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
