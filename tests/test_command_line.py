"""command_line.py and the parser of run_config.py: quick first answers, one line for a refusal, the types of flags."""

import dataclasses
import subprocess
import sys

import pytest
import transformers
from random_models import ROOT

import grpo
from analysis import config as analysis_config
from distillation import config as distill_config
from distillation import pipeline_config
from games import config as games_config
from tracking import command_line, run_config
from tracking.run_config import ArgumentParser

SCRIPTS = ("main.py", "distill.py", "pipeline.py", "token_analysis.py", "self_play.py")

WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    heavy = {"torch", "transformers", "accelerate", "datasets", "matplotlib"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ("--help", 0, "usage: "),
        ("--sead 1", 2, "unknown argument '--sead': --seed"),
        ("--seed -1", 2, "--seed -1: must"),
    ],
)
def test_first_answers_need_no_torch(script, arguments, code, said, tmp_path):
    """Also when started from another folder."""
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / script), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == code and said in done.stdout + done.stderr, done.stderr
    if code:
        assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1


def test_choices_are_those_of_the_modules():
    assert run_config.LOSS_TYPES == grpo.LOSS_TYPES and run_config.ADVANTAGE_SCALES == grpo.ADVANTAGE_SCALES
    assert run_config.ADVANTAGE_BASELINES == grpo.ADVANTAGE_BASELINES


@pytest.mark.parametrize(
    "sections",
    [
        run_config.SECTIONS,
        distill_config.SECTIONS,
        pipeline_config.SECTIONS,
        analysis_config.SECTIONS,
        games_config.SECTIONS,
    ],  # fmt: skip
    ids=SCRIPTS,
)
def test_the_parser_reads_what_transformers_reads(sections):
    """Every flag, in both spellings, as HfArgumentParser reads it."""
    ours, theirs = ArgumentParser(sections), transformers.HfArgumentParser(sections, allow_abbrev=False)
    assert vars(ours.parse_args([])) == vars(theirs.parse_args([]))
    values = {str: "3", str | None: "3", int: "3", int | None: "3", float: "0.3", bool: "true", bool | None: "no"}
    for section in sections:
        for f in dataclasses.fields(section):
            choices = f.metadata.get("choices")
            given = [choices[-1]] if choices else [values.get(f.type, "3")]
            for name in (f.name, f.name.replace("_", "-")):
                for arguments in ([f"--{name}", *given], [f"--{name}={given[0]}"]):
                    assert vars(ours.parse_args(arguments)) == vars(theirs.parse_args(arguments)), arguments
            if f.type is bool:
                assert getattr(ours.parse_args([f"--{f.name}"]), f.name) is True
    with pytest.raises(ValueError, match="maybe"):
        ours.parse_args(["--prefill", "maybe"])


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("no such thing"), 2, "script.py: no such thing"),
        (KeyboardInterrupt(), 130, "script.py: interrupted"),
        (None, 0, ""),
    ],
)
def test_refusals_are_one_line(monkeypatch, capsys, error, code, line):
    def main():
        if error:
            raise error

    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    with pytest.raises(SystemExit) as exited:
        command_line.run_script(main)
    assert (exited.value.code or 0) == code and capsys.readouterr().err.strip() == line


def test_an_exception_may_have_its_own_exit_code_and_others_keep_their_traceback(monkeypatch, capsys):
    class Ended(Exception):
        exit_code = 7

    def main(error):
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as exited:
        command_line.run_script(main, Ended("saved"))
    assert exited.value.code == 7 and capsys.readouterr().err == "script.py: saved\n"
    with pytest.raises(IndexError):
        command_line.run_script(main, IndexError("ours"))


class FromALibrary(Exception):
    pass


@pytest.mark.parametrize("library", command_line.LIBRARIES)
def test_exceptions_of_the_libraries_are_one_line(monkeypatch, capsys, library):
    monkeypatch.setattr(FromALibrary, "__module__", f"{library}.errors")

    class Special(FromALibrary):
        pass

    def main():
        raise Special("no entry\n\n  for this\n")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as exited:
        command_line.run_script(main)
    assert exited.value.code == 2 and capsys.readouterr().err == "script.py: Special: no entry for this\n"


def test_what_the_operating_system_refuses_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as exited:
        command_line.run_script(tmp_path.write_text, "x")
    assert exited.value.code == 2
    assert capsys.readouterr().err == f"script.py: IsADirectoryError: [Errno 21] Is a directory: '{tmp_path}'\n"
    for error in (OSError("of no system"), KeyError("ours"), RuntimeError("ours"), AssertionError()):
        with pytest.raises(type(error)):
            command_line.run_script(raising, error)


def raising(error):
    raise error


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_an_output_without_some_characters_gets_others(tmp_path, encoding):
    script = tmp_path / "script.py"
    script.write_text(
        "from tracking import command_line\ndef main():\n    print('Z\\xf6e: \\u591a\\u5c11?')\n    "
        "raise ValueError('\\u591a')\ncommand_line.run_script(main)\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, script], capture_output=True, env=environment)
    assert done.returncode == 2 and b"Traceback" not in done.stderr and done.stderr.startswith(b"script.py: ")
    expected = {"ascii": b"Z?e: ???", "cp1252": b"Z\xf6e: ???", "utf-8": "Zöe: 多少?".encode()}
    assert done.stdout.strip() == expected[encoding]


def test_paths_may_begin_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/mia")
    config = run_config.parse_config(["--preset", "tiny", "--output_dir=~/runs/x", "--dataset_path", "~/data"])
    assert (config.output_dir, config.dataset_path) == ("/home/mia/runs/x", "/home/mia/data")
    config = analysis_config.parse_config(["--compare", "tiny", "~/model", "--prompt", "~ 3 + 4?"])
    assert config.compare == ["tiny", "/home/mia/model"] and config.prompt == "~ 3 + 4?"
    config = distill_config.parse_config(["--preset", "tiny", "--teacher_name", "~/teacher", "--data_dir", "~/d"])
    assert (config.teacher_name, config.data_dir) == ("/home/mia/teacher", "/home/mia/d")


def test_the_driver_is_asked_without_torch(monkeypatch):
    def no_driver(name):
        raise OSError(name)

    monkeypatch.setattr(run_config.ctypes, "CDLL", no_driver)
    assert run_config.has_cuda_device() is False

    class Driver:
        devices = 1

        def cuInit(self, flags):
            return 0

        def cuDeviceGetCount(self, count):
            count._obj.value = self.devices
            return 0

    monkeypatch.setattr(run_config.ctypes, "CDLL", lambda name: Driver())
    assert run_config.has_cuda_device() is True
    monkeypatch.setattr(Driver, "devices", 0)  # as with CUDA_VISIBLE_DEVICES=""
    assert run_config.has_cuda_device() is False
