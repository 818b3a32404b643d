//! `manifest.json`: what a checkpoint is and what its files must be.

use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Name of the manifest in a checkpoint directory.
pub(super) const FILE: &str = "manifest.json";
const FORMAT: &str = "ferropt-checkpoint";
/// Version of the layout; raised when an older program could not read what a newer one writes.
const VERSION: u32 = 1;

/// Where a run stands: enough, with the tensors, to go on as if it had never stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Optimiser steps done.
    pub step: u64,
    /// Training tokens consumed.
    pub tokens: u64,
    /// Times that the run was rolled back before. A checkpoint with more of them is the newer one, whatever the steps: a
    /// roll-back leaves checkpoints of later steps behind, which are not to be resumed from.
    #[serde(default)]
    pub rollbacks: u64,
    /// Whether it was saved before a checkpoint was due, as at a stop. Such ones do not count among the last that are kept.
    #[serde(default)]
    pub early: bool,
    /// Seed that all random streams of the run derive from.
    pub seed: u64,
    /// Model configuration.
    pub model: Value,
    /// Run configuration with every default filled in.
    pub config: Value,
    /// Whatever else the training loop wants back. Finite floats come back to the bit; NaN and infinities become
    /// `null`, as JSON has none.
    pub loop_state: Value,
}

/// Shape, type and place of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Global shape.
    pub shape: Vec<usize>,
    /// Element type, under safetensors' names: `F32` or `BF16`.
    pub dtype: Dtype,
    /// Shard that holds it.
    pub file: String,
}

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Size in bytes.
    pub bytes: u64,
    /// CRC-32C (Castagnoli) of the content, 8 hexadecimal digits. It finds every burst of damage up to 32 bits and
    /// all but one in 2^32 of the rest, at memory speed.
    pub crc32c: String,
}

/// The manifest of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always `ferropt-checkpoint`.
    pub format: String,
    /// Version of the layout.
    pub version: u32,
    /// Program that wrote it, with its version.
    pub program: String,
    /// Where the run stands.
    pub run: RunState,
    /// Tensors by group and name.
    pub groups: BTreeMap<String, BTreeMap<String, TensorEntry>>,
    /// Every file of the directory except the manifest.
    pub files: BTreeMap<String, FileEntry>,
}

/// Eight hexadecimal digits of a checksum.
pub(super) fn hex(crc: u32) -> String {
    format!("{crc:08x}")
}

/// End of a manifest: its own checksum, as the last member of the object. The checksum covers all bytes before.
fn seal(body: &[u8]) -> String {
    format!(",\n  \"crc32c\": \"{}\"\n}}\n", hex(crc32c::crc32c(body)))
}

impl Manifest {
    pub(super) fn new(run: RunState) -> Manifest {
        Manifest {
            format: FORMAT.into(),
            version: VERSION,
            program: concat!("ferropt ", env!("CARGO_PKG_VERSION")).into(),
            run,
            groups: BTreeMap::new(),
            files: BTreeMap::new(),
        }
    }

