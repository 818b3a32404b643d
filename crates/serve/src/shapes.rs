//! Fields that are neither a number, a flag nor a text: their JSON schemas, and reading them.

use crate::asked::{Asked, Prompt, Role};
use crate::fields::whole;
use ferropt_engine::{MOST_LOG_PROBS, Pooling};
use serde_json::Value;

pub(crate) const IDS: &str =
    r#"{"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 4294967295}}"#;

pub(crate) const PROMPT: &str = r#"{"anyOf": [
    {"type": "string"},
    {"type": "array", "minItems": 1, "items": {"type": "string"}},
    {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 4294967295}},
    {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1,
        "items": {"type": "integer", "minimum": 0, "maximum": 4294967295}}}]}"#;

pub(crate) const MESSAGES: &str = r#"{"type": "array", "minItems": 1, "items": {"type": "object",
    "required": ["role"], "additionalProperties": {"type": "null"}, "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"description": "Only an assistant may have said nothing.", "anyOf": [
            {"type": ["string", "null"]}, {"type": "array", "items": {"type": "object",
            "required": ["type", "text"], "additionalProperties": {"type": "null"},
            "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}}}}]},
        "type": {"enum": ["text", "message", null], "description": "Taken, and not used."},
        "name": {"description": "Taken, and not used."},
        "refusal": {"description": "Taken, and not used."},
        "annotations": {"description": "Taken, and not used."},
        "tool_calls": {"enum": [[], null]}}}}"#;

/// Keys of a message that have no meaning here: OpenAI's clients send back messages as they got them.
const UNUSED: [&str; 3] = ["name", "refusal", "annotations"];

pub(crate) const SEED: &str =
    r#"{"type": ["integer", "null"], "minimum": -9223372036854775808, "maximum": 18446744073709551615}"#;

pub(crate) const LOG_PROBS: &str =
    r#"{"minimum": 0, "maximum": 100, "anyOf": [{"type": ["integer", "null"]}, {"enum": [false]}]}"#;

pub(crate) const STOP: &str = r#"{"anyOf": [{"type": ["string", "null"], "minLength": 1, "maxLength": 500},
    {"type": "array", "maxItems": 60, "items": {"type": "string", "minLength": 1, "maxLength": 500}}]}"#;

/// Most stop strings of a request; a conversation has one of its own.
const STOPS: usize = 60;
/// Characters of the longest: how much of each a text's end could be is looked at for every byte of the text.
const STOP_LENGTH: usize = 500;

pub(crate) const LOGIT_BIAS: &str = r#"{"type": ["object", "null"], "maxProperties": 1024,
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}"#;

/// Most tokens with a bias: each prompt of a request has all of them, and each token that is generated takes time for them.
const BIASES: usize = 1024;

pub(crate) const STREAM_OPTIONS: &str = r#"{"type": ["object", "null"], "additionalProperties": false, "properties": {
    "include_usage": {"type": ["boolean", "null"]},
    "include_obfuscation": {"type": ["boolean", "null"], "description": "Taken, and not used."}}}"#;

pub(crate) const ENCODING: &str = r#"{"enum": ["float", "base64", null]}"#;

pub(crate) const POOLING: &str = r#"{"enum": ["mean", "last", null]}"#;

/// One prompt or several.
pub(crate) fn prompt(asked: &mut Asked, value: &Value) -> Result<(), String> {
    const EXPECTED: &str = "expected a text, a list of token ids, or a list of texts or of such lists";
    asked.prompts = match value {
        Value::String(text) => vec![Prompt::Text(text.clone())],
        Value::Array(list) => match list.first() {
            None => return Err("the list is empty".into()),
            Some(Value::Number(_)) => vec![Prompt::Ids(ids(value)?)],
            Some(Value::String(_)) => {
                let text = |(at, item): (usize, &Value)| match item {
                    Value::String(text) => Ok(Prompt::Text(text.clone())),
                    _ => Err(format!("what is at place {at} of the list is no text, but the first is")),
                };
                list.iter().enumerate().map(text).collect::<Result<_, _>>()?
            }
            Some(Value::Array(_)) => {
                let one = |(at, item): (usize, &Value)| match ids(item) {
                    Ok(ids) if ids.is_empty() => Err(format!("the list at place {at} is empty")),
                    ids => ids.map(Prompt::Ids).map_err(|wrong| format!("at place {at}: {wrong}")),
                };
                list.iter().enumerate().map(one).collect::<Result<_, _>>()?
            }
            _ => return Err(EXPECTED.into()),
        },
        _ => return Err(EXPECTED.into()),
    };
    Ok(())
}

