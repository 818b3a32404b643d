//! Parameters in memory and tensors in checkpoints: one for one, but for q, k and v, which are one parameter here
//! (their rows stacked) and three tensors there.

use crate::checkpoint::{Checkpoint, Data, Tensor};
use anyhow::{Result, ensure};
use ferropt_model::Parameter;
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

/// The values of a parameter out of a group of a checkpoint, as f32.
///
/// # Errors
/// Names the tensor that is missing or has another shape.
pub fn read<'a>(checkpoint: &'a Checkpoint, group: &str, parameter: &Parameter) -> Result<Cow<'a, [f32]>> {
    let part = |name: &String| -> Result<Cow<'a, [f32]>> {
        let view = checkpoint.tensor(group, name)?;
        ensure!(
            view.shape == parameter.part_shape(),
            "tensor {name} of group {group} in checkpoint {} has shape {:?}, but this model has {:?} there: it is of \
             another model",
            checkpoint.path().display(),
            view.shape,
            parameter.part_shape()
        );
        Ok(view.to_f32())
    };
    if let [name] = &parameter.names[..] {
        return part(name);
    }
    let mut values = Vec::with_capacity(parameter.elements());
    for name in &parameter.names {
        values.extend_from_slice(&part(name)?);
    }
    Ok(Cow::Owned(values))
}
