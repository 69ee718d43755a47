"""Faults are injected into whole runs (benchmarks/faults.py) and the grader is fuzzed (benchmarks/fuzz_grader.py), at a
small scale; and both scripts notice what they are there to notice.

At full scale, about ten minutes:

    RUN_SLOW=1 pytest -s tests/test_faults.py
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from random_models import ROOT
from safetensors.torch import save_file

sys.path.insert(0, str(ROOT / "benchmarks"))
import faults
import fuzz_grader

import evaluator
from engine import numbers

SLOW = "RUN_SLOW" in os.environ
KILLS, SIGNALS = (30, 5) if SLOW else (3, 2)

# ---------------------------------------------------------------- faults in whole runs


@pytest.fixture(scope="module")
def table():
    """What the script prints, as lines. In a process of its own: it forks, and this one may have threads."""
    flags = ["--kills", str(KILLS), "--signals", str(SIGNALS)] + ["--quick"] * (not SLOW)
    done = subprocess.run([sys.executable, ROOT / "benchmarks/faults.py", *flags], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


def times(table, start):
    """How often what starts so was injected, whatever came out; a row that goes on has no name of its own."""
    counts, inside = 0, False
    for line in table:
        inside = line.startswith(start) or inside and line.startswith(" ")
        counts += int(re.search(r"  (\d+)  ", line)[1]) if inside else 0
    return counts


def test_every_fault_was_injected_and_none_did_harm(table):
    assert times(table, "kill -9, ") == KILLS and times(table, "SIGTERM  ") + times(table, "SIGINT") == SIGNALS
    assert times(table, "... these runs, resumed to the end") >= 1
    for fault in ("full disk", "read-only disk", "file-size limit", "a file of the newest checkpoint vanished",
                  "a file of the newest checkpoint cut in half", "last line of metrics.jsonl",
                  "last line of samples.jsonl",
                  "SIGTERM, then kill -9", "NaN in a reward", "NaN in the logits", "NaN in a gradient"):  # fmt: skip
        assert times(table, fault) >= 1, fault
    assert "0 violations" in table


def test_only_a_disk_that_cannot_be_mounted_is_left_out(table):
    for line in table:
        assert faults.SKIPPED not in line or "disk" in line and os.geteuid() != 0


# ---------------------------------------------------------------- what the comparison notices


def make_folder(folder):
    """A finished run of two steps, in miniature."""
    for step in (1, 2):
        checkpoint = folder / "checkpoints" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        save_file({"w": torch.arange(4.0) + step}, checkpoint / "model.safetensors")
        moments = {"step": torch.tensor(float(step)), "exp_avg": torch.ones(4)}
        torch.save({"step": step, "best": 0.5, "optimizer": {"state": {0: moments}}}, checkpoint / "trainer_state.pt")
    for link in ("latest", "best"):
        (folder / "checkpoints" / link).symlink_to("step-2")
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [{"step": step, "reward": step / 2, "time/train": 0.1} for step in (0, 1, 2)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def finished(tmp_path):
    """Two runs that are the same but for their times."""
    reference, folder = make_folder(tmp_path / "reference"), make_folder(tmp_path / "run")
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text().replace("0.1", "0.2"))
    return folder, reference


def test_equal_runs_have_no_problem(finished):
    assert faults.run_problems(*finished) == []


def weights_off_by_one_bit(folder):
    w = torch.arange(4.0) + 2
    w[3] = torch.nextafter(w[3], torch.tensor(9.0))
    save_file({"w": w}, folder / "checkpoints/step-2/model.safetensors")


def another_optimizer(folder):
    file = folder / "checkpoints/step-2/trainer_state.pt"
    state = torch.load(file)
    state["optimizer"]["state"][0]["exp_avg"][1] = 2
    torch.save(state, file)


def cut(folder, name, characters=5):
    os.truncate(folder / name, (folder / name).stat().st_size - characters)


def change_log(folder, name, change):
    lines = (folder / name).read_text().splitlines(keepends=True)
    (folder / name).write_text("".join(change(lines)))


@pytest.mark.parametrize(
    "harm, problem",
    [
        (weights_off_by_one_bit, "other weights in step-2"),
        (another_optimizer, "another trainer state in step-2"),
        (lambda run: cut(run, "checkpoints/step-1/model.safetensors"), "step-1 cannot be read"),
        (lambda run: cut(run, "checkpoints/step-1/trainer_state.pt"), "step-1 cannot be read"),
        (lambda run: (run / "checkpoints/step-1/model.safetensors").unlink(), "step-1 cannot be read"),
        (lambda run: (run / "checkpoints/step-1/more").touch(), "other files in step-1"),
        (lambda run: (run / "checkpoints/latest").unlink(), "no latest"),
        (lambda run: shutil.rmtree(run / "checkpoints/step-2"), "latest is of step 0"),
        (lambda run: (run / "checkpoints/.writing-step-9").mkdir(), "left behind: .writing-step-9"),
        (lambda run: cut(run, "metrics.jsonl"), "metrics.jsonl has a torn line"),
        (lambda run: change_log(run, "metrics.jsonl", lambda lines: lines + lines[-1:]), "0: 1, 1: 1, 2: 2"),
        (lambda run: change_log(run, "samples.jsonl", lambda lines: lines[:-1]), "samples.jsonl: rows a step"),
        (lambda run: change_log(run, "samples.jsonl", lambda lines: [lines[0].replace("0.0", "1.0"), *lines[1:]]),
         "samples.jsonl: 1 rows differ"),
    ],
)  # fmt: skip
def test_every_harm_is_noticed(finished, harm, problem):
    folder, reference = finished
    harm(folder)
    assert problem in "; ".join(faults.run_problems(folder, reference))


def test_weights_and_moments_that_are_not_finite_are_noticed(finished):
    folder, _ = finished
    assert faults.not_finite(folder) == []
    save_file({"w": torch.tensor([1.0, float("nan")])}, folder / "checkpoints/step-2/model.safetensors")
    assert faults.not_finite(folder) == ["w is not finite"]


@pytest.mark.parametrize(
    "result, problem",
    [
        ((0, "main.py: full", False), "exit code 0"),
        ((1, "main.py: full", True), "a traceback"),
        ((1, "main.py: no", False), "no 'full'"),
    ],
)
def test_an_error_that_is_not_clear_is_noticed(result, problem):
    assert problem in faults.clear_error(result, (1,), "main.py: ", "full")[0]
    assert faults.clear_error((1, "main.py: the disk is full", False), (1,), "main.py: ", "full") == []


# ---------------------------------------------------------------- the grader, fuzzed


@pytest.mark.parametrize("seed", range(2))
def test_the_grader_withstands_hostile_text(seed):
    tally = fuzz_grader.fuzz_chunk(f"test-{seed}", 100_000 if SLOW else 2_000)
    assert set(tally.kinds) == {"soup", "long repeat", "near-miss", "equivalent"} and min(tally.kinds.values()) > 5
    assert tally.problems == []


@pytest.mark.parametrize(
    "module, name, broken, kind, problem",
    [
        (evaluator, "extract_answer",
         lambda text, tags: text.rpartition("<answer>")[2].partition("</answer>")[0].strip(),
         "near-miss", "accuracy is 1.0"),
        (numbers, "_SIGNS", {}, "equivalent", "accuracy is 0.0"),
        (numbers, "_STYLE", re.compile("(?!)(x)"), "equivalent", "accuracy is 0.0"),
        (numbers, "MAX_ANSWER_CHARS", 10, "equivalent", "accuracy is 0.0"),
        (numbers, "_is_unit", lambda *_: True, "near-miss", "accuracy is 1.0"),
        (numbers, "_is_lead", lambda words, sign, things: sign == "=", "near-miss", "accuracy is 1.0"),
        (numbers, "_without_latex", lambda text: text, "equivalent", "accuracy is 0.0"),
        (evaluator, "_split_blocks", lambda text, tags: None, "equivalent", "0.0"),
        (evaluator, "parse_number", lambda text, question=None: float(text), "soup", "raised"),
        (evaluator, "answers_match", lambda text, gold, question=None: text is not None, "soup", "accepted the answer"),
    ],
)  # fmt: skip
def test_the_fuzzer_notices_a_broken_grader(monkeypatch, module, name, broken, kind, problem):
    monkeypatch.setattr(module, name, broken)
    problems = fuzz_grader.fuzz_chunk("broken", 500).problems
    assert any(p.startswith(f"{kind}: ") and problem in p for p in problems)


@pytest.mark.parametrize("slow_times, reported", [(1, 0), (4, 1)])
def test_a_slow_text_is_measured_again_before_it_counts(monkeypatch, slow_times, reported):
    """On a clock that goes on only while something is graded: ten times the limit, then nothing."""
    now, graded = [0.0], []

    def grade(case):
        graded.append(case)
        now[0] += 10 * fuzz_grader.BUDGET * (len(graded) <= slow_times)
        return {"accuracy": 0.0, "format": 0.0}, None

    monkeypatch.setattr(fuzz_grader.time, "process_time", lambda: now[0])
    monkeypatch.setattr(fuzz_grader, "grade", grade)
    tally = fuzz_grader.Tally()
    fuzz_grader.check(fuzz_grader.Case("soup", "text", "18", "think"), tally)
    assert (len(graded), tally.slow, len(tally.too_slow)) == (4, 1, reported)
