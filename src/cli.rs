//! The command line: names, help and units of every flag. A flag that a daemon takes has the same name in the
//! settings file.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

const ABOUT: &str = "The node side of a Kubernetes cluster in one small program";

const LONG_ABOUT: &str = "\
The node side of a Kubernetes cluster in one small program.

Sheave runs pods straight on Linux namespaces and cgroups, balances Services in the kernel with eBPF, and brings a \
small control plane that speaks the Kubernetes API, so that kubectl works unmodified.

  sheave up                 a whole cluster on this host: control plane and node in one process
  sheave control            the control plane alone
  sheave agent              the node daemon alone, against any Kubernetes API server
  sheave image import F     make an OCI image known to this node
  sheave service list       what the kernel balances right now, read from its maps
  sheave service trace      which backend a packet would get, and why
  sheave install cni        the network plugin for containerd, CRI-O and podman
  sheave monitor            drops and new connections as they happen

Containers and service routing do not notice when the daemon is stopped, killed or upgraded: pods belong to a small \
process of their own each, and the eBPF programs stay attached. To take everything off a host: sheave down.";

const AFTER: &str = "\
Start here:
  sudo sheave up
  export KUBECONFIG=/var/lib/sheave/admin.kubeconfig
  kubectl get nodes

Every flag of a daemon can be set in /etc/sheave/config.toml under the section named in its help.";

#[derive(Debug, Parser)]
#[command(name = "sheave", version, about = ABOUT, long_about = LONG_ABOUT, after_help = AFTER)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster on this host: control plane and node in one process
    Up(UpFlags),
    /// Run the control plane: API server, store, controllers, scheduler
    Control(ControlCommand),
    /// Run the node daemon against a Kubernetes API server
    Agent(AgentCommand),
    /// Stop every pod of this node and take the eBPF programs, links and state off the host
    Down(DownFlags),
    /// Look at what the kernel balances
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Show refused and dropped traffic and new connections of services, as they happen (data plane ebpf)
    Monitor(MonitorFlags),
    /// Import, list and remove container images of this node
    #[command(subcommand)]
    Image(ImageCommand),
    /// Measure the ways to balance services that this host has
    #[command(subcommand)]
    Load(crate::cmd::LoadCommand),
    /// Install the network plugin for other runtimes
    #[command(subcommand)]
    Install(crate::cmd::InstallCommand),
    /// Remove what `sheave install` installed
    #[command(subcommand)]
    Uninstall(crate::cmd::UninstallCommand),
    /// Show this node, its pods and services in short
    Status(StatusFlags),
    /// Print the version
    Version,
    /// Apply a manifest through the API (for hosts without kubectl)
    #[command(hide = true)]
    Apply(ApplyFlags),
    /// Send one request to the API and print the answer (for hosts without kubectl)
    #[command(hide = true)]
    Raw(RawFlags),
}

#[derive(Debug, Args)]
pub(crate) struct UpFlags {
    #[command(flatten)]
    pub(crate) base: BaseFlags,
    #[command(flatten)]
    pub(crate) control: ControlFlags,
    #[command(flatten)]
    pub(crate) agent: AgentFlags,
    #[command(flatten)]
    pub(crate) network: NetworkFlags,
    #[command(flatten)]
    pub(crate) services: ServiceFlags,
}

#[derive(Debug, Args)]
pub(crate) struct ControlCommand {
    #[command(flatten)]
    pub(crate) base: BaseFlags,
    #[command(flatten)]
    pub(crate) control: ControlFlags,
}

