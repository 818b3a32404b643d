//! GPT-2's split of text into words, inside of which BPE merges.
//!
//! The pattern is `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`. Its look-ahead needs a
//! backtracking engine, which takes most of the time of tokenising. It says only that white space leaves its last
//! character to the word behind it, so the rest of the pattern goes to a linear-time engine and that one rule is here.

use anyhow::Result;
use regex::Regex;

/// The pattern without its look-ahead.
const PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";

/// Splits text into words.
#[derive(Clone)]
pub(super) struct Words(Regex);

impl Words {
    /// Compiles the pattern.
    pub fn new() -> Result<Words> {
        Ok(Words(Regex::new(PATTERN)?))
    }

    /// The words of a text, in order; together they are the text.
    pub fn split<'a>(&self, text: &'a str) -> impl Iterator<Item = &'a str> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let mut end = self.0.find_at(text, start)?.end();
            let word = &text[start..end];
            // Only white space ends in white space. Where a word follows, it gets the last character.
            if end < text.len()
                && let Some((last, c)) = word.char_indices().next_back()
                && c.is_whitespace()
                && last > 0
            {
                end = start + last;
            }
            let word = &text[start..end];
            start = end;
            Some(word)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_device::rng::{Purpose, Stream};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    /// The library's split, with the pattern as it was published.
    fn reference(text: &str) -> Vec<String> {
        let mut split = PreTokenizedString::from(text);
        ByteLevel::new(false, false, true).pre_tokenize(&mut split).unwrap();
        let parts = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        parts.iter().map(|(_, at, _)| text[at.0..at.1].to_owned()).collect()
    }

    #[test]
    fn words_are_those_of_the_published_pattern() {
        let words = Words::new().unwrap();
        let mut texts: Vec<String> = [
            "",
            " ",
            "  ",
            "a",
            " a",
            "  a",
            "\n a",
            "a \n",
            "don't we'll I'M it's",
            "x1y22 ½Ⅷ",
            "a\u{a0}\u{3000} b",
            "   \n\n  fn main() {}\n",
            "狐🦊 e\u{301}",
            "'''s",
            " '",
            "\t\tb",
            "a  1",
            "a  !",
        ]
        .map(String::from)
        .to_vec();
        // And random ones, from characters of every class the pattern tells apart.
        let alphabet: Vec<char> =
            "  \n\t\u{a0}\u{3000}\u{85}abstrevmldI'’1½Ⅷ!#_-é狐🦊\u{301}ªǅ٣\u{200b}\u{0}".chars().collect();
        let stream = Stream::new(1, Purpose::Sampling, 0, 0);
        for row in 0..2000 {
            let pick = |i| alphabet[stream.word(row, i) as usize % alphabet.len()];
            texts.push((0..24).map(pick).collect());
        }
        for text in texts {
            assert_eq!(words.split(&text).collect::<Vec<_>>(), reference(&text), "{text:?}");
        }
    }
}
