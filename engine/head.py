"""The head: from hidden states to the log-probs of sampled tokens, one chunk of logits at a time.

The logits of all positions together would be far larger than everything else in training. So the head runs over chunks
of positions, and its gradient is written by hand.
"""

import torch
from transformers import PreTrainedModel

# A chunk has at most this many logits, in fp32 (256 MiB): 441 positions of Qwen2.5's vocabulary. All positions of a
# step of 256 rows with 225 tokens would be 35 GB.
MAX_LOGITS = 2**26
# On a GPU (1 GiB): each chunk passes over the gradient of the weights, which takes as long as 441 positions do.
MAX_LOGITS_ON_GPU = 2**28


def max_logits(device_type: str) -> int:
    """Logits of a chunk, at most. device_type: "cuda", "cpu"..."""
    return MAX_LOGITS_ON_GPU if device_type == "cuda" else MAX_LOGITS


def fp32_logits(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """The head's logits in float32, for sampling. hidden: (n, H) -> (n, V). On a GPU they are computed as in training,
    because bf16 logits, rounded differently on both sides, would differ by hundredths."""
    if hidden.is_cuda and head.bias is None:
        return product_in_fp32(hidden, head.weight.T)
    return head(hidden).float()


def product_in_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32. (m, k), (k, n) -> (m, n). CUDA sums in float32 also where a and b have 16 bits, and can write
    these sums as they are: not rounded, and without another pass to convert them."""
    if a.is_cuda and a.dtype != torch.float32 and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def draw_logprobs(
    model: PreTrainedModel, hidden: torch.Tensor, draws: torch.Tensor, temperature: float
) -> torch.Tensor:
    """log softmax(head(hidden) / temperature) at `draws`. hidden: (N, H), draws: (N, K) -> (N, K) float32."""
    return DrawLogprobs.apply(hidden, model.get_output_embeddings().weight, draws, temperature)


class DrawLogprobs(torch.autograd.Function):
    """Log-probs of draws, in chunks of at most max_logits logits. hidden: (N, H), weight: (V, H), draws: (N, K).

    A single chunk is kept for the backward pass. Several are recomputed there, so the logits of at most one exist at
    any time. The gradient is written by hand, because autograd would pass over the logits about ten times. With
    p = softmax

        d log p[draw] / d logit[v] = ([v is the draw] - p[v]) / temperature

    overwrites the logits.
    """

    @staticmethod
    def forward(context, hidden, weight, draws, temperature):
        device = hidden.device.type
        size = max(1, max_logits(device) // len(weight))
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        context.settings = dtype, temperature
        context.chunks = [slice(start, start + size) for start in range(0, len(hidden), size)]
        context.save_for_backward(hidden, weight, draws)
        low_weight, logprobs = weight.to(dtype), []
        for rows in context.chunks:
            exps = None  # frees the chunk before
            at_draws, exps, total = _exponentials(hidden[rows].to(dtype), low_weight, draws[rows], temperature)
            logprobs.append(at_draws - total.log())
        context.kept = (exps, total) if len(context.chunks) == 1 else None
        return torch.cat(logprobs)

    @staticmethod
    def backward(context, gradient):
        hidden, weight, draws = context.saved_tensors
        dtype, temperature = context.settings
        kept, context.kept = context.kept, None  # else it would live as long as the whole graph
        low_weight, grad_hidden, grad_weight = weight.to(dtype), torch.empty_like(hidden), None
        for rows in context.chunks:
            exps = grad_logits = None  # frees the chunk before
            low_hidden, g = hidden[rows].to(dtype), gradient[rows] / temperature  # (n, H), (n, K)
            exps, total = kept or _exponentials(low_hidden, low_weight, draws[rows], temperature)[1:]
            grad_logits = exps.mul_(-g.sum(dim=-1, keepdim=True) / total).scatter_add_(1, draws[rows], g)  # (n, V)
            grad_logits = grad_logits.to(dtype)
            grad_hidden[rows] = (grad_logits @ low_weight).to(hidden.dtype)
            product = product_in_fp32(grad_logits.T, low_hidden)  # (V, H)
            grad_weight = product if grad_weight is None else grad_weight.add_(product)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _exponentials(hidden, weight, draws, temperature):
    """Logits at the temperature minus the largest of their row, in float32 -> those of the draws (n, K), the
    exponentials of all (n, V), and the sum of these (n, 1). hidden: (n, H), weight: (V, H), draws: (n, K)."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = product_in_fp32(hidden, weight.T)  # fp32 before any softmax
    if temperature != 1:  # a pass over all of them
        logits.div_(temperature)
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    at_draws = logits.gather(-1, draws)
    exps = logits.exp_()
    return at_draws, exps, exps.sum(dim=-1, keepdim=True)
