//! Errors of the pod network. Invariant: a message names the pod or the object, and what to change about it.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnetwork::IpNetwork;

/// Why the network of a pod could not be made or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// The operating system refused.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refused a request.
    #[error("netlink: {op}")]
    Netlink {
        /// What was asked.
        op: String,
        /// Why not.
        source: io::Error,
    },
    /// A step of connecting a pod failed. What was done before it stays and is found by the next try.
    #[error("pod {uid}: {step}")]
    Step {
        /// The pod.
        uid: String,
        /// The step, in words.
        step: String,
        /// Why not.
        source: io::Error,
    },
    /// No address is left.
    #[error(
        "pod {uid}: pod range {range} is used up: {leased} of its {capacity} addresses are leased and {quarantined} \
         were freed a moment ago; remove pods or give the node a larger --pod-cidr"
    )]
    RangeExhausted {
        /// The pod that got none.
        uid: String,
        /// The range.
        range: IpNetwork,
        /// Addresses of the range that pods can have.
        capacity: u128,
        /// Of them leased to pods.
        leased: usize,
        /// Of them not given again yet; the next try may succeed.
        quarantined: usize,
    },
    /// An address that was asked for is somebody's.
    #[error("pod {uid}: the address {ip} that it asks for belongs to {holder}")]
    AddressTaken {
        /// Who asks.
        uid: String,
        /// For what.
        ip: IpAddr,
        /// Who has it.
        holder: String,
    },
    /// An address that was asked for is in none of the ranges.
    #[error("pod {uid}: the address {ip} that it asks for is none that this node's ranges have for pods")]
    AddressOutside {
        /// Who asks.
        uid: String,
        /// For what.
        ip: IpAddr,
    },
    /// The attachment is there already.
    #[error("{key} is connected already; disconnect it first")]
    Connected {
        /// The attachment.
        key: String,
    },
    /// The configuration has no range that this node can use.
    #[error("no usable pod range: give --pod-cidr one of a family that the kernel has")]
    NoRange,
    /// Not a uid.
    #[error("{0:?} is not a pod uid (letters, digits, '-', '_' and '.', at most 128)")]
    Uid(String),
    /// The namespace is not there.
    #[error("pod {uid}: its network namespace {} can't be opened", path.display())]
    Netns {
        /// The pod.
        uid: String,
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another namespace has taken the place of the one that was connected.
    #[error("pod {uid}: {} is another network namespace now", path.display())]
    OtherNetns {
        /// The pod.
        uid: String,
        /// Where it was.
        path: PathBuf,
    },
    /// The namespace has a link of that name already.
    #[error(
        "pod {uid}: its network namespace has an {ifname} that is not ours; remove what else connects this pod"
    )]
    PodLinkTaken {
        /// The pod.
        uid: String,
        /// The link.
        ifname: String,
    },
    /// The node has a link of that name already.
    #[error("pod {uid}: the node has a link {link} that is not this pod's; remove it (ip link del {link})")]
    NodeLinkTaken {
        /// The pod.
        uid: String,
        /// The link.
        link: String,
    },
    /// A lease that can't be read.
    #[error("lease {}", path.display())]
    Lease {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A link that the configuration names is not there.
    #[error("there is no link {0} (--uplink)")]
    NoUplink(String),
    /// No address for the node itself.
    #[error(
        "no address found for this node: no link with a default route and none that is up has one; give one with \
         --node-ip"
    )]
    NoNodeAddress,
    /// An address of the configuration is in a pod range.
    #[error("the node's address {ip} is in the pod range {range}; give another --pod-cidr")]
    NodeInRange {
        /// The address.
        ip: IpAddr,
        /// The range.
        range: IpNetwork,
    },
    /// A host port of an attachment belongs to another one.
    #[error(
        "{id}: host port {port} is taken on {} by {owner}; give another hostPort or remove {owner}",
        if ip.is_unspecified() { "every address".to_owned() } else { ip.to_string() }
    )]
    HostPortTaken {
        /// The attachment that wants it.
        id: String,
        /// Such as `8080/tcp`.
        port: String,
        /// The address that both want, unspecified where the owner has it on all addresses.
        ip: IpAddr,
        /// The attachment that has it.
        owner: String,
    },
    /// A port mapping that can't be.
    #[error("{id}: port mapping {mapping}: {why}")]
    PortMapping {
        /// The attachment.
        id: String,
        /// The mapping, in words.
        mapping: String,
        /// What is wrong with it, and what to write instead.
        why: String,
    },
    /// A limit that can't be kept.
    #[error("{id}: bandwidth: {why}")]
    Bandwidth {
        /// The attachment.
        id: String,
        /// What is wrong, and what to give instead.
        why: String,
    },
    /// The kernel does not hold what an attachment needs.
    #[error("{id}: {what} is missing in the kernel; the next reconciliation puts it back")]
    Gone {
        /// The attachment.
        id: String,
        /// What.
        what: String,
    },
    /// A task of ours died.
    #[error("the pod network's worker stopped")]
    Worker,
}
