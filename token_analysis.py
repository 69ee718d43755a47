"""Token probabilities of one answer: sampled as in training, measured at every step over the whole vocabulary, drawn.

    python token_analysis.py --output_dir analysis_results           # the embedded model; no network, no GPU
    python token_analysis.py --model_name runs/tiny/checkpoints/latest --prompt "Mia has 3 pens. ..." --soft_thinking
    python token_analysis.py --from_trace analysis_results           # draws it all again, without a model
    python token_analysis.py --compare tiny runs/tiny/checkpoints/latest --output_dir before_and_after
    python token_analysis.py --compare normal_trace soft_trace       # two folders: from their data alone

A trace is sampled by rollout.generate and then read once more by the model, soft mixtures included; every number comes
from that second pass. It is saved, and all that is shown is made from what was saved:

    meta.json, trace.npz, trace.jsonl   the trace: settings and answers; arrays; tokens with their bytes and top-k
    tokens.csv                          a row a step, all scalars (`Trace.columns` defines them)
    summary.json                        means by part of the text, consistency, forks, soft steps
    trace_openai.json                   log-probs in the shape of OpenAI's API, for tools that read it
    *.png, token_pdfs/, trace.html      pictures, one figure per token, the page to browse (trace_page.py)

Distributions come twice: at temperature 1, and (`_t`) at the sampling temperature, which for greedy decoding is 1, as
in rollout.py. Units are nats; bits = nats / ln 2.

From top to bottom: the measures, recording a trace, a trace and what follows from it, comparing, the command line.
Left out on purpose: hidden states and attention (this is about what a model says, not why), other samplers.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import math
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import evaluator
import llms
import rldatasets
from analysis import page, pictures
from rollout import Rollout, generate
from tracking.run_config import ArgumentParser, GRPOConfig, Soft, setting

# Logits of one chunk: 64 MiB, and about ten times that with a sort, its indices and the measures. No less: blocks under
# 32 MiB come from glibc's heap, which fragmented to 2 GB in some runs with smaller chunks; larger ones are given back.
MAX_LOGITS = 2**24
TEMPERATURES = (0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 2.0)  # at which p(argmax) is asked for
NUM_RANKS = 250  # points of a rank curve, log-spaced from the first rank to the last
NUCLEUS = 0.95
FORK_QUANTILE = 0.8
OPENAI_TOP = 20  # what OpenAI's API gives at most; its log-prob of the impossible is OPENAI_FLOOR
OPENAI_FLOOR = -9999.0
NUM_SHIFTED = 20

# ---------------------------------------------------------------- measures of a distribution
# logp: (..., V) natural logarithms of probabilities that sum to 1; -inf is allowed. The result is (...).


def entropy(logp: torch.Tensor) -> torch.Tensor:
    """H = -sum p ln p, nats. ln V where all tokens are alike, 0 where one has everything."""
    return torch.special.entr(logp.exp()).sum(dim=-1)


def varentropy(logp: torch.Tensor) -> torch.Tensor:
    """sum p (ln p + H)^2, nats^2: how far tokens' surprisals lie from their mean H. 0 for an even choice."""
    p = logp.exp()
    return torch.where(p > 0, p * (logp + entropy(logp).unsqueeze(-1)).square(), 0).sum(dim=-1)


def collision(logp: torch.Tensor) -> torch.Tensor:
    """sum p^2: the chance that two independent draws agree."""
    return logp.exp().square().sum(dim=-1)


def top_mass(sorted_logp: torch.Tensor, k: int) -> torch.Tensor:
    """Mass of the k likeliest tokens. This and the next two take logp in descending order."""
    return sorted_logp[..., :k].exp().sum(dim=-1)


def nucleus_size(sorted_logp: torch.Tensor, mass: float = NUCLEUS) -> torch.Tensor:
    """The smallest n such that the n likeliest tokens have at least `mass` together."""
    short_of_it = sorted_logp.exp().cumsum(dim=-1) < mass
    return (short_of_it.sum(dim=-1) + 1).clamp(max=sorted_logp.shape[-1])


def margin(sorted_logp: torch.Tensor) -> torch.Tensor:
    """p1 - p2: the lead of the likeliest token."""
    return sorted_logp[..., 0].exp() - sorted_logp[..., 1].exp()


