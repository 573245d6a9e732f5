//! What the agent counts, in Prometheus' text form.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

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
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
        for line in [
            "sheave_agent_pods 3",
            "sheave_agent_probes_total{probe=\"Liveness\",result=\"Success\"} 1",
            "sheave_agent_pod_start_seconds_bucket{le=\"0.1\"} 1",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
