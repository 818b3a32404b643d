//! All routes, once: the router, refusals of other methods, and the OpenAPI page come from this table.

use crate::app::App;
use crate::error::ApiError;
use crate::fields::{CHAT, COMPLETION, DETOKENIZE, EMBED, GENERATE, METASEQ, TOKENIZE};
use crate::outbox::Reader;
use crate::record::Record;
use crate::{embeddings, operate, page, texts};
use axum::body::Body;
use axum::http::{Request, Response};
use ferropt_engine::Scope;
use std::pin::Pin;
use std::sync::Arc;

/// A route.
pub(crate) struct Route {
    pub(crate) method: &'static str,
    /// As the router takes it.
    pub(crate) path: &'static str,
    /// What the body may have, see [`crate::fields`]; 0 for no body.
    pub(crate) body: u8,
    /// Fields without which the body makes no sense.
    pub(crate) required: &'static [&'static str],
    /// Name of the answer's schema on the OpenAPI page, or its media type where it is no JSON.
    pub(crate) answer: &'static str,
    pub(crate) summary: &'static str,
    /// Whether no key is needed.
    pub(crate) open: bool,
    handler: Handler,
}

/// What a handler gives.
pub(crate) type Answering = Pin<Box<dyn Future<Output = Result<Response<Body>, ApiError>> + Send>>;
type Handler = fn(Call) -> Answering;

/// A request on a route.
pub(crate) struct Call {
    pub(crate) app: Arc<App>,
    pub(crate) route: &'static Route,
    pub(crate) record: Arc<Record>,
    /// Who asks: the key's name, or the address.
    pub(crate) client: Arc<str>,
    /// Whose prompts its own may be found among.
    pub(crate) scope: Scope,
    /// Who takes in the answer.
    pub(crate) reader: Arc<Reader>,
    /// The part of the path in braces.
    pub(crate) name: Option<String>,
    pub(crate) request: Request<Body>,
}

impl Route {
    pub(crate) fn handle(&self, call: Call) -> Answering {
        (self.handler)(call)
    }

    /// Whether texts are generated, which may be streamed.
    pub(crate) fn generates(&self) -> bool {
        self.body & (COMPLETION | CHAT | GENERATE | METASEQ) != 0
    }

    /// Whether those who watch over the server ask for it, who are answered when nobody else is.
    pub(crate) fn is_probe(&self) -> bool {
        ["/health", "/ready", "/metrics"].contains(&self.path)
    }

    /// Whether the engine computes something, which takes a turn.
    pub(crate) fn computes(&self) -> bool {
        self.generates() || self.body == EMBED
    }
}

const fn get(
    path: &'static str,
    answer: &'static str,
    open: bool,
    handler: Handler,
    summary: &'static str,
) -> Route {
    Route { method: "GET", path, body: 0, required: &[], answer, summary, open, handler }
}

const fn post(
    path: &'static str,
    body: u8,
    required: &'static [&'static str],
    answer: &'static str,
    handler: Handler,
    summary: &'static str,
) -> Route {
    Route { method: "POST", path, body, required, answer, summary, open: false, handler }
}

/// What answers with files for browsers, and is no part of the API.
pub(crate) const PAGE: &str = "text/html";

const METASEQ_SUMMARY: &str =
    "metaseq's completions. The engine in the path is a model's name, or else says nothing.";

/// All of them.
#[rustfmt::skip]
pub(crate) static ROUTES: &[Route] = &[
    post("/v1/completions", COMPLETION, &["prompt"], "Completion",
        |call| Box::pin(texts::generate(call)), "Continue texts."),
    post("/v1/chat/completions", CHAT, &["messages"], "ChatCompletion",
        |call| Box::pin(texts::generate(call)), "Reply in a conversation."),
    post("/generate", GENERATE, &["prompt"], "Generated",
        |call| Box::pin(texts::generate(call)), "Continue texts, with all that the engine tells."),
    post("/v1/embeddings", EMBED, &["input"], "Embeddings",
        |call| Box::pin(embeddings::embeddings(call)), "Texts as vectors of length 1."),
    post("/tokenize", TOKENIZE, &["prompt"], "Tokens",
        |call| Box::pin(texts::tokenize(call)), "The token ids of a text."),
    post("/detokenize", DETOKENIZE, &["tokens"], "Text",
        |call| Box::pin(texts::detokenize(call)), "The text of token ids."),
    get("/tokenizer_info", "TokenizerInfo", false,
        |call| Box::pin(operate::tokenizer(call)),
        "Special tokens of the first model's tokenizer, as vLLM tells them."),
    get("/v1/models", "Models", false, |call| Box::pin(operate::models(call)), "All models."),
    get("/v1/models/{*model}", "Model", false, |call| Box::pin(operate::model(call)), "One model."),
    post("/completions", METASEQ, &["prompt"], "Completion",
        |call| Box::pin(texts::generate(call)), METASEQ_SUMMARY),
    post("/engines/{engine}/completions", METASEQ, &["prompt"], "Completion",
        |call| Box::pin(texts::generate(call)), METASEQ_SUMMARY),
    post("/v1/engines/{engine}/completions", METASEQ, &["prompt"], "Completion",
        |call| Box::pin(texts::generate(call)), METASEQ_SUMMARY),
    post("/v2/engines/{engine}/completions", METASEQ, &["prompt"], "Completion",
        |call| Box::pin(texts::generate(call)), METASEQ_SUMMARY),
    get("/health", "Status", true, |call| Box::pin(operate::health(call)), "Whether the process is alive."),
    get("/ready", "Status", true,
        |call| Box::pin(operate::ready(call)),
        "Whether it can take requests: a model is ready, and none is being loaded."),
    get("/metrics", "text/plain", false, |call| Box::pin(operate::metrics(call)), "Prometheus metrics."),
    get("/", PAGE, true, |call| Box::pin(page::file(call)), "The web page."),
    get("/page/{*file}", PAGE, true, |call| Box::pin(page::file(call)), "A file of the web page."),
    get("/openapi.json", "Description", false,
        |call| Box::pin(operate::description(call)), "This description."),
];
