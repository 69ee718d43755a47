"""What each model can do and what it costs: measured, as a table, and drawn."""

import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

import evaluator
import llms
import rldatasets
from distillation.config import DistillConfig
from tracking import checkpoints, plotter, run_folder


def measure_all(models: dict[str, str], config, folder: Path, measuring=None) -> dict[str, dict]:
    """{label: what measuring its model gave}. Each is written to measured.jsonl at once, and is not measured again.

    models: {label: name}. measuring: (name, config) -> dict, a function that can be pickled; default, `measure`.
    """
    log = run_folder.JsonLines(folder / "measured.jsonl")
    known = {row["model"]: row for row in log.read()}
    log.replace(list(known.values()))
    # A process for each model, forked from a server that has loaded the code and nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distillation.measurement"])
    for label, name in models.items():
        if label not in known:
            print(f"measuring: {label}", flush=True)
            with ProcessPoolExecutor(1, mp_context=context) as process:
                known[label] = {"model": label, **process.submit(measuring or measure, name, config).result()}
            log.append(known[label])
    return {label: known[label] for label in models}


def measure(model_name: str, config: DistillConfig) -> dict[str, float]:
    """Accuracy on the test split, sampled and greedy, with intervals; and what the model costs.

    Runs in a process of its own, so that the memory is this model's alone.

    parameters         tied embeddings once
    tokens_per_second  of sampling and grading, problems_per_step x group_size rows at a time, on torch's threads
    peak_memory        MiB: weights, and by how much the process grew while it answered; on a GPU, torch's peak there
    """
    name = checkpoints.resolve_model_name(model_name)
    model, tokenizer = llms.load(name, dtype=llms.sampling_dtype(), trust_remote_code=config.trust_remote_code)
    problems = rldatasets.load_problems(config.dataset_name, "test", config.eval_problems, config.dataset_path)
    problems = rldatasets.drop_long_prompts(problems, tokenizer, config.max_prompt_length, config.prompt_format())

    def evaluate(problems, temperature):
        return evaluator.evaluate(model, tokenizer, problems, temperature=temperature, **config.answering(tokenizer))

    evaluate(problems[:8], config.temperature)  # what is done once, such as paging in the code, is not the model's cost
    before = peak_of_process()
    with run_folder.stopwatch(model.device) as seconds:
        sampled = evaluate(problems, config.temperature)
    greedy = evaluate(problems, 0.0)
    memory = sum(p.numel() * p.element_size() for p in model.parameters()) + peak_of_process() - before
    if model.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    kept = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_flexible", "format_rate", "length", "truncated_rate")
    return {
        **{name: sampled[name] for name in kept},
        **{f"greedy/{name}": greedy[name] for name in kept},
        "n": sampled["n"],
        "parameters": model.num_parameters(),
        "tokens_per_second": sampled["length"] * sampled["n"] / seconds(),
        "peak_memory": memory / 2**20,
    }


def peak_of_process() -> int:
    """Bytes of memory that this process has had at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_table(table: dict[str, dict]) -> None:
    width = max(map(len, table))
    n = next(iter(table.values()))["n"]
    print(f"\n{n:,} test problems, % with 95 % Wilson intervals:")
    print(
        f"{'':{width}} {'sampled':>18} {'greedy':>18} {'format':>6} {'tokens':>6} {'size':>8} {'tok/s':>8} {'MiB':>6}"
    )
    for label, row in table.items():
        shares = [
            f"{100 * row[k]:5.1f} [{100 * row[k + '_low']:4.1f}, {100 * row[k + '_high']:4.1f}]"
            for k in ("accuracy", "greedy/accuracy")
        ]
        print(
            f"{label:{width}} {shares[0]:>18} {shares[1]:>18} {100 * row['format_rate']:6.1f} {row['length']:6.1f} "
            f"{row['parameters'] / 1e6:7.2f}M {row['tokens_per_second']:8,.0f} {row['peak_memory']:6,.0f}"
        )


SHOWN = (("accuracy", "sampled", plotter.BLUE, "o"), ("greedy/accuracy", "greedy", plotter.VERMILLION, "D"))


def with_interval(row: dict, key: str) -> tuple[float, list[list[float]]]:
    """A share in %, and the lengths of its interval's two arms as matplotlib takes them."""
    value, low, high = (100 * row[key + end] for end in ("", "_low", "_high"))
    return value, [[value - low], [high - value]]


@rc_context(plotter.STYLE)
def report_figure(table: dict[str, dict]) -> Figure:
    """Accuracy of each model with its interval, and how long its answers are. The figures beside are the legend."""
    figure = Figure(figsize=(plotter.WIDTH, 0.9 + 0.42 * len(table)), layout="constrained")
    accuracy, length = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    rows = list(table.values())
    for column, (key, label, color, marker) in enumerate(SHOWN):
        beside = dict(xycoords=("axes fraction", "data"), color=color, ha="right", va="center", annotation_clip=False)
        accuracy.annotate(label, (1.13 + 0.13 * column, -0.85), **beside)
        for place, row in enumerate(rows):
            value, arms = with_interval(row, key)
            accuracy.errorbar(value, place, xerr=arms, fmt=marker, color=color, markersize=5, capsize=3)
            accuracy.annotate(f"{value:.1f}", (1.13 + 0.13 * column, place), **beside)
    accuracy.set(title=f"Test accuracy, n = {rows[0]['n']:,}", xlabel="% (95 % Wilson interval)", xlim=(-2, 102))
    accuracy.set_yticks(range(len(rows)), [f"{name}, {row['parameters'] / 1e6:.2f}M" for name, row in table.items()])
    accuracy.set_ylim(len(rows) - 0.5, -0.5)
    length.barh(range(len(rows)), [row["length"] for row in rows], height=0.5, color=plotter.GREY)
    length.set(title="Length of sampled answers", xlabel="tokens")
    return figure


@rc_context(plotter.STYLE)
def sweep_figure(table: dict[str, dict]) -> Figure:
    """Accuracy, speed and memory against the number of parameters."""
    figure = Figure(figsize=(plotter.WIDTH, 3.2), layout="constrained")
    accuracy, speed, memory = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    teacher, students = table["teacher"], [row for name, row in table.items() if name != "teacher"]
    sizes = [row["parameters"] / 1e6 for row in students]
    for key, label, color, marker in SHOWN:
        accuracy.axhline(100 * teacher[key], color=color, linestyle=":", linewidth=1)
        for row in students:
            value, arms = with_interval(row, key)
            looks = dict(fmt=marker, color=color, markersize=5, capsize=3)
            accuracy.errorbar(row["parameters"] / 1e6, value, yerr=arms, label=label, **looks)
            label = None
    accuracy.set(title=f"Test accuracy, n = {teacher['n']:,}", ylabel="% (95 % Wilson interval)", ylim=(-2, 102))
    accuracy.legend(frameon=False, title="dotted: teacher")
    for axes, key, title in ((speed, "tokens_per_second", "Tokens per second"), (memory, "peak_memory", "Peak MiB")):
        for row in students:
            axes.plot(row["parameters"] / 1e6, row[key], "o", color=plotter.BLACK)
        axes.set(title=title, ylim=(0, 1.1 * max(row[key] for row in students)))
    for axes in (accuracy, speed, memory):
        axes.set(xscale="log", xlabel="parameters", xlim=(min(sizes) / 1.3, max(sizes) * 1.3))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}M")
        axes.xaxis.set_minor_locator(NullLocator())
    return figure
