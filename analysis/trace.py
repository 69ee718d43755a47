"""Trace: what was recorded of one completion, and the tables that follow from it. Needs no model."""

import functools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

import evaluator
from analysis.measures import FORK_QUANTILE, TEMPERATURES, effective_draws, fork_mask, majority_share
from analysis.tokens import token_text


@dataclass
class Trace:
    """One completion of T steps. All tables and pictures are made from it.

    meta: settings, prompt, text, answers (recording.record lists the keys).
    arrays, at temperature 1 unless the name ends with _t, which is at the sampling temperature:
        token_ids, rank (T,)
        logp, entropy, varentropy, collision, topk_mass, n95, margin (T,), and each with _t
        topk_ids, topk_logp (T, K); tail_mass (T,) of the tokens beyond the top K
        rank_curve (T, len(ranks)) log p at the ranks in `ranks`
        argmax_p (T, len(temperatures)) p(argmax) at the temperatures in `temperatures`
        path_share (T,); is_soft, forced, top_weight (T,); draws, weights (T, draws per position)
    """

    meta: dict
    arrays: dict[str, np.ndarray]
    spelling: dict[int, bytes | None]  # the bytes of every token id in the arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __len__(self) -> int:
        return len(self.arrays["token_ids"])

    def label(self, token: int) -> str:
        """The text of any token id in the arrays."""
        return token_text(token, self.spelling[token])

    @functools.cached_property
    def labels(self) -> list[str]:
        """The text of each step's token."""
        return [self.label(token) for token in self["token_ids"].tolist()]

    @functools.cached_property
    def forks(self) -> np.ndarray:
        """(T,) bool: the steps of highest entropy."""
        return fork_mask(self["entropy"])

    @functools.cached_property
    def parts(self) -> list[str]:
        """ "reasoning", "answer" or "" for each step: the pair of tags between which its token begins.

        A part without a closing tag extends to the end. The reasoning may begin in the prompt (prefill).
        """
        pieces = [self.spelling[token] or b"" for token in self["token_ids"].tolist()]
        starts = np.cumsum([0] + [len(piece) for piece in pieces[:-1]])  # (T,): the byte at which each token begins
        text, names = b"".join(pieces), np.full(len(pieces), "", dtype=object)
        for name, tag in zip(("reasoning", "answer"), evaluator.TAGS[self.meta["tags"]], strict=True):
            opening, closing = f"<{tag}>".encode(), f"</{tag}>".encode()
            prefilled = self.meta["prompt"].rstrip().encode().endswith(opening)
            begin = 0 if prefilled else text.find(opening) + len(opening)
            if prefilled or opening in text:
                end = text.find(closing, begin)
                names[(starts >= begin) & (starts < (len(text) if end < 0 else end))] = name
        return names.tolist()

    def columns(self) -> dict[str, np.ndarray | list]:
        """The columns of tokens.csv: the token, its distribution at temperature 1 and (_t) at the sampling temperature,
        the agreement of resampled paths, the mixture of a soft step."""
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
        """summary.json: means over steps; path and answer consistency over the resampled answers."""
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

    def means(self, step_mask: np.ndarray) -> dict[str, float]:
        """Means of the main scalars over the steps at which step_mask (T,) is True."""
        names = ("entropy", "varentropy", "topk_mass", "margin", "n95", "rank", "logp")
        return {"tokens": int(step_mask.sum())} | {name: float(self[name][step_mask].mean()) for name in names}

    def soft_summary(self) -> dict:
        """Means over the soft steps of 1 - max weight and of exp(H(w)), and the step after the last soft one.
        These are None if there is no soft step."""
        soft = self["is_soft"]
        draws = effective_draws(self["draws"], self["weights"])
        return {
            "share_soft": float(soft.mean()),
            "one_minus_top_weight": float(1 - self["top_weight"][soft].mean()) if soft.any() else None,
            "effective_draws": float(draws[soft].mean()) if soft.any() else None,
            "soft_exit_step": int(np.flatnonzero(soft)[-1]) + 1 if soft.any() else None,
        }

    def exit_step(self) -> int | None:
        """The first step after the reasoning; None if there is no reasoning or it does not end."""
        inside = [t for t, part in enumerate(self.parts) if part == "reasoning"]
        return inside[-1] + 1 if inside and inside[-1] + 1 < len(self) else None
