//! What is left over and what is missing, PURE. Invariant: nothing of a pod that is live, or that this process
//! connected and has not disconnected, is ever removed.

use std::collections::{BTreeMap, BTreeSet};

use super::plan::{is_cni, key_of, node_link_name};

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

/// Whose our links are.
struct Owners<'a> {
    by_name: BTreeMap<String, &'a String>,
}

impl<'a> Owners<'a> {
    /// `known` are the keys of everything that may have a link: a pair that was made but not named yet is known by its
    /// name alone.
    fn among(known: impl Iterator<Item = &'a String>) -> Self {
        Owners { by_name: known.map(|key| (node_link_name(key), key)).collect() }
    }

    fn of(&self, link: &OurLink) -> Option<String> {
        let named = link.alias.as_deref().and_then(key_of);
        named.or_else(|| self.by_name.get(&link.name).map(|key| (*key).clone()))
    }
}

/// Compares what is there with which pods live. `kept` are those that this process connected. What runtimes connected
/// is not looked at.
pub(super) fn decide(
    links: &[OurLink],
    leases: &BTreeSet<String>,
    live: &BTreeSet<String>,
    kept: &BTreeSet<String>,
) -> Vec<Decision> {
    let stays = |uid: &String| live.contains(uid) || kept.contains(uid);
    let owners = Owners::among(live.iter().chain(kept).chain(leases));
    let mut decisions = Vec::new();
    let mut linked = BTreeMap::new();
    for link in links {
        match owners.of(link) {
            Some(key) if is_cni(&key) => {}
            Some(uid) if stays(&uid) => {
                linked.insert(uid, link.name.clone());
            }
            owner => decisions.push(Decision::RemoveLink { name: link.name.clone(), owner }),
        }
    }
    // Links before leases: an address is free once the kernel has forgotten it.
    let gone = leases.iter().filter(|uid| !is_cni(uid) && !stays(uid));
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

/// Compares what is there with what runtimes connected, given for each of its leases: whether its namespace is there.
/// A link whose other end's namespace ended is gone with it, so a link shows that its container lives; what has
/// neither a link nor a namespace is released. A link without a lease is of one that was lost, unless its attachment is
/// among those that `ended`. Pods' are not looked at, and what is `busy` neither.
pub(super) fn decide_cni(
    links: &[OurLink],
    leases: &BTreeMap<String, bool>,
    ended: &BTreeSet<String>,
    busy: &BTreeSet<String>,
) -> Vec<Decision> {
    let owners = Owners::among(leases.keys().chain(busy));
    let linked: BTreeMap<String, &OurLink> =
        links.iter().filter_map(|link| Some((owners.of(link).filter(|key| is_cni(key))?, link))).collect();
    let mut decisions = Vec::new();
    for (key, there) in leases.iter().filter(|(key, _)| is_cni(key) && !busy.contains(*key)) {
        match (there, linked.contains_key(key)) {
            (true, _) => decisions.push(Decision::Check { uid: key.clone() }),
            (false, false) => decisions.push(Decision::Release { uid: key.clone() }),
            // In a namespace that can't be entered by the name it had.
            (false, true) => {}
        }
    }
    for (key, link) in linked.iter().filter(|(key, _)| !leases.contains_key(*key) && !busy.contains(*key)) {
        decisions.push(match ended.contains(key) {
            true => Decision::RemoveLink { name: link.name.clone(), owner: Some(key.clone()) },
            false => Decision::Adopt { uid: key.clone(), link: link.name.clone() },
        });
    }
    decisions
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::plan::alias;
    use proptest::prelude::*;

    fn set(uids: &[&str]) -> BTreeSet<String> {
        uids.iter().map(|uid| (*uid).to_owned()).collect()
    }

    fn link(uid: &str, named: bool) -> OurLink {
        let alias = named.then(|| alias(uid));
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

    #[test]
    fn containers_live_as_long_as_their_link_or_namespace() {
        let links =
            [link("n/linked/e", true), link("n/whole/e", true), link("n/lost/e", true), link("pod", true)];
        let leases = [("n/linked/e", false), ("n/whole/e", true), ("n/dead/e", false), ("n/bare/e", true)];
        let leases = leases.map(|(key, there)| (key.to_owned(), there)).into_iter().collect();
        let key = |key: &str| key.to_owned();
        let adopt = Decision::Adopt { uid: key("n/lost/e"), link: node_link_name("n/lost/e") };
        assert_eq!(
            decide_cni(&links, &leases, &set(&[]), &set(&[])),
            [
                Decision::Check { uid: key("n/bare/e") },
                Decision::Release { uid: key("n/dead/e") },
                Decision::Check { uid: key("n/whole/e") },
                adopt,
            ]
        );
        let remove =
            Decision::RemoveLink { name: node_link_name("n/lost/e"), owner: Some("n/lost/e".to_owned()) };
        let ended = set(&["n/lost/e", "n/whole/e"]);
        assert_eq!(decide_cni(&links, &leases, &ended, &set(&[])).last(), Some(&remove));
        let busy = set(&["n/dead/e", "n/bare/e", "n/whole/e", "n/lost/e"]);
        assert_eq!(decide_cni(&links, &leases, &set(&[]), &busy), []);
        // Pods' reconciliation leaves them alone, also those without a name yet.
        let leases = set(&["n/a/e", "n/dead/e"]);
        assert_eq!(decide(&[link("n/a/e", false), link("n/b/e", true)], &leases, &set(&[]), &set(&[])), []);
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
