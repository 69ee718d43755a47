"""Sampling: the one decode loop. `generate` turns prompts into a Rollout, everything that training needs to know.

The idea, on one page:
  1. Prefill. Each prompt is read once, right-padded; its keys and values are then copied to the group_size rows that
     continue it.
  2. Decode. At every step each live row draws a token from its distribution, at the sampling temperature and over
     the whole vocabulary (no top-k, no top-p, no penalty, whatever the checkpoint's generation config says: the
     log-probs would otherwise belong to another distribution than the one that was sampled).
  3. Finished rows leave. The last live rows move into their places, so that the batch stays dense and shrinks.
  4. What was drawn, with its log-prob and entropy, is written at (row, step) of the result.

Keys and values live in one preallocated block per layer. All rows write the same column at a step; rows with a
short prompt have a hole between prompt and completion, which a mask hides and which position ids do not count.

Left out on purpose: beam search, top-k and top-p, paged caches, speculative decoding.

    python rollout.py --model_name tiny "Mia has 12 eggs. Mia doubles them. How many eggs does Mia have?"
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase

import llms
from soft_thinking import Director, SoftThinking, TagMatcher, heaviest_draw, mixture_weights


@dataclass
class Rollout:
    """What one call of `generate` saw, did and knew. B = prompts x group_size rows, a group's rows side by side;
    T = longest completion; K = draws per position (1 in normal sampling)."""

    prompt_ids: list[torch.Tensor]  # B 1-D long tensors, unpadded: the prompt as the model saw it
    draws: torch.Tensor  # (B, T, K) long: ids drawn at each position; column 0 is the token on a hard position
    weights: torch.Tensor  # (B, T, K) float: their weights, summing to 1; a hard position has 1, 0, 0...
    draw_mask: torch.Tensor  # (B, T, K) bool: which draws are real actions (not padding, nor after the end)
    logprobs: torch.Tensor  # (B, T, K) float32: log-prob of each draw when it was sampled, at that temperature
    trace_ids: torch.Tensor  # (B, T) long: the readable token, the heaviest draw
    completion_mask: torch.Tensor  # (B, T) bool: True up to and including the stop token
    is_soft: torch.Tensor  # (B, T) bool: the position is a mixture of several tokens
    entropy: torch.Tensor  # (B, T) float32: of the sampling distribution, nats
    finish: list[str]  # "stop" | "length", a row each
    texts: list[str]  # the decoded trace, without special tokens

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) long: tokens of each completion, the stop token counted."""
        return self.completion_mask.sum(dim=1)

    @property
    def top_weight(self) -> torch.Tensor:
        """(B, T) float: weight of the readable token, equal draws added up; 1 on a hard position."""
        return (self.weights * (self.draws == self.trace_ids.unsqueeze(-1))).sum(dim=-1)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_ids: list[int] | None = None,
    stop_tag: str | None = None,
    soft: SoftThinking | None = None,
    seed: int | None = None,
) -> Rollout:
    """Continues each prompt `group_size` times: rows 0..G-1 belong to prompt 0, and so on.

    temperature: 0 is greedy; log-probs and entropies are then those at temperature 1.
    stop_ids: default, every end-of-sequence id that config, generation config or tokenizer names.
    stop_tag: text such as "</answer>" that ends a row too, however it is tokenised; the row keeps it.
    soft: settings of soft thinking; None is normal sampling, one draw a position.
    seed: the same seed gives the same rows, and row i does not depend on the rows after it.
    Raises ValueError for an empty prompt, a negative temperature, or more tokens than the model has positions.
    """
    prompt_ids = [torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    _check_arguments(model, prompt_ids, group_size, max_new_tokens, temperature)
    soft = soft or SoftThinking(k=1)
    soft.check_vocabulary(model.config.vocab_size)
    soft.check_budget(max_new_tokens)
    device = model.device
    stops = torch.tensor(llms.stop_ids(model, tokenizer) if stop_ids is None else stop_ids, device=device)
    B, T, K = len(prompts) * group_size, max_new_tokens, soft.k
    # All randomness is drawn at the start, on the CPU: it is the same on every device, and whoever leaves the batch
    # early takes no numbers from the others.
    generator = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
    uniform = torch.rand(B, T, K, generator=generator).to(device)
    row_prompts = [prompt for prompt in prompts for _ in range(group_size)]
    director = Director(soft, tokenizer, model.config.vocab_size, stops, row_prompts, T)
    record = {  # what becomes the Rollout
        "draws": torch.zeros(B, T, K, dtype=torch.long, device=device),
        "weights": torch.zeros(B, T, K, device=device),
        "draw_mask": torch.zeros(B, T, K, dtype=torch.bool, device=device),
        "logprobs": torch.zeros(B, T, K, device=device),
        "trace_ids": torch.zeros(B, T, dtype=torch.long, device=device),
        "is_soft": torch.zeros(B, T, dtype=torch.bool, device=device),
        "entropy": torch.zeros(B, T, device=device),
        "ended": torch.zeros(B, T, dtype=torch.bool, device=device),
    }
    matcher = TagMatcher(tokenizer, model.config.vocab_size, stop_tag, device) if stop_tag else None
    tag_state = torch.zeros(B, dtype=torch.long, device=device)

    with _decoding(model):
        cache, hidden = _prefill(model, prompt_ids, group_size, T)
        prompt_length = torch.tensor([len(ids) for ids in prompt_ids], device=device).repeat_interleave(group_size)
        rows = torch.arange(B, device=device)  # which row of the result each live slot works on
        for t in range(T):
            logprobs = torch.log_softmax(_logits(model, hidden) / (temperature or 1.0), dim=-1)  # (n, V)
            probs = logprobs.exp()
            entropy = torch.special.entr(probs).sum(dim=-1)  # (n,)
            is_soft, forced = director.decide(rows, probs.argmax(dim=-1), entropy, t)
            draws = draw(probs, uniform[rows, t], greedy=temperature == 0, topk=soft.sampling == "topk")  # (n, K)
            step = resolve(draws, logprobs, is_soft, forced, soft) | {"is_soft": is_soft, "entropy": entropy}
            director.observe(rows, step["trace_ids"])
            step["ended"] = torch.isin(step["trace_ids"], stops)  # (n,)
            if matcher:
                tag_state[rows] = matcher.step(step["trace_ids"], tag_state[rows])
                step["ended"] |= tag_state[rows] == matcher.found
            for name, column in record.items():
                column[rows, t] = step[name]

            live = ~step["ended"]
            if t == T - 1 or not live.any():
                break
            draws, weights = step["draws"], step["weights"]
            if not live.all():
                keep = cache.drop_rows(live)
                rows, draws, weights = rows[keep], draws[keep], weights[keep]
            hidden = model.base_model(
                inputs_embeds=llms.embed_mixture(model, draws, weights).unsqueeze(1),  # (n, 1, H)
                position_ids=(prompt_length[rows] + t)[:, None],
                attention_mask=cache.next_mask(),
                past_key_values=cache,
            ).last_hidden_state[:, -1]  # (n, H)

    return _to_rollout(tokenizer, prompt_ids, group_size, record, stops)


def draw(probs: torch.Tensor, uniform: torch.Tensor, greedy: bool = False, topk: bool = False) -> torch.Tensor:
    """K independent draws a row. probs: (n, V) float32, uniform: (n, K) in [0, 1) -> (n, K) long.

    By the inverse of the cumulative distribution: the first token at which it exceeds the uniform number. A token of
    probability 0 adds nothing to it and is never first. greedy: K times the likeliest; topk: the K likeliest.
    """
    n, K = uniform.shape
    if topk:
        return probs.topk(K, dim=-1).indices
    if greedy:
        return probs.argmax(dim=-1, keepdim=True).expand(n, K)
    cumulative = probs.cumsum(dim=-1)
    threshold = uniform * cumulative[:, -1:]  # the last entry is 1 up to rounding
    return torch.searchsorted(cumulative, threshold, right=True).clamp(max=probs.shape[-1] - 1)


def resolve(draws, logprobs, is_soft, forced, soft: SoftThinking) -> dict[str, torch.Tensor]:
    """What becomes of the draws: soft rows keep them all, hard rows the first, forced rows are given a token.

    draws: (n, K); logprobs: (n, V); is_soft, forced: (n,), -1 where free -> draws, weights, draw_mask, logprobs (n, K)
    and trace_ids (n,), the readable token. A forced token is fed and scored, but is nobody's action.
    """
    first = torch.where(forced >= 0, forced, draws[:, 0])
    fed = torch.ones_like(draws, dtype=torch.bool)
    fed[:, 1:] = is_soft[:, None]
    draws = torch.cat([first[:, None], draws[:, 1:]], dim=1) * fed
    draw_logprobs = logprobs.gather(1, draws) * fed
    weights = mixture_weights(draw_logprobs, is_soft, soft)
    return {
        "draws": draws,
        "weights": weights,
        "draw_mask": fed & (forced < 0)[:, None],
        "logprobs": draw_logprobs,
        "trace_ids": heaviest_draw(draws, weights, draw_logprobs),
    }


def _check_arguments(model, prompt_ids, group_size, max_new_tokens, temperature):
    if not prompt_ids or any(len(ids) == 0 for ids in prompt_ids):
        raise ValueError("every prompt needs at least one token")
    if group_size < 1 or max_new_tokens < 1:
        raise ValueError(f"group_size ({group_size}) and max_new_tokens ({max_new_tokens}) must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative: use 0 for greedy decoding, or more")
    longest, limit = max(len(ids) for ids in prompt_ids), llms.max_positions(model.config)
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {limit} positions"
        )


