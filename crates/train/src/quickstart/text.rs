//! Text for a quick start: where it comes from, its tokenizer, its tokens.

use super::{Baseline, Options};
use anyhow::{Context, Result, ensure};
use ferropt_data::{Corpus, CrateDocs, Document, EOS, Split, Tokenizer, registry_cache};
use std::collections::HashSet;

/// Tokens of the tokenizer, special ones included. Few, and the model has to learn spelling first; many, and it spends
/// its time on the head: docs/log.md has the figures.
const VOCABULARY: usize = 8192;
/// Text that the tokenizer is trained on at most, bytes.
const TOKENIZER_TEXT: usize = 8 << 20;
/// Text of the user's that is read at most, bytes: more would not be trained on in minutes.
const MOST: usize = 32 << 20;
/// Held-out tokens that are scored, the first ones, or all where there are fewer: enough to tell models apart, few enough for
/// slow machines.
pub(super) const SCORED: usize = 16_384;
/// Less text than this teaches nothing, bytes.
const LEAST: usize = 50_000;
/// One byte in so many of the user's text is held out.
const HELD_OUT: usize = 20;
/// What the samples start with when documentation was the text.
const PROMPT: &str = "Returns the";
/// Characters that they start with at most: so few that their tokens, four for each at most, leave room for others.
const LONGEST_PROMPT: usize = 40;

/// Text to train on and to measure with.
pub(super) struct Text {
    pub(super) split: Split,
    /// What it is, for people.
    pub(super) source: String,
    /// What is held out.
    pub(super) held_out: String,
    /// What the samples start with.
    pub(super) prompt: String,
}

/// The user's text, or the documentation of crates.
pub(super) fn collect(options: &Options) -> Result<Text> {
    if options.texts.is_empty() { documentation(&options.lock) } else { own(options) }
}

fn documentation(lock: &str) -> Result<Text> {
    let cache = registry_cache().context(
        "cannot tell where cargo keeps its downloads (set CARGO_HOME); give any text with --text FILE instead",
    )?;
    let docs = CrateDocs::collect(lock, &cache).context(
        "the documentation of Ferropt's own dependencies is not here to train on; run `cargo fetch` in its repository, or \
         give any text with --text FILE",
    )?;
    let held_out: HashSet<&str> =
        docs.split.held_out.iter().filter_map(|d| d.name.split('/').next()).collect();
    let held_out = held_out.len();
    Ok(Text {
        source: format!("documentation of {} crates that Cargo.lock pins", docs.crates.len() - held_out),
        held_out: format!("documentation of {held_out} other crates"),
        split: docs.split,
        prompt: PROMPT.into(),
    })
}

fn own(options: &Options) -> Result<Text> {
    let corpus = Corpus::find_for(&options.dir, &options.texts, &options.text_field)?;
    let split = Split::tail(&corpus, MOST, HELD_OUT)?;
    let names: Vec<String> = options.texts.iter().map(|path| path.display().to_string()).collect();
    let names = names.join(", ");
    let bytes = split.bytes().0 + split.bytes().1;
    ensure!(
        bytes >= LEAST,
        "{names} has {bytes} bytes of text, which is too little to learn from; give {LEAST} or more"
    );
    let prompt = split.held_out.first().map_or(String::new(), first_words);
    Ok(Text { source: names, held_out: format!("the last {} %", 100 / HELD_OUT), split, prompt })
}

/// Three words, or as much of them as a prompt has room for: many languages are written without spaces.
fn first_words(document: &Document) -> String {
    let words: Vec<&str> = document.text.split_whitespace().take(3).collect();
    words.join(" ").chars().take(LONGEST_PROMPT).collect()
}

/// A tokenizer made for the text.
pub(super) fn tokenizer(split: &Split) -> Result<Tokenizer> {
    let mut left = TOKENIZER_TEXT;
    let texts = split.train.iter().map_while(move |document| {
        let text = &document.text[..document.text.floor_char_boundary(left)];
        left -= text.len();
        (!text.is_empty()).then(|| Ok(text.to_owned()))
    });
    Tokenizer::train(texts, VOCABULARY)
}

/// Numbers of tokens.
pub(super) struct Counts {
    /// The tokenizer's vocabulary.
    pub(super) vocab: usize,
    /// Tokens to train on, with one `</s>` a document.
    pub(super) train: u64,
    /// Tokens held out.
    pub(super) held_out: u64,
    /// Those of them that are scored.
    pub(super) scored: u64,
    /// What a model that knows only how frequent tokens are in the training text would reach on those that are scored.
    pub(super) unigram: Baseline,
}

