"""One page about one run: report.html, a single file that opens anywhere, without a network.

    python -m tracking.report runs/tiny

It is made from what the run wrote down (metrics.jsonl, samples.jsonl, args.json), so it also works on a run that still
goes on or was killed: curves with intervals, what the model wrote and what it was paid for it, the same problems before
and after, what is healthy and what is not. The lines under the curves come from metrics.md.

From top to bottom: the curves, health findings, samples, configuration, the page. Model text gets into the page as a
block of JSON that the browser does not run, and from there into the document as textContent, never as markup.

Left out on purpose: several runs on one page (plotter.py draws those), plotting libraries.
"""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.page import number
from evaluator import wilson_interval
from tracking import plotter
from tracking.run_config import PRESETS, GRPOConfig

MAX_POINTS = 1000  # of a curve
MAX_STEPS = 50  # with samples, where not all of them fit
SAMPLE_BYTES = 20_000_000  # of JSON, all samples together
MAX_CHARS = 20_000  # of one text
MAX_TOKENS = 4_000  # of an answer whose tokens are shown one by one

# ---------------------------------------------------------------- curves


class Panel(NamedTuple):
    title: str
    unit: str
    keys: tuple[str, ...]
    percent: bool = False


def both(*names: str) -> tuple[str, ...]:
    """The metrics of the training samples and, of the same name, of the test split."""
    return tuple(prefix + name for name in names for prefix in ("", "eval/"))


