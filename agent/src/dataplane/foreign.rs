//! What a kube-proxy left on this host: its rules would translate before or after us, to endpoints of its own time.
//! Invariant: nothing is removed that is not kube-proxy's by name, and nothing at all unless that was asked for.
//!
//! Looked for: kube-proxy's chains in iptables (both variants), its nftables tables, its IPVS device. Chains of the
//! kubelet and of network policies stay. IPVS services are not told apart from those of others and stay, too; without
//! the device they are not reached.

use super::{DataplaneConfig, DataplaneError};
use crate::network::netlink::nfnl::Netfilter;
use crate::network::netlink::nft::{ChainRow, IPV4, IPV6, Transaction};
use crate::network::netlink::{delete_link, has_link};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

/// What is done about a kube-proxy's leftovers at the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KubeProxyLeftovers {
    /// Do not start, and name them.
    #[default]
    Refuse,
    /// Remove them.
    Cleanup,
    /// Leave them alone.
    Ignore,
}

impl KubeProxyLeftovers {
    /// All of them, with their names in settings.
    pub const ALL: [(Self, &'static str); 3] =
        [(Self::Refuse, "refuse"), (Self::Cleanup, "cleanup"), (Self::Ignore, "ignore")];

    /// The one with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, held)| *held == name).map(|(one, _)| one)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(one, _)| *one == self).map_or("refuse", |(_, name)| name)
    }
}

/// kube-proxy's tables, in its nftables mode.
const TABLE: &str = "kube-proxy";
/// kube-proxy's device, in its IPVS mode.
const DEVICE: &str = "kube-ipvs0";
/// kube-proxy's chains, and the beginnings of those that it makes one a service or endpoint.
const CHAINS: [&str; 15] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-NODE-PORT",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    "KUBE-LOAD-BALANCER",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR",
    "KUBE-FIREWALL-IPVS",
];
const CHAIN_PREFIXES: [&str; 6] =
    ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-XLB-", "KUBE-EXT-"];

/// The legacy variant has no netlink: its own programs are asked. Which tables a namespace has is in a file.
const LEGACY: [(&str, &str); 2] =
    [("iptables-legacy", "ip_tables_names"), ("ip6tables-legacy", "ip6_tables_names")];

