//! `bench policy`: what a packet costs at a pod's link with few and with many network policies that isolate the pod
//! (BPF_PROG_TEST_RUN, both worlds by turns), and how long a change of one of them takes to be in the kernel.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::programs::tc::TcAttachType;
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use serde_json::json;
use sheave_agent::dataplane::ebpf::{Guard, GuardConfig};
use sheave_agent::dataplane::uninstall;
use sheave_agent::policy::{
    Device, Event, Namespace, Op, Peer, Planner, Pod, Policy, Port, Requirement, Rule, Selector, Which,
};
use sheave_harness::{NetNs, unique};

use crate::latency::Latencies;
use crate::packet_frame::Frame;
use crate::progress::spinner;
use crate::report::{Bar, Report};

const SIZES: [u32; 2] = [10, 10_000];
const RUNS: u32 = 20_000;
const CHANGES: u32 = 20;
/// Nodes of each size. Where the kernel puts a node's tables shifts the figures by as much as is asked about here.
const WORLDS: u32 = 3;
const LINK: &str = "tp0";
/// The pod that all policies isolate.
const POD: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 2);
/// Pods of other nodes, each with a label of its own.
const PEERS: u32 = 1_000;
const TCP: u8 = 6;

pub(crate) fn run(json: bool) -> Result<()> {
    let mut report = Report::new("policy", json);
    let bar = spinner("few and many policies");
    let mut worlds = Vec::new();
    for _ in 0..WORLDS {
        for size in SIZES {
            worlds.push(World::new(size)?);
        }
    }
    for (kind, held) in [("flow", true), ("new_flow", true), ("refused", true)] {
        costs(&mut report, &mut worlds, kind, held)?;
    }
    for world in worlds.iter_mut().take(SIZES.len()) {
        changes(&mut report, world)?;
    }
    bar.finish_and_clear();
    report.finish();
    Ok(())
}

/// A node with one pod's link, and policies.
struct World {
    size: u32,
    node: NetNs,
    _pod: NetNs,
    pin_dir: std::path::PathBuf,
    guard: Guard,
    planner: Planner,
    program: SchedClassifier,
    /// `struct __sk_buff`, with the link's index.
    context: [u8; 192],
}

fn peer_ip(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 8, 0, 0)) + n % PEERS)
}

fn selector(key: &str, value: String) -> Selector {
    Selector([Requirement { key: key.into(), op: Op::In, values: [value.into()].into() }].into())
}

/// A policy for the pod, none like another: pods by label, ranges with an exception, and ports.
fn policy(n: u32, port: u16) -> Policy {
    let peer = if n.is_multiple_of(2) {
        Peer::Pods { pods: Some(selector("peer", (n % PEERS).to_string())), namespaces: None }
    } else {
        let base = u32::from(Ipv4Addr::new(172, 16, 0, 0)) + n * 16;
        let range = |at: u32, bits| ipnetwork::IpNetwork::new(IpAddr::V4(Ipv4Addr::from(at)), bits).ok();
        match (range(base, 28), range(base + 4, 30)) {
            (Some(cidr), Some(except)) => Peer::Block { cidr, except: [except].into() },
            _ => Peer::Pods { pods: None, namespaces: None },
        }
    };
    let port = Port { proto: TCP, which: Which::Range(port, port + (n % 7) as u16) };
    let rules = [Rule { peers: [peer].into(), ports: [port].into() }];
    Policy {
        namespace: "bench".into(),
        name: format!("p{n}").into(),
        selector: selector("app", "measured".to_owned()),
        ingress: Some(rules.clone().into()),
        egress: Some(rules.into()),
    }
}

impl World {
    fn new(size: u32) -> Result<Self> {
        let (node, pod) = (NetNs::new(), NetNs::new());
        node.veth(LINK, &pod, "eth0");
        let pin_dir = std::path::Path::new("/sys/fs/bpf").join(unique("sheave-bench"));
        let index = node.run(|| nix::net::if_::if_nametoindex(LINK))?;
        let config = GuardConfig { pin_dir: pin_dir.clone(), fast: true };
        let (guard, planner) = node.run(|| -> Result<(Guard, Planner)> {
            let mut guard = Guard::open(&config).context("opening the network object")?;
            let mut planner = Planner::new(guard.ids());
            fill(&mut planner, size, index);
            guard.apply(&planner.plan()).context("writing the tables")?;
            guard.attach(&[LINK.to_owned()], &[], true).context("attaching")?;
            Ok((guard, planner))
        })?;
        let (_, programs) = node
            .run(|| SchedClassifier::query_tcx(LINK, TcAttachType::Ingress))
            .context("looking at the link's programs (tcx needs kernel 6.6)")?;
        let program = programs.into_iter().next().context("no program at the link")?;
        let program = SchedClassifier::from_program_info(program, "shv_net_from_pod".into())?;
        let mut context = [0; 192];
        // Its field `ifindex` (uapi/linux/bpf.h).
        context[40..44].copy_from_slice(&index.to_ne_bytes());
        Ok(Self { size, node, _pod: pod, pin_dir, guard, planner, program, context })
    }

