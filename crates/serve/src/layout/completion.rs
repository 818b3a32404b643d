//! OpenAI's completions, and metaseq's, which are nearly the same.

use super::{Head, Layout, reason, usage};
use crate::models::token_name;
use ferropt_data::Tokenizer;
use ferropt_engine::{Finish, Piece, Text, Token, Usage};
use serde_json::{Map, Value, json};
use std::sync::Arc;

const KIND: &str = "text_completion";

/// `/v1/completions`.
pub(crate) struct Completion {
    head: Head,
    tokenizer: Arc<Tokenizer>,
    /// How many of the likeliest tokens were asked for, if log-probabilities were.
    log_probs: Option<usize>,
    /// metaseq says within `logprobs` too why a text ended.
    metaseq: bool,
    /// Characters of each text so far.
    characters: Vec<usize>,
}

impl Completion {
    pub(crate) fn new(
        head: Head,
        tokenizer: Arc<Tokenizer>,
        texts: usize,
        log_probs: Option<usize>,
        metaseq: bool,
    ) -> Completion {
        Completion { head, tokenizer, log_probs, metaseq, characters: vec![0; texts] }
    }

    fn choice(&mut self, index: usize, piece: Piece, finish: Option<Finish>) -> Value {
        let finish = finish.map(reason);
        let mut log_probs = match self.log_probs {
            Some(top) => self.log_probs(index, &piece.tokens, top),
            None => Value::Null,
        };
        if self.metaseq && log_probs.is_object() {
            log_probs["finish_reason"] = finish.into();
        }
        json!({ "index": index, "text": piece.text, "logprobs": log_probs, "finish_reason": finish })
    }

    fn log_probs(&mut self, index: usize, tokens: &[Token], top: usize) -> Value {
        let names: Vec<String> = tokens.iter().map(|token| token_name(&self.tokenizer, token.id)).collect();
        let characters = &mut self.characters[index];
        let offsets: Vec<usize> =
            tokens.iter().map(|t| begin(self.tokenizer.token_bytes(t.id), characters)).collect();
        let likeliest = |token: &Token| -> Value {
            // The first token of a prompt follows nothing.
            let Some(own) = token.log_prob else { return Value::Null };
            let mut all = Map::new();
            for (id, log_prob) in &token.top {
                all.insert(token_name(&self.tokenizer, *id), (*log_prob).into());
            }
            all.entry(token_name(&self.tokenizer, token.id)).or_insert(own.into());
            all.into()
        };
        let likeliest: Value = match top {
            0 => Value::Null,
            _ => tokens.iter().map(likeliest).collect(),
        };
        json!({
            "tokens": names,
            "token_logprobs": tokens.iter().map(|token| token.log_prob).collect::<Vec<_>>(),
            "top_logprobs": likeliest,
            "text_offset": offsets,
        })
    }
}

/// The character at which a token begins, when `characters` begin before it; adds those that begin in it.
fn begin(bytes: &[u8], characters: &mut usize) -> usize {
    let continues = |byte: &u8| byte & 0xC0 == 0x80;
    let at = *characters - usize::from(bytes.first().is_some_and(continues) && *characters > 0);
    *characters += bytes.iter().filter(|byte| !continues(byte)).count();
    at
}

impl Layout for Completion {
    fn piece(&mut self, index: usize, piece: Piece) -> Option<Value> {
        let choice = self.choice(index, piece, None);
        Some(self.head.event(KIND, choice))
    }

    fn end(&mut self, index: usize, finish: Finish) -> Value {
        let choice = self.choice(index, Piece::default(), Some(finish));
        self.head.event(KIND, choice)
    }

    fn used(&self, usage: Usage) -> Value {
        self.head.used(KIND, Vec::new(), usage)
    }

    fn whole(&mut self, texts: Vec<Text>, used: Usage) -> Value {
        let mut choices = Vec::new();
        for (index, Text { text, tokens, finish }) in texts.into_iter().enumerate() {
            choices.push(self.choice(index, Piece { text, tokens }, finish));
        }
        let mut object = self.head.object(KIND, choices);
        object["usage"] = usage(used);
        object
    }
}

#[cfg(test)]
mod tests {
    use super::begin;

    #[test]
    fn tokens_begin_at_characters_however_they_are_cut() {
        let (mut characters, text) = (0, "aé狐b".as_bytes());
        let cuts = [0, 1, 2, 4, 5, 6, 7];
        let pieces = cuts.windows(2).map(|w| &text[w[0]..w[1]]);
        let begins: Vec<usize> = pieces.map(|piece| begin(piece, &mut characters)).collect();
        assert_eq!(begins, [0, 1, 1, 2, 2, 3]);
        assert_eq!(begin(b"", &mut characters), 4);
    }
}
