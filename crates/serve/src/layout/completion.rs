//! OpenAI's completions, and metaseq's, which are nearly the same.

use super::{Head, Layout, List, reason};
use crate::models::token_name;
use ferropt_data::Tokenizer;
use ferropt_engine::{Finish, Piece, Text, Token, Usage};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
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
    /// How far each text has come.
    characters: Vec<Characters>,
}

/// A text, or a part of one.
#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<LogProbs<'a>>,
    finish_reason: Option<&'static str>,
}

struct LogProbs<'a> {
    tokenizer: &'a Tokenizer,
    tokens: &'a [Token],
    /// How many of the likeliest tokens are listed.
    top: usize,
    offsets: Vec<usize>,
    /// Why the text ended, for metaseq.
    finish: Option<Option<&'static str>>,
}

/// The same as lists.
#[derive(Serialize)]
struct Lists<'a, N, P, T> {
    tokens: N,
    token_logprobs: P,
    top_logprobs: Option<T>,
    text_offset: &'a [usize],
    #[serde(skip_serializing_if = "Option::is_none")]
    finish_reason: Option<Option<&'static str>>,
}

impl<'a> Serialize for LogProbs<'a> {
    fn serialize<W: Serializer>(&self, writer: W) -> Result<W::Ok, W::Error> {
        let (tokenizer, tokens) = (self.tokenizer, self.tokens);
        let likeliest = List(tokens, |token: &'a Token| {
            // The first token of a prompt follows nothing.
            token.log_prob.map(|own| Likeliest { tokenizer, token, own })
        });
        let lists = Lists {
            tokens: List(tokens, |token: &Token| token_name(tokenizer, token.id)),
            token_logprobs: List(tokens, |token: &Token| token.log_prob.map(f64::from)),
            top_logprobs: (self.top > 0).then_some(likeliest),
            text_offset: &self.offsets,
            finish_reason: self.finish,
        };
        lists.serialize(writer)
    }
}

/// The likeliest tokens at a token's place by their names, and it itself.
struct Likeliest<'a> {
    tokenizer: &'a Tokenizer,
    token: &'a Token,
    own: f32,
}

impl Serialize for Likeliest<'_> {
    fn serialize<W: Serializer>(&self, writer: W) -> Result<W::Ok, W::Error> {
        let Likeliest { tokenizer, token, own } = self;
        let mut map = writer.serialize_map(None)?;
        for (id, log_prob) in &token.top {
            map.serialize_entry(&token_name(tokenizer, *id), &f64::from(*log_prob))?;
        }
        if token.top.iter().all(|(id, _)| *id != token.id) {
            map.serialize_entry(&token_name(tokenizer, token.id), &f64::from(*own))?;
        }
        map.end()
    }
}

impl Completion {
    pub(crate) fn new(
        head: Head,
        tokenizer: Arc<Tokenizer>,
        texts: usize,
        log_probs: Option<usize>,
        metaseq: bool,
    ) -> Completion {
        Completion { head, tokenizer, log_probs, metaseq, characters: vec![Characters::default(); texts] }
    }

    fn choice<'a>(
        &'a self,
        index: usize,
        text: &'a str,
        tokens: &'a [Token],
        offsets: Vec<usize>,
        finish: Option<Finish>,
    ) -> Choice<'a> {
        let finish_reason = finish.map(reason);
        let logprobs = self.log_probs.map(|top| LogProbs {
            tokenizer: &self.tokenizer,
            tokens,
            top,
            offsets,
            finish: self.metaseq.then_some(finish_reason),
        });
        Choice { index, text, logprobs, finish_reason }
    }

    /// The characters at which tokens begin.
    fn offsets(&mut self, index: usize, tokens: &[Token]) -> Vec<usize> {
        let (tokenizer, characters) = (&self.tokenizer, &mut self.characters[index]);
        tokens.iter().map(|token| characters.begin(tokenizer.token_bytes(token.id))).collect()
    }

    fn event(&mut self, index: usize, piece: Piece, finish: Option<Finish>) -> String {
        let offsets = self.offsets(index, &piece.tokens);
        self.head.event(KIND, self.choice(index, &piece.text, &piece.tokens, offsets, finish))
    }
}

