//! Every field that a request's body may have, once: what reads it, and what the OpenAPI page says of it.

use crate::asked::Asked;
use crate::error::ApiError;
use crate::shapes;
use serde_json::{Map, Value, json};

/// Kinds of bodies. A field lists those that it belongs to.
pub(crate) const COMPLETION: u8 = 1;
pub(crate) const CHAT: u8 = 2;
pub(crate) const GENERATE: u8 = 4;
pub(crate) const METASEQ: u8 = 8;
pub(crate) const TOKENIZE: u8 = 16;
pub(crate) const DETOKENIZE: u8 = 32;
pub(crate) const EMBED: u8 = 64;

const TEXTS: u8 = COMPLETION | GENERATE | METASEQ;
const ALL_TEXTS: u8 = TEXTS | CHAT;
const ALL: u8 = ALL_TEXTS | TOKENIZE | DETOKENIZE | EMBED;
const OPENAI: u8 = COMPLETION | CHAT;

/// A field.
pub(crate) struct Field {
    pub(crate) name: &'static str,
    /// Bodies that have it.
    pub(crate) bodies: u8,
    pub(crate) kind: Kind,
    pub(crate) doc: &'static str,
}

/// What its value may be, and what becomes of it. `null` is the same as no field.
pub(crate) enum Kind {
    /// A number within bounds.
    Number(f64, f64, fn(&mut Asked, f64)),
    /// A whole number within bounds.
    Whole(i64, i64, fn(&mut Asked, i64)),
    /// True or false.
    Flag(fn(&mut Asked, bool)),
    /// A text.
    Text(fn(&mut Asked, &str)),
    /// Something with a JSON schema, which is given as text.
    Shaped(&'static str, fn(&mut Asked, &Value) -> Result<(), String>),
    /// For clients that always send it: only these values, given as JSON, which change nothing.
    Only(&'static [&'static str]),
    /// Has no meaning here, and any value is taken.
    Ignored,
}

use Kind::{Flag, Ignored, Number, Only, Shaped, Text, Whole};

const fn field(name: &'static str, bodies: u8, kind: Kind, doc: &'static str) -> Field {
    Field { name, bodies, kind, doc }
}

/// Most of whatever is counted and has no limit of its own.
const MANY: i64 = 1 << 31;

