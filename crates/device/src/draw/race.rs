//! The noise that chooses tokens: all of them run a race, and the first to arrive is taken.
//!
//! A token of weight w arrives at E / w, with E a random number of the exponential distribution. It is the first with the
//! probability w over the sum of all weights (the Gumbel-max trick, without logarithms). E belongs to the token, in its
//! place of its text, and knows nothing of weights. So two models that find the same tokens likely also choose the same
//! ones: if t is the total variation distance of their distributions, at least with the probability (1 - t) / (1 + t)
//! (Daliri, Musco and Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024), where
//! no method can exceed 1 - t. With one random number for all tokens, as where a distribution function is inverted, a
//! small difference in one token's weight would move all behind it.
//!
//! Most times are never looked at. The smallest E of a block of tokens is drawn first: it is exponential too, at a rate
//! as large as the block, and any token's with the same probability. The others are that one plus an exponential number,
//! because the distribution has no memory. A block whose smallest E comes too late even for its largest weight is passed
//! over.

use crate::rng::{Purpose, Stream};

/// Tokens of a block, by their ids.
pub(crate) const BLOCK: usize = 64;

/// Products and quotients are rounded, so a token is passed over only if it comes this much too late.
const LATE: f32 = 1.000_001;

/// The noise of all tokens at one place of a text.
pub(crate) struct Race {
    /// Of the smallest E of each block.
    pub(crate) blocks: Stream,
    /// Of how much tokens' E exceed that.
    pub(crate) tokens: Stream,
    /// The row of both.
    pub(crate) place: u64,
}

impl Race {
    /// For text number `choice` of a request with this seed, `place` tokens after the beginning of its prompt.
    pub(crate) fn new(seed: u64, choice: usize, place: u64) -> Race {
        let stream = |which| Stream::new(seed, Purpose::Sampling, choice, which);
        Race { blocks: stream(1), tokens: stream(0), place }
    }

    /// The token that arrives first. `most` has at least the largest weight of each block, or 0 for those that do not take
    /// part, and `likely` is a token of a weight above 0.
    pub(crate) fn winner(&self, weights: &[f32], most: &[f32], likely: u32) -> u32 {
        let mut best = (self.noise(likely) / weights[likely as usize], likely);
        for (number, (block, most)) in weights.chunks(BLOCK).zip(most).enumerate() {
            if *most == 0.0 {
                continue;
            }
            let (least, whose) = self.least(number);
            if least >= best.0 * LATE * most {
                continue;
            }
            for (i, weight) in block.iter().enumerate() {
                if least < best.0 * LATE * weight {
                    let id = (number * BLOCK + i) as u32;
                    let noise = if i == whose { least } else { least + self.more(id) };
                    let arrival = (noise / weight, id);
                    if arrival < best {
                        best = arrival;
                    }
                }
            }
        }
        best.1
    }

    /// E of a token.
    fn noise(&self, id: u32) -> f32 {
        let (least, whose) = self.least(id as usize / BLOCK);
        if id as usize % BLOCK == whose { least } else { least + self.more(id) }
    }

    /// The smallest E of a block, and the place in the block where it is.
    fn least(&self, block: usize) -> (f32, usize) {
        let word = self.blocks.word(self.place, block);
        (exponential(word / BLOCK as u32, 26) / BLOCK as f32, word as usize % BLOCK)
    }

    /// By how much the E of a token exceeds the smallest of its block.
    fn more(&self, id: u32) -> f32 {
        exponential(self.tokens.word(self.place, id as usize), 32)
    }
}

/// An exponential number of rate 1 from a random word of so many bits. Small ones, which win, are as fine as the word.
fn exponential(word: u32, bits: i32) -> f32 {
    let uniform = (word as f32 + 0.5) * 2f32.powi(-bits);
    // In f32 the largest words would be 1, whose time never comes.
    minus_log_of_rest(uniform.min(1.0 - f32::EPSILON))
}

/// -ln(1 - u) for u in [0, 1), to a few units in the last place.
fn minus_log_of_rest(u: f32) -> f32 {
    /// ln((1 + s) / (1 - s)) for small s.
    fn log_of_ratio(s: f32) -> f32 {
        let square = s * s;
        let series = [1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0];
        2.0 * s * series.iter().fold(1.0 / 11.0, |sum, term| sum * square + term)
    }
    if u < 0.25 {
        return log_of_ratio(u / (2.0 - u));
    }
    // A power of two times a number between the roots of 1/2 and 2.
    let bits = (1.0 - u).to_bits();
    let exponent = (bits as i32 - 0x3f35_04f3) >> 23;
    let number = f32::from_bits((bits as i32 - (exponent << 23)) as u32);
    exponent as f32 * -std::f32::consts::LN_2 + log_of_ratio((1.0 - number) / (1.0 + number))
}

/// Replaces `most` with the largest weight of each block.
pub(crate) fn largest_of_blocks(weights: &[f32], most: &mut Vec<f32>) {
    most.clear();
    most.extend(weights.chunks(BLOCK).map(largest));
}

