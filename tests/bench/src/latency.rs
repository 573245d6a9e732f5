//! Latencies with three significant digits, taken in nanoseconds so that quantiles in microseconds keep their fraction.

use std::time::Duration;

use hdrhistogram::Histogram;

#[derive(Debug, Clone)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> Self {
        // Fixed bounds: a histogram that grows by itself does so for `record`, not for `saturating_record`.
        const HOUR_NS: u64 = 3_600_000_000_000;
        Self(Histogram::new_with_bounds(1, HOUR_NS, 3).expect("an hour in nanoseconds fits"))
    }

    pub(crate) fn record(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("histograms grow by themselves");
    }

    pub(crate) fn us(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1000.0
    }

    pub(crate) fn ms(&self, quantile: f64) -> f64 {
        self.us(quantile) / 1000.0
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_and_short_times_keep_their_size() {
        let mut all = Latencies::new();
        let mut one = Latencies::new();
        one.record(Duration::from_millis(7));
        one.record(Duration::from_secs(2));
        all.add(&one);
        assert!((all.ms(0.5) - 7.0).abs() < 0.1, "{}", all.ms(0.5));
        assert!((all.ms(1.0) - 2000.0).abs() < 20.0, "{}", all.ms(1.0));
    }
}
