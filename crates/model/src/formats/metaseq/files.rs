//! Which files make up a checkpoint: `STEM[-model_part-P][-shardS].pt`.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The files of a checkpoint.
#[derive(Debug)]
pub(in super::super) struct Group {
    /// Folder that they lie in.
    pub(in super::super) folder: PathBuf,
    /// Shards of each part.
    pub(in super::super) parts: Vec<Vec<PathBuf>>,
}

/// Stem, part and shard in a file name; both are 0 where the name has none.
fn parse(name: &str) -> Option<(&str, usize, usize)> {
    let mut stem = name.strip_suffix(".pt")?;
    let mut take = |mark: &str| {
        let found = stem.rsplit_once(mark).and_then(|(rest, n)| Some((rest, n.parse::<u16>().ok()?)));
        found.map_or(0, |(rest, n)| {
            stem = rest;
            usize::from(n)
        })
    };
    let shard = take("-shard");
    let part = take("-model_part-");
    Some((stem, part, shard))
}

/// Files by part and shard.
type Files = BTreeMap<(usize, usize), PathBuf>;

/// The checkpoints of a folder, by stem.
fn groups(folder: &Path) -> Result<BTreeMap<String, Files>> {
    let listing = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut groups: BTreeMap<String, Files> = BTreeMap::new();
    for entry in listing {
        let path = entry.with_context(|| format!("cannot list {}", folder.display()))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some((stem, part, shard)) = parse(name) {
            let clash = groups.entry(stem.into()).or_default().insert((part, shard), path.clone());
            if let Some(other) = clash {
                bail!("{} and {} are both part {part}, shard {shard}", other.display(), path.display());
            }
        }
    }
    Ok(groups)
}

/// The one checkpoint of a folder, if it has any.
pub(in super::super) fn find(folder: &Path) -> Result<Option<Group>> {
    let mut groups = groups(folder)?;
    let named: Vec<String> = groups.keys().map(|stem| format!("{stem}.pt")).collect();
    ensure!(
        named.len() < 2,
        "{} holds several checkpoints: {}; name the one with the weights",
        folder.display(),
        named.join(", ")
    );
    groups.pop_first().map(|(_, files)| complete(folder, files)).transpose()
}

/// The checkpoint that a file is of. The file need not exist under its plain name: metaseq itself names a model of many
/// parts `reshard.pt`.
pub(in super::super) fn group_of(file: &Path) -> Result<Option<Group>> {
    let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((stem, ..)) = parse(name) else { return Ok(None) };
    let folder = match file.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Ok(None),
    };
    if !folder.is_dir() {
        return Ok(None);
    }
    groups(folder)?.remove(stem).map(|files| complete(folder, files)).transpose()
}

/// Parts and shards in order, none missing.
fn complete(folder: &Path, files: Files) -> Result<Group> {
    let count = |n: Option<usize>| n.map_or(0, |n| n + 1);
    let parts = count(files.keys().map(|k| k.0).max());
    let shards = count(files.keys().map(|k| k.1).max());
    if parts * shards != files.len() {
        let missing = files.keys().fold((0, 0), |next, found| {
            if next != *found {
                next
            } else if next.1 + 1 < shards {
                (next.0, next.1 + 1)
            } else {
                (next.0 + 1, 0)
            }
        });
        bail!(
            "{} has {} files of a checkpoint with parts up to {} and shards up to {}: part {}, shard {} is missing",
            folder.display(),
            files.len(),
            parts - 1,
            shards - 1,
            missing.0,
            missing.1
        );
    }
    let mut files = files.into_values();
    let parts = (0..parts).map(|_| files.by_ref().take(shards).collect()).collect();
    Ok(Group { folder: folder.into(), parts })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(parse("restored.pt"), Some(("restored", 0, 0)));
        assert_eq!(parse("reshard-model_part-3.pt"), Some(("reshard", 3, 0)));
        assert_eq!(parse("checkpoint_last-model_part-1-shard12.pt"), Some(("checkpoint_last", 1, 12)));
        assert_eq!(parse("checkpoint_100-shard2.pt"), Some(("checkpoint_100", 0, 2)));
        assert_eq!(parse("my-shard.pt"), Some(("my-shard", 0, 0)));
        assert_eq!(parse("dict.txt"), None);
    }

    #[test]
    fn missing_files_and_several_checkpoints_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let touch = |name: &str| fs::write(dir.path().join(name), "").unwrap();
        assert!(find(dir.path()).unwrap().is_none());
        for name in ["a-model_part-0-shard0.pt", "a-model_part-0-shard1.pt", "a-model_part-1-shard1.pt"] {
            touch(name);
        }
        let message = find(dir.path()).unwrap_err().to_string();
        assert!(message.contains("part 1, shard 0 is missing"), "{message}");
        touch("a-model_part-1-shard0.pt");
        let group = group_of(&dir.path().join("a.pt")).unwrap().unwrap();
        assert_eq!((group.parts.len(), group.parts[1].len()), (2, 2));
        touch("restored.pt");
        let message = find(dir.path()).unwrap_err().to_string();
        assert!(message.contains("several checkpoints: a.pt, restored.pt"), "{message}");
        touch("big-model_part-65535.pt");
        assert!(group_of(&dir.path().join("big.pt")).is_err());
    }
}
