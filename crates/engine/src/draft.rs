//! Guessing ahead: a small model, the draft, writes a few tokens, and the large one reads them in a single step (Leviathan,
//! Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", 2023).
//!
//! What the draft guesses is no token of a text yet. The large model chooses at every place as it would without a draft,
//! and as long as it chooses what was guessed, the next place is computed already. So texts are the same to the bit, in
//! every mode, however many tokens are guessed. The draft guesses with the same random numbers, which [`crate::race`] makes
//! agree about as often as the two distributions do.
//!
//! Keys and values of the draft lie in pages of the same numbers as those of the large model, so pages that texts have in
//! common, copies and places that are lost need no second account.

use crate::choose::{Asked, Chooser, Scratches};
use crate::parameters::Parameters;
use crate::sampler::Place;
use anyhow::Result;
use ferropt_device::{Device, Element, PAGE, Segment};
use ferropt_model::{Cache, Decoder, Memory};
use std::collections::BTreeSet;

/// Time of one more row in a step of a model whose parameters take a byte each, where the time of a step of one row is 1.
/// Fewer bytes are read sooner, but a row's arithmetic takes as long. Measured with models of 8 and 125 million parameters
/// in 16, 8 and 4 bits.
const ROW: f32 = 0.28;
/// Texts that are computed together at most while something is guessed: with more, rows cost more than that, and drafts
/// were found to slow them down.
const TEXTS: usize = 4;
/// Guessing has to promise so much more speed.
const GAIN: f32 = 1.1;
/// What a layer costs beside its bytes, as bytes: kernels have to be started.
const LAYER: f32 = 1e6;
/// What is thought of guesses before any was checked: the share that is right.
pub(crate) const ACCEPTANCE: f32 = 0.7;

/// The draft at work.
pub(crate) struct Draft<D: Device, E: Element> {
    decoder: Decoder<D>,
    cache: Cache<D, E>,
    memory: Memory<D, E>,
    /// Ids that it may guess.
    known: usize,
    /// Tokens to guess at most.
    most: usize,
    /// Time of its steps, and of one more row in those of the large model, where the time of a step of one row is 1.
    cost: f32,
    row: f32,
    /// Tokens in the beginning of each page whose keys and values it has.
    filled: Vec<usize>,
}

/// What a draft works beside.
pub(crate) struct Sizes {
    /// Pages of the large model's cache.
    pub(crate) pages: usize,
    /// Tokens of a step at most.
    pub(crate) rows: usize,
    /// Ids that may be chosen.
    pub(crate) known: usize,
    /// Tokens to guess at most.
    pub(crate) ahead: usize,
}

/// A text to guess ahead of.
pub(crate) struct Text<'a> {
    /// All its tokens.
    pub(crate) tokens: &'a [u32],
    /// Pages with room for the guesses, too.
    pub(crate) pages: &'a [u32],
    /// Tokens to guess, at least 1.
    pub(crate) ahead: usize,
    /// How they are chosen.
    pub(crate) parameters: &'a Parameters,
    /// Where the first is chosen.
    pub(crate) place: Place<'a>,
}

/// Tokens that the draft reads, of a text by its number.
struct Read {
    text: usize,
    past: usize,
    tokens: Vec<u32>,
}

impl<D: Device, E: Element> Draft<D, E> {
    /// Sets up a draft beside a large model.
    ///
    /// # Errors
    /// When memory is short.
    pub(crate) fn new(device: &D, decoder: Decoder<D>, large: &Decoder<D>, sizes: Sizes) -> Result<Self> {
        let config = decoder.config();
        let time = |d: &Decoder<D>| d.bytes(device) as f32 + LAYER * d.config().layers as f32;
        Ok(Draft {
            cache: Cache::new(device, config, sizes.pages)?,
            memory: Memory::new(device, config, sizes.rows, TEXTS)?,
            known: sizes.known.min(config.vocab),
            most: sizes.ahead,
            cost: time(&decoder) / time(large),
            row: ROW * large.config().parameter_count() as f32 / large.bytes(device) as f32,
            filled: vec![0; sizes.pages],
            decoder,
        })
    }

