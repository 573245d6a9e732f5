//! The rules beside IPVS, as text for nft. Invariant: pure; there are as many rules with one service as with
//! thousands, services are elements of sets and maps.
//!
//! Only packets that begin something are looked at. What goes to a frontend is classed by its address and port:
//! refused, dropped, marked for the service with endpoints of this node, or marked to be masqueraded if it has come
//! from outside and leaves for another node. The node's own connections to a service's address have that address as
//! their source and are always masqueraded, as is what a pod sends to itself.

use super::book::{Class, Element, Value, protocol_name};
use crate::service::{Family, FrontendKey};
use ipnetwork::IpNetwork;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Name of the tables.
pub(super) const TABLE: &str = "sheave_ipvs";
/// Chain by which the table is known to be whole.
pub(super) const LAST_CHAIN: &str = "postrouting";

/// Mark of what may have to be masqueraded. No bit of it is in the marks of services.
const MASQUERADE: u32 = 0x0100_0000;

/// What the fixed part depends on.
#[derive(Clone, Debug, Default)]
pub(super) struct Setting {
    /// Ranges of pods' addresses.
    pub(super) pods: Vec<IpNetwork>,
    /// Beginnings of the names of pods' devices.
    pub(super) pod_links: Vec<String>,
    /// Masquerade whatever goes to a service.
    pub(super) masquerade_all: bool,
    /// The kernel can look at ARP.
    pub(super) arp: bool,
}

const PROTOCOLS: [&str; 3] = ["tcp", "udp", "sctp"];
const CLASSES: [Class; 4] = [Class::Open, Class::Local, Class::Inside, Class::Refuse];

fn chain(class: Class, ranged: bool) -> &'static str {
    match (class, ranged) {
        (Class::Open, false) => "open",
        (Class::Open, true) => "ranged_open",
        (Class::Local, false) => "local",
        (Class::Local, true) => "ranged_local",
        (Class::Inside, false) => "inside",
        (Class::Inside, true) => "ranged_inside",
        (Class::Refuse, _) => "refuse",
    }
}

/// Removes the tables, whether they are there or not.
pub(super) fn delete(arp: bool) -> String {
    let families: &[&str] = if arp { &["inet", "arp"] } else { &["inet"] };
    families.iter().fold(String::new(), |text, family| {
        text + &format!("add table {family} {TABLE}\ndelete table {family} {TABLE}\n")
    })
}

/// Replaces the tables by ones with these elements, in one transaction.
pub(super) fn replace(setting: &Setting, elements: impl Iterator<Item = (Element, Value)>) -> String {
    let mut text = delete(setting.arp);
    writeln!(text, "table inet {TABLE} {{").ok();
    for (family, addr) in [("4", "ipv4_addr"), ("6", "ipv6_addr")] {
        sets(&mut text, setting, family, addr);
    }
    chains(&mut text, setting);
    text.push_str("}\n");
    if setting.arp {
        // Others on the link must not learn that every node has the addresses of services.
        writeln!(text, "table arp {TABLE} {{\n set given4 {{ type ipv4_addr; }}").ok();
        text.push_str(" chain input { type filter hook input priority filter; policy accept;\n");
        text.push_str("  arp operation request arp daddr ip @given4 drop\n }\n}\n");
    }
    changes(&mut text, setting.arp, elements.map(|(element, value)| (element, None, Some(value))));
    text
}

/// Changes elements, in one transaction.
pub(super) fn update(
    setting: &Setting,
    changed: impl IntoIterator<Item = (Element, Option<Value>, Option<Value>)>,
) -> String {
    let mut text = String::new();
    changes(&mut text, setting.arp, changed.into_iter());
    text
}

