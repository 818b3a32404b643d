//! How texts are written down: one layout for each kind of answer, whole or as a stream of events.
//!
//! Layouts write JSON as they go through the texts, and build nothing in between: with log-probabilities an answer has a few
//! hundred bytes for each token, and a tree of them would take twenty times as much memory as the answer.

mod chat;
mod completion;
mod generate;

pub(crate) use chat::Chat;
pub(crate) use completion::Completion;
pub(crate) use generate::Generate;

use ferropt_engine::{Finish, Piece, Text, Usage};
use serde::{Serialize, Serializer};

/// A layout, which gives JSON. Texts of a request are numbered through: those of the first prompt, then those of the second.
pub(crate) trait Layout: Send {
    /// The event before a text's first piece, if there is one.
    fn begin(&mut self, _index: usize) -> Option<String> {
        None
    }

    /// The event of a piece of a text.
    fn piece(&mut self, index: usize, piece: Piece) -> Option<String>;

    /// The event at a text's end.
    fn end(&mut self, index: usize, finish: Finish) -> String;

    /// The event at the end of all, with the tokens that were used.
    fn used(&self, usage: Usage) -> String;

    /// All texts at once.
    fn whole(&mut self, texts: Vec<Text>, usage: Usage) -> String;
}

/// What all objects of an answer have in common.
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    /// Whether events say how many tokens were used, which all but the last leave open.
    pub(crate) include_usage: bool,
}

/// An object of OpenAI's API.
#[derive(Serialize)]
struct Object<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Used>>,
}

/// Tokens that were used, as OpenAI calls them.
#[derive(Serialize)]
struct Used {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

impl Head {
    fn object<C: Serialize>(&self, kind: &'static str, choices: &[C], usage: Option<Option<Used>>) -> String {
        let Head { id, created, model, .. } = self;
        json(&Object { id, object: kind, created: *created, model, choices, usage })
    }

    /// An event of OpenAI's API.
    fn event(&self, kind: &'static str, choice: impl Serialize) -> String {
        self.object(kind, &[choice], self.include_usage.then_some(None))
    }

    /// An object with the tokens that were used.
    fn used<C: Serialize>(&self, kind: &'static str, choices: &[C], used: Usage) -> String {
        self.object(kind, choices, Some(Some(usage(used))))
    }
}

/// OpenAI's names for why a text ended.
fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::EndOfText | Finish::Stop => "stop",
        Finish::MaxTokens | Finish::Positions => "length",
    }
}

fn usage(usage: Usage) -> Used {
    Used {
        prompt_tokens: usage.prompt,
        completion_tokens: usage.generated,
        total_tokens: usage.prompt + usage.generated,
    }
}

/// What is written down.
pub(crate) fn json(value: &impl Serialize) -> String {
    // Names of fields are texts, and a String takes everything.
    serde_json::to_string(value).unwrap_or_default()
}

/// A list whose entries are made one after the other while they are written down.
pub(crate) struct List<'a, T, F>(pub(crate) &'a [T], pub(crate) F);

impl<'a, T, F, S> Serialize for List<'a, T, F>
where
    F: Fn(&'a T) -> S,
    S: Serialize,
{
    fn serialize<W: Serializer>(&self, writer: W) -> Result<W::Ok, W::Error> {
        writer.collect_seq(self.0.iter().map(&self.1))
    }
}
