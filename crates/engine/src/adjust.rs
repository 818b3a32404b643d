//! What happens to the model's logits before a token is chosen: penalties, bias, and whether the text may end; and how large
//! the nucleus is at a place.

use crate::parameters::Parameters;
use crate::sampler::Place;
use std::collections::HashMap;

/// Whether logits are as the model gives them, but for the end's.
pub(crate) fn unchanged(p: &Parameters) -> bool {
    let penalties =
        [p.presence_penalty, p.frequency_penalty, p.prompt_presence_penalty, p.prompt_frequency_penalty];
    p.repetition_penalty == 1.0 && penalties == [0.0; 4] && p.logit_bias.is_empty()
}

/// Whether the text may end here.
pub(crate) fn end_allowed(p: &Parameters, generated: usize) -> bool {
    !p.ignore_end && generated >= p.min_tokens
}

/// Penalties, bias, and whether the text may end.
pub(crate) fn adjust(p: &Parameters, place: Place<'_>, logits: &mut [f32]) {
    let written = || place.generated.iter().chain(place.guessed);
    if p.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = place.prompt.iter().chain(written()).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                let r = p.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / r } else { *logit * r };
            }
        }
    }
    // The temperature divides what is taken off here, too.
    let scale = if p.penalties_after_temperature && p.temperature > 0.0 { p.temperature } else { 1.0 };
    let mut penalise = |tokens: &mut dyn Iterator<Item = &u32>, presence: f32, frequency: f32| {
        if presence == 0.0 && frequency == 0.0 {
            return;
        }
        let mut counts: HashMap<u32, u32> = HashMap::new();
        tokens.for_each(|id| *counts.entry(*id).or_default() += 1);
        for (id, count) in counts {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = *logit - scale * presence - scale * frequency * count as f32;
            }
        }
    };
    penalise(&mut written(), p.presence_penalty, p.frequency_penalty);
    let penalised = place.prompt.len().min(p.penalised_prompt.unwrap_or(usize::MAX));
    let (presence, frequency) = (p.prompt_presence_penalty, p.prompt_frequency_penalty);
    penalise(&mut place.prompt[..penalised].iter(), presence, frequency);
    for (id, bias) in &p.logit_bias {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit += bias;
        }
    }
    if !end_allowed(p, place.written()) {
        place.ends.rule_out(logits);
    }
}

