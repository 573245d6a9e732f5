//! Whatever moment an agent dies at, the next one finds what was left: leftovers go, live pods are whole again.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use sheave_agent::network::{Network, Report};
use sheave_harness::{NetNs, require_root};

use crate::network_pods::{Node, config, pod, runtime, talk};

const BOTH: [&str; 2] = ["10.244.7.0/24", "fd00:244:7::/64"];
/// Set in the process that is killed: where its leases are, and the pods' namespaces.
const CHURN: &str = "SHEAVE_TEST_CHURN";

fn live(uids: &[&str]) -> Vec<String> {
    uids.iter().map(|uid| (*uid).to_owned()).collect()
}

fn lease_files(node: &Node) -> Vec<String> {
    let dir = std::fs::read_dir(node.dir.path().join("network/leases")).expect("list leases");
    let mut names: Vec<String> =
        dir.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[track_caller]
fn assert_clean(report: &Report) {
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn an_agent_that_starts_again_adopts_and_tidies() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let network = node.open(&BOTH);
    let ((a, a_path), (_b, b_path)) = (pod(), pod());
    let attached = node.block_on(network.attach("a", &a_path)).expect("attach a");
    node.block_on(network.attach("b", &b_path)).expect("attach b");
    // What this agent connected it also keeps, however long its list of live pods is out of date.
    assert_clean(&node.block_on(network.reconcile(&live(&["a", "b"]))).expect("reconcile"));
    assert_clean(&node.block_on(network.reconcile(&live(&["a"]))).expect("reconcile"));
    drop(network);
    let network = node.open(&BOTH);
    let report = node.block_on(network.reconcile(&live(&["a"]))).expect("reconcile");
    assert_eq!(report.removed.len(), 2, "{report:?}");
    assert!(report.removed.iter().all(|what| what.contains("pod b")), "{report:?}");
    assert_eq!((report.repaired, report.broken, report.failed), (vec![], vec![], vec![]));
    assert_eq!(node.links(), std::slice::from_ref(&attached.host_link));
    assert_eq!(lease_files(&node), ["a.json"]);
    assert_eq!(network.addresses("a"), Some(attached.ips.clone()));
    assert_eq!(talk(&node.netns, &a, attached.ips[0]).to_string(), "192.0.2.1");
    assert_clean(&node.block_on(network.reconcile(&live(&["a"]))).expect("reconcile"));
}

#[test]
fn what_is_missing_of_a_live_pod_is_put_back() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let network = node.open(&BOTH);
    let (a, path) = pod();
    let attached = node.block_on(network.attach("a", &path)).expect("attach");
    let link = attached.host_link.as_str();
    let damage: [(&NetNs, Vec<&str>); 8] = [
        (&node.netns, vec!["link", "set", link, "down"]),
        (&node.netns, vec!["route", "flush", "dev", link]),
        (&node.netns, vec!["neigh", "flush", "dev", link, "nud", "permanent"]),
        (&node.netns, vec!["link", "del", link]),
        (&a, vec!["link", "set", "eth0", "down"]),
        (&a, vec!["addr", "flush", "dev", "eth0", "scope", "global"]),
        (&a, vec!["route", "flush", "dev", "eth0"]),
        (&a, vec!["link", "set", "lo", "down"]),
    ];
    for (side, command) in damage {
        side.ip(&command);
        let report = node.block_on(network.reconcile(&live(&["a"]))).expect("reconcile");
        assert!(!report.repaired.is_empty(), "{command:?}: {report:?}");
        assert!(report.broken.is_empty() && report.failed.is_empty(), "{command:?}: {report:?}");
        for (ip, from) in attached.ips.iter().zip(["192.0.2.1", "2001:db8::1"]) {
            assert_eq!(talk(&node.netns, &a, *ip).to_string(), from, "{command:?}");
        }
        assert_clean(&node.block_on(network.reconcile(&live(&["a"]))).expect("reconcile again"));
    }
    node.netns.ip(&["link", "set", "up0", "mtu", "1300"]);
    node.block_on(network.reconcile(&live(&["a"]))).expect("reconcile");
    assert!(a.ip(&["-o", "link", "show", "eth0"]).contains("mtu 1300 "), "the uplink's MTU is followed");
}

#[test]
fn pods_whose_namespace_is_gone_are_told() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let network = node.open(&BOTH);
    let (a, path) = pod();
    node.block_on(network.attach("a", &path)).expect("attach");
    drop(a);
    let report = node.block_on(network.reconcile(&live(&["a", "b"]))).expect("reconcile");
    let broken: Vec<&str> = report.broken.iter().map(|(uid, _)| uid.as_str()).collect();
    assert_eq!(broken, ["a", "b"], "{report:?}");
}

