//! `soak rolling`: all backends of a service are replaced one after the other, as a Deployment's rolling update with
//! graceful termination does it, under a steady load of short, kept-alive and long-lived connections and of datagrams.
//! What counts is how many requests fail. Each data plane has a node of its own, one after the other.

mod client;
mod server;

pub(crate) use client::RollingClient;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use sheave_agent::dataplane::{DataplaneConfig, DataplaneError, Driver, Mode, remove};
use sheave_agent::service::{
    Endpoint, Event, Hint, Proto, Readiness, Service, ServicePort, Slice, SlicePort,
};
use sheave_harness::{Cgroup, NetNs};

use crate::progress::spinner;
use crate::report::{Bar, Report, kernel};
use server::{PORT, Servers};

/// Backends of the service.
const BACKENDS: u16 = 20;
/// From "terminating" to "gone" at least: longer than any client goes without a word from its server. It takes longer
/// while clients are connected, up to [`GRACE`].
const DRAIN: Duration = Duration::from_millis(1_200);
/// What a pod gets to finish its work, as in Kubernetes.
const GRACE: Duration = Duration::from_secs(30);
/// From "gone" in the table to the end of the server.
const LINGER: Duration = Duration::from_millis(300);
/// Requests a second that the times above are meant for, and the rate unless told otherwise.
const RATE: u32 = 2_000;
/// A slow machine gets more time, but not more than so many times as much.
const SLOWER_MAX: u32 = 3;
const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

/// Which data planes are updated under which load.
#[derive(Debug, Clone, Args)]
pub(crate) struct Rolling {
    /// Of `rolling`: data planes, with commas between [default: all that this kernel has]
    #[arg(long, value_delimiter = ',', value_parser = mode_of)]
    mode: Vec<Mode>,
    /// Of `rolling`: requests a second of all kinds together, about
    #[arg(long, default_value_t = RATE, value_parser = clap::value_parser!(u32).range(20..=20_000))]
    rate: u32,
}

fn mode_of(name: &str) -> Result<Mode, String> {
    Mode::from_name(name).ok_or_else(|| "name ebpf, nftables or ipvs".to_owned())
}

impl Rolling {
    /// Updates all backends `rounds` times on each data plane.
    pub(crate) fn run(&self, rounds: usize, json: bool) -> Result<()> {
        let mut report = Report::new("rolling", json);
        let modes = if self.mode.is_empty() { &Mode::ALL[..] } else { &self.mode };
        let mut wrong = Vec::new();
        for mode in modes {
            // A thread of its own: it moves into the node's namespace for good.
            let told = std::thread::scope(|scope| scope.spawn(|| update(*mode, rounds, self.rate)).join());
            match told.map_err(|_| anyhow!("the update on {} panicked", mode.name()))? {
                Ok(told) => wrong.extend(self.tell(&mut report, *mode, rounds, &told)),
                Err(error) if self.mode.is_empty() && is_missing(&error) => {
                    eprintln!("{}: unavailable: {error:#}", mode.name());
                }
                Err(error) => return Err(error.context(format!("mode {}", mode.name()))),
            }
        }
        report.finish();
        if wrong.is_empty() { Ok(()) } else { bail!("{}", wrong.join("; ")) }
    }

    /// Reports what came of an update, and returns what is wrong with it.
    fn tell(&self, report: &mut Report, mode: Mode, rounds: usize, told: &Value) -> Option<String> {
        let params = [
            ("mode", json!(mode.name())),
            ("backends", json!(BACKENDS)),
            ("updates", json!(rounds)),
            ("requests", told["ok"].clone()),
            ("kinds", told["kinds"].clone()),
            ("kernel", json!(kernel())),
        ];
        // The other modes translate packets, whose entries outlive endpoints; their figure is for comparison.
        let bar = if mode == Mode::Ebpf { Bar::AtMost(0.0) } else { Bar::None };
        let failed = told["failed"].as_f64().unwrap_or(f64::NAN);
        report.add("failed", failed, "", bar, &params);
        let asked = [("mode", json!(mode.name())), ("asked", json!(self.rate))];
        report.add("requests_per_s", told["per_s"].as_f64().unwrap_or_default(), "1/s", Bar::None, &asked);
        if told["failed"] != 0 {
            eprintln!("{}: failures, the first of them: {}", mode.name(), told["errors"]);
        }
        if told["ok"].as_u64().unwrap_or(0) == 0 {
            return Some(format!("{}: the load client sent nothing", mode.name()));
        }
        (mode == Mode::Ebpf && told["failed"] != 0).then(|| format!("ebpf: requests failed: {told}"))
    }
}

/// Whether the kernel or the host lacks what a mode needs.
fn is_missing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(DataplaneError::Missing { .. }))
}

/// Updates all backends `rounds` times on `mode`, and returns what the load saw. The calling thread is lost.
fn update(mode: Mode, rounds: usize, rate: u32) -> Result<Value> {
    let place = Place::new(mode)?;
    let mut driver = Driver::open(&place.config).context("opening the data plane")?;
    let mut servers = Servers::new(&place.server)?;
    let mut table: Vec<(u16, Readiness)> = (1..=BACKENDS).map(|number| (number, Readiness::Ready)).collect();
    for (number, _) in &table {
        servers.start(*number)?;
    }
    driver.handle(services());
    driver.handle([Proto::Tcp, Proto::Udp].map(|proto| slice(proto, &table)));
    driver.handle(synced());
    driver.step().context("the first round")?;
    let load = place.start_load(rate)?;
    let slower = (RATE / rate).clamp(1, SLOWER_MAX);
    let mut next = BACKENDS + 1;
    for round in 0..rounds {
        for at in 0..BACKENDS {
            let bar = spinner(format!(
                "{}: update {} of {rounds}, backend {} of {BACKENDS}",
                mode.name(),
                round + 1,
                at + 1
            ));
            servers.start(next)?;
            table.push((next, Readiness::Ready));
            let old = table[0].0;
            table[0].1 = Readiness::Terminating;
            apply(&mut driver, &table)?;
            servers.drain(old);
            std::thread::sleep(DRAIN * slower);
            servers.wait_idle(old, GRACE);
            table.remove(0);
            apply(&mut driver, &table)?;
            std::thread::sleep(LINGER * slower);
            servers.stop(old);
            next += 1;
            bar.finish_and_clear();
        }
    }
    end_load(load)
}