    /// Takes the cache's memory from the system.
    pub(crate) fn reserve(&mut self, device: &D) {
        self.cache.reserve(device);
    }

    /// How many tokens are worth guessing behind a text of `tokens` tokens, in a step with `rows` rows of `texts` texts: so
    /// many that the most tokens come in a unit of time, if `acceptance` is the share of guesses that are right.
    pub(crate) fn worth(
        &self,
        tokens: usize,
        useful: usize,
        acceptance: f32,
        rows: usize,
        texts: usize,
    ) -> usize {
        let room = (self.decoder.config().positions + 1).saturating_sub(tokens);
        let most = if texts > TEXTS { 0 } else { self.most.min(useful).min(room) };
        best_number(most, acceptance, (self.cost, self.row), (rows as f32, texts as f32))
    }

    /// Pages are copied, from and to.
    pub(crate) fn copy(&mut self, device: &D, pairs: &[(u32, u32)]) {
        self.cache.copy(device, pairs);
        for (from, to) in pairs {
            self.filled[*to as usize] = self.filled[*from as usize];
        }
    }

    /// The large model writes to a sequence's pages from its token `past` on: what the draft has from there on belongs to
    /// guesses that were wrong, or to another text.
    pub(crate) fn overwritten(&mut self, pages: &[u32], past: usize) {
        for (i, page) in pages.iter().enumerate().skip(past / PAGE) {
            let filled = &mut self.filled[*page as usize];
            *filled = past.saturating_sub(i * PAGE).min(*filled);
        }
    }