# ---------------------------------------------------------------- model calls


@contextlib.contextmanager
def _decoding(model: PreTrainedModel):
    """Evaluation mode (training mode with checkpointing drops the cache silently) and our attention; both restored."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.config._attn_implementation = "grouped"
    try:
        yield
    finally:
        model.train(was_training)
        model.config._attn_implementation = attention


def _prefill(model, prompt_ids, group_size, max_new_tokens):
    """Reads every prompt once -> the cache for all rows, and the hidden state (B, H) that predicts the first token."""
    lengths = torch.tensor([len(ids) for ids in prompt_ids], device=model.device)  # (P,)
    padded = torch.nn.utils.rnn.pad_sequence(prompt_ids, batch_first=True).to(model.device)  # (P, longest)
    cache = KVCache(lengths, group_size, max_new_tokens)
    inputs = llms.embed_mixture(model, padded[..., None], torch.ones_like(padded[..., None]))
    hidden = model.base_model(
        inputs_embeds=inputs, past_key_values=cache, position_ids=_positions(padded)
    ).last_hidden_state
    last = hidden[torch.arange(len(lengths), device=model.device), lengths - 1]  # (P, H)
    return cache, last.repeat_interleave(group_size, dim=0)


def _positions(ids):
    return torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)


def _logits(model, hidden):
    return model.get_output_embeddings()(hidden).float()  # (n, V), fp32 before any softmax


class KVCache:
    """Keys and values of all live rows: per layer one block (B, kv_heads, longest prompt + max_new_tokens, head_dim).

    transformers' attention modules call `update`; the rest is for the loop above.
    """

    def __init__(self, prompt_lengths: torch.Tensor, group_size: int, max_new_tokens: int):
        self.group_size = group_size
        self.num_rows = len(prompt_lengths) * group_size
        self.width = int(prompt_lengths.max())  # columns filled so far
        self.capacity = self.width + max_new_tokens
        self.blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
        # (B, 1, 1, capacity) bool: which columns a row may look at. Holes after short prompts are never among them.
        column = torch.arange(self.capacity, device=prompt_lengths.device)
        visible = (column < prompt_lengths[:, None]) | (column >= self.width)
        self.visible = visible.repeat_interleave(group_size, dim=0)[:, None, None, :]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_):
        """Stores the newest keys and values of a layer, returns all that its queries attend to."""
        if layer == len(self.blocks):  # prefill: (P, kv_heads, longest prompt, head_dim), to be shared by the group
            self.blocks.append((self._to_rows(keys), self._to_rows(values)))
            return keys, values
        for block, new in zip(self.blocks[layer], (keys, values), strict=True):
            block[: self.num_rows, :, self.width - 1 : self.width] = new
        return tuple(block[: self.num_rows, :, : self.width] for block in self.blocks[layer])

    def _to_rows(self, prompt: torch.Tensor) -> torch.Tensor:
        _, heads, width, dim = prompt.shape
        block = prompt.new_empty(self.num_rows, heads, self.capacity, dim)
        block[:, :, :width] = prompt.repeat_interleave(self.group_size, dim=0)
        return block

    def next_mask(self) -> torch.Tensor:
        """Opens the next column -> (n, 1, 1, columns) bool, what the coming step's queries may see."""
        self.width += 1
        return self.visible[: self.num_rows, ..., : self.width]

    def drop_rows(self, live: torch.Tensor) -> torch.Tensor:
        """Finished rows leave; the last live ones move into their places. live: (n,) bool -> the order (n',) of the
        old slots in the new batch. Only rows that move are copied."""
        num_live = int(live.sum())
        vacated = (~live[:num_live]).nonzero().squeeze(-1)
        movers = live[num_live:].nonzero().squeeze(-1) + num_live
        for tensor in [self.visible] + [block[:, :, : self.width] for pair in self.blocks for block in pair]:
            tensor[vacated] = tensor[movers]
        order = torch.arange(num_live, device=live.device)
        order[vacated] = movers
        self.num_rows = num_live
        return order


