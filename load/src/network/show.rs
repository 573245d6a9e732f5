//! PURE: what was seen of roads, as rows, text and a page. Invariant: a number and its bar say the same; what is
//! missing is a dash; no text enters the page unescaped.

use super::Measured;
use super::options::Road;
use crate::stats::ratio;
use crate::table::{bar, line, number};
use serde::Serialize;
use std::fmt::Write as _;

/// A line of the output.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Entry {
    Row(Box<Row>),
    Absent(Absent),
}

/// What could not be measured.
#[derive(Debug, Serialize)]
pub(crate) struct Absent {
    pub(crate) path: &'static str,
    pub(crate) unavailable: String,
}

/// What was measured of a road.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) path: &'static str,
    #[serde(skip)]
    pub(crate) road: Option<Road>,
    pub(crate) mtu: u32,
    /// One TCP stream, gigabits a second: median of the turns.
    pub(crate) gbps: Option<f64>,
    pub(crate) gbps_least: Option<f64>,
    pub(crate) gbps_most: Option<f64>,
    /// Median of what the turns carried, each divided by what host to host did in the same round.
    pub(crate) ratio_gbps_to_host: Option<f64>,
    /// CPU of both ends, milliseconds a gigabit.
    pub(crate) cpu_ms_per_gbit: Option<f64>,
    /// A byte and its answer on a kept connection.
    pub(crate) rr_p50_us: Option<f64>,
    pub(crate) rr_p99_us: Option<f64>,
    pub(crate) rr_p50_us_over_host: Option<f64>,
    pub(crate) turns: usize,
    /// Of each turn, in their order, which all roads have the same of: gigabits a second.
    pub(crate) turns_gbps: Vec<f64>,
    pub(crate) failed: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) failure: Option<String>,
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted.get(middle).copied()
    } else {
        Some((sorted.get(middle)? + sorted.get(middle.checked_sub(1)?)?) / 2.0)
    }
}

/// The row of a road beside host to host.
pub(crate) fn row(measured: &Measured, host: Option<&Measured>, mtu: u32) -> Row {
    // Turns pair up while none has failed; otherwise medians are compared.
    let paired = host
        .filter(|host| host.gbps.len() == measured.gbps.len())
        .map(|host| measured.gbps.iter().zip(&host.gbps).map(|(own, host)| own / host).collect::<Vec<f64>>());
    let gbps = median(&measured.gbps);
    let ratio_gbps_to_host = match &paired {
        Some(pairs) => median(pairs),
        None => ratio(gbps, host.and_then(|host| median(&host.gbps))),
    };
    let least = measured.gbps.iter().copied().reduce(f64::min);
    let most = measured.gbps.iter().copied().reduce(f64::max);
    let rr_p50_us = measured.requests.us(0.5);
    Row {
        path: measured.road.name(),
        road: Some(measured.road),
        mtu,
        gbps,
        gbps_least: least,
        gbps_most: most,
        ratio_gbps_to_host,
        cpu_ms_per_gbit: median(&measured.cpu_ms),
        rr_p50_us,
        rr_p99_us: measured.requests.us(0.99),
        rr_p50_us_over_host: rr_p50_us
            .zip(host.and_then(|host| host.requests.us(0.5)))
            .map(|(own, host)| own - host),
        turns: measured.gbps.len(),
        turns_gbps: measured.gbps.clone(),
        failed: measured.failed,
        failure: measured.failure.clone(),
    }
}

fn rows(entries: &[Entry]) -> Vec<&Row> {
    let mut rows: Vec<&Row> = Vec::new();
    for entry in entries {
        if let Entry::Row(row) = entry {
            rows.push(row);
        }
    }
    rows
}

fn about(row: &Row) -> &'static str {
    row.road.map_or("", Road::about)
}

/// Everything for a terminal.
pub(crate) fn text(entries: &[Entry]) -> String {
    let rows = rows(entries);
    let mut out = String::new();
    line(
        &mut out,
        format_args!(
            "{:<26} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>7}",
            "ONE TCP STREAM, REQUESTS",
            "GBIT/S",
            "÷ HOST",
            "CPU ms/Gb",
            "P50 µs",
            "- HOST",
            "P99 µs",
            "FAILED"
        ),
    );
    for row in &rows {
        line(
            &mut out,
            format_args!(
                "{:<26} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>7}",
                about(row),
                number(row.gbps, 2),
                number(row.ratio_gbps_to_host, 3),
                number(row.cpu_ms_per_gbit, 1),
                number(row.rr_p50_us, 1),
                number(row.rr_p50_us_over_host, 1),
                number(row.rr_p99_us, 1),
                row.failed
            ),
        );
    }
    for entry in entries {
        match entry {
            Entry::Absent(absent) => {
                line(&mut out, format_args!("{}: unavailable: {}", absent.path, absent.unavailable));
            }
            Entry::Row(row) => {
                if let Some(failure) = &row.failure {
                    line(
                        &mut out,
                        format_args!("{}: {} turns failed, first: {failure}", row.path, row.failed),
                    );
                }
            }
        }
    }
    type Value = fn(&Row) -> Option<f64>;
    let charts: [(&str, Value); 3] = [
        ("one TCP stream, Gbit/s", |row| row.gbps),
        ("a byte and its answer, median, µs", |row| row.rr_p50_us),
        ("CPU of both ends, ms a Gbit", |row| row.cpu_ms_per_gbit),
    ];
    for (title, value) in charts {
        let most = rows.iter().filter_map(|row| value(row)).fold(0.0, f64::max);
        line(&mut out, format_args!("\n{title}"));
        for row in &rows {
            let drawn = bar(value(row).unwrap_or(0.0), most);
            line(&mut out, format_args!("{:<26} {:>8} {drawn}", about(row), number(value(row), 2)));
        }
    }
    out
}

