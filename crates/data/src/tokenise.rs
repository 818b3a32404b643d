//! Tokenising a corpus once, on all cores.

use crate::token_file::{TokenFile, TokenWriter};
use crate::{Corpus, Piece, Tokenizer};
use anyhow::{Context, Result, bail};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use rayon::ThreadPoolBuilder;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Text that is tokenised in one go, bytes: enough work to share among threads.
const BATCH: usize = 8 << 20;

/// Time between two looks at whether another process has finished a token file.
const TURN: Duration = Duration::from_millis(50);

/// Time between two lines on the progress where there is no terminal for a bar.
const BETWEEN_LINES: Duration = Duration::from_secs(60);

/// Largest token file that is compared with all its checksums when it is opened, bytes: a second's reading. Of larger ones a
/// block is, before it is used.
const AT_ONCE: u64 = 1 << 30;

/// Opens the token file of a corpus in the folder `cache`, or makes it first, with a progress bar when standard error
/// is a terminal, and a line every minute when it is none. `name` starts the file's name, for people; the rest of it is the fingerprint of the tokenizer and of
/// paths, sizes and times of the sources, so a changed source or tokenizer makes another file. One that is found damaged is
/// made anew, and [`TokenFile::replaces`] says why.
///
/// Two processes may do this at once: the second waits for the first.
///
/// # Errors
/// Names the source that cannot be read, with the place; a folder that cannot be written.
pub fn tokenise(corpus: &Corpus, tokenizer: &Tokenizer, cache: &Path, name: &str) -> Result<TokenFile> {
    tokenise_unless(&|| false, corpus, tokenizer, cache, name)?.context("tokenising was interrupted")
}

/// [`tokenise`], given up soon after `stop` says so; the result is then `None`, and the file will be made another time.
///
/// # Errors
/// Those of [`tokenise`].
pub fn tokenise_unless(
    stop: &dyn Fn() -> bool,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    cache: &Path,
    name: &str,
) -> Result<Option<TokenFile>> {
    let fingerprint = fingerprint(corpus, tokenizer)?;
    let short: String = fingerprint[..8].iter().map(|b| format!("{b:02x}")).collect();
    let name: String =
        name.chars().map(|c| if c.is_alphanumeric() || "-_".contains(c) { c } else { '_' }).collect();
    let path = cache.join(format!("{name}-{short}.tokens"));
    let mut damage = None;
    if path.exists()
        && let Err(error) = open_whole(&path)
    {
        if error.chain().any(|cause| cause.is::<std::io::Error>()) {
            return Err(error);
        }
        let why = format!("{} was damaged ({})", path.display(), error.root_cause());
        fs::remove_file(&path).with_context(|| format!("{why} and cannot be deleted"))?;
        damage = Some(why);
    }
    if !path.exists() && !make(stop, corpus, tokenizer, fingerprint, &path, &name)? {
        return Ok(None);
    }
    let file = open_whole(&path)?.in_place_of(damage);
    if file.fingerprint() != fingerprint {
        bail!(
            "{} was made from other text or by another tokenizer; delete it, and it is made anew",
            path.display()
        );
    }
    Ok(Some(file))
}

/// Does `work`, in which texts are tokenised, on so many threads, or on all that there are.
///
/// # Errors
/// When the system gives no threads.
pub fn on_threads<T: Send>(threads: Option<usize>, work: impl FnOnce() -> T + Send) -> Result<T> {
    let Some(threads) = threads else { return Ok(work()) };
    let pool = ThreadPoolBuilder::new().num_threads(threads).build();
    Ok(pool.with_context(|| format!("cannot start {threads} threads to tokenise with"))?.install(work))
}

/// Opens a token file that is whole, as far as that can be told in no time.
fn open_whole(path: &Path) -> Result<TokenFile> {
    let file = TokenFile::open(path)?;
    if fs::metadata(path)?.len() <= AT_ONCE {
        file.verify()?;
    }
    Ok(file)
}

fn fingerprint(corpus: &Corpus, tokenizer: &Tokenizer) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut field = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    field(b"tokens 3");
    field(&tokenizer.fingerprint());
    field(corpus.text_field.as_bytes());
    for file in &corpus.files {
        // The whole path: copying tools keep times, and other data may well have the same name and size.
        let place = fs::canonicalize(&file.path)
            .with_context(|| format!("cannot read the text at {}", file.path.display()))?;
        field(place.as_os_str().as_encoded_bytes());
        field(&file.bytes.to_le_bytes());
        field(&file.modified.to_le_bytes());
    }
    Ok(hash.finalize().into())
}

