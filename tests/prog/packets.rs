//! The programs at network devices on made-up frames, over maps that the data plane filled. The frames are those that
//! the core's own tests use on the host, so that the loaded programs and the host's code are held to the same bytes.

use std::fs;
use std::path::PathBuf;

use aya::maps::Array;
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use sheave_agent::dataplane::DataplaneConfig;
use sheave_agent::dataplane::ebpf::versioned;
use sheave_agent::service::{Event, Proto, ServiceExtras};
use sheave_ebpf_abi::{Door, Plain as _, door_flag, map};
use sheave_harness::{Cgroup, NetNs, require_root};

use crate::golden::doors::{self as golden_doors, DOOR_MTU, Doors};
use crate::golden::{
    Frame, Hook, L4, Out, PAYLOAD, PLACES, PORT_DIRECT, PORT_DIRECT_LOCAL, PORT_EMPTY, PORT_LOCAL,
    PORT_LOCAL_ONLY, PORT_POD, PORT_REMOTE, PORT_SAME_POD, REMOTE_MTU, SYN, Step, conversation,
};
use crate::service_world::{World, address, at, ip, service, slice};

/// TC_ACT_UNSPEC, TC_ACT_SHOT and TC_ACT_REDIRECT (uapi/linux/pkt_cls.h).
const PASS: u32 = u32::MAX;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

pub(crate) struct Programs {
    pub(crate) ebpf: Ebpf,
    pub(crate) world: World,
    _cgroup: Cgroup,
}

/// The services that the golden conversations assume.
fn services() -> Vec<Event> {
    let mut events = Vec::new();
    for (n, proto) in [(1, Proto::Tcp), (2, Proto::Udp)] {
        let shapes = [
            (PORT_LOCAL, Some(true)),
            (PORT_SAME_POD, Some(true)),
            (PORT_REMOTE, Some(false)),
            (PORT_EMPTY, None),
            (PORT_LOCAL_ONLY, Some(false)),
            (PORT_DIRECT, Some(false)),
            (PORT_DIRECT_LOCAL, Some(true)),
        ];
        for (m, (node_port, local)) in shapes.into_iter().enumerate() {
            let name = format!("s{n}{m}");
            let mut ips = [format!("10.96.{n}.{m}"), format!("fd00:96:{n}::{m}")];
            if node_port == PORT_LOCAL {
                ips = PLACES.each_ref().map(|place| place.cluster_ip.to_owned());
            }
            let mut event = service(&name, &[&ips[0], &ips[1]], proto, node_port);
            if let Event::Service(service) = &mut event {
                service.external_local = node_port == PORT_LOCAL_ONLY;
                let dsr = [PORT_DIRECT, PORT_DIRECT_LOCAL].contains(&node_port);
                let balancers: Vec<&str> = match node_port {
                    PORT_LOCAL => PLACES.iter().map(|place| place.balancer).collect(),
                    PORT_DIRECT_LOCAL => PLACES.iter().map(|place| place.direct).collect(),
                    _ => Vec::new(),
                };
                if dsr || !balancers.is_empty() {
                    service.extras = Some(Box::new(ServiceExtras {
                        ingress_ips: balancers.into_iter().map(address).collect(),
                        source_ranges: PLACES.iter().map(|p| p.range.parse().expect("a range")).collect(),
                        dsr,
                        ..ServiceExtras::default()
                    }));
                }
            }
            events.push(event);
            let Some(local) = local else { continue };
            for place in &PLACES {
                let endpoint = if local { place.pod } else { place.remote };
                let mut event = slice(&name, proto, &[at(endpoint, PORT_POD)]);
                if let Event::Slice(slice) = &mut event {
                    slice.endpoints.iter_mut().for_each(|endpoint| endpoint.on_this_node = local);
                }
                events.push(event);
            }
        }
    }
    events
}

/// A device of a pod.
const POD_LINK: &str = "pod";

