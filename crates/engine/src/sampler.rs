//! Choosing a token from logits.

use crate::parameters::Parameters;
use ferropt_data::EOS;
use ferropt_device::rng::{Purpose, Stream};
use std::collections::HashMap;

/// Where in which text a token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// Tokens that were generated.
    pub generated: &'a [u32],
    /// Number of the text in its request.
    pub choice: usize,
}

impl Place<'_> {
    /// Tokens before the one to choose.
    fn position(&self) -> u64 {
        (self.prompt.len() + self.generated.len()) as u64
    }
}

/// Memory that is used again for each token.
#[derive(Default)]
pub struct Sampler {
    weights: Vec<f32>,
    candidates: Vec<(f32, u32)>,
}

/// Whether the token is the one with the largest logit as the model gives it.
pub fn takes_largest(p: &Parameters, generated: usize) -> bool {
    p.temperature == 0.0
        && p.repetition_penalty == 1.0
        && p.presence_penalty == 0.0
        && p.frequency_penalty == 0.0
        && p.logit_bias.is_empty()
        && end_allowed(p, generated)
}

/// Whether the text may end here.
pub fn end_allowed(p: &Parameters, generated: usize) -> bool {
    !p.ignore_end && generated >= p.min_tokens
}

impl Sampler {
    /// The token that follows. The logits are changed on the way. The same parameters, place and logits give the same
    /// token.
    pub fn pick(&mut self, p: &Parameters, place: Place<'_>, logits: &mut [f32]) -> u32 {
        adjust(p, place, logits);
        if p.temperature == 0.0 {
            return largest(logits);
        }
        let stream = Stream::new(p.seed, Purpose::Sampling, place.choice, 0);
        self.sample(p, logits, stream.uniform(place.position(), 0))
    }

    /// Inverts the distribution function at `u` in [0, 1).
    fn sample(&mut self, p: &Parameters, logits: &[f32], u: f32) -> u32 {
        let first = largest(logits);
        let most = logits[first as usize];
        let weight = |logit: f32| ((logit - most) / p.temperature).exp();
        if p.top_k.is_none_or(|k| k >= logits.len()) && p.top_p == 1.0 {
            self.weights.clear();
            self.weights.extend(logits.iter().map(|logit| weight(*logit)));
            let kept = |w: &f32| *w >= p.min_p;
            let mass: f64 = self.weights.iter().filter(|w| kept(w)).map(|w| *w as f64).sum();
            let tokens = self.weights.iter().copied().zip(0..).filter(|(w, _)| kept(w));
            return at(tokens, u as f64 * mass).unwrap_or(first);
        }
        let all = self.keep_likeliest(p, logits, weight);
        let (mut kept, mut mass) = (0, 0.0);
        while kept < self.candidates.len() && (kept == 0 || mass < p.top_p as f64 * all) {
            mass += self.candidates[kept].0 as f64;
            kept += 1;
        }
        let kept = self.candidates[..kept].partition_point(|(w, _)| *w >= p.min_p).max(1);
        let mass: f64 = self.candidates[..kept].iter().map(|(w, _)| *w as f64).sum();
        at(self.candidates[..kept].iter().copied(), u as f64 * mass).unwrap_or(first)
    }

    /// Fills `candidates` with the weights and ids of the `top_k` likeliest tokens, likeliest first, equal ones by id, and
    /// returns the sum of their weights. Tokens that `top_p` does not keep may be missing.
    fn keep_likeliest(&mut self, p: &Parameters, logits: &[f32], weight: impl Fn(f32) -> f32) -> f64 {
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        let all = logits.iter().zip(0..).map(|(logit, id)| (weight(*logit), id));
        self.candidates.clear();
        self.candidates.extend(all);
        if let Some(k) = p.top_k.filter(|k| *k < logits.len()) {
            self.candidates.select_nth_unstable_by(k, order);
            self.candidates.truncate(k);
            self.candidates.sort_unstable_by(order);
            return self.candidates.iter().map(|(w, _)| *w as f64).sum();
        }
        // All tokens up to this weight together have less than 1 - top_p, so none of them is kept: no need to sort them.
        let total: f64 = self.candidates.iter().map(|(w, _)| *w as f64).sum();
        let least = ((1.0 - p.top_p as f64) * total / logits.len() as f64) as f32 * 0.999;
        self.candidates.retain(|(w, _)| *w > least);
        self.candidates.sort_unstable_by(order);
        total
    }
}

