//! `bench load`: `sheave load services` with few and with many services, and what its figures are held to.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::report::{Bar, Report, kernel};

const COUNTS: [u64; 4] = [10, 1_000, 10_000, MANY];
const MANY: u64 = 100_000;
const ENDPOINTS: u64 = 4;
const SAMPLES: u32 = 3_000;
const CHANGES: u32 = 100;

/// How much is measured, where a benchmark asks.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Size {
    /// Of `load` and `packet`: numbers of services, with commas between [default: 10,1000,10000,100000; 10,100000]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=500_000))]
    count: Vec<u64>,
    /// Of `load` and `packet`: connects a target [default: 3000]
    #[arg(long)]
    samples: Option<u32>,
    /// Of `load`: changes of an endpoint [default: 100]
    #[arg(long)]
    changes: Option<u32>,
}

impl Size {
    /// Numbers of services, `otherwise` where nobody asked for some.
    pub(crate) fn counts(&self, otherwise: &[u64]) -> Vec<u64> {
        if self.count.is_empty() { otherwise.to_vec() } else { self.count.clone() }
    }

    /// Connects a target.
    pub(crate) fn samples(&self) -> u32 {
        self.samples.unwrap_or(SAMPLES)
    }
}

/// What a run of `sheave load services` printed.
#[derive(Debug)]
pub(crate) struct Run(Vec<Value>);

impl Run {
    /// Runs it; what it says of its progress goes to standard error.
    pub(crate) fn new(counts: &[u64], endpoints: u64, more: &[&str]) -> Result<Self> {
        let counts: Vec<String> = counts.iter().map(u64::to_string).collect();
        let output = Command::new(crate::sheave()?)
            .args(["load", "services", "--output", "json", "--count", &counts.join(",")])
            .args(["--endpoints", &endpoints.to_string()])
            .args(more)
            .stderr(Stdio::inherit())
            .output()
            .context("starting sheave load services")?;
        ensure!(output.status.success(), "sheave load services: {}", output.status);
        let lines = String::from_utf8(output.stdout).context("its output")?;
        let rows = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("its output")?;
        Ok(Self(rows))
    }

    /// What it said of a mode with a number of services, if that could be measured.
    pub(crate) fn row(&self, mode: &str, services: u64) -> Option<&Value> {
        let found = self.0.iter().find(|row| row["mode"] == mode && row["services"] == services);
        found.filter(|row| row["unavailable"].is_null())
    }

    /// A figure of it.
    pub(crate) fn figure(&self, mode: &str, services: u64, key: &str) -> Option<f64> {
        self.row(mode, services)?[key].as_f64()
    }

    /// Modes that could not be measured: name, services, why.
    fn unavailable(&self) -> impl Iterator<Item = (&str, u64, &str)> {
        self.0.iter().filter_map(|row| {
            Some((row["mode"].as_str()?, row["services"].as_u64()?, row["unavailable"].as_str()?))
        })
    }

    /// Says on standard error which modes are missing, and what the first failed request of a mode was.
    pub(crate) fn tell_what_failed(&self) {
        for (mode, services, why) in self.unavailable() {
            eprintln!("{mode} with {services} services: unavailable: {why}");
        }
        for row in &self.0 {
            if let Some(failure) = row["failure"].as_str() {
                eprintln!("{} with {} services: a failure: {failure}", row["mode"], row["services"]);
            }
        }
    }
}

