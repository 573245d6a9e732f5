//! Plans: what is done with the first packet of a connection once its frontend is known. Invariant: a chain per plan
//! that is in use and none besides; plans are few, because services with equally many endpoints share them.

use super::schema::{FIRST_PLAN, Names, PLANS, V4, V6};
use crate::network::netlink::nft::{Element, Transaction, Value, Verdict};
use crate::network::netlink::nft_expr::{Dynamic, Reg, Rule};
use crate::service::Family;
use std::collections::{BTreeSet, HashMap};

/// How to pick an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Plan {
    pub(super) family: Family,
    /// The frontend is found without its address.
    pub(super) node: bool,
    /// The pool for clients outside is to be used.
    pub(super) outside: bool,
    /// Endpoints in the pool.
    pub(super) choices: u32,
    /// Seconds that a client stays; 0 means no affinity.
    pub(super) affinity_s: u32,
    /// Clients must come from the pool's ranges.
    pub(super) ranges: bool,
}

impl Plan {
    fn names(&self) -> &'static Names {
        match self.family {
            Family::V4 => &V4,
            Family::V6 => &V6,
        }
    }

    fn chain(&self) -> String {
        let family = if self.family == Family::V4 { "pick4" } else { "pick6" };
        let node = if self.node { "-node" } else { "" };
        let side = if self.outside { "-outside" } else { "-inside" };
        let affinity = if self.affinity_s == 0 { String::new() } else { format!("-stay{}", self.affinity_s) };
        let ranges = if self.ranges { "-ranges" } else { "" };
        format!("{family}{node}{side}{affinity}{ranges}-of{}", self.choices)
    }

    /// Looks the frontend up again (registers do not outlive a rule) and leaves its pool in register 2.
    fn pool(&self) -> Rule {
        let from = if self.outside { Reg(2) } else { Reg(0) };
        self.names().find(self.node).copy(from, Reg(2))
    }

    fn rules(&self) -> Vec<Rule> {
        let names = self.names();
        let mut rules = Vec::new();
        if self.ranges {
            let rule = names.source(self.pool().copy(Reg(2), Reg(4)), Reg(5));
            rules.push(rule.contained(names.ranges, Reg(4), false).then(Verdict::Drop));
        }
        if self.affinity_s != 0 {
            rules.extend(self.staying());
        }
        // Also when the table of clients is full.
        let rule = self.pool().random(self.choices, Reg(3)).mapped(names.endpoints, Reg(2), Reg(10));
        rules.push(rule.translate(names.family, Reg(10), names.after(Reg(10))));
        rules
    }

    /// Registers: 2 pool, 3 place; 4 pool, then the client; 9 pool, then the endpoint.
    fn staying(&self) -> [Rule; 2] {
        let names = self.names();
        let client = || names.source(self.pool().copy(Reg(2), Reg(4)), Reg(5));
        let remember =
            |rule: Rule, how, timeout_s| rule.dynamic(how, names.affinity, Reg(4), Reg(10), timeout_s);
        let translate = |rule: Rule| rule.translate(names.family, Reg(10), names.after(Reg(10)));
        let known = client().copy(Reg(2), Reg(9)).mapped(names.affinity, Reg(4), Reg(10));
        // An endpoint that has left is still in the table of clients, but no member any more.
        let known = known.contained(names.members, Reg(9), true);
        let known = translate(remember(known, Dynamic::Update, self.affinity_s));
        let new = client().random(self.choices, Reg(3)).mapped(names.endpoints, Reg(2), Reg(10));
        // Updating would keep the endpoint that has left.
        let new = remember(new, Dynamic::Delete, 0);
        [known, translate(remember(new, Dynamic::Add, self.affinity_s))]
    }

    fn create(&self, id: u32, tx: &mut Transaction<'_>) {
        let chain = self.chain();
        tx.add_chain(&chain, None);
        for rule in self.rules() {
            tx.add_rule(&chain, &rule);
        }
        let key = id.to_ne_bytes();
        let value = Value::Verdict(Verdict::Goto(&chain));
        tx.add_element(PLANS, Element { key: &key, end: None, value });
    }

    fn remove(&self, id: u32, tx: &mut Transaction<'_>) {
        let chain = self.chain();
        tx.delete_element(PLANS, Element { key: &id.to_ne_bytes(), end: None, value: Value::None });
        tx.flush_chain(&chain);
        tx.delete_chain(&chain);
    }
}

/// Writes chains with everything that a plan may have, to see whether the kernel takes them.
pub(super) fn probe(tx: &mut Transaction<'_>) {
    for (id, family) in [(FIRST_PLAN, Family::V4), (FIRST_PLAN + 1, Family::V6)] {
        let plan = Plan { family, node: true, outside: true, choices: 2, affinity_s: 1, ranges: true };
        plan.create(id, tx);
    }
}

/// The plans in use.
#[derive(Debug, Default)]
pub(super) struct Plans {
    by_plan: HashMap<Plan, u32>,
    by_id: HashMap<u32, (Plan, u32)>,
    last: u32,
    /// Not referred to any more, as far as the round has got.
    idle: BTreeSet<u32>,
}

impl Plans {
    /// Id of a plan that one more frontend uses; its chain is made where there is none yet.
    pub(super) fn take(&mut self, plan: Plan, tx: &mut Transaction<'_>) -> u32 {
        if let Some(id) = self.by_plan.get(&plan) {
            if let Some((_, users)) = self.by_id.get_mut(id) {
                *users += 1;
            }
            self.idle.remove(id);
            return *id;
        }
        self.last = self.last.max(FIRST_PLAN - 1) + 1;
        plan.create(self.last, tx);
        self.by_plan.insert(plan, self.last);
        self.by_id.insert(self.last, (plan, 1));
        self.last
    }

    /// One frontend less uses it.
    pub(super) fn give_back(&mut self, id: u32) {
        if let Some((_, users)) = self.by_id.get_mut(&id) {
            *users -= 1;
            if *users == 0 {
                self.idle.insert(id);
            }
        }
    }

    /// Removes the chains that the round has left without users; to be called when nothing refers to them.
    pub(super) fn sweep(&mut self, tx: &mut Transaction<'_>) {
        for id in std::mem::take(&mut self.idle) {
            if let Some((plan, _)) = self.by_id.remove(&id) {
                self.by_plan.remove(&plan);
                plan.remove(id, tx);
            }
        }
    }

    /// Rules of all plans' chains.
    pub(super) fn rule_count(&self) -> usize {
        self.by_plan.keys().map(|plan| plan.rules().len()).sum()
    }
}
