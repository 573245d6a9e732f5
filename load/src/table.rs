//! PURE: results as text. Invariant: a number and its bar say the same; what is missing is a dash.

use crate::measure::describe;
use crate::row::{Entry, Line, Row};
use std::fmt::Write as _;

/// Width of a full bar.
const BAR: usize = 24;

/// Everything that was measured with one number of services.
pub(crate) fn text(entries: &[Entry]) -> String {
    let rows: Vec<&Row> = entries
        .iter()
        .filter_map(|entry| match entry {
            Entry::Row(row) => Some(&**row),
            Entry::Absent(_) => None,
        })
        .collect();
    let Some(first) = rows.first() else { return String::new() };
    let mut out = format!("{}\n\n", describe(first.services, first.endpoints, first.backends));
    summary(&mut out, &rows);
    for entry in entries {
        if let Entry::Absent(absent) = entry {
            line(&mut out, format_args!("{:<9} unavailable: {}", absent.mode, absent.unavailable));
        }
    }
    for row in &rows {
        if let Some(note) = &row.note {
            line(&mut out, format_args!("{:<9} {note}", row.mode));
        }
        if let Some(failure) = &row.failure {
            line(&mut out, format_args!("{:<9} {} failed, first: {failure}", row.mode, row.failed));
        }
    }
    for (from, kind) in kinds(&rows) {
        latencies(&mut out, &rows, from, kind);
    }
    out.push('\n');
    out
}

/// Writing to a String can't fail.
pub(crate) fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(out, "{text}").unwrap_or_default();
}

pub(crate) fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

fn summary(out: &mut String, rows: &[&Row]) {
    line(
        out,
        format_args!(
            "{:<9} {:>10} {:>10} {:>10} {:>9} {:>9} {:>9} {:>10} {:>10} {:>7} {:>7}",
            "MODE",
            "CONNECT",
            "÷ DIRECT",
            "BESIDE",
            "SHORT/S",
            "RTT µs",
            "UDP µs",
            "PROGRAM s",
            "UPDATE ms",
            "RSS MB",
            "FAILED"
        ),
    );
    for row in rows {
        line(
            out,
            format_args!(
                "{:<9} {:>10} {:>10} {:>10} {:>9} {:>9} {:>9} {:>10} {:>10} {:>7} {:>7}",
                row.mode,
                number(row.connect_p50_us, 1),
                number(row.ratio_connect_p50_to_direct, 3),
                number(row.ratio_direct_beside_p50, 3),
                number(row.cps, 0),
                number(row.rtt_p50_us, 1),
                number(row.udp_p50_us, 1),
                number(row.program_s, 3),
                number(row.update_p99_ms, 3),
                number(row.rss_mb, 1),
                row.failed,
            ),
        );
    }
}

/// Where traffic started and its kind, in the order of the first that has them.
fn kinds<'a>(rows: &[&'a Row]) -> Vec<(&'a str, &'a str)> {
    let mut found = Vec::new();
    for path in rows.iter().flat_map(|row| &row.paths) {
        if !found.contains(&(path.from, path.kind)) {
            found.push((path.from, path.kind));
        }
    }
    found
}

const fn title(kind: &str) -> &str {
    match kind.as_bytes() {
        b"connect" => "TCP connect",
        b"short" => "short request (connect, one request, close)",
        b"keepalive" => "request on a kept connection",
        _ => "UDP request",
    }
}

fn latencies(out: &mut String, rows: &[&Row], from: &str, kind: &str) {
    let paths: Vec<(&str, &Line)> = rows
        .iter()
        .flat_map(|row| row.paths.iter().map(|path| (row.mode, path)))
        .filter(|(_, path)| (path.from, path.kind) == (from, kind))
        .collect();
    let longest = paths.iter().filter_map(|(_, path)| path.p50_us).fold(0.0, f64::max);
    let source = match from {
        "outside" => "from outside, through a NodePort",
        "node" => "from the node",
        _ => "from a pod",
    };
    line(out, format_args!("\n{} {source}, µs", title(kind)));
    line(
        out,
        format_args!(
            "{:<9} {:<8} {:>9} {:>9} {:>9} {:>10} {:>9}  P50",
            "MODE", "THROUGH", "P50", "P90", "P99", "MAX", "÷ DIRECT"
        ),
    );
    for (mode, path) in paths {
        line(
            out,
            format_args!(
                "{mode:<9} {:<8} {:>9} {:>9} {:>9} {:>10} {:>9}  {}",
                path.through,
                number(path.p50_us, 1),
                number(path.p90_us, 1),
                number(path.p99_us, 1),
                number(path.max_us, 0),
                number(path.ratio_p50_to_direct, 3),
                bar(path.p50_us.unwrap_or(0.0), longest),
            ),
        );
    }
}

/// A bar in eighths of a character.
pub(crate) fn bar(value: f64, full: f64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    if full <= 0.0 {
        return String::new();
    }
    let eighths = (value / full * (BAR * 8) as f64).round().clamp(0.0, (BAR * 8) as f64) as usize;
    format!("{}{}", "█".repeat(eighths / 8), EIGHTHS[eighths % 8])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Way;
    use crate::row::{Absent, tests::example};

    #[test]
    fn bars_are_as_long_as_their_numbers() {
        assert_eq!(bar(10.0, 10.0), "█".repeat(BAR));
        assert_eq!(bar(5.0, 10.0), "█".repeat(BAR / 2));
        assert_eq!(bar(0.0, 10.0), "");
        assert_eq!(bar(1.0, 0.0), "");
        assert_eq!(bar(10.0 / 192.0, 10.0), "▏");
    }

    #[test]
    fn a_reader_sees_modes_side_by_side_and_what_is_missing() {
        let entries = [
            Entry::Row(Box::new(example(Way::Direct, 10, 40, 40))),
            Entry::Row(Box::new(example(Way::Iptables, 10, 40, 80))),
            Entry::Absent(Absent { mode: "ipvs", services: 10, unavailable: "no IPVS here".to_owned() }),
        ];
        let text = text(&entries);
        assert!(text.starts_with("10 services with 4 endpoints of their own\n"));
        assert!(text.contains("ipvs      unavailable: no IPVS here"));
        let section = text.split("TCP connect from a pod, µs").nth(1).unwrap();
        let last = section.lines().find(|l| l.starts_with("iptables  last")).unwrap();
        assert!(last.contains("2.00") || last.contains("1.99"), "{last}");
        let count = |l: &str| l.matches('█').count();
        let direct = section.lines().find(|l| l.starts_with("direct    direct")).unwrap();
        assert_eq!((count(direct), count(last)), (BAR / 2, BAR));
    }
}
