"""llms: the training pass sees what the rollout did, costs what it should, and loading says what is wrong."""

import multiprocessing
import resource
import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from naive_flash import naive_flash
from random_models import PROMPTS, ROOT, random_model
from torch.utils._python_dispatch import TorchDispatchMode

import llms
from engine import attention, head
from rollout import Rollout, generate
from soft_thinking import SoftThinking


def naive_logprobs(model, rollout, row, temperature):
    """One row, one plain forward pass over its ids, fp32 log-softmax."""
    tokens = rollout.trace_ids[row][rollout.completion_mask[row]]
    ids = torch.cat([rollout.prompt_ids[row], tokens])
    logits = model(ids[None]).logits[0].float() / temperature
    start = len(rollout.prompt_ids[row])
    return torch.log_softmax(logits, -1)[torch.arange(start - 1, len(ids) - 1), tokens]


def random_mixture_rollout(K=3, T=6, vocab=512):
    """A rollout as soft thinking makes them: several weighted draws at a position, rows of unequal length."""
    torch.manual_seed(0)
    lengths = torch.tensor([T, 2, 4, 1])
    mask = torch.arange(T) < lengths[:, None]
    draws = torch.randint(vocab, (4, T, K))
    weights = torch.softmax(torch.randn(4, T, K), -1)
    return Rollout(
        prompt_ids=[torch.randint(vocab, (n,)) for n in (5, 2, 9, 1)],
        draws=draws,
        weights=weights,
        draw_mask=mask.unsqueeze(-1).expand(-1, -1, K),
        logprobs=torch.zeros(4, T, K),
        trace_ids=draws[..., 0],
        completion_mask=mask,
        is_soft=mask,
        entropy=torch.zeros(4, T),
        finish=["length"] * 4,
        texts=[""] * 4,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_training_pass_equals_the_rollout_and_a_naive_pass(model, tokenizer, temperature):
    rollout = generate(model, tokenizer, PROMPTS, group_size=3, max_new_tokens=30, temperature=temperature, seed=0)
    assert len(set(rollout.lengths.tolist())) > 2
    logprobs = llms.completion_logprobs(model, rollout, temperature)
    assert logprobs.shape == rollout.draws.shape and logprobs.dtype == torch.float32
    assert torch.allclose(logprobs, rollout.logprobs, atol=1e-4)
    assert (logprobs[~rollout.draw_mask] == 0).all()
    for row in range(len(rollout.texts)):
        expected = naive_logprobs(model, rollout, row, temperature)
        assert torch.allclose(logprobs[row, : len(expected), 0], expected, atol=1e-4)


def test_rows_select_and_order(tokenizer):
    model = random_model()
    rollout = generate(model, tokenizer, PROMPTS, group_size=2, max_new_tokens=20, seed=0)
    everything = llms.completion_logprobs(model, rollout)
    for rows in ([5, 0, 3], torch.tensor([7]), range(8)):
        selected = llms.completion_logprobs(model, rollout, rows=rows)
        assert torch.allclose(selected, everything[torch.as_tensor(list(rows))], atol=1e-5)


def test_gradient_equals_the_plain_input_ids_path(tokenizer):
    """The mixture of one, in a padded batch, trains exactly as token ids do, one row at a time."""
    model = random_model().double()
    rollout = generate(random_model(), tokenizer, PROMPTS, max_new_tokens=20, seed=0)
    coefficients = torch.randn(rollout.draws.shape[:2], dtype=torch.double)

    (llms.completion_logprobs(model, rollout)[..., 0] * coefficients).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row in range(len(PROMPTS)):
        logprobs = naive_logprobs(model, rollout, row, 1.0)
        (logprobs * coefficients[row, : len(logprobs)]).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(ours[name], parameter.grad, atol=1e-5, rtol=1e-4), name


def test_mixtures_against_a_loop_over_rows():
    model = random_model()
    rollout = random_mixture_rollout()
    logprobs = llms.completion_logprobs(model, rollout, 0.9)
    embedding = model.get_input_embeddings().weight
    for row in range(4):
        prompt, n = rollout.prompt_ids[row], int(rollout.lengths[row])
        inputs = [embedding[i] for i in prompt]
        for t in range(n):
            logits = model(inputs_embeds=torch.stack(inputs)[None]).logits[0, -1].float() / 0.9
            expected = torch.log_softmax(logits, -1)[rollout.draws[row, t]]
            assert torch.allclose(logprobs[row, t], expected, atol=1e-4)
            inputs.append(
                sum(w * embedding[d] for w, d in zip(rollout.weights[row, t], rollout.draws[row, t], strict=True))
            )


def test_a_one_hot_mixture_is_the_embedding_exactly():
    model = random_model()
    draws = torch.tensor([[3, 0, 0], [511, 0, 0]])
    weights = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    assert torch.equal(llms.embed_mixture(model, draws, weights), model.get_input_embeddings().weight[[3, 511]])


def test_head_in_recomputed_chunks_equals_one_piece(tokenizer, monkeypatch):
    model = random_model()
    rollout = generate(model, tokenizer, PROMPTS, group_size=2, max_new_tokens=20, seed=0)

    def value_and_gradient():
        model.zero_grad()
        logprobs = llms.completion_logprobs(model, rollout, 0.8)
        (logprobs * torch.arange(logprobs.numel()).view_as(logprobs)).sum().backward()
        return logprobs.detach(), [p.grad.clone() for p in model.parameters()]

    whole, whole_gradient = value_and_gradient()
    monkeypatch.setattr(head, "MAX_LOGITS", 7 * 512)  # seven positions at a time
    chunked, chunked_gradient = value_and_gradient()
    assert torch.allclose(whole, chunked, atol=1e-6)
    for a, b in zip(whole_gradient, chunked_gradient, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("max_logits", [2**26, 3 * 50])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_heads_gradient_is_autograds_and_can_be_asked_for_twice(monkeypatch, max_logits, temperature):
    monkeypatch.setattr(head, "MAX_LOGITS", max_logits)  # one chunk, kept for the backward pass, and several
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    draws, factor = torch.randint(50, (10, 3)), torch.randn(10, 3)
    draws[0] = 7  # the same token drawn again adds up
    naive = torch.log_softmax(hidden @ weight.T / temperature, dim=-1).gather(1, draws)
    expected = torch.autograd.grad((naive * factor).sum(), (hidden, weight))
    logprobs = head.DrawLogprobs.apply(hidden, weight, draws, temperature)
    assert torch.allclose(logprobs, naive, atol=1e-5)
    for _ in range(2):
        got = torch.autograd.grad((logprobs * factor).sum(), (hidden, weight), retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def _peak_of_a_training_pass(connection, rows, tokens):
    """Peak memory (bytes) that a log-prob pass with gradient adds: Qwen2.5's vocabulary, 110 positions at a time."""
    head.MAX_LOGITS = 2**24
    model = random_model(vocab_size=151_936, hidden_size=16, head_dim=8, num_attention_heads=2, num_hidden_layers=1)
    torch.manual_seed(0)
    draws = torch.randint(151_936, (rows, tokens, 1))
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    rollout = Rollout(
        [torch.arange(10)] * rows, draws, torch.ones(rows, tokens, 1), mask.unsqueeze(-1), torch.zeros(rows, tokens, 1),
        draws[..., 0], mask, ~mask, torch.zeros(rows, tokens), ["length"] * rows, [""] * rows,
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    llms.completion_logprobs(model, rollout).sum().backward()
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def test_full_logits_are_never_held():
    """4 rows of 512 tokens have 1.2 GB of fp32 logits, their gradient as much again: the pass must take far less."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_peak_of_a_training_pass, args=(sender, 4, 512))
    process.start()
    peak = receiver.recv() if receiver.poll(120) else None
    process.join()
    full = 4 * 512 * 151_936 * 4
    assert peak is not None and peak < 0.4 * full, f"{peak / 1e9:.2f} GB of {full / 1e9:.2f} GB"


def test_logits_are_upcast_before_the_softmax(tokenizer):
    """A bf16 log-softmax is off by several hundredths; only the rounding of the logits themselves may remain."""
    model = random_model().bfloat16()
    rollout = generate(model, tokenizer, PROMPTS, max_new_tokens=20, seed=0)
    logprobs = llms.completion_logprobs(model, rollout)
    for row in range(len(PROMPTS)):
        ids = torch.cat([rollout.prompt_ids[row], rollout.trace_ids[row][rollout.completion_mask[row]]])
        start = len(rollout.prompt_ids[row])
        logits = model(ids[None]).logits[0, start - 1 : -1]
        exact = torch.log_softmax(logits.float(), -1).gather(-1, ids[start:, None])
        in_bf16 = torch.log_softmax(logits, -1).gather(-1, ids[start:, None]).float()
        ours = logprobs[row, : len(exact)]
        assert (ours - exact).abs().mean() < (in_bf16 - exact).abs().mean()


def test_bf16_weights_do_not_move_at_small_steps_but_the_actor_follows_the_fp32_policy():
    policy, only_bf16 = random_model(), random_model().bfloat16()
    start = [p.detach().clone() for p in policy.parameters()]
    start_bf16 = [p.detach().clone() for p in only_bf16.parameters()]
    actor = llms.make_actor(policy, torch.bfloat16)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-6, weight_decay=0.0) for m in (policy, only_bf16)]
    ids = torch.arange(40).view(2, 20)
    for _ in range(20):
        for m, optimizer in zip((policy, only_bf16), optimizers, strict=True):
            m(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        llms.sync_actor(actor, policy)

    def moved(parameters, origin):
        pairs = list(zip(parameters, origin, strict=True))
        return sum((p != o).sum().item() for p, o in pairs) / sum(o.numel() for _, o in pairs)

    assert moved(policy.parameters(), start) > 0.7  # all but the embeddings of tokens that were not there
    assert moved(only_bf16.parameters(), start_bf16) < 0.1
    for a, p in zip(actor.parameters(), policy.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, p.bfloat16()) and not a.requires_grad
    for a, p in zip(actor.buffers(), policy.buffers(), strict=True):  # rotary frequencies stay exact
        assert a.dtype == p.dtype and torch.equal(a, p)


def test_the_actor_is_the_policy_where_precision_is_the_same():
    policy = random_model()
    assert llms.make_actor(policy, torch.float32) is policy


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("name", ["tiny", "tiny_student"])
def test_embedded_models_load_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = llms.load(name)
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id in llms.stop_ids(model, tokenizer)


def test_loading_a_folder_turns_dropout_off(tmp_path, tokenizer):
    random_model(attention_dropout=0.5).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = llms.load(str(tmp_path))
    ids = torch.arange(10)[None]
    model.train()
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["no/such-model", "./nowhere", "/nowhere/at/all", "a b c", ""])
def test_a_model_that_is_not_there(name):
    with pytest.raises(ValueError, match="cannot load model") as error:
        llms.load(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_pickled_weights_are_refused(tmp_path, tokenizer):
    model = random_model()
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load model"):
        llms.load(str(tmp_path))


def test_the_configuration_loads_without_the_weights():
    config = llms.load_config("tiny")
    assert (config.vocab_size, config.max_position_embeddings) == (512, 512)
    with pytest.raises(ValueError, match="cannot load model './nowhere'"):
        llms.load_config("./nowhere")


def test_shipped_models_are_small():
    for name, limit in (("tiny", 3.6e6), ("tiny_student", 1.1e6)):
        assert (ROOT / "models" / name / "model.safetensors").stat().st_size < limit


# ---------------------------------------------------------------- prompts computed once


def plain_logprobs(model, rollout, row):
    """One row alone, its prompt in front, embeddings mixed by hand, the whole head at every position."""
    ids = rollout.prompt_ids[row]
    n = int(rollout.lengths[row])
    E = model.get_input_embeddings().weight
    mixed = torch.stack([(rollout.weights[row, t, :, None] * E[rollout.draws[row, t]]).sum(dim=0) for t in range(n)])
    inputs = torch.cat([E[ids], mixed])[None]
    logits = model(inputs_embeds=inputs, use_cache=False).logits[0, len(ids) - 1 : -1].float()
    return torch.log_softmax(logits, dim=-1).gather(1, rollout.draws[row, :n])  # (n, K)


SOFT = SoftThinking(k=3, start="immediately", weighting="prob")


def test_what_rows_share_stands_once():
    """Prompts 7 8 1, 7 8 2 2 and 7 8 1 again, with completions of 3, 2, 1 and 2 tokens."""
    prompts = [torch.tensor(ids) for ids in ([7, 8, 1], [7, 8, 2, 2], [7, 8, 1])]
    packed = attention.Packed([prompts[0], prompts[0], prompts[1], prompts[2]], [3, 2, 1, 2], torch.device("cpu"))
    assert packed.prompt_tokens.tolist() == [7, 8, 1, 2, 2]
    assert packed.positions.tolist() == [[0, 1, 2, 2, 3, 3, 4, 3, 3]], "prefix, two rests, then what the rows feed"
    assert packed.logit_indices.tolist() == [2, 5, 6, 2, 7, 4, 2, 8]
    assert [tokens.tolist() for tokens in packed.prompts_of_rows] == [[0, 1, 2], [0, 1, 2], [0, 1, 3, 4], [0, 1, 2]]


@pytest.mark.parametrize(
    "prompts, common",
    [
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 3, 4]], 2),
        ([[1], [1, 2]], 0),
        ([[5, 1], [6, 1]], 0),
        ([[1, 2], [1, 3]], 1),
    ],
)
def test_every_prompt_keeps_a_token_of_its_own(prompts, common):
    assert attention.common_prefix([torch.tensor(ids) for ids in prompts]) == common


@pytest.mark.parametrize("soft", [None, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("system", ["", "Think. Then answer.\n"], ids=["no common prefix", "a common prefix"])
def test_log_probs_and_gradients_equal_those_of_every_row_alone(model, tokenizer, soft, system):
    """Also for rows in any order, cut groups, equal prompts of different groups, and rows of one token."""
    prompts = [system + prompt for prompt in [*PROMPTS, PROMPTS[0]]]
    options = dict(max_new_tokens=12, seed=1, soft=soft, stop_ids=list(range(0, 512, 5)))
    rollout = generate(model, tokenizer, prompts, group_size=4, **options)
    assert rollout.lengths.min() == 1 or soft or system, "a row of one token feeds nothing"
    generator = torch.Generator().manual_seed(0)
    for rows in (list(range(20)), torch.randperm(20, generator=generator)[:7].tolist(), [3]):
        coefficients = torch.randn(rollout.logprobs.shape, generator=generator) * rollout.draw_mask
        model.zero_grad()
        expected = {row: plain_logprobs(model, rollout, row) for row in rows}
        sum((coefficients[row, : len(lp)] * lp).sum() for row, lp in expected.items()).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        logprobs = llms.completion_logprobs(model, rollout, rows=rows)
        (logprobs * coefficients[rows]).sum().backward()
        for i, row in enumerate(rows):
            mask = rollout.draw_mask[row, : len(expected[row])]
            assert torch.allclose(logprobs[i, : len(mask)][mask], expected[row][mask], atol=2e-5)
        scale = max(g.abs().max() for g in gradients)
        for mine, theirs in zip(model.parameters(), gradients, strict=True):
            assert torch.allclose(mine.grad, theirs, atol=1e-5 * scale)


@pytest.mark.parametrize("system", ["", "Think. Then answer.\n"], ids=["no common prefix", "a common prefix"])
def test_the_gpu_layout_of_the_training_pass_equals_the_cpu_one(model, tokenizer, monkeypatch, system):
    """With the flash kernel's slow version in its place: what it is given is right, gradients included."""
    prompts = [system + prompt for prompt in PROMPTS]
    rollout = generate(
        model, tokenizer, prompts, group_size=3, max_new_tokens=9, seed=0, stop_ids=list(range(0, 512, 5))
    )
    assert rollout.lengths.min() == 1 or system
    results = []
    for on_gpu in (False, True):
        monkeypatch.setattr(attention, "has_flash", lambda tensor, on_gpu=on_gpu: on_gpu)
        monkeypatch.setattr(attention, "flash_attention", naive_flash)
        model.zero_grad()
        logprobs = llms.completion_logprobs(model, rollout)
        logprobs.square().sum().backward()
        results.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * max(1, a.abs().max()))


def test_a_plain_call_of_the_model_is_untouched_by_our_attention(model, tokenizer):
    """Left-padded batches with a mask, as transformers' own generate makes them."""
    ids = torch.randint(3, 500, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) >= torch.tensor([0, 3, 5])[:, None]
    before = model(ids, attention_mask=mask.long()).logits
    generate(model, tokenizer, PROMPTS, max_new_tokens=3, seed=0)
    assert torch.allclose(model(ids, attention_mask=mask.long()).logits[mask], before[mask], atol=1e-5)


def test_fused_norms_give_the_same_numbers(model, tokenizer):
    rollout = generate(model, tokenizer, PROMPTS, max_new_tokens=9, seed=0)
    before = llms.completion_logprobs(model, rollout)
    llms.fuse_norms(model)
    fused = [module for module in model.modules() if "forward" in vars(module)]
    assert len(fused) >= 2 * model.config.num_hidden_layers + 1
    assert torch.allclose(llms.completion_logprobs(model, rollout), before, atol=1e-5)
    actor = llms.make_actor(model, torch.bfloat16)
    assert vars(actor.base_model.norm)["forward"].__self__ is actor.base_model.norm, "a copy has norms of its own"


class Casts(TorchDispatchMode):
    """Counts how often activations (not weights) are rounded to bf16."""

    def __init__(self, num_tokens):
        super().__init__()
        self.num_tokens, self.count = num_tokens, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.count += self.num_tokens in result.shape[:2]
        return result


def test_fused_norms_round_once_under_autocast_and_to_the_same_numbers(tokenizer):
    """Else q, k and v, and gate and up, would each round what they read."""
    model = random_model(num_hidden_layers=2)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(fp32_norm, module)
    rollout = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=9, seed=0, stop_ids=[])
    num_tokens = len(rollout.prompt_ids[0]) + 8
    assert num_tokens not in (model.config.hidden_size, model.config.intermediate_size, model.config.vocab_size)
    results, counts = [], []
    for fuse in (False, True):
        if fuse:
            llms.fuse_norms(model)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16), Casts(num_tokens) as casts:
            logprobs = llms.completion_logprobs(model, rollout)
        logprobs.sum().backward()
        results.append((logprobs, [parameter.grad for parameter in model.parameters()]))
        counts.append(casts.count)
    assert torch.equal(results[0][0], results[1][0])
    for before, after in zip(results[0][1], results[1][1], strict=True):
        assert (before - after).norm() <= 0.02 * before.norm(), "sums of three gradients, rounded"
    assert counts == [2 * 5, 2 * 2 + 1], (
        "what q, k, v, gate and up read; what the norms of two layers give, and the last"
    )


def test_rotations_in_16_bits_under_autocast_alone(tokenizer):
    """What goes to attention is bf16 as it comes; without autocast nothing changes."""
    model = random_model(num_hidden_layers=2)
    rollout = generate(model, tokenizer, PROMPTS, max_new_tokens=9, seed=0)
    exact, attend, seen = llms.completion_logprobs(model, rollout), attention.Packed.attend, []

    def watched(packed, layer, query, *arguments):
        seen.append(query.dtype)
        return attend(packed, layer, query, *arguments)

    def under_autocast():
        with mock.patch.object(attention.Packed, "attend", watched), torch.autocast("cpu", dtype=torch.bfloat16):
            return llms.completion_logprobs(model, rollout)

    before = under_autocast()
    llms.round_rotations(model)
    assert torch.equal(llms.completion_logprobs(model, rollout), exact)
    after = under_autocast()
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    errors = [(logprobs - exact).abs().mean() for logprobs in (before, after)]
    assert 0 < errors[1] < 2 * errors[0]
    actor = llms.make_actor(model, torch.bfloat16)
    assert vars(actor.base_model.rotary_emb)["forward"].__self__ is actor.base_model.rotary_emb


def fp32_norm(module, x):
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
