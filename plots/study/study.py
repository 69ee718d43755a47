"""What matters? Every variant of the recipe gets the same training time on the embedded task, several seeds each.

    python plots/study/study.py run --seconds 40 --workers 2 --seeds 0 1 2 3 4 --teacher runs/seed0/checkpoints/latest
    python plots/study/study.py show         # table.md, accuracy.png, curves.png, entropy.png

What is held equal is CPU time on one thread, sampling and updates together. Not counted: loading, grading, logs,
evaluation, and the training of the distillation's teacher (its sampling is). A run stops after the step that uses the
budget up. Steps are not held equal: a variant that makes them dearer takes fewer.

The baseline is main.py's preset `tiny` at a constant learning rate, because a time budget has no known last step. A
variant changes what the table below says, and nothing else is tuned for it. So all loss types have one learning rate,
although dr_grpo's gradient is the smaller by (mean length / limit): Adam's step hardly depends on a gradient's scale.
Supervised training, another method, has its own.

At the end every model answers the same test problems, sampled at temperature 1 and greedily. Learning curves show
samples: of GRPO on the training problems of the step, of supervised training on validation problems, a few times.
Left out on purpose: combinations of variants, and a search for each one's best settings.
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import json
import math
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import distill
import evaluator
import llms
import main
import rldatasets
from distillation import examples
from distillation.config import PRESETS as DISTILL_PRESETS
from distillation.config import DistillConfig
from tracking import plotter, run_config, run_folder, training_run

NEVER = 1_000_000  # steps
TEST_PROBLEMS = 512
SFT_LEARNING_RATE = 6e-4  # better than 2e-4 and 2e-3: gold solutions, 12 s, one seed, validation problems
SAMPLING_SHARE = 0.5  # of the time of a method that first samples answers, then trains on them
LOOKS = 8  # points of a supervised learning curve
LOOK_PROBLEMS = 256
ANSWERED = {"accuracy": "accuracy", "format_rate": "format_rate", "completion_length": "length"}

# ---------------------------------------------------------------- one run


class Budget:
    """CPU seconds that may be spent. Takes the place of run_folder.stopwatch: the seconds that it times are charged.
    Takes the place of training_run.SignalHandler too: `signal` is set once `limit` is spent."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __init__(self, limit: float):
        self.limit, self.spent = limit, 0.0

    @contextlib.contextmanager
    def stopwatch(self, device):
        started, seconds = time.process_time(), []
        yield lambda: seconds[0]
        seconds.append(time.process_time() - started)
        self.spent += seconds[0]

    @property
    def signal(self) -> int | None:
        return signal.SIGTERM if self.spent >= self.limit else None


@dataclass
class Job:
    """What a method is given: one run of it."""

    seed: int
    seconds: float
    teacher: str | None
    folder: Path  # for checkpoints, deleted afterwards
    budget: Budget
    curve: list[dict] = field(default_factory=list)  # metrics in the course of the run


def grpo(job: Job, **overrides) -> str:
    """main.py with these settings, until the budget is spent. Returns the model's folder, as all methods do."""
    endless = dict(max_steps=NEVER, eval_steps=NEVER, save_steps=NEVER, eval_problems=1, final_lr_fraction=1.0)
    own = dict(seed=job.seed, output_dir=str(job.folder))
    config = run_config.GRPOConfig(**run_config.PRESETS["tiny"] | endless | overrides | own)
    with contextlib.suppress(training_run.TrainingStopped):
        main.train(config, signals=job.budget)
    seconds = 0.0
    for row in run_folder.JsonLines(job.folder / "metrics.jsonl").read()[1:]:  # the first is an evaluation
        seconds += row["time/rollout"] + row["time/train"]
        job.curve.append(row | {"seconds": seconds})
    return str(job.folder / "checkpoints" / "latest")


def sft_config(job: Job) -> DistillConfig:
    own = dict(model_name="tiny", teacher_name="tiny", seed=job.seed, learning_rate=SFT_LEARNING_RATE, warmup_steps=5)
    endless = dict(epochs=float(NEVER), save_steps=NEVER, final_lr_fraction=1.0)
    return DistillConfig(**DISTILL_PRESETS["tiny"] | own | endless)