/// Makes the token file at `path`; false if `stop` ended that.
fn make(
    stop: &dyn Fn() -> bool,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    fingerprint: [u8; 32],
    path: &Path,
    name: &str,
) -> Result<bool> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let part = path.with_extension("part");
    let failed = || format!("cannot write {}", part.display());
    let file = File::options().create(true).truncate(false).write(true).open(&part).with_context(failed)?;
    // One maker at a time. The partial file is never deleted while others may wait for it, so whoever holds the lock
    // holds the file of that name, or the finished one.
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if stop() => return Ok(false),
            Err(TryLockError::WouldBlock) => std::thread::sleep(TURN),
            Err(TryLockError::Error(e)) if e.kind() != ErrorKind::Unsupported => {
                return Err(e).with_context(failed);
            }
            _ => break,
        }
    }
    if path.exists() {
        // Made while this one waited; whoever waits for the empty file still will find the same.
        let _ = fs::remove_file(&part);
        return Ok(true);
    }
    file.set_len(0).with_context(failed)?;
    // The lock lasts as long as `file` is open: until after the renaming.
    let made = || -> Result<bool> {
        let whole = write(stop, corpus, tokenizer, fingerprint, file.try_clone()?, name)?;
        if whole {
            fs::rename(&part, path)?;
        }
        Ok(whole)
    };
    let made = made().with_context(|| format!("cannot make the token file {}", path.display()));
    if !matches!(made, Ok(true)) {
        // Gives the room back; the name stays, for the reason above.
        let _ = file.set_len(0);
        return made;
    }
    File::open(folder)
        .and_then(|f| f.sync_all())
        .with_context(|| format!("cannot sync {}", folder.display()))
        .map(|()| true)
}

/// Fills the token file; false if `stop` ended that.
fn write(
    stop: &dyn Fn() -> bool,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    fingerprint: [u8; 32],
    file: File,
    name: &str,
) -> Result<bool> {
    let failed = "cannot write it; is the disk full? (data.cache sets the folder)";
    let mut writer = TokenWriter::new(file, tokenizer.vocab_size(), fingerprint).context(failed)?;
    let bar = ProgressBar::new(corpus.bytes());
    let style = "  tokenising {msg} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} to go";
    bar.set_style(ProgressStyle::with_template(style)?.progress_chars("=> "));
    bar.set_message(name.to_owned());
    let mut told = Instant::now();

    let pieces = corpus.pieces();
    let consumed = pieces.consumed();
    // Tokens of the document that is open.
    let mut open = false;
    let whole = std::thread::scope(|scope| -> Result<bool> {
        // Reading and decompression run ahead by at most two batches.
        let (send, receive) = mpsc::sync_channel(1);
        scope.spawn(move || read_batches(pieces, send));
        for batch in receive {
            if stop() {
                return Ok(false);
            }
            let batch: Vec<Piece> = batch?;
            let encoded: Vec<Vec<u32>> =
                batch.par_iter().map(|piece| tokenizer.encode(&piece.text)).collect::<Result<_>>()?;
            for (piece, ids) in batch.iter().zip(&encoded) {
                writer.push(ids, piece.text.len() as u64).context(failed)?;
                open |= !ids.is_empty();
                // Empty documents leave no trace.
                if piece.ends_document && std::mem::take(&mut open) {
                    writer.end_document().context(failed)?;
                }
            }
            bar.set_position(consumed.load(Ordering::Relaxed));
            if bar.is_hidden() && told.elapsed() >= BETWEEN_LINES {
                told = Instant::now();
                // A closed standard error is no reason to stop.
                let _ =
                    writeln!(std::io::stderr(), "{}", progress_line(name, bar.position(), corpus.bytes()));
            }
        }
        Ok(true)
    })?;
    bar.finish_and_clear();
    if !whole {
        return Ok(false);
    }
    if writer.tokens() == 0 {
        bail!("the text of `{name}` is empty");
    }
    writer.finish().context(failed)?;
    Ok(true)
}

/// How far it is, where there is no terminal for a bar.
fn progress_line(name: &str, done: u64, all: u64) -> String {
    format!("tokenising {name}: {} of {}", HumanBytes(done), HumanBytes(all))
}

