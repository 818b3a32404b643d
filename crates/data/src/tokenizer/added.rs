//! Tokens that files add to a vocabulary, and where they are in a text, as in Hugging Face's tokenizers.

use super::files::{brief, quoted};
use crate::SPECIALS;
use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;
use std::collections::HashSet;
use std::ops::Range;

/// A token that text is searched for before it is split into words, with the fields in the library's order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Added {
    pub id: u32,
    pub content: String,
    /// Whether letters, digits and the like beside it make it ordinary text.
    pub single_word: bool,
    /// Whether white space before it belongs to it, and behind it.
    pub lstrip: bool,
    pub rstrip: bool,
    /// Whether it is looked for after all that are not. (A normaliser could change text in between; OPT has none.)
    pub normalized: bool,
    /// Whether it is no text in what is generated.
    pub special: bool,
}

impl Added {
    /// One of OPT's own special tokens.
    pub fn own(id: u32) -> Added {
        let content = SPECIALS.get(id as usize).copied().unwrap_or_default();
        Self::plain(id, content.into(), true)
    }

    /// Whether it is one of OPT's own, whatever else a file says about it.
    pub fn is_own(&self) -> bool {
        SPECIALS.get(self.id as usize).is_some_and(|own| *own == self.content)
    }

    /// As the library adds a token of which nothing more is known.
    fn plain(id: u32, content: String, special: bool) -> Added {
        let [single_word, lstrip, rstrip] = [false; 3];
        Added { id, content, single_word, lstrip, rstrip, normalized: !special, special }
    }

    fn read(id: Option<u64>, token: &Value) -> Result<Added> {
        let id = id.and_then(|id| u32::try_from(id).ok()).context("its id is no whole number from 0 on")?;
        let Value::String(content) = &token["content"] else {
            bail!("its `content` is {}; expected a text", brief(&token["content"]));
        };
        let flag = |key: &str| match &token[key] {
            Value::Null => Ok(None),
            Value::Bool(flag) => Ok(Some(*flag)),
            other => bail!("its `{key}` is {}; expected true or false", brief(other)),
        };
        let special = flag("special")?.unwrap_or(false);
        Ok(Added {
            single_word: flag("single_word")?.unwrap_or(false),
            lstrip: flag("lstrip")?.unwrap_or(false),
            rstrip: flag("rstrip")?.unwrap_or(false),
            normalized: flag("normalized")?.unwrap_or(!special),
            ..Self::plain(id, content.clone(), special)
        })
    }
}

/// Those of a `tokenizer.json`.
pub(super) fn from_list(list: &Value) -> Result<Vec<Added>> {
    let list = match list {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) => list,
        other => bail!("`added_tokens` is {}; expected a list", brief(other)),
    };
    let read = |(i, token): (usize, &Value)| {
        Added::read(token["id"].as_u64(), token)
            .with_context(|| format!("`added_tokens[{i}]`, {}, is wrong", brief(token)))
    };
    list.iter().enumerate().map(read).collect()
}

/// Those of a `tokenizer_config.json`; none if it does not list any.
pub(super) fn from_config(config: &Value) -> Result<Option<Vec<Added>>> {
    let tokens = match &config["added_tokens_decoder"] {
        Value::Null => return Ok(None),
        Value::Object(tokens) => tokens,
        other => bail!("`added_tokens_decoder` is {}; expected an object of ids and tokens", brief(other)),
    };
    let read = |(id, token): (&String, &Value)| {
        Added::read(id.parse().ok(), token).with_context(|| {
            format!("in `added_tokens_decoder`, the entry {} of {} is wrong", brief(token), quoted(id))
        })
    };
    tokens.iter().map(read).collect::<Result<_>>().map(Some)
}

