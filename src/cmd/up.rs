//! `sheave up`: control plane and node in one process. They still talk through the Kubernetes API, each with
//! credentials of its own, so that either can be moved elsewhere.

use anyhow::{Context, Result};
use tokio_util::sync::CancellationToken;

use crate::cli::UpFlags;
use crate::config::File;
use crate::logging;

pub(super) fn run(flags: &UpFlags) -> Result<()> {
    let file = File::read(flags.base.config.as_deref())?;
    logging::start(&file.merge("log", &flags.base.log)?)?;
    let mut control = super::control::config(&file, &flags.base, &flags.control)?;
    let mut agent = super::agent::config(&file, &flags.base, &flags.agent, &flags.network, &flags.services)?;
    agent.node_port_range = control.node_port_range;
    super::run_daemon(async |shutdown| {
        if agent.node_ips.is_empty() {
            agent.node_ips = sheave_agent::network::node_addresses(&agent.uplinks)?.ips;
        }
        control.advertise_address = control.advertise_address.or(agent.node_ips.first().copied());
        both(control, agent, shutdown).await
    })
}

/// Runs both until one ends; then the other is asked to end too, and the first error is the one that is told.
async fn both(
    control: sheave_control::ControlConfig,
    agent: sheave_agent::AgentConfig,
    shutdown: CancellationToken,
) -> Result<()> {
    let (ready_tx, ready_rx) = tokio::sync::oneshot::channel();
    let control = async {
        let result = sheave_control::run_with(control, shutdown.clone(), ready_tx).await;
        shutdown.cancel();
        result.context("control plane")
    };
    let agent = async {
        if ready_rx.await.is_err() {
            // The control plane did not come up and says why itself.
            return Ok(());
        }
        let result = sheave_agent::run(agent, shutdown.clone()).await;
        shutdown.cancel();
        result.context("node")
    };
    let (control, agent) = tokio::join!(control, agent);
    control.and(agent)
}
