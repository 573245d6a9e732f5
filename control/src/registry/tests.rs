//! Admission and life cycle over a real store.

use serde_json::json;

use super::*;
use crate::resource::{Propagation, object};
use crate::store::Change;
use crate::store::log::LogStore;
use crate::store::redb::RedbEngine;

struct Fixture {
    registry: Registry,
    _dir: tempfile::TempDir,
}

impl std::ops::Deref for Fixture {
    type Target = Registry;
    fn deref(&self) -> &Registry {
        &self.registry
    }
}

fn open(dir: &std::path::Path) -> Registry {
    let engine = RedbEngine::open(&dir.join("store.redb")).unwrap();
    let store = LogStore::open(engine, index_stored).unwrap();
    let ranges =
        AddressRanges { service_cidrs: vec!["10.96.0.0/28".parse().unwrap()], node_ports: (30_000, 30_001) };
    Registry::new(Arc::new(store), &ranges).unwrap()
}

async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let registry = open(dir.path());
    registry.bootstrap(Some("192.0.2.1:6443".parse().unwrap())).await.unwrap();
    Fixture { registry, _dir: dir }
}

fn config_map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": value}})
}

fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"containers": [{"name": "c", "image": "i"}]}})
}

fn service(name: &str, kind: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"type": kind, "selector": {"a": "b"}, "ports": [{"port": 80}]}})
}

const D: &str = "default";

async fn create(r: &Registry, kind: &'static Kind, object: Value) -> Result<Arc<Object>, ApiError> {
    r.create(kind, D, object, WriteOpts::default()).await
}

#[tokio::test]
async fn bootstrap_twice_changes_nothing() {
    let r = fixture().await;
    let rev = r.revision();
    r.bootstrap(Some("192.0.2.1:6443".parse().unwrap())).await.unwrap();
    assert_eq!(r.revision(), rev);
    let service = r.get(&kinds::SERVICES, D, "kubernetes").unwrap().value();
    assert_eq!(object::str_at(&service, &["spec", "clusterIP"]), "10.96.0.1");
    r.bootstrap(Some("192.0.2.2:6443".parse().unwrap())).await.unwrap();
    let slice = r.get(&kinds::ENDPOINT_SLICES, D, "kubernetes").unwrap().value();
    assert_eq!(slice["endpoints"][0]["addresses"][0], "192.0.2.2");
    let refused = r.delete(&kinds::NAMESPACES, "", "default", DeleteOptions::default()).await.unwrap_err();
    assert_eq!(refused.code, 403);
}

#[tokio::test]
async fn create_wants_a_living_namespace_and_a_new_name() {
    let r = fixture().await;
    let opts = WriteOpts::default;
    let missing = r.create(&kinds::CONFIG_MAPS, "nope", config_map("a", "1"), opts()).await.unwrap_err();
    assert_eq!((missing.code, missing.message.as_str()), (404, "namespaces \"nope\" not found"));
    let made = create(&r, &kinds::CONFIG_MAPS, config_map("a", "1")).await.unwrap();
    assert_eq!(object::resource_version(&made.value()), made.rev.to_string());
    assert!(create(&r, &kinds::CONFIG_MAPS, config_map("a", "1")).await.unwrap_err().is_already_exists());
    let namespace = json!({"metadata": {"name": "n"}});
    r.create(&kinds::NAMESPACES, "", namespace, opts()).await.unwrap();
    let marked = r.delete(&kinds::NAMESPACES, "", "n", DeleteOptions::default()).await.unwrap();
    assert!(matches!(marked, Deleted::Marked(_)));
    let late = r.create(&kinds::CONFIG_MAPS, "n", config_map("a", "1"), opts()).await.unwrap_err();
    assert_eq!(late.code, 403);
    let done = json!({"metadata": {"name": "n"}, "spec": {"finalizers": []}});
    let kind = &kinds::NAMESPACES;
    r.update(kind, "", "n", Subresource::Finalize, done, opts()).await.unwrap();
    assert!(r.get(kind, "", "n").unwrap_err().is_not_found());
}

#[tokio::test]
async fn generated_names_are_new_each_time() {
    let r = fixture().await;
    let object = json!({"metadata": {"generateName": "g-"}});
    let one = create(&r, &kinds::CONFIG_MAPS, object.clone()).await.unwrap();
    let two = create(&r, &kinds::CONFIG_MAPS, object).await.unwrap();
    assert_ne!(one.key, two.key);
    assert!(one.key.name().starts_with("g-") && one.key.name().len() == 7);
}

