"""A run's folder: its files, its logs, its settings.

    output_dir/args.json              the full effective configuration, versions, git revision, device
    output_dir/metrics.jsonl          one flat object per step, appended and flushed
    output_dir/samples.jsonl          prompts, completions, rewards, advantages
    output_dir/report.html            one page about the run (report.py)
    output_dir/rewards/               copies of the user's files that had the rewards
    output_dir/refused_sample.json    what a reward of the user's file failed on, where it did
    output_dir/plots/                 redrawn as the run goes on
    output_dir/checkpoints/step-N/    model and tokenizer as `from_pretrained` reads them, plus trainer_state.pt, and
                                      files.json: how long each file is
    output_dir/checkpoints/latest     and `best`: links to one of them; on a disk without links, text files that hold
                                      its name

checkpoints.py writes the checkpoints. Every file appears complete or not at all: it is written under a temporary name
and renamed. Logs are appended line by line. Of several processes, the main one writes.
Left out on purpose: databases, dashboards, uploads. Everything is a file that other tools read.
"""

import contextlib
import dataclasses
import datetime
import errno
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine import distributed

FILES = ("args.json", "metrics.jsonl", "samples.jsonl", "greedy.jsonl", "sampled.jsonl", "eval.json", "report.html")
FILES += ("refused_sample.json",)
CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")


def create_folder(output_dir: str, overwrite: bool = False) -> Path:
    """A writable folder for a new run. Raises ValueError when a run is in it already, or it cannot be written."""
    folder = Path(output_dir).expanduser()
    try:
        files = [folder / name for name in FILES]
        if any(file.exists() for file in files):
            if not overwrite:
                raise ValueError(
                    f"output_dir {output_dir!r} already holds a run: give another one, continue it with "
                    "--resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
                )
            for name in ("plots", "rewards", "checkpoints"):
                if (folder / name).exists():
                    remove_folder(folder / name)
            for file in files:
                file.unlink(missing_ok=True)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = folder / "checkpoints" / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {output_dir!r}: {error.strerror}") from error
    return folder


def keep_copies(folder: Path, files: list[Path]) -> None:
    """Copies the files into the folder, so that a run's folder tells what made it."""
    for file in files:
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder)


def unused_folder(name: str) -> str:
    """`name`, or `name-2`, `name-3`, ...: the first folder without a run."""
    candidates = (name if n == 1 else f"{name}-{n}" for n in range(1, sys.maxsize))
    return next(c for c in candidates if not Path(c, "args.json").exists())


def _git_revision() -> str | None:
    """The commit this code is at; None outside a repository, or without git."""
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    """None for one that is not installed: a run that reads JSON alone does without `datasets`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_args(folder: Path, config: dict, device: torch.device) -> None:
    """Writes args.json: what is needed to repeat the run."""
    if not distributed.is_main_process():
        return
    record = {
        "config": config,
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "git_revision": _git_revision(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
    }
    new = folder / "args.tmp"  # a resumed run writes it again; killed in between, it must still find the old one
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(new, folder / "args.json")


def fix_prompt_date(config, *folders: Path):
    """The config (a dataclass) with `prompt_date` set, so that chat templates that write today's date give the same
    prompts for the whole run: the date of the run in the first of the folders that has one, else today's.

    A run that was begun without a date keeps none.
    """
    return (
        config
        if config.prompt_date
        else dataclasses.replace(config, prompt_date=distributed.run_on_main(_prompt_date, folders))
    )


def _prompt_date(folders: tuple[Path, ...]) -> str | None:
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads((folder / "args.json").read_text(encoding="utf-8"))["config"].get("prompt_date")
    return datetime.date.today().isoformat()


def check_same_config(folder: Path, config: dict, may_differ: tuple[str, ...]) -> None:
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


class JsonLines:
    """An append-only log, one JSON object a line, flushed so that another program can follow it."""

    def __init__(self, file: Path):
        self.file = file

    def append(self, *rows: dict) -> None:
        if not distributed.is_main_process():
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

    def truncate_after(self, step: int) -> None:
        """Deletes the rows after `step`, which a resumed run writes again."""
        self.replace([row for row in self.read() if row["step"] <= step])

    def replace(self, rows: list[dict]) -> None:
        """Replaces all rows in one step."""
        if not distributed.is_main_process():
            return
        replacement = JsonLines(self.file.with_suffix(".tmp"))
        replacement.file.unlink(missing_ok=True)
        replacement.append(*rows)
        flush_to_disk(replacement.file)
        os.replace(replacement.file, self.file)


def _finite(value):
    """None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flush_to_disk(*paths: Path) -> None:
    """Flushes files and folders, so that a power cut after a rename does not leave empty ones. Does what it can on a
    disk that cannot flush (some network drives, folders on Windows)."""
    for path in paths:
        if os.name == "nt" and path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in CANNOT_FLUSH:
                raise
        finally:
            os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Renames the folder before deleting it, so that a half-deleted one cannot be taken for a checkpoint."""
    doomed = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


@contextlib.contextmanager
def stopwatch(device: torch.device):
    """Measures the wall-clock seconds of the block, the GPU's work included. Yields a function that returns them."""
    started = time.perf_counter()
    seconds = []
    yield lambda: seconds[0]
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
