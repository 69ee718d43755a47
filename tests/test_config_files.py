"""--config and --dry_run: a file of settings takes the place of flags, and flags win over it."""

import dataclasses
import json
import re

import pytest
from small_runs import small_dataset, tiny_config

import main
from distillation import config as distill_config
from tracking import config_file, run_config
from tracking.run_config import parse_config


def written(folder, content) -> str:
    file = folder / "run.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def test_defaults_then_preset_then_file_then_flags(tmp_path):
    file = written(tmp_path, {"group_size": 4, "learning_rate": 1, "prefill": True, "seed": 5, "prompt_date": None})
    config = parse_config(["--preset", "tiny", "--config", file, "--seed", "7", "--prefill", "no"])
    assert (config.group_size, config.learning_rate, config.seed, config.prefill) == (4, 1, 7, False)
    assert config.problems_per_step == run_config.PRESETS["tiny"]["problems_per_step"]
    assert config.soft_thinking_k == 2  # a default


def test_the_file_may_name_the_preset_and_the_flag_wins(tmp_path):
    file = written(tmp_path, {"preset": "qwen2.5-0.5b", "max_steps": 3})
    assert parse_config([f"--config={file}"]).model_name == "Qwen/Qwen2.5-0.5B-Instruct"
    config = parse_config(["--config", file, "--preset", "tiny"])
    assert (config.model_name, config.preset, config.max_steps) == ("tiny", "tiny", 3)


def test_the_settings_of_a_run_make_it_again(tmp_path):
    """All but where it was and what was asked of it."""
    first = tiny_config(tmp_path / "run", seed=3, rewards="accuracy:1,tag_count:0.1", prompt_date="2026-01-01")
    file = written(tmp_path, {"config": dataclasses.asdict(first) | {"eval_only": True}, "versions": {}})
    assert parse_config(["--config", file]) == dataclasses.replace(first, output_dir=None)
    assert set(config_file.NOT_REPEATED) <= {f.name for f in dataclasses.fields(first)}
    student = distill_config.parse_config(["train", "--preset", "tiny", "--epochs", "2"])
    file = written(tmp_path, {"config": dataclasses.asdict(student)})
    assert distill_config.parse_config(["--config", file]) == student


@pytest.mark.parametrize(
    "content, fragments",
    [
        ("{", ["line 1 column 2"]),
        ("[1]", ["one object of settings"]),
        ({"grop_size": 4}, ["'grop_size'", "group_size"]),
        ({"zzz": 4}, ["unknown setting 'zzz'"]),
        ({"group_size": "4"}, ["group_size is '4'", "int"]),
        ({"group_size": 4.5}, ["group_size is 4.5", "int"]),
        ({"group_size": True}, ["group_size is True", "int"]),
        ({"prefill": 1}, ["prefill is 1", "bool"]),
        ({"rewards": None}, ["rewards is None", "str"]),
        ({"preset": "huge"}, ["'huge'", "tiny"]),
        ({"loss_type": "ppo"}, ["--loss_type 'ppo'", "grpo"]),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path, content, fragments):
    with pytest.raises(ValueError) as error:
        parse_config(["--preset", "tiny", "--config", written(tmp_path, content)])
    for fragment in fragments:
        assert fragment in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_gets_one_line():
    with pytest.raises(ValueError, match="--config /nowhere/run.json: No such file"):
        parse_config(["--config", "/nowhere/run.json"])


def test_a_dry_run_prints_settings_and_the_first_prompt_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    data = small_dataset(tmp_path / "data", 12)
    config = tiny_config(tmp_path / "run", dataset_path=data, dry_run=True, prompt_date="2026-01-01")
    monkeypatch.setattr(main.llms, "load", None)  # no weights
    assert main.main(config) is None
    settings, prompt = re.fullmatch(r"(\{.*?\n\})\n\n(--- the first prompt.*)", capsys.readouterr().out, re.S).groups()
    assert parse_config(["--config", written(tmp_path, settings)]) == dataclasses.replace(config, dry_run=False)
    first = main.rldatasets.problems_of_step(main.rldatasets.load_problems("", "train", path=data), 1, 4, 0)[0]
    assert first.question in prompt and f"gold {first.answer})" in prompt
    assert not (tmp_path / "run").exists()
