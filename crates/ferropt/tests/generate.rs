//! `ferropt generate`, `chat`, `score` and `serve` with a run that this test trains.

mod lab;

use ferropt_train::inference::{Model, Opening};
use ferropt_train::weight_cache::{Outcome, WeightCache};
use lab::{Lab, ferropt, text};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Output, Stdio};

/// A run that has learnt some sentences.
fn trained() -> (Lab, String) {
    let lab = Lab::new();
    lab.train(&lab.config("run", 150), &["model.dropout=0", "model.attention_dropout=0"]);
    let run = lab.path("run").display().to_string();
    (lab, run)
}

/// Runs a command with the model and some standard input.
fn with_input(command: &str, run: &str, args: &[&str], input: &str) -> Output {
    let mut child = ferropt()
        .args([command, "--model", run])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{command} {args:?}: {}", text(&out));
    out
}

fn printed(out: &Output) -> String {
    String::from_utf8(out.stdout.clone()).unwrap()
}

fn objects(out: &Output) -> Vec<Value> {
    printed(out).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn generates_what_it_learnt() {
    let (lab, run) = trained();
    let generate = |args: &[&str]| printed(&with_input("generate", &run, args, ""));
    let greedy = generate(&["--greedy", "--max-tokens", "40", "The cat "]);
    assert_eq!(greedy, generate(&["--greedy", "--max-tokens", "40", "--threads", "1", "The cat "]));
    assert!(greedy.starts_with("The cat "), "{greedy}");
    assert!(
        greedy.contains(" the ") || greedy.contains(" a ") || greedy.contains("."),
        "learnt nothing: {greedy}"
    );

    let sampled =
        |seed: &str| generate(&["--seed", seed, "--temperature", "1.5", "--max-tokens", "40", "A "]);
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
    assert_eq!(generate(&["--top-k", "1", "--max-tokens", "40", "The cat "]), greedy, "top-k 1 is greedy");
    for input in ["The cat ", "The cat \n", "The cat \r\n"] {
        let piped = with_input("generate", &run, &["--greedy", "--max-tokens", "40"], input);
        assert_eq!(printed(&piped), greedy, "{input:?} from standard input");
    }
    let piped = with_input("generate", &run, &["--json", "--max-tokens", "0"], "The cat\n\n");
    assert_eq!(objects(&piped)[0]["prompt"], "The cat\n", "one line end is no part of the text");
    for weights in ["f32", "bf16", "int8", "int4", "int3"] {
        let made = generate(&["--weights", weights, "--greedy", "--max-tokens", "20", "The cat "]);
        assert!(made.starts_with("The cat ") && made.len() > 20, "{weights}: {made}");
    }

    // A stop string is cut off, in whatever tokens it comes.
    let stop = &greedy[20..23];
    let stopped = generate(&["--greedy", "--max-tokens", "40", "--stop", stop, "The cat "]);
    let end = 8 + greedy[8..].find(stop).unwrap();
    assert_eq!(stopped.trim_end_matches('\n'), greedy[..end].trim_end_matches('\n'));

    // Several prompts at once give what each gives alone.
    let prompts = ["The cat ", "A sailor ", "My aunt likes"];
    std::fs::write(lab.path("prompts.txt"), prompts.join("\n\n")).unwrap();
    let json: Vec<String> = prompts.iter().map(|p| serde_json::json!({ "prompt": p }).to_string()).collect();
    std::fs::write(lab.path("prompts.jsonl"), json.join("\n")).unwrap();
    for name in ["prompts.txt", "prompts.jsonl"] {
        let file = lab.path(name).display().to_string();
        let args = ["--json", "--seed", "5", "--max-tokens", "15", "--n", "2"];
        let all = objects(&with_input("generate", &run, &[&args[..], &["--file", &file]].concat(), ""));
        assert_eq!(all.len(), 6);
        for (i, prompt) in prompts.iter().enumerate() {
            let alone = objects(&with_input("generate", &run, &[&args[..], &[prompt]].concat(), ""));
            for choice in 0..2 {
                assert_eq!(all[2 * i + choice]["text"], alone[choice]["text"], "{prompt} of {name}");
                assert_eq!(alone[choice]["prompt"], *prompt);
            }
        }
    }

    // The field that holds the text can be named.
    let line = serde_json::json!({ "body": "The cat ", "id": 7 }).to_string();
    std::fs::write(lab.path("bodies.jsonl"), &line).unwrap();
    let bodies = lab.path("bodies.jsonl").display().to_string();
    let args = ["--greedy", "--json", "--max-tokens", "40", "--text-field", "body", "--file", &bodies];
    let made = &objects(&with_input("generate", &run, &args, ""))[0];
    assert_eq!(format!("The cat {}", made["text"].as_str().unwrap()).trim_end(), greedy.trim_end());
    let named = objects(&with_input("score", &run, &["--text-field", "body", &bodies], ""));
    assert_eq!(named[0]["log_prob"], objects(&with_input("score", &run, &[], "The cat "))[0]["log_prob"]);

    // Log-probabilities of a text are the same when it is written, and when it is read.
    let args =
        ["--json", "--greedy", "--max-tokens", "12", "--log-probs", "2", "--echo", "--ignore-end", "The cat"];
    let made = &objects(&with_input("generate", &run, &args, ""))[0];
    assert_eq!(made["finish_reason"], "max-tokens");
    let numbers = |list: &Value| -> Vec<f64> {
        list.as_array().unwrap().iter().filter_map(|token| token["log_prob"].as_f64()).collect()
    };
    assert_eq!((numbers(&made["prompt_log_probs"]).len(), numbers(&made["log_probs"]).len()), (7, 12));
    let pair = serde_json::json!({ "context": "The cat", "continuation": made["text"] });
    std::fs::write(lab.path("pair.jsonl"), pair.to_string()).unwrap();
    let pair = lab.path("pair.jsonl").display().to_string();
    let out = with_input("score", &run, &[&pair], "");
    let score = &objects(&out)[0];
    assert_eq!(numbers(&score["log_probs"]), numbers(&made["log_probs"]));
    assert_eq!((score["tokens"].as_u64(), score["greedy"].as_bool()), (Some(12), Some(true)));
    let sum: f64 = numbers(&score["log_probs"]).iter().sum();
    let perplexity = format!("perplexity {:.4}", (-sum / 12.0).exp());
    assert!(text(&out).contains(&perplexity), "{perplexity}: {}", text(&out));

    // Beams find nothing less likely than greedy does.
    let total = |args: &[&str]| -> f64 {
        let common = ["--json", "--max-tokens", "8", "--log-probs", "0", "--min-tokens", "8", "The cat "];
        numbers(&objects(&with_input("generate", &run, &[args, &common].concat(), ""))[0]["log_probs"])
            .iter()
            .sum()
    };
    assert!(total(&["--beams", "8"]) >= total(&["--greedy"]) - 1e-6);

    // A smaller model that guesses ahead is of use, and changes nothing.
    let config = lab.config("deep", 100);
    lab.train(&config, &["model.dropout=0", "model.attention_dropout=0", "model.layers=8"]);
    let (deep, draft) = (lab.path("deep").display().to_string(), &run);
    let file = lab.path("prompts.txt").display().to_string();
    for args in [
        &["--greedy", "The cat "][..],
        &["--greedy", "--weights", "int8", "The cat "],
        &["--seed", "4", "--n", "3", "--repetition-penalty", "1.1", "The cat "],
        &["--temperature", "0.8", "--stop", "moon", "--file", &file],
    ] {
        let args = [&["--json", "--max-tokens", "40"], args].concat();
        let without = objects(&with_input("generate", &deep, &args, ""));
        let with = [&args[..], &["--draft", draft, "--draft-tokens", "3"]].concat();
        let with = objects(&with_input("generate", &deep, &with, ""));
        let texts = |made: &[Value]| made.iter().map(|made| made["text"].clone()).collect::<Vec<_>>();
        assert_eq!(texts(&with), texts(&without), "{args:?}");
        let sum =
            |made: &[Value], key: &str| made.iter().map(|made| made[key].as_u64().unwrap()).sum::<u64>();
        let (drafted, accepted) = (sum(&with, "drafted"), sum(&with, "accepted"));
        assert!(accepted <= drafted && (accepted > 0 || with.len() > 1), "{args:?}: {accepted} of {drafted}");
        assert_eq!(sum(&without, "drafted"), 0);
    }

    // Texts that the model has learnt are likelier than others.
    let out = with_input("score", &run, &["--summary"], "The cat sees the moon.\n\nzxq vjk qqq.\n");
    let scores = objects(&out);
    assert_eq!((scores[0]["line"].as_u64(), scores[1]["line"].as_u64()), (Some(1), Some(3)));
    let mean = |s: &Value| s["log_prob"].as_f64().unwrap() / s["tokens"].as_f64().unwrap();
    assert!(mean(&scores[0]) > mean(&scores[1]) + 1.0, "{scores:?}");
    assert!(scores[0].get("log_probs").is_none());

    // A conversation, which gets longer than the model's 64 positions.
    let args = ["--max-tokens", "10", "--system", "Talk.", "--user", "A", "--assistant", "B"];
    let talk = printed(&with_input("chat", &run, &args, "hello\nwho is it\n\nwhat\nwhere\nwhy\n"));
    assert!(talk.starts_with("B:") && talk.matches("\nB:").count() >= 4, "{talk}");
    let talk =
        |args: &[&str]| printed(&with_input("chat", &deep, args, "hello\nwho is it\n\nwhat\nwhere\nwhy\n"));
    assert_eq!(talk(&[&args[..], &["--draft", draft]].concat()), talk(&args));
}

/// What a checkpoint's weights were made of is verified once, and again when it changes.
#[test]
fn checksums_are_looked_at_until_weights_are_kept() {
    let lab = Lab::new();
    lab.train(&lab.config("run", 5), &[]);
    let cache = Some(WeightCache::new(lab.path("kept")).with_least(0));
    let opening = Opening { cache, threads: Some(1), ..Opening::default() };
    let open = || Model::open(lab.path("run"), &opening);
    assert!(matches!(open().unwrap().kept, Some(Outcome::Kept(_))));
    assert!(matches!(open().unwrap().kept, Some(Outcome::Found)));
    let file = lab.path("run/checkpoints/step-00000005/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let refused = format!("{:#}", open().err().unwrap());
    assert!(refused.contains("model.safetensors is damaged: its CRC-32C"), "{refused}");
}

/// A fine-tuned model's own tokens, in all the files that tell of them.
#[test]
fn added_tokens_are_read_where_they_are_asked_for_and_generated() {
    let lab = Lab::new();
    let mut tokenizer: Value =
        serde_json::from_slice(&std::fs::read(lab.path("tokenizer.json")).unwrap()).unwrap();
    let mut added = tokenizer["added_tokens"][0].clone();
    (added["id"], added["content"]) = (260.into(), "[PAD]".into());
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    std::fs::write(lab.path("tokenizer.json"), tokenizer.to_string()).unwrap();
    lab.train(&lab.config("run", 5), &["model.vocab=264"]);
    let run = lab.path("run").display().to_string();
    let folder = |name: &str| {
        let folder = lab.path(name);
        let out =
            ferropt().args(["checkpoint", "convert", "--to", "hf", &run]).arg(&folder).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        let write = |name: &str, content: &str| std::fs::write(folder.join(name), content).unwrap();
        if name != "whole" {
            std::fs::remove_file(folder.join("tokenizer.json")).unwrap();
            write("vocab.json", &tokenizer["model"]["vocab"].to_string());
            write("merges.txt", "#version: 0.2\n");
            write(
                "tokenizer_config.json",
                r#"{"added_tokens_decoder": {"260": {"content": "[PAD]", "special": true}}}"#,
            );
        }
        if name == "old" {
            write("tokenizer_config.json", r#"{"pad_token": "[PAD]"}"#);
            write("added_tokens.json", r#"{"[PAD]": 260}"#);
        }
        folder.display().to_string()
    };
    let characters = b"[PAD]".map(|byte| u64::from(byte) + 4);
    for model in [run.clone(), folder("whole"), folder("pair"), folder("old")] {
        let read = |args: &[&str], text: &str| -> (Vec<u64>, String) {
            let echo = ["--json", "--max-tokens", "0", "--log-probs", "0", "--echo", text];
            let out = with_input("generate", &model, &[args, &echo].concat(), "");
            let tokens = objects(&out)[0]["prompt_log_probs"].as_array().unwrap().clone();
            (tokens.iter().map(|token| token["id"].as_u64().unwrap()).collect(), text_of_errors(&out))
        };
        let (ids, said) = read(&[], "[PAD]a");
        assert_eq!(ids, [&[2][..], &characters, &[101]].concat());
        assert!(said.contains("[PAD]") && said.contains("--special-tokens"), "{said}");
        let (ids, said) = read(&["--special-tokens"], "[PAD]a</s>");
        assert_eq!((ids, said.contains("note")), (vec![2, 260, 101, 2], false));
        assert_eq!(read(&["--special-tokens", "--no-end-in-front"], "[PAD]a").0, [260, 101]);
        assert_eq!(read(&["--no-end-in-front"], "ab").0, [101, 102]);
        assert!(!read(&[], "[PA D]").1.contains("note"));

        let args =
            ["--json", "--max-tokens", "2", "--log-probs", "0", "--greedy", "--logit-bias", "260=100", "a"];
        let made = &objects(&with_input("generate", &model, &args, ""))[0];
        assert_eq!((&made["log_probs"][1]["id"], &made["text"]), (&260.into(), &"".into()));
    }

    let score = |args: &[&str]| objects(&with_input("score", &run, args, "ab</s>\n"))[0].clone();
    let ids = |score: &Value| -> Vec<u64> {
        score["log_probs"].as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap()).collect()
    };
    let said = text_of_errors(&with_input("score", &run, &[], "[PAD]\n[PAD]\n"));
    assert_eq!(said.matches("note: \"[PAD]\"").count(), 1, "{said}");
    assert_eq!(ids(&score(&["--special-tokens"])), [101, 102, 2]);
    assert_eq!(ids(&score(&["--special-tokens", "--no-end-in-front"])), [102, 2]);
    let talk = with_input("chat", &run, &["--max-tokens", "3", "--user", "[PAD]"], "hello\nyou\n");
    assert_eq!(text_of_errors(&talk).matches("note").count(), 1);
}

/// What ends the texts of a fine-tuned model is what its files say.
#[test]
fn texts_end_with_the_tokens_that_a_models_files_name() {
    let lab = Lab::new();
    lab.train(&lab.config("run", 5), &[]);
    let run = lab.path("run").display().to_string();
    let convert = |from: &str, to: &str| {
        let (format, to) = to.split_once(' ').unwrap_or(("hf", to));
        let mut command = ferropt();
        let out =
            command.args(["checkpoint", "convert", "--to", format, from]).arg(lab.path(to)).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        lab.path(to).display().to_string()
    };
    let generate = |model: &str, more: &[&str]| {
        let args = ["--json", "--greedy", "--max-tokens", "4", "--logit-bias", "101=100", "x"];
        let made = objects(&with_input("generate", model, &[more, &args].concat(), "")).remove(0);
        (made["text"].as_str().unwrap().to_owned(), made["finish_reason"].as_str().unwrap().to_owned())
    };
    let never = ("aaaa".to_owned(), "max-tokens".to_owned());
    let at_once = (String::new(), "end-of-text".to_owned());
    assert_eq!(generate(&run, &[]), never);

    let model = convert(&run, "model");
    let config = lab.path("model/config.json");
    let set = |ends: Value| {
        let mut json: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        json["eos_token_id"] = ends;
        std::fs::write(&config, json.to_string()).unwrap();
    };
    set(101.into());
    assert_eq!(generate(&model, &[]), at_once);
    set(vec![2, 101].into());
    assert_eq!(generate(&model, &[]), at_once);
    let (text, finish) = generate(&model, &["--ignore-end"]);
    assert!(finish == "max-tokens" && !text.contains('a'), "{text}");
    let (text, finish) = generate(&model, &["--min-tokens", "2"]);
    assert!(finish == "end-of-text" && !text.is_empty() && !text.contains('a'), "{text}");
    // It stays so when the model is written anew.
    assert_eq!(generate(&convert(&model, "again"), &[]), at_once);
    let parts = convert(&model, "metaseq parts");
    assert_eq!(generate(&parts, &[]), at_once);
    assert_eq!(generate(&convert(&parts, "hf back"), &[]), at_once);

    // What is meant for generation comes first.
    let generation = lab.path("model/generation_config.json");
    for (content, expected) in [(r#"{"eos_token_id": [2]}"#, &never), ("{}", &at_once)] {
        std::fs::write(&generation, content).unwrap();
        assert_eq!(generate(&model, &[]), *expected);
    }
    for (content, part) in [
        (r#"{"eos_token_id": "</s>"}"#, "\"</s>\""),
        (r#"{"eos_token_id": []}"#, "0 tokens"),
        (r#"{"eos_token_id": [1, 2, 3, 4, 5, 6, 7, 8, 9]}"#, "9 tokens"),
        ("{", "generation_config.json"),
    ] {
        std::fs::write(&generation, content).unwrap();
        let out = ferropt().args(["generate", "--model", &model, "x"]).output().unwrap();
        let said = text_of_errors(&out);
        assert!(!out.status.success() && said.contains(part), "{content}: {said}");
    }
}

fn text_of_errors(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

#[test]
fn serves_what_it_learnt() {
    let (lab, run) = trained();
    let key = ferropt().args(["serve", "key", "someone"]).output().unwrap();
    std::fs::write(lab.path("keys"), &key.stdout).unwrap();
    let key = String::from_utf8_lossy(&key.stderr).trim().rsplit(' ').next().unwrap().to_string();
    let keys = lab.path("keys").display().to_string();
    let model = format!("cats={run}");
    let args = ["serve", "--model", &model, "--alias", "moons=cats", "--port", "0", "--api-keys", &keys];
    let mut server = ferropt().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let address = line.split("http://").nth(1).unwrap().split(';').next().unwrap().to_string();
    let ask = |method: &str, path: &str, body: &str| {
        let mut stream = TcpStream::connect(&address).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
        );
        let kind = format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all((head + &kind).as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    while !ask("GET", "/ready", "").contains("\"ready\"") {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let body = r#"{"prompt": "The cat ", "model": "moons", "max_tokens": 30, "temperature": 0}"#;
    let answer = ask("POST", "/v1/completions", body);
    let object: Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    let made = printed(&with_input("generate", &run, &["--greedy", "--max-tokens", "30", "The cat "], ""));
    let text = object["choices"][0]["text"].as_str().unwrap();
    assert_eq!(format!("The cat {text}").trim_end(), made.trim_end());

    let stopped = std::process::Command::new("kill").arg(server.id().to_string()).status().unwrap();
    assert!(stopped.success());
    let out = server.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let log = String::from_utf8_lossy(&out.stderr);
    assert!(
        log.contains("\"client\":\"someone\"") && log.contains("\"stopped\"") && !log.contains("The cat"),
        "{log}"
    );
}

#[test]
fn refusals_say_what_to_do() {
    let lab = Lab::new();
    lab.train(&lab.config("run", 5), &[]);
    let run = lab.path("run").display().to_string();
    let write = |name: &str, content: &str| {
        std::fs::write(lab.path(name), content).unwrap();
        lab.path(name).display().to_string()
    };
    let long = "word ".repeat(50);
    let bad = write("bad.jsonl", "{\"prompt\": \"x\"}\n{\"text\": 5}\n");
    let lines = write("lines.txt", &format!("short\n{long}\n"));
    let empty = write("empty.txt", "\n");
    // The same model, but two of its tokens have changed places.
    let other = lab.path("other").display().to_string();
    let out = ferropt().args(["checkpoint", "convert", "--to", "hf", &run, &other]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let mut tokenizer: Value =
        serde_json::from_slice(&std::fs::read(lab.path("tokenizer.json")).unwrap()).unwrap();
    let vocab = &mut tokenizer["model"]["vocab"];
    (vocab["a"], vocab["b"]) = (vocab["b"].take(), vocab["a"].take());
    write("other/tokenizer.json", &tokenizer.to_string());
    for (args, parts) in [
        (&["generate", "--model", "/nowhere", "x"][..], &["/nowhere"][..]),
        (&["generate", "--model", &run, "--checkpoint", "77", "x"], &["77"]),
        (&["generate", "--model", &run, "--top-p", "1.5", "x"], &["--top-p", "1.5"]),
        (&["generate", "--model", &run, "--temperature", "-1", "x"], &["--temperature", "-1"]),
        (&["generate", "--model", &run, "--weights", "fp8", "x"], &["fp8", "int8"]),
        (&["generate", "--model", &run, "--logit-bias", "5", "x"], &["--logit-bias", "50=-2.5"]),
        (&["generate", "--model", &run, "--logit-bias", "900=1", "x"], &["--logit-bias", "900", "260"]),
        (&["generate", "--model", &run, "--n", "3", "--best-of", "2", "x"], &["--best-of", "n = 3"]),
        (&["generate", "--model", &run, "--beams", "2", "--stop", "a", "x"], &["--beams", "stop"]),
        (&["generate", "--model", &run, "--min-tokens", "200", "x"], &["--min-tokens", "max_tokens = 100"]),
        (&["generate", "--model", &run, "--draft", "/none", "x"], &["draft /none"]),
        (&["generate", "--model", &run, "--draft", &other, "x"], &["draft", "other", "same tokenizer"]),
        (
            &["generate", "--model", &run, "--draft", &run, "--draft-tokens", "0", "x"],
            &["--draft-tokens", "64"],
        ),
        (&["generate", "--model", &run, "--draft-tokens", "4", "x"], &["--draft"]),
        (&["generate", "--model", &run, &long], &["64"]),
        (&["generate", "--model", &run, "--file", &lines], &["line 2 of", "64"]),
        (
            &["generate", "--model", &run, "--file", &bad],
            &["bad.jsonl", "line 2", "`prompt`", "are: text", "--text-field"],
        ),
        (
            &["generate", "--model", &run, "--file", &bad, "--text-field", "text"],
            &["line 1", "`text`", "are: prompt"],
        ),
        (&["generate", "--model", &run, "--file", &lines, "--text-field", "body"], &["lines.txt", ".jsonl"]),
        (&["generate", "--model", &run, "--text-field", "body", "x"], &["--file"]),
        (&["generate", "--model", &run, "--batch", "4", "x"], &["--batch", "--file"]),
        (
            &["generate", "--model", &run, "--greedy", "--length-penalty", "2", "x"],
            &["--length-penalty", "--beams"],
        ),
        (&["generate", "--model", &run, "--file", "/none.txt"], &["/none.txt"]),
        (&["generate", "--model", &run, "--file", &empty], &["no lines"]),
        (&["score", "--model", &run, &lines], &["line 2 of", "64"]),
        (&["score", "--model", &run, &bad], &["bad.jsonl", "line 1", "`text`", "\"context\"", "are: prompt"]),
        (&["score", "--model", &run, &bad, "--text-field", "prompt"], &["line 2", "`prompt`", "are: text"]),
        (&["score", "--model", &run, &lines, "--text-field", "body"], &["lines.txt", ".jsonl"]),
        (&["score", "--model", &run, "--batch", "0", &lines], &["--batch"]),
        (&["chat", "--model", "/nowhere"], &["/nowhere"]),
        (&["chat", "--model", &run, "--top-k", "0"], &["--top-k"]),
        (&["serve"], &["--model"]),
        (&["serve", "--model", &run, "--alias", "a"], &["--alias a"]),
        (&["serve", "--model", &run, "--alias", "a=b"], &["\"a\"", "\"b\"", "run"]),
        (&["serve", "--model", &run, "--model", &run], &["\"run\"", "NAME=PATH"]),
        (&["serve", "--model", &run, "--sequences", "0"], &["--sequences", "4096"]),
        (&["serve", "--model", &run, "--client-seconds", "0"], &["--client-seconds"]),
        (&["serve", "--model", &run, "--client-connections", "0"], &["--client-connections"]),
        (&["serve", "--model", &run, "--answer-memory", "9"], &["--answer-memory", " 9 ", "268435456"]),
        (&["serve", "--model", &run, "--body-memory", "9"], &["--body-memory", " 9 ", "--max-body 4194304"]),
        (&["serve", "--model", &run, "--api-keys", "/none"], &["/none"]),
        (&["serve", "--model", &run, "--api-keys", &lines], &["lines.txt", "line 1", "ferropt serve key"]),
        (&["serve", "key", "a b"], &["\"a b\""]),
    ] {
        let out = ferropt().args(args).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success(), "{args:?}");
        assert!(parts.iter().all(|p| said.contains(p)), "{args:?} should mention {parts:?}: {said}");
        assert!(out.stdout.is_empty(), "{args:?}: {}", text(&out));
    }
    // It listens before the models are opened, and ends when none can be.
    let long = u64::MAX.to_string();
    let args = ["serve", "--model", "/nowhere", "--port", "0", "--timeout-seconds", &long, "--no-log"];
    let out = ferropt().args(args).output().unwrap();
    assert!(
        !out.status.success() && String::from_utf8_lossy(&out.stderr).contains("/nowhere"),
        "{}",
        text(&out)
    );
}
