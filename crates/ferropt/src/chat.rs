//! `ferropt chat`: a conversation in the terminal.

use crate::model::{DraftArgs, ModelArgs, SamplingArgs, refused, unescaped};
use anyhow::{Result, ensure};
use ferropt_engine::{Event, Handle, Parameters, Request};
use ferropt_train::signals::Interrupt;
use std::io::{BufRead, IsTerminal, Write};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

/// Arguments of `ferropt chat`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, args_override_self = true)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    draft: DraftArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Tokens of a reply at most
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_tokens: usize,
    /// What stands before the conversation (\n is a line end)
    #[arg(long, value_name = "TEXT", default_value = SYSTEM)]
    system: String,
    /// Name of the one who types
    #[arg(long, value_name = "NAME", default_value = "Person")]
    user: String,
    /// Name of the one who replies
    #[arg(long, value_name = "NAME", default_value = "Assistant")]
    assistant: String,
}

const SYSTEM: &str = "A conversation between a person and a helpful assistant.";

const EXAMPLES: &str = "\
Examples:
  ferropt chat --model runs/a
  ferropt chat --model runs/a --temperature 0.7 --repetition-penalty 1.1
  ferropt chat --model runs/a --draft runs/small
  ferropt chat --model runs/a --user Alice --assistant Bob --system \"Alice meets Bob on the beach.\"

OPT knows no turns, so the conversation is written as a text that it continues, up to the next \"Person:\":

  A conversation between a person and a helpful assistant.

  Person: what was typed
  Assistant: what was replied

The oldest turns are left out when the model's positions are used up. Ctrl-C interrupts a reply; Ctrl-D ends.";

/// What was said, and by whom.
struct Conversation {
    system: String,
    names: [String; 2],
    /// What was typed, and the reply.
    turns: Vec<[String; 2]>,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let parameters = Parameters {
        max_tokens: Some(args.max_tokens),
        stop: vec![format!("\n{}:", args.user)],
        ..args.sampling.parameters(None)
    };
    parameters.check().map_err(refused)?;
    let model = args.model.open_with(&args.draft, 1, None)?;
    let engine = &model.engine;
    let interrupt = Interrupt::new()?;
    let mut conversation = Conversation {
        system: unescaped(&args.system),
        names: [args.user, args.assistant],
        turns: Vec::new(),
    };
    let (terminal, mut input) = (std::io::stdin().is_terminal(), std::io::stdin().lock());
    let mut out = std::io::stdout();
    for number in 0.. {
        if terminal {
            write!(out, "{}: ", conversation.names[0])?;
            out.flush()?;
        }
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            break;
        }
        if line.trim().is_empty() {
            continue;
        }
        conversation.turns.push([line.trim().into(), String::new()]);
        let prompt = conversation.fit(engine, args.max_tokens)?;
        // Replies differ though the seed is one: each turn has its own.
        let parameters = Parameters { seed: parameters.seed.wrapping_add(number), ..parameters.clone() };
        write!(out, "{}:", conversation.names[1])?;
        out.flush()?;
        interrupt.begin();
        let reply = reply(engine, Request { prompt, parameters }, &interrupt, &mut out)?;
        interrupt.end();
        writeln!(out)?;
        if let Some(turn) = conversation.turns.last_mut() {
            turn[1] = reply.trim().into();
        }
    }
    if terminal {
        writeln!(out)?;
    }
    Ok(())
}

/// Prints a reply as it is made.
fn reply(engine: &Handle, request: Request, interrupt: &Interrupt, out: &mut impl Write) -> Result<String> {
    let mut reply = String::new();
    let mut events = engine.submit(request).map_err(refused)?;
    while !interrupt.asked() {
        match events.next_within(Duration::from_millis(50)) {
            Ok(Event::Text { piece, .. }) => {
                reply += &piece.text;
                out.write_all(piece.text.as_bytes())?;
                out.flush()?;
            }
            Ok(Event::Failed(message)) => anyhow::bail!(message),
            Ok(Event::Done(_)) | Err(RecvTimeoutError::Disconnected) => break,
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
        }
    }
    Ok(reply)
}

impl Conversation {
    fn text(&self) -> String {
        let [user, assistant] = &self.names;
        let mut text = format!("{}\n", self.system);
        for [typed, reply] in &self.turns {
            text += &format!("\n{user}: {typed}\n{assistant}:");
            if !reply.is_empty() {
                text += &format!(" {reply}");
            }
        }
        text
    }

    /// The text's tokens, with the oldest turns left out so that a reply fits behind it.
    fn fit(&mut self, engine: &Handle, max_tokens: usize) -> Result<Vec<u32>> {
        let positions = engine.capacity().positions;
        loop {
            let prompt = engine.tokenizer().encode_prompt(&self.text())?;
            // A short model should not lose everything for the sake of a long reply.
            if prompt.len() + max_tokens.min(positions / 2) <= positions {
                return Ok(prompt);
            }
            ensure!(
                self.turns.len() > 1,
                "this turn has {} tokens, which leaves too little of the model's {positions} positions for a reply; type less",
                prompt.len()
            );
            self.turns.remove(0);
        }
    }
}
