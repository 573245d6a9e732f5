//! What an operator may say about balancing, as settings file and flags have it. Invariant: everything has a default,
//! and what is left open is filled in from the host by a function that reads nothing itself.

use super::{KubeProxyLeftovers, MapSizes, Mode, NodePortAddresses};
use crate::limits;
use crate::service::IpvsScheduler;
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use sheave_ebpf_abi::{FLOWS_PER_SET, FlowSet};
use std::net::{Ipv4Addr, SocketAddr};

/// How services are balanced on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServiceSettings {
    /// Which data plane; `None` takes the best that the host has.
    pub data_plane: Option<Mode>,
    /// On which of the node's addresses NodePorts are reached.
    pub node_port_addresses: NodePortAddresses,
    /// Masquerade all that arrives for a service, not only what must be.
    pub masquerade_all: bool,
    /// Balance in XDP on uplinks that have it.
    pub xdp: bool,
    /// IPVS scheduler of services that ask for none.
    pub ipvs_scheduler: IpvsScheduler,
    /// Beginnings of the names of pods' host-side devices beside those that this agent makes.
    pub pod_links: Vec<String>,
    /// Whether packets of pods are balanced at their devices too; `None` is false where this agent runs the pods, whose
    /// sockets it serves all, else true.
    pub pod_packets: Option<bool>,
    /// Connections from outside to pods of this node go past its stack.
    pub host_routing: bool,
    /// Entries of the eBPF maps, where they are not to follow from the host's memory.
    pub map_sizes: MapEntries,
    /// What is done about rules that a kube-proxy left on the host.
    pub kube_proxy_leftovers: KubeProxyLeftovers,
    /// Where `/healthz` and `/livez` are served as kube-proxy does, for load balancers.
    pub proxy_health_listen: SocketAddr,
}

impl Default for ServiceSettings {
    fn default() -> Self {
        Self {
            data_plane: None,
            node_port_addresses: NodePortAddresses::All,
            masquerade_all: false,
            xdp: false,
            ipvs_scheduler: IpvsScheduler::Rr,
            pod_links: Vec::new(),
            pod_packets: None,
            host_routing: false,
            map_sizes: MapEntries::default(),
            kube_proxy_leftovers: KubeProxyLeftovers::default(),
            proxy_health_listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 10256)),
        }
    }
}

impl NodePortAddresses {
    /// What the words of a flag say: `all` (or nothing), `primary`, or ranges.
    ///
    /// # Errors
    /// The word that is neither, and what there is.
    pub fn parse(words: &[String]) -> Result<Self, String> {
        match words {
            [] => return Ok(Self::All),
            [one] if one == "all" => return Ok(Self::All),
            [one] if one == "primary" => return Ok(Self::Primary),
            _ => {}
        }
        let range = |word: &String| {
            word.parse::<IpNetwork>().map_err(|_| {
                format!("{word:?} is not a range such as 192.0.2.0/24; or say `all` or `primary` alone")
            })
        };
        words.iter().map(range).collect::<Result<_, _>>().map(Self::In)
    }
}

/// Entries of the eBPF maps; `None` follows from the host's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct MapEntries {
    /// Frontends of each family.
    pub frontends: Option<u32>,
    /// Slots in all runs together.
    pub slots: Option<u32>,
    /// Backends.
    pub backends: Option<u32>,
    /// Entries of the connection table, two a connection.
    pub flows: Option<u32>,
    /// Clients with session affinity.
    pub affinity: Option<u32>,
    /// Endpoints of services with session affinity.
    pub members: Option<u32>,
    /// Source ranges of all services.
    pub ranges: Option<u32>,
    /// Maglev tables.
    pub maglevs: Option<u32>,
}

impl MapEntries {
    /// The names, in the order of the fields.
    pub const NAMES: [&str; 8] =
        ["frontends", "slots", "backends", "flows", "affinity", "members", "ranges", "maglevs"];

    /// The field with this name.
    pub fn field(&mut self, name: &str) -> Option<&mut Option<u32>> {
        Some(match name {
            "frontends" => &mut self.frontends,
            "slots" => &mut self.slots,
            "backends" => &mut self.backends,
            "flows" => &mut self.flows,
            "affinity" => &mut self.affinity,
            "members" => &mut self.members,
            "ranges" => &mut self.ranges,
            "maglevs" => &mut self.maglevs,
            _ => return None,
        })
    }

