//! Token files: a tokenised corpus, memory-mapped.
//!
//! | bytes | content (little-endian) |
//! |---|---|
//! | 0..8 | `FERROTOK` |
//! | 8..12 | version, u32 |
//! | 12..16 | width of an id in bytes, u32: 2 or 4 |
//! | 16..24 | number of tokens, u64 |
//! | 24..32 | number of documents, u64 |
//! | 32..40 | bytes of text, u64 |
//! | 40..72 | fingerprint of the tokenizer and the sources |
//! | 72..76 | CRC-32C of the 72 bytes before |
//! | 76..128 | zeros |
//! | 128.. | ids; each document is closed by `</s>` |
//!
//! Files are written beside, synced and renamed, so a whole name means a whole file.

use anyhow::{Context, Result, bail, ensure};
use memmap2::Mmap;
use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"FERROTOK";
const VERSION: u32 = 1;
const HEADER: usize = 128;

/// What the header says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Header {
    /// Bytes per id, 2 or 4.
    width: u32,
    tokens: u64,
    documents: u64,
    text_bytes: u64,
    fingerprint: [u8; 32],
}

impl Header {
    fn encode(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.width.to_le_bytes());
        out[16..24].copy_from_slice(&self.tokens.to_le_bytes());
        out[24..32].copy_from_slice(&self.documents.to_le_bytes());
        out[32..40].copy_from_slice(&self.text_bytes.to_le_bytes());
        out[40..72].copy_from_slice(&self.fingerprint);
        let crc = crc32c::crc32c(&out[..72]);
        out[72..76].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn decode(file: &[u8]) -> Result<Header> {
        ensure!(file.starts_with(MAGIC), "it is not a token file of Ferropt");
        let Some(h) = file.first_chunk::<HEADER>() else {
            bail!("it ends within the header, after {} of {HEADER} bytes", file.len());
        };
        let u32_at = |i: usize| u32::from_le_bytes([h[i], h[i + 1], h[i + 2], h[i + 3]]);
        let u64_at = |i: usize| u32_at(i) as u64 | (u32_at(i + 4) as u64) << 32;
        let version = u32_at(8);
        ensure!(version == VERSION, "its format is version {version}, this program reads version {VERSION}");
        ensure!(
            crc32c::crc32c(&h[..72]) == u32_at(72),
            "its header is damaged (the checksum does not match)"
        );
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(&h[40..72]);
        let header = Header {
            width: u32_at(12),
            tokens: u64_at(16),
            documents: u64_at(24),
            text_bytes: u64_at(32),
            fingerprint,
        };
        ensure!(matches!(header.width, 2 | 4), "its ids are {} bytes wide, expected 2 or 4", header.width);
        let expected = header.tokens.saturating_mul(header.width as u64).saturating_add(HEADER as u64);
        ensure!(file.len() as u64 == expected, "it has {} bytes, its header says {expected}", file.len());
        Ok(header)
    }
}

/// A memory-mapped token file.
pub struct TokenFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

impl TokenFile {
    /// Maps a file and checks that it is whole.
    ///
    /// # Errors
    /// Names the file, what is wrong with it and what to do.
    pub fn open(path: &Path) -> Result<TokenFile> {
        let open = || -> Result<TokenFile> {
            let file = File::open(path)?;
            // SAFETY: the map is read-only, and token files are never changed in place: they appear by renaming. Should
            // someone truncate one nevertheless, the kernel ends the process; memory stays sound.
            #[allow(unsafe_code)]
            let map = unsafe { Mmap::map(&file) }?;
            let header = Header::decode(&map)
                .context("the token file cannot be used; delete it, and it is made anew from the text")?;
            Ok(TokenFile { path: path.into(), map, header })
        };
        open().with_context(|| format!("cannot open {}", path.display()))
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of tokens, with one `</s>` per document.
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Number of documents.
    pub fn documents(&self) -> u64 {
        self.header.documents
    }

    /// Bytes of text (UTF-8) that the tokens stand for.
    pub fn text_bytes(&self) -> u64 {
        self.header.text_bytes
    }

    /// SHA-256 of the tokenizer and what identifies the sources.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.header.fingerprint
    }