/// Counts characters of bytes that come in parts, as the decoder writes them: what is no UTF-8 is U+FFFD.
#[derive(Clone, Default)]
struct Characters {
    whole: usize,
    /// The beginning of one that is not complete.
    begun: Vec<u8>,
}

impl Characters {
    /// The character in which the next bytes begin.
    fn begin(&mut self, bytes: &[u8]) -> usize {
        let before = self.begun.len();
        self.begun.extend_from_slice(bytes);
        let (mut at, mut begin) = (0, None);
        while let Some(length) = first(&self.begun[at..]) {
            at += length;
            if at > before {
                begin.get_or_insert(self.whole);
            }
            self.whole += 1;
        }
        self.begun.drain(..at);
        begin.unwrap_or(self.whole)
    }
}

/// Bytes of the first character, or of what is none; nothing if it is not complete.
fn first(bytes: &[u8]) -> Option<usize> {
    let longest = &bytes[..bytes.len().min(4)];
    let chunk = longest.utf8_chunks().next()?;
    match chunk.valid().chars().next() {
        Some(character) => Some(character.len_utf8()),
        None => std::str::from_utf8(longest).err()?.error_len(),
    }
}

impl Layout for Completion {
    fn piece(&mut self, index: usize, piece: Piece) -> Option<String> {
        Some(self.event(index, piece, None))
    }

    fn end(&mut self, index: usize, finish: Finish) -> String {
        self.event(index, Piece::default(), Some(finish))
    }

    fn used(&self, usage: Usage) -> String {
        self.head.used::<()>(KIND, &[], usage)
    }

    fn whole(&mut self, texts: Vec<Text>, used: Usage) -> String {
        let offsets: Vec<_> =
            texts.iter().enumerate().map(|(index, text)| self.offsets(index, &text.tokens)).collect();
        let mut choices = Vec::new();
        for (index, (Text { text, tokens, finish }, offsets)) in texts.iter().zip(offsets).enumerate() {
            choices.push(self.choice(index, text, tokens, offsets, *finish));
        }
        self.head.used(KIND, &choices, used)
    }
}

#[cfg(test)]
mod tests {
    use super::Characters;

    fn begins(text: &[u8], cuts: &[usize]) -> Vec<usize> {
        let mut characters = Characters::default();
        let begins = cuts.windows(2).map(|w| characters.begin(&text[w[0]..w[1]])).collect();
        assert_eq!(characters.begin(b""), characters.whole);
        let all = String::from_utf8_lossy(text).chars().count();
        assert_eq!(characters.whole + usize::from(!characters.begun.is_empty()), all);
        begins
    }

    #[test]
    fn tokens_begin_at_characters_however_they_are_cut() {
        assert_eq!(begins("aé狐b".as_bytes(), &[0, 1, 2, 4, 5, 6, 7]), [0, 1, 1, 2, 2, 3]);
    }

    #[test]
    fn bytes_that_are_no_characters_count_as_what_is_shown_for_them() {
        // A continuation without a beginning, twice; a beginning without a continuation; one that ends too early.
        assert_eq!(begins(b"a\x80\x80b", &[0, 1, 2, 3, 4]), [0, 1, 2, 3]);
        assert_eq!(begins(b"\xc3ab", &[0, 1, 2, 3]), [0, 1, 2]);
        assert_eq!(begins(b"\xe7\x8bx\xf0\x9f\x98", &[0, 1, 2, 3, 4, 6]), [0, 0, 1, 2, 2]);
        assert_eq!(begins(b"\xff\xfe\xc3\xa9z", &[0, 3, 5]), [0, 2]);
    }
}
