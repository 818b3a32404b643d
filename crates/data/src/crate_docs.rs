//! A corpus that is already on the machine: the documentation of the crates that a `Cargo.lock` pins.
//!
//! It is taken from the archives that cargo downloaded, whose checksums the lock file holds, so everyone who builds the
//! same version has the same text: doc comments and Markdown, in a fixed order, without anything twice.

use crate::{Document, Split};
use anyhow::{Context, Result, bail, ensure};
use flate2::read::GzDecoder;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Documentation taken from one crate at most, bytes: no crate sets the tone.
const PER_CRATE: usize = 512 << 10;
/// Documentation taken in all, bytes: more would not be read in the minutes that a quick start has.
const IN_ALL: usize = 16 << 20;
/// Longer files are generated or data.
const LONGEST_FILE: u64 = 256 << 10;
/// Longer lines are not meant to be read.
const LONGEST_LINE: usize = 1000;
/// Shorter documents are not worth their `</s>`.
const SHORTEST_DOCUMENT: usize = 200;
/// Less text than this is no corpus.
const LEAST: usize = 1 << 20;
/// One crate in so many is held out for validation.
const HELD_OUT: u8 = 16;

/// Documentation of crates.
#[derive(Clone, Debug, Default)]
pub struct CrateDocs {
    /// The documentation; whole crates are held out, and none of their comments and sections is in the training part.
    pub split: Split,
    /// Crates with any documentation, as `name-version`.
    pub crates: Vec<String>,
    /// Crates whose archive is not on this machine: those for other systems, which cargo does not download.
    pub missing: Vec<String>,
}

#[derive(Deserialize)]
struct Lock {
    package: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    /// SHA-256 of the archive; absent for packages that come from no registry.
    checksum: Option<String>,
}

impl Package {
    fn id(&self) -> String {
        format!("{}-{}", self.name, self.version)
    }

    /// Decides about order and holding out; the same for all versions of a crate.
    fn hash(&self) -> [u8; 32] {
        Sha256::digest(&self.name).into()
    }
}

/// The folder of cargo's downloaded archives: `$CARGO_HOME/registry/cache`.
pub fn registry_cache() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").filter(|h| !h.is_empty()).map(PathBuf::from);
    home.or_else(|| Some(std::env::home_dir()?.join(".cargo")))
        .map(|home| home.join("registry").join("cache"))
}

impl CrateDocs {
    /// Collects the documentation of the crates of a lock file from the archives below `cache` (one folder per
    /// registry).
    ///
    /// # Errors
    /// When an archive is damaged, or when there is too little text to train on; the message says what to do.
    pub fn collect(lock: &str, cache: &Path) -> Result<CrateDocs> {
        let mut packages = toml::from_str::<Lock>(lock).context("not a Cargo.lock")?.package;
        packages.retain(|p| p.checksum.is_some());
        packages.sort_by_key(|p| (p.hash(), p.version.clone()));
        let mut registries: Vec<PathBuf> = fs::read_dir(cache)
            .and_then(|entries| entries.map(|e| Ok(e?.path())).collect())
            .with_context(|| format!("cannot list cargo's downloaded crates in {}", cache.display()))?;
        registries.sort();

        let mut docs = CrateDocs::default();
        let mut seen = HashSet::new();
        let mut bytes = 0;
        // The held-out crates come last, so that what they share with others is left to the training text.
        let (held_out, train): (Vec<_>, Vec<_>) =
            packages.iter().partition(|p| p.hash()[31].is_multiple_of(HELD_OUT));
        for (packages, documents) in [(train, &mut docs.split.train), (held_out, &mut docs.split.held_out)] {
            for package in packages {
                let id = package.id();
                let archive = registries.iter().map(|r| r.join(format!("{id}.crate"))).find(|a| a.exists());
                let Some(archive) = archive else {
                    docs.missing.push(id);
                    continue;
                };
                let budget = PER_CRATE.min(IN_ALL.saturating_sub(bytes));
                let found = read_crate(&archive, package, budget, &mut seen)
                    .with_context(|| format!("cannot use {}", archive.display()))?;
                if !found.is_empty() {
                    bytes += found.iter().map(|d| d.text.len()).sum::<usize>();
                    docs.crates.push(id);
                    documents.extend(found);
                }
            }
        }
        docs.missing.sort();
        if bytes < LEAST || docs.split.held_out.is_empty() {
            bail!(
                "only {bytes} bytes of documentation are in {}: {} of {} crates are there",
                cache.display(),
                packages.len() - docs.missing.len(),
                packages.len()
            );
        }
        Ok(docs)
    }
}

