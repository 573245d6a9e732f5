//! One thin file a subcommand: each turns flags and settings into a library's configuration, calls it, and prints.

mod agent;
mod apply;
mod control;
mod down;
mod image;
mod install;
mod load;
mod monitor;
mod names;
mod raw;
mod service;
mod services;
mod status;
mod table;
mod trace;
mod up;

use std::future::Future;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sheave_agent::dataplane::Mode;
use sheave_agent::dataplane::choice::Active;
use tokio_util::sync::CancellationToken;

pub(crate) use install::{InstallCommand, UninstallCommand};
pub(crate) use load::LoadCommand;

use crate::cli::{BaseFlags, Cli, Command, ImageCommand, PathFlags, ServiceCommand};
use crate::config::File;

/// Runs the command that was asked for.
pub(crate) fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Up(flags) => up::run(&flags),
        Command::Control(flags) => control::run(&flags),
        Command::Agent(flags) => agent::run(&flags),
        Command::Down(flags) => down::run(&flags),
        Command::Service(ServiceCommand::List { base, output }) => service::list(&base, output),
        Command::Service(ServiceCommand::Get(flags)) => service::get(&flags),
        Command::Service(ServiceCommand::Trace(flags)) => trace::run(&flags),
        Command::Monitor(flags) => monitor::run(&flags),
        Command::Image(ImageCommand::Import { base, path, name }) => {
            image::import(&base, &path, name.as_deref())
        }
        Command::Image(ImageCommand::List { base, output }) => image::list(&base, output),
        Command::Image(ImageCommand::Remove { base, name }) => image::remove(&base, &name),
        Command::Load(command) => load::run(&command),
        Command::Install(command) => install::install(&command),
        Command::Uninstall(command) => install::uninstall(&command),
        Command::Status(flags) => status::run(&flags),
        Command::Version => version(),
        Command::Apply(flags) => apply::run(&flags),
        Command::Raw(flags) => raw::run(&flags),
    }
}

fn version() -> Result<()> {
    writeln!(std::io::stdout(), "sheave {}", env!("CARGO_PKG_VERSION"))?;
    Ok(())
}

/// The directories in force, from file and flags.
fn paths(base: &BaseFlags) -> Result<Paths> {
    let flags: PathFlags = File::read(base.config.as_deref())?.merge("paths", &base.paths)?;
    let default = sheave_agent::AgentConfig::default();
    Ok(Paths {
        state_dir: flags.state_dir.unwrap_or(default.state_dir),
        run_dir: flags.run_dir.unwrap_or(default.run_dir),
        pin_dir: flags.pin_dir.unwrap_or(default.pin_dir),
    })
}

struct Paths {
    state_dir: PathBuf,
    run_dir: PathBuf,
    pin_dir: PathBuf,
}

/// Which data plane this node's agent put to work, if one ever ran here.
fn active(paths: &Paths) -> Result<Option<Active>> {
    let read = sheave_agent::dataplane::choice::active(&paths.run_dir);
    read.with_context(|| format!("reading which data plane is active below {}", paths.run_dir.display()))
}

/// Refuses to read eBPF maps where another data plane balances.
fn needs_ebpf(paths: &Paths) -> Result<()> {
    match active(paths)? {
        Some(active) if active.mode != Mode::Ebpf => bail!(
            "services are balanced by {} on this node ({}), and this command reads eBPF maps; {}",
            active.mode.name(),
            active.why,
            elsewhere(active.mode)
        ),
        _ => Ok(()),
    }
}

/// Where to look instead.
fn elsewhere(mode: Mode) -> &'static str {
    match mode {
        Mode::Ebpf => "see `sheave service list`",
        Mode::Nftables => "see `nft list map inet sheave services4` and `services6`",
        Mode::Ipvs => "see `ipvsadm -Ln`, and `nft list ruleset`, tables named sheave",
    }
}

/// The admin's kubeconfig, unless another is named.
fn kubeconfig(base: &BaseFlags, given: Option<&Path>) -> Result<PathBuf> {
    match given {
        Some(path) => Ok(path.to_owned()),
        None => Ok(paths(base)?.state_dir.join("admin.kubeconfig")),
    }
}

/// Runs a daemon until it fails or SIGTERM or SIGINT asks it to stop; a second signal ends the process at once.
fn run_daemon<F, Fut>(daemon: F) -> Result<()>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    runtime()?.block_on(async {
        let shutdown = CancellationToken::new();
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let mut int = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
        let stop = shutdown.clone();
        tokio::spawn(async move {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            tracing::info!("stopping; containers and service routing go on without the daemon");
            stop.cancel();
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            std::process::exit(130);
        });
        daemon(shutdown).await
    })
}

/// Two workers are enough for a node and keep the memory of idle threads small.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().min(4)))
        .max_blocking_threads(64)
        // What a burst of calls leaves is threads with memory of their own.
        .thread_keep_alive(std::time::Duration::from_secs(2))
        .enable_all()
        .build()
        .context("starting the async runtime")
}
