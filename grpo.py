"""Group Relative Policy Optimization: from rewards to advantages, from log-probs to a loss. Nothing else.

For one prompt the policy writes G answers. Each is scored. An answer's advantage is how much better than its own
group it did, so the group takes the place of PPO's value network. The loss then makes the tokens of
better-than-average answers likelier and those of worse ones less likely (Shao et al. 2024, "DeepSeekMath", eq. 3).

These are pure functions on tensors: they know neither text nor models. Shapes: B rows (prompts x group_size),
T completion positions, K draws a position. K is 1 in normal sampling; soft thinking draws several tokens at one
position, and then a position contributes the sum of its draws' terms and still counts as one token.

Left out on purpose: a value function, generalised advantage estimation, entropy bonuses.
"""

import math

import torch

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
ADVANTAGE_SCALES = ("group", "batch", "none")
ADVANTAGE_BASELINES = ("mean", "leave_one_out")


def compute_advantages(
    rewards: torch.Tensor, group_size: int, scale: str = "group", baseline: str = "mean", k: int = 1
) -> torch.Tensor:
    """Each row's reward relative to its group. rewards: (B,), a group's rows side by side -> (B,).

    scale: what the centred reward is divided by (plus 1e-4):
      "group"  the unbiased standard deviation of its group (DeepSeekMath): every problem weighs the same, so
               nearly solved and nearly hopeless ones are blown up
      "batch"  the standard deviation of all rewards of the step
      "none"   nothing (Dr. GRPO, Liu et al. 2025): no bias towards too easy or too hard problems
    baseline: what is subtracted: the "mean" of the group, or of its other rows ("leave_one_out": RLOO, Ahmadian et al.
    2024), which is the centred reward times G / (G - 1). k: more than 1 rewards the best of k answers, see best_of_k.
    A single row, or equal rewards, gives 0: there is nothing to compare with.
    """
    if scale not in ADVANTAGE_SCALES:
        raise ValueError(f"unknown advantage scale {scale!r}: choose from {', '.join(ADVANTAGE_SCALES)}")
    if baseline not in ADVANTAGE_BASELINES:
        raise ValueError(f"unknown advantage baseline {baseline!r}: choose from {', '.join(ADVANTAGE_BASELINES)}")
    original = rewards.float().view(-1, group_size)  # (P, G)
    groups = best_of_k(original, k) if k > 1 else original
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale == "group" and group_size > 1:
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-4)
    if scale == "batch" and groups.numel() > 1:
        centred = centred / (groups.std() + 1e-4)
    if baseline == "leave_one_out" and group_size > 1:
        centred = centred * group_size / (group_size - 1)
    equal = (original == original[:, :1]).all(
        dim=1, keepdim=True
    )  # exactly 0, where rounding of the mean would leave 1e-8
    return centred.masked_fill(equal, 0.0).view(-1)


def best_of_k(groups: torch.Tensor, k: int) -> torch.Tensor:
    """For every answer, the best reward among k answers of its group of which it is one, averaged over all choices of
    the k - 1 others. groups: (P, G), k from 2 to G -> (P, G).

    Centred, this is the advantage of pass@k training in closed form (Chen et al. 2025, who divide by the
    deviation of the sets' rewards), for any rewards and not only 0 and 1. An answer that is never the best gets what
    its sets get without it.
    """
    G = groups.shape[1]
    ordered, order = groups.sort(dim=1)  # the answer at place p is the best of C(p, k - 1) of its sets
    weights = torch.zeros(G, G, dtype=torch.float64)
    for p in range(G):
        weights[p, p] = math.comb(p, k - 1)
        for q in range(p + 1, G):  # the answer at q is the best, and k - 2 others are below it
            weights[p, q] = math.comb(q - 1, k - 2)
    weights = (weights / math.comb(G - 1, k - 1)).to(groups)
    return torch.empty_like(groups).scatter_(1, order, ordered @ weights.T)


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference): k3 of Schulman (2020), unbiased, never negative, 0 at equality."""
    log_ratio = ref_logprobs - logprobs
    return torch.exp(log_ratio) - log_ratio - 1


def importance_weights(logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(p_policy / p_sampled, cap): corrects for an actor that is not quite the policy (Yao et al. 2025, truncated
    importance sampling). logprobs: of the policy before any update; sampled_logprobs: the actor's, at sampling time."""
    return torch.exp(logprobs - sampled_logprobs).clamp(max=cap)


def sequence_mask(
    logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, mask: torch.Tensor, limit: float
) -> torch.Tensor:
    """Which rows to learn from: those whose p_policy / p_sampled, the product over all their draws, lies between
    1 / limit and limit (sequence-level masking, Qi et al. 2025, section 4; theirs has the upper bound alone).

    Arguments as in importance_weights, (B, T, K) all -> (B, 1, 1) bool, to multiply draw_weights with.
    """
    log_ratio = ((logprobs - sampled_logprobs).masked_fill(~mask, 0.0)).sum(dim=(1, 2), keepdim=True)
    return log_ratio.abs() <= math.log(limit)


