"""update.py: an update is the gradient that it claims to be, also with several steps per rollout and with an actor that
is not quite the policy."""

import math

import pytest
import torch
from random_models import PROMPTS, random_model
from small_runs import tiny_config

import grpo
import llms
from rollout import generate
from update import TokenBudget, all_logprobs, lr_scale, update

# ---------------------------------------------------------------- one update


def rollout_and_advantages(model, tokenizer, group_size=4):
    rollout = generate(model, tokenizer, PROMPTS, group_size=group_size, max_new_tokens=20, seed=0)
    assert len(set(rollout.lengths.tolist())) > 3
    torch.manual_seed(1)
    rewards = torch.randint(3, (len(rollout.texts),)) / 2
    rewards[:group_size] = 1.0  # one group without variance
    return rollout, grpo.compute_advantages(rewards, group_size)


def weights_after_update(tokenizer, advantages=None, model=None, **overrides):
    model = model or random_model()
    rollout, own_advantages = rollout_and_advantages(random_model(), tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = tiny_config("unused", minibatches=1, max_grad_norm=1e9, **overrides)
    before = [p.detach().clone() for p in model.parameters()]
    stats = update(model, model, None, optimizer, rollout, own_advantages if advantages is None else advantages, config)
    return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)], stats


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_update_is_the_gradient_of_the_plain_loss_on_all_rows(tokenizer, loss_type):
    """Micro-batches, sorting and leaving out rows without advantage must not change the step."""
    model = random_model()
    rollout, advantages = rollout_and_advantages(model, tokenizer)
    logprobs = llms.completion_logprobs(model, rollout)
    loss, _ = grpo.policy_loss(logprobs, None, advantages, rollout.draw_mask, loss_type=loss_type, max_length=20)
    loss.backward()
    for budget in (1, 100, 10**6):  # one row, a few, all in a micro-batch
        moved, stats = weights_after_update(
            tokenizer, loss_type=loss_type, max_completion_length=20, tokens_per_micro_batch=budget
        )
        for delta, parameter in zip(moved, model.parameters(), strict=True):
            assert torch.allclose(delta, -0.1 * parameter.grad, atol=1e-6)
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert stats["lr"] == 0.1 and stats["logprob_gap"] < 1e-4


def test_a_step_without_any_signal_changes_nothing(tokenizer):
    moved, stats = weights_after_update(tokenizer, advantages=torch.zeros(16))
    assert all((delta == 0).all() for delta in moved)
    assert stats["grad_norm"] == 0


def test_a_gradient_that_is_not_finite_is_skipped(tokenizer):
    moved, stats = weights_after_update(tokenizer, advantages=torch.full((16,), math.inf))
    assert all((delta == 0).all() for delta in moved) and stats["skipped_updates"] == 1


def test_masked_truncated_rows_keep_their_place_in_the_baseline_but_not_in_the_loss(tokenizer):
    rollout, advantages = rollout_and_advantages(random_model(), tokenizer)
    truncated = torch.tensor([finish == "length" for finish in rollout.finish])
    assert 0 < truncated.sum() < 16
    masked, _ = weights_after_update(tokenizer, mask_truncated=True)
    by_hand = random_model()
    mask = rollout.draw_mask & ~truncated.view(-1, 1, 1)
    logprobs = llms.completion_logprobs(by_hand, rollout)
    grpo.policy_loss(logprobs, None, advantages, mask, loss_type="dr_grpo", max_length=72)[0].backward()
    for delta, parameter in zip(masked, by_hand.parameters(), strict=True):
        assert torch.allclose(delta, -0.1 * parameter.grad, atol=1e-6)


