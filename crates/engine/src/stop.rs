//! Finding strings at which a text ends, while it grows.

/// Looks for several strings at once. The text is given in pieces, cut anywhere between characters; what is found does not
/// depend on the cuts: the string that is complete first ends the text, the longest of those that are complete at once.
pub struct Stops {
    strings: Vec<Stop>,
}

/// A string, and how much of it the text's end could be the beginning of (Knuth, Morris and Pratt, 1977).
struct Stop {
    bytes: Vec<u8>,
    /// Of each prefix, the length of the longest shorter prefix that it ends with.
    borders: Vec<usize>,
    matched: usize,
}

impl Stops {
    /// Strings that are not empty.
    pub fn new<S: AsRef<str>>(strings: impl IntoIterator<Item = S>) -> Stops {
        Stops { strings: strings.into_iter().map(|s| Stop::new(s.as_ref().as_bytes())).collect() }
    }

    /// Takes the next piece. If a string is complete, how many bytes before the piece's end that string begins, counted
    /// from where it ends, and how many bytes of the piece are behind it.
    pub fn push(&mut self, piece: &str) -> Option<Found> {
        for (i, byte) in piece.bytes().enumerate() {
            let mut longest = 0;
            for stop in &mut self.strings {
                if stop.push(byte) {
                    longest = longest.max(stop.bytes.len());
                }
            }
            if longest > 0 {
                return Some(Found { length: longest, behind: piece.len() - 1 - i });
            }
        }
        None
    }

    /// Bytes at the end of the text so far that may belong to a string.
    pub fn held(&self) -> usize {
        self.strings.iter().map(|stop| stop.matched).max().unwrap_or(0)
    }
}

/// A string was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its bytes.
    pub length: usize,
    /// Bytes of the piece behind it.
    pub behind: usize,
}

impl Stop {
    fn new(bytes: &[u8]) -> Stop {
        let mut stop = Stop { bytes: bytes.to_vec(), borders: vec![0; bytes.len()], matched: 0 };
        for i in 1..bytes.len() {
            stop.matched = stop.next(stop.matched, bytes[i]);
            stop.borders[i] = stop.matched;
        }
        stop.matched = 0;
        stop
    }

    /// The longest prefix that a text ends with, after one more byte.
    fn next(&self, mut matched: usize, byte: u8) -> usize {
        loop {
            if self.bytes.get(matched) == Some(&byte) {
                return matched + 1;
            }
            if matched == 0 {
                return 0;
            }
            matched = self.borders[matched - 1];
        }
    }

    fn push(&mut self, byte: u8) -> bool {
        self.matched = self.next(self.matched, byte);
        self.matched == self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text up to the stop, what was never held back, and whether it was found.
    fn feed(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut finder = Stops::new(stops);
        let mut text = String::new();
        let mut shown = 0;
        for piece in pieces {
            text += piece;
            if let Some(found) = finder.push(piece) {
                text.truncate(text.len() - found.behind - found.length);
                assert!(shown <= text.len(), "a part of a stop string was shown");
                return (text, true);
            }
            shown = text.len() - finder.held();
            assert!(text.is_char_boundary(shown));
        }
        (text, false)
    }

    /// The definition, character by character.
    fn reference(stops: &[&str], text: &str) -> (String, bool) {
        for end in 1..=text.len() {
            let at_end = stops.iter().filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes()));
            if let Some(longest) = at_end.map(|stop| stop.len()).max() {
                return (text[..end - longest].into(), true);
            }
        }
        (text.into(), false)
    }

    #[test]
    fn any_cuts_give_the_definition() {
        let cases: [(&[&str], &str); 8] = [
            (&["abcabd"], "xabcabcabdy"),
            (&["aab", "b"], "aaaab"),
            (&["abc", "b"], "abc"),
            (&["狐狸", "é"], "x狐狐狸é"),
            (&["\n\n", "User:"], "some text\nUser\n User:more"),
            (&["never"], "nevenevenev"),
            (&["aaaa"], "aaabaaaab"),
            (&["x"], "x"),
        ];
        for (stops, text) in cases {
            let want = reference(stops, text);
            let places: Vec<usize> = (1..text.len()).filter(|i| text.is_char_boundary(*i)).collect();
            for cuts in 0..1u32 << places.len().min(12) {
                let mut pieces = vec![];
                let mut from = 0;
                for (i, place) in places.iter().enumerate() {
                    if cuts >> (i % 12) & 1 == 1 {
                        pieces.push(&text[from..*place]);
                        from = *place;
                    }
                }
                pieces.push(&text[from..]);
                assert_eq!(feed(stops, &pieces), want, "{stops:?} in {pieces:?}");
            }
        }
    }

    #[test]
    fn long_strings_are_found_across_many_pieces() {
        let stop = "ab".repeat(5000) + "c";
        let text = "ab".repeat(12_000) + "c rest";
        let pieces: Vec<&str> =
            (0..text.len()).step_by(7).map(|i| &text[i..(i + 7).min(text.len())]).collect();
        assert_eq!(feed(&[&stop], &pieces), ("ab".repeat(7000), true));
    }
}
