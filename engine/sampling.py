"""From probabilities to draws: independent ones, and those of Gumbel noise with their density.

Gumbel noise
------------
Add independent Gumbel(0, 1) noise G_v to the log-probs of all tokens, g_v = log p_v + G_v, and mix the K tokens of
largest g with the weights softmax(g / tau). The first of them has exactly the probability p_v; the others say how close
they came (Gumbel-softmax: Jang et al. 2017, Maddison et al. 2017; for soft thinking: SofT-GRPO, Zheng et al. 2025).
This is a race: token v arrives at the time e^-g_v, which is exponentially distributed with the rate p_v. So no noise
over the vocabulary has to be drawn:

  - The first to arrive is drawn from p, the next from p without the first, renormalised, and so on.
  - The wait for draw k is exponential with the rate R_k = 1 - p_1 - ... - p_(k-1), the mass that is left (p_j is the
    probability of the j-th draw).

The mixture depends on the draws and on their gaps a_k = g_1 - g_k alone: weights = softmax(-a / tau). The time t of the
first arrival shifts all g alike, and nothing is made of it, so it is integrated out. The first wait is t, with the rate
R_1 = 1. The wait for draw k is t r_k with r_k = e^a_k - e^a_(k-1). So draws and waits r_2, ..., r_K have the density

    p_1 ... p_K  integral of  t^(K-1) e^(-t b_K) dt  =  (K-1)! p_1 ... p_K / b_K^K
    b_k = 1 + R_2 r_2 + ... + R_k r_k

(The change from waits to weights has factors without p, which cancel in every ratio and gradient.) For K = V it is the
Concrete density of Maddison et al.; for fewer draws, the tokens that were not drawn are in the R_k. By the chain rule,
draw k has the factor

    p_k b_(k-1)^(k-1) / b_k^k

and the log of it takes the place of log p_k everywhere: in the ratio, its clipping and the KL. Where the gaps are 0, b
is 1 and log p_k is left: so the formula holds for the token of a hard step too. Given the draws before,
(b_(k-1) / b_k)^(k-1) is uniform on (0, 1), so a gap takes one uniform number.

Left out on purpose: noise that is clamped, and means over the draws in place of sums: the gradient is then another one
(test_soft_thinking.py measures by how much).
"""

import torch

MIN_MASS = 1e-30  # less than this is nothing: there is no further token to draw
SMALL_VOCABULARY = 4096  # up to here one cumulative sum over all tokens is the faster way
BLOCK = 256  # tokens


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64, which Apple's mps lacks. fp32 sums and 24-bit random numbers never draw many of the rare tokens of a
    vocabulary of 151,936."""
    return torch.float32 if device.type == "mps" else torch.float64


def entropy_of(probs: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """-sum p log p of each row, in nats. (n, V) each -> (n,). A matrix product takes three times as long on an H100,
    and on a CPU it adds its terms in one run (1e-3 nats off at V = 151,936), vecdot in pairs."""
    if probs.is_cuda:
        return torch.special.entr(probs).sum(dim=-1)
    return -torch.linalg.vecdot(probs, logprobs)


def draw(probs: torch.Tensor, uniform: torch.Tensor, greedy: bool = False, topk: bool = False) -> torch.Tensor:
    """K independent draws a row. probs: (n, V) float32, uniform: (n, K) float64 in [0, 1) -> (n, K) long.

    By the inverse of the cumulative distribution: the first token at which it exceeds the uniform number. In a large
    vocabulary the same rule first picks a block of tokens, then a token of the block. greedy: K times the likeliest;
    topk: the K likeliest.
    """
    n, K = uniform.shape
    if topk:
        return probs.topk(K, dim=-1).indices
    if greedy:
        return probs.argmax(dim=-1, keepdim=True).expand(n, K)
    V, device = probs.shape[1], probs.device
    if V <= SMALL_VOCABULARY:
        return first_above(probs, uniform)[0]
    whole = V // BLOCK * BLOCK  # tokens in full blocks; the last block has the rest
    sums = [probs[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1), probs[:, whole:].sum(dim=-1, keepdim=True)]
    block, uniform = first_above(torch.cat(sums, dim=1), uniform)  # (n, K) each
    tokens = block[..., None] * BLOCK + torch.arange(BLOCK, device=device)  # (n, K, BLOCK)
    inside = probs.gather(1, tokens.clamp(max=V - 1).flatten(1)).view_as(tokens) * (tokens < V)
    within, _ = first_above(inside, uniform[..., None])
    return (block * BLOCK + within.squeeze(-1)).clamp(max=V - 1)  # NaN may point past the last token


def first_above(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the cumulative sum of the weights first exceeds uniform x their sum, and how far into that weight.

    weights: (..., m), uniform: (..., K) in [0, 1) -> index (..., K) long, share (..., K) in [0, 1): the threshold's
    place within the weight, itself uniform and independent of the index. A weight of 0 is never chosen.
    """
    cumulative = weights.cumsum(dim=-1, dtype=uniform.dtype)
    total = cumulative[..., -1:]
    threshold = torch.minimum(uniform * total, total * (1 - torch.finfo(uniform.dtype).eps))  # below it after rounding
    index = torch.searchsorted(cumulative, threshold, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, index).to(uniform.dtype)
    share = (threshold - (cumulative.gather(-1, index) - weight)) / weight
    return index, share.clamp(0, 1)


