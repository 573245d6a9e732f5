//! `sheave control`: the control plane alone.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use sheave_control::ControlConfig;

use super::agent::set;
use crate::cli::{BaseFlags, ControlCommand, ControlFlags, PathFlags};
use crate::config::File;
use crate::logging;

pub(super) fn run(command: &ControlCommand) -> Result<()> {
    let file = File::read(command.base.config.as_deref())?;
    logging::start(&file.merge("log", &command.base.log)?)?;
    let config = config(&file, &command.base, &command.control)?;
    super::run_daemon(async |shutdown| Ok(sheave_control::run(config, shutdown).await?))
}

/// The control plane's configuration from file and flags.
pub(super) fn config(file: &File, base: &BaseFlags, flags: &ControlFlags) -> Result<ControlConfig> {
    let paths: PathFlags = file.merge("paths", &base.paths)?;
    let flags: ControlFlags = file.merge("control", flags)?;
    let mut config =
        ControlConfig { listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 6443)), ..ControlConfig::default() };
    set(&mut config.state_dir, paths.state_dir);
    set(&mut config.listen, flags.listen);
    config.advertise_address = flags.advertise_address;
    if !flags.service_cidr.is_empty() {
        config.service_cidrs = flags.service_cidr;
    }
    if !flags.cluster_cidr.is_empty() {
        config.cluster_cidrs = flags.cluster_cidr;
    }
    set(&mut config.node_cidr_mask_size_ipv4, flags.node_cidr_mask_size_ipv4);
    set(&mut config.node_cidr_mask_size_ipv6, flags.node_cidr_mask_size_ipv6);
    if let Some(range) = flags.node_port_range {
        config.node_port_range = port_range(&range)?;
    }
    config.extra_sans = flags.tls_san;
    Ok(config)
}

/// `30000-32767`
pub(super) fn port_range(text: &str) -> Result<(u16, u16)> {
    let parsed = text.split_once('-').and_then(|(first, last)| {
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (0 < first && first <= last).then_some((first, last))
    });
    parsed.with_context(|| format!("--node-port-range {text:?} is not FIRST-LAST, as in 30000-32767"))
}

#[cfg(test)]
mod tests {
    use super::port_range;

    #[test]
    fn a_port_range_has_two_ends_in_order() {
        assert_eq!(port_range("30000-32767").unwrap(), (30000, 32767));
        for wrong in ["30000", "2-1", "0-1", "1-99999", "a-b"] {
            assert!(port_range(wrong).unwrap_err().to_string().contains("--node-port-range"), "{wrong}");
        }
    }
}
