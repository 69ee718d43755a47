"""doctor.py, readiness.py: findings are made when they should be and not otherwise; what is counted is right."""

import copy
import json
import os
import re
import shutil
import statistics
import sys
import types

import pytest
import torch
from random_models import ROOT, random_model
from small_runs import small_dataset, tiny_config
from tokenizers import normalizers
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM, Qwen2Config

import evaluator
import llms
import main
import rldatasets
import update
from engine.statistics import wilson_interval
from rollout import generate
from tracking import command_line, doctor, memory, readiness
from tracking.findings import Finding
from tracking.run_config import parse_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_dataset(tmp_path_factory.mktemp("doctor") / "data")


def config_for(data, **overrides):
    """A small run; the doctor looks at all of it in a second."""
    return tiny_config(**(dict(output_dir=None, dataset_path=data, max_completion_length=40, group_size=4) | overrides))


def examined(config) -> dict[str, list[tuple[str, str]]]:
    """{name: [(level, text)]} of the findings, without the rows of the memory table."""
    found = {}
    for finding in doctor.examine(config):
        assert finding.level in ("ok", "warning", "problem") and "\n" not in finding.text
        if finding.name != "memory" or finding.level != "ok":
            found.setdefault(finding.name, []).append((finding.level, finding.text))
    return found


def of_level(found, level):
    return {name for name, findings in found.items() for found_level, _ in findings if found_level == level}


def planted(folder, model=None, change_tokenizer=lambda tokenizer: None):
    """The embedded model in a folder of its own, with another model or a changed tokenizer."""
    tiny, tokenizer = llms.load("tiny")
    change_tokenizer(tokenizer)
    (model or tiny).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------- findings


def test_the_embedded_model_is_well(data):
    config = config_for(data, group_size=8)
    found = examined(config)
    assert of_level(found, "problem") == of_level(found, "warning") == set()
    assert found["model"] == [("ok", "tiny: qwen2, 0.9M parameters")]
    assert found["positions"] == [("ok", "480 of 512 used at most")]
    assert found["stop ids"] == [("ok", "2 '<|im_end|>'")]
    assert found["prompt"] == [("ok", "the tokenizer's chat template")]
    assert re.match(r"16 problems, prompts of \d+ to \d+ tokens \(median \d+\)$", found["data"][0][1])
    assert {"pass rate", "format", "truncation", "groups", "speed", "time"} <= found.keys()
    assert "sampling defaults" not in found and "gold answers" not in found


def test_the_rates_are_those_of_the_rollout(data, monkeypatch):
    """Format and truncation against counting by hand, on the doctor's own rollout."""
    rollouts = []

    def spy(*arguments, **options):
        rollouts.append(generate(*arguments, **options))
        return rollouts[-1]

    monkeypatch.setattr(doctor, "generate", spy)
    config = config_for(data, max_completion_length=26)
    found = examined(config)
    rollout = rollouts[-1]
    formed = sum(evaluator.format_reward(t) for t in rollout.texts) / 16
    cut_off = rollout.finish.count("length") / 16
    assert 0 < formed < 1 and cut_off > 0.3
    assert found["format"][0][1].startswith(f"{formed:.0%} have the asked-for form")
    [(level, text)] = found["truncation"]
    assert level == "warning" and text.startswith(f"{cut_off:.0%} are cut off at 26 tokens: raise")


def test_the_first_step_is_checkpointed_if_the_run_is(data, monkeypatch):
    """Else a setting that fits with it alone is said not to fit."""
    recomputed = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "transformers.modeling_utils.checkpoint", lambda *a, **o: (recomputed.append(1), checkpoint(*a, **o))[1]
    )
    for wanted in (False, True):
        recomputed.clear()
        assert of_level(examined(config_for(data, gradient_checkpointing=wanted)), "problem") == set()
        assert bool(recomputed) == wanted


def test_it_leaves_nothing_behind(data, monkeypatch):
    """Neither gradients nor other weights."""
    models = []

    def spy(*arguments, **options):
        models.append(llms_load(*arguments, **options))
        return models[-1]

    llms_load = llms.load
    monkeypatch.setattr(llms, "load", spy)
    examined(config_for(data))
    base = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny")
    for parameter, original in zip(models[0][0].parameters(), base.parameters(), strict=True):
        assert parameter.grad is None and torch.equal(parameter, original)


