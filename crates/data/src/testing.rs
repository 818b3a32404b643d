//! Help for tests.

use std::path::{Path, PathBuf};

/// A path in the folder of shared data (`../shared` beside the workspace, or `FERROPT_SHARED`); says so and returns
/// nothing when it is not there.
pub(crate) fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("FERROPT_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"), PathBuf::from);
    let found = root.join(path);
    if !found.exists() {
        println!("skipped: {} is not there", found.display());
        return None;
    }
    Some(found)
}
