"""Distillation losses where the student's head is wider than the teacher's (its tokens beyond are padding)."""

import pytest
import torch
import transformers as T
from random_models import PROMPTS, random_model

from distillation.losses import token_losses
from engine import head
from rollout import generate

WIDTH = 512  # the teacher's


@pytest.fixture(scope="module")
def on_policy(tokenizer):
    """A wide student and its own answers, which have tokens that no teacher knows."""
    student = random_model(vocab_size=WIDTH + 128)
    rollout = generate(student, tokenizer, PROMPTS, group_size=3, max_new_tokens=20, seed=0)
    assert (rollout.draws >= WIDTH).any(), "the premise"
    return student, rollout


def naive(student, teacher, rollout, loss):
    """One row at a time; the teacher reads up to the first token that it does not have."""
    losses = []
    for row, n in enumerate(rollout.lengths.tolist()):
        text = rollout.trace_ids[row, :n]
        ids = torch.cat([rollout.prompt_ids[row], text])
        unknown = (text >= WIDTH).nonzero().flatten().tolist()
        m = unknown[0] + 1 if unknown else n  # positions that the teacher can judge
        start = len(rollout.prompt_ids[row]) - 1
        student_logits = student(ids[None]).logits[0, start : start + m]
        with torch.no_grad():
            t = teacher(ids[None, : start + m]).logits[0, start:].log_softmax(-1)
        s = student_logits[:, :WIDTH].log_softmax(-1)
        mixture = ((t.exp() + s.exp()) / 2).log()
        pairs = {"fkl": [(t, s)], "rkl": [(s, t)], "jsd": [(t, mixture), (s, mixture)]}[loss]
        distance = sum((a.exp() * (a - b)).sum(-1) for a, b in pairs) / len(pairs)
        in_width = student_logits.softmax(-1)[:, :WIDTH].sum(-1).log()
        losses.append(torch.cat([distance - in_width, torch.zeros(n - m)]))
    return torch.cat(losses)


@pytest.mark.parametrize("loss", ["fkl", "rkl", "jsd"])
@pytest.mark.parametrize("max_logits", [2**26, 3000])
def test_a_student_that_is_wider_than_its_teacher_trains_on_its_own_text(on_policy, monkeypatch, loss, max_logits):
    monkeypatch.setattr(head, "MAX_LOGITS", max_logits)
    student, rollout = on_policy
    teacher = random_model(seed=1)
    results = []
    for losses_of in (lambda: token_losses(student, teacher, rollout, range(12), loss),
                      lambda: naive(student, teacher, rollout, loss)):  # fmt: skip
        student.zero_grad()
        losses = losses_of()
        losses.sum().backward()
        results.append([losses.detach(), *(p.grad.clone() for p in student.parameters())])
    assert torch.isfinite(results[0][0]).all()
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, atol=2e-4 * max(1, expected.abs().max()))


def test_the_student_learns_that_no_text_has_the_padding(on_policy):
    student, rollout = on_policy
    token_losses(student, random_model(seed=1), rollout, range(12), "fkl").sum().backward()
    bias_like = student.lm_head.weight.grad  # the gradient of a padding token's row points along the hidden states
    assert (bias_like[WIDTH:].abs().sum(dim=-1) > 0).all()
    student.zero_grad()


def test_heads_with_a_scale_are_compared_as_the_models_compute_them(tokenizer):
    sizes = dict(
        vocab_size=512, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=256, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = T.AutoModelForCausalLM.from_config(T.CohereConfig(**sizes, logit_scale=4.0)).eval()
    student, rollout = random_model(), generate(random_model(), tokenizer, PROMPTS, max_new_tokens=9, seed=0)
    losses = token_losses(student, teacher, rollout, [0], "fkl")
    ids = torch.cat([rollout.prompt_ids[0], rollout.trace_ids[0, : len(losses)]])
    t, s = (m(ids[None]).logits[0, -len(losses) - 1 : -1].log_softmax(-1) for m in (teacher, student))
    assert torch.allclose(losses, (t.exp() * (t - s)).sum(-1), atol=1e-4)


def test_the_heads_gradient_is_the_fp32_sum_of_many_chunks(on_policy, monkeypatch):
    """Under autocast the products have 16 bits. A sum in 16 bits would lose what is small against it."""
    student, rollout = on_policy
    teacher, errors = random_model(seed=1), []
    weight = student.get_output_embeddings().weight

    def gradient(max_logits, dtype):
        monkeypatch.setattr(head, "MAX_LOGITS", max_logits)
        student.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = token_losses(student, teacher, rollout, range(12), "fkl")
        losses.sum().backward()
        return weight.grad.clone()

    exact = gradient(2**26, torch.float32)
    for max_logits in (2**26, 4 * WIDTH):  # all positions at once, and one at a time
        errors.append((gradient(max_logits, torch.bfloat16) - exact).norm() / exact.norm())
    assert errors[0] < 0.02 and errors[1] < 1.5 * errors[0], errors
