//! metaseq's files: `restored.pt`, or tensor-parallel parts.

use super::super::dtype::Dtype;
use super::super::hugging_face::read_json;
use super::super::metaseq::{FUSED, HEAD, fused_name, name};
use super::super::pickle::write::Item;
use super::super::source::{GENERATION, Source};
use super::outgoing::{Block, Outgoing};
use super::{Folder, Options};
use crate::config::Config;
use crate::parameters::Split;
use anyhow::{Context, Result, ensure};
use serde_json::Map;
use std::path::PathBuf;

const EMBEDDING: &str = "decoder.embed_tokens.weight";

/// `</s>`, which ends texts where no file says anything else.
const END: u32 = 2;

/// The file that says which ids end a text, if only the source's `config.json` does, of which metaseq has none: `files` beside the
/// weights are copied.
pub(super) fn generation_config(source: &Source, files: &[(&str, PathBuf)]) -> Result<Option<Vec<u8>>> {
    let mut config = match files.iter().find(|(name, _)| *name == GENERATION) {
        Some((_, path)) => read_json(path)?,
        None => Map::new(),
    };
    let Some(ends) = source.ends()? else { return Ok(None) };
    if ends == [END] || config.get("eos_token_id").is_some_and(|ids| !ids.is_null()) {
        return Ok(None);
    }
    config.insert("eos_token_id".into(), ends.into());
    Ok(Some(serde_json::to_vec_pretty(&config)?))
}

/// Writes one file, or a file for each part.
pub(super) fn write(
    source: &Source,
    options: &Options,
    parts: Option<usize>,
    folder: &mut Folder,
) -> Result<()> {
    let count = parts.unwrap_or(1);
    check(source.config(), count)?;
    let all = (0..count)
        .map(|part| tensors(source, options, part, count, parts.is_some()))
        .collect::<Result<Vec<_>>>()?;
    folder.total = all.iter().flatten().map(Outgoing::bytes).sum();
    for (part, tensors) in all.iter().enumerate() {
        let file = match parts {
            Some(_) => format!("reshard-model_part-{part}.pt"),
            None => "restored.pt".into(),
        };
        folder.torch(&file, tensors, |mut model| {
            // metaseq keeps the tied LM head in its parts, as a second name of the embeddings, but not in restored.pt.
            let embedding = model.iter().find(|(name, _)| parts.is_some() && name == EMBEDDING);
            if let Some((_, Item::Tensor { dtype, shape, storage })) = embedding {
                let head = Item::Tensor { dtype: *dtype, shape: shape.clone(), storage: *storage };
                model.push((HEAD.into(), head));
            }
            let cfg = Item::Dict(vec![("model".into(), settings(source.config(), count))]);
            Item::Dict(vec![("cfg".into(), cfg), ("model".into(), Item::Dict(model))])
        })?;
    }
    Ok(())
}

fn check(config: &Config, parts: usize) -> Result<()> {
    ensure!(
        !config.own_head,
        "its LM head is a matrix of its own, and metaseq takes the embedding table for the head; convert it to a folder of \
         Hugging Face"
    );
    for (name, size) in
        [("heads", config.heads), ("feed_forward", config.feed_forward), ("vocab", config.vocab)]
    {
        ensure!(
            parts > 0 && size.is_multiple_of(parts),
            "{name} = {size} does not divide by {parts} parts; choose a number of parts that divides it"
        );
    }
    Ok(())
}

/// The tensors of one part, in the order of the parameter table.
fn tensors<'a>(
    source: &'a Source,
    options: &Options,
    part: usize,
    parts: usize,
    fused: bool,
) -> Result<Vec<Outgoing<'a>>> {
    let mut tensors = Vec::new();
    for parameter in source.config().parameters() {
        let block = |full: &String| -> Result<Block<'a>> {
            let whole = Block::whole(source.tensor(full)?);
            let share = |size: usize| size / parts * part..size / parts * (part + 1);
            Ok(match parameter.split {
                Split::Whole => whole,
                Split::Rows => Block { rows: share(whole.tensor.rows()), ..whole },
                Split::Columns => Block { columns: share(whole.tensor.columns()), ..whole },
            })
        };
        if parameter.names.len() > 1 && fused {
            let of = |x: &&str| {
                let full = parameter.names.iter().find(|name| name.contains(&format!(".{x}_proj.")));
                block(full.with_context(|| format!("there is no {x} among {:?}", parameter.names))?)
            };
            let blocks = FUSED.iter().map(of).collect::<Result<_>>()?;
            let name = fused_name(&name(&parameter.names[0]));
            tensors.push(Outgoing::new(name, options.dtype, blocks)?);
        } else {
            for full in &parameter.names {
                tensors.push(Outgoing::new(name(full), options.dtype, vec![block(full)?])?);
            }
        }
    }
    // metaseq refuses to load a decoder without this buffer, and Hugging Face's converter to convert it.
    let dtype = options.dtype.or(source.dtype()).unwrap_or(Dtype::F32);
    tensors.push(Outgoing::constant("decoder.version", dtype, 3.0)?);
    Ok(tensors)
}

/// What metaseq's configuration calls the sizes.
fn settings(config: &Config, parts: usize) -> Item {
    let int = |n: usize| Item::Int(n as i64);
    let entries = [
        ("_name", Item::Text("transformer_lm_megatron".into())),
        ("activation_fn", Item::Text("relu".into())),
        ("attention_dropout", Item::Float(config.attention_dropout)),
        ("decoder_attention_heads", int(config.heads)),
        ("decoder_embed_dim", int(config.width)),
        ("decoder_ffn_embed_dim", int(config.feed_forward)),
        ("decoder_input_dim", int(config.embedding_width)),
        ("decoder_layers", int(config.layers)),
        ("decoder_learned_pos", Item::Bool(true)),
        ("decoder_normalize_before", Item::Bool(!config.post_norm)),
        ("decoder_output_dim", int(config.embedding_width)),
        ("dropout", Item::Float(config.dropout)),
        ("max_target_positions", int(config.positions)),
        ("model_parallel_size", int(parts)),
        ("no_scale_embedding", Item::Bool(true)),
        ("share_decoder_input_output_embed", Item::Bool(true)),
        ("tokens_per_sample", int(config.positions)),
    ];
    Item::Dict(entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
}
