//! What single probe results add up to. A verdict changes only after as many results in a row as the
//! probe's thresholds ask for; a probe that could not be carried out changes nothing.

use super::model::Probe;

/// Which question a probe answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProbeKind {
    /// Has it started? Holds the other two back until it has.
    Startup,
    /// Must it be restarted?
    Liveness,
    /// May it get traffic?
    Readiness,
}

impl ProbeKind {
    /// As events name it.
    pub fn as_str(self) -> &'static str {
        match self {
            ProbeKind::Startup => "Startup",
            ProbeKind::Liveness => "Liveness",
            ProbeKind::Readiness => "Readiness",
        }
    }
}

/// What one try found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeResult {
    /// It is well.
    Success,
    /// It is not, with what it said.
    Failure(String),
    /// The question could not be asked.
    Unknown(String),
}

/// What the results add up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// No threshold was reached yet.
    Undecided,
    /// Enough successes in a row.
    Passing,
    /// Enough failures in a row.
    Failing,
}

/// Results in a row of one probe of one container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    verdict: Verdict,
    successes: i64,
    failures: i64,
}

impl Tally {
    /// A tally that nothing was counted on, with a verdict that an earlier agent reached.
    pub fn starting_at(verdict: Verdict) -> Self {
        Tally { verdict, successes: 0, failures: 0 }
    }

    /// Counts one result. Returns the new verdict if it changed.
    pub fn count(&mut self, result: &ProbeResult, probe: &Probe) -> Option<Verdict> {
        let reached = match result {
            ProbeResult::Unknown(_) => return None,
            ProbeResult::Success => {
                self.failures = 0;
                self.successes = self.successes.saturating_add(1);
                (self.successes >= probe.success_threshold.max(1)).then_some(Verdict::Passing)
            }
            ProbeResult::Failure(_) => {
                self.successes = 0;
                self.failures = self.failures.saturating_add(1);
                (self.failures >= probe.failure_threshold.max(1)).then_some(Verdict::Failing)
            }
        };
        let changed = reached.filter(|verdict| *verdict != self.verdict)?;
        self.verdict = changed;
        Some(changed)
    }

    /// What it adds up to so far.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn probe(success_threshold: i64, failure_threshold: i64) -> Probe {
        Probe { success_threshold, failure_threshold, ..Probe::default() }
    }

    fn run(probe: &Probe, results: &str) -> Vec<Option<Verdict>> {
        let mut tally = Tally::starting_at(Verdict::Undecided);
        let result = |c| match c {
            's' => ProbeResult::Success,
            'f' => ProbeResult::Failure(String::new()),
            _ => ProbeResult::Unknown(String::new()),
        };
        results.chars().map(|c| tally.count(&result(c), probe)).collect()
    }

    #[test]
    fn thresholds_count_results_in_a_row() {
        use Verdict::{Failing, Passing};
        let (n, p, f) = (None, Some(Passing), Some(Failing));
        assert_eq!(run(&probe(1, 3), "sffsfff"), [p, n, n, n, n, n, f]);
        assert_eq!(run(&probe(2, 1), "fsfss"), [f, n, n, n, p]);
        assert_eq!(run(&probe(1, 3), "sff?f"), [p, n, n, n, f], "an error counts neither way");
        assert_eq!(run(&probe(0, 0), "sf"), [p, f], "thresholds below one mean one");
    }

    proptest! {
        #[test]
        fn a_passing_probe_never_fails_early(results in "[sf]{0,40}", threshold in 1_i64..6) {
            let verdicts = run(&probe(1, threshold), &results);
            for (i, verdict) in verdicts.iter().enumerate() {
                if *verdict == Some(Verdict::Failing) {
                    let run = usize::try_from(threshold).expect("small");
                    prop_assert!(i + 1 >= run);
                    prop_assert!(results[i + 1 - run..=i].chars().all(|c| c == 'f'));
                }
            }
        }
    }
}
