//! A vocabulary and its merges in files: `vocab.json` with `merges.txt`, or the library's `tokenizer.json`.

use crate::SPECIALS;
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest value that a message shows, bytes.
const LONGEST_SHOWN: usize = 200;

/// What the files say, checked.
pub(super) struct Vocabulary {
    /// Each token as it is written in the files, by id; ids may be left out.
    pub tokens: Vec<Option<String>>,
    /// Left token, right token, and what they make, the first of lowest rank.
    pub merges: Vec<[u32; 3]>,
    settings: Settings,
}

/// Settings of `tokenizer.json`'s model that do not matter when every byte has a token. They are kept because files
/// differ in them and fingerprints cover them.
#[derive(Default)]
struct Settings {
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
}

/// The model in a `tokenizer.json`, with the fields in the library's order.
#[derive(Serialize)]
pub(super) struct Model<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: Option<f32>,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Option<&'a str>,
    end_of_word_suffix: Option<&'a str>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    #[serde(serialize_with = "by_id")]
    vocab: &'a [Option<String>],
    merges: Vec<(&'a str, &'a str)>,
}

fn by_id<S: Serializer>(tokens: &[Option<String>], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(tokens.iter().enumerate().filter_map(|(id, token)| Some((token.as_ref()?, id))))
}

impl Vocabulary {
    /// Reads the file or folder that [`Tokenizer::load`](super::Tokenizer::load) describes. Returns the file that holds
    /// the vocabulary, too.
    pub fn load(path: &Path) -> Result<(Vocabulary, PathBuf)> {
        let meta = fs::metadata(path)
            .context("expected a tokenizer.json, or a folder with one or with vocab.json and merges.txt")?;
        let json = if meta.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
        if json.exists() {
            return Ok((from_file(&json, Self::from_json)?, json));
        }
        let (vocab, merges) = (the_one(path, "vocab.json")?, the_one(path, "merges.txt")?);
        let tokens = from_file(&vocab, |bytes| match parse(bytes)? {
            Value::Object(vocab) => Tokens::new(vocab),
            other => bail!("expected one JSON object of tokens and ids, found {}", brief(&other)),
        })?;
        let merges = from_file(&merges, |bytes| {
            let text = std::str::from_utf8(bytes).map_err(|e| {
                anyhow!("byte {} is not UTF-8; the file is damaged or no merges.txt", e.valid_up_to())
            })?;
            lines(text, &tokens)
        })
        .with_context(|| format!("the merges do not go with {}", vocab.display()))?;
        Ok((Self::new(tokens, merges, Settings::default())?, vocab))
    }

    /// From the content of a `tokenizer.json`.
    pub fn from_json(bytes: &[u8]) -> Result<Vocabulary> {
        let mut json = match parse(bytes)? {
            Value::Object(json) if json.get("model").is_some_and(Value::is_object) => json,
            _ => bail!(
                "not a tokenizer.json of the tokenizers library: it has no `model`; to use a vocab.json and a \
                 merges.txt, name their folder"
            ),
        };
        if let Some(normalizer) = json.get("normalizer").filter(|n| !n.is_null()) {
            bail!(
                "`normalizer` is {}: it normalises text before splitting it; OPT's tokenizer does not",
                brief(normalizer)
            );
        }
        let pre_tokenizer = json.get("pre_tokenizer").unwrap_or(&Value::Null);
        let is = |key: &str, value: Value, default: bool| match pre_tokenizer.get(key) {
            Some(found) => *found == value,
            None => default,
        };
        if !(is("type", "ByteLevel".into(), false)
            && is("add_prefix_space", false.into(), false)
            && is("use_regex", true.into(), true))
        {
            bail!(
                "`pre_tokenizer` is {}; expected ByteLevel with GPT-2's pattern (use_regex) and no space added in front \
                 (add_prefix_space)",
                brief(pre_tokenizer)
            );
        }
        let added = json.remove("added_tokens").unwrap_or_default();
        let vocabulary = Self::from_model(json.remove("model").unwrap_or_default()).context("in `model`")?;
        for (i, token) in added.as_array().into_iter().flatten().enumerate() {
            let (id, content) = (&token["id"], &token["content"]);
            let known =
                id.as_u64().and_then(|id| vocabulary.tokens.get(usize::try_from(id).ok()?)?.as_deref());
            if known.is_none() || known != content.as_str() {
                bail!(
                    "`added_tokens[{i}]` is {} with id {}, which `model.vocab` does not have; OPT's vocabularies hold \
                     all their tokens: put it there, or take it out here",
                    brief(content),
                    brief(id)
                );
            }
        }
        Ok(vocabulary)
    }

