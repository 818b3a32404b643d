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
    let outgoing = |(name, _): (String, _)| {
        let tensor = source.tensor(&name)?;
        Outgoing::new(name, options.dtype, vec![Block::whole(tensor)])
    };
    let mut tensors = source.tensors().map(outgoing).collect::<Result<Vec<_>>>()?;
    // Wider types first keeps every tensor aligned to its elements, so that it can be used where it is mapped.
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.size()));
    folder.total = tensors.iter().map(Outgoing::bytes).sum();

    let mut config = source.hugging_face_config()?;
    if let Some(dtype) = options.dtype.or(source.dtype()) {
        config["torch_dtype"] = dtype.torch_name().into();
    }
    folder.small(CONFIG, &json(&config)?)?;

    let (stem, end) = match options.target {
        Target::TorchBin => ("pytorch_model", "bin"),
        _ => ("model", "safetensors"),
    };
    let shards = shards(tensors, options.max_shard_bytes, Outgoing::bytes);
    let mut map = BTreeMap::new();
    for (shard, name) in shards.iter().zip(names(stem, end, shards.len())) {
        map.extend(shard.iter().map(|tensor| (tensor.name.clone(), name.clone())));
        match options.target {
            Target::TorchBin => torch(folder, &name, shard)?,
            _ => safetensors(folder, &name, shard)?,
        }
    }
    index(folder, stem, end, &map)
}

/// Names of the files of a model in `count` files.
pub(super) fn names(stem: &str, end: &str, count: usize) -> Vec<String> {
    let name = |i: usize| match count {
        1 => format!("{stem}.{end}"),
        _ => format!("{stem}-{i:05}-of-{count:05}.{end}"),
    };
    (1..=count).map(name).collect()
}

/// Writes which tensor is in which file, unless there is one file.
pub(super) fn index(
    folder: &mut Folder,
    stem: &str,
    end: &str,
    map: &BTreeMap<String, String>,
) -> Result<()> {
    if map.values().all(|file| Some(file) == map.values().next()) {
        return Ok(());
    }
    let index = serde_json::json!({ "metadata": { "total_size": folder.total }, "weight_map": map });
    folder.small(&format!("{stem}.{end}.index.json"), &json(&index)?)
}

/// As `config.json` is written.
pub(super) fn json(value: &serde_json::Value) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    Ok(text)
}

/// Tensors in order, in groups that stay below the limit if they can.
pub(super) fn shards<T>(tensors: Vec<T>, limit: u64, bytes: impl Fn(&T) -> u64) -> Vec<Vec<T>> {
    let mut shards: Vec<Vec<T>> = Vec::new();
    let mut filled = u64::MAX; // a first group is needed
    for tensor in tensors {
        let bytes = bytes(&tensor);
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
