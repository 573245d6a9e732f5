//! What an agent is told when it starts. Plain data: nothing here reads the host, and a config that
//! `validate` accepts names no two things that contradict each other.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::dataplane::ServiceSettings;
use crate::limits;
use crate::network::overlay::{OverlaySettings, VNI_MAX};

/// What an agent can do on its node. An agent beside an existing kubelet runs `services`, `network` or both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Component {
    /// Registers the Node, renews its Lease, runs the pods bound to it and serves their logs.
    Pods,
    /// Balances Services in the kernel.
    Services,
    /// Connects pods, those of others' runtimes too, and leads to the pods of other nodes. What runs pods does this
    /// as well, whether it is named or not.
    Network,
}

/// Settings of one agent. Every field has a default, so that a TOML or JSON document names only what
/// differs; unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentConfig {
    /// Name of the Node object. Empty means the host's name, in lower case.
    pub node_name: String,
    /// Credentials and address of the API server.
    pub kubeconfig: PathBuf,
    /// Images, volumes and IPAM records; survives a reboot.
    pub state_dir: PathBuf,
    /// Sockets and records of what runs; must not survive a reboot.
    pub run_dir: PathBuf,
    /// Container logs, `<namespace>_<name>_<uid>/<container>/<n>.log`.
    pub log_dir: PathBuf,
    /// Directory of a bpffs in which programs, maps and links are pinned.
    pub pin_dir: PathBuf,
    /// Where the service hooks attach and below which `kubepods` lives. `None` means the root of the
    /// v2 hierarchy. On hosts with v1 controllers the path relative to that root is used there too.
    pub cgroup_path: Option<PathBuf>,
    /// Addresses of the node, at most one a family is published as InternalIP. Empty means the
    /// addresses of the uplink (or of the interface with the default route).
    pub node_ips: Vec<IpAddr>,
    /// Ranges that pods get their addresses from, at most one a family. See [`AgentConfig::pod_cidrs_of_node`].
    pub pod_cidrs: Vec<IpNetwork>,
    /// Whether `pod_cidrs` are replaced by what the peers file says of this node or, without such a file, by the
    /// Node's `spec.podCIDRs`, which are waited for.
    pub pod_cidrs_of_node: bool,
    /// Nameservers of pods with `dnsPolicy: ClusterFirst`. Empty means that such pods get the node's.
    pub cluster_dns: Vec<IpAddr>,
    /// Suffix of the search list of pods with `dnsPolicy: ClusterFirst`.
    pub cluster_domain: String,
    /// Interfaces through which traffic from outside arrives. Empty means the one with the default route.
    pub uplinks: Vec<String>,
    /// Where `/containerLogs` and `/pods` are served over https to clients with a certificate of the
    /// cluster's CA. Port 0 takes a free one; the Node's `daemonEndpoints` says which.
    pub listen: SocketAddr,
    /// Where `/healthz`, `/livez` and `/metrics` are served in clear text.
    pub health_listen: SocketAddr,
    /// PEM certificate of `listen`. `None` means the kubeconfig's client certificate, or a self-signed one where it
    /// has none.
    pub tls_cert: Option<PathBuf>,
    /// PEM key of `tls_cert`; both or neither.
    pub tls_key: Option<PathBuf>,
    /// Pods that the node runs at most (1 to [`limits::PODS_PER_NODE_MAX`]).
    pub max_pods: u32,
    /// Labels that the Node gets beside the well-known ones.
    pub node_labels: BTreeMap<String, String>,
    /// First and last NodePort, inclusive; must be what the control plane allocates from.
    pub node_port_range: (u16, u16),
    /// How pods of other nodes are reached.
    pub overlay: OverlaySettings,
    /// Whether packets of flows that nothing translates go past the host's stack.
    pub fast_path: bool,
    /// How services are balanced.
    pub services: ServiceSettings,
    /// What this agent does. Empty means everything.
    pub components: Vec<Component>,
    /// Program that is started as a pod's shim. `None` means the running executable.
    pub shim_exe: Option<PathBuf>,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            node_name: String::new(),
            kubeconfig: PathBuf::from("/var/lib/sheave/agent.kubeconfig"),
            state_dir: PathBuf::from("/var/lib/sheave"),
            run_dir: PathBuf::from("/run/sheave"),
            log_dir: PathBuf::from("/var/log/pods"),
            pin_dir: PathBuf::from("/sys/fs/bpf/sheave"),
            cgroup_path: None,
            node_ips: Vec::new(),
            pod_cidrs: default_pod_cidrs(),
            pod_cidrs_of_node: false,
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            uplinks: Vec::new(),
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 10250)),
            health_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 10248)),
            tls_cert: None,
            tls_key: None,
            max_pods: 110,
            node_labels: BTreeMap::new(),
            node_port_range: (30000, 32767),
            overlay: OverlaySettings::default(),
            fast_path: true,
            services: ServiceSettings::default(),
            components: Vec::new(),
            shim_exe: None,
        }
    }
}

