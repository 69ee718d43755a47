"""What only a GPU runs, without one: recorded steps replayed on a CPU (cuda_graph_emulator.py), and the decode step at
the shapes of real models on tensors without values (fake_cuda.py)."""

import collections
import gc
import sys
import weakref
from types import SimpleNamespace
from unittest import mock

import naive_flash
import pytest
import torch
from cuda_graph_emulator import emulated_cuda
from fake_cuda import FakeCapture, fake_cuda
from random_models import PROMPTS, ROOT, STOP_IDS, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

import llms
import rollout as rollout_module
import soft_thinking
from engine import head
from engine.attention import flash_attention, has_flash
from engine.cuda_graphs import StepGraphs, batch_sizes
from engine.kv_cache import FlatKVCache
from engine.sampling_params import SamplingParams
from rollout import Decoder, GraphDecoder, decoder_for, generate
from soft_thinking import SoftThinking

# ---------------------------------------------------------------- replayed graphs give the plain decoder's rollouts

CLOSING = dict(answer_reserve=15, cold_stop_entropy=2.0, cold_stop_steps=3)
MODES = {
    "sampled": dict(),
    "greedy": dict(temperature=0.0),
    "cool, ended by a tag": dict(temperature=0.7, stop_tag="<"),
    "soft, 2 counts, after the tag": dict(soft=SoftThinking(k=2)),
    "soft, 3 weighted": dict(soft=SoftThinking(k=3, weighting="prob", start="immediately", **CLOSING)),
    "soft, 3 counts, cool": dict(temperature=0.7, soft=SoftThinking(k=3, start="immediately", **CLOSING)),
    "soft, 2 weighted, greedy": dict(temperature=0.0, soft=SoftThinking(k=2, weighting="prob", start="immediately")),
    "soft, 3 noisy": dict(soft=SoftThinking(k=3, sampling="gumbel", start="immediately", **CLOSING)),
}
SOME_TAGGED = [PROMPTS[0] + " <reasoning>", *PROMPTS[1:]]
# Prompts, group size, seed: a decoder is used again with fewer rows and another seed, and replaced for more rows.
CALLS = [(SOME_TAGGED, 4, 0), (SOME_TAGGED[:1], 3, 1), (SOME_TAGGED, 5, 2)]


def rollouts(model, tokenizer, calls, **options):
    options = dict(stop_ids=STOP_IDS) | options
    return [generate(model, tokenizer, p, group_size=group, seed=seed, **options) for p, group, seed in calls]


def assert_equal(mine, plain):
    for name in ("draws", "draw_mask", "trace_ids", "completion_mask", "is_soft"):
        assert torch.equal(getattr(mine, name), getattr(plain, name)), name
    for name in ("logprobs", "entropy", "weights"):
        assert torch.allclose(getattr(mine, name), getattr(plain, name), atol=2e-4), name
    assert (mine.gaps is None) == (plain.gaps is None)
    assert mine.gaps is None or torch.allclose(mine.gaps, plain.gaps, atol=2e-4)
    assert mine.finish == plain.finish and mine.texts == plain.texts


@pytest.mark.parametrize(
    "family, mode",
    [("qwen2", mode) for mode in MODES]
    + [(family, mode) for family in ("qwen3", "llama") for mode in ("greedy", "soft, 3 counts, cool")],
)
def test_replayed_graphs_give_the_rollouts_of_the_plain_decoder(family, mode, tokenizer):
    """Shrinking batches, filled up with finished rows; cut at the check every 16 steps; a decoder used again."""
    model = random_model(family, num_hidden_layers=2)
    options = MODES[mode] | dict(max_new_tokens=40)
    expected = rollouts(model, tokenizer, CALLS, **options)
    with emulated_cuda() as cuda:
        replayed = []
        for call, plain in zip(CALLS, expected, strict=True):
            assert_equal(*rollouts(model, tokenizer, [call], **options), plain)
            decoder = rollout_module._graph_decoders[model]
            replayed.append(
                (decoder.max_rows, [size for size, graph in decoder.graphs.graphs.items() if graph.replays])
            )
    assert [max_rows for max_rows, _ in replayed] == [16, 16, 20], "used again until more rows are asked for"
    assert 8 in replayed[1][1], "three rows, and five to fill up"
    assert cuda.captures == 3 + 4 and cuda.replays > 60
    if mode == "sampled":
        assert len(replayed[2][1]) > 1, "the batch shrinks"
    if "soft" in mode:
        assert any(r.is_soft.any() for r in expected)


