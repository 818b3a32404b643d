//! Beam search: the likeliest texts, as far as keeping a few at a time finds them.

use crate::ends::Ends;
use crate::text::Token;

/// A text and the sum of its tokens' log-probabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct Text {
    /// Tokens, without the one that may have ended it.
    pub tokens: Vec<Token>,
    /// Sum of log-probabilities, that of the end included.
    pub sum: f64,
}

/// A text that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// The text.
    pub text: Text,
    /// Sum over length^penalty, where the end counts as a token.
    pub score: f64,
    /// Whether a token ended it; else the limit did.
    pub complete: bool,
}

/// The search for the best `wanted` texts of at most `limit` tokens.
pub struct Search {
    width: usize,
    wanted: usize,
    limit: usize,
    penalty: f64,
    ends: Ends,
    /// Texts that go on, best first, all of one length.
    live: Vec<Text>,
    /// Best first.
    ended: Vec<Ended>,
}

impl Search {
    /// Starts with one empty text. `limit` is at least 1.
    pub fn new(width: usize, wanted: usize, limit: usize, penalty: f64, ends: Ends) -> Search {
        let live = vec![Text { tokens: Vec::new(), sum: 0.0 }];
        Search { width, wanted, limit, penalty, ends, live, ended: Vec::new() }
    }

    /// How many of the likeliest tokens it has to know behind each text: some of them may be ends.
    pub fn candidates(&self) -> usize {
        self.width + self.ends.ids().len()
    }

    /// Texts that go on.
    pub fn live(&self) -> &[Text] {
        &self.live
    }

