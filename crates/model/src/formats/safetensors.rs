//! Safetensors files, read by their authors' crate and written in one pass.

use super::stored::Flat;
use super::strand::{Mapped, Strand};
use super::torch_file::StateDict;
use anyhow::{Context, Result};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::Path;

/// A tensor of any type.
pub(super) struct Raw {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Row-major; as many bytes as type and shape say.
    pub(super) data: Strand,
}

impl TryFrom<Raw> for Flat {
    type Error = anyhow::Error;

    fn try_from(raw: Raw) -> Result<Flat> {
        Ok(Flat { dtype: raw.dtype.try_into()?, shape: raw.shape, data: raw.data })
    }
}

/// Maps a file and lists its tensors.
pub(super) fn list(path: &Path) -> Result<Vec<(String, Raw)>> {
    let file = Mapped::open(path)?;
    let (header, metadata) = SafeTensors::read_metadata(file.bytes())
        .with_context(|| format!("{} is not a valid safetensors file", path.display()))?;
    let raw = |(name, info): (String, &TensorInfo)| {
        let (start, end) = info.data_offsets;
        // The data follows the length of the header and the header.
        let data = Strand::of(&file, 8 + header + start..8 + header + end);
        let data = data.with_context(|| format!("{}: tensor {name} is not in the file", path.display()))?;
        Ok((name, Raw { dtype: info.dtype, shape: info.shape.clone(), data }))
    };
    metadata.tensors().into_iter().map(raw).collect()
}

/// Maps a file and lists its tensors, but for those whose names `skip` picks. All are numbers.
pub(super) fn read(path: &Path, skip: &dyn Fn(&str) -> bool) -> Result<StateDict> {
    let mut tensors = StateDict::new();
    for (name, raw) in list(path)? {
        if !skip(&name) {
            let flat = raw.try_into().with_context(|| format!("{}: tensor {name}", path.display()))?;
            tensors.insert(name, flat);
        }
    }
    Ok(tensors)
}

/// Start of a safetensors file whose tensors (name, type, shape) follow in this order: the length of the header and the
/// header, padded so that the data is aligned to 8 bytes.
///
/// # Errors
/// When the sizes overflow.
pub fn safetensors_header(tensors: impl IntoIterator<Item = (String, Dtype, Vec<usize>)>) -> Result<Vec<u8>> {
    let mut end = 0;
    let infos = tensors.into_iter().map(|(name, dtype, shape)| {
        let start = end;
        end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (name, TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    // Hugging Face's loader insists on knowing a framework's layout; ours is PyTorch's.
    let format = HashMap::from([("format".to_string(), "pt".to_string())]);
    let metadata = Metadata::new(Some(format), infos.collect()).context("no valid safetensors header")?;
    let mut json = serde_json::to_vec(&metadata)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}
