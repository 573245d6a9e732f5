//! The pod network of one node. Invariant: an address belongs to at most one pod, and a lease is on disk
//! before the address is in the kernel and goes only after it has left the kernel.
//!
//! Pods are routed: a veth pair each, /32 and /128 addresses, a link-local gateway behind permanent
//! neighbours; no bridge, no ARP, no duplicate address detection. Traffic to services is balanced at the
//! socket by the data plane, not here. Traffic that leaves the pod ranges is not masqueraded yet.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnetwork::IpNetwork;

/// Settings of the pod network.
#[derive(Debug, Clone, Default)]
pub struct NetworkConfig {
    /// Where leases are kept: `<state_dir>/network`.
    pub state_dir: PathBuf,
    /// Addresses of the node, at most one a family; the source of what the node sends to its pods.
    pub node_ips: Vec<IpAddr>,
    /// Ranges that pods get their addresses from; a pod gets one of every family that has a range.
    pub pod_cidrs: Vec<IpNetwork>,
    /// Links to the outside, whose smallest MTU the pods get. Empty means those of the default routes.
    pub uplinks: Vec<String>,
}

/// What a pod got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The pod's addresses, IPv4 first.
    pub ips: Vec<IpAddr>,
    /// Name of the node's end of the pair, `shv…`.
    pub host_link: String,
}

/// What a reconciliation found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Leftovers that were removed: links and leases, in words.
    pub removed: Vec<String>,
    /// What was missing of live pods and was put back, in words.
    pub repaired: Vec<String>,
    /// Live pods whose network is missing and can't be put back from here (uid, why): attach them again.
    pub broken: Vec<(String, String)>,
}

/// Why the network of a pod could not be made or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// Not there yet.
    #[error("{0}: the pod network is not ready yet")]
    NotReady(&'static str),
}

/// The pod network of this node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Network {
    config: std::sync::Arc<NetworkConfig>,
}

impl Network {
    /// Reads the leases and switches forwarding on in the network namespace of the calling process.
    pub async fn open(config: NetworkConfig) -> Result<Self, NetworkError> {
        Ok(Network { config: std::sync::Arc::new(config) })
    }

    /// Connects the pod in the network namespace at `netns`. Idempotent: a pod that is connected keeps
    /// what it has, and what is missing of it is put back.
    pub async fn attach(&self, _uid: &str, _netns: &Path) -> Result<Attachment, NetworkError> {
        tracing::trace!(ranges = self.config.pod_cidrs.len(), "attach");
        Err(NetworkError::NotReady("attach"))
    }

    /// Takes the pod's link and addresses away. Idempotent; the namespace may be gone already.
    pub async fn detach(&self, _uid: &str) -> Result<(), NetworkError> {
        Err(NetworkError::NotReady("detach"))
    }

    /// Removes links and leases of pods that are not in `live`, and puts back what is missing of those
    /// that are.
    pub async fn reconcile(&self, _live: &[String]) -> Result<Report, NetworkError> {
        Err(NetworkError::NotReady("reconcile"))
    }
}
