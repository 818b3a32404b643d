//! Conversations as texts that a model continues: OPT knows no turns.
//!
//! ```text
//! A conversation between a person and a helpful assistant.
//!
//! Person: what was said
//! Assistant: what was replied
//! ```

/// Who says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    /// The one who asks.
    User,
    /// The one who replies, which is the model.
    Assistant,
}

/// How a conversation is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// What stands before the first turn.
    pub system: String,
    /// Name of [`Speaker::User`].
    pub user: String,
    /// Name of [`Speaker::Assistant`].
    pub assistant: String,
}

impl Default for Conversation {
    /// As at the top of this page.
    fn default() -> Self {
        Conversation {
            system: "A conversation between a person and a helpful assistant.".into(),
            user: "Person".into(),
            assistant: "Assistant".into(),
        }
    }
}

impl Conversation {
    /// What the model continues so that the assistant speaks next. Spaces around what was said are left out.
    ///
    /// ```
    /// use ferropt_engine::{Conversation, Speaker};
    /// let text = Conversation::default().prompt([(Speaker::User, "Good morning!")]);
    /// assert!(text.ends_with("\n\nPerson: Good morning!\nAssistant:"));
    /// ```
    pub fn prompt<'a>(&self, turns: impl IntoIterator<Item = (Speaker, &'a str)>) -> String {
        let mut text = format!("{}\n", self.system);
        let mut last = Speaker::Assistant;
        for (speaker, said) in turns {
            // A blank line before each question sets exchanges apart.
            let line = if last == Speaker::Assistant { "\n" } else { "" };
            let space = if said.trim().is_empty() { "" } else { " " };
            text += &format!("{line}{}:{space}{}\n", self.name(speaker), said.trim());
            last = speaker;
        }
        text + &self.assistant + ":"
    }

    /// The string at which a reply ends.
    pub fn stop(&self) -> String {
        format!("\n{}:", self.user)
    }

    fn name(&self, speaker: Speaker) -> &str {
        match speaker {
            Speaker::User => &self.user,
            Speaker::Assistant => &self.assistant,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_lines_with_names() {
        let talk = Conversation { system: "Talk.".into(), user: "A".into(), assistant: "B".into() };
        let turns = [(Speaker::User, " hello "), (Speaker::Assistant, "hi"), (Speaker::User, "who\nis it")];
        assert_eq!(talk.prompt(turns), "Talk.\n\nA: hello\nB: hi\n\nA: who\nis it\nB:");
        assert_eq!(talk.prompt([]), "Talk.\nB:");
        assert_eq!(talk.stop(), "\nA:");
    }
}