fn default_pod_cidrs() -> Vec<IpNetwork> {
    ["10.244.0.0/24", "fd00:244::/64"].iter().filter_map(|cidr| cidr.parse().ok()).collect()
}

/// Why a configuration can't be used. Each message names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A Node's name must be usable as an object name and a host name.
    #[error(
        "node_name {0:?} is not a DNS subdomain (lower-case letters, digits, '-' and '.', at most 253 characters)"
    )]
    NodeName(String),
    /// More than one address or range of one family.
    #[error("{field}: more than one of family {family}")]
    TwoOfAFamily {
        /// The field in question.
        field: &'static str,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// No address can be given to a pod.
    #[error("pod_cidrs is empty: the components \"pods\" and \"network\" need at least one range")]
    NoPodCidr,
    /// Out of 1 to [`limits::PODS_PER_NODE_MAX`].
    #[error("max_pods {0} is out of range 1 to {max}", max = limits::PODS_PER_NODE_MAX)]
    MaxPods(u32),
    /// First port above the last, or 0.
    #[error("node_port_range {0}-{1} is not a range of ports")]
    NodePorts(u16, u16),
    /// Out of 1 to [`VNI_MAX`].
    #[error("overlay.vni {0} is out of range 1 to {VNI_MAX}")]
    Vni(u32),
    /// Not a port.
    #[error("overlay.port is 0; the default is 4789")]
    VxlanPort,
    /// A map of the data plane that nothing fits into, or larger than the kernel takes.
    #[error(
        "services.map_sizes.{field} {value} is out of range {min} to {max}",
        min = limits::MAP_ENTRIES_MIN,
        max = limits::MAP_ENTRIES_MAX
    )]
    MapEntries {
        /// The field in question.
        field: &'static str,
        /// Its value.
        value: u32,
    },
    /// A certificate without its key, or the other way round.
    #[error("tls_cert and tls_key must both be set, or neither")]
    HalfTls,
}

impl AgentConfig {
    /// Whether this agent does `component`.
    pub fn does(&self, component: Component) -> bool {
        let named = |component| self.components.contains(&component);
        self.components.is_empty()
            || named(component)
            || component == Component::Network && named(Component::Pods)
    }

    /// Whether this agent works with an API server. Without one, a network alone gets its peers from a file.
    pub fn needs_api(&self) -> bool {
        self.does(Component::Pods) || self.does(Component::Services) || self.overlay.peers_file.is_none()
    }

    /// Refuses what can't work, before anything is touched. `node_name` must be filled in.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !is_dns_subdomain(&self.node_name) {
            return Err(ConfigError::NodeName(self.node_name.clone()));
        }
        one_of_each_family("node_ips", self.node_ips.iter().map(IpAddr::is_ipv4))?;
        one_of_each_family("pod_cidrs", self.pod_cidrs.iter().map(IpNetwork::is_ipv4))?;
        if self.does(Component::Network) && self.pod_cidrs.is_empty() {
            return Err(ConfigError::NoPodCidr);
        }
        if self.overlay.vni == 0 || self.overlay.vni > VNI_MAX {
            return Err(ConfigError::Vni(self.overlay.vni));
        }
        if self.overlay.port == 0 {
            return Err(ConfigError::VxlanPort);
        }
        if self.max_pods == 0 || self.max_pods > limits::PODS_PER_NODE_MAX {
            return Err(ConfigError::MaxPods(self.max_pods));
        }
        let (first, last) = self.node_port_range;
        if first == 0 || first > last {
            return Err(ConfigError::NodePorts(first, last));
        }
        for (field, value) in self.services.map_sizes.set() {
            if !(limits::MAP_ENTRIES_MIN..=limits::MAP_ENTRIES_MAX).contains(&value) {
                return Err(ConfigError::MapEntries { field, value });
            }
        }
        if self.tls_cert.is_some() != self.tls_key.is_some() {
            return Err(ConfigError::HalfTls);
        }
        Ok(())
    }
}

