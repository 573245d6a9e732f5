//! The NodePort programs on made-up frames, over maps that the data plane filled. The frames are those that the
//! core's own tests use on the host, so that the loaded programs and the host's code are held to the same bytes.

use std::path::PathBuf;

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use sheave_agent::dataplane::ebpf::versioned;
use sheave_agent::service::{Event, Proto};
use sheave_harness::{Cgroup, require_root};

use crate::golden::{
    Frame, Hook, L4, PLACES, PORT_EMPTY, PORT_LOCAL, PORT_POD, PORT_REMOTE, PORT_SAME_POD, SYN, conversation,
};
use crate::service_world::{World, address, at, service, slice};

/// TC_ACT_UNSPEC and TC_ACT_SHOT (uapi/linux/pkt_cls.h).
const PASS: u32 = u32::MAX;
const DROP: u32 = 2;

struct Programs {
    ebpf: Ebpf,
    world: World,
    _cgroup: Cgroup,
}

/// The services that the golden conversations assume.
fn services() -> Vec<Event> {
    let mut events = Vec::new();
    for (n, proto) in [(1, Proto::Tcp), (2, Proto::Udp)] {
        let shapes = [(PORT_LOCAL, 1), (PORT_SAME_POD, 1), (PORT_REMOTE, 2), (PORT_EMPTY, 0)];
        for (m, (node_port, endpoints)) in shapes.into_iter().enumerate() {
            let name = format!("s{n}{m}");
            let ips = [format!("10.96.{n}.{m}"), format!("fd00:96:{n}::{m}")];
            events.push(service(&name, &[&ips[0], &ips[1]], proto, node_port));
            for place in PLACES.iter().filter(|_| endpoints != 0) {
                let mut event = slice(&name, proto, &[at(place.pod, PORT_POD)]);
                if let Event::Slice(slice) = &mut event
                    && endpoints == 2
                {
                    slice.endpoints.iter_mut().for_each(|endpoint| endpoint.on_this_node = false);
                }
                events.push(event);
            }
        }
    }
    events
}

impl Programs {
    fn load() -> Self {
        let cgroup = Cgroup::new("prog");
        let mut world = World::new(cgroup.path(), &[]);
        world.config.node_ips = PLACES.iter().map(|place| address(place.node)).collect();
        // Its links are no use here; its maps are.
        drop(world.driver(services()));
        let dir = versioned(&world.config.pin_dir);
        let pins: Vec<(&str, PathBuf)> =
            sheave_ebpf_abi::map::ALL.iter().map(|name| (*name, dir.join(name))).collect();
        let mut loader = EbpfLoader::new();
        for (name, path) in &pins {
            loader.map_pin_path(name, path.as_path());
        }
        let mut ebpf = loader.load(sheave_ebpf_object::BYTES).expect("load the object over the pinned maps");
        for name in ["shv_tc_ingress", "shv_tc_egress"] {
            Self::classifier(&mut ebpf, name).load().expect("load");
        }
        Self { ebpf, world, _cgroup: cgroup }
    }

    fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
        ebpf.program_mut(name).expect("in the object").try_into().expect("a classifier")
    }

    /// Runs a program on a frame: its verdict and the frame that it left.
    fn run(&mut self, hook: Hook, input: &[u8]) -> (u32, Vec<u8>) {
        let name = if hook == Hook::Ingress { "shv_tc_ingress" } else { "shv_tc_egress" };
        let mut output = vec![0; 2048];
        let mut options = TestRunOptions::new();
        options.data_in = Some(input);
        options.data_out = Some(&mut output);
        let result = Self::classifier(&mut self.ebpf, name).test_run(options).expect("run");
        output.truncate(result.data_size_out as usize);
        (result.return_value, output)
    }
}

#[test]
fn golden_conversations() {
    if !require_root() {
        return;
    }
    let mut programs = Programs::load();
    for place in &PLACES {
        for step in conversation(place) {
            let (verdict, output) = programs.run(step.hook, &step.input);
            match step.output {
                Some(expected) => {
                    assert_eq!(verdict, PASS, "{} at {}", step.name, place.node);
                    assert_eq!(output, expected, "{} at {}", step.name, place.node);
                }
                None => assert_eq!(verdict, DROP, "{} at {}", step.name, place.node),
            }
        }
    }
    for (reason, times) in [
        ("node_port_no_local_endpoints", 2),
        ("node_port_no_endpoints", 2),
        ("flow_collision", 2),
        ("fragment", 1),
        ("rewrite_failed", 0),
    ] {
        assert_eq!(programs.world.counted(reason), times, "{reason}");
    }
}

#[test]
fn truncated_frames_pass_unchanged() {
    if !require_root() {
        return;
    }
    let mut programs = Programs::load();
    for place in &PLACES {
        for options in 0..4 {
            let plain = Frame::new((place.client, 5), (place.node, PORT_LOCAL), L4::Tcp(SYN));
            let whole = Frame { options, ..plain }.bytes();
            // Up to the TCP flags; from there on the addresses are changed or the packet is dropped.
            let flags = whole.len() - 23 - 20 + 13;
            for cut in (14..=flags).step_by(3) {
                // The kernel refuses frames without any IP header before the program sees them.
                let mut output = vec![0; 2048];
                let mut run = TestRunOptions::new();
                run.data_in = Some(&whole[..cut]);
                run.data_out = Some(&mut output);
                let classifier = Programs::classifier(&mut programs.ebpf, "shv_tc_ingress");
                let Ok(result) = classifier.test_run(run) else {
                    assert!(cut < 14 + 40, "refused at {cut}");
                    continue;
                };
                assert_eq!(result.return_value, PASS, "{cut} of {}", place.node);
                assert_eq!(output[..cut], whole[..cut]);
            }
        }
    }
    assert_eq!(programs.world.counted("node_port_forwarded"), 0);
    assert!(programs.world.counted("bad_header") > 20);
}
