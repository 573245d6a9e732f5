//! Benchmarks and soaks of the whole program. A benchmark reports figures and asserts nothing about time; a soak checks
//! behaviour under faults and fails when it is wrong. Both start the real `sheave` program (`SHEAVE_BIN`) in
//! namespaces and cgroups of their own and leave nothing behind.

mod api;
mod cluster;
mod cni;
mod connect;
mod connect_client;
mod container_start;
mod control_process;
mod etcd;
mod footprint;
mod fuzz;
mod latency;
mod load;
mod load_client;
mod network;
mod packet;
mod packet_flood;
mod packet_frame;
mod pod_start;
mod policy;
mod program;
mod progress;
mod report;
mod rolling;
mod soak_cni;
mod soak_control;
mod soak_fuzz;
mod soak_node;
mod soak_overlay;
mod soak_services;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};

#[derive(Debug, Parser)]
#[command(name = "sheave-bench", about = "Benchmarks and soaks of the whole program")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure and report
    Bench {
        /// What to measure
        name: Bench,
        #[command(flatten)]
        size: load::Size,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Long faults; fails when behaviour is wrong
    Soak {
        /// Which faults
        name: Soak,
        /// How many [default: what the issue asks for]
        #[arg(long)]
        rounds: Option<usize>,
        #[command(flatten)]
        rolling: rolling::Rolling,
        /// How long, where it is a matter of time [default: 1800]
        #[arg(long)]
        seconds: Option<u64>,
        /// Seed of `fuzz`, to run it again [default: random]
        #[arg(long)]
        seed: Option<u64>,
        /// One JSON object a line, where there are figures
        #[arg(long)]
        json: bool,
    },
    #[command(hide = true)]
    ConnectClient(connect_client::ConnectClient),
    #[command(hide = true)]
    LoadClient(load_client::LoadClient),
    #[command(hide = true)]
    RollingClient(rolling::RollingClient),
    #[command(hide = true)]
    SteadyClient(soak_services::SteadyClient),
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Soak {
    Cni,
    Fuzz,
    KillControl,
    KillNode,
    KillServices,
    Overlay,
    Rolling,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Bench {
    Api,
    Cni,
    Connect,
    Footprint,
    Load,
    Network,
    Packet,
    PodStart,
    Policy,
    Program,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.command {
        Command::Bench { name, size, json } => match name {
            Bench::Api => block_on(api::run(json)),
            Bench::Cni => cni::run(json),
            Bench::Connect => connect::run(json),
            Bench::Footprint => footprint::run(json),
            Bench::Load => load::run(json, &size),
            Bench::Network => network::run(json),
            Bench::Packet => packet::run(json, &size),
            Bench::PodStart => pod_start::run(json),
            Bench::Policy => policy::run(json),
            Bench::Program => program::run(json),
        },
        Command::Soak { name, rounds, rolling, seconds, seed, json } => match name {
            Soak::Cni => soak_cni::run(rounds.unwrap_or(10)),
            Soak::Fuzz => soak_fuzz::run(seconds.unwrap_or(soak_fuzz::SECONDS), seed),
            Soak::KillControl => block_on(soak_control::run(rounds.unwrap_or(30))),
            Soak::KillNode => soak_node::run(rounds.unwrap_or(20)),
            Soak::KillServices => soak_services::run(rounds.unwrap_or(200)),
            Soak::Overlay => soak_overlay::run(rounds.unwrap_or(100)),
            Soak::Rolling => rolling.run(rounds.unwrap_or(1), json),
        },
        Command::ConnectClient(client) => client.run(),
        Command::LoadClient(client) => client.run(),
        Command::RollingClient(client) => client.run(),
        Command::SteadyClient(client) => client.run(),
    }
}

fn block_on(work: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(work)
}

/// The program under test.
fn sheave() -> Result<PathBuf> {
    let path = std::env::var_os("SHEAVE_BIN").context("SHEAVE_BIN must name the sheave program")?;
    PathBuf::from(&path).canonicalize().with_context(|| format!("SHEAVE_BIN={}", path.display()))
}
