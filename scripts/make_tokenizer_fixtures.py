#!/usr/bin/env python3
"""Fixtures of the tokenizer: what Hugging Face's slow tokenizer makes of texts.

Written to crates/data/tests/fixtures/tokenizer:

  small/vocab.json, small/merges.txt   a vocabulary of 700 tokens in OPT's order, trained on the texts below
  huggingface.json                     the same, as the fast tokenizer of OPT saves it, with its added tokens and
                                       its post-processor
  ids.json                             {texts, small, opt, undecoded, decoded, classes}:
    texts      strings of every kind
    small      their ids by the small vocabulary, `</s>` in front and special tokens read, as OPT's tokenizer does it
    opt        the same by OPT's own vocabulary
    undecoded  lists of ids of the small vocabulary, at random
    decoded    what the tokenizer makes of them, special tokens left out
    classes    [first, last, "L", "N" or "S"]: code points that the pattern's engine takes for \\p{L}, \\p{N} and \\s

The slow tokenizer is the class GPT2Tokenizer of transformers before version 5: GPT-2's published Python code. Run

  python3 -m venv DIR
  DIR/bin/pip install transformers==4.57.6 regex==2026.11.19
  DIR/bin/python scripts/make_tokenizer_fixtures.py FOLDER

where FOLDER has OPT's gpt2-vocab.json and gpt2-merges.txt (from metaseq's projects/OPT/assets).
"""

import json
import random
import sys
import tempfile
import unicodedata
from pathlib import Path

import regex
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Tokenizer, GPT2TokenizerFast

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
OPT = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
OUT = Path(__file__).resolve().parent.parent / "crates/data/tests/fixtures/tokenizer"

PROSE = """\
The ferry left at seven, an hour late, and nobody on the quay had waved. "You'll see," he'd said; I didn't. We're told
that it's the tide: they've always said so, and I'm inclined to believe them. The lamp-keeper's log for 1887 has 214
entries, of which thirty-one mention fog.\tThe price was 3.50 (or £2.75).

    fn main() { println!("{:>8.3}", 1.0_f64 / 3.0); }   // spaces  and   more    spaces

Der Fährmann grüßte über den Fluß; le garçon, où était-il? El niño comió pingüino. Zażółć gęślą jaźń. Žluťoučký kůň.
Паром отошёл в семь часов, на час позже. Το πλοίο έφυγε στις επτά. 渡船七點出發，晚了一個小時。船は七時に出ました。
배는 일곱 시에 떠났다. العبارة غادرت في السابعة. המעבורת יצאה בשבע. नाव सात बजे निकली। เรือออกเวลาเจ็ดโมง
"""

CHOSEN = [
    "", " ", "  ", "\n", "\n\n \n", "a", " a", "  a", "a ", "a  ", "\ta", " \ta", "\r\n", "\r\na", "a\r\n\r\nb",
    "A photo of a cat", "The man turned on the faucet so the toilet filled with water.",
    "don't we'll I'M it's you're they've I'd 'tis 'll'll", "DON'T '' ''' 's's 's 'S", "o'clock 'em rock'n'roll",
    "x1y22 ½Ⅷ ٣٤ ४५ ④ 𝟘𝟙", "1234567890" * 9, "a" * 300, " " * 70 + "x", "ab" * 150, "!" * 99, "\n" * 40 + "z",
    "naïve café Ångström e\u0301 a\u0308\u0301\u0327 \u0301", "狐🦊狐 👩‍👩‍👧‍👦🏳️‍🌈 🇫🇷", "שָׁלוֹם عَرَبِيّ हिन्दी ไทย",
    "a\u0085b\u00a0c\u2028d\u2029e\u3000f\u200bg\u1680h\u202fi\ufeffj\u180ek\u2060l",
    " \u0085 \u00a0\u00a0x \u3000 y\u2003\u2003z", "\u001c\u001d\u001e\u001f a\u001fb", "\u0000\u0001\u007f\u0080\u009f\u00ad",
    "\ue000\uf8ff\ufffd\uffff\U000f0000\U0010ffff", "ªºʰǅΩℵ𝒜𐐷ꙮ", "</s>", "a</s>b", "</s></s> <pad>x", "< /s> </s <s> <unk> <mask>",
    " </s> ", "text</s>", "<pad", "<pad><pad>", "<</s>>", "https://example.org/a_b?c=1&d=%20#e", "snake_case camelCase",
    "\t\tif (x != 0) {\n\t\t\treturn -x;\n\t\t}\n", "…—–“quoted”‘’«»", "1,000.00 1e-5 0x1F", "\u0130\u0131ßſﬁ",
] + PROSE.splitlines() + [PROSE]

