//! Choosing a token from the logits of a row, at random: [`Device::draw`](crate::Device::draw).
//!
//! Devices choose the same token, to the bit. Exponentials and logarithms are made of sums and products that all make alike, and
//! sums over a vocabulary are of whole numbers, which do not depend on the order.

mod race;

use race::{BLOCK, Race, largest, largest_of_blocks};

/// How a token is chosen from the logits of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; above 0.
    pub temperature: f32,
    /// Only among that many of the likeliest, at least one.
    pub top_k: Option<usize>,
    /// Of those, only the fewest that together have this share of their probability. 1 leaves none out.
    pub top_p: f32,
    /// Of those, only the ones at least this share as likely as the likeliest.
    pub min_p: f32,
    /// A token that is not chosen, as if its logit were minus infinity.
    pub without: Option<u32>,
    /// Seed of the choices.
    pub seed: u64,
    /// Number of the text among those of a request, below 2^24.
    pub choice: usize,
    /// Place in the text. The same seed, choice, place and logits give the same token.
    pub place: u64,
}

impl Draw {
    /// What distances between logits are multiplied with. Not infinite, because the likeliest is at a distance of 0.
    pub(crate) fn scale(&self) -> f32 {
        self.temperature.recip().min(f32::MAX)
    }

    /// The noise that chooses.
    pub(crate) fn race(&self) -> Race {
        Race::new(self.seed, self.choice, self.place)
    }
}

/// Chooses on the processor, in memory that is used again for each token.
#[derive(Default)]
pub struct Drawer {
    /// How likely tokens are beside the likeliest, and the largest of each block.
    weights: Vec<f32>,
    most: Vec<f32>,
    candidates: Vec<u64>,
}

impl Drawer {
    /// The token that is drawn. Where no logit is finite, one of the largest, or 0.
    pub fn draw(&mut self, draw: &Draw, logits: &[f32]) -> u32 {
        let without = draw.without.map_or(usize::MAX, |id| id as usize);
        let (before, after) = logits.split_at(without.min(logits.len()));
        let most = largest(&[largest(before), largest(after.get(1..).unwrap_or_default())]);
        self.weigh(draw, logits, most);
        if let Some(likely) = self.weights.iter().position(|w| *w == 1.0) {
            self.leave_out(draw);
            return draw.race().winner(&self.weights, &self.most, likely as u32);
        }
        let place = logits.iter().enumerate().position(|(id, logit)| id != without && *logit == most);
        place.unwrap_or(0) as u32
    }

    /// Makes logits weights, of which the largest is 1.
    fn weigh(&mut self, draw: &Draw, logits: &[f32], most: f32) {
        let scale = draw.scale();
        self.weights.clear();
        self.weights.extend(logits.iter().map(|logit| exp((logit - most) * scale)));
        if let Some(weight) = draw.without.and_then(|id| self.weights.get_mut(id as usize)) {
            *weight = 0.0;
        }
        largest_of_blocks(&self.weights, &mut self.most);
    }

