//! Learning rate as a pure function of the step, so that a resumed run needs no state for it.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Straight line from the peak to the minimum (OPT's own).
    Linear,
    /// Half a cosine from the peak to the minimum (Loshchilov and Hutter, 2017, without restarts).
    Cosine,
    /// `peak * sqrt(warmup / step)` (Vaswani et al., 2017); needs no total.
    InverseSqrt,
    /// The peak for ever; needs no total.
    Constant,
    /// Warm-up, stable, decay (Hu et al., 2024): the peak until `total - decay`, then a straight line to the minimum.
    Wsd,
}

impl Kind {
    /// Whether the shape depends on the total number of steps.
    pub fn needs_total(self) -> bool {
        matches!(self, Kind::Linear | Kind::Cosine | Kind::Wsd)
    }
}

/// A learning-rate schedule, all lengths in steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub kind: Kind,
    /// Highest learning rate.
    pub peak: f64,
    /// Steps of linear warm-up from 0; the step numbered `warmup` is the first at the peak.
    pub warmup: u64,
    /// Length of the decay (WSD only).
    pub decay: u64,
    /// Step at which the minimum is reached, and kept from there on.
    pub total: u64,
    /// Minimum as a share of the peak.
    pub min_ratio: f64,
}

impl Schedule {
    /// Learning rate of `step`; the first step of a run is 1.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        // How far into the decay, 0 to 1.
        let place = |start: u64| {
            let length = self.total.saturating_sub(start).max(1);
            (step.saturating_sub(start) as f64 / length as f64).min(1.0)
        };
        let height = match self.kind {
            Kind::Constant => return self.peak,
            Kind::InverseSqrt => return self.peak * (self.warmup.max(1) as f64 / step.max(1) as f64).sqrt(),
            Kind::Linear => 1.0 - place(self.warmup),
            Kind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * place(self.warmup)).cos()),
            Kind::Wsd => 1.0 - place(self.total.saturating_sub(self.decay)),
        };
        self.peak * (self.min_ratio + (1.0 - self.min_ratio) * height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: Kind) -> Schedule {
        Schedule { kind, peak: 2.0, warmup: 10, decay: 20, total: 110, min_ratio: 0.1 }
    }

    fn check(kind: Kind, points: &[(u64, f64)]) {
        for &(step, want) in points {
            let got = schedule(kind).lr(step);
            assert!((got - want).abs() < 1e-12, "{kind:?} at step {step}: {got}, expected {want}");
        }
    }

    #[test]
    fn key_points() {
        let warm = [(1, 0.2), (5, 1.0), (10, 2.0)];
        for kind in [Kind::Linear, Kind::Cosine, Kind::InverseSqrt, Kind::Constant, Kind::Wsd] {
            check(kind, &warm);
        }
        check(Kind::Linear, &[(60, 1.1), (110, 0.2), (500, 0.2)]);
        check(Kind::Cosine, &[(60, 1.1), (110, 0.2), (500, 0.2), (35, 0.2 + 0.9 * (1.0 + 0.5f64.sqrt()))]);
        check(Kind::InverseSqrt, &[(40, 1.0), (1000, 0.2)]);
        check(Kind::Constant, &[(60, 2.0), (10_000, 2.0)]);
        check(Kind::Wsd, &[(90, 2.0), (100, 1.1), (110, 0.2), (500, 0.2)]);
    }

    #[test]
    fn no_warm_up_starts_at_the_peak() {
        for kind in [Kind::Linear, Kind::Cosine, Kind::InverseSqrt, Kind::Constant, Kind::Wsd] {
            let s = Schedule { warmup: 0, ..schedule(kind) };
            assert!((s.lr(1) - 2.0).abs() < 0.02 + 1e-12, "{kind:?}");
        }
        // A run of one step, and a decay of no length, do not divide by zero.
        let s = Schedule { kind: Kind::Wsd, peak: 1.0, warmup: 0, decay: 0, total: 1, min_ratio: 0.0 };
        assert!(s.lr(1).is_finite());
    }
}