fn sets(text: &mut String, setting: &Setting, family: &str, addr: &str) {
    for line in [
        format!("map frontends{family} {{ type {addr} . inet_proto . inet_service : verdict; }}"),
        format!("map node_ports{family} {{ type inet_proto . inet_service : verdict; }}"),
        format!("map marks{family} {{ type {addr} . inet_proto . inet_service : mark; }}"),
        format!("map node_marks{family} {{ type inet_proto . inet_service : mark; }}"),
        format!("set given{family} {{ type {addr}; }}"),
        format!("set node{family} {{ type {addr}; }}"),
        format!("set endpoints{family} {{ type {addr}; }}"),
        format!("set hairpin{family} {{ type {addr} . {addr}; }}"),
    ] {
        writeln!(text, " {line}").ok();
    }
    // One a protocol: some kernels refuse protocols in keys of sets with ranges.
    for proto in PROTOCOLS {
        let clients = format!("inet_service . {addr}; flags interval;");
        writeln!(text, " set ranges_{proto}{family} {{ type {addr} . {clients} }}").ok();
        writeln!(text, " set node_ranges_{proto}{family} {{ type {clients} }}").ok();
    }
    let pods: Vec<String> = setting
        .pods
        .iter()
        .filter(|range| range.is_ipv4() == (family == "4"))
        .map(ToString::to_string)
        .collect();
    let elements =
        if pods.is_empty() { String::new() } else { format!(" elements = {{ {} }};", pods.join(", ")) };
    writeln!(text, " set pods{family} {{ type {addr}; flags interval; auto-merge;{elements} }}").ok();
}

fn chains(text: &mut String, setting: &Setting) {
    let mark = format!("meta mark set meta mark | {MASQUERADE:#x}");
    let outside = if setting.masquerade_all { String::new() } else { from_pods(setting, "return") };
    writeln!(text, " chain open {{\n{outside}  {mark}\n }}").ok();
    writeln!(text, " chain refuse {{\n  meta l4proto tcp reject with tcp reset\n  reject\n }}").ok();
    let insiders = from_pods(setting, "goto open") + "  fib saddr type local goto open\n";
    writeln!(text, " chain local {{\n{insiders}{}{} }}", marks("4", "ip"), marks("6", "ip6")).ok();
    writeln!(text, " chain inside {{\n{insiders}  drop\n }}").ok();
    for class in CLASSES.into_iter().filter(|class| *class != Class::Refuse) {
        let to = format!("goto {}", chain(class, false));
        writeln!(text, " chain {} {{", chain(class, true)).ok();
        text.push_str(&from_pods(setting, &to));
        writeln!(text, "  fib saddr type local {to}").ok();
        for (family, ip) in [("4", "ip"), ("6", "ip6")] {
            for proto in PROTOCOLS {
                let (is, clients) = (format!("meta l4proto {proto}"), format!("th dport . {ip} saddr"));
                writeln!(text, "  {is} {ip} daddr . {clients} @ranges_{proto}{family} {to}").ok();
                writeln!(text, "  {is} {ip} daddr @node{family} {clients} @node_ranges_{proto}{family} {to}")
                    .ok();
            }
        }
        text.push_str("  drop\n }\n");
    }
    // The class of a packet to a service; the caller goes on with all others.
    text.push_str(" chain classify {\n");
    for (family, ip) in [("4", "ip"), ("6", "ip6")] {
        writeln!(text, "  {ip} daddr . meta l4proto . th dport vmap @frontends{family}").ok();
        writeln!(text, "  {ip} daddr @node{family} meta l4proto . th dport vmap @node_ports{family}").ok();
    }
    for (family, ip) in [("4", "ip"), ("6", "ip6")] {
        // What else the node listens on is not to be reached on addresses that it has for services only.
        writeln!(text, "  {ip} daddr @given{family} meta l4proto {{ tcp, udp, sctp }} goto refuse").ok();
    }
    text.push_str(" }\n");
    // Before IPVS, which takes what arrives at 98 and what starts here at -98.
    for (hook, priority) in [("input", "filter - 5"), ("output", "mangle")] {
        writeln!(text, " chain {hook} {{ type filter hook {hook} priority {priority}; policy accept;").ok();
        text.push_str("  ct state != new accept\n  jump classify\n }\n");
    }
    writeln!(text, " chain {LAST_CHAIN} {{ type nat hook postrouting priority srcnat; policy accept;").ok();
    let marked = format!("meta mark & {MASQUERADE:#x} == {MASQUERADE:#x}");
    for (family, ip) in [("4", "ip"), ("6", "ip6")] {
        writeln!(text, "  {ip} saddr . {ip} daddr @hairpin{family} masquerade").ok();
        if setting.masquerade_all {
            continue;
        }
        writeln!(text, "  {marked} {ip} saddr @given{family} masquerade").ok();
        // Endpoints of this node answer by way of it in any case, and are let see their clients.
        writeln!(text, "  {marked} {ip} daddr != @endpoints{family} masquerade").ok();
    }
    if setting.masquerade_all {
        writeln!(text, "  {marked} masquerade").ok();
    }
    text.push_str(" }\n");
}

