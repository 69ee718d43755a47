"""The end of pipeline.py: what each model can do, what it cost, what each stage gained; as a table and a picture."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from matplotlib import rc_context
from matplotlib.figure import Figure

import distill
import evaluator
import llms
import rldatasets
from distillation.measurement import with_interval
from engine.statistics import paired_difference
from tracking import checkpoints, plotter, run_folder


def measure(model_name: str, config) -> dict:
    """Sampled and greedy answers of a model to the test problems. config: a PipelineConfig.

    accuracy, format_rate, ...   of eval_samples sampled answers to each problem; greedy/...: of one greedy answer
    pass        share of problems with a right one among them; k: how many there are
    entropy     of the sampling distributions, nats per token, mean over all tokens
    solved, greedy/solved    of each problem, the share of right answers: for paired differences
    """
    name = checkpoints.resolve_model_name(model_name)
    model, tokenizer = llms.load(name, dtype=llms.sampling_dtype(), trust_remote_code=config.trust_remote_code)
    problems = rldatasets.load_problems(config.dataset_name, "test", config.eval_problems, config.dataset_path)
    problems = rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, config.prompt_format())
    k, result = config.eval_samples, {}
    for prefix, temperature, samples in (("", config.temperature, k), ("greedy/", 0.0, 1)):
        summary = evaluator.evaluate(
            model, tokenizer, problems, samples=samples, temperature=temperature, **config.answering(tokenizer)
        )
        records = summary.pop("records")
        right = [record["correct"] for record in records]
        tokens = sum(record["length"] for record in records)
        summary["solved"] = [fmean(right[first : first + samples]) for first in range(0, len(right), samples)]
        summary["entropy"] = sum(record["mean_entropy"] * record["length"] for record in records) / tokens
        result |= {prefix + key: value for key, value in summary.items()}
    return result | {"pass": result.get(f"pass@{k}", result["accuracy"]), "k": k}


# ---------------------------------------------------------------- costs and differences


def logged(folders: Iterable[Path]) -> dict[str, float]:
    """What the steps in the folders' metrics.jsonl took: seconds of sampling and training (not of evaluating, drawing
    and saving), and completion tokens that were sampled or learned (of RL, which does both with each, once)."""
    total = {"seconds": 0.0, "tokens": 0.0}
    for folder in folders:
        for row in run_folder.JsonLines(folder / "metrics.jsonl").read():
            seconds = sum(value for name, value in row.items() if name.startswith("time/"))
            total["seconds"] += seconds
            total["tokens"] += seconds * row.get("tokens_per_second", 0)
    return total


def cost(own: Iterable[Path], whole: Iterable[Path]) -> dict[str, float]:
    """seconds, tokens: of a stage. total_seconds, total_tokens: with the stages that it is built on."""
    return logged(own) | {f"total_{name}": value for name, value in logged(whole).items()}


def gains(table: dict[str, dict], comparisons: dict[tuple[str, str], str]) -> list[dict]:
    """The comparisons whose two models are in the table: {"what", "model", "against", and for "accuracy" and
    "greedy/accuracy" [difference, low, high]}, of the model minus the other, paired by problem."""
    result = []
    for (a, b), what in comparisons.items():
        if a in table and b in table:
            row = {"what": what, "model": table[a]["title"], "against": table[b]["title"]}
            for prefix in ("", "greedy/"):
                solved = (table[name][f"{prefix}solved"] for name in (a, b))
                row[f"{prefix}accuracy"] = paired_difference(*solved)
            result.append(row)
    return result


# ---------------------------------------------------------------- as text


def percent(row: dict, key: str) -> str:
    return f"{100 * row[key]:.1f} [{100 * row[key + '_low']:.1f}, {100 * row[key + '_high']:.1f}]"


def points(difference: tuple[float, float, float]) -> str:
    """A difference in points with its interval, and whether the interval leaves 0 out."""
    mean, low, high = (100 * value for value in difference)
    verdict = "gains" if low > 0 else "loses" if high < 0 else "not shown"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {verdict}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)) + " |"
                     for line in lines)  # fmt: skip


def as_markdown(table: dict[str, dict], differences: list[dict], answers: dict[str, dict]) -> str:
    first = next(iter(table.values()))
    header = ["", "sampled", "greedy", f"pass@{first['k']}", "format", "tokens", "entropy", "reflection"]
    header += ["s", "s in all", "tokens in all"]
    rows = [
        [
            ("control: " if row["control"] else "") + row["title"], percent(row, "accuracy"),
            percent(row, "greedy/accuracy"), f"{100 * row['pass']:.1f}", f"{100 * row['format_rate']:.1f}",
            f"{row['length']:.1f}", f"{row['entropy']:.3f}", f"{row.get('reflect_words', 0):.1f}",
            f"{row['seconds']:.0f}", f"{row['total_seconds']:.0f}", f"{row['total_tokens'] / 1000:,.0f}k",
        ]
        for row in table.values()
    ]  # fmt: skip
    text = f"""In % of {first["n"]:,} test problems, with 95 % Wilson intervals.
