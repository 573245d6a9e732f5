//! Pods of three nodes reach each other however the nodes are connected; nodes join and leave.

use std::net::IpAddr;

use sheave_harness::{require_root, wait_for};

use sheave_harness::overlay::{Bed, Host, Ips, Pod, all_pairs, mtu, try_talk, wait_talk};

/// Three nodes with a pod each.
fn three(bed: &mut Bed, ips: Ips, args: &[&str]) -> (Vec<Host>, Vec<Pod>) {
    bed.control();
    let hosts: Vec<Host> = (0..3).map(|_| bed.join(ips, args)).collect();
    hosts.iter().for_each(|host| host.wait_ways(4));
    let pods = hosts.iter().map(Host::pod).collect();
    (hosts, pods)
}

fn has_link(host: &Host, name: &str) -> bool {
    host.netns.ip(&["-o", "link"]).contains(name)
}

#[test]
fn every_pair_over_vxlan_on_ipv4_with_nodes_that_come_and_go() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(env!("CARGO_BIN_EXE_sheave"));
    let (hosts, pods) = three(&mut bed, Ips::Both, &["--overlay", "vxlan"]);
    let all: Vec<&Pod> = pods.iter().collect();
    all_pairs(&all);
    for (host, pod) in hosts.iter().zip(&pods) {
        assert!(has_link(host, "sheave-vx4") && !has_link(host, "sheave-vx6"));
        assert_eq!((pod.mtu, mtu(&host.netns, "sheave-vx4")), (1450, 1450));
        // No two nodes have one range.
        assert_eq!(pods.iter().filter(|other| same_range(other, pod)).count(), 1);
    }
    // The node itself speaks to pods of others, and they answer through the tunnel.
    for ip in &pods[1].ips {
        wait_talk(&hosts[0].netns, &pods[1].netns, *ip);
    }
    // Out of the pod ranges pods have their node's address.
    let other: IpAddr = hosts[1].ip4.parse().expect("an address");
    assert_eq!(wait_talk(&pods[0].netns, &hosts[1].netns, other).to_string(), hosts[0].ip4);
    // What is for no pod ends here.
    let routes = hosts[0].netns.ip(&["-4", "route"]);
    assert!(routes.contains("unreachable 10.244."), "{routes}");

    let fourth = bed.join(Ips::Both, &["--overlay", "vxlan"]);
    let late = fourth.pod();
    all_pairs(&[&pods[0], &late]);
    hosts.iter().for_each(|host| host.wait_ways(6));
    all_pairs(&[&pods[2], &late]);

    bed.unregister(&fourth);
    for host in &hosts {
        host.wait_ways(4);
        for table in [&["route"][..], &["-6", "route"], &["neigh", "show", "nud", "all"]] {
            let rows = host.netns.ip(table);
            let range = late.ips[0].to_string();
            let range = range.rsplit_once('.').expect("an address").0;
            assert!(!rows.contains(range), "{range} in {rows}");
        }
        let fdb = sheave_harness::netns::checked(host.netns.command("bridge").args([
            "fdb",
            "show",
            "dev",
            "sheave-vx4",
        ]));
        assert!(!fdb.contains(&fourth.ip4) && fdb.contains("dst"), "{fdb}");
    }
    all_pairs(&all);
}

fn same_range(a: &Pod, b: &Pod) -> bool {
    let range = |pod: &Pod| pod.ips[0].to_string().rsplit_once('.').map(|(range, _)| range.to_owned());
    range(a) == range(b)
}

#[test]
fn every_pair_over_vxlan_on_ipv6() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(env!("CARGO_BIN_EXE_sheave"));
    let args =
        ["--overlay", "vxlan", "--vxlan-port", "8472", "--vxlan-vni", "7", "--vxlan-tx-checksum", "false"];
    let (hosts, pods) = three(&mut bed, Ips::V6, &args);
    all_pairs(&pods.iter().collect::<Vec<_>>());
    for (host, pod) in hosts.iter().zip(&pods) {
        assert!(has_link(host, "sheave-vx6") && !has_link(host, "sheave-vx4"));
        assert_eq!((pod.mtu, mtu(&host.netns, "sheave-vx6")), (1430, 1430));
        let device = host.netns.ip(&["-d", "link", "show", "sheave-vx6"]);
        assert!(device.contains("vxlan id 7 ") && device.contains("dstport 8472"), "{device}");
        assert!(device.contains("nolearning"), "{device}");
    }
}

