//! The state of a run as a checkpoint, and back.

use super::data::{Data, Identity};
use crate::checkpoint::{Checkpoint, RunState, Snapshot};
use crate::collect::Collector;
use crate::config::Resolved;
use crate::loss_scale::{self, LossScale};
use crate::optimizer::Optimizer;
use crate::recovery::{self, Guard};
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
    /// Absent in checkpoints of programs that knew no recovery.
    recovery: Option<recovery::State>,
    /// Of runs in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loss_scale: Option<loss_scale::State>,
}

/// Where a run stands.
pub(super) struct Place<'a> {
    pub(super) step: u64,
    pub(super) resolved: &'a Resolved,
    pub(super) data: &'a Data,
    pub(super) energy: Energy,
    pub(super) guard: &'a Guard,
    pub(super) loss_scale: &'a LossScale,
}

/// What a checkpoint remembers of the loop.
pub(super) struct Remembered {
    /// Energy that the run had used.
    pub(super) energy: Energy,
    pub(super) guard: recovery::State,
    pub(super) loss_scale: Option<loss_scale::State>,
}

impl Remembered {
    /// Where there is no checkpoint yet.
    pub(super) fn at_first() -> Remembered {
        Remembered { energy: Energy::default(), guard: recovery::State::after(0), loss_scale: None }
    }
}

/// A copy of everything that the run needs to go on, and what other programs need to use the model.
pub(super) fn snapshot<D: Device, E: Element>(
    place: Place<'_>,
    device: &D,
    model: &Model<D, E>,
    optimizer: &Optimizer<D>,
    collector: &Collector,
) -> Result<Snapshot> {
    let Place { step, resolved, data, energy, guard, loss_scale } = place;
    let run = RunState {
        step,
        tokens: step * resolved.batch_tokens(),
        rollbacks: guard.rollbacks(),
        early: !step.is_multiple_of(resolved.checkpoint_every) && step != resolved.steps,
        seed: resolved.config.run.seed,
        model: serde_json::to_value(&resolved.model)?,
        config: serde_json::to_value(&resolved.config)?,
        loop_state: serde_json::to_value(LoopState {
            data: data.identity.clone(),
            energy,
            recovery: Some(guard.state().clone()),
            loss_scale: loss_scale.state(),
        })?,
    };
    let config = serde_json::to_vec_pretty(&resolved.model.hugging_face())?;
    let files = vec![("config.json".into(), config), ("tokenizer.json".into(), data.tokenizer_json.clone())];
    Ok(Snapshot { run, groups: optimizer.save(device, model, collector)?, files })
}

/// Puts a checkpoint's state into place, and returns what the loop is to go on from.
///
/// # Errors
/// When the run trained another model or on other data, or a tensor is missing; the message says which.
pub(super) fn load<D: Device, E: Element>(
    checkpoint: &Checkpoint,
    data: &Identity,
    device: &D,
    model: &mut Model<D, E>,
    optimizer: &mut Optimizer<D>,
) -> Result<Remembered> {
    let run = &checkpoint.manifest().run;
    let saved: ferropt_model::Config =
        serde_json::from_value(run.model.clone()).context("its manifest describes no OPT model")?;
    ensure!(&saved == model.config(), "it holds another model: {saved:?}, expected {:?}", model.config());
    let state: LoopState = serde_json::from_value(run.loop_state.clone())
        .context("its manifest does not say where the loop stood")?;
    state.data.check(data)?;
    optimizer.load(device, model, checkpoint)?;
    let guard = state.recovery.unwrap_or_else(|| recovery::State::after(run.step));
    Ok(Remembered { energy: state.energy, guard, loss_scale: state.loss_scale })
}
