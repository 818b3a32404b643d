//! `ferropt train`: arguments and what is printed.

use anyhow::Context;
use clap::ArgGroup;
use ferropt_device::Which;
use ferropt_mesh::World;
use ferropt_train::config::{Config, Count, Resolved, ScheduleSection};
use ferropt_train::launch::{self, AGAIN, Group, Supervision};
use ferropt_train::planner::grouped;
use ferropt_train::signals::Stop;
use ferropt_train::trainer::{self, Ending, Event, Outcome};
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

/// Arguments of `ferropt train`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("processes").args(["ranks", "supervise"]).multiple(true))]
pub(crate) struct Args {
    /// Configuration file (TOML)
    config: PathBuf,
    /// Override one key, as section.key=value; may be repeated. Nothing after `=` removes the key
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// What computes: cpu, cuda or cuda:N (the N-th GPU); as run.device says unless given
    #[arg(long, value_name = "DEVICE")]
    device: Option<Which>,
    /// Print the resolved configuration, memory by part, FLOPs and the estimated time, then stop; nothing is allocated
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: print the plan as JSON
    #[arg(long, requires = "dry_run")]
    json: bool,
    /// Start so many processes on this machine, and end when one of them fails; with --dry-run, plan for so many,
    /// each with its share of this machine's cores unless run.threads is set
    #[arg(long, value_name = "N")]
    ranks: Option<usize>,
    /// Start again from the last checkpoint when a process is lost, hangs or asks for it
    #[arg(long, conflicts_with = "dry_run")]
    supervise: bool,
    /// With --supervise: starts in a row that may bring the run no further
    #[arg(long, value_name = "N", default_value_t = 10, requires = "supervise")]
    restarts: u32,
    /// With --ranks and --supervise: go on with fewer processes, down to this many, when some cannot be started
    #[arg(long, value_name = "N", requires = "supervise", requires = "ranks")]
    min_ranks: Option<usize>,
    /// With --ranks or --supervise: seconds that processes get to end before they are killed
    #[arg(long, value_name = "SECONDS", default_value_t = 30, requires = "processes")]
    grace: u64,
    /// With --ranks or --supervise: seconds that a process may be stopped before it counts as hanging
    #[arg(long, value_name = "SECONDS", default_value_t = 120, requires = "processes")]
    hang: u64,
}

const EXAMPLES: &str = "\
Examples:
  ferropt train config.toml
  ferropt train config.toml --dry-run
  ferropt train config.toml --dry-run --ranks 64 --set parallel.tensor=8
  ferropt train config.toml --set run.steps=5000 --set optimizer.lr=3e-4
  ferropt train config.toml --set schedule.warmup=\"375M tokens\"
  ferropt train config.toml --ranks 4 --supervise
  ferropt train config.toml --device cuda

Ctrl-C saves a checkpoint and stops; the same command then continues, with the same bits as if never stopped.

Exit status: 0 done, or stopped as you asked; 1 something is wrong; 2 wrong usage; 3 training went wrong again and again;
75 start me again (a process was lost, or SIGTERM came).

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

