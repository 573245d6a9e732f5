//! PURE: latencies and their quantiles. Invariant: three significant digits, kept in nanoseconds, so that quantiles in
//! microseconds keep their fraction.

use hdrhistogram::Histogram;

/// An hour; longer ones count as one.
const LONGEST_NS: u64 = 3_600_000_000_000;

/// Latencies of one kind.
#[derive(Clone, Debug)]
pub(crate) struct Latencies {
    histogram: Option<Histogram<u64>>,
    total_ns: u64,
    failed: u64,
}

impl Latencies {
    pub(crate) fn new() -> Self {
        Self { histogram: Histogram::new_with_bounds(1, LONGEST_NS, 3).ok(), total_ns: 0, failed: 0 }
    }

    pub(crate) fn record_ns(&mut self, ns: u64) {
        if let Some(histogram) = &mut self.histogram {
            histogram.saturating_record(ns);
        }
        self.total_ns += ns;
    }

    pub(crate) fn fail(&mut self, times: u64) {
        self.failed += times;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        if let (Some(histogram), Some(other)) = (&mut self.histogram, &other.histogram) {
            // Both have the same bounds, which is all that can differ.
            histogram.add(other).unwrap_or_default();
        }
        self.total_ns += other.total_ns;
        self.failed += other.failed;
    }

    /// A quantile in microseconds; `None` without a sample.
    pub(crate) fn us(&self, quantile: f64) -> Option<f64> {
        let histogram = self.histogram.as_ref().filter(|histogram| !histogram.is_empty())?;
        Some(histogram.value_at_quantile(quantile) as f64 / 1000.0)
    }

    /// What one client did a second, waiting for each before the next.
    pub(crate) fn per_second(&self) -> Option<f64> {
        (self.total_ns > 0).then(|| self.len() as f64 * 1e9 / self.total_ns as f64)
    }

    pub(crate) fn len(&self) -> u64 {
        self.histogram.as_ref().map_or(0, Histogram::len)
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failed
    }
}

/// `a ÷ b`, where both are there and `b` is something.
pub(crate) fn ratio(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    Some(a? / b.filter(|b| *b > 0.0)?)
}

/// A small generator of random numbers (xorshift64*), so that a run can be told by its seed.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `end`; 0 when that is 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        (number as usize).checked_rem(end).unwrap_or(0)
    }

    /// Puts `items` in a random order.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_all_samples() {
        let (mut all, mut more) = (Latencies::new(), Latencies::new());
        (1..=50u64).for_each(|n| all.record_ns(n * 1000));
        (51..=100u64).for_each(|n| more.record_ns(n * 1000));
        more.fail(2);
        all.add(&more);
        let near = |q, want: f64| assert!((all.us(q).unwrap() - want).abs() < 0.2, "{:?}", all.us(q));
        near(0.5, 50.0);
        near(0.99, 99.0);
        near(1.0, 100.0);
        assert_eq!((all.len(), all.failed()), (100, 2));
        // 100 of them took 5,050 µs together.
        assert!((all.per_second().unwrap() - 19_801.98).abs() < 0.1);
    }

    #[test]
    fn nothing_measured_is_nothing() {
        let none = Latencies::new();
        assert_eq!((none.us(0.5), none.per_second()), (None, None));
        assert_eq!(ratio(Some(1.0), None), None);
        assert_eq!(ratio(Some(1.0), Some(0.0)), None);
        assert_eq!(ratio(Some(3.0), Some(2.0)), Some(1.5));
    }

    #[test]
    fn shuffling_keeps_everything_and_puts_each_first_alike() {
        let mut random = Random::new(7);
        let mut first = [0; 4];
        for _ in 0..4000 {
            let mut items = [0, 1, 2, 3];
            random.shuffle(&mut items);
            first[items[0]] += 1;
            items.sort_unstable();
            assert_eq!(items, [0, 1, 2, 3]);
        }
        assert!(first.iter().all(|times| (800..1200).contains(times)), "{first:?}");
    }
}
