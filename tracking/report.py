"""report.html: one page about one training run, a single file that opens without a network.

    python -m tracking.report runs/tiny

The page is made from args.json, metrics.jsonl and samples.jsonl, so it also works while a run is going on or after it
was killed. From top to bottom: accuracy before and after, health findings (health.py), curves (report_curves.py),
samples (report_samples.py), configuration. pages/report.html, .css and .js draw it.

Left out on purpose: several runs on one page (plotter.py draws those), plotting libraries.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from distillation import config as distill_config
from games import config as games_config
from tracking import health, pages, plotter, report_curves, report_games, report_samples
from tracking.run_config import PRESETS, GRPOConfig


def make_report(folder: str | Path) -> Path:
    """Writes report.html into a run's folder and returns its path. Raises ValueError, one line, if no run is there.

    folder: of a run of main.py or self_play.py, or of one student that distill.py trains. The old page is replaced in
    one step, so a reader never sees an incomplete one.
    """
    folder = Path(folder)
    args, rows = read_run(folder)
    config = args["config"]
    samples = folder / "samples.jsonl"
    groups, evaluations = report_samples.index_samples(samples, config.get("group_size"))
    selected = report_samples.select_samples(samples, groups)
    data = {
        "name": folder.resolve().name,
        "headline": headline(rows, args),
        "findings": [dataclasses.asdict(finding) for finding in health.find_health(rows)],
        "sections": report_curves.chart_sections(rows, config),
        "sample_steps": list(selected),
        "samples_note": report_samples.samples_note(groups, selected),
        "games": report_games.read_games(samples),
        "evaluations": report_samples.pair_evaluations(evaluations),
        "config": compare_config(config),
        "made_with": {k: v for k, v in {**args, **args.get("versions", {})}.items() if k not in ("config", "versions")},
    }
    blocks = {f"step{step}": f"[{','.join(texts)}]" for step, texts in selected.items()}
    page = folder / "report.html"
    temporary = folder / f".report.{os.getpid()}.tmp"
    try:
        temporary.write_text(pages.render("report", {"data": pages.to_json(data)} | blocks), encoding="utf-8")
        os.replace(temporary, page)
    finally:
        temporary.unlink(missing_ok=True)
    return page


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """(args.json, the rows of metrics.jsonl, none if the file does not exist yet).

    Raises ValueError, one line, if args.json cannot be read or holds no config, for a folder of --eval_only, and for a
    damaged metrics.jsonl.
    """
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no training run is here (args.json cannot be read: {error})") from error
    if not isinstance(args, dict) or not isinstance(args.get("config"), dict):
        raise ValueError(f"{folder}: no training run is here (args.json holds no config)")
    if args["config"].get("eval_only"):
        raise ValueError(f"{folder}: a measurement by --eval_only, without training; its results are in eval.json")
    try:
        return args, plotter.read_metrics(folder)
    except FileNotFoundError:
        return args, []


# ---------------------------------------------------------------- head and configuration


def headline(rows: list[dict], args: dict) -> dict:
    """The head of the page: {"facts": {name: value}, "measures": rates with intervals, "steps", "note"}.

    The measures are those of the first and the last evaluation, after the training steps in "steps". The note says on
    what they were measured.
    """
    config, game = args["config"], args["config"].get("game")
    done = rows[-1]["step"] if rows else 0
    facts = {
        "preset": config.get("preset"),
        "model": config.get("model_name"),
        "game": game,
        "dataset": config.get("dataset_path") or config.get("dataset_name"),
        "steps": f"{done}",
        "device": args.get("device"),
        "seed": config.get("seed"),
    }
    if is_distillation(config):
        facts |= {"teacher": config.get("teacher_name"), "loss": config.get("loss")}
    else:
        max_steps = config.get("max_steps")
        facts["steps"] += f" of {max_steps}" + ("" if done == max_steps else " (unfinished)")
        if config.get("control", "none") != "none":
            facts["control"] = config["control"]
    results, measures = health.evaluations(rows), []
    ends = results[:1] + results[1:][-1:]
    facts = {name: value for name, value in facts.items() if value is not None or name not in ("game", "dataset")}
    accuracy = {None: "sampled", "debate": "right verdicts"}.get(game, "optimal moves")
    names = {"accuracy": accuracy, "accuracy_greedy": "greedy", "accuracy_soft": "soft", "format_rate": "format"}
    names |= {"win_random": "wins against random moves", "win_start": "wins against the start"}
    names |= {"held_perfect": "holds against perfect play", "judge_random": "judge, random reveals"}
    for key, name in names.items():
        cells = [value_and_interval(f"eval/{key}", row, config) for row in ends]
        if any(cells):
            measures.append({"name": name, "cells": cells})
    note = f"{ends[-1].get('eval/n') if ends else None} "
    if game:
        note += "debates" if game == "debate" else "answers to all positions"
        note += f" and {config['eval_games']} games against each opponent, 95 % Wilson intervals."
    else:
        note += "test problems, 95 % Wilson intervals; report the sampled accuracy."
    return {"facts": facts, "measures": measures, "steps": [row["step"] for row in ends], "note": note}


def value_and_interval(key: str, row: dict, config: dict) -> list[float] | None:
    """[value, low, high] of a metric in that row; [value] if it has no interval; None if the row lacks it."""
    value = row.get(key)
    return value if value is None else [value, *(report_curves.interval(key, value, row, config) or ())]


def is_distillation(config: dict) -> bool:
    """Whether these are settings of distill.py."""
    return "on_policy_fraction" in config


def settings_of(config: dict) -> tuple[type, dict]:
    """(the dataclass, the presets) of the script whose settings these are."""
    if is_distillation(config):
        return distill_config.DistillConfig, distill_config.PRESETS
    if "game" in config:
        return games_config.SelfPlayConfig, games_config.PRESETS
    return GRPOConfig, PRESETS


def compare_config(config: dict) -> list[dict]:
    """Every setting with its value, its default and where the value comes from; settings that differ come first."""
    config_class, presets = settings_of(config)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    preset = presets.get(config.get("preset"), {})
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


# ---------------------------------------------------------------- command line


def main() -> None:
    if len(sys.argv) != 2:
        fail("give one run's folder: python -m tracking.report runs/tiny")
    try:
        print(make_report(sys.argv[1]))
    except (ValueError, OSError) as error:
        fail(error)


def fail(message) -> NoReturn:
    """Prints one line to stderr and exits with code 2."""
    print(f"report.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
