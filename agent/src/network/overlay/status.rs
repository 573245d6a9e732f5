//! What the overlay tells of itself, and what it remembers until the next boot. Invariant: files are replaced whole.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::peers::{Peer, PeersFile};
use super::plan::{Plan, Wish, device_name};
use super::{Done, Inner, OverlayConfig};

/// How one range of a peer is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// The node.
    pub peer: String,
    /// Its range.
    pub range: String,
    /// Its address that packets go to.
    pub to: String,
    /// `vxlan` or `direct`.
    pub by: String,
    /// The device they leave by.
    pub link: String,
    /// Largest packet, bytes.
    pub mtu: u32,
}

/// State of the overlay.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The mode in force.
    pub mode: String,
    /// Ranges of this node's own pods.
    pub pod_cidrs: Vec<String>,
    /// Largest packet of a pod, bytes.
    pub pod_mtu: u32,
    /// Whether the peers are known to be all there are.
    pub synced: bool,
    /// VXLAN devices in use.
    pub tunnels: Vec<String>,
    /// The ways to peers.
    pub peers: Vec<PeerStatus>,
    /// Peers that are not reached, and why.
    pub refused: Vec<String>,
    /// What did not work in the last pass.
    pub failed: Vec<String>,
}

fn status_path(run_dir: &Path) -> PathBuf {
    run_dir.join("network/overlay.json")
}

fn peers_path(run_dir: &Path) -> PathBuf {
    run_dir.join("network/peers.json")
}

/// The state that the agent of this node told last; `None` where none did since the boot.
pub fn read_status(run_dir: &Path) -> std::io::Result<Option<Status>> {
    match std::fs::read(status_path(run_dir)) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Peers of the last run: until the API answers they are as good as any.
pub(super) fn remembered(config: &OverlayConfig) -> Vec<Peer> {
    let path = peers_path(&config.run_dir);
    if !path.exists() {
        return Vec::new();
    }
    match PeersFile::read(&path) {
        Ok(file) => file.nodes,
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "peers of the last run are forgotten");
            Vec::new()
        }
    }
}

fn replace(path: &Path, text: &[u8]) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(&new, path)
}

impl Plan {
    /// Whether a way leads through a device.
    pub(super) fn uses(&self, device: &str) -> bool {
        self.ways.iter().any(|way| way.link == device)
    }
}

impl Inner {
    /// Writes down what is, where it changed, and says in the log who came, went or is refused.
    pub(super) fn tell(&self, wish: &Wish, plan: &Plan, done: &Done) {
        let status = Status {
            mode: wish.mode.name().to_owned(),
            pod_cidrs: wish.own.pod_cidrs.iter().map(ToString::to_string).collect(),
            pod_mtu: plan.pod_mtu,
            synced: wish.synced,
            tunnels: [true, false]
                .map(device_name)
                .into_iter()
                .filter(|n| plan.uses(n))
                .map(str::to_owned)
                .collect(),
            peers: plan.ways.iter().map(peer_status).collect(),
            refused: plan.refused.iter().map(ToString::to_string).collect(),
            failed: done.failed.clone(),
        };
        let old = std::mem::replace(&mut self.state().status, status.clone());
        if old == status {
            return;
        }
        for way in status.peers.iter().filter(|way| !old.peers.contains(way)) {
            tracing::info!(
                peer = way.peer,
                range = way.range,
                to = way.to,
                by = way.by,
                mtu = way.mtu,
                "reached"
            );
        }
        for way in &old.peers {
            if !status.peers.iter().any(|now| now.peer == way.peer && now.range == way.range) {
                tracing::info!(peer = way.peer, range = way.range, "no longer reached");
            }
        }
        for why in status.refused.iter().filter(|why| !old.refused.contains(why)) {
            tracing::warn!(why, "a peer is not reached");
        }
        let peers = (wish.synced).then(|| (peers_path(&self.config.run_dir), document(&wish.peers)));
        let text = serde_json::to_vec_pretty(&status).unwrap_or_default();
        let files = peers.into_iter().chain([(status_path(&self.config.run_dir), text)]);
        for (path, text) in files {
            if let Err(error) = replace(&path, &text) {
                tracing::warn!(path = %path.display(), error = &error as &dyn std::error::Error, "state not written");
            }
        }
    }
}

fn peer_status(way: &super::plan::Way) -> PeerStatus {
    PeerStatus {
        peer: way.peer.clone(),
        range: way.range.to_string(),
        to: way.to.to_string(),
        by: if way.tunnel { "vxlan" } else { "direct" }.to_owned(),
        link: way.link.clone(),
        mtu: way.mtu,
    }
}

/// Peers as [`PeersFile`] reads them.
fn document(peers: &[Peer]) -> Vec<u8> {
    let node = |peer: &Peer| {
        let ips: Vec<String> = peer.node_ips.iter().map(ToString::to_string).collect();
        let ranges: Vec<String> = peer.pod_cidrs.iter().map(ToString::to_string).collect();
        serde_json::json!({"name": peer.name, "node-ips": ips, "pod-cidrs": ranges})
    };
    let nodes: Vec<serde_json::Value> = peers.iter().map(node).collect();
    serde_json::json!({ "node": nodes }).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_remembered_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let config = OverlayConfig { run_dir: dir.path().to_owned(), ..OverlayConfig::default() };
        assert_eq!(remembered(&config), []);
        let peers = vec![Peer {
            name: "b".into(),
            node_ips: vec!["192.0.2.2".parse().unwrap()],
            pod_cidrs: vec!["10.244.2.0/24".parse().unwrap(), "fd00:244:0:2::/64".parse().unwrap()],
        }];
        replace(&peers_path(dir.path()), &document(&peers)).unwrap();
        assert_eq!(remembered(&config), peers);
        std::fs::write(peers_path(dir.path()), "{").unwrap();
        assert_eq!(remembered(&config), []);
    }
}