/// The documents of one archive, in the order of paths, up to `budget` bytes. Blocks in `seen` are left out.
fn read_crate(
    archive: &Path,
    package: &Package,
    budget: usize,
    seen: &mut HashSet<[u8; 32]>,
) -> Result<Vec<Document>> {
    let bytes = fs::read(archive)?;
    let hex: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    ensure!(
        package.checksum.as_deref() == Some(&hex),
        "its checksum is not the one in Cargo.lock; delete it and run `cargo fetch`"
    );
    let mut files = Vec::new();
    for entry in tar::Archive::new(GzDecoder::new(bytes.as_slice())).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.to_string_lossy().into_owned();
        if entry.size() <= LONGEST_FILE && (path.ends_with(".rs") || is_prose(&path)) {
            let mut text = String::new();
            // What is not UTF-8 is not documentation.
            if entry.read_to_string(&mut text).is_ok() {
                files.push((path, text));
            }
        }
    }
    files.sort();

    let (mut documents, mut left) = (Vec::new(), budget);
    for (path, text) in files {
        let blocks = if path.ends_with(".rs") { doc_comments(&text) } else { sections(&text) };
        let mut text = String::new();
        for block in blocks {
            let block = block.trim();
            if block.is_empty() || block.lines().any(|l| l.len() > LONGEST_LINE) {
                continue;
            }
            if !seen.insert(Sha256::digest(block).into()) {
                continue;
            }
            if !text.is_empty() {
                text += "\n\n";
            }
            text += block;
        }
        if text.len() > left {
            break;
        }
        if text.len() >= SHORTEST_DOCUMENT {
            left -= text.len();
            documents.push(Document { name: path, text });
        }
    }
    Ok(documents)
}

/// Whether a Markdown file is written to be read from start to end, unlike lists of changes, rules and licences.
fn is_prose(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path).to_lowercase();
    name.ends_with(".md")
        && ![
            "change",
            "release",
            "history",
            "news",
            "licen",
            "copying",
            "code_of_conduct",
            "contributing",
            "security",
        ]
        .iter()
        .any(|n| name.starts_with(n))
}

/// The doc comments of a Rust file, one block each, as Markdown.
fn doc_comments(source: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut block = Markdown::default();
    for line in source.lines() {
        let line = line.trim();
        let text =
            line.strip_prefix("//!").or_else(|| line.strip_prefix("///").filter(|l| !l.starts_with('/')));
        match text {
            Some(text) => block.push(text.strip_prefix(' ').unwrap_or(text)),
            None => blocks.extend(block.take()),
        }
    }
    blocks.extend(block.take());
    blocks
}

/// The sections of a Markdown file, one block each.
fn sections(source: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut block = Markdown::default();
    for line in source.lines() {
        if line.starts_with('#') && !block.in_code {
            blocks.extend(block.take());
        }
        block.push(line);
    }
    blocks.extend(block.take());
    blocks
}

/// Markdown without what readers do not see.
#[derive(Default)]
struct Markdown {
    text: String,
    in_code: bool,
}

impl Markdown {
    fn push(&mut self, line: &str) {
        let line = line.trim_end();
        let fence = line.trim_start().starts_with("```");
        let unseen = if self.in_code {
            // Lines of examples that rustdoc hides.
            line.trim() == "#" || line.trim_start().starts_with("# ")
        } else {
            // Targets of links, and badges.
            line.starts_with("[![") || line.starts_with('[') && line.contains("]: ")
        };
        self.in_code ^= fence;
        if !unseen {
            self.text += line;
            self.text.push('\n');
        }
    }

    /// The block so far; the next one starts afresh.
    fn take(&mut self) -> Option<String> {
        let block = std::mem::take(self).text;
        (!block.is_empty()).then_some(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes an archive to the cache and returns its entry of the lock file.
    fn archive(cache: &Path, name: &str, version: &str, files: &[(&str, &[u8])]) -> String {
        let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(vec![], flate2::Compression::fast()));
        for (path, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, format!("{name}-{version}/{path}"), *bytes).unwrap();
        }
        let bytes = tar.into_inner().unwrap().finish().unwrap();
        fs::create_dir_all(cache.join("index")).unwrap();
        fs::write(cache.join(format!("index/{name}-{version}.crate")), &bytes).unwrap();
        let sum: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        format!(
            "[[package]]\nname = \"{name}\"\nversion = \"{version}\"\nsource = \"x\"\nchecksum = \"{sum}\"\n"
        )
    }

    /// Documentation that is unlike that of any other `seed`.
    fn prose(seed: &str, bytes: usize) -> String {
        let mut text = String::from("//! A module.\n\n");
        let mut i = 0;
        while text.len() < bytes {
            text += &format!(
                "/// The {seed} number {i} is what comes before number {}.\nfn f{i}() {{}}\n",
                i + 1
            );
            i += 1;
        }
        text
    }

