//! Against Hugging Face's slow tokenizer; see `scripts/make_tokenizer_fixtures.py`.

use super::*;
use crate::tokenizer::classes::{Class, Classes};
use regex_syntax::hir::{self, HirKind};
use serde_json::Value;
use std::path::PathBuf;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer").join(name)
}

fn fixture() -> Value {
    serde_json::from_slice(&fs::read(path("ids.json")).unwrap()).unwrap()
}

fn list<T: serde::de::DeserializeOwned>(fixture: &Value, key: &str) -> Vec<T> {
    let list: Vec<T> = serde_json::from_value(fixture[key].clone()).unwrap();
    assert!(list.len() >= 100, "{key}");
    list
}

#[test]
fn ids_are_those_of_the_slow_tokenizer() {
    let fixture = fixture();
    let texts: Vec<String> = list(&fixture, "texts");
    let small = Tokenizer::load(&path("small")).unwrap();
    let saved_elsewhere = Tokenizer::load(&path("huggingface.json")).unwrap();
    for (key, t) in [("small", Some(small)), ("small", Some(saved_elsewhere)), ("opt", opt())] {
        let Some(t) = t else { continue };
        for (text, ids) in texts.iter().zip(list::<Vec<u32>>(&fixture, key)) {
            assert_eq!(t.encode_as(text, Marks::HUGGING_FACE).unwrap(), ids, "{key}: {text:?}");
            if !READ.iter().any(|id| text.contains(SPECIALS[*id as usize])) {
                assert_eq!(t.encode_prompt(text).unwrap(), ids, "{key}: {text:?}");
            }
        }
    }
}

#[test]
fn texts_are_those_of_the_slow_tokenizer() {
    let fixture = fixture();
    let t = Tokenizer::load(&path("small")).unwrap();
    let pairs = list::<Vec<u32>>(&fixture, "undecoded").into_iter().zip(list::<String>(&fixture, "decoded"));
    for (ids, text) in pairs {
        assert_eq!(t.decode(&ids), text, "{ids:?}");
    }
}

#[test]
fn classes_are_those_of_the_slow_tokenizers_engine() {
    let classes = Classes::new().unwrap();
    let mut theirs = vec![Class::Other; 0x110000];
    for (first, last, class) in list::<(usize, usize, char)>(&fixture(), "classes") {
        let class = match class {
            'L' => Class::Letter,
            'N' => Class::Number,
            _ => Class::Space,
        };
        theirs[first..=last].fill(class);
    }
    // The engine behind the fixture knows Unicode 18, which made letters and digits of characters that were unassigned
    // in Unicode 16. Nothing else differs.
    let parsed = regex_syntax::parse(r"\p{Cn}").unwrap();
    let HirKind::Class(hir::Class::Unicode(unassigned)) = parsed.kind() else { panic!("not a class") };
    let unassigned = |c| unassigned.iter().any(|range| (range.start()..=range.end()).contains(&c));
    let newer = |c| classes.of(c) == Class::Other && unassigned(c);
    let wrong: Vec<char> =
        ('\0'..=char::MAX).filter(|&c| classes.of(c) != theirs[c as usize] && !newer(c)).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(!newer('a') && !newer('\u{301}') && newer('\u{323b0}'));
}
