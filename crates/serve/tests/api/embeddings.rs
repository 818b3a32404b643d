//! Vectors of texts, in OpenAI's shape.

use crate::client::until;
use crate::{model, options, serve, stop};
use ferropt_engine::{Parameters, Pooling, Request};
use serde_json::{Value, json};

/// The vector that the engine gives when it is asked directly.
fn engine(prompt: &[u32], pooling: Pooling) -> Vec<f32> {
    let parameters = Parameters::embedding(pooling);
    model(1).engine.complete(Request { prompt: prompt.to_vec(), parameters }).unwrap().embedding.unwrap()
}

fn vector(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

#[test]
fn embeddings_are_the_engines_in_every_form_of_input() {
    let (server, client) = serve(options());
    let tokenizer = crate::tokenizer();
    let texts = ["the cat", "naïve 狐 on the mat"];
    let ids = texts.map(|text| tokenizer.encode_prompt(text).unwrap());
    let made = ids.each_ref().map(|ids| engine(ids, Pooling::Mean));
    for (input, which) in [
        (json!(texts[0]), 0..1),
        (json!([texts[1]]), 1..2),
        (json!(texts), 0..2),
        (json!(ids[0]), 0..1),
        (json!(ids), 0..2),
    ] {
        let body = json!({ "input": input, "model": "opt", "user": "u", "dimensions": made[0].len() });
        let answer = client.post("/v1/embeddings", &body);
        assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("opt")));
        let tokens: usize = ids[which.clone()].iter().map(Vec::len).sum();
        assert_eq!(answer["usage"], json!({ "prompt_tokens": tokens, "total_tokens": tokens }));
        let data = answer["data"].as_array().unwrap();
        assert_eq!(data.len(), which.len());
        for ((index, entry), want) in (0..).zip(data).zip(&made[which.clone()]) {
            assert_eq!((&entry["index"], &entry["object"]), (&json!(index), &json!("embedding")));
            assert_eq!(&vector(&entry["embedding"]), want);
        }
    }
    let length: f32 = made[0].iter().map(|x| x * x).sum();
    assert!((length - 1.0).abs() < 1e-5);
    let last = client.post("/v1/embeddings", &json!({ "input": texts[0], "pooling": "last" }));
    assert_eq!(vector(&last["data"][0]["embedding"]), engine(&ids[0], Pooling::Last));
    let coded = client.post("/v1/embeddings", &json!({ "input": texts[0], "encoding_format": "base64" }));
    let coded = coded["data"][0]["embedding"].as_str().unwrap();
    assert_eq!(coded.len(), (4 * made[0].len()).div_ceil(3) * 4);
    // The first number, of its first six digits of six bits each.
    let digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits = coded.chars().take(6).fold(0u64, |bits, c| bits << 6 | digits.find(c).unwrap() as u64);
    assert_eq!(f32::from_bits(((bits >> 4) as u32).swap_bytes()), made[0][0]);
    stop(server);
}

#[test]
fn refusals_limits_and_vanishing_clients_are_as_for_texts() {
    let (server, client) = serve(options());
    let long = json!({ "input": ["x", "word ".repeat(2000)] }).to_string();
    for (body, code, param, part) in [
        ("{}", "missing_field", "input", "input"),
        (r#"{"input": "x", "dimensions": 7}"#, "invalid_value", "dimensions", "64 numbers"),
        (r#"{"input": "x", "max_tokens": 7}"#, "unknown_field", "max_tokens", "max_tokens"),
        (r#"{"input": [300]}"#, "invalid_value", "input", "300"),
        (&*long, "context_length_exceeded", "input", "1024"),
    ] {
        let answer = client.try_post("/v1/embeddings", body);
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status, &error["code"], &error["param"]),
            (400, &json!(code), &json!(param)),
            "{error}"
        );
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    }
    // More prompts than may wait follow one another, and the limit is that of texts.
    let input: Vec<[usize; 2]> = (0..300).map(|i| [4 + i % 250, 5 + i / 250]).collect();
    let answer = client.post("/v1/embeddings", &json!({ "input": input }));
    let last = engine(&[4 + 49, 6], Pooling::Mean);
    assert_eq!(
        (answer["data"].as_array().unwrap().len(), vector(&answer["data"][299]["embedding"])),
        (300, last)
    );
    let input = json!({ "input": vec!["x"; 2049] }).to_string();
    let refused = client.try_post("/v1/embeddings", &input).json()["error"]["message"].to_string();
    assert!(refused.contains("2049") && refused.contains("2048"), "{refused}");
    let many = json!({ "input": vec!["the cat sat on the mat. ".repeat(30); 100] });
    let connections: Vec<_> = (0..2).map(|_| client.begin("/v1/embeddings", &many)).collect();
    until("they are at work", || client.metric("ferropt_running") > 0.0);
    drop(connections);
    until("everything is free", || {
        ["ferropt_cache_pages_used", "ferropt_running", "ferropt_queue_length", "ferropt_requests_in_flight"]
            .iter()
            .all(|metric| client.metric(metric) == 0.0)
    });
    assert_eq!(client.metric("ferropt_cancelled_total"), 2.0);
    stop(server);
}