def grouped_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention for the two cases of this file. query: (n, heads, q, d), key and value: (n, kv_heads, columns, d).

    Prefill (no mask): causal. Decode (q = 1): the query heads that share a key head become its queries, so that the
    keys are read once instead of being expanded to every query head.
    """
    if attention_mask is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    else:
        shared = query.view(query.shape[0], key.shape[1], -1, query.shape[-1])
        out = F.scaled_dot_product_attention(shared, key, value, attn_mask=attention_mask, scale=scaling)
        out = out.view_as(query)
    return out.transpose(1, 2), None


# transformers builds no mask of its own for an attention it does not know
AttentionInterface.register("grouped", grouped_attention)


# ---------------------------------------------------------------- the result


def _to_rollout(tokenizer, prompt_ids, group_size, record, stops) -> Rollout:
    ended = record.pop("ended")  # (B, max_new_tokens)
    # A row's tokens are those before which it had not ended. Columns past the last row's end are cut off.
    completion_mask = ended.cumsum(dim=1) - ended.long() == 0
    lengths = completion_mask.sum(dim=1)
    T = int(lengths.max())
    record = {name: column[:, :T] for name, column in record.items()}
    traces = [ids[:n] for ids, n in zip(record["trace_ids"].tolist(), lengths.tolist(), strict=True)]
    stop_ids = set(stops.tolist())
    return Rollout(
        **record,
        prompt_ids=[ids.to(stops.device) for ids in prompt_ids for _ in range(group_size)],
        completion_mask=completion_mask[:, :T],
        finish=["stop" if row_ended else "length" for row_ended in ended.any(dim=1).tolist()],
        texts=tokenizer.batch_decode(
            [ids[:-1] if ids[-1] in stop_ids else ids for ids in traces], skip_special_tokens=True
        ),
    )


def main():
    from rldatasets import build_prompt

    parser = argparse.ArgumentParser(description="Show what a model answers, with the probability of every token.")
    parser.add_argument("question")
    parser.add_argument("--model_name", default="tiny")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        model, tokenizer = llms.load(args.model_name)
        rollout = generate(
            model,
            tokenizer,
            [build_prompt(tokenizer, args.question)],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print("prob   token")
    for token, logprob in zip(rollout.trace_ids[0].tolist(), rollout.logprobs[0, :, 0].exp().tolist(), strict=True):
        print(f"{logprob:.3f}  {tokenizer.decode([token])!r}")


if __name__ == "__main__":
    main()
