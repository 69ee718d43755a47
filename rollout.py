"""Sampling: the one decode loop. `generate` turns prompts into a Rollout, everything that training needs to know.

The idea, on one page:
  1. Prefill. Each prompt is read once, and what all prompts begin with is read once. Keys and values are copied to the
     rows that continue them, group_size for each prompt.
  2. Decode. At every step each live row draws a token from its distribution, at the sampling temperature and over the
     whole vocabulary. There is no top-k, no top-p and no penalty, whatever the checkpoint's generation config says:
     otherwise tokens would be drawn from one distribution, and their log-probs taken from another.
  3. Finished rows leave the batch. The last live rows move into their slots, so the batch stays dense and shrinks.
  4. Each draw is written at (row, step) of the result, with its log-prob and the entropy of its distribution.

Keys and values are kept in preallocated blocks (engine/kv_cache.py). On a CPU a step runs as it is written; on a GPU it
is recorded once as CUDA graphs and replayed (engine/cuda_graphs.py).

Left out on purpose: beam search, top-k and top-p, paged caches, speculative decoding.

    python rollout.py --model_name tiny "Mia has 12 eggs. Mia doubles them. How many eggs does Mia have?"
"""

import argparse
import contextlib
import dataclasses
import sys
import weakref
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llms
from engine.attention import Packed, has_flash, head_dim
from engine.cuda_graphs import StepGraphs
from engine.head import head_logits
from engine.kv_cache import DenseKVCache, FlatKVCache
from engine.llama_forward import sampling_forward
from engine.out_of_memory import retry_smaller
from engine.sampling import draw, entropy_of, gumbel_draw, gumbel_logprobs, precise_dtype
from engine.sampling_params import SamplingParams
from soft_thinking import SoftThinking, SoftThinkingController, TagMatcher, heaviest_draw, mixture_weights


