//! A process of a run: told what it is for by its first line of input.

use crate::wire::{self, Job};
use crate::{LoadError, client, network, program, serve};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Does what standard input asks for until that ends.
///
/// # Errors
/// When the job can't be begun.
pub fn main() -> Result<(), LoadError> {
    let mut input = std::io::stdin().lock();
    let Some(job) = wire::read(&mut input, "starting")? else { return Ok(()) };
    match job {
        Job::Serve { cpu, awake } => {
            pin(cpu);
            // The end of input says that the run is over; the server never looks at it otherwise.
            drop(input);
            serve::run(awake)
        }
        Job::Connect { cpu } => {
            pin(cpu);
            client::run(&mut input)
        }
        Job::Receive { cpu } => {
            pin(cpu);
            drop(input);
            network::receive()
        }
        Job::Send { cpu } => {
            pin(cpu);
            network::send(&mut input)
        }
        Job::Frontend(frontend) => {
            drop(input);
            network::frontend(&frontend)
        }
        Job::Program(program) => {
            drop(input);
            program::run(program)
        }
    }
}

/// Keeps this process on one CPU. Where that is refused the figures are noisier, and still true.
fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    if set.set(cpu).is_ok() {
        sched_setaffinity(Pid::from_raw(0), &set).unwrap_or_default();
    }
}
