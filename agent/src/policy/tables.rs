//! What the kernel is to hold, and what has to be written for it. Invariant: a change is made in the order of its fields:
//! what is pointed at is there before it is pointed at, and goes after that.

use super::ports::PortPrefix;
use ipnetwork::IpNetwork;
use std::collections::HashMap;
use std::net::IpAddr;

/// An entry of the endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Device that leads to it; 0 when it is none of this node's pods.
    pub device: u32,
    /// The device has a peer.
    pub peer: bool,
    /// What the device sends waits in a queue.
    pub queued: bool,
    /// The address is the node's own.
    pub host: bool,
    /// Identity.
    pub identity: u32,
    /// Set of what it may receive; 0 when it is not isolated.
    pub ingress: u32,
    /// Set of what it may send.
    pub egress: u32,
}

/// The tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Addresses of pods and of the node.
    pub endpoints: HashMap<IpAddr, Endpoint>,
    /// Identities of other addresses, by their longest prefix.
    pub ranges: HashMap<IpNetwork, u32>,
    /// Lists of ports by set and identity.
    pub verdicts: HashMap<(u32, u32), u32>,
    /// Lists of ports.
    pub ports: HashMap<(u32, PortPrefix), ()>,
}

/// Numbers from which new ones are given: what the kernel holds already keeps its meaning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// Greatest set in use.
    pub set: u32,
    /// Greatest identity in use.
    pub identity: u32,
    /// Greatest list of ports in use.
    pub ports: u32,
}

/// What has to be written, in this order; where anything is, the epoch is raised at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Ports to add.
    pub put_ports: Vec<(u32, PortPrefix)>,
    /// Rows to write.
    pub put_verdicts: Vec<((u32, u32), u32)>,
    /// Ranges to write.
    pub put_ranges: Vec<(IpNetwork, u32)>,
    /// Endpoints to write.
    pub put_endpoints: Vec<(IpAddr, Endpoint)>,
    /// Endpoints to delete.
    pub delete_endpoints: Vec<IpAddr>,
    /// Ranges to delete.
    pub delete_ranges: Vec<IpNetwork>,
    /// Rows to delete.
    pub delete_verdicts: Vec<(u32, u32)>,
    /// Ports to delete.
    pub delete_ports: Vec<(u32, PortPrefix)>,
}

/// What is new or other in `to`, and what of `from` is not in it.
fn diff<K: Copy + Eq + std::hash::Hash, V: Copy + PartialEq>(
    from: &HashMap<K, V>,
    to: &HashMap<K, V>,
) -> (Vec<(K, V)>, Vec<K>) {
    let put =
        to.iter().filter(|(key, value)| from.get(key) != Some(value)).map(|(key, value)| (*key, *value));
    let gone = from.keys().filter(|key| !to.contains_key(key)).copied();
    (put.collect(), gone.collect())
}

impl Change {
    /// What leads from one to the other.
    pub fn between(from: &Tables, to: &Tables) -> Self {
        let (put_ports, delete_ports) = diff(&from.ports, &to.ports);
        let (mut put_verdicts, delete_verdicts) = diff(&from.verdicts, &to.verdicts);
        // Whoever gets a row of its own must not meet the one for all others first, which may allow less.
        put_verdicts.sort_unstable_by_key(|((set, identity), _)| (*identity == 0, *set, *identity));
        let (put_ranges, delete_ranges) = diff(&from.ranges, &to.ranges);
        let (put_endpoints, delete_endpoints) = diff(&from.endpoints, &to.endpoints);
        Self {
            put_ports: put_ports.into_iter().map(|(key, ())| key).collect(),
            put_verdicts,
            put_ranges,
            put_endpoints,
            delete_endpoints,
            delete_ranges,
            delete_verdicts,
            delete_ports,
        }
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
