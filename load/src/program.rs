//! The process that puts services into the kernel, one a way and a number of services, so that its memory is that of
//! this alone. Invariant: an answer comes when the kernel has it, not before.

use crate::LoadError;
use crate::bed::{NODE, POD_LINKS, PODS, UPLINK, feed};
use crate::error::{Doing as _, chain};
use crate::iptables;
use crate::options::{IptablesKind, Way};
use crate::spawn::dies_with_parent;
use crate::spec::PORT;
use crate::wire::{self, Ask, Program, Told};
use nix::sys::resource::{UsageWho, getrusage};
use sheave_agent::dataplane::{DataplaneConfig, Driver, Lookup, MapSizes, Mode};
use sheave_agent::service::{Event, Proto};
use std::collections::{BTreeSet, HashMap};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Does what standard input asks for until that ends. What is in the kernel stays, as it does when an agent ends.
pub(crate) fn run(program: Program) -> Result<(), LoadError> {
    // Requests come while endpoints are being churned.
    let (send, asked) = channel();
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        while let Ok(Some(ask)) = wire::read::<Ask>(&mut input, "programming") {
            if send.send(ask).is_err() {
                break;
            }
        }
    });
    let mut plane = Plane { program, holds: Holds::Nothing, changed: HashMap::new(), next_change: 0 };
    let say = |told: &Told| wire::write(&mut std::io::stdout(), told).doing("answer");
    while let Ok(ask) = asked.recv() {
        match ask {
            Ask::Fill => say(&plane.fill().unwrap_or_else(|e| Told::Unavailable(chain(&e))))?,
            Ask::Change { changes, budget_ms } => {
                let told = plane.change(changes, Duration::from_millis(budget_ms));
                say(&told.unwrap_or_else(|e| Told::Unavailable(chain(&e))))?;
            }
            Ask::Churn { per_s } => {
                say(&Told::Churning)?;
                say(&plane.churn(per_s, &asked))?;
            }
            Ask::Quiet => say(&Told::Quieted { changes: 0, longest_ns: 0, failure: None })?,
        }
    }
    Ok(())
}

enum Holds {
    Nothing,
    Driver(Box<Driver>),
    Iptables(&'static str),
}

struct Plane {
    program: Program,
    holds: Holds,
    /// Endpoints of services that were changed.
    changed: HashMap<u32, Vec<Ipv4Addr>>,
    next_change: u32,
}

impl Plane {
    fn fill(&mut self) -> Result<Told, LoadError> {
        let (mut open_s, mut note, spec) = (0.0, None, self.program.spec);
        let mode = match self.program.way {
            Way::Direct => return Ok(Told::Unavailable("there is nothing to put in".to_owned())),
            Way::Ebpf => Some(Mode::Ebpf),
            Way::Nftables => Some(Mode::Nftables),
            Way::Ipvs => Some(Mode::Ipvs),
            Way::Iptables => None,
        };
        // What the API tells of is there before the clock starts, as are kube-proxy's objects before its rules.
        let events = if mode.is_some() { self.events() } else { Vec::new() };
        let start = Instant::now();
        if let Some(mode) = mode {
            let mut driver = Driver::open(&self.config(mode)).map_err(|e| failed(&e))?;
            open_s = start.elapsed().as_secs_f64();
            driver.handle(events);
            driver.step().map_err(|e| failed(&e))?;
            if let Some((service, reasons)) = driver.refused().first_key_value() {
                let why: Vec<String> = reasons.iter().map(ToString::to_string).collect();
                let told =
                    format!("{} services are refused, {service}: {}", driver.refused().len(), why.join("; "));
                return Ok(Told::Unavailable(told));
            }
            self.holds = Holds::Driver(Box::new(driver));
        } else {
            let (restore, kind) = restore_program(self.program.iptables)?;
            self.restore(restore, &[], &iptables::all(spec))?;
            note = Some(format!("iptables-{}", kind.name()));
            self.holds = Holds::Iptables(restore);
        }
        let program_s = start.elapsed().as_secs_f64();
        let (rss_mb, rss_peak_mb) = memory(mode.is_none());
        Ok(Told::Filled { open_s, program_s, rss_mb, rss_peak_mb, note })
    }

    fn config(&self, mode: Mode) -> DataplaneConfig {
        let (spec, least) = (self.program.spec, MapSizes::default());
        let room = spec.backends_total() + spec.backends_total() / 8;
        DataplaneConfig {
            mode: Some(mode),
            pin_dir: self.program.pin_dir.clone(),
            cgroup_path: Some(self.program.cgroup.clone()),
            uplinks: vec![UPLINK.to_owned()],
            pod_links: vec![POD_LINKS.to_owned()],
            // Without it all is as on a node whose agent runs the pods: their sockets are served.
            pod_packets: self.program.pod_packets,
            host_routing: self.program.host_routing,
            watched_pod_links: false,
            node_name: "load".to_owned(),
            node_ips: vec![Ipv4Addr::from(NODE).into()],
            pod_cidrs: PODS.parse().into_iter().collect(),
            sizes: MapSizes {
                frontends: least.frontends.max(spec.services + spec.services / 8),
                backends: least.backends.max(room),
                slots: least.slots.max(spec.services.saturating_mul(spec.endpoints).saturating_mul(2)),
                ..least
            },
            ..DataplaneConfig::default()
        }
    }

