//! The desired table, in the kernel. Invariant: a data plane does what it is told and decides nothing; what is to be
//! done is decided in [`crate::service`].
//!
//! Restart, resync and first start are one path: open (adopting what is pinned), observe, diff, apply, attach.

pub mod choice;
pub(crate) mod driver;
pub mod ebpf;
mod foreign;
mod health;
mod ipvs;
mod metrics;
pub mod mirror;
mod nftables;
mod settings;
mod stats;

pub(crate) use driver::Notice;
pub use driver::{Driver, Feed, run};
pub use ebpf::{Lookup, Pressure, ServiceRow, list, uninstall};
pub use foreign::KubeProxyLeftovers;
pub use health::{ProxyHealth, ServiceCheck, ServiceChecks};
pub use metrics::{CodeLabels, PolicyLabels, ProxyMetrics, TrafficPolicy};
pub use settings::{MapEntries, ServiceSettings};
pub use stats::{DataplaneStats, StatsHandle};

use crate::service::{Abilities, Capacity, Changes, IpvsScheduler, Observed};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

/// The ways to balance services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// eBPF at the socket and at network devices.
    Ebpf,
    /// The kernel's IPVS, with nftables for what it can't do.
    Ipvs,
    /// nftables alone.
    Nftables,
}

impl Mode {
    /// All of them, best first.
    pub const ALL: [Self; 3] = [Self::Ebpf, Self::Nftables, Self::Ipvs];

    /// The name in settings, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Ipvs => "ipvs",
            Self::Nftables => "nftables",
        }
    }

    /// The mode with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

/// On which of the node's addresses NodePorts are reached (kube-proxy's `nodePortAddresses`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodePortAddresses {
    /// On all that others can reach, and on loopback for programs of the node itself.
    #[default]
    All,
    /// On the node's primary addresses only, one a family.
    Primary,
    /// On addresses in these ranges.
    In(Vec<IpNetwork>),
}

/// Entries of the eBPF maps. Maps that are pinned keep their size until they are grown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSizes {
    /// Frontends of each family.
    pub frontends: u32,
    /// Slots in all runs together.
    pub slots: u32,
    /// Backends.
    pub backends: u32,
    /// Entries of the connection table, two a connection.
    pub flows: u32,
    /// Clients with session affinity.
    pub affinity: u32,
    /// Endpoints of services with session affinity.
    pub members: u32,
    /// Source ranges of all services.
    pub ranges: u32,
    /// Maglev tables, 32 KiB each; element 0 is nobody's.
    pub maglevs: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        use sheave_ebpf_abi::map;
        Self {
            frontends: map::FRONTENDS_MAX as u32,
            slots: map::SLOTS_MAX as u32,
            backends: map::BACKENDS_MAX as u32,
            flows: map::FLOWS_MAX as u32,
            affinity: map::AFFINITY_MAX as u32,
            members: map::MEMBERS_MAX as u32,
            ranges: map::RANGES_MAX as u32,
            maglevs: map::MAGLEV_MAX as u32,
        }
    }
}

/// Settings of the data plane.
#[derive(Clone, Debug)]
pub struct DataplaneConfig {
    /// Which one; `None` takes the best that the host has.
    pub mode: Option<Mode>,
    /// Directory on a bpffs for the pins; a versioned directory is made below it. A bpffs is mounted where there is
    /// none (at `/sys/fs/bpf` for paths below it, else at the directory itself).
    pub pin_dir: PathBuf,
    /// The cgroup whose processes are served, and those below it; `None` means the root of the v2 hierarchy.
    pub cgroup_path: Option<PathBuf>,
    /// Ethernet devices on which traffic arrives from outside: clients of NodePorts and load balancers, and answers of
    /// backends on other nodes.
    pub uplinks: Vec<String>,
    /// Beginnings of the names of pods' host-side devices. Devices that come later are found by the repair timer.
    pub pod_links: Vec<String>,
    /// Whether packets that pods send to a service without having been translated at the socket are balanced at these
    /// devices: those of virtual machines and of raw sockets. It is done whatever this says where `masquerade_all` wants the
    /// answers of pods to be seen there.
    pub pod_packets: bool,
    /// Whether connections from outside to pods of this node go past its stack on both ways, where the routing table leads
    /// to a device of `pod_links`: they meet no netfilter rule and no connection tracking of this node (eBPF host routing).
    pub host_routing: bool,
    /// Whether other programs are to see what these devices take, as those of this agent's policies do. Otherwise packets that
    /// go past the stack enter the pods' namespaces at once, which is what makes it fast.
    pub watched_pod_links: bool,
    /// Name of this node, by which endpoints are local.
    pub node_name: String,
    /// Addresses of this node in addition to those found on its interfaces; the first of each family is primary.
    pub node_ips: Vec<IpAddr>,
    /// Ranges of pod addresses in the whole cluster, as far as known: traffic from there is not from outside.
    pub pod_cidrs: Vec<IpNetwork>,
    /// First and last NodePort.
    pub node_port_range: (u16, u16),
    /// Where NodePorts are reached.
    pub node_port_addresses: NodePortAddresses,
    /// Masquerade all that arrives for a service, not only what must be.
    pub masquerade_all: bool,
    /// Balance in XDP on uplinks that have it, before tcx does.
    pub xdp: bool,
    /// IPVS scheduler of services that ask for none.
    pub ipvs_scheduler: IpvsScheduler,
    /// Entries of the eBPF maps.
    pub sizes: MapSizes,
    /// Where the active mode is remembered, so that the next start can remove it when it chooses another; `None`
    /// remembers nothing.
    pub run_dir: Option<PathBuf>,
    /// What is done about rules that a kube-proxy left in this network namespace.
    pub kube_proxy_leftovers: KubeProxyLeftovers,
    /// Where the current figures are put for `/metrics`; keep a clone.
    pub stats: StatsHandle,
}

