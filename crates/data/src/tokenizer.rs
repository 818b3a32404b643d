//! OPT's tokenizer: GPT-2's byte-level BPE with its own order of ids.
//!
//! Merging and training are done by the `tokenizers` crate. Text is split into words here, and each word is merged once
//! per text, which makes encoding many times faster; decoding is a table of bytes, so that what a token stands for is
//! exact to the byte. Special tokens are never made from text: `</s>` in a document is five ordinary characters.

mod train;
mod words;

use crate::{EOS, SPECIALS};
use anyhow::{Context, Result, anyhow, bail};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Model, ModelWrapper, PreTokenizerWrapper};
use words::Words;

/// Byte-level BPE with OPT's four special ids first.
pub struct Tokenizer {
    bpe: BPE,
    words: Words,
    /// How each byte is written in the vocabulary.
    letters: [char; 256],
    /// Bytes of all tokens, one after the other; the special ones have none.
    bytes: Vec<u8>,
    /// Where each token's bytes start, and the end of the last one.
    starts: Vec<usize>,
    fingerprint: [u8; 32],
}

impl Tokenizer {
    /// Loads a `tokenizer.json`, or a folder that holds one, or a folder that holds GPT-2's pair of files (any names
    /// that end in `vocab.json` and `merges.txt`).
    ///
    /// # Errors
    /// Names the path and what is missing or differs from OPT's byte-level BPE.
    pub fn load(path: &Path) -> Result<Tokenizer> {
        Self::load_any(path).with_context(|| format!("cannot load the tokenizer at {}", path.display()))
    }

    fn load_any(path: &Path) -> Result<Tokenizer> {
        let meta = fs::metadata(path)
            .context("expected a tokenizer.json, or a folder with one or with vocab.json and merges.txt")?;
        if !meta.is_dir() {
            return Self::from_json(&fs::read(path)?);
        }
        let json = path.join("tokenizer.json");
        if json.exists() {
            return Self::from_json(&fs::read(&json)?);
        }
        let (vocab, merges) = (the_one(path, "vocab.json")?, the_one(path, "merges.txt")?);
        let text = |p: &Path| p.to_str().map(String::from).context("the path is not Unicode");
        let bpe = BPE::from_file(&text(&vocab)?, &text(&merges)?)
            .build()
            .map_err(|e| anyhow!(e))
            .with_context(|| format!("{} and {} do not make a BPE", vocab.display(), merges.display()))?;
        Self::from_bpe(bpe)
    }

