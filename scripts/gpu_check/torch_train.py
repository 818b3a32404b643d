"""Tokens per second of training the same model with PyTorch: torch.compile, flash attention, bf16 with f32 masters, fused
AdamW. Arguments: preset, sequences of a step, of a pass, steps. The last line of its output is JSON."""

import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

# Layers, heads, width; pre-norm. 350m's post-norm and projections cost the same products but for the two around the ends.
SIZES = {"125m": (12, 12, 768), "350m": (24, 16, 1024), "1.3b": (24, 32, 2048), "2.7b": (32, 32, 2560), "6.7b": (32, 32, 4096)}
SEQ, VOCAB = 2048, 50272


class Layer(nn.Module):
    def __init__(self, heads, width):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x = x + self.out(y)
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Opt(nn.Module):
    def __init__(self, layers, heads, width):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(SEQ + 2, width)
        self.layers = nn.ModuleList(Layer(heads, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.positions(torch.arange(2, ids.shape[1] + 2, device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, VOCAB).float(), targets.view(-1))


def main():
    preset, sequences, micro_batch, steps = sys.argv[1], *map(int, sys.argv[2:5])
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    with torch.device("cuda"):
        model = Opt(*SIZES[preset])
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.006)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model)
    ids = torch.randint(VOCAB, (sequences, SEQ + 1), device="cuda")

    def step():
        for part in ids.split(micro_batch):
            with torch.autocast("cuda", torch.bfloat16):
                loss = compiled(part[:, :-1], part[:, 1:])
            (loss * part.shape[0] / sequences).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    for _ in range(3):
        step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    speed = sequences * SEQ / statistics.median(times)
    print(json.dumps({"tokens_per_second": speed, "peak_bytes": torch.cuda.max_memory_allocated(), "loss": loss, "version": torch.__version__}))


main()
