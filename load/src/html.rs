//! PURE: results as one HTML page with drawings inside, readable in light and dark. Invariant: it refers to nothing
//! outside itself, and no text enters it unescaped.

use crate::row::{Entry, Row};
use std::fmt::Write as _;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 300.0;
/// Room for the axes' labels: left, bottom.
const LEFT: f64 = 64.0;
const BOTTOM: f64 = 36.0;
const TOP: f64 = 12.0;
const RIGHT: f64 = 96.0;

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2430;--soft:#5b6675;--line:#d9dee5;--paper:#fff;\
--direct:#6b7280;--ebpf:#0b7a53;--nftables:#2563c9;--iptables:#c2410c;--ipvs:#7c3aed}\
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#9aa5b4;--line:#313a47;--paper:#12161c;\
--direct:#9ca3af;--ebpf:#34d399;--nftables:#7cb0ff;--iptables:#fb923c;--ipvs:#c4a6ff}}\
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:56rem;margin:2rem auto;padding:0 1rem}\
h2{font-size:1.1rem;margin:2rem 0 .3rem}p{color:var(--soft);margin:.2rem 0}\
svg{width:100%;height:auto;font:12px system-ui,sans-serif}\
svg text{fill:var(--soft)}.grid{stroke:var(--line);stroke-width:1}.curve{fill:none;stroke-width:2}\
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}\
th,td{text-align:right;padding:.25rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap}\
th{color:var(--soft);font-weight:500}th:first-child,td:first-child,.left{text-align:left}";

/// A drawing: its title, what it shows, and where the value is.
type Chart = (&'static str, &'static str, fn(&Row) -> Option<f64>);

const CHARTS: &[Chart] = &[
    ("Connect through a service, median", "µs, from a pod", |row| row.connect_p50_us),
    ("Connect through a service, 99th percentile", "µs, from a pod", |row| row.connect_p99_us),
    (
        "Traffic that uses no service, beside each data plane",
        "median connect ÷ the same with nothing loaded",
        |row| row.ratio_direct_beside_p50.or(row.ratio_connect_p50_to_direct),
    ),
    ("Short requests through the last service", "a second, one client", |row| row.cps),
    ("From outside through a NodePort", "median connect ÷ to the backend itself", |row| {
        row.ratio_node_port_connect_p50_to_direct
    }),
    ("Programming everything from nothing", "s", |row| row.program_s),
    ("One change of an endpoint, 99th percentile", "ms", |row| row.update_p99_ms),
    ("Memory of the process that programs", "MB", |row| row.rss_mb),
];

/// The whole page.
pub(crate) fn page(entries: &[Entry]) -> String {
    let rows: Vec<&Row> = entries
        .iter()
        .filter_map(|entry| match entry {
            Entry::Row(row) => Some(&**row),
            Entry::Absent(_) => None,
        })
        .collect();
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>sheave load services</title><style>{STYLE}</style></head><body>\n\
         <h1>Ways to balance services, side by side</h1>\n"
    );
    if let Some(row) = rows.first() {
        let about =
            format!("{} endpoints a service, {}; measured by turns in one run.", row.endpoints, row.backends);
        add(&mut out, format_args!("<p>{}</p>\n", escape(&about)));
    }
    for (title, what, value) in CHARTS {
        let curves = curves(&rows, *value);
        if curves.iter().any(|(_, points)| !points.is_empty()) {
            add(&mut out, format_args!("<h2>{}</h2>\n<p>{}</p>\n", escape(title), escape(what)));
            out.push_str(&chart(title, &curves));
        }
    }
    out.push_str(&figures(&rows));
    for entry in entries {
        if let Entry::Absent(absent) = entry {
            let text = format!("{}, {} services: {}", absent.mode, absent.services, absent.unavailable);
            add(&mut out, format_args!("<p>Unavailable: {}</p>\n", escape(&text)));
        }
    }
    out.push_str("</body></html>\n");
    out
}

/// Writing to a String can't fail.
fn add(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).unwrap_or_default();
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