pub(crate) fn run(json: bool, size: &Size) -> Result<()> {
    let mut report = Report::new("load", json);
    let [samples, changes] =
        [size.samples(), size.changes.unwrap_or(CHANGES)].map(|number| number.to_string());
    // One number after the other, so that what was measured is told before the next begins.
    for services in size.counts(&COUNTS) {
        let measured = Run::new(&[services], ENDPOINTS, &["--samples", &samples, "--changes", &changes])?;
        measured.tell_what_failed();
        for mode in ["direct", "ebpf", "nftables", "iptables", "ipvs"] {
            figures(&mut report, &measured, mode, services);
        }
        let rivals =
            [("iptables", iptables_bar(services)), ("nftables", Bar::AtLeast(1.0)), ("ipvs", Bar::None)];
        for (rival, bar) in rivals {
            // Each beside direct connections of the same moments.
            let cps = |mode| measured.figure(mode, services, "ratio_cps_to_direct");
            if let (Some(ours), Some(theirs)) = (cps("ebpf"), cps(rival)) {
                let params = [("services", json!(services)), ("through", json!("last"))];
                report.add(&format!("cps_ebpf_to_{rival}"), ours / theirs, "x", bar, &params);
            }
        }
    }
    report.finish();
    Ok(())
}

/// The rate of short requests, eBPF ÷ iptables.
fn iptables_bar(services: u64) -> Bar {
    match services {
        10 => Bar::AtLeast(1.0),
        10_000 => Bar::AtLeast(2.0),
        _ => Bar::None,
    }
}

/// The bar of a ratio of the eBPF data plane.
fn ebpf_bar(key: &str, services: u64) -> Bar {
    match (key, services) {
        ("ratio_connect_p50_to_direct", 10) => Bar::AtMost(1.03),
        ("ratio_connect_p50_to_direct", MANY) => Bar::AtMost(1.05),
        ("ratio_connect_p99_to_direct", MANY) => Bar::AtMost(1.15),
        ("ratio_direct_beside_p50", MANY) => Bar::AtMost(1.02),
        _ => Bar::None,
    }
}

fn figures(report: &mut Report, measured: &Run, mode: &str, services: u64) {
    let Some(row) = measured.row(mode, services) else { return };
    let params = [
        ("mode", json!(mode)),
        ("services", json!(services)),
        ("endpoints", json!(ENDPOINTS)),
        ("kernel", json!(kernel())),
    ];
    for (key, unit) in [
        ("connect_p50_us", "us"),
        ("connect_p99_us", "us"),
        ("ratio_connect_p50_to_direct", "x"),
        ("ratio_connect_p99_to_direct", "x"),
        ("ratio_connect_p50_to_direct_beside", "x"),
        ("ratio_direct_beside_p50", "x"),
        ("ratio_control_p50", "x"),
        ("cps", "1/s"),
        ("ratio_cps_to_direct", "x"),
        ("rtt_p50_us", "us"),
        ("udp_p50_us", "us"),
        ("ratio_node_port_connect_p50_to_direct", "x"),
        ("ratio_node_port_answer_p50_to_direct", "x"),
        ("program_s", "s"),
        ("update_p99_ms", "ms"),
        ("rss_mb", "MB"),
        ("failed", ""),
    ] {
        let Some(value) = row[key].as_f64() else { continue };
        let bar = match (mode, key) {
            ("ebpf", "failed") => Bar::AtMost(0.0),
            ("ebpf", key) => ebpf_bar(key, services),
            _ => Bar::None,
        };
        report.add(key, value, unit, bar, &params);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_unless_their_mode_is_missing() {
        let run = Run(vec![
            json!({"mode": "ebpf", "services": 10, "cps": 7.5}),
            json!({"mode": "ipvs", "services": 10, "unavailable": "no IPVS"}),
        ]);
        assert_eq!(run.figure("ebpf", 10, "cps"), Some(7.5));
        assert_eq!(run.figure("ebpf", 100, "cps"), None);
        assert!(run.row("ipvs", 10).is_none());
        assert_eq!(run.unavailable().collect::<Vec<_>>(), [("ipvs", 10, "no IPVS")]);
    }

    #[test]
    fn sizes_are_the_benchmarks_own_unless_somebody_asks_for_others() {
        assert_eq!(Size::default().counts(&COUNTS), COUNTS);
        let asked = Size { count: vec![7], samples: Some(50), changes: None };
        assert_eq!((asked.counts(&COUNTS), asked.samples()), (vec![7], 50));
    }
}
