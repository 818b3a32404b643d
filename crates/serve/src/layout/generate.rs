//! Ferropt's own route: what `ferropt generate --json` prints.

use super::{Head, Layout, usage};
use crate::models::token_name;
use ferropt_data::Tokenizer;
use ferropt_engine::{Finish, Piece, Text, Token, Usage};
use serde_json::{Value, json};
use std::sync::Arc;

/// `/generate`.
pub(crate) struct Generate {
    head: Head,
    tokenizer: Arc<Tokenizer>,
    /// Texts of each prompt.
    n: usize,
    log_probs: bool,
}

impl Generate {
    pub(crate) fn new(head: Head, tokenizer: Arc<Tokenizer>, n: usize, log_probs: bool) -> Generate {
        Generate { head, tokenizer, n, log_probs }
    }

    fn text(&self, index: usize, piece: Piece, finish: Option<Finish>) -> Value {
        let mut object = json!({
            "prompt": index / self.n,
            "choice": index % self.n,
            "text": piece.text,
            "tokens": piece.tokens.iter().map(|token| token.id).collect::<Vec<_>>(),
            "finish_reason": finish.map(Finish::name),
        });
        if self.log_probs {
            object["log_probs"] = piece.tokens.iter().map(|token| self.token(token)).collect();
        }
        object
    }

    fn token(&self, token: &Token) -> Value {
        let named = |id: u32, log_prob: Option<f32>| -> Value {
            json!({ "id": id, "text": token_name(&self.tokenizer, id), "log_prob": log_prob })
        };
        let mut object = named(token.id, token.log_prob);
        object["top"] = token.top.iter().map(|(id, log_prob)| named(*id, Some(*log_prob))).collect();
        object
    }
}

impl Layout for Generate {
    fn piece(&mut self, index: usize, piece: Piece) -> Option<Value> {
        Some(self.text(index, piece, None))
    }

    fn end(&mut self, index: usize, finish: Finish) -> Value {
        self.text(index, Piece::default(), Some(finish))
    }

    fn used(&self, used: Usage) -> Value {
        json!({ "usage": usage(used) })
    }

    fn whole(&mut self, texts: Vec<Text>, used: Usage) -> Value {
        let text = |(index, Text { text, tokens, finish })| self.text(index, Piece { text, tokens }, finish);
        let texts: Vec<Value> = texts.into_iter().enumerate().map(text).collect();
        json!({ "id": self.head.id, "model": self.head.model, "texts": texts, "usage": usage(used) })
    }
}
