//! OpenAI's conversations.

use super::{Head, Layout, List, reason};
use crate::models::token_name;
use ferropt_data::Tokenizer;
use ferropt_engine::{Finish, Piece, Text, Token, Usage};
use serde::{Serialize, Serializer};
use std::borrow::Cow;
use std::sync::Arc;

const KIND: &str = "chat.completion";
const EVENT: &str = "chat.completion.chunk";

/// `/v1/chat/completions`.
pub(crate) struct Chat {
    head: Head,
    tokenizer: Arc<Tokenizer>,
    log_probs: bool,
    /// Texts of which nothing but spaces was seen: those behind the assistant's name are no part of the reply.
    blank: Vec<bool>,
}

/// A reply.
#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    message: Message<'a>,
    logprobs: Option<LogProbs<'a>>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: (),
}

/// A part of a reply.
#[derive(Serialize)]
struct Part<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<LogProbs<'a>>,
    finish_reason: Option<&'static str>,
}

/// What is new in it.
#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

struct LogProbs<'a> {
    tokenizer: &'a Tokenizer,
    tokens: &'a [Token],
}

#[derive(Serialize)]
struct Content<L> {
    content: L,
    refusal: (),
}

/// A token, with the likeliest ones beside it in a list `L`, or without.
#[derive(Serialize)]
struct Named<'a, L> {
    token: Cow<'a, str>,
    logprob: Option<f64>,
    bytes: &'a [u8],
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<L>,
}

fn named<L>(tokenizer: &Tokenizer, id: u32, log_prob: Option<f32>, top_logprobs: Option<L>) -> Named<'_, L> {
    let (token, bytes) = (token_name(tokenizer, id), tokenizer.token_bytes(id));
    Named { token, logprob: log_prob.map(f64::from), bytes, top_logprobs }
}

impl<'a> Serialize for LogProbs<'a> {
    fn serialize<W: Serializer>(&self, writer: W) -> Result<W::Ok, W::Error> {
        let tokenizer = self.tokenizer;
        let beside = |(id, log_prob): &(u32, f32)| named(tokenizer, *id, Some(*log_prob), None::<()>);
        let one =
            |token: &'a Token| named(tokenizer, token.id, token.log_prob, Some(List(&token.top, beside)));
        Content { content: List(self.tokens, one), refusal: () }.serialize(writer)
    }
}

impl Chat {
    pub(crate) fn new(head: Head, tokenizer: Arc<Tokenizer>, texts: usize, log_probs: bool) -> Chat {
        Chat { head, tokenizer, log_probs, blank: vec![true; texts] }
    }

    fn without_spaces(&mut self, index: usize, text: String) -> String {
        if !self.blank[index] {
            return text;
        }
        let text = text.trim_start().to_string();
        self.blank[index] = text.is_empty();
        text
    }

    fn log_probs<'a>(&'a self, tokens: &'a [Token]) -> Option<LogProbs<'a>> {
        self.log_probs.then_some(LogProbs { tokenizer: &self.tokenizer, tokens })
    }

    fn choice<'a>(&'a self, index: usize, text: &'a Text) -> Choice<'a> {
        Choice {
            index,
            message: Message { role: "assistant", content: &text.text, refusal: () },
            logprobs: self.log_probs(&text.tokens),
            finish_reason: text.finish.map(reason),
        }
    }

    fn event(
        &self,
        index: usize,
        delta: Delta<'_>,
        logprobs: Option<LogProbs<'_>>,
        finish: Option<Finish>,
    ) -> String {
        self.head.event(EVENT, Part { index, delta, logprobs, finish_reason: finish.map(reason) })
    }
}

impl Layout for Chat {
    fn begin(&mut self, index: usize) -> Option<String> {
        Some(self.event(index, Delta { role: Some("assistant"), content: Some("") }, None, None))
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Option<String> {
        let text = self.without_spaces(index, piece.text);
        if text.is_empty() && !self.log_probs {
            return None;
        }
        let delta = Delta { role: None, content: Some(&text) };
        Some(self.event(index, delta, self.log_probs(&piece.tokens), None))
    }

    fn end(&mut self, index: usize, finish: Finish) -> String {
        self.event(index, Delta::default(), None, Some(finish))
    }

    fn used(&self, usage: Usage) -> String {
        self.head.used::<()>(EVENT, &[], usage)
    }

    fn whole(&mut self, mut texts: Vec<Text>, usage: Usage) -> String {
        for (index, text) in texts.iter_mut().enumerate() {
            text.text = self.without_spaces(index, std::mem::take(&mut text.text));
        }
        let choice = |(index, text)| self.choice(index, text);
        let choices: Vec<Choice<'_>> = texts.iter().enumerate().map(choice).collect();
        self.head.used(KIND, &choices, usage)
    }
}
