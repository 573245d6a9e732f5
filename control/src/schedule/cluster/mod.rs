//! Which node a pod goes to. Invariant: no node is given more than it can allocate, and the same cluster gives the
//! same pod the same node.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use super::model::{Ask, Load, NodeFacts};
use crate::controller::model::{Taint, Toleration, contains_all};

const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Upstream's weights of the scores that are computed here.
const TAINT_WEIGHT: i64 = 3;
const AFFINITY_WEIGHT: i64 = 2;
const LEAST_ALLOCATED_WEIGHT: i64 = 1;
const SCORE_MAX: i64 = 100;

/// One node and what is on it.
#[derive(Debug, Default)]
struct Slot {
    /// Absent while pods are bound to a name that no Node has.
    facts: Option<NodeFacts>,
    used: Load,
    pods: i64,
}

/// All nodes, and the pods that take of them.
#[derive(Debug, Default)]
pub(crate) struct Cluster {
    slots: BTreeMap<String, Slot>,
    /// The node and load of each placed pod, by uid.
    placed: HashMap<String, (String, Load)>,
}

/// Why a pod fits on no node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unplaceable {
    nodes: usize,
    /// How many nodes each reason holds for.
    reasons: BTreeMap<String, usize>,
}

impl std::fmt::Display for Unplaceable {
    /// The form that kubectl users know: `0/3 nodes are available: 3 Insufficient cpu.`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.nodes == 0 {
            return f.write_str("no nodes available to schedule pods");
        }
        let mut parts: Vec<String> = self.reasons.iter().map(|(reason, n)| format!("{n} {reason}")).collect();
        parts.sort();
        write!(f, "0/{} nodes are available: {}.", self.nodes, parts.join(", "))
    }
}

impl Cluster {
    /// Takes in a node's facts. Tells whether they are new.
    pub(crate) fn set_node(&mut self, name: &str, facts: NodeFacts) -> bool {
        let slot = self.slots.entry(name.to_owned()).or_default();
        if slot.facts.as_ref() == Some(&facts) {
            return false;
        }
        slot.facts = Some(facts);
        true
    }

    pub(crate) fn remove_node(&mut self, name: &str) {
        if let Some(slot) = self.slots.get_mut(name) {
            slot.facts = None;
            if slot.pods == 0 {
                self.slots.remove(name);
            }
        }
    }

    /// Counts a pod on a node; again for the same pod replaces what was counted.
    pub(crate) fn add_pod(&mut self, uid: &str, node: &str, load: Load) {
        if self.placed.get(uid).is_some_and(|(at, its)| at == node && *its == load) {
            return;
        }
        self.remove_pod(uid);
        let slot = self.slots.entry(node.to_owned()).or_default();
        slot.used.amounts.add(&load.amounts);
        slot.used.weight.0 = slot.used.weight.0.saturating_add(load.weight.0);
        slot.used.weight.1 = slot.used.weight.1.saturating_add(load.weight.1);
        slot.used.ports.extend(load.ports.iter().cloned());
        slot.pods += 1;
        self.placed.insert(uid.to_owned(), (node.to_owned(), load));
    }

    /// Takes a pod off its node. Tells whether it was on one.
    pub(crate) fn remove_pod(&mut self, uid: &str) -> bool {
        let Some((node, load)) = self.placed.remove(uid) else { return false };
        let Some(slot) = self.slots.get_mut(&node) else { return true };
        slot.used.amounts.subtract(&load.amounts);
        slot.used.weight.0 = slot.used.weight.0.saturating_sub(load.weight.0);
        slot.used.weight.1 = slot.used.weight.1.saturating_sub(load.weight.1);
        for port in &load.ports {
            if let Some(at) = slot.used.ports.iter().position(|p| p == port) {
                slot.used.ports.swap_remove(at);
            }
        }
        slot.pods -= 1;
        if slot.pods == 0 && slot.facts.is_none() {
            self.slots.remove(&node);
        }
        true
    }

    /// The best node for a pod. Ties go to the node with fewer pods, then to the first by name.
    pub(crate) fn place(&self, ask: &Ask) -> Result<&str, Unplaceable> {
        let mut why = Unplaceable { nodes: 0, reasons: BTreeMap::new() };
        let mut fitting: Vec<Candidate<'_>> = Vec::new();
        for (name, slot) in &self.slots {
            let Some(facts) = &slot.facts else { continue };
            why.nodes += 1;
            match fits(name, facts, slot, ask) {
                Ok(()) => fitting.push(Candidate::new(name, facts, slot, ask)),
                Err(reasons) => {
                    for reason in reasons {
                        *why.reasons.entry(reason).or_default() += 1;
                    }
                }
            }
        }
        let shunned_max = fitting.iter().map(|c| c.shunned).max().unwrap_or(0);
        let liked_max = fitting.iter().map(|c| c.liked).max().unwrap_or(0);
        fitting
            .into_iter()
            .max_by(|a, b| {
                let score = |c: &Candidate<'_>| c.score(shunned_max, liked_max);
                score(a).cmp(&score(b)).then(b.pods.cmp(&a.pods)).then(b.name.cmp(a.name))
            })
            .map(|best| best.name)
            .ok_or(why)
    }
}

