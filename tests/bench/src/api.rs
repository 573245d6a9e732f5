//! `bench api`: durable creates through the API beside Debian's etcd-server on the same disk with the same number of
//! writers and the same object size, and the delay from a write to the watchers.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, PostParams, WatchEvent, WatchParams};
use serde_json::json;
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::control_process::ControlPlane;
use crate::etcd::Etcd;
use crate::latency::Latencies;
use crate::progress::spinner;
use crate::report::{Bar, Report};

const WRITERS: usize = 64;
const ROUNDS: usize = 3;
const ROUND_S: u64 = 4;
const WATCHERS: usize = 100;
const WATCHED_WRITES: usize = 300;

pub(crate) async fn run(json: bool) -> Result<()> {
    let mut report = Report::new("api", json);
    // Under the working directory, not /tmp: a memory file system would make every fsync free.
    let dir = tempfile::Builder::new().prefix("bench-api-").tempdir_in(std::env::current_dir()?)?;
    let (control_dir, etcd_dir) = (dir.path().join("control"), dir.path().join("etcd"));
    std::fs::create_dir(&control_dir)?;
    let mut rates = Vec::new();
    {
        let control = ControlPlane::start(&control_dir, "127.0.0.1:0").await?;
        let etcd = Etcd::start(&etcd_dir).await?;
        for round in 0..ROUNDS {
            let bar = spinner(format!("creates, round {} of {ROUNDS}: sheave, then etcd", round + 1));
            let ours = sheave_creates(&control, round).await.context("creates through the API")?;
            let theirs = etcd_puts(&etcd, round).await.context("puts to etcd")?;
            bar.finish_and_clear();
            rates.push((ours, theirs));
        }
    }
    let params =
        [("writers", json!(WRITERS)), ("object_bytes", json!(object_bytes())), ("rounds", json!(ROUNDS))];
    let ours = median(rates.iter().map(|rate| rate.0.per_s));
    report.add("creates", ours, "1/s", Bar::AtLeast(3000.0), &params);
    report.add("etcd_puts", median(rates.iter().map(|rate| rate.1.per_s)), "1/s", Bar::None, &params);
    let ratio = median(rates.iter().map(|rate| rate.0.per_s / rate.1.per_s));
    report.add("creates_to_etcd_puts", ratio, "x", Bar::AtLeast(0.6), &params);
    report.add("create_p50", rates[0].0.latencies.ms(0.5), "ms", Bar::None, &params);
    report.add("create_p99", rates[0].0.latencies.ms(0.99), "ms", Bar::None, &params);
    watch_delay(dir.path(), &mut report).await.context("watch delay")?;
    report.finish();
    Ok(())
}

struct Rate {
    per_s: f64,
    latencies: Latencies,
}

fn payload() -> String {
    "x".repeat(1800)
}

fn config_map(name: &str, payload: &str) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name}, "data": {"payload": payload}}))
        .expect("a ConfigMap's JSON")
}

fn object_bytes() -> usize {
    serde_json::to_vec(&config_map("w-00-00000", &payload())).map_or(0, |bytes| bytes.len())
}

