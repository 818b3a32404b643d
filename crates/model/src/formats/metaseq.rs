//! Checkpoints of metaseq, where OPT was trained: names, tensor-parallel parts and flattened shards.
//!
//! A model is divided twice. **Parts** (`-model_part-P`) are tensor-parallel: matrices are cut by rows or columns, as
//! [`Split`](crate::Split) says, and the rest is in every part. **Shards** (`-shardS`) are fully sharded data-parallel:
//! the tensors of a module lie end to end in one `flat_param_0`, padded and cut into equal shards; `shard_metadata`
//! has their names and shapes. q, k and v are one `qkv_proj`, or three tensors in `restored.pt`. The rows of a
//! `qkv_proj` are those of k, v and q, in this order, of each part.

mod config;
mod files;
mod flat;

pub(super) use files::{Group, find, group_of};

use super::stored::{Flat, StoredTensor};
use super::torch_file::{StateDict, TorchFile};
use crate::config::Config;
use crate::parameters::Split;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Order of the thirds of a `qkv_proj`.
pub(super) const FUSED: [&str; 3] = ["k", "v", "q"];
/// What the LM head is called; it is the embedding table again.
pub(super) const HEAD: &str = "decoder.output_projection.weight";

/// What has been read of a checkpoint.
pub(super) struct Opened {
    pub(super) config: Config,
    /// Where the sizes that no shape tells came from.
    pub(super) config_from: String,
    pub(super) files: Vec<PathBuf>,
    pub(super) parts: usize,
    pub(super) shards: usize,
    /// By Hugging Face names.
    pub(super) tensors: BTreeMap<String, StoredTensor>,
    /// Tensors that every part has: the copies of parts 1 and up.
    pub(super) replicas: Vec<(String, usize, StoredTensor)>,
    /// The LM head, if there is one: put together, and what each part has of it.
    pub(super) head: Option<(StoredTensor, Vec<StoredTensor>)>,
}

/// metaseq's name of a tensor. Its q, k and v may be fused, see [`fused_name`].
pub(super) fn name(hugging_face: &str) -> String {
    let name = hugging_face.strip_prefix("model.").unwrap_or(hugging_face);
    match name.strip_prefix("decoder.") {
        Some("project_in.weight") => "decoder.project_in_dim.weight".into(),
        Some("project_out.weight") => "decoder.project_out_dim.weight".into(),
        Some(rest) if rest.starts_with("final_layer_norm.") => name.replace("final_layer_norm", "layer_norm"),
        _ => name.into(),
    }
}

/// The name of the fused tensor that holds `decoder.layers.N.self_attn.q_proj.weight`, or another of the three.
pub(super) fn fused_name(name: &str) -> String {
    FUSED.iter().fold(name.to_string(), |name, x| name.replace(&format!(".{x}_proj."), ".qkv_proj."))
}

/// Buffers beside the weights.
fn is_buffer(name: &str) -> bool {
    name.ends_with("decoder.version") || name.ends_with("_float_tensor")
}

/// Opens a checkpoint. `preset` has the sizes that no shape tells, should the files not have them.
pub(super) fn open(group: &Group, preset: Option<&str>) -> Result<Opened> {
    let mut parts = Vec::new();
    let mut settings = None;
    for shards in &group.parts {
        let files = shards.iter().map(|path| TorchFile::open(path)).collect::<Result<Vec<_>>>()?;
        let mut states = Vec::new();
        for file in &files {
            let pickle = file.pickle()?;
            let mut read = || -> Result<(StateDict, flat::Metadata)> {
                let model = pickle.get(pickle.root(), "model").context(
                    "it has no dictionary `model` at its top, as metaseq's checkpoints do. Weights of Hugging Face \
                     are opened by their folder",
                )?;
                let metadata = flat::metadata(&pickle)?;
                let tensors = file.tensors(&pickle, model, &is_buffer)?;
                if settings.is_none() {
                    settings = Some(config::settings(&pickle)?);
                }
                Ok((tensors, metadata))
            };
            states.push(read().with_context(|| format!("cannot use {}", file.path().display()))?);
        }
        let of = || format!("cannot use {} and its shards", shards[0].display());
        let state = flat::unflatten(states).with_context(of)?;
        parts.push(separate(state).with_context(of)?);
    }
    let (config, config_from) = config::derive(&parts, &settings.unwrap_or_default(), group, preset)?;
    assemble(group, parts, config, config_from)
}

