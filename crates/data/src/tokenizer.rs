//! OPT's tokenizer: GPT-2's byte-level BPE with its own order of ids.
//!
//! Text is split into words by GPT-2's pattern ([`words`]), and the bytes of each word are merged by rank ([`merges`]),
//! once for each thread that meets the word ([`cache`]). Decoding is a table of bytes ([`bytes`]), so that what a token
//! stands for is exact to the byte. The `tokenizers` crate trains vocabularies ([`train`]) and judges the rest in tests.

mod added;
mod bytes;
mod cache;
mod classes;
mod files;
mod merges;
mod stream;
mod train;
mod words;

use crate::{EOS, PAD, SPECIALS};
use added::{Added, Finder, Part};
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use cache::{Cache, Key};
use files::Vocabulary;
use merges::{Merges, Scratch};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
pub use stream::StreamDecoder;
use words::Words;

/// Least text that is worth a thread of its own, bytes.
const SHARE: usize = 1 << 17;

/// Special tokens that [`Marks::in_text`] reads beside those that a file adds: the ones that Hugging Face's OPT tokenizer
/// knows as special.
const READ: [u32; 2] = [EOS, PAD];

/// Byte-level BPE with OPT's four special ids first.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    words: Words,
    merges: Merges,
    bytes: Bytes,
    finder: Finder,
    fingerprint: [u8; 32],
    /// Tells this tokenizer's words from those of others in a thread's cache.
    number: u64,
}

/// Special tokens around a text and in it. By default there are none: that is training text.
///
/// OPT was trained on documents end to end, each closed by `</s>`, so a text that it shall continue begins behind one.
/// Hugging Face's tokenizer of OPT also takes `</s>` and `<pad>` in a text for these tokens, and what a fine-tuned model's
/// files add, which lets whoever writes the text end it; metaseq's does not, and neither does this one unless it is asked to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Puts `</s>` in front, as for every prompt.
    pub in_front: bool,
    /// Takes `</s>`, `<pad>` and the tokens that the tokenizer's files add for these tokens where they are in the text, not
    /// for characters.
    pub in_text: bool,
}

impl Marks {
    /// What Hugging Face's tokenizer of OPT does.
    pub const HUGGING_FACE: Marks = Marks { in_front: true, in_text: true };
}

/// What a thread needs to encode.
struct Workspace {
    cache: Cache,
    scratch: Scratch,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::new(Workspace { cache: Cache::new(), scratch: Scratch::default() });
}

impl Tokenizer {
    /// Loads a `tokenizer.json`, or a folder that holds one, or a folder that holds GPT-2's pair of files (any names
    /// that end in `vocab.json` and `merges.txt`).
    ///
    /// Tokens that are added to the vocabulary are those of the `tokenizer.json`, and beside it or the pair those of
    /// `tokenizer_config.json`, or else of `added_tokens.json` beside a pair.
    ///
    /// What a `tokenizer.json` says about tokens in front of a text (its post-processor) and about its length is not used,
    /// nor what files say about OPT's four special tokens: [`Marks`] says it for all files alike.
    ///
    /// # Errors
    /// Names the file, the entry in it, and what is missing or differs from OPT's byte-level BPE.
    pub fn load(path: &Path) -> Result<Tokenizer> {
        let load = || {
            let (vocabulary, file) = Vocabulary::load(path)?;
            Self::new(vocabulary).with_context(|| format!("{} cannot be used", file.display()))
        };
        load().with_context(|| format!("cannot load the tokenizer at {}", path.display()))
    }

    fn new(vocabulary: Vocabulary) -> Result<Tokenizer> {
        for (id, text) in SPECIALS.iter().enumerate() {
            let known = |token: &Option<String>| token.as_deref() == Some(text);
            match vocabulary.tokens.iter().position(known) {
                Some(found) if found == id => {}
                Some(found) => bail!("the token {text} has id {found}; OPT's tokenizers have it at {id}"),
                None => bail!(
                    "there is no token {text}; OPT's tokenizers have it at id {id}. (GPT-2's own files number the same \
                     tokens in another order, which OPT's models do not know; take OPT's files)"
                ),
            }
        }
        let bytes = Bytes::new(&vocabulary)?;
        let merges = Merges::new(&vocabulary.merges);
        let finder = Finder::new(vocabulary.added.iter().cloned().chain(READ.map(Added::own)))?;
        let mut fingerprint = Sha256::new_with_prefix(serde_json::to_vec(&vocabulary.model())?);
        if !vocabulary.added.is_empty() {
            fingerprint.update(serde_json::to_vec(&vocabulary.added)?);
        }
        let fingerprint = fingerprint.finalize().into();
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Ok(Tokenizer { vocabulary, words: Words::new()?, merges, bytes, finder, fingerprint, number })
    }

    /// Content of a `tokenizer.json`, which the `tokenizers` and `transformers` libraries read too.
    ///
    /// # Errors
    /// When it cannot be written, which no tokenizer is known to make happen.
    pub fn to_json(&self) -> Result<String> {
        self.vocabulary.to_json()
    }

