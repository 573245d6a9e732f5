//! `soak kill-services`: SIGKILL for an agent that balances services, at random moments while endpoints churn. What is
//! checked: no established connection breaks, no connection reaches another service's backend, the ids of services
//! stay, and at the end the kernel's maps hold what the API says.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use rand::Rng;
use serde_json::{Value, json};
use sheave_agent::dataplane::{self, ServiceRow};
use sheave_harness::Node;

use crate::control_process;
use crate::progress::spinner;

/// Services; each has backends of its own.
const SERVICES: u8 = 30;
/// Backends that a service has at most.
const BACKENDS: u8 = 8;
const PORT: u16 = 8080;
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest time without an answer on an established connection.
const ANSWER: Duration = Duration::from_secs(10);

pub(crate) fn run(rounds: usize) -> Result<()> {
    let node = Node::prepare(&std::env::current_dir()?, crate::sheave()?, &[]);
    let dir = node.dir().join("control");
    std::fs::create_dir_all(&dir)?;
    node.netns.ip(&["route", "add", "local", "10.20.0.0/16", "dev", "lo"]);
    node.netns.run(serve)?;
    let mut control =
        Killed::start(node.command(crate::sheave()?).args(["control", "--state-dir"]).arg(&dir), "control")?;
    let kubeconfig = dir.join("admin.kubeconfig");
    wait("the control plane", || {
        inside(&node, &kubeconfig, async |client| Ok(client.apiserver_version().await?))
    })?;
    inside(&node, &kubeconfig, create)?;
    let mut agent = Killed::start(&mut agent(&node, &dir)?, "agent")?;
    let ids = wait("the first table", || complete(&node))?;
    // The programs are attached only when the table is filled, and verifying them takes longer than a round.
    let links = dataplane::ebpf::versioned(node.pin_dir()).join("links");
    wait("the programs to be attached", || {
        let attached = ["shv_connect4", "shv_connect6"].iter().all(|hook| links.join(hook).exists());
        if attached { Ok(()) } else { bail!("no link in {}", links.display()) }
    })?;
    let load = start_load(&node, &kubeconfig)?;
    let mut changes = 0;
    for round in 0..rounds {
        let bar = spinner(format!("kill -9 of the agent, {} of {rounds}", round + 1));
        changes += inside(&node, &kubeconfig, churn).with_context(|| format!("round {}", round + 1))?;
        agent.kill9()?;
        changes += inside(&node, &kubeconfig, churn).with_context(|| format!("round {}", round + 1))?;
        agent = Killed::start(&mut self::agent(&node, &dir)?, "agent")?;
        control.alive()?;
        bar.finish_and_clear();
    }
    let wanted = inside(&node, &kubeconfig, desired)?;
    wait("the maps to be what the API says", || same(&node, &wanted))?;
    let after = complete(&node)?;
    let told = end_load(load)?;
    println!("kill-services: {rounds} kills, {changes} changes of endpoints, {told}");
    ensure!(after == ids, "ids changed: {ids:?} became {after:?}");
    for wrong in ["broken", "wrong_backend", "refused"] {
        ensure!(told[wrong] == 0, "{wrong}: {told}");
    }
    ensure!(
        told["connections"].as_u64().unwrap_or(0) > 0 && told["answers"].as_u64().unwrap_or(0) > 0,
        "{told}"
    );
    drop((agent, control));
    Ok(())
}

/// A program that is killed when this is dropped.
struct Killed {
    child: Child,
    what: &'static str,
}

impl Killed {
    fn start(command: &mut Command, what: &'static str) -> Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Ok(Self { child: child.with_context(|| format!("starting the {what}"))?, what })
    }

    fn kill9(&mut self) -> Result<()> {
        self.alive()?;
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("the {} ended by itself: {status}", self.what),
            None => Ok(()),
        }
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn agent(node: &Node, control: &Path) -> Result<Command> {
    let mut command = node.command(crate::sheave()?);
    command.args([
        "agent",
        "--components",
        "services",
        "--node-name",
        "node-1",
        "--data-plane",
        "ebpf",
        "--kubeconfig",
    ]);
    command.arg(control.join("admin.kubeconfig")).args(node.path_flags());
    Ok(command)
}

fn inside<T: Send>(
    node: &Node,
    kubeconfig: &Path,
    work: impl AsyncFnOnce(Client) -> Result<T> + Send,
) -> Result<T> {
    node.netns.run(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        runtime.block_on(async { work(control_process::client(kubeconfig).await?).await })
    })
}

