//! Models by name, each with its engine, its queue and its state.

use crate::app::App;
use crate::error::ApiError;
use crate::metrics::ModelMetrics;
use crate::queue::Work;
use crate::turn::Turnstile;
use anyhow::{Result, ensure};
use ferropt_data::Tokenizer;
use ferropt_engine::{Capacity, Handle};
use ferropt_train::inference::Model;
use ferropt_train::weight_cache::Outcome;
use serde_json::json;
use std::borrow::Cow;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A model to serve.
pub struct ModelSource {
    /// What requests call it.
    pub name: String,
    /// Opens it; called on a thread of its own.
    pub open: Box<dyn FnOnce() -> Result<Model> + Send>,
}

/// All models, in the order in which they were given.
pub(crate) struct Models {
    entries: Vec<(String, RwLock<State>)>,
    /// Other names, and the model that each stands for.
    aliases: Vec<(String, String)>,
}

#[derive(Clone)]
pub(crate) enum State {
    Loading,
    Ready(Arc<Live>),
    /// With the reason, which clients are not told: it may name files.
    Failed(String),
}

/// A model that can be used.
pub(crate) struct Live {
    pub(crate) name: String,
    pub(crate) engine: Handle,
    pub(crate) gate: Arc<Turnstile>,
    pub(crate) metrics: ModelMetrics,
    /// When it was opened, in seconds since 1970.
    pub(crate) created: u64,
    /// Bytes of the longest token.
    pub(crate) longest_token: usize,
    /// Tokens that end a sentence, as metaseq looks them up: without those that have a space in front.
    pub(crate) sentence_ends: Vec<u32>,
}

impl Live {
    /// `waiting` requests may wait for the engine.
    pub(crate) fn new(name: String, engine: Handle, waiting: usize, metrics: ModelMetrics) -> Live {
        let Capacity { sequences, step_tokens, .. } = engine.capacity();
        // A few more texts than are computed at a time, and a few steps' tokens, so that what comes next is there when it can be
        // computed, also where most of a prompt is found in the cache.
        let most = Work { texts: sequences + sequences / 8 + 1, unread: 4 * step_tokens };
        let gate = Turnstile::new(most, waiting, engine.elsewhere().clone());
        let tokenizer = engine.tokenizer();
        let ids = || 0..tokenizer.vocab_size() as u32;
        let longest = |id| tokenizer.byte_len(id).max(tokenizer.special(id).map_or(0, str::len));
        let longest_token = ids().map(longest).max().unwrap_or(1).max(1);
        let ends = |id: &u32| [&b"."[..], b"?", b"!"].contains(&tokenizer.token_bytes(*id));
        let sentence_ends = ids().filter(ends).collect();
        Live { name, engine, gate, metrics, created: unix_seconds(), longest_token, sentence_ends }
    }

    pub(crate) fn tokenizer(&self) -> &Arc<Tokenizer> {
        self.engine.tokenizer()
    }
}

/// Opens a model and tells the log.
pub(crate) fn open(app: &App, source: ModelSource) {
    let (ModelSource { name, open }, started) = (source, Instant::now());
    let state = match open() {
        Ok(model) => {
            for damage in &model.damaged {
                let damage = format!("{damage:#}");
                app.log.line("damaged_checkpoint", json!({ "model": name, "passed_over": damage }));
            }
            if model.rounded {
                let what = "f16 became bf16, which has 3 bits less of each; --weights f16 keeps all, and computes in f32";
                app.log.line("weights_rounded", json!({ "model": name, "what": what }));
            }
            if let Some(Outcome::Failed(error)) = &model.kept {
                let error = format!("{error:#}");
                app.log.line("weights_not_kept", json!({ "model": name, "error": error }));
            }
            let capacity = model.engine.capacity();
            let line = json!({
                "model": name, "seconds": started.elapsed().as_secs_f64(), "weights": model.weights.name(),
                "weight_bytes": model.weight_bytes, "step": model.step, "positions": capacity.positions,
                "cache_pages": capacity.pages, "sequences": capacity.sequences,
            });
            app.log.line("model_ready", line);
            let metrics = app.metrics.of_model(&name);
            State::Ready(Arc::new(Live::new(name.clone(), model.engine, app.limits.queue, metrics)))
        }
        Err(error) => {
            let error = format!("{error:#}");
            app.log.line("model_failed", json!({ "model": name, "error": error }));
            State::Failed(error)
        }
    };
    app.models.set(&name, state);
}

