//! Other nodes, watched. Invariant: what is told is a whole list, and nothing is told before the first list is complete,
//! so that nobody takes a node that was not listed yet for one that left.

use std::collections::BTreeMap;

use futures::StreamExt as _;
use ipnetwork::IpNetwork;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::client::chain;
use super::node::WireNode;
use super::pods::Reconnect;
use crate::network::overlay::Peer;

/// A node as far as others care: its age, and how it is reached.
type Row = (Option<Time>, Peer);

fn row(node: &WireNode) -> Option<(String, Row)> {
    let meta = kube::Resource::meta(node);
    let name = meta.name.clone()?;
    let peer = Peer { name: name.clone(), node_ips: node.internal_ips(), pod_cidrs: node.pod_cidrs() };
    Some((name, (meta.creation_timestamp.clone(), peer)))
}

/// The peers: older ones first, who is not complete yet left out.
fn list(rows: &BTreeMap<String, Row>, own_name: &str) -> Vec<Peer> {
    let mut others: Vec<&Row> = rows.values().filter(|(_, peer)| peer.name != own_name).collect();
    others.retain(|(_, peer)| !peer.node_ips.is_empty() && !peer.pod_cidrs.is_empty());
    others.sort_by(|(a, p), (b, q)| a.cmp(b).then_with(|| p.name.cmp(&q.name)));
    others.into_iter().map(|(_, peer)| peer.clone()).collect()
}

/// Why other nodes would not find this node's pods, if the Node says other ranges than those in use.
fn mismatch(rows: &BTreeMap<String, Row>, own_name: &str, own_ranges: &[IpNetwork]) -> Option<String> {
    let (_, own) = rows.get(own_name)?;
    let missing = own_ranges.iter().find(|range| !own.pod_cidrs.contains(range))?;
    (!own.pod_cidrs.is_empty()).then(|| {
        format!(
            "pods of this node get addresses of {missing}, but its Node has spec.podCIDRs {:?}: other nodes do not \
             find them; leave --pod-cidr out",
            own.pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>()
        )
    })
}

/// Tells the other nodes of the cluster whenever they change, until `shutdown`.
pub(crate) async fn watch(
    client: kube::Client,
    own_name: String,
    own_ranges: Vec<IpNetwork>,
    told: watch::Sender<Option<Vec<Peer>>>,
    shutdown: CancellationToken,
) {
    let api: kube::Api<WireNode> = kube::Api::all(client);
    let mut events = std::pin::pin!(watcher(api, watcher::Config::default()).backoff(Reconnect::default()));
    let (mut rows, mut listed): (BTreeMap<String, Row>, _) = (BTreeMap::new(), BTreeMap::new());
    let (mut synced, mut warned) = (false, None);
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = shutdown.cancelled() => return,
        };
        match event {
            None => return,
            Some(Ok(watcher::Event::Init)) => listed.clear(),
            Some(Ok(watcher::Event::InitApply(node))) => listed.extend(row(&node)),
            Some(Ok(watcher::Event::InitDone)) => {
                rows = std::mem::take(&mut listed);
                synced = true;
            }
            Some(Ok(watcher::Event::Apply(node))) => rows.extend(row(&node)),
            Some(Ok(watcher::Event::Delete(node))) => {
                if let Some((name, _)) = row(&node) {
                    rows.remove(&name);
                }
            }
            Some(Err(error)) => {
                tracing::warn!(error = chain(&error), "watching the other nodes; trying again");
                continue;
            }
        }
        if synced {
            let wrong = mismatch(&rows, &own_name, &own_ranges);
            if let Some(why) = wrong.as_ref().filter(|_| wrong != warned) {
                tracing::warn!(why, "pod ranges");
            }
            warned = wrong;
            let peers = Some(list(&rows, &own_name));
            told.send_if_modified(|held| {
                let changed = *held != peers;
                *held = peers;
                changed
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, made: &str, ips: &[&str], ranges: &[&str]) -> (String, Row) {
        let ips: Vec<_> =
            ips.iter().map(|ip| serde_json::json!({"type": "InternalIP", "address": ip})).collect();
        let node = serde_json::json!({
            "metadata": {"name": name, "creationTimestamp": made},
            "spec": {"podCIDRs": ranges}, "status": {"addresses": ips}});
        row(&serde_json::from_value(node).unwrap()).unwrap()
    }

    #[test]
    fn older_nodes_come_first_and_incomplete_ones_are_left_out() {
        let rows = BTreeMap::from([
            node("a", "2026-01-02T00:00:00Z", &["192.0.2.1", "2001:db8::1"], &["10.244.1.0/24"]),
            node("b", "2026-01-01T00:00:00Z", &["192.0.2.2"], &["10.244.2.0/24", "fd00::/64"]),
            node("c", "2026-01-01T00:00:00Z", &[], &["10.244.3.0/24"]),
            node("d", "2026-01-01T00:00:00Z", &["192.0.2.4"], &[]),
            node("me", "2026-01-01T00:00:00Z", &["192.0.2.5"], &["10.244.5.0/24"]),
        ]);
        let names: Vec<String> = list(&rows, "me").into_iter().map(|peer| peer.name).collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!(list(&rows, "me")[1].node_ips.len(), 2);
        let ranges = |range: &str| vec![range.parse().unwrap()];
        assert_eq!(mismatch(&rows, "me", &ranges("10.244.5.0/24")), None);
        let why = mismatch(&rows, "me", &ranges("10.244.6.0/24")).unwrap();
        assert!(why.contains("10.244.6.0/24") && why.contains("10.244.5.0/24"), "{why}");
        assert_eq!(mismatch(&rows, "d", &ranges("10.244.6.0/24")), None, "it has none yet");
    }
}
