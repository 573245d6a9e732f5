//! The node daemon. `run` is the whole life of an agent, read from top to bottom; everything that
//! runs on the node outlives it.

pub mod cluster;
pub mod config;
pub mod dataplane;
pub mod limits;
pub mod network;
pub mod pod;
pub mod runtime;
pub mod server;
pub mod service;

pub use config::{AgentConfig, Component, ConfigError};

use tokio_util::sync::CancellationToken;

/// Why an agent could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration contradicts itself.
    #[error("configuration of the agent")]
    Config(#[from] ConfigError),
}

/// Runs an agent until `shutdown` is cancelled. Containers, their network and the service tables stay
/// as they are when it returns; the next agent adopts them.
pub async fn run(config: AgentConfig, shutdown: CancellationToken) -> Result<(), AgentError> {
    config.validate()?;
    shutdown.cancelled().await;
    Ok(())
}
