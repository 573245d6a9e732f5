//! Which parts of the slots array are free. Invariant: free parts never touch or overlap each other, nor a part that
//! was taken.

use std::collections::{BTreeMap, BTreeSet};

/// A contiguous part of the slots array; `len` may be 0, which takes no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Run {
    /// First slot.
    pub base: u32,
    /// How many slots.
    pub len: u32,
}

/// The free parts, by place and by size.
#[derive(Clone, Debug)]
pub(super) struct Runs {
    by_base: BTreeMap<u32, u32>,
    by_len: BTreeSet<(u32, u32)>,
    free: u32,
}

impl Runs {
    /// All of `slots` free.
    pub(super) fn new(slots: u32) -> Self {
        let mut runs = Self { by_base: BTreeMap::new(), by_len: BTreeSet::new(), free: 0 };
        runs.insert(Run { base: 0, len: slots });
        runs
    }

    /// Free slots in all parts together.
    pub(super) fn free(&self) -> u32 {
        self.free
    }

    fn insert(&mut self, run: Run) {
        if run.len != 0 {
            self.by_base.insert(run.base, run.len);
            self.by_len.insert((run.len, run.base));
            self.free += run.len;
        }
    }

    fn remove(&mut self, run: Run) {
        self.by_base.remove(&run.base);
        self.by_len.remove(&(run.len, run.base));
        self.free -= run.len;
    }

    /// Takes `len` slots from the smallest part that has them; `None` when no part has.
    pub(super) fn take(&mut self, len: u32) -> Option<Run> {
        if len == 0 {
            return Some(Run::default());
        }
        let (found, base) = *self.by_len.range((len, 0)..).next()?;
        self.remove(Run { base, len: found });
        self.insert(Run { base: base + len, len: found - len });
        Some(Run { base, len })
    }

    /// Takes exactly this part; false when some of it is not free.
    pub(super) fn take_exactly(&mut self, run: Run) -> bool {
        if run.len == 0 {
            return true;
        }
        let Some((&base, &len)) = self.by_base.range(..=run.base).next_back() else { return false };
        let Some(end) = run.base.checked_add(run.len) else { return false };
        if base + len < end {
            return false;
        }
        self.remove(Run { base, len });
        self.insert(Run { base, len: run.base - base });
        self.insert(Run { base: end, len: base + len - end });
        true
    }

    /// Gives back what `take` or `take_exactly` took.
    pub(super) fn give_back(&mut self, run: Run) {
        if run.len == 0 {
            return;
        }
        let mut whole = run;
        if let Some((&base, &len)) = self.by_base.range(..run.base).next_back()
            && base + len == run.base
        {
            self.remove(Run { base, len });
            whole = Run { base, len: len + run.len };
        }
        if let Some(&len) = self.by_base.get(&(run.base + run.len)) {
            self.remove(Run { base: run.base + run.len, len });
            whole.len += len;
        }
        self.insert(whole);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn takes_the_best_fit_and_merges_what_comes_back() {
        let mut runs = Runs::new(10);
        let a = runs.take(3).unwrap();
        let b = runs.take(2).unwrap();
        assert_eq!((a.base, b.base, runs.free()), (0, 3, 5));
        runs.give_back(a);
        assert_eq!(runs.take(3).unwrap().base, 0, "the part of 3, not the part of 5");
        assert_eq!(runs.take(6), None);
        runs.give_back(Run { base: 0, len: 3 });
        runs.give_back(b);
        assert_eq!(runs.take(10), Some(Run { base: 0, len: 10 }));
    }

    proptest! {
        #[test]
        fn never_hands_a_slot_out_twice(steps in proptest::collection::vec((any::<bool>(), 0_u32..20, 0_u32..100), 1..200)) {
            let mut runs = Runs::new(100);
            let mut used = [false; 100];
            let mut taken: Vec<Run> = Vec::new();
            for (give, len, base) in steps {
                if give && !taken.is_empty() {
                    let run = taken.swap_remove(base as usize % taken.len());
                    used[run.base as usize..(run.base + run.len) as usize].fill(false);
                    runs.give_back(run);
                } else {
                    let exactly = Run { base, len };
                    let run = if give {
                        let free = u64::from(base) + u64::from(len) <= 100
                            && !used[base as usize..(base + len) as usize].contains(&true);
                        let took = runs.take_exactly(exactly);
                        prop_assert_eq!(took, free || len == 0);
                        took.then_some(exactly)
                    } else {
                        runs.take(len)
                    };
                    if let Some(run) = run && run.len != 0 {
                        let part = &mut used[run.base as usize..(run.base + run.len) as usize];
                        prop_assert!(!part.contains(&true));
                        part.fill(true);
                        taken.push(run);
                    }
                }
                prop_assert_eq!(runs.free() as usize, used.iter().filter(|u| !**u).count());
            }
        }
    }
}
