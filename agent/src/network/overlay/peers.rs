//! Who the other nodes are, PURE but for reading the file. Invariant: ranges that are accepted never overlap, neither
//! among peers nor with this node's own; what is refused is named with what it collides with.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnetwork::IpNetwork;
use serde::Deserialize;

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// Name of the node.
    pub name: String,
    /// Addresses it is reached at, the preferred one of each family first.
    pub node_ips: Vec<IpAddr>,
    /// Ranges of its pods.
    pub pod_cidrs: Vec<IpNetwork>,
}

/// Why a peers file can't be used. Each message names the entry and what to change.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeersError {
    /// It can't be read.
    #[error("reading peers file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is neither TOML nor JSON of the right shape.
    #[error("peers file {}: {why}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// Where and what.
        why: String,
    },
    /// Its entries contradict each other.
    #[error("peers file {}: {why}", path.display())]
    Conflict {
        /// The file.
        path: PathBuf,
        /// Which, and about what.
        why: String,
    },
}

/// The nodes that a file names. The same file may be given to all of them: a node finds itself by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeersFile {
    /// All nodes, this one too if it is named.
    pub nodes: Vec<Peer>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    node: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Entry {
    name: String,
    node_ips: Vec<IpAddr>,
    pod_cidrs: Vec<IpNetwork>,
}

impl PeersFile {
    /// Reads and checks a file: JSON where its name ends in `.json`, else TOML.
    pub fn read(path: &Path) -> Result<Self, PeersError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| PeersError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, PeersError> {
        let shape = |why: String| PeersError::Shape { path: path.to_owned(), why };
        let document: Document = if path.extension().is_some_and(|ext| ext == "json") {
            serde_json::from_str(text).map_err(|error| shape(error.to_string()))?
        } else {
            toml::from_str(text).map_err(|error| shape(error.to_string()))?
        };
        let nodes = document.node.into_iter().map(|entry| Peer {
            name: entry.name,
            node_ips: entry.node_ips,
            pod_cidrs: entry.pod_cidrs,
        });
        let file = PeersFile { nodes: nodes.collect() };
        file.check().map_err(|why| PeersError::Conflict { path: path.to_owned(), why })?;
        Ok(file)
    }

    fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        for node in &self.nodes {
            if node.name.is_empty() {
                return Err("a node has an empty name".to_owned());
            }
            if !names.insert(&node.name) {
                return Err(format!("node {} is there twice", node.name));
            }
            if node.node_ips.is_empty() {
                return Err(format!("node {}: node-ips is empty", node.name));
            }
            if node.pod_cidrs.is_empty() {
                return Err(format!("node {}: pod-cidrs is empty", node.name));
            }
        }
        match accept(&self.nodes, &Own::default()).1.into_iter().next() {
            Some(refusal) => Err(refusal.to_string()),
            None => Ok(()),
        }
    }

    /// The entry of that name.
    pub fn node(&self, name: &str) -> Option<&Peer> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// All but the entry of that name.
    pub fn others(&self, name: &str) -> Vec<Peer> {
        self.nodes.iter().filter(|node| node.name != name).cloned().collect()
    }
}

/// What this node has itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Own {
    pub(super) name: String,
    pub(super) node_ips: Vec<IpAddr>,
    pub(super) pod_cidrs: Vec<IpNetwork>,
}

/// A peer that is left out, and why.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Refusal {
    pub(super) peer: String,
    pub(super) why: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "node {}: {}", self.peer, self.why)
    }
}

/// Those of `peers` that can be reached side by side, in their order, and those that collide with one before them or
/// with this node. Who came first stays: give the older ones first.
pub(super) fn accept(peers: &[Peer], own: &Own) -> (Vec<Peer>, Vec<Refusal>) {
    let mut accepted: Vec<Peer> = Vec::new();
    let mut refused = Vec::new();
    for peer in peers {
        match collision(peer, &accepted, own) {
            None => accepted.push(peer.clone()),
            Some(why) => refused.push(Refusal { peer: peer.name.clone(), why }),
        }
    }
    (accepted, refused)
}