def rank(logp: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """1 + #{p > p(token)}; tokens: (...). Equals share a rank."""
    return (logp > logp.gather(-1, tokens.unsqueeze(-1))).sum(dim=-1) + 1


def argmax_probs(logp: torch.Tensor, temperatures=TEMPERATURES) -> torch.Tensor:
    """p_T(argmax) for every T -> (..., number of T): how sure the choice stays when the distribution is flattened."""
    behind = logp - logp.amax(dim=-1, keepdim=True)  # 0 for the argmax, below it for all others
    return torch.stack([1 / (behind / T).exp_().sum(dim=-1) for T in temperatures], dim=-1)


def kl(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum p (ln p - ln q), nats."""
    p = logp.exp()
    return torch.where(p > 0, p * (logp - logq), 0).sum(dim=-1)


def jsd(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence: mean KL of p and of q to their average. From 0 to ln 2."""
    average = torch.logaddexp(logp, logq) - math.log(2)
    return (kl(logp, average) + kl(logq, average)) / 2


# ---------------------------------------------------------------- measures of a trace and of several


def forks(step_entropy: np.ndarray) -> np.ndarray:
    """(T,) bool: H at or above the trace's own 80th percentile, the minority of tokens at which reasoning branches
    (Wang et al. 2025, "Beyond the 80/20 rule")."""
    return step_entropy >= np.quantile(step_entropy, FORK_QUANTILE)


def path_share(trace_ids: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """S(t): share of the rows after the first that equal it up to and including step t. (1 + R, T) -> (T of row 0,);
    NaN when R = 0."""
    length = int(completion_mask[0].sum())
    same = (trace_ids[1:, :length] == trace_ids[0, :length]) & completion_mask[1:, :length]
    return same.cumprod(dim=1).float().mean(dim=0)


def majority_share(answers: list[str | None]) -> float | None:
    """Share of the most frequent answer; rows without an answer agree with nobody. None for no rows."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes.values(), default=0) / len(answers) if answers else None


def effective_draws(draws: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """exp(H(w)) of each mixture, equal draws added up: 1 for one token, K for an even mixture. (T, K) -> (T,)"""
    first = [[list(row).index(draw) for draw in row] for row in draws]  # equal draws go to the place of the first
    total = np.zeros(weights.shape)
    np.add.at(total, (np.arange(len(draws))[:, None], np.array(first)), weights)
    return np.exp(-(total * np.log(np.where(total > 0, total, 1))).sum(axis=1))


def as_number(text: str | None) -> str | None:
    """One spelling for each number, so that answers can be counted; other text as it is."""
    number = evaluator.parse_number(text)
    return text if number is None else str(number)


# ---------------------------------------------------------------- recording


@torch.no_grad()
def logprob_chunks(models: list, rollout: Rollout, row: int):
    """What `models` say at each step of a row, teacher-forced: yields (slice of steps, [log p (n, V) of each model]).

    At temperature 1. A chunk has at most MAX_LOGITS logits, so (T, V) never exists. Models that pad the same
    vocabulary to different sizes are compared on the ids that all of them have.
    """
    rows = torch.tensor([row], device=rollout.draws.device)
    hidden = [llms.completion_hidden(model, rollout, rows)[0] for model in models]  # (T, H) each
    vocab_size = min(model.config.vocab_size for model in models)
    size = max(1, MAX_LOGITS // vocab_size)
    for start in range(0, len(hidden[0]), size):
        steps = slice(start, start + size)
        heads = [(model.get_output_embeddings(), h[steps]) for model, h in zip(models, hidden, strict=True)]
        yield steps, [torch.log_softmax(head(h)[:, :vocab_size].float(), dim=-1) for head, h in heads]


def measure(model, rollout: Rollout, row: int = 0, *, temperature=1.0, top_k=50, full_file=None) -> dict:
    """The arrays of a trace, first axis T, the row's steps. full_file: log p (T, V) float32 goes there, too (.npy)."""
    tokens = rollout.trace_ids[row][rollout.completion_mask[row]]  # (T,)
    ranks = rank_grid(model.config.vocab_size)
    chunks, full = [], None
    for steps, (logp,) in logprob_chunks([model], rollout, row):
        chunks.append(_measure_chunk(logp, tokens[steps], temperature or 1.0, top_k, ranks))
        if full_file is not None:
            if full is None:
                full = np.lib.format.open_memmap(full_file, "w+", np.float32, (len(tokens), logp.shape[-1]))
            full[steps] = logp.cpu().numpy()
    measured = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    written = rollout.completion_mask[row]
    measured |= {
        "token_ids": tokens.int(),
        "is_soft": rollout.is_soft[row][written],
        "forced": ~rollout.draw_mask[row][written].any(dim=-1),
        "draws": rollout.draws[row][written].int(),
        "weights": rollout.weights[row][written].float(),
        "top_weight": rollout.top_weight[row][written].float(),
    }
    arrays = {name: values.cpu().numpy() for name, values in measured.items()}
    return arrays | {"ranks": ranks, "temperatures": np.array(TEMPERATURES, dtype=np.float32)}


def rank_grid(vocab_size: int) -> np.ndarray:
    """At most NUM_RANKS ranks, log-spaced, the first and the last among them."""
    return np.unique(np.geomspace(1, vocab_size, NUM_RANKS).round().astype(np.int32))


def _measure_chunk(logp, tokens, temperature, top_k, ranks) -> dict[str, torch.Tensor]:
    sorted_logp = _descending(logp)  # (n, V): the one sort of a step
    # The same order at any temperature. (Normalised again, T = 1 would differ in the last digit.)
    flattened = sorted_logp if temperature == 1 else torch.log_softmax(sorted_logp / temperature, dim=-1)
    chosen = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    result = {
        "logp": chosen,
        "logp_t": chosen if temperature == 1 else chosen / temperature - (logp / temperature).logsumexp(dim=-1),
        "rank": rank(logp, tokens).int(),
        "argmax_p": argmax_probs(logp),
        "topk_ids": logp.topk(top_k, dim=-1).indices.int(),
        "topk_logp": sorted_logp[:, :top_k],
        "tail_mass": sorted_logp[:, top_k:].exp().sum(dim=-1),
        "rank_curve": sorted_logp[:, torch.as_tensor(ranks - 1, device=logp.device).long()].half(),
    }
    for suffix, distribution in (("", sorted_logp), ("_t", flattened)):
        result[f"entropy{suffix}"] = entropy(distribution)
        result[f"varentropy{suffix}"] = varentropy(distribution)
        result[f"collision{suffix}"] = collision(distribution)
        result[f"topk_mass{suffix}"] = top_mass(distribution, top_k)
        result[f"n95{suffix}"] = nucleus_size(distribution).int()
        result[f"margin{suffix}"] = margin(distribution)
    return result


def _descending(logp: torch.Tensor) -> torch.Tensor:
    """Sorted values. On a CPU by numpy, 20 times as fast as torch, which sorts the indices along."""
    if logp.device.type != "cpu":
        return logp.sort(dim=-1, descending=True).values
    return -torch.from_numpy(np.sort(-logp.numpy(), axis=-1))


def record(model, tokenizer, problem: rldatasets.Problem, config, folder: Path):
    """Samples an answer and `num_resamples` more, measures the first, saves it in `folder` -> (Trace, Rollout).

    Raises ValueError when the model ends the answer before it begins.
    """
    prompt = rldatasets.build_prompt(tokenizer, problem.question, **config.prompting())
    mode = config.rollout_mode()
    mode.check_reserve(tokenizer)
    # Row 0 does not depend on the rows after it: the trace is the same with and without resampled paths.
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
    arrays["path_share"] = path_share(rollout.trace_ids, rollout.completion_mask).cpu().numpy()
    answers = [config.answer_of(text) for text in rollout.texts]
    resamples = zip(answers[1:], rollout.lengths.tolist()[1:], rollout.texts[1:], strict=True)
    meta = {
        "model": config.model_name,
        "tokenizer": fingerprint(tokenizer),
        "vocab_size": model.config.vocab_size,
        "question": problem.question,
        "gold": as_number(problem.answer),
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
    save(trace, folder)
    if config.num_forks():
        meta["forced_forks"] = force_forks(model, tokenizer, trace, rollout, config)
        save(trace, folder)
    return trace, rollout


def force_forks(model, tokenizer, trace: "Trace", rollout: Rollout, config) -> list[dict]:
    """What if another token had been taken? At the strongest forks, the likeliest token that was not chosen is forced,
    and `num_resamples` answers go on from it: how often do they differ from the trace's answer?

    As many go on from the token that was chosen. Their answers differ too, by chance alone, and are what to compare
    with. Steps at which one of the two tokens would end the text, or leave no room to go on, are passed over.
    """
    stops = llms.stop_ids(model, tokenizer)
    prompt, tokens = rollout.prompt_ids[0].tolist(), trace["token_ids"].tolist()
    last = len(tokens) - 1 if trace.meta["finish"] == "stop" else config.max_new_tokens - 1
    exact, results = ExactPrompts(tokenizer), []
    for t in np.argsort(-trace["entropy"], kind="stable").tolist():
        runner_up = next(token for token in trace["topk_ids"][t].tolist() if token != tokens[t])
        if not trace.forks[t] or len(results) == config.num_forks():
            break
        if t == last or runner_up in stops:
            continue
        starts = [tokens[: t + 1]] * config.num_resamples + [tokens[:t] + [runner_up]] * config.num_resamples
        exact.ids = {"with the token": prompt + starts[0], "with the runner-up": prompt + starts[-1]}
        options = config.sampling() | {"max_new_tokens": config.max_new_tokens - t - 1, "seed": config.seed + 1 + t}
        paths = generate(model, exact, list(exact.ids), group_size=config.num_resamples, **options)
        ends = [row_ids[mask].tolist() for row_ids, mask in zip(paths.trace_ids, paths.completion_mask, strict=True)]
        written = [start + end for start, end in zip(starts, ends, strict=True)]
        answers = [config.answer_of(text) for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
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


class ExactPrompts:
    """A tokenizer for which names stand for given ids. A fork has to go on from the very tokens of the trace, and text
    that is decoded and encoded again may become others."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids: dict[str, list[int]] = {}

    def __call__(self, name, **_):
        return {"input_ids": self.ids[name]}

    def __getattr__(self, attribute):
        return getattr(self.tokenizer, attribute)


# ---------------------------------------------------------------- tokens as bytes

# Byte-level BPE spells every byte as a printable character: itself where it is one, else one from U+0100 on (GPT-2).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)}


def token_bytes(tokenizer, ids: Iterable[int]) -> dict[int, bytes | None]:
    """What each token writes; None for an id beyond the tokenizer's, which is there to pad the logits."""
    added, backend = tokenizer.added_tokens_decoder, getattr(tokenizer, "backend_tokenizer", None)
    is_byte_level = backend is not None and "ByteLevel" in repr(backend.decoder)
    result = {}
    for token in ids:
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            result[token] = None
        elif token not in added and is_byte_level:
            result[token] = bytes(BYTE_OF[character] for character in piece)
        elif token not in added and len(piece) == 6 and piece.startswith("<0x"):  # a byte in SentencePiece
            result[token] = bytes([int(piece[3:5], 16)])
        else:  # SentencePiece marks a space by U+2581
            result[token] = (piece if token in added else piece.replace("\u2581", " ")).encode()
    return result


def label(token: int, spelled: bytes | None) -> str:
    """The token as text. Bytes that are no whole UTF-8 are written as \\xf0\\x9f."""
    return f"<unused {token}>" if spelled is None else spelled.decode("utf-8", "backslashreplace")


def fingerprint(tokenizer) -> str:
    """Equal for tokenizers with the same tokens under the same ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- a trace, and what follows from it


@dataclass
class Trace:
    """What was recorded; T steps, the top K tokens of each. All that is shown or written follows from it.

    arrays: token_ids, logp, logp_t, rank (T,); entropy, varentropy, collision, topk_mass, n95, margin and the same
    with _t (T,); tail_mass (T,) beyond the top K; topk_ids, topk_logp (T, K); rank_curve (T, len(ranks)) log p at
    those ranks; argmax_p (T, len(TEMPERATURES)); path_share (T,); is_soft, forced, top_weight (T,); draws, weights
    (T, draws a position).
    """

    meta: dict
    arrays: dict[str, np.ndarray]
    spelling: dict[int, bytes | None]  # of every id in the arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __len__(self) -> int:
        return len(self.arrays["token_ids"])

    def label(self, token: int) -> str:
        return label(token, self.spelling[token])

    @functools.cached_property
    def labels(self) -> list[str]:
        return [self.label(token) for token in self["token_ids"].tolist()]

    @functools.cached_property
    def forks(self) -> np.ndarray:
        return forks(self["entropy"])

    @functools.cached_property
    def parts(self) -> list[str]:
        """ "reasoning", "answer" or "" for each step: where it begins between the tags. Without a closing tag a part
        goes on to the end; a prompt may have opened the reasoning already."""
        spelled = [self.spelling[token] or b"" for token in self["token_ids"].tolist()]
        starts = np.cumsum([0] + [len(piece) for piece in spelled[:-1]])  # the byte at which each token begins
        text, names = b"".join(spelled), np.full(len(spelled), "", dtype=object)
        for name, tag in zip(("reasoning", "answer"), evaluator.TAGS[self.meta["tags"]], strict=True):
            opening, closing = f"<{tag}>".encode(), f"</{tag}>".encode()
            prefilled = self.meta["prompt"].rstrip().encode().endswith(opening)
            begin = 0 if prefilled else text.find(opening) + len(opening)
            if prefilled or opening in text:
                end = text.find(closing, begin)
                names[(starts >= begin) & (starts < (len(text) if end < 0 else end))] = name
        return names.tolist()

    def columns(self) -> dict[str, np.ndarray | list]:
        """tokens.csv by columns: of the token, of its distribution at both temperatures, of the path, of soft steps."""
        a, likeliest = self.arrays, self["topk_ids"][:, 0]
        result = {
            "step": np.arange(len(self)),
            "token_id": a["token_ids"],
            "token": self.labels,
            "part": self.parts,
            "p": np.exp(a["logp"]),
            "rank": a["rank"],
            "argmax_id": likeliest,
            "argmax": [self.label(token) for token in likeliest.tolist()],
            "agrees": a["token_ids"] == likeliest,
            "fork": self.forks,
        }
        for t in ("", "_t"):
            result |= {f"logp{t}": a[f"logp{t}"], f"surprisal{t}": -a[f"logp{t}"], f"entropy{t}": a[f"entropy{t}"]}
            result[f"perplexity{t}"] = np.exp(a[f"entropy{t}"])
            result |= {name + t: a[name + t] for name in ("varentropy", "collision", "margin", "topk_mass", "n95")}
        result |= {name: a[name] for name in ("tail_mass", "path_share", "is_soft", "forced", "top_weight")}
        return result | {"effective_draws": effective_draws(a["draws"], a["weights"])}

    def summary(self) -> dict:
        """The trace on the whole. Means are over steps; paths and answers are those of the resamples."""
        parts, a, meta = np.array(self.parts), self.arrays, self.meta
        answers = [meta["answer"]] + [resample["answer"] for resample in meta["resamples"]]
        return {
            "model": meta["model"],
            "tokens": len(self),
            "finish": meta["finish"],
            "answer": meta["answer"],
            "gold": meta["gold"],
            "perplexity": math.exp(-a["logp"].mean()),
            "all": self.means(np.ones(len(self), dtype=bool)),
            "by_part": {name: self.means(parts == name) for name in ("reasoning", "answer") if name in parts},
            "exit_step": self.exit_step(),
            "local_consistency": {
                "argmax_agreement": float((a["token_ids"] == a["topk_ids"][:, 0]).mean()),
                "collision": float(a["collision"].mean()),
                "argmax_p": dict(zip(map(str, TEMPERATURES), a["argmax_p"].mean(axis=0).tolist(), strict=True)),
            },
            "path_consistency": {
                "resamples": len(meta["resamples"]),
                "steps_shared_by_half": int((a["path_share"] >= 0.5).sum()),
            },
            "answer_consistency": {
                "answers": Counter(answer or "(none)" for answer in answers),
                "majority_share": majority_share(answers),
            },
            "forks": {
                "entropy_from": float(np.quantile(a["entropy"], FORK_QUANTILE)),
                "steps": np.flatnonzero(self.forks).tolist(),
                "forced": meta["forced_forks"],
            },
            "soft": self.soft_summary(),
        }

    def means(self, where: np.ndarray) -> dict[str, float]:
        """Of the main scalars, over the steps where (T,) is True."""
        names = ("entropy", "varentropy", "topk_mass", "margin", "n95", "rank", "logp")
        return {"tokens": int(where.sum())} | {name: float(self[name][where].mean()) for name in names}

    def soft_summary(self) -> dict:
        """How much of a mixture the soft steps were: 1 - max weight, exp(H(w)), and the step after the last of them.
        None where there is no soft step."""
        soft = self["is_soft"]
        draws = effective_draws(self["draws"], self["weights"])
        return {
            "share_soft": float(soft.mean()),
            "one_minus_top_weight": float(1 - self["top_weight"][soft].mean()) if soft.any() else None,
            "effective_draws": float(draws[soft].mean()) if soft.any() else None,
            "soft_exit_step": int(np.flatnonzero(soft)[-1]) + 1 if soft.any() else None,
        }

    def exit_step(self) -> int | None:
        """The first step after the reasoning; None if there was none or it did not end."""
        inside = [t for t, part in enumerate(self.parts) if part == "reasoning"]
        return inside[-1] + 1 if inside and inside[-1] + 1 < len(self) else None


# ---------------------------------------------------------------- on disk


def save(trace: Trace, folder: Path) -> None:
    """The trace itself. meta.json is removed first and written last: where it is, the trace is whole. What an older
    trace had more of, pages and figures, goes."""
    for old in (folder / "meta.json", *folder.glob("topk_*.png"), *folder.glob("token_pdfs/step_*.pdf")):
        old.unlink(missing_ok=True)
    np.savez_compressed(folder / "trace.npz", **trace.arrays)

    def entry(token, **more):
        spelled = trace.spelling[token]
        return {"id": token, "token": trace.label(token), "bytes": None if spelled is None else list(spelled), **more}

    with open(folder / "trace.jsonl", "w", encoding="utf-8") as out:
        for t, token in enumerate(trace["token_ids"].tolist()):
            row = {"step": t, **entry(token, logp=finite(trace["logp"][t]))}
            top = zip(trace["topk_ids"][t].tolist(), trace["topk_logp"][t], strict=True)
            row["top"] = [entry(other, logp=finite(logp)) for other, logp in top]
            if trace["is_soft"][t]:
                draws = zip(trace["draws"][t].tolist(), trace["weights"][t].tolist(), strict=True)
                row["draws"] = [entry(draw, weight=weight) for draw, weight in draws]
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_json(folder / "meta.json", trace.meta)


def load(folder: str | Path) -> Trace:
    """What `save` wrote. Raises ValueError, one line, where there is no trace, or not a whole one."""
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        raise ValueError(f"no trace in {str(folder)!r}: expected meta.json, trace.npz and trace.jsonl")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        with np.load(folder / "trace.npz", allow_pickle=False) as stored:
            arrays = dict(stored)
        spelling = {}
        with open(folder / "trace.jsonl", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                for entry in [row, *row["top"], *row.get("draws", [])]:
                    spelling[entry["id"]] = None if entry["bytes"] is None else bytes(entry["bytes"])
        trace = Trace(meta, arrays, spelling)
        trace.columns(), trace.summary(), page.page_data(trace)  # they need all that has to be there
    except (OSError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"not a whole trace in {str(folder)!r} ({type(error).__name__}: {error})") from error
    return trace


def write_views(trace: Trace, folder: Path, config) -> None:
    """All that can be made again from a trace: tables, pictures, the page, a figure per token."""
    write_csv(folder / "tokens.csv", trace.columns())
    write_json(folder / "summary.json", trace.summary())
    write_json(folder / "trace_openai.json", openai_logprobs(trace))
    page.write_page(trace, folder / "trace.html")
    pictures.draw_pictures(trace, folder)
    if not config.skip_individual_pdfs:
        pictures.draw_token_figures(trace, folder / "token_pdfs", config.max_pdfs)


def openai_logprobs(trace: Trace) -> dict:
    """{"content": [{token, logprob, bytes, top_logprobs}]}: `logprobs` of a choice in OpenAI's chat completions."""

    def entry(token, logp):
        spelled = trace.spelling[token]
        spelled = None if spelled is None else list(spelled)
        return {"token": trace.label(token), "logprob": finite(logp), "bytes": spelled}

    content = []
    for token, logp, ids, logps in zip(
        *(trace[n] for n in ("token_ids", "logp", "topk_ids", "topk_logp")), strict=True
    ):
        top = zip(ids.tolist()[:OPENAI_TOP], logps, strict=False)
        content.append(entry(int(token), logp) | {"top_logprobs": [entry(*pair) for pair in top]})
    return {"content": content}


def finite(logp) -> float:
    """JSON knows no infinity; OpenAI writes -9999 for what is impossible."""
    return max(float(logp), OPENAI_FLOOR)


def write_json(file: Path, value) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(file: Path, columns: dict) -> None:
    """A line a step: white space and control characters in tokens are written as in Python, \\n for a new line."""

    def cell(value):
        if isinstance(value, str):
            return "".join(c if c.isprintable() and c != "\\" else repr(c)[1:-1] for c in value)
        return int(value) if isinstance(value, (int, np.integer, np.bool_)) else f"{value:.6g}"

    with open(file, "w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([cell(value) for value in row] for row in zip(*columns.values(), strict=True))


# ---------------------------------------------------------------- comparing


def compare_forced(models: list, tokenizer, rollout: Rollout, row: int = 0) -> tuple[dict, list[dict]]:
    """How two models, a and b, see the same tokens: (columns, a row a step; the vocabulary's most shifted tokens).

    A token's shift is the sum over steps of p_b - p_a: how many times more often b would write it in these places.
    """
    tokens = rollout.trace_ids[row][rollout.completion_mask[row]]  # (T,)
    chunks, shift = [], 0
    for steps, (a, b) in logprob_chunks(models, rollout, row):
        y = tokens[steps].unsqueeze(-1)
        chunk = {"logp_a": a.gather(-1, y).squeeze(-1), "logp_b": b.gather(-1, y).squeeze(-1)}
        chunk |= {"entropy_a": entropy(a), "entropy_b": entropy(b), "kl_ab": kl(a, b), "kl_ba": kl(b, a)}
        chunks.append(chunk | {"jsd": jsd(a, b), "argmax_a": a.argmax(dim=-1), "argmax_b": b.argmax(dim=-1)})
        shift = shift + (b.exp() - a.exp()).sum(dim=0)  # (V,)
    arrays = {name: torch.cat([chunk[name] for chunk in chunks]).cpu().numpy() for name in chunks[0]}
    arrays = {"step": np.arange(len(tokens)), "token": tokens.cpu().numpy(), **arrays}
    arrays |= {"change": arrays["logp_b"] - arrays["logp_a"], "flips": arrays["argmax_a"] != arrays["argmax_b"]}

    most_shifted = shift.abs().argsort(descending=True, stable=True)[:NUM_SHIFTED].tolist()
    names = ("token", "argmax_a", "argmax_b")
    ids = {*most_shifted, *(token for name in names for token in arrays[name].tolist())}
    labels = {token: label(token, spelled) for token, spelled in token_bytes(tokenizer, ids).items()}
    columns = arrays | {name: [labels[token] for token in arrays[name].tolist()] for name in names}
    return columns, [{"id": t, "token": labels[t], "shift": float(shift[t])} for t in most_shifted]


def forced_summary(columns: dict, most_shifted: list[dict]) -> dict:
    """Means over steps, and the steps with the largest JSD."""
    order = np.argsort(-columns["jsd"], kind="stable")[:NUM_SHIFTED].tolist()
    plain = {name: np.asarray(column).tolist() for name, column in columns.items()}
    return {
        "tokens": len(columns["jsd"]),
        "mean": {name: float(columns[name].mean()) for name in ("change", "kl_ab", "kl_ba", "jsd", "flips")},
        "most_shifted_steps": [{name: column[t] for name, column in plain.items()} for t in order],
        "most_shifted_tokens": most_shifted,
    }


def compare_free(a: Trace, b: Trace) -> dict:
    """Two free runs of one prompt. Up to the first difference they stand in the same context and can be compared step
    by step; after it only their distributions can. Raises ValueError if prompt or tokenizer differ."""
    for what in ("tokenizer", "prompt"):
        if a.meta[what] != b.meta[what]:
            raise ValueError(f"cannot compare traces of different {what}s: {a.meta[what]!r} and {b.meta[what]!r}")
    shared = common_prefix(a["token_ids"], b["token_ids"])

    def side(trace):
        after = np.arange(len(trace)) >= shared
        return {
            "model": trace.meta["model"],
            "tokens": len(trace),
            "answer": trace.meta["answer"],
            "exit_step": trace.exit_step(),
            **trace.soft_summary(),
            "at_divergence": trace.labels[shared] if after.any() else None,
            "after_divergence": trace.means(after) if after.any() else None,
        }

    return {
        "common_prefix": shared,
        "first_divergence": shared if shared < max(len(a), len(b)) else None,
        "argmax_flips_before": int((a["topk_ids"][:shared, 0] != b["topk_ids"][:shared, 0]).sum()),
        "mean_change_of_logp_before": float((b["logp"][:shared] - a["logp"][:shared]).mean()) if shared else None,
        "a": side(a),
        "b": side(b),
    }


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens are equal before the first difference, or the end of either."""
    n = min(len(a), len(b))
    return int(np.append(a[:n] != b[:n], True).argmax())


def compare_traces(folders: list[str], output: Path) -> None:
    """--compare of two folders with traces: no model is needed."""
    a, b = map(load, folders)
    write_comparison(a, b, {}, output)


def compare_models(names: list[str], problem: rldatasets.Problem, config, output: Path) -> None:
    """--compare of two models: a trace of each, in a/ and b/; and both models on both texts, teacher-forced."""
    (model_a, tokenizer_a), (model_b, tokenizer_b) = (
        llms.load(n, trust_remote_code=config.trust_remote_code) for n in names
    )
    if fingerprint(tokenizer_a) != fingerprint(tokenizer_b):
        raise ValueError(f"--compare: {names[0]!r} and {names[1]!r} have different tokenizers, so no tokens in common")
    prompts = {rldatasets.build_prompt(t, problem.question, **config.prompting()) for t in (tokenizer_a, tokenizer_b)}
    if len(prompts) == 2:
        raise ValueError(
            f"--compare: {names[0]!r} and {names[1]!r} have different chat templates: try --prompt_style plain"
        )
    traces, forced = {}, {}
    for side, name, model, tokenizer in zip("ab", names, (model_a, model_b), (tokenizer_a, tokenizer_b), strict=True):
        folder = output_folder(output / side)
        traces[side], rollout = record(model, tokenizer, problem, dataclasses.replace(config, model_name=name), folder)
        write_views(traces[side], folder, config)
        columns, most_shifted = compare_forced([model_a, model_b], tokenizer, rollout)
        forced[f"text_of_{side}"] = forced_summary(columns, most_shifted)
        write_csv(output / f"compare_text_of_{side}.csv", columns)
        picture = output / f"compare_text_of_{side}.png"
        pictures.draw_forced_comparison(columns, most_shifted, names, side, picture)
    write_comparison(traces["a"], traces["b"], {"forced": forced}, output)


def write_comparison(a: Trace, b: Trace, more: dict, output: Path) -> None:
    free = compare_free(a, b)
    write_json(output / "compare.json", {"a": a.meta["model"], "b": b.meta["model"], **more, "free": free})
    pictures.draw_free_comparison(a, b, free["common_prefix"], output / "compare_free.png")


# ---------------------------------------------------------------- the command line


@dataclass
class Subject:
    _argument_group_name = "what to analyse"
    model_name: str = setting("tiny", "hub name, local folder (a checkpoint too), or an embedded model")
    prompt: str | None = setting(None, "a question; default: a test problem of the dataset")
    dataset_name: str = setting("arithmetic", " or ".join(rldatasets.DATASETS))
    dataset_path: str | None = setting(None, "JSON lines in GSM8K's shape, in place of the dataset")
    dataset_index: int = setting(0, "which test problem, from 0")
    trust_remote_code: bool = setting(False, "run code that comes with the model")
    tags: str = setting("reasoning", "name of the reasoning block", tuple(evaluator.TAGS))
    prompt_style: str = setting("auto", "chat: the tokenizer's template; plain: R1-Zero's", rldatasets.PROMPT_STYLES)
    prefill: bool = setting(False, "write the opening tag of the reasoning for the model")
    from_trace: str | None = setting(None, "a folder with a trace: draw it again, without a model")
    compare: list[str] | None = setting(None, "two models, or two folders with traces")


@dataclass
class Sampling:
    _argument_group_name = "sampling"
    max_new_tokens: int = setting(256, "tokens of the answer, at most")
    temperature: float = setting(1.0, "of sampling; 0 is greedy")
    stop_at_answer: bool = setting(False, "</answer> ends an answer too")
    seed: int = setting(0, "of the sampling")
    num_resamples: int = setting(16, "more answers, for the consistency of paths and answers")
    forks: int | None = setting(None, "strongest forks at which the runner-up is forced; default 3, in soft mode 0")


@dataclass
class Output:
    _argument_group_name = "output"
    output_dir: str | None = setting(None, "default analysis_results, or the folder of --from_trace")
    top_k: int = setting(50, "likeliest tokens kept of each step")
    save_full: bool = setting(False, "also keep all log-probs: full_logp.npy, 4 bytes x steps x vocabulary")
    skip_individual_pdfs: bool = setting(False, "leave out the figure for every token")
    max_pdfs: int | None = setting(None, "draw it for the first so many tokens only")


SECTIONS = (Subject, Sampling, Soft, Output)


@dataclass
class AnalysisConfig(*reversed(SECTIONS)):
    """All settings. Refuses impossible values with a ValueError of one line."""

    # Problems are asked, and answers sampled, as in main.py.
    prompting, stop_tag, rollout_mode = GRPOConfig.prompting, GRPOConfig.stop_tag, GRPOConfig.rollout_mode

    def __post_init__(self):
        low = {"max_new_tokens": 1, "num_resamples": 0, "forks": 0, "top_k": 2, "max_pdfs": 0, "seed": 0}
        low |= {"dataset_index": 0, "temperature": 0}
        for name, least in low.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"--{name} {value}: must be {least} or more")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt: the question is empty")
        if self.compare and len(self.compare) != 2:
            raise ValueError(f"--compare takes two models or two folders, not {len(self.compare)}")
        if self.compare and self.from_trace:
            raise ValueError("--from_trace and --compare: choose one (--compare takes trace folders too)")
        if self.num_forks() and not self.num_resamples:
            raise ValueError(f"--forks {self.forks}: needs --num_resamples above 0, the answers that go on from a fork")
        mode = self.rollout_mode()
        if self.forks and (mode.k > 1 or mode.answer_reserve):
            raise ValueError(
                f"--forks {self.forks}: a fork goes on from plain tokens, not in soft mode or with a reserve"
            )

    def num_forks(self) -> int:
        if self.forks is not None:
            return self.forks
        return 0 if self.soft_thinking or self.answer_reserve or not self.num_resamples else 3

    @property
    def max_completion_length(self) -> int:
        return self.max_new_tokens  # by the name that it has in main.py

    def sampling(self) -> dict:
        """Options of rollout.generate."""
        return dict(max_new_tokens=self.max_new_tokens, temperature=self.temperature, stop_tag=self.stop_tag())

    def answer_of(self, text: str) -> str | None:
        """The number that a completion answers with, else what stands in its answer block; None for neither."""
        text = rldatasets.prefilled(self.tags) * self.prefill + text
        return as_number(evaluator.extract_answer(text, self.tags) or evaluator.extract_answer_flexible(text))

    def problem(self) -> rldatasets.Problem:
        if self.prompt is not None:
            return rldatasets.Problem(self.prompt.strip(), None, None)
        problems = rldatasets.load_problems(self.dataset_name, "test", self.dataset_index + 1, self.dataset_path)
        if len(problems) <= self.dataset_index:
            raise ValueError(f"--dataset_index {self.dataset_index}: there are {len(problems)} test problems")
        return problems[self.dataset_index]


def output_folder(name: str | Path) -> Path:
    """The folder, made if need be and found writable."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to --output_dir {str(name)!r}: {error.strerror}") from error
    return folder


def run(config: AnalysisConfig) -> Path:
    """What the command line asks for; returns the folder with the results."""
    are_traces = [Path(name, "meta.json").is_file() for name in config.compare or ()]
    if len(set(are_traces)) == 2:
        raise ValueError(f"--compare {' '.join(config.compare)}: one is a trace; give two models or two traces")
    trace = load(config.from_trace) if config.from_trace else None
    output = output_folder(config.output_dir or config.from_trace or "analysis_results")
    if any(are_traces):
        compare_traces(config.compare, output)
    elif config.compare:
        compare_models(config.compare, config.problem(), config, output)
    else:
        if trace is None:
            problem = config.problem()
            record(*llms.load(config.model_name, trust_remote_code=config.trust_remote_code), problem, config, output)
        elif not output.samefile(config.from_trace):
            save(trace, output)
        write_views(load(output), output, config)
    return output


def main(arguments: list[str] | None = None) -> None:
    description = "Measure and draw the token probabilities of one answer."
    parser = ArgumentParser(SECTIONS, prog="token_analysis.py", description=description, allow_abbrev=False)
    try:
        output = run(AnalysisConfig(**vars(parser.parse_args(arguments))))
    except ValueError as error:
        print(f"token_analysis.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"in {output}/: {', '.join(sorted(path.name for path in output.iterdir()))}")


if __name__ == "__main__":
    main()
