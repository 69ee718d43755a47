"""The probe and the head: a family is right to the last digit, or refused in one line that names it."""

import copy

import pytest
import torch
import transformers as T
from random_models import PROMPTS, random_model

import llms
from engine import attention, head, probe
from engine.attention import UnsupportedModel
from rollout import Rollout, generate

SIZES = dict(
    vocab_size=512, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, max_position_embeddings=256, eos_token_id=2, bos_token_id=None, pad_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip
GPT2 = dict(vocab_size=512, n_embd=48, n_layer=3, n_head=4, n_positions=256, eos_token_id=2, bos_token_id=None)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
OPT = dict(
    vocab_size=512, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64, max_position_embeddings=256,
    word_embed_proj_dim=48, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
MULTIPLIERS = dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.1)
GEMMA = dict(head_dim=12, query_pre_attn_scalar=12, sliding_window=256)
RIGHT = {
    "gpt2": (T.GPT2Config, GPT2),
    "gpt_neox": (T.GPTNeoXConfig, {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "phi": (T.PhiConfig, SIZES),
    "phi3": (T.Phi3Config, SIZES),
    "gemma": (T.GemmaConfig, SIZES | dict(head_dim=12)),
    "gemma2": (T.Gemma2Config, SIZES | GEMMA | dict(attn_logit_softcapping=None, final_logit_softcapping=3.0)),
    "gemma3_text": (T.Gemma3TextConfig, SIZES | GEMMA),
    "mistral": (T.MistralConfig, SIZES | dict(sliding_window=None)),
    "mistral, its window": (T.MistralConfig, SIZES | dict(sliding_window=16)),
    "phi3, its window": (T.Phi3Config, SIZES | dict(sliding_window=20)),
    "mixtral": (T.MixtralConfig, SIZES | dict(num_local_experts=4, sliding_window=None, router_jitter_noise=0.1)),
    "qwen2_moe": (T.Qwen2MoeConfig, SIZES | EXPERTS | dict(shared_expert_intermediate_size=32)),
    "qwen3_moe": (T.Qwen3MoeConfig, SIZES | EXPERTS | dict(head_dim=12)),
    "smollm3": (T.SmolLM3Config, SIZES),
    "granite": (T.GraniteConfig, SIZES | MULTIPLIERS | dict(logits_scaling=8.0)),
    "cohere": (T.CohereConfig, SIZES | dict(logit_scale=0.25)),
    "olmo2": (T.Olmo2Config, SIZES),
    "starcoder2": (T.Starcoder2Config, SIZES | dict(sliding_window=None)),
    "opt, with dropout": (T.OPTConfig, OPT | dict(dropout=0.5, layerdrop=0.5)),
}
FALCON = dict(vocab_size=512, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2)
HYBRID = dict(layer_types=["conv", "full_attention", "conv"])
REFUSED = {
    "gptj": (T.GPTJConfig, {**GPT2, "rotary_dim": 8}, "attention has a form of its own"),
    "gpt_neo": (
        T.GPTNeoConfig,
        dict(vocab_size=512, hidden_size=48, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
        "attention has a form of its own",
    ),
    "falcon": (
        T.FalconConfig,
        dict(vocab_size=512, hidden_size=48, num_hidden_layers=2, num_attention_heads=4),
        "form",
    ),
    "stablelm": (T.StableLmConfig, SIZES, "a form of its own"),
    "bloom": (T.BloomConfig, dict(vocab_size=512, hidden_size=48, n_layer=2, n_head=4), "no max_position_embeddings"),
    "mamba": (
        T.MambaConfig,
        dict(vocab_size=512, hidden_size=48, num_hidden_layers=2, state_size=8),
        "layers without attention",
    ),
    "gpt_oss": (
        T.GptOssConfig,
        SIZES | dict(head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=256),
        "sinks",
    ),
    "lfm2": (T.Lfm2Config, SIZES | HYBRID, "layers without attention .conv"),
}


def random_family(config, seed=0):
    torch.manual_seed(seed)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias.normal_()  # a trained one is not zero
    llms.turn_randomness_off(model)
    return model


def check(model):
    probe.check_model(model, llms.embed_mixture, llms.completion_logprobs)


@pytest.fixture(scope="module", params=RIGHT)
def right(request):
    config_class, settings = RIGHT[request.param]
    return random_family(config_class(**settings))


def test_a_family_that_is_right_passes_with_rounding_alone(right):
    before = torch.random.get_rng_state()
    check(right)
    assert torch.equal(torch.random.get_rng_state(), before) and not right.training
    own, paths = probe._measure(right, llms.embed_mixture, llms.completion_logprobs)
    right.eval()
    assert own.shape[-1] == 3 and own.std() > 0.05
    for logprobs in paths.values():
        assert torch.allclose(logprobs, own, atol=5e-6)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_would_be_wrong_is_refused_in_one_line_with_its_name(family):
    config_class, settings, reason = REFUSED[family]
    with pytest.raises(ValueError, match=f"^{family} models are not supported: .*{reason}") as raised:
        check(random_family(config_class(**settings)))
    assert "\n" not in str(raised.value)


def test_what_goes_wrong_in_a_forward_pass_is_named(monkeypatch):
    model = random_model()
    monkeypatch.setattr(model.model, "forward", lambda **_: {}["no such\nkey"])
    with pytest.raises(ValueError, match="^qwen2 models are not supported: KeyError in a forward pass") as raised:
        check(model)
    assert "\n" not in str(raised.value) and isinstance(raised.value.__cause__, KeyError)
    assert model.config._attn_implementation != "layout"


WRONG_HEADS = {
    "scale": lambda model: setattr(model.config, "logit_scale", 1.01),
    "cap": lambda model: setattr(model.config, "final_logit_softcapping", 20.0),
    "positions": lambda model: setattr(model.model.rotary_emb, "forward", _no_positions(model)),
}


def _no_positions(model):
    forward = model.model.rotary_emb.forward  # a scheme that does not look at the positions it is given
    return lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None])


@pytest.mark.parametrize("fault", WRONG_HEADS)
def test_a_difference_is_measured_in_nats(fault):
    model = random_model()
    check(model)
    WRONG_HEADS[fault](model)
    with pytest.raises(ValueError, match=r"^qwen2 models are not supported: .* differ .* by \d[\d.e-]* nats$"):
        check(model)


def test_in_bf16_rounding_passes_and_another_distribution_does_not(right, monkeypatch):
    model = copy.deepcopy(right).bfloat16()
    check(model)
    scale, cap = head.scale_and_cap(model.config)
    monkeypatch.setattr(head, "scale_and_cap", lambda config: (1.5 * scale, cap))
    with pytest.raises(UnsupportedModel, match="nats"):
        check(model)


def test_attention_with_a_cap_is_compared_with_attention_that_has_it():
    """transformers' own fast attention leaves the cap of Gemma 2 out."""
    model = random_family(T.Gemma2Config(**SIZES | GEMMA | dict(attn_logit_softcapping=1.0)))
    with pytest.raises(UnsupportedModel, match="gemma2 models .* nats"):
        check(model)


def test_a_window_that_the_limit_of_positions_does_not_know_is_crossed():
    model = random_family(T.MistralConfig(**SIZES | dict(sliding_window=100)))
    model.config.layer_types = ["full_attention"] * 3  # which this family does not read
    assert llms.max_positions(model.config) == 256
    with pytest.raises(UnsupportedModel, match="mistral models"):
        check(model)


def test_dropout_that_was_left_on_shows():
    model = random_family(T.OPTConfig(**OPT))
    check(model)
    model.model.decoder.layers[0].dropout = 0.5
    with pytest.raises(UnsupportedModel, match="opt models .* the training pass differ"):
        check(model)


def test_damaged_weights_are_told_from_a_wrong_family():
    model = random_model()
    model.lm_head.weight.data[7, 7] = float("nan")
    with pytest.raises(ValueError, match="not finite: its weights are damaged"):
        check(model)


@pytest.mark.parametrize(
    "settings, limit",
    [
        (dict(sliding_window=16), 16),
        (dict(sliding_window=None), 256),
        (dict(sliding_window=16, use_sliding_window=False), 256),
        (dict(sliding_window=16, layer_types=["full_attention"] * 3), 256),
        (dict(sliding_window=16, layer_types=["full_attention", "sliding_attention", "full_attention"]), 16),
        (dict(attention_chunk_size=32, layer_types=["chunked_attention", "full_attention"]), 32),
        (dict(rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 64}), 64),
        (dict(rope_parameters={"a": {"rope_type": "dynamic", "original_max_position_embeddings": 128}}), 128),
        (dict(rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 64}), 256),
    ],
)
def test_positions_end_at_the_narrowest_window_and_where_frequencies_change(settings, limit):
    config = T.LlamaConfig(**SIZES)
    for name, value in settings.items():
        setattr(config, name, value)
    assert llms.max_positions(config) == limit