@dataclass
class Rollout:
    """What one call of `generate` saw, did and knew. B = prompts x group_size rows, a group's rows side by side;
    T = longest completion; K = draws per position (1 in normal sampling)."""

    prompt_ids: list[torch.Tensor]  # B 1-D long tensors on the CPU, one object a group: the prompt as the model saw it
    draws: torch.Tensor  # (B, T, K) long: ids drawn at each position; column 0 is the token on a hard position
    weights: torch.Tensor  # (B, T, K) float: their weights, summing to 1; a hard position has 1, 0, 0...
    draw_mask: torch.Tensor  # (B, T, K) bool: which draws are real actions (not padding, nor after the end)
    logprobs: torch.Tensor  # (B, T, K) float32: log-prob of each draw when it was sampled, at that temperature; with
    # Gumbel noise, the log of its factor of the density (engine/sampling.py)
    trace_ids: torch.Tensor  # (B, T) long: the readable token, the heaviest draw
    completion_mask: torch.Tensor  # (B, T) bool: True up to and including the stop token
    is_soft: torch.Tensor  # (B, T) bool: the position is a mixture of several tokens
    entropy: torch.Tensor  # (B, T) float32: of the sampling distribution, nats
    finish: list[str]  # "stop" | "length", a row each
    texts: list[str]  # the decoded trace, without special tokens
    # (B, T, K) float32, with Gumbel noise alone: how far below the position's first and largest each perturbed log-prob
    # is; 0 on a hard position
    gaps: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) long: tokens of each completion, the stop token counted."""
        return self.completion_mask.sum(dim=1)

    @property
    def top_weight(self) -> torch.Tensor:
        """(B, T) float: weight of the readable token, equal draws added up; 1 on a hard position."""
        return (self.weights * (self.draws == self.trace_ids.unsqueeze(-1))).sum(dim=-1)

    @classmethod
    def concatenate(cls, parts: list["Rollout"]) -> "Rollout":
        """The rows of all parts, padded to the longest of them. Equal prompts become one object, so rows of one prompt
        share its computation if they stand together (llms.micro_batches)."""

        def join(columns):
            if columns[0] is None:
                return None
            if isinstance(columns[0], list):
                return [value for column in columns for value in column]
            return torch.nn.utils.rnn.pad_sequence([row for column in columns for row in column], batch_first=True)

        columns = {f.name: join([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(cls)}
        known: dict[tuple, torch.Tensor] = {}
        prompts = [known.setdefault(tuple(ids.tolist()), ids) for ids in columns["prompt_ids"]]
        return cls(**columns | {"prompt_ids": prompts})


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
    prompt_indices: list[int] | None = None,
) -> Rollout:
    """Continues each prompt `group_size` times: rows 0..G-1 belong to prompt 0, and so on.

    temperature: 0 is greedy; log-probs and entropies are then those at temperature 1.
    stop_ids: default, every end-of-sequence id that config, generation config or tokenizer names.
    stop_tag: text such as "</answer>" that ends a row too, however it is tokenised; the row keeps it.
    soft: settings of soft thinking; None is normal sampling, one draw a position.
    seed: the same seed gives the same rows, and row i does not depend on the rows after it.
    prompt_indices: where each prompt stands in a larger batch of which these are a part (several processes, each with
        its share). The rows are then the ones that the larger batch would have had.
    When memory runs out, half as many prompts are read at a time, here and in later calls with this model; the rows
    stay the same. One prompt's group is never divided.
    Raises ValueError for an empty prompt, a negative temperature, or more tokens than the model has positions.
    """
    prompt_ids = [torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    _check_arguments(model, prompt_ids, group_size, max_new_tokens, temperature)
    soft = soft or SoftThinking(k=1)
    soft.check_vocabulary(model.config.vocab_size)
    soft.check_budget(max_new_tokens)
    stop_ids = llms.stop_ids(model, tokenizer) if stop_ids is None else stop_ids
    params = SamplingParams(soft, temperature, tuple(stop_ids), stop_tag, max_new_tokens)
    seed = torch.seed() if seed is None else seed
    indices = list(range(len(prompts))) if prompt_indices is None else prompt_indices
    parts: list[Rollout] = []  # of the prompts that are done
    done = 0

    def sample_rest():
        nonlocal done
        while done < len(prompts):
            some = slice(done, done + _prompt_limits.get(model, len(prompts)))
            parts.append(
                _sample(model, tokenizer, prompts[some], prompt_ids[some], indices[some], group_size, seed, params)
            )
            done += len(prompts[some])

    def halve():
        _graph_decoders.pop(model, None)  # with its buffers
        _prompt_limits[model] = min(_prompt_limits.get(model, len(prompts)), len(prompts) - done) // 2
        tqdm.write(
            f"out of memory while sampling: {_prompt_limits[model]} prompts at a time from now on", file=sys.stderr
        )

    def can_halve():
        return min(_prompt_limits.get(model, len(prompts)), len(prompts) - done) > 1

    with _evaluating(model):
        retry_smaller(sample_rest, can_halve, halve)
    return parts[0] if len(parts) == 1 else Rollout.concatenate(parts)


# How many prompts generate reads at a time with a model that ran out of memory.
_prompt_limits: "weakref.WeakKeyDictionary[PreTrainedModel, int]" = weakref.WeakKeyDictionary()


def _sample(model, tokenizer, prompts, prompt_ids, prompt_indices, group_size, seed, params: SamplingParams) -> Rollout:
    num_rows, num_tokens = len(prompts) * group_size, max(map(len, prompt_ids)) + params.max_new_tokens
    decoder = decoder_for(model, tokenizer, params, num_rows, num_tokens)
    rows = decoder.prefill(prompts, prompt_ids, group_size, seed, prompt_indices)
    for t in range(1, params.max_new_tokens):
        if t % decoder.finished_check_interval == 0:
            rows = decoder.drop_finished(rows)
            if len(rows) == 0:
                break
        decoder.decode_step(rows, t)
    return _to_rollout(tokenizer, prompt_ids, group_size, decoder.buffers, params.stop_ids)


class Decoder:
    """The state of the rows that are being generated, and the step that extends each of them by one token.

    A step writes what it draws into `buffers`, at (row, t), and the next step reads it there.
    """

    finished_check_interval = 1  # steps between two checks for finished rows

    def __init__(self, model, tokenizer, params: SamplingParams, max_rows: int, max_tokens: int):
        """max_tokens: of prompt and completion together, per row."""
        self._model = weakref.ref(model)  # decoder_for keeps decoders, which must not keep models alive
        self.forward = sampling_forward(model)
        self.soft, self.temperature, stop_ids, stop_tag, T = params
        B, K, V, device = max_rows, self.soft.k, model.config.vocab_size, model.device
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
        self.gumbel = self.soft.sampling == "gumbel" and self.temperature > 0
        numbers = 2 * K - 1 if self.gumbel else K  # uniform ones, a position
        self.uniform = torch.zeros(B, T, numbers, dtype=precise_dtype(device), device=device)
        self.prompt_length = torch.ones(B, dtype=torch.long, device=device)
        self.soft_controller = SoftThinkingController(self.soft, tokenizer, V, self.stop_ids, B, T)
        self.matcher = TagMatcher(tokenizer, V, stop_tag, device) if stop_tag else None
        self.tag_state = torch.zeros(B, dtype=torch.long, device=device)
        self.finished = torch.zeros(B, dtype=torch.bool, device=device)
        self.buffers = {  # the columns of the Rollout
            "draws": torch.zeros(B, T, K, dtype=torch.long, device=device),
            "weights": torch.zeros(B, T, K, device=device),
            "draw_mask": torch.zeros(B, T, K, dtype=torch.bool, device=device),
            "logprobs": torch.zeros(B, T, K, device=device),
            "trace_ids": torch.zeros(B, T, dtype=torch.long, device=device),
            "is_soft": torch.zeros(B, T, dtype=torch.bool, device=device),
            "entropy": torch.zeros(B, T, device=device),
            "ended": torch.zeros(B, T, dtype=torch.bool, device=device),
        }
        if self.gumbel:
            self.buffers["gaps"] = torch.zeros(B, T, K, device=device)

    @property
    def model(self) -> PreTrainedModel:
        return self._model()

    def prefill(self, prompts, prompt_ids, group_size: int, seed: int, prompt_indices: list[int]) -> torch.Tensor:
        """Reads the prompts and draws every row's first token. Returns the rows, (B,) ids."""
        device, B = self.model.device, len(prompts) * group_size
        for state in (self.tag_state, self.finished, *self.buffers.values()):
            state.zero_()
        self.finished[B:] = True  # rows that this call does not use
        self.soft_controller.reset([prompt for prompt in prompts for _ in range(group_size)])
        lengths = torch.tensor([len(ids) for ids in prompt_ids], device=device)  # (P,)
        self.prompt_length[:B] = lengths.repeat_interleave(group_size)
        # All random numbers are drawn now, on the CPU: they are the same on every device, and a row's numbers do not
        # depend on when other rows finish.
        generator = torch.Generator().manual_seed(seed)
        shape = max(prompt_indices) + 1, group_size, *self.uniform.shape[1:]
        of_all = torch.rand(shape, generator=generator, dtype=torch.float64)
        self.uniform[:B] = of_all[prompt_indices].flatten(0, 1).to(self.uniform)

        packed = Packed(prompt_ids, [1] * len(prompts), device)
        self.cache = self.new_cache(packed, group_size)
        tokens = packed.prompt_tokens[:, None]  # (N, 1)
        inputs = llms.embed_mixture(self.model, tokens, torch.ones_like(tokens))
        hidden = self.forward(inputs[None], packed.positions, self.cache)[0]  # (N, H)
        last = hidden[packed.logit_indices]  # (P, H)
        rows = torch.arange(B, device=device)
        self.sample_tokens(rows, last.repeat_interleave(group_size, dim=0), 0)
        return rows

    def new_cache(self, prompts: Packed, group_size: int):
        return DenseKVCache(prompts, group_size, self.uniform.shape[1])

    def decode_step(self, rows: torch.Tensor, t: int | torch.Tensor) -> None:
        """Feeds what the rows (n,) drew at t - 1 and draws their tokens at t."""
        position = self.prompt_length[rows] + (t - 1)  # (n,)
        self.cache.prepare_decode(rows, position, self.finished[rows])
        draws, weights = self.buffers["draws"][rows, t - 1], self.buffers["weights"][rows, t - 1]  # (n, K)
        inputs = llms.embed_mixture(self.model, draws, weights)[:, None]  # (n, 1, H)
        hidden = self.forward(inputs, position[:, None], self.cache)
        self.sample_tokens(rows, hidden[:, 0], t)

    def sample_tokens(self, rows: torch.Tensor, hidden: torch.Tensor, t: int | torch.Tensor) -> None:
        """From the hidden states (n, H) to tokens: draws them and writes all columns of the buffers at t."""
        logits = head_logits(self.model, hidden)  # (n, V) float32
        if self.temperature not in (0, 1):
            logits.div_(self.temperature)
        logprobs = torch.log_softmax(logits, dim=-1)
        probs = torch.exp(logprobs, out=logits)  # in place: with a large vocabulary, memory traffic is the cost
        entropy = entropy_of(probs, logprobs)  # (n,)
        is_soft, forced = self.soft_controller.decide(rows, probs, entropy, t)
        if self.gumbel:
            drawn = gumbel_draw(probs, self.uniform[rows, t])  # draws (n, K), gaps (n, K), log of the rest (n,)
        else:
            drawn = (draw(probs, self.uniform[rows, t], self.temperature == 0, self.soft.sampling == "topk"),)
        step = apply_forced_tokens(*drawn, logprobs=logprobs, is_soft=is_soft, forced=forced, soft=self.soft) | {
            "is_soft": is_soft,
            "entropy": entropy,
        }
        self.soft_controller.observe(rows, step["trace_ids"])
        step["ended"] = (step["trace_ids"][:, None] == self.stop_ids).any(dim=-1)  # (n,)
        if self.matcher:
            self.tag_state[rows] = self.matcher.step(step["trace_ids"], self.tag_state[rows])
            step["ended"] |= self.tag_state[rows] == self.matcher.found
        self.finished[rows] |= step["ended"]
        for name, column in self.buffers.items():
            column[rows, t] = step[name]

    def drop_finished(self, rows: torch.Tensor) -> torch.Tensor:
        live = ~self.finished[rows]
        return rows if live.all() else self.cache.compact(rows, live)


