//! What the routes that generate and tokenise answer.

use crate::{model, model_with, options, serve, stop};
use ferropt_data::{Marks, Tokenizer};
use ferropt_engine::{Completion, Decay, Parameters, Request};
use ferropt_serve::{ModelSource, Options};
use serde_json::{Value, json};

/// What the engine gives when it is asked directly.
fn engine(prompt: &[u32], parameters: Parameters) -> Completion {
    model(4).engine.complete(Request { prompt: prompt.to_vec(), parameters }).unwrap()
}

fn sampled(max_tokens: usize) -> Parameters {
    Parameters { max_tokens: Some(max_tokens), seed: 7, ignore_end: true, ..Parameters::default() }
}

fn asked(prompt: Value) -> Value {
    json!({ "model": "opt", "prompt": prompt, "max_tokens": 12, "seed": 7, "ignore_eos": true })
}

fn with(mut object: Value, more: Value) -> Value {
    object.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    object
}

/// The texts of a stream's events, by their index; with each choice's last reason.
fn joined(events: &[Value], text: impl Fn(&Value) -> Option<&str>) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = vec![];
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let index = choice["index"].as_u64().unwrap() as usize;
        all.resize(all.len().max(index + 1), Default::default());
        assert_eq!(all[index].1, "", "something comes after the end");
        all[index].0 += text(choice).unwrap_or("");
        all[index].1 += choice["finish_reason"].as_str().unwrap_or("");
    }
    all
}

#[test]
fn completions_are_the_engines_in_every_form_of_prompt() {
    let (server, client) = serve(options());
    let tokenizer = crate::tokenizer();
    let prompts = ["the cat", "naïve 狐"];
    let ids = prompts.map(|p| tokenizer.encode_prompt(p).unwrap());
    let made = ids.each_ref().map(|ids| engine(ids, Parameters { n: 2, ..sampled(12) }));
    let expected: Vec<&str> = made.iter().flat_map(|m| m.choices.iter().map(|c| c.text.as_str())).collect();
    let prompt_tokens = ids[0].len() + ids[1].len();
    for (prompt, texts) in [
        (json!(prompts[0]), 0..2),
        (json!([prompts[1]]), 2..4),
        (json!(prompts), 0..4),
        (json!(ids[0]), 0..2),
        (json!(ids), 0..4),
    ] {
        let body = with(asked(prompt), json!({ "n": 2 }));
        let answer = client.post("/v1/completions", &body);
        assert_eq!((&answer["object"], &answer["model"]), (&json!("text_completion"), &json!("opt")));
        let choices = answer["choices"].as_array().unwrap();
        let got: Vec<&str> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
        assert_eq!(got, expected[texts.clone()]);
        assert!(
            (0..)
                .zip(choices)
                .all(|(i, c)| c["index"] == i && c["finish_reason"] == "length" && c["logprobs"].is_null())
        );
        let usage = &answer["usage"];
        assert_eq!(usage["completion_tokens"], 12 * texts.len());
        assert_eq!(
            usage["total_tokens"],
            12 * texts.len() + usage["prompt_tokens"].as_u64().unwrap() as usize
        );
        if texts == (0..4) {
            assert_eq!(usage["prompt_tokens"], prompt_tokens);
        }
        // The same as a stream.
        let body = with(body, json!({ "stream": true, "stream_options": { "include_usage": true } }));
        let mut events = client.stream("/v1/completions", &body);
        let last = events.pop().unwrap();
        assert_eq!((&last["usage"], &last["choices"]), (usage, &json!([])));
        assert!(events.iter().all(|event| event["usage"].is_null() && event["id"] == last["id"]));
        let streamed = joined(&events, |choice| choice["text"].as_str());
        assert_eq!(streamed.iter().map(|(text, _)| text.as_str()).collect::<Vec<_>>(), got);
        assert!(streamed.iter().all(|(_, finish)| finish == "length"));
    }
    // OpenAI's default, a seed of its own each time, and a text's end.
    let short = client.post("/v1/completions", &json!({ "prompt": "the", "ignore_eos": true }));
    assert_eq!(short["usage"]["completion_tokens"], 16);
    let again = client.post("/v1/completions", &json!({ "prompt": "the", "ignore_eos": true }));
    assert_ne!(short["choices"][0]["text"], again["choices"][0]["text"]);
    assert_ne!(short["id"], again["id"]);
    let text = &made[0].choices[0].text;
    let middle: String = text.chars().skip(4).take(2).collect();
    let stopped = client.post("/v1/completions", &with(asked(json!("the cat")), json!({ "stop": [middle] })));
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["choices"][0]["text"], text[..text.find(&middle).unwrap()]);
    let ended = client.post("/v1/completions", &json!({ "prompt": "the", "logit_bias": { "2": 100 } }));
    assert_eq!(
        (&ended["choices"][0]["text"], &ended["choices"][0]["finish_reason"]),
        (&json!(""), &json!("stop"))
    );
    // Searches and comparisons.
    let beams = json!({ "prompt": "the", "beams": 3, "n": 2, "max_tokens": 5 });
    assert_eq!(client.post("/v1/completions", &beams)["choices"].as_array().unwrap().len(), 2);
    let best = with(asked(json!("the")), json!({ "best_of": 3, "stream": true }));
    assert_eq!(joined(&client.stream("/v1/completions", &best), |c| c["text"].as_str()).len(), 1);
    stop(server);
}

