//! Damaged files: an error or a tokenizer that works, never anything else. `FERROPT_FUZZ` sets the number of files.

use super::*;
use serde_json::{Value, json};
use std::path::PathBuf;

const DEFAULT: u64 = 400;

/// Random numbers of one damaged file.
struct Dice {
    stream: Stream,
    row: u64,
    next: usize,
}

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.next += 1;
        self.stream.word(self.row, self.next) as usize % limit.max(1)
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// Pieces that mean something in one of the files.
const WORDS: [&str; 24] = [
    "\"",
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    " ",
    "\n",
    "\\",
    "null",
    "true",
    "-1",
    "4294967295",
    "4294967296",
    "1e99",
    "0.5",
    "\u{120}",
    "\u{301}",
    "#version",
    "\"model\"",
    "[[[[[[[[",
    "\"</s>\"",
    "\\ud800",
];

/// Changes bytes here and there.
fn damage(bytes: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..1 + dice.below(4) {
        let at = dice.below(bytes.len() + 1);
        let end = (at + 1 + dice.below(40)).min(bytes.len());
        match dice.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
            1 => drop(bytes.drain(at..end)),
            2 => bytes.truncate(at),
            3 => {
                let copy = bytes[at..end].to_vec();
                let to = dice.below(bytes.len() + 1);
                bytes.splice(to..to, copy);
            }
            4 => drop(bytes.splice(at..at, vec![dice.below(256) as u8; 1 + dice.below(3)])),
            _ => drop(bytes.splice(at..at, dice.pick(&WORDS).bytes())),
        }
    }
}

/// Changes one value somewhere in a JSON document, which stays valid.
fn distort(json: &mut Value, dice: &mut Dice) {
    let values = [
        Value::Null,
        true.into(),
        0.into(),
        7.into(),
        (-3).into(),
        300.into(),
        4_294_967_295_u32.into(),
        u64::MAX.into(),
        0.5.into(),
        "".into(),
        "a".into(),
        " ".into(),
        "a b".into(),
        "Ġ".into(),
        "\u{301}".into(),
        "</s>".into(),
        Value::Array(vec![]),
        serde_json::json!({}),
        serde_json::json!(["a", "b"]),
        serde_json::json!(["", "a"]),
        serde_json::json!(["a"]),
    ];
    let value = dice.pick(&values).clone();
    let stop = dice.below(3) == 0;
    match json {
        Value::Array(list) if !list.is_empty() && !stop => {
            let at = dice.below(list.len());
            match dice.below(8) {
                0 => drop(list.remove(at)),
                1 => list.insert(at, value),
                2 => {
                    let other = dice.below(list.len());
                    list.swap(at, other);
                }
                _ => distort(&mut list[at], dice),
            }
        }
        Value::Object(map) if !map.is_empty() && !stop => {
            let at = dice.below(map.len());
            let key = map.keys().nth(at).cloned().unwrap_or_default();
            match dice.below(8) {
                0 => drop(map.remove(&key)),
                1 => {
                    let moved = map.remove(&key).unwrap_or_default();
                    map.insert(value.as_str().unwrap_or("x").into(), moved);
                }
                _ => distort(&mut map[&key], dice),
            }
        }
        other => *other = value,
    }
}

/// A loaded tokenizer keeps its promises, whatever file it came from.
fn works(t: &Tokenizer, file_bytes: usize) {
    assert!(t.vocab_size() <= 2 * file_bytes + 1024);
    let text = "the cat's naïve 狐🦊\u{0}\u{85} 123  \n </s>";
    let ids = t.encode(text).unwrap();
    assert_eq!(t.decode(&ids), text);
    assert!(ids.iter().all(|&id| id > UNK && (id as usize) < t.vocab_size()));
    let mut marked =
        t.vocabulary.added.iter().fold(text.to_owned(), |text, added| text + &added.content + " ");
    marked.truncate(marked.floor_char_boundary(10_000));
    let marked = t.encode_as(&marked, Marks::HUGGING_FACE).unwrap();
    assert!(marked.iter().all(|&id| (id as usize) < t.vocab_size()));
    let again = Tokenizer::new(Vocabulary::from_json(t.to_json().unwrap().as_bytes()).unwrap()).unwrap();
    assert_eq!(again.fingerprint(), t.fingerprint());
}

#[test]
fn damaged_files_give_an_error_or_a_tokenizer_that_works() {
    let count = std::env::var("FERROPT_FUZZ").ok().and_then(|n| n.parse().ok()).unwrap_or(DEFAULT);
    let from = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer");
    let read = |name: &str| fs::read(from.join(name)).unwrap();
    let added = json!({ "702": { "content": "<|a|>" }, "700": { "content": "<|b|>", "rstrip": true, "special": true } });
    let mut whole: Value = serde_json::from_slice(&read("huggingface.json")).unwrap();
    whole["added_tokens"]
        .as_array_mut()
        .unwrap()
        .push(json!({ "id": 701, "content": "<|c|>", "lstrip": true }));
    let files = [
        ("vocab.json", read("small/vocab.json")),
        ("merges.txt", read("small/merges.txt")),
        ("tokenizer.json", whole.to_string().into_bytes()),
        ("added_tokens.json", br#"{"<|a|>": 700, "<|b|>": 701, "ab": 702}"#.to_vec()),
        ("tokenizer_config.json", json!({ "added_tokens_decoder": added }).to_string().into_bytes()),
    ];
    let dir = tempfile::tempdir().unwrap();
    let (mut refused, mut taken) = (0, 0);
    for row in 0..count {
        let mut dice = Dice { stream: Stream::new(6, Purpose::Sampling, 0, 0), row, next: 0 };
        let which = dice.below(files.len());
        let mut files = files.clone();
        let damaged = &mut files[which].1;
        if which != 1 && dice.below(2) == 0 {
            let mut json = serde_json::from_slice(damaged).unwrap();
            distort(&mut json, &mut dice);
            *damaged = json.to_string().into_bytes();
        } else {
            damage(damaged, &mut dice);
        }
        // One file, or a pair with a third that adds tokens.
        let together = [&[0, 1, 3][..], &[0, 1, 3], &[2], &[0, 1, 3], &[0, 1, 4]][which];
        let path = dir.path().join(which.to_string());
        fs::create_dir_all(&path).unwrap();
        for (name, content) in together.iter().map(|i| &files[*i]) {
            fs::write(path.join(name), content).unwrap();
        }
        let name = files[which].0;
        match Tokenizer::load(&path) {
            Ok(t) => {
                works(&t, files.iter().map(|(_, content)| content.len()).sum());
                taken += 1;
            }
            Err(e) => {
                let e = format!("{e:#}");
                assert!(e.contains(name) && e.len() < 3000, "file {row}: {e}");
                refused += 1;
            }
        }
    }
    // Both happen, so the damage is neither too small nor too large.
    assert!(refused > count / 4 && taken > count / 20, "{refused} refused, {taken} taken");
}