fn wait<T>(what: &str, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("waiting for {what}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn name(service: u8) -> String {
    format!("steady-{service}")
}

/// Backends tell by their address whose they are.
fn backend(service: u8, number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 20, service, number)
}

/// Every backend of every service, alive all the time: each line is answered with the server's address.
fn serve() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer(stream));
        }
    });
    Ok(())
}

fn answer(stream: TcpStream) {
    let (Ok(here), Ok(mut writer)) = (stream.local_addr(), stream.try_clone()) else { return };
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while matches!(lines.read_line(&mut line), Ok(len) if len > 0) {
        if writer.write_all(format!("{}\n", here.ip()).as_bytes()).is_err() {
            return;
        }
        line.clear();
    }
}

async fn create(client: Client) -> Result<()> {
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(client, "default");
    for number in 0..SERVICES {
        let name = name(number);
        let object =
            json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80, "targetPort": PORT}]}});
        services.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
        let object = json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}}, "addressType": "IPv4",
            "endpoints": endpoints(number, &[1, 2, 3]), "ports": [{"port": PORT, "protocol": "TCP"}]
        });
        slices.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
    }
    Ok(())
}

fn endpoints(service: u8, numbers: &[u8]) -> Value {
    numbers
        .iter()
        .map(|n| json!({"addresses": [backend(service, *n).to_string()], "conditions": {"ready": true}}))
        .collect()
}

/// Gives some services other endpoints, with pauses in which the agent may be anywhere.
async fn churn(client: Client) -> Result<usize> {
    let slices: Api<EndpointSlice> = Api::namespaced(client, "default");
    let count = rand::rng().random_range(1..8);
    for _ in 0..count {
        let (service, numbers, pause_ms) = {
            let mut random = rand::rng();
            let wanted = random.random_range(1..=BACKENDS);
            let numbers: Vec<u8> =
                (1..=BACKENDS).filter(|_| random.random_range(0..BACKENDS) < wanted).collect();
            (random.random_range(0..SERVICES), numbers, random.random_range(0..60))
        };
        // A service without endpoints refuses, which is right but can't be told from a fault by the load.
        let numbers = if numbers.is_empty() { vec![1] } else { numbers };
        let patch = json!({"endpoints": endpoints(service, &numbers)});
        slices.patch(&name(service), &PatchParams::default(), &Patch::Merge(patch)).await?;
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
    }
    Ok(count)
}

/// ClusterIP → ready backends, as the API has them.
async fn desired(client: Client) -> Result<BTreeMap<IpAddr, BTreeSet<IpAddr>>> {
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(client, "default");
    let mut wanted = BTreeMap::new();
    for number in 0..SERVICES {
        let service = services.get(&name(number)).await?;
        let ip = service.spec.and_then(|spec| spec.cluster_ip).context("a service without ClusterIP")?;
        let slice = slices.get(&name(number)).await?;
        let addresses = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
        wanted.insert(ip.parse()?, addresses.map(|text| text.parse()).collect::<Result<_, _>>()?);
    }
    Ok(wanted)
}

/// The frontends of our services.
fn rows(node: &Node) -> Result<Vec<ServiceRow>> {
    let rows = dataplane::list(node.pin_dir())?;
    let ours = |row: &ServiceRow| row.port == 80 && row.kind == "ClusterIP";
    Ok(rows.into_iter().filter(ours).collect())
}

/// Ids by frontend, when all services are in the maps.
fn complete(node: &Node) -> Result<BTreeMap<IpAddr, u32>> {
    let rows = rows(node)?;
    ensure!(rows.len() == usize::from(SERVICES), "{} of {SERVICES} frontends", rows.len());
    ensure!(rows.iter().all(|row| !row.ready.is_empty() && !row.inconsistent), "a frontend without backends");
    Ok(rows.iter().map(|row| (row.address, row.service_id)).collect())
}

fn same(node: &Node, wanted: &BTreeMap<IpAddr, BTreeSet<IpAddr>>) -> Result<()> {
    let found: BTreeMap<IpAddr, BTreeSet<IpAddr>> =
        rows(node)?.iter().map(|row| (row.address, row.ready.iter().map(|(ip, _)| *ip).collect())).collect();
    ensure!(found == *wanted, "the maps hold {found:?}, the API says {wanted:?}");
    Ok(())
}

