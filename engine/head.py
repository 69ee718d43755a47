"""The head: from hidden states to the log-probs of sampled tokens, one chunk of logits at a time.

What a family does between its last hidden states and its logits is written here once. With the head's bias b, the scale
s and the cap c of its configuration,

    logits = c tanh(s (hidden W^T + b) / c)

Sampling and distillation call `head_logits`, training calls `draw_logprobs`.

The logits of all positions together would be far larger than everything else in training. So the head runs over chunks
of positions, and its gradient is written by hand.
"""

import torch
from transformers import PreTrainedModel

from engine.sampling import MIN_MASS

# A chunk has at most this many logits, in fp32 (256 MiB): 441 positions of Qwen2.5's vocabulary. All positions of a
# step of 256 rows with 225 tokens would be 35 GB.
MAX_LOGITS = 2**26
# On a GPU (1 GiB): each chunk passes over the gradient of the weights, which takes as long as 441 positions do.
MAX_LOGITS_ON_GPU = 2**28


def max_logits(device_type: str) -> int:
    """Logits of a chunk, at most. device_type: "cuda", "cpu"..."""
    return MAX_LOGITS_ON_GPU if device_type == "cuda" else MAX_LOGITS


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The precision of a matrix product with x: autocast's where that is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def product_in_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32. (m, k), (k, n) -> (m, n). CUDA sums in float32 also where a and b have 16 bits, and can write
    these sums as they are: not rounded, and without another pass to convert them."""
    if a.is_cuda and a.dtype != torch.float32 and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def scale_and_cap(config) -> tuple[float, float | None]:
    """What the logits are multiplied by, and the bound that tanh keeps them within (None: no bound)."""
    scale = 1.0
    if isinstance(getattr(config, "logit_scale", None), float | int):  # Cohere
        scale *= config.logit_scale
    if isinstance(getattr(config, "logits_scaling", None), float | int):  # Granite divides, HyperCLOVA X multiplies
        scale *= config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    return scale, getattr(config, "final_logit_softcapping", None) or None  # Gemma 2


def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The model's logits, as its own forward computes them. hidden: (..., H) -> (..., V) float32."""
    head = model.get_output_embeddings()
    if hidden.is_cuda and hidden.dim() == 2 and head.bias is None and not torch.is_grad_enabled():
        # Sampling: as in training, because bf16 logits, rounded differently on both sides, would differ by hundredths.
        logits = product_in_fp32(hidden, head.weight.T)
    else:
        logits = head(hidden).float()  # fp32 before any softmax
    scale, cap = scale_and_cap(model.config)
    if scale != 1:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def draw_logprobs(
    model: PreTrainedModel, hidden: torch.Tensor, draws: torch.Tensor, temperature: float, with_rest: bool = False
) -> torch.Tensor:
    """log softmax(head_logits / temperature) at `draws`. hidden: (N, H), draws: (N, K) -> (N, K) float32.

    with_rest: a last column more, (N, K + 1): the log of the mass that all other tokens have together.
    """
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return DrawLogprobs.apply(hidden, head.weight, draws, temperature, bias, *scale_and_cap(model.config), with_rest)


