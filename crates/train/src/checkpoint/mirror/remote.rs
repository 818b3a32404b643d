//! One folder of an object store, used step by step: requests run while the caller waits.

use super::super::load;
use super::super::manifest::{self, FileEntry, Manifest, hex};
use super::super::store;
use super::{Unreachable, parse};
use anyhow::{Context, Error, Result, ensure};
use futures_util::future::{Either, select};
use futures_util::stream::{self, StreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::HttpError;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, RetryConfig, WriteMultipart};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// Bytes of one request. Stores want at least 5 MiB for a part of an object, and an object of 2 GiB has few enough of these.
const PIECE: usize = 8 << 20;
/// Requests at a time, of each rank.
const AT_ONCE: usize = 8;
/// A request is tried again so often, with pauses that grow to 15 s, and for so long.
const RETRIES: usize = 8;
const RETRY: Duration = Duration::from_secs(60);
/// What the store's client says of an answer, before the number of its status; it has no type for that.
const STATUS: &str = "Server returned non-2xx status code: ";
/// Between two looks whether a file is still to be uploaded.
const CHECK: Duration = Duration::from_millis(500);

/// The checkpoints of a run in an object store.
#[derive(Debug)]
pub struct Mirror {
    store: Box<dyn ObjectStore>,
    prefix: Key,
    runtime: Runtime,
    url: String,
}

/// A checkpoint there, which may lack files.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    pub(super) step: u64,
    /// Of the folder.
    pub(super) text: String,
}

impl Name {
    /// Of a checkpoint whose manifest is this.
    pub(super) fn of(manifest: &Manifest) -> Result<Name> {
        let crc = hex(crc32c::crc32c(&manifest.to_bytes()?));
        Ok(Name { step: manifest.run.step, text: format!("{}-{crc}", store::directory(manifest.run.step)) })
    }

    pub(super) fn parse(text: &str) -> Option<Name> {
        let (directory, crc) = text.rsplit_once('-')?;
        let crc = crc.len() == 8 && crc.bytes().all(|b| b.is_ascii_hexdigit());
        let step = store::step_of(directory)?;
        crc.then(|| Name { step, text: text.into() })
    }
}

