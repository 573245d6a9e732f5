//! `sheave status`: this node in short, from the API and from the kernel's maps. What can't be read is said, and makes
//! the exit status 1.

use std::io::Write;

use anyhow::{Result, bail};
use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, ListParams};
use sheave_agent::dataplane::Mode;
use sheave_agent::network::overlay;

use super::table::Table;
use crate::cli::StatusFlags;

pub(super) fn run(flags: &StatusFlags) -> Result<()> {
    let kubeconfig = super::kubeconfig(&flags.base, flags.kubeconfig.as_deref())?;
    let paths = super::paths(&flags.base)?;
    let mut out = std::io::stdout();
    let mut failed = false;
    let network = sheave_agent::network::overlay::read_status(&paths.run_dir);
    // A network alone does without an API server.
    let alone = flags.kubeconfig.is_none() && !kubeconfig.exists() && matches!(network, Ok(Some(_)));
    let asked = if alone { Ok(Vec::new()) } else { super::runtime()?.block_on(cluster(&kubeconfig)) };
    match asked {
        Ok(_) if alone => writeln!(out, "API server: none known here ({})", kubeconfig.display())?,
        Ok(rows) => {
            let mut table = Table::new(&["NODE", "READY", "PODS", "RUNNING", "ADDRESS", "VERSION"]);
            for row in rows {
                table.row(row);
            }
            table.print(&mut out)?;
        }
        Err(error) => {
            failed = true;
            writeln!(out, "API server: {error:#}")?;
        }
    }
    failed |= !services(&mut out, &paths)?;
    match network {
        Ok(Some(status)) => failed |= !self::network(&mut out, &paths, &status)?,
        Ok(None) => writeln!(out, "network: no agent connects pods on this node")?,
        Err(error) => {
            failed = true;
            writeln!(out, "network: {error}")?;
        }
    }
    failed |= !policies(&mut out, &paths)?;
    if failed {
        bail!("some of it could not be read");
    }
    Ok(())
}

/// Peers, tunnels and addresses; false when they can't be read or something is wrong with them.
fn network(out: &mut impl Write, paths: &super::Paths, status: &overlay::Status) -> Result<bool> {
    let tunnels = if status.tunnels.is_empty() { "none".to_owned() } else { status.tunnels.join(", ") };
    let known = if status.synced { "" } else { "; the peers of the last run, the API has not answered yet" };
    writeln!(
        out,
        "network: overlay {}, tunnels {tunnels}, mtu of pods {}, peers reached {}{known}",
        status.mode,
        status.pod_mtu,
        status.peers.iter().map(|way| &way.peer).collect::<std::collections::BTreeSet<_>>().len()
    )?;
    let mut table = Table::new(&["PEER", "RANGE", "AT", "BY", "LINK", "MTU"]);
    for way in &status.peers {
        let mtu = way.mtu.to_string();
        table.row([&way.peer, &way.range, &way.to, &way.by, &way.link, &mtu].map(String::clone));
    }
    if !status.peers.is_empty() {
        table.print(out)?;
    }
    for why in status.refused.iter().chain(&status.failed) {
        writeln!(out, "network: {why}")?;
    }
    let ranges: Vec<IpNetwork> = status.pod_cidrs.iter().filter_map(|range| range.parse().ok()).collect();
    let held = match sheave_agent::network::inventory(&paths.state_dir, &ranges) {
        Ok(held) => held,
        Err(error) => {
            writeln!(out, "network: {:#}", anyhow::Error::new(error))?;
            return Ok(false);
        }
    };
    for pool in &held.pools {
        writeln!(out, "addresses: {} of {} in {} are given", pool.leased, pool.capacity, pool.range)?;
    }
    writeln!(out, "pods connected: {}, leaks: {}", held.attachments, held.leaks.len())?;
    for leak in &held.leaks {
        writeln!(out, "leak: {leak}")?;
    }
    Ok(true)
}

