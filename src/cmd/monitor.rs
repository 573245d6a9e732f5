//! `sheave monitor`: drops and new connections as they happen. The programs write events only while this runs: the
//! permission runs out three seconds after it was last renewed, whatever happened to this process.

use std::collections::HashMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sheave_agent::dataplane::ebpf::{Listener, Seen};
use sheave_agent::service::{FrontendKey, Proto};

use super::names;
use crate::cli::{MonitorFlags, Output};

/// How often the permission is renewed and lost events are looked at.
const PERIOD: Duration = Duration::from_secs(1);
/// Names are asked for again after an unknown service, but not more often than this.
const NAMES_PERIOD: Duration = Duration::from_secs(10);

pub(super) fn run(flags: &MonitorFlags) -> Result<()> {
    let paths = super::paths(&flags.base)?;
    super::needs_ebpf(&paths)?;
    let _alone = alone(paths.run_dir.join("monitor.lock"))?;
    let mut names = Names::new(super::kubeconfig(&flags.base, flags.kubeconfig.as_deref())?)?;
    let mut listener = Listener::open(&paths.pin_dir)?;
    let stop = names.stops_on_signal();
    let mut out = std::io::stdout();
    if flags.output == Output::Table {
        eprintln!("listening; Ctrl-C ends it");
    }
    let (mut renewed, mut lost, mut shown) = (Instant::now(), 0, 0);
    let clock = Clock::now();
    while !stop.load(Ordering::Relaxed) {
        while let Some(seen) = listener.take() {
            if flags.drops && !seen.drop {
                continue;
            }
            let service = names.of(&seen);
            match flags.output {
                Output::Json => writeln!(out, "{}", as_json(&seen, service, &clock))?,
                Output::Table => writeln!(out, "{}", line(&seen, service, &clock))?,
            }
            shown += 1;
            if flags.count.is_some_and(|count| shown >= count) {
                return Ok(listener.stop()?);
            }
        }
        out.flush()?;
        if renewed.elapsed() >= PERIOD {
            listener.keep_on()?;
            renewed = Instant::now();
            let now = listener.lost()?;
            if now != lost {
                match flags.output {
                    Output::Json => writeln!(out, "{}", json!({"lost": now - lost}))?,
                    Output::Table => {
                        writeln!(out, "{} events were lost: more came than could be read", now - lost)?
                    }
                }
                lost = now;
            }
        }
        listener.wait(PERIOD.saturating_sub(renewed.elapsed()).max(Duration::from_millis(1)))?;
    }
    Ok(listener.stop()?)
}

/// Holds the place of the only listener: what one reads, no other would see.
fn alone(path: PathBuf) -> Result<std::fs::File> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    let file = std::fs::File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!("another `sheave monitor` listens on this node already")
        }
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("locking {}", path.display()))
        }
    }
}

/// Wall clock time of events, which carry the monotonic clock's.
struct Clock {
    offset_ns: i128,
}

impl Clock {
    fn now() -> Self {
        let monotonic = sheave_agent::dataplane::ebpf::monotonic_ns();
        Self { offset_ns: jiff::Timestamp::now().as_nanosecond() - i128::from(monotonic) }
    }

    fn time(&self, seen: &Seen) -> String {
        let at = jiff::Timestamp::from_nanosecond(self.offset_ns + i128::from(seen.time_ns));
        at.map_or_else(|_| seen.time_ns.to_string(), |at| format!("{at:.6}"))
    }
}

/// Services' names, as far as the API tells them.
struct Names {
    runtime: tokio::runtime::Runtime,
    kubeconfig: PathBuf,
    known: HashMap<FrontendKey, String>,
    asked: Option<Instant>,
}

impl Names {
    fn new(kubeconfig: PathBuf) -> Result<Self> {
        let mut names = Self { runtime: super::runtime()?, kubeconfig, known: HashMap::new(), asked: None };
        names.refresh();
        Ok(names)
    }

    /// True from the first SIGINT or SIGTERM on.
    fn stops_on_signal(&self) -> Arc<AtomicBool> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        self.runtime.spawn(async move {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut term), Ok(mut int)) =
                (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
            else {
                return;
            };
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            told.store(true, Ordering::Relaxed);
        });
        stop
    }

    fn refresh(&mut self) {
        self.asked = Some(Instant::now());
        // Without the API events are shown with addresses alone.
        if let Ok(known) = self.runtime.block_on(names::all(&self.kubeconfig)) {
            self.known = known;
        }
    }

    fn of(&mut self, seen: &Seen) -> Option<&str> {
        let proto = Proto::from_name(&seen.proto)?;
        let exact = FrontendKey { addr: seen.asked.ip(), port: seen.asked.port(), proto };
        let any: IpAddr =
            if exact.addr.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let keys = [exact, FrontendKey { addr: any, ..exact }];
        let unknown = keys.iter().all(|key| !self.known.contains_key(key));
        if unknown && seen.service != 0 && self.asked.is_none_or(|at| at.elapsed() > NAMES_PERIOD) {
            self.refresh();
        }
        keys.iter().find_map(|key| self.known.get(key)).map(String::as_str)
    }
}

fn line(seen: &Seen, service: Option<&str>, clock: &Clock) -> String {
    let word = if seen.drop { "DROP" } else { "OPEN" };
    let client = seen.client.map_or_else(|| "a socket".to_owned(), |at| at.to_string());
    let mut text = format!("{} {word} {} {client} -> {}", clock.time(seen), seen.proto, seen.asked);
    if let Some(service) = service {
        text.push_str(&format!(" ({service})"));
    } else if seen.service != 0 {
        text.push_str(&format!(" (service id {})", seen.service));
    }
    if let Some(backend) = seen.backend {
        text.push_str(&format!(" -> {backend}"));
    }
    text.push_str(&format!(" {} at {}", seen.reason, seen.hook));
    if seen.device != 0 {
        text.push_str(&format!(" of device {}", device(seen.device)));
    }
    text
}

fn device(index: u32) -> String {
    sheave_agent::dataplane::ebpf::device_name(index).unwrap_or_else(|| index.to_string())
}

fn as_json(seen: &Seen, service: Option<&str>, clock: &Clock) -> Value {
    json!({
        "time": clock.time(seen), "event": if seen.drop { "drop" } else { "connection" },
        "hook": seen.hook, "reason": seen.reason, "protocol": seen.proto,
        "client": seen.client.map(|at| at.to_string()), "asked": seen.asked.to_string(),
        "backend": seen.backend.map(|at| at.to_string()), "serviceId": seen.service, "service": service,
        "device": (seen.device != 0).then(|| device(seen.device)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen() -> Seen {
        Seen {
            time_ns: 0,
            drop: true,
            hook: "ingress",
            reason: "source_range_refused",
            proto: "TCP".to_owned(),
            client: Some("198.51.100.1:4000".parse().unwrap()),
            asked: "192.0.2.10:30080".parse().unwrap(),
            backend: None,
            service: 7,
            device: 0,
        }
    }

    #[test]
    fn an_event_is_one_line() {
        let clock = Clock { offset_ns: 1_000_000_000 };
        let line = line(&seen(), Some("default/web"), &clock);
        assert_eq!(
            line,
            "1970-01-01T00:00:01.000000Z DROP TCP 198.51.100.1:4000 -> 192.0.2.10:30080 (default/web) \
             source_range_refused at ingress"
        );
        let json = as_json(&seen(), None, &clock);
        assert_eq!((&json["event"], &json["service"]), (&json!("drop"), &Value::Null));
        assert_eq!(json["serviceId"], 7);
    }
}
