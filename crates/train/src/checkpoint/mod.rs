//! Checkpoints: directories that any layout can read and that are never half there.
//!
//! ```text
//! RUN/checkpoints/step-00000100/
//!     model.safetensors      Hugging Face names; opens with any safetensors reader
//!     adam_m.safetensors     one group of tensors per kind of state, split in shards when large
//!     adam_v.safetensors
//!     manifest.json          step, seed, configurations, loop state; shape, dtype and file of every tensor;
//!                            size and checksum of every file, its own included
//! ```
//!
//! **Writing** ([`Writer`]): a directory `.step-00000100.tmp-...` is filled beside its final place, every file and the
//! directory are fsynced, then it is renamed and the parent is fsynced. Whatever moment the process or the machine
//! dies at, `step-00000100` is either absent or complete; left-over temporaries go at the next start. Many ranks
//! ([`Team`]) write the tensors that they own into one such directory, and the first publishes it once all have: see
//! `attempt.rs`.
//!
//! **Reading** ([`Store`]): listing believes only directories whose manifest is intact and whose files all have the
//! size that it states. Loading checks the checksum of every byte before a tensor is handed out; of many ranks, each checks
//! its share of the files. A tensor is a view of a mapped file, so that of a part of it only that part is read.

mod attempt;
mod load;
mod manifest;
pub mod mirror;
mod output;
mod retention;
mod shards;
mod snapshot;
mod store;
mod team;
mod write;
mod writer;

pub use attempt::Parting;
pub use load::{Checkpoint, TensorView, group_files, verify_group};
pub use manifest::{FileEntry, Manifest, RunState, TensorEntry};
pub(crate) use output::write_at_once;
pub use retention::Retention;
pub use safetensors::Dtype;
pub use snapshot::{Data, Group, Snapshot, Tensor};
pub use store::{Entry, Found, Store};
pub(crate) use team::deal;
pub use team::{Share, Team};
pub use write::DEFAULT_SHARD_BYTES;
pub use writer::{Event, Writer};

/// Bytes for people, in binary units: "1.46 GiB".
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.2} {}", UNITS[unit])
}

/// Bytes from people: "5GB", "500 MiB" or "1000"; at least 1.
pub fn bytes_of(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_from_people() {
        assert_eq!(super::bytes_of("5GB"), Some(5_000_000_000));
        assert_eq!(super::bytes_of("2 MiB"), Some(2 << 20));
        assert_eq!(super::bytes_of("17"), Some(17));
        for wrong in ["", "GB", "0", "-1", "5 apples", "99999999999GB"] {
            assert_eq!(super::bytes_of(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn bytes_for_people() {
        assert_eq!(super::human_bytes(1023), "1023 bytes");
        assert_eq!(super::human_bytes(1024), "1.00 KiB");
        assert_eq!(super::human_bytes(3 << 29), "1.50 GiB");
    }
}
