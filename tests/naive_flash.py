"""The slow obvious version of attention.flash_attention, which needs a GPU: one sequence after another."""

import torch


def naive_flash(query, key, value, query_starts, key_starts, max_q, max_k, scale, causal=True, context_lens=None):
    assert query_starts.dtype == key_starts.dtype == torch.int32 and (
        context_lens is None or context_lens.dtype == torch.int32
    )
    shared = query.shape[1] // key.shape[1]
    rows = []
    for i in range(len(query_starts) - 1):
        q = query[query_starts[i] : query_starts[i + 1]]  # (q, heads, d)
        n = key_starts[i + 1] - key_starts[i] if context_lens is None else context_lens[i]
        assert len(q) <= max_q and n <= max_k
        k, v = (x[key_starts[i] : key_starts[i] + n].repeat_interleave(shared, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if causal:  # the last query sees all keys
            visible = torch.ones(len(q), n, dtype=torch.bool).tril(diagonal=int(n) - len(q))
            scores = scores.masked_fill(~visible, -torch.inf)
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v))
    return torch.cat(rows)