    /// A tokenizer from the content of a `tokenizer.json`.
    fn from_json(json: &[u8]) -> Result<Tokenizer> {
        let theirs = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| anyhow!(e))
            .context("not a tokenizer.json of the tokenizers library")?;
        let ModelWrapper::BPE(bpe) = theirs.get_model() else {
            bail!("the model in it is not BPE; OPT's tokenizer is a byte-level BPE");
        };
        if theirs.get_normalizer().is_some() {
            bail!("it normalises text before splitting it; OPT's tokenizer does not");
        }
        match theirs.get_pre_tokenizer() {
            Some(PreTokenizerWrapper::ByteLevel(b)) if !b.add_prefix_space && b.use_regex => {}
            other => bail!(
                "its pre-tokenizer is {other:?}; expected ByteLevel with GPT-2's pattern and no space added in front"
            ),
        }
        let vocab = theirs.get_vocab(false);
        for (id, token) in theirs.get_added_tokens_decoder() {
            if vocab.get(&token.content) != Some(&id) {
                bail!("its added token {:?} (id {id}) is not in the BPE's vocabulary", token.content);
            }
        }
        Self::from_bpe(bpe.clone())
    }

    fn from_bpe(mut bpe: BPE) -> Result<Tokenizer> {
        // Some files carry options of other tokenizers; those would make encoding random or lossy.
        bpe.dropout = None;
        let vocab = bpe.get_vocab();
        for (id, text) in SPECIALS.iter().enumerate() {
            match vocab.get(*text) {
                Some(&found) if found as usize == id => {}
                Some(found) => bail!("the token {text} has id {found}; OPT's tokenizers have it at {id}"),
                None => bail!("there is no token {text}; OPT's tokenizers have it at id {id}"),
            }
        }
        let letters = byte_letters();
        let (bytes, starts) = byte_table(&vocab, &letters)?;
        let fingerprint = Sha256::digest(serde_json::to_vec(&bpe)?).into();
        Ok(Tokenizer { bpe, words: Words::new()?, letters, bytes, starts, fingerprint })
    }

    /// Content of a `tokenizer.json`, which the `tokenizers` and `transformers` libraries read too.
    ///
    /// # Errors
    /// When the library cannot write it.
    pub fn to_json(&self) -> Result<String> {
        let mut inner = tokenizers::Tokenizer::new(self.bpe.clone());
        let level = ByteLevel::new(false, true, true);
        inner.with_pre_tokenizer(Some(level)).with_decoder(Some(level));
        // Readers elsewhere look for the special tokens here.
        inner
            .add_special_tokens(SPECIALS.map(|s| AddedToken::from(s, true)))
            .and_then(|_| inner.to_string(true))
            .map_err(|e| anyhow!(e))
            .context("the tokenizer does not turn into JSON")
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
        self.starts.len() - 1
    }

    /// SHA-256 of vocabulary and merges.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// Ids of a text, with nothing added in front or behind.
    ///
    /// # Errors
    /// When the library fails, which no text is known to make it do.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids: Vec<u32> = Vec::with_capacity(text.len() / 4);
        // Where the ids of each word that was met already lie.
        let mut met: HashMap<&str, Range<usize>> = HashMap::new();
        let mut letters = String::new();
        for word in self.words.split(text) {
            if let Some(at) = met.get(word) {
                ids.extend_from_within(at.clone());
                continue;
            }
            letters.clear();
            letters.extend(word.bytes().map(|b| self.letters[b as usize]));
            let tokens = self.bpe.tokenize(&letters).map_err(|e| anyhow!(e)).context("cannot tokenise")?;
            let start = ids.len();
            ids.extend(tokens.iter().map(|t| t.id));
            met.insert(word, start..ids.len());
        }
        Ok(ids)
    }

    /// Ids that OPT continues: `</s>`, then the text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        ids.insert(0, EOS);
        Ok(ids)
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
        StreamDecoder { tokenizer: self, pending: Vec::new() }
    }

    /// Bytes of text that a token stands for; none for the special tokens and for ids beyond the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..).unwrap_or_default() {
            [start, end, ..] => &self.bytes[*start..*end],
            _ => &[],
        }
    }

    /// Number of bytes of text that a token stands for. Their sum over the tokens of a text is the text's length.
    pub fn byte_len(&self, id: u32) -> usize {
        self.token_bytes(id).len()
    }
}

/// Turns ids into text one at a time, and gives out only whole characters.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes of a character that is not complete.
    pending: Vec<u8>,
}

impl StreamDecoder<'_> {
    /// Adds a token; returns the text that is certain now. Bytes that cannot be UTF-8 become U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        self.pending.extend(self.tokenizer.token_bytes(id));
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(rest) => {
                    text += rest;
                    self.pending.clear();
                    return text;
                }
                Err(e) => {
                    let valid = e.valid_up_to();
                    text += std::str::from_utf8(&self.pending[..valid]).unwrap_or_default();
                    let Some(wrong) = e.error_len() else {
                        self.pending.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid + wrong);
                }
            }
        }
    }

    /// What is left when no more tokens come: U+FFFD for a character that was begun, or nothing.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
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

