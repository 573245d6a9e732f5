//! `soak overlay`: SIGKILL for agents of three nodes at random moments, while pods come and go and somebody breaks the
//! overlay by hand. What is checked: connections between pods that stay live on, no address is given to two pods at
//! once by an independent record of what was given, and at the end every node holds what its pods need and nothing else.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};
use rand::Rng;
use sheave_harness::overlay::{Bed, Host, Ips, Pod, Stream, all_pairs};
use sheave_harness::{NetNs, unique};

use crate::progress::spinner;

/// Churning pods a node at once.
const CHURN_MAX: usize = 8;
/// How long anything may take to be whole again before the soak fails: far more than it does.
const PATIENCE: Duration = Duration::from_secs(30);

/// Who has which address, by what the plugin answered: kept apart from everything that gives addresses.
#[derive(Default)]
struct Recorder {
    held: Mutex<BTreeMap<IpAddr, String>>,
    given: AtomicUsize,
}

impl Recorder {
    fn gave(&self, ips: &[IpAddr], id: &str) -> Result<()> {
        let mut held = self.held.lock().map_err(|_| anyhow!("a thread of the soak panicked"))?;
        for ip in ips {
            self.given.fetch_add(1, Ordering::Relaxed);
            if let Some(other) = held.insert(*ip, id.to_owned()) {
                bail!("{ip} was given to {id} while {other} had it");
            }
        }
        Ok(())
    }

    /// Before the plugin is asked to take them away: from then on they may be given again.
    fn gives_back(&self, ips: &[IpAddr]) -> Result<()> {
        let mut held = self.held.lock().map_err(|_| anyhow!("a thread of the soak panicked"))?;
        ips.iter().for_each(|ip| drop(held.remove(ip)));
        Ok(())
    }
}

pub(crate) fn run(kills: usize) -> Result<()> {
    let mut bed = Bed::new(crate::sheave()?);
    bed.control();
    let mut hosts: Vec<Host> = (0..3).map(|_| bed.join(Ips::Both, &["--overlay", "vxlan"])).collect();
    hosts.iter().for_each(|host| host.wait_ways(4));
    let pods: Vec<Pod> = hosts.iter().map(Host::pod).collect();
    let recorder = Recorder::default();
    for pod in &pods {
        recorder.gave(&pod.ips, &pod.id)?;
    }
    all_pairs(&pods.iter().collect::<Vec<_>>());
    let stop = AtomicBool::new(false);
    let mut slowest = Duration::ZERO;
    let mut beats = 0;
    std::thread::scope(|scope| -> Result<()> {
        let streams: Vec<_> = streams(&pods)
            .into_iter()
            .map(|mut stream| {
                scope.spawn({
                    let stop = &stop;
                    move || {
                        let mut beats = 0_u64;
                        while !stop.load(Ordering::Relaxed) {
                            stream.beat();
                            beats += 1;
                            std::thread::sleep(Duration::from_millis(5));
                        }
                        beats
                    }
                })
            })
            .collect();
        let result = faults(&mut hosts, &recorder, kills, &mut slowest);
        stop.store(true, Ordering::Relaxed);
        for stream in streams {
            beats += stream.join().map_err(|_| anyhow!("a connection between pods broke"))?;
        }
        result
    })?;
    all_pairs(&pods.iter().collect::<Vec<_>>());
    for host in &hosts {
        settled(host)?;
    }
    let start = Instant::now();
    let fourth = bed.join(Ips::Both, &["--overlay", "vxlan"]);
    let late = fourth.pod();
    for pod in &pods {
        all_pairs(&[pod, &late]);
    }
    let joined = start.elapsed();
    println!(
        "overlay: {kills} kills, {} addresses given, none twice; {beats} round trips of {} connections, none broken; \
         slowest repair {} ms; a node that joined and its first pod were reached by all after {} ms",
        recorder.given.load(Ordering::Relaxed),
        2 * pods.len(),
        slowest.as_millis(),
        joined.as_millis()
    );
    Ok(())
}

fn streams(pods: &[Pod]) -> Vec<Stream> {
    let pairs = pods.iter().zip(pods.iter().cycle().skip(1));
    pairs.flat_map(|(from, to)| [Stream::open(from, to, 0), Stream::open(from, to, 1)]).collect()
}

