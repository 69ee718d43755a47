"""A run's folder: what a run writes down, and how it is found again.

    output_dir/args.json              the full effective configuration, versions, git revision, device
    output_dir/metrics.jsonl          one flat object per step, appended and flushed
    output_dir/samples.jsonl          prompts, completions, rewards, advantages
    output_dir/plots/                 redrawn as the run goes on
    output_dir/checkpoints/step-N/    model and tokenizer as `from_pretrained` reads them, plus trainer_state.pt
    output_dir/checkpoints/latest     and `best`: links to one of them

Nothing half-written is ever found: checkpoints are written under a temporary name and renamed when complete.
Left out on purpose: databases, dashboards, uploads. Everything is a file that other tools read.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

FILES = ("args.json", "metrics.jsonl", "samples.jsonl", "greedy.jsonl", "sampled.jsonl", "eval.json")
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")


def create_folder(output_dir: str, overwrite: bool = False) -> Path:
    """A writable folder for a new run. Raises ValueError when a run is in it already, or it cannot be written."""
    folder = Path(output_dir)
    try:
        files = [folder / name for name in FILES]
        if any(file.exists() for file in files):
            if not overwrite:
                raise ValueError(
                    f"output_dir {output_dir!r} already holds a run: give another one, continue it with "
                    "--resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
                )
            for name in ("plots", "checkpoints"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for file in files:
                file.unlink(missing_ok=True)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = folder / "checkpoints" / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {output_dir!r}: {error.strerror}") from error
    return folder


def unused_folder(name: str) -> str:
    """`name`, or `name-2`, `name-3`... : the first in which there is no run yet."""
    candidates = (name if n == 1 else f"{name}-{n}" for n in range(1, sys.maxsize))
    return next(c for c in candidates if not Path(c, "args.json").exists())


def _git_revision() -> str | None:
    """The commit this code is at; None outside a repository, or without git."""
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_args(folder: Path, config: dict, device: torch.device) -> None:
    """args.json: what is needed to make the run again."""
    record = {
        "config": config,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "git_revision": _git_revision(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    (folder / "args.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def refuse_other_settings(folder: Path, config: dict, may_differ: tuple[str, ...]) -> None:
    """Raises ValueError, naming the first of them, if the run in `folder` was made with other settings."""
    before = json.loads((folder / "args.json").read_text(encoding="utf-8"))["config"]
    for name, value in config.items():
        if name not in may_differ and before.get(name) != value:
            raise ValueError(
                f"--{name} {value}: what is in {str(folder)!r} was made with {before.get(name)}; keep that, give "
                "another --output_dir, or replace it with --overwrite_output_dir"
            )


class Stopped(Exception):
    """A run ended before its last step, with a checkpoint. signal: the one that asked for it, or None."""

    def __init__(self, signal: int | None, message: str):
        super().__init__(message)
        self.signal = signal


class Interrupt:
    """While entered, Ctrl-C and SIGTERM set `signal`, for a loop to look at when its step is done. A second one ends at
    once."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.signal is not None:
            sys.exit(128 + number)
        self.signal = number
        print("\nfinishing this step, then saving; once more ends at once", file=sys.stderr)


class JsonLines:
    """An append-only log, one JSON object a line, flushed so that another program can follow it."""

    def __init__(self, file: Path):
        self.file = file

    def append(self, *rows: dict) -> None:
        with open(self.file, "a", encoding="utf-8") as out:
            out.writelines(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n" for row in rows)

    def read(self) -> list[dict]:
        """All complete rows; a line torn by a crash is left out."""
        rows = []
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def keep_until(self, step: int) -> None:
        """Forgets the rows after `step`: a resumed run writes them again."""
        self.replace([row for row in self.read() if row["step"] <= step])

    def replace(self, rows: list[dict]) -> None:
        """The log then holds these rows and nothing else; it is never half-written."""
        replacement = JsonLines(self.file.with_suffix(".tmp"))
        replacement.file.unlink(missing_ok=True)
        replacement.append(*rows)
        os.replace(replacement.file, self.file)


def _finite(value):
    """None in place of what JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_checkpoint(folder: Path, step: int, model, tokenizer, trainer_state: dict, keep: int, is_best: bool) -> Path:
    """Writes checkpoints/step-N, points `latest` (and `best`) at it; keeps the newest `keep` and those two."""
    checkpoints = folder / "checkpoints"
    target, temporary, replaced = (checkpoints / f"{prefix}step-{step}" for prefix in ("", ".writing-", ".replaced-"))
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    torch.save(trainer_state, temporary / "trainer_state.pt")
    _flush_to_disk(temporary)
    if target.exists():  # a resumed run came here again: links that point at it are kept whole meanwhile
        shutil.copytree(target, replaced, dirs_exist_ok=True)
        for link in ("latest", "best"):
            if (checkpoints / link).resolve() == target.resolve():
                _point(checkpoints / link, replaced)
        _remove(target)
    os.replace(temporary, target)
    for link in ("latest", "best"):
        if link == "latest" or is_best or (checkpoints / link).resolve() == replaced.resolve():
            _point(checkpoints / link, target)
    shutil.rmtree(replaced, ignore_errors=True)

    linked = {(checkpoints / link).resolve() for link in ("latest", "best")}
    steps = {int(path.name[5:]): path for path in checkpoints.glob("step-*") if path.name[5:].isdecimal()}
    for _, old in sorted(steps.items())[:-keep]:
        if old.resolve() not in linked:
            _remove(old)
    return target


def _flush_to_disk(folder: Path) -> None:
    """So that a power cut after the renaming does not leave empty files."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _point(link: Path, target: Path) -> None:
    new = link.with_name(f".{link.name}")
    new.unlink(missing_ok=True)
    new.symlink_to(target.name)
    os.replace(new, link)


def _remove(checkpoint: Path) -> None:
    """Takes its name away first: what is half deleted must not pass for a checkpoint."""
    doomed = checkpoint.with_name(f".removing-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def find_checkpoint(output_dir: str | None, which: str) -> tuple[Path, Path]:
    """(the run's folder, a checkpoint in it by name: "latest", "best", "step-20"; or any checkpoint by its path)."""
    if output_dir is None:
        raise ValueError("--resume_from_checkpoint needs --output_dir: the folder of the run to go on with")
    checkpoints = Path(output_dir) / "checkpoints"
    for candidate in (checkpoints / which, Path(which)):
        if (candidate / "trainer_state.pt").is_file():
            if not checkpoints.is_dir():
                raise ValueError(f"output_dir {output_dir!r} holds no run to go on with")
            return Path(output_dir), candidate.resolve()
    there = sorted(path.name for path in checkpoints.glob("[!.]*"))
    raise ValueError(f"no checkpoint {which!r} in {output_dir!r}; there: {', '.join(there) or 'none'}")


@contextlib.contextmanager
def stopwatch(device: torch.device):
    """Wall-clock seconds of the block, until the GPU has finished too; call what it yields to read them."""
    started = time.perf_counter()
    seconds = []
    yield lambda: seconds[0]
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