type Curve = (&'static str, Vec<(f64, f64)>);

/// The curve of each mode: services and value.
fn curves(rows: &[&Row], value: fn(&Row) -> Option<f64>) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    for row in rows {
        let Some(value) = value(row).filter(|value| value.is_finite()) else { continue };
        let point = (f64::from(row.services), value);
        match curves.iter_mut().find(|(mode, _)| *mode == row.mode) {
            Some((_, points)) => points.push(point),
            None => curves.push((row.mode, vec![point])),
        }
    }
    curves
}

/// Where a chart's values lie. The number of services is drawn on a logarithmic axis; so are values that span more than
/// fiftyfold.
struct Scale {
    from: f64,
    to: f64,
    low: f64,
    high: f64,
    log: bool,
}

impl Scale {
    fn of(curves: &[Curve]) -> Self {
        let points = || curves.iter().flat_map(|(_, points)| points);
        let least = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::INFINITY, f64::min);
        let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
        let (from, to) = (least(&mut points().map(|p| p.0)), most(&mut points().map(|p| p.0)));
        let (low, high) = (least(&mut points().map(|p| p.1)), most(&mut points().map(|p| p.1)));
        let log = low > 0.0 && high / low > 50.0;
        let high = if high > 0.0 { high } else { 1.0 };
        if log {
            let (low, high) = (10f64.powf(low.log10().floor()), 10f64.powf(high.log10().ceil()));
            return Self { from, to, low, high, log };
        }
        Self { from, to, low: 0.0, high: nice(high / 4.0) * (high / nice(high / 4.0)).ceil(), log }
    }

    fn x(&self, services: f64) -> f64 {
        let span = (self.to / self.from).log10();
        let part = if span > 0.0 { (services / self.from).log10() / span } else { 0.5 };
        LEFT + part * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        let part = if self.log {
            (value / self.low).log10() / (self.high / self.low).log10()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP)
    }

    fn marks(&self) -> Vec<f64> {
        if self.log {
            let powers = self.low.log10().round() as i32..=self.high.log10().round() as i32;
            return powers.map(|power| 10f64.powi(power)).collect();
        }
        let step = nice(self.high / 4.0);
        (0..=(self.high / step).round() as u32).map(|n| f64::from(n) * step).collect()
    }
}

/// The next of 1, 2, 5, 10, 20 … from `value` on.
fn nice(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|n| *n >= value).unwrap_or(value)
}

fn plain(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn chart(title: &str, curves: &[Curve]) -> String {
    let scale = Scale::of(curves);
    let mut out =
        format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n", escape(title));
    for mark in scale.marks() {
        let y = scale.y(mark);
        add(
            &mut out,
            format_args!(
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
                WIDTH - RIGHT,
                LEFT - 8.0,
                y + 4.0,
                plain(mark)
            ),
        );
    }
    let mut counts: Vec<f64> = curves.iter().flat_map(|(_, points)| points.iter().map(|p| p.0)).collect();
    counts.sort_by(f64::total_cmp);
    counts.dedup();
    for services in counts {
        add(
            &mut out,
            format_args!(
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{services}</text>\n",
                scale.x(services),
                HEIGHT - 14.0
            ),
        );
    }
    add(
        &mut out,
        format_args!("<text x=\"{:.1}\" y=\"{:.1}\">services</text>\n", WIDTH - RIGHT + 12.0, HEIGHT - 14.0),
    );
    let mut labels: Vec<f64> = Vec::new();
    for (mode, points) in curves {
        curve(&mut out, &scale, mode, points, &mut labels);
    }
    out.push_str("</svg>\n");
    out
}

/// A curve with its points and its name at the end, out of the way of `labels`.
fn curve(out: &mut String, scale: &Scale, mode: &str, points: &[(f64, f64)], labels: &mut Vec<f64>) {
    let path: Vec<String> =
        points.iter().map(|(x, y)| format!("{:.1},{:.1}", scale.x(*x), scale.y(*y))).collect();
    add(
        out,
        format_args!("<polyline class=\"curve\" stroke=\"var(--{mode})\" points=\"{}\"/>\n", path.join(" ")),
    );
    for (x, y) in points {
        let says = format!("{mode}, {x} services: {}", plain(*y));
        add(
            out,
            format_args!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"var(--{mode})\"><title>{}</title></circle>\n",
                scale.x(*x),
                scale.y(*y),
                escape(&says)
            ),
        );
    }
    let Some((x, y)) = points.last() else { return };
    let mut at = scale.y(*y) + 4.0;
    while labels.iter().any(|other| (other - at).abs() < 13.0) {
        at -= 4.0;
    }
    labels.push(at);
    add(
        out,
        format_args!(
            "<text x=\"{:.1}\" y=\"{at:.1}\" style=\"fill:var(--{mode})\">{mode}</text>\n",
            scale.x(*x) + 9.0
        ),
    );
}

