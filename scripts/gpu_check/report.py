"""What gpu-check measured, as a page."""


def share(part, whole):
    return f"{100 * part / whole:.1f} %" if part and whole else "-"


def gib(size):
    return f"{size / 2**30:.1f}" if size else "-"


def last(text):
    """Its last line, as a cell of a table."""
    lines = (text or "").strip().splitlines() or ["no reason given"]
    return lines[-1].strip().replace("|", "\\|")


def training_rows(rows):
    for row in rows:
        ours, theirs = row["ferropt"], row["pytorch"] or {}
        if ours is None:
            yield f"| {row['preset']} | failed: {last(row['error'])[:80]} | | | | | |"
            continue
        speed, other = ours["tokens_per_second"], theirs.get("tokens_per_second")
        work, peak = ours["flops_per_token"], ours["measured_peak_flops"]
        yield (
            f"| {row['preset']} | {speed:.0f} | {share(work['model_causal'] * speed, peak)} | "
            f"{share(work['model'] * speed, peak)} | {gib(ours['planned_bytes'])} | "
            f"{f'{other:.0f}' if other else '-'} | {f'{speed / other:.2f}' if other else '-'} |"
        )


def decoding_rows(rows):
    for row in rows:
        ours, graphs = row["ferropt"], "with" if row["graphs"] else "without"
        if ours is None:
            yield f"| {row['preset']}, {row['weights']} | {graphs} | failed: {last(row['error'])[:80]} | | |"
            continue
        for line in ours["tests"]:
            part = "unknown" if line["share"] is None else f"{100 * line['share']:.1f} %"
            yield (
                f"| {row['preset']}, {row['weights']} | {graphs} | {line['test']} | {line['tokens_per_second']:.0f} | "
                f"{part} of {line['limit']} |"
            )


def table(results):
    """The page."""
    lines = [f"# On {results['info']['device']}", "", f"Commit {results['commit']}; `scripts/gpu-check`.", "", "| check | |", "|---|---|"]
    lines += [f"| {c['what']} | {'as it must be' if c['well'] else 'FAILED'}{'; ' + last(c['detail']) if c['detail'] else ''} |" for c in results["checks"]]
    measured = [row["ferropt"] for row in results["training"] if row["ferropt"]]
    if measured:
        lines += ["", f"Ceiling of products: {measured[0]['measured_peak_flops'] * 1e-12:.0f} TFLOP/s, measured."]
    decoded = [row["ferropt"] for row in results["decoding"] if row["ferropt"]]
    if decoded and decoded[0]["bandwidth"] is not None:
        lines += [f"Ceiling of memory: {decoded[0]['bandwidth'] * 1e-12:.2f} TB/s, measured by a copy, read and written."]
    if results["training"]:
        lines += ["", "Training, T = 2048, bf16. Shares are of the measured ceiling, with attention counted as its causal half and as all of it.", ""]
        lines += ["| model | tokens/s | share, causal half | share, all | memory planned, GiB | PyTorch, tokens/s | times PyTorch |", "|---|---|---|---|---|---|---|"]
        lines += training_rows(results["training"])
    if results["decoding"]:
        lines += ["", "Decoding. Shares are of what limits each test.", "", "| model | CUDA graphs | what | tokens/s | share |", "|---|---|---|---|---|"]
        lines += decoding_rows(results["decoding"])
    return "\n".join(lines) + "\n"
