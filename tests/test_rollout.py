"""rollout.generate: against transformers' own generate, against the distribution it claims to sample, and alone
against in company."""

import dataclasses
import math
import random
import weakref

import pytest
import torch
from random_models import PROMPTS, STOP_IDS, random_model

import llms
import rollout as rollout_module
from engine.attention import Packed
from engine.kv_cache import DenseKVCache
from rldatasets import build_prompt, load_problems
from rollout import Decoder, draw, generate
from soft_thinking import TagMatcher


def greedy_by_transformers(model, tokenizer, prompt, max_new_tokens):
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return out[0, ids.shape[1] :]


def completion(rollout, row):
    return rollout.trace_ids[row][rollout.completion_mask[row]]


def next_logits(model, ids):
    return model(torch.tensor([ids])).logits[0, -1].float()


# ---------------------------------------------------------------- greedy equals transformers


def test_greedy_equals_transformers(model, tokenizer):
    rollout = generate(model, tokenizer, PROMPTS, max_new_tokens=40, temperature=0)
    assert len({len(ids) for ids in rollout.prompt_ids}) == len(PROMPTS), "prompts of unequal length are the point"
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(completion(rollout, row), greedy_by_transformers(model, tokenizer, prompt, 40))


def test_greedy_equals_transformers_in_a_shrinking_batch(tokenizer):
    """Rows that stop at very different steps: each departure moves other rows in the cache."""
    model = random_model(eos_token_id=list(range(0, 512, 12)))
    prompts = [f"{'Tom has ' * (i % 5)}{i}" for i in range(24)]
    rollout = generate(model, tokenizer, prompts, max_new_tokens=60, temperature=0)
    assert len(set(rollout.lengths.tolist())) > 5
    for row, prompt in enumerate(prompts):
        assert torch.equal(completion(rollout, row), greedy_by_transformers(model, tokenizer, prompt, 60))


@pytest.mark.parametrize("how", ["train mode", "gradient checkpointing"])
def test_model_in_training_decodes_the_same_and_stays_in_training(tokenizer, how):
    model = random_model()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=20, temperature=0)
    model.config.use_cache = False  # what training code often sets
    if how == "gradient checkpointing":
        model.gradient_checkpointing_enable()
    model.train()
    attention = model.config._attn_implementation
    rollout = generate(model, tokenizer, PROMPTS, max_new_tokens=20, temperature=0)
    assert torch.equal(rollout.draws, expected.draws)
    assert model.training and model.config._attn_implementation == attention


def test_generation_config_of_the_checkpoint_does_not_leak(tokenizer):
    """top_k, penalties and the like belong to a chat demo; the loss needs the distribution that was sampled."""
    plain, odd = random_model(), random_model()
    odd.generation_config.update(
        top_k=3, top_p=0.4, temperature=0.3, repetition_penalty=5.0, do_sample=True, no_repeat_ngram_size=2,
        min_new_tokens=15, suppress_tokens=[5, 6], max_length=3,
    )  # fmt: skip
    for temperature in (0, 1.0):
        a, b = (
            generate(m, tokenizer, PROMPTS, max_new_tokens=25, temperature=temperature, seed=3) for m in (plain, odd)
        )
        assert torch.equal(a.draws, b.draws) and torch.equal(a.logprobs, b.logprobs)


# ---------------------------------------------------------------- the distribution


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_the_sampling_distribution(tokenizer, temperature):
    model = random_model()
    rollout = generate(model, tokenizer, PROMPTS, group_size=2, max_new_tokens=12, temperature=temperature, seed=1)
    for row in range(len(rollout.texts)):
        ids = rollout.prompt_ids[row].tolist()
        for t, token in enumerate(completion(rollout, row).tolist()):
            logprobs = torch.log_softmax(next_logits(model, ids) / temperature, dim=-1)  # no cache, no batch
            assert rollout.logprobs[row, t, 0].item() == pytest.approx(logprobs[token].item(), abs=1e-4)
            entropy = -(logprobs.exp() * logprobs).sum().item()
            assert rollout.entropy[row, t].item() == pytest.approx(entropy, abs=1e-4)
            ids.append(token)


