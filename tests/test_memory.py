"""memory.py: the table equals real tensors, and those of the presets on the meta device."""

import functools

import pytest
import torch
from random_models import FAMILIES, random_model
from small_runs import tiny_config
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config
from transformers.initialization import no_init_weights

import llms
from engine import head, kv_cache
from engine.sampling_params import SamplingParams, SoftThinking
from rollout import Decoder, generate
from tracking import memory
from tracking.run_config import PRESETS, GRPOConfig


def table_of(model_config, on_gpu=False, judge_config=None, **overrides):
    settings = dict(problems_per_step=2, group_size=2, max_prompt_length=64, max_completion_length=32) | overrides
    return memory.memory_table(tiny_config(None, minibatches=1, **settings), model_config, on_gpu, judge_config)


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
        return (hidden * weight).to(head.product_dtype(hidden))


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
        llms.round_rotations(model)
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
    monkeypatch.setattr(memory, "activation_bytes", lambda config, autocast, lora_rank: activations)
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


# ---------------------------------------------------------------- the presets' tensors

MODEL_OF_PRESET = {"qwen2.5-1.5b": "1.5B", "qwen2.5-1.5b-base": "1.5B", "qwen2.5-0.5b": "0.5B"}


def bytes_of(tensors):
    """As size_of, on the meta device, where addresses mean nothing."""
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("preset, size", MODEL_OF_PRESET.items())
def test_the_table_is_what_the_presets_tensors_take_on_the_meta_device(preset, size, monkeypatch):
    activations = activations_of(size)
    monkeypatch.setattr(memory, "activation_bytes", lambda config, autocast, lora_rank: activations)
    config, meta = GRPOConfig(**PRESETS[preset]), torch.device("meta")
    table = memory.memory_table(config, qwen_config(size), on_gpu=True)
    policy = memory.empty_model(qwen_config(size))
    for parameter in policy.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer = torch.optim.AdamW(policy.parameters(), foreach=False)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    actor = llms.make_actor(policy, torch.bfloat16)
    rows = config.problems_per_step * config.group_size
    width = -(-(config.max_prompt_length + config.max_completion_length) // 256) * 256  # as rollout.decoder_for rounds
    cache = kv_cache.FlatKVCache(policy.config, rows, width, meta, torch.bfloat16)
    logits = torch.empty(head.max_logits("cuda") // policy.config.vocab_size, policy.config.vocab_size, device=meta)
    for name, counted in {
        "policy": bytes_of(policy.parameters()),
        "gradients": bytes_of(p.grad for p in policy.parameters()),
        "Adam": bytes_of(moments),
        "actor": bytes_of(actor.parameters()),
        "keys and values": bytes_of(store for pair in cache.layers for store in pair),
        "update: one chunk of the head": bytes_of([logits, logits.bfloat16()]),
    }.items():
        assert entry(table, name) == pytest.approx(counted, rel=0.1), name


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make within it: those alive at the same time, at most."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: pair for key, pair in self.storages.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


V, ROWS = 151_936, 16


def test_one_steps_logits_against_what_sampling_makes(tokenizer):
    """Ordinary sampling at the real vocabulary, in bf16: what is alive while a token is drawn."""
    model = random_model(vocab_size=V, hidden_size=8, num_attention_heads=1, num_key_value_heads=1).bfloat16()
    params = SamplingParams(SoftThinking(k=1), 1.0, (2,), None, 4)
    decoder = Decoder(model, tokenizer, params, ROWS, 16)
    hidden = torch.randn(ROWS, 8, dtype=torch.bfloat16)
    with torch.no_grad(), LiveBytes() as live:
        decoder.sample_tokens(torch.arange(ROWS), hidden, 0)
    for on_gpu in (False, True):
        table = table_of(model.config, on_gpu, problems_per_step=ROWS // 2)
        assert entry(table, "rollout: one step's logits") == pytest.approx(live.peak, rel=0.1)


def test_a_local_judge_is_counted():
    policy, judge = random_model(), random_model(hidden_size=128)
    for on_gpu, name in ((False, "judge, fp32"), (True, "judge, bf16")):
        without = table_of(policy.config, on_gpu)
        table = table_of(policy.config, on_gpu, judge.config)
        assert table[name] == size_of(judge.parameters()) / (1 + on_gpu)
        assert table["peak"] == without["peak"] + table[name] and name not in without


def test_a_chunk_of_the_head_against_what_its_passes_make(monkeypatch):
    """Forward and backward under bf16 autocast; with a cast of the matrix and its gradient, which have their rows."""
    chunk, hidden_size = 64, 8
    for name in ("MAX_LOGITS", "MAX_LOGITS_ON_GPU"):  # the passes run on a CPU, the table is a GPU's
        monkeypatch.setattr(head, name, chunk * V)
    model = random_model(
        vocab_size=V, hidden_size=hidden_size, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1,
        intermediate_size=8, tie_word_embeddings=True,
    )  # fmt: skip
    hidden = torch.randn(3 * chunk, hidden_size, requires_grad=True)
    with LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16):
            logprobs = head.draw_logprobs(model, hidden, torch.randint(V, (3 * chunk, 1)), 1.0)
        logprobs.sum().backward()
    table = table_of(model.config, on_gpu=True, tokens_per_micro_batch=4096, problems_per_step=16)
    rows = ("update: one chunk", "update: bf16 casts", "update: the embedding's newest")
    assert sum(entry(table, row) for row in rows) == pytest.approx(live.peak, rel=0.1)
