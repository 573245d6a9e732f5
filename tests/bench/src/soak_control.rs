//! `soak kill-control`: SIGKILL for the control plane at random moments under 64 concurrent writers. What is checked
//! after each restart: every acknowledged write is there as it was acknowledged, resourceVersion never went back, and a
//! watcher that resumes from the last version it saw misses nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use rand::Rng;
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::control_process::ControlPlane;
use crate::progress::spinner;

const WRITERS: usize = 64;

/// What the writers know: per object the newest acknowledged version and value.
type Acked = Arc<Mutex<BTreeMap<String, (u64, String)>>>;

pub(crate) async fn run(rounds: usize) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("soak-control-").tempdir_in(std::env::current_dir()?)?;
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
    let listen = format!("127.0.0.1:{port}");
    let acked = Acked::default();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let mut highest = 0;
    let mut kills = 0;
    for round in 0..=rounds {
        let bar = spinner(format!("kill -9 of the control plane, {round} of {rounds}"));
        let mut control = ControlPlane::start(dir.path(), &listen).await?;
        let client = control.client().await?;
        highest = check(&client, &acked, highest).await.with_context(|| format!("after {round} kills"))?;
        let stop = CancellationToken::new();
        let watcher = tokio::spawn(watch(client.clone(), seen.clone(), highest, stop.clone()));
        if round == rounds {
            settle(&seen, &acked).await;
            stop.cancel();
            watcher.await??;
            bar.finish_and_clear();
            break;
        }
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            writers.spawn(write(control.client().await?, acked.clone(), round, writer));
        }
        let pause_ms = rand::rng().random_range(50..1000);
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        control.kill9()?;
        kills += 1;
        while let Some(done) = writers.join_next().await {
            done?;
        }
        stop.cancel();
        watcher.await??;
        bar.finish_and_clear();
    }
    let acked = acked.lock().expect("no panics while held");
    seen.lock().expect("no panics while held").compare(&acked)?;
    println!(
        "kill-control: {kills} kills, {WRITERS} writers, {} objects acknowledged, {} events seen, nothing lost",
        acked.len(),
        seen.lock().expect("no panics while held").events
    );
    Ok(())
}

/// Creates and updates until the server is gone; records what was acknowledged.
async fn write(client: Client, acked: Acked, round: usize, writer: usize) {
    let api: Api<ConfigMap> = Api::namespaced(client, "default");
    for number in 0.. {
        let name = format!("k{round}-{writer}-{}", number / 2);
        let value = number.to_string();
        let body = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"n": value}});
        let object = if number % 2 == 0 {
            let object = serde_json::from_value(body).expect("a ConfigMap's JSON");
            api.create(&PostParams::default(), &object).await
        } else {
            api.patch(&name, &PatchParams::default(), &Patch::Merge(body)).await
        };
        let Ok(object) = object else { return };
        let version = version_of(object.metadata.resource_version.as_deref());
        acked.lock().expect("no panics while held").insert(name, (version, value));
    }
}

/// Everything acknowledged is there, at its version or a newer one that nobody was told of; returns the list's version.
async fn check(client: &Client, acked: &Acked, highest: u64) -> Result<u64> {
    let list = Api::<ConfigMap>::namespaced(client.clone(), "default").list(&ListParams::default()).await?;
    let now = version_of(list.metadata.resource_version.as_deref());
    ensure!(now >= highest, "resourceVersion went back from {highest} to {now}");
    let objects: BTreeMap<_, _> = list
        .items
        .into_iter()
        .map(|object| (object.metadata.name.clone().unwrap_or_default(), object))
        .collect();
    for (name, (version, value)) in acked.lock().expect("no panics while held").iter() {
        let Some(object) = objects.get(name) else { bail!("{name}, acknowledged at {version}, is lost") };
        let found = version_of(object.metadata.resource_version.as_deref());
        let data = object.data.as_ref().and_then(|data| data.get("n")).cloned().unwrap_or_default();
        ensure!(
            found > *version || (found == *version && data == *value),
            "{name}: acknowledged {value} at {version}, found {data} at {found}"
        );
        ensure!(now >= *version, "resourceVersion {now} is behind the acknowledged {version}");
    }
    Ok(now)
}

/// What the watcher has seen over all its lives.
#[derive(Debug, Default)]
struct Seen {
    version: u64,
    events: usize,
    objects: BTreeMap<String, u64>,
}

impl Seen {
    fn compare(&self, acked: &BTreeMap<String, (u64, String)>) -> Result<()> {
        for (name, (version, _)) in acked {
            let seen = self.objects.get(name).copied().unwrap_or(0);
            ensure!(seen >= *version, "the watcher saw {name} at {seen}, acknowledged was {version}");
        }
        Ok(())
    }
}

/// Watches from the last version seen until the server is gone or `stop`; versions must only grow.
async fn watch(client: Client, seen: Arc<Mutex<Seen>>, start: u64, stop: CancellationToken) -> Result<()> {
    let from = {
        let mut seen = seen.lock().expect("no panics while held");
        if seen.version == 0 {
            seen.version = start;
        }
        seen.version
    };
    let api: Api<ConfigMap> = Api::namespaced(client, "default");
    let Ok(stream) = api.watch(&WatchParams::default(), &from.to_string()).await else { return Ok(()) };
    let mut stream = stream.boxed();
    loop {
        let event =
            tokio::select! { event = stream.try_next() => event, () = stop.cancelled() => return Ok(()) };
        let object = match event {
            Ok(Some(WatchEvent::Added(object) | WatchEvent::Modified(object))) => object,
            Ok(Some(WatchEvent::Bookmark(_))) => continue,
            Ok(Some(WatchEvent::Deleted(object))) => {
                bail!("nobody deleted {}", object.metadata.name.unwrap_or_default())
            }
            Ok(Some(WatchEvent::Error(status))) => {
                bail!("the watch from {from} was refused: {}", status.message)
            }
            Ok(None) | Err(_) => return Ok(()),
        };
        let version = version_of(object.metadata.resource_version.as_deref());
        let mut seen = seen.lock().expect("no panics while held");
        ensure!(version > seen.version, "the watcher saw {version} after {}", seen.version);
        seen.version = version;
        seen.events += 1;
        seen.objects.insert(object.metadata.name.unwrap_or_default(), version);
    }
}

/// Waits until the last watcher has seen what was acknowledged.
async fn settle(seen: &Mutex<Seen>, acked: &Acked) {
    for _ in 0..200 {
        let done = {
            let acked = acked.lock().expect("no panics while held");
            seen.lock().expect("no panics while held").compare(&acked).is_ok()
        };
        if done {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn version_of(text: Option<&str>) -> u64 {
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}