#[test]
fn log_probabilities_have_openais_layout() {
    let (server, client) = serve(options());
    let ids = crate::tokenizer().encode_prompt("the café").unwrap();
    let made = engine(&ids, Parameters { log_probs: Some(2), echo: Some(0), ..sampled(6) });
    let body = with(asked(json!("the café")), json!({ "max_tokens": 6, "logprobs": 2, "echo": true }));
    let choice = client.post("/v1/completions", &body)["choices"][0].clone();
    let text = choice["text"].as_str().unwrap();
    assert_eq!(text, format!("the café{}", made.choices[0].text));
    let lists = &choice["logprobs"];
    let count = ids.len() - 1 + 6;
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(lists[name].as_array().unwrap().len(), count, "{name}");
    }
    // `</s>` was not asked for, so the first token has a probability: that behind it.
    let tokens: Vec<_> = made.prompt[1..].iter().chain(&made.choices[0].tokens).collect();
    let characters: Vec<char> = text.chars().collect();
    for (at, token) in tokens.iter().enumerate() {
        let own = token.log_prob.unwrap();
        assert_eq!(lists["token_logprobs"][at].as_f64().unwrap() as f32, own);
        let name = lists["tokens"][at].as_str().unwrap();
        let likeliest = lists["top_logprobs"][at].as_object().unwrap();
        assert_eq!(likeliest[name].as_f64().unwrap() as f32, own);
        assert!((2..=3).contains(&likeliest.len()), "{likeliest:?}");
        let offset = lists["text_offset"][at].as_u64().unwrap() as usize;
        // Names of tokens that are no whole characters say their bytes.
        if at < ids.len() - 1 && !name.starts_with("bytes:") {
            let length = name.chars().count();
            assert_eq!(characters[offset..offset + length].iter().collect::<String>(), name);
        }
    }
    // A stream gives the same lists in pieces.
    let events = client.stream("/v1/completions", &with(body.clone(), json!({ "stream": true })));
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let pieces =
            events.iter().flat_map(|e| e["choices"][0]["logprobs"][name].as_array().unwrap().clone());
        assert_eq!(pieces.collect::<Vec<_>>(), *lists[name].as_array().unwrap(), "{name}");
    }
    // Scoring alone, of ids as they are: the first follows nothing.
    let score = json!({ "prompt": ids, "max_tokens": 0, "echo": true, "logprobs": 1 });
    let lists = client.post("/v1/completions", &score)["choices"][0]["logprobs"].clone();
    assert_eq!((&lists["tokens"][0], &lists["token_logprobs"][0]), (&json!("</s>"), &Value::Null));
    assert_eq!(lists["top_logprobs"][0], Value::Null);
    assert_eq!(lists["token_logprobs"][1].as_f64().unwrap() as f32, made.prompt[1].log_prob.unwrap());
    // One token behind a prompt is one entry more, also where it ends the text: lm-eval takes the last one off.
    let last =
        json!({ "prompt": ids, "max_tokens": 1, "echo": true, "logprobs": 1, "logit_bias": { "2": 100 } });
    let ended = client.post("/v1/completions", &last);
    let lists = ended["choices"][0]["logprobs"].clone();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(lists[name].as_array().unwrap().len(), ids.len() + 1, "{name}");
    }
    assert_eq!((&lists["tokens"][ids.len()], &lists["text_offset"][ids.len()]), (&json!("</s>"), &json!(8)));
    assert!(lists["token_logprobs"][ids.len()].as_f64().unwrap() < 0.0);
    assert_eq!(
        (&ended["choices"][0]["text"], &ended["usage"]["completion_tokens"]),
        (&json!("the café"), &json!(1))
    );
    let off = json!({ "logprobs": false, "reasoning_effort": null });
    let off = client.post("/v1/completions", &with(asked(json!("the")), off));
    assert_eq!(off["choices"][0]["logprobs"], Value::Null);
    let none = client.post("/v1/completions", &with(asked(json!("the")), json!({ "logprobs": 0 })));
    assert_eq!(none["choices"][0]["logprobs"]["top_logprobs"], Value::Null);
    stop(server);
}

