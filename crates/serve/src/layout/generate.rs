//! Ferropt's own route: what `ferropt generate --json` prints.

use super::{Head, Layout, List, Used, json, usage};
use crate::models::token_name;
use ferropt_data::Tokenizer;
use ferropt_engine::{Finish, Piece, Text, Token, Usage};
use serde::{Serialize, Serializer};
use std::borrow::Cow;
use std::sync::Arc;

/// `/generate`.
pub(crate) struct Generate {
    head: Head,
    tokenizer: Arc<Tokenizer>,
    /// Texts of each prompt.
    n: usize,
    log_probs: bool,
}

/// A text, or a part of one.
#[derive(Serialize)]
struct Choice<'a> {
    prompt: usize,
    choice: usize,
    text: &'a str,
    tokens: Ids<'a>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    log_probs: Option<LogProbs<'a>>,
}

struct Ids<'a>(&'a [Token]);

impl Serialize for Ids<'_> {
    fn serialize<W: Serializer>(&self, writer: W) -> Result<W::Ok, W::Error> {
        writer.collect_seq(self.0.iter().map(|token| token.id))
    }
}

struct LogProbs<'a> {
    tokenizer: &'a Tokenizer,
    tokens: &'a [Token],
}

/// A token, with the likeliest ones beside it in a list `L`, or without.
#[derive(Serialize)]
struct Named<'a, L> {
    id: u32,
    text: Cow<'a, str>,
    log_prob: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top: Option<L>,
}

fn named<L>(tokenizer: &Tokenizer, id: u32, log_prob: Option<f32>, top: Option<L>) -> Named<'_, L> {
    Named { id, text: token_name(tokenizer, id), log_prob: log_prob.map(f64::from), top }
}

impl<'a> Serialize for LogProbs<'a> {
    fn serialize<W: Serializer>(&self, writer: W) -> Result<W::Ok, W::Error> {
        let tokenizer = self.tokenizer;
        let beside = |(id, log_prob): &(u32, f32)| named(tokenizer, *id, Some(*log_prob), None::<()>);
        let one =
            |token: &'a Token| named(tokenizer, token.id, token.log_prob, Some(List(&token.top, beside)));
        List(self.tokens, one).serialize(writer)
    }
}

/// All of an answer.
#[derive(Serialize)]
struct Whole<'a> {
    id: &'a str,
    model: &'a str,
    texts: Vec<Choice<'a>>,
    usage: Used,
}

/// The last event of a stream.
#[derive(Serialize)]
struct End {
    usage: Used,
}

impl Generate {
    pub(crate) fn new(head: Head, tokenizer: Arc<Tokenizer>, n: usize, log_probs: bool) -> Generate {
        Generate { head, tokenizer, n, log_probs }
    }

    fn choice<'a>(
        &'a self,
        index: usize,
        text: &'a str,
        tokens: &'a [Token],
        finish: Option<Finish>,
    ) -> Choice<'a> {
        Choice {
            prompt: index / self.n,
            choice: index % self.n,
            text,
            tokens: Ids(tokens),
            finish_reason: finish.map(Finish::name),
            log_probs: self.log_probs.then_some(LogProbs { tokenizer: &self.tokenizer, tokens }),
        }
    }
}

impl Layout for Generate {
    fn piece(&mut self, index: usize, piece: Piece) -> Option<String> {
        Some(json(&self.choice(index, &piece.text, &piece.tokens, None)))
    }

    fn end(&mut self, index: usize, finish: Finish) -> String {
        json(&self.choice(index, "", &[], Some(finish)))
    }

    fn used(&self, used: Usage) -> String {
        json(&End { usage: usage(used) })
    }

    fn whole(&mut self, texts: Vec<Text>, used: Usage) -> String {
        let mut all = Vec::new();
        for (index, Text { text, tokens, finish }) in texts.iter().enumerate() {
            all.push(self.choice(index, text, tokens, *finish));
        }
        json(&Whole { id: &self.head.id, model: &self.head.model, texts: all, usage: usage(used) })
    }
}
