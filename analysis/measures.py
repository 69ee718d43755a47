"""Measures of a probability distribution over tokens, and of the answers that were sampled from it.

Imports torch and numpy only, so that training code can use it too. Units are nats; bits = nats / ln 2.
"""

import math
from collections import Counter

import numpy as np
import torch

TEMPERATURES = (0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 2.0)  # at which p(argmax) is computed
NUCLEUS = 0.95  # probability mass of the nucleus
FORK_QUANTILE = 0.8

# ---------------------------------------------------------------- one distribution
# logp: (..., V) natural logarithms of probabilities that sum to 1; -inf is allowed. The result is (...).


def entropy(logp: torch.Tensor) -> torch.Tensor:
    """H = -sum p ln p, nats. ln V for the uniform distribution, 0 if one token has all the mass."""
    return torch.special.entr(logp.exp()).sum(dim=-1)


def varentropy(logp: torch.Tensor) -> torch.Tensor:
    """sum p (ln p + H)^2, nats^2: the variance of the tokens' surprisals. 0 for the uniform distribution."""
    p = logp.exp()
    return torch.where(p > 0, p * (logp + entropy(logp).unsqueeze(-1)).square(), 0).sum(dim=-1)


def collision(logp: torch.Tensor) -> torch.Tensor:
    """sum p^2: the probability that two independent draws are the same token."""
    return logp.exp().square().sum(dim=-1)


def rank(logp: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """1 + #{p > p(token)}; tokens: (...). Tokens of equal probability share a rank."""
    return (logp > logp.gather(-1, tokens.unsqueeze(-1))).sum(dim=-1) + 1


def argmax_probs(logp: torch.Tensor, temperatures=TEMPERATURES) -> torch.Tensor:
    """p_T(argmax) at each temperature T -> (..., number of temperatures)."""
    below_max = logp - logp.amax(dim=-1, keepdim=True)  # 0 for the argmax, negative for all others
    return torch.stack([1 / (below_max / T).exp_().sum(dim=-1) for T in temperatures], dim=-1)


# ---------------------------------------------------------------- one distribution, sorted
# sorted_logp: (..., V) as above, in descending order.


def top_mass(sorted_logp: torch.Tensor, k: int) -> torch.Tensor:
    """Probability mass of the k likeliest tokens."""
    return sorted_logp[..., :k].exp().sum(dim=-1)


def nucleus_size(sorted_logp: torch.Tensor, mass: float = NUCLEUS) -> torch.Tensor:
    """The smallest n such that the n likeliest tokens have a mass of at least `mass`."""
    is_below = sorted_logp.exp().cumsum(dim=-1) < mass
    return (is_below.sum(dim=-1) + 1).clamp(max=sorted_logp.shape[-1])


def margin(sorted_logp: torch.Tensor) -> torch.Tensor:
    """p1 - p2: the difference between the two highest probabilities."""
    return sorted_logp[..., 0].exp() - sorted_logp[..., 1].exp()


# ---------------------------------------------------------------- two distributions


def kl(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum p (ln p - ln q), nats. A token with p = 0 adds 0."""
    p = logp.exp()
    return torch.where(p > 0, p * (logp - logq), 0).sum(dim=-1)


def jsd(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence: the mean of KL(p || m) and KL(q || m), m = (p + q) / 2. From 0 to ln 2, nats."""
    log_mean = torch.logaddexp(logp, logq) - math.log(2)
    return (kl(logp, log_mean) + kl(logq, log_mean)) / 2


# ---------------------------------------------------------------- one completion, and several of one prompt


def fork_mask(step_entropy: np.ndarray) -> np.ndarray:
    """(T,) entropies -> (T,) bool: at or above their 80th percentile. At this minority of steps reasoning branches
    (Wang et al. 2025, "Beyond the 80/20 rule")."""
    return step_entropy >= np.quantile(step_entropy, FORK_QUANTILE)


def path_share(trace_ids: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """S(t): the share of the resampled rows that equal row 0 in all tokens up to and including step t.

    (1 + R, T) tokens and mask, row 0 and R resampled rows -> (length of row 0,); NaN if R = 0.
    """
    length = int(completion_mask[0].sum())
    same = (trace_ids[1:, :length] == trace_ids[0, :length]) & completion_mask[1:, :length]
    return same.cumprod(dim=1).float().mean(dim=0)


def majority_share(answers: list[str | None]) -> float | None:
    """Share of the most frequent answer; None counts as a row, but never as an answer. None for an empty list."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes.values(), default=0) / len(answers) if answers else None


def effective_draws(draws: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """exp(H(w)) of each mixture, after adding up the weights of equal draws: 1 for a single token, K for K different
    tokens of equal weight. (T, K) ids, (T, K) weights -> (T,)"""
    first_column = [[list(row).index(draw) for draw in row] for row in draws]  # (T, K): where each id stands first
    total = np.zeros(weights.shape)
    np.add.at(total, (np.arange(len(draws))[:, None], np.array(first_column)), weights)
    return np.exp(-(total * np.log(np.where(total > 0, total, 1))).sum(axis=1))