Sampled, pass@{first["k"]}, format, tokens, entropy, reflection: of {first["k"]} sampled answers to each problem.
Tokens: mean length of an answer. Entropy: nats a token. Reflection: words as "wait" or "however" in 1,000 words.
s: seconds of sampling and training in this stage; in all: with the stages that it is built on.

{markdown_table(header, rows)}

What was gained: differences in points, paired by problem, with 95 % intervals. They say nothing about other seeds.

"""
    header = ["", "model", "against", "sampled", "greedy"]
    rows = [
        [row["what"], row["model"], row["against"], points(row["accuracy"]), points(row["greedy/accuracy"])]
        for row in differences
    ]
    text += markdown_table(header, rows) + "\n"
    names = {"rl": "the RL model", "base": "the base"}
    for writer, counts in answers.items():
        text += f"\nAnswers of {names[writer]}: " + ", ".join(f"{what} {count:,}" for what, count in counts.items())
    return text + "\n"


def write(folder: Path, table: dict[str, dict], comparisons: dict, answers: dict[str, dict]) -> None:
    """pipeline.json, pipeline.md and pipeline.png in the folder; prints the Markdown."""
    differences = gains(table, comparisons)
    text = as_markdown(table, differences, answers)
    plain = {name: {k: v for k, v in row.items() if not k.endswith("solved")} for name, row in table.items()}
    distill.write_json(folder / "pipeline.json", {"models": plain, "gains": differences, "answers": answers})
    (folder / "pipeline.md").write_text(text, encoding="utf-8")
    plotter.save({"pipeline.png": figure(table)}, folder)
    print(f"\n{text}\nIn {folder}: pipeline.md, pipeline.json, pipeline.png")


# ---------------------------------------------------------------- as a picture


@rc_context(plotter.STYLE)
def figure(table: dict[str, dict]) -> Figure:
    """Accuracy of every model with its intervals, entropy, and time; controls in grey. Values beside are the legend."""
    rows = list(table.values())
    first = rows[0]
    # Controls stand below the stages, with a gap.
    places = [place + 0.6 * row["control"] for place, row in enumerate(rows)]
    picture = Figure(figsize=(plotter.WIDTH, 1.0 + 0.36 * len(rows)), layout="constrained")
    accuracy, entropy, seconds = picture.subplots(1, 3, sharey=True, width_ratios=(2, 0.9, 0.9))
    series = (("accuracy", "sampled", plotter.BLUE, "o"), ("greedy/accuracy", "greedy", plotter.VERMILLION, "D"))
    for column, (key, label, color, marker) in enumerate((*series, ("pass", f"pass@{first['k']}", plotter.GREEN, "|"))):
        beside = dict(xycoords=("axes fraction", "data"), color=color, ha="right", va="center", annotation_clip=False)
        right = 1.13 + 0.165 * column
        accuracy.annotate(label, (right, -0.95), **beside)
        for place, row in zip(places, rows, strict=True):
            value, arms = with_interval(row, key) if key != "pass" else (100 * row["pass"], None)
            accuracy.errorbar(value, place, xerr=arms, fmt=marker, color=color, markersize=5 + 6 * (key == "pass"),
                              markeredgewidth=1 + (key == "pass"), capsize=3)  # fmt: skip
            accuracy.annotate(f"{value:.1f}", (right, place), **beside)
    accuracy.set(title=f"Test accuracy, n = {first['n']:,}", xlabel="% (95 % Wilson interval)", xlim=(-2, 102))
    accuracy.set_yticks(places, [row["title"] for row in rows])
    accuracy.set_ylim(places[-1] + 0.6, -0.6)
    for label, row in zip(accuracy.get_yticklabels(), rows, strict=True):
        label.set_color("#777777" if row["control"] else plotter.BLACK)
    colors = [plotter.GREY if row["control"] else plotter.BLUE for row in rows]
    entropy.barh(places, [row["entropy"] for row in rows], height=0.5, color=colors)
    entropy.set(title="Entropy", xlabel="nats per token")
    own = [row["seconds"] for row in rows]
    earlier = [row["total_seconds"] - row["seconds"] for row in rows]
    seconds.barh(places, earlier, height=0.5, color=colors, alpha=0.35)
    seconds.barh(places, own, left=earlier, height=0.5, color=colors)
    seconds.set(title="Cost", xlabel="seconds (pale: before)")
    return picture