#[test]
fn conversations_are_texts_with_names() {
    let (server, client) = serve(options());
    let messages = json!([
        { "role": "system", "content": "Talk.", "type": "message" },
        { "role": "user", "content": "hello", "type": "text" },
        { "role": "assistant", "content": "hi", "refusal": null },
        { "role": "user", "content": [{ "type": "text", "text": "who" }] },
    ]);
    let body =
        json!({ "model": "opt", "messages": messages, "max_tokens": 20, "seed": 7, "ignore_eos": true });
    let text = "Talk.\n\nPerson: hello\nAssistant: hi\n\nPerson: who\nAssistant:";
    let completion = with(asked(json!(text)), json!({ "max_tokens": 20, "stop": "\nPerson:" }));
    let plain = client.post("/v1/completions", &completion);
    let answer = client.post("/v1/chat/completions", &body);
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["content"], plain["choices"][0]["text"].as_str().unwrap().trim_start());
    assert_eq!((&message["role"], &answer["object"]), (&json!("assistant"), &json!("chat.completion")));
    assert_eq!(answer["usage"], plain["usage"]);

    let events =
        client.stream("/v1/chat/completions", &with(body.clone(), json!({ "stream": true, "n": 2 })));
    assert!(
        events.iter().all(|event| event["object"] == "chat.completion.chunk" && event.get("usage").is_none())
    );
    for index in 0..2 {
        let mut own = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index);
        assert_eq!(own.next().unwrap()["delta"], json!({ "role": "assistant", "content": "" }));
        let last = own.next_back().unwrap();
        assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("length")));
        assert!(own.all(|c| c["delta"]["content"].is_string() && c["finish_reason"].is_null()));
    }
    let streamed = joined(&events, |choice| choice["delta"]["content"].as_str());
    assert_eq!(streamed[0].0, message["content"]);

    let body = with(body, json!({ "logprobs": true, "top_logprobs": 2 }));
    let content = client.post("/v1/chat/completions", &body)["choices"][0]["logprobs"]["content"].clone();
    let content = content.as_array().unwrap();
    assert_eq!(content.len(), 20);
    for token in content {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
        let bytes: Vec<u8> = serde_json::from_value(token["bytes"].clone()).unwrap();
        let text = std::str::from_utf8(&bytes);
        assert!(text.is_err() || text == Ok("") || text.unwrap() == token["token"], "{token}");
    }
    stop(server);
}

