//! Sizes of a metaseq checkpoint: from the shapes of its tensors, and from the configuration in it.

use super::super::hugging_face;
use super::super::pickle::{Pickle, Value};
use super::super::torch_file::StateDict;
use super::files::Group;
use crate::config::{Config, POSITION_OFFSET, PRESETS};
use anyhow::{Context, Result, bail, ensure};

/// What the configuration in a file says, as far as shapes do not.
#[derive(Debug, Default)]
pub(super) struct Settings {
    heads: Option<usize>,
    layers: Option<usize>,
    pre_norm: Option<bool>,
    dropout: Option<f64>,
    attention_dropout: Option<f64>,
}

/// Reads `cfg.model`, or `args` of older files. It is empty where there is neither.
///
/// # Errors
/// Names a key whose value makes a model that is not computed here.
pub(super) fn settings(pickle: &Pickle) -> Result<Settings> {
    let root = pickle.root();
    let present = |id: &u32| !matches!(pickle.value(*id), Value::None);
    let model = pickle.get(root, "cfg").and_then(|cfg| pickle.get(cfg, "model")).filter(present);
    let Some(model) = model.or_else(|| pickle.get(root, "args").filter(present)) else {
        return Ok(Settings::default());
    };
    let get = |key: &str| pickle.get(model, key).filter(present);
    let size = |key: &str| -> Result<Option<usize>> {
        let read =
            |id| pickle.size(id).with_context(|| format!("cfg.model.{key} is {}", pickle.describe(id)));
        get(key).map(read).transpose()
    };
    let number = |key: &str| -> Result<Option<f64>> {
        let read =
            |id| pickle.number(id).with_context(|| format!("cfg.model.{key} is {}", pickle.describe(id)));
        get(key).map(read).transpose()
    };
    let flag = |key: &str| {
        get(key).and_then(|id| match pickle.value(id) {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    };
    for (key, computed) in [
        ("disable_bias", false),
        ("disable_affine_ln", false),
        ("alibi", false),
        ("decoder_learned_sinusoidal", false),
        ("decoder_learned_pos", true),
        ("no_scale_embedding", true),
        ("share_decoder_input_output_embed", true),
    ] {
        if let Some(value) = flag(key).filter(|value| *value != computed) {
            bail!("cfg.model.{key} is {value}, but only models where it is {computed} can be computed here");
        }
    }
    if let Some(id) = get("activation_fn") {
        ensure!(
            pickle.text(id) == Some("relu"),
            "cfg.model.activation_fn is {}, but only models with \"relu\" can be computed here",
            pickle.describe(id)
        );
    }
    Ok(Settings {
        heads: size("decoder_attention_heads")?,
        layers: size("decoder_layers")?,
        pre_norm: flag("decoder_normalize_before"),
        dropout: number("dropout")?,
        attention_dropout: number("attention_dropout")?,
    })
}

/// The sizes of the model, and where those came from that no shape tells.
pub(super) fn derive(
    parts: &[StateDict],
    settings: &Settings,
    group: &Group,
    preset: Option<&str>,
) -> Result<(Config, String)> {
    let path = group.parts[0][0].display();
    let shape = |name: &str| -> Result<[usize; 2]> {
        let shape = parts[0].get(name).map(|flat| &flat.shape[..]);
        let shape = shape.with_context(|| format!("{path} has no tensor {name}"))?;
        shape.try_into().ok().with_context(|| format!("{path}: tensor {name} is no matrix, but {shape:?}"))
    };
    let [vocab, embedding_width] = shape("decoder.embed_tokens.weight")?;
    let [rows, width] = shape("decoder.embed_positions.weight")?;
    let [feed_forward, _] = shape("decoder.layers.0.fc1.weight")?;
    let layers =
        (0..).take_while(|l| parts[0].contains_key(&format!("decoder.layers.{l}.fc1.weight"))).count();
    // 350m has no final norm, and norms behind its sums. Older files say so, newer code cannot build such a model.
    let final_norm = parts[0].contains_key("decoder.layer_norm.weight");
    ensure!(
        settings.pre_norm != Some(true) || final_norm,
        "{path} has no tensor decoder.layer_norm.weight, but cfg.model.decoder_normalize_before is true"
    );
    let sizes = Config {
        layers,
        heads: 1,
        width,
        feed_forward: feed_forward * parts.len(),
        embedding_width,
        post_norm: !final_norm,
        own_head: false,
        vocab: vocab * parts.len(),
        positions: rows.saturating_sub(POSITION_OFFSET),
        dropout: settings.dropout.unwrap_or(0.1),
        attention_dropout: settings.attention_dropout.unwrap_or(0.1),
    };
    sizes.check().with_context(|| format!("the shapes in {path} make no model"))?;
    if let Some(layers) = settings.layers {
        ensure!(
            layers == sizes.layers,
            "{path} has tensors of {} layers, but cfg.model.decoder_layers is {layers}",
            sizes.layers
        );
    }
    let (config, from) = complete(sizes, settings, group, preset).with_context(|| format!("{path}"))?;
    config.check().with_context(|| format!("{path} makes no model"))?;
    ensure!(
        config.heads.is_multiple_of(parts.len()),
        "{path}: {} heads do not divide by the {} parts",
        config.heads,
        parts.len()
    );
    Ok((config, from))
}

/// Adds what shapes do not tell: the number of heads, and dropout.
fn complete(
    sizes: Config,
    settings: &Settings,
    group: &Group,
    preset: Option<&str>,
) -> Result<(Config, String)> {
    let same = |other: &Config| {
        (other.layers, other.width, other.feed_forward, other.embedding_width, other.post_norm)
            == (sizes.layers, sizes.width, sizes.feed_forward, sizes.embedding_width, sizes.post_norm)
    };
    let chosen = preset.map(|name| Config::preset(name).map(|config| (name, config))).transpose()?;
    if let Some((name, chosen)) = &chosen {
        ensure!(
            same(chosen),
            "its shapes are not those of {name}: it has {} layers, width {}, feed-forward width {} and embedding \
             width {}; {name} has {}, {}, {} and {}",
            sizes.layers,
            sizes.width,
            sizes.feed_forward,
            sizes.embedding_width,
            chosen.layers,
            chosen.width,
            chosen.feed_forward,
            chosen.embedding_width
        );
    }
    let beside = group.folder.join(hugging_face::CONFIG);
    let stated = if let Some(heads) = settings.heads {
        Some((Config { heads, ..sizes.clone() }, "cfg in the file".to_string()))
    } else if beside.is_file() {
        let config = hugging_face::read_config(&beside)?;
        ensure!(same(&config), "{} has other sizes than the tensors", beside.display());
        let Config { heads, dropout, attention_dropout, .. } = config;
        let config = Config { heads, dropout, attention_dropout, ..sizes.clone() };
        Some((config, beside.display().to_string()))
    } else {
        None
    };
    match (stated, chosen) {
        (Some((config, from)), Some((name, chosen))) if config.heads != chosen.heads => bail!(
            "it has {} heads by {from}, but --preset {name} has {}; leave the preset out",
            config.heads,
            chosen.heads
        ),
        (Some(stated), _) => return Ok(stated),
        (None, Some((name, chosen))) => {
            return Ok((Config { heads: chosen.heads, ..sizes }, format!("the preset {name}")));
        }
        (None, None) => {}
    }
    match PRESETS.iter().find(|p| same(&p.config())) {
        Some(p) => bail!(
            "it does not say how many heads there are. Its shapes are those of {}: if it is, give --preset {} (which is not for \
             drafts), or put its {} beside it",
            p.name,
            p.name,
            hugging_face::CONFIG
        ),
        None => bail!(
            "it does not say how many heads there are, and its shapes are those of no preset. Put a {} with \
             num_attention_heads, as Hugging Face writes them, beside it",
            hugging_face::CONFIG
        ),
    }
}
