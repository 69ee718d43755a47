"""engine/device.py: the choice of a device, by itself and on the command line."""

import os

import pytest
import torch
from processes import run
from small_runs import metrics_of, small_dataset

import llms
import main
from engine import device
from tracking import command_line, run_config
from tracking.run_config import parse_config


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.setenv(device.VARIABLE, "")


def has(monkeypatch, *names):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in names)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in names)


@pytest.mark.parametrize(
    "names, chosen", [(("cuda", "mps"), "cuda"), (("cuda",), "cuda"), (("mps",), "mps"), ((), "cpu")]
)
def test_cuda_comes_before_mps_and_mps_before_the_cpu(monkeypatch, names, chosen):
    has(monkeypatch, *names)
    assert device.default_device() == torch.device(chosen)
    assert llms.sampling_dtype() == (torch.bfloat16 if chosen == "cuda" else torch.float32)
    device.choose("cpu")
    device.choose("auto")  # keeps the choice
    assert device.default_device() == torch.device("cpu") and llms.sampling_dtype() == torch.float32


@pytest.mark.parametrize("name, what", [("mps", "device mps: torch "), ("gpu", "R1_DEVICE=gpu: choose from auto")])
def test_what_is_not_here_is_refused(monkeypatch, name, what):
    has(monkeypatch)
    monkeypatch.setenv(device.VARIABLE, name)
    with pytest.raises(ValueError, match=what):
        llms.load("tiny")


def test_on_the_command_line(monkeypatch):
    monkeypatch.setattr(run_config, "has_cuda_device", lambda: True)
    assert parse_config([]).preset == "qwen2.5-1.5b" and os.environ[device.VARIABLE] == ""
    assert parse_config(["--device", "cpu"]).preset == "tiny" and os.environ[device.VARIABLE] == "cpu"
    assert parse_config(["--device", "cuda"]).preset == "qwen2.5-1.5b" and os.environ[device.VARIABLE] == "cuda"
    monkeypatch.setattr(run_config, "has_cuda_device", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: no CUDA device here"):
        parse_config(["--device", "cuda"])
    with pytest.raises(ValueError, match="invalid choice: 'gpu'"):
        parse_config(["--device", "gpu"])


def test_a_refused_command_line_chooses_nothing():
    with pytest.raises(ValueError):
        parse_config(["--device", "cpu", "--group_size", "1"])
    assert os.environ[device.VARIABLE] == ""


def test_a_run_is_resumed_with_and_without_the_flag(tmp_path, monkeypatch):
    data = small_dataset(tmp_path / "data")
    flags = (
        "--preset tiny --problems_per_step 4 --group_size 2 --max_completion_length 8 --save_steps 1 --eval_problems 2 "
        f"--dataset_path {data} --output_dir {tmp_path / 'run'}"
    ).split()
    for number, more in enumerate((["--device", "cpu"], [], ["--device", "cpu"]), start=1):
        resume = ["--resume_from_checkpoint", "latest"] if number > 1 else []
        main.train(parse_config([*flags, *more, *resume, "--max_steps", str(number)]))
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [0, 1, 2, 3]


def test_distill_takes_the_flag_too():
    done = run("distill.py", "--device", "cuda")
    assert (done.returncode, done.stderr) == (2, "distill.py: --device cuda: no CUDA device here\n")


MISSING = "The operator 'aten::searchsorted.Tensor' is not currently implemented for the MPS device. If you want ..."


def test_an_operator_that_mps_lacks_is_one_line(monkeypatch, capsys):
    def fail():
        raise NotImplementedError(MISSING)

    monkeypatch.setattr("sys.argv", ["main.py"])
    with pytest.raises(SystemExit) as ended:
        command_line.run_script(fail)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert said.startswith("main.py: mps has no aten::searchsorted.Tensor: set PYTORCH_ENABLE_MPS_FALLBACK=1")


def test_other_missing_things_keep_their_traceback():
    def fail():
        raise NotImplementedError("Subclasses should implement this")

    with pytest.raises(NotImplementedError):
        command_line.run_script(fail)
    assert device.missing_operator(NotImplementedError()) is None