def sft(job: Job, start: str, rows: list[dict], folder: Path, until: float) -> str:
    """Trains the model of that name on `rows` until so much of the budget is spent, with a look at it now and then."""
    model, before = str(folder / "checkpoints" / "latest"), job.curve[-1]["step"] if job.curve else 0
    while job.budget.spent < until or not Path(model).exists():  # one step at least
        job.budget.limit = min(until, job.budget.spent + job.seconds / LOOKS)
        with contextlib.suppress(training_run.TrainingStopped):
            distill.train_student(sft_config(job), start, rows, folder, signals=job.budget)
        row = run_folder.JsonLines(folder / "metrics.jsonl").read()[-1]
        row |= {"step": before + row["step"], "seconds": job.budget.spent}
        job.curve.append(row | answer(model, "validation", LOOK_PROBLEMS, 1.0, job))
    return model


def sft_on_gold(job: Job) -> str:
    """Supervised training on the data set's own solutions."""
    rows = [dataclasses.asdict(problem) for problem in rldatasets.load_problems("arithmetic", "train")]
    return sft(job, "tiny", examples.gold_rows(rows, sft_config(job)), job.folder, job.seconds)


def sft_on_samples(job: Job, rounds: int = 1, from_teacher: bool = False) -> str:
    """Supervised training on verified samples: of the teacher (distillation), or of the model itself (rejection
    sampling), which with several rounds samples anew after each (expert iteration)."""
    model = "tiny"
    for number in range(rounds):
        begin, end = (job.seconds * n / rounds for n in (number, number + 1))
        job.budget.limit = begin + SAMPLING_SHARE * (end - begin)
        rows = verified_answers(job, job.teacher if from_teacher else model, number)
        model = sft(job, model, rows, job.folder / str(number), end)
    return model


def verified_answers(job: Job, model_name: str, number: int) -> list[dict]:
    """Right, well-formed and different answers to training problems, sampled until the budget's limit."""
    config = dataclasses.replace(sft_config(job), seed=1000 * job.seed + number)  # no round repeats another's samples
    problems = rldatasets.load_problems("arithmetic", "train")
    model, tokenizer = llms.load(model_name)
    rows, step = [], 0
    while not job.budget.signal or not rows:
        step += 1
        batch = rldatasets.problems_of_step(problems, step, config.problems_per_step, config.seed)
        with job.budget.stopwatch(model.device):
            rollout = examples.sample(model, tokenizer, batch, config, seed=config.seed * 1_000_003 + step)
        rows += examples.answer_records(batch, rollout, config)
    return examples.filter_rows(rows, config.keep_per_problem, test_questions=set())[0]  # none is in a training split


def untrained(job: Job) -> str:
    return "tiny"


def answer(model_name: str, split: str, num_problems: int, temperature: float, job: Job) -> dict[str, float]:
    """How a model answers the first problems of a split."""
    model, tokenizer = llms.load(model_name)
    problems = rldatasets.load_problems("arithmetic", split, num_problems)
    limit = run_config.PRESETS["tiny"]["max_completion_length"]
    options = dict(temperature=temperature, max_new_tokens=limit, seed=job.seed)
    result = evaluator.evaluate(model, tokenizer, problems, **options)
    return {name: result[key] for name, key in ANSWERED.items()}


# ---------------------------------------------------------------- the variants

