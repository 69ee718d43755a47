"""Soft thinking, shown and checked. As a script: one problem in normal and soft mode side by side, then a line for
each of the twelve things that must hold, with the number that was measured. Under pytest: the same checks, a test
each, and below them the details, rule by rule.

A check gets a Subject (a model with prompts) and returns what it measured, or raises AssertionError. Checks that need
exact arithmetic or few tokens take a small random model or the toy instead, and say so.

Left out on purpose: what soft thinking is worth (that takes training runs), and its speed (benchmarks/).

    python test_soft_thinking.py                                  # the embedded model; exit code 0 or 1
    python test_soft_thinking.py --model_name Qwen/Qwen2.5-0.5B
    pytest test_soft_thinking.py
"""

import argparse
import functools
import random
import sys
import unittest
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import AutoTokenizer

import llms
from grpo import LOSS_TYPES, policy_loss
from rldatasets import build_prompt, load_problems
from rollout import Rollout, generate
from soft_thinking import CLOSED, SoftThinking, SoftThinkingController, format_trace

sys.path.insert(0, str(Path(__file__).resolve().parent / "tests"))
import naive_gumbel
import real_data
import toy_gradient
from random_models import PROMPTS, ROOT, random_model

OPEN, CLOSE, ANSWER = "<reasoning>", "</reasoning>", "<answer>"
BUDGET, RESERVE = 32, 12  # tokens; short enough for some rows of the embedded model to be closed by force
SETTINGS = (
    SoftThinking(k=2, answer_reserve=RESERVE),
    SoftThinking(k=3, weighting="prob", temperature=0.5, answer_reserve=RESERVE),
    SoftThinking(k=3, sampling="gumbel", temperature=0.5, answer_reserve=RESERVE),
)


class Subject:
    """A model, and prompts of several lengths for it: half of them with the opening tag prefilled."""

    def __init__(self, model_name: str, seed: int = 0):
        self.model, self.tokenizer = llms.load(model_name)
        self.seed = seed
        questions = [problem.question for problem in load_problems("arithmetic", "test", 4)]
        self.prompts = [build_prompt(self.tokenizer, q) + OPEN * (i % 2) for i, q in enumerate(questions)]

    def rollout(self, soft: SoftThinking | None, prompts=None, **options) -> Rollout:
        options = dict(group_size=4, max_new_tokens=BUDGET, seed=self.seed) | options
        return generate(self.model, self.tokenizer, prompts or self.prompts, soft=soft, **options)


def random_rollout(model, soft: SoftThinking, **options) -> Rollout:
    """Of a random model, which never writes a tag: it needs start="immediately" to think softly."""
    options = dict(group_size=4, max_new_tokens=24, seed=0) | options
    return generate(model, tiny_tokenizer(), PROMPTS, soft=soft, **options)


@functools.cache
def tiny_tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")


@functools.cache
def qwen_tokenizer():
    folder = real_data.qwen_tokenizer()
    if folder is None:
        raise unittest.SkipTest(real_data.NO_TOKENIZER)
    return AutoTokenizer.from_pretrained(folder)


def at_most(limit: float, value: float, what: str) -> str:
    assert value <= limit, f"{what}: {value:.1e}, more than {limit:.0e}"
    return f"{what} {value:.1e} (limit {limit:.0e})"


# ---------------------------------------------------------------- slow and simple versions to compare with


@torch.no_grad()
def uncached_logprobs(model, rollout, row, temperature=1.0) -> torch.Tensor:
    """(n, V): what the model predicts at each of the row's n positions. One row, one pass, no cache; every mixture is
    added up draw by draw."""
    embed, n = model.get_input_embeddings(), int(rollout.lengths[row])
    inputs = list(embed(rollout.prompt_ids[row]))
    for draws, weights in zip(rollout.draws[row, : n - 1], rollout.weights[row, : n - 1], strict=True):
        inputs.append(sum(w.to(inputs[0].dtype) * embed(d) for d, w in zip(draws, weights, strict=True)))
    logits = model(inputs_embeds=torch.stack(inputs)[None]).logits[0, -n:]
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def largest_gap(model, rollout, temperature=1.0) -> float:
    """Between the log-probs that the rollout recorded and uncached ones, over all fed draws."""
    gaps = []
    for row, n in enumerate(rollout.lengths.tolist()):
        logprobs, draws = uncached_logprobs(model, rollout, row, temperature), rollout.draws[row, :n]
        expected = logprobs.gather(1, draws)
        if rollout.gaps is not None:
            expected = naive_gumbel.slow_logprobs(logprobs, draws, rollout.gaps[row, :n])
        gaps.append((rollout.logprobs[row, :n] - expected)[fed(rollout)[row, :n]].abs().max().item())
    return max(gaps)