/// The token at which the sum of weights exceeds `mass`; the last one where rounding lets none.
fn at(tokens: impl Iterator<Item = (f32, u32)>, mut mass: f64) -> Option<u32> {
    let mut last = None;
    for (weight, id) in tokens {
        mass -= weight as f64;
        if weight > 0.0 {
            last = Some(id);
            if mass < 0.0 {
                break;
            }
        }
    }
    last
}

/// Penalties, bias, and whether the text may end.
fn adjust(p: &Parameters, place: Place<'_>, logits: &mut [f32]) {
    let get = |logits: &mut [f32], id: u32| logits.get(id as usize).copied();
    if p.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = place.prompt.iter().chain(place.generated).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(logit) = get(logits, id) {
                let r = p.repetition_penalty;
                logits[id as usize] = if logit > 0.0 { logit / r } else { logit * r };
            }
        }
    }
    if p.presence_penalty != 0.0 || p.frequency_penalty != 0.0 {
        let mut counts: HashMap<u32, u32> = HashMap::new();
        place.generated.iter().for_each(|id| *counts.entry(*id).or_default() += 1);
        for (id, count) in counts {
            if let Some(logit) = get(logits, id) {
                logits[id as usize] = logit - p.presence_penalty - p.frequency_penalty * count as f32;
            }
        }
    }
    for (id, bias) in &p.logit_bias {
        if let Some(logit) = get(logits, *id) {
            logits[*id as usize] = logit + bias;
        }
    }
    if !end_allowed(p, place.generated.len()) {
        logits[EOS as usize] = f32::NEG_INFINITY;
    }
}

