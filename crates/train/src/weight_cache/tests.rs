use super::*;
use ferropt_device::cpu::{CpuDevice, CpuOptions};
use ferropt_device::{PAGE, Segment};
use ferropt_model::{Cache, Matrices, Memory, initial_rows};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use tempfile::TempDir;

/// A model that is made of two files, and a folder for its weights.
struct Lab {
    folder: TempDir,
    device: CpuDevice,
    config: Config,
    /// Rows of matrices that were read.
    read: AtomicUsize,
}

impl Lab {
    fn new() -> Lab {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in [("a", "one"), ("b", "two")] {
            fs::write(folder.path().join(name), content).unwrap();
        }
        let device = CpuDevice::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
        let config = Config { vocab: 100, positions: 16, layers: 1, ..Config::preset("tiny").unwrap() };
        Lab { folder, device, config, read: AtomicUsize::new(0) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn cache(&self) -> WeightCache {
        WeightCache::new(self.path("cache")).with_limit(1 << 30).with_least(0)
    }

    fn sources(&self) -> [PathBuf; 2] {
        ["a", "b"].map(|name| self.path(name))
    }

    fn open(&self, cache: &WeightCache, format: WeightFormat) -> (Decoder<CpuDevice>, Outcome) {
        self.open_of(cache, format, &self.sources())
    }

    fn open_of(
        &self,
        cache: &WeightCache,
        format: WeightFormat,
        sources: &[PathBuf],
    ) -> (Decoder<CpuDevice>, Outcome) {
        let table = self.config.parameters();
        let read = |index: usize, rows: Range<usize>, out: &mut [f32]| {
            let counted = table[index].is_matrix() && index != 1;
            self.read.fetch_add(if counted { rows.len() } else { 0 }, Relaxed);
            initial_rows(&table[index], index, 7, rows.start, out);
            Ok(())
        };
        cache.decoder(&self.device, &self.config, format, sources, &read).unwrap()
    }

    /// Logits behind a short text, as bits.
    fn logits(&self, decoder: &Decoder<CpuDevice>) -> Vec<u32> {
        let mut cache = Cache::<_, f32>::new(&self.device, &self.config, 1).unwrap();
        let mut memory = Memory::new(&self.device, &self.config, PAGE, 1).unwrap();
        let segments = [Segment { rows: 5, past: 0, pages: &[0] }];
        decoder.forward(&self.device, &[2, 40, 50, 60, 99], &segments, &mut cache, &mut memory).unwrap();
        let mut logits = Vec::new();
        decoder.head(&self.device, &[4], &mut memory).unwrap().read(0, &mut logits);
        logits.into_iter().map(f32::to_bits).collect()
    }

    /// The one file of weights, and that nothing else is there.
    fn kept(&self) -> PathBuf {
        let files = self.cache().files().unwrap();
        assert!(files.len() == 1 && file::is_weights(&files[0]), "{files:?}");
        files[0].clone()
    }
}

#[test]
fn what_is_opened_again_is_found_with_the_same_bits() {
    for (own_head, format) in [false, true].into_iter().flat_map(|own| WeightFormat::ALL.map(|f| (own, f))) {
        let mut lab = Lab::new();
        lab.config.own_head = own_head;
        let table = lab.config.parameters();
        let read = |index: usize, rows: Range<usize>, out: &mut [f32]| {
            initial_rows(&table[index], index, 7, rows.start, out);
            Ok(())
        };
        let want =
            lab.logits(&Decoder::new(&lab.device, &lab.config, format, &read, Matrices::Rows).unwrap());
        let (first, outcome) = lab.open(&lab.cache(), format);
        assert!(matches!(outcome, Outcome::Kept(bytes) if bytes > 0), "{outcome:?}");
        assert_eq!(lab.logits(&first), want);
        let read = lab.read.load(Relaxed);
        let (second, outcome) = lab.open(&lab.cache(), format);
        assert!(matches!(outcome, Outcome::Found), "{outcome:?}");
        assert_eq!(lab.read.load(Relaxed), read, "matrices were read again");
        // What is in use can be removed.
        lab.cache().clear().unwrap();
        assert_eq!(lab.logits(&second), want);
        assert!(lab.cache().entries().unwrap().is_empty());
    }
}

#[test]
fn damage_is_noticed_and_mended() {
    let lab = Lab::new();
    let format = WeightFormat::Int8;
    let want = lab.logits(&lab.open(&lab.cache(), format).0);
    let path = lab.kept();
    let whole = fs::read(&path).unwrap();
    let key = file::key_of(&path).unwrap().len();
    let body = whole.len() - whole.len() % 4096;
    let mended = |damaged: &[u8], what: &str| {
        fs::write(&path, damaged).unwrap();
        let (decoder, outcome) = lab.open(&lab.cache(), format);
        assert!(matches!(outcome, Outcome::Kept(_)), "{what}: {outcome:?}");
        assert_eq!(lab.logits(&decoder), want, "{what}");
        assert!(fs::read(lab.kept()).unwrap() == whole, "{what}: the file is another");
    };
    // Every part of the header, every byte of the numbers in it.
    for at in (0..24).chain((24..24 + key).step_by(97)) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x41;
        mended(&damaged, &format!("byte {at}"));
    }
    for length in [0, 7, 23, 24, 24 + key / 2, 4095, 4096, body / 2, whole.len() - 1] {
        mended(&whole[..length], &format!("cut to {length}"));
    }
    mended(&[&whole[..], b"x"].concat(), "longer");
    mended(&vec![0xff; whole.len()], "foreign");
    // What the body holds is not looked at; other numbers are all that can come of it.
    let mut damaged = whole.clone();
    damaged[4096..].iter_mut().for_each(|byte| *byte = 0xff);
    fs::write(&path, &damaged).unwrap();
    let (decoder, outcome) = lab.open(&lab.cache(), format);
    assert!(matches!(outcome, Outcome::Found));
    assert_eq!(lab.logits(&decoder).len(), want.len());
}

#[test]
fn changed_files_are_noticed() {
    let lab = Lab::new();
    let format = WeightFormat::Bf16;
    let kept = |what: &str| {
        let (_, outcome) = lab.open(&lab.cache(), format);
        assert!(matches!(outcome, Outcome::Kept(_)), "{what}: {outcome:?}");
        assert!(matches!(lab.open(&lab.cache(), format).1, Outcome::Found), "{what}");
        assert!(lab.cache().knows(&lab.sources()), "{what}");
        lab.kept();
    };
    kept("new");
    fs::write(lab.path("b"), "three").unwrap();
    assert!(!lab.cache().knows(&lab.sources()));
    kept("longer");
    let modified = lab.path("b").metadata().unwrap().modified().unwrap();
    fs::write(lab.path("b"), "seven").unwrap();
    File::options().append(true).open(lab.path("b")).unwrap().set_modified(modified).unwrap();
    kept("of the same length and time");
    fs::write(lab.path("c"), "eight").unwrap();
    File::options().append(true).open(lab.path("c")).unwrap().set_modified(modified).unwrap();
    fs::rename(lab.path("c"), lab.path("b")).unwrap();
    kept("replaced");
    assert!(!lab.cache().knows(&lab.sources()[..1]), "others of the files are none of them");
    assert!(!lab.cache().knows(&[lab.path("nowhere")]));
}

#[test]
fn a_cache_that_cannot_be_used_is_done_without() {
    let lab = Lab::new();
    let format = WeightFormat::Int4;
    let want = lab.logits(&lab.open(&lab.cache(), format).0);
    let failed = |cache: &WeightCache, parts: &[&str]| {
        let (decoder, outcome) = lab.open(cache, format);
        let Outcome::Failed(error) = outcome else { panic!("{outcome:?}") };
        let said = format!("{error:#}");
        assert!(parts.iter().all(|part| said.contains(part)), "{said} should have {parts:?}");
        assert_eq!(lab.logits(&decoder), want);
    };
    failed(&WeightCache::new(lab.path("a").join("cache")).with_least(0), &["cannot be kept", "a/cache"]);
    let small = WeightCache::new(lab.path("small")).with_least(0).with_limit(1000);
    failed(&small, &["1000 bytes", SIZE_VARIABLE, FOLDER_VARIABLE]);
    assert!(small.files().unwrap().is_empty());
    // Something else has the file's name.
    let path = lab.kept();
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    failed(&lab.cache(), &["cannot be kept"]);
    assert_eq!(lab.cache().files().unwrap(), [path], "what was begun is gone");
    // Weights of few bytes are made in a moment.
    let (_, outcome) = lab.open(&WeightCache::new(lab.path("unused")), format);
    assert!(matches!(outcome, Outcome::Small) && !lab.path("unused").exists());
}

#[test]
fn nothing_is_left_of_what_failed_on_the_way() {
    let lab = Lab::new();
    let path = lab.path("x.weights");
    let failed = file::write(&path, "key", 10_000, |write| {
        write(0, b"something")?;
        anyhow::bail!("the disk is full")
    });
    assert_eq!(failed.err().unwrap().to_string(), "the disk is full");
    // A file that changes while it is read.
    let (cache, sources) = (lab.cache(), lab.sources());
    let table = lab.config.parameters();
    let read = |index: usize, rows: Range<usize>, out: &mut [f32]| {
        if index == 0 && rows.start == 0 {
            fs::write(&sources[0], "in between")?;
        }
        initial_rows(&table[index], index, 7, rows.start, out);
        Ok(())
    };
    let made = cache.decoder(&lab.device, &lab.config, WeightFormat::F32, &sources, &read);
    let Outcome::Failed(error) = made.unwrap().1 else { panic!("it was kept") };
    assert!(format!("{error:#}").contains("changed while they were read"));
    assert!(cache.files().unwrap().is_empty());
    assert_eq!(fs::read_dir(lab.folder.path()).unwrap().count(), 3, "two files and the cache");
}

#[test]
fn what_was_used_longest_ago_makes_room() {
    let lab = Lab::new();
    let format = WeightFormat::Bf16;
    let (_, first) = lab.open(&lab.cache(), format);
    let Outcome::Kept(bytes) = first else { panic!("{first:?}") };
    // Room for two and a half.
    let cache = lab.cache().with_limit(bytes * 5 / 2);
    let open = |name: &str| lab.open_of(&cache, format, &[lab.path(name)]).1;
    let names = || -> Vec<String> {
        let first = |entry: Entry| entry.sources[0].path.rsplit('/').next().unwrap_or_default().to_string();
        cache.entries().unwrap().into_iter().map(first).collect()
    };
    let abandoned = lab.path("cache/.1-bf16.weights.tmp-1-0");
    fs::write(&abandoned, "half").unwrap();
    cache.clear().unwrap();
    assert!(!abandoned.exists());
    fs::write(&abandoned, "half").unwrap();
    let day = Duration::from_secs(86_400);
    File::open(&abandoned).unwrap().set_modified(SystemTime::now() - day).unwrap();
    fs::write(lab.path("cache/.2-bf16.weights.tmp-1-0"), "being written").unwrap();
    fs::write(lab.path("c"), "three").unwrap();
    for (age, name) in [(3, "a"), (2, "b")] {
        assert!(matches!(open(name), Outcome::Kept(_)));
        let path =
            cache.entries().unwrap().into_iter().find(|e| e.sources[0].path.ends_with(name)).unwrap().path;
        File::open(path).unwrap().set_modified(SystemTime::now() - age * day).unwrap();
    }
    assert!(!abandoned.exists() && lab.path("cache/.2-bf16.weights.tmp-1-0").exists());
    assert_eq!(names(), ["b", "a"]);
    assert!(matches!(open("a"), Outcome::Found), "and used again");
    assert_eq!(names(), ["a", "b"]);
    assert!(matches!(open("c"), Outcome::Kept(_)));
    assert_eq!(names(), ["c", "a"]);
}

#[test]
fn a_model_is_kept_that_leaves_half_of_the_disk() {
    const GB: u64 = 1_000_000_000;
    let gone = |limit: Option<u64>, free: u64, others: &[u64], needed: u64| {
        must_go(limit, free, others, needed).map_err(|error| format!("{error:#}"))
    };
    // 2.7b and 13b in bf16, more than the others may have together.
    assert_eq!(gone(None, 50 * GB, &[], 6 * GB), Ok(0));
    assert_eq!(gone(None, 60 * GB, &[], 26 * GB), Ok(0));
    let large = gone(None, 50 * GB, &[], 26 * GB).unwrap_err();
    assert!(large.contains("24.21 GiB") && large.contains(SIZE_VARIABLE), "{large}");
    // A small one does not remove the large one, whichever is opened last.
    assert_eq!(gone(None, 400 * GB, &[26 * GB], GB), Ok(0));
    assert_eq!(gone(None, 400 * GB, &[GB], 26 * GB), Ok(0));
    // The others have a tenth, or 20 GB, and what was used longest ago goes.
    assert_eq!(gone(None, 60 * GB, &[4 * GB, 3 * GB, 3 * GB], 26 * GB), Ok(1));
    assert_eq!(gone(None, 1000 * GB, &[60 * GB, 15 * GB, 8 * GB], 7 * GB), Ok(1));
    assert_eq!(gone(None, 1000 * GB, &[60 * GB], 26 * GB), Ok(1));
    // All together leave half.
    assert_eq!(gone(None, 30 * GB, &[26 * GB], 4 * GB), Ok(1));
    // What was asked for is for all of them.
    assert_eq!(gone(Some(60 * GB), 100 * GB, &[26 * GB, 26 * GB], 26 * GB), Ok(1));
    assert!(gone(Some(20 * GB), 1000 * GB, &[], 26 * GB).is_err());
    assert_eq!(gone(Some(60 * GB), 30 * GB, &[4 * GB], 34 * GB), Ok(1));
    assert!(gone(Some(60 * GB), 30 * GB, &[3 * GB], 34 * GB).unwrap_err().contains("free"));
}

#[test]
fn many_may_open_at_once() {
    let lab = Lab::new();
    let all: Vec<Vec<u32>> = std::thread::scope(|scope| {
        let open = || lab.logits(&lab.open(&lab.cache(), WeightFormat::Int8).0);
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(all.iter().all(|logits| *logits == all[0]));
    lab.kept();
    assert!(matches!(lab.open(&lab.cache(), WeightFormat::Int8).1, Outcome::Found));
}

/// The file of a model that was changed is the first to go where its replacement has no room beside it.
#[test]
fn what_is_to_be_replaced_takes_no_room() {
    let lab = Lab::new();
    let cache = lab.cache();
    lab.open(&cache, WeightFormat::Bf16);
    let [old] = cache.files().unwrap().try_into().unwrap();
    let bytes = old.metadata().unwrap().len();
    let cache = cache.with_limit(bytes + bytes / 2);
    cache.make_room(&old, bytes).unwrap();
    assert!(!old.exists());
    lab.open(&cache, WeightFormat::Bf16);
    // With room for both it stays until it is replaced.
    let cache = cache.with_limit(2 * bytes);
    cache.make_room(&old, bytes).unwrap();
    assert!(old.exists());
}
