//! What comes of a request is what was asked for.

use crate::*;
use ferropt_engine::{Finish, Text, Usage};

const FORMAT: WeightFormat = WeightFormat::F32;

fn request(parameters: Parameters) -> Request {
    Request { prompt: vec![2, 50, 60, 70], parameters }
}

fn ids(text: &Text) -> Vec<u32> {
    text.tokens.iter().map(|token| token.id).collect()
}

fn complete(parameters: Parameters) -> Completion {
    alone::<f32>(&tokenizer(), FORMAT, &request(parameters))
}

#[test]
fn texts_are_their_tokens_and_usage_counts_them() {
    let made = complete(Parameters { n: 3, ignore_end: true, ..sampled(50, 3) });
    assert_eq!(made.usage, Usage { prompt: 4, generated: 150, ..Usage::default() });
    for text in &made.choices {
        assert_eq!((text.tokens.len(), text.finish), (50, Some(Finish::MaxTokens)));
        assert_eq!(text.text, tokenizer().decode(&ids(text)));
        assert!(ids(text).iter().all(|id| *id != 2 && *id < 280));
    }
    assert!(made.choices[0] != made.choices[1] && made.choices[1] != made.choices[2]);
    let one = complete(Parameters { ignore_end: true, ..sampled(50, 3) });
    assert_eq!(one.choices[0], made.choices[0], "the first of many is the only one of one");
}

#[test]
fn texts_end_where_positions_do() {
    let made = complete(Parameters { max_tokens: None, ignore_end: true, ..greedy(0) });
    assert_eq!(made.choices[0].finish, Some(Finish::Positions));
    assert_eq!(made.choices[0].tokens.len(), 320 - 4 + 1, "the last token needs no position");
}

#[test]
fn log_probs_are_those_of_the_model_and_of_its_likeliest_tokens() {
    let p = Parameters { log_probs: Some(100), echo: Some(0), ignore_end: true, ..greedy(30) };
    let made = complete(p.clone());
    assert_eq!((made.prompt.len(), made.prompt[0].log_prob), (4, None));
    for token in made.prompt[1..].iter().chain(&made.choices[0].tokens) {
        assert_eq!(token.top.len(), 100);
        assert!(token.top.windows(2).all(|w| w[0].1 >= w[1].1));
        let mass: f32 = token.top.iter().map(|(_, p)| p.exp()).sum();
        assert!(mass > 0.3 && mass < 1.0 + 1e-5, "{mass}");
    }
    // What was written scores the same when it is read.
    let whole = [vec![2, 50, 60, 70], ids(&made.choices[0])].concat();
    let read = Request {
        prompt: whole,
        parameters: Parameters { echo: Some(4), log_probs: Some(100), ..greedy(0) },
    };
    let read = alone::<f32>(&tokenizer(), FORMAT, &read);
    assert_eq!(read.prompt, made.choices[0].tokens);
    assert_eq!(read.usage.generated, 0);
    // Greedy takes the likeliest that is no </s> and that the tokenizer knows; temperature does not change log-probabilities.
    for token in &made.choices[0].tokens {
        let best = token.top.iter().find(|(id, _)| *id != 2 && *id < 280).unwrap();
        assert_eq!((token.id, token.log_prob), (best.0, Some(best.1)));
    }
    let hot = complete(Parameters { temperature: 1e-4, ..p.clone() });
    assert_eq!(hot.choices, made.choices);
    let plain = complete(Parameters { log_probs: None, ..p });
    assert_eq!(plain.prompt.iter().map(|t| t.id).collect::<Vec<_>>(), [2, 50, 60, 70]);
    assert!(plain.prompt.iter().chain(&plain.choices[0].tokens).all(|t| t.log_prob.is_none()));
    assert_eq!(plain.choices[0].text, made.choices[0].text);
}

#[test]
fn nothing_to_generate_is_an_answer_too() {
    let empty = complete(greedy(0));
    assert_eq!(empty.choices, [Text { finish: Some(Finish::MaxTokens), ..Text::default() }]);
    let one = Request {
        prompt: vec![2],
        parameters: Parameters { echo: Some(0), log_probs: Some(1), ..greedy(0) },
    };
    let one = alone::<f32>(&tokenizer(), FORMAT, &one);
    assert_eq!((one.prompt.len(), one.choices.len()), (1, 1));
    let full = Request { prompt: vec![5; 320], parameters: greedy(1) };
    let full = alone::<f32>(&tokenizer(), FORMAT, &full);
    assert_eq!((full.choices[0].tokens.len(), full.choices[0].finish), (1, Some(Finish::MaxTokens)));
}

