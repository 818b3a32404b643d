//! Looks at a mirror from outside of a run: what is there, whether it is sound, and how to get it.

use super::super::load::Checkpoint;
use super::super::manifest::{self, Manifest};
use super::super::store::{self, Store};
use super::super::team::Share;
use super::Copy;
use super::remote::{Mirror, Name};
use anyhow::{Context, Result, anyhow, ensure};
use std::collections::BTreeMap;

impl Mirror {
    /// The checkpoints that are there, whole or not, oldest first. Manifests are read, and sizes of files are compared with them.
    ///
    /// # Errors
    /// When the mirror cannot be listed.
    pub fn list(&self) -> Result<Vec<Copy>> {
        let mut copies = self.names()?.iter().map(|name| self.look_at(name)).collect::<Result<Vec<_>>>()?;
        copies.sort_by_key(|copy| (copy.rollbacks, copy.step));
        Ok(copies)
    }

    fn look_at(&self, name: &Name) -> Result<Copy> {
        let files = self.files(name)?;
        let found = self.check_sizes(name, &files);
        Ok(Copy {
            folder: name.text.clone(),
            step: name.step,
            rollbacks: found.as_ref().map_or(0, |manifest| manifest.run.rollbacks),
            bytes: files.values().sum(),
            files: files.len(),
            damage: found.err(),
        })
    }

    fn check_sizes(&self, name: &Name, files: &BTreeMap<String, u64>) -> Result<Manifest> {
        ensure!(
            files.contains_key(manifest::FILE),
            "it has no manifest: its upload was cut off, or is not at its end yet"
        );
        let manifest = self.manifest(name)?;
        for (file, entry) in &manifest.files {
            let found = files.get(file).with_context(|| format!("{file} is missing"))?;
            ensure!(*found == entry.bytes, "{file} has {found} bytes, the manifest says {}", entry.bytes);
        }
        Ok(manifest)
    }

    /// Reads every byte of a copy and compares it with its checksum; `progress` gets the bytes that are read and all.
    /// Returns what is wrong, a line for each file.
    ///
    /// # Errors
    /// When its manifest cannot be read.
    pub fn verify(&self, copy: &Copy, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<String>> {
        let name = named(copy)?;
        let manifest = self.manifest(&name)?;
        let (mut done, all) = (0, manifest.bytes());
        let mut findings = Vec::new();
        for (file, entry) in &manifest.files {
            let mut read = 0;
            let found = self.read(&name, file, entry, &mut |piece| {
                read += piece.len() as u64;
                progress(done + read, all);
                Ok(())
            });
            findings.extend(found.err().map(|error| format!("{error:#}")));
            done += entry.bytes;
        }
        Ok(findings)
    }

    /// Fetches a copy into a run folder, like any other checkpoint of it; every byte is compared with its checksum. `progress`
    /// gets the bytes that are read and all.
    ///
    /// # Errors
    /// When a checkpoint of that step is there already, there is no room, the copy is damaged, or the mirror cannot be reached.
    /// Nothing of it is left in the folder then.
    pub fn fetch_copy(
        &self,
        copy: &Copy,
        store: &Store,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Checkpoint> {
        let place = store.path().join(store::directory(copy.step));
        ensure!(!place.exists(), "{} is there already: remove it, or choose another folder", place.display());
        let alone = &mut |said: &[u8]| Ok(vec![said.to_vec()]);
        self.fetch_one(store, Share { rank: 0, of: 1 }, &named(copy)?, alone, progress)?
    }
}

fn named(copy: &Copy) -> Result<Name> {
    Name::parse(&copy.folder).ok_or_else(|| anyhow!("{} is no checkpoint's folder", copy.folder))
}
