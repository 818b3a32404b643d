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
//! | 72..76 | CRC-32C of the list of checksums at the end |
//! | 76..80 | CRC-32C of the 76 bytes before |
//! | 80..128 | zeros |
//! | 128.. | ids; each document is closed by `</s>` |
//! | behind them | the list: CRC-32C of each block of 64 KiB of ids, the last of which may be shorter |
//!
//! Files are written beside, synced and renamed, so a whole name means a whole file. A block is compared with its checksum
//! before the first of its ids is given out: no id comes from a damaged one, and a corpus of 100 GB, of which a start reads
//! a little here and there, opens at once.

use anyhow::{Context, Result, bail, ensure};
use memmap2::Mmap;
use std::fs::File;
use std::io::{Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

const MAGIC: &[u8; 8] = b"FERROTOK";
const VERSION: u32 = 2;
const HEADER: usize = 128;

/// Bytes of ids under one checksum: about what the kernel reads ahead when one of them is touched.
const BLOCK: usize = 1 << 16;

/// What the header says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Header {
    /// Bytes per id, 2 or 4.
    width: u32,
    tokens: u64,
    documents: u64,
    text_bytes: u64,
    fingerprint: [u8; 32],
    /// CRC-32C of the blocks' checksums.
    checksum: u32,
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
        out[72..76].copy_from_slice(&self.checksum.to_le_bytes());
        let crc = crc32c::crc32c(&out[..76]);
        out[76..80].copy_from_slice(&crc.to_le_bytes());
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
            crc32c::crc32c(&h[..76]) == u32_at(76),
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
            checksum: u32_at(72),
        };
        ensure!(matches!(header.width, 2 | 4), "its ids are {} bytes wide, expected 2 or 4", header.width);
        let ids = header.tokens.saturating_mul(header.width as u64);
        let list = ids.div_ceil(BLOCK as u64).saturating_mul(4);
        let expected = ids.saturating_add(list).saturating_add(HEADER as u64);
        ensure!(file.len() as u64 == expected, "it has {} bytes, its header says {expected}", file.len());
        ensure!(
            crc32c::crc32c(&file[HEADER + ids as usize..]) == header.checksum,
            "its list of checksums is damaged (its own does not match)"
        );
        Ok(header)
    }
}

/// A memory-mapped token file.
pub struct TokenFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
    /// Blocks that were compared with their checksums.
    verified: Box<[AtomicBool]>,
    replaces: Option<String>,
}

