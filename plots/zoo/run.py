"""A zoo of runs: deliberately sick ones and good ones, which the thresholds of the health checks come from.

    python plots/zoo/run.py                     # all runs that are not in plots/zoo/metrics yet, one after the other
    python plots/zoo/run.py learning_rate_x3    # that run again
    python plots/zoo/run.py --show              # what the checks say of each

Each run is main.py's on the embedded model, small: 8 problems x 8 answers, at most 64 steps, 192 test problems,
about a minute on one core. Its log is thinned to what the checks read and kept in plots/zoo/metrics. A sick run has one
cause, in its settings or in a fault put into the program, and names the check that has to find it. tests/test_health.py
demands that this check does, and that no check complains about a good run.

Left out on purpose: faults that only a GPU or a large model has.
"""

import argparse
import contextlib
import dataclasses
import gzip
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import evaluator
import llms
import main
import rldatasets
from tracking import health, run_config, run_folder

HERE = Path(__file__).resolve().parent
BASE = run_config.PRESETS["tiny"] | dict(
    problems_per_step=8, minibatches=2, max_steps=24, warmup_steps=3, eval_steps=12, eval_problems=192, save_steps=24
)
DIGITS = 5  # significant ones of a committed number


@dataclass(frozen=True)
class Run:
    """A run of the zoo. finding: the name of the check that has to find it; None for a good run. fault: puts a fault
    into the program while the run lasts."""

    finding: str | None
    why: str
    settings: dict = field(default_factory=dict)
    fault: Callable = contextlib.nullcontext


# ---------------------------------------------------------------- faults


def changed_advantages(change):
    """change(advantages) in the place of compute_advantages' result."""
    real = main.compute_advantages
    return lambda: mock.patch.object(main, "compute_advantages", lambda *a, **named: change(real(*a, **named)))


def rewarded_by_company(reward):
    """reward(how many answers of the group have the same text) in the place of the rewards, right or wrong."""
    real = main.graded_records

    def graded_records(*arguments):
        records = real(*arguments)
        same = Counter((record["prompt"], record["completion"]) for record in records)
        return [r | {"reward": float(reward(same[r["prompt"], r["completion"]]))} for r in records]

    return lambda: mock.patch.object(main, "graded_records", graded_records)


def changed_problems(change):
    """change(split, problems) in the place of the problems that are loaded."""
    real = rldatasets.load_problems

    def load(name, split, limit=None, path=None):
        return change(split, real(name, split, limit, path))

    return lambda: mock.patch.object(rldatasets, "load_problems", load)


def wrong_golds(split, problems):
    if split == "test":
        return problems
    return [dataclasses.replace(problem, answer=str(int(problem.answer) + 1000)) for problem in problems]


def few_problems(split, problems):
    return problems if split == "test" else problems[:64]


@contextlib.contextmanager
def stale_actor():
    """The actor gets the policy's weights every tenth step alone. On a CPU policy and actor are one model, so this run
    has a copy."""
    real_actor, real_sync, calls = llms.make_actor, llms.sync_actor, 0

    def sync(actor, policy):
        nonlocal calls
        calls += 1
        if calls % 10 == 0:
            real_sync(actor, policy)

    make = mock.patch.object(llms, "make_actor", lambda policy, dtype, always_copy: real_actor(policy, dtype, True))
    with make, mock.patch.object(llms, "sync_actor", sync):
        yield


def wrong_stop_token():
    """A token that is never drawn ends an answer, and the real one does not."""
    return mock.patch.object(llms, "stop_ids", lambda model, tokenizer: [model.config.vocab_size - 1])


def integer_pays_for(pays):
    """pays(completion) in the place of the reward that "integer" names."""
    return lambda: mock.patch.dict(evaluator.REWARDS, integer=lambda completion, *_: float(pays(completion)))


def well_formed_and_short(completion):
    return evaluator.format_reward(completion) == 1 and len(completion) <= 52  # a guess, without any reasoning


# ---------------------------------------------------------------- the runs