/// Everything as one HTML page that refers to nothing outside itself.
pub(crate) fn page(entries: &[Entry]) -> String {
    const STYLE: &str = ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;\
        margin:2rem auto;padding:0 1rem}table{border-collapse:collapse;width:100%}td,th{text-align:right;\
        padding:.25rem .6rem;border-bottom:1px solid #8884}td:first-child,th:first-child{text-align:left}\
        meter{width:12rem}";
    let rows = rows(entries);
    let most = rows.iter().filter_map(|row| row.gbps).fold(0.0, f64::max);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>sheave load network</title>\
         <style>{STYLE}</style></head><body>\n<h1>Roads between containers, side by side</h1>\n<table>\
         <tr><th>road<th>Gbit/s<th><th>÷ host<th>CPU ms/Gbit<th>p50 µs<th>p99 µs<th>failed</tr>\n"
    );
    let mut put = |text: std::fmt::Arguments<'_>| out.write_fmt(text).unwrap_or_default();
    for row in &rows {
        put(format_args!(
            "<tr><td>{}<td>{}<td><meter value=\"{}\" max=\"{most}\"></meter><td>{}<td>{}<td>{}<td>{}<td>{}</tr>\n",
            escape(about(row)),
            number(row.gbps, 2),
            row.gbps.unwrap_or(0.0),
            number(row.ratio_gbps_to_host, 3),
            number(row.cpu_ms_per_gbit, 1),
            number(row.rr_p50_us, 1),
            number(row.rr_p99_us, 1),
            row.failed,
        ));
    }
    put(format_args!("</table>\n"));
    for entry in entries {
        if let Entry::Absent(absent) = entry {
            put(format_args!("<p>{}: unavailable: {}</p>\n", absent.path, escape(&absent.unavailable)));
        }
    }
    put(format_args!("</body></html>\n"));
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(road: Road, gbps: &[f64], us: u64) -> Measured {
        let mut measured = Measured::new(road);
        measured.gbps = gbps.to_vec();
        measured.cpu_ms = gbps.iter().map(|gbps| 1000.0 / gbps).collect();
        measured.requests.record_ns(us * 1000);
        measured
    }

    #[test]
    fn roads_are_compared_turn_by_turn() {
        let host = measured(Road::Host, &[10.0, 20.0, 40.0], 10);
        let vxlan = measured(Road::Vxlan, &[8.0, 16.0, 10.0], 15);
        let one = row(&vxlan, Some(&host), 1500);
        assert_eq!((one.gbps, one.ratio_gbps_to_host), (Some(10.0), Some(0.8)));
        assert!((one.rr_p50_us_over_host.unwrap() - 5.0).abs() < 0.1);
        let short = measured(Road::Vxlan, &[8.0], 15);
        assert_eq!(row(&short, Some(&host), 1500).ratio_gbps_to_host, Some(0.4));
        assert_eq!(row(&Measured::new(Road::Host), None, 1500).gbps, None);
        assert_eq!(median(&[1.0, 4.0]), Some(2.5));
    }

    #[test]
    fn a_reader_sees_all_and_what_is_missing() {
        let host = measured(Road::Host, &[10.0], 10);
        let entries = [
            Entry::Row(Box::new(row(&host, Some(&host), 1500))),
            Entry::Absent(Absent { path: "vxlan", unavailable: "no <VXLAN>".to_owned() }),
        ];
        let text = text(&entries);
        assert!(text.contains("host to host") && text.contains("vxlan: unavailable: no <VXLAN>"), "{text}");
        assert!(text.contains('█'));
        let page = page(&entries);
        assert!(page.contains("no &lt;VXLAN&gt;") && !page.contains("<VXLAN>"));
        let json = serde_json::to_string(&entries[0]).unwrap();
        assert!(json.contains("\"path\":\"host\"") && json.contains("\"ratio_gbps_to_host\":1.0"), "{json}");
    }
}
