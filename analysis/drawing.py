"""Parts that the pictures of a trace share: labels of tokens, the axis over steps, colours, ticks, legends."""

import functools
import math
from itertools import groupby

import numpy as np
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from tracking.plotter import STYLE

PART_COLORS = {"reasoning": "#e6f0fa", "answer": "#fdeee2"}
VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
TOKENS_ON_AXIS = 100  # with more steps than this, the axis has numbers in place of tokens
FLOOR = -10  # log10 p at which colour scales end


def drawable(text: str, limit: int = 14) -> str:
    """A token as a label of at most `limit` characters. White space is made visible, characters that the font does not
    have are escaped."""
    label = "".join(VISIBLE.get(c) or (c if c.isprintable() and ord(c) in _glyphs() else ascii(c)[1:-1]) for c in text)
    return label if len(label) <= limit else label[: limit - 1] + "…"


@functools.cache
def _glyphs() -> set[int]:
    """The code points that the pictures' font can draw."""
    return set(get_font(findfont(STYLE["font.family"])).get_charmap())


def add_text(axes, x, y, text, **options):
    """axes.text, but a $ in a token does not begin a formula."""
    return axes.text(x, y, text, parse_math=False, **options)


def step_axis(axes, labels: list[str]) -> None:
    """The x axis of all pictures over steps: one label per token, or step numbers if there are too many."""
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
    """The width of a picture over steps, in inches."""
    return min(22, max(10, 1.6 + 0.16 * num_steps))


def shade_parts(axes, parts: list[str]) -> None:
    """A coloured band behind each part of the text, with its name at the top. parts: Trace.parts."""
    start = 0
    for name, run in groupby(parts):
        stop = start + len(list(run))
        if name:
            axes.axvspan(start - 0.5, stop - 0.5, color=PART_COLORS[name], linewidth=0, zorder=0)
            style = dict(transform=axes.get_xaxis_transform(), va="top", fontsize=8, color="#555555")
            add_text(axes, start - 0.35, 0.985, name, **style)
        start = stop


def select_spaced(positions, order, gap: float) -> list[int]:
    """The indices in `order`, but for those whose position is less than `gap` from one selected before: labels at these
    positions do not overlap."""
    selected: list[int] = []
    for i in order:
        if all(abs(positions[i] - positions[j]) >= gap for j in selected):
            selected.append(i)
    return selected


def log10_p(logp: np.ndarray) -> np.ndarray:
    """ln p -> log10 p for a colour scale, at least FLOOR."""
    return np.maximum(np.asarray(logp, dtype=np.float32) / math.log(10), FLOOR)


def legend_above(axes, **options) -> None:
    """A legend in one line, above the axes at the right, where it covers no data."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=5, fontsize=8.5, **{"frameon": False, **options})


def fixed_ticks(axis, positions, labels) -> None:
    """Ticks with plain text. Matplotlib's own labels of a log axis are formulas and take half of the drawing time."""
    axis.set_major_locator(FixedLocator(positions))
    axis.set_major_formatter(FixedFormatter(labels))
    axis.set_minor_locator(NullLocator())


def color_bar(figure, mappable, axes, label: str) -> None:
    bar = figure.colorbar(mappable, ax=axes, pad=0.015, fraction=0.04, aspect=30)
    bar.set_label(label)
    bar.outline.set_visible(False)
