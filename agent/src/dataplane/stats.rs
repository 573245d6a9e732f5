//! Figures of the data plane for whoever serves `/metrics`. Invariant: taking a snapshot never waits for the data
//! plane's thread longer than it takes to copy a few numbers.

use super::ebpf::{Counters, Pressure};
use super::{Mode, ProxyHealth, ProxyMetrics, ServiceChecks};
use crate::service::{ObjectKey, Refusal, Usage};
use sheave_ebpf_abi::Counter;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// What is known now.
#[derive(Clone, Debug, Default)]
pub struct DataplaneStats {
    /// Whether both watches have told everything and the table was applied at least once.
    pub synced: bool,
    /// Which data plane is at work, and why it.
    pub mode: Option<(Mode, String)>,
    /// Services known from the API.
    pub services: usize,
    /// Services that are not, or not wholly, in the table.
    pub services_refused: usize,
    /// Those services, with the reasons.
    pub refused: Arc<BTreeMap<ObjectKey, Vec<Refusal>>>,
    /// How full the maps are that the programs fill, as of the last repair.
    pub pressure: Vec<Pressure>,
    /// How full the table is; `None` before the data plane is open.
    pub usage: Option<Usage>,
    /// Rounds of changes that were written to the kernel.
    pub applies_total: u64,
    /// Rounds that failed; each is followed by a new start from what the kernel holds.
    pub apply_errors_total: u64,
    /// Failed attempts to attach or to re-attach.
    pub attach_errors_total: u64,
    /// Map entries written or deleted.
    pub entries_written_total: u64,
    /// UDP sockets that were ended because they were connected to a backend that is gone.
    pub sockets_ended_total: u64,
    /// How long the last round took, plan and write.
    pub last_apply: Duration,
    /// The longest of all rounds after the first.
    pub longest_apply: Duration,
    /// Reasons counted in the kernel, since its maps were made. Empty when they can't be read now.
    pub reasons: Vec<(Counter, u64)>,
}

#[derive(Debug, Default)]
struct Shared {
    figures: DataplaneStats,
    counters: Option<Arc<Counters>>,
}

/// A place for the figures, shared by clones.
#[derive(Clone, Debug)]
pub struct StatsHandle {
    shared: Arc<Mutex<Shared>>,
    /// What is counted under kube-proxy's names.
    pub proxy: ProxyMetrics,
    /// Whether the proxy works.
    pub health: ProxyHealth,
    checks: Arc<watch::Sender<ServiceChecks>>,
}

impl Default for StatsHandle {
    fn default() -> Self {
        Self {
            shared: Arc::default(),
            proxy: ProxyMetrics::default(),
            health: ProxyHealth::default(),
            checks: Arc::new(watch::Sender::default()),
        }
    }
}

impl StatsHandle {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        // Numbers stay usable whatever happened to the thread that wrote the last one.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The figures now, with the kernel's counters read afresh.
    pub fn snapshot(&self) -> DataplaneStats {
        let (mut figures, counters) = {
            let shared = self.lock();
            (shared.figures.clone(), shared.counters.clone())
        };
        if let Some(counters) = counters {
            match counters.read() {
                Ok(reasons) => figures.reasons = reasons,
                Err(error) => tracing::warn!(%error, "counters of the data plane"),
            }
        }
        figures
    }

    /// The services' health checks, now and whenever they change.
    pub fn checks(&self) -> watch::Receiver<ServiceChecks> {
        self.checks.subscribe()
    }

    pub(super) fn set_checks(&self, checks: ServiceChecks) {
        self.checks.send_if_modified(|held| {
            let changed = *held != checks;
            *held = checks;
            changed
        });
    }

    pub(super) fn set_counters(&self, counters: Counters) {
        self.lock().counters = Some(Arc::new(counters));
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut DataplaneStats)) {
        change(&mut self.lock().figures);
    }
}