fn is_kube_proxys(chain: &str) -> bool {
    CHAINS.contains(&chain) || CHAIN_PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
struct Leftovers {
    /// Families of its nftables tables.
    tables: BTreeSet<u8>,
    /// Chains of iptables over nf_tables, by family and table.
    chains: BTreeMap<(u8, String), BTreeSet<String>>,
    /// What removes chains of the legacy iptables: program and its input.
    legacy: Vec<(&'static str, Removal)>,
    device: bool,
}

/// Input of `iptables-restore --noflush`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Removal {
    script: String,
    chains: usize,
}

/// Looks for leftovers and does with them as told.
pub(super) fn meet(config: &DataplaneConfig) -> Result<(), DataplaneError> {
    if config.kube_proxy_leftovers == KubeProxyLeftovers::Ignore {
        return Ok(());
    }
    let found = Leftovers::look()
        .map_err(|source| DataplaneError::Host { op: "look for what a kube-proxy left", source })?;
    if found == Leftovers::default() {
        return Ok(());
    }
    let what = found.describe();
    if config.kube_proxy_leftovers == KubeProxyLeftovers::Refuse {
        return Err(DataplaneError::Leftovers { what });
    }
    found.remove().map_err(|source| DataplaneError::Host { op: "remove what a kube-proxy left", source })?;
    let rest = Leftovers::look()
        .map_err(|source| DataplaneError::Host { op: "look for what a kube-proxy left", source })?;
    if rest != Leftovers::default() {
        // It is running and writes them again.
        return Err(DataplaneError::Leftovers { what: rest.describe() });
    }
    tracing::info!(what, "removed what a kube-proxy left");
    Ok(())
}

impl Leftovers {
    fn look() -> io::Result<Self> {
        let mut found = Self { device: has_link(DEVICE)?, ..Self::default() };
        // A kernel without nf_tables has no such tables and chains.
        if let Ok(mut netfilter) = Netfilter::open() {
            for family in [IPV4, IPV6] {
                if netfilter.tables(family).unwrap_or_default().iter().any(|table| table == TABLE) {
                    found.tables.insert(family);
                }
                for ChainRow { family, table, name } in netfilter.chains(family).unwrap_or_default() {
                    if is_kube_proxys(&name) {
                        found.chains.entry((family, table)).or_default().insert(name);
                    }
                }
            }
        }
        for (program, names) in LEGACY {
            found.legacy.extend(legacy(program, names)?.map(|removal| (program, removal)));
        }
        Ok(found)
    }

    fn describe(&self) -> String {
        let mut parts = Vec::new();
        let ip = |family: u8| if family == IPV4 { "ip" } else { "ip6" };
        parts.extend(self.tables.iter().map(|family| format!("nftables table {} {TABLE}", ip(*family))));
        for ((family, table), chains) in &self.chains {
            let first = chains.first().map_or("", String::as_str);
            let variant = if *family == IPV4 { "iptables" } else { "ip6tables" };
            parts
                .push(format!("{} chains in {variant} (nf_tables) table {table} ({first}, …)", chains.len()));
        }
        for (program, removal) in &self.legacy {
            parts.push(format!("{} chains in {program}", removal.chains));
        }
        if self.device {
            parts.push(format!("device {DEVICE}"));
        }
        parts.join(", ")
    }

    fn remove(&self) -> io::Result<()> {
        if !self.tables.is_empty() || !self.chains.is_empty() {
            let mut netfilter = Netfilter::open()?;
            for family in &self.tables {
                let mut tx = Transaction::new(*family, TABLE);
                tx.delete_table();
                tx.commit(&mut netfilter)?;
            }
            for ((family, table), chains) in &self.chains {
                remove_chains(&mut netfilter, *family, table, chains)?;
            }
        }
        for (program, removal) in &self.legacy {
            restore(program, &removal.script)?;
        }
        if self.device {
            delete_link(DEVICE)?;
        }
        Ok(())
    }
}

/// Removes chains and the rules of other chains that lead there.
fn remove_chains(
    netfilter: &mut Netfilter,
    family: u8,
    table: &str,
    chains: &BTreeSet<String>,
) -> io::Result<()> {
    let rules = netfilter.rules(family, table)?;
    let mut tx = Transaction::new(family, table);
    for rule in rules.iter().filter(|rule| !chains.contains(&rule.chain)) {
        if rule.target.as_ref().is_some_and(|target| chains.contains(target)) {
            tx.delete_rule(&rule.chain, rule.handle);
        }
    }
    chains.iter().for_each(|chain| tx.flush_chain(chain));
    chains.iter().for_each(|chain| tx.delete_chain(chain));
    tx.commit(netfilter)
}

/// What removes kube-proxy's part of the legacy tables; `None` where it has none there.
fn legacy(program: &str, names: &str) -> io::Result<Option<Removal>> {
    // This thread's network namespace, which need not be the process's.
    let tables = match std::fs::read_to_string(Path::new("/proc/thread-self/net").join(names)) {
        Ok(tables) => tables,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    if tables.trim().is_empty() {
        return Ok(None);
    }
    match Command::new(format!("{program}-save")).stderr(Stdio::piped()).output() {
        Ok(output) if output.status.success() => Ok(removal(&String::from_utf8_lossy(&output.stdout))),
        Ok(output) => Err(io::Error::other(format!(
            "{program}-save: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        ))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            tracing::warn!(
                tables = ?tables.split_whitespace().collect::<Vec<_>>(),
                "there are legacy iptables tables, but no {program}-save (Debian: package iptables) to look \
                 whether a kube-proxy made them"
            );
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Reads what `iptables-save` wrote and says how kube-proxy's part of it is removed.
fn removal(saved: &str) -> Option<Removal> {
    let (mut script, mut count) = (String::new(), 0);
    for table in saved.split("\nCOMMIT").filter_map(|part| part.find('*').map(|at| &part[at..])) {
        let mut lines = table.lines();
        let name = lines.next().unwrap_or_default();
        let (mut chains, mut rules) = (Vec::new(), Vec::new());
        for line in lines {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("-A"), Some(chain)) if !is_kube_proxys(chain) && leads_there(line) => {
                    rules.push(line.replacen("-A", "-D", 1));
                }
                (Some(word), _) => {
                    chains.extend(word.strip_prefix(':').filter(|chain| is_kube_proxys(chain)));
                }
                _ => {}
            }
        }
        if chains.is_empty() {
            continue;
        }
        count += chains.len();
        let flush = chains.iter().map(|chain| format!("-F {chain}"));
        let delete = chains.iter().map(|chain| format!("-X {chain}"));
        let all = [name.to_owned()].into_iter().chain(rules).chain(flush).chain(delete);
        all.chain(["COMMIT".to_owned()]).for_each(|line| script.extend([&line, "\n"]));
    }
    (count != 0).then_some(Removal { script, chains: count })
}

/// Whether a saved rule ends in one of kube-proxy's chains.
fn leads_there(rule: &str) -> bool {
    let words: Vec<&str> = rule.split_whitespace().collect();
    words.windows(2).any(|pair| matches!(pair[0], "-j" | "-g") && is_kube_proxys(pair[1]))
}

fn restore(program: &str, script: &str) -> io::Result<()> {
    let mut child = Command::new(format!("{program}-restore"))
        .arg("--noflush")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    // One that dies early says why by its status.
    let written = child.stdin.take().map(|mut input| input.write_all(script.as_bytes()));
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("{program}-restore: {}: {}", output.status, text.trim())));
    }
    written.unwrap_or(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "# Generated\n*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n:KUBE-SERVICES - [0:0]\n\
        :KUBE-SVC-ABC - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n\
        -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
        -A PREROUTING -j DOCKER\n-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-ABC\nCOMMIT\n# Completed\n\
        *filter\n:FORWARD ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\n-A FORWARD -j KUBE-FIREWALL\nCOMMIT\n";

    #[test]
    fn only_what_is_kube_proxys_is_removed() {
        let removal = removal(SAVED).unwrap();
        assert_eq!(removal.chains, 2);
        assert_eq!(
            removal.script,
            "*nat\n-D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -F KUBE-SERVICES\n-F KUBE-SVC-ABC\n-X KUBE-SERVICES\n-X KUBE-SVC-ABC\nCOMMIT\n"
        );
    }

    #[test]
    fn tables_of_others_are_no_leftovers() {
        assert_eq!(removal(""), None);
        assert_eq!(removal("*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n"), None);
        assert_eq!(removal(&SAVED[SAVED.find("*filter").unwrap()..]), None);
    }

    #[test]
    fn names_survive_the_way_there_and_back() {
        for (one, name) in KubeProxyLeftovers::ALL {
            assert_eq!((KubeProxyLeftovers::from_name(name), one.name()), (Some(one), name));
        }
        assert_eq!(KubeProxyLeftovers::from_name("keep"), None);
    }
}
