//! `sheave load network`, the real program: a small run measures every road and leaves nothing, however it ends.

use nix::sys::signal::Signal;
use serde_json::Value;
use sheave_harness::{require_root, wait_for};

use crate::load_services::Load;

/// As short as it may be.
const SHORT: [&str; 6] = ["--rounds", "1", "--stream-ms", "10", "--requests", "10"];

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn load_network_measures_every_road() {
    if !require_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("make a directory");
    let report = dir.path().join("report.html");
    let path = report.display().to_string();
    let output =
        Load::of("network", &[&SHORT[..], &["--output", "json", "--report", &path]].concat()).finish();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let rows: Vec<Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("a JSON object")).collect();
    let names: Vec<&str> = rows.iter().filter_map(|row| row["path"].as_str()).collect();
    assert_eq!(names, ["host", "veth", "pod", "direct", "vxlan", "flannel", "service"], "{rows:?}");
    for row in &rows {
        assert!(row["unavailable"].is_null() && row["failed"] == 0, "{row}");
        assert!(row["gbps"].as_f64().is_some_and(|gbps| gbps > 0.0), "{row}");
        assert!(row["rr_p50_us"].as_f64() <= row["rr_p99_us"].as_f64(), "{row}");
    }
    let page = std::fs::read_to_string(&report).expect("the report");
    assert!(page.contains("VXLAN") && page.contains("<meter"), "{page}");
}

#[test]
fn load_network_leaves_nothing_when_interrupted() {
    if !require_root() {
        return;
    }
    let run = Load::of("network", &["--paths", "pod", "--rounds", "10000"]);
    wait_for("agents and ends to be at work", || match run.others() {
        // An agent, two ends of its road and two of the host's.
        all if all.len() >= 5 => Ok(()),
        all => Err(format!("only {all:?}")),
    });
    run.signal(Signal::SIGINT);
    let output = run.finish();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("interrupted"), "{}", text(&output.stderr));
}
