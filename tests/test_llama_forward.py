"""engine/llama_forward.py: the same numbers as transformers' modules, on weights that are held once."""

import copy
import gc
import weakref

import pytest
import torch
from random_models import random_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

import llms
from engine.attention import Packed, forward_hidden
from engine.kv_cache import DenseKVCache
from engine.llama_forward import LlamaForward, join, sampling_forward

SHAPE = dict(
    vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama 3 positions": LlamaConfig(
        **SHAPE,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=1e4,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),  # fmt: skip
    "wide heads": Qwen3Config(**SHAPE, head_dim=8),
    "qwen2": Qwen2Config(**SHAPE),
}


def make(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms are 0 and 1 in a new model
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def hidden_states(model, forward):
    """Two prompts with a common prefix, then three tokens of four rows."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(97, (n,), generator=generator) for n in (9, 6)]
    prompts[1][:3] = prompts[0][:3]
    packed = Packed(prompts, [1, 1], torch.device("cpu"))
    cache = DenseKVCache(packed, group_size=2, max_new_tokens=4)
    E = model.get_input_embeddings()
    seen = [forward(E(packed.prompt_tokens)[None], packed.positions, cache)]
    for t in range(3):
        cache.prepare_decode(None, None, None)
        position = torch.tensor([9, 9, 6, 6])[:, None] + t
        seen.append(forward(E(torch.randint(97, (4, 1), generator=generator)), position, cache))
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_equal_those_of_transformers_modules(name):
    model = make(CONFIGS[name])
    expected = hidden_states(model, lambda *arguments: forward_hidden(model, *arguments))
    forward = sampling_forward(model)
    assert isinstance(forward, LlamaForward)
    for mine, theirs in zip(hidden_states(model, forward), expected, strict=True):
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, atol=2e-5, rtol=1e-5)


def test_other_families_keep_their_modules(tokenizer):
    class Changed(LlamaForCausalLM):
        """A model of the user's own, say with --trust_remote_code."""

    assert not isinstance(sampling_forward(Changed(CONFIGS["llama"])), LlamaForward)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_what_a_decoder_keeps_does_not_keep_the_model_alive(family):
    config = CONFIGS["qwen2"] if family == "qwen2" else Gemma2Config(**SHAPE, head_dim=4, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    forward, reference = sampling_forward(model), weakref.ref(model)
    del model
    gc.collect()
    assert forward is not None and reference() is None


def test_weights_are_held_once_and_a_step_of_the_optimizer_is_seen():
    model = make(CONFIGS["qwen2"])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    forward = LlamaForward(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    attention = model.model.layers[1].self_attn
    assert forward.layers[1].qkv[0].data_ptr() == attention.q_proj.weight.data_ptr()
    assert LlamaForward(model).layers[1].qkv[0].data_ptr() == attention.q_proj.weight.data_ptr(), "nothing moves again"

    optimizer = llms.make_optimizer(model, 1e-2)
    model(torch.arange(12)[None]).logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(before[1], list(model.parameters())[1])
    expected = hidden_states(model, lambda *arguments: forward_hidden(model, *arguments))
    for mine, theirs in zip(hidden_states(model, forward), expected, strict=True):
        assert torch.allclose(mine, theirs, atol=2e-5, rtol=1e-5)


def test_a_model_whose_weights_are_joined_is_saved_and_copied_as_any_other(tmp_path):
    model = make(CONFIGS["llama"])
    LlamaForward(model)
    model.save_pretrained(tmp_path / "joined")
    plain = make(CONFIGS["llama"])
    plain.save_pretrained(tmp_path / "plain")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("joined", "plain")]
    assert files[0] == files[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "joined")
    twin = copy.deepcopy(model)
    for mine, theirs, copied in zip(model.parameters(), loaded.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs) and torch.equal(mine, copied)
        assert copied.untyped_storage().nbytes() == copied.numel() * 4, "the copy has memory of its own"


def test_parameters_that_stand_side_by_side_by_chance_or_apart():
    whole = torch.arange(12.0).view(6, 2)
    a, b, c = (torch.nn.Parameter(part) for part in whole.split([1, 2, 3]))
    assert join([a, b, c]).data_ptr() == whole.data_ptr()
    assert torch.equal(join([b, a]), torch.tensor([[2.0, 3.0], [4.0, 5.0], [0.0, 1.0]])), "in the order asked for"
    assert torch.equal(b, whole[1:3]) and b.data_ptr() != whole[1:3].data_ptr()


def test_an_actor_in_bf16_follows_the_policy():
    policy = random_model("qwen3")
    actor = llms.make_actor(policy, torch.bfloat16)
    forward = LlamaForward(actor)
    with torch.no_grad():
        policy.model.layers[0].mlp.up_proj.weight.add_(1.0)
    llms.sync_actor(actor, policy)
    up = forward.layers[0].gate_up[0].chunk(2)[1]
    assert torch.equal(up, policy.model.layers[0].mlp.up_proj.weight.bfloat16())