class DrawLogprobs(torch.autograd.Function):
    """Log-probs of draws, in chunks of at most max_logits logits. hidden: (N, H), weight: (V, H), draws: (N, K), bias:
    (V,) or None; scale and cap as in `scale_and_cap`.

    A single chunk is kept for the backward pass. Several are recomputed there, so the logits of at most one exist at
    any time. The gradient is written by hand, because autograd would pass over the logits about ten times. With
    p = softmax

        d log p[draw] / d logit[v] = ([v is the draw] - p[v]) / temperature

    overwrites the logits. Where they are capped, c tanh(x / c) has the slope 1 - tanh(x / c)^2, which takes as much
    memory again. With the rest (see draw_logprobs), whose mass is R,

        d log R / d logit[v] = ([v is no draw] p[v] / R - p[v]) / temperature
    """

    @staticmethod
    def forward(context, hidden, weight, draws, temperature, bias=None, scale=1.0, cap=None, with_rest=False):
        device = hidden.device.type
        size = max(1, max_logits(device) // len(weight))
        dtype = product_dtype(weight)
        low_bias = None if bias is None else bias.to(dtype)
        context.settings = dtype, temperature, scale, cap, with_rest
        context.chunks = [slice(start, start + size) for start in range(0, len(hidden), size)]
        context.save_for_backward(hidden, weight, draws, bias)
        low_weight, logprobs = weight.to(dtype), []
        for rows in context.chunks:
            exps = slope = None  # frees the chunk before
            at_draws, exps, total, slope = _exponentials(
                hidden[rows].to(dtype), low_weight, draws[rows], temperature, low_bias, scale, cap
            )
            if with_rest:
                at_draws = torch.cat([at_draws, mass_outside(exps, draws[rows]).log()], dim=-1)
            logprobs.append(at_draws - total.log())
        context.kept = (exps, total, slope) if len(context.chunks) == 1 else None
        return torch.cat(logprobs)

    @staticmethod
    def backward(context, gradient):
        hidden, weight, draws, bias = context.saved_tensors
        dtype, temperature, scale, cap, with_rest = context.settings
        kept, context.kept = context.kept, None  # else it would live as long as the whole graph
        low_weight, grad_hidden, grad_weight = weight.to(dtype), torch.empty_like(hidden), None
        low_bias, grad_bias = (None, None) if bias is None else (bias.to(dtype), torch.zeros_like(bias))
        for rows in context.chunks:
            exps = grad_logits = slope = None  # frees the chunk before
            low_hidden, g = hidden[rows].to(dtype), gradient[rows] / temperature  # (n, H), (n, K)
            exps, total, slope = (
                kept or _exponentials(low_hidden, low_weight, draws[rows], temperature, low_bias, scale, cap)[1:]
            )
            factor = -g.sum(dim=-1, keepdim=True) / total  # (n, 1)
            if with_rest:
                g, g_rest = g[:, :-1], g[:, -1:]
                at_draws = exps.gather(1, draws[rows]) * factor
                factor = factor + g_rest / mass_outside(exps, draws[rows])
                exps.mul_(factor).scatter_(1, draws[rows], at_draws)
            else:
                exps.mul_(factor)
            grad_logits = exps.scatter_add_(1, draws[rows], g)  # (n, V)
            if slope is not None:
                grad_logits.mul_(slope)
            if scale != 1:
                grad_logits.mul_(scale)
            if bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(dtype)
            grad_hidden[rows] = (grad_logits @ low_weight).to(hidden.dtype)
            if not context.needs_input_grad[1]:  # frozen, under adapters
                continue
            if grad_weight is None:
                grad_weight = product_in_fp32(grad_logits.T, low_hidden)  # (V, H)
            else:  # without a name: the product would live until the next one is made
                grad_weight.add_(product_in_fp32(grad_logits.T, low_hidden))
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, grad_bias, None, None, None


def mass_outside(exps: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The sum of a row's exponentials (n, V) without those of its draws (n, K) -> (n, 1), at least MIN_MASS. A sum of
    what is left, because 1 - p has no digits where p is nearly 1."""
    at_draws = exps.gather(1, draws)
    rest = exps.scatter_(1, draws, 0.0).sum(dim=-1, keepdim=True)
    exps.scatter_(1, draws, at_draws)
    return rest.clamp(min=MIN_MASS)


def _exponentials(hidden, weight, draws, temperature, bias, scale, cap):
    """Logits at the temperature minus the largest of their row, in float32 -> those of the draws (n, K), the
    exponentials of all (n, V), the sum of these (n, 1), and the slope of the cap (n, V), None without one.
    hidden: (n, H), weight: (V, H), draws: (n, K), bias: (V,) or None."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = product_in_fp32(hidden, weight.T)  # fp32 before any softmax
    slope = None
    if bias is not None:
        logits.add_(bias)
    if scale != 1:
        logits.mul_(scale)
    if cap is not None:
        logits.div_(cap).tanh_()
        slope = 1 - logits * logits
        logits.mul_(cap)
    if temperature != 1:  # a pass over all of them
        logits.div_(temperature)
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    at_draws = logits.gather(-1, draws)
    exps = logits.exp_()
    return at_draws, exps, exps.sum(dim=-1, keepdim=True), slope
