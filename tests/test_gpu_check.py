"""benchmarks/gpu_check.py: every section runs on a CPU at toy size, and a section that fails ends itself alone."""

import json
import os
import subprocess
import sys
import time

import pytest
from processes import run
from random_models import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check


def test_every_section_is_ok_on_a_cpu(tmp_path):
    done = run("benchmarks/gpu_check.py", "--smoke", "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", name] for name in gpu_check.SECTIONS]
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(results) == list(gpu_check.SECTIONS)
    assert all(result["figure"] and "failure" not in result for result in results.values())
    page = (tmp_path / "gpu_check.md").read_text()
    assert all(f"| {name} | ok | " in page for name in gpu_check.SECTIONS) and "Toy sizes on a CPU" in page
    assert results["update"]["memory_table"]["peak"] > 0 and len(results["decode"]["points"]) == 4


def test_the_limits_leave_room_for_all_sections():
    assert sum(limit for _, limit in gpu_check.SECTIONS.values()) <= 600 and gpu_check.SECONDS < 600


def fail(size, results):
    raise RuntimeError("CUDA error: device-side assert\nmore lines")


def hang(size, results):
    child = subprocess.Popen(["sleep", "100"])
    with open(results["file"], "w") as file:
        file.write(str(child.pid))
    time.sleep(100)


def die(size, results):
    os._exit(3)


def test_a_section_that_fails_hangs_or_dies_ends_itself_alone(tmp_path, monkeypatch, capsys):
    def fine(size, results):
        assert "failure" in results["fail"]  # a section sees what those before it found
        return {"figure": "7 of 7 | all"}

    def hang_with_a_child(size, results):
        hang(size, {"file": tmp_path / "pid"})

    sections = {"fail": (fail, 20), "hang": (hang_with_a_child, 2), "die": (die, 20), "fine": (fine, 20)}
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    monkeypatch.setenv("R1_DEVICE", "cpu")
    assert gpu_check.main(["--smoke", "--output_dir", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    for line, start in zip(
        lines,
        (
            "FAIL  fail        RuntimeError: CUDA error: device-side assert  [",
            "FAIL  hang        took more than its 2 s  [",
            "FAIL  die         its process died, exit code 3  [",
            "ok    fine        7 of 7 | all  [",
        ),
        strict=False,
    ):
        assert line.startswith(start)
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child), "the section's own processes outlive it"
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| fail | FAIL | RuntimeError" in page and "## fail: where it failed" in page and "more lines" in page
    assert "| fine | ok | 7 of 7 / all |" in page


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_time_of_all_sections_is_bounded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "SECTIONS", {"one": (lambda *_: {"figure": "1"}, 20)})
    monkeypatch.setattr(gpu_check, "SECONDS", 0)
    monkeypatch.setenv("R1_DEVICE", "cpu")
    assert gpu_check.main(["--smoke", "--output_dir", str(tmp_path)]) == 1
    assert "FAIL  one         no time left of 0 s" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="no CUDA device here; --smoke"):
        gpu_check.main(["--output_dir", str(tmp_path)])
    done = run("benchmarks/gpu_check.py", "--sections", "nothing")
    assert done.returncode == 2 and "invalid choice: 'nothing'" in done.stderr