/// Trains, and returns the exit status.
pub(crate) fn run(mut args: Args) -> anyhow::Result<u8> {
    launch::end_with_launcher()?;
    anyhow::ensure!(args.ranks != Some(0), "--ranks 0 trains nothing; give 1 or more");
    args.set.extend(args.device.map(|device| format!("run.device={device}")));
    let config = Config::load(&args.config, &args.set)?;
    let named = || format!("the configuration {} cannot be used", args.config.display());
    if args.dry_run {
        let (resolved, plan) = trainer::plan(config, args.ranks.unwrap_or(1)).with_context(named)?;
        let short = trainer::short_of_memory(&resolved, &plan);
        let plan = match args.json {
            true => serde_json::to_string_pretty(&plan)?,
            false => format!("{}\n{plan}", resolved.config.to_toml()?),
        };
        crate::until_reader_leaves(writeln!(std::io::stdout(), "{plan}").map_err(Into::into))?;
        // No error: runs are planned on other machines than they are started on.
        for (key, path) in resolved.config.data.missing() {
            tell!("note: {key} is not there, and a run needs it: {}", path.display());
        }
        if let Some(why) = short {
            tell!("note: on this machine a rank would be refused: {why}");
        }
        return Ok(0);
    }
    if args.ranks.is_some() || args.supervise {
        // Refused here, before anything is started. Over MPI only the ranks themselves know how many they are.
        let ranks = match args.ranks {
            Some(ranks) => Some(ranks),
            None => World::foreseen()?.map(|(_, ranks)| ranks),
        };
        if let Some(ranks) = ranks {
            config.clone().resolve_for(ranks).with_context(named)?;
        }
        return launch(&args, &config);
    }
    let stop = Stop::default();
    let (given, mut planned) = (config.schedule.clone(), None);
    let outcome = trainer::train(config, &stop, &mut |event| {
        if let Event::Planned { resolved, plan } = event {
            planned = Some(resolved.clone());
            // A configuration that does not turn into TOML is refused when the run folder is made.
            tell!("{}\n{plan}\n", resolved.config.to_toml().unwrap_or_default());
        }
    })?;
    let (run, step) = (outcome.run.display(), outcome.step);
    // On this rank, or on another that has told this one.
    let again = outcome.ending == Ending::Stopped && (stop.terminated() || !stop.requested());
    let status = if again { AGAIN } else { 0 };
    if outcome.rank > 0 {
        return Ok(status);
    }
    if !outcome.went_on {
        say!("stopped before training went on; the same command continues");
        return Ok(status);
    }
    match outcome.ending {
        Ending::Complete => say!("complete: {step} steps, {} tokens", grouped(outcome.tokens)),
        Ending::AlreadyComplete => {
            let longer =
                planned.map(|resolved| twice_as_long(&given, &resolved, &outcome)).unwrap_or_default();
            say!(
                "{run} has made its {step} steps already. With these settings behind it the same command makes twice as many: \
                 {longer}"
            );
        }
        Ending::Stopped => say!("stopped after step {step}, which is saved; the same command continues"),
        Ending::OutOfTime => {
            say!("run.max_minutes are over after step {step}, which is saved; the same command continues");
        }
    }
    say!("run folder: {run}");
    if let Some(curves) = outcome.curves {
        say!("loss curves: {}", curves.display());
    }
    Ok(status)
}

/// Settings that make a run which is complete twice as long. What follows from the length unless it is `given` stays as it was:
/// the steps so far were made with it.
fn twice_as_long(given: &ScheduleSection, resolved: &Resolved, outcome: &Outcome) -> String {
    let length = match resolved.config.run.tokens {
        Some(_) => format!("run.tokens={}", Count(outcome.tokens.saturating_mul(2))),
        None => format!("run.steps={}", outcome.step.saturating_mul(2)),
    };
    let now = &resolved.config.schedule;
    let derived = [
        ("total", given.total, now.total),
        ("warmup", given.warmup, now.warmup),
        ("decay", given.decay, now.decay),
    ];
    let derived = derived.into_iter().filter(|(_, given, _)| given.is_none());
    let kept = derived
        .filter_map(|(key, _, now)| Some(format!("schedule.{key}={}", now?.steps(resolved.batch_tokens()))));
    std::iter::once(length).chain(kept).map(|set| format!("--set {set}")).collect::<Vec<_>>().join(" ")
}

/// Trains in processes of their own.
fn launch(args: &Args, config: &Config) -> anyhow::Result<u8> {
    if let (Some(ranks), Ok(rank)) = (args.ranks, std::env::var("RANK")) {
        anyhow::bail!(
            "--ranks {ranks} starts all processes of a run, but RANK={rank} says that this is one of them; remove one of \
             the two"
        );
    }
    if let (Some(min), Some(ranks)) = (args.min_ranks, args.ranks) {
        anyhow::ensure!((1..=ranks).contains(&min), "--min-ranks {min} is not between 1 and --ranks {ranks}");
    }
    let overrides = args.set.iter().flat_map(|set| [OsString::from("--set"), set.into()]);
    let run = &config.run;
    let group = Group {
        program: std::env::current_exe().context("cannot find this program, to start it again")?,
        arguments: [OsString::from("train"), args.config.clone().into()]
            .into_iter()
            .chain(overrides)
            .collect(),
        ranks: args.ranks,
        threads: run.threads,
        logs: run.dir.join("logs"),
        grace: Duration::from_secs(args.grace),
        hang: Duration::from_secs(args.hang),
    };
    let stop = Stop::default();
    stop.on_signals_of_a_job()?;
    if !args.supervise {
        let Some(failure) = group.run(&stop)? else { return Ok(0) };
        tell!("{}", group.describe(&failure));
        return Ok(failure.end.status());
    }
    let how = Supervision {
        run: run.dir.clone(),
        restarts: args.restarts,
        min_ranks: args.min_ranks.or(args.ranks).unwrap_or(1),
        backoff: Duration::from_secs(1),
        rank: World::foreseen()?.map(|(rank, _)| rank),
        fits: Box::new(|ranks| config.clone().resolve_for(ranks).is_ok()),
    };
    launch::supervise(group, &how, &stop, &mut |line| tell!("supervisor: {line}"))
}