#[test]
fn metaseqs_routes_take_its_fields_and_answer_in_its_layout() {
    let (server, client) = serve(options());
    let body = json!({
        "prompt": ["the cat\r\nsat", "x"], "max_tokens": 4, "min_tokens": 1, "temperature": 0.7, "top_p": 0.9, "n": 1,
        "best_of": null, "alpha_presence": 0.5, "alpha_frequency": 0.5, "alpha_presence_src": 0, "alpha_frequency_src": 0.0,
        "alpha_src_penalty_end_idx": -1, "omega_bound": 0.3, "lambda_decay": -1, "echo": true, "logprobs": 0,
        "stop": "zzz", "seed": 1,
    });
    let first = client.post("/completions", &body);
    let choice = &first["choices"][0];
    assert!(choice["text"].as_str().unwrap().starts_with("the cat\nsat"), "{choice}");
    assert_eq!(choice["logprobs"]["finish_reason"], choice["finish_reason"]);
    assert!(choice["logprobs"]["token_logprobs"][1].is_number());
    for path in [
        "/engines/175b/completions",
        "/v1/engines/opt/completions",
        "/v2/engines/gpt-3.5-turbo-instruct/completions",
    ] {
        let answer = client.post(path, &body);
        assert_eq!((&answer["choices"], &answer["model"]), (&first["choices"], &json!("opt")), "{path}");
    }
    // Its penalties and its nucleus are the engine's, for each prompt and each of n, whoever else asks.
    let prompts = ["the cat. the dog", "the cat sat"];
    let fields = json!({
        "prompt": prompts, "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 7, "ignore_eos": true,
        "alpha_presence": 0.5, "alpha_presence_src": -2, "alpha_frequency_src": -1.5, "alpha_src_penalty_end_idx": 3,
        "omega_bound": 0.2, "lambda_decay": 0.9,
    });
    let texts = |answer: &Value| -> Vec<String> {
        answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().into()).collect()
    };
    let got = texts(&client.post("/completions", &fields));
    let tokenizer = crate::tokenizer();
    let ends = [".", "?", "!"].map(|end| tokenizer.encode(end).unwrap()).concat();
    let made = prompts.map(|prompt| {
        let parameters = Parameters {
            temperature: 0.7,
            top_p: 0.9,
            n: 2,
            log_probs: Some(0),
            presence_penalty: 0.5,
            prompt_presence_penalty: -2.0,
            prompt_frequency_penalty: -1.5,
            penalised_prompt: Some(3),
            penalties_after_temperature: true,
            decay: Some(Decay { rate: 0.9, least: 0.2, ends: ends.clone() }),
            ..sampled(12)
        };
        engine(&tokenizer.encode_prompt(prompt).unwrap(), parameters)
    });
    let want: Vec<&str> = made.iter().flat_map(|m| m.choices.iter().map(|c| c.text.as_str())).collect();
    assert_eq!(got, want);
    for without in ["alpha_presence_src", "alpha_src_penalty_end_idx", "lambda_decay"] {
        let fewer = with(fields.clone(), json!({ (without): null }));
        assert_ne!(texts(&client.post("/completions", &fewer)), got, "{without} changes nothing");
    }
    stop(server);
}

