//! Readers of documents.
//!
//! A `.txt` file is one document; each line of a `.jsonl` file is one, in a field of a JSON object. Long documents
//! come in pieces, so that memory stays bounded and one document can be tokenised by several threads. Pieces are cut
//! where GPT-2's word pattern always cuts, so tokens are those of the whole document.

mod field;

use crate::decompress::{self, Compression};
use anyhow::{Context, Result, bail};
use field::OneField;
use serde::de::DeserializeSeed;
use serde_json::Value;
use std::collections::{HashSet, VecDeque};
use std::fs;
use std::io::{self, BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::UNIX_EPOCH;

/// Endings of the files that are read.
const ENDINGS: &str = ".txt and .jsonl, plain or with .gz, .xz or .zst behind";

/// Longest piece, bytes. Also the stretch in which a cut is looked for.
const PIECE: usize = 1 << 18;

/// Longest line of a JSON-lines file, bytes: a line has to be held in memory.
const LONGEST_LINE: u64 = 1 << 28;

/// What a folder has that holds a run of training, or one of these: the lock of its checkpoints, what it was told and has measured,
/// a quick start's configuration.
const RUN: [&[&str]; 3] = [&["checkpoints/.lock"], &["config.toml", "metrics.jsonl"], &["quickstart.toml"]];

/// U+FEFF in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Text,
    JsonLines,
}

/// A file of a [`Corpus`].
#[derive(Clone, Debug)]
pub(crate) struct SourceFile {
    pub path: PathBuf,
    format: Format,
    compression: Compression,
    /// Size on disk.
    pub bytes: u64,
    /// Time of the last change, in nanoseconds since 1970; 0 where the file system does not tell.
    pub modified: u128,
}

/// Files of documents, in a fixed order.
#[derive(Clone, Debug)]
pub struct Corpus {
    pub(crate) files: Vec<SourceFile>,
    /// Folders of runs below those that were named.
    left_out: Vec<PathBuf>,
    pub(crate) text_field: String,
}

/// A document, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The text; may be empty.
    pub text: String,
    /// Whether the document ends here.
    pub ends_document: bool,
}

impl Corpus {
    /// Finds the files: each path is a file, or a folder that is searched to any depth in the order of names, hidden
    /// entries and the folders of runs left out and links followed. `text_field` is the field of JSON lines that holds the text.
    ///
    /// # Errors
    /// Names a path that does not exist, a file whose ending is not known, or a folder without any usable file.
    pub fn find<P: AsRef<Path>>(paths: &[P], text_field: &str) -> Result<Corpus> {
        Corpus::gather(paths, text_field, None)
    }

    /// [`Corpus::find`] for the run in the folder `run`, which is left out also where the run has hardly begun: what it writes
    /// is not its text.
    ///
    /// # Errors
    /// As there.
    pub fn find_for<P: AsRef<Path>>(run: &Path, paths: &[P], text_field: &str) -> Result<Corpus> {
        // A folder that is not there has nothing to be left out.
        Corpus::gather(paths, text_field, run.canonicalize().ok())
    }

    fn gather<P: AsRef<Path>>(paths: &[P], text_field: &str, without: Option<PathBuf>) -> Result<Corpus> {
        let mut corpus = Corpus { files: Vec::new(), left_out: Vec::new(), text_field: text_field.into() };
        for path in paths {
            let path = path.as_ref();
            let meta =
                fs::metadata(path).with_context(|| format!("cannot read the text at {}", path.display()))?;
            if meta.is_dir() {
                let before = corpus.files.len();
                search(path, &mut without.iter().cloned().collect(), &mut corpus)?;
                if corpus.files.len() == before {
                    bail!(
                        "the folder {} holds no text, leaving aside the folders of runs: expected files ending in {ENDINGS}",
                        path.display()
                    );
                }
            } else if let Some(file) = source_file(path)? {
                corpus.files.push(file);
            } else {
                bail!("{} is of no known kind: expected a file ending in {ENDINGS}", path.display());
            }
        }
        if corpus.files.is_empty() {
            bail!("no text was named: expected files or folders of files ending in {ENDINGS}");
        }
        Ok(corpus)
    }

    /// Folders of other runs that lie among the texts, and were not searched.
    pub fn left_out(&self) -> &[PathBuf] {
        &self.left_out
    }