# Group -> variant -> the settings of main.py that it changes, or a method of its own. The baseline has dr_grpo's loss,
# unscaled advantages, groups of 8, four minibatches, one pass, no KL, learning rate 1.5e-4.
LOSSES = ("dr_grpo", "grpo", "dapo", "gspo", "cispo")
GROUPS = {
    "Reference": {"baseline": {}, "untrained": untrained},
    "Loss, advantages unscaled": {f"{loss} unscaled": dict(loss_type=loss) for loss in LOSSES[1:]},
    "Loss, advantages / group std": {
        f"{loss} scaled": dict(loss_type=loss, advantage_scale="group") for loss in LOSSES
    },
    # Of these two groups the runs are in plots/study/more, with a baseline of their own.
    # gspo's ratio is that of whole answers. Zheng et al. 2025 clip it at 3e-4 below and 4e-4 above.
    "gspo's clip": {
        f"gspo clip {low}": dict(loss_type="gspo", advantage_scale="group", clip_low=float(low), clip_high=high)
        for low, high in (("3e-4", 4e-4), ("0.03", 0.04))
    },
    "Objectives": {
        "leave one out": dict(advantage_baseline="leave_one_out"),
        "pass at 4": dict(pass_at_k=4),
        "clip delta 4": dict(clip_delta=4.0),
        "top entropy 0.2": dict(top_entropy=0.2),
    },
    "KL to the base": {f"beta {beta}": dict(beta=beta) for beta in (0.01, 0.1)},
    "Group size, 256 rows a step": {
        f"group size {size}": dict(group_size=size, problems_per_step=256 // size) for size in (2, 4, 16, 32)
    },
    "Learning rate": {f"learning rate {x}": dict(learning_rate=float(x)) for x in ("5e-5", "4.5e-4", "1.5e-3")},
    "Updates per rollout": {
        **{f"minibatches {count}": dict(minibatches=count) for count in (1, 2, 8)},
        "passes 2": dict(updates_per_rollout=2),
    },
    "Reward, rollouts": {
        "accuracy only": dict(rewards="accuracy:1"),
        "format only": dict(rewards="format:1"),
        "soft rollouts": dict(soft_thinking=True),
    },
    "Supervised": {
        "gold solutions": sft_on_gold,
        "rejection sampling": sft_on_samples,
        "expert iteration": functools.partial(sft_on_samples, rounds=LOOKS),
        "distillation": functools.partial(sft_on_samples, from_teacher=True),
    },
    "Controls": {
        "shuffled advantages": dict(control="shuffled_advantages"),
        "random rewards": dict(control="random_rewards"),
    },
}  # fmt: skip
VARIANTS = {name: method for group in GROUPS.values() for name, method in group.items()}

# ---------------------------------------------------------------- run

LOGGED = ("step", "seconds", "reward", "accuracy", "format_rate", "completion_length", "entropy", "zero_std_groups")
LOGGED += ("kl", "clip_frac", "grad_norm", "loss")


def run_job(variant: str, seed: int, seconds: float, teacher: str | None) -> tuple[dict, list[dict]]:
    """One run in a process of a pool: (its row of results.jsonl, the rows of its learning curve)."""
    torch.set_num_threads(1)
    budget = Budget(seconds)
    run_folder.stopwatch = budget.stopwatch
    plotter.plot_run = lambda folder: None
    with contextlib.ExitStack() as stack:
        folder, nowhere = stack.enter_context(tempfile.TemporaryDirectory()), stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))  # progress bars would write over each other
        job, method = Job(seed, seconds, teacher, Path(folder), budget), VARIANTS[variant]
        model = grpo(job, **method) if isinstance(method, dict) else method(job)
        sampled, greedy = (answer(model, "test", TEST_PROBLEMS, temperature, job) for temperature in (1.0, 0.0))
    result = {"variant": variant, "seed": seed, "budget": seconds, "seconds": round(budget.spent, 2)}
    result |= {"steps": job.curve[-1]["step"] if job.curve else 0}
    result |= sampled | {f"greedy/{name}": value for name, value in greedy.items()}
    return result, [{"seed": seed} | {name: rounded(row[name]) for name in LOGGED if name in row} for row in job.curve]


def rounded(value: float | None) -> float | None:
    """To four significant digits; steps stay whole."""
    return value if value is None or isinstance(value, int) else float(f"{value:.4g}")


def keep_metrics(file: Path, seed: int, rows: list[dict]) -> None:
    """Puts the rows of a seed into the variant's file, in place of what is there of that seed."""
    others = [row for row in plotter.read_metrics(file) if row["seed"] != seed] if file.exists() else []
    text = "".join(json.dumps(row) + "\n" for row in others + rows)
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    temporary.replace(file)


