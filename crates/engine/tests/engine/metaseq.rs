//! metaseq's penalties and factual nucleus sampling, against its formulas written down plainly, in double precision.

use crate::*;
use ferropt_engine::Decay;
use ferropt_engine::sampler::{Place, Sampler};

/// A request's fields by metaseq's names.
#[derive(Clone, Copy)]
struct Fields {
    temperature: f64,
    top_p: f64,
    alpha_presence: f64,
    alpha_frequency: f64,
    alpha_presence_src: f64,
    alpha_frequency_src: f64,
    alpha_src_penalty_end_idx: i64,
    omega_bound: f64,
    lambda_decay: f64,
}

const FIELDS: Fields = Fields {
    temperature: 0.7,
    top_p: 0.9,
    alpha_presence: 0.3,
    alpha_frequency: 0.2,
    alpha_presence_src: 0.6,
    alpha_frequency_src: 0.15,
    alpha_src_penalty_end_idx: -1,
    omega_bound: 0.3,
    lambda_decay: 0.8,
};

/// Stands for `.`, `?` and `!`, often enough to come.
fn ends_a_sentence(id: u32) -> bool {
    id.is_multiple_of(9)
}

impl Fields {
    fn parameters(&self, more: Parameters) -> Parameters {
        let ends = (0..280).filter(|id| ends_a_sentence(*id)).collect();
        let decay = Decay { rate: self.lambda_decay as f32, least: self.omega_bound as f32, ends };
        let end = self.alpha_src_penalty_end_idx;
        Parameters {
            temperature: self.temperature as f32,
            top_p: self.top_p as f32,
            presence_penalty: self.alpha_presence as f32,
            frequency_penalty: self.alpha_frequency as f32,
            prompt_presence_penalty: self.alpha_presence_src as f32,
            prompt_frequency_penalty: self.alpha_frequency_src as f32,
            penalised_prompt: (end > 0).then_some(end as usize),
            penalties_after_temperature: true,
            decay: (self.lambda_decay > 0.0).then_some(decay),
            ignore_end: true,
            ..more
        }
    }

    /// The probability of each token behind a text: all but those of the nucleus have none.
    fn probabilities(&self, logits: &[f32], prompt: &[u32], generated: &[u32]) -> Vec<f64> {
        let divisor = if self.temperature > 0.0 { self.temperature } else { 1.0 };
        let mut scores: Vec<f64> = logits.iter().map(|logit| *logit as f64 / divisor).collect();
        let source = match self.alpha_src_penalty_end_idx {
            end if end > 0 => &prompt[..(end as usize).min(prompt.len())],
            _ => prompt,
        };
        for (id, score) in scores.iter_mut().enumerate() {
            let count = |tokens: &[u32]| tokens.iter().filter(|token| **token as usize == id).count() as f64;
            let there = |count: f64| if count > 0.0 { 1.0 } else { 0.0 };
            *score -= self.alpha_frequency * count(generated) + self.alpha_presence * there(count(generated));
            *score -=
                self.alpha_frequency_src * count(source) + self.alpha_presence_src * there(count(source));
        }
        scores[2] = f64::NEG_INFINITY;
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let all: f64 = scores.iter().map(|score| (score - most).exp()).sum();
        let probabilities: Vec<f64> = scores.iter().map(|score| (score - most).exp() / all).collect();
        let (mut top_p, mut since) = (self.top_p, 0);
        if self.lambda_decay > 0.0 {
            // As metaseq keeps count: after each token for the next.
            for id in generated {
                since = if ends_a_sentence(*id) { 0 } else { since + 1 };
                let exponent = (since - 1).max(0);
                top_p = self.omega_bound.max(self.top_p * self.lambda_decay.powi(exponent));
            }
        }
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
        let (mut before, mut kept) = (0.0, vec![0.0; scores.len()]);
        for id in order {
            let first = before == 0.0;
            if !first && (self.temperature == 0.0 || before >= top_p) {
                break;
            }
            kept[id] = probabilities[id];
            before += probabilities[id];
        }
        kept.iter().map(|p| p / before).collect()
    }
}

/// Logits behind every token of a text, of the tokens that the tokenizer knows.
fn logits(text: &[u32]) -> Vec<Vec<f32>> {
    plainly::<f32, _>(WeightFormat::F32, text, |device, decoder, memory| {
        let rows: Vec<u32> = (0..text.len() as u32).collect();
        let logits = decoder.head(device, &rows, memory).unwrap();
        let read = |row| {
            let mut all = vec![];
            logits.read(row, &mut all);
            all.truncate(280);
            all
        };
        (0..text.len()).map(read).collect()
    })
}

