"""analysis/measures.py against hand-computed values and slow loops; analysis/tokens.py: tokens as bytes and as text."""

import math
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import ROOT
from transformers import AutoTokenizer

from analysis import measures, tokens

# ---------------------------------------------------------------- measures


def test_uniform():
    logp = torch.full((1000,), 1 / 1000).log()
    assert measures.entropy(logp).item() == pytest.approx(math.log(1000), rel=1e-5)
    assert measures.varentropy(logp).item() == pytest.approx(0, abs=1e-6)
    assert measures.collision(logp).item() == pytest.approx(1 / 1000, rel=1e-5)
    assert measures.nucleus_size(logp).item() in (950, 951)  # rounding of the sum decides
    assert measures.margin(logp).item() == 0
    assert measures.rank(logp, torch.tensor(7)).item() == 1, "equals share a rank"


def test_one_hot():
    logp = torch.full((1000,), -torch.inf)
    logp[0] = 0.0
    functions = (measures.entropy, measures.varentropy, measures.collision, measures.nucleus_size, measures.margin)
    assert [function(logp).item() for function in functions] == [0, 0, 1, 1, 1]
    assert measures.rank(logp, torch.tensor(0)).item() == 1 and measures.rank(logp, torch.tensor(5)).item() == 2
    assert measures.top_mass(logp, 1).item() == 1
    assert measures.argmax_probs(logp).tolist() == [1.0] * len(measures.TEMPERATURES)


def test_by_hand():
    """p = 1/2, 1/4, 1/8, 1/8 has surprisals of 1, 2, 3, 3 bits, mean 1.75, variance 0.6875."""
    logp = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert measures.entropy(logp).item() == pytest.approx(1.75 * math.log(2), rel=1e-6)
    assert measures.varentropy(logp).item() == pytest.approx(0.6875 * math.log(2) ** 2, rel=1e-5)
    assert measures.collision(logp).item() == pytest.approx(0.34375)
    assert measures.margin(logp).item() == pytest.approx(0.25)
    assert measures.top_mass(logp, 2).item() == pytest.approx(0.75)
    assert [measures.nucleus_size(logp, mass).item() for mass in (0.4, 0.7, 0.8, 0.95)] == [1, 2, 3, 4]
    assert measures.rank(logp.expand(4, 4), torch.arange(4)).tolist() == [1, 2, 3, 3]
    uniform = torch.full((4,), 0.25).log()
    assert measures.kl(logp, uniform).item() == pytest.approx(0.25 * math.log(2), rel=1e-5)  # 2 bits - 1.75 bits
    assert measures.kl(uniform, logp).item() == pytest.approx(0.25 * math.log(2), rel=1e-5)  # (-1 + 0 + 1 + 1) / 4 bits
    # At T = 1/2 probabilities are squared: 1/4 of 1/4 + 1/16 + 1/64 + 1/64 = 22/64.
    assert measures.argmax_probs(logp, [0.5]).item() == pytest.approx(16 / 22, rel=1e-5)


def test_divergences_of_disjoint_and_equal_distributions():
    left, right = torch.tensor([0.5, 0.5, 0, 0]).log(), torch.tensor([0, 0, 0.5, 0.5]).log()
    assert measures.kl(left, left).item() == 0 and measures.kl(left, right).item() == math.inf
    assert measures.jsd(left, left).item() == pytest.approx(0, abs=1e-7)
    assert measures.jsd(left, right).item() == pytest.approx(math.log(2))


def test_kl_has_the_gradient_of_its_formula():
    """d KL / d ln p = p (ln p - ln q + 1), d KL / d ln q = -p; also where p is so small that it rounds to 0."""
    logp = torch.tensor([[0.0, -200.0], [math.log(0.3), math.log(0.7)]], requires_grad=True)
    logq = torch.tensor([[-2.0, -0.1], [math.log(0.6), math.log(0.4)]], requires_grad=True)
    measures.kl(logp, logq).sum().backward()
    p = logp.detach().exp()
    torch.testing.assert_close(logp.grad, p * (logp - logq + 1).detach())
    torch.testing.assert_close(logq.grad, -p)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=40), st.integers(0, 39), st.integers(1, 50))
