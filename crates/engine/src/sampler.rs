//! Choosing a token from logits.

use crate::adjust::{adjust, nucleus};
use crate::parameters::Parameters;
use crate::race::{BLOCK, Race, largest, largest_of_blocks};

/// Where in which text a token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// Tokens that were generated.
    pub generated: &'a [u32],
    /// Tokens that are supposed to follow them.
    pub guessed: &'a [u32],
    /// Number of the text in its request.
    pub choice: usize,
}

impl Place<'_> {
    /// Tokens before the one to choose.
    fn position(&self) -> u64 {
        (self.prompt.len() + self.written()) as u64
    }

    /// Of those, how many are not the prompt's.
    pub(crate) fn written(&self) -> usize {
        self.generated.len() + self.guessed.len()
    }
}

/// Memory that is used again for each token.
#[derive(Default)]
pub struct Sampler {
    /// How likely tokens are beside the likeliest, and the largest of each block.
    weights: Vec<f32>,
    most: Vec<f32>,
    candidates: Vec<u64>,
}

impl Sampler {
    /// The token that follows. The logits are changed on the way. The same parameters, place and logits give the same
    /// token.
    pub fn pick(&mut self, p: &Parameters, place: Place<'_>, logits: &mut [f32]) -> u32 {
        adjust(p, place, logits);
        let most = largest(logits);
        if p.temperature > 0.0 {
            self.weigh(p, logits, most);
            if let Some(likely) = self.weights.iter().position(|w| *w == 1.0) {
                self.leave_out(p, nucleus(p, place));
                let race = Race::new(p.seed, place.choice, place.position());
                return race.winner(&self.weights, &self.most, likely as u32);
            }
        }
        logits.iter().position(|logit| *logit == most).unwrap_or(0) as u32
    }

    /// Makes logits weights, of which the largest is 1.
    fn weigh(&mut self, p: &Parameters, logits: &[f32], most: f32) {
        // Not infinite, because the likeliest is at a distance of 0.
        let scale = p.temperature.recip().min(f32::MAX);
        self.weights.clear();
        self.weights.extend(logits.iter().map(|logit| exp((logit - most) * scale)));
        largest_of_blocks(&self.weights, &mut self.most);
    }

    /// Takes the weight from tokens that are not to be chosen.
    fn leave_out(&mut self, p: &Parameters, top_p: f32) {
        let top_k = p.top_k.filter(|k| *k < self.weights.len());
        if top_k.is_some() || top_p < 1.0 {
            let (weight, id) = self.last_kept(top_k, top_p);
            self.keep(|w, i| w > weight || (w == weight && i <= id), weight);
        }
        if p.min_p > 0.0 {
            self.keep(|w, _| w >= p.min_p, p.min_p);
        }
    }

    /// Takes the weight from tokens of which `kept` does not hold, as it does of none below `least`.
    fn keep(&mut self, kept: impl Fn(f32, u32) -> bool, least: f32) {
        let blocks = self.weights.chunks_mut(BLOCK).zip(&mut self.most).zip((0..).step_by(BLOCK));
        for ((block, most), first) in blocks {
            if *most < least {
                *most = 0.0;
            }
            if *most > 0.0 {
                block.iter_mut().zip(first..).for_each(|(w, i)| *w = if kept(*w, i) { *w } else { 0.0 });
            }
        }
    }

    /// Weight and id of the last token that is kept, likeliest first and equal ones by id: of the first `top_k`, the fewest
    /// that have the share `top_p` of their sum.
    fn last_kept(&mut self, top_k: Option<usize>, top_p: f32) -> (f32, u32) {
        // Most tokens need no ordering. With top_k, at least k are as likely as the k-th of the blocks' likeliest. With
        // top_p alone, all that are below `least` have less than 1 - top_p together.
        let mut all = 0.0;
        let least = match top_k {
            Some(k) if k > self.most.len() => 0.0,
            Some(k) => *self.most.clone().select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1,
            None => {
                all = sum(&self.weights);
                ((1.0 - top_p as f64) * all / self.weights.len() as f64) as f32 * 0.999
            }
        };
        self.candidates.clear();
        for ((block, most), first) in self.weights.chunks(BLOCK).zip(&self.most).zip((0..).step_by(BLOCK)) {
            if *most >= least {
                // All are written, and those that are not kept are written over: a branch would be guessed wrong too often.
                let mut end = self.candidates.len();
                self.candidates.resize(end + block.len(), 0);
                for (w, id) in block.iter().zip(first..) {
                    self.candidates[end] = key(*w, id);
                    end += usize::from(*w >= least);
                }
                self.candidates.truncate(end);
            }
        }
        let mut kept = &mut self.candidates[..];
        if let Some(k) = top_k {
            let last = *kept.select_nth_unstable_by(k - 1, |a, b| b.cmp(a)).1;
            if top_p == 1.0 {
                return weight_and_id(last);
            }
            kept = &mut kept[..k];
            all = weight_of(kept);
        }
        let mut needed = top_p as f64 * all;
        while kept.len() > 1 {
            let half = kept.len() / 2;
            kept.select_nth_unstable_by(half, |a, b| b.cmp(a));
            let (upper, lower) = kept.split_at_mut(half);
            let weight = weight_of(upper);
            if weight >= needed {
                kept = upper;
            } else {
                (kept, needed) = (lower, needed - weight);
            }
        }
        weight_and_id(kept[0])
    }
}

/// A number for each token that is larger for likelier ones, and for lower ids of equally likely ones.
fn key(weight: f32, id: u32) -> u64 {
    (weight.to_bits() as u64) << 32 | !id as u64
}

fn weight_and_id(key: u64) -> (f32, u32) {
    (f32::from_bits((key >> 32) as u32), !(key as u32))
}

