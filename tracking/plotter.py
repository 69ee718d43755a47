"""Draw a run: `metrics.jsonl` -> PNG pictures.

Pictures of one run, redrawn while it trains; all but the last also of several seeds beside their control runs:
    train_score.png   the total reward, and each reward that it is made of
    eval_score.png    held-out accuracy (sampled, greedy, flexible), format rate and completion length
    games.png         for self_play.py: games against fixed opponents, optimal moves, right verdicts
    overview.png      the rest: entropy, gradient norm, learning rate, KL, clipping, truncation, speed

A picture is made of panels, a panel of curves, and a curve is drawn for a group of runs; a single run is a group of
one. A curve has the steps that all runs of its group have, so every point of a mean covers the same runs.

Left out on purpose: dashboards (see --report_to), interactive windows, log axes, significance tests. Pyplot is left
out too: its global state would grow with every redraw.

    python -m tracking.plotter runs/tiny                                             # -> runs/tiny/plots
    python -m tracking.plotter runs/s1 runs/s2 runs/s3 --control runs/c1 --output_dir plots
"""

import argparse
import gzip
import json
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette keeps its distances for colour-blind readers; grey belongs to the controls alone.
BLACK, BLUE, GREEN, VERMILLION, PURPLE, GREY = "#222222", "#0072B2", "#009E73", "#D55E00", "#AA5A8C", "#808080"
FONT_SIZE = 9.5
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.xmargin": 0.02,
}
WIDTH, LEFT, ABOVE, BELOW, LEGEND_LINE = 10.0, 0.84, 0.32, 0.55, 0.22  # inches: the picture, around a panel, the legend


class Group(NamedTuple):
    """Runs of one setting. A group with a colour of its own (the controls) is also named beside each of its lines."""

    label: str
    runs: list[list[dict]]
    color: str | None = None


class Curve(NamedTuple):
    key: str
    label: str = ""
    color: str = BLUE
    style: str = "-"


class Panel(NamedTuple):
    title: str
    unit: str
    curves: list[Curve]
    percent: bool = False
    top: float | None = None  # end of the y axis; None: a little above the data
    smooth: bool = True
    stacked: bool = False


def read_metrics(path) -> list[dict]:
    """Rows of a metrics file (.jsonl or .jsonl.gz), or of the one in a run folder.

    A last line that a killed run left half-written is dropped; a bad line elsewhere is a ValueError with its number.
    """
    path = Path(path)
    if path.is_dir():
        folder, names = path, ("metrics.jsonl", "metrics.jsonl.gz")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{folder}: no {' or '.join(names)} in this folder")
    try:
        lines = (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes()).splitlines()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not an object with an integer `step`")
            rows.append(row)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def by_step(rows, key) -> dict[int, float]:
    """{step: value} where the run has a finite number; if it has two for a step, the later one."""
    return {r["step"]: r[key] for r in rows if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])}


def align(tables) -> tuple[np.ndarray, np.ndarray]:
    """The steps (S,) that all N tables of `by_step` have, and their values there (N, S)."""
    steps = sorted(set.intersection(*map(set, tables)))
    return np.array(steps), np.array([[table[step] for step in steps] for table in tables], dtype=float)


def smoothing_window(groups) -> int:
    """Odd, and short beside the longest run: 5 of 60 steps, 25 of 2,000."""
    return int(2 + 0.5 * math.sqrt(max(len(by_step(run, "reward")) for group in groups for run in group.runs))) | 1


def smooth(values, window) -> np.ndarray:
    """Moving mean of each row of (N, S) over an odd window around each step; over fewer steps at the ends."""
    length = values.shape[1]
    kernel = np.ones(min(window, length - (length + 1) % 2))
    counts = np.convolve(np.ones(length), kernel, "same")
    return np.array([np.convolve(row, kernel, "same") / counts for row in values])


def band(runs, key, steps, values):
    """Low and high (S,): extremes over several runs; for a single run the interval that its file gives, else NaN."""
    if len(runs) > 1:
        return values.min(axis=0), values.max(axis=0)
    tables = [by_step(runs[0], key + end) for end in ("_low", "_high")]
    return [np.array([table.get(step, math.nan) for step in steps]) for table in tables]


def draw_band(axes, steps, low, high, color, alpha) -> None:
    """Filled from low to high; of a single point only its edge can be seen, and elsewhere an edge would be clutter."""
    edge = 2 if len(steps) == 1 else 0
    axes.fill_between(steps, low, high, facecolor=color, edgecolor=color, alpha=alpha, linewidth=edge)


