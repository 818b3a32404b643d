//! Wrong, hostile and vanishing clients.

use crate::client::until;
use crate::{options, serve, stop};
use ferropt_device::rng::{Purpose, Stream};
use ferropt_serve::{Keys, Limits, Options, new_key};
use serde_json::json;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

#[test]
fn refusals_name_the_field_the_value_and_the_limit() {
    let (server, client) = serve(options());
    let long = json!({ "prompt": "word ".repeat(2000) }).to_string();
    let longer = json!({ "prompt": "x".repeat(1_000_000) }).to_string();
    let more = json!({ "prompt": vec!["x"; 2049] }).to_string();
    let stops = json!({ "prompt": vec!["x"; 2000], "stop": vec!["x".repeat(500); 60] }).to_string();
    let talk = json!({ "messages": [{ "role": "user", "content": "word ".repeat(2000) }] }).to_string();
    let input = json!({ "input": "word ".repeat(2000) }).to_string();
    let lists = json!({ "prompt": "x", "n": 128, "logprobs": 100, "max_tokens": 1000 }).to_string();
    let many = json!({ "prompt": vec!["x"; 100], "n": 21 }).to_string();
    let model = json!({ "prompt": "x", "model": "m".repeat(1_000_000) }).to_string();
    for (path, body, status, code, param, part) in [
        ("/v1/completions", "{", 400, "invalid_json", None, "line 1"),
        ("/v1/completions", "[]", 400, "invalid_json", None, "object"),
        ("/v1/completions", "{}", 400, "missing_field", Some("prompt"), "prompt"),
        (
            "/v1/completions",
            r#"{"prompt": "x", "tmeperature": 1}"#,
            400,
            "unknown_field",
            Some("tmeperature"),
            "temperature",
        ),
        (
            "/v1/completions",
            r#"{"prompt": "x", "temperature": -1}"#,
            400,
            "invalid_value",
            Some("temperature"),
            "-1",
        ),
        ("/v1/completions", r#"{"prompt": [300]}"#, 400, "invalid_value", Some("prompt"), "300"),
        (
            "/v1/completions",
            r#"{"prompt": "x", "best_of": 2, "n": 3}"#,
            400,
            "invalid_value",
            Some("best_of"),
            "n = 3",
        ),
        (
            "/v1/completions",
            r#"{"prompt": "x", "min_tokens": 5, "max_tokens": 2}"#,
            400,
            "invalid_value",
            Some("min_tokens"),
            "5",
        ),
        (
            "/v1/completions",
            r#"{"prompt": "x", "logit_bias": {"999": 1}}"#,
            400,
            "invalid_value",
            Some("logit_bias"),
            "999",
        ),
        (
            "/v1/completions",
            r#"{"prompt": "x", "stream_options": {}}"#,
            400,
            "invalid_value",
            Some("stream_options"),
            "stream",
        ),
        (
            "/v1/completions",
            r#"{"prompt": "x", "beams": 2, "top_k": 3}"#,
            400,
            "invalid_value",
            Some("beams"),
            "top_k",
        ),
        ("/v1/completions", &long, 400, "context_length_exceeded", Some("prompt"), "1024"),
        ("/v1/completions", &longer, 400, "context_length_exceeded", Some("prompt"), "1000000"),
        ("/v1/completions", &model, 404, "model_not_found", Some("model"), "mmm"),
        ("/v1/completions", &many, 400, "invalid_value", Some("prompt"), "2048"),
        ("/v1/completions", &more, 400, "invalid_value", Some("prompt"), "2049"),
        ("/v1/completions", &stops, 400, "invalid_value", Some("prompt"), "31440 bytes of stop strings"),
        (
            "/v1/completions",
            r#"{"prompt": "x", "model": "gpt-4"}"#,
            404,
            "model_not_found",
            Some("model"),
            "gpt-4",
        ),
        (
            "/v1/chat/completions",
            r#"{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}"#,
            400,
            "invalid_value",
            Some("top_logprobs"),
            "logprobs",
        ),
        ("/v1/chat/completions", &talk, 400, "context_length_exceeded", Some("messages"), "1024"),
        ("/v1/embeddings", &input, 400, "context_length_exceeded", Some("input"), "1024"),
        ("/v1/completions", &lists, 400, "invalid_value", Some("logprobs"), "2097152"),
        (
            "/v1/chat/completions",
            r#"{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "max_completion_tokens": 3}"#,
            400,
            "invalid_value",
            Some("max_completion_tokens"),
            "max_tokens = 2",
        ),
        ("/v1/chat/completions", r#"{"prompt": "x"}"#, 400, "missing_field", Some("messages"), "messages"),
        (
            "/completions",
            r#"{"prompt": "x", "lambda_decay": 1.5}"#,
            400,
            "invalid_value",
            Some("lambda_decay"),
            "from -1 to 1",
        ),
        ("/detokenize", r#"{"tokens": [300]}"#, 400, "invalid_value", Some("tokens"), "300"),
        ("/v1/nothing", "{}", 404, "unknown_route", None, "/v1/nothing"),
    ] {
        let answer = client.try_post(path, body);
        let error = &answer.json()["error"];
        assert_eq!(answer.status, status, "{error}");
        assert_eq!((error["code"].as_str(), error["param"].as_str()), (Some(code), param), "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(part) && message.len() < 1000, "{part}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    let body = br#"{"prompt": "x"}"#;
    for (method, path, headers, body, status, part) in [
        ("GET", "/v1/completions", &[][..], &b""[..], 405, "POST"),
        ("DELETE", "/v1/models/opt", &[], b"", 405, "GET"),
        ("GET", "/v1/models/no/such/model", &[], b"", 404, "no/such/model"),
        ("GET", "/%ff", &[], b"", 404, "%ff"),
        ("GET", "/v1/models/%ff", &[], b"", 404, "UTF-8"),
        ("POST", "/v1/completions", &[], body, 415, "Content-Type"),
        ("POST", "/v1/completions", &[("Content-Type", "text/plain")], body, 415, "text/plain"),
        (
            "POST",
            "/v1/completions",
            &[("Content-Type", "application/json"), ("Content-Encoding", "gzip")],
            body,
            415,
            "gzip",
        ),
        ("POST", "/v1/completions", &[("Content-Type", "application/json")], b"\xff\xfe", 400, "JSON"),
    ] {
        let answer = client.send(method, path, headers, body);
        assert_eq!(answer.status, status, "{}", answer.text());
        assert!(answer.json()["error"]["message"].as_str().unwrap().contains(part), "{}", answer.text());
        assert_eq!(answer.header("allow").is_some(), status == 405);
        assert!(answer.header("x-request-id").is_some());
    }
    stop(server);
}

#[test]
fn malformed_http_and_json_are_never_the_servers_fault() {
    let limits = Limits { body: 10_000, client_time: Duration::from_millis(300), ..Limits::default() };
    let (server, client) = serve(Options { limits, ..options() });
    let fails = |bytes: &[u8]| {
        let answer = String::from_utf8_lossy(&client.raw(bytes)).into_owned();
        assert!(!answer.starts_with("HTTP/1.1 5"), "{answer}");
        answer
    };
    for bytes in [
        &b""[..],
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ] {
        fails(bytes);
    }
    fails(&[&b"GET /"[..], &vec![b'a'; 100_000]].concat());
    fails(&[&b"GET / HTTP/1.1\r\nx: "[..], &vec![b'a'; 200_000], b"\r\n\r\n"].concat());
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n";
    // Slow headers, a slow body, and too much of it, announced or not.
    fails(head.as_bytes());
    let slow = fails(format!("{head}Content-Length: 50\r\n\r\n{{").as_bytes());
    assert!(slow.starts_with("HTTP/1.1 408") && slow.contains("0.3 s"), "{slow}");
    let announced = fails(format!("{head}Content-Length: 10001\r\n\r\n").as_bytes());
    assert!(announced.starts_with("HTTP/1.1 413") && announced.contains("10000"), "{announced}");
    let chunk = format!("3000\r\n{}\r\n", "x".repeat(0x3000));
    let chunked = fails(format!("{head}Transfer-Encoding: chunked\r\n\r\n{chunk}").as_bytes());
    assert!(chunked.starts_with("HTTP/1.1 413"), "{chunked}");
    fails(format!("{head}Content-Length: 2000\r\n\r\n{}", "[".repeat(2000)).as_bytes());

    stop(server);

    // Bodies with anything done to them.
    let (server, client) = serve(options());
    let good = r#"{"prompt": ["the cat", "x"], "max_tokens": 2, "n": 2, "logprobs": 3, "stop": ["a"], "stream": false,
        "logit_bias": {"5": -1.5}, "temperature": 0.5, "seed": 12, "echo": true, "best_of": 2, "user": null}"#;
    let (stream, cases) = (Stream::new(9, Purpose::Sampling, 0, 0), 400);
    let spare =
        [b'"', b'{', b'}', b'[', b']', b',', b':', b'-', b'9', b'e', b'.', 0, 0xff, b'\\', b' ', b't'];
    for case in 0..cases as usize {
        let mut body = good.as_bytes().to_vec();
        for change in 0..1 + case % 4 {
            let word = |i| stream.word(case as u64, 4 * change + i) as usize;
            let at = word(0) % body.len();
            match word(1) % 3 {
                0 => body[at] = spare[word(2) % spare.len()],
                1 => body.insert(at, spare[word(2) % spare.len()]),
                _ => drop(body.remove(at)),
            }
        }
        let answer = client.send("POST", "/v1/completions", &[("Content-Type", "application/json")], &body);
        assert!(
            [200, 400, 404].contains(&answer.status),
            "{}: {}",
            String::from_utf8_lossy(&body),
            answer.text()
        );
    }
    stop(server);
}

#[test]
fn bodies_have_a_bounded_memory_which_every_one_of_them_gives_back() {
    let client_time = Duration::from_secs(3);
    let limits = Limits { body: 80_000, body_memory: 100_000, client_time, ..Limits::default() };
    let (server, client) = serve(Options { limits, ..options() });
    let begin = || {
        let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n";
        let mut stream = TcpStream::connect(client.address).unwrap();
        stream
            .write_all(format!("{head}Content-Length: 80000\r\n\r\n{}", " ".repeat(70_000)).as_bytes())
            .unwrap();
        until("it is there", || client.metric("ferropt_body_memory_bytes") >= 70_000.0);
        stream
    };
    let body = |spaces| format!(r#"{{"prompt": "the", "max_tokens": 1{}}}"#, " ".repeat(spaces));
    let free = || client.metric("ferropt_body_memory_bytes") == 0.0;
    let first = begin();
    let refused = client.try_post("/v1/completions", &body(60_000));
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")), "{}", refused.text());
    assert_eq!(refused.json()["error"]["code"], "body_memory");
    assert!(refused.text().contains("100000 bytes"), "{}", refused.text());
    assert_eq!(client.try_post("/v1/completions", &body(1000)).status, 200, "there is room for a small one");
    // What is read from a body counts as well, but a text's characters do not.
    let ids = json!({ "prompt": vec![5; 500], "max_tokens": 1 }).to_string();
    let text = json!({ "prompt": "\\\"{,{,".repeat(100), "max_tokens": 1 }).to_string();
    assert_eq!(client.try_post("/v1/completions", &ids).status, 503);
    assert_eq!(client.try_post("/v1/completions", &text).status, 200);
    let many = format!(r#"{{"prompt": "the", "metadata": [{}{{}}]}}"#, "{},".repeat(1000));
    let refused = client.try_post("/v1/completions", &many);
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (413, Some("request_too_large")));
    assert!(refused.text().contains("100000"), "{}", refused.text());
    drop(first);
    until("who left gives it back", free);
    assert_eq!(client.try_post("/v1/completions", &body(60_000)).status, 200);
    assert_eq!(client.try_post("/v1/completions", &ids).status, 200);
    until("what was read is free", free);
    let mut answer = String::new();
    begin().read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    until("who is too slow gives it back", free);
    stop(server);
}

#[test]
fn who_has_no_key_is_refused_before_a_body_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, new_key("alice").unwrap().1).unwrap();
    let (server, client) = serve(Options { keys: Keys::read(&file).unwrap(), ..options() });
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n";
    let mut stream = TcpStream::connect(client.address).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 401");
    stop(server);
}

#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let (server, client) = serve(options());
    let slow = json!({ "prompt": "the cat", "max_tokens": 1000, "ignore_eos": true, "stream": true, "n": 2 });
    let whole = json!({ "prompt": ["the cat", "the dog"], "max_tokens": 1000, "ignore_eos": true });
    for round in 0..15 {
        // Some are computed, most wait; some are read from, some are not, some are no streams.
        let mut connections: Vec<_> = (0..4).map(|_| client.begin("/v1/completions", &slow)).collect();
        connections.push(client.begin("/v1/completions", &whole));
        if round % 2 == 0 {
            connections[0].until("data: {");
        }
    }
    let free = || {
        ["ferropt_cache_pages_used", "ferropt_running", "ferropt_queue_length", "ferropt_requests_in_flight"]
            .iter()
            .all(|metric| client.metric(metric) == 0.0)
    };
    until("everything is free", free);
    assert!(client.metric("ferropt_cancelled_total") >= 60.0);
    let answer =
        client.post("/v1/completions", &json!({ "prompt": "the", "max_tokens": 3, "ignore_eos": true }));
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    stop(server);
}

#[test]
fn a_client_that_left_is_noticed_behind_what_it_sent_last() {
    let (server, client) = serve(options());
    let body = json!({ "prompt": "the cat", "max_tokens": 1000, "n": 64, "ignore_eos": true }).to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    for more in ["\r\n", &request] {
        let before = client.metric_if_any("ferropt_cancelled_total").unwrap_or(0.0);
        let mut stream = TcpStream::connect(client.address).unwrap();
        stream.write_all(format!("{request}{more}").as_bytes()).unwrap();
        until("it is computed", || client.metric("ferropt_running") > 0.0);
        drop(stream);
        until("it is noticed", || client.metric("ferropt_cancelled_total") > before);
        until("it is free", || client.metric("ferropt_running") == 0.0);
        let done = client.metric_if_any("ferropt_requests_total{route=\"/v1/completions\",status=\"200\"}");
        assert_eq!(done, None, "it was completed for nobody");
    }
    // Whoever only says that there is no more to come gets what was asked for before.
    let mut stream = TcpStream::connect(client.address).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("200 OK"), "{answer}");
    stop(server);
}

#[test]
fn probes_are_answered_when_there_are_as_many_connections_as_may_be() {
    let limits = Limits { connections: 2, ..Limits::default() };
    let (server, client) = serve(Options { limits, ..options() });
    let held: Vec<_> = (0..2).map(|_| TcpStream::connect(client.address).unwrap()).collect();
    // Those that say nothing on the spare ones do not keep them for long.
    let idle: Vec<_> = (0..20).map(|_| TcpStream::connect(client.address).unwrap()).collect();
    for path in ["/health", "/ready", "/metrics"] {
        assert_eq!(client.get(path).status, 200, "{path}");
    }
    let refused = client.get("/v1/models");
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")), "{}", refused.text());
    assert_eq!(refused.json()["error"]["code"], "too_many_connections");
    drop((held, idle));
    until("there is room", || client.get("/v1/models").status == 200);
    stop(server);
}

/// A connection from another address of this machine.
fn connect_from(from: [u8; 4], to: SocketAddr) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    let stream = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        socket.connect(to).await.unwrap().into_std().unwrap()
    });
    stream.set_nonblocking(false).unwrap();
    stream
}