/// Those of an `added_tokens.json`, which has contents and ids only.
pub(super) fn from_ids(ids: &Value, special: &HashSet<String>) -> Result<Vec<Added>> {
    let Value::Object(ids) = ids else {
        bail!("expected one JSON object of tokens and ids, found {}", brief(ids));
    };
    let read = |(content, id): (&String, &Value)| {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok()).with_context(|| {
            format!(
                "the token {} has the id {}; expected a whole number from 0 on",
                quoted(content),
                brief(id)
            )
        })?;
        Ok(Added::plain(number, content.clone(), special.contains(content)))
    };
    ids.iter().map(read).collect()
}

/// What a `special_tokens_map.json` or a `tokenizer_config.json` calls special.
pub(super) fn special_in(file: &Value) -> impl Iterator<Item = String> {
    let roles = file.as_object().into_iter().flatten();
    let roles = roles.filter(|(role, _)| role.ends_with("_token") || *role == "additional_special_tokens");
    let tokens = roles.flat_map(|(_, tokens)| match tokens {
        Value::Array(tokens) => tokens.as_slice(),
        one => std::slice::from_ref(one),
    });
    tokens.filter_map(|token| Some(token.as_str().or_else(|| token["content"].as_str())?.to_owned()))
}

/// A part of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// What is to be encoded by itself.
    Text(Range<usize>),
    /// A token that was found.
    Token(u32),
}

/// Finds added tokens in texts.
pub(super) struct Finder {
    /// Those that are not normalised, and behind them the others.
    passes: [Pass; 2],
}

/// Tokens that are looked for at the same time.
struct Pass {
    contents: AhoCorasick,
    tokens: Vec<Added>,
}

impl Finder {
    /// # Errors
    /// When the tokens are too many to be looked for.
    pub fn new(tokens: impl Iterator<Item = Added>) -> Result<Finder> {
        let (later, first) = tokens.partition(|token| token.normalized);
        Ok(Finder { passes: [Pass::new(first)?, Pass::new(later)?] })
    }

    /// The whole text, in parts.
    pub fn parts(&self, text: &str) -> Vec<Part> {
        let mut parts = vec![Part::Text(0..text.len())];
        for pass in &self.passes {
            let mut finer = Vec::new();
            for part in parts {
                match part {
                    Part::Text(range) => pass.split(text, range, &mut finer),
                    token => finer.push(token),
                }
            }
            parts = finer;
        }
        parts
    }
}

impl Pass {
    fn new(tokens: Vec<Added>) -> Result<Pass> {
        let contents = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            // Tables of the other kinds may take a kilobyte for each byte of a token.
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .build(tokens.iter().map(|token| &token.content))
            .context("there are too many added tokens")?;
        Ok(Pass { contents, tokens })
    }

    /// Splits a part of a text. To the tokens, it is all there is.
    fn split(&self, text: &str, part: Range<usize>, parts: &mut Vec<Part>) {
        let (offset, text) = (part.start, &text[part]);
        let mut done = 0;
        // White space behind a token, in which more tokens may be found: it is measured once.
        let mut space = 0..0;
        for found in self.contents.find_iter(text) {
            let Some(token) = self.tokens.get(found.pattern().as_usize()) else { continue };
            let (mut start, mut end) = (found.start(), found.end());
            if token.single_word && (text[..start].ends_with(is_word) || text[end..].starts_with(is_word)) {
                continue;
            }
            if token.lstrip {
                start = done + text.get(done..start).map_or(0, |before| before.trim_end().len());
            }
            if token.rstrip {
                if !space.contains(&end) {
                    space = end..text.len() - text[end..].trim_start().len();
                }
                end = space.end;
            }
            if done < start {
                parts.push(Part::Text(offset + done..offset + start));
            }
            parts.push(Part::Token(token.id));
            done = end;
        }
        if done < text.len() {
            parts.push(Part::Text(offset + done..offset + text.len()));
        }
    }
}

/// Whether a character is in Unicode's `\w`.
fn is_word(c: char) -> bool {
    regex_syntax::is_word_character(c)
}
