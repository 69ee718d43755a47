"""The transformer of the Llama family, written out: what samples from Llama, SmolLM2, Qwen2.5 and Qwen3.

transformers' modules compute the same in nearly twice as many operations, and a decode step is so short that the number
of its operations is its cost: Python on a CPU, kernel launches on a GPU. Here queries, keys and values come from one
product, gate and up from another, queries and keys are rotated together, and products add the residual.

Training, and all other families, use transformers' modules, into which llms.load puts `norm` and `round_rotations` on a
GPU. When a model is loaded, the probe (engine/probe.py) compares both with the model's own forward.
"""

import itertools
import types
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.attention import forward_hidden
from engine.head import product_dtype

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class Layer(NamedTuple):
    """Weights of one layer; a matrix is (outputs, inputs), as torch.nn.Linear's. Norms are modules."""

    attention_norm: torch.nn.Module
    qkv: tuple  # (weight, bias or None)
    qk_norms: tuple | None  # Qwen3's, of single heads
    out: tuple
    mlp_norm: torch.nn.Module
    gate_up: tuple
    down: tuple


class LlamaForward:
    """`forward_hidden` for one model of FAMILIES. Sees every later change of the model's parameters."""

    def __init__(self, model):
        base = model.base_model
        self.rotary_emb, self.norm = base.rotary_emb, base.norm
        self.layers = [read_layer(layer) for layer in base.layers]
        attention = base.layers[0].self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.heads = [attention.q_proj.out_features // self.head_dim, attention.k_proj.out_features // self.head_dim]

    def __call__(self, inputs: torch.Tensor, positions: torch.Tensor, layout) -> torch.Tensor:
        """inputs: (b, L, H) embeddings; positions: (b, L); layout: as in attention.py -> hidden states (b, L, H)."""
        cos, sin = (x[:, None] for x in self.rotary_emb(inputs, positions))  # (b, 1, L, d)
        sin = torch.cat([-sin[..., : self.head_dim // 2], sin[..., self.head_dim // 2 :]], dim=-1)
        num_queries, num_keys = self.heads
        x = inputs.flatten(0, 1).clone()  # (b L, H), updated in place
        for number, layer in enumerate(self.layers):
            qkv = F.linear(norm(layer.attention_norm, x), *layer.qkv)
            heads = qkv.view(*inputs.shape[:2], -1, self.head_dim).transpose(1, 2)  # (b, queries + 2 keys, L, d)
            qk, value = heads.split([num_queries + num_keys, num_keys], dim=1)
            if layer.qk_norms:
                qk = zip(qk.split(self.heads, dim=1), layer.qk_norms, strict=True)
                qk = torch.cat([norm(module, part) for part, module in qk], dim=1)
            query, key = rotate(qk, cos, sin).split(self.heads, dim=1)
            attended = layout.attend(number, query, key, value, self.scaling)  # (b, queries, L, d)
            x = add_linear(x, attended.transpose(1, 2).reshape(len(x), -1), *layer.out)
            x = add_linear(x, gated(F.linear(norm(layer.mlp_norm, x), *layer.gate_up)), *layer.down)
        return norm(self.norm, x).view(inputs.shape)


def norm(module, x: torch.Tensor) -> torch.Tensor:
    """What an RMSNorm module computes, as one kernel on a GPU. Under autocast it is rounded here, once, and
    not by each product that reads it."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon).to(product_dtype(x))


def round_rotations(model) -> None:
    """For training under autocast: cosines and sines of the positions in 16 bits, as a model in 16 bits makes them. In
    fp32 they turn queries and keys into fp32, forward and backward, until attention rounds them anyway."""
    if type(model).__name__ not in FAMILIES:
        return
    rotary = model.base_model.rotary_emb
    forward = type(rotary).forward

    def rounded(module, x, *arguments, **options):
        return tuple(part.to(product_dtype(x)) for part in forward(module, x, *arguments, **options))

    rotary.forward = types.MethodType(rounded, rotary)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021): dimensions i and i + d/2 are a point in the plane, turned by the
    angle of its position. The first half of `sin` is negated."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, torch.cat([x[..., half:], x[..., :half]], dim=-1), sin)


def gated(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU (Shazeer 2020). x: (n, 2 m), gates and then what they let through -> (n, m)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_linear(x: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x + linear(inputs), in place: the product is summed where x is, and x is not copied before."""
    x.addmm_(inputs, weight.T)
    return x if bias is None else x.add_(bias)


def read_layer(layer) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        layer.input_layernorm,
        fuse(attention.q_proj, attention.k_proj, attention.v_proj),
        (q_norm, k_norm) if q_norm else None,
        fuse(attention.o_proj),
        layer.post_attention_layernorm,
        fuse(mlp.gate_proj, mlp.up_proj),
        fuse(mlp.down_proj),
    )


def fuse(*linears: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) of several linear layers as one. Their parameters become parts of it: an optimizer or sync_actor
    that writes them writes here, and nothing is held twice."""
    biases = [linear.bias for linear in linears]
    return join([linear.weight for linear in linears]), None if biases[0] is None else join(biases)


def join(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The parameters one after another in one tensor, of which each of them is a view from now on."""
    first, rows = parameters[0], [len(parameter) for parameter in parameters]
    if all(stands_before(a, b) for a, b in itertools.pairwise(parameters)):  # joined by an earlier call
        return first.detach().as_strided((sum(rows), *first.shape[1:]), first.stride())
    joined = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, joined.split(rows), strict=True):
        parameter.data = part
    return joined


def stands_before(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_memory = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same_memory and a.storage_offset() + a.numel() == b.storage_offset()


def sampling_forward(model):
    """(inputs, positions, layout) -> hidden states, as attention.forward_hidden gives them for the model."""
    if type(model).__name__ in FAMILIES:
        return LlamaForward(model)
    reference = weakref.ref(model)  # decoders keep what is returned, and must not keep models alive
    return lambda *arguments: forward_hidden(reference(), *arguments)
