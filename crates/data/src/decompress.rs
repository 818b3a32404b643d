//! Opening of plain and compressed files as one kind of reader.

use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
}

/// Buffer in front of the file and behind the decoder, bytes.
const BUFFER: usize = 1 << 18;

/// Largest window of a zstd frame, bytes: that of `zstd --long=31`, the program's largest. So much of the text is held in memory.
const LARGEST_WINDOW: u64 = 1 << 31;

/// Opens a file for reading its decompressed content. Bytes taken from the file itself are added to `consumed`.
///
/// # Errors
/// When the file cannot be opened. Damaged data shows as an error of a later read, and what is whole but cannot be
/// decompressed here as one of the kind [`io::ErrorKind::Unsupported`].
pub(crate) fn open(
    path: &Path,
    compression: Compression,
    consumed: Arc<AtomicU64>,
) -> io::Result<Box<dyn BufRead + Send>> {
    let file = BufReader::with_capacity(BUFFER, Counted { file: File::open(path)?, consumed });
    Ok(match compression {
        Compression::None => Box::new(file),
        Compression::Gzip => Box::new(BufReader::with_capacity(BUFFER, GzipReader::new(file))),
        Compression::Xz => Box::new(BufReader::with_capacity(BUFFER, XzReader::new(file, true))),
        Compression::Zstd => Box::new(BufReader::with_capacity(BUFFER, ZstdReader::new(file))),
    })
}

/// A file that counts what is read from it.
struct Counted {
    file: File,
    consumed: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(out)?;
        self.consumed.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// All members of a gzip file, one after the other, with their checksums compared. Zeros behind them, which tapes and block
/// devices leave, are passed over as `gzip` does.
struct GzipReader<R> {
    /// There until the end of the file.
    member: Option<GzDecoder<R>>,
}

impl<R: BufRead> GzipReader<R> {
    fn new(source: R) -> Self {
        GzipReader { member: Some(GzDecoder::new(source)) }
    }
}

impl<R: BufRead> Read for GzipReader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        while let Some(member) = &mut self.member {
            let n = member.read(out)?;
            if n > 0 {
                return Ok(n);
            }
            let Some(mut source) = self.member.take().map(GzDecoder::into_inner) else { break };
            let more = loop {
                let ahead = source.fill_buf()?;
                let zeros = ahead.iter().take_while(|byte| **byte == 0).count();
                let (ended, more) = (ahead.is_empty(), zeros < ahead.len());
                source.consume(zeros);
                if ended || more {
                    break more;
                }
            };
            self.member = more.then(|| GzDecoder::new(source));
        }
        Ok(0)
    }
}

/// All frames of a zstd file, one after the other, with their checksums compared; skippable frames are skipped.
struct ZstdReader<R> {
    source: R,
    decoder: FrameDecoder,
    in_frame: bool,
}

/// A decoder of one frame.
fn decoder() -> FrameDecoder {
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(LARGEST_WINDOW);
    decoder
}

impl<R: BufRead> ZstdReader<R> {
    fn new(source: R) -> Self {
        ZstdReader { source, decoder: decoder(), in_frame: false }
    }

    /// Enters the next frame; false at the end of the file.
    fn enter(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            // One that is used again would set aside the whole window at once, be the frame ever so short.
            self.decoder = decoder();
            match self.decoder.reset(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let skipped = io::copy(&mut self.source.by_ref().take(length.into()), &mut io::sink())?;
                    if skipped < length.into() {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(FrameDecoderError::WindowSizeTooBig { requested, max }) => {
                    return Err(io::Error::new(
                        io::ErrorKind::Unsupported,
                        format!(
                            "it was compressed with a window of {} MiB, and {} MiB are read at most; decompress the file first",
                            requested.div_ceil(1 << 20),
                            max >> 20,
                        ),
                    ));
                }
                Err(e) => return Err(io::Error::other(e)),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for ZstdReader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.in_frame {
                if !self.enter()? {
                    return Ok(0);
                }
                self.in_frame = true;
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(io::Error::other)?;
            }
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(out);
            }
            self.in_frame = false;
            if let Some(stored) = self.decoder.get_checksum_from_data()
                && self.decoder.get_calculated_checksum() != Some(stored)
            {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the checksum of a frame does not match",
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};
    use std::io::Write;

    fn zstd(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        ZstdReader::new(bytes).read_to_end(&mut out).map(|_| out)
    }

    fn gzip(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        GzipReader::new(bytes).read_to_end(&mut out).map(|_| out)
    }

    #[test]
    fn gzip_reads_every_member_and_zeros_behind_them() {
        let member = |bytes: &[u8]| {
            let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            w.write_all(bytes).unwrap();
            w.finish().unwrap()
        };
        let file = [member(b"first, "), member(b""), member(b"second")].concat();
        assert_eq!(gzip(&file).unwrap(), b"first, second");
        assert_eq!(gzip(&[&file[..], &[0; 1000]].concat()).unwrap(), b"first, second");
        for damaged in [&b""[..], b"text", &file[..file.len() - 3], &[&file[..], b"text, not zeros"].concat()]
        {
            assert!(gzip(damaged).is_err(), "{damaged:?}");
        }
    }

    #[test]
    fn zstd_reads_every_frame_and_skips_the_skippable() {
        let mut file = compress_to_vec(&b"first, "[..], CompressionLevel::Fastest);
        file.extend(0x184D2A53u32.to_le_bytes());
        file.extend(3u32.to_le_bytes());
        file.extend(b"xyz");
        file.extend(compress_to_vec(&b"second"[..], CompressionLevel::Fastest));
        assert_eq!(zstd(&file).unwrap(), b"first, second");
        assert_eq!(zstd(b"").unwrap(), b"");
    }

    #[test]
    fn zstd_reads_windows_up_to_the_largest_of_its_program() {
        // A frame of one block of plain bytes, whose header has the logarithm of the window's size.
        let frame = |log: u8| {
            [&[0x28, 0xB5, 0x2F, 0xFD, 0, (log - 10) << 3, 5 << 3 | 1, 0, 0], &b"words"[..]].concat()
        };
        for log in [27, 28, 31] {
            assert_eq!(zstd(&frame(log).repeat(3)).unwrap(), b"words".repeat(3), "{log}");
        }
        let e = zstd(&frame(32)).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::Unsupported);
        let e = e.to_string();
        assert!(e.contains("4096 MiB") && e.contains("2048 MiB") && e.contains("decompress"), "{e}");
    }

    #[test]
    fn zstd_refuses_damage() {
        let text = "the same words again and again; ".repeat(1000);
        let whole = compress_to_vec(text.as_bytes(), CompressionLevel::Fastest);
        assert_eq!(zstd(&whole).unwrap(), text.as_bytes());
        for end in [1, 5, whole.len() / 2, whole.len() - 1] {
            assert!(zstd(&whole[..end]).is_err(), "cut to {end} of {} bytes", whole.len());
        }
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let e = zstd(&flipped).unwrap_err().to_string();
        assert!(e.contains("checksum"), "{e}");
    }
}
