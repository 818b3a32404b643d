//! Routes that generate and tokenise.

use crate::answer::Answer;
use crate::app::Phase;
use crate::asked::{Asked, Prompt};
use crate::body;
use crate::error::{ApiError, long_response};
use crate::fields::{self, CHAT, EMBED, GENERATE, METASEQ};
use crate::job::Job;
use crate::layout::{self, Chat, Completion, Generate, Head, Layout, List};
use crate::models::{Live, token_name, unix_seconds};
use crate::prepare;
use crate::routes::Call;
use axum::body::Body;
use axum::http::Response;
use ferropt_data::Marks;
use serde::Serialize;
use serde_json::json;
use std::sync::Arc;

/// Tokens of a completion when nothing is said, as OpenAI's.
const COMPLETION_TOKENS: usize = 16;

/// Reads the body and finds the model.
pub(crate) async fn begin(call: &mut Call) -> Result<(Arc<Live>, Asked), ApiError> {
    let request = std::mem::take(&mut call.request);
    let (object, _memory) = body::object(request, &call.app.limits, &call.app.bodies).await?;
    let asked = fields::read(&object, call.route.body, call.route.required)?;
    // metaseq never looked at the engine's name.
    let engine = call.name.as_deref().filter(|name| call.app.models.has(name));
    let live = call.app.models.find(asked.model.as_deref().or(engine))?;
    call.record.note("model", live.name.as_str());
    Ok((live, asked))
}

/// Refuses what needs a turn, once the server is to end.
pub(crate) fn still_serving(call: &Call) -> Result<(), ApiError> {
    if *call.app.phase.borrow() > Phase::Serving {
        return Err(ApiError::unavailable(
            "server_stopping",
            Some(5),
            "the server is stopping and takes no new requests",
        ));
    }
    Ok(())
}

/// Lines up for the engine with all prompts.
pub(crate) fn line_up(call: &Call, live: &Arc<Live>, asked: &mut Asked) -> Result<Job, ApiError> {
    let (app, record) = (&call.app, &call.record);
    let requests = prepare::requests(live, asked, call.scope, &app.limits, || app.random());
    let requests = requests.map_err(|error| by_its_name(error, call.route.body))?;
    record.note("texts_wanted", requests.len() * asked.parameters.n);
    record.note("stream", asked.stream);
    if app.log.has_texts() {
        let shown = |prompt: &Prompt| match prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Ids(ids) => live.tokenizer().decode(ids),
        };
        record.note("prompts", asked.prompts.iter().map(shown).collect::<Vec<_>>());
    }
    Job::start(call, live.clone(), requests)
}

/// The same error, with the name that the field has in a kind of body.
fn by_its_name(error: ApiError, body: u8) -> ApiError {
    let name = match (error.param.as_deref(), body) {
        (Some("prompt"), CHAT) => "messages",
        (Some("prompt"), EMBED) => "input",
        (Some("log_probs"), CHAT) => "top_logprobs",
        (Some("log_probs"), _) => "logprobs",
        _ => return error,
    };
    ApiError { param: Some(name.into()), ..error }
}

/// Continues texts.
pub(crate) async fn generate(mut call: Call) -> Result<Response<Body>, ApiError> {
    still_serving(&call)?;
    let (live, mut asked) = begin(&mut call).await?;
    let body = call.route.body;
    complete(&mut asked, body)?;
    let job = line_up(&call, &live, &mut asked)?;
    let (app, record, reader) = (call.app, call.record, call.reader);
    let (prompts, n) = (asked.prompts.len(), asked.parameters.n);
    let include_usage = asked.include_usage.unwrap_or(body == GENERATE);
    let prefix = if body == CHAT { "chatcmpl" } else { "cmpl" };
    let head = Head {
        id: format!("{prefix}-{}", record.id),
        created: unix_seconds(),
        model: asked.model.clone().unwrap_or_else(|| live.name.clone()),
        include_usage: asked.stream && include_usage,
    };
    let answer = Answer {
        job,
        layout: layout(body, head, &live, &asked, prompts),
        tokenizer: live.tokenizer().clone(),
        record,
        reader,
        prompts,
        n,
        include_usage,
        silence: app.limits.silence,
        log_texts: app.log.has_texts(),
    };
    if asked.stream { answer.stream().await } else { answer.whole().await }
}

