//! Text to tokens: readers of documents, OPT's byte-level BPE, memory-mapped token files and the loader of training
//! samples.
//!
//! The way of a corpus: [`Corpus`] finds and reads files, [`tokenise`] turns them into a [`TokenFile`] once, with a
//! [`Tokenizer`], and [`Loader`] serves batches from it.

mod corpus;
mod crate_docs;
mod decompress;
mod loader;
mod permutation;
mod split;
mod token_file;
mod tokenise;
mod tokenizer;

#[cfg(test)]
mod testing;

pub use corpus::{Corpus, Piece, Pieces, text_in};
pub use crate_docs::{CrateDocs, registry_cache};
pub use loader::{Batch, Loader};
pub use permutation::Permutation;
pub use split::{Document, Split};
pub use token_file::TokenFile;
pub use tokenise::{on_threads, tokenise, tokenise_unless};
pub use tokenizer::{Marks, StreamDecoder, Tokenizer};

/// `<s>`: unused by OPT's training data, first by position.
pub const BOS: u32 = 0;
/// `<pad>`: fills up sequences; never a target.
pub const PAD: u32 = 1;
/// `</s>`: closes every document, and opens every prompt.
pub const EOS: u32 = 2;
/// `<unk>`: never made, as every byte has a token.
pub const UNK: u32 = 3;
/// Texts of the first four ids, in order.
pub const SPECIALS: [&str; 4] = ["<s>", "<pad>", "</s>", "<unk>"];
