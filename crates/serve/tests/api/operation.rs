//! What operators rely on: states, keys, fairness, the drain, metrics, the log.

use crate::client::{Client, until};
use crate::{Lines, model, options, serve, source, stop};
use ferropt_serve::{Keys, Limits, Log, ModelSource, Options, Server, new_key};
use ferropt_train::inference::Model;
use ferropt_train::weight_cache::Outcome;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

fn words(max_tokens: usize) -> Value {
    json!({ "prompt": "the cat", "max_tokens": max_tokens, "ignore_eos": true })
}

#[test]
fn models_are_opened_in_the_background_and_one_that_fails_does_not_harm_the_others() {
    let (go, wait) = channel::<()>();
    let late = move || {
        wait.recv()?;
        Ok(model(1))
    };
    let lines = Lines::default();
    let models = vec![
        ModelSource { name: "late".into(), open: Box::new(late) },
        ModelSource { name: "broken".into(), open: Box::new(|| anyhow::bail!("no such folder")) },
        source("good/one", 1),
    ];
    let log = Log::new(lines.clone(), false).unwrap();
    let aliases = vec![("other".into(), "good/one".into())];
    let server = Server::start(Options { models, aliases, log, ..options() }).unwrap();
    let client = Client::new(server.address());
    assert_eq!(client.get("/health").json(), json!({ "status": "ok" }));
    let ready = client.get("/ready");
    assert_eq!((ready.status, ready.json()), (503, json!({ "status": "loading" })));
    let early = client.try_post("/v1/completions", r#"{"prompt": "x"}"#);
    assert_eq!((early.status, early.json()["error"]["code"].as_str()), (503, Some("model_loading")));
    assert!(early.header("retry-after").is_some());
    go.send(()).unwrap();
    client.until_ready();
    let list = client.get("/v1/models").json();
    let states: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| (m["id"].as_str().unwrap(), m["status"].as_str().unwrap()))
        .collect();
    assert_eq!(states, [("late", "ready"), ("broken", "failed"), ("good/one", "ready"), ("other", "ready")]);
    for name in ["good/one", "good%2Fone", "other"] {
        assert_eq!(client.get(&format!("/v1/models/{name}")).json()["root"], "good/one");
    }
    for name in ["late", "good/one", "other"] {
        let body = json!({ "prompt": "x", "model": name, "max_tokens": 1 });
        assert_eq!(client.post("/v1/completions", &body)["model"], name);
    }
    let broken = client.try_post("/v1/completions", r#"{"prompt": "x", "model": "broken"}"#);
    assert_eq!((broken.status, broken.json()["error"]["code"].as_str()), (503, Some("model_failed")));
    assert_eq!((broken.header("retry-after"), broken.header("x-should-retry")), (None, Some("false")));
    assert!(!broken.text().contains("folder"), "what clients see names no files");
    until("it is logged", || lines.text().contains("no such folder"));
    assert_eq!(server.failure(), None);
    stop(server);

    let broken = ModelSource { name: "broken".into(), open: Box::new(|| anyhow::bail!("no such folder")) };
    let server = Server::start(Options { models: vec![broken], aliases: vec![], ..options() }).unwrap();
    until("it fails", || server.failure().is_some_and(|why| why.contains("broken: no such folder")));
    assert_eq!(Client::new(server.address()).get("/ready").json()["status"], "failed");
    stop(server);
    for (models, aliases, part) in [
        (vec![], vec![], "--model"),
        (vec![source("a", 1), source("a", 1)], vec![], "\"a\""),
        (vec![source("a", 1)], vec![("b".to_string(), "c".to_string())], "\"c\""),
    ] {
        let error = Server::start(Options { models, aliases, ..options() }).err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn keys_open_what_is_closed_and_nothing_more() {
    let folder = tempfile::tempdir().unwrap();
    let (alice, line) = new_key("alice").unwrap();
    let (bob, other) = new_key("bob").unwrap();
    let (carol, third) = new_key("carol").unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, format!("{line}\n{other} at-once=1 per-minute=3\n{third} at-once=1\n")).unwrap();
    let lines = Lines::default();
    let keys = Keys::read(&file).unwrap();
    let log = Log::new(lines.clone(), false).unwrap();
    let cors = vec!["https://example.org".into()];
    let (server, nobody) = serve(Options { keys, log, cors, ..options() });
    let [alice, bob, carol] = [alice, bob, carol].map(|key| nobody.with_key(&key));
    for client in [&nobody, &nobody.with_key("fo-1234")] {
        for path in
            ["/v1/models", "/metrics", "/openapi.json", "/v1/completions", "/nothing", "/v1/models/opt"]
        {
            let answer = client.get(path);
            assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Bearer")), "{path}");
            assert_eq!(answer.json()["error"]["code"], "invalid_api_key");
        }
    }
    assert_eq!(alice.get("/v1/models").status, 200);
    alice.post("/v1/completions", &words(3));
    // One at a time, and three a minute.
    let mut slow = bob.begin(
        "/v1/completions",
        &json!({ "prompt": "x", "max_tokens": 900, "stream": true, "ignore_eos": true }),
    );
    slow.until("data: {");
    let busy = bob.try_post("/v1/completions", &words(1).to_string());
    assert_eq!((busy.status, busy.json()["error"]["code"].as_str()), (429, Some("key_at_once")));
    drop(slow);
    // What computes nothing does not count.
    assert_eq!(bob.get("/v1/completions").status, 405);
    until("it is over", || bob.try_post("/v1/completions", &words(1).to_string()).status == 200);
    bob.post("/v1/completions", &words(1));
    let often = bob.try_post("/v1/completions", &words(1).to_string());
    assert_eq!((often.status, often.json()["error"]["code"].as_str()), (429, Some("key_per_minute")));
    // Who has an answer in full may ask again.
    let mut streamed = words(1);
    streamed["stream"] = true.into();
    for _ in 0..50 {
        carol.post("/v1/completions", &words(1));
        carol.stream("/v1/completions", &streamed);
    }
    until("it is logged", || lines.text().contains("\"client\":\"alice\""));
    let refused = |line: &&str| line.contains("\"status\":401");
    let text = lines.text();
    assert!(text.lines().filter(refused).all(|line| line.contains("\"client\":\"127.0.0.1\"")), "{text}");

    // Web pages: only of the origin that was named.
    let ask = |origin: &str| {
        let headers = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "POST"),
            ("Access-Control-Request-Headers", "authorization,content-type,x-stainless-os"),
        ];
        nobody.send("OPTIONS", "/v1/completions", &headers, b"")
    };
    let named = ask("https://example.org");
    assert_eq!(
        (named.status, named.header("access-control-allow-origin")),
        (204, Some("https://example.org"))
    );
    assert_eq!(
        named.header("access-control-allow-headers"),
        Some("authorization,content-type,x-stainless-os"),
        "whatever a client sends"
    );
    let other = ask("https://example.com");
    assert_eq!((other.status, other.header("access-control-allow-origin")), (401, None));
    let seen = alice.send("GET", "/v1/models", &[("Origin", "https://example.org")], b"");
    assert_eq!(seen.header("access-control-allow-origin"), Some("https://example.org"));
    let exposed = seen.header("access-control-expose-headers").unwrap().to_lowercase();
    assert!(exposed.contains("x-request-id") && exposed.contains("retry-after"), "{exposed}");
    stop(server);

    let keys = Keys::read(&file).unwrap();
    let (server, nobody) = serve(Options { keys, open_metrics: true, ..options() });
    assert_eq!((nobody.get("/metrics").status, nobody.get("/v1/models").status), (200, 401));
    stop(server);
}