impl Default for DataplaneConfig {
    fn default() -> Self {
        Self {
            mode: Some(Mode::Ebpf),
            pin_dir: PathBuf::from("/sys/fs/bpf/sheave"),
            cgroup_path: None,
            uplinks: Vec::new(),
            pod_links: Vec::new(),
            pod_packets: true,
            host_routing: false,
            watched_pod_links: true,
            node_name: String::new(),
            node_ips: Vec::new(),
            pod_cidrs: Vec::new(),
            node_port_range: (30_000, 32_767),
            node_port_addresses: NodePortAddresses::All,
            masquerade_all: false,
            xdp: false,
            ipvs_scheduler: IpvsScheduler::Rr,
            sizes: MapSizes::default(),
            run_dir: None,
            kube_proxy_leftovers: KubeProxyLeftovers::default(),
            stats: StatsHandle::default(),
        }
    }
}

/// Why the data plane could not do something.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The host lacks something.
    #[error("this host lacks {what}: {hint}")]
    Missing {
        /// What is missing.
        what: &'static str,
        /// What was seen, or what to do.
        hint: String,
    },
    /// A pin could not be made, opened or removed.
    #[error("cannot {op} {}", path.display())]
    Pin {
        /// What was tried.
        op: &'static str,
        /// The pin.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A pinned map is not of this build's making.
    #[error("{} has another layout ({held}) than this program's ({wanted}); `uninstall` removes it", path.display())]
    PinnedMapShape {
        /// The pin.
        path: PathBuf,
        /// What it is.
        held: String,
        /// What it must be.
        wanted: String,
    },
    /// A map operation failed.
    #[error("cannot {op} map {map}")]
    Map {
        /// What was tried.
        op: &'static str,
        /// The map's name.
        map: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refused a program.
    #[error("cannot load {what}")]
    Load {
        /// The program.
        what: String,
        /// The loader's or verifier's words.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A program could not be attached.
    #[error("cannot attach {hook}")]
    Attach {
        /// Where.
        hook: String,
        /// Why not.
        source: io::Error,
    },
    /// A kube-proxy was here.
    #[error(
        "a kube-proxy left {what}: stop it, then let `--kube-proxy-leftovers cleanup` remove that, or `ignore` leave it"
    )]
    Leftovers {
        /// What was found.
        what: String,
    },
    /// Something else of the host failed.
    #[error("cannot {op}")]
    Host {
        /// What was tried.
        op: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// What became of [`Dataplane::attach`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// Traffic flows through the table.
    Yes,
    /// Somebody took the table away. There is an empty one now, to be filled before the next attempt.
    TableIsNew,
}

/// One way to balance services on a node. Implementations block; they are driven from a thread of their own.
///
/// [`Changes`] speak of slots and ids, which only the eBPF maps have. The others keep a [`mirror::Mirror`], which turns
/// changes back into frontends with their backends; they observe nothing and make the kernel equal to what the first
/// [`Dataplane::apply`] after [`Dataplane::observe`] brings, in one step where the kernel allows it.
pub trait Dataplane: Send {
    /// Which one it is.
    fn mode(&self) -> Mode;
    /// What there is room for.
    fn capacity(&self) -> Capacity;
    /// What it can do beside that.
    fn abilities(&self) -> Abilities {
        Abilities::ALL
    }
    /// How full the tables are that the kernel fills itself; empty where nothing can be said.
    fn pressure(&mut self) -> Vec<Pressure> {
        Vec::new()
    }
    /// Reads all that the kernel holds.
    fn observe(&mut self) -> Result<Observed, DataplaneError>;
    /// Makes the changes, in the order of their fields. After an error the kernel may hold any part of them.
    fn apply(&mut self, changes: &Changes) -> Result<(), DataplaneError>;
    /// Says which addresses NodePorts are reached on.
    fn set_node_addresses(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<(), DataplaneError>;
    /// Says whether a data plane that was replaced still has connections, whose packets are left to it.
    fn set_draining(&mut self, _draining: bool) -> Result<(), DataplaneError> {
        Ok(())
    }
    /// Makes traffic flow through the table, if it does not yet: attaches, upgrades in place, re-attaches what was
    /// severed. To be called after the first [`Dataplane::apply`] and then from time to time.
    fn attach(&mut self) -> Result<Attached, DataplaneError>;
}

/// Takes one mode off the host, going on past errors; what was never there is fine. Nothing is balanced by it afterwards.
pub fn remove(mode: Mode, config: &DataplaneConfig) -> Vec<DataplaneError> {
    match mode {
        Mode::Ebpf => uninstall(&config.pin_dir).err().unwrap_or_default(),
        Mode::Nftables => nftables::uninstall(config),
        Mode::Ipvs => ipvs::uninstall(config),
    }
}

/// Takes a mode that another has replaced off the host, but for what its established connections live on. True when all
/// of it is gone; to be called again later otherwise.
fn retire(mode: Mode, config: &DataplaneConfig) -> Result<bool, Vec<DataplaneError>> {
    if mode == Mode::Nftables {
        let failed = |source| vec![DataplaneError::Host { op: "empty the nftables table sheave", source }];
        return nftables::drain().map_err(failed);
    }
    let errors = remove(mode, config);
    if errors.is_empty() { Ok(true) } else { Err(errors) }
}
