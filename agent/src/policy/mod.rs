//! Network policies of this node's pods, PURE but for its driver: policies, namespaces and pods in, the kernel's tables
//! out. Invariant: what a packet meets does not grow with the number of policies.
//!
//! # How it is laid out
//! - Every peer that a policy of a pod of this node names (a selector pair or a range with its exceptions) has a number.
//!   The peers that an address matches, and its named ports where a rule asks for some, are its *identity*: addresses
//!   that no policy can tell apart share one. Pods' identities are in the endpoints' map; other addresses have the
//!   identity of the longest prefix, among those that policies name, that they are in. Ranges nest or are apart, so
//!   that prefix says of every range and every exception whether the address is in it.
//! - The policies that isolate a pod in one direction are its *set*; pods with the same policies share it. Where a
//!   policy changes and all pods of a set go along, the set changes in place, row by row, an identity's own before the one
//!   for all others; else a new set is complete before a pod's endpoint is pointed at it.
//! - A set has a row for each identity that one of its rules names, and row 0 for all others. A row is a *list of
//!   ports*: the union of what the rules allow, as prefixes (a range of ports is at most 30 of them). Equal lists are
//!   kept once.
//!
//! A packet that opens a flow costs two lookups of its ends, at most two of a row and one of the port, whatever is
//! loaded; packets of a known flow cost one lookup.
//!
//! # What it decides where the API leaves it open
//! - Changes cut flows: each change of what is allowed raises an *epoch*, and a flow that was judged in an older one is
//!   judged again with its next packet, in the direction in which it was opened. Flows that are no longer allowed are
//!   cut at once, silently; they go on when they are allowed again.
//! - Traffic between a node and its own pods is always allowed, in both directions.
//! - A rule with ports is about TCP, UDP and SCTP; a rule without allows every protocol. ICMP errors about a flow that
//!   goes on always pass.
//! - A named port stands for the ports of that name of the pod that receives; addresses outside of the cluster have
//!   none.
//! - Pods with the host's network are neither selected nor matched by selectors; ranges match their addresses.
//! - Policies are about the addresses that a pod's link sees: a service's clients are judged by the backend's address
//!   where the translation happens at their socket.

mod attach;
pub mod driver;
mod model;
mod planner;
mod ports;
mod ranges;
mod rows;
mod selector;
mod tables;
#[cfg(test)]
mod tests;

pub use model::{Device, Event, Key, Labels, NamedPort, Namespace, Peer, Pod, Policy, Port, Rule, Which};
pub use planner::Planner;
pub use ports::PortPrefix;
pub use selector::{Op, Requirement, Selector};
pub use tables::{Change, Endpoint, Ids, Tables};