#[test]
fn a_name_that_is_not_this_machines_is_refused_where_there_are_no_keys() {
    let status = |client: &Client, host: &str| {
        let raw =
            client.raw(format!("GET /v1/models HTTP/1.1\r\n{host}Connection: close\r\n\r\n").as_bytes());
        let text = String::from_utf8(raw).unwrap();
        assert!(!text.starts_with("HTTP/1.1 403") || text.contains("\"code\":\"unknown_host\""), "{text}");
        text[9..12].to_string()
    };
    let evil = "Host: evil.example:8000\r\n";
    let (server, client) = serve(Options { allowed_hosts: vec!["proxy.test".into()], ..options() });
    for host in
        ["", "Host: 127.0.0.1:8000\r\n", "Host: [::1]\r\n", "Host: localhost:1\r\n", "Host: proxy.test\r\n"]
    {
        assert_eq!(status(&client, host), "200", "{host}");
    }
    assert_eq!(status(&client, evil), "403");
    stop(server);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, new_key("alice").unwrap().1).unwrap();
    let (server, client) = serve(Options { keys: Keys::read(&file).unwrap(), ..options() });
    assert_eq!(status(&client, evil), "401", "a key is what counts");
    stop(server);
}

#[test]
fn a_prompt_is_found_again_by_its_own_key_only_unless_keys_share() {
    let folder = tempfile::tempdir().unwrap();
    let (alice, line) = new_key("alice").unwrap();
    let (bob, other) = new_key("bob").unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, format!("{line}\n{other}\n")).unwrap();
    let prompt = "the cat sat on the mat and the dog sat on the log ".repeat(12);
    for share_prefixes in [false, true] {
        let keys = Keys::read(&file).unwrap();
        let (server, client) = serve(Options { keys, share_prefixes, ..options() });
        let [alice, bob] = [&alice, &bob].map(|key| client.with_key(key));
        let found = |client: &Client| {
            let before = client.metric("ferropt_reused_tokens_total");
            client.post("/v1/completions", &json!({ "prompt": prompt, "ignore_eos": true }));
            client.metric("ferropt_reused_tokens_total") - before
        };
        assert_eq!(found(&alice), 0.0);
        assert!(found(&alice) >= 64.0);
        assert_eq!(found(&bob) > 0.0, share_prefixes);
        assert!(found(&bob) >= 64.0);
        stop(server);
    }
}