#[derive(Debug, Args)]
pub(crate) struct AgentCommand {
    #[command(flatten)]
    pub(crate) base: BaseFlags,
    #[command(flatten)]
    pub(crate) agent: AgentFlags,
    #[command(flatten)]
    pub(crate) network: NetworkFlags,
    #[command(flatten)]
    pub(crate) services: ServiceFlags,
    /// Range of NodePorts, first and last; must be the control plane's [default: 30000-32767]
    #[arg(long, value_name = "FIRST-LAST", help_heading = "Services [services]")]
    pub(crate) node_port_range: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct BaseFlags {
    /// Settings file [default: /etc/sheave/config.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) paths: PathFlags,
    #[command(flatten)]
    pub(crate) log: LogFlags,
}

/// `[paths]`
#[derive(Debug, Default, Clone, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[command(next_help_heading = "Paths [paths]")]
pub(crate) struct PathFlags {
    /// What must survive a reboot: store, certificates, images, pod records [default: /var/lib/sheave]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) state_dir: Option<PathBuf>,
    /// What need not survive a reboot: shim sockets, sandbox files [default: /run/sheave]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Container logs, in the CRI layout [default: /var/log/pods]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) log_dir: Option<PathBuf>,
    /// Where eBPF maps and links are pinned, on a BPF file system [default: /sys/fs/bpf/sheave]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pin_dir: Option<PathBuf>,
    /// The cgroup (v2 hierarchy) where service balancing attaches and below which pods live [default: its root]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cgroup_path: Option<PathBuf>,
}

/// `[log]`
#[derive(Debug, Default, Clone, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[command(next_help_heading = "Logging [log]")]
pub(crate) struct LogFlags {
    /// What to log: error, warn, info, debug, trace, or a filter such as sheave_agent=debug [default: info]
    #[arg(long, value_name = "FILTER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) log_level: Option<String>,
    /// How to log [default: text]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) log_format: Option<LogFormat>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// `[control]`
#[derive(Debug, Default, Clone, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[command(next_help_heading = "Control plane [control]")]
pub(crate) struct ControlFlags {
    /// Where the API server listens [default: 0.0.0.0:6443]
    #[arg(long, value_name = "ADDR:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) listen: Option<SocketAddr>,
    /// The address that pods and other nodes reach the API server at [default: the node's, unless `--listen` names
    /// another]
    #[arg(long, value_name = "IP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advertise_address: Option<IpAddr>,
    /// Range of ClusterIPs; one a family [default: 10.96.0.0/16, fd00:96::/112]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) service_cidr: Vec<IpNetwork>,
    /// Range of all pods of the cluster, one a family, of which each node gets a share
    /// [default: 10.244.0.0/16, fd00:244::/48]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) cluster_cidr: Vec<IpNetwork>,
    /// Prefix length of a node's share of the IPv4 range [default: 24]
    #[arg(long, value_name = "BITS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node_cidr_mask_size_ipv4: Option<u8>,
    /// Prefix length of a node's share of the IPv6 range [default: 64]
    #[arg(long, value_name = "BITS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node_cidr_mask_size_ipv6: Option<u8>,
    /// Range of NodePorts, first and last [default: 30000-32767]
    #[arg(long, value_name = "FIRST-LAST")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node_port_range: Option<String>,
    /// More names or addresses for the API server's certificate
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tls_san: Vec<String>,
}

/// `[agent]`
#[derive(Debug, Default, Clone, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[command(next_help_heading = "Node [agent]")]
pub(crate) struct AgentFlags {
    /// How to reach the API server [default: <state-dir>/agent.kubeconfig]
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Name of this node in the API [default: the host's name]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node_name: Option<String>,
    /// Address of this node, one a family [default: those of the device with the default route]
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) node_ip: Vec<IpAddr>,
    /// Range of pod addresses on this node, one a family [default: what the peers file or the Node's
    /// spec.podCIDRs say]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) pod_cidr: Vec<IpNetwork>,
    /// Device where NodePort traffic arrives from outside [default: the one that holds the node's address]
    #[arg(long, value_name = "LINK", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) uplink: Vec<String>,
    /// Name servers that pods are given [default: the host's]
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) cluster_dns: Vec<IpAddr>,
    /// Where the node's own API (container logs) listens; port 0 takes any [default: 0.0.0.0:10250]
    #[arg(long, value_name = "ADDR:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) agent_listen: Option<SocketAddr>,
    /// Where /healthz and /metrics listen [default: 127.0.0.1:10248]
    #[arg(long, value_name = "ADDR:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) health_listen: Option<SocketAddr>,
    /// Most pods this node takes [default: 110]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_pods: Option<u32>,
    /// Label for this node's object
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) node_label: Vec<String>,
    /// What the agent does on this node: pods, services, network; pods need the network and bring it
    /// [default: pods,services,network]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) components: Vec<String>,
}

