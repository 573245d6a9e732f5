//! `bench pod-start`: from nothing to a Ready node, from a pod's creation to its readiness alone and fifty at once, and
//! the start of one container beside runc's of the same root file system.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Node as NodeObject, Pod};
use kube::Client;
use kube::api::{Api, DeleteParams, PostParams, WatchEvent, WatchParams};
use serde_json::json;
use sheave_harness::Node;

use crate::cluster;
use crate::latency::Latencies;
use crate::progress::spinner;
use crate::report::{Bar, Report};

const NODE_ROUNDS: usize = 5;
const POD_ROUNDS: usize = 30;
const AT_ONCE: usize = 50;
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn run(json: bool) -> Result<()> {
    let mut report = Report::new("pod-start", json);
    node_ready(&mut report)?;
    let bar = spinner("pods, one after the other");
    let node = cluster::start_node()?;
    let alone = cluster::inside(&node, async |client| one_by_one(&client).await)?;
    let params = [("pods", json!(POD_ROUNDS))];
    report.add("create_to_ready_p50", alone.ms(0.5), "ms", Bar::AtMost(150.0), &params);
    report.add("create_to_ready_p99", alone.ms(0.99), "ms", Bar::None, &params);
    bar.set_message(format!("{AT_ONCE} pods at once"));
    let took = cluster::inside(&node, async |client| at_once(&client).await)?;
    report.add("all_ready", took.as_secs_f64(), "s", Bar::AtMost(5.0), &[("pods", json!(AT_ONCE))]);
    bar.finish_and_clear();
    drop(node);
    crate::container_start::run(&mut report)?;
    report.finish();
    Ok(())
}

/// From the start of the program on an empty store until a client sees the Node Ready.
fn node_ready(report: &mut Report) -> Result<()> {
    let mut latencies = Latencies::new();
    for round in 0..NODE_ROUNDS {
        let bar = spinner(format!("an empty node, {} of {NODE_ROUNDS}", round + 1));
        let mut node = Node::prepare(&std::env::current_dir()?, crate::sheave()?, &[]);
        let start = Instant::now();
        node.restart();
        latencies.record(until_ready(&node, start)?);
        bar.finish_and_clear();
    }
    let params = [("rounds", json!(NODE_ROUNDS))];
    report.add("up_to_node_ready_p50", latencies.ms(0.5) / 1000.0, "s", Bar::AtMost(1.0), &params);
    report.add("up_to_node_ready_max", latencies.ms(1.0) / 1000.0, "s", Bar::None, &params);
    Ok(())
}

fn until_ready(node: &Node, start: Instant) -> Result<Duration> {
    loop {
        if node.kubeconfig().exists() {
            let ready = cluster::inside(node, async |client| {
                let object = Api::<NodeObject>::all(client).get("node-1").await?;
                let conditions = object.status.and_then(|status| status.conditions).unwrap_or_default();
                Ok(conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
            });
            if matches!(ready, Ok(true)) {
                return Ok(start.elapsed());
            }
        }
        if start.elapsed() > PATIENCE {
            bail!("the node was not Ready within {PATIENCE:?}:\n{}", node.log_tail());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

async fn one_by_one(client: &Client) -> Result<Latencies> {
    let mut latencies = Latencies::new();
    for round in 0..POD_ROUNDS + 2 {
        let took = start_pods(client, &[format!("alone-{round}")]).await?;
        // The first two warm the page cache up.
        if round >= 2 {
            latencies.record(took);
        }
    }
    Ok(latencies)
}

async fn at_once(client: &Client) -> Result<Duration> {
    let names: Vec<String> = (0..AT_ONCE).map(|number| format!("crowd-{number}")).collect();
    start_pods(client, &names).await
}

/// Creates the pods all together, waits until a watch has shown each Ready, then deletes them and waits for their end.
async fn start_pods(client: &Client, names: &[String]) -> Result<Duration> {
    let api: Api<Pod> = Api::namespaced(client.clone(), "default");
    let version = api.list(&kube::api::ListParams::default()).await?.metadata.resource_version;
    let mut events = api.watch(&WatchParams::default(), version.as_deref().unwrap_or("0")).await?.boxed();
    let mut waiting: BTreeMap<String, ()> = names.iter().map(|name| (name.clone(), ())).collect();
    let start = Instant::now();
    let creates = names.iter().map(|name| {
        let api = api.clone();
        async move {
            let pod: Pod =
                serde_json::from_value(json!({"metadata": {"name": name}, "spec": cluster::echo_spec()}))?;
            api.create(&PostParams::default(), &pod).await.with_context(|| format!("creating {name}"))
        }
    });
    futures::future::try_join_all(creates).await?;
    let deadline = tokio::time::sleep(PATIENCE);
    tokio::pin!(deadline);
    while !waiting.is_empty() {
        let event = tokio::select! {
            event = events.try_next() => event?,
            () = &mut deadline => bail!("not Ready within {PATIENCE:?}: {waiting:?}"),
        };
        match event {
            Some(WatchEvent::Added(pod) | WatchEvent::Modified(pod)) if cluster::is_ready(&pod) => {
                waiting.remove(&pod.metadata.name.unwrap_or_default());
            }
            Some(_) => {}
            None => bail!("the watch ended"),
        }
    }
    let took = start.elapsed();
    for name in names {
        api.delete(name, &DeleteParams::default().grace_period(0)).await?;
    }
    while !api.list(&kube::api::ListParams::default()).await?.items.is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(took)
}
