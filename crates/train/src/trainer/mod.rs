//! The training loop, from a configuration to a finished (or saved) run.
//!
//! [`train`] is the whole of `ferropt train`: it resolves the configuration, plans, opens the data, resumes or begins,
//! and runs. What it computes is a function of the configuration and of the state in a checkpoint: data order,
//! dropout and rounding follow from the number of the step. So a run that was killed and resumed has the same bits as
//! one that was not.

mod alike;
mod compatible;
mod containers;
mod cores;
mod data;
mod folder;
mod history;
mod recover;
mod room;
mod run;
mod state;
mod used;
mod watch;

use crate::checkpoint::Store;
use crate::config::{Config, Precision, Resolved};
use crate::launch;
use crate::planner::Plan;
use crate::signals::Stop;
use crate::telemetry::{Training, Validation};
use anyhow::{Context, Result};
use data::Data;
use ferropt_device::{Chip, Which, bf16, f16};
use ferropt_mesh::{Join, Label, Mesh, World};
use run::Trainer;
pub(crate) use run::view;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Something that happened in a run, for programs that watch it; people are told on standard error anyway.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// The configuration is resolved and what it will take is known; nothing is allocated yet.
    Planned {
        /// What will be done.
        resolved: &'a Resolved,
        /// What it will take.
        plan: &'a Plan,
    },
    /// A step was done.
    Training(&'a Training),
    /// A held-out set was scored.
    Validation(&'a Validation),
}

/// Receives the events of a run.
pub type Hook<'h> = &'h mut dyn FnMut(Event<'_>);

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It made all its steps.
    Complete,
    /// It had made all its steps before.
    AlreadyComplete,
    /// Somebody asked it to stop; the same command continues.
    Stopped,
    /// `run.max_minutes` are over; the same command continues.
    OutOfTime,
}

/// How a run ended. Everything is saved.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Why.
    pub ending: Ending,
    /// Whether training went on, and was not stopped before.
    pub went_on: bool,
    /// Optimiser steps done.
    pub step: u64,
    /// Training tokens consumed.
    pub tokens: u64,
    /// The run folder.
    pub run: PathBuf,
    /// Picture of the loss curves; none if training did not go on, or it could not be drawn, nor on ranks other than the first.
    pub curves: Option<PathBuf>,
    /// Which of the run's ranks this is. The first one tells people.
    pub rank: usize,
}

/// Trains as `config` says, or continues where the run in `run.dir` was left. `stop` ends it after the current step;
/// SIGINT, SIGTERM and SIGHUP request that too from here on. Where this process was started as one of many
/// ([`World::join`]), it does its part.
///
/// # Errors
/// Whatever is wrong with the configuration, the data or the run folder, before any work starts;
/// [`GaveUp`](crate::recovery::GaveUp) when training goes wrong again and again; a last checkpoint that cannot be
/// written; a rank that is lost. What was saved stays good in all cases.
pub fn train(config: Config, stop: &Stop, hook: Hook<'_>) -> Result<Outcome> {
    // Before ranks meet, which may take minutes.
    stop.on_signals_of_a_job()?;
    let foreseen = World::foreseen()?;
    if let Some((_, ranks)) = foreseen {
        config.clone().resolve_for(ranks)?;
    }
    let time = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    let (timeout, patience) = (time(config.parallel.timeout), time(config.parallel.patience));
    let asked = stop.clone();
    match World::join_unless(move || asked.requested(), Join { timeout, patience, ..Join::default() })? {
        Some(world) => train_in(world, config, stop, hook),
        None => {
            let (rank, ranks) = foreseen.context("ranks that meet over MPI were stopped")?;
            Ok(stopped_early(&config.resolve_for(ranks)?, rank))
        }
    }
}

/// [`train`], as one of the ranks of `world`. The hook hears of what happens on the first.
///
/// # Errors
/// As there.
pub fn train_in(world: World, config: Config, stop: &Stop, hook: Hook<'_>) -> Result<Outcome> {
    let outcome = train_on(world.clone(), config, stop, hook);
    if let Err(error) = &outcome {
        // The others wait for this rank; they are to know why in vain.
        world.abandon(&format!("{error:#}"), launch::status(error));
    }
    outcome
}