def draw_curve(axes, curve, group, steps, values, window) -> tuple:
    """One curve for one group, values (N, S). Returns its end label: height, value, name, colour."""
    color = group.color or curve.color
    smoothed = smooth(values, window)
    mean = smoothed.mean(axis=0)
    draw_band(axes, steps, *band(group.runs, curve.key, steps, smoothed), color, alpha=0.15)
    faint = smoothed if len(values) > 1 else values
    axes.plot(steps, faint.T, color=color, alpha=0.25, linewidth=0.8, zorder=1.5, label=f"{curve.key} each")
    marker = "o" if len(steps) <= 20 else None
    axes.plot(steps, mean, curve.style, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=curve.key)
    names = [group.label.split(":")[0] if group.color else "", curve.label]
    return mean[-1], mean[-1], " ".join(filter(None, names)), color


def draw_stack(axes, curves, steps, values) -> list[tuple]:
    """Curves on top of each other, values (number of curves, S): the parts of a whole. Returns their end labels."""
    edges = np.vstack([np.zeros(len(steps)), values.cumsum(axis=0)])
    ends = []
    for curve, low, high in zip(curves, edges[:-1], edges[1:], strict=True):
        draw_band(axes, steps, low, high, curve.color, alpha=0.6)
        ends.append(((low[-1] + high[-1]) / 2, high[-1] - low[-1], curve.label, curve.color))
    return ends


def spread(heights, gap) -> list[float]:
    """Ascending heights (parts of the axes' height) pushed apart to at least `gap`, and inside."""
    heights, ceiling = list(heights), 1 - gap / 2
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights


def short(value) -> str:
    text = f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("e-0", "e-")


def label_ends(axes, ends, percent, height) -> float:
    """Name and last value of each curve, right of the axes, where they cover no data. Returns their width in inches."""
    bottom, top = axes.get_ylim()
    ends = sorted(ends)
    places = spread([(end[0] - bottom) / (top - bottom) for end in ends], 1.3 * FONT_SIZE / 72 / height)
    widths = []
    for place, (_, value, name, color) in zip(places, ends, strict=True):
        text = f"{name} {100 * value:.1f} %" if percent else f"{name} {short(value)}"
        text, offset = text.strip(), {"xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(text, (1, place), xycoords="axes fraction", va="center", color=color, **offset)
        widths.append(text_to_path.get_text_width_height_descent(text, FontProperties(size=FONT_SIZE), ismath=False)[0])
    return (6 + max(widths) + 6) / 72


def draw_panel(axes, panel, groups, window, height) -> float:
    """Returns the room that its labels need on the right, in inches."""
    runs = [run for group in groups for run in group.runs]
    window = window if panel.smooth else 1
    if panel.stacked:
        steps, values = align([by_step(run, curve.key) for curve in panel.curves for run in runs])
        ends = draw_stack(axes, panel.curves, steps, smooth(values, window))
    else:
        ends = []
        for curve in panel.curves:
            steps, values = align([by_step(run, curve.key) for run in runs])
            for group in groups:
                own, values = values[: len(group.runs)], values[len(group.runs) :]
                ends.append(draw_curve(axes, curve, group, steps, own, window))
    axes.set(title=panel.title, xlabel="training step", ylabel=panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %" if panel.percent else short(value))
    low, high = 1.06 * np.clip(axes.dataLim.intervaly, (-np.inf, 0), (0, np.inf))  # the axis always has its zero
    axes.set_ylim(low, panel.top or (high if high > low else 1))
    return label_ends(axes, ends, panel.percent, height)


def describe(group, window) -> str:
    """What the line, the band and the faint lines of a group stand for."""
    if len(group.runs) > 1:
        averaged = f" and of up to {window} steps" if window > 1 else ""
        return f"{group.label}; mean of {len(group.runs)} seeds{averaged} (band: minimum to maximum; faint: each seed)"
    drawn = f"bold: mean of up to {window} steps; faint: each step" if window > 1 else "band: Wilson 95 % interval"
    return f"{group.label} ({drawn})"


@rc_context(STYLE)
def build_figure(panels, groups, widths=(1, 1, 1), height=1.6) -> Figure | None:
    """The panels that have data, in as many columns as there are widths; None where no panel has any.

    They are placed by hand: a layout engine would draw everything a second time to measure it.
    """
    runs = [run for group in groups for run in group.runs]
    logged = {key for panel in panels for key, *_ in panel.curves if len(align([by_step(run, key) for run in runs])[0])}
    panels = [panel._replace(curves=[curve for curve in panel.curves if curve.key in logged]) for panel in panels]
    panels = [panel for panel in panels if panel.curves]
    if not panels:
        return None
    window = smoothing_window(groups) if panels[0].smooth else 1
    columns, num_rows = len(widths[: len(panels)]), math.ceil(len(panels) / len(widths))
    total = num_rows * (ABOVE + height + BELOW) + LEGEND_LINE * len(groups)
    figure = Figure(figsize=(WIDTH, total))
    grid = [figure.add_axes((0, 0, 1, 1), label=str(i)) for i in range(len(panels))]
    rooms = [draw_panel(axes, panel, groups, window, height) for axes, panel in zip(grid, panels, strict=True)]
    rooms = [max(rooms[column::columns]) for column in range(columns)]
    scale = (WIDTH - columns * LEFT - sum(rooms)) / sum(widths[:columns])
    for i, axes in enumerate(grid):
        row, column = divmod(i, columns)
        left = (column + 1) * LEFT + sum(rooms[:column]) + scale * sum(widths[:column])
        bottom = total - (row + 1) * (ABOVE + height) - row * BELOW
        axes.set_position((left / WIDTH, bottom / total, scale * widths[column] / WIDTH, height / total))
    own = dict.fromkeys(curve.color for panel in panels for curve in panel.curves)
    handles = [
        tuple(Line2D([], [], color=color, linewidth=1.8) for color in ([group.color] if group.color else own))
        for group in groups
    ]
    texts = [describe(group, window) for group in groups]
    looks = {"loc": "lower left", "frameon": False, "borderpad": 0.2, "handlelength": 3, "fontsize": FONT_SIZE}
    figure.legend(handles, texts, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)}, **looks)
    return figure


