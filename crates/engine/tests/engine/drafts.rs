//! With a draft there are the same tokens, in fewer steps.

use crate::company::requests;
use crate::*;
use ferropt_device::bf16;

/// Layers of the large model; the draft has one.
const LAYERS: usize = 10;

/// A model of `layers` layers whose first is always the same. What the others add is multiplied by `others`, so that a
/// model of one layer comes near one of many.
fn decoder(device: &CpuDevice, config: &Config, format: WeightFormat, others: f32) -> Decoder<CpuDevice> {
    let table = config.parameters();
    let read = |index: usize, rows: std::ops::Range<usize>, out: &mut [f32]| {
        let (parameter, name) = (&table[index], &table[index].names[0]);
        let number = name.bytes().fold(0, |sum, byte| (sum * 31 + byte as usize) % 0xff_fffd);
        let stream = Stream::new(5, Purpose::Init, number, 0);
        let width = parameter.elements() / parameter.shape[0];
        let added = ["out_proj", "fc2"].iter().any(|part| name.contains(part));
        let scale = if added && !name.contains("layers.0.") { 0.25 * others } else { 0.25 };
        let gain = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        for (i, out) in out.iter_mut().enumerate() {
            *out = scale * stream.normal(0, rows.start * width + i) + gain;
        }
        Ok(())
    };
    Decoder::new(device, config, format, &read, Matrices::Rows).unwrap()
}

/// An engine whose large model has many layers, and a draft of these sizes or none.
fn engine<E: Element>(
    tokenizer: &Tokenizer,
    format: WeightFormat,
    (options, others): (Options, f32),
    draft: Option<Config>,
) -> Engine<'_, CpuDevice, E> {
    let device = device();
    let large = decoder(&device, &Config { layers: LAYERS, ..config() }, format, others);
    // As models are opened, whatever the large one's weights are.
    let draft = draft.map(|config| decoder(&device, &config, WeightFormat::Int8, others));
    Engine::new(device, large, draft, tokenizer, options).unwrap()
}

fn small() -> Config {
    Config { layers: 1, ..config() }
}

/// The same without what tells of guesses, and that.
fn apart(mut made: Completion) -> (Completion, usize, usize) {
    let (drafted, accepted) = (made.usage.drafted, made.usage.accepted);
    (made.usage.drafted, made.usage.accepted) = (0, 0);
    (made, drafted, accepted)
}

/// What one request gives in an engine of its own, and in how many steps.
fn alone<E: Element>(
    tokenizer: &Tokenizer,
    format: WeightFormat,
    others: f32,
    draft: Option<Config>,
    request: &Request,
) -> (Completion, usize) {
    let mut engine = engine::<E>(tokenizer, format, (roomy(), others), draft);
    let number = engine.submit(request.clone()).unwrap();
    let mut steps = 0;
    let mut all = run(&mut engine, |_, step| steps = step);
    assert_eq!(engine.load().pages, 0);
    (all.remove(&number).unwrap(), steps)
}