def test_greedy_reports_the_logprobs_of_temperature_one(tokenizer):
    model = random_model()
    rollout = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=1, temperature=0)
    logprobs = torch.log_softmax(next_logits(model, rollout.prompt_ids[0].tolist()), dim=-1)
    assert rollout.logprobs[0, 0, 0].item() == pytest.approx(logprobs.max().item(), abs=1e-4)


def test_draw_frequencies_match_the_probabilities():
    torch.manual_seed(0)
    n, K = 100_000, 2
    expected = torch.softmax(torch.tensor([2.0, -1.0, 0.5, -math.inf, 1.0]), dim=-1)
    draws = draw(expected.expand(n, -1), torch.rand(n, K, dtype=torch.float64))
    for k in range(K):
        frequency = torch.bincount(draws[:, k], minlength=5) / n
        assert frequency[3] == 0, "an impossible token was drawn"
        assert torch.allclose(frequency, expected, atol=4 * 0.5 / n**0.5)  # four standard errors
    both = torch.bincount(draws[:, 0] * 5 + draws[:, 1], minlength=25).view(5, 5) / n
    assert torch.allclose(both, expected[:, None] * expected, atol=4 * 0.5 / n**0.5), "draws are not independent"


@pytest.mark.parametrize("V", [5, 9999])  # one cumulative sum; blocks
def test_draw_at_the_edges_of_the_uniform_interval(V):
    """The inverse of the distribution function must land on a token of positive probability even there."""
    probs = torch.zeros(1, V)
    probs[0, 1] = probs[0, 3] = 0.5
    uniform = torch.tensor([[0.0, 0.499999, 0.500001, 1 - 2**-24, 1 - 2**-53]], dtype=torch.float64)
    assert draw(probs, uniform).tolist() == [[1, 1, 3, 3, 3]]
    assert draw(probs.fill_(math.nan), uniform).max() < V, "a token that does not exist"


@pytest.mark.parametrize("V, K", [(100, 1), (4096, 2), (5000, 1), (5120, 3), (20_001, 2)])
def test_draws_are_those_of_one_exact_cumulative_sum(V, K):
    torch.manual_seed(0)
    probs = (3 * torch.randn(64, V)).masked_fill(torch.rand(64, V) < 0.2, -math.inf).softmax(dim=-1)
    uniform = torch.rand(64, K, dtype=torch.float64)
    cumulative = probs.double().cumsum(dim=-1)
    expected = (cumulative[:, None] <= uniform[..., None] * cumulative[:, -1:, None]).sum(dim=-1)
    draws = draw(probs, uniform)
    # A block's sum is rounded to 24 bits: a number within that of two tokens' border may fall to the other one.
    assert (draws != expected).sum() <= 1
    assert (probs.gather(1, draws) > 0).all()


DRAWS, LARGE = 2**20, 151_936


def large_distribution(name):
    """(V,) float32 probabilities. tail: two tokens share all but 1e-4, and 150,000 have 6e-10 each."""
    generator = torch.Generator().manual_seed(0)
    if name == "tail":
        probs = torch.zeros(LARGE)
        probs[1000:151_000] = 1e-4 / 150_000
        probs[7], probs[151_500] = 0.6, 0.4 - 1e-4
        return probs
    return (torch.randn(LARGE, generator=generator) * {"flat": 0.5, "peaked": 4}[name]).softmax(dim=-1)