def metrics_file(folder: Path, variant: str) -> Path:
    return folder / "metrics" / f"{variant.replace(' ', '_')}.jsonl.gz"


def run(args) -> None:
    """Whole seeds, one after the other, so that a study that is cut short has all variants; goes on where it was."""
    folder = Path(args.output_dir)
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    log = run_folder.JsonLines(folder / "results.jsonl")
    log.replace(log.read())  # without a line that a kill left half-written
    done = {(row["seed"], row["variant"]): row["budget"] for row in log.read()}
    if set(done.values()) - {args.seconds}:
        sys.exit(f"study.py: the runs in {log.file} had {min(done.values())} seconds: give another --output_dir")
    if "distillation" in args.variants and not (args.teacher and Path(args.teacher).is_dir()):
        sys.exit(f"study.py: --teacher {args.teacher}: distillation needs a checkpoint of main.py")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the workers end too
    jobs = [(seed, variant) for seed in args.seeds for variant in args.variants if (seed, variant) not in done]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_job, variant, seed, args.seconds, args.teacher) for seed, variant in jobs]
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                result, curve = future.result()
                keep_metrics(metrics_file(folder, result["variant"]), result["seed"], curve)
                log.append(result)
                about = f"{result['seconds']:.1f} s, {result['steps']} steps, accuracy {result['accuracy']:.1%}"
                print(f"{number}/{len(jobs)} seed {result['seed']}, {result['variant']}: {about}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------- statistics


def t_p_value(t: float, df: int) -> float:
    """Two-sided: the chance that Student's |T| exceeds |t|. With T = sqrt(df) tan(angle) the density of the angle is
    proportional to cos(angle)^(df - 1), which is smooth, so the trapezoidal rule is enough."""

    def area_from(angle):
        angles = np.linspace(angle, math.pi / 2, 10_001)
        return np.trapezoid(np.cos(angles) ** (df - 1), angles)

    return float(area_from(math.atan(abs(t) / math.sqrt(df))) / area_from(0.0))


def t_quantile(df: int, p_value: float = 0.05) -> float:
    """The t at which t_p_value is p_value, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_p_value(middle, df) > p_value else (low, middle)
    return high


def mean_and_arm(values) -> tuple[float, float]:
    """The mean over seeds, and half the length of its 95 % t-interval."""
    n = len(values)
    return float(np.mean(values)), t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)


def paired_p_value(differences) -> float:
    """Of a t-test that their mean is 0."""
    n, mean, std = len(differences), np.mean(differences), np.std(differences, ddof=1)
    if std == 0:
        return float(mean == 0)
    return t_p_value(mean / std * math.sqrt(n), n - 1)


def welch_p_value(a, b) -> float:
    """Of a t-test that two samples of their own have the same mean, whatever their spreads (Welch 1947)."""
    of_means = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    df = sum(of_means) ** 2 / (of_means[0] ** 2 / (len(a) - 1) + of_means[1] ** 2 / (len(b) - 1))
    return t_p_value((np.mean(a) - np.mean(b)) / math.sqrt(sum(of_means)), df)


def smallest_difference(differences, comparisons: int = 1, power: float = 0.8) -> float:
    """How large the true difference has to be, with this spread over seeds, for the paired t-test to find it (p < 0.05
    / comparisons) with the chance `power`. By bisection of the chance that |T| exceeds its quantile, where
    T = (Z + d) / S with a normal Z and S^2 distributed as chi^2 / df: summed over S."""
    n, df = len(differences), len(differences) - 1
    quantile = t_quantile(df, 0.05 / comparisons)
    s = np.linspace(0, 4, 4001)[1:]
    density = s ** (df - 1) * np.exp(-df * s**2 / 2)

    def below(x):  # the normal distribution
        return (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        found = below(middle - quantile * s) + below(-middle - quantile * s)
        low, high = (middle, high) if (density * found).sum() / density.sum() < power else (low, middle)
    return high * float(np.std(differences, ddof=1)) / math.sqrt(n)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Adjusted for their number: those under 0.05 are false with a chance of 5 % for all together (Holm 1979)."""
    adjusted, highest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.get)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = highest
    return adjusted


