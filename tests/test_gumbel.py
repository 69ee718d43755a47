"""Gumbel noise (engine/sampling.py): its draws against noise on every token, its density against an integral, the
gradient of the head, and rollouts."""

import math

import naive_gumbel
import pytest
import torch
from random_models import PROMPTS, random_model

import llms
from engine import head
from engine.sampling import MIN_MASS, draw, gumbel_draw, gumbel_logprobs
from engine.sampling_params import SamplingParams
from rollout import Decoder, generate
from soft_thinking import SoftThinking
from test_soft_thinking import random_rollout, tiny_tokenizer


def some_logprobs(n: int, V: int, sharpness=2.0, seed=0) -> torch.Tensor:
    logits = sharpness * torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return logits.log_softmax(dim=-1)


def rest(logprobs, draws):
    return logprobs.scatter(-1, draws, -torch.inf).logsumexp(dim=-1)


# ---------------------------------------------------------------- draws


def test_draws_and_gaps_have_the_distribution_of_noise_on_every_token():
    """Ordered triples of five tokens (60), and quantiles of the gaps; 200,000 samples each."""
    n, V, K = 200_000, 5, 3
    logprobs, generator = some_logprobs(1, V).expand(n, V), torch.Generator().manual_seed(1)
    uniform = torch.rand(n, 2 * K - 1, generator=generator)
    mine = gumbel_draw(logprobs.exp().float(), uniform)[:2]
    naive = naive_gumbel.noisy_draws(logprobs, K, generator)
    powers = torch.tensor([V * V, V, 1])
    mine_counts, naive_counts = ((draws * powers).sum(dim=1).bincount(minlength=V**3) for draws, _ in (mine, naive))
    assert (mine[0].sort(dim=1).values.diff(dim=1) > 0).all(), "no token is drawn twice"
    # The difference of two counts is normal with the variance of their sum.
    assert ((mine_counts - naive_counts).abs() <= 5 * (mine_counts + naive_counts + 1).sqrt()).all()
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.double)
    for k in (1, 2):
        below = (naive[1][:, k, None] < mine[1][:, k].double().quantile(levels)).double().mean(dim=0)
        assert (below - levels).abs().max() < 0.006, "five standard errors of a difference"
    assert (mine[1][:, 0] == 0).all() and (mine[1].diff(dim=1) >= 0).all()


def test_the_first_draw_is_the_one_without_noise_and_the_rest_is_what_is_left():
    logprobs = some_logprobs(50, 30)
    uniform = torch.rand(50, 5, generator=torch.Generator().manual_seed(2))
    draws, gaps, log_rest = gumbel_draw(logprobs.exp().float(), uniform)
    assert torch.equal(draws[:, :1], draw(logprobs.exp().float(), uniform[:, :1]))
    assert torch.allclose(log_rest.double(), rest(logprobs, draws), atol=1e-5)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_extreme_uniform_numbers_and_a_certain_token(u):
    probs = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [1 - 2e-8, 1e-8, 1e-8]])
    draws, gaps, log_rest = gumbel_draw(probs.clone(), torch.full((3, 5), u))
    assert gaps.isfinite().all() and (gaps.diff(dim=1) >= 0).all()
    assert draws[1].tolist() == [0, 0, 0] and gaps[1].tolist() == [0, 0, 0], "nothing is left: the draw is repeated"
    logprobs = gumbel_logprobs(probs.clamp(min=MIN_MASS).log().gather(1, draws), log_rest, gaps)
    assert logprobs.isfinite().all() and logprobs[1].tolist() == [0, 0, 0]


# ---------------------------------------------------------------- the density


@pytest.mark.parametrize("V, K", [(2, 2), (5, 2), (5, 3), (5, 5), (40, 4)])
def test_the_density_is_the_integral_over_the_first_arrival(V, K):
    """The change from waits to gaps has the factor e^(a_2 + ... + a_K). Gradients in the logits too."""
    logits = some_logprobs(12, V).requires_grad_()
    logprobs = logits.log_softmax(dim=-1)
    draws, gaps = naive_gumbel.noisy_draws(logprobs.detach(), K, torch.Generator().manual_seed(3))
    expected = naive_gumbel.log_density_of_gaps(logprobs, draws, gaps)
    log_rest = rest(logprobs, draws) if K < V else torch.full((12,), math.log(MIN_MASS))
    factors = gumbel_logprobs(logprobs.gather(1, draws), log_rest, gaps)  # (12, K)
    density = factors.sum(dim=1) + gaps.sum(dim=1) + math.lgamma(K)
    assert torch.allclose(density, expected, atol=1e-8)
    assert torch.allclose(factors, naive_gumbel.slow_logprobs(logprobs.detach(), draws, gaps), atol=1e-9)
    mine, brute = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (density, expected))
    assert torch.allclose(mine, brute, atol=1e-8) and brute.abs().max() > 0.1


