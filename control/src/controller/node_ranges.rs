//! Pod ranges of nodes: a Node that has none gets the first free one of each of the cluster's ranges. Invariant: what is
//! given overlaps no range of any Node, whoever gave it that; the Nodes themselves are the only record.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::json;

use super::action::{Action, Part, Target};
use super::model::Node;
use crate::resource::kinds::NODES;

/// Bits between a cluster's range and a node's: more nodes than anybody has, and a search that stays short.
const NODE_BITS_MAX: u8 = 16;

/// From where nodes get the ranges of their pods.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeRanges {
    /// The cluster's ranges with the prefix length of a node's share; at most one a family. None allocates nothing.
    ranges: Vec<(IpNetwork, u8)>,
}

/// Why ranges for nodes can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeRangesError {
    /// Two of a family.
    #[error("--cluster-cidr: {0} and {1} are of one family; give at most one of each")]
    Family(IpNetwork, IpNetwork),
    /// A node's share does not fit.
    #[error(
        "{flag} {size}: a node's share of the cluster's range {range} must have a prefix of {min} to {max}"
    )]
    Size {
        /// The setting.
        flag: &'static str,
        /// Its value.
        size: u8,
        /// The range to be shared.
        range: IpNetwork,
        /// Shortest prefix.
        min: u8,
        /// Longest prefix.
        max: u8,
    },
}

impl NodeRanges {
    /// Shares of `cluster_cidrs`, with prefixes of these lengths.
    pub fn new(cluster_cidrs: &[IpNetwork], size_v4: u8, size_v6: u8) -> Result<Self, NodeRangesError> {
        let mut ranges: Vec<(IpNetwork, u8)> = Vec::new();
        for range in cluster_cidrs {
            if let Some((other, _)) = ranges.iter().find(|(other, _)| other.is_ipv4() == range.is_ipv4()) {
                return Err(NodeRangesError::Family(*other, *range));
            }
            let (flag, size, bits) = match range {
                IpNetwork::V4(_) => ("--node-cidr-mask-size-ipv4", size_v4, 32),
                IpNetwork::V6(_) => ("--node-cidr-mask-size-ipv6", size_v6, 128),
            };
            let (min, max) = (range.prefix(), bits.min(range.prefix() + NODE_BITS_MAX));
            if !(min..=max).contains(&size) {
                return Err(NodeRangesError::Size { flag, size, range: *range, min, max });
            }
            ranges.push((*range, size));
        }
        Ok(NodeRanges { ranges })
    }
}

/// What one decision rests on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Observed {
    pub(crate) nodes: Vec<Node>,
    pub(crate) config: NodeRanges,
}

/// Gives ranges to all nodes that have none.
pub(crate) fn reconcile(seen: &Observed) -> Vec<Action> {
    let mut taken: Vec<IpNetwork> = seen.nodes.iter().flat_map(ranges_of).collect();
    let mut actions = Vec::new();
    if seen.config.ranges.is_empty() {
        return actions;
    }
    for node in seen.nodes.iter().filter(|node| !node.metadata.is_deleting()) {
        if node.spec.pod_cidrs.iter().chain(node.spec.pod_cidr.iter()).next().is_some() {
            continue;
        }
        let mut given = Vec::new();
        for (range, size) in &seen.config.ranges {
            match free(*range, *size, &taken) {
                Some(share) => given.push(share),
                None => {
                    actions.push(Action::Event {
                        about: Target::of(&NODES, &node.metadata),
                        warning: true,
                        reason: "CIDRNotAvailable",
                        message: format!(
                            "all /{size} of the cluster's pod range {range} are given to nodes: remove Nodes that are \
                             no more, or give the control plane a larger --cluster-cidr"
                        ),
                    });
                }
            }
        }
        // Half of what was asked for would stay half: ranges can't be changed once they are set.
        if given.len() < seen.config.ranges.len() {
            continue;
        }
        taken.extend(given.iter().copied());
        let texts: Vec<String> = given.iter().map(ToString::to_string).collect();
        actions.push(Action::Edit {
            target: Target::unchanged(&NODES, &node.metadata),
            part: Part::Main,
            merge: json!({"spec": {"podCIDR": texts.first(), "podCIDRs": texts}}),
        });
    }
    actions
}

fn ranges_of(node: &Node) -> impl Iterator<Item = IpNetwork> {
    node.spec.pod_cidrs.iter().chain(node.spec.pod_cidr.iter()).filter_map(|range| range.parse().ok())
}

