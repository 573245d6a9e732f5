//! Figures of the service data plane without an API server: programming time, one change, adoption, memory, and the
//! price of a connection through a ClusterIP beside one straight to the endpoint.
//!
//!     cargo run --release -p sheave-agent --example dataplane_figures
//!
//! Needs root. Works in a network namespace and a cgroup of its own and leaves nothing behind.

use std::collections::BTreeSet;
use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt};
use nix::unistd::Pid;
use sheave_agent::dataplane::ebpf::cgroup2_root;
use sheave_agent::dataplane::{DataplaneConfig, Driver, uninstall};
use sheave_agent::service::{
    Endpoint, Event, Hint, Proto, Readiness, Service, ServicePort, Slice, SlicePort,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const SAMPLES: usize = 20_000;
const CHANGES: usize = 2_000;
const ENDPOINTS: u32 = 2;

fn main() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    for args in [["link", "set", "lo", "up"].as_slice(), &["addr", "add", "10.244.0.1/32", "dev", "lo"]] {
        if !Command::new("ip").args(args).status()?.success() {
            return Err(format!("ip {args:?}").into());
        }
    }
    let mut pinned = CpuSet::new();
    pinned.set(1)?;
    if sched_setaffinity(Pid::from_raw(0), &pinned).is_err() {
        println!("one CPU only: not pinned");
    }
    let name = format!("sheave-figures-{}", std::process::id());
    let cgroup = cgroup2_root()?.join(&name);
    std::fs::create_dir(&cgroup)?;
    std::fs::write(cgroup.join("cgroup.procs"), "0")?;
    let pins = std::env::temp_dir().join(&name);
    let result = [10, 10_000, 100_000].into_iter().try_for_each(|count| measure(count, &cgroup, &pins));
    if let Some(parent) = cgroup.parent() {
        std::fs::write(parent.join("cgroup.procs"), "0")?;
    }
    std::fs::remove_dir(&cgroup)?;
    result
}

fn config(cgroup: &std::path::Path, pins: &std::path::Path) -> DataplaneConfig {
    DataplaneConfig {
        pin_dir: PathBuf::from(pins),
        cgroup_path: Some(cgroup.to_owned()),
        uplinks: Vec::new(),
        node_name: "node".to_owned(),
        ..DataplaneConfig::default()
    }
}

fn service(n: u32) -> Event {
    Event::Service(Service {
        key: format!("default/service-{n}").into(),
        cluster_ips: [IpAddr::from(Ipv4Addr::from(0x0a60_0000 + n + 1))].into(),
        ports: [ServicePort { name: "".into(), port: 80, node_port: 0, proto: Proto::Tcp }].into(),
        ..Service::default()
    })
}

fn slice(n: u32, endpoints: &[Ipv4Addr]) -> Event {
    let endpoint = |addr: &Ipv4Addr| Endpoint {
        addr: (*addr).into(),
        on_this_node: true,
        readiness: Readiness::Ready,
        hint: Hint::None,
    };
    Event::Slice(Slice {
        key: format!("default/service-{n}-slice").into(),
        service: format!("default/service-{n}").into(),
        ports: [SlicePort { name: "".into(), port: 8080, proto: Proto::Tcp }].into(),
        endpoints: endpoints.iter().map(endpoint).collect(),
        weight: 1,
        problems: Box::default(),
    })
}

/// Service 0 has the one endpoint that lives; the others have endpoints of their own.
fn endpoints(n: u32) -> Vec<Ipv4Addr> {
    if n == 0 {
        return vec![Ipv4Addr::new(10, 244, 0, 1)];
    }
    (0..ENDPOINTS).map(|e| Ipv4Addr::from(0x0b00_0000 + n * ENDPOINTS + e)).collect()
}

fn all(count: u32) -> Vec<Event> {
    let keys = |suffix: &str| -> BTreeSet<_> {
        (0..count).map(|n| format!("default/service-{n}{suffix}").into()).collect()
    };
    let mut events: Vec<Event> = (0..count).map(service).collect();
    events.extend((0..count).map(|n| slice(n, &endpoints(n))));
    events.extend([Event::ServicesSynced(keys("")), Event::SlicesSynced(keys("-slice"))]);
    events
}

