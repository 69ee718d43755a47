"""trace.html: one page about a trace (analysis.Trace), a single file that opens without a network.

tracking/pages/trace.html, .css and .js draw the page; this file makes the data that they draw.
"""

from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from tracking import pages
from tracking.pages import to_number

PAGE_TOP = 10  # likeliest tokens of a step on the page


def write_page(trace, file: Path) -> None:
    """Writes the page of a trace."""
    file.write_text(pages.render("trace", {"data": pages.to_json(page_data(trace))}), encoding="utf-8")


def page_data(trace) -> dict:
    """{"meta", "columns": {name: one value per step}, "scales": colours for tokens}, ready for JSON.

    A step's "top" is its likeliest tokens as [label, log-prob, id], its "mixture" the tokens that were fed as
    [label, weight], equal draws added up; empty for a hard step.
    """
    meta, tops, mixtures = trace.meta, [], []
    for ids, logps in zip(trace["topk_ids"][:, :PAGE_TOP].tolist(), trace["topk_logp"][:, :PAGE_TOP], strict=True):
        tops.append([[trace.label(token), to_number(logp), token] for token, logp in zip(ids, logps, strict=True)])
    for t, soft in enumerate(trace["is_soft"].tolist()):
        total = Counter()
        for draw, weight in zip(trace["draws"][t].tolist(), trace["weights"][t].tolist(), strict=True):
            total[draw] += weight * soft
        mixtures.append([[trace.label(draw), round(weight, 4)] for draw, weight in total.most_common() if weight > 0])
    pieces = [trace.spelling[token] for token in trace["token_ids"].tolist()]
    columns = {
        "text": trace.labels,
        "bytes": [" ".join(f"{byte:02x}" for byte in piece or b"") for piece in pieces],
        "id": trace["token_ids"].tolist(),
        "part": trace.parts,
        "logp": [to_number(logp) for logp in trace["logp"]],
        "rank": trace["rank"].tolist(),
        "entropy": [to_number(value) for value in trace["entropy"]],
        "varentropy": [to_number(value) for value in trace["varentropy"]],
        "n95": trace["n95"].tolist(),
        "weight": [to_number(value) for value in trace["top_weight"]],
        "fork": trace.forks.tolist(),
        "forced": trace["forced"].tolist(),
        "top": tops,
        "mixture": mixtures,
    }
    keys = ("model", "temperature", "seed", "vocab_size", "prompt", "finish", "answer", "gold", "forced_forks")
    # A certain token has the colour of the page; the less certain, the further the colour is from the page's.
    light, dark = ([to_hex(colormaps["magma"](x)) for x in np.linspace(*ends, 16)] for ends in ((0.98, 0.12), (0.1, 1)))
    scales = {"light": ["#ffffff", *light], "dark": ["#15171c", *dark]}
    return {"meta": {key: meta[key] for key in keys}, "columns": columns, "scales": scales}
