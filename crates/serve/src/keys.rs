//! API keys: only their hashes are kept, and how long a comparison takes tells nothing.
//!
//! A key is 256 random bits, so its plain SHA-256 can be neither inverted nor guessed; a slow hash, as for passwords that
//! people choose, would only cost time. A file has a line for each key:
//!
//! ```text
//! # name   SHA-256 of the key, in hexadecimal                                limits, if there are any
//! alice    9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08  at-once=8 per-minute=600
//! ```

use crate::error::ApiError;
use anyhow::{Context, Result, bail, ensure};
use ferropt_engine::Scope;
use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

/// All keys that are let in. Without a file, everybody is.
#[derive(Debug, Default)]
pub struct Keys {
    file: Option<PathBuf>,
    known: RwLock<Known>,
}

/// What the file said, and which version of it that was.
#[derive(Debug, Default)]
struct Known {
    keys: Vec<Arc<Key>>,
    version: Option<(SystemTime, u64)>,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) name: Arc<str>,
    hash: [u8; 32],
    /// Requests at one time, and in a minute.
    at_once: Option<usize>,
    per_minute: Option<usize>,
    used: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    now: usize,
    /// When the requests of the last minute came.
    last_minute: VecDeque<Instant>,
}

/// A request under a key's limits; it is over when this is dropped.
pub(crate) struct Use(Arc<Key>);

impl Keys {
    /// Reads a file of keys.
    ///
    /// # Errors
    /// When it cannot be read or has no keys; a line that is wrong is named.
    pub fn read(path: &Path) -> Result<Keys> {
        let known = RwLock::new(Known { version: version(path), keys: parse(path)? });
        Ok(Keys { file: Some(path.into()), known })
    }

    /// Reads the file again if it is another one than before. Keys that stay keep their counts. Returns how many there are
    /// now, if anything was read.
    ///
    /// # Errors
    /// As [`Keys::read`]; the keys stay as they were.
    pub(crate) fn refresh(&self) -> Result<Option<usize>> {
        let Some(file) = &self.file else { return Ok(None) };
        let version = version(file);
        if version == self.known.read().unwrap_or_else(PoisonError::into_inner).version {
            return Ok(None);
        }
        // However long the file takes to be read, nobody who sends a key waits for it.
        let keys = parse(file);
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        // A wrong file is told of once.
        known.version = version;
        let mut keys = keys?;
        for key in &mut keys {
            if let Some(old) = known.keys.iter().find(|old| old.is_like(key)) {
                *key = old.clone();
            }
        }
        known.keys = keys;
        Ok(Some(known.keys.len()))
    }

    /// Whether everybody is let in.
    pub(crate) fn is_empty(&self) -> bool {
        self.file.is_none()
    }

    /// The key of an `Authorization` header. All keys are compared, to the last byte, whatever the header is.
    ///
    /// # Errors
    /// 401 when it is none of them.
    pub(crate) fn find(&self, header: Option<&[u8]>) -> Result<Arc<Key>, ApiError> {
        let token = header.and_then(bearer);
        let hash: [u8; 32] = Sha256::digest(token.unwrap_or(b"")).into();
        let mut found = None;
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        for key in &known.keys {
            if same(&key.hash, &hash) {
                found = Some(key);
            }
        }
        found.filter(|_| token.is_some()).cloned().ok_or_else(|| {
            ApiError::no_key(match token {
                Some(_) => "the API key is not known here",
                None => "there is no API key; send one as a header, Authorization: Bearer KEY",
            })
        })
    }
}

/// When a file was changed, and its size; none if it is not there.
pub(crate) fn version(path: &Path) -> Option<(SystemTime, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

/// The keys of a file.
fn parse(path: &Path) -> Result<Vec<Arc<Key>>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let parse = || -> Result<Vec<Arc<Key>>> {
        let mut keys: Vec<Arc<Key>> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or("").trim();
            if line.is_empty() {
                continue;
            }
            let key = Key::parse(line).with_context(|| format!("line {number}"))?;
            let same = keys.iter().any(|other| other.name == key.name || other.hash == key.hash);
            ensure!(!same, "line {number}: the name or the key {:?} was there before", key.name);
            keys.push(Arc::new(key));
        }
        ensure!(
            !keys.is_empty(),
            "it has no keys, so nobody could use the server; add one: ferropt serve key NAME >> {}",
            path.display()
        );
        Ok(keys)
    };
    parse().with_context(|| format!("cannot use the keys in {}", path.display()))
}

