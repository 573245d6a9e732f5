//! The network plugin's conformance: runs the cases of ring netns, and only if all of them pass writes the page that
//! says so.

use std::process::Command;

use anyhow::{Context, Result};

use crate::{build, proc, setup, test};

/// Asks the suite for the page.
const WRITE: &str = "SHEAVE_WRITE_CONFORMANCE";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install what is missing without asking
    #[arg(long)]
    yes: bool,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    setup::ensure(&[setup::Group::Build, setup::Group::Test], args.yes)?;
    build::plugin(true)?;
    let suite = test::suite_program("netns")?;
    let run = |filters: &[&str], write: bool| {
        let mut command = Command::new(&suite);
        command.args(filters).envs(write.then_some((WRITE, "1")));
        proc::run(&mut command)
    };
    run(&["cni_conformance::c"], false).context("not every case passes: the page stays as it is")?;
    run(&["cni_conformance::the_document_agrees", "--exact"], true)
}