# ---------------------------------------------------------------- show

SHOWN = (("accuracy", "sampled", plotter.BLUE, "o"), ("greedy/accuracy", "greedy", plotter.VERMILLION, "D"))
COLORS = (plotter.BLUE, plotter.VERMILLION, plotter.GREEN, plotter.PURPLE, "#E69F00")


def show(args) -> None:
    folder = Path(args.output_dir)
    rows = run_folder.JsonLines(folder / "results.jsonl").read()
    done = {name: {row["seed"]: row for row in rows if row["variant"] == name} for name in VARIANTS}
    done = {name: by_seed for name, by_seed in done.items() if by_seed}
    seeds = sorted(set.intersection(*map(set, done.values()))) if "baseline" in done else []
    if len(seeds) < 2:
        sys.exit(f"study.py: {folder}/results.jsonl needs the baseline, and two seeds that all variants in it have")
    results = {name: [by_seed[seed] for seed in seeds] for name, by_seed in done.items()}
    about = f"{len(seeds)} seeds, {rows[0]['budget']:g} s of CPU time each"
    (folder / "table.md").write_text(table(results, about), encoding="utf-8")
    groups = {title: [name for name in group if name in results] for title, group in GROUPS.items()}
    groups = {title: names for title, names in groups.items() if names}
    trained = {title: names for title, names in groups.items() if title != "Reference"}
    sampling = {title: names for title, names in trained.items() if title != "Supervised"}  # logs its entropy
    pictures = {
        "accuracy.png": dot_plot(results, groups, about),
        "curves.png": learning_curves(folder, trained, seeds, "accuracy", f"Accuracy of samples: {about}"),
        "entropy.png": learning_curves(
            folder, sampling, seeds, "entropy", f"Entropy of samples, nats a token: {about}"
        ),
    }
    plotter.save(pictures, folder)
    print(f"In {folder}: table.md, {', '.join(pictures)}")


def column(results: dict, name: str, key: str, scale: float = 100.0) -> np.ndarray:
    """A number of each of a variant's runs, by seed: (S,)."""
    return scale * np.array([row[key] for row in results[name]])