    /// Size of all files on disk.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).sum()
    }

    /// Reads all documents in order.
    pub fn pieces(&self) -> Pieces<'_> {
        Pieces { corpus: self, next_file: 0, reader: None, consumed: Arc::default(), failed: false }
    }
}

/// The file if its ending is known.
fn source_file(path: &Path) -> Result<Option<SourceFile>> {
    // Only the ending matters, whatever the rest is encoded in.
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (stem, compression) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Compression::Gzip),
        Some((stem, "xz")) => (stem, Compression::Xz),
        Some((stem, "zst")) => (stem, Compression::Zstd),
        _ => (name.as_str(), Compression::None),
    };
    let format = match stem.rsplit_once('.') {
        Some((_, "txt")) => Format::Text,
        Some((_, "jsonl")) => Format::JsonLines,
        _ => return Ok(None),
    };
    let meta = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    let modified = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    Ok(Some(SourceFile {
        path: path.into(),
        format,
        compression,
        bytes: meta.len(),
        modified: modified.map_or(0, |d| d.as_nanos()),
    }))
}

/// Adds the usable files below `folder`, whose links are followed. Folders that were `seen`, by their true paths, are not gone
/// through again: links may form circles. Nor are those of runs, whose logs and metrics are lines of JSON too, and grow.
fn search(folder: &Path, seen: &mut HashSet<PathBuf>, corpus: &mut Corpus) -> Result<()> {
    let read = || -> std::io::Result<Vec<fs::DirEntry>> { fs::read_dir(folder)?.collect() };
    let cannot = || format!("cannot list the folder {}", folder.display());
    if !seen.insert(folder.canonicalize().with_context(cannot)?) {
        return Ok(());
    }
    if RUN.iter().any(|files| files.iter().all(|file| folder.join(file).exists())) {
        corpus.left_out.push(folder.into());
        return Ok(());
    }
    let mut entries = read().with_context(cannot)?;
    entries.sort_by_key(|e| e.file_name());
    for path in entries.iter().map(fs::DirEntry::path) {
        if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
            continue;
        }
        if path.is_dir() {
            search(&path, seen, corpus)?;
        } else if path.is_file() || !path.exists() {
            // A link to nothing is refused where its name is a text's.
            corpus.files.extend(source_file(&path)?);
        }
    }
    Ok(())
}

/// Iterator over the pieces of all documents of a [`Corpus`]. Ends after the first error.
///
/// Errors name the file and the place (line, or byte), what was found and what was expected.
pub struct Pieces<'a> {
    corpus: &'a Corpus,
    next_file: usize,
    reader: Option<Reader>,
    consumed: Arc<AtomicU64>,
    failed: bool,
}

impl Pieces<'_> {
    /// Counter of the bytes taken from disk so far, of [`Corpus::bytes`] in all. It may be read from another thread.
    pub fn consumed(&self) -> Arc<AtomicU64> {
        self.consumed.clone()
    }

    fn read(&mut self) -> Result<Option<Piece>> {
        loop {
            if let Some(reader) = &mut self.reader {
                let file = &self.corpus.files[self.next_file - 1];
                let piece = reader
                    .next_piece(&self.corpus.text_field)
                    .with_context(|| format!("in the text file {}", file.path.display()))?;
                if piece.is_some() {
                    return Ok(piece);
                }
                self.reader = None;
            }
            let Some(file) = self.corpus.files.get(self.next_file) else { return Ok(None) };
            self.next_file += 1;
            let input = decompress::open(&file.path, file.compression, self.consumed.clone())
                .with_context(|| format!("cannot open {}", file.path.display()))?;
            self.reader = Some(Reader {
                input,
                format: file.format,
                position: 0,
                buffer: Vec::new(),
                ready: VecDeque::new(),
                ended: false,
            });
        }
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        if self.failed {
            return None;
        }
        let item = self.read().transpose();
        self.failed = matches!(item, Some(Err(_)));
        item
    }
}

/// Reader of one file.
struct Reader {
    input: Box<dyn BufRead + Send>,
    format: Format,
    /// Lines read so far (JSON lines), or bytes given out or passed over so far (text).
    position: u64,
    /// Text that was read but not given out, or the current line.
    buffer: Vec<u8>,
    /// Pieces of the current line's document.
    ready: VecDeque<Piece>,
    ended: bool,
}

