//! The engine behind its handle.

use crate::*;
use ferropt_engine::{Event, Handle};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

const FORMAT: WeightFormat = WeightFormat::F32;

fn handle(sequences: usize) -> Handle {
    let device = device();
    let decoder = decoder(&device, &config(), FORMAT);
    Handle::start::<_, f32>(device, decoder, None, Arc::new(tokenizer()), Options::new(sequences, 320))
        .unwrap()
}

fn request(seed: u64, max_tokens: usize) -> Request {
    let parameters = Parameters { ignore_end: true, ..sampled(max_tokens, seed) };
    Request { prompt: vec![2, 10 + seed as u32, 11], parameters }
}

/// Waits for the engine to have nothing to do.
fn wait_until_idle(handle: &Handle) {
    let begun = Instant::now();
    while handle.load().running + handle.load().waiting > 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", handle.load());
        std::thread::yield_now();
    }
    assert_eq!(handle.load().pages, 0);
}

#[test]
fn many_threads_get_what_each_would_alone() {
    let (handle, tokenizer) = (handle(4), tokenizer());
    std::thread::scope(|scope| {
        for seed in 0..9 {
            let (handle, tokenizer) = (&handle, &tokenizer);
            scope.spawn(move || {
                let made = handle.complete(request(seed, 30)).unwrap();
                assert_eq!(made, alone::<f32>(tokenizer, FORMAT, &request(seed, 30)));
            });
        }
    });
    wait_until_idle(&handle);
}

#[test]
fn dropping_the_events_cancels() {
    let handle = handle(2);
    let mut events = handle.submit(request(1, 300)).unwrap();
    assert_eq!(events.next(), Some(Event::Read));
    assert!(matches!(events.next(), Some(Event::Text { .. })));
    drop(events);
    // It would otherwise have some hundred steps to go.
    let other = handle.complete(request(2, 3)).unwrap();
    assert_eq!(other.choices[0].tokens.len(), 3);
    wait_until_idle(&handle);
}

#[test]
fn a_sink_that_has_enough_ends_its_request() {
    let handle = handle(2);
    let (sender, received) = channel();
    let mut pieces = 0;
    let sink = move |event| {
        pieces += 1;
        sender.send(event).unwrap();
        pieces < 5
    };
    handle.submit_to(request(3, 300), sink).unwrap();
    // The sink, and with it the sender, is gone after the fifth.
    assert_eq!(received.iter().count(), 5);
    wait_until_idle(&handle);
}

#[test]
fn many_requests_come_back_in_order() {
    let handle = handle(3);
    let mut made = vec![];
    let requests = (0..10).map(|seed| Ok(request(seed, 1 + 7 * (seed as usize % 3))));
    handle
        .complete_all(requests, 4, |completion| {
            made.push(completion.choices[0].tokens.len());
            Ok(())
        })
        .unwrap();
    assert_eq!(made, [1, 8, 15, 1, 8, 15, 1, 8, 15, 1]);
    let bad = handle.complete_all(
        [Ok(request(0, 5)), Ok(Request { prompt: vec![], parameters: greedy(1) })],
        4,
        |_| Ok(()),
    );
    assert!(bad.unwrap_err().to_string().contains("no tokens"));
    wait_until_idle(&handle);
}

#[test]
fn scores_are_sums_and_know_what_is_likeliest() {
    let handle = handle(2);
    let score = handle.score("the cat", " sat on the mat").unwrap();
    let whole = handle.score("", "the cat sat on the mat").unwrap();
    assert_eq!(score.tokens[..], whole.tokens[whole.tokens.len() - score.tokens.len()..]);
    let sum: f64 = score.tokens.iter().map(|t| t.log_prob.unwrap() as f64).sum();
    assert_eq!((score.log_prob, score.greedy), (sum, false));
    // A space at the end of the context belongs to the next word.
    assert_eq!(handle.score("the cat ", "sat on the mat").unwrap(), score);
    let prompt = handle.tokenizer().encode_prompt("the").unwrap();
    let made = handle.complete(Request { prompt, parameters: greedy(4) }).unwrap();
    let greedy = handle.score("the", &made.choices[0].text).unwrap();
    let same = greedy.tokens.iter().map(|t| t.id).eq(made.choices[0].tokens.iter().map(|t| t.id));
    assert!(!same || greedy.greedy);
    assert_eq!(handle.score("the", "").unwrap().tokens.len(), 0);
}

#[test]
fn dropping_the_handle_ends_everything() {
    let handle = handle(2);
    let events = handle.submit(request(1, 300)).unwrap();
    drop(handle);
    let error = events.complete().unwrap_err().to_string();
    assert!(error.contains("engine has ended"), "{error}");
}
