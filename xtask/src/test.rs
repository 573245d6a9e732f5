//! The test rings, least powerful first. Every test is counted once, as passed, failed or skipped; a skip that is
//! not on the written list fails the ring under CI, and so does anything a ring leaves behind on the host.

mod count;
mod residue;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{build, image, proc, setup, ui};
use count::Tally;

/// Where tests report that they skipped themselves (`harness::skip`).
const SKIP_FILE: &str = "SHEAVE_SKIP_FILE";

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Ring {
    /// Pure code; needs no privilege
    Host,
    /// The eBPF programs, loaded and run on made-up packets
    Prog,
    /// The real kernel: nodes as network namespaces
    Netns,
    /// Other kernels, in virtual machines
    Vm,
}

impl Ring {
    const ALL: [Ring; 4] = [Ring::Host, Ring::Prog, Ring::Netns, Ring::Vm];

    fn name(self) -> &'static str {
        match self {
            Ring::Host => "host",
            Ring::Prog => "prog",
            Ring::Netns => "netns",
            Ring::Vm => "vm",
        }
    }

    /// Which targets cargo builds and runs.
    fn selection(self) -> &'static [&'static str] {
        match self {
            Ring::Host => &["--workspace", "--lib", "--bins", "--test", "host"],
            Ring::Prog => &["--test", "prog"],
            Ring::Netns => &["--test", "netns"],
            Ring::Vm => &["--test", "vm"],
        }
    }

    /// The failed tests of a first run that are run once more, alone: those of rings whose tests wait for a real kernel
    /// on a machine that others use too, and only where few failed. The summary names them, whatever comes of it.
    fn second_chance(self, first: &Tally, log: &str) -> Option<Vec<String>> {
        let names = count::failures(log);
        let few =
            !names.is_empty() && names.len() <= SECOND_CHANCES_MAX && names.len() as u64 == first.failed;
        (matches!(self, Ring::Netns | Ring::Vm) && few).then_some(names)
    }

    /// Tests that this ring's programs have but that are another ring's.
    fn left_out(self) -> &'static [&'static str] {
        match self {
            // They need IPVS, which ring vm has on every kernel; this host's may lack it.
            Ring::Netns => &["ipvs_"],
            Ring::Host | Ring::Prog | Ring::Vm => &[],
        }
    }
}

/// More failures than this in one ring are no accident.
const SECOND_CHANCES_MAX: usize = 3;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which rings; default: all
    #[arg(value_enum)]
    rings: Vec<Ring>,
    /// Install what is missing without asking
    #[arg(long)]
    yes: bool,
    /// Only tests whose names contain one of these
    #[arg(last = true)]
    filters: Vec<String>,
}

impl Args {
    pub(crate) fn every_ring(yes: bool) -> Args {
        Args { rings: Vec::new(), yes, filters: Vec::new() }
    }
}

pub(crate) fn main(args: &Args) -> Result<()> {
    setup::ensure(&[setup::Group::Build, setup::Group::Test], args.yes)?;
    let rings = if args.rings.is_empty() { &Ring::ALL } else { args.rings.as_slice() };
    let mut tallies = Vec::new();
    for ring in rings {
        tallies.push((ring.name(), run_ring(*ring, &args.filters)?));
    }
    let mut total = Tally::default();
    for (name, tally) in &tallies {
        println!("ring {name}: {}", tally.line());
        total.add(tally);
    }
    println!("{}", total.counts());
    if total.failed > 0 {
        bail!("{} tests failed", total.failed);
    }
    Ok(())
}

/// What suites find in the environment besides [`SKIP_FILE`]: where the images are.
const IMAGES: &str = "SHEAVE_IMAGES";

/// Builds, runs and judges one ring. An error means that the ring could not be judged at all.
fn run_ring(ring: Ring, filters: &[String]) -> Result<Tally> {
    let dir = proc::target_dir()?.join("xtask");
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    // Apart from the run, so that compile errors are seen and not logged.
    let step = ui::Step::start(format!("build ring {}", ring.name()));
    if proc::run(cargo(ring).args(["--quiet", "--no-run"])).is_err() {
        return Ok(Tally { failed: 1, notes: vec!["does not compile".into()], ..Tally::default() });
    }
    step.done("");
    if ring == Ring::Netns {
        // The suite finds it beside the program.
        build::plugin(true)?;
    }
    let images = match ring {
        Ring::Host | Ring::Prog => None,
        Ring::Netns | Ring::Vm => Some(image::all()?),
    };
    let (log, skips) = (dir.join(format!("{}.log", ring.name())), dir.join(format!("{}.skips", ring.name())));
    fs::write(&skips, "").with_context(|| format!("empty {}", skips.display()))?;
    let step = ui::Step::start(format!("ring {}", ring.name()));
    let (before, run) = (residue::scan(), format!("{}-{}", ring.name(), std::process::id()));
    let mut cargo = cargo(ring);
    cargo.env(residue::RUN_VARIABLE, &run).envs(images.map(|dir| (IMAGES, dir)));
    let success = run_logged(&mut cargo, filters, ring.left_out(), &log, &skips)?;
    let first = read(&log)?;
    let mut tally = count::tally(&first, success);
    if let Some(names) = ring.second_chance(&tally, &first) {
        eprintln!("{first}");
        second_chance(ring, &run, &names, &mut tally)?;
    }
    tally.take_skips(&read(&skips)?, ring.name(), &allowed_skips()?);
    for left in residue::left(&before, &run) {
        tally.fail(format!("left behind: {left}"));
    }
    if tally.failed > 0 {
        drop(step);
        eprintln!("{}", read(&log)?);
        eprintln!("(this is {})", log.display());
    } else {
        step.done(&tally.counts());
    }
    Ok(tally)
}