def test_measures_equal_slow_loops(logits, token, k):
    token %= len(logits)
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    p = sorted((w / sum(weights) for w in weights), reverse=True)
    H = -sum(x * math.log(x) for x in p)
    logp = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=-1)
    ordered = logp.sort(descending=True).values
    assert measures.entropy(logp).item() == pytest.approx(H, abs=1e-9)
    assert measures.varentropy(logp).item() == pytest.approx(sum(x * (math.log(x) + H) ** 2 for x in p), abs=1e-9)
    assert measures.collision(logp).item() == pytest.approx(sum(x * x for x in p))
    assert measures.top_mass(ordered, k).item() == pytest.approx(sum(p[:k]))
    assert measures.margin(ordered).item() == pytest.approx(p[0] - p[1], abs=1e-12)
    assert measures.rank(logp, torch.tensor(token)).item() == 1 + sum(x > logp[token] for x in logp)
    n = measures.nucleus_size(ordered).item()
    assert sum(p[:n]) >= 0.95 - 1e-9 and sum(p[: n - 1]) < 0.95 + 1e-9
    other = logp.flip(0)
    kl = sum(a.exp().item() * (a - b).item() for a, b in zip(logp, other, strict=True))
    assert measures.kl(logp, other).item() == pytest.approx(kl, abs=1e-9)
    assert measures.jsd(logp, other).item() == pytest.approx(measures.jsd(other, logp).item(), abs=1e-12)
    assert -1e-12 <= measures.jsd(logp, other).item() <= math.log(2) + 1e-12


def test_forks_are_the_highest_fifth():
    values = np.random.default_rng(0).random(50)
    assert np.flatnonzero(measures.fork_mask(values)).tolist() == sorted(np.argsort(values)[-10:].tolist())


def test_path_share_equals_counting():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2, (9, 6), generator=generator)
    length = torch.tensor([5, 6, 2, 3, 6, 4, 5, 1, 6])
    mask = torch.arange(6) < length[:, None]
    paths = [row[:n].tolist() for row, n in zip(ids, length.tolist(), strict=True)]
    expected = [sum(path[: t + 1] == paths[0][: t + 1] for path in paths[1:]) / 8 for t in range(5)]
    assert measures.path_share(ids, mask).tolist() == pytest.approx(expected) and expected[0] > expected[3]
    assert measures.path_share(ids[:1], mask[:1]).isnan().all(), "nothing is known without resamples"


def test_majority_share_counts_rows_without_an_answer():
    assert measures.majority_share(["4", None, "4", "5", None, None]) == pytest.approx(2 / 6)
    assert measures.majority_share([None, None]) == 0 and measures.majority_share([]) is None


def test_effective_draws():
    draws = np.array([[3, 4, 5], [3, 3, 5], [3, 3, 3], [3, 0, 0]])
    weights = np.array([[1 / 3] * 3, [1 / 3] * 3, [1 / 3] * 3, [1, 0, 0]])
    two_thirds = math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert measures.effective_draws(draws, weights).tolist() == pytest.approx([3, two_thirds, 1, 1])


# ---------------------------------------------------------------- tokens as bytes


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30))
def test_bytes_of_tokens_join_to_the_text(text):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")
    text = unicodedata.normalize("NFC", text)  # as the tokenizer does
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelling = tokens.token_bytes(tokenizer, ids)
    assert b"".join(spelling[token] for token in ids) == text.encode()


def test_labels_of_unused_special_and_partial_tokens(tokenizer):
    partial = tokenizer("😀", add_special_tokens=False)["input_ids"][0]
    stop = tokenizer.eos_token_id
    spelling = tokens.token_bytes(tokenizer, [partial, stop, 512, 100_000])
    labels = [tokens.token_text(token, piece) for token, piece in spelling.items()]
    assert labels == ["\\xf0", tokenizer.eos_token, "<unused 512>", "<unused 100000>"]


def test_sentencepiece_tokens():
    class Pieces:
        added_tokens_decoder = {0: "<s>"}

        def convert_ids_to_tokens(self, token):
            return ["<s>", "<0x0A>", "\u2581egg"][token]

    assert tokens.token_bytes(Pieces(), [0, 1, 2]) == {0: b"<s>", 1: b"\n", 2: b" egg"}