/// What a token is called: its text, the name of a special token, or `bytes:\xe2\x80` where it is no whole characters, as
/// OpenAI writes it.
pub(crate) fn token_name(tokenizer: &Tokenizer, id: u32) -> Cow<'_, str> {
    let bytes = tokenizer.token_bytes(id);
    match std::str::from_utf8(bytes) {
        Ok("") => tokenizer.special(id).map_or_else(|| format!("<{id}>").into(), Cow::from),
        Ok(text) => text.into(),
        Err(_) => {
            bytes.iter().fold(String::from("bytes:"), |name, byte| name + &format!("\\x{byte:02x}")).into()
        }
    }
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

impl Models {
    /// Models that are to be opened.
    ///
    /// # Errors
    /// When there is none, or two have the same name, or an alias stands for nothing.
    pub(crate) fn new(names: Vec<String>, aliases: Vec<(String, String)>) -> Result<Models> {
        ensure!(!names.is_empty(), "there is no model to serve; name one with --model PATH");
        for (i, name) in names.iter().chain(aliases.iter().map(|(alias, _)| alias)).enumerate() {
            ensure!(!name.is_empty(), "a model has an empty name; use --model NAME=PATH");
            let before = names.iter().chain(aliases.iter().map(|(alias, _)| alias)).take(i);
            ensure!(
                before.into_iter().all(|other| other != name),
                "two models are called {name:?}; give each its own name with --model NAME=PATH"
            );
        }
        for (alias, model) in &aliases {
            ensure!(
                names.contains(model),
                "the alias {alias:?} stands for {model:?}, which is no model; there is {}",
                names.join(", ")
            );
        }
        let entries = names.into_iter().map(|name| (name, RwLock::new(State::Loading))).collect();
        Ok(Models { entries, aliases })
    }

    pub(crate) fn set(&self, name: &str, state: State) {
        if let Some((_, place)) = self.entries.iter().find(|(own, _)| own == name) {
            *place.write().unwrap_or_else(PoisonError::into_inner) = state;
        }
    }

    /// Names and states. An engine that has ended is a model that failed.
    pub(crate) fn states(&self) -> impl Iterator<Item = (&str, State)> {
        self.entries.iter().map(|(name, state)| {
            let state = match &*state.read().unwrap_or_else(PoisonError::into_inner) {
                State::Ready(live) if live.engine.has_ended() => State::Failed("its engine has ended".into()),
                state => state.clone(),
            };
            (name.as_str(), state)
        })
    }

    /// Other names, and the model that each stands for.
    pub(crate) fn aliases(&self) -> &[(String, String)] {
        &self.aliases
    }

    /// Whether a request may call a model so.
    pub(crate) fn has(&self, name: &str) -> bool {
        let names = self.entries.iter().map(|(name, _)| name);
        names.chain(self.aliases.iter().map(|(alias, _)| alias)).any(|own| own == name)
    }

    /// The model of a name or alias; the first one when there is no name.
    ///
    /// # Errors
    /// 404 when there is none of the name; 503 while it is being opened, and when that failed.
    pub(crate) fn find(&self, name: Option<&str>) -> Result<Arc<Live>, ApiError> {
        let name = match name {
            Some(name) => {
                self.aliases.iter().find(|(alias, _)| alias == name).map_or(name, |(_, model)| model)
            }
            None => &self.entries[0].0,
        };
        let found = self.states().find(|(own, _)| *own == name);
        let Some((_, state)) = found else {
            let names: Vec<&str> = self.entries.iter().map(|(name, _)| name.as_str()).collect();
            let name: String = name.chars().take(100).collect();
            let message = format!("there is no model {name:?}; there is {}", names.join(", "));
            let error = ApiError::not_found("model_not_found", message);
            return Err(ApiError { param: Some("model".into()), ..error });
        };
        let unavailable = |code, retry_after, what: &str| {
            let error = ApiError::unavailable(code, retry_after, format!("the model {name:?} {what}"));
            Err(ApiError { param: Some("model".into()), ..error })
        };
        match state {
            State::Ready(live) => Ok(live),
            State::Loading => {
                unavailable("model_loading", Some(2), "is being loaded; try again in a few seconds")
            }
            State::Failed(_) => unavailable(
                "model_failed",
                None,
                "could not be loaded or has failed; the server's log says why",
            ),
        }
    }
}