/// All kinds of requests in all kinds of company, against each alone without a draft.
fn check<E: Element>(format: WeightFormat) {
    const OTHERS: f32 = 0.2;
    let (tokenizer, requests) = (tokenizer(), requests());
    let want: Vec<Completion> =
        requests.iter().map(|r| alone::<E>(&tokenizer, format, OTHERS, None, r).0).collect();
    let few = |tokens, sequences, pages: usize, reuse, draft_tokens| Options {
        limits: Limits { tokens, sequences, reuse },
        cache_tokens: pages * 64,
        draft_tokens,
        pause: None,
        reserve: false,
        ends: Ends::default(),
    };
    let (mut drafted, mut accepted, mut reused, mut preemptions) = (0, 0, 0, 0);
    for (round, (options, draft)) in [
        (few(1000, 4, 200, true, 8), small()),
        (few(11, 4, 200, true, 5), small()),
        (few(64, 7, 12, false, 3), small()),
        (few(40, 8, 12, true, 70), small()),
        // Texts become longer than the draft's positions, and some tokens are none of its.
        (few(500, 4, 14, true, 8), Config { positions: 90, vocab: 270, ..small() }),
    ]
    .into_iter()
    .enumerate()
    {
        let mut engine = engine::<E>(&tokenizer, format, (options, OTHERS), Some(draft));
        let order: Vec<usize> = (0..requests.len()).map(|i| (i * 7 + round) % requests.len()).collect();
        let pause = [0, 9, 5][round % 3];
        let (mut left, mut numbers) = (order.iter(), vec![0; requests.len()]);
        let made = run(&mut engine, |engine, step| {
            let now = if pause == 0 { requests.len() } else { usize::from(step % pause == 0) };
            for next in left.by_ref().take(now) {
                numbers[*next] = engine.submit(requests[*next].clone()).unwrap();
            }
        });
        let counted = (drafted, accepted);
        for (i, want) in want.iter().enumerate() {
            let (got, guesses, right) = apart(made[&numbers[i]].clone());
            assert_eq!(&got, want, "{format:?}, request {i} with {options:?}");
            assert!(right <= guesses && (requests[i].parameters.beams.is_none() || guesses == 0));
            (drafted, accepted) = (drafted + guesses, accepted + right);
        }
        let load = engine.load();
        assert_eq!((load.running, load.waiting, load.pages), (0, 0, 0), "pages are left over");
        let counted = (drafted - counted.0, accepted - counted.1);
        assert_eq!((load.drafted_tokens as usize, load.accepted_tokens as usize), counted);
        (reused, preemptions) = (reused + load.reused_tokens, preemptions + load.preemptions);
    }
    println!("{format:?}: {accepted} of {drafted} guesses right, {reused} reused, {preemptions} preemptions");
    assert!(
        accepted > 1000 && accepted + 500 < drafted,
        "too tame: {accepted} of {drafted} guesses were right"
    );
    assert!(reused > 1000 && preemptions >= 5, "too tame: {reused} reused, {preemptions} preemptions");
}

#[test]
fn drafts_change_no_token_in_any_company_f32() {
    check::<f32>(WeightFormat::F32);
}

#[test]
fn drafts_change_no_token_in_any_company_bf16() {
    check::<bf16>(WeightFormat::Bf16);
}

#[test]
fn drafts_change_no_token_in_any_company_int8() {
    check::<bf16>(WeightFormat::Int8);
}

#[test]
fn what_a_draft_that_agrees_guesses_is_right_and_saves_steps() {
    let tokenizer = tokenizer();
    for parameters in [
        greedy(100),
        sampled(100, 3),
        Parameters { temperature: 0.7, top_p: 0.9, repetition_penalty: 1.2, ..sampled(100, 4) },
        Parameters { top_k: Some(20), frequency_penalty: 0.5, n: 2, log_probs: Some(2), ..sampled(100, 5) },
    ] {
        let parameters = Parameters { ignore_end: true, ..parameters };
        let request = Request { prompt: whole(1, 70, 270), parameters };
        let complete = |draft| alone::<bf16>(&tokenizer, WeightFormat::Int8, 0.0, draft, &request);
        let (want, without) = complete(None);
        let (made, with) = complete(Some(small()));
        let (made, drafted, accepted) = apart(made);
        assert_eq!(made, want);
        assert!(drafted == accepted && accepted > 60, "{accepted} of {drafted}");
        assert!(3 * with < without, "{with} steps, and {without} without a draft");
    }
}

#[test]
fn a_draft_that_is_always_wrong_is_hardly_asked() {
    let tokenizer = tokenizer();
    let parameters = Parameters { ignore_end: true, ..greedy(250) };
    let request = Request { prompt: vec![2, 50, 60, 70], parameters };
    // Of another width, it has nothing in common with the large model.
    let draft = Config { width: 16, embedding_width: 16, ..small() };
    let complete = |draft| alone::<f32>(&tokenizer, WeightFormat::F32, 0.2, draft, &request).0;
    let (made, drafted, accepted) = apart(complete(Some(draft)));
    assert_eq!(made, complete(None));
    assert!(accepted < 10 && (1..100).contains(&drafted), "{accepted} of {drafted}");
}

#[test]
fn cancelled_requests_leave_nothing_of_their_guesses() {
    let (tokenizer, requests) = (tokenizer(), requests());
    let few = Options {
        limits: Limits { tokens: 60, sequences: 4, reuse: true },
        cache_tokens: 30 * 64,
        draft_tokens: 6,
        pause: None,
        reserve: false,
        ends: Ends::default(),
    };
    let mut engine = engine::<f32>(&tokenizer, WeightFormat::F32, (few, 0.1), Some(small()));
    let numbers: Vec<u64> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    run(&mut engine, |engine, step| {
        if step % 6 == 5 && step / 6 < numbers.len() {
            engine.cancel(numbers[step / 6]);
        }
    });
    assert!(engine.is_idle() && engine.load().pages == 0);
}
