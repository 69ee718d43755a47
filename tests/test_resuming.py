"""What main.py does around a run: the line that resumes it, and what it says or refuses before the first step."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from random_models import ROOT
from small_runs import distill_config, metrics_of, small_dataset, tiny_config
from transformers import GenerationConfig

import distill
import llms
import main
import rldatasets
from tracking import checkpoints
from tracking.run_config import parse_config


@pytest.mark.parametrize(
    "given, kept",
    [
        ("--preset tiny", "--preset tiny"),
        ("--overwrite_output_dir --seed 1", "--seed 1"),
        ("--overwrite_output_dir true --seed 1", "--seed 1"),
        ("--overwrite-output-dir=yes --output-dir old", ""),
        ("--output_dir 'my runs/1' --rewards 'accuracy:1, format:0.5'", "--rewards 'accuracy:1, format:0.5'"),
        ("--resume_from_checkpoint step-2 --output_dir=x --prefill", "--prefill"),
        ('--temperature=0.5 --model_name "a\'b $HOME"', '--temperature=0.5 --model_name "a\'b $HOME"'),
    ],
)
def test_the_line_that_resumes_a_run(monkeypatch, tmp_path, given, kept):
    folder = Path("my runs/\u00e9t\u00e9 1")
    ending = ["--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    monkeypatch.setattr(sys, "argv", ["main.py", *shlex.split(given)])
    for place, script in ((ROOT, "main.py"), (tmp_path, str(ROOT / "main.py"))):  # started here, or elsewhere
        monkeypatch.chdir(place)
        line = main.resume_command(folder)
        assert shlex.split(line) == ["python", script, *shlex.split(kept), *ending]
        parse_config(shlex.split(line)[2:])
    echoed = subprocess.run(f"printf '%s\\n' {line}", shell=True, capture_output=True, text=True).stdout
    assert echoed.splitlines() == shlex.split(line)  # to a shell too


def test_one_file_for_both_splits_is_said(tmp_path, capsys):
    file = Path(small_dataset(tmp_path / "data", 12)) / "train.jsonl"
    setup = main.prepare(tiny_config(tmp_path / "run", dataset_path=str(file)))
    assert "8 of 8 test questions are in the training data too" in capsys.readouterr().err
    assert rldatasets.overlap_note(setup.train_problems, setup.test_problems)
    main.prepare(tiny_config(tmp_path / "other", dataset_path=str(tmp_path / "data")))
    assert "training data" not in capsys.readouterr().err


def test_an_older_run_stays_if_the_new_model_cannot_be_saved(tmp_path, monkeypatch):
    data = small_dataset(tmp_path / "data")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")

    def refuse(*_, **__):
        raise ValueError("not like this")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    with pytest.raises(ValueError, match="checkpoints cannot be saved: its generation_config.json"):
        main.train(tiny_config(tmp_path / "run", dataset_path=data, overwrite_output_dir=True))
    assert os.listdir(tmp_path / "run") == ["args.json"]


def test_a_generation_config_without_do_sample_trains_and_saves(tmp_path, capsys):
    """transformers reads such a file and refuses to write it."""
    name, data = str(tmp_path / "model"), small_dataset(tmp_path / "data")
    shutil.copytree(ROOT / "models" / "tiny", name)
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6, "top_p": 0.95}))
    settings = dict(model_name=name, dataset_path=data, max_steps=1, max_completion_length=8, eval_problems=2)
    folder = main.train(tiny_config(tmp_path / "run", **settings))
    assert (folder / "checkpoints" / "step-1" / "generation_config.json").exists()
    assert "dropped the sampling defaults of the generation config" in capsys.readouterr().out


@pytest.fixture
def no_links(monkeypatch):
    def refused(target, link, *_, **__):
        raise OSError(95, "Operation not supported", str(target), None, str(link))

    monkeypatch.setattr(os, "symlink", refused)


def test_a_run_on_a_disk_without_links_is_resumed_measured_and_taught_from(tmp_path, no_links):
    data = small_dataset(tmp_path / "data")
    settings = dict(dataset_path=data, save_steps=1, max_completion_length=72, eval_problems=2, group_size=2)
    folder = main.train(tiny_config(tmp_path / "run", max_steps=1, **settings))
    latest = folder / "checkpoints" / "latest"
    assert latest.is_file()
    main.train(tiny_config(folder, max_steps=2, resume_from_checkpoint="latest", **settings))
    assert [row["step"] for row in metrics_of(folder)] == [0, 1, 2]
    assert checkpoints.resolve(latest).name == "step-2"
    main.main(tiny_config(tmp_path / "eval", model_name=str(latest), eval_only=True, dataset_path=data))
    assert (tmp_path / "eval" / "eval.json").exists()
    config = distill_config(
        tmp_path / "distill", teacher_name=str(latest), dataset_path=data, stage="train", train_problems=16,
        epochs=1.0, control="none",
    )  # fmt: skip
    trained = distill.run(config) / "train" / "distilled" / "checkpoints"
    assert (trained / "latest").is_file() and llms.load(checkpoints.resolve_model_name(str(trained / "latest")))