    /// Writes [`Tokenizer::to_json`] to a file.
    ///
    /// # Errors
    /// When the file cannot be written. An older file is then left as it was.
    pub fn save(&self, path: &Path) -> Result<()> {
        let json = self.to_json()?;
        let write = || -> std::io::Result<()> {
            let beside = path.with_extension("json.part");
            fs::write(&beside, json)?;
            fs::File::open(&beside)?.sync_all()?;
            fs::rename(&beside, path)
        };
        write().with_context(|| format!("cannot write the tokenizer to {}", path.display()))
    }

    /// V, one more than the largest id. A model's table may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.bytes.count()
    }

    /// SHA-256 of vocabulary and merges, and of the tokens that are added to them.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// Ids of a text, with nothing added in front or behind, and without special tokens: `</s>` in a text is four
    /// ordinary characters. Large texts are encoded by all of rayon's threads.
    ///
    /// # Errors
    /// When a word, which is text without any place to cut, is longer than 4 GiB.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut shares = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let share;
            (share, rest) = rest.split_at(words::seam(rest, SHARE));
            shares.push(share);
        }
        match shares.as_slice() {
            [] => Ok(Vec::new()),
            [all] => self.encode_here(all),
            _ => {
                let ids = shares.par_iter().map(|share| self.encode_here(share));
                Ok(ids.collect::<Result<Vec<_>>>()?.concat())
            }
        }
    }

    /// Ids that OPT continues: `</s>`, then the text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_as(text, Marks { in_front: true, in_text: false })
    }

    /// Ids of a text with special tokens in front or read in it, as wanted.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_as(&self, text: &str, marks: Marks) -> Result<Vec<u32>> {
        let mut ids = if marks.in_front { vec![EOS] } else { Vec::new() };
        if !marks.in_text {
            ids.extend(self.encode(text)?);
            return Ok(ids);
        }
        for part in self.finder.parts(text) {
            match part {
                Part::Text(range) => ids.extend(self.encode(&text[range])?),
                Part::Token(id) => ids.push(id),
            }
        }
        Ok(ids)
    }

    /// Ids of a text, by this thread alone.
    fn encode_here(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        WORKSPACE.with_borrow_mut(|Workspace { cache, scratch }| {
            let bytes = text.as_bytes();
            let mut start = 0;
            while start < bytes.len() {
                let end = self.words.end(text, start);
                let key = Key::new(self.number, bytes, start, end);
                if !key.is_some_and(|key| cache.get(&key, &mut ids)) {
                    let word = &bytes[start..end];
                    if u32::try_from(word.len()).is_err() {
                        bail!(
                            "at byte {start} begins a word of {} bytes, which is too long; words end at spaces",
                            word.len()
                        );
                    }
                    let before = ids.len();
                    let tokens = word.iter().map(|&byte| self.bytes.ids[byte as usize]);
                    self.merges.apply(tokens, scratch, &mut ids);
                    if let Some(key) = key {
                        cache.put(&key, &ids[before..]);
                    }
                }
                start = end;
            }
            Ok(ids)
        })
    }

    /// Text of ids. Special tokens have none, ids beyond the vocabulary neither; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.stream();
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text += &stream.finish();
        text
    }

    /// A decoder for text that is shown as it is made.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self)
    }

    /// The first token in a text that a file added to the vocabulary, as [`Marks::in_text`] finds it, by its content.
    pub fn added_in(&self, text: &str) -> Option<&str> {
        self.finder.parts(text).into_iter().find_map(|part| match part {
            Part::Token(id) => self.vocabulary.added_as(id).map(|added| added.content.as_str()),
            Part::Text(_) => None,
        })
    }

    /// Whether no id means something else in another tokenizer, whatever file it comes from. Either may lack tokens that the other
    /// one's files add.
    pub fn agrees_with(&self, other: &Tokenizer) -> bool {
        let (own, others) = (&self.vocabulary, &other.vocabulary);
        let same =
            |token: &Added| others.added_as(token.id).is_none_or(|known| known.content == token.content);
        own.tokens == others.tokens && own.merges == others.merges && own.added.iter().all(same)
    }

    /// Name of a special token, which has no text; nothing for other ids.
    pub fn special(&self, id: u32) -> Option<&str> {
        let own = SPECIALS.get(id as usize).copied();
        let added = || self.vocabulary.added_as(id).map(|added| added.content.as_str());
        own.or_else(added).filter(|_| self.token_bytes(id).is_empty())
    }

    /// Bytes of text that a token stands for; none for the special tokens and for ids beyond the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.of(id)
    }

    /// Number of bytes of text that a token stands for. Their sum over the tokens of a text is the text's length.
    pub fn byte_len(&self, id: u32) -> usize {
        self.token_bytes(id).len()
    }
}

#[cfg(test)]
mod tests;
