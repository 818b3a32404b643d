"""What gpu-check measured, as a page."""

# What is to be reached: of a preset's training the share of the GPU's products, in percent; how many times as fast as PyTorch
# it is; and of decoding the share of memory's speed, in percent.
TRAINING_BARS = {"125m": 45, "350m": 48, "1.3b": 56, "2.7b": 58, "6.7b": 60}
PYTORCH_BAR = 1.15
DECODING_BAR = 80
RESULTS = {True: "as it must be", False: "FAILED", None: "not measured"}


def share(part, whole):
    return f"{100 * part / whole:.1f} %" if part and whole else "-"


def gib(size):
    return f"{size / 2**30:.1f}" if size else "-"


def last(text):
    """Its last line, as a cell of a table."""
    lines = (text or "").strip().splitlines() or ["no reason given"]
    return lines[-1].strip().replace("|", "\\|")


def check_rows(checks):
    for check in checks:
        result, detail = RESULTS[check["well"]], check["detail"]
        between = ": " if check["well"] is None else "; "
        yield f"| {check['what']} | {result}{between + last(detail) if detail else ''} |"


def training_rows(rows):
    for row in rows:
        ours, theirs = row["ferropt"], row["pytorch"] or {}
        if ours is None:
            yield f"| {row['preset']} | failed: {last(row['error'])[:80]} | | | | | | | | |"
            continue
        speed, other = ours["tokens_per_second"], theirs.get("tokens_per_second")
        work, peak, bar = ours["flops_per_token"], ours["measured_peak_flops"], TRAINING_BARS.get(row["preset"])
        cells = [
            row["preset"],
            f"{speed:.0f}",
            share(work["model_causal"] * speed, peak),
            share(work["model"] * speed, peak),
            f"{bar} %" if bar else "-",
            f"{other:.0f}" if other else "-",
            f"{speed / other:.2f}" if other else "-",
            gib(ours["device_bytes"]),
            gib(ours["planned_bytes"]),
            gib(theirs.get("peak_bytes")),
        ]
        yield f"| {' | '.join(cells)} |"


def decoding_rows(rows):
    for row in rows:
        ours, graphs = row["ferropt"], "with" if row["graphs"] else "without"
        model = f"{row['preset']}, {row['weights']}"
        if ours is None:
            yield f"| {model} | {graphs} | failed: {last(row['error'])[:80]} | | | |"
            continue
        for line in ours["tests"]:
            most, part = line["most_tokens_per_second"], line["share"]
            most, part = ("unknown", "unknown") if part is None else (f"{most:.1f}", f"{100 * part:.1f} %")
            yield f"| {model} | {graphs} | {line['test']} | {line['tokens_per_second']:.1f} | {most} | {part} of {line['limit']} |"


def table(results):
    """The page."""
    lines = [f"# On {results['info']['device']}", "", f"Commit {results['commit']}; `scripts/gpu-check`.", "", "| check | |", "|---|---|"]
    lines += check_rows(results["checks"])
    measured = [row["ferropt"] for row in results["training"] if row["ferropt"]]
    if measured:
        lines += ["", f"Ceiling of products: {measured[0]['measured_peak_flops'] * 1e-12:.0f} TFLOP/s, measured."]
    decoded = [row["ferropt"] for row in results["decoding"] if row["ferropt"]]
    if decoded and decoded[0]["bandwidth"] is not None:
        lines += [f"Ceiling of memory: {decoded[0]['bandwidth'] * 1e-12:.2f} TB/s, measured by a copy, read and written."]
    if results["training"]:
        lines += [
            "",
            "Training, T = 2048, bf16. Shares are of the measured ceiling, with attention counted as its causal half and as all of it; the",
            f"bar is what they are to reach, beside {PYTORCH_BAR} times PyTorch's speed. Memory is what was taken of the GPU's, in GiB.",
            "",
            "| model | tokens/s | share, causal half | share, all | bar | PyTorch, tokens/s | times PyTorch | memory | planned | PyTorch's |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += training_rows(results["training"])
    if results["decoding"]:
        lines += [
            "",
            "Decoding. At most: what the ceiling of memory allows where each token needs the weights, which a batch shares, and the keys",
            f"and values of its text, or the ceiling of products. The bar is {DECODING_BAR} % of bandwidth.",
            "",
            "| model | CUDA graphs | what | tokens/s | at most | share |",
            "|---|---|---|---|---|---|",
        ]
        lines += decoding_rows(results["decoding"])
    return "\n".join(lines) + "\n"
