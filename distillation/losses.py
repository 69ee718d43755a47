"""What a student minimises: the likelihood of the teacher's tokens, or the distance from its distributions."""

import dataclasses
import math

import torch
from torch.utils.checkpoint import checkpoint

import llms
from analysis.measures import kl
from engine import head
from engine.head import head_logits
from rollout import Rollout


def divergence(student: torch.Tensor, teacher: torch.Tensor, loss: str, beta: float = 0.5) -> torch.Tensor:
    """How far the student is from the teacher at each position. Log-probs (N, V) of each -> (N,) nats, 0 when equal.

    fkl  KL(T || S): the student has to cover everything that is likely for the teacher (Hinton et al. 2015)
    rkl  KL(S || T): the student has to avoid what is unlikely for the teacher (MiniLLM, Gu et al. 2023)
    jsd  beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S: between the two, bounded, and
         symmetric at beta = 1/2 (generalised Jensen-Shannon; GKD, Agarwal et al. 2023, eq. 1)
    """
    if loss == "fkl":
        return kl(teacher, student)
    if loss == "rkl":
        return kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def token_losses(policy, teacher, rollout: Rollout, rows: list[int], loss: str, beta: float = 0.5) -> torch.Tensor:
    """The loss of every completion token of `rows`, the stop token included, prompts left out: (N,) float32.

    sft is -log S(token) of the teacher's tokens (sequence-level distillation, Kim and Rush 2016; R1's own loss). The
    others compare whole distributions after the same text and need a `teacher`; the text may be the teacher's or the
    student's. No gradient goes through the sampling of the student's own text (as in GKD). Tokens after one that the
    teacher does not have count 0.
    """
    if loss == "sft":
        logprobs = llms.completion_logprobs(policy, rollout, rows=rows).squeeze(-1)  # (b, T): one draw a position
        return -logprobs[rollout.completion_mask[rows]]
    # Heads may be padded to different widths (Qwen2.5: 151,936 up to 3B, 152,064 from 7B). No text has the tokens of
    # the padding, so both distributions are taken over the width that both have, renormalised there. A wider student
    # has to learn that too: its loss has -log of the probability that it gives to this width.
    width = min(policy.config.vocab_size, teacher.config.vocab_size)
    rows = torch.as_tensor(rows, device=rollout.draws.device)
    student_hidden, row, position = llms.completion_hidden(policy, rollout, rows)  # (N, H), (N,), (N,)
    readable = None
    if policy.config.vocab_size > width:  # its own text may have such a token, and the teacher cannot read on from it
        padding = (rollout.draws >= width).any(dim=-1)  # (B, T)
        readable = ((padding.cumsum(dim=1) - padding.long()) == 0)[rows[row], position]  # (N,)
        rollout = dataclasses.replace(rollout, draws=rollout.draws.clamp(max=width - 1))
    with torch.no_grad():
        teacher_hidden = llms.completion_hidden(teacher, rollout, rows)[0]  # (N, the teacher's H)

    device = rollout.draws.device.type
    low = dict(dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))

    def one_chunk(student_hidden, teacher_hidden):
        # Each chunk casts the head for itself: autograd then adds the chunks' gradients in the weights' fp32. Of one
        # cast for all, which autocast would keep, it would add them in 16 bits.
        with torch.autocast(device, cache_enabled=False, **low):
            student, teacher_logits = head_logits(policy, student_hidden), head_logits(teacher, teacher_hidden)
        in_width = student[:, :width]
        losses = divergence(in_width.log_softmax(dim=-1), teacher_logits[:, :width].log_softmax(dim=-1), loss, beta)
        if readable is None:
            return losses
        return losses + student.logsumexp(dim=-1) - in_width.logsumexp(dim=-1)

    # As in engine/head.py, the logits of at most one chunk exist at any time; if there are several chunks, they are
    # recomputed in the backward pass. Autograd keeps about four numbers for every logit of the two models.
    size = max(1, head.MAX_LOGITS // (4 * width))
    if len(student_hidden) <= size:
        losses = one_chunk(student_hidden, teacher_hidden)
    else:
        chunks = zip(student_hidden.split(size), teacher_hidden.split(size), strict=True)
        losses = torch.cat([checkpoint(one_chunk, s, t, use_reentrant=False) for s, t in chunks])
    return losses if readable is None else losses * readable
