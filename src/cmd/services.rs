//! The `[services]` settings, from words to what the agent takes. Invariant: a word that means nothing is refused with
//! the flag and what there is.

use anyhow::{Context, Result, anyhow, bail};
use sheave_agent::AgentConfig;
use sheave_agent::dataplane::{KubeProxyLeftovers, MapEntries, Mode, NodePortAddresses};
use sheave_agent::service::IpvsScheduler;

use super::agent::set as set_if;
use crate::cli::ServiceFlags;

/// Puts file and flags into the agent's configuration.
pub(super) fn set(config: &mut AgentConfig, flags: &ServiceFlags) -> Result<()> {
    if let Some(range) = &flags.node_port_range {
        config.node_port_range = super::control::port_range(range)?;
    }
    let services = &mut config.services;
    services.data_plane = data_plane(flags.data_plane.as_deref())?;
    services.node_port_addresses = NodePortAddresses::parse(&flags.node_port_addresses)
        .map_err(|why| anyhow!("--node-port-addresses: {why}"))?;
    set_if(&mut services.masquerade_all, flags.masquerade_all);
    set_if(&mut services.xdp, flags.xdp);
    if let Some(name) = &flags.ipvs_scheduler {
        services.ipvs_scheduler = IpvsScheduler::from_name(name).with_context(|| {
            let names: Vec<_> = IpvsScheduler::ALL.iter().map(|(_, name)| *name).collect();
            format!("--ipvs-scheduler {name:?}: there are {}", names.join(", "))
        })?;
    }
    if let Some(name) = &flags.kube_proxy_leftovers {
        services.kube_proxy_leftovers = KubeProxyLeftovers::from_name(name).with_context(|| {
            format!("--kube-proxy-leftovers {name:?}: there are refuse, cleanup and ignore")
        })?;
    }
    services.pod_links.clone_from(&flags.pod_link);
    services.pod_packets = flags.pod_packets;
    set_if(&mut services.host_routing, flags.host_routing);
    services.map_sizes = map_sizes(&flags.service_map_sizes)?;
    set_if(&mut services.proxy_health_listen, flags.proxy_health_listen);
    Ok(())
}

fn data_plane(given: Option<&str>) -> Result<Option<Mode>> {
    match given {
        None | Some("auto") => Ok(None),
        Some(name) => match Mode::from_name(name) {
            Some(mode) => Ok(Some(mode)),
            None => bail!("--data-plane {name:?}: there are auto, ebpf, nftables and ipvs"),
        },
    }
}

fn map_sizes(given: &[String]) -> Result<MapEntries> {
    let mut sizes = MapEntries::default();
    for word in given {
        let wrong = || format!("--service-map-sizes {word:?} is not of the form MAP=N, as in flows=262144");
        let (name, entries) = word.split_once('=').with_context(wrong)?;
        let entries = entries.parse().with_context(wrong)?;
        let field = sizes.field(name).with_context(|| {
            format!("--service-map-sizes {word:?}: the maps are {}", MapEntries::NAMES.join(", "))
        })?;
        *field = Some(entries);
    }
    Ok(sizes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(flags: ServiceFlags) -> Result<AgentConfig> {
        let mut config = AgentConfig::default();
        set(&mut config, &flags).map(|()| config)
    }

    #[test]
    fn words_become_settings() {
        let config = parse(ServiceFlags {
            data_plane: Some("nftables".into()),
            node_port_addresses: vec!["primary".into()],
            masquerade_all: Some(true),
            ipvs_scheduler: Some("mh".into()),
            service_map_sizes: vec!["flows=1024".into(), "maglevs=3".into()],
            node_port_range: Some("31000-31999".into()),
            ..ServiceFlags::default()
        })
        .unwrap();
        let services = config.services;
        assert_eq!(services.data_plane, Some(Mode::Nftables));
        assert_eq!(services.node_port_addresses, NodePortAddresses::Primary);
        assert!(services.masquerade_all && !services.xdp);
        assert_eq!(services.ipvs_scheduler, IpvsScheduler::Mh);
        assert_eq!((services.map_sizes.flows, services.map_sizes.maglevs), (Some(1024), Some(3)));
        assert_eq!(config.node_port_range, (31_000, 31_999));
        assert_eq!(parse(ServiceFlags::default()).unwrap().services, AgentConfig::default().services);
    }

    #[test]
    fn what_means_nothing_is_refused_with_the_flag() {
        let flags = ServiceFlags::default;
        for (given, flag) in [
            (ServiceFlags { data_plane: Some("iptables".into()), ..flags() }, "--data-plane"),
            (ServiceFlags { node_port_addresses: vec!["here".into()], ..flags() }, "--node-port-addresses"),
            (ServiceFlags { ipvs_scheduler: Some("best".into()), ..flags() }, "--ipvs-scheduler"),
            (ServiceFlags { service_map_sizes: vec!["flow=1".into()], ..flags() }, "--service-map-sizes"),
            (ServiceFlags { service_map_sizes: vec!["flows=x".into()], ..flags() }, "--service-map-sizes"),
            (ServiceFlags { node_port_range: Some("9".into()), ..flags() }, "--node-port-range"),
        ] {
            let error = parse(given).unwrap_err().to_string();
            assert!(error.contains(flag), "{error}");
        }
    }
}
