"""The policy gradient of a toy, exactly: what estimators of soft thinking are compared with (test_soft_thinking.py).

A random Qwen2 with a vocabulary of five thinks for one position, two draws, and answers with one token. Each of the 125
outcomes has a random reward, so the expected reward can be written down and differentiated, through the weights too. An
estimate is what training computes: log-probs of all paths, each path present as often as it happens, weights constant.

With Gumbel noise the paths also differ in the gap between the two perturbed log-probs. That is an integral over one
uniform number, done by Gauss-Legendre quadrature. The true gradient holds that number fixed and goes through the
weights, which depend on the policy at it, so no density enters.
"""

from types import SimpleNamespace

import numpy as np
import torch
from random_models import random_model

import llms
from grpo import policy_loss
from soft_thinking import SoftThinking, mixture_weights

V, K = 5, 2
CLAMP = (-1.5, 3.0)  # of the noise, in the published code of SofT-GRPO
INDEPENDENT = (  # name, weighting, whether the log-probs are summed with the weights, which is a common shortcut
    ("count weights, sum of log-probs", "count", False),
    ("prob weights, sum of log-probs", "prob", False),
    ("prob weights, weighted sum of log-probs", "prob", True),
)
NOISY = (  # name, and what differs from training: options of the log-density of the thought
    ("Gumbel noise, density of draws and weights", dict()),
    ("Gumbel noise, density of perturbed values", dict(of_values=True)),
    ("... of values, noise clamped", dict(of_values=True, clamped=True)),
    ("... of draws and weights, mean not sum", dict(mean=True)),
    ("... of values, clamped, mean, no rest", dict(of_values=True, clamped=True, mean=True, no_rest=True)),
)
NAMES = [name for name, *_ in (*INDEPENDENT, *NOISY)]
EXACT = (INDEPENDENT[0][0], NOISY[0][0], NOISY[1][0])


