//! `ferropt train`: arguments and what is printed.

use anyhow::Context;
use ferropt_train::config::Config;
use ferropt_train::planner::grouped;
use ferropt_train::signals::Stop;
use ferropt_train::trainer::{self, Ending, Event};
use std::path::PathBuf;

/// Arguments of `ferropt train`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Configuration file (TOML)
    config: PathBuf,
    /// Override one key, as section.key=value; may be repeated. Nothing after `=` removes the key
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the resolved configuration, memory by part, FLOPs and the estimated time, then stop; nothing is allocated
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: print the plan as JSON
    #[arg(long, requires = "dry_run")]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  ferropt train config.toml
  ferropt train config.toml --dry-run
  ferropt train config.toml --set run.steps=5000 --set optimizer.lr=3e-4
  ferropt train config.toml --set schedule.warmup=\"375M tokens\"

Ctrl-C saves a checkpoint and stops; the same command then continues, with the same bits as if never stopped.

The smallest configuration:
  [model]
  preset = \"125m\"
  [data]
  train = \"texts\"                      # a folder or files: .txt, .jsonl, also .gz, .xz, .zst
  tokenizer = \"tokenizer.json\"
  validation.held-out = \"valid.txt\"
  [run]
  dir = \"runs/first\"
  tokens = \"1B\"";

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let config = Config::load(&args.config, &args.set)?;
    let named = || format!("the configuration {} cannot be used", args.config.display());
    if args.dry_run {
        let (resolved, plan) = trainer::plan(config).with_context(named)?;
        if args.json {
            println!("{}", serde_json::to_string_pretty(&plan)?);
        } else {
            println!("{}\n{plan}", resolved.config.to_toml()?);
        }
        return Ok(());
    }
    let outcome = trainer::train(config, &Stop::default(), &mut |event| {
        if let Event::Planned { resolved, plan } = event {
            // A configuration that does not turn into TOML is refused when the run folder is made.
            eprintln!("{}\n{plan}\n", resolved.config.to_toml().unwrap_or_default());
        }
    })?;
    let (run, step) = (outcome.run.display(), outcome.step);
    let Some(curves) = outcome.curves else {
        println!("stopped while the data was being read; the same command continues");
        return Ok(());
    };
    match outcome.ending {
        Ending::Complete => println!("complete: {step} steps, {} tokens", grouped(outcome.tokens)),
        Ending::AlreadyComplete => {
            println!("{run} has made its {step} steps already; raise run.steps to go on")
        }
        Ending::Stopped => println!("stopped after step {step}, which is saved; the same command continues"),
        Ending::OutOfTime => {
            println!(
                "run.max_minutes are over after step {step}, which is saved; the same command continues"
            );
        }
    }
    println!("run folder: {run}\nloss curves: {}", curves.display());
    Ok(())
}