def test_masking_rows_leaves_dr_grpos_gradient_of_the_others_as_it_is(tokenizer):
    """Its divisor is a constant: masking rows whose advantage is 0 anyway gives the same step."""
    rollout, advantages = rollout_and_advantages(random_model(), tokenizer)
    truncated = torch.tensor([finish == "length" for finish in rollout.finish])
    silenced = advantages.masked_fill(truncated, 0.0)
    settings = dict(advantages=silenced, max_completion_length=20)
    masked, plain = (weights_after_update(tokenizer, mask_truncated=on, **settings)[0] for on in (True, False))
    assert truncated.sum() > 4 and any((delta != 0).any() for delta in plain)
    for a, b in zip(masked, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("settings", [dict(updates_per_rollout=2), dict(minibatches=2), dict()])
def test_old_logprobs_are_those_of_the_policy_that_sampled(tokenizer, monkeypatch, settings):
    """The ratio is 1 at the first optimizer step and no longer at the second. A single step needs no old log-probs."""
    ratios = []

    def spy(logprobs, old_logprobs, advantages, mask, **options):
        old = logprobs.detach() if old_logprobs is None else old_logprobs
        ratios.append(torch.exp(logprobs.detach() - old)[mask])
        assert (old_logprobs is None) == (not settings)
        return grpo_loss(logprobs, old_logprobs, advantages, mask, **options)

    grpo_loss = grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", spy)
    model = random_model()
    rollout, advantages = rollout_and_advantages(model, tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    update(model, model, None, optimizer, rollout, advantages, tiny_config("unused", **{"minibatches": 1, **settings}))
    assert torch.allclose(ratios[0], torch.ones_like(ratios[0]), atol=1e-4)
    assert len(ratios) == (2 if settings else 1)
    if settings:
        assert (ratios[1] - 1).abs().max() > 1e-3


def test_a_bf16_actor_does_not_pass_for_the_policy(tokenizer, monkeypatch):
    """With several updates, old log-probs are the fp32 policy's, not those that the bf16 actor reported."""
    seen = []
    grpo_loss = grpo.policy_loss
    monkeypatch.setattr(
        grpo, "policy_loss", lambda lp, old, *a, **k: (seen.append((lp.detach(), old)), grpo_loss(lp, old, *a, **k))[1]
    )
    policy = random_model()
    actor = llms.make_actor(policy, torch.bfloat16)
    rollout, advantages = rollout_and_advantages(actor, tokenizer)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    stats = update(policy, actor, None, optimizer, rollout, advantages, tiny_config("unused", minibatches=2))
    assert torch.allclose(seen[0][0], seen[0][1], atol=1e-4)
    assert stats["logprob_gap"] > 1e-4  # what bf16 costs, in nats a token


def test_kl_is_exactly_zero_at_the_start_even_if_the_checkpoint_has_dropout(tokenizer, tmp_path):
    random_model(attention_dropout=0.3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, reference = (llms.load(str(tmp_path))[0] for _ in range(2))
    rollout, advantages = rollout_and_advantages(policy, tokenizer)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    config = tiny_config("unused", beta=0.1, minibatches=1)
    assert update(policy, policy, reference, optimizer, rollout, advantages, config)["kl"] == 0
    assert update(policy, policy, reference, optimizer, rollout, advantages, config)["kl"] > 0


def test_gradient_checkpointing_gives_the_same_step(tokenizer):
    checkpointed = random_model()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for a, b in zip(
        weights_after_update(tokenizer)[0], weights_after_update(tokenizer, model=checkpointed)[0], strict=True
    ):
        assert torch.allclose(a, b, atol=1e-7)


def test_micro_batches_keep_the_budget_and_every_row(tokenizer):
    rollout, _ = rollout_and_advantages(random_model(), tokenizer)
    prompts, lengths = [len(p) for p in rollout.prompt_ids], rollout.lengths.tolist()
    for budget in (1, 60, 150, 10**6):
        batches = llms.micro_batches(rollout, range(2, 16), budget)
        assert [row for batch in batches for row in batch] == list(range(2, 16))
        sizes = []
        for batch in batches:
            groups = {row // 4 for row in batch}  # a group's prompt counts once
            sizes.append(sum(prompts[4 * g] for g in groups) + sum(lengths[row] for row in batch))
            assert len(batch) == 1 or sizes[-1] <= budget
        for size, batch in zip(sizes[:-1], batches[1:], strict=True):  # none is cut before it is full
            first, alone = batch[0], batch[0] % 4 == 0 or batch[0] == 2
            assert size + lengths[first] + alone * prompts[first] > budget
    assert len(llms.micro_batches(rollout, range(16), 10**6)) == 1


def test_learning_rate_schedule():
    factors = [lr_scale(step, 11, warmup_steps=3, final_fraction=0.1) for step in range(1, 12)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[3:] == pytest.approx([1 - 0.9 * i / 7 for i in range(8)])
    assert min(lr_scale(step, 1, warmup_steps=0, final_fraction=0.1) for step in range(1, 4)) > 0


# ---------------------------------------------------------------- an actor that is not quite the policy


def slow_weighted_loss(model, rollout, advantages, old, weights, loss_type, max_length):
    """The loss of one optimizer step, a row at a time: plain forward passes, each token's term times its weight."""
    rows, num_tokens, sampled = [], int(rollout.lengths.sum()), rollout.logprobs[..., 0]
    for row, n in enumerate(rollout.lengths.tolist()):
        tokens, start = rollout.trace_ids[row, :n], len(rollout.prompt_ids[row])
        logits = model(torch.cat([rollout.prompt_ids[row], tokens])[None]).logits[0, start - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]  # (n,)
        before = logprobs.detach() if old is None else old[row]
        weight = (before - sampled[row, :n]).exp().clamp(max=1.3) if weights is None else weights[row]
        log_ratio = logprobs - before
        ratio = (log_ratio.mean() if loss_type == "gspo" else log_ratio).exp()
        A = advantages[row]
        if loss_type == "cispo":
            terms = -weight * ratio.clamp(max=1.2).detach() * A * logprobs
        else:
            terms = -weight * torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)
        rows.append((terms, before, weight))
    losses = [terms for terms, _, _ in rows]
    if loss_type in ("grpo", "gspo"):
        loss = sum(terms.mean() for terms in losses) / len(losses)
    else:
        loss = sum(terms.sum() for terms in losses)
        loss = loss / (len(losses) * max_length if loss_type == "dr_grpo" else num_tokens)
    return loss, [before for _, before, _ in rows], [weight for _, _, weight in rows]


def policy_and_a_noisy_actor(tokenizer):
    policy, actor = random_model(), random_model()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    rollout = generate(actor, tokenizer, PROMPTS, group_size=4, max_new_tokens=20, seed=0)
    return policy, actor, rollout, torch.randn(16)


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
@pytest.mark.parametrize("steps", [1, 2])
def test_draws_of_another_actor_are_weighted_as_the_slow_loss_says(tokenizer, loss_type, steps):
    """Over two passes: the weights are those of the policy that sampling began with, and nothing is differentiated
    through them."""
    policy, actor, rollout, advantages = policy_and_a_noisy_actor(tokenizer)
    by_hand = random_model()
    settings = dict(
        loss_type=loss_type, minibatches=1, updates_per_rollout=steps, max_grad_norm=1e9, rollout_is_cap=1.3,
        max_completion_length=20, tokens_per_micro_batch=100,
    )  # fmt: skip
    old = weights = None
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.01)
    for _ in range(steps):
        loss, old, weights = slow_weighted_loss(by_hand, rollout, advantages, old, weights, loss_type, 20)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat(weights)
    assert (weights == 1.3).any() and (weights < 1).any()

    def distance(**overrides):
        model = random_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        update(model, actor, None, optimizer, rollout, advantages, tiny_config("unused", **(settings | overrides)))
        pairs = zip(model.parameters(), by_hand.parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    start = max((a - b).abs().max().item() for a, b in zip(policy.parameters(), by_hand.parameters(), strict=True))
    assert distance() < 1e-3 * start
    assert distance(rollout_is_cap=0.0) > 0.05 * start, "without the weights it is another step"


@pytest.mark.parametrize("settings", [dict(), dict(updates_per_rollout=2)])
def test_weights_change_nothing_where_the_policy_itself_samples(tokenizer, settings):
    weighted, plain = (weights_after_update(tokenizer, rollout_is_cap=cap, **settings)[0] for cap in (2.0, 0.0))
    for a, b in zip(weighted, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_log_prob_gap_is_the_mean_difference_of_the_real_draws(tokenizer):
    policy, actor, rollout, advantages = policy_and_a_noisy_actor(tokenizer)
    expected = (llms.completion_logprobs(policy, rollout) - rollout.logprobs).abs()[rollout.draw_mask].mean().item()
    for budget in (100, 10**6):
        model = random_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        config = tiny_config("unused", minibatches=1, tokens_per_micro_batch=budget)
        stats = update(model, actor, None, optimizer, rollout, advantages, config)
        assert stats["logprob_gap"] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01


def test_compiled_layers_give_the_same_step(tokenizer):
    compiled = random_model()
    for layer in compiled.base_model.layers:  # without a compiler, whose speed is not the question here
        layer.mlp.compile(dynamic=True, backend="eager")
    for a, b in zip(
        weights_after_update(tokenizer)[0], weights_after_update(tokenizer, model=compiled)[0], strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6)


def test_out_of_memory_halves_the_micro_batch_and_tries_again(tokenizer, monkeypatch):
    expected, _ = weights_after_update(tokenizer)
    original = llms.completion_logprobs

    def short_of_memory(model, rollout, temperature, rows):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, rollout, temperature, rows)

    monkeypatch.setattr(llms, "completion_logprobs", short_of_memory)
    moved, stats = weights_after_update(tokenizer)
    assert stats["tokens_per_micro_batch"] < 200 and stats["updates"] == 1
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(moved, expected, strict=True))
    model, config = random_model(), tiny_config("unused")
    rollout, _ = rollout_and_advantages(model, tokenizer)
    budget = TokenBudget(10**6)
    assert torch.allclose(all_logprobs(model, rollout, config, budget), original(model, rollout), atol=1e-6)
    assert budget.tokens < 200, "old and reference passes go on with less too"
    monkeypatch.setattr(llms, "completion_logprobs", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(torch.OutOfMemoryError):
        weights_after_update(tokenizer)
    with pytest.raises(torch.OutOfMemoryError):
        all_logprobs(model, rollout, config, budget)