fn weight_of(keys: &[u64]) -> f64 {
    keys.iter().map(|key| weight_and_id(*key).0 as f64).sum()
}

/// In lanes, so that it takes one pass at the speed of memory.
fn sum(values: &[f32]) -> f64 {
    let mut sums = [0.0; 8];
    let (chunks, rest) = values.as_chunks::<8>();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += *x as f64);
    }
    sums.iter().sum::<f64>() + rest.iter().map(|x| *x as f64).sum::<f64>()
}

/// e to the power of a number up to 0, to a few units in the last place; 0 where it has hardly any bits left. The standard
/// library's takes one number at a time; of this, compilers make vectors, which is several times as fast.
fn exp(x: f32) -> f32 {
    // A number of this size has no bits below 1: adding it rounds, and leaves the whole number in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    // ln 2 in two parts, the first of few bits, so that its product is exact.
    let rest = (x - whole * 0.693_359_4) + whole * 2.121_944_4e-4;
    let series = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let power = series.iter().fold(1.0 / 5040.0, |sum, term| sum * rest + term);
    let result = power * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x > -87.0 { result } else { 0.0 }
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
    use ferropt_device::rng::{Purpose, Stream};

    const DRAWS: usize = 20_000;
    /// Three standard deviations of a share of 20,000.
    const SLACK: f64 = 0.011;

    fn counts(p: &Parameters, logits: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::default();
        let mut counts = vec![0.0; logits.len()];
        let prompt = vec![5; DRAWS];
        for position in 0..DRAWS {
            let place = Place { prompt: &prompt[..position], generated: &[], guessed: &[], choice: 3 };
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
    fn tokens_are_kept_as_their_definition_says() {
        let stream = Stream::new(1, Purpose::Init, 0, 0);
        let mut sampler = Sampler::default();
        for (spread, step) in [(3.0f32, 0.0f32), (0.02, 0.0), (2.0, 0.5), (9.0, 0.0)] {
            // With a step many are equal.
            let logits: Vec<f32> = (0..5000)
                .map(|i| spread * stream.normal(0, i))
                .map(|l| if step > 0.0 { (l / step).round() * step } else { l })
                .collect();
            let most = largest(&logits);
            for top_k in [None, Some(1), Some(40), Some(79), Some(1000), Some(4999), Some(5000)] {
                for (top_p, min_p) in
                    [(1.0, 0.0), (0.05, 0.0), (0.5, 0.3), (0.9, 0.0), (0.999, 1e-3), (1.0, 0.1)]
                {
                    let p = Parameters { top_k, top_p, min_p, temperature: 0.8, ..sampled() };
                    sampler.weigh(&p, &logits, most);
                    let mut likely: Vec<(f32, usize)> = sampler.weights.iter().copied().zip(0..).collect();
                    likely.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                    likely.truncate(top_k.unwrap_or(usize::MAX));
                    let all: f64 = likely.iter().map(|(w, _)| *w as f64).sum();
                    let (mut mass, mut want) = (0.0, vec![0.0; 5000]);
                    for (w, id) in likely {
                        if top_p < 1.0 && mass >= top_p as f64 * all {
                            break;
                        }
                        mass += w as f64;
                        want[id] = if w >= min_p { w } else { 0.0 };
                    }
                    sampler.leave_out(&p, top_p);
                    // Blocks without weight are marked as such.
                    for (block, most) in sampler.weights.chunks_mut(BLOCK).zip(&sampler.most) {
                        if *most == 0.0 {
                            block.fill(0.0);
                        }
                    }
                    assert!(sampler.weights == want, "spread {spread}, step {step}: {p:?}");
                }
            }
        }
    }

    #[test]
    fn exponentials_are_those_of_the_library() {
        for i in 0..100_000 {
            let x = -87.0 * (i as f32 / 100_000.0).powi(2);
            let error = (exp(x) as f64 / (x as f64).exp() - 1.0).abs();
            assert!(error < 4.0 * f32::EPSILON as f64, "e^{x}: {error}");
        }
        assert_eq!([0.0, -88.0, f32::NEG_INFINITY, f32::NAN].map(exp), [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn choices_depend_on_seed_number_and_place_alone() {
        let logits = vec![0.0; 1000];
        let mut sampler = Sampler::default();
        let mut pick = |seed, choice, prompt: &[u32], generated: &[u32]| {
            let p = Parameters { seed, ..sampled() };
            sampler.pick(&p, Place { prompt, generated, guessed: &[], choice }, &mut logits.clone())
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
        let place = Place { prompt: &[2], generated: &[], guessed: &[], choice: 0 };
        for p in [
            Parameters { temperature: 1e-3, ..sampled() },
            Parameters { temperature: 1e-30, top_p: 0.9, ..sampled() },
            Parameters { temperature: 1e-30, top_k: Some(2), ..sampled() },
        ] {
            assert_eq!(sampler.pick(&p, place, &mut [-1e30, 1e30, f32::NEG_INFINITY]), 1);
        }
        // What a broken model gives chooses something, too.
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (top_k, top_p) in [(None, 1.0), (None, 0.9), (Some(2), 0.9)] {
                let p = Parameters { top_k, top_p, ..sampled() };
                assert!(sampler.pick(&p, place, &mut [broken; 4]) < 4);
                assert!(sampler.pick(&p, place, &mut [1.0, broken, 2.0, broken]) < 4);
            }
        }
        assert_eq!(top(&[1.0, 3.0, 3.0, 2.0], 3), [(1, 3.0), (2, 3.0), (3, 2.0)]);
        assert_eq!((top(&[1.0], 9), top(&[1.0], 0)), (vec![(0, 1.0)], vec![]));
    }
}
