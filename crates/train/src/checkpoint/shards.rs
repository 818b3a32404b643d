//! How tensors are put into files, and what the files are called.
//!
//! While a checkpoint is written, a rank knows only its own files: `model-part-00003-00001.safetensors` is the first that
//! rank 3 writes of the weights. Once all are there they are counted through and named as Hugging Face does it.

use super::manifest::{Manifest, TensorEntry};
use super::output::rename;
use super::snapshot::{Group, Tensor};
use super::team::Share;
use anyhow::{Context, Result, ensure};
use ferropt_model::formats::safetensors_header;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Name and content.
pub(super) type SmallFile = (String, Vec<u8>);

/// One safetensors file before it is written: tensors in file order and the text that precedes them.
pub(super) struct Shard {
    pub(super) file: String,
    pub(super) header: Vec<u8>,
    pub(super) tensors: Vec<Tensor>,
}

impl Shard {
    pub(super) fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.tensors.iter().map(bytes_of).sum::<u64>()
    }
}

fn bytes_of(tensor: &Tensor) -> u64 {
    tensor.data.bytes().len() as u64
}

/// Splits a rank's tensors of a group into files of at most `limit` bytes (a larger tensor has one to itself), and enters
/// them in the rank's manifest.
pub(super) fn plan(group: Group, limit: u64, share: Share, manifest: &mut Manifest) -> Result<Vec<Shard>> {
    let Group { name: group, mut tensors } = group;
    // Wider types first keeps every tensor aligned to its elements, so that it can be used where it is mapped.
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.data.dtype().bitsize()));
    let mut parts: Vec<Vec<Tensor>> = Vec::new();
    let mut filled = 0;
    for tensor in tensors {
        let bytes = bytes_of(&tensor);
        match parts.last_mut() {
            Some(part) if filled == 0 || filled + bytes <= limit => part.push(tensor),
            _ => {
                parts.push(vec![tensor]);
                filled = 0;
            }
        }
        filled += bytes;
    }

    let entries = manifest.groups.entry(group.clone()).or_default();
    let shard = |(index, tensors): (usize, Vec<Tensor>)| {
        let file = format!("{group}-part-{:05}-{:05}.safetensors", share.rank, index + 1);
        for Tensor { name, shape, data } in &tensors {
            let entry = TensorEntry { shape: shape.clone(), dtype: data.dtype(), file: file.clone() };
            entries.insert(name.clone(), entry);
        }
        let infos = tensors.iter().map(|t| (t.name.clone(), t.data.dtype(), t.shape.clone()));
        Ok(Shard { header: safetensors_header(infos)?, file, tensors })
    };
    parts.into_iter().enumerate().map(shard).collect()
}

/// Makes one manifest of those of all ranks, and gives their files in `directory` their names. Returns what is still to be
/// written: the indices of groups of more than one file.
pub(super) fn assemble(directory: &Path, parts: Vec<Manifest>) -> Result<(Manifest, Vec<SmallFile>)> {
    let mut groups: BTreeMap<String, BTreeMap<String, TensorEntry>> = BTreeMap::new();
    let mut files = BTreeMap::new();
    let mut run = None;
    for (rank, part) in parts.into_iter().enumerate() {
        run.get_or_insert(part.run);
        files.extend(part.files);
        for (group, tensors) in part.groups {
            let all = groups.entry(group.clone()).or_default();
            for (name, entry) in tensors {
                let twin = all.insert(name.clone(), entry);
                ensure!(
                    twin.is_none(),
                    "tensor {name} of group {group} came from rank {rank} and an earlier one"
                );
            }
        }
    }
    let mut manifest = Manifest::new(run.context("no rank has written anything")?);
    let mut indices = Vec::new();
    for (group, tensors) in &mut groups {
        let parts: BTreeSet<String> = tensors.values().map(|tensor| tensor.file.clone()).collect();
        let count = parts.len();
        let name = |index: usize| match count {
            1 => format!("{group}.safetensors"),
            _ => format!("{group}-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let names: BTreeMap<String, String> =
            parts.into_iter().enumerate().map(|(index, part)| (part, name(index))).collect();
        for (part, name) in &names {
            rename(&directory.join(part), &directory.join(name))?;
            if let Some(entry) = files.remove(part) {
                files.insert(name.clone(), entry);
            }
        }
        for tensor in tensors.values_mut() {
            tensor.file = names[&tensor.file].clone();
        }
        if count > 1 {
            indices.push((format!("{group}.safetensors.index.json"), index(tensors)?));
        }
    }
    manifest.groups = groups;
    manifest.files = files;
    Ok((manifest, indices))
}

/// Hugging Face's index of a group of several files.
fn index(tensors: &BTreeMap<String, TensorEntry>) -> Result<Vec<u8>> {
    let bytes = |tensor: &TensorEntry| tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8;
    let total: usize = tensors.values().map(bytes).sum();
    let weight_map: BTreeMap<&String, &String> =
        tensors.iter().map(|(name, tensor)| (name, &tensor.file)).collect();
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    Ok(serde_json::to_vec_pretty(&index)?)
}