impl Mirror {
    /// Opens the folder that `url` names; nothing is requested yet. Credentials and endpoints come from the environment, as
    /// each store's own tools have them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`,
    /// `AZURE_STORAGE_ACCOUNT_NAME` and so on).
    ///
    /// # Errors
    /// When the address or what the environment says is wrong.
    pub fn open(url: &str) -> Result<Mirror> {
        let (kind, bucket, path) = parse(url)?;
        // Which cryptography TLS uses. It is set already where a mirror was opened before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let retry = RetryConfig { max_retries: RETRIES, retry_timeout: RETRY, ..RetryConfig::default() };
        let store: object_store::Result<Box<dyn ObjectStore>> = match kind {
            "s3" => {
                let s3 = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry).build();
                s3.map(|store| Box::new(store) as _)
            }
            "gs" => {
                let gcs =
                    GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).with_retry(retry).build();
                gcs.map(|store| Box::new(store) as _)
            }
            "az" => {
                let azure =
                    MicrosoftAzureBuilder::from_env().with_container_name(bucket).with_retry(retry).build();
                azure.map(|store| Box::new(store) as _)
            }
            _ => LocalFileSystem::new_with_prefix(path)
                .map(|store| Box::new(store.with_fsync(true).with_automatic_cleanup(true)) as _),
        };
        let store = store.with_context(|| format!("cannot use the mirror {url}"))?;
        let prefix = if kind == "file" { Key::default() } else { Key::from(path) };
        let runtime = Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
        Ok(Mirror { store, prefix, runtime, url: url.into() })
    }

    /// The same; a folder is made if it is not there.
    ///
    /// # Errors
    /// Those of [`open`](Self::open), and when the folder cannot be made.
    pub fn create(url: &str) -> Result<Mirror> {
        if let ("file", _, path) = parse(url)? {
            fs::create_dir_all(path).with_context(|| format!("cannot create {path}"))?;
        }
        Mirror::open(url)
    }

    /// Its address.
    pub fn url(&self) -> &str {
        &self.url
    }

    fn key(&self, name: &Name, file: &str) -> Key {
        self.prefix.clone().join(name.text.as_str()).join(file)
    }

    /// The checkpoints that are there, oldest first, whole or not.
    pub(super) fn names(&self) -> Result<Vec<Name>> {
        let listed = self.runtime.block_on(self.store.list_with_delimiter(Some(&self.prefix)));
        let listed = listed.with_context(|| format!("cannot list {}", self.url))?;
        let last = |key: &Key| key.parts().next_back().and_then(|part| Name::parse(part.as_ref()));
        let mut names: Vec<Name> = listed.common_prefixes.iter().filter_map(last).collect();
        names.sort();
        Ok(names)
    }

    /// Files of a checkpoint, with their sizes.
    pub(super) fn files(&self, name: &Name) -> Result<BTreeMap<String, u64>> {
        let folder = self.prefix.clone().join(name.text.as_str());
        let listed = self.runtime.block_on(self.store.list_with_delimiter(Some(&folder)));
        let listed = listed.with_context(|| format!("cannot list {}/{}", self.url, name.text))?;
        let file =
            |object: object_store::ObjectMeta| Some((object.location.filename()?.to_owned(), object.size));
        Ok(listed.objects.into_iter().filter_map(file).collect())
    }

    /// Whether all of a checkpoint is there.
    pub(super) fn is_whole(&self, name: &Name) -> Result<bool> {
        Ok(self.files(name)?.contains_key(manifest::FILE))
    }

    pub(super) fn manifest(&self, name: &Name) -> Result<Manifest> {
        let key = self.key(name, manifest::FILE);
        let read = self.runtime.block_on(async { self.store.get(&key).await?.bytes().await });
        let text = read.with_context(|| format!("cannot read {key} of {}", self.url))?;
        let manifest =
            Manifest::from_bytes(&text).with_context(|| format!("{key} of {} cannot be used", self.url))?;
        ensure!(Name::of(&manifest)? == *name, "{key} of {} is the manifest of another checkpoint", self.url);
        Ok(manifest)
    }

    /// Uploads a file, if its content is what the manifest says. `check` is asked now and then; where it fails, so does this.
    /// Nothing of a file that was not uploaded stays there.
    pub(super) fn upload(
        &self,
        name: &Name,
        file: &str,
        entry: &FileEntry,
        source: File,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let key = self.key(name, file);
        let sent = self.runtime.block_on(async {
            let upload = self.store.put_multipart(&key).await?;
            let same = |sent: FileEntry| {
                let damaged =
                    || format!("{file} of step {} is damaged: it is not what its manifest says", name.step);
                ensure!(sent == *entry, damaged());
                Ok(())
            };
            put(upload, source, &same, check).await
        });
        sent.with_context(|| format!("cannot upload {key} to {}", self.url))
    }

    /// Uploads a manifest, which makes a checkpoint of the files beside it.
    pub(super) fn seal(&self, name: &Name, manifest: &Manifest) -> Result<()> {
        let key = self.key(name, manifest::FILE);
        let put = self.runtime.block_on(self.store.put(&key, manifest.to_bytes()?.into()));
        put.with_context(|| format!("cannot upload {key} to {}", self.url))?;
        Ok(())
    }

    /// Reads a file, which must be what the manifest says, a piece at a time.
    pub(super) fn read(
        &self,
        name: &Name,
        file: &str,
        entry: &FileEntry,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let key = self.key(name, file);
        let (mut crc, mut bytes) = (0, 0);
        self.runtime.block_on(async {
            let starts = (0..entry.bytes).step_by(PIECE);
            let ranges = starts.map(|start| start..entry.bytes.min(start + PIECE as u64));
            let mut pieces =
                stream::iter(ranges).map(|range| self.store.get_range(&key, range)).buffered(AT_ONCE);
            while let Some(piece) = pieces.next().await {
                let piece = piece.with_context(|| format!("cannot fetch {key} from {}", self.url))?;
                (crc, bytes) = (crc32c::crc32c_append(crc, &piece), bytes + piece.len() as u64);
                take(&piece)?;
            }
            anyhow::Ok(())
        })?;
        let crc = hex(crc);
        ensure!(
            bytes == entry.bytes && crc == entry.crc32c,
            "{key} of {} is damaged: it has {bytes} bytes with CRC-32C {crc}, the manifest says {} with {}",
            self.url,
            entry.bytes,
            entry.crc32c
        );
        Ok(())
    }

    /// Removes a checkpoint, its manifest first.
    pub(super) fn remove(&self, name: &Name) -> Result<()> {
        let files = self.files(name)?;
        let (last, first): (Vec<&String>, Vec<&String>) =
            files.keys().partition(|file| *file != manifest::FILE);
        for file in first.into_iter().chain(last) {
            let key = self.key(name, file);
            match self.runtime.block_on(self.store.delete(&key)) {
                Err(object_store::Error::NotFound { .. }) | Ok(()) => {}
                Err(error) => Err(error).with_context(|| format!("cannot delete {key} of {}", self.url))?,
            }
        }
        Ok(())
    }
}

