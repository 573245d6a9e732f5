//! Network policies and the fast path between pods of two nodes, through a tunnel.

use sheave_agent::dataplane::ebpf::guard_status;
use sheave_ebpf_abi::NetCounter;
use sheave_harness::overlay::{Bed, Host, Ips, Pod, Stream, try_talk, wait_talk};
use sheave_harness::{require_root, wait_for};

use serde_json::json;

const POLICIES: &str = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies";

/// What the cluster knows of a pod that another runtime runs.
fn tell(bed: &Bed, host: &Host, pod: &Pod, name: &str) {
    let path = "/api/v1/namespaces/default/pods";
    let object = json!({
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"nodeName": host.name, "containers": [{"name": "c", "image": "none"}]},
    });
    bed.raw("POST", path, Some(&object)).expect("make a Pod");
    let ips: Vec<_> = pod.ips.iter().map(|ip| json!({"ip": ip})).collect();
    let status = json!({"status": {"phase": "Running", "podIP": pod.ips[0], "podIPs": ips}});
    bed.raw("PATCH", &format!("{path}/{name}/status"), Some(&status)).expect("tell its addresses");
}

fn counted(host: &Host, counter: NetCounter) -> u64 {
    let status = guard_status(host.pin_dir()).expect("the pins");
    status
        .map_or(0, |status| status.counters.iter().find(|(held, _)| *held == counter).map_or(0, |(_, n)| *n))
}

#[test]
fn a_policy_holds_for_pods_of_other_nodes_and_their_flows_go_past_the_stack() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(env!("CARGO_BIN_EXE_sheave"));
    bed.control();
    let hosts: Vec<Host> = (0..2).map(|_| bed.join(Ips::Both, &["--overlay", "vxlan"])).collect();
    hosts.iter().for_each(|host| host.wait_ways(2));
    let (friend, stranger, server) = (hosts[0].pod(), hosts[0].pod(), hosts[1].pod());
    for (host, pod, name) in
        [(&hosts[0], &friend, "friend"), (&hosts[0], &stranger, "stranger"), (&hosts[1], &server, "server")]
    {
        tell(&bed, host, pod, name);
    }
    let is_open =
        |from: &Pod, family: usize| try_talk(&from.netns, &server.netns, server.ips[family]).is_ok();
    for family in 0..2 {
        for from in [&friend, &stranger] {
            wait_talk(&from.netns, &server.netns, server.ips[family]);
        }
    }

    let mut streams = [0, 1].map(|family| Stream::open(&friend, &server, family));
    for (family, stream) in streams.iter_mut().enumerate() {
        let before = [&hosts[0], &hosts[1]]
            .map(|host| [NetCounter::FastOut, NetCounter::FastIn].map(|c| counted(host, c)));
        wait_for("packets of the tunnel past the stack of both nodes", || {
            stream.beat();
            let now = [&hosts[0], &hosts[1]]
                .map(|host| [NetCounter::FastOut, NetCounter::FastIn].map(|c| counted(host, c)));
            let moved = now.iter().flatten().zip(before.iter().flatten()).all(|(now, before)| now > before);
            if moved {
                Ok(())
            } else {
                Err(format!("family {family}: {before:?}, then {now:?}; {}", hosts[1].log()))
            }
        });
    }

    let from = json!([{"podSelector": {"matchLabels": {"app": "friend"}}}]);
    let policy = json!({"metadata": {"name": "friends"}, "spec": {
        "podSelector": {"matchLabels": {"app": "server"}}, "ingress": [{"from": from}]}});
    bed.raw("POST", POLICIES, Some(&policy)).expect("make a policy");
    for (family, stream) in streams.iter_mut().enumerate() {
        wait_for("the stranger to be kept out", || {
            if is_open(&stranger, family) { Err(format!("family {family} is open")) } else { Ok(()) }
        });
        wait_talk(&friend.netns, &server.netns, server.ips[family]);
        stream.beat();
    }
    bed.raw("DELETE", &format!("{POLICIES}/friends"), None).expect("delete the policy");
    for ip in &server.ips {
        wait_talk(&stranger.netns, &server.netns, *ip);
    }
}
