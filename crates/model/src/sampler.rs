//! Choosing a token from logits.

use anyhow::{Result, ensure};
use ferropt_device::rng::{Purpose, Stream};

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Choice {
    /// The likeliest, the lowest id of those that are equal.
    Greedy,
    /// At random, by probability.
    Sample {
        /// Divides the logits.
        temperature: f32,
        /// Only among that many of the likeliest.
        top_k: Option<usize>,
        /// Only among the fewest that together have this probability (Holtzman et al., 2020), after `top_k`.
        top_p: f32,
    },
}

/// Chooses tokens; the same seed, place and logits give the same token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    choice: Choice,
    stream: Stream,
}

impl Sampler {
    /// Sampling with numbers that follow from `seed`.
    ///
    /// # Errors
    /// Names the value that is out of range.
    pub fn new(choice: Choice, seed: u64) -> Result<Sampler> {
        if let Choice::Sample { temperature, top_k, top_p } = choice {
            ensure!(
                temperature > 0.0 && temperature.is_finite(),
                "temperature = {temperature} is not a number above 0; for the likeliest token choose greedy"
            );
            ensure!(top_k != Some(0), "top-k = 0 leaves no token to choose from; use 1 or more");
            ensure!(top_p > 0.0 && top_p <= 1.0, "top-p = {top_p} is not a probability above 0, up to 1");
        }
        Ok(Sampler { choice, stream: Stream::new(seed, Purpose::Sampling, 0, 0) })
    }

    /// The token at `place` (tokens since the start of the text).
    pub fn pick(&self, logits: &[f32], place: u64) -> u32 {
        match self.choice {
            Choice::Greedy => greedy(logits),
            Choice::Sample { temperature, top_k, top_p } => {
                let likeliest = likeliest(logits, top_k);
                sample(&likeliest, temperature, top_p, self.stream.uniform(place, 0))
            }
        }
    }
}

fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// The `top_k` highest logits (all without it) with their ids, highest first, equal ones by id.
fn likeliest(logits: &[f32], top_k: Option<usize>) -> Vec<(f32, u32)> {
    let mut all: Vec<(f32, u32)> = logits.iter().zip(0..).map(|(logit, id)| (*logit, id)).collect();
    let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if let Some(k) = top_k.filter(|k| *k < all.len()) {
        all.select_nth_unstable_by(k, order);
        all.truncate(k);
    }
    all.sort_unstable_by(order);
    all
}

/// Inverts the distribution function at `u` in [0, 1), over the shortest head of the list that has `top_p` of it.
fn sample(likeliest: &[(f32, u32)], temperature: f32, top_p: f32, u: f32) -> u32 {
    let weight = |logit: f32| (((logit - likeliest[0].0) / temperature) as f64).exp();
    let total: f64 = likeliest.iter().map(|(logit, _)| weight(*logit)).sum();
    let (mut kept, mut mass) = (0, 0.0);
    while kept < likeliest.len() && (kept == 0 || mass < top_p as f64 * total) {
        mass += weight(likeliest[kept].0);
        kept += 1;
    }
    let mut left = u as f64 * mass;
    for (logit, id) in &likeliest[..kept] {
        left -= weight(*logit);
        if left < 0.0 {
            return *id;
        }
    }
    likeliest[kept - 1].1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(choice: Choice, logits: &[f32]) -> Vec<f64> {
        let sampler = Sampler::new(choice, 3).unwrap();
        let mut counts = vec![0.0; logits.len()];
        for place in 0..20_000 {
            counts[sampler.pick(logits, place) as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    /// Three standard deviations of a share of 20,000.
    const SLACK: f64 = 0.011;

    #[test]
    fn frequencies_follow_the_probabilities() {
        let p: [f64; 5] = [0.1, 0.4, 0.2, 0.25, 0.05];
        let logits = p.map(|p| p.ln() as f32 + 7.0);
        let near = |got: Vec<f64>, want: [f64; 5]| {
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() < SLACK && (want > 0.0 || *got == 0.0), "{got}, expected {want}");
            }
        };
        let sample = |temperature, top_k, top_p| Choice::Sample { temperature, top_k, top_p };
        near(counts(sample(1.0, None, 1.0), &logits), p);
        let hot = p.map(|p| p.sqrt());
        near(counts(sample(2.0, None, 1.0), &logits), hot.map(|x| x / hot.iter().sum::<f64>()));
        near(counts(sample(1.0, Some(2), 1.0), &logits), [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]);
        // 0.4 + 0.25 is below 0.7, so the third is needed too.
        near(counts(sample(1.0, None, 0.7), &logits), [0.0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0.0]);
        near(counts(sample(1.0, Some(2), 0.3), &logits), [0.0, 1.0, 0.0, 0.0, 0.0]);
        near(counts(Choice::Greedy, &logits), [0.0, 1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn extremes_are_harmless_and_nonsense_is_refused() {
        let wild = Choice::Sample { temperature: 1e-3, top_k: Some(100), top_p: 1.0 };
        assert_eq!(Sampler::new(wild, 0).unwrap().pick(&[-1e30, 1e30, f32::NEG_INFINITY], 0), 1);
        for (wrong, name) in [
            (Choice::Sample { temperature: -1.0, top_k: None, top_p: 1.0 }, "temperature = -1"),
            (Choice::Sample { temperature: 1.0, top_k: Some(0), top_p: 1.0 }, "top-k = 0"),
            (Choice::Sample { temperature: 1.0, top_k: None, top_p: 1.5 }, "top-p = 1.5"),
        ] {
            assert!(Sampler::new(wrong, 0).unwrap_err().to_string().contains(name));
        }
    }
}