/// All figures in a table.
fn figures(rows: &[&Row]) -> String {
    let mut out = "<h2>All figures</h2>\n<div class=\"scroll\"><table><tr><th>mode</th><th>services</th>\
                   <th>connect p50 µs</th><th>p90</th><th>p99</th><th>p50 ÷ direct</th><th>direct beside</th>\
                   <th>short/s</th><th>rtt p50 µs</th><th>UDP p50 µs</th><th>program s</th><th>update p99 ms</th>\
                   <th>RSS MB</th><th>failed</th></tr>\n"
        .to_owned();
    for row in rows {
        let cells = [
            (row.connect_p50_us, 1),
            (row.connect_p90_us, 1),
            (row.connect_p99_us, 1),
            (row.ratio_connect_p50_to_direct, 3),
            (row.ratio_direct_beside_p50, 3),
            (row.cps, 0),
            (row.rtt_p50_us, 1),
            (row.udp_p50_us, 1),
            (row.program_s, 3),
            (row.update_p99_ms, 3),
            (row.rss_mb, 1),
        ];
        add(&mut out, format_args!("<tr><td>{}</td><td>{}</td>", escape(row.mode), row.services));
        for (value, digits) in cells {
            let text = value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"));
            add(&mut out, format_args!("<td>{text}</td>"));
        }
        add(&mut out, format_args!("<td>{}</td></tr>\n", row.failed));
    }
    out.push_str("</table></div>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Way;
    use crate::row::{Absent, tests::example};

    fn entries() -> Vec<Entry> {
        let row = |way, services, us| Entry::Row(Box::new(example(way, services, 40, us)));
        vec![
            row(Way::Direct, 10, 40),
            row(Way::Ebpf, 10, 41),
            row(Way::Ebpf, 100_000, 41),
            row(Way::Iptables, 10, 45),
            row(Way::Iptables, 100_000, 9_000),
            Entry::Absent(Absent { mode: "ipvs", services: 10, unavailable: "<no & such>".to_owned() }),
        ]
    }

    #[test]
    fn the_page_stands_alone_and_escapes() {
        let page = page(&entries());
        assert!(!page.contains("http") && !page.contains("<script"), "refers to nothing outside");
        assert!(page.contains("&lt;no &amp; such&gt;"));
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(page.contains("prefers-color-scheme:dark"));
        assert!(page.contains("var(--ebpf)"));
    }

    #[test]
    fn services_are_on_a_logarithmic_axis() {
        let scale = Scale { from: 10.0, to: 1000.0, low: 0.0, high: 10.0, log: false };
        let middle = (scale.x(10.0) + scale.x(1000.0)) / 2.0;
        assert!((scale.x(100.0) - middle).abs() < 0.01);
        assert!(scale.y(10.0) < scale.y(0.0));
    }

    #[test]
    fn every_value_lies_within_the_marks() {
        for values in [[0.5, 3.0], [1.0, 10_000.0], [0.002, 0.9], [7.0, 7.0]] {
            let curves: Vec<Curve> = vec![("ebpf", vec![(10.0, values[0]), (100.0, values[1])])];
            let scale = Scale::of(&curves);
            let marks = scale.marks();
            assert!(marks.len() >= 2 && marks.len() <= 9, "{marks:?}");
            assert!(
                values.iter().all(|v| *v >= marks[0] - 1e-9 && *v <= marks[marks.len() - 1] + 1e-9),
                "{marks:?}"
            );
        }
    }
}
