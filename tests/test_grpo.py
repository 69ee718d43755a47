"""Tests of grpo.py: advantages, the KL estimate and the five losses against numbers worked out by hand, against a slow
loop written from the formulas, and against what the theory promises (unbiased estimates, REINFORCE on policy)."""

import itertools
import math

import pytest
import torch

from grpo import ADVANTAGE_SCALES, LOSS_TYPES, compute_advantages, importance_weights, kl_estimate, policy_loss

# Double precision throughout: two ways of writing the same formula must then agree to about 1e-15.
F64 = torch.float64


def tensor(values):
    return torch.tensor(values, dtype=F64)


def loss_and_gradient(logprobs, old_logprobs, advantages, mask, **settings):
    """policy_loss -> (loss, stats, gradient with respect to logprobs)."""
    logprobs = logprobs.detach().clone().requires_grad_()
    loss, stats = policy_loss(logprobs, old_logprobs, advantages, mask, **settings)
    assert loss.dim() == 0
    return loss.detach(), stats, torch.autograd.grad(loss, logprobs)[0]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# ---- Advantages ------------------------------------------------------------------------------------------------------


def test_scale_group_divides_by_the_unbiased_std_of_the_group():
    # group 1: mean 0.25, squared deviations 0.5625 + 3 x 0.0625 = 0.75, / (4 - 1) = 0.25, std 0.5
    #          0.75 / 0.5001 = 1.49970, -0.25 / 0.5001 = -0.49990
    # group 2: mean 1.5, squared deviations 2.25 + 3 x 0.25 = 3, / 3 = 1, std 1
    #          1.5 / 1.0001 = 1.49985, -0.5 / 1.0001 = -0.49995
    advantages = compute_advantages(torch.tensor([1.0, 0, 0, 0, 1, 3, 1, 1]), group_size=4, scale="group")
    expected = [1.499700, -0.499900, -0.499900, -0.499900, -0.499950, 1.499850, -0.499950, -0.499950]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)


def test_scale_batch_divides_by_the_std_of_all_rewards():
    # group means 2 and 0; all four: mean 1, squared deviations 9 + 3 x 1 = 12, / (4 - 1) = 4, std 2
    # (4 - 2) / 2.0001 = 0.99995, (0 - 2) / 2.0001 = -0.99995
    advantages = compute_advantages(torch.tensor([4.0, 0, 0, 0]), group_size=2, scale="batch")
    assert advantages.tolist() == pytest.approx([0.999950, -0.999950, 0, 0], abs=1e-6)


def test_scale_none_only_centres():
    # group means 0.25 and 1.5
    advantages = compute_advantages(torch.tensor([1.0, 0, 0, 0, 1, 3, 1, 1]), group_size=4, scale="none")
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25, -0.5, 1.5, -0.5, -0.5]


def test_group_is_the_default_scale_and_integer_rewards_will_do():
    rewards = torch.tensor([1, 0, 0, 0])
    assert torch.equal(compute_advantages(rewards, 4), compute_advantages(rewards.float(), 4, "group"))


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
@pytest.mark.parametrize(
    "rewards, group_size", [([1.0], 1), ([1.0, 1, 1], 3), ([0.0, 0, 0], 3), ([1.0, 1, 0, 0], 2), ([2.0, 0, 1], 1)]
)
def test_nothing_to_compare_with_gives_zero(rewards, group_size, scale):
    # The std of one number is 0 / 0, that of equal ones 0: neither may come through as nan or inf.
    assert compute_advantages(torch.tensor(rewards), group_size, scale).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
def test_equal_fractional_rewards_give_exactly_nothing(scale):
    # The float32 mean of eight times 0.7 is not quite 0.7, and Adam makes a full step of the smallest gradient.
    advantages = compute_advantages(torch.full((8,), 0.7), 8, scale)
    assert (advantages == 0).all()


@pytest.mark.parametrize("scale", ["group", "none"])
def test_groups_are_independent(scale):
    one, other = torch.tensor([1.0, 0, 0, 2]), torch.tensor([5.0, -3, 0.5, 9])
    both = compute_advantages(torch.cat([one, other]), 4, scale)
    assert torch.equal(both, torch.cat([compute_advantages(one, 4, scale), compute_advantages(other, 4, scale)]))


def test_with_scale_batch_groups_share_the_divisor_but_not_the_mean():
    one, other = torch.tensor([1.0, 0, 0, 2]), torch.tensor([5.0, -3, 0.5, 9])
    both = compute_advantages(torch.cat([one, other]), 4, "batch")
    divisor = torch.cat([one, other]).std() + 1e-4
    torch.testing.assert_close(both[:4], (one - one.mean()) / divisor)
    torch.testing.assert_close(both[4:], (other - other.mean()) / divisor)


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
def test_advantages_sum_to_zero_in_each_group_and_ignore_a_constant(scale):
    rewards = torch.tensor([1.0, 0, 0, 2, 5, -3, 0.5, 9])
    advantages = compute_advantages(rewards, 4, scale)
    torch.testing.assert_close(advantages.view(2, 4).sum(dim=1), torch.zeros(2))
    torch.testing.assert_close(compute_advantages(rewards + 8, 4, scale), advantages)


