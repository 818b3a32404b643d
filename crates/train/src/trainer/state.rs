//! The state of a run as a checkpoint, and back.

use super::data::{Data, Identity};
use crate::checkpoint::{Checkpoint, RunState, Snapshot};
use crate::collect::Collector;
use crate::config::Resolved;
use crate::optimizer::Optimizer;
use crate::telemetry::Energy;
use anyhow::{Context, Result, ensure};
use ferropt_device::{Device, Element};
use ferropt_model::Model;
use serde::{Deserialize, Serialize};

/// What the loop wants back besides tensors and the number of the step.
#[derive(Serialize, Deserialize)]
struct LoopState {
    data: Identity,
    energy: Energy,
}

/// Where a run stands.
pub(super) struct Place<'a> {
    pub(super) step: u64,
    pub(super) resolved: &'a Resolved,
    pub(super) data: &'a Data,
    pub(super) energy: Energy,
}

/// A copy of everything that the run needs to go on, and what other programs need to use the model.
pub(super) fn snapshot<D: Device, E: Element>(
    place: Place<'_>,
    device: &D,
    model: &Model<D, E>,
    optimizer: &Optimizer<D>,
    collector: &Collector,
) -> Result<Snapshot> {
    let Place { step, resolved, data, energy } = place;
    let run = RunState {
        step,
        tokens: step * resolved.batch_tokens(),
        seed: resolved.config.run.seed,
        model: serde_json::to_value(&resolved.model)?,
        config: serde_json::to_value(&resolved.config)?,
        loop_state: serde_json::to_value(LoopState { data: data.identity.clone(), energy })?,
    };
    let config = serde_json::to_vec_pretty(&resolved.model.hugging_face())?;
    let files = vec![("config.json".into(), config), ("tokenizer.json".into(), data.tokenizer_json.clone())];
    Ok(Snapshot { run, groups: optimizer.save(device, model, collector)?, files })
}

/// Puts a checkpoint's state into place, and returns the energy that the run has used.
///
/// # Errors
/// When the run trained another model or on other data, or a tensor is missing; the message says which.
pub(super) fn load<D: Device, E: Element>(
    checkpoint: &Checkpoint,
    data: &Identity,
    device: &D,
    model: &mut Model<D, E>,
    optimizer: &mut Optimizer<D>,
) -> Result<Energy> {
    let run = &checkpoint.manifest().run;
    let saved: ferropt_model::Config =
        serde_json::from_value(run.model.clone()).context("its manifest describes no OPT model")?;
    ensure!(&saved == model.config(), "it holds another model: {saved:?}, expected {:?}", model.config());
    let state: LoopState = serde_json::from_value(run.loop_state.clone())
        .context("its manifest does not say where the loop stood")?;
    state.data.check(data)?;
    optimizer.load(device, model, checkpoint)?;
    Ok(state.energy)
}
