//! What of the node's own the programs are told, and what the node is told of NodePorts. Invariant: ports that others
//! reserved stay reserved, and only in the network namespace that this process runs in.

use crate::dataplane::{DataplaneConfig, DataplaneError, NodePortAddresses};
use sheave_ebpf_abi::{config_flag, node_addr_flag};
use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Ports that the kernel gives to sockets that ask for none: first and last.
const EPHEMERAL: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// Ports that it does not give to them all the same: a list of ports and ranges (ip-sysctl.rst). Both are of the
/// reading thread's network namespace, and of IPv6 too.
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Bits of [`config_flag`] that the settings ask for.
pub(super) fn config_flags(config: &DataplaneConfig) -> u32 {
    let loopback = match &config.node_port_addresses {
        NodePortAddresses::All => true,
        NodePortAddresses::Primary => false,
        NodePortAddresses::In(ranges) => [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
            .iter()
            .any(|ip: &IpAddr| ranges.iter().any(|range| range.contains(*ip))),
    };
    let wanted = [
        (config.masquerade_all, config_flag::MASQUERADE_ALL),
        (loopback, config_flag::LOOPBACK_NODE_PORTS),
        (config.host_routing, config_flag::HOST_ROUTING),
    ];
    wanted.into_iter().filter(|(set, _)| *set).fold(0, |flags, (_, flag)| flags | flag)
}

/// Bits of [`node_addr_flag`] of one of `addresses`, which are all that the node has.
pub(super) fn address_flags(addr: IpAddr, addresses: &BTreeSet<IpAddr>, config: &DataplaneConfig) -> u32 {
    let reached = match &config.node_port_addresses {
        NodePortAddresses::All => true,
        NodePortAddresses::In(ranges) => ranges.iter().any(|range| range.contains(addr)),
        NodePortAddresses::Primary => {
            let of_family = |ip: &&IpAddr| ip.is_ipv4() == addr.is_ipv4();
            let primary = config.node_ips.iter().find(of_family);
            primary.or_else(|| addresses.iter().find(of_family)) == Some(&addr)
        }
    };
    node_addr_flag::OURS | if reached { node_addr_flag::NODE_PORTS } else { 0 }
}

/// The ports that the kernel gives to sockets which ask for none; zeroes where it does not tell.
pub(super) fn local_ports() -> (u16, u16) {
    fs::read_to_string(EPHEMERAL).ok().and_then(|range| bounds(&range)).unwrap_or((0, 0))
}

/// Both ends of a range as the kernel writes it.
fn bounds(range: &str) -> Option<(u16, u16)> {
    let mut bounds = range.split_whitespace().map(str::parse::<u16>);
    Some((bounds.next()?.ok()?, bounds.next()?.ok()?))
}

/// Keeps the kernel from giving NodePorts to sockets that ask for no port, where its range has some of them.
pub(super) fn reserve_ports((first, last): (u16, u16)) -> Result<(), DataplaneError> {
    let read = |path: &str| {
        fs::read_to_string(path)
            .map_err(|source| DataplaneError::Host { op: "read the kernel's port ranges", source })
    };
    let (range, held) = (read(EPHEMERAL)?, read(RESERVED)?);
    let Some(wanted) = reserved_with(&range, held.trim(), first, last) else { return Ok(()) };
    fs::write(RESERVED, &wanted)
        .map_err(|source| DataplaneError::Host { op: "reserve the NodePorts for services", source })?;
    tracing::info!(first, last, reserved = wanted, "NodePorts are kept from sockets that ask for no port");
    Ok(())
}

/// The list that also has `first..=last`; `None` where nothing needs to change: they are not in the kernel's range of
/// ports, or are in the list.
fn reserved_with(range: &str, held: &str, first: u16, last: u16) -> Option<String> {
    let (low, high) = bounds(range)?;
    if last < low || high < first {
        return None;
    }
    let ranges = held.split(',').filter_map(|part| {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        Some((low.trim().parse::<u16>().ok()?, high.trim().parse::<u16>().ok()?))
    });
    let mut missing: BTreeSet<u16> = (first..=last).collect();
    for (low, high) in ranges {
        missing.retain(|port| *port < low || high < *port);
    }
    if missing.is_empty() {
        return None;
    }
    // The kernel joins what overlaps.
    let separator = if held.is_empty() { "" } else { "," };
    Some(format!("{held}{separator}{first}-{last}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_ports_keep_what_others_put_there() {
        let kernel = "32768\t60999";
        assert_eq!(reserved_with(kernel, "", 30_000, 32_767), None, "no overlap");
        assert_eq!(reserved_with("1024\t65535", "", 30_000, 32_767), Some("30000-32767".to_owned()));
        let other = "8080,9000-9005";
        let both = Some("8080,9000-9005,30000-32768".to_owned());
        assert_eq!(reserved_with(kernel, other, 30_000, 32_768), both);
        assert_eq!(reserved_with(kernel, "1-40000", 30_000, 32_768), None, "it is there already");
        assert_eq!(reserved_with(kernel, "30000-31000,31001-32768", 30_000, 32_768), None);
        assert!(reserved_with(kernel, "30000-31000,31002-32768", 30_000, 32_768).is_some());
        assert_eq!(reserved_with("junk", "", 1, 2), None);
    }

    #[test]
    fn node_ports_are_reached_where_the_settings_say() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let addresses = BTreeSet::from([ip("10.0.0.1"), ip("192.0.2.1"), ip("2001:db8::1")]);
        let mut config = DataplaneConfig::default();
        let open = |config: &DataplaneConfig| -> Vec<String> {
            let open = |addr: &&IpAddr| {
                let flags = address_flags(**addr, &addresses, config);
                assert_ne!(flags & node_addr_flag::OURS, 0);
                flags & node_addr_flag::NODE_PORTS != 0
            };
            addresses.iter().filter(open).map(ToString::to_string).collect()
        };
        assert_eq!(open(&config).len(), 3);
        assert_eq!(config_flags(&config), config_flag::LOOPBACK_NODE_PORTS);
        config.node_port_addresses = NodePortAddresses::Primary;
        assert_eq!(open(&config), ["10.0.0.1", "2001:db8::1"], "the first, where nothing is said");
        config.node_ips = vec![ip("192.0.2.1")];
        assert_eq!(open(&config), ["192.0.2.1", "2001:db8::1"]);
        assert_eq!(config_flags(&config), 0);
        config.node_port_addresses = NodePortAddresses::In(vec!["192.0.2.0/24".parse().unwrap()]);
        assert_eq!(open(&config), ["192.0.2.1"]);
        config.node_port_addresses = NodePortAddresses::In(vec!["127.0.0.0/8".parse().unwrap()]);
        config.masquerade_all = true;
        let flags = config_flag::LOOPBACK_NODE_PORTS | config_flag::MASQUERADE_ALL;
        assert_eq!(config_flags(&config), flags);
    }
}
