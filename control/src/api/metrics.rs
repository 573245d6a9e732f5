//! Counters for Prometheus. The set of label values is fixed by the kinds table, so memory is
//! bounded whatever is asked for.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::auth::Verb;
use crate::store::log::LogStore;

/// Upper bounds of the latency buckets in milliseconds.
const BUCKETS_MS: [u64; 10] = [1, 2, 5, 10, 20, 50, 100, 500, 1000, 10_000];

#[derive(Default)]
struct Latency {
    buckets: [u64; BUCKETS_MS.len()],
    count: u64,
    sum: Duration,
}

/// What is counted.
#[derive(Default)]
pub(super) struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, &'static str, u16), u64>>,
    latencies: Mutex<BTreeMap<&'static str, Latency>>,
    pub(super) in_flight: AtomicI64,
    pub(super) connections: AtomicI64,
    pub(super) watches: AtomicI64,
}

impl Metrics {
    /// Counts a request that was answered. `resource` is empty for everything but resources.
    pub(super) fn record(&self, verb: Option<Verb>, resource: &'static str, code: u16, took: Duration) {
        let verb = verb.map_or("other", Verb::as_str);
        *lock(&self.requests).entry((verb, resource, code)).or_default() += 1;
        // A watch lasts as long as its client wants: its duration says nothing.
        if verb != "watch" {
            let mut latencies = lock(&self.latencies);
            let latency = latencies.entry(verb).or_default();
            let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
            for (bucket, bound) in latency.buckets.iter_mut().zip(BUCKETS_MS) {
                *bucket += u64::from(millis <= bound);
            }
            latency.count += 1;
            latency.sum += took;
        }
    }

    /// Prometheus' text form.
    pub(super) fn render(&self, store: &LogStore) -> String {
        let mut out = String::with_capacity(4096);
        self.render_requests(&mut out);
        render_store(&mut out, store);
        render_process(&mut out);
        out
    }

    fn render_requests(&self, out: &mut String) {
        head(out, "apiserver_request_total", "counter", "Requests answered.");
        for ((verb, resource, code), count) in &*lock(&self.requests) {
            line(
                out,
                &format!(
                    "apiserver_request_total{{verb=\"{verb}\",resource=\"{resource}\",code=\"{code}\"}} {count}"
                ),
            );
        }
        let name = "apiserver_request_duration_seconds";
        head(out, name, "histogram", "Time to answer, watches left out.");
        for (verb, latency) in &*lock(&self.latencies) {
            for (count, bound) in latency.buckets.iter().zip(BUCKETS_MS) {
                let seconds = Duration::from_millis(bound).as_secs_f64();
                line(out, &format!("{name}_bucket{{verb=\"{verb}\",le=\"{seconds}\"}} {count}"));
            }
            line(out, &format!("{name}_bucket{{verb=\"{verb}\",le=\"+Inf\"}} {}", latency.count));
            line(out, &format!("{name}_sum{{verb=\"{verb}\"}} {}", latency.sum.as_secs_f64()));
            line(out, &format!("{name}_count{{verb=\"{verb}\"}} {}", latency.count));
        }
        for (name, help, value) in [
            ("apiserver_current_inflight_requests", "Requests being answered.", &self.in_flight),
            ("apiserver_registered_watchers", "Watches being served to clients.", &self.watches),
            ("apiserver_connections", "Open client connections.", &self.connections),
        ] {
            head(out, name, "gauge", help);
            line(out, &format!("{name} {}", value.load(Ordering::Relaxed)));
        }
    }
}

fn render_store(out: &mut String, store: &LogStore) {
    use crate::store::Store;
    let stats = store.stats();
    for (name, help, value) in [
        ("sheave_store_commits_total", "Durable commits.", &stats.commits),
        ("sheave_store_writes_total", "Writes in durable commits.", &stats.writes),
        ("sheave_store_commit_failures_total", "Commits that the disk refused.", &stats.failures),
    ] {
        head(out, name, "counter", help);
        line(out, &format!("{name} {}", value.load(Ordering::Relaxed)));
    }
    head(out, "sheave_store_commit_seconds_total", "counter", "Time spent in commits.");
    let seconds = Duration::from_micros(stats.commit_micros.load(Ordering::Relaxed)).as_secs_f64();
    line(out, &format!("sheave_store_commit_seconds_total {seconds}"));
    head(out, "sheave_store_revision", "gauge", "Revision of the last write.");
    line(out, &format!("sheave_store_revision {}", store.revision()));
    let counts = store.counts();
    head(out, "apiserver_storage_objects", "gauge", "Objects stored.");
    for (resource, objects, _) in &counts {
        line(out, &format!("apiserver_storage_objects{{resource=\"{resource}\"}} {objects}"));
    }
    head(out, "sheave_store_watchers", "gauge", "Watchers of a resource, controllers included.");
    for (resource, _, watchers) in &counts {
        line(out, &format!("sheave_store_watchers{{resource=\"{resource}\"}} {watchers}"));
    }
}

fn render_process(out: &mut String) {
    const PAGE_BYTES: u64 = 4096;
    let resident = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|statm| statm.split_whitespace().nth(1)?.parse::<u64>().ok());
    if let Some(pages) = resident {
        head(out, "process_resident_memory_bytes", "gauge", "Resident memory.");
        line(out, &format!("process_resident_memory_bytes {}", pages * PAGE_BYTES));
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    line(out, &format!("# HELP {name} {help}\n# TYPE {name} {kind}"));
}

fn line(out: &mut String, text: &str) {
    // Writing to a String can't fail.
    writeln!(out, "{text}").ok();
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
