//! Trains OPT language models, generates from them and serves them. One file per subcommand: arguments and printing, no logic.

// These end the program with a panic where nobody reads any more.
#![deny(clippy::print_stdout, clippy::print_stderr)]

/// Prints a line, if somebody still reads: `println!` ends the program with a panic where a reader such as `head` has left.
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($line)*);
    }};
}

/// The same for what people are told beside the output, on standard error.
macro_rules! tell {
    ($($line:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), $($line)*);
    }};
}

mod bench;
mod cache;
mod chat;
mod checkpoint;
mod generate;
mod info;
mod model;
mod notify;
mod presets;
mod quickstart;
mod score;
mod serve;
mod train;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use std::sync::Arc;

/// Trains OPT language models, generates from them and serves them.
#[derive(Parser)]
#[command(name = "ferropt", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  ferropt quickstart                            train a small OPT on text that is already here, in minutes
  ferropt train config.toml                     train; the same command resumes
  ferropt train config.toml --dry-run           memory, FLOPs and time, without starting
  ferropt generate --model runs/a \"Once upon\"   continue a text with a trained model
  ferropt chat --model runs/a                   talk with it
  ferropt score --model runs/a texts.txt        how likely it finds texts
  ferropt serve --model runs/a                  an API for OpenAI's clients on http://127.0.0.1:8000
  ferropt checkpoint convert runs/a out --to hf the trained model as a Hugging Face folder

`ferropt COMMAND --help` shows more examples.";

#[derive(Subcommand)]
enum Command {
    /// Train a small model on text that is already here, in minutes, and report.
    Quickstart(quickstart::Args),
    /// Train a model as a configuration file says; run again to resume.
    Train(train::Args),
    /// Continue a text with a trained model.
    Generate(generate::Args),
    /// Talk with a trained model.
    Chat(chat::Args),
    /// Tell how likely a trained model finds texts.
    Score(score::Args),
    /// Serve models over HTTP, as OpenAI and metaseq do.
    Serve(serve::Args),
    /// Look into, convert, quantise and verify weights in any format.
    Checkpoint(checkpoint::Args),
    /// List the models that can be named, with exact parameter counts.
    Presets(presets::Args),
    /// Measure how fast this machine trains and generates, and where the time goes.
    Bench(bench::Args),
    /// Show what this machine can do: processor, threads, measured peak.
    Info(info::Args),
}

fn main() -> ExitCode {
    limits_are_errors();
    let command = Cli::parse().command;
    ferropt_device::failures(|| run(command)).unwrap_or_else(|error| {
        report(&error);
        ExitCode::from(ferropt_train::launch::status(&error))
    })
}

/// A write beyond the limit of a file's size (`ulimit -f`) fails like one to a full disk, and does not end the program: what
/// is interrupted by a signal that somebody takes note of goes on.
fn limits_are_errors() {
    #[cfg(unix)]
    if let Err(error) = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default()) {
        tell!("warning: the limit of a file's size will end the program where it is met: {error}");
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Quickstart(args) => quickstart::run(args),
        Command::Train(args) => return train::run(args).map(ExitCode::from),
        Command::Generate(args) => until_reader_leaves(generate::run(args)),
        Command::Chat(args) => chat::run(args),
        Command::Score(args) => until_reader_leaves(score::run(args)),
        Command::Serve(args) => serve::run(args),
        Command::Checkpoint(args) => until_reader_leaves(checkpoint::run(args)),
        Command::Presets(args) => until_reader_leaves(presets::run(args)),
        Command::Bench(args) => until_reader_leaves(bench::run(args)),
        Command::Info(args) => until_reader_leaves(info::run(args)),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// No error if whoever reads the output has seen enough, as `head` does.
fn until_reader_leaves(result: anyhow::Result<()>) -> anyhow::Result<()> {
    let io = |error: &anyhow::Error| error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    match result {
        Err(error) if io(&error) == Some(std::io::ErrorKind::BrokenPipe) => Ok(()),
        result => result,
    }
}

/// Prints an error and its causes, one a line. A backtrace would not help the user.
fn report(error: &anyhow::Error) {
    tell!("error: {error}");
    for cause in error.chain().skip(1) {
        for line in cause.to_string().lines() {
            tell!("  {line}");
        }
    }
}