def apply_forced_tokens(
    draws, gaps=None, log_rest=None, *, logprobs, is_soft, forced, soft: SoftThinking
) -> dict[str, torch.Tensor]:
    """The draws as they are fed: soft rows keep all of them, hard rows the first, forced rows get the forced token.

    draws: (n, K); gaps (n, K), log_rest (n,): of Gumbel noise; logprobs: (n, V); is_soft, forced: (n,), -1 where free
    -> the Rollout's draws, weights, draw_mask, logprobs (and gaps) (n, K), and trace_ids (n,), the readable token. A
    forced token is fed and scored, but it is not an action.
    """
    first = torch.where(forced >= 0, forced, draws[:, 0])
    fed = torch.ones_like(draws, dtype=torch.bool)
    fed[:, 1:] = is_soft[:, None]
    draws = torch.cat([first[:, None], draws[:, 1:]], dim=1) * fed
    draw_logprobs = logprobs.gather(1, draws) * fed
    gaps = None if gaps is None else gaps * fed
    weights = mixture_weights(draw_logprobs if gaps is None else -gaps, is_soft, soft)
    step = {
        "draws": draws,
        "weights": weights,
        "draw_mask": fed & (forced < 0)[:, None],
        "logprobs": draw_logprobs,
        "trace_ids": heaviest_draw(draws, weights, draw_logprobs),
    }
    if gaps is not None:
        step |= {"gaps": gaps, "logprobs": gumbel_logprobs(draw_logprobs, log_rest, gaps) * fed}
    return step


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


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel):
    """Evaluation mode: training mode with gradient checkpointing would compute, and keep, other things."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---------------------------------------------------------------- CUDA graphs


class GraphDecoder(Decoder):
    """The same step, recorded once as CUDA graphs and replayed (engine/cuda_graphs.py)."""

    finished_check_interval = 16  # a check has to wait for the GPU

    def __init__(self, model, tokenizer, params: SamplingParams, max_rows: int, max_tokens: int):
        super().__init__(model, tokenizer, params, max_rows, max_tokens)
        device, dtype = model.device, next(model.parameters()).dtype
        self.cache = FlatKVCache(model.config, max_rows, max_tokens, device, dtype)
        if params.max_new_tokens > 1:  # else the prefill draws the only token
            self.graphs = StepGraphs(super().decode_step, max_rows, device)

    def new_cache(self, prompts: Packed, group_size: int):
        self.cache.prepare_prefill(prompts, group_size)
        return self.cache

    def decode_step(self, rows, t):
        self.graphs.replay(rows, t, rows_changed=t == 1 or t % self.finished_check_interval == 0)


_graph_decoders: "weakref.WeakKeyDictionary[PreTrainedModel, GraphDecoder]" = weakref.WeakKeyDictionary()


def decoder_for(model, tokenizer, params: SamplingParams, num_rows: int, num_tokens: int) -> Decoder:
    """A new Decoder; on CUDA in 16 bits, the model's last GraphDecoder again if its parameters and sizes fit."""
    if not has_flash(next(model.parameters()).new_empty(0, head_dim(model.config))):
        return Decoder(model, tokenizer, params, num_rows, num_tokens)
    known = _graph_decoders.pop(model, None)
    fits = known and known.key == (tokenizer, params) and known.max_rows >= num_rows and known.max_tokens >= num_tokens
    if not fits:
        del known  # free its memory before the new one is made
        known = GraphDecoder(model, tokenizer, params, num_rows, -(-num_tokens // 256) * 256)
        known.key = (tokenizer, params)
    _graph_decoders[model] = known
    return known


# ---------------------------------------------------------------- the result


def _to_rollout(tokenizer, prompt_ids, group_size, buffers, stop_ids) -> Rollout:
    B = len(prompt_ids) * group_size
    ended = buffers["ended"][:B]  # (B, max_new_tokens)
    # True up to and including the first end token. Columns past the last row's end are cut off.
    completion_mask = ended.cumsum(dim=1) - ended.long() == 0
    lengths = completion_mask.sum(dim=1)
    T = int(lengths.max())
    completion_mask = completion_mask[:, :T]
    columns = {name: column[:B, :T].clone() for name, column in buffers.items() if name != "ended"}
    for column in columns.values():  # a finished row may have gone on for a few steps
        column[~completion_mask] = 0
    traces = [ids[:n] for ids, n in zip(columns["trace_ids"].tolist(), lengths.tolist(), strict=True)]
    return Rollout(
        **columns,
        prompt_ids=[ids for ids in prompt_ids for _ in range(group_size)],
        completion_mask=completion_mask,
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
        model, tokenizer = llms.load(args.model_name, dtype=llms.sampling_dtype())
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