fn one_of_each_family(field: &'static str, are_v4: impl Iterator<Item = bool>) -> Result<(), ConfigError> {
    let (v4, v6): (Vec<bool>, Vec<bool>) = are_v4.partition(|is_v4| *is_v4);
    if v4.len() > 1 {
        return Err(ConfigError::TwoOfAFamily { field, family: "IPv4" });
    }
    if v6.len() > 1 {
        return Err(ConfigError::TwoOfAFamily { field, family: "IPv6" });
    }
    Ok(())
}

fn is_dns_subdomain(name: &str) -> bool {
    let label_ok = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    name.len() <= 253 && name.split('.').all(label_ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> AgentConfig {
        AgentConfig { node_name: name.to_owned(), ..AgentConfig::default() }
    }

    #[test]
    fn the_default_is_valid_once_it_has_a_name() {
        assert_eq!(named("node-1").validate(), Ok(()));
        assert_eq!(named("").validate(), Err(ConfigError::NodeName(String::new())));
        assert!(named("Node").validate().is_err());
        assert!(named("a..b").validate().is_err());
        assert_eq!(named("n").pod_cidrs.len(), 2);
    }

    #[test]
    fn contradictions_are_refused() {
        let base = named("n");
        let two = AgentConfig { node_ips: vec![[10, 0, 0, 1].into(), [10, 0, 0, 2].into()], ..base.clone() };
        assert_eq!(two.validate(), Err(ConfigError::TwoOfAFamily { field: "node_ips", family: "IPv4" }));
        let none = AgentConfig { pod_cidrs: vec![], ..base.clone() };
        assert_eq!(none.validate(), Err(ConfigError::NoPodCidr));
        let services = AgentConfig { components: vec![Component::Services], ..none };
        assert_eq!(services.validate(), Ok(()));
        let mut overlay = base.clone();
        overlay.overlay.vni = 1 << 24;
        assert_eq!(overlay.validate(), Err(ConfigError::Vni(1 << 24)));
        let ports = AgentConfig { node_port_range: (2, 1), ..base.clone() };
        assert_eq!(ports.validate(), Err(ConfigError::NodePorts(2, 1)));
        let mut maps = base.clone();
        maps.services.map_sizes.flows = Some(1);
        assert_eq!(maps.validate(), Err(ConfigError::MapEntries { field: "flows", value: 1 }));
        let tls = AgentConfig { tls_cert: Some("c".into()), ..base.clone() };
        assert_eq!(tls.validate(), Err(ConfigError::HalfTls));
        assert!(AgentConfig { max_pods: 0, ..base }.validate().is_err());
    }

    #[test]
    fn what_runs_pods_connects_them() {
        let only = |component| AgentConfig { components: vec![component], ..named("n") };
        assert!(only(Component::Pods).does(Component::Network));
        assert!(!only(Component::Services).does(Component::Network));
        let mut network = only(Component::Network);
        assert!(!network.does(Component::Pods) && network.needs_api());
        network.overlay.peers_file = Some("peers.toml".into());
        assert!(!network.needs_api());
    }

    #[test]
    fn unknown_keys_are_refused_and_absent_ones_defaulted() {
        let partial: AgentConfig = serde_json::from_str(r#"{"node_name":"a","components":["services"]}"#)
            .expect("a partial document");
        assert!(!partial.does(Component::Pods));
        assert_eq!(partial.max_pods, 110);
        assert!(serde_json::from_str::<AgentConfig>(r#"{"nodename":"a"}"#).is_err());
    }
}
