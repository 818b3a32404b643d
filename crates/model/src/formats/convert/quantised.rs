//! Quantised models.

use super::super::hugging_face::CONFIG;
use super::super::quantised::{KEY, Quantisation, Sum, encode, parts};
use super::super::safetensors::safetensors_header;
use super::super::source::Source;
use super::hugging_face::{index, json, names, shards};
use super::outgoing::{Block, Outgoing};
use super::{Converted, Folder, publish};
use crate::rounded::Rounded;
use anyhow::{Context, Result, bail, ensure};
use ferropt_device::WeightFormat;
use ferropt_device::quantise::{GROUP, Group, has_minima};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// What the files hold, in this order: numbers as they are, and then matrices.
enum Item<'a> {
    Plain(Outgoing<'a>),
    Matrix {
        /// In the parameter table.
        index: usize,
        /// Names of the tensors that are stacked, and the shape of each.
        names: Vec<String>,
        shape: [usize; 2],
    },
}

/// Writes `source` as a quantised model into the new folder `destination`. `round` rounds matrix number `index` of the
/// parameter table, as `quantisation` says; it is called once for each, the embeddings last and the others in the
/// table's order, and the matrix is written before it is called again. `tokenizer` replaces the tokenizer files beside
/// the source. Files are not larger than `max_shard_bytes`, but for a parameter that alone is. The folder comes into
/// being as that of [`super::convert`] does, with the same `progress`.
///
/// # Errors
/// When the source is quantised already, the folder exists or cannot be written, `round` fails, or does not return what
/// `quantisation` says; nothing is left behind then.
pub fn quantise(
    source: &Source,
    destination: &Path,
    quantisation: &Quantisation,
    tokenizer: Option<&str>,
    max_shard_bytes: u64,
    round: &mut dyn FnMut(usize) -> Result<Rounded>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Converted> {
    ensure!(max_shard_bytes > 0, "files of at most 0 bytes cannot hold a model");
    if let Some(quantisation) = source.quantisation() {
        bail!(
            "{} is quantised already ({quantisation}); quantise the model that it was made from",
            source.path().display()
        );
    }
    let format = quantisation.weights()?;
    // Looked for before the weights, which may take hours: what goes away meanwhile must not go unnoticed.
    let (files, mut config) = (source.tokenizer_files(), source.hugging_face_config()?);
    publish(destination, progress, |folder| {
        let items = items(source)?;
        let bytes = |item: &Item| item.bytes(format);
        folder.total = items.iter().map(bytes).sum();
        let shards = shards(items, max_shard_bytes, bytes);
        let (mut map, mut sums) = (BTreeMap::new(), BTreeMap::new());
        for (shard, name) in shards.iter().zip(names("model", "safetensors", shards.len())) {
            map.extend(shard.iter().flat_map(|item| item.parts(format)).map(|(t, ..)| (t, name.clone())));
            sums.insert(name.clone(), file(folder, &name, shard, format, round)?);
        }
        index(folder, "model", "safetensors", &map)?;
        config[KEY] = serde_json::to_value(quantisation.with_files(sums))?;
        if let Some(dtype) = source.dtype() {
            config["torch_dtype"] = dtype.torch_name().into();
        }
        folder.small(CONFIG, &json(&config)?)?;
        match tokenizer {
            Some(tokenizer) => folder.small("tokenizer.json", tokenizer.as_bytes()),
            None => files.iter().try_for_each(|(name, path)| folder.copy(name, path)),
        }
    })
}

fn items(source: &Source) -> Result<Vec<Item<'_>>> {
    let (mut plain, mut matrices) = (Vec::new(), Vec::new());
    for (index, parameter) in source.config().parameters().into_iter().enumerate() {
        match parameter.part_shape()[..] {
            [n, k] if parameter.is_weight() => {
                matrices.push(Item::Matrix { index, names: parameter.names, shape: [n, k] });
            }
            _ => {
                for name in parameter.names {
                    let block = Block::whole(source.tensor(&name)?);
                    plain.push(Outgoing::new(name, None, vec![block])?);
                }
            }
        }
    }
    // Wider types first keeps every tensor aligned to its elements.
    plain.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.size()));
    // The embeddings are the LM head, which is calibrated when all else is known; a head of its own is before them.
    matrices.rotate_left(1);
    Ok(plain.into_iter().map(Item::Plain).chain(matrices).collect())
}

impl Item<'_> {
    /// The tensors that it becomes.
    fn parts(&self, format: WeightFormat) -> Vec<(String, Dtype, Vec<usize>)> {
        match self {
            Item::Plain(t) => vec![(t.name.clone(), t.dtype.safetensors(), t.shape.clone())],
            Item::Matrix { names, shape, .. } => {
                names.iter().flat_map(|name| parts(name, format, *shape)).collect()
            }
        }
    }

    fn bytes(&self, format: WeightFormat) -> u64 {
        let bytes = |(_, dtype, shape): (_, Dtype, Vec<usize>)| {
            (shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64
        };
        self.parts(format).into_iter().map(bytes).sum()
    }
}

/// Writes a file, and returns what it must be like from then on.
fn file(
    folder: &mut Folder,
    name: &str,
    items: &[Item],
    format: WeightFormat,
    round: &mut dyn FnMut(usize) -> Result<Rounded>,
) -> Result<Sum> {
    let mut sum = Sum::default();
    folder.file(name, |folder, file| {
        let mut out = Summed { file, hash: crc32fast::Hasher::new(), bytes: 0 };
        let header = items.iter().flat_map(|item| item.parts(format));
        out.write_all(&safetensors_header(header)?)?;
        for item in items {
            match item {
                Item::Plain(tensor) => folder.tensor(tensor, &mut |bytes| Ok(out.write_all(bytes)?))?,
                Item::Matrix { index, names, shape } => {
                    let rounded = round(*index)?;
                    ensure!(
                        rounded.format == format
                            && [rounded.rows(), rounded.k] == [names.len() * shape[0], shape[1]],
                        "{} was rounded to {} {:?}",
                        names.join(", "),
                        rounded.format.name(),
                        [rounded.rows(), rounded.k]
                    );
                    for part in 0..names.len() {
                        let bytes = encoded(&rounded, part * shape[0]..(part + 1) * shape[0]);
                        out.write_all(&bytes).with_context(|| names[part].clone())?;
                        folder.wrote(bytes.len());
                    }
                }
            }
        }
        sum = Sum { bytes: out.bytes, crc32: format!("{:08x}", out.hash.finalize()) };
        Ok(out.file)
    })?;
    Ok(sum)
}

/// A file and the checksum of what was written to it.
struct Summed {
    file: File,
    hash: crc32fast::Hasher,
    bytes: u64,
}

impl Write for Summed {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(buf)?;
        self.hash.update(&buf[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Rows as they lie in a file: codes, scales, and minima below 8 bits.
fn encoded(rounded: &Rounded, rows: std::ops::Range<usize>) -> Vec<u8> {
    let count = rounded.row_groups();
    let groups = &rounded.groups[rows.start * count..rows.end * count];
    let rows =
        rounded.codes[rows.start * count * GROUP..rows.end * count * GROUP].chunks_exact(count * GROUP);
    let numbers = |number: fn(&Group) -> half::bf16| groups.iter().flat_map(move |g| number(g).to_le_bytes());
    let mut bytes = Vec::new();
    rows.for_each(|row| encode(rounded.format, &row[..rounded.k], &mut bytes));
    bytes.extend(numbers(|group| group.scale));
    if has_minima(rounded.format) {
        bytes.extend(numbers(|group| group.min));
    }
    bytes
}