/// The first share of `range` that overlaps none of `taken`.
fn free(range: IpNetwork, size: u8, taken: &[IpNetwork]) -> Option<IpNetwork> {
    let (v4, bits) = (range.is_ipv4(), if range.is_ipv4() { 32 } else { 128 });
    let first = number(range.network());
    let count = 1_u128 << (size - range.prefix());
    // A share of everything is everything.
    let step = 1_u128.checked_shl(u32::from(bits - size)).unwrap_or(0);
    // The shares that others cover, as numbers of shares.
    let mut covered: Vec<(u128, u128)> = taken
        .iter()
        .filter(|other| other.is_ipv4() == v4)
        .filter_map(|other| {
            let (low, high) = (number(other.network()), number(other.broadcast()));
            let last = number(range.broadcast());
            let overlaps = low <= last && high >= first;
            overlaps.then(|| {
                let share = |at: u128| (at - first).checked_div(step).unwrap_or(0);
                (share(low.max(first)), share(high.min(last)))
            })
        })
        .collect();
    covered.sort_unstable();
    let mut next = 0;
    for (low, high) in covered {
        if low > next {
            break;
        }
        next = next.max(high + 1);
    }
    (next < count).then(|| IpNetwork::new(address(first + next * step, v4), size).ok())?
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

fn address(number: u128, v4: bool) -> IpAddr {
    match u32::try_from(number) {
        Ok(number) if v4 => IpAddr::V4(number.into()),
        _ => IpAddr::V6(number.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::world::view;
    use serde_json::Value;

    fn config(ranges: &[&str], v4: u8, v6: u8) -> Result<NodeRanges, NodeRangesError> {
        let ranges: Vec<IpNetwork> = ranges.iter().map(|range| range.parse().expect("a range")).collect();
        NodeRanges::new(&ranges, v4, v6)
    }

    fn node(name: &str, ranges: &[&str]) -> Node {
        view(&json!({"metadata": {"name": name, "uid": name}, "spec": {"podCIDRs": ranges}}))
    }

    /// Node and ranges of each allocation.
    fn given(nodes: &[Node], config: NodeRanges) -> Vec<(String, Value)> {
        let actions = reconcile(&Observed { nodes: nodes.to_vec(), config });
        let edits = actions.into_iter().filter_map(|action| match action {
            Action::Edit { target, merge, .. } => Some((target.name, merge["spec"]["podCIDRs"].clone())),
            _ => None,
        });
        edits.collect()
    }

    #[test]
    fn each_node_gets_the_first_free_share_of_each_family() {
        let config = config(&["10.244.0.0/16", "fd00:244::/48"], 24, 64).expect("a configuration");
        let nodes = [
            node("a", &["10.244.1.0/24", "fd00:244::/64"]),
            node("b", &[]),
            node("c", &[]),
            node("d", &["10.244.2.0/23"]),
        ];
        assert_eq!(
            given(&nodes, config),
            [
                ("b".to_owned(), json!(["10.244.0.0/24", "fd00:244:0:1::/64"])),
                ("c".to_owned(), json!(["10.244.4.0/24", "fd00:244:0:2::/64"])),
            ]
        );
    }

    #[test]
    fn a_used_up_range_is_said_and_a_removed_node_frees_its_share() {
        let config = config(&["10.0.0.0/30"], 31, 64).expect("a configuration");
        let mut nodes = vec![node("a", &["10.0.0.0/31"]), node("b", &["10.0.0.2/31"]), node("c", &[])];
        let actions = reconcile(&Observed { nodes: nodes.clone(), config: config.clone() });
        let [Action::Event { reason: "CIDRNotAvailable", message, .. }] = actions.as_slice() else {
            panic!("{actions:?}")
        };
        assert!(message.contains("10.0.0.0/30") && message.contains("--cluster-cidr"), "{message}");
        nodes.remove(0);
        assert_eq!(given(&nodes, config), [("c".to_owned(), json!(["10.0.0.0/31"]))]);
    }

    #[test]
    fn a_range_given_by_hand_is_left_alone_wherever_it_is() {
        let config = config(&["10.0.0.0/24"], 25, 64).expect("a configuration");
        let nodes = [node("a", &["10.0.0.0/8"]), node("b", &[])];
        assert_eq!(given(&nodes, config.clone()), []);
        let nodes = [node("a", &["192.0.2.0/24", "10.0.0.7/32"]), node("b", &[])];
        assert_eq!(given(&nodes, config), [("b".to_owned(), json!(["10.0.0.128/25"]))]);
        assert_eq!(given(&[node("b", &[])], NodeRanges::default()), []);
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused_with_their_flag() {
        for (ranges, v4, v6, part) in [
            (&["10.0.0.0/24"][..], 23, 64, "--node-cidr-mask-size-ipv4"),
            (&["10.0.0.0/8"][..], 25, 64, "8 to 24"),
            (&["fd00::/32"][..], 24, 64, "--node-cidr-mask-size-ipv6"),
            (&["10.0.0.0/16", "10.1.0.0/16"][..], 24, 64, "10.1.0.0/16"),
        ] {
            let error = config(ranges, v4, v6).expect_err("refused").to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
