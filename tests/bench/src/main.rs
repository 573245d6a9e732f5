//! Benchmarks and soaks of the whole program. A benchmark reports figures and asserts nothing about time; a soak checks
//! behaviour under faults and fails when it is wrong. Both start the real `sheave` program (`SHEAVE_BIN`) in
//! namespaces and cgroups of their own and leave nothing behind.

mod api;
mod connect_client;
mod control_process;
mod etcd;
mod latency;
mod progress;
mod report;
mod soak_control;

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
    },
    #[command(hide = true)]
    ConnectClient(connect_client::ConnectClient),
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Soak {
    KillControl,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Bench {
    Api,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match cli.command {
        Command::Bench { name: Bench::Api, json } => runtime.block_on(api::run(json)),
        Command::Soak { name: Soak::KillControl, rounds } => {
            runtime.block_on(soak_control::run(rounds.unwrap_or(30)))
        }
        Command::ConnectClient(client) => client.run(),
    }
}

/// The program under test.
fn sheave() -> Result<PathBuf> {
    let path = std::env::var_os("SHEAVE_BIN").context("SHEAVE_BIN must name the sheave program")?;
    PathBuf::from(&path).canonicalize().with_context(|| format!("SHEAVE_BIN={}", path.display()))
}