#[test]
fn one_address_does_not_take_all_connections() {
    let limits = Limits { client_connections: 2, ..Limits::default() };
    let (server, client) = serve(Options { limits, ..options() });
    let tokenize = r#"{"prompt": "the cat"}"#;
    assert_eq!(client.try_post("/tokenize", tokenize).status, 200);
    let models = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n";
    let mut held = Vec::new();
    // Connections of before may have a place for a moment longer.
    until("it has its share", || {
        let (mut stream, mut answer) = (TcpStream::connect(client.address).unwrap(), [0; 12]);
        stream.write_all(format!("{models}\r\n").as_bytes()).unwrap();
        if stream.read_exact(&mut answer).is_ok() && &answer == b"HTTP/1.1 200" {
            held.push(stream);
        }
        held.len() == 2
    });
    let refused = client.try_post("/tokenize", tokenize);
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")), "{}", refused.text());
    assert_eq!(refused.json()["error"]["code"], "client_connections");
    assert_eq!(client.get("/ready").status, 200);
    // Many more are closed, for nobody waits behind them.
    let mut more: Vec<_> = (0..30).map(|_| TcpStream::connect(client.address).unwrap()).collect();
    let mut other = connect_from([127, 0, 0, 2], client.address);
    let last = format!("{models}Connection: close\r\n\r\n");
    other.write_all(last.as_bytes()).unwrap();
    let mut answer = String::new();
    other.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(more.pop().unwrap().read(&mut [0; 1]).unwrap(), 0, "it is closed");
    drop((held, more));
    until("there is room", || client.raw(last.as_bytes()).starts_with(b"HTTP/1.1 200"));
    assert!(client.metric("ferropt_excess_connections_total") >= 30.0);
    stop(server);
}

