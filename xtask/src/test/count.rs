//! Counting from what test programs print. A program that dies without a verdict is a failure, never a gap.

/// What came of a ring.
#[derive(Default, Debug, PartialEq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
    /// What the summary line adds: why tests were skipped, what failed besides tests.
    pub(crate) notes: Vec<String>,
}

impl Tally {
    /// `312 passed, 0 failed, 0 skipped`
    pub(crate) fn counts(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }

    /// The counts and the notes.
    pub(crate) fn line(&self) -> String {
        if self.notes.is_empty() {
            return self.counts();
        }
        format!("{} ({})", self.counts(), self.notes.join("; "))
    }

    pub(crate) fn add(&mut self, other: &Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Adds a failure that is not a test's.
    pub(crate) fn fail(&mut self, note: String) {
        self.failed += 1;
        self.notes.push(note);
    }

    /// Counts tests that failed and were run once more by what came of that, and names them: a test that passes now and
    /// then is a defect that somebody has to look at.
    pub(crate) fn take_second_run(&mut self, names: &[String], again: &Tally) {
        let mended = again.failed == 0 && again.passed == names.len() as u64;
        let what = if mended { "UNSTEADY, failed at first" } else { "failed, also alone" };
        self.notes.push(format!("{what}: {}", names.join(", ")));
        if mended {
            self.failed = self.failed.saturating_sub(again.passed);
            self.passed += again.passed;
        }
    }

    /// Moves tests that skipped themselves from passed to skipped. `reported` has a line `<test>\t<reason>` for each;
    /// one that is missing from `allowed` (ring, test) is a failure, if there is such a list.
    pub(crate) fn take_skips(&mut self, reported: &str, ring: &str, allowed: &Option<Vec<(String, String)>>) {
        for line in reported.lines() {
            let (test, reason) = line.split_once('\t').unwrap_or((line, "no reason"));
            self.passed = self.passed.saturating_sub(1);
            self.skipped += 1;
            self.notes.push(format!("{test}: {reason}"));
            self.judge_skip(test, ring, allowed);
        }
    }

    fn judge_skip(&mut self, test: &str, ring: &str, allowed: &Option<Vec<(String, String)>>) {
        let listed = |list: &Vec<(String, String)>| list.iter().any(|(r, t)| r == ring && t == test);
        if allowed.as_ref().is_some_and(|list| !listed(list)) {
            self.fail(format!("{test} may not be skipped: not in tests/allowed-skips.txt"));
        }
    }
}

/// Counts the verdicts in `log`; `success` is cargo's own exit status.
pub(crate) fn tally(log: &str, success: bool) -> Tally {
    let mut tally = Tally::default();
    let (mut started, mut ended) = (0, 0);
    for line in log.lines() {
        let line = line.trim_start();
        if line.starts_with("Running ") && line.ends_with(')') {
            started += 1;
        } else if let Some(rest) = line.strip_prefix("test result: ") {
            ended += 1;
            tally.passed += number_before(rest, " passed");
            tally.failed += number_before(rest, " failed");
            // `#[ignore]` is a skip that nobody may allow: it hides from the list.
            for _ in 0..number_before(rest, " ignored") {
                tally.skipped += 1;
                tally.fail("a test is marked #[ignore]".into());
            }
        }
    }
    if ended < started {
        tally.fail(format!("{} test programs died without a verdict", started - ended));
    } else if !success && tally.failed == 0 {
        tally.fail("cargo failed".into());
    } else if started == 0 {
        tally.fail("no test program ran".into());
    }
    tally
}

/// Names of the tests that `log` says have failed.
pub(crate) fn failures(log: &str) -> Vec<String> {
    let verdicts = log.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
    verdicts.map(|name| name.split(" - ").next().unwrap_or(name).to_owned()).collect()
}

fn number_before(text: &str, word: &str) -> u64 {
    let Some(end) = text.find(word) else { return 0 };
    let digits = text[..end].rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "     Running unittests src/lib.rs (target/debug/deps/a-1)\n\
        test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.00s\n\
        \x20    Running tests/host/main.rs (target/debug/deps/host-1)\n\
        test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";

    #[test]
    fn verdicts_add_up() {
        let tally = tally(GOOD, true);
        assert_eq!(tally.line(), "15 passed, 0 failed, 0 skipped");
    }

    #[test]
    fn a_program_without_a_verdict_is_a_failure() {
        let log = format!("{GOOD}     Running tests/x.rs (target/debug/deps/x-1)\n");
        assert_eq!(tally(&log, false).failed, 1);
    }

    #[test]
    fn nothing_run_is_a_failure() {
        assert_eq!(tally("", true).failed, 1);
        assert_eq!(tally(GOOD, false).failed, 1);
    }

    #[test]
    fn failures_are_named_and_a_second_run_counts() {
        let log = "test a::b ... ok\ntest a::c ... FAILED\ntest a::d - should panic ... FAILED\n";
        let names = failures(log);
        assert_eq!(names, ["a::c", "a::d"]);
        let first = || Tally { passed: 1, failed: 2, ..Tally::default() };
        let mut mended = first();
        mended.take_second_run(&names, &Tally { passed: 2, ..Tally::default() });
        assert_eq!((mended.passed, mended.failed), (3, 0));
        assert!(mended.line().contains("UNSTEADY, failed at first: a::c, a::d"));
        for again in [Tally { passed: 1, failed: 1, ..Tally::default() }, Tally::default()] {
            let mut still = first();
            still.take_second_run(&names, &again);
            assert_eq!((still.passed, still.failed), (1, 2));
        }
    }

    #[test]
    fn skips_are_not_passes_and_must_be_listed() {
        let mut free = tally(GOOD, true);
        free.take_skips("a::b\tneeds root\n", "host", &None);
        assert_eq!((free.passed, free.failed, free.skipped), (14, 0, 1));
        let mut strict = tally(GOOD, true);
        strict.take_skips("a::b\tneeds root\nc\twhy\n", "host", &Some(vec![("host".into(), "c".into())]));
        assert_eq!((strict.passed, strict.failed, strict.skipped), (13, 1, 2));
    }
}
