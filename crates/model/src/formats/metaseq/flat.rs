//! Flattened parameters: the tensors of a module end to end, padded, in equal shards (fairscale's FSDP).

use super::super::pickle::{Id, Pickle, Value, short};
use super::super::stored::{Flat, elements};
use super::super::strand::Strand;
use super::super::torch_file::StateDict;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;

/// Modules that FSDP puts around others, whose names it leaves out when it can.
const WRAPPERS: [&str; 2] = ["_fsdp_wrapped_module.", "_fpw_module."];
/// What a flattened parameter's name ends with, before its number.
const FLAT: &str = "flat_param_";
/// Longest name of a tensor.
const MAX_NAME: usize = 256;

/// Layout of the flattened parameters of a shard, by name.
pub(super) type Metadata = BTreeMap<String, Layout>;

/// What lies in a flattened parameter.
pub(super) struct Layout {
    /// Names and shapes, in order.
    tensors: Vec<(String, Vec<usize>)>,
    /// Elements at the end of this shard that mean nothing.
    padding: usize,
}

fn key(path: &str, name: &str) -> String {
    let full = if path.is_empty() { name.to_string() } else { format!("{path}.{name}") };
    WRAPPERS.iter().fold(full, |full, wrapper| full.replace(wrapper, ""))
}

/// Reads `shard_metadata`; it is empty where there is none.
pub(super) fn metadata(pickle: &Pickle) -> Result<Metadata> {
    let mut metadata = Metadata::new();
    let Some(all) = pickle.get(pickle.root(), "shard_metadata") else { return Ok(metadata) };
    if matches!(pickle.value(all), Value::None) {
        return Ok(metadata);
    }
    let modules = pickle.get(all, "param_metadata").and_then(|list| pickle.items(list));
    let modules = modules.context("shard_metadata has no list param_metadata")?;
    let mut total = 0;
    for module in modules {
        let path = pickle.get(*module, "fsdp_path").and_then(|path| pickle.text(path));
        let path = path.context("a module in shard_metadata has no fsdp_path")?;
        let params = pickle.get(*module, "params").and_then(|params| pickle.dict(params));
        let params =
            params.with_context(|| format!("module {} in shard_metadata has no params", short(path)))?;
        for (name, layout) in params {
            let name = pickle.text(*name).context("a flattened parameter has a name that is no text")?;
            ensure!(
                path.len() + name.len() < MAX_NAME,
                "the name {}.{} is too long",
                short(path),
                short(name)
            );
            let place = key(path, name);
            let layout = layout_of(pickle, path, *layout, &mut total);
            let layout = layout.with_context(|| format!("{place} in shard_metadata"))?;
            metadata.insert(place, layout);
        }
    }
    Ok(metadata)
}

fn layout_of(pickle: &Pickle, path: &str, layout: Id, total: &mut usize) -> Result<Layout> {
    let list = |key: &str| {
        let list = pickle.get(layout, key).and_then(|list| pickle.items(list));
        list.with_context(|| format!("has no list {key}"))
    };
    let (names, shapes, numels) = (list("names")?, list("shapes")?, list("numels")?);
    ensure!(
        names.len() == shapes.len() && names.len() == numels.len(),
        "has {} names, {} shapes and {} numels",
        names.len(),
        shapes.len(),
        numels.len()
    );
    // A list may be referred to many times; a real one is not.
    *total += names.len();
    ensure!(*total <= pickle.len(), "lists the same tensors again and again");
    let padding = pickle.get(layout, "padding").and_then(|n| pickle.size(n)).context("has no padding")?;
    let mut tensors = Vec::new();
    for ((name, shape), numel) in names.iter().zip(shapes).zip(numels) {
        let name = pickle.text(*name).context("has a name that is no text")?;
        ensure!(path.len() + name.len() < MAX_NAME, "the name {}.{} is too long", short(path), short(name));
        let shape = pickle.sizes(*shape).with_context(|| format!("{name}: its shape is no list of sizes"))?;
        let count = elements(&shape).with_context(|| format!("{name}: shape {shape:?} is too large"))?;
        ensure!(
            pickle.size(*numel) == Some(count),
            "{name}: shape {shape:?} has {count} elements, numels says {}",
            pickle.describe(*numel)
        );
        tensors.push((key(path, name), shape));
    }
    Ok(Layout { tensors, padding })
}

/// Makes one dictionary of plain tensors out of the shards of a part.
pub(super) fn unflatten(shards: Vec<(StateDict, Metadata)>) -> Result<StateDict> {
    let shards: Vec<(StateDict, Metadata)> = shards
        .into_iter()
        .map(|(state, metadata)| {
            (state.into_iter().map(|(name, flat)| (key("", &name), flat)).collect(), metadata)
        })
        .collect();
    let mut plain = StateDict::new();
    let mut flattened = 0;
    let first = shards.first().context("there is no shard")?;
    for (name, tensor) in &first.0 {
        if !name.rsplit('.').next().is_some_and(|last| last.starts_with(FLAT)) {
            insert(&mut plain, name.clone(), tensor.clone())?; // never flattened, so every shard has it whole
            continue;
        }
        flattened += 1;
        let mut data = Strand::default();
        for (i, (state, metadata)) in shards.iter().enumerate() {
            let place = || format!("tensor {name} in shard {i}");
            let part = state.get(name).with_context(|| format!("{} is missing", place()))?;
            let layout = metadata.get(name).with_context(|| format!("shard_metadata has no {}", place()))?;
            ensure!(
                part.dtype == tensor.dtype && part.shape.len() == 1 && layout.padding <= part.shape[0],
                "{} is {} {:?} with padding {}; expected a vector of {}, padding included",
                place(),
                part.dtype,
                part.shape,
                layout.padding,
                tensor.dtype
            );
            data.extend(part.data.slice(0..(part.shape[0] - layout.padding) * part.dtype.size()));
        }
        let mut at = 0usize;
        for (inner, shape) in &first.1[name].tensors {
            let bytes = elements(shape).and_then(|n| n.checked_mul(tensor.dtype.size()));
            let end = bytes.and_then(|bytes| at.checked_add(bytes)).filter(|end| *end <= data.len());
            let end = end.with_context(|| {
                format!("tensor {inner} with shape {shape:?} goes beyond the {} bytes of {name}", data.len())
            })?;
            let flat = Flat { dtype: tensor.dtype, shape: shape.clone(), data: data.slice(at..end) };
            insert(&mut plain, inner.clone(), flat)?;
            at = end;
        }
        ensure!(
            at == data.len(),
            "{name} has {} bytes, but the tensors in it, as shard_metadata lists them, have {at}",
            data.len()
        );
    }
    ensure!(
        flattened > 0 || shards.len() == 1,
        "there are {} shards, but nothing in them is flattened ({FLAT}0)",
        shards.len()
    );
    Ok(plain)
}

fn insert(plain: &mut StateDict, name: String, flat: Flat) -> Result<()> {
    ensure!(!plain.contains_key(&name), "tensor {name} is there twice");
    plain.insert(name, flat);
    Ok(())
}
