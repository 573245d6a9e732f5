//! Benches and soaks: builds what is measured as it is shipped, and hands over to the `sheave-bench` program.

use std::process::Command;

use anyhow::Result;

use crate::{build, proc, setup};

/// Which program the bench measures.
const PROGRAM: &str = "SHEAVE_BIN";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install what is missing without asking
    #[arg(long)]
    yes: bool,
    /// Which one, and its own flags (see `cargo xtask bench -- --help`)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    rest: Vec<String>,
}

/// Runs `sheave-bench VERB ARGS`, `verb` being `bench` or `soak`.
pub(crate) fn main(verb: &str, args: &Args) -> Result<()> {
    setup::ensure(&[setup::Group::Build, setup::Group::Test, setup::Group::Bench], args.yes)?;
    let sheave = build::program("sheave", "sheave", false)?;
    build::plugin(false)?;
    let bench = build::program("sheave-bench", "sheave-bench", false)?;
    proc::run(Command::new(bench).arg(verb).args(&args.rest).env(PROGRAM, sheave))
}
