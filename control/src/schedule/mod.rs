//! The scheduler: gives every unbound pod a node. Invariant: `cluster` and `pending` decide and are pure; only
//! `driver` touches the registry.

mod cluster;
mod driver;
mod model;
mod pending;

use tokio_util::sync::CancellationToken;

use crate::registry::Registry;

/// Runs the scheduler until the shutdown. Errors are logged and what failed is tried again; nothing is returned.
pub async fn run(registry: Registry, shutdown: CancellationToken) {
    driver::run(registry, shutdown).await;
}
