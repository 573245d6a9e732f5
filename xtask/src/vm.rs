//! Other kernels, in virtual machines: Debian's, fetched once into the person's cache and never installed. A guest
//! sees this host's files read-only, so that a program built here runs there under its own path.

mod cpio;
mod kernel;
mod machine;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{image, proc, setup, test};
use machine::Guest;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Fetch and unpack the kernels
    Prepare {
        /// Which series; default: all that are tested
        #[arg(value_enum)]
        kernels: Vec<kernel::Series>,
    },
    /// Run one command in a guest; its exit status becomes this one's (124: time limit)
    Run(RunArgs),
    /// Run tests of the netns suite in a guest
    Suite {
        #[arg(long, value_enum, default_value = "6.12")]
        kernel: kernel::Series,
        /// Only tests whose names contain one of these
        #[arg(last = true)]
        filters: Vec<String>,
    },
}

#[derive(clap::Args)]
struct RunArgs {
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: kernel::Series,
    /// Virtual processors. One is faster than two where they are emulated
    #[arg(long, default_value_t = 1)]
    cpus: u8,
    /// Memory in MB
    #[arg(long, default_value_t = 1536)]
    memory_mb: u32,
    /// Time limit in seconds
    #[arg(long, default_value_t = 300)]
    timeout_s: u64,
    /// A directory that the guest may write to, at the same path
    #[arg(long)]
    write: Option<PathBuf>,
    /// Kernel modules to load first; others load on demand
    #[arg(long, value_delimiter = ',')]
    modules: Vec<String>,
    /// Show the kernel's messages
    #[arg(long)]
    verbose: bool,
    /// The command, run in this directory
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// How long the suite may take in a guest. An emulated processor runs it some ten times slower.
const SUITE_TIMEOUT_S: u64 = 2400;

/// How long a bench or a soak may take in a guest.
const BENCH_TIMEOUT_S: u64 = 3600;

/// Returns the exit status for this process.
pub(crate) fn main(args: Args) -> Result<u8> {
    setup::ensure(&[setup::Group::Test], false)?;
    need_root()?;
    match args.verb {
        Verb::Prepare { kernels } => {
            let kernels = if kernels.is_empty() { kernel::Series::ALL.to_vec() } else { kernels };
            for series in kernels {
                println!("{}", kernel::prepared(series)?.dir.display());
            }
            Ok(0)
        }
        Verb::Run(args) => run(args),
        Verb::Suite { kernel, filters } => suite(kernel, &filters),
    }
}

fn need_root() -> Result<()> {
    if !setup::is_root()? {
        bail!("virtual machines share this host's files, which takes root");
    }
    Ok(())
}

/// Measures in a guest with the newest kernel and one processor, which is quieter than two where they are emulated;
/// returns the command's exit status.
pub(crate) fn bench(command: Vec<String>) -> Result<u8> {
    need_root()?;
    let kernel = kernel::prepared(kernel::Series::V6_12)?;
    let release = kernel.dir.file_name().unwrap_or_default().to_string_lossy();
    eprintln!("in a guest with kernel {release} and one processor:");
    machine::run(&Guest {
        kernel,
        cpus: 1,
        memory_mb: 3072,
        timeout: Duration::from_secs(BENCH_TIMEOUT_S),
        write: None,
        modules: Vec::new(),
        verbose: false,
        cwd: proc::root().to_owned(),
        command,
    })
}

fn run(args: RunArgs) -> Result<u8> {
    let guest = Guest {
        kernel: kernel::prepared(args.kernel)?,
        cpus: args.cpus,
        memory_mb: args.memory_mb,
        timeout: Duration::from_secs(args.timeout_s),
        write: args
            .write
            .map(|dir| dir.canonicalize().with_context(|| format!("find {}", dir.display())))
            .transpose()?,
        modules: args.modules,
        verbose: args.verbose,
        cwd: std::env::current_dir().context("find the current directory")?,
        command: args.command,
    };
    machine::run(&guest)
}

/// After the suite prints its verdict, the guest prints each reported skip as `skip\t<test>\t<reason>`.
const SUITE_SCRIPT: &str = r#"
    export SHEAVE_SKIP_FILE=/run/skips SHEAVE_IMAGES="$1" RUST_BACKTRACE=1; : > $SHEAVE_SKIP_FILE
    shift
    "$@"; status=$?
    sed 's/^/skip\t/' $SHEAVE_SKIP_FILE
    exit $status"#;

fn suite(series: kernel::Series, filters: &[String]) -> Result<u8> {
    let (program, images) = (test::suite_program("netns")?, image::all()?);
    let mut command: Vec<String> = ["bash", "-c", SUITE_SCRIPT, "suite"].map(str::to_owned).to_vec();
    command.extend([&images, &program].map(|path| path.to_string_lossy().into_owned()));
    command.push("--test-threads=1".to_owned());
    command.extend(filters.iter().cloned());
    let guest = Guest {
        kernel: kernel::prepared(series)?,
        cpus: 1,
        memory_mb: 2048,
        timeout: Duration::from_secs(SUITE_TIMEOUT_S),
        write: None,
        modules: Vec::new(),
        verbose: false,
        cwd: proc::root().to_owned(),
        command,
    };
    machine::run(&guest)
}
