//! Training of a byte-level BPE (Sennrich, Haddow and Birch, 2016, over bytes as in GPT-2).

use super::Tokenizer;
use super::files::Vocabulary;
use crate::SPECIALS;
use anyhow::{Context, Result, anyhow, bail};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerImpl};

/// The smallest vocabulary: the special tokens and every byte.
const SMALLEST: usize = SPECIALS.len() + 256;

impl Tokenizer {
    /// Trains a tokenizer of (at most) `vocab_size` tokens on texts, with OPT's special tokens first. The same texts
    /// give the same tokenizer.
    ///
    /// # Errors
    /// When the vocabulary is smaller than the special tokens and all bytes, or a text cannot be read.
    pub fn train<I>(texts: I, vocab_size: usize) -> Result<Tokenizer>
    where
        I: IntoIterator<Item = Result<String>>,
        I::IntoIter: Send,
    {
        if vocab_size < SMALLEST {
            bail!(
                "a vocabulary of {vocab_size} is too small: the special tokens and all bytes take {SMALLEST}"
            );
        }
        let mut trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(SPECIALS.map(|s| AddedToken::from(s, true)).to_vec())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut tokenizer: TokenizerImpl<
            BPE,
            tokenizers::NormalizerWrapper,
            ByteLevel,
            tokenizers::PostProcessorWrapper,
            tokenizers::DecoderWrapper,
        > = TokenizerImpl::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));

        // The library takes texts, not results: the first error ends them and is looked at afterwards.
        let mut failed = None;
        let texts = texts.into_iter().map_while(|text| text.map_err(|e| failed = Some(e)).ok());
        let trained = tokenizer.train(&mut trainer, texts).map(|_| ());
        if let Some(e) = failed {
            return Err(e);
        }
        trained.map_err(|e| anyhow!(e)).context("cannot train a tokenizer")?;
        // The library shows its merges in this form only.
        let model = serde_json::to_value(tokenizer.get_model()).context("cannot read what was trained")?;
        Self::new(Vocabulary::from_model(model)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words with frequencies that leave many ties.
    fn texts() -> Vec<Result<String>> {
        (0..200)
            .map(|i| Ok((0..300).map(|j| format!("w{} v{} ", i * j % 977, j % (i + 1))).collect()))
            .collect()
    }

    #[test]
    fn the_same_texts_give_the_same_tokenizer() {
        let first = Tokenizer::train(texts(), 1000).unwrap();
        assert_eq!(first.vocab_size(), 1000);
        for _ in 0..3 {
            assert_eq!(Tokenizer::train(texts(), 1000).unwrap().fingerprint(), first.fingerprint());
        }
    }

    #[test]
    fn frequent_words_become_one_token_and_specials_stay_out_of_reach() {
        let text = "<s> </s> <pad> <unk> remarkable ".repeat(100);
        let t = Tokenizer::train([Ok(text)], 400).unwrap();
        assert_eq!(t.encode(" remarkable").unwrap().len(), 1);
        assert!(t.encode("<s></s><pad><unk>").unwrap().iter().all(|&id| id as usize >= SPECIALS.len()));
    }

    #[test]
    fn errors_come_through() {
        assert!(Tokenizer::train([Ok("x".into())], 259).err().unwrap().to_string().contains("260"));
        let e = Tokenizer::train([Ok("x".into()), Err(anyhow!("disk on fire"))], 300).err().unwrap();
        assert_eq!(e.to_string(), "disk on fire");
    }
}