/// The largest of some numbers; negative infinity if there are none.
pub(crate) fn largest(values: &[f32]) -> f32 {
    const LANES: usize = 16;
    let larger = |most: &mut f32, x: f32| *most = if x > *most { x } else { *most };
    let mut most = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        most.iter_mut().zip(chunk).for_each(|(most, x)| larger(most, *x));
    }
    most.iter_mut().zip(rest).for_each(|(most, x)| larger(most, *x));
    most.into_iter().fold(f32::NEG_INFINITY, |mut most, x| {
        larger(&mut most, x);
        most
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAWS: usize = 40_000;

    fn uneven(count: usize, which: usize, spread: f32) -> Vec<f32> {
        let stream = Stream::new(9, Purpose::Init, which, 0);
        (0..count).map(|i| (spread * stream.normal(0, i)).exp()).collect()
    }

    fn winner(seed: u64, place: u64, weights: &[f32]) -> u32 {
        let mut most = Vec::new();
        largest_of_blocks(weights, &mut most);
        let likely = (0..weights.len()).max_by(|a, b| weights[*a].total_cmp(&weights[*b])).unwrap();
        Race::new(seed, 2, place).winner(weights, &most, likely as u32)
    }

    #[test]
    fn noise_is_exponential_and_that_of_neighbours_is_independent() {
        let race = |place| Race::new(3, 0, place);
        // A whole block and the beginning of another.
        let noise: Vec<[f32; 70]> =
            (0..DRAWS as u64).map(|place| std::array::from_fn(|id| race(place).noise(id as u32))).collect();
        let share = |holds: &dyn Fn(&[f32; 70]) -> bool| {
            noise.iter().filter(|noise| holds(noise)).count() as f64 / DRAWS as f64
        };
        // Four standard deviations of a share, at most.
        let near = |got: f64, want: f64| {
            assert!((got - want).abs() < 4.0 * (0.25 / DRAWS as f64).sqrt(), "{got}, not {want}")
        };
        for id in [0, 13, 63, 64, 69] {
            for x in [0.01f32, 0.1, 0.7, 2.0, 5.0] {
                near(share(&|noise| noise[id] < x), 1.0 - (-x as f64).exp());
            }
            near(
                share(&|noise| noise[id] < 0.5 && noise[(id + 1) % 70] < 0.5),
                (1.0 - 0.5f64.exp().recip()).powi(2),
            );
        }
        let all = |x: f32| (-64.0 * x as f64).exp();
        near(share(&|noise| noise[..64].iter().all(|e| *e > 0.01)), all(0.01));
    }

    #[test]
    fn logarithms_are_those_of_the_library() {
        let all = (0..100_000).map(|i| i as f32 / 100_000.0).chain((1..126).map(|n| 2f32.powi(-n)));
        for u in all.chain([1.0 - f32::EPSILON]) {
            let (got, want) = (minus_log_of_rest(u) as f64, -(-u as f64).ln_1p());
            assert!((got - want).abs() <= 4.0 * f32::EPSILON as f64 * want, "{u}: {got}, not {want}");
        }
    }

    #[test]
    fn tokens_win_as_often_as_their_weights_say() {
        for (count, spread) in [(5, 1.0), (64, 0.5), (200, 2.0)] {
            let weights = uneven(count, count, spread);
            let sum: f32 = weights.iter().sum();
            let mut wins = vec![0.0f64; count];
            (0..DRAWS as u64).for_each(|place| wins[winner(1, place, &weights) as usize] += 1.0);
            // Chi-square has as many degrees of freedom as tokens that are expected often enough, about.
            let (mut chi, mut degrees) = (0.0f64, 0.0f64);
            for (wins, weight) in wins.iter().zip(&weights) {
                let expected = (weight / sum) as f64 * DRAWS as f64;
                if expected > 10.0 {
                    chi += (wins - expected).powi(2) / expected;
                    degrees += 1.0;
                }
            }
            assert!(chi < degrees + 5.0 * (2.0 * degrees).sqrt(), "{count}: {chi} for {degrees}");
        }
    }

    #[test]
    fn passing_over_blocks_changes_no_winner() {
        for (which, spread) in [(0, 0.1), (1, 1.0), (2, 3.0), (3, 8.0)] {
            let weights = uneven(1000, which, spread);
            for place in 0..200 {
                let race = Race::new(7, 2, place);
                let times = (0..1000).map(|id| (race.noise(id) / weights[id as usize], id));
                let want = times.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap().1;
                assert_eq!(winner(7, place, &weights), want, "spread {spread}, place {place}");
            }
        }
    }

    #[test]
    fn models_that_are_alike_choose_alike() {
        for (count, difference) in [(50, 0.3), (50, 1.0), (3000, 0.5)] {
            let ours = uneven(count, 1, 2.0);
            let other: Vec<f32> = ours.iter().zip(uneven(count, 2, difference)).map(|(a, b)| a * b).collect();
            let [sum, other_sum] = [&ours, &other].map(|w| w.iter().map(|w| *w as f64).sum::<f64>());
            let p = ours.iter().map(|w| *w as f64 / sum);
            let q = other.iter().map(|w| *w as f64 / other_sum);
            let distance = p.zip(q).map(|(p, q)| (p - q).abs()).sum::<f64>() / 2.0;
            let draws = DRAWS / 10;
            let same = (0..draws as u64)
                .filter(|place| winner(1, *place, &ours) == winner(1, *place, &other))
                .count();
            let same = same as f64 / draws as f64;
            let bound = (1.0 - distance) / (1.0 + distance);
            let slack = 4.0 * (0.25 / draws as f64).sqrt();
            assert!(
                same > bound - slack && same < 1.0 - distance + slack,
                "{same}: {bound} to {}",
                1.0 - distance
            );
        }
    }

    #[test]
    fn noise_does_not_depend_on_the_vocabulary() {
        let weights = uneven(130, 5, 1.0);
        for place in 0..300 {
            let winner_of_all = winner(1, place, &weights);
            if winner_of_all < 100 {
                assert_eq!(winner(1, place, &weights[..100]), winner_of_all);
            }
        }
        assert_eq!(winner(1, 0, &[0.0, 0.0, 1e-30, 0.0]), 2, "weights of 0 never win");
    }
}