#[tokio::test]
async fn updates_are_optimistic_and_no_ops_are_free() {
    let r = fixture().await;
    let kind = &kinds::CONFIG_MAPS;
    let made = create(&r, kind, config_map("a", "1")).await.unwrap();
    let same = r.update(kind, D, "a", Subresource::Main, made.value(), WriteOpts::default()).await.unwrap();
    assert_eq!(same.rev, made.rev);
    let mut new = made.value();
    new["data"]["k"] = json!("2");
    let second = r.update(kind, D, "a", Subresource::Main, new.clone(), WriteOpts::default()).await.unwrap();
    assert!(second.rev > made.rev);
    new["data"]["k"] = json!("3");
    let stale =
        r.update(kind, D, "a", Subresource::Main, new.clone(), WriteOpts::default()).await.unwrap_err();
    assert!(stale.is_conflict());
    object::map_mut(&mut new, "metadata").remove("resourceVersion");
    let dry = WriteOpts { dry_run: true, ..WriteOpts::default() };
    let as_if = r.update(kind, D, "a", Subresource::Main, new.clone(), dry).await.unwrap();
    assert_eq!(as_if.value()["data"]["k"], "3");
    assert_eq!(r.get(kind, D, "a").unwrap().value()["data"]["k"], "2");
    r.update(kind, D, "a", Subresource::Main, new, WriteOpts::default()).await.unwrap();
    assert_eq!(r.get(kind, D, "a").unwrap().value()["data"]["k"], "3");
}

