//! The state machine: figures of a step in, what to do out.

use super::{Level, Policy};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// Least robust standard deviation of a loss, as a share of it: where batches hardly differ, a rise by a few percent is
/// many deviations, and still no reason to stop. With the threshold 10 a loss must rise by three tenths.
const LEAST_LOSS_DEVIATION: f64 = 0.03;

/// The same in nats: where a model knows its text by heart, losses are next to nothing, and a batch that it knows a little less
/// well has a multiple of that. With the threshold 10 a loss must rise by half a nat.
const LEAST_LOSS_RISE: f64 = 0.05;

/// The same for the logarithm of a gradient norm. With the threshold 10 it must grow to e^2, seven times its level.
const LEAST_NORM_DEVIATION: f64 = 0.2;

/// A gradient up to so many times the clip is scaled down and does no harm by itself, however small the recent ones were.
const HARMLESS: f64 = 10.0;

/// Robust standard deviations from which on a loss is above its level, so that a gradient is trouble whatever its length.
const RAISED: f64 = 3.0;

/// Decides about every step. See the [module](super).
#[derive(Clone, Debug)]
pub struct Guard {
    policy: Policy,
    state: State,
}

/// What a guard remembers; part of a checkpoint.
///
/// A *batch* is the samples of one step. They are numbered in the order of the data: without trouble, step 1 takes batch 0,
/// step 2 batch 1 and so on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Batch that the next step takes.
    next: u64,
    /// Batches that are left out, in ascending order.
    left_out: Vec<Range<u64>>,
    losses: Level,
    /// Logarithms of gradient norms.
    norms: Level,
    /// Steps that were skipped within the window, and their batches.
    skips: Vec<Skip>,
    /// Step that each roll-back went back to.
    forks: Vec<u64>,
    /// First step of the trouble that led to the last roll-back.
    trouble: u64,
    /// Factors that roll-backs have put on the learning rate and on the clip.
    factors: Factors,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Skip {
    step: u64,
    batch: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Factors {
    lr: f64,
    clip: f64,
    /// Last step that they hold for; the run's last unless given.
    until: Option<u64>,
}

impl Default for Factors {
    fn default() -> Self {
        Factors { lr: 1.0, clip: 1.0, until: None }
    }
}

impl State {
    /// State of a run that has done `step` steps and knows of no trouble.
    pub fn after(step: u64) -> State {
        State { next: step, ..State::default() }
    }

    /// Batches that the step numbered `step` was tried with in vain.
    pub fn skipped(&self, step: u64) -> Vec<u64> {
        self.skips.iter().filter(|skip| skip.step == step).map(|skip| skip.batch).collect()
    }
}

/// Why a step was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cause {
    /// Number that the step would have had.
    pub step: u64,
    /// Its batch.
    pub batch: u64,
    /// Its loss, nats per token.
    pub loss: f64,
    /// Its gradient norm.
    pub grad_norm: f64,
    /// What was wrong with them.
    pub wrong: Wrong,
}

/// What was wrong with a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wrong {
    /// Loss or gradient norm is not finite.
    NotFinite,
    /// The loss was this many robust standard deviations above its recent median.
    Loss {
        /// Deviations.
        deviations: f64,
        /// Recent median.
        usual: f64,
    },
    /// The same of the gradient norm, by logarithms.
    Norm {
        /// Deviations.
        deviations: f64,
        /// Recent median.
        usual: f64,
    },
}

impl Cause {
    /// Whether loss or gradient were not finite.
    pub fn not_finite(&self) -> bool {
        self.wrong == Wrong::NotFinite
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cause { loss, grad_norm, .. } = *self;
        match self.wrong {
            Wrong::NotFinite => write!(f, "loss {loss:.4}, gradient norm {grad_norm:.3}: not finite"),
            Wrong::Loss { deviations, usual } => write!(
                f,
                "loss {loss:.4} is {deviations:.1} robust deviations above the recent {usual:.4} (gradient norm \
                 {grad_norm:.3})"
            ),
            Wrong::Norm { deviations, usual } => write!(
                f,
                "gradient norm {grad_norm:.3} is {deviations:.1} robust deviations above the recent {usual:.3} (loss \
                 {loss:.4})"
            ),
        }
    }
}

/// More trouble than skipping helps against.
#[derive(Clone, Debug, PartialEq)]
pub struct Trouble {
    /// Why the last step was not taken.
    pub cause: Cause,
    /// First step of the trouble.
    pub first: u64,
    /// Newest step whose weights are trusted.
    pub trusted: u64,
    /// Batches that are mistrusted.
    pub batches: Range<u64>,
}

/// What to do with a gradient.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Take the step.
    Accept,
    /// Take no step; try with the next batch.
    Skip(Cause),
    /// Go back, then call [`Guard::roll_back`].
    RollBack(Trouble),
    /// End the run.
    GiveUp(Cause),
}

impl Guard {
    /// A guard that goes on from `state`.
    pub fn new(policy: Policy, state: State) -> Guard {
        Guard { policy, state }
    }

    /// What is to be kept in a checkpoint.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Batch that the next step takes.
    pub fn batch(&self) -> u64 {
        self.state.next
    }

    /// Roll-backs so far.
    pub fn rollbacks(&self) -> u64 {
        self.state.forks.len() as u64
    }

    /// Factors on learning rate and clip at `step`.
    pub fn factors(&self, step: u64) -> (f64, f64) {
        let Factors { lr, clip, until } = self.state.factors;
        if until.is_some_and(|until| step > until) { (1.0, 1.0) } else { (lr, clip) }
    }

