//! Between the words of the interface and this room's. Invariant: pure; what is asked for is either meant and done, or
//! refused with a code that says what to do about it.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use sheave_cni::config::{self, Config, mac_text};
use sheave_cni::result::{Cidr, Dns, Interface, Ip, Outcome, Route};
use sheave_cni::{Error, Version, code};

use crate::network::Bandwidth;
use crate::network::asked::{Asked, Demand};
use crate::network::attachment::Added;
use crate::network::error::NetworkError;
use crate::network::in_full;
use crate::network::ipam::Pool;
use crate::network::plan::{everything, gateway, of_each_family};
use crate::network::ports::{PortMapping, Protocol};

/// What an error of this room means to a runtime.
pub(super) fn error(error: &NetworkError) -> Error {
    let code = match error {
        NetworkError::RangeExhausted { .. }
        | NetworkError::NoRange
        | NetworkError::AddressTaken { .. }
        | NetworkError::Worker => code::TRY_LATER,
        NetworkError::AddressOutside { .. } | NetworkError::PortMapping { .. } => code::BAD_CONFIG,
        NetworkError::Connected { .. }
        | NetworkError::PodLinkTaken { .. }
        | NetworkError::NodeLinkTaken { .. }
        | NetworkError::HostPortTaken { .. } => code::TAKEN,
        NetworkError::Netns { .. } | NetworkError::OtherNetns { .. } => code::BAD_NETNS,
        NetworkError::Io { .. } => code::IO,
        _ => code::KERNEL,
    };
    Error::new(code, in_full(error))
}

fn network(cidr: Cidr) -> Option<IpNetwork> {
    IpNetwork::new(cidr.ip, cidr.prefix).ok()
}

/// Which addresses are asked for; `given` is what a delegate has chosen, `ranges` the node's.
pub(super) fn demand(
    config: &Config,
    given: Option<&Outcome>,
    ranges: &[IpNetwork],
) -> Result<Demand, Error> {
    if let Some(given) = given {
        let mut ips: Vec<IpAddr> = given.ips.iter().map(|ip| ip.address.ip).collect();
        ips.sort_by_key(IpAddr::is_ipv6);
        if ips.is_empty() {
            return Err(Error::new(code::BAD_CONFIG, "ipam: the result of the delegate has no address"));
        }
        return Ok(Demand { ips, chosen: true, sets: Vec::new() });
    }
    let ips = config.ips.clone();
    if config.ranges.is_empty() {
        return Ok(Demand { ips, ..Demand::of(ranges) });
    }
    let pool = |range: &config::Range| {
        network(range.subnet).map(|subnet| Pool::part(subnet, range.start, range.end))
    };
    let sets = config.ranges.iter().map(|set| set.iter().filter_map(pool).collect()).collect();
    Ok(Demand { sets, ips, chosen: false })
}

/// Ranges whose traffic the network wants to leave with the node's address.
fn masquerade(config: &Config, given: Option<&Outcome>, ranges: &[IpNetwork]) -> Vec<IpNetwork> {
    if config.ip_masq != Some(true) {
        return Vec::new();
    }
    let subnet = |net: IpNetwork| IpNetwork::new(net.network(), net.prefix()).ok();
    let own = config.ranges.iter().flatten().filter_map(|range| network(range.subnet));
    let given = given.into_iter().flat_map(|given| &given.ips).filter_map(|ip| network(ip.address));
    let mut all: Vec<IpNetwork> = match given.filter_map(subnet).collect::<Vec<_>>() {
        none if none.is_empty() => own.filter_map(subnet).collect(),
        given => given,
    };
    if all.is_empty() {
        all = ranges.to_vec();
    }
    all.sort();
    all.dedup();
    all
}

