"""The curves of the report: which metrics share a chart, and each metric as columns of numbers with intervals.

The headings and explanations come from docs/metrics.md, so a metric without a line there cannot be drawn.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluator import wilson_interval
from tracking import plotter
from tracking.pages import to_number

METRICS_FILE = Path(__file__).parent.parent / "docs" / "metrics.md"
MAX_POINTS = 1000  # of a curve


class Panel(NamedTuple):
    """One chart: its title, the unit of its y axis, its metrics, and whether values are shown as percentages.

    prefix: metrics whose name begins so and that no panel knows are drawn too: rewards of the user's file.
    """

    title: str
    unit: str
    keys: tuple[str, ...]
    percent: bool = False
    prefix: str | None = None


def train_and_eval(*names: str) -> tuple[str, ...]:
    """The keys of metrics that both the training samples and the test split have: ("x",) -> ("x", "eval/x")."""
    return tuple(prefix + name for name in names for prefix in ("", "eval/"))


# {heading of metrics.md: the panels that the metrics under that heading are drawn in}
SECTIONS = {
    "Reward": [
        Panel("Total reward", "points, weighted", ("reward",)),
        Panel(
            "Parts of the reward",
            "points before weighting",
            ("reward/accuracy", "reward/format", "reward/tag_count", "reward/integer", "reward/judge"),
            prefix="reward/",
        ),
        Panel("Verdicts of the judge", "share", ("judge/agreement", "judge/ties", "judge/failed"), True),
        Panel("Position bias of the judge", "share of verdicts, minus a half", ("judge/position_bias",)),
    ],
    "Accuracy and format": [
        Panel("Accuracy", "share of answers", train_and_eval("accuracy"), True),
        Panel(
            "Held-out accuracy, measured otherwise",
            "share of answers",
            ("eval/accuracy_greedy", "eval/accuracy_flexible", "eval/accuracy_soft"),
            True,
        ),
        Panel("Format", "share of answers", train_and_eval("format_rate"), True),
    ],
    "Length": [
        Panel("Completion length", "tokens", ("completion_length", "eval/length")),
        Panel("Length of answers that ended by themselves", "tokens", train_and_eval("stopped_length")),
        Panel("Length of right and wrong answers", "tokens", train_and_eval("length_correct", "length_wrong")),
        Panel("Cut off at the limit", "share of answers", train_and_eval("truncated_rate"), True),
    ],
    "Exploration": [
        Panel("Entropy", "nats a token", ("entropy",)),
        Panel("Groups of equal rewards", "share of groups", ("zero_std_groups",), True),
        Panel("Groups that were replaced", "groups", ("replaced_groups",)),
        Panel("Tokens sampled", "tokens", ("sampled_tokens",)),
        Panel("Mixtures of tokens", "share of positions", (*train_and_eval("soft_share"), "eval/top_weight"), True),
    ],
    "Behaviour": [
        Panel("Reflection", "share of answers", train_and_eval("reflect_rate"), True),
        Panel("Words of reflection", "in every 1,000 words", train_and_eval("reflect_words")),
        Panel("What reflection brings", "difference of shares", train_and_eval("reflection_lift")),
        Panel("Repetition", "share of 4-grams", train_and_eval("repetition"), True),
        Panel("Loops", "share of answers", train_and_eval("loop_rate"), True),
    ],
    "Optimization": [
        Panel("Gradient norm", "before clipping", ("grad_norm",)),
        Panel("Clipped tokens", "share of tokens", ("clip_frac",), True),
        Panel("Log-prob gap to the rollout", "nats a token", ("logprob_gap",)),
        Panel("KL to the reference", "nats a token", ("kl",)),
        Panel("Learning rate", "per update", ("lr",)),
        Panel("Updates", "per step", ("updates", "skipped_updates")),
        Panel("Micro-batch", "tokens", ("tokens_per_micro_batch",)),
    ],
    "Games": [
        Panel("Reward of each seat", "points", ("reward/seat_0", "reward/seat_1")),
        Panel("Against others", "share of games", ("win_rate", "eval/win_random", "eval/win_start"), True),
        Panel("Against perfect play", "share of games", ("eval/held_perfect",), True),
        Panel("Draws", "share of games", ("eval/draw_random", "eval/draw_start"), True),
        Panel("Illegal moves", "share of answers", ("illegal_rate", "eval/illegal"), True),
        Panel("Length of a game", "answers", ("plies",)),
        Panel(
            "The judge, beside eval/accuracy",
            "share of right verdicts",
            ("eval/judge_random", "eval/judge_one_sided", "eval/judge_ceiling"),
            True,
        ),
        Panel(
            "The judge, by the claim",
            "share of right verdicts",
            ("eval/judge_claim_right", "eval/judge_claim_wrong"),
            True,
        ),
        Panel(
            "The judge, by who speaks first",
            "share of right verdicts",
            ("eval/judge_right_side_first", "eval/judge_right_side_second"),
            True,
        ),
    ],
    "Distillation": [
        Panel("Loss", "nats a token", ("loss",)),
        Panel("Steps on the student's own answers", "0 or 1", ("on_policy",)),
    ],
    "Time": [
        Panel("Time of a step", "seconds", ("time/rollout", "time/train")),
        Panel("Speed", "tokens a second", ("tokens_per_second",)),
    ],
}
# Shares of independent trials, for which Wilson's interval holds. The answers to one problem are not independent, so
# n is the number of problems.
RATES = {
    *train_and_eval("accuracy", "format_rate", "truncated_rate", "reflect_rate", "loop_rate"),
    *("zero_std_groups", "eval/accuracy_greedy", "eval/accuracy_flexible", "eval/accuracy_soft"),
}


def read_explanations(file: Path = METRICS_FILE) -> dict[str, dict[str, str]]:
    """{heading: {metric: what it is}} of metrics.md: the first two columns of its tables."""
    text = file.read_text(encoding="utf-8")
    explanations = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        rows = re.findall(r"^\| (`.+?`) \| (.+?) \|", body, flags=re.MULTILINE)
        explanations[heading] = {name: what for names, what in rows for name in re.findall(r"`(.+?)`", names)}
    return explanations


def interval(key: str, value: float, row: dict, config: dict) -> tuple[float, float] | None:
    """The 95 % interval of a metric's value in that row; None if it is not a rate, or n is unknown."""
    if {f"{key}_low", f"{key}_high"} <= row.keys():
        return row[f"{key}_low"], row[f"{key}_high"]
    n = row.get("eval/n") if key.startswith("eval/") else config.get("problems_per_step")
    if key not in RATES or not isinstance(n, int) or not 0 <= value <= 1:
        return None
    return wilson_interval(value * n, n)


