//! Damaged and hostile checkpoints: whatever is in the files, opening and reading them ends in a value or an error, soon,
//! and with no more memory than the files justify.
//!
//! `FERROPT_FUZZ` sets the number of mutated checkpoints.

use ferropt_device::WeightFormat;
use ferropt_model::Rounded;
use ferropt_model::formats::{Quantisation, Source, quantise, verify};
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Counts bytes that are allocated now, and the most since the last reset.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grow(bytes: usize) {
    let now = NOW.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(now, Relaxed);
}

#[allow(unsafe_code)] // an allocator cannot be written without
// SAFETY: every call goes to the system's allocator as it came; counting touches no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promises are those that System asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // For a moment there are both.
        grow(size);
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Memory is counted for the whole process, so tests take turns.
static TURN: Mutex<()> = Mutex::new(());

/// Memory that any checkpoint may take, however small: buffers for streaming, messages with backtraces.
const ALLOWANCE: usize = 1 << 20;
/// Memory for each byte of the files. A pickle's values are 32 bytes, an instruction may be one, and a table that grows
/// is there twice.
const PER_BYTE: usize = 128;
/// Far more than any of these takes.
const LIMIT: Duration = Duration::from_secs(5);

/// SplitMix64 (Steele et al., 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// A checkpoint in memory: names and contents of its files.
type Files = Vec<(String, Vec<u8>)>;

fn originals() -> Vec<Files> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats");
    let list = |folder: &Path| {
        let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        paths.sort();
        paths
    };
    let folders = list(&root).into_iter().flat_map(|model| list(&model));
    let files = |folder: PathBuf| {
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_string();
        list(&folder).iter().map(|path| (name(path), fs::read(path).unwrap())).collect()
    };
    let quantised = tempfile::tempdir().unwrap();
    let made = [("pre/hf", WeightFormat::Int4), ("post/mp2", WeightFormat::Int3)].map(|(from, format)| {
        let to = quantised.path().join(from.replace('/', "-"));
        quantise_to_nearest(&root.join(from), &to, format);
        to
    });
    folders.chain(made).map(files).collect()
}

/// A quantised folder, in several files.
fn quantise_to_nearest(from: &Path, to: &Path, format: WeightFormat) {
    let source = Source::open(from, None).unwrap();
    let table = source.config().parameters();
    let mut round = |index: usize| {
        let mut w = vec![0.0; table[index].elements()];
        source.read_rows(&table[index], 0, &mut w)?;
        Rounded::nearest(format, &w, table[index].shape[1], 1)
    };
    let how = Quantisation::new(format, None);
    quantise(&source, to, &how, None, 4000, &mut round, &mut |_, _| {}).unwrap();
}

/// Opens the checkpoint and reads all of it; true if both were possible. Fails the test where it must not go wrong.
fn try_out(folder: &Path, files: &Files, what: &str) -> bool {
    for (name, content) in files {
        fs::write(folder.join(name), content).unwrap();
    }
    let size: usize = files.iter().map(|(_, content)| content.len()).sum();
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let started = Instant::now();
    let read = || -> anyhow::Result<()> {
        let source = Source::open(folder, None)?;
        for (name, tensor) in source.tensors() {
            let mut values = vec![0.0; tensor.rows() * tensor.columns()];
            tensor.read_rows(0, &mut values).map_err(|e| e.context(name))?;
        }
        verify(&source, &mut |_, _| {})?;
        Ok(())
    };
    let result = catch_unwind(AssertUnwindSafe(read));
    let (took, peak) = (started.elapsed(), PEAK.load(Relaxed).saturating_sub(before));
    for (name, _) in files {
        fs::remove_file(folder.join(name)).unwrap();
    }
    let Ok(result) = result else { panic!("{what}: panicked") };
    assert!(took < LIMIT, "{what}: took {took:?}");
    let allowed = ALLOWANCE + PER_BYTE * size;
    assert!(peak <= allowed, "{what}: {peak} bytes allocated for {size} bytes of files, {allowed} allowed");
    if let Err(error) = &result {
        let message = format!("{error:#}");
        assert!(!message.is_empty() && message.len() < 2000, "{what}: a message of {} bytes", message.len());
    }
    result.is_ok()
}

/// Numbers that lengths and offsets go wrong with.
const NUMBERS: [u64; 12] =
    [0, 1, 2, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 32, 1 << 40, i64::MAX as u64, u64::MAX];
/// Beginnings of the records that these formats are made of.
const MARKS: [&[u8]; 9] = [
    b"PK\x01\x02",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"cto",
    b"X",
    b"}",
    b"\":[",
    b"data_offsets",
];
/// Pieces of pickles and JSON.
const PIECES: [&[u8]; 16] = [
    b"(((((((((",
    b"]]]]]]]]]",
    b"}}}}}}}}}",
    b"\x94\x94\x94\x94",
    b"R",
    b"0000",
    b"h\x00h\x00h\x00",
    b"2222",
    b"t",
    b"u",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"cposix\nsystem\n",
    b"[[[[[[[[[[[[[[[[",
    b"-1",
    b"1e999",
];

