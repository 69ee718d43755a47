"""Gumbel noise and its density as the definition has them: noise for every token, a sum over every token, an integral
over the first arrival. What engine/sampling.py is compared with."""

import math

import torch


def noisy_draws(logprobs: torch.Tensor, K: int, generator=None) -> tuple[torch.Tensor, torch.Tensor]:
    """logprobs: (n, V) -> draws, gaps (n, K): of the K largest after noise on all tokens."""
    uniform = torch.rand(logprobs.shape, generator=generator, dtype=torch.double)
    values, draws = (logprobs.double() - torch.log(-torch.log(uniform))).topk(K, dim=-1)
    return draws, values[:, :1] - values


def log_density_of_values(logprobs: torch.Tensor, draws: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of the K largest perturbed log-probs, `values` (..., K) in falling order, being those of the tokens `draws`: a
    Gumbel density for each, and for every other token the chance to stay below the last. logprobs: (..., V) -> (...)"""
    noise = values - logprobs.gather(-1, draws)  # (..., K)
    others = (values[..., -1:] - logprobs).scatter(-1, draws, torch.inf)  # (..., V)
    return (-noise - torch.exp(-noise)).sum(dim=-1) - torch.exp(-others).sum(dim=-1)


def log_density_of_gaps(logprobs: torch.Tensor, draws: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
    """The same for draws and gaps alone: integrated over the largest value, numerically. -> (...)"""
    largest = torch.linspace(-40, 40, 8001, dtype=torch.double).view(-1, *[1] * gaps.dim())
    wide_logprobs, wide_draws = (x.expand(len(largest), *x.shape) for x in (logprobs, draws))
    logs = log_density_of_values(wide_logprobs, wide_draws, largest - gaps)
    return logs.logsumexp(dim=0) + math.log(80 / 8000)


def slow_logprobs(logprobs: torch.Tensor, draws: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
    """What engine.sampling.gumbel_logprobs gives, position by position from all V log-probs. logprobs: (n, V), draws,
    gaps: (n, K) -> (n, K)"""
    result = torch.zeros(gaps.shape, dtype=torch.double)
    for i, (ids, a) in enumerate(zip(draws.tolist(), gaps.double().tolist(), strict=True)):
        probs, b, before = logprobs[i].double().exp(), 1.0, 0.0  # b_(k-1)^(k-1), as a log
        for k, (token, gap) in enumerate(zip(ids, a, strict=True), start=1):
            left = sum(p for v, p in enumerate(probs.tolist()) if v not in ids[: k - 1])
            b += left * (math.exp(gap) - math.exp(a[max(0, k - 2)]))
            result[i, k - 1] = logprobs[i, token] - k * math.log(b) + before
            before = k * math.log(b)
    return result
