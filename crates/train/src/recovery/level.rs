//! The recent level of a figure, and what is far above it.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Makes the median absolute deviation an estimate of the standard deviation of a normal distribution.
const NORMAL: f64 = 1.4826;

/// The last values of a figure.
///
/// Their median and median absolute deviation say what is usual: up to half of the values may be anything before either of
/// them breaks down, where a mean and a standard deviation follow the first outlier (Hampel, 1974, "The Influence
/// Curve and its Role in Robust Estimation"; Leys et al., 2013, "Detecting outliers").
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Level(VecDeque<f64>);

impl Level {
    /// Adds a value, which is finite, and forgets all but the last `window`.
    pub fn push(&mut self, value: f64, window: usize) {
        self.0.push_back(value);
        while self.0.len() > window {
            self.0.pop_front();
        }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Median, and robust standard deviation; `None` without values.
    pub fn usual(&self) -> Option<(f64, f64)> {
        let median = median(self.0.iter().copied())?;
        let deviation = median_of_deviations(self.0.iter().copied(), median)?;
        Some((median, NORMAL * deviation))
    }
}

fn median_of_deviations(values: impl Iterator<Item = f64>, median_: f64) -> Option<f64> {
    median(values.map(|v| (v - median_).abs()))
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(if values.len() % 2 == 1 { upper } else { 0.5 * (values[middle - 1] + upper) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(values: &[f64]) -> Level {
        let mut level = Level::default();
        values.iter().for_each(|&v| level.push(v, 100));
        level
    }

    #[test]
    fn known_values() {
        assert_eq!(Level::default().usual(), None);
        assert_eq!(level(&[3.0]).usual(), Some((3.0, 0.0)));
        // Deviations from 2.5 are 1.5, 0.5, 0.5, 1.5.
        assert_eq!(level(&[1.0, 2.0, 3.0, 4.0]).usual(), Some((2.5, NORMAL)));
        assert_eq!(level(&[5.0, 1.0, 2.0, 1000.0, 3.0]).usual(), Some((3.0, NORMAL * 2.0)));
    }

    #[test]
    fn half_of_the_values_may_be_anything() {
        let usual: Vec<f64> = (0..51).map(|i| 3.0 + 0.01 * f64::from(i % 7)).collect();
        let clean = level(&usual).usual().unwrap();
        let spoilt: Vec<f64> = usual.iter().copied().chain([1e6; 40]).collect();
        let (median, deviation) = level(&spoilt).usual().unwrap();
        assert!((median - clean.0).abs() < 0.05 && deviation < 0.1, "{median} {deviation}");
    }

    #[test]
    fn only_the_window_counts() {
        let mut level = Level::default();
        (0..1000).for_each(|i| level.push(f64::from(i), 5));
        assert_eq!((level.len(), level.usual().unwrap().0), (5, 997.0));
    }
}
