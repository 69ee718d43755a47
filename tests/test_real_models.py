"""Everything about real models but their weights: the real tokenizer and the real problems, the real shapes with random
weights, the oddities of published checkpoints planted in a small one, what the hub answers when it does not, and a
GPU's arithmetic (bf16 under autocast) done on the CPU.

The largest check, a training step at the full size of Qwen2.5-0.5B, runs only with RUN_SLOW=1 (about a minute, 12 GiB):

    RUN_SLOW=1 pytest -s -k full_size tests/test_real_models.py
"""

import copy
import json
import multiprocessing
import os
import random
import re
import shutil
from pathlib import Path

import httpx
import pytest
import real_data
import torch
from grader_tables import EQUAL, NEVER_18, NEVER_OTHER, STRUCTURE, blocks, expand
from huggingface_hub import errors
from random_models import PROMPTS, ROOT, random_model
from small_runs import metrics_of, small_dataset, tiny_config, without_times
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

import evaluator
import grpo
import llms
import main
import rldatasets
import rollout as rollout_module
from rollout import generate
from soft_thinking import SoftThinking, TagMatcher
from tracking import doctor
from tracking.run_config import PRESETS, GRPOConfig
from update import update

TAG_STYLES = ("reasoning", "think")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- prompts of every family

CHATML = (
    "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n"
)
# Family -> (its chat template, None for the tokenizer's own; its special tokens; what the documentation shows)
FAMILY_PROMPTS = {
    "qwen2.5": (None, ["<|im_start|>", "<|im_end|>"], CHATML),
    "qwen3": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        CHATML,
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{instruction}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


@pytest.fixture(scope="module", params=FAMILY_PROMPTS)
def family(request, qwen):
    """(tokenizer with the family's template and special tokens, special tokens, expected prompt)"""
    template, special_tokens, expected = FAMILY_PROMPTS[request.param]
    tokenizer = copy.deepcopy(qwen) if request.param == "llama3" else copy.copy(qwen)
    if template:
        tokenizer.chat_template = template
    if request.param == "llama3":
        tokenizer.add_special_tokens({"extra_special_tokens": special_tokens})
        tokenizer.bos_token = special_tokens[0]
    return tokenizer, special_tokens, expected


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("tags", TAG_STYLES)
def test_prompts_are_what_the_familys_documentation_shows(family, tags, prefill):
    tokenizer, special_tokens, expected = family
    expected = expected.format(instruction=rldatasets.INSTRUCTION.format(think=tags)) + f"<{tags}>\n" * prefill
    prompt = rldatasets.build_prompt(tokenizer, "What is 2+3?", tags=tags, prefill=prefill)
    assert prompt == expected
    ids = ids_of(tokenizer, prompt)
    assert tokenizer.decode(ids) == prompt
    for marker in special_tokens:  # each is one token, not the text of one
        assert ids.count(tokenizer.convert_tokens_to_ids(marker)) == expected.count(marker)


def test_no_gsm8k_prompt_is_over_the_presets_limits(qwen, gsm8k, capsys):
    """Whole prompts are tokenised for long questions only: no token is shorter than a byte."""
    problems = [p for split in ("train", "test") for p in rldatasets.load_problems("gsm8k", split, path=str(gsm8k))]
    assert len(problems) == 7473 + 1319
    configs = [GRPOConfig(**(PRESETS[name] | dict(prefill=True))) for name in PRESETS if name.startswith("qwen")]
    assert all(config.max_prompt_length == 512 for config in configs)
    for prompt_format in {config.prompt_format() for config in configs}:
        frame = len(ids_of(qwen, prompt_format.prompt(qwen, "")))
        long_ones = [problem for problem in problems if len(problem.question.encode()) > 500 - frame]
        assert len(long_ones) > 100
        assert rldatasets.drop_long_prompts(long_ones, qwen, 512, prompt_format) == long_ones
        assert "dropped" not in capsys.readouterr().out


# ---------------------------------------------------------------- completions through the real tokenizer


def spellings(tokenizer, text, rng, count=3):
    """The text after tokenising and decoding, once as the tokenizer would have it and `count` times cut at random
    before: a model may choose other tokens for the same text."""
    for cut in range(count + 1):
        places = [place for place in range(1, len(text)) if cut and rng.random() < 0.4]
        pieces = [text[i:j] for i, j in zip([0, *places], [*places, len(text)], strict=True)]
        ids = [i for piece in pieces for i in ids_of(tokenizer, piece)]
        yield tokenizer.batch_decode([ids], skip_special_tokens=True)[0]


@pytest.mark.parametrize("tags", TAG_STYLES)
def test_golden_completions_score_the_same_after_tokenising_and_decoding(qwen, tags):
    rng = random.Random(0)
    for text, accuracy, well_formed in STRUCTURE:
        for spelled in spellings(qwen, expand(text, tags), rng):
            scores = evaluator.score(spelled, "18", {"accuracy": 1, "format": 1}, tags)
            assert scores == {"accuracy": accuracy, "format": well_formed}, spelled


def test_golden_answers_score_the_same_after_tokenising_and_decoding(qwen):
    rng = random.Random(0)
    right = [(answer, gold) for gold, answers in EQUAL.items() for answer in answers]
    wrong = [(answer, "18") for answer in NEVER_18] + NEVER_OTHER
    for cases, expected in ((right, 1.0), (wrong, 0.0)):
        for answer, gold in cases:
            for spelled in spellings(qwen, blocks(answer), rng, count=1):
                assert evaluator.accuracy_reward(spelled, gold) == expected, (answer, gold)
                assert evaluator.format_reward(spelled) == 1.0


@pytest.fixture(scope="module")
def pieces(qwen):
    """The text of every token."""
    return qwen.batch_decode([[i] for i in range(len(qwen))])


@pytest.mark.parametrize("tag", ["</reasoning>", "</think>", "</answer>"])
def test_a_tag_is_found_in_every_spelling_the_vocabulary_has(qwen, pieces, tag):
    """Every token whose end can begin the tag (`.</`, ` <`) and every one whose start can end it (`>\\n`, `>.`)."""
    lengths = range(len(tag) - 1, 0, -1)
    begins = {i: n for i, p in enumerate(pieces) if (n := next((n for n in lengths if p.endswith(tag[:n])), 0))}
    ends = {i: n for i, p in enumerate(pieces) if (n := next((n for n in lengths if p.startswith(tag[-n:])), 0))}
    assert len(begins) > 100 and len(ends) > 100
    rng = random.Random(0)
    pairs = [(i, rng.choice(list(ends))) for i in begins] + [(rng.choice(list(begins)), i) for i in ends]
    rows, expected = [], []
    for begin, end in pairs:
        middle = tag[begins[begin] : len(tag) - ends[end]]
        cut = rng.randint(0, len(middle))
        if begins[begin] + ends[end] <= len(tag):
            rows.append([begin, *ids_of(qwen, middle[:cut]), *ids_of(qwen, middle[cut:]), end])
            expected.append((pieces[begin][: -begins[begin]], pieces[end][ends[end] :]))
    assert len(rows) > 200
    for text, (before, after) in zip(qwen.batch_decode(rows), expected, strict=True):
        assert text == before + tag + after
        if tag == "</answer>" and "<" not in before:
            completion = f"<think>r</think>\n<answer>18{text}"
            assert evaluator.extract_answer(completion, "think") == f"18{before}".strip()
            assert evaluator.format_reward(completion, "think") == (after.strip() == "")

    matcher = TagMatcher(qwen, len(qwen), tag, torch.device("cpu"))
    state = torch.zeros(len(rows), dtype=torch.long)
    found = torch.zeros(len(rows), dtype=torch.long)  # how often
    for column in range(max(map(len, rows))):
        live = torch.tensor([column < len(row) for row in rows])
        token = torch.tensor([row[min(column, len(row) - 1)] for row in rows])
        state = torch.where(live, matcher.step(token, state), state)
        found += live & (state == matcher.found)
    assert (found == 1).all() and (state == matcher.found).all()  # with the row's last token, and not before


# ---------------------------------------------------------------- loading


def test_every_family_loads_from_a_folder_as_it_was(model, tokenizer, tmp_path):
    model.generation_config.eos_token_id = [3, 4]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = llms.load(str(tmp_path))
    assert type(loaded) is type(model) and not loaded.training and loaded.dtype == torch.float32
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    expected = {*model.config.eos_token_id, 3, 4, tokenizer.eos_token_id}
    assert llms.stop_ids(loaded, loaded_tokenizer) == sorted(expected)


def hub_response(status):
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/some/model/config.json"))


HUB_ERRORS = {
    "gated": (
        lambda: errors.GatedRepoError("403 Client Error.\n\nAccess is restricted.", response=hub_response(403)),
        "gated.*licence.*HF_TOKEN",
    ),
    "unknown": (
        lambda: errors.RepositoryNotFoundError("404 Client Error.\n\nNot found.", response=hub_response(404)),
        "no model of that name.*private.*HF_TOKEN.*a local folder",
    ),
    "not in the cache": (
        lambda: errors.LocalEntryNotFoundError("An error happened\nwhile locating the file."),
        "cannot be reached.*local folder",
    ),
    "offline": (lambda: errors.OfflineModeIsEnabled("offline mode is enabled"), "cannot be reached.*local folder"),
    "no network": (lambda: ConnectionError("Name or service not known"), "cannot be reached.*local folder"),
}


@pytest.mark.parametrize("error, advice", HUB_ERRORS.values(), ids=HUB_ERRORS)
@pytest.mark.parametrize("load", [llms.load, llms.load_config])
def test_what_the_hub_refuses_is_said_in_one_line_with_what_to_do(monkeypatch, load, error, advice):
    def refuse(*args, **kwargs):
        raise error()

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    with pytest.raises(ValueError, match=f"cannot load model 'some/model': .*{advice}") as raised:
        load("some/model")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error, advice", HUB_ERRORS.values(), ids=HUB_ERRORS)
def test_the_reason_is_found_under_other_errors(monkeypatch, error, advice):
    """transformers wraps: an OSError of its own, from another one, while the hub's was being handled."""

    def refuse(*args, **kwargs):
        try:
            try:
                raise error()
            except Exception as inner:
                raise OSError("We had trouble.\nSee the documentation.") from inner
        except OSError:
            raise OSError("Can't load the configuration of 'some/model'.")  # noqa: B904

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=advice) as raised:
        llms.load("some/model")
    assert "\n" not in str(raised.value)