#[test]
fn too_much_and_too_long_are_refused_in_time() {
    let limits = Limits {
        queue: 1,
        queue_time: Duration::from_millis(1500),
        request_time: Duration::from_millis(4500),
        ..Limits::default()
    };
    let models = vec![crate::source("opt", 1)];
    let (server, client) = serve(Options { limits, models, ..options() });
    let slow =
        json!({ "prompt": "the cat", "max_tokens": 1000, "n": 128, "ignore_eos": true, "stream": true });
    let mut first = client.begin("/v1/completions", &slow);
    first.until("data: {");
    // One waits too long for its turn.
    let second = client.begin("/v1/completions", &json!({ "prompt": "x", "stream": true }));
    until("it waits", || client.metric("ferropt_queue_length") == 1.0);
    let full = client.try_post("/v1/completions", &json!({ "prompt": "x" }).to_string());
    assert_eq!((full.status, full.header("retry-after").is_some()), (429, true), "{}", full.text());
    let error = full.json()["error"].clone();
    assert_eq!(
        (error["code"].as_str(), error["type"].as_str()),
        (Some("queue_full"), Some("rate_limit_error"))
    );
    assert!(error["message"].as_str().unwrap().contains("limit of 1 "), "{error}");
    let whole = json!({ "prompt": "the cat", "max_tokens": 1000, "n": 128, "ignore_eos": true });
    let second = second.rest();
    assert_eq!((second.status, second.json()["error"]["code"].as_str()), (429, Some("queue_time")));
    assert!(second.json()["error"]["message"].as_str().unwrap().contains("1.5 s"));
    // And the first is over before it is complete, which its stream says.
    let rest = first.rest_text();
    assert!(rest.contains("request_time") && rest.contains("4.5 s") && rest.contains("[DONE]"), "{rest}");
    until("it is free", || client.metric("ferropt_cache_pages_used") == 0.0);
    // Whoever gets nothing in time is not to try again: it would take as long.
    let over = client.try_post("/v1/completions", &whole.to_string());
    assert_eq!((over.status, over.json()["error"]["code"].as_str()), (504, Some("request_time")));
    assert_eq!((over.header("retry-after"), over.header("x-should-retry")), (None, Some("false")));
    stop(server);
}
