//! What a checkpoint is made from: a copy of the training state in host memory.

use super::manifest::RunState;
use anyhow::{Result, ensure};
use half::bf16;
use safetensors::Dtype;
use std::collections::BTreeSet;

/// Everything that one checkpoint holds. It owns its data, so training goes on while it is written; each tensor is
/// freed as soon as it is on disk.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Where the run stands.
    pub run: RunState,
    /// Tensors by kind: `model` (Hugging Face names), `adam_m`, `adam_v`, `momentum`.
    pub groups: Vec<Group>,
    /// Small files to keep beside the tensors (name, content), for instance `config.json` and `tokenizer.json`, so
    /// that other programs can open the directory.
    pub files: Vec<(String, Vec<u8>)>,
}

/// Tensors of one kind, stored as `NAME.safetensors`.
#[derive(Clone, Debug)]
pub struct Group {
    /// Lower-case letters, digits and `_`.
    pub name: String,
    /// Tensors with names unique in the group.
    pub tensors: Vec<Tensor>,
}

/// One global (not sharded) tensor, row-major.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Name within its group.
    pub name: String,
    /// Global shape.
    pub shape: Vec<usize>,
    /// Elements, as many as the shape says.
    pub data: Data,
}

/// Elements of a tensor.
#[derive(Clone, Debug)]
pub enum Data {
    /// IEEE single.
    F32(Vec<f32>),
    /// bfloat16.
    Bf16(Vec<bf16>),
}

impl Data {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Data::F32(values) => values.len(),
            Data::Bf16(values) => values.len(),
        }
    }

    /// True when there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> Dtype {
        match self {
            Data::F32(_) => Dtype::F32,
            Data::Bf16(_) => Dtype::BF16,
        }
    }

    /// The elements as they are stored (little-endian, as is every machine that Ferropt runs on).
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Data::F32(values) => bytemuck::cast_slice(values),
            Data::Bf16(values) => bytemuck::cast_slice(values),
        }
    }
}

#[cfg(not(target_endian = "little"))]
compile_error!("safetensors files are little-endian and are mapped as they are");

impl Snapshot {
    /// Refuses what could not be read back: names that clash or are no plain file names, data that does not fit
    /// its shape.
    pub(super) fn check(&self) -> Result<()> {
        let mut files = BTreeSet::from(["manifest.json"]);
        for (name, _) in &self.files {
            let plain = !name.is_empty()
                && !name.starts_with('.')
                && !name.ends_with(".safetensors")
                && !name.ends_with(".safetensors.index.json")
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
            ensure!(
                plain,
                "a checkpoint cannot keep a file named {name:?}: use letters, digits, '.', '_' and '-', no leading \
                 '.', and an ending other than .safetensors"
            );
            ensure!(files.insert(name), "two files of a checkpoint are named {name:?}");
        }
        let mut groups = BTreeSet::new();
        for group in &self.groups {
            let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
            ensure!(
                !group.name.is_empty() && group.name.bytes().all(plain),
                "a checkpoint group cannot be named {:?}: use lower-case letters, digits and '_'",
                group.name
            );
            ensure!(groups.insert(&group.name), "two groups of a checkpoint are named {:?}", group.name);
            let mut tensors = BTreeSet::new();
            for Tensor { name, shape, data } in &group.tensors {
                ensure!(tensors.insert(name), "group {} has two tensors named {name:?}", group.name);
                ensure!(
                    shape.iter().product::<usize>() == data.len(),
                    "tensor {name} of group {} has shape {shape:?} but {} elements",
                    group.name,
                    data.len()
                );
            }
        }
        Ok(())
    }
}
