//! How likely a model finds a text.

use crate::handle::{Completion, Handle};
use crate::parameters::{Parameters, Request};
use crate::text::Token;
use anyhow::Result;
use ferropt_data::{Marks, Tokenizer};

/// A request that computes the log-probabilities of `continuation` behind `context`.
///
/// Tokens of the two are made apart, so that none spans both. Spaces at the end of the context go to the continuation, since
/// words are encoded with the space before them. `marks` are those of the two together. A token that follows nothing has no
/// log-probability, and is not among those of the score.
///
/// # Errors
/// When the tokenizer fails.
pub fn scoring(tokenizer: &Tokenizer, context: &str, continuation: &str, marks: Marks) -> Result<Request> {
    let words = context.trim_end_matches(' ');
    let continuation = format!("{}{continuation}", &context[words.len()..]);
    let mut prompt = tokenizer.encode_as(words, marks)?;
    let from = prompt.len().max(1);
    prompt.extend(tokenizer.encode_as(&continuation, Marks { in_front: false, ..marks })?);
    // Without a token there is nothing to echo.
    let echo = (from < prompt.len()).then_some(from);
    let parameters = Parameters { max_tokens: Some(0), echo, log_probs: Some(1), ..Parameters::default() };
    Ok(Request { prompt, parameters })
}

/// What came of a [`scoring`] request.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Sum of the tokens' log-probabilities, in nats.
    pub log_prob: f64,
    /// Whether each token is the likeliest at its place.
    pub greedy: bool,
    /// The tokens.
    pub tokens: Vec<Token>,
}

impl From<Completion> for Score {
    fn from(completion: Completion) -> Self {
        let tokens = completion.prompt;
        let log_prob = tokens.iter().map(|token| token.log_prob.unwrap_or(0.0) as f64).sum();
        let greedy = tokens.iter().all(|token| token.top.first().is_some_and(|(id, _)| *id == token.id));
        Score { log_prob, greedy, tokens }
    }
}

impl Handle {
    /// The score of a text behind another.
    ///
    /// # Errors
    /// When they are too long together, or the engine fails.
    pub fn score(&self, context: &str, continuation: &str) -> Result<Score> {
        let marks = Marks { in_front: true, in_text: false };
        Ok(self.complete(scoring(self.tokenizer(), context, continuation, marks)?)?.into())
    }
}
