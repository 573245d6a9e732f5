//! `bench packet`: what a packet costs that arrives for a NodePort. The program at the uplink alone
//! (BPF_PROG_TEST_RUN) with few and with many services, the first packets of connections over tcx beside those that
//! use no service, and how many packets a second one core forwards to a backend on another node.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use aya::programs::tc::TcAttachType;
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use serde_json::json;
use sheave_agent::dataplane::{DataplaneConfig, Driver, MapSizes, uninstall};
use sheave_agent::service::{
    Endpoint, Event, Hint, Proto, Readiness, Service, ServicePort, Slice, SlicePort,
};
use sheave_harness::{Cgroup, NetNs};

use crate::latency::Latencies;
use crate::load::{Run, Size};
use crate::packet_flood::{self, Forwarding};
use crate::packet_frame::{CLIENT, Frame, NODE};
use crate::progress::spinner;
use crate::report::{Bar, Report};

/// Services whose NodePorts packets are sent to; they have the same NodePorts in every world.
const NODE_PORTS: u16 = 10;
pub(crate) const FIRST_NODE_PORT: u16 = 30_000;
pub(crate) const UPLINK: &str = "up0";
/// A pod of the node.
const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 5);
const COUNTS: [u64; 2] = [10, 100_000];
const RUNS: u32 = 20_000;

pub(crate) fn run(json: bool, size: &Size) -> Result<()> {
    let mut report = Report::new("packet", json);
    let counts = size.counts(&COUNTS);
    let [few, many] = counts[..] else { bail!("--count: name two numbers of services, few and many") };
    costs(&mut report, [few, many].map(u32::try_from).into_iter().collect::<Result<Vec<_>, _>>()?)?;
    first_packets(&mut report, size.samples())?;
    forwarding(&mut report)?;
    report.finish();
    Ok(())
}

/// A node in a namespace of its own, with services in its data plane.
pub(crate) struct World {
    /// The node's namespace.
    pub(crate) node: NetNs,
    /// What is beyond the uplink.
    pub(crate) lan: NetNs,
    /// Settings of its data plane, if it has one.
    pub(crate) config: DataplaneConfig,
    _cgroup: Cgroup,
    dir: tempfile::TempDir,
}

impl World {
    /// Node and network, nothing loaded.
    pub(crate) fn new(label: &str) -> Result<Self> {
        let (node, lan, pod) = (NetNs::new(), NetNs::new(), NetNs::new());
        node.veth(UPLINK, &lan, "eth0");
        node.veth("pod0", &pod, "eth0");
        node.ip(&["addr", "add", &format!("{NODE}/24"), "dev", UPLINK]);
        node.ip(&["addr", "add", "10.244.0.1/24", "dev", "pod0"]);
        lan.ip(&["addr", "add", &format!("{CLIENT}/24"), "dev", "eth0"]);
        pod.ip(&["addr", "add", &format!("{POD}/24"), "dev", "eth0"]);
        pod.ip(&["route", "add", "default", "via", "10.244.0.1"]);
        node.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")).context("forwarding")?;
        let cgroup = Cgroup::new(label);
        let dir = tempfile::tempdir()?;
        let config = DataplaneConfig {
            pin_dir: dir.path().join("bpf"),
            cgroup_path: Some(cgroup.path().to_owned()),
            uplinks: vec![UPLINK.to_owned()],
            pod_links: vec!["pod".to_owned()],
            node_name: "bench".to_owned(),
            pod_cidrs: "10.128.0.0/9".parse().into_iter().collect(),
            ..DataplaneConfig::default()
        };
        Ok(Self { node, lan, config, _cgroup: cgroup, dir })
    }

    /// Puts services into it: the first ones with NodePorts and one endpoint, `endpoint`; the others with four each that
    /// are nobody else's.
    pub(crate) fn fill(&mut self, services: u32, endpoint: (Ipv4Addr, bool)) -> Result<Driver> {
        let least = MapSizes::default();
        self.config.sizes = MapSizes {
            frontends: least.frontends.max(services * 2),
            backends: least.backends.max(services * 5),
            slots: least.slots.max(services * 8),
            ..least
        };
        let config = &self.config;
        self.node.run(|| {
            let mut driver = Driver::open(config).context("opening the data plane")?;
            let mut keys = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
            for number in 0..services {
                let (service, slice) = service(number, endpoint);
                keys.0.insert(service.key.clone());
                keys.1.insert(slice.key.clone());
                driver.handle([Event::Service(service), Event::Slice(slice)]);
            }
            driver.handle([Event::ServicesSynced(keys.0), Event::SlicesSynced(keys.1)]);
            driver.step().context("programming")?;
            ensure!(
                driver.refused().is_empty(),
                "services are refused: {:?}",
                driver.refused().first_key_value()
            );
            Ok(driver)
        })
    }

