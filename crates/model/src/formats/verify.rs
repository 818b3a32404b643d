//! Reads every value of a model, alone or beside another's.

use super::source::{Format, Source};
use super::tensor::Tensor;
use super::torch_file::TorchFile;
use crate::config::Config;
use anyhow::{Context, Result, ensure};

/// A tensor that is not the same in two models.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Its Hugging Face name.
    pub tensor: String,
    /// Elements that differ.
    pub elements: u64,
    /// All elements.
    pub of: u64,
    /// Largest difference among finite values.
    pub largest: f32,
}

/// Values of both tensors that are compared at a time, in rows.
fn rows_at_a_time(a: Tensor<'_>, b: Tensor<'_>) -> usize {
    a.chunk_rows().min(b.chunk_rows()).min(a.rows()).max(1)
}

/// Checks all that can be wrong with an open model: values that are not finite, files whose checksums do not match, and
/// copies in tensor-parallel parts that differ. Returns one sentence for each finding. `progress` is told the bytes
/// read so far, and all.
///
/// # Errors
/// When a file cannot be read.
pub fn verify(source: &Source, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<String>> {
    let mut findings = Vec::new();
    let total = source.bytes();
    let mut done = 0;
    for (name, tensor) in source.tensors() {
        let columns = tensor.columns();
        let step = rows_at_a_time(tensor, tensor);
        let mut values = vec![0.0; step * columns];
        let (mut wrong, mut first) = (0u64, None);
        for start in (0..tensor.rows()).step_by(step) {
            let values = &mut values[..step.min(tensor.rows() - start) * columns];
            tensor.read_rows(start, values)?;
            for (i, value) in values.iter().enumerate().filter(|(_, v)| !v.is_finite()) {
                wrong += 1;
                first.get_or_insert((start + i / columns, i % columns, *value));
            }
            let rows = (values.len() / columns) as u64;
            progress(done + tensor.bytes() * (start as u64 + rows) / tensor.rows() as u64, total);
        }
        done += tensor.bytes();
        if let Some((row, column, value)) = first {
            findings.push(format!(
                "{}: tensor {name} has {wrong} values that are not finite, the first is {value} at row {row}, column \
                 {column}",
                tensor.file()
            ));
        }
    }
    for (name, part, copy) in &source.replicas {
        let difference = difference(name, Tensor::Plain(source.tensor(name)?), Tensor::Plain(copy))?;
        if let Some(Difference { elements, of, largest, .. }) = difference {
            findings.push(format!(
                "{}: tensor {name} of part {part} differs from that of part 0 in {elements} of {of} values, by {largest} \
                 at most; part 0 is used",
                copy.file()
            ));
        }
    }
    if let Some(quantisation) = source.quantisation() {
        findings.extend(quantisation.damage(source.files())?);
    } else if source.format() != Format::Safetensors {
        for file in source.files() {
            findings.extend(TorchFile::damage(file)?);
        }
    }
    Ok(findings)
}

/// Compares two models value by value; an empty list means the same bits. Types may differ, and then the values count.
///
/// # Errors
/// When their sizes differ, or a file cannot be read.
pub fn compare(a: &Source, b: &Source, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<Difference>> {
    // Dropout is no property of the weights.
    let sizes = |config: &Config| Config { dropout: 0.0, attention_dropout: 0.0, ..config.clone() };
    ensure!(
        sizes(a.config()) == sizes(b.config()),
        "these are models of different sizes: {} has {:?}, {} has {:?}",
        a.path().display(),
        a.config(),
        b.path().display(),
        b.config()
    );
    let mut differences = Vec::new();
    let total = a.bytes();
    let mut done = 0;
    for (name, tensor) in a.tensors() {
        let other = b.find(&name).with_context(|| format!("{} has no tensor {name}", b.path().display()))?;
        differences.extend(difference(&name, tensor, other)?);
        done += tensor.bytes();
        progress(done, total);
    }
    Ok(differences)
}

/// How two tensors of the same shape differ, if they do.
fn difference(name: &str, a: Tensor<'_>, b: Tensor<'_>) -> Result<Option<Difference>> {
    let columns = a.columns();
    let step = rows_at_a_time(a, b);
    let mut buffers = [vec![0.0; step * columns], vec![0.0; step * columns]];
    let (mut elements, mut largest) = (0, 0f32);
    for start in (0..a.rows()).step_by(step) {
        let count = step.min(a.rows() - start) * columns;
        let [x, y] = &mut buffers;
        let (x, y) = (&mut x[..count], &mut y[..count]);
        a.read_rows(start, x)?;
        b.read_rows(start, y)?;
        for (x, y) in x.iter().zip(y.iter()).filter(|(x, y)| x.to_bits() != y.to_bits()) {
            elements += 1;
            // max passes over NaN.
            largest = largest.max((x - y).abs());
        }
    }
    let of = (a.rows() * columns) as u64;
    Ok((elements > 0).then(|| Difference { tensor: name.into(), elements, of, largest }))
}
