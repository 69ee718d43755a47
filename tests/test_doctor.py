"""doctor.py, memory.py: findings are made when they should be and not otherwise; the table equals real tensors."""

import copy
import functools
import json
import os
import re
import shutil
import statistics
import sys

import pytest
import torch
from random_models import FAMILIES, ROOT, random_model
from small_runs import small_dataset, tiny_config
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.initialization import no_init_weights

import evaluator
import llms
import main
import rldatasets
from engine import kv_cache
from rollout import generate
from tracking import command_line, doctor, memory
from tracking.findings import Finding
from tracking.run_config import PRESETS, GRPOConfig, parse_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_dataset(tmp_path_factory.mktemp("doctor") / "data")


def config_for(data, **overrides):
    """A small run; the doctor looks at all of it in a second."""
    return tiny_config(None, **(dict(dataset_path=data, max_completion_length=40, group_size=4) | overrides))


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
    """Pass rate, format and truncation against counting by hand, on the doctor's own rollout."""
    rollouts = []

    def spy(*arguments, **options):
        rollouts.append(generate(*arguments, **options))
        return rollouts[-1]

    monkeypatch.setattr(doctor, "generate", spy)
    config = config_for(data, max_completion_length=26)
    found = examined(config)
    rollout = rollouts[-1]
    problems = rldatasets.problems_of_step(rldatasets.load_problems("x", "train", path=data), 1, 4, config.seed)
    golds = [problem.answer for problem in problems for _ in range(4)]
    right = sum(evaluator.accuracy_reward(t, g) for t, g in zip(rollout.texts, golds, strict=True)) / 16
    formed = sum(evaluator.format_reward(t) for t in rollout.texts) / 16
    cut_off = rollout.finish.count("length") / 16
    assert 0 < formed < 1 and cut_off > 0.3
    assert found["pass rate"][0][1].startswith(f"{right:.0%} of 16 answers are right")
    assert found["format"][0][1].startswith(f"{formed:.0%} have the asked-for form")
    [(level, text)] = found["truncation"]
    assert level == "warning" and text.startswith(f"{cut_off:.0%} are cut off at 26 tokens: raise")


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
    assert list(found) == ["model"]
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
        ("pass rate", "0% of 16", "easier dataset"),
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


# ---------------------------------------------------------------- memory


def table_of(model_config, on_gpu=False, **overrides):
    settings = dict(problems_per_step=2, group_size=2, max_prompt_length=64, max_completion_length=32) | overrides
    return memory.memory_table(tiny_config(None, minibatches=1, **settings), model_config, on_gpu)


def size_of(tensors):
    """Bytes; what is there twice counts once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def entry(table, start):
    [value] = [value for name, value in table.items() if name.startswith(start)]
    return value


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_gradients_and_moments_against_real_ones(family, tied):
    model = random_model(family, tie_word_embeddings=tied)
    on_cpu, on_gpu = (table_of(model.config, on_gpu, beta=0.1) for on_gpu in (False, True))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    for table in (on_cpu, on_gpu):
        assert entry(table, "policy") == size_of(model.parameters())
        assert entry(table, "gradients") == size_of(p.grad for p in model.parameters())
        assert entry(table, "Adam") == size_of(moments)
    assert "actor, bf16" not in on_cpu
    assert entry(on_gpu, "actor") == size_of(llms.make_actor(model, torch.bfloat16).parameters())
    assert entry(on_cpu, "reference") == size_of(llms.make_reference(model, bf16=False).parameters())
    biases = size_of(p for name, p in llms.make_reference(model, bf16=True).named_parameters() if "bias" in name)
    assert entry(on_gpu, "reference") == pytest.approx(
        size_of(llms.make_reference(model, bf16=True).parameters()), abs=biases
    )
    assert "reference" not in table_of(model.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_against_those_of_a_real_rollout(family, tokenizer, monkeypatch):
    held = []
    original = kv_cache.DenseKVCache.__init__

    def remember(self, *arguments):
        original(self, *arguments)
        held.append(self)

    monkeypatch.setattr(kv_cache.DenseKVCache, "__init__", remember)
    model = random_model(family)
    prompts = ["Mia has 12 eggs.", "Tom has 5."]
    generate(model, tokenizer, prompts, group_size=3, max_new_tokens=32, seed=0, stop_ids=[])
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    blocks = [block for pair in held[0].blocks for block in pair]
    assert len(blocks) == 2 * model.config.num_hidden_layers
    shape = dict(problems_per_step=2, group_size=3, max_prompt_length=longest)
    assert entry(table_of(model.config, **shape), "rollout: keys and values of 6 rows") == size_of(blocks)

    on_gpu = kv_cache.FlatKVCache(model.config, 6, 256, torch.device("cpu"), torch.bfloat16)  # whole 256 tokens a row
    stores = [store for pair in on_gpu.layers for store in pair]
    assert entry(table_of(model.config, on_gpu=True, **shape), "keys and values of 6 rows") == size_of(stores)


class NormThatKeepsItsInput(torch.autograd.Function):
    """What the fused norm of a GPU keeps, but for a number a token."""

    @staticmethod
    def forward(context, hidden, weight):
        context.save_for_backward(hidden)
        return hidden * weight


def saved_for_backward(model, num_tokens, autocast):
    """Bytes of the tensors that one pass keeps for the backward pass, without the weights."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    inputs = torch.randn(1, num_tokens, model.config.hidden_size)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.base_model(inputs_embeds=inputs, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_against_a_direct_count_at_full_depth(family, autocast):
    """Two lengths, since what does not grow with the tokens (bf16 casts of weights) is not counted here."""
    model = random_model(family, num_hidden_layers=5, hidden_size=64, intermediate_size=160)
    if autocast:
        llms.fuse_norms(model)  # which modules a GPU fuses, it knows; what is kept then, see above
        for module in model.modules():
            if "forward" in vars(module):
                module.forward = lambda hidden, weight=module.weight: NormThatKeepsItsInput.apply(hidden, weight)
    per_token, per_layer = memory.activation_bytes(model.config, autocast)
    counted = (saved_for_backward(model, 96, autocast) - saved_for_backward(model, 48, autocast)) / 48
    assert per_token == pytest.approx(counted, rel=1e-3)
    assert 0 < 4 * per_layer < per_token < 6 * per_layer


