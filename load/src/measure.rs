//! A run, from settings to results. Invariant: modes are measured in small blocks, one bed after the other in a random
//! order, so that whatever else the machine does meets all of them alike.

use crate::bed::{Bed, Cpus, From, Ground, NODE};
use crate::blocks::{Figure, What, median};
use crate::error::{Doing as _, chain};
use crate::options::{Backends, Options, Output, Way};
use crate::row::{Absent, Entry, Measured, Path, Through, row};
use crate::spawn::{Worker, catch_signals, check_interrupted};
use crate::spec::{NODE_PORT, Spec, TARGET_PORT};
use crate::stats::{Latencies, Random};
use crate::wire::{Ask, Drive, Driven, Job, Kind, Program, Told};
use crate::{LoadError, html, table};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// Rounds of a block: a few milliseconds of traffic.
const BLOCK: u32 = 50;
/// Rounds at the beginning of each that are not counted: another process had the caches.
const WARM_UP: u32 = 5;
/// Failures after which no more traffic is sent into a bed: each may have taken seconds.
const FAILED_MAX: u64 = 32;
/// Longest time for changes of endpoints, one after the other.
const CHANGES_MS: u64 = 4_000;
/// The beds that nothing is loaded in. There are two: how far they differ is how far figures may be off.
const BARE: [&str; 2] = ["direct", "control"];
/// What they are compared by.
const CONTROL: Figure = (From::Pod, Kind::Connect, What::Direct);
/// Where traffic starts, its kind, and the part of the samples that it gets.
const TRAFFIC: [(From, Kind, u32); 9] = [
    (From::Pod, Kind::Connect, 1),
    (From::Pod, Kind::Short, 4),
    (From::Pod, Kind::Keepalive, 4),
    (From::Pod, Kind::Udp, 4),
    (From::Node, Kind::Connect, 2),
    (From::Node, Kind::Short, 8),
    (From::Outside, Kind::Connect, 2),
    (From::Outside, Kind::Short, 4),
    (From::Outside, Kind::Udp, 8),
];

/// Measures what `options` want, prints it, and takes everything away again.
///
/// # Errors
/// Settings that can't be built, no root, a host that refuses; [`LoadError::Interrupted`] after SIGINT or SIGTERM.
pub fn run(options: &Options) -> Result<(), LoadError> {
    options.check()?;
    let ground = Ground::new()?;
    catch_signals()?;
    let progress = Progress::new();
    let mut counts = options.counts.clone();
    counts.sort_unstable();
    counts.dedup();
    let mut all = Vec::new();
    for services in counts {
        let spec = Spec { services, endpoints: options.endpoints, backends: options.backends };
        let entries = Run { options, spec, progress: &progress }.all(&ground)?;
        progress.0.suspend(|| print(options, &entries)).doing("print")?;
        all.extend(entries);
    }
    progress.0.finish_and_clear();
    if let Some(path) = &options.report {
        std::fs::write(path, html::page(&all)).doing(format!("write {}", path.display()))?;
    }
    Ok(())
}

fn print(options: &Options, entries: &[Entry]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match options.output {
        Output::Table => out.write_all(table::text(entries).as_bytes())?,
        Output::Json => {
            for entry in entries {
                writeln!(out, "{}", serde_json::to_string(entry)?)?;
            }
        }
    }
    out.flush()
}

/// Says on a terminal what is being done.
pub(crate) struct Progress(pub(crate) ProgressBar);

impl Progress {
    pub(crate) fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        bar.enable_steady_tick(Duration::from_millis(120));
        Self(bar)
    }

    fn say(&self, spec: Spec, what: &str) {
        self.0.set_message(format!("{} services: {what}", spec.services));
    }
}

/// A bed with what goes on in it.
struct Subject {
    way: Way,
    measured: Measured,
    clients: Vec<(From, Worker)>,
    planner: Option<Worker>,
    /// Dropped after the processes inside.
    _bed: Bed,
}

struct Run<'a> {
    options: &'a Options,
    spec: Spec,
    progress: &'a Progress,
}

