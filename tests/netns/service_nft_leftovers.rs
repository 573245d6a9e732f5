//! Rules that a kube-proxy left: real ones, in each of the places where its modes lay them.

use std::process::{Command, Stdio};

use sheave_agent::dataplane::{Driver, KubeProxyLeftovers, Mode, remove};
use sheave_agent::service::Proto;
use sheave_harness::netns::checked;
use sheave_harness::{isolated, require_program};

use crate::service_nft_bed::{Bed, here, node_port, pod, service, slices};
use crate::service_world::{ask, chain, ip};

const FAMILIES: [(&str, &str); 2] = [("iptables", "10.96.0.1/32"), ("ip6tables", "fd00:96::1/128")];

fn run(program: &str, args: &[&str]) {
    checked(Command::new(program).args(args));
}

/// Lays rules of the shape that kube-proxy's iptables mode has, beside ones of the kubelet and of somebody else.
fn lay(variant: &str) {
    for (family, vip) in FAMILIES {
        let program = format!("{family}-{variant}");
        for line in [
            "-t nat -N KUBE-SERVICES",
            "-t nat -N KUBE-SVC-AAAA",
            "-t nat -N KUBE-SEP-BBBB",
            "-t nat -N KUBE-KUBELET-CANARY",
            "-t nat -N OTHER",
            "-t nat -A PREROUTING -m comment --comment kubernetes-portals -j KUBE-SERVICES",
            "-t nat -A OUTPUT -j KUBE-SERVICES",
            "-t nat -A PREROUTING -j OTHER",
            &format!("-t nat -A KUBE-SERVICES -d {vip} -p tcp -m tcp --dport 80 -j KUBE-SVC-AAAA"),
            "-t nat -A KUBE-SVC-AAAA -j KUBE-SEP-BBBB",
            "-t filter -N KUBE-FORWARD",
            "-t filter -A FORWARD -j KUBE-FORWARD",
            "-t filter -N KUBE-FIREWALL",
            "-t filter -A OUTPUT -j KUBE-FIREWALL",
        ] {
            run(&program, &line.split(' ').collect::<Vec<_>>());
        }
    }
}

fn saved(variant: &str) -> String {
    let save = |family: &str| {
        let mut command = Command::new(format!("{family}-{variant}-save"));
        checked(command.stderr(Stdio::null()))
    };
    FAMILIES.map(|(family, _)| save(family)).concat()
}

fn refusal(bed: &Bed) -> String {
    chain(&Driver::open(&bed.config).err().expect("it must refuse"))
}

/// Refuses with the given words, cleans up when told, and then balances.
fn refuses_and_cleans(bed: &mut Bed, words: &[&str]) {
    for mode in [Mode::Nftables, Mode::Ebpf] {
        bed.config.mode = Some(mode);
        let error = refusal(bed);
        for word in words.iter().copied().chain(["--kube-proxy-leftovers cleanup"]) {
            assert!(error.contains(word), "{word} is not in: {error}");
        }
    }
    bed.config.mode = Some(Mode::Nftables);
    bed.config.kube_proxy_leftovers = KubeProxyLeftovers::Cleanup;
    let mut events = vec![service("web", 1, Proto::Tcp, |_| {})];
    events.extend(slices("web", Proto::Tcp, &[here(0)]));
    drop(bed.driver(events));
    assert_eq!(bed.client.run(|| ask(node_port(1, 0))).expect("balanced").0, pod(0, 0));
    // Clean now: nothing is refused.
    bed.config.kube_proxy_leftovers = KubeProxyLeftovers::Refuse;
    drop(Driver::open(&bed.config).unwrap_or_else(|e| panic!("open: {}", chain(&e))));
}

fn only_others_are_left(variant: &str) {
    let left = saved(variant);
    for gone in ["KUBE-SERVICES", "KUBE-SVC-AAAA", "KUBE-SEP-BBBB", "KUBE-FORWARD"] {
        assert!(!left.contains(gone), "{gone} is left:\n{left}");
    }
    for kept in ["KUBE-KUBELET-CANARY", "-j KUBE-FIREWALL", "-j OTHER"] {
        assert!(left.matches(kept).count() >= 2, "{kept} is gone:\n{left}");
    }
}

#[test]
fn service_nft_leftovers_of_kube_proxy_in_iptables_over_nf_tables() {
    isolated(module_path!(), "service_nft_leftovers_of_kube_proxy_in_iptables_over_nf_tables", |_| {
        if !require_program("iptables-nft") {
            return;
        }
        let mut bed = Bed::new(1);
        lay("nft");
        refuses_and_cleans(
            &mut bed,
            &["3 chains in iptables (nf_tables) table nat", "ip6tables (nf_tables) table filter"],
        );
        only_others_are_left("nft");
    });
}

#[test]
fn service_nft_leftovers_of_kube_proxy_in_legacy_iptables() {
    isolated(module_path!(), "service_nft_leftovers_of_kube_proxy_in_legacy_iptables", |_| {
        if !require_program("iptables-legacy") {
            return;
        }
        let mut bed = Bed::new(1);
        lay("legacy");
        refuses_and_cleans(&mut bed, &["4 chains in iptables-legacy", "4 chains in ip6tables-legacy"]);
        only_others_are_left("legacy");
    });
}

#[test]
fn service_nft_leftovers_of_kube_proxy_in_nftables_and_ipvs() {
    isolated(module_path!(), "service_nft_leftovers_of_kube_proxy_in_nftables_and_ipvs", |_| {
        if !require_program("nft") {
            return;
        }
        let mut bed = Bed::new(1);
        run("nft", &["add", "table", "ip", "kube-proxy"]);
        run("nft", &["add", "chain", "ip", "kube-proxy", "services"]);
        run("nft", &["add", "table", "ip6", "kube-proxy"]);
        run("nft", &["add", "table", "inet", "mine"]);
        // A pair stands for the dummy device, which not every kernel has.
        ip(&["link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "peer0"]);
        refuses_and_cleans(
            &mut bed,
            &["nftables table ip kube-proxy", "nftables table ip6 kube-proxy", "device kube-ipvs0"],
        );
        assert_eq!(remove(Mode::Nftables, &bed.config).len(), 0);
        let left = checked(Command::new("nft").args(["list", "tables"]));
        assert_eq!(left.trim(), "table inet mine");
        assert!(
            !Command::new("ip").args(["link", "show", "kube-ipvs0"]).output().expect("ip").status.success()
        );
    });
}

#[test]
fn service_nft_leftovers_of_kube_proxy_are_ignored_on_request() {
    isolated(module_path!(), "service_nft_leftovers_of_kube_proxy_are_ignored_on_request", |_| {
        if !require_program("iptables-nft") {
            return;
        }
        let mut bed = Bed::new(1);
        lay("nft");
        let before = saved("nft");
        bed.config.kube_proxy_leftovers = KubeProxyLeftovers::Ignore;
        drop(bed.driver(Vec::new()));
        let rules = |text: &str| {
            text.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(rules(&saved("nft")), rules(&before));
    });
}