    /// Enough crates to have some on both sides.
    fn registry(cache: &Path) -> String {
        let mut lock = "[[package]]\nname = \"ours\"\nversion = \"0.1.0\"\n".to_owned();
        for i in 0..40 {
            let name = format!("crate{i}");
            lock += &archive(cache, &name, "1.0.0", &[("src/lib.rs", prose(&name, 60_000).as_bytes())]);
        }
        lock
    }

    #[test]
    fn the_same_archives_give_the_same_corpus_with_whole_crates_held_out() {
        let dir = tempfile::tempdir().unwrap();
        let lock = registry(dir.path());
        let docs = CrateDocs::collect(&lock, dir.path()).unwrap();
        assert_eq!((docs.crates.len(), docs.missing.len()), (40, 0));
        let crates = |d: &[Document]| -> HashSet<String> {
            d.iter().map(|d| d.name.split('/').next().unwrap().to_owned()).collect()
        };
        let (train, held_out) = (crates(&docs.split.train), crates(&docs.split.held_out));
        assert!(train.len() > held_out.len() && !held_out.is_empty() && train.is_disjoint(&held_out));
        // The shared first line is in one document only.
        let everywhere = docs.split.train.iter().chain(&docs.split.held_out);
        assert_eq!(everywhere.filter(|d| d.text.contains("A module.")).count(), 1);

        assert_eq!(CrateDocs::collect(&lock, dir.path()).unwrap().split, docs.split);
    }

    #[test]
    fn damaged_and_missing_archives_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let lock = registry(dir.path());
        let one = dir.path().join("index/crate7-1.0.0.crate");
        let mut bytes = fs::read(&one).unwrap();
        fs::remove_file(&one).unwrap();
        assert_eq!(CrateDocs::collect(&lock, dir.path()).unwrap().missing, ["crate7-1.0.0"]);
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&one, bytes).unwrap();
        let e = format!("{:#}", CrateDocs::collect(&lock, dir.path()).unwrap_err());
        assert!(e.contains("crate7-1.0.0.crate") && e.contains("cargo fetch"), "{e}");
        let e = format!("{:#}", CrateDocs::collect(&lock, &dir.path().join("none")).unwrap_err());
        assert!(e.contains("none"), "{e}");
        fs::create_dir(dir.path().join("empty")).unwrap();
        let e = format!("{:#}", CrateDocs::collect(&lock, &dir.path().join("empty")).unwrap_err());
        assert!(e.contains("0 of 40 crates"), "{e}");
    }

    #[test]
    fn only_what_is_written_to_be_read_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let readme = "# Title\n[![badge](x)](y)\nWords about `x` and [links].\n\n[links]: https://x\n"
            .to_owned()
            + &"More words for the reader of this file. ".repeat(8);
        let source = "//! Module\n//!\n//! text.\n\n//// not a doc\n// nor this\n/// # Example\n/// ```\n/// # hidden();\n\
                      /// #[attr]\n/// shown();\n/// ```\nfn f() {}\n"
            .to_owned()
            + &"/// Words that fill the document up to its least length, one after another.\nfn g() {}\n/// x\nfn h() {}\n".repeat(3)
            + &format!("/// {}\n/// And a last one, so that the document is long enough to be taken in.", "z".repeat(90));
        let wide = format!("/// {}", "w".repeat(LONGEST_LINE + 1));
        let lock = archive(
            dir.path(),
            "a",
            "1.0.0",
            &[
                ("README.md", readme.as_bytes()),
                ("CHANGELOG.md", readme.as_bytes()),
                ("src/lib.rs", source.as_bytes()),
                ("src/wide.rs", wide.as_bytes()),
                ("src/huge.rs", prose("huge", 300_000).as_bytes()),
                ("src/latin.rs", b"/// caf\xE9"),
            ],
        );
        let package = toml::from_str::<Lock>(&lock).unwrap().package.remove(0);
        let path = dir.path().join("index/a-1.0.0.crate");
        let found = read_crate(&path, &package, PER_CRATE, &mut HashSet::new()).unwrap();
        let names: Vec<&str> = found.iter().map(|d| d.name.as_str()).collect();
        assert_eq!(names, ["a-1.0.0/README.md", "a-1.0.0/src/lib.rs"]);
        assert!(
            found[0].text.starts_with("# Title\nWords about `x` and [links].\n\nMore words"),
            "{}",
            found[0].text
        );
        assert!(
            found[1].text.starts_with("Module\n\ntext.\n\n# Example\n```\n#[attr]\nshown();\n```\n\nWords"),
            "{}",
            found[1].text
        );
        assert_eq!(found[1].text.matches("Words that fill").count(), 1);
        assert!(read_crate(&path, &package, 100, &mut HashSet::new()).unwrap().is_empty());
    }
}
