//! PURE: what came of a mode with a number of services. Invariant: a figure that was not taken is null, never zero.

use crate::bed::From;
use crate::blocks::{Blocks, Figure, Of, What, median, p99, trimmed_mean};
use crate::options::{Backends, Way};
use crate::stats::{Latencies, ratio};
use crate::wire::{Kind, Samples};
use serde::Serialize;
use std::collections::BTreeMap;

/// Blocks that make one moment where a hundredth of its samples is looked at.
const TOGETHER_P99: u32 = 20;

/// What a connection goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Through {
    /// No service.
    Direct,
    First,
    Random,
    Last,
}

impl Through {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::First => "first",
            Self::Random => "random",
            Self::Last => "last",
        }
    }
}

/// Where traffic started, of which kind it was, and what it went through.
pub(crate) type Path = (From, Kind, Through);

/// All that was measured in one bed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    pub(crate) traffic: BTreeMap<Path, Latencies>,
    /// Of short requests: until the answer was there.
    pub(crate) answers: BTreeMap<Path, Latencies>,
    /// The same by the moment.
    pub(crate) blocks: Blocks,
    pub(crate) open_s: Option<f64>,
    pub(crate) program_s: Option<f64>,
    pub(crate) updates: Option<Latencies>,
    pub(crate) churned: Option<u64>,
    pub(crate) rss_mb: Option<f64>,
    pub(crate) rss_peak_mb: Option<f64>,
    pub(crate) note: Option<String>,
    /// The first failure in words.
    pub(crate) failure: Option<String>,
}

impl Measured {
    /// Latencies through all three services.
    pub(crate) fn services(&self, from: From, kind: Kind) -> Latencies {
        let mut all = Latencies::new();
        for through in [Through::First, Through::Random, Through::Last] {
            self.traffic.get(&(from, kind, through)).into_iter().for_each(|part| all.add(part));
        }
        all
    }

    pub(crate) fn direct(&self, from: From, kind: Kind) -> Latencies {
        self.traffic.get(&(from, kind, Through::Direct)).cloned().unwrap_or_else(Latencies::new)
    }

    /// Takes note of samples of a moment.
    pub(crate) fn note(&mut self, (from, kind, through): Path, block: u32, samples: &Samples) {
        let (what, answer) = if through == Through::Direct {
            (What::Direct, What::DirectAnswer)
        } else {
            (What::Services, What::ServicesAnswer)
        };
        self.blocks.add((from, kind, what), block, &samples.ns);
        self.blocks.add((from, kind, answer), block, &samples.answer_ns);
        if through == Through::Last {
            self.blocks.add((from, kind, What::Last), block, &samples.ns);
        }
    }

    /// Adds the traffic of another bed that is like this one.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (all, more) in [(&mut self.traffic, &other.traffic), (&mut self.answers, &other.answers)] {
            more.iter().for_each(|(path, part)| all.entry(*path).or_insert_with(Latencies::new).add(part));
        }
        self.blocks.merge(&other.blocks);
        self.failure = self.failure.take().or_else(|| other.failure.clone());
    }

    /// `of` of a figure ÷ the same of another bed's, moment by moment.
    fn to(&self, figure: Figure, bare: &Self, of_bare: Figure, together: u32, of: Of) -> Option<f64> {
        self.blocks.ratio(figure, (&bare.blocks, of_bare), together, of)
    }

    pub(crate) fn failed(&self) -> u64 {
        self.traffic.values().map(Latencies::failed).sum()
    }
}

/// One path of traffic.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Line {
    pub(crate) from: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) through: &'static str,
    pub(crate) p50_us: Option<f64>,
    pub(crate) p90_us: Option<f64>,
    pub(crate) p99_us: Option<f64>,
    pub(crate) max_us: Option<f64>,
    /// p50 ÷ that of the same path without a service and with nothing loaded.
    pub(crate) ratio_p50_to_direct: Option<f64>,
    /// p50 until the answer to a short request was there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) answer_p50_us: Option<f64>,
    /// What one client did a second.
    pub(crate) per_second: Option<f64>,
    pub(crate) samples: u64,
    pub(crate) failed: u64,
}

