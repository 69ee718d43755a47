"""Soft thinking, rule by rule: weights, the record of a rollout, when a row is soft, the forced exit, refusals; and the
script that shows it all (test_soft_thinking.py in the repo's root has the twelve things that must hold)."""

import collections
import math
import unittest

import pytest
import torch
from random_models import STOP_IDS, random_model

import test_soft_thinking as script
from soft_thinking import CLOSED, SoftThinking, heaviest_draw, mixture_weights
from test_soft_thinking import (
    ANSWER,
    CLOSE,
    OPEN,
    direct,
    fed,
    forced,
    largest_gap,
    qwen_tokenizer,
    random_rollout,
    tiny_tokenizer,
)

# ---------------------------------------------------------------- details: weights and the readable token


@pytest.mark.parametrize("K", [1, 2, 3, 5])
@pytest.mark.parametrize("weighting, temperature", [("count", 1.0), ("prob", 1.0), ("prob", 0.3), ("prob", 4.0)])
def test_weights_and_readable_token_against_a_loop(K, weighting, temperature):
    """Duplicates add up, so with "count" the readable token is the majority's; among equals it is the likeliest."""
    generator = torch.Generator().manual_seed(K)
    table = torch.log_softmax(5 * torch.randn(500, 6, generator=generator), dim=-1)  # from certain to hopeless
    draws = torch.randint(6, (500, K), generator=generator)  # with many duplicates
    logprobs, is_soft = table.gather(1, draws), torch.arange(500) % 3 > 0
    weights = mixture_weights(logprobs, is_soft, SoftThinking(k=K, weighting=weighting, temperature=temperature))
    readable = heaviest_draw(draws, weights, logprobs).tolist()
    for row, soft in enumerate(is_soft.tolist()):
        raw = [1.0 if weighting == "count" else math.exp(lp / temperature) for lp in logprobs[row].tolist()]
        expected = [w / sum(raw) for w in raw] if soft else [1.0] + [0.0] * (K - 1)
        assert weights[row].tolist() == pytest.approx(expected, abs=1e-5)
        total = collections.Counter()
        for draw, weight in zip(draws[row].tolist(), expected, strict=True):
            total[draw] += weight
        best = [draw for draw, weight in total.items() if weight > max(total.values()) - 1e-6]
        assert readable[row] == max(best, key=table[row].__getitem__), (total, table[row])


# ---------------------------------------------------------------- details: what a rollout records


ROLLOUTS = {
    "count": SoftThinking(k=2, start="immediately"),
    "prob, reserve": SoftThinking(k=3, weighting="prob", start="immediately", answer_reserve=10),
    "cold stop": SoftThinking(k=2, start="immediately", cold_stop_entropy=99.0, cold_stop_steps=5),
    "topk": SoftThinking(k=4, sampling="topk", weighting="prob", start="immediately"),
    "gumbel, reserve": SoftThinking(k=3, sampling="gumbel", start="immediately", answer_reserve=10),
    "tag never written": SoftThinking(k=2),
    "one draw, reserve": SoftThinking(k=1, answer_reserve=10),
}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("soft", ROLLOUTS.values(), ids=ROLLOUTS)
def test_the_record_is_consistent(family, soft):
    model = random_model(family)
    r = random_rollout(model, soft, group_size=8)
    live, first = r.completion_mask, torch.arange(soft.k) == 0
    assert r.is_soft.any() == (soft.start == "immediately") and not (r.is_soft & ~live).any()
    assert forced(r).any() == bool(soft.answer_reserve or soft.cold_stop_entropy)

    assert r.draw_mask[r.is_soft].all(), "every draw of a soft position is real"
    assert (r.draw_mask[live & ~r.is_soft & ~forced(r)] == first).all(), "a hard position has one"
    assert torch.allclose(r.weights.sum(dim=-1), live.float()) and (r.weights[live & ~r.is_soft] == first).all()
    if soft.weighting == "count" and soft.sampling != "gumbel":
        assert (r.weights[r.is_soft] == 1 / soft.k).all()
    assert (r.draws == r.trace_ids[..., None])[live].any(dim=-1).all(), "the readable token is one of the draws"

    assert (r.logprobs <= 0).all() and (r.logprobs[~fed(r)] == 0).all()
    assert (r.entropy >= 0).all() and r.entropy.max() <= math.log(model.config.vocab_size)
    assert (r.entropy[live] > 0).all() and (r.entropy[~live] == 0).all()
    assert torch.equal(r.lengths, live.sum(dim=1)) and r.lengths.max() <= 24
    for row, n in enumerate(r.lengths.tolist()):
        assert live[row].tolist() == [True] * n + [False] * (live.shape[1] - n)
        stopped = [t for t, token in enumerate(r.trace_ids[row, :n].tolist()) if token in STOP_IDS]
        assert stopped == ([n - 1] if r.finish[row] == "stop" else []) and (stopped or n == 24)
    assert largest_gap(model, r) < 1e-4