@pytest.mark.parametrize("name", ["flat", "peaked", "tail"])
def test_a_million_draws_of_a_large_vocabulary_follow_softmax(name):
    probs = large_distribution(name)
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(2, DRAWS // 2, generator=generator, dtype=torch.float64)  # chunks: K x BLOCK numbers a row
    drawn = torch.cat([draw(probs.expand(2, -1), some).flatten() for some in uniform.split(2**13, dim=1)])
    counts, exact = torch.bincount(drawn, minlength=LARGE).double(), probs.double() / probs.double().sum()
    # Cells of at least 100 expected draws: the likeliest tokens by themselves, the others in the order of probability.
    order = exact.argsort(descending=True)
    cell = (exact[order].cumsum(0) * DRAWS / 100).floor().long().unique(return_inverse=True)[1]
    seen, expected = (torch.zeros(int(cell.max()) + 1).double().index_add(0, cell, x[order]) for x in (counts, exact))
    expected = expected * DRAWS
    seen, expected = seen[expected > 50], expected[expected > 50]
    chi2, cells = ((seen - expected) ** 2 / expected).sum().item(), len(seen)
    assert abs(chi2 - cells) < 5 * math.sqrt(2 * cells) + 5, f"chi2 {chi2:.0f} of {cells} cells"
    tail = exact < 1e-6
    mass, n = exact[tail].sum().item(), counts[tail].sum().item()
    assert abs(n - mass * DRAWS) < 5 * math.sqrt(mass * DRAWS) + 1
    assert counts[exact == 0].sum() == 0


def test_each_rare_token_of_a_large_vocabulary_has_its_share():
    """2^20 draws within the tail alone, from tokens of 7e-10 each: with fp32 sums, 1 of 90 of them is ever drawn."""
    probs = large_distribution("tail")
    generator = torch.Generator().manual_seed(2)
    uniform = 0.6 + 1e-4 * (0.05 + 0.9 * torch.rand(1, DRAWS, generator=generator, dtype=torch.float64))
    drawn = torch.cat([draw(probs[None], some).flatten() for some in uniform.split(2**13, dim=1)])
    # The tail is at 1,000 to 151,000; 5 % are left out at its ends, and a bit more, as a block's sum is rounded.
    counts = torch.bincount(drawn, minlength=LARGE)[9000:143_000].double()
    expected, cells = DRAWS / (0.9 * 150_000), len(counts)
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - cells) < 5 * math.sqrt(2 * cells), f"chi2 {chi2:.0f} of {cells} tokens"


def test_temperature_towards_zero_is_greedy(tokenizer):
    model = random_model()
    cold = generate(model, tokenizer, PROMPTS, max_new_tokens=20, temperature=1e-4, seed=0)
    assert torch.equal(cold.draws, generate(model, tokenizer, PROMPTS, max_new_tokens=20, temperature=0).draws)


# ---------------------------------------------------------------- rows, ends, seeds


def test_a_row_alone_equals_the_row_in_company(model, tokenizer):
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=30, temperature=0)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, tokenizer, [prompt], max_new_tokens=30, temperature=0)
        assert torch.equal(completion(alone, 0), completion(together, row))
        n = len(completion(alone, 0))
        assert torch.allclose(alone.logprobs[0], together.logprobs[row, :n], atol=1e-4)


def test_sampled_rows_do_not_depend_on_the_rows_after_them(tokenizer):
    model = random_model()
    few = generate(model, tokenizer, PROMPTS[:2], group_size=3, max_new_tokens=30, seed=5)
    more = generate(model, tokenizer, PROMPTS, group_size=3, max_new_tokens=30, seed=5)
    for row in range(6):
        assert torch.equal(completion(few, row), completion(more, row))


def test_a_part_of_a_batch_has_the_rows_of_the_whole(tokenizer):
    model, prompts = random_model(), (PROMPTS * 2)[:4]
    options = dict(group_size=2, max_new_tokens=15, seed=0)
    whole = generate(model, tokenizer, prompts, **options)
    part = generate(model, tokenizer, [prompts[i] for i in (3, 1)], prompt_indices=[3, 1], **options)
    assert part.texts == [whole.texts[row] for row in (6, 7, 2, 3)]


def test_same_seed_same_rows_other_seed_others_and_a_group_differs_within(tokenizer):
    model = random_model()
    a, b, c = (generate(model, tokenizer, PROMPTS, group_size=4, max_new_tokens=20, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.draws, b.draws) and torch.equal(a.logprobs, b.logprobs)
    assert a.draws.shape != c.draws.shape or not torch.equal(a.draws, c.draws)
    assert len({tuple(completion(a, row).tolist()) for row in range(4)}) > 1
    torch.manual_seed(0)
    x = generate(model, tokenizer, PROMPTS, max_new_tokens=20)
    y = generate(model, tokenizer, PROMPTS, max_new_tokens=20)
    assert x.texts != y.texts, "without a seed every call differs"


def test_groups_stand_side_by_side(tokenizer):
    rollout = generate(random_model(), tokenizer, PROMPTS, group_size=3, max_new_tokens=2, seed=0)
    expected = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS for _ in range(3)]
    assert [ids.tolist() for ids in rollout.prompt_ids] == expected


