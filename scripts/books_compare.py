#!/usr/bin/env python3
"""Trains one configuration with ferropt and with PyTorch, from the same weights on the same data, and compares.

  DIR/bin/python scripts/books_compare.py            (DIR: environment of scripts/setup-pytorch)

1. `ferropt train` saves the weights of step 0, then trains to the end. 2. PyTorch loads those weights, repeats ferropt's
order of samples and its learning rates, and trains as many steps. 3. Curves side by side and a table go to docs/benchmarks.
What is finished is not done again: remove the run folder (runs/books-compare) to start anew. Takes about 40 minutes on two
cores with the default configuration, which needs the books corpus in ../shared/data.
"""

import argparse
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

from books import report

# Largest difference of the first training losses that bf16 arithmetic explains; beyond it weights or data differ.
FIRST_LOSS_TOLERANCE = 0.01


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "books-compare.toml", metavar="FILE", help="what to train (default: configs/books-compare.toml)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to ferropt train; may be repeated")
    parser.add_argument("--ferropt", type=Path, metavar="FILE", help="the binary (default: target/release/ferropt below $CARGO_TARGET_DIR or the repository)")
    parser.add_argument("--eager", dest="compile", action="store_false", help="do not compile the PyTorch model")
    parser.add_argument("--precision", choices=["bf16", "f32"], default="bf16", help="PyTorch's precision: bf16 autocast, or f32, which is faster on processors that multiply bf16 slowly (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="PyTorch's sequences per pass (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", metavar="DIR", help="where to write the page (default: docs/benchmarks)")
    return parser.parse_args()


def train_ferropt(options):
    """Step 0, then the whole run. Returns the resolved configuration and the run folder."""
    binary = options.ferropt or Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "ferropt"
    if not os.access(binary, os.X_OK):
        raise SystemExit(f"{binary} is no program; build it with `cargo build --release`, or name it with --ferropt")
    command = [str(binary), "train", str(options.config)] + [word for item in options.set for word in ("--set", item)]
    given = tomllib.loads(options.config.read_text())
    run = given["run"]["dir"]
    for item in options.set:
        run = item.partition("=")[2].strip("\"'") if item.startswith("run.dir=") else run
    run = ROOT / run
    if not (run / "checkpoints" / "step-00000000").exists():
        # No time at all: the run ends, and saves, before its first step.
        subprocess.run(command + ["--set", "run.max_minutes=1e-12"], cwd=ROOT, check=True)
    subprocess.run(command, cwd=ROOT, check=True)
    return tomllib.loads((run / "config.toml").read_text()), run


def read_ferropt(run, config):
    """Curves of a run folder, in the form of books.training.Trainer.run."""
    training, validation, seconds = [], [], 0.0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "training":
            seconds += config["batch"]["tokens"] / record["tokens_per_second"]
            training.append({key: record[key] for key in ("step", "loss", "grad_norm", "lr")} | {"seconds": seconds})
        elif record["kind"] == "validation":
            validation.append({"step": record["step"], "loss": record["loss"], "seconds": seconds})
    if [p["step"] for p in training] != list(range(1, config["run"]["steps"] + 1)):
        raise SystemExit(f"{run / 'metrics.jsonl'} does not hold every step from 1 to {config['run']['steps']}; log.every must be 1")
    return {"training": training, "validation": validation}


def token_file(config, name):
    """The token file of `name` that ferropt made."""
    folder = ROOT / config["data"]["cache"]
    found = sorted(folder.glob(f"{name}-*.tokens"))
    if len(found) != 1:
        raise SystemExit(f"{folder} holds {len(found)} token files of {name!r}, expected one; remove those of other corpora")
    return found[0]


def train_pytorch(options, config, run, ours):
    """Trains with PyTorch, or returns the curves of a finished run."""
    finished = run.parent / "pytorch.json"
    if finished.exists():
        return json.loads(finished.read_text())
    from books import tokens, training

    (name,) = config["data"]["validation"]
    trainer = training.Trainer(
        config, run / "checkpoints" / "step-00000000" / "model.safetensors",
        tokens.load(token_file(config, "train")), tokens.load(token_file(config, name)), options,
    )  # fmt: skip

    def show(done):
        last, same = done[-1], ours["training"][len(done) - 1]
        if last["step"] == 1 and abs(last["loss"] - same["loss"]) > FIRST_LOSS_TOLERANCE:
            raise SystemExit(f"the first loss is {last['loss']:.4f} here and was {same['loss']:.4f} in ferropt: weights or data differ")
        if last["step"] % 10 == 0 or last["step"] == 1:
            print(f"PyTorch step {last['step']}: loss {last['loss']:.4f} (ferropt {same['loss']:.4f}), {last['seconds'] / 60:.1f} minutes", flush=True)

    rates = [p["lr"] for p in ours["training"]]
    theirs = trainer.run(rates, ours["validation"][0]["step"], show)
    finished.write_text(json.dumps(theirs))
    return theirs


def processor():
    with open("/proc/cpuinfo") as info:
        return next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "an unknown processor")


def main():
    options = parse()
    config, run = train_ferropt(options)
    ours = read_ferropt(run, config)
    theirs = train_pytorch(options, config, run, ours)
    words = [f"--set {item}" for item in options.set if not item.startswith(("run.dir", "data."))] + ([] if options.compile else ["--eager"]) + (["--precision f32"] if options.precision == "f32" else [])
    facts = {
        "config": options.config.name,
        "command": " ".join(["scripts/books_compare.py"] + words),
        "commit": subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "processor": processor(),
    }
    for path in report.write(options.out, config, {"ferropt": ours, "PyTorch": theirs}, facts):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
