//! The load of `soak rolling`, a process of its own in a pod's namespace and in the served cgroup, until standard input
//! is closed. Requests of five kinds at a steady rate; each failure is counted with its kind.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;

/// A request that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(3);
/// Failures that are told in words.
const TOLD_MAX: usize = 5;

#[derive(Debug, Args)]
pub(crate) struct RollingClient {
    /// Where the service is
    #[arg(long)]
    target: SocketAddr,
    /// Requests a second, about
    #[arg(long)]
    rate: u32,
}

/// No client goes without a request for longer, however low the rate is: it would not hear that its server is going.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Kinds of load: threads, and the pause between a thread's requests at [`super::RATE`].
const KINDS: [(&str, usize, Duration); 5] = [
    ("tcp_short", 8, Duration::from_millis(10)),
    ("tcp_kept_alive", 8, Duration::from_millis(10)),
    ("tcp_long_lived", 20, Duration::from_millis(500)),
    ("udp_short", 2, Duration::from_millis(10)),
    ("udp_connected", 4, Duration::from_millis(20)),
];

#[derive(Default)]
struct Outcome {
    ok: u64,
    failed: u64,
    told: Vec<String>,
}

impl RollingClient {
    pub(crate) fn run(&self) -> Result<()> {
        let stop = Arc::new(AtomicBool::new(false));
        let started = Instant::now();
        let mut threads = Vec::new();
        for (kind, count, pause) in KINDS {
            for _ in 0..count {
                let (stop, target) = (stop.clone(), self.target);
                let pause = pause.mul_f64(f64::from(super::RATE) / f64::from(self.rate)).min(PAUSE_MAX);
                threads.push((kind, std::thread::spawn(move || drive(kind, target, pause, &stop))));
            }
        }
        let mut end = Vec::new();
        std::io::stdin().read_to_end(&mut end)?;
        stop.store(true, Ordering::Relaxed);
        let mut kinds: BTreeMap<&str, Outcome> = BTreeMap::new();
        for (kind, thread) in threads {
            let Ok(outcome) = thread.join() else { bail!("a thread of kind {kind} panicked") };
            let all = kinds.entry(kind).or_default();
            all.ok += outcome.ok;
            all.failed += outcome.failed;
            all.told.extend(outcome.told);
        }
        let seconds = started.elapsed().as_secs_f64();
        let (ok, failed) = kinds.values().fold((0, 0), |(ok, failed), k| (ok + k.ok, failed + k.failed));
        let by_kind: BTreeMap<_, _> =
            kinds.iter().map(|(kind, k)| (*kind, json!({"ok": k.ok, "failed": k.failed}))).collect();
        let told: Vec<_> = kinds.values().flat_map(|k| &k.told).take(TOLD_MAX).collect();
        let rate = ((ok + failed) as f64 / seconds).round();
        println!("{}", json!({"ok": ok, "failed": failed, "per_s": rate, "kinds": by_kind, "errors": told}));
        Ok(())
    }
}

fn drive(kind: &str, target: SocketAddr, pause: Duration, stop: &AtomicBool) -> Outcome {
    let mut outcome = Outcome::default();
    let mut connection = Connection::None;
    while !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        match request(kind, target, &mut connection) {
            Ok(()) => outcome.ok += 1,
            Err(error) => {
                connection = Connection::None;
                outcome.failed += 1;
                if outcome.told.len() < TOLD_MAX {
                    outcome.told.push(format!("{kind}: {error:#}"));
                }
            }
        }
        std::thread::sleep(pause.saturating_sub(started.elapsed()));
    }
    outcome
}

enum Connection {
    None,
    Tcp(BufReader<TcpStream>),
    Udp(UdpSocket),
}

fn request(kind: &str, target: SocketAddr, connection: &mut Connection) -> Result<()> {
    let udp = kind.starts_with("udp");
    if matches!(connection, Connection::None) {
        *connection =
            if udp { Connection::Udp(udp_socket(target)?) } else { Connection::Tcp(tcp_stream(target)?) };
    }
    let answer = match connection {
        Connection::Tcp(stream) => {
            stream.get_mut().write_all(b"q\n")?;
            let mut line = String::new();
            stream.read_line(&mut line)?;
            line
        }
        Connection::Udp(socket) => {
            socket.send(b"q\n")?;
            let mut buffer = [0; 16];
            let len = socket.recv(&mut buffer)?;
            String::from_utf8_lossy(&buffer[..len]).into_owned()
        }
        Connection::None => bail!("no connection"),
    };
    let keep = match answer.as_str() {
        "ok\n" => !kind.ends_with("short"),
        "bye\n" => false,
        other => bail!("answered {other:?}"),
    };
    if !keep {
        *connection = Connection::None;
    }
    Ok(())
}

fn tcp_stream(target: SocketAddr) -> Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect_timeout(&target, LIMIT)?;
    stream.set_nodelay(true)?;
    // A reset instead of TIME_WAIT, so that ports do not run out where all connections go to one address.
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(BufReader::new(stream))
}

fn udp_socket(target: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.connect(target)?;
    Ok(socket)
}