def test_the_density_integrates_to_one():
    """Three tokens, two draws: over the ordered pairs and the gap."""
    logprobs, total = some_logprobs(1, 3), 0.0
    gap = torch.linspace(0, 40, 40_001, dtype=torch.double)[:, None]
    for pair in torch.cartesian_prod(torch.arange(3), torch.arange(3)):
        if pair[0] != pair[1]:
            at = logprobs[0, pair].expand(len(gap), 2)
            log_rest = rest(logprobs, pair[None]).expand(len(gap))
            factors = gumbel_logprobs(at, log_rest, torch.cat([gap * 0, gap], dim=1))
            total += torch.trapezoid((factors.sum(dim=1) + gap[:, 0]).exp(), gap[:, 0]).item()
    assert total == pytest.approx(1, abs=1e-6)


def test_each_factor_is_conditional_on_the_draws_before():
    """The first k factors are the density of the first k draws alone."""
    logprobs = some_logprobs(20, 9)
    draws, gaps = naive_gumbel.noisy_draws(logprobs, 4)
    factors = gumbel_logprobs(logprobs.gather(1, draws), rest(logprobs, draws), gaps)
    for k in (1, 2, 3):
        few = draws[:, :k]
        alone = gumbel_logprobs(logprobs.gather(1, few), rest(logprobs, few), gaps[:, :k])
        assert torch.allclose(factors[:, :k], alone)


def test_the_score_of_the_mass_that_is_left_is_bounded():
    """K = 2: the derivative of the second draw's factor by log R_2 is uniform on (-1, 1). With the first arrival kept
    in the density, log p - R w, it would be 1 - R w: unbounded, with three times the variance."""
    n, logprobs = 100_000, torch.tensor([[0.6, 0.25, 0.15]], dtype=torch.double).log()
    draws, gaps = naive_gumbel.noisy_draws(logprobs.expand(n, 3), 2, torch.Generator().manual_seed(0))
    draws, gaps = draws[draws[:, 0] == 0], gaps[draws[:, 0] == 0]
    logprobs = logprobs.expand(len(draws), 3)
    scale = torch.zeros(len(draws), dtype=torch.double, requires_grad=True)  # of all tokens but the first
    at = logprobs.gather(1, draws) + torch.stack([scale * 0, scale], dim=1)
    factors = gumbel_logprobs(at, rest(logprobs, draws) + scale, gaps)
    (score,) = torch.autograd.grad(factors[:, 1].sum(), scale)
    levels = torch.linspace(0.1, 0.9, 9, dtype=torch.double)
    assert (score.quantile(levels) - (2 * levels - 1)).abs().max() < 0.02 and score.abs().max() <= 1


def test_without_gaps_log_probs_are_left_as_they_are():
    logprobs = some_logprobs(20, 3).float()[:, :3]
    assert torch.equal(gumbel_logprobs(logprobs, torch.zeros(20), torch.zeros(20, 3)), logprobs)


def test_the_gradient_against_finite_differences():
    logprobs = some_logprobs(6, 8)
    draws, gaps = naive_gumbel.noisy_draws(logprobs, 3)

    def density(logits):
        logprobs = logits.log_softmax(dim=-1)
        return gumbel_logprobs(logprobs.gather(1, draws), rest(logprobs, draws), gaps)

    assert torch.autograd.gradcheck(density, logprobs.requires_grad_())


# ---------------------------------------------------------------- the head


@pytest.mark.parametrize("max_logits", [2**26, 120])
@pytest.mark.parametrize("temperature, scale, cap", [(1.0, 1.0, None), (0.7, 0.5, 3.0)])
def test_the_head_with_the_rest_against_autograd(monkeypatch, max_logits, temperature, scale, cap):
    """In one chunk and in several; rows of hard positions, whose draws are padded with 0, among them."""
    monkeypatch.setattr(head, "MAX_LOGITS", max_logits)
    generator = torch.Generator().manual_seed(0)
    N, V, H = 17, 40, 6
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((N, H), (V, H), (V,)))
    draws = torch.stack([torch.randperm(V, generator=generator)[:3] for _ in range(N)])
    draws[::4, 1:] = 0
    draws[4] = 0
    upstream = torch.randn(N, 4, generator=generator)
    mine = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    result = head.DrawLogprobs.apply(mine[0], mine[1], draws, temperature, mine[2], scale, cap, True)
    result.backward(upstream)
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = scale * (exact[0] @ exact[1].T + exact[2])
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logprobs = (logits / temperature).log_softmax(dim=-1)
    expected = torch.cat([logprobs.gather(1, draws), rest(logprobs, draws)[:, None]], dim=1)
    expected.backward(upstream.double())
    assert torch.allclose(result.double(), expected, atol=1e-5)
    for got, wanted in zip(mine, exact, strict=True):
        assert torch.allclose(got.grad.double(), wanted.grad, atol=2e-5)