@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_short_completions(length, tokenizer):
    model = random_model(num_hidden_layers=2)
    for soft in (None, SoftThinking(k=2, start="immediately", answer_reserve=length - 1)):
        options = dict(max_new_tokens=length, soft=soft, stop_ids=[])
        expected = rollouts(model, tokenizer, CALLS[:2], **options)
        with emulated_cuda() as cuda:
            for mine, plain in zip(rollouts(model, tokenizer, CALLS[:2], **options), expected, strict=True):
                assert_equal(mine, plain)
        assert cuda.replays == 2 * (length - 1)
        assert (cuda.captures > 0) == (length > 1), "a single token is drawn by the prefill: nothing to record"


def test_weights_copied_in_place_need_no_new_graph(tokenizer):
    model, other = random_model(num_hidden_layers=2), random_model(num_hidden_layers=2, seed=1)
    (expected,) = rollouts(other, tokenizer, CALLS[:1], max_new_tokens=8)
    with emulated_cuda() as cuda:
        rollouts(model, tokenizer, CALLS[:1], max_new_tokens=8)
        captures = cuda.captures
        model.load_state_dict(other.state_dict())
        assert_equal(*rollouts(model, tokenizer, CALLS[:1], max_new_tokens=8), expected)
        assert cuda.captures == captures


# ---------------------------------------------------------------- memory, streams, finished rows


def test_deleting_a_model_frees_it_and_its_decoder(tokenizer):
    model = random_model(num_hidden_layers=1)
    with emulated_cuda() as cuda:
        rollouts(model, tokenizer, CALLS[:1], max_new_tokens=3)
        decoder = rollout_module._graph_decoders[model]
        freed = [weakref.ref(x) for x in (model, model.lm_head.weight, decoder, decoder.cache.layers[0][0])]
        assert cuda.live_graphs
        del model, decoder
        gc.collect()
        assert [ref() for ref in freed] == [None] * 4 and not cuda.live_graphs


def test_a_replaced_decoder_is_freed_before_the_new_one_is_made(tokenizer, monkeypatch):
    """By counting references alone: when memory is short, the garbage collector has not come yet."""
    model = random_model(num_hidden_layers=1)
    with emulated_cuda() as cuda:
        rollouts(model, tokenizer, CALLS[:1], max_new_tokens=3)
        old, make, seen = weakref.ref(rollout_module._graph_decoders[model]), FlatKVCache.__init__, []

        def watched(cache, *arguments):
            seen.append((old(), len(cuda.live_graphs)))
            make(cache, *arguments)

        monkeypatch.setattr(FlatKVCache, "__init__", watched)
        rollouts(model, tokenizer, CALLS[:1], max_new_tokens=3, temperature=0.0)
        assert seen == [(None, 0)]


def test_all_recordings_share_one_side_stream(tokenizer):
    model = random_model(num_hidden_layers=1)
    with emulated_cuda() as cuda:
        for temperature in (1.0, 0.0):
            rollouts(model, tokenizer, CALLS[:1], max_new_tokens=3, temperature=temperature)
    assert cuda.captures > 2 and cuda.streams == 1


def test_finished_rows_and_rows_that_fill_up_attend_to_one_key(tokenizer, monkeypatch):
    model, contexts, kernel = random_model(num_hidden_layers=1), [], naive_flash.naive_flash

    def watched(*arguments, context_lens):
        contexts.append(context_lens.tolist())
        return kernel(*arguments, context_lens=context_lens)

    with emulated_cuda():
        rollouts(model, tokenizer, CALLS[:1], max_new_tokens=16)  # 16 rows
        monkeypatch.setattr(naive_flash, "naive_flash", watched)
        (rollout,) = rollouts(model, tokenizer, CALLS[:1], max_new_tokens=16)
        prompt, lengths = torch.tensor([len(ids) for ids in rollout.prompt_ids]), rollout.lengths
        assert lengths.min() < 15 and len(contexts) == 15
        for t, context in enumerate(contexts, start=1):
            assert context == torch.where(t < lengths, prompt + t, 1).tolist()
        contexts.clear()
        (rollout,) = rollouts(model, tokenizer, CALLS[1:2], max_new_tokens=16, stop_ids=STOP_IDS)
        assert all(len(context) == 8 and context[3:] == [1] * 5 for context in contexts), "three rows, and five others"