/// What balances and what it holds; false when that can't be read.
fn services(out: &mut impl Write, paths: &super::Paths) -> Result<bool> {
    let mode = match super::active(paths) {
        Ok(Some(active)) => {
            writeln!(out, "data plane: {} ({})", active.mode.name(), active.why)?;
            for old in &active.leaving {
                writeln!(
                    out,
                    "data plane: {} is replaced; what its connections need stays until they end",
                    old.name()
                )?;
            }
            active.mode
        }
        Ok(None) => {
            writeln!(out, "data plane: none was chosen by an agent on this node yet")?;
            Mode::Ebpf
        }
        Err(error) => {
            writeln!(out, "data plane: {error:#}")?;
            return Ok(false);
        }
    };
    if mode != Mode::Ebpf {
        writeln!(out, "services in the kernel: {}", super::elsewhere(mode))?;
        return Ok(true);
    }
    match sheave_agent::dataplane::list(&paths.pin_dir) {
        Ok(frontends) => {
            let backends: usize = frontends.iter().map(|frontend| frontend.ready.len()).sum();
            writeln!(out, "services in the kernel: {} frontends, {backends} backends", frontends.len())?;
            let routing = match sheave_agent::dataplane::ebpf::host_routing(&paths.pin_dir) {
                Ok(routing) => routing,
                Err(error) => {
                    writeln!(out, "host routing: {:#}", anyhow::Error::new(error))?;
                    return Ok(false);
                }
            };
            if routing.devices > 0 {
                let (devices, entered) = (routing.devices, routing.entered);
                writeln!(
                    out,
                    "host routing: by {devices} pods' devices, of which {entered} are entered at once"
                )?;
            }
            Ok(true)
        }
        Err(error) => {
            let error = anyhow::Error::new(error);
            writeln!(out, "services in the kernel: {error:#}")?;
            Ok(false)
        }
    }
}

/// What pods' links enforce, and what goes past the stack; false when that can't be read.
fn policies(out: &mut impl Write, paths: &super::Paths) -> Result<bool> {
    let status = match sheave_agent::dataplane::ebpf::guard_status(&paths.pin_dir) {
        Ok(Some(status)) => status,
        Ok(None) => return Ok(true),
        Err(error) => {
            writeln!(out, "network policies: {:#}", anyhow::Error::new(error))?;
            return Ok(false);
        }
    };
    let drops: u64 = status.counters.iter().filter(|(c, _)| c.is_drop()).map(|(_, n)| n).sum();
    writeln!(
        out,
        "network policies: {} of {} pod addresses are isolated, at {} devices; {drops} packets refused",
        status.isolated, status.pods, status.devices
    )?;
    let fast: u64 = status.counters.iter().filter(|(c, _)| c.is_fast()).map(|(_, n)| n).sum();
    if !status.fast {
        writeln!(out, "fast path: off, everything goes through the stack (--fast-path)")?;
        return Ok(true);
    }
    write!(out, "fast path: on, {fast} packets went past the stack")?;
    for (slow, what) in [(status.without_peer, "without a peer"), (status.queued, "with a queue")] {
        if slow > 0 {
            write!(out, "; {slow} pod addresses are at devices {what} and stay in it")?;
        }
    }
    writeln!(out)?;
    Ok(true)
}

async fn cluster(kubeconfig: &std::path::Path) -> Result<Vec<[String; 6]>> {
    let client = super::apply::client(kubeconfig).await?;
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?;
    let mut rows = Vec::new();
    for node in nodes {
        let name = node.metadata.name.unwrap_or_default();
        let of_node = ListParams::default().fields(&format!("spec.nodeName={name}"));
        let pods = Api::<Pod>::all(client.clone()).list(&of_node).await?.items;
        let running = pods
            .iter()
            .filter(|pod| pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running"))
            .count();
        let status = node.status.unwrap_or_default();
        let ready = status
            .conditions
            .unwrap_or_default()
            .into_iter()
            .find(|condition| condition.type_ == "Ready")
            .map_or("Unknown".to_owned(), |condition| condition.status);
        let addresses: Vec<String> = status
            .addresses
            .unwrap_or_default()
            .into_iter()
            .filter(|address| address.type_ == "InternalIP")
            .map(|address| address.address)
            .collect();
        let version = status.node_info.map_or_else(String::new, |info| info.kubelet_version);
        rows.push([name, ready, pods.len().to_string(), running.to_string(), addresses.join(","), version]);
    }
    Ok(rows)
}