def fed(rollout) -> torch.Tensor:
    """(B, T, K) bool: every draw that went into the model, forced ones among them."""
    return rollout.draw_mask | (rollout.weights > 0)


def forced(rollout) -> torch.Tensor:
    """(B, T) bool: positions whose token was nobody's action."""
    return rollout.completion_mask & ~rollout.draw_mask.any(dim=-1)


def must_be_hard(text: str, likeliest: str) -> bool:
    """The rule of the exit, for the text so far and the likeliest next piece of it."""
    begun = any((text + likeliest).endswith(CLOSE[:n]) for n in range(2, len(CLOSE)))
    return ANSWER in text or CLOSE in text + likeliest or begun


def direct(tokenizer, ids, settings=None, *, likeliest=None, entropy=None, budget=1000, prompt="", stop_ids=()):
    """Plays a row's tokens to a SoftThinkingController -> per step: whether it was soft; the id forced upon it, or -1;
    and the phase after the last. likeliest: the most probable tokens, if others than those that are written."""
    settings, stop_ids = settings or SoftThinking(start="immediately"), torch.tensor(stop_ids)
    controller = SoftThinkingController(settings, tokenizer, len(tokenizer), stop_ids, 1, budget)
    controller.reset([prompt])
    row, steps = torch.tensor([0]), []
    for step, (token, guess, nats) in enumerate(zip(ids, likeliest or ids, entropy or [1.0] * len(ids), strict=True)):
        probs = torch.nn.functional.one_hot(torch.tensor([guess]), len(tokenizer))
        soft, force = controller.decide(row, probs, torch.tensor([nats]), step)
        controller.observe(row, force if force >= 0 else torch.tensor([token]))
        steps.append((soft.item(), force.item()))
    soft, force = map(list, zip(*steps, strict=True))
    return soft, force, controller.phase[0]


