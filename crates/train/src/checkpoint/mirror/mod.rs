//! A copy of a run's checkpoints in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure, or a
//! folder.
//!
//! ```text
//! s3://bucket/prefix/step-00000100-1a2b3c4d/      step, and the checksum of the manifest
//!     model.safetensors ...                       uploaded by all ranks, each its share
//!     manifest.json                               uploaded last, so what has one is whole
//! ```
//!
//! A checkpoint is uploaded once it is durable in the run folder (in the background), and fetched where the run
//! folder has none that is as new ([`Mirror::fetch_newer`]). The name holds the manifest's checksum, and the manifest those
//! of the files: so whoever uploads into one folder uploads the same, and what was cut off is taken up where it was.

#[cfg(feature = "object-store")]
mod copies;
#[cfg(feature = "object-store")]
mod fetch;
#[cfg(feature = "object-store")]
mod lead;
#[cfg(feature = "object-store")]
mod remote;
#[cfg(feature = "object-store")]
mod upload;

#[cfg(feature = "object-store")]
pub use remote::Mirror;
#[cfg(feature = "object-store")]
pub(super) use upload::Uploads;

#[cfg(not(feature = "object-store"))]
mod absent;
#[cfg(not(feature = "object-store"))]
pub use absent::Mirror;
#[cfg(not(feature = "object-store"))]
pub(super) use absent::Uploads;

use super::retention::Retention;
use anyhow::{Context, Error, Result, ensure};
use std::fmt;

/// Where copies go, and which of them stay there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copies {
    /// As in `checkpoint.mirror`.
    pub url: String,
    /// Of the copies.
    pub retention: Retention,
}

/// A checkpoint in a mirror, as listed.
#[derive(Debug)]
pub struct Copy {
    /// Its folder there.
    pub folder: String,
    /// Step that the folder's name says.
    pub step: u64,
    /// Times that the run was rolled back before; 0 where the manifest cannot be read.
    pub rollbacks: u64,
    /// Of the files that are there.
    pub bytes: u64,
    /// How many these are.
    pub files: usize,
    /// Why it is not whole: a manifest that is not there or cannot be used, a file that is missing or has another size.
    pub damage: Option<Error>,
}

/// A mirror that did not answer, or could not: nothing is wrong with what was asked of it, and later it may work.
#[derive(Debug)]
pub struct Unreachable(pub(super) String);

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unreachable {}

/// Splits the address of a mirror into its kind, its bucket and the path within. A folder has no bucket.
///
/// # Errors
/// When this program could not use it.
pub fn parse(url: &str) -> Result<(&str, &str, &str)> {
    let expected = "s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH or file:///FOLDER";
    let (kind, rest) =
        url.split_once("://").with_context(|| format!("\"{url}\" is no address; expected {expected}"))?;
    let (bucket, path) = match kind {
        "file" => ("", rest),
        _ => rest.split_once('/').unwrap_or((rest, "")),
    };
    let known = match kind {
        "s3" | "gs" | "az" => !bucket.is_empty(),
        "file" => path.starts_with('/'),
        _ => false,
    };
    ensure!(known, "\"{url}\" cannot be used; expected {expected}");
    ensure!(
        !bucket.contains(['@', '?', '#']) && !path.contains(['?', '#']),
        "\"{url}\" has more in it than a bucket and a path; credentials come from the environment"
    );
    Ok((kind, bucket, path.trim_end_matches('/')))
}

/// Refuses an address that is wrong, or that this build cannot use.
///
/// # Errors
/// Says what to do.
pub fn check(url: &str) -> Result<()> {
    parse(url)?;
    ensure!(
        cfg!(feature = "object-store"),
        "this build has no object stores; build one that has: cargo install --path crates/ferropt --features object-store"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(parse("s3://bucket/a/b/").unwrap(), ("s3", "bucket", "a/b"));
        assert_eq!(parse("gs://bucket").unwrap(), ("gs", "bucket", ""));
        assert_eq!(parse("az://box/x").unwrap(), ("az", "box", "x"));
        assert_eq!(parse("file:///srv/copies").unwrap(), ("file", "", "/srv/copies"));
        for wrong in [
            "",
            "bucket",
            "s3:/bucket",
            "s3:///x",
            "file://x",
            "ftp://x/y",
            "s3://key:secret@bucket/x",
            "s3://b/x?y",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!(check("s3://b/x").is_ok(), cfg!(feature = "object-store"));
    }
}