impl Reader {
    fn next_piece(&mut self, text_field: &str) -> Result<Option<Piece>> {
        match self.format {
            Format::Text => self.next_of_text(),
            Format::JsonLines => self.next_of_lines(text_field),
        }
    }

    fn next_of_text(&mut self) -> Result<Option<Piece>> {
        if self.ended {
            return Ok(None);
        }
        let wanted = (PIECE - self.buffer.len()) as u64;
        let got = self.input.by_ref().take(wanted).read_to_end(&mut self.buffer);
        let got = got.map_err(|error| {
            unreadable(error, &format!("{} bytes of text", self.position + self.buffer.len() as u64))
        })?;
        self.ended = (got as u64) < wanted;
        // Programs for Windows put a mark in front of UTF-8.
        if self.position == 0 && self.buffer.starts_with(BYTE_ORDER_MARK) {
            self.buffer.drain(..BYTE_ORDER_MARK.len());
            self.position += BYTE_ORDER_MARK.len() as u64;
        }
        let text = match std::str::from_utf8(&self.buffer) {
            Ok(text) => text,
            // The end of the buffer may cut a character in two.
            Err(e) if e.error_len().is_none() && !self.ended => {
                std::str::from_utf8(&self.buffer[..e.valid_up_to()]).unwrap_or_default()
            }
            Err(e) => {
                let place = self.position + e.valid_up_to() as u64;
                bail!(
                    "the text is not UTF-8: found byte {:#04x} at byte {place}; convert the file to UTF-8",
                    self.buffer[e.valid_up_to()]
                );
            }
        };
        let cut = if self.ended { text.len() } else { seam(text) };
        let text = text[..cut].to_owned();
        self.buffer.drain(..cut);
        self.position += cut as u64;
        Ok(Some(Piece { text, ends_document: self.ended }))
    }

    fn next_of_lines(&mut self, text_field: &str) -> Result<Option<Piece>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Ok(Some(piece));
            }
            self.buffer.clear();
            let read = self.input.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut self.buffer);
            let read = read.map_err(|error| unreadable(error, &format!("line {}", self.position)))?;
            if read == 0 {
                return Ok(None);
            }
            self.position += 1;
            let line = self.position;
            if read as u64 == LONGEST_LINE {
                bail!("line {line} is longer than {} MiB; split the document", LONGEST_LINE >> 20);
            }
            let mark = if line == 1 { BYTE_ORDER_MARK } else { &[] };
            let content = self.buffer.strip_prefix(mark).unwrap_or(&self.buffer);
            if !content.trim_ascii().is_empty() {
                let text =
                    text_of_line(content, text_field).with_context(|| format!("line {line} is wrong"))?;
                split(text, &mut self.ready);
            }
        }
    }
}

/// The error of a read that failed after so much.
fn unreadable(error: io::Error, read: &str) -> anyhow::Error {
    // What is unsupported says itself what to do.
    let why = match error.kind() {
        io::ErrorKind::Unsupported => "",
        _ => "; the file may be cut short or damaged",
    };
    anyhow::Error::new(error).context(format!("cannot read on after {read}{why}"))
}

/// The text in one line of a JSON-lines file.
fn text_of_line(line: &[u8], field: &str) -> Result<String> {
    let line = std::str::from_utf8(line).map_err(|e| {
        anyhow::anyhow!(
            "not UTF-8: found byte {:#04x} at column {}",
            line[e.valid_up_to()],
            e.valid_up_to() + 1
        )
    })?;
    let wrong = |e: serde_json::Error| {
        let (what, column) = (e.to_string(), e.column());
        let what = what.rsplit_once(" at line ").map_or(&*what, |(what, _)| what);
        if e.is_data() {
            return anyhow::anyhow!("{what}");
        }
        // What Python's json.dumps makes of text that was read with errors="surrogateescape".
        let hint = if what.contains("surrogate") || what.contains("end of hex escape") {
            "; \\ud800 to \\udfff stand for characters in pairs only: write the file again without the single ones, in Python \
             after text.encode(\"utf-16\", \"surrogatepass\").decode(\"utf-16\", \"replace\")"
        } else {
            "; expected one object a line"
        };
        anyhow::anyhow!("not valid JSON: {what} at column {column}{hint}")
    };
    let mut reader = serde_json::Deserializer::from_str(line);
    let text = OneField(field).deserialize(&mut reader).map_err(wrong)?;
    reader.end().map_err(wrong)?;
    Ok(text)
}

