//! `bench program`: putting services into the kernel, one change of an endpoint, and the memory that it takes.

use anyhow::{Context, Result};
use serde_json::json;

use crate::load::Run;
use crate::report::{Bar, Report};

const MANY: u64 = 100_000;

pub(crate) fn run(json: bool) -> Result<()> {
    let mut report = Report::new("program", json);
    both(&mut report)?;
    for (services, endpoints, bar) in [(5_000, 2, 40.0), (10_000, 4, 80.0), (MANY, 4, 400.0)] {
        memory(&mut report, services, endpoints, bar)?;
    }
    report.finish();
    Ok(())
}

/// All services from nothing and one change, eBPF beside nftables.
fn both(report: &mut Report) -> Result<()> {
    let measured = Run::new(&[MANY], 4, &["--no-traffic", "--modes", "ebpf,nftables"])?;
    measured.tell_what_failed();
    let program = |mode| measured.figure(mode, MANY, "program_s");
    for mode in ["ebpf", "nftables"] {
        let params = [("mode", json!(mode)), ("services", json!(MANY)), ("endpoints", json!(4))];
        let bar = |bar| if mode == "ebpf" { Bar::AtMost(bar) } else { Bar::None };
        for (key, unit, bar) in [
            ("program_s", "s", bar(5.0)),
            ("open_s", "s", Bar::None),
            ("update_p50_ms", "ms", Bar::None),
            ("update_p99_ms", "ms", bar(5.0)),
        ] {
            if let Some(value) = measured.figure(mode, MANY, key) {
                report.add(key, value, unit, bar, &params);
            }
        }
    }
    let ours = program("ebpf").context("no figure of the eBPF data plane")?;
    if let Some(theirs) = program("nftables") {
        let params = [("services", json!(MANY)), ("endpoints", json!(4))];
        report.add("program_ebpf_to_nftables", ours / theirs, "x", Bar::AtMost(0.1), &params);
    }
    Ok(())
}

/// Resident memory with endpoints of each service's own, and with endpoints that all share.
fn memory(report: &mut Report, services: u64, endpoints: u64, bar: f64) -> Result<()> {
    let mut held = [0.0; 2];
    for (rss, backends) in held.iter_mut().zip(["unique", "shared"]) {
        let args = ["--no-traffic", "--modes", "ebpf", "--changes", "1", "--backends", backends];
        let measured = Run::new(&[services], endpoints, &args)?;
        measured.tell_what_failed();
        *rss = measured.figure("ebpf", services, "rss_mb").context("no figure of memory")?;
        let params =
            [("services", json!(services)), ("endpoints", json!(endpoints)), ("backends", json!(backends))];
        report.add("rss_mb", *rss, "MB", Bar::AtMost(bar), &params);
        if let Some(peak) = measured.figure("ebpf", services, "rss_peak_mb") {
            report.add("rss_peak_mb", peak, "MB", Bar::None, &params);
        }
    }
    let params = [("services", json!(services)), ("endpoints", json!(endpoints))];
    // As promised: shared backends cost what unique ones do, ± 10 %; costing less is no fault.
    report.add("rss_shared_to_unique", held[1] / held[0], "x", Bar::AtMost(1.1), &params);
    Ok(())
}