#[test]
fn every_pair_by_direct_routes_and_by_whatever_fits() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(env!("CARGO_BIN_EXE_sheave"));
    let (mut hosts, pods) = three(&mut bed, Ips::Both, &["--overlay", "auto"]);
    let all: Vec<&Pod> = pods.iter().collect();
    all_pairs(&all);
    for (host, pod) in hosts.iter().zip(&pods) {
        assert!(!has_link(host, "sheave-vx"), "no tunnel between neighbours");
        assert_eq!(pod.mtu, 1500);
    }
    // A node whose peers are behind a router takes the tunnel, and its pods smaller packets.
    let (first, others) = hosts.split_at_mut(1);
    for other in others.iter() {
        first[0].netns.ip(&["route", "add", &format!("{}/32", other.ip4), "via", "192.0.2.9"]);
        first[0].netns.ip(&["-6", "route", "add", &format!("{}/128", other.ip6), "via", "2001:db8::9"]);
    }
    wait_for("the tunnel", || {
        let status = first[0].status();
        let all = status["peers"].as_array().cloned().unwrap_or_default();
        let tunnels = all.len() == 4 && all.iter().all(|way| way["by"] == "vxlan");
        if tunnels { Ok(()) } else { Err(format!("{status}\n{}", first[0].log())) }
    });
    wait_for("the pod's link to follow", || match mtu(&pods[0].netns, "eth0") {
        1450 => Ok(()),
        other => Err(other),
    });
    // Uplinks that change are followed too.
    first[0].netns.ip(&["link", "set", "eth0", "mtu", "1400"]);
    wait_for("the pod's link to follow", || match mtu(&pods[0].netns, "eth0") {
        1350 => Ok(()),
        other => Err(format!("{other}\n{}", first[0].log())),
    });
}

#[test]
fn nodes_without_a_cluster_know_each_other_from_a_file() {
    if !require_root() {
        return;
    }
    let mut bed = Bed::new(env!("CARGO_BIN_EXE_sheave"));
    let peers = bed.dir.path().join("peers.toml");
    let path = peers.display().to_string();
    let sysctls = bed.dir.path().join("sysctl.d");
    let dir = sysctls.display().to_string();
    let args = ["--peers", path.as_str(), "--overlay", "vxlan", "--sysctl-dir", dir.as_str()];
    let mut hosts: Vec<Host> = (0..2).map(|_| bed.host(&args)).collect();
    let entry = |host: &Host, range: &str| {
        format!(
            "[[node]]\nname = {:?}\nnode-ips = [{:?}]\npod-cidrs = [\"10.8.{range}.0/24\", \"fd08:0:0:{range}::/64\"]\n\n",
            host.name, host.ip4
        )
    };
    std::fs::write(&peers, entry(&hosts[0], "1")).expect("write the file");
    hosts[0].start();
    hosts[0].wait_serving();
    let first = hosts[0].pod();
    assert!(first.ips[0].to_string().starts_with("10.8.1."), "{:?}", first.ips);
    // A file that can't be used changes nothing; the next one does.
    std::fs::write(&peers, entry(&hosts[0], "1") + &entry(&hosts[1], "1")).expect("write the file");
    wait_for("the refusal", || {
        let log = hosts[0].log();
        if log.contains("overlaps 10.8.1.0/24 of node node-1") { Ok(()) } else { Err(log) }
    });
    std::fs::write(&peers, entry(&hosts[0], "1") + &entry(&hosts[1], "2")).expect("write the file");
    hosts[1].start();
    hosts[1].wait_serving();
    let second = hosts[1].pod();
    all_pairs(&[&first, &second]);
    let kept = std::fs::read_to_string(sysctls.join("90-sheave-network.conf")).expect("read the sysctl file");
    assert!(kept.contains("net/ipv4/conf/sheave-vx4/rp_filter = 2"), "{kept}");
    // Also without an API server; what else it looks at need not be there.
    let told = hosts[0].sheave(&["status"]).unwrap_or_else(|text| text);
    for part in [
        "overlay vxlan, tunnels sheave-vx4, mtu of pods 1450, peers reached 1",
        "10.8.2.0/24",
        "addresses: 1 of 253 in 10.8.1.0/24 are given",
        "pods connected: 1, leaks: 0",
        "API server: none known here",
    ] {
        assert!(told.contains(part), "{part:?} in {told}");
    }
    std::fs::write(&peers, entry(&hosts[0], "1")).expect("write the file");
    hosts[0].wait_ways(0);
    assert!(try_talk(&first.netns, &second.netns, second.ips[0]).is_err(), "who left is forgotten");
}