/// The bytes of every token and where they start, by id. Fails unless every single byte has a token.
fn byte_table(vocab: &HashMap<String, u32>, letters: &[char; 256]) -> Result<(Vec<u8>, Vec<usize>)> {
    let byte_of: HashMap<char, u8> = letters.iter().copied().zip(0..=255).collect();
    let mut tokens: Vec<(u32, &str)> = vocab.iter().map(|(token, &id)| (id, token.as_str())).collect();
    tokens.sort_unstable();
    let (mut bytes, mut starts) = (Vec::new(), Vec::new());
    let mut single = [false; 256];
    for pair in tokens.windows(2) {
        if pair[0].0 == pair[1].0 {
            bail!("the tokens {:?} and {:?} share the id {}", pair[0].1, pair[1].1, pair[0].0);
        }
    }
    let count = tokens.last().map_or(0, |t| t.0 as usize + 1);
    // Guards the table below against a stray huge id.
    if count > 2 * tokens.len() + 1024 {
        bail!("the largest id is {} but there are only {} tokens", count - 1, tokens.len());
    }
    for (id, token) in tokens {
        starts.resize(id as usize + 1, bytes.len());
        if (id as usize) < SPECIALS.len() {
            continue;
        }
        let before = bytes.len();
        for c in token.chars() {
            bytes.push(*byte_of.get(&c).with_context(|| {
                format!("the token {token:?} (id {id}) has the character {c:?}, which stands for no byte: not a byte-level BPE")
            })?);
        }
        if let [byte] = bytes[before..] {
            single[byte as usize] = true;
        }
    }
    starts.resize(count + 1, bytes.len());
    if let Some(byte) = single.iter().position(|s| !s) {
        bail!("there is no token for the byte {byte:#04x}, so some text could not be encoded");
    }
    Ok((bytes, starts))
}

