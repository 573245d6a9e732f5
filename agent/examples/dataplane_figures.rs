//! Figures of the service data plane without an API server: programming time, one change, adoption, memory, and the
//! price of a connection through a ClusterIP beside one straight to the endpoint.
//!
//!     cargo run --release -p sheave-agent --example dataplane_figures [SERVICES ENDPOINTS unique|shared]
//!
//! Without arguments: 10, 10,000 and 100,000 services with 4 endpoints each of their own. `shared`: all services have the
//! same endpoints.
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
use sheave_agent::dataplane::{DataplaneConfig, Driver, MapSizes, uninstall};
use sheave_agent::service::{
    Endpoint, Event, Hint, Proto, Readiness, Service, ServicePort, Slice, SlicePort,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const SAMPLES: usize = 20_000;
const CHANGES: usize = 2_000;

/// What is measured.
#[derive(Clone, Copy)]
struct Size {
    services: u32,
    endpoints: u32,
    shared: bool,
}

fn sizes() -> Result<Vec<Size>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [services, endpoints, kind] = args.as_slice() else {
        return Ok([10, 10_000, 100_000]
            .map(|services| Size { services, endpoints: 4, shared: false })
            .into());
    };
    let shared = match kind.as_str() {
        "unique" => false,
        "shared" => true,
        other => return Err(format!("{other:?} is neither unique nor shared").into()),
    };
    Ok(vec![Size { services: services.parse()?, endpoints: endpoints.parse()?, shared }])
}

fn main() -> Result<()> {
    let sizes = sizes()?;
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
    let result = sizes.into_iter().try_for_each(|size| measure(size, &cgroup, &pins));
    if let Some(parent) = cgroup.parent() {
        std::fs::write(parent.join("cgroup.procs"), "0")?;
    }
    std::fs::remove_dir(&cgroup)?;
    result
}

fn config(size: Size, cgroup: &std::path::Path, pins: &std::path::Path) -> DataplaneConfig {
    // Twice what is there: a change writes the new run before the old one is free.
    let (least, slots) = (MapSizes::default(), size.services * size.endpoints * 2);
    let sizes = MapSizes {
        frontends: least.frontends.max(size.services * 2),
        slots: least.slots.max(slots),
        backends: least.backends.max(slots),
        ..least
    };
    DataplaneConfig {
        sizes,
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

/// Service 0 has the one endpoint that lives.
fn endpoints(size: Size, n: u32) -> Vec<Ipv4Addr> {
    if n == 0 {
        return vec![Ipv4Addr::new(10, 244, 0, 1)];
    }
    let first = if size.shared { 0 } else { n * size.endpoints };
    (0..size.endpoints).map(|e| Ipv4Addr::from(0x0b00_0000 + first + e)).collect()
}

/// Feeds everything as the watches do: one object after the other, gone when it is taken in.
fn feed(driver: &mut Driver, size: Size) {
    let keys = |suffix: &str| -> BTreeSet<_> {
        (0..size.services).map(|n| format!("default/service-{n}{suffix}").into()).collect()
    };
    driver.handle((0..size.services).map(service));
    driver.handle([Event::ServicesSynced(keys(""))]);
    driver.handle((0..size.services).map(|n| slice(n, &endpoints(size, n))));
    driver.handle([Event::SlicesSynced(keys("-slice"))]);
}

fn measure(size: Size, cgroup: &std::path::Path, pins: &std::path::Path) -> Result<()> {
    let config = config(size, cgroup, pins);
    let count = size.services;
    let kind = if size.shared { "shared" } else { "unique" };
    println!("{count} services with {} {kind} endpoints each", size.endpoints);
    let resident = resident_kib("VmRSS:")?;
    let mut driver = Driver::open(&config)?;
    let (begun, cpu) = (Instant::now(), cpu_time()?);
    feed(&mut driver, size);
    let fed = begun.elapsed();
    driver.step()?;
    let filled = begun.elapsed();
    let cpu = cpu_time()? - cpu;
    if !driver.refused().is_empty() {
        return Err(format!("{} services did not fit", driver.refused().len()).into());
    }
    println!(
        "services {count}: first fill and attach {filled:?} (CPU {cpu:?}), of that taking the events in {fed:?}; resident {} KiB, \
         {resident} before, {} at most",
        resident_kib("VmRSS:")?,
        resident_kib("VmHWM:")?
    );

    let mut times = Vec::with_capacity(CHANGES);
    for n in 0..CHANGES as u32 {
        // Away and back again, so that every step changes something.
        let which = 1 + n / 2 * 7_919 % (count - 1);
        let all = endpoints(size, which);
        let endpoints = if n % 2 == 0 { all[..1].to_vec() } else { all };
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
    feed(&mut driver, size);
    driver.step()?;
    println!(
        "services {count}: adoption {opened:?}, to the first round's end {:?}, resident {} KiB",
        begun.elapsed(),
        resident_kib("VmRSS:")?
    );

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

/// CPU time of this process so far.
fn cpu_time() -> Result<Duration> {
    let used = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    let time = |at: nix::sys::time::TimeVal| {
        Duration::from_micros(at.tv_sec() as u64 * 1_000_000 + at.tv_usec() as u64)
    };
    Ok(time(used.user_time()) + time(used.system_time()))
}

fn resident_kib(what: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(what)).ok_or("no such line")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