#[test]
fn generate_and_tokenise_tell_what_the_engine_knows() {
    let (server, client) = serve(options());
    let body = with(asked(json!(["the", "cat"])), json!({ "n": 2, "logprobs": 1 }));
    let answer = client.post("/generate", &body);
    let texts = answer["texts"].as_array().unwrap();
    let places: Vec<_> = texts.iter().map(|t| (t["prompt"].as_u64(), t["choice"].as_u64())).collect();
    assert_eq!(places, [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(p, c)| (Some(p), Some(c))));
    assert!(
        texts
            .iter()
            .all(|t| t["finish_reason"] == "max-tokens" && t["tokens"].as_array().unwrap().len() == 12)
    );
    assert_eq!(texts[0]["log_probs"][0]["id"], texts[0]["tokens"][0]);
    let events = client.stream("/generate", &with(body, json!({ "stream": true })));
    assert_eq!(events.last().unwrap()["usage"], answer["usage"]);
    let first: String = events
        .iter()
        .filter(|e| e["prompt"] == 0 && e["choice"] == 0)
        .map(|e| e["text"].as_str().unwrap())
        .collect();
    assert_eq!(first, texts[0]["text"]);

    let text = "the cat — naïve 狐";
    let ids = crate::tokenizer().encode_prompt(text).unwrap();
    let tokens = client.post("/tokenize", &json!({ "prompt": text }));
    assert_eq!(tokens["tokens"], json!(ids));
    assert_eq!((&tokens["count"], &tokens["max_model_len"]), (&json!(ids.len()), &json!(crate::POSITIONS)));
    let end = json!({ "prompt": "</s>", "add_special_tokens": false });
    assert_eq!(client.post("/tokenize", &end)["tokens"], json!([2]));
    assert_eq!(client.get("/tokenizer_info").json()["eos_token"], "</s>");
    assert!(
        client.post("/v1/completions", &json!({ "prompt": "</s>", "max_tokens": 0 }))["usage"]["prompt_tokens"]
            != 2
    );
    let bare = client.post(
        "/tokenize",
        &json!({ "prompt": "the", "add_special_tokens": false, "return_token_strs": true }),
    );
    assert_eq!(
        bare["token_strs"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect::<String>(),
        "the"
    );
    // Special tokens stay, as at vLLM, unless they shall not, and characters that tokens cut stay whole.
    let twice = [&ids[..], &[2, 2][..], &ids[1..]].concat();
    let kept = client.post("/detokenize", &json!({ "tokens": twice }))["prompt"].clone();
    assert_eq!(kept, format!("</s>{text}</s></s>{text}"));
    let bare = client.post("/detokenize", &json!({ "tokens": twice, "skip_special_tokens": true }));
    assert_eq!(bare["prompt"], format!("{text}{text}"));
    let back = json!({ "prompt": kept, "add_special_tokens": false });
    assert_eq!(client.post("/tokenize", &back)["tokens"], json!(twice));
    stop(server);
}

#[test]
fn special_tokens_of_a_prompt_are_those_that_were_asked_for() {
    // A fine-tuned model's tokenizer.
    let folder = tempfile::tempdir().unwrap();
    let mut tokenizer: Value = serde_json::from_str(&crate::tokenizer().to_json().unwrap()).unwrap();
    let added = [("<|user|>", false), ("[PAD]", true)].into_iter().zip(280..);
    let added =
        added.map(|((content, special), id)| json!({ "id": id, "content": content, "special": special }));
    tokenizer["added_tokens"].as_array_mut().unwrap().extend(added);
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let open = || Tokenizer::load(folder.path()).unwrap();
    let (tokenizer, used) = (open(), open());
    let open = Box::new(move || Ok(model_with(4, used)));
    let (server, client) =
        serve(Options { models: vec![ModelSource { name: "opt".into(), open }], ..options() });

    let text = "<|user|>the cat[PAD]</s>";
    for (fields, marks) in [
        (json!({}), Marks { in_front: true, in_text: false }),
        (json!({ "special_tokens": true }), Marks::HUGGING_FACE),
        (json!({ "add_special_tokens": false }), Marks::default()),
        (
            json!({ "add_special_tokens": false, "special_tokens": true }),
            Marks { in_front: false, in_text: true },
        ),
    ] {
        let ids = tokenizer.encode_as(text, marks).unwrap();
        let texts = [json!(text), json!(ids)].map(|prompt| {
            let answer = client.post("/v1/completions", &with(asked(prompt), fields.clone()));
            assert_eq!(answer["usage"]["prompt_tokens"], ids.len(), "{fields}");
            answer["choices"][0]["text"].clone()
        });
        assert_eq!(texts[0], texts[1], "{fields}");
    }
    // Documents of any length are tokenised.
    let long = client.post("/tokenize", &json!({ "prompt": "the cat ".repeat(50_000) }));
    assert!(long["count"].as_u64().unwrap() > 50_000);
    // What was given is echoed, and its first token follows nothing.
    let fields = json!({ "add_special_tokens": false, "echo": true, "logprobs": 0, "max_tokens": 0 });
    let echoed = client.post("/v1/completions", &with(asked(json!("the cat")), fields));
    assert_eq!(echoed["choices"][0]["text"], "the cat");
    assert_eq!(echoed["choices"][0]["logprobs"]["token_logprobs"][0], Value::Null);

    let asked = json!({ "prompt": text, "add_special_tokens": false, "return_token_strs": true });
    let tokens = client.post("/tokenize", &asked);
    let names: Vec<&str> =
        tokens["token_strs"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!((names[0], names.concat().as_str()), ("<|user|>", text));
    assert_eq!(client.post("/detokenize", &json!({ "tokens": tokens["tokens"] }))["prompt"], text);
    let bare = json!({ "tokens": tokens["tokens"], "skip_special_tokens": true });
    assert_eq!(client.post("/detokenize", &bare)["prompt"], "<|user|>the cat");
    stop(server);
}