class Paths:
    """All that can happen. draws: (B, 2, K), the thought's and the answer's, padded."""

    def __init__(self, model, thoughts: torch.Tensor, rewards: torch.Tensor):
        """thoughts: (n, K) ids; rewards: (V, V, V), of two draws and an answer."""
        self.model = model
        answers = torch.arange(V).repeat(len(thoughts))  # (B,)
        self.thoughts = thoughts.repeat_interleave(V, dim=0)  # (B, K)
        answer = torch.stack([answers, torch.zeros_like(answers)], dim=-1)
        self.draws = torch.stack([self.thoughts, answer], dim=1)
        self.mask = torch.tensor([[True, True], [True, False]]).expand(len(answers), 2, K)
        self.rewards = rewards[self.thoughts[:, 0], self.thoughts[:, 1], answers]

    def logprobs(self, thought_weights: torch.Tensor | None = None, gaps: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 2, K), as in training. thought_weights: (B, K); None: only the thought's log-probs are wanted."""
        thought_weights = self.mask[:, 0].float() if thought_weights is None else thought_weights
        rollout = SimpleNamespace(
            prompt_ids=[torch.tensor([1, 2])] * len(self.draws), draws=self.draws,
            weights=torch.stack([thought_weights, self.mask[:, 1].float()], dim=1),
            draw_mask=self.mask, completion_mask=self.mask.any(dim=-1),
            gaps=None if gaps is None else torch.stack([gaps, torch.zeros_like(gaps)], dim=1),
        )  # fmt: skip
        return llms.completion_logprobs(self.model, rollout)

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        self.model.zero_grad()
        value.backward()
        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])

    def true_gradient(self, probability: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the expected reward, and each path's advantage as often as it happens. probability: (B,)"""
        assert abs(probability.sum().item() - 1) < 1e-5, "the paths are not all there is"
        expected_reward = (probability * self.rewards).sum()
        true = self.gradient(expected_reward)
        return true, (probability * (self.rewards - expected_reward)).detach()

    def cosine(self, actions, mask, advantages, true) -> float:
        """Of the gradient of training with the true one. actions: the log-probs."""
        loss, _ = policy_loss(actions, None, advantages, mask, loss_type="dapo", num_tokens=1)
        return torch.cosine_similarity(self.gradient(-loss), true, dim=0).item()


def cosines(seed: int) -> list[float]:
    """Of the estimates NAMES with the true gradient."""
    model = random_model(seed=seed, vocab_size=V, num_hidden_layers=1, eos_token_id=None).double()
    rewards = torch.randn(V**3, generator=torch.Generator().manual_seed(seed), dtype=torch.double).view(V, V, V)
    return independent_cosines(model, rewards) + noisy_cosines(model, rewards)


def independent_cosines(model, rewards: torch.Tensor) -> list[float]:
    paths, measured = Paths(model, torch.cartesian_prod(*[torch.arange(V)] * K), rewards), []
    soft = torch.ones(len(paths.draws), dtype=torch.bool)
    for _, weighting, shortcut in INDEPENDENT:
        weights = mixture_weights(paths.logprobs()[:, 0], soft, SoftThinking(k=K, weighting=weighting))
        probability = (paths.logprobs(weights) * paths.mask).sum(dim=(1, 2)).double().exp()  # (B,) of each path
        true, advantages = paths.true_gradient(probability)
        actions, mask, weights = paths.logprobs(weights.detach()), paths.mask, weights.detach()
        if shortcut:
            actions = torch.stack([(actions[:, 0] * weights).sum(dim=-1), actions[:, 1, 0]], dim=1)
            mask = mask.any(dim=-1)
        measured.append(paths.cosine(actions, mask, advantages, true))
    return measured


def noisy_cosines(model, rewards: torch.Tensor, nodes: int = 6) -> list[float]:
    pairs = torch.tensor([(i, j) for i in range(V) for j in range(V) if i != j])
    paths = Paths(model, pairs.repeat(nodes, 1), rewards)
    points, shares = np.polynomial.legendre.leggauss(nodes)  # on (-1, 1), weights summing to 2
    u, share = (torch.tensor(x / 2).repeat_interleave(len(pairs) * V) for x in (points + 1, shares))  # (B,) each

    thought = paths.logprobs()[:, 0].double()  # (B, K)
    left = 1 - thought[:, 0].exp()  # R_2
    gap = torch.log1p(u / (1 - u) / left)  # b_2 = 1 / (1 - u) = 1 + R_2 (e^gap - 1)
    gaps = torch.stack([torch.zeros_like(gap), gap], dim=1)
    weights = torch.softmax(-gaps, dim=-1).float()
    answer = paths.logprobs(weights)[:, 1, 0].double()
    true, advantages = paths.true_gradient(share * (thought.sum(dim=-1) + answer).exp() / left)

    gaps, weights, measured = gaps.detach().float(), weights.detach(), []
    for _, how in NOISY:
        actions = paths.logprobs(weights, gaps)  # what training computes
        if how.get("of_values"):
            values = value_terms(paths.logprobs()[:, 0], gaps, how.get("clamped"), how.get("no_rest"))
            actions = torch.stack([values, actions[:, 1]], dim=1)
        if how.get("mean"):
            actions = torch.stack([actions[:, 0] / K, actions[:, 1]], dim=1)
        measured.append(paths.cosine(actions, paths.mask, advantages, true))
    return measured


def value_terms(logprobs, gaps, clamped=None, no_rest=None) -> torch.Tensor:
    """Terms of the log-density of the perturbed values g, (B, K): for each draw a Gumbel density, -x - e^-x with the
    noise x = g - log p; and in the last term the chance of all others to stay below it. Averaged over the time of the
    first arrival, of which draws and weights know nothing: given them, it is a Gamma variable of shape K and rate b_K.
    """
    grid = torch.linspace(0, 30, 30_001, dtype=torch.double)
    below = 1 - torch.exp(-grid) * (1 + grid)  # of a Gamma variable of shape 2
    times = grid[torch.searchsorted(below, (torch.arange(100, dtype=torch.double) + 0.5) / 100)]  # (100,)
    b = 1 + (1 - logprobs[:, 0].exp()) * torch.expm1(gaps[:, 1])
    values = -torch.log(times[:, None, None] / b.detach()[:, None]) - gaps  # (100, B, K)
    noise = values - logprobs
    noise = noise.clamp(*CLAMP) if clamped else noise
    terms = -noise - torch.exp(-noise)
    if not no_rest:
        rest = (1 - logprobs.exp().sum(dim=-1)) * torch.exp(-values[..., -1])  # (100, B)
        terms = torch.stack([terms[..., 0], terms[..., 1] - rest], dim=-1)
    return terms.mean(dim=0).float()