def test_a_stop_id_ends_the_row_as_readable_token_alone():
    stops = list(range(3, 512, 5))
    soft = SoftThinking(k=3, start="immediately")
    rollout = random_rollout(random_model(), soft, group_size=32, stop_ids=stops)
    is_stop = torch.isin(rollout.draws, torch.tensor(stops)) & rollout.draw_mask  # (B, T, K)
    readable = torch.isin(rollout.trace_ids, torch.tensor(stops))
    beside = (rollout.is_soft & is_stop.any(dim=-1) & ~readable)[:, :-1]  # a stop id among the draws, another was read
    assert beside.sum() > 20 and rollout.draw_mask[:, 1:, 0][beside].all(), "such a row goes on"
    stopped = [readable[row, n - 1].item() for row, n in enumerate(rollout.lengths.tolist())]
    assert [finish == "stop" for finish in rollout.finish] == stopped and rollout.is_soft[readable].any()
    assert readable[rollout.completion_mask].sum() == sum(stopped), "a row went on after its stop token"


# ---------------------------------------------------------------- details: when a row is soft


def encode(tokenizer, *pieces):
    """(ids, number of tokens of each piece)"""
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    return sum(ids, []), [len(i) for i in ids]


@pytest.fixture(params=[tiny_tokenizer, qwen_tokenizer], ids=["tiny", "qwen2.5"])
def tokenizer(request):
    return request.param()


@pytest.mark.parametrize(
    "start, prompt, soft_before_the_tag",
    [
        ("tag", "Write <reasoning> first.\nAssistant:", False),  # in the prompt, but not at its end
        ("tag", "Assistant: <reasoning>\n", True),  # prefilled
        ("immediately", "Assistant:", True),
    ],
)
def test_start(tokenizer, start, prompt, soft_before_the_tag):
    ids, (before, tag, after) = encode(tokenizer, "So 1", OPEN, " 2 + 2 = 4")
    soft, _, _ = direct(tokenizer, ids, SoftThinking(start=start), prompt=prompt)
    assert soft == [soft_before_the_tag] * (before + tag) + [True] * after


def test_the_answer_tag_closes_too_and_reasoning_never_reopens(tokenizer):
    for end in (CLOSE, ANSWER):
        ids, (before, tag, after) = encode(tokenizer, "4", end, f" {OPEN} 2 + 2")
        soft, _, phase = direct(tokenizer, ids)
        assert phase == CLOSED and soft[0] and not any(soft[before + tag :])


def test_tags_of_another_name(tokenizer):
    ids, (first, second) = encode(tokenizer, "<think> 4 </reasoning> so", " </think> so")
    soft, _, phase = direct(tokenizer, ids, SoftThinking(tags="think"))
    assert soft[first - 1] and not soft[-1] and phase == CLOSED


def test_hard_for_one_step(tokenizer):
    """The tag may begin, or the row may stop, but the draw is another: soft thinking resumes."""
    (tag, stop, word), _ = encode(tokenizer, "</", "7", "5")
    for likeliest in (tag, stop):
        soft, _, _ = direct(tokenizer, [word] * 3, likeliest=[word, likeliest, word], stop_ids=[stop])
        assert soft == [True, False, True]


# ---------------------------------------------------------------- details: the forced exit


@pytest.mark.parametrize("begun", range(len(CLOSE)))
@pytest.mark.parametrize("k", [1, 2])
def test_a_half_written_tag_is_completed(tokenizer, begun, k):
    reserve = 20
    ids, (written, spare) = encode(tokenizer, "is 4" + CLOSE[:begun], "5" * reserve)
    settings = SoftThinking(k=k, start="immediately", answer_reserve=reserve)
    soft, force, phase = direct(tokenizer, ids, settings, budget=written + reserve)
    closing = [token for token in force if token >= 0]
    assert tokenizer.decode(ids[:written] + closing) == f"is 4{CLOSE}\n{ANSWER}" and phase == CLOSED
    assert force == [-1] * written + closing + [-1] * (spare - len(closing)), "all at once, and only then"
    assert not any(soft[written:]) and (k == 1 or soft[0])


