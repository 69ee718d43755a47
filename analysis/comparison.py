"""Comparing two models on one problem, or two traces of one prompt.

A forced comparison reads the same tokens with both models (teacher-forced) and compares their distributions at every
step. A free comparison takes two independent runs: they are compared step by step up to the first different token, and
afterwards only by the distributions of their measures.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

import llms
import rldatasets
from analysis import comparison_pictures
from analysis.files import load_trace, writable_folder, write_csv, write_json, write_views
from analysis.measures import entropy, jsd, kl
from analysis.recording import logprob_chunks, record
from analysis.tokens import fingerprint, token_bytes, token_text
from analysis.trace import Trace
from rollout import Rollout
from tracking import checkpoints

NUM_SHIFTED = 20  # most shifted tokens, and steps, that are listed


def compare_models(names: list[str], problem: rldatasets.Problem, config, output: Path) -> None:
    """Records a trace of each model, in a/ and b/ of `output`, and compares both models on both texts.

    config: token_analysis.AnalysisConfig. Raises ValueError if the tokenizers or their chat templates differ.
    """
    (model_a, tokenizer_a), (model_b, tokenizer_b) = (
        llms.load(checkpoints.resolve_model_name(name), trust_remote_code=config.trust_remote_code) for name in names
    )
    if fingerprint(tokenizer_a) != fingerprint(tokenizer_b):
        raise ValueError(f"--compare: {names[0]!r} and {names[1]!r} have different tokenizers, so no tokens in common")
    prompts = {config.prompt_format().prompt(t, problem.question) for t in (tokenizer_a, tokenizer_b)}
    if len(prompts) == 2:
        raise ValueError(
            f"--compare: {names[0]!r} and {names[1]!r} have different chat templates: try --prompt_style plain"
        )
    traces, forced = {}, {}
    for side, name, model, tokenizer in zip("ab", names, (model_a, model_b), (tokenizer_a, tokenizer_b), strict=True):
        folder = writable_folder(output / side)
        traces[side], rollout = record(model, tokenizer, problem, dataclasses.replace(config, model_name=name), folder)
        write_views(traces[side], folder, **config.views())
        columns, most_shifted = compare_forced([model_a, model_b], tokenizer, rollout)
        forced[f"text_of_{side}"] = forced_summary(columns, most_shifted)
        write_csv(output / f"compare_text_of_{side}.csv", columns)
        picture = output / f"compare_text_of_{side}.png"
        comparison_pictures.draw_forced_comparison(columns, most_shifted, names, side, picture)
    write_comparison(traces["a"], traces["b"], {"forced": forced}, output)


def compare_traces(folders: list[str], output: Path) -> None:
    """Compares two saved traces, without a model."""
    a, b = map(load_trace, folders)
    write_comparison(a, b, {}, output)


def write_comparison(a: Trace, b: Trace, forced: dict, output: Path) -> None:
    """compare.json, with the entries of `forced` in it, and compare_free.png."""
    free = compare_free(a, b)
    write_json(output / "compare.json", {"a": a.meta["model"], "b": b.meta["model"], **forced, "free": free})
    comparison_pictures.draw_free_comparison(a, b, free["common_prefix"], output / "compare_free.png")


# ---------------------------------------------------------------- forced: the same tokens


def compare_forced(models: list, tokenizer, rollout: Rollout, row: int = 0) -> tuple[dict, list[dict]]:
    """Two models, a and b, on the tokens of a row: (columns with one value per step, the most shifted tokens).

    A token's shift is the sum over steps of p_b - p_a: how many more times b would sample it, in expectation.
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
    labels = {token: token_text(token, spelling) for token, spelling in token_bytes(tokenizer, ids).items()}
    columns = arrays | {name: [labels[token] for token in arrays[name].tolist()] for name in names}
    return columns, [{"id": t, "token": labels[t], "shift": float(shift[t])} for t in most_shifted]


def forced_summary(columns: dict, most_shifted: list[dict]) -> dict:
    """Means over steps, and the steps with the largest JSD."""
    order = np.argsort(-columns["jsd"], kind="stable")[:NUM_SHIFTED].tolist()
    lists = {name: np.asarray(column).tolist() for name, column in columns.items()}
    return {
        "tokens": len(columns["jsd"]),
        "mean": {name: float(columns[name].mean()) for name in ("change", "kl_ab", "kl_ba", "jsd", "flips")},
        "most_shifted_steps": [{name: column[t] for name, column in lists.items()} for t in order],
        "most_shifted_tokens": most_shifted,
    }


# ---------------------------------------------------------------- free: two independent runs


def compare_free(a: Trace, b: Trace) -> dict:
    """The common prefix of two traces, changes within it, and the means of each trace after it.

    Raises ValueError if the prompts or the tokenizers differ.
    """
    for name in ("tokenizer", "prompt"):
        if a.meta[name] != b.meta[name]:
            raise ValueError(f"cannot compare traces of different {name}s: {a.meta[name]!r} and {b.meta[name]!r}")
    shared = common_prefix(a["token_ids"], b["token_ids"])

    def describe(trace):
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
        "a": describe(a),
        "b": describe(b),
    }


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """The number of leading tokens that two texts have in common."""
    n = min(len(a), len(b))
    return int(np.append(a[:n] != b[:n], True).argmax())
