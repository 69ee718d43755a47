"""Fault injection: does a run survive what a week on a shared machine does to it?

    python benchmarks/faults.py --kills 30 --signals 5

A run of eight steps of the embedded model, with a checkpoint after each, is made once without any fault. Then the same
run is killed (SIGKILL) at random moments, told to stop (SIGTERM, SIGINT), given a full disk, a read-only one, damaged
files and NaNs, and resumed each time. It must end with the same weights bit for bit, the same metrics and samples, and
no step twice. A table says what was injected and what came out; the exit code is 1 if anything else happened.

Each run is a child that this process forks after its imports, which take longer than the run. For the files that is a
process's death like any other: SIGKILL runs no handler and empties no buffer, what the kernel had been given stays, the
rest is lost, and the parent holds none of the child's files open.

Left out on purpose: power cuts (the files are flushed before they are renamed, but only hardware shows that it helped),
bits that flip on the disk, several processes, GPUs (bit for bit is a promise for CPUs). No pictures, no report.
"""

import os

if __name__ == "__main__":  # before torch is imported: a fork survives neither a GPU in the parent nor other threads
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import argparse
import contextlib
import json
import math
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fault_checks import rows_of, run_problems, same, step_of, visible_problems

import evaluator
import llms
import main as program
import rldatasets
from tracking import checkpoints, command_line, plotter, report, run_folder, training_run
from tracking.run_config import parse_config

STEPS = 8
FLAGS = (
    f"--preset tiny --max_steps {STEPS} --problems_per_step 4 --group_size 4 --minibatches 1 --warmup_steps 1 "
    "--max_completion_length 12 --rewards tag_count --eval_problems 2 --eval_steps 1 --save_steps 1"
)
RESUME = "--resume_from_checkpoint latest"
KILLS_A_RUN = 5
STOPPED_AT = 3  # where the runs with damaged files stop
SKIPPED = "not injected: "


@dataclass
class Lab:
    """Where the runs are made, and the one without faults that they are compared with."""

    folder: Path
    rng: random.Random
    quick: bool = False  # leave out what is like something else
    results: dict[str, Counter] = field(default_factory=dict)  # fault -> what came out, how often
    violations: list[str] = field(default_factory=list)
    number: int = 0  # of folders given out
    save_seconds: float = 0.0  # of writing a checkpoint
    log_seconds: float = 0.0  # of writing to a log
    step_seconds: float = 0.0

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    def new_folder(self) -> Path:
        self.number += 1
        return self.folder / f"run-{self.number}"

    def flags(self, run: Path, *more: str) -> list[str]:
        return [*FLAGS.split(), "--dataset_path", str(self.folder), "--output_dir", str(run), *" ".join(more).split()]

    def record(self, fault: str, outcome: str, problems=()) -> None:
        """One injected fault: what came out, or the problems in its place."""
        self.results.setdefault(fault, Counter())["VIOLATION" if problems else outcome] += 1
        self.violations += [f"{fault}: {problem}" for problem in problems]


# ---------------------------------------------------------------- runs, as children