/// What a body of some kind means by saying nothing, and what it must not say.
fn complete(asked: &mut Asked, body: u8) -> Result<(), ApiError> {
    if asked.include_usage.is_some() && !asked.stream {
        return Err(ApiError::field("stream_options", "stream_options needs stream = true"));
    }
    if let (Some(old), Some(new)) = (asked.parameters.max_tokens, asked.max_completion_tokens)
        && old != new
    {
        let message = format!(
            "max_completion_tokens = {new} and max_tokens = {old} are two names of one limit; give one of them, or the same"
        );
        return Err(ApiError::field("max_completion_tokens", message));
    }
    let p = &mut asked.parameters;
    p.max_tokens = p.max_tokens.or(asked.max_completion_tokens);
    if body & (fields::COMPLETION | METASEQ) != 0 {
        p.max_tokens.get_or_insert(COMPLETION_TOKENS.max(p.min_tokens));
    }
    // As OpenAI's: clients that score a text take one token more than it has off the end, whichever that was.
    p.tell_end = body == fields::COMPLETION;
    if body == METASEQ {
        p.log_probs.get_or_insert(0);
        p.penalties_after_temperature = true;
        for prompt in &mut asked.prompts {
            if let Prompt::Text(text) = prompt {
                *text = text.replace("\r\n", "\n").replace('\r', "\n");
            }
        }
    }
    if body == CHAT && p.log_probs.is_some() && !asked.chat_log_probs {
        return Err(ApiError::field("top_logprobs", "top_logprobs needs logprobs = true"));
    }
    Ok(())
}

fn layout(body: u8, head: Head, live: &Live, asked: &Asked, prompts: usize) -> Box<dyn Layout> {
    let (tokenizer, p) = (live.tokenizer().clone(), &asked.parameters);
    let texts = prompts * p.n;
    match body {
        CHAT => Box::new(Chat::new(head, tokenizer, texts, asked.chat_log_probs)),
        GENERATE => Box::new(Generate::new(head, tokenizer, p.n, p.log_probs.is_some())),
        _ => Box::new(Completion::new(head, tokenizer, texts, p.log_probs, body == METASEQ)),
    }
}

/// Token ids of a text.
pub(crate) async fn tokenize(mut call: Call) -> Result<Response<Body>, ApiError> {
    let (live, asked) = begin(&mut call).await?;
    let [Prompt::Text(text)] = asked.prompts.as_slice() else {
        return Err(ApiError::field("prompt", "prompt: expected a text"));
    };
    // Other than in prompts, `</s>` in the text is the token, as Hugging Face's tokenizer reads it.
    let marks = Marks { in_front: asked.special, in_text: true };
    // Of any length: clients tokenise whole documents, and cut them then. The semaphore is never closed.
    let _turn = if text.len() > prepare::LONG { call.app.long_texts.acquire().await.ok() } else { None };
    let tokenizer = live.tokenizer();
    let write = |tokens: Vec<u32>| {
        let names = List(&tokens, |id: &u32| token_name(tokenizer, *id));
        layout::json(&Tokens {
            count: tokens.len(),
            max_model_len: live.engine.capacity().positions,
            tokens: &tokens,
            token_strs: asked.token_names.then_some(names),
        })
    };
    let json = tokio::task::block_in_place(|| tokenizer.encode_as(text, marks).map(write));
    let json = json.map_err(|error| ApiError::field("prompt", format!("{error:#}")))?;
    Ok(long_response(&call.reader, &call.record, json))
}

/// The answer with token ids, and perhaps what they are called.
#[derive(Serialize)]
struct Tokens<'a, N> {
    count: usize,
    max_model_len: usize,
    tokens: &'a [u32],
    token_strs: Option<N>,
}

/// Text of token ids.
pub(crate) async fn detokenize(mut call: Call) -> Result<Response<Body>, ApiError> {
    let (live, asked) = begin(&mut call).await?;
    let known = live.engine.capacity().vocab;
    if let Some(id) = asked.tokens.iter().find(|id| **id as usize >= known) {
        let message = format!("tokens has the id {id}, but the vocabulary has {known} ids");
        return Err(ApiError::field("tokens", message));
    }
    let mut text = String::new();
    let special = |id: &u32| live.tokenizer().special(*id);
    // Special tokens have no bytes, so their names are put between the texts of the others.
    for run in asked.tokens.chunk_by(|a, b| special(a).is_none() && special(b).is_none()) {
        match run.first().and_then(special) {
            Some(name) if !asked.skip_special => text += name,
            _ => text += &live.tokenizer().decode(run),
        }
    }
    Ok(long_response(&call.reader, &call.record, json!({ "prompt": text }).to_string()))
}