/// Rules that send what pods start to `verdict`.
fn from_pods(setting: &Setting, verdict: &str) -> String {
    let mut text = String::new();
    for (family, ip) in [("4", "ip"), ("6", "ip6")] {
        writeln!(text, "  {ip} saddr @pods{family} {verdict}").ok();
    }
    for name in setting.pod_links.iter().filter(|name| is_device_name(name)) {
        writeln!(text, "  iifname \"{name}*\" {verdict}").ok();
    }
    text
}

fn is_device_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn marks(family: &str, ip: &str) -> String {
    format!(
        "  {ip} daddr @node{family} meta mark set meta l4proto . th dport map @node_marks{family}\n  \
           meta mark set {ip} daddr . meta l4proto . th dport map @marks{family}\n"
    )
}

/// Deletes first, so that an element whose value changes is free to be added.
fn changes(
    text: &mut String,
    arp: bool,
    changed: impl Iterator<Item = (Element, Option<Value>, Option<Value>)>,
) {
    let mut deletes: BTreeMap<(&str, String), Vec<String>> = BTreeMap::new();
    let mut adds: BTreeMap<(&str, String), Vec<String>> = BTreeMap::new();
    for (element, old, new) in changed {
        for (table, set, key) in places(element, arp) {
            if old.is_some() {
                deletes.entry((table, set.clone())).or_default().push(key.clone());
            }
            if let Some(value) = new {
                let entry = match value {
                    Value::Member => key,
                    Value::Class(class, ranged) => format!("{key} : goto {}", chain(class, ranged)),
                    Value::Mark(mark) => format!("{key} : {mark:#x}"),
                };
                adds.entry((table, set)).or_default().push(entry);
            }
        }
    }
    for (word, lists) in [("delete", deletes), ("add", adds)] {
        for ((table, set), entries) in lists {
            writeln!(text, "{word} element {table} {TABLE} {set} {{ {} }}", entries.join(", ")).ok();
        }
    }
}