def test_unknown_scale_names_the_choices():
    with pytest.raises(ValueError, match="'std'.*group, batch, none"):
        compute_advantages(torch.tensor([1.0, 0]), 2, scale="std")


def test_a_row_dropped_from_the_loss_still_counts_in_the_baseline():
    # A truncated answer may be masked out of the loss, but its reward is part of what its siblings are compared with.
    rewards = torch.tensor([1.0, 0, 0, 1])
    advantages = compute_advantages(rewards, 4, "none")  # +-0.5; without the last row it would be 2/3, -1/3, -1/3
    logprobs, mask = -torch.ones(4, 1), torch.tensor([[True], [True], [True], [False]])
    _, _, gradient = loss_and_gradient(logprobs, None, advantages, mask)
    # -A / 3 rows that are left
    torch.testing.assert_close(gradient, torch.tensor([[-0.5 / 3], [0.5 / 3], [0.5 / 3], [0]]))


# ---- KL --------------------------------------------------------------------------------------------------------------


def test_kl_by_hand():
    # policy 0.5, reference 0.25: ratio 0.5, so 0.5 - ln 0.5 - 1 = 0.5 + 0.693147 - 1 = 0.193147
    # policy 0.25, reference 0.5: ratio 2, so 2 - ln 2 - 1 = 0.306853
    kl = kl_estimate(tensor([0.5, 0.25]).log(), tensor([0.25, 0.5]).log())
    assert kl.tolist() == pytest.approx([0.193147, 0.306853], abs=1e-6)


def test_kl_is_zero_at_equality_and_nowhere_negative():
    logprobs, other = torch.randn(2, 1000, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kl_estimate(logprobs, logprobs), torch.zeros(1000, dtype=F64))
    assert (kl_estimate(logprobs, other) > 0).all()


def test_kl_is_unbiased():
    # The expectation over the policy's own samples, by enumeration of all of them.
    policy, reference = tensor([0.5, 0.3, 0.15, 0.05]), tensor([0.1, 0.2, 0.3, 0.4])
    expected = sum(p * kl_estimate(p.log(), q.log()) for p, q in zip(policy, reference, strict=True))
    true_kl = (policy * (policy / reference).log()).sum()
    assert_close(expected, true_kl)


# ---- The losses by hand ----------------------------------------------------------------------------------------------
#
# Four rows of 2, 1, 3 and 2 tokens: every sign of A with ratios on every side of the interval [0.85, 1.1].
# * marks a token whose ratio is clipped: it has left the interval in the direction in which A pushes it.
#
#              ratio   -min(ratio A, clip(ratio) A)     gradient -ratio A      log p   cispo: -min(ratio, 1.1) A log p
#  a  A = +1   1.6     -min( 1.60,  1.10) = -1.1  *     0                       -1      -1.1  x  1 x -1 =  1.1  *
#              0.9     -min( 0.90,  0.90) = -0.9        -0.9                    -2      -0.9  x  1 x -2 =  1.8
#  b  A = -1   1.2     -min(-1.20, -1.10) =  1.2        +1.2                    -1      -1.1  x -1 x -1 = -1.1  *
#  c  A = +2   0.5     -min( 1.00,  1.70) = -1.0        -1.0                    -1      -0.5  x  2 x -1 =  1.0
#              1.28    -min( 2.56,  2.20) = -2.2  *     0                       -2      -1.1  x  2 x -2 =  4.4  *
#              0.8     -min( 1.60,  1.70) = -1.6        -1.6                    -1      -0.8  x  2 x -1 =  1.6
#  d  A = -2   0.64    -min(-1.28, -1.70) =  1.7  *     0                       -2      -0.64 x -2 x -2 = -2.56
#              1.0     -min(-2.00, -2.00) =  2.0        +2.0                    -1      -1.0  x -2 x -1 = -2.0
#
# gspo, where the row's ratio is the geometric mean of its tokens' ratios:
#  a  sqrt(1.6 x 0.9) = sqrt(1.44) = 1.2              -min( 1.2,  1.1) = -1.1  *    gradient  0
#  b  1.2                                             -min(-1.2, -1.1) =  1.2       gradient  +1.2
#  c  cbrt(0.5 x 1.28 x 0.8) = cbrt(0.512) = 0.8      -min( 1.6,  1.7) = -1.6       gradient  -1.6, a third per token
#  d  sqrt(0.64 x 1.0) = 0.8                          -min(-1.6, -1.7) =  1.7  *    gradient  0

