//! The controllers: each turns what it observes into actions, and the driver carries them out. Invariant: a
//! controller's file is pure (observed state in, plain-data actions out); only `driver` touches the registry.

mod action;
mod claim;
mod deployment;
mod driver;
mod endpoint_slice;
mod garbage;
pub(crate) mod model;
mod namespace;
mod node;
mod node_ranges;
mod pod_gc;
mod queue;
mod replica_set;
#[cfg(test)]
mod world;

use tokio_util::sync::CancellationToken;

pub(crate) use self::action::Target;
pub(crate) use self::driver::event::{Notice, record};
pub(crate) use self::driver::now;
pub use self::node_ranges::{NodeRanges, NodeRangesError};
use crate::registry::Registry;

/// What the controllers have to be told.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// The cluster's CA certificate in PEM: every namespace gets it in the ConfigMap `kube-root-ca.crt`.
    pub root_ca: Option<String>,
    /// From where Nodes without pod ranges get theirs.
    pub node_ranges: NodeRanges,
}

/// Runs all controllers until the shutdown. Errors are logged and what failed is tried again; nothing is returned.
pub async fn run(registry: Registry, config: Config, shutdown: CancellationToken) {
    driver::run(registry, config, shutdown).await;
}
