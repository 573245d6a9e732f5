//! Whether the service proxy works, for whoever answers load balancers. Invariant: it is healthy only while the kernel
//! has, or soon will have, what the cluster wants.

use crate::limits;
use crate::service::ObjectKey;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is known of the proxy's health.
#[derive(Debug, Default)]
struct Known {
    /// When a round last succeeded.
    updated: Option<jiff::Timestamp>,
    /// Since when changes wait that are not in the kernel.
    pending: Option<Instant>,
    /// The node is about to go, so that load balancers must not choose it.
    leaving: bool,
    /// The agent is about to end.
    stopping: bool,
}

/// The service proxy's health, shared by clones: the data plane writes it, the servers read it.
#[derive(Debug, Clone, Default)]
pub struct ProxyHealth(Arc<Mutex<Known>>);

/// The answer to a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// The table is, or soon will be, what the cluster wants.
    pub(crate) healthy: bool,
    /// Rounds come to an end.
    pub(crate) alive: bool,
    /// The node is there to stay.
    pub(crate) eligible: bool,
    /// When a round last succeeded.
    pub(crate) updated: Option<jiff::Timestamp>,
}

impl ProxyHealth {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A round begins: what waits now must be in the kernel before long.
    pub fn begins(&self) {
        self.lock().pending.get_or_insert_with(Instant::now);
    }

    /// A round succeeded.
    pub fn updated(&self) {
        let mut known = self.lock();
        known.updated = Some(jiff::Timestamp::now());
        known.pending = None;
    }

    /// Says whether the node is deleted or about to be scaled away; true when that is news.
    pub fn set_leaving(&self, leaving: bool) -> bool {
        std::mem::replace(&mut self.lock().leaving, leaving) != leaving
    }

    /// The agent is about to end.
    pub fn stop(&self) {
        self.lock().stopping = true;
    }

    /// Whether the table is, or soon will be, what the cluster wants.
    pub fn is_healthy(&self) -> bool {
        self.verdict(Instant::now()).healthy
    }

    /// The answer at `now`.
    pub(crate) fn verdict(&self, now: Instant) -> Verdict {
        let known = self.lock();
        let limit = Duration::from_secs(limits::PROXY_STALE_S);
        let stale = known.pending.is_some_and(|since| now.saturating_duration_since(since) > limit);
        Verdict {
            healthy: known.updated.is_some() && !stale && !known.stopping,
            alive: !stale,
            eligible: !known.leaving,
            updated: known.updated,
        }
    }
}

/// One service's check, as the data plane tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceCheck {
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Ready endpoints on this node.
    pub local_ready: usize,
}

/// All checks that there are.
pub type ServiceChecks = BTreeMap<ObjectKey, ServiceCheck>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_is_fresh_programming_on_a_node_that_stays() {
        let health = ProxyHealth::default();
        let start = Instant::now();
        assert_eq!(
            health.verdict(start),
            Verdict { healthy: false, alive: true, eligible: true, updated: None }
        );
        health.begins();
        health.updated();
        let fresh = health.verdict(start);
        assert!(fresh.healthy && fresh.alive);
        health.begins();
        let late = Instant::now() + Duration::from_secs(limits::PROXY_STALE_S + 1);
        let stale = health.verdict(late);
        assert!(!stale.healthy && !stale.alive && stale.updated.is_some());
        health.begins();
        assert!(!health.verdict(late).alive, "what waits, waits since it first did");
        health.updated();
        assert!(health.verdict(late).alive);
        health.set_leaving(true);
        let leaving = health.verdict(late);
        assert!(leaving.healthy && !leaving.eligible);
        health.stop();
        assert!(!health.is_healthy() && health.verdict(late).alive);
    }
}
