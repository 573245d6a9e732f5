//! PURE: the rules that kube-proxy's iptables mode lays for services, for comparison: a dispatch chain that is walked
//! rule by rule, a chain a service that draws an endpoint, a chain an endpoint that rewrites.
//!
//! Source of the structure: the chains that `kube-proxy --proxy-mode iptables` (1.36) leaves in `iptables-save`.

use crate::bed::PODS;
use crate::spec::{PORT, Spec, TARGET_PORT, name};
use std::fmt::Write as _;
use std::net::Ipv4Addr;

/// Adds a line; writing to a String can't fail.
macro_rules! line {
    ($out:expr, $($text:tt)*) => { writeln!($out, $($text)*).unwrap_or_default() };
}

/// Input of one `iptables-restore` that puts all services in.
pub(crate) fn all(spec: Spec) -> String {
    let (mut chains, mut dispatch, mut ports, mut rules) =
        (base(), String::new(), String::new(), String::new());
    for service in 0..spec.services {
        let endpoints = spec.endpoints(service);
        for proto in protocols(spec, service) {
            chains_of(&mut chains, spec, service, proto, &endpoints);
            rules_of(&mut rules, spec, service, proto, &endpoints);
            let (vip, key) = (spec.vip(service), name(service));
            line!(
                dispatch,
                "-A KUBE-SERVICES -d {vip}/32 -p {proto} -m comment --comment \"{key} cluster IP\" -m {proto} \
                 --dport {PORT} -j KUBE-SVC-{}",
                id(service, proto)
            );
            if spec.node_port(service) != 0 {
                line!(
                    ports,
                    "-A KUBE-NODEPORTS -p {proto} -m comment --comment \"{key}\" -m {proto} --dport {} -j KUBE-EXT-{}",
                    spec.node_port(service),
                    id(service, proto)
                );
            }
        }
    }
    let last = "-A KUBE-SERVICES -m comment --comment \"node ports\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n";
    format!("{chains}{BASE_RULES}{dispatch}{last}{ports}{rules}COMMIT\n{FILTER}")
}

/// Input of one `iptables-restore --noflush` after the endpoints of a service changed.
pub(crate) fn change(spec: Spec, service: u32, before: &[Ipv4Addr], after: &[Ipv4Addr]) -> String {
    let mut text = "*nat\n".to_owned();
    let mut rules = String::new();
    for proto in protocols(spec, service) {
        let id = id(service, proto);
        chains_of(&mut text, spec, service, proto, after);
        rules_of(&mut rules, spec, service, proto, after);
        for gone in before.iter().filter(|at| !after.contains(at)) {
            // Declared, which empties it, before it can be deleted.
            line!(text, ":KUBE-SEP-{id}-{:08X} - [0:0]", u32::from(*gone));
            line!(rules, "-X KUBE-SEP-{id}-{:08X}", u32::from(*gone));
        }
    }
    format!("{text}{rules}COMMIT\n")
}

fn protocols(spec: Spec, service: u32) -> &'static [&'static str] {
    if spec.node_port(service) != 0 { &["tcp", "udp"] } else { &["tcp"] }
}

fn id(service: u32, proto: &str) -> String {
    format!("{service:06}{}", &proto[..1])
}

fn base() -> String {
    let chains = ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-MARK-MASQ", "KUBE-POSTROUTING"];
    chains.iter().fold("*nat\n".to_owned(), |text, chain| format!("{text}:{chain} - [0:0]\n"))
}

const BASE_RULES: &str = "\
-A PREROUTING -m comment --comment \"service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"postrouting\" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
";

const FILTER: &str = "\
*filter
:KUBE-FORWARD - [0:0]
:KUBE-FIREWALL - [0:0]
-A FORWARD -m comment --comment \"forwarding\" -j KUBE-FORWARD
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

fn chains_of(text: &mut String, spec: Spec, service: u32, proto: &str, endpoints: &[Ipv4Addr]) {
    let id = id(service, proto);
    line!(text, ":KUBE-SVC-{id} - [0:0]");
    if spec.node_port(service) != 0 {
        line!(text, ":KUBE-EXT-{id} - [0:0]");
    }
    for endpoint in endpoints {
        line!(text, ":KUBE-SEP-{id}-{:08X} - [0:0]", u32::from(*endpoint));
    }
}

fn rules_of(text: &mut String, spec: Spec, service: u32, proto: &str, endpoints: &[Ipv4Addr]) {
    let (id, key, vip) = (id(service, proto), name(service), spec.vip(service));
    if spec.node_port(service) != 0 {
        line!(text, "-A KUBE-EXT-{id} -m comment --comment \"masquerade {key}\" -j KUBE-MARK-MASQ");
        line!(text, "-A KUBE-EXT-{id} -j KUBE-SVC-{id}");
    }
    line!(
        text,
        "-A KUBE-SVC-{id} ! -s {PODS} -d {vip}/32 -p {proto} -m comment --comment \"{key} cluster IP\" -m {proto} \
         --dport {PORT} -j KUBE-MARK-MASQ"
    );
    for (index, endpoint) in endpoints.iter().enumerate() {
        let sep = format!("KUBE-SEP-{id}-{:08X}", u32::from(*endpoint));
        let left = endpoints.len() - index;
        let chance = match left {
            1 => String::new(),
            _ => format!(" -m statistic --mode random --probability {:.10}", 1.0 / left as f64),
        };
        let comment = format!("-m comment --comment \"{key} -> {endpoint}:{TARGET_PORT}\"");
        line!(text, "-A KUBE-SVC-{id} {comment}{chance} -j {sep}");
        line!(text, "-A {sep} -s {endpoint}/32 -m comment --comment \"{key}\" -j KUBE-MARK-MASQ");
        line!(
            text,
            "-A {sep} -p {proto} -m comment --comment \"{key}\" -m {proto} -j DNAT --to-destination {endpoint}:{TARGET_PORT}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Backends;
    use std::collections::BTreeSet;

    const SPEC: Spec = Spec { services: 10, endpoints: 4, backends: Backends::Unique };

    fn declared(text: &str) -> BTreeSet<&str> {
        text.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next()).collect()
    }

    #[test]
    fn every_chain_is_declared_before_it_is_used() {
        let text = all(SPEC);
        let known = declared(&text);
        for line in text.lines().filter(|line| line.starts_with("-A KUBE")) {
            let chain = line.split(' ').nth(1).unwrap();
            let target = line.split(" -j ").nth(1).unwrap().split(' ').next().unwrap();
            assert!(known.contains(chain), "{line}");
            assert!(known.contains(target) || !target.starts_with("KUBE-"), "{line}");
            assert!(chain.len() < 29, "the kernel takes 28 characters: {chain}");
        }
        assert_eq!(text.matches("-A KUBE-SERVICES -d").count(), 10 + 3);
    }

    #[test]
    fn endpoints_are_drawn_alike() {
        let text = all(SPEC);
        for chance in ["0.2500000000", "0.3333333333", "0.5000000000"] {
            assert_eq!(text.matches(chance).count(), 13, "{chance}");
        }
    }

    #[test]
    fn a_change_writes_the_service_anew_and_deletes_what_left() {
        let text = change(SPEC, 1, &SPEC.endpoints(1), &SPEC.changed_endpoints(1, 0));
        assert_eq!(text.matches("-j DNAT").count(), 4);
        let gone = format!("KUBE-SEP-000001t-{:08X}", u32::from(SPEC.endpoints(1)[3]));
        assert!(text.contains(&format!(":{gone} - [0:0]")) && text.contains(&format!("-X {gone}")));
        assert!(!text.contains("KUBE-SERVICES"));
    }
}