def test_gradient_checkpointing_keeps_the_layers_inputs_and_one_layer(tokenizer):
    c = random_model(num_hidden_layers=5).config
    plain, checkpointed = (table_of(c, gradient_checkpointing=on) for on in (False, True))
    _, per_layer = memory.activation_bytes(c, False)
    tokens = max(64 + 32, min(2048, 4 * 96))
    name = f"update: activations of {tokens} tokens"
    assert checkpointed[name] == tokens * (5 * c.hidden_size * 4 + per_layer) < plain[name]


def test_the_peak_is_what_stays_and_the_larger_of_the_two_phases():
    for overrides in (dict(group_size=512), dict(), dict(beta=0.1)):
        table = table_of(random_model().config, **overrides)
        phase = {"rollout": 0, "update": 0, "stays": 0}
        for name, size in table.items():
            phase[name.split(":")[0] if ":" in name else "stays"] += size if name != "peak" else 0
        assert table["peak"] == phase["stays"] + max(phase["rollout"], phase["update"])
        assert (phase["rollout"] > phase["update"]) == (overrides.get("group_size") == 512)
        assert all(size > 0 for size in table.values())


REAL_SIZES = {  # shape and parameters of the checkpoints that the presets name
    "1.5B": (
        dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960), 1_543_714_304,
    ),
    "0.5B": (
        dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, intermediate_size=4864), 494_032_768,
    ),
}  # fmt: skip


@functools.cache
def activations_of(size):
    """Bytes per token at the full width; without initial values, which would take most of the time."""
    with no_init_weights():
        return memory.activation_bytes(qwen_config(size), True)


def qwen_config(size):
    return Qwen2Config(
        vocab_size=151_936, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
        **REAL_SIZES[size][0],
    )  # fmt: skip


@pytest.mark.parametrize(
    "preset, size, gib", [("qwen2.5-1.5b", "1.5B", 80), ("qwen2.5-1.5b-base", "1.5B", 80), ("qwen2.5-0.5b", "0.5B", 24)]
)
def test_presets_fit_the_gpus_that_they_name(preset, size, gib, monkeypatch):
    activations = activations_of(size)
    monkeypatch.setattr(memory, "activation_bytes", lambda config, autocast: activations)
    shape, parameters = REAL_SIZES[size]
    for overrides in (dict(), dict(beta=0.04)):
        table = memory.memory_table(GRPOConfig(**(PRESETS[preset] | overrides)), qwen_config(size), on_gpu=True)
        assert entry(table, "policy") == 4 * parameters
        assert entry(table, "actor") == 2 * parameters
        assert 0.3 * gib * 2**30 < table["peak"] < 0.9 * gib * 2**30
    rows, width = (16 * 16, 1536) if size == "1.5B" else (8 * 16, 1024)  # 512 + 786, in whole 256s; 512 + 512
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    by_hand = rows * width * 2 * shape["num_hidden_layers"] * 2 * head_dim * 2  # keys and values, 2 heads, bf16
    assert entry(table, "keys and values") == by_hand


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
