//! `ferropt quickstart`: a trained model from text that is already here.

use anyhow::Context;
use ferropt_train::quickstart::{self, Options};
use ferropt_train::signals::Stop;
use ferropt_train::trainer::Ending;
use std::path::{Path, PathBuf};

/// The crates whose documentation is the text unless the user gives another.
const LOCK: &str = include_str!("../../../Cargo.lock");

/// Arguments of `ferropt quickstart`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, args_override_self = true)]
pub(crate) struct Args {
    /// Folder for everything that it makes; the same folder again resumes
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    dir: PathBuf,
    /// Train on this file or folder (.txt, .jsonl, also .gz, .xz, .zst); may be repeated. Without it, on the
    /// documentation of the crates that Ferropt is built from
    #[arg(long, value_name = "PATH", action = clap::ArgAction::Append)]
    text: Vec<PathBuf>,
    /// Field of JSON lines that holds the text
    #[arg(long, value_name = "NAME", default_value = "text", requires = "text")]
    text_field: String,
    /// How long it should take; the number of steps follows from the measured speed
    #[arg(long, value_name = "N", default_value_t = 4.0, allow_negative_numbers = true)]
    minutes: f64,
    /// Take the crates that this Cargo.lock pins
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    lock: Option<PathBuf>,
    /// Threads; all available unless given
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Seed of everything random
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

const EXAMPLES: &str = "\
Examples:
  ferropt quickstart
  ferropt quickstart --minutes 1 --dir runs/short
  ferropt quickstart --text books/ --text notes.txt --dir runs/mine

Ctrl-C saves and stops; the same command goes on.";

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let lock = match &args.lock {
        Some(file) => {
            std::fs::read_to_string(file).with_context(|| format!("cannot read --lock {}", file.display()))?
        }
        None => LOCK.into(),
    };
    let options = Options {
        dir: args.dir,
        texts: args.text,
        text_field: args.text_field,
        lock,
        minutes: args.minutes,
        threads: args.threads,
        seed: args.seed,
    };
    let outcome = quickstart::run(&options, &Stop::default(), &mut |line| tell!("{line}"))?;
    say!("\n{}", outcome.report);
    say!("Files: {0}/report.md, {0}/loss.svg, {0}/metrics.jsonl\n", options.dir.display());
    match outcome.ending {
        Ending::Complete => {}
        Ending::AlreadyComplete => {
            say!("This quick start was complete already; another --dir begins a new one.\n")
        }
        Ending::Stopped => say!("Stopped early; the same command goes on.\n"),
        Ending::OutOfTime => say!("The time was over before the last step; the same command goes on.\n"),
    }
    print_next(&options.dir, &outcome.config, outcome.report.sizes.steps, &outcome.report.prompt);
    Ok(())
}

/// Three commands to try.
fn print_next(dir: &Path, config: &Path, steps: u64, prompt: &str) {
    let (program, dir, config) =
        (program(), quoted(&dir.display().to_string()), quoted(&config.display().to_string()));
    say!("Try next:");
    say!("  {program} generate --model {dir} {}", quoted(prompt));
    say!("  {program} train {config} --set run.steps={}    # twice as long", 2 * steps);
    say!("  {program} quickstart --dir runs/mine --text PATH    # on your own text");
}

/// How this program was called, without the folder that the user is in.
fn program() -> String {
    let called = std::env::args().next().unwrap_or_else(|| "ferropt".into());
    let here = std::env::current_dir().unwrap_or_default();
    let short =
        Path::new(&called).strip_prefix(here).map_or(called.clone(), |path| path.display().to_string());
    quoted(&short)
}

/// As a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=+:".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_reach_the_shell_as_they_are() {
        assert_eq!(quoted("runs/quick-start.1"), "runs/quick-start.1");
        assert_eq!(quoted("Returns the"), "'Returns the'");
        assert_eq!(quoted("don't"), r"'don'\''t'");
        assert_eq!(quoted(""), "''");
    }
}