/// What comes behind `Bearer`, a word that may be written in any case (RFC 9110, 11.1).
fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// Compares in a time that does not depend on where they differ.
fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let difference = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    std::hint::black_box(difference) == 0
}

impl Key {
    fn is_like(&self, other: &Key) -> bool {
        let all = |key: &Key| (key.name.clone(), key.hash, key.at_once, key.per_minute);
        all(self) == all(other)
    }

    fn parse(line: &str) -> Result<Key> {
        let mut words = line.split_whitespace();
        let (Some(name), Some(hash)) = (words.next(), words.next()) else {
            bail!("expected a name and the key's SHA-256, as `ferropt serve key NAME` prints them")
        };
        let hash = unhex(hash).with_context(|| {
            format!("{hash:?} is no SHA-256 of 64 hexadecimal digits; `ferropt serve key NAME` makes one")
        })?;
        let (mut at_once, mut per_minute) = (None, None);
        for word in words {
            let (limit, value) = word.split_once('=').unwrap_or((word, ""));
            let place = match limit {
                "at-once" => &mut at_once,
                "per-minute" => &mut per_minute,
                _ => bail!("{word:?} is no limit; there is at-once=N and per-minute=N"),
            };
            let value = value.parse().ok().filter(|value| *value > 0);
            *place = Some(value.with_context(|| format!("{word:?}: expected a number from 1 up"))?);
        }
        Ok(Key { name: name.into(), hash, at_once, per_minute, used: Mutex::default() })
    }

    /// That of its texts. Keys of the same name, one after the other, have each their own.
    pub(crate) fn scope(&self) -> Scope {
        Scope(self.hash)
    }

    /// Begins a request.
    ///
    /// # Errors
    /// 429 when that is one more than the key allows.
    pub(crate) fn begin(self: &Arc<Self>, now: Instant) -> Result<Use, ApiError> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(most) = self.at_once.filter(|most| used.now >= *most) {
            let message = format!("this key allows {most} requests at once, and so many are under way");
            return Err(ApiError::too_many("key_at_once", 1, message));
        }
        if let Some(most) = self.per_minute {
            const MINUTE: Duration = Duration::from_secs(60);
            while used.last_minute.pop_front_if(|then| now.duration_since(*then) >= MINUTE).is_some() {}
            if let Some(oldest) = used.last_minute.front().filter(|_| used.last_minute.len() >= most) {
                let left = MINUTE.saturating_sub(now.duration_since(*oldest)).as_secs() + 1;
                let message = format!("this key allows {most} requests a minute, and so many were made");
                return Err(ApiError::too_many("key_per_minute", left, message));
            }
            used.last_minute.push_back(now);
        }
        used.now += 1;
        Ok(Use(self.clone()))
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.used.lock().unwrap_or_else(PoisonError::into_inner).now -= 1;
    }
}