@pytest.mark.parametrize("name", ["./nowhere", "some-one/no-such-model"])
def test_a_model_that_does_not_load_ends_the_examination(data, name):
    found = examined(config_for(data, model_name=name))
    assert list(found) == ["torch", "model"]
    [(level, text)] = found["model"]
    assert level == "problem" and f"cannot load model {name!r}" in text


def test_too_many_positions(data, monkeypatch):
    found = examined(config_for(data, max_prompt_length=500, max_completion_length=40))
    assert found["positions"][0][0] == "problem" and "540 tokens of prompt and answer, 512" in found["positions"][0][1]
    assert of_level(found, "problem") == {"positions"}  # these prompts are short, so a first rollout is still possible


@pytest.mark.parametrize("path", ["/nowhere", "empty"])
def test_no_data(data, tmp_path, path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/train.jsonl").write_text('{"question": "", "answer": ""}\n')
    found = examined(config_for(str(tmp_path / path)))
    assert of_level(found, "problem") == {"data"} and "pass rate" not in found
    assert ("no dataset file" if path == "/nowhere" else "no usable problem") in found["data"][0][1]


def test_a_test_split_that_is_not_there(data, tmp_path):
    shutil.copy(f"{data}/train.jsonl", tmp_path / "train.jsonl")
    found = examined(config_for(str(tmp_path)))
    assert found["data"][0][0] == "problem" and "test.jsonl" in found["data"][0][1]
    assert "pass rate" in found  # the training problems can be looked at


def test_prompts_over_the_limit(data, tokenizer):
    problems = rldatasets.load_problems("x", "train", path=data)

    def said(limit):
        [finding] = doctor.examine_prompts(config_for(data, max_prompt_length=limit), tokenizer, problems)
        return finding

    lengths = sorted(len(tokenizer(rldatasets.build_prompt(tokenizer, p.question))["input_ids"]) for p in problems)
    assert lengths[0] < lengths[-1]
    start = f"16 problems, prompts of {lengths[0]} to {lengths[-1]} tokens (median {statistics.median(lengths):.0f})"
    assert said(lengths[-1]) == Finding("ok", "data", start)
    dropped = sum(length == lengths[-1] for length in lengths)
    text = f"{start}: {dropped} over --max_prompt_length {lengths[-1] - 1} are dropped"
    assert said(lengths[-1] - 1) == Finding("warning", "data", text)
    text = f"{start}: all over --max_prompt_length {lengths[0] - 1}"
    assert said(lengths[0] - 1) == Finding("problem", "data", text)
    found = examined(config_for(data, max_prompt_length=lengths[0] - 1))
    assert "pass rate" not in found and of_level(found, "problem") == {"data", "rollout"}


def test_gold_answers_that_are_no_number(tmp_path):
    rows = [{"question": f"Mia has {n} eggs. How many?", "answer": f"#### {n}"} for n in range(10, 18)]
    rows += [{"question": "Who?", "answer": "#### Mia"}, {"question": "Which?", "answer": "#### 3 or 4"}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [(level, text)] = examined(config_for(str(tmp_path)))["gold answers"]
    assert level == "warning" and text.startswith("2 gold answers are not one number (as 'Mia')")


def test_a_first_rollout_that_teaches_nothing(data, tmp_path):
    """A random model: nothing right, no format, never an end, so all groups are silent."""
    model = random_model(max_position_embeddings=512, eos_token_id=None)
    name = planted(tmp_path / "model", model, lambda tokenizer: setattr(tokenizer, "eos_token", None))
    found = examined(config_for(data, model_name=name))
    assert of_level(found, "warning") == {"pass rate", "format", "truncation", "groups"}
    assert of_level(found, "problem") == {"stop ids"}
    assert found["stop ids"][0][1].startswith("none is named")
    for what, start, advice in (
        ("pass rate", "0.0% of 16", "easier dataset"),
        ("format", "0% have", "--prefill"),
        ("truncation", "100% are", "--stop_at_answer"),
        ("groups", "100% of 4", "larger groups"),
    ):
        [(_, text)] = found[what]
        assert text.startswith(start) and advice in text
    found = examined(config_for(data, model_name=name, stop_at_answer=True))
    assert found["stop ids"][0][0] == "ok"  # then answers can end


def test_a_settings_problem_that_only_the_tokenizer_shows(data):
    found = examined(config_for(data, answer_reserve=3))
    assert found["rollout"] == [("problem", "answer_reserve 3: closing the reasoning alone takes 5 tokens")]


def test_tags_that_are_special_tokens(data, tmp_path):
    def change(tokenizer):
        tokenizer.add_special_tokens({"extra_special_tokens": ["<reasoning>", "</reasoning>"]})

    tiny = llms.load("tiny")[0]
    tiny.resize_token_embeddings(520, mean_resizing=False)
    name = planted(tmp_path / "model", tiny, change)
    found = examined(config_for(data, model_name=name))
    assert found["tags"][0][0] == "problem" and "<reasoning>, </reasoning>: special tokens" in found["tags"][0][1]
    found = examined(config_for(data, model_name=name, tags="think"))
    assert [level for level, _ in found["tags"]] == ["ok"]


def test_a_tokenizer_larger_than_the_model(data, tmp_path):
    def change(tokenizer):
        tokenizer.add_tokens(["<unused-1>", "<unused-2>"])

    found = examined(config_for(data, model_name=planted(tmp_path / "model", change_tokenizer=change)))
    [(level, text)] = found["vocabulary"]
    assert level == "problem" and text.startswith("the tokenizer has 514 tokens, the model only 512")
    assert of_level(found, "problem") == {"vocabulary"}


def test_a_tokenizer_that_changes_what_it_reads(data, tokenizer):
    config = config_for(data, prompt_style="plain")  # which has capitals
    finding = Finding("warning", "round trip", "the tokenizer does not give the prompt back as it was")
    assert finding not in doctor.examine_prompt_style(config, tokenizer)
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert finding in doctor.examine_prompt_style(config, other)


def test_prompt_styles(data, tokenizer):
    def said(**settings):
        return {f.name: (f.level, f.text) for f in doctor.examine_prompt_style(config_for(data, **settings), other)}

    other = copy.deepcopy(tokenizer)
    assert said()["prompt"] == said(prompt_style="chat")["prompt"] == ("ok", "the tokenizer's chat template")
    assert said(prompt_style="plain")["prompt"] == ("ok", "R1-Zero's plain template")
    other.chat_template = None
    assert said()["prompt"] == ("ok", "R1-Zero's plain template")
    [(what, (level, text))] = said(prompt_style="chat").items()
    assert (what, level) == ("prompt", "problem") and "no chat template: use plain" in text


def test_stop_ids_of_three_places(data, tmp_path):
    tiny = llms.load("tiny")[0]
    tiny.config.eos_token_id, tiny.generation_config.eos_token_id = 5, [6, 7]
    found = examined(config_for(data, model_name=planted(tmp_path / "model", tiny)))
    [(level, text)] = found["stop ids"]
    assert level == "ok" and text.endswith("(config: 5; generation config: [6, 7]; tokenizer: 2)")
    assert [int(n) for n in re.findall(r"(\d+) '", text)] == [2, 5, 6, 7]


def test_exit_code_and_summary(data, monkeypatch, capsys, tmp_path):
    def exit_code(*arguments):
        monkeypatch.setattr(sys, "argv", ["main.py", "--preset", "tiny", "--doctor", *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            command_line.run_script(main.main, command_line.parse_or_exit(parse_config))
        return ended.value.code, capsys.readouterr()

    few = ("--problems_per_step", "4", "--dataset_path", data)
    code, said = exit_code(*few)
    assert code == 0 and re.search(r"\n0 problems, \d warnings\n$", said.out)
    code, said = exit_code(*few, "--max_prompt_length", "3")
    assert code == 1 and "\n2 problems, " in said.out
    for line in said.out.splitlines()[1:-2]:
        assert re.match(r"(ok|warning|problem) +[a-z]", line), line
    code, said = exit_code("--group_size", "1")
    assert code == 2 and said.err.startswith("main.py: --group_size 1") and said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # it writes nothing


# ---------------------------------------------------------------- machine


def test_memory_over_what_is_free(data, monkeypatch):
    config = config_for(data)
    peak = memory.memory_table(config, llms.load_config("tiny"), False)["peak"]

    def level_with(free):
        monkeypatch.setattr(os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": int(free), "SC_PAGE_SIZE": 1}[name])
        *rows, last = doctor.examine_memory(config, llms.load_config("tiny"))
        assert all(finding.level == "ok" for finding in rows)
        assert "at the peak" in last.text and (("--tokens_per_micro_batch" in last.text) == (last.level == "problem"))
        return last.level

    assert level_with(0.99 * peak) == "problem"
    assert level_with(1.05 * peak) == "warning"
    assert level_with(1.2 * peak) == "ok"


def test_free_memory_where_the_system_does_not_say(data, monkeypatch):
    """macOS has no SC_AVPHYS_PAGES, and Windows no sysconf: psutil is asked; without it, the doctor says so."""

    def sysconf(name):
        raise ValueError("unrecognized configuration name")

    def last_finding():
        return [*doctor.examine_memory(config_for(data), llms.load_config("tiny"))][-1]

    psutil = types.ModuleType("psutil")
    psutil.virtual_memory = lambda: types.SimpleNamespace(available=7 * 2**30)
    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    assert last_finding().text.endswith("7.0 GiB free")
    monkeypatch.setitem(sys.modules, "psutil", None)  # importing it fails
    finding = last_finding()
    assert finding.level == "warning" and "how much is free is unknown here" in finding.text
    monkeypatch.delattr(os, "sysconf")
    assert last_finding() == finding
    found = examined(config_for(data))
    assert of_level(found, "problem") == set() and "time" in found


@pytest.mark.parametrize("version, level", [("2.13.0+cpu", "ok"), ("2.11.0", "ok"), ("2.10.1", "problem")])
def test_torch_version(version, level):
    [finding] = readiness.examine_torch(TorchVersion(version))
    assert finding.level == level and version in finding.text


def cards_findings(monkeypatch, capability, head_dim=128, **overrides):
    """{name: level} of what is said about a model on a made-up card."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    config = tiny_config(None, **overrides)
    model_config = Qwen2Config(hidden_size=4 * head_dim, num_attention_heads=4)
    return {f.name: f.level for f in readiness.examine_device(config, model_config, torch.device("cuda"))}


def test_what_a_card_has(monkeypatch):
    assert cards_findings(monkeypatch, (9, 0)) == {"device": "ok", "bf16": "ok", "head size": "ok"}
    assert cards_findings(monkeypatch, (7, 5))["bf16"] == "problem"
    assert cards_findings(monkeypatch, (7, 5), bf16=False) == {"device": "ok", "bf16": "warning"}
    levels = {size: cards_findings(monkeypatch, (8, 0), size)["head size"] for size in (8, 12, 64, 100, 256, 264)}
    assert levels == {8: "ok", 12: "warning", 64: "ok", 100: "warning", 256: "ok", 264: "warning"}


def test_other_devices(data):
    config, model_config = config_for(data), llms.load_config("tiny")
    [finding] = readiness.examine_device(config, model_config, torch.device("cpu"))
    assert finding.level == "ok"
    [finding] = readiness.examine_device(config, model_config, torch.device("mps"))
    assert finding.level == "warning" and "nothing here has been run on it" in finding.text


def test_a_checkpoint_has_the_size_that_the_doctor_says(data, tmp_path):
    config = config_for(data, output_dir=str(tmp_path / "run"), max_steps=4, save_steps=1, save_total_limit=1)
    main.train(config)
    parameters = memory.num_parameters(llms.load("tiny")[0])
    [*folders] = (tmp_path / "run/checkpoints").glob("step-*")
    for folder in folders:
        size = sum((folder / name).stat().st_size for name in ("model.safetensors", "trainer_state.pt"))
        assert size == pytest.approx(readiness.checkpoint_bytes(config, parameters), rel=0.02)
    assert 1 <= len(folders) <= readiness.checkpoints_at_once(config) == 3


@pytest.mark.parametrize(
    "max_steps, save_steps, limit, count",
    [(400, 50, 2, 4), (60, 60, 2, 1), (61, 60, 2, 2), (30, 60, 9, 1), (9, 1, 1, 3)],
)
def test_checkpoints_at_once(data, max_steps, save_steps, limit, count):
    config = config_for(data, max_steps=max_steps, save_steps=save_steps, save_total_limit=limit)
    assert readiness.checkpoints_at_once(config) == count


def test_disk(data, tmp_path, monkeypatch):
    config = config_for(data, output_dir=str(tmp_path / "not/yet/there"), max_steps=400, save_steps=50)
    asked = []

    def level_with(free):
        disk = types.SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or disk)
        [finding] = readiness.examine_disk(config, 1_543_714_304)
        assert f"4 x 17.25 GiB of checkpoints, {free / 2**30:.1f} GiB free" in finding.text
        assert ("--save_total_limit" in finding.text) == (finding.level != "ok")
        return finding.level

    needed = 4 * 12 * 1_543_714_304
    assert [level_with(int(share * needed)) for share in (0.99, 1.05, 1.2)] == ["problem", "warning", "ok"]
    assert set(asked) == {tmp_path}
    refreshed = config_for(data, beta=0.1, reference_refresh_steps=5)
    assert readiness.checkpoint_bytes(refreshed, 10) == 160  # the checkpoint holds the reference too


# ---------------------------------------------------------------- hours


@pytest.mark.parametrize(
    "overrides",
    [
        dict(eval_steps=2, save_steps=3, soft_thinking=True),
        dict(eval_steps=5, save_steps=5, beta=0.1, minibatches=2),
        dict(eval_steps=9, save_steps=9, updates_per_rollout=2),
        dict(eval_steps=3, save_steps=1, bf16=True, minibatches=2, beta=0.1, reference_refresh_steps=2),
        dict(eval_steps=1, save_steps=4, max_steps=1, bf16=True, updates_per_rollout=2),
    ],
)
def test_a_run_has_as_many_rows_as_the_doctor_counts(data, tmp_path, monkeypatch, overrides):
    """Sampled, evaluated, passed without gradient and differentiated rows, of all calls in a real run. With random
    rewards every row has an advantage."""
    seen = dict.fromkeys(("sampled", "evaluated", "forward", "differentiated"), 0)

    def count(module, function, what, rows_of):
        real = getattr(module, function)

        def spy(*arguments, **options):
            seen[what] += rows_of(arguments, options)
            return real(*arguments, **options)

        monkeypatch.setattr(module, function, spy)

    def rows_of_pass(arguments, options):  # of all_logprobs
        rows = options.get("rows")
        return len(arguments[1].texts if rows is None else rows)

    count(main, "generate", "sampled", lambda arguments, options: len(arguments[2]) * options["group_size"])
    count(evaluator, "evaluate", "evaluated", lambda arguments, options: len(arguments[2]))
    for module in (main, update):
        count(module, "all_logprobs", "forward", rows_of_pass)
    count(update, "accumulate_gradient", "differentiated", lambda arguments, options: len(arguments[2]))
    settings = dict(max_steps=7, eval_problems=2, group_size=2, max_completion_length=8, minibatches=1) | overrides
    config = config_for(data, output_dir=str(tmp_path / "run"), control="random_rewards", **settings)
    main.train(config)
    assert seen == doctor.rows_of_run(config, separate_actor=bool(config.bf16), num_test_problems=16)


@pytest.mark.parametrize(
    "overrides, separate_actor",
    [
        (dict(minibatches=1), False),
        (dict(minibatches=2), False),
        (dict(minibatches=2), True),
        (dict(minibatches=1, beta=0.1), True),
        (dict(minibatches=2, beta=0.1, updates_per_rollout=2), True),
    ],
)
def test_passes_without_gradient_are_counted_as_an_update_makes_them(
    data, tokenizer, monkeypatch, overrides, separate_actor
):
    config = config_for(data, max_completion_length=6, **overrides)
    policy = random_model(max_position_embeddings=512)
    actor = copy.deepcopy(policy) if separate_actor else policy
    reference = llms.make_reference(policy, bf16=False) if config.beta else None
    rollout = generate(actor, tokenizer, ["Tom", "Mia"] * 2, group_size=4, max_new_tokens=6, seed=0)
    passes = []
    all_logprobs = update.all_logprobs
    monkeypatch.setattr(update, "all_logprobs", lambda *args: passes.append(args[0]) or all_logprobs(*args))
    optimizer = llms.make_optimizer(policy, 0.0)
    advantages = torch.tensor([1.0, -1.0] * 8)
    update.update(policy, actor, reference, optimizer, rollout, advantages, config)
    assert len(passes) == doctor.num_forward_passes(config, separate_actor)


def test_hours_are_added_up_from_what_was_timed(data):
    config = config_for(
        data, problems_per_step=8, max_steps=100, eval_steps=10, save_steps=50, eval_problems=64, beta=0.1,
        minibatches=1, updates_per_rollout=1,
    )  # fmt: skip
    rollout = types.SimpleNamespace(texts=["a"] * 16, lengths=torch.full((16,), 10))
    step = doctor.FirstStep([], rollout, sampling=8.0, update=4.0, forward=1.0)  # of 16 of 32 rows
    speed, time = doctor.estimate_time(config, step, separate_actor=True, num_test_problems=32)
    assert speed.text == (
        "20 tokens/s; a step 26.0 s: rollout 16.0, update 8.0, other passes 2.0 (timed: 16 of 32 rows; "
        "more at once are faster)"
    )
    seconds = 100 * 26 + 11 * 2 * 32 / 16 * 8  # 11 evaluations: at first, and after every ten steps
    assert time.text.startswith(f"about {seconds / 60:.0f} minutes for 100 steps and 11 evaluations (2 x 32 answers ")


def test_all_rows_are_timed_if_that_is_quick(data, monkeypatch):
    config = config_for(data, problems_per_step=8, max_completion_length=8)
    assert "(timed: 32 of 32 rows)" in examined(config)["speed"][0][1]
    monkeypatch.setattr(doctor, "FULL_STEP_SECONDS", 0)
    found = examined(config)
    assert "(timed: 16 of 32 rows; more at once are faster)" in found["speed"][0][1]
    assert "so few problems cannot tell 2% from 0" in found["pass rate"][0][1]


@pytest.mark.parametrize("right, level", [(0, "warning"), (1, "ok"), (6, "ok")])
def test_the_pass_rate_has_an_interval_that_tells_2_percent_from_0(data, monkeypatch, tokenizer, right, level):
    problems = rldatasets.load_problems("arithmetic", "train", 400)
    asked = []

    def answered(model, tokenizer, some, **options):
        asked.append(some)
        low, high = wilson_interval(right, len(some))
        return {"accuracy": right / len(some), "accuracy_low": low, "accuracy_high": high}

    monkeypatch.setattr(evaluator, "evaluate", answered)
    rollout = types.SimpleNamespace(texts=["a"] * 16)
    quick, slow = (doctor.FirstStep([], rollout, sampling=s, update=1.0, forward=0.0) for s in (1.0, 40.0))
    model, config = random_model(), config_for(data)
    finding = doctor.examine_pass_rate(config, quick, model, tokenizer, problems)
    assert finding.level == level and "cannot tell" not in finding.text
    assert len({problem.question for problem in asked[0]}) == 192
    assert wilson_interval(0, 192)[1] < 0.02 and wilson_interval(4, 192)[0] > 0.005
    finding = doctor.examine_pass_rate(config, slow, model, tokenizer, problems)  # 2.5 s an answer
    assert finding.level == level and len(asked[1]) == 8 and "so few problems cannot tell 2% from 0" in finding.text


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory in a first step: lower --tokens_per_micro_batch"),
        (NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS device."), "mps has no"),
    ],
)
def test_a_first_step_that_the_device_cannot_do(data, monkeypatch, error, said):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(doctor, "first_step", fail)
    [(level, text)] = examined(config_for(data))["rollout"]
    assert level == "problem" and said in text