    /// JSON text whose last member is the checksum of all text before it.
    ///
    /// # Errors
    /// When the manifest cannot be written as JSON.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self).context("the manifest does not turn into JSON")?;
        text.truncate(text.len() - "\n}".len());
        let seal = seal(&text);
        text.extend_from_slice(seal.as_bytes());
        Ok(text)
    }

    /// Reads what [`Manifest::to_bytes`] wrote.
    ///
    /// # Errors
    /// When any byte has changed, the text is not a Ferropt manifest, or a newer Ferropt wrote it.
    pub fn from_bytes(text: &[u8]) -> Result<Manifest> {
        let sealed = text.len().checked_sub(seal(b"").len()).map(|end| text.split_at(end));
        let Some((body, _)) = sealed.filter(|(body, end)| seal(body).as_bytes() == *end) else {
            // Tell a foreign or newer file from a damaged one: its owner needs other advice.
            if let Ok(value) = serde_json::from_slice::<Value>(text)
                && value.get("format").and_then(Value::as_str) != Some(FORMAT)
            {
                bail!("it is not the manifest of a Ferropt checkpoint (\"format\" is not {FORMAT:?})");
            }
            bail!("its checksum does not match its content: it was damaged, cut short or edited");
        };
        let body = [body, b"}"].concat();
        let value: Value = serde_json::from_slice(&body).context("it is not JSON")?;
        let version = value.get("version").and_then(Value::as_u64);
        ensure!(
            version == Some(u64::from(VERSION)),
            "its layout has version {}, this program reads version {VERSION}: use the Ferropt that wrote it ({})",
            version.map_or("?".into(), |v| v.to_string()),
            value.get("program").and_then(Value::as_str).unwrap_or("unknown")
        );
        let manifest: Manifest = serde_json::from_value(value).context("its content is not as expected")?;
        ensure!(manifest.format == FORMAT, "\"format\" is {:?}, expected {FORMAT:?}", manifest.format);
        manifest.check_names()?;
        Ok(manifest)
    }

    /// Files stay inside the directory, and every tensor is in a listed one.
    fn check_names(&self) -> Result<()> {
        for name in self.files.keys() {
            let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0']);
            ensure!(plain && name != FILE, "it lists a file named {name:?}, which no checkpoint has");
        }
        for (group, tensors) in &self.groups {
            for (name, tensor) in tensors {
                ensure!(
                    self.files.contains_key(&tensor.file),
                    "tensor {name} of group {group} is said to be in {:?}, which is not in the list of files",
                    tensor.file
                );
            }
        }
        Ok(())
    }

    /// Size of all files together, the manifest not counted.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|file| file.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn example() -> Manifest {
        let mut manifest = Manifest::new(RunState {
            step: 7,
            tokens: u64::MAX,
            rollbacks: 0,
            early: false,
            seed: u64::MAX - 1,
            model: json!({"layers": 2}),
            config: json!({"train": {"steps": 10}}),
            loop_state: json!({"ema": 0.1 + 0.2, "scale": f64::MIN_POSITIVE}),
        });
        let file = "model.safetensors".to_string();
        manifest.files.insert(file.clone(), FileEntry { bytes: 4, crc32c: hex(1) });
        let tensor = TensorEntry { shape: vec![1], dtype: Dtype::F32, file };
        manifest.groups.entry("model".into()).or_default().insert("w".into(), tensor);
        manifest
    }

    #[test]
    fn comes_back_to_the_bit_and_is_plain_json() {
        let text = example().to_bytes().unwrap();
        assert_eq!(Manifest::from_bytes(&text).unwrap(), example());
        let value: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(value["run"]["step"], 7);
        assert_eq!(value["crc32c"].as_str().unwrap().len(), 8);
    }

    #[test]
    fn any_changed_or_missing_byte_is_found() {
        let text = example().to_bytes().unwrap();
        for place in 0..text.len() {
            for flip in [1u8, 0x20, 0x80, 0xff] {
                let mut damaged = text.clone();
                damaged[place] ^= flip;
                assert!(Manifest::from_bytes(&damaged).is_err(), "byte {place} ^ {flip:#x}");
            }
            assert!(Manifest::from_bytes(&text[..place]).is_err(), "cut at {place}");
        }
    }

    #[test]
    fn foreign_and_newer_manifests_are_told_apart() {
        let foreign = Manifest::from_bytes(br#"{"metadata": {"total_size": 5}}"#).unwrap_err().to_string();
        assert!(foreign.contains("not the manifest of a Ferropt checkpoint"), "{foreign}");
        let mut newer = example();
        newer.version = 2;
        newer.program = "ferropt 9.9.9".into();
        let newer = Manifest::from_bytes(&newer.to_bytes().unwrap()).unwrap_err().to_string();
        assert!(newer.contains("version 2") && newer.contains("ferropt 9.9.9"), "{newer}");
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in ["../model.safetensors", "/etc/passwd", "", ".hidden", FILE] {
            let mut manifest = example();
            manifest.files.insert(name.into(), FileEntry { bytes: 0, crc32c: hex(0) });
            assert!(Manifest::from_bytes(&manifest.to_bytes().unwrap()).is_err(), "{name:?}");
        }
        let mut manifest = example();
        manifest.groups.get_mut("model").unwrap().get_mut("w").unwrap().file = "other".into();
        assert!(Manifest::from_bytes(&manifest.to_bytes().unwrap()).is_err());
    }
}
