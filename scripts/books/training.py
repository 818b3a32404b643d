"""PyTorch's half of the comparison: the same weights, sequences and learning rates, under bf16 autocast or in f32."""

import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file

from . import tokens


def build(config, checkpoint):
    """OPT as Hugging Face writes it, with the weights of a Ferropt checkpoint."""
    sizes = config["model"]
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=sizes["vocab"],
            hidden_size=sizes["width"],
            word_embed_proj_dim=sizes["width"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            ffn_dim=sizes.get("feed_forward", 4 * sizes["width"]),
            max_position_embeddings=sizes["positions"],
            dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    result = model.load_state_dict({k: v.float() for k, v in load_file(checkpoint).items()}, strict=False)
    if result.unexpected_keys or set(result.missing_keys) - {"lm_head.weight"}:
        raise SystemExit(f"{checkpoint} does not fit the model: unexpected {result.unexpected_keys}, missing {result.missing_keys}")
    model.tie_weights()
    return model.train()


class Trainer:
    """A model, its optimiser and its data."""

    def __init__(self, config, checkpoint, train_ids, valid_ids, options):
        self.config, self.options = config, options
        torch.set_num_threads(config["run"]["threads"])
        self.model = build(config, checkpoint)
        self.forward = torch.compile(self.model) if options.compile else self.model
        o = config["optimizer"]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=o["lr"], betas=o["betas"], eps=o["eps"], weight_decay=o["weight_decay"], fused=True
        )
        self.seq = config["data"]["seq"]
        self.sequences = config["batch"]["tokens"] // self.seq
        if self.sequences % options.micro_batch:
            raise SystemExit(f"--micro-batch {options.micro_batch} does not divide the {self.sequences} sequences of a step")
        self.train_ids = train_ids
        self.order = tokens.Order((len(train_ids) - 1) // self.seq, config["run"]["seed"])
        self.valid = tokens.validation_set(valid_ids, self.seq, config["validation"].get("max_tokens", len(valid_ids)))

    def loss(self, inputs, targets):
        """Mean loss in nats of [B, T] sequences."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.precision == "bf16"):
            logits = self.forward(input_ids=torch.from_numpy(inputs)).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), torch.from_numpy(targets).flatten())

    def step(self, number, lr):
        """Optimiser step `number` (from 1). Returns its loss and gradient norm."""
        inputs, targets = tokens.training_batch(self.train_ids, self.order, self.seq, (number - 1) * self.sequences, self.sequences)
        total, size = 0.0, self.options.micro_batch
        for start in range(0, self.sequences, size):
            loss = self.loss(inputs[start : start + size], targets[start : start + size]) * (size / self.sequences)
            loss.backward()
            total += loss.item()
        clip = self.config["optimizer"]["clip"]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip or float("inf")).item()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def validate(self):
        """Mean loss over the validation set, forward only."""
        inputs, targets = self.valid
        size, total = self.options.micro_batch, 0.0
        with torch.no_grad():
            for start in range(0, len(inputs), size):
                part = slice(start, start + size)
                total += self.loss(inputs[part], targets[part]).item() * len(inputs[part])
        return total / len(inputs)

    def warm_up(self):
        """Compiles forward and backward, and touches the memory, without changing a weight."""
        inputs, targets = tokens.training_batch(self.train_ids, self.order, self.seq, 0, self.options.micro_batch)
        self.loss(inputs, targets).backward()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.loss(inputs, targets)

    def run(self, rates, every, report):
        """Trains one step per learning rate. Returns {"training": [...], "validation": [...]} with the seconds that went
        into training steps so far; compilation and validation are not counted."""
        self.warm_up()
        training, validation, seconds = [], [], 0.0
        for number, lr in enumerate(rates, 1):
            start = time.perf_counter()
            loss, norm = self.step(number, lr)
            seconds += time.perf_counter() - start
            training.append({"step": number, "loss": loss, "grad_norm": norm, "seconds": seconds})
            report(training)
            if number % every == 0 or number == len(rates):
                validation.append({"step": number, "loss": self.validate(), "seconds": seconds})
        versions = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
        return {"training": training, "validation": validation, "versions": versions, "compiled": self.options.compile, "precision": self.options.precision}
