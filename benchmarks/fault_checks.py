"""How the folder of a run with faults differs from that of the same run without. For faults.py."""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint or a link to one; 0 if it is not there."""
    return int(checkpoint.resolve().name.rpartition("-")[2]) if checkpoint.exists() else 0


def same(a, b) -> bool:
    """Equal to the last bit: tensors, and lists and dicts of them."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def checkpoint_problems(checkpoint: Path, reference: Path) -> list[str]:
    """How a checkpoint differs from the one of the same name in the run without faults."""
    expected = reference / "checkpoints" / checkpoint.resolve().name.removeprefix(".replaced-")
    try:
        if not same(load_file(checkpoint / "model.safetensors"), load_file(expected / "model.safetensors")):
            return [f"other weights in {checkpoint.name}"]
        states = [torch.load(folder / "trainer_state.pt", weights_only=True) for folder in (checkpoint, expected)]
        for state in states:
            del state["best"]  # a step that a signal ended is evaluated later; run_problems looks at the link
        if not same(*states):
            return [f"another trainer state in {checkpoint.name}"]
    except Exception as error:  # whatever stops a reader
        return [f"{checkpoint.name} cannot be read: {error!r}"]
    names = [{file.name: file.stat().st_size for file in folder.iterdir()} for folder in (checkpoint, expected)]
    return [] if names[0] == names[1] else [f"other files in {checkpoint.name}"]


def visible_problems(folder: Path, reference: Path) -> list[str]:
    """What is wrong with the checkpoints that a user sees in the folder of a run, finished or not."""
    checkpoints = folder / "checkpoints"
    problems = [
        problem for path in checkpoints.glob("[!.]*") for problem in checkpoint_problems(path.resolve(), reference)
    ]
    # A run that is killed while it writes its first checkpoint may have one that nothing points at yet.
    if any(step_of(path) > 1 for path in checkpoints.glob("step-*")) and not (checkpoints / "latest").exists():
        problems.append("no latest")
    return problems


def rows_of(log: Path) -> list[dict]:
    """The rows of a log without their times; a torn line is an error. Within a step, test answers come first (the
    evaluation of a step that a signal ended is made when the run goes on)."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    timing = ("time/rollout", "time/train", "tokens_per_second")
    rows = [{key: value for key, value in row.items() if key not in timing} for row in rows]
    return sorted(rows, key=lambda row: (row["step"], row.get("split") == "train"))


def log_problems(folder: Path, reference: Path) -> list[str]:
    """How the logs of a finished run differ from those of the run without faults."""
    problems = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        try:
            rows, expected = rows_of(folder / name), rows_of(reference / name)
        except ValueError as error:
            problems.append(f"{name} has a torn line: {error}")
            continue
        steps, expected_steps = (Counter(row["step"] for row in some) for some in (rows, expected))
        if steps != expected_steps:
            problems.append(f"{name}: rows a step {dict(sorted(steps.items()))}")
        elif rows != expected:
            problems.append(f"{name}: {sum(a != b for a, b in zip(rows, expected, strict=True))} rows differ")
    return problems


def run_problems(folder: Path, reference: Path) -> list[str]:
    """How a finished run differs from the one without faults."""
    checkpoints = folder / "checkpoints"
    problems = visible_problems(folder, reference) + log_problems(folder, reference)
    for link in ("latest", "best"):
        if step_of(checkpoints / link) != step_of(reference / "checkpoints" / link):
            problems.append(f"{link} is of step {step_of(checkpoints / link)}")
    if hidden := sorted(path.name for path in checkpoints.glob(".*")):
        problems.append(f"left behind: {', '.join(hidden)}")
    return problems