async fn sheave_creates(control: &ControlPlane, round: usize) -> Result<Rate> {
    let counter = Arc::new(AtomicU64::new(0));
    let barrier = Arc::new(Barrier::new(WRITERS));
    let mut tasks = JoinSet::new();
    for writer in 0..WRITERS {
        let api: Api<ConfigMap> = Api::namespaced(control.client().await?, "default");
        let (counter, barrier) = (counter.clone(), barrier.clone());
        tasks.spawn(async move {
            let payload = payload();
            let mut latencies = Latencies::new();
            barrier.wait().await;
            let end = Instant::now() + Duration::from_secs(ROUND_S);
            for number in 0.. {
                if Instant::now() >= end {
                    break;
                }
                let object = config_map(&format!("r{round}-w{writer}-{number}"), &payload);
                let start = Instant::now();
                api.create(&PostParams::default(), &object).await?;
                latencies.record(start.elapsed());
                counter.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(latencies)
        });
    }
    let latencies = collect(tasks).await?;
    Ok(Rate { per_s: counter.load(Ordering::Relaxed) as f64 / ROUND_S as f64, latencies })
}

async fn etcd_puts(etcd: &Etcd, round: usize) -> Result<Rate> {
    let barrier = Arc::new(Barrier::new(WRITERS));
    let mut tasks = JoinSet::new();
    for writer in 0..WRITERS {
        let mut client = etcd.client().await?;
        let barrier = barrier.clone();
        tasks.spawn(async move {
            let payload = payload();
            let mut latencies = Latencies::new();
            barrier.wait().await;
            let end = Instant::now() + Duration::from_secs(ROUND_S);
            for number in 0.. {
                if Instant::now() >= end {
                    break;
                }
                let name = format!("r{round}-w{writer}-{number}");
                let value = serde_json::to_vec(&config_map(&name, &payload))?;
                let start = Instant::now();
                client.put(format!("/registry/configmaps/default/{name}").as_bytes(), &value).await?;
                latencies.record(start.elapsed());
            }
            anyhow::Ok(latencies)
        });
    }
    let latencies = collect(tasks).await?;
    Ok(Rate { per_s: latencies.len() as f64 / ROUND_S as f64, latencies })
}

async fn collect(mut tasks: JoinSet<Result<Latencies>>) -> Result<Latencies> {
    let mut all = Latencies::new();
    while let Some(done) = tasks.join_next().await {
        all.add(&done??);
    }
    Ok(all)
}

/// From just before the request is sent until each watcher holds the decoded event: the fsync is inside.
async fn watch_delay(dir: &Path, report: &mut Report) -> Result<()> {
    let bar = spinner(format!("{WATCHERS} watchers, {WATCHED_WRITES} writes"));
    let state_dir = dir.join("watch");
    std::fs::create_dir(&state_dir)?;
    let control = ControlPlane::start(&state_dir, "127.0.0.1:0").await?;
    let epoch = Instant::now();
    let sent: Arc<Vec<AtomicU64>> = Arc::new((0..WATCHED_WRITES).map(|_| AtomicU64::new(0)).collect());
    let barrier = Arc::new(Barrier::new(WATCHERS + 1));
    let mut tasks = JoinSet::new();
    for _ in 0..WATCHERS {
        let api: Api<ConfigMap> = Api::namespaced(control.client().await?, "default");
        let (sent, barrier) = (sent.clone(), barrier.clone());
        tasks.spawn(async move {
            let version = api.list(&kube::api::ListParams::default()).await?.metadata.resource_version;
            let mut stream =
                api.watch(&WatchParams::default(), version.as_deref().unwrap_or("0")).await?.boxed();
            barrier.wait().await;
            let mut latencies = Latencies::new();
            while let Some(event) = stream.try_next().await? {
                let WatchEvent::Added(object) = event else { continue };
                let name = object.metadata.name.unwrap_or_default();
                let Some(number) = name.strip_prefix("watched-").and_then(|n| n.parse::<usize>().ok()) else {
                    continue;
                };
                let start = Duration::from_nanos(sent[number].load(Ordering::Acquire));
                latencies.record(epoch.elapsed().saturating_sub(start));
                if number + 1 == WATCHED_WRITES {
                    break;
                }
            }
            anyhow::Ok(latencies)
        });
    }
    barrier.wait().await;
    let api: Api<ConfigMap> = Api::namespaced(control.client().await?, "default");
    let payload = payload();
    for (number, sent) in sent.iter().enumerate() {
        let object = config_map(&format!("watched-{number}"), &payload);
        sent.store(epoch.elapsed().as_nanos() as u64, Ordering::Release);
        api.create(&PostParams::default(), &object).await?;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let latencies = collect(tasks).await?;
    bar.finish_and_clear();
    let params = [("watchers", json!(WATCHERS)), ("writes", json!(WATCHED_WRITES))];
    report.add("watch_event_p50", latencies.ms(0.5), "ms", Bar::None, &params);
    report.add("watch_event_p99", latencies.ms(0.99), "ms", Bar::AtMost(20.0), &params);
    Ok(())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
