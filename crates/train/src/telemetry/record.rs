//! The numbers that a run tells.

use super::energy::Energy;
use serde::{Deserialize, Deserializer, Serialize};

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// A training step.
    Training(Training),
    /// An evaluation of one validation set.
    Validation(Validation),
    /// A step that was not taken.
    Skipped(Skipped),
}

/// A training step. Step, tokens, loss, learning rate and gradient norm are the same bits whenever the run is
/// repeated; the rest is measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Optimiser steps done, this one included.
    pub step: u64,
    /// Training tokens consumed, this step's included.
    pub tokens: u64,
    /// Mean loss of the step's targets, nats per token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Learning rate of the step.
    #[serde(deserialize_with = "null_is_nan")]
    pub lr: f64,
    /// L2 norm of the whole gradient before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// What the loss was multiplied by, in runs in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Tokens per second.
    #[serde(deserialize_with = "null_is_nan")]
    pub tokens_per_second: f64,
    /// 10^12 floating-point operations per second that the model needs: no recomputation, the whole T x T square of
    /// attention, as others count.
    #[serde(deserialize_with = "null_is_nan")]
    pub model_tflops: f64,
    /// The same with recomputation.
    #[serde(deserialize_with = "null_is_nan")]
    pub hardware_tflops: f64,
    /// Operations executed (recomputation and the causal half of attention counted) as a share (0 to 1) of the peak
    /// measured on this machine, where one was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_share: Option<f64>,
    /// Energy since the run began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<Energy>,
}

/// A step whose batch was left out: the weights are those before it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Skipped {
    /// Number that the step would have had.
    pub step: u64,
    /// Number of the batch in the order of the data.
    pub batch: u64,
    /// Its loss, nats per token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// L2 norm of its gradient.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
}

/// An evaluation of one validation set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Optimiser steps done.
    pub step: u64,
    /// Training tokens consumed.
    pub tokens: u64,
    /// Name of the set.
    pub set: String,
    /// Mean loss, nats per token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// `exp(loss)`.
    #[serde(deserialize_with = "null_is_nan")]
    pub perplexity: f64,
    /// Loss in bits per byte of the text, which does not depend on the tokenizer, where the text is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
}

/// JSON has no NaN; a loss that is none is written as `null`.
fn null_is_nan<'de, D: Deserializer<'de>>(value: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(value)?.unwrap_or(f64::NAN))
}

impl Record {
    /// Optimiser steps done.
    pub fn step(&self) -> u64 {
        match self {
            Record::Training(training) => training.step,
            Record::Validation(validation) => validation.step,
            Record::Skipped(skipped) => skipped.step,
        }
    }

    /// The numbers under TensorBoard tags.
    pub(super) fn scalars(&self) -> Vec<(String, f64)> {
        match self {
            Record::Training(t) => {
                let mut scalars = vec![
                    ("train/loss".to_string(), t.loss),
                    ("train/learning_rate".to_string(), t.lr),
                    ("train/gradient_norm".to_string(), t.grad_norm),
                    ("train/tokens".to_string(), t.tokens as f64),
                    ("speed/tokens_per_second".to_string(), t.tokens_per_second),
                    ("speed/model_tflops".to_string(), t.model_tflops),
                    ("speed/hardware_tflops".to_string(), t.hardware_tflops),
                ];
                scalars.extend(t.loss_scale.map(|scale| ("train/loss_scale".to_string(), scale)));
                scalars.extend(t.peak_share.map(|share| ("speed/share_of_peak".to_string(), share)));
                scalars.extend(t.energy.map(|energy| ("energy/joules".to_string(), energy.joules)));
                scalars
            }
            Record::Skipped(s) => vec![
                ("recovery/skipped_loss".to_string(), s.loss),
                ("recovery/skipped_gradient_norm".to_string(), s.grad_norm),
            ],
            Record::Validation(v) => {
                let mut scalars = vec![
                    (format!("validation/{}/loss", v.set), v.loss),
                    (format!("validation/{}/perplexity", v.set), v.perplexity),
                ];
                scalars.extend(
                    v.bits_per_byte.map(|bits| (format!("validation/{}/bits_per_byte", v.set), bits)),
                );
                scalars
            }
        }
    }
}
