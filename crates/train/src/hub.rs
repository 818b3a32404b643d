//! Models that Hugging Face's tools have downloaded, under the names that they have on the hub.
//!
//! Layout of the cache, as of huggingface_hub 1.x: `models--OWNER--NAME/refs/REVISION` holds the commit that a revision
//! was when it was asked for, and `models--OWNER--NAME/snapshots/COMMIT/` the files, as links.

use anyhow::{Context, Result, ensure};
use std::borrow::Cow;
use std::env;
use std::path::{Path, PathBuf};

/// The folder of a downloaded model, if `path` is no path but a name such as `facebook/opt-125m`; otherwise `path`.
///
/// # Errors
/// When it is such a name and that model has not been downloaded, or not whole.
pub(crate) fn resolve(path: &Path) -> Result<Cow<'_, Path>> {
    match (name(path), cache()) {
        (Some(name), Some(cache)) if !path.exists() => Ok(Cow::Owned(snapshot(&cache, name)?)),
        _ => Ok(Cow::Borrowed(path)),
    }
}

/// `OWNER/NAME`, if that is what it can be.
fn name(path: &Path) -> Option<&str> {
    let (owner, name) = path.to_str()?.split_once('/')?;
    let word = |word: &str| {
        word.starts_with(|c: char| c.is_ascii_alphanumeric())
            && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    if word(owner) && word(name) { path.to_str() } else { None }
}

/// Where those tools keep what they download, by the variables that they look at.
fn cache() -> Option<PathBuf> {
    let value = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // Files of variables know no shell that would do this.
    let folder = |name| match (value(name)?, value("HOME")) {
        (path, Some(home)) => Some(path.strip_prefix("~").map(|rest| home.join(rest)).unwrap_or(path)),
        (path, None) => Some(path),
    };
    let home = || {
        let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
        folder("HF_HOME").or_else(|| Some(cache?.join("huggingface")))
    };
    let named = folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE"));
    named.or_else(|| Some(home()?.join("hub")))
}

fn snapshot(cache: &Path, name: &str) -> Result<PathBuf> {
    let model = cache.join(format!("models--{}", name.replace('/', "--")));
    let again = format!("`hf download {name}` fetches it");
    ensure!(
        model.is_dir(),
        "there is no file or folder {name}. If a model of Hugging Face's is meant, it is not in their cache {} either; {again}",
        cache.display()
    );
    let main = model.join("refs/main");
    let commit = std::fs::read_to_string(&main).with_context(|| {
        format!("{} is to say which revision of {name} was downloaded; {again}", main.display())
    })?;
    let folder = model.join("snapshots").join(commit.trim());
    ensure!(
        folder.is_dir() && !commit.trim().is_empty(),
        "{} names revision {:?} of {name}, which is not in {}; {again}",
        main.display(),
        commit.trim(),
        model.join("snapshots").display()
    );
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn only_an_owner_and_a_name_are_looked_for() {
        for yes in ["facebook/opt-125m", "a/b", "Some.Org/model_1.0-x"] {
            assert_eq!(name(Path::new(yes)), Some(yes));
        }
        for no in ["opt-125m", "runs/a/b", "/a/b", "./runs/a", "../a", "a/", "a/.b", "a b/c", "a/b?c"] {
            assert_eq!(name(Path::new(no)), None, "{no}");
        }
    }

    #[test]
    fn a_model_is_found_by_the_revision_that_was_downloaded_last() {
        let cache = tempfile::tempdir().unwrap();
        let find = || snapshot(cache.path(), "facebook/opt-125m").map_err(|e| format!("{e:#}"));
        let missing = find().unwrap_err();
        assert!(missing.contains("hf download facebook/opt-125m"), "{missing}");

        let model = cache.path().join("models--facebook--opt-125m");
        for commit in ["27dcfa74", "3d2b5f27"] {
            fs::create_dir_all(model.join("snapshots").join(commit)).unwrap();
        }
        let without = find().unwrap_err();
        assert!(without.contains("refs/main is to say which revision"), "{without}");

        fs::create_dir(model.join("refs")).unwrap();
        fs::write(model.join("refs/main"), "27dcfa74\n").unwrap();
        assert_eq!(find().unwrap(), model.join("snapshots/27dcfa74"));

        for commit in ["0000", ""] {
            fs::write(model.join("refs/main"), commit).unwrap();
            let gone = find().unwrap_err();
            assert!(gone.contains(&format!("names revision {commit:?}")), "{gone}");
        }
    }
}
