"""The optional parts of grpo.py's objective, each against a plain loop: leave-one-out baseline, pass@k advantages,
two-sided clip, masks of rows and of tokens; and the same through update.py."""

import itertools
import math
from statistics import fmean

import pytest
import torch
from small_runs import tiny_config
from test_grpo import SHAPES, random_step

import grpo
import llms
import update as update_module
from rollout import generate
from tracking.run_config import parse_config
from update import entropy_threshold, update


def random_rewards(num_groups, group_size, seed, levels=4):
    """With ties, as weighted sums of zeros and ones have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (num_groups * group_size,), generator=generator) / 2.0


# ---------------------------------------------------------------- baselines


@pytest.mark.parametrize("G", [2, 3, 8])
def test_leave_one_out(G):
    rewards = random_rewards(5, G, seed=G)
    slow = []
    for start in range(0, 5 * G, G):
        group = rewards[start : start + G].tolist()
        slow += [r - fmean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)]
    fast = grpo.compute_advantages(rewards, G, "none", baseline="leave_one_out")
    assert torch.allclose(fast, torch.tensor(slow), atol=1e-6)


def test_leave_one_out_alone_has_nothing_to_compare_with():
    assert grpo.compute_advantages(torch.tensor([1.0]), 1, "none", baseline="leave_one_out").tolist() == [0.0]
    with pytest.raises(ValueError, match="'median': choose from mean, leave_one_out"):
        grpo.compute_advantages(torch.ones(2), 2, baseline="median")


# ---------------------------------------------------------------- pass@k


def best_of_k_slowly(group: list[float], k: int) -> list[float]:
    sets = list(itertools.combinations(range(len(group)), k))
    return [fmean(max(group[j] for j in chosen) for chosen in sets if i in chosen) for i in range(len(group))]


@pytest.mark.parametrize("G, k", [(2, 2), (5, 2), (6, 3), (6, 6), (8, 4)])
def test_best_of_k(G, k):
    for seed in range(5):
        groups = random_rewards(3, G, seed).view(3, G)
        slow = torch.tensor([best_of_k_slowly(group, k) for group in groups.tolist()])
        assert torch.allclose(grpo.best_of_k(groups, k), slow, atol=1e-6)


@pytest.mark.parametrize("right", range(7))
def test_the_papers_closed_form_for_right_and_wrong(right):
    """Chen et al.: with N answers of which N_neg are wrong, R = 1 - C(N_neg, k) / C(N, k); right ones get 1 - R, wrong
    ones 1 - R - C(N_neg - 1, k - 1) / C(N - 1, k - 1), here not divided by the deviation."""
    N, k = 6, 3
    wrong = N - right
    R = 1 - math.comb(wrong, k) / math.comb(N, k)
    of_wrong = 1 - R - math.comb(wrong - 1, k - 1) / math.comb(N - 1, k - 1) if wrong else None
    rewards = torch.tensor([1.0] * right + [0.0] * wrong)
    advantages = grpo.compute_advantages(rewards, N, "none", k=k)
    expected = [0.0] * N if right in (0, N) else [1 - R] * right + [of_wrong] * wrong
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_of_pass_at_k_on_a_bandit():
    """Without a baseline, best_of_k times k / G is an unbiased gradient of the expected best of k."""
    G, k, values = 3, 2, torch.tensor([0.0, 0.4, 1.0])
    logits = torch.tensor([0.3, 0.1, -0.5], dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(0)
    best = sum(probs[a] * probs[b] * max(values[a], values[b]) for a in range(3) for b in range(3))
    (exact,) = torch.autograd.grad(best, logits, retain_graph=True)
    estimate = torch.zeros(3, dtype=torch.float64)
    for actions in itertools.product(range(3), repeat=G):
        chance = math.prod(probs[a].item() for a in actions)
        weights = grpo.best_of_k(values[list(actions)][None], k)[0] * k / G
        score = sum(w * torch.log(probs[a]) for w, a in zip(weights, actions, strict=True))
        estimate += chance * torch.autograd.grad(score, logits, retain_graph=True)[0]
    assert torch.allclose(estimate, exact, atol=1e-9)


def test_k_of_one_changes_nothing():
    rewards = random_rewards(4, 4, seed=1)
    for scale in grpo.ADVANTAGE_SCALES:
        assert torch.equal(grpo.compute_advantages(rewards, 4, scale, k=1), grpo.compute_advantages(rewards, 4, scale))


# ---------------------------------------------------------------- two-sided clip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_two_sided_clip(shape, seed):
    logprobs, old, _, advantages, mask = random_step(shape, seed)
    old = old - 1.2 * (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3)  # large ratios
    low, high, delta = 0.1, 0.25, 1.6
    fast_logprobs, slow_logprobs = (logprobs.clone().requires_grad_() for _ in range(2))
    loss, stats = grpo.policy_loss(
        fast_logprobs, old, advantages, mask, loss_type="dapo", clip_low=low, clip_high=high, clip_delta=delta
    )
    slow = clipped = bounded = 0.0
    positions = {tuple(i[:2]) for i in mask.nonzero().tolist()}
    for position in positions:
        draws = [tuple(i) for i in mask.nonzero().tolist() if tuple(i[:2]) == position]
        for i in draws:
            A, ratio = advantages[i[0]], torch.exp(slow_logprobs[i] - old[i])
            plain = min(ratio, torch.tensor(delta, dtype=ratio.dtype)) * A
            clip = max(1 - low, min(ratio.item(), 1 + high)) * A
            slow = slow - min(plain, clip) / len(positions)
            bounded += ratio.item() > delta and A.item() < 0
            out = (ratio < 1 - low and A < 0) or (ratio > 1 + high and A > 0) or (ratio > delta and A < 0)
            clipped += out / len(draws) / len(positions)
    loss.backward()
    slow.backward()
    assert bounded > 0
    assert loss.item() == pytest.approx(slow.item(), abs=1e-9) and stats["clip_frac"] == pytest.approx(clipped.item())
    assert torch.allclose(fast_logprobs.grad, slow_logprobs.grad, atol=1e-9)


# ---------------------------------------------------------------- masks of rows and tokens


def test_sequence_mask():
    logprobs, sampled, _, _, mask = random_step((6, 5, 3), seed=2)
    kept = grpo.sequence_mask(logprobs, sampled, mask, 3.0)
    slow = []
    for row in range(6):
        product = math.prod(
            math.exp(logprobs[i] - sampled[i]) for i in itertools.product([row], range(5), range(3)) if mask[i]
        )
        slow.append(1 / 3 <= product <= 3)
    assert kept.shape == (6, 1, 1) and kept.flatten().tolist() == slow and 0 < sum(slow) < 6
    garbage = logprobs.masked_fill(~mask, math.inf)
    assert torch.equal(grpo.sequence_mask(garbage, sampled, mask, 3.0), kept)


def test_top_entropy_mask():
    entropy = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 6, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    real = [(entropy[b, t].item(), b, t) for b in range(4) for t in range(6) if mask[b, t].any()]
    highest = {(b, t) for _, b, t in sorted(real)[-round(0.3 * len(real)) :]}
    threshold = entropy_threshold(entropy[mask.any(dim=-1)], 0.3)
    kept = grpo.top_entropy_mask(entropy, mask, threshold)
    assert kept.shape == (4, 6, 1) and {tuple(i[:2]) for i in kept.nonzero().tolist()} == highest
    assert entropy_threshold(torch.tensor([]), 0.3) == 0.0 and entropy_threshold(torch.tensor([0.5, 0.1]), 0.01) == 0.5


def test_the_threshold_is_that_of_all_processes(monkeypatch):
    theirs = [3.0, 0.5, 2.0]
    monkeypatch.setattr(update_module.distributed, "all_gather", lambda items: items + theirs)
    assert entropy_threshold(torch.tensor([1.0, 4.0, 0.1]), 0.5) == 2.0


# ---------------------------------------------------------------- through update.py


@pytest.fixture(scope="module")
def sampled():
    model, tokenizer = llms.load("tiny")
    rollout = generate(model, tokenizer, ["Mia has 3.", "Why?"], group_size=4, max_new_tokens=12, seed=0)
    return model, rollout, torch.tensor([1.0, -1.0, 0.5, -0.5] * 2)


def gradient_of(monkeypatch, sampled, **settings):
    """The gradient of the one step that update takes."""
    model, rollout, advantages = sampled
    config = tiny_config("unused", problems_per_step=2, minibatches=1, loss_type="dapo", max_grad_norm=1e9, **settings)
    found = []

    def keep(policy, *_):
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        policy.zero_grad()
        return 1.0

    monkeypatch.setattr(update_module, "optimizer_step", keep)
    update(model, model, None, llms.make_optimizer(model, 0.0), rollout, advantages, config)
    return found[0]


def test_only_the_tokens_of_high_entropy_teach(monkeypatch, sampled):
    """Against a loss that is written down here, of the same log-probs; all tokens stay in the divisor."""
    model, rollout, advantages = sampled
    real = rollout.completion_mask
    threshold = sorted(rollout.entropy[real].tolist(), reverse=True)[round(0.2 * real.sum().item()) - 1]
    logprobs = llms.completion_logprobs(model, rollout)[..., 0]
    loss = 0.0
    for b, t in real.nonzero().tolist():
        if rollout.entropy[b, t] >= threshold:
            loss = loss - torch.exp(logprobs[b, t] - logprobs[b, t].detach()) * advantages[b] / real.sum()
    slow = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    fast = gradient_of(monkeypatch, sampled, top_entropy=0.2)
    assert torch.allclose(fast, slow, atol=1e-6)
    assert not torch.allclose(fast, gradient_of(monkeypatch, sampled), atol=1e-4)


def test_rows_that_the_actor_made_likelier_or_rarer_teach_nothing(monkeypatch, sampled):
    model, rollout, advantages = sampled
    shifted = rollout.logprobs.clone()
    shifted[1] += 2.0 / rollout.lengths[1]
    shifted[6] -= 2.0 / rollout.lengths[6]
    monkeypatch.setattr(rollout, "logprobs", shifted)
    fast = gradient_of(monkeypatch, sampled, rollout_is_mask=5.0)
    without = advantages.clone()
    without[[1, 6]] = 0.0
    assert torch.allclose(fast, gradient_of(monkeypatch, (model, rollout, without)), atol=1e-6)
    everything = gradient_of(monkeypatch, sampled, rollout_is_mask=10.0)
    assert torch.allclose(everything, gradient_of(monkeypatch, sampled), atol=1e-6)


@pytest.mark.parametrize(
    "flags, fragment",
    [
        ("--pass_at_k 9", "--pass_at_k 9: must be at most --group_size 8"),
        ("--pass_at_k 0", "--pass_at_k 0"),
        ("--clip_delta 1.2", "--clip_delta 1.2: must be above 1 + clip_high = 1.2, or 0"),
        ("--top_entropy 0", "--top_entropy 0"),
        ("--top_entropy 1.5", "--top_entropy 1.5: must be at most 1"),
        ("--rollout_is_mask 0.5", "--rollout_is_mask 0.5: must be above 1, or 0"),
        ("--advantage_baseline median", "leave_one_out"),
    ],
)
def test_impossible_values(flags, fragment):
    with pytest.raises(ValueError) as error:
        parse_config(["--preset", "tiny", *flags.split()])
    assert fragment in str(error.value)