fn measure(count: u32, cgroup: &std::path::Path, pins: &std::path::Path) -> Result<()> {
    let config = config(cgroup, pins);
    let resident = resident_kib()?;
    let events = all(count);
    let mut driver = Driver::open(&config)?;
    let begun = Instant::now();
    driver.handle(events);
    driver.step()?;
    let filled = begun.elapsed();
    println!(
        "services {count}: first fill and attach {filled:?}, resident +{} KiB",
        resident_kib()?.saturating_sub(resident)
    );

    let mut times = Vec::with_capacity(CHANGES);
    for n in 0..CHANGES as u32 {
        // Away and back again, so that every step changes something.
        let which = 1 + n / 2 * 7_919 % (count - 1);
        let endpoints = if n % 2 == 0 { endpoints(which)[..1].to_vec() } else { endpoints(which) };
        let begun = Instant::now();
        driver.handle([slice(which, &endpoints)]);
        driver.step()?;
        times.push(begun.elapsed());
    }
    println!("services {count}: one endpoint change {}", summary(&mut times));
    drop(driver);

    let begun = Instant::now();
    let mut driver = Driver::open(&config)?;
    let opened = begun.elapsed();
    driver.handle(all(count));
    driver.step()?;
    println!("services {count}: adoption {opened:?}, to the first round's end {:?}", begun.elapsed());

    let (mut direct, mut through) = connections()?;
    let (a, b) = (summary(&mut direct), summary(&mut through));
    let ratio = through[SAMPLES / 2].as_secs_f64() / direct[SAMPLES / 2].as_secs_f64();
    println!("services {count}: connect direct {a}; through the ClusterIP {b}; p50 ratio {ratio:.3}");
    drop(driver);
    uninstall(pins).map_err(|errors| format!("{errors:?}"))?;
    Ok(())
}

/// Connects straight and through service 0 in turns, timing connect(2) alone.
fn connections() -> Result<(Vec<Duration>, Vec<Duration>)> {
    let listener = TcpListener::bind("10.244.0.1:8080")?;
    let stop: SocketAddr = listener.local_addr()?;
    let server = std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            if stream.peer_addr().is_ok_and(|peer| peer.port() == 1) {
                return;
            }
        }
    });
    let once = |to: SockaddrIn| -> Result<Duration> {
        let client: OwnedFd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // A reset leaves no TIME_WAIT behind, of which there would be too many.
        setsockopt(&client, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
        let begun = Instant::now();
        connect(client.as_raw_fd(), &to)?;
        Ok(begun.elapsed())
    };
    let (direct, through) = (SockaddrIn::new(10, 244, 0, 1, 8080), SockaddrIn::new(10, 96, 0, 1, 80));
    let (mut a, mut b) = (Vec::with_capacity(SAMPLES), Vec::with_capacity(SAMPLES));
    for n in 0..SAMPLES + 500 {
        // Each goes first half of the time.
        let (first, second) = if n % 2 == 0 {
            let first = once(direct)?;
            (first, once(through)?)
        } else {
            let second = once(through)?;
            (once(direct)?, second)
        };
        if n >= 500 {
            a.push(first);
            b.push(second);
        }
    }
    let last = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    nix::sys::socket::bind(last.as_raw_fd(), &SockaddrIn::new(10, 244, 0, 1, 1))?;
    connect(
        last.as_raw_fd(),
        &SockaddrIn::from(match stop {
            SocketAddr::V4(at) => at,
            SocketAddr::V6(_) => return Err("an IPv4 listener".into()),
        }),
    )?;
    server.join().map_err(|_| "the server panicked")?;
    Ok((a, b))
}

fn summary(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    format!("p50 {:?} p90 {:?} p99 {:?} max {:?}", at(0.5), at(0.9), at(0.99), at(1.0))
}

fn resident_kib() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
