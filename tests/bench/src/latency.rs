//! Latencies with three significant digits, taken in nanoseconds so that quantiles in microseconds keep their fraction.

use std::time::Duration;

use hdrhistogram::Histogram;

#[derive(Debug, Clone)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> Self {
        Self(Histogram::new(3).expect("three digits are allowed"))
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
