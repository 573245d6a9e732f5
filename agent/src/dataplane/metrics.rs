//! What the service proxy counts, under kube-proxy's names where it has them, so that dashboards and alerts for
//! kube-proxy go on working. Invariant: a name that kube-proxy has means what it means there.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// `traffic_policy` label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "the label's values are kube-proxy's")]
#[expect(missing_docs, reason = "the names tell")]
pub enum TrafficPolicy {
    internal,
    external,
}

/// Labels of services without local endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PolicyLabels {
    /// Which policy wants a local endpoint.
    pub traffic_policy: TrafficPolicy,
}

/// Labels of answers to health checks.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CodeLabels {
    /// HTTP status.
    pub code: u16,
}

/// The service proxy's metrics; cheap to clone.
#[derive(Debug, Clone)]
pub struct ProxyMetrics {
    /// Seconds that a round took, plan and kernel.
    pub sync: Histogram,
    /// Those of `sync` that compared everything: the first one and those after an error.
    pub sync_full: Histogram,
    /// Those of `sync` that wrote only what had changed.
    pub sync_partial: Histogram,
    /// Seconds from a change of endpoints in the cluster to its being in the kernel.
    pub network_programming: Histogram,
    /// When a round last succeeded, in seconds since 1970.
    pub last_sync: Gauge<f64, AtomicU64>,
    /// When a change last came in, in seconds since 1970.
    pub last_queued: Gauge<f64, AtomicU64>,
    /// Changes of EndpointSlices that are not in the kernel yet.
    pub endpoints_pending: Gauge,
    /// Changes of EndpointSlices that came in.
    pub endpoints_total: Counter,
    /// Changes of Services that are not in the kernel yet.
    pub services_pending: Gauge,
    /// Changes of Services that came in.
    pub services_total: Counter,
    /// Services that have endpoints, but none where their policy wants them.
    pub no_local_endpoints: Family<PolicyLabels, Gauge>,
    /// Answers of `/healthz`.
    pub healthz: Family<CodeLabels, Counter>,
    /// Answers of `/livez`.
    pub livez: Family<CodeLabels, Counter>,
}

impl Default for ProxyMetrics {
    fn default() -> Self {
        // kube-proxy's buckets.
        let sync = || (0..15).map(|n| 0.001 * f64::from(1 << n));
        let programming = [0.25, 0.5].into_iter().chain((1..60).map(f64::from));
        let programming =
            programming.chain((60..120).step_by(5).chain((120..=300).step_by(30)).map(f64::from));
        Self {
            sync: Histogram::new(sync()),
            sync_full: Histogram::new(sync()),
            sync_partial: Histogram::new(sync()),
            network_programming: Histogram::new(programming),
            last_sync: Gauge::default(),
            last_queued: Gauge::default(),
            endpoints_pending: Gauge::default(),
            endpoints_total: Counter::default(),
            services_pending: Gauge::default(),
            services_total: Counter::default(),
            no_local_endpoints: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
        }
    }
}

fn now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

impl ProxyMetrics {
    /// A change came in. `endpoints`: of an EndpointSlice; otherwise of a Service.
    pub(super) fn queued(&self, endpoints: bool) {
        self.last_queued.set(now_s());
        if endpoints {
            self.endpoints_pending.inc();
            self.endpoints_total.inc();
        } else {
            self.services_pending.inc();
            self.services_total.inc();
        }
    }

    /// A round succeeded, and with it everything that had come in before. `triggers`: when the changes in it were made
    /// in the cluster, in seconds since 1970.
    pub(super) fn synced(&self, took: Duration, full: bool, triggers: &[f64]) {
        let now = now_s();
        self.sync.observe(took.as_secs_f64());
        if full { &self.sync_full } else { &self.sync_partial }.observe(took.as_secs_f64());
        self.last_sync.set(now);
        self.nothing_pending();
        for at in triggers {
            // Clocks of the cluster's machines differ by a little.
            self.network_programming.observe((now - at).max(0.0));
        }
    }

    /// What came in changed nothing.
    pub(super) fn nothing_pending(&self) {
        self.endpoints_pending.set(0);
        self.services_pending.set(0);
    }

    /// How many services lack the endpoints that a policy wants on this node.
    pub(crate) fn set_no_local_endpoints(&self, internal: usize, external: usize) {
        for (traffic_policy, count) in
            [(TrafficPolicy::internal, internal), (TrafficPolicy::external, external)]
        {
            let gauge = self.no_local_endpoints.get_or_create(&PolicyLabels { traffic_policy });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Registers everything.
    pub fn register(&self, registry: &mut Registry) {
        let proxy = registry.sub_registry_with_prefix("kubeproxy");
        let rules = "sync_proxy_rules";
        proxy.register(format!("{rules}_duration_seconds"), "Duration of a round", self.sync.clone());
        proxy.register(
            "sync_full_proxy_rules_duration_seconds",
            "Of those, the full ones",
            self.sync_full.clone(),
        );
        proxy.register(
            "sync_partial_proxy_rules_duration_seconds",
            "Of those, the incremental ones",
            self.sync_partial.clone(),
        );
        proxy.register(
            "network_programming_duration_seconds",
            "From a change of endpoints to its being in the kernel",
            self.network_programming.clone(),
        );
        let (last, queued) = (self.last_sync.clone(), self.last_queued.clone());
        proxy.register(format!("{rules}_last_timestamp_seconds"), "When a round last succeeded", last);
        proxy.register(
            format!("{rules}_last_queued_timestamp_seconds"),
            "When a change last came in",
            queued,
        );
        let pending = "Changes that are not in the kernel yet";
        proxy.register(format!("{rules}_endpoint_changes_pending"), pending, self.endpoints_pending.clone());
        proxy.register(format!("{rules}_service_changes_pending"), pending, self.services_pending.clone());
        let total = "Changes that came in";
        proxy.register(format!("{rules}_endpoint_changes"), total, self.endpoints_total.clone());
        proxy.register(format!("{rules}_service_changes"), total, self.services_total.clone());
        proxy.register(
            format!("{rules}_no_local_endpoints_total"),
            "Services that have endpoints, but none where their policy wants one",
            self.no_local_endpoints.clone(),
        );
        proxy.register("proxy_healthz", "Answers of /healthz", self.healthz.clone());
        proxy.register("proxy_livez", "Answers of /livez", self.livez.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kube_proxys() {
        let metrics = ProxyMetrics::default();
        metrics.queued(true);
        metrics.queued(false);
        metrics.queued(false);
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let text = |registry: &Registry| {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, registry).expect("text");
            text
        };
        let pending = text(&registry);
        assert!(pending.contains("kubeproxy_sync_proxy_rules_service_changes_pending 2"), "{pending}");
        metrics.synced(Duration::from_millis(3), true, &[now_s() - 0.3]);
        metrics.set_no_local_endpoints(1, 2);
        metrics.healthz.get_or_create(&CodeLabels { code: 503 }).inc();
        metrics.livez.get_or_create(&CodeLabels { code: 200 }).inc();
        let done = text(&registry);
        for line in [
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.002\"} 0",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\"} 1",
            "kubeproxy_sync_full_proxy_rules_duration_seconds_count 1",
            "kubeproxy_sync_partial_proxy_rules_duration_seconds_count 0",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"0.25\"} 0",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"300.0\"} 1",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 1",
            "kubeproxy_sync_proxy_rules_service_changes_total 2",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"} 2",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "kubeproxy_proxy_livez_total{code=\"200\"} 1",
        ] {
            assert!(done.contains(line), "{line} in {done}");
        }
    }
}
