#!/usr/bin/env python3
"""Oracle fixtures: what Hugging Face's OPTForCausalLM and PyTorch compute for tiny OPT models.

One safetensors file per case. With N tokens = B x T, all in f32 on one thread unless said otherwise:

  tensor                 dtype, shape    content
  <hf name>              BF16            initial weight, exactly representable in bf16 so that f32 and bf16 runs start
                                         alike; names of OPTForCausalLM.named_parameters() (no lm_head: it is tied)
  tokens                 I32 [B, T]      inputs; padded with 1 behind the end of a ragged sequence
  targets                I32 [B, T]      next tokens; -100 takes no part in the loss
  logits                 F32 [B, T, V]   before the first step
  loss                   F32 []          mean over the targets that take part, in nats, before the first step
  grad.<hf name>         F32             gradient of loss
  loss20                 F32 [20]        loss before each of 20 AdamW steps on this batch (loss20[0] == loss)
  after20.<hf name>      F32             leading rows of the parameter after the 20 steps: all rows, or the first few
                                         (`after_rows`) of a matrix
  after20_norms          F64 [P, 2]      for every parameter, in the order of the metadata key `params`: Euclidean norm
                                         after the 20 steps, and norm of its change over them
  bf16.logits            BF16 [B, T, V]  the same model under torch.autocast("cpu", torch.bfloat16), f32 weights
  bf16.loss, bf16.loss20 F32             its loss, and its losses over the 20 steps
  bf16.grad_errors       F64 [P, 2]      for every parameter: norm(bf16 gradient - f32 gradient), and norm(f32 gradient)

  metadata key  content
  config        JSON {vocab, width, layers, heads, ffn, embed_width, post_ln, max_seq}; embed_width == width means that
                there are no projections; post_ln implies that there is no final layer norm (as in opt-350m)
  optimizer     JSON {lr, beta1, beta2, eps, weight_decay, steps}; decay applies to every parameter, no clipping
  params        JSON [hf name, ...], the order of the rows of after20_norms and bf16.grad_errors
  seed, torch, transformers

Beside them greedy.json: for each case, texts that its model continues greedily, three prompts of different lengths, each
{prompt, tokens, log_probs} with ids and nats. No token has another within 1e-3 nats of it, so that rounding chooses none.

Two facts for readers of the numbers. A key bias shifts all scores of a row alike, so its true gradient is zero: what is
stored is rounding noise, and AdamW turns noise into steps of up to lr. The position table has max_seq + 2 rows and the
first token uses row 2; rows that no token used have gradient zero and only decay.

Run it with any Python that has torch, transformers, safetensors and numpy; nothing is downloaded. Either

  scripts/setup-pytorch DIR && DIR/bin/python scripts/make_fixtures.py

or, with Debian 12's own packages, which are smaller:

  apt-get install python3-torch python3-venv
  /usr/bin/python3 -m venv --system-site-packages DIR
  DIR/bin/pip install transformers==4.30.2 safetensors
  DIR/bin/python scripts/make_fixtures.py
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

IGNORE = -100
STEPS = 20
OPTIMIZER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "steps": STEPS}

# What a case may set, and its value when it does not. Zero means "same as width" for embed_width, "same as seq" for
# max_seq, and "all rows" for after_rows.
DEFAULTS = {
    "vocab": 96, "width": 32, "layers": 1, "heads": 2, "ffn": 64, "embed_width": 0, "post_ln": 0, "max_seq": 0,
    "batch": 2, "seq": 24, "seed": 1, "after_rows": 0,
}  # fmt: skip

# The committed cases. Lengths are no multiple of any tile, and few rows are kept where the models are large.
CASES = [
    "pre-d16:width=32,heads=2,layers=2,ffn=72,batch=3,seq=29,max_seq=40,seed=16,after_rows=8",
    "pre-d64:width=128,heads=2,ffn=24,vocab=64,batch=2,seq=37,seed=64,after_rows=4",
    "pre-d80:width=80,heads=1,ffn=40,vocab=101,batch=2,seq=21,seed=80,after_rows=4",
    "pre-d128:width=128,heads=1,ffn=24,vocab=64,batch=3,seq=19,seed=128,after_rows=4",
    "post-proj:width=48,heads=3,layers=2,ffn=64,embed_width=32,post_ln=1,batch=2,seq=26,max_seq=32,seed=350,after_rows=8",
]


def parse_case(text):
    """Turns `NAME:key=value,...` into (name, full case), refusing keys and values that mean nothing."""
    name, _, rest = text.partition(":")
    case = dict(DEFAULTS)
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key not in case or not equals:
            raise SystemExit(f"case {name!r}: {item!r} is not key=value with a key among {', '.join(DEFAULTS)}")
        try:
            case[key] = int(value)
        except ValueError:
            raise SystemExit(f"case {name!r}: {key} = {value!r} is not a whole number") from None
    case["embed_width"] = case["embed_width"] or case["width"]
    case["max_seq"] = case["max_seq"] or case["seq"]
    if not name or "/" in name:
        raise SystemExit(f"case {text!r}: the name before the colon becomes a file name, so it must not be empty or hold '/'")
    if case["width"] % case["heads"]:
        raise SystemExit(f"case {name!r}: width {case['width']} is no multiple of heads {case['heads']}")
    if case["seq"] > case["max_seq"]:
        raise SystemExit(f"case {name!r}: seq {case['seq']} is longer than max_seq {case['max_seq']}")
    if case["vocab"] < 8:
        raise SystemExit(f"case {name!r}: vocab {case['vocab']} leaves no ordinary tokens beside the 4 special ones; use 8 or more")
    return name, case


def build(case):
    """A model with weights, biases and layer norms all far from zero and one, so that no gradient hides."""
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=case["vocab"],
            hidden_size=case["width"],
            num_hidden_layers=case["layers"],
            num_attention_heads=case["heads"],
            ffn_dim=case["ffn"],
            word_embed_proj_dim=case["embed_width"],
            do_layer_norm_before=not case["post_ln"],
            max_position_embeddings=case["max_seq"],
            activation_function="relu",
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            attn_implementation="eager",
            use_cache=False,
        )
    )
    model.tie_weights()
    generator = torch.Generator().manual_seed(case["seed"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layer_norm" in name:
                value = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
            elif "embed" in name:
                value = 0.2 * noise
            elif parameter.dim() == 2:
                value = noise * 1.2 / parameter.shape[1] ** 0.5
            else:
                value = 0.1 * noise
            parameter.copy_(value.bfloat16().float())
    return model.train()


def batch(case):
    """Tokens and targets; every sequence but the first ends early, and a few targets within are left out."""
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    b, t = case["batch"], case["seq"]
    text = torch.randint(4, case["vocab"], (b, t + 1), generator=generator)
    text[:, 0] = 2
    tokens, targets = text[:, :-1].clone(), text[:, 1:].clone()
    for row in range(1, b):
        end = t - row * max(1, t // (b + 1))
        tokens[row, end:] = 1
        targets[row, end:] = IGNORE
    targets[0, t // 3] = IGNORE
    targets[b - 1, 1] = IGNORE
    return tokens, targets


def loss_of(model, tokens, targets, bf16):
    """Logits and mean loss, in f32 or under bf16 autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    return logits, loss


