"""Writes what scripts/bench-train measured as JSON and as a page."""

import datetime
import json
import platform

# What the project promises (against the fastest PyTorch of each kind): ratio of tokens/s, and of peak memory.
BARS = {"bf16": {"compiled": 1.35, "eager": 1.55}, "f32": {"compiled": 1.15, "eager": 1.15}}
MEMORY_BAR = 0.6
PEAK_BAR = 0.80

# Options of the command that name places on one machine and say nothing about the measurement.
PLACES = ("--pytorch", "--ferropt", "--out")


def spoken_command(arguments):
    """The command line without options that name places."""
    words, skip = ["scripts/bench-train"], False
    for word in arguments:
        if skip:
            skip = False
        elif word in PLACES:
            skip = True
        elif not word.startswith(tuple(p + "=" for p in PLACES)):
            words.append(word)
    return " ".join(words)


def flops_per_token(facts):
    """Model FLOPs (Chowdhery and others, 2022, less the masked half of attention): 6 per matrix weight, 6*L*C*T for
    causal attention; embedding look-ups are free, the tied head counts once."""
    s = facts["sizes"]
    weights = s["layers"] * (4 * s["width"] ** 2 + 2 * s["width"] * s["ffn"]) + s["vocab"] * s["width"]
    return 6 * weights + 6 * s["layers"] * s["width"] * facts["seq"]


def processor():
    with open("/proc/cpuinfo") as info:
        return next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())


def write(folder, results, facts, command):
    """Writes both files and returns their paths. A precision that was not measured now keeps its earlier measurement."""
    facts = facts | {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "flops_per_token": flops_per_token(facts),
    }
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "train-cpu.json", folder / "train-cpu.md"
    kept = json.loads(data.read_text()) if data.exists() else {}
    kept |= {precision: {"facts": facts, "results": group} for precision, group in results.items()}
    kept = dict(sorted(kept.items()))
    data.write_text(json.dumps(kept, indent=1) + "\n")
    page.write_text("\n".join(lines(kept)) + "\n")
    return data, page


def lines(kept):
    """The page."""
    facts = next(iter(kept.values()))["facts"]
    tokens = facts["seq"] * facts["sequences"]
    yield "# Training speed on the CPU, beside PyTorch"
    yield ""
    yield f"OPT-{facts['preset'].upper()}, T = {facts['seq']}, {facts['sequences']} sequences ({tokens} tokens) per optimiser step, {facts['threads']} threads: forward,"
    yield "backward, clipping, AdamW; no dropout, nothing recomputed. All competitors of a precision took turns in one run"
    yield "(A B C A B C ...). Medians of the steps in which other processes used less than 8 % of a core."
    yield ""
    yield "PyTorch with SDPA attention and fused AdamW; bf16 is autocast over f32 weights; mbN: N sequences per forward and backward pass."
    for precision, measured in kept.items():
        yield from precision_lines(measured["facts"], precision, measured["results"])
    yield ""
    yield "Memory is the highest resident set: of ferropt over the whole process, of PyTorch after its warm-up, compilation left out."
    yield f"Model FLOPs: {facts['flops_per_token'] / 1e9:.3f} GFLOP per token (6 per weight in matrices with the head counted once, and causal attention)."


def precision_lines(facts, precision, group):
    """Table, ratios and the step's parts of one precision."""
    tokens = facts["seq"] * facts["sequences"]
    torch = next((r for r in group if "torch" in r), None)
    beside = f"; PyTorch {torch['torch']}, transformers {torch['transformers']}" if torch else ""
    ours = next((r for r in group if r["name"] == "ferropt"), None)
    peak = ours.get("measured_peak_flops") if ours else None
    yield from ("", f"## {precision}", "")
    yield f"Measured {facts['date']} with `{facts['command']}` at commit {facts['commit']} on {facts['processor']}{beside}."
    yield ""
    yield "| | tokens/s | best | GFLOP/s | share of peak | peak memory, GB | steps |"
    yield "|---|---|---|---|---|---|---|"
    for r in group:
        rate = facts["flops_per_token"] * tokens / r["step_s_median"]
        yield (
            f"| {label(r)} | {tokens / r['step_s_median']:.0f} | {tokens / r['step_s_min']:.0f} | {rate / 1e9:.0f} | "
            f"{f'{rate / peak:.0%}' if peak else '-'} | {r['peak_rss_bytes'] / 1e9:.2f} | {r['steps']}{' (disturbed)' if r['disturbed'] else ''} |"
        )
    if peak:
        bar = f"; the bar is {PEAK_BAR:.0%} of it over the whole step" if precision == "bf16" else ""
        yield from ("", f"Measured peak of the multiply instruction, registers only: {peak / 1e9:.0f} GFLOP/s{bar}.")
    if ours:
        yield from ratio_lines(precision, ours, [r for r in group if r is not ours])
        yield from part_lines(ours)


def label(result):
    """`compiled-mb4` as people say it."""
    if result["name"] == "ferropt":
        return "**ferropt**"
    kind, micro_batch = result["name"].split("-")
    return f"PyTorch {kind}, {micro_batch}"


def ratio_lines(precision, ours, others):
    """Ferropt against the fastest, and the most frugal, PyTorch of each kind."""
    kinds = {kind: [r for r in others if r["name"].startswith(kind)] for kind in ("compiled", "eager")}
    kinds = {kind: group for kind, group in kinds.items() if group}
    if not kinds:
        return
    yield from ("", "| against | speed | bar | memory of ferropt, as a share | bar |", "|---|---|---|---|---|")
    for kind, group in kinds.items():
        fastest = min(group, key=lambda r: r["step_s_median"])
        yield (
            f"| {label(fastest)} | {fastest['step_s_median'] / ours['step_s_median']:.2f}x | {BARS[precision][kind]}x | "
            f"{ours['peak_rss_bytes'] / fastest['peak_rss_bytes']:.2f} | {MEMORY_BAR} |"
        )


def part_lines(ours):
    """Where ferropt's step went."""
    total = sum(ours["parts"].values())
    yield from ("", "Where a step of ferropt's goes that has its operations timed:", "", "| part | s | share |", "|---|---|---|")
    named = sorted(ours["parts"].items(), key=lambda part: -part[1])
    for name, seconds in named:
        yield f"| {name} | {seconds:.3f} | {seconds / total:.1%} |"
