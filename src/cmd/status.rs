//! `sheave status`: this node in short, from the API and from the kernel's maps. What can't be read is said, and makes
//! the exit status 1.

use std::io::Write;

use anyhow::{Result, bail};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, ListParams};
use sheave_agent::dataplane::Mode;

use super::table::Table;
use crate::cli::StatusFlags;

pub(super) fn run(flags: &StatusFlags) -> Result<()> {
    let kubeconfig = super::kubeconfig(&flags.base, flags.kubeconfig.as_deref())?;
    let paths = super::paths(&flags.base)?;
    let mut out = std::io::stdout();
    let mut failed = false;
    match super::runtime()?.block_on(cluster(&kubeconfig)) {
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
    if failed {
        bail!("some of it could not be read");
    }
    Ok(())
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
            Ok(true)
        }
        Err(error) => {
            let error = anyhow::Error::new(error);
            writeln!(out, "services in the kernel: {error:#}")?;
            Ok(false)
        }
    }
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