/// A new key, and the line of the file that lets it in.
///
/// # Errors
/// When the name has spaces, or the system gives no random numbers.
pub fn new_key(name: &str) -> Result<(String, String)> {
    ensure!(
        !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || c == '#'),
        "{name:?} is no name for a key: it may have no spaces and no #"
    );
    let mut random = [0; 32];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .context("the system gives no random numbers: /dev/urandom cannot be read")?;
    let key = format!("fo-{}", hex(&random));
    let line = format!("{name} {}", hex(&Sha256::digest(&key)));
    Ok((key, line))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(text: &str) -> Result<Keys> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys");
        fs::write(&file, text).unwrap();
        Keys::read(&file)
    }

    #[test]
    fn keys_are_made_read_and_found() {
        let (alice, line) = new_key("alice").unwrap();
        let (bob, other) = new_key("bob").unwrap();
        assert_ne!(alice, bob);
        assert!(!line.contains(&alice[3..]));
        let keys = read(&format!("# all of them\n{line} at-once=2\n\n{other} # a comment\n")).unwrap();
        let find = |header: &str| keys.find(Some(header.as_bytes())).map(|key| key.name.to_string());
        assert_eq!(find(&format!("Bearer {alice}")).unwrap(), "alice");
        assert_eq!(find(&format!("bearer  {bob} ")).unwrap(), "bob");
        for wrong in
            [format!("Basic {alice}"), format!("Bearer {}", &alice[..60]), "Bearer ".into(), "é".into()]
        {
            assert_eq!(find(&wrong).unwrap_err().status, 401, "{wrong}");
        }
        assert_eq!(keys.find(None).unwrap_err().status, 401);
    }

    #[test]
    fn limits_hold() {
        let (_, line) = new_key("a").unwrap();
        let keys = read(&format!("{line} at-once=2 per-minute=4")).unwrap();
        let (key, start) = (&keys.known.read().unwrap().keys[0].clone(), Instant::now());
        let at = |seconds| key.begin(start + Duration::from_secs(seconds));
        let (first, second) = (at(0).unwrap(), at(1).unwrap());
        assert_eq!(at(2).err().unwrap().code, "key_at_once");
        drop(first);
        let third = at(3).unwrap();
        drop((second, third));
        drop(at(4).unwrap());
        let refused = at(5).err().unwrap();
        assert_eq!((refused.code, refused.retry_after), ("key_per_minute", Some(56)));
        drop(at(61).unwrap());
    }

    #[test]
    fn the_file_is_read_again_when_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys");
        let ((alice, line), (bob, other)) = (new_key("alice").unwrap(), new_key("bob").unwrap());
        fs::write(&file, format!("{line} at-once=1\n")).unwrap();
        let keys = Keys::read(&file).unwrap();
        let find = |key: &str| keys.find(Some(format!("Bearer {key}").as_bytes()));
        assert_eq!(keys.refresh().unwrap(), None);
        let under_way = find(&alice).unwrap().begin(Instant::now()).unwrap();
        fs::write(&file, format!("{line} at-once=1\n{other}\n")).unwrap();
        assert_eq!(keys.refresh().unwrap(), Some(2));
        assert!(find(&bob).is_ok());
        assert_eq!(find(&alice).unwrap().begin(Instant::now()).err().unwrap().code, "key_at_once");
        drop(under_way);
        // Wrong files are told of once, and change nothing; a key that is gone is let in no more.
        fs::write(&file, "nonsense").unwrap();
        assert!(keys.refresh().is_err());
        assert!(keys.refresh().unwrap().is_none() && find(&bob).is_ok());
        fs::remove_file(&file).unwrap();
        assert!(keys.refresh().is_err() && find(&alice).is_ok());
        fs::write(&file, other).unwrap();
        assert_eq!(keys.refresh().unwrap(), Some(1));
        assert!(find(&alice).is_err() && find(&bob).is_ok());
    }

    #[test]
    fn nobody_waits_for_a_file_that_takes_long_to_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys");
        let ((alice, line), (_, other)) = (new_key("alice").unwrap(), new_key("bob").unwrap());
        fs::write(&file, &line).unwrap();
        let keys = Keys::read(&file).unwrap();
        fs::remove_file(&file).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
        std::thread::scope(|scope| {
            let refreshed = scope.spawn(|| keys.refresh());
            // Opens once the other side is being read.
            let mut pipe = fs::OpenOptions::new().write(true).open(&file).unwrap();
            let is_free = keys.known.try_read().is_ok();
            pipe.write_all(format!("{line}\n{other}\n").as_bytes()).unwrap();
            drop(pipe);
            assert_eq!(refreshed.join().unwrap().unwrap(), Some(2));
            assert!(is_free, "requests would have waited");
        });
        assert!(keys.find(Some(format!("Bearer {alice}").as_bytes())).is_ok());
    }

    #[test]
    fn wrong_lines_are_named() {
        let (_, line) = new_key("a").unwrap();
        for (text, part) in [
            ("", "no keys"),
            ("alice\n", "line 1"),
            ("\nalice 1234\n", "line 2"),
            (&format!("{line} at-once=0"), "at-once=0"),
            (&format!("{line} fast=1"), "fast=1"),
            (&format!("{line}\n{line}"), "line 2"),
        ] {
            let error = format!("{:#}", read(text).unwrap_err());
            assert!(error.contains(part), "{text:?}: {error}");
        }
        assert!(new_key("a b").is_err());
    }
}