def test_batch_sizes_fill_up_at_most_a_third():
    sizes = [*batch_sizes(256), 256]
    assert sizes == [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for rows in range(6, 257):
        size = min(size for size in sizes if size >= rows)
        assert size - rows <= size / 3 or size == 8


# ---------------------------------------------------------------- scripts


def test_the_training_benchmark_counts_matrix_products_around_the_flash_kernel(monkeypatch):
    """Heads that share keys: torch 2.11's own formula for the kernel refuses their shapes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import training

    query, key, starts = torch.ones(5, 4, 8), torch.ones(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    with emulated_cuda(), training.matrix_counter() as counter:
        flash_attention(query, key, key, starts, starts, 3, 3, 1.0)
        torch.ones(3, 4) @ torch.ones(4, 5)
    assert counter.get_total_flops() == training.matrix_flops(counter) == 2 * 3 * 4 * 5


def test_the_soft_step_benchmark_times_the_precision_of_sampling(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import soft_step

    monkeypatch.setattr(llms, "sampling_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(sys, "argv", ["soft_step.py", "--rows", "2", "--tokens", "3", "--rounds", "1"])
    soft_step.main()
    assert "torch.bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("script, arguments", [(soft_thinking, []), (rollout_module, ["What is 1 + 1?"])])
def test_command_lines_that_only_sample_load_the_precision_of_sampling(script, arguments, monkeypatch, capsys):
    def load(name, dtype=None):
        raise ValueError(f"asked for {dtype}")

    monkeypatch.setattr(llms, "sampling_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(llms, "load", load)
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
    with pytest.raises(SystemExit):
        script.main()
    assert "asked for torch.bfloat16" in capsys.readouterr().err


# ---------------------------------------------------------------- the emulator itself


def recorded(step):
    """StepGraphs of step(rows, t), for up to four rows."""
    return StepGraphs(step, 4, torch.device("cpu"))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x, rows, t: x[rows, t[0]],  # an index without dimensions is read by Python
        lambda x, rows, t: t.item(),
        lambda x, rows, t: bool((x > 0).any()),
        lambda x, rows, t: x[x > 0],
        lambda x, rows, t: (x > 0).nonzero(),
        lambda x, rows, t: x.__setitem__(x > 0, x.new_ones(4)),
        lambda x, rows, t: x.repeat_interleave(rows, dim=0),
    ],
)
def test_what_waits_for_the_gpu_cannot_be_captured(waits):
    x = torch.eye(4)
    with emulated_cuda(), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorded(lambda rows, t: waits(x, rows, t))


def test_a_capture_computes_nothing_and_a_replay_runs_no_python():
    total, calls = torch.zeros(4), []

    def step(rows, t):
        calls.append(len(rows))
        total.index_add_(0, rows, t.float().expand(len(rows)))

    with emulated_cuda():
        graphs = recorded(step)
        assert total.tolist() == [2] * 4, "two warm-ups at t = 1"
        for t in (1, 2, 3):
            graphs.replay(torch.tensor([2]), t, rows_changed=t == 1)
    assert total.tolist() == [2 + 1 + 2 + 3] * 4, "in the rows that fill up too"
    assert calls == [4] * 3, "two warm-ups and the capture"


def test_freed_memory_and_temporaries_of_other_graphs_are_found():
    holder, kept = {"x": torch.ones(4)}, {}

    def step(rows, t):
        kept["temporary"] = holder["x"] * 2
        return kept["temporary"]

    with emulated_cuda():
        graphs = recorded(step)
        assert kept["temporary"].isnan().all()
        graphs.replay(torch.arange(4), 1, rows_changed=True)
        assert kept["temporary"].isnan().all()
        holder["x"] = torch.ones(4)
        with pytest.raises(AssertionError, match="freed"):
            graphs.replay(torch.arange(4), 2, rows_changed=False)


# ---------------------------------------------------------------- real shapes on a GPU that does not exist

QWEN_25 = dict(num_key_value_heads=2, vocab_size=151_936, max_position_embeddings=32_768, num_hidden_layers=2)
SHAPES = {  # all but the depth: two layers show what 24 and 28 would
    "0.5b": dict(hidden_size=896, num_attention_heads=14, intermediate_size=4864),
    "1.5b": dict(hidden_size=1536, num_attention_heads=12, intermediate_size=8960),
}
STEPS = {
    "sampled": (SoftThinking(k=1), 1.0, None),
    "greedy": (SoftThinking(k=1), 0.0, None),
    "cool, stop tag": (SoftThinking(k=1), 0.7, "</answer>"),
    "soft 2, counts": (SoftThinking(k=2), 1.0, None),
    "soft 3, weighted, reserve": (SoftThinking(k=3, weighting="prob", answer_reserve=64), 1.0, None),
    "soft 2, weighted, cold stop": (SoftThinking(k=2, weighting="prob", cold_stop_entropy=0.1), 0.7, "</answer>"),
    "soft 3, counts, greedy": (SoftThinking(k=3, cold_stop_entropy=0.1, answer_reserve=64), 0.0, None),
    "soft 3, noisy": (SoftThinking(k=3, sampling="gumbel"), 0.7, "</answer>"),
}


def no_table(tokenizer, vocab_size, tag):
    return torch.zeros(vocab_size, len(tag) + 1, dtype=torch.int8)


def qwen_25(cuda, size, **overrides):
    config = Qwen2Config(**QWEN_25 | SHAPES[size] | overrides, tie_word_embeddings=True)
    return cuda.place(Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)).eval()


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_qwen_25_can_be_captured(size, step, tokenizer, monkeypatch):
    """No wait for the GPU, no copy from or to the CPU, no shape that does not fit. The prefill, which no graph records,
    may wait: it counts the prompts' tokens."""
    soft, temperature, stop_tag = STEPS[step]
    monkeypatch.setattr(soft_thinking, "_transitions", no_table)  # a table without values would be kept for others
    with fake_cuda() as cuda:
        params = SamplingParams(soft, temperature, (151_643, 151_645), stop_tag, max_new_tokens=786)
        decoder = decoder_for(qwen_25(cuda, size), tokenizer, params, num_rows=12, num_tokens=512 + 786)
        assert type(decoder) is GraphDecoder and decoder.max_tokens == 1536
        tensors = [*decoder.buffers.values(), decoder.uniform, decoder.cache.layers[0][0]]
        assert all(tensor.is_cuda for tensor in tensors)
    assert cuda.captures == 2 and cuda.flash_calls == 2 * 2, "for 12 and for 8 rows, two layers each"


def test_heads_that_the_flash_kernel_refuses_are_decoded_without_it(tokenizer):
    with fake_cuda() as cuda:
        widths = (8, 64, 128, 256, 12, 20, 264)
        heads = [torch.empty(3, width, dtype=torch.bfloat16, device=cuda.device) for width in widths]
        assert [has_flash(tensor) for tensor in heads] == [True] * 4 + [False] * 3
        assert not has_flash(heads[1].float())
        params = SamplingParams(SoftThinking(k=1), 1.0, (1,), None, max_new_tokens=4)
        narrow = qwen_25(cuda, "0.5b", hidden_size=14 * 12)
        assert type(decoder_for(narrow, tokenizer, params, 4, 20)) is Decoder


class LargeResults(TorchDispatchMode):
    """The operators that write at least so many numbers."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        view = operator.is_view or operator.namespace == "prim"
        if isinstance(result, torch.Tensor) and result.numel() >= self.size and not view:
            self.names.append(operator.overloadpacket.__name__)
        return result


def test_sampling_writes_the_vocabulary_four_times(tokenizer):
    """Logits, log-probs, probabilities, terms of the entropy: each is 156 MB for 256 rows of Qwen2.5."""
    with fake_cuda() as cuda:
        model = qwen_25(cuda, "0.5b")
        params = SamplingParams(SoftThinking(k=1), 1.0, (151_643,), None, max_new_tokens=8)
        decoder = Decoder(model, tokenizer, params, 12, 20)
        rows = torch.arange(12, device=cuda.device)
        hidden = torch.empty(12, 896, dtype=torch.bfloat16, device=cuda.device)
        with LargeResults(12 * 151_936) as large:
            decoder.sample_tokens(rows, hidden, 0)
        assert large.names == ["mm", "_log_softmax", "exp", "special_entr"]


class Kernels(TorchDispatchMode):
    """Counts what a GPU would be told to do, by operation; matrix products also by their results' precision."""

    def __init__(self):
        super().__init__()
        self.names, self.products = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if not operator.is_view and operator.namespace != "prim" and name != "_unsafe_view":
            self.names[name] += 1
        if name == "mm":
            self.products[result.dtype] += 1
        return result


def kernels_of_a_step(cuda, depth):
    model = qwen_25(cuda, "1.5b", num_hidden_layers=depth)
    decoder = Decoder(model, None, SamplingParams(SoftThinking(k=1), 1.0, (151_643,), None, 8), 8, 20)
    decoder.cache = FlatKVCache(model.config, 8, 64, cuda.device, torch.bfloat16)
    rows, step = torch.arange(8, device=cuda.device), torch.ones(8, dtype=torch.long, device=cuda.device)
    norm = mock.patch.object(torch.nn.functional, "rms_norm", lambda x, *arguments: x.abs())  # one kernel on a GPU
    with norm, torch.no_grad(), Kernels() as kernels:
        decoder.decode_step(rows, step)
    return kernels.names


def test_a_layer_of_a_decode_step_is_14_kernels():
    """2 norms, 4 products, 3 for the rotation, 2 writes of keys and values, attention, silu, and a product with gate;
    the attention operator launches up to three copies more. transformers' modules launch 26, and these copies."""
    with fake_cuda() as cuda:
        layer = kernels_of_a_step(cuda, 3) - kernels_of_a_step(cuda, 2)
    assert layer == {
        "abs": 2, "addmm": 1, "addmm_": 2, "mm": 1, "mul": 2, "cat": 1, "addcmul": 1, "index_copy_": 2,
        "_flash_attention_forward": 1, "silu": 1,
    }  # fmt: skip


def test_the_head_writes_fp32_at_once_and_in_larger_chunks():
    """As under autocast: fp32 weights, products in bf16. 2^28 logits are 1766 positions, so 2000 make two chunks."""
    saved = SimpleNamespace(needs_input_grad=[True] * 8)  # what autograd would keep; it cannot run without a GPU
    saved.save_for_backward = lambda *tensors: setattr(saved, "saved_tensors", tensors)
    autocast = dict(is_autocast_enabled=lambda device: True, get_autocast_dtype=lambda device: torch.bfloat16)
    with fake_cuda() as cuda:
        hidden, weight = (torch.empty(n, 64, device=cuda.device) for n in (2000, 151_936))
        draws = torch.zeros(2000, 2, dtype=torch.long, device=cuda.device)
        with mock.patch.multiple(torch, **autocast), Kernels() as forward:
            logprobs = head.DrawLogprobs.forward(saved, hidden, weight, draws, 1.0)
        with Kernels() as backward:
            grad_hidden, grad_weight = head.DrawLogprobs.backward(saved, logprobs)[:2]
        assert forward.products == {torch.float32: 2}
        # Of each chunk: logits again, the weights' gradient, and the hidden states' in bf16.
        assert backward.products == {torch.float32: 4, torch.bfloat16: 2}
        assert grad_hidden.shape == (2000, 64) and grad_weight.dtype == torch.float32


def test_sampling_and_training_round_logits_alike():
    with fake_cuda() as cuda, Kernels() as sampling, torch.no_grad():
        linear = cuda.place(torch.nn.Linear(64, 512, bias=False, dtype=torch.bfloat16))
        model = SimpleNamespace(get_output_embeddings=lambda: linear, config=SimpleNamespace())
        logits = head.head_logits(model, torch.empty(3, 64, dtype=torch.bfloat16, device=cuda.device))
        assert logits.dtype == torch.float32 and sampling.products == {torch.float32: 1}


def test_a_weight_in_16_bits_has_its_gradient_summed_in_fp32(monkeypatch):
    monkeypatch.setattr(head, "MAX_LOGITS", 50)  # one position at a time
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 6), torch.randn(50, 6)
    draws = torch.randint(50, (300, 1))
    exact = weight.bfloat16().double().requires_grad_()
    logits = hidden.bfloat16().double() @ exact.T
    torch.log_softmax(logits, dim=-1).gather(1, draws).sum().backward()
    low = weight.bfloat16().requires_grad_()
    head.DrawLogprobs.apply(hidden.bfloat16(), low, draws, 1.0).sum().backward()
    errors = (low.grad - exact.grad).abs() / exact.grad.abs().clamp(min=1)
    assert low.grad.dtype == torch.bfloat16 and errors.mean() < 0.006


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[x[0, 0].long()],
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(4, 4)),
        lambda x: torch.ones(4, 4).to(x.device),
    ],
)
def test_waits_and_copies_are_found_on_a_gpu_that_does_not_exist(forbidden):
    with fake_cuda() as cuda, pytest.raises(RuntimeError, match="not permitted|a captured step works on"):
        x = torch.empty(4, 4, device=cuda.device)
        with FakeCapture(cuda):
            forbidden(x)
