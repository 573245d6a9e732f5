//! The shipped programs: static, so that they run on any host's libc, and stripped.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{proc, setup, ui};

/// Named explicitly so that cargo keeps flags for the program apart from those for procedural macros, which
/// cannot be linked statically.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

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

/// Builds the network plugin, which lies beside the program.
pub(crate) fn plugin(debug: bool) -> Result<PathBuf> {
    program("sheave-cni", "sheave-cni", debug)
}

/// Builds program `bin` of `package` statically and returns its path.
pub(crate) fn program(package: &str, bin: &str, debug: bool) -> Result<PathBuf> {
    let mut cargo = static_cargo("build");
    cargo.args(["--package", package, "--bin", bin]);
    if !debug {
        cargo.arg("--release");
    }
    // On a terminal cargo shows by itself how far it is.
    if std::io::stderr().is_terminal() {
        proc::run(&mut cargo)?;
    } else {
        let step = ui::Step::start(format!("build {bin}"));
        proc::run(cargo.arg("--quiet"))?;
        step.done("");
    }
    let profile = if debug { "debug" } else { "release" };
    Ok(proc::target_dir()?.join(TARGET).join(profile).join(bin))
}

/// `cargo VERB` for static programs.
pub(crate) fn static_cargo(verb: &str) -> Command {
    let mut cargo = proc::cargo();
    cargo.args([verb, "--target", TARGET]).env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", FLAGS);
    cargo
}