/// Runs `names` once more, one after the other; those that pass now are counted as passed and named as unsteady.
fn second_chance(ring: Ring, run: &str, names: &[String], tally: &mut Tally) -> Result<()> {
    let dir = proc::target_dir()?.join("xtask");
    let (log, skips) =
        (dir.join(format!("{}-again.log", ring.name())), dir.join(format!("{}-again.skips", ring.name())));
    let step = ui::Step::start(format!("ring {}, once more: {}", ring.name(), names.join(" ")));
    let mut cargo = cargo(ring);
    cargo.env(residue::RUN_VARIABLE, run).env(IMAGES, image::all()?);
    let mut filters = names.to_vec();
    filters.extend(["--exact".to_owned(), "--test-threads=1".to_owned()]);
    let success = run_logged(&mut cargo, &filters, &[], &log, &skips)?;
    let text = read(&log)?;
    let again = count::tally(&text, success);
    if again.passed == names.len() as u64 && again.failed == 0 {
        step.done("passed");
    } else {
        drop(step);
        eprintln!("{text}");
    }
    tally.take_second_run(names, &again);
    Ok(())
}

/// Rings run what is shipped: static programs. Also what starts fastest in an emulated machine.
fn cargo(ring: Ring) -> Command {
    let mut cargo = build::static_cargo("test", build::TARGET);
    cargo.args(ring.selection()).arg("--no-fail-fast");
    cargo
}

/// Builds one suite of the root package and returns the program.
pub(crate) fn suite_program(suite: &str) -> Result<PathBuf> {
    let mut cargo = build::static_cargo("test", build::TARGET);
    cargo.args(["--quiet", "--no-run", "--test", suite, "--message-format=json-render-diagnostics"]);
    cargo.stderr(std::process::Stdio::inherit());
    let text = proc::output(&mut cargo)?;
    let is_suite =
        |message: &Value| message["target"]["name"] == suite && message["target"]["kind"][0] == "test";
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = messages.filter(is_suite).find_map(|m| m["executable"].as_str().map(PathBuf::from));
    program.with_context(|| format!("cargo built no program for suite {suite}"))
}

fn run_logged(
    cargo: &mut Command,
    filters: &[String],
    left_out: &[&str],
    log: &Path,
    skips: &Path,
) -> Result<bool> {
    let out = fs::File::create(log).with_context(|| format!("make {}", log.display()))?;
    let err = out.try_clone().context("duplicate the log's descriptor")?;
    cargo
        .arg("--")
        .args(filters)
        .args(left_out.iter().flat_map(|name| ["--skip", name]))
        .env(SKIP_FILE, skips)
        .stdin(std::process::Stdio::null())
        .stdout(out)
        .stderr(err);
    let status = cargo.status().with_context(|| format!("start {}", proc::line(cargo)))?;
    Ok(status.success())
}

/// The written list: `<ring> <test>: <why>` a line, `#` for comments. Without CI every skip is allowed, but told.
fn allowed_skips() -> Result<Option<Vec<(String, String)>>> {
    if std::env::var_os("CI").is_none_or(|ci| ci != "true") {
        return Ok(None);
    }
    let text = read(&proc::root().join("tests/allowed-skips.txt"))?;
    let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    let parse = |line: &str| {
        let (ring, rest) = line.split_once(' ')?;
        let (test, why) = rest.rsplit_once(": ")?;
        (!why.trim().is_empty()).then(|| (ring.to_owned(), test.to_owned()))
    };
    let parsed = lines.map(|line| parse(line).with_context(|| format!("tests/allowed-skips.txt: `{line}`")));
    parsed.collect::<Result<Vec<_>>>().map(Some)
}

fn read(path: &PathBuf) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
