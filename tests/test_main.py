"""main.py: settings that cannot be right are refused, an update is the gradient it claims to be, a run leaves what it
promises and can be made again."""

import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import processes
import pytest
import torch
from drawing import drawing
from random_models import ROOT
from small_runs import metrics_of, tiny_config, without_times
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluator
import llms
import main
import rldatasets
import rollout
from main import train
from tracking import command_line, run_config, summaries, training_run
from tracking.run_config import PRESETS, GRPOConfig, parse_config

# ---------------------------------------------------------------- settings


def test_without_cuda_the_tiny_preset_and_a_line_that_says_so(capsys, monkeypatch):
    monkeypatch.setattr(run_config, "has_cuda_device", lambda: False)
    assert parse_config([]).model_name == "tiny"
    assert "preset tiny: no CUDA device" in capsys.readouterr().out
    monkeypatch.setattr(run_config, "has_cuda_device", lambda: True)
    assert parse_config([]).preset == "qwen2.5-1.5b"
    assert parse_config(["--preset", "tiny"]).preset == "tiny"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_every_flag_overrides_them(preset):
    config = parse_config(["--preset", preset])
    for name, value in PRESETS[preset].items():
        assert getattr(config, name) == value
    other = parse_config(["--preset", preset, "--group_size", "4", "--learning_rate", "3e-5", "--mask_truncated"])
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(other, f.name)}
    assert changed == {"group_size", "learning_rate", "mask_truncated"}


def test_every_setting_is_read():
    files = (
        "main.py",
        "update.py",
        "dynamic_sampling.py",
        "rewards/judge.py",
        "tracking/training_run.py",
        "tracking/step_records.py",
        "tracking/summaries.py",
    )
    source = "".join((ROOT / file).read_text() for file in (*files, "tracking/doctor.py"))
    methods = (
        GRPOConfig.rollout_mode,
        GRPOConfig.prompt_format,
        GRPOConfig.answering,
        GRPOConfig.sampling,
        GRPOConfig.advantages,
        GRPOConfig.adapters,
        GRPOConfig.stop_tag,
        GRPOConfig.uses_bf16,
    )
    source += "".join(inspect.getsource(method) for method in methods).replace("self.", "config.")
    for f in dataclasses.fields(GRPOConfig):
        assert re.search(rf"\bconfig\.{f.name}\b", source), f"{f.name} is parsed and never used"


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        ("--learning_rat 1", ["--learning_rat", "--learning_rate"]),
        ("--zzz", ["--zzz", "--help"]),
        ("stray", ["stray"]),
        ("--preset huge", ["huge", "tiny", "qwen2.5-1.5b"]),
        ("--loss_type ppo", ["ppo", "grpo", "dr_grpo"]),
        ("--advantage_scale x", ["'x'", "group", "batch", "none"]),
        ("--tags cot", ["cot", "reasoning", "think"]),
        ("--control x", ["shuffled_advantages"]),
        ("--report_to x", ["wandb"]),
        ("--report_to trackio", ["trackio", "pip install"]),
        ("--rewards accuracy:1,beauty:2", ["beauty", "accuracy", "format"]),
        ("--dataset_name mmlu", ["mmlu", "gsm8k", "arithmetic"]),
        ("--group_size 1", ["group_size 1"]),
        ("--group_size 0", ["group_size 0"]),
        ("--group_size many", ["many"]),
        ("--temperature 0", ["temperature 0"]),
        ("--temperature -1", ["temperature -1"]),
        ("--temperature nan", ["temperature nan"]),
        ("--learning_rate inf", ["learning_rate inf"]),
        ("--max_completion_length -5", ["max_completion_length -5"]),
        ("--minibatches 3", ["minibatches 3", "32"]),
        ("--final_lr_fraction 2", ["final_lr_fraction 2"]),
        ("--beta -0.1", ["beta -0.1"]),
        ("--soft_thinking --soft_thinking_sampling topk", ["topk", "sample"]),
        ("--soft_thinking --soft_thinking_k 0", ["soft_thinking_k 0"]),
        ("--soft_thinking --soft_thinking_temperature -1", ["soft_thinking_temperature -1"]),
        ("--soft_thinking --soft_thinking_weighting max", ["'max'", "count", "prob"]),
        ("--soft_thinking --soft_thinking_start later", ["'later'", "tag", "immediately"]),
        ("--soft_thinking --soft_thinking_sampling gumbel --soft_thinking_weighting prob", ["'prob'", "use count"]),
        ("--answer_reserve 72", ["answer_reserve 72", "72 tokens"]),
        ("--answer_reserve -1", ["answer_reserve -1"]),
    ],
)
def test_bad_arguments_get_one_line_that_names_value_and_choices(arguments, fragments):
    with pytest.raises(ValueError) as error:
        parse_config(["--preset", "tiny", *arguments.split()] if "--preset" not in arguments else arguments.split())
    for fragment in fragments:
        assert fragment in str(error.value)
    assert "\n" not in str(error.value)


