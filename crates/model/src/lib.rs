//! OPT (Zhang et al., 2022, "OPT: Open Pre-trained Transformer Language Models"), written out by hand.
//!
//! [`Config`] holds the sizes. Two tables follow from it and decide every other size: [`Config::parameters`] (names,
//! shapes, initial values) and [`ActivationTable`] (what a forward and backward pass keeps). [`Model`] is the weights,
//! [`Backprop`] trains them, [`Decoder`] is for inference: read-only weights and a paged KV cache.
//! [`formats`] reads and writes weights in the formats that others use.
//!
//! Letters: B sequences, T positions, N = B*T rows, C width, H heads, F feed-forward width, W width of the embeddings
//! (C but for 350m), V vocabulary, L layers.

mod activations;
mod backprop;
mod config;
mod decode;
mod ends;
mod exchange;
pub mod formats;
mod gptq;
mod initial;
mod inspect;
mod layer;
mod offload;
mod parameters;
mod part;
mod ready;
mod rounded;
mod sums;
mod units;
mod weights;

pub use activations::{Activation, ActivationTable, Recompute, Scalar};
pub use backprop::{Backprop, Batch, Options, Pass, Task, boundary_buffers, schedule};
pub use config::{Config, ForwardFlops, PRESETS, Preset};
pub use decode::{Cache, Decoder, Logits, Matrices, Memory, ReadCodes, ReadRows, Walk, WithError};
pub use gptq::Calibration;
pub use initial::{initial_rows, initial_shard, initial_values};
pub use units::{gathers, layers_at_once};

pub use inspect::{Role, Values, Written};
pub use offload::Offload;
pub use parameters::{Initial, Parameter, Split};
pub use part::{Held, Part, Place, Stage};
pub use ready::{Places, Ready};
pub use rounded::{Rounded, RoundingError};
pub use weights::{Layer, Linear, Model, Norm, Tensor, TensorMut, Weights};