# The headings of metrics.md, and under each the panels that its metrics are drawn in.
GROUPS = {
    "Reward": [
        Panel("Total reward", "points, weighted", ("reward",)),
        Panel(
            "Parts of the reward",
            "points before weighting",
            ("reward/accuracy", "reward/format", "reward/tag_count", "reward/integer"),
        ),
    ],
    "Accuracy and format": [
        Panel("Accuracy", "share of answers", both("accuracy"), True),
        Panel(
            "Held-out accuracy, measured otherwise",
            "share of answers",
            ("eval/accuracy_greedy", "eval/accuracy_flexible", "eval/accuracy_soft"),
            True,
        ),
        Panel("Format", "share of answers", both("format_rate"), True),
    ],
    "Length": [
        Panel("Completion length", "tokens", ("completion_length", "eval/length")),
        Panel("Length of answers that ended by themselves", "tokens", both("stopped_length")),
        Panel("Length of right and wrong answers", "tokens", both("length_correct", "length_wrong")),
        Panel("Cut off at the limit", "share of answers", both("truncated_rate"), True),
    ],
    "Exploration": [
        Panel("Entropy", "nats a token", ("entropy",)),
        Panel("Groups of equal rewards", "share of groups", ("zero_std_groups",), True),
        Panel("Mixtures of tokens", "share of positions", (*both("soft_share"), "eval/top_weight"), True),
    ],
    "Behaviour": [
        Panel("Reflection", "share of answers", both("reflect_rate"), True),
        Panel("Words of reflection", "in every 1,000 words", both("reflect_words")),
        Panel("What reflection brings", "difference of shares", both("reflection_lift")),
        Panel("Repetition", "share of 4-grams", both("repetition"), True),
        Panel("Loops", "share of answers", both("loop_rate"), True),
    ],
    "Optimization": [
        Panel("Gradient norm", "before clipping", ("grad_norm",)),
        Panel("Clipped tokens", "share of tokens", ("clip_frac",), True),
        Panel("Log-prob gap to the rollout", "nats a token", ("logprob_gap",)),
        Panel("KL to the reference", "nats a token", ("kl",)),
        Panel("Learning rate", "per update", ("lr",)),
        Panel("Updates", "per step", ("updates", "skipped_updates")),
        Panel("Micro-batch", "padded tokens", ("tokens_per_micro_batch",)),
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
# Shares of independent things, so that Wilson's interval holds. Answers to one problem are not independent: their
# number is taken to be that of the problems.
RATES = {
    *both("accuracy", "format_rate", "truncated_rate", "reflect_rate", "loop_rate"),
    *("zero_std_groups", "eval/accuracy_greedy", "eval/accuracy_flexible", "eval/accuracy_soft"),
}


def read_explanations(file: Path | None = None) -> dict[str, dict[str, str]]:
    """{heading: {metric: what it is}} of metrics.md: the first two columns of its tables."""
    text = (file or Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    explanations = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        rows = re.findall(r"^\| (`.+?`) \| (.+?) \|", body, flags=re.MULTILINE)
        explanations[heading] = {name: what for names, what in rows for name in re.findall(r"`(.+?)`", names)}
    return explanations


def interval(key: str, value: float, row: dict, config: dict) -> tuple[float, float] | None:
    """The 95 % interval of a metric's value in that row; None if it is no rate, or of an unknown number of problems."""
    n = row.get("eval/n") if key.startswith("eval/") else config.get("problems_per_step")
    if key not in RATES or not isinstance(n, int) or not 0 <= value <= 1:
        return None
    return wilson_interval(value * n, n)


def curve(key: str, rows: list[dict], config: dict) -> dict | None:
    """One metric as columns of numbers for the page; None if no row has it. mean: a moving mean, for noisy curves."""
    table = plotter.by_step(rows, key)
    if not table:
        return None
    row_of = {row["step"]: row for row in rows if key in row}
    steps = evenly(sorted(table), MAX_POINTS)
    intervals = [interval(key, table[step], row_of[step], config) for step in steps]
    values = np.array([[table[step] for step in sorted(table)]])
    mean = None
    if values.size > 20 and not key.startswith("eval/"):
        window = plotter.smoothing_window([plotter.Group("", [rows])])
        smoothed = dict(zip(sorted(table), plotter.smooth(values, window)[0], strict=True))
        mean = [number(smoothed[step]) for step in steps]
    return {
        "key": key,
        "steps": steps,
        "values": [number(table[step]) for step in steps],
        "intervals": [i and [number(end) for end in i] for i in intervals],
        "mean": mean,
    }


def evenly(items: list, limit: int) -> list:
    """At most `limit` (2 or more) of the items, evenly spread, the first and the last among them."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def draw_groups(rows: list[dict], config: dict) -> list[dict]:
    """The panels that have something to show, under their headings."""
    groups, explanations = [], read_explanations()
    for heading, panels in GROUPS.items():
        drawn = []
        for panel in panels:
            curves = [c for key in panel.keys if (c := curve(key, rows, config))]
            for c in curves:
                c["what"] = explanations[heading][c["key"]]
            if curves:
                drawn.append({"title": panel.title, "unit": panel.unit, "percent": panel.percent, "curves": curves})
        if drawn:
            groups.append({"heading": heading, "panels": drawn})
    return groups


# ---------------------------------------------------------------- health


class Finding(NamedTuple):
    """What one look at the run says. rule: when it counts as sick; advice: what to try then."""

    title: str
    sick: bool
    seen: str
    rule: str
    advice: str


LATE = 4  # "late" means the last fourth of the steps, "early" the first


def early_and_late(rows: list[dict], key: str) -> tuple[float, float] | None:
    """Means of a metric over the first and the last fourth of the steps that have it."""
    values = list(plotter.by_step(rows, key).values())
    share = max(1, len(values) // LATE)
    return (float(np.mean(values[:share])), float(np.mean(values[-share:]))) if values else None


def zero_variance(rows: list[dict]) -> Finding | None:
    """Do groups still have something to compare?"""
    if not (share := early_and_late(rows, "zero_std_groups")):
        return None
    solved = early_and_late(rows, "accuracy")[1] >= 0.8
    advice = "a lower --learning_rate and a higher --temperature keep variety; --group_size 16 finds rarer answers"
    if solved:
        advice = "the problems are solved: stop here, or go on with harder ones (--dataset_path)"
    elif early_and_late(rows, "accuracy")[1] <= 0.1:
        advice = "nearly all answers are wrong: easier problems, a stronger model, or tag_count:0.5 in --rewards"
    seen = f"late in the run, {share[1]:.0%} of the groups got one reward for all their answers and taught nothing"
    return Finding("Groups to learn from", share[1] > 0.7, seen, "sick above 70%", advice)


def truncation(rows: list[dict]) -> Finding | None:
    """Do answers fit?"""
    if not (share := early_and_late(rows, "truncated_rate")):
        return None
    advice = "raise --max_completion_length; --mask_truncated keeps cut answers from being punished; see the loops"
    seen = f"late in the run, {share[1]:.1%} of the answers were cut off at the length limit"
    return Finding("Truncation", share[1] > 0.1, seen, "sick above 10%", advice)


def entropy_collapse(rows: list[dict]) -> Finding | None:
    """Has the policy stopped trying things before it was done?"""
    entropy, accuracy = early_and_late(rows, "entropy"), early_and_late(rows, "accuracy")
    if entropy is None or len(plotter.by_step(rows, "entropy")) < 2 * LATE:
        return None
    sick = entropy[1] < 0.1 * entropy[0] and accuracy[1] < 0.9
    advice = "lower --learning_rate, raise --clip_high to 0.28, or hold the policy near its start with --beta 0.01"
    seen = f"entropy went from {entropy[0]:.3g} to {entropy[1]:.3g} nats a token at {accuracy[1]:.0%} training accuracy"
    return Finding("Entropy", sick, seen, "sick below a tenth of its start, unless accuracy is 90% or more", advice)


def kl_drift(rows: list[dict]) -> Finding | None:
    """How far has the policy gone from the reference?"""
    if not (kl := early_and_late(rows, "kl")):
        return None
    advice = "raise --beta, lower --learning_rate, or move the reference along with --reference_refresh_steps"
    seen = f"late in the run, the KL to the reference was {kl[1]:.3g} nats a token"
    return Finding("KL to the reference", kl[1] > 0.5, seen, "sick above 0.5 nats", advice)


def sampler_gap(rows: list[dict]) -> Finding | None:
    """Is what is trained what sampled?"""
    if not (gap := early_and_late(rows, "logprob_gap")):
        return None
    advice = "correct for it with --rollout_is_cap 2, or sample in fp32 with --bf16 false"
    seen = f"training's log-probs were {gap[1]:.1e} nats a token from those of sampling"
    return Finding("Log-prob gap", gap[1] > 0.05, seen, "sick above 0.05 nats", advice)


def skipped(rows: list[dict]) -> Finding | None:
    """Were all gradients finite?"""
    counts = plotter.by_step(rows, "skipped_updates")
    if not counts:
        return None
    total, steps = int(sum(counts.values())), [step for step, count in counts.items() if count]
    seen = "every update was finite"
    if total:
        seen = f"updates left out because their gradient was not finite: {total}, the first in step {steps[0]}"
    advice = "lower --learning_rate or --max_grad_norm, lengthen --warmup_steps"
    return Finding("Skipped updates", total > 0, seen, "sick above 0", advice)


def format_learned(rows: list[dict]) -> Finding | None:
    """Does the model keep the asked-for form?"""
    if not (share := early_and_late(rows, "format_rate")):
        return None
    advice = "put format:0.5 or, for a slope towards it, tag_count:0.5 into --rewards; try --prefill, --stop_at_answer"
    seen = f"late in the run, {share[1]:.0%} of the answers had the asked-for form (at first {share[0]:.0%})"
    return Finding("Format", share[1] < 0.8, seen, "sick below 80%", advice)


def evaluations(rows: list[dict]) -> list[dict]:
    return [row for row in rows if {"eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"} <= row.keys()]


def accuracy_fell(rows: list[dict]) -> Finding | None:
    """Is the end as good as the best?"""
    if len(results := evaluations(rows)) < 2:
        return None
    last, peak = results[-1], max(results, key=lambda row: (row["eval/accuracy"], row["step"]))
    seen = "the last held-out accuracy is the highest"
    if peak is not last:
        seen = (
            f"held-out accuracy was {peak['eval/accuracy']:.1%} after step {peak['step']} and is "
            f"{last['eval/accuracy']:.1%} after step {last['step']}"
        )
    sick = last["eval/accuracy_high"] < peak["eval/accuracy_low"]
    advice = "lower --learning_rate or --final_lr_fraction, add --beta 0.01, read samples of the steps after the peak"
    rule = "sick if the last interval lies below the peak's"
    return Finding("Accuracy after its peak", sick, seen, rule, advice)


def learned(rows: list[dict]) -> Finding | None:
    """Is the model better than before?"""
    if len(results := evaluations(rows)) < 2:
        return None
    first, last = results[0], results[-1]
    seen = f"held-out accuracy went from {first['eval/accuracy']:.1%} to {last['eval/accuracy']:.1%}"
    sick = last["eval/accuracy_low"] <= first["eval/accuracy_high"]
    advice = "more steps, another --learning_rate, more --eval_problems to see smaller gains; first the findings above"
    rule = "sick if the last interval does not lie above the first"
    return Finding("Learning", sick, seen, rule, advice)


CHECKS = (
    learned, accuracy_fell, format_learned, zero_variance, truncation, entropy_collapse, kl_drift, sampler_gap, skipped,
)  # fmt: skip


def find_health(rows: list[dict]) -> list[Finding]:
    """What can be said from the rows of metrics.jsonl, the sick first."""
    findings = [finding for check in CHECKS if (finding := check(rows))]
    return sorted(findings, key=lambda finding: not finding.sick)


# ---------------------------------------------------------------- samples


@dataclasses.dataclass
class Group:
    """Where the answers to one problem of a step are in samples.jsonl."""

    offsets: list[int]
    size: int  # bytes that they will take, about
    has_tokens: bool


def read_rows(file: Path):
    """(offset, size, row) of every whole row of samples.jsonl; a line that a killed run left half-written is no row."""
    offset = 0
    with open(file, "rb") as lines:
        for line in lines:
            row = parse_row(line)
            if row:
                yield offset, len(line), row
            offset += len(line)


def parse_row(line: bytes) -> dict | None:
    """None if the line is not whole, or lacks the step, the problem or the answer. Python's NaN and Infinity,
    which no browser reads, become None."""
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except ValueError:
        return None
    named = isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("completion"), str)
    asked = "prompt" if named and row.get("split") == "train" else "question"
    return row if named and isinstance(row.get(asked), str) else None


def index_samples(file: Path, group_size: int | None) -> tuple[dict[int, list[Group]], dict[int, list[dict]]]:
    """({step: its groups}, {step: the test rows} of the first and the last evaluation)."""
    groups, tests, previous = {}, {}, None
    for offset, size, row in read_rows(file) if file.exists() else ():
        step = row["step"]
        if row["split"] != "train":
            tests.setdefault(step, []).append(row)
            for between in sorted(tests)[1:-1]:
                del tests[between]
            continue
        of_step = groups.setdefault(step, [])
        if previous != (step, row["prompt"]) or len(of_step[-1].offsets) == group_size:
            of_step.append(Group([], len(row["prompt"]), has_tokens(row)))
            previous = (step, row["prompt"])
        of_step[-1].offsets.append(offset)
        of_step[-1].size += size - len(row["prompt"])
    return groups, tests


def has_tokens(row: dict) -> bool:
    """Whether a row has its tokens one by one, and few enough to show."""
    tokens = row.get("tokens")
    lists = [tokens, row.get("logprobs"), row.get("entropy"), row.get("ratio")]
    return all(isinstance(x, list) and len(x) == len(tokens) for x in lists) and len(tokens) <= MAX_TOKENS


def cut(text: str) -> str:
    """The text without its middle, if it is long."""
    if len(text) <= MAX_CHARS:
        return text
    half = MAX_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out here ...]\n{text[-half:]}"


def to_json(value) -> str:
    """JSON for a script block, which only "<" could end."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def read_group(source, group: Group) -> str:
    """The answers to one problem, as JSON: the problem once, then what differs."""
    rows = []
    for offset in group.offsets:
        source.seek(offset)
        rows.append(parse_row(source.readline()))
    answers = []
    for row in rows:
        answer = {name: row.get(name) for name in ("reward", "advantage", "finish", "length")}
        answer["parts"] = {k.removeprefix("reward/"): v for k, v in row.items() if k.startswith("reward/")}
        answer["text"] = cut(row["completion"])
        if has_tokens(row):
            answer["tokens"] = row["tokens"]
            for name in ("logprobs", "entropy", "ratio"):
                answer[name] = [x if x is None else float(f"{x:.4g}") for x in row[name]]
        answers.append(answer)
    return to_json({"prompt": cut(rows[0]["prompt"]), "gold": rows[0].get("gold"), "answers": answers})


def choose_steps(groups: dict[int, list[Group]]) -> list[int]:
    """The steps to show samples of, the first and the last first: all, if all fit; else some, half of them such as
    have tokens one by one."""
    steps = sorted(groups)
    if sum(group.size for step in steps for group in groups[step]) > SAMPLE_BYTES:
        detailed = [step for step in steps if any(group.has_tokens for group in groups[step])]
        detailed = evenly(detailed, MAX_STEPS // 2)
        steps = sorted({*detailed, *evenly(steps, MAX_STEPS - len(detailed))})
    return steps[:1] + steps[-1:] * (len(steps) > 1) + steps[1:-1]


def keep_samples(file: Path, groups: dict[int, list[Group]]) -> dict[int, list[str]]:
    """{step: its groups as JSON}: the first group of every chosen step, then the second..., while there is room."""
    steps = choose_steps(groups)
    kept, room = {step: [] for step in steps}, SAMPLE_BYTES
    for place in range(max((len(groups[step]) for step in steps), default=0)):
        with open(file, "rb") as source:
            for step in steps:
                if place < len(groups[step]) and room > 0:
                    text = read_group(source, groups[step][place])
                    room -= len(text)
                    if room > 0:
                        kept[step].append(text)
    return {step: kept[step] for step in sorted(kept) if kept[step]}


def samples_note(groups: dict[int, list[Group]], kept: dict[int, list[str]]) -> str:
    """One sentence for above the samples."""
    if not kept:
        return "No samples yet."
    have, show = sum(map(len, groups.values())), sum(map(len, kept.values()))
    if have == show:
        return f"All {show:,} groups of {len(groups):,} steps are here."
    return (
        f"Thinned, to keep this page small: {show:,} of {have:,} groups, from {len(kept):,} of {len(groups):,} steps "
        f"(evenly spread). samples.jsonl has the others."
    )


def pair_tests(tests: dict[int, list[dict]]) -> dict:
    """The test problems of the first and of the last evaluation with their answers: {"steps", "pairs"}."""
    steps = sorted(tests)
    sides = [{row["question"]: row for row in tests[step]} for step in steps]
    pairs = []
    for question, row in (sides[0] if sides else {}).items():
        answers = [side.get(question) for side in sides]
        shown = [
            a and {"text": cut(a["completion"]), **{k: a.get(k) for k in ("correct", "length", "finish")}}
            for a in answers
        ]
        pairs.append({"question": cut(question), "gold": row.get("gold"), "answers": shown})
    return {"steps": steps, "pairs": pairs}


# ---------------------------------------------------------------- configuration


def compare_config(config: dict) -> list[dict]:
    """Every setting with its value, its default and where the value comes from, those that differ first."""
    fields = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    preset = PRESETS.get(config.get("preset"), {})
    rows = []
    for name, value in config.items():
        if name not in fields:
            origin, default = "unknown to this version", None
        else:
            default = fields[name].default
            origin = "default"
            if value != default:
                origin = f"preset {config['preset']}" if preset.get(name) == value else "command line"
        what = fields[name].metadata.get("help", "") if name in fields else ""
        rows.append({"name": name, "value": value, "default": default, "origin": origin, "what": what})
    return sorted(rows, key=lambda row: row["origin"] == "default")


def headline(rows: list[dict], args: dict) -> dict:
    """What run this is, how far it is, and its accuracy before and after."""
    config = args["config"]
    done = rows[-1]["step"] if rows else 0
    max_steps = config.get("max_steps")
    facts = {
        "preset": config.get("preset"),
        "model": config.get("model_name"),
        "dataset": config.get("dataset_path") or config.get("dataset_name"),
        "steps": f"{done} of {max_steps}" + ("" if done == max_steps else " (unfinished)"),
        "device": args.get("device"),
        "seed": config.get("seed"),
    }
    if config.get("control", "none") != "none":
        facts["control"] = config["control"]
    results, measures = evaluations(rows), []
    ends = results[:1] + results[1:][-1:]  # before and after; one where there is one
    names = {"accuracy": "sampled", "accuracy_greedy": "greedy", "accuracy_soft": "soft", "format_rate": "format"}
    for key, name in names.items():
        cells = []
        for row in ends:
            value = row.get(f"eval/{key}")
            cells.append(value if value is None else [value, *(interval(f"eval/{key}", value, row, config) or ())])
        if any(cells):
            measures.append({"name": name, "cells": cells})
    n = ends[-1].get("eval/n") if ends else None
    return {"facts": facts, "measures": measures, "steps": [row["step"] for row in ends], "n": n}


# ---------------------------------------------------------------- the page


def make_report(folder: str | Path) -> Path:
    """Writes report.html into a run's folder; returns its path. Raises ValueError, one line, if no run is there."""
    folder = Path(folder)
    args, rows = read_run(folder)
    config = args["config"]
    samples = folder / "samples.jsonl"
    groups, tests = index_samples(samples, config.get("group_size"))
    kept = keep_samples(samples, groups)
    data = {
        "name": folder.resolve().name,
        "headline": headline(rows, args),
        "findings": [finding._asdict() for finding in find_health(rows)],
        "groups": draw_groups(rows, config),
        "sample_steps": list(kept),
        "kept": samples_note(groups, kept),
        "tests": pair_tests(tests),
        "config": compare_config(config),
        "made_with": {k: v for k, v in {**args, **args.get("versions", {})}.items() if k not in ("config", "versions")},
    }
    blocks = {"data": to_json(data)} | {f"step{step}": f"[{','.join(texts)}]" for step, texts in kept.items()}
    before, _, after = PAGE.partition("__BLOCKS__")
    page = folder / "report.html"
    temporary = folder / f".report.{os.getpid()}.tmp"
    try:  # whoever looks at it meanwhile sees the old page or the new one
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(before)
            out.writelines(f'<script type="application/json" id="{name}">{b}</script>\n' for name, b in blocks.items())
            out.write(after)
        os.replace(temporary, page)
    finally:
        temporary.unlink(missing_ok=True)
    return page


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """(args.json, the rows of metrics.jsonl: none if it is not there yet)."""
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no run of main.py is here (args.json cannot be read: {error})") from error
    if not isinstance(args, dict) or not isinstance(args.get("config"), dict):
        raise ValueError(f"{folder}: no run of main.py is here (args.json holds no config)")
    if args["config"].get("eval_only"):
        raise ValueError(f"{folder}: a measurement by --eval_only, without training; its results are in eval.json")
    try:
        return args, plotter.read_metrics(folder)
    except FileNotFoundError:
        return args, []


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>GRPO run</title>
<style>
:root {
  color-scheme: light dark;
  --page: light-dark(#ffffff, #15171c); --ink: light-dark(#1c1e21, #e4e6ea); --soft-ink: light-dark(#59606a, #a0a8b3);
  --line: light-dark(#d9dde2, #343a44); --panel: light-dark(#f5f7f9, #1d2027);
  --c0: light-dark(#0072b2, #56b4e9); --c1: light-dark(#b34700, #ff8c42); --c2: light-dark(#007a58, #3fc79a);
  --c3: light-dark(#9a4c7d, #d98fbd);
  --good: var(--c0); --bad: var(--c1);
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0 auto; padding: 1rem clamp(.7rem, 2vw, 1.5rem) 4rem; max-width: 90rem; background: var(--page);
       color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.4rem 0 .5rem; color: var(--soft-ink); }
h4 { font-size: .95rem; margin: 0; }
p { margin: .3rem 0; max-width: 75ch; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .6rem 0; }
a { color: var(--c0); }
.soft { color: var(--soft-ink); }
.facts { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .3rem 0; }
.facts b { font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft-ink); font-weight: 600; }
th, td { padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.measures td { font-size: 1.15rem; white-space: nowrap; }
.measures small { display: block; }
.measures small, .measures th { font-size: .85rem; color: var(--soft-ink); }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem; background: var(--panel);
        min-width: 0; }
.finding { border-left: 4px solid var(--good); }
.finding.sick { border-left-color: var(--bad); }
.badge { font-size: .78rem; font-weight: 600; padding: .05rem .45rem; border-radius: 3px; border: 1px solid;
         color: var(--good); margin-right: .5rem; }
.sick .badge, .badge.wrong { color: var(--bad); }
.finding p { font-size: .92rem; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { font-size: 11px; fill: var(--soft-ink); }
svg .rule { stroke: var(--line); } svg .cursor { stroke: var(--soft-ink); stroke-dasharray: 3 3; }
.readout { font-size: .85rem; min-height: 3em; font-variant-numeric: tabular-nums; }
.legend { list-style: none; margin: .4rem 0 0; padding: 0; font-size: .83rem; color: var(--soft-ink); }
.legend li { padding-left: 1.3rem; text-indent: -1.3rem; }
.swatch { display: inline-block; width: .9rem; height: .2rem; margin-right: .4rem; vertical-align: middle; }
code, .text, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
code { color: var(--ink); font-size: .92em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font-size: .86rem; line-height: 1.6;
        margin: .5rem 0 0; max-height: 26rem; overflow-y: auto; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1.5rem; align-items: center; margin: .6rem 0; }
.controls label { display: flex; flex-wrap: wrap; gap: .2rem .6rem; align-items: center; max-width: 100%; }
input[type="range"] { width: min(26rem, 80vw); accent-color: var(--c0); }
select, button { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
                 border-radius: 4px; padding: .2rem .5rem; max-width: 100%; }
#problem { width: min(40rem, 100%); }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
.answer { border-top: 4px solid color-mix(in srgb, var(--hue) var(--strength), var(--line)); }
.scores { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .85rem; font-variant-numeric: tabular-nums; }
.scores .advantage { font-weight: 700; color: var(--hue); }
#token { position: sticky; top: 0; background: var(--page); padding: .3rem 0; }
.token, .question { unicode-bidi: isolate; }
.token { border-radius: 2px; background: color-mix(in srgb, var(--hue) var(--strength), transparent); }
.token.current { outline: 2px solid var(--ink); }
details > summary { cursor: pointer; }
.origin { white-space: nowrap; }
td.value { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .86rem; }
td.soft { min-width: 14rem; }
</style>
</head>
<body>
<header><h1 id="name"></h1><div class="facts" id="facts"></div></header>
<div class="scroll"><table class="measures" id="measures"></table></div>
<p class="soft" id="note"></p>
<nav><a href="#health">Health</a><a href="#curves">Curves</a><a href="#samples">Groups</a>
  <a href="#pairs">Before and after</a><a href="#settings">Configuration</a></nav>
<noscript>This page draws itself with the script inside it, which is switched off here.</noscript>
<h2 id="health">Health</h2><div class="grid" id="findings"></div>
<h2 id="curves">Curves</h2>
<p class="soft">Hover, or focus a picture and use the arrow keys, to read values. Bands: 95 % Wilson intervals, where n
  is the number of problems. Bold: moving mean; faint: each step.</p>
<div id="charts"></div>
<h2 id="samples">Groups: answers to one problem, and what they were paid</h2>
<p class="soft" id="kept"></p>
<div id="viewer">
  <div class="controls">
    <label>Step <input type="range" id="step" min="0" value="0"> <output id="step-name"></output></label>
    <label>Problem <select id="problem"></select></label>
    <label id="shade-label">Shade tokens by <select id="shade"></select></label>
  </div>
  <div class="card"><b>Problem</b> <span id="gold"></span><div class="text" id="prompt"></div></div>
  <p class="readout" id="token" role="status"></p>
  <div class="grid" id="answers"></div>
</div>
<h2 id="pairs">The same held-out problems, before and after</h2>
<p class="soft" id="pairs-note"></p><div id="tests"></div>
<h2 id="settings">Configuration</h2><div class="facts" id="made-with"></div>
<div class="scroll"><table id="changed"></table></div>
<details><summary>Settings at their defaults</summary><div class="scroll"><table id="unchanged"></table></div></details>
__BLOCKS__
<script>
"use strict";
const get = (id) => document.getElementById(id);
const block = (id) => JSON.parse(get(id).textContent);
const data = block("data");

// Everything that comes out of the blocks goes through here: as text, never as markup.
function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content.map((item) => (item instanceof Node ? item : printed(String(item)))));
  return element;
}
// Control characters are written out: some show nothing, some turn the direction of the text around them.
const controls = /[\0-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]|\p{Surrogate}/gu;
function printed(text) {
  return text.replace(controls, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}
const one = (text, limit) => (text.length > limit ? text.slice(0, limit - 1) + "…" : text);
const percent = (x) => (100 * x).toFixed(1) + "%";
function short(x) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? x.toExponential(1) : String(Number(x.toPrecision(4)));
}
const ending = ({ finish, length }) => `${finish === "length" ? "cut off" : "stopped"} after ${length} tokens`;
const signed = (x) => (x > 0 ? "+" : "") + short(x);

// ---- the head

document.title = "Run " + data.name;
get("name").textContent = printed("Run " + data.name);
function writeFacts(id, facts) {
  for (const [name, value] of Object.entries(facts))
    get(id).append(make("span", "", make("span", "soft", name + " "), make("b", "", value ?? "–")));
}
const { headline } = data;
writeFacts("facts", headline.facts);
if (headline.measures.length) {
  const steps = headline.steps.map((step) => make("th", "", `after step ${step}`));
  get("measures").append(make("tr", "", make("th", "", "on the test split"), ...steps));
  for (const { name, cells } of headline.measures) {
    const shown = cells.map((cell) => {
      const [value, low, high] = cell ?? [];
      if (value === undefined) return make("td", "", "–");
      const range = low === undefined ? "" : ` [${percent(low)}, ${percent(high)}]`;
      return make("td", "", percent(value), make("small", "", range));
    });
    get("measures").append(make("tr", "", make("th", "", name), ...shown));
  }
  get("note").textContent = `${headline.n} test problems, 95 % Wilson intervals; report the sampled accuracy.`;
} else get("note").textContent = "No evaluation yet.";

// ---- health

for (const { title, sick, seen, rule, advice } of data.findings) {
  const card = make("div", "card finding" + (sick ? " sick" : ""));
  card.append(make("h4", "", make("span", "badge", sick ? "look here" : "healthy"), title), make("p", "", seen),
    make("p", "soft", "(" + rule + ")"));
  if (sick) card.append(make("p", "", make("b", "", "Try: "), advice));
  get("findings").append(card);
}
if (!data.findings.length) get("findings").append(make("p", "soft", "Nothing has been logged yet."));

// ---- curves

const W = 420, H = 200, LEFT = 52, RIGHT = 16, TOP = 8, BOTTOM = 22;

function shape(parent, tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const gap = [1, 2, 5, 10].map((m) => m * power).find((g) => g >= raw);
  const found = [];
  for (let i = Math.ceil(low / gap); i * gap <= high + 1e-9 * gap; i++) found.push(i * gap);
  return found;
}

function drawPanel({ title, unit, percent: isShare, curves }) {
  const write = isShare ? percent : short;
  const steps = [...new Set(curves.flatMap((c) => c.steps))].sort((a, b) => a - b);
  const first = steps[0], last = steps.at(-1);
  const all = curves.flatMap((c) => [...c.values, ...c.intervals.flatMap((i) => i ?? [])]);
  const low = Math.min(0, ...all), high = Math.max(...all) > low ? Math.max(...all) * 1.04 : low + 1;
  const x = (step) => LEFT + (W - LEFT - RIGHT) * (last > first ? (step - first) / (last - first) : 0.5);
  const y = (value) => TOP + (H - TOP - BOTTOM) * (1 - (value - low) / (high - low));
  const picture = shape(document.createElement("div"), "svg", { viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "img" });
  picture.setAttribute("aria-label", `${title}, steps ${first} to ${last}; arrow keys read values`);
  for (const tick of ticks(low, high, 6)) {
    shape(picture, "line", { class: "rule", x1: LEFT, x2: W - RIGHT, y1: y(tick), y2: y(tick) });
    const name = isShare ? short(100 * tick) + "%" : short(tick);
    shape(picture, "text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, name);
  }
  for (const tick of last > first ? ticks(first, last, 5).filter(Number.isInteger) : [first])
    shape(picture, "text", { x: x(tick), y: H - 6, "text-anchor": "middle" }, tick);
  const legend = make("ul", "legend");
  curves.forEach((c, i) => {
    const color = `var(--c${i % 4})`, points = c.steps.map((step, t) => [x(step), y(c.values[t])]);
    const ends = c.steps.flatMap((step, t) => (c.intervals[t] ? [[x(step), ...c.intervals[t].map(y)]] : []));
    const band = [...ends.map(([at, bottom]) => [at, bottom]), ...ends.map(([at, , top]) => [at, top]).reverse()];
    if (ends.length > 1) shape(picture, "polygon", { points: band.join(" "), style: `fill: ${color}; opacity: .15` });
    if (ends.length === 1) {
      const [at, bottom, top] = ends[0];
      shape(picture, "line", { x1: at, x2: at, y1: bottom, y2: top, style: `stroke: ${color}; opacity: .5` });
    }
    const line = (where, width, opacity) => shape(picture, "polyline",
      { points: where.join(" "), style: `fill: none; stroke: ${color}; stroke-width: ${width}; opacity: ${opacity}` });
    line(points, c.mean ? 0.8 : 1.8, c.mean ? 0.4 : 1);
    if (c.mean) line(c.steps.map((step, t) => [x(step), y(c.mean[t])]), 2, 1);
    if (points.length <= 30)
      for (const [cx, cy] of points) shape(picture, "circle", { cx, cy, r: 2.5, style: `fill: ${color}` });
    const swatch = make("span", "swatch");
    swatch.style.background = color;
    legend.append(make("li", "", swatch, make("code", "", c.key), " " + c.what.replaceAll("`", "")));
  });
  const cursor = shape(picture, "line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  const readout = make("div", "readout");
  let current = steps.length - 1;
  function read(place) {
    current = Math.min(Math.max(place, 0), steps.length - 1);
    const step = steps[current];
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(step));
    cursor.setAttribute("visibility", "visible");
    const values = curves.flatMap((c) => {
      const t = c.steps.indexOf(step);
      if (t < 0) return [];
      const range = c.intervals[t] ? ` [${c.intervals[t].map(write).join(", ")}]` : "";
      return [`${c.key} ${write(c.values[t])}${range}`];
    });
    readout.textContent = `step ${step}: ${values.join(", ")}`;
  }
  function rest() {
    read(steps.length - 1);
    cursor.setAttribute("visibility", "hidden");
  }
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * W;
    const distances = steps.map((step) => Math.abs(x(step) - at));
    read(distances.indexOf(Math.min(...distances)));
  });
  picture.addEventListener("pointerleave", rest);
  picture.addEventListener("focus", () => read(current));
  picture.addEventListener("blur", rest);
  picture.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: steps.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    read(moves[event.key]);
  });
  rest();
  return make("div", "card chart", make("h4", "", title), make("div", "soft", unit), picture, readout, legend);
}

for (const { heading, panels } of data.groups)
  get("charts").append(make("h3", "", heading), make("div", "grid", ...panels.map(drawPanel)));
if (!data.groups.length) get("charts").append(make("p", "soft", "Nothing has been logged yet."));

// ---- groups: only the one that is shown is in the document

const shades = {  // level: how far a token stands out, from -1 to 1
  "log-prob": { level: (a, t) => -(a.logprobs[t] ?? 0) / 4, key: "strongest: p of 0.02 or less when it was sampled" },
  entropy: { level: (a, t) => (a.entropy[t] ?? 0) / 2, key: "strongest: 2 nats or more when it was sampled" },
  ratio: { level: (a, t) => Math.log(a.ratio[t] ?? 1) / Math.log(1.5), key: "p after the step's updates / p when " +
    "sampled; blue: likelier, orange: less likely, strongest by half or more" },
  nothing: { level: () => 0, key: "" },
};
for (const name of Object.keys(shades)) get("shade").append(make("option", "", name));

let groups = [];

function colour(element, level) {
  element.style.setProperty("--hue", level < 0 ? "var(--bad)" : "var(--good)");
  element.style.setProperty("--strength", 50 * Math.min(1, Math.abs(level)) + "%");
}

function showStep() {
  const step = data.sample_steps[get("step").value];
  get("step-name").textContent = step;
  get("step").setAttribute("aria-valuetext", "step " + step);
  groups = block("step" + step);
  const before = get("problem").selectedIndex;
  get("problem").replaceChildren(...groups.map(({ prompt, answers }, i) => {
    const mean = answers.reduce((sum, answer) => sum + (answer.reward ?? 0), 0) / answers.length;
    const detail = answers.some((answer) => answer.tokens) ? ", with tokens" : "";
    const question = one(prompt.replace(/<\|.*?\|>(user|system|assistant)?/g, " ").replace(/\s+/g, " ").trim(), 90);
    return make("option", "", `${i + 1} of ${groups.length} (mean reward ${short(mean)}${detail}): ${question}`);
  }));
  get("problem").selectedIndex = Math.min(Math.max(before, 0), groups.length - 1);
  showGroup();
}

function showGroup() {
  const group = groups[get("problem").selectedIndex];
  get("prompt").textContent = printed(group.prompt);
  get("gold").textContent = printed(`(right answer: ${group.gold ?? "unknown"})`);
  get("shade-label").hidden = !group.answers.some((answer) => answer.tokens);
  get("token").hidden = get("shade-label").hidden;
  const largest = Math.max(...group.answers.map((answer) => Math.abs(answer.advantage ?? 0)), 1e-9);
  get("answers").replaceChildren(...group.answers.map((answer, i) => {
    const card = make("article", "card answer"), scores = make("div", "scores");
    colour(card, (answer.advantage ?? 0) / largest * 2.5);
    scores.append(make("b", "", `answer ${i + 1}`), make("span", "advantage", "advantage " + signed(answer.advantage)),
      make("span", "", "reward " + short(answer.reward)));
    const parts = Object.entries(answer.parts).map(([name, value]) => `${name} ${short(value)}`);
    scores.append(...[...parts, ending(answer)].map((text) => make("span", "soft", text)));
    card.append(scores, answer.tokens ? tokenText(answer) : make("div", "text", answer.text || "(empty)"));
    return card;
  }));
  shade();
}

function tokenText(answer) {
  const box = make("div", "text tokens"), spans = answer.tokens.map((token) => make("span", "token", token));
  box.append(...spans);
  box.tabIndex = 0;
  box.setAttribute("aria-label", "Tokens of an answer; arrow keys read values");
  spans.forEach((span, t) => { span.place = t; });
  box.paint = () => spans.forEach((span, t) => colour(span, shades[get("shade").value].level(answer, t)));
  let current = 0;
  function read(t) {
    for (const other of document.querySelectorAll(".token.current")) other.classList.remove("current");
    current = Math.min(Math.max(t, 0), spans.length - 1);
    spans[current].classList.add("current");
    const p = answer.logprobs[current], name = answer.tokens[current];
    get("token").textContent = printed(
      `token ${current + 1} of ${spans.length}, ${JSON.stringify(name)}: ` + (p === null ? "no draw of the policy" :
        `log-prob ${short(p)} (p = ${short(Math.exp(p))})`) +
      `, entropy ${short(answer.entropy[current])} nats, ratio ${short(answer.ratio[current])}`);
  }
  box.addEventListener("pointerover", (event) => { if (event.target.place !== undefined) read(event.target.place); });
  if (spans.length) box.addEventListener("focus", () => read(current));
  box.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !spans.length) return;
    event.preventDefault();
    read(current + move);
  });
  return box;
}

