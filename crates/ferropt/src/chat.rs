//! `ferropt chat`: a conversation in the terminal.

use crate::model::{DraftArgs, MarksArgs, ModelArgs, SamplingArgs, refused, unescaped};
use anyhow::{Result, ensure};
use ferropt_engine::{Conversation, Event, Handle, Parameters, Request, Speaker};
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
    marks: MarksArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Tokens of a reply at most
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_tokens: usize,
    /// What stands before the conversation (\n is a line end)
    #[arg(long, value_name = "TEXT", default_value_t = Conversation::default().system)]
    system: String,
    /// Name of the one who types
    #[arg(long, value_name = "NAME", default_value_t = Conversation::default().user)]
    user: String,
    /// Name of the one who replies
    #[arg(long, value_name = "NAME", default_value_t = Conversation::default().assistant)]
    assistant: String,
}

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

/// Who said what.
type Turn = (Speaker, String);

pub(crate) fn run(args: Args) -> Result<()> {
    let conversation =
        Conversation { system: unescaped(&args.system), user: args.user, assistant: args.assistant };
    let parameters = Parameters {
        max_tokens: Some(args.max_tokens),
        stop: vec![conversation.stop()],
        ..args.sampling.parameters(None)
    };
    parameters.check().map_err(refused)?;
    let model = args.model.open_with(&args.draft, 1, None)?;
    let engine = &model.engine;
    let interrupt = Interrupt::new()?;
    let mut turns = Vec::new();
    let (terminal, mut input) = (std::io::stdin().is_terminal(), std::io::stdin().lock());
    let mut out = std::io::stdout();
    for number in 0.. {
        if terminal {
            write!(out, "{}: ", conversation.user)?;
            out.flush()?;
        }
        let mut line = Vec::new();
        if input.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        let Ok(line) = String::from_utf8(line) else {
            tell!("this turn is not UTF-8, so it was left out; type it again");
            continue;
        };
        if line.trim().is_empty() {
            continue;
        }
        let prompt = match fit(&conversation, &turns, line, engine, &args.marks, args.max_tokens) {
            Ok((with, prompt)) => {
                turns = with;
                prompt
            }
            // What was said before stays as it is.
            Err(error) => {
                tell!("{error:#}");
                continue;
            }
        };
        // Replies differ though the seed is one: each turn has its own.
        let parameters = Parameters { seed: parameters.seed.wrapping_add(number), ..parameters.clone() };
        write!(out, "{}:", conversation.assistant)?;
        out.flush()?;
        interrupt.begin();
        let reply = reply(engine, Request { prompt, parameters }, &interrupt, &mut out)?;
        interrupt.end();
        writeln!(out)?;
        turns.push((Speaker::Assistant, reply));
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

/// The turns with one more, the oldest left out so that a reply fits behind them, and their tokens.
fn fit(
    conversation: &Conversation,
    before: &[Turn],
    line: String,
    engine: &Handle,
    marks: &MarksArgs,
    max_tokens: usize,
) -> Result<(Vec<Turn>, Vec<u32>)> {
    let positions = engine.capacity().positions;
    let mut turns = before.to_vec();
    turns.push((Speaker::User, line));
    loop {
        let text = conversation.prompt(turns.iter().map(|(speaker, said)| (*speaker, said.as_str())));
        let prompt = marks.tokens(engine.tokenizer(), &text)?;
        // A short model should not lose everything for the sake of a long reply.
        if prompt.len() + max_tokens.min(positions / 2) <= positions {
            return Ok((turns, prompt));
        }
        ensure!(
            turns.len() > 1,
            "this turn has {} tokens with what stands before it, which leaves too little of the model's {positions} \
             positions for a reply; it was left out. Type less, or take a shorter --system",
            prompt.len()
        );
        // What was typed, and its reply.
        turns.drain(..2);
    }
}