#[test]
fn tokens_come_as_often_as_metaseqs_formulas_say() {
    const DRAWS: usize = 20_000;
    let stream = Stream::new(3, Purpose::Init, 0, 0);
    let logits: Vec<f32> = (0..40).map(|i| 2.0 * stream.normal(0, i)).collect();
    let prompt = [2, 5, 7, 7, 31, 5, 7];
    let mut sampler = Sampler::default();
    for (fields, generated) in [
        (FIELDS, &[][..]),
        (FIELDS, &[7, 8, 8, 30, 7]),
        (FIELDS, &[7, 8, 18, 30, 7]),
        (Fields { alpha_src_penalty_end_idx: 3, ..FIELDS }, &[31, 31]),
        (Fields { alpha_src_penalty_end_idx: 99, lambda_decay: -1.0, ..FIELDS }, &[8; 6]),
        (Fields { alpha_frequency_src: -0.4, temperature: 2.0, omega_bound: 0.0, ..FIELDS }, &[8; 6]),
        (Fields { temperature: 0.0, ..FIELDS }, &[7, 8, 8]),
    ] {
        let want = fields.probabilities(&logits, &prompt, generated);
        let p = fields.parameters(sampled(1, 5));
        let mut got = vec![0.0; want.len()];
        for choice in 0..DRAWS {
            let place = Place { prompt: &prompt, generated, guessed: &[], choice, ends: &Ends::default() };
            got[sampler.pick(&p, place, &mut logits.clone()) as usize] += 1.0 / DRAWS as f64;
        }
        // Three standard deviations.
        for (id, (got, want)) in got.iter().zip(&want).enumerate() {
            let ok = (got - want).abs() < 0.011 && (*want > 0.0 || *got == 0.0);
            assert!(ok, "token {id} behind {generated:?} comes at a rate of {got}, expected {want}");
        }
    }
}

#[test]
fn every_text_of_a_batch_follows_its_own_fields() {
    let tokenizer = tokenizer();
    let (prompt, other) = (whole(1, 40, 60), whole(2, 25, 60));
    // Greedy texts are certain; of sampled ones, each token must be in its nucleus.
    let greedily = Fields { temperature: 0.0, ..FIELDS };
    let loose = Fields { lambda_decay: -1.0, top_p: 1.0, alpha_presence_src: 0.0, ..FIELDS };
    let tight = Fields { omega_bound: 0.02, lambda_decay: 0.5, top_p: 0.6, ..FIELDS };
    let begun = Fields { alpha_src_penalty_end_idx: 5, ..greedily };
    let asked = [
        (greedily, &prompt, Parameters::default()),
        (loose, &prompt, Parameters { n: 3, ..Parameters::default() }),
        (tight, &prompt, Parameters { n: 4, seed: 9, ..Parameters::default() }),
        (begun, &prompt, Parameters::default()),
        (tight, &other, Parameters { n: 2, best_of: Some(5), seed: 3, ..Parameters::default() }),
        (greedily, &other, Parameters { n: 2, ..Parameters::default() }),
    ];
    let few = Options {
        limits: Limits { tokens: 50, sequences: 9, reuse: true },
        cache_tokens: 16 * 64,
        draft_tokens: 8,
        pause: None,
        reserve: false,
        ends: Ends::default(),
    };
    let mut engine = engine::<f32>(&tokenizer, WeightFormat::F32, few);
    let requests = asked.iter().map(|(fields, prompt, more)| Request {
        prompt: prompt.to_vec(),
        parameters: Parameters { max_tokens: Some(60), ..fields.parameters(more.clone()) },
    });
    let numbers: Vec<u64> = requests.map(|request| engine.submit(request).unwrap()).collect();
    let made = run(&mut engine, |_, _| {});
    let mut outside = 0;
    for ((fields, prompt, more), number) in asked.iter().zip(numbers) {
        let choices = &made[&number].choices;
        assert_eq!(choices.len(), more.n);
        for text in choices {
            let written: Vec<u32> = text.tokens.iter().map(|token| token.id).collect();
            let logits = logits(&[&prompt[..], &written].concat());
            assert_eq!(written.len(), 60);
            for (at, id) in written.iter().enumerate() {
                let chance = |fields: Fields| {
                    fields.probabilities(&logits[prompt.len() - 1 + at], prompt, &written[..at])[*id as usize]
                };
                assert!(chance(*fields) > 0.0, "token {id} at {at} is not in the nucleus");
                outside += usize::from(fields.lambda_decay < 0.0 && chance(tight) == 0.0);
            }
        }
    }
    let texts = |at: usize| &made[&(at as u64)].choices;
    assert!(
        outside > 20,
        "the nucleus hardly matters: {outside} tokens of a loose one are outside of a tight one"
    );
    assert_ne!(texts(0)[0].text, texts(3)[0].text, "how much of the prompt counts is seen in the text");
}