/// The text in a field of a JSON object.
///
/// # Errors
/// When it is no object, or has no text there; the message names the fields that it has.
pub fn text_in(value: &Value, field: &str) -> Result<String> {
    Ok(OneField(field).deserialize(value)?)
}

/// Cuts a document into pieces.
fn split(text: String, pieces: &mut VecDeque<Piece>) {
    let mut rest = text.as_str();
    while rest.len() > PIECE {
        let cut = seam(&rest[..rest.floor_char_boundary(PIECE)]);
        pieces.push_back(Piece { text: rest[..cut].to_owned(), ends_document: false });
        rest = &rest[cut..];
    }
    pieces.push_back(Piece { text: rest.to_owned(), ends_document: true });
}

/// The last place where GPT-2's word pattern is sure to cut: before white space that follows something else, since
/// no word goes on into white space. The end where there is none.
pub(crate) fn seam(text: &str) -> usize {
    let mut white = None;
    for (i, c) in text.char_indices().rev() {
        if c.is_whitespace() {
            white = Some(i);
        } else if let Some(place) = white {
            return place;
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(corpus: &Corpus) -> Result<Vec<String>> {
        let mut documents = vec![];
        let mut text = String::new();
        for piece in corpus.pieces() {
            let piece = piece?;
            text += &piece.text;
            if piece.ends_document {
                documents.push(std::mem::take(&mut text));
            }
        }
        assert!(text.is_empty(), "the last document does not end");
        Ok(documents)
    }

    fn pack(ending: &str, bytes: &[u8]) -> Vec<u8> {
        match ending {
            "gz" => {
                let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                w.write_all(bytes).unwrap();
                w.finish().unwrap()
            }
            "xz" => {
                let options = lzma_rust2::XzOptions::with_preset(1);
                let mut w = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
                w.write_all(bytes).unwrap();
                w.finish().unwrap()
            }
            "zst" => ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest),
            _ => bytes.to_vec(),
        }
    }

    #[test]
    fn links_are_followed_and_names_may_be_of_any_encoding() {
        use std::os::unix::{ffi::OsStrExt, fs::symlink};
        let root = tempfile::tempdir().unwrap();
        let [texts, elsewhere] = ["texts", "elsewhere"].map(|name| root.path().join(name));
        fs::create_dir(&texts).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        fs::write(texts.join("a.txt"), "a").unwrap();
        fs::write(texts.join(std::ffi::OsStr::from_bytes(b"caf\xe9.TXT")), "b").unwrap();
        fs::write(elsewhere.join("c.txt"), "c").unwrap();
        symlink(&elsewhere, texts.join("d")).unwrap();
        // Circles, and a link to nothing that is no text's.
        symlink(&texts, elsewhere.join("back")).unwrap();
        symlink(&elsewhere, texts.join("e")).unwrap();
        symlink("nothing", texts.join("notes")).unwrap();
        assert_eq!(read(&Corpus::find(&[&texts], "text").unwrap()).unwrap(), ["a", "b", "c"]);
        symlink("nothing", texts.join("lost.txt")).unwrap();
        let told = format!("{:#}", Corpus::find(&[&texts], "text").err().unwrap());
        assert!(told.contains("cannot read") && told.contains("lost.txt"), "{told}");
    }

    #[test]
    fn folders_of_runs_are_no_text() {
        let root = tempfile::tempdir().unwrap();
        let [first, second] = ["runs/first", "runs/second"].map(|name| root.path().join(name));
        for run in [&first, &second] {
            fs::create_dir_all(run.join("data")).unwrap();
            fs::write(run.join("data/copy.txt"), "copy").unwrap();
        }
        fs::write(root.path().join("text.txt"), "text").unwrap();
        fs::create_dir(first.join("checkpoints")).unwrap();
        fs::write(first.join("checkpoints/.lock"), "").unwrap();
        let found = Corpus::find(&[root.path()], "text").unwrap();
        assert_eq!(
            (read(&found).unwrap(), found.left_out()),
            (vec!["copy".into(), "text".into()], &[first.clone()][..])
        );
        // One whose checkpoints were removed.
        fs::remove_file(first.join("checkpoints/.lock")).unwrap();
        for file in ["config.toml", "metrics.jsonl"] {
            fs::write(first.join(file), "").unwrap();
        }
        // One that has not got so far yet, and one that is yet to be made.
        for (run, found) in [(&second, &["text"][..]), (&root.path().join("runs/third"), &["copy", "text"])] {
            assert_eq!(read(&Corpus::find_for(run, &[root.path()], "text").unwrap()).unwrap(), found);
        }
        // What is named is meant, but for the run itself.
        assert_eq!(read(&Corpus::find(&[first.join("data")], "text").unwrap()).unwrap(), ["copy"]);
        let told = Corpus::find_for(&second, &[&second], "text").unwrap_err().to_string();
        assert!(told.contains("runs/second") && told.contains("folders of runs"), "{told}");
    }

    /// A text of many pieces, with characters of every length.
    fn long_text() -> String {
        (0..60_000).map(|i| format!("{} naïve 狐 🦊{}", i, if i % 7 == 0 { "\n\n" } else { "  " })).collect()
    }

    #[test]
    fn every_format_gives_the_same_documents() {
        let dir = tempfile::tempdir().unwrap();
        let long = long_text();
        assert!(long.len() > 4 * PIECE);
        let line = |t: &str| serde_json::json!({"id": 7, "text": t}).to_string();
        let lines = format!("{}\n\n{}\n{}", line("one"), line(&long), line("three\n"));
        for ending in ["", "gz", "xz", "zst"] {
            let dotted = if ending.is_empty() { String::new() } else { format!(".{ending}") };
            let txt = dir.path().join(format!("a.txt{dotted}"));
            let jsonl = dir.path().join(format!("b.jsonl{dotted}"));
            fs::write(&txt, pack(ending, long.as_bytes())).unwrap();
            fs::write(&jsonl, pack(ending, lines.as_bytes())).unwrap();
            let corpus = Corpus::find(&[txt, jsonl], "text").unwrap();
            let mut pieces = corpus.pieces();
            assert!(pieces.by_ref().all(|p| p.is_ok_and(|p| p.text.len() <= PIECE)), "{ending}");
            assert_eq!(pieces.consumed().load(std::sync::atomic::Ordering::Relaxed), corpus.bytes());
            assert_eq!(read(&corpus).unwrap(), [&long, "one", &long, "three\n"], "{ending}");
        }
    }

    #[test]
    fn folders_are_searched_in_order_and_hidden_files_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("b.txt", "B");
        put("a/z.TXT", "Z");
        put("a/y.txt", "Y");
        put(".hidden.txt", "no");
        put(".git/x.txt", "no");
        put("README.md", "no");
        let corpus = Corpus::find(&[dir.path()], "text").unwrap();
        assert_eq!(read(&corpus).unwrap(), ["Y", "Z", "B"]);
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let message = |paths: &[PathBuf]| format!("{:#}", Corpus::find(paths, "text").unwrap_err());
        let e = message(&[dir.path().into()]);
        assert!(e.contains("holds no text") && e.contains(".jsonl"), "{e}");
        let pdf = dir.path().join("x.pdf");
        fs::write(&pdf, "").unwrap();
        assert!(message(&[pdf]).contains("x.pdf"));
        assert!(message(&[dir.path().join("nothing.txt")]).contains("nothing.txt"));
        assert!(message(&[]).contains("no text was named"));
    }

    #[test]
    fn wrong_content_is_named_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let mut late = "x".repeat(PIECE + 10).into_bytes();
        late.push(0xE9);
        for (name, bytes, expected) in [
            (
                "a.jsonl",
                &b"{\"text\":\"ok\"}\n{\"body\":\"x\",\"id\":1}"[..],
                &["line 2", "`text`", "body, id"][..],
            ),
            ("b.jsonl", b"{\"text\":5}", &["line 1", "integer `5`", "a string in the field `text`"]),
            ("c.jsonl", b"[1]", &["line 1", "sequence", "a JSON object with a text field `text`"]),
            (
                "p.jsonl",
                b"\"a string at line 5\"",
                &["line 1", "invalid type: a string, expected a JSON object"],
            ),
            ("d.jsonl", b"{\"text\":\"ok\"}\n\n{\"text\":\"op", &["line 3", "JSON"]),
            ("e.jsonl", b"{\"text\":\"caf\xE9\"}", &["line 1", "UTF-8", "0xe9", "column 13"]),
            (
                "k.jsonl",
                b"{\"text\":\"ok\"}\n{\"text\":\"a \\udc80 b\"}",
                &["line 2", "surrogate", "column", "in pairs", "surrogatepass"],
            ),
            ("l.jsonl", b"{\"text\":\"a \\ud800 b\"}", &["line 1", "column", "in pairs"]),
            ("m.jsonl", b"{\"text\":\"a \\ud800\\u0041\"}", &["line 1", "column", "in pairs"]),
            ("f.txt", b"caf\xE9 au lait", &["UTF-8", "0xe9", "byte 3"]),
            ("n.txt", b"\xEF\xBB\xBFcaf\xE9", &["UTF-8", "0xe9", "byte 6"]),
            ("g.txt", &late, &["UTF-8", "0xe9", "byte 262154"]),
            ("h.txt.gz", b"not gzip", &["cannot read"]),
            ("i.txt.xz", b"not xz at all", &["cannot read"]),
            ("j.jsonl.zst", b"not zstd", &["cannot read", "damaged"]),
            // A window of 4 GiB.
            (
                "o.jsonl.zst",
                b"\x28\xB5\x2F\xFD\0\xB0\x01\0\0",
                &["after line 0: it was compressed", "4096 MiB"],
            ),
        ] {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            let corpus = Corpus::find(&[path], "text").unwrap();
            let e = format!("{:#}", read(&corpus).unwrap_err());
            assert!(e.contains(name), "{e}");
            for part in expected {
                assert!(e.contains(part), "{name}: `{part}` is not in: {e}");
            }
        }
    }

    #[test]
    fn what_else_an_object_holds_may_be_anything() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let ids = "[0],".repeat(100_000);
        let line = format!(
            "{{\"ids\": [{ids}[0]], \"text\": \"the first\", \"more\": {{\"text\": 1e999}}, \"text\": \"the last\"}}\n"
        );
        fs::write(&path, line).unwrap();
        let corpus = Corpus::find(&[&path], "text").unwrap();
        assert_eq!(read(&corpus).unwrap(), ["the last"]);
        let names: Vec<String> = (0..30).map(|i| format!("\"name {i}\": {i}")).collect();
        fs::write(&path, format!("{{{}}}", names.join(","))).unwrap();
        let e = format!("{:#}", read(&Corpus::find(&[&path], "text").unwrap()).unwrap_err());
        assert!(e.contains("name 19 and 10 more; ") && e.contains("data.text_field"), "{e}");
    }

    #[test]
    fn a_byte_order_mark_in_front_of_a_file_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        for ending in ["", "gz", "xz", "zst"] {
            let path = dir.path().join(format!("a.txt.{ending}").trim_end_matches('.'));
            let texts = ["one", "\u{FEFF}a mark of its own \u{FEFF}", ""];
            for text in texts.map(String::from).into_iter().chain([long_text()]) {
                fs::write(&path, pack(ending, format!("\u{FEFF}{text}").as_bytes())).unwrap();
                assert_eq!(read(&Corpus::find(&[&path], "text").unwrap()).unwrap(), [text], "{ending}");
            }
        }
        let path = dir.path().join("a.jsonl");
        fs::write(&path, "\u{FEFF}{\"text\":\"one\"}\n{\"text\":\"\u{FEFF}two\"}\n").unwrap();
        assert_eq!(read(&Corpus::find(&[path], "text").unwrap()).unwrap(), ["one", "\u{FEFF}two"]);
    }

    #[test]
    fn truncated_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let text = long_text();
        for ending in ["gz", "xz", "zst"] {
            let path = dir.path().join(format!("a.txt.{ending}"));
            let whole = pack(ending, text.as_bytes());
            fs::write(&path, &whole[..whole.len() - 9]).unwrap();
            let corpus = Corpus::find(&[path], "text").unwrap();
            let e = format!("{:#}", read(&corpus).unwrap_err());
            assert!(e.contains("cut short") && e.contains(&format!("a.txt.{ending}")), "{e}");
            assert!(!e.contains("after 0 bytes"), "{e}");
        }
    }

    #[test]
    fn seams_are_before_white_space_that_follows_a_word() {
        assert_eq!(seam("one two  three"), 7);
        assert_eq!(seam("one two  "), 7);
        assert_eq!(seam("one\u{3000} two"), 3);
        assert_eq!(seam("one"), 3);
        assert_eq!(seam("   "), 3);
    }
}