def top_entropy_mask(entropy: torch.Tensor, mask: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which positions are at or above the entropy threshold (Wang et al. 2025: the tokens where reasoning forks).
    entropy: (B, T) nats; mask: (B, T, K) -> (B, T, 1) bool, to multiply draw_weights with."""
    return (mask.any(dim=-1) & (entropy >= threshold)).unsqueeze(-1)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    loss_type: str = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_delta: float = 0.0,
    ref_logprobs: torch.Tensor | None = None,
    beta: float = 0.0,
    draw_weights: torch.Tensor | None = None,
    max_length: int | None = None,
    num_rows: float | None = None,
    num_tokens: float | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss to minimise, and what to log about it.

    logprobs      (B, T) or (B, T, K): of the sampled tokens under the policy, with gradient
    old_logprobs  the same under the policy that sampled them; None: the policy has not changed since. The ratio then
                  equals 1, and its gradient is still used
    advantages    (B,)
    mask          bool, like logprobs: which draws were the policy's own actions
    draw_weights  like logprobs, without gradient: each draw's term of the objective (not the KL) is multiplied by its
                  own; see importance_weights
    num_rows, num_tokens
                  how many rows and positions with a real draw the whole optimizer step has. The loss is divided by
                  these, so the losses (and stats) of micro-batches and of processes add up to those of one big batch.
                  For dr_grpo, which divides by a constant, num_rows are all rows, those without a real draw too.
                  Default: this call is the whole step.
    max_length    the completion limit, the constant divisor of dr_grpo
    clip_delta    above 0: a bound of the ratio on both sides. min() leaves it unbounded where A < 0, and one token that
                  became far likelier can outweigh all others (two-sided clip, INTELLECT-2 2025). Above 1 + clip_high

    loss_type; with ratio = exp(logprobs - old_logprobs), A the advantage, clip(r): r within
    [1 - clip_low, 1 + clip_high]:
      grpo     -min(ratio A, clip(ratio) A)        mean over a row's tokens, then over rows      (DeepSeekMath, R1)
      dapo     the same                            over all tokens: long rows are not diluted    (Yu et al. 2025)
      dr_grpo  the same                            sum / (rows x max_length): no length bias     (Liu et al. 2025)
      gspo     ratio = exp(mean over the row)      one ratio a row, then as grpo                 (Zheng et al. 2025)
      cispo    -min(ratio, 1 + clip_high) A log p  over all tokens; the weight carries no
                                                   gradient, so no token loses its own           (MiniMax 2025)
    Stats, means over positions: "clip_frac", share of draws whose gradient is cut or capped, none where A is 0; with
    ref_logprobs "kl", of a draw: where a position has several draws, their mean. The loss takes their sum.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss type {loss_type!r}: choose from {', '.join(LOSS_TYPES)}")
    if loss_type == "dr_grpo" and max_length is None:
        raise ValueError("loss type 'dr_grpo' needs max_length, the completion limit")
    if beta > 0 and ref_logprobs is None:
        raise ValueError(f"beta {beta} needs ref_logprobs, the reference model's log-probs")
    if logprobs.dim() == 2:  # one draw a position
        logprobs, mask = logprobs.unsqueeze(-1), mask.unsqueeze(-1)
        old_logprobs = None if old_logprobs is None else old_logprobs.unsqueeze(-1)
        ref_logprobs = None if ref_logprobs is None else ref_logprobs.unsqueeze(-1)
        draw_weights = None if draw_weights is None else draw_weights.unsqueeze(-1)

    positions = mask.any(dim=-1)  # (B, T)
    row_tokens = positions.sum(dim=1)  # (B,)
    if num_rows is None:
        num_rows = len(mask) if loss_type == "dr_grpo" else (row_tokens > 0).sum().item()
    num_rows = max(1, num_rows)
    num_tokens = max(1, row_tokens.sum().item() if num_tokens is None else num_tokens)

    # Padding may hold anything, even infinities, and 0 * inf is nan: blank it before any arithmetic.
    logprobs = logprobs.masked_fill(~mask, 0.0)
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs.masked_fill(~mask, 0.0)
    draw_weights = mask.float() if draw_weights is None else draw_weights.masked_fill(~mask, 0.0)
    A = advantages.to(logprobs.dtype).view(-1, 1, 1)

    log_ratio = logprobs - old_logprobs  # (B, T, K)
    if loss_type == "gspo":  # (B, 1, 1): the geometric mean of the row's ratios
        log_ratio = log_ratio.sum(dim=(1, 2), keepdim=True) / row_tokens.clamp(min=1).view(-1, 1, 1)
    ratio = torch.exp(log_ratio)

    if loss_type == "cispo":
        clipped = (ratio > 1 + clip_high) & (A != 0)
        per_draw = -torch.clamp(ratio, max=1 + clip_high).detach() * A * logprobs
    else:
        # min() makes the objective a pessimistic bound: it stops paying once the ratio has left the interval in the
        # direction the advantage pushes, and keeps pulling back when it has left in the other one.
        clipped = ((ratio < 1 - clip_low) & (A < 0)) | ((ratio > 1 + clip_high) & (A > 0))
        if clip_delta > 0:
            clipped |= (ratio > clip_delta) & (A < 0)
            ratio = ratio.clamp(max=clip_delta)
        per_draw = -torch.min(ratio * A, torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * A)

    # gspo's row has one term, (B, 1, 1); each of its tokens is given that term, to be averaged below.
    per_token = (per_draw * draw_weights).sum(dim=-1)  # (B, T)
    if loss_type == "gspo":
        per_token = per_token / mask.sum(dim=-1).clamp(min=1)

    stats = {"clip_frac": ((clipped & mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)).sum().item() / num_tokens}
    if ref_logprobs is not None:
        kl = (kl_estimate(logprobs, ref_logprobs.masked_fill(~mask, 0.0)) * mask).sum(dim=-1)  # (B, T)
        stats["kl"] = (kl / mask.sum(dim=-1).clamp(min=1)).sum().item() / num_tokens
        if beta > 0:
            per_token = per_token + beta * kl

    if loss_type in ("grpo", "gspo"):
        loss = (per_token.sum(dim=1) / row_tokens.clamp(min=1)).sum() / num_rows
    elif loss_type in ("dapo", "cispo"):
        loss = per_token.sum() / num_tokens
    else:  # dr_grpo
        loss = per_token.sum() / (num_rows * max_length)
    return loss, stats
