//! The rows of a set, kept as counts of what its policies allow. Invariant: the counts are the sum of the policies that
//! are listed as counted, each as it was compiled then; so a change costs what the changed policies allow.

use super::ports::{Counted, Ports};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// What a policy allows in one direction, seen by pods with certain named ports.
#[derive(Debug, Default)]
pub(super) struct Compiled {
    /// To everybody.
    pub(super) rest: Vec<Arc<Ports>>,
    /// To identities.
    pub(super) own: Vec<(u32, Arc<Ports>)>,
    /// The peers that it names.
    pub(super) peers: Vec<u32>,
    /// It asks for named ports of receivers, whoever has them.
    pub(super) named: bool,
}

/// A set's rows.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    /// Policies in order, as they were counted.
    counted: Vec<(u32, Arc<Compiled>)>,
    rest: Counted,
    own: HashMap<u32, Counted>,
    /// What row 0 allows.
    normal: Ports,
    /// The list of each identity that has a row, 0 included.
    rows: HashMap<u32, u32>,
}

impl Rows {
    pub(super) fn rows(&self) -> impl Iterator<Item = (u32, u32)> {
        self.rows.iter().map(|(identity, list)| (*identity, *list))
    }

    /// Whether these policies are counted, which are in order, and no others.
    pub(super) fn are_of(&self, policies: &[u32]) -> bool {
        self.counted.iter().map(|(id, _)| id).eq(policies)
    }

    /// Makes the rows those of `wanted`, which is in order. `number` gives lists their numbers.
    pub(super) fn update(
        &mut self,
        wanted: Vec<(u32, Arc<Compiled>)>,
        mut number: impl FnMut(&Ports) -> u32,
    ) {
        let before = std::mem::take(&mut self.counted);
        let mut touched = HashSet::new();
        let (mut old, mut new) = (before.iter().peekable(), wanted.iter().peekable());
        loop {
            match (old.peek(), new.peek()) {
                (None, None) => break,
                (Some((held, was)), Some((id, is))) if held == id => {
                    if !Arc::ptr_eq(was, is) {
                        self.count(is, true, &mut touched);
                        self.count(was, false, &mut touched);
                    }
                    old.next();
                    new.next();
                }
                (Some((held, _)), Some((id, is))) if held > id => {
                    self.count(is, true, &mut touched);
                    new.next();
                }
                (None, Some((_, is))) => {
                    self.count(is, true, &mut touched);
                    new.next();
                }
                (Some((_, was)), _) => {
                    self.count(was, false, &mut touched);
                    old.next();
                }
            }
        }
        self.counted = wanted;
        let rest = self.rest.normal();
        let is_first = self.rows.is_empty();
        if is_first || rest != self.normal {
            touched.extend(self.own.keys().copied());
            self.rows.insert(0, number(&rest));
            self.normal = rest;
        }
        for identity in touched {
            let Some(own) = self.own.get(&identity) else {
                self.rows.remove(&identity);
                continue;
            };
            let allowed = own.normal_with(&self.rest);
            if allowed == self.normal {
                self.rows.remove(&identity);
            } else {
                self.rows.insert(identity, number(&allowed));
            }
        }
    }

    fn count(&mut self, policy: &Compiled, is_new: bool, touched: &mut HashSet<u32>) {
        policy.rest.iter().for_each(|allowed| self.rest.count(allowed, is_new));
        for (identity, allowed) in &policy.own {
            touched.insert(*identity);
            let own = self.own.entry(*identity).or_default();
            own.count(allowed, is_new);
            if own.is_empty() {
                self.own.remove(identity);
            }
        }
    }
}
