//! Tokens that files add.

use super::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// A tokenizer with more entries in its `added_tokens`.
fn with(t: &Tokenizer, entries: &[Value]) -> Result<Tokenizer> {
    let mut json: Value = serde_json::from_str(&t.to_json().unwrap()).unwrap();
    json["added_tokens"].as_array_mut().unwrap().extend_from_slice(entries);
    Tokenizer::new(Vocabulary::from_json(json.to_string().as_bytes())?)
}

#[test]
fn added_tokens_are_found_as_the_library_finds_them() {
    // Pieces that overlap, and neighbours that are spaces or parts of words in some alphabet or other.
    const PIECES: [&str; 24] = [
        "<", "|", ">", "a", "the", "cat", " ", "  ", "\n", "\u{a0}", "\u{3000}", "\u{85}", "\u{200b}", "é",
        "狐", "_", "٣", "\u{301}", "\u{200d}", "\u{203f}", "½", "🦊", "</s>", "<pad>",
    ];
    let small = small();
    let stream = Stream::new(9, Purpose::Sampling, 0, 0);
    let (mut found, mut next) = (0, 0);
    let mut below = |limit: usize| {
        next += 1;
        stream.word(0, next) as usize % limit
    };
    for _ in 0..150 {
        let mut text = |most: usize| -> String { (0..1 + below(most)).map(|_| PIECES[below(22)]).collect() };
        let contents: BTreeMap<String, ()> = (0..8).map(|_| (text(3), ())).collect();
        let mut free = small.vocab_size()..;
        let entry = |(content, ()): (String, ())| {
            let known = small.vocabulary.tokens.iter().position(|token| token.as_ref() == Some(&content));
            let id = known.or_else(|| free.next());
            // The library panics where a token of white space shall take white space that another has taken.
            let lstrip = below(3) == 0 && !content.trim().is_empty();
            json!({
                "id": id, "content": content, "single_word": below(3) == 0, "lstrip": lstrip, "rstrip": below(3) == 0,
                "normalized": below(2) == 0, "special": below(2) == 0,
            })
        };
        let entries: Vec<Value> = contents.into_iter().map(entry).collect();
        let t = with(&small, &entries).unwrap();
        let library = library(&t);
        assert_eq!(t.to_json().unwrap(), library.to_string(true).unwrap());
        for _ in 0..60 {
            let mut text = String::new();
            for _ in 0..1 + below(14) {
                match below(3) {
                    0 => text += entries[below(entries.len())]["content"].as_str().unwrap(),
                    _ => text += PIECES[below(PIECES.len())],
                }
            }
            let ids = t.encode_as(&text, Marks { in_front: false, in_text: true }).unwrap();
            found += ids.iter().filter(|id| entries.iter().any(|entry| entry["id"] == **id)).count();
            assert_eq!(
                ids,
                library.encode(text.as_str(), false).unwrap().get_ids(),
                "{text:?} with {entries:?}"
            );
            assert_eq!(t.decode(&t.encode(&text).unwrap()), text);
        }
    }
    assert!(found > 10_000, "{found}");
}

