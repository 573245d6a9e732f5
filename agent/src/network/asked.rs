//! What is asked for an attachment. Invariant: plain data that a lease keeps, so that an agent which starts again
//! repairs an attachment to what its runtime asked for.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::bandwidth::Bandwidth;
use super::ipam::Pool;
use super::netlink::Mac;
use super::ports::PortMapping;

/// What a runtime asked for by the container network interface, beside addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Asked {
    /// Name of the network.
    pub(super) network: String,
    /// The runtime's name for the container.
    pub(super) container_id: String,
    /// Name of the interface inside.
    pub(super) ifname: String,
    /// The hardware address inside, where one was asked for.
    pub(super) mac: Option<Mac>,
    /// Of the interface, bytes; 0 follows the way out.
    pub(super) mtu: u32,
    /// Of the namespace that it was connected in.
    pub(super) cookie: Option<u64>,
    /// What is sent from its addresses goes by this table: there was a way out before it.
    pub(super) table: Option<u32>,
    /// Ports of the node.
    pub(super) ports: Vec<PortMapping>,
    /// How fast it may receive and send.
    pub(super) bandwidth: Bandwidth,
    /// Ranges whose traffic is to leave with the node's address (`ipMasq`).
    pub(super) masquerade: Vec<IpNetwork>,
    /// Its own traffic is not to (`ipMasq` is false, and not just absent).
    pub(super) spared: bool,
}

impl Asked {
    /// What the attachment is known by.
    pub(super) fn key(&self) -> String {
        key(&self.network, &self.container_id, &self.ifname)
    }
}

/// What an attachment of a container's interface to a network is known by.
pub(super) fn key(network: &str, container_id: &str, ifname: &str) -> String {
    format!("{network}/{container_id}/{ifname}")
}

/// Which addresses an attachment is to have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Demand {
    /// One from each set.
    pub(super) sets: Vec<Vec<Pool>>,
    /// Those that must be among them.
    pub(super) ips: Vec<IpAddr>,
    /// Somebody else has chosen `ips`: they need not be in any set, and nothing is added to them.
    pub(super) chosen: bool,
}

impl Demand {
    /// An address of each family that has a range.
    pub(super) fn of(ranges: &[IpNetwork]) -> Self {
        let family = |v4: bool| {
            let of_family = ranges.iter().filter(|range| range.is_ipv4() == v4);
            of_family.map(|range| Pool::whole(*range)).collect::<Vec<_>>()
        };
        let sets = [family(true), family(false)].into_iter().filter(|set| !set.is_empty()).collect();
        Demand { sets, ips: Vec::new(), chosen: false }
    }
}
