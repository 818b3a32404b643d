//! On a GPU, steps of as many texts are started as graphs, which changes no text.

use crate::*;
use ferropt_device::bf16;
use ferropt_device::cuda::{CudaDevice, CudaOptions};

/// Texts of different lengths that come and go, some beside a draft's guesses, and how many graphs were started.
fn written<E: Element>(graphs: bool, drafted: bool) -> (BTreeMap<u64, Completion>, u64) {
    let tokenizer = tokenizer();
    let device = CudaDevice::new(0, CudaOptions { threads: Some(1), graphs: Some(graphs) }).unwrap();
    let ours = decoder(&device, &config(), WeightFormat::Int8);
    let draft = drafted.then(|| decoder(&device, &Config { layers: 1, ..config() }, WeightFormat::Int8));
    let options = Options {
        limits: Limits { tokens: 100, sequences: 4, reuse: true },
        cache_tokens: 14 * PAGE,
        draft_tokens: 3,
        pause: None,
        reserve: false,
        ends: Ends::default(),
    };
    let mut engine = Engine::<_, E>::new(device, ours, draft, &tokenizer, options).unwrap();
    // One begins every third step: from one text to as many as there may be, with the borders of pages among them.
    let lengths = [(5, 30), (60, 12), (130, 20), (1, 40), (63, 9), (20, 25)];
    let mut waiting: Vec<Request> = lengths
        .iter()
        .enumerate()
        .map(|(i, (prompt, tokens))| Request {
            prompt: whole(i, *prompt, 270).into_iter().map(|id| id + 4).collect(),
            parameters: match i % 3 {
                0 => Parameters { ignore_end: true, ..greedy(*tokens) },
                1 => Parameters { ignore_end: true, top_p: 0.9, ..sampled(*tokens, 5) },
                _ => Parameters { ignore_end: true, top_k: Some(20), n: 2, ..sampled(*tokens, 6) },
            },
        })
        .rev()
        .collect();
    let texts = run(&mut engine, |engine, step| {
        if step.is_multiple_of(3)
            && let Some(request) = waiting.pop()
        {
            engine.submit(request).unwrap();
        }
    });
    (texts, engine.device().graphs_started())
}

fn check<E: Element>(drafted: bool) {
    let (want, none) = written::<E>(false, drafted);
    let (got, started) = written::<E>(true, drafted);
    assert_eq!(none, 0);
    assert_eq!(got.len(), 6);
    assert!(want.values().flat_map(|text| &text.choices).all(|choice| !choice.text.is_empty()));
    assert!(got == want, "{} {drafted}", E::DTYPE);
    assert!(started > 20, "{started} graphs were started");
}

#[test]
#[ignore = "needs a GPU, real or emulated; scripts/check-cuda-kernels runs it"]
fn graphs_change_no_text() {
    check::<f32>(false);
    check::<bf16>(true);
}