/// A namespace whose routes lead where the conversations go: everything by one device, some of it in small packets.
pub(crate) fn roads() -> NetNs {
    let netns = NetNs::new();
    netns.veth("road", &netns, "end");
    // Nothing comes this way: that there is such a device has the agent load what begins there.
    netns.veth(POD_LINK, &netns, "pod-end");
    netns.ip(&["addr", "add", "192.0.2.1/24", "dev", "road"]);
    netns.ip(&["addr", "add", "2001:db8::1/64", "dev", "road", "nodad"]);
    let mtu = REMOTE_MTU.to_string();
    for (family, far, router) in
        [("-4", PLACES[0].remote, "192.0.2.254"), ("-6", PLACES[1].remote, "2001:db8::254")]
    {
        netns.ip(&[family, "route", "add", "default", "via", router]);
        netns.ip(&[family, "route", "add", far, "via", router, "mtu", "lock", &mtu]);
    }
    netns.run(|| {
        for knob in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{knob}"), "1").unwrap_or_else(|e| panic!("{knob}: {e}"));
        }
        // The test's frames come by loopback, where no addresses but its own would be.
        ip(&["addr", "flush", "dev", "lo"]);
        ip(&["addr", "add", "127.0.0.1/8", "dev", "lo"]);
    });
    netns
}

/// Runs a test on programs that stand at roads of their own; where there are none for want of root, that is said.
pub(crate) fn on_roads(test: impl FnOnce(&mut Programs)) {
    if require_root() {
        let roads = roads();
        let _there = roads.enter();
        test(&mut Programs::load());
    }
}

impl Programs {
    pub(crate) fn load() -> Self {
        Self::load_with(|_| ())
    }

    fn load_with(settings: impl FnOnce(&mut DataplaneConfig)) -> Self {
        let cgroup = Cgroup::new("prog");
        let mut world = World::new(cgroup.path(), &[]);
        world.config.node_ips = PLACES.iter().map(|place| address(place.node)).collect();
        world.config.pod_links = vec![POD_LINK.to_owned()];
        settings(&mut world.config);
        // Its links are no use here; its maps and the programs in them are.
        drop(world.driver(services()));
        let dir = versioned(&world.config.pin_dir);
        let pins: Vec<(&str, PathBuf)> =
            sheave_ebpf_abi::map::ALL.iter().map(|name| (*name, dir.join(name))).collect();
        let mut loader = EbpfLoader::new();
        for (name, path) in &pins {
            loader.map_pin_path(name, path.as_path());
        }
        let mut ebpf = loader.load(sheave_ebpf_object::BYTES).expect("load the object over the pinned maps");
        for hook in [Hook::Ingress, Hook::PodIngress, Hook::PodAnswer, Hook::Egress] {
            Self::classifier(&mut ebpf, hook).load().expect("load");
        }
        Self { ebpf, world, _cgroup: cgroup }
    }

    fn classifier(ebpf: &mut Ebpf, hook: Hook) -> &mut SchedClassifier {
        let name = match hook {
            Hook::Ingress => "shv_tc_ingress",
            Hook::PodIngress => "shv_pod_ingress",
            Hook::PodAnswer => "shv_pod_answer",
            Hook::Egress => "shv_tc_egress",
        };
        ebpf.program_mut(name).expect("in the object").try_into().expect("a classifier")
    }

    /// Runs a program on a frame: its verdict and the frame that it left.
    pub(crate) fn run(
        &mut self,
        hook: Hook,
        input: &[u8],
    ) -> Result<(u32, Vec<u8>), aya::programs::ProgramError> {
        let mut output = vec![0; 4096];
        let mut options = TestRunOptions::new();
        options.data_in = Some(input);
        options.data_out = Some(&mut output);
        let result = Self::classifier(&mut self.ebpf, hook).test_run(options)?;
        output.truncate(result.data_size_out as usize);
        Ok((result.return_value, output))
    }
}