#[test]
fn a_lost_lease_is_read_back_from_the_kernel() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let network = node.open(&BOTH);
    let ((a, path), (_b, b_path)) = (pod(), pod());
    let attached = node.block_on(network.attach("a", &path)).expect("attach");
    drop(network);
    std::fs::write(node.dir.path().join("network/leases/a.json"), "{").expect("damage the lease");
    let network = node.open(&BOTH);
    let report = node.block_on(network.reconcile(&live(&["a"]))).expect("reconcile");
    assert_eq!(report.repaired.len(), 1, "{report:?}");
    assert_eq!(network.addresses("a"), Some(attached.ips.clone()));
    let other = node.block_on(network.attach("b", &b_path)).expect("attach b");
    assert!(other.ips.iter().all(|ip| !attached.ips.contains(ip)), "{other:?}");
    assert_eq!(node.block_on(network.attach("a", &path)).expect("attach a again"), attached);
    assert_eq!(talk(&node.netns, &a, attached.ips[0]).to_string(), "192.0.2.1");
}

#[test]
fn two_hundred_pods_come_and_go_and_leave_nothing() {
    if !require_root() {
        return;
    }
    let node = Node::new();
    let network = node.open(&["10.244.0.0/16", "fd00:244::/64"]);
    let pods: Vec<_> = (0..4).map(|_| pod()).collect();
    node.block_on(async {
        for round in 0..50 {
            let uids: Vec<String> = (0..pods.len()).map(|n| format!("pod-{round}-{n}")).collect();
            let attached =
                uids.iter().zip(&pods).map(|(uid, (_, path))| network.attach(uid, path)).collect::<Vec<_>>();
            let mut ips = Vec::new();
            for attachment in attached {
                ips.extend(attachment.await.expect("attach").ips);
            }
            ips.sort();
            ips.dedup();
            assert_eq!(ips.len(), 2 * pods.len(), "no address twice");
            for uid in &uids {
                network.detach(uid).await.expect("detach");
            }
        }
    });
    assert!(node.links().is_empty());
    assert!(lease_files(&node).is_empty());
    for family in ["-4", "-6"] {
        let routes = node.netns.ip(&[family, "route", "show", "table", "all"]);
        assert!(!routes.contains("shv") && !routes.contains("10.244"), "{routes}");
        let neighbours = node.netns.ip(&[family, "neigh", "show", "nud", "all"]);
        assert!(!neighbours.contains("shv"), "{neighbours}");
    }
    for (netns, _) in &pods {
        assert!(!netns.ip(&["-o", "link", "show"]).contains("eth0"));
    }
}

/// What the killed process does: pods come and go for ever.
fn churn(spec: &str) -> ! {
    let mut parts = spec.split(' ').map(PathBuf::from);
    let dir = parts.next().expect("a directory");
    let netns: Vec<PathBuf> = parts.collect();
    runtime().block_on(async {
        let network = Network::open(config(&dir, &BOTH)).await.expect("open");
        println!("churning");
        loop {
            for (n, path) in netns.iter().enumerate() {
                network.attach(&format!("pod-{n}"), path).await.expect("attach");
            }
            for n in 0..netns.len() {
                network.detach(&format!("pod-{n}")).await.expect("detach");
            }
        }
    })
}

#[test]
fn killed_at_any_step_nothing_is_lost_or_left() {
    if let Ok(spec) = std::env::var(CHURN) {
        churn(&spec);
    }
    if !require_root() {
        return;
    }
    let node = Node::new();
    let pods: Vec<_> = (0..2).map(|_| pod()).collect();
    let paths: Vec<String> = pods.iter().map(|(_, path)| path.display().to_string()).collect();
    let spec = format!("{} {}", node.dir.path().display(), paths.join(" "));
    let mut found = 0;
    for round in 0..30_u64 {
        let mut command = Command::new(std::env::current_exe().expect("the test program's own path"));
        command.args([
            "network_repair::killed_at_any_step_nothing_is_lost_or_left",
            "--exact",
            "--nocapture",
        ]);
        command.env(CHURN, &spec).stdout(Stdio::piped()).stderr(Stdio::inherit());
        node.netns.apply(&mut command);
        let mut child = command.spawn().expect("start the churn");
        let out = BufReader::new(child.stdout.take().expect("its output"));
        let started = out.lines().map_while(Result::ok).any(|line| line.ends_with("churning"));
        assert!(started, "the churn did not start");
        // Not a wait for anything: the rounds spread the kill over one attach and detach.
        std::thread::sleep(Duration::from_micros(700 * round));
        child.kill().expect("kill the churn");
        child.wait().expect("collect the churn");

        let network = node.open(&BOTH);
        let alive = if round % 2 == 0 { live(&["pod-0"]) } else { Vec::new() };
        let report = node.block_on(network.reconcile(&alive)).expect("reconcile");
        assert!(report.failed.is_empty(), "round {round}: {report:?}");
        found += usize::from(!report.is_clean());
        for uid in &alive {
            let ips = node.block_on(network.attach(uid, &pods[0].1)).expect("attach what lives").ips;
            talk(&node.netns, &pods[0].0, ips[0]);
            talk(&node.netns, &pods[0].0, ips[1]);
            assert_clean(&node.block_on(network.reconcile(&alive)).expect("reconcile again"));
            node.block_on(network.detach(uid)).expect("detach");
        }
        assert!(node.links().is_empty(), "round {round}: {report:?}: {:?}", node.links());
        assert!(lease_files(&node).is_empty(), "round {round}: {report:?}: {:?}", lease_files(&node));
        assert_clean(&node.block_on(network.reconcile(&[])).expect("reconcile nothing"));
    }
    assert!(found > 5, "the kills hit only idle moments: {found}");
}