fn apply(driver: &mut Driver, table: &[(u16, Readiness)]) -> Result<()> {
    driver.handle([Proto::Tcp, Proto::Udp].map(|proto| slice(proto, table)));
    driver.step().context("a change of endpoints")
}

fn name(proto: Proto) -> String {
    format!("default/roll-{}", proto.name().to_lowercase())
}

fn services() -> [Event; 2] {
    [Proto::Tcp, Proto::Udp].map(|proto| {
        Event::Service(Service {
            key: name(proto).into(),
            cluster_ips: [IpAddr::from(CLUSTER_IP)].into(),
            ports: [ServicePort { name: "".into(), port: 80, node_port: 0, proto }].into(),
            ..Service::default()
        })
    })
}

fn slice(proto: Proto, table: &[(u16, Readiness)]) -> Event {
    let endpoint = |(number, readiness): &(u16, Readiness)| Endpoint {
        addr: server::address(*number).into(),
        on_this_node: false,
        readiness: *readiness,
        hint: Hint::None,
    };
    Event::Slice(Slice {
        key: format!("{}-slice", name(proto)).into(),
        service: name(proto).into(),
        ports: [SlicePort { name: "".into(), port: PORT, proto }].into(),
        endpoints: table.iter().map(endpoint).collect(),
        weight: 1,
        problems: Box::default(),
    })
}

fn synced() -> [Event; 2] {
    let keys = |suffix: &str| -> BTreeSet<_> {
        [Proto::Tcp, Proto::Udp].iter().map(|proto| format!("{}{suffix}", name(*proto)).into()).collect()
    };
    [Event::ServicesSynced(keys("")), Event::SlicesSynced(keys("-slice"))]
}

/// A node between a pod that asks and a namespace that holds all backends.
struct Place {
    config: DataplaneConfig,
    cgroup: Cgroup,
    pod: NetNs,
    server: NetNs,
    dir: PathBuf,
}

impl Place {
    /// Moves the calling thread into a new namespace for good: that is the node.
    fn new(mode: Mode) -> Result<Self> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .context("making a network namespace (needs root)")?;
        let node = NetNs::open("/proc/thread-self/ns/net")?;
        node.ip(&["link", "set", "lo", "up"]);
        let (pod, server) = (NetNs::new(), NetNs::new());
        for (link, netns, here, there) in
            [("pod0", &pod, "10.244.0.1", "10.244.0.2"), ("up0", &server, "192.0.2.1", "192.0.2.2")]
        {
            node.veth(link, netns, "eth0");
            node.ip(&["address", "add", &format!("{here}/24"), "dev", link]);
            netns.ip(&["address", "add", &format!("{there}/24"), "dev", "eth0"]);
            netns.ip(&["route", "add", "default", "via", here]);
        }
        node.ip(&["route", "add", "10.20.0.0/16", "via", "192.0.2.2"]);
        server.ip(&["route", "add", "local", "10.20.0.0/16", "dev", "lo"]);
        node.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")).context("forwarding")?;
        let cgroup = Cgroup::new("rolling");
        let dir = std::env::temp_dir().join(sheave_harness::unique("sheave-rolling"));
        let config = DataplaneConfig {
            mode: Some(mode),
            pin_dir: dir.join("bpf"),
            cgroup_path: Some(cgroup.path().to_owned()),
            uplinks: vec!["up0".to_owned()],
            pod_links: vec!["pod".to_owned()],
            node_name: "node-1".to_owned(),
            node_ips: vec![IpAddr::from(Ipv4Addr::new(192, 0, 2, 1))],
            pod_cidrs: vec!["10.244.0.0/16".parse()?],
            ..DataplaneConfig::default()
        };
        Ok(Self { config, cgroup, pod, server, dir })
    }

    fn start_load(&self, rate: u32) -> Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([
            "rolling-client",
            "--target",
            &format!("{CLUSTER_IP}:80"),
            "--rate",
            &rate.to_string(),
        ]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        self.pod.apply(&mut command);
        self.cgroup.apply(&mut command);
        // Not a part of this process' group: Ctrl-C ends the soak, which then ends the load.
        command.process_group(0);
        command.spawn().context("starting the load")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(mode) = self.config.mode {
            remove(mode, &self.config)
                .iter()
                .for_each(|error| eprintln!("taking the data plane off: {error}"));
        }
        if self.dir.exists()
            && let Err(error) = std::fs::remove_dir_all(&self.dir)
        {
            eprintln!("{}: {error}", self.dir.display());
        }
    }
}

/// Closing its input ends the load, which then says how it went.
fn end_load(mut load: Child) -> Result<Value> {
    drop(load.stdin.take());
    let output = load.wait_with_output()?;
    ensure!(output.status.success(), "the load: {}", output.status);
    serde_json::from_slice(&output.stdout).context("the load's verdict")
}
