"""Recording a trace: sample a completion, then measure it at every step over the whole vocabulary.

The numbers come from a second, teacher-forced pass of the model over what was sampled, soft mixtures included.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

import llms
import rldatasets
from analysis import measures
from analysis.config import normalize_number
from analysis.files import save_trace
from analysis.measures import TEMPERATURES
from analysis.tokens import fingerprint, token_bytes
from analysis.trace import Trace
from engine.head import head_logits
from rollout import Rollout, generate

# Logits of one chunk: 64 MiB, and about ten times that with the sorted copy and the measures. Not less: blocks under
# 32 MiB come from glibc's heap, which fragmented to 2 GB in some runs; larger blocks are returned to the system.
MAX_LOGITS = 2**24
NUM_RANKS = 250  # points of a rank curve


def record(model, tokenizer, problem: rldatasets.Problem, config, folder: Path) -> tuple[Trace, Rollout]:
    """Samples an answer and `num_resamples` more, measures the first one, saves its trace in `folder`.

    config: token_analysis.AnalysisConfig. Row 0 of the rollout is the trace, the other rows are the resamples. Raises
    ValueError if the first token of the answer ends it.
    """
    prompt = config.prompt_format().prompt(tokenizer, problem.question)
    mode = config.rollout_mode()
    mode.check_reserve(tokenizer)
    # Row 0 does not depend on the other rows: the trace is the same with and without resamples.
    rows = 1 + config.num_resamples
    rollout = generate(model, tokenizer, [prompt], group_size=rows, soft=mode, seed=config.seed, **config.sampling())
    if rollout.lengths[0] == 1 and rollout.finish[0] == "stop":
        raise ValueError(f"empty completion: {config.model_name!r} stops at once; give another --seed or --prompt")

    full_file = folder / "full_logp.npy"
    full_file.unlink(missing_ok=True)
    arrays = measure(
        model,
        rollout,
        temperature=config.temperature,
        top_k=min(config.top_k, model.config.vocab_size),
        full_file=full_file if config.save_full else None,
    )
    arrays["path_share"] = measures.path_share(rollout.trace_ids, rollout.completion_mask).cpu().numpy()
    begun = template_opening(config, tokenizer)
    answers = [config.answer_of(begun + text) for text in rollout.texts]
    resamples = zip(answers[1:], rollout.lengths.tolist()[1:], rollout.texts[1:], strict=True)
    meta = {
        "model": config.model_name,
        "tokenizer": fingerprint(tokenizer),
        "vocab_size": model.config.vocab_size,
        "question": problem.question,
        "gold": normalize_number(problem.answer),
        "prompt": prompt,
        "tags": config.tags,
        "seed": config.seed,
        **config.sampling(),
        "mode": dataclasses.asdict(mode),
        "text": rollout.texts[0],
        "finish": rollout.finish[0],
        "answer": answers[0],
        "resamples": [{"answer": answer, "length": length, "text": text} for answer, length, text in resamples],
        "forced_forks": [],
    }
    ids = np.unique(np.concatenate([arrays[name].flatten() for name in ("token_ids", "topk_ids", "draws")])).tolist()
    trace = Trace(meta, arrays, token_bytes(tokenizer, ids))
    save_trace(trace, folder)
    if config.num_forks():
        meta["forced_forks"] = force_forks(model, tokenizer, trace, rollout, config)
        save_trace(trace, folder)
    return trace, rollout


def template_opening(config, tokenizer) -> str:
    """What the chat template writes of the answer; --prefill adds the same by itself."""
    return "" if config.prefill else config.prompt_format(tokenizer).opens_reasoning


# ---------------------------------------------------------------- measuring


def measure(model, rollout: Rollout, row: int = 0, *, temperature=1.0, top_k=50, full_file=None) -> dict:
    """The arrays of a row's trace (see Trace), but for path_share. full_file: where to write log p (T, V) float32."""
    mask = rollout.completion_mask[row]  # (max length,)
    tokens = rollout.trace_ids[row][mask]  # (T,)
    ranks = rank_grid(model.config.vocab_size)
    chunks, full = [], None
    for steps, (logp,) in logprob_chunks([model], rollout, row):
        chunks.append(measure_chunk(logp, tokens[steps], temperature or 1.0, top_k, ranks))
        if full_file is not None:
            if full is None:
                full = np.lib.format.open_memmap(full_file, "w+", np.float32, (len(tokens), logp.shape[-1]))
            full[steps] = logp.cpu().numpy()
    measured = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    measured |= {
        "token_ids": tokens.int(),
        "is_soft": rollout.is_soft[row][mask],
        "forced": ~rollout.draw_mask[row][mask].any(dim=-1),
        "draws": rollout.draws[row][mask].int(),
        "weights": rollout.weights[row][mask].float(),
        "top_weight": rollout.top_weight[row][mask].float(),
    }
    arrays = {name: values.cpu().numpy() for name, values in measured.items()}
    return arrays | {"ranks": ranks, "temperatures": np.array(TEMPERATURES, dtype=np.float32)}


