//! The loader: batches of training samples from token files.
//!
//! It has no state. Which tokens make sample `i` follows from (files, T, seed, i) alone, so resuming a run needs
//! nothing but the number of its step, and any layout sees the same data in the same order.

use crate::{EOS, PAD, Permutation, TokenFile, Tokenizer};
use anyhow::{Context, Result, bail, ensure};
use ferropt_device::IGNORE;

/// Sequences for one forward pass; N = B*T, row-major `[B, T]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Inputs `[B, T]`.
    pub tokens: Vec<u32>,
    /// What follows each input `[B, T]`; [`IGNORE`] where nothing is to be predicted.
    pub targets: Vec<u32>,
    /// `[B, T]`: where in its own sequence the document of each position starts, namely the last `</s>` at or before
    /// it (which plays the part of the first token of the document behind it, as in prompts), or 0.
    pub doc_start: Vec<u32>,
    /// Bytes of text that the targets stand for.
    pub text_bytes: u64,
    /// Number of targets that are not [`IGNORE`].
    pub target_count: u64,
}

/// Which samples there are, and their order.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// Windows of T+1 tokens every T tokens, in another order each epoch.
    Shuffled { seed: u64 },
    /// One pass in order over so many tokens, each predicted exactly once.
    Sequential { tokens: u64 },
}

/// Samples of T tokens out of one or more token files, which are read as if they were one.
pub struct Loader {
    files: Vec<TokenFile>,
    /// Number of tokens before each file, and in all.
    starts: Vec<u64>,
    /// Length in bytes of each token; also the vocabulary that ids are checked against.
    byte_len: Vec<u16>,
    seq: usize,
    order: Order,
}

impl Loader {
    /// Training data in shuffled order: sample `i` is window `order(i / S)[i % S]`, where S windows make an epoch and
    /// each epoch has its own [`Permutation`]. A window is `seq + 1` tokens: `seq` inputs and as many targets.
    ///
    /// # Errors
    /// When all files together are shorter than one window.
    pub fn shuffled(files: Vec<TokenFile>, tokenizer: &Tokenizer, seq: usize, seed: u64) -> Result<Loader> {
        let loader = Self::new(files, tokenizer, seq, Order::Shuffled { seed })?;
        if loader.samples_per_epoch() == 0 {
            bail!(
                "the training text is too short: {} tokens in {} documents, but one sample takes {} (data.seq + 1); \
                 add text or lower data.seq",
                loader.tokens(),
                loader.documents(),
                seq + 1
            );
        }
        Ok(loader)
    }

    /// Held-out data in order, the first `most` tokens of it. The sequence of inputs starts with `</s>`, as prompts do, so
    /// that every token is a target exactly once; the last sample is filled up with `<pad>` and [`IGNORE`].
    ///
    /// # Errors
    /// When there is no token.
    pub fn sequential(files: Vec<TokenFile>, tokenizer: &Tokenizer, seq: usize, most: u64) -> Result<Loader> {
        let tokens = files.iter().map(TokenFile::tokens).sum::<u64>().min(most);
        ensure!(tokens > 0, "there are no tokens");
        Self::new(files, tokenizer, seq, Order::Sequential { tokens })
    }

    fn new(files: Vec<TokenFile>, tokenizer: &Tokenizer, seq: usize, order: Order) -> Result<Loader> {
        ensure!(seq > 0, "a sequence of 0 tokens was asked for; data.seq must be at least 1");
        let mut starts = vec![0];
        for file in &files {
            starts.push(starts[starts.len() - 1] + file.tokens());
        }
        let byte_len = (0..tokenizer.vocab_size() as u32)
            .map(|id| {
                u16::try_from(tokenizer.byte_len(id)).with_context(|| format!("token {id} is too long"))
            })
            .collect::<Result<_>>()?;
        Ok(Loader { files, starts, byte_len, seq, order })
    }

    /// T, tokens in a sample.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Tokens in all files.
    pub fn tokens(&self) -> u64 {
        self.starts[self.files.len()]
    }

    /// Documents in all files.
    pub fn documents(&self) -> u64 {
        self.files.iter().map(TokenFile::documents).sum()
    }

    /// Bytes of text in all files.
    pub fn text_bytes(&self) -> u64 {
        self.files.iter().map(TokenFile::text_bytes).sum()
    }

    /// Samples in one pass over the data.
    pub fn samples_per_epoch(&self) -> u64 {
        match self.order {
            Order::Shuffled { .. } => self.tokens().saturating_sub(1) / self.seq as u64,
            Order::Sequential { tokens } => tokens.div_ceil(self.seq as u64),
        }
    }

