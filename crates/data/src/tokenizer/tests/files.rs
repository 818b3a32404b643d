//! Reading and writing of files.

use super::*;
use serde_json::{Value, json};
use tokenizers::ModelWrapper;
use tokenizers::models::bpe::BPE;

#[test]
fn saved_tokenizers_come_back_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let t = small();
    t.save(&dir.path().join("tokenizer.json")).unwrap();
    for path in [dir.path().to_owned(), dir.path().join("tokenizer.json")] {
        let again = Tokenizer::load(&path).unwrap();
        assert_eq!(again.fingerprint(), t.fingerprint());
        assert_eq!(again.encode("the cat </s>").unwrap(), t.encode("the cat </s>").unwrap());
    }
}

/// Token files were made under the hash of the library's form of the model, and runs hold files as the library wrote
/// them: neither may change.
#[test]
fn fingerprints_and_files_are_those_of_the_library() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer");
    let hash = |model: &BPE| <[u8; 32]>::from(Sha256::digest(serde_json::to_vec(model).unwrap()));
    let small = fixtures.join("small");
    let shared = crate::testing::shared("data/tokenizer");
    for (folder, names) in
        [(Some(small), ["vocab.json", "merges.txt"]), (shared, ["gpt2-vocab.json", "gpt2-merges.txt"])]
    {
        let Some(folder) = folder else { continue };
        let [vocab, merges] = names.map(|name| folder.join(name).to_str().unwrap().to_owned());
        let t = Tokenizer::load(&folder).unwrap();
        assert_eq!(t.fingerprint(), hash(&BPE::from_file(&vocab, &merges).build().unwrap()));
        assert_eq!(t.to_json().unwrap(), library(&t).to_string(true).unwrap());
    }
    let path = fixtures.join("huggingface.json");
    let theirs = tokenizers::Tokenizer::from_file(&path).unwrap();
    let ModelWrapper::BPE(model) = theirs.get_model() else { panic!("not BPE") };
    let t = Tokenizer::load(&path).unwrap();
    assert_eq!(t.fingerprint(), hash(model));
    assert_eq!(t.to_json().unwrap(), library(&t).to_string(true).unwrap());
}

/// Files of one tokenizer say some things in other words, and so have other fingerprints; fine-tuning adds tokens.
#[test]
fn tokenizers_agree_whatever_file_they_come_from() {
    let small = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/small");
    let pair = Tokenizer::load(&small).unwrap();
    let as_json = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut json = serde_json::from_str(&pair.to_json().unwrap()).unwrap();
        change(&mut json);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        fs::write(&path, json.to_string()).unwrap();
        Tokenizer::load(&path).unwrap()
    };
    let written = as_json(&|json| json["model"]["continuing_subword_prefix"] = "".into());
    assert_ne!(written.fingerprint(), pair.fingerprint());
    assert!(written.agrees_with(&pair) && pair.agrees_with(&written));
    let added = |content: &str| {
        as_json(&|json| {
            let token = serde_json::json!({
                "id": 700, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true
            });
            json["added_tokens"].as_array_mut().unwrap().push(token);
        })
    };
    let [one, other] = ["<one>", "<other>"].map(added);
    assert!(one.agrees_with(&pair) && pair.agrees_with(&one) && !one.agrees_with(&other));
    let fewer = as_json(&|json| drop(json["model"]["merges"].as_array_mut().unwrap().pop()));
    assert!(!fewer.agrees_with(&pair) && !pair.agrees_with(&fewer));
}

