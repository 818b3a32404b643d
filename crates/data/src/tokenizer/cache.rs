//! Words that were merged already, and what they became.
//!
//! Each thread has one table of fixed size for all tokenizers, without locks, and without memory of its own for a word.

/// Slots of a table: 1 MiB for each thread that encodes.
const SLOTS: usize = 1 << 14;

/// Longest word that is kept, in units of 8 bytes.
const WIDTH: usize = 4;

/// Most tokens of a word that is kept.
const MOST: usize = 6;

/// A word, as it is looked up.
#[derive(Clone, Copy)]
pub(super) struct Key {
    /// Number of the tokenizer, above 8 bits of the word's length.
    head: u64,
    /// The word's bytes, then zeros.
    bytes: [u64; WIDTH],
    slot: usize,
}

/// A cache line.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Slot {
    /// The key's head, above 8 bits of the number of tokens. A tokenizer's number is not 0, so empty slots match none.
    head: u64,
    bytes: [u64; WIDTH],
    ids: [u32; MOST],
}

/// The table of one thread.
pub(super) struct Cache {
    slots: Vec<Slot>,
}

impl Key {
    /// The key of the word `text[start..end]` for the tokenizer of a number (1 to 2^48); nothing if it is too long.
    #[inline]
    pub fn new(tokenizer: u64, text: &[u8], start: usize, end: usize) -> Option<Key> {
        let len = end - start;
        if len > 8 * WIDTH {
            return None;
        }
        let mut bytes = [0; WIDTH];
        let mut mix: u64 = 0;
        for (i, eight) in bytes.iter_mut().take(len.div_ceil(8)).enumerate() {
            *eight = load(text, start + 8 * i, end);
            mix = (mix.rotate_left(23) ^ *eight).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
        let slot = (mix >> 40) as usize % SLOTS;
        Some(Key { head: tokenizer << 8 | len as u64, bytes, slot })
    }
}

/// Up to eight bytes of a text, then zeros.
#[inline]
fn load(text: &[u8], start: usize, end: usize) -> u64 {
    let len = (end - start).min(8);
    if let Some(Ok(eight)) = text.get(start..start + 8).map(<[u8; 8]>::try_from) {
        // The word's neighbours are loaded too, and taken away again.
        return u64::from_le_bytes(eight) & (u64::MAX >> (64 - 8 * len));
    }
    text[start..start + len].iter().rev().fold(0, |eight, &byte| eight << 8 | u64::from(byte))
}

impl Cache {
    pub fn new() -> Cache {
        Cache { slots: vec![Slot::default(); SLOTS] }
    }

    /// Appends a word's tokens, if they are known.
    #[inline]
    pub fn get(&self, key: &Key, ids: &mut Vec<u32>) -> bool {
        for slot in [key.slot, key.slot ^ 1] {
            let slot = &self.slots[slot];
            if slot.head >> 8 == key.head && slot.bytes == key.bytes {
                let count = (slot.head & 0xFF) as usize;
                ids.extend_from_slice(&slot.ids[..count.min(MOST)]);
                return true;
            }
        }
        false
    }

    /// Keeps a word's tokens, if they are few. The word in its place moves to the place beside it, and the one there is
    /// forgotten.
    pub fn put(&mut self, key: &Key, tokens: &[u32]) {
        if tokens.len() > MOST {
            return;
        }
        let mut slot = Slot { head: key.head << 8 | tokens.len() as u64, bytes: key.bytes, ids: [0; MOST] };
        slot.ids[..tokens.len()].copy_from_slice(tokens);
        self.slots[key.slot ^ 1] = std::mem::replace(&mut self.slots[key.slot], slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(cache: &Cache, tokenizer: u64, text: &str, start: usize, end: usize) -> Option<Vec<u32>> {
        let mut ids = vec![];
        cache.get(&Key::new(tokenizer, text.as_bytes(), start, end)?, &mut ids).then_some(ids)
    }

    #[test]
    fn words_are_told_apart_to_the_byte_and_by_tokenizer() {
        let mut cache = Cache::new();
        let text = "abcdefghijklmnopqrstuvwxyz0123456789\0\0";
        for len in 1..=32 {
            let key = Key::new(5, text.as_bytes(), 1, 1 + len).unwrap();
            cache.put(&key, &[len as u32, 9][..1 + len % 2]);
        }
        for len in 1..=32 {
            let expected = Some([len as u32, 9][..1 + len % 2].to_vec());
            assert_eq!(get(&cache, 5, text, 1, 1 + len), expected);
            // The same word at the very end of another text.
            assert_eq!(get(&cache, 5, &text[1..1 + len], 0, len), expected);
            assert_eq!(get(&cache, 6, text, 1, 1 + len), None);
            assert_eq!(get(&cache, 5, text, 2, 2 + len), None);
        }
        assert_eq!(get(&cache, 5, "b\0", 0, 2), None);
        assert!(Key::new(5, text.as_bytes(), 0, 33).is_none());
    }

    #[test]
    fn words_of_many_tokens_are_left_out_and_old_ones_are_forgotten() {
        let mut cache = Cache::new();
        let key = |word: &str| Key::new(1, word.as_bytes(), 0, word.len()).unwrap();
        cache.put(&key("long"), &[1; MOST + 1]);
        assert_eq!(get(&cache, 1, "long", 0, 4), None);
        for i in 0..10 * SLOTS as u32 {
            cache.put(&key(&format!("w{i}")), &[i]);
        }
        let known = |i: &u32| get(&cache, 1, &format!("w{i}"), 0, 1 + i.to_string().len()) == Some(vec![*i]);
        let kept = (0..10 * SLOTS as u32).filter(known).count();
        assert!((SLOTS / 2..=SLOTS).contains(&kept), "{kept}");
        assert!(known(&(10 * SLOTS as u32 - 1)));
    }
}
