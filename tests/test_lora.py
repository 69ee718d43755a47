"""engine/lora.py: adapters learn what full fine-tuning of their matrices would, sample as they train, and resume."""

import copy
import json
import re

import pytest
import torch
from small_runs import metrics_of, small_dataset, tiny_config, without_times
from transformers import AutoModelForCausalLM

import llms
import main
from engine import lora
from rollout import generate
from tracking import checkpoints, memory
from tracking.run_config import parse_config
from update import update

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base():
    return llms.load("tiny")


@pytest.fixture(scope="module")
def rollout(base):
    model, tokenizer = base
    return generate(model, tokenizer, ["Mia has 3.", "Why?"], group_size=4, max_new_tokens=12, seed=0)


def adapted(base, rank=4, alpha=8.0, noise=0.0, **options):
    policy = copy.deepcopy(base[0])
    lora.add_adapters(policy, rank, alpha, **options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in policy.parameters():
            if parameter.requires_grad and noise:
                parameter.data.normal_(0, noise)
    return policy


# ---------------------------------------------------------------- adapters


def test_every_linear_layer_of_the_blocks_gets_an_adapter_and_nothing_else_learns(base):
    policy = adapted(base)
    linear = {name for name, m in base[0].base_model.named_modules() if type(m) is torch.nn.Linear}
    assert {name.removeprefix("model.") for name in lora.adapted_layers(policy)} == linear and len(linear) == 4 * 7
    learning = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 28 and all("lora_" in name and p.dtype == torch.float32 for name, p in learning.items())
    assert lora.is_adapted(policy) and not lora.is_adapted(base[0])


def test_the_policy_starts_as_the_base_and_adapters_off_is_the_base(base, rollout):
    expected = llms.completion_logprobs(base[0], rollout)
    assert torch.equal(llms.completion_logprobs(adapted(base), rollout), expected)
    policy = adapted(base, noise=0.05)
    assert (llms.completion_logprobs(policy, rollout) - expected).abs().max() > 0.1
    with lora.adapters_off(policy):
        assert torch.equal(llms.completion_logprobs(policy, rollout), expected)
    assert (llms.completion_logprobs(policy, rollout) - expected).abs().max() > 0.1
    assert {p.requires_grad for name, p in policy.named_parameters() if "lora_" in name} == {True}


def test_the_seed_decides_and_torch_is_left_alone(base):
    before = torch.get_rng_state()
    one, same, other = (lora.adapter_state(adapted(base, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    name = next(name for name in one if "lora_A" in name)
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


def test_merged_sampling_is_the_policy(base, rollout):
    """1e-4 is what is promised; the merged weights are what a sampling step reads."""
    policy, actor = adapted(base, noise=0.05), llms.make_actor(base[0], torch.float32, always_copy=True)
    llms.sync_actor(actor, policy)
    ours, merged = (llms.completion_logprobs(model, rollout) for model in (policy, actor))
    assert (ours - merged).abs().max() < 1e-4
    sampled = generate(actor, base[1], ["Mia has 3."], group_size=4, max_new_tokens=12, seed=1)
    trained = llms.completion_logprobs(policy, sampled) * sampled.draw_mask
    assert (trained - sampled.logprobs).abs().max() < 1e-4


# ---------------------------------------------------------------- full rank is full fine-tuning


def matrices_of(model) -> dict[str, torch.Tensor]:
    return {name: m.weight for name, m in model.named_modules() if type(m) is torch.nn.Linear and "layers." in name}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_full_rank_takes_the_step_of_full_fine_tuning(base, rollout, optimizer):
    """With rank = width of the input, A the identity, alpha = rank and B = 0: the gradient of B is that of W, and that
    of A is 0. So one step from the start moves B as it would move W, and W + B A is the fine-tuned W, also under Adam,
    which looks at each number by itself. (From the second step on, A moves as well, and the two differ.)

    Layers have two widths of input; every A is an identity of its own width, the larger one padded with zeros.
    """
    model = base[0]
    width = max(m.shape[1] for m in matrices_of(model).values())
    policy = adapted(base, rank=width, alpha=float(width))
    for layer in lora.adapted_layers(policy).values():
        layer.lora_A["default"].weight.data = torch.eye(width, layer.in_features)
    full = copy.deepcopy(model).requires_grad_(False)
    for matrix in matrices_of(full).values():
        matrix.requires_grad_(True)

    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5] * 2)
    settings = dict(problems_per_step=2, minibatches=1, max_grad_norm=1e9, learning_rate=1e-4)
    config = tiny_config("unused", **settings)
    for learner in (policy, full):
        learning = [p for p in learner.parameters() if p.requires_grad]
        make = dict(sgd=lambda p: torch.optim.SGD(p, lr=1.0), adam=lambda p: torch.optim.AdamW(p, lr=1e-4))[optimizer]
        update(learner, model, None, make(learning), rollout, advantages, config)
    largest = 0.0
    for name, layer in lora.adapted_layers(policy).items():
        tuned = matrices_of(full)[name]
        step = (tuned - matrices_of(model)[name]).abs().max()
        assert step > 1e-5 and (lora.merged_weight(layer) - tuned).abs().max() < 1e-5, name
        if optimizer == "sgd":  # nothing is divided by a gradient that may be rounding alone
            assert (lora.merged_weight(layer) - tuned).abs().max() < 1e-3 * step, name
        largest = max(largest, step)
    assert largest > 5e-5


def test_a_low_rank_is_not_full_fine_tuning(base, rollout):
    """The same comparison fails where it must: the product of rank 1 cannot be the whole step."""
    policy, full = adapted(base, rank=1, alpha=1.0), copy.deepcopy(base[0])
    advantages, config = (
        torch.tensor([1.0, -1.0, 0.5, -0.5] * 2),
        tiny_config("unused", problems_per_step=2, minibatches=1),
    )
    for learner in (policy, full):
        learning = [p for p in learner.parameters() if p.requires_grad]
        update(learner, base[0], None, torch.optim.SGD(learning, lr=1.0), rollout, advantages, config)
    errors = [
        (lora.merged_weight(layer) - matrices_of(full)[name]).abs().max()
        for name, layer in lora.adapted_layers(policy).items()
    ]
    assert max(errors) > 1e-4


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    settings = dict(
        dataset_path=small_dataset(folder / "data"), lora_rank=4, beta=0.05, save_merged=True, max_completion_length=32,
        eval_problems=4, save_steps=2, eval_steps=2, learning_rate=1e-2, minibatches=1,
    )  # fmt: skip
    return main.train(tiny_config(folder / "run", max_steps=4, **settings)), settings


def test_a_run_learns_adapters_and_its_kl_is_to_the_base(run):
    rows = metrics_of(run[0])[1:]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6), "adapters begin at 0"
    assert rows[-1]["kl"] > 1e-4 and max(row["logprob_gap"] for row in rows) < 1e-4


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(run, tmp_path):
    folder, settings = run
    main.train(tiny_config(tmp_path / "run", max_steps=2, **settings))
    main.train(tiny_config(tmp_path / "run", max_steps=4, resume_from_checkpoint="latest", **settings))
    assert without_times(metrics_of(folder))[3:] == without_times(metrics_of(tmp_path / "run"))[3:]
    name = "checkpoints/latest/adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_a_checkpoint_opens_as_a_model_and_as_an_adapter(run, base, rollout):
    """The merged model without peft, the adapter with it: both are the same policy."""
    step = checkpoints.resolve(run[0] / "checkpoints" / "latest")
    assert {"adapter", "model.safetensors", "config.json", "trainer_state.pt"} <= {file.name for file in step.iterdir()}
    merged = AutoModelForCausalLM.from_pretrained(step).eval()
    ours = llms.load(str(step))[0]
    with_adapter = peft.PeftModel.from_pretrained(copy.deepcopy(base[0]), step / "adapter").base_model.model.eval()
    one, two, three = (llms.completion_logprobs(model, rollout) for model in (merged, ours, with_adapter))
    assert torch.equal(one, two) and (one - three).abs().max() < 1e-4
    assert (one - llms.completion_logprobs(base[0], rollout)).abs().max() > 1e-3
    sizes = json.loads((step / "files.json").read_text())
    assert sizes["adapter/adapter_model.safetensors"] == (step / "adapter" / "adapter_model.safetensors").stat().st_size


def test_without_save_merged_a_checkpoint_holds_the_adapter_alone(run, tmp_path):
    settings = run[1] | dict(save_merged=False, max_steps=1)
    folder = main.train(tiny_config(tmp_path / "run", **settings))
    step = checkpoints.resolve(folder / "checkpoints" / "latest")
    assert not (step / "model.safetensors").exists() and (step / "adapter" / "adapter_config.json").exists()
    with pytest.raises(ValueError, match="it holds an adapter and no model: train with --save_merged"):
        llms.load(str(step))
    (step / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="adapter_model.safetensors has 0 bytes of"):
        main.train(tiny_config(folder, resume_from_checkpoint="latest", **settings | dict(max_steps=2)))


def test_an_adapter_of_another_rank_is_refused(base, tmp_path):
    lora.save_adapter(adapted(base, rank=4), tmp_path)
    with pytest.raises(ValueError, match="does not fit --lora_rank and the model"):
        lora.load_adapter(adapted(base, rank=8), tmp_path)


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--lora_rank 4 --fsdp", "--fsdp True: not with --lora_rank"),
        ("--lora_rank 4 --beta 0.1 --reference_refresh_steps 5", "--reference_refresh_steps 5: not with --lora_rank"),
        ("--save_merged", "--save_merged True: without --lora_rank"),
        ("--lora_rank -1", "--lora_rank -1: must be a finite number, 0 or more"),
    ],
)
def test_what_does_not_go_together(flags, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        parse_config(["--preset", "tiny", *flags.split()])


def test_without_peft_it_is_asked_for_by_name(monkeypatch):
    from tracking import run_config

    monkeypatch.setattr(run_config.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--lora_rank 4: the package peft is not here \(pip install peft\)"):
        parse_config(["--preset", "tiny", "--lora_rank", "4"])


# ---------------------------------------------------------------- memory


def test_the_memory_table_counts_adapters_as_they_are(base):
    policy = adapted(base, rank=4)
    table = memory.memory_table(tiny_config("unused", lora_rank=4, beta=0.1), base[0].config, on_gpu=False)
    learning = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
    assert table["adapters, fp32"] == table["gradients, fp32"] == 4 * learning
    assert table["Adam's two moments, fp32"] == 8 * learning
    assert table["policy, fp32"] + table["the frozen matrices under the adapters"] == 4 * frozen
    assert table["actor, fp32"] == 4 * frozen and "reference" not in table
    on_gpu = memory.memory_table(tiny_config("unused", lora_rank=4), base[0].config, on_gpu=True)
    assert on_gpu["the frozen matrices under the adapters"] == table["the frozen matrices under the adapters"] / 2
