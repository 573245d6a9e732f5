//! kube-rs' reflector, an ordinary client, stays right through ten thousand random writes and a
//! restart of the control plane in the middle of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client, ResourceExt};
use rand::Rng;
use serde_json::json;

use crate::api_server::{ControlPlane, DEADLINE};

const WRITERS: usize = 16;
const NAMES: usize = 200;

fn writes() -> usize {
    std::env::var("SHEAVE_REFLECTOR_WRITES").ok().map_or(10_000, |n| n.parse().expect("a number"))
}

type State = BTreeMap<String, (String, BTreeMap<String, String>)>;

fn brief(object: &ConfigMap) -> (String, (String, BTreeMap<String, String>)) {
    let version = object.resource_version().expect("a stored object has a version");
    (object.name_any(), (version, object.data.clone().unwrap_or_default()))
}

/// One random write; whether it was carried out. A server that is away is asked again.
async fn write(api: &Api<ConfigMap>, n: usize) {
    let (name, what) = {
        let mut rng = rand::rng();
        (format!("m{}", rng.random_range(0..NAMES)), rng.random_range(0..10))
    };
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name},
        "data": {"n": n.to_string(), "pad": "x".repeat(n % 700)}});
    loop {
        let result = match what {
            0..4 => {
                let map = serde_json::from_value(map.clone()).unwrap();
                api.create(&PostParams::default(), &map).await.map(drop)
            }
            4..8 => {
                let patch = json!({"data": {"n": n.to_string()}});
                api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop)
            }
            _ => api.delete(&name, &DeleteParams::default()).await.map(drop),
        };
        match result {
            Ok(()) => return,
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => return,
            // Stopped or not up yet.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn run_writers(client: &Client, from: usize, to: usize) {
    let next = Arc::new(AtomicUsize::new(from));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..WRITERS {
        let api: Api<ConfigMap> = Api::default_namespaced(client.clone());
        let next = Arc::clone(&next);
        tasks.spawn(async move {
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= to {
                    return;
                }
                write(&api, n).await;
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reflector_stays_right() {
    let mut control = ControlPlane::start().await;
    let client = control.client().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let (reader, writer) = reflector::store();
    let events = reflector(writer, watcher(api.clone(), watcher::Config::default())).default_backoff();
    let follow = tokio::spawn(async move {
        let mut events = std::pin::pin!(events);
        // Errors are what a restart looks like; the reflector goes on by itself.
        while events.next().await.is_some() {}
    });
    let total = writes();
    for round in 0..4 {
        let (from, to) = (round * total / 4, (round + 1) * total / 4);
        if round == 1 {
            let writing = run_writers(&client, from, to);
            let restarting = async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                let (dir, address) = control.stop().await;
                ControlPlane::start_in(dir, address).await
            };
            ((), control) = tokio::join!(writing, restarting);
        } else {
            run_writers(&client, from, to).await;
        }
        let truth = api.list(&ListParams::default()).await.unwrap();
        let expected: State = truth.items.iter().map(brief).collect();
        let seen = || -> State { reader.state().iter().map(|o| brief(o)).collect() };
        let caught_up = async {
            while seen() != expected {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(DEADLINE, caught_up).await.is_err() {
            let seen = seen();
            let differs: Vec<_> = expected.iter().filter(|(k, v)| seen.get(*k) != Some(v)).take(3).collect();
            let extra: Vec<_> = seen.keys().filter(|k| !expected.contains_key(*k)).take(3).collect();
            panic!("round {round}: missing or stale {differs:?}, not gone {extra:?}");
        }
    }
    follow.abort();
    control.stop().await;
}