def spellings(tokenizer, text: str, count: int):
    """The tokenizer's own tokens of a text, single characters, and `count` ways in between."""
    rng = random.Random(text)
    for density in [0.0, 1.0] + [rng.random() for _ in range(count)]:
        cuts = [i for i in range(1, len(text)) if rng.random() < density]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        yield [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


# ---------------------------------------------------------------- the twelve checks


def check_one_draw_is_normal_generation(subject):
    """K = 1 writes what normal generation writes, id for id; greedily, what transformers writes"""
    watched = SoftThinking(k=1, weighting="prob", start="immediately", cold_stop_entropy=99.0, cold_stop_steps=1)
    one, normal = subject.rollout(watched), subject.rollout(None)
    assert torch.equal(one.draws, normal.draws), "ids differ"
    assert torch.equal(one.logprobs, normal.logprobs), "log-probs differ"
    ids = normal.prompt_ids[0][None]
    greedy = subject.model.generate(
        ids, attention_mask=ids > -1, max_new_tokens=BUDGET, do_sample=False, repetition_penalty=1.0
    )[0, ids.numel() :]
    ours = subject.rollout(watched, subject.prompts[:1], group_size=1, temperature=0).trace_ids[0]
    assert torch.equal(ours, greedy), "greedy ids differ from transformers'"
    return f"{int(normal.lengths.sum())} sampled and {len(greedy)} greedy tokens, 0 differ"


def check_cache(subject):
    """Cached log-probs of mixtures equal an uncached pass"""
    gap = max(largest_gap(subject.model, subject.rollout(soft)) for soft in SETTINGS)
    exact = random_model().double()
    llms.fuse_norms(exact)  # transformers' own norms round to fp32
    soft = SoftThinking(k=3, weighting="prob", start="immediately", answer_reserve=9)
    exact_gap = largest_gap(exact, random_rollout(exact, soft))
    return f"{at_most(1e-4, gap, 'fp32')}, {at_most(1e-9, exact_gap, 'fp64, random model')}"


def check_training_pass(subject):
    """The training pass gives the log-probs at which the draws were made"""
    gap = 0.0
    for soft, temperature in zip(SETTINGS, (1.5, 0.7, 1.0), strict=True):
        rollout = subject.rollout(soft, temperature=temperature)
        logprobs = llms.completion_logprobs(subject.model, rollout, temperature)
        gap = max(gap, (logprobs - rollout.logprobs).abs().max().item())
    return at_most(1e-4, gap, "largest difference")


def check_gradient_of_one_draw(_subject):
    """Gradients with K = 1 equal those of plain input ids (random model, fp64)"""
    model = random_model().double()
    rollout = random_rollout(model, SoftThinking(k=1))
    advantages = torch.randn(len(rollout.texts), generator=torch.Generator().manual_seed(0))
    policy_loss(llms.completion_logprobs(model, rollout), None, advantages, rollout.draw_mask)[0].backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row, n in enumerate(rollout.lengths.tolist()):
        tokens = rollout.trace_ids[row, :n]
        logits = model(input_ids=torch.cat([rollout.prompt_ids[row], tokens])[None]).logits[0, -n - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits, tokens)  # mean over the row's tokens
        (nll * advantages[row] / len(rollout.texts)).backward()
    gap = max((ours[name] - parameter.grad).abs().max().item() for name, parameter in model.named_parameters())
    largest = max(gradient.abs().max().item() for gradient in ours.values())
    return f"{at_most(1e-6, gap, 'largest difference')}, largest gradient {largest:.1e}"


def check_one_hot(subject):
    """A one-hot mixture is the token's embedding, exactly"""
    vocab_size = subject.model.config.vocab_size
    ids = torch.arange(0, vocab_size, max(1, vocab_size // 1000), device=subject.model.device)[:, None]
    one_hot = torch.tensor([1.0, 0.0, 0.0], device=ids.device).expand(len(ids), 3)
    mixed = llms.embed_mixture(subject.model, torch.cat([ids, ids * 0, ids.flip(0)], dim=1), one_hot)
    gap = (mixed - subject.model.get_input_embeddings()(ids[:, 0])).abs().max().item()
    return at_most(0.0, gap, f"{len(ids)} tokens, largest difference")


def check_exit(subject):
    """Steps are soft where a slow reader of the text expects it, and never after the exit"""
    soft_steps = exits = after = 0
    for soft in SETTINGS:
        rollout, decode = subject.rollout(soft), subject.tokenizer.decode
        stops, is_forced = llms.stop_ids(subject.model, subject.tokenizer), forced(rollout).tolist()
        for row, n in enumerate(rollout.lengths.tolist()):
            prefilled = OPEN * (row // 4 % 2)
            texts = [prefilled + decode(rollout.trace_ids[row, :t]) for t in range(n)]  # before each step
            likeliest = uncached_logprobs(subject.model, rollout, row).argmax(dim=-1).tolist()
            expected = [
                OPEN in text and token not in stops and not must_be_hard(text, decode([token])) and not by_force
                for text, token, by_force in zip(texts, likeliest, is_forced[row], strict=False)
            ]
            assert rollout.is_soft[row, :n].tolist() == expected, f"row {row} of {soft}"
            left = [t for t in range(n) if CLOSE in texts[t] or ANSWER in texts[t]]
            assert (rollout.weights[row, left] == torch.eye(soft.k, device=rollout.weights.device)[0]).all()
            soft_steps, exits, after = soft_steps + sum(expected), exits + bool(left), after + len(left)
    assert soft_steps and exits, f"{soft_steps} soft steps, {exits} exits: nothing was tested"
    return f"{soft_steps} soft steps, {exits} exits, 0 of {after} steps after them soft"


EXITS = {  # a token that holds one end of the closing tag, and text in which Qwen2.5 uses it
    ".</": "2+2=4.</reasoning>\n<answer>4</answer>",
    " </": "is 4 </reasoning> Well",
    ">\n": "4</reasoning>\n<answer>4",
    ">\n\n": "it is 4.</reasoning>\n\nSo",
    "><": "so 4</reasoning><answer>4",
}
NO_EXITS = ("if a > b and b <c then", "a</b> is not the end", "4</reasonable> no", "</ </r </reason> a<reasoning> go")


def check_tag_spellings(_subject):
    """The exit fires however the tag is spelt, and for nothing else (the real Qwen2.5 tokenizer)"""
    tokenizer, steps = qwen_tokenizer(), 0
    for token, text in [*EXITS.items(), *((None, text) for text in NO_EXITS)]:
        pieces = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
        assert token is None or token in pieces, f"{token!r} is no token of {text!r}: {pieces}"
        for ids in spellings(tokenizer, text, 100):
            soft, _, phase = direct(tokenizer, ids)
            pieces = [tokenizer.decode([token]) for token in ids]
            expected = [not must_be_hard("".join(pieces[:t]), piece) for t, piece in enumerate(pieces)]
            assert soft == expected, f"{pieces}: {soft}"
            assert (phase == CLOSED) == (token is not None), f"{text!r} ends in phase {phase}"
            assert soft[-1] == (token is None)
            steps += len(ids)
    return f"{len(EXITS)} texts exit, {len(NO_EXITS)} do not, each in 102 spellings; {steps} steps, 0 wrong"


def check_no_gradient_where_nothing_was_chosen(subject):
    """Forced positions and what follows the end have no gradient"""
    num_forced = num_after = 0
    busy = random_rollout(
        random_model(), SoftThinking(start="immediately", answer_reserve=RESERVE)
    )  # has both for sure
    for rollout in [busy, *map(subject.rollout, SETTINGS)]:
        advantages = torch.ones(len(rollout.texts), device=rollout.draws.device)
        for loss_type in LOSS_TYPES:
            logprobs, mask = rollout.logprobs.clone().requires_grad_(), rollout.draw_mask
            policy_loss(logprobs, None, advantages, mask, loss_type=loss_type, max_length=BUDGET)[0].backward()
            assert torch.equal(logprobs.grad != 0, mask), f"{loss_type}: the gradient is not where the draws are"
        assert not rollout.draw_mask[~rollout.completion_mask].any(), "a real draw after the end"
        num_forced += int(forced(rollout).sum())
        num_after += int((~rollout.completion_mask).sum())
    assert num_forced and num_after, "nothing was tested"
    return f"{num_forced} forced positions and {num_after} after the end, gradient 0 ({len(LOSS_TYPES)} losses)"


def check_groups(subject):
    """The K likeliest tokens make a group of equal rows, independent draws do not"""

    def different_rows(sampling):
        rollout = subject.rollout(SoftThinking(k=2, sampling=sampling), group_size=8, max_new_tokens=64)
        return max(len(group.unique(dim=0)) for group in rollout.draws.flatten(1).split(8))

    topk, sample = different_rows("topk"), different_rows("sample")
    assert topk == 1 < sample, f"different rows in a group of 8: topk {topk}, sample {sample}"
    return f"different rows in a group of 8: topk {topk}, sample up to {sample}"


def check_gradient_on_a_toy(_subject):
    """The gradient with count weights is the true one, and that with Gumbel noise (toy, enumerated)"""
    cosines = torch.tensor([toy_gradient.cosines(seed) for seed in range(40)])  # (toys, estimates)
    lines = [f"{'cosine with the true gradient, 40 toys':<44} median   worst"]
    for name, measured in zip(toy_gradient.NAMES, cosines.unbind(dim=1), strict=True):
        lines.append(f"{name:<44} {measured.median():.4f} {measured.min():7.4f}")
    for name in toy_gradient.EXACT:
        worst = cosines[:, toy_gradient.NAMES.index(name)].min()
        assert worst > 0.999, f"{name}: worst cosine {worst:.4f}"
    return "\n".join(lines)


def check_batch_mates(subject):
    """A row does not depend on its batch mates, neither in the rollout nor in the training pass"""
    gap = 0.0
    for soft in SETTINGS:
        few, more = subject.rollout(soft, subject.prompts[:2]), subject.rollout(soft)
        for row, n in enumerate(few.lengths.tolist()):
            for name in ("draws", "draw_mask", "is_soft", "trace_ids", "completion_mask"):
                assert torch.equal(getattr(few, name)[row, :n], getattr(more, name)[row, :n]), f"{name}, row {row}"
            for name in ("weights", "logprobs", "entropy"):
                gap = max(gap, (getattr(few, name)[row, :n] - getattr(more, name)[row, :n]).abs().max().item())
        assert torch.equal(few.lengths, more.lengths[: len(few.lengths)])
        rows = [9, 0, 5]
        together = llms.completion_logprobs(subject.model, more)[rows]
        gap = max(gap, (llms.completion_logprobs(subject.model, more, rows=rows) - together).abs().max().item())
    return f"ids equal, {at_most(1e-4, gap, 'largest difference of a number')}"


def check_temperatures_of_zero(subject):
    """Temperature to 0 is greedy; soft temperature to 0 leaves the most probable draw"""
    greedy = subject.rollout(None, temperature=0).trace_ids
    for temperature in (0, 1e-5):
        cold = subject.rollout(SoftThinking(k=2), temperature=temperature)
        assert cold.is_soft.any() and torch.equal(cold.trace_ids, greedy), f"temperature {temperature} is not greedy"
    rollout = subject.rollout(SoftThinking(k=3, weighting="prob", temperature=0), temperature=2.0)
    draws, weights, logprobs = (x[rollout.is_soft] for x in (rollout.draws, rollout.weights, rollout.logprobs))
    likeliest = draws.gather(1, logprobs.argmax(dim=1, keepdim=True))  # (n, 1)
    lost = 1 - (weights * (draws == likeliest)).sum(dim=1)
    assert torch.equal(rollout.trace_ids[rollout.is_soft], likeliest[:, 0]), "the readable token is another one"
    mixed = int((draws != likeliest).any(dim=1).sum())
    return (
        f"{greedy.numel()} ids equal greedy; {at_most(1e-5, lost.max().item(), 'weight elsewhere')} at {mixed} mixtures"
    )


# In the order of the list of what must hold, which numbers them from 1.
CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


# ---------------------------------------------------------------- the script


def show(subject):
    """One problem in normal and in soft mode, side by side; hot, for draws of a position to differ."""
    print(subject.prompts[1], end="\n\n")
    columns = []
    for name, soft in (("normal, T = 1.5", None), ("soft, K = 2: weights and draws", SoftThinking(k=2))):
        rollout = subject.rollout(soft, subject.prompts[1:2], group_size=1, max_new_tokens=64, temperature=1.5)
        columns.append([f"  {name}", *format_trace(rollout, subject.tokenizer).splitlines()])
    for normal, soft in zip_longest(*columns, fillvalue=""):
        print(f"{normal:<36}{soft}")
    print()


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="Show soft thinking beside normal generation, and check both.")
    parser.add_argument("--model_name", default="tiny", help="hub name, local folder, or an embedded model")
    parser.add_argument("--seed", type=int, default=0, help="of all sampling")
    args = parser.parse_args(arguments)
    try:
        subject = Subject(args.model_name, args.seed)
    except ValueError as error:
        print(f"test_soft_thinking.py: {error}", file=sys.stderr)
        return 2
    show(subject)
    verdicts = []
    for number, check in enumerate(CHECKS, start=1):
        try:
            verdict, detail = "PASS", check(subject)
        except unittest.SkipTest as reason:
            verdict, detail = "SKIP", str(reason)
        except Exception as error:  # a crash is a failure too, and the other checks still have something to say
            verdict, detail = "FAIL", f"{type(error).__name__}: {error}"
        verdicts.append(verdict)
        print(f"{verdict} {number:2}  {check.__doc__}")
        for line in detail.splitlines():
            print(f"         {line}")
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("PASS", "FAIL", "SKIP"))
    print(f"\n{args.model_name}: {counts}")
    return int("FAIL" in verdicts)


# ---------------------------------------------------------------- under pytest: the checks


def pytest_generate_tests(metafunc):
    metafunc.parametrize("check", CHECKS, ids=[check.__name__.removeprefix("check_") for check in CHECKS])


@functools.cache
def embedded_subject() -> Subject:
    return Subject("tiny")


def test_check(check):
    print(check(embedded_subject()))


if __name__ == "__main__":
    sys.exit(main())
