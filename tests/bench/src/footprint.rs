//! `bench footprint`: resident memory of `sheave up`, idle and with 50 pods, and the proportional share of each shim.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sheave_harness::Node;

use crate::cluster;
use crate::progress::spinner;
use crate::report::{Bar, Report};

const PODS: usize = 50;

pub(crate) fn run(json: bool) -> Result<()> {
    let mut report = Report::new("footprint", json);
    let bar = spinner("an idle node");
    let node = cluster::start_node()?;
    settle();
    report.add("rss_idle", rss_mb(node.pid())?, "MB", Bar::AtMost(60.0), &[]);
    bar.set_message(format!("{PODS} pods"));
    cluster::inside(&node, async |client| {
        cluster::deploy(&client, "many", PODS).await?;
        cluster::settled(&client, "many", PODS, Duration::from_secs(120)).await?;
        Ok(())
    })?;
    settle();
    let params = [("pods", json!(PODS))];
    report.add("rss", rss_mb(node.pid())?, "MB", Bar::AtMost(90.0), &params);
    let (shims, holders) = pod_processes_mb(&node)?;
    ensure!(shims.len() == PODS, "{} shims for {PODS} pods", shims.len());
    let mean = |sizes: &[f64]| sizes.iter().sum::<f64>() / sizes.len() as f64;
    let most = shims.iter().copied().fold(0.0, f64::max);
    report.add("shim_pss_mean", mean(&shims), "MB", Bar::AtMost(2.0), &params);
    report.add("shim_pss_max", most, "MB", Bar::AtMost(2.0), &params);
    report.add("sandbox_holder_pss_mean", mean(&holders), "MB", Bar::None, &params);
    bar.finish_and_clear();
    report.finish();
    Ok(())
}

/// Idle means: nothing has been asked of it for a while.
fn settle() {
    std::thread::sleep(Duration::from_secs(10));
}

fn rss_mb(pid: u32) -> Result<f64> {
    kb_of(&format!("/proc/{pid}/status"), "VmRSS:")
}

fn kb_of(path: &str, key: &str) -> Result<f64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    let line =
        text.lines().find(|line| line.starts_with(key)).with_context(|| format!("{path} has no {key}"))?;
    let kb: f64 = line.split_whitespace().nth(1).unwrap_or_default().parse().context("a number of kB")?;
    Ok(kb / 1000.0)
}

/// Shims of this node, and the processes that hold their pods' namespaces: both were started with the node's run
/// directory on their command line, a holder by its shim.
fn pod_processes_mb(node: &Node) -> Result<(Vec<f64>, Vec<f64>)> {
    let run_dir = node.dir().join("run").display().to_string();
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(" shim ") && command.contains(&run_dir) {
            let parent = kb_of(&format!("/proc/{pid}/status"), "PPid:")? * 1000.0;
            found.insert(pid, (parent as u32, kb_of(&format!("/proc/{pid}/smaps_rollup"), "Pss:")?));
        }
    }
    let (holders, shims): (Vec<_>, Vec<_>) =
        found.values().partition(|(parent, _)| found.contains_key(parent));
    let sizes = |of: Vec<&(u32, f64)>| of.into_iter().map(|(_, size)| *size).collect();
    Ok((sizes(shims), sizes(holders)))
}