    /// Whether a checkpoint of `step` that was saved after so many roll-backs is one that the run has gone through, rather
    /// than one that a roll-back has left behind.
    pub fn went_through(&self, rollbacks: u64, step: u64) -> bool {
        let later = usize::try_from(rollbacks).ok().and_then(|r| self.state.forks.get(r..));
        later.is_some_and(|later| later.iter().all(|&fork| step <= fork))
    }

    /// Judges the gradient of step number `step`, whose loss and gradient norm these are.
    pub fn judge(&mut self, step: u64, loss: f64, grad_norm: f64) -> Verdict {
        let batch = self.state.next;
        let Some(wrong) = self.wrong(step, loss, grad_norm) else {
            self.accept(step, loss, grad_norm);
            return Verdict::Accept;
        };
        let cause = Cause { step, batch, loss, grad_norm, wrong };
        let s = &mut self.state;
        s.skips.push(Skip { step, batch });
        if !self.policy.enabled {
            return Verdict::GiveUp(cause);
        }
        s.leave_out(batch..batch + 1);
        if s.skips.len() <= self.policy.max_skips {
            return Verdict::Skip(cause);
        }
        if s.forks.len() >= self.policy.max_rollbacks {
            return Verdict::GiveUp(cause);
        }
        let Skip { step: first, batch: first_batch } = s.skips[0];
        let batches = first_batch.saturating_sub(self.policy.margin)..batch + 1;
        Verdict::RollBack(Trouble { cause, first, trusted: self.trusted(first), batches })
    }

    /// Newest step whose weights are trusted if there is trouble from step `first` on.
    fn trusted(&self, first: u64) -> u64 {
        let (policy, s) = (&self.policy, &self.state);
        let trusted = (first - 1).saturating_sub(policy.margin);
        match s.forks.last() {
            // The trouble is back where the last roll-back should have helped, so that did not go back far enough.
            Some(last) if first <= s.trouble + policy.window as u64 => trusted.min(last.saturating_sub(1)),
            _ => trusted,
        }
    }

    /// Newest step that a roll-back may have to go back to, now that `step` steps are done: what comes then may be the end of a
    /// trouble that began with a step that was skipped already. None where nothing is rolled back any more.
    pub fn way_back(&self, step: u64) -> Option<u64> {
        let (policy, s) = (&self.policy, &self.state);
        let first = s.skips.first().map_or(step + 1, |skip| skip.step);
        (policy.enabled && s.forks.len() < policy.max_rollbacks).then(|| self.trusted(first))
    }

    /// Goes on from step `to`, at which a checkpoint had the state `then`, past the data of `trouble` and with lower
    /// factors.
    pub fn roll_back(&mut self, trouble: &Trouble, to: u64, then: State) {
        let (policy, now) = (&self.policy, &mut self.state);
        let (lr, clip) = match now.factors.until {
            Some(until) if trouble.first > until => (1.0, 1.0),
            _ => (now.factors.lr, now.factors.clip),
        };
        let factors = Factors {
            lr: lr * policy.lr_factor,
            clip: clip * policy.clip_factor,
            until: policy.cooldown.map(|steps| trouble.first + steps),
        };
        let forks = now.forks.iter().copied().chain([to]).collect();
        let left_out = std::mem::take(&mut now.left_out);
        *now = State { left_out, forks, factors, trouble: trouble.first, skips: Vec::new(), ..then };
        now.leave_out(trouble.batches.clone());
    }

    fn wrong(&self, step: u64, loss: f64, grad_norm: f64) -> Option<Wrong> {
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Some(Wrong::NotFinite);
        }
        let (policy, s) = (&self.policy, &self.state);
        if !policy.enabled {
            return None;
        }
        // A quarter of the window gives a median and a deviation that can be relied on.
        let enough = |level: &Level| level.len() >= (policy.window / 4).max(16);
        if !enough(&s.losses) {
            return None;
        }
        let (usual, deviation) = s.losses.usual()?;
        let least = LEAST_LOSS_RISE.max(LEAST_LOSS_DEVIATION * usual.abs());
        let raised = (loss - usual) / deviation.max(least);
        if policy.loss_threshold > 0.0 && raised > policy.loss_threshold {
            return Some(Wrong::Loss { deviations: raised, usual });
        }
        let clip = policy.clip * self.factors(step).1;
        let harmless = grad_norm <= HARMLESS * clip && raised <= RAISED;
        if policy.norm_threshold > 0.0 && enough(&s.norms) && step > policy.warmup && !harmless {
            let (usual, deviation) = s.norms.usual()?;
            let deviations = (logarithm(grad_norm) - usual) / deviation.max(LEAST_NORM_DEVIATION);
            if deviations > policy.norm_threshold {
                return Some(Wrong::Norm { deviations, usual: usual.exp() });
            }
        }
        None
    }

    fn accept(&mut self, step: u64, loss: f64, grad_norm: f64) {
        let (window, s) = (self.policy.window, &mut self.state);
        s.losses.push(loss, window);
        s.norms.push(logarithm(grad_norm), window);
        s.skips.retain(|skip| skip.step + window as u64 > step);
        s.next += 1;
        s.pass_over();
    }
}

impl State {
    /// Leaves batches out for good.
    fn leave_out(&mut self, batches: Range<u64>) {
        self.left_out.push(batches);
        self.left_out.sort_by_key(|range| range.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for range in self.left_out.drain(..) {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        self.left_out = merged;
        self.pass_over();
    }

    fn pass_over(&mut self) {
        // In ascending order and apart from each other, so that at most one holds the next batch.
        if let Some(range) = self.left_out.iter().find(|range| range.contains(&self.next)) {
            self.next = range.end;
        }
    }
}

/// Of a gradient norm, which may be 0.
fn logarithm(norm: f64) -> f64 {
    norm.max(f64::MIN_POSITIVE).ln()
}

#[cfg(test)]
mod tests;