/// A list of token ids.
pub(crate) fn ids(value: &Value) -> Result<Vec<u32>, String> {
    let list = value.as_array().ok_or("expected a list of token ids")?;
    let id = |item: &Value| whole(item).and_then(|id| u32::try_from(id).ok());
    list.iter().map(|item| id(item).ok_or_else(|| format!("{} is no token id", short(item)))).collect()
}

/// The messages of a conversation.
pub(crate) fn messages(asked: &mut Asked, value: &Value) -> Result<(), String> {
    let list = value.as_array().ok_or("expected a list of messages")?;
    if list.is_empty() {
        return Err("the list is empty".into());
    }
    for (at, message) in list.iter().enumerate() {
        check_keys(message).map_err(|wrong| format!("message {at} {wrong}"))?;
        let role = match message["role"].as_str() {
            Some("system" | "developer") => Role::System,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            _ => {
                let role = short(&message["role"]);
                return Err(format!("message {at} has the role {role}; there is system, user and assistant"));
            }
        };
        let content = match &message["content"] {
            Value::String(text) => text.clone(),
            Value::Array(parts) => parts.iter().map(part).collect::<Result<_, _>>()?,
            Value::Null if role == Role::Assistant => String::new(),
            _ => return Err(format!("message {at} has no content that is a text or a list of parts")),
        };
        asked.messages.push((role, content));
    }
    Ok(())
}

/// Whether a message says nothing that would be passed over.
fn check_keys(message: &Value) -> Result<(), String> {
    let nothing = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    for (key, value) in message.as_object().into_iter().flatten() {
        match key.as_str() {
            "role" | "content" => {}
            key if UNUSED.contains(&key) || value.is_null() => {}
            // lm-eval gives messages the type that OpenAI's parts have.
            "type" if ["text", "message"].iter().any(|kind| value == kind) => {}
            "type" => return Err(format!("has the type {}; there is text and message", short(value))),
            "tool_calls" if nothing(value) => {}
            "tool_calls" | "function_call" | "audio" => {
                return Err(format!("has {key}, and OPT knows text only"));
            }
            key => {
                let key = short(&key.into());
                return Err(format!("has the key {key}, which is not known here; there is role and content"));
            }
        }
    }
    Ok(())
}

fn part(part: &Value) -> Result<&str, String> {
    let unknown =
        |(key, value): &(&String, &Value)| !["type", "text"].contains(&key.as_str()) && !value.is_null();
    if part["type"] == "text"
        && let Some((key, _)) = part.as_object().and_then(|part| part.iter().find(unknown))
    {
        return Err(format!("a part has the key {}, which is not known here", short(&key.as_str().into())));
    }
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (Some("text"), None) => Err(format!("a part has the text {}, which is none", short(&part["text"]))),
        _ => {
            let kind = short(&part["type"]);
            Err(format!("a part of the type {kind} is no text, and OPT knows text only"))
        }
    }
}

/// Any number of 64 bits, with a sign or without.
pub(crate) fn seed(asked: &mut Asked, value: &Value) -> Result<(), String> {
    let seed = value.as_u64().or_else(|| whole(value).map(|seed| seed as u64));
    let expected = || format!("{} is not a whole number from {} to {}", short(value), i64::MIN, u64::MAX);
    asked.seed = Some(seed.ok_or_else(expected)?);
    Ok(())
}

/// How many of the likeliest tokens are listed; `false` is what conversations say for none.
pub(crate) fn log_probs(asked: &mut Asked, value: &Value) -> Result<(), String> {
    if value == false {
        return Ok(());
    }
    let count = whole(value).and_then(|count| usize::try_from(count).ok()).filter(|n| *n <= MOST_LOG_PROBS);
    let expected = || format!("{} is not a whole number from 0 to {MOST_LOG_PROBS}", short(value));
    asked.parameters.log_probs = Some(count.ok_or_else(expected)?);
    Ok(())
}

/// Strings at which a text ends.
pub(crate) fn stop(asked: &mut Asked, value: &Value) -> Result<(), String> {
    let list = match value {
        Value::String(_) => std::slice::from_ref(value),
        Value::Array(list) => list,
        _ => return Err("expected a text or a list of texts".into()),
    };
    if list.len() > STOPS {
        return Err(format!("{} strings are more than {STOPS}", list.len()));
    }
    for stop in list {
        let stop = stop.as_str().ok_or_else(|| format!("{} is no text", short(stop)))?;
        let length = stop.chars().count();
        if stop.is_empty() {
            return Err("a string is empty, so that every text would end at once; leave it out".into());
        }
        if length > STOP_LENGTH {
            return Err(format!("a string of {length} characters is longer than {STOP_LENGTH}"));
        }
        asked.parameters.stop.push(stop.into());
    }
    Ok(())
}