# ---------------------------------------------------------------- the head


HEADS = {
    "bias": (T.PhiConfig, SIZES),
    "scale": (T.CohereConfig, SIZES | dict(logit_scale=0.25)),
    "scaling": (T.GraniteConfig, SIZES | dict(logits_scaling=8.0)),
    "cap": (T.Gemma2Config, SIZES | GEMMA | dict(final_logit_softcapping=3.0)),
}


@pytest.mark.parametrize("family", HEADS)
def test_head_logits_are_the_models_own(family):
    model = random_family(HEADS[family][0](**HEADS[family][1]))
    ids = torch.arange(20)[None]
    hidden = model.base_model(ids).last_hidden_state
    logits = head.head_logits(model, hidden)
    assert logits.dtype == torch.float32 and torch.allclose(logits, model(ids).logits, atol=1e-6)
    plain = model.get_output_embeddings().weight @ hidden[0].T
    assert not torch.allclose(logits[0].T, plain, atol=0.1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("max_logits", [2**26, 3 * 50])
@pytest.mark.parametrize("bias, scale, cap", [(1, 1.0, None), (0, 0.3, None), (0, 1.0, 2.0), (1, 0.7, 1.5)])
def test_the_gradient_with_bias_scale_and_cap_is_autograds(monkeypatch, max_logits, temperature, bias, scale, cap):
    monkeypatch.setattr(head, "MAX_LOGITS", max_logits)
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    bias = torch.randn(50, requires_grad=True) if bias else None
    draws, factor = torch.randint(50, (10, 3)), torch.randn(10, 3)
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    naive = torch.log_softmax(logits / temperature, dim=-1).gather(1, draws)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    expected = torch.autograd.grad((naive * factor).sum(), inputs)
    logprobs = head.DrawLogprobs.apply(hidden, weight, draws, temperature, bias, scale, cap)
    assert torch.allclose(logprobs, naive, atol=1e-5)
    for _ in range(2):
        got = torch.autograd.grad((logprobs * factor).sum(), inputs, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def text_of(model, lengths=(9, 4), seed=0):
    """A rollout of given tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 512, (2, max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    zeros = torch.zeros(ids.shape)
    prompts = [torch.randint(3, 512, (n,), generator=generator) for n in (6, 11)]
    columns = (ids[..., None], mask[..., None].float(), mask[..., None], zeros[..., None])
    return Rollout(prompts, *columns, ids, mask, ~mask, zeros, ["length"] * 2, [""] * 2)


@pytest.mark.parametrize("family", HEADS)
def test_a_whole_training_pass_is_autograds_through_the_model_itself(family):
    model = random_family(HEADS[family][0](**HEADS[family][1]))
    naive, rollout = copy.deepcopy(model), text_of(model)
    llms.completion_logprobs(model, rollout).sum().backward()
    for row, n in enumerate(rollout.lengths.tolist()):
        ids = torch.cat([rollout.prompt_ids[row], rollout.trace_ids[row, :n]])
        logprobs = naive(ids[None]).logits[0, -n - 1 : -1].log_softmax(dim=-1)
        logprobs.gather(1, ids[-n:, None]).sum().backward()
    for (name, a), b in zip(model.named_parameters(), naive.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert torch.allclose(a.grad, b.grad, atol=1e-4 * max(1, b.grad.abs().max())), name


@pytest.mark.parametrize("family", HEADS)
def test_sampling_knows_the_log_probs_of_the_model_itself(family, tokenizer):
    model = random_family(HEADS[family][0](**HEADS[family][1]))
    rollout = generate(model, tokenizer, PROMPTS, group_size=2, max_new_tokens=12, temperature=0.8, seed=0)
    for row, n in enumerate(rollout.lengths.tolist()):
        ids = torch.cat([rollout.prompt_ids[row], rollout.trace_ids[row, :n]])
        own = (model(ids[None]).logits[0, -n - 1 : -1] / 0.8).log_softmax(dim=-1).gather(1, ids[-n:, None])
        assert torch.allclose(rollout.logprobs[row, :n], own, atol=1e-5)
    assert torch.allclose(llms.completion_logprobs(model, rollout, 0.8), rollout.logprobs, atol=1e-5)


def test_a_bias_in_bf16_leaves_a_kl_of_exactly_zero():
    """The reference holds its head in bf16, the policy casts its own at every use."""
    policy = random_family(T.PhiConfig(**SIZES))
    reference, rollout = llms.make_reference(policy, bf16=True), text_of(policy)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        own, of_reference = (llms.completion_logprobs(model, rollout) for model in (policy, reference))
    assert torch.equal(own, of_reference) and own.abs().sum() > 0


def test_the_check_costs_no_attention_of_the_wrong_kind():
    """A plain call of a model is not the business of `forward_hidden`."""
    model = random_family(T.FalconConfig(**FALCON))
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    with pytest.raises(attention.UnsupportedModel, match="^falcon models"):
        attention.forward_hidden(model, torch.zeros(1, 1, 48), torch.zeros(1, 1, dtype=torch.long), None)