/// The probability of the nucleus at a place: `top_p`, or what is left of it so far into a sentence.
pub(crate) fn nucleus(p: &Parameters, place: Place<'_>) -> f32 {
    let Some(decay) = &p.decay else { return p.top_p };
    let written = place.generated.iter().chain(place.guessed).rev();
    let sentence = written.take_while(|id| !decay.ends.contains(id)).count();
    // The second token of a sentence is chosen as freely as the first.
    let left = p.top_p * decay.rate.powf(sentence.saturating_sub(1) as f32);
    left.max(decay.least)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ends::Ends;
    use crate::parameters::Decay;
    use ferropt_data::EOS;

    fn adjusted(p: Parameters) -> Vec<f32> {
        adjusted_with(Ends::default(), p)
    }

    fn adjusted_with(ends: Ends, p: Parameters) -> Vec<f32> {
        let (prompt, generated, guessed) = (&[0, 1, 1, 3], &[4, 4], &[3]);
        let mut logits = vec![2.0, -2.0, 1.0, 3.0, 4.0];
        adjust(&p, Place { prompt, generated, guessed, choice: 0, ends: &ends }, &mut logits);
        logits
    }

    #[test]
    fn penalties_and_bias_do_what_their_papers_say() {
        let plain = Parameters::default;
        assert_eq!(adjusted(Parameters { repetition_penalty: 2.0, ..plain() }), [1.0, -4.0, 1.0, 1.5, 2.0]);
        assert_eq!(adjusted(Parameters { presence_penalty: 0.5, ..plain() }), [2.0, -2.0, 1.0, 2.5, 3.5]);
        assert_eq!(adjusted(Parameters { frequency_penalty: 1.5, ..plain() }), [2.0, -2.0, 1.0, 1.5, 1.0]);
        let biased = Parameters { logit_bias: vec![(1, 5.0), (99, 1.0)], ..plain() };
        assert_eq!(adjusted(biased), [2.0, 3.0, 1.0, 3.0, 4.0]);
        let end = |p| adjusted(p)[EOS as usize];
        assert_eq!(end(Parameters { min_tokens: 4, ..plain() }), f32::NEG_INFINITY);
        assert_eq!(end(Parameters { min_tokens: 3, ..plain() }), 1.0);
        assert_eq!(end(Parameters { ignore_end: true, ..plain() }), f32::NEG_INFINITY);
        // All that end a text, of which one has no row here.
        let several = Ends::new(&[EOS, 4, 9]).unwrap();
        let none = f32::NEG_INFINITY;
        assert_eq!(
            adjusted_with(several, Parameters { ignore_end: true, ..plain() }),
            [2.0, -2.0, none, 3.0, none]
        );
        assert_eq!(adjusted_with(several, plain()), [2.0, -2.0, 1.0, 3.0, 4.0]);
    }

    #[test]
    fn penalties_of_the_prompt_look_at_its_beginning_or_all_of_it() {
        let prompt = |prompt_presence_penalty, prompt_frequency_penalty, penalised_prompt| Parameters {
            prompt_presence_penalty,
            prompt_frequency_penalty,
            penalised_prompt,
            ..Parameters::default()
        };
        assert_eq!(adjusted(prompt(0.5, 0.0, None)), [1.5, -2.5, 1.0, 2.5, 4.0]);
        assert_eq!(adjusted(prompt(0.5, 1.0, None)), [0.5, -4.5, 1.0, 1.5, 4.0]);
        assert_eq!(adjusted(prompt(0.5, 1.0, Some(2))), [0.5, -3.5, 1.0, 3.0, 4.0]);
        assert_eq!(adjusted(prompt(0.0, -1.0, Some(99))), [3.0, 0.0, 1.0, 4.0, 4.0]);
        // Both kinds add up where a token is in prompt and text, and are multiplied by what will divide them.
        let late = |temperature| Parameters {
            temperature,
            penalties_after_temperature: true,
            frequency_penalty: 0.5,
            ..prompt(0.25, 0.0, None)
        };
        assert_eq!(adjusted(late(2.0)), [1.5, -2.5, 1.0, 1.5, 2.0]);
        assert_eq!(adjusted(late(0.0)), [1.75, -2.25, 1.0, 2.25, 3.0]);
    }

    #[test]
    fn the_nucleus_shrinks_from_the_third_token_of_a_sentence_on() {
        let decay = Decay { rate: 0.5, least: 0.15, ends: vec![4, 9] };
        let p = Parameters { top_p: 0.8, decay: Some(decay), ..Parameters::default() };
        let at = |generated: &[u32], guessed: &[u32]| {
            // Ends of sentences in the prompt do not count.
            nucleus(
                &p,
                Place { prompt: &[2, 4, 7, 7], generated, guessed, choice: 0, ends: &Ends::default() },
            )
        };
        let sizes: Vec<f32> = (0..6).map(|len| at(&[7; 6][..len], &[])).collect();
        assert_eq!(sizes, [0.8, 0.8, 0.4, 0.2, 0.15, 0.15]);
        assert_eq!(
            [at(&[7, 7, 7, 4], &[]), at(&[7, 9, 7], &[7]), at(&[7, 7], &[9, 7, 7, 7])],
            [0.8, 0.4, 0.2]
        );
        let plain = Parameters { decay: None, ..p.clone() };
        let ends = &Ends::default();
        assert_eq!(
            nucleus(&plain, Place { prompt: &[2], generated: &[7; 9], guessed: &[], choice: 0, ends }),
            0.8
        );
    }
}
