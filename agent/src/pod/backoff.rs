//! How long to wait before something that failed is tried again. Pauses double from the first to the
//! longest; a success that lasted wipes the history.

use serde::{Deserialize, Serialize};

use super::model::Millis;
use crate::limits;

/// Failures in a row of one container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Notes that a container ended after running for `ran_ms`, and returns how many milliseconds after
    /// its end it may start again. The first time it may at once.
    pub fn after_exit(&mut self, ran_ms: Millis) -> Millis {
        if ran_ms >= ms(limits::RESTART_BACKOFF_RESET_S) {
            self.failures = 0;
        }
        let pause = match self.failures {
            0 => 0,
            n => doubled(limits::RESTART_BACKOFF_FIRST_S, limits::RESTART_BACKOFF_MAX_S, n - 1),
        };
        self.failures = self.failures.saturating_add(1);
        pause
    }

    /// The pause of a container that did not even start: never none.
    pub fn after_start_failure(&mut self) -> Millis {
        let pause = doubled(limits::RESTART_BACKOFF_FIRST_S, limits::RESTART_BACKOFF_MAX_S, self.failures);
        self.failures = self.failures.saturating_add(1);
        pause
    }

    /// Notes a failure to prepare (sandbox, network, volume, image, configuration) and returns the pause
    /// in milliseconds: 1 s, doubling up to `limits::PREPARE_BACKOFF_MAX_S`.
    pub fn after_preparation(&mut self) -> Millis {
        let pause = doubled(limits::PREPARE_BACKOFF_FIRST_S, limits::PREPARE_BACKOFF_MAX_S, self.failures);
        self.failures = self.failures.saturating_add(1);
        pause
    }

    /// Forgets every failure.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures in a row so far.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

fn ms(seconds: u64) -> Millis {
    Millis::try_from(seconds.saturating_mul(1000)).unwrap_or(Millis::MAX)
}

fn doubled(first_s: u64, max_s: u64, times: u32) -> Millis {
    ms(first_s.saturating_mul(1_u64 << times.min(20)).min(max_s))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_loop_slows_down_to_five_minutes() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Millis> = (0..9).map(|_| backoff.after_exit(1000) / 1000).collect();
        assert_eq!(pauses, [0, 10, 20, 40, 80, 160, 300, 300, 300]);
    }

    #[test]
    fn ten_healthy_minutes_wipe_the_history() {
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            backoff.after_exit(0);
        }
        assert_eq!(backoff.after_exit(599_999), 160_000);
        assert_eq!(backoff.after_exit(600_000), 0);
        assert_eq!(backoff.after_exit(0), 10_000);
    }

    #[test]
    fn a_container_that_does_not_start_always_waits() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.after_start_failure(), 10_000);
        assert_eq!(backoff.after_start_failure(), 20_000);
        for _ in 0..100 {
            assert!(backoff.after_start_failure() <= 300_000);
        }
    }
}
