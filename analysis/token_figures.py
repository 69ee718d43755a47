"""One PDF figure for every token of a trace: the rank curve of the whole vocabulary beside the likeliest tokens.

A figure is made once per job of FIGURES_PER_JOB steps; from step to step only its data change. Jobs run in a process
pool if there are many.
"""

import math
import multiprocessing
import os
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tqdm import tqdm

from analysis.drawing import add_text, drawable, fixed_ticks
from tracking.plotter import BLACK, BLUE, GREY, STYLE, VERMILLION

LIKELIEST = 20  # tokens with a bar
FIGURES_PER_WORKER = 100  # a worker process takes about as long to start as to draw this many figures
FIGURES_PER_JOB = 16  # drawn by one process, one after another


class TokenFigure:
    """A figure that `fill` sets to any step. A new figure for each step takes several times as long, mostly because of
    axes and tick labels.

    arrays: of a trace. texts: the text of every token id in them. A worker process gets these two in place of a Trace,
    because a Trace would import torch there.
    """

    @rc_context(STYLE)
    def __init__(self, arrays: dict[str, np.ndarray], texts: dict[int, str]):
        self.arrays, self.texts = arrays, texts
        self.figure = Figure(figsize=(9.6, 4.4))
        # Not bold, because a bold title would embed a second font in every file.
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
        fixed_ticks(axes.xaxis, [10**n for n in decades], [f"{10**n:,}" for n in decades])
        powers = range(0, lowest - 1, -max(1, math.ceil(-lowest / 6)))
        fixed_ticks(axes.yaxis, [10.0**n for n in powers], [f"1e{n}" if n else "1" for n in powers])

    def _make_bars(self, axes) -> None:
        # The last row is for the chosen token, if it is not among the likeliest.
        self.rows = min(LIKELIEST, self.arrays["topk_ids"].shape[1]) + 1
        self.bars = axes.barh(range(self.rows), [0.0] * self.rows, height=0.75)
        self.labels, self.values = [], []
        transform, style = axes.get_yaxis_transform(), dict(va="center", fontsize=8)
        for row in range(self.rows):
            self.labels.append(add_text(axes, -0.02, row, "", ha="right", transform=transform, **style))
            self.values.append(axes.text(0, row, "", ha="left", **style))
        axes.set(xlim=(0, 1), ylim=(self.rows - 0.4, -0.6), xlabel="probability")
        axes.yaxis.set_major_locator(NullLocator())
        fixed_ticks(axes.xaxis, [0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])

    def fill(self, t: int) -> None:
        """Sets curve, bars and texts to step t."""
        a, top_k = self.arrays, self.arrays["topk_ids"].shape[1]
        token, p, rank = int(a["token_ids"][t]), math.exp(a["logp"][t]), int(a["rank"][t])
        self.title.set_text(f"Step {t} of {len(a['token_ids'])}: {drawable(self.texts[token], 40)}")
        self.facts.set_text(
            f"p {p:.3g}, rank {rank:,}, entropy {a['entropy'][t]:.3f} nats, n95 {a['n95'][t]:,}, "
            f"beyond the top {top_k}: {a['tail_mass'][t]:.2g}"
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
            is_used = row < len(ids)
            value = probs[row] if is_used else 0.0
            is_chosen = is_used and ids[row] == token
            self.bars[row].set(width=value, facecolor=VERMILLION if is_chosen else BLUE)
            self.labels[row].set(text=names[row] if is_used else "", color=VERMILLION if is_chosen else BLACK)
            self.values[row].set(text=f"{value:.3g}" if is_used else "", x=value + 0.01)


def draw_token_figures(trace, folder: Path, limit: int | None = None, workers: int | None = None) -> None:
    """Writes step_0000.pdf and so on, for the first `limit` steps or for all.

    workers: number of processes; default 1 for a short trace, up to one per core for a long one.
    """
    folder.mkdir(exist_ok=True)
    num_steps = len(trace) if limit is None else min(limit, len(trace))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or max(1, min(cores, num_steps // FIGURES_PER_WORKER))
    ids = {*trace["topk_ids"].flatten().tolist(), *trace["token_ids"].tolist()}
    texts = {token: trace.label(token) for token in ids}
    starts = range(0, num_steps, FIGURES_PER_JOB)
    jobs = [(trace.arrays, texts, folder, range(start, min(start + FIGURES_PER_JOB, num_steps))) for start in starts]
    with tqdm(total=num_steps, desc="token figures", unit="figure") as progress:
        if workers == 1:
            for job in jobs:
                progress.update(_draw_job(job))
            return
        # Spawned, because a forked process could inherit a lock that torch holds.
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for num_drawn in pool.imap_unordered(_draw_job, jobs):
                progress.update(num_drawn)


def _draw_job(job) -> int:
    """job: (arrays, texts, folder, steps) -> the number of figures drawn."""
    arrays, texts, folder, steps = job
    figure = TokenFigure(arrays, texts)
    for t in steps:
        figure.fill(t)
        figure.figure.savefig(folder / f"step_{t:04}.pdf")
    return len(steps)