def run_main(*arguments):
    return subprocess.run([sys.executable, ROOT / "main.py", *arguments], capture_output=True, text=True, timeout=120)


def test_an_error_is_one_line_on_stderr_and_exit_code_2(tmp_path):
    done = run_main("--loss_type", "ppo")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "choose from" in done.stderr


@pytest.mark.parametrize(
    "settings, fragment",
    [
        (dict(max_completion_length=400, max_prompt_length=200), "512 positions"),
        (dict(model_name="./nowhere"), "./nowhere"),
        (dict(dataset_name="mine", dataset_path="/nowhere"), "/nowhere"),
        (dict(max_prompt_length=3), "the shortest prompt has"),
        (dict(soft_thinking=True, soft_thinking_k=513), "soft_thinking_k 513: the vocabulary has 512 tokens"),
        (dict(resume_from_checkpoint="latest"), "there: none"),
        (dict(answer_reserve=5), "answer_reserve 5: closing the reasoning alone takes 5 tokens"),
    ],
)
def test_what_cannot_work_is_refused_before_training(settings, fragment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(fragment)):
        train(tiny_config(tmp_path / "run", **settings))


def test_a_folder_that_cannot_be_written_and_a_resume_without_one(tmp_path):
    with pytest.raises(ValueError, match="cannot write to output_dir '/proc/nowhere'"):
        train(tiny_config("/proc/nowhere"))
    with pytest.raises(ValueError, match="needs --output_dir"):
        train(tiny_config(None, resume_from_checkpoint="latest"))


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with drawing():
        return train(tiny_config(folder, max_steps=4, save_steps=2))


def test_a_run_leaves_what_it_promises(finished_run):
    rows = metrics_of(finished_run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    training = (
        "reward reward/accuracy reward/format accuracy format_rate completion_length truncated_rate entropy clip_frac "
        "grad_norm lr zero_std_groups reflect_rate logprob_gap time/rollout time/train tokens_per_second"
    ).split()
    evaluation = [f"eval/{k}" for k in (
        "accuracy accuracy_low accuracy_high accuracy_greedy accuracy_flexible format_rate length n"
    ).split()]  # fmt: skip
    for row in rows:
        assert all(key in row for key in training) == (row["step"] > 0)
        assert all(key in row for key in evaluation) == (row["step"] in (0, 2, 4))
    assert rows[1]["lr"] == pytest.approx(0.5e-3) and rows[2]["lr"] == pytest.approx(1e-3)

    samples = [json.loads(line) for line in (finished_run / "samples.jsonl").read_text().splitlines()]
    train_samples = [s for s in samples if s["split"] == "train"]
    assert len(train_samples) == 4 * 16
    for s in train_samples:
        assert s["reward/accuracy"] == evaluator.accuracy_reward(s["completion"], s["gold"])
        assert s["reward"] == pytest.approx(s["reward/accuracy"] + 0.5 * s["reward/format"])
    for step in range(1, 5):  # advantages sum to nothing within a group, and a group shares its prompt
        rows_of_step = [s for s in train_samples if s["step"] == step]
        for g in range(0, 16, 4):
            assert sum(s["advantage"] for s in rows_of_step[g : g + 4]) == pytest.approx(0, abs=1e-5)
            assert len({s["prompt"] for s in rows_of_step[g : g + 4]}) == 1

    args = json.loads((finished_run / "args.json").read_text())
    assert args["config"]["max_steps"] == 4 and "torch" in args["versions"]
    for picture in ("train_score.png", "eval_score.png"):
        assert (finished_run / "plots" / picture).stat().st_size > 10_000


def test_the_checkpoint_opens_with_plain_transformers_and_has_learned_something(finished_run):
    model = AutoModelForCausalLM.from_pretrained(finished_run / "checkpoints/latest")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "checkpoints/latest")
    base = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    assert tokenizer("Mia has 12 eggs.")["input_ids"]