/// GPT-2's way of writing bytes as visible characters: printable Latin-1 as itself, the rest from U+0100 on.
fn byte_letters() -> [char; 256] {
    let mut spare = 'Ā'..;
    std::array::from_fn(|byte| match byte as u8 {
        visible @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => visible.into(),
        _ => spare.next().unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PAD, UNK};

    /// OPT's tokenizer from the shared data, if that is there.
    fn opt() -> Option<Tokenizer> {
        crate::testing::shared("data/tokenizer").map(|path| Tokenizer::load(&path).unwrap())
    }

    fn small() -> Tokenizer {
        let text = "the cat sat on the mat; the cat sat. naïve café 狐狐狐 <s></s> ".repeat(20);
        Tokenizer::train([Ok(text)], 300).unwrap()
    }

    #[test]
    fn opt_ids_are_those_of_the_reference() {
        let Some(t) = opt() else { return };
        assert_eq!(t.vocab_size(), 50265);
        // Hugging Face's test of OPT's tokenizer, less its leading 2.
        assert_eq!(t.encode("A photo of a cat").unwrap(), [250, 1345, 9, 10, 4758]);
        assert_eq!(t.encode_prompt("A photo of a cat").unwrap(), [2, 250, 1345, 9, 10, 4758]);
        // metaseq's recorded ids and text offsets.
        let text = "The man turned on the faucet so the toilet filled with water.";
        let ids = t.encode(text).unwrap();
        assert_eq!(ids, [133, 313, 1224, 15, 5, 856, 17527, 594, 98, 5, 11471, 3820, 19, 514, 4]);
        let offsets: Vec<usize> =
            (0..ids.len()).map(|i| ids[..i].iter().map(|&id| t.byte_len(id)).sum()).collect();
        assert_eq!(offsets, [0, 3, 7, 14, 17, 21, 23, 26, 28, 31, 35, 42, 49, 54, 60]);
        assert_eq!(t.decode(&ids), text);
    }

    #[test]
    fn any_text_comes_back() {
        let small = small();
        let opt = opt();
        for text in [
            "",
            " ",
            "\n\n\t x",
            "naïve café",
            "狐🦊\u{0}\u{7f}\u{ad}\u{a0}",
            "don't  I'LL 123abc\r\n",
            "<s> </s><pad>",
        ] {
            for t in [Some(&small), opt.as_ref()].into_iter().flatten() {
                let ids = t.encode(text).unwrap();
                assert_eq!(t.decode(&ids), text);
                assert_eq!(ids.iter().map(|&id| t.byte_len(id)).sum::<usize>(), text.len());
                assert!(ids.iter().all(|&id| id > UNK), "{text:?} gave a special token: {ids:?}");
            }
        }
    }

    #[test]
    fn encoding_agrees_with_the_library() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let text: String =
            include_str!("tokenizer.rs").chars().chain((0..3000).filter_map(char::from_u32)).collect();
        for t in [Some(small()), opt()].into_iter().flatten() {
            t.save(&path).unwrap();
            let library = tokenizers::Tokenizer::from_file(&path).unwrap();
            // The library finds special tokens in text; ours never does.
            let text = text.replace("<s>", "").replace("</s>", "").replace("<pad>", "").replace("<unk>", "");
            assert!(t.encode(&text).unwrap() == library.encode(text, false).unwrap().get_ids());
        }
    }

    #[test]
    fn specials_and_unknown_ids_have_no_text() {
        let t = small();
        let a = t.encode("cat").unwrap();
        let ids = [&[EOS, PAD][..], &a, &[t.vocab_size() as u32, u32::MAX]].concat();
        assert_eq!(t.decode(&ids), "cat");
    }

    #[test]
    fn streams_give_whole_characters_only() {
        let t = small();
        let text = "a🦊b狐é";
        let ids: Vec<u32> = text.bytes().flat_map(|b| byte_id(&t, b)).collect();
        let mut stream = t.stream();
        let steps: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
        assert_eq!(steps, ["a", "", "", "", "🦊", "b", "", "", "狐", "", "é"]);
        assert_eq!(stream.finish(), "");
        // A lone continuation byte, a character that is broken off by another, and one that never ends.
        let mut stream = t.stream();
        let mut out = String::new();
        for byte in [0x80, b'x', 0xE7, b'y', 0xF0, 0x9F] {
            out += &stream.push(byte_id(&t, byte).unwrap());
        }
        assert_eq!(out, "\u{fffd}x\u{fffd}y");
        assert_eq!(stream.finish(), "\u{fffd}");
    }

    fn byte_id(t: &Tokenizer, byte: u8) -> Option<u32> {
        (0..t.vocab_size() as u32).find(|&id| t.token_bytes(id) == [byte])
    }

    #[test]
    fn saved_tokenizers_come_back_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let t = small();
        t.save(&dir.path().join("tokenizer.json")).unwrap();
        for path in [dir.path().to_owned(), dir.path().join("tokenizer.json")] {
            let again = Tokenizer::load(&path).unwrap();
            assert_eq!(again.fingerprint(), t.fingerprint());
            assert_eq!(again.encode("the cat </s>").unwrap(), t.encode("the cat </s>").unwrap());
        }
    }

    #[test]
    fn foreign_tokenizers_are_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        small().save(&path).unwrap();
        let good: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let refuse = |expected: &str, change: &dyn Fn(&mut serde_json::Value)| {
            let mut json = good.clone();
            change(&mut json);
            fs::write(&path, json.to_string()).unwrap();
            let Err(e) = Tokenizer::load(&path) else { panic!("taken although {expected}") };
            let e = format!("{e:#}");
            assert!(e.contains(expected) && e.contains("tokenizer.json"), "{expected}: {e}");
        };
        refuse("no space added", &|j| j["pre_tokenizer"]["add_prefix_space"] = true.into());
        refuse("normalises", &|j| j["normalizer"] = serde_json::json!({"type": "Lowercase"}));
        refuse("not a tokenizer.json", &|j| *j = 5.into());
        refuse("id 2", &|j| {
            j["added_tokens"] = serde_json::json!([]);
            let vocab = j["model"]["vocab"].as_object_mut().unwrap();
            vocab.insert("<s>".into(), 2.into());
            vocab.insert("</s>".into(), 0.into());
        });
        let e = format!("{:#}", Tokenizer::load(&dir.path().join("none")).err().unwrap());
        assert!(e.contains("vocab.json and merges.txt"), "{e}");
        fs::remove_file(&path).unwrap();
        let e = format!("{:#}", Tokenizer::load(dir.path()).err().unwrap());
        assert!(e.contains("neither tokenizer.json"), "{e}");
    }
}