/// All of them.
#[rustfmt::skip]
pub(crate) static FIELDS: &[Field] = &[
    field("model", ALL, Text(|a, v| a.model = Some(v.into())),
        "Name or alias of a model; the first one unless given."),
    field("prompt", TEXTS, Shaped(shapes::PROMPT, shapes::prompt),
        "A text, its token ids, or a list of texts or of lists of ids. `</s>` is put in front of texts, as \
         OPT was trained; ids are taken as they are."),
    field("input", EMBED, Shaped(shapes::PROMPT, shapes::prompt),
        "A text, its token ids, or a list of texts or of lists of ids. `</s>` is put in front of texts, as \
         OPT was trained; ids are taken as they are."),
    field("encoding_format", EMBED, Shaped(shapes::ENCODING, shapes::encoding),
        "Numbers as a list (`float`, the default), or as the Base64 of little-endian floats of 32 bits."),
    field("dimensions", EMBED, Whole(1, MANY, |a, v| a.dimensions = Some(v as usize)),
        "Numbers of an embedding, which are as many as the model's hidden states have: it was not trained to \
         say anything with fewer."),
    field("pooling", EMBED, Shaped(shapes::POOLING, shapes::pooling),
        "Which hidden states are the embedding: the mean of all tokens' (`mean`, the default; without the \
         `</s>` in front), or the `last` token's."),
    field("prompt", TOKENIZE, Text(|a, v| a.prompts.push(crate::asked::Prompt::Text(v.into()))),
        "The text. Other than in prompts, `</s>`, `<pad>` and the tokens that the tokenizer's files add are \
         these tokens in it, as Hugging Face's tokenizer reads them."),
    field("messages", CHAT, Shaped(shapes::MESSAGES, shapes::messages),
        "The conversation. OPT knows no turns, so it is written as a text, with `Person:` and `Assistant:` \
         in front of what was said."),
    field("max_tokens", COMPLETION | METASEQ,
        Whole(0, MANY, |a, v| a.parameters.max_tokens = Some(v as usize)),
        "Tokens to generate at most; 16 unless given. 0 computes the prompt only."),
    field("max_tokens", CHAT | GENERATE, Whole(0, MANY, |a, v| a.parameters.max_tokens = Some(v as usize)),
        "Tokens to generate at most; as many as the model has positions for unless given."),
    field("max_completion_tokens", CHAT, Whole(0, MANY, |a, v| a.max_completion_tokens = Some(v as usize)),
        "OpenAI's newer name of `max_tokens`."),
    field("min_tokens", ALL_TEXTS, Whole(0, MANY, |a, v| a.parameters.min_tokens = v as usize),
        "So many tokens come before `</s>` (or whatever else ends the model's texts) may, and before stop strings are looked for."),
    field("temperature", ALL_TEXTS, Number(0.0, 100.0, |a, v| a.temperature = Some(v as f32)),
        "Divides the logits; 1 unless given, 0 takes the likeliest token."),
    field("top_p", ALL_TEXTS, Number(0.0, 1.0, shapes::top_p),
        "Only the fewest likeliest tokens that together have this probability. 0 takes the likeliest."),
    field("top_k", ALL_TEXTS, Whole(-1, MANY, |a, v| a.parameters.top_k = (v > 0).then_some(v as usize)),
        "Only among so many of the likeliest tokens; 0 or -1: among all."),
    field("min_p", ALL_TEXTS, Number(0.0, 1.0, |a, v| a.parameters.min_p = v as f32),
        "Only tokens at least this share as likely as the likeliest."),
    field("repetition_penalty", ALL_TEXTS,
        Number(0.01, 100.0, |a, v| a.parameters.repetition_penalty = v as f32),
        "Divides positive logits of tokens that prompt or text have, multiplies negative ones; 1 does \
         nothing."),
    field("presence_penalty", ALL_TEXTS, Number(-2.0, 2.0, shapes::presence_penalty),
        "Taken off the logits of tokens that were generated."),
    field("frequency_penalty", ALL_TEXTS, Number(-2.0, 2.0, shapes::frequency_penalty),
        "Taken off the logits of tokens as often as they were generated."),
    field("alpha_presence", METASEQ, Number(-2.0, 2.0, shapes::presence_penalty),
        "metaseq's name of `presence_penalty`, which counts if both are given and neither is 0."),
    field("alpha_frequency", METASEQ, Number(-2.0, 2.0, shapes::frequency_penalty),
        "metaseq's name of `frequency_penalty`, which counts if both are given and neither is 0."),
    field("alpha_presence_src", METASEQ,
        Number(-2.0, 2.0, |a, v| a.parameters.prompt_presence_penalty = v as f32),
        "Taken off the scores of tokens that the prompt has."),
    field("alpha_frequency_src", METASEQ,
        Number(-2.0, 2.0, |a, v| a.parameters.prompt_frequency_penalty = v as f32),
        "Taken off the scores of tokens as often as the prompt has them."),
    field("alpha_src_penalty_end_idx", METASEQ,
        Whole(-MANY, MANY, |a, v| a.parameters.penalised_prompt = (v > 0).then_some(v as usize)),
        "These two look at so many of the prompt's first tokens, of which `</s>` is one; at all of them \
         unless it is above 0."),
    field("lambda_decay", METASEQ, Number(-1.0, 1.0, |a, v| a.lambda_decay = v as f32),
        "Factual nucleus sampling: `top_p` is multiplied by it for each token of a sentence behind the second. \
         A sentence ends with the tokens `.`, `?` and `!`. Off unless it is above 0."),
    field("omega_bound", METASEQ, Number(0.0, 1.0, |a, v| a.omega_bound = v as f32),
        "With `lambda_decay`: `top_p` does not become smaller than this; 0.3 unless given."),
    field("logit_bias", ALL_TEXTS, Shaped(shapes::LOGIT_BIAS, shapes::logit_bias),
        "Added to the logits of these token ids, from -100 to 100; of 1,024 ids at most, written without zeros in front."),
    field("seed", ALL_TEXTS, Shaped(shapes::SEED, shapes::seed),
        "The same seed gives the same texts, whatever else is being computed; random unless given."),
    field("stop", ALL_TEXTS, Shaped(shapes::STOP, shapes::stop),
        "A text ends before the first of these strings."),
    field("ignore_eos", ALL_TEXTS, Flag(|a, v| a.parameters.ignore_end = v), "`</s>`, or whatever else ends the model's texts, is never chosen."),
    field("n", ALL_TEXTS, Whole(1, ferropt_engine::MOST_CHOICES as i64, |a, v| a.parameters.n = v as usize),
        "Texts for each prompt."),
    field("best_of", ALL_TEXTS,
        Whole(1, ferropt_engine::MOST_CHOICES as i64, |a, v| a.parameters.best_of = Some(v as usize)),
        "Compute so many texts, and give back the `n` with the highest mean log-probability of a token."),
    field("beams", ALL_TEXTS,
        Whole(1, ferropt_engine::MOST_CHOICES as i64, |a, v| a.parameters.beams = Some(v as usize)),
        "Search for the likeliest texts, with so many candidates at a time. Goes without sampling, \
         penalties and stop strings."),
    field("length_penalty", ALL_TEXTS, Number(-100.0, 100.0, |a, v| a.parameters.length_penalty = v as f32),
        "With `beams`: above 0 favours longer texts."),
    field("echo", TEXTS, Flag(|a, v| a.echo = v),
        "Give back the prompt in front of the text, with log-probabilities if they are asked for."),
    field("logprobs", TEXTS, Shaped(shapes::LOG_PROBS, shapes::log_probs),
        "Log-probabilities of the tokens, and of so many of the likeliest ones at each place."),
    field("logprobs", CHAT, Flag(|a, v| a.chat_log_probs = v), "Log-probabilities of the tokens."),
    field("top_logprobs", CHAT,
        Whole(0, ferropt_engine::MOST_LOG_PROBS as i64, |a, v| a.parameters.log_probs = Some(v as usize)),
        "With `logprobs`: so many of the likeliest tokens at each place."),
    field("stream", ALL_TEXTS, Flag(|a, v| a.stream = v), "Send text as it is made, as server-sent events."),
    field("stream_options", OPENAI | METASEQ, Shaped(shapes::STREAM_OPTIONS, shapes::stream_options),
        "With `stream`: `include_usage` adds an event with the tokens that were used."),
    field("add_special_tokens", TEXTS, Flag(|a, v| a.special = v),
        "Put `</s>` in front of prompts that are texts; true unless given."),
    field("special_tokens", TEXTS, Flag(|a, v| a.special_in_text = v),
        "Read `</s>`, `<pad>` and the tokens that the tokenizer's files add as these tokens where a prompt's \
         text has them, not as characters."),
    field("add_special_tokens", TOKENIZE, Flag(|a, v| a.special = v),
        "Put `</s>` in front, as for prompts; true unless given."),
    field("return_token_strs", TOKENIZE, Flag(|a, v| a.token_names = v), "Give the tokens' texts too."),
    field("tokens", DETOKENIZE, Shaped(shapes::IDS, |a, v| { a.tokens = shapes::ids(v)?; Ok(()) }),
        "Token ids."),
    field("skip_special_tokens", DETOKENIZE, Flag(|a, v| a.skip_special = v),
        "Leave `</s>` and the other special tokens out of the text."),
    field("suffix", COMPLETION, Only(&["\"\""]), "Text behind the completion, which OPT cannot look at."),
    field("tools", CHAT, Only(&["[]"]), "OPT knows no tools."),
    field("tool_choice", CHAT, Only(&["\"none\"", "\"auto\""]), "OPT knows no tools."),
    field("functions", CHAT, Only(&["[]"]), "OPT knows no functions."),
    field("function_call", CHAT, Only(&["\"none\"", "\"auto\""]), "OPT knows no functions."),
    field("response_format", CHAT, Only(&["{\"type\":\"text\"}"]), "Answers are text."),
    field("modalities", CHAT, Only(&["[\"text\"]"]), "Answers are text."),
    field("user", ALL_TEXTS | EMBED, Ignored,
        "Taken, and not used: who asks is known by the API key or the address."),
    field("metadata", OPENAI, Ignored, "Taken, and not used."),
    field("store", OPENAI, Ignored, "Taken, and not used: nothing is stored."),
    field("service_tier", OPENAI, Ignored, "Taken, and not used."),
    field("safety_identifier", OPENAI, Ignored, "Taken, and not used."),
    field("prompt_cache_key", OPENAI, Ignored,
        "Taken, and not used: beginnings of prompts are found again without it."),
    field("prompt_cache_retention", OPENAI, Ignored, "Taken, and not used."),
    field("parallel_tool_calls", CHAT, Ignored, "Taken, and not used: OPT knows no tools."),
];

