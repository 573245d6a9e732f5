//! Conformance cases C41 to C62: CHECK, STATUS and GC. What CHECK is to find is broken by hand in the kernel; what GC is
//! to take is looked for there.

use std::net::IpAddr;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sheave_harness::netns::checked;
use sheave_harness::wait_for;

use crate::cni_bed::{
    Bed, Ctr, Outcome, Plugin, addresses, ip_json, ips_of, links_of, node_interfaces, with, with_prev,
};
use crate::cni_extras::reaches_host_port;
use crate::cni_fake::FakeIpam;

fn check(bed: &Bed, ctr: &Ctr, config: &Value, result: &Value) -> Outcome {
    bed.call("CHECK", ctr, &with_prev(config, Some(result)))
}

pub(crate) fn check_compares_with_prev_result(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-compare"));
    let result = bed.add(&ctr, &config);
    check(bed, &ctr, &config, &result).silent();
    let mut address = result.clone();
    address["ips"][0]["address"] = json!("10.244.15.253/32");
    check(bed, &ctr, &config, &address).refusal();
    let mut interface = result.clone();
    let inner = interface["interfaces"]
        .as_array_mut()
        .expect("a list")
        .iter_mut()
        .find(|row| row["name"] == "eth0")
        .expect("the inner interface");
    inner["name"] = json!("eth7");
    check(bed, &ctr, &config, &interface).refusal();
    check(bed, &ctr, &config, &result).silent();
    bed.del(&ctr, &config);
}

pub(crate) fn check_finds_what_is_missing(bed: &Bed) {
    type Break = fn(&Bed, &Ctr, &Value);
    let breaks: [(&str, Break); 4] = [
        ("address", |_, ctr, _| {
            ctr.netns().ip(&["-4", "address", "flush", "dev", "eth0"]);
        }),
        ("route", |_, ctr, _| {
            ctr.netns().ip(&["-4", "route", "del", "default"]);
        }),
        ("interface", |_, ctr, _| {
            ctr.netns().ip(&["link", "del", "eth0"]);
        }),
        ("namespace", |_, ctr, _| {
            // Another link of the same name is not the one that was made.
            ctr.netns().ip(&["link", "set", "eth0", "name", "old0"]);
            ctr.netns().ip(&["link", "add", "eth0", "type", "bridge"]);
        }),
    ];
    for (what, break_it) in breaks {
        let (ctr, config) = (Ctr::new(), bed.config("n-missing"));
        let result = bed.add(&ctr, &config);
        check(bed, &ctr, &config, &result).silent();
        break_it(bed, &ctr, &result);
        let outcome = check(bed, &ctr, &config, &result);
        assert!(outcome.status != Some(0), "{what}: {outcome:?}");
        outcome.refusal();
        bed.del(&ctr, &config);
    }
}

pub(crate) fn check_finds_missing_extras(plugin: Plugin) {
    let bed = Bed::new(plugin);
    let runtime = json!({"portMappings": [{"hostPort": 10043, "containerPort": 80, "protocol": "tcp"}],
        "bandwidth": {"ingressRate": 8_000_000, "ingressBurst": 800_000,
                      "egressRate": 8_000_000, "egressBurst": 800_000}});
    let (ctr, list) = (Ctr::new(), bed.list("n-extras", runtime));
    let result = bed.add_list(&ctr, &list).expect("an ADD");
    bed.check_list(&ctr, &list, &result).expect("a whole attachment");
    checked(bed.node.netns.command("nft").args(["flush", "ruleset"]));
    // Who repairs by itself may have done so; who says that all is well must be right.
    if bed.check_list(&ctr, &list, &result).is_ok() {
        reaches_host_port(&bed, &ctr, 10043, 80);
    }
    let host = node_interfaces(&result)[0].clone();
    checked(bed.node.netns.command("tc").args(["qdisc", "del", "dev", &host, "root"]));
    if bed.check_list(&ctr, &list, &result).is_ok() {
        let qdisc = checked(bed.node.netns.command("tc").args(["qdisc", "show", "dev", &host]));
        assert!(qdisc.contains("8Mbit"), "{qdisc}");
    }
    bed.del_list(&ctr, &list, Some(&result));
}

pub(crate) fn check_tolerates_later_plugins(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-later"));
    let mut result = bed.add(&ctr, &config);
    ctr.netns().ip(&["route", "add", "198.51.100.0/24", "dev", "eth0"]);
    ctr.netns().ip(&["link", "set", "eth0", "mtu", "1300"]);
    ctr.netns().ip(&["link", "add", "later0", "type", "bridge"]);
    if let Some(routes) = result["routes"].as_array_mut() {
        routes.push(json!({"dst": "198.51.100.0/24"}));
    }
    result["interfaces"]
        .as_array_mut()
        .expect("a list")
        .push(json!({"name": "later0", "sandbox": ctr.path()}));
    check(bed, &ctr, &config, &result).silent();
    bed.del(&ctr, &config);
}

