//! Established flows: past the stack where nothing translates them, through it where that is switched off, and cut by a
//! policy either way.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::json;
use sheave_agent::dataplane::ebpf::guard_status;
use sheave_ebpf_abi::NetCounter;
use sheave_harness::{NetNs, require_root, wait_for};

use crate::policy_bed::Bed;

/// Both ends of a connection, here in the test.
struct Flow {
    client: TcpStream,
    server: TcpStream,
}

impl Flow {
    fn open(bed: &Bed, from: usize, to: usize, v6: bool) -> Self {
        Self::between(&bed.pods[from].ns, bed, to, v6)
    }

    fn between(from: &NetNs, bed: &Bed, to: usize, v6: bool) -> Self {
        let at = bed.pods[to].ns.run(|| {
            let address = SocketAddr::new(bed.pods[to].ips[usize::from(v6)], 0);
            TcpListener::bind(address).expect("listen in a pod")
        });
        let address = at.local_addr().expect("an address");
        let client = from
            .run(|| TcpStream::connect_timeout(&address, Duration::from_secs(20)).expect("connect to a pod"));
        let (server, _) = at.accept().expect("a connection");
        for end in [&client, &server] {
            end.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
            end.set_nodelay(true).expect("no delay");
        }
        Flow { client, server }
    }

    /// Whether a byte goes there and comes back within the timeout.
    fn ping(&mut self) -> bool {
        let mut byte = [0];
        self.client.write_all(b"?").is_ok()
            && self.server.read_exact(&mut byte).is_ok()
            && self.server.write_all(b"!").is_ok()
            && self.client.read_exact(&mut byte).is_ok()
    }
}

fn counted(bed: &Bed, counter: NetCounter) -> u64 {
    let status = guard_status(bed.pin_dir()).expect("the pins").expect("an agent that does the network");
    status.counters.iter().find(|(held, _)| *held == counter).map_or(0, |(_, n)| *n)
}

fn two_pods(flags: &[&str]) -> Bed {
    let mut bed = Bed::new(flags);
    bed.add_namespace("x", json!({}));
    bed.add_pod("x", "a", json!({"app": "a"}), json!([]));
    bed.add_pod("x", "b", json!({"app": "b"}), json!([]));
    bed.wait_attached();
    bed.wait_known();
    bed
}

#[test]
fn flows_between_pods_go_past_the_stack_and_a_policy_cuts_them() {
    if !require_root() {
        return;
    }
    let bed = two_pods(&[]);
    for v6 in [false, true] {
        let before = counted(&bed, NetCounter::FastPod);
        let mut flow = Flow::open(&bed, 0, 1, v6);
        wait_for("packets past the stack", || {
            assert!(flow.ping(), "an allowed flow goes on; {}", bed.log_tail());
            let now = counted(&bed, NetCounter::FastPod);
            if now > before + 10 { Ok(()) } else { Err(format!("{before} then {now}")) }
        });
        bed.put_policy("x", "deny", &json!({"podSelector": {"matchLabels": {"app": "b"}}}));
        wait_for("the flow to be cut", || if flow.ping() { Err("it goes on") } else { Ok(()) });
        assert!(counted(&bed, NetCounter::Cut) > 0);
        bed.delete_policy("x", "deny");
        // What was lost meanwhile is sent again.
        flow.server.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        flow.client.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        assert!(flow.ping(), "it goes on where it was; {}", bed.log_tail());
    }
}

