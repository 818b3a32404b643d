//! Files of `torch.save`: a zip archive with a pickle and one entry for each storage.

use super::dtype::Dtype;
use super::pickle::write::{Item, pickle};
use super::pickle::{Id, Pickle, Value, short};
use super::stored::Sink;
use super::stored::{Flat, elements};
use super::strand::{Mapped, Strand};
use super::zip;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::io::{Seek, Write};
use std::path::Path;
use std::sync::Arc;

/// Folder in the archives that we write; any name will do.
const FOLDER: &str = "archive";

/// An open file.
pub(super) struct TorchFile {
    file: Arc<Mapped>,
    /// The storages by their keys.
    storages: BTreeMap<String, zip::Entry>,
    pickle: zip::Entry,
}

/// Tensors by name.
pub(super) type StateDict = BTreeMap<String, Flat>;

impl TorchFile {
    /// Maps a file and reads its directory.
    pub(super) fn open(path: &Path) -> Result<TorchFile> {
        let file = Mapped::open(path)?;
        let open = || -> Result<(BTreeMap<String, zip::Entry>, zip::Entry)> {
            ensure!(
                !file.bytes().starts_with(&[0x80, 2, 0x8a, 0x0a]),
                "it is in the format of PyTorch before 1.6; load it with PyTorch and save it again"
            );
            ensure!(zip::is_zip(file.bytes()), "it is no zip archive, which torch.save writes");
            let entries = zip::entries(&file)?;
            let is_pickle =
                |e: &&zip::Entry| e.name.split_once('/').is_some_and(|(_, name)| name == "data.pkl");
            let pickle = entries.iter().find(is_pickle).context("the archive has no data.pkl")?.clone();
            let folder = pickle.name.trim_end_matches("data.pkl");
            if let Some(order) = entries.iter().find(|e| e.name.strip_prefix(folder) == Some("byteorder")) {
                let order = &file.bytes()[order.range.clone()];
                ensure!(order == b"little", "its numbers are not little-endian");
            }
            let folder = format!("{folder}data/");
            let storages =
                entries.iter().filter_map(|e| Some((e.name.strip_prefix(&folder)?.into(), e.clone())));
            Ok((storages.collect(), pickle))
        };
        let (storages, pickle) = open().with_context(|| format!("cannot use {}", path.display()))?;
        Ok(TorchFile { storages, pickle, file })
    }

    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Reads the pickle.
    pub(super) fn pickle(&self) -> Result<Pickle<'_>> {
        Pickle::read(&self.file.bytes()[self.pickle.range.clone()])
            .with_context(|| format!("cannot use {}", self.path().display()))
    }

    /// The tensors of a dictionary, but for those whose names `skip` picks.
    pub(super) fn tensors(
        &self,
        pickle: &Pickle,
        dict: Id,
        skip: &dyn Fn(&str) -> bool,
    ) -> Result<StateDict> {
        let read = || -> Result<StateDict> {
            let items = pickle.dict(dict);
            let items = items.with_context(|| format!("the weights are {}", pickle.describe(dict)))?;
            let mut tensors = StateDict::new();
            for (key, value) in items {
                let name = pickle.text(*key).context("the weights have a name that is no text")?;
                if !skip(name) {
                    let tensor = self.tensor(pickle, *value);
                    tensors.insert(name.into(), tensor.with_context(|| format!("tensor {}", short(name)))?);
                }
            }
            Ok(tensors)
        };
        read().with_context(|| format!("cannot use {}", self.path().display()))
    }

    /// A tensor, where it lies in the file.
    fn tensor(&self, pickle: &Pickle, id: Id) -> Result<Flat> {
        let made = || format!("is {}, not a tensor that can be read", pickle.describe(id));
        let Value::Call { callee, args, .. } = pickle.value(id) else { bail!(made()) };
        let args = pickle.items(*args).with_context(made)?;
        match (pickle.global(*callee), args) {
            (Some(("torch._utils", "_rebuild_tensor_v2")), [storage, offset, shape, stride, ..]) => {
                self.rebuild(pickle, *storage, *offset, *shape, *stride)
            }
            (Some(("torch._utils", "_rebuild_parameter")), [data, ..]) => match pickle.value(*data) {
                // One layer only: a parameter of a parameter is nothing that PyTorch writes, and this must end.
                Value::Call { callee, args, .. }
                    if pickle.global(*callee) == Some(("torch._utils", "_rebuild_tensor_v2")) =>
                {
                    match pickle.items(*args) {
                        Some([storage, offset, shape, stride, ..]) => {
                            self.rebuild(pickle, *storage, *offset, *shape, *stride)
                        }
                        _ => bail!(made()),
                    }
                }
                _ => bail!(made()),
            },
            _ => bail!(made()),
        }
    }

    fn rebuild(&self, pickle: &Pickle, storage: Id, offset: Id, shape: Id, stride: Id) -> Result<Flat> {
        let Value::Persistent(reference) = pickle.value(storage) else {
            bail!("its storage is {}", pickle.describe(storage));
        };
        let Some([kind, class, key, _device, count]) = pickle.items(*reference) else {
            bail!("its storage is referred to by {}", pickle.describe(*reference));
        };
        ensure!(pickle.text(*kind) == Some("storage"), "its storage is {}", pickle.describe(*kind));
        let dtype = match pickle.global(*class) {
            Some(("torch", "FloatStorage")) => Dtype::F32,
            Some(("torch", "HalfStorage")) => Dtype::F16,
            Some(("torch", "BFloat16Storage")) => Dtype::BF16,
            _ => bail!(
                "its storage is {}; weights are in FloatStorage, HalfStorage or BFloat16Storage",
                pickle.describe(*class)
            ),
        };
        let key = pickle.text(*key).with_context(|| format!("its storage is {}", pickle.describe(*key)))?;
        let entry = self.storages.get(key);
        let entry =
            entry.with_context(|| format!("its storage data/{} is not in the archive", short(key)))?;
        let count = pickle.size(*count).context("the length of its storage is no size")?;
        let size = dtype.size();
        ensure!(
            count.checked_mul(size) == Some(entry.range.len()),
            "its storage data/{} has {} bytes, but should have {count} elements of {dtype}",
            short(key),
            entry.range.len()
        );
        let offset = pickle.size(offset).context("its offset is no size")?;
        let shape = pickle.sizes(shape).context("its shape is no list of sizes")?;
        let stride = pickle.sizes(stride).context("its strides are no list of sizes")?;
        let len = elements(&shape).with_context(|| format!("its shape {shape:?} is too large"))?;
        let in_order = |i: usize| {
            shape[i] == 1
                || shape[i + 1..].iter().try_fold(1usize, |n, x| n.checked_mul(*x)) == Some(stride[i])
        };
        ensure!(
            stride.len() == shape.len() && (len == 0 || (0..shape.len()).all(in_order)),
            "its elements are not in order (shape {shape:?}, strides {stride:?}); call contiguous() before saving"
        );
        let end = offset.checked_add(len).filter(|end| *end <= count);
        let end = end.with_context(|| {
            format!("shape {shape:?} at offset {offset} does not fit its storage of {count} elements")
        })?;
        let range = entry.range.start + offset * size..entry.range.start + end * size;
        let data = Strand::of(&self.file, range).context("its storage is not in the file")?;
        Ok(Flat { dtype, shape, data })
    }

    /// Compares the content of every entry with its checksum. Returns what is damaged.
    pub(super) fn damage(path: &Path) -> Result<Vec<String>> {
        let file = Mapped::open(path)?;
        let entries = zip::entries(&file).with_context(|| format!("cannot use {}", path.display()))?;
        let wrong = |e: &zip::Entry| {
            let crc = crc32fast::hash(&file.bytes()[e.range.clone()]);
            let (name, wanted) = (&e.name, e.crc32);
            (crc != wanted).then(|| {
                format!("{}: CRC-32 of {name} is {crc:08x}, the archive says {wanted:08x}", path.display())
            })
        };
        Ok(entries.iter().filter_map(wrong).collect())
    }
}

/// Writes a file of `torch.save`. The tensors in `root` refer to storages by number; `lengths` has their bytes, and
/// `content` hands over one of them, piece by piece.
pub(super) fn write<W: Write + Seek>(
    out: W,
    root: &Item,
    lengths: &[u64],
    content: &mut dyn FnMut(usize, &mut Sink) -> Result<()>,
) -> Result<W> {
    let mut archive = zip::Writer::new(out);
    let small = |archive: &mut zip::Writer<W>, name: &str, bytes: &[u8]| {
        archive.add(&format!("{FOLDER}/{name}"), bytes.len() as u64, |sink| sink(bytes))
    };
    small(&mut archive, "data.pkl", &pickle(root))?;
    small(&mut archive, "byteorder", b"little")?;
    for (index, length) in lengths.iter().enumerate() {
        archive.add(&format!("{FOLDER}/data/{index}"), *length, |sink| content(index, sink))?;
    }
    small(&mut archive, "version", b"3\n")?;
    archive.finish()
}