    /// What is set, with its name.
    pub(crate) fn set(&self) -> impl Iterator<Item = (&'static str, u32)> {
        let mut all = *self;
        Self::NAMES.into_iter().filter_map(move |name| Some((name, (*all.field(name)?)?)))
    }

    /// The sizes on a host with so many bytes of memory.
    ///
    /// What is allocated at once follows from memory, rounded down to a power of two, and never less than
    /// [`MapSizes::default`]: the connection table takes a 512th of memory, clients with affinity and slots a 4096th
    /// each. What is allocated as it comes has the default's room, and so have backends (6 MB).
    pub fn sizes(&self, memory_bytes: u64) -> MapSizes {
        /// Bytes that one entry of a map takes in the kernel, its bookkeeping included.
        const FLOW_BYTES: u64 = (size_of::<FlowSet>() as u64).div_ceil(FLOWS_PER_SET as u64);
        const AFFINITY_BYTES: u64 = 96;
        const SLOT_BYTES: u64 = 8;
        let least = MapSizes::default();
        let share = |part: u64, entry: u64, min: u32, max: u32| {
            let entries = u32::try_from(memory_bytes / part / entry).unwrap_or(u32::MAX).max(1);
            (1 << entries.ilog2()).clamp(min, max)
        };
        let flows = share(limits::FLOWS_MEMORY_SHARE, FLOW_BYTES, least.flows, limits::FLOWS_DEFAULT_MAX);
        let affinity = share(
            limits::AFFINITY_MEMORY_SHARE,
            AFFINITY_BYTES,
            least.affinity,
            limits::AFFINITY_DEFAULT_MAX,
        );
        let slots = share(limits::SLOTS_MEMORY_SHARE, SLOT_BYTES, least.slots, limits::SLOTS_DEFAULT_MAX);
        MapSizes {
            frontends: self.frontends.unwrap_or(least.frontends),
            slots: self.slots.unwrap_or(slots),
            backends: self.backends.unwrap_or(least.backends),
            flows: self.flows.unwrap_or(flows),
            affinity: self.affinity.unwrap_or(affinity),
            members: self.members.unwrap_or(least.members),
            ranges: self.ranges.unwrap_or(least.ranges),
            maglevs: self.maglevs.unwrap_or(least.maglevs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_memory_between_their_bounds() {
        let open = MapEntries::default();
        assert_eq!(open.sizes(0), MapSizes::default());
        assert_eq!(open.sizes(512 << 20), MapSizes::default());
        let large = open.sizes(24 << 30);
        assert_eq!((large.flows, large.affinity, large.slots), (262_144, 65_536, 524_288));
        let huge = open.sizes(u64::MAX);
        assert_eq!(huge.flows, limits::FLOWS_DEFAULT_MAX);
        assert_eq!(huge.frontends, MapSizes::default().frontends);
    }

    #[test]
    fn what_is_set_wins_over_memory() {
        let mut given = MapEntries::default();
        for (n, name) in (10..).zip(MapEntries::NAMES) {
            *given.field(name).expect("every name has a field") = Some(n);
        }
        assert_eq!(given.field("flow"), None);
        let named: Vec<_> = given.set().map(|(name, _)| name).collect();
        assert_eq!(named, MapEntries::NAMES);
        let sizes = given.sizes(24 << 30);
        assert_eq!((sizes.frontends, sizes.slots, sizes.maglevs), (10, 11, 17));
    }

    #[test]
    fn node_port_addresses_are_words_or_ranges() {
        let parse = |words: &[&str]| {
            NodePortAddresses::parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(parse(&[]), Ok(NodePortAddresses::All));
        assert_eq!(parse(&["primary"]), Ok(NodePortAddresses::Primary));
        assert!(
            matches!(parse(&["192.0.2.0/24", "2001:db8::/32"]), Ok(NodePortAddresses::In(two)) if two.len() == 2)
        );
        assert!(parse(&["primary", "192.0.2.0/24"]).unwrap_err().contains("primary"));
        assert!(parse(&["somewhere"]).unwrap_err().contains("somewhere"));
    }
}
