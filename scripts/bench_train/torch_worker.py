"""PyTorch's side of scripts/bench-train: one model that stays in memory and trains when told to.

Reads one JSON object a line, {"steps": n}; answers each with one line: seconds of every step and of its parts, CPU
seconds used, loss and the peak resident set since the warm-up. Sleeps in between, so that several of these can be
measured in turns. Ends when standard input does.
"""

import argparse
import json
import os
import resource
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="JSON of the sizes: vocab, width, layers, heads, ffn, positions")
parser.add_argument("--seq", type=int, required=True, help="T, tokens per sequence")
parser.add_argument("--sequences", type=int, required=True, help="sequences per optimiser step")
parser.add_argument("--micro-batch", type=int, required=True, help="sequences per forward and backward pass")
parser.add_argument("--precision", choices=["f32", "bf16"], required=True, help="bf16 means autocast over f32 weights")
parser.add_argument("--compile", action="store_true", help="torch.compile the model")
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--warmup", type=int, default=2, help="steps before the first answer")
arguments = parser.parse_args()

import torch
import transformers

torch.set_num_threads(arguments.threads)
torch.manual_seed(0)


def build():
    """OPT with random weights, without dropout, as Hugging Face builds it by default (SDPA attention)."""
    sizes = json.loads(arguments.model)
    config = transformers.OPTConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["width"],
        word_embed_proj_dim=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        ffn_dim=sizes["ffn"],
        max_position_embeddings=sizes["positions"],
        dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return transformers.OPTForCausalLM(config).train(), sizes["vocab"]


def peak_rss():
    """Highest resident set since `forget_peak`, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def forget_peak():
    """Restarts the kernel's record of the highest resident set, so that compilation does not count."""
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


model, vocab = build()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
forward = torch.compile(model) if arguments.compile else model
passes = arguments.sequences // arguments.micro_batch
tokens = torch.randint(4, vocab, (arguments.sequences, arguments.seq))


def step():
    """One optimiser step over all sequences. Returns the loss and the seconds of its parts."""
    parts = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    total = 0.0
    for ids in tokens.split(arguments.micro_batch):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss = forward(input_ids=ids, labels=ids).loss / passes
        middle = time.perf_counter()
        loss.backward()
        total += loss.item()
        parts["forward"] += middle - start
        parts["backward"] += time.perf_counter() - middle
    start = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    parts["optimizer"] = time.perf_counter() - start
    return total, parts


def answer(**fields):
    print(json.dumps(fields), flush=True)


start = time.perf_counter()
for _ in range(arguments.warmup):
    step()
forget_peak()
answer(
    ready=True,
    warmup_s=time.perf_counter() - start,
    parameters=sum(p.numel() for p in model.parameters()),
    torch=torch.__version__,
    transformers=transformers.__version__,
)

for line in sys.stdin:
    seconds, parts, before = [], [], cpu_seconds()
    for _ in range(json.loads(line)["steps"]):
        start = time.perf_counter()
        loss, spent = step()
        seconds.append(time.perf_counter() - start)
        parts.append(spent)
    answer(step_s=seconds, parts=parts, loss=loss, cpu_s=cpu_seconds() - before, peak_rss_bytes=peak_rss())