class Child:
    """A run in a process of its own. It tells through a pipe when it writes: b"s" a checkpoint, b"l" to a log."""

    def __init__(self, arguments: list[str], output: Path, tamper=lambda: None):
        """arguments: of main.py. tamper: called in the child before main, to plant a fault."""
        self.output = output
        self.pipe, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            self._be_the_run(arguments, write_end, tamper)
        os.close(write_end)

    def _be_the_run(self, arguments, write_end, tamper):
        code = 1
        try:
            descriptor = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            plotter.plot_run = report.make_report = lambda folder: None
            for owner, name, letter in (
                (checkpoints, "save_checkpoint", b"s"),
                (run_folder.JsonLines, "append", b"l"),
                (run_folder.JsonLines, "replace", b"l"),
            ):
                before_calls(owner, name, lambda _, letter=letter: os.write(write_end, letter))
            tamper()
            sys.argv = ["main.py", *arguments]
            command_line.run_script(program.main, command_line.parse_or_exit(parse_config))
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait_for(self, letters: bytes = b"", count: int = 1, seconds: float | None = None) -> bool:
        """Until the run has told one of the letters `count` times: True. False if it ends, or the time is up, first."""
        end = None if seconds is None else time.monotonic() + seconds
        while count:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self.pipe], [], [], left)[0]:
                return False
            letter = os.read(self.pipe, 1)
            if not letter:
                return False
            count -= letter in letters
        return True

    def end(self, number: int | None = None) -> int:
        """Sends the signal, if one is given, and waits -> the exit code; -N if signal N ended it."""
        if number is not None:
            os.kill(self.pid, number)
        while os.read(self.pipe, 4096):
            pass
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def last_line(self) -> str:
        lines = [line for line in self.output.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def before_call(owner, name: str, number: int, function) -> None:
    """Has the `number`-th call of `owner.name`, counted from 1, call function() before it does its work."""
    before_calls(owner, name, lambda calls: calls == number and function())


def before_calls(owner, name: str, function) -> None:
    """Has every call of `owner.name` call function(how many there have been, this one included) first."""
    original, calls = getattr(owner, name), []

    def both(*args, **kwargs):
        calls.append(1)
        function(len(calls))
        return original(*args, **kwargs)

    setattr(owner, name, both)


def run(lab: Lab, arguments: list[str], tamper=lambda: None) -> tuple[int, str, bool]:
    """A whole run -> (exit code, the last line it printed, whether it printed a traceback)."""
    child = Child(arguments, lab.folder / "output.txt", tamper)
    code = child.end()
    return code, child.last_line(), "Traceback (most recent" in child.output.read_text(errors="replace")


# ---------------------------------------------------------------- what must hold


def finish(lab: Lab, folder: Path, *flags: str) -> list[str]:
    """Goes on with a run to its end -> what is wrong with it."""
    code, line, _ = run(lab, lab.flags(folder, *(flags or (RESUME,))))
    return [f"resuming gave exit code {code}: {line}"] if code else run_problems(folder, lab.reference)


# ---------------------------------------------------------------- the run without faults


def make_lab(folder: Path, seed: int, quick: bool = False) -> Lab:
    """A lab with its data and the run without faults, which is also timed."""
    lab = Lab(folder, random.Random(seed), quick)
    for split in ("train", "test"):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as out:
            for problem in rldatasets.generate_arithmetic(split, 32):
                out.write(json.dumps({"question": problem.question, "answer": problem.solution}) + "\n")

    def keep_times():
        for owner, name in ((checkpoints, "save_checkpoint"), (run_folder.JsonLines, "append")):
            time_calls(owner, name, folder / f"{name}.txt")

    started = time.monotonic()
    code, line, _ = run(lab, lab.flags(lab.reference, "--save_total_limit 99"), keep_times)
    if code:
        raise RuntimeError(f"the run without faults gave exit code {code}: {line}")
    rows = rows_of(lab.reference / "metrics.jsonl")
    if not all(row["updates"] for row in rows[1:]):
        raise RuntimeError("the run without faults has a step that changes nothing")
    lab.step_seconds = (time.monotonic() - started) / (STEPS + 1)
    lab.save_seconds, lab.log_seconds = (
        max(map(float, (folder / f"{name}.txt").read_text().split())) for name in ("save_checkpoint", "append")
    )
    return lab


def time_calls(owner, name: str, file: Path) -> None:
    """Has every call of `owner.name` write its seconds to the file."""
    original = getattr(owner, name)

    def timed(*args, **kwargs):
        started = time.monotonic()
        result = original(*args, **kwargs)
        with open(file, "a", encoding="utf-8") as out:
            out.write(f"{time.monotonic() - started}\n")
        return result

    setattr(owner, name, timed)


# ---------------------------------------------------------------- 1. kill -9


def inject_kills(lab: Lab, count: int) -> None:
    """Kills runs `count` times: a third over the whole time of a run, half while a checkpoint is written, the rest
    while a log is. A run that was killed is resumed and killed again, KILLS_A_RUN times; then it may end, and is
    compared."""
    folder, kills, kills_of_run = lab.new_folder(), 0, 0
    while kills < count:
        kind = "whole run" if kills % 6 in (0, 3) else "log" if kills % 6 == 1 else "checkpoint"
        done = step_of(folder / "checkpoints" / "latest")
        child = Child(lab.flags(folder, RESUME if done else "--overwrite_output_dir"), lab.folder / "output.txt")
        left = STEPS - done
        if kind == "whole run":
            child.wait_for(seconds=lab.rng.uniform(0, lab.step_seconds * (left + 1)))
        else:
            letter, seconds = {"checkpoint": (b"s", lab.save_seconds), "log": (b"l", lab.log_seconds)}[kind]
            child.wait_for(letter, lab.rng.randint(1, left))
            time.sleep(lab.rng.uniform(0, seconds))
        code = child.end(signal.SIGKILL)
        now = step_of(folder / "checkpoints" / "latest")
        if code != 0:  # else it had ended before
            kills += 1
            kills_of_run += 1
            problems = visible_problems(folder, lab.reference)
            if code != -signal.SIGKILL:
                problems.append(f"going on gave exit code {code}: {child.last_line()}")
            if now < done:
                problems.append(f"latest went back from step {done} to {now}")
            half_done = [path.name for path in (folder / "checkpoints").glob(".*-step-*")]
            outcome = "what is there is whole" + ", one half-written and hidden" * bool(half_done)
            lab.record(f"kill -9, {kind}", outcome, problems)
        if now == STEPS or kills_of_run == KILLS_A_RUN or kills == count:
            if now < STEPS:
                problems = finish(lab, folder, RESUME if now else "--overwrite_output_dir")
            else:  # killed after its last checkpoint, it may have left what it was about to clean up
                problems = run_problems(folder, lab.reference)
                problems = [problem for problem in problems if code == 0 or not problem.startswith("left behind")]
            lab.record("... these runs, resumed to the end", "equal the run without faults", problems)
            folder, kills_of_run = lab.new_folder(), 0


# ---------------------------------------------------------------- 2. SIGTERM, SIGINT


def inject_signals(lab: Lab, count: int) -> None:
    """Asks `count` runs to stop, each at a random moment after its start, and follows the line that they end with."""
    for number in range(count):
        name = ("SIGTERM", "SIGINT")[number % 2]
        folder = lab.new_folder()
        child = Child(lab.flags(folder), lab.folder / "output.txt")
        child.wait_for(b"l")  # it has begun
        child.wait_for(seconds=lab.rng.uniform(0, lab.step_seconds * (STEPS - 1)))
        code, line = child.end(signal.Signals[name]), child.last_line()
        step = step_of(folder / "checkpoints" / "latest")
        if step == STEPS:
            lab.record(name, "came in the last step: the run is complete", run_problems(folder, lab.reference))
            continue
        problems = []
        if code != 128 + signal.Signals[name]:
            problems.append(f"exit code {code}: {line}")
        _, found, command = line.partition(f"step {step} is saved; go on with python main.py ")
        if not found or rows_of(folder / "metrics.jsonl")[-1]["step"] != step:
            problems.append(f"latest is of step {step}, the message is: {line}")
        else:
            code, line, _ = run(lab, command.split())
            problems += [f"resuming gave exit code {code}: {line}"] if code else run_problems(folder, lab.reference)
        lab.record(name, f"exit code {128 + signal.Signals[name]}; resumed, equals the run without faults", problems)


def inject_signal_in_the_last_step(lab: Lab) -> None:
    """There is nothing to go on with: the run ends as it would have, with its last evaluation."""
    folder = lab.new_folder()
    stop_at(lab, folder, STEPS - 1, signal.SIGTERM)  # looked at when the step after is done
    lab.record("SIGTERM in the last step", "the run is complete", run_problems(folder, lab.reference))


def inject_kill_after_signal(lab: Lab) -> None:
    """A step that a signal ended is evaluated when the run goes on. Killed between logging the answers and the metrics
    of that, the run must not have them twice."""

    def die_in_the_evaluation():
        def die_when_it_is_logged():
            before_call(run_folder.JsonLines, "replace", 1, lambda: os.kill(os.getpid(), signal.SIGKILL))

        before_call(evaluator, "evaluate", 2, die_when_it_is_logged)  # sampled, then greedy

    folder = lab.new_folder()
    stop_at(lab, folder, STOPPED_AT, signal.SIGTERM)
    code, line, _ = run(lab, lab.flags(folder, RESUME), die_in_the_evaluation)
    problems = finish(lab, folder) if code == -signal.SIGKILL else [f"not killed: exit code {code}: {line}"]
    lab.record("SIGTERM, then kill -9 in the evaluation it put off", "resumed, equals the run without faults", problems)


def stop_at(lab: Lab, folder: Path, step: int, number: int) -> None:
    """A run that a signal hits when it is about to write the checkpoint of `step`."""

    def tamper():
        before_call(checkpoints, "save_checkpoint", step, lambda: os.kill(os.getpid(), number))

    run(lab, lab.flags(folder), tamper)


# ---------------------------------------------------------------- 3. disks and files


def inject_disk_faults(lab: Lab) -> None:
    inject_full_disks(lab)
    inject_read_only_disks(lab)
    inject_damage(lab)
    inject_torn_logs(lab)


def clear_error(result: tuple[int, str, bool], codes: tuple[int, ...], *fragments: str) -> list[str]:
    """What is wrong with how a run ended: with one of the codes, a last line with all fragments, and no traceback?"""
    code, line, traceback_shown = result
    problems = [] if code in codes else [f"exit code {code}: {line}"]
    problems += ["a traceback was shown"] * traceback_shown
    return problems + [f"no {fragment!r} in: {line}" for fragment in fragments if fragment not in line]


def inject_full_disks(lab: Lab) -> None:
    """The disk fills up, or files reach their limit, in the third step: in a log, in the weights of the checkpoint, or
    in its trainer state. When there is room again, the run goes on."""
    saved = lab.reference / "checkpoints" / f"step-{STOPPED_AT}"
    weights, state = ((saved / name).stat().st_size for name in ("model.safetensors", "trainer_state.pt"))
    log, checkpoint = (run_folder.JsonLines, "append", 3 * STOPPED_AT), (checkpoints, "save_checkpoint", STOPPED_AT)
    for what, moment, room in (
        ("a log", log, 0),
        ("the weights", checkpoint, weights // 2),
        ("trainer state", checkpoint, weights + state // 2),
    )[2 * lab.quick :]:
        with mounted(lab, 6 * (weights + state)) as (disk, why_not):
            if why_not:
                lab.record(f"full disk: {what}", SKIPPED + why_not)
                continue
            folder, ballast = disk / "run", disk / "ballast"

            def fill(disk=disk, ballast=ballast, room=room):
                ballast.write_bytes(bytes(shutil.disk_usage(disk).free - room))

            result = run(lab, lab.flags(folder), lambda moment=moment, fill=fill: before_call(*moment, fill))
            problems = clear_error(result, (1,), "main.py: ", str(folder))
            problems += visible_problems(folder, lab.reference)
            ballast.unlink()
            lab.record(
                f"full disk: {what}", "one clear line; resumed, equals the run without faults",
                problems or finish(lab, folder),
            )  # fmt: skip
    for what, limit in (("the weights", weights // 2), ("trainer state", (weights + state) // 2))[: 2 - lab.quick]:
        folder = lab.new_folder()

        def no_longer_than(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        def tamper(no_longer_than=no_longer_than):
            before_call(*checkpoint, no_longer_than)

        problems = clear_error(run(lab, lab.flags(folder), tamper), (1,), "main.py: ", str(folder))
        problems += visible_problems(folder, lab.reference)
        lab.record(
            f"file-size limit: {what}", "one clear line; resumed, equals the run without faults",
            problems or finish(lab, folder),
        )  # fmt: skip


@contextlib.contextmanager
def mounted(lab: Lab, size: int):
    """(a small disk in memory, None), or (None, why there is none): mounting takes the rights of root."""
    disk = lab.folder / "disk"
    disk.mkdir(exist_ok=True)
    try:
        mount(disk, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    except (OSError, subprocess.CalledProcessError) as error:
        yield None, f"no mount ({getattr(error, 'stderr', None) or error})".replace("\n", "")
        return
    try:
        yield disk, None
    finally:
        subprocess.run(["umount", disk], check=True)


def mount(disk: Path, *options: str) -> None:
    subprocess.run(["mount", *options, disk], check=True, capture_output=True, text=True)


def inject_read_only_disks(lab: Lab) -> None:
    """The disk becomes read-only, as Linux makes it after an error: before a run, before it goes on, and under it."""
    size = 6 * sum(file.stat().st_size for file in (lab.reference / "checkpoints" / f"step-{STOPPED_AT}").iterdir())
    for what in ("when a run is resumed", "when a run is replaced", "under a run")[2 * lab.quick :]:
        with mounted(lab, size) as (disk, why_not):
            if why_not:
                lab.record(f"read-only disk {what}", SKIPPED + why_not)
                continue
            folder = disk / "run"

            def lock(disk=disk):
                mount(disk, "-o", "remount,ro")

            if what == "under a run":
                result = run(
                    lab,
                    lab.flags(folder),
                    lambda lock=lock: before_call(checkpoints, "save_checkpoint", STOPPED_AT, lock),
                )
                codes = (1,)
            else:
                stop_at(lab, folder, STOPPED_AT, signal.SIGKILL)
                lock()
                resumes = what == "when a run is resumed"
                result = run(lab, lab.flags(folder, RESUME if resumes else "--overwrite_output_dir"))
                codes = (1, 2) if resumes else (2,)
            problems = clear_error(result, codes, "main.py: ", str(folder), "Read-only file system")
            problems += visible_problems(folder, lab.reference)
            mount(disk, "-o", "remount,rw")
            lab.record(
                f"read-only disk {what}", "one clear line; resumed, equals the run without faults",
                problems or finish(lab, folder),
            )  # fmt: skip


def inject_damage(lab: Lab) -> None:
    """Each file of the newest checkpoint vanishes, or is cut in half. The run refuses it, names the file and the other
    checkpoint, and goes on from that."""
    stopped = lab.new_folder()
    stop_at(lab, stopped, STOPPED_AT + 1, signal.SIGKILL)
    names = sorted(file.name for file in (stopped / "checkpoints" / f"step-{STOPPED_AT}").iterdir())
    for name in names:
        for what in ("vanished", "cut in half"):
            if (name, what) == ("files.json", "vanished"):
                continue  # it only serves to find the others
            folder = lab.new_folder()
            shutil.copytree(stopped, folder, symlinks=True)
            file = folder / "checkpoints" / f"step-{STOPPED_AT}" / name
            file.unlink() if what == "vanished" else os.truncate(file, file.stat().st_size // 2)
            result = run(lab, lab.flags(folder, RESUME))
            problems = clear_error(result, (2,), "main.py: ", str(file.relative_to(folder)), f"step-{STOPPED_AT - 1}")
            outcome = "refused, named, with the other checkpoint"
            if name == "model.safetensors" and (what == "vanished" or not lab.quick):
                problems = problems or finish(lab, folder, f"--resume_from_checkpoint step-{STOPPED_AT - 1}")
                outcome = "... and resumed from that, equals the run without faults"
            lab.record(f"a file of the newest checkpoint {what}", outcome, problems)


def inject_torn_logs(lab: Lab) -> None:
    """Logs that end in the middle of a line, after the checkpoint's step and (which no kill does) before."""
    stopped = lab.new_folder()
    stop_at(lab, stopped, STOPPED_AT + 1, signal.SIGKILL)
    for name in ("metrics.jsonl", "samples.jsonl"):
        last = len((stopped / name).read_bytes().splitlines(keepends=True)[-1])
        for cut in (lab.rng.randint(2, last - 2), last - 1)[: 2 - lab.quick]:
            folder = lab.new_folder()
            shutil.copytree(stopped, folder, symlinks=True)
            os.truncate(folder / name, (folder / name).stat().st_size - cut)
            lab.record(f"last line of {name} torn", "resumed, equals the run without faults", finish(lab, folder))
    expected = rows_of(lab.reference / "metrics.jsonl")
    for what, kept in (("torn before the checkpoint's step", STOPPED_AT), ("vanished", 0)):
        folder = lab.new_folder()
        shutil.copytree(stopped, folder, symlinks=True)
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        whole = b"".join(lines[:kept])
        (folder / "metrics.jsonl").write_bytes(whole + lines[kept][:-2] if kept else b"")
        code, line, _ = run(lab, lab.flags(folder, RESUME))
        problems = [f"exit code {code}: {line}"] if code else visible_problems(folder, lab.reference)
        if not problems and rows_of(folder / "metrics.jsonl") != expected[:kept] + expected[STOPPED_AT + 1 :]:
            problems.append("more is missing than the lines that were lost, or it is different")
        lab.record(f"metrics.jsonl {what}", "resumed; all is there but the lost lines", problems)


# ---------------------------------------------------------------- 4. NaN


def inject_nan(lab: Lab) -> None:
    """NaN in a reward, in the logits and in a gradient: once, which is skipped, and from a step on, which ends the run
    after MAX_BAD_UPDATES with a checkpoint of the weights before."""
    plants = {"a reward": nan_rewards, "the logits": nan_logits, "a gradient": nan_gradients}
    for what, plant in plants.items():
        folder = lab.new_folder()
        code, line, _ = run(lab, lab.flags(folder), lambda plant=plant: plant(range(STOPPED_AT, STOPPED_AT + 1)))
        problems = [f"exit code {code}: {line}"] if code else not_finite(folder)
        if not problems:
            skipped = [row["skipped_updates"] for row in rows_of(folder / "metrics.jsonl")[1:]]
            if skipped != [int(step == STOPPED_AT) for step in range(1, STEPS + 1)]:
                problems.append(f"skipped_updates is {skipped}")
        lab.record(f"NaN in {what}, once", "skipped, counted, all weights finite", problems)

        if lab.quick and plant is not nan_gradients:
            continue
        folder, last = lab.new_folder(), STOPPED_AT + training_run.MAX_BAD_UPDATES - 1
        result = run(lab, lab.flags(folder), lambda plant=plant: plant(range(STOPPED_AT, STEPS + 1)))
        problems = clear_error(
            result, (1,), "main.py: ", f"{training_run.MAX_BAD_UPDATES} updates in a row", f"step {last}"
        )
        problems = problems or not_finite(folder)
        if not problems:
            weights = [
                load_file(checkpoint / "model.safetensors")
                for checkpoint in (
                    folder / "checkpoints/latest", lab.reference / "checkpoints" / f"step-{STOPPED_AT - 1}"
                )
            ]  # fmt: skip
            if not same(*weights) or step_of(folder / "checkpoints/latest") != last:
                problems.append(f"latest does not hold the weights of before, or is not of step {last}")
            code, line, _ = run(lab, lab.flags(folder, RESUME))
            problems += [f"resuming gave exit code {code}: {line}"] if code else not_finite(folder)
        lab.record(f"NaN in {what}, lasting", "ended after five, with the weights of before; resumed", problems)


def not_finite(folder: Path) -> list[str]:
    """Weights and optimizer state of the latest checkpoint that are not finite."""
    latest = folder / "checkpoints" / "latest"
    tensors = load_file(latest / "model.safetensors")
    for number, state in torch.load(latest / "trainer_state.pt", weights_only=True)["optimizer"]["state"].items():
        tensors |= {f"optimizer state {number}, {name}": value for name, value in state.items()}
    return [f"{name} is not finite" for name, value in tensors.items() if not torch.isfinite(value).all()]


def nan_rewards(steps: range) -> None:
    """The first answer's reward of these steps is NaN."""
    rows = int(FLAGS.split()[FLAGS.split().index("--problems_per_step") + 1])
    rows *= int(FLAGS.split()[FLAGS.split().index("--group_size") + 1])
    original, calls = evaluator.total, []

    def total(*args):
        calls.append(1)
        step, row = divmod(len(calls) - 1, rows)
        return math.nan if step + 1 in steps and row == 0 else original(*args)

    evaluator.total = total


def nan_logits(steps: range) -> None:
    _tamper_with_logprobs(steps, lambda logprobs: logprobs * math.nan)


def nan_gradients(steps: range) -> None:
    """The loss is finite, its gradient is not."""

    def plant(logprobs):
        logprobs.register_hook(lambda gradient: gradient * math.nan)
        return logprobs

    _tamper_with_logprobs(steps, plant)


def _tamper_with_logprobs(steps, plant):
    """Applies `plant` to the log-probs of the training pass. One pass is one step: it has one micro-batch."""
    original, calls = llms.completion_logprobs, []

    def completion_logprobs(*args):
        if not torch.is_grad_enabled():  # somebody only looks
            return original(*args)
        calls.append(1)
        logprobs = original(*args)
        return plant(logprobs) if len(calls) in steps else logprobs

    llms.completion_logprobs = completion_logprobs


# ---------------------------------------------------------------- the command line


def print_table(lab: Lab) -> None:
    width = max(map(len, lab.results))
    print(f"\n{'injected':{width}}  times  what came out")
    for fault, outcomes in lab.results.items():
        for number, (outcome, count) in enumerate(outcomes.most_common()):
            print(f"{fault if number == 0 else '':{width}}  {count:5}  {outcome}")
    print()
    for violation in lab.violations:
        print(f"VIOLATION: {violation}")
    print(f"{len(lab.violations)} violations")


def main(arguments=None) -> int:
    """Injects everything -> the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=30, help="runs that are killed (default 30)")
    parser.add_argument("--signals", type=int, default=5, help="runs that get SIGTERM or SIGINT, in turn (default 5)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random moments; each run of this takes its own time"
    )
    parser.add_argument("--quick", action="store_true", help="one of each kind of disk fault and of lasting NaN")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    llms.load("tiny")  # transformers compiles its tables at the first load: once here, not in every child
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        lab = make_lab(Path(folder), args.seed, args.quick)
        inject_kills(lab, args.kills)
        inject_signals(lab, args.signals)
        inject_signal_in_the_last_step(lab)
        inject_kill_after_signal(lab)
        inject_disk_faults(lab)
        inject_nan(lab)
        print_table(lab)
        print(f"{time.monotonic() - started:.0f} s")
    return int(bool(lab.violations))


if __name__ == "__main__":
    sys.exit(main())
