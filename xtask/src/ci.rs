//! What CI runs, and what a person runs before sending a change: the same.

use anyhow::{Result, bail};

use crate::{proc, test, tidy, ui};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install what is missing without asking
    #[arg(long)]
    yes: bool,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let mut failed = Vec::new();
    let mut check = |name: &'static str, result: Result<()>| {
        if let Err(error) = result {
            ui::error(&error);
            failed.push(name);
        }
    };
    check("fmt", ui::step("cargo fmt --check", proc::cargo().args(["fmt", "--all", "--check"])));
    check("tidy", tidy::main());
    let clippy = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    check("clippy", proc::run(proc::cargo().args(clippy)));
    // Last, so that CI's output ends with the ring summary.
    let rings = test::main(&test::Args::every_ring(args.yes));
    if !failed.is_empty() {
        if let Err(error) = rings {
            ui::error(&error);
        }
        bail!("failed: {}", failed.join(", "));
    }
    rings
}
