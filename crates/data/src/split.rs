//! Text divided into a part to train on and a part that is held out.

use crate::Corpus;
use crate::corpus::seam;
use anyhow::{Context, Result};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Documents to train on, and documents that only measure.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Documents to train on.
    pub train: Vec<Document>,
    /// Documents that are held out.
    pub held_out: Vec<Document>,
}

/// A text and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Name for people.
    pub name: String,
    /// The text.
    pub text: String,
}

impl Split {
    /// Reads at most `limit` bytes of a corpus and holds the last `1/parts` of them out. The document that lies on the
    /// border is cut between two words.
    ///
    /// # Errors
    /// Those of reading the corpus.
    pub fn tail(corpus: &Corpus, limit: usize, parts: usize) -> Result<Split> {
        let mut documents = Vec::new();
        let (mut text, mut total) = (String::new(), 0);
        for piece in corpus.pieces() {
            let piece = piece?;
            total += piece.text.len();
            text += &piece.text;
            let enough = total >= limit;
            if (piece.ends_document || enough) && !text.trim().is_empty() {
                let name = format!("document {}", documents.len() + 1);
                documents.push(Document { name, text: std::mem::take(&mut text) });
            }
            if enough {
                break;
            }
        }
        let mut left = total - total / parts;
        let mut split = Split::default();
        for document in documents {
            let length = document.text.len();
            if length <= left {
                split.train.push(document);
            } else if left == 0 {
                split.held_out.push(document);
            } else {
                let cut = seam(&document.text[..document.text.floor_char_boundary(left)]);
                let (before, after) = document.text.split_at(cut);
                let part = |text: &str| Document { name: document.name.clone(), text: text.into() };
                split.train.push(part(before));
                split.held_out.push(part(after));
            }
            left = left.saturating_sub(length);
        }
        Ok(split)
    }

    /// Bytes of text to train on, and held out.
    pub fn bytes(&self) -> (usize, usize) {
        let sum = |documents: &[Document]| documents.iter().map(|d| d.text.len()).sum();
        (sum(&self.train), sum(&self.held_out))
    }

    /// Writes `train.jsonl` and `held-out.jsonl` to a folder, with the fields `name` and `text`, and returns their
    /// paths. Files that hold the same already are left alone, so that what was made from them stays valid.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(PathBuf, PathBuf)> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let put = |name: &str, documents: &[Document]| -> Result<PathBuf> {
            let path = folder.join(name);
            let mut lines = Vec::new();
            for d in documents {
                serde_json::to_writer(&mut lines, &serde_json::json!({"name": d.name, "text": d.text}))?;
                lines.push(b'\n');
            }
            if fs::read(&path).is_ok_and(|old| old == lines) {
                return Ok(path);
            }
            let write = || -> std::io::Result<()> {
                let mut out = fs::File::create(&path)?;
                out.write_all(&lines)?;
                out.sync_all()
            };
            write().with_context(|| format!("cannot write {}", path.display()))?;
            Ok(path)
        };
        Ok((put("train.jsonl", &self.train)?, put("held-out.jsonl", &self.held_out)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(texts: &[&str], limit: usize, parts: usize) -> (Vec<String>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        for (i, text) in texts.iter().enumerate() {
            fs::write(dir.path().join(format!("{i}.txt")), text).unwrap();
        }
        let s = Split::tail(&Corpus::find(&[dir.path()], "text").unwrap(), limit, parts).unwrap();
        let texts = |d: Vec<Document>| d.into_iter().map(|d| d.text).collect();
        (texts(s.train), texts(s.held_out))
    }

    #[test]
    fn the_tail_is_held_out_and_nothing_is_lost() {
        let (train, held_out) = split(&["one two three four five", "six", "seven"], 1000, 3);
        assert_eq!(train, ["one two three four"]);
        assert_eq!(held_out, [" five", "six", "seven"]);
        let (train, held_out) = split(&["aaaa", "bbbb"], 1000, 2);
        assert_eq!((train.concat(), held_out.concat()), ("aaaa".into(), "bbbb".into()));
    }

    #[test]
    fn no_more_than_the_limit_is_read() {
        let long = "word ".repeat(200_000);
        let (train, held_out) = split(&[&long, "never"], 300_000, 10);
        let all = train.concat() + &held_out.concat();
        assert!(long.starts_with(&all) && (300_000..600_000).contains(&all.len()), "{}", all.len());
        let share = held_out.concat().len() as f64 / all.len() as f64;
        assert!((share - 0.1).abs() < 0.001, "{share}");
    }

    #[test]
    fn files_that_are_the_same_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut s = Split {
            train: vec![Document { name: "a".into(), text: "line\n\"quoted\"".into() }],
            held_out: vec![],
        };
        let state = |path: &Path| (fs::read(path).unwrap(), fs::metadata(path).unwrap().modified().unwrap());
        let (path, _) = s.write(dir.path()).unwrap();
        let first = state(&path);
        s.write(dir.path()).unwrap();
        assert_eq!(state(&path), first);
        s.train[0].text.push('!');
        s.write(dir.path()).unwrap();
        assert_ne!(state(&path).0, first.0);
        let corpus = Corpus::find(&[path], "text").unwrap();
        assert_eq!(corpus.pieces().next().unwrap().unwrap().text, "line\n\"quoted\"!");
    }
}
