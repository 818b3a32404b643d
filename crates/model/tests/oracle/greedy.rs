//! Texts written greedily, token for token those of Hugging Face's `generate`.

use crate::fixture::{all, folder};
use crate::{LOGIT, decoder, devices};
use ferropt_device::{Device, PAGE, Segment, WeightFormat};
use ferropt_model::{Cache, Memory};
use serde::Deserialize;
use std::collections::BTreeMap;

/// A text of `greedy.json`.
#[derive(Deserialize)]
struct Text {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
}

#[test]
fn greedy_texts_and_their_log_probabilities() {
    let file = std::fs::read_to_string(folder().join("greedy.json")).unwrap();
    let cases: BTreeMap<String, Vec<Text>> = serde_json::from_str(&file).unwrap();
    let fixtures = all();
    assert_eq!(cases.len(), fixtures.len());
    for device in devices() {
        for f in &fixtures {
            let (texts, config) = (&cases[&f.name], &f.config);
            let decoder = decoder(&device, f, WeightFormat::F32);
            let each = config.positions.div_ceil(PAGE);
            let pages: Vec<u32> = (0..(texts.len() * each) as u32).collect();
            let rows = texts.iter().map(|text| text.prompt.len()).sum();
            let mut cache = Cache::<_, f32>::new(&device, config, pages.len()).unwrap();
            let mut memory = Memory::new(&device, config, rows, texts.len()).unwrap();
            // All texts together: their prompts, then a token of each.
            let mut next: Vec<Vec<u32>> = texts.iter().map(|text| text.prompt.clone()).collect();
            let mut past = vec![0; texts.len()];
            for place in 0..texts[0].tokens.len() {
                let segments: Vec<Segment<'_>> = (next.iter().zip(&past).zip(pages.chunks(each)))
                    .map(|((ids, past), pages)| Segment { rows: ids.len(), past: *past, pages })
                    .collect();
                decoder.forward(&device, &next.concat(), &segments, &mut cache, &mut memory).unwrap();
                let ends = next.iter().scan(0, |end, ids| {
                    *end += ids.len() as u32;
                    Some(*end - 1)
                });
                let logits = decoder.head(&device, &ends.collect::<Vec<_>>(), &mut memory).unwrap();
                for (i, text) in texts.iter().enumerate() {
                    let (id, want) = (logits.largest(i), text.tokens[place]);
                    let what = format!("{} on {}, text {i}, token {place}", f.name, device.describe());
                    assert_eq!(id, want, "{what}");
                    let (got, want) = (logits.log_prob(i, id), text.log_probs[place]);
                    assert!((got - want).abs() <= LOGIT as f32, "{what}: log-probability {got}, not {want}");
                    past[i] += next[i].len();
                    next[i] = vec![id];
                }
            }
        }
    }
}
