"""The slow obvious version of attention.flash_attention, which needs a GPU: one sequence after another."""

import torch


def naive_flash(query, key, value, query_starts, key_starts, max_q, max_k, scale, causal=True, context_lens=None):
    """As flash_attention; refuses what the kernel refuses or misreads."""
    lengths = [x for x in (query_starts, key_starts, context_lens) if x is not None]
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in lengths)
    assert all(x.stride(-1) == 1 and x.dtype == query.dtype for x in (query, key, value))
    assert key.shape == value.shape and query.shape[1] % key.shape[1] == 0
    shared = query.shape[1] // key.shape[1]
    q_starts, k_starts, rows = query_starts.tolist(), key_starts.tolist(), []
    num_keys = [b - a for a, b in zip(k_starts, k_starts[1:], strict=False)]
    for i, n in enumerate(num_keys if context_lens is None else context_lens.tolist()):
        q = query[q_starts[i] : q_starts[i + 1]]  # (q, heads, d)
        assert len(q) <= max_q and 1 <= n <= max_k and k_starts[i] + n <= len(key)
        k, v = (x[k_starts[i] : k_starts[i] + n].repeat_interleave(shared, dim=1) for x in (key, value))
        scores = q.transpose(0, 1) @ k.permute(1, 2, 0) * scale  # (heads, q, n)
        if causal:  # the last query sees all keys
            visible = torch.ones(len(q), n, dtype=torch.bool).tril(diagonal=n - len(q))
            scores = scores.masked_fill(~visible, -torch.inf)
        rows.append((scores.softmax(dim=-1) @ v.transpose(0, 1)).transpose(0, 1))
    return torch.cat(rows)


def flash_kernel(query, key, value, query_starts, key_starts, max_q, max_k, dropout, causal, debug, **options):
    """aten::_flash_attention_forward: the output, and empty tensors for what nobody here reads."""
    assert dropout == 0 and not debug
    sizes = query_starts, key_starts, max_q, max_k, options["scale"], causal
    out = naive_flash(query, key, value, *sizes, context_lens=options.get("seqused_k"))
    return out.contiguous(), *(query.new_empty(0) for _ in range(4))
