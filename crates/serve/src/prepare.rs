//! From what was asked for to what the engine computes.

use crate::app::Limits;
use crate::asked::{Asked, Prompt, Role};
use crate::error::ApiError;
use crate::job::texts;
use crate::models::Live;
use ferropt_data::Marks;
use ferropt_engine::{Conversation, Decay, Parameters, Refusal, Request, Scope, Speaker};

/// Entries of lists of likely tokens that a request may come to: the answer has some 80 bytes for each.
const MOST_ENTRIES: usize = 1 << 21;

/// Bytes of stop strings, biases and ends of sentences that a request may come to: each of its prompts has its own.
const MOST_REPEATED: usize = 16 << 20;

/// Bytes of text from which tokenising would make others wait.
pub(crate) const LONG: usize = 1 << 16;

/// What the engine shall compute.
///
/// # Errors
/// 400 for what the model or the engine cannot do.
pub(crate) fn requests(
    live: &Live,
    asked: &mut Asked,
    scope: Scope,
    limits: &Limits,
    random: impl Fn() -> u64,
) -> Result<Vec<Request>, ApiError> {
    if !asked.messages.is_empty() {
        converse(asked);
    }
    let p = &mut asked.parameters;
    let (rate, least) = (asked.lambda_decay, asked.omega_bound);
    p.scope = scope;
    p.decay = (rate > 0.0).then(|| Decay { rate, least, ends: live.sentence_ends.clone() });
    p.temperature = asked.temperature.unwrap_or(if p.beams.is_some() { 0.0 } else { 1.0 });
    let (prompts, computed) = (asked.prompts.len(), p.computed().max(p.beams.unwrap_or(1)));
    if prompts * computed > limits.texts {
        let message = format!(
            "{prompts} prompts with {computed} texts each are {} texts, which is more than {} in one request",
            prompts * computed,
            limits.texts
        );
        return Err(ApiError::field("prompt", message));
    }
    let each = repeated(p);
    if prompts * each > MOST_REPEATED {
        let message = format!(
            "{prompts} prompts with {each} bytes of stop strings and biases each are more than {MOST_REPEATED} bytes in one request; \
             send fewer prompts at a time"
        );
        return Err(ApiError::field("prompt", message));
    }
    let bytes: usize = asked.prompts.iter().map(Prompt::bytes).sum();
    let work = || {
        let one = |prompt: &Prompt| one(live, asked, prompt, asked.seed.unwrap_or_else(&random));
        asked.prompts.iter().map(one).collect::<Result<Vec<_>, _>>()
    };
    let requests = if bytes > LONG { tokio::task::block_in_place(work) } else { work() }?;
    check_lists(&requests, live.engine.capacity().positions)?;
    Ok(requests)
}

/// Bytes that parameters take for each prompt, apart from the few that all have.
fn repeated(p: &Parameters) -> usize {
    let stop: usize = p.stop.iter().map(|stop| size_of::<String>() + stop.len()).sum();
    let ends = p.decay.as_ref().map_or(0, |decay| size_of_val(&decay.ends[..]));
    stop + size_of_val(&p.logit_bias[..]) + ends
}

/// Refuses log-probabilities of so many tokens that the answer would be absurd.
fn check_lists(requests: &[Request], positions: usize) -> Result<(), ApiError> {
    let entries = |request: &Request| {
        let (p, prompt) = (&request.parameters, request.prompt.len());
        let generated = p.max_tokens.unwrap_or(positions).min(positions.saturating_sub(prompt));
        let echoed = p.echo.map_or(0, |from| prompt.saturating_sub(from));
        p.log_probs.unwrap_or(0) * texts(request) * (generated + echoed)
    };
    let all: usize = requests.iter().map(entries).sum();
    if all > MOST_ENTRIES {
        let message = format!(
            "the likeliest tokens at each place of all texts may come to {all} entries, which is more than {MOST_ENTRIES}; ask \
             for fewer of them, for fewer texts, or set max_tokens"
        );
        return Err(ApiError::field("log_probs", message));
    }
    Ok(())
}

fn one(live: &Live, asked: &Asked, prompt: &Prompt, seed: u64) -> Result<Request, ApiError> {
    let marks = Marks { in_front: asked.special, in_text: asked.special_in_text };
    // A text's `</s>` is not what was asked for, so it is not given back.
    let (ids, from) = match prompt {
        Prompt::Text(text) => (tokens(live, text, marks)?, usize::from(marks.in_front)),
        Prompt::Ids(ids) => (ids.clone(), 0),
    };
    let echo = (asked.echo && from < ids.len()).then_some(from);
    let parameters = Parameters { seed, echo, ..asked.parameters.clone() };
    let request = Request { prompt: ids, parameters };
    request
        .check(&live.engine.capacity())
        .map_err(|refusal| refused(&refusal, request.prompt.len(), live))?;
    Ok(request)
}

/// Tokens of a text, with special tokens in front or read in it, as wanted.
///
/// # Errors
/// 400 when it is so long that no model's positions could hold it, which is found without tokenising.
pub(crate) fn tokens(live: &Live, text: &str, marks: Marks) -> Result<Vec<u32>, ApiError> {
    let positions = live.engine.capacity().positions;
    let most = positions * live.longest_token;
    if text.len() > most {
        let message = format!(
            "a text of {} bytes has more tokens than the model has positions, which are {positions}; shorten it",
            text.len()
        );
        return Err(too_long(message));
    }
    let tokens = live.tokenizer().encode_as(text, marks);
    tokens.map_err(|error| ApiError::field("prompt", format!("{error:#}")))
}

fn too_long(message: String) -> ApiError {
    ApiError { code: "context_length_exceeded", ..ApiError::field("prompt", message) }
}

fn refused(refusal: &Refusal, prompt: usize, live: &Live) -> ApiError {
    match refusal.parameter {
        "prompt" if prompt > live.engine.capacity().positions => too_long(refusal.message.clone()),
        parameter => ApiError::field(parameter, refusal.message.clone()),
    }
}

/// Makes one prompt of a conversation, as `ferropt chat` does.
fn converse(asked: &mut Asked) {
    let said = |role| asked.messages.iter().filter(move |(own, _)| *own == role);
    let system: Vec<&str> = said(Role::System).map(|(_, text)| text.trim()).collect();
    let mut conversation = Conversation::default();
    if !system.is_empty() {
        conversation.system = system.join("\n");
    }
    let turns = asked.messages.iter().filter_map(|(role, text)| match role {
        Role::System => None,
        Role::User => Some((Speaker::User, text.as_str())),
        Role::Assistant => Some((Speaker::Assistant, text.as_str())),
    });
    asked.prompts = vec![Prompt::Text(conversation.prompt(turns))];
    // Searches go without stop strings.
    if asked.parameters.beams.is_none() {
        asked.parameters.stop.push(conversation.stop());
    }
    asked.parameters.log_probs = match asked.chat_log_probs {
        true => Some(asked.parameters.log_probs.unwrap_or(0)),
        false => None,
    };
}

impl Prompt {
    fn bytes(&self) -> usize {
        match self {
            Prompt::Text(text) => text.len(),
            Prompt::Ids(_) => 0,
        }
    }
}
