"""Attention over rows that share prompts. Only this part of a model depends on how tokens are laid out.

transformers' modules compute everything else. They look up their attention function by name, so a function is
registered here that passes queries, keys and values to the `layout` of the call:

    Packed                       training, and the prompts of sampling: no padding, nothing shared computed twice
    DenseKVCache, FlatKVCache    sampling, token by token (kv_cache.py)

Left out on purpose: sliding windows, attention sinks, encoder models.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class UnsupportedModel(ValueError):
    """A family of models that cannot be sampled and trained here. One line: its name, and why."""

    def __init__(self, config, reason: str):
        super().__init__(f"{config.model_type} models are not supported: {reason}")


def check_attention(model) -> None:
    """Raises UnsupportedModel for a family that does not look its attention up by name."""
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(model.config, "their attention has a form of its own, which cannot be replaced")


def forward_hidden(model, inputs: torch.Tensor, positions: torch.Tensor, layout) -> torch.Tensor:
    """The model's last hidden states for `inputs` laid out as `layout` says.

    inputs: (b, L, H) embeddings; positions: (b, L) long, where each stands in its own text. -> (b, L, H)
    Raises UnsupportedModel, a ValueError, for a family whose attention cannot be replaced.
    """
    check_attention(model)
    model.config._attn_implementation = "layout"
    no_mask = inputs.new_empty(1, 1, 1, 1)  # transformers passes on what has four dimensions, and builds none itself
    return model.base_model(
        inputs_embeds=inputs, position_ids=positions, attention_mask=no_mask, use_cache=False, layout=layout
    ).last_hidden_state


def _attention(module, query, key, value, attention_mask, scaling, layout=None, **options):
    """What transformers calls. query: (b, heads, L, d); key, value: (b, kv_heads, L, d) -> (b, L, heads, d)."""
    if layout is None:  # a plain call of the model, not by `forward_hidden`
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if options.get("s_aux") is not None:
        raise UnsupportedModel(module.config, "their attention has sinks")
    return layout.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register("layout", _attention)
AttentionMaskInterface.register("layout", sdpa_mask)


def grouped_attention(query, key, value, mask, scale) -> torch.Tensor:
    """Attention in which `heads / kv_heads` query heads share a key head. The query heads are stacked as more queries
    of their key head, so keys are read once instead of being copied to every query head.

    query: (n, heads, q, d); key, value: (n, kv_heads, k, d); mask: (n, 1, q, k) bool, True where a query looks.
    """
    n, heads, q, d = query.shape
    shared = heads // key.shape[1]
    query = query.reshape(n, key.shape[1], shared * q, d)
    mask = mask if q == 1 else mask.repeat(1, 1, shared, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.reshape(n, heads, q, d)  # on a GPU its heads may be its inner dimension


def flash_attention(query, key, value, query_starts, key_starts, max_q, max_k, scale, causal=True, context_lens=None):
    """torch's built-in flash kernel for sequences of different lengths in one call. CUDA and 16 bits only.

    query: (all queries, heads, d); key, value: (all keys, kv_heads, d), fewer heads than the query's or as many.
    query_starts, key_starts: (n + 1,) int32, where each sequence begins; max_q, max_k: the longest. causal: aligned at
    the ends, so the last query sees all keys. context_lens: (n,) int32, how many of a sequence's keys exist already.

    The operator behind torch.nn.attention.varlen (2.13), which torch 2.11 has under the same name and order.
    """
    options = dict(scale=scale, seqused_k=context_lens)
    return torch.ops.aten._flash_attention_forward(
        query, key, value, query_starts, key_starts, max_q, max_k, 0.0, causal, False, **options
    )[0]


def head_dim(config) -> int:
    """Width of one attention head, of a model's configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def has_flash(tensor: torch.Tensor) -> bool:
    """Whether flash_attention takes tensors (..., head_dim) like this one."""
    return (
        tensor.is_cuda
        and tensor.dtype in (torch.bfloat16, torch.float16)
        and flash_takes_heads(tensor.shape[-1])
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    )


def flash_takes_heads(head_dim: int) -> bool:
    """Whether flash_attention takes heads of this width."""
    return head_dim % 8 == 0 and head_dim <= 256


