"""Traces of random logits over tokens that are hard to show."""

import numpy as np
import torch

from analysis import recording
from analysis.measures import TEMPERATURES
from analysis.trace import Trace

# What a model may write, as bytes: markup, quotes, formulas, half characters, other scripts, controls.
TOKENS = [
    b"<reasoning>", b"</script>", b"<img src=x onerror=alert(1)>", b" 'single' \"double\"", b"&lt;b&gt;", b"$x_{2$",
    b"\\n", b"\n", b"\t", b"\xf0\x9f", b"\x98\x80", "😀".encode(), "中文".encode(), "é".encode(), b"<!--",
    b"</reasoning>", b" egg", b"<answer>", b"24", b"</answer>", b"\xe2\x80\xa8", b"__DATA__", b"\x00", b"<|im_end|>",
]  # fmt: skip
UNUSED = len(TOKENS)  # an id with no text


def make_trace(steps=60, seed=0, soft=False, sharp=4.0, resamples=3, **meta):
    """A trace of random logits over TOKENS and four unused ids; the text starts with every token once."""
    rng = np.random.default_rng(seed)
    V, K = UNUSED + 4, 3 if soft else 1
    logp = torch.log_softmax(torch.tensor(sharp * rng.standard_normal((steps, V)), dtype=torch.float32), dim=-1)
    tokens = torch.tensor([t if t <= UNUSED else int(rng.integers(UNUSED)) for t in range(steps)])
    ranks = recording.rank_grid(V)
    arrays = {name: x.numpy() for name, x in recording.measure_chunk(logp, tokens, 0.7, 22, ranks).items()}
    arrays |= {"ranks": ranks, "temperatures": np.array(TEMPERATURES), "token_ids": tokens.int().numpy()}
    arrays |= {"forced": np.zeros(steps, bool), "is_soft": np.full(steps, soft)}
    arrays["draws"] = np.tile(arrays["token_ids"][:, None], (1, K))
    arrays["draws"][:, 1:] = rng.integers(0, V, (steps, K - 1))
    arrays["weights"] = np.full((steps, K), 1 / K, np.float32)
    arrays["top_weight"] = (arrays["weights"] * (arrays["draws"] == arrays["token_ids"][:, None])).sum(1)
    arrays["path_share"] = np.minimum.accumulate(rng.random(steps)).astype(np.float32)
    spelling = dict(enumerate(TOKENS)) | dict.fromkeys(range(UNUSED, V))
    fork = {"step": 3, "token": "'\"", "runner_up": "</script>", "answers_with_runner_up": ["1"]}
    values = {
        "model": "<b>model</b>", "prompt": "</script><script>alert(2)</script>", "question": "?", "gold": "24",
        "answer": "24", "tags": "reasoning", "temperature": 0.7, "seed": 0, "vocab_size": V, "tokenizer": "x",
        "finish": "stop", "text": "",
        "resamples": [{"answer": a, "length": 3, "text": ""} for a in ("24", "$x_{2$", None)[:resamples]],
        "forced_forks": [fork | {"changed_with_token": 0.25, "changed_with_runner_up": 0.75}],
    }  # fmt: skip
    return Trace(values | meta, arrays, spelling)
