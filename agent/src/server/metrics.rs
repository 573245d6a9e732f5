//! What the agent counts, in Prometheus' text form.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::dataplane::DataplaneStats;
use crate::pod::probe::{ProbeKind, ProbeResult};

/// Labels of a probe result.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ProbeLabels {
    /// Which question.
    pub probe: ProbeName,
    /// What was answered.
    pub result: ResultName,
}

/// `probe` label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(missing_docs, reason = "the kinds of the API")]
pub enum ProbeName {
    Startup,
    Liveness,
    Readiness,
}

/// `result` label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(missing_docs, reason = "the names tell")]
pub enum ResultName {
    Success,
    Failure,
    Unknown,
}

/// The agent's metrics; cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Pods that the agent has a worker for.
    pub pods: Gauge,
    /// Containers that run.
    pub containers: Gauge,
    /// Starts of containers that had run before.
    pub restarts: Counter,
    /// Answers to probes.
    pub probes: Family<ProbeLabels, Counter>,
    /// Seconds from the first sight of a pod to its being ready.
    pub pod_start: Histogram,
    /// Seconds that the start of a container took.
    pub container_start: Histogram,
    /// Status reports that were accepted.
    pub status_reports: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let buckets = || [0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
        Metrics {
            pods: Gauge::default(),
            containers: Gauge::default(),
            restarts: Counter::default(),
            probes: Family::default(),
            pod_start: Histogram::new(buckets()),
            container_start: Histogram::new(buckets()),
            status_reports: Counter::default(),
        }
    }
}

impl Metrics {
    /// Counts an answer.
    pub fn probed(&self, kind: ProbeKind, result: &ProbeResult) {
        let probe = match kind {
            ProbeKind::Startup => ProbeName::Startup,
            ProbeKind::Liveness => ProbeName::Liveness,
            ProbeKind::Readiness => ProbeName::Readiness,
        };
        let result = match result {
            ProbeResult::Success => ResultName::Success,
            ProbeResult::Failure(_) => ResultName::Failure,
            ProbeResult::Unknown(_) => ResultName::Unknown,
        };
        self.probes.get_or_create(&ProbeLabels { probe, result }).inc();
    }

    /// Registers everything.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("sheave_agent_pods", "Pods on this node", self.pods.clone());
        registry.register("sheave_agent_containers_running", "Containers that run", self.containers.clone());
        registry.register(
            "sheave_agent_container_restarts",
            "Containers started again",
            self.restarts.clone(),
        );
        registry.register("sheave_agent_probes", "Answers to probes", self.probes.clone());
        registry.register(
            "sheave_agent_pod_start_seconds",
            "From the first sight of a pod to its being ready",
            self.pod_start.clone(),
        );
        registry.register(
            "sheave_agent_container_start_seconds",
            "How long the start of a container took",
            self.container_start.clone(),
        );
        registry.register(
            "sheave_agent_status_reports",
            "Status reports that the API accepted",
            self.status_reports.clone(),
        );
    }
}

/// Writes the figures of network policies and the fast path as text.
pub fn write_policies(out: &mut String, figures: &crate::policy::driver::PolicyFigures) {
    let number = |n: usize| u32::try_from(n).map_or(f64::MAX, f64::from);
    let mut gauge = |name: &str, help: &str, value: f64| {
        family(out, name, "gauge", help);
        line(out, name, "", value);
    };
    gauge("sheave_network_policies", "Network policies known from the API", number(figures.policies));
    gauge("sheave_network_devices", "Devices that network policies are enforced at", number(figures.devices));
    let enforced = f64::from(u8::from(figures.problem.is_empty()));
    gauge("sheave_network_policies_enforced", "1 while the kernel has what the policies want", enforced);
    family(out, "sheave_network_changes", "counter", "Changes of policies written to the kernel");
    line(out, "sheave_network_changes_total", "", figures.changes);
    family(out, "sheave_network_reasons", "counter", "What became of pods' packets and flows, by reason");
    for (counter, count) in &figures.counters {
        let (name, drop) = (counter.name(), counter.is_drop());
        line(out, "sheave_network_reasons_total", &format!("{{reason=\"{name}\",drop=\"{drop}\"}}"), *count);
    }
}

