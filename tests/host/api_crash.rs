//! SIGKILL for the control plane while 64 writers write: whatever was acknowledged is there,
//! revisions only grow, and a watcher goes on where it was, without a gap and without a 410.
//! `SHEAVE_CRASH_ROUNDS` makes it longer.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ListParams, PostParams, WatchEvent, WatchParams};
use kube::{Api, Client, ResourceExt};
use rand::Rng;
use serde_json::json;

use crate::api_server::{DEADLINE, client};

const WRITERS: usize = 64;
const CLIENTS: usize = 8;

fn rounds() -> usize {
    std::env::var("SHEAVE_CRASH_ROUNDS").ok().map_or(3, |n| n.parse().expect("a number"))
}

/// The control plane as a process of its own; killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

async fn start(dir: &Path, listen: SocketAddr) -> Process {
    let kubeconfig = dir.join("admin.kubeconfig");
    std::fs::remove_file(&kubeconfig).ok();
    let log = std::fs::File::create(dir.join("log")).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_sheave"))
        .args(["control", "--listen", &listen.to_string(), "--state-dir"])
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut process = Process(child);
    let deadline = Instant::now() + DEADLINE;
    loop {
        let log = || std::fs::read_to_string(dir.join("log")).unwrap();
        assert!(process.0.try_wait().unwrap().is_none(), "it ended: {}", log());
        assert!(Instant::now() < deadline, "it does not answer: {}", log());
        if kubeconfig.exists() && client(&kubeconfig).await.apiserver_version().await.is_ok() {
            return process;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn rev(object: &ConfigMap) -> u64 {
    object.resource_version().unwrap().parse().unwrap()
}

/// What everybody has been told so far.
#[derive(Default)]
struct Told {
    acknowledged: BTreeMap<String, u64>,
    watched: Vec<(u64, String)>,
}

impl Told {
    fn last(&self) -> u64 {
        let acknowledged = self.acknowledged.values().max().copied().unwrap_or(0);
        acknowledged.max(self.watched.last().map_or(0, |(rev, _)| *rev))
    }
}

/// Creates objects until the server is gone.
async fn writer(client: Client, name: String, told: Arc<Mutex<Told>>) {
    let api: Api<ConfigMap> = Api::default_namespaced(client);
    for n in 0.. {
        let name = format!("{name}-{n}");
        let map = json!({"metadata": {"name": name}, "data": {"pad": "x".repeat(1500)}});
        match api.create(&PostParams::default(), &serde_json::from_value(map).unwrap()).await {
            Ok(made) => drop(told.lock().unwrap().acknowledged.insert(name, rev(&made))),
            Err(kube::Error::Api(status)) => panic!("{status:?}"),
            Err(_) => return,
        }
    }
}

/// Follows the events after the last one seen, until the server is gone or `until` was seen.
async fn follow(client: Client, told: Arc<Mutex<Told>>, first: u64, until: Option<u64>) {
    let api: Api<ConfigMap> = Api::default_namespaced(client);
    let from = told.lock().unwrap().watched.last().map_or(first, |(rev, _)| *rev);
    if until.is_some_and(|until| from >= until) {
        return;
    }
    let events = match api.watch(&WatchParams::default(), &from.to_string()).await {
        Ok(events) => events,
        Err(kube::Error::Api(status)) => panic!("no watch from {from}: {status:?}"),
        // Killed before it could answer.
        Err(_) => return,
    };
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(WatchEvent::Added(map)) => {
                let mut told = told.lock().unwrap();
                told.watched.push((rev(&map), map.name_any()));
                if until.is_some_and(|until| rev(&map) >= until) {
                    return;
                }
            }
            Ok(WatchEvent::Bookmark(_)) => {}
            Ok(other) => panic!("nothing else happened, but: {other:?}"),
            Err(_) => return,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_loses_nothing_that_was_acknowledged() {
    let dir = tempfile::Builder::new().prefix("sheave-crash-").tempdir().unwrap();
    let kubeconfig = dir.path().join("admin.kubeconfig");
    let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let told = Arc::new(Mutex::new(Told::default()));
    let mut first = 0;
    for round in 0..rounds() {
        let mut process = start(dir.path(), listen).await;
        let before = told.lock().unwrap().last();
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            clients.push(client(&kubeconfig).await);
        }
        if round == 0 {
            let api: Api<ConfigMap> = Api::default_namespaced(clients[0].clone());
            let made = wait_for_controllers_map(&api).await;
            first = made;
        }
        let following = tokio::spawn(follow(clients[0].clone(), Arc::clone(&told), first, None));
        let mut writers = tokio::task::JoinSet::new();
        for n in 0..WRITERS {
            let client = clients[n % CLIENTS].clone();
            writers.spawn(writer(client, format!("r{round}-w{n}"), Arc::clone(&told)));
        }
        let life = Duration::from_millis(rand::rng().random_range(100..1000));
        tokio::time::sleep(life).await;
        process.0.kill().unwrap();
        process.0.wait().unwrap();
        while let Some(done) = writers.join_next().await {
            done.unwrap();
        }
        following.await.unwrap();
        let told = told.lock().unwrap();
        let name = format!("r{round}-");
        let mine = told.acknowledged.iter().filter(|(n, _)| n.starts_with(&name));
        let lowest = mine.map(|(_, rev)| *rev).min();
        assert!(lowest.is_none_or(|lowest| lowest > before), "{lowest:?} after {before}");
    }
    let _process = start(dir.path(), listen).await;
    let client = client(&kubeconfig).await;
    let api: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let list = api.list(&ListParams::default()).await.unwrap();
    let stored: BTreeMap<String, u64> = list.items.iter().map(|o| (o.name_any(), rev(o))).collect();
    let newest = stored.values().max().copied().unwrap();
    follow(client, Arc::clone(&told), first, Some(newest)).await;
    let told = told.lock().unwrap();
    assert!(told.acknowledged.len() > rounds(), "the writers hardly wrote");
    for (name, rev) in &told.acknowledged {
        assert_eq!(stored.get(name), Some(rev), "{name} was acknowledged at {rev}");
    }
    assert!(told.watched.windows(2).all(|w| w[0].0 < w[1].0), "events are in order and never repeated");
    let watched: BTreeMap<&str, u64> = told.watched.iter().map(|(rev, name)| (&**name, *rev)).collect();
    for (name, rev) in stored.iter().filter(|(_, rev)| **rev > first) {
        assert_eq!(watched.get(&**name), Some(rev), "the watcher missed {name}");
    }
    assert!(watched.keys().all(|name| stored.contains_key(*name)), "nothing was seen that is not there");
}

/// The controllers' own map of the namespace comes first, so that all later events are the test's.
async fn wait_for_controllers_map(api: &Api<ConfigMap>) -> u64 {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(map) = api.get_opt("kube-root-ca.crt").await.unwrap() {
            return rev(&map);
        }
        assert!(Instant::now() < deadline, "no kube-root-ca.crt");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
