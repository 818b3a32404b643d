//! Vectors of prompts are what the model makes of them, in any company. That its hidden states are Hugging Face's is tested with
//! the model (`oracle`).

use crate::*;
use ferropt_device::bf16;
use ferropt_engine::Pooling;

/// The vector by its definition.
fn defined<E: Element>(format: WeightFormat, prompt: &[u32], pooling: Pooling) -> Vec<f64> {
    let rows: Vec<u32> = (0..prompt.len() as u32).collect();
    let hidden = plainly::<E, _>(format, prompt, |device, decoder, memory| {
        decoder.hidden(device, &rows, memory).unwrap()
    });
    let states: Vec<&[f32]> = hidden.chunks(32).collect();
    let states = match pooling {
        Pooling::Last => &states[prompt.len() - 1..],
        Pooling::Mean if prompt[0] == 2 && prompt.len() > 1 => &states[1..],
        Pooling::Mean => &states[..],
    };
    let mean = |i: usize| states.iter().map(|state| state[i] as f64).sum::<f64>() / states.len() as f64;
    let mean: Vec<f64> = (0..32).map(mean).collect();
    let length = mean.iter().map(|x| x * x).sum::<f64>().sqrt();
    mean.into_iter().map(|x| x / length).collect()
}

fn check<E: Element>(format: WeightFormat) {
    let tokenizer = tokenizer();
    let behind_end = |len: usize| [&[2][..], &whole(7, len, 270)].concat();
    let prompts = [
        vec![2],
        vec![9],
        behind_end(1),
        behind_end(150),
        behind_end(200),
        whole(8, 130, 270),
        whole(9, 320, 280),
    ];
    // Pieces of a few tokens, and too few pages for all, so that texts that grow push others out.
    let few = Options {
        limits: Limits { tokens: 4, sequences: 4, reuse: true },
        cache_tokens: 9 * 64,
        draft_tokens: 8,
        pause: None,
        reserve: false,
        ends: Ends::default(),
    };
    let mut engine = engine::<E>(&tokenizer, format, few);
    for pooling in [Pooling::Mean, Pooling::Last] {
        let texts = Parameters { n: 2, ignore_end: true, ..sampled(200, 5) };
        engine.submit(Request { prompt: behind_end(60), parameters: texts }).unwrap();
        let submit = |prompt: &Vec<u32>| {
            let prompt = prompt.clone();
            engine.submit(Request { prompt, parameters: Parameters::embedding(pooling) }).unwrap()
        };
        let numbers: Vec<u64> = prompts.iter().rev().map(submit).collect();
        let made = run(&mut engine, |_, _| {});
        for (prompt, number) in prompts.iter().rev().zip(numbers) {
            let Completion { embedding, choices, usage, .. } = &made[&number];
            assert!(choices.is_empty() && usage.generated == 0 && usage.prompt == prompt.len());
            let (got, want) = (embedding.as_ref().unwrap(), defined::<E>(format, prompt, pooling));
            assert_eq!(got.len(), 32);
            for (got, want) in got.iter().zip(&want) {
                let what = format!("{pooling:?} of {} tokens in {format:?}", prompt.len());
                assert!((*got as f64 - want).abs() < 1e-6, "{what}: {got}, not {want}");
            }
        }
        assert_eq!(engine.load().pages, 0);
    }
    assert!(
        engine.load().preemptions > 0 && engine.load().reused_tokens > 0,
        "too tame: {:?}",
        engine.load()
    );
}

#[test]
fn vectors_are_those_of_the_model_in_pieces_and_in_company() {
    check::<f32>(WeightFormat::F32);
    check::<bf16>(WeightFormat::Int8);
}