/// Writes the data plane's figures as text, before those of the registry.
pub fn write_dataplane(out: &mut String, stats: &DataplaneStats) {
    let mut gauge = |name: &str, help: &str, value: f64| {
        family(out, name, "gauge", help);
        line(out, name, "", value);
    };
    let number = |n: usize| u32::try_from(n).map_or(f64::MAX, f64::from);
    gauge("sheave_services", "Services known from the API", number(stats.services));
    gauge("sheave_services_refused", "Services not wholly in the table", number(stats.services_refused));
    gauge("sheave_dataplane_synced", "1 once the table was applied", f64::from(u8::from(stats.synced)));
    if let Some(usage) = &stats.usage {
        gauge("sheave_dataplane_frontends", "Frontends in the table", number(usage.frontends));
        gauge("sheave_dataplane_slots", "Slots in the table", number(usage.slots));
        gauge("sheave_dataplane_backends", "Backends in the table", number(usage.backends));
    }
    let last = stats.last_apply.as_secs_f64();
    gauge("sheave_dataplane_apply_seconds", "Duration of the last change of the table", last);
    let mut counter = |name: &str, help: &str, value: u64| {
        family(out, name, "counter", help);
        line(out, &format!("{name}_total"), "", value);
    };
    counter("sheave_dataplane_applies", "Changes written to the kernel", stats.applies_total);
    counter("sheave_dataplane_apply_errors", "Changes that failed", stats.apply_errors_total);
    counter("sheave_dataplane_attach_errors", "Attachments that failed", stats.attach_errors_total);
    counter(
        "sheave_dataplane_entries_written",
        "Map entries written or deleted",
        stats.entries_written_total,
    );
    if let Some((mode, _)) = &stats.mode {
        family(out, "sheave_dataplane_mode", "gauge", "1 for the data plane that is at work");
        line(out, "sheave_dataplane_mode", &format!("{{mode=\"{}\"}}", mode.name()), 1);
    }
    for (name, help) in [
        ("sheave_map_entries", "Entries of a table, an estimate for large ones"),
        ("sheave_map_capacity", "Entries that a table has room for"),
    ] {
        family(out, name, "gauge", help);
        for at in &stats.pressure {
            let value = if name == "sheave_map_entries" { at.entries } else { at.capacity };
            line(out, name, &format!("{{map=\"{}\"}}", at.map), value);
        }
    }
    family(out, "sheave_dataplane_reasons", "counter", "Why the kernel's programs did what they did");
    for (reason, count) in &stats.reasons {
        let labels = format!("{{reason=\"{}\",drop=\"{}\"}}", reason.name(), reason.is_drop());
        line(out, "sheave_dataplane_reasons_total", &labels, count);
    }
}

fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    out.push_str(&format!("# HELP {name} {help}.\n# TYPE {name} {kind}\n"));
}

fn line(out: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    out.push_str(&format!("{name}{labels} {value}\n"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_written_as_text() {
        let metrics = Metrics::default();
        metrics.probed(ProbeKind::Liveness, &ProbeResult::Success);
        metrics.pods.set(3);
        metrics.pod_start.observe(0.07);
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let mut text = String::new();
        let reasons = vec![(sheave_ebpf_abi::Counter::Connect, 7)];
        write_dataplane(&mut text, &DataplaneStats { services: 2, reasons, ..DataplaneStats::default() });
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
        for line in [
            "sheave_agent_pods 3",
            "sheave_services 2",
            "sheave_dataplane_reasons_total{reason=\"connect_translated\",drop=\"false\"} 7",
            "sheave_agent_probes_total{probe=\"Liveness\",result=\"Success\"} 1",
            "sheave_agent_pod_start_seconds_bucket{le=\"0.1\"} 1",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }

    /// Every name that the dashboard's queries use.
    fn queried(dashboard: &serde_json::Value, names: &mut std::collections::BTreeSet<String>) {
        match dashboard {
            serde_json::Value::Object(fields) => {
                for (field, value) in fields {
                    if let ("expr" | "query", Some(query)) = (field.as_str(), value.as_str()) {
                        let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
                        let ours =
                            |name: &&str| name.starts_with("kubeproxy_") || name.starts_with("sheave_");
                        names.extend(query.split(word).filter(ours).map(str::to_owned));
                    }
                    queried(value, names);
                }
            }
            serde_json::Value::Array(all) => all.iter().for_each(|value| queried(value, names)),
            _ => {}
        }
    }

    #[test]
    fn every_metric_of_the_dashboard_is_exported() {
        let text = include_str!("../../../deploy/grafana-services.json");
        let mut names = std::collections::BTreeSet::new();
        queried(&serde_json::from_str(text).expect("the dashboard is JSON"), &mut names);
        assert!(names.len() > 20, "{names:?}");
        let stats = crate::dataplane::StatsHandle::default();
        let mut registry = Registry::default();
        stats.proxy.register(&mut registry);
        let code = crate::dataplane::CodeLabels { code: 200 };
        stats.proxy.healthz.get_or_create(&code).inc();
        stats.proxy.livez.get_or_create(&code).inc();
        stats.proxy.set_no_local_endpoints(0, 0);
        let figures = DataplaneStats {
            mode: Some((crate::dataplane::Mode::Ebpf, String::new())),
            reasons: vec![(sheave_ebpf_abi::Counter::Connect, 1)],
            pressure: vec![crate::dataplane::Pressure { map: "flows", entries: 1, capacity: 2 }],
            ..DataplaneStats::default()
        };
        let mut exported = String::new();
        write_dataplane(&mut exported, &figures);
        prometheus_client::encoding::text::encode(&mut exported, &registry).expect("text");
        let has = |name: &str| {
            exported.lines().any(|line| {
                let rest = line.strip_prefix(name);
                rest.is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '))
            })
        };
        let missing: Vec<_> = names.iter().filter(|name| !has(name)).collect();
        assert!(missing.is_empty(), "{missing:?} in {exported}");
    }
}