    /// What the kernel says that a packet took, and the program's verdict.
    fn once(&mut self, frame: &[u8]) -> Result<(Duration, u32)> {
        let mut output = [0; 256];
        let _inside = self.node.enter();
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut output);
        options.ctx_in = Some(&self.context);
        let result = self.program.test_run(options)?;
        Ok((result.duration, result.return_value))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Err(errors) = uninstall(&self.pin_dir) {
            eprintln!("{}: {errors:?}", self.pin_dir.display());
        }
    }
}

fn fill(planner: &mut Planner, size: u32, index: u32) {
    let namespace = Namespace { name: "bench".into(), labels: Default::default() };
    let pod = |name: String, ip: Ipv4Addr, label: (&str, String), local| Pod {
        namespace: "bench".into(),
        uid: name.as_str().into(),
        name: name.into(),
        labels: [label].into_iter().collect(),
        ips: [IpAddr::V4(ip)].into(),
        ports: Box::default(),
        local,
    };
    let mut pods = vec![pod("measured".to_owned(), POD, ("app", "measured".to_owned()), true)];
    pods.extend((0..PEERS).map(|n| pod(format!("peer{n}"), peer_ip(n), ("peer", n.to_string()), false)));
    let policies: Vec<Policy> = (0..size).map(|n| policy(n, 80)).collect();
    planner.handle(Event::NamespacesSynced([namespace.name.clone()].into()));
    planner.handle(Event::Namespace(namespace));
    let keys = pods.iter().map(Pod::key).collect();
    pods.into_iter().for_each(|pod| planner.handle(Event::Pod(pod)));
    planner.handle(Event::PodsSynced(keys));
    let keys = policies.iter().map(Policy::key).collect();
    policies.into_iter().for_each(|policy| planner.handle(Event::Policy(policy)));
    planner.handle(Event::PoliciesSynced(keys));
    let device = Device { index, peer: true, queued: false, pod: None };
    planner.handle(Event::Devices([(IpAddr::V4(POD), device)].into()));
}

fn frame(kind: &str, round: u32) -> Vec<u8> {
    // A peer that the few policies name too.
    let peer = peer_ip(round % 4 * 2);
    match kind {
        "flow" => Frame::tcp_ack((POD, 50_000 + (round % 100) as u16), (peer, 80)).bytes(),
        "new_flow" => Frame::tcp_syn((POD, 1024 + (round % 60_000) as u16), (peer, 80)).bytes(),
        _ => Frame::tcp_syn((POD, 1024 + (round % 60_000) as u16), (peer, 7)).bytes(),
    }
}

/// TC_ACT_SHOT (linux/pkt_cls.h).
const SHOT: u32 = 2;

fn costs(report: &mut Report, worlds: &mut [World], kind: &str, held: bool) -> Result<()> {
    let mut all = [Latencies::new(), Latencies::new()];
    for round in 0..RUNS + RUNS / 10 {
        for turn in 0..worlds.len() {
            // Each goes first as often as the others.
            let at = (round as usize + turn) % worlds.len();
            let which = at % SIZES.len();
            let (took, verdict) = worlds[at].once(&frame(kind, round))?;
            ensure!((verdict == SHOT) == (kind == "refused"), "{kind}: verdict {verdict}");
            if round >= RUNS / 10 {
                all[which].record(took);
            }
        }
    }
    for (size, all) in SIZES.iter().zip(&all) {
        let runs = json!(RUNS * WORLDS);
        let params = [("policies", json!(size)), ("packet", json!(kind)), ("runs", runs)];
        report.add("from_pod_p50", all.us(0.5) * 1000.0, "ns", Bar::None, &params);
    }
    let params = [("packet", json!(kind)), ("policies", json!(SIZES))];
    let bar = if held { Bar::AtMost(1.1) } else { Bar::None };
    report.add("many_to_few", all[1].us(0.5) / all[0].us(0.5), "x", bar, &params);
    Ok(())
}

/// From the event to the kernel, epoch included.
fn changes(report: &mut Report, world: &mut World) -> Result<()> {
    let mut all = Latencies::new();
    for round in 0..CHANGES {
        let start = Instant::now();
        // A port that no other policy allows: what others allow anyhow is no change.
        world.planner.handle(Event::Policy(policy(round % world.size, 1_000 + 10 * round as u16)));
        let tables = world.planner.plan();
        ensure!(world.guard.apply(&tables).context("changing a policy")?, "a change changes something");
        all.record(start.elapsed());
    }
    let params = [("policies", json!(world.size)), ("changes", json!(CHANGES))];
    report.add("change_p50", all.us(0.5) / 1000.0, "ms", Bar::AtMost(50.0), &params);
    report.add("change_max", all.us(1.0) / 1000.0, "ms", Bar::None, &params);
    Ok(())
}