def run(case, bf16):
    """First logits and gradients, then 20 AdamW steps. Returns a dict of what happened, parameters by name."""
    torch.manual_seed(0)
    model = build(case)
    tokens, targets = batch(case)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    o = OPTIMIZER
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["eps"], weight_decay=o["weight_decay"]
    )
    losses, first_logits, grads = [], None, None
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits, loss = loss_of(model, tokens, targets, bf16)
        loss.backward()
        losses.append(loss.item())
        if grads is None:
            first_logits = logits.detach().clone()
            grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"start": start, "logits": first_logits, "grads": grads, "losses": losses, "after": after}


def check_padding(case):
    """What stands behind the end of a sequence must not matter: an attention mask changes no logit that is used."""
    model = build(case)
    tokens, targets = batch(case)
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        masked = model(input_ids=tokens, attention_mask=(tokens != 1).long()).logits
    used = targets != IGNORE
    difference = (plain - masked)[used].abs().max().item()
    if difference > 1e-5:
        raise SystemExit(f"padding changed a used logit by {difference}: this transformers version treats masks unexpectedly")


def write(name, case, out):
    """Computes a case and writes its file; returns the path."""
    check_padding(case)
    tokens, targets = batch(case)
    exact, rough = run(case, bf16=False), run(case, bf16=True)
    names = list(exact["start"])
    norm = lambda x: x.double().norm().item()
    tensors = {n: w.bfloat16() for n, w in exact["start"].items()}
    tensors |= {
        "tokens": tokens.int(),
        "targets": targets.int(),
        "logits": exact["logits"],
        "loss": torch.tensor(exact["losses"][0]),
        "loss20": torch.tensor(exact["losses"]),
        "after20_norms": torch.tensor(
            [[norm(exact["after"][n]), norm(exact["after"][n] - exact["start"][n])] for n in names], dtype=torch.float64
        ),
        "bf16.logits": rough["logits"].bfloat16(),
        "bf16.loss": torch.tensor(rough["losses"][0]),
        "bf16.loss20": torch.tensor(rough["losses"]),
        "bf16.grad_errors": torch.tensor(
            [[norm(rough["grads"][n] - exact["grads"][n]), norm(exact["grads"][n])] for n in names], dtype=torch.float64
        ),
    }
    for n in names:
        tensors["grad." + n] = exact["grads"][n]
        after = exact["after"][n]
        rows = case["after_rows"] if case["after_rows"] and after.dim() == 2 else after.shape[0]
        tensors["after20." + n] = after[:rows]
    keys = ("vocab", "width", "layers", "heads", "ffn", "embed_width", "post_ln", "max_seq")
    config = {k: bool(case[k]) if k == "post_ln" else case[k] for k in keys}
    metadata = {
        "config": json.dumps(config),
        "optimizer": json.dumps(OPTIMIZER),
        "params": json.dumps(names),
        "seed": str(case["seed"]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path = out / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(path), metadata=metadata)
    sort_header(path)
    print(
        f"{path}: {path.stat().st_size / 1e3:.0f} kB, {sum(w.numel() for w in exact['start'].values())} parameters, "
        f"loss {exact['losses'][0]:.4f} -> {exact['losses'][-1]:.4f} (bf16 {rough['losses'][0]:.4f} -> {rough['losses'][-1]:.4f})"
    )


# Lengths of the prompts of greedy.json, how many of each are tried, and nats between a token that is chosen and the next likely.
PROMPTS = (2, 5, 9)
TRIED = 20
CLEAR = 1e-3


@torch.no_grad()
def continued(case):
    """Prompts and what the model makes of them, up to its last position for the longest; </s> is no end here. Of the prompts
    that are tried, those with the most different tokens behind them."""
    model = build(case).eval()
    new = case["max_seq"] - max(PROMPTS)
    texts = []
    for length in PROMPTS:
        found = []
        for seed in range(TRIED):
            generator = torch.Generator().manual_seed(1000 * case["seed"] + seed)
            prompt = torch.randint(4, case["vocab"], (1, length), generator=generator)
            prompt[0, 0] = 2
            ids = model.generate(prompt, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=1, attention_mask=torch.ones_like(prompt))
            log_probs = model(ids).logits[0, length - 1 : -1].double().log_softmax(-1)
            made, two = ids[0, length:], log_probs.topk(2).values
            if (two[:, 0] - two[:, 1]).min() > CLEAR and torch.equal(log_probs.argmax(-1), made):
                chosen = [round(x, 6) for x in log_probs.gather(1, made[:, None])[:, 0].tolist()]
                found.append({"prompt": prompt[0].tolist(), "tokens": made.tolist(), "log_probs": chosen})
        texts.append(max(found, key=lambda text: len(set(text["tokens"]))))
    return texts


def write_greedy(cases, out):
    path = out / "greedy.json"
    lines = [f"{json.dumps(name)}: [\n " + ",\n ".join(json.dumps(text) for text in continued(case)) + "\n]" for name, case in cases]
    path.write_text("{" + ",\n".join(lines) + "}\n")
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def sort_header(path):
    """Rewrites a safetensors header with sorted keys (the library's order of metadata varies), so that the same numbers
    always give the same bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def main():
    default_out = Path(__file__).resolve().parent.parent / "crates" / "model" / "tests" / "fixtures"
    parser = argparse.ArgumentParser(
        description="Writes oracle fixtures from Hugging Face OPT and PyTorch; the head of this file describes them.",
        epilog="Keys of a case and their defaults: " + ", ".join(f"{k}={v}" for k, v in DEFAULTS.items())
        + ". embed_width, max_seq and after_rows at 0 mean width, seq and all rows.",
    )
    parser.add_argument("--out", type=Path, default=default_out, metavar="DIR", help="where to write (default: the committed fixtures)")
    parser.add_argument(
        "--case", action="append", metavar="NAME[:KEY=VALUE,...]",
        help="a case of your own, for instance 'mine:width=160,heads=2,layers=2'; may be given several times (default: the committed cases)",
    )
    parser.add_argument("--only-greedy", action="store_true", help="write greedy.json alone")
    arguments = parser.parse_args()
    cases = [parse_case(text) for text in arguments.case or CASES]
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, case in cases if not arguments.only_greedy else []:
        write(name, case, arguments.out)
    write_greedy(cases, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
