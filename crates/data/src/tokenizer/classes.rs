//! The classes of characters that GPT-2's word pattern tells apart.

use anyhow::{Result, bail};
use regex_syntax::hir::{Class as Set, HirKind};

/// What the pattern sees in a character: `\p{L}`, `\p{N}`, `\s` or none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Class {
    Other,
    Letter,
    Number,
    Space,
}

/// The class of every character, by the tables of the `regex` engine (Unicode 16).
pub(super) struct Classes {
    /// By code point, up to the last character that has a class.
    table: Vec<Class>,
}

impl Classes {
    /// Spreads the engine's ranges out into a table, of about 200 kB.
    pub fn new() -> Result<Classes> {
        let mut table = Vec::new();
        for (pattern, class) in [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)]
        {
            let parsed = regex_syntax::parse(pattern)?;
            let HirKind::Class(Set::Unicode(set)) = parsed.kind() else {
                bail!("{pattern} is not a class of characters");
            };
            for range in set.iter() {
                let (first, last) = (range.start() as usize, range.end() as usize);
                if table.len() <= last {
                    table.resize(last + 1, Class::Other);
                }
                table[first..=last].fill(class);
            }
        }
        Ok(Classes { table })
    }

    /// Class of a character.
    pub fn of(&self, c: char) -> Class {
        self.table.get(c as usize).copied().unwrap_or(Class::Other)
    }

    /// Class of an ASCII character.
    pub fn of_ascii(&self, byte: u8) -> Class {
        self.table[byte as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_of_every_kind() {
        let classes = Classes::new().unwrap();
        for c in "azAZéßǅªʰ狐あ한अ𝒜𐐷\u{323af}".chars() {
            assert_eq!(classes.of(c), Class::Letter, "{c:?}");
        }
        for c in "09½Ⅷ٣④〇𝟘\u{1fbf9}".chars() {
            assert_eq!(classes.of(c), Class::Number, "{c:?}");
        }
        for c in
            "\t\n\u{b}\u{c}\r \u{85}\u{a0}\u{1680}\u{2000}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}".chars()
        {
            assert_eq!(classes.of(c), Class::Space, "{c:?}");
        }
        // Separators of ASCII, zero-width space, soft hyphen, a combining mark, an emoji, a private character.
        for c in "\u{0}\u{1c}\u{1f}!'_\u{ad}\u{180e}\u{200b}\u{301}\u{feff}🦊\u{e000}\u{10ffff}".chars() {
            assert_eq!(classes.of(c), Class::Other, "{c:?}");
        }
        assert!((0..128).all(|b| classes.of_ascii(b) == classes.of(b.into())));
    }
}