def test_a_closed_row_is_left_alone(tokenizer):
    ids, _ = encode(tokenizer, f"is 4{CLOSE} and so on, and so on")
    settings = SoftThinking(answer_reserve=3, start="immediately")
    assert set(direct(tokenizer, ids, settings, budget=len(ids))[1]) == {-1}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("reserve", [1, 3, 12, 23])
def test_rows_that_never_end_get_an_answer_within_the_budget(k, reserve):
    soft = SoftThinking(k=k, start="immediately", answer_reserve=reserve)
    rollout = random_rollout(random_model(), soft, stop_ids=[])
    assert rollout.lengths.tolist() == [24] * 16 and rollout.finish == ["length"] * 16
    for row, is_forced in enumerate(forced(rollout).tolist()):
        assert is_forced.index(True) == 24 - reserve and not any(rollout.is_soft[row, 24 - reserve :])
        assert sum(is_forced) == reserve or f"{CLOSE}\n{ANSWER}" in rollout.texts[row]
        assert not rollout.draw_mask[row][is_forced].any()


@pytest.mark.parametrize(
    "written, entropy, forced_from",
    [
        ("5555", [0.4, 0.4, 0.4, 0.4], 2),  # the third step in a row under the threshold is the forced one
        ("5555", [0.4, 0.4, 0.5, 0.4], None),  # at the threshold is not under it
        ("55x555", [0.4] * 6, 5),  # x: a hard step, where the tag may begin, starts anew
    ],
)
def test_cold_stop(tokenizer, written, entropy, forced_from):
    (five, tag), _ = encode(tokenizer, "5", "</")
    settings = SoftThinking(start="immediately", cold_stop_entropy=0.5, cold_stop_steps=3)
    ids = [tag if letter == "x" else five for letter in written]
    force = direct(tokenizer, ids, settings, entropy=entropy)[1]
    assert next((step for step, token in enumerate(force) if token >= 0), None) == forced_from


# ---------------------------------------------------------------- details: settings that cannot be


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(k=0), "soft_thinking_k 0"),
        (dict(temperature=-0.5), "soft_thinking_temperature -0.5"),
        (dict(temperature=math.nan), "soft_thinking_temperature nan"),
        (dict(temperature=math.inf), "soft_thinking_temperature inf"),
        (dict(sampling="nucleus"), "soft_thinking_sampling 'nucleus': choose from sample, gumbel, topk"),
        (dict(weighting="equal"), "soft_thinking_weighting 'equal': choose from count, prob"),
        (dict(start="later"), "soft_thinking_start 'later': choose from tag, immediately"),
        (dict(answer_reserve=-1), "answer_reserve -1"),
        (dict(answer_reserve=24), "answer_reserve 24: .* 24 tokens"),
        (dict(k=513), "soft_thinking_k 513: .* 512 tokens"),
        (dict(cold_stop_entropy=-0.1), "cold_stop_entropy -0.1"),
        (dict(cold_stop_steps=0), "cold_stop_steps 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        random_rollout(random_model(), SoftThinking(**settings))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- details: the script


def test_the_script_counts_failures_and_crashes(monkeypatch, capsys):
    def stub(title, *errors):
        def check(_subject):
            for error in errors:
                raise error
            return "0.0"

        check.__doc__ = title
        return check

    good, skipped = stub("Good"), stub("Absent", unittest.SkipTest("no file"))
    bad, ugly = stub("Bad", AssertionError("1.0 is too much")), stub("Ugly", KeyError("x"))
    for checks, code in (([good, skipped], 0), ([good, bad, ugly], 1)):
        monkeypatch.setattr(script, "CHECKS", checks)
        assert script.main([]) == code
    out = capsys.readouterr().out
    for line in ("PASS  1  Good", "SKIP  2  Absent", "FAIL  2  Bad", "1.0 is too much", "FAIL  3  Ugly", "KeyError"):
        assert line in out


def test_the_script_with_a_bad_model_name(capsys):
    assert script.main(["--model_name", "./nowhere"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "./nowhere" in err
