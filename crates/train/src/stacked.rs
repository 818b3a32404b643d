//! Parameters in memory and tensors in checkpoints: one for one, but for q, k and v, which are one parameter here
//! (their rows stacked) and three tensors there.

use crate::checkpoint::{Checkpoint, Data, Tensor};
use anyhow::{Result, ensure};
use ferropt_model::{Held, Parameter};
use std::borrow::Cow;

/// The tensors that hold a parameter's values.
pub(crate) fn tensors(parameter: &Parameter, data: Data) -> Vec<Tensor> {
    let shape = parameter.part_shape();
    let parts = match (parameter.names.len(), data) {
        (1, data) => vec![data],
        (parts, Data::F32(values)) => {
            values.chunks(values.len() / parts).map(|v| Data::F32(v.to_vec())).collect()
        }
        (parts, Data::Bf16(values)) => {
            values.chunks(values.len() / parts).map(|v| Data::Bf16(v.to_vec())).collect()
        }
    };
    let tensor = |(name, data): (&String, Data)| Tensor { name: name.clone(), shape: shape.clone(), data };
    parameter.names.iter().zip(parts).map(tensor).collect()
}

/// The values that are held of a parameter, out of a group of a checkpoint, as f32. Of a part, only its own bytes are read;
/// what a shard has to spare is 0.
///
/// # Errors
/// Names the tensor that is missing or has another shape.
pub fn read<'a>(checkpoint: &'a Checkpoint, group: &str, held: &Held) -> Result<Cow<'a, [f32]>> {
    let parameter = &held.parameter;
    let mut parts = Vec::new();
    for name in &parameter.names {
        let view = checkpoint.tensor(group, name)?;
        ensure!(
            view.shape == parameter.part_shape(),
            "tensor {name} of group {group} in checkpoint {} has shape {:?}, but this model has {:?} there: it is of \
             another model",
            checkpoint.path().display(),
            view.shape,
            parameter.part_shape()
        );
        parts.push(view);
    }
    if let ([view], true) = (&parts[..], held.shard_len == parameter.elements()) {
        return Ok(view.to_f32());
    }
    let mut values = vec![0.0; held.shard_len];
    let size = parameter.elements() / parts.len();
    for (at, start, len) in held.pieces() {
        // A piece may go on in the next of the stacked tensors.
        let (mut at, mut start, end) = (at, start, start + len);
        while start < end {
            let (part, within) = (start / size, start % size);
            let count = (end - start).min(size - within);
            values[at..at + count].copy_from_slice(&parts[part].elements(within..within + count));
            (at, start) = (at + count, start + count);
        }
    }
    Ok(Cow::Owned(values))
}