/// The fields of a kind of body.
pub(crate) fn of(body: u8) -> impl Iterator<Item = &'static Field> {
    FIELDS.iter().filter(move |field| field.bodies & body != 0)
}

/// Reads a body of some kind.
///
/// # Errors
/// 400 for a field that is unknown, that is missing of those `required`, or that has a wrong value.
pub(crate) fn read(object: &Map<String, Value>, body: u8, required: &[&str]) -> Result<Asked, ApiError> {
    let mut asked = Asked::default();
    for name in required {
        if object.get(*name).is_none_or(Value::is_null) {
            let error = ApiError::field(name, format!("the field {name} is missing"));
            return Err(ApiError { code: "missing_field", ..error });
        }
    }
    for (name, value) in object {
        // Clients send it for fields that came after this was written.
        if value.is_null() {
            continue;
        }
        match of(body).find(|field| field.name == name) {
            Some(field) => field.read(&mut asked, value)?,
            None => return Err(unknown(name, body)),
        }
    }
    Ok(asked)
}

/// Bytes of a name that may be a misspelt field's. A name may be as long as a body, and comparing takes time and memory for each.
const LONGEST_SLIP: usize = 64;

fn unknown(name: &str, body: u8) -> ApiError {
    // A slip for every four letters; what is farther away is another word.
    let slips = (name.chars().count() / 4).clamp(1, 3);
    let near = of(body).filter(|_| name.len() <= LONGEST_SLIP);
    let near = near.map(|field| (strsim::damerau_levenshtein(field.name, name), field.name));
    let near = near.filter(|(distance, _)| *distance <= slips).min();
    let hint = near.map_or_else(|| "leave it out".into(), |(_, near)| format!("did you mean {near}?"));
    let name: String = name.chars().take(100).collect();
    let error = ApiError::field(&name, format!("the field {name:?} is not known here; {hint}"));
    ApiError { code: "unknown_field", ..error }
}

