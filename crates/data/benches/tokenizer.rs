//! Speed of encoding: this crate on 1 and 2 threads beside the `tokenizers` library on one, in turns, as medians.
//!
//! `cargo bench -p ferropt-data [-- ROUNDS]` (9 unless said). Texts and vocabulary are books and OPT's own files from the
//! folder of shared data (`../shared` beside the workspace, or `FERROPT_SHARED`); without it, texts that the bench makes
//! and a vocabulary trained on them. Each text is encoded once before the clock runs, so words are met again, as in any
//! corpus; text without spaces has words that are too long to be kept.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, anyhow, ensure};
use ferropt_data::{Corpus, Piece, SPECIALS, Tokenizer};
use ferropt_device::rng::{Purpose, Stream};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Bytes of each text, at most.
const TEXT: usize = 8 << 20;

/// Bytes of the parts that encoders are given, at least.
const PART: usize = 1 << 16;

fn main() -> Result<()> {
    let rounds = std::env::args().skip(1).find_map(|word| word.parse().ok()).unwrap_or(9);
    let shared = std::env::var_os("FERROPT_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"), PathBuf::from);
    let prose = match Corpus::find(&[shared.join("data/books/books-train-00.jsonl.xz")], "text") {
        Ok(books) => ("books", pieces(&books)?),
        Err(_) => ("made", vec![made("abcdefghijklmnopqrstuvwxyz", 1)]),
    };
    let texts = [
        prose,
        ("code", sources()?),
        ("Cyrillic", vec![made("оеаинтсрвлкмдпуяыьгзбчйхжшюцщэф", 2)]),
        (
            "no spaces",
            vec![
                made("的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生", 3)
                    .replace(' ', ""),
            ],
        ),
    ];
    let ours = match Tokenizer::load(&shared.join("data/tokenizer")) {
        Ok(opt) => opt,
        Err(_) => Tokenizer::train(texts.iter().flat_map(|(_, t)| t.iter().cloned().map(Ok)), 16_384)?,
    };
    let json = ours.to_json()?;
    let library = tokenizers::Tokenizer::from_bytes(&json).map_err(|e| anyhow!(e))?;
    loading(&ours, &json, rounds)?;
    let pool = |threads| ThreadPoolBuilder::new().num_threads(threads).build();
    let pools = [pool(1)?, pool(2)?];

    println!(
        "{:<10} {:>6} {:>10} {:>10} {:>10} {:>7} {:>7}",
        "MB/s", "MB", "library", "1 thread", "2 threads", "ratio", "scaling"
    );
    for (name, text) in &texts {
        let mut parts: Vec<&str> = Vec::new();
        let mut bytes = 0;
        for mut rest in text.iter().map(String::as_str) {
            while !rest.is_empty() && bytes < TEXT {
                let (part, behind) = rest.split_at(cut(rest));
                bytes += part.len();
                parts.push(part);
                rest = behind;
            }
        }
        let theirs: Vec<Vec<u32>> =
            parts.iter().map(|part| by_library(&library, part)).collect::<Result<_>>()?;
        for pool in &pools {
            ensure!(encode(pool, &ours, &parts)? == theirs, "the ids of {name} are not the library's");
        }
        let mut seconds: [Vec<f64>; 3] = Default::default();
        for _ in 0..rounds {
            seconds[0]
                .push(time(|| parts.iter().try_for_each(|part| by_library(&library, part).map(|_| ())))?);
            for (pool, seconds) in pools.iter().zip(&mut seconds[1..]) {
                seconds.push(time(|| encode(pool, &ours, &parts).map(|_| ()))?);
            }
        }
        let [library, one, two] = seconds.map(|seconds| bytes as f64 * 1e-6 / median(seconds));
        println!(
            "{name:<10} {:>6.1} {library:>10.1} {one:>10.1} {two:>10.1} {:>6.1}x {:>6.2}x",
            bytes as f64 * 1e-6,
            one / library,
            two / one
        );
    }
    Ok(())
}

/// Prints the time that it takes to open a `tokenizer.json`.
fn loading(ours: &Tokenizer, json: &str, rounds: usize) -> Result<()> {
    let path = std::env::temp_dir().join(format!("bench-tokenizer-{}.json", std::process::id()));
    ours.save(&path)?;
    let (mut here, mut there) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        here.push(time(|| Tokenizer::load(&path).map(drop))?);
        there.push(time(|| tokenizers::Tokenizer::from_bytes(json).map(drop).map_err(|e| anyhow!(e)))?);
    }
    std::fs::remove_file(&path)?;
    println!(
        "loading {} tokens: {:.0} ms, the library {:.0} ms\n",
        ours.vocab_size(),
        1e3 * median(here),
        1e3 * median(there)
    );
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn time(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

fn by_library(library: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
    // Its faster way, which keeps no offsets.
    Ok(library.encode_fast(text, false).map_err(|e| anyhow!(e))?.get_ids().to_vec())
}

fn encode(pool: &ThreadPool, ours: &Tokenizer, parts: &[&str]) -> Result<Vec<Vec<u32>>> {
    pool.install(|| parts.par_iter().map(|part| ours.encode(part)).collect())
}

/// Where a part ends: at white space.
fn cut(text: &str) -> usize {
    let from = text.floor_char_boundary(PART);
    text[from..].find([' ', '\n']).map_or(text.len(), |at| from + at)
}

fn pieces(corpus: &Corpus) -> Result<Vec<String>> {
    let mut bytes = 0;
    let enough = |piece: &Result<Piece>| {
        bytes += piece.as_ref().map_or(0, |piece| piece.text.len());
        bytes < TEXT
    };
    corpus.pieces().take_while(enough).map(|piece| Ok(piece?.text)).collect()
}

/// The workspace's own sources, repeated.
fn sources() -> Result<Vec<String>> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("..")];
    let mut texts = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                texts.push(std::fs::read_to_string(path)?);
            }
        }
    }
    texts.sort();
    // The library would take these for tokens.
    let text = SPECIALS.iter().fold(texts.concat(), |text, special| text.replace(special, ""));
    Ok(vec![text.repeat(8)])
}

/// Words of random letters, of which few are frequent, as in languages (Zipf's law).
fn made(letters: &str, seed: u64) -> String {
    let letters: Vec<char> = letters.chars().collect();
    let stream = Stream::new(seed, Purpose::Sampling, 0, 0);
    let words: Vec<String> = (0..50_000)
        .map(|row| {
            // Letters at the front of the list are more frequent.
            let letter =
                |i| letters[(stream.uniform(row, i).powi(2) * letters.len() as f32) as usize % letters.len()];
            (1..2 + stream.word(row, 0) as usize % 10).map(letter).collect()
        })
        .collect();
    let mut text = String::new();
    let mut i = 0;
    while text.len() < TEXT {
        let rank = (words.len() as f32).powf(stream.uniform(60_000, i)) as usize;
        text += &words[rank % words.len()];
        text += if i % 12 == 11 { ".\n" } else { " " };
        i += 1;
    }
    text
}