/// Counts the tokens of both parts.
pub(super) fn count(split: &Split, tokenizer: &Tokenizer) -> Result<Counts> {
    let vocab = tokenizer.vocab_size();
    let (train, held_out) = (ids(&split.train, tokenizer)?, ids(&split.held_out, tokenizer)?);
    // One is added to every count, so that what was never seen is not impossible.
    let mut seen = vec![1u64; vocab];
    train.iter().for_each(|id| seen[*id as usize] += 1);
    let total = (train.len() + vocab) as f64;
    let scored = &held_out[..held_out.len().min(SCORED)];
    let nats: f64 = scored.iter().map(|id| (total / seen[*id as usize] as f64).ln()).sum();
    let bytes: usize = scored.iter().map(|id| tokenizer.byte_len(*id)).sum();
    Ok(Counts {
        vocab,
        train: train.len() as u64,
        held_out: held_out.len() as u64,
        scored: scored.len() as u64,
        unigram: Baseline {
            loss: nats / scored.len() as f64,
            bits_per_byte: nats / std::f64::consts::LN_2 / bytes as f64,
        },
    })
}

/// Tokens of documents, as token files have them.
fn ids(documents: &[Document], tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for document in documents {
        ids.extend(tokenizer.encode(&document.text)?);
        ids.push(EOS);
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Document {
        Document { name: "x".into(), text: text.into() }
    }

    #[test]
    fn the_baseline_is_the_cross_entropy_of_frequencies() {
        let split = Split { train: vec![document("ababab")], held_out: vec![document("aab"), document("c")] };
        // The special tokens and all bytes; no merges, so each byte is a token.
        let tokenizer = Tokenizer::train([Ok("x".into())], 260).unwrap();
        let counts = count(&split, &tokenizer).unwrap();
        assert_eq!((counts.vocab, counts.train, counts.held_out, counts.scored), (260, 7, 6, 6));
        let p = |seen: f64| ((seen + 1.0) / 267.0).ln();
        // a a b </s> c </s>
        let expected = -(2.0 * p(3.0) + p(3.0) + 2.0 * p(1.0) + p(0.0)) / 6.0;
        let baseline = counts.unigram;
        assert!((baseline.loss - expected).abs() < 1e-12, "{} {expected}", baseline.loss);
        assert!((baseline.bits_per_byte - expected / std::f64::consts::LN_2 * 6.0 / 4.0).abs() < 1e-12);

        // Of more text, only what is scored.
        let [some, more] = ["", "cc"].map(|end| {
            let held_out = vec![document(&format!("{}{end}", "ab".repeat(SCORED / 2)))];
            count(&Split { held_out, ..split.clone() }, &tokenizer).unwrap()
        });
        assert_eq!((more.held_out, more.scored), (SCORED as u64 + 3, SCORED as u64));
        assert_eq!(
            (some.held_out, some.scored, some.unigram),
            (SCORED as u64 + 1, more.scored, more.unigram)
        );
    }

    #[test]
    fn prompts_have_room_in_any_language() {
        assert_eq!(first_words(&document(" one two\nthree four")), "one two three");
        let paragraphs = "狐".repeat(500) + "\n" + &"狐".repeat(500);
        assert_eq!(first_words(&document(&paragraphs)), "狐".repeat(LONGEST_PROMPT));
    }

    #[test]
    fn the_field_that_holds_the_text_can_be_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bodies.jsonl");
        std::fs::write(&path, "{\"body\": \"a few words\"}\n".repeat(5000)).unwrap();
        let options = |text_field: &str| Options {
            dir: folder.path().join("run"),
            texts: vec![path.clone()],
            text_field: text_field.into(),
            lock: String::new(),
            minutes: 1.0,
            threads: None,
            seed: 1,
        };
        let message = format!("{:#}", collect(&options("text")).err().unwrap());
        assert!(message.contains("body") && message.contains("--text-field"), "{message}");
        assert_eq!(collect(&options("body")).unwrap().split.bytes().0, 11 * 5000 * 19 / 20);
    }

    #[test]
    fn too_little_text_is_refused_with_the_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("short.txt");
        std::fs::write(&path, "a few words").unwrap();
        let options = Options {
            dir: folder.path().join("run"),
            texts: vec![path],
            text_field: "text".into(),
            lock: String::new(),
            minutes: 1.0,
            threads: None,
            seed: 1,
        };
        let message = collect(&options).err().unwrap().to_string();
        assert!(["short.txt", "11 bytes", "50000"].iter().all(|part| message.contains(part)), "{message}");
    }
}
