use super::*;
use crate::UNK;
use ferropt_device::rng::{Purpose, Stream};

mod added;
mod files;
mod fixtures;
mod fuzz;

/// OPT's tokenizer from the shared data, if that is there.
fn opt() -> Option<Tokenizer> {
    crate::testing::shared("data/tokenizer").map(|path| Tokenizer::load(&path).unwrap())
}

fn small() -> Tokenizer {
    let text = "the cat sat on the mat; the cat sat. naïve café 狐狐狐 <s></s> ".repeat(20);
    Tokenizer::train([Ok(text)], 300).unwrap()
}

#[test]
fn opt_ids_are_those_of_the_reference() {
    let Some(t) = opt() else { return };
    assert_eq!(t.vocab_size(), 50265);
    // Hugging Face's test of OPT's tokenizer, less its leading 2.
    assert_eq!(t.encode("A photo of a cat").unwrap(), [250, 1345, 9, 10, 4758]);
    assert_eq!(t.encode_prompt("A photo of a cat").unwrap(), [2, 250, 1345, 9, 10, 4758]);
    // metaseq's recorded ids and text offsets.
    let text = "The man turned on the faucet so the toilet filled with water.";
    let ids = t.encode(text).unwrap();
    assert_eq!(ids, [133, 313, 1224, 15, 5, 856, 17527, 594, 98, 5, 11471, 3820, 19, 514, 4]);
    let offsets: Vec<usize> =
        (0..ids.len()).map(|i| ids[..i].iter().map(|&id| t.byte_len(id)).sum()).collect();
    assert_eq!(offsets, [0, 3, 7, 14, 17, 21, 23, 26, 28, 31, 35, 42, 49, 54, 60]);
    assert_eq!(t.decode(&ids), text);
}

#[test]
fn any_text_comes_back() {
    let small = small();
    let opt = opt();
    for text in [
        "",
        " ",
        "\n\n\t x",
        "naïve café",
        "狐🦊\u{0}\u{7f}\u{ad}\u{a0}",
        "don't  I'LL 123abc\r\n",
        "<s> </s><pad>",
    ] {
        for t in [Some(&small), opt.as_ref()].into_iter().flatten() {
            let ids = t.encode(text).unwrap();
            assert_eq!(t.decode(&ids), text);
            assert_eq!(ids.iter().map(|&id| t.byte_len(id)).sum::<usize>(), text.len());
            assert!(ids.iter().all(|&id| id > UNK), "{text:?} gave a special token: {ids:?}");
        }
    }
}

/// The library's reading of a tokenizer, by way of its file.
fn library(t: &Tokenizer) -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_bytes(t.to_json().unwrap()).unwrap()
}

/// Random texts: characters that meet at the seams of the pattern, and characters of all planes.
fn random_texts(count: u64) -> impl Iterator<Item = String> {
    let seams: Vec<char> =
        "    \n\t\r'''sstdmlrvecatSo19½٣!<_-é狐🦊\u{301}\u{a0}\u{85}\u{2028}\u{3000}\u{200b}"
            .chars()
            .collect();
    let stream = Stream::new(3, Purpose::Sampling, 0, 0);
    (0..count).map(move |row| {
        let word = |i| stream.word(row, i) as usize;
        let pick = |i: usize| match word(3 * i) % 8 {
            0 => (char::from_u32(word(3 * i + 1) as u32 % 0x110000).unwrap_or('x'), 1),
            1 => (char::from_u32(word(3 * i + 1) as u32 % 0x3000).unwrap_or('x'), 1),
            // Runs of a character make long words.
            2 if row % 10 == 0 => (seams[word(3 * i + 1) % seams.len()], 1 + word(3 * i + 2) % 90),
            _ => (seams[word(3 * i + 1) % seams.len()], 1),
        };
        (1..2 + word(0) % 40).map(pick).flat_map(|(c, times)| std::iter::repeat_n(c, times)).collect()
    })
}

#[test]
fn encoding_agrees_with_the_library() {
    let long: String =
        include_str!("../tokenizer.rs").chars().chain((0..3000).filter_map(char::from_u32)).collect();
    for t in [Some(small()), opt()].into_iter().flatten() {
        let library = library(&t);
        for text in random_texts(6000).chain([long.clone()]) {
            // The library finds special tokens in text; ours does not unless it is asked to.
            let text = SPECIALS.iter().fold(text, |text, special| text.replace(special, ""));
            let ids = t.encode(&text).unwrap();
            assert!(ids == library.encode(text.as_str(), false).unwrap().get_ids(), "{text:?}");
            assert!(t.decode(&ids) == text, "{text:?}");
        }
    }
}

