//! `sheave load`: measures the ways to balance services that this host has, and the roads between pods.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use sheave_load::{LoadError, NetworkOptions, Options};

#[derive(Debug, Subcommand)]
pub(crate) enum LoadCommand {
    /// Put services on this host and measure every data plane side by side; no cluster needed
    #[command(long_about = ABOUT)]
    Services(ServicesFlags),
    /// Put pods on two nodes on this host and measure every road between them; no cluster needed
    #[command(long_about = NETWORK_ABOUT)]
    Network(NetworkFlags),
    /// A process of a run
    #[command(hide = true)]
    Worker,
}

const ABOUT: &str = "\
Put services on this host and measure every data plane side by side; no cluster needed.

Builds a client, a node, a pod and backends as network namespaces, one set a data plane, puts the services into each \
and drives traffic through the first, a random and the last of them: TCP connects, short requests, requests on kept \
connections and UDP, from a pod, from the node, and from outside through NodePorts. Modes take turns in small blocks, \
so that whatever else the machine does meets all alike. \"direct\" is the backend itself with nothing loaded, measured \
at the same time; \"beside\" is the backend itself with the data plane loaded, as a data plane also taxes traffic \
that uses no service.

Needs root. Touches nothing of the host's own network, and everything it made is gone after it.";

const NETWORK_ABOUT: &str = "\
Put pods on two nodes on this host and measure every road between them; no cluster needed.

Builds a pair of hosts as network namespaces for each road, runs the agent there where it is the agent's road, and \
measures one TCP stream, requests of one byte, and the CPU time that both ends took: from host to host, over a plain \
pair of links, between two pods of one node, between pods of two nodes by plain routes, by VXLAN, by VXLAN laid by hand \
as flannel lays it, and by VXLAN through a service. Roads take turns, so that whatever else the machine does meets all \
alike. Requests have a connection that is kept from turn to turn and counts once it is settled; a stream is a new \
connection each turn, whose receiver is woken for 128 KiB at a time.

Needs root. Touches nothing of the host's own network, and everything it made is gone after it.";

#[derive(Debug, Args)]
pub(crate) struct NetworkFlags {
    /// What to measure; host to host always is
    #[arg(long, value_name = "PATH", value_enum, value_delimiter = ',', default_values_t = [
        Road::Host, Road::Veth, Road::Pod, Road::Direct, Road::Vxlan, Road::Flannel, Road::Service
    ])]
    paths: Vec<Road>,
    /// Turns that each gets
    #[arg(long, value_name = "N", default_value_t = NetworkOptions::default().rounds)]
    rounds: u32,
    /// Milliseconds of one stream a turn
    #[arg(long, value_name = "MS", default_value_t = NetworkOptions::default().stream_ms)]
    stream_ms: u32,
    /// Requests a turn
    #[arg(long, value_name = "N", default_value_t = NetworkOptions::default().requests)]
    requests: u32,
    /// MTU between the hosts, bytes
    #[arg(long, value_name = "BYTES", default_value_t = NetworkOptions::default().mtu)]
    mtu: u32,
    /// How to print
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Write an HTML page, too
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Road {
    Host,
    Veth,
    Pod,
    Direct,
    Vxlan,
    Flannel,
    Service,
}

impl From<&NetworkFlags> for NetworkOptions {
    fn from(flags: &NetworkFlags) -> Self {
        let road = |road: &Road| match road {
            Road::Host => sheave_load::Road::Host,
            Road::Veth => sheave_load::Road::Veth,
            Road::Pod => sheave_load::Road::Pod,
            Road::Direct => sheave_load::Road::Direct,
            Road::Vxlan => sheave_load::Road::Vxlan,
            Road::Flannel => sheave_load::Road::Flannel,
            Road::Service => sheave_load::Road::Service,
        };
        Self {
            roads: flags.paths.iter().map(road).collect(),
            rounds: flags.rounds,
            stream_ms: flags.stream_ms,
            requests: flags.requests,
            mtu: flags.mtu,
            output: flags.output.known(),
            report: flags.report.clone(),
        }
    }
}

