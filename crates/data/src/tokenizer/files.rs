//! A vocabulary and its merges in files: `vocab.json` with `merges.txt`, or the library's `tokenizer.json`.

use super::added::{self, Added};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Longest value that a message shows, bytes.
const LONGEST_SHOWN: usize = 200;

/// Longest added token, bytes. It bounds what its search takes.
const LONGEST_ADDED: usize = 4096;

/// Files beside a vocabulary that tell of more tokens.
const CONFIG: &str = "tokenizer_config.json";
const ADDED: &str = "added_tokens.json";
const SPECIAL: &str = "special_tokens_map.json";

/// What the files say, checked.
pub(super) struct Vocabulary {
    /// Each token as it is written in the files, by id; ids may be left out.
    pub tokens: Vec<Option<String>>,
    /// Left token, right token, and what they make, the first of lowest rank.
    pub merges: Vec<[u32; 3]>,
    /// Tokens that text is searched for, by id, which may be in the vocabulary or not; without the four of OPT.
    pub added: Vec<Added>,
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
        let json = if meta.is_dir() { in_folder(path) } else { path.to_owned() };
        if json.exists() {
            let mut vocabulary = from_file(&json, Self::from_json)?;
            let config = json.with_file_name(CONFIG);
            let more = if_there(&config, added::from_config)?.flatten().unwrap_or_default();
            let more = more.into_iter().filter(|token| !vocabulary.lists(token)).collect();
            vocabulary.add(more).with_context(|| unusable(&config))?;
            return Ok((vocabulary, json));
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
        let mut vocabulary = Self::new(tokens, merges, Settings::default())?;
        let (added, from) = added_beside(path)?;
        vocabulary.add(added).with_context(|| unusable(&from))?;
        Ok((vocabulary, vocab))
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
        let added = added::from_list(&json.remove("added_tokens").unwrap_or_default())?;
        let mut vocabulary =
            Self::from_model(json.remove("model").unwrap_or_default()).context("in `model`")?;
        vocabulary.add(added).context("in `added_tokens`")?;
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
        let merges = merges.map(|(_, m)| *m).collect();
        Ok(Vocabulary { merges, tokens: tokens.by_id(), added: Vec::new(), settings })
    }

    /// The token that was added with this id.
    pub fn added_as(&self, id: u32) -> Option<&Added> {
        let at = self.added.binary_search_by_key(&id, |added| added.id).ok()?;
        self.added.get(at)
    }

    /// Whether a token was added already, or is one of OPT's own.
    fn lists(&self, token: &Added) -> bool {
        token.is_own() || self.added_as(token.id).is_some_and(|listed| listed.content == token.content)
    }

    /// Adds tokens. One that the vocabulary has must have its id, and any other an id that is free.
    fn add(&mut self, mut added: Vec<Added>) -> Result<()> {
        added.retain(|token| !token.content.is_empty() && !token.is_own());
        if added.is_empty() {
            return Ok(());
        }
        added.append(&mut self.added);
        added.sort_by(|a, b| (a.id, &a.content).cmp(&(b.id, &b.content)));
        let tokens = self.tokens.iter().zip(0..);
        let known: HashMap<&str, u32> =
            tokens.filter_map(|(token, id)| Some((token.as_deref()?, id))).collect();
        let largest = 2 * (known.len() + added.len()) + 1024;
        let mut seen = HashSet::new();
        for (i, Added { id, content, .. }) in added.iter().enumerate() {
            let name = quoted(content);
            if content.len() > LONGEST_ADDED {
                bail!("the added token {name} has {} bytes; {LONGEST_ADDED} are allowed", content.len());
            }
            if let Some(other) = i.checked_sub(1).and_then(|i| added.get(i)).filter(|other| other.id == *id) {
                bail!(
                    "the added tokens {} and {name} share the id {id}; give each its own",
                    quoted(&other.content)
                );
            }
            if !seen.insert(content) {
                bail!("the added token {name} is there twice; take out one of the two");
            }
            match known.get(content.as_str()) {
                Some(known) if known == id => continue,
                Some(known) => {
                    bail!("the added token {name} has the id {id}, but in the vocabulary it has {known}")
                }
                None => {}
            }
            if let Some(other) = self.tokens.get(*id as usize).and_then(Option::as_deref) {
                bail!(
                    "the added token {name} has the id {id}, which is that of {}; ids must differ",
                    quoted(other)
                );
            }
            if *id as usize > largest {
                bail!(
                    "the added token {name} has the id {id}, but there are only {} tokens; ids count from 0",
                    known.len() + added.len()
                );
            }
        }
        self.added = added;
        Ok(())
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
        struct File<'a> {
            version: &'static str,
            truncation: (),
            padding: (),
            added_tokens: Vec<&'a Added>,
            normalizer: (),
            pre_tokenizer: Level,
            post_processor: (),
            decoder: Level,
            model: Model<'a>,
        }
        let level =
            || Level { kind: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true };
        let own = [0, 1, 2, 3].map(Added::own);
        serde_json::to_string_pretty(&File {
            version: "1.0",
            truncation: (),
            padding: (),
            // Readers elsewhere look for the special tokens here.
            added_tokens: own.iter().chain(&self.added).collect(),
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
    read(&bytes).with_context(|| unusable(path))
}

fn unusable(path: &Path) -> String {
    format!("{} cannot be used", path.display())
}

/// What a JSON file says, if there is one.
fn if_there<T>(path: &Path, read: impl FnOnce(&Value) -> Result<T>) -> Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    from_file(path, |bytes| read(&parse(bytes)?)).map(Some)
}

/// What metaseq calls a `tokenizer.json`.
const UNIFIED: &str = "gpt2-unified.json";

/// The `tokenizer.json` of a folder, which in metaseq's folders is called [`UNIFIED`]. There the pair, where it is, goes first, as
/// for metaseq.
fn in_folder(folder: &Path) -> PathBuf {
    let [plain, unified] = ["tokenizer.json", UNIFIED].map(|name| folder.join(name));
    let alone = || the_one(folder, "vocab.json").is_err();
    if !plain.exists() && unified.is_file() && alone() { unified } else { plain }
}

/// What the files in a folder add to a pair of files there, and which of them does.
fn added_beside(folder: &Path) -> Result<(Vec<Added>, PathBuf)> {
    let [config, ids, roles] = [CONFIG, ADDED, SPECIAL].map(|name| folder.join(name));
    if let Some(added) = if_there(&config, added::from_config)?.flatten() {
        return Ok((added, config));
    }
    let special = |file: &Value| Ok(added::special_in(file).collect::<HashSet<String>>());
    let added = if_there(&ids, |file| {
        let roles = [if_there(&config, special)?, if_there(&roles, special)?];
        added::from_ids(file, &roles.into_iter().flatten().flatten().collect())
    })?;
    Ok((added.unwrap_or_default(), ids))
}

/// A value of a file, cut short for a message.
pub(super) fn brief(value: &Value) -> String {
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
