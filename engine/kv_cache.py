"""The key-value cache of sampling: with the keys and values of all earlier tokens, a step computes one token per row.

Two layouts with the same methods, for attention.forward_hidden and rollout.py:

    DenseKVCache   any device. One block per layer; all rows write the same column, and a mask hides the gaps after
                   short prompts. Live rows overwrite finished ones.
    FlatKVCache    CUDA. A row's tokens are contiguous, so the flash kernel reads live tokens only. Rows are addressed
                   by their ids: finished rows are left out of the ids, and no data moves. All shapes and addresses stay
                   the same from step to step, which CUDA graphs need.

Left out on purpose: pages, quantised values, prefixes shared between calls.
"""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from engine.attention import Packed, flash_attention, grouped_attention, head_dim


class DenseKVCache:
    """Per layer one block (B, kv_heads, longest prompt + max_new_tokens, head_dim), its first rows the live ones."""

    def __init__(self, prompts: Packed, group_size: int, max_new_tokens: int):
        """prompts: each is read once and continued by group_size rows."""
        self.prompts, self.group_size = prompts, group_size
        self.num_rows = len(prompts.prompts_of_rows) * group_size
        device = prompts.prompt_tokens.device
        prompt_lengths = torch.tensor([len(tokens) for tokens in prompts.prompts_of_rows], device=device)  # (P,)
        self.prompt_index = pad_sequence(prompts.prompts_of_rows, batch_first=True).to(device)  # (P, longest)
        self.width = self.prompt_index.shape[1]  # columns filled so far
        self.capacity = self.width + max_new_tokens
        self.blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
        # (B, 1, 1, capacity) bool: the columns that a row attends to; the gaps after short prompts are excluded.
        column = torch.arange(self.capacity, device=device)
        visible = (column < prompt_lengths[:, None]) | (column >= self.width)
        self.visible = visible.repeat_interleave(group_size, dim=0)[:, None, None, :]

    def attend(self, layer: int, query, key, value, scale):
        """First call of a layer: the packed prompts, (1, heads, N, d). Later calls: one token per live row."""
        if layer == len(self.blocks):
            self.blocks.append((self._to_rows(key), self._to_rows(value)))
            return self.prompts.attend(layer, query, key, value, scale)
        for block, new in zip(self.blocks[layer], (key, value), strict=True):
            block[: self.num_rows, :, self.width - 1 : self.width] = new
        keys, values = (block[: self.num_rows, :, : self.width] for block in self.blocks[layer])
        return grouped_attention(query, keys, values, self.visible[: self.num_rows, ..., : self.width], scale)

    def _to_rows(self, packed: torch.Tensor) -> torch.Tensor:
        _, heads, _, dim = packed.shape
        prompts = packed[0][:, self.prompt_index].transpose(0, 1)  # (P, heads, longest, dim)
        block = packed.new_empty(self.num_rows, heads, self.capacity, dim)
        block[:, :, : self.width] = prompts.repeat_interleave(self.group_size, dim=0)
        return block

    def prepare_decode(self, rows: torch.Tensor, position: torch.Tensor, finished: torch.Tensor) -> None:
        """Announces one more token of the live rows (n,), in the order of this cache."""
        self.width += 1

    def compact(self, rows: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        """Drops finished rows. rows: (n,) ids, live: (n,) bool -> the remaining ids in their new order. The last live
        rows move into the freed slots; no other row is copied."""
        num_live = int(live.sum())
        vacated = (~live[:num_live]).nonzero().squeeze(-1)
        movers = live[num_live:].nonzero().squeeze(-1) + num_live
        for tensor in [self.visible] + [block[:, :, : self.width] for pair in self.blocks for block in pair]:
            tensor[vacated] = tensor[movers]
        self.num_rows = num_live
        rows = rows.clone()
        rows[vacated] = rows[movers]
        return rows[:num_live]


class FlatKVCache:
    """Per layer keys and values (max_rows x capacity, kv_heads, head_dim); row r begins at slot r x capacity."""

    def __init__(self, config, max_rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        """config: of the model. capacity: tokens of prompt and completion that a row can hold."""
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # GPT-2 names none
        shape = (max_rows * capacity, kv_heads, head_dim(config))
        self.capacity, self.max_rows = capacity, max_rows
        self.layers = [
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]
        self.query_starts = torch.arange(max_rows + 1, device=device, dtype=torch.int32)

    def prepare_prefill(self, prompts: Packed, group_size: int) -> None:
        """Announces the packed prompts, each continued by group_size rows."""
        self.decoding, self.prompts = False, prompts
        rows = [tokens for tokens in prompts.prompts_of_rows for _ in range(group_size)]
        slots = [row * self.capacity + torch.arange(len(tokens)) for row, tokens in enumerate(rows)]
        device = self.query_starts.device
        self.slot_mapping, self.source = torch.cat(slots).to(device), torch.cat(rows).to(device)  # of all rows' tokens

    def prepare_decode(self, rows: torch.Tensor, position: torch.Tensor, finished: torch.Tensor) -> None:
        """Announces one token for each of the rows. rows: (n,) ids; position: (n,) of the token in the row's text;
        finished: (n,) bool, rows whose result nobody reads: each attends to one key only, which costs next to nothing.
        """
        self.decoding = True
        self.slot_mapping = rows * self.capacity + position
        # Where a row's keys begin and how many there are, in int32 as the kernel asks for.
        self.key_starts = F.pad(rows * self.capacity, (0, 1)).int()  # the last entry is not read
        self.context_lens = torch.where(finished, 1, position + 1).int()

    def attend(self, layer: int, query, key, value, scale):
        """query: (1, heads, N, d) or (n, heads, 1, d), as announced; key, value alike -> like query."""
        keys, values = self.layers[layer]
        if not self.decoding:
            for store, new in ((keys, key), (values, value)):
                store.index_copy_(0, self.slot_mapping, new[0].transpose(0, 1)[self.source].to(store.dtype))
            return self.prompts.attend(layer, query, key, value, scale)
        n = len(query)
        keys.index_copy_(0, self.slot_mapping, key[:, :, 0])
        values.index_copy_(0, self.slot_mapping, value[:, :, 0])
        # For single queries the kernel stacks the query heads of a key head by itself, and (by its source) divides long
        # contexts among more blocks where rows are few. Stacking them here would save a copy, and lose that.
        out = flash_attention(
            query[:, :, 0], keys, values, self.query_starts[: n + 1], self.key_starts, 1, self.capacity, scale,
            causal=False, context_lens=self.context_lens,
        )  # fmt: skip
        return out[:, :, None]

    def compact(self, rows: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        """rows: (n,) ids, live: (n,) bool -> the ids that stay."""
        return rows[live]