impl Run<'_> {
    /// Everything with this number of services.
    fn all(&self, ground: &Ground) -> Result<Vec<Entry>, LoadError> {
        let cpus = Cpus::find();
        let mut absent = Vec::new();
        let mut subjects = vec![self.bare(ground, cpus, BARE[0])?, self.bare(ground, cpus, BARE[1])?];
        for way in self.options.planes() {
            self.progress.say(self.spec, &format!("programming {}", way.name()));
            match self.subject(ground, cpus, way)? {
                Ok(subject) => subjects.push(subject),
                Err(unavailable) => {
                    absent
                        .push((way, Absent { mode: way.name(), services: self.spec.services, unavailable }));
                }
            }
        }
        if !self.options.no_traffic {
            self.churn(&mut subjects)?;
            for (from, kind, part) in TRAFFIC {
                self.drive(&mut subjects, from, kind, (self.options.samples / part).max(1))?;
            }
            self.quiet(&mut subjects)?;
        }
        Ok(self.entries(&subjects, absent))
    }

    fn entries(&self, subjects: &[Subject], mut absent: Vec<(Way, Absent)>) -> Vec<Entry> {
        let [first, second, planes @ ..] = subjects else { return Vec::new() };
        let control = second.measured.blocks.ratio(CONTROL, (&first.measured.blocks, CONTROL), 1, median);
        let mut bare = first.measured.clone();
        bare.merge(&second.measured);
        let params = (self.spec.services, self.spec.endpoints, self.spec.backends);
        // Without traffic there is nothing to say of the bed that nothing is loaded in.
        let nothing = (!self.options.no_traffic).then_some((Way::Direct, &bare));
        let told = nothing.into_iter().chain(planes.iter().map(|plane| (plane.way, &plane.measured)));
        let mut entries: Vec<(Way, Entry)> = told
            .map(|(way, measured)| {
                let mut row = row(way, params, measured, &bare);
                row.ratio_control_p50 = control.filter(|_| way == Way::Direct);
                (way, Entry::Row(Box::new(row)))
            })
            .collect();
        entries.extend(absent.drain(..).map(|(way, absent)| (way, Entry::Absent(absent))));
        entries.sort_by_key(|(way, _)| *way);
        entries.into_iter().map(|(_, entry)| entry).collect()
    }

    /// A bed that nothing is loaded in.
    fn bare(&self, ground: &Ground, cpus: Cpus, name: &'static str) -> Result<Subject, LoadError> {
        self.progress.say(self.spec, "building");
        let bed = Bed::new(ground, name, cpus)?;
        let clients = self.clients(&bed)?;
        Ok(Subject { way: Way::Direct, measured: Measured::default(), clients, planner: None, _bed: bed })
    }

    fn clients(&self, bed: &Bed) -> Result<Vec<(From, Worker)>, LoadError> {
        From::ALL.into_iter().map(|from| Ok((from, bed.connector(from)?))).collect()
    }

    /// A bed with everything loaded, or why that can't be.
    fn subject(&self, ground: &Ground, cpus: Cpus, way: Way) -> Result<Result<Subject, String>, LoadError> {
        if way == Way::Iptables && self.spec.services > self.options.iptables_max {
            return Ok(Err(format!(
                "left out above {} services, where it only takes long; --iptables-max sets another limit",
                self.options.iptables_max
            )));
        }
        let bed = Bed::new(ground, way.name(), cpus)?;
        let job = Job::Program(Program {
            way,
            spec: self.spec,
            pin_dir: bed.pin_dir.clone(),
            cgroup: bed.cgroup.clone(),
            iptables: self.options.iptables,
            pod_packets: self.options.pod_packets,
            host_routing: self.options.host_routing,
        });
        let mut planner = Worker::start(format!("programming ({})", way.name()), &bed.node, None, &job)?;
        let mut measured = Measured::default();
        if let Err(why) = self.program(&mut planner, &mut measured) {
            check_interrupted()?;
            return Ok(Err(chain(&why)));
        }
        let mut subject =
            Subject { way, measured, clients: self.clients(&bed)?, planner: Some(planner), _bed: bed };
        let failure = if self.options.no_traffic { None } else { self.probe(&mut subject)? };
        Ok(match failure {
            Some(failure) => Err(format!("its services can't be reached: {failure}")),
            None => Ok(subject),
        })
    }

    fn program(&self, planner: &mut Worker, measured: &mut Measured) -> Result<(), LoadError> {
        let unavailable = LoadError::Unavailable;
        let odd = |told: &Told| unavailable(format!("the programming process answered {told:?}"));
        match planner.ask(&Ask::Fill)? {
            Told::Filled { open_s, program_s, rss_mb, rss_peak_mb, note } => {
                (measured.open_s, measured.program_s) = (Some(open_s), Some(program_s));
                (measured.rss_mb, measured.rss_peak_mb) = (Some(rss_mb), Some(rss_peak_mb));
                measured.note = note;
            }
            Told::Unavailable(why) => return Err(unavailable(why)),
            told => return Err(odd(&told)),
        }
        match planner.ask(&Ask::Change { changes: self.options.changes, budget_ms: CHANGES_MS })? {
            Told::Changed { ns } => {
                let mut all = Latencies::new();
                ns.into_iter().for_each(|ns| all.record_ns(ns));
                measured.updates = Some(all);
                Ok(())
            }
            Told::Unavailable(why) => Err(unavailable(why)),
            told => Err(odd(&told)),
        }
    }

    /// One connection by every path: what fails, if anything does.
    fn probe(&self, subject: &mut Subject) -> Result<Option<String>, LoadError> {
        for (from, kind, _) in TRAFFIC {
            let (_, targets): (Vec<_>, Vec<_>) = self.targets(subject.way, from).into_iter().unzip();
            let Some((_, client)) = subject.clients.iter_mut().find(|(at, _)| *at == from) else { continue };
            let driven: Driven = client.ask(&Drive { kind, targets, rounds: 1, warm_up: 0, seed: 1 })?;
            if let Some(failure) = driven.failure {
                return Ok(Some(format!("from {}: {failure}", from.name())));
            }
        }
        Ok(None)
    }

    /// The targets of a client. With nothing loaded there are as many, so that a round is the same work.
    fn targets(&self, way: Way, from: From) -> Vec<(Through, Vec<SocketAddr>)> {
        let spec = self.spec;
        let endpoints = |service: u32| -> Vec<SocketAddr> {
            spec.endpoints(service).into_iter().map(|ip| (ip, TARGET_PORT).into()).collect()
        };
        let measured = spec.measured();
        let all: Vec<SocketAddr> = measured.into_iter().flat_map(endpoints).collect();
        let mut targets = vec![(Through::Direct, all)];
        for (place, service) in measured.into_iter().enumerate() {
            let through = [Through::First, Through::Random, Through::Last][place];
            let to = match (way, from) {
                (Way::Direct, _) => endpoints(service),
                (_, From::Outside) => {
                    let port = match spec.node_port(service) {
                        0 => NODE_PORT,
                        port => port,
                    };
                    vec![(Ipv4Addr::from(NODE), port).into()]
                }
                _ => vec![spec.frontend(service)],
            };
            targets.push((if way == Way::Direct { Through::Direct } else { through }, to));
        }
        targets
    }

    /// Traffic of one kind through all beds by turns.
    fn drive(&self, subjects: &mut [Subject], from: From, kind: Kind, samples: u32) -> Result<(), LoadError> {
        let mut random = Random::new(u64::from(samples) + kind as u64);
        let blocks = samples.div_ceil(BLOCK);
        let mut order: Vec<usize> = (0..subjects.len()).collect();
        for block in 0..blocks {
            let what = format!("{} from {}, {}%", kind.name(), from.name(), block * 100 / blocks);
            self.progress.say(self.spec, &what);
            random.shuffle(&mut order);
            for &at in &order {
                let subject = &mut subjects[at];
                if subject.measured.failed() >= FAILED_MAX {
                    continue;
                }
                let (throughs, targets): (Vec<_>, Vec<_>) =
                    self.targets(subject.way, from).into_iter().unzip();
                let rounds = BLOCK.min(samples - block * BLOCK);
                let seed = u64::from(block) << 8 | at as u64;
                let drive = Drive { kind, targets, rounds, warm_up: WARM_UP, seed };
                let Some((_, client)) = subject.clients.iter_mut().find(|(at, _)| *at == from) else {
                    continue;
                };
                let driven: Driven = client.ask(&drive)?;
                take(&mut subject.measured, (from, kind, block), &throughs, driven);
            }
        }
        Ok(())
    }

    fn churn(&self, subjects: &mut [Subject]) -> Result<(), LoadError> {
        if self.options.churn_per_s == 0 {
            return Ok(());
        }
        for planner in subjects.iter_mut().filter_map(|subject| subject.planner.as_mut()) {
            let _: Told = planner.ask(&Ask::Churn { per_s: self.options.churn_per_s })?;
        }
        Ok(())
    }

    fn quiet(&self, subjects: &mut [Subject]) -> Result<(), LoadError> {
        if self.options.churn_per_s == 0 {
            return Ok(());
        }
        for subject in subjects {
            let Some(planner) = &mut subject.planner else { continue };
            if let Told::Quieted { changes, failure, .. } = planner.ask(&Ask::Quiet)? {
                subject.measured.churned = Some(changes);
                subject.measured.failure = subject.measured.failure.take().or(failure);
            }
        }
        Ok(())
    }
}

fn take(
    measured: &mut Measured,
    (from, kind, block): (From, Kind, u32),
    throughs: &[Through],
    driven: Driven,
) {
    measured.failure = measured.failure.take().or(driven.failure);
    for (through, samples) in throughs.iter().zip(driven.targets) {
        let path: Path = (from, kind, *through);
        let all = measured.traffic.entry(path).or_insert_with(Latencies::new);
        samples.ns.iter().for_each(|ns| all.record_ns(*ns));
        all.fail(samples.failed);
        measured.note(path, block, &samples);
        if !samples.answer_ns.is_empty() {
            let answers = measured.answers.entry(path).or_insert_with(Latencies::new);
            samples.answer_ns.iter().for_each(|ns| answers.record_ns(*ns));
        }
    }
}

/// What `Backends` a reader is told of.
pub(crate) fn describe(services: u32, endpoints: u32, backends: &str) -> String {
    let own = if backends == Backends::Unique.name() { "of their own" } else { "that all share" };
    format!("{services} services with {endpoints} endpoints {own}")
}