fn collision(peer: &Peer, before: &[Peer], own: &Own) -> Option<String> {
    let others = || {
        let own_rows = own.pod_cidrs.iter().map(|range| (own.name.as_str(), *range));
        let rows = before.iter().flat_map(|other| other.pod_cidrs.iter().map(|r| (other.name.as_str(), *r)));
        own_rows.chain(rows)
    };
    for (at, range) in peer.pod_cidrs.iter().enumerate() {
        if let Some((name, other)) = others().find(|(_, other)| overlap(*range, *other)) {
            return Some(format!("its pod range {range} overlaps {other} of node {name}; give it another"));
        }
        if let Some(other) = peer.pod_cidrs[..at].iter().find(|other| overlap(*range, **other)) {
            return Some(format!("its pod ranges {other} and {range} overlap"));
        }
        let ips = own.node_ips.iter().map(|ip| (own.name.as_str(), *ip));
        let ips = ips.chain(peer.node_ips.iter().map(|ip| (peer.name.as_str(), *ip)));
        let ips = ips.chain(before.iter().flat_map(|p| p.node_ips.iter().map(|ip| (p.name.as_str(), *ip))));
        for (name, ip) in ips {
            if range.contains(ip) {
                return Some(format!("its pod range {range} contains {ip}, the address of node {name}"));
            }
        }
    }
    for ip in &peer.node_ips {
        if own.node_ips.contains(ip) {
            return Some(format!("its address {ip} is this node's; is it this node under another name?"));
        }
        if let Some(other) = before.iter().find(|other| other.node_ips.contains(ip)) {
            return Some(format!("its address {ip} is that of node {}", other.name));
        }
        if let Some((name, range)) = others().find(|(_, range)| range.contains(*ip)) {
            return Some(format!("its address {ip} is in the pod range {range} of node {name}"));
        }
    }
    None
}

/// Whether two ranges share an address.
pub(super) fn overlap(a: IpNetwork, b: IpNetwork) -> bool {
    a.is_ipv4() == b.is_ipv4() && (a.contains(b.network()) || b.contains(a.network()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, ips: &[&str], ranges: &[&str]) -> Peer {
        Peer {
            name: name.to_owned(),
            node_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            pod_cidrs: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        }
    }

    const GOOD: &str = r#"
        [[node]]
        name = "a"
        node-ips = ["192.0.2.1", "2001:db8::1"]
        pod-cidrs = ["10.244.1.0/24", "fd00:244:0:1::/64"]

        [[node]]
        name = "b"
        node-ips = ["192.0.2.2"]
        pod-cidrs = ["10.244.2.0/24"]
    "#;

    #[test]
    fn one_file_serves_every_node() {
        let file = PeersFile::parse(Path::new("peers.toml"), GOOD).unwrap();
        assert_eq!(file.node("b"), Some(&peer("b", &["192.0.2.2"], &["10.244.2.0/24"])));
        assert_eq!(file.others("b").len(), 1);
        assert_eq!(file.others("c").len(), 2);
        let json = r#"{"node": [{"name": "b", "node-ips": ["192.0.2.2"], "pod-cidrs": ["10.244.2.0/24"]}]}"#;
        assert_eq!(PeersFile::parse(Path::new("p.json"), json).unwrap().nodes, file.others("a"));
    }

    #[test]
    fn bad_files_are_refused_with_the_entry_named() {
        let cases = [
            ("[[node]]\nname = \"a\"\n", "node-ips"),
            (
                &GOOD.replace("10.244.2.0/24", "10.244.1.128/25"),
                "10.244.1.128/25 overlaps 10.244.1.0/24 of node a",
            ),
            (&GOOD.replace("name = \"b\"", "name = \"a\""), "node a is there twice"),
            (&GOOD.replace("[\"192.0.2.2\"]", "[]"), "node b: node-ips is empty"),
            (&GOOD.replace("[\"10.244.2.0/24\"]", "[]"), "node b: pod-cidrs is empty"),
            (&GOOD.replace("10.244.2.0/24", "192.0.2.0/24"), "contains 192.0.2."),
            (&GOOD.replace("192.0.2.2", "192.0.2.1"), "is that of node a"),
            (&GOOD.replace("192.0.2.2", "192.0.2"), "192.0.2"),
            (&GOOD.replace("10.244.2.0/24", "10.244.2.0/33"), "pod-cidrs"),
            (&GOOD.replace("node-ips", "nodeips"), "nodeips"),
        ];
        for (text, part) in cases {
            let error = PeersFile::parse(Path::new("peers.toml"), text).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("peers.toml"), "{part:?} in {error:?}");
        }
    }

    #[test]
    fn who_collides_is_left_out_and_named() {
        let own = Own {
            name: "me".into(),
            node_ips: vec!["192.0.2.9".parse().unwrap()],
            pod_cidrs: vec!["10.244.9.0/24".parse().unwrap()],
        };
        let peers = [
            peer("a", &["192.0.2.1"], &["10.244.1.0/24"]),
            peer("b", &["192.0.2.2"], &["10.244.0.0/16"]),
            peer("c", &["192.0.2.9"], &["10.244.3.0/24"]),
            peer("d", &["10.244.1.7"], &["10.244.4.0/24"]),
            peer("e", &["192.0.2.5"], &["10.244.5.0/24"]),
        ];
        let (accepted, refused) = accept(&peers, &own);
        assert_eq!(accepted.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["a", "e"]);
        let text: Vec<String> = refused.iter().map(ToString::to_string).collect();
        assert!(text[0].contains("node b") && text[0].contains("10.244.9.0/24 of node me"), "{text:?}");
        assert!(text[1].contains("this node's"), "{text:?}");
        assert!(text[2].contains("10.244.1.0/24 of node a"), "{text:?}");
    }
}
