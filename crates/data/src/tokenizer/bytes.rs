//! What tokens stand for: bytes, which GPT-2's vocabulary writes as visible characters.

use super::files::{Vocabulary, quoted};
use crate::SPECIALS;
use anyhow::{Context, Result, bail};
use std::collections::HashSet;

/// The bytes of every token, and the token of every byte.
pub(super) struct Bytes {
    /// Bytes of all tokens, one after the other; the special ones have none.
    bytes: Vec<u8>,
    /// Where each token's bytes start, and the end of the last one.
    starts: Vec<usize>,
    /// The token of each byte alone.
    pub ids: [u32; 256],
}

impl Bytes {
    /// From the tokens as they are written, by id. Added tokens that the vocabulary does not have stand for their content.
    ///
    /// # Errors
    /// Names a token that is written with other characters, or a byte without a token.
    pub fn new(vocabulary: &Vocabulary) -> Result<Bytes> {
        let Vocabulary { tokens, merges, added, .. } = vocabulary;
        let mut byte_of = [None; 512];
        for (byte, letter) in (0..=255).zip(letters()) {
            byte_of[letter as usize] = Some(byte);
        }
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        let mut ids = [None; 256];
        // What text is made of keeps its bytes, special or not: text must come back.
        let made: HashSet<u32> = merges.iter().map(|merge| merge[2]).filter(|_| !added.is_empty()).collect();
        let count = added.last().map_or(0, |last| last.id as usize + 1).max(tokens.len());
        let mut added = added.iter().peekable();
        for id in 0..count {
            let before = bytes.len();
            let token = tokens.get(id).and_then(Option::as_deref);
            let text = token.filter(|_| id >= SPECIALS.len()).unwrap_or_default();
            for c in text.chars() {
                bytes.push(byte_of.get(c as usize).copied().flatten().with_context(|| {
                    format!(
                        "the token {} (id {id}) has the character {c:?}, which stands for no byte: not a byte-level BPE",
                        quoted(text)
                    )
                })?);
            }
            if let [byte] = bytes[before..] {
                ids[byte as usize] = Some(id as u32);
            }
            if let Some(added) = added.next_if(|added| added.id as usize == id) {
                match (added.special, token) {
                    (false, None) => bytes.extend(added.content.as_bytes()),
                    (true, Some(_)) if bytes.len() > before + 1 && !made.contains(&added.id) => {
                        bytes.truncate(before)
                    }
                    _ => {}
                }
            }
            starts.push(bytes.len());
        }
        if let Some(byte) = ids.iter().position(Option::is_none) {
            bail!(
                "there is no token for the byte {byte:#04x} (written {:?}), so some text could not be encoded",
                letters()[byte]
            );
        }
        Ok(Bytes { bytes, starts, ids: ids.map(Option::unwrap_or_default) })
    }

    /// One more than the largest id.
    pub fn count(&self) -> usize {
        self.starts.len() - 1
    }

    /// Bytes of a token; none for the special ones and for ids beyond the last one.
    pub fn of(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..).unwrap_or_default() {
            [start, end, ..] => &self.bytes[*start..*end],
            _ => &[],
        }
    }
}

/// GPT-2's way of writing bytes: printable Latin-1 as itself, the rest as characters from U+0100 on.
fn letters() -> [char; 256] {
    let mut spare = 'Ā'..;
    std::array::from_fn(|byte| match byte as u8 {
        visible @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => visible.into(),
        _ => spare.next().unwrap_or_default(),
    })
}
