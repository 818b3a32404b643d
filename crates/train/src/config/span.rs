//! Lengths: how people write counts ("0.5M") and stretches of training ("2000", "375M tokens").

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;

/// A count, written as an integer or with a suffix: `524288`, `"0.5M"`, `"300B"` (k, M, B, T are powers of 1000).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count(pub u64);

/// A stretch of training: `2000`, `"2000 steps"` or `"375M tokens"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// Optimiser steps.
    Steps(u64),
    /// Tokens, rounded up to whole steps.
    Tokens(u64),
}

impl Span {
    /// Length in steps of `batch_tokens` tokens each.
    pub fn steps(self, batch_tokens: u64) -> u64 {
        match self {
            Span::Steps(n) => n,
            Span::Tokens(n) => n.div_ceil(batch_tokens.max(1)),
        }
    }
}

const SUFFIXES: [(char, u64); 4] =
    [('T', 1_000_000_000_000), ('B', 1_000_000_000), ('M', 1_000_000), ('k', 1000)];

fn parse_count(text: &str) -> Result<u64, String> {
    let wrong = || format!("\"{text}\" is not a count; expected for example 2000, \"0.5M\" or \"300B\"");
    // A comma may be meant to separate thousands or, as in half of Europe, decimals.
    if text.contains(',') {
        return Err(format!("{}, without commas: underscores separate thousands, a point decimals", wrong()));
    }
    let plain: String = text.trim().chars().filter(|c| *c != '_').collect();
    let suffixed = SUFFIXES.iter().find_map(|(suffix, factor)| {
        let digits = plain.strip_suffix(|c: char| c.eq_ignore_ascii_case(suffix))?;
        Some((digits.trim(), *factor))
    });
    let (digits, factor) = suffixed.unwrap_or((&plain, 1));
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(wrong);
    }
    let value = digits.parse::<f64>().map_err(|_| wrong())? * factor as f64;
    let whole = (value.fract() == 0.0 || factor > 1) && (0.0..9e18).contains(&value);
    if whole { Ok(value.round() as u64) } else { Err(wrong()) }
}

fn parse_span(text: &str) -> Result<Span, String> {
    let text = text.trim();
    let unit = |names: [&str; 2]| names.iter().find_map(|n| text.strip_suffix(n));
    if let Some(count) = unit(["tokens", "token"]) {
        return Ok(Span::Tokens(parse_count(count)?));
    }
    let count = unit(["steps", "step"]).unwrap_or(text);
    parse_count(count).map(Span::Steps).map_err(|_| {
        format!("\"{text}\" is not a length; expected for example 2000, \"2000 steps\" or \"375M tokens\"")
    })
}

impl fmt::Display for Count {
    /// The shortest exact way to write the count.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match SUFFIXES.iter().find(|(_, factor)| self.0 > 0 && self.0.is_multiple_of(*factor)) {
            Some((suffix, factor)) => write!(f, "{}{suffix}", self.0 / factor),
            None => write!(f, "{}", self.0),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Span::Steps(n) => write!(f, "{n} steps"),
            Span::Tokens(n) => write!(f, "{} tokens", Count(*n)),
        }
    }
}

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(self.0)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Span::Steps(n) => s.serialize_u64(*n),
            Span::Tokens(_) => s.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(Text {
            expected: "a count such as 2000 or \"0.5M\"",
            parse: parse_count,
            whole: |n| n,
        })
        .map(Count)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let expected = "a length such as 2000 (steps) or \"375M tokens\"";
        d.deserialize_any(Text { expected, parse: parse_span, whole: Span::Steps })
    }
}

/// Reads an integer, or a string by `parse`.
struct Text<T> {
    expected: &'static str,
    parse: fn(&str) -> Result<T, String>,
    whole: fn(u64) -> T,
}

impl<T> de::Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_u64<E: de::Error>(self, n: u64) -> Result<T, E> {
        Ok((self.whole)(n))
    }

    fn visit_i64<E: de::Error>(self, n: i64) -> Result<T, E> {
        u64::try_from(n)
            .map(self.whole)
            .map_err(|_| E::custom(format!("{n} is negative; expected {}", self.expected)))
    }

    fn visit_f64<E: de::Error>(self, n: f64) -> Result<T, E> {
        // 1e6 is a number with a point to TOML.
        parse_count(&n.to_string()).map(self.whole).map_err(E::custom)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_spans_parse_and_print_back() {
        for (text, n) in [
            ("2000", 2000),
            ("0.5M", 500_000),
            ("300B", 300_000_000_000),
            ("1_024", 1024),
            ("4k", 4000),
            ("1e6", 1_000_000),
        ] {
            assert_eq!(parse_count(text), Ok(n));
            assert_eq!(parse_count(&Count(n).to_string()), Ok(n));
        }
        for (text, span) in [
            ("2000", Span::Steps(2000)),
            ("2000 steps", Span::Steps(2000)),
            ("1 step", Span::Steps(1)),
            ("375M tokens", Span::Tokens(375_000_000)),
            ("0.5B tokens", Span::Tokens(500_000_000)),
        ] {
            assert_eq!(parse_span(text), Ok(span));
            assert_eq!(parse_span(&span.to_string()), Ok(span));
        }
        assert_eq!(parse_count("4K"), Ok(4000));
        // The last is a Kelvin sign, which is a k in lower case.
        for wrong in ["", "-3", "1.5", "many", "3 tonnes", "99999999999999999999B", "2\u{212A}"] {
            assert!(parse_span(wrong).is_err(), "{wrong}");
        }
    }

    /// "1,5B" is one and a half to some, and was fifteen to this program.
    #[test]
    fn commas_are_refused() {
        for text in ["1,5B", "0,5M", "1,500", "1,000,000"] {
            let told = parse_count(text).unwrap_err();
            assert!(told.contains(text) && told.contains("without commas"), "{told}");
        }
    }

    #[test]
    fn numbers_with_an_exponent_are_counts_too() {
        let count = |text: &str| {
            let mut table: toml::Table = toml::from_str(&format!("n = {text}")).unwrap();
            table.remove("n").unwrap().try_into::<Count>().map_err(|error| error.to_string())
        };
        assert_eq!(count("1e3"), Ok(Count(1000)));
        assert_eq!(count("2.5e6"), Ok(Count(2_500_000)));
        for wrong in ["1.5", "-1e3", "inf", "nan", "1e300"] {
            assert!(count(wrong).unwrap_err().contains("not a count"), "{wrong}");
        }
    }

    #[test]
    fn tokens_round_up_to_whole_steps() {
        assert_eq!(Span::Tokens(1001).steps(500), 3);
        assert_eq!(Span::Steps(7).steps(500), 7);
    }
}
