//! `bench cni`: what a runtime waits for, from the start of the plugin to its end, beside Debian's ptp with host-local in
//! the same run; attachments a second; and the agent's memory with a node full of them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sheave_harness::network::{execute, fresh};
use sheave_harness::{NetNs, NetworkNode, unique};

use crate::latency::Latencies;
use crate::progress::spinner;
use crate::report::{Bar, Report};

const REFERENCE: &str = "/usr/lib/cni/ptp";
const BLOCKS: usize = 12;
/// Attachments of one subject in one block: subjects take turns, so that whatever else the machine does meets all.
const BLOCK: usize = 15;
const IN_FLIGHT: usize = 8;
const AT_ONCE: usize = 600;
const PODS: usize = 110;
const PEERS: usize = 100;

pub(crate) fn run(json: bool) -> Result<()> {
    let mut report = Report::new("cni", json);
    let plugin = plugin()?;
    let size = plugin.metadata().with_context(|| format!("looking at {}", plugin.display()))?.len();
    report.add("plugin_size", size as f64 / 1e6, "MB", Bar::AtMost(1.0), &[]);
    latencies(&mut report, &plugin)?;
    memory(&mut report, &plugin)?;
    report.finish();
    Ok(())
}

/// The plugin beside the program under test.
pub(crate) fn plugin() -> Result<PathBuf> {
    let path = crate::sheave()?.with_file_name("sheave-cni");
    ensure!(path.exists(), "{} is missing: cargo xtask build", path.display());
    Ok(path)
}

/// Whose plugin, on which node, with which configuration.
struct Subject<'a> {
    name: &'static str,
    net: &'a NetworkNode,
    program: &'a Path,
    config: Value,
    add: Latencies,
    del: Latencies,
}

impl Subject<'_> {
    fn call(&self, verb: &str, id: &str, netns: &Path) -> Result<Duration> {
        let mut command = Command::new(self.program);
        command.env_clear().env("CNI_COMMAND", verb).env("CNI_CONTAINERID", id).env("CNI_IFNAME", "eth0");
        command
            .env("CNI_NETNS", netns)
            .env("CNI_PATH", "/usr/lib/cni")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let start = Instant::now();
        let output = execute(command, self.config.to_string().as_bytes());
        let took = start.elapsed();
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "{} {verb}: {said}", self.name);
        Ok(took)
    }

    fn block(&mut self) -> Result<()> {
        let _inside = self.net.node.netns.enter();
        let containers: Vec<(String, NetNs)> = (0..BLOCK).map(|_| (unique("bench"), fresh())).collect();
        for (id, netns) in &containers {
            let took = self.call("ADD", id, &netns.path())?;
            self.add.record(took);
        }
        for (id, netns) in &containers {
            let took = self.call("DEL", id, &netns.path())?;
            self.del.record(took);
        }
        Ok(())
    }

    /// Attachments a second with several at a time; they are taken away after the clock has stopped.
    fn per_second(&self, count: usize) -> Result<f64> {
        let containers: Vec<(String, NetNs)> = (0..count).map(|_| (unique("bench"), fresh())).collect();
        let each = |verb: &str| -> Result<f64> {
            let start = Instant::now();
            std::thread::scope(|scope| {
                let threads: Vec<_> = containers
                    .chunks(count.div_ceil(IN_FLIGHT))
                    .map(|chunk| {
                        scope.spawn(|| {
                            let _inside = self.net.node.netns.enter();
                            chunk.iter().try_for_each(|(id, ns)| self.call(verb, id, &ns.path()).map(drop))
                        })
                    })
                    .collect();
                threads.into_iter().try_for_each(|thread| thread.join().expect("a worker"))
            })?;
            Ok(count as f64 / start.elapsed().as_secs_f64())
        };
        let rate = each("ADD")?;
        each("DEL")?;
        Ok(rate)
    }
}

fn started(plugin: &Path, flags: &[&str]) -> Result<NetworkNode> {
    let net = NetworkNode::prepare(crate::sheave()?, flags);
    net.launch();
    net.wait_serving(plugin);
    Ok(net)
}