def gumbel_draw(probs: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The K tokens of largest log p + Gumbel noise, largest first. probs: (n, V) float32, overwritten;
    uniform: (n, 2K - 1) float64 in [0, 1), for K tokens and K - 1 gaps.

    -> draws (n, K) long, gaps (n, K) >= 0 and growing, log of the mass outside the draws (n,). Where less than MIN_MASS
    is left, the last draw is repeated.
    """
    K = (uniform.shape[1] + 1) // 2
    token = draw(probs, uniform[:, :1])  # (n, 1)
    gap, growth = torch.zeros_like(uniform[:, :1]), torch.ones_like(uniform[:, :1])  # a_k and b_k, (n, 1)
    draws, gaps = [token], [gap]
    for k in range(2, K + 1):
        left = probs.scatter_(1, token, 0.0).sum(dim=-1, keepdim=True)  # R_k
        nothing = left < MIN_MASS
        token = torch.where(nothing, token, draw(probs, uniform[:, k - 1 : k]))
        u = uniform[:, K + k - 2 : K + k - 1]
        wait = growth * torch.expm1(-torch.log1p(-u) / (k - 1))  # R_k r_k
        log_wait = (wait.log() - left.clamp(min=MIN_MASS).log()).masked_fill(nothing, -torch.inf)
        gap, growth = torch.logaddexp(gap, log_wait), growth + wait
        draws.append(token)
        gaps.append(gap)
    rest = probs.scatter_(1, token, 0.0).sum(dim=-1).clamp(min=MIN_MASS)
    return torch.cat(draws, dim=1), torch.cat(gaps, dim=1).to(probs.dtype), rest.log()


def gumbel_logprobs(logprobs: torch.Tensor, log_rest: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
    """The log of each draw's factor of the density, differentiable: log p_k - k log b_k + (k - 1) log b_(k-1).

    logprobs: (..., K) log p_k; log_rest: (...,) log of the mass outside the draws; gaps: (..., K), constants
    -> (..., K). The masses R_k are sums from the last draw on: 1 - p_1 has no digits where the model is sure.
    """
    K = gaps.shape[-1]
    log_left, log_lefts = log_rest, []
    for k in reversed(range(K)):
        log_left = torch.logaddexp(log_left, logprobs[..., k])
        log_lefts.append(log_left)
    log_left = torch.stack(log_lefts[::-1], dim=-1)  # (..., K): log R_k
    zero = torch.zeros_like(gaps[..., :1])
    before = torch.cat([zero, gaps[..., :-1]], dim=-1)
    log_wait = gaps + torch.log(-torch.expm1(before - gaps))  # log r_k, -inf for the first and where gaps are 0
    log_b = torch.log1p(torch.exp(log_left + log_wait).cumsum(dim=-1))
    powers = log_b * torch.arange(1, K + 1, device=gaps.device)  # k log b_k
    return logprobs - powers.diff(dim=-1, prepend=zero)
