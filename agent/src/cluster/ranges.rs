//! Ranges that the cluster gives this node's pods. Invariant: once known they are on disk, so that a node that starts
//! while its API is away goes on with what its pods have.

use std::path::{Path, PathBuf};

use futures::StreamExt as _;
use ipnetwork::IpNetwork;
use kube::runtime::{WatchStreamExt as _, watcher};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::client::{Client, chain};
use super::node::{Facts, WireNode};
use super::pods::Reconnect;
use crate::limits;

/// What is kept on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    node: String,
    pod_cidrs: Vec<IpNetwork>,
}

fn record_path(state_dir: &Path) -> PathBuf {
    state_dir.join("network/ranges.json")
}

fn remembered(state_dir: &Path, node: &str) -> Option<Vec<IpNetwork>> {
    let text = std::fs::read(record_path(state_dir)).ok()?;
    let record: Record = serde_json::from_slice(&text).ok()?;
    (record.node == node && !record.pod_cidrs.is_empty()).then_some(record.pod_cidrs)
}

fn remember(state_dir: &Path, node: &str, pod_cidrs: &[IpNetwork]) -> std::io::Result<()> {
    let record = Record { node: node.to_owned(), pod_cidrs: pod_cidrs.to_vec() };
    let path = record_path(state_dir);
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let new = path.with_extension("new");
    std::fs::write(&new, serde_json::to_vec(&record)?)?;
    std::fs::rename(&new, &path)
}

/// Waits until the Node has its ranges, and returns them; where the API can't be reached, those of the last time.
/// `register` makes the Node if it is not there. `None` when `shutdown` came first.
pub(crate) async fn wait(
    client: &Client,
    facts: &Facts,
    register: bool,
    state_dir: &Path,
    shutdown: &CancellationToken,
) -> Option<Vec<IpNetwork>> {
    let old = remembered(state_dir, &facts.name);
    let api: kube::Api<WireNode> = kube::Api::all(client.kube());
    let config = watcher::Config::default().fields(&format!("metadata.name={}", facts.name));
    let mut watch = std::pin::pin!(watcher(api, config).backoff(Reconnect::default()));
    let mut remind = tokio::time::interval(limits::secs(limits::RANGES_REMINDER_PERIOD_S));
    remind.tick().await;
    let (mut seen, mut absent) = (false, false);
    loop {
        let event = tokio::select! {
            event = watch.next() => event?,
            () = tokio::time::sleep(limits::millis(limits::API_RETRY_FIRST_MS)), if absent => {
                absent = !make(client, facts).await;
                continue;
            }
            _ = remind.tick() => {
                tracing::warn!(
                    node = facts.name,
                    "the Node has no spec.podCIDRs yet: let the cluster's controller manager allocate them, or give \
                     --pod-cidr"
                );
                continue;
            }
            () = shutdown.cancelled() => return None,
        };
        match event {
            Ok(watcher::Event::Init) => seen = false,
            Ok(watcher::Event::Apply(node) | watcher::Event::InitApply(node)) => {
                seen = true;
                let given = node.pod_cidrs();
                if !given.is_empty() {
                    if old.as_ref().is_some_and(|old| *old != given) {
                        tracing::warn!(?old, ?given, "the node's pod ranges are others than last time");
                    }
                    if let Err(error) = remember(state_dir, &facts.name, &given) {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "pod ranges are not on disk"
                        );
                    }
                    return Some(given);
                }
            }
            Ok(watcher::Event::InitDone) if seen => {}
            Ok(watcher::Event::InitDone | watcher::Event::Delete(_)) => {
                absent = register && !make(client, facts).await;
            }
            Err(error) => {
                if let Some(old) = old {
                    tracing::warn!(error = chain(&error), ?old, "no API server: pod ranges of the last time");
                    return Some(old);
                }
                tracing::warn!(error = chain(&error), "asking for the node's pod ranges");
            }
        }
    }
}

/// Makes the Node, without a status: that is told once pods can run here. False where it has to be tried again.
async fn make(client: &Client, facts: &Facts) -> bool {
    match client.create("/api/v1/nodes", &facts.bare_object()).await {
        Ok(_) => true,
        Err(error) if error.code() == Some(409) => true,
        Err(error) => {
            tracing::warn!(error = chain(&error), "registering the node");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_remembered_for_the_node_they_belong_to() {
        let dir = tempfile::tempdir().unwrap();
        let ranges: Vec<IpNetwork> =
            vec!["10.244.3.0/24".parse().unwrap(), "fd00:244:0:3::/64".parse().unwrap()];
        assert_eq!(remembered(dir.path(), "a"), None);
        remember(dir.path(), "a", &ranges).unwrap();
        assert_eq!(remembered(dir.path(), "a"), Some(ranges));
        assert_eq!(remembered(dir.path(), "b"), None);
        std::fs::write(record_path(dir.path()), "{").unwrap();
        assert_eq!(remembered(dir.path(), "a"), None);
    }
}
