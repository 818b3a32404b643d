//! OpenAI's conversations.

use super::{Head, Layout, reason};
use crate::models::token_name;
use ferropt_data::Tokenizer;
use ferropt_engine::{Finish, Piece, Text, Token, Usage};
use serde_json::{Value, json};
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

    fn log_probs(&self, tokens: &[Token]) -> Value {
        if !self.log_probs {
            return Value::Null;
        }
        let named = |id: u32, log_prob: Option<f32>| -> Value {
            let bytes = self.tokenizer.token_bytes(id);
            json!({ "token": token_name(&self.tokenizer, id), "logprob": log_prob, "bytes": bytes })
        };
        let one = |token: &Token| -> Value {
            let mut object = named(token.id, token.log_prob);
            object["top_logprobs"] = token.top.iter().map(|(id, p)| named(*id, Some(*p))).collect();
            object
        };
        json!({ "content": tokens.iter().map(one).collect::<Vec<_>>(), "refusal": null })
    }

    fn event(&self, index: usize, delta: Value, log_probs: Value, finish: Option<Finish>) -> Value {
        let choice = json!({
            "index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish.map(reason),
        });
        self.head.event(EVENT, choice)
    }
}

impl Layout for Chat {
    fn begin(&mut self, index: usize) -> Option<Value> {
        Some(self.event(index, json!({ "role": "assistant", "content": "" }), Value::Null, None))
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Option<Value> {
        let text = self.without_spaces(index, piece.text);
        let log_probs = self.log_probs(&piece.tokens);
        if text.is_empty() && log_probs.is_null() {
            return None;
        }
        Some(self.event(index, json!({ "content": text }), log_probs, None))
    }

    fn end(&mut self, index: usize, finish: Finish) -> Value {
        self.event(index, json!({}), Value::Null, Some(finish))
    }

    fn used(&self, usage: Usage) -> Value {
        self.head.used(EVENT, Vec::new(), usage)
    }

    fn whole(&mut self, texts: Vec<Text>, usage: Usage) -> Value {
        let mut choices = Vec::new();
        for (index, Text { text, tokens, finish }) in texts.into_iter().enumerate() {
            choices.push(json!({
                "index": index,
                "message": { "role": "assistant", "content": self.without_spaces(index, text), "refusal": null },
                "logprobs": self.log_probs(&tokens),
                "finish_reason": finish.map(reason),
            }));
        }
        self.head.used(KIND, choices, usage)
    }
}
