//! `bench network`: what `sheave load network` measures, as the ratios that are asked for. Streams are compared turn by
//! turn, so that a machine that is busy for a while tells nothing about a road.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::report::{Bar, Report};

/// Turns of each road; a stream and a row of requests each.
const ROUNDS: u32 = 40;
/// Longer than the first second, in which every packet of a flow goes through the stack of both nodes.
const STREAM_MS: u32 = 1_500;

pub(crate) fn run(json: bool) -> Result<()> {
    let output = Command::new(crate::sheave()?)
        .args(["load", "network", "--output", "json", "--rounds", &ROUNDS.to_string()])
        .args(["--stream-ms", &STREAM_MS.to_string()])
        // It shows how far it is, and says itself what went wrong.
        .stderr(Stdio::inherit())
        .output()
        .context("starting sheave load network")?;
    ensure!(output.status.success(), "sheave load network: {}", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    let rows: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let mut report = Report::new("network", json);
    for row in &rows {
        if let Some(why) = row["unavailable"].as_str() {
            bail!("{}: {why}", row["path"]);
        }
        figures(&mut report, row);
    }
    let params = [("rounds", json!(ROUNDS)), ("stream_ms", json!(STREAM_MS))];
    for (metric, of, to, least) in [
        ("ratio_pod_to_veth", "pod", "veth", 0.95),
        ("ratio_direct_to_host", "direct", "host", 0.95),
        ("ratio_vxlan_to_host", "vxlan", "host", 0.80),
        ("ratio_vxlan_to_flannel", "vxlan", "flannel", 1.0),
        ("ratio_service_to_vxlan", "service", "vxlan", 0.0),
    ] {
        let bar = if least > 0.0 { Bar::AtLeast(least) } else { Bar::None };
        report.add(metric, ratio(&rows, of, to)?, "x", bar, &params);
    }
    let over = number(find(&rows, "vxlan")?, "rr_p50_us")? - number(find(&rows, "host")?, "rr_p50_us")?;
    report.add("rr_p50_vxlan_over_host", over, "us", Bar::AtMost(8.0), &params);
    report.finish();
    Ok(())
}

fn figures(report: &mut Report, row: &Value) {
    let path = [("path", row["path"].clone()), ("failed", row["failed"].clone())];
    for (metric, key, unit) in [
        ("stream", "gbps", "Gbit/s"),
        ("cpu", "cpu_ms_per_gbit", "ms/Gbit"),
        ("rr_p50", "rr_p50_us", "us"),
        ("rr_p99", "rr_p99_us", "us"),
    ] {
        if let Some(value) = row[key].as_f64() {
            report.add(metric, value, unit, Bar::None, &path);
        }
    }
}

fn find<'a>(rows: &'a [Value], path: &str) -> Result<&'a Value> {
    rows.iter().find(|row| row["path"] == path).with_context(|| format!("no figures of {path}"))
}

fn number(row: &Value, key: &str) -> Result<f64> {
    row[key].as_f64().with_context(|| format!("{}: no {key}", row["path"]))
}

/// The median over all turns of what one road carried divided by what the other did in the same turn.
fn ratio(rows: &[Value], of: &str, to: &str) -> Result<f64> {
    let turns = |path| -> Result<Vec<f64>> {
        let row = find(rows, path)?;
        ensure!(row["failed"] == 0, "{path}: turns failed: {}", row["failure"]);
        Ok(row["turns_gbps"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect())
    };
    let mut ratios: Vec<f64> = turns(of)?.iter().zip(turns(to)?).map(|(of, to)| of / to).collect();
    ratios.sort_by(f64::total_cmp);
    ratios.get(ratios.len() / 2).copied().with_context(|| format!("no turns of {of} and {to}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_compared_with_their_own() {
        let rows = [
            json!({"path": "host", "failed": 0, "turns_gbps": [10.0, 1.0, 20.0]}),
            json!({"path": "vxlan", "failed": 0, "turns_gbps": [8.0, 0.9, 10.0]}),
            json!({"path": "pod", "failed": 1, "turns_gbps": [1.0], "failure": "x"}),
        ];
        assert_eq!(ratio(&rows, "vxlan", "host").unwrap(), 0.8);
        assert!(ratio(&rows, "pod", "host").unwrap_err().to_string().contains("turns failed"));
        assert!(ratio(&rows, "vxlan", "flannel").unwrap_err().to_string().contains("flannel"));
    }
}