/// A mode with a number of services: an object of the JSON output.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) mode: &'static str,
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
    pub(crate) backends: &'static str,
    /// From a pod through services: from making a socket until it is connected.
    pub(crate) connect_p50_us: Option<f64>,
    pub(crate) connect_p90_us: Option<f64>,
    pub(crate) connect_p99_us: Option<f64>,
    /// The same ÷ to a backend itself with nothing loaded, measured at the same time.
    pub(crate) ratio_connect_p50_to_direct: Option<f64>,
    pub(crate) ratio_connect_p99_to_direct: Option<f64>,
    /// The same ÷ to a backend itself beside the loaded data plane.
    pub(crate) ratio_connect_p50_to_direct_beside: Option<f64>,
    /// To a backend itself beside the loaded data plane, and ÷ with nothing loaded.
    pub(crate) direct_beside_p50_us: Option<f64>,
    pub(crate) ratio_direct_beside_p50: Option<f64>,
    /// With nothing loaded: one bed ÷ another that is just the same, which tells how exact ratios are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio_control_p50: Option<f64>,
    /// From outside through NodePorts: connect, and until a first request is answered, ÷ to the backend itself.
    pub(crate) ratio_node_port_connect_p50_to_direct: Option<f64>,
    pub(crate) ratio_node_port_answer_p50_to_direct: Option<f64>,
    /// Short requests a second of one client through the last service; the same ÷ to a backend itself.
    pub(crate) cps: Option<f64>,
    pub(crate) ratio_cps_to_direct: Option<f64>,
    /// A request and its answer on a connection that is kept.
    pub(crate) rtt_p50_us: Option<f64>,
    pub(crate) udp_p50_us: Option<f64>,
    /// From nothing until the kernel has all, opening the data plane included; the part that opening took.
    pub(crate) program_s: Option<f64>,
    pub(crate) open_s: Option<f64>,
    /// One change of an endpoint until the kernel has it.
    pub(crate) update_p50_ms: Option<f64>,
    pub(crate) update_p99_ms: Option<f64>,
    pub(crate) updates: Option<u64>,
    /// Changes made while traffic was measured.
    pub(crate) churned: Option<u64>,
    pub(crate) failed: u64,
    pub(crate) failure: Option<String>,
    /// Of the process that programs (of iptables: the largest that it ran).
    pub(crate) rss_mb: Option<f64>,
    pub(crate) rss_peak_mb: Option<f64>,
    pub(crate) note: Option<String>,
    pub(crate) paths: Vec<Line>,
}

/// A mode that this host doesn't have, or not with so many services.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Absent {
    pub(crate) mode: &'static str,
    pub(crate) services: u32,
    pub(crate) unavailable: String,
}

/// What a run has to say of a mode with a number of services.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Entry {
    Row(Box<Row>),
    Absent(Absent),
}

fn line(path: &Path, all: &Latencies, answers: Option<&Latencies>, bare: &Measured) -> Line {
    let (from, kind, through) = *path;
    Line {
        from: from.name(),
        kind: kind.name(),
        through: through.name(),
        p50_us: all.us(0.5),
        p90_us: all.us(0.9),
        p99_us: all.us(0.99),
        max_us: all.us(1.0),
        ratio_p50_to_direct: ratio(all.us(0.5), bare.direct(from, kind).us(0.5)),
        answer_p50_us: answers.and_then(|all| all.us(0.5)),
        per_second: all.per_second(),
        samples: all.len(),
        failed: all.failed(),
    }
}