impl Field {
    fn read(&self, asked: &mut Asked, value: &Value) -> Result<(), ApiError> {
        let name = self.name;
        let expected = |what: String| {
            let mut given = value.to_string();
            if given.len() > 100 {
                given = given.chars().take(100).chain("...".chars()).collect();
            }
            ApiError::field(name, format!("{name} = {given} is not {what}"))
        };
        match &self.kind {
            Number(least, most, set) => match value.as_f64().filter(|v| (*least..=*most).contains(v)) {
                Some(value) => set(asked, value),
                None => return Err(expected(format!("a number from {least} to {most}"))),
            },
            Whole(least, most, set) => match whole(value).filter(|v| (*least..=*most).contains(v)) {
                Some(value) => set(asked, value),
                None => return Err(expected(format!("a whole number from {least} to {most}"))),
            },
            Flag(set) => match value.as_bool() {
                Some(value) => set(asked, value),
                None => return Err(expected("true or false".into())),
            },
            Text(set) => match value.as_str() {
                Some(value) => set(asked, value),
                None => return Err(expected("a text".into())),
            },
            Shaped(_, read) => {
                read(asked, value).map_err(|wrong| ApiError::field(name, format!("{name}: {wrong}")))?;
            }
            Only(values) => {
                if !allowed(values).contains(value) {
                    let values = values.join(" or ");
                    return Err(expected(format!("possible here ({values} is, or nothing): {}", self.doc)));
                }
            }
            Ignored => {}
        }
        Ok(())
    }

