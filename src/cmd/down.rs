//! `sheave down`: takes everything that Sheave made off this host. Idempotent; goes on past errors and tells them all.

use std::io::Write;

use anyhow::{Result, bail};
use sheave_agent::dataplane::StatsHandle;
use sheave_agent::network::{Network, NetworkConfig, NetworkError};
use sheave_agent::runtime::{Runtime, RuntimeConfig};

use crate::cli::{AgentFlags, DownFlags, NetworkFlags, ServiceFlags};
use crate::config::File;

pub(super) fn run(flags: &DownFlags) -> Result<()> {
    let file = File::read(flags.base.config.as_deref())?;
    let agent = super::agent::config(
        &file,
        &flags.base,
        &AgentFlags::default(),
        &NetworkFlags::default(),
        &ServiceFlags::default(),
    )?;
    let mut failures = super::runtime()?.block_on(stop_pods(&agent))?;
    let plane = sheave_agent::dataplane_config(&agent, &StatsHandle::default());
    let errors = sheave_agent::dataplane::choice::remove_all(&plane);
    failures.extend(errors.into_iter().map(|error| format!("{:#}", anyhow::Error::new(error))));
    if let Err(error) = sheave_agent::pod::volumes::tear_down(&agent.state_dir.join("pods")) {
        failures.push(error);
    }
    let mut directories = vec![&agent.run_dir];
    if flags.purge {
        directories.push(&agent.state_dir);
    }
    for directory in directories {
        match std::fs::remove_dir_all(directory) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => failures.push(format!("removing {}: {error}", directory.display())),
        }
    }
    if !failures.is_empty() {
        bail!("not everything could be taken off the host:\n  {}", failures.join("\n  "));
    }
    writeln!(std::io::stdout(), "pods, links, eBPF programs and maps are gone")?;
    Ok(())
}

async fn stop_pods(agent: &sheave_agent::AgentConfig) -> Result<Vec<String>> {
    let mut failures = Vec::new();
    let (runtime, _events) = Runtime::open(RuntimeConfig {
        state_dir: agent.state_dir.clone(),
        run_dir: agent.run_dir.clone(),
        log_dir: agent.log_dir.clone(),
        cgroup_path: agent.cgroup_path.clone(),
        shim_exe: None,
    })
    .await?;
    for pod in runtime.pods().await {
        if let Err(error) = runtime.stop_sandbox(&pod.spec.uid).await {
            failures.push(format!(
                "pod {}/{}: {:#}",
                pod.spec.namespace,
                pod.spec.name,
                anyhow::Error::new(error)
            ));
        }
    }
    if let Err(error) = runtime.remove_cgroups().await {
        failures.push(format!("{:#}", anyhow::Error::new(error)));
    }
    match remove_links(agent).await {
        Ok(failed) => failures.extend(failed),
        Err(error) => failures.push(format!("{:#}", anyhow::Error::new(error))),
    }
    failures.extend(sheave_agent::network::overlay::remove_all());
    Ok(failures)
}

async fn remove_links(agent: &sheave_agent::AgentConfig) -> Result<Vec<String>, NetworkError> {
    let network = Network::open(NetworkConfig {
        state_dir: agent.state_dir.clone(),
        node_ips: agent.node_ips.clone(),
        pod_cidrs: agent.pod_cidrs.clone(),
        uplinks: agent.uplinks.clone(),
        ..NetworkConfig::default()
    })
    .await?;
    Ok(network.reconcile(&[]).await?.failed)
}
