//! Label selectors. Invariant: one that can't be understood selects nothing.

use super::model::Labels;

/// How a requirement compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Op {
    /// The value is one of the listed.
    In,
    /// The value is none of the listed, or there is none.
    NotIn,
    /// There is a value.
    Exists,
    /// There is none.
    NotExists,
    /// Never true: what was asked for is not understood.
    Never,
}

/// One requirement of a selector.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requirement {
    /// Label key.
    pub key: Box<str>,
    /// Comparison.
    pub op: Op,
    /// Values to compare with.
    pub values: Box<[Box<str>]>,
}

/// A label selector: all requirements must hold, so without any it selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Selector(pub Box<[Requirement]>);

impl Selector {
    /// Whether all requirements hold of the labels.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|wanted| {
            let value = labels.get(&wanted.key);
            let listed = |value: &str| wanted.values.iter().any(|one| **one == *value);
            match wanted.op {
                Op::In => value.is_some_and(listed),
                Op::NotIn => !value.is_some_and(listed),
                Op::Exists => value.is_some(),
                Op::NotExists => value.is_none(),
                Op::Never => false,
            }
        })
    }
}
