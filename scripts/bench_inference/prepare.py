"""Models for scripts/bench-inference: random weights of an exact OPT shape, in the form that each engine reads.

  PYTHON scripts/bench_inference/prepare.py FOLDER SIZE FORM...

makes FOLDER/SIZE/FORM for each FORM, of hf (half precision; the others are made of it), ov-f16, ov-int8, ov-int4 (needs
optimum-intel), ct2-f32, ct2-int8 (ctranslate2 and transformers) and onnx-f32 (optimum-onnx).
"""

import json
import subprocess
import sys
from pathlib import Path

# Layers, heads, width.
SHAPES = {"125m": (12, 12, 768), "1.3b": (24, 32, 2048)}
VOCAB = 50272


def hugging_face(size, out):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    layers, heads, width = SHAPES[size]
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * width, word_embed_proj_dim=width,
        max_position_embeddings=2048, activation_function="relu", dropout=0.0, init_std=0.02, bos_token_id=2, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    OPTForCausalLM(config).half().save_pretrained(out)
    # Ids are measured with, not text; but engines want a tokenizer of the model's size.
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"word{i}" for i in range(VOCAB - len(words))]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>").save_pretrained(out)


def make(folder, size, form):
    out, hf = folder / size / form, folder / size / "hf"
    if out.is_dir():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    scripts = Path(sys.executable).parent
    engine, _, weights = form.partition("-")
    if form == "hf":
        hugging_face(size, out)
    elif engine == "ov":
        weights = {"f16": "fp16"}.get(weights, weights)
        subprocess.run([scripts / "optimum-cli", "export", "openvino", "-m", hf, "--task", "text-generation-with-past", "--weight-format", weights, out], check=True)
    elif engine == "ct2":
        quantisation = {"f32": "float32", "int8": "int8"}[weights]
        subprocess.run([scripts / "ct2-transformers-converter", "--model", hf, "--output_dir", out, "--quantization", quantisation], check=True)
        # Words of the same text would be looked up wrongly.
        assert len(set(json.loads((out / "vocabulary.json").read_text()))) == VOCAB
    elif form == "onnx-f32":
        subprocess.run([scripts / "optimum-cli", "export", "onnx", "-m", hf, "--task", "text-generation-with-past", "--dtype", "fp32", out], check=True)
    else:
        raise SystemExit(f"{form} is no form; see the head of {__file__}")


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[2] not in SHAPES:
        raise SystemExit(__doc__)
    for form in sys.argv[3:]:
        make(Path(sys.argv[1]), sys.argv[2], form)
