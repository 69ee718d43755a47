"""The PNG pictures of a trace, in the style of tracking/plotter.py.

They are made from the trace alone, without a model or a tokenizer. Each figure has a function, in the order of the
numbers in their docstrings.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from analysis.drawing import (
    FLOOR,
    add_text,
    color_bar,
    drawable,
    fixed_ticks,
    legend_above,
    log10_p,
    select_spaced,
    shade_parts,
    step_axis,
    step_width,
)
from tracking.plotter import BLACK, BLUE, GREEN, GREY, PURPLE, STYLE, VERMILLION, save, smooth

HEATMAP_STEPS, HEATMAP_RANKS = 40, 10  # rows and columns of a page of the heatmap


@rc_context(STYLE)
def draw_pictures(trace, folder: Path) -> list[Path]:
    """Writes all PNGs of a trace."""
    figures = {
        "entropy.png": entropy_figure(trace),
        "consistency.png": consistency_figure(trace),
        "landscape.png": landscape_figure(trace),
        "entropy_varentropy.png": scatter_figure(trace),
        "histograms.png": histogram_figure(trace),
    }
    for page, start in enumerate(range(0, len(trace), HEATMAP_STEPS), start=1):
        figures[f"topk_{page:02}.png"] = heatmap_figure(trace, start)
    return save(figures, folder)


def entropy_figure(trace) -> Figure:
    """1. Entropy by step, its rolling mean, the parts of the text, and the forks; the strongest forks are labelled."""
    entropy, steps = trace["entropy"], np.arange(len(trace))
    figure = Figure(figsize=(step_width(len(trace)), 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(steps, entropy, color="#b8c4d0", width=0.8, label="each step")
    axes.plot(steps, smooth(entropy[None], 9)[0], color=BLUE, linewidth=1.8, label="mean of 9 steps")
    if not np.array_equal(entropy, trace["entropy_t"]):
        temperature = trace.meta["temperature"]
        axes.plot(steps, trace["entropy_t"], ".", color=PURPLE, markersize=4, label=f"each, at T = {temperature:g}")
    forks = np.flatnonzero(trace.forks)
    axes.plot(forks, entropy[forks], "o", color=VERMILLION, markersize=4.5, label="fork: the highest fifth")
    top = max(entropy.max(), trace["entropy_t"].max(), 0.1)
    strongest = forks[np.argsort(-entropy[forks], kind="stable")].tolist()
    for t in select_spaced(steps, strongest, gap=1.1 / (step_width(len(trace)) - 1.6) * len(trace))[:14]:
        name = drawable(trace.labels[t])
        # A long label of one of the first steps, centred, would lie over the y axis.
        align = dict(ha="left", x=t - 0.4) if t < 3 and len(name) > 4 else dict(ha="center", x=t)
        add_text(axes, y=entropy[t] + 0.03 * top, text=name, color=VERMILLION, fontsize=8.5, **align)
    axes.set(title="Entropy of the next token", ylabel="entropy (nats)", ylim=(0, 1.22 * top))
    shade_parts(axes, trace.parts)
    step_axis(axes, trace.labels)
    bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel("bits")
    legend_above(axes)
    return figure


def heatmap_figure(trace, start: int) -> Figure:
    """2. A page of the top-k heatmap, from step `start`: rows are steps, columns are ranks.

    The chosen token is in the first column, with its rank if that is beyond the last column. Among the ranks it is
    outlined.
    """
    stop = min(start + HEATMAP_STEPS, len(trace))
    ranks = min(HEATMAP_RANKS, trace["topk_ids"].shape[1])
    logp = np.column_stack([trace["logp"], trace["topk_logp"][:, :ranks]])[start:stop]
    ids = np.column_stack([trace["token_ids"], trace["topk_ids"][:, :ranks]])[start:stop]
    figure = Figure(figsize=(11, 1.5 + 0.27 * len(ids)), layout="constrained")
    axes = figure.subplots()
    scale = Normalize(-6, 0)
    image = axes.imshow(log10_p(logp), cmap="viridis", norm=scale, aspect="auto", interpolation="nearest")
    for row, (step_ids, step_logp) in enumerate(zip(ids.tolist(), log10_p(logp).tolist(), strict=True)):
        for column, (token, value) in enumerate(zip(step_ids, step_logp, strict=True)):
            color = "black" if scale(value) > 0.6 else "white"
            rank = f" #{trace['rank'][start + row]}" if column == 0 and trace["rank"][start + row] > ranks else ""
            text = drawable(trace.label(token), 12 - len(rank)) + rank
            add_text(axes, column, row, text, ha="center", va="center", fontsize=7.5, color=color)
            if column and token == step_ids[0]:
                box = dict(fill=False, edgecolor=VERMILLION, linewidth=2.2)
                axes.add_patch(Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, **box))
    axes.axvline(0.5, color="white", linewidth=5)
    axes.set_xticks(range(ranks + 1), ["chosen", *range(1, ranks + 1)])
    axes.set_yticks(range(len(ids)), range(start, stop), fontsize=7.5)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(f"The likeliest tokens, steps {start} to {stop - 1} of {len(trace)} (outlined: chosen)", pad=24)
    axes.set(xlabel="rank", ylabel="step")
    axes.xaxis.set_label_position("top")
    color_bar(figure, image, axes, "log10 p (below -6: as -6)")
    return figure


def consistency_figure(trace) -> Figure:
    """3. Consistency of sampling, on three levels: of a step, of the path, of the answer."""
    resamples, forced = trace.meta["resamples"], trace.meta["forced_forks"]
    figure = Figure(figsize=(step_width(len(trace)), 8.6 if resamples else 6.2), layout="constrained")
    rows = figure.subfigures(3 if resamples else 2, 1, height_ratios=[1.1, 1.1, 1] if resamples else [1.2, 1])
    _local_panel(trace, rows[0].subplots())
    if resamples:
        axes = rows[1].subplots()
        axes.step(range(len(trace)), trace["path_share"], where="mid", color=BLUE, linewidth=1.8)
        title = f"Path: share of {len(resamples)} resampled answers that are the same up to this step"
        axes.set(title=title, ylabel="S(t)", ylim=(0, 1.12))
        shade_parts(axes, trace.parts)
        step_axis(axes, trace.labels)
    panels = [_temperature_panel] + [_answer_panel] * bool(resamples) + [_fork_panel] * bool(forced)
    for panel, axes in zip(panels, np.atleast_1d(rows[-1].subplots(1, len(panels))), strict=True):
        panel(trace, axes)
    return figure


def _local_panel(trace, axes) -> None:
    steps = np.arange(len(trace))
    agrees = trace["token_ids"] == trace["topk_ids"][:, 0]
    axes.plot(steps, trace["collision"], "o-", color=BLUE, linewidth=1, markersize=3, label="two draws agree: Σ p²")
    axes.plot(steps, np.exp(trace["logp"]), ".", color=BLACK, markersize=5, label="p(chosen)")
    missed = steps[~agrees]
    axes.plot(missed, np.full(len(missed), 0.03), "x", color=VERMILLION, markersize=6, label="chosen is not the argmax")
    axes.set(title=f"Step: the argmax was chosen in {agrees.mean():.0%} of the steps", ylabel="probability")
    axes.set_ylim(0, 1.12)
    shade_parts(axes, trace.parts)
    step_axis(axes, trace.labels)
    legend_above(axes)


def _temperature_panel(trace, axes) -> None:
    temperatures = trace["temperatures"]
    low, median, high = np.quantile(trace["argmax_p"], (0.1, 0.5, 0.9), axis=0)
    axes.fill_between(temperatures, low, high, color=BLUE, alpha=0.15, linewidth=0, label="10 % to 90 % of the steps")
    axes.plot(temperatures, trace["argmax_p"].mean(axis=0), "o-", color=BLUE, markersize=4, label="mean")
    axes.plot(temperatures, median, ":", color=BLACK, label="median")
    axes.set(title="Step: p(argmax) by temperature", xlabel="temperature", ylabel="probability", ylim=(0, 1.05))
    axes.legend(loc="lower left", frameon=False, fontsize=8.5)


def _answer_panel(trace, axes) -> None:
    summary = trace.summary()["answer_consistency"]
    votes = summary["answers"].most_common(8)
    colors = [GREEN if answer == trace.meta["gold"] else GREY for answer, _ in votes]
    axes.barh(range(len(votes)), [count for _, count in votes], color=colors, height=0.7)
    own = trace.meta["answer"] or "(none)"
    names = [drawable(answer) + (" (trace)" if answer == own else "") for answer, _ in votes]
    axes.set_yticks(range(len(votes)), names, parse_math=False)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    known = "" if trace.meta["gold"] is None else " (green: right)"
    axes.set(title=f"Answers: {summary['majority_share']:.0%} agree{known}", xlabel="answers, the trace's included")


def _fork_panel(trace, axes) -> None:
    forced = trace.meta["forced_forks"]
    for offset, key, color, name in (
        (-0.19, "changed_with_token", GREY, "token of the trace"),
        (0.19, "changed_with_runner_up", VERMILLION, "runner-up"),
    ):
        axes.barh([i + offset for i in range(len(forced))], [f[key] for f in forced], 0.36, color=color, label=name)
    names = [f"{f['step']}: {drawable(f['token'], 8)} / {drawable(f['runner_up'], 8)}" for f in forced]
    axes.set_yticks(range(len(forced)), names, parse_math=False)
    axes.set_ylim(len(forced) - 0.5, -0.5)
    axes.set(title="Forks: answer changes", xlabel="share that differ from the trace's", xlim=(0, 1.02))
    axes.grid(False, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.26), ncols=2, frameon=False, fontsize=8.5)


def landscape_figure(trace) -> Figure:
    """4. log10 p of the whole vocabulary by step and rank, the edge of the nucleus, and the chosen token's rank."""
    ranks, steps = trace["ranks"].astype(float), np.arange(len(trace))
    figure = Figure(figsize=(step_width(len(trace)), 4.8), layout="constrained")
    axes = figure.subplots()
    middles = np.sqrt(ranks[:-1] * ranks[1:])
    rank_edges = np.concatenate([[ranks[0] / 1.3], middles, [ranks[-1] * 1.1]])
    values = log10_p(trace["rank_curve"])
    scale = Normalize(max(FLOOR, np.floor(values.min())), 0)
    step_edges = np.arange(len(trace) + 1) - 0.5
    mesh = axes.pcolormesh(step_edges, rank_edges, values.T, cmap="viridis", norm=scale, rasterized=True)
    nucleus = np.sqrt(trace["n95"] * (trace["n95"] + 1.0))  # between the last rank of the nucleus and the next one
    axes.step(step_edges, np.append(nucleus, nucleus[-1]), where="post", color="white", linewidth=1.6, label="n95")
    axes.plot(steps, trace["rank"], "o", color=VERMILLION, markersize=3.5, markeredgecolor="white", label="chosen")
    axes.set(title="Probability landscape of the whole vocabulary", yscale="log", ylabel="rank (log scale)")
    axes.set_ylim(rank_edges[-1], rank_edges[0])
    decades = [10**n for n in range(1 + int(math.log10(ranks[-1])))]
    fixed_ticks(axes.yaxis, decades, [f"{decade:,}" for decade in decades])
    axes.grid(False)
    step_axis(axes, trace.labels)
    legend_above(axes, frameon=True, facecolor="#555555", labelcolor="white", edgecolor="none")
    color_bar(figure, mesh, axes, "log10 p")
    return figure