function shade() {
  for (const box of document.querySelectorAll(".tokens")) box.paint();
  get("token").textContent = shades[get("shade").value].key;
}

get("kept").textContent = data.kept;
if (data.sample_steps.length) {
  get("step").max = data.sample_steps.length - 1;
  get("step").addEventListener("input", showStep);
  get("problem").addEventListener("change", showGroup);
  get("shade").addEventListener("change", shade);
  showStep();
} else get("viewer").hidden = true;

// ---- before and after

const { steps: testSteps, pairs } = data.tests;
get("pairs-note").textContent = !pairs.length ? "No evaluation yet." : testSteps.length === 1
  ? `So far there is one evaluation, after step ${testSteps[0]}.` : "Sampled at the training temperature.";
for (const { question, gold, answers } of pairs) {
  const cards = answers.map((answer, i) => {
    const head = make("b", "", `after step ${testSteps[i]} `);
    if (!answer) return make("div", "card", head, "not asked");
    const badge = make("span", "badge" + (answer.correct ? "" : " wrong"), answer.correct ? "✓ right" : "✗ wrong");
    const scores = make("div", "scores", head, badge, make("span", "soft", ending(answer)));
    return make("div", "card", scores, make("div", "text", answer.text || "(empty)"));
  });
  const title = make("h3", "", make("span", "question", question), ` (right answer: ${gold})`);
  get("tests").append(title, make("div", "grid", ...cards));
}

// ---- configuration

writeFacts("made-with", data.made_with);
for (const id of ["changed", "unchanged"]) {
  const rows = data.config.filter((row) => (row.origin !== "default") === (id === "changed"));
  const names = id === "changed" ? ["setting", "value", "default", "set by", ""] : ["setting", "value", ""];
  get(id).append(make("tr", "", ...names.map((name) => make("th", "", name))));
  for (const { name, value, default: before, origin, what } of rows) {
    const cells = [make("td", "value", name), make("td", "value", JSON.stringify(value))];
    if (id === "changed") cells.push(make("td", "value", JSON.stringify(before)), make("td", "origin", origin));
    get(id).append(make("tr", "", ...cells, make("td", "soft", what)));
  }
}
</script>
</body>
</html>
"""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(_complain("give one run's folder: python -m tracking.report runs/tiny"))
    try:
        print(make_report(sys.argv[1]))
    except (ValueError, OSError) as error:
        sys.exit(_complain(error))


def _complain(message) -> int:
    print(f"report.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
