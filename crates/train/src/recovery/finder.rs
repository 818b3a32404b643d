//! The NaN finder: which tensor is the first that is not finite.

use crate::trainer::view;
use anyhow::Result;
use ferropt_data::Batch;
use ferropt_device::{Buffer, Device, Element};
use ferropt_model::{Backprop, Held, Model, Pass, Role, Tensor, Values, Written};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Where the first number that is not finite was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Rank that found it.
    pub rank: usize,
    /// When it was computed: in which micro-batch of the rank's, from 1 on, in which stage on the way through a pipeline and back,
    /// as which tensor there. Weights are before all. Of what several ranks find, the first is the cause.
    pub order: [usize; 3],
    /// What kind of tensor.
    pub place: Place,
    /// Layer, where the tensor belongs to one.
    pub layer: Option<usize>,
    /// Name of the activation, or of the weight.
    pub tensor: String,
    /// Row in it: of an activation, in the micro-batch.
    pub row: usize,
    /// Column in it; of an activation of which a rank has some columns, in those.
    pub column: usize,
    /// The value: `NaN`, `inf` or `-inf`.
    pub value: String,
    /// Micro-batch of the step; none for a weight, which was not finite before.
    pub micro_batch: Option<usize>,
    /// Sequence of the micro-batch and position in it, where a row is a token.
    pub token: Option<(usize, usize)>,
}

/// Kinds of tensors in which numbers go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// A weight, before the step.
    Weight,
    /// Something computed on the way forward.
    Forward,
    /// Gradient of an activation.
    Backward,
    /// Gradient of a weight.
    WeightGradient,
}

impl fmt::Display for Finding {
    /// "layer 7, relu, row 113 of micro-batch 2 (sequence 1, position 49): NaN on the way forward, on rank 0".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layer {layer}, ")?;
        }
        write!(f, "{}, row {}", self.tensor, self.row)?;
        if let Some(micro_batch) = self.micro_batch {
            write!(f, " of micro-batch {micro_batch}")?;
        }
        if let Some((sequence, position)) = self.token {
            write!(f, " (sequence {sequence}, position {position})")?;
        }
        let place = match self.place {
            Place::Weight => "in the weights, before this step",
            Place::Forward => "on the way forward",
            Place::Backward => "in the gradient of the activation",
            Place::WeightGradient => "in the gradient of the weight",
        };
        write!(f, ": {} {place}, on rank {}", self.value, self.rank)
    }
}

/// Makes the passes of a step once more, with the same masks, and looks at every tensor of stage `stage` of `stages`. `load` fills
/// the micro-batch of a number below `micro_batches`, and says the keys of its masks. Gradients of the step are overwritten.
///
/// `None` if each micro-batch is finite by itself; then only their sum is not. All passes are made whatever is found, so that
/// ranks that share a model stay together.
///
/// # Errors
/// Those of `load`, and of a pass.
pub fn find<D: Device, E: Element>(
    device: &D,
    model: &Model<D, E>,
    backprop: &mut Backprop<D, E>,
    (micro_batches, seq, scale): (usize, usize, f32),
    (stage, stages): (usize, usize),
    mut load: impl FnMut(usize, &mut Batch) -> Result<Pass>,
) -> Result<Option<Finding>> {
    let mut found = in_weights(device, model);
    let mut count = 0;
    let mut batch = Batch::default();
    for micro_batch in 0..micro_batches {
        let pass = load(micro_batch, &mut batch)?;
        let mut look = |written: Written<'_, D, E>| {
            count += 1;
            if found.is_none() {
                let way = if written.role == Role::Activation { stage } else { 2 * stages - 1 - stage };
                let order = [micro_batch + 1, way, count];
                found = in_tensor(device, &written, model.held(), micro_batch, seq)
                    .map(|found| Finding { order, ..found });
            }
        };
        backprop.inspect(device, model, view(&batch), pass, scale, &mut look)?;
    }
    Ok(found)
}

fn in_weights<D: Device, E: Element>(device: &D, model: &Model<D, E>) -> Option<Finding> {
    let weights = model.weights.tensors();
    weights.iter().zip(model.held()).find_map(|(weight, held)| {
        let (place, value) = match weight {
            Tensor::Matrix(buffer) => first(device, *buffer)?,
            Tensor::Vector(buffer) => first(device, *buffer)?,
        };
        let (tensor, row, column) = in_parameter(held, held.pieces(), place)?;
        Some(Finding {
            rank: 0,
            order: [0; 3],
            place: Place::Weight,
            layer: None,
            tensor,
            row,
            column,
            value: value.to_string(),
            micro_batch: None,
            token: None,
        })
    })
}

/// The names of a parameter, and row and column in it of what is at `place` in the `pieces` that are here.
fn in_parameter(
    held: &Held,
    mut pieces: impl Iterator<Item = (usize, usize, usize)>,
    place: usize,
) -> Option<(String, usize, usize)> {
    let place =
        pieces.find_map(|(at, start, len)| Some(start + place.checked_sub(at).filter(|n| *n < len)?))?;
    let parameter = &held.parameter;
    let width = if parameter.is_matrix() { parameter.shape[1] } else { 1 };
    Some((parameter.names.join(", "), place / width, place % width))
}

fn in_tensor<D: Device, E: Element>(
    device: &D,
    written: &Written<'_, D, E>,
    held: &[Held],
    micro_batch: usize,
    seq: usize,
) -> Option<Finding> {
    let (place, value) = match written.values {
        Values::Compute(buffer) => first(device, buffer)?,
        Values::F32(buffer) => first(device, buffer)?,
    };
    let (tensor, row, column) = match written.parameter(held) {
        Some(held) => in_parameter(held, held.part_pieces(), place)?,
        None => (written.name.into(), written.first_row + place / written.width, place % written.width),
    };
    let token = (written.role != Role::WeightGradient).then_some((row / seq, row % seq));
    let place = match written.role {
        Role::Activation => Place::Forward,
        Role::Gradient => Place::Backward,
        Role::WeightGradient => Place::WeightGradient,
    };
    let (layer, value) = (written.layer, value.to_string());
    let micro_batch = Some(micro_batch);
    Some(Finding { rank: 0, order: [0; 3], place, layer, tensor, row, column, value, micro_batch, token })
}

/// The first element that is not finite.
fn first<D: Device, T: Element>(device: &D, buffer: &D::Buf<T>) -> Option<(usize, f32)> {
    let mut values = vec![T::default(); buffer.len()];
    device.download(buffer, 0, &mut values);
    let mut values = values.into_iter().map(T::to_f32).enumerate();
    values.find(|(_, value)| !value.is_finite())
}
