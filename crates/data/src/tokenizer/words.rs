//! GPT-2's split of text into words, inside of which BPE merges.
//!
//! The pattern is `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`, written out here as one
//! pass over the text, since an engine that can look ahead takes most of the time of encoding. The look-ahead says only
//! that white space leaves its last character to the word behind it.

use super::classes::{Class, Classes};
use anyhow::Result;

/// Splits text into words.
pub(super) struct Words(Classes);

impl Words {
    /// Makes the table of classes.
    pub fn new() -> Result<Words> {
        Ok(Words(Classes::new()?))
    }

    /// Where the word ends that starts at a byte of a text, which must be in the text and start a word.
    pub fn end(&self, text: &str, start: usize) -> usize {
        let bytes = text.as_bytes();
        if bytes[start] == b'\''
            && let Some(letters) = contraction(&bytes[start + 1..])
        {
            return start + 1 + letters;
        }
        // A space goes with the word behind it.
        let body = start + usize::from(bytes[start] == b' ');
        match self.at(text, body) {
            None | Some((Class::Space, _)) => self.white_space(text, start),
            Some((class, len)) => self.run(text, class, body + len).1,
        }
    }

    /// End of the white space that starts at `start`, less its last character if a word follows and it has more.
    fn white_space(&self, text: &str, start: usize) -> usize {
        let (last, end) = self.run(text, Class::Space, start);
        if end < text.len() && last > start { last } else { end }
    }

    /// The last character and the end of the run of a class that starts at `start`.
    fn run(&self, text: &str, class: Class, start: usize) -> (usize, usize) {
        let (mut last, mut end) = (start, start);
        while let Some((found, len)) = self.at(text, end)
            && found == class
        {
            last = end;
            end += len;
        }
        (last, end)
    }

    /// Class and length of the character at a place; nothing at the end.
    #[inline]
    fn at(&self, text: &str, place: usize) -> Option<(Class, usize)> {
        let byte = *text.as_bytes().get(place)?;
        if byte.is_ascii() {
            return Some((self.0.of_ascii(byte), 1));
        }
        let c = text[place..].chars().next()?;
        Some((self.0.of(c), c.len_utf8()))
    }
}

/// Letters of the contraction behind an apostrophe. Capital letters make none.
fn contraction(behind: &[u8]) -> Option<usize> {
    match behind {
        [b's' | b't' | b'm' | b'd', ..] => Some(1),
        [b'r' | b'v', b'e', ..] | [b'l', b'l', ..] => Some(2),
        _ => None,
    }
}

/// The first place from `from` on where the pattern is sure to cut, or the end: before white space that follows
/// something else, since no word goes on into white space.
pub(super) fn seam(text: &str, from: usize) -> usize {
    let from = text.floor_char_boundary(from);
    let mut in_word = false;
    for (i, c) in text[from..].char_indices() {
        if in_word && c.is_whitespace() {
            return from + i;
        }
        in_word = !c.is_whitespace();
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_device::rng::{Purpose, Stream};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    fn split<'a>(words: &Words, text: &'a str) -> Vec<&'a str> {
        let mut start = 0;
        let mut found = Vec::new();
        while start < text.len() {
            let end = words.end(text, start);
            found.push(&text[start..end]);
            start = end;
        }
        found
    }

    /// The library's split, with the pattern as it was published.
    fn reference(text: &str) -> Vec<String> {
        let mut split = PreTokenizedString::from(text);
        ByteLevel::new(false, false, true).pre_tokenize(&mut split).unwrap();
        let parts = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        parts.iter().map(|(_, at, _)| text[at.0..at.1].to_owned()).collect()
    }

    /// Texts of characters of every class that the pattern tells apart.
    fn random_texts(count: u64) -> impl Iterator<Item = String> {
        let alphabet: Vec<char> =
            "  \n\t\u{a0}\u{3000}\u{85}\u{2028}abstrevmldI'’1½Ⅷ!#_-é狐🦊\u{301}ªǅ٣\u{200b}\u{0}\u{1c}"
                .chars()
                .collect();
        let stream = Stream::new(1, Purpose::Sampling, 0, 0);
        (0..count).map(move |row| {
            (0..24).map(|i| alphabet[stream.word(row, i) as usize % alphabet.len()]).collect()
        })
    }

    #[test]
    fn words_are_those_of_the_published_pattern() {
        let words = Words::new().unwrap();
        let texts = [
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
            " 's",
            "'l",
            "'ll",
            "'lll",
            "'rev",
            "'",
            "\t\tb",
            "a  1",
            "a  !",
            "\u{a0}a",
            "\u{a0}\u{a0}a",
            " \u{a0}",
            "\u{a0} ",
        ];
        for text in texts.map(String::from).into_iter().chain(random_texts(5000)) {
            assert_eq!(split(&words, &text), reference(&text), "{text:?}");
        }
    }

    #[test]
    fn every_character_has_the_class_that_the_pattern_sees() {
        // Around each character: a letter, a number, a sign and white space, so that any wrong class moves a cut.
        let words = Words::new().unwrap();
        for block in (0..=0x10FFFF_u32).collect::<Vec<_>>().chunks(512) {
            let text: String = block
                .iter()
                .filter_map(|&c| char::from_u32(c))
                .flat_map(|c| ['a', c, 'a', '1', c, '1', '!', c, '!', ' ', c, ' '])
                .collect();
            assert_eq!(split(&words, &text), reference(&text), "from U+{:04X} on", block[0]);
        }
    }

    #[test]
    fn texts_cut_at_seams_have_the_same_words() {
        let words = Words::new().unwrap();
        for text in random_texts(500) {
            for from in 0..=text.len() {
                let (left, right) = text.split_at(seam(&text, from));
                let both = [split(&words, left), split(&words, right)].concat();
                assert_eq!(both, split(&words, &text), "{text:?} from {from}");
            }
        }
        assert_eq!(seam("one two", 0), 3);
        assert_eq!(seam("one two", 3), 7);
        assert_eq!(seam("  one  two", 0), 5);
    }
}