def scatter_figure(trace) -> Figure:
    """5. Entropy and varentropy of each step; the outliers are labelled."""
    x, y = trace["entropy"], trace["varentropy"]
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    parts = np.array(trace.parts)
    for name, marker in (("reasoning", "o"), ("answer", "s"), ("", "^")):
        for fork, color in ((False, BLUE), (True, VERMILLION)):
            mask = (parts == name) & (trace.forks == fork)
            label = f"{name or 'elsewhere'}{', fork' if fork else ''}"
            if mask.any():
                axes.scatter(x[mask], y[mask], s=26, marker=marker, color=color, alpha=0.75, linewidth=0, label=label)
    width, height = max(x.max(), 0.05), max(y.max(), 0.05)
    order = np.argsort(-np.hypot(x / width, y / height), kind="stable").tolist()
    for t in select_spaced((y / height).tolist(), order, gap=0.045)[:14]:
        text = f'{t}: "{drawable(trace.labels[t])}"'
        add_text(axes, x[t] + 0.012 * width, y[t], text, va="center", fontsize=8.5)
    axes.set(title="How unsure, and how unevenly so", xlabel="entropy (nats)", ylabel="varentropy (nats²)")
    axes.set(xlim=(-0.03 * width, 1.18 * width), ylim=(-0.04 * height, 1.08 * height))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8.5)
    return figure


