//! `ferropt serve`: OpenAI's and metaseq's APIs in front of the engine.
//!
//! A request's way: a connection (`listen`), who asks and which route (`service`, `routes`), its body (`body`, `fields`),
//! what the engine shall compute (`prepare`), its turn (`queue`, `turn`), the engine's events (`job`), and the answer
//! (`answer`, `layout`), which a client takes in as fast as it can (`outbox`). `record` puts together a line of the `log` when
//! it is over.
//!
//! Every field of a body stands once, in `fields`, and every route once, in `routes`: what is read, what is refused, and the
//! OpenAPI page (`openapi`) come from these two tables. A file for browsers is another line of the second.

mod answer;
mod app;
mod asked;
mod body;
mod cors;
mod embeddings;
mod error;
mod fields;
mod host;
mod job;
mod keys;
mod layout;
mod listen;
mod log;
mod metrics;
mod models;
mod openapi;
mod operate;
mod outbox;
mod page;
mod places;
mod prepare;
mod queue;
mod record;
mod routes;
mod service;
mod shapes;
mod texts;
mod tls;
mod turn;

pub use app::Limits;
pub use keys::{Keys, new_key};
pub use log::Log;
pub use models::ModelSource;
pub use tls::Tls;

use anyhow::{Context, Result};
use app::{App, Phase};
use models::{Models, State};
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::task::{JoinHandle, block_in_place};

/// What is served, where, and to whom.
pub struct Options {
    /// Where to listen; port 0 takes a free one.
    pub address: SocketAddr,
    /// Models, of which the first is used by requests that name none.
    pub models: Vec<ModelSource>,
    /// Other names of models.
    pub aliases: Vec<(String, String)>,
    /// Who may use it; everybody when there are none.
    pub keys: Keys,
    /// How connections are encrypted; plain HTTP without.
    pub tls: Option<Tls>,
    /// Origins of web pages that may use it.
    pub cors: Vec<String>,
    /// Names, besides `localhost`, by which clients on the same machine may call a server without keys.
    pub allowed_hosts: Vec<String>,
    /// Whether `/metrics` needs no key.
    pub open_metrics: bool,
    /// Whether a prompt goes on from where one of another key was like it. Then the time to the first token tells who has a key
    /// whether others sent such a prompt.
    pub share_prefixes: bool,
    /// What a request, a client and the server may take.
    pub limits: Limits,
    /// A line for each request.
    pub log: Log,
}

/// A server at work, on threads of its own.
pub struct Server {
    app: Arc<App>,
    runtime: Runtime,
    accepting: JoinHandle<()>,
    address: SocketAddr,
}

/// Threads for connections; the rest belongs to the engines.
const THREADS: usize = 2;

impl Server {
    /// Listens, and opens the models in the background.
    ///
    /// # Errors
    /// When the address cannot be listened on, or names of models contradict each other.
    pub fn start(mut options: Options) -> Result<Server> {
        let (address, models) = (options.address, std::mem::take(&mut options.models));
        let names = models.iter().map(|model| model.name.clone()).collect();
        let models_by_name = Models::new(names, std::mem::take(&mut options.aliases))?;
        let app = Arc::new(App::new(models_by_name, options));
        let runtime =
            Builder::new_multi_thread().worker_threads(THREADS).thread_name("http").enable_all().build();
        let runtime = runtime.context("cannot start the threads for connections")?;
        let listener = runtime.block_on(TcpListener::bind(address)).with_context(|| {
            format!("cannot listen on {address}; is another program there? --port 0 takes a free one")
        })?;
        let address = listener.local_addr().context("the system does not say on which port it listens")?;
        app.log.line("listening", json!({ "address": address.to_string() }));
        runtime.spawn(watch_files(app.clone()));
        let accepting = runtime.spawn(listen::accept(listener, app.clone()));
        let opening = app.clone();
        let open = move || models.into_iter().for_each(|model| models::open(&opening, model));
        thread::Builder::new().name("open models".into()).spawn(open).context("cannot start a thread")?;
        Ok(Server { app, runtime, accepting, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether no model is to be opened any more, and one can be used.
    pub fn is_ready(&self) -> bool {
        let states: Vec<State> = self.app.models.states().map(|(_, state)| state).collect();
        let is = |wanted: fn(&State) -> bool| states.iter().any(wanted);
        is(|state| matches!(state, State::Ready(_))) && !is(|state| matches!(state, State::Loading))
    }

    /// What is wrong with the models, if none can be used and none is being opened.
    pub fn failure(&self) -> Option<String> {
        let failed = self.app.models.states().map(|(name, state)| match state {
            State::Failed(error) => Some(format!("{name}: {error}")),
            State::Loading | State::Ready(_) => None,
        });
        failed.collect::<Option<Vec<String>>>().map(|errors| errors.join("\n"))
    }

    /// Takes no new requests, completes those that it has, for `within` at most, and ends. Returns how many were not
    /// completed.
    pub fn stop(self, within: Duration) -> usize {
        let deadline = Instant::now() + within.min(Limits::LONGEST);
        self.app.phase.send_replace(Phase::Draining);
        self.app.log.line("stopping", json!({ "requests": self.app.in_flight() }));
        while self.app.in_flight() > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        let left = self.app.in_flight();
        self.app.phase.send_replace(Phase::Ending);
        // It does not panic, and its own time is limited.
        let _ = self.runtime.block_on(self.accepting);
        self.app.log.line("stopped", json!({ "not_completed": left }));
        self.runtime.shutdown_timeout(Duration::from_secs(1));
        // Whoever reads it may have stopped to.
        self.app.log.finish(Duration::from_secs(1));
        left
    }
}

/// Takes over changes of the file of keys, and of those of the certificate.
async fn watch_files(app: Arc<App>) {
    loop {
        tokio::time::sleep(Duration::from_secs(2)).await;
        // A disk may be slow, and connections have few threads.
        match block_in_place(|| app.keys.refresh()) {
            Ok(None) => {}
            Ok(Some(count)) => app.log.line("keys_read", json!({ "keys": count })),
            Err(error) => app.log.line("keys_failed", json!({ "error": format!("{error:#}") })),
        }
        match block_in_place(|| app.tls.as_ref().map(Tls::refresh)) {
            None | Some(Ok(false)) => {}
            Some(Ok(true)) => app.log.line("certificate_read", json!({})),
            Some(Err(error)) => app.log.line("certificate_failed", json!({ "error": format!("{error:#}") })),
        }
    }
}
