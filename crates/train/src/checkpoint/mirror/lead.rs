//! Which checkpoint all ranks upload: the first one says it in a file beside the checkpoints, and the others follow.
//!
//! Each would otherwise take the newest that it knows of at the moment when it is ready, and ranks that are not equally fast
//! would upload parts of different checkpoints, none of which would ever be whole.

use super::super::output::{remove, write_at_once};
use super::super::team::Team;
use super::remote::Name;
use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};

const FILE: &str = ".uploading";

/// The word of the first rank of one start of a run.
#[derive(Debug)]
pub(super) struct Lead {
    file: PathBuf,
    team: Team,
}

impl Lead {
    /// Of a run whose checkpoints are in folder `root`.
    ///
    /// # Errors
    /// When the first rank cannot write there.
    pub(super) fn open(root: &Path, team: Team) -> Result<Lead> {
        let lead = Lead { file: root.join(FILE), team };
        if lead.is_first() {
            lead.write("")?;
        }
        Ok(lead)
    }

    /// Whether this is the rank that leads.
    pub(super) fn is_first(&self) -> bool {
        self.team.share.rank == 0
    }

    /// The first rank: from now on all upload this one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn name(&self, name: &Name) -> Result<()> {
        self.write(&name.text)
    }

    /// What the first rank has said last: the folder of a copy, or nothing yet. None if the first rank is not there.
    pub(super) fn named(&self) -> Option<String> {
        let said = fs::read_to_string(&self.file).ok()?;
        let (attempt, name) = said.split_once(' ')?;
        (attempt == format!("{:x}", self.team.attempt)).then(|| name.into())
    }

    /// The first rank: there will be no more. Also possible on a full disk.
    pub(super) fn close(&self) {
        if self.is_first() {
            // Another start of the run takes no notice of what is left.
            let _ = remove(&self.file);
        }
    }

    fn write(&self, name: &str) -> Result<()> {
        // Nobody follows one that is alone.
        if self.team.share.of == 1 {
            return Ok(());
        }
        write_at_once(&self.file, format!("{:x} {name}", self.team.attempt).as_bytes())
    }
}