    /// Takes the weight from tokens that are not to be chosen.
    fn leave_out(&mut self, draw: &Draw) {
        let top_k = draw.top_k.filter(|k| *k < self.weights.len());
        if top_k.is_some() || draw.top_p < 1.0 {
            let (weight, id) = self.last_kept(top_k, draw.top_p);
            self.keep(|w, i| w > weight || (w == weight && i <= id), weight);
        }
        if draw.min_p > 0.0 {
            self.keep(|w, _| w >= draw.min_p, draw.min_p);
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
        let mut all = 0;
        let least = match top_k {
            Some(k) if k > self.most.len() => 0.0,
            Some(k) => *self.most.clone().select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1,
            None => {
                all = self.weights.iter().map(|w| mass(*w)).sum();
                let mean = all as f64 / mass(1.0) as f64 / self.weights.len() as f64;
                ((1.0 - top_p as f64) * mean) as f32 * 0.999
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
            all = mass_of(kept);
        }
        let mut needed = share(top_p, all);
        while kept.len() > 1 {
            let half = kept.len() / 2;
            kept.select_nth_unstable_by(half, |a, b| b.cmp(a));
            let (upper, lower) = kept.split_at_mut(half);
            let mass = mass_of(upper);
            if mass >= needed {
                kept = upper;
            } else {
                (kept, needed) = (lower, needed - mass);
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

/// A weight as a whole number.
fn mass(weight: f32) -> u64 {
    const ONE: f32 = (1u64 << 40) as f32;
    // Through i64, which processors convert to by one instruction.
    (weight * ONE) as i64 as u64
}

fn mass_of(keys: &[u64]) -> u64 {
    keys.iter().map(|key| mass(weight_and_id(*key).0)).sum()
}

/// The least mass that is the share `top_p` of all.
fn share(top_p: f32, all: u64) -> u64 {
    ((top_p as f64 * all as f64).ceil() as u64).max(1)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    const DRAWS: usize = 20_000;
    /// Three standard deviations of a share of 20,000.
    const SLACK: f64 = 0.011;

    fn plain() -> Draw {
        Draw {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            without: None,
            seed: 3,
            choice: 3,
            place: 0,
        }
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let p: [f64; 5] = [0.1, 0.4, 0.2, 0.25, 0.05];
        let logits = p.map(|p| p.ln() as f32 + 7.0);
        let mut drawer = Drawer::default();
        let mut near = |draw: Draw, want: [f64; 5]| {
            let mut shares = [0.0; 5];
            for place in 0..DRAWS {
                let draw = Draw { place: place as u64, ..draw };
                shares[drawer.draw(&draw, &logits) as usize] += 1.0 / DRAWS as f64;
            }
            for (got, want) in shares.iter().zip(want) {
                let ok = (got - want).abs() < SLACK && (want > 0.0 || *got == 0.0);
                assert!(ok, "{got}, expected {want}: {draw:?}");
            }
        };
        near(plain(), p);
        let hot = p.map(|p| p.sqrt());
        near(Draw { temperature: 2.0, ..plain() }, hot.map(|x| x / hot.iter().sum::<f64>()));
        near(Draw { top_k: Some(2), ..plain() }, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]);
        // 0.4 + 0.25 is below 0.7, so the third is needed too.
        near(Draw { top_p: 0.7, ..plain() }, [0.0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0.0]);
        near(Draw { top_k: Some(2), top_p: 0.3, ..plain() }, [0.0, 1.0, 0.0, 0.0, 0.0]);
        near(Draw { min_p: 0.5, ..plain() }, [0.0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0.0]);
        near(Draw { min_p: 0.6, top_p: 0.99, ..plain() }, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]);
        near(Draw { without: Some(1), ..plain() }, [0.1 / 0.6, 0.0, 0.2 / 0.6, 0.25 / 0.6, 0.05 / 0.6]);
        near(Draw { without: Some(1), top_k: Some(1), ..plain() }, [0.0, 0.0, 0.0, 1.0, 0.0]);
        near(Draw { without: Some(5), top_k: Some(1), ..plain() }, [0.0, 1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn tokens_are_kept_as_their_definition_says() {
        let stream = Stream::new(1, Purpose::Init, 0, 0);
        let mut drawer = Drawer::default();
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
                    let draw = Draw { top_k, top_p, min_p, temperature: 0.8, ..plain() };
                    drawer.weigh(&draw, &logits, most);
                    let mut likely: Vec<(f32, usize)> = drawer.weights.iter().copied().zip(0..).collect();
                    likely.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                    likely.truncate(top_k.unwrap_or(usize::MAX));
                    let all: u64 = likely.iter().map(|(w, _)| mass(*w)).sum();
                    let (mut sum, mut want) = (0, vec![0.0; 5000]);
                    for (w, id) in likely {
                        if top_p < 1.0 && sum as f64 >= top_p as f64 * all as f64 {
                            break;
                        }
                        sum += mass(w);
                        want[id] = if w >= min_p { w } else { 0.0 };
                    }
                    drawer.leave_out(&draw);
                    // Blocks without weight are marked as such.
                    for (block, most) in drawer.weights.chunks_mut(BLOCK).zip(&drawer.most) {
                        if *most == 0.0 {
                            block.fill(0.0);
                        }
                    }
                    assert!(drawer.weights == want, "spread {spread}, step {step}: {draw:?}");
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
    fn extremes_are_harmless() {
        let mut drawer = Drawer::default();
        for draw in [
            Draw { temperature: 1e-3, ..plain() },
            Draw { temperature: 1e-30, top_p: 0.9, ..plain() },
            Draw { temperature: 1e-30, top_k: Some(2), ..plain() },
            Draw { top_p: 1e-30, ..plain() },
        ] {
            assert_eq!(drawer.draw(&draw, &[-1e30, 1e30, f32::NEG_INFINITY]), 1);
        }
        // What a broken model gives chooses something, too.
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (top_k, top_p) in [(None, 1.0), (None, 0.9), (Some(2), 0.9)] {
                let draw = Draw { top_k, top_p, without: Some(3), ..plain() };
                assert!(drawer.draw(&draw, &[broken; 4]) < 4);
                assert!(drawer.draw(&draw, &[1.0, broken, 2.0, broken]) < 4);
            }
        }
    }
}