#[test]
fn a_word_of_a_megabyte_is_merged_as_the_library_does() {
    let stream = Stream::new(4, Purpose::Sampling, 0, 0);
    let letters: String = (0..1 << 20).map(|i| char::from(b'a' + (stream.word(0, i) % 26) as u8)).collect();
    let t = small();
    let library = library(&t);
    for text in [&letters, &"a".repeat(1 << 20), &" ".repeat(1 << 20)] {
        assert!(t.encode(text).unwrap() == library.encode(text.as_str(), false).unwrap().get_ids());
    }
}

#[test]
fn shares_of_a_large_text_give_the_ids_of_the_whole() {
    let t = small();
    let text: String = random_texts(40_000).collect();
    assert!(text.len() > 5 * SHARE);
    assert!(t.encode(&text).unwrap() == t.encode_here(&text).unwrap());
}

#[test]
fn tokenizers_that_share_a_thread_do_not_mix_their_words() {
    let (a, b) = (small(), Tokenizer::train([Ok("cats and dogs and cats".repeat(9))], 280).unwrap());
    let text = "the cat and the dog sat on cats";
    let first = (a.encode(text).unwrap(), b.encode(text).unwrap());
    assert_ne!(first.0, first.1);
    for _ in 0..3 {
        assert_eq!((a.encode(text).unwrap(), b.encode(text).unwrap()), first);
    }
}

#[test]
fn marks_decide_about_special_tokens() {
    let t = small();
    let text = "<pad>the</s></s> cat<s></pad></";
    let (the, cat) = (t.encode("the").unwrap(), t.encode(" cat<s></pad></").unwrap());
    let read = [vec![PAD], the, vec![EOS, EOS], cat].concat();
    let plain = t.encode(text).unwrap();
    assert!(plain.iter().all(|&id| id > UNK));
    let in_front = |ids: &[u32]| [&[EOS], ids].concat();
    for (marks, expected) in [
        (Marks::default(), plain.clone()),
        (Marks { in_front: true, ..Marks::default() }, in_front(&plain)),
        (Marks { in_text: true, ..Marks::default() }, read.clone()),
        (Marks::HUGGING_FACE, in_front(&read)),
    ] {
        assert_eq!(t.encode_as(text, marks).unwrap(), expected, "{marks:?}");
    }
    assert_eq!(t.encode_prompt(text).unwrap(), in_front(&plain));
    assert_eq!(t.encode_as("", Marks::HUGGING_FACE).unwrap(), [EOS]);
    // Many of them are no more work than their length.
    let many = "</s>".repeat(1 << 18);
    assert_eq!(t.encode_as(&many, Marks { in_text: true, in_front: false }).unwrap(), vec![EOS; 1 << 18]);
}

#[test]
fn specials_and_unknown_ids_have_no_text() {
    let t = small();
    let a = t.encode("cat").unwrap();
    let ids = [&[EOS, PAD][..], &a, &[t.vocab_size() as u32, u32::MAX]].concat();
    assert_eq!(t.decode(&ids), "cat");
}

#[test]
fn streams_give_whole_characters_only() {
    let t = small();
    let text = "a🦊b狐é";
    let ids: Vec<u32> = text.bytes().map(|b| byte_id(&t, b)).collect();
    let mut stream = t.stream();
    let steps: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(steps, ["a", "", "", "", "🦊", "b", "", "", "狐", "", "é"]);
    assert_eq!(stream.finish(), "");
    // A lone continuation byte, a character that is broken off by another, and one that never ends.
    let mut stream = t.stream();
    let mut out = String::new();
    for byte in [0x80, b'x', 0xE7, b'y', 0xF0, 0x9F] {
        out += &stream.push(byte_id(&t, byte));
    }
    assert_eq!(out, "\u{fffd}x\u{fffd}y");
    assert_eq!(stream.finish(), "\u{fffd}");
}

fn byte_id(t: &Tokenizer, byte: u8) -> u32 {
    (0..t.vocab_size() as u32).find(|&id| t.token_bytes(id) == [byte]).unwrap()
}

#[test]
fn every_beginning_of_a_text_streams_as_its_whole_characters() {
    for t in [Some(small()), opt()].into_iter().flatten() {
        for text in random_texts(300).chain(["a🦊b狐é👩‍👩‍👧 नमस्ते 渡船".to_owned()])
        {
            // By the tokens that encoding gives, and by bytes, which end in the middle of characters.
            for ids in [t.encode(&text).unwrap(), text.bytes().map(|b| byte_id(&t, b)).collect()] {
                let (mut stream, mut shown, mut bytes) = (t.stream(), String::new(), 0);
                for id in ids {
                    shown += &stream.push(id);
                    bytes += t.byte_len(id);
                    assert_eq!(shown, text[..text.floor_char_boundary(bytes)]);
                }
                assert_eq!(stream.finish(), "");
                assert_eq!(shown, text);
            }
        }
    }
}
