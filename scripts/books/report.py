"""The comparison as a picture and a page."""

import datetime
from pathlib import Path

COLOURS = {"ferropt": "#c2410c", "PyTorch": "#2563eb"}
WIDTH, HEIGHT, GAP = 430, 330, 70


def smoothed(points, weight=0.9):
    """Exponential mean without the bias of its start."""
    total = mass = 0.0
    out = []
    for x, y in points:
        total, mass = weight * total + (1 - weight) * y, weight * mass + (1 - weight)
        out.append((x, total / mass))
    return out


def ticks(low, high, most=6):
    """Round numbers between low and high."""
    span = max(high - low, 1e-9)
    size = next(s * 10.0**e for e in range(-6, 9) for s in (1, 2, 5) if span / (s * 10.0**e) <= most)
    first = -(-low // size)
    return [first * size + i * size for i in range(int((high - first * size) / size + 1e-9) + 1)]


def panel(left, title, x_label, runs, x_of):
    """One diagram: faint training losses with their running means, and dots for validation."""
    training = {name: [(x_of(p), p["loss"]) for p in run["training"]] for name, run in runs.items()}
    validation = {name: [(x_of(p), p["loss"]) for p in run["validation"]] for name, run in runs.items()}
    everything = [p for series in (*training.values(), *validation.values()) for p in series]
    x_high = max(x for x, _ in everything)
    y_low, y_high = min(y for _, y in everything) - 0.1, max(y for _, y in everything) + 0.1
    place = lambda x, y: (left + WIDTH * x / x_high, 50 + HEIGHT * (y_high - y) / (y_high - y_low))
    path = lambda points: "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in (place(x, y) for x, y in points))
    out = [f'<text x="{left}" y="30" font-size="15" font-weight="600">{title}</text>']
    for y in ticks(y_low, y_high):
        at = place(0, y)[1]
        out.append(f'<path d="M{left} {at:.1f}h{WIDTH}" stroke="#e5e5e5"/><text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(0, x_high):
        out.append(f'<text x="{place(x, 0)[0]:.1f}" y="{HEIGHT + 70}" text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="{left + WIDTH / 2}" y="{HEIGHT + 92}" text-anchor="middle">{x_label}</text>')
    for name, colour in COLOURS.items():
        out.append(f'<path d="{path(training[name])}" fill="none" stroke="{colour}" stroke-opacity="0.2"/>')
        out.append(f'<path d="{path(smoothed(training[name]))}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        for x, y in validation[name]:
            px, py = place(x, y)
            out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.6" fill="{colour}" stroke="#fff"/>')
    for row, (name, colour) in enumerate(COLOURS.items()):
        at = 70 + 20 * row
        out.append(f'<path d="M{left + WIDTH - 200} {at}h24" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<circle cx="{left + WIDTH - 188}" cy="{at}" r="3.6" fill="{colour}" stroke="#fff"/>')
        out.append(f'<text x="{left + WIDTH - 168}" y="{at + 4}">{name} (dots: validation)</text>')
    return out


def picture(runs):
    """SVG of loss by step and loss by time."""
    width = 2 * WIDTH + 2 * GAP + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 110}" font-family="system-ui, sans-serif" font-size="12" fill="#333">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        *panel(GAP - 10, "Loss (nats per token) by step", "optimiser steps", runs, lambda p: p["step"]),
        *panel(2 * GAP + WIDTH - 10, "Loss by time", "minutes of training", runs, lambda p: p["seconds"] / 60),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def reached(run, seconds):
    """The last validation within so many seconds."""
    return [p for p in run["validation"] if p["seconds"] <= seconds * 1.0001][-1:]


def page(config, runs, facts):
    """Markdown with the figures."""
    ours, theirs = runs["ferropt"], runs["PyTorch"]
    model, end = config["model"], ours["training"][-1]
    gap = ours["validation"][-1]["loss"] - theirs["validation"][-1]["loss"]
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours["training"], theirs["training"]))
    minutes = {name: run["training"][-1]["seconds"] / 60 for name, run in runs.items()}
    batch = config["batch"]["tokens"]
    precision = "bf16 autocast" if theirs["precision"] == "bf16" else "f32"
    same = precision == "bf16 autocast" and config["run"]["precision"] == "bf16"
    yield "# A quarter of an hour on books, beside PyTorch"
    yield ""
    yield f"One configuration ([configs/{facts['config']}](../../configs/{facts['config']})) trained twice: by `ferropt train` in {config['run']['precision']}, and by {theirs['versions']}"
    yield f"({'compiled' if theirs['compiled'] else 'eager'}, {precision}, fused AdamW) from the same initial weights, on the same sequences in the same order, with the same"
    yield f"learning rates. {model['layers']} layers of {model['width']}, vocabulary {model['vocab']}, T = {config['data']['seq']}, {batch} tokens per step, {end['step']} steps, {config['run']['threads']} threads, no dropout."
    yield ""
    yield "![loss curves](books-compare.svg)"
    yield ""
    yield f"Measured {datetime.date.today().isoformat()} with `{facts['command']}` at commit {facts['commit']} on {facts['processor']}."
    yield ""
    yield "| | ferropt | PyTorch |"
    yield "|---|---|---|"
    yield f"| validation loss after {end['step']} steps, nats per token | {ours['validation'][-1]['loss']:.4f} | {theirs['validation'][-1]['loss']:.4f} |"
    yield f"| minutes for these steps | {minutes['ferropt']:.1f} | {minutes['PyTorch']:.1f} |"
    yield f"| tokens/s | {batch * end['step'] / minutes['ferropt'] / 60:.0f} | {batch * end['step'] / minutes['PyTorch'] / 60:.0f} |"
    at = reached(theirs, end["seconds"])
    if at:
        yield f"| last validation loss within {minutes['ferropt']:.1f} minutes | {ours['validation'][-1]['loss']:.4f} | {at[0]['loss']:.4f} (step {at[0]['step']}) |"
    yield ""
    yield f"Difference of the last validation losses (ferropt less PyTorch): {gap:+.4f}. The first training loss differs by {ours['training'][0]['loss'] - theirs['training'][0]['loss']:+.5f}, and no later one by more"
    why = "both compute in bf16, round differently" if same else "they round differently"
    yield f"than {worst:.3f}: {why}, and drift apart as any two such runs do."
    yield "Minutes are those of training steps alone; start, compilation, validation and checkpoints are left out on both sides."
    yield ""
    yield "| step | ferropt: validation | PyTorch: validation | difference |"
    yield "|---|---|---|---|"
    for a, b in zip(ours["validation"], theirs["validation"]):
        yield f"| {a['step']} | {a['loss']:.4f} | {b['loss']:.4f} | {a['loss'] - b['loss']:+.4f} |"


def write(folder, config, runs, facts):
    """Writes picture and page; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    svg, markdown = Path(folder) / "books-compare.svg", Path(folder) / "books-compare.md"
    svg.write_text(picture(runs))
    markdown.write_text("\n".join(page(config, runs, facts)) + "\n")
    return svg, markdown