/// An error as other ranks can be told of it: an [`Unreachable`] if the store did not answer, or answered that it cannot now.
pub(super) fn tellable(error: Error) -> Error {
    let answered_that_it_cannot = |cause: &dyn std::error::Error| {
        let text = cause.to_string();
        ["5", "429"].iter().any(|status| text.starts_with(&format!("{STATUS}{status}")))
    };
    let unreachable = error.chain().any(|cause| cause.is::<HttpError>() || answered_that_it_cannot(cause));
    if unreachable { Unreachable(format!("{error:#}")).into() } else { error }
}

/// Uploads all of `source`, if what it was `is_right`, as long as `check` does not fail. Of what is not finished a store would
/// keep the parts, which cost as much as any other object.
async fn put(
    upload: Box<dyn MultipartUpload>,
    source: File,
    is_right: &dyn Fn(FileEntry) -> Result<()>,
    check: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let mut out = WriteMultipart::new_with_chunk_size(upload, PIECE);
    let sent = {
        let send = pin!(send(&mut out, source));
        match select(send, pin!(until_failed(check))).await {
            Either::Left((sent, _)) => sent.and_then(is_right),
            Either::Right((error, _)) => Err(error),
        }
    };
    match sent {
        Ok(()) => out.finish().await.map(drop).map_err(Into::into),
        Err(error) => {
            // The first failure is the one to tell.
            let _ = out.abort().await;
            Err(error)
        }
    }
}

/// Sends all of `source`, and returns what it was.
async fn send(out: &mut WriteMultipart, mut source: File) -> Result<FileEntry> {
    let (mut piece, mut crc, mut bytes) = (vec![0; 1 << 20], 0, 0);
    loop {
        let count = source.read(&mut piece).context("cannot read it here")?;
        if count == 0 {
            break;
        }
        (crc, bytes) = (crc32c::crc32c_append(crc, &piece[..count]), bytes + count as u64);
        out.wait_for_capacity(AT_ONCE).await?;
        out.write(&piece[..count]);
    }
    // Until none is under way.
    out.wait_for_capacity(1).await?;
    Ok(FileEntry { bytes, crc32c: hex(crc) })
}

/// Asks `check` again and again, and returns why it fails.
async fn until_failed(check: &dyn Fn() -> Result<()>) -> Error {
    loop {
        if let Err(error) = check() {
            return error;
        }
        tokio::time::sleep(CHECK).await;
    }
}