@pytest.mark.parametrize("stop", STOP_IDS[:3])
def test_the_stop_token_counts_and_nothing_after_it(tokenizer, stop):
    """For each of several stop ids, pad among them: a mask made by comparing with pad would drop the end token."""
    model = random_model(pad_token_id=stop, eos_token_id=STOP_IDS)
    rollout = generate(model, tokenizer, PROMPTS, group_size=32, max_new_tokens=40, seed=0)
    ended_with_it = 0
    for row, finish in enumerate(rollout.finish):
        ids, mask = rollout.trace_ids[row].tolist(), rollout.completion_mask[row].tolist()
        first = next((t for t, token in enumerate(ids) if token in STOP_IDS), None)
        assert finish == ("length" if first is None else "stop")
        n = len(ids) if first is None else first + 1
        assert mask == [True] * n + [False] * (len(ids) - n)
        assert rollout.draw_mask[row, :, 0].tolist() == mask
        assert rollout.weights[row, :, 0].tolist() == [float(m) for m in mask]
        ended_with_it += first is not None and ids[first] == stop
    assert ended_with_it > 0


def test_length_limit(tokenizer):
    rollout = generate(random_model(eos_token_id=None), tokenizer, PROMPTS, max_new_tokens=7, stop_ids=[], seed=0)
    assert rollout.finish == ["length"] * 4
    assert rollout.lengths.tolist() == [7] * 4 and rollout.draws.shape == (4, 7, 1)


def test_texts_are_the_sampled_ids_decoded_without_the_stop_token(tokenizer):
    rollout = generate(random_model(), tokenizer, PROMPTS, group_size=4, max_new_tokens=20, seed=0)
    for row, text in enumerate(rollout.texts):
        ids = completion(rollout, row).tolist()
        assert text == tokenizer.decode(ids[:-1] if rollout.finish[row] == "stop" else ids, skip_special_tokens=True)


def test_stop_ids_are_the_union_of_all_places_that_name_one(tokenizer):
    model = random_model(eos_token_id=[7, 9])
    model.generation_config.eos_token_id = 11
    assert llms.stop_ids(model, tokenizer) == sorted({7, 9, 11, tokenizer.eos_token_id})


def test_dropping_rows_moves_the_last_live_ones_into_the_gaps():
    """A query of zeros looks at all keys alike, so attention returns the mean of the values a row can see."""
    prompts = Packed([torch.tensor([5, 6]), torch.tensor([7])], [1, 1], torch.device("cpu"))
    cache = DenseKVCache(prompts, group_size=3, max_new_tokens=2)
    values = torch.tensor([1.0, 2.0, 30.0]).view(1, 1, 3, 1)  # the second prompt has one token
    zeros = torch.zeros(1, 1, 3, 1)
    cache.attend(0, zeros, zeros, values, 1.0)
    rows = cache.compact(torch.arange(6), torch.tensor([False, True, True, False, True, True]))
    assert rows.tolist() == [4, 1, 2, 5], "rows 0 and 3 left; of the last two, row 4 took a place and row 5 stays"
    rows = cache.compact(rows, torch.tensor([True, False, True, True]))
    assert rows.tolist() == [4, 5, 2]
    cache.prepare_decode(rows, None, None)
    zeros = torch.zeros(3, 1, 1, 1)
    seen = cache.attend(0, zeros, zeros, torch.tensor([300.0, 500.0, 6.0]).view(3, 1, 1, 1), 1.0)
    assert torch.allclose(seen.flatten(), torch.tensor([(30 + 300) / 2, (30 + 500) / 2, (1 + 2 + 6) / 3]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompts=[]), "at least one token"),
        (dict(prompts=["a", ""]), "at least one token"),
        (dict(temperature=-0.1), "-0.1"),
        (dict(group_size=0), "group_size"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=256), "256 positions"),
    ],
)
def test_bad_arguments(tokenizer, arguments, message):
    arguments = dict(prompts=["abc"], max_new_tokens=4) | arguments
    with pytest.raises(ValueError, match=message):
        generate(random_model(), tokenizer, **arguments)


# ---------------------------------------------------------------- a tag that ends a row


