//! Text from ids, in whole characters.

use super::Tokenizer;

/// Turns ids into text one at a time, and gives out only whole characters.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes of a character that is not complete.
    pending: Vec<u8>,
}

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> StreamDecoder<'a> {
        StreamDecoder { tokenizer, pending: Vec::new() }
    }

    /// Adds a token; returns the text that is certain now. Bytes that cannot be UTF-8 become U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        self.pending.extend(self.tokenizer.token_bytes(id));
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(rest) => {
                    text += rest;
                    self.pending.clear();
                    return text;
                }
                Err(e) => {
                    let valid = e.valid_up_to();
                    text += std::str::from_utf8(&self.pending[..valid]).unwrap_or_default();
                    let Some(wrong) = e.error_len() else {
                        self.pending.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid + wrong);
                }
            }
        }
    }

    /// What is left when no more tokens come: U+FFFD for a character that was begun, or nothing.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}