def test_same_seed_same_metrics_and_another_seed_others(finished_run, tmp_path):
    again = train(tiny_config(tmp_path / "again", max_steps=4, save_steps=2))
    assert without_times(metrics_of(again)) == without_times(metrics_of(finished_run))
    other = train(tiny_config(tmp_path / "other", max_steps=1, eval_steps=1, seed=1))
    assert metrics_of(other)[1]["reward"] != metrics_of(finished_run)[1]["reward"]


def test_a_resumed_run_equals_the_uninterrupted_one(finished_run, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run", max_steps=4, save_steps=2)
    original = main.update
    monkeypatch.setattr(
        main, "update", lambda *a: pytest.fail("stop") if len(calls) == 3 else (calls.append(1), original(*a))[1]
    )
    calls = []
    with pytest.raises(BaseException, match="stop"):
        train(config)
    monkeypatch.setattr(main, "update", original)
    folder = train(dataclasses.replace(config, resume_from_checkpoint="latest"))
    assert without_times(metrics_of(folder)) == without_times(metrics_of(finished_run))
    a, b = (AutoModelForCausalLM.from_pretrained(f / "checkpoints/latest") for f in (folder, finished_run))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_folder_with_a_run_is_refused_and_a_refused_run_replaces_nothing(finished_run):
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny_config(finished_run))
    before = metrics_of(finished_run)
    with pytest.raises(ValueError, match="the shortest prompt has"):
        train(tiny_config(finished_run, max_prompt_length=3, overwrite_output_dir=True))
    with pytest.raises(ValueError, match="max_steps 4: the checkpoint is at step 4"):
        train(tiny_config(finished_run, max_steps=4, resume_from_checkpoint="latest"))
    assert metrics_of(finished_run) == before


def test_help_shows_the_defaults_of_the_preset(capsys):
    for preset, text in (("tiny", "default: dr_grpo"), ("qwen2.5-1.5b", "default: 786")):
        with pytest.raises(SystemExit):
            parse_config(["--preset", preset, "--help"])
        assert text in " ".join(capsys.readouterr().out.split())


def test_settings_that_change_the_path_through_the_loop(tmp_path):
    folder = train(
        tiny_config(
            tmp_path / "run",
            max_steps=1,
            eval_steps=1,
            beta=0.05,
            tags="think",
            prompt_style="plain",
            loss_type="gspo",
            rewards="accuracy,tag_count:0.5,integer:0.1",
            updates_per_rollout=2,
            control="shuffled_advantages",
            gradient_checkpointing=True,
        )  # fmt: skip
    )
    row = metrics_of(folder)[1]
    assert row["kl"] > 0 and row["reward/tag_count"] >= 0 and "reward/format" not in row


@pytest.mark.parametrize("sampling", ["sample", "gumbel"])
def test_soft_thinking_goes_through_the_same_loop(tmp_path, sampling):
    settings = dict(soft_thinking=True, soft_thinking_k=3, answer_reserve=20, minibatches=2)
    settings |= dict(soft_thinking_sampling=sampling, beta=0.01)
    first, last = (r for r in metrics_of(train(tiny_config(tmp_path / "run", **settings))) if "eval/accuracy_soft" in r)
    assert first["step"] == 0 and last["step"] == 2
    assert 0 < last["soft_share"] < 1 and last["logprob_gap"] < 1e-5 and last["grad_norm"] > 0
    assert last["eval/soft_share"] == 0, "the figures without _soft are of normal sampling"


