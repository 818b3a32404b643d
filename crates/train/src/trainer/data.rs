//! What a run reads: its tokenizer, its training data and its held-out sets.

use crate::config::Resolved;
use crate::models;
use crate::signals::Stop;
use anyhow::{Context, Result, ensure};
use ferropt_data::{Corpus, Loader, TokenFile, Tokenizer, on_threads, tokenise_unless};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Opened data of a run.
pub(super) struct Data {
    /// Content of a `tokenizer.json`, for checkpoints.
    pub(super) tokenizer_json: Vec<u8>,
    pub(super) tokenizer: Tokenizer,
    pub(super) train: Loader,
    /// Held-out sets in the order of their names.
    pub(super) validation: Vec<HeldOut>,
    /// What identifies the training data: content, not where it lies.
    pub(super) identity: Identity,
    /// What people should know of how it was found.
    pub(super) notes: Vec<String>,
}

/// A held-out set.
pub(super) struct HeldOut {
    pub(super) name: String,
    pub(super) loader: Loader,
    /// CRC-32C of its tokens.
    pub(super) checksum: u32,
}

/// What must not change between two parts of a run, or its order of samples would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// SHA-256 of the tokenizer's vocabulary and merges, hexadecimal.
    tokenizer: String,
    tokens: u64,
    documents: u64,
    text_bytes: u64,
    /// CRC-32C of the tokens; absent in checkpoints of programs that made none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checksum: Option<u32>,
}

impl Data {
    /// Opens everything, tokenising what was not yet; `None` if `stop` was requested meanwhile.
    ///
    /// # Errors
    /// Names the key of the configuration, the file, and what is wrong with it.
    pub(super) fn open(resolved: &Resolved, stop: &Stop) -> Result<Option<Data>> {
        on_threads(resolved.config.run.threads, || Data::open_here(resolved, stop))?
    }

    fn open_here(resolved: &Resolved, stop: &Stop) -> Result<Option<Data>> {
        let data = &resolved.config.data;
        let path = data.tokenizer.as_deref().unwrap_or(Path::new(""));
        let tokenizer = models::tokenizer(path)
            .with_context(|| format!("data.tokenizer = \"{}\" cannot be used", path.display()))?;
        ensure!(
            tokenizer.vocab_size() <= resolved.model.vocab,
            "model.vocab = {} is too small for the tokenizer {}, which has {} tokens; set model.vocab to {} or more",
            resolved.model.vocab,
            path.display(),
            tokenizer.vocab_size(),
            tokenizer.vocab_size()
        );
        let cache = data.cache.as_deref().unwrap_or(Path::new("data-cache"));
        let mut notes = Vec::new();
        let mut file = |paths: &[PathBuf], name: &str| -> Result<Option<TokenFile>> {
            let corpus = Corpus::find_for(&resolved.config.run.dir, paths, &data.text_field)?;
            let left_out = |folder: &PathBuf| {
                format!("left out {}, the folder of a run, which is no text", folder.display())
            };
            notes.extend(corpus.left_out().iter().map(left_out));
            let file = tokenise_unless(&|| stop.requested(), &corpus, &tokenizer, cache, name)?;
            let replaced = file.iter().filter_map(TokenFile::replaces);
            notes.extend(replaced.map(|damage| format!("made a token file anew: {damage}")));
            Ok(file)
        };
        let (seq, seed) = (resolved.seq, resolved.config.run.seed);
        let wrong = "data.train cannot be used";
        let Some(train) = file(&data.train.0, "train").context(wrong)? else { return Ok(None) };
        let checksum = Some(train.checksum());
        let train = Loader::shuffled(vec![train], &tokenizer, seq, seed).context(wrong)?;
        let mut validation = Vec::new();
        for (name, paths) in &data.validation {
            let wrong = || format!("data.validation.{name} cannot be used");
            let Some(held_out) = file(&paths.0, name).with_context(wrong)? else { return Ok(None) };
            let most = resolved.config.validation.max_tokens.map_or(u64::MAX, |most| most.0);
            let checksum = held_out.checksum();
            let loader = Loader::sequential(vec![held_out], &tokenizer, seq, most).with_context(wrong)?;
            validation.push(HeldOut { name: name.clone(), loader, checksum });
        }
        let identity = Identity {
            tokenizer: tokenizer.fingerprint().iter().map(|b| format!("{b:02x}")).collect(),
            tokens: train.tokens(),
            documents: train.documents(),
            text_bytes: train.text_bytes(),
            checksum,
        };
        let tokenizer_json = tokenizer.to_json()?.into_bytes();
        Ok(Some(Data { tokenizer_json, tokenizer, train, validation, identity, notes }))
    }
}

impl Identity {
    /// Refuses to go on with other data than a run began with.
    pub(super) fn check(&self, now: &Identity) -> Result<()> {
        ensure!(
            self.tokenizer == now.tokenizer,
            "data.tokenizer is not the one that this run began with; put that one back, or choose another run.dir"
        );
        let counts = |of: &Identity| (of.tokens, of.documents, of.text_bytes);
        ensure!(
            counts(self) == counts(now),
            "data.train is not what this run began with: that had {} tokens in {} documents, {} bytes of text; now it is \
             {} tokens in {} documents, {} bytes. Put the old data back, or choose another run.dir",
            self.tokens,
            self.documents,
            self.text_bytes,
            now.tokens,
            now.documents,
            now.text_bytes
        );
        if let (Some(then), Some(now)) = (self.checksum, now.checksum) {
            ensure!(
                then == now,
                "data.train is not what this run began with: it has as many tokens, documents and bytes, but others (their \
                 checksum was {then:08x} and is {now:08x}). Put the old data back, or choose another run.dir"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(checksum: Option<u32>) -> Identity {
        Identity { tokenizer: "t".into(), tokens: 5, documents: 2, text_bytes: 9, checksum }
    }

    #[test]
    fn other_data_is_refused_and_that_of_older_checkpoints_compared_by_counts() {
        let now = identity(Some(0xab));
        now.check(&now).unwrap();
        let error = identity(Some(0xcd)).check(&now).unwrap_err().to_string();
        assert!(error.contains("data.train") && error.contains("000000cd"), "{error}");
        let fewer = Identity { tokens: 4, ..now.clone() };
        assert!(fewer.check(&now).unwrap_err().to_string().contains("that had 4 tokens"));
        let old: Identity =
            serde_json::from_str(r#"{"tokenizer":"t","tokens":5,"documents":2,"text_bytes":9}"#).unwrap();
        assert_eq!(old, identity(None));
        old.check(&now).unwrap();
    }
}