LOGPROBS = tensor([[-1, -2, 0], [-1, 0, 0], [-1, -2, -1], [-2, -1, 0]])
RATIO = tensor([[1.6, 0.9, 1], [1.2, 1, 1], [0.5, 1.28, 0.8], [0.64, 1, 1]])
OLD_LOGPROBS = LOGPROBS - RATIO.log()
ADVANTAGES = tensor([1, -1, 2, -2])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
CLIP = {"clip_low": 0.15, "clip_high": 0.1}

BY_HAND = {
    # means of the rows: -2.0 / 2 = -1, 1.2, -4.8 / 3 = -1.6, 3.7 / 2 = 1.85; their mean: 0.45 / 4
    "grpo": 0.1125,
    # -2.0 + 1.2 - 4.8 + 3.7 = -1.9; 8 tokens
    "dapo": -0.2375,
    # -1.9; 4 rows of at most 5
    "dr_grpo": -0.095,
    # (-1.1 + 1.2 - 1.6 + 1.7) / 4
    "gspo": 0.05,
    # 1.1 + 1.8 - 1.1 + 1.0 + 4.4 + 1.6 - 2.56 - 2.0 = 4.24; 8 tokens
    "cispo": 0.53,
}
# grpo, dapo, dr_grpo and cispo: 3 of 8 tokens; gspo: all four tokens of rows a and d
CLIP_FRAC_BY_HAND = {"grpo": 3 / 8, "dapo": 3 / 8, "dr_grpo": 3 / 8, "gspo": 4 / 8, "cispo": 3 / 8}

CLIPPED_GRADIENT = tensor([[0, -0.9, 0], [1.2, 0, 0], [-1.0, 0, -1.6], [0, 2.0, 0]])
ROW_TOKENS = tensor([[2], [1], [3], [2]])
GRADIENT_BY_HAND = {
    "grpo": CLIPPED_GRADIENT / ROW_TOKENS / 4,
    "dapo": CLIPPED_GRADIENT / 8,
    "dr_grpo": CLIPPED_GRADIENT / (4 * 5),
    "gspo": tensor([[0, 0, 0], [1.2, 0, 0], [-1.6 / 3, -1.6 / 3, -1.6 / 3], [0, 0, 0]]) / 4,
    # The weight is a constant, so the gradient is -min(ratio, 1.1) A: the clipped tokens keep theirs.
    "cispo": tensor([[-1.1, -0.9, 0], [1.1, 0, 0], [-1.0, -2.2, -1.6], [1.28, 2.0, 0]]) / 8,
}


def by_hand(loss_type, **settings):
    settings = {"loss_type": loss_type, "max_length": 5, **CLIP, **settings}
    return loss_and_gradient(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, MASK, **settings)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradient_and_clip_frac_by_hand(loss_type):
    loss, stats, gradient = by_hand(loss_type)
    assert loss.item() == pytest.approx(BY_HAND[loss_type], abs=1e-12)
    assert_close(gradient, GRADIENT_BY_HAND[loss_type])
    assert stats == {"clip_frac": pytest.approx(CLIP_FRAC_BY_HAND[loss_type])}


def test_grpo_is_the_default():
    loss, _ = policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, MASK)
    same, _ = policy_loss(LOGPROBS, OLD_LOGPROBS, ADVANTAGES, MASK, loss_type="grpo", clip_low=0.2, clip_high=0.2)
    assert torch.equal(loss, same)


def test_a_clipped_token_loses_its_gradient_in_grpo_and_keeps_it_in_cispo():
    # The tokens marked * in both columns of the table: the ratio is above 1.1 and A would push it further up.
    clipped = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]).bool()
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        assert (by_hand(loss_type)[2][clipped] == 0).all()
    assert (by_hand("cispo")[2][clipped] < 0).all()  # still made likelier


def test_gspo_has_one_ratio_a_row():
    # Moving log-ratio from one token of a row to another changes nothing: only the row's mean counts.
    loss, stats, gradient = by_hand("gspo", clip_low=0.9, clip_high=0.9)
    moved = OLD_LOGPROBS + tensor([[0.7, -0.7, 0], [0, 0, 0], [0.3, 0.4, -0.7], [-1, 1, 0]])
    settings = {"loss_type": "gspo", "clip_low": 0.9, "clip_high": 0.9}
    moved_loss, moved_stats, moved_gradient = loss_and_gradient(LOGPROBS, moved, ADVANTAGES, MASK, **settings)
    assert_close(moved_loss, loss)
    assert_close(moved_gradient, gradient)
    assert moved_stats == stats
    # and every token of a row has the same gradient: -ratio A / tokens / rows
    expected = tensor([[-1.2], [1.2], [-1.6], [1.6]]) / ROW_TOKENS / 4
    assert_close(gradient, expected.expand(4, 3) * MASK)


