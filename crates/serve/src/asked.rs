//! What a request asks for, whichever route it came by.

use ferropt_engine::{Parameters, Pooling};

/// A text to continue, as it was given.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Prompt {
    /// `</s>` is put in front, unless it is asked not to.
    Text(String),
    /// Taken as they are.
    Ids(Vec<u32>),
}

/// Who says a message of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    System,
    User,
    Assistant,
}

/// The fields of a body; those that were not given have the default.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) model: Option<String>,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) messages: Vec<(Role, String)>,
    /// Everything that has the same meaning in the engine.
    pub(crate) parameters: Parameters,
    /// 1, or 0 for what is never sampled, unless given.
    pub(crate) temperature: Option<f32>,
    /// metaseq's factual nucleus sampling, which is off unless the first is above 0.
    pub(crate) lambda_decay: f32,
    pub(crate) omega_bound: f32,
    /// Chosen at random unless given.
    pub(crate) seed: Option<u64>,
    pub(crate) stream: bool,
    pub(crate) include_usage: Option<bool>,
    pub(crate) echo: bool,
    /// Whether a conversation's log-probabilities are wanted.
    pub(crate) chat_log_probs: bool,
    /// The newer name of `max_tokens`.
    pub(crate) max_completion_tokens: Option<usize>,
    /// `</s>` in front of a text, and special tokens read in a prompt.
    pub(crate) special: bool,
    pub(crate) special_in_text: bool,
    /// Whether the names of tokens are wanted.
    pub(crate) token_names: bool,
    pub(crate) tokens: Vec<u32>,
    /// Whether special tokens are left out of a text.
    pub(crate) skip_special: bool,
    /// Of embeddings: what they are made of, how they are written, and how many numbers are expected.
    pub(crate) pooling: Pooling,
    pub(crate) base64: bool,
    pub(crate) dimensions: Option<usize>,
}

impl Default for Asked {
    fn default() -> Self {
        Asked {
            model: None,
            prompts: Vec::new(),
            messages: Vec::new(),
            parameters: Parameters::default(),
            temperature: None,
            lambda_decay: -1.0,
            omega_bound: 0.3,
            seed: None,
            stream: false,
            include_usage: None,
            echo: false,
            chat_log_probs: false,
            max_completion_tokens: None,
            special: true,
            special_in_text: false,
            token_names: false,
            tokens: Vec::new(),
            skip_special: false,
            pooling: Pooling::Mean,
            base64: false,
            dimensions: None,
        }
    }
}