def train_figure(groups) -> Figure | None:
    """The total reward, then each reward by itself (its mean before weighting)."""
    keys = {key for group in groups for run in group.runs for row in run for key in row if key.startswith("reward/")}
    panels = [Panel("Total reward, weighted", "mean per completion", [Curve("reward", color=BLACK)])]
    for name in sorted(key.removeprefix("reward/") for key in keys):
        curve = Curve(f"reward/{name}", color={"accuracy": BLUE, "format": GREEN}.get(name, PURPLE))
        panels.append(Panel(f"{name.replace('_', ' ').capitalize()} reward", "mean per completion", [curve]))
    return build_figure(panels, groups, height=2.0)


def eval_figure(groups) -> Figure | None:
    """Held-out accuracy as sampled (strict), greedy, and flexible (last number anywhere); format rate; length."""
    sizes = {n for group in groups for run in group.runs for n in by_step(run, "eval/n").values()}
    counted = f", n = {' to '.join(f'{n:,}' for n in sorted({min(sizes), max(sizes)}))}" if sizes else ""
    score = [
        Curve("eval/accuracy", "sampled", BLUE),
        Curve("eval/accuracy_greedy", "greedy", VERMILLION, ":"),
        Curve("eval/accuracy_flexible", "flexible", BLUE, "--"),
        Curve("eval/format_rate", "format", GREEN),
    ]
    length = [Curve("eval/length", color=BLACK)]
    panels = [
        Panel(f"Held-out accuracy and format rate{counted}", "share of completions", score, True, 1.02, smooth=False),
        Panel("Held-out completion length", "tokens", length, smooth=False),
    ]
    return build_figure(panels, groups, widths=(1.8, 1), height=2.8)


def games_figure(groups) -> Figure | None:
    """What self_play.py measures: games against fixed opponents, optimal moves, or a judge's verdicts."""
    against = [
        Curve("eval/win_random", "random"),
        Curve("eval/win_start", "start", GREEN),
        Curve("eval/held_perfect", "perfect", VERMILLION),
    ]
    answers = [
        Curve("eval/accuracy", "right"),
        Curve("eval/judge_random", "random reveals", GREEN),
        Curve("eval/judge_one_sided", "one side", PURPLE),
        Curve("eval/illegal", "illegal", VERMILLION),
    ]
    panels = [
        Panel("Games won against (perfect play: held)", "share of games", against, True, 1.02, smooth=False),
        Panel("Optimal moves, or right verdicts", "share of answers", answers, True, 1.02, smooth=False),
    ]
    played = any("plies" in row for group in groups for run in group.runs for row in run)
    return build_figure(panels, groups, widths=(1, 1), height=2.4) if played else None


