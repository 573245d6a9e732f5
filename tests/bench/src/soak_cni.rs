//! `soak cni`: a thousand attachments added and deleted, 32 at a time, round after round. What is checked after each
//! round: no link, route, neighbour, rule, shaping, record or descriptor is left, and the agent's memory has not grown.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use sheave_harness::NetworkNode;

use crate::cni::plugin;
use crate::progress::spinner;

const ATTACHMENTS: usize = 1000;
const IN_FLIGHT: usize = 32;
/// Growth of memory over the first round, percent.
const GROWTH_MAX: f64 = 5.0;
const SETTLE: Duration = Duration::from_secs(60);
/// Longer than the agent looks after everything and keeps what it no longer uses, one after the other.
const REST: Duration = Duration::from_secs(16);

pub(crate) fn run(rounds: usize) -> Result<()> {
    let plugin = plugin()?;
    // A thousand a round, and what is given back is kept back for a while.
    let net = NetworkNode::prepare(crate::sheave()?, &["--pod-cidr", "10.244.0.0/17,fd00:244::/64"]);
    net.launch();
    net.wait_serving(&plugin);
    let before = net.settled(&plugin);
    let mut resting = Vec::new();
    for round in 1..=rounds {
        let bar = spinner(format!("{ATTACHMENTS} attachments, round {round} of {rounds}"));
        let start = Instant::now();
        net.churn(&plugin, ATTACHMENTS, IN_FLIGHT).map_err(|why| anyhow!("round {round}: {why}"))?;
        let took = start.elapsed().as_secs_f64();
        settled(&net, &before, round)?;
        std::thread::sleep(REST);
        let (rss, descriptors) = (net.rss_kb(), net.descriptors());
        bar.finish_and_clear();
        println!(
            "round {round}: {:.0} attachments/s, nothing left, RSS {:.1} MB, {descriptors} descriptors",
            ATTACHMENTS as f64 / took,
            rss as f64 / 1000.0
        );
        resting.push((rss, descriptors));
    }
    judge(&resting)?;
    println!("cni: {rounds} rounds of {ATTACHMENTS} attachments, {IN_FLIGHT} in flight, nothing leaked");
    Ok(())
}

/// Holds every round against the first, once all have run: where memory went is seen from all of them.
fn judge(resting: &[(u64, usize)]) -> Result<()> {
    let Some((rss_first, descriptors_first)) = resting.first() else { return Ok(()) };
    for (round, (rss, descriptors)) in (1..).zip(resting) {
        let growth = (*rss as f64 / *rss_first as f64 - 1.0) * 100.0;
        ensure!(growth <= GROWTH_MAX, "round {round}: memory grew by {growth:.1} % over the first round");
        ensure!(
            descriptors <= descriptors_first,
            "round {round}: {descriptors} descriptors are open, {descriptors_first} were after the first"
        );
    }
    Ok(())
}

/// Waits until the node is as it was: links go in batches after their deletion is acknowledged.
fn settled(net: &NetworkNode, before: &BTreeSet<String>, round: usize) -> Result<()> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let now = net.traces();
        if now == *before {
            return Ok(());
        }
        let left: Vec<&String> = now.symmetric_difference(before).take(20).collect();
        ensure!(Instant::now() < deadline, "round {round}: left behind: {left:#?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
