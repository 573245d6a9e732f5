//! The single door: every chore of this repository is one verb of `cargo xtask`. This file parses and dispatches;
//! each verb has a module. Nothing here depends on the project's own crates, so that it builds first and fast.

mod bench;
mod build;
mod ci;
mod conformance;
mod demo;
mod image;
mod proc;
mod setup;
mod test;
mod tidy;
mod ui;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The single door to Sheave's repository.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start a node apart from this host, run pods on it and show them balanced, killed and scaled
    Demo(demo::Args),
    /// Install what is missing to build, test and measure, after saying what and why
    Setup(setup::Args),
    /// Build the programs `sheave` and `sheave-cni`: release, static, stripped
    Build(build::Args),
    /// Run the test rings: host, prog, netns, vm
    Test(test::Args),
    /// Run the plugin through the cases of the container network interface and write docs/cni-conformance.md
    Conformance(conformance::Args),
    /// Check the laws of the tree that no compiler knows
    Tidy,
    /// Make the OCI archives that the examples and suites run
    Image(image::Args),
    /// Measure, on this host or (`--vm`) in a guest that has every data plane
    Bench(bench::Args),
    /// Long runs under faults and load, on this host or (`--vm`) in a guest
    Soak(bench::Args),
    /// Run commands and tests on other kernels, in virtual machines
    Vm(vm::Args),
    /// All that CI checks: format, lints, tidy, every ring
    Ci(ci::Args),
}

fn main() -> ExitCode {
    let result = match Args::parse().verb {
        Verb::Demo(args) => demo::main(&args),
        Verb::Setup(args) => setup::main(&args),
        Verb::Build(args) => build::main(&args),
        Verb::Test(args) => test::main(&args),
        Verb::Conformance(args) => conformance::main(&args),
        Verb::Tidy => tidy::main(),
        Verb::Image(args) => image::main(&args),
        Verb::Bench(args) => bench::main("bench", &args),
        Verb::Soak(args) => bench::main("soak", &args),
        Verb::Ci(args) => ci::main(&args),
        Verb::Vm(args) => return ended(vm::main(args)),
    };
    ended(result.map(|()| 0))
}

fn ended(result: anyhow::Result<u8>) -> ExitCode {
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            ui::error(&error);
            ExitCode::FAILURE
        }
    }
}