/// A server, and two clients of it with keys of their own: one that asks for much, and one for little.
fn serve_two(options: Options) -> (Server, Client, Client) {
    let folder = tempfile::tempdir().unwrap();
    let (greedy, line) = new_key("greedy").unwrap();
    let (modest, other) = new_key("modest").unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, format!("{line}\n{other}\n")).unwrap();
    let (server, client) = serve(Options { keys: Keys::read(&file).unwrap(), ..options });
    let (greedy, modest) = (client.with_key(&greedy), client.with_key(&modest));
    (server, greedy, modest)
}

#[test]
fn a_client_with_many_requests_does_not_starve_another() {
    let (server, greedy, modest) = serve_two(Options { models: vec![source("opt", 1)], ..options() });
    let _many: Vec<_> = (0..60).map(|_| greedy.begin("/v1/completions", &words(400))).collect();
    until("they wait", || greedy.metric("ferropt_queue_length") > 50.0);
    let begun = Instant::now();
    modest.post("/v1/completions", &words(2));
    let waited = begun.elapsed();
    // At most the two that the engine has go first, not all sixty.
    let waiting = greedy.metric("ferropt_queue_length");
    assert!(waiting > 45.0, "{waiting} are left after {waited:?}");
    drop(_many);
    until("all are gone", || greedy.metric("ferropt_running") == 0.0);
    stop(server);
}

#[test]
fn long_prompts_of_a_client_do_not_all_go_before_anothers() {
    let (server, greedy, modest) = serve_two(Options { models: vec![source("opt", 64)], ..options() });
    // The engine has places for 64 of them, and no two begin alike.
    let prompts: Vec<Vec<usize>> =
        (0..600).map(|i| (0..1000).map(|at| 4 + (i + i / 250 + at) % 250).collect()).collect();
    let many = greedy.begin("/v1/completions", &json!({ "prompt": prompts, "max_tokens": 1 }));
    let read = || greedy.metric_if_any("ferropt_prompt_tokens_total").unwrap_or(0.0) as usize / 1000;
    until("they are at work", || read() > 0);
    let before = read();
    modest.post("/v1/completions", &words(1));
    // Those that the engine has go first, and some while the client asks and is told.
    let ahead = read() - before;
    assert!(ahead < 40, "{ahead} went first");
    drop(many);
    until("all are gone", || greedy.metric("ferropt_running") == 0.0);
    stop(server);
}