/// Takes prefixes of wrappers off the names, and cuts fused tensors into k, v and q.
fn separate(state: StateDict) -> Result<StateDict> {
    let mut plain = StateDict::new();
    for (name, flat) in state {
        let name = name.strip_prefix("model.").unwrap_or(&name).to_string();
        let mut put = |name: String, flat| -> Result<()> {
            ensure!(!plain.contains_key(&name), "tensor {name} is there twice");
            plain.insert(name, flat);
            Ok(())
        };
        if !name.contains(".qkv_proj.") {
            put(name, flat)?;
            continue;
        }
        for (i, x) in FUSED.iter().enumerate() {
            let third = flat.rows_part(i, 3).with_context(|| format!("tensor {name}"))?;
            put(name.replace(".qkv_proj.", &format!(".{x}_proj.")), third)?;
        }
    }
    Ok(plain)
}

/// Puts the parts together as the parameter table says.
fn assemble(group: &Group, mut parts: Vec<StateDict>, config: Config, config_from: String) -> Result<Opened> {
    let file = |part: usize| group.parts[part][0].display();
    let mut tensors = BTreeMap::new();
    let mut replicas = Vec::new();
    for parameter in config.parameters() {
        for full in &parameter.names {
            let name = name(full);
            let mut found = Vec::new();
            for (i, part) in parts.iter_mut().enumerate() {
                found.push(part.remove(&name).with_context(|| format!("{} has no tensor {name}", file(i)))?);
            }
            let tensor =
                join(&found, parameter.split).with_context(|| format!("{}: tensor {name}", file(0)))?;
            if parameter.split == Split::Whole {
                for (i, copy) in found.iter().enumerate().skip(1) {
                    let copy = join(std::slice::from_ref(copy), Split::Whole);
                    replicas.push((
                        full.clone(),
                        i,
                        copy.with_context(|| format!("{}: tensor {name}", file(i)))?,
                    ));
                }
            }
            tensors.insert(full.clone(), tensor);
        }
    }
    let heads: Vec<Flat> = parts.iter_mut().filter_map(|part| part.remove(HEAD)).collect();
    ensure!(
        heads.is_empty() || heads.len() == parts.len(),
        "{HEAD} is in {} of {} parts of {}",
        heads.len(),
        parts.len(),
        file(0)
    );
    let head = || -> Result<_> {
        let each = heads.iter().map(|head| join(std::slice::from_ref(head), Split::Whole));
        Ok((join(&heads, Split::Rows)?, each.collect::<Result<_>>()?))
    };
    let head = (!heads.is_empty()).then(head).transpose();
    let head = head.with_context(|| format!("{}: tensor {HEAD}", file(0)))?;
    for (i, part) in parts.iter().enumerate() {
        if let Some(name) = part.keys().next() {
            anyhow::bail!(
                "{} has the tensor {name}, which an OPT of {} layers{} has not: it is of another model",
                file(i),
                config.layers,
                if config.post_norm { " with norms behind the sums" } else { "" }
            );
        }
    }
    Ok(Opened {
        config,
        config_from,
        files: group.parts.iter().flatten().cloned().collect(),
        parts: group.parts.len(),
        shards: group.parts[0].len(),
        tensors,
        replicas,
        head,
    })
}

fn join(found: &[Flat], split: Split) -> Result<StoredTensor> {
    let all: Vec<&Flat> = found.iter().collect();
    match split {
        Split::Rows => StoredTensor::stack_rows(&all),
        Split::Columns => StoredTensor::stack_columns(&all),
        Split::Whole => StoredTensor::stack_rows(&all[..1]),
    }
}