def test_the_control_gives_rows_the_advantages_of_others(tmp_path):
    def advantages(control):
        folder = train(tiny_config(tmp_path / control, max_steps=1, eval_steps=1, group_size=8, control=control))
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        return [s["advantage"] for s in samples if s["split"] == "train"]

    real, shuffled = advantages("none"), advantages("shuffled_advantages")
    assert real != shuffled and sorted(real) == pytest.approx(sorted(shuffled))


@pytest.mark.parametrize("step", [1, 77])
def test_the_controls_noise_is_not_the_samplers(step):
    """Rewards that are the rollout's own random numbers would depend on the answers."""
    config = tiny_config("unused", seed=3, control="random_rewards")
    generator = torch.Generator().manual_seed(main.step_seed(config, step))
    sampling = torch.rand(256, generator=generator, dtype=torch.float64)
    sampling32 = torch.rand(256, generator=generator.manual_seed(main.step_seed(config, step)))
    noise = main.control_rewards(torch.zeros(256), config, step)
    for numbers in (sampling.float(), sampling32):
        assert abs(torch.corrcoef(torch.stack([noise, numbers]))[0, 1]) < 0.3  # 5 standard errors
    assert 0 <= noise.min() and noise.max() < 1 and noise.std() > 0.2


def test_a_step_on_the_real_gsm8k(tmp_path, gsm8k):
    folder = train(
        tiny_config(tmp_path / "run", dataset_name="gsm8k", dataset_path=str(gsm8k), max_steps=1, eval_steps=1)
    )
    assert metrics_of(folder)[1]["completion_length"] > 0


def test_the_precision_of_gpus_learns_on_a_cpu_too(tmp_path):
    """A bf16 actor samples, the fp32 policy trains under autocast."""
    row = metrics_of(train(tiny_config(tmp_path / "run", max_steps=1, bf16=True, beta=0.1, rollout_is_cap=2.0)))[1]
    assert 1e-4 < row["logprob_gap"] < 0.1 and row["kl"] >= 0 and row["grad_norm"] > 0


# ---------------------------------------------------------------- runs that are stopped, or go wrong


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_from_there(finished_run, tmp_path, number):
    arguments = "--preset tiny --max_steps 4 --problems_per_step 4 --group_size 4 --eval_steps 2 --eval_problems 8 "
    arguments += f"--save_steps 2 --warmup_steps 1 --learning_rate 1e-3 --output_dir {tmp_path / 'run'}"
    run = processes.Running("main.py", *arguments.split())
    log = tmp_path / "run/metrics.jsonl"
    try:
        while not log.exists() or len(log.read_text().splitlines()) < 2:
            assert run.poll() is None
            time.sleep(0.01)
        os.kill(run.processes[0].pid, number)
    finally:
        stopped = run.finish(100)
    message = stopped.stderr.splitlines()[-1]
    assert stopped.returncode == 128 + number
    steps = [row["step"] for row in metrics_of(tmp_path / "run")]
    assert steps == list(range(len(steps))) and 2 <= len(steps) < 5
    assert f"step {steps[-1]} is saved" in message and "--resume_from_checkpoint latest" in message
    command = message.partition("go on with python main.py ")[2].split()
    done = processes.run("main.py", *command)
    assert done.returncode == 0, done.stderr
    assert without_times(metrics_of(tmp_path / "run")) == without_times(metrics_of(finished_run))


def test_a_resumed_run_refuses_settings_that_change_its_steps(finished_run):
    config = tiny_config(finished_run, max_steps=9, save_steps=2, resume_from_checkpoint="latest", learning_rate=2e-3)
    with pytest.raises(ValueError, match="learning_rate 0.002: .* was made with 0.001"):
        train(config)