def overview_figure(groups) -> Figure | None:
    """Is the run healthy? Everything else that a step logs, for one run."""
    seconds = [Curve("time/train", "train"), Curve("time/rollout", "rollout", VERMILLION)]
    behaviour = [Curve("reflect_rate", "reflects"), Curve("repetition", "repeats", VERMILLION)]
    panels = [
        Panel("Entropy of the policy", "nats per token", [Curve("entropy")]),
        Panel("Completion length", "tokens", [Curve("completion_length")]),
        Panel("Truncated completions", "share of completions", [Curve("truncated_rate")], percent=True),
        Panel("Gradient norm", "before clipping", [Curve("grad_norm")]),
        Panel("Learning rate", "per update", [Curve("lr")], smooth=False),
        Panel("Clipped tokens", "share of tokens", [Curve("clip_frac")], percent=True),
        Panel("Log-prob gap to the rollout", "nats", [Curve("logprob_gap")]),
        Panel("Groups of equal rewards", "share of groups", [Curve("zero_std_groups")], percent=True),
        Panel("Reflection and repetition", "share", behaviour, percent=True),
        Panel("Speed", "tokens per second", [Curve("tokens_per_second")]),
        Panel("KL to the reference", "nats per token", [Curve("kl")]),
        Panel("Time per step", "seconds", seconds, stacked=True),
    ]
    return build_figure(panels, groups)


def save(figures, out_dir) -> list[Path]:
    """Write {name: Figure or None}; each file appears whole or not at all, whoever looks at it meanwhile."""
    out_dir = Path(out_dir)
    figures = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in figures.items():
        out_dir.mkdir(parents=True, exist_ok=True)
        temporary = out_dir / f".{name}.{os.getpid()}.tmp"
        try:
            figure.savefig(temporary, format="png", dpi=150)
            os.replace(temporary, out_dir / name)
        finally:
            temporary.unlink(missing_ok=True)
    return [out_dir / name for name in figures]


def plot_run(run_dir, out_dir=None) -> list[Path]:
    """Draw the pictures of one run (default: into run_dir/plots), less those that have nothing to show yet."""
    run_dir = Path(run_dir)
    groups = [Group(run_dir.resolve().name.replace("$", r"\$"), [read_metrics(run_dir)])]
    figures = {"train_score.png": train_figure(groups), "eval_score.png": eval_figure(groups)}
    figures |= {"games.png": games_figure(groups), "overview.png": overview_figure(groups)}
    return save(figures, out_dir or run_dir / "plots")


def plot_seeds(run_dirs, out_dir, control_dirs=(), labels=("trained", "control: shuffled advantages")) -> list[Path]:
    """Draw all pictures but overview.png of several seeds, and of control runs in the same axes.

    The legend has the whole labels; the lines of the controls are named by what stands before the colon.
    """
    groups = [Group(labels[0], [read_metrics(run) for run in run_dirs])]
    if control_dirs:
        groups.append(Group(labels[1], [read_metrics(run) for run in control_dirs], GREY))
    figures = {"train_score.png": train_figure(groups), "eval_score.png": eval_figure(groups)}
    return save(figures | {"games.png": games_figure(groups)}, out_dir)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def main(arguments=None) -> None:
    parser = Parser(description="Draw metrics.jsonl of one run, or of several seeds of one setting.")
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run folder; several: seeds of one setting")
    parser.add_argument("--control", nargs="+", default=[], metavar="RUN_DIR", help="run folders of the controls")
    parser.add_argument("--output_dir", help="where the pictures go; default for a single run: RUN_DIR/plots")
    args = parser.parse_args(arguments)
    several = len(args.run_dirs) > 1 or args.control
    if several and not args.output_dir:
        parser.error("several runs need --output_dir")
    try:
        if several:
            paths = plot_seeds(args.run_dirs, args.output_dir, args.control)
        else:
            paths = plot_run(args.run_dirs[0], args.output_dir)
    except (OSError, ValueError) as error:
        parser.error(error)
    if not paths:
        parser.error("nothing to draw: no step with the same metrics in " + ", ".join(args.run_dirs + args.control))
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