/// Sends pieces in batches until the end, an error, or the receiver's end.
fn read_batches(pieces: impl Iterator<Item = Result<Piece>>, send: mpsc::SyncSender<Result<Vec<Piece>>>) {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for piece in pieces {
        match piece {
            Ok(piece) => {
                bytes += piece.text.len();
                batch.push(piece);
                if bytes >= BATCH {
                    bytes = 0;
                    if send.send(Ok(std::mem::take(&mut batch))).is_err() {
                        return;
                    }
                }
            }
            Err(e) => {
                // A receiver that is gone has met an error of its own.
                let _ = send.send(Err(e));
                return;
            }
        }
    }
    let _ = send.send(Ok(batch));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EOS;

    fn tokenizer() -> Tokenizer {
        Tokenizer::train([Ok("some words, some more words; naïve 狐 words ".repeat(50))], 300).unwrap()
    }

    fn ids(file: &TokenFile) -> Vec<u32> {
        let mut ids = vec![0; file.tokens() as usize];
        file.read(0, &mut ids).unwrap();
        ids
    }

    #[test]
    fn pieces_give_the_tokens_of_whole_documents() {
        let dir = tempfile::tempdir().unwrap();
        let t = tokenizer();
        // Several pieces a document, several batches, an empty document.
        let long: String =
            (0..90_000).map(|i| format!("{i} words  naïve\n\n 狐's{}", "\u{3000} x".repeat(i % 3))).collect();
        assert!(long.len() > 2 << 20);
        let documents = [&long, "", "short", &long, &long, &long, "end"];
        for (i, d) in documents.iter().enumerate() {
            fs::write(dir.path().join(format!("{i}.txt")), d).unwrap();
        }
        let corpus = Corpus::find(&[dir.path()], "text").unwrap();
        let file = tokenise(&corpus, &t, &dir.path().join("cache"), "a/b").unwrap();
        let mut expected = vec![];
        for d in documents.iter().filter(|d| !d.is_empty()) {
            expected.extend(t.encode(d).unwrap());
            expected.push(EOS);
        }
        assert!(ids(&file) == expected, "{} and {} tokens", file.tokens(), expected.len());
        assert_eq!(file.documents(), 6);
        assert_eq!(file.text_bytes(), documents.iter().map(|d| d.len() as u64).sum::<u64>());
        assert!(file.path().file_name().unwrap().to_str().unwrap().starts_with("a_b-"));
    }

    #[test]
    fn a_line_of_progress_tells_what_and_how_far() {
        assert_eq!(progress_line("books", 3 << 29, 1 << 31), "tokenising books: 1.50 GiB of 2.00 GiB");
    }

    #[test]
    fn files_are_reused_until_something_changes() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        let text = dir.path().join("a.txt");
        let made = |t: &Tokenizer| {
            let corpus = Corpus::find(&[&text], "text").unwrap();
            let file = tokenise(&corpus, t, &cache, "x").unwrap();
            (file.path().to_owned(), fs::metadata(file.path()).unwrap().modified().unwrap())
        };
        fs::write(&text, "some words").unwrap();
        let t = tokenizer();
        let first = made(&t);
        assert_eq!(made(&t), first);
        let other = Tokenizer::train([Ok("entirely different, different text".repeat(9))], 270).unwrap();
        assert_ne!(made(&other).0, first.0);
        fs::write(&text, "some more words").unwrap();
        assert_ne!(made(&t).0, first.0);
        assert!(!fs::read_dir(&cache).unwrap().any(|f| f.unwrap().path().extension().unwrap() != "tokens"));
    }

    #[test]
    fn failures_leave_no_token_file_and_can_be_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        let text = dir.path().join("a.jsonl");
        fs::write(&text, "{\"text\":\"some words\"}\n{\"text\":").unwrap();
        let t = tokenizer();
        let corpus = Corpus::find(&[&text], "text").unwrap();
        for _ in 0..2 {
            let e = format!("{:#}", tokenise(&corpus, &t, &cache, "x").err().unwrap());
            assert!(e.contains("a.jsonl") && e.contains("line 2"), "{e}");
            assert!(
                !fs::read_dir(&cache).unwrap().any(|f| f.unwrap().path().extension().unwrap() == "tokens")
            );
        }
        fs::write(&text, "\n").unwrap();
        let corpus = Corpus::find(&[&text], "text").unwrap();
        let e = format!("{:#}", tokenise(&corpus, &t, &cache, "x").err().unwrap());
        assert!(e.contains("empty"), "{e}");
    }

    #[test]
    fn a_maker_that_is_stopped_leaves_nothing_and_the_next_one_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (path, cache) = (dir.path().join("a.txt"), dir.path().join("cache"));
        fs::write(&path, "some words ".repeat(10_000)).unwrap();
        let (t, corpus) = (tokenizer(), Corpus::find(&[&path], "text").unwrap());
        assert!(tokenise_unless(&|| true, &corpus, &t, &cache, "x").unwrap().is_none());
        let left: u64 = fs::read_dir(&cache).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
        assert_eq!(left, 0);
        let made = tokenise_unless(&|| false, &corpus, &t, &cache, "x").unwrap().unwrap();
        assert!(made.tokens() > 1000);
        // What is there already needs no time to be used.
        assert!(tokenise_unless(&|| true, &corpus, &t, &cache, "x").unwrap().is_some());
    }

    #[test]
    fn as_many_threads_work_as_are_wanted() {
        for threads in [1, 3] {
            assert_eq!(on_threads(Some(threads), rayon::current_num_threads).unwrap(), threads);
        }
        assert_eq!(on_threads(None, rayon::current_num_threads).unwrap(), rayon::current_num_threads());
    }

    #[test]
    fn two_makers_at_once_make_one_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let (path, text) = (dir.path().join("a.txt"), "some words ".repeat(10_000));
        fs::write(&path, &text).unwrap();
        let (t, corpus) = (tokenizer(), Corpus::find(&[&path], "text").unwrap());
        let expected = [t.encode(&text).unwrap(), vec![EOS]].concat();
        for round in 0..20 {
            let cache = dir.path().join(format!("cache{round}"));
            std::thread::scope(|s| {
                let make = || ids(&tokenise(&corpus, &t, &cache, "x").unwrap());
                let makers: Vec<_> = (0..4).map(|_| s.spawn(make)).collect();
                for maker in makers {
                    assert!(maker.join().unwrap() == expected);
                }
            });
        }
    }

    #[test]
    fn torn_files_of_killed_makers_are_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("a.txt");
        fs::write(&text, "some words").unwrap();
        let (t, corpus) = (tokenizer(), Corpus::find(&[&text], "text").unwrap());
        let path = tokenise(&corpus, &t, dir.path(), "x").unwrap().path().to_owned();
        let whole = fs::read(&path).unwrap();
        // What a kill in the middle leaves: a partial file that is longer than the whole one will be.
        fs::remove_file(&path).unwrap();
        fs::write(path.with_extension("part"), [0; 5000]).unwrap();
        tokenise(&corpus, &t, dir.path(), "x").unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
        // And what a bad disk leaves is made anew, not in silence.
        let mut flipped = whole.clone();
        flipped[130] ^= 1;
        for (damaged, why) in
            [(&whole[..whole.len() - 2], "its header says"), (&flipped[..], "from byte 128")]
        {
            fs::write(&path, damaged).unwrap();
            let made = tokenise(&corpus, &t, dir.path(), "x").unwrap();
            let told = made.replaces().unwrap();
            assert!(told.contains(why) && told.contains(path.to_str().unwrap()), "{told}");
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
        assert!(tokenise(&corpus, &t, dir.path(), "x").unwrap().replaces().is_none());
    }

    #[test]
    fn files_of_the_same_name_size_and_time_in_two_folders_are_two() {
        let dir = tempfile::tempdir().unwrap();
        let (t, now) = (tokenizer(), std::time::SystemTime::now());
        let made = ["some words", "more words"].map(|text| {
            let path = dir.path().join(&text[..4]).join("a.txt");
            fs::create_dir(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            File::options().write(true).open(&path).unwrap().set_modified(now).unwrap();
            let corpus = Corpus::find(&[&path], "text").unwrap();
            let file = tokenise(&corpus, &t, &dir.path().join("cache"), "x").unwrap();
            assert_eq!(ids(&file), [t.encode(text).unwrap(), vec![EOS]].concat());
            file.checksum()
        });
        assert_ne!(made[0], made[1]);
    }

    /// A slice of the books corpus, against the count in its SOURCES.md.
    #[test]
    fn books_have_the_known_number_of_tokens() {
        let (Some(books), Some(t)) =
            (crate::testing::shared("data/books"), crate::testing::shared("data/tokenizer"))
        else {
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let corpus = Corpus::find(&[books.join("books-valid.jsonl.xz")], "text").unwrap();
        let file = tokenise(&corpus, &Tokenizer::load(&t).unwrap(), dir.path(), "valid").unwrap();
        assert_eq!(file.documents(), 67);
        // 273,245 tokens of text, and one </s> a document.
        assert!([273_245, 273_245 + 67].contains(&file.tokens()), "{}", file.tokens());
    }
}