/// `[network]`
#[derive(Debug, Default, Clone, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[command(next_help_heading = "Network [network]")]
pub(crate) struct NetworkFlags {
    /// How pods of other nodes are reached: vxlan, direct (plain routes, for nodes on one link), auto (direct where
    /// that works, else vxlan) or none [default: auto]
    #[arg(long, value_name = "MODE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) overlay: Option<String>,
    /// File that names the nodes, their addresses and pod ranges, TOML or JSON; for use without Kubernetes. It is read
    /// again when it changes [default: the API's Nodes]
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peers: Option<PathBuf>,
    /// VXLAN network identifier, the same on all nodes [default: 84]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vxlan_vni: Option<u32>,
    /// Whether packets of pods' flows that nothing translates go past the host's stack [default: true]
    #[arg(long, value_name = "true|false")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fast_path: Option<bool>,
    /// UDP port of VXLAN, the same on all nodes [default: 4789]
    #[arg(long, value_name = "PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vxlan_port: Option<u16>,
    /// Whether the uplink may compute checksums of packets inside VXLAN; off where it does so wrongly [default: true]
    #[arg(long, value_name = "true|false")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vxlan_tx_checksum: Option<bool>,
    /// Whether what pods send out of the pod ranges gets the node's address [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "true|false")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) masquerade: Option<bool>,
    /// Destinations beside the pod ranges that see the pods' own addresses
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) masquerade_except: Vec<IpNetwork>,
    /// Keep a sysctl file there with what the overlay sets, for hosts whose tools set it otherwise, such as
    /// /run/sysctl.d [default: none]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sysctl_dir: Option<PathBuf>,
}