#[test]
fn wrong_entries_of_a_pair_of_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/small");
    let good = |name: &str| fs::read_to_string(from.join(name)).unwrap();
    let (vocab, merges) = (good("vocab.json"), good("merges.txt"));
    let load = |vocab: &[u8], merges: &[u8]| {
        fs::write(dir.path().join("my-vocab.json"), vocab).unwrap();
        fs::write(dir.path().join("my-merges.txt"), merges).unwrap();
        Tokenizer::load(dir.path())
    };
    let whole = load(vocab.as_bytes(), merges.as_bytes()).unwrap();
    // Line ends of another system, no line of version, no last line end, a line that is there twice.
    let second = merges.lines().nth(1).unwrap();
    for merges in [
        merges.replace('\n', "\r\n"),
        merges.lines().skip(1).collect::<Vec<_>>().join("\n"),
        merges.replacen(second, &format!("{second}\n{}\n{second}", merges.lines().nth(2).unwrap()), 1),
    ] {
        assert_eq!(load(vocab.as_bytes(), merges.as_bytes()).unwrap().fingerprint(), whole.fingerprint());
    }

    let refuse = |vocab: &[u8], merges: &[u8], expected: &[&str]| {
        let e = format!("{:#}", load(vocab, merges).err().unwrap());
        for part in expected {
            assert!(e.contains(part), "`{part}` is not in: {e}");
        }
    };
    let v = |from: &str, to: &str, expected: &[&str]| {
        assert!(vocab.contains(from), "{from}");
        let vocab = vocab.replacen(from, to, 1);
        refuse(vocab.as_bytes(), merges.as_bytes(), &[expected, &["my-vocab.json"]].concat());
    };
    v(r#""a":"#, r#""a":-"#, &[r#""a""#, "-", "whole number"]);
    v(r#""a":"#, r#""a":0.5e"#, &[r#""a""#, "whole number"]);
    v(r#""a":"#, r#""a":99999"#, &["largest id", "99999"]);
    v(r#""a":"#, r#""狐":699,"a":"#, &["狐", "share the id 699"]);
    v(r#""a":"#, r#""狐":700,"a":"#, &["狐", "700", "stands for no byte"]);
    v(r#""<s>":0"#, r#""<s>":700"#, &["<s>", "700", "at 0"]);
    v(r#""<pad>":1,"#, "", &["<pad>", "at id 1"]);
    v(r#""~":"#, r#""~~~~":"#, &["0x7e"]);
    v("{", "[", &["JSON"]);
    let m = |merges: &[u8], expected: &[&str]| {
        refuse(vocab.as_bytes(), merges, &[expected, &["my-merges.txt"]].concat());
    };
    m(b"#version: 0.2\na b c\n", &["line 2", "a", "b c"]);
    m(b"#version: 0.2\na \n", &["line 2", "two tokens"]);
    m(b"#version: 0.2\n\nab\n", &["line 3", "\"ab\"", "space between"]);
    m(b"~ ~\n", &["line 1", "\"~~\" is not in the vocabulary"]);
    m(b"a \xff", &["byte 2", "UTF-8"]);
    refuse(b"[1]", merges.as_bytes(), &["my-vocab.json", "[1]"]);
    refuse(b"{}", merges.as_bytes(), &["my-vocab.json", "no tokens"]);
    let long = format!("{{\"{}\":-1}}", "x".repeat(1 << 20));
    assert!(format!("{:#}", load(long.as_bytes(), b"").err().unwrap()).len() < 1000);

    fs::write(dir.path().join("vocab.json"), &vocab).unwrap();
    let e = format!("{:#}", Tokenizer::load(dir.path()).err().unwrap());
    assert!(e.contains("my-vocab.json") && e.contains("keep one"), "{e}");
}

#[test]
fn foreign_tokenizers_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    small().save(&path).unwrap();
    let good: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let refuse = |expected: &str, change: &dyn Fn(&mut Value)| {
        let mut json = good.clone();
        change(&mut json);
        fs::write(&path, json.to_string()).unwrap();
        let Err(e) = Tokenizer::load(&path) else { panic!("taken although {expected}") };
        let e = format!("{e:#}");
        assert!(e.contains(expected) && e.contains("tokenizer.json"), "{expected}: {e}");
    };
    refuse("no space added", &|j| j["pre_tokenizer"]["add_prefix_space"] = true.into());
    refuse("normalises", &|j| j["normalizer"] = json!({"type": "Lowercase"}));
    refuse("not a tokenizer.json", &|j| *j = 5.into());
    refuse("id 2", &|j| {
        j["added_tokens"] = json!([]);
        let vocab = j["model"]["vocab"].as_object_mut().unwrap();
        vocab.insert("<s>".into(), 2.into());
        vocab.insert("</s>".into(), 0.into());
    });
    refuse("\"WordPiece\"", &|j| j["model"]["type"] = "WordPiece".into());
    refuse("`vocab` is missing", &|j| j["model"]["vocab"] = Value::Null);
    refuse("`merges` is missing", &|j| j["model"]["merges"] = Value::Null);
    refuse("`merges[1]` is [\"a\"]", &|j| j["model"]["merges"][1] = json!(["a"]));
    refuse("`merges[1]` is wrong", &|j| j["model"]["merges"][1] = "a Q".into());
    refuse("`ignore_merges`", &|j| j["model"]["ignore_merges"] = true.into());
    refuse("`fuse_unk` is 1", &|j| j["model"]["fuse_unk"] = 1.into());
    refuse("`end_of_word_suffix` is \"</w>\"", &|j| j["model"]["end_of_word_suffix"] = "</w>".into());
    let e = format!("{:#}", Tokenizer::load(&dir.path().join("none")).err().unwrap());
    assert!(e.contains("vocab.json and merges.txt"), "{e}");
    fs::remove_file(&path).unwrap();
    let e = format!("{:#}", Tokenizer::load(dir.path()).err().unwrap());
    assert!(e.contains("neither tokenizer.json"), "{e}");
}