class Packed:
    """Rows of a rollout as one sequence without padding, in which what rows share stands once: each different prompt,
    and the beginning that all prompts have in common, such as a chat template's system message.

    Prompts ssp and ssqq; completions abc and d of the first, efg of the second. The N tokens of the sequence are

        s s | p | q q | a b | e f        the last token of a completion is predicted, and never read

    Linear layers process N tokens. A plain pass has one prompt per row and padding: 1.7 times as many tokens with 200
    tokens of prompt, 250 of completion and 16 rows per group. Attention runs over the common prefix alone, over the
    rest of each prompt with the prefix as context, and over completions with their whole prompt as context. The
    gradient of shared keys and values sums over their rows, as in the plain pass, which the tests compare with.
    """

    def __init__(self, prompt_ids: list[torch.Tensor], lengths: list[int], device: torch.device):
        """prompt_ids: of each row, on the CPU; lengths: of the rows' completions, 1 for a prompt that is only read."""
        fed = [length - 1 for length in lengths]
        number: dict[bytes, int] = {}  # of each different prompt
        prompt_of_row = [number.setdefault(ids.numpy().tobytes(), len(number)) for ids in prompt_ids]
        prompts = [prompt_ids[prompt_of_row.index(i)] for i in range(len(number))]
        common = common_prefix(prompts)
        # Where the prefix, the rests of the prompts, and the completions stand in the sequence.
        sizes = [common, *(len(ids) - common for ids in prompts), *fed]
        prefix, *spans = torch.arange(sum(sizes)).split(sizes)
        prompt_spans, row_spans = spans[: len(prompts)], spans[len(prompts) :]

        self.prompt_tokens = torch.cat([prompts[0][:common], *(ids[common:] for ids in prompts)]).to(device)
        in_text = [torch.arange(common), *(torch.arange(common, len(ids)) for ids in prompts)]
        in_text += [len(ids) + torch.arange(n) for ids, n in zip(prompt_ids, fed, strict=True)]
        self.positions = torch.cat(in_text).to(device)[None]  # (1, N)
        # The hidden state that predicts each completion token: of the prompt's last token, then of the token before.
        predicting = [(prompt_spans[p][-1:], span) for p, span in zip(prompt_of_row, row_spans, strict=True)]
        self.logit_indices = torch.cat([*itertools.chain(*predicting)]).to(device)
        # Each sequence of queries, and the context that it attends to before itself.
        whole = [torch.cat([prefix, span]) for span in prompt_spans]
        self.prompts_of_rows = [whole[p] for p in prompt_of_row]
        self.contexts = [prefix[:0], *[prefix] * len(prompts), *self.prompts_of_rows]
        self.queries = [prefix, *prompt_spans, *row_spans]
        self.num_prompts, self.device = len(prompts), device

    def attend(self, layer, query, key, value, scale):
        """query: (1, heads, N, d); key, value: (1, kv_heads, N, d) -> (1, heads, N, d)."""
        if has_flash(value):
            return self.ragged.attend(query, key, value, scale)
        return torch.cat([block.attend(query, key, value, scale) for block in self.blocks], dim=2)

    @functools.cached_property
    def blocks(self):
        """One layout for the prefix, for the prompts and for the completions: each pads to its own longest sequence."""
        kinds = slice(0, 1), slice(1, 1 + self.num_prompts), slice(1 + self.num_prompts, None)
        return [
            PaddedLayout(self.contexts[kind], self.queries[kind], self.device)
            for kind in kinds
            if any(map(len, self.queries[kind]))
        ]

    @functools.cached_property
    def ragged(self):
        return VarlenLayout(self.contexts, self.queries, self.device)


def common_prefix(prompts: list[torch.Tensor]) -> int:
    """How many tokens all prompts (1-D) begin with; each keeps at least one of its own. 0 for a single prompt."""
    if len(prompts) == 1:
        return 0
    shortest = min(map(len, prompts)) - 1
    same = torch.stack([ids[:shortest] for ids in prompts])
    return int((same == same[0]).all(dim=0).long().cumprod(dim=0).sum())


class VarlenLayout:
    """Sequences of queries, each attending to its context and causally to itself, for the flash kernel: no padding."""

    def __init__(self, contexts: list, queries: list, device: torch.device):
        """contexts, queries: indices into the packed sequence, (n,) long on the CPU; the queries' are consecutive."""
        pairs = [(context, span) for context, span in zip(contexts, queries, strict=True) if len(span) > 0]
        num_queries = [len(span) for _, span in pairs]
        num_keys = [len(context) + len(span) for context, span in pairs]
        self.longest = max(num_queries), max(num_keys)
        self.key_index = torch.cat([*itertools.chain(*pairs)]).to(device)
        self.query_starts, self.key_starts = (
            F.pad(torch.tensor(numbers).cumsum(0), (1, 0)).int().to(device) for numbers in (num_queries, num_keys)
        )

    def attend(self, query, key, value, scale):
        query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (N, heads, d)
        key, value = key.index_select(0, self.key_index), value.index_select(0, self.key_index)
        out = flash_attention(query, key, value, self.query_starts, self.key_starts, *self.longest, scale)
        return out.transpose(0, 1)[None]


class PaddedLayout:
    """The same as VarlenLayout for any device and precision: sequences are padded to the longest."""

    def __init__(self, contexts: list, queries: list, device: torch.device):
        query_index, context_index = (pad_sequence(spans, batch_first=True) for spans in (queries, contexts))
        (n, q), c = query_index.shape, context_index.shape[1]
        self.shape = n, q, c + q
        self.query_index = query_index.flatten().to(device)  # (n q,)
        self.key_index = torch.cat([context_index, query_index], dim=1).flatten().to(device)  # (n k,)
        lengths = torch.tensor([len(span) for span in queries])
        context_lengths = torch.tensor([len(span) for span in contexts], device=device)
        # The positions of the real queries among n x q. In this order they are the packed sequence again.
        real = torch.arange(q) < lengths[:, None]
        self.real = real.flatten().nonzero().squeeze(-1).to(device)
        context_mask = (torch.arange(c, device=device) < context_lengths[:, None])[:, None, :].expand(-1, q, -1)
        causal = torch.ones(q, q, dtype=torch.bool, device=device).tril().expand(len(queries), -1, -1)
        self.mask = torch.cat([context_mask, causal], dim=2)[:, None]  # (n, 1, q, k)

    def attend(self, query, key, value, scale):
        n, q, k = self.shape

        def rows(x, index, length):  # (1, heads, N, d) -> (n, heads, length, d)
            heads, d = x.shape[1], x.shape[3]
            x = x[0].transpose(0, 1).reshape(-1, heads * d).index_select(0, index)
            return x.view(n, length, heads, d).transpose(1, 2)

        query = rows(query, self.query_index, q)
        key, value = rows(key, self.key_index, k), rows(value, self.key_index, k)
        out = grouped_attention(query, key, value, self.mask, scale)  # (n, heads, q, d)
        _, heads, _, d = out.shape
        out = out.transpose(1, 2).reshape(n * q, heads * d).index_select(0, self.real)
        return out.view(1, -1, heads, d).transpose(1, 2)
