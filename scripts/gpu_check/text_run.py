"""A training run small enough for any machine, with nothing but this folder: its text are the files here, its tokens are bytes."""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = 100
# Layers, heads of 64 columns, width: enough for tensor cores to be used.
CONFIG = """\
[model]
layers = 2
heads = 4
width = 256
vocab = 260
positions = 128
dropout = 0.0
attention_dropout = 0.0
[data]
train = {text}
tokenizer = {tokenizer}
[batch]
tokens = 2048
[schedule]
warmup = 10
[optimizer]
lr = 1e-3
[run]
dir = {run}
steps = {steps}
"""


def letters():
    """A printable letter for each byte, as GPT-2 has them in its vocabulary: its own where it has one, else one from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


def prepare(folder):
    """Writes text, tokenizer and configuration. Returns the configuration's file and that of the run's figures."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters()]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "text.txt").write_text("".join(path.read_text() for path in sorted(HERE.glob("*.py"))))
    places = {"text": folder / "text.txt", "tokenizer": folder, "run": folder / "run"}
    config = folder / "config.toml"
    config.write_text(CONFIG.format(steps=STEPS, **{key: json.dumps(str(place)) for key, place in places.items()}))
    return config, folder / "run" / "metrics.jsonl"


def losses(metrics):
    """The loss of each step."""
    lines = map(json.loads, metrics.read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "training"]