fn latencies(report: &mut Report, plugin: &Path) -> Result<()> {
    let bar = spinner("ADD and DEL, ours and the reference's");
    let one = started(plugin, &["--pod-cidr", "10.244.0.0/20"])?;
    let two = started(plugin, &["--pod-cidr", "10.244.0.0/20,fd00:244::/64"])?;
    let theirs = NetworkNode::prepare(crate::sheave()?, &[]);
    let reference = json!({"cniVersion": "1.0.0", "name": "bench", "type": "ptp",
        "ipam": {"type": "host-local", "dataDir": theirs.node.dir().join("ipam"),
                 "ranges": [[{"subnet": "10.99.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}});
    let subject = |name, net, program, config| Subject {
        name,
        net,
        program,
        config,
        add: Latencies::new(),
        del: Latencies::new(),
    };
    let mut subjects = vec![
        subject("ours", &one, plugin, one.config("bench")),
        subject("ours-dual-stack", &two, plugin, two.config("bench")),
    ];
    if Path::new(REFERENCE).exists() {
        subjects.push(subject("reference", &theirs, Path::new(REFERENCE), reference));
    }
    for block in 0..BLOCKS {
        bar.set_message(format!("ADD and DEL, block {} of {BLOCKS}", block + 1));
        // Each once is first.
        subjects.rotate_left(1);
        subjects.iter_mut().try_for_each(Subject::block)?;
    }
    bar.set_message("ADD, many at once");
    let by_name = |name: &str| subjects.iter().find(|subject| subject.name == name);
    let (ours, dual) = (by_name("ours").context("ours")?, by_name("ours-dual-stack").context("ours")?);
    let mut tell = |subject: &Subject, held: bool| {
        let params = [("plugin", json!(subject.name)), ("samples", json!(subject.add.len()))];
        let bar = if held { Bar::AtMost(3.0) } else { Bar::None };
        report.add("add_p50", subject.add.ms(0.5), "ms", bar, &params);
        report.add("add_p99", subject.add.ms(0.99), "ms", Bar::None, &params);
        report.add("del_p50", subject.del.ms(0.5), "ms", Bar::None, &params);
        report.add("del_p99", subject.del.ms(0.99), "ms", Bar::None, &params);
    };
    tell(ours, true);
    tell(dual, false);
    let reference = by_name("reference");
    reference.into_iter().for_each(|subject| tell(subject, false));
    let ratio = |a: &Latencies, b: &Latencies| a.us(0.5) / b.us(0.5);
    if let Some(reference) = reference {
        report.add("add_to_reference", ratio(&ours.add, &reference.add), "x", Bar::AtMost(0.25), &[]);
        report.add("del_to_reference", ratio(&ours.del, &reference.del), "x", Bar::AtMost(0.25), &[]);
    }
    report.add("add_dual_to_single", ratio(&dual.add, &ours.add), "x", Bar::AtMost(1.2), &[]);
    let params = [("plugin", json!("ours-dual-stack")), ("in_flight", json!(IN_FLIGHT))];
    report.add("adds_per_second", dual.per_second(AT_ONCE)?, "1/s", Bar::AtLeast(400.0), &params);
    if let Some(reference) = reference {
        let params = [("plugin", json!("reference")), ("in_flight", json!(IN_FLIGHT))];
        report.add("adds_per_second", reference.per_second(AT_ONCE / 4)?, "1/s", Bar::None, &params);
    }
    status(report, &two, plugin)?;
    bar.finish_and_clear();
    Ok(())
}

/// What the kubelet asks for every five seconds.
fn status(report: &mut Report, net: &NetworkNode, plugin: &Path) -> Result<()> {
    let mut config = net.config("bench");
    config["cniVersion"] = json!("1.1.0");
    let _inside = net.node.netns.enter();
    let mut took = Latencies::new();
    for _ in 0..100 {
        let mut command = Command::new(plugin);
        command.env_clear().env("CNI_COMMAND", "STATUS");
        let start = Instant::now();
        let output = execute(command, config.to_string().as_bytes());
        took.record(start.elapsed());
        ensure!(output.status.success(), "STATUS: {}", String::from_utf8_lossy(&output.stdout));
    }
    report.add("status_p50", took.ms(0.5), "ms", Bar::AtMost(10.0), &[]);
    Ok(())
}

/// Resident memory of the agent with a full node among many.
fn memory(report: &mut Report, plugin: &Path) -> Result<()> {
    let bar = spinner(format!("{PODS} attachments, {PEERS} peers"));
    let dir = tempfile::tempdir().context("making a directory")?;
    let nodes: Vec<Value> = (0..PEERS)
        .map(|n| {
            json!({"name": format!("peer-{n}"),
                "node-ips": [format!("192.0.2.{}", 100 + n), format!("2001:db8::1:{n:x}")],
                "pod-cidrs": [format!("10.245.{n}.0/24"), format!("fd00:245:0:{n:x}::/64")]})
        })
        .collect();
    let file = dir.path().join("peers.json");
    std::fs::write(&file, json!({"node": nodes}).to_string()).context("writing the peers")?;
    let file = file.display().to_string();
    let net = started(
        plugin,
        &["--pod-cidr", "10.244.0.0/24,fd00:244::/64", "--overlay", "vxlan", "--peers", &file],
    )?;
    let params = [("attachments", json!(PODS)), ("peers", json!(PEERS))];
    report.add("agent_rss_idle", net.rss_kb() as f64 / 1000.0, "MB", Bar::None, &[("peers", json!(PEERS))]);
    let subject = Subject {
        name: "ours",
        net: &net,
        program: plugin,
        config: net.config("bench"),
        add: Latencies::new(),
        del: Latencies::new(),
    };
    let containers: Vec<(String, NetNs)> = (0..PODS).map(|_| (unique("bench"), fresh())).collect();
    {
        let _inside = net.node.netns.enter();
        containers.iter().try_for_each(|(id, netns)| subject.call("ADD", id, &netns.path()).map(drop))?;
    }
    // Idle means: nothing has been asked of it for a while.
    std::thread::sleep(Duration::from_secs(5));
    report.add("agent_rss", net.rss_kb() as f64 / 1000.0, "MB", Bar::AtMost(25.0), &params);
    bar.finish_and_clear();
    Ok(())
}