    /// All services with their slices, and that these are all.
    fn events(&self) -> Vec<Event> {
        let spec = self.program.spec;
        let mut events = Vec::with_capacity(spec.services as usize * 2 + 2);
        let (mut services, mut slices) = (BTreeSet::new(), BTreeSet::new());
        for number in 0..spec.services {
            for event in [spec.service(number), spec.slice(number, &spec.endpoints(number))] {
                match &event {
                    Event::Service(service) => drop(services.insert(service.key.clone())),
                    Event::Slice(slice) => drop(slices.insert(slice.key.clone())),
                    _ => {}
                }
                events.push(event);
            }
        }
        events.extend([Event::ServicesSynced(services), Event::SlicesSynced(slices)]);
        events
    }

    /// One change after the other; how long each took until the kernel had it.
    fn change(&mut self, changes: u32, budget: Duration) -> Result<Told, LoadError> {
        let (start, mut ns) = (Instant::now(), Vec::new());
        for _ in 0..changes {
            ns.push(self.change_one()?);
            if start.elapsed() > budget {
                break;
            }
        }
        if self.program.way == Way::Ebpf {
            self.check_last_change()?;
        }
        Ok(Told::Changed { ns })
    }

    fn change_one(&mut self) -> Result<u64, LoadError> {
        let (spec, change) = (self.program.spec, self.next_change);
        self.next_change += 1;
        let service = spec.service_of_change(change);
        let before = self.changed.get(&service).cloned().unwrap_or_else(|| spec.endpoints(service));
        let after = spec.changed_endpoints(service, change);
        let start = Instant::now();
        match &mut self.holds {
            Holds::Nothing => {}
            Holds::Driver(driver) => {
                driver.handle([spec.slice(service, &after)]);
                driver.step().map_err(|e| failed(&e))?;
            }
            Holds::Iptables(program) => {
                let program = *program;
                self.restore(program, &["--noflush"], &iptables::change(spec, service, &before, &after))?;
            }
        }
        let took = start.elapsed();
        self.changed.insert(service, after);
        Ok(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX))
    }

    /// The maps must hold what the last change wanted, or its time says nothing.
    fn check_last_change(&self) -> Result<(), LoadError> {
        let spec = self.program.spec;
        let service = spec.service_of_change(self.next_change.saturating_sub(1));
        let Some(wanted) = self.changed.get(&service) else { return Ok(()) };
        let maps = Lookup::open(&self.program.pin_dir).map_err(|e| failed(&e))?;
        let held = maps.ready(spec.vip(service).into(), PORT, Proto::Tcp).map_err(|e| failed(&e))?;
        let mut held: Vec<_> = held.into_iter().map(|(ip, _)| ip).collect();
        let mut wanted: Vec<_> = wanted.iter().map(|ip| std::net::IpAddr::from(*ip)).collect();
        held.sort_unstable();
        wanted.sort_unstable();
        if held == wanted {
            return Ok(());
        }
        let said = format!("changed endpoints to {wanted:?}, but the maps hold {held:?}");
        Err(LoadError::Worker { who: "programming".to_owned(), said })
    }

    /// Changes so many endpoints a second until something else is asked.
    fn churn(&mut self, per_s: u32, asked: &Receiver<Ask>) -> Told {
        let (start, period) = (Instant::now(), Duration::from_secs(1) / per_s.max(1));
        let (mut changes, mut longest_ns, mut failure) = (0u32, 0, None);
        loop {
            let due = start + period * changes;
            match asked.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(_) | Err(RecvTimeoutError::Disconnected) => break,
            }
            match self.change_one() {
                Ok(took) => longest_ns = took.max(longest_ns),
                Err(error) => drop(failure.get_or_insert_with(|| chain(&error))),
            }
            changes += 1;
        }
        Told::Quieted { changes: changes.into(), longest_ns, failure }
    }

    fn restore(&self, program: &str, args: &[&str], rules: &str) -> Result<(), LoadError> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        // iptables-legacy locks a file in /run; waiting for the host's would be measured. Any file will do.
        command.env("XTABLES_LOCKFILE", self.program.cgroup.join("cgroup.procs"));
        dies_with_parent(&mut command);
        feed(command, rules.as_bytes(), program)
    }
}

fn failed(error: &dyn std::error::Error) -> LoadError {
    LoadError::Unavailable(chain(error))
}

/// The program that takes rules, and which implementation it feeds.
fn restore_program(kind: Option<IptablesKind>) -> Result<(&'static str, IptablesKind), LoadError> {
    let (program, version_of) = match kind {
        Some(IptablesKind::Nft) => ("iptables-nft-restore", "iptables-nft"),
        Some(IptablesKind::Legacy) => ("iptables-legacy-restore", "iptables-legacy"),
        None => ("iptables-restore", "iptables"),
    };
    let version = Command::new(version_of)
        .arg("--version")
        .output()
        .doing(format!("start {version_of} (is it installed?)"))?;
    let nft = String::from_utf8_lossy(&version.stdout).contains("nf_tables");
    Ok((program, if nft { IptablesKind::Nft } else { IptablesKind::Legacy }))
}

/// Resident memory now and at its highest, in megabytes (10^6 bytes): this process's, or that of the largest program it
/// ran.
fn memory(of_children: bool) -> (f64, f64) {
    if of_children {
        let kib = getrusage(UsageWho::RUSAGE_CHILDREN).map_or(0, |usage| usage.max_rss());
        let mb = kib as f64 * 1024.0 / 1e6;
        return (mb, mb);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
        kib.unwrap_or(0.0) * 1024.0 / 1e6
    };
    (field("VmRSS:"), field("VmHWM:"))
}