#[tokio::test]
async fn concurrent_mutations_all_count() {
    let r = fixture().await;
    create(&r, &kinds::CONFIG_MAPS, config_map("a", "0")).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let r = r.registry.clone();
        tasks.spawn(async move {
            r.mutate(&kinds::CONFIG_MAPS, D, "a", Subresource::Main, |o| {
                let n: u32 = object::str_at(o, &["data", "k"]).parse().unwrap();
                o["data"]["k"] = json!((n + 1).to_string());
                Ok(())
            })
            .await
            .unwrap();
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(r.get(&kinds::CONFIG_MAPS, D, "a").unwrap().value()["data"]["k"], "20");
}

#[tokio::test]
async fn a_bound_pod_goes_in_two_steps_and_a_finalizer_holds() {
    let r = fixture().await;
    let kind = &kinds::PODS;
    create(&r, kind, pod("p")).await.unwrap();
    let binding = json!({"target": {"kind": "Node", "name": "n1"}});
    let bound =
        r.update(kind, D, "p", Subresource::Binding, binding.clone(), WriteOpts::default()).await.unwrap();
    assert_eq!(bound.index.node_name(kind), "n1");
    let again =
        r.update(kind, D, "p", Subresource::Binding, binding, WriteOpts::default()).await.unwrap_err();
    assert!(again.is_conflict());
    let Deleted::Marked(marked) = r.delete(kind, D, "p", DeleteOptions::default()).await.unwrap() else {
        panic!("removed at once")
    };
    assert!(marked.index.deletion.is_some());
    let now = DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
    assert!(matches!(r.delete(kind, D, "p", now).await.unwrap(), Deleted::Removed(_)));

    let mut held = config_map("h", "1");
    held["metadata"]["finalizers"] = json!(["example.com/x"]);
    create(&r, &kinds::CONFIG_MAPS, held).await.unwrap();
    let foreground = DeleteOptions { propagation: Some(Propagation::Foreground), ..DeleteOptions::default() };
    r.delete(&kinds::CONFIG_MAPS, D, "h", foreground).await.unwrap();
    let stored = r.get(&kinds::CONFIG_MAPS, D, "h").unwrap().value();
    assert_eq!(stored["metadata"]["finalizers"], json!(["example.com/x", "foregroundDeletion"]));
    r.mutate(&kinds::CONFIG_MAPS, D, "h", Subresource::Main, |o| {
        o["metadata"]["finalizers"] = json!([]);
        Ok(())
    })
    .await
    .unwrap();
    assert!(r.get(&kinds::CONFIG_MAPS, D, "h").is_err());
}

#[tokio::test]
async fn service_addresses_are_unique_given_back_and_found_again() {
    let r = fixture().await;
    let kind = &kinds::SERVICES;
    let mut seen = std::collections::BTreeSet::from(["10.96.0.1".to_owned()]);
    let mut names = Vec::new();
    // A /28 has 14 usable addresses: one is the API server's, one is kept for DNS.
    for n in 0..12 {
        let made = create(&r, kind, service(&format!("s{n}"), "ClusterIP")).await.unwrap().value();
        assert!(seen.insert(object::str_at(&made, &["spec", "clusterIP"]).to_owned()));
        names.push(format!("s{n}"));
    }
    assert!(create(&r, kind, service("full", "ClusterIP")).await.is_err());
    let dry = WriteOpts { dry_run: true, ..WriteOpts::default() };
    r.delete(kind, D, "s3", DeleteOptions::default()).await.unwrap();
    r.create(kind, D, service("dry", "ClusterIP"), dry).await.unwrap();
    let taken = create(&r, kind, service("s0", "ClusterIP")).await.unwrap_err();
    assert!(taken.is_already_exists());
    create(&r, kind, service("again", "NodePort")).await.unwrap();
    r.delete(kind, D, "again", DeleteOptions::default()).await.unwrap();
    let Fixture { registry, _dir } = r;
    drop(registry);
    let r = open(_dir.path());
    let made = create(&r, kind, service("after", "ClusterIP")).await.unwrap().value();
    assert!(!object::str_at(&made, &["spec", "clusterIP"]).is_empty());
    assert!(create(&r, kind, service("full", "ClusterIP")).await.is_err(), "the used ones are known");
}

#[tokio::test]
async fn watchers_see_transitions_of_selected_objects() {
    let r = fixture().await;
    let kind = &kinds::CONFIG_MAPS;
    let mut watch = r.watch(kind, Some(D), Start::Now).unwrap();
    let selectors = Selectors::parse(kind, Some("l=yes"), None).unwrap();
    let label = |value: &str| json!({"metadata": {"labels": {"l": value}}}).to_string();
    create(&r, kind, config_map("a", "1")).await.unwrap();
    for value in ["yes", "no", "yes"] {
        let body = label(value);
        let opts = WriteOpts::default();
        r.patch(kind, D, "a", Subresource::Main, PatchType::Merge, body.as_bytes(), opts).await.unwrap();
    }
    r.delete(kind, D, "a", DeleteOptions::default()).await.unwrap();
    let mut changes = Vec::new();
    while changes.len() < 4 {
        changes.extend(watch.next().await.unwrap().iter().filter_map(|e| select(e, &selectors)));
    }
    assert_eq!(changes, [Change::Added, Change::Deleted, Change::Added, Change::Deleted]);
    let future = r.watch(kind, None, Start::Rev(r.revision() + 1)).err().unwrap();
    assert_eq!(future.code, 504);
}

#[tokio::test]
async fn a_dry_run_creates_nothing() {
    let r = fixture().await;
    let dry = || WriteOpts { dry_run: true, ..WriteOpts::default() };
    let rev = r.revision();
    let as_if = r.create(&kinds::PODS, D, pod("p"), dry()).await.unwrap();
    assert_eq!(object::resource_version(&as_if.value()), "");
    assert!(!object::uid(&as_if.value()).is_empty());
    assert_eq!(r.revision(), rev);
    create(&r, &kinds::PODS, pod("p")).await.unwrap();
    assert!(r.create(&kinds::PODS, D, pod("p"), dry()).await.unwrap_err().is_already_exists());
    let options = DeleteOptions { dry_run: true, ..DeleteOptions::default() };
    r.delete(&kinds::PODS, D, "p", options).await.unwrap();
    assert!(r.get(&kinds::PODS, D, "p").is_ok());
}

#[tokio::test]
async fn old_events_go() {
    let r = fixture().await;
    let event = json!({"metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "p", "namespace": D},
        "reason": "Tested", "message": "m", "type": "Normal"});
    let made = create(&r, &kinds::EVENTS, event).await.unwrap();
    assert_eq!(r.expire_events(made.written_secs + 59, 60).await.unwrap(), 0);
    assert_eq!(r.expire_events(made.written_secs + 60, 60).await.unwrap(), 1);
    assert!(r.get(&kinds::EVENTS, D, "e").is_err());
}