#[test]
fn the_end_comes_when_it_may() {
    let forced = |p: Parameters| complete(Parameters { logit_bias: vec![(2, 100.0)], ..p }).choices.remove(0);
    let at_once = forced(greedy(20));
    assert_eq!((at_once.tokens.len(), at_once.finish), (0, Some(Finish::EndOfText)));
    let later = forced(Parameters { min_tokens: 7, ..greedy(20) });
    assert_eq!((later.tokens.len(), later.finish), (7, Some(Finish::EndOfText)));
    let never = forced(Parameters { ignore_end: true, ..greedy(20) });
    assert_eq!((never.tokens.len(), never.finish), (20, Some(Finish::MaxTokens)));
}

#[test]
fn stop_strings_are_cut_off_exactly() {
    for seed in 0..20 {
        let p = Parameters { ignore_end: true, temperature: 2.0, ..sampled(60, seed) };
        let whole = complete(p.clone()).choices.remove(0);
        let chars: Vec<char> = whole.text.chars().collect();
        for (at, len) in [(5, 1), (10, 3), (20, 9)] {
            let stop: String = chars[at..at + len].iter().collect();
            let cut = complete(Parameters { stop: vec!["never there".into(), stop.clone()], ..p.clone() });
            let cut = &cut.choices[0];
            let end = whole.text.find(&stop).unwrap();
            assert_eq!((cut.text.as_str(), cut.finish), (&whole.text[..end], Some(Finish::Stop)), "{stop:?}");
            let tokens = cut.tokens.len();
            assert_eq!(ids(cut), ids(&whole)[..tokens], "tokens are those of the whole text");
        }
    }
}

#[test]
fn best_of_gives_back_the_likeliest_texts() {
    let p = Parameters { ignore_end: true, log_probs: Some(0), ..sampled(12, 4) };
    let all = complete(Parameters { n: 9, ..p.clone() });
    let mean = |text: &Text| text.tokens.iter().map(|t| t.log_prob.unwrap() as f64).sum::<f64>() / 12.0;
    let mut want = all.choices.clone();
    want.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    let best = complete(Parameters { n: 2, best_of: Some(9), ..p });
    assert_eq!(best.choices, want[..2]);
    assert_eq!(best.usage.generated, 9 * 12);
}

#[test]
fn beams_find_the_likeliest_texts_of_all() {
    let tokenizer = tokenizer();
    // Every text of two tokens, by computing what follows each first token.
    let mut engine = engine::<f32>(&tokenizer, FORMAT, roomy());
    let p = Parameters { echo: Some(4), log_probs: Some(100), ..greedy(1) };
    let numbers: Vec<(u32, u64)> = (0..280)
        .filter(|id| *id != 2)
        .map(|id| (id, Request { prompt: vec![2, 50, 60, 70, id], parameters: p.clone() }))
        .map(|(id, r)| (id, engine.submit(r).unwrap()))
        .collect();
    let made = run(&mut engine, |_, _| {});
    let mut texts: Vec<(f64, Vec<u32>)> = vec![];
    for (first, number) in numbers {
        let Completion { prompt, choices, .. } = &made[&number];
        let sum = prompt[0].log_prob.unwrap() as f64;
        // The greedy choice may have been </s>, of which no token is given out; its likeliest tokens are those of the row.
        let top = match choices[0].tokens.first() {
            Some(token) => token.top.clone(),
            None => continue,
        };
        texts.extend(
            top.iter()
                .filter(|(id, _)| *id < 280 && *id != 2)
                .map(|(id, p)| (sum + *p as f64, vec![first, *id])),
        );
    }
    texts.sort_by(|a, b| b.0.total_cmp(&a.0));
    let p = Parameters { beams: Some(128), n: 5, log_probs: Some(0), min_tokens: 2, ..greedy(2) };
    let found = alone::<f32>(&tokenizer, FORMAT, &request(p));
    for (found, (sum, text)) in found.choices.iter().zip(&texts) {
        assert_eq!(&ids(found), text);
        let got: f64 = found.tokens.iter().map(|t| t.log_prob.unwrap() as f64).sum();
        assert!((got - sum).abs() < 1e-6);
    }
    assert_eq!(found.choices.len(), 5);
}

#[test]
fn one_beam_without_an_end_is_greedy() {
    let p = Parameters { min_tokens: 40, ..greedy(40) };
    let beam = complete(Parameters { beams: Some(1), ..p.clone() });
    let greedy = complete(p);
    assert_eq!((beam.choices, beam.usage), (greedy.choices, greedy.usage));
}