    /// Fills `batch` with samples `first .. first + count`; its memory is used again. Shuffled data goes on for ever;
    /// of sequential data, samples past the last one are all `<pad>`.
    ///
    /// # Errors
    /// When a token file is damaged, or holds an id that the tokenizer does not know.
    pub fn batch(&self, first: u64, count: usize, batch: &mut Batch) -> Result<()> {
        let n = count * self.seq;
        for buffer in [&mut batch.tokens, &mut batch.targets, &mut batch.doc_start] {
            buffer.resize(n, 0);
        }
        (batch.text_bytes, batch.target_count) = (0, 0);
        for j in 0..count {
            let at = j * self.seq..(j + 1) * self.seq;
            let (tokens, targets) = (&mut batch.tokens[at.clone()], &mut batch.targets[at.clone()]);
            self.sample(first + j as u64, tokens, targets)?;
            for (&id, &target) in tokens.iter().zip(&*targets) {
                batch.text_bytes += self.byte_len(id).and(self.byte_len(target))?;
                batch.target_count += (target != IGNORE) as u64;
            }
            document_starts(tokens, &mut batch.doc_start[at]);
        }
        Ok(())
    }

    /// Inputs and targets `[T]` of sample `i`.
    fn sample(&self, i: u64, tokens: &mut [u32], targets: &mut [u32]) -> Result<()> {
        let seq = self.seq as u64;
        match self.order {
            Order::Shuffled { seed } => {
                let per_epoch = self.samples_per_epoch();
                let window = Permutation::new(per_epoch, seed, i / per_epoch).at(i % per_epoch);
                self.read(window * seq, tokens)?;
                self.read(window * seq + 1, targets)
            }
            Order::Sequential { tokens: end } => {
                let start = i.saturating_mul(seq).min(end);
                let known = (end - start).min(seq) as usize;
                self.read(start, &mut targets[..known])?;
                targets[known..].fill(IGNORE);
                tokens.fill(PAD);
                if known > 0 {
                    tokens[0] = EOS;
                    if start > 0 {
                        self.read(start - 1, &mut tokens[..1])?;
                    }
                    tokens[1..known].copy_from_slice(&targets[..known - 1]);
                }
                Ok(())
            }
        }
    }

    /// Copies tokens from `start` on, across files.
    fn read(&self, mut start: u64, mut out: &mut [u32]) -> Result<()> {
        let mut file = self.starts.partition_point(|&s| s <= start) - 1;
        while !out.is_empty() {
            let here = (self.starts[file + 1] - start).min(out.len() as u64) as usize;
            let (now, rest) = out.split_at_mut(here);
            self.files[file].read(start - self.starts[file], now)?;
            (start, out, file) = (start + here as u64, rest, file + 1);
        }
        Ok(())
    }

    /// Bytes of a token's text, 0 for [`IGNORE`]; fails for ids that do not exist.
    fn byte_len(&self, id: u32) -> Result<u64> {
        if id == IGNORE {
            return Ok(0);
        }
        self.byte_len.get(id as usize).map(|&n| n as u64).with_context(|| {
            let names: Vec<String> = self.files.iter().map(|f| f.path().display().to_string()).collect();
            format!(
                "found the token id {id}, but the vocabulary has {} tokens: a token file is damaged; delete it, and it \
                 is made anew ({})",
                self.byte_len.len(),
                names.join(", ")
            )
        })
    }
}