POOLS = [
    "  \n\t abcdeiorstz 'sS'tdmlrv\"019.,!-_",
    " \u00a0\u0085\u2028\u3000\u200b\u1680\t\n x1!",
    "éßøñ àç ÀÉ ' œŁ",
    "\u0301\u0308\u0327\u20dd e a n \u093f\u0941 क",
    "٣४५½Ⅷ④0 1 a",
    "狐船七時に出ました。 　，",
    "🦊👩‍👧🏳️🇫🇷 a1",
]


def random_texts(rng):
    """From pools of characters that meet at the seams of the pattern, then from all planes."""
    for pool in POOLS * 8:
        yield "".join(rng.choice(pool) for _ in range(rng.randint(1, 30)))
    # Characters that Unicode 14 knows, so that every engine of today agrees on their classes; and ones that none knows.
    known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn")]
    unknown = [chr(c) for c in (0x378, 0xFFFE, 0x1FFFF, 0x3FFFD, 0x9ABCD, 0xEFFFF)]
    for _ in range(40):
        pool = rng.choices(known, k=8) + [" ", "a", "1"] + rng.choices(unknown, k=1)
        yield "".join(rng.choice(pool) for _ in range(rng.randint(1, 24)))


def classes():
    for letter, pattern in (("L", r"\p{L}"), ("N", r"\p{N}"), ("S", r"\s")):
        found = [c for c in range(0x110000) if regex.match(pattern, chr(c))]
        first = None
        for c, following in zip(found, found[1:] + [None]):
            first = c if first is None else first
            if following != c + 1:
                yield [first, c, letter]
                first = None


def main():
    opt = Path(sys.argv[1])
    small = OUT / "small"
    small.mkdir(parents=True, exist_ok=True)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([PROSE] * 4, vocab_size=700, special_tokens=SPECIALS, show_progress=False)
    trained.save_model(str(small))
    with tempfile.TemporaryDirectory() as folder:
        fast = GPT2TokenizerFast(str(small / "vocab.json"), str(small / "merges.txt"), **OPT)
        fast.save_pretrained(folder)
        saved = json.loads((Path(folder) / "tokenizer.json").read_text("utf-8"))
    (OUT / "huggingface.json").write_text(json.dumps(saved, ensure_ascii=False) + "\n", "utf-8")

    rng = random.Random(5)
    texts = CHOSEN + list(random_texts(rng))
    slow = {
        "small": GPT2Tokenizer(str(small / "vocab.json"), str(small / "merges.txt"), **OPT),
        "opt": GPT2Tokenizer(str(opt / "gpt2-vocab.json"), str(opt / "gpt2-merges.txt"), **OPT),
    }
    ids = {name: [tokenizer(text).input_ids for text in texts] for name, tokenizer in slow.items()}
    # Ids 0 and 3 are special here and are not in Hugging Face's tokenizer of OPT, which shows their names.
    some = [i for i in range(len(slow["small"])) if i not in (0, 3)]
    undecoded = [[rng.choice(some[: rng.choice([260, 700])]) for _ in range(rng.randint(0, 40))] for _ in range(100)]
    decode = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    decoded = [slow["small"].decode(one, **decode) for one in undecoded]
    content = {"texts": texts, **ids, "undecoded": undecoded, "decoded": decoded, "classes": list(classes())}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in content.items())
    (OUT / "ids.json").write_text("{" + lines + "}\n", "ascii")
    print(f"{len(texts)} texts, {len(undecoded)} lists of ids")


if __name__ == "__main__":
    main()