impl TokenFile {
    /// Maps a file and checks its header and size; ids are checked as they are read.
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
            let blocks = (header.tokens as usize * header.width as usize).div_ceil(BLOCK);
            let verified = (0..blocks).map(|_| AtomicBool::new(false)).collect();
            Ok(TokenFile { path: path.into(), map, header, verified, replaces: None })
        };
        open().with_context(|| format!("cannot open {}", path.display()))
    }

    /// The same, as the one that was made because of what was wrong with the one before.
    pub(crate) fn in_place_of(self, damaged: Option<String>) -> TokenFile {
        TokenFile { replaces: damaged, ..self }
    }

    /// What was wrong with the damaged file that this one was made in place of, if there was one.
    pub fn replaces(&self) -> Option<&str> {
        self.replaces.as_deref()
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

    /// Checksum of all ids.
    pub fn checksum(&self) -> u32 {
        self.header.checksum
    }

    /// Compares all ids with their checksums.
    ///
    /// # Errors
    /// Names the file, the damaged place and what to do.
    pub(crate) fn verify(&self) -> Result<()> {
        self.verify_blocks(0..self.verified.len())
    }

    fn verify_blocks(&self, mut blocks: Range<usize>) -> Result<()> {
        let verified = blocks.try_for_each(|block| self.verify_block(block));
        verified.with_context(|| {
            format!("{} is damaged; delete it, and it is made anew from the text", self.path.display())
        })
    }

    fn verify_block(&self, block: usize) -> Result<()> {
        if self.verified[block].load(Ordering::Relaxed) {
            return Ok(());
        }
        let (ids, list) =
            self.map[HEADER..].split_at(self.header.tokens as usize * self.header.width as usize);
        let from = block * BLOCK;
        let found = crc32c::crc32c(&ids[from..ids.len().min(from + BLOCK)]).to_le_bytes();
        ensure!(
            list[block * 4..].starts_with(&found),
            "a checksum does not match in the {BLOCK} bytes from byte {} on",
            HEADER + from
        );
        self.verified[block].store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Copies the ids from `start` on to `out`. Panics past the end.
    ///
    /// # Errors
    /// When they are damaged; names the file and what to do.
    pub(crate) fn read(&self, start: u64, out: &mut [u32]) -> Result<()> {
        let width = self.header.width as usize;
        let from = start as usize * width;
        let to = from + out.len() * width;
        self.verify_blocks(from / BLOCK..to.div_ceil(BLOCK))?;
        let bytes = &self.map[HEADER + from..HEADER + to];
        if width == 2 {
            for (id, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *id = u16::from_le_bytes([b[0], b[1]]).into();
            }
        } else {
            for (id, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *id = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Ok(())
    }
}

/// Writes a token file.
pub(crate) struct TokenWriter {
    out: File,
    /// Ids that were not written yet, less than a block.
    block: Vec<u8>,
    /// Checksums of the blocks that were.
    list: Vec<u8>,
    header: Header,
}

impl TokenWriter {
    /// Starts in an empty file, for ids below `vocab_size`.
    pub fn new(mut out: File, vocab_size: usize, fingerprint: [u8; 32]) -> std::io::Result<TokenWriter> {
        let width = if vocab_size <= 1 << 16 { 2 } else { 4 };
        // Not a header yet: what was not finished is not recognised.
        out.write_all(&[0; HEADER])?;
        let header = Header { width, fingerprint, ..Header::default() };
        Ok(TokenWriter { out, block: Vec::with_capacity(BLOCK), list: Vec::new(), header })
    }

    /// Adds tokens that stand for `text_bytes` bytes.
    pub fn push(&mut self, ids: &[u32], text_bytes: u64) -> std::io::Result<()> {
        for id in ids {
            self.block.extend_from_slice(&id.to_le_bytes()[..self.header.width as usize]);
            if self.block.len() == BLOCK {
                self.write_block()?;
            }
        }
        self.header.tokens += ids.len() as u64;
        self.header.text_bytes += text_bytes;
        Ok(())
    }

    fn write_block(&mut self) -> std::io::Result<()> {
        self.out.write_all(&self.block)?;
        self.list.extend_from_slice(&crc32c::crc32c(&self.block).to_le_bytes());
        self.block.clear();
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

    /// Writes what is left and the header, and syncs. The caller renames.
    pub fn finish(mut self) -> std::io::Result<()> {
        if !self.block.is_empty() {
            self.write_block()?;
        }
        self.out.write_all(&self.list)?;
        self.header.checksum = crc32c::crc32c(&self.list);
        self.out.rewind()?;
        self.out.write_all(&self.header.encode())?;
        self.out.sync_all()
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
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 128 + 5 * size + 4);
            let t = TokenFile::open(&path).unwrap();
            assert_eq!((t.tokens(), t.documents(), t.text_bytes(), t.fingerprint()), (5, 2, 20, [7; 32]));
            let mut ids = [0; 5];
            t.read(0, &mut ids).unwrap();
            assert_eq!(ids, [5, large, 2, 6, 2]);
            t.read(3, &mut ids[..2]).unwrap();
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
        for i in 0..80 {
            let mut flipped = whole.clone();
            flipped[i] ^= 0x10;
            std::fs::write(&path, &flipped).unwrap();
            assert!(TokenFile::open(&path).is_err(), "byte {i}");
        }
        let mut list = whole.clone();
        *list.last_mut().unwrap() ^= 1;
        refuse(&list, "list of checksums");
        let mut newer = whole.clone();
        newer[8] = 9;
        refuse(&newer, "version 9");
        assert!(format!("{:#}", TokenFile::open(&dir.path().join("none")).err().unwrap()).contains("none"));
    }
    #[test]
    fn no_id_comes_from_a_damaged_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.tokens");
        let ids: Vec<u32> = (0..100_000).map(|i| 10 + i % 900).collect();
        write(&path, 1000, &[&ids]);
        let whole = std::fs::read(&path).unwrap();
        let checksum = TokenFile::open(&path).unwrap().checksum();
        // In the second of four blocks of 32,768 ids.
        for at in [HEADER + BLOCK, HEADER + 2 * BLOCK - 1] {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            std::fs::write(&path, &flipped).unwrap();
            let t = TokenFile::open(&path).unwrap();
            for (start, good) in [(0, true), (32_767, true), (32_768, false), (65_535, false), (65_536, true)]
            {
                assert_eq!(t.read(start, &mut [0]).is_ok(), good, "{start}");
            }
            let e = format!("{:#}", t.read(32_760, &mut [0; 20]).unwrap_err());
            assert!(e.contains("t.tokens") && e.contains("byte 65664") && e.contains("delete it"), "{e}");
            assert!(t.verify().is_err());
        }
        std::fs::write(&path, &whole).unwrap();
        let t = TokenFile::open(&path).unwrap();
        t.verify().unwrap();
        let mut found = vec![0; ids.len()];
        t.read(0, &mut found).unwrap();
        assert_eq!(found, ids);
        // Other ids, as many of them, have another checksum.
        write(&path, 1000, &[&[&ids[1..], &[9]].concat()]);
        assert_ne!(TokenFile::open(&path).unwrap().checksum(), checksum);
    }
}