fn train_on(world: World, config: Config, stop: &Stop, hook: Hook<'_>) -> Result<Outcome> {
    let resolved = config.resolve_for(world.size())?;
    let mesh = Mesh::new(world, resolved.axes)?;
    alike::configured(&mesh.all, &resolved)?;
    let threads = cores::threads(&mesh.all, resolved.config.run.threads)?;
    let device = Chip::open(cores::device(&mesh.all, resolved.device)?, threads, mesh.all.size() == 1)?;
    let (mesh, links) = mesh.linked(&device)?;
    let plan = Plan::new(&resolved, mesh.all.rank(), &device);
    if mesh.all.rank() == 0 {
        hook(Event::Planned { resolved: &resolved, plan: &plan });
    }
    room::check(&mesh.all, &resolved, &plan)?;
    stop.on_signals_of_a_job()?;
    let Some(data) = open_data(&mesh, &resolved, stop)? else {
        return Ok(stopped_early(&resolved, mesh.world.rank()));
    };
    alike::fed(&mesh.all, &data)?;
    match resolved.config.run.precision {
        Precision::F32 => Trainer::<_, f32>::new(device, mesh, links, resolved, data, &plan, hook)?.run(stop),
        Precision::Bf16 => {
            Trainer::<_, bf16>::new(device, mesh, links, resolved, data, &plan, hook)?.run(stop)
        }
        Precision::F16 => Trainer::<_, f16>::new(device, mesh, links, resolved, data, &plan, hook)?.run(stop),
    }
}

/// Opens the data, on the first rank first: what was not tokenised yet is tokenised once, if all see the same disk.
fn open_data(mesh: &Mesh, resolved: &Resolved, stop: &Stop) -> Result<Option<Data>> {
    let first = mesh.world.rank() == 0;
    let data = if first { Data::open(resolved, stop)? } else { None };
    let stopped = [u8::from(first && data.is_none())];
    let stopped = mesh.all.gather_bytes_whenever(Label::new("data"), &stopped)?;
    match (first, stopped.concat().contains(&1)) {
        (true, _) => Ok(data),
        (false, true) => Ok(None),
        // What is tokenised is opened in no time, or by a stop of all ranks together later.
        (false, false) => Data::open(resolved, &Stop::default()),
    }
}

/// The outcome of a run that was stopped before it could do anything; it stands where an earlier start left it.
fn stopped_early(resolved: &Resolved, rank: usize) -> Outcome {
    let run = resolved.config.run.dir.clone();
    let last = Store::open(&run).and_then(|store| store.list()).ok().and_then(|mut list| list.pop());
    let step = last.map_or(0, |entry| entry.step);
    let tokens = step * resolved.batch_tokens();
    Outcome { ending: Ending::Stopped, went_on: false, step, tokens, run, curves: None, rank }
}

/// What `config` would take on so many ranks, without allocating anything. Each has its share of this machine's cores, unless
/// `run.threads` says how many.
///
/// # Errors
/// Those of [`Config::resolve_for`] and [`open_device`].
pub fn plan(config: Config, ranks: usize) -> Result<(Resolved, Plan)> {
    let resolved = config.resolve_for(ranks)?;
    let share = (ranks > 1).then(|| cores::among(ranks));
    let device = open_device(resolved.device, resolved.config.run.threads.or(share))?;
    let plan = Plan::new(&resolved, 0, &device);
    Ok((resolved, plan))
}

/// Why this machine's memory, as it is used now, is too little for one rank of such a run; none where it is not.
pub fn short_of_memory(resolved: &Resolved, plan: &Plan) -> Option<String> {
    room::short_of(resolved, plan)
}

/// The device to work on alone, with so many threads of the processor.
///
/// # Errors
/// Those of [`Chip::open`].
pub fn open_device(which: Which, threads: Option<usize>) -> Result<Chip> {
    Chip::open(which, threads, true)
}

/// Writes a small file beside its place, then renames it, so that readers find the old or the new one.
pub(crate) fn write_whole(path: &Path, text: &str) -> Result<()> {
    let temporary = path.with_extension("tmp");
    let written = std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        // What of it was written takes room on what may be a full disk.
        let _ = std::fs::remove_file(&temporary);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}
