"""The models whose decoding gpu-check measures, and the memory that they need."""

# Bits of a weight, with what its group of 64 has.
BITS = {"f32": 32, "bf16": 16, "int8": 8.25, "int4": 4.5, "int3": 3.5}
# Tokens of a long prompt and to generate, texts together, texts to score. Short for models that leave little room for a cache.
FULL = {"prompt": 1024, "tokens": 128, "batch": [1, 8, 32], "score": 8}
SHORT = {"prompt": 512, "tokens": 64, "batch": [1], "score": 0}
# Random weights, made on the GPU: 66b in 4 bits is for one of 80 GB, 175b for one of 141 GB, and in 3 bits for one of 80 GB.
MODELS = [
    ("125m", "bf16", FULL),
    ("1.3b", "bf16", FULL),
    ("1.3b", "int8", FULL),
    ("1.3b", "int4", FULL),
    ("6.7b", "int4", FULL),
    ("6.7b", "int3", FULL),
    ("66b", "int4", FULL),
    ("175b", "int4", SHORT),
    ("175b", "int3", SHORT),
]
# Tokens of a page of the cache, of a short prompt, and of a text that is scored; positions that are f32 in any format.
PAGE, SHORT_PROMPT, SCORED, POSITIONS = 64, 32, 512, 2050
# Activations of a step, workspace, and what the driver and its libraries take.
BESIDE = 1.5e9


def options(test):
    """As `ferropt bench inference` takes them."""
    return [word for key, value in test.items() for word in (f"--{key}", ",".join(map(str, value)) if key == "batch" else str(value))]


def needs(sizes, weights, test):
    """Bytes of the GPU's memory, from an entry of `ferropt presets --json`."""

    def pages(texts, tokens):
        # A page more for each text.
        return texts * (-(-tokens // PAGE) + 1) * PAGE

    texts = [(max(test["batch"]), SHORT_PROMPT + test["tokens"]), (1, test["prompt"] + 1), (test["score"], SCORED)]
    of_token = 2 * sizes["layers"] * sizes["width"] * (4 if weights == "f32" else 2)
    cache = max(pages(*each) for each in texts) * of_token
    return sizes["parameters"] * BITS[weights] / 8 + 4 * POSITIONS * sizes["width"] + cache + BESIDE


def speed(line):
    """Tokens per second of a test, beside what its limit allows."""
    most = line["most_tokens_per_second"]
    return f"{line['tokens_per_second']:.1f} tokens/s" + (f" of {most:.1f} at most" if most else "")