    /// Takes the likeliest tokens behind each live text, with their log-probabilities. Returns, for each text that goes on
    /// from here, the number of the one that it continues, none when the search is over; and how many texts got a token.
    pub fn advance(&mut self, likeliest: &[Vec<Token>]) -> (Vec<usize>, usize) {
        let mut all: Vec<(f64, usize, &Token)> = Vec::new();
        for (parent, (text, tokens)) in self.live.iter().zip(likeliest).enumerate() {
            all.extend(tokens.iter().map(|t| (text.sum + t.log_prob.unwrap_or(0.0) as f64, parent, t)));
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.id.cmp(&b.2.id)));
        let (mut live, mut parents) = (Vec::new(), Vec::new());
        for (sum, parent, token) in all {
            if live.len() == self.width {
                break;
            }
            let mut tokens = self.live[parent].tokens.clone();
            if self.ends.contains(token.id) {
                self.end(Text { tokens, sum }, true);
            } else {
                tokens.push(token.clone());
                live.push(Text { tokens, sum });
                parents.push(parent);
            }
        }
        self.live = live;
        let longer = self.live.len();
        if self.live.first().is_none_or(|text| text.tokens.len() >= self.limit) {
            for text in std::mem::take(&mut self.live) {
                self.end(text, false);
            }
        } else if self.cannot_improve() {
            self.live.clear();
        }
        parents.truncate(self.live.len());
        (parents, longer)
    }

    /// The best texts, best first.
    pub fn best(mut self) -> Vec<Ended> {
        self.ended.truncate(self.wanted);
        self.ended
    }

    fn end(&mut self, text: Text, complete: bool) {
        let length = text.tokens.len() + usize::from(complete);
        let score = text.sum / (length as f64).powf(self.penalty);
        let place = self.ended.partition_point(|e| e.score >= score);
        self.ended.insert(place, Ended { text, score, complete });
        self.ended.truncate(self.wanted);
    }

    /// Whether no live text can still get among the wanted ones: sums only fall, so the best that it can hope for is its
    /// sum of now at the length that the penalty likes best.
    fn cannot_improve(&self) -> bool {
        let Some(text) = self.live.first() else { return true };
        let length = if self.penalty > 0.0 { self.limit } else { text.tokens.len() + 1 };
        let hope = text.sum / (length as f64).powf(self.penalty);
        self.ended.len() == self.wanted && self.ended[self.wanted - 1].score >= hope
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_data::EOS;
    use ferropt_device::rng::{Purpose, Stream};

    const VOCAB: u32 = 5;

    /// Log-probabilities of a made-up model behind a text.
    fn model(seed: u64, text: &[u32]) -> Vec<f32> {
        let place = text.iter().fold(1u64, |at, id| at * VOCAB as u64 + *id as u64);
        let logits: Vec<f32> = (0..VOCAB as usize)
            .map(|i| 2.0 * Stream::new(seed, Purpose::Init, 0, 0).normal(place, i))
            .collect();
        let sum: f32 = logits.iter().map(|l| l.exp()).sum();
        logits.iter().map(|l| l - sum.ln()).collect()
    }

    fn search(seed: u64, width: usize, wanted: usize, limit: usize, penalty: f64) -> Vec<Ended> {
        let mut search = Search::new(width, wanted, limit, penalty, Ends::default());
        while !search.live().is_empty() {
            let likeliest: Vec<Vec<Token>> = search
                .live()
                .iter()
                .map(|text| {
                    let ids: Vec<u32> = text.tokens.iter().map(|t| t.id).collect();
                    crate::sampler::top(&model(seed, &ids), search.candidates())
                        .into_iter()
                        .map(|(id, p)| Token { id, log_prob: Some(p), top: vec![] })
                        .collect()
                })
                .collect();
            let (parents, _) = search.advance(&likeliest);
            assert_eq!(parents.len(), search.live().len());
        }
        search.best()
    }

    /// All texts.
    fn every_text(seed: u64, limit: usize, penalty: f64) -> Vec<(f64, Vec<u32>)> {
        let mut ended = vec![];
        let mut open = vec![(0.0f64, vec![])];
        while let Some((sum, text)) = open.pop() {
            for (id, p) in (0..).zip(model(seed, &text)) {
                let sum = sum + p as f64;
                let length = ((text.len() + 1) as f64).powf(penalty);
                if id == EOS {
                    ended.push((sum / length, text.clone()));
                } else {
                    let longer = [&text[..], &[id]].concat();
                    if longer.len() == limit {
                        ended.push((sum / length, longer))
                    } else {
                        open.push((sum, longer))
                    }
                }
            }
        }
        ended.sort_by(|a, b| b.0.total_cmp(&a.0));
        ended
    }

    #[test]
    fn a_beam_that_holds_everything_finds_the_best_texts() {
        for seed in 0..20 {
            for penalty in [0.0, 0.5, 1.0, 2.0, -1.0] {
                let want = every_text(seed, 4, penalty);
                let got = search(seed, 64, 5, 4, penalty);
                for (got, (score, text)) in got.iter().zip(&want) {
                    let ids: Vec<u32> = got.text.tokens.iter().map(|t| t.id).collect();
                    assert_eq!(
                        (&ids, got.complete),
                        (text, text.len() < 4),
                        "seed {seed}, penalty {penalty}"
                    );
                    assert!((got.score - score).abs() < 1e-9);
                }
                assert_eq!(got.len(), 5);
            }
        }
    }

    #[test]
    fn one_beam_takes_the_likeliest_token_each_time() {
        for seed in 0..20 {
            let got = &search(seed, 1, 1, 6, 0.0)[0];
            let mut text: Vec<u32> = vec![];
            let mut sum = 0.0;
            // Texts that end early compete with those that go on, which without a penalty only lose.
            let mut best: Option<(f64, Vec<u32>)> = None;
            while text.len() < 6 {
                let p = model(seed, &text);
                let ending = sum + p[EOS as usize] as f64;
                let order = crate::sampler::top(&p, 2);
                if order[0].0 == EOS && best.as_ref().is_none_or(|b| b.0 < ending) {
                    best = Some((ending, text.clone()));
                }
                let next = order.iter().find(|t| t.0 != EOS).unwrap();
                sum += next.1 as f64;
                text.push(next.0);
            }
            let want = match best {
                Some((score, text)) if score >= sum => text,
                _ => text,
            };
            assert_eq!(got.text.tokens.iter().map(|t| t.id).collect::<Vec<_>>(), want, "seed {seed}");
        }
    }
}