/// The manifest of a checkpoint here, and its name there.
pub(super) fn local(checkpoint: &Path) -> Result<(Name, Manifest)> {
    let manifest = load::survey(checkpoint)?;
    Ok((Name::of(&manifest)?, manifest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::BoxFuture;
    use object_store::{PutPayload, PutResult, UploadPart};
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    /// A store that takes so many parts and then no more, and what became of the upload.
    #[derive(Debug)]
    struct Parts {
        left: usize,
        ends: Arc<Mutex<Vec<&'static str>>>,
    }

    impl MultipartUpload for Parts {
        fn put_part(&mut self, _: PutPayload) -> UploadPart {
            let taken = self.left > 0;
            self.left = self.left.saturating_sub(1);
            Box::pin(async move {
                if taken {
                    Ok(())
                } else {
                    Err(object_store::path::Error::EmptySegment { path: String::new() }.into())
                }
            })
        }

        fn complete<'a: 'b, 'b>(&'a mut self) -> BoxFuture<'b, object_store::Result<PutResult>>
        where
            Self: 'b,
        {
            self.ends.lock().unwrap().push("completed");
            Box::pin(async { Ok(PutResult { e_tag: None, version: None, extensions: Default::default() }) })
        }

        fn abort<'a: 'b, 'b>(&'a mut self) -> BoxFuture<'b, object_store::Result<()>>
        where
            Self: 'b,
        {
            self.ends.lock().unwrap().push("aborted");
            Box::pin(async { Ok(()) })
        }
    }

    #[test]
    fn an_upload_that_fails_leaves_no_parts_behind() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![7; 3 * PIECE]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let upload = |left: usize, path: &Path, right: bool, wanted: bool| {
            let ends = Arc::default();
            let parts = Box::new(Parts { left, ends: Arc::clone(&ends) });
            let said = |fine: bool, what: &'static str| {
                move || {
                    ensure!(fine, what);
                    Ok(())
                }
            };
            let (is_right, check) = (said(right, "damaged"), said(wanted, "unwanted"));
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            let done = runtime.block_on(put(parts, File::open(path).unwrap(), &|_| is_right(), &check));
            let ends = ends.lock().unwrap().clone();
            (done.map_err(|error| format!("{error:#}")).err().unwrap_or_default(), ends)
        };
        assert_eq!(upload(99, file.path(), true, true), (String::new(), vec!["completed"]));
        assert_eq!(upload(99, file.path(), false, true), ("damaged".into(), vec!["aborted"]));
        assert_eq!(upload(99, file.path(), true, false), ("unwanted".into(), vec!["aborted"]));
        for (left, path) in [(1, file.path()), (99, folder.path())] {
            let (error, ends) = upload(left, path, true, true);
            assert!(!error.is_empty() && ends == ["aborted"], "{error} {ends:?}");
        }
    }

    /// An S3 server that answers every request so, or none that listens; what listing a mirror there fails with.
    fn listed(answer: Option<&'static str>) -> Error {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", server.local_addr().unwrap());
        match answer {
            None => drop(server),
            Some(answer) => drop(std::thread::spawn(move || {
                let (mut client, _) = server.accept().unwrap();
                let _ = client.read(&mut [0; 1 << 16]);
                let length = "Content-Length: 0\r\nConnection: close";
                write!(client, "HTTP/1.1 {answer}\r\n{length}\r\n\r\n").unwrap();
            })),
        }
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let s3 = AmazonS3Builder::new().with_bucket_name("bucket").with_region("us-east-1").with_retry(retry);
        let s3 = s3.with_endpoint(endpoint).with_allow_http(true).with_access_key_id("k");
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = Box::new(s3.with_secret_access_key("s").build().unwrap());
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        Mirror { store, prefix: Key::default(), runtime, url: "s3://bucket".into() }.names().unwrap_err()
    }

    #[test]
    fn a_store_that_is_down_is_told_from_one_that_refuses() {
        let status = |answer| {
            let error = tellable(listed(answer)).context("at a start");
            (crate::launch::status(&error), format!("{error:#}"))
        };
        for answer in
            [None, Some("503 Service Unavailable"), Some("500 Error"), Some("429 Too Many Requests")]
        {
            let (status, text) = status(answer);
            assert_eq!(status, crate::launch::AGAIN, "{answer:?}: {text}");
            assert!(text.contains("cannot list s3://bucket"), "{text}");
        }
        for answer in ["404 Not Found", "403 Forbidden", "401 Unauthorized", "400 Bad Request", "301 Moved"] {
            let (status, text) = status(Some(answer));
            assert_eq!(status, crate::launch::WRONG, "{answer}: {text}");
        }
    }

    #[test]
    fn names_are_told_from_other_folders() {
        let name = Name::parse("step-00000100-0a1b2c3d").unwrap();
        assert_eq!((name.step, name.text.as_str()), (100, "step-00000100-0a1b2c3d"));
        for other in
            ["step-00000100", "step-100-0a1b2c3d", "step-00000100-0a1b2c3", "step-00000100-0a1b2c3g", "x"]
        {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }
}