def evenly_spaced(items: list, limit: int) -> list:
    """At most `limit` (2 or more) of the items, evenly spaced, the first and the last included."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def curve(key: str, rows: list[dict], config: dict) -> dict | None:
    """One metric as columns for the page: steps, values, intervals, and the moving mean of long training curves.

    At most MAX_POINTS steps, evenly spaced; the mean is taken over all steps. None if no row has the metric.
    """
    table = plotter.by_step(rows, key)
    if not table:
        return None
    row_of = {row["step"]: row for row in rows if key in row}
    steps = evenly_spaced(sorted(table), MAX_POINTS)
    intervals = [interval(key, table[step], row_of[step], config) for step in steps]
    values = np.array([[table[step] for step in sorted(table)]])  # (1, S): the moving mean works on rows
    mean = None
    if values.size > 20 and not key.startswith("eval/"):
        window = plotter.smoothing_window([plotter.Group("", [rows])])
        smoothed = dict(zip(sorted(table), plotter.smooth(values, window)[0], strict=True))
        mean = [to_number(smoothed[step]) for step in steps]
    return {
        "key": key,
        "steps": steps,
        "values": [to_number(table[step]) for step in steps],
        "intervals": [ends and [to_number(end) for end in ends] for ends in intervals],
        "mean": mean,
    }


def unknown_keys(rows: list[dict], prefix: str | None) -> list[str]:
    """The metrics that begin with the prefix and that no panel names, in alphabetical order."""
    known = {key for panels in SECTIONS.values() for panel in panels for key in panel.keys}
    return sorted({key for row in rows for key in row if prefix and key.startswith(prefix)} - known)


def chart_sections(rows: list[dict], config: dict) -> list[dict]:
    """The panels that have data, under their headings: [{"heading", "panels": [{"title", "unit", "curves"...}]}]."""
    sections, explanations = [], read_explanations()
    for heading, panels in SECTIONS.items():
        drawn = []
        for panel in panels:
            keys = [*panel.keys, *unknown_keys(rows, panel.prefix)]
            curves = [c for key in keys if (c := curve(key, rows, config))]
            for c in curves:
                c["what"] = explanations[heading].get(c["key"], f"a reward of the user's file: {c['key']}")
            if curves:
                drawn.append({"title": panel.title, "unit": panel.unit, "percent": panel.percent, "curves": curves})
        if drawn:
            sections.append({"heading": heading, "panels": drawn})
    return sections