    /// A device's index in the node's namespace.
    fn index(&self, device: &str) -> Result<u32> {
        Ok(self.node.run(|| nix::net::if_::if_nametoindex(device))?)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Err(errors) = uninstall(&self.config.pin_dir) {
            eprintln!("{}: {errors:?}", self.config.pin_dir.display());
        }
        // Nothing is left to be removed when there was no data plane.
        let mounted = self.dir.path().join("bpf");
        if mounted.exists() && nix::mount::umount(&mounted).is_ok() {
            std::fs::remove_dir(&mounted).unwrap_or_default();
        }
    }
}

fn service(number: u32, (endpoint, local): (Ipv4Addr, bool)) -> (Service, Slice) {
    let measured = number < NODE_PORTS.into();
    let key: std::sync::Arc<str> = format!("bench/svc-{number:06}").into();
    let node_port = if measured { FIRST_NODE_PORT + number as u16 } else { 0 };
    let at = |addr: Ipv4Addr, on_this_node| Endpoint {
        addr: IpAddr::V4(addr),
        on_this_node,
        readiness: Readiness::Ready,
        hint: Hint::None,
    };
    let own = |index| at(Ipv4Addr::from(u32::from_be_bytes([10, 128, 0, 0]) + number * 4 + index), true);
    let ports = [("tcp", Proto::Tcp), ("udp", Proto::Udp)];
    // The fillers have TCP only.
    let ports = if measured { &ports[..] } else { &ports[..1] };
    let service = Service {
        key: key.clone(),
        cluster_ips: [IpAddr::from(Ipv4Addr::from(u32::from_be_bytes([10, 96, 1, 0]) + number))].into(),
        ports: ports
            .iter()
            .map(|(name, proto)| ServicePort { name: (*name).into(), port: 80, node_port, proto: *proto })
            .collect(),
        ..Service::default()
    };
    let slice = Slice {
        key: format!("{key}-x").into(),
        service: key,
        ports: ports
            .iter()
            .map(|(name, proto)| SlicePort { name: (*name).into(), port: 8080, proto: *proto })
            .collect(),
        endpoints: if measured { [at(endpoint, local)].into() } else { (0..4).map(own).collect() },
        weight: 1,
        problems: Box::default(),
    };
    (service, slice)
}

/// The program at the uplink of one world.
struct Ingress {
    program: SchedClassifier,
    /// `struct __sk_buff`, with the uplink's index.
    context: [u8; 192],
}

impl Ingress {
    fn of(world: &World) -> Result<Self> {
        let (_, programs) = world
            .node
            .run(|| SchedClassifier::query_tcx(UPLINK, TcAttachType::Ingress))
            .context("looking at the uplink's programs (tcx needs kernel 6.6)")?;
        let program = programs.into_iter().next().context("no program at the uplink")?;
        let program = SchedClassifier::from_program_info(program, "shv_tc_ingress".into())?;
        let mut context = [0; 192];
        // Its field `ifindex` (uapi/linux/bpf.h).
        context[40..44].copy_from_slice(&world.index(UPLINK)?.to_ne_bytes());
        Ok(Self { program, context })
    }

    /// What the kernel says that it took, in nanoseconds.
    fn once(&mut self, world: &World, frame: &[u8]) -> Result<(Duration, u32)> {
        let mut output = [0; 256];
        let (program, context) = (&mut self.program, &self.context);
        let result = world.node.enter_and(|| {
            let mut options = TestRunOptions::new();
            options.data_in = Some(frame);
            options.data_out = Some(&mut output);
            options.ctx_in = Some(context);
            program.test_run(options)
        })?;
        Ok((result.duration, result.return_value))
    }
}

/// Runs in the namespace on the calling thread, which comes back.
trait EnterAnd {
    fn enter_and<T>(&self, work: impl FnOnce() -> T) -> T;
}

impl EnterAnd for NetNs {
    fn enter_and<T>(&self, work: impl FnOnce() -> T) -> T {
        let _inside = self.enter();
        work()
    }
}

