//! Choosing a token from logits.

use crate::adjust::{adjust, end_allowed, nucleus};
use crate::ends::Ends;
use crate::parameters::Parameters;
use ferropt_device::{Draw, Drawer};

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
    /// What ends it.
    pub ends: &'a Ends,
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

/// How a token is drawn where logits are as they are to be, which of several ends that must not come they are already; none
/// if the likeliest one is taken.
pub(crate) fn draw(p: &Parameters, place: Place<'_>) -> Option<Draw> {
    (p.temperature > 0.0).then(|| Draw {
        temperature: p.temperature,
        top_k: p.top_k,
        top_p: nucleus(p, place),
        min_p: p.min_p,
        without: place.ends.single().filter(|_| !end_allowed(p, place.written())),
        seed: p.seed,
        choice: place.choice,
        place: place.position(),
    })
}

/// Memory that is used again for each token.
#[derive(Default)]
pub struct Sampler(Drawer);

impl Sampler {
    /// The token that follows. The logits are changed on the way. The same parameters, place and logits give the same
    /// token.
    pub fn pick(&mut self, p: &Parameters, place: Place<'_>, logits: &mut [f32]) -> u32 {
        adjust(p, place, logits);
        match draw(p, place) {
            Some(draw) => self.0.draw(&draw, logits),
            None => {
                let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                logits.iter().position(|logit| *logit == most).unwrap_or(0) as u32
            }
        }
    }
}

/// The `count` largest logits with their ids, largest first, equal ones by id. Takes memory for so many, not for all: answers
/// keep these lists until they are sent.
pub fn top(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let count = count.min(logits.len());
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count);
    for (id, logit) in (0..).zip(logits.iter().copied()) {
        if best.len() == count {
            if best.last().is_none_or(|least| logit.total_cmp(&least.1).is_le()) {
                continue;
            }
            best.pop();
        }
        // Behind equal ones, whose ids are smaller.
        let at = best.partition_point(|other| other.1.total_cmp(&logit).is_ge());
        best.insert(at, (id, logit));
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_depend_on_seed_number_and_place_alone() {
        let logits = vec![0.0; 1000];
        let mut sampler = Sampler::default();
        let mut pick = |seed, choice, prompt: &[u32], generated: &[u32]| {
            let p = Parameters { seed, ..Parameters::default() };
            sampler.pick(
                &p,
                Place { prompt, generated, guessed: &[], choice, ends: &Ends::default() },
                &mut logits.clone(),
            )
        };
        let one = pick(1, 0, &[7; 5], &[]);
        assert_eq!(one, pick(1, 0, &[9; 2], &[8; 3]));
        for other in [pick(2, 0, &[7; 5], &[]), pick(1, 1, &[7; 5], &[]), pick(1, 0, &[7; 6], &[])] {
            assert_ne!(one, other);
        }
    }

    #[test]
    fn without_a_temperature_the_likeliest_that_is_allowed_is_taken() {
        let place = Place { prompt: &[5], generated: &[], guessed: &[], choice: 0, ends: &Ends::default() };
        let pick = |p: Parameters, logits: [f32; 4]| Sampler::default().pick(&p, place, &mut logits.clone());
        let greedy = || Parameters { temperature: 0.0, ..Parameters::default() };
        assert_eq!(pick(greedy(), [1.0, 2.0, 3.0, 3.0]), 2);
        assert_eq!(pick(Parameters { ignore_end: true, ..greedy() }, [1.0, 2.0, 3.0, 3.0]), 3);
        assert_eq!(pick(Parameters { logit_bias: vec![(0, 9.0)], ..greedy() }, [1.0, 2.0, 3.0, 3.0]), 0);
        assert_eq!(pick(greedy(), [f32::NAN, f32::NAN, 1.0, 0.0]), 2);
        assert_eq!(pick(greedy(), [f32::NAN; 4]), 0);
        // So it is with one of next to nothing, and the end is not drawn where it must not be.
        let cold = Parameters { temperature: 1e-30, ignore_end: true, ..Parameters::default() };
        assert_eq!(pick(cold, [1.0, 2.0, 4.0, 3.0]), 3);
    }

    #[test]
    fn the_likeliest_come_first_and_equal_ones_by_id() {
        assert_eq!(top(&[1.0, 3.0, 3.0, 2.0], 3), [(1, 3.0), (2, 3.0), (3, 2.0)]);
        assert_eq!((top(&[1.0], 9), top(&[1.0], 0)), (vec![(0, 1.0)], vec![]));
        assert_eq!(top(&[-0.0, 0.0, f32::NEG_INFINITY], 2), [(1, 0.0), (0, -0.0)]);
    }

    #[test]
    fn the_likeliest_take_no_more_memory_than_they_are() {
        // Many ties, in an order that jumps about.
        let logits: Vec<f32> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as f32).collect();
        let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for count in [1, 2, 5, 20, 100, 5000, 9999] {
            let top = top(&logits, count);
            assert_eq!(top, all[..count.min(5000)]);
            assert!(top.capacity() <= count, "{} for {count}", top.capacity());
        }
    }
}