/// What is asked for beside addresses.
pub(super) fn asked(
    config: &Config,
    given: Option<&Outcome>,
    ranges: &[IpNetwork],
    container_id: &str,
    ifname: &str,
) -> Asked {
    let port = |mapping: &config::PortMapping| PortMapping {
        host_port: mapping.host_port,
        container_port: mapping.container_port,
        protocol: match mapping.protocol {
            config::Protocol::Tcp => Protocol::Tcp,
            config::Protocol::Udp => Protocol::Udp,
            config::Protocol::Sctp => Protocol::Sctp,
        },
        host_ip: mapping.host_ip,
    };
    Asked {
        network: config.head.name.clone(),
        container_id: container_id.to_owned(),
        ifname: ifname.to_owned(),
        mac: config.mac,
        mtu: config.mtu.unwrap_or(0),
        cookie: None,
        table: None,
        ports: config.port_mappings.iter().map(port).collect(),
        bandwidth: config.bandwidth.map(limits).unwrap_or_default(),
        masquerade: masquerade(config, given, ranges),
        spared: config.ip_masq == Some(false),
    }
}

fn limits(given: config::Bandwidth) -> Bandwidth {
    Bandwidth {
        ingress_bps: given.ingress_rate,
        ingress_burst_bits: given.ingress_burst,
        egress_bps: given.egress_rate,
        egress_burst_bits: given.egress_burst,
    }
}

/// The answer to ADD: what earlier plugins did, and what was made now.
pub(super) fn outcome(
    config: &Config,
    given: Option<&Outcome>,
    netns: &str,
    ifname: &str,
    added: &Added,
) -> Outcome {
    let mut outcome = config.prev.clone().unwrap_or_default();
    let host = Interface {
        name: added.host_link.clone(),
        mac: mac_text(added.host_mac),
        mtu: Some(added.mtu),
        sandbox: String::new(),
    };
    let inner = Interface {
        name: ifname.to_owned(),
        mac: mac_text(added.mac),
        mtu: Some(added.mtu),
        sandbox: netns.to_owned(),
    };
    outcome.interfaces.extend([host, inner]);
    let interface = Some(outcome.interfaces.len() - 1);
    let ip = |ip: &IpAddr| Ip { address: Cidr::host(*ip), gateway: Some(gateway(*ip)), interface };
    outcome.ips.extend(added.ips.iter().map(ip));
    let route = |ip: IpAddr| {
        let to = everything(ip);
        let more = added.table.map(|table| ("table".to_owned(), table)).into_iter().collect();
        Route { dst: Cidr { ip: to.ip(), prefix: to.prefix() }, gw: Some(gateway(ip)), more }
    };
    // Before tables could be named, a route in one of its own would look like one that takes everything.
    if added.table.is_none() || config.head.version >= Version::V1_1_0 {
        outcome.routes.extend(of_each_family(&added.ips).map(route));
    }
    outcome.dns = dns(config, given, outcome.dns);
    outcome
}

