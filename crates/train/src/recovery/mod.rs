//! What a run does when training goes wrong, without a person.
//!
//! The OPT logbook tells of months in which people watched the loss, and at every explosion went back to an earlier
//! checkpoint, lowered the learning rate or the clip, and started again (Zhang et al., 2022, section 2.5). PaLM's authors
//! also skipped the data around each spike, and found that the spikes did not come back (Chowdhery et al., 2022, section
//! 5.1). Here a [`Guard`] does that. After every gradient, and before it touches the weights, it says what is to be done:
//!
//! | what it sees | what it says |
//! |---|---|
//! | a loss and a gradient norm like the recent ones | [`Verdict::Accept`] |
//! | one that is not finite, or far above its recent [`Level`] | [`Verdict::Skip`]: the batch is left out, as if it had never been |
//! | more skipped steps than `max_skips` within `window` steps | [`Verdict::RollBack`]: an older checkpoint, other data, a lower rate |
//! | the same once more after `max_rollbacks` | [`Verdict::GiveUp`] |
//!
//! It is a function of what it is told and of its [`State`], which is part of every checkpoint. So a run that was killed
//! and resumed decides as one that was not.

mod finder;
mod guard;
mod level;

pub use finder::{Finding, find};
pub use guard::{Cause, Guard, State, Trouble, Verdict};
pub use level::Level;

/// When a [`Guard`] does what: `[recovery]` of the configuration, with lengths in steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Whether anything is done about trouble.
    pub enabled: bool,
    /// Steps that make up the recent level.
    pub window: usize,
    /// Robust standard deviations above the recent loss; 0 for no such check.
    pub loss_threshold: f64,
    /// The same for the logarithm of the gradient norm.
    pub norm_threshold: f64,
    /// Steps that may be skipped within the window.
    pub max_skips: usize,
    /// Roll-backs before the run gives up.
    pub max_rollbacks: usize,
    /// Steps before the trouble that are mistrusted too.
    pub margin: u64,
    /// Factor on the learning rate for each roll-back.
    pub lr_factor: f64,
    /// Factor on the clip for each roll-back.
    pub clip_factor: f64,
    /// Steps from the trouble on for which the factors last.
    pub cooldown: Option<u64>,
    /// Steps of the schedule's warm-up, in which gradient norms rise and are not compared.
    pub warmup: u64,
    /// Longest gradient that is not scaled down; 0 for any.
    pub clip: f64,
}

/// Training went wrong, and nothing that a program may do by itself is left: the program ends with a status of its own,
/// and starting it again would not help.
#[derive(Debug)]
pub struct GaveUp {
    /// What was tried, and what a person may do.
    pub text: String,
    /// Why the last step was not taken.
    pub cause: Cause,
}

impl std::fmt::Display for GaveUp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for GaveUp {}
