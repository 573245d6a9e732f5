//! The shipped programs: static, so that they run on any host's libc, and stripped.

use std::fs;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{proc, setup, ui};

/// Named explicitly so that cargo keeps flags for the program apart from those for procedural macros, which
/// cannot be linked statically.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";
/// For programs that are started often and need little of a libc.
pub(crate) const SMALL_TARGET: &str = "x86_64-unknown-linux-musl";

/// No position-independent code: a static program gains nothing by it that a sandboxed daemon needs, and loses size.
const FLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Without optimisation, with debug information
    #[arg(long)]
    debug: bool,
    /// Install what is missing without asking
    #[arg(long)]
    yes: bool,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    setup::ensure(&[setup::Group::Build], args.yes)?;
    for path in [program("sheave", "sheave", args.debug)?, plugin(args.debug)?] {
        let size = path.metadata().with_context(|| format!("look at {}", path.display()))?.len();
        println!("{} ({:.1} MB)", path.display(), size as f64 / 1e6);
    }
    Ok(())
}

/// Builds the network plugin, which lies beside the program. Every container start maps it anew, so it is linked with a
/// libc that is a third of the usual one, where there is that; debug builds do without.
pub(crate) fn plugin(debug: bool) -> Result<PathBuf> {
    const BIN: &str = "sheave-cni";
    if debug {
        return program(BIN, BIN, true);
    }
    let target = if setup::has_target(SMALL_TARGET) { SMALL_TARGET } else { TARGET };
    let mut cargo = static_cargo("build", target);
    cargo.args(["--package", BIN, "--bin", BIN, "--profile", "plugin"]);
    build(cargo, BIN)?;
    let built = proc::target_dir()?.join(target).join("plugin").join(BIN);
    let path = proc::target_dir()?.join(TARGET).join("release").join(BIN);
    // Renamed into place: the one that is there may be running.
    let new = path.with_extension("new");
    let copied = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::copy(&built, &new));
    copied
        .and_then(|_| fs::rename(&new, &path))
        .with_context(|| format!("copy {} to {}", built.display(), path.display()))?;
    Ok(path)
}

/// Builds program `bin` of `package` statically and returns its path.
pub(crate) fn program(package: &str, bin: &str, debug: bool) -> Result<PathBuf> {
    let mut cargo = static_cargo("build", TARGET);
    cargo.args(["--package", package, "--bin", bin]);
    if !debug {
        cargo.arg("--release");
    }
    build(cargo, bin)?;
    let profile = if debug { "debug" } else { "release" };
    Ok(proc::target_dir()?.join(TARGET).join(profile).join(bin))
}

fn build(mut cargo: Command, bin: &str) -> Result<()> {
    // On a terminal cargo shows by itself how far it is.
    if std::io::stderr().is_terminal() {
        return proc::run(&mut cargo);
    }
    let step = ui::Step::start(format!("build {bin}"));
    proc::run(cargo.arg("--quiet"))?;
    step.done("");
    Ok(())
}

/// `cargo VERB` for static programs of `target`.
pub(crate) fn static_cargo(verb: &str, target: &str) -> Command {
    let mut cargo = proc::cargo();
    let flags = format!("CARGO_TARGET_{}_RUSTFLAGS", target.to_uppercase().replace('-', "_"));
    cargo.args([verb, "--target", target]).env(flags, FLAGS);
    cargo
}