/// For each position, the place of the last `</s>` at or before it, or 0.
fn document_starts(tokens: &[u32], starts: &mut [u32]) {
    let mut start = 0;
    for (t, (&id, out)) in tokens.iter().zip(starts).enumerate() {
        if id == EOS {
            start = t as u32;
        }
        *out = start;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token_file::TokenWriter;
    use std::path::Path;

    fn tokenizer() -> Tokenizer {
        Tokenizer::train([Ok("aaab".repeat(10))], 262).unwrap()
    }

    /// A token file of documents of the given ids.
    fn file(dir: &Path, name: &str, documents: &[&[u32]]) -> TokenFile {
        let (t, path) = (tokenizer(), dir.join(name));
        let mut w = TokenWriter::new(std::fs::File::create(&path).unwrap(), 300, [0; 32]).unwrap();
        for ids in documents {
            w.push(ids, ids.iter().map(|&id| t.byte_len(id) as u64).sum()).unwrap();
            w.end_document().unwrap();
        }
        w.finish().unwrap();
        TokenFile::open(&path).unwrap()
    }

    fn batch(loader: &Loader, first: u64, count: usize) -> Batch {
        let mut b = Batch::default();
        loader.batch(first, count, &mut b).unwrap();
        b
    }

    #[test]
    fn every_window_comes_once_an_epoch_across_files() {
        let dir = tempfile::tempdir().unwrap();
        let ids: Vec<u32> = (10..47).collect();
        let files =
            || vec![file(dir.path(), "a", &[&ids[..10], &ids[10..13]]), file(dir.path(), "b", &[&ids[13..]])];
        // 37 ids and 3 ends.
        let all: Vec<u32> = [&ids[..10], &[2], &ids[10..13], &[2], &ids[13..], &[2]].concat();
        let loader = Loader::shuffled(files(), &tokenizer(), 4, 9).unwrap();
        assert_eq!((loader.tokens(), loader.documents(), loader.samples_per_epoch()), (40, 3, 9));
        let mut orders = vec![];
        for epoch in 0..2 {
            let b = batch(&loader, epoch * 9, 9);
            let mut places: Vec<usize> = (0..9)
                .map(|j| {
                    let (x, y) = (&b.tokens[j * 4..j * 4 + 4], &b.targets[j * 4..j * 4 + 4]);
                    let place = (0..36).step_by(4).find(|&p| all[p..p + 4] == *x).unwrap();
                    assert_eq!(y, &all[place + 1..place + 5]);
                    place
                })
                .collect();
            orders.push(places.clone());
            places.sort_unstable();
            assert_eq!(places, (0..36).step_by(4).collect::<Vec<_>>());
            assert_eq!(b.target_count, 36);
            assert_eq!(b.text_bytes, b.targets.iter().filter(|&&t| t != 2).count() as u64);
        }
        assert_ne!(orders[0], orders[1]);
        // Any split gives the same samples, and memory that is used again leaves nothing behind.
        let again = Loader::shuffled(files(), &tokenizer(), 4, 9).unwrap();
        let whole = batch(&loader, 3, 5);
        let mut part = Batch::default();
        for (first, count) in [(3, 2), (5, 3)] {
            again.batch(first, count, &mut part).unwrap();
            let at = (first as usize - 3) * 4..(first as usize - 3 + count) * 4;
            assert_eq!(part.tokens, whole.tokens[at.clone()]);
            assert_eq!(part.doc_start, whole.doc_start[at]);
        }
    }

    #[test]
    fn sequential_order_scores_every_token_once() {
        let dir = tempfile::tempdir().unwrap();
        let files = vec![file(dir.path(), "a", &[&[10, 11, 12]]), file(dir.path(), "b", &[&[13, 14]])];
        let bytes = files.iter().map(TokenFile::text_bytes).sum::<u64>();
        let loader = Loader::sequential(files, &tokenizer(), 4, u64::MAX).unwrap();
        assert_eq!(loader.samples_per_epoch(), 2);
        let b = batch(&loader, 0, 3);
        let i = IGNORE;
        assert_eq!(b.tokens, [2, 10, 11, 12, 2, 13, 14, 1, 1, 1, 1, 1]);
        assert_eq!(b.targets, [10, 11, 12, 2, 13, 14, 2, i, i, i, i, i]);
        assert_eq!((b.target_count, b.text_bytes), (7, bytes));
    }

    #[test]
    fn no_token_past_the_limit_is_scored_whatever_the_batch() {
        let dir = tempfile::tempdir().unwrap();
        let ids: Vec<u32> = (10..30).collect();
        for (most, scored) in [(1, 1), (4, 4), (10, 10), (1000, 21u64)] {
            let loader =
                Loader::sequential(vec![file(dir.path(), "a", &[&ids])], &tokenizer(), 4, most).unwrap();
            assert_eq!(loader.samples_per_epoch(), scored.div_ceil(4));
            for count in [1, 2, 3, 8] {
                let places = (0..loader.samples_per_epoch()).step_by(count);
                let batches: Vec<Batch> = places.map(|first| batch(&loader, first, count)).collect();
                assert_eq!(batches.iter().map(|b| b.target_count).sum::<u64>(), scored, "{most}, {count}");
                let targets = batches.iter().flat_map(|b| &b.targets).filter(|&&t| t != IGNORE);
                let expected = ids.iter().chain(&[EOS]).take(scored as usize);
                assert!(targets.eq(expected), "{most}, {count}");
            }
        }
    }

    #[test]
    fn documents_start_at_their_closing_token() {
        let mut starts = [9; 7];
        document_starts(&[5, 6, 2, 7, 2, 2, 8], &mut starts);
        assert_eq!(starts, [0, 0, 2, 2, 4, 5, 5]);
    }

    #[test]
    fn too_little_text_is_refused_with_the_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let files = || vec![file(dir.path(), "a", &[&[10, 11, 12]])];
        assert_eq!(Loader::shuffled(files(), &tokenizer(), 3, 1).unwrap().samples_per_epoch(), 1);
        let e = Loader::shuffled(files(), &tokenizer(), 4, 1).err().unwrap().to_string();
        assert!(e.contains("4 tokens in 1 documents") && e.contains("takes 5"), "{e}");
        assert!(Loader::sequential(vec![], &tokenizer(), 4, 9).is_err());
        assert!(Loader::shuffled(files(), &tokenizer(), 0, 1).is_err());
    }

    #[test]
    fn ids_that_do_not_exist_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut w = TokenWriter::new(std::fs::File::create(&path).unwrap(), 300, [0; 32]).unwrap();
        w.push(&[10, 299, 11], 3).unwrap();
        w.finish().unwrap();
        let loader = Loader::shuffled(vec![TokenFile::open(&path).unwrap()], &tokenizer(), 2, 1).unwrap();
        let e = loader.batch(0, 1, &mut Batch::default()).unwrap_err().to_string();
        assert!(e.contains("299") && e.contains("262"), "{e}");
    }
}
