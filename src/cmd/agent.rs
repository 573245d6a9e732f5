//! `sheave agent`: the node daemon against any Kubernetes API server.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, bail};
use sheave_agent::{AgentConfig, Component};

use crate::cli::{AgentCommand, AgentFlags, BaseFlags, NetworkFlags, PathFlags, ServiceFlags};
use crate::config::File;
use crate::logging;

pub(super) fn run(command: &AgentCommand) -> Result<()> {
    let file = File::read(command.base.config.as_deref())?;
    logging::start(&file.merge("log", &command.base.log)?)?;
    let services =
        ServiceFlags { node_port_range: command.node_port_range.clone(), ..command.services.clone() };
    let config = config(&file, &command.base, &command.agent, &command.network, &services)?;
    sheave_agent::memory::keep_little();
    super::run_daemon(async |shutdown| Ok(sheave_agent::run(config, shutdown).await?))
}

/// The agent's configuration from file and flags.
pub(super) fn config(
    file: &File,
    base: &BaseFlags,
    flags: &AgentFlags,
    network: &NetworkFlags,
    services: &ServiceFlags,
) -> Result<AgentConfig> {
    let paths: PathFlags = file.merge("paths", &base.paths)?;
    let flags: AgentFlags = file.merge("agent", flags)?;
    let mut config = AgentConfig { node_name: node_name(flags.node_name)?, ..AgentConfig::default() };
    if let Some(state_dir) = paths.state_dir {
        config.kubeconfig = state_dir.join("agent.kubeconfig");
        config.state_dir = state_dir;
    }
    set(&mut config.run_dir, paths.run_dir);
    set(&mut config.log_dir, paths.log_dir);
    set(&mut config.pin_dir, paths.pin_dir);
    config.cgroup_path = paths.cgroup_path;
    set(&mut config.kubeconfig, flags.kubeconfig);
    config.node_ips = flags.node_ip;
    config.components = components(&flags.components)?;
    if !flags.pod_cidr.is_empty() {
        config.pod_cidrs = flags.pod_cidr;
    } else if config.does(Component::Network) {
        config.pod_cidrs_of_node = true;
    }
    config.uplinks = flags.uplink;
    config.cluster_dns = flags.cluster_dns;
    set(&mut config.listen, flags.agent_listen);
    set(&mut config.health_listen, flags.health_listen);
    set(&mut config.max_pods, flags.max_pods);
    config.node_labels = labels(&flags.node_label)?;
    set_network(&mut config, file.merge("network", network)?)?;
    super::services::set(&mut config, &file.merge("services", services)?)?;
    Ok(config)
}

fn set_network(config: &mut AgentConfig, flags: NetworkFlags) -> Result<()> {
    set(&mut config.fast_path, flags.fast_path);
    let overlay = &mut config.overlay;
    if let Some(mode) = &flags.overlay {
        overlay.mode = mode.parse().map_err(|why| anyhow!("--overlay {why}"))?;
    }
    overlay.peers_file = flags.peers;
    set(&mut overlay.vni, flags.vxlan_vni);
    set(&mut overlay.port, flags.vxlan_port);
    set(&mut overlay.tx_checksum, flags.vxlan_tx_checksum);
    set(&mut overlay.masquerade, flags.masquerade);
    overlay.masquerade_exceptions = flags.masquerade_except;
    overlay.sysctl_dir = flags.sysctl_dir;
    Ok(())
}

pub(super) fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn node_name(given: Option<String>) -> Result<String> {
    if let Some(name) = given {
        return Ok(name);
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .context("reading the host's name; set one with --node-name")?;
    Ok(host.trim().to_lowercase())
}

fn labels(given: &[String]) -> Result<BTreeMap<String, String>> {
    given
        .iter()
        .map(|label| match label.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => bail!("--node-label {label:?} is not of the form KEY=VALUE"),
        })
        .collect()
}

fn components(given: &[String]) -> Result<Vec<Component>> {
    given
        .iter()
        .map(|name| match name.as_str() {
            "pods" => Ok(Component::Pods),
            "services" => Ok(Component::Services),
            "network" => Ok(Component::Network),
            other => bail!("--components {other:?}: there are pods, services and network"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_components_are_checked() {
        assert_eq!(labels(&["a=b".into(), "c=".into()]).unwrap().len(), 2);
        assert!(labels(&["a".into()]).unwrap_err().to_string().contains("KEY=VALUE"));
        assert_eq!(components(&["services".into()]).unwrap(), [Component::Services]);
        assert_eq!(components(&["network".into()]).unwrap(), [Component::Network]);
        assert!(components(&["dns".into()]).unwrap_err().to_string().contains("dns"));
    }
}
