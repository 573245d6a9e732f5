//! PURE: samples by the moment in which they were taken, so that beds are compared moment by moment. Invariant: a ratio is
//! of samples that were taken within the same fraction of a second: what the machine does beside the run comes and goes in
//! both, and the median of the ratios forgets the moments in which it did not.

use crate::bed::From;
use crate::wire::Kind;
use std::collections::BTreeMap;

/// What samples are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum What {
    /// Past every service.
    Direct,
    /// Through services.
    Services,
    /// Through the last one of them.
    Last,
    /// Until the answer to a short request past every service.
    DirectAnswer,
    /// The same through services.
    ServicesAnswer,
}

/// Where traffic started, of which kind it was, and what is looked at.
pub(crate) type Figure = (From, Kind, What);

/// A number for some samples in nanoseconds, which there are.
pub(crate) type Of = fn(&mut [u32]) -> f64;

/// Samples of one bed in nanoseconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Blocks(BTreeMap<Figure, BTreeMap<u32, Vec<u32>>>);

/// The median.
pub(crate) fn median(samples: &mut [u32]) -> f64 {
    quantile(samples, 50)
}

/// What one of a hundred is above.
pub(crate) fn p99(samples: &mut [u32]) -> f64 {
    quantile(samples, 99)
}

/// The mean without the slowest twentieth, which has the moments in which the process did not run.
pub(crate) fn trimmed_mean(samples: &mut [u32]) -> f64 {
    samples.sort_unstable();
    let kept = &samples[..samples.len() - samples.len() / 20];
    kept.iter().map(|ns| f64::from(*ns)).sum::<f64>() / kept.len().max(1) as f64
}

fn quantile(samples: &mut [u32], percent: usize) -> f64 {
    let at = (samples.len() * percent / 100).min(samples.len().saturating_sub(1));
    if samples.is_empty() { 0.0 } else { f64::from(*samples.select_nth_unstable(at).1) }
}

impl Blocks {
    /// Adds samples of a moment.
    pub(crate) fn add(&mut self, figure: Figure, block: u32, ns: &[u64]) {
        let samples = self.0.entry(figure).or_default().entry(block).or_default();
        samples.extend(ns.iter().map(|ns| u32::try_from(*ns).unwrap_or(u32::MAX)));
    }

    /// Adds all samples of another bed.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (figure, blocks) in &other.0 {
            let held = self.0.entry(*figure).or_default();
            blocks.iter().for_each(|(block, ns)| held.entry(*block).or_default().extend(ns));
        }
    }

    /// Samples of `figure`, those of `together` blocks as one moment.
    fn moments(&self, figure: Figure, together: u32) -> BTreeMap<u32, Vec<u32>> {
        let mut moments: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (block, ns) in self.0.get(&figure).into_iter().flatten() {
            moments.entry(block / together).or_default().extend(ns);
        }
        moments.retain(|_, ns| !ns.is_empty());
        moments
    }

    /// The median over all moments of what `of` says of each.
    pub(crate) fn typical(&self, figure: Figure, together: u32, of: Of) -> Option<f64> {
        middle(self.moments(figure, together).into_values().map(|mut ns| of(&mut ns)).collect())
    }

    /// The median over all moments of what `of` says of this bed's `figure` ÷ what it says of the other's.
    pub(crate) fn ratio(
        &self,
        figure: Figure,
        (other, of_other): (&Self, Figure),
        together: u32,
        of: Of,
    ) -> Option<f64> {
        let mut others = other.moments(of_other, together);
        let ratios = self.moments(figure, together).into_iter().filter_map(|(moment, mut ns)| {
            let other = of(others.get_mut(&moment)?);
            (other > 0.0).then(|| of(&mut ns) / other)
        });
        middle(ratios.collect())
    }
}

fn middle(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIRECT: Figure = (From::Pod, Kind::Connect, What::Direct);
    const SERVICES: Figure = (From::Pod, Kind::Connect, What::Services);

    #[test]
    fn beds_are_compared_moment_by_moment() {
        let (mut bare, mut loaded) = (Blocks::default(), Blocks::default());
        // The machine gets slower and slower; once something hits one bed only.
        for block in 0..21_u32 {
            let ns = u64::from(1000 + 500 * block);
            bare.add(DIRECT, block, &[ns, ns, 9 * ns]);
            let hit = if block == 7 { 10 } else { 1 };
            loaded.add(SERVICES, block, &[ns * 11 / 10 * hit, ns * 11 / 10 * hit, 20 * ns]);
        }
        let ratio = loaded.ratio(SERVICES, (&bare, DIRECT), 1, median).unwrap();
        assert!((ratio - 1.1).abs() < 0.01, "{ratio}");
        let tail = loaded.ratio(SERVICES, (&bare, DIRECT), 7, p99).unwrap();
        assert!((tail - 20.0 / 9.0).abs() < 0.01, "{tail}");
        assert_eq!(loaded.ratio(DIRECT, (&bare, DIRECT), 1, median), None);
        assert_eq!(bare.typical(DIRECT, 1, median), Some(6000.0));
    }

    #[test]
    fn merged_beds_are_one() {
        let (mut one, mut two) = (Blocks::default(), Blocks::default());
        one.add(DIRECT, 0, &[10, 10]);
        two.add(DIRECT, 0, &[30, 30, 30]);
        two.add(DIRECT, 1, &[50]);
        one.merge(&two);
        assert_eq!(one.typical(DIRECT, 2, median), Some(30.0));
        assert_eq!(one.typical(SERVICES, 1, median), None);
    }

    #[test]
    fn a_trimmed_mean_leaves_the_slowest_out() {
        let mut samples: Vec<u32> = vec![10; 39];
        samples.push(1_000_000);
        assert!((trimmed_mean(&mut samples) - 10.0).abs() < 0.001);
        assert!((trimmed_mean(&mut [7]) - 7.0).abs() < 0.001);
    }
}
