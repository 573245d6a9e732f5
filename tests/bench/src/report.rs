//! What a benchmark says: one record a figure, with its unit, the bar it is held to and whether it meets it. A record
//! without a bar informs; only measured values enter one.

use serde_json::{Map, Value, json};

/// Which side of the bar is good.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bar {
    /// The value must not exceed this.
    AtMost(f64),
    /// The value must reach this.
    AtLeast(f64),
    /// For information.
    None,
}

impl Bar {
    fn meets(self, value: f64) -> Option<bool> {
        match self {
            Self::AtMost(bar) => Some(value <= bar),
            Self::AtLeast(bar) => Some(value >= bar),
            Self::None => None,
        }
    }

    fn show(self) -> String {
        match self {
            Self::AtMost(bar) => format!("<= {bar}"),
            Self::AtLeast(bar) => format!(">= {bar}"),
            Self::None => String::new(),
        }
    }
}

/// Collects a benchmark's records and prints each as it comes.
#[derive(Debug)]
pub(crate) struct Report {
    bench: &'static str,
    json: bool,
    missed: usize,
    header_shown: bool,
}

impl Report {
    pub(crate) fn new(bench: &'static str, json: bool) -> Self {
        Self { bench, json, missed: 0, header_shown: false }
    }

    /// Records one figure; `params` says under which circumstances it was taken.
    pub(crate) fn add(&mut self, metric: &str, value: f64, unit: &str, bar: Bar, params: &[(&str, Value)]) {
        let meets = bar.meets(value);
        if meets == Some(false) {
            self.missed += 1;
        }
        if self.json {
            println!("{}", self.line(metric, value, unit, bar, params));
            return;
        }
        if !self.header_shown {
            println!("{:<44} {:>12} {:<8} {:>10}  meets  parameters", "metric", "value", "unit", "bar");
            self.header_shown = true;
        }
        let meets = match meets {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "",
        };
        let params: Vec<String> = params.iter().map(|(key, value)| format!("{key}={value}")).collect();
        println!(
            "{metric:<44} {:>12} {unit:<8} {:>10}  {meets:<5}  {}",
            round(value),
            bar.show(),
            params.join(" ")
        );
    }

    fn line(&self, metric: &str, value: f64, unit: &str, bar: Bar, params: &[(&str, Value)]) -> Value {
        let mut line = Map::new();
        line.insert("bench".into(), json!(self.bench));
        line.insert("metric".into(), json!(metric));
        line.insert("value".into(), json!(round(value)));
        line.insert("unit".into(), json!(unit));
        let limit = match bar {
            Bar::AtMost(bar) | Bar::AtLeast(bar) => json!(bar),
            Bar::None => Value::Null,
        };
        line.insert("bar".into(), limit);
        line.insert("meets".into(), json!(bar.meets(value)));
        line.extend(params.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        Value::Object(line)
    }

    /// The last word, for a reader: how many figures missed their bar.
    pub(crate) fn finish(self) {
        if !self.json {
            println!("{}: {} figures missed their bar", self.bench, self.missed);
        }
    }
}

/// The release of the kernel that runs this.
pub(crate) fn kernel() -> String {
    nix::sys::utsname::uname()
        .map_or_else(|_| String::new(), |name| name.release().to_string_lossy().into_owned())
}

fn round(value: f64) -> f64 {
    let digits = if value.abs() >= 100.0 { 10.0 } else { 1000.0 };
    (value * digits).round() / digits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_met_from_its_good_side_only() {
        assert_eq!(Bar::AtMost(1.05).meets(1.05), Some(true));
        assert_eq!(Bar::AtMost(1.05).meets(1.06), Some(false));
        assert_eq!(Bar::AtLeast(3000.0).meets(2999.0), Some(false));
        assert_eq!(Bar::None.meets(7.0), None);
    }

    #[test]
    fn a_line_has_the_agreed_keys_and_its_parameters() {
        let line = Report::new("connect", true).line(
            "ratio",
            1.01234,
            "x",
            Bar::AtMost(1.05),
            &[("services", json!(10))],
        );
        assert_eq!(
            line,
            json!({"bench": "connect", "metric": "ratio", "value": 1.012, "unit": "x", "bar": 1.05,
                   "meets": true, "services": 10})
        );
    }
}
