//! What comes of a request.

use crate::text::{Piece, Token};

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model closed the document with `</s>`.
    EndOfText,
    /// A stop string came, before which the text ends.
    Stop,
    /// As many tokens as were asked for.
    MaxTokens,
    /// The model knows no position for another token.
    Positions,
}

impl Finish {
    /// Name for programs.
    pub fn name(self) -> &'static str {
        match self {
            Finish::EndOfText => "end-of-text",
            Finish::Stop => "stop-string",
            Finish::MaxTokens => "max-tokens",
            Finish::Positions => "positions",
        }
    }
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: usize,
    /// Generated, in all texts that were computed, without the `</s>` that ended some and was not given out.
    pub generated: usize,
    /// Guessed by the draft and computed on trial. How many depends on what else the engine has to do.
    pub drafted: usize,
    /// Of those, the ones that were right.
    pub accepted: usize,
}

/// What comes of a request, in this order; texts of different choices alternate.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Tokens of the prompt, with `echo`.
    Prompt(Vec<Token>),
    /// The prompt is read, and texts begin behind it; its tokens may come a little before or behind this.
    Read,
    /// More of a text.
    Text {
        /// Its number, below `n`.
        choice: usize,
        /// What is new.
        piece: Piece,
    },
    /// A text is complete.
    End {
        /// Its number.
        choice: usize,
        /// Why.
        finish: Finish,
    },
    /// The prompt as a vector of length 1, with `pooling`.
    Embedding(Vec<f32>),
    /// All is complete.
    Done(Usage),
    /// The engine failed, or the model has no numbers for this request; there is no more to come.
    Failed(String),
}