    /// Guesses ahead of each text. The draft first reads what it does not know of them; where that is too much for one
    /// step, it goes on in the next, and guesses nothing yet.
    ///
    /// # Errors
    /// When the device fails.
    pub(crate) fn guess(
        &mut self,
        device: &D,
        scratches: &Scratches,
        texts: &[Text<'_>],
    ) -> Result<Vec<Vec<u32>>> {
        let mut guesses = vec![Vec::new(); texts.len()];
        let mut reads = self.unread(texts);
        while !reads.is_empty() {
            self.read(device, texts, &reads)?;
            let mut end = 0;
            let last = |read: &Read| {
                end += read.tokens.len();
                (end as u32 - 1, read.text, read.past + read.tokens.len())
            };
            let mut complete: Vec<_> = reads.iter().map(last).collect();
            complete.retain(|(_, text, read)| *read == texts[*text].tokens.len() + guesses[*text].len());
            let rows: Vec<u32> = complete.iter().map(|(row, ..)| *row).collect();
            let logits = self.decoder.head(device, &rows, &mut self.memory)?;
            let chooser = Chooser { logits, known: self.known, scratches };
            let ask = |(row, (_, number, _)): (usize, &(u32, usize, usize))| {
                let (text, guessed) = (&texts[*number], &guesses[*number][..]);
                Asked { row, parameters: text.parameters, place: Place { guessed, ..text.place } }
            };
            let asked: Vec<Asked<'_>> = complete.iter().enumerate().map(ask).collect();
            let guessed = chooser.pick(device, &asked);
            reads.clear();
            for ((_, number, past), id) in complete.into_iter().zip(guessed) {
                let (text, guesses) = (&texts[number], &mut guesses[number]);
                guesses.push(id);
                if guesses.len() < text.ahead && (!text.place.ends.contains(id) || text.parameters.ignore_end)
                {
                    reads.push(Read { text: number, past, tokens: vec![id] });
                }
            }
        }
        Ok(guesses)
    }

    /// What it does not know of some texts, as much as it can read in a step. Texts with tokens that are not in its
    /// vocabulary are left out, and those that have to wait for a page that they have in common with one before.
    fn unread(&self, texts: &[Text<'_>]) -> Vec<Read> {
        let mut left = self.memory.rows();
        let (mut reads, mut written) = (Vec::new(), BTreeSet::<u32>::new());
        for (number, text) in texts.iter().enumerate() {
            let filled = text.pages.iter().map(|page| self.filled[*page as usize]);
            let full = filled.clone().take_while(|filled| *filled == PAGE).count();
            let past = full * PAGE + filled.clone().nth(full).unwrap_or(0);
            let tokens = &text.tokens[past..];
            let pages = &text.pages[full..text.tokens.len().div_ceil(PAGE)];
            let known = tokens.iter().all(|id| (*id as usize) < self.decoder.config().vocab);
            if left > 0 && known && pages.iter().all(|page| !written.contains(page)) {
                let tokens = tokens[..tokens.len().min(left)].to_vec();
                left -= tokens.len();
                written.extend(pages);
                reads.push(Read { text: number, past, tokens });
            }
        }
        reads
    }

    fn read(&mut self, device: &D, texts: &[Text<'_>], reads: &[Read]) -> Result<()> {
        let tokens: Vec<u32> = reads.iter().flat_map(|read| read.tokens.iter().copied()).collect();
        let segment =
            |read: &Read| Segment { rows: read.tokens.len(), past: read.past, pages: texts[read.text].pages };
        let segments: Vec<Segment<'_>> = reads.iter().map(segment).collect();
        self.decoder.forward(device, &tokens, &segments, &mut self.cache, &mut self.memory)?;
        for Segment { rows, past, pages } in segments {
            for i in past / PAGE..(past + rows).div_ceil(PAGE) {
                self.filled[pages[i] as usize] = (past + rows - i * PAGE).min(PAGE);
            }
        }
        Ok(())
    }
}

/// Up to `most`, the number of guesses with which the most tokens come in a unit of time; none if that is hardly more.
///
/// With a share `a` of guesses that are right, k guesses make (1 - a^(k+1)) / (1 - a) tokens out of one. The large model's
/// step gets k rows for each text, and k steps of the draft come before it.
fn best_number(most: usize, acceptance: f32, (cost, row): (f32, f32), (rows, texts): (f32, f32)) -> usize {
    let step = |rows: f32| 1.0 + row * (rows - 1.0);
    // Of guesses that are always right, any number would be worth it.
    let a = acceptance.min(0.99);
    let rate = |guesses: usize| {
        let k = guesses as f32;
        let tokens = (1.0 - a.powf(k + 1.0)) / (1.0 - a);
        tokens / (step(rows + k * texts) + k * cost * step(texts))
    };
    let best = (0..=most).max_by(|a, b| rate(*a).total_cmp(&rate(*b))).unwrap_or(0);
    if rate(best) > GAIN * rate(0) { best } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_is_guessed_as_is_worth_it() {
        let alone = |acceptance, cost| best_number(8, acceptance, (cost, 0.08), (1.0, 1.0));
        assert!(alone(0.99, 0.02) == 8 && alone(0.9, 0.02) > alone(0.6, 0.02), "more when more is right");
        assert!(alone(0.6, 0.02) > alone(0.6, 0.3), "less when it costs more");
        assert_eq!(
            (alone(0.02, 0.05), alone(0.9, 1.0), alone(1.0, 0.1)),
            (0, 0, 8),
            "and nothing for nothing"
        );
        let numbers: Vec<usize> =
            [1.0, 4.0, 8.0, 64.0].map(|texts| best_number(8, 0.7, (0.1, 0.08), (texts, texts))).into();
        assert!(numbers.is_sorted_by(|a, b| a >= b) && numbers[0] > 1 && numbers[3] == 0, "{numbers:?}");
        assert_eq!(best_number(2, 0.99, (0.01, 0.08), (1.0, 1.0)), 2);
    }
}
