//! Whether this node is about to go, for load balancers (KEP-3836). Invariant: a Node that can't be watched, or does not
//! exist, is taken for one that stays.

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use tokio_util::sync::CancellationToken;

use crate::dataplane::ProxyHealth;

/// The taint that the cluster autoscaler puts on a node before it takes it away.
const TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// Whether the node is deleted or about to be scaled away.
fn is_leaving(node: &Node) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    node.metadata.deletion_timestamp.is_some()
        || taints.is_some_and(|taints| taints.iter().any(|taint| taint.key == TAINT))
}

/// Watches this node's object and says in `health` whether the node is leaving, until `shutdown`.
pub(crate) async fn watch(client: Client, name: String, health: ProxyHealth, shutdown: CancellationToken) {
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut nodes = std::pin::pin!(watcher(Api::<Node>::all(client), config).default_backoff());
    loop {
        let next = tokio::select! {
            next = nodes.next() => next,
            () = shutdown.cancelled() => return,
        };
        match next {
            Some(Ok(watcher::Event::Apply(node) | watcher::Event::InitApply(node))) => {
                let leaving = is_leaving(&node);
                if health.set_leaving(leaving) {
                    tracing::info!(leaving, "load balancers are told whether this node stays");
                }
            }
            // Without a Node there is nothing that says so.
            Some(Ok(watcher::Event::Delete(_))) => drop(health.set_leaving(false)),
            Some(Ok(watcher::Event::Init | watcher::Event::InitDone)) => {}
            Some(Err(error)) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "watching this node; trying again");
            }
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_node_leaves_when_it_is_deleted_or_tainted() {
        let node = |value| is_leaving(&serde_json::from_value(value).expect("a Node"));
        assert!(!node(json!({"metadata": {"name": "n"}})));
        assert!(!node(json!({"spec": {"taints": [{"key": "other", "effect": "NoSchedule"}]}})));
        assert!(node(json!({"spec": {"taints": [{"key": TAINT, "effect": "NoSchedule", "value": "1"}]}})));
        assert!(node(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})));
    }
}
