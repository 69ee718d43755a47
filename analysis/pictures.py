"""Showing a trace (token_analysis.Trace): the pictures, a figure for every token, and trace.html.

Everything is made from the trace alone: no model, no tokenizer, no network. The pictures are PNG, in plotter.py's style
and like there without pyplot. Token figures are PDF: a process keeps one figure and sets anew only what changes.
trace.html is one file without any address in it: the template PAGE, at the end of this module, around a block of JSON
that the browser does not run. Model text gets into the page as textContent, never as markup.

Left out on purpose: plotting libraries in the page, several traces on one page.
"""

import functools
import math
import multiprocessing
import os
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from tqdm import tqdm

from tracking.plotter import BLACK, BLUE, GREEN, GREY, PURPLE, STYLE, VERMILLION, save

PART_COLORS = {"reasoning": "#e6f0fa", "answer": "#fdeee2"}
VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
TOKENS_ON_AXIS = 100  # up to so many steps each is named by its token, under the axis
HEATMAP_STEPS, HEATMAP_RANKS = 40, 10  # rows and columns of a page of the heatmap
FLOOR = -10  # log10 p at which colour scales end
FIGURE_TOKENS = 20
FIGURES_A_WORKER = 100  # a worker process takes about as long to start as so many figures take to draw
BLOCK = 16  # figures that a worker draws at a time
PAGE_TOP = 10  # likeliest tokens of a step in the page

# ---------------------------------------------------------------- what the pictures share


def drawable(text: str, limit: int = 14) -> str:
    """A token as a label: white space visible, an escape for what the font lacks, cut to `limit` characters."""
    known = (VISIBLE.get(c) or (c if c.isprintable() and ord(c) in _glyphs() else ascii(c)[1:-1]) for c in text)
    shown = "".join(known)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


@functools.cache
def _glyphs() -> set[int]:
    return set(get_font(findfont(STYLE["font.family"])).get_charmap())


def write(axes, x, y, text, **options):
    """Text as it is: a $ in a token begins no formula."""
    return axes.text(x, y, text, parse_math=False, **options)


def step_axis(axes, labels: list[str]) -> None:
    """The x axis of all pictures over steps: named by token where there is room, by number where not."""
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.grid(False, axis="x")
    if len(labels) <= TOKENS_ON_AXIS:
        names = [drawable(label) for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=90, fontsize=7.5, parse_math=False)
        axes.set_xlabel(f"token, steps 0 to {len(labels) - 1}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")


def step_width(num_steps: int) -> float:
    """Inches that a picture over steps takes."""
    return min(22, max(10, 1.6 + 0.16 * num_steps))


def shade_parts(axes, parts: list[str]) -> None:
    """A tinted band behind each part of the text, named at its top."""
    start = 0
    for name, run in groupby(parts):
        stop = start + len(list(run))
        if name:
            axes.axvspan(start - 0.5, stop - 0.5, color=PART_COLORS[name], linewidth=0, zorder=0)
            at = dict(transform=axes.get_xaxis_transform(), va="top", fontsize=8, color="#555555")
            write(axes, start - 0.35, 0.985, name, **at)
        start = stop


def rolling_mean(values: np.ndarray, window: int = 9) -> np.ndarray:
    """Mean over an odd window around each step; over fewer steps at the ends."""
    kernel = np.ones(min(window, len(values) - (len(values) + 1) % 2))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def apart(positions, order, gap: float) -> list[int]:
    """The first of `order` and every later one that is at least `gap` away from all taken before: labels that fit."""
    taken: list[int] = []
    for i in order:
        if all(abs(positions[i] - positions[j]) >= gap for j in taken):
            taken.append(i)
    return taken


def log10_p(logp: np.ndarray) -> np.ndarray:
    """log10 p from ln p, not below FLOOR, as the colour scales show it."""
    return np.maximum(np.asarray(logp, dtype=np.float32) / math.log(10), FLOOR)


def legend_above(axes, **looks) -> None:
    """In one line at the right, level with the title: it covers no data."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=5, fontsize=8.5, **{"frameon": False, **looks})


def plain_ticks(axis, places, names) -> None:
    """Fixed ticks with plain text: matplotlib's powers of ten are formulas, and laying them out takes half the time."""
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FixedFormatter(names))
    axis.set_minor_locator(NullLocator())