def test_several_draws_at_a_position_by_hand():
    # One row, A = +1, two positions: draws of ratio 1.6 and 0.9 at the first, one of ratio 0.5625 at the second.
    #   grpo  the position's term is the sum of its draws': -(1.2 + 0.9) = -2.1 and -0.5625; mean of 2: -1.33125
    #   gspo  divided by positions, not draws: sqrt(1.6 x 0.9 x 0.5625) = sqrt(0.81) = 0.9; the term counts once a
    #         position: (-0.9 - 0.9) / 2 = -0.9
    #   clip_frac  half of the first position, nothing of the second: (0.5 + 0) / 2 = 0.25
    old_logprobs = -tensor([[[1.6, 0.9], [0.5625, 1]]]).log()
    mask = torch.tensor([[[True, True], [True, False]]])
    logprobs, advantages = torch.zeros_like(old_logprobs), tensor([1])
    loss, stats, gradient = loss_and_gradient(logprobs, old_logprobs, advantages, mask, loss_type="grpo")
    assert loss.item() == pytest.approx(-1.33125)
    assert stats["clip_frac"] == pytest.approx(0.25)
    assert_close(gradient, tensor([[[0, -0.45], [-0.28125, 0]]]))
    loss, stats, gradient = loss_and_gradient(logprobs, old_logprobs, advantages, mask, loss_type="gspo")
    assert loss.item() == pytest.approx(-0.9)
    assert stats["clip_frac"] == 0
    assert_close(gradient, tensor([[[-0.45, -0.45], [-0.45, 0]]]))  # -0.9 over 2 positions, for each draw


# ---- The losses, slowly ----------------------------------------------------------------------------------------------


def slow_policy_loss(
    logprobs, old_logprobs, advantages, mask, *, loss_type, clip_low, clip_high, max_length, ref_logprobs, beta,
    draw_weights=None,
):  # fmt: skip
    """The formulas, one draw at a time: no padding, no broadcasting, no masks in the arithmetic. All (B, T, K)."""
    rows = []  # of lists of positions, of lists of draws, each (row, position, draw)
    for b, row_mask in enumerate(mask.tolist()):
        positions = [[(b, t, k) for k, real in enumerate(draws) if real] for t, draws in enumerate(row_mask)]
        positions = [draws for draws in positions if draws]
        if positions:
            rows.append(positions)
    num_tokens = sum(len(positions) for positions in rows)

    def objective(ratio, A):
        """min(ratio A, clip(ratio) A), and whether it is the clipped side."""
        clipped_ratio = max(1 - clip_low, min(ratio, 1 + clip_high))
        return (clipped_ratio * A, True) if clipped_ratio * A < ratio * A else (ratio * A, False)

    loss = clip_frac = kl = 0.0
    for positions in rows:
        A = advantages[positions[0][0][0]]
        row_log_ratio = sum(logprobs[i] - old_logprobs[i] for draws in positions for i in draws)
        row_objective, row_clipped = objective(torch.exp(row_log_ratio / len(positions)), A)
        row_sum = 0.0
        for draws in positions:
            token_loss, clipped = 0.0, []
            for i in draws:
                ratio = torch.exp(logprobs[i] - old_logprobs[i])
                weight = 1.0 if draw_weights is None else draw_weights[i].item()
                if loss_type == "cispo":
                    token_loss -= weight * min(ratio.item(), 1 + clip_high) * A * logprobs[i]
                    clipped.append(ratio.item() > 1 + clip_high and A.item() != 0)
                elif loss_type == "gspo":  # the row's one term, shared by the position's draws
                    token_loss -= weight * row_objective / len(draws)
                    clipped.append(row_clipped)
                else:
                    draw_objective, draw_clipped = objective(ratio, A)
                    token_loss -= weight * draw_objective
                    clipped.append(draw_clipped)
            clip_frac += sum(clipped) / len(draws) / num_tokens
            if ref_logprobs is not None:
                log_ratios = [ref_logprobs[i] - logprobs[i] for i in draws]
                token_kl = sum(torch.exp(log_ratio) - log_ratio - 1 for log_ratio in log_ratios)
                token_loss += beta * token_kl
                kl += token_kl.item() / len(draws) / num_tokens
            row_sum += token_loss
        if loss_type in ("grpo", "gspo"):
            loss += row_sum / len(positions) / len(rows)
        elif loss_type in ("dapo", "cispo"):
            loss += row_sum / num_tokens
        elif loss_type == "dr_grpo":
            loss += row_sum / (len(logprobs) * max_length)  # a constant: rows without a real draw count
    return loss, {"clip_frac": clip_frac} | ({} if ref_logprobs is None else {"kl": kl})