/// A node that fits, with what its score is made of.
struct Candidate<'a> {
    name: &'a str,
    pods: i64,
    /// What would be left, in percent of what there is.
    free: i64,
    /// `PreferNoSchedule` taints that the pod does not tolerate.
    shunned: i64,
    /// Weights of the preferred terms that hold.
    liked: i64,
}

impl<'a> Candidate<'a> {
    fn new(name: &'a str, facts: &NodeFacts, slot: &Slot, ask: &Ask) -> Candidate<'a> {
        let allocatable = &facts.allocatable;
        let share = |have: i64, used: i64| {
            if have <= 0 { 0 } else { have.saturating_sub(used).max(0).saturating_mul(SCORE_MAX) / have }
        };
        let cpu = share(allocatable.cpu_millis, slot.used.weight.0.saturating_add(ask.load.weight.0));
        let memory = share(allocatable.memory_bytes, slot.used.weight.1.saturating_add(ask.load.weight.1));
        let is_shunned = |t: &&Taint| t.effect == "PreferNoSchedule" && !tolerated(t, &ask.tolerations);
        let liked = ask.preferred.iter().filter(|(_, term)| term.matches(name, &facts.labels));
        Candidate {
            name,
            pods: slot.pods,
            free: i64::midpoint(cpu, memory),
            shunned: i64::try_from(facts.taints.iter().filter(is_shunned).count()).unwrap_or(i64::MAX),
            liked: liked.map(|(weight, _)| *weight).sum(),
        }
    }

    fn score(&self, shunned_max: i64, liked_max: i64) -> i64 {
        let part = |n: i64, max: i64| if max == 0 { 0 } else { n.saturating_mul(SCORE_MAX) / max };
        LEAST_ALLOCATED_WEIGHT * self.free
            + TAINT_WEIGHT * (SCORE_MAX - part(self.shunned, shunned_max))
            + AFFINITY_WEIGHT * part(self.liked, liked_max)
    }
}

/// Whether the pod may go to the node. The reasons are those of the first check that fails.
fn fits(name: &str, facts: &NodeFacts, slot: &Slot, ask: &Ask) -> Result<(), Vec<String>> {
    let refuse = |reason: &str| Err(vec![reason.to_owned()]);
    if facts.is_unschedulable {
        let taint =
            Taint { key: UNSCHEDULABLE.to_owned(), effect: "NoSchedule".to_owned(), ..Taint::default() };
        if !tolerated(&taint, &ask.tolerations) {
            return refuse("node(s) were unschedulable");
        }
    }
    let repels = |t: &&Taint| {
        matches!(t.effect.as_str(), "NoSchedule" | "NoExecute") && !tolerated(t, &ask.tolerations)
    };
    if let Some(taint) = facts.taints.iter().find(repels) {
        return refuse(&format!("node(s) had untolerated taint {{{}: {}}}", taint.key, taint.value));
    }
    let is_chosen = contains_all(&facts.labels, &ask.node_selector)
        && ask.required.as_ref().is_none_or(|terms| terms.iter().any(|t| t.matches(name, &facts.labels)));
    if !is_chosen {
        return refuse("node(s) didn't match Pod's node affinity/selector");
    }
    if ask.load.ports.iter().any(|wanted| slot.used.ports.iter().any(|used| used.collides(wanted))) {
        return refuse("node(s) didn't have free ports for the requested pod ports");
    }
    let lacking = lacking(facts, slot, ask);
    if lacking.is_empty() { Ok(()) } else { Err(lacking) }
}

/// What the node has too little of.
fn lacking(facts: &NodeFacts, slot: &Slot, ask: &Ask) -> Vec<String> {
    let mut reasons = Vec::new();
    if slot.pods >= facts.pods_max {
        reasons.push("Too many pods".to_owned());
    }
    let (have, used, wanted) = (&facts.allocatable, &slot.used.amounts, &ask.load.amounts);
    let is_short = |have: i64, used: i64, wanted: i64| wanted > 0 && wanted > have.saturating_sub(used);
    if is_short(have.cpu_millis, used.cpu_millis, wanted.cpu_millis) {
        reasons.push("Insufficient cpu".to_owned());
    }
    if is_short(have.memory_bytes, used.memory_bytes, wanted.memory_bytes) {
        reasons.push("Insufficient memory".to_owned());
    }
    for (name, wanted) in &wanted.other {
        let of = |amounts: &BTreeMap<String, i64>| amounts.get(name).copied().unwrap_or(0);
        if is_short(of(&have.other), of(&used.other), *wanted) {
            reasons.push(format!("Insufficient {name}"));
        }
    }
    reasons
}

fn tolerated(taint: &Taint, tolerations: &[Toleration]) -> bool {
    tolerations.iter().any(|t| t.tolerates(taint))
}