#[test]
fn a_client_that_fills_the_queue_does_not_keep_another_out() {
    let (models, limits) = (vec![source("opt", 1)], Limits { queue: 8, ..Limits::default() });
    let (server, greedy, modest) = serve_two(Options { models, limits, ..options() });
    let many: Vec<_> = (0..20).map(|_| greedy.begin("/v1/completions", &words(900))).collect();
    until("it is full", || greedy.metric("ferropt_queue_length") == 8.0);
    until("more are refused", || {
        greedy.metric_if_any("ferropt_refusals_total{code=\"queue_full\"}").unwrap_or(0.0) > 0.0
    });
    modest.post("/v1/completions", &words(2));
    drop(many);
    until("all are gone", || greedy.metric("ferropt_running") == 0.0);
    stop(server);
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    /// Hangs until the test is over.
    struct Full(std::sync::mpsc::Receiver<()>);
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            self.0.recv().map_err(std::io::Error::other)?;
            Ok(0)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (over, wait) = channel();
    let (server, client) = serve(Options { log: Log::new(Full(wait), false).unwrap(), ..options() });
    for _ in 0..20 {
        assert_eq!(client.get("/v1/models").status, 200);
    }
    stop(server);
    drop(over);
}

#[test]
fn the_drain_completes_what_was_taken_and_takes_nothing_new() {
    let (server, client) = serve(Options { cors: vec!["https://example.org".into()], ..options() });
    let long = json!({ "prompt": "the cat", "max_tokens": 1000, "ignore_eos": true, "stream": true });
    let mut streams: Vec<_> = (0..8).map(|_| client.begin("/v1/completions", &long)).collect();
    // Four are computed, the others wait; all were taken.
    streams[0].until("data: {");
    let done = "ferropt_requests_total{route=\"/v1/completions\",status=\"200\"}";
    until("they are there", || {
        let done = client.metric_if_any(done).unwrap_or(0.0);
        client.metric("ferropt_requests_in_flight") + done >= 8.0
    });
    // Connections that are kept for further requests, also those of browsers that ask what they may send.
    let asks = "OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: https://example.org\r\n\
        Access-Control-Request-Method: POST\r\n\r\n";
    let mut kept = ["GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", asks].map(|request| {
        let mut stream = TcpStream::connect(client.address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut first = [0; 10];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"HTTP/1.1 2");
        (stream, request)
    });
    let stopping = std::thread::spawn(move || server.stop(Duration::from_secs(60)));
    until("it stops", || client.get("/ready").json()["status"] == "stopping");
    for (stream, request) in &mut kept {
        stream.write_all(request.as_bytes()).unwrap();
        let mut answers = String::new();
        stream.read_to_string(&mut answers).unwrap();
        assert!(answers.contains("\r\nconnection: close\r\n"), "a client would ask on it again: {answers}");
    }
    let late = client.try_post("/v1/completions", &words(1).to_string());
    assert_eq!((late.status, late.json()["error"]["code"].as_str()), (503, Some("server_stopping")));
    for stream in streams {
        let text = stream.rest_text();
        assert!(text.contains("\"finish_reason\":\"length\"") && text.contains("[DONE]"), "{text}");
    }
    assert_eq!(stopping.join().unwrap(), 0);
    assert!(std::net::TcpStream::connect(client.address).is_err());

    // Without time for it, streams are told.
    let lines = Lines::default();
    let (server, client) = serve(Options { log: Log::new(lines.clone(), false).unwrap(), ..options() });
    let mut stream = client.begin("/v1/completions", &long);
    stream.until("data: {");
    assert_eq!(server.stop(Duration::ZERO), 1);
    let text = stream.rest_text();
    assert!(text.contains("server_stopped") && text.contains("[DONE]"), "{text}");
    let line = lines.text().lines().find(|line| line.contains("server_stopped")).unwrap().to_string();
    let line: Value = serde_json::from_str(&line).unwrap();
    assert!(
        line["generated_tokens"].as_u64() > Some(0) && line["prompt_tokens"].as_u64() > Some(0),
        "{line}"
    );
}