def random_step(shape, seed=0):
    """Log-probs, old and reference ones, advantages and mask of six rows of random holes; row 3 has no real draw.

    Rows lean to both sides of the interval under both signs of A, so that gspo's row ratios are clipped as well."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(shape, dtype=F64, generator=generator)
    lean = tensor([0.5, -0.5, 0.5, 0, -0.5, 0]).view(-1, *[1] * (len(shape) - 1))
    old_logprobs = logprobs - lean - 0.3 * torch.randn(shape, dtype=F64, generator=generator)
    ref_logprobs = logprobs + 0.5 * torch.randn(shape, dtype=F64, generator=generator)
    advantages = tensor([1.5, -0.7, -1.2, 0.8, 2.0, -0.3])
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[3] = False
    mask[0, 2] = False  # a position without a real draw inside a row
    mask[0, 1] = mask[0, 3] = True
    return logprobs, old_logprobs, ref_logprobs, advantages, mask


SHAPES = [(6, 5), (6, 5, 3)]  # (B, T), (B, T, K)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("beta", [None, 0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_fast_equals_slow(loss_type, shape, beta, seed):
    logprobs, old_logprobs, ref_logprobs, advantages, mask = random_step(shape, seed)
    settings = {"loss_type": loss_type, "clip_low": 0.1, "clip_high": 0.25, "max_length": 7}
    settings |= {"ref_logprobs": None, "beta": 0.0} if beta is None else {"ref_logprobs": ref_logprobs, "beta": beta}
    loss, stats, gradient = loss_and_gradient(logprobs, old_logprobs, advantages, mask, **settings)

    logprobs.requires_grad_()
    if settings["ref_logprobs"] is not None:
        settings["ref_logprobs"] = ref_logprobs.view(6, 5, -1)
    slow_loss, slow_stats = slow_policy_loss(
        logprobs.view(6, 5, -1), old_logprobs.view(6, 5, -1), advantages, mask.view(6, 5, -1), **settings
    )
    slow_gradient = torch.autograd.grad(slow_loss, logprobs)[0]

    assert 0 < stats["clip_frac"] < 1  # both branches are on trial
    assert_close(loss, slow_loss.detach())
    assert_close(gradient, slow_gradient)
    assert stats == pytest.approx(slow_stats)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_draw_with_and_without_its_dimension(loss_type):
    logprobs, old_logprobs, ref_logprobs, advantages, mask = random_step((6, 5))
    settings = {"loss_type": loss_type, "max_length": 7, "beta": 0.3}
    loss, stats, gradient = loss_and_gradient(
        logprobs, old_logprobs, advantages, mask, ref_logprobs=ref_logprobs, **settings
    )
    same_loss, same_stats, same_gradient = loss_and_gradient(
        logprobs[..., None],
        old_logprobs[..., None],
        advantages,
        mask[..., None],
        ref_logprobs=ref_logprobs[..., None],
        **settings,
    )
    assert torch.equal(loss, same_loss)
    assert stats == same_stats
    assert torch.equal(gradient, same_gradient.squeeze(-1))


# ---- Micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up_to_the_batch(loss_type, shape):
    logprobs, old_logprobs, ref_logprobs, advantages, mask = random_step(shape)
    lengths = [2, 5, 4, 3, 1, 3]
    for row, length in enumerate(lengths):
        mask[row, length:] = False
    mask[4, 0] = True  # row 4 is one token; row 3 stays dropped
    settings = {"loss_type": loss_type, "max_length": 7, "beta": 0.3}
    whole = loss_and_gradient(logprobs, old_logprobs, advantages, mask, ref_logprobs=ref_logprobs, **settings)

    positions = mask.view(6, 5, -1).any(dim=-1)
    totals = {"num_rows": positions.any(dim=1).sum().item(), "num_tokens": positions.sum().item()}
    assert totals["num_rows"] == 5
    if settings["loss_type"] == "dr_grpo":  # divides by a constant
        totals["num_rows"] = 6

    loss, stats, gradient = 0, {"clip_frac": 0, "kl": 0}, torch.zeros_like(logprobs)
    for rows in ([0], [1, 2], [3], [5, 4]):  # sizes differ, [3] has nothing to learn from, order is free
        longest = max(lengths[row] for row in rows)  # each micro-batch is padded only to its own longest row
        part_loss, part_stats, part_gradient = loss_and_gradient(
            logprobs[rows, :longest],
            old_logprobs[rows, :longest],
            advantages[rows],
            mask[rows, :longest],
            ref_logprobs=ref_logprobs[rows, :longest],
            **settings,
            **totals,
        )
        loss += part_loss
        stats = {name: stats[name] + part_stats[name] for name in stats}
        gradient[rows, :longest] += part_gradient
    assert_close(loss, whole[0])
    assert stats == pytest.approx(whole[1])
    assert_close(gradient, whole[2])


@pytest.mark.parametrize("loss_type, expected", [("dapo", 1 / 4), ("cispo", 1 / 4), ("grpo", 1 / 2), ("gspo", 1 / 2)])
def test_why_the_totals_are_needed(loss_type, expected):
    # Rows of 1 and 3 tokens, a micro-batch each. What is the weight of the first row's one token? In an average over
    # tokens 1/4, in one over rows 1/2; but alone in its micro-batch, which knows of nothing else, it weighs 1.
    logprobs, advantages, mask = -torch.ones(1, 1, dtype=F64), tensor([-1]), torch.ones(1, 1, dtype=torch.bool)
    _, _, gradient = loss_and_gradient(logprobs, None, advantages, mask, loss_type=loss_type, num_rows=2, num_tokens=4)
    assert gradient.item() == expected
    _, _, gradient = loss_and_gradient(logprobs, None, advantages, mask, loss_type=loss_type)
    assert gradient.item() == 1


# ---- On policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_old_logprobs_means_the_policy_itself(loss_type, shape):
    logprobs, _, _, advantages, mask = random_step(shape)
    settings = {"loss_type": loss_type, "max_length": 7}
    loss, stats, gradient = loss_and_gradient(logprobs, None, advantages, mask, **settings)
    same_loss, same_stats, same_gradient = loss_and_gradient(logprobs, logprobs, advantages, mask, **settings)
    assert torch.equal(loss, same_loss)
    assert stats == same_stats == {"clip_frac": 0}
    assert torch.equal(gradient, same_gradient)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_the_gradient_is_reinforce(loss_type, shape):
    # At ratio 1 nothing is clipped and the gradient of the ratio is that of log p. What is left is
    # REINFORCE, -A grad log p, and the five losses differ only in what they divide it by.
    logprobs, _, _, advantages, mask = random_step(shape)
    _, _, gradient = loss_and_gradient(logprobs, None, advantages, mask, loss_type=loss_type, max_length=7)

    positions = mask.view(6, 5, -1).any(dim=-1)  # (B, T)
    row_tokens = positions.sum(dim=1)  # (B,)
    num_rows, num_tokens = 5, positions.sum()
    divisor = {
        "grpo": num_rows * row_tokens.clamp(min=1),
        "gspo": num_rows * row_tokens.clamp(min=1),
        "dapo": num_tokens.expand(6),
        "cispo": num_tokens.expand(6),
        "dr_grpo": torch.tensor(6 * 7).expand(6),
    }[loss_type]
    logprobs.requires_grad_()
    reinforce = -(advantages / divisor * (logprobs * mask).flatten(1).sum(dim=1)).sum()
    assert_close(gradient, torch.autograd.grad(reinforce, logprobs)[0])
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("group_size", [2, 3])
def test_expected_gradient_on_a_bandit_is_that_of_the_expected_reward(group_size):
    # A three-armed bandit: the policy is a softmax over three logits, an answer is one arm. Averaged exactly over every
    # group that could be sampled, the GRPO gradient is the true one times (G - 1) / G. An answer is part of its own
    # baseline, which takes away 1/G of its advantage; otherwise the group's mean does not bias the direction.
    logits = tensor([0.2, -0.4, 0.9]).requires_grad_()
    reward = torch.tensor([1.0, 0.0, 0.25])
    probs = logits.softmax(dim=0)
    true_gradient = torch.autograd.grad(probs @ reward.double(), logits)[0]

    expected_loss = 0.0
    for arms in itertools.product(range(3), repeat=group_size):
        arms = torch.tensor(arms)
        chance = logits.detach().softmax(dim=0)[arms].prod()
        advantages = compute_advantages(reward[arms], group_size, scale="none")
        logprobs = logits.log_softmax(dim=0)[arms].unsqueeze(1)  # (G, 1)
        loss, _ = policy_loss(logprobs, None, advantages, torch.ones(group_size, 1, dtype=torch.bool))
        expected_loss += chance * loss
    step = -torch.autograd.grad(expected_loss, logits)[0]  # the direction gradient descent takes

    assert torch.cosine_similarity(step, true_gradient, dim=0) > 0.9999
    # Advantages are float32, hence the tolerance.
    torch.testing.assert_close(step, (group_size - 1) / group_size * true_gradient, rtol=1e-5, atol=1e-7)


# ---- KL in the loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_moving_away_from_the_reference_raises_the_loss(loss_type):
    # With no advantage only the KL is left: zero at the reference, growing with distance on both sides.
    ref_logprobs, mask = -torch.ones(2, 3, dtype=F64), torch.ones(2, 3, dtype=torch.bool)
    settings = {"loss_type": loss_type, "max_length": 3, "ref_logprobs": ref_logprobs, "beta": 0.1}

    def at(shift):
        return loss_and_gradient(ref_logprobs + shift, None, tensor([0, 0]), mask, **settings)

    loss, stats, gradient = at(0)
    assert loss == 0 and stats["kl"] == 0 and not gradient.any()
    assert 0 < at(0.5)[0] < at(1.0)[0] and 0 < at(-0.5)[0] < at(-1.0)[0]
    assert (at(0.5)[2] > 0).all() and (at(-0.5)[2] < 0).all()  # descending pulls back
    # shift ln 2: the k3 of the test above, 0.193147, at each token
    loss, stats, _ = at(math.log(2))
    assert stats["kl"] == pytest.approx(0.193147, abs=1e-6)
    assert loss.item() == pytest.approx(0.0193147, abs=1e-7)


def test_the_logged_kl_of_several_draws_compares_with_that_of_one():
    """Each draw has the k3 of ln 2; the loss takes the sum of a position's draws."""
    for K in (1, 2, 3):
        logprobs = torch.zeros(2, 4, K)
        settings = {"ref_logprobs": logprobs - math.log(2), "beta": 0.1, "loss_type": "dapo"}
        loss, stats, _ = loss_and_gradient(logprobs, None, tensor([0, 0]), torch.ones_like(logprobs).bool(), **settings)
        assert stats["kl"] == pytest.approx(0.193147, abs=1e-6)
        assert loss.item() == pytest.approx(K * 0.0193147, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_beta_zero_only_logs_the_kl(loss_type):
    logprobs, old_logprobs, ref_logprobs, advantages, mask = random_step((6, 5))
    settings = {"loss_type": loss_type, "max_length": 7}
    loss, stats, gradient = loss_and_gradient(logprobs, old_logprobs, advantages, mask, **settings)
    logged_loss, logged_stats, logged_gradient = loss_and_gradient(
        logprobs, old_logprobs, advantages, mask, ref_logprobs=ref_logprobs, beta=0.0, **settings
    )
    assert torch.equal(logged_loss, loss)
    assert torch.equal(logged_gradient, gradient)
    assert "kl" not in stats
    expected_kl = kl_estimate(logprobs, ref_logprobs)[mask].mean().item()
    assert logged_stats == {"clip_frac": stats["clip_frac"], "kl": pytest.approx(expected_kl)}


def test_nothing_is_clipped_in_answers_without_an_advantage():
    """An update leaves them out, so their far ratios must not be counted by one loss and ignored by another."""
    logprobs, mask = torch.full((2, 3), 1.0), torch.ones(2, 3, dtype=torch.bool)
    for loss_type in LOSS_TYPES:
        _, stats, _ = loss_and_gradient(
            logprobs, torch.zeros(2, 3), tensor([1, 0]), mask, loss_type=loss_type, max_length=3
        )
        assert stats["clip_frac"] == 0.5


# ---- Masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("totals", [{}, {"num_rows": 0, "num_tokens": 0}, {"num_rows": 8, "num_tokens": 99}])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_everything_masked_gives_zero(loss_type, shape, totals):
    logprobs, old_logprobs, ref_logprobs, advantages, mask = random_step(shape)
    settings = {"loss_type": loss_type, "max_length": 7, "ref_logprobs": ref_logprobs, "beta": 0.3, **totals}
    for old in (old_logprobs, None):
        loss, stats, gradient = loss_and_gradient(logprobs, old, advantages, torch.zeros_like(mask), **settings)
        assert loss == 0
        assert stats == {"clip_frac": 0, "kl": 0}
        assert torch.equal(gradient, torch.zeros(shape, dtype=F64))


@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e300])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_entries_may_hold_anything(loss_type, shape, garbage):
    logprobs, old_logprobs, ref_logprobs, advantages, mask = random_step(shape)
    settings = {"loss_type": loss_type, "max_length": 7, "beta": 0.3}
    loss, stats, gradient = loss_and_gradient(
        logprobs, old_logprobs, advantages, mask, ref_logprobs=ref_logprobs, **settings
    )
    assert (gradient[~mask] == 0).all() and gradient[mask].any()

    clean = {"logprobs": logprobs, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    dirty = {name: values.masked_fill(~mask, garbage) for name, values in clean.items()}
    for names in [["logprobs"], ["old_logprobs"], ["ref_logprobs"], list(clean)]:
        inputs = clean | {name: dirty[name] for name in names}
        dirty_loss, dirty_stats, dirty_gradient = loss_and_gradient(
            **inputs, advantages=advantages, mask=mask, **settings
        )
        assert torch.equal(dirty_loss, loss)
        assert dirty_stats == stats
        assert torch.equal(dirty_gradient, gradient)  # nan equals nothing, so there is none


# ---- Importance weights: the actor is not quite the policy -----------------------------------------------------------


def test_importance_weights_by_hand():
    logprobs, sampled = tensor([[-1.0, -2.0, -0.5, -3.0]]), tensor([[-1.0, -2.5, -1.5, -2.0]])
    expected = [[1.0, math.exp(0.5), 2.0, math.exp(-1.0)]]  # p_policy / p_actor, the third one cut from e to 2
    assert_close(importance_weights(logprobs, sampled, 2.0), tensor(expected))
    assert importance_weights(logprobs, sampled, 1e9)[0, 2].item() == pytest.approx(math.e)
    assert importance_weights(logprobs, sampled, 1.0).max() == 1  # a cap of 1 only ever lowers


def test_importance_weights_of_the_policy_itself_are_exactly_one():
    logprobs, *_ = random_step((6, 5, 3))
    assert torch.equal(importance_weights(logprobs, logprobs, 1.0), torch.ones_like(logprobs))


def test_importance_weights_make_the_actors_samples_stand_for_the_policy():
    """Without a cap, the mean of weight * f over the actor's draws is the policy's mean of f."""
    generator = torch.Generator().manual_seed(0)
    policy, actor = (torch.log_softmax(torch.randn(50, dtype=F64, generator=generator), 0) for _ in range(2))
    f = torch.randn(50, dtype=F64, generator=generator)
    assert_close((actor.exp() * importance_weights(policy, actor, math.inf) * f).sum(), (policy.exp() * f).sum())


def random_draw_weights(shape, seed=0):
    return 0.5 + torch.rand(shape, dtype=F64, generator=torch.Generator().manual_seed(seed + 100))


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weighted_fast_equals_slow(loss_type, shape, beta):
    logprobs, old_logprobs, ref_logprobs, advantages, mask = random_step(shape)
    draw_weights = random_draw_weights(shape)
    settings = {"loss_type": loss_type, "clip_low": 0.1, "clip_high": 0.25, "max_length": 7, "beta": beta}
    loss, stats, gradient = loss_and_gradient(
        logprobs, old_logprobs, advantages, mask, ref_logprobs=ref_logprobs, draw_weights=draw_weights, **settings
    )
    logprobs.requires_grad_()
    slow_loss, slow_stats = slow_policy_loss(
        *(x.view(6, 5, -1) for x in (logprobs, old_logprobs)), advantages, mask.view(6, 5, -1),
        ref_logprobs=ref_logprobs.view(6, 5, -1), draw_weights=draw_weights.view(6, 5, -1), **settings,
    )  # fmt: skip
    assert_close(loss, slow_loss.detach())
    assert_close(gradient, torch.autograd.grad(slow_loss, logprobs)[0])
    assert stats == pytest.approx(slow_stats)  # neither the clip nor the KL is weighted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_of_one_change_nothing_and_weights_of_two_double(loss_type, shape):
    logprobs, old_logprobs, _, advantages, mask = random_step(shape)
    arguments = (logprobs, old_logprobs, advantages, mask)
    settings = {"loss_type": loss_type, "max_length": 7}
    plain = loss_and_gradient(*arguments, **settings)
    for weight in (1, 2):
        draw_weights = torch.full(shape, float(weight), dtype=F64)
        loss, stats, gradient = loss_and_gradient(*arguments, draw_weights=draw_weights, **settings)
        assert_close(loss, weight * plain[0])
        assert_close(gradient, weight * plain[2])
        assert stats == plain[1]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_kl_is_not_weighted(loss_type):
    """It is a property of the policy at the tokens that were drawn; a weight of 0 leaves it alone."""
    logprobs, old_logprobs, ref_logprobs, advantages, mask = random_step((6, 5))
    settings = {"loss_type": loss_type, "max_length": 7, "ref_logprobs": ref_logprobs, "beta": 0.3}
    silenced = loss_and_gradient(
        logprobs, old_logprobs, advantages, mask, draw_weights=torch.zeros(6, 5, dtype=F64), **settings
    )
    no_signal = loss_and_gradient(logprobs, old_logprobs, 0 * advantages, mask, **settings)
    assert_close(silenced[0], no_signal[0])
    assert_close(silenced[2], no_signal[2])
    assert silenced[0] > 0


@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_weights_may_be_anything(loss_type, shape, garbage):
    logprobs, old_logprobs, _, advantages, mask = random_step(shape)
    draw_weights = random_draw_weights(shape)
    settings = {"loss_type": loss_type, "max_length": 7}
    clean, dirty = (
        loss_and_gradient(logprobs, old_logprobs, advantages, mask, draw_weights=weights, **settings)
        for weights in (draw_weights, draw_weights.masked_fill(~mask, garbage))
    )
    assert torch.equal(dirty[0], clean[0]) and torch.equal(dirty[2], clean[2]) and dirty[1] == clean[1]


# ---- Errors ----------------------------------------------------------------------------------------------------------


def test_unknown_loss_type_names_the_choices():
    with pytest.raises(ValueError, match="'ppo'.*grpo, dapo, dr_grpo, gspo, cispo"):
        by_hand("ppo")


def test_dr_grpo_needs_max_length():
    with pytest.raises(ValueError, match="max_length"):
        by_hand("dr_grpo", max_length=None)
    for loss_type in LOSS_TYPES:
        if loss_type != "dr_grpo":
            by_hand(loss_type, max_length=None)  # the others do not ask for it
