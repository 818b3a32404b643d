//! How texts are written down: one layout for each kind of answer, whole or as a stream of events.

mod chat;
mod completion;
mod generate;

pub(crate) use chat::Chat;
pub(crate) use completion::Completion;
pub(crate) use generate::Generate;

use ferropt_engine::{Finish, Piece, Text, Usage};
use serde_json::{Value, json};

/// A layout. Texts of a request are numbered through: those of the first prompt, then those of the second.
pub(crate) trait Layout: Send {
    /// The event before a text's first piece, if there is one.
    fn begin(&mut self, _index: usize) -> Option<Value> {
        None
    }

    /// The event of a piece of a text.
    fn piece(&mut self, index: usize, piece: Piece) -> Option<Value>;

    /// The event at a text's end.
    fn end(&mut self, index: usize, finish: Finish) -> Value;

    /// The event at the end of all, with the tokens that were used.
    fn used(&self, usage: Usage) -> Value;

    /// All texts at once.
    fn whole(&mut self, texts: Vec<Text>, usage: Usage) -> Value;
}

/// What all objects of an answer have in common.
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    /// Whether events say how many tokens were used, which all but the last leave open.
    pub(crate) include_usage: bool,
}

impl Head {
    /// An object of OpenAI's API.
    fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({ "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices })
    }

    /// An event of OpenAI's API.
    fn event(&self, kind: &str, choice: Value) -> Value {
        let mut event = self.object(kind, vec![choice]);
        if self.include_usage {
            event["usage"] = Value::Null;
        }
        event
    }

    /// An object with the tokens that were used.
    fn used(&self, kind: &str, choices: Vec<Value>, used: Usage) -> Value {
        let mut event = self.object(kind, choices);
        event["usage"] = usage(used);
        event
    }
}

/// OpenAI's names for why a text ended.
fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::EndOfText | Finish::Stop => "stop",
        Finish::MaxTokens | Finish::Positions => "length",
    }
}

fn usage(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.generated,
        "total_tokens": usage.prompt + usage.generated,
    })
}
