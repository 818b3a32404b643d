//! What tokens stand for: bytes, which GPT-2's vocabulary writes as visible characters.

use super::files::quoted;
use crate::SPECIALS;
use anyhow::{Context, Result, bail};

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
    /// From the tokens as they are written, by id.
    ///
    /// # Errors
    /// Names a token that is written with other characters, or a byte without a token.
    pub fn new(tokens: &[Option<String>]) -> Result<Bytes> {
        let mut byte_of = [None; 512];
        for (byte, letter) in (0..=255).zip(letters()) {
            byte_of[letter as usize] = Some(byte);
        }
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        let mut ids = [None; 256];
        for (id, token) in tokens.iter().enumerate() {
            let before = bytes.len();
            let text = token.as_deref().filter(|_| id >= SPECIALS.len()).unwrap_or_default();
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
