//! The same tokens alone and in company.

use crate::*;
use ferropt_device::bf16;
use ferropt_engine::{Decay, Pooling};
use std::time::Duration;

/// Tokens are drawn by the device, or out of changed logits by the engine itself: the same ones where the change is none.
#[test]
fn a_bias_of_nothing_changes_nothing() {
    let tokenizer = tokenizer();
    for request in requests() {
        let p = &request.parameters;
        if p.temperature == 0.0 || p.beams.is_some() || !p.logit_bias.is_empty() {
            continue;
        }
        let biased = Parameters { logit_bias: vec![(7, 0.0)], ..p.clone() };
        let want = alone::<f32>(&tokenizer, WeightFormat::F32, &request);
        let got = alone::<f32>(&tokenizer, WeightFormat::F32, &Request { parameters: biased, ..request });
        assert!(got == want, "{got:?}, not {want:?}");
    }
}

/// Requests of every kind, several of which begin alike.
pub(crate) fn requests() -> Vec<Request> {
    let prompt = |which: usize, shared: usize, len: usize| -> Vec<u32> {
        let common = whole(0, shared, 270);
        std::iter::once(2).chain(common.into_iter().chain(whole(which, len, 270)).map(|id| id + 4)).collect()
    };
    let request = |prompt, parameters| Request { prompt, parameters };
    let mut requests = vec![
        request(prompt(1, 0, 0), greedy(90)),
        request(prompt(2, 140, 3), greedy(40)),
        request(prompt(3, 140, 70), Parameters { log_probs: Some(3), ..sampled(80, 7) }),
        request(prompt(4, 140, 0), Parameters { n: 4, top_p: 0.9, ..sampled(70, 8) }),
        request(
            prompt(5, 63, 0),
            Parameters { n: 2, best_of: Some(5), log_probs: Some(0), ..sampled(30, 9) },
        ),
        request(prompt(6, 70, 9), Parameters { beams: Some(4), n: 2, log_probs: Some(2), ..greedy(40) }),
        request(prompt(7, 140, 100), Parameters { echo: Some(0), log_probs: Some(2), ..greedy(0) }),
        request(prompt(8, 140, 30), Parameters { echo: Some(150), log_probs: Some(0), ..sampled(20, 10) }),
        request(prompt(3, 140, 70), Parameters { repetition_penalty: 1.3, ..sampled(100, 11) }),
        request(
            prompt(9, 64, 64),
            Parameters {
                presence_penalty: 0.7,
                frequency_penalty: 0.3,
                logit_bias: vec![(40, 3.0), (2, -1.0)],
                min_p: 0.02,
                top_k: Some(60),
                temperature: 0.8,
                min_tokens: 10,
                ..sampled(100, 12)
            },
        ),
        request(prompt(10, 128, 190), sampled(50, 13)),
        request(prompt(13, 140, 30), Parameters::embedding(Pooling::Mean)),
        request(prompt(14, 140, 10), Parameters::embedding(Pooling::Last)),
        request(
            prompt(12, 100, 20),
            Parameters {
                n: 2,
                prompt_presence_penalty: 0.5,
                prompt_frequency_penalty: 0.2,
                penalised_prompt: Some(70),
                penalties_after_temperature: true,
                temperature: 0.7,
                top_p: 0.9,
                decay: Some(Decay { rate: 0.9, least: 0.3, ends: (0..30).map(|i| 9 * i).collect() }),
                ..sampled(60, 15)
            },
        ),
        request(
            prompt(11, 1, 62),
            Parameters { ignore_end: true, stop: vec!["th".into(), " ".into()], ..sampled(64, 14) },
        ),
    ];
    // A page at first, and three in the end: more than a small cache has.
    requests.extend((0..8).map(|i| {
        let parameters = Parameters { ignore_end: true, ..sampled(130, 20 + i as u64) };
        request(prompt(20 + i, 0, 58), parameters)
    }));
    requests
}

fn check<E: Element>(format: WeightFormat) {
    let (tokenizer, requests) = (tokenizer(), requests());
    let want: Vec<Completion> = requests.iter().map(|r| alone::<E>(&tokenizer, format, r)).collect();
    let few = |tokens, sequences, pages: usize, reuse| Options {
        limits: Limits { tokens, sequences, reuse },
        cache_tokens: pages * 64,
        draft_tokens: 8,
        pause: reuse.then_some(Duration::ZERO),
        reserve: reuse,
        ends: Ends::default(),
    };
    let (mut reused, mut preemptions) = (0, 0);
    for (round, options) in [
        few(1000, 64, 200, true),
        few(37, 12, 200, true),
        few(64, 8, 200, false),
        few(23, 7, 13, true),
        few(500, 20, 13, false),
        few(60, 9, 12, true),
    ]
    .into_iter()
    .enumerate()
    {
        let mut engine = engine::<E>(&tokenizer, format, options);
        // In another order each time, all at once or one by one.
        let order: Vec<usize> = (0..requests.len()).map(|i| (i * 7 + round) % requests.len()).collect();
        let pause = [0, 3, 11][round % 3];
        let (mut left, mut numbers) = (order.iter(), vec![0; requests.len()]);
        let made = run(&mut engine, |engine, step| {
            let now = match pause {
                0 => requests.len(),
                _ => usize::from(step % pause == 0),
            };
            for next in left.by_ref().take(now) {
                numbers[*next] = engine.submit(requests[*next].clone()).unwrap();
            }
        });
        for (i, want) in want.iter().enumerate() {
            assert_eq!(&made[&numbers[i]], want, "{format:?}, request {i} with {options:?}");
        }
        let load = engine.load();
        assert_eq!((load.running, load.waiting, load.pages), (0, 0, 0), "pages are left over");
        assert!(options.limits.reuse || load.reused_tokens == 0);
        (reused, preemptions) = (reused + load.reused_tokens, preemptions + load.preemptions);
    }
    assert!(reused > 1000 && preemptions >= 5, "too tame: {reused} tokens reused, {preemptions} preemptions");
}

#[test]
fn requests_give_the_same_tokens_alone_and_in_any_company_f32() {
    check::<f32>(WeightFormat::F32);
}

#[test]
fn requests_give_the_same_tokens_alone_and_in_any_company_bf16() {
    check::<bf16>(WeightFormat::Bf16);
}

#[test]
fn requests_give_the_same_tokens_alone_and_in_any_company_quantised() {
    WeightFormat::CODES.into_iter().for_each(check::<bf16>);
}

#[test]
fn cancelled_requests_leave_nothing_and_disturb_nobody() {
    let (tokenizer, requests) = (tokenizer(), requests());
    let mut engine = engine::<f32>(&tokenizer, WeightFormat::F32, roomy());
    let kept = [2, 5, 8];
    let numbers: Vec<u64> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    let made = run(&mut engine, |engine, step| {
        for (i, number) in numbers.iter().enumerate().filter(|(i, _)| !kept.contains(i)) {
            // Some before their first step, some while they read, some while they write, some twice.
            if step == i || step == 30 {
                engine.cancel(*number);
            }
        }
    });
    for i in kept {
        assert_eq!(
            made[&numbers[i]],
            alone::<f32>(&tokenizer, WeightFormat::F32, &requests[i]),
            "request {i}"
        );
    }
    assert_eq!(engine.load().pages, 0);
    // All of them.
    let numbers: Vec<u64> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    engine.step().unwrap();
    assert!(engine.load().pages > 0);
    numbers.into_iter().for_each(|number| engine.cancel(number));
    assert!(engine.is_idle() && engine.load().pages == 0);
}
