//! Answers that take long to be made, and clients that take in what they asked for slowly, or not at all.

use crate::client::until;
use crate::{options, serve, source, stop};
use ferropt_serve::{Limits, Options};
use serde_json::json;
use std::net::TcpStream;
use std::thread::spawn;
use std::time::Duration;

#[test]
fn clients_that_take_nothing_in_are_left() {
    let limits = Limits { client_time: Duration::from_millis(500), ..Limits::default() };
    let (server, client) = serve(Options { limits, models: vec![source("opt", 64)], ..options() });
    // More than sockets hold: half a kilobyte for each of a hundred thousand tokens.
    let body = json!({ "prompt": "the", "max_tokens": 1000, "n": 100, "ignore_eos": true, "logprobs": 5, "stream": true });
    let connection = client.begin("/v1/completions", &body);
    until("it has begun", || client.metric("ferropt_running") > 0.0);
    until("it is left", || client.metric("ferropt_requests_in_flight") == 0.0);
    assert_eq!(client.metric("ferropt_cancelled_total"), 1.0);
    assert_eq!(client.metric("ferropt_slow_clients_total{reason=\"time\"}"), 1.0);
    until("it is free", || client.metric("ferropt_cache_pages_used") == 0.0);
    drop(connection);
    stop(server);
}

#[test]
fn the_memory_of_answers_that_nobody_takes_in_is_bounded_and_others_get_theirs() {
    let limits = Limits { answer_memory: 20_000_000, ..Limits::default() };
    let (server, client) = serve(Options { limits, models: vec![source("opt", 1)], ..options() });
    let prompt: Vec<usize> = (0..1000).map(|i| 4 + i % 250).collect();
    for (round, stream) in [(1.0, false), (2.0, true)] {
        // More than sockets hold, and than there is room for twice: half a million names with numbers.
        let body = json!({ "prompt": prompt, "echo": true, "logprobs": 100, "max_tokens": 0, "n": 5, "stream": stream });
        let slow = client.begin("/v1/completions", &body);
        until("it is there", || client.metric("ferropt_answer_memory_bytes") > 10_000_000.0);
        let headers = [("Content-Type", "application/json")];
        let answer = client.send("POST", "/v1/completions", &headers, body.to_string().as_bytes());
        let end = if stream { "[DONE]\n\n" } else { "}" };
        assert!(answer.status == 200 && answer.text().ends_with(end), "{}", answer.status);
        assert_eq!(client.metric("ferropt_slow_clients_total{reason=\"memory\"}"), round);
        until("all is free", || client.metric("ferropt_answer_memory_bytes") == 0.0);
        drop(slow);
    }
    stop(server);
}

#[test]
fn a_stream_begins_although_its_first_piece_takes_long() {
    let limits = Limits {
        silence: Duration::from_millis(200),
        request_time: Duration::from_secs(1),
        ..Limits::default()
    };
    let (server, client) = serve(Options { limits, models: vec![source("opt", 1)], ..options() });
    // Nothing of it is there before all texts can be compared.
    let body = json!({ "prompt": "the cat", "max_tokens": 1000, "best_of": 128, "ignore_eos": true, "stream": true });
    let mut stream = client.begin("/v1/completions", &body);
    let begin = stream.until("\n: still at work\n");
    assert!(begin.starts_with("HTTP/1.1 200"), "{begin}");
    // What goes wrong then is an event.
    let rest = stream.rest_text();
    assert!(rest.contains("request_time") && rest.contains("[DONE]"), "{rest}");
    stop(server);
}

#[test]
fn a_server_that_stops_waits_until_answers_are_taken_in() {
    let (server, client) = serve(options());
    let prompt: Vec<usize> = (0..1000).map(|i| 4 + i % 250).collect();
    // More than sockets hold.
    let body = json!({ "prompt": prompt, "echo": true, "logprobs": 100, "max_tokens": 0, "n": 5 });
    let slow = client.begin("/v1/completions", &body);
    let made = "ferropt_requests_total{route=\"/v1/completions\",status=\"200\"}";
    until("it is made", || client.metric_if_any(made) == Some(1.0));
    let (address, stopping) = (client.address, spawn(move || server.stop(Duration::from_millis(500))));
    until("its time is over", || TcpStream::connect(address).is_err());
    drop(slow);
    assert_eq!(stopping.join().unwrap(), 1);
}