/// The place of the largest logit, the lowest of equal ones.
fn largest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// The `count` largest logits with their ids, largest first, equal ones by id.
pub fn top(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    if count == 0 || all.is_empty() {
        return Vec::new();
    }
    if count < all.len() {
        all.select_nth_unstable_by(count - 1, order);
        all.truncate(count);
    }
    all.sort_unstable_by(order);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAWS: usize = 20_000;
    /// Three standard deviations of a share of 20,000.
    const SLACK: f64 = 0.011;

    fn counts(p: &Parameters, logits: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::default();
        let mut counts = vec![0.0; logits.len()];
        let prompt = vec![5; DRAWS];
        for position in 0..DRAWS {
            let place = Place { prompt: &prompt[..position], generated: &[], choice: 3 };
            counts[sampler.pick(p, place, &mut logits.to_vec()) as usize] += 1.0 / DRAWS as f64;
        }
        counts
    }

    fn sampled() -> Parameters {
        Parameters { seed: 3, ..Parameters::default() }
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let p: [f64; 5] = [0.1, 0.4, 0.2, 0.25, 0.05];
        let logits = p.map(|p| p.ln() as f32 + 7.0);
        let near = |parameters: Parameters, want: [f64; 5]| {
            for (got, want) in counts(&parameters, &logits).iter().zip(want) {
                let ok = (got - want).abs() < SLACK && (want > 0.0 || *got == 0.0);
                assert!(ok, "{got}, expected {want}: {parameters:?}");
            }
        };
        near(sampled(), p);
        let hot = p.map(|p| p.sqrt());
        near(Parameters { temperature: 2.0, ..sampled() }, hot.map(|x| x / hot.iter().sum::<f64>()));
        near(Parameters { top_k: Some(2), ..sampled() }, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]);
        // 0.4 + 0.25 is below 0.7, so the third is needed too.
        near(Parameters { top_p: 0.7, ..sampled() }, [0.0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0.0]);
        near(Parameters { top_k: Some(2), top_p: 0.3, ..sampled() }, [0.0, 1.0, 0.0, 0.0, 0.0]);
        near(Parameters { min_p: 0.5, ..sampled() }, [0.0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0.0]);
        near(Parameters { min_p: 0.6, top_p: 0.99, ..sampled() }, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]);
        near(Parameters { temperature: 0.0, ..sampled() }, [0.0, 1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn cutting_off_the_tail_early_changes_no_choice() {
        let stream = Stream::new(1, Purpose::Init, 0, 0);
        let logits: Vec<f32> = (0..5000).map(|i| 3.0 * stream.normal(0, i)).collect();
        for top_p in [0.05f32, 0.5, 0.9, 0.999] {
            let p = Parameters { top_p, temperature: 0.8, ..sampled() };
            // Everything is sorted when top_k names all but one.
            let sorted = Parameters { top_k: Some(4999), ..p.clone() };
            let mut sampler = Sampler::default();
            for position in 0..300 {
                let prompt = vec![5; position];
                let place = Place { prompt: &prompt, generated: &[], choice: 0 };
                let [a, b] = [&p, &sorted].map(|p| sampler.pick(p, place, &mut logits.clone()));
                assert!(a == b, "top_p {top_p} at {position}: {a}, not {b}");
            }
        }
    }

    #[test]
    fn penalties_and_bias_do_what_their_papers_say() {
        let place = Place { prompt: &[0, 1], generated: &[4, 4, 3], choice: 0 };
        let adjusted = |p: Parameters| {
            let mut logits = vec![2.0, -2.0, 1.0, 3.0, 4.0];
            adjust(&p, place, &mut logits);
            logits
        };
        assert_eq!(adjusted(Parameters { repetition_penalty: 2.0, ..sampled() }), [1.0, -4.0, 1.0, 1.5, 2.0]);
        assert_eq!(adjusted(Parameters { presence_penalty: 0.5, ..sampled() }), [2.0, -2.0, 1.0, 2.5, 3.5]);
        assert_eq!(adjusted(Parameters { frequency_penalty: 1.5, ..sampled() }), [2.0, -2.0, 1.0, 1.5, 1.0]);
        let biased = Parameters { logit_bias: vec![(1, 5.0), (99, 1.0)], ..sampled() };
        assert_eq!(adjusted(biased), [2.0, 3.0, 1.0, 3.0, 4.0]);
        let end = |p| adjusted(p)[EOS as usize];
        assert_eq!(end(Parameters { min_tokens: 4, ..sampled() }), f32::NEG_INFINITY);
        assert_eq!(end(Parameters { min_tokens: 3, ..sampled() }), 1.0);
        assert_eq!(end(Parameters { ignore_end: true, ..sampled() }), f32::NEG_INFINITY);
    }

    #[test]
    fn choices_depend_on_seed_number_and_place_alone() {
        let logits = vec![0.0; 1000];
        let mut sampler = Sampler::default();
        let mut pick = |seed, choice, prompt: &[u32], generated: &[u32]| {
            let p = Parameters { seed, ..sampled() };
            sampler.pick(&p, Place { prompt, generated, choice }, &mut logits.clone())
        };
        let one = pick(1, 0, &[7; 5], &[]);
        assert_eq!(one, pick(1, 0, &[9; 2], &[8; 3]));
        for other in [pick(2, 0, &[7; 5], &[]), pick(1, 1, &[7; 5], &[]), pick(1, 0, &[7; 6], &[])] {
            assert_ne!(one, other);
        }
    }

    #[test]
    fn extremes_are_harmless() {
        let mut sampler = Sampler::default();
        let place = Place { prompt: &[2], generated: &[], choice: 0 };
        for p in [
            Parameters { temperature: 1e-3, ..sampled() },
            Parameters { temperature: 1e-30, top_p: 0.9, ..sampled() },
            Parameters { temperature: 1e-30, top_k: Some(2), ..sampled() },
        ] {
            assert_eq!(sampler.pick(&p, place, &mut [-1e30, 1e30, f32::NEG_INFINITY]), 1);
        }
        assert_eq!(top(&[1.0, 3.0, 3.0, 2.0], 3), [(1, 3.0), (2, 3.0), (3, 2.0)]);
        assert_eq!((top(&[1.0], 9), top(&[1.0], 0)), (vec![(0, 1.0)], vec![]));
    }
}