def table(results: dict, about: str) -> str:
    """Means over seeds and their differences to the baseline, as Markdown."""
    others = [name for name in results if name != "baseline"]
    changes = {
        key: {name: column(results, name, key) - column(results, "baseline", key) for name in others}
        for key, *_ in SHOWN
    }
    adjusted = {key: holm({name: paired_p_value(d) for name, d in its.items()}) for key, its in changes.items()}
    measured = " | ".join(f"{kind}, % | difference | p | visible" for _, kind, *_ in SHOWN)
    lines = [
        f"{about}; {TEST_PROBLEMS} test problems. Mean over seeds +- half of its 95 % t-interval; differences to the "
        f"baseline in points, paired by seed. *p*: with Holm's correction over the {len(others)} variants; bold below "
        ".05, in italics where the interval of the difference excludes 0 but p does not. *Visible*: how large a true "
        "difference would have had to be to be found four times in five, with this spread over seeds; in brackets, at "
        f"p < .05 / {len(others)}. Steps are rollouts, or batches of supervised training.",
        "",
        f"| | steps | {measured} | format, % | tokens |",
        "|---" * 12 + "|",
    ]
    for name in results:
        cells = [name, f"{column(results, name, 'steps', 1).mean():.0f}"]
        for key, *_ in SHOWN:
            cells.append("{:.1f} +- {:.1f}".format(*mean_and_arm(column(results, name, key))))
            if name == "baseline":
                cells += ["", "", ""]
                continue
            mean, arm = mean_and_arm(changes[key][name])
            mark = "**" if adjusted[key][name] < 0.05 else "*" if abs(mean) > arm else ""
            visible = [smallest_difference(changes[key][name], count) for count in (1, len(others))]
            cells += [f"{mean:+.1f} +- {arm:.1f}", f"{mark}{adjusted[key][name]:.2g}{mark}"]
            cells += ["{:.1f} ({:.1f})".format(*visible)]
        cells += [f"{column(results, name, 'format_rate').mean():.1f}"]
        cells += [f"{column(results, name, 'completion_length', 1).mean():.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    key, baseline = SHOWN[0][0], column(results, "baseline", SHOWN[0][0])
    unpaired = holm({name: welch_p_value(column(results, name, key), baseline) for name in others})
    holding = [f"{name} {unpaired[name]:.2g}" for name in others if adjusted[key][name] < 0.05]
    lines += ["", f"Sampled accuracy without the pairing (Welch), corrected p of those in bold: {', '.join(holding)}."]
    return "\n".join(lines) + "\n"


@rc_context(plotter.STYLE)
def dot_plot(results: dict, groups: dict, about: str) -> Figure:
    """Accuracy of every variant with its interval, sampled and greedy, and each seed; the baseline's means as lines."""
    num_lines = len(results) + len(groups)
    figure = Figure(figsize=(plotter.WIDTH, 1.2 + 0.21 * num_lines), layout="constrained")
    axes = figure.subplots()
    place, labels = 0, {}
    for title, names in groups.items():
        labels[place] = title
        for name in names:
            place += 1
            labels[place] = name
            for (key, label, color, marker), shift in zip(SHOWN, (-0.15, 0.15), strict=True):
                values = column(results, name, key)
                mean, arm = mean_and_arm(values)
                axes.plot(values, [place + shift] * len(values), "|", color=color, alpha=0.4, markersize=5)
                looks = dict(fmt=marker, color=color, markersize=4.5, capsize=2, linewidth=1)
                axes.errorbar(mean, place + shift, xerr=arm, label=label if place == 1 else None, **looks)
        place += 1
    for key, _, color, _ in SHOWN:
        axes.axvline(column(results, "baseline", key).mean(), color=color, linestyle=":", linewidth=1)
    axes.set_yticks(list(labels), list(labels.values()))
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text() in groups else "normal")
    axes.set(
        ylim=(num_lines - 0.4, -0.6), xlim=(-2, 102), xlabel="%, mean over seeds with 95 % t-interval; dotted: baseline"
    )
    axes.set_title(f"Test accuracy, n = {TEST_PROBLEMS}: {about}")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.75, 1.0), ncols=2)
    return figure


@rc_context(plotter.STYLE)
def learning_curves(folder: Path, groups: dict, seeds: list[int], key: str, title: str) -> Figure:
    """A panel for each group, with the baseline: means over seeds against training seconds, thin lines for seeds."""
    num_rows = math.ceil(len(groups) / 3)
    figure = Figure(figsize=(plotter.WIDTH, 0.5 + 2.6 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, 3, sharex=True, sharey=True, squeeze=False).flat
    for (group, names), axes in zip(groups.items(), panels, strict=False):
        for name, color in zip(("baseline", *names), (plotter.BLACK, *COLORS), strict=False):
            rows = plotter.read_metrics(metrics_file(folder, name))
            curves = [np.array([(r["seconds"], r[key]) for r in rows if r["seed"] == seed]) for seed in seeds]
            begin, end = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
            seconds = np.linspace(begin, end, 100)
            values = np.array([np.interp(seconds, *curve.T) for curve in curves])  # (S, 100)
            axes.plot(seconds, values.T, color=color, linewidth=0.6, alpha=0.25)
            axes.plot(seconds, values.mean(axis=0), color=color, linewidth=1.6, label=name)
        axes.set_title(group)
        axes.legend(frameon=False, fontsize=7.5)
    for axes in panels:  # those that are left over
        axes.remove()
    figure.suptitle(title)
    figure.supxlabel("CPU seconds of sampling and training")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare variants of the recipe at equal training time.")
    parser.add_argument("stage", choices=("run", "show"))
    parser.add_argument("--output_dir", default=str(Path(__file__).resolve().parent))
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU seconds of sampling and training, each run")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--teacher", help="the RL-trained checkpoint that distillation samples from")
    args = parser.parse_args()
    {"run": run, "show": show}[args.stage](args)
