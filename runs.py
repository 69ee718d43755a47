"""A run's folder: what a run writes down, and how it is found again.

    output_dir/args.json              the full effective configuration, versions, git revision, device
    output_dir/metrics.jsonl          one flat object per step, appended and flushed
    output_dir/samples.jsonl          prompts, completions, rewards, advantages
    output_dir/report.html            one page about the run (report.py)
    output_dir/plots/                 redrawn as the run goes on
    output_dir/checkpoints/step-N/    model and tokenizer as `from_pretrained` reads them, plus trainer_state.pt, and
                                      files.json: how long each file is
    output_dir/checkpoints/latest     and `best`: links to one of them

Nothing half-written is ever found: checkpoints are written under a temporary name and renamed when complete. A run that
goes on from an older checkpoint makes the later steps again: their log lines go at once, their checkpoints when the
first new one is complete (except `best`, which stays until there is a better one). Of several processes, the main one
writes.
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
from safetensors import SafetensorError

import processes

FILES = ("args.json", "metrics.jsonl", "samples.jsonl", "greedy.jsonl", "sampled.jsonl", "eval.json", "report.html")
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
                if (folder / name).exists():
                    _remove(folder / name)
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
    if not processes.is_main():
        return
    record = {
        "config": config,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "git_revision": _git_revision(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
    }
    new = folder / "args.tmp"  # a resumed run writes it again: killed meanwhile, it must still find the old one
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(new, folder / "args.json")


def refuse_other_settings(folder: Path, config: dict, may_differ: tuple[str, ...]) -> None:
    """Raises ValueError, naming the first of them, if the run in `folder` was made with other settings, or if its
    args.json cannot be read."""
    try:
        before = json.loads((folder / "args.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'args.json'} cannot be read, so its settings are unknown: {error}") from error
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


def finish(accelerator) -> None:
    """Ends the logging of an accelerate.Accelerator; its own end_training would leave the other processes as well."""
    for tracker in accelerator.trackers:
        tracker.finish()


class JsonLines:
    """An append-only log, one JSON object a line, flushed so that another program can follow it."""

    def __init__(self, file: Path):
        self.file = file

    def append(self, *rows: dict) -> None:
        if not processes.is_main():
            return
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
        if not processes.is_main():
            return
        replacement = JsonLines(self.file.with_suffix(".tmp"))
        replacement.file.unlink(missing_ok=True)
        replacement.append(*rows)
        _flush_to_disk(replacement.file)
        os.replace(replacement.file, self.file)


def _finite(value):
    """None in place of what JSON has no word for."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_checkpoint(
    folder: Path,
    step: int,
    model,
    tokenizer,
    trainer_state: dict,
    keep: int,
    is_best: bool,
    weights: dict | None = None,
) -> Path:
    """Writes checkpoints/step-N, points `latest` (and `best`) at it; keeps the newest `keep` and those two.

    weights: the model's state dict, where the model itself has only a part of it. Raises OSError when the checkpoint
    cannot be written, on a full disk for example; those before it are intact then.
    """
    checkpoints = folder / "checkpoints"
    target, temporary, replaced = (checkpoints / f"{prefix}step-{step}" for prefix in ("", ".writing-", ".replaced-"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        torch.save(trainer_state, temporary / "trainer_state.pt")
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        (temporary / "files.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
        # The logs too: no checkpoint may be ahead of them.
        _flush_to_disk(*temporary.iterdir(), temporary, *folder.glob("*.jsonl"))
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch.save have errors of their own
        free = shutil.disk_usage(checkpoints).free / 2**20
        shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
        raise OSError(f"cannot write {target} ({free:,.0f} MiB were free): {error}") from error
    if target.exists():  # a resumed run came here again: links that point at it are kept whole meanwhile
        shutil.copytree(target, replaced, dirs_exist_ok=True)
        _flush_to_disk(*replaced.iterdir(), replaced)
        for link in ("latest", "best"):
            if (checkpoints / link).resolve() == target.resolve():
                _point(checkpoints / link, replaced)
        _remove(target)
    os.replace(temporary, target)
    for link in ("best", "latest"):  # killed between the two, a run goes on before this step, and finds it best again
        if link == "latest" or is_best or (checkpoints / link).resolve() == replaced.resolve():
            _point(checkpoints / link, target)
    _flush_to_disk(checkpoints)  # the new names, before the old ones go
    _prune(checkpoints, step, keep)
    return target


def _prune(checkpoints: Path, step: int, keep: int) -> None:
    """Leaves the newest `keep` up to `step`, and what `latest` and `best` point at. Later steps are of a past that the
    run has gone back on; hidden folders are what a killed run left half-done."""
    linked = {(checkpoints / link).resolve() for link in ("latest", "best")}
    steps = {int(path.name[5:]): path for path in checkpoints.glob("step-*") if path.name[5:].isdecimal()}
    kept = {steps[number] for number in sorted(number for number in steps if number <= step)[-keep:]}
    for path in steps.values():
        if path not in kept and path.resolve() not in linked:
            _remove(path)
    for path in checkpoints.glob(".*-step-*"):
        if path.resolve() not in linked:
            shutil.rmtree(path)


def _flush_to_disk(*paths: Path) -> None:
    """Files and folders, so that a power cut after a renaming does not leave empty ones."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def mark_best(folder: Path, step: int) -> None:
    """Points `best` at checkpoints/step-N, if it is there: a run that was resumed by a path has it elsewhere."""
    checkpoints = folder / "checkpoints"
    if (checkpoints / f"step-{step}").is_dir():
        _point(checkpoints / "best", checkpoints / f"step-{step}")


def _point(link: Path, target: Path) -> None:
    new = link.with_name(f".{link.name}")
    new.unlink(missing_ok=True)
    new.symlink_to(target.name)
    os.replace(new, link)


def _remove(folder: Path) -> None:
    """Takes its name away first: what is half deleted must not pass for a checkpoint."""
    doomed = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def find_checkpoint(output_dir: str | None, which: str) -> tuple[Path, Path]:
    """(the run's folder, a checkpoint in it by name: "latest", "best", "step-20"; or any checkpoint by its path).

    Raises ValueError when there is none, or when one of its files is missing or too short; it names the file, and the
    checkpoints of the run that are whole.
    """
    if output_dir is None:
        raise ValueError("--resume_from_checkpoint needs --output_dir: the folder of the run to go on with")
    checkpoints = Path(output_dir) / "checkpoints"
    whole = sorted(path.name for path in checkpoints.glob("[!.]*") if path.is_dir() and _damage(path) is None)
    there = f"there: {', '.join(whole) or 'none'}"
    for candidate in (checkpoints / which, Path(which)):
        if any((candidate / name).is_file() for name in ("trainer_state.pt", "files.json")):
            if not checkpoints.is_dir():
                raise ValueError(f"output_dir {output_dir!r} holds no run to go on with")
            if damage := _damage(candidate):
                raise ValueError(f"checkpoint {which!r} is damaged: {damage}; whole ones {there}")
            return Path(output_dir), candidate.resolve()
    raise ValueError(f"no checkpoint {which!r} in {output_dir!r}; {there}")


def _damage(checkpoint: Path) -> str | None:
    """The first of its files that is missing, or not as long as when it was written; None if there is no such file."""
    checkpoint = checkpoint.resolve()
    sizes = {"trainer_state.pt": None}
    with contextlib.suppress(FileNotFoundError):  # then there is nothing to compare with
        try:
            sizes |= json.loads((checkpoint / "files.json").read_text(encoding="utf-8"))
        except ValueError:
            return f"{checkpoint / 'files.json'} is not what was written"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if size is not None and file.stat().st_size != size:
            return f"{file} has {file.stat().st_size:,} bytes of {size:,}"
    return None


@contextlib.contextmanager
def stopwatch(device: torch.device):
    """Wall-clock seconds of the block, until the GPU has finished too; call what it yields to read them."""
    started = time.perf_counter()
    seconds = []
    yield lambda: seconds[0]
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
