"""run_folder.py: a run's folder is refused, made or cleared; logs survive torn lines; settings are compared."""

import datetime
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tracking import checkpoints, run_folder
from tracking.run_folder import JsonLines, create_folder, stopwatch, unused_folder, write_args

CPU = torch.device("cpu")


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ---- The folder ------------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> Path:
    """A folder as a run leaves it, and a file and a folder of the user's own."""
    for name in ("plots", "checkpoints/step-5", "my folder"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoints" / "latest").symlink_to("step-5")
    for name in (
        "args.json", "metrics.jsonl", "samples.jsonl", "plots/train_score.png", "checkpoints/step-5/model.safetensors",
        "notes.txt", "my folder/notes.txt",
    ):  # fmt: skip
        (folder / name).write_text(f"the old {name}")
    return folder


@pytest.mark.parametrize("name", ["run", "a/b/c", "with space é"])
def test_a_new_folder_is_made_with_its_parents(tmp_path, name):
    folder = create_folder(str(tmp_path / name))
    assert folder == tmp_path / name
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*")] == ["checkpoints"]  # no probe is left


def test_a_folder_without_a_run_is_taken_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        create_folder(str(tmp_path), overwrite=overwrite)
        assert everything_in(tmp_path) == {"notes.txt": b"mine"}


def test_a_folder_with_a_run_is_refused_and_not_touched(tmp_path):
    make_run(tmp_path)
    before = everything_in(tmp_path)
    with pytest.raises(ValueError, match=r"already holds a run.*--resume_from_checkpoint.*--overwrite_output_dir") as e:
        create_folder(str(tmp_path))
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)
    assert everything_in(tmp_path) == before


def test_overwriting_clears_what_the_run_wrote_and_nothing_else(tmp_path):
    make_run(tmp_path)
    create_folder(str(tmp_path), overwrite=True)
    assert everything_in(tmp_path) == {
        "notes.txt": b"the old notes.txt",
        "my folder/notes.txt": b"the old my folder/notes.txt",
    }
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert not (tmp_path / "plots").exists()
    create_folder(str(tmp_path))  # a new run may start


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["file", "file/run", "file/a/b"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, name, overwrite):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="cannot write to output_dir .*file") as e:
        create_folder(str(tmp_path / name), overwrite=overwrite)
    assert "\n" not in str(e.value)
    assert everything_in(tmp_path) == {"file": b"mine"}


