"""What was measured, kept as JSON and shown as a page."""

import json
import statistics

SPEEDS = ["decode", "batch of 8", "batch of 32", "prompt of 1024", "score"]
NAMES = {"openvino": "OpenVINO GenAI", "ctranslate2": "CTranslate2", "onnxruntime": "onnxruntime", "hugging-face": "Hugging Face", "vllm": "vLLM"}


def processor():
    """Name and clock as the system has them, and what decides which kernels run."""
    with open("/proc/cpuinfo") as info:
        fields = dict(line.split(":", 1) for line in info.read().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    has = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', 'an unknown processor')}, family {fields.get('cpu family')} model {fields.get('model')} stepping {fields.get('stepping')} ({', '.join(has)})"


class Results:
    """All pairs so far."""

    def __init__(self, folder):
        self.json, self.page = folder / "inference-cpu.json", folder / "inference-cpu.md"
        folder.mkdir(parents=True, exist_ok=True)
        kept = json.loads(self.json.read_text()) if self.json.exists() else {}
        self.pairs = kept.get("pairs", [])

    def add(self, pair):
        key = lambda pair: (pair["model"], pair["weights"], pair["peer"])
        self.pairs = sorted([old for old in self.pairs if key(old) != key(pair)] + [pair], key=order)
        self.json.write_text(json.dumps({"pairs": self.pairs}, indent=1) + "\n")
        self.page.write_text(page(self.pairs))


def order(pair):
    return (["125m", "1.3b"].index(pair["model"]), ["f32", "bf16", "int8", "int4"].index(pair["weights"]), list(NAMES).index(pair["peer"]))


def table(pairs):
    """One model and precision: a line for each test, ferropt and every peer beside it."""
    ours = lambda key: statistics.median(pair["ferropt"][key] for pair in pairs)
    heads = ["ferropt", "of the limit"]
    for pair in pairs:
        stored = "" if pair["peer_weights"] == pair["weights"] else f" ({pair['peer_weights']})"
        heads.append(f"{NAMES[pair['peer']]}{stored}")
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for test in SPEEDS:
        share = statistics.median(pair["ferropt"]["shares"][test][0] for pair in pairs)
        limit = pairs[0]["ferropt"]["shares"][test][1]
        beside = [f"{pair['other'][test]:.1f} ({pair['ferropt'][test] / pair['other'][test]:.2f}x)" for pair in pairs]
        lines.append(f"| {test}, tokens/s | " + " | ".join([f"{ours(test):.1f}", f"{share:.0%} of {limit}", *beside]) + " |")
    beside = [f"{pair['other']['load']:.2f}" for pair in pairs]
    opening = lambda key: statistics.median(pair["ferropt"]["opening"][key] for pair in pairs)
    lines.append("| load, s | " + " | ".join([f"{ours('load'):.2f}", f"again {opening('again'):.2f}", *beside]) + " |")
    beside = [f"{pair['other']['memory'] * 1e-9:.2f}" for pair in pairs]
    lines.append("| peak memory, GB | " + " | ".join([f"{ours('memory') * 1e-9:.2f}", "", *beside]) + " |")
    return lines


def page(pairs):
    machines = sorted({(pair["processor"], pair["threads"]) for pair in pairs})
    bandwidth = statistics.median(pair["ferropt"]["bandwidth"] for pair in pairs)
    # f32 is multiplied as f32, everything else as bf16 where the processor has that.
    peaks = [[pair["ferropt"]["peak"] for pair in pairs if (pair["weights"] == "f32") == plain] for plain in (True, False)]
    peaks = [f"{statistics.median(peak) * 1e-9:.0f} GFLOP/s {what}" for peak, what in zip(peaks, ("in f32", "for other weights")) if peak]
    versions = {pair["peer"]: pair["other"]["version"] for pair in pairs}
    lines = [
        "# Inference beside other engines",
        "",
        "Exact OPT shapes with random weights, opened from a half-precision Hugging Face folder; measured with",
        "`scripts/bench-inference`, whose head says what each test is. ferropt and an engine take turns, and the ratio behind an",
        "engine's figure is ferropt's speed in the same turns divided by it. Engines: "
        + "; ".join(f"{NAMES[peer]} {versions[peer]}" for peer in NAMES if peer in versions) + ".",
        "",
        *[f"On {name}; {threads} threads, {min(p['date'] for p in pairs)} to {max(p['date'] for p in pairs)}." for name, threads in machines],
        f"Measured there: memory is read at {bandwidth * 1e-9:.0f} GB/s, multiply-adds reach {' and '.join(peaks)}; shares are of these as each turn",
        "measured them. The arithmetic of 8-bit products is another, so that their share of it may exceed 1.",
        "",
        "OpenVINO computes in bf16 where the processor has that, otherwise in f32. ferropt's int8 and int4 products round",
        "activations to 8 bits as well, a group of 64 at a time. Load is without a cache; `again` with the one that ferropt keeps.",
        "Memory is what was resident at most, weights, keys and values of 32 texts included.",
    ]  # fmt: skip
    for model, weights in dict.fromkeys((pair["model"], pair["weights"]) for pair in pairs):
        here = [pair for pair in pairs if (pair["model"], pair["weights"]) == (model, weights)]
        tokens = sorted({pair["tokens"] for pair in here})
        lines += ["", f"## OPT-{model.upper()}, {weights}", ""]
        if tokens != [128]:
            lines += [f"With {' or '.join(map(str, tokens))} new tokens in place of 128.", ""]
        lines += table(here)
    return "\n".join(lines) + "\n"