pub(crate) fn check_straight_after_add(bed: &Bed) {
    let config = bed.config("n-straight");
    for _ in 0..5 {
        let ctr = Ctr::new();
        let result = bed.add(&ctr, &config);
        check(bed, &ctr, &config, &result).silent();
        bed.del(&ctr, &config);
    }
}

pub(crate) fn check_asks_ipam(bed: &Bed) {
    let ipam = FakeIpam::new();
    let (ctr, config) = (Ctr::new(), ipam.config(bed, "n-ipam-check"));
    let result = ipam.call(bed, "ADD", &ctr, &config).result();
    let config = with_prev(&config, Some(&result));
    ipam.call(bed, "CHECK", &ctr, &config).silent();
    assert_eq!(ipam.calls(), ["ADD", "CHECK"]);
    ipam.fails("CHECK", 117, "the reservation is gone");
    let told = ipam.call(bed, "CHECK", &ctr, &config).refusal();
    assert!(told.text.contains("the reservation is gone"), "{told:?}");
    ipam.call(bed, "DEL", &ctr, &config).silent();
}

pub(crate) fn check_needs_prev_result(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), bed.config("n-check-prev"));
    bed.add(&ctr, &config);
    let told = bed.call("CHECK", &ctr, &config).code(7);
    assert!(told.to_lowercase().contains("prevresult"), "{told}");
    bed.del(&ctr, &config);
}

pub(crate) fn check_without_daemon(plugin: Plugin) {
    let bed = Bed::new(plugin);
    let (ctr, config) = (Ctr::new(), bed.config("n-check-down"));
    let result = bed.add(&ctr, &config);
    bed.kill_agent();
    check(&bed, &ctr, &config, &result).code(11);
    bed.call("ADD", &Ctr::new(), &config).code(11);
}

fn newest(bed: &Bed, name: &str) -> Value {
    with(bed.config(name), json!({"cniVersion": "1.1.0"}))
}

pub(crate) fn status_says_whether_add_works(plugin: Plugin) {
    // One address is usable.
    let bed = Bed::with_flags(plugin, &["--pod-cidr", "10.244.1.0/30"]);
    let (ctr, config) = (Ctr::new(), newest(&bed, "n-status"));
    bed.verb("STATUS", &config).silent();
    bed.add(&ctr, &config);
    bed.verb("STATUS", &config).refusal();
    bed.call("ADD", &Ctr::new(), &config).refusal();
}

pub(crate) fn status_50(plugin: Plugin) {
    let bed = Bed::with_flags(plugin, &["--pod-cidr", "10.244.1.0/30"]);
    let (ctr, config) = (Ctr::new(), newest(&bed, "n-status50"));
    bed.add(&ctr, &config);
    let told = bed.verb("STATUS", &config).code(50);
    assert!(told.contains("10.244.1.0/30"), "names what is used up: {told}");
    let told = bed.call("ADD", &Ctr::new(), &config).code(11);
    assert!(told.contains("10.244.1.0/30"), "{told}");
    bed.kill_agent();
    let told = bed.verb("STATUS", &config).code(50);
    assert!(told.contains("cni.sock"), "names what does not answer: {told}");
}

pub(crate) fn status_asks_ipam(bed: &Bed) {
    let ipam = FakeIpam::new();
    let config = with(ipam.config(bed, "n-ipam-status"), json!({"cniVersion": "1.1.0"}));
    ipam.verb(bed, "STATUS", &config).silent();
    assert_eq!(ipam.calls(), ["STATUS"]);
    ipam.fails("STATUS", 50, "no addresses are left");
    let told = ipam.verb(bed, "STATUS", &config).code(50);
    assert!(told.contains("no addresses are left"), "{told}");
}

pub(crate) fn add_whatever_status_said(bed: &Bed) {
    let ipam = FakeIpam::new();
    let (ctr, config) = (Ctr::new(), with(ipam.config(bed, "n-anyway"), json!({"cniVersion": "1.1.0"})));
    ipam.gives("1.1.0", "10.201.53.2", json!({}));
    ipam.fails("STATUS", 50, "not now");
    ipam.verb(bed, "STATUS", &config).code(50);
    let result = ipam.call(bed, "ADD", &ctr, &config).result();
    assert_eq!(addresses(ctr.netns(), "eth0"), [IpAddr::from([10, 201, 53, 2])]);
    ipam.call(bed, "DEL", &ctr, &config).silent();
    bed.assert_gone(&result);
}