def test_with_the_network_off_a_hub_name_says_that_a_folder_works(monkeypatch):
    """No stand-in: HF_HUB_OFFLINE is set for all tests (conftest.py)."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(ValueError, match="cannot be reached and the model is not in its cache: a local folder"):
        llms.load("some-one/no-such-model")


def test_a_folder_without_safetensors_is_refused_by_its_own_reason(tmp_path, tokenizer):
    """A folder is never looked up on the hub, so advice about the hub would mislead."""
    random_model().config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(random_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors") as raised:
        llms.load(str(tmp_path))
    assert "\n" not in str(raised.value) and "hub" not in str(raised.value).replace(str(tmp_path), "")


MODEL_CODE = """
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM
Path(r"{marker}").touch()
class MineConfig(Qwen2Config):
    model_type = "mine"
class MineForCausalLM(Qwen2ForCausalLM):
    config_class = MineConfig
"""


def test_code_that_comes_with_a_model_runs_only_on_request(tmp_path, monkeypatch):
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(ROOT / "models" / "tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(MODEL_CODE.format(marker=marker))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for load in (llms.load, llms.load_config):
        with pytest.raises(ValueError, match="custom code") as raised:
            load(str(folder))
        assert "\n" not in str(raised.value) and not marker.exists()
    with pytest.raises(ValueError, match="custom code"):
        main.train(tiny_config(tmp_path / "run", model_name=str(folder)))
    assert not marker.exists() and not (tmp_path / "run").exists()
    model, _ = llms.load(str(folder), trust_remote_code=True)
    assert marker.exists() and type(model).__name__ == "MineForCausalLM"


# ---------------------------------------------------------------- a GPU's arithmetic, on the CPU


def gpu_autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request):
    return request.param


def moved(model, scale=1e-3, seed=1):
    """A copy whose weights are a little different."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_reference_held_in_bf16_gives_the_policys_very_log_probs(family, tied, tokenizer):
    policy = random_model(family, tie_word_embeddings=tied)
    reference = llms.make_reference(policy, bf16=True)
    for name, parameter in reference.named_parameters():
        in_bf16 = "proj" in name or name == "lm_head.weight"  # what autocast casts, and nothing else
        assert parameter.dtype == (torch.bfloat16 if in_bf16 and "bias" not in name else parameter.dtype), name
        assert not parameter.requires_grad
        if "norm" in name or "embed" in name:
            assert parameter.dtype == torch.float32, name
    head = reference.get_output_embeddings().weight
    assert (head is reference.get_input_embeddings().weight) == tied
    assert head.dtype == (torch.float32 if tied else torch.bfloat16)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in policy.parameters())  # the policy is left alone

    soft = SoftThinking(k=2, start="immediately")
    for mode in (None, soft):
        rollout = generate(policy, tokenizer, PROMPTS, group_size=2, max_new_tokens=12, seed=0, soft=mode)
        with gpu_autocast(), torch.no_grad():
            own, of_reference = (llms.completion_logprobs(m, rollout) for m in (policy, reference))
            of_other = llms.completion_logprobs(moved(policy), rollout)
        assert torch.equal(own, of_reference)
        assert (grpo.kl_estimate(own, of_reference) == 0).all()
        assert not torch.equal(own, of_other)
        with torch.no_grad():
            assert not torch.equal(own, llms.completion_logprobs(policy, rollout)), "autocast was not on"