fn start_load(node: &Node, kubeconfig: &Path) -> Result<Child> {
    let services = inside(node, kubeconfig, desired)?;
    let mut command = node.command(std::env::current_exe()?);
    command.arg("steady-client");
    for (ip, backends) in services {
        let Some(IpAddr::V4(first)) = backends.first() else { bail!("{ip} has no backend") };
        command.arg("--service").arg(format!("{ip}={}", first.octets()[2]));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("starting the load")
}

/// Closing its input ends the load, which then says how it went.
fn end_load(mut load: Child) -> Result<Value> {
    drop(load.stdin.take());
    let output = load.wait_with_output()?;
    serde_json::from_slice(&output.stdout).context("the load's verdict")
}

/// One connection a service that stays, and new ones all the time, until standard input is closed.
#[derive(Debug, Args)]
pub(crate) struct SteadyClient {
    /// ClusterIP and the third byte of its backends' addresses
    #[arg(long, value_name = "IP=NUMBER")]
    service: Vec<String>,
}

#[derive(Default)]
struct Counts {
    answers: AtomicU64,
    connections: AtomicU64,
    broken: AtomicU64,
    refused: AtomicU64,
    wrong_backend: AtomicU64,
}

impl Counts {
    /// Counts a connection that did not come about; the first few are told.
    fn refuse(&self, to: SocketAddr, error: &anyhow::Error) {
        if self.refused.fetch_add(1, Ordering::Relaxed) < 3 {
            eprintln!("{to}: {error:#}");
        }
    }
}

impl SteadyClient {
    pub(crate) fn run(&self) -> Result<()> {
        let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::new(Counts::default()));
        let mut threads = Vec::new();
        for text in &self.service {
            let (ip, owner) = text.split_once('=').with_context(|| format!("--service {text}: IP=NUMBER"))?;
            let (to, owner): (SocketAddr, u8) = (SocketAddr::new(ip.parse()?, 80), owner.parse()?);
            for work in [stay, come_and_go] {
                let (stop, counts) = (stop.clone(), counts.clone());
                threads.push(std::thread::spawn(move || work(to, owner, &stop, &counts)));
            }
        }
        let mut end = Vec::new();
        std::io::stdin().read_to_end(&mut end)?;
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            if thread.join().is_err() {
                bail!("a load thread panicked");
            }
        }
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let told = json!({
            "answers": read(&counts.answers), "connections": read(&counts.connections), "broken": read(&counts.broken),
            "refused": read(&counts.refused), "wrong_backend": read(&counts.wrong_backend)
        });
        println!("{told}");
        Ok(())
    }
}

fn connect(to: SocketAddr) -> Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect_timeout(&to, ANSWER)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER))?;
    Ok(BufReader::new(stream))
}

fn asks(stream: &mut BufReader<TcpStream>) -> Result<Ipv4Addr> {
    stream.get_mut().write_all(b"who\n")?;
    let mut line = String::new();
    stream.read_line(&mut line)?;
    line.trim().parse().with_context(|| format!("answered {line:?}"))
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

/// The same backend must go on answering.
fn stay(to: SocketAddr, owner: u8, stop: &AtomicBool, counts: &Counts) {
    let mut stream = match connect(to) {
        Ok(stream) => stream,
        Err(error) => return counts.refuse(to, &error),
    };
    let mut first = None;
    while !stop.load(Ordering::Relaxed) {
        match asks(&mut stream) {
            Ok(server) if server.octets()[2] == owner && *first.get_or_insert(server) == server => {
                add(&counts.answers)
            }
            Ok(_) => add(&counts.wrong_backend),
            Err(_) => return add(&counts.broken),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Every new connection must reach one of the service's own backends.
fn come_and_go(to: SocketAddr, owner: u8, stop: &AtomicBool, counts: &Counts) {
    while !stop.load(Ordering::Relaxed) {
        match connect(to).and_then(|mut stream| asks(&mut stream)) {
            Ok(server) if server.octets()[2] == owner => add(&counts.connections),
            Ok(_) => add(&counts.wrong_backend),
            Err(error) => counts.refuse(to, &error),
        }
        std::thread::sleep(Duration::from_millis(40));
    }
}