@pytest.mark.parametrize("sureness", [5.0, 15.0, 25.0, 40.0])
def test_a_sure_model_keeps_its_digits(sureness):
    """1 - p_1 is 0 in float32 from sureness 17 on."""
    V, K = 30, 3
    logits = torch.randn(200, V, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = sureness
    hidden = torch.eye(V).repeat(7, 1)[:200] * 0 + logits  # (200, V): with an identity as head, the logits
    uniform = torch.rand(200, 2 * K - 1, generator=torch.Generator().manual_seed(1))
    draws, gaps, _ = gumbel_draw(logits.softmax(dim=-1), uniform)
    mine, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    at = head.DrawLogprobs.apply(mine, torch.eye(V), draws, 1.0, None, 1.0, None, True)
    density = gumbel_logprobs(at[:, :K], at[:, K], gaps)
    density.sum().backward()
    logprobs = exact.log_softmax(dim=-1)
    expected = gumbel_logprobs(logprobs.gather(1, draws), rest(logprobs, draws), gaps.double())
    expected.sum().backward()
    assert torch.allclose(density.double(), expected, atol=3e-5)
    assert torch.allclose(mine.grad.double(), exact.grad, atol=3e-5)


# ---------------------------------------------------------------- rollouts


def gumbel(**settings):
    return SoftThinking(**dict(k=3, sampling="gumbel", start="immediately") | settings)


def test_independent_draws_have_no_gaps_and_one_noisy_draw_is_normal_generation():
    model = random_model()
    normal, one = random_rollout(model, SoftThinking(k=1)), random_rollout(model, gumbel(k=1))
    assert normal.gaps is None and random_rollout(model, SoftThinking()).gaps is None
    assert torch.equal(one.draws, normal.draws) and torch.equal(one.logprobs, normal.logprobs)
    assert not one.gaps.any()


@pytest.mark.parametrize("temperature, tau", [(1.0, 1.0), (0.7, 0.3), (1.5, 0.0)])
def test_weights_and_log_probs_of_a_rollout(temperature, tau):
    """Weights against the softmax, log-probs against the slow density; the readable token is the first."""
    model = random_model()
    r = random_rollout(model, gumbel(temperature=tau, answer_reserve=8), temperature=temperature)
    soft = r.is_soft
    assert soft.any() and not r.gaps[~soft].any() and (r.gaps[soft][:, 1:] > 0).all()
    expected = torch.softmax(-r.gaps[soft] / max(tau, 1e-6), dim=-1)
    assert torch.allclose(r.weights[soft], expected) and torch.equal(r.trace_ids[soft], r.draws[soft][:, 0])
    hidden, row, position = llms.completion_hidden(model, r, torch.arange(len(r.texts)))
    logprobs = torch.log_softmax(head.head_logits(model, hidden).detach() / temperature, dim=-1)[soft[row, position]]
    slow = naive_gumbel.slow_logprobs(logprobs, r.draws[soft], r.gaps[soft])
    assert torch.allclose(r.logprobs[soft].double(), slow, atol=1e-4)
    trained = llms.completion_logprobs(model, r, temperature)
    assert torch.allclose(trained, r.logprobs, atol=1e-4)


def test_greedy_draws_have_no_noise():
    r = random_rollout(random_model(), gumbel(), temperature=0)
    greedy = random_rollout(random_model(), SoftThinking(k=1), temperature=0)
    assert r.gaps is None and torch.equal(r.trace_ids, greedy.trace_ids)


def test_prompts_of_another_process_have_the_same_rows():
    model, options = random_model(), dict(group_size=2, max_new_tokens=6, soft=gumbel(), seed=4)
    together = generate(model, tiny_tokenizer(), PROMPTS[:3], **options)
    alone = generate(model, tiny_tokenizer(), PROMPTS[2:3], prompt_indices=[2], **options)
    T = alone.draws.shape[1]
    assert torch.equal(alone.draws, together.draws[4:, :T])
    assert torch.allclose(alone.gaps, together.gaps[4:, :T], atol=1e-4)


def test_noise_takes_one_uniform_number_a_gap_and_only_then():
    for soft, temperature, numbers in ((gumbel(), 1.0, 5), (gumbel(), 0.0, 3), (SoftThinking(k=3), 1.0, 3)):
        decoder = Decoder(random_model(), tiny_tokenizer(), SamplingParams(soft, temperature, (0,), None, 4), 2, 20)
        assert decoder.uniform.shape == (2, 4, numbers)


def test_weights_of_their_own():
    with pytest.raises(ValueError, match="soft_thinking_weighting 'prob': use count with gumbel"):
        gumbel(weighting="prob")