def test_in_fp32_the_reference_is_a_plain_copy():
    policy = random_model()
    reference = llms.make_reference(policy, bf16=False)
    for a, b in zip(reference.parameters(), policy.parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) and a is not b and not a.requires_grad


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("mix", [1.0, 0.5, 0.25])
def test_refreshing_the_reference_by_hand(bf16, mix, tied):
    start = random_model(tie_word_embeddings=tied)
    policy = moved(start, scale=0.1)
    reference = llms.make_reference(start, bf16)
    before = [p.detach().clone() for p in reference.parameters()]
    policy_before = [p.detach().clone() for p in policy.parameters()]
    held = [id(p) for p in reference.parameters()]
    llms.refresh_reference(reference, policy, mix)
    for old, new, after in zip(before, policy.parameters(), reference.parameters(), strict=True):
        expected = ((1 - mix) * old.double() + mix * new.double()).to(after.dtype)
        assert torch.allclose(after, expected, rtol=1e-2 if after.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        assert after.dtype == old.dtype
    assert held == [id(p) for p in reference.parameters()]  # in place
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), policy_before, strict=True))
    head_is_embedding = reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    assert head_is_embedding == tied


def test_a_reference_that_was_replaced_has_a_kl_of_exactly_zero_again(tokenizer, tied):
    start = random_model(tie_word_embeddings=tied)
    reference, policy = llms.make_reference(start, bf16=True), moved(start, scale=0.01)
    rollout = generate(policy, tokenizer, PROMPTS, max_new_tokens=10, seed=0)

    def kl():
        with gpu_autocast(), torch.no_grad():
            own, of_reference = (llms.completion_logprobs(m, rollout) for m in (policy, reference))
        return grpo.kl_estimate(own, of_reference)[rollout.draw_mask].mean().item()

    before = kl()
    llms.refresh_reference(reference, policy, 0.5)
    halfway = kl()
    llms.refresh_reference(reference, policy, 1.0)
    assert before > halfway > kl() == 0