impl Output {
    const fn known(self) -> sheave_load::Output {
        match self {
            Self::Table => sheave_load::Output::Table,
            Self::Json => sheave_load::Output::Json,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ServicesFlags {
    /// Numbers of services
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = Options::default().counts)]
    count: Vec<u32>,
    /// Endpoints of each service
    #[arg(long, value_name = "M", default_value_t = Options::default().endpoints)]
    endpoints: u32,
    /// Whether each service has endpoints of its own or all have the same
    #[arg(long, value_enum, default_value_t = Backends::Unique)]
    backends: Backends,
    /// What to measure; direct always is. iptables rules are laid as kube-proxy lays them, for comparison only
    #[arg(long, value_name = "MODE", value_enum, value_delimiter = ',', default_values_t = [
        Way::Direct, Way::Ebpf, Way::Nftables, Way::Iptables, Way::Ipvs
    ])]
    modes: Vec<Way>,
    /// Connects by each path; the other kinds of traffic get a half to an eighth of it
    #[arg(long, value_name = "N", default_value_t = Options::default().samples)]
    samples: u32,
    /// Changes of an endpoint, one after the other, to measure how long one takes (10 s at most)
    #[arg(long, value_name = "N", default_value_t = Options::default().changes)]
    changes: u32,
    /// Change so many endpoints a second while traffic is measured
    #[arg(long, value_name = "N/s", value_parser = per_second, default_value = "0")]
    churn: u32,
    /// Which iptables [default: what `iptables` is on this host]
    #[arg(long, value_enum)]
    iptables: Option<Iptables>,
    /// Let ebpf balance packets of pods at their devices too, as where another runtime runs the pods; where the agent runs
    /// them it serves their sockets alone
    #[arg(long)]
    pod_packets: bool,
    /// Let ebpf take connections from outside to the node's pods past its stack, which takes a program at the pods' devices
    #[arg(long)]
    host_routing: bool,
    /// Leave iptables out above this number of services
    #[arg(long, value_name = "N", default_value_t = Options::default().iptables_max)]
    iptables_max: u32,
    /// Measure programming, changes and memory only
    #[arg(long)]
    no_traffic: bool,
    /// How to print
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Write an HTML page with curves over the number of services, too
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Backends {
    Unique,
    Shared,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Way {
    Direct,
    Ebpf,
    Nftables,
    Iptables,
    Ipvs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Iptables {
    Nft,
    Legacy,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Table,
    /// One object a mode and number of services, a line each
    Json,
}

/// `50` or `50/s`.
fn per_second(text: &str) -> Result<u32, String> {
    let number = text.strip_suffix("/s").unwrap_or(text);
    number.parse().map_err(|_| format!("{text} is not a number of changes a second, such as 50 or 50/s"))
}

impl From<&ServicesFlags> for Options {
    fn from(flags: &ServicesFlags) -> Self {
        Self {
            counts: flags.count.clone(),
            endpoints: flags.endpoints,
            backends: match flags.backends {
                Backends::Unique => sheave_load::Backends::Unique,
                Backends::Shared => sheave_load::Backends::Shared,
            },
            ways: flags.modes.iter().map(|way| way.known()).collect(),
            samples: flags.samples,
            changes: flags.changes,
            churn_per_s: flags.churn,
            iptables: flags.iptables.map(|kind| match kind {
                Iptables::Nft => sheave_load::IptablesKind::Nft,
                Iptables::Legacy => sheave_load::IptablesKind::Legacy,
            }),
            iptables_max: flags.iptables_max,
            pod_packets: flags.pod_packets,
            host_routing: flags.host_routing,
            no_traffic: flags.no_traffic,
            output: flags.output.known(),
            report: flags.report.clone(),
        }
    }
}

impl Way {
    const fn known(self) -> sheave_load::Way {
        match self {
            Self::Direct => sheave_load::Way::Direct,
            Self::Ebpf => sheave_load::Way::Ebpf,
            Self::Nftables => sheave_load::Way::Nftables,
            Self::Iptables => sheave_load::Way::Iptables,
            Self::Ipvs => sheave_load::Way::Ipvs,
        }
    }
}

/// Status of a program that SIGINT ended, as shells have it.
const INTERRUPTED: i32 = 130;

pub(super) fn run(command: &LoadCommand) -> Result<()> {
    let done = match command {
        LoadCommand::Worker => return Ok(sheave_load::worker()?),
        LoadCommand::Services(flags) => sheave_load::run(&flags.into()),
        LoadCommand::Network(flags) => sheave_load::run_network(&flags.into()),
    };
    match done {
        Err(error @ LoadError::Interrupted) => {
            eprintln!("sheave: {error}");
            std::process::exit(INTERRUPTED);
        }
        result => Ok(result?),
    }
}
