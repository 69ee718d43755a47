"""The optimizer steps of one rollout: from advantages to new weights.

A step's rows are cut into micro-batches, as many tokens at a time as memory allows. Each micro-batch goes through the
policy once more (llms.completion_logprobs), through the loss (grpo.policy_loss), and adds its share to the gradient.
Losses are divided by the totals of the whole optimizer step, over all micro-batches and all processes, so the gradient
does not depend on how the rows were cut.

Left out on purpose: a replay buffer, optimizer steps that overlap with sampling.
"""

import collections
import math
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import grpo
import llms
from engine import distributed, lora
from engine.out_of_memory import retry_smaller
from rollout import Rollout

MIN_MICRO_BATCH = 64  # tokens; running out of memory with fewer ends the run


@dataclass
class TokenBudget:
    """How many tokens a micro-batch may have. Halved for the rest of the run when the GPU runs out of memory."""

    tokens: int

    def can_halve(self, model) -> bool:
        """Not for a sharded model: the other processes are waiting inside the pass that failed."""
        return self.tokens >= MIN_MICRO_BATCH and not distributed.is_sharded(model)

    def halve(self) -> None:
        self.tokens //= 2
        tqdm.write(f"out of memory: --tokens_per_micro_batch is now {self.tokens}", file=sys.stderr)


@dataclass
class Batch:
    """What one rollout teaches. B rows are this process's own; T positions, K draws per position."""

    rollout: Rollout
    advantages: torch.Tensor  # (B,)
    mask: torch.Tensor  # (B, T, K) bool: the draws that count
    old_logprobs: torch.Tensor | None  # (B, T, K): of the policy that sampled; None: it is the policy itself
    ref_logprobs: torch.Tensor | None  # (B, T, K): of the reference model; None: no KL term
    draw_weights: torch.Tensor  # (B, T, K): of the draws' terms of the objective, before any importance weights


def update(
    policy: PreTrainedModel,
    actor: PreTrainedModel,
    reference: PreTrainedModel | None,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: torch.Tensor,
    config,
    budget: TokenBudget | None = None,
    shares: list[list[int]] | None = None,
) -> dict[str, float]:
    """updates_per_rollout x minibatches optimizer steps on one rollout, of which every process has its own rows.

    advantages: (B,). config: run_config.GRPOConfig. budget: default tokens_per_micro_batch of the config.
    shares: this process's rows of each minibatch; default, equal and consecutive ones.
    Returns what to log, averaged over the steps that were taken: grad_norm, clip_frac, kl, logprob_gap, and the
    learning rate and token budget that were really used. A step whose gradient is not finite is skipped and counted.
    """
    budget = budget or TokenBudget(config.tokens_per_micro_batch)
    mask = rollout.draw_mask  # (B, T, K)
    if config.mask_truncated:
        mask = mask & torch.tensor([f == "stop" for f in rollout.finish], device=mask.device).view(-1, 1, 1)
    row_tokens = mask.any(dim=-1).sum(dim=1)  # (B,) positions that count
    num_updates = config.updates_per_rollout * config.minibatches

    # Steps after the first need the log-probs that the policy had when it sampled. The rollout holds them if the policy
    # itself sampled; a bf16 actor's log-probs would differ by rounding.
    old = ref = None
    if num_updates > 1:
        old = rollout.logprobs if actor is policy else all_logprobs(policy, rollout, config, budget)
    if reference is not None:
        with lora.adapters_off(reference):  # with LoRA, the reference is the policy itself
            ref = all_logprobs(reference, rollout, config, budget)
    draw_weights = mask.float()
    if config.top_entropy < 1:  # of the tokens of all processes
        threshold = entropy_threshold(rollout.entropy[mask.any(dim=-1)], config.top_entropy)
        draw_weights = draw_weights * grpo.top_entropy_mask(rollout.entropy, mask, threshold)
    batch = Batch(rollout, advantages, mask, old, ref, draw_weights)

    taken, skipped, gap = 0, 0, {}
    sums = {"grad_norm": 0.0, "clip_frac": 0.0} | ({} if ref is None else {"kl": 0.0})  # over the steps taken
    if shares is None:  # whole groups
        shares = torch.arange(len(advantages)).view(config.minibatches, -1).tolist()
    policy.train()
    for number in range(num_updates):
        rows = torch.tensor(shares[number % config.minibatches], dtype=torch.long, device=mask.device)
        # Rows without advantage have no gradient, unless the KL gives them one.
        learning = rows[(row_tokens[rows] > 0) & ((advantages[rows] != 0) | (ref is not None))]
        # Totals of the whole optimizer step. Rows that are left out count too, with a gradient of zero; so do masked
        # rows in dr_grpo, which divides by a constant.
        counted = row_tokens[rows] > (-1 if config.loss_type == "dr_grpo" else 0)
        totals = distributed.all_reduce_sum({
            "num_rows": counted.sum().item(), "num_tokens": row_tokens[rows].sum().item(),
            "num_draws": mask[learning].sum().item(), "learning": len(learning),
        })  # fmt: skip
        if totals.pop("learning") == 0:
            continue  # no gradient at all: a step would follow Adam's momentum alone
        stats = gradient_within_memory(policy, optimizer, batch, learning, totals, config, budget)
        stats = distributed.all_reduce_sum(stats)
        if taken == 0:  # the policy was still the one that sampled: any gap comes from the arithmetic
            gap = {"logprob_gap": stats["logprob_gap"]}
        stats["grad_norm"] = optimizer_step(policy, optimizer, config.max_grad_norm)
        if math.isfinite(stats["grad_norm"]):
            sums = {name: value + stats[name] for name, value in sums.items()}
            taken += 1
        else:
            skipped += 1
    policy.eval()
    means = {name: value / max(1, taken) for name, value in sums.items()}
    used = {"lr": optimizer.param_groups[0]["lr"], "tokens_per_micro_batch": budget.tokens}
    return means | gap | used | {"updates": taken, "skipped_updates": skipped}


