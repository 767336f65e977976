//! Medians and percentiles.

/// Measured values, one a round or one an operation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series(Vec<f64>);

impl Series {
    /// From values in the order in which they were measured.
    pub fn new(values: Vec<f64>) -> Self {
        Series(values)
    }

    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The values as measured.
    pub fn values(&self) -> &[f64] {
        &self.0
    }

    /// Nearest-rank percentile, `p` from 0 to 1; NaN of nothing.
    pub fn percentile(&self, p: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = ((p * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len().max(1));
        sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    /// The median (of an even number: the mean of the middle two); NaN of nothing.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            n if n % 2 == 1 => sorted[n / 2],
            n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
        }
    }

    /// Round by round, this over `other`: noise that lasts longer than a round is in both and goes out.
    pub fn ratios(&self, other: &Series) -> Series {
        Series(self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect())
    }

    /// Round by round, this less `other`.
    pub fn differences(&self, other: &Series) -> Series {
        Series(self.0.iter().zip(&other.0).map(|(a, b)| a - b).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let s = Series::new((1..=100).rev().map(f64::from).collect());
        assert_eq!(s.median(), 50.5);
        assert_eq!(s.percentile(0.99), 99.0);
        assert_eq!(s.percentile(1.0), 100.0);
        assert_eq!(s.percentile(0.0), 1.0);
        assert!(Series::default().median().is_nan());
        assert!(Series::default().percentile(0.5).is_nan());
    }

    #[test]
    fn a_slow_phase_of_the_machine_cancels_out() {
        let ours = Series::new(vec![2.0, 2.0, 20.0]);
        let limit = Series::new(vec![1.0, 1.0, 10.0]);
        assert_eq!(ours.ratios(&limit).median(), 2.0);
    }
}