/// Pods come and go, something is broken by hand, and the agent dies, over and over.
fn faults(hosts: &mut [Host], recorder: &Recorder, kills: usize, slowest: &mut Duration) -> Result<()> {
    let mut churn: Vec<Vec<Pod>> = hosts.iter().map(|_| Vec::new()).collect();
    for round in 0..kills {
        let bar = spinner(format!("kill -9 of an agent, {} of {kills}", round + 1));
        let (at, before_ms, damage) = {
            let mut random = rand::rng();
            (random.random_range(0..hosts.len()), random.random_range(0..400), random.random_range(0..5))
        };
        let host = &mut hosts[at];
        std::thread::scope(|scope| -> Result<()> {
            let (shared, pods) = (&*host, &mut churn[at]);
            let coming = scope.spawn(move || come_and_go(shared, pods, recorder));
            std::thread::sleep(Duration::from_millis(before_ms));
            // By its number, as another thread still calls the plugin.
            let pid = nix::unistd::Pid::from_raw(i32::try_from(shared.pid())?);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
            coming.join().map_err(|_| anyhow!("the churn panicked"))?
        })?;
        host.kill9();
        break_by_hand(host, damage);
        host.start();
        host.wait_serving();
        let start = Instant::now();
        break_by_hand(host, (damage + 1) % 5);
        await_whole(host)?;
        *slowest = (*slowest).max(start.elapsed());
        come_and_go(host, &mut churn[at], recorder)?;
        bar.finish_and_clear();
    }
    for (host, pods) in hosts.iter().zip(&mut churn) {
        for pod in pods.drain(..) {
            recorder.gives_back(&pod.ips)?;
            host.cni("DEL", &pod.id, &pod.netns.path()).map_err(|why| anyhow!("DEL: {why}"))?;
        }
    }
    Ok(())
}

/// Adds and removes a few; what fails because the agent dies is taken back, as a runtime would.
fn come_and_go(host: &Host, pods: &mut Vec<Pod>, recorder: &Recorder) -> Result<()> {
    for _ in 0..10 {
        let (leave, pick) = {
            let mut random = rand::rng();
            (pods.len() >= CHURN_MAX || random.random_bool(0.4), random.random_range(0..CHURN_MAX))
        };
        if leave && !pods.is_empty() {
            let pod = pods.swap_remove(pick % pods.len());
            recorder.gives_back(&pod.ips)?;
            host.cni("DEL", &pod.id, &pod.netns.path()).map_err(|why| anyhow!("DEL: {why}"))?;
            continue;
        }
        let (netns, id) = (NetNs::new(), unique("churn"));
        match host.try_pod(netns, id) {
            Ok(pod) => {
                recorder.gave(&pod.ips, &pod.id)?;
                pods.push(pod);
            }
            Err((netns, id, _)) => {
                host.cni("DEL", &id, &netns.path())
                    .map_err(|why| anyhow!("DEL after a failed ADD: {why}"))?;
            }
        }
    }
    Ok(())
}

fn break_by_hand(host: &Host, damage: usize) {
    let command: &[&str] = match damage {
        0 => &["link", "del", "sheave-vx4"],
        1 => &["route", "flush", "dev", "sheave-vx4"],
        2 => &["neigh", "flush", "dev", "sheave-vx4", "nud", "permanent"],
        3 => &["link", "set", "sheave-vx4", "down"],
        _ => &["-6", "route", "flush", "dev", "sheave-vx4"],
    };
    // It may be broken already.
    host.netns.command("ip").args(command).output().ok();
}

/// Two peers with a range of each family: four routes, two forwarding entries, four neighbours.
fn whole(host: &Host) -> Result<(), String> {
    let run = |program: &str, args: &[&str]| {
        let output = host.netns.command(program).args(args).output().map_err(|error| error.to_string())?;
        Ok::<_, String>(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let count = |text: &str, part: &str| text.lines().filter(|line| line.contains(part)).count();
    let v4 = count(&run("ip", &["-4", "route", "show", "dev", "sheave-vx4"])?, "via 10.244.");
    let v6 = count(&run("ip", &["-6", "route", "show", "dev", "sheave-vx4"])?, "via fe80:");
    let neighbours =
        count(&run("ip", &["neigh", "show", "dev", "sheave-vx4", "nud", "permanent"])?, "lladdr");
    let entries = count(&run("bridge", &["fdb", "show", "dev", "sheave-vx4"])?, "dst 192.0.2.");
    match (v4, v6, neighbours, entries) {
        (2, 2, 4, 2) => Ok(()),
        found => Err(format!("routes, neighbours and entries: {found:?}\n{}", host.log())),
    }
}

fn await_whole(host: &Host) -> Result<()> {
    let start = Instant::now();
    loop {
        match whole(host) {
            Ok(()) => return Ok(()),
            Err(why) => ensure!(start.elapsed() < PATIENCE, "{} is not whole: {why}", host.name),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Nothing is left but the pod that stays.
fn settled(host: &Host) -> Result<()> {
    let start = Instant::now();
    loop {
        let told = host.sheave(&["status"]).unwrap_or_else(|why| why);
        if told.contains("pods connected: 1, leaks: 0") {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{} does not settle: {told}\n{}", host.name, host.log());
        std::thread::sleep(Duration::from_millis(100));
    }
}