    /// Its JSON schema.
    pub(crate) fn schema(&self) -> Value {
        let mut schema = match &self.kind {
            Number(least, most, _) => {
                json!({ "type": ["number", "null"], "minimum": least, "maximum": most })
            }
            Whole(least, most, _) => {
                json!({ "type": ["integer", "null"], "minimum": least, "maximum": most })
            }
            Flag(_) => json!({ "type": ["boolean", "null"] }),
            Text(_) => json!({ "type": ["string", "null"] }),
            // A text of a constant, which a test parses.
            Shaped(schema, _) => serde_json::from_str(schema).unwrap_or_default(),
            Only(values) => json!({ "enum": ([allowed(values), vec![Value::Null]].concat()) }),
            Ignored => json!({}),
        };
        schema["description"] = self.doc.into();
        schema
    }
}

fn allowed(values: &[&str]) -> Vec<Value> {
    values.iter().filter_map(|value| serde_json::from_str(value).ok()).collect()
}

/// A whole number, which JSON may also write as 5.0.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    const EXACT: f64 = (1u64 << 53) as f64;
    let float = || value.as_f64().filter(|v| v.fract() == 0.0 && v.abs() <= EXACT).map(|v| v as i64);
    value.as_i64().or_else(float)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asked::{Prompt, Role};

    fn read_text(text: &str, body: u8) -> Result<Asked, ApiError> {
        read(serde_json::from_str::<Value>(text).unwrap().as_object().unwrap(), body, &[])
    }

    #[test]
    fn every_name_is_there_once_in_each_body_and_schemas_are_json() {
        for body in [COMPLETION, CHAT, GENERATE, METASEQ, TOKENIZE, DETOKENIZE, EMBED] {
            let mut names: Vec<&str> = of(body).map(|field| field.name).collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count);
        }
        for field in FIELDS {
            if let Shaped(schema, _) = &field.kind {
                serde_json::from_str::<Value>(schema).unwrap_or_else(|e| panic!("{}: {e}", field.name));
            }
            if let Only(values) = &field.kind {
                assert_eq!(allowed(values).len(), values.len(), "{}", field.name);
            }
            assert!(!field.doc.is_empty());
            read_text(&format!("{{\"{}\": null}}", field.name), field.bodies).unwrap();
        }
    }

    #[test]
    fn values_arrive() {
        let asked = read_text(
            r#"{"prompt": ["a", "b"], "max_tokens": 5.0, "temperature": 0.5, "top_p": 0, "stop": "x", "seed": -1,
                "logit_bias": {"7": -3}, "logprobs": 2, "echo": true, "stream": true, "n": 2, "top_k": -1,
                "stream_options": {"include_usage": true}, "user": {"any": "thing"}, "suffix": null}"#,
            COMPLETION,
        )
        .unwrap();
        assert_eq!(asked.prompts, [Prompt::Text("a".into()), Prompt::Text("b".into())]);
        let p = &asked.parameters;
        assert_eq!((p.max_tokens, p.log_probs, p.n, p.top_k), (Some(5), Some(2), 2, Some(1)));
        assert_eq!((&p.stop, &p.logit_bias), (&vec!["x".into()], &vec![(7, -3.0)]));
        assert_eq!((asked.seed, asked.include_usage), (Some(u64::MAX), Some(true)));
        assert!(asked.echo && asked.stream);
        let ids = read_text(r#"{"prompt": [[2, 5], [2]]}"#, COMPLETION).unwrap().prompts;
        assert_eq!(ids, [Prompt::Ids(vec![2, 5]), Prompt::Ids(vec![2])]);
        let seed = |text: &str| read_text(&format!("{{\"seed\": {text}}}"), COMPLETION).unwrap().seed;
        assert_eq!(
            [seed("18446744073709551615"), seed("9223372036854775808"), seed("5.0")],
            [Some(u64::MAX), Some(1 << 63), Some(5)]
        );
        let none = read_text(r#"{"logprobs": false, "reasoning_effort": null}"#, COMPLETION).unwrap();
        assert_eq!(none.parameters.log_probs, None);
        let silent = r#"{"messages": [{"role": "assistant", "content": null, "refusal": null, "tool_calls": null,
            "function_call": null, "audio": null, "annotations": [], "name": "x", "later": null}, {"role": "assistant"}]}"#;
        let silent = read_text(silent, CHAT).unwrap().messages;
        assert_eq!(silent, [(Role::Assistant, String::new()), (Role::Assistant, String::new())]);
        let talk = read_text(
            r#"{"messages": [{"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}"#,
            CHAT,
        );
        assert_eq!(talk.unwrap().messages, [(Role::System, "Be brief.".into()), (Role::User, "ab".into())]);
    }

    #[test]
    fn wrong_values_are_named_with_what_was_expected() {
        for (body, text, param, part) in [
            (COMPLETION, r#"{"temprature": 1}"#, "temprature", "temperature"),
            (COMPLETION, r#"{"zzz": 1}"#, "zzz", "leave it out"),
            (CHAT, r#"{"reasoning_effort": "low"}"#, "reasoning_effort", "leave it out"),
            (CHAT, r#"{"max_token": 1}"#, "max_token", "did you mean max_tokens?"),
            (COMPLETION, r#"{"logprobs": true}"#, "logprobs", "from 0 to 100"),
            (COMPLETION, r#"{"logprobs": 101}"#, "logprobs", "101"),
            (COMPLETION, r#"{"seed": 18446744073709551616}"#, "seed", "18446744073709551615"),
            (COMPLETION, r#"{"seed": 0.5}"#, "seed", "0.5"),
            (CHAT, r#"{"messages": [{"role": "user", "content": null}]}"#, "messages", "content"),
            (
                CHAT,
                r#"{"messages": [{"role": "user", "content": "x", "contnet": "y"}]}"#,
                "messages",
                "\"contnet\"",
            ),
            (CHAT, r#"{"messages": [{"role": "assistant", "tool_calls": [{}]}]}"#, "messages", "tool_calls"),
            (COMPLETION, r#"{"messages": []}"#, "messages", "not known"),
            (COMPLETION, r#"{"temperature": -1}"#, "temperature", "from 0 to 100"),
            (COMPLETION, r#"{"temperature": "1"}"#, "temperature", "\"1\""),
            (COMPLETION, r#"{"max_tokens": 1.5}"#, "max_tokens", "1.5"),
            (COMPLETION, r#"{"max_tokens": true}"#, "max_tokens", "whole number"),
            (COMPLETION, r#"{"n": 1e300}"#, "n", "128"),
            (COMPLETION, r#"{"stream": 1}"#, "stream", "true or false"),
            (COMPLETION, r#"{"model": 5}"#, "model", "a text"),
            (COMPLETION, r#"{"prompt": {}}"#, "prompt", "list"),
            (COMPLETION, r#"{"prompt": []}"#, "prompt", "empty"),
            (COMPLETION, r#"{"prompt": ["a", 5]}"#, "prompt", "place 1"),
            (COMPLETION, r#"{"prompt": [-1]}"#, "prompt", "-1"),
            (COMPLETION, r#"{"prompt": [[]]}"#, "prompt", "empty"),
            (COMPLETION, r#"{"logit_bias": {"x": 1}}"#, "logit_bias", "\"x\""),
            (COMPLETION, r#"{"logit_bias": {"5": 101}}"#, "logit_bias", "101"),
            (COMPLETION, r#"{"logit_bias": {"5": 1, "05": 2}}"#, "logit_bias", "\"05\""),
            (COMPLETION, r#"{"stop": ["a", ""]}"#, "stop", "empty"),
            (COMPLETION, r#"{"stop": 5}"#, "stop", "list"),
            (COMPLETION, r#"{"suffix": "x"}"#, "suffix", "cannot look"),
            (COMPLETION, r#"{"stream_options": {"x": 1}}"#, "stream_options", "\"x\""),
            (CHAT, r#"{"tools": [{}]}"#, "tools", "no tools"),
            (CHAT, r#"{"messages": [{"role": "tool", "content": "x"}]}"#, "messages", "\"tool\""),
            (CHAT, r#"{"messages": [{"role": "user"}]}"#, "messages", "content"),
            (
                CHAT,
                r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
                "messages",
                "the type \"image_url\" is no text",
            ),
            (CHAT, r#"{"messages": [{"role": "user", "content": [{}]}]}"#, "messages", "the type null"),
            (CHAT, r#"{"messages": []}"#, "messages", "empty"),
            (METASEQ, r#"{"lambda_decay": 1.5}"#, "lambda_decay", "from -1 to 1"),
            (METASEQ, r#"{"omega_bound": -0.3}"#, "omega_bound", "from 0 to 1"),
            (METASEQ, r#"{"alpha_presence_src": 3}"#, "alpha_presence_src", "from -2 to 2"),
            (METASEQ, r#"{"alpha_src_penalty_end_idx": 0.5}"#, "alpha_src_penalty_end_idx", "whole number"),
            (COMPLETION, r#"{"alpha_presence_src": 1}"#, "alpha_presence_src", "not known"),
            (DETOKENIZE, r#"{"tokens": "x"}"#, "tokens", "list"),
            (EMBED, r#"{"input": [[2], "x"]}"#, "input", "place 1"),
            (EMBED, r#"{"encoding_format": "hex"}"#, "encoding_format", "base64"),
            (EMBED, r#"{"pooling": "max"}"#, "pooling", "mean"),
            (EMBED, r#"{"dimensions": 0}"#, "dimensions", "from 1"),
        ] {
            let error = read_text(text, body).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{text}");
            assert!(error.message.contains(part), "{text}: {}", error.message);
        }
        let many: Map<String, Value> = (0..1025).map(|id| (id.to_string(), json!(1))).collect();
        let many = read_text(&json!({ "logit_bias": many }).to_string(), COMPLETION).unwrap_err();
        assert!(many.message.contains("1025") && many.message.contains("1024"), "{}", many.message);
        let missing = read(&Map::new(), COMPLETION, &["prompt"]).unwrap_err();
        assert_eq!((missing.code, missing.param.as_deref()), ("missing_field", Some("prompt")));
    }

    #[test]
    fn a_long_name_is_refused_as_fast_as_a_short_one() {
        let body = json!({ "max_token".repeat(100_000): 1 }).to_string();
        let start = std::time::Instant::now();
        let message = read_text(&body, COMPLETION).unwrap_err().message;
        let took = start.elapsed();
        assert!(message.contains("leave it out") && message.len() < 300, "{message}");
        assert!(took < std::time::Duration::from_secs(1), "{took:?}");
    }

    #[test]
    fn a_penalty_of_zero_does_not_undo_the_one_of_the_other_name() {
        for text in [
            r#"{"alpha_presence": 0.5, "presence_penalty": 0, "alpha_frequency": 1, "frequency_penalty": 0}"#,
            r#"{"alpha_presence": 0, "presence_penalty": 0.5, "alpha_frequency": 0, "frequency_penalty": 1}"#,
        ] {
            let p = read_text(text, METASEQ).unwrap().parameters;
            assert_eq!((p.presence_penalty, p.frequency_penalty), (0.5, 1.0), "{text}");
        }
    }
}