def test_updates_that_stay_non_finite_end_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "total", lambda scores, weights: math.nan)
    config = tiny_config(tmp_path / "run", max_steps=9, minibatches=2, eval_steps=100, save_steps=100)
    with pytest.raises(training_run.TrainingStopped, match="step 3 is saved; 6 updates in a row were not finite"):
        train(config)
    rows = metrics_of(tmp_path / "run")
    assert [row.get("skipped_updates") for row in rows] == [None, 2, 2, 2] and rows[1]["reward"] is None
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoints/latest")
    base = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), base.parameters(), strict=True))


def test_one_bad_update_is_skipped_and_counted(tmp_path, monkeypatch):
    """nan planted in the logits of one forward pass."""
    original, calls = llms.completion_logprobs, []

    def plant(*args):
        if not torch.is_grad_enabled():
            return original(*args)
        calls.append(1)
        return original(*args) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(llms, "completion_logprobs", plant)
    rows = metrics_of(train(tiny_config(tmp_path / "run", max_steps=3, minibatches=1, save_steps=3)))
    assert [row["skipped_updates"] for row in rows[1:]] == [0, 1, 0]
    assert all(row["grad_norm"] is not None for row in rows[1:])


# ---------------------------------------------------------------- a reference that follows


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """A folder with 20 problems of each split, which loads faster than the endless task."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        problems = rldatasets.generate_arithmetic(split, 20)
        lines = [json.dumps({"question": p.question, "answer": p.solution}) + "\n" for p in problems]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return str(folder)


SMALL_STEPS = dict(problems_per_step=2, group_size=4, minibatches=1, max_completion_length=40)


def test_a_resumed_run_has_the_reference_that_it_had(tmp_path, small_data, no_pictures):
    settings = dict(beta=0.05, reference_refresh_steps=1, reference_mix=0.5, save_steps=1, eval_problems=2)
    settings |= SMALL_STEPS | dict(dataset_path=small_data, save_total_limit=5)
    whole = train(tiny_config(tmp_path / "whole", max_steps=3, **settings))
    first_step = whole / "checkpoints/step-1"
    held = torch.load(first_step / "trainer_state.pt", weights_only=True)["reference"]
    base, policy = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (ROOT / "models" / "tiny", first_step)
    )
    for name, weight in held.items():
        assert torch.allclose(weight, (base[name] + policy[name]) / 2, atol=1e-7)
    assert any((weight != base[name]).any() for name, weight in held.items())

    train(tiny_config(tmp_path / "run", max_steps=1, **settings))
    resumed = train(tiny_config(tmp_path / "run", max_steps=3, resume_from_checkpoint="latest", **settings))
    assert without_times(metrics_of(resumed))[2:] == without_times(metrics_of(whole))[2:]
    assert metrics_of(whole)[1]["kl"] >= 0 and metrics_of(whole)[3]["kl"] > 0
    a, b = (AutoModelForCausalLM.from_pretrained(f / "checkpoints/latest") for f in (resumed, whole))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_reference_is_refreshed_when_it_is_due(tmp_path, small_data, no_pictures, monkeypatch):
    due = []
    monkeypatch.setattr(llms, "refresh_reference", lambda reference, policy, mix: due.append((len(seen), mix)))
    seen = []
    original = main.update
    monkeypatch.setattr(main, "update", lambda *arguments: (seen.append(1), original(*arguments))[1])
    settings = SMALL_STEPS | dict(max_steps=5, eval_steps=5, save_steps=5, eval_problems=2, dataset_path=small_data)
    train(tiny_config(tmp_path / "a", beta=0.05, reference_refresh_steps=2, reference_mix=0.3, **settings))
    assert due == [(2, 0.3), (4, 0.3)]
    due.clear()
    train(tiny_config(tmp_path / "b", beta=0.05, **(settings | dict(max_steps=1))))
    assert due == []
    with pytest.raises(ValueError, match="reference_refresh_steps 2: there is no reference at --beta 0"):
        tiny_config("unused", reference_refresh_steps=2)
    with pytest.raises(ValueError, match="reference_mix 1.5: must be at most 1"):
        tiny_config("unused", beta=0.1, reference_mix=1.5)


# ---------------------------------------------------------------- evaluation alone


@pytest.fixture(scope="module")
def held_out(small_data, tmp_path_factory):
    """A folder with a test split and nothing else."""
    folder = tmp_path_factory.mktemp("held_out")
    shutil.copy(f"{small_data}/test.jsonl", folder)
    return str(folder)


def eval_config(folder, held_out, **overrides):
    """In batches of 8 rows."""
    settings = dict(dataset_path=held_out, eval_only=True, eval_samples=2, max_completion_length=40, eval_problems=12)
    settings |= dict(problems_per_step=2, group_size=4, minibatches=1)
    return tiny_config(folder, **(settings | overrides))


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in ("eval.json", "greedy.jsonl", "sampled.jsonl")}


@pytest.fixture(scope="module")
def whole_evaluation(held_out, tmp_path_factory):
    """A finished evaluation: two greedy batches, of 8 and 4 rows, and three sampled ones."""
    return summaries.evaluate_only(eval_config(tmp_path_factory.mktemp("evaluation") / "run", held_out))


def test_evaluation_alone_against_evaluate(tmp_path, held_out, capsys):
    """It needs a test split only, and eval_samples 8 gives pass@8 and maj@8."""
    config = eval_config(tmp_path / "run", held_out, eval_samples=8, eval_problems=5)
    folder = summaries.evaluate_only(config)
    table = json.loads((folder / "eval.json").read_text())
    model, tokenizer = llms.load("tiny")
    problems = rldatasets.load_problems("arithmetic", "test", 5, held_out)
    for name, temperature, samples in (("greedy", 0.0, 1), ("sampled", 1.0, 8)):
        expected = evaluator.evaluate(
            model, tokenizer, problems, samples=samples, temperature=temperature, max_new_tokens=40, seed=0,
            rows_per_batch=8,
        )  # fmt: skip
        records = expected.pop("records")
        assert table[name] == pytest.approx(expected) and len(records) == 5 * samples
        assert [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] == records
    assert {"pass@8", "maj@8"} <= table["sampled"].keys() and "pass@1" not in table["greedy"]
    assert table["sampled"]["n"] == 5 and table["sampled"]["samples"] == 8
    said = capsys.readouterr().out
    for name in ("greedy", "sampled"):
        [line] = [line for line in said.splitlines() if line.startswith(name)]
        assert f"{table[name]['accuracy']:.1%} " in line and f"{table[name]['accuracy_flexible']:.1%} " in line
    assert f"pass@8 {table['sampled']['pass@8']:.1%}" in said and f"maj@8 {table['sampled']['maj@8']:.1%}" in said
    assert "tiny on 5 test problems" in said and str(folder) in said


def test_mixtures_are_measured_beside_hard_answers(tmp_path, held_out, capsys):
    folder = summaries.evaluate_only(eval_config(tmp_path / "run", held_out, soft_thinking=True, eval_samples=4))
    table = json.loads((folder / "eval.json").read_text())
    assert list(table) == ["greedy", "sampled", "soft"]
    assert table["soft"]["soft_share"] > 0 == table["sampled"]["soft_share"] == table["greedy"]["soft_share"]
    assert {"pass@2", "pass@4", "maj@4"} <= table["soft"].keys() & table["sampled"].keys()
    assert "soft.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("batches_done, torn", [(0, False), (1, True), (2, False), (4, True)])
def test_an_interrupted_evaluation_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path, held_out, whole_evaluation, monkeypatch, batches_done, torn
):
    """A kill may also tear the last line of a log."""
    config, made = eval_config(tmp_path / "run", held_out), []

    def generate_until(*arguments, **options):
        if len(made) == batches_done:
            raise KeyboardInterrupt
        made.append(1)
        return original(*arguments, **options)

    original = rollout.generate
    monkeypatch.setattr(rollout, "generate", generate_until)
    with pytest.raises(KeyboardInterrupt):
        summaries.evaluate_only(config)
    if torn:
        with open(tmp_path / "run" / ("sampled.jsonl" if batches_done > 2 else "greedy.jsonl"), "a") as log:
            log.write('{"question": "Mia has')

    again = []
    monkeypatch.setattr(rollout, "generate", lambda *a, **k: (again.append(1), original(*a, **k))[1])
    assert files_of(summaries.evaluate_only(config)) == files_of(whole_evaluation)
    assert len(again) == 5 - batches_done, "batches that were done are not made again"


def test_a_batch_that_was_logged_in_part_is_made_again(tmp_path, held_out, whole_evaluation, monkeypatch):
    folder = shutil.copytree(whole_evaluation, tmp_path / "run")
    lines = (folder / "sampled.jsonl").read_text().splitlines(keepends=True)
    (folder / "sampled.jsonl").write_text("".join(lines[:13]))  # one batch of 8 and a part
    (folder / "eval.json").unlink()
    assert files_of(summaries.evaluate_only(eval_config(folder, held_out))) == files_of(whole_evaluation)


def test_a_finished_evaluation_is_shown_again_without_sampling(held_out, whole_evaluation, monkeypatch):
    before = files_of(whole_evaluation)
    monkeypatch.setattr(rollout, "generate", lambda *a, **k: pytest.fail("sampled again"))
    assert files_of(summaries.evaluate_only(eval_config(whole_evaluation, held_out))) == before


def test_other_settings_do_not_go_on_with_an_evaluation(tmp_path, held_out, whole_evaluation):
    folder = shutil.copytree(whole_evaluation, tmp_path / "run")
    config = eval_config(folder, held_out)
    others = dict(
        seed=1, temperature=0.7, model_name="tiny_student", eval_samples=3, eval_problems=11, tags="think",
        max_completion_length=41, prefill=True, stop_at_answer=True, soft_thinking=True,
    )  # fmt: skip
    for name, value in others.items():
        with pytest.raises(ValueError) as error:
            summaries.evaluate_only(dataclasses.replace(config, **{name: value}))
        text = str(error.value)
        assert text.startswith(f"--{name} {value}: ") and f"made with {getattr(config, name)}" in text
        assert "--output_dir" in text and "--overwrite_output_dir" in text and "\n" not in text
    assert files_of(folder) == files_of(whole_evaluation)
    summaries.evaluate_only(dataclasses.replace(config, seed=1, overwrite_output_dir=True))
    assert files_of(folder)["greedy.jsonl"] == files_of(whole_evaluation)["greedy.jsonl"]  # which has no use for seeds
    assert files_of(folder)["sampled.jsonl"] != files_of(whole_evaluation)["sampled.jsonl"]


def test_evaluation_and_training_do_not_share_a_folder(whole_evaluation, finished_run, small_data):
    before = everything_in(finished_run), everything_in(whole_evaluation)
    with pytest.raises(ValueError, match="--output_dir, or replace it with --overwrite_output_dir"):
        summaries.evaluate_only(eval_config(finished_run, small_data))
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny_config(whole_evaluation, dataset_path=small_data))
    assert (everything_in(finished_run), everything_in(whole_evaluation)) == before


def everything_in(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_any_file_in_the_shape_of_gsm8k_is_measured(tmp_path, monkeypatch, capsys):
    """A single file, questions with a passage as in SVAMP; through the command line."""
    rows = [{"question": f"Tom has {n} pens. He loses 1. How many pens does Tom have?", "answer": f"#### {n - 1}.0"}
            for n in range(5, 9)]  # fmt: skip
    (tmp_path / "svamp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    arguments = "--preset tiny --eval_only --dataset_name svamp --dataset_path svamp.jsonl --max_completion_length 30"
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments.split()])
    with pytest.raises(SystemExit) as finished:
        command_line.run_script(main.main, command_line.parse_or_exit(parse_config))
    assert finished.value.code is None
    assert "tiny on 4 test problems" in capsys.readouterr().out
    table = json.loads((tmp_path / "runs/eval-tiny/eval.json").read_text())
    assert table["greedy"]["n"] == table["sampled"]["n"] == 4