def histogram_figure(trace) -> Figure:
    """6. Histograms of the entropy and of the chosen token's rank; the size of the nucleus by step."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.hist(trace["entropy"], bins=np.linspace(0, max(trace["entropy"].max(), 0.05), 25), color=BLUE)
    left.set(title="Entropy", xlabel="nats", ylabel="steps")
    starts = [1, 2, 3, 4, 6, 11, 101, 1001, 10001]
    names = ["1", "2", "3", "4-5", "6-10", "≤ 100", "≤ 1k", "≤ 10k", "more"]
    counts = np.histogram(trace["rank"], bins=[*starts, np.inf])[0]
    shown = max(4, np.flatnonzero(counts)[-1] + 1)
    bars = middle.bar(range(shown), counts[:shown], color=BLUE)
    middle.bar_label(bars, fontsize=8.5)
    middle.set_xticks(range(shown), names[:shown], fontsize=8.5)
    middle.set(title="Rank of the chosen token", xlabel="rank", ylabel="steps")
    middle.grid(False, axis="x")
    right.step(range(len(trace)), trace["n95"], where="mid", color=BLUE, linewidth=1.4)
    right.set(title="Nucleus: how many tokens hold 95 %", xlabel="step", ylabel="n95 (log scale)", yscale="log")
    right.set_ylim(0.8, 2.5 * trace["n95"].max())
    ticks = [tick for tick in (1, 2, 5, 10, 100, 1000, 10000, 100000) if tick <= 2 * trace["n95"].max()]
    fixed_ticks(right.yaxis, ticks, [f"{tick:,}" for tick in ticks])
    shade_parts(right, trace.parts)
    for axes in (left, middle):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
