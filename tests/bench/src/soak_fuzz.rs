//! The soak `fuzz`: made-up and spoilt frames through the packet core, for a time. Invariant: it fails on the first
//! finding and prints the frame, so that it can become a test.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::fuzz;

/// Seconds that it runs when nobody says otherwise.
pub(crate) const SECONDS: u64 = 1_800;

/// Runs for `seconds` on as many threads as there are processors, each with frames of its own.
pub(crate) fn run(seconds: u64, seed: Option<u64>) -> Result<()> {
    let seed = seed.unwrap_or_else(|| rand::random::<u32>().into());
    println!("fuzzing the packet core for {seconds} s; the seed is {seed}");
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        eprintln!("{}", fuzz::last());
        usual(panic);
    }));
    let threads = std::thread::available_parallelism()?.get() as u64;
    let end = Instant::now() + Duration::from_secs(seconds);
    let runs: Vec<_> = (0..threads)
        .map(|thread| std::thread::spawn(move || fuzz::run(seed + thread, |_| Instant::now() < end)))
        .collect();
    let mut frames = 0;
    let mut findings = Vec::new();
    for run in runs {
        let Ok((tally, finding)) = run.join() else {
            bail!("it panicked (seeds {seed} to {})", seed + threads - 1)
        };
        println!(
            "{} frames: {} translated, {} answered, {} translations returned; {}",
            tally.frames,
            tally.translated,
            tally.answered,
            tally.returned,
            tally.counters.iter().map(|(c, n)| format!("{} {n}", c.name())).collect::<Vec<_>>().join(", ")
        );
        frames += tally.frames;
        findings.extend(finding);
    }
    if let Some(finding) = findings.first() {
        bail!("after {frames} frames (seeds {seed} to {}): {finding}", seed + threads - 1);
    }
    println!("{frames} frames in {seconds} s on {threads} threads: no finding");
    Ok(())
}
