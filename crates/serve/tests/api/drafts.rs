//! A draft that guesses ahead is seen in the metrics, and nowhere else.

use crate::client::until;
use crate::{POSITIONS, options, serve, stop, tokenizer};
use ferropt_device::WeightFormat;
use ferropt_device::cpu::{CpuDevice, CpuOptions};
use ferropt_engine::{Handle, Options as EngineOptions};
use ferropt_model::{Config, Decoder, Matrices, initial_rows};
use ferropt_serve::{ModelSource, Options};
use ferropt_train::inference::Model;
use serde_json::{Value, json};
use std::sync::Arc;

/// A model of many layers that each add little, so that one with the first of them alone guesses well.
fn source(name: &str, draft: bool) -> ModelSource {
    let open = move || {
        let device = CpuDevice::new(CpuOptions { threads: Some(1), ..CpuOptions::default() })?;
        let config =
            |layers| Config { layers, vocab: 300, positions: POSITIONS, ..Config::preset("tiny").unwrap() };
        let decoder = |layers| {
            let (config, table) = (config(layers), config(layers).parameters());
            let read = |index: usize, rows: std::ops::Range<usize>, out: &mut [f32]| {
                initial_rows(&table[index], index, 1, rows.start, out);
                Ok(())
            };
            Decoder::new(&device, &config, WeightFormat::F32, &read, Matrices::Rows)
        };
        let (large, draft) = (decoder(8)?, if draft { Some(decoder(1)?) } else { None });
        let options = EngineOptions::new(4, POSITIONS);
        let engine = Handle::start::<CpuDevice, f32>(device, large, draft, Arc::new(tokenizer()), options)?;
        let (config, weights) = (config(8), WeightFormat::F32);
        Ok(Model {
            engine,
            config,
            weights,
            weight_bytes: 0,
            step: 0,
            damaged: vec![],
            kept: None,
            rounded: false,
            load_seconds: 0.0,
        })
    };
    ModelSource { name: name.into(), open: Box::new(open) }
}

#[test]
fn texts_are_the_same_with_a_draft_and_metrics_count_its_guesses() {
    let models = vec![source("plain", false), source("drafted", true)];
    let (server, client) = serve(Options { models, aliases: vec![], ..options() });
    for fields in [
        json!({ "temperature": 0 }),
        json!({ "n": 2, "logprobs": 2, "stop": "zz" }),
        json!({ "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2 }),
    ] {
        let texts = |model: &str| {
            let mut body = json!({ "prompt": "the cat", "max_tokens": 60, "seed": 3, "ignore_eos": true, "model": model });
            body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            client.post("/v1/completions", &body)["choices"].clone()
        };
        assert_eq!(texts("plain"), texts("drafted"), "{fields}");
    }
    let guessed = |model: &str| {
        ["tokens", "accepted_tokens"]
            .map(|what| client.metric(&format!("ferropt_draft_{what}_total{{model=\"{model}\"}}")))
    };
    until("all is counted", || client.metric("ferropt_running{model=\"drafted\"}") == 0.0);
    let [drafted, accepted] = guessed("drafted");
    assert!(accepted > 50.0 && accepted <= drafted, "{accepted} of {drafted}");
    assert_eq!(guessed("plain"), [0.0, 0.0]);
    let empty: Value = client.post("/v1/embeddings", &json!({ "input": "the cat", "model": "drafted" }));
    assert_eq!(
        empty["data"],
        client.post("/v1/embeddings", &json!({ "input": "the cat", "model": "plain" }))["data"]
    );
    stop(server);
}