/// `[services]`
#[derive(Debug, Default, Clone, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[command(next_help_heading = "Services [services]")]
pub(crate) struct ServiceFlags {
    /// How services are balanced: ebpf, nftables, ipvs, or auto for the first of them that works here. Changing it
    /// puts the new one to work before the old one is removed [default: auto]
    #[arg(long, value_name = "MODE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) data_plane: Option<String>,
    /// Addresses of the node on which NodePorts are reached: all, primary (one a family), or ranges [default: all]
    #[arg(long, value_name = "all|primary|CIDR", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) node_port_addresses: Vec<String>,
    /// Give everything that arrives for a service the node's address as its source, not only what must have it
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "true|false")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) masquerade_all: Option<bool>,
    /// Balance NodePorts and load balancers in XDP on uplinks that have it (data plane ebpf)
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "true|false")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) xdp: Option<bool>,
    /// Scheduler of services that ask for none (data plane ipvs): rr, wrr, lc, wlc, lblc, lblcr, sh, dh, sed, nq, mh
    /// [default: rr]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ipvs_scheduler: Option<String>,
    /// Beginning of the names of pods' host-side devices where another network plugin makes them (data plane ebpf)
    #[arg(long, value_name = "PREFIX", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) pod_link: Vec<String>,
    /// Balance at their devices what pods send to services past the socket hooks, as virtual machines in pods and raw
    /// sockets do; every packet of a pod is looked at then (data plane ebpf) [default: false where this agent runs the
    /// pods, else true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "true|false")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pod_packets: Option<bool>,
    /// Route connections from outside to pods of this node past its stack, on both ways: unseen by netfilter rules and
    /// connection tracking of the node. Where another plugin makes the pods' devices (--pod-link) packets enter the pods at
    /// once, which is faster, and programs at the devices don't see them; policies of this agent hold (data plane ebpf)
    /// [default: false]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "true|false")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) host_routing: Option<bool>,
    /// Entries of eBPF maps: frontends, slots, backends, flows (two a connection), affinity, members, ranges, maglevs.
    /// A map that is in use grows with its content and never shrinks [default: flows a 512th of memory, slots and
    /// affinity a 4096th each, the others fixed]
    #[arg(long, value_name = "MAP=N", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) service_map_sizes: Vec<String>,
    /// What is done about rules that a kube-proxy left on the host: refuse to start, cleanup, or ignore
    /// [default: refuse]
    #[arg(long, value_name = "refuse|cleanup|ignore")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kube_proxy_leftovers: Option<String>,
    /// Where /healthz and /livez answer load balancers as kube-proxy's do [default: 0.0.0.0:10256]
    #[arg(long, value_name = "ADDR:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) proxy_health_listen: Option<SocketAddr>,
    /// Range of NodePorts of an agent without a control plane of its own, see its flag
    #[arg(skip)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node_port_range: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DownFlags {
    #[command(flatten)]
    pub(crate) base: BaseFlags,
    /// Remove the state directory too: store, certificates, images
    #[arg(long)]
    pub(crate) purge: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceCommand {
    /// List frontends and their backends as the kernel's maps hold them
    List {
        #[command(flatten)]
        base: BaseFlags,
        /// How to print
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Show all that the kernel's maps hold for one service or one address
    Get(ServiceGetFlags),
    /// Tell which backend a packet would get, and why, without sending one
    Trace(ServiceTraceFlags),
}

#[derive(Debug, Args)]
pub(crate) struct ServiceGetFlags {
    #[command(flatten)]
    pub(crate) base: BaseFlags,
    /// How to reach the API server, which knows the addresses of a name [default: <state-dir>/admin.kubeconfig]
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// A Service by its name, or a frontend by its address; a NodePort is 0.0.0.0:PORT or [::]:PORT
    #[arg(value_name = "NAMESPACE/NAME|ADDR:PORT")]
    pub(crate) what: String,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct ServiceTraceFlags {
    #[command(flatten)]
    pub(crate) base: BaseFlags,
    /// Who sends [default: this node]
    #[arg(long, value_name = "IP")]
    pub(crate) from: Option<IpAddr>,
    /// Where it is sent to
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) to: SocketAddr,
    /// tcp, udp or sctp
    #[arg(long, value_name = "NAME", default_value = "tcp")]
    pub(crate) proto: String,
    /// The sender is a socket of this node, whatever its address says
    #[arg(long, group = "origin")]
    pub(crate) from_node: bool,
    /// The sender is a socket in a pod of this node, whatever its address says
    #[arg(long, group = "origin")]
    pub(crate) from_pod: bool,
    /// The sender is outside and its packet arrives at an uplink, whatever its address says
    #[arg(long, group = "origin")]
    pub(crate) from_outside: bool,
    /// Ranges of this node's pods, to tell them from the outside [default: those of [agent] in the settings]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub(crate) pod_cidr: Vec<IpNetwork>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct MonitorFlags {
    #[command(flatten)]
    pub(crate) base: BaseFlags,
    /// How to reach the API server, which knows the services' names [default: <state-dir>/admin.kubeconfig]
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Show drops only
    #[arg(long)]
    pub(crate) drops: bool,
    /// End after so many events
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
    /// How to print: lines to read, or one JSON object a line
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Import an OCI archive (.tar) or an OCI layout directory
    Import {
        #[command(flatten)]
        base: BaseFlags,
        /// The archive or directory
        path: PathBuf,
        /// Name to give the image [default: the one in its index]
        #[arg(long)]
        name: Option<String>,
    },
    /// List images
    #[command(alias = "ls")]
    List {
        #[command(flatten)]
        base: BaseFlags,
        /// How to print
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Remove an image by name
    #[command(alias = "rm")]
    Remove {
        #[command(flatten)]
        base: BaseFlags,
        /// Name as shown by `sheave image list`
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct StatusFlags {
    #[command(flatten)]
    pub(crate) base: BaseFlags,
    /// How to reach the API server [default: <state-dir>/admin.kubeconfig]
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ApplyFlags {
    #[command(flatten)]
    pub(crate) base: BaseFlags,
    /// How to reach the API server [default: <state-dir>/admin.kubeconfig]
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The manifest, one or more YAML documents
    #[arg(short, long)]
    pub(crate) filename: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct RawFlags {
    #[command(flatten)]
    pub(crate) base: BaseFlags,
    /// How to reach the API server [default: <state-dir>/admin.kubeconfig]
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// GET, POST, PUT, PATCH (a JSON merge patch) or DELETE
    pub(crate) method: String,
    /// Such as /api/v1/nodes
    pub(crate) path: String,
    /// The body, as JSON
    #[arg(long, value_name = "JSON")]
    pub(crate) data: Option<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn lists_split_at_commas_and_repeat() {
        let cli = Cli::try_parse_from([
            "sheave",
            "up",
            "--node-ip",
            "10.0.0.1,fd00::1",
            "--pod-cidr",
            "10.1.0.0/24",
            "--pod-cidr",
            "fd01::/64",
        ])
        .unwrap();
        let Command::Up(up) = cli.command else { panic!("not up") };
        assert_eq!(up.agent.node_ip.len(), 2);
        assert_eq!(up.agent.pod_cidr.len(), 2);
    }

    #[test]
    fn a_wrong_address_is_refused_with_the_flag() {
        let error = Cli::try_parse_from(["sheave", "up", "--listen", "everywhere"]).unwrap_err();
        assert!(error.to_string().contains("--listen"));
    }
}
