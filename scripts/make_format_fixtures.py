#!/usr/bin/env python3
"""Tiny checkpoints in the formats that OPT is found in, for the tests of `ferropt_model::formats`.

Two models: `pre` (as all OPT but 350m) and `post` (as 350m: norms behind the sums, embeddings of another width with two
projections, no final norm). Their weights are written by transformers and torch, and laid out as metaseq does by the
functions below, which follow metaseq's own scripts (reshard_mp, reshard_fsdp) and share nothing with Ferropt:

  folder                what
  MODEL/hf              Hugging Face: safetensors, f32 (pre) or bf16 (post), by save_pretrained
  MODEL/sharded         the same in several files with an index
  MODEL/bin             the same as pytorch_model.bin, lm_head.weight included, names without `model.` in the case of post
  MODEL/singleton       metaseq's restored.pt: q, k, v apart; that of post has an output_projection with the rows of one part
                        only, which is what reshard_mp leaves
  MODEL/mp2, MODEL/mp4  tensor-parallel parts: matrices cut by rows or columns, qkv_proj in K, V, Q order in each part
  MODEL/fsdp            two tensor-parallel parts, each flattened and cut into three shards with padding
  MODEL-own-head/hf     the same sizes in f32 and an LM head that is not the embedding table (tie_word_embeddings is false), by
                        save_pretrained; recorded.safetensors has tokens, I32 [B, T], and their logits, F32 [B, T, V]

`cfg` is a dictionary with an argparse.Namespace, as in metaseq. Run it with any Python that has torch, transformers and
safetensors (scripts/setup-pytorch DIR makes one):

  DIR/bin/python scripts/make_format_fixtures.py
"""

import argparse
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

MODELS = {
    "pre": dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=4, ffn_dim=12, vocab_size=24,
                max_position_embeddings=5, do_layer_norm_before=True, word_embed_proj_dim=8, dtype=torch.float32),
    "post": dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=12, vocab_size=24,
                 max_position_embeddings=6, do_layer_norm_before=False, word_embed_proj_dim=4, dtype=torch.bfloat16),
}  # fmt: skip


def build(name, **changed):
    """A model whose every value is its own, and none is what an initialiser would give."""
    sizes = MODELS[name] | changed
    dtype = sizes.pop("dtype")
    model = OPTForCausalLM(OPTConfig(dropout=0.1, attention_dropout=0.0, **sizes)).to(dtype)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.tie_weights()
    return model.eval()


def metaseq_state(model):
    """The singleton: metaseq's names, q, k and v apart."""
    state = {}
    for name, tensor in model.model.state_dict().items():
        name = name.replace("decoder.project_in.", "decoder.project_in_dim.").replace("decoder.project_out.", "decoder.project_out_dim.")
        if name.startswith("decoder.final_layer_norm."):
            name = name.replace("final_layer_norm", "layer_norm")
        state[name] = tensor.clone()
    state["decoder.version"] = torch.tensor([3.0])
    return state


def fuse(state):
    """q, k and v of each layer as one tensor, in K, V, Q order."""
    fused = {}
    for name, tensor in state.items():
        if ".k_proj." in name:
            kvq = [state[name.replace(".k_proj.", f".{x}_proj.")] for x in "kvq"]
            fused[name.replace(".k_proj.", ".qkv_proj.")] = torch.cat(kvq)
        elif ".q_proj." not in name and ".v_proj." not in name:
            fused[name] = tensor
    return fused


def part_of(fused, part, parts):
    """What one tensor-parallel rank holds."""
    out = {}
    for name, tensor in fused.items():
        if "qkv_proj" in name:
            out[name] = torch.cat([third.chunk(parts)[part] for third in tensor.chunk(3)])
        elif "embed_tokens" in name or ".fc1." in name:
            out[name] = tensor.chunk(parts)[part].clone()
        elif name.endswith((".fc2.weight", ".out_proj.weight")):
            out[name] = tensor.chunk(parts, dim=1)[part].clone()
        else:
            out[name] = tensor.clone()
    out["decoder.output_projection.weight"] = out["decoder.embed_tokens.weight"]
    return out


