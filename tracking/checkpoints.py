"""A run's checkpoints: saved, found again, pruned.

A checkpoint is written under a temporary name and renamed when it is complete, so a half-written one is never found. A
run that is resumed from an older checkpoint deletes the later checkpoints after its next save, except `best`, which is
kept until there is a better one.

`latest` and `best` are symbolic links. On a disk without them (network drives, exFAT) they are text files that hold the
checkpoint's name; in a run that was copied by a tool that follows links they are folders. `resolve` reads all three.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from tracking.run_folder import check_same_config, flush_to_disk, remove_folder

LINKS = ("latest", "best")


def try_saving(model, tokenizer, folder: Path | None = None) -> None:
    """Writes and removes what a checkpoint needs beside the weights: configuration, generation configuration,
    tokenizer, and a link. What would fail at the first checkpoint fails here, before the first step.

    folder: the run's; default, a temporary folder, which tells whether the model can be saved at all. ValueError,
    one line: for whatever cannot be saved. (llms.load has repaired the generation configuration, where it could.)
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            try_saving(model, tokenizer, Path(temporary))
        return
    trial = folder / ".trying-to-save"
    try:
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir()
        for what, save in (
            ("its configuration", lambda: model.config.save_pretrained(trial)),
            ("its generation_config.json", lambda: model.generation_config.save_pretrained(trial)),
            ("its tokenizer", lambda: tokenizer.save_pretrained(trial)),
        ):
            try:
                save()
            except OSError:
                raise
            except Exception as error:  # the libraries raise many kinds; the reader needs one way out
                reason = " ".join(str(error).split())
                raise ValueError(f"checkpoints cannot be saved: {what} is refused ({reason})") from error
        _point(trial / "latest", trial / "step-0")
    except OSError as error:
        raise ValueError(f"cannot write checkpoints to {str(folder)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(trial, ignore_errors=True)


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
    """Writes checkpoints/step-N and points `latest` (and `best`) at it. Keeps the newest `keep`, `latest` and `best`.

    weights: the state dict of a sharded model. Raises OSError when the checkpoint cannot be written, for example on a
    full disk; earlier checkpoints are then intact.
    """
    checkpoints = folder / "checkpoints"
    target, temporary, replaced = (checkpoints / f"{prefix}step-{step}" for prefix in ("", ".writing-", ".replaced-"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        torch.save(trainer_state, temporary / "trainer_state.pt")
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        sizes = {file.relative_to(temporary).as_posix(): file.stat().st_size for file in files}
        (temporary / "files.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
        # The logs too: no checkpoint may be ahead of them.
        flush_to_disk(*temporary.rglob("*"), temporary, *folder.glob("*.jsonl"))
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch.save have errors of their own
        free = shutil.disk_usage(checkpoints).free / 2**20
        shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
        raise OSError(f"cannot write {target} ({free:,.0f} MiB were free): {error}") from error
    if target.exists():  # a resumed run saves this step again; links that point at it keep a complete copy meanwhile
        shutil.copytree(target, replaced, dirs_exist_ok=True)
        flush_to_disk(*replaced.rglob("*"), replaced)
        for link in LINKS:
            if resolve(checkpoints / link) == target.resolve():
                _point(checkpoints / link, replaced)
        remove_folder(target)
    os.replace(temporary, target)
    # `best` first: a run that is killed between the two resumes before this step and finds it best again.
    for link in ("best", "latest"):
        if link == "latest" or is_best or resolve(checkpoints / link) == replaced.resolve():
            _point(checkpoints / link, target)
    flush_to_disk(checkpoints)  # the new names, before the old ones go
    _prune(checkpoints, step, keep)
    return target


def _prune(checkpoints: Path, step: int, keep: int) -> None:
    """Keeps the newest `keep` checkpoints up to `step`, and the targets of `latest` and `best`. Deletes later steps,
    which are from before the run was resumed at an older one, and hidden folders, which a killed run has left."""
    linked = {resolve(checkpoints / link) for link in LINKS}
    steps = {int(path.name[5:]): path for path in checkpoints.glob("step-*") if path.name[5:].isdecimal()}
    kept = {steps[number] for number in sorted(number for number in steps if number <= step)[-keep:]}
    for path in steps.values():
        if path not in kept and path.resolve() not in linked:
            remove_folder(path)
    for path in checkpoints.glob(".*-step-*"):
        if path.resolve() not in linked:
            shutil.rmtree(path)


def mark_best(folder: Path, step: int) -> None:
    """Points `best` at checkpoints/step-N if it exists. (A run that was resumed by a path may have it elsewhere.)"""
    checkpoints = folder / "checkpoints"
    if (checkpoints / f"step-{step}").is_dir():
        _point(checkpoints / "best", checkpoints / f"step-{step}")


def _point(link: Path, target: Path) -> None:
    """Makes `link` lead to `target` beside it, in place of whatever it is now."""
    new = link.with_name(f".{link.name}")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(target.name)
    except (OSError, NotImplementedError):  # this disk has no links, or not for this user
        new.write_text(target.name + "\n", encoding="utf-8")
        flush_to_disk(new)
    if link.is_dir() and not link.is_symlink():  # a copy of the run followed its links
        copied = link.with_name(f".removing-{link.name}")
        shutil.rmtree(copied, ignore_errors=True)
        os.replace(link, copied)
        os.replace(new, link)
        shutil.rmtree(copied, ignore_errors=True)
    else:
        os.replace(new, link)


def resolve(path: str | Path) -> Path:
    """Where a path leads: links are followed, and so are the text files that stand in for `latest` and `best`."""
    path = Path(path)
    if path.name in LINKS and path.is_file():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            name = path.read_text(encoding="utf-8").strip()
            if "step-" in name and Path(name).name == name:
                path = path.with_name(name)
    return path.resolve()


def resolve_model_name(name: str) -> str:
    """What to load for a model's name: the name itself, unless it is a text file that stands in for a checkpoint."""
    path = Path(name).expanduser()
    return str(resolve(path)) if path.name in LINKS and path.is_file() else str(path) if name[:1] == "~" else name


def find_checkpoint(output_dir: str | None, which: str) -> tuple[Path, Path]:
    """(the run's folder, a checkpoint in it by name: "latest", "best", "step-20"; or any checkpoint by its path).

    Raises ValueError when there is none, or when one of its files is missing or too short. The message names the file
    and the undamaged checkpoints of the run.
    """
    if output_dir is None:
        raise ValueError("--resume_from_checkpoint needs --output_dir: the folder of the run to go on with")
    folder, named = Path(output_dir).expanduser(), Path(which).expanduser()
    checkpoints = folder / "checkpoints"
    whole = sorted(p.name for p in checkpoints.glob("[!.]*") if resolve(p).is_dir() and _damage(resolve(p)) is None)
    there = f"there: {', '.join(whole) or 'none'}"
    for candidate in (checkpoints / which, named):
        candidate = candidate if "\0" in which else resolve(candidate)
        if any((candidate / name).is_file() for name in ("trainer_state.pt", "files.json")):
            if not checkpoints.is_dir():
                raise ValueError(f"output_dir {output_dir!r} holds no run to go on with")
            if damage := _damage(candidate):
                raise ValueError(f"checkpoint {which!r} is damaged: {damage}; whole ones {there}")
            return folder, candidate
    raise ValueError(f"no checkpoint {which!r} in {output_dir!r}; {there}")


def _damage(checkpoint: Path) -> str | None:
    """Describes the first file that is missing or has another length than when it was written; None if all are fine."""
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


def load_trainer_state(checkpoint: Path) -> dict:
    """What save_checkpoint was given as trainer_state: step, optimizer, and so on. Tensors are mapped from the file."""
    return torch.load(checkpoint / "trainer_state.pt", weights_only=True, map_location="cpu", mmap=True)


def find_resumed(config, may_differ: tuple[str, ...]) -> tuple[Path, Path, dict]:
    """(the run's folder, the checkpoint that --resume_from_checkpoint names, its trainer state).

    Raises ValueError, one line, if there is none, if settings other than may_differ have changed, or no step is left.
    """
    folder, checkpoint = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
    check_same_config(folder, dataclasses.asdict(config), may_differ)
    state = load_trainer_state(checkpoint)
    if state["step"] >= config.max_steps:
        raise ValueError(f"--max_steps {config.max_steps}: the checkpoint is at step {state['step']} already")
    return folder, checkpoint, state