SICK = {
    "format_hacking": Run(
        "Reward without accuracy",
        "short answers in the right form are rewarded, right or wrong",
        dict(rewards="integer:1"),
        integer_pays_for(well_formed_and_short),
    ),
    "entropy_collapse": Run(
        "Entropy",
        "answers that many of a group give are rewarded, right or wrong",
        dict(learning_rate=3e-4),
        rewarded_by_company(lambda same: same / 8),
    ),
    "entropy_explosion": Run(
        "Rising entropy",
        "answers that no other of a group gives are rewarded",
        dict(learning_rate=3e-4),
        rewarded_by_company(lambda same: same == 1),
    ),
    "learning_rate_x3": Run(
        "Learning", "three times the learning rate", dict(learning_rate=4.5e-4, final_lr_fraction=1.0)
    ),
    "learning_rate_x10": Run(
        "Accuracy after its peak", "ten times the learning rate", dict(learning_rate=1.5e-3, final_lr_fraction=1.0)
    ),
    "length_explosion": Run(
        "Length",
        "longer texts are paid",
        dict(rewards="integer:1", max_prompt_length=370, max_completion_length=140, learning_rate=4.5e-4),
        integer_pays_for(lambda completion: len(completion) / 300),
    ),
    "dead_groups": Run(
        "Groups of equal rewards",
        "no gold answer of the training problems is right",
        dict(rewards="accuracy:1", max_steps=12),
        changed_problems(wrong_golds),
    ),
    "tiny_clip": Run(
        "Clipping",
        "the ratio may move by 1e-4",
        dict(clip_low=1e-4, clip_high=1e-4, minibatches=4, max_steps=16),
    ),
    "train_test_gap": Run(
        "Training against test",
        "64 problems, again and again",
        dict(updates_per_rollout=3, max_steps=64, eval_problems=768),
        changed_problems(few_problems),
    ),
    "stale_rollouts": Run(
        "Log-prob gap", "rollouts of a policy that is up to ten steps old", dict(max_steps=20), stale_actor
    ),
    "wrong_stop_token": Run(
        "Truncation", "answers do not end where the model ends them", dict(max_steps=10), wrong_stop_token
    ),
    "sign_error": Run(
        "Accuracy after its peak",
        "advantages with the wrong sign",
        dict(max_steps=16),
        changed_advantages(lambda advantages: -advantages),
    ),
}
GOOD = {
    "seed0": Run(None, "the base of the zoo"),
    "seed1": Run(None, "another seed", dict(seed=1)),
    "seed2": Run(None, "another seed", dict(seed=2)),
    "grpo_scaled": Run(None, "another loss", dict(loss_type="grpo", advantage_scale="group")),
    "young": Run(None, "4 steps old", dict(max_steps=4)),
    "soft": Run(None, "mixtures of two tokens", dict(soft_thinking=True)),
    "solved": Run(
        None,
        "a trained model, which has little left to learn",
        dict(model_name="TRAINED", temperature=0.5, max_steps=16, learning_rate=5e-5),
    ),
    "cispo": Run(None, "another loss", dict(loss_type="cispo")),
    "beta": Run(None, "with a KL term", dict(beta=0.01)),
    "lora": Run(None, "adapters of rank 16, at ten times the learning rate", dict(lora_rank=16, learning_rate=1.5e-3)),
}


def trained_model(folder: Path) -> str:
    """The embedded model after 45 seconds of supervised training on the data set's solutions."""
    sys.path.append(str(HERE.parent / "study"))
    import study

    budget = study.Budget(45)
    with mock.patch.object(run_folder, "stopwatch", budget.stopwatch):
        return study.sft_on_gold(study.Job(0, 45, None, folder, budget))


def log_of(run: Run) -> list[dict]:
    """Makes the run -> the rows of its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        settings = BASE | run.settings | {"output_dir": f"{folder}/run"}
        if settings["model_name"] == "TRAINED":
            settings["model_name"] = trained_model(Path(folder) / "trained")
        with run.fault():
            main.train(run_config.GRPOConfig(**settings))
        return run_folder.JsonLines(Path(folder) / "run" / "metrics.jsonl").read()


def thinned(rows: list[dict]) -> list[dict]:
    """The rows with what the checks read, rounded."""
    return [
        {key: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for key, value in row.items()}
        for row in ({key: row[key] for key in row if key in health.KEYS} for row in rows)
    ]


def kept_logs(runs: dict[str, Run]) -> list[str]:
    """The names of those whose log is kept."""
    return [name for name in runs if (HERE / "metrics" / f"{name}.jsonl.gz").exists()]


def kept_log(name: str) -> list[dict]:
    with gzip.open(HERE / "metrics" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def show(runs: dict[str, Run]) -> None:
    for name in kept_logs(runs):
        found = [f"{f.level}: {f.name}" for f in health.find_health(kept_log(name)) if f.level != "ok"]
        print(f"{name:20} wanted: {runs[name].finding or 'nothing':24} found: {'; '.join(found) or 'nothing'}")


def command_line() -> None:
    runs = SICK | GOOD
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *runs], help="runs to make again; default: those not made yet")
    parser.add_argument("--show", action="store_true", help="only print what the checks say of the committed logs")
    args = parser.parse_args()
    metrics = HERE / "metrics"
    metrics.mkdir(exist_ok=True)
    for name in [] if args.show else args.names or [n for n in runs if n not in kept_logs(runs)]:
        torch.manual_seed(0)
        started = time.time()
        rows = log_of(runs[name])
        text = "".join(json.dumps(row) + "\n" for row in thinned(rows))
        (metrics / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{name}: {time.time() - started:.0f} s", flush=True)
    show(runs)


if __name__ == "__main__":
    command_line()
