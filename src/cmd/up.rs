//! `sheave up`: control plane and node in one process. They still talk through the Kubernetes API, each with
//! credentials of its own, so that either can be moved elsewhere.

use std::net::IpAddr;

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
        let node = agent.node_ips.first().copied();
        control.advertise_address = advertised(control.advertise_address, control.listen.ip(), node);
        both(control, agent, shutdown).await
    })
}

/// Where nodes reach the control plane: at this node's address, unless it was told to listen elsewhere only.
fn advertised(given: Option<IpAddr>, listen: IpAddr, node: Option<IpAddr>) -> Option<IpAddr> {
    given.or_else(|| node.filter(|node| listen.is_unspecified() || listen == *node))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_address_is_advertised_where_the_server_listens_on_it() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap_or_else(|e| panic!("{text}: {e}"));
        let node = Some(ip("192.0.2.1"));
        for (listen, expected) in [("0.0.0.0", node), ("::", node), ("192.0.2.1", node), ("127.0.0.1", None)]
        {
            assert_eq!(advertised(None, ip(listen), node), expected, "{listen}");
        }
        let given = Some(ip("203.0.113.7"));
        assert_eq!(advertised(given, ip("127.0.0.1"), node), given, "who says so knows why");
    }
}
