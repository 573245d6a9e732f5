//! The demo: one command from a clone to pods behind a balanced service, on a node that touches nothing else of this
//! host. Every line that claims something is printed after it was checked, and whatever happens, everything that was
//! made is taken away again.

mod api;
mod place;
mod story;
mod table;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{build, image, setup, ui};
use place::Place;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Check each step, clean up and exit: 0 if everything held, 1 if not
    #[arg(long)]
    once: bool,
    /// Install what is missing, and with --on-host go ahead, without asking
    #[arg(long)]
    yes: bool,
    /// Run the node in this host's own network and at the root of its cgroups, as in earnest
    #[arg(long)]
    on_host: bool,
    /// Programs without optimisation: built faster, slower to answer
    #[arg(long)]
    debug: bool,
}

/// For anything that the node does.
const PATIENCE: Duration = Duration::from_secs(90);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

pub(crate) fn main(args: &Args) -> Result<()> {
    if !setup::is_root()? {
        bail!(
            "the demo makes namespaces, cgroups and eBPF programs, which takes root: sudo -E cargo xtask demo"
        );
    }
    if args.on_host && !args.yes {
        let question = "Run the node in this host's own network, and balance for every process of it, until the demo ends?";
        if !ui::interactive() || !ui::confirm(question)? {
            bail!("not started: --on-host touches the whole host; confirm, or pass --yes");
        }
    }
    setup::ensure(&[setup::Group::Build, setup::Group::Demo], args.yes)?;
    let programs = place::Programs {
        sheave: build::program("sheave", "sheave", args.debug)?,
        echo: build::program("sheave-echo", "echo", false)?,
        image: image::dir()?.join("echo.tar"),
    };
    image::echo(&programs.image)?;
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::SeqCst)).context("watch for Ctrl-C")?;
    place::sweep()?;
    let mut place = Place::make(programs, args.on_host)?;
    let told = story::tell(&mut place).and_then(|()| if args.once { Ok(()) } else { stay(&place) });
    if let (Err(error), false) = (&told, interrupted()) {
        eprintln!("{}", place.log_tail());
        ui::error(error);
    }
    let start = Instant::now();
    let removed = place.remove();
    if removed.is_ok() {
        // Removing ends with a look for anything left.
        story::claim(
            "pods, namespaces, cgroups, eBPF programs, mounts and files of the demo are gone",
            start,
        );
    }
    match (told, removed) {
        // Asked for, and cleaned up: that is how the demo ends.
        (Err(_), Ok(())) if interrupted() && !args.once => Ok(()),
        (Err(_), Ok(())) => bail!("the demo failed"),
        (Err(_), Err(also)) => Err(also.context("the demo failed, and so did its cleaning up")),
        (Ok(()), removed) => removed,
    }
}

fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Leaves the node running for the person to look at.
fn stay(place: &Place) -> Result<()> {
    println!();
    println!("The node stays up until Ctrl-C. In another terminal, inside it:");
    println!("  {} kubectl get pods -o wide", place.enter_script().display());
    println!("  {} sheave service list", place.enter_script().display());
    println!("  {} echo client http://<address> 1000", place.enter_script().display());
    while !interrupted() {
        std::thread::sleep(Duration::from_millis(100));
    }
    println!();
    Ok(())
}

/// Looks until there is something to see; the error of the last look is told at the deadline.
fn until<T>(what: &str, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if interrupted() {
            bail!("interrupted while waiting for {what}");
        }
        match look() {
            Ok(seen) => return Ok(seen),
            Err(error) if start.elapsed() > PATIENCE => {
                return Err(error.context(format!("waited {} s for {what}", PATIENCE.as_secs())));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