def test_a_full_disk_is_noticed_before_the_run(tmp_path, monkeypatch):
    def touch(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(ValueError, match="cannot write to output_dir.*No space left"):
        create_folder(str(tmp_path / "run"))


def test_overwriting_clears_a_run_that_lost_its_args(tmp_path):
    make_run(tmp_path)
    (tmp_path / "args.json").unlink()
    create_folder(str(tmp_path), overwrite=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_unused_folder_counts_past_runs(tmp_path):
    name = str(tmp_path / "runs" / "tiny")
    given = []
    for _ in range(3):
        given.append(unused_folder(name))
        write_args(create_folder(given[-1]), {}, CPU)
    assert given == [name, f"{name}-2", f"{name}-3"]
    (Path(f"{name}-2") / "args.json").unlink()
    assert unused_folder(name) == f"{name}-2"  # a folder without a run is free


# ---- args.json -------------------------------------------------------------------------------------------------------


def written_args(folder: Path, config=None, device=CPU) -> dict:
    write_args(folder, config or {}, device)
    return json.loads((folder / "args.json").read_text(encoding="utf-8"))


def test_args_hold_what_made_the_run(tmp_path):
    config = {"preset": "tiny", "learning_rate": 6e-4, "output_dir": None, "seed": 0, "name": "é 数", "flag": True}
    record = written_args(tmp_path, config)
    assert record["config"] == config
    assert record["versions"].pop("python") == ".".join(map(str, sys.version_info[:3]))
    assert set(record["versions"]) == {"torch", "transformers", "datasets", "accelerate", "numpy"}
    for package, version in record["versions"].items():
        assert version == importlib.metadata.version(package)
    assert record["device"]
    assert isinstance(record["device"], str)
    assert record["threads"] == torch.get_num_threads()
    assert "git_revision" in record


def test_args_without_a_package_that_the_run_does_not_need(tmp_path, monkeypatch):
    def version(package, known=importlib.metadata.version):
        if package == "datasets":
            raise importlib.metadata.PackageNotFoundError(package)
        return known(package)

    expected = importlib.metadata.version("torch")
    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = written_args(tmp_path)["versions"]
    assert versions["datasets"] is None and versions["torch"] == expected


def test_args_name_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H100 80GB HBM3")
    assert written_args(tmp_path, device=torch.device("cuda", 0))["device"] == "NVIDIA H100 80GB HBM3"


@pytest.fixture
def code_folder(tmp_path, monkeypatch):
    """A folder, in no git repository, in which run_folder.py believes to lie."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.setattr(run_folder, "__file__", str(folder / "run_folder.py"))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return folder


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_args_name_the_revision_of_the_code_not_of_the_working_folder(tmp_path, code_folder, monkeypatch):
    git(code_folder, "init", "-q")
    git(code_folder, "commit", "-q", "--allow-empty", "-m", "first")
    monkeypatch.chdir(tmp_path)
    revision = written_args(tmp_path)["git_revision"]
    assert revision == git(code_folder, "rev-parse", "HEAD")
    assert len(revision) == 40


def test_args_outside_a_repository(tmp_path, code_folder):
    assert written_args(tmp_path)["git_revision"] is None


def test_args_in_a_repository_without_a_commit(tmp_path, code_folder):
    git(code_folder, "init", "-q")
    assert written_args(tmp_path)["git_revision"] is None


def test_args_on_a_machine_without_git(tmp_path, code_folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert written_args(tmp_path)["git_revision"] is None


# ---- Logs ------------------------------------------------------------------------------------------------------------

ROWS = [
    {"step": 0, "eval/accuracy": 0.25},
    {"step": 1, "reward": -0.1234567890123, "text": "two\nlines\r\n\t\"quoted\" \\"},
    {"step": 2, "text": "é 数 😀 \x00 \x0b \x0c \x1c \x85 \u2028 \u2029", "none": None, "flag": True},
    {"step": 3, "list": [1, 2.5], "text": "</reasoning>\n<answer>18</answer>" * 50},
]  # fmt: skip


def test_rows_come_back_as_they_were(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    assert log.read() == []
    log.append(ROWS[0])
    assert JsonLines(log.file).read() == ROWS[:1]  # another reader sees a row as soon as it is appended
    log.append(*ROWS[1:3])
    log.append()
    log.append(ROWS[3])
    assert log.read() == ROWS
    lines = log.file.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == ROWS  # one row a line, for any other program
    assert lines[-1] == b""


def test_appending_keeps_an_earlier_runs_rows(tmp_path):
    JsonLines(tmp_path / "a.jsonl").append(ROWS[0])
    JsonLines(tmp_path / "a.jsonl").append(ROWS[1])
    assert JsonLines(tmp_path / "a.jsonl").read() == ROWS[:2]


def test_a_log_torn_anywhere_keeps_its_complete_rows_and_is_repaired(tmp_path):
    rows = [{"step": n, "text": "é\n{}"} for n in range(3)]
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.append(*rows)
    whole = log.file.read_bytes()
    row_length = len(whole) // 3
    for length in range(len(whole) + 1):
        log.file.write_bytes(whole[:length])
        complete = (length + 1) // row_length  # a row that lacks only its line end is complete
        assert log.read() == rows[:complete]
        log.truncate_after(99)
        log.append({"step": 3})
        assert log.read() == [*rows[:complete], {"step": 3}]


def test_keep_until_forgets_later_steps(tmp_path):
    log = JsonLines(tmp_path / "samples.jsonl")
    rows = [{"step": step, "n": n} for step in (0, 1, 2, 3) for n in range(2)]
    log.append(*rows)
    for last, kept in [(7, 8), (2, 6), (2, 6), (0, 2), (-1, 0)]:
        log.truncate_after(last)
        assert log.read() == rows[:kept]
        assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]
    log.append(rows[0])
    assert log.read() == rows[:1]


def test_keep_until_ignores_the_remains_of_a_crash(tmp_path):
    for log in (JsonLines(tmp_path / "metrics.jsonl"), JsonLines(tmp_path / "samples.jsonl")):
        log.append({"step": 1}, {"step": 2})
    (tmp_path / "metrics.tmp").write_text('{"step": 0}\n{"st')
    for log in (JsonLines(tmp_path / "metrics.jsonl"), JsonLines(tmp_path / "samples.jsonl")):
        log.truncate_after(1)
        assert log.read() == [{"step": 1}]


def test_keep_until_of_a_log_that_is_not_there(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.truncate_after(5)
    assert log.read() == []


def test_a_failure_in_keep_until_leaves_the_log(tmp_path, monkeypatch):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.append(*ROWS)
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(JsonLines, "append", raising(full))
        log.truncate_after(1)
    assert log.read() == ROWS
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", raising(full))
        log.truncate_after(1)
    assert log.read() == ROWS


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


# ---- The stopwatch ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only when told to."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_the_stopwatch_measures_its_block_alone(clock):
    with stopwatch(CPU) as seconds:
        clock.now += 2.5
    clock.now += 40
    assert seconds() == 2.5
    clock.now += 40
    assert seconds() == 2.5


def test_the_stopwatch_waits_for_the_gpu(clock, monkeypatch):
    synchronised = []

    def synchronize(*args):
        synchronised.append(args)
        clock.now += 3

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with stopwatch(torch.device("cuda")) as seconds:
        clock.now += 1
    assert seconds() == 4
    assert len(synchronised) == 1
    with stopwatch(CPU) as seconds:
        clock.now += 1
    assert seconds() == 1
    assert len(synchronised) == 1


def test_two_stopwatches_nest(clock):
    with stopwatch(CPU) as outer:
        clock.now += 1
        with stopwatch(CPU) as inner:
            clock.now += 2
    assert (outer(), inner()) == (3, 2)


def test_an_error_in_the_block_gets_out(clock):
    with pytest.raises(KeyError, match="x"), stopwatch(CPU):
        raise KeyError("x")


def test_the_stopwatch_with_the_real_clock():
    with stopwatch(CPU) as seconds:
        time.sleep(0.05)
    assert 0.05 <= seconds() < 5


# ---- Going on with other settings ------------------------------------------------------------------------------------


def test_other_settings_are_refused_by_the_first_that_differs(tmp_path):
    config = {"seed": 0, "temperature": 1.0, "output_dir": "a", "dataset_path": None}
    write_args(tmp_path, config, CPU)
    run_folder.check_same_config(tmp_path, dict(config), ())
    run_folder.check_same_config(tmp_path, config | {"output_dir": "b"}, ("output_dir",))
    for name, value in (("seed", 1), ("temperature", 0.5), ("output_dir", "b"), ("dataset_path", "x"), ("new", 7)):
        with pytest.raises(ValueError, match=rf"^--{name} {value}: .*--output_dir.*--overwrite_output_dir") as error:
            run_folder.check_same_config(tmp_path, config | {name: value}, ())
        assert f"made with {config.get(name)}" in str(error.value) and str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^--seed 1"):  # of two, the first
        run_folder.check_same_config(tmp_path, config | {"seed": 1, "temperature": 0.5}, ())


def test_settings_that_cannot_be_read_are_named(tmp_path):
    for harm in (lambda file: os.truncate(file, 9), lambda file: file.write_text("{}"), Path.unlink):
        write_args(tmp_path, {"seed": 0}, CPU)
        harm(tmp_path / "args.json")
        with pytest.raises(ValueError, match="args.json cannot be read") as error:
            run_folder.check_same_config(tmp_path, {"seed": 0}, ())
        assert "\n" not in str(error.value)


def test_args_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_args(tmp_path, {"seed": 0}, CPU)
    monkeypatch.setattr(os, "replace", raising(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_args(tmp_path, {"seed": 1}, CPU)
    assert json.loads((tmp_path / "args.json").read_text())["config"] == {"seed": 0}


def test_a_log_is_replaced_as_a_whole(tmp_path, monkeypatch):
    log = JsonLines(tmp_path / "greedy.jsonl")
    log.replace([{"a": 1}])  # also where there is none yet
    assert log.read() == [{"a": 1}]
    log.append({"a": 2})
    (tmp_path / "greedy.tmp").write_text("left by a crash\n")
    log.replace([{"a": 3}, {"a": 4}])
    assert log.file.read_text() == '{"a": 3}\n{"a": 4}\n'
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        log.replace([])
    assert log.read() == [{"a": 3}, {"a": 4}]


def test_an_evaluations_files_are_a_runs_files(tmp_path):
    """They are refused, and cleared, as a training run's are."""
    for name in ("greedy.jsonl", "sampled.jsonl", "eval.json"):
        (tmp_path / name).write_text("old")
        with pytest.raises(ValueError, match="already holds a run"):
            create_folder(str(tmp_path))
        create_folder(str(tmp_path), overwrite=True)
        assert not (tmp_path / name).exists()


def test_a_disk_that_cannot_flush_is_written_all_the_same(tmp_path, monkeypatch):
    log = JsonLines(tmp_path / "metrics.jsonl")

    def fsync(number):
        def call(descriptor):
            raise OSError(number, os.strerror(number))

        return call

    for number in run_folder.CANNOT_FLUSH:
        monkeypatch.setattr(os, "fsync", fsync(number))
        log.replace([{"step": number}])
        run_folder.flush_to_disk(tmp_path, log.file)
        assert log.read() == [{"step": number}]
    monkeypatch.setattr(os, "fsync", fsync(5))  # an error of the disk
    with pytest.raises(OSError, match="Input/output error"):
        run_folder.flush_to_disk(log.file)


# ---- The date of the prompts -----------------------------------------------------------------------------------------


@dataclass
class Dated:
    prompt_date: str | None = None


def test_the_date_of_a_runs_prompts_is_decided_once(tmp_path):
    today = datetime.date.today().isoformat()
    assert run_folder.fix_prompt_date(Dated("2026-03-01"), tmp_path).prompt_date == "2026-03-01"
    assert run_folder.fix_prompt_date(Dated()).prompt_date == today
    assert run_folder.fix_prompt_date(Dated(), tmp_path, tmp_path / "nowhere").prompt_date == today
    for name, config in (("old", {}), ("new", {"prompt_date": "2026-03-02"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps({"config": config}))
    assert run_folder.fix_prompt_date(Dated(), tmp_path, tmp_path / "new").prompt_date == "2026-03-02"
    assert run_folder.fix_prompt_date(Dated(), tmp_path / "old").prompt_date is None  # begun without one
    (tmp_path / "new" / "args.json").write_text("{")
    assert run_folder.fix_prompt_date(Dated(), tmp_path / "new").prompt_date == today


def test_a_folder_may_begin_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert create_folder("~/runs/x") == tmp_path / "runs" / "x"
    with pytest.raises(ValueError, match="no checkpoint 'latest'"):
        checkpoints.find_checkpoint("~/runs/x", "latest")