def color_bar(figure, mappable, axes, label: str):
    bar = figure.colorbar(mappable, ax=axes, pad=0.015, fraction=0.04, aspect=30)
    bar.set_label(label)
    bar.outline.set_visible(False)


@rc_context(STYLE)
def draw_pictures(trace, folder: Path) -> list[Path]:
    """All PNGs of a trace."""
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


# ---------------------------------------------------------------- pictures of a trace


def entropy_figure(trace) -> Figure:
    """1. Entropy against step, its rolling mean, the parts of the text, and the forks, the strongest of them named."""
    entropy, steps = trace["entropy"], np.arange(len(trace))
    figure = Figure(figsize=(step_width(len(trace)), 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(steps, entropy, color="#b8c4d0", width=0.8, label="each step")
    axes.plot(steps, rolling_mean(entropy), color=BLUE, linewidth=1.8, label="mean of 9 steps")
    if not np.array_equal(entropy, trace["entropy_t"]):
        temperature = trace.meta["temperature"]
        axes.plot(steps, trace["entropy_t"], ".", color=PURPLE, markersize=4, label=f"each, at T = {temperature:g}")
    forks = np.flatnonzero(trace.forks)
    axes.plot(forks, entropy[forks], "o", color=VERMILLION, markersize=4.5, label="fork: the highest fifth")
    top = max(entropy.max(), trace["entropy_t"].max(), 0.1)
    strongest = forks[np.argsort(-entropy[forks], kind="stable")].tolist()
    for t in apart(steps, strongest, gap=1.1 / (step_width(len(trace)) - 1.6) * len(trace))[:14]:
        name = drawable(trace.labels[t])
        at = dict(ha="left", x=t - 0.4) if t < 3 and len(name) > 4 else dict(ha="center", x=t)  # not over the axis
        write(axes, y=entropy[t] + 0.03 * top, text=name, color=VERMILLION, fontsize=8.5, **at)
    axes.set(title="Entropy of the next token", ylabel="entropy (nats)", ylim=(0, 1.22 * top))
    shade_parts(axes, trace.parts)
    step_axis(axes, trace.labels)
    bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel("bits")
    legend_above(axes)
    return figure


def heatmap_figure(trace, start: int) -> Figure:
    """2. A page of the top-k heatmap: steps downwards, ranks across, the chosen token outlined. The column before the
    ranks has the chosen token itself, wherever it ranks."""
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
            ink = "black" if scale(value) > 0.6 else "white"
            far = f" #{trace['rank'][start + row]}" if column == 0 and trace["rank"][start + row] > ranks else ""
            text = drawable(trace.label(token), 12 - len(far)) + far
            write(axes, column, row, text, ha="center", va="center", fontsize=7.5, color=ink)
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
    """3. Would it say so again? At each step, along the path, and in the end."""
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
    """4. The whole vocabulary: log10 p by step and rank, the nucleus' edge, and where the chosen token ranks."""
    ranks, steps = trace["ranks"].astype(float), np.arange(len(trace))
    figure = Figure(figsize=(step_width(len(trace)), 4.8), layout="constrained")
    axes = figure.subplots()
    middles = np.sqrt(ranks[:-1] * ranks[1:])
    edges = np.concatenate([[ranks[0] / 1.3], middles, [ranks[-1] * 1.1]])
    values = log10_p(trace["rank_curve"])
    scale = Normalize(max(FLOOR, np.floor(values.min())), 0)
    at = np.arange(len(trace) + 1) - 0.5
    mesh = axes.pcolormesh(at, edges, values.T, cmap="viridis", norm=scale, rasterized=True)
    edge = np.sqrt(trace["n95"] * (trace["n95"] + 1.0))  # between the last rank of the nucleus and the next
    axes.step(at, np.append(edge, edge[-1]), where="post", color="white", linewidth=1.6, label="n95")
    axes.plot(steps, trace["rank"], "o", color=VERMILLION, markersize=3.5, markeredgecolor="white", label="chosen")
    axes.set(title="Probability landscape of the whole vocabulary", yscale="log", ylabel="rank (log scale)")
    axes.set_ylim(edges[-1], edges[0])
    decades = [10**n for n in range(1 + int(math.log10(ranks[-1])))]
    plain_ticks(axes.yaxis, decades, [f"{decade:,}" for decade in decades])
    axes.grid(False)
    step_axis(axes, trace.labels)
    legend_above(axes, frameon=True, facecolor="#555555", labelcolor="white", edgecolor="none")
    color_bar(figure, mesh, axes, "log10 p")
    return figure


def scatter_figure(trace) -> Figure:
    """5. Entropy against varentropy; the steps farthest out are named."""
    x, y = trace["entropy"], trace["varentropy"]
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    parts = np.array(trace.parts)
    for name, marker in (("reasoning", "o"), ("answer", "s"), ("", "^")):
        for fork, color in ((False, BLUE), (True, VERMILLION)):
            here = (parts == name) & (trace.forks == fork)
            label = f"{name or 'elsewhere'}{', fork' if fork else ''}"
            if here.any():
                axes.scatter(x[here], y[here], s=26, marker=marker, color=color, alpha=0.75, linewidth=0, label=label)
    width, height = max(x.max(), 0.05), max(y.max(), 0.05)
    order = np.argsort(-np.hypot(x / width, y / height), kind="stable").tolist()
    for t in apart((y / height).tolist(), order, gap=0.045)[:14]:
        text = f'{t}: "{drawable(trace.labels[t])}"'
        write(axes, x[t] + 0.012 * width, y[t], text, va="center", fontsize=8.5)
    axes.set(title="How unsure, and how unevenly so", xlabel="entropy (nats)", ylabel="varentropy (nats²)")
    axes.set(xlim=(-0.03 * width, 1.18 * width), ylim=(-0.04 * height, 1.08 * height))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8.5)
    return figure


def histogram_figure(trace) -> Figure:
    """6. Entropy, rank of the chosen token, and the nucleus over time."""
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
    plain_ticks(right.yaxis, ticks, [f"{tick:,}" for tick in ticks])
    shade_parts(right, trace.parts)
    for axes in (left, middle):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


# ---------------------------------------------------------------- 7. a figure for every token


class TokenFigure:
    """The rank curve of the whole vocabulary beside the 20 likeliest tokens; made once, then filled for each step.

    A figure made anew for each token takes several times as long, most of it for axes and tick labels. arrays: of a
    trace; texts: id -> token, so that a worker process needs nothing that imports torch.
    """

    @rc_context(STYLE)
    def __init__(self, arrays: dict[str, np.ndarray], texts: dict[int, str]):
        self.arrays, self.texts = arrays, texts
        self.figure = Figure(figsize=(9.6, 4.4))
        # Not bold: that would put a second font into every file.
        self.title = self.figure.text(0.07, 0.935, "", fontsize=13, parse_math=False)
        self.facts = self.figure.text(0.07, 0.885, "", fontsize=9, color="#444444")
        self._make_curve(self.figure.add_axes((0.085, 0.12, 0.4, 0.72)))
        self._make_bars(self.figure.add_axes((0.62, 0.12, 0.3, 0.72)))

    def _make_curve(self, axes) -> None:
        ranks = self.arrays["ranks"]
        lowest = max(-30, int(np.floor(self.arrays["rank_curve"].astype(np.float32).min() / math.log(10))))
        (self.curve,) = axes.loglog(ranks, np.ones(len(ranks)), color=BLUE, linewidth=1.6)
        (self.chosen,) = axes.plot([1], [1], "o", color=VERMILLION, markersize=7, label="chosen")
        self.nucleus = axes.axvline(1, color=GREY, linestyle="--", linewidth=1, label="n95")
        axes.set(xlim=(0.8, 1.25 * ranks[-1]), ylim=(10.0 ** (lowest - 0.3), 3), xlabel="rank", ylabel="probability")
        axes.legend(loc="upper right", frameon=False, fontsize=9)
        decades = range(0, 1 + int(math.log10(ranks[-1])))
        plain_ticks(axes.xaxis, [10**n for n in decades], [f"{10**n:,}" for n in decades])
        powers = range(0, lowest - 1, -max(1, math.ceil(-lowest / 6)))
        plain_ticks(axes.yaxis, [10.0**n for n in powers], [f"1e{n}" if n else "1" for n in powers])

    def _make_bars(self, axes) -> None:
        self.rows = min(FIGURE_TOKENS, self.arrays["topk_ids"].shape[1]) + 1  # the last: chosen, if it ranks below
        self.bars = axes.barh(range(self.rows), [0.0] * self.rows, height=0.75)
        self.labels, self.values = [], []
        at, small = axes.get_yaxis_transform(), dict(va="center", fontsize=8)
        for row in range(self.rows):
            self.labels.append(write(axes, -0.02, row, "", ha="right", transform=at, **small))
            self.values.append(axes.text(0, row, "", ha="left", **small))
        axes.set(xlim=(0, 1), ylim=(self.rows - 0.4, -0.6), xlabel="probability")
        axes.yaxis.set_major_locator(NullLocator())
        plain_ticks(axes.xaxis, [0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])

    def fill(self, t: int) -> None:
        """Sets everything to step t."""
        a, count = self.arrays, self.arrays["topk_ids"].shape[1]
        token, p, rank = int(a["token_ids"][t]), math.exp(a["logp"][t]), int(a["rank"][t])
        self.title.set_text(f"Step {t} of {len(a['token_ids'])}: {drawable(self.texts[token], 40)}")
        self.facts.set_text(
            f"p {p:.3g}, rank {rank:,}, entropy {a['entropy'][t]:.3f} nats, n95 {a['n95'][t]:,}, "
            f"beyond the top {count}: {a['tail_mass'][t]:.2g}"
        )
        self.curve.set_ydata(np.exp(a["rank_curve"][t].astype(np.float64)))
        self.chosen.set_data([rank], [p])
        self.nucleus.set_xdata([a["n95"][t]] * 2)
        ids = a["topk_ids"][t, : self.rows - 1].tolist()
        probs = np.exp(a["topk_logp"][t, : self.rows - 1]).tolist()
        names = [drawable(self.texts[other], 16) for other in ids]
        if token not in ids:
            ids, probs = [*ids, token], [*probs, p]
            names.append(f"rank {rank:,}: {drawable(self.texts[token], 10)}")
        for row in range(self.rows):
            shown = row < len(ids)
            value = probs[row] if shown else 0.0
            is_chosen = shown and ids[row] == token
            self.bars[row].set(width=value, facecolor=VERMILLION if is_chosen else BLUE)
            self.labels[row].set(text=names[row] if shown else "", color=VERMILLION if is_chosen else BLACK)
            self.values[row].set(text=f"{value:.3g}" if shown else "", x=value + 0.01)


def draw_token_figures(trace, folder: Path, limit: int | None = None, workers: int | None = None) -> None:
    """step_0000.pdf and so on in `folder`. workers: by default one for a short trace, up to one a core for a long one.
    They are spawned: a forked process could inherit a lock that torch holds."""
    folder.mkdir(exist_ok=True)
    num_steps = len(trace) if limit is None else min(limit, len(trace))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or max(1, min(cores, num_steps // FIGURES_A_WORKER))
    ids = {*trace["topk_ids"].flatten().tolist(), *trace["token_ids"].tolist()}
    texts = {token: trace.label(token) for token in ids}
    starts = range(0, num_steps, BLOCK)
    blocks = [(trace.arrays, texts, folder, range(start, min(start + BLOCK, num_steps))) for start in starts]
    with tqdm(total=num_steps, desc="token figures", unit="figure") as progress:
        if workers == 1:
            for block in blocks:
                progress.update(_draw_block(block))
            return
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for num_drawn in pool.imap_unordered(_draw_block, blocks):
                progress.update(num_drawn)


def _draw_block(job) -> int:
    arrays, texts, folder, steps = job
    figure = TokenFigure(arrays, texts)
    for t in steps:
        figure.fill(t)
        figure.figure.savefig(folder / f"step_{t:04}.pdf")
    return len(steps)


# ---------------------------------------------------------------- comparisons


@rc_context(STYLE)
def draw_forced_comparison(columns: dict, most_shifted: list[dict], names: list[str], side: str, file: Path) -> None:
    """Two models on the same tokens. columns, most_shifted: of token_analysis.compare_forced; names: of a and b; side:
    "a" or "b", whose text it is."""
    labels, steps = columns["token"], np.arange(len(columns["token"]))
    figure = Figure(figsize=(step_width(len(labels)) + 4, 6.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[step_width(len(labels)), 4])
    upper, lower = left.subplots(2, 1)
    change = columns["change"]
    upper.bar(steps, change, color=np.where(change < 0, VERMILLION, BLUE), width=0.8)
    upper.axhline(0, color="#666666", linewidth=0.8)
    upper.set(title=f"Change of the log-prob of the text of {side}", ylabel="ln p_b - ln p_a (nats)")
    step_axis(upper, labels)
    lower.plot(steps, columns["kl_ab"], color=BLUE, linewidth=1.4, label="KL(a || b)")
    lower.plot(steps, columns["kl_ba"], color=GREEN, linewidth=1.4, linestyle="--", label="KL(b || a)")
    lower.plot(steps, columns["jsd"], color=BLACK, linewidth=1.4, linestyle=":", label="JSD")
    flips = steps[columns["flips"]]
    lower.plot(flips, np.zeros(len(flips)), "x", color=VERMILLION, label="argmax flips", clip_on=False)
    lower.set(title="Distance of the distributions", ylabel="nats")
    lower.set_ylim(bottom=0)
    step_axis(lower, labels)
    legend_above(lower)
    axes = right.subplots()
    shifted = sorted(most_shifted, key=lambda entry: -entry["shift"])
    gains = np.array([entry["shift"] for entry in shifted])
    axes.barh(range(len(gains)), gains, color=np.where(gains < 0, VERMILLION, BLUE), height=0.75)
    axes.set_yticks(range(len(gains)), [drawable(entry["token"]) for entry in shifted], parse_math=False)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(title="Tokens that gained and lost most", xlabel="sum over steps of p_b - p_a")
    figure.suptitle(f"a: {names[0]}    b: {names[1]}", fontsize=9, color="#555555", parse_math=False)
    save({file.name: figure}, file.parent)


@rc_context(STYLE)
def draw_free_comparison(a, b, shared: int, file: Path) -> None:
    """Two traces of one prompt that share `shared` tokens: step by step until then, by distribution afterwards."""
    length = max(len(a), len(b))
    soft = a["is_soft"].any() or b["is_soft"].any()
    figure = Figure(figsize=(12, 9.6 if soft else 7), layout="constrained")
    rows = figure.subfigures(3 if soft else 2, 1)
    sides = (("a", a, BLUE, "-"), ("b", b, VERMILLION, "--"))
    axes = rows[0].subplots()
    for name, trace, color, style in sides:
        axes.plot(trace["entropy"], style, color=color, linewidth=1.4, label=f"{name}, {len(trace)} tokens")
    axes.axvspan(-0.6, shared - 0.5, color="#eeeeee", linewidth=0, zorder=0)
    title = f"Entropy along the two free runs; common prefix {shared}"
    if shared < min(len(a), len(b)):
        title += f', then "{drawable(a.labels[shared])}" or "{drawable(b.labels[shared])}"'
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="step", ylabel="nats", xlim=(-0.6, length - 0.4))
    axes.set_ylim(0, 1.15 * max(a["entropy"].max(), b["entropy"].max(), 0.1))
    legend_above(axes)
    measures = (
        ("entropy", "Entropy", "nats"),
        ("logp", "Surprisal of the chosen token", "nats"),
        ("n95", "Nucleus: tokens that hold 95 %", "n95"),
    )
    after = shared if shared < length else 0  # two runs that are the same are compared whole
    for panel, (key, title, unit) in zip(rows[1].subplots(1, 3), measures, strict=True):
        for _, trace, color, style in sides:
            values = np.sort(np.abs(trace[key][after:].astype(float)))
            if len(values):
                panel.step(values, np.arange(1, len(values) + 1) / len(values), style, where="post", color=color)
        panel.set(title=title, xlabel=unit, ylim=(0, 1.03))
    rows[1].supylabel("share of steps at or below", fontsize=9.5)
    where = f"after the first difference, at step {after}" if after else "of the whole runs"
    rows[1].suptitle(f"Distributions {where}", fontsize=9.5, color="#555555")
    if soft:
        axes = rows[2].subplots()
        for _, trace, color, style in sides:
            axes.plot(1 - trace["top_weight"], style, color=color, linewidth=1.4)
        axes.set(title="Soft thinking: 1 - weight of the heaviest token", xlabel="step", ylabel="weight of the others")
        axes.set(xlim=(-0.6, length - 0.4), ylim=(-0.02, 1))
    figure.suptitle(f"a: {a.meta['model']}    b: {b.meta['model']}", fontsize=9, color="#555555", parse_math=False)
    save({file.name: figure}, file.parent)
