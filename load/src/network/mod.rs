//! Roads between containers, side by side: how much they carry, how long an answer takes, and what it costs.
//! Invariant: all are there at once and take turns in a random order, so that whatever else the machine does meets all
//! of them alike; what can't be built is said and the rest goes on.

mod agent;
mod bed;
mod frontend;
mod options;
mod show;
mod traffic;

pub use options::{NetworkOptions, Road};

pub(crate) use frontend::{Frontend, run as frontend};
pub(crate) use traffic::{Turn, receive, send};

use crate::bed::{Cpus, Ground};
use crate::error::{Doing as _, chain};
use crate::measure::Progress;
use crate::spawn::{catch_signals, check_interrupted};
use crate::stats::{Latencies, Random};
use crate::{LoadError, Output};
use bed::Ends;
use show::{Absent, Entry, row};
use std::io::Write as _;
use std::time::{Duration, Instant};
use traffic::{Done, cpu_ns};

/// Turns are not counted until every connection for requests has been open for so long: a flow goes past the stack of an
/// agent's node a second after it began, and what is asked is what a connection gets that lasts.
const SETTLED: Duration = Duration::from_millis(1_500);
/// Requests at the beginning of each turn that are not counted, and between two looks at whether all is settled.
const WARM_UP: u32 = 50;
/// Failed turns after which a road is left alone: each may have taken seconds.
const FAILED_MAX: u32 = 3;

/// What was seen of a road.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) road: Road,
    /// Of each turn: gigabits a second.
    pub(crate) gbps: Vec<f64>,
    /// Of each turn: milliseconds of CPU of both ends for a gigabit.
    pub(crate) cpu_ms: Vec<f64>,
    pub(crate) requests: Latencies,
    pub(crate) failed: u32,
    pub(crate) failure: Option<String>,
}

/// Measures what `options` want, prints it, and takes everything away again.
///
/// # Errors
/// Settings that can't be built, no root, a host that refuses; [`LoadError::Interrupted`] after SIGINT or SIGTERM.
pub fn run(options: &NetworkOptions) -> Result<(), LoadError> {
    options.check()?;
    let ground = Ground::new()?;
    ground.mount_dir()?;
    catch_signals()?;
    let progress = Progress::new();
    let cpus = Cpus::find();
    let mut roads: Vec<(Ends, Measured)> = Vec::new();
    let mut absent = Vec::new();
    for road in options.measured() {
        progress.0.set_message(format!("building: {}", road.about()));
        match bed::build(&ground, cpus, options, road) {
            Ok(ends) => roads.push((ends, Measured::new(road))),
            Err(error) => {
                check_interrupted()?;
                absent.push(Entry::Absent(Absent { path: road.name(), unavailable: chain(&error) }));
            }
        }
    }
    settle(&mut roads, &progress)?;
    let mut random = Random::new(u64::from(options.rounds));
    let mut order: Vec<usize> = (0..roads.len()).collect();
    for round in 0..options.rounds {
        random.shuffle(&mut order);
        for &at in &order {
            let (ends, measured) = &mut roads[at];
            let done = round * 100 / options.rounds;
            progress.0.set_message(format!("{done}%: {}", measured.road.about()));
            if measured.failed < FAILED_MAX {
                turn(ends, measured, options)?;
            }
        }
    }
    progress.0.finish_and_clear();
    let host = roads.iter().find(|(_, m)| m.road == Road::Host).map(|(_, m)| m);
    let mut entries: Vec<Entry> =
        roads.iter().map(|(_, measured)| Entry::Row(Box::new(row(measured, host, options.mtu)))).collect();
    entries.extend(absent);
    print(options, &entries).doing("print")?;
    if let Some(path) = &options.report {
        std::fs::write(path, show::page(&entries)).doing(format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Opens what is kept, and has it used until it is settled. What fails here is met again when it counts.
fn settle(roads: &mut [(Ends, Measured)], progress: &Progress) -> Result<(), LoadError> {
    let mut opened = None;
    while opened.is_none_or(|at: Instant| at.elapsed() < SETTLED) {
        for (ends, measured) in &mut *roads {
            progress.0.set_message(format!("warming up: {}", measured.road.about()));
            let few = Turn::Requests { to: ends.to, count: WARM_UP, warm_up: 0 };
            let _: Done = ends.sender.ask(&few)?;
        }
        opened.get_or_insert_with(Instant::now);
    }
    Ok(())
}

fn print(options: &NetworkOptions, entries: &[Entry]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match options.output {
        Output::Table => out.write_all(show::text(entries).as_bytes())?,
        Output::Json => {
            for entry in entries {
                writeln!(out, "{}", serde_json::to_string(entry)?)?;
            }
        }
    }
    out.flush()
}

impl Measured {
    pub(crate) fn new(road: Road) -> Self {
        Self {
            road,
            gbps: Vec::new(),
            cpu_ms: Vec::new(),
            requests: Latencies::new(),
            failed: 0,
            failure: None,
        }
    }

    fn fail(&mut self, why: String) {
        self.failed += 1;
        self.failure.get_or_insert(why);
    }
}

/// A stream and a row of requests.
fn turn(ends: &mut Ends, measured: &mut Measured, options: &NetworkOptions) -> Result<(), LoadError> {
    let to = ends.to;
    let cpu = |ends: &Ends| cpu_ns(ends.sender.pid()) + cpu_ns(ends.receiver.pid());
    let before = cpu(ends);
    let stream: Done = ends.sender.ask(&Turn::Stream { to, ms: options.stream_ms.into() })?;
    let spent = cpu(ends).saturating_sub(before);
    match (stream.failure, stream.ns.first()) {
        (None, Some(ns)) if *ns > 0 && stream.bytes > 0 => {
            let gigabits = stream.bytes as f64 * 8.0 / 1e9;
            measured.gbps.push(gigabits / (*ns as f64 / 1e9));
            measured.cpu_ms.push(spent as f64 / 1e6 / gigabits);
        }
        (failure, _) => measured.fail(failure.unwrap_or_else(|| "a stream of nothing".to_owned())),
    }
    let asked: Done = ends.sender.ask(&Turn::Requests { to, count: options.requests, warm_up: WARM_UP })?;
    match asked.failure {
        None => asked.ns.into_iter().for_each(|ns| measured.requests.record_ns(ns)),
        Some(failure) => measured.fail(failure),
    }
    Ok(())
}
