//! Policies, pods and namespaces, cut down to what policies need of them. Invariant: plain data.

use super::selector::Selector;
use ipnetwork::IpNetwork;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// `namespace/name`; the name alone for namespaces.
pub type Key = Box<str>;

/// Labels of an object: few, sorted, and looked up by walking.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Labels(Box<[(Box<str>, Box<str>)]>);

impl Labels {
    /// The value of a label.
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(held, _)| (**held).cmp(key)).ok()?;
        Some(&self.0[at].1)
    }
}

impl<K: Into<Box<str>>, V: Into<Box<str>>> FromIterator<(K, V)> for Labels {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(labels: I) -> Self {
        let sorted: BTreeMap<Box<str>, Box<str>> =
            labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
        Self(sorted.into_iter().collect())
    }
}

/// A port of a container that has a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamedPort {
    /// Its name.
    pub name: Box<str>,
    /// IP protocol number.
    pub proto: u8,
    /// Number.
    pub port: u16,
}

/// A pod that has, or will have, addresses of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: Box<str>,
    /// Its name.
    pub name: Box<str>,
    /// Its uid.
    pub uid: Box<str>,
    /// Its labels.
    pub labels: Labels,
    /// Its addresses as the API knows them.
    pub ips: Box<[IpAddr]>,
    /// Its named ports.
    pub ports: Box<[NamedPort]>,
    /// Whether it is on this node.
    pub local: bool,
}

impl Pod {
    /// `namespace/name`.
    pub fn key(&self) -> Key {
        format!("{}/{}", self.namespace, self.name).into()
    }
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: Key,
    /// Its labels.
    pub labels: Labels,
}

/// Which ports of a protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Which {
    /// All.
    Any,
    /// From the first to the last, both included.
    Range(u16, u16),
    /// Those of this name.
    Named(Box<str>),
}

/// A port that a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port {
    /// IP protocol number.
    pub proto: u8,
    /// Number, range or name.
    pub which: Which,
}

/// Who a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// Pods with these labels in namespaces with those; without a namespace selector in the policy's own.
    Pods {
        /// Selector of pods; `None` selects all.
        pods: Option<Selector>,
        /// Selector of namespaces.
        namespaces: Option<Selector>,
    },
    /// Addresses of a range.
    Block {
        /// The range.
        cidr: IpNetwork,
        /// Ranges inside that are not meant.
        except: Box<[IpNetwork]>,
    },
}

/// What a policy allows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// From or to whom; empty means everybody.
    pub peers: Box<[Peer]>,
    /// On which ports; empty means everything.
    pub ports: Box<[Port]>,
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its namespace, whose pods it selects.
    pub namespace: Box<str>,
    /// Its name.
    pub name: Box<str>,
    /// Which pods it isolates.
    pub selector: Selector,
    /// What they may receive; `None` when the policy says nothing of it.
    pub ingress: Option<Box<[Rule]>>,
    /// What they may send.
    pub egress: Option<Box<[Rule]>>,
}

impl Policy {
    /// `namespace/name`.
    pub fn key(&self) -> Key {
        format!("{}/{}", self.namespace, self.name).into()
    }
}

/// A device that leads to a pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// Its index.
    pub index: u32,
    /// Whether it has a peer that packets can be handed to.
    pub peer: bool,
    /// Whether what it sends waits in a queue, such as one that limits what the pod receives.
    pub queued: bool,
    /// Uid of the pod, where the device says it: its policies hold before the API knows its addresses.
    pub pod: Option<Box<str>>,
}

/// What changed.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A policy is new or changed.
    Policy(Policy),
    /// A policy is gone.
    PolicyGone(Key),
    /// These policies exist and no others.
    PoliciesSynced(BTreeSet<Key>),
    /// A pod is new or changed.
    Pod(Pod),
    /// A pod is gone, or has no address of its own.
    PodGone(Key),
    /// These pods exist and no others.
    PodsSynced(BTreeSet<Key>),
    /// A namespace is new or changed.
    Namespace(Namespace),
    /// A namespace is gone.
    NamespaceGone(Key),
    /// These namespaces exist and no others.
    NamespacesSynced(BTreeSet<Key>),
    /// The devices that addresses are routed to, all of them.
    Devices(BTreeMap<IpAddr, Device>),
    /// The node's own addresses, all of them.
    Host(BTreeSet<IpAddr>),
}