/// The row of `way`; `bare` is what was measured at the same time with nothing loaded.
pub(crate) fn row(
    way: Way,
    (services, endpoints, backends): (u32, u32, Backends),
    measured: &Measured,
    bare: &Measured,
) -> Row {
    let is_direct = way == Way::Direct;
    let through =
        |from, kind| if is_direct { bare.direct(from, kind) } else { measured.services(from, kind) };
    let connect = through(From::Pod, Kind::Connect);
    let beside = measured.direct(From::Pod, Kind::Connect);
    // A row of direct is its own measure.
    let what = |of_services, of_direct| if is_direct { of_direct } else { of_services };
    let to_direct = |from, kind, (of_services, of_direct), together, of: Of| {
        measured.to((from, kind, what(of_services, of_direct)), bare, (from, kind, of_direct), together, of)
    };
    let (all, short) = ((What::Services, What::Direct), (What::Last, What::Direct));
    let answer = (What::ServicesAnswer, What::DirectAnswer);
    let pod = |kind, what| (From::Pod, kind, what);
    let direct = pod(Kind::Connect, What::Direct);
    let services_or_direct = pod(Kind::Connect, what(What::Services, What::Direct));
    let last_of_all = measured.blocks.typical(pod(Kind::Short, what(short.0, short.1)), 1, trimmed_mean);
    let ms = |quantile| measured.updates.as_ref().and_then(|all| all.us(quantile)).map(|us| us / 1000.0);
    Row {
        mode: way.name(),
        services,
        endpoints,
        backends: backends.name(),
        connect_p50_us: connect.us(0.5),
        connect_p90_us: connect.us(0.9),
        connect_p99_us: connect.us(0.99),
        ratio_connect_p50_to_direct: to_direct(From::Pod, Kind::Connect, all, 1, median),
        ratio_connect_p99_to_direct: to_direct(From::Pod, Kind::Connect, all, TOGETHER_P99, p99),
        ratio_connect_p50_to_direct_beside: measured.to(services_or_direct, measured, direct, 1, median),
        direct_beside_p50_us: beside.us(0.5),
        ratio_direct_beside_p50: measured.to(direct, bare, direct, 1, median),
        ratio_control_p50: None,
        ratio_node_port_connect_p50_to_direct: to_direct(From::Outside, Kind::Connect, all, 1, median),
        ratio_node_port_answer_p50_to_direct: to_direct(From::Outside, Kind::Short, answer, 1, median),
        cps: last_of_all.filter(|ns| *ns > 0.0).map(|ns| 1e9 / ns),
        ratio_cps_to_direct: ratio(Some(1.0), to_direct(From::Pod, Kind::Short, short, 1, trimmed_mean)),
        rtt_p50_us: through(From::Pod, Kind::Keepalive).us(0.5),
        udp_p50_us: through(From::Pod, Kind::Udp).us(0.5),
        program_s: measured.program_s,
        open_s: measured.open_s,
        update_p50_ms: ms(0.5),
        update_p99_ms: ms(0.99),
        updates: measured.updates.as_ref().map(Latencies::len),
        churned: measured.churned,
        failed: measured.failed(),
        failure: measured.failure.clone(),
        rss_mb: measured.rss_mb,
        rss_peak_mb: measured.rss_peak_mb,
        note: measured.note.clone(),
        paths: measured
            .traffic
            .iter()
            .map(|(path, all)| line(path, all, measured.answers.get(path), bare))
            .collect(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn took(us: u64) -> Latencies {
        let mut all = Latencies::new();
        (0..100).for_each(|_| all.record_ns(us * 1000));
        all
    }

    /// A run in which a connect takes `direct` µs to a backend with nothing loaded, and `service` µs through services.
    pub(crate) fn example(way: Way, services: u32, direct: u64, service: u64) -> Row {
        let mut bare = Measured::default();
        let add = |into: &mut Measured, kind, through, us| {
            into.traffic.insert((From::Pod, kind, through), took(us));
            let samples = Samples { ns: vec![us * 1000; 100], ..Samples::default() };
            into.note((From::Pod, kind, through), 0, &samples);
        };
        add(&mut bare, Kind::Connect, Through::Direct, direct);
        add(&mut bare, Kind::Short, Through::Direct, 2 * direct);
        let mut measured = Measured { program_s: Some(0.25), ..Measured::default() };
        for through in [Through::Direct, Through::First, Through::Random, Through::Last] {
            let us = if through == Through::Direct { direct } else { service };
            add(&mut measured, Kind::Connect, through, us);
            add(&mut measured, Kind::Short, through, 2 * us);
        }
        row(way, (services, 4, Backends::Unique), if way == Way::Direct { &bare } else { &measured }, &bare)
    }

    #[test]
    fn ratios_are_to_nothing_loaded() {
        let row = example(Way::Nftables, 10, 40, 44);
        assert!((row.ratio_connect_p50_to_direct.unwrap() - 1.1).abs() < 0.01);
        assert!((row.ratio_direct_beside_p50.unwrap() - 1.0).abs() < 0.01);
        assert!((row.cps.unwrap() - 1e6 / 88.0).abs() < 30.0);
        assert!((row.ratio_cps_to_direct.unwrap() - 1.0 / 1.1).abs() < 0.01);
        assert_eq!((row.rtt_p50_us, row.update_p99_ms), (None, None));
    }

    #[test]
    fn direct_is_its_own_measure() {
        let row = example(Way::Direct, 10, 40, 44);
        assert_eq!(row.ratio_connect_p50_to_direct, Some(1.0));
        assert_eq!(row.ratio_cps_to_direct, Some(1.0));
        assert_eq!(row.program_s, None);
    }

    #[test]
    fn a_row_has_every_promised_key_and_an_absent_mode_its_reason() {
        let value = serde_json::to_value(Entry::Row(Box::new(example(Way::Ebpf, 10, 40, 41)))).unwrap();
        for key in [
            "mode",
            "services",
            "endpoints",
            "connect_p50_us",
            "connect_p99_us",
            "ratio_connect_p50_to_direct",
            "ratio_connect_p99_to_direct",
            "cps",
            "rtt_p50_us",
            "program_s",
            "update_p99_ms",
            "failed",
            "rss_mb",
        ] {
            assert!(value.get(key).is_some(), "{key}");
        }
        let absent = Absent { mode: "ipvs", services: 10, unavailable: "no IPVS".to_owned() };
        assert_eq!(
            serde_json::to_value(Entry::Absent(absent)).unwrap(),
            serde_json::json!({"mode": "ipvs", "services": 10, "unavailable": "no IPVS"})
        );
    }
}
