//! Weights in the formats that others use, read where they lie on disk and written as others expect them.
//!
//! | format | what |
//! |---|---|
//! | Hugging Face | a folder with `config.json` and `model.safetensors`, `pytorch_model.bin`, or several of them with an index; also each checkpoint of a training run |
//! | metaseq | `.pt` files: one (`restored.pt`), tensor-parallel parts (`reshard-model_part-N.pt`), and flattened shards of either (`-shardN.pt`) |
//! | quantised | our own folders, for inference alone: matrices as codes of few bits, see `quantised.rs` |
//!
//! [`Source::open`] tells which it is and lists each tensor of the parameter table under its Hugging Face name. Files are
//! mapped; opening reads headers and checks names and shapes, and a tensor is put together only when it is read. So a
//! model opens in the time that its headers take, and converting it holds a few megabytes at a time.
//!
//! Pickles are read without executing anything, see `pickle/mod.rs`. Sizes in files are believed only once they fit the
//! files, so that nobody's checkpoint can make this program allocate much.

mod convert;
mod dtype;
mod hugging_face;
mod metaseq;
mod pickle;
mod quantised;
mod safetensors;
mod source;
mod stored;
mod strand;
mod tensor;
mod torch_file;
mod verify;
mod zip;

pub use convert::{Converted, Options, Target, convert, quantise};
pub use dtype::Dtype;
pub use quantised::{CalibrationText, Quantisation, RoundedTensor, Rounding};
pub use safetensors::safetensors_header;
pub use source::{Format, Source, TOKENIZER_FILES};
pub use stored::StoredTensor;
pub use tensor::Tensor;
pub use verify::{Difference, compare, verify};