#[test]
fn a_limit_of_no_tokens_is_kept_by_all_kinds_of_texts() {
    let tokenizer = tokenizer();
    let none = Parameters { max_tokens: Some(0), ..Parameters::default() };
    for parameters in [
        Parameters { n: 2, ..none.clone() },
        Parameters { n: 2, best_of: Some(3), ..none.clone() },
        Parameters { n: 2, beams: Some(3), temperature: 0.0, ..none.clone() },
        Parameters { beams: Some(2), temperature: 0.0, echo: Some(0), log_probs: Some(1), ..none },
    ] {
        let prompt = tokenizer.encode_prompt("the cat sat").unwrap();
        let request = Request { prompt: prompt.clone(), parameters: parameters.clone() };
        let completion = alone::<f32>(&tokenizer, FORMAT, &request);
        assert_eq!(completion.choices.len(), parameters.n, "{parameters:?}");
        for choice in &completion.choices {
            assert!(choice.tokens.is_empty(), "{parameters:?}");
            assert_eq!(choice.finish, Some(Finish::MaxTokens), "{parameters:?}");
        }
        assert_eq!(completion.prompt.len(), if parameters.echo.is_some() { prompt.len() } else { 0 });
    }
}

#[test]
fn requests_fail_where_the_model_has_no_numbers() {
    let tokenizer = tokenizer();
    for damaged in ["model.decoder.layers.0.fc1.weight", "model.decoder.final_layer_norm.weight"] {
        let (device, config) = (device(), config());
        let (table, sound) = (config.parameters(), sound(&config));
        let read = |index: usize, rows: std::ops::Range<usize>, out: &mut [f32]| {
            sound(index, rows.clone(), out)?;
            if rows.start == 0 && table[index].names.iter().any(|name| name == damaged) {
                out[0] = f32::NAN;
            }
            Ok(())
        };
        let decoder = Decoder::new(&device, &config, FORMAT, &read, Matrices::Rows).unwrap();
        let mut engine = Engine::<_, f32>::new(device, decoder, None, &tokenizer, roomy()).unwrap();
        for parameters in [
            Parameters { temperature: 0.0, ..Parameters::default() },
            Parameters { temperature: 1.0, ..Parameters::default() },
            Parameters { beams: Some(3), temperature: 0.0, ..Parameters::default() },
            Parameters { max_tokens: Some(0), echo: Some(1), log_probs: Some(1), ..Parameters::default() },
        ] {
            let prompt = tokenizer.encode_prompt("the cat sat").unwrap();
            engine.submit(Request { prompt, parameters: parameters.clone() }).unwrap();
            let mut failed = None;
            while !engine.is_idle() {
                for (_, event) in engine.step().unwrap() {
                    failed = Completion::default().add(event).err().or(failed);
                }
            }
            let failed = failed.unwrap_or_else(|| panic!("{damaged}, {parameters:?}: it did not fail"));
            assert!(failed.to_string().contains("no numbers"), "{failed}");
        }
    }
}

/// As a model has them that was made for conversations.
#[test]
fn every_token_that_ends_texts_ends_them_and_is_left_out_where_none_may() {
    let tokenizer = tokenizer();
    let prompt = tokenizer.encode_prompt("the cat sat").unwrap();
    let made = |ends: &Ends, parameters: &Parameters| -> Text {
        let mut engine = engine::<f32>(&tokenizer, WeightFormat::F32, Options { ends: *ends, ..roomy() });
        let request = Request { prompt: prompt.clone(), parameters: parameters.clone() };
        let number = engine.submit(request).unwrap();
        run(&mut engine, |_, _| {}).remove(&number).unwrap().choices.remove(0)
    };
    for temperature in [0.0, 1.0] {
        let p = Parameters { temperature, seed: 6, max_tokens: Some(40), ..Parameters::default() };
        let free = ids(&made(&Ends::default(), &p));
        let end = free[3];
        let until = free.iter().position(|id| *id == end).unwrap();
        for ends in [&[end][..], &[2, end], &[u32::MAX, end, 2]] {
            let ends = Ends::new(ends).unwrap();
            let text = made(&ends, &p);
            assert_eq!((ids(&text), text.finish), (free[..until].to_vec(), Some(Finish::EndOfText)));
            let whole = ids(&made(&ends, &Parameters { ignore_end: true, ..p.clone() }));
            assert!(whole.len() == 40 && whole.iter().all(|id| !ends.contains(*id)), "{whole:?}");
            let long = ids(&made(&ends, &Parameters { min_tokens: 20, ..p.clone() }));
            assert_eq!(long[..20], whole[..20]);
            let p = Parameters { beams: Some(3), temperature: 0.0, max_tokens: Some(8), ..p.clone() };
            for ignore_end in [false, true] {
                let searched = made(&ends, &Parameters { ignore_end, ..p.clone() });
                assert!(ids(&searched).iter().all(|id| !ends.contains(*id)), "{searched:?}");
                assert!(!ignore_end || searched.tokens.len() == 8);
            }
        }
    }
    assert!(Ends::new(&[]).is_err() && Ends::new(&[2; 9]).is_err() && Ends::new(&[7; 8]).is_ok());
}
