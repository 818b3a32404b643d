//! What is refused, and with which words.

use super::*;

#[test]
fn every_value_out_of_range_is_named_with_its_limit() {
    let good = Parameters { max_tokens: Some(5), ..Parameters::default() };
    good.check().unwrap();
    let beams = Parameters { beams: Some(4), temperature: 0.0, ..good.clone() };
    beams.check().unwrap();
    let base = || good.clone();
    let decay = |rate, least| Some(Decay { rate, least, ends: vec![5] });
    for (wrong, parameter, part) in [
        (Parameters { min_tokens: 6, ..base() }, "min_tokens", "max_tokens = 5"),
        (Parameters { temperature: -1.0, ..base() }, "temperature", "-1"),
        (Parameters { temperature: f32::NAN, ..base() }, "temperature", "NaN"),
        (Parameters { top_k: Some(0), ..base() }, "top_k", "0"),
        (Parameters { top_p: 0.0, ..base() }, "top_p", "0"),
        (Parameters { top_p: 1.5, ..base() }, "top_p", "1.5"),
        (Parameters { min_p: -0.1, ..base() }, "min_p", "-0.1"),
        (Parameters { repetition_penalty: 0.0, ..base() }, "repetition_penalty", "above 0"),
        (Parameters { presence_penalty: 2.5, ..base() }, "presence_penalty", "2.5"),
        (Parameters { frequency_penalty: f32::NAN, ..base() }, "frequency_penalty", "NaN"),
        (Parameters { prompt_presence_penalty: -2.5, ..base() }, "prompt_presence_penalty", "-2.5"),
        (Parameters { prompt_frequency_penalty: 3.0, ..base() }, "prompt_frequency_penalty", "3"),
        (Parameters { decay: decay(0.0, 0.3), ..base() }, "decay", "rate of 0"),
        (Parameters { decay: decay(0.9, 1.1), ..base() }, "decay", "1.1"),
        (Parameters { logit_bias: vec![(7, 101.0)], ..base() }, "logit_bias", "token 7"),
        (Parameters { stop: vec!["a".into(); 65], ..base() }, "stop", "64"),
        (Parameters { stop: vec![String::new()], ..base() }, "stop", "empty"),
        (Parameters { log_probs: Some(101), ..base() }, "log_probs", "100"),
        (Parameters { n: 0, ..base() }, "n", "1 and 128"),
        (Parameters { n: 3, best_of: Some(2), ..base() }, "best_of", "n = 3"),
        (Parameters { best_of: Some(2), temperature: 0.0, ..base() }, "best_of", "temperature = 0"),
        (Parameters { n: 5, ..beams.clone() }, "beams", "n = 5"),
        (Parameters { pooling: Some(Pooling::Mean), ..base() }, "pooling", "max_tokens = 0"),
        (Parameters { echo: Some(0), ..Parameters::embedding(Pooling::Last) }, "pooling", "last"),
        (Parameters { temperature: 1.0, ..beams.clone() }, "beams", "temperature = 0"),
        (Parameters { top_k: Some(4), ..beams.clone() }, "beams", "top_k"),
        (Parameters { stop: vec!["a".into()], ..beams.clone() }, "beams", "stop"),
        (Parameters { decay: decay(0.9, 0.3), ..beams.clone() }, "beams", "decay"),
        (Parameters { prompt_frequency_penalty: 1.0, ..beams.clone() }, "beams", "prompt_frequency_penalty"),
        (Parameters { length_penalty: f32::INFINITY, ..beams.clone() }, "length_penalty", "inf"),
    ] {
        let refusal = wrong.check().unwrap_err();
        assert_eq!(refusal.parameter, parameter, "{refusal}");
        assert!(refusal.message.contains(part), "{refusal}");
    }
}

#[test]
fn requests_fit_the_engine() {
    let capacity = Capacity { vocab: 100, positions: 200, pages: 3, sequences: 2, step_tokens: 9, width: 8 };
    let request = |prompt: usize, parameters| Request { prompt: vec![2; prompt], parameters };
    let beams = |beams| Parameters { beams: Some(beams), temperature: 0.0, ..limited(50) };
    fn limited(max: usize) -> Parameters {
        Parameters { max_tokens: Some(max), ..Parameters::default() }
    }
    request(150, limited(42)).check(&capacity).unwrap();
    for (wrong, parameter, part) in [
        (request(0, limited(1)), "prompt", "no tokens"),
        (request(201, limited(1)), "prompt", "200 positions"),
        (Request { prompt: vec![100], parameters: limited(1) }, "prompt", "100"),
        (request(5, Parameters { logit_bias: vec![(150, 1.0)], ..limited(1) }), "logit_bias", "150"),
        (request(5, Parameters { echo: Some(5), ..limited(1) }), "echo", "5"),
        (request(150, limited(43)), "max_tokens", "4 pages"),
        (request(5, Parameters::default()), "max_tokens", "200 tokens"),
        (request(5, beams(3)), "beams", "2 sequences"),
        (request(5, beams(2)), "max_tokens", "4 pages"),
    ] {
        let refusal = wrong.check(&capacity).unwrap_err();
        assert_eq!(refusal.parameter, parameter, "{refusal}");
        assert!(refusal.message.contains(part), "{refusal}");
    }
}
