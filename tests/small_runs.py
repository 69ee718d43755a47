"""Settings and data of runs that take a second, and what such a run leaves, for several test files."""

import json
from pathlib import Path
from types import SimpleNamespace

import rldatasets
from distillation.config import PRESETS as DISTILL_PRESETS
from distillation.config import DistillConfig
from distillation.pipeline_config import PRESETS as PIPELINE_PRESETS
from distillation.pipeline_config import PipelineConfig
from games.config import PRESETS as SELF_PLAY_PRESETS
from games.config import SelfPlayConfig
from tracking.run_config import PRESETS, GRPOConfig


def tiny_config(output_dir, **overrides) -> GRPOConfig:
    settings = PRESETS["tiny"] | dict(
        output_dir=output_dir and str(output_dir), max_steps=2, problems_per_step=4, group_size=4, eval_steps=2,
        eval_problems=8, save_steps=2, warmup_steps=1, learning_rate=1e-3,
    )  # fmt: skip
    return GRPOConfig(**(settings | overrides))


def distill_config(folder="unused", **overrides) -> DistillConfig:
    small = dict(
        output_dir=str(folder), teacher_name="tiny", train_problems=96, problems_per_step=48, epochs=2.0, batch_size=8,
        save_steps=2, eval_problems=8, warmup_steps=1,
    )  # fmt: skip
    return DistillConfig(**(DISTILL_PRESETS["tiny"] | small | overrides))


def self_play_config(folder, **overrides) -> SelfPlayConfig:
    small = dict(
        output_dir=str(folder), games_per_step=16, group_size=4, minibatches=2, max_steps=2, cold_start_steps=2,
        cold_start_rows=16, eval_steps=2, eval_games=8, save_steps=2, snapshot_steps=1, warmup_steps=1,
    )  # fmt: skip
    return SelfPlayConfig(**(SELF_PLAY_PRESETS[overrides.get("game", "nim")] | small | overrides))


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"} for row in rows]


def small_dataset(folder: Path, count: int = 16) -> str:
    """Makes the folder, with so many problems of each split: they load faster than the endless task."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        problems = rldatasets.generate_arithmetic(split, count)
        lines = [json.dumps({"question": p.question, "answer": p.solution}) + "\n" for p in problems]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder)


class InThisProcess:
    """In place of the process that a model is measured in: starting one takes seconds."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        return SimpleNamespace(result=lambda: function(*arguments))


def pipeline_config(folder, **overrides) -> PipelineConfig:
    small = dict(
        output_dir=folder and str(folder), problems_per_step=4, group_size=4, cold_start_examples=8,
        cold_start_batch_size=4, rl_steps=2, rl_learning_rate=1e-3, train_problems=16, samples_per_problem=2,
        sft_batch_size=4, eval_problems=4, eval_samples=2, save_steps=1,
    )  # fmt: skip
    return PipelineConfig(**(PIPELINE_PRESETS["tiny"] | small | overrides))


class Stop(BaseException):
    """In place of a signal that cannot be caught."""


def stop_at(patch, owner, name, call):
    """The function raises at its n-th call, as a process that is killed there."""
    original, calls = getattr(owner, name), []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise Stop
        return original(*arguments, **options)

    patch.setattr(owner, name, stopping)
