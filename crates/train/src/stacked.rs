//! Parameters in memory and tensors in checkpoints: one for one, but for q, k and v, which are one parameter here
//! (their rows stacked) and three tensors there.

use crate::checkpoint::{Checkpoint, Data, Tensor, TensorView};
use anyhow::{Result, ensure};
use ferropt_model::Parameter;
use std::borrow::Cow;
use std::ops::Range;

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
    let part = |name: &String| Ok(part_view(checkpoint, group, parameter, name)?.to_f32());
    if let [name] = &parameter.names[..] {
        return part(name);
    }
    let mut values = Vec::with_capacity(parameter.elements());
    for name in &parameter.names {
        values.extend_from_slice(&part(name)?);
    }
    Ok(Cow::Owned(values))
}

/// One of the tensors that hold a parameter.
fn part_view<'a>(
    checkpoint: &'a Checkpoint,
    group: &str,
    parameter: &Parameter,
    name: &str,
) -> Result<TensorView<'a>> {
    let view = checkpoint.tensor(group, name)?;
    ensure!(
        view.shape == parameter.part_shape(),
        "tensor {name} of group {group} in checkpoint {} has shape {:?}, but this model has {:?} there: it is of \
         another model",
        checkpoint.path().display(),
        view.shape,
        parameter.part_shape()
    );
    Ok(view)
}

/// Rows of a parameter out of a group of a checkpoint, as f32; a vector's rows are its elements.
///
/// # Errors
/// As [`read`], and when there are no such rows.
pub fn read_rows(
    checkpoint: &Checkpoint,
    group: &str,
    parameter: &Parameter,
    rows: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    let shape = parameter.part_shape();
    let width: usize = shape[1..].iter().product();
    ensure!(
        rows.end <= parameter.shape[0] && out.len() == rows.len() * width,
        "rows {rows:?} of {} were asked for, which has shape {:?}",
        parameter.names.join(", "),
        parameter.shape
    );
    let mut row = rows.start;
    while row < rows.end {
        let (part, first) = (row / shape[0], row % shape[0]);
        let count = (shape[0] - first).min(rows.end - row);
        let view = part_view(checkpoint, group, parameter, &parameter.names[part])?;
        let size = view.bytes.len() / shape[0];
        let bytes = &view.bytes[first * size..(first + count) * size];
        let at = (row - rows.start) * width;
        out[at..at + count * width].copy_from_slice(&TensorView { bytes, ..view }.to_f32());
        row += count;
    }
    Ok(())
}