pub(crate) fn status_changes_nothing(plugin: Plugin) {
    let bed = Bed::new(plugin);
    let (ctr, config) = (Ctr::new(), newest(&bed, "n-idle"));
    bed.at_rest();
    bed.add(&ctr, &config);
    let before = bed.everything();
    let start = std::time::Instant::now();
    for _ in 0..20 {
        bed.verb("STATUS", &config).silent();
    }
    // For the reader; a busy machine says nothing by being slow.
    println!("STATUS: {} us each, with the start of a process", start.elapsed().as_micros() / 20);
    assert_eq!(bed.everything(), before);
    bed.del(&ctr, &config);
}

fn valid(ctrs: &[&Ctr]) -> Value {
    ctrs.iter().map(|ctr| json!({"containerID": ctr.id, "ifname": ctr.ifname})).collect()
}

fn gc(bed: &Bed, config: &Value, keep: &[&Ctr]) -> Outcome {
    bed.verb("GC", &with(config.clone(), json!({"cni.dev/valid-attachments": valid(keep)})))
}

#[track_caller]
fn assert_there(bed: &Bed, ctr: &Ctr, result: &Value) {
    assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(result));
    let links = links_of(&bed.node.netns);
    assert!(node_interfaces(result).iter().all(|name| links.contains(name)), "{result}: {links:?}");
}

pub(crate) fn gc_frees_what_is_not_listed(bed: &Bed) {
    let config = newest(bed, "n-gc");
    let (stale, kept) = (Ctr::new(), Ctr::new());
    let mapped = json!({"portMappings": [{"hostPort": 10055, "containerPort": 80, "protocol": "tcp"}]});
    let first = bed.add(&stale, &with(config.clone(), json!({"runtimeConfig": mapped})));
    let second = bed.add(&kept, &config);
    gc(bed, &config, &[&kept]).silent();
    bed.assert_gone(&first);
    assert_there(bed, &kept, &second);
    let rules = checked(bed.node.netns.command("nft").args(["list", "ruleset"]));
    assert!(!rules.contains("10055"), "{rules}");
    ips_of(&first).into_iter().filter(IpAddr::is_ipv4).for_each(|ip| bed.assert_free("n-gc", ip));
    bed.del(&kept, &config);
}

pub(crate) fn gc_goes_on_past_errors(bed: &Bed) {
    let ipam = FakeIpam::new();
    let config = with(ipam.config(bed, "n-gc-errors"), json!({"cniVersion": "1.1.0"}));
    let stale = [Ctr::new(), Ctr::new()];
    let mut results = Vec::new();
    for (n, ctr) in stale.iter().enumerate() {
        ipam.gives("1.1.0", &format!("10.201.56.1{n}"), json!({}));
        results.push(ipam.call(bed, "ADD", ctr, &config).result());
    }
    ipam.fails("GC", 123, "one thing could not be freed");
    let config = with(config, json!({"cni.dev/valid-attachments": []}));
    let told = ipam.verb(bed, "GC", &config).refusal();
    assert!(told.text.contains("one thing could not be freed"), "{told:?}");
    results.iter().for_each(|result| bed.assert_gone(result));
}

pub(crate) fn gc_asks_ipam(bed: &Bed) {
    let ipam = FakeIpam::new();
    let keep = valid(&[&Ctr::new()]);
    let config = with(
        ipam.config(bed, "n-gc-ipam"),
        json!({"cniVersion": "1.1.0", "cni.dev/valid-attachments": keep}),
    );
    ipam.verb(bed, "GC", &config).silent();
    assert_eq!(ipam.calls(), ["GC"]);
    assert_eq!(ipam.stdin("GC")["cni.dev/valid-attachments"], keep);
}

pub(crate) fn gc_takes_both_keys(bed: &Bed) {
    for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
        let config = newest(bed, "n-gc-keys");
        let (stale, kept) = (Ctr::new(), Ctr::new());
        let (first, second) = (bed.add(&stale, &config), bed.add(&kept, &config));
        bed.verb("GC", &with(config.clone(), json!({key: valid(&[&kept])}))).silent();
        bed.assert_gone(&first);
        assert_there(bed, &kept, &second);
        bed.del(&kept, &config);
    }
}

