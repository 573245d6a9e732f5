//! The XDP program on the golden frames: it agrees byte for byte with traffic control where it does anything, and leaves
//! everything else unchanged to it.

use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use sheave_harness::require_root;

use crate::golden::{Frame, Hook, L4, Out, PLACES, PORT_LOCAL, SYN, conversation};
use crate::packets::{Programs, roads};

/// XDP_DROP, XDP_PASS and XDP_TX (uapi/linux/bpf.h).
const DROP: u32 = 1;
const PASS: u32 = 2;
const TX: u32 = 3;

/// Runs the program on a frame that came by `device`.
fn run(programs: &mut Programs, device: u32, input: &[u8]) -> (u32, Vec<u8>) {
    // `struct xdp_md` without its last word.
    let mut context = Vec::new();
    for word in [0, input.len() as u32, 0, device, 0] {
        context.extend(word.to_ne_bytes());
    }
    let mut output = vec![0; 4096];
    let mut options = TestRunOptions::new();
    options.data_in = Some(input);
    options.data_out = Some(&mut output);
    options.ctx_in = Some(&context);
    let program: &mut Xdp =
        programs.ebpf.program_mut("shv_xdp").expect("in the object").try_into().expect("an XDP program");
    let result = program.test_run(options).expect("run");
    output.truncate(result.data_size_out as usize);
    (result.return_value, output)
}

/// A frame without its link-layer addresses, which only XDP has to write.
fn behind_addresses(frame: &[u8]) -> &[u8] {
    &frame[12..]
}

#[test]
fn xdp_does_what_traffic_control_does_or_nothing() {
    if !require_root() {
        return;
    }
    let roads = roads();
    let _there = roads.enter();
    let road = nix::net::if_::if_nametoindex("road").expect("an index");
    // The router is known, so that XDP can address frames to it.
    let router = "02:00:00:00:00:99";
    for (family, hop) in [("-4", "192.0.2.254"), ("-6", "2001:db8::254")] {
        crate::service_world::ip(&[
            family,
            "neigh",
            "replace",
            hop,
            "lladdr",
            router,
            "dev",
            "road",
            "nud",
            "permanent",
        ]);
    }
    let mut programs = Programs::load();
    let program: &mut Xdp =
        programs.ebpf.program_mut("shv_xdp").expect("in the object").try_into().expect("an XDP program");
    program.load().expect("load");
    let (mut sent, mut delivered, mut left) = (0, 0, 0);
    for place in &PLACES {
        for step in conversation(place) {
            let at = format!("{} at {}", step.name, place.node);
            if step.hook == Hook::Ingress {
                // Twice through XDP: before traffic control knows the flow, perhaps, and after.
                for _ in 0..2 {
                    let (verdict, output) = run(&mut programs, road, &step.input);
                    match (verdict, &step.output) {
                        (PASS, _) if output == step.input => left += 1,
                        (PASS, Out::Pass(expected)) => {
                            assert_eq!(&output, expected, "{at}");
                            delivered += 1;
                        }
                        (TX, Out::Redirect(expected)) => {
                            assert_eq!(behind_addresses(&output), behind_addresses(expected), "{at}");
                            assert_eq!(output[..6], [2, 0, 0, 0, 0, 0x99], "{at}: to the router");
                            sent += 1;
                        }
                        (DROP, Out::Drop) => {}
                        (verdict, wanted) => panic!("{at}: verdict {verdict}, wanted {wanted:?}"),
                    }
                    // A second run sees the flow that this one made.
                    drop(programs.run(step.hook, &step.input));
                }
            } else {
                drop(programs.run(step.hook, &step.input));
            }
        }
    }
    assert!(sent > 4 && delivered > 8 && left > 40, "{sent} sent, {delivered} delivered, {left} left alone");
    assert_eq!(programs.world.counted("xdp_sent"), sent);
}

#[test]
fn xdp_leaves_the_unusual_alone() {
    if !require_root() {
        return;
    }
    let roads = roads();
    let _there = roads.enter();
    let road = nix::net::if_::if_nametoindex("road").expect("an index");
    let mut programs = Programs::load();
    let program: &mut Xdp =
        programs.ebpf.program_mut("shv_xdp").expect("in the object").try_into().expect("an XDP program");
    program.load().expect("load");
    for place in &PLACES {
        let plain = Frame::new((place.client, 44_000), (place.node, PORT_LOCAL), L4::Tcp(SYN));
        let whole = plain.bytes();
        assert_eq!(run(&mut programs, road, &whole), (PASS, whole.clone()), "no flow yet");
        programs.run(Hook::Ingress, &whole).expect("run");
        let (verdict, translated) = run(&mut programs, road, &whole);
        assert!(verdict == PASS && translated != whole, "the flow is known now");
        let options = Frame { options: 2, ..plain }.bytes();
        assert_eq!(run(&mut programs, road, &options), (PASS, options.clone()), "options");
        if place.node.contains('.') {
            for fragment in [0x2000, 0x2001, 0x0001] {
                let piece = Frame { fragment, ..plain }.bytes();
                assert_eq!(run(&mut programs, road, &piece), (PASS, piece.clone()), "fragment {fragment:#x}");
            }
        }
        let mut tagged = whole.clone();
        tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
        assert_eq!(run(&mut programs, road, &tagged), (PASS, tagged.clone()), "a VLAN tag");
        for cut in 14..whole.len() - 24 {
            let (verdict, output) = run(&mut programs, road, &whole[..cut]);
            let all_or_nothing = output == whole[..cut] || output == translated[..cut];
            assert!(verdict == DROP || all_or_nothing, "cut at {cut}: half a translation");
        }
    }
}
