"""The PNG pictures of comparisons: two models on the same tokens, two free runs of one prompt."""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from analysis.drawing import drawable, legend_above, step_axis, step_width
from tracking.plotter import BLACK, BLUE, GREEN, STYLE, VERMILLION, save


@rc_context(STYLE)
def draw_forced_comparison(columns: dict, most_shifted: list[dict], names: list[str], side: str, file: Path) -> None:
    """Two models, a and b, on the same tokens. columns, most_shifted: from comparison.compare_forced; names: of the two
    models; side: the model that sampled the text, "a" or "b"."""
    width = step_width(len(columns["token"]))
    figure = Figure(figsize=(width + 4, 6.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[width, 4])
    upper, lower = left.subplots(2, 1)
    _change_panel(columns, side, upper)
    _divergence_panel(columns, lower)
    _shift_panel(most_shifted, right.subplots())
    figure.suptitle(f"a: {names[0]}    b: {names[1]}", fontsize=9, color="#555555", parse_math=False)
    save({file.name: figure}, file.parent)


def _change_panel(columns: dict, side: str, axes) -> None:
    change = columns["change"]
    axes.bar(range(len(change)), change, color=np.where(change < 0, VERMILLION, BLUE), width=0.8)
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.set(title=f"Change of the log-prob of the text of {side}", ylabel="ln p_b - ln p_a (nats)")
    step_axis(axes, columns["token"])


def _divergence_panel(columns: dict, axes) -> None:
    steps = np.arange(len(columns["token"]))
    axes.plot(steps, columns["kl_ab"], color=BLUE, linewidth=1.4, label="KL(a || b)")
    axes.plot(steps, columns["kl_ba"], color=GREEN, linewidth=1.4, linestyle="--", label="KL(b || a)")
    axes.plot(steps, columns["jsd"], color=BLACK, linewidth=1.4, linestyle=":", label="JSD")
    flips = steps[columns["flips"]]
    axes.plot(flips, np.zeros(len(flips)), "x", color=VERMILLION, label="argmax flips", clip_on=False)
    axes.set(title="Distance of the distributions", ylabel="nats")
    axes.set_ylim(bottom=0)
    step_axis(axes, columns["token"])
    legend_above(axes)


def _shift_panel(most_shifted: list[dict], axes) -> None:
    entries = sorted(most_shifted, key=lambda entry: -entry["shift"])
    shifts = np.array([entry["shift"] for entry in entries])
    axes.barh(range(len(shifts)), shifts, color=np.where(shifts < 0, VERMILLION, BLUE), height=0.75)
    axes.set_yticks(range(len(shifts)), [drawable(entry["token"]) for entry in entries], parse_math=False)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(title="Tokens that gained and lost most", xlabel="sum over steps of p_b - p_a")


@rc_context(STYLE)
def draw_free_comparison(a, b, shared: int, file: Path) -> None:
    """Two traces of one prompt, `shared` leading tokens in common: entropy by step, and the distribution of measures
    over the steps after the common prefix; the weights of soft steps, if there are any."""
    soft = a["is_soft"].any() or b["is_soft"].any()
    figure = Figure(figsize=(12, 9.6 if soft else 7), layout="constrained")
    rows = figure.subfigures(3 if soft else 2, 1)
    lines = (("a", a, BLUE, "-"), ("b", b, VERMILLION, "--"))  # name, trace, colour and style of each
    _free_entropy_panel(lines, shared, rows[0].subplots())
    _distribution_panels(lines, shared, rows[1])
    if soft:
        axes = rows[2].subplots()
        for _, trace, color, style in lines:
            axes.plot(1 - trace["top_weight"], style, color=color, linewidth=1.4)
        axes.set(title="Soft thinking: 1 - weight of the heaviest token", xlabel="step", ylabel="weight of the others")
        axes.set(xlim=(-0.6, max(len(a), len(b)) - 0.4), ylim=(-0.02, 1))
    figure.suptitle(f"a: {a.meta['model']}    b: {b.meta['model']}", fontsize=9, color="#555555", parse_math=False)
    save({file.name: figure}, file.parent)


def _free_entropy_panel(lines, shared: int, axes) -> None:
    for name, trace, color, style in lines:
        axes.plot(trace["entropy"], style, color=color, linewidth=1.4, label=f"{name}, {len(trace)} tokens")
    axes.axvspan(-0.6, shared - 0.5, color="#eeeeee", linewidth=0, zorder=0)
    a, b = (trace for _, trace, _, _ in lines)
    title = f"Entropy along the two free runs; common prefix {shared}"
    if shared < min(len(a), len(b)):
        title += f', then "{drawable(a.labels[shared])}" or "{drawable(b.labels[shared])}"'
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="step", ylabel="nats", xlim=(-0.6, max(len(a), len(b)) - 0.4))
    axes.set_ylim(0, 1.15 * max(a["entropy"].max(), b["entropy"].max(), 0.1))
    legend_above(axes)


def _distribution_panels(lines, shared: int, figure) -> None:
    """Cumulative distributions over the steps after the common prefix; of two equal runs, over all steps."""
    measures = (
        ("entropy", "Entropy", "nats"),
        ("logp", "Surprisal of the chosen token", "nats"),
        ("n95", "Nucleus: tokens that hold 95 %", "n95"),
    )
    first = shared if shared < max(len(trace) for _, trace, _, _ in lines) else 0
    for panel, (key, title, unit) in zip(figure.subplots(1, 3), measures, strict=True):
        for _, trace, color, style in lines:
            values = np.sort(np.abs(trace[key][first:].astype(float)))
            if len(values):
                panel.step(values, np.arange(1, len(values) + 1) / len(values), style, where="post", color=color)
        panel.set(title=title, xlabel=unit, ylim=(0, 1.03))
    figure.supylabel("share of steps at or below", fontsize=9.5)
    steps = f"after the first difference, at step {first}" if first else "of the whole runs"
    figure.suptitle(f"Distributions {steps}", fontsize=9.5, color="#555555")