    /// Copies the ids from `start` on to `out`. Panics past the end.
    pub(crate) fn read(&self, start: u64, out: &mut [u32]) {
        let width = self.header.width as usize;
        let from = HEADER + start as usize * width;
        let bytes = &self.map[from..from + out.len() * width];
        if width == 2 {
            for (id, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *id = u16::from_le_bytes([b[0], b[1]]).into();
            }
        } else {
            for (id, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *id = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
    }
}

/// Writes a token file.
pub(crate) struct TokenWriter {
    out: BufWriter<File>,
    header: Header,
}

impl TokenWriter {
    /// Starts in an empty file, for ids below `vocab_size`.
    pub fn new(file: File, vocab_size: usize, fingerprint: [u8; 32]) -> std::io::Result<TokenWriter> {
        let width = if vocab_size <= 1 << 16 { 2 } else { 4 };
        let mut out = BufWriter::with_capacity(1 << 20, file);
        // Not a header yet: what was not finished is not recognised.
        out.write_all(&[0; HEADER])?;
        Ok(TokenWriter { out, header: Header { width, fingerprint, ..Header::default() } })
    }

    /// Adds tokens that stand for `text_bytes` bytes.
    pub fn push(&mut self, ids: &[u32], text_bytes: u64) -> std::io::Result<()> {
        for id in ids {
            self.out.write_all(&id.to_le_bytes()[..self.header.width as usize])?;
        }
        self.header.tokens += ids.len() as u64;
        self.header.text_bytes += text_bytes;
        Ok(())
    }

    /// Closes a document.
    pub fn end_document(&mut self) -> std::io::Result<()> {
        self.header.documents += 1;
        self.push(&[crate::EOS], 0)
    }

    /// Number of tokens so far.
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Writes the header and syncs. The caller renames.
    pub fn finish(mut self) -> std::io::Result<()> {
        self.out.rewind()?;
        self.out.write_all(&self.header.encode())?;
        self.out.flush()?;
        self.out.get_ref().sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, vocab_size: usize, documents: &[&[u32]]) {
        let mut w = TokenWriter::new(File::create(path).unwrap(), vocab_size, [7; 32]).unwrap();
        for ids in documents {
            w.push(ids, 10).unwrap();
            w.end_document().unwrap();
        }
        w.finish().unwrap();
    }

    #[test]
    fn both_widths_come_back() {
        let dir = tempfile::tempdir().unwrap();
        for (vocab, large, size) in [(1 << 16, 65_535, 2), ((1 << 16) + 1, 65_536, 4)] {
            let path = dir.path().join("t.tokens");
            write(&path, vocab, &[&[5, large], &[6]]);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 128 + 5 * size);
            let t = TokenFile::open(&path).unwrap();
            assert_eq!((t.tokens(), t.documents(), t.text_bytes(), t.fingerprint()), (5, 2, 20, [7; 32]));
            let mut ids = [0; 5];
            t.read(0, &mut ids);
            assert_eq!(ids, [5, large, 2, 6, 2]);
            t.read(3, &mut ids[..2]);
            assert_eq!(ids[..2], [6, 2]);
        }
    }

    #[test]
    fn damage_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.tokens");
        write(&path, 1000, &[&[5, 6, 7]]);
        let whole = std::fs::read(&path).unwrap();
        let refuse = |bytes: &[u8], expected: &str| {
            std::fs::write(&path, bytes).unwrap();
            let Err(e) = TokenFile::open(&path) else { panic!("taken although {expected}") };
            let e = format!("{e:#}");
            assert!(
                e.contains("t.tokens") && e.contains("delete it") && e.contains(expected),
                "{expected}: {e}"
            );
        };
        refuse(&whole[..whole.len() - 1], "its header says");
        refuse(&[&whole[..], &[0]].concat(), "its header says");
        refuse(&whole[..100], "within the header");
        refuse(b"", "not a token file");
        refuse(b"PK\x03\x04 something else", "not a token file");
        refuse(&[&[0; 128], &whole[128..]].concat(), "not a token file");
        // Every byte that means something is covered: by the magic, the version or the checksum.
        for i in 0..76 {
            let mut flipped = whole.clone();
            flipped[i] ^= 0x10;
            std::fs::write(&path, &flipped).unwrap();
            assert!(TokenFile::open(&path).is_err(), "byte {i}");
        }
        let mut newer = whole.clone();
        newer[8] = 9;
        refuse(&newer, "version 9");
        assert!(format!("{:#}", TokenFile::open(&dir.path().join("none")).err().unwrap()).contains("none"));
    }
}