/// The runtime's word counts most, then the network's, then the delegate's, then that of earlier plugins.
fn dns(config: &Config, given: Option<&Outcome>, prev: Dns) -> Dns {
    let given = given.map(|given| given.dns.clone()).filter(|dns| !dns.is_empty());
    let mut dns = config.dns.clone().or(given).unwrap_or(prev);
    if let Some(runtime) = &config.runtime_dns {
        let replace = |own: &mut Vec<String>, theirs: &Vec<String>| {
            if !theirs.is_empty() {
                own.clone_from(theirs);
            }
        };
        replace(&mut dns.nameservers, &runtime.nameservers);
        replace(&mut dns.search, &runtime.search);
        replace(&mut dns.options, &runtime.options);
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn config(more: &Value) -> Config {
        let mut config = json!({"cniVersion": "1.1.0", "name": "net", "type": "sheave-cni"});
        config.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        Config::read(&config, "").unwrap()
    }

    fn added() -> Added {
        Added {
            host_link: "shv0".to_owned(),
            host_mac: [2, 0, 0, 0, 0, 0],
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1450,
            table: None,
            ips: vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
        }
    }

    #[test]
    fn results_amend_earlier_ones() {
        let prev = json!({"prevResult": {
            "interfaces": [{"name": "lo", "sandbox": "/n"}],
            "ips": [{"address": "127.0.0.1/8", "interface": 0}],
        }});
        let outcome = outcome(&config(&prev), None, "/n", "eth0", &added());
        let names: Vec<&str> = outcome.interfaces.iter().map(|link| link.name.as_str()).collect();
        assert_eq!(names, ["lo", "shv0", "eth0"]);
        let places: Vec<Option<usize>> = outcome.ips.iter().map(|ip| ip.interface).collect();
        assert_eq!(places, [Some(0), Some(2), Some(2)]);
        assert_eq!(
            (outcome.interfaces[1].sandbox.as_str(), outcome.interfaces[2].sandbox.as_str()),
            ("", "/n")
        );
        assert_eq!(outcome.routes.len(), 2);
    }

    #[test]
    fn name_resolution_is_overridden() {
        let given = Outcome {
            dns: Dns { nameservers: vec!["1.1.1.1".to_owned()], domain: "a".to_owned(), ..Dns::default() },
            ..Outcome::default()
        };
        let of = |more: Value| outcome(&config(&more), Some(&given), "/n", "eth0", &added()).dns;
        assert_eq!(of(json!({})).nameservers, ["1.1.1.1"]);
        let own = of(json!({"dns": {"search": ["b"]}}));
        assert!(own.nameservers.is_empty() && own.domain.is_empty() && own.search == ["b"]);
        let runtime = of(json!({"runtimeConfig": {"dns": {"servers": ["9.9.9.9"]}}}));
        assert_eq!((runtime.nameservers[0].as_str(), runtime.domain.as_str()), ("9.9.9.9", "a"));
    }

    #[test]
    fn demands_come_from_ranges_delegates_or_the_node() {
        let node: Vec<IpNetwork> = vec!["10.244.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()];
        let of = |more: Value, given: Option<&Outcome>| demand(&config(&more), given, &node);
        assert_eq!(of(json!({}), None).unwrap().sets.len(), 2);
        let ranges = json!({"ipam": {"ranges": [[{"subnet": "10.9.0.0/24", "rangeStart": "10.9.0.8"}]]}});
        let own = of(ranges, None).unwrap();
        assert_eq!((own.sets.len(), own.sets[0][0].bounds.0.to_string()), (1, "10.9.0.8".to_owned()));
        let given = Outcome {
            ips: vec![Ip { address: "192.0.2.5/24".parse().unwrap(), gateway: None, interface: None }],
            ..Outcome::default()
        };
        let chosen = of(json!({}), Some(&given)).unwrap();
        assert!(chosen.chosen && chosen.sets.is_empty() && chosen.ips.len() == 1);
        assert!(of(json!({}), Some(&Outcome::default())).is_err());
    }

    #[test]
    fn networks_that_masquerade_name_their_ranges() {
        let node: Vec<IpNetwork> = vec!["10.244.0.0/24".parse().unwrap()];
        let of = |more: Value, given: Option<&Outcome>| {
            let ranges = asked(&config(&more), given, &node, "a", "eth0").masquerade;
            ranges.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(of(json!({}), None).is_empty() && of(json!({"ipMasq": false}), None).is_empty());
        assert_eq!(of(json!({"ipMasq": true}), None), ["10.244.0.0/24"]);
        let own = json!({"ipMasq": true, "ipam": {"ranges": [[{"subnet": "10.9.0.0/16"}]]}});
        assert_eq!(of(own, None), ["10.9.0.0/16"]);
        let given = Outcome {
            ips: vec![Ip { address: "192.0.2.5/24".parse().unwrap(), gateway: None, interface: None }],
            ..Outcome::default()
        };
        assert_eq!(of(json!({"ipMasq": true}), Some(&given)), ["192.0.2.0/24"]);
    }

    #[test]
    fn errors_say_what_can_be_done() {
        let taken = NetworkError::Connected { key: "net/a/eth0".to_owned() };
        assert_eq!(error(&taken).code, code::TAKEN);
        assert_eq!(error(&NetworkError::NoRange).code, code::TRY_LATER);
    }
}
