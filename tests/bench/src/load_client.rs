//! Load through a service, as a process of its own in the node's namespace and cgroup: one new connection a request,
//! until standard input is closed. Every failure is counted and the first ones are told.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;

const TOLD_MAX: usize = 5;

#[derive(Debug, Args)]
pub(crate) struct LoadClient {
    /// Where the service is
    #[arg(long)]
    target: SocketAddr,
    /// Concurrent requests
    #[arg(long, default_value_t = 4)]
    threads: usize,
    /// Pause between a thread's requests
    #[arg(long, default_value_t = 2)]
    pause_ms: u64,
}

#[derive(Debug, Default)]
struct Outcome {
    ok: u64,
    failed: u64,
    told: Vec<String>,
    slowest: Duration,
}

impl LoadClient {
    pub(crate) fn run(&self) -> Result<()> {
        let stop = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..self.threads.max(1))
            .map(|_| {
                let (stop, target, pause) = (stop.clone(), self.target, Duration::from_millis(self.pause_ms));
                std::thread::spawn(move || load(target, pause, &stop))
            })
            .collect();
        let mut end = Vec::new();
        std::io::stdin().read_to_end(&mut end)?;
        stop.store(true, Ordering::Relaxed);
        let mut all = Outcome::default();
        for thread in threads {
            let outcome = thread.join().map_err(|_| anyhow::anyhow!("a load thread panicked"))?;
            all.ok += outcome.ok;
            all.failed += outcome.failed;
            all.told.extend(outcome.told);
            all.slowest = all.slowest.max(outcome.slowest);
        }
        all.told.truncate(TOLD_MAX);
        let slowest_ms = all.slowest.as_secs_f64() * 1000.0;
        println!(
            "{}",
            json!({"ok": all.ok, "failed": all.failed, "errors": all.told, "slowest_ms": slowest_ms})
        );
        Ok(())
    }
}

fn load(target: SocketAddr, pause: Duration, stop: &AtomicBool) -> Outcome {
    let mut outcome = Outcome::default();
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        match request(target) {
            Ok(()) => outcome.ok += 1,
            Err(error) => {
                outcome.failed += 1;
                if outcome.told.len() < TOLD_MAX {
                    outcome.told.push(format!("{error:#}"));
                }
            }
        }
        outcome.slowest = outcome.slowest.max(start.elapsed());
        std::thread::sleep(pause);
    }
    outcome
}

fn request(target: SocketAddr) -> Result<()> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&target, limit).context("connect")?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: load\r\nConnection: close\r\n\r\n").context("send")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("receive")?;
    ensure!(
        answer.starts_with(b"HTTP/1.1 200"),
        "answered {:?}",
        String::from_utf8_lossy(&answer[..answer.len().min(40)])
    );
    Ok(())
}
