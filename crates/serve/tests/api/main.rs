//! The server as its clients see it: HTTP over sockets, with small random models. Every answer is compared with the
//! server's own description of it.

mod client;
mod drafts;
mod embeddings;
mod faults;
mod operation;
mod page;
mod schema;
mod slow;
mod texts;
mod tls;

use client::Client;
use ferropt_data::Tokenizer;
use ferropt_model::Config;
use ferropt_serve::{Keys, Limits, Log, ModelSource, Options, Server};
use ferropt_train::inference::{Model, Opening};
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Positions of the models.
const POSITIONS: usize = 1024;

fn tokenizer() -> Tokenizer {
    let text = "the cat sat on the mat and the dog sat on the log — naïve café. ".repeat(20);
    Tokenizer::train([Ok(text)], 280).unwrap()
}

/// The model that all servers of these tests have; `sequences` texts at a time.
fn model(sequences: usize) -> Model {
    model_with(sequences, tokenizer())
}

fn model_with(sequences: usize, tokenizer: Tokenizer) -> Model {
    let config = Config { vocab: 300, positions: POSITIONS, ..Config::preset("tiny").unwrap() };
    let opening = Opening { threads: Some(1), sequences, ..Opening::default() };
    Model::untrained(&config, tokenizer, &opening, 1).unwrap()
}

fn source(name: &str, sequences: usize) -> ModelSource {
    ModelSource { name: name.into(), open: Box::new(move || Ok(model(sequences))) }
}

/// What a server logs.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn options() -> Options {
    Options {
        address: ([127, 0, 0, 1], 0).into(),
        models: vec![source("opt", 4)],
        aliases: vec![("gpt-3.5-turbo-instruct".into(), "opt".into())],
        keys: Keys::default(),
        tls: None,
        cors: vec![],
        allowed_hosts: vec![],
        open_metrics: false,
        share_prefixes: false,
        limits: Limits { client_time: Duration::from_secs(5), ..Limits::default() },
        log: Log::off(),
    }
}

/// A server whose models are ready.
fn serve(options: Options) -> (Server, Client) {
    let server = Server::start(options).unwrap();
    let client = Client::new(server.address());
    client.until_ready();
    (server, client)
}

fn stop(server: Server) {
    assert_eq!(server.stop(Duration::from_secs(20)), 0, "requests were not complete");
}