/// Nanoseconds of the program at the uplink, by kinds of packets, few services and many by turns.
fn costs(report: &mut Report, counts: Vec<u32>) -> Result<()> {
    let bar = spinner("few and many services");
    let (mut worlds, mut programs, mut drivers) = (Vec::new(), Vec::new(), Vec::new());
    for &services in &counts {
        let mut world = World::new("packet")?;
        drivers.push(world.fill(services, (POD, true))?);
        programs.push(Ingress::of(&world)?);
        worlds.push(world);
    }
    for (kind, has_bar) in [("new_flow", true), ("flow", true), ("other_traffic", false)] {
        bar.set_message(format!("few and many services: {kind}"));
        let mut all = [Latencies::new(), Latencies::new()];
        for round in 0..RUNS + RUNS / 10 {
            for turn in 0..2 {
                // Each goes first half of the time.
                let which = (round as usize + turn) % 2;
                let frame = frame(kind, round);
                let (took, _) = programs[which].once(&worlds[which], &frame)?;
                if round >= RUNS / 10 {
                    all[which].record(took);
                }
            }
        }
        for (services, all) in counts.iter().zip(&all) {
            let params = [("services", json!(services)), ("packet", json!(kind)), ("runs", json!(RUNS))];
            report.add("tc_ingress_p50", all.us(0.5) * 1000.0, "ns", Bar::None, &params);
        }
        let params = [("packet", json!(kind)), ("services", json!(counts))];
        let limit = if has_bar { Bar::AtMost(1.1) } else { Bar::None };
        report.add("tc_ingress_many_to_few", all[1].us(0.5) / all[0].us(0.5), "x", limit, &params);
    }
    bar.finish_and_clear();
    Ok(())
}

/// A TCP segment from outside. A new flow each time, or one of some flows, or one that no service is concerned with.
fn frame(kind: &str, round: u32) -> Vec<u8> {
    let node_port = FIRST_NODE_PORT + (round % u32::from(NODE_PORTS)) as u16;
    match kind {
        "new_flow" => {
            let client = Ipv4Addr::from(u32::from(CLIENT) + 1000 + (round >> 12));
            Frame::tcp_syn((client, 1024 + (round & 0xfff) as u16), (NODE, node_port)).bytes()
        }
        "flow" => Frame::tcp_ack((CLIENT, 50_000 + (round % 100) as u16), (NODE, node_port)).bytes(),
        _ => Frame::tcp_ack((CLIENT, 50_000), (POD, 8080)).bytes(),
    }
}

/// From outside through a NodePort to a pod of the node, over tcx, beside the same without a service.
fn first_packets(report: &mut Report, samples: u32) -> Result<()> {
    for host_routing in [false, true] {
        let samples = samples.to_string();
        let mut args = vec!["--modes", "ebpf", "--samples", &samples];
        args.extend(host_routing.then_some("--host-routing"));
        let measured = Run::new(&[10], 4, &args)?;
        measured.tell_what_failed();
        let params =
            [("services", json!(10)), ("endpoints", json!(4)), ("host_routing", json!(host_routing))];
        for (key, metric, bar) in [
            (
                "ratio_node_port_answer_p50_to_direct",
                "node_port_first_packet_answered_to_direct_p50",
                Bar::AtMost(1.05),
            ),
            ("ratio_node_port_connect_p50_to_direct", "node_port_connect_to_direct_p50", Bar::None),
        ] {
            let value = measured.figure("ebpf", 10, key).context("no figure through a NodePort")?;
            report.add(metric, value, "x", bar, &params);
        }
    }
    Ok(())
}

/// How many packets a second one core forwards from the uplink to a backend on another node.
fn forwarding(report: &mut Report) -> Result<()> {
    for how in Forwarding::ALL {
        let bar = spinner(format!("forwarding: {}", how.name()));
        let rate = packet_flood::rate(how);
        bar.finish_and_clear();
        match rate {
            Ok(rate) => {
                let params = [
                    ("how", json!(how.name())),
                    (
                        "driven",
                        json!(
                            "64-byte UDP frames of 1000 flows, sendmmsg on a packet socket, veth, one core for all"
                        ),
                    ),
                    ("forwarded", json!(rate.forwarded)),
                    ("sent", json!(rate.sent)),
                ];
                report.add("forwarded", rate.per_second, "1/s", Bar::None, &params);
            }
            Err(error) => eprintln!("forwarding by {}: unavailable: {error:#}", how.name()),
        }
    }
    Ok(())
}