def entropy_threshold(entropies: torch.Tensor, share: float) -> float:
    """Collective. The least of the highest `share` of all ranks' entropies, at least one. entropies: (n,), own ones."""
    everywhere = sorted(distributed.all_gather(entropies.tolist()), reverse=True)
    return everywhere[max(1, round(share * len(everywhere))) - 1] if everywhere else 0.0


def gradient_within_memory(policy, optimizer, batch: Batch, rows, totals, config, budget: TokenBudget):
    """accumulate_gradient, with the token budget halved and the gradient started anew when memory runs out."""

    def shrink():
        optimizer.zero_grad()
        budget.halve()

    return retry_smaller(
        lambda: accumulate_gradient(policy, batch, rows, totals, config, budget),
        lambda: budget.can_halve(policy),
        shrink,
    )


def accumulate_gradient(policy, batch: Batch, rows, totals, config, budget: TokenBudget) -> dict[str, float]:
    """Adds the gradient of the rows' loss to the parameters, micro-batch by micro-batch.

    rows: (n,) long. totals: num_rows, num_tokens and num_draws of the whole optimizer step. Returns the loss's stats
    and "logprob_gap", the mean distance of the policy's log-probs from those of sampling (nats per draw). The values
    are this process's share: they add up over processes.
    """
    totals = dict(totals)
    num_draws = totals.pop("num_draws")
    rollout, old, ref = batch.rollout, batch.old_logprobs, batch.ref_logprobs
    stats = collections.Counter({"clip_frac": 0.0, "logprob_gap": 0.0} | ({} if ref is None else {"kl": 0.0}))
    for micro in own_micro_batches(policy, rollout, rows.tolist(), budget.tokens):
        counts = batch.mask[micro or [0]] & bool(micro)  # an empty micro-batch reads one row, and none of it counts
        micro = micro or [0]
        logprobs = policy_logprobs(policy, rollout, micro, config)  # (b, T, K)
        before_updates = logprobs.detach() if old is None else old[micro]
        draw_weights, sampled = batch.draw_weights[micro], rollout.logprobs[micro]
        if config.rollout_is_cap > 0:  # the actor's rounding made some draws likelier than the policy finds them
            draw_weights = draw_weights * grpo.importance_weights(before_updates, sampled, config.rollout_is_cap)
        if config.rollout_is_mask > 0:  # ... and some rows
            draw_weights = draw_weights * grpo.sequence_mask(before_updates, sampled, counts, config.rollout_is_mask)
        loss, loss_stats = grpo.policy_loss(
            logprobs,
            None if old is None else old[micro],
            batch.advantages[micro],
            counts,
            loss_type=config.loss_type,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            clip_delta=config.clip_delta,
            ref_logprobs=None if ref is None else ref[micro],
            beta=config.beta,
            draw_weights=draw_weights,
            max_length=config.max_completion_length,
            **totals,
        )
        loss.backward()
        differences = (logprobs.detach() - rollout.logprobs[micro]).abs() * counts
        stats.update(loss_stats | {"logprob_gap": differences.sum().item() / num_draws})
    return dict(stats)


