//! Dynamic loss scaling, for runs in f16 (Micikevicius et al., 2018, "Mixed Precision Training", section 3.2).
//!
//! f16 has no numbers between 0 and 2^-24, and none above 65,504. Most gradients of activations are small, so the loss is
//! multiplied by a factor, and with it every gradient, until the largest of them are just below the limit; the optimiser
//! divides by it again. Where the limit is, shows when something exceeds it: then the gradient is not finite, and the step is
//! tried again with half the factor and *the same batch*, so that the factor decides about speed alone and no text is lost
//! (metaseq and PyTorch leave the batch out). After `window` steps that went well the factor doubles.
//!
//! A gradient that is not finite even at the floor is not the factor's fault: the step goes to the
//! [guard](crate::recovery), which leaves the batch out and in the end rolls back, and the factor is again what it was before.

use serde::{Deserialize, Serialize};

/// The largest factor: with it the smallest f16 is a gradient of 2^-48, and smaller ones change nothing.
const MOST: f64 = (1 << 24) as f64;

/// `[loss_scale]` of the configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Factor of the first step; a power of two, as all are, so that scaling rounds nothing.
    pub initial: f64,
    /// Steps without an overflow after which the factor doubles.
    pub window: u64,
    /// Smallest factor.
    pub floor: f64,
}

/// Where a scale stands; part of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// What the loss is multiplied by.
    factor: f64,
    /// What it was multiplied by in the last step that was taken.
    held: f64,
    /// Steps taken since the factor changed.
    steps: u64,
}

/// The factor on the loss of each step; 1 for ever without a policy.
#[derive(Clone, Debug)]
pub struct LossScale {
    policy: Option<Policy>,
    state: State,
}

impl LossScale {
    /// A scale that goes on from `state`, or begins. The floor may have been raised since.
    pub fn new(policy: Option<Policy>, state: Option<State>) -> LossScale {
        let (initial, floor) = policy.map_or((1.0, 1.0), |policy| (policy.initial, policy.floor));
        let State { factor, held, steps } =
            state.filter(|_| policy.is_some()).unwrap_or(State { factor: initial, held: initial, steps: 0 });
        LossScale { policy, state: State { factor: factor.max(floor), held: held.max(floor), steps } }
    }

    /// What the loss is multiplied by.
    pub fn factor(&self) -> f64 {
        self.state.factor
    }

    /// The factor, where there is scaling, to be told.
    pub fn told(&self) -> Option<f64> {
        self.policy.map(|_| self.state.factor)
    }

    /// What is to be kept in a checkpoint.
    pub fn state(&self) -> Option<State> {
        self.policy.map(|_| self.state)
    }

    /// The gradient of a finite loss was not finite. True if the factor is lower now and the step to be tried again; false if
    /// it cannot be lower.
    pub fn lower(&mut self) -> bool {
        let (Some(policy), state) = (self.policy, &mut self.state) else { return false };
        let lower = state.factor / 2.0;
        if lower < policy.floor {
            return false;
        }
        (state.factor, state.steps) = (lower, 0);
        true
    }

    /// A step was taken.
    pub fn taken(&mut self) {
        let (Some(policy), state) = (self.policy, &mut self.state) else { return };
        state.held = state.factor;
        state.steps += 1;
        if state.steps >= policy.window && state.factor < MOST {
            (state.factor, state.steps) = (2.0 * state.factor, 0);
        }
    }

    /// A step was not taken, for reasons that are not the factor's.
    pub fn left_out(&mut self) {
        self.state.factor = self.state.held;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Policy = Policy { initial: 8.0, window: 3, floor: 2.0 };

    #[test]
    fn the_factor_halves_at_an_overflow_and_doubles_when_all_went_well() {
        let mut scale = LossScale::new(Some(POLICY), None);
        assert!(scale.lower());
        assert_eq!(scale.factor(), 4.0);
        for expected in [4.0, 4.0, 8.0, 8.0, 8.0, 16.0] {
            scale.taken();
            assert_eq!(scale.factor(), expected);
        }
        scale.taken();
        assert!(scale.lower());
        // The count begins again.
        for expected in [8.0, 8.0, 16.0] {
            scale.taken();
            assert_eq!(scale.factor(), expected);
        }
        (0..1000).for_each(|_| scale.taken());
        assert_eq!(scale.factor(), MOST);
    }

    #[test]
    fn a_bad_batch_costs_no_factor_and_a_checkpoint_remembers_all_of_it() {
        let mut scale = LossScale::new(Some(POLICY), None);
        scale.taken();
        assert!(scale.lower() && scale.lower());
        assert_eq!(scale.factor(), 2.0);
        let text = serde_json::to_string(&scale.state()).unwrap();
        let mut resumed = LossScale::new(Some(POLICY), serde_json::from_str(&text).unwrap());
        for scale in [&mut scale, &mut resumed] {
            assert!(!scale.lower(), "that is the floor");
            scale.left_out();
            assert_eq!(scale.factor(), 8.0);
        }
    }

    #[test]
    fn a_floor_that_was_raised_raises_the_factor() {
        let mut scale = LossScale::new(Some(POLICY), None);
        assert!(scale.lower() && scale.lower());
        scale.taken();
        let mut resumed = LossScale::new(Some(Policy { floor: 4.0, ..POLICY }), scale.state());
        assert_eq!(resumed.factor(), 4.0);
        resumed.left_out();
        assert_eq!(resumed.factor(), 4.0);
    }

    #[test]
    fn without_a_policy_nothing_is_scaled_or_told() {
        let mut scale = LossScale::new(None, None);
        assert!(!scale.lower());
        scale.taken();
        scale.left_out();
        assert_eq!((scale.factor(), scale.told(), scale.state()), (1.0, None, None));
    }
}