#[test]
fn flows_with_the_outside_go_past_the_stack_both_ways() {
    if !require_root() {
        return;
    }
    let bed = two_pods(&[]);
    for v6 in [false, true] {
        let before = [NetCounter::FastIn, NetCounter::FastOut].map(|counter| counted(&bed, counter));
        let mut flow = Flow::between(&bed.outside, &bed, 1, v6);
        wait_for("packets past the stack", || {
            assert!(flow.ping(), "an allowed flow goes on; {}", bed.log_tail());
            let now = [NetCounter::FastIn, NetCounter::FastOut].map(|counter| counted(&bed, counter));
            let enough = now.iter().zip(before).all(|(now, before)| *now > before + 5);
            if enough { Ok(()) } else { Err(format!("{before:?} then {now:?}")) }
        });
        bed.put_policy("x", "deny", &json!({"podSelector": {"matchLabels": {"app": "b"}}}));
        wait_for("the flow to be cut", || if flow.ping() { Err("it goes on") } else { Ok(()) });
        // The node itself, whose probes must come through, is not concerned.
        let mut own = Flow::between(&bed.node, &bed, 1, v6);
        assert!(own.ping(), "{}", bed.log_tail());
        bed.delete_policy("x", "deny");
        flow.server.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        flow.client.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        assert!(flow.ping(), "it goes on where it was; {}", bed.log_tail());
    }
}

#[test]
fn without_the_fast_path_everything_goes_through_the_stack() {
    if !require_root() {
        return;
    }
    let bed = two_pods(&["--fast-path", "false"]);
    let mut flow = Flow::open(&bed, 0, 1, false);
    let opened = counted(&bed, NetCounter::Opened);
    assert!(opened > 0);
    // Longer than a flow needs to be let past the stack.
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_millis(2_200) {
        assert!(flow.ping(), "{}", bed.log_tail());
    }
    assert_eq!(counted(&bed, NetCounter::FastPod), 0);
    let status = bed.status();
    assert!(status.contains("fast path: off"), "{status}");
}

#[test]
fn flows_of_a_pod_that_a_queue_limits_wait_in_it() {
    if !require_root() {
        return;
    }
    let bed = two_pods(&[]);
    let tc = |args: &[&str]| {
        let done = bed.node.command("tc").args(["qdisc"]).args(args).status().expect("start tc");
        assert!(done.success(), "tc qdisc {args:?}");
    };
    let link = &*bed.pods[1].link;
    tc(&["add", "dev", link, "root", "tbf", "rate", "1gbit", "burst", "1mb", "latency", "50ms"]);
    wait_for("the queue to be seen", || {
        let status = guard_status(bed.pin_dir()).expect("the pins").expect("an agent that does the network");
        if status.queued == 2 { Ok(()) } else { Err(bed.status()) }
    });
    let mut flow = Flow::open(&bed, 0, 1, false);
    // Longer than a flow needs to be let past the stack.
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_millis(2_200) {
        assert!(flow.ping(), "{}", bed.log_tail());
    }
    assert_eq!(counted(&bed, NetCounter::FastPod), 0, "either way: its answers stay with it");
    assert!(bed.status().contains("2 pod addresses are at devices with a queue"), "{}", bed.status());
    tc(&["del", "dev", link, "root"]);
    wait_for("packets past the stack", || {
        assert!(flow.ping(), "{}", bed.log_tail());
        if counted(&bed, NetCounter::FastPod) > 10 { Ok(()) } else { Err("all through the stack") }
    });
}

#[test]
fn what_was_allowed_stays_so_while_the_agent_is_gone() {
    if !require_root() {
        return;
    }
    let mut bed = two_pods(&[]);
    bed.put_policy("x", "deny", &json!({"podSelector": {"matchLabels": {"app": "b"}}}));
    let refused = |bed: &Bed| {
        let to = SocketAddr::new(bed.pods[1].ips[0], 80);
        let error = bed.pods[0].ns.run(|| TcpStream::connect_timeout(&to, Duration::from_millis(300)));
        // Nobody listens: what is allowed is refused by the pod, what is not is lost on the way.
        match error.expect_err("nobody listens").kind() {
            std::io::ErrorKind::TimedOut => Ok(()),
            other => Err(format!("{other:?}; {}", bed.log_tail())),
        }
    };
    wait_for("the policy", || refused(&bed));
    bed.kill();
    refused(&bed).expect("still enforced");
    bed.start();
    bed.wait_known();
    for _ in 0..5 {
        refused(&bed).expect("still enforced by the next agent");
    }
    let mut back = Flow::open(&bed, 1, 0, false);
    assert!(back.ping(), "b may open what it likes");
}
