//! A short fuzzing run with fixed seeds; `cargo xtask soak fuzz` is the long one.

use crate::fuzz;

#[test]
fn spoilt_frames_break_no_rule() {
    for seed in 1..=3 {
        let (tally, finding) = fuzz::run(seed, |tally| tally.frames < 120_000);
        assert!(finding.is_none(), "seed {seed}: {}", finding.unwrap());
        // The run is worth something only while frames get far into the core.
        let far = [tally.translated, tally.returned, tally.answered].map(|n| n > 300);
        assert_eq!(far, [true; 3], "seed {seed}: {tally:?}");
        assert!(
            tally.sent > 10 && tally.received > 10 && tally.told > 2 && tally.entered > 10,
            "seed {seed}: {tally:?}"
        );
    }
}