fn put(content: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in content.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

/// Changes a file in one of the ways that files go wrong, or are made to. Says how.
fn mutate(content: &mut Vec<u8>, other: &[u8], random: &mut Random) -> String {
    let len = content.len();
    if len == 0 {
        return "nothing to change".into();
    }
    // Half of the changes lie at a mark or in the ends, where the lengths are; the rest anywhere.
    let at = match random.below(4) {
        0 => random.below(len.min(600)),
        1 => len - 1 - random.below(len.min(1500)),
        2 => {
            let mark = random.pick(&MARKS);
            let places: Vec<usize> =
                content.windows(mark.len()).enumerate().filter(|(_, w)| *w == mark).map(|(i, _)| i).collect();
            if places.is_empty() {
                random.below(len)
            } else {
                (random.pick(&places) + random.below(60)).min(len - 1)
            }
        }
        _ => random.below(len),
    };
    match random.below(10) {
        0 => {
            content[at] ^= 1 << random.below(8);
            format!("bit flipped at {at}")
        }
        1 => {
            content[at] = random.next() as u8;
            format!("byte set at {at}")
        }
        2 => {
            content.truncate(at);
            format!("cut at {at}")
        }
        3 | 4 => {
            let number = random.pick(&NUMBERS).to_le_bytes();
            let width = random.pick(&[2, 4, 8]);
            put(content, at, &number[..width]);
            format!("number of {width} bytes at {at}")
        }
        5 => {
            let end = (at + 1 + random.below(40)).min(len);
            content.drain(at..end);
            format!("{at}..{end} left out")
        }
        6 => {
            let piece = random.pick(&PIECES).repeat(1 + random.below(20));
            content.splice(at..at, piece);
            format!("piece put in at {at}")
        }
        7 => {
            put(content, at, random.pick(&PIECES));
            format!("piece written over {at}")
        }
        8 => {
            let from = random.below(other.len());
            let end = (from + 1 + random.below(400)).min(other.len());
            put(content, at, &other[from..end]);
            format!("{from}..{end} of another file written over {at}")
        }
        _ => {
            // A digit of JSON, or of a size in text.
            match (at..len).find(|i| content[*i].is_ascii_digit()) {
                Some(digit) => content[digit] = b'0' + random.below(10) as u8,
                None => content[at] = b'9',
            }
            format!("digit behind {at}")
        }
    }
}

#[test]
fn mutated_checkpoints_give_errors_and_nothing_worse() {
    let count: u64 =
        std::env::var("FERROPT_FUZZ").map_or(1500, |n| n.parse().expect("FERROPT_FUZZ is a number"));
    let _turn = TURN.lock();
    let originals = originals();
    let dir = tempfile::tempdir().unwrap();
    for (i, files) in originals.iter().enumerate() {
        assert!(try_out(dir.path(), files, &format!("original {i}")), "original {i} does not open");
    }
    let (mut good, mut bad) = (0u64, 0u64);
    for seed in 0..count {
        let mut random = Random(seed);
        let mut files = originals[random.below(originals.len())].clone();
        let mut what = format!("seed {seed}");
        for _ in 0..1 + random.below(3) {
            let chosen = random.below(files.len());
            let other = random.below(originals.len());
            let other = &originals[other][random.below(originals[other].len())].1;
            let how = mutate(&mut files[chosen].1, other, &mut random);
            what += &format!(", {}: {how}", files[chosen].0);
        }
        if try_out(dir.path(), &files, &what) {
            good += 1;
        } else {
            bad += 1;
        }
    }
    println!("{count} mutated checkpoints: {bad} refused, {good} read");
    assert!(
        count < 100 || (bad > count / 4 && good > 0),
        "the mutations test nothing: {bad} of {count} refused"
    );
}

/// A torch file with this pickle.
fn torch_file(pickle: &[u8]) -> Vec<u8> {
    let name = b"a/data.pkl";
    let size = (pickle.len() as u32).to_le_bytes();
    let fixed =
        [&[20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &size, &size, &[name.len() as u8, 0]].concat();
    let local = [b"PK\x03\x04", &fixed[..], &[0, 0], name, pickle].concat();
    let central = [b"PK\x01\x02\x14\x00", &fixed[..], &[0; 16], name].concat();
    let (start, len) = ((local.len() as u32).to_le_bytes(), (central.len() as u32).to_le_bytes());
    let end = [&b"PK\x05\x06\0\0\0\0\x01\0\x01\0"[..], &len, &start, &[0, 0]].concat();
    [local, central, end].concat()
}

/// Pickles and headers that were made to exhaust memory, the stack, or patience.
#[test]
fn bombs_go_off_nowhere() {
    let _turn = TURN.lock();
    let many = 300_000;
    let text = |s: &str| [&b"X"[..], &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat();
    let wrapped = |body: Vec<u8>| [b"\x80\x02".to_vec(), body, b".".to_vec()].concat();
    // Lists of lists, each twice in the next: 2^40 leaves if anyone wrote them out.
    let laughs: Vec<u8> =
        (0..40u8).flat_map(|i| [b'q', i, b'0', b']', b'(', b'h', i, b'h', i, b'e']).collect();
    // The same long list of names for many modules.
    let names: Vec<u8> = (0..2000).flat_map(|i| text(&format!("n{i}"))).collect();
    let layout = [
        b"}(".to_vec(),
        text("names"),
        b"](".to_vec(),
        names,
        b"eq\x01".to_vec(),
        text("shapes"),
        b"h\x01".to_vec(),
        text("numels"),
        b"h\x01".to_vec(),
        text("padding"),
        b"K\0uq\x02".to_vec(),
    ]
    .concat();
    let modules: Vec<u8> = (0..2000)
        .flat_map(|i| {
            [
                b"}(".to_vec(),
                text("fsdp_path"),
                text(&format!("m{i}")),
                text("params"),
                b"}(".to_vec(),
                text("flat_param_0"),
                b"h\x02uu".to_vec(),
            ]
            .concat()
        })
        .collect();
    let flat = [
        layout,
        b"0}(".to_vec(),
        text("model"),
        b"}".to_vec(),
        text("shard_metadata"),
        b"}(".to_vec(),
        text("param_metadata"),
        b"](".to_vec(),
        modules,
        b"euu".to_vec(),
    ]
    .concat();
    // A long text is not looked at again for each use: as a name, and as a key.
    let long = text(&"x".repeat(300_000));
    let uses = |once: &[u8]| once.repeat(60_000);
    let (kept, torch) = ([&long[..], b"q\x00"].concat(), [text("torch"), b"q\x01".to_vec()].concat());
    let imports = [&b"]"[..], &kept, b"0", &torch, b"0", &uses(b"h\x01h\x00\x930")].concat();
    let keys = [&b"]q\x02"[..], &kept, b"0", b"}", &uses(b"h\x00Ns")].concat();
    let bombs: Vec<(&str, Vec<u8>)> = vec![
        ("imports of a long name", wrapped(imports)),
        ("a long key again and again", wrapped(keys)),
        ("nested lists", wrapped([b"]".repeat(many), b"a".repeat(many - 1)].concat())),
        ("nested dictionaries", wrapped([b"(".repeat(many), b"d".repeat(many)].concat())),
        ("nested tuples", wrapped([b")".to_vec(), b"\x85".repeat(many)].concat())),
        ("a list that holds itself", wrapped(b"]q\x00h\x00a".to_vec())),
        (
            "a dictionary that holds itself",
            wrapped([b"}q\x00".to_vec(), text("model"), b"h\x00s".to_vec()].concat()),
        ),
        ("billion laughs", wrapped([b"]".to_vec(), laughs].concat())),
        ("many memos", wrapped([b"N".to_vec(), b"\x94".repeat(many)].concat())),
        ("a large memo number", wrapped(b"Nr\xff\xff\xff\xff".to_vec())),
        ("a long text that is not there", wrapped(b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f".to_vec())),
        ("calls of calls", wrapped([b"ctorch\nSize\n".to_vec(), b")R".repeat(many)].concat())),
        ("the same names again and again", wrapped(flat)),
        ("a command", wrapped([b"cos\nsystem\n(".to_vec(), text("echo hello"), b"tR".to_vec()].concat())),
    ];
    let dir = tempfile::tempdir().unwrap();
    let config = originals()[0].iter().find(|(name, _)| name == "config.json").unwrap().1.clone();
    for (what, pickle) in bombs {
        for name in ["restored.pt", "pytorch_model.bin"] {
            let files =
                vec![("config.json".to_string(), config.clone()), (name.to_string(), torch_file(&pickle))];
            assert!(!try_out(dir.path(), &files, what), "{what} was opened as {name}");
        }
    }
    let deep = format!("{{\"a\":{}1{}}}", "[".repeat(many), "]".repeat(many)).into_bytes();
    let header = [&(deep.len() as u64).to_le_bytes()[..], &deep].concat();
    for (name, content) in [("model.safetensors", header), ("model.safetensors.index.json", deep.clone())] {
        let files = vec![("config.json".to_string(), config.clone()), (name.to_string(), content)];
        assert!(!try_out(dir.path(), &files, name));
    }
    let files = vec![("config.json".to_string(), deep), ("model.safetensors".to_string(), Vec::new())];
    assert!(!try_out(dir.path(), &files, "a deep configuration"));
}
