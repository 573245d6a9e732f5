//! The Lease by which the cluster knows that this node is alive. It is renewed whatever else the agent is
//! busy with, and made anew when it is gone.

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::client::{ApiError, Client, chain};
use crate::limits;

/// Renews the Lease of `node_name` until `shutdown`. `node_uid` is asked at each creation; `revived` is
/// notified when a renewal works after one that did not.
pub async fn keep(
    client: Client,
    node_name: String,
    node_uid: tokio::sync::watch::Receiver<String>,
    revived: std::sync::Arc<tokio::sync::Notify>,
    shutdown: CancellationToken,
) {
    let mut ticks = tokio::time::interval(limits::secs(limits::LEASE_RENEW_PERIOD_S));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let mut pause = tokio::time::Duration::from_millis(limits::API_RETRY_FIRST_MS);
        loop {
            let uid = node_uid.borrow().clone();
            match renew(&client, &node_name, &uid).await {
                Ok(()) => {
                    if failing {
                        tracing::info!("the node's Lease is renewed again");
                        revived.notify_one();
                    }
                    failing = false;
                    break;
                }
                Err(error) => {
                    if !failing {
                        tracing::warn!(error = chain(&error), "renewing the node's Lease");
                    }
                    failing = true;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => return,
            }
            pause = (pause * 2).min(limits::secs(limits::WATCH_RETRY_MAX_S));
        }
    }
}

async fn renew(client: &Client, node_name: &str, node_uid: &str) -> Result<(), ApiError> {
    let base = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    let now = Timestamp::now();
    let patch = json!({"spec": {"renewTime": micro_time(now), "holderIdentity": node_name,
        "leaseDurationSeconds": limits::LEASE_DURATION_S}});
    match client.merge(&format!("{base}/{node_name}"), &patch).await {
        Err(error) if error.code() == Some(404) => {
            client.create(base, &lease(node_name, node_uid, now)).await.map(|_| ())
        }
        other => other.map(|_| ()),
    }
}

fn lease(node_name: &str, node_uid: &str, now: Timestamp) -> Value {
    let mut metadata = json!({"name": node_name, "namespace": "kube-node-lease"});
    if !node_uid.is_empty() {
        metadata["ownerReferences"] =
            json!([{"apiVersion": "v1", "kind": "Node", "name": node_name, "uid": node_uid}]);
    }
    json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata,
        "spec": {"holderIdentity": node_name, "leaseDurationSeconds": limits::LEASE_DURATION_S,
            "renewTime": micro_time(now)}})
}

/// An instant as the API's MicroTime.
fn micro_time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_belongs_to_its_node() {
        let at = Timestamp::from_microsecond(1_700_000_000_000_042).expect("an instant");
        let made = lease("n1", "uid-1", at);
        assert_eq!(made["spec"]["renewTime"], "2023-11-14T22:13:20.000042Z");
        assert_eq!(made["metadata"]["ownerReferences"][0]["uid"], "uid-1");
        assert_eq!(lease("n1", "", at)["metadata"].get("ownerReferences"), None);
    }
}