def test_an_update_as_on_a_gpu(tokenizer):
    """fp32 policy under bf16 autocast, bf16 actor, reference with bf16 matrices: the KL is 0 at first and then is not;
    the step is the fp32 step up to rounding; the actor follows."""
    policy = random_model()
    fp32 = copy.deepcopy(policy)
    actor, reference = llms.make_actor(policy, torch.bfloat16), llms.make_reference(policy, bf16=True)
    rollout = generate(actor, tokenizer, PROMPTS, group_size=4, max_new_tokens=20, seed=0)
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in policy.parameters()]

    def step(model, actor, reference, bf16):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = tiny_config("unused", beta=0.1, minibatches=1, loss_type="dapo", max_grad_norm=1e9, bf16=bf16)
        return update(model, actor, reference, optimizer, rollout, advantages, config)

    step(fp32, fp32, llms.make_reference(fp32, bf16=False), False)
    stats = step(policy, actor, reference, True)
    assert stats["kl"] == 0 and 1e-4 < stats["logprob_gap"] < 0.1
    ours, exact = (
        torch.cat([(p.detach() - b).flatten() for p, b in zip(m.parameters(), before, strict=True)])
        for m in (policy, fp32)
    )
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.99 and not torch.equal(ours, exact)
    llms.sync_actor(actor, policy)
    for a, p in zip(actor.parameters(), policy.parameters(), strict=True):
        assert torch.equal(a, p.bfloat16())
    assert step(policy, actor, reference, True)["kl"] > 0