impl Programs {
    /// Runs a golden step.
    fn shows(&mut self, step: &Step, at: &str) {
        let (verdict, output) = self.run(step.hook, &step.input).expect("run");
        let at = format!("{} at {at}", step.name);
        let (wanted, expected) = match &step.output {
            Out::Pass(expected) => (PASS, expected),
            Out::Redirect(expected) | Out::Enter(expected) | Out::Reply(expected) => (REDIRECT, expected),
            Out::Drop => return assert_eq!(verdict, DROP, "{at}"),
        };
        assert_eq!((verdict, &output), (wanted, expected), "{at}");
    }
}

#[test]
fn golden_doors() {
    if !require_root() {
        return;
    }
    let roads = roads();
    let _there = roads.enter();
    let road = nix::net::if_::if_nametoindex("road").expect("an index");
    let mut programs = Programs::load_with(|config| config.host_routing = true);
    for (doors, flags) in [(Doors::Entered, door_flag::ENTER), (Doors::Watched, 0)] {
        for (doors, device) in [(doors, road), (Doors::Shut, 0)] {
            let door = Door { device, mtu: DOOR_MTU, flags };
            let bytes: [u8; size_of::<Door>()] = door.as_bytes().try_into().expect("its size");
            let map = programs.ebpf.map_mut(map::DOORS).expect("in the object");
            Array::<_, [u8; size_of::<Door>()]>::try_from(map)
                .expect("an array")
                .set(road & 0xffff, bytes, 0)
                .expect("write a door");
            for place in &PLACES {
                for step in golden_doors::conversation(place, doors) {
                    programs.shows(&step, place.node);
                }
            }
        }
    }
    for reason in ["rewrite_failed", "answer_failed", "program_missing", "no_route", "flow_full"] {
        assert_eq!(programs.world.counted(reason), 0, "{reason}");
    }
}

#[test]
fn golden_conversations() {
    if !require_root() {
        return;
    }
    let roads = roads();
    let _there = roads.enter();
    let mut programs = Programs::load();
    for place in &PLACES {
        for step in conversation(place) {
            programs.shows(&step, place.node);
        }
    }
    for (reason, times) in [
        ("no_local_endpoints", 4),
        ("rejected_no_endpoints", 10),
        ("source_range_refused", 6),
        ("fragment", 4),
        ("packet_too_big", 9),
        ("hop_limit_expired", 14),
        ("icmp_error_translated", 84),
        ("tunnel_refused", 2),
        ("rewrite_failed", 0),
        ("answer_failed", 0),
        ("no_route", 0),
        ("program_missing", 0),
    ] {
        assert_eq!(programs.world.counted(reason), times, "{reason}");
    }
}

#[test]
fn truncated_frames_pass_unchanged() {
    if !require_root() {
        return;
    }
    let roads = roads();
    let _there = roads.enter();
    let mut programs = Programs::load();
    for place in &PLACES {
        for options in 0..4 {
            let plain = Frame::new((place.client, 5), (place.node, PORT_LOCAL), L4::Tcp(SYN));
            let whole = Frame { options, ..plain }.bytes();
            // Up to the TCP flags; from there on the addresses are changed or the packet is dropped.
            let flags = whole.len() - PAYLOAD.len() - 20 + 13;
            for cut in (14..=flags).step_by(3) {
                // The kernel refuses frames without any IP header before the program sees them.
                let Ok((verdict, output)) = programs.run(Hook::Ingress, &whole[..cut]) else {
                    assert!(cut < 14 + 40, "refused at {cut}");
                    continue;
                };
                assert_eq!(verdict, PASS, "{cut} of {}", place.node);
                assert_eq!(output[..cut], whole[..cut]);
            }
        }
    }
    assert_eq!(programs.world.counted("forwarded"), 0);
    assert!(programs.world.counted("bad_header") > 20);
}