/// The ways in which a fine-tuned model's tokenizer is written.
#[test]
fn all_layouts_of_files_give_the_same_tokens() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer");
    let read = |name: &str| fs::read(from.join(name)).unwrap();
    let pair =
        || [("vocab.json", read("small/vocab.json")), ("merges.txt", read("small/merges.txt"))].to_vec();
    let user = json!({ "content": "<|user|>", "special": false });
    let pad =
        json!({ "content": "[PAD]", "special": true, "lstrip": false, "rstrip": false, "normalized": false });
    let decoder = json!({ "2": { "content": "</s>", "special": true }, "700": pad, "701": user });
    let config =
        ("tokenizer_config.json", json!({ "added_tokens_decoder": decoder }).to_string().into_bytes());
    let whole = |added: &[Value]| {
        let mut json: Value = serde_json::from_slice(&read("huggingface.json")).unwrap();
        let list = json["added_tokens"].as_array_mut().unwrap();
        list.extend(added.iter().zip(700..).map(|(token, id)| {
            let mut token = token.clone();
            token["id"] = id.into();
            token
        }));
        [("tokenizer.json", json.to_string().into_bytes())].to_vec()
    };
    let ids = ("added_tokens.json", br#"{"<|user|>": 701, "[PAD]": 700}"#.to_vec());
    let map = ("special_tokens_map.json", br#"{"pad_token": {"content": "[PAD]"}}"#.to_vec());
    let old = ("tokenizer_config.json", br#"{"additional_special_tokens": ["[PAD]"]}"#.to_vec());
    let layouts = [
        whole(&[pad.clone(), user]),
        [whole(&[pad]), vec![config.clone()]].concat(),
        [whole(&[]), vec![config.clone()]].concat(),
        [pair(), vec![config]].concat(),
        [pair(), vec![ids.clone(), map]].concat(),
        [pair(), vec![ids, old]].concat(),
    ];
    let mut fingerprints = vec![Tokenizer::load(&from.join("small")).unwrap().fingerprint()];
    for files in layouts {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(dir.path().join(name), content).unwrap();
        }
        let t = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(t.vocab_size(), 702);
        let text = "<|user|> the cat[PAD]";
        let the_cat = t.encode(" the cat").unwrap();
        let ids = t.encode_as(text, Marks::HUGGING_FACE).unwrap();
        assert_eq!(ids, [&[EOS, 701][..], &the_cat, &[700]].concat());
        assert_eq!(t.decode(&ids), "<|user|> the cat");
        assert_eq!((t.special(700), t.special(701), t.special(EOS)), (Some("[PAD]"), None, Some("</s>")));
        // As a text, they are characters.
        assert!(t.encode(text).unwrap().iter().all(|id| *id < 700));
        assert_eq!(t.decode(&t.encode(text).unwrap()), text);
        fingerprints.push(t.fingerprint());
        // Checkpoints of runs hold what is saved.
        let saved = dir.path().join("saved.json");
        t.save(&saved).unwrap();
        let again = Tokenizer::load(&saved).unwrap();
        assert_eq!((again.fingerprint(), again.to_json().unwrap()), (t.fingerprint(), t.to_json().unwrap()));
    }
    // A tokenizer.json has settings that a pair has not, and that make no difference but to fingerprints.
    fingerprints.dedup();
    assert_eq!(fingerprints.len(), 3, "the pair without them, and each kind of files with them");
}

#[test]
fn tokens_of_the_vocabulary_keep_the_bytes_that_text_is_made_of() {
    let t = small();
    let id = |text: &str| t.encode(text).unwrap()[0];
    let special = |content: &str, id: u32| json!({ "id": id, "content": content, "special": true });
    let [a, the] = [id("a"), id("the")];
    // One byte long in an alphabet that is not that of the vocabulary.
    let one = json!({ "id": t.vocab_size(), "content": "\u{1}", "special": false });
    let t = with(&t, &[special("a", a), special("the", the), one]).unwrap();
    let text = "the \u{1}a";
    assert_eq!(t.decode(&t.encode(text).unwrap()), text);
    assert_eq!((t.special(the), t.special(a)), (None, None));
}

#[test]
fn hostile_entries_are_refused_with_the_reason() {
    let t = small();
    let free = t.vocab_size();
    let a = t.encode("a").unwrap()[0];
    let refuse = |entries: &[Value], expected: &[&str]| {
        let e = format!("{:#}", with(&t, entries).err().unwrap());
        assert!(expected.iter().all(|part| e.contains(part)) && e.len() < 1000, "{expected:?}: {e}");
    };
    let entry = |id: usize, content: &str| json!({ "id": id, "content": content });
    refuse(&[entry(free, "x y"), entry(free, "y x")], &["\"x y\" and \"y x\" share the id"]);
    refuse(&[entry(free, "x y"), entry(free + 1, "x y")], &["\"x y\" is there twice"]);
    refuse(&[entry(a as usize, "x y")], &["that of \"a\""]);
    refuse(&[entry(free, "a")], &["\"a\" has the id", &format!("in the vocabulary it has {a}")]);
    refuse(&[entry(free, "</s>")], &["in the vocabulary it has 2"]);
    refuse(&[entry(u32::MAX as usize, "x y")], &["4294967295", "count from 0"]);
    refuse(&[entry(u32::MAX as usize + 1, "x y")], &["`added_tokens[4]`", "whole number"]);
    refuse(&[json!({ "id": -1, "content": "x y" })], &["`added_tokens[4]`", "-1", "whole number"]);
    refuse(&[json!({ "id": free, "content": 5 })], &["`content` is 5"]);
    refuse(&[json!({ "id": free, "content": "x y", "lstrip": 1 })], &["`lstrip` is 1"]);
    refuse(&[entry(free, &"x".repeat(1 << 20))], &["1048576 bytes", "4096"]);
    // As in the library, a token without content is none.
    assert_eq!(with(&t, &[entry(free, "")]).unwrap().fingerprint(), t.fingerprint());
    // Tokens of white space that take white space, too: no more work than the text is long.
    let flags = json!({ "id": free, "content": " ", "lstrip": true, "rstrip": true });
    let spaces = with(&t, &[flags]).unwrap();
    let marks = Marks { in_front: false, in_text: true };
    assert_eq!(spaces.encode_as(&" ".repeat(1 << 20), marks).unwrap(), vec![free as u32; 1 << 20]);
}