pub(crate) fn gc_keeps_all_that_is_listed(plugin: Plugin) {
    let bed = Bed::new(plugin);
    let config = newest(&bed, "n-gc-list");
    let (before, after, stale) = (Ctr::new(), Ctr::new(), Ctr::new());
    let (first, third) = (bed.add(&before, &config), bed.add(&stale, &config));
    bed.kill_agent();
    bed.start();
    let second = bed.add(&after, &config);
    gc(&bed, &config, &[&before, &after]).silent();
    assert_there(&bed, &before, &first);
    assert_there(&bed, &after, &second);
    bed.assert_gone(&third);
}

pub(crate) fn gc_spares_other_networks(bed: &Bed) {
    let (mine, theirs) = (newest(bed, "n-gc-mine"), newest(bed, "n-gc-theirs"));
    let (a, b) = (Ctr::new(), Ctr::new());
    let (first, second) = (bed.add(&a, &mine), bed.add(&b, &theirs));
    gc(bed, &mine, &[]).silent();
    bed.assert_gone(&first);
    assert_there(bed, &b, &second);
    bed.del(&b, &theirs);
}

pub(crate) fn gc_without_the_key(bed: &Bed) {
    let (ctr, config) = (Ctr::new(), newest(bed, "n-gc-absent"));
    let result = bed.add(&ctr, &config);
    let outcome = bed.verb("GC", &config);
    if outcome.status != Some(0) {
        assert!(outcome.refusal().text.contains("valid-attachments"), "{outcome:?}");
    }
    assert_there(bed, &ctr, &result);
    gc(bed, &config, &[]).silent();
    bed.assert_gone(&result);
}

pub(crate) fn gc_twice(plugin: Plugin) {
    let bed = Bed::new(plugin);
    let config = newest(&bed, "n-gc-twice");
    bed.at_rest();
    let (stale, kept) = (Ctr::new(), Ctr::new());
    let (first, _) = (bed.add(&stale, &config), bed.add(&kept, &config));
    // The table of endpoints follows in its own time: two addresses of the node, two of each attachment.
    let told = |count: usize| {
        wait_for(&format!("{count} endpoints"), || {
            let all = bed.everything();
            let end = format!("shv_net_endpts: {count}");
            if all.iter().any(|line| line.ends_with(&end)) { Ok(all) } else { Err(format!("{all:?}")) }
        })
    };
    told(6);
    gc(&bed, &config, &[&kept]).silent();
    bed.assert_gone(&first);
    let before = told(4);
    gc(&bed, &config, &[&kept]).silent();
    assert_eq!(bed.everything(), before);
}

/// A VXLAN device that takes what the overlay's needs, so that it can't be put back.
pub(crate) fn status_51(plugin: Plugin) {
    let dir = tempfile::tempdir().expect("a directory");
    let peers = dir.path().join("peers.json");
    let list =
        json!({"node": [{"name": "node-2", "node-ips": ["192.0.2.77"], "pod-cidrs": ["10.244.2.0/24"]}]});
    std::fs::write(&peers, list.to_string()).expect("write the peers");
    let peers = peers.display().to_string();
    let flags = ["--pod-cidr", "10.244.1.0/24", "--overlay", "vxlan", "--peers", &peers];
    let bed = Bed::with_flags(plugin, &flags);
    let config = newest(&bed, "n-status51");
    let ns = &bed.node.netns;
    let device = wait_for("the overlay's device", || {
        let rows = ip_json(ns, &["-d", "link", "show", "type", "vxlan"]);
        rows.as_array().and_then(|rows| rows.first().cloned()).ok_or("none")
    });
    bed.verb("STATUS", &config).silent();
    let name = device["ifname"].as_str().expect("a name");
    let data = &device["linkinfo"]["info_data"];
    let script = format!(
        "link del {name}\nlink add thief0 type vxlan id {} dstport {} local 192.0.2.10 dev eth0 nolearning\n",
        data["id"], data["port"]
    );
    let batch = dir.path().join("batch");
    std::fs::write(&batch, script).expect("write a script");
    // Held still, so that the thief is faster than the repair.
    let agent = Pid::from_raw(bed.agent_pid().try_into().expect("a process id"));
    kill(agent, Signal::SIGSTOP).expect("hold the agent");
    let stolen = ns.command("ip").arg("-batch").arg(&batch).output().expect("start ip");
    kill(agent, Signal::SIGCONT).expect("let the agent go on");
    assert!(stolen.status.success(), "{}", String::from_utf8_lossy(&stolen.stderr));
    wait_for("STATUS 51", || {
        let outcome = bed.verb("STATUS", &config);
        if outcome.status == Some(0) { Err(format!("{outcome:?}")) } else { Ok(outcome.code(51)) }
    });
    ns.ip(&["link", "del", "thief0"]);
    bed.wait_serving();
}