/// Biases by token id.
pub(crate) fn logit_bias(asked: &mut Asked, value: &Value) -> Result<(), String> {
    let object = value.as_object().ok_or("expected an object of token ids and numbers")?;
    if object.len() > BIASES {
        return Err(format!("{} tokens are more than {BIASES}, which is the limit", object.len()));
    }
    for (id, bias) in object {
        // One way to write each, so that none is there twice.
        let number = id.parse().ok().filter(|number: &u32| number.to_string() == *id);
        let number = number.ok_or_else(|| format!("{} is no token id", short(&id.as_str().into())))?;
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let bias = bias.ok_or_else(|| {
            format!("the bias of token {id} is {}, not a number from -100 to 100", short(&object[id]))
        })?;
        asked.parameters.logit_bias.push((number, bias as f32));
    }
    Ok(())
}

/// `include_usage`.
pub(crate) fn stream_options(asked: &mut Asked, value: &Value) -> Result<(), String> {
    let object = value.as_object().ok_or("expected an object")?;
    for (name, value) in object {
        match (name.as_str(), value) {
            ("include_usage", Value::Bool(include)) => asked.include_usage = Some(*include),
            ("include_obfuscation", Value::Bool(_) | Value::Null) | ("include_usage", Value::Null) => {}
            ("include_usage" | "include_obfuscation", _) => {
                return Err(format!("{name} is not true or false"));
            }
            _ => {
                return Err(format!("{} is not known; there is include_usage", short(&name.as_str().into())));
            }
        }
    }
    asked.include_usage.get_or_insert(false);
    Ok(())
}

/// How embeddings are written down.
pub(crate) fn encoding(asked: &mut Asked, value: &Value) -> Result<(), String> {
    asked.base64 = match value.as_str() {
        Some("float") => false,
        Some("base64") => true,
        _ => return Err(format!("{} is neither float nor base64", short(value))),
    };
    Ok(())
}

/// Which hidden states are an embedding.
pub(crate) fn pooling(asked: &mut Asked, value: &Value) -> Result<(), String> {
    let known = [Pooling::Mean, Pooling::Last].into_iter().find(|own| Some(own.name()) == value.as_str());
    asked.pooling = known.ok_or_else(|| format!("{} is neither mean nor last", short(value)))?;
    Ok(())
}

/// 0 keeps no token but the likeliest.
pub(crate) fn top_p(asked: &mut Asked, value: f64) {
    // Above 0 as a double may be 0 as a float.
    match value as f32 {
        0.0 => asked.parameters.top_k = Some(1),
        value => asked.parameters.top_p = value,
    }
}

/// 0 is what is there anyway, so it does not undo what the field's other name has set.
pub(crate) fn presence_penalty(asked: &mut Asked, value: f64) {
    if value != 0.0 {
        asked.parameters.presence_penalty = value as f32;
    }
}

/// The same.
pub(crate) fn frequency_penalty(asked: &mut Asked, value: f64) {
    if value != 0.0 {
        asked.parameters.frequency_penalty = value as f32;
    }
}

/// A value in an error message.
fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 { text } else { text.chars().take(60).chain("...".chars()).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_have_the_bounds_of_what_reads() {
        assert!(LOG_PROBS.contains(&format!("\"maximum\": {MOST_LOG_PROBS},")));
        assert!(LOGIT_BIAS.contains(&format!("\"maxProperties\": {BIASES},")));
        assert!(SEED.contains(&i64::MIN.to_string()) && SEED.contains(&u64::MAX.to_string()));
        let refused = |text: &str| {
            let message = serde_json::from_str(text).unwrap();
            messages(&mut Asked::default(), &Value::Array(vec![message])).unwrap_err()
        };
        let part = refused(r#"{"role": "user", "content": [{"type": "text", "text": "x", "size": 1}]}"#);
        assert!(part.contains("\"size\""), "{part}");
        assert!(refused(r#"{"role": "user", "content": "x", "audio": {"id": "y"}}"#).contains("audio"));
        assert!(refused(r#"{"role": "user", "content": "x", "type": "image"}"#).contains("\"image\""));
    }
}