def test_a_model_loaded_in_bf16_is_the_actor_that_a_run_would_have(model, tokenizer, tmp_path):
    """Which is what --eval_only measures on a GPU. Rotary frequencies stay exact in both."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, actor = llms.load(str(tmp_path), dtype=torch.bfloat16)[0], llms.make_actor(model, torch.bfloat16)
    for a, b in zip(loaded.parameters(), actor.parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    ids = torch.arange(250)[None]
    assert torch.equal(loaded(ids).logits, actor(ids).logits)


# ---------------------------------------------------------------- a checkpoint with every oddity


NEWLINE = "Ċ"  # how byte-level tokenizers write a line break


def plant(folder, odd):
    """The embedded model, in two folders that must train alike. Both end answers at two ids and ask plainly. The odd
    one says the second id in its generation config alone, beside sampling defaults, and has no pad token and no chat
    template; the other says it in its config."""
    model, tokenizer = llms.load("tiny")
    two_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(NEWLINE)]
    if odd:
        model.config.pad_token_id = tokenizer.pad_token = tokenizer.chat_template = None
        model.generation_config.update(
            eos_token_id=two_ids, pad_token_id=None, do_sample=True, repetition_penalty=1.1, top_k=20, temperature=0.7,
            top_p=0.8,
        )  # fmt: skip
    else:
        model.config.eos_token_id = two_ids
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_checkpoint_with_every_oddity_trains_as_one_without(tmp_path):
    settings = dict(
        prompt_style="plain", rewards="tag_count", max_steps=1, eval_steps=1, minibatches=1,
        dataset_path=small_dataset(tmp_path / "data"),
    )  # fmt: skip

    def run(odd):
        name = plant(tmp_path / f"model{odd}", odd)
        folder = main.train(tiny_config(tmp_path / f"run{odd}", model_name=name, **settings))
        trained = AutoModelForCausalLM.from_pretrained(folder / "checkpoints/latest").state_dict()
        return without_times(metrics_of(folder)), trained

    (plain, plain_weights), (odd, odd_weights) = run(odd=False), run(odd=True)
    assert plain == odd
    assert odd[1]["grad_norm"] > 0 and odd[1]["logprob_gap"] < 1e-5 and odd[1]["truncated_rate"] < 1
    base = llms.load("tiny")[0].state_dict()
    assert all(torch.equal(odd_weights[name], plain_weights[name]) for name in base)
    assert any(not torch.equal(odd_weights[name], base[name]) for name in base)


def test_the_oddities_do_not_reach_the_rollout(tmp_path):
    """Both stop ids end rows and are trained; draws and log-probs are of the whole vocabulary, without any penalty."""
    model, tokenizer = llms.load(plant(tmp_path, odd=True))
    assert tokenizer.pad_token_id is None and tokenizer.chat_template is None
    assert model.generation_config.repetition_penalty == 1.1 and model.generation_config.top_k == 20
    problems = rldatasets.load_problems("arithmetic", "test", 8)
    prompts = [rldatasets.build_prompt(tokenizer, problem.question) for problem in problems]
    rollout = generate(model, tokenizer, prompts, group_size=4, max_new_tokens=30, seed=0)
    last = {rollout.trace_ids[row, n - 1].item() for row, n in enumerate(rollout.lengths.tolist())}
    assert set(llms.stop_ids(model, tokenizer)) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(NEWLINE)}
    assert last >= set(llms.stop_ids(model, tokenizer)), "both ids end some row"
    outside_top_20 = 0
    for row, n in enumerate(rollout.lengths.tolist()):
        ids = torch.cat([rollout.prompt_ids[row], rollout.trace_ids[row, :n]])
        logprobs = torch.log_softmax(model(ids[None]).logits[0, -n - 1 : -1], -1)  # (n, V)
        drawn = logprobs.gather(1, rollout.draws[row, :n])
        assert torch.allclose(rollout.logprobs[row, :n], drawn, atol=1e-4)
        assert rollout.draw_mask[row].sum() == n, "the stop token is trained, what follows is not"
        outside_top_20 += ((logprobs > drawn).sum(-1) >= 20).sum().item()
    assert outside_top_20 > 0


def test_the_doctor_names_every_oddity(tmp_path):
    config = tiny_config("unused", model_name=plant(tmp_path, odd=True), dataset_path=small_dataset(tmp_path / "data"))
    said = {}
    for finding in doctor.examine(config):
        said[finding.name] = finding.text if finding.level == "ok" else f"{finding.level}: {finding.text}"
    for text in ("'\\n'", "'<|im_end|>'", "all of them end an answer", "generation config: [2, ", "tokenizer: 2"):
        assert text in said["stop ids"]
    assert "not needed" in said["pad token"]
    assert "plain template" in said["prompt"]
    for text in ("repetition_penalty 1.1", "top_k 20", "temperature 0.7", "top_p 0.8", "not used"):
        assert text in said["sampling defaults"]


# ---------------------------------------------------------------- base models


def test_a_base_model_is_prompted_stopped_and_graded_as_r1_zero_was(tmp_path, monkeypatch):
    """The preset for base models with the tag prefilled, on the embedded model: the prompt ends in the tag, answers end
    at </answer>, and the tag is in front of what is graded and logged, in training and in evaluation."""
    calls = []

    def spy(model, tokenizer, prompts, **options):
        rollout = generate(model, tokenizer, prompts, **options)
        calls.append((prompts, options, rollout))
        return rollout

    monkeypatch.setattr(main, "generate", spy)
    monkeypatch.setattr(rollout_module, "generate", spy)
    preset = PRESETS["qwen2.5-1.5b-base"]
    settings = {name: preset[name] for name in ("tags", "prompt_style", "stop_at_answer")}
    settings |= dict(prefill=True, max_steps=1, eval_steps=1, dataset_path=small_dataset(tmp_path / "data"))
    folder = main.train(tiny_config(tmp_path / "run", **settings))
    for prompts, options, rollout in calls:
        assert options["stop_tag"] == "</answer>"
        assert all(prompt.endswith("\nAssistant:<think>\n") for prompt in prompts)
        for text, finish in zip(rollout.texts, rollout.finish, strict=True):
            _, tag, after = text.partition("</answer>")
            assert finish == "stop" and after in ("", ">", ">\n") if tag else True
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    trained = [sample for sample in samples if sample["split"] == "train"]
    [(prompts, _, rollout)] = [call for call in calls if call[1].get("group_size") == 4]
    assert [sample["completion"] for sample in trained] == ["<think>\n" + text for text in rollout.texts]
    assert [sample["prompt"] for sample in trained] == [prompt for prompt in prompts for _ in range(4)]
    for sample in samples:
        assert sample["completion"].startswith("<think>\n")
        logged = sample["reward/format"] if sample["split"] == "train" else sample["format"]
        assert logged == evaluator.format_reward(sample["completion"], "think")


@pytest.mark.parametrize(
    "text, prefill, accuracy, well_formed",
    [
        ("Nine and nine.</think>\n<answer>18</answer>", True, 1, 1),
        ("Nine and nine.</think>\n<answer>18</answer>", False, 0, 0),
        ("<think>Nine and nine.</think>\n<answer>18</answer>", False, 1, 1),
        ("<think>Nine and nine.</think>\n<answer>18</answer>", True, 0, 0),  # opened twice
        ("</think>\n<answer>18</answer>", True, 1, 0),  # nothing thought
    ],
)
def test_the_prefilled_tag_counts_as_written(tmp_path, monkeypatch, text, prefill, accuracy, well_formed):
    def scripted(*arguments, **options):
        rollout = generate(*arguments, **options)
        rollout.texts = [text] * len(rollout.texts)
        return rollout

    monkeypatch.setattr(main, "generate", scripted)
    monkeypatch.setattr(rollout_module, "generate", scripted)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"question": "What is 9+9?", "answer": "#### 18"}\n')
    settings = dict(tags="think", prefill=prefill, max_steps=1, eval_steps=1, max_completion_length=4)
    start, step = metrics_of(main.train(tiny_config(tmp_path / "run", dataset_path=str(tmp_path), **settings)))
    assert step["format_rate"] == step["reward/format"] == start["eval/format_rate"] == well_formed
    assert step["accuracy"] == step["reward/accuracy"] == start["eval/accuracy"] == accuracy


@pytest.mark.parametrize("style", ["chat", "plain"])
@pytest.mark.parametrize("prefill", [False, True])
def test_soft_thinking_begins_at_once_when_the_tag_is_prefilled(style, prefill):
    model, tokenizer = llms.load("tiny")
    problems = rldatasets.load_problems("arithmetic", "test", 4)
    prompts = [rldatasets.build_prompt(tokenizer, p.question, style=style, prefill=prefill) for p in problems]
    rollout = generate(model, tokenizer, prompts, group_size=2, max_new_tokens=3, soft=SoftThinking(k=2), seed=0)
    likeliest = generate(model, tokenizer, prompts, group_size=2, max_new_tokens=1, temperature=0).trace_ids[:, 0]
    ends = torch.isin(likeliest, torch.tensor(llms.stop_ids(model, tokenizer)))  # such a step is hard in any case
    assert not ends.all()
    assert torch.equal(rollout.is_soft[:, 0], prefill & ~ends)


# ---------------------------------------------------------------- the real size


def memory_of_this_process(name):
    """Bytes. VmHWM is the most that was ever resident, of this process alone."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def _train_at_the_real_size(connection, num_layers, num_problems, max_new_tokens, steps):
    """Optimizer steps of a random model as wide as Qwen2.5-0.5B, with its vocabulary, on real prompts. Sends what it
    took: bytes over what the imports take, bytes in all, and what the doctor says."""
    tokenizer = AutoTokenizer.from_pretrained(real_data.qwen_tokenizer())
    problems = rldatasets.load_problems("gsm8k", "train", num_problems, str(real_data.gsm8k()))
    before = memory_of_this_process("VmRSS")
    model_config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, num_hidden_layers=num_layers, num_attention_heads=14,
        num_key_value_heads=2, intermediate_size=4864, max_position_embeddings=32_768, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with no_init_weights():  # which would take half of the time
        model = Qwen2ForCausalLM(model_config).eval()
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.uniform_(-0.035, 0.035)
    prompts = [rldatasets.build_prompt(tokenizer, problem.question) for problem in problems]
    config = GRPOConfig(
        problems_per_step=num_problems,
        group_size=2,
        max_prompt_length=max(len(ids_of(tokenizer, prompt)) for prompt in prompts),
        max_completion_length=max_new_tokens,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watched = model.model.layers[0].mlp.up_proj.weight
    start, advantages = watched.detach().clone(), torch.tensor([1.0, -1.0]).repeat(num_problems)
    for step in range(steps):
        rollout = generate(
            model, tokenizer, prompts, group_size=2, max_new_tokens=config.max_completion_length, seed=step
        )
        stats = update(model, model, None, optimizer, rollout, advantages, config)
    connection.send(
        dict(
            stats,
            tokens=sum(map(len, rollout.prompt_ids)) + int(rollout.lengths.sum()),
            parameters=sum(p.numel() for p in model.parameters()),
            moved=(watched != start).float().mean().item(),
            took=memory_of_this_process("VmHWM") - before,
            in_all=memory_of_this_process("VmHWM"),
        )
    )
    connection.send(doctor.memory_table(config, model_config, on_gpu=False)["peak"])


def train_at_the_real_size(*arguments):
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here: memory cannot be measured")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_train_at_the_real_size, args=(sender, *arguments))
    process.start()
    sender.close()  # so that a process that dies ends the waiting
    result = receiver.recv() | {"estimate": receiver.recv()}
    process.join()
    print(json.dumps(result))
    assert result["moved"] > 0.99 and result["skipped_updates"] == 0 and result["logprob_gap"] < 1e-4
    assert 1 / 1.5 < result["took"] / result["estimate"] < 1.5, "what --doctor says is far from what it takes"
    return result


def test_a_training_step_with_the_whole_vocabulary(qwen, gsm8k):
    """Two layers; the vocabulary is what is large about small models: 544 MB of it, in fp32."""
    train_at_the_real_size(2, 2, 3, 1)


@pytest.mark.skipif("RUN_SLOW" not in os.environ, reason="minutes and 16 GB: set RUN_SLOW=1")
@pytest.mark.parametrize("num_problems, max_new_tokens", [(2, 6), (12, 24)], ids=["2 x 2 rows", "a full micro-batch"])
def test_training_steps_at_the_full_size_of_qwen_half_billion(qwen, gsm8k, num_problems, max_new_tokens):
    """Two steps: from the second on, Adam's moments are there too."""
    result = train_at_the_real_size(24, num_problems, max_new_tokens, 2)
    assert result["parameters"] == 494_032_768
    assert result["in_all"] < 16e9