    /// From the `model` of a `tokenizer.json`.
    pub fn from_model(mut model: Value) -> Result<Vocabulary> {
        let kind = model.get("type").unwrap_or(&Value::Null);
        if !kind.is_null() && kind != "BPE" {
            bail!("the type is {}, not BPE; OPT's tokenizer is a byte-level BPE", brief(kind));
        }
        let Value::Object(vocab) = model["vocab"].take() else {
            bail!("`vocab` is missing, or no object of tokens and ids");
        };
        let tokens = Tokens::new(vocab).context("in `vocab`")?;
        let Value::Array(merges) = model["merges"].take() else {
            bail!("`merges` is missing, or no list of pairs of tokens");
        };
        let merges =
            merges.iter().enumerate().filter(|(i, merge)| *i > 0 || !merge.as_str().is_some_and(header));
        let merges = merges.map(|(i, merge)| {
            let pair = match merge {
                Value::String(both) => both.split_once(' '),
                Value::Array(pair) => match pair.as_slice() {
                    [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                    _ => None,
                },
                _ => None,
            };
            let (left, right) = pair.with_context(|| {
                format!(
                    "`merges[{i}]` is {}; expected two tokens, as [\"a\", \"b\"] or \"a b\"",
                    brief(merge)
                )
            })?;
            tokens.merge(left, right).with_context(|| format!("`merges[{i}]` is wrong"))
        });
        let merges = merges.collect::<Result<_>>()?;
        let text = |key: &str| match &model[key] {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone())),
            other => Err(anyhow!("`{key}` is {}; expected a string or null", brief(other))),
        };
        let flag = |key: &str| match &model[key] {
            Value::Null => Ok(false),
            Value::Bool(flag) => Ok(*flag),
            other => Err(anyhow!("`{key}` is {}; expected true or false", brief(other))),
        };
        let settings = Settings {
            unk_token: text("unk_token")?,
            continuing_subword_prefix: text("continuing_subword_prefix")?,
            end_of_word_suffix: text("end_of_word_suffix")?,
            fuse_unk: flag("fuse_unk")?,
            byte_fallback: flag("byte_fallback")?,
            ignore_merges: flag("ignore_merges")?,
        };
        Self::new(tokens, merges, settings)
    }

    fn new(tokens: Tokens, merges: Vec<[u32; 3]>, settings: Settings) -> Result<Vocabulary> {
        for (key, value) in [
            ("continuing_subword_prefix", &settings.continuing_subword_prefix),
            ("end_of_word_suffix", &settings.end_of_word_suffix),
        ] {
            if let Some(value) = value.as_ref().filter(|v| !v.is_empty()) {
                bail!("`{key}` is {}; OPT's tokenizer has none", quoted(value));
            }
        }
        if settings.ignore_merges {
            bail!("`ignore_merges` is true: it looks words up before merging; OPT's tokenizer does not");
        }
        // A pair that is listed twice has its last rank, as in Hugging Face's tokenizers.
        let last: HashMap<[u32; 2], usize> =
            merges.iter().enumerate().map(|(rank, m)| ([m[0], m[1]], rank)).collect();
        let merges = merges.iter().enumerate().filter(|(rank, m)| last[&[m[0], m[1]]] == *rank);
        Ok(Vocabulary { merges: merges.map(|(_, m)| *m).collect(), tokens: tokens.by_id(), settings })
    }

    /// As the library writes it.
    pub fn model(&self) -> Model<'_> {
        let text = |id: u32| self.tokens[id as usize].as_deref().unwrap_or_default();
        let s = &self.settings;
        Model {
            kind: "BPE",
            dropout: None,
            unk_token: s.unk_token.as_deref(),
            continuing_subword_prefix: s.continuing_subword_prefix.as_deref(),
            end_of_word_suffix: s.end_of_word_suffix.as_deref(),
            fuse_unk: s.fuse_unk,
            byte_fallback: s.byte_fallback,
            ignore_merges: s.ignore_merges,
            vocab: &self.tokens,
            merges: self.merges.iter().map(|m| (text(m[0]), text(m[1]))).collect(),
        }
    }

    /// Content of a `tokenizer.json`, to the byte as the library writes it.
    pub fn to_json(&self) -> Result<String> {
        #[derive(Serialize)]
        struct Level {
            #[serde(rename = "type")]
            kind: &'static str,
            add_prefix_space: bool,
            trim_offsets: bool,
            use_regex: bool,
        }
        #[derive(Serialize)]
        struct Added {
            id: usize,
            content: &'static str,
            single_word: bool,
            lstrip: bool,
            rstrip: bool,
            normalized: bool,
            special: bool,
        }
        #[derive(Serialize)]
        struct File<'a> {
            version: &'static str,
            truncation: (),
            padding: (),
            added_tokens: Vec<Added>,
            normalizer: (),
            pre_tokenizer: Level,
            post_processor: (),
            decoder: Level,
            model: Model<'a>,
        }
        let level =
            || Level { kind: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true };
        let added = |(id, content): (usize, &&'static str)| Added {
            id,
            content,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: true,
        };
        serde_json::to_string_pretty(&File {
            version: "1.0",
            truncation: (),
            padding: (),
            // Readers elsewhere look for the special tokens here.
            added_tokens: SPECIALS.iter().enumerate().map(added).collect(),
            normalizer: (),
            pre_tokenizer: level(),
            post_processor: (),
            decoder: level(),
            model: self.model(),
        })
        .context("the tokenizer does not turn into JSON")
    }
}