def optimizer_step(policy, optimizer, max_grad_norm: float) -> float:
    """Sums gradients over processes, clips them, steps, and clears them. Returns the norm before clipping.

    A gradient that is not finite takes no step: one such step would ruin every weight.
    """
    grad_norm = distributed.sum_and_clip_gradients(policy, max_grad_norm)
    if math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm


@torch.no_grad()
def all_logprobs(model, rollout: Rollout, config, budget: TokenBudget, rows=None) -> torch.Tensor:
    """Log-probs of `rows` (default all) under `model`, without gradient: (B, T, K), 0 in other rows.

    When memory runs out, the token budget is halved and the pass begins anew.
    """
    rows = range(len(rollout.texts)) if rows is None else rows

    def attempt():
        result = torch.zeros_like(rollout.logprobs)
        for micro in own_micro_batches(model, rollout, rows, budget.tokens):
            logprobs = policy_logprobs(model, rollout, micro or [0], config)
            if micro:
                result[micro] = logprobs
        return result

    return retry_smaller(attempt, lambda: budget.can_halve(model), budget.halve)


def policy_logprobs(model, rollout: Rollout, rows: list[int], config) -> torch.Tensor:
    """llms.completion_logprobs in the precision of training: (b, T, K)."""
    logprobs_of = distributed.bind_forward(model, llms.completion_logprobs)
    device = rollout.draws.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.uses_bf16(device)):
        return logprobs_of(rollout, config.temperature, rows)


def own_micro_batches(model, rollout: Rollout, rows, token_budget: int) -> list[list[int]]:
    """Micro-batches of this process's rows. All processes read a sharded model together, so a process with fewer
    micro-batches than another gets empty ones."""
    batches = llms.micro_batches(rollout, rows, token_budget)
    missing = distributed.all_reduce_max(len(batches)) - len(batches) if distributed.is_sharded(model) else 0
    return batches + [[]] * missing


# ---------------------------------------------------------------- optimizer and learning rate


def make_trainable(policy, config, forward, optimizer_state: dict | None = None) -> torch.optim.Optimizer:
    """Prepares a loaded policy for training and returns its optimizer.

    config: with learning_rate, gradient_checkpointing, compile and fsdp. forward: the function that is called
    with the policy, see distributed.bind_forward. optimizer_state: of a checkpoint.
    """
    if config.gradient_checkpointing:
        llms.checkpoint_gradients(policy)
    if config.compile:
        llms.compile_layers(policy)
    if config.fsdp:
        distributed.shard_model(policy, forward)
    optimizer = llms.make_optimizer(policy, config.learning_rate)
    if optimizer_state:
        distributed.load_optimizer_state(optimizer, optimizer_state)
    return optimizer


def set_learning_rate(optimizer, config, step: int, num_steps: int, decay: str = "linear") -> None:
    """Sets the learning rate of `step` (from 1) of num_steps: learning_rate x lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * lr_scale(
            step, num_steps, config.warmup_steps, config.final_lr_fraction, decay
        )


def lr_scale(step: int, num_steps: int, warmup_steps: int, final_fraction: float, decay: str = "linear") -> float:
    """Linear warm-up to 1 at the step after the warm-up, then decay to final_fraction at the last step.

    decay: "linear" | "cosine" (half a cosine).
    """
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps - 1) / max(1, num_steps - warmup_steps - 1))
    if decay == "linear":
        return 1 - done * (1 - final_fraction)
    return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * done)) / 2
