//! Tokens to text: whole characters, and nothing of a stop string.

use crate::stop::Stops;
use ferropt_data::{StreamDecoder, Tokenizer};
use std::collections::VecDeque;

/// A token of a prompt or of a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability, if asked for; the first token of a prompt has none.
    pub log_prob: Option<f32>,
    /// The likeliest tokens at its place with their log-probabilities, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Text that is certain, and the tokens that begin in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// Whole characters.
    pub text: String,
    /// Each token comes with the text in which it begins.
    pub tokens: Vec<Token>,
}

impl Piece {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty()
    }

    /// Puts what follows behind it.
    pub fn append(&mut self, next: Piece) {
        self.text += &next.text;
        self.tokens.extend(next.tokens);
    }
}

/// A text in the making.
pub struct Output<'t> {
    tokenizer: &'t Tokenizer,
    stream: StreamDecoder<'t>,
    stops: Stops,
    /// Text that may belong to a stop string.
    held: String,
    /// Bytes of text so far, what is held included.
    decoded: usize,
    /// Tokens that were not given out, and where in the text each begins.
    waiting: VecDeque<(usize, Token)>,
}

impl<'t> Output<'t> {
    /// An empty text that ends at any of some strings.
    pub fn new(tokenizer: &'t Tokenizer, stop: &[String]) -> Self {
        let (stream, stops) = (tokenizer.stream(), Stops::new(stop));
        Output { tokenizer, stream, stops, held: String::new(), decoded: 0, waiting: VecDeque::new() }
    }

    /// Appends a token, looking for stop strings or not. Returns what is certain now, and whether the text has ended.
    pub fn push(&mut self, token: Token, look: bool) -> (Piece, bool) {
        let text = self.stream.push(token.id);
        self.waiting.push_back((self.decoded, token));
        self.decoded += text.len();
        self.held += &text;
        if look && let Some(found) = self.stops.push(&text) {
            let end = self.held.len() - found.behind - found.length;
            self.held.truncate(end);
            self.decoded -= found.behind + found.length;
            return (self.give(end), true);
        }
        (self.give(self.held.len() - self.stops.held()), false)
    }

    /// What is left when no more tokens come.
    pub fn finish(&mut self) -> Piece {
        let stream = std::mem::replace(&mut self.stream, self.tokenizer.stream());
        self.held += &stream.finish();
        let tokens = self.waiting.drain(..).map(|(_, token)| token).collect();
        Piece { text: std::mem::take(&mut self.held), tokens }
    }

    fn give(&mut self, bytes: usize) -> Piece {
        let text: String = self.held.drain(..bytes).collect();
        let given = self.decoded - self.held.len();
        let mut tokens = Vec::new();
        while let Some((_, token)) = self.waiting.pop_front_if(|(begin, _)| *begin < given) {
            tokens.push(token);
        }
        Piece { text, tokens }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::train([Ok("the end of the road, the end of the day ".repeat(9))], 280).unwrap()
    }

    fn token(id: u32) -> Token {
        Token { id, log_prob: None, top: vec![] }
    }

    /// Text, tokens that were given out, and whether it stopped.
    fn write(tokenizer: &Tokenizer, ids: &[u32], stop: &[&str], from: usize) -> (String, usize, bool) {
        let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
        let mut output = Output::new(tokenizer, &stop);
        let (mut text, mut tokens) = (String::new(), 0);
        for (i, id) in ids.iter().enumerate() {
            let (piece, stopped) = output.push(token(*id), i >= from);
            text += &piece.text;
            tokens += piece.tokens.len();
            assert!(from > 0 || stop.iter().all(|stop| !text.contains(stop.as_str())), "{text:?}");
            if stopped {
                return (text, tokens, true);
            }
        }
        let rest = output.finish();
        (text + &rest.text, tokens + rest.tokens.len(), false)
    }

    #[test]
    fn texts_end_exactly_before_stop_strings_whatever_the_tokens() {
        let t = tokenizer();
        let text = "the end of the road — the day";
        let merged = t.encode(text).unwrap();
        let bytes: Vec<u32> = text
            .bytes()
            .map(|b| (4..t.vocab_size() as u32).find(|id| t.token_bytes(*id) == [b]).unwrap())
            .collect();
        assert!(merged.len() < bytes.len());
        for ids in [&merged, &bytes] {
            assert_eq!(write(&t, ids, &[], 0), (text.into(), ids.len(), false));
            assert_eq!(write(&t, ids, &["nd of"], 0).0, "the e");
            assert_eq!(write(&t, ids, &["—", "day"], 0).0, "the end of the road ");
            assert_eq!(write(&t, ids, &["the d", "the dog"], 0).0, "the end of the road — ");
            assert_eq!(write(&t, ids, &["the dog", "daytime"], 0), (text.into(), ids.len(), false));
            assert_eq!(write(&t, ids, &["the"], 0), (String::new(), 0, true));
        }
        // Only tokens that begin in the text are given out, and stops that are not looked for yet stay.
        assert_eq!(write(&t, &bytes, &["end"], 0), ("the ".into(), 4, true));
        assert_eq!(write(&t, &bytes, &["the"], 5), ("the end of ".into(), 11, true));
    }

    #[test]
    fn broken_characters_are_shown_at_the_end_only() {
        let t = tokenizer();
        let id = |byte: u8| (4..t.vocab_size() as u32).find(|id| t.token_bytes(*id) == [byte]).unwrap();
        let mut output = Output::new(&t, &[]);
        let (first, _) = output.push(token(id(b'a')), true);
        assert_eq!((first.text.as_str(), first.tokens.len()), ("a", 1));
        let (none, _) = output.push(token(id(0xE7)), true);
        assert!(none.is_empty());
        let rest = output.finish();
        assert_eq!((rest.text.as_str(), rest.tokens.len()), ("\u{fffd}", 1));
    }
}