/// Tokens and their ids, while merges are read.
struct Tokens {
    ids: HashMap<String, u32>,
    /// One more than the largest id.
    count: usize,
}

impl Tokens {
    fn new(vocab: Map<String, Value>) -> Result<Tokens> {
        let mut ids = HashMap::with_capacity(vocab.len());
        for (token, id) in vocab {
            let number = id.as_u64().and_then(|id| u32::try_from(id).ok()).with_context(|| {
                format!(
                    "the token {} has the id {}; expected a whole number from 0 on",
                    quoted(&token),
                    brief(&id)
                )
            })?;
            ids.insert(token, number);
        }
        let largest = ids.values().max().copied().context("there are no tokens")? as usize;
        // Tables by id are as long as the largest one says.
        if largest > 2 * ids.len() + 1024 {
            bail!("the largest id is {largest} but there are only {} tokens; ids count from 0", ids.len());
        }
        let mut seen: Vec<Option<&str>> = vec![None; largest + 1];
        for (token, &id) in &ids {
            if let Some(other) = seen[id as usize].replace(token) {
                let (a, b) = (other.min(token), other.max(token));
                bail!("the tokens {} and {} share the id {id}; give each its own", quoted(a), quoted(b));
            }
        }
        Ok(Tokens { ids, count: largest + 1 })
    }

    /// Ids of two tokens and of the one that they make.
    fn merge(&self, left: &str, right: &str) -> Result<[u32; 3]> {
        if left.is_empty() || right.is_empty() {
            bail!("expected two tokens, found {} and {}", quoted(left), quoted(right));
        }
        let id = |token: &str| {
            self.ids.get(token).copied().with_context(|| {
                format!(
                    "it merges {} and {}, but {} is not in the vocabulary; use files that belong together",
                    quoted(left),
                    quoted(right),
                    quoted(token)
                )
            })
        };
        Ok([id(left)?, id(right)?, id(&[left, right].concat())?])
    }

    fn by_id(self) -> Vec<Option<String>> {
        let mut tokens = vec![None; self.count];
        for (token, id) in self.ids {
            tokens[id as usize] = Some(token);
        }
        tokens
    }
}

/// The merges of a `merges.txt`: a line of version, which may be missing, then a pair of tokens a line.
fn lines(text: &str, tokens: &Tokens) -> Result<Vec<[u32; 3]>> {
    let lines = text.lines().enumerate().filter(|(i, line)| !line.is_empty() && (*i > 0 || !header(line)));
    let merge = |(i, line): (usize, &str)| {
        let (left, right) = line.split_once(' ').with_context(|| {
            format!("line {} is {}, not two tokens with a space between", i + 1, quoted(line))
        })?;
        tokens.merge(left, right).with_context(|| format!("line {} is wrong", i + 1))
    };
    lines.map(merge).collect()
}

fn header(line: &str) -> bool {
    line.starts_with("#version")
}

fn parse(bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes).context("not valid JSON; the file is damaged or of another kind")
}

fn from_file<T>(path: &Path, read: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
    let reading = || format!("cannot read {}", path.display());
    // To open a pipe would be to wait for whoever writes to it.
    ensure!(path.metadata().with_context(reading)?.is_file(), "{} is not a file", path.display());
    let bytes = fs::read(path).with_context(reading)?;
    read(&bytes).with_context(|| format!("{} cannot be used", path.display()))
}

/// A value of a file, cut short for a message.
fn brief(value: &Value) -> String {
    cut(value.to_string())
}

/// A text of a file, in quotes and cut short for a message.
pub(super) fn quoted(text: &str) -> String {
    cut(format!("{text:?}"))
}

fn cut(mut text: String) -> String {
    if text.len() > LONGEST_SHOWN {
        text.truncate(text.floor_char_boundary(LONGEST_SHOWN));
        text.push('…');
    }
    text
}

/// The one file of a folder whose name ends so.
fn the_one(folder: &Path, ending: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().ends_with(ending) {
            found.push(entry.path());
        }
    }
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => bail!("the folder holds neither tokenizer.json nor a file ending in {ending}"),
        [a, b, ..] => bail!("two files end in {ending}: {} and {}; keep one", a.display(), b.display()),
    }
}