@torch.no_grad()
def logprob_chunks(models: list, rollout: Rollout, row: int):
    """Teacher-forced log-probs of a row at temperature 1: yields (slice of steps, [log p (n, V) of each model]).

    A chunk has at most MAX_LOGITS logits, so (T, V) is never in memory. Of models that pad the same vocabulary to
    different sizes, only the ids that all of them have are used.
    """
    rows = torch.tensor([row], device=rollout.draws.device)
    hidden = [llms.completion_hidden(model, rollout, rows)[0] for model in models]  # (T, H) each
    vocab_size = min(model.config.vocab_size for model in models)
    size = max(1, MAX_LOGITS // vocab_size)
    for start in range(0, len(hidden[0]), size):
        steps = slice(start, start + size)
        logits = [head_logits(model, h[steps]) for model, h in zip(models, hidden, strict=True)]
        yield steps, [torch.log_softmax(x[:, :vocab_size], dim=-1) for x in logits]


def measure_chunk(logp, tokens, temperature: float, top_k: int, ranks: np.ndarray) -> dict[str, torch.Tensor]:
    """The measures of n steps. logp: (n, V) at temperature 1, tokens: (n,)."""
    sorted_logp = _sort_descending(logp)  # (n, V): sorted once, since every temperature has the same order
    # At T = 1 there is nothing to normalize: doing it again would change the last digit.
    sorted_logp_t = sorted_logp if temperature == 1 else torch.log_softmax(sorted_logp / temperature, dim=-1)
    chosen = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    result = {
        "logp": chosen,
        "logp_t": chosen if temperature == 1 else chosen / temperature - (logp / temperature).logsumexp(dim=-1),
        "rank": measures.rank(logp, tokens).int(),
        "argmax_p": measures.argmax_probs(logp),
        "topk_ids": logp.topk(top_k, dim=-1).indices.int(),
        "topk_logp": sorted_logp[:, :top_k],
        "tail_mass": sorted_logp[:, top_k:].exp().sum(dim=-1),
        "rank_curve": sorted_logp[:, torch.as_tensor(ranks - 1, device=logp.device).long()].half(),
    }
    for suffix, distribution in (("", sorted_logp), ("_t", sorted_logp_t)):
        result[f"entropy{suffix}"] = measures.entropy(distribution)
        result[f"varentropy{suffix}"] = measures.varentropy(distribution)
        result[f"collision{suffix}"] = measures.collision(distribution)
        result[f"topk_mass{suffix}"] = measures.top_mass(distribution, top_k)
        result[f"n95{suffix}"] = measures.nucleus_size(distribution).int()
        result[f"margin{suffix}"] = measures.margin(distribution)
    return result


def rank_grid(vocab_size: int) -> np.ndarray:
    """At most NUM_RANKS ranks, log-spaced, from 1 to vocab_size."""
    return np.unique(np.geomspace(1, vocab_size, NUM_RANKS).round().astype(np.int32))


def _sort_descending(logp: torch.Tensor) -> torch.Tensor:
    """Sorted values. On a CPU numpy sorts them, 20 times as fast as torch, which sorts the indices too."""
    if logp.device.type != "cpu":
        return logp.sort(dim=-1, descending=True).values
    return -torch.from_numpy(np.sort(-logp.numpy(), axis=-1))


# ---------------------------------------------------------------- forcing another token at a fork


def force_forks(model, tokenizer, trace: Trace, rollout: Rollout, config) -> list[dict]:
    """Would the answer change if another token had been sampled? One entry for each of the `num_forks` strongest forks.

    At a fork the runner-up, the likeliest token that was not sampled, is forced, and `num_resamples` continuations are
    sampled. changed_with_runner_up is the share of them with another answer than the trace. As many continuations after
    the trace's own token differ too, by chance alone: changed_with_token, the value to compare with. Forks at which one
    of the two tokens would end the answer, or would leave no room for a continuation, are skipped.
    """
    stops = llms.stop_ids(model, tokenizer)
    prompt, tokens = rollout.prompt_ids[0].tolist(), trace["token_ids"].tolist()
    last = len(tokens) - 1 if trace.meta["finish"] == "stop" else config.max_new_tokens - 1
    id_prompts, results = TokenIdPrompts(tokenizer), []
    for t in np.argsort(-trace["entropy"], kind="stable").tolist():
        runner_up = next(token for token in trace["topk_ids"][t].tolist() if token != tokens[t])
        if not trace.forks[t] or len(results) == config.num_forks():
            break
        if t == last or runner_up in stops:
            continue
        starts = [tokens[: t + 1]] * config.num_resamples + [tokens[:t] + [runner_up]] * config.num_resamples
        id_prompts.ids = {"with the token": prompt + starts[0], "with the runner-up": prompt + starts[-1]}
        options = config.sampling() | {"max_new_tokens": config.max_new_tokens - t - 1, "seed": config.seed + 1 + t}
        paths = generate(model, id_prompts, list(id_prompts.ids), group_size=config.num_resamples, **options)
        ends = [row_ids[mask].tolist() for row_ids, mask in zip(paths.trace_ids, paths.completion_mask, strict=True)]
        completions = [start + end for start, end in zip(starts, ends, strict=True)]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        answers = [config.answer_of(template_opening(config, tokenizer) + text) for text in texts]
        changed = np.array([answer != trace.meta["answer"] for answer in answers]).reshape(2, -1).mean(axis=1)
        results.append(
            {
                "step": t,
                "token": trace.label(tokens[t]),
                "runner_up": trace.label(runner_up),
                "changed_with_token": float(changed[0]),
                "changed_with_runner_up": float(changed[1]),
                "answers_with_runner_up": answers[config.num_resamples :],
            }
        )
    return results


class TokenIdPrompts:
    """A tokenizer that encodes a name as the ids given for it in `ids`; otherwise `tokenizer`.

    A continuation needs exactly the trace's tokens, and decoded text may be encoded as other tokens.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids: dict[str, list[int]] = {}

    def __call__(self, name, **_):
        return {"input_ids": self.ids[name]}

    def __getattr__(self, attribute):
        return getattr(self.tokenizer, attribute)