/// Where an element is: table family, set, and key there.
fn places(element: Element, arp: bool) -> Vec<(&'static str, String, String)> {
    let digit = |v4: bool| if v4 { '4' } else { '6' };
    let frontend = |key: &FrontendKey| {
        let service = format!("{} . {}", protocol_name(key.proto), key.port);
        let family = digit(Family::of(key.addr) == Family::V4);
        if key.addr.is_unspecified() {
            ("node_", family, service)
        } else {
            ("", family, format!("{} . {service}", key.addr))
        }
    };
    let one = |set: String, key: String| vec![("inet", set, key)];
    match element {
        Element::Frontend(key) => match frontend(&key) {
            ("", family, text) => one(format!("frontends{family}"), text),
            (_, family, text) => one(format!("node_ports{family}"), text),
        },
        Element::Mark(key) => {
            let (prefix, family, text) = frontend(&key);
            one(format!("{prefix}marks{family}"), text)
        }
        Element::Range(key, range) => {
            let (prefix, family, _) = frontend(&key);
            let set = format!("{prefix}ranges_{}{family}", protocol_name(key.proto));
            let address = if prefix.is_empty() { format!("{} . ", key.addr) } else { String::new() };
            one(set, format!("{address}{} . {range}", key.port))
        }
        Element::Given(addr) => {
            let mut all = one(format!("given{}", digit(addr.is_ipv4())), addr.to_string());
            if arp && addr.is_ipv4() {
                all.push(("arp", "given4".to_owned(), addr.to_string()));
            }
            all
        }
        Element::Node(addr) => one(format!("node{}", digit(addr.is_ipv4())), addr.to_string()),
        Element::Endpoint(addr) => {
            let family = digit(addr.is_ipv4());
            vec![
                ("inet", format!("endpoints{family}"), addr.to_string()),
                ("inet", format!("hairpin{family}"), format!("{addr} . {addr}")),
            ]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Proto;
    use std::net::IpAddr;

    fn setting() -> Setting {
        Setting {
            pods: vec!["10.244.0.0/16".parse().expect("a range"), "fd00:244::/32".parse().expect("a range")],
            pod_links: vec!["shv".to_owned(), "\" accept".to_owned()],
            masquerade_all: false,
            arp: true,
        }
    }

    fn frontend(addr: [u8; 4]) -> FrontendKey {
        FrontendKey { addr: IpAddr::from(addr), port: 80, proto: Proto::Tcp }
    }

    #[test]
    fn the_fixed_part_knows_no_service_and_takes_no_text_from_outside() {
        let text = replace(&setting(), std::iter::empty());
        assert!(!text.contains("add element"), "{text}");
        assert!(text.contains(
            "set pods4 { type ipv4_addr; flags interval; auto-merge; elements = { 10.244.0.0/16 }; }"
        ));
        assert!(text.contains("iifname \"shv*\" return"));
        assert!(!text.contains("accept*"), "that is no device's name: {text}");
        let quiet = replace(&Setting { arp: false, ..setting() }, std::iter::empty());
        assert!(!quiet.contains("arp"), "{quiet}");
        let all = replace(&Setting { masquerade_all: true, ..setting() }, std::iter::empty());
        assert!(all.contains("0x1000000 masquerade"), "{all}");
    }

    #[test]
    fn what_changes_its_value_is_deleted_before_it_is_added() {
        let (service, anywhere) = (frontend([10, 96, 0, 1]), frontend([0; 4]));
        let text = update(
            &setting(),
            [
                (
                    Element::Frontend(service),
                    Some(Value::Class(Class::Open, false)),
                    Some(Value::Class(Class::Refuse, true)),
                ),
                (Element::Frontend(anywhere), None, Some(Value::Class(Class::Local, true))),
                (Element::Mark(anywhere), None, Some(Value::Mark(0x5e00_0007))),
                (
                    Element::Range(service, "192.0.2.0/24".parse().expect("a range")),
                    Some(Value::Member),
                    None,
                ),
                (Element::Given([10, 96, 0, 1].into()), Some(Value::Member), None),
                (Element::Endpoint([10, 244, 0, 5].into()), None, Some(Value::Member)),
            ],
        );
        let expected = [
            "delete element arp sheave_ipvs given4 { 10.96.0.1 }",
            "delete element inet sheave_ipvs frontends4 { 10.96.0.1 . tcp . 80 }",
            "delete element inet sheave_ipvs given4 { 10.96.0.1 }",
            "delete element inet sheave_ipvs ranges_tcp4 { 10.96.0.1 . 80 . 192.0.2.0/24 }",
            "add element inet sheave_ipvs endpoints4 { 10.244.0.5 }",
            "add element inet sheave_ipvs frontends4 { 10.96.0.1 . tcp . 80 : goto refuse }",
            "add element inet sheave_ipvs hairpin4 { 10.244.0.5 . 10.244.0.5 }",
            "add element inet sheave_ipvs node_marks4 { tcp . 80 : 0x5e000007 }",
            "add element inet sheave_ipvs node_ports4 { tcp . 80 : goto ranged_local }",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
    }
}
