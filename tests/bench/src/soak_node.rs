//! `soak kill-node`: SIGKILL for `sheave up` at random moments under load while pods come and go. What is checked: no
//! request through the service to the pods that keep running fails, their processes stay the same, nothing is restarted
//! that did not die, and at the end the node is what the API says.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use rand::Rng;
use serde_json::Value;
use sheave_harness::Node;

use crate::cluster::{self, PORT};
use crate::progress::spinner;

const STEADY: usize = 3;
const CHURN_MAX: usize = 6;
const PATIENCE: Duration = Duration::from_secs(90);

pub(crate) fn run(rounds: usize) -> Result<()> {
    let mut node = cluster::start_node()?;
    let (service, steady) = cluster::inside(&node, async |client| {
        cluster::deploy(&client, "steady", STEADY).await?;
        cluster::deploy(&client, "churn", 1).await?;
        let steady = cluster::settled(&client, "steady", STEADY, PATIENCE).await?;
        cluster::settled(&client, "churn", 1, PATIENCE).await?;
        Ok((cluster::cluster_ip(&client, "steady").await?, identities(&steady)?))
    })?;
    let pids = pids_of(&node, &steady)?;
    let mut load = node
        .command(std::env::current_exe()?)
        .args(["load-client", "--target", &format!("{service}:80")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut churned = 0;
    for round in 0..rounds {
        let bar = spinner(format!("kill -9 of sheave up, {} of {rounds}", round + 1));
        churned += kill_round(&mut node).with_context(|| format!("round {}", round + 1))?;
        ensure!(
            pids_of(&node, &steady)? == pids,
            "processes of the steady pods changed in round {}",
            round + 1
        );
        bar.finish_and_clear();
    }
    let after = converge(&node)?;
    ensure!(after == steady, "the steady pods changed: {steady:?} became {after:?}");
    ensure!(pids_of(&node, &steady)? == pids, "processes of the steady pods changed");
    drop(load.stdin.take());
    let output = load.wait_with_output()?;
    let told: Value = serde_json::from_slice(&output.stdout).context("the load client's verdict")?;
    println!(
        "kill-node: {rounds} kills, {churned} changes of scale, load through the service (port {PORT}): {told}"
    );
    ensure!(told["failed"] == 0, "requests failed: {told}");
    ensure!(told["ok"].as_u64().unwrap_or(0) > 0, "the load client sent nothing");
    Ok(())
}

/// Changes the scale, kills at a random moment of what follows, waits a little and starts again.
fn kill_round(node: &mut Node) -> Result<usize> {
    let (replicas, before_ms, down_ms) = {
        let mut random = rand::rng();
        (random.random_range(0..=CHURN_MAX), random.random_range(0..1500), random.random_range(0..1500))
    };
    cluster::inside(node, async |client| cluster::scale(&client, "churn", replicas).await)?;
    std::thread::sleep(Duration::from_millis(before_ms));
    node.kill9();
    std::thread::sleep(Duration::from_millis(down_ms));
    node.restart();
    node.wait_ready();
    Ok(1)
}

/// After everything: the API's wish is the node's state, and nothing else runs.
fn converge(node: &Node) -> Result<BTreeMap<String, (String, i32)>> {
    let steady = cluster::inside(node, async |client| {
        cluster::scale(&client, "churn", 2).await?;
        cluster::settled(&client, "churn", 2, PATIENCE).await?;
        identities(&cluster::settled(&client, "steady", STEADY, PATIENCE).await?)
    })?;
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let running = pod_cgroups(node)?;
        if running.len() == STEADY + 2 {
            return Ok(steady);
        }
        ensure!(std::time::Instant::now() < deadline, "{} pods run on the node: {running:?}", running.len());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Per pod uid its container's id and restart count: nothing of it may change while the pod runs.
fn identities(pods: &[Pod]) -> Result<BTreeMap<String, (String, i32)>> {
    pods.iter()
        .map(|pod| {
            let uid = pod.metadata.uid.clone().context("a pod without uid")?;
            let statuses =
                pod.status.as_ref().and_then(|s| s.container_statuses.as_deref()).unwrap_or_default();
            let status = statuses.first().context("a pod without container status")?;
            Ok((uid, (status.container_id.clone().unwrap_or_default(), status.restart_count)))
        })
        .collect()
}

/// The cgroups of pods that hold processes, by uid.
fn pod_cgroups(node: &Node) -> Result<BTreeMap<String, Vec<u32>>> {
    let mut found: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for pid in node.cgroup.pids() {
        let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let Some(line) = cgroups.lines().find(|line| line.starts_with("0::")) else { continue };
        let Some(at) = line.find("/pod") else { continue };
        let uid = line[at + 4..].split('/').next().unwrap_or_default().to_owned();
        found.entry(uid).or_default().push(pid);
    }
    for pids in found.values_mut() {
        pids.sort_unstable();
    }
    Ok(found)
}

fn pids_of(node: &Node, steady: &BTreeMap<String, (String, i32)>) -> Result<BTreeMap<String, Vec<u32>>> {
    let all = pod_cgroups(node)?;
    steady
        .keys()
        .map(|uid| {
            let pids = all.get(uid).with_context(|| format!("pod {uid} has no processes"))?;
            Ok((uid.clone(), pids.clone()))
        })
        .collect()
}
