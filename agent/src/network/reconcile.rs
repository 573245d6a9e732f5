//! What is left over and what is missing, PURE. Invariant: nothing of a pod that is live, or that this process
//! connected and has not disconnected, is ever removed.

use std::collections::{BTreeMap, BTreeSet};

use super::plan::{ALIAS_PREFIX, node_link_name};

/// A link of ours on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OurLink {
    pub(super) name: String,
    pub(super) alias: Option<String>,
}

/// What to do about one pod or link, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    /// Nobody's link.
    RemoveLink { name: String, owner: Option<String> },
    /// The lease of a pod that is gone.
    Release { uid: String },
    /// A live pod with a link but no lease: its addresses are those that the kernel routes to the link.
    Adopt { uid: String, link: String },
    /// A live pod with a lease: look at it and put back what is missing.
    Check { uid: String },
    /// A live pod with neither.
    Missing { uid: String },
}

/// Compares what is there with who lives. `kept` are the pods that this process connected.
pub(super) fn decide(
    links: &[OurLink],
    leases: &BTreeSet<String>,
    live: &BTreeSet<String>,
    kept: &BTreeSet<String>,
) -> Vec<Decision> {
    let stays = |uid: &String| live.contains(uid) || kept.contains(uid);
    // A pair that was made but not named yet is known by its name alone.
    let known = live.iter().chain(kept).chain(leases);
    let by_name: BTreeMap<String, &String> = known.map(|uid| (node_link_name(uid), uid)).collect();
    let owner = |link: &OurLink| {
        let named = link.alias.as_ref().and_then(|alias| alias.strip_prefix(ALIAS_PREFIX));
        named.map(str::to_owned).or_else(|| by_name.get(&link.name).map(|uid| (*uid).clone()))
    };
    let mut decisions = Vec::new();
    let mut linked = BTreeMap::new();
    for link in links {
        match owner(link) {
            Some(uid) if stays(&uid) => {
                linked.insert(uid, link.name.clone());
            }
            owner => decisions.push(Decision::RemoveLink { name: link.name.clone(), owner }),
        }
    }
    // Links before leases: an address is free once the kernel has forgotten it.
    let gone = leases.iter().filter(|uid| !stays(uid));
    decisions.extend(gone.map(|uid| Decision::Release { uid: uid.clone() }));
    for uid in live {
        decisions.push(match (leases.contains(uid), linked.get(uid)) {
            (true, _) => Decision::Check { uid: uid.clone() },
            (false, Some(link)) => Decision::Adopt { uid: uid.clone(), link: link.clone() },
            (false, None) => Decision::Missing { uid: uid.clone() },
        });
    }
    decisions
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(uids: &[&str]) -> BTreeSet<String> {
        uids.iter().map(|uid| (*uid).to_owned()).collect()
    }

    fn link(uid: &str, named: bool) -> OurLink {
        let alias = named.then(|| format!("{ALIAS_PREFIX}{uid}"));
        OurLink { name: node_link_name(uid), alias }
    }

    #[test]
    fn leftovers_go_and_live_pods_are_looked_at() {
        let links = [link("dead", true), link("live", true), link("lost", true), link("half", false)];
        let decisions =
            decide(&links, &set(&["dead", "live", "half"]), &set(&["live", "lost", "new"]), &set(&[]));
        let removed =
            |uid: &str| Decision::RemoveLink { name: node_link_name(uid), owner: Some(uid.to_owned()) };
        assert_eq!(
            decisions,
            [
                removed("dead"),
                removed("half"),
                Decision::Release { uid: "dead".to_owned() },
                Decision::Release { uid: "half".to_owned() },
                Decision::Check { uid: "live".to_owned() },
                Decision::Adopt { uid: "lost".to_owned(), link: node_link_name("lost") },
                Decision::Missing { uid: "new".to_owned() },
            ]
        );
    }

    #[test]
    fn links_of_nobody_are_removed() {
        let stray = OurLink { name: "shv000000000000".to_owned(), alias: None };
        let decisions = decide(&[stray], &set(&[]), &set(&["a"]), &set(&[]));
        assert!(matches!(&decisions[0], Decision::RemoveLink { owner: None, .. }));
    }

    proptest! {
        #[test]
        fn nothing_of_a_live_pod_is_removed(
            links in proptest::collection::btree_map("[a-e]", any::<bool>(), 0..5),
            leases in proptest::collection::btree_set("[a-e]", 0..5),
            live in proptest::collection::btree_set("[a-e]", 0..5),
            kept in proptest::collection::btree_set("[a-e]", 0..5),
        ) {
            let links: Vec<OurLink> = links.iter().map(|(uid, named)| link(uid, *named)).collect();
            let decisions = decide(&links, &leases, &live, &kept);
            for decision in &decisions {
                match decision {
                    Decision::RemoveLink { name, .. } => {
                        prop_assert!(live.iter().chain(&kept).all(|uid| node_link_name(uid) != *name));
                    }
                    Decision::Release { uid } => prop_assert!(!live.contains(uid) && !kept.contains(uid)),
                    Decision::Adopt { uid, .. } | Decision::Check { uid } | Decision::Missing { uid } => {
                        prop_assert!(live.contains(uid));
                    }
                }
            }
            // Whatever is nobody's goes.
            let gone = leases.iter().filter(|uid| !live.contains(*uid) && !kept.contains(*uid)).count();
            prop_assert_eq!(decisions.iter().filter(|d| matches!(d, Decision::Release { .. })).count(), gone);
        }
    }
}