#[test]
fn metrics_count_and_the_log_has_no_texts_unless_it_shall() {
    let lines = Lines::default();
    let (server, client) = serve(Options { log: Log::new(lines.clone(), false).unwrap(), ..options() });
    client.post("/v1/completions", &words(20));
    client.stream(
        "/v1/chat/completions",
        &json!({ "messages": [{ "role": "user", "content": "the cat" }], "max_tokens": 9,
        "ignore_eos": true, "stream": true }),
    );
    client.try_post("/v1/completions", "{}");
    client.try_post("/v1/completions", r#"{"prompt": "x", "n": 0}"#);
    client.get("/v1/nothing");
    until("all is counted", || client.metric("ferropt_generated_tokens_total{model=\"opt\"}") == 29.0);
    for (metric, value) in [
        ("ferropt_model_ready{model=\"opt\"}", 1.0),
        ("ferropt_requests_total{route=\"/v1/completions\",status=\"200\"}", 1.0),
        ("ferropt_requests_total{route=\"/v1/completions\",status=\"400\"}", 2.0),
        ("ferropt_requests_total{route=\"unknown\",status=\"404\"}", 1.0),
        ("ferropt_refusals_total{code=\"missing_field\"}", 1.0),
        ("ferropt_time_to_first_token_seconds_count", 2.0),
        ("ferropt_queue_seconds_count", 2.0),
        ("ferropt_cache_pages_used", 0.0),
    ] {
        // A stream is counted when its connection is done with.
        until(metric, || client.metric(metric) == value);
    }
    // Tokens that are no whole characters come with the next, so not each of the 29 has a time of its own.
    let older = client.send("GET", "/metrics", &[("Accept", "text/plain;version=0.0.4")], b"");
    assert_eq!(older.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    assert!(older.text().contains("# TYPE ferropt_requests_total counter\n"), "{}", older.text());
    let between = client.metric("ferropt_inter_token_seconds_count");
    assert!((5.0..=27.0).contains(&between), "{between}");
    stop(server);
    let text = lines.text();
    assert!(!text.contains("the cat"), "{text}");
    let logged: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let completion = logged.iter().find(|l| l["route"] == "/v1/completions" && l["status"] == 200).unwrap();
    assert_eq!((&completion["generated_tokens"], &completion["model"]), (&json!(20), &json!("opt")));
    assert_eq!(completion["client"], "127.0.0.1");
    assert!(completion["first_token_seconds"].as_f64().unwrap() <= completion["seconds"].as_f64().unwrap());
    let refused = logged.iter().find(|l| l["status"] == 400).unwrap();
    assert_eq!((&refused["error"], &refused["param"]), (&json!("missing_field"), &json!("prompt")));
    let wrong = logged.iter().find(|l| l["error"] == "invalid_value").unwrap();
    assert_eq!(wrong["param"], "n");
    let unknown = logged.iter().find(|l| l["status"] == 404).unwrap();
    assert_eq!(unknown["path"], "/v1/nothing");

    let lines = Lines::default();
    let (server, client) = serve(Options { log: Log::new(lines.clone(), true).unwrap(), ..options() });
    let answer = client.post("/v1/completions", &words(5));
    stop(server);
    let line = lines
        .text()
        .lines()
        .find(|line| line.contains("generated_tokens"))
        .map(|l| serde_json::from_str(l).unwrap());
    let line: Value = line.unwrap();
    assert_eq!(
        (&line["prompts"], &line["texts"]),
        (&json!(["the cat"]), &json!([answer["choices"][0]["text"]]))
    );
}

#[test]
fn the_time_to_the_first_token_is_counted_once_for_a_request_that_streams_tokens() {
    let (server, client) = serve(options());
    client.post(
        "/v1/completions",
        &json!({ "prompt": ["the", "cat"], "n": 2, "max_tokens": 3, "ignore_eos": true }),
    );
    // Nothing of these is there before all of it is.
    let compared = json!({ "prompt": "the", "best_of": 3, "max_tokens": 3, "ignore_eos": true });
    client.post("/v1/completions", &compared);
    client.post("/v1/completions", &json!({ "prompt": "the", "beams": 2, "max_tokens": 3 }));
    until("all is counted", || client.metric("ferropt_running{model=\"opt\"}") == 0.0);
    assert_eq!(client.metric("ferropt_time_to_first_token_seconds_count"), 1.0);
    stop(server);
}

#[test]
fn the_log_says_what_became_of_weights_that_were_opened() {
    let lines = Lines::default();
    let open = || {
        let kept = Some(Outcome::Failed(anyhow::anyhow!("no room on the disk")));
        Ok(Model { kept, rounded: true, ..model(1) })
    };
    let models = vec![ModelSource { name: "opt".into(), open: Box::new(open) }];
    let (server, _) = serve(Options { models, log: Log::new(lines.clone(), false).unwrap(), ..options() });
    stop(server);
    let text = lines.text();
    assert!(text.contains("no room on the disk") && text.contains("weights_rounded"), "{text}");
}
