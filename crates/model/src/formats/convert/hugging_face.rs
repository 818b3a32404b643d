//! Hugging Face folders.

use super::super::hugging_face::CONFIG;
use super::super::pickle::write::Item;
use super::super::safetensors::safetensors_header;
use super::super::source::Source;
use super::outgoing::{Block, Outgoing};
use super::{Folder, Options, Target};
use anyhow::Result;
use std::collections::BTreeMap;
use std::io::Write;

/// Writes `config.json` and the weights, in several files with an index where one would be too large.
pub(super) fn write(source: &Source, options: &Options, folder: &mut Folder) -> Result<()> {
    let tensors =
        source.tensors().map(|(name, tensor)| Outgoing::new(name, options.dtype, vec![Block::whole(tensor)]));
    let mut tensors = tensors.collect::<Result<Vec<_>>>()?;
    // Wider types first keeps every tensor aligned to its elements, so that it can be used where it is mapped.
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.size()));
    folder.total = tensors.iter().map(Outgoing::bytes).sum();

    let mut config = source.config().hugging_face();
    if let Some(dtype) = options.dtype.or(source.dtype()) {
        config["torch_dtype"] = dtype.torch_name().into();
    }
    folder.small(CONFIG, &json(&config)?)?;

    let (stem, end) = match options.target {
        Target::TorchBin => ("pytorch_model", "bin"),
        _ => ("model", "safetensors"),
    };
    let shards = shards(tensors, options.max_shard_bytes);
    let count = shards.len();
    let mut map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = match count {
            1 => format!("{stem}.{end}"),
            _ => format!("{stem}-{:05}-of-{count:05}.{end}", i + 1),
        };
        map.extend(shard.iter().map(|tensor| (tensor.name.clone(), name.clone())));
        match options.target {
            Target::TorchBin => torch(folder, &name, shard)?,
            _ => safetensors(folder, &name, shard)?,
        }
    }
    if count > 1 {
        let index = serde_json::json!({ "metadata": { "total_size": folder.total }, "weight_map": map });
        folder.small(&format!("{stem}.{end}.index.json"), &json(&index)?)?;
    }
    Ok(())
}

fn json(value: &serde_json::Value) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    Ok(text)
}

/// Tensors in order, in groups that stay below the limit if they can.
fn shards(tensors: Vec<Outgoing>, limit: u64) -> Vec<Vec<Outgoing>> {
    let mut shards: Vec<Vec<Outgoing>> = Vec::new();
    let mut filled = u64::MAX; // a first group is needed
    for tensor in tensors {
        let bytes = tensor.bytes();
        match shards.last_mut().filter(|_| filled.saturating_add(bytes) <= limit) {
            Some(last) => last.push(tensor),
            None => {
                shards.push(vec![tensor]);
                filled = 0;
            }
        }
        filled += bytes;
    }
    shards
}

fn safetensors(folder: &mut Folder, name: &str, tensors: &[Outgoing]) -> Result<()> {
    folder.file(name, |folder, mut file| {
        let header = tensors.iter().map(|t| (t.name.clone(), t.dtype.safetensors(), t.shape.clone()));
        file.write_all(&safetensors_header(header)?)?;
        for tensor in tensors {
            folder.tensor(tensor, &mut |bytes| Ok(file.write_all(bytes)?))?;
        }
        Ok(file)
    })
}

fn torch(folder: &mut Folder, name: &str, tensors: &[Outgoing]) -> Result<()> {
    folder.torch(name, tensors, Item::Dict)
}