@pytest.mark.parametrize("family", ["tiny", "qwen2.5"])
def test_tag_matcher_against_the_text_itself(family, request, tokenizer):
    """Random pieces of tags, tokenised together or one by one: the state is what the text so far ends in."""
    tokenizer = tokenizer if family == "tiny" else request.getfixturevalue("qwen")
    tags = ["</answer>", "</reasoning>", "<answer>"]
    rng = random.Random(0)
    fragments = [tag[i:j] for tag in tags for i in range(len(tag)) for j in range(i + 1, len(tag) + 1)]
    fragments += tags * 20 + [" ", "\n", "18", ".", "é", "😀", ">\n", "<<", " <"] * 5
    for tag in tags:
        matcher = TagMatcher(tokenizer, len(tokenizer) + 7, tag, torch.device("cpu"))
        completed = 0
        for _ in range(60):
            text = "".join(rng.choice(fragments) for _ in range(12))
            pieces = [text] if rng.random() < 0.5 else list(text)
            ids = [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]
            so_far, state = "", torch.zeros(1, dtype=torch.long)
            for token in ids:
                state = matcher.step(torch.tensor([token]), state)
                so_far += tokenizer.decode([token])
                found = tag in so_far
                expected = len(tag) if found else max(n for n in range(len(tag)) if so_far.endswith(tag[:n]))
                assert state.item() == expected, (so_far, tag)
                completed, so_far = completed + found, "" if found else so_far
        assert completed > 20
        assert matcher.step(torch.tensor([len(tokenizer) + 3]), torch.tensor([4])).item() == 4, "an id without text"


def test_a_row_ends_with_the_stop_tag_and_keeps_it():
    """The embedded model closes its answer, then ends; cut at the tag, everything before is the same."""
    model, tokenizer = llms.load("tiny", "cpu")
    prompts = [build_prompt(tokenizer, p.question) for p in load_problems("arithmetic", "test", 8)]
    options = dict(group_size=8, max_new_tokens=72, seed=3)
    plain, cut = (generate(model, tokenizer, prompts, stop_tag=tag, **options) for tag in (None, "</answer>"))
    with_tag = 0
    for row, (a, b) in enumerate(zip(plain.texts, cut.texts, strict=True)):
        head, tag, _ = a.partition("</answer>")
        assert b == head + tag
        n = int(cut.lengths[row])
        assert torch.equal(plain.draws[row, :n], cut.draws[row, :n])
        assert cut.finish[row] == ("stop" if tag else plain.finish[row])
        with_tag += bool(tag)
    assert 10 < with_tag < 64
    gap = (llms.completion_logprobs(model, cut) - cut.logprobs).abs().max()
    assert gap < 1e-4


# ---------------------------------------------------------------- running out of memory


def test_out_of_memory_samples_the_same_rows_with_fewer_prompts_at_a_time(tokenizer, monkeypatch, capsys):
    model, whole = random_model(), Decoder.decode_step
    options = dict(group_size=2, max_new_tokens=20, seed=0)
    expected = generate(model, tokenizer, PROMPTS, **options)
    monkeypatch.setattr(rollout_module, "_prompt_limits", weakref.WeakKeyDictionary())

    def short_of_memory(self, rows, t):
        if t == 3 and self.max_rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        whole(self, rows, t)

    monkeypatch.setattr(Decoder, "decode_step", short_of_memory)
    for calls in (2, 0):  # a later call knows the limit
        rollout = generate(model, tokenizer, PROMPTS, **options)
        for field in dataclasses.fields(expected):
            one, other = getattr(expected, field.name), getattr(rollout, field.name)
            if field.name == "prompt_ids":
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            elif torch.is_tensor(one):
                assert torch.allclose(one.float(), other.float(), atol=1e-5), field.name
            else:
                assert one == other
        assert capsys.readouterr().err.count("prompts at a time") == calls
    with pytest.raises(torch.OutOfMemoryError):  # a group is never divided
        generate(model, tokenizer, PROMPTS, **{**options, "group_size": 4})
    with pytest.raises(RuntimeError, match="another error"):
        monkeypatch.setattr(Decoder, "decode_step", lambda *_: (_ for _ in ()).throw(RuntimeError("another error")))
        generate(model, tokenizer, PROMPTS, **options)