def flatten(part, shards):
    """A part as FSDP leaves it: per layer, and for the rest, one vector; padded and cut into equal shards."""
    modules = {}
    for name, tensor in part.items():
        if name in ("decoder.version", "decoder.output_projection.weight"):
            continue
        path = ".".join(name.split(".")[:3]) if name.startswith("decoder.layers.") else ""
        modules.setdefault(path, []).append((name[len(path) + 1 :] if path else name, tensor))
    states = [{} for _ in range(shards)]
    metadata = [{"param_metadata": [], "buffer_names": ["decoder.version"]} for _ in range(shards)]
    for path, tensors in modules.items():
        flat = torch.cat([tensor.flatten() for _, tensor in tensors])
        chunks = list(flat.chunk(shards))
        chunks += [flat.new_empty(0)] * (shards - len(chunks))
        for shard, chunk in enumerate(chunks):
            padding = chunks[0].numel() - chunk.numel()
            states[shard][f"{path}.flat_param_0" if path else "flat_param_0"] = torch.nn.functional.pad(chunk, [0, padding])
            params = {
                "names": [name for name, _ in tensors],
                "shapes": [tensor.shape for _, tensor in tensors],
                "numels": [tensor.numel() for _, tensor in tensors],
                "padding": padding,
            }
            metadata[shard]["param_metadata"].append({"fsdp_path": path, "params": {"flat_param_0": params}})
    for state in states:
        state["decoder.version"] = part["decoder.version"]
    return list(zip(states, metadata))


def cfg(model, parts):
    c = model.config
    namespace = argparse.Namespace(
        _name="transformer_lm_megatron", decoder_layers=c.num_hidden_layers, decoder_attention_heads=c.num_attention_heads,
        decoder_embed_dim=c.hidden_size, decoder_ffn_embed_dim=c.ffn_dim, dropout=c.dropout,
        attention_dropout=c.attention_dropout, activation_fn="relu", share_decoder_input_output_embed=True,
        decoder_learned_pos=True, no_scale_embedding=True, model_parallel_size=parts,
    )  # fmt: skip
    return {"model": namespace, "common": {"seed": 1, "fp16": True}}


def save(path, model, parts, state, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = {"extra_state": {"metrics": None, "previous_training_time": 1.5}, "criterion": None, "task_state": {}}
    torch.save({"cfg": cfg(model, parts), "model": state, **extra, **more}, path)


def write(name, out):
    model = build(name)
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder / "hf")
    if name == "pre":
        model.save_pretrained(folder / "sharded", max_shard_size="5kB")
    state = {k if name == "pre" else k.removeprefix("model."): v for k, v in model.state_dict().items()}
    (folder / "bin").mkdir()
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    model.config.to_json_file(folder / "bin" / "config.json")
    singleton = metaseq_state(model)
    embedding = singleton["decoder.embed_tokens.weight"]
    stale = {"decoder.output_projection.weight": embedding.chunk(2)[0].clone()} if name == "post" else {}
    save(folder / "singleton" / "restored.pt", model, 1, singleton | stale)
    fused = fuse(singleton)
    for parts in [2, 4] if name == "pre" else [2]:
        for part in range(parts):
            save(folder / f"mp{parts}" / f"reshard-model_part-{part}.pt", model, parts, part_of(fused, part, parts))
    for part in range(2):
        for shard, (state, metadata) in enumerate(flatten(part_of(fused, part, 2), 3)):
            save(folder / "fsdp" / f"checkpoint_last-model_part-{part}-shard{shard}.pt", model, 2, state, shard_metadata=metadata)
    write_own_head(name, out / f"{name}-own-head")
    for extra in out.rglob("generation_config.json"):
        extra.unlink()


def write_own_head(name, folder):
    model = build(name, dtype=torch.float32, tie_word_embeddings=False)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder / "hf")
    tokens = torch.tensor([[2, 5, 7, 11, 3], [2, 23, 4, 4, 19]])
    with torch.no_grad():
        recorded = {"tokens": tokens.to(torch.int32), "logits": model(tokens).logits.contiguous()}
    save_file(recorded, folder / "hf" / "recorded.safetensors")


def main():
    default = Path(__file__).resolve().parent.parent / "crates" / "model" / "tests" / "fixtures" / "formats"
    parser = argparse.ArgumentParser(description="Writes tiny checkpoints in every format; the head of this file describes them.")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="where to write (default: the committed fixtures)")
    out = parser.parse_args().out
    for name in MODELS:
        write(name, out)
    files = [f for f in out.rglob("*") if f.is_file()]
    print(f"{out}: {len(files)} files, {sum(f.stat().st_size for f in files) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
