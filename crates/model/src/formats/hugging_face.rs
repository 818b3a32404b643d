//! Hugging Face folders: `config.json`, and safetensors or `pytorch_model*.bin`, in one file or in several with an
//! index. Checkpoints of training runs are such folders too.

use super::safetensors;
use super::strand::check_kind;
use super::torch_file::{StateDict, TorchFile};
use crate::config::Config;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// File of the configuration.
pub(super) const CONFIG: &str = "config.json";
/// Most bytes of a JSON file: an index of 175b has 200 kB.
const MAX_JSON: u64 = 64 << 20;

/// Where the weights are, in transformers' order: an index may be left of what was saved in shards before.
const WEIGHTS: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// The file that a folder's weights begin with, if it is such a folder.
pub(super) fn weights(folder: &Path) -> Option<PathBuf> {
    WEIGHTS.iter().map(|name| folder.join(name)).find(|file| file.is_file())
}

/// What has been read of a folder.
pub(super) struct Folder {
    pub(super) config: Config,
    pub(super) files: Vec<PathBuf>,
    /// Tensors under full names (`model.decoder...`), and `lm_head.weight` if it is there.
    pub(super) tensors: StateDict,
}

/// Whether a name is that of a buffer, not of a weight.
fn skip(name: &str) -> bool {
    name.ends_with("decoder.version")
}

/// Opens a folder whose weights begin with `first`.
pub(super) fn open(folder: &Path, first: &Path) -> Result<Folder> {
    let config = read_config(&folder.join(CONFIG))?;
    let files = files(folder, first)?;
    let mut tensors = StateDict::new();
    for file in &files {
        let found = if file.extension().is_some_and(|e| e == "safetensors") {
            safetensors::read(file, &skip)?
        } else {
            let torch = TorchFile::open(file)?;
            let pickle = torch.pickle()?;
            torch.tensors(&pickle, pickle.root(), &skip)?
        };
        for (name, flat) in found {
            // OPTModel saves without the first word, OPTForCausalLM with it.
            let full = if name.starts_with("decoder.") { format!("model.{name}") } else { name };
            ensure!(
                tensors.insert(full.clone(), flat).is_none(),
                "tensor {full} is twice in {}; the second time in {}",
                folder.display(),
                file.display()
            );
        }
    }
    // Before anything is made in proportion to the number of layers, which only the configuration says.
    ensure!(
        config.layers <= tensors.len(),
        "{} says num_hidden_layers = {}, but there are only {} tensors",
        folder.join(CONFIG).display(),
        config.layers,
        tensors.len()
    );
    Ok(Folder { config, files, tensors })
}

/// Reads a JSON file whose top is an object.
pub(super) fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let size = check_kind(path)?;
    ensure!(size <= MAX_JSON, "{} has {size} bytes, which is too much for such a file", path.display());
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not a JSON object", path.display()))
}

/// What a file says of the ids that end texts.
pub(super) fn ends(path: &Path) -> Result<Option<Vec<u32>>> {
    let json = read_json(path)?;
    let ids = match json.get("eos_token_id") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(ids)) => ids.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    let ends: Option<Vec<u32>> = ids.iter().map(id).collect();
    ends.map(Some).with_context(|| {
        format!(
            "{}: eos_token_id = {}, but it must be an id or a list of ids",
            path.display(),
            json["eos_token_id"]
        )
    })
}

/// The files with weights: `first`, or those that it lists if it is an index.
pub(super) fn files(folder: &Path, first: &Path) -> Result<Vec<PathBuf>> {
    if first.extension().is_some_and(|e| e == "json") {
        listed(folder, first)
    } else {
        Ok(vec![first.into()])
    }
}

/// The files that an index lists, which must lie beside it.
fn listed(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let json = read_json(index)?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.with_context(|| format!("{} has no object weight_map", index.display()))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let name = file.as_str().filter(|name| {
            !name.starts_with('.')
                && !name.contains(['/', '\\', '\0'])
                && (name.ends_with(".safetensors") || name.ends_with(".bin"))
        });
        let name = name.with_context(|| {
            format!("{} says that {tensor} is in {file}, which is no file beside it", index.display())
        })?;
        names.insert(name.to_string());
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// Keys of a configuration, with the defaults of Hugging Face's `OPTConfig` where they are absent.
struct Keys<'a> {
    path: &'a Path,
    json: &'a Map<String, Value>,
}

impl Keys<'_> {
    fn get<T>(&self, key: &str, default: T, read: impl Fn(&Value) -> Option<T>, what: &str) -> Result<T> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => {
                read(value).with_context(|| format!("{}: {key} = {value} is not {what}", self.path.display()))
            }
        }
    }

    fn size(&self, key: &str, default: usize) -> Result<usize> {
        self.get(key, default, |v| v.as_u64().and_then(|n| usize::try_from(n).ok()), "a size")
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        self.get(key, default, Value::as_f64, "a number")
    }

    fn bool(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key, default, Value::as_bool, "true or false")
    }

    fn text(&self, key: &str, default: &str) -> Result<String> {
        self.get(key, default.into(), |v| v.as_str().map(String::from), "a text")
    }
}

/// Sizes from a `config.json`. Whether an LM head of its own, if it says that there is one, is the embedding table all the
/// same, only the tensors tell.
///
/// # Errors
/// Names the key whose value makes no OPT that this program computes.
pub(super) fn read_config(path: &Path) -> Result<Config> {
    let json = read_json(path)?;
    let keys = Keys { path, json: &json };
    let refuse = |key: &str, value: &str, known: &str| -> Result<()> {
        bail!("{}: {key} = {value}, but only models with {known} can be computed here", path.display())
    };
    let kind = keys.text("model_type", "opt")?;
    if kind != "opt" {
        refuse("model_type", &format!("{kind:?}"), "\"opt\"")?;
    }
    let activation = keys.text("activation_function", "relu")?;
    if activation != "relu" {
        refuse("activation_function", &format!("{activation:?}"), "\"relu\"")?;
    }
    for key in ["enable_bias", "layer_norm_elementwise_affine"] {
        if !keys.bool(key, true)? {
            refuse(key, "false", "true")?;
        }
    }
    let pre_norm = keys.bool("do_layer_norm_before", true)?;
    // Without do_layer_norm_before there is no final norm to be removed.
    if pre_norm && keys.bool("_remove_final_layer_norm", false)? {
        refuse("_remove_final_layer_norm", "true", "false")?;
    }
    let width = keys.size("hidden_size", 768)?;
    let config = Config {
        layers: keys.size("num_hidden_layers", 12)?,
        heads: keys.size("num_attention_heads", 12)?,
        width,
        feed_forward: keys.size("ffn_dim", 3072)?,
        embedding_width: keys.size("word_embed_proj_dim", width)?,
        post_norm: !pre_norm,
        own_head: !keys.bool("tie_word_embeddings", true)?,
        vocab: keys.size("vocab_size", 50_272)?,
        positions: keys.size("max_position_embeddings", 2048)?,
        dropout: keys.number("dropout", 0.1)?,
        attention_dropout: keys.number("attention_dropout", 0.0)?,
    };
    config.check().with_context(|| format!("{} makes no model", path.display()))?;
    Ok(config)
}
