//! Benches and soaks: builds what is measured as it is shipped, and hands over to the `sheave-bench` program, on this
//! host or in a guest. A guest has every data plane, IPVS too, but its processor is emulated: what is compared is
//! compared within its own run, with loads that it can bear.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{build, proc, setup, vm};

/// Which program the bench measures.
const PROGRAM: &str = "SHEAVE_BIN";
/// Flag of ours that may also stand behind the name.
const VM: &str = "--vm";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install what is missing without asking
    #[arg(long)]
    yes: bool,
    /// Run in a guest with another kernel, which has IPVS, under a load that an emulated processor can bear
    #[arg(long)]
    vm: bool,
    /// Which one, and its own flags (see `cargo xtask bench -- --help`)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    rest: Vec<String>,
}

/// Runs `sheave-bench VERB ARGS`, `verb` being `bench` or `soak`.
pub(crate) fn main(verb: &str, args: &Args) -> Result<()> {
    setup::ensure(&[setup::Group::Build, setup::Group::Test, setup::Group::Bench], args.yes)?;
    let mut rest = args.rest.clone();
    rest.retain(|word| word != VM);
    let in_guest_only = args.vm || rest.len() < args.rest.len();
    let sheave = build::program("sheave", "sheave", false)?;
    build::plugin(false)?;
    let bench = build::program("sheave-bench", "sheave-bench", false)?;
    let words: Vec<String> = std::iter::once(verb.to_owned()).chain(rest).collect();
    if !in_guest_only {
        proc::run(Command::new(&bench).args(&words).env(PROGRAM, &sheave))?;
    }
    if in_guest_only || goes_on_in_guest(&words) {
        in_guest(&bench, &sheave, with_bearable_load(words))?;
    }
    Ok(())
}

/// The rolling update is for every data plane, unless somebody wants one in particular; IPVS is to be had in guests.
fn goes_on_in_guest(words: &[String]) -> bool {
    let asks = |flag: &str| words.iter().any(|word| word.split('=').next() == Some(flag));
    words.iter().any(|word| word == "rolling") && !asks("--mode") && !asks("--help")
}

/// What an emulated processor can bear, for flags that were not given.
fn with_bearable_load(mut words: Vec<String>) -> Vec<String> {
    let bearable: &[(&str, &str)] = match words.get(1).map(String::as_str) {
        Some("rolling") => &[("--rate", "250")],
        Some("load") => &[("--count", "10,1000,10000"), ("--samples", "1000"), ("--changes", "50")],
        _ => &[],
    };
    for (flag, value) in bearable {
        if !words.iter().any(|word| word.split('=').next() == Some(flag)) {
            words.extend([*flag, value].map(str::to_owned));
        }
    }
    words
}

fn in_guest(bench: &Path, sheave: &Path, words: Vec<String>) -> Result<()> {
    let path = |path: &Path| path.to_str().map(str::to_owned).context("a path that is no text");
    let mut command = vec!["env".to_owned(), format!("{PROGRAM}={}", path(sheave)?), path(bench)?];
    command.extend(words);
    match vm::bench(command)? {
        0 => Ok(()),
        status => bail!("in the guest: exit status {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn guests_get_a_load_that_they_can_bear_unless_told_otherwise() {
        assert_eq!(with_bearable_load(words("soak rolling")), words("soak rolling --rate 250"));
        assert_eq!(with_bearable_load(words("soak rolling --rate=9")), words("soak rolling --rate=9"));
        let load = with_bearable_load(words("bench load --count 10 --json"));
        assert_eq!(load, words("bench load --count 10 --json --samples 1000 --changes 50"));
        assert_eq!(with_bearable_load(words("bench api")), words("bench api"));
    }

    #[test]
    fn only_the_whole_rolling_update_goes_on_in_a_guest() {
        assert!(goes_on_in_guest(&words("soak rolling --json")));
        assert!(!goes_on_in_guest(&words("soak rolling --mode ebpf")));
        assert!(!goes_on_in_guest(&words("soak rolling --mode=ebpf")));
        assert!(!goes_on_in_guest(&words("soak kill-node")));
    }
}
